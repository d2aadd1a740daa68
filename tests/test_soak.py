"""10,000 prompts through a small pair: every row comes back once, and memory stays flat."""

import random
import tracemalloc

import pytest
import torch
from conftest import EOS, PAD, VOCAB, tiny_model

from switchkd.decoder import rollout
from switchkd.engine import Engine
from switchkd.policies import Switch
from switchkd.rollout import Sampling

PROMPTS, ROUNDS = 10_000, 5


def resident() -> int:
    """Bytes of this process in memory."""
    import psutil

    return psutil.Process().memory_info().rss


@pytest.mark.slow
def test_soak():
    teacher, student = (tiny_model(seed=seed, dtype=torch.float32) for seed in (1, 2))
    rng = random.Random(0)
    asked = [[rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 40))] for _ in range(PROMPTS)]
    kept, policy = Engine(teacher, student), Switch(max_new_tokens=12)
    given = dict(
        max_new_tokens=12, eos_token_ids=[EOS, 7, 30], pad_token_id=PAD, vocab_size=VOCAB,
        sampling=Sampling(seed=5), engine=kept, batch_size=64,
    )  # fmt: skip
    parts, memory, traced = [], [], []
    tracemalloc.start()
    for i in range(ROUNDS):
        part = range(i, PROMPTS, ROUNDS)
        out = rollout(
            teacher, student, [asked[j] for j in part], policy, sequence_ids=part, **given
        )
        assert out.lengths.min() >= 1 and out.lengths.max() <= 12
        parts.append(dict(zip(part, out.completions(), strict=True)))
        memory.append(resident())
        traced.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    written = {j: tokens for part in parts for j, tokens in part.items()}
    assert sorted(written) == list(range(PROMPTS))
    for tokens in written.values():
        ended = [token in (EOS, 7, 30) for token in tokens]
        assert not any(ended[:-1]) and (ended[-1] or len(tokens) == 12)
    # No row is another's: some of them again, each on its own.
    for j in rng.sample(range(PROMPTS), 25):
        alone = rollout(
            teacher, student, [asked[j]], policy, sequence_ids=[j], **given | {"engine": None}
        )
        assert alone.completions() == [written[j]]
    assert memory[-1] - memory[1] < 20 * 2**20, memory
    kept = 12 * 28 + 200  # bytes of a completion: its list and integers
    assert traced[-1] - traced[1] < 3 * len(part) * kept, traced
