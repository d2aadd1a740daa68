"""The block decoder with CUDA graphs: by a stand-in for their memory, and on a GPU."""

import pytest
import torch
from conftest import ARCHITECTURES, DEVICE, OTHERS
from test_decoder import COMMON, POLICIES, T, assert_same, pair, prompts

from switchkd import decoder, graphs
from switchkd.decoder import rollout
from switchkd.engine import Engine
from switchkd.policies import SKD, AdaSwitch, Switch
from switchkd.rollout import Sampling, rollout_naive


@pytest.mark.parametrize("name", ["llama", *({*OTHERS} & {"qwen3_next"})])
def test_graphs_write_what_calls_write(name, monkeypatch, exact_rule):
    """With what a graph does to memory: fixed places for what goes in, and what comes out is lost
    at the next replay of any graph. Batches and lengths are padded as for graphs, and what is to be
    captured is called before, which must leave states as they are."""
    teacher, student = pair(name)

    def capture(self, work):
        def replay():
            for flat in self.memory.values():
                flat.fill_(float("nan") if flat.is_floating_point() else 3)
            work()

        return replay

    def warm_up(self, function, places):
        return [function(*places) for _ in range(graphs.WARM_UPS)][-1]

    monkeypatch.setattr(graphs.Graphs, "warm_up", warm_up)
    monkeypatch.setattr(graphs.Graphs, "capture", capture)
    monkeypatch.setattr(graphs, "REACH", 8)
    for policy in (Switch(max_new_tokens=T), AdaSwitch(K=1.2, L=3)):
        want = rollout_naive(teacher, student, prompts(), policy, **COMMON)
        for drafter in ("student", "teacher", "history"):
            kept = Engine(teacher, student, block=3, drafter=drafter)
            for _ in range(2):  # the second time all graphs are there
                kept.graphs.enabled = True
                got = rollout(
                    teacher, student, prompts(), policy, batch_size=5, engine=kept,
                    history=want.completions(), **COMMON,
                )  # fmt: skip
                assert_same(got, want)
                kinds = len(kept.graphs.captured)
            assert len(kept.graphs.captured) == kinds > 0
            all_outputs = [outputs for _, _, outputs in kept.graphs.captured.values()]
            for (number, _dtype), flat in kept.graphs.memory.items():  # no graph has its own
                found = [x[number] for x in all_outputs if len(x) > number]
                sizes = [graphs.padded(x.shape[-1]) * x[..., 0].numel() for x in found]
                assert len(sizes) > 1 and len(flat) < 2 * max(sizes)
            assert all(x[0].stride(-2) % 16 == 0 for x in all_outputs)  # of logits


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("name", ARCHITECTURES + OTHERS)
def test_graphs_on_a_gpu(name):
    """In float32, where near-ties may fall otherwise."""
    teacher, student = (model.to(DEVICE, torch.float32) for model in pair(name))
    for policy in (Switch(max_new_tokens=T), AdaSwitch(K=1.2, L=3), SKD(3)):
        want = rollout_naive(teacher, student, prompts(), policy, **COMMON)
        for drafter in ("student", "teacher", "history"):
            kept = Engine(teacher, student, block=3, drafter=drafter)
            got = rollout(
                teacher, student, prompts(), policy, batch_size=5, engine=kept,
                history=want.completions(), **COMMON,
            )  # fmt: skip
            assert kept.graphs.enabled and kept.graphs.captured
            pairs = zip(got.completions(), want.completions(), strict=True)
            same = [a == b for a, b in pairs]
            assert sum(same) >= 6
            for row in (i for i, equal in enumerate(same) if equal):
                length = int(want.lengths[row])
                ours, theirs = (x.divergence[row, :length] for x in (got, want))
                torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_round_waits_for_the_device_once(policy, monkeypatch):
    """In `settle`, where it looks at what was written. All graphs are there: a capture waits."""
    teacher, student = (model.to(DEVICE, torch.float32) for model in pair())
    kept = Engine(teacher, student, block=3)
    settle, run = decoder._Decoder.settle, decoder._Decoder.round

    def looking(self, *args):
        torch.cuda.set_sync_debug_mode("default")
        return settle(self, *args)

    def watched(self, limit):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(self, limit)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for sampling in (Sampling(), Sampling(top_p=0.9)):
        with monkeypatch.context() as patched:
            for _ in range(2):
                rollout(
                    teacher, student, prompts(), policy, sampling=sampling, engine=kept, **COMMON
                )
                patched.setattr(decoder._Decoder, "settle", looking)
                patched.setattr(decoder._Decoder, "round", watched)
