"""(g) The misguidance probe: does a better rollout have a lower loss? SWITCH, arXiv 2410.19503,
Table 2: Spearman's rho between Rouge-L of a rollout and its training loss, by its length.

At the start of distillation, on the training prompts; more negative is better guidance.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console

from benchmarks.experiments.runs import Runs, mean_and_deviation
from benchmarks.experiments.tables import save, show, write_csv
from switchkd import losses
from switchkd.data import read_examples, tokenize
from switchkd.decoder import rollout
from switchkd.metrics import rouge_l
from switchkd.models import load_model, load_tokenizer
from switchkd.policies import Student, Switch
from switchkd.rollout import Sampling
from switchkd.vocabulary import share_vocabulary

LENGTHS = ((1, 10), (11, 50), (51, 10**9))  # words, as the paper splits
POLICIES = {"student": Student, "SWITCH": Switch}


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Average ranks: equal values share one."""
    order = values.sort().values
    first, last = (torch.searchsorted(order, values, side=side) for side in ("left", "right"))
    return (first + last - 1).double() / 2


def spearman(x: list[float], y: list[float]) -> float:
    """Spearman's rank correlation; NaN for fewer than three pairs or constant values."""
    if len(x) < 3:
        return float("nan")
    pair = torch.stack([ranks(torch.tensor(v, dtype=torch.float64)) for v in (x, y)])
    return float(torch.corrcoef(pair)[0, 1])


@torch.no_grad()
def probe(runs: Runs, seed: int, limit: int) -> dict[tuple[str, str], tuple[float, int]]:
    """(rollouts, words) to (rho, number of rollouts) for the student that one seed starts from."""
    start = str(runs.path(runs.student(runs.scale.student, seed)))
    options = runs.common
    tokenizer, student = load_tokenizer(start), load_model(start, dtype="float32").eval()
    teacher = load_model(runs.teacher, dtype=options["teacher_dtype"]).eval()
    vocabulary = share_vocabulary(teacher, student, load_tokenizer(runs.teacher), tokenizer)
    examples, report = read_examples(options["dataset_name"], limit=limit)
    limits = dict(
        max_prompt_length=options["max_prompt_length"],
        max_completion_length=options["max_new_tokens"],
    )
    rows = tokenize(examples, report, tokenizer, **limits).rows
    found = {}
    for name, policy in POLICIES.items():
        out = rollout(
            None if policy is Student else teacher, student, [row.prompt_ids for row in rows],
            policy(), batch_size=options["rollout_batch_size"],
            sequence_ids=[row.id for row in rows], sampling=Sampling(seed=seed),
            max_new_tokens=options["max_new_tokens"], eos_token_ids=vocabulary.eos_token_ids,
            pad_token_id=vocabulary.pad_token_id, vocab_size=vocabulary.size,
        )  # fmt: skip
        groups = defaultdict(lambda: ([], []))
        for row, tokens in zip(rows, out.completions(), strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            batch = losses.collate([row.prompt_ids], [tokens], vocabulary.pad_token_id)
            loss = losses.distillation_loss(
                teacher, student, student, batch, vocab_size=vocabulary.size,
                kind="skew_reverse_kl", reduction="mean",
            )  # fmt: skip
            words = len(text.split())
            bounds = next((b for b in LENGTHS if b[0] <= words <= b[1]), LENGTHS[0])
            groups[bounds][0].append(rouge_l(text, row.example.references))
            groups[bounds][1].append(float(loss))
        for low, high in LENGTHS:
            pair = groups[low, high]
            words = f"{low}-{high}" if high < 10**9 else f"{low}+"
            found[name, words] = spearman(*pair), len(pair[0])
    return found


def analyse(runs: Runs, limit: int, out: Path, console: Console) -> None:
    runs.train([])  # the students to start from
    each = [probe(runs, seed, limit) for seed in runs.seeds]
    header = ["rollouts", "words", "rho_mean", "rho_deviation", "rollouts_a_seed"]
    rows = []
    for key in each[0]:
        mean, deviation = mean_and_deviation([one[key][0] for one in each])
        count = sum(one[key][1] for one in each) / len(each)
        rows.append([*key, f"{mean:.3f}", f"{deviation:.3f}", f"{count:.0f}"])
    write_csv(out / "misguidance.csv", header, rows)
    show(f"misguidance probe, {len(each)} seeds (more negative is better)", header, rows, console)
    figure, axis = plt.subplots(figsize=(5.5, 3.4))
    for shift, name in zip((-0.18, 0.18), POLICIES, strict=True):
        part = [row for row in rows if row[0] == name]
        axis.bar(
            [i + shift for i in range(len(part))], [float(r[2]) for r in part], 0.34,
            yerr=[float(r[3]) for r in part], label=name,
        )  # fmt: skip
    axis.set_xticks(range(len(part)), [f"{row[1]} words" for row in part])
    axis.set_ylabel("Spearman's rho, Rouge-L and loss")
    axis.legend()
    save(figure, out / "misguidance.png")
