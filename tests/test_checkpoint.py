"""What a run's folder holds where something went wrong."""

import json

import pytest

from switchkd.checkpoint import (
    COMPLETIONS,
    append_completions,
    check_checkpoint,
    last_checkpoint,
    unsaved,
)


def test_completions_go_into_a_folder_that_is_not_there(tmp_path):
    for step in (1, 2):
        append_completions(tmp_path / "a" / "b", [{"step": step}])
    lines = (tmp_path / "a" / "b" / COMPLETIONS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2}]


def test_a_checkpoint_whose_records_are_no_objects_is_passed_over(tmp_path):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    for name in ("trainer_state.json", "run_state.json", "config.json"):
        for text in ("[]", "[" * 100_000, '{"a'):
            (folder / name).write_text(text)
            with pytest.raises(ValueError, match=f"checkpoint-4: {name} is missing or broken"):
                check_checkpoint(folder)
            assert last_checkpoint(tmp_path) is None
        (folder / name).write_text("{}")


def test_a_disk_that_is_full_is_told_with_the_file(tmp_path):
    (tmp_path / COMPLETIONS).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"could not write .*completions\.jsonl: No space left"):
        append_completions(tmp_path, [{"step": 1}])


def test_the_reason_for_which_a_checkpoint_was_not_saved_is_told(tmp_path):
    def told(error):
        folder = tmp_path / "checkpoint-4"
        folder.mkdir()
        text = str(unsaved(folder, error))
        assert not folder.exists() and "no checkpoint is left" in text
        return text

    several = ValueError("GenerationConfig is invalid:\n - `top_p`:\n   is set\n" + "x" * 900)
    text = told(several)
    assert "could not save checkpoint-4: GenerationConfig is invalid: - `top_p`: is set x" in text
    assert "\n" not in text and len(text) < 700
    assert "could not save checkpoint-4: MemoryError (" in told(MemoryError())
