"""What a GPU needs of the loop, tested without one: nothing that waits, graphs of fixed shapes."""
from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import distill
import lib.machine
import train
from helpers import (
    GPT2,
    assert_same_log,
    distill_config,
    graphs_on_cpu,
    records,
    run_distill,
    run_ranks,
    run_train,
    train_config,
)
from lib.machine import Machine
from model import LanguageModel, ModelConfig


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
    "plain", "accumulated, SAM", "masked", "experts", "distilled", "contrast", "generator", "float16"])
def test_no_step_waits_for_the_device_unless_it_is_logged(data, teachers, tmp_path, monkeypatch, kind):
    change = dict(max_iters=12, log_interval=6, eval_interval=12, epochs=9)
    masked = dict(arch="gpt2", tie_weights=True, norm_eps=1e-5, causal=False)
    if kind == "generator":
        run_train(data, tmp_path / "g", max_iters=2, eval_interval=2, **masked)
    settings = {
        "plain": {}, "float16": dict(dtype="float16"), "masked": masked, "experts": dict(n_experts=4),
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


CASES = {  # settings, replays of the student's forward in 6 steps
    "plain": ({}, 6),
    "accumulated, dropout, tied": (dict(micro_batch_size=2, **GPT2), 24),
    "SAM": (dict(sam_rho=0.1), 12),
    "masked": (dict(arch="gpt2", norm_eps=1e-5, causal=False), 6),
    "distilled": (dict(teachers=("gpt2", "gqa")), 6),
    "contrast, accumulated": (dict(teachers=("llama",), contrastive=0.2, n_pairs=4, micro_batch_size=4), 12),
}


@pytest.mark.parametrize("case", CASES)
def test_graphs_change_nothing(data, teachers, tmp_path, monkeypatch, case):
    """The loop with recorded bodies, which is checked on the CPU by graphs that run operations again."""
    change, replays = CASES[case]
    paths = tuple(path for path in teachers if path.endswith(change.get("teachers", ())))
    module, config = (distill, distill_config) if paths else (train, train_config)
    change = {**change, "teachers": paths} if paths else change
    module.main(config(data, tmp_path / "plain", **change))
    graphs = graphs_on_cpu(monkeypatch.setattr)
    module.main(config(data, tmp_path / "graphs", **change))

    assert_same_log(tmp_path / "plain", tmp_path / "graphs", ["loss", "ce", "kl", "n_pair", "sam_loss",
                                                              "grad_norm", "val_ce"], rel=1e-5)
    forward, backward = graphs[-2:]  # the student's come last
    assert forward.replays == backward.replays == replays
    assert len(graphs) == 2 + 2 * len(paths) and all(g.replays >= replays for g in graphs[:-2:2])


def test_ranks_with_graphs(data, tmp_path):
    """Gradients that DDP does not see are averaged after the step's last replay."""
    def with_graphs():
        graphs_on_cpu()
        run_train(data, tmp_path / "graphs", micro_batch_size=2)
    run_ranks(with_graphs)
    run_train(data, tmp_path / "plain")

    assert_same_log(tmp_path / "plain", tmp_path / "graphs", ["loss", "grad_norm", "val_ce"], rel=1e-4)


def test_a_generator_takes_the_plain_way(data, teachers, tmp_path, monkeypatch, capfd):
    run_train(data, tmp_path / "g", max_iters=2, arch="gpt2", tie_weights=True, norm_eps=1e-5, causal=False)
    graphs = graphs_on_cpu(monkeypatch.setattr)
    run_distill(data, tmp_path / "r", teachers[:1], generator=str(tmp_path / "g"))
    assert capfd.readouterr().out.count("notice: no CUDA graphs") == 1 and not graphs


def test_a_recorded_body_is_replayed_for_its_own_shape_alone(monkeypatch):
    graphs = graphs_on_cpu(monkeypatch.setattr)
    body = LanguageModel(ModelConfig(vocab_size=9, n_layer=1, n_embd=8, n_head=1)).model
    machine = Machine(torch.device("cpu"), micro_batch=2)
    lib.machine.record(body, machine, mock.Mock(seq_len=8))
    forward = graphs[0]
    for x in (torch.ones(2, 7, dtype=torch.int64),   # another shape
              torch.ones(2, 8, 8), body.eval() and torch.ones(2, 8, dtype=torch.int64)):
        body(x)
        assert not forward.replays
    body.train()(torch.ones(2, 8, dtype=torch.int64))
    assert forward.replays == 1


def test_a_second_replay_before_the_backward_is_refused(monkeypatch):
    """It has written over the activations of the first."""
    graphs_on_cpu(monkeypatch.setattr)
    body = LanguageModel(ModelConfig(vocab_size=9, n_layer=1, n_embd=8, n_head=1)).model
    lib.machine.record(body, Machine(torch.device("cpu"), micro_batch=2), mock.Mock(seq_len=8))
    x = torch.ones(2, 8, dtype=torch.int64)
    first, second = body(x), body(x)
    second.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("change", [
    {}, dict(micro_batch_size=4), dict(arch="gpt2", tie_weights=True, dropout=0.1)])
def test_real_graphs_change_nothing(data, tmp_path, change):
    run = partial(run_train, data, device="cuda", max_iters=20, epochs=9, **change)
    run(tmp_path / "plain", cuda_graphs="off")
    run(tmp_path / "graphs")

    for a, b in zip(records(tmp_path / "plain"), records(tmp_path / "graphs"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
