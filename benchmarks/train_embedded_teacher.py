"""Make the embedded teacher and the embedded rows of ``switchkd/embedded``.

The teacher is a Llama-architecture model of 3.8 million parameters with its own byte-level BPE
tokenizer of 2048 tokens. It is trained from nothing on the Dolly training rows: first on all
tokens, then (the last 30 % of the steps) on the response tokens only. The stages are ``prepare``
(tokenizer and rows), ``train`` (resumes from its checkpoint) and ``report`` (export, figures,
samples); ``all`` runs the three::

    python benchmarks/train_embedded_teacher.py all --data DIR

DIR holds ``dolly/train.jsonl`` and ``dolly/valid.jsonl`` (keys instruction, input, output, source,
id). The result is a function of the rows, the options, the thread count and the torch build.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from switchkd.names import EMBEDDED_DIR
from switchkd.templates import alpaca_prompt

EOS, PAD, VOCAB = "<|endoftext|>", "<|pad|>", 2048
MAX_TOKENS = 512  # longer rows are cut here
SFT_SHARE = 0.3  # last part of the steps: loss on response tokens only


def prompt_of(row: dict) -> str:
    return alpaca_prompt(row["instruction"], row["input"])


def read_rows(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def encode(tokenizer, rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """Prompt ids and response ids (with the closing eos) of every row."""
    prompts = tokenizer([prompt_of(row) for row in rows], verbose=False)["input_ids"]
    responses = tokenizer([row["output"] for row in rows], verbose=False)["input_ids"]
    return [(p, [*r, tokenizer.eos_token_id]) for p, r in zip(prompts, responses, strict=True)]


def prepare(args) -> None:
    """Train the tokenizer on the templated training rows; draw the short rows of the package."""
    rows = read_rows(args.data / "dolly/train.jsonl")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    start = {"special_tokens": [EOS, PAD], "initial_alphabet": core.pre_tokenizer.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, show_progress=False, **start)
    core.train_from_iterator((prompt_of(row) + row["output"] for row in rows), trainer)
    names = {"eos_token": EOS, "pad_token": PAD, "model_max_length": 1024}
    names["clean_up_tokenization_spaces"] = False
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.save_pretrained(args.output / "teacher")
    (args.output / "data").mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 400), ("valid", 60)):
        rows = read_rows(args.data / f"dolly/{name}.jsonl")
        short = [
            row
            for row, (prompt, response) in zip(rows, encode(tokenizer, rows), strict=True)
            if len(prompt) <= 110 and 8 <= len(response) <= 64
        ]
        picked = sorted(random.Random(args.seed).sample(range(len(short)), count))
        with open(args.output / f"data/{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(short[index]) + "\n" for index in picked)
        print(f"{name}: {count} of the {len(short)} short rows among {len(rows)}")


def new_model(tokenizer) -> LlamaForCausalLM:
    sizes = {"hidden_size": 256, "intermediate_size": 448, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    sizes |= {"vocab_size": VOCAB, "max_position_embeddings": 1024}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids, bos_token_id=None))


def make_batches(pairs, seed: int, batch_tokens: int) -> list[list[int]]:
    """One epoch: rows of like length together, at most batch_tokens with padding, shuffled."""
    rng = random.Random(seed)
    lengths = [min(len(prompt) + len(response), MAX_TOKENS) for prompt, response in pairs]
    order = sorted(range(len(pairs)), key=lambda index: lengths[index] + 16 * rng.random())
    batches, batch, longest = [], [], 0
    for index in order:
        longest = max(longest, lengths[index])
        if batch and longest * (len(batch) + 1) > batch_tokens:
            batches.append(batch)
            batch, longest = [], lengths[index]
        batch.append(index)
    batches.append(batch)
    rng.shuffle(batches)
    return batches


def loss_sum(model, pairs, responses_only: bool) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy and its token count. Causal and padded right, so no mask is needed."""
    width = min(max(len(prompt) + len(response) for prompt, response in pairs), MAX_TOKENS)
    ids = torch.full((len(pairs), width), model.config.pad_token_id)
    labels = torch.full((len(pairs), width), -100)
    for row, (prompt, response) in enumerate(pairs):
        tokens = torch.tensor((prompt + response)[:width])
        start = len(prompt) if responses_only else 1
        ids[row, : len(tokens)] = tokens
        labels[row, start : len(tokens)] = tokens[start:]
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != -100
    logits = model.lm_head(hidden[wanted]).float()
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted], reduction="sum")
    return loss, int(wanted.sum())


def train(args) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.output / "teacher")
    pairs = encode(tokenizer, read_rows(args.data / "dolly/train.jsonl"))
    torch.manual_seed(args.seed)
    model = new_model(tokenizer).train()
    decayed = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}
    others = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, others], lr=args.lr, betas=(0.9, 0.95))
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "loss": 0.0, "epoch": 0, "used": 0}
    checkpoint = args.work / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    batches = make_batches(pairs, args.seed + state["epoch"], args.batch_tokens)
    begin, loss, targets = time.time() - state["seconds"], 0.0, 0
    while state["step"] < args.steps:
        if state["used"] == len(batches):
            state["epoch"], state["used"] = state["epoch"] + 1, 0
            batches = make_batches(pairs, args.seed + state["epoch"], args.batch_tokens)
        batch = [pairs[index] for index in batches[state["used"]]]
        progress = state["step"] / args.steps
        rate = args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (state["step"] + 1) / args.warmup)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            total, count = loss_sum(model, batch, responses_only=progress >= 1 - SFT_SHARE)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss, targets = loss + total.item(), targets + count
        state |= {"step": state["step"] + 1, "used": state["used"] + 1}
        state["tokens"] += sum(min(len(a) + len(b), MAX_TOKENS) for a, b in batch)
        done = state["step"] == args.steps
        if state["step"] % 20 == 0 or done:
            state["loss"], state["seconds"] = loss / targets, time.time() - begin
            pace = f"{state['tokens'] / state['seconds']:.0f} tokens/s {state['seconds']:.0f} s"
            print(f"step {state['step']}/{args.steps} loss {state['loss']:.4f} {pace}", flush=True)
            loss, targets = 0.0, 0
        if state["step"] % args.save_every == 0 or done:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**saved, "state": state}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)


def unigram(ids: list[int]) -> torch.Tensor:
    counts = torch.bincount(torch.tensor(ids), minlength=VOCAB).double()
    return counts / counts.sum()


def floors(tokenizer, train_rows: list[dict], valid_rows: list[dict], seed: int) -> dict:
    """Cross-entropy in nats per response token of models that have not learnt the language."""
    train_pairs, valid_pairs = encode(tokenizer, train_rows), encode(tokenizer, valid_rows)
    corpus = unigram([t for _, r in train_pairs for t in r] + list(range(VOCAB)))  # none at 0

    def mixed(rows, pairs, source: str, weight: float) -> float:
        """Token frequencies of the row's prompt, or of another row, smoothed with the corpus."""
        total, shift = 0.0, random.Random(seed).randrange(1, len(rows))
        for index, (row, (_, response)) in enumerate(zip(rows, pairs, strict=True)):
            text = row["instruction"] + "\n" + row["input"]  # the prompt without the template
            other = pairs[(index + shift) % len(pairs)][1]
            local = unigram(tokenizer(text)["input_ids"] if source == "prompt" else other)
            total -= (weight * local + (1 - weight) * corpus)[response].log().sum().item()
        return total / sum(len(response) for _, response in pairs)

    result = {"uniform": math.log(VOCAB)}
    result["corpus_unigram"] = mixed(valid_rows, valid_pairs, "prompt", 0.0)
    for name, source in (("prompt_copied", "prompt"), ("other_reference", "reference")):
        grid, few = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5], (train_rows[:1000], train_pairs[:1000])
        result[f"{name}_weight"] = min(grid, key=lambda weight: mixed(*few, source, weight))
        result[name] = mixed(valid_rows, valid_pairs, source, result[f"{name}_weight"])
    return result


@torch.no_grad()
def report(args) -> None:
    """Export the checkpoint in bfloat16, then measure what was exported."""
    folder = args.output / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    saved = torch.load(args.work / "checkpoint.pt")
    model = new_model(tokenizer)
    model.load_state_dict(saved["model"])
    model.to(torch.bfloat16).save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = read_rows(args.data / "dolly/valid.jsonl")
    lengths = [len(prompt + response) for prompt, response in encode(tokenizer, rows)]
    rows = [row for row, length in zip(rows, lengths, strict=True) if length <= MAX_TOKENS]
    pairs = encode(tokenizer, rows)
    parts = [loss_sum(model, pairs[i : i + 8], responses_only=True) for i in range(0, len(rows), 8)]
    tokens = sum(count for _, count in parts)
    result = {
        "parameters": model.num_parameters(),
        "options": {k: v for k, v in vars(args).items() if isinstance(v, int | float)},
        **saved["state"],
        "valid_rows": len(rows),
        "valid_response_tokens": tokens,
        "valid_cross_entropy": sum(total.item() for total, _ in parts) / tokens,
        "floors": floors(tokenizer, read_rows(args.data / "dolly/train.jsonl"), rows, args.seed),
        "samples": [],
    }
    torch.manual_seed(args.seed)
    for row in read_rows(args.output / "data/valid.jsonl")[:5]:
        inputs = tokenizer(prompt_of(row), return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**inputs, do_sample=True, temperature=0.7, max_new_tokens=64)
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
        result["samples"].append({"id": row["id"], "prompt": row["instruction"], "text": text})
    (folder / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["prepare", "train", "report", "all"])
    parser.add_argument("--data", type=Path, required=True, help="folder with dolly/train.jsonl")
    options = {"output": EMBEDDED_DIR, "work": Path("runs/embedded_teacher"), "threads": 2}
    options |= {"steps": 3400, "lr": 2e-3, "warmup": 50, "batch_tokens": 4096, "save_every": 100}
    for name, default in {**options, "seed": 20261123}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for stage in (prepare, train, report):
        if args.stage in (stage.__name__, "all"):
            stage(args)


if __name__ == "__main__":
    main()
