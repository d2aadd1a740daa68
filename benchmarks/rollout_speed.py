"""`python benchmarks/rollout_speed.py`: tokens per second of a rollout, all decoders in one run.

naive            both models, each with its KV cache, one token at a time: the baseline
naive, no cache  the same with the whole prefix recomputed for every token
hf student       `generate` of the student alone: what an on-policy (GKD) rollout pays
hf teacher       `generate` of the teacher alone: what a teacher-written (SeqKD) rollout pays
block k=K X      the block decoder, K tokens a round drafted by model X
block            the block decoder as it is used: drafter and K by measured times and acceptance

No row ends before `max_new_tokens`, so every decoder writes as many tokens. Times are medians over
the repeats, after one run thrown away. The shares of the phases come from one more run, in which
the device is waited for around each phase. The roofline is what cannot be avoided: the bytes of
weights and caches that the passes of either model read, over the bandwidth of a large copy in the
same run. The pairs are described in rollout_pairs.py.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks import rollout_pairs as pairs
from benchmarks.rollout_meter import Meter, NoCache, generate, weight_bytes
from benchmarks.timing import Timer, commit, copy_ceiling, dtype_name, flat, open_device, save
from switchkd.cache import position_bytes
from switchkd.config import POLICIES, SwitchConfig
from switchkd.decoder import rollout
from switchkd.devices import processor_name
from switchkd.engine import Engine
from switchkd.rollout import Rollout, rollout_naive

PLANS = {
    "block k=1 student": {"block": 1, "drafter": "student"},
    "block k=4 student": {"block": 4, "drafter": "student"},
    "block k=4 teacher": {"block": 4, "drafter": "teacher"},
    "block": {"block": None, "drafter": None},
}
DECODERS = ("naive", "naive, no cache", "hf student", "hf teacher", *PLANS)
PHASES = ("prefill", "draft", "verify", "decide", "other")  # of the block decoder
PATIENCE = 20.0  # seconds after which a decoder is not run once more, if a warm run is among them
ENDLESS = 600.0  # seconds of a first run that is all there will be


class Bench:
    """Measures all decoders, one pair and batch at a time."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.timer = args, Timer(device)
        self.bandwidth = 1e9 * copy_ceiling(self.timer, "").gbps
        config = SwitchConfig(
            use_cpu=True,  # of no consequence here, and it looks for no device then
            rollout_policy=args.policy,
            max_new_tokens=args.max_new_tokens,
            adaswitch_k=2.0,
            adaswitch_window=8,
        )
        self.policy, self.sampling = config.policy(), config.sampling()
        cuda = device.type == "cuda"
        self.shared = {
            "max_new_tokens": args.max_new_tokens,
            "device": torch.cuda.get_device_name(device) if cuda else processor_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit(),
            "copy_gbps": self.bandwidth / 1e9,
        }

    def runner(self, decoder: str, pair: pairs.Pair, prompts: list) -> Callable:
        """What is timed: it returns a rollout, or the tokens of `generate`."""
        count, pad = self.args.max_new_tokens, pair.pad_token_id
        given = {
            "policy": self.policy,
            "sampling": self.sampling,
            "max_new_tokens": count,
            "pad_token_id": pad,
            "vocab_size": pair.vocab_size,
            "eos_token_ids": [],
        }
        teacher, student = pair.teacher, pair.student
        if decoder in PLANS:  # caches, graphs and what was learnt are kept, as in training
            engine = Engine(teacher, student, **PLANS[decoder])
            return lambda: rollout(teacher, student, prompts, engine=engine, **given)
        if decoder.startswith("hf"):
            model = student if decoder == "hf student" else teacher
            return lambda: generate(model, prompts, count, pad)
        if decoder == "naive, no cache":
            teacher, student = NoCache(teacher), NoCache(student)
        return lambda: rollout_naive(teacher, student, prompts, **given)

    def seconds(self, run: Callable) -> float:
        """Median without the first run, which is cold; what takes long is run less often."""
        times: list[float] = []
        for _ in range(self.args.repeats + 1):
            if sum(times) >= (PATIENCE if len(times) > 1 else ENDLESS):
                break
            self.timer.synchronize()
            start = time.perf_counter()
            run()
            self.timer.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:] or times)

    def batch(self, pair: pairs.Pair, size: int) -> list[dict]:
        """A row for each decoder."""
        prompts, rows = pair.prompts[:size], []
        for decoder in self.args.decoders:
            run = self.runner(decoder, pair, prompts)
            seconds = self.seconds(run)
            meter = Meter(self.timer.synchronize)
            row = self.row(decoder, pair, prompts, seconds)
            if decoder.startswith("hf"):
                meter.steps(self.args.max_new_tokens, size, decoder.removeprefix("hf "))
            else:
                with meter:
                    out = run()
                if decoder == "naive":
                    baseline, naive = seconds, out
                    reached = pairs.reached(pair, out, prompts, self.sampling)
                row.update(self.written(decoder, out, naive, meter))
                row.update(agreement=reached.agreement, confidence=reached.confidence)
            row["speedup_vs_naive"] = baseline / seconds
            row.update(self.roofline(pair, prompts, meter, cached=decoder != "naive, no cache"))
            rows.append({**row, **self.shared})
        return rows

    def row(self, decoder: str, pair: pairs.Pair, prompts: list, seconds: float) -> dict:
        """All columns; None where one has no meaning for this decoder."""
        each = self.args.max_new_tokens
        return {
            "pair": pair.name,
            "policy": self.args.policy,
            "decoder": decoder,
            "batch": len(prompts),
            "dtype": dtype_name(pair.student.dtype),
            "tokens_per_s": len(prompts) * each / seconds,
            "ms_per_token": 1e3 * seconds / each,
            "teacher_share": None,
            "accepted_per_round": None,
            "accepted_per_teacher_pass": None,
            "speedup_vs_naive": None,
            "roofline_tokens_per_s": None,
            "mb_per_token": None,
            "equal_tokens": None,
            "rows_parting": None,
            "first_parting": None,
            "divergence_difference": None,
            "agreement": None,
            "confidence": None,
            "phases": None,
            "plans": None,
            **PLANS.get(decoder, {"block": None, "drafter": None}),
            "models": pair.label,
            "knobs": pair.knobs and pair.knobs._asdict(),
        }

    def written(self, decoder: str, out: Rollout, naive: Rollout, meter: Meter) -> dict:
        """What a rollout says: who wrote, how much a round, the naive loop's tokens or not.

        divergence_difference: the largest, over the tokens up to where a row parts, with equal
        prefixes, from the naive loop's divergence.
        """
        if decoder not in PLANS:
            meter.steps(self.args.max_new_tokens, len(naive.tokens), "teacher", "student")
        count, equal = naive.tokens.numel(), out.tokens == naive.tokens
        parts, along = ~equal.all(1), equal.long().cumprod(1).bool()
        along = torch.nn.functional.pad(along[:, :-1], (1, 0), value=True)
        apart = (out.divergence - naive.divergence)[along].abs().nan_to_num(nan=0.0)
        return {
            "teacher_share": out.teacher_tokens() / count,
            "accepted_per_round": count / meter.rows["rounds"],
            "accepted_per_teacher_pass": count / meter.rows["teacher"],
            "equal_tokens": equal.double().mean().item(),
            "rows_parting": int(parts.sum()),
            "divergence_difference": apart.max().item(),
            "first_parting": int((~equal).long().argmax(1)[parts].min()) if parts.any() else None,
            "phases": meter.shares(),
            "plans": dict(meter.plans) or None,
        }

    def roofline(self, pair: pairs.Pair, prompts: list, meter: Meter, cached: bool) -> dict:
        """Bytes that must be read for a token, and how many tokens a second that allows."""
        count, needed = len(prompts) * self.args.max_new_tokens, 0.0
        length = sum(map(len, prompts)) / len(prompts) + (self.args.max_new_tokens - 1) / 2
        for role, model in (("teacher", pair.teacher), ("student", pair.student)):
            needed += weight_bytes(model) * meter.passes[role]
            needed += cached * position_bytes(model) * length * meter.rows[role]
        return {
            "roofline_tokens_per_s": self.bandwidth * count / needed,
            "mb_per_token": needed / count / 1e6,
        }


def show(rows: list[dict], notes: list[str], console: Console) -> None:
    """The table of a pair, and what a reader must know about it."""
    first = rows[0]
    table = Table(title=f"{first['models']}, {first['policy']}, {first['dtype']}")
    columns = ["batch", "decoder", "tokens/s", "ms/token", "vs naive", "of roof", "teacher"]
    columns += ["/round", "/t.pass", "equal", "phases, %"]
    for column in columns:
        table.add_column(column, justify="left" if column == "decoder" else "right", no_wrap=True)

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for row in rows:
        phases = row["phases"] if row["decoder"] in PLANS else None
        table.add_row(
            str(row["batch"]),
            row["decoder"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['ms_per_token']:.2f}",
            f"{row['speedup_vs_naive']:.2f}x",
            f"{row['tokens_per_s'] / row['roofline_tokens_per_s']:.1%}",
            cell(row["teacher_share"], ".0%"),
            cell(row["accepted_per_round"], ".2f"),
            cell(row["accepted_per_teacher_pass"], ".2f"),
            cell(row["equal_tokens"], ".1%"),
            "/".join(f"{100 * phases.get(phase, 0):.0f}" for phase in PHASES) if phases else "-",
            end_section=row["decoder"] == rows[-1]["decoder"],
        )
    console.print(table)
    lines = [f"{first['device']}, {first['threads']} threads, torch {first['torch']}"]
    lines += ["tokens a row, /round and /t.pass of the teacher; phases: " + ", ".join(PHASES)]
    lines += notes
    if first["knobs"]:
        lines.append("knobs: " + flat(first["knobs"]))
    for line in lines + [f"batch {row['batch']}: {x}" for row in rows for x in remarks(row)]:
        console.print(line, highlight=False, markup=False)


def remarks(row: dict) -> list[str]:
    if row["decoder"] == "naive":
        got = pairs.Reached(row["teacher_share"], row["agreement"], row["confidence"])
        asked = row["knobs"] and (row["policy"], row["max_new_tokens"]) == ("switch", pairs.LENGTH)
        far = asked and row["batch"] >= pairs.ROWS and not pairs.typical(got)
        return [
            pairs.describe(got) + ("; --tune would bring it nearer" if far else ""),
            f"roofline of the naive loop: {row['mb_per_token']:,.2f} MB a token at "
            f"{row['copy_gbps']:,.1f} GB/s, {row['roofline_tokens_per_s']:,.0f} tokens/s",
            "time of the naive loop: " + flat(row["phases"]),
        ]
    lines = []
    if row["rows_parting"]:
        lines.append(
            f"{row['decoder']}: {row['rows_parting']} rows part from the naive loop's, the first "
            f"at token {row['first_parting']}; divergences differ by up to "
            f"{row['divergence_difference']:.1e} before"
        )
    if row["decoder"] == "block":
        plans = sorted(row["plans"].items(), key=lambda item: -item[1])
        lines.append("rounds of block: " + ", ".join(f"{n} x {plan}" for plan, n in plans))
    return lines


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pair", nargs="+", help=f"of {', '.join(pairs.NAMES)}")
    add("--models", help="folder with the models of the pair smollm2")
    add("--teacher", help="folder, Hub id or 'embedded', instead of --pair")
    add("--student", help="folder, Hub id or 'embedded'")
    add("--student_layers", help="layers that the student keeps, e.g. 0-11,18-29")
    add("--policy", default="switch", choices=POLICIES)
    add(
        "--decoders",
        nargs="+",
        default=DECODERS,
        choices=DECODERS,
        help="the naive loop runs always",
    )
    add("--batch", type=int, nargs="+", default=[1, 8, 32])
    add("--max_new_tokens", type=int, help="default 64 on a CPU, 128 on a GPU")
    add("--repeats", type=int, default=3)
    add("--dtype", help="default float32 on a CPU, bfloat16 on a GPU")
    add("--device", help="default: a GPU if there is one")
    add("--quick", action="store_true", help="batch 8, 16 tokens, one repeat")
    add("--tune", action="store_true", help="search for the knobs of shaped pairs again")
    add("--json", help="write the rows to this file")
    add("--csv", help="write the rows to this file")
    args = parser.parse_args(argv)
    args.decoders = [name for name in DECODERS if name == "naive" or name in args.decoders]
    if args.quick:
        args.batch, args.max_new_tokens, args.repeats = [8], 16, 1
    try:
        device = open_device(args.device)
        names = chosen(args, device)
    except ValueError as error:
        parser.error(str(error))
    # cuDNN's attention, which torch 2.11 prefers on an H100, plans anew for every shape: a naive
    # loop would be timed as planning. Ours never takes it, so the others do not, either.
    torch.backends.cuda.enable_cudnn_sdp(False)
    measure(args, names, device)
    return 0


def chosen(args: argparse.Namespace, device: torch.device) -> list[str | None]:
    """Names of the pairs to measure, None for that of --teacher and --student."""
    if bool(args.teacher) != bool(args.student):
        raise ValueError("got one of --teacher and --student, expected both or neither")
    if args.teacher:
        return [None]
    usual = ["embedded"] + ["gpt2-xl", "qwen2.5-1.5b"] * (device.type == "cuda")
    for name in args.pair or usual:
        pairs.check_name(name, args.models)
    return args.pair or usual


def measure(args: argparse.Namespace, names: list[str | None], device: torch.device) -> None:
    gpu = device.type == "cuda"
    args.max_new_tokens = args.max_new_tokens or (128 if gpu else 64)
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    console = Console(width=max(Console().width, 130))
    bench, results, most = Bench(args, device), [], max(args.batch)
    for name in names:
        if name is None:
            folders = args.teacher, args.student, args.student_layers
            pair = pairs.loaded_pair(*folders, most, dtype, device)
        else:
            pair = pairs.load_pair(name, most, dtype, device, args.models, args.tune)
        rows = []
        for size in args.batch:
            rows += bench.batch(pair, size)
            save(args, results + rows)  # what is done survives an interruption
        show(rows, pair.notes, console)
        results += rows
        del pair  # before the next one is loaded
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
