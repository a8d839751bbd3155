"""Distillation: the loss against its formula in float64, teachers, and the run as users start it."""
import json
import os
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import distill
import prepare
import train
from distill import distillation_loss, mean_logits
from helpers import assert_same, cut_short, distill_config, records, run_train, torchrun, weights
from lib.checkpoints import find_checkpoint, load_checkpoint
from lib.files import sha256
from model import LanguageModel
from train import model_config, start


class Table:
    """A teacher: token -> logits."""

    def __init__(self, table):
        self.table = table

    def logits(self, states):
        return self.table[states]


def formula(z_s, teachers, y, alpha, T, reduction):
    """alpha CE + (1 - alpha) T^2 KL with plain numpy in float64, and its gradient with respect to z_s."""
    z_t = np.mean(teachers, axis=0)

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)
    B, S, V = z_s.shape
    p, p_T, q_T = softmax(z_s), softmax(z_s / T), softmax(z_t / T)
    one_hot = np.eye(V)[y]
    ce = -(one_hot * np.log(p)).sum() / (B * S)
    kl = (q_T * (np.log(q_T) - np.log(p_T))).sum()
    count = B if reduction == "sequence" else B * S
    grad = alpha * (p - one_hot) / (B * S) + (1 - alpha) * T ** 2 * (p_T - q_T) / T / count
    return alpha * ce + (1 - alpha) * T ** 2 * kl / count, ce, kl / (B * S), grad


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("n_teachers", [1, 2, 3])
def test_loss_and_gradient_are_the_formula(n_teachers, T, reduction):
    rng = np.random.default_rng(n_teachers)
    B, S, V = 3, 5, 11
    z = rng.normal(size=(B, S, V)) * 3
    tables = rng.normal(size=(n_teachers, V, V)) * 3  # a teacher: token -> logits
    x, y = rng.integers(V, size=(2, B, S))
    loss, ce, kl, grad = formula(z, tables[:, x], y, 0.3, T, reduction)
    z_s = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    teachers = [Table(torch.tensor(t, dtype=torch.float32)) for t in tables]
    z_t = mean_logits(teachers, [torch.tensor(x).flatten()] * n_teachers)
    ours, parts = distillation_loss(z_s.flatten(0, 1), z_t, torch.tensor(y).flatten(), 0.3, T,
                                    S if reduction == "sequence" else 1)
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-5)
    assert parts["ce"].item() == pytest.approx(ce, rel=1e-5) and parts["kl"].item() == pytest.approx(kl, rel=1e-5)
    np.testing.assert_allclose(z_s.grad.numpy(), grad, rtol=1e-4, atol=1e-6)


def test_published_reduction_is_torchs_batchmean():
    """The published code: KLDivLoss(reduction='batchmean') on (B, T, V), temperature squared in front."""
    torch.manual_seed(0)
    z_s, z_t, y = torch.randn(4, 6, 9), torch.randn(4, 6, 9), torch.randint(9, (4, 6))
    kl = torch.nn.KLDivLoss(reduction="batchmean")((z_s / 2).log_softmax(-1), (z_t / 2).softmax(-1))
    expected = 0.5 * torch.nn.functional.cross_entropy(z_s.view(-1, 9), y.view(-1)) + 0.5 * 4 * kl
    ours, _ = distillation_loss(z_s.flatten(0, 1), z_t.flatten(0, 1), y.flatten(), 0.5, 2.0, kl_weight=6)
    torch.testing.assert_close(ours, expected)


def test_a_run_logs_teachers_ensemble_ce_and_kl(data, teachers, tmp_path):
    cfg = distill_config(data, tmp_path / "s", teachers=tuple(teachers), temperature=2.0, alpha=0.25)
    distill.main(cfg)
    first, *log = records(tmp_path / "s")
    for value, path in zip(first["teacher_val_ce"], teachers):  # as the teacher's own run measured it
        assert value == pytest.approx(json.load(open(os.path.join(path, "best.json")))["val_ce"], abs=1e-5)
    assert first["step"] == 0 and first["ensemble_val_ce"] < max(first["teacher_val_ce"])
    for r in log:
        assert r["loss"] == pytest.approx(0.25 * r["ce"] + 0.75 * 4 * r["kl"], rel=1e-5)
    best = json.load(open(tmp_path / "s" / "best.json"))
    assert best["val_ce"] == min(r["val_ce"] for r in log if "val_ce" in r)
    assert load_checkpoint(str(tmp_path / "s"))[2]["teachers"] == teachers


def test_the_step_is_the_formulas_gradient(data, teachers, tmp_path):
    """One optimizer step of the whole program against autograd on the formula, teachers loaded apart."""
    distill.main(distill_config(data, tmp_path / "s", teachers=tuple(teachers[:2]), max_iters=1, log_interval=1, grad_clip=0.0))
    cfg = distill_config(data, "none", max_iters=1)
    _, chunks = start(cfg)
    torch.manual_seed(cfg.seed)
    student = LanguageModel(model_config(cfg))
    chosen = np.random.default_rng([cfg.seed, 0]).permutation((len(chunks.shards) - 1) // 32)[:8]
    tokens = torch.from_numpy(chunks.shards.windows(chosen * 32, 33))
    x, y = tokens[:, :-1], tokens[:, 1:]
    z_t = torch.stack([load_checkpoint(t)[0](x) for t in teachers[:2]]).mean(0).detach()
    z_s = student(x)
    kl = ((z_t / 2).softmax(-1) * ((z_t / 2).log_softmax(-1) - (z_s / 2).log_softmax(-1))).sum(-1).mean()
    ce = -z_s.log_softmax(-1).gather(-1, y[..., None]).mean()
    (0.5 * ce + 0.5 * 4 * kl).backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
    assert records(tmp_path / "s")[-1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_alpha_one_is_plain_training(data, teachers, tmp_path):
    distill.main(distill_config(data, tmp_path / "kd", teachers=(teachers[0],), alpha=1.0))
    run_train(data, tmp_path / "plain")
    assert_same(weights(tmp_path / "kd"), weights(tmp_path / "plain"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype,close", [("bfloat16", 0.02), ("int8", 0.01)])
def test_teacher_dtypes_barely_change_its_loss(data, teachers, dtype, close):
    cfg = distill_config(data, "none", teachers=tuple(teachers), teacher_dtype=(dtype,))
    machine, chunks = start(cfg)

    def val_ce(teacher):
        return distill.evaluate(partial(distill.ensemble_logits, [teacher]), chunks.val, cfg, machine)
    exact = distill.load_teachers(replace(cfg, teacher_dtype=("float32",)), machine, chunks)
    for a, b in zip(exact, distill.load_teachers(cfg, machine, chunks)):
        assert val_ce(a) == pytest.approx(val_ce(b), abs=close) and val_ce(a) != val_ce(b)
        assert not any(p.requires_grad for p in b.body.parameters())
    mixed = distill.load_teachers(replace(cfg, teacher_dtype=("float32", dtype, "float32")), machine, chunks)
    assert_same(exact[0].body.state_dict(), mixed[0].body.state_dict())
    assert mixed[1].body.embed_tokens.weight.dtype == getattr(torch, dtype)


def test_teachers_are_not_touched(data, teachers, tmp_path):
    before = weights(teachers[0])
    distill.main(distill_config(data, tmp_path / "s", teachers=tuple(teachers[:1])))
    assert_same(before, weights(teachers[0]))


def test_two_ranks_equal_one_that_accumulates_twice(data, teachers, tmp_path):
    change = dict(teachers=tuple(teachers[:2]), max_iters=20, kl_reduction="sequence", micro_batch_size=4, learning_rate=3e-3)
    distill.main(distill_config(data, tmp_path / "one", **change))
    torchrun("distill.py", data, tmp_path / "two", **change)
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two")):
        assert a.get("ensemble_val_ce") == (pytest.approx(b["ensemble_val_ce"], abs=1e-4) if "ensemble_val_ce" in b else None)
        for key in ("loss", "ce", "kl", "val_ce"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_compiled_equals_plain(data, teachers, tmp_path):
    if not train.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work on this machine")
    for compile in ("off", "on"):
        distill.main(distill_config(data, tmp_path / compile, teachers=tuple(teachers[:1]), n_layer=1, loss_chunk=128, compile=compile))
    for a, b in zip(records(tmp_path / "off"), records(tmp_path / "on")):
        for key in ("loss", "ce", "kl", "val_ce"):
            assert a.get(key) == (pytest.approx(b[key], rel=1e-4) if key in b else None)
    assert weights(tmp_path / "off").keys() == weights(tmp_path / "on").keys()


def test_resume_equals_uninterrupted(data, teachers, tmp_path, monkeypatch):
    change = dict(teachers=tuple(teachers[:2]), dropout=0.1, micro_batch_size=4)
    distill.main(distill_config(data, tmp_path / "whole", **change))
    with monkeypatch.context() as m:
        cut_short(m, 5)
        with pytest.raises(KeyboardInterrupt):
            distill.main(distill_config(data, tmp_path / "cut", **change))
    distill.main(distill_config(data, tmp_path / "cut", resume=True, **change))
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert [r["step"] for r in records(tmp_path / "cut")] == [0, 1, 2, 3, 4, 5, 6]


# --- bad input ------------------------------------------------------------------------------------

def test_no_teachers(data, tmp_path):
    with pytest.raises(SystemExit, match="no teachers; name run folders"):
        distill.main(distill_config(data, tmp_path / "s"))
    assert not os.path.exists(tmp_path / "s")


def test_unfit_teachers_are_refused_before_anything_is_written(corpus, data, teachers, tmp_path):
    prepare.main(prepare.PrepareConfig(input_dir=f"{corpus}/text", data_dir=str(tmp_path / "other"), vocab_size=500))
    prepare.main(prepare.PrepareConfig(input_dir=f"{corpus}/text", data_dir=str(tmp_path / "smaller"), vocab_size=400))
    run_train(str(tmp_path / "other"), tmp_path / "same_size", max_iters=1)
    shutil.copytree(tmp_path / "same_size", tmp_path / "other_tokenizer")
    run_train(str(tmp_path / "smaller"), tmp_path / "other_size", max_iters=1, vocab_size=400)
    run_train(data, tmp_path / "short", max_iters=1, block_size=16, seq_len=16)
    open(tmp_path / "old.pt", "wb").write(b"\x80\x04")
    # the first corpus gave the same tokenizer, so its hash is changed to stand for another one
    folder = find_checkpoint(str(tmp_path / "other_tokenizer"))
    c = json.load(open(f"{folder}/config.json"))
    json.dump({**c, "tokenizer_sha256": "0"}, open(f"{folder}/config.json", "w"))
    sums = json.load(open(f"{folder}/sha256.json"))
    json.dump({**sums, "config.json": sha256(f"{folder}/config.json")}, open(f"{folder}/sha256.json", "w"))
    for teacher, message in (("other_tokenizer", "another tokenizer"), ("other_size", "vocabulary of 400"), ("short", "has 16 positions"),
                             ("missing", "no checkpoint at"), ("old.pt", "pickled checkpoints are never opened")):
        with pytest.raises(SystemExit, match=message) as e:
            distill.main(distill_config(data, tmp_path / "s", teachers=(teachers[0], str(tmp_path / teacher))))
        assert teacher in str(e.value) and "\n" not in str(e.value) and not os.path.exists(tmp_path / "s")


def test_overwrite_spares_teachers_and_what_is_not_ours(data, teachers, tmp_path):
    out = tmp_path / "s"
    shutil.copytree(teachers[0], out)
    os.makedirs(out / "ckpt_keep")
    open(out / "thesis.tex", "w").close()
    with pytest.raises(SystemExit, match="--overwrite would delete teacher"):
        distill.main(distill_config(data, out, teachers=(str(out),), overwrite=True))
    assert load_checkpoint(str(out))
    distill.main(distill_config(data, out, teachers=(teachers[0],), overwrite=True))
    assert os.path.isdir(out / "ckpt_keep") and os.path.exists(out / "thesis.tex")
    with pytest.raises(SystemExit, match="was trained with teachers; resume it with distill.py"):
        run_train(data, out, resume=True)
    with pytest.raises(SystemExit, match="is a checkpoint folder; name a run folder"):
        run_train(data, find_checkpoint(str(out)))


@pytest.mark.parametrize("change,message", [(dict(alpha=2.0), "alpha=2.0 must be"), (dict(temperature=0.0), "temperature=0.0 must be")])
def test_weights_that_mean_nothing(data, teachers, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        distill.main(distill_config(data, tmp_path / "s", teachers=tuple(teachers[:1]), **change))


def test_bad_teacher_dtype(data, teachers, tmp_path):
    for dtypes in (("int4",), ("int8", "int8", "int8")):
        with pytest.raises(SystemExit, match="once or once per teacher"):
            distill.main(distill_config(data, tmp_path / "s", teachers=tuple(teachers[:2]), teacher_dtype=dtypes))


def test_changed_teachers_show_on_resume(data, teachers, tmp_path, capsys):
    distill.main(distill_config(data, tmp_path / "s", teachers=tuple(teachers[:1]), max_iters=3))
    distill.main(distill_config(data, tmp_path / "s", teachers=tuple(teachers[:1]), max_iters=3, resume=True))
    assert "is at step 3 of 3; raise --max_iters" in capsys.readouterr().out
    distill.main(distill_config(data, tmp_path / "s", teachers=tuple(teachers[1:2]), max_iters=6, resume=True))
    assert "notice: resuming with changed teachers" in capsys.readouterr().out
    distill.main(distill_config(data, tmp_path / "s", teachers=tuple(teachers[1:2]), max_iters=9, resume=True))
    assert "changed teachers" not in capsys.readouterr().out
