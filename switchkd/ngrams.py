"""No n-gram twice: the rule by which MiniLLM and DistiLLM decode when they evaluate (n = 6).

A token is ruled out if, with the n - 1 before it, it would repeat n tokens of its row, prompt
included. Source: Paulus et al., arXiv 1705.04304, section 2.5, for n = 3.
"""

import torch
from torch import Tensor


def without_repeats(logits: Tensor, text: Tensor, end: Tensor, size: int) -> Tensor:
    """(n, V) logits, -inf where token text[end] would complete an n-gram of `size` tokens again.

    text: (n, L) tokens, -1 where there is none. end: (n,), the tokens before which count.
    """
    if text.shape[1] < size:
        return logits
    before = end[:, None] + torch.arange(1 - size, 0, device=text.device)  # the last size - 1
    last = text.gather(1, before.clamp(min=0))
    seen = text.unfold(1, size, 1)
    again = (seen[..., :-1] == last[:, None]).all(-1) & (seen >= 0).all(-1)
    again &= (end >= size)[:, None]
    rows, width = logits.shape
    token = torch.where(again, seen[..., -1], width)  # one column more: no token
    banned = torch.zeros(rows, width + 1, dtype=torch.bool, device=logits.device)
    return logits.masked_fill(banned.scatter_(1, token, True)[:, :width], float("-inf"))
