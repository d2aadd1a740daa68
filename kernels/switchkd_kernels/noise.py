"""Counter-based noise: every random number is a function of (seed, sequence id, position, token).

Philox4x32-10 under a key that is constant for a launch; any backend can compute any entry alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchkd_kernels import _checks as check

STREAM_TOKEN = 0  # the Gumbel field that both models share
STREAM_REDRAW = 1  # a teacher's redraw after a look at the student's token (SKD)
STREAM_COIN = 2  # who writes, in the schedules that toss for it
STREAM_MIX = 3  # which samples are generated and which come from the data
STREAM_TEXT = 4  # which block of an extra text accompanies a sample
STREAM_REPLAY = 5  # which earlier completion a sample is replaced by

_MASK = 0xFFFFFFFF


def philox(seed: int, *counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011, Random123): four int64 tensors holding 32-bit words.

    The four counter words are int64 tensors in [0, 2^32) that broadcast; the key is
    (seed & 0xffffffff, seed >> 32). The product of two 32-bit words may wrap int64, which keeps its
    64 bits: the low word is right, and so is the high one once the sign bits of the shift are
    masked off. A low word only enters an exclusive or with a mask after it, so it needs none.
    """
    key0, key1 = check.seed(seed) & _MASK, seed >> 32
    c0, c1, c2, c3 = (
        word.clone(memory_format=torch.contiguous_format)
        for word in torch.broadcast_tensors(*counter)
    )
    high = torch.empty_like(c0)
    for _ in range(10):
        c0.mul_(0xD2511F53)
        c2.mul_(0xCD9E8D57)
        c1.bitwise_xor_(torch.bitwise_right_shift(c2, 32, out=high)).bitwise_xor_(key0)
        c3.bitwise_xor_(torch.bitwise_right_shift(c0, 32, out=high)).bitwise_xor_(key1)
        c0, c1, c2, c3 = c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK), c0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def _words(seed, sequence_ids, positions, stream, blocks: range, device=None) -> tuple[Tensor, ...]:
    """Counter of every backend: v // 4, position, id & 0xffffffff, id >> 32 | stream << 24."""
    check.integer("stream", stream, 0, 255)
    ids = check.integers("sequence_ids", sequence_ids, 2**56, device, wait=False).unsqueeze(-1)
    position = check.integers("positions", positions, 2**32, ids.device, wait=False).unsqueeze(-1)
    try:
        torch.broadcast_shapes(ids.shape, position.shape)
    except RuntimeError as error:
        got = f"{tuple(ids.shape[:-1])} and {tuple(position.shape[:-1])}"
        raise ValueError(f"sequence_ids and positions must broadcast, got {got}") from error
    block = torch.arange(blocks.start, blocks.stop, device=ids.device)
    return philox(seed, block, position, ids & _MASK, (ids >> 32) | (stream << 24))


def uniform(seed: int, sequence_ids, positions, stream: int) -> Tensor:
    """One float32 in (0, 1) for each (sequence id, position), of their broadcast shape.

    (n + 1/2) 2^-23 with n the upper 23 bits of word 0 of block 0: exact in float32, never 0 or 1,
    symmetric about 1/2. (With 24 bits n + 1/2 would round, and reach 1.)
    """
    word = _words(seed, sequence_ids, positions, stream, range(1))[0]
    return (word.squeeze(-1) >> 9).to(torch.float32).add_(0.5).mul_(2.0**-23)


def gumbel(
    seed: int, sequence_ids, positions, vocab_size: int, stream: int = STREAM_TOKEN, *, device=None
) -> Tensor:
    """(M, V) float32 standard Gumbel noise G for M (sequence id, position) pairs.

    Token v takes word v % 4 of counter block v // 4. A word x gives
    u = min((float32(x) + 1/2) 2^-32, 1 - 2^-24) and G = -log(-log1p(-u)): the small u, where
    float32 is dense, make the large G (up to 22.9) that decide a draw.
    """
    blocks = range((vocab_size + 3) // 4)
    words = _words(seed, sequence_ids, positions, stream, blocks, device)
    u = torch.stack(words, -1).to(torch.float32).flatten(-2)[..., :vocab_size]
    u.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()
