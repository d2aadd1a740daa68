"""Scores of other scripts, scores that cannot be measured, and the table that shows them."""

import pytest
import torch
from rich.console import Console
from test_evaluate import rows_of
from test_trainer import make

from switchkd import metrics
from switchkd.console import print_summary
from switchkd.rollout import Sampling

PROMPTS = [{"prompt": f"say {i} "} for i in range(8)]


def test_rouge_l_of_other_scripts_by_hand():
    # "你好" of "你好吗" and of "你好啊": 2 characters of 3 each
    assert metrics.rouge_l("你好啊", ["你好吗"]) == pytest.approx(100 * 2 / 3)
    assert metrics.rouge_l("Мама мыла окно.", ["мама, мыла раму"]) == pytest.approx(100 * 2 / 3)
    assert metrics.rouge_l("नमस्ते दुनिया", ["नमस्ते"]) == pytest.approx(100 * 2 / 3)
    assert metrics.rouge_l("ガス 7", ["ガ", "7"]) == pytest.approx(100), "one reference has a token"
    assert metrics.rouge_l("好", ["!?"]) == 0


def test_rouge_l_of_english_is_the_published_one():
    from rouge_score.rouge_scorer import RougeScorer

    published = RougeScorer(["rougeL"], use_stemmer=True)
    for answer, reference in (
        ("Running dogs, 7!", "the dog runs 7"),
        ("naïve café", "a naive cafe"),
    ):
        want = 100 * published.score(reference, answer)["rougeL"].fmeasure
        assert metrics.rouge_l(answer, [reference]) == want


def test_a_string_is_no_list_of_references_and_of_none_there_is_no_score():
    for references, got in (("the cat sat", "'the cat sat'"), ([], r"\[\]")):
        with pytest.raises(ValueError, match=f"references: got {got}, expected a list of 1 string"):
            metrics.rouge_l("the cat sat", references)
    with pytest.raises(ValueError, match="references: got 'word one', expected a list"):
        metrics.score(["word one"], ["word one"])
    with pytest.raises(ValueError, match="predictions: got none, expected at least one"):
        metrics.score([], [])


def test_measuring_leaves_each_module_in_its_mode(tmp_path):
    """Without dropout while it lasts, and with it where a user's own loop goes on."""
    trainer = make(tmp_path, disable_dropout=False)
    models, rows = (trainer.teacher, trainer.model), trainer.train_dataset.rows[:2]

    def measured():
        given = trainer.processing_class, trainer.vocabulary, Sampling(seed=0)
        return (
            metrics.teacher_forced(*models, rows, trainer.vocabulary).tolist(),
            metrics.generate(trainer.model, rows, *given, max_new_tokens=4),
        )

    def modes():
        return [module.training for model in models for module in model.modules()]

    want = measured()
    for model in models:
        model.train()
        next(model.children()).eval()  # a frozen part
    before = modes()
    assert set(before) == {True, False} and trainer.model.config.resid_pdrop > 0
    assert measured() == want
    assert modes() == before


def test_a_single_row_has_no_other_row_as_a_floor():
    rows = rows_of([{"prompt": "a", "completion": "b"}])
    assert metrics.floors(rows).keys() == {"prompt_copied"}
    assert metrics.floors(rows * 2).keys() == {"prompt_copied", "another_reference"}


def test_what_no_row_measures_is_left_out():
    measured = torch.tensor([4.0, 2.0, 8.0, 1.0, 90.0, 3.0])
    assert metrics.means(measured) == {
        "cross_entropy": 0.5, "kl": 2.0, "jsd": 0.25, "rouge_l": 30.0,
    }  # fmt: skip
    assert metrics.means(torch.zeros(6)) == {}
    assert metrics.means(torch.tensor([4.0, 2.0, *[float("nan")] * 2, 0, 0])) == {
        "cross_entropy": 0.5
    }


def test_validation_without_references_chooses_nothing(tmp_path):
    options = dict(rows=PROMPTS, lmbda=1.0, eval_strategy="steps", eval_steps=1)
    with pytest.raises(
        ValueError, match=r"dataset: got no validation row with a response.*rouge_l"
    ):
        make(tmp_path, **options)
    trainer = make(tmp_path, metric_for_best_model=None, load_best_model_at_end=False, **options)
    trainer.train()
    assert trainer.evaluate().keys() == {"eval_seconds"}
    with pytest.raises(ValueError, match="adaptive_lmbda"):
        make(tmp_path, metric_for_best_model=None, load_best_model_at_end=False,
             adaptive_lmbda=True, **options)  # fmt: skip
    with pytest.raises(ValueError, match="metric_for_best_model eval_kl: got no teacher"):
        make(tmp_path, teacher=False, method="sft", eval_strategy="steps", eval_steps=1,
             save_strategy="steps", metric_for_best_model="eval_kl")  # fmt: skip


def test_a_summary_without_scores_shows_none():
    summary = {"before": {}, "after": {"seconds": 1.0}, "floors": {}, "teacher_share": None}
    console = Console(record=True, width=80)
    print_summary({**summary, "seconds": 2.0}, console)
    assert console.export_text() == "training took 2 s\n"
    floors = {"prompt_copied": {"rouge_l": 3.0}}
    print_summary({**summary, "after": {"kl": 1.0}, "floors": floors, "seconds": 2.0}, console)
    text = console.export_text()
    assert "KL(teacher" in text and "Rouge-L floors: prompt copied 3.00" in text
