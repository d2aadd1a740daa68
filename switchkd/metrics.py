"""What a student is worth: divergences to the teacher on given text, and scores of its samples."""

from __future__ import annotations

import logging
import math
import random
import re
import unicodedata
from collections.abc import Callable, Sequence

import sacrebleu
import torch
from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer
from switchkd_kernels import divergence_loss, jsd
from torch import nn

from switchkd.attention import without_cudnn
from switchkd.cache import NotServed
from switchkd.data import Row
from switchkd.decoder import rollout as block_rollout
from switchkd.engine import Engine
from switchkd.losses import collate, response_hidden, response_labels
from switchkd.models import decoder_of, evaluating, head_of
from switchkd.rollout import Rollout, Sampling, rollout_in_batches
from switchkd.vocabulary import Vocabulary

log = logging.getLogger(__name__)


class AnyScript(Tokenizer):
    """Lower-cased words of any alphabet, and each Chinese or Japanese character by itself."""

    UNSPACED = (
        r"\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    )
    TOKEN = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")

    def tokenize(self, text: str) -> list[str]:
        # Letters, numbers, and the marks that belong to letters, as most vowels of Hindi do.
        kept = (c if unicodedata.category(c)[0] in "LNM" else " " for c in text.lower())
        return self.TOKEN.findall("".join(kept))


# One that is not given is logged, by which absl sets up the logging of the whole program.
PUBLISHED = rouge_scorer.RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))
ANY_SCRIPT = rouge_scorer.RougeScorer(["rougeL"], tokenizer=AnyScript())


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Rouge-L F-measure x 100, the best over the references (as MiniLLM).

    Over the published tokens, runs of a-z and 0-9, stemmed. Where these leave no token of any
    reference (Chinese, Russian), and every answer would score 0, over those of `AnyScript`.
    """
    if isinstance(references, str) or not len(references):
        raise ValueError(f"references: got {references!r:.60}, expected a list of 1 string or more")
    latin = any(re.search("[a-z0-9]", reference.lower()) for reference in references)
    scorer = PUBLISHED if latin else ANY_SCRIPT
    return 100 * max(scorer.score(ref, prediction)["rougeL"].fmeasure for ref in references)


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """rouge_l (mean over rows) and bleu (sacrebleu, corpus), and rouge_l by reference length.

    The split is by words of the first reference, 1-10 against 11 and more (arXiv 2410.19503,
    Fig. 1); an empty part is left out.
    """
    if not len(predictions):
        raise ValueError("predictions: got none, expected at least one")
    each = [rouge_l(p, refs) for p, refs in zip(predictions, references, strict=True)]
    most = max(map(len, references))
    padded = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    result = {
        "rouge_l": sum(each) / len(each),
        "bleu": sacrebleu.corpus_bleu(list(predictions), padded).score,
    }
    for name, short in (("rouge_l_1_to_10_words", True), ("rouge_l_11_words_up", False)):
        part = [
            value
            for value, refs in zip(each, references, strict=True)
            if (len(refs[0].split()) <= 10) is short
        ]
        if part:
            result[name] = sum(part) / len(part)
    return result


def floors(rows: Sequence[Row], seed: int = 0) -> dict[str, dict[str, float]]:
    """Scores of two answers that know nothing: the prompt copied, and another row's reference
    (where there is another row).

    A copied prompt outscores a weak model, so no Rouge-L says anything without these beside it.
    """
    examples = [row.example for row in rows if row.example.references]
    if not examples:
        return {}
    references = [e.references for e in examples]
    found = {"prompt_copied": score([e.question for e in examples], references)}
    if len(examples) > 1:
        order = list(range(len(examples)))
        random.Random(seed).shuffle(order)
        following = dict(zip(order, order[1:] + order[:1], strict=True))
        others = [examples[following[i]].references[0] for i in range(len(examples))]
        found["another_reference"] = score(others, references)
    return found


@torch.no_grad()
@without_cudnn()
def teacher_forced(
    teacher: nn.Module | None,
    student: nn.Module,
    rows: Sequence[Row],
    vocabulary: Vocabulary,
    *,
    batch_size: int = 8,
    chunk_size: int = 256,
) -> torch.Tensor:
    """Sums over the reference responses: [tokens, cross-entropy, KL(p||q), JSD] (nats, nats, bits).

    Without a teacher the last two are NaN. Sums, so that ranks and batches can be added up.
    """
    device = student.device
    total = torch.zeros(4, dtype=torch.float64, device=device)
    rows = sorted((r for r in rows if r.completion_ids), key=lambda r: len(r.prompt_ids))
    models = [student] if teacher is None else [student, teacher]
    with evaluating(*models):
        for at in range(0, len(rows), batch_size):
            part = rows[at : at + batch_size]
            batch = collate(
                [r.prompt_ids for r in part],
                [r.completion_ids for r in part],
                vocabulary.pad_token_id,
            )
            batch = {key: value.to(device) for key, value in batch.items()}
            labels = response_labels(batch)
            hidden = [response_hidden(m, decoder_of(m), batch) for m in models]
            for start in range(0, len(labels), chunk_size):
                stop = start + chunk_size
                logits = [
                    head_of(m).logits(h[start:stop], vocabulary.size)
                    for h, m in zip(hidden, models, strict=True)
                ]
                target = labels[start:stop]
                ce = nn.functional.cross_entropy(logits[0], target, reduction="sum")
                nan = ce.new_full((), float("nan"))
                kl, js = nan, nan
                if teacher is not None:
                    kl = divergence_loss(
                        logits[1], logits[0], kind="kl_teacher_student", reduction="sum"
                    )
                    js = jsd(logits[1], logits[0], reduction="sum")
                total += torch.stack([ce.new_tensor(len(target)), ce, kl, js]).double()
    return total


def engine_for(model: nn.Module) -> Engine | None:
    """An engine that decodes `model` alone; None, with the reason in the log, for an architecture
    that its cache cannot serve."""
    try:
        # Not by measured times: rows that share a pass share its rounding.
        return Engine(None, model, costs={"student": 1.0})
    except ValueError as error:
        log.warning("sampling without the block decoder's cache: %s", error)
        return None


def generate(
    model: nn.Module,
    rows: Sequence[Row],
    tokenizer,
    vocabulary: Vocabulary,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    engine: Engine | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[str]:
    """One sampled response per row, in order; the noise is keyed by row, not by batch.

    engine: `engine_for` this model, to keep its memory and graphs from call to call. A model that
    has none takes the naive loop, which writes the same tokens. on_step(tokens or steps so far,
    rows that are not finished) is called after every round.
    """
    if not rows:
        return []
    prompts = [row.prompt_ids for row in rows]
    options = dict(
        batch_size=batch_size,
        sequence_ids=[row.id for row in rows],
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        eos_token_ids=vocabulary.eos_token_ids,
        pad_token_id=vocabulary.pad_token_id,
        vocab_size=vocabulary.size,
    )

    # The model, or its copy for decoding, has the type that it is to write in.
    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        engine = engine or engine_for(model)
        if engine is not None:
            try:
                rollout = block_rollout(
                    None, model, prompts, engine=engine, on_step=on_step, **options
                )
            except NotServed as error:  # before anything was decoded
                log.warning("sampling without the block decoder's cache: %s", error)
                engine = None
        if engine is None:
            rollout = rollout_in_batches(None, model, prompts, on_step=on_step, **options)
    completions = rollout.completions()
    return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in completions]


def validate(
    teacher: nn.Module | None,
    student: nn.Module,
    decoding: nn.Module,
    rows: Sequence[Row],
    tokenizer,
    vocabulary: Vocabulary,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    batch_size: int,
    rollout_batch_size: int,
    on_step: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """The sums of `teacher_forced`, and of Rouge-L over one sample per row, for `means`.

    decoding: the student, or its copy in another type, that writes the samples.
    """
    sums = teacher_forced(teacher, student, rows, vocabulary, batch_size=batch_size)
    rows = [row for row in rows if row.example.references]
    texts = generate(
        decoding,
        rows,
        tokenizer,
        vocabulary,
        sampling,
        max_new_tokens=max_new_tokens,
        batch_size=rollout_batch_size,
        on_step=on_step,
    )
    scores = [rouge_l(t, row.example.references) for t, row in zip(texts, rows, strict=True)]
    return torch.cat([sums, sums.new_tensor([sum(scores), len(scores)])])


def means(sums: torch.Tensor) -> dict[str, float]:
    """cross_entropy, kl, jsd per token and rouge_l per row, of (summed) `validate` results; what
    was not measured, for want of references or of a teacher, is left out."""
    tokens, ce, kl, js, rouge, count = sums.tolist()
    values = {}
    if tokens:
        values |= {"cross_entropy": ce / tokens, "kl": kl / tokens, "jsd": js / tokens}
    if count:
        values["rouge_l"] = rouge / count
    return {name: value for name, value in values.items() if not math.isnan(value)}


def describe(rollout: Rollout, eos_token_ids: Sequence[int]) -> dict[str, float]:
    """What a training log says of a rollout; names as in TRL where it has one."""
    lengths, tokens = rollout.lengths.double(), int(rollout.lengths.sum())
    last = rollout.tokens.gather(1, rollout.lengths[:, None] - 1)[:, 0]
    ended = torch.isin(last, torch.tensor(list(eos_token_ids))).double()
    values = {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1 - ended.mean().item(),
        "rollout/teacher_share": rollout.teacher_tokens() / tokens,
        "rollout/divergence": rollout.divergence.nanmean().item(),
        "rollout/tokens_per_second": tokens / rollout.seconds,
        "rollout/tokens_per_round": tokens / (rollout.row_rounds or tokens),
        "time/rollout": rollout.seconds,
    }
    return {name: value for name, value in values.items() if not math.isnan(value)}
