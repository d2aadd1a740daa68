"""`python benchmarks/architectures.py`: which architectures of transformers are served, how well.

Each that `AutoModelForCausalLM` knows, tiny and with random weights, is distilled for a moment: a
teacher and a student write a few rows of unequal lengths, and one learns from them. The result is
results/architectures.csv:

decoder      block, or naive where the block decoder refuses (`why`); empty where neither decodes
equal        whether the block decoder wrote what the naive loop wrote, token by token
logprob      the most by which a recorded log-probability differs from that of a pass over the whole
             text, each row by itself, without a cache
loss         relative error of the skew reverse KL, against that of the logits of such passes
gradient     the same of its gradient, of the norm
dtype        float64, or float32 where the architecture has none, or no gradient in it (eager
             attention with a window: where all is masked, its softmax in float32 is NaN)

In float64 a model may compute parts in float32 (norms, rotations, scans).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import signal
import sys
import warnings
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from benchmarks.timing import write_csv
from switchkd.attention import CONV, LIMITS
from switchkd.decoder import rollout
from switchkd.losses import collate, distillation_loss
from switchkd.policies import Switch
from switchkd.rollout import Rollout, Sampling, rollout_in_batches

TABLE = Path(__file__).parent / "results" / "architectures.csv"
COLUMNS = ("model_type", "decoder", "equal", "logprob", "loss", "gradient", "dtype", "why")
VOCAB, EOS, PAD = 60, 1, 0
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12], [13, 14]]  # some grow beyond a window of 8
SECONDS = 60  # for one architecture
PARAMETERS = 5_000_000  # more than this, and a configuration has not become small

# By whatever names configurations call their sizes.
_SIZES = {
    60: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size n_embd d_model word_embed_proj_dim attn_hidden_size mamba_d_ssm",
    48: "intermediate_size n_inner ffn_dim ffn_hidden_size d_ff hidden_dim decoder_ffn_dim "
    "mlp_hidden_size intermediate_size_mlp",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_hidden_size",
    128: "max_position_embeddings n_positions max_seq_len",
    8: "head_dim kv_lora_rank q_lora_rank v_head_dim hidden_size_per_layer_input state_size "
    "mamba_d_state mamba_d_head router_dim sliding_window attention_chunk_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim qk_nope_head_dim "
    "rotary_dim mamba_n_heads conv_kernel time_step_rank",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_key_value_heads "
    "num_kv_heads num_experts_per_tok moe_k moe_topk expand",
    1: "n_group topk_group first_k_dense_replace num_shared_experts n_shared_experts "
    "num_mem_blocks mamba_n_groups",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
IDS = dict(bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD)
IDS |= dict(tie_word_embeddings=False)  # a head of its own: else each token would say itself again
SIZES |= IDS
# What else to try, in this order: keys of all heads (multi-head latent attention), layers of two
# kinds as Qwen3-Next, Kimi Linear, Bamba and Jamba name them, Falcon without ALiBi, a BOS token;
# Granite 4, LFM2, Mamba 2, GPT-Neo, Zaya.
LINEAR, FULL = "linear_attention", "full_attention"
CHANGES = (
    {},
    {"head_dim": None, "num_key_value_heads": 4},
    {"num_hidden_layers": 4, "layer_types": [LINEAR] * 3 + [FULL]},
    {"head_dim": None, "num_key_value_heads": 4, "layer_types": [LINEAR, FULL]},
    {"attn_layer_indices": [1], "mamba_d_head": 16},
    {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
     "expert_layer_offset": 1},
    {"head_dim": None, "num_kv_heads": None, "ffn_hidden_size": None, "alibi": False},
    {"bos_token_id": 2},
    {"layer_types": [LINEAR, FULL], "mamba_d_head": 16},
    {"layer_types": ["conv", FULL]},
    {"head_dim": 16, "n_groups": 1},
    {"attention_types": [[["global", "local"], 1]]},
    {"num_experts_per_tok": 1},
)  # fmt: skip


def shrunk(config_type: type, changes: dict) -> PreTrainedConfig:
    """A small configuration, of images and sound, too; None as a change leaves a size as it is."""
    known = config_type()
    known.allow_global_per_layer_attribute_access = True
    parts = {name: getattr(known, name, None) for name in config_type.sub_configs}
    parts = {name: part for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
    kinds = set(getattr(known, "layer_types", None) or ())
    mixed = {}  # a layer of each kind
    if len(kinds) > 1 and kinds <= {*LIMITS, CONV}:
        mixed = dict(layer_types=sorted(kinds), num_hidden_layers=len(kinds))
    if mixed and hasattr(known, "num_kv_shared_layers"):  # Gemma 4
        mixed = dict(layer_types=sorted(kinds) * 2, num_hidden_layers=4, num_kv_shared_layers=2)
    sizes = SIZES | mixed | changes if known.get_text_config() is known else IDS
    left = {name for name, size in changes.items() if size is None}
    sizes = {name: x for name, x in sizes.items() if hasattr(known, name) and name not in left}
    return config_type(**sizes, **{name: shrunk(type(x), changes) for name, x in parts.items()})


def build(config_type: type, changes: dict, dtype: torch.dtype, seed: int) -> nn.Module:
    """A small model with random weights."""
    config = shrunk(config_type, changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if sum(parameter.numel() for parameter in model.parameters()) > PARAMETERS:
        raise ValueError(f"more than {PARAMETERS:,} parameters in its smallest form here")
    with torch.no_grad():  # neither uniform nor certain
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.35)
        spread = model(input_ids=torch.arange(2, VOCAB)[None], use_cache=False).logits.std()
        model.get_output_embeddings().weight.mul_(3.0 / spread)
    return model


def whole(model: nn.Module, written: Rollout) -> list[Tensor]:
    """Log-probabilities (length, VOCAB) of each row's response, by a pass over it alone."""
    rows = []
    for prompt, completion in zip(PROMPTS, written.completions(), strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits
        rows.append(logits[0, len(prompt) - 1 : -1, :VOCAB].double().log_softmax(-1))
    return rows


def distil(teacher: nn.Module, student: nn.Module) -> dict:
    """What the columns say of two models; an error of the naive loop is the caller's."""
    policy = Switch(tau0=0.6, decay=0.02)
    given = dict(
        max_new_tokens=14, eos_token_ids=[EOS], pad_token_id=PAD, vocab_size=VOCAB,
        sampling=Sampling(seed=3), sequence_ids=list(range(len(PROMPTS))), batch_size=4,
    )  # fmt: skip
    naive = rollout_in_batches(teacher, student, PROMPTS, policy, **given)
    row = {"decoder": "block", "equal": None, "why": ""}
    try:
        block = rollout(teacher, student, PROMPTS, policy, **given)
        same = torch.equal(block.from_teacher, naive.from_teacher)
        row["equal"] = same and block.completions() == naive.completions()
    except ValueError as error:
        row |= {"decoder": "naive", "why": str(error)}
    with torch.no_grad():
        said = zip((naive.teacher_logprob, naive.student_logprob), (teacher, student), strict=True)
        row["logprob"] = max(
            (recorded[i, : len(tokens)] - log_p.gather(1, torch.tensor(tokens)[:, None])[:, 0])
            .abs().max().item()
            for recorded, model in said
            for i, (tokens, log_p) in enumerate(
                zip(naive.completions(), whole(model, naive), strict=True)
            )
        )  # fmt: skip
    batch = collate(PROMPTS, naive.completions(), PAD)
    loss = distillation_loss(
        teacher, student, student, batch, vocab_size=VOCAB, kind="skew_reverse_kl", alpha=0.1
    )
    p = torch.cat(whole(teacher, naive)).exp().detach()
    log_q = torch.cat(whole(student, naive))
    wanted = (log_q.exp() * (log_q - (0.9 * p + 0.1 * log_q.exp()).log())).sum()
    row["loss"] = (loss - wanted).abs().item() / wanted.item()
    learnt, right = (gradient(value, student) for value in (loss, wanted))
    row["gradient"] = (learnt - right).norm().item() / right.norm().item()
    if math.isnan(row["gradient"]):
        raise ValueError("got no gradient")
    return row


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


@contextlib.contextmanager
def limited(seconds: int):
    def stop(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def row_of(config_type: type) -> dict:
    """The row of an architecture, of the first form of it that both models decode in."""
    row = dict.fromkeys(COLUMNS, "") | {"model_type": config_type.model_type}
    try:
        with limited(SECONDS):
            for changes, dtype in itertools.product(CHANGES, (torch.float64, torch.float32)):
                try:
                    models = [build(config_type, changes, dtype, seed) for seed in (1, 2)]
                    return row | distil(*models) | {"dtype": str(dtype).removeprefix("torch.")}
                except TimeoutError:
                    raise
                except Exception as error:  # whatever a configuration or a model finds wrong
                    row["why"] = row["why"] or f"{type(error).__name__}: {error}"
    except TimeoutError as error:
        row["why"] = str(error)
    return row


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="model types, such as llama")
    parser.add_argument("--csv", type=Path, default=TABLE)
    args = parser.parse_args(argv)
    kinds = {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}
    unknown = set(args.only or ()) - kinds.keys()
    if unknown:
        parser.error(f"only: got {', '.join(sorted(unknown))}, expected model types")
    console, rows = Console(), []
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.simplefilter("ignore")
    for name in track(sorted(args.only or kinds), "architectures", console=console):
        row = row_of(kinds[name])
        row["why"] = " ".join(row["why"].split())[:160]
        numbers = {key: f"{x:.1e}" for key, x in row.items() if isinstance(x, float)}
        rows.append(row | numbers | {"transformers": transformers.__version__})
        write_csv(args.csv, (*COLUMNS, "transformers"), rows)
    decoded = [row for row in rows if row["decoder"]]
    block = [row for row in decoded if row["decoder"] == "block"]
    same = sum(row["equal"] is True for row in block)
    console.print(
        f"{len(decoded)} of {len(rows)} architectures decoded, {len(block)} of them by the block "
        f"decoder, {same} with the tokens of the naive loop"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
