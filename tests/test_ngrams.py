"""No n-gram twice: against transformers' own rule, in both loops."""

import pytest
import torch
from conftest import DEVICE, EOS, PAD, VOCAB, tiny_model
from transformers import NoRepeatNGramLogitsProcessor

from switchkd.decoder import rollout
from switchkd.engine import Engine
from switchkd.ngrams import without_repeats
from switchkd.rollout import Sampling, rollout_naive

T = 40
COMMON = dict(max_new_tokens=T, eos_token_ids=[EOS], pad_token_id=PAD)


def prompts():
    random = torch.Generator().manual_seed(5)
    lengths = (1, 2, 3, 7, 12, 5, 1)
    return [torch.randint(2, VOCAB, (n,), generator=random).tolist() for n in lengths]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_rules_out_what_transformers_does(size):
    """For texts that repeat themselves, of any length, and nothing behind them."""
    random = torch.Generator().manual_seed(size)
    ends = torch.tensor([1, 2, 3, 5, 6, 7, 17, 30])
    text = torch.randint(0, 4, (len(ends), 15), generator=random).repeat(1, 2)
    logits = torch.randn(len(ends), 9, generator=random)
    want = torch.cat(
        [
            NoRepeatNGramLogitsProcessor(size)(row[None, :end], z[None])
            for row, end, z in zip(text, ends.tolist(), logits, strict=True)
        ]
    )
    kept = torch.where(torch.arange(30) < ends[:, None], text, -1)
    given = (x.to(DEVICE) for x in (logits, kept, ends))
    assert without_repeats(*given, size).cpu().equal(want)
    assert without_repeats(logits, text[:, : size - 1], ends, size) is logits  # nothing so long yet
    assert bool(want.isinf().any()) and not bool(want.isinf().all(-1).any())


@pytest.mark.parametrize("size", [2, 3])
def test_greedy_text_is_that_of_generate(size):
    model = tiny_model(spread=6.0).to(DEVICE)
    sampling = Sampling(student_temperature=0.0, no_repeat_ngram=size)
    got = rollout_naive(None, model, prompts(), sampling=sampling, **COMMON).completions()
    free = rollout_naive(None, model, prompts(), sampling=Sampling(student_temperature=0), **COMMON)
    assert got != free.completions()
    for prompt, tokens in zip(prompts(), got, strict=True):
        given = torch.tensor([prompt], device=DEVICE)
        out = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=T,
            no_repeat_ngram_size=size, eos_token_id=EOS, pad_token_id=PAD,
        )  # fmt: skip
        assert tokens == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_block_decoder_writes_the_same(temperature):
    """With slots that are refilled and rows that move to other slots."""
    model = tiny_model(spread=6.0).to(DEVICE)
    sampling = Sampling(student_temperature=temperature, no_repeat_ngram=2, seed=3)
    want = rollout_naive(None, model, prompts(), sampling=sampling, **COMMON)
    engine = Engine(None, model)
    for _ in range(2):
        got = rollout(
            None, model, prompts(), sampling=sampling, batch_size=3, engine=engine, **COMMON
        )
        assert got.completions() == want.completions()
        torch.testing.assert_close(got.student_logprob, want.student_logprob, equal_nan=True)
    assert want.completions() != rollout(None, model, prompts(), **COMMON).completions()


@pytest.mark.parametrize("loop", [rollout, rollout_naive])
def test_refused_beside_a_teacher(loop):
    model = tiny_model()
    with pytest.raises(ValueError, match="no_repeat_ngram: got 2 and a teacher, expected 0"):
        loop(model, model, prompts(), sampling=Sampling(no_repeat_ngram=2), **COMMON)
    with pytest.raises(ValueError, match="no_repeat_ngram: got -1"):
        Sampling(no_repeat_ngram=-1)
