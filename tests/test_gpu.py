"""What a GPU needs of the loop, tested without one: nothing that waits, graphs of fixed shapes."""
from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import distill
import lib.machine
import train
from helpers import distill_config, records, run_train, train_config
from lib.machine import Machine


class Waits(TorchDispatchMode):
    """The operations for which a host waits for its device."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [
    "plain", "accumulated, SAM", "masked", "distilled", "contrast", "generator", "float16"])
def test_no_step_waits_for_the_device_unless_it_is_logged(data, teachers, tmp_path, monkeypatch, kind):
    change = dict(max_iters=12, log_interval=6, eval_interval=12, epochs=9)
    masked = dict(arch="gpt2", tie_weights=True, norm_eps=1e-5, causal=False)
    if kind == "generator":
        run_train(data, tmp_path / "g", max_iters=2, eval_interval=2, **masked)
    settings = {
        "plain": {}, "float16": dict(dtype="float16"), "masked": masked,
        "accumulated, SAM": dict(micro_batch_size=4, sam_rho=0.1),
        "distilled": dict(teachers=tuple(teachers[:2])),
        "contrast": dict(teachers=tuple(teachers[:1]), contrastive=0.2, n_pairs=8),
        "generator": dict(teachers=tuple(teachers[:1]), generator=str(tmp_path / "g"), generator_steps=2),
    }[kind]
    real, per_step = train.Keeper.after_step, {}

    def after_step(self, step, *args):
        per_step[step] = len(waits.calls)
        real(self, step, *args)
        waits.calls.clear()
    monkeypatch.setattr(train.Keeper, "after_step", after_step)
    module, config = (distill, distill_config) if "teachers" in settings else (train, train_config)
    with Waits() as waits:
        module.main(config(data, tmp_path / "r", **change, **settings))
    assert len(per_step) == 12 and not any(per_step[step] for step in range(2, 13)), per_step


def test_what_the_device_decides():
    """Chunks, arithmetic and graphs follow from the device's kind."""
    cpu, gpu = Machine(torch.device("cpu")), Machine(torch.device("cuda", 0), dtype=torch.bfloat16)
    assert cpu.positions(512) == 512 and gpu.positions(512) == 4096 and gpu.positions(0) == 0
    assert cpu.dtype == torch.float32 and gpu.dtype == torch.bfloat16


def test_a_recorded_body_is_replayed_for_its_own_shape_alone(monkeypatch):
    body = torch.nn.Linear(4, 4)
    body.forward = lambda x: "plain"

    def graphed(module, args, num_warmup_iters):
        module.forward = lambda x: "graph"
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    cfg = mock.Mock(seq_len=8)
    lib.machine.record(body, Machine(torch.device("cpu"), micro_batch=2), cfg)
    assert body.forward(torch.zeros(2, 8, dtype=torch.int64)) == "graph"
    assert body.forward(torch.zeros(2, 7, dtype=torch.int64)) == "plain"
    assert body.forward(torch.zeros(2, 8)) == "plain"  # embeddings, of a generator's text


def test_summed_gradients_are_not_the_graphs_own_memory():
    """A replay writes where it wrote before: what was summed must lie elsewhere."""
    linear, static = torch.nn.Linear(2, 1, bias=False), torch.zeros(1, 2)

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, value):
            static.fill_(value)
            return weight.sum()

        @staticmethod
        def backward(ctx, grad):
            return static.detach(), None
    lib.machine.own_gradients(linear)
    for value in (1.0, 2.0):
        Replay.apply(linear.weight, value).backward()
    assert linear.weight.grad.tolist() == [[3.0, 3.0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("change", [
    {}, dict(micro_batch_size=4), dict(arch="gpt2", tie_weights=True, dropout=0.1)])
def test_graphs_change_nothing(data, tmp_path, change):
    run = partial(run_train, data, device="cuda", max_iters=20, epochs=9, **change)
    run(tmp_path / "plain", cuda_graphs="off")
    run(tmp_path / "graphs")

    for a, b in zip(records(tmp_path / "plain"), records(tmp_path / "graphs"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
