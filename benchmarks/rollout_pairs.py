"""The pairs of `rollout_speed.py`: real ones, and random weights in the shapes of real ones.

Independent random models never agree, so a shaped pair is written around one table: every token has
a class, either model embeds the classes as orthogonal vectors of its own width, and its head turns
the vector of class c into row c of the table. Two knobs set how near the models are:

noise    scale of what their layers (random, all of them computed) add to those vectors, which
         sets how often the models pick different tokens where both are undecided
certain  share of classes with one follower, where both models are sure of the same token, as real
         models often are; without them a pair that differs at all would differ everywhere

`tune` looks for a teacher share of 45-55 % over 128 tokens of SWITCH with its defaults, and equal
picks under the shared noise in 55-65 % of the places where the teacher writes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from switchkd_kernels.reference import sample
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    OPTConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
)

from switchkd.data import read_examples, tokenize
from switchkd.decoder import rollout
from switchkd.models import cut_layers, load_model, load_tokenizer
from switchkd.policies import Switch
from switchkd.rollout import Rollout, Sampling
from switchkd.vocabulary import share_vocabulary

CLASSES = 256
SPREAD = 0.75  # of a row's logits, in sqrt(2 ln V): at 1 a random row begins to favour one token
CERTAINTY = 25.0  # nats between one follower and all other tokens: no divergence comes of it
OUTPUTS = ("c_proj", "out_proj", "fc2", "o_proj", "down_proj")  # what a layer adds to the stream
SHARE, AGREEMENT = (0.45, 0.55), (0.55, 0.65)
LENGTH, ROWS, TRIALS = 128, 8, 16  # of a trial rollout; how many are tried
SLICE = 2**14  # tokens whose rows of the embedding and the head are written at once


class Knobs(NamedTuple):
    noise: float
    certain: float


START = Knobs(1.2, 0.65)
# Found by `tune` on a CPU in bfloat16. Depth matters little (gpt2-xl: 62 % equal picks with all
# layers, 58 % with four of either model), so all but gpt2-xl and tiny-gpt2 were tuned with four.
# qwen3.5-2b in float32 and for 48 tokens, by hand from there. What a run reaches it prints.
KNOBS = {
    "gpt2-xl": Knobs(1.2, 0.65),
    "opt-2.7b": Knobs(1.05, 0.65),
    "qwen2.5-7b": Knobs(1.17, 0.65),
    "qwen2.5-1.5b": Knobs(1.75, 0.65),
    "qwen3.5-2b": Knobs(1.55, 0.65),
    "tiny-gpt2": Knobs(4.96, 0.7),
}


class Reached(NamedTuple):
    """teacher_share; agreement, the share of equal picks where the teacher wrote (None: nowhere);
    confidence, the student's largest probability, averaged over all tokens."""

    teacher_share: float
    agreement: float | None
    confidence: float


@dataclass
class Pair:
    """Two models with prompts for them; `knobs` only where these can be turned."""

    name: str
    label: str
    teacher: nn.Module
    student: nn.Module
    prompts: list[list[int]]
    pad_token_id: int
    vocab_size: int
    knobs: Knobs | None = None
    notes: list[str] = field(default_factory=list)


def gpt2(layers: int, width: int, heads: int, vocab: int = 50257, positions: int = 1024):
    return GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocab, n_positions=positions,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def opt(layers: int, width: int, heads: int):
    return OPTConfig(
        num_hidden_layers=layers, hidden_size=width, word_embed_proj_dim=width,
        num_attention_heads=heads, ffn_dim=4 * width, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def qwen2(layers: int, width: int, heads: int, kv_heads: int, mlp: int, vocab: int = 151936):
    return Qwen2Config(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=mlp, vocab_size=vocab, bos_token_id=None,
        eos_token_id=None, max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


def qwen_half():
    return qwen2(24, 896, 14, 2, 4864)


def qwen35(width: int, mlp: int):
    return Qwen3_5TextConfig(
        num_hidden_layers=24, hidden_size=width, num_attention_heads=8, num_key_value_heads=2,
        linear_num_key_heads=16, linear_num_value_heads=16, intermediate_size=mlp,
        vocab_size=248320,
    )  # fmt: skip


# Configurations of teacher and student, and the size of the vocabulary they share.
SHAPES: dict[str, Callable[[], tuple]] = {
    "gpt2-xl": lambda: (gpt2(48, 1600, 25), gpt2(12, 768, 12), 50257),
    "opt-2.7b": lambda: (opt(32, 2560, 32), opt(12, 768, 12), 50265),
    "qwen2.5-7b": lambda: (qwen2(28, 3584, 28, 4, 18944, 152064), qwen_half(), 151665),
    "qwen2.5-1.5b": lambda: (qwen2(28, 1536, 12, 2, 8960), qwen_half(), 151665),
    "qwen3.5-2b": lambda: (qwen35(2048, 6144), qwen35(1024, 3584), 248077),
    "tiny-gpt2": lambda: (gpt2(2, 128, 4, 512, 256), gpt2(1, 96, 4, 512, 256), 512),
}
NAMES = ("embedded", "smollm2", *SHAPES)


def load_pair(
    name: str,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    models: str | None = None,
    tune_again: bool = False,
    data: str = "embedded",
) -> Pair:
    """The pair of that name with `count` prompts, both models on `device`, in `dtype`.

    models: folder of what `smollm2` is loaded from; data: where its prompts are from, and those of
    `embedded`. Shaped pairs without known knobs are tuned.
    """
    check_name(name, models)
    if name in SHAPES:
        pair = shaped_pair(name, count, dtype, device)
        if tune_again or name not in KNOBS:
            tune(pair)
        return pair
    if name == "embedded":
        pair = loaded_pair("embedded", "embedded", "0", count, dtype, device, data=data)
    else:
        pair = smollm2(models, count, dtype, device, data)
    pair.name = name
    return pair


def check_name(name: str, models: str | None) -> None:
    """Refuse a name that there is not, and one whose models are not said to be anywhere."""
    if name not in NAMES:
        raise ValueError(f"pair: got {name!r}, expected one of {', '.join(NAMES)}")
    if name == "smollm2" and models is None:
        raise ValueError("--pair smollm2: got no folder, expected --models DIR with the GGUF")


def loaded_pair(
    teacher: str,
    student: str,
    layers: str | None,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    gguf_file: str | None = None,
    data: str = "embedded",
) -> Pair:
    """Folders, Hub ids or 'embedded'; layers: those that the student keeps; gguf_file: in the
    teacher's folder, and in the student's if that is the same."""

    def gguf(name: str) -> dict:
        return {"gguf_file": gguf_file if name == teacher else None}

    tokenizer = load_tokenizer(student, **gguf(student))
    big = load_model(teacher, dtype=dtype, **gguf(teacher))
    same = student == teacher
    small = copy.deepcopy(big) if same else load_model(student, dtype=dtype)
    if layers:
        cut_layers(small, layers)
    theirs = tokenizer if same else load_tokenizer(teacher, **gguf(teacher))
    shared = share_vocabulary(big, small, theirs, tokenizer)
    examples, report = read_examples(data, limit=count)
    rows = tokenize(
        examples, report, tokenizer, max_prompt_length=256, max_completion_length=10**6
    ).rows
    label = " -> ".join(Path(folder).name for folder in (teacher, student))
    label += f"[{layers or 'all'}]"
    return Pair(
        label, label, big.to(device).eval(), small.to(device).eval(),
        [row.prompt_ids for row in rows], shared.pad_token_id, shared.size,
    )  # fmt: skip


def smollm2(
    models: str, count: int, dtype: torch.dtype, device: torch.device, data: str = "embedded"
) -> Pair:
    """The models of examples/smollm2_dolly.yaml, as far as they are in the folder `models`: the
    teacher tuned on Dolly, else the GGUF; the distilled student, else the cut it starts from."""
    found = sorted(Path(models).rglob("SmolLM2-135M*.gguf"))
    tuned, distilled = (Path(models, f"smollm2-{role}") for role in ("teacher", "dolly"))
    if tuned.is_dir():
        teacher, gguf_file = str(tuned), None
    elif found:
        teacher, gguf_file = str(found[0].parent), found[0].name
    else:
        raise ValueError(f"pair smollm2: got {models}, expected SmolLM2-135M*.gguf in it")
    student, layers = (str(distilled), None) if distilled.is_dir() else (teacher, "0-11,18-29")
    pair = loaded_pair(teacher, student, layers, count, dtype, device, gguf_file, data)
    if layers:
        pair.notes.append(f"no {distilled.name} in {models}: the student is the untrained cut")
    return pair


def shaped_pair(name: str, count: int, dtype: torch.dtype, device: torch.device) -> Pair:
    """Random models of those shapes, with prompts of random tokens."""
    *configs, vocab = SHAPES[name]()
    teacher, student = (
        random_model(config, seed, dtype, device) for seed, config in enumerate(configs)
    )
    label = " -> ".join(f"{c.model_type}[{c.num_hidden_layers}x{c.hidden_size}]" for c in configs)
    prompts = random_prompts(max(count, ROWS), vocab)
    pair = Pair(name, f"{label}, random weights", teacher, student, prompts, 0, vocab)
    turn(pair, KNOBS.get(name, START))
    return pair


def random_prompts(count: int, vocab: int, low: int = 16, high: int = 64) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def random_model(config, seed: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """With layers whose additions to the stream are random and, together, about as large as it."""
    # The head is another matrix than the embedding here. A pass reads it once, tied or not.
    config.tie_word_embeddings = False
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    outputs = layer_outputs(model)
    for weight in outputs:
        fan_in = weight.numel() // config.hidden_size
        weight.normal_(0.0, (fan_in * len(outputs)) ** -0.5)
    return model


def layer_outputs(model: nn.Module) -> list[Tensor]:
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0].endswith(OUTPUTS) and parameter.dim() == 2
    ]


def turn(pair: Pair, knobs: Knobs) -> None:
    """Write the table into both models, and scale what their layers add."""
    table, class_of = bigrams(pair, knobs.certain)
    ratio = knobs.noise / (pair.knobs.noise if pair.knobs else 1.0)
    for model in (pair.teacher, pair.student):
        write(model, table, class_of)
        for weight in layer_outputs(model):
            weight.mul_(ratio)
    pair.knobs = knobs


def bigrams(pair: Pair, certain: float) -> tuple[Tensor, Tensor]:
    """Logits (C, V) that follow a token of each class, and the class (V,) of each token."""
    vocab, generator = pair.vocab_size, torch.Generator().manual_seed(0)
    classes = min(CLASSES, pair.student.config.hidden_size // 2)
    class_of = torch.randint(classes, (vocab,), generator=generator)
    table = torch.randn(classes, vocab, generator=generator)
    table *= SPREAD * math.sqrt(2 * math.log(vocab))
    # The follower of a certain class is not of a certain class: no cycle without a choice.
    sure = round(certain * classes)
    undecided = (class_of >= sure).nonzero()[:, 0]
    row = torch.arange(sure)
    table[row, undecided[row % len(undecided)]] = table[:sure].logsumexp(1) + CERTAINTY
    return table, class_of


@torch.no_grad()
def write(model: nn.Module, table: Tensor, class_of: Tensor) -> None:
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    width, vocab = embedding.shape[1], len(class_of)
    # Orthogonal, of mean 0 and length sqrt(width): the last norm, of either kind, keeps them.
    raw = torch.randn(width, len(table), generator=torch.Generator().manual_seed(width))
    vectors = torch.linalg.qr(raw - raw.mean(0)).Q.t() * width**0.5
    vectors, table, class_of = (x.to(head.device) for x in (vectors, table, class_of))
    head.zero_()
    for first in range(0, vocab, SLICE):  # all at once they would take as much as the teacher
        part = slice(first, min(first + SLICE, vocab))
        embedding[part] = vectors[class_of[part]].to(embedding.dtype)
        head[part] = (table[:, part].t() @ vectors / width).to(head.dtype)


@torch.no_grad()
def reached(
    pair: Pair, out: Rollout, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> Reached:
    """What the tokens of a rollout (with the ids 0, 1, ...) say about a pair."""
    equal, confidence = [], []
    for i, (prompt, tokens) in enumerate(zip(prompts, out.completions(), strict=True)):
        ids = torch.tensor([[*prompt, *tokens]], device=pair.student.device)
        logits = pair.student(ids, use_cache=False, logits_to_keep=len(tokens) + 1).logits
        logits = logits[0, :-1, : pair.vocab_size].float()
        picks = sample(
            logits, temperature=sampling.student_temperature, top_k=sampling.top_k,
            top_p=sampling.top_p, min_p=sampling.min_p, seed=sampling.seed, sequence_ids=i,
            positions=torch.arange(len(tokens), device=logits.device),
        ).cpu()  # fmt: skip
        equal.append((picks == out.tokens[i, : len(tokens)])[out.from_teacher[i, : len(tokens)]])
        confidence.append(logits.softmax(-1).amax(-1).cpu())
    equal = torch.cat(equal)
    return Reached(
        len(equal) / int(out.lengths.sum()),
        equal.double().mean().item() if len(equal) else None,
        torch.cat(confidence).mean().item(),
    )


def trial(pair: Pair) -> Reached:
    prompts = pair.prompts[:ROWS]
    out = rollout(
        pair.teacher, pair.student, prompts, Switch(max_new_tokens=LENGTH), block=4,
        drafter="student", max_new_tokens=LENGTH, eos_token_ids=[],
        pad_token_id=pair.pad_token_id, vocab_size=pair.vocab_size,
    )  # fmt: skip
    return reached(pair, out, prompts, Sampling())


def tune(pair: Pair) -> Reached:
    """Turn the knobs until share and agreement are well inside their ranges."""
    low, high = 0.0, math.inf  # noise: agreement is too large at one, too small at the other
    for _ in range(TRIALS):
        got, (noise, certain) = trial(pair), pair.knobs
        print(f"{pair.name}: noise {noise:.4g}, certain {certain:.4g}: {describe(got)}", flush=True)
        if not inside(got.agreement, AGREEMENT, 0.6):
            low, high = (noise, high) if got.agreement > sum(AGREEMENT) / 2 else (low, noise)
            between = math.sqrt(low * high) if low else high / 1.5
            noise = between if high < math.inf else 1.5 * low
        elif not inside(got.teacher_share, SHARE, 0.6):
            # No certain class follows another: 1 / (1 + certain) of all tokens follow an open one.
            wanted = sum(SHARE) / 2 / got.teacher_share / (1 + certain)
            certain = min(max(1 / wanted - 1, 0.0), 0.9)
            low, high = 0.0, math.inf
        else:
            return got
        turn(pair, Knobs(noise, certain))
    pair.notes.append(f"not tuned after {TRIALS} trials")
    return trial(pair)


def inside(value: float | None, bounds: tuple[float, float], part: float = 1.0) -> bool:
    """Within the middle `part` of the bounds."""
    middle, half = sum(bounds) / 2, (bounds[1] - bounds[0]) / 2
    return value is not None and abs(value - middle) <= part * half


def typical(got: Reached) -> bool:
    return inside(got.teacher_share, SHARE) and inside(got.agreement, AGREEMENT)


def describe(got: Reached) -> str:
    picks = "" if got.agreement is None else f", there {got.agreement:.1%} equal picks"
    return (
        f"teacher writes {got.teacher_share:.1%}{picks}, "
        f"student's largest probability {got.confidence:.2f} on average"
    )
