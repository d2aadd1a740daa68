"""`python benchmarks/rollout_speed.py`: tokens per second of a rollout, all decoders in one run.

naive            both models, each with its KV cache, one token at a time: the baseline
naive, no cache  the same with the whole prefix recomputed for every token
hf student       `generate` of the student alone: what an on-policy (GKD) rollout pays
hf teacher       `generate` of the teacher alone: what a teacher-written (SeqKD) rollout pays

Prompts are the first of the embedded data; no row ends before `max_new_tokens`, so every decoder
writes the same number of tokens. Times are medians over the repeats, after one run thrown away.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
import transformers
from rich.console import Console
from rich.table import Table

from switchkd.config import POLICIES, SwitchConfig
from switchkd.data import read_examples, tokenize
from switchkd.models import cut_layers, load_model, load_tokenizer, share_vocabulary
from switchkd.rollout import rollout_naive


class NoCache:
    """A model that forgets: every call runs the whole prefix again."""

    def __init__(self, model):
        self.model, self.config, self.device = model, model.config, model.device
        self.ids = self.positions = None

    def eval(self):
        self.ids = self.positions = None  # a new rollout begins
        return self

    def __call__(self, input_ids, attention_mask, position_ids, **_):
        if self.ids is not None:
            input_ids = torch.cat([self.ids, input_ids], 1)
            position_ids = torch.cat([self.positions, position_ids], 1)
        self.ids, self.positions = input_ids, position_ids
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=1,
        )
        return SimpleNamespace(logits=out.logits, past_key_values=None)


def generate(model, prompts, options):
    """Hugging Face `generate`, sampling at temperature 1."""
    longest = max(map(len, prompts))
    pad = options["pad_token_id"]
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask.to(model.device),
            do_sample=True,
            top_k=0,
            min_new_tokens=options["max_new_tokens"],
            max_new_tokens=options["max_new_tokens"],
            pad_token_id=pad,
        )
    return out[:, longest:]


def measure(decoder: str, teacher, student, prompts, config, options) -> dict:
    """One row: a decoder's median time over the repeats."""
    models = {"naive": (teacher, student), "naive, no cache": (NoCache(teacher), NoCache(student))}
    torch.manual_seed(0)
    seconds, share, tokens = [], None, None
    for _ in range(options["repeats"] + 1):
        start = time.perf_counter()
        if decoder in models:
            out = rollout_naive(
                *models[decoder],
                prompts,
                config.policy(),
                max_new_tokens=options["max_new_tokens"],
                eos_token_ids=[],
                pad_token_id=options["pad_token_id"],
                vocab_size=options["vocab_size"],
                sampling=config.sampling(),
            )
            tokens, share = out.tokens, out.teacher_tokens() / out.tokens.numel()
        else:
            generate(student if decoder == "hf student" else teacher, prompts, options)
        if teacher.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    count = len(prompts) * options["max_new_tokens"]
    return {
        "decoder": decoder,
        "batch": len(prompts),
        "dtype": str(student.dtype).removeprefix("torch."),
        "tokens_per_s": count / median,
        "ms_per_token": 1e3 * median / options["max_new_tokens"],
        "teacher_share": share,
        "tokens": tokens,
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="embedded", help="folder, Hub id or 'embedded'")
    parser.add_argument("--student", default="embedded")
    parser.add_argument("--student_layers", default=None, help="default 0 for the embedded pair")
    parser.add_argument("--policy", default="switch", choices=POLICIES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true", help="batch 8, 16 tokens, one repeat")
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.max_new_tokens, args.repeats = [8], 16, 1
    if args.student == "embedded" and args.student_layers is None:
        args.student_layers = "0"

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(args.student)
    teacher = load_model(args.teacher, dtype=getattr(torch, args.dtype)).to(device).eval()
    student = load_model(args.student, dtype=getattr(torch, args.dtype))
    if args.student_layers:
        cut_layers(student, args.student_layers)
    student = student.to(device).eval()
    vocabulary = share_vocabulary(teacher, student, load_tokenizer(args.teacher), tokenizer)
    config = SwitchConfig(
        use_cpu=device == "cpu",
        rollout_policy=args.policy,
        max_new_tokens=args.max_new_tokens,
        adaswitch_k=2.0,
        adaswitch_window=8,
    )
    examples, report = read_examples("embedded", limit=max(args.batch))
    rows = tokenize(
        examples, report, tokenizer, max_prompt_length=256, max_completion_length=10**6
    ).rows
    options = {
        "max_new_tokens": args.max_new_tokens,
        "pad_token_id": vocabulary.pad_token_id,
        "vocab_size": vocabulary.size,
        "repeats": args.repeats,
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    shared = {
        "pair": f"{args.teacher} -> {args.student}[{args.student_layers or 'all'}]",
        "policy": args.policy,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }
    results = []
    for batch in args.batch:
        prompts = [row.prompt_ids for row in rows[:batch]]
        block = [
            measure(decoder, teacher, student, prompts, config, options)
            for decoder in ("naive", "naive, no cache", "hf student", "hf teacher")
        ]
        baseline = block[0]["tokens"]
        for row in block:
            tokens = row.pop("tokens")
            known = tokens is not None
            row["equal_tokens"] = (tokens == baseline).double().mean().item() if known else None
            row["speedup_vs_naive"] = row["tokens_per_s"] / block[0]["tokens_per_s"]
        results += [{**shared, **row} for row in block]
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    show(results)
    return 0


def show(results: list[dict]) -> None:
    table = Table(title=f"{results[0]['pair']}, {results[0]['policy']}, {results[0]['device']}")
    for column in ("batch", "decoder", "tokens/s", "ms/token", "vs naive", "teacher", "equal"):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    for row in results:
        share, equal = row["teacher_share"], row["equal_tokens"]
        table.add_row(
            str(row["batch"]),
            row["decoder"],
            f"{row['tokens_per_s']:.0f}",
            f"{row['ms_per_token']:.2f}",
            f"{row['speedup_vs_naive']:.2f}x",
            "-" if share is None else f"{share:.0%}",
            "-" if equal is None else f"{equal:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
