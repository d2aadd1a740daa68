"""The report: its numbers against runs written by hand, and text of models that stays text."""

import base64
import hashlib
import json
import re

import pytest
from conftest import byte_tokenizer, tiny_model
from report_runs import LOG, SWITCHED, Page, ids, record, write_run

from switchkd import train
from switchkd.report.__main__ import main, make
from switchkd.report.page import settings
from switchkd.report.run import phases, read_run
from switchkd.report.samples import HALF


def show(folder) -> Page:
    return Page(make(folder).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- numbers


def test_the_page_says_what_the_files_say(tmp_path):
    floors = {"prompt_copied": {"rouge_l": 25.25}, "another_reference": {"rouge_l": 5.0}}
    summary = {
        "after": {"kl": 0.876, "rouge_l": 9.5}, "before": {"kl": 3.0}, "floors": floors,
        "steps": 4, "seconds": 20.0, "rollout_tokens": 7, "tokens_per_second": 1.75,
        "teacher_share": 3 / 7, "best_checkpoint": "run/checkpoint-4", "finished": "2026-01-02",
    }  # fmt: skip
    page = show(write_run(tmp_path / "run", SWITCHED, log=LOG, summary=summary, switch_lambda=0.3))
    body = page.body()
    for text in (
        "finished 2026-01-02 after 4 steps", "42.9 %", "3.000 0.876 lower", "prompt copied 25.25",
        "the checkpoint of step 4", "switch_lambda 0.3", "validation 4 s 20.0 %",
        "rollouts 4 s 20.0 %", "losses, forward 6 s 30.0 %", "rest 6 s 30.0 %", "6 tokens, median",
    ):  # fmt: skip
        assert text in body, text
    words = [a["aria-label"] for a in page.all("svg", "chart")]
    assert any("loss from 1.5 at step 2 to 1.5 at step 2" in w for w in words)  # the NaN left out
    assert any("Rouge-L from 8 at step 2 to 9 at step 4" in w for w in words)
    assert any("teacher from 0.6667 at step 1 to 0.25 at step 4" in w for w in words)
    titles = [a["title"] for a in page.all("span", "t") if "title" in a]
    assert len(titles) == 7
    assert "token 1, id 5: written by the teacher" in titles[1]
    assert "p 25 % (teacher), q 25 % (student)" in titles[1]
    assert "JSD 0.75 bits, τ 0.5 bits" in titles[1]
    assert "not compared" in titles[6]
    assert len(page.all("span", "t w s5")) == 2 and len(page.all("span", "t w s0")) == 1
    # τ lies over the shares and over the divergences: its drawing has one corner a position
    curves = [a["d"] for a in page.all("path", "line ink dash")]
    assert [d.count(",") for d in curves] == [4, 4]


def test_a_jsd_in_nats_is_called_so(tmp_path):
    page = show(write_run(tmp_path / "run", SWITCHED, jsd_base="e"))
    titles = [a["title"] for a in page.all("span", "t") if "title" in a]
    assert "JSD 0.75 nats, τ 0.5 nats" in titles[1]


def test_phases_of_an_interrupted_run_come_from_its_checkpoint(tmp_path):
    run = read_run(write_run(tmp_path / "run", SWITCHED, log=LOG))
    assert dict(phases(run)) == {
        "rollouts": 4.0,
        "losses, forward": 0.5 * 2 * 2 + 1.0 * 2 * 2,  # per micro-batch, two in a step
        "validation": 4.0,
        "backward, optimizer, saving, rest": 20.0 - 14.0,
    }
    assert run.eval_series("kl") == [(0, 3.0), (2, 2.0), (4, 1.0)]
    body = show(run.folder).body()
    assert "not finished: logged up to step 4 of 8" in body and "3.000 1.000 lower" in body


def test_the_longest_log_is_read(tmp_path):
    folder = write_run(tmp_path / "run", SWITCHED, log=LOG)
    longer = [*LOG, {"step": 6, "loss": 0.5}]
    state = {"global_step": 6, "max_steps": 8, "log_history": longer}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert read_run(folder).series("loss") == [(2, 1.5), (6, 0.5)]
    (folder / "trainer_state.json").write_text(json.dumps(state)[:-9])  # cut off by a kill
    assert read_run(folder).series("loss") == [(2, 1.5)]


# ---------------------------------------------------------------------- text of models

EVIL = "<script>alert(1)</script></script><img src=x onerror=alert(2)>\" onmouseover='x' & é"
HIDDEN = "\x00\x1b[31m\u202e\u2028\t"


def evil_run(folder):
    tokenizer = byte_tokenizer()
    tokens = [*ids(EVIL, tokenizer), ids("é", tokenizer)[0]]  # ends within a character
    n = len(tokens)
    line = record(1, 0, [1] * n, [0.5] * n, [0.1] * n, tokens=tokens, prompt=EVIL + HIDDEN)
    other = {**line, "step": 9, "prompt": "\ud800", "completion": EVIL}
    write_run(folder, [line, other], log=LOG, run_name=EVIL, hub_model_id=HIDDEN)
    tokenizer.save_pretrained(folder)
    return folder


def test_text_of_models_is_shown_and_never_run(tmp_path):
    html = make(evil_run(tmp_path / "<b>run")).read_text(encoding="utf-8")
    page = Page(html)
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not page.all("img") and not page.all("b")
    for tag, attributes in page.tags:
        assert not [a for a in attributes if a.startswith("on") or a in ("src", "href")], tag
    assert not re.search(r"url\(|@import|https?:", html)
    prompts = "".join(page.text)
    assert EVIL in prompts and "␀␛[31m⟨U+202E⟩⟨U+2028⟩␉" in prompts and "⟨U+D800⟩" in prompts
    assert not set(html) & {"\x00", "\x1b", "\u202e", "\u2028"}
    completions = re.findall(r'<p class="text".*?</p>', html, re.S)
    assert len(completions) == 2
    shown = "".join(Page(completions[0]).text)[1:].replace(HALF, "")
    assert shown == EVIL + "\ufffd"


def test_without_a_tokenizer_tokens_are_numbers(tmp_path):
    page = show(write_run(tmp_path / "run", SWITCHED))
    assert "No tokenizer was found" in page.body() and "[5][5][5]" in page.body()


# ---------------------------------------------------------------------- kinds of runs


@pytest.mark.parametrize(
    "policy, records, shown, missing",
    [
        ("adaswitch",
         [record(s, 0, [0, 0, 1, 1], [1.5, 0.2, 9.0, None], [None, None, 2.5, None])
          for s in (1, 9)],
         ["KL(p‖q) by position", "25.0 % of the tokens were written without", "τ 2.5 nats"], []),
        ("skd", [record(1, 0, [0, 1], [0, 900], [24.0, 24.0])],
         ["Rank by position", "threshold K", "Rank 901, K 25"], ["τ", "JSD by"]),
        ("student", [record(1, 0, [0, 0], [None, None], [None, None])],
         ["Who writes, by position", "0.0 %"], ["by position, bits", "How far apart", "τ"]),
        ("teacher", [record(1, 0, [1, 1], [None, None], [None, None])], ["100.0 %"], ["How far"]),
        ("switch", [record(1, 0, [1, 0], [0.1, 0.2], [None, None])],  # schedule random
         ["JSD by position", "How far apart: JSD"], ["threshold τ"]),
        ("switch", [], ["No rollouts are recorded", "rollouts none"], ["Completions", "position"]),
    ],
)  # fmt: skip
def test_every_kind_of_run_has_its_report(tmp_path, policy, records, shown, missing):
    page = show(write_run(tmp_path / "run", records, log=LOG, rollout_policy=policy))
    text = page.body() + " ".join(a.get("title", "") for a in page.all("span"))
    for part in shown:
        assert part in text, part
    for part in missing:
        assert part not in text, part
    for chart in page.all("svg", "chart"):
        assert chart["role"] == "img" and len(chart["aria-label"]) > 20
    drawn = ("d", "points", "x", "y", "cx", "cy", "height")
    numbers = " ".join(str(v) for _, a in page.tags for k, v in a.items() if k in drawn)
    assert "nan" not in numbers and "inf" not in numbers


def test_a_run_killed_before_its_first_checkpoint(tmp_path):
    folder = write_run(tmp_path / "run", SWITCHED)
    for path in (folder / "checkpoint-4").iterdir():
        path.unlink()
    (folder / "checkpoint-4").rmdir()
    with (folder / "completions.jsonl").open("a") as file:
        file.write('{"step": 5, "tok')
    body = show(folder).body()
    assert "1 unreadable line(s)" in body and "no log of its steps" in body and "42.9 %" in body
    assert "steps 4" in body  # of its rollouts
    (folder / "config.yaml").unlink()  # a trainer used from Python
    body = show(folder).body()
    assert "divergence by position" in body and "no config.yaml" in body


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the command itself, with rows that come twice."""
    import torch

    folder = tmp_path_factory.mktemp("trained")
    for name, seed in (("teacher", 1), ("student", 2)):
        tiny_model(vocab_size=258, seed=seed, dtype=torch.float32).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"say {i} ", "completion": "ab" * (1 + i % 5)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dict(
        model_name_or_path=folder / "student", teacher_model_name_or_path=folder / "teacher",
        dataset_name=folder / "rows.jsonl", output_dir=folder / "run", eval_size=2,
        max_prompt_length=20, max_new_tokens=8, per_device_train_batch_size=1, max_steps=5,
        gradient_accumulation_steps=2, jsd_base="e", lmbda=1, logging_steps=1,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, use_cpu="true",
        log_completions="false", disable_tqdm="true",
    )  # fmt: skip
    assert train.main([str(p) for k, v in options.items() for p in (f"--{k}", v)]) == 0
    return folder / "run"


def test_report_of_a_real_run(trained, capsys):
    run = read_run(trained)
    assert [s for s, _ in run.series("loss")] == [1, 2, 3, 4, 5]  # the last is in no checkpoint
    assert main([str(trained)]) == 0
    assert str(trained / "report.html") in capsys.readouterr().out.replace("\n", "")
    page = Page((trained / "report.html").read_text(encoding="utf-8"))
    body = page.body()
    assert "No tokenizer" not in body and "after 5 steps" in body and "finished" in body
    assert "Early in training" in body and "Late in training" in body
    rows = [a["data-row"] for a in page.all("option")]
    assert len(set(rows)) < len(rows) <= 10  # some prompts stand in both lists
    records = [json.loads(line) for line in (trained / "completions.jsonl").open()]
    tokens = sum(len(r["tokens"]) for r in records)
    assert tokens == run.totals["tokens"] and f"rollout tokens {tokens}" in body
    assert run.config["gradient_accumulation_steps"] == 2  # for the times of its losses
    forward = sum(seconds for _, seconds in run.series("time/forward"))
    assert dict(phases(run))["losses, forward"] == pytest.approx(2 * forward)
    titles = [a["title"] for a in page.all("span", "t") if "title" in a]
    assert any(re.search(r"JSD \S+ nats, τ \S+ nats", title) for title in titles)
    changed, rest = settings(run.config)
    assert "max_new_tokens" in dict(changed) and "skew_alpha" in dict(rest)
    assert not {"use_cpu", "hub_token", "accelerator_config"} & set(dict(changed))


# ---------------------------------------------------------------------- size and errors


def test_long_completions_are_cut_in_the_page_alone(tmp_path):
    n = 700
    page = show(write_run(tmp_path / "run", [record(1, 0, [1] * n, [0.5] * n, [0.1] * n)]))
    assert len(page.all("span", "t w s4")) == 512
    assert "The first 512 of 700 tokens" in page.body() and "rollout tokens 700" in page.body()


def broken_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    (tmp_path / "file").write_text("")
    early = tmp_path / "early"
    early.mkdir()
    (early / "config.yaml").write_text("rollout_policy: switch\n")
    write_run(tmp_path / "yaml", []).joinpath("config.yaml").write_text("a: [1")
    write_run(tmp_path / "list", []).joinpath("config.yaml").write_text("- 1")
    write_run(tmp_path / "other", [SWITCHED[0], {"prompt": "x", "completion": "y"}])
    short = {**SWITCHED[0], "student_logprob": [0.0]}
    write_run(tmp_path / "short", [short])


@pytest.mark.parametrize(
    "name, message",
    [
        ("none", "expected the output folder"),
        ("file", "expected the output folder"),
        ("empty", "without config.yaml"),
        ("photos", "without config.yaml"),
        ("early", "no log and no rollouts yet"),
        ("yaml", "not valid YAML"),
        ("list", "expected a run's options"),
        ("other", "line 2: expected a rollout"),
        ("short", "different lengths"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, capsys, name, message):
    broken_folders(tmp_path)
    assert main([str(tmp_path / name)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "error:" in out and message.replace(" ", "") in out.replace(" ", "")
    assert not list(tmp_path.rglob("report.html"))


def test_output_goes_where_it_is_told(tmp_path, capsys):
    folder = write_run(tmp_path / "run", SWITCHED)
    assert main([str(folder), "--output", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").exists() and not (folder / "report.html").exists()
    assert main([str(folder), "--output", str(tmp_path / "no" / "x.html")]) == 1
    assert "existing" in capsys.readouterr().out
