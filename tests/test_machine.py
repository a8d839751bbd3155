"""What a device decides: float16 with a scaled loss, Apple's GPU, two agents of torchrun."""
import inspect
import math
import socket
import sys
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import distill
import eval_blimp
import lib.machine
import sample
import train
from helpers import (
    ROOT,
    TINY,
    assert_resumes,
    assert_same,
    assert_same_log,
    assert_same_run,
    distill_config,
    flags_of,
    records,
    run_distill,
    run_ranks,
    run_train,
    saved_state,
    start_torchrun,
    thorough,
    train_config,
    weights,
    write_pairs,
    write_task,
)
from lib.checkpoints import find_resumable, load_state
from lib.chunked_loss import chunked_loss
from lib.machine import KINDS, Machine, can_compile, pick_device, pick_dtype
from tools import finetune

CPU, MPS = torch.device("cpu"), torch.device("mps")
NORM = "model.norm.weight"


def sgd(trainee, cfg):
    """In the place of train.make_optimizers: one that does not skip steps by itself."""
    return [torch.optim.SGD(trainee.parameters(), lr=cfg.learning_rate, momentum=0.9)]


@pytest.fixture
def steep(monkeypatch):
    """steep(steps): at these steps of train.py the loss is as it was, but the norm of its gradient, 1e30, is
    beyond float32 (whose squares end at 3e38) with any scale."""
    def make_steep(steps):
        real = train.next_token_loss

        def loss_fn(trainee, batch, **kwargs):
            loss, parts = real(trainee, batch, **kwargs)
            zero = trainee.student.model.norm.weight.mean() * (1e30 if batch.step + 1 in steps else 0)
            return loss + (zero - zero.detach()), parts
        monkeypatch.setattr(train, "next_token_loss", loss_fn)
    return make_steep


def counters(out):
    return load_state(find_resumable(str(out)))[1]


# --- float16 --------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", thorough([
    dict(loss_chunk=100), dict(teachers=2), dict(loss_chunk=0), dict(micro_batch_size=4, sam_rho=0.05),
    dict(arch="gpt2", tie_weights=True, norm_eps=1e-5, causal=False),
    dict(teachers=1, teacher_dtype=("int8",), contrastive=0.3, n_pairs=8)], sample=2))
def test_losses_and_gradients_in_float16_are_near_those_in_float32(data, teachers, tmp_path, change):
    teaching = dict(teachers=tuple(teachers[:change["teachers"]])) if "teachers" in change else {}
    module, config = (distill, distill_config) if teaching else (train, train_config)
    for dtype in ("float32", "float16"):
        module.main(config(data, tmp_path / dtype, **{**change, **teaching, "dtype": dtype}))
    assert_same_log(tmp_path / "float32", tmp_path / "float16", ["loss", "val_ce"], rel=2e-3)
    assert_same_log(tmp_path / "float32", tmp_path / "float16", ["grad_norm"], rel=5e-2)
    assert [r["scale"] for r in records(tmp_path / "float16") if r["step"]] == 6 * [65536]


def test_steps_and_scale_are_those_of_gradscaler(data, tmp_path, monkeypatch):
    """torch's own, in a loop of its own, bit for bit: a scale that goes down and up."""
    monkeypatch.setattr(lib.machine, "SCALE", 2.0 ** 20)
    monkeypatch.setattr(lib.machine, "CALM", 3)
    change = dict(dtype="float16", loss_chunk=0, max_iters=12, epochs=9, grad_clip=0.5)
    run_train(data, tmp_path / "r", **change)

    cfg = train_config(data, tmp_path / "none", **change)
    machine, chunks = train.start(cfg)
    model = train.new_model(cfg, machine, chunks)
    optimizer, = train.make_optimizers(train.Trainee(model), cfg)
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=2.0 ** 20, growth_interval=3), []
    for step in range(12):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = train.learning_rate(cfg, step, 12)
        batch = chunks.batch(step, 0)
        with torch.autocast("cpu", torch.float16):
            loss = train.mean_nll(model(batch.x).flatten(0, 1).float(), batch.y.flatten())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert [r["scale"] for r in records(tmp_path / "r")] == scales
    changes = [b / a for a, b in zip([2 ** 20, *scales], scales)]
    assert {0.5, 1, 2} == set(changes)
    assert_same(weights(tmp_path / "r"), model.state_dict())


@pytest.mark.parametrize("make_optimizers", [train.make_optimizers, sgd])
def test_a_step_that_overflows_is_left_out_and_lowers_the_scale(data, steep, tmp_path, monkeypatch,
                                                                make_optimizers):
    monkeypatch.setattr(train, "make_optimizers", make_optimizers)
    steep({4})
    run_train(data, tmp_path / "r", dtype="float16", eval_interval=1, max_iters=4)
    before, after = tmp_path / "r/ckpt_3", tmp_path / "r/ckpt_4"
    assert_same(weights(before), weights(after))
    assert_same(saved_state(before), saved_state(after))
    assert any(tensor.any() for name, tensor in saved_state(after).items() if NORM in name)
    stuck = weights(after)[NORM]
    run_train(data, tmp_path / "r", dtype="float16", eval_interval=1, resume=True)
    assert not torch.equal(weights(tmp_path / "r")[NORM], stuck)
    assert [r["scale"] for r in records(tmp_path / "r")] == 3 * [65536] + 3 * [32768]
    assert [r["grad_norm"] is None for r in records(tmp_path / "r")] == [step == 4 for step in range(1, 7)]
    assert all(math.isfinite(r["loss"]) for r in records(tmp_path / "r"))


def test_a_gradient_that_overflows_at_every_scale_stops_the_run(data, steep, tmp_path):
    """After 16 halvings the scale is 1: step 17 is the gradient's own fault."""
    steep(range(100))
    run = partial(run_train, data, dtype="float16", max_iters=20, eval_interval=10, epochs=9)
    with pytest.raises(SystemExit, match="the gradient was not finite at step 17; .* is .*ckpt_10"):
        run(tmp_path / "stop")
    run(tmp_path / "skip", not_finite="skip", log_interval=20)
    assert counters(tmp_path / "skip")["scale"] == 1 and records(tmp_path / "skip")[-1]["skipped"] == 4
    assert_same(weights(tmp_path / "stop"), weights(tmp_path / "skip"))


@pytest.mark.parametrize("not_finite", ["stop", "skip"])
def test_a_loss_that_is_not_finite_is_no_overflow(data, tmp_path, monkeypatch, not_finite):
    real = train.next_token_loss

    def loss_fn(trainee, batch, **kwargs):
        loss, parts = real(trainee, batch, **kwargs)
        return loss * (math.nan if batch.step == 2 else 1), parts
    monkeypatch.setattr(train, "next_token_loss", loss_fn)
    run = partial(run_train, data, tmp_path / "r", dtype="float16", not_finite=not_finite)
    if not_finite == "stop":
        with pytest.raises(SystemExit, match="the loss on rank 0 was not finite at step 3"):
            run()
    else:
        run()
        assert [r["skipped"] for r in records(tmp_path / "r")] == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("change", thorough([
    {}, dict(micro_batch_size=4, dropout=0.1, not_finite="skip")], sample=1))
def test_killed_and_resumed_in_float16(data, steep, tmp_path, monkeypatch, change):
    """The same bits, of the scale and of the steps since it changed too: step 5 overflows, the checkpoint is
    of step 6, and 4 steps after that overflow the scale doubles."""
    steep({5})
    monkeypatch.setattr(lib.machine, "CALM", 4)
    run = partial(run_train, data, dtype="float16", max_iters=10, epochs=9, **change)
    assert_resumes(run, tmp_path, monkeypatch, 7)
    scales = [r["scale"] for r in records(tmp_path / "cut")]
    assert scales == 3 * [65536] + [131072] + 4 * [65536] + 2 * [131072]


def test_a_run_may_change_to_float16_and_back(data, tmp_path):
    """Checkpoints of other dtypes have no scale, nor anything else that they did not have before."""
    run = partial(run_train, data, tmp_path / "r", epochs=9)
    run(max_iters=3)
    assert set(counters(tmp_path / "r")) == {"step", "best_val_ce", "best_step", "waited", "skipped",
                                             "optimizers", "untouched"}
    run(max_iters=6, resume=True, dtype="float16")
    assert (counters(tmp_path / "r")["scale"], counters(tmp_path / "r")["scaled_steps"]) == (65536, 3)
    run(max_iters=9, resume=True)
    assert "scale" not in counters(tmp_path / "r")


def test_micro_batches_change_nothing_in_float16(data, tmp_path):
    for size in (8, 4):
        run_train(data, tmp_path / str(size), dtype="float16", micro_batch_size=size)
    assert_same_log(tmp_path / "8", tmp_path / "4", ["loss"], abs=1e-3)
    assert_same_log(tmp_path / "8", tmp_path / "4", ["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("chunk", [0, 8])
def test_gradients_below_float16s_least_number_survive(chunk):
    """Those of 2^16 positions' logits are: here by a factor. Against float64."""
    torch.manual_seed(1)
    h, head, y = torch.randn(4, 8, 16), nn.Linear(16, 50, bias=False), torch.randint(50, (4, 8))
    machine = Machine(CPU, dtype=torch.float16, scale=torch.tensor(2.0 ** 16))

    def formula(z, y):
        return F.cross_entropy(z.float() if z.dtype == torch.float16 else z, y) * 1e-6, {}
    h.requires_grad_()
    with machine.autocast():
        loss, _ = chunked_loss(formula, h, head, y, chunk=chunk, scale=machine.scale)
    machine.scaled(loss).backward()
    exact_h, exact_w = (t.detach().double().requires_grad_() for t in (h, head.weight))
    formula((exact_h @ exact_w.T).flatten(0, 1), y.flatten())[0].backward()
    for found, exact in ((h.grad, exact_h.grad), (head.weight.grad, exact_w.grad)):
        error = (found.double() / 2 ** 16 - exact).norm() / exact.norm()
        assert error < 2e-3


def test_fine_tuning_in_float16(corpus, teachers, tmp_path):
    losses = []
    for dtype in ("float32", "float16"):
        cfg = finetune.FinetuneConfig(
            ckpt=(teachers[1],), data=write_task(tmp_path / "glue"), tasks=("rte",), max_length=32,
            out_dir=str(tmp_path / dtype), device="cpu", dtype=dtype, batch_size=16, epochs=1, log_interval=1)
        finetune.main(cfg)
        losses.append([r["loss"] for r in records(tmp_path / dtype / "rte_12")])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


# a config file: the gradient of rank 1 overflows at step 4
STEEP = """import os, sys as _sys
_script = _sys.modules["__main__"]
_real = _script.next_token_loss
def _steep(trainee, batch, **kwargs):
    loss, parts = _real(trainee, batch, **kwargs)
    bad = batch.step == 3 and os.environ["RANK"] == "1"
    zero = trainee.student.model.norm.weight.mean() * (1e30 if bad else 0)
    return loss + (zero - zero.detach()), parts
_script.next_token_loss = _steep
"""


@pytest.mark.thorough
def test_all_ranks_leave_out_what_overflows_on_one(data, tmp_path):
    (tmp_path / "steep.py").write_text(STEEP)
    settings = {**TINY, "dtype": "float16", "eval_interval": 1, "max_iters": 4, "data_dir": data}
    child = start_torchrun("train.py", str(tmp_path / "steep.py"), *flags_of(settings),
                           f"--out_dir={tmp_path / 'r'}")
    _, err = child.communicate()
    assert child.returncode == 0, err[-3000:]
    assert_same(weights(tmp_path / "r/ckpt_3"), weights(tmp_path / "r/ckpt_4"))
    assert [r["scale"] for r in records(tmp_path / "r")] == 3 * [65536] + [32768]


# --- devices --------------------------------------------------------------------------------------

@pytest.mark.parametrize("bf16,dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_a_cuda_card_without_bfloat16_gets_float16(monkeypatch, bf16, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert pick_dtype("auto", torch.device("cuda", 0)) == dtype
    assert pick_dtype("float32", torch.device("cuda", 0)) == torch.float32


def test_mps_is_taken_where_it_is_asked_for_and_there(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="^error: device='mps', but torch finds no Apple GPU; use --dev.*$"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == MPS and pick_device("auto").type != "mps"
    assert pick_dtype("auto", MPS) == torch.float32
    assert not can_compile(MPS)
    notice = "notice: running uncompiled, torch.compile does not work here: not tried on mps\n"
    assert capsys.readouterr().out == notice


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        from_numpy = func == torch.ops.aten.lift_fresh.default  # on the CPU, whatever the device
        assert from_numpy or getattr(result, "dtype", None) != torch.float64, f"{func} gives float64"
        return result


@pytest.fixture
def on_mps(monkeypatch):
    """The CPU with what KINDS says of mps. What only CUDA has must not be called by the project, nor must
    anything be compiled or recorded."""
    def banned(name, real):
        def call(*args, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            ours = caller.startswith(ROOT) and "site-packages" not in caller      # .venv may lie in the clone
            assert not ours, f"torch.cuda.{name} called in {caller}"
            return real(*args, **kwargs)
        return call
    for name, real in list(vars(torch.cuda).items()):
        if inspect.isfunction(real):
            monkeypatch.setattr(torch.cuda, name, banned(name, real))
    for module in (lib.machine, eval_blimp, sample):
        monkeypatch.setattr(module, "pick_device", {"mps": CPU}.__getitem__)
    monkeypatch.setattr(lib.machine, "record", None)
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    monkeypatch.setitem(KINDS, "cpu", KINDS["mps"])


@pytest.mark.usefixtures("on_mps")
def test_nothing_that_only_cuda_has_is_on_the_path_of_mps(data, teachers, tmp_path):
    here, ckpt = dict(device="mps", compile="auto", max_iters=2), (str(tmp_path / "d"),)
    with NoFloat64():
        run = partial(run_train, data, tmp_path / "r", **here, dtype="bfloat16", not_finite="skip")
        run(sam_rho=0.05, micro_batch_size=4)
        run(max_iters=4, resume=True)
        run_train(data, tmp_path / "m", causal=False, **here)
        run_distill(data, tmp_path / "d", teachers[:2], teacher_cache=str(tmp_path / "c"), **here)
        eval_blimp.main(eval_blimp.EvalConfig(ckpt=ckpt, data_dir=data, seq_len=32, eval_chunks=8,
                                              device="mps"))
        finetune.main(finetune.FinetuneConfig(
            ckpt=(teachers[1],), data=write_task(tmp_path / "glue", n=32), tasks=("rte",), max_length=32,
            out_dir=str(tmp_path / "f"), device="mps", batch_size=16, epochs=1))
    write_pairs(tmp_path / "pairs", "t", [("the dog runs.", "the dog run.")])
    eval_blimp.main(eval_blimp.EvalConfig(ckpt=ckpt, data=(str(tmp_path / "pairs"),), device="mps"))
    sample.main(sample.SampleConfig(ckpt=ckpt, prompt="the", length=3, device="mps"))
    optimizer, = train.make_optimizers(train.Trainee(nn.Linear(2, 2)), train_config(data, "none"))
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)


def test_mps_is_one_rank(data, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.machine, "pick_device", lambda name: CPU)
    monkeypatch.setitem(KINDS, "cpu", KINDS["mps"])
    for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="^error: device=mps must be cpu or cuda for several ranks$"):
        run_train(data, tmp_path / "r", device="mps")


# --- two machines ---------------------------------------------------------------------------------

@pytest.mark.thorough
def test_two_agents_of_torchrun_are_two_ranks(data, tmp_path):
    """As on two machines, one rank each: the same bits as two ranks on one."""
    run_ranks(lambda: run_train(data, tmp_path / "one", dropout=0.1))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = flags_of({**TINY, "dropout": 0.1, "data_dir": data, "out_dir": tmp_path / "two"})
    options = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    agents = [start_torchrun("train.py", *flags, ranks=1, options=[*options, f"--node_rank={i}"])
              for i in range(2)]
    for agent in agents:
        _, err = agent.communicate(timeout=120)
        assert agent.returncode == 0, err[-3000:]
    assert_same_run(tmp_path / "one", tmp_path / "two")
