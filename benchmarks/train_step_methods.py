"""The training steps that `train_step.py` compares, and the clock that splits them into phases.

Each is the code that its users run: `SwitchTrainer`; the same trainer with the naive loop and a
loss on full logits; TRL's `DistillationTrainer`; and its `GKDTrainer`, or that one's step written
out where it cannot be had.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from benchmarks.rollout_pairs import Pair
from benchmarks.timing import forget_resident_peak, resident
from switchkd.config import SwitchConfig
from switchkd.data import Example, Report, Row, Rows
from switchkd.trainer import SwitchTrainer

# cuDNN's attention, which torch 2.11 prefers on an H100, plans anew for every shape: a step whose
# prefix grows would be timed as planning. Ours never takes it, so the others do not, either.
torch.backends.cuda.enable_cudnn_sdp(False)
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns that GKDTrainer may move
try:
    from trl import __version__ as TRL_VERSION
    from trl.experimental.gkd import GKDConfig, GKDTrainer
except ImportError:  # optional
    TRL_VERSION = GKDConfig = GKDTrainer = None
try:
    from trl import DistillationConfig, DistillationTrainer
except ImportError:  # newer than the other
    DistillationConfig = DistillationTrainer = None

PHASES = ("rollout", "teacher forward", "student forward", "loss", "backward", "optimizer")
NEGLIGIBLE = 1e-12  # a learning rate that leaves the weights as they are: all repeats are equal


class Phases:
    """Where the time of a step goes, and how much memory each part takes.

    A step is always in one phase; `to` ends it and begins another. On a GPU the boundaries are
    events on its stream, and nothing waits for them before `stop`.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter):
        self.device, self.now, self.current = device, now, None

    def start(self, phase: str) -> None:
        self.marks, self.current = [], phase
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        peak_bytes(self.device)
        self._mark(None)

    def to(self, phase: str) -> None:
        if phase != self.current:
            self._mark(self.current)
            self.current = phase

    def stop(self) -> tuple[dict[str, float], dict[str, int | None]]:
        """Milliseconds by phase, whose sum is the step's, and the most bytes in use in each."""
        self._mark(self.current)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        ms, peaks = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES)
        for (_, begin, _), (phase, end, peak) in zip(self.marks, self.marks[1:], strict=False):
            gpu = self.device.type == "cuda"
            ms[phase] += begin.elapsed_time(end) if gpu else 1e3 * (end - begin)
            peaks[phase] = peak if peaks[phase] is None else max(peak, peaks[phase])
        self.current = None
        return ms, peaks

    def _mark(self, phase: str | None) -> None:
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = self.now()
        self.marks.append((phase, moment, peak_bytes(self.device)))

    def watch(self, model: nn.Module, phase: str) -> None:
        """What a model does while a loss is computed is a phase of its own."""

        def enter(*_):
            if self.current == "loss":
                self.to(phase)

        def leave(*_):
            if self.current == phase:
                self.to("loss")

        model.register_forward_pre_hook(enter)
        model.register_forward_hook(leave)


def give_back_memory() -> None:
    """Freed memory that the C library holds would hide what a step takes."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(device: torch.device) -> int | None:
    """The most memory in use since the last call: allocated on a GPU, resident of the process on
    Linux; None where no one counts it."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        peak = resident("VmHWM")
        forget_resident_peak()
    except OSError:
        return None
    return peak


class Timed:
    """A trainer whose loss is a phase, followed by the backward pass."""

    phases: Phases

    def compute_loss(self, *args, **kwargs):
        self.phases.to("loss")
        loss = super().compute_loss(*args, **kwargs)
        self.phases.to("backward")
        return loss


def response_logits(model: nn.Module, inputs: dict, vocab_size: int) -> Tensor:
    """(N, V) float32 logits that predict the response tokens, out of those of all positions."""
    logits = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    ).logits
    return logits[:, :-1][inputs["completion_mask"][:, 1:]][:, :vocab_size].float()


class EagerTrainer(SwitchTrainer):
    """Both models forward over the finished sequences, and the loss on full logits, as DistiLLM has
    it: KL(q || (1 - a) p + a q)."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        size, alpha = self.vocabulary.size, self.args.skew_alpha
        log_q = response_logits(model, inputs, size).log_softmax(-1)
        with torch.no_grad():
            log_p = response_logits(self.teacher, inputs, size).log_softmax(-1)
        mixture = torch.logaddexp(log_p + math.log1p(-alpha), log_q + math.log(alpha))
        return (log_q.exp() * (log_q - mixture)).sum() / num_items_in_batch[0]


class TimedSwitch(Timed, SwitchTrainer):
    pass


class TimedEager(Timed, EagerTrainer):
    pass


def switch_trainer(kind: type, pair: Pair, batch: int, new_tokens: int, folder: str, **options):
    """A trainer of that kind for the prompts of a pair, of which no response ends early."""
    examples = [Example((), (), i) for i in range(len(pair.prompts))]
    rows = [Row(p, [], e) for p, e in zip(pair.prompts, examples, strict=True)]
    args = SwitchConfig(
        output_dir=folder, use_cpu=pair.student.device.type == "cpu", lmbda=1.0,
        max_new_tokens=new_tokens, max_prompt_length=max(map(len, pair.prompts)),
        per_device_train_batch_size=batch, learning_rate=NEGLIGIBLE, eval_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True, log_completions=False, **options,
    )  # fmt: skip
    tokenizer = number_tokenizer(pair)
    trainer = kind(
        pair.student, pair.teacher, args, Rows(rows, Report("")), processing_class=tokenizer
    )
    trainer.vocabulary = replace(trainer.vocabulary, eos_token_ids=())
    trainer.state.global_step = 1  # the first also checks the kept hidden states of one row
    return trainer


def number_tokenizer(pair: Pair) -> PreTrainedTokenizerFast:
    """Tokens are written as their numbers: a step needs no text."""
    words = WordLevel({str(i): i for i in range(pair.vocab_size)}, unk_token=str(pair.pad_token_id))
    pad = str(pair.pad_token_id)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token=pad, eos_token=pad)


def window(trainer: SwitchTrainer) -> tuple[list[dict], Tensor]:
    """The micro-batches of one optimizer step, rolled out, and what their loss is divided by."""
    rows = torch.arange(len(trainer.train_dataset)).split(trainer.args.per_device_train_batch_size)
    return trainer.get_batch_samples(
        iter([{"rows": part} for part in rows]), len(rows), trainer.args.device
    )


def switch_step(trainer: SwitchTrainer) -> Callable[[], float]:
    """All of a step up to the optimizer; returns the teacher's share of the tokens."""

    def run() -> float:
        before = dict(trainer.totals)
        batches, items = window(trainer)
        for inputs in batches:
            trainer.training_step(trainer.model, inputs, items)
        tokens, by_teacher = (
            trainer.totals[name] - before[name] for name in ("tokens", "teacher_tokens")
        )
        expected = len(trainer.train_dataset) * trainer.args.max_new_tokens
        if tokens != expected:
            raise AssertionError(f"rollout: got {tokens} tokens, expected {expected}")
        return by_teacher / tokens

    return run


# ------------------------------------------------------------------ GKD


def gkd_inputs(pair: Pair, prompts: list[list[int]]) -> dict[str, Tensor]:
    """Prompts padded on the left, as TRL's collator hands them over."""
    width, device = max(map(len, prompts)), pair.student.device
    rows = [[pair.pad_token_id] * (width - len(p)) + p for p in prompts]
    masks = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    ids, mask = torch.tensor(rows, device=device), torch.tensor(masks, device=device)
    return {"prompts": ids, "prompt_attention_mask": mask, "input_ids": ids, "attention_mask": mask}


class WrittenGkd:
    """One step of TRL's GKDTrainer with lmbda 1, its parts in its order."""

    def __init__(self, pair: Pair, new_tokens: int):
        self.teacher_model, self.vocab_size = pair.teacher, pair.vocab_size
        self.generation_config = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            use_cache=True, pad_token_id=pair.pad_token_id,
        )  # fmt: skip

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor) -> Tensor:
        prompts, mask = inputs["prompts"], inputs["prompt_attention_mask"]
        ids = model.generate(prompts, attention_mask=mask, generation_config=self.generation_config)
        mask = torch.cat([mask, torch.ones_like(ids[:, prompts.shape[1] :])], 1)
        labels = torch.cat([torch.full_like(prompts, -100), ids[:, prompts.shape[1] :]], 1)
        model.train()
        inputs.update({"input_ids": ids, "attention_mask": mask, "labels": labels})
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss.backward()
        return loss.detach()

    def compute_loss(self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor) -> Tensor:
        """Generalised JSD with beta 1/2 over all positions, of which the response counts."""
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        log_q = model(**given).logits[:, :-1, : self.vocab_size].log_softmax(-1)
        with torch.no_grad():
            log_p = self.teacher_model(**given).logits[:, :-1, : self.vocab_size].log_softmax(-1)
        mixture = torch.stack([log_q, log_p]).logsumexp(0) - math.log(2)
        divergences = [
            nn.functional.kl_div(mixture, log, reduction="none", log_target=True)
            for log in (log_p, log_q)
        ]
        counts = inputs["labels"][:, 1:] != -100
        return (0.5 * (divergences[0] + divergences[1]))[counts].sum() / num_items_in_batch


class TimedWrittenGkd(Timed, WrittenGkd):
    pass


def trl_refuses(pair: Pair) -> str | None:
    """Why GKDTrainer cannot run this pair; None if it can."""
    if GKDTrainer is None:
        return "trl is not installed"
    sizes = [model.config.get_text_config().vocab_size for model in (pair.teacher, pair.student)]
    return None if sizes[0] == sizes[1] else f"its vocabularies are padded to {sizes}"


def gkd_trainer(pair: Pair, batch: int, new_tokens: int, folder: str):
    """GKDTrainer with its defaults but for: lmbda and temperature 1, so that all rows are sampled
    as in the other steps; no gradient checkpointing, for which TRL would give up the cache of
    `generate`; the precision of the models."""
    if trl_refuses(pair):
        return TimedWrittenGkd(pair, new_tokens)
    args = GKDConfig(lmbda=1.0, max_new_tokens=new_tokens, **trl_options(pair, batch, folder))
    return trl_trainer(GKDTrainer, pair, args, data_collator=lambda rows: rows)


def trl_options(pair: Pair, batch: int, folder: str) -> dict:
    return dict(
        output_dir=folder, use_cpu=pair.student.device.type == "cpu", temperature=1.0,
        per_device_train_batch_size=batch, learning_rate=NEGLIGIBLE, gradient_checkpointing=False,
        bf16=False, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip


def trl_trainer(kind: type, pair: Pair, args, **given):
    """A trainer of TRL's whose losses are timed, and whose responses do not end early."""
    import datasets  # which TRL needs, and nothing else here

    trainer = type(f"Timed{kind.__name__}", (Timed, kind), {})(
        model=pair.student, teacher_model=pair.teacher, args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": [str(p) for p in pair.prompts]}),
        processing_class=number_tokenizer(pair), **given,
    )  # fmt: skip
    trainer.generation_config.eos_token_id = None
    return trainer


def gkd_step(trainer, pair: Pair, batch: int, new_tokens: int) -> Callable[[], float]:
    """All of a step up to the optimizer; no token is the teacher's.

    Micro-batches are dealt by length, as SwitchTrainer does, so that padding is no difference.
    """
    prompts = sorted(pair.prompts, key=len)
    micro = [gkd_inputs(pair, prompts[at : at + batch]) for at in range(0, len(prompts), batch)]
    count = torch.tensor(len(prompts) * new_tokens, device=pair.student.device)

    def run() -> float:
        for inputs in micro:
            trainer.phases.to("rollout")
            batch = dict(inputs)  # TRL puts the sequences into it
            trainer.training_step(pair.student, batch, count)
            width = inputs["prompts"].shape[1] + new_tokens
            if batch["input_ids"].shape[1] != width:
                raise AssertionError(
                    f"generate: got sequences of {batch['input_ids'].shape[1]}, expected {width}"
                )
        return 0.0

    return run


# ------------------------------------------------------------------ TRL's DistillationTrainer


def distillation_trainer(pair: Pair, batch: int, new_tokens: int, folder: str):
    """DistillationTrainer with the settings of `gkd_trainer`, and GKD's beta of 1/2."""
    args = DistillationConfig(
        beta=0.5, max_completion_length=new_tokens,
        gradient_accumulation_steps=len(pair.prompts) // batch, **trl_options(pair, batch, folder),
    )  # fmt: skip
    trainer = trl_trainer(DistillationTrainer, pair, args)
    trainer.eos_token_ids = []
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    trainer._tokenize_prompts = lambda prompts: (prompts, None, {})  # they are tokens
    forward = trainer._get_last_hidden_state

    def timed(model, *args, **kwargs):  # it computes its loss within the forward of the student
        trainer.phases.to("teacher forward" if model is pair.teacher else "student forward")
        hidden = forward(model, *args, **kwargs)
        trainer.phases.to("loss")
        return hidden

    trainer._get_last_hidden_state = timed
    return trainer


def distillation_step(trainer, pair: Pair, batch: int, new_tokens: int) -> Callable[[], float]:
    """All of a step up to the optimizer; no token is the teacher's. All micro-batches are sampled
    at once, and padded to one length."""
    rows = [{"prompt": prompt} for prompt in pair.prompts]

    def run() -> float:
        for _ in range(0, len(rows), batch):
            trainer.phases.to("rollout")
            trainer.training_step(pair.student, rows, None)
        written = sum(int(part["completion_mask"].sum()) for part in trainer._buffered_inputs)
        if written != len(rows) * new_tokens:
            raise AssertionError(
                f"generate: got {written} tokens, expected {len(rows) * new_tokens}"
            )
        return 0.0

    return run
