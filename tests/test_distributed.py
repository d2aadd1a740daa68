"""Two processes against one: DDP, FSDP2, a teacher in parts; checkpoints that change hands."""

import json
import multiprocessing
import os
import shutil
import socket
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import byte_tokenizer, tiny_model
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from switchkd import distributed
from switchkd.distributed import Shards, decoding_copy, whole
from switchkd.train import main

ROWS = [{"prompt": f"say {i} ", "completion": "ab" * (1 + i % 3)} for i in range(23)]
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


# Processes are forked, which CUDA does not survive; FSDP2 would take the GPU.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on a CPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    for name, kind, seed in (("teacher", "llama", 1), ("gpt2", "gpt2", 2), ("llama", "llama", 3)):
        tiny_model(kind, vocab_size=258, seed=seed).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "text.txt").write_text("All happy families are alike; each unhappy one is not. " * 9)
    return folder


def argv(folder: Path, name: str, student: str = "gpt2", **changes) -> list[str]:
    values = {
        "model_name_or_path": folder / student,
        "teacher_model_name_or_path": folder / "teacher",
        "dtype": "float64",
        "dataset_name": folder / "rows.jsonl",
        "eval_size": 3,  # one process validates two rows, the other one; 20 are 5 steps
        "max_prompt_length": 20,
        "max_new_tokens": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lm_file": folder / "text.txt",
        "max_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 3,
        "switch_tau0": 0.5,
        "use_cpu": "true",
        "log_completions": "false",
        "disable_tqdm": "true",
        "output_dir": folder / name,
        **changes,
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def child(rank: int, port: int, environment: dict, arguments: list[str], errors) -> None:
    from accelerate.state import AcceleratorState, GradientState

    try:
        for state in (AcceleratorState, GradientState):
            state._reset_state(*(() if state is GradientState else (True,)))
        os.environ.update(
            {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
             "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        )  # fmt: skip
        code = main(arguments)
    except BaseException:
        errors.put(traceback.format_exc())
        code = 1
    errors.close()
    errors.join_thread()
    os._exit(code)


def two(arguments: list[str], **environment) -> None:
    """`switchkd.train` in two processes, forked from one that has imported everything and done
    nothing: where torch is built for CUDA, no process can go backward that was forked from one
    that has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload([__name__])
    errors = fork.Queue()
    common = (port, environment, [*arguments, "--per_device_train_batch_size", "1"], errors)
    processes = [fork.Process(target=child, args=(rank, *common)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    messages = [] if errors.empty() else [errors.get()]
    assert [process.exitcode for process in processes] == [0, 0], "\n".join(messages)


def result(folder: Path, name: str) -> tuple[list, list, dict]:
    """Tokens of all steps; losses, gradient norms, validation; weights and moments at the end."""
    lines = [json.loads(line) for line in (folder / name / "completions.jsonl").open()]
    written = sorted((r["step"], r["row"], r["tokens"], r["from_teacher"]) for r in lines)
    last = folder / name / "checkpoint-6"
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    keys = ("loss", "grad_norm", "eval_kl", "eval_cross_entropy", "eval_rouge_l")
    logs = [entry[key] for entry in history for key in keys if key in entry]
    tensors = load_file(next(last.glob("*.safetensors")))
    states = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    tensors |= {f"{i}.{k}": v for i, state in states.items() for k, v in state.items()}
    return written, logs, tensors


def assert_same(folder: Path, one: str, other: str) -> None:
    (written, logs, tensors), others = result(folder, one), result(folder, other)
    assert len(written) > 6 and written == others[0]
    assert logs == pytest.approx(others[1], rel=1e-6)  # the logged loss is in float32
    assert tensors.keys() == others[2].keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(others[2][name], tensor, rtol=1e-7, atol=1e-10, msg=name)


@pytest.fixture(scope="module")
def runs(folder):
    """The same run by one process and by two, which hold student and teacher in parts.

    The student's embedding is its head, too; a text loss makes two passes before backward.
    """
    assert main(argv(folder, "one")) == 0
    two(argv(folder, "two", shard_teacher="true"), **FSDP2)
    return folder


@pytest.mark.slow
def test_fsdp2_with_a_teacher_in_parts_trains_as_one_process(runs):
    assert_same(runs, "one", "two")
    files = [{f.name for f in (runs / name / "checkpoint-6").iterdir()} for name in ("one", "two")]
    assert {f for f in files[0] ^ files[1] if not f.startswith("rng_state")} == set()
    whole = [load_file(runs / name / "model.safetensors") for name in ("one", "two")]
    for name, tensor in whole[0].items():  # the best checkpoint, loaded and saved again
        torch.testing.assert_close(whole[1][name], tensor, rtol=1e-7, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("writer, reader", [("two", "one"), ("one", "two")])
def test_a_checkpoint_of_one_number_of_processes_is_resumed_by_another(runs, writer, reader):
    name = f"{writer}_{reader}"
    shutil.copytree(runs / writer, runs / name, ignore=shutil.ignore_patterns("checkpoint-6"))
    shard = {"shard_teacher": "true"} if writer == "two" else {}
    arguments = argv(runs, name, resume_from_checkpoint="last", **shard)
    if reader == "two":
        two(arguments, **FSDP2)
    else:
        assert main(arguments) == 0
    assert_same(runs, "one", name)


@pytest.mark.slow
def test_resuming_with_another_number_of_rows_in_a_step_is_refused(runs, capsys):
    arguments = argv(runs, "one", resume_from_checkpoint="last", gradient_accumulation_steps=3)
    assert main(arguments) == 1
    assert "got 6 rows in a step" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize("launch", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_no_row_is_trained_on_twice_to_fill_up_the_last_batch_of_an_epoch(folder, launch):
    """20 rows less 3: the last step has one, of which the second process has none."""
    options = {"max_train_rows": 20, "lmbda": 0.9}
    if not (folder / "uneven_one").exists():
        assert main(argv(folder, "uneven_one", **options)) == 0
    name = "uneven_fsdp2" if launch else "uneven_ddp"
    two(argv(folder, name, **options), **launch)
    assert_same(folder, "uneven_one", name)
    sums = [json.loads((folder / x / "summary.json").read_text()) for x in ("uneven_one", name)]
    for key in ("rollout_tokens", "teacher_share"):
        assert sums[0][key] == sums[1][key]


RECOMPUTED = {**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}


@pytest.mark.slow
@pytest.mark.parametrize("launch", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_an_adapter_whose_base_is_the_teacher_trains_as_by_one_process(folder, launch):
    lora = {"use_peft": "true", "teacher_is_base": "true", "lora_r": 4, "max_steps": 6}
    name = "lora_fsdp2" if launch else "lora_ddp"
    arguments = argv(folder, name, "llama", **lora, gradient_checkpointing="true")
    i = arguments.index("--teacher_model_name_or_path")
    del arguments[i : i + 2]
    if not (folder / "lora_one").exists():
        alone = [a.replace(name, "lora_one") for a in arguments]
        assert main(alone) == 0
    two(arguments, **launch)
    assert_same(folder, "lora_one", name)


@pytest.mark.slow
def test_fsdp2_reduces_the_gradient_of_a_head_of_its_own(folder):
    assert main(argv(folder, "own_one", "llama")) == 0
    two(argv(folder, "own_two", "llama"), **RECOMPUTED)
    assert_same(folder, "own_one", "own_two")


@pytest.mark.parametrize("in_parts", [False, True])
def test_the_decoding_copy_takes_what_was_written_to(in_parts, monkeypatch):
    """Whether it is trained, was trained and then frozen, or frozen and loaded anew; no more."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(3)))
    model[2].requires_grad_(False)
    twin = decoding_copy(model, torch.bfloat16)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if in_parts:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            decoding_copy(model, None, twin)
        copied = []
        monkeypatch.setattr(distributed, "whole", lambda x: copied.append(x) or whole(x))

        def refresh() -> int:
            copied.clear()
            decoding_copy(model, None, twin)
            for mine, current in zip(twin.parameters(), model.parameters(), strict=True):
                assert torch.equal(mine, whole(current.detach()).bfloat16())
            return len(copied)

        assert refresh() == 2
        for weight in list(model.parameters())[:2]:
            weight.grad = torch.ones_like(weight)
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        model[1].requires_grad_(False)
        assert refresh() == 2
        assert refresh() == 1
        model.load_state_dict({name: x + 1 for name, x in model.state_dict().items()})
        assert refresh() == 3
        if not in_parts:
            model[2].weight.data = torch.ones(2, 2)
            assert refresh() == 2
    finally:
        dist.destroy_process_group()


def test_a_decoding_copy_of_inference_mode_is_updated_outside_of_it():
    model = tiny_model(dtype=torch.float32)
    with torch.inference_mode():
        twin = decoding_copy(model, torch.bfloat16)
    torch.nn.init.ones_(model.lm_head.weight)
    decoding_copy(model, None, twin)
    assert (twin.lm_head.weight == 1).all()


def test_parts_of_a_teacher_hold_no_weights_until_they_are_gathered():
    """One process has the only part: the bookkeeping, without a second one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_model(dtype=torch.float32)
        before = {name: p.clone() for name, p in model.named_parameters()}
        head = list(model.get_output_embeddings().parameters())
        shards = Shards(model, torch.device("cpu"), keep=head)
        for name, parameter in model.named_parameters():
            assert parameter.shape == before[name].shape
            if parameter is head[0]:
                assert torch.equal(parameter, before[name])
            else:
                assert parameter.isnan().all()
                assert parameter.untyped_storage().nbytes() == parameter.element_size()
        with shards:
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, before[name]), name
        assert model.get_input_embeddings().weight.isnan().all()
    finally:
        dist.destroy_process_group()
