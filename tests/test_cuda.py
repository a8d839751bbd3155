"""What must hold on a GPU: a CPU's losses and decisions; graphs, chunks and micro-batches that change
nothing; dropout that follows from the seed; resuming; the guard. Skipped without one."""
import glob
import json
import math
from functools import partial

import pytest
import torch

import eval_blimp
import train
from helpers import (
    GPT2,
    assert_same,
    assert_same_log,
    killed_at,
    records,
    run_distill,
    run_train,
    saved_state,
    train_config,
    weights,
    write_pairs,
)
from lib.machine import record, seed_dropout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS = dict(max_iters=20, epochs=9, eval_interval=10, learning_rate=1e-3)
MODELS = {"llama": {}, "grouped": dict(n_head=4, n_kv_head=2), "gpt2": {**GPT2, "dropout": 0.0}}


def losses(out):
    return torch.tensor([record["loss"] for record in records(out) if "loss" in record])


# --- against the CPU ------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    *MODELS.values(), dict(compile="on"), dict(micro_batch_size=4), dict(loss_chunk=0)])
def test_float32_losses_are_the_cpus(data, tmp_path, change):
    assert not torch.backends.cuda.matmul.allow_tf32
    run = partial(run_train, data, **STEPS)
    run(tmp_path / "cpu", device="cpu", **{**change, "compile": "off"})
    run(tmp_path / "gpu", device="cuda", **change)
    assert_same_log(tmp_path / "cpu", tmp_path / "gpu", ["loss", "val_ce"], abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_distillation_is_the_cpus(data, teachers, tmp_path, dtype):
    run = partial(run_distill, data, teachers=teachers, teacher_dtype=(dtype,), **STEPS)
    run(tmp_path / "cpu", device="cpu")
    run(tmp_path / "gpu", device="cuda")
    assert_same_log(tmp_path / "cpu", tmp_path / "gpu", ["loss", "ce", "kl", "ensemble_val_ce"], abs=1e-4)


@pytest.mark.parametrize("change", MODELS.values(), ids=MODELS)
def test_bfloat16_is_closer_than_another_seed(data, tmp_path, change):
    run = partial(run_train, data, device="cuda", **STEPS, **change)
    run(tmp_path / "float32")
    run(tmp_path / "bfloat16", dtype="bfloat16")
    run(tmp_path / "seed", seed=43)
    exact = losses(tmp_path / "float32")
    rounded, spread = ((losses(tmp_path / other) - exact).abs().mean() for other in ("bfloat16", "seed"))
    assert rounded < 0.2 * spread


def test_decisions_are_the_cpus(corpus, teachers, tmp_path):
    """Of one checkpoint: the same but for 1 in 1,000. The bad sentence of a pair has two neighbouring words
    exchanged."""
    rows = []
    for path in glob.glob(f"{corpus}/text/train_10M/*.train"):
        for words in map(str.split, open(path)):
            rows += [(" ".join(words), " ".join(exchanged(words, i))) for i in range(len(words) - 1)
                     if len(words) < 20]
    write_pairs(tmp_path / "p", "exchanged", rows)
    right = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.json"
        eval_blimp.main(eval_blimp.EvalConfig(ckpt=(teachers[1],), data=(str(tmp_path / "p"),), out=str(out),
                                              device=device, batch_tokens=4096))
        right[device] = json.loads(out.read_text())["folders"]["p"]["tasks"]["exchanged"]["right"]
    assert len(rows) > 3000
    assert sum(a != b for a, b in zip(right["cpu"], right["cuda"], strict=True)) < len(rows) / 1000


def exchanged(words, i):
    return [*words[:i], words[i + 1], words[i], *words[i + 2:]]


# --- ways that must be one ------------------------------------------------------------------------

WAYS = {
    "without graphs": dict(cuda_graphs="off"), "compiled": dict(compile="on"),
    "whole logits": dict(loss_chunk=0), "small chunks": dict(loss_chunk=8),
    "micro-batches": dict(micro_batch_size=4),
    "micro-batches without graphs": dict(micro_batch_size=4, cuda_graphs="off")}


@pytest.mark.parametrize("change", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_another_way_is_the_same_step(data, tmp_path, model, change):
    run = partial(run_train, data, device="cuda", **STEPS, **model)
    run(tmp_path / "one")
    run(tmp_path / "other", **change)
    assert_same_log(tmp_path / "one", tmp_path / "other", ["loss", "grad_norm"], rel=1e-4)


def test_graphs_drop_what_would_be_dropped_without(data, tmp_path):
    run = partial(run_train, data, device="cuda", **STEPS, **GPT2)
    run(tmp_path / "graphs")
    run(tmp_path / "plain", cuda_graphs="off")
    assert_same_log(tmp_path / "graphs", tmp_path / "plain", ["loss"], rel=1e-4)


@pytest.mark.parametrize("compile", ["off", "on"])
def test_replays_draw_anew_and_follow_from_the_seed(data, tmp_path, compile):
    cfg = train_config(data, tmp_path, device="cuda", compile=compile, **GPT2)
    machine, chunks = train.start(cfg)
    body = train.new_model(cfg, machine, chunks).model
    record(body, machine, cfg)
    x = chunks.batch(0, 0).x

    def two(seed):
        seed_dropout(machine.device, seed)
        return [body(x).detach().clone() for _ in range(2)]
    (a, b), again, other = two(1), two(1), two(2)
    assert machine.graphs and a.isfinite().all()
    assert not torch.equal(a, b) and not torch.equal(a, other[0])
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])


def test_a_teacher_cache_is_its_teachers(data, teachers, tmp_path):
    run = partial(run_distill, data, teachers=teachers[:2], device="cuda", dtype="bfloat16", **STEPS)
    run(tmp_path / "live")
    run(tmp_path / "cached", teacher_cache=str(tmp_path / "cache"))
    assert_same_log(tmp_path / "live", tmp_path / "cached", ["loss", "ce"], rel=1e-2)


# --- going on -------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    dict(dtype="bfloat16"), dict(micro_batch_size=4), dict(compile="on"), dict(cuda_graphs="off")])
def test_a_resumed_run_repeats_the_losses_that_would_have_come(data, tmp_path, monkeypatch, change):
    """With dropout. To rounding: the same bits are not promised on a GPU."""
    run = partial(run_train, data, device="cuda", **{**STEPS, **GPT2, **change})
    run(tmp_path / "whole")
    with killed_at(monkeypatch, 13):
        run(tmp_path / "cut")
    run(tmp_path / "cut", resume=True)
    assert_same_log(tmp_path / "whole", tmp_path / "cut", ["loss", "val_ce"], rel=1e-4)


@pytest.mark.parametrize("change", [{}, dict(micro_batch_size=4)])
def test_a_step_that_is_not_finite_changes_nothing(data, tmp_path, monkeypatch, change):
    next_token_loss = train.next_token_loss

    def poisoned(trainee, batch, **kwargs):
        loss, parts = next_token_loss(trainee, batch, **kwargs)
        return loss * (math.nan if batch.step == 3 else 1), parts
    monkeypatch.setattr(train, "next_token_loss", poisoned)
    run = partial(run_train, data, tmp_path / "run", device="cuda", not_finite="skip", **change)
    run(max_iters=4)
    before, after = tmp_path / "run" / "ckpt_3", tmp_path / "run" / "ckpt_4"
    assert_same(weights(before), weights(after))
    assert_same(saved_state(before), saved_state(after))
    assert [record["skipped"] for record in records(tmp_path / "run")] == [0, 0, 0, 1]
    run(max_iters=6, resume=True)
    assert records(tmp_path / "run")[-1]["loss"] < math.inf
