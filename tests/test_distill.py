"""Distillation: the loss against its formula in float64, teachers, and the run as users start it."""
import os
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import distill
import prepare
from distill import distillation_loss, mean_logits
from helpers import (
    VOCAB,
    assert_resumes,
    assert_same,
    assert_same_log,
    distill_config,
    edit_json,
    records,
    reseal,
    run_distill,
    run_ranks,
    run_train,
    validations,
    weights,
)
from lib.checkpoints import find_checkpoint, load_checkpoint
from lib.data import Batch
from lib.files import read_json
from model import LanguageModel
from train import model_config, start

# --- the loss -------------------------------------------------------------------------------------


class Table:
    """A teacher: token -> logits."""

    def __init__(self, table):
        self.table = table

    def logits(self, states):
        return self.table[states]


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def formula(z_s, teachers, y, alpha, T, reduction):
    """alpha CE + (1 - alpha) T^2 KL with plain numpy in float64, CE, KL, and the gradient with respect to
    z_s."""
    B, S, V = z_s.shape
    z_t = np.mean(teachers, axis=0)
    p, p_T, q_T = softmax(z_s), softmax(z_s / T), softmax(z_t / T)
    one_hot = np.eye(V)[y]
    ce = -(one_hot * np.log(p)).sum() / (B * S)
    kl = (q_T * (np.log(q_T) - np.log(p_T))).sum()
    count = B if reduction == "sequence" else B * S
    loss = alpha * ce + (1 - alpha) * T ** 2 * kl / count
    gradient = alpha * (p - one_hot) / (B * S) + (1 - alpha) * T ** 2 * (p_T - q_T) / T / count
    return loss, ce, kl / (B * S), gradient


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("n_teachers", [1, 2, 3])
def test_loss_and_gradient_are_the_formula(n_teachers, T, reduction):
    rng = np.random.default_rng(n_teachers)
    B, S, V = 3, 5, 11
    z = rng.normal(size=(B, S, V)) * 3
    tables = rng.normal(size=(n_teachers, V, V)) * 3
    x, y = rng.integers(V, size=(2, B, S))
    loss, ce, kl, gradient = formula(z, tables[:, x], y, 0.3, T, reduction)

    z_s = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    teachers = [Table(torch.tensor(table, dtype=torch.float32)) for table in tables]
    z_t = mean_logits(teachers, [torch.tensor(x).flatten()] * n_teachers)
    ours, parts = distillation_loss(z_s.flatten(0, 1), z_t, torch.tensor(y).flatten(), 0.3, T,
                                    kl_weight=S if reduction == "sequence" else 1)
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-5)
    assert parts["ce"].item() == pytest.approx(ce, rel=1e-5)
    assert parts["kl"].item() == pytest.approx(kl, rel=1e-5)
    np.testing.assert_allclose(z_s.grad.numpy(), gradient, rtol=1e-4, atol=1e-6)


def test_published_reduction_is_torchs_batchmean():
    """The published code: KLDivLoss(reduction='batchmean') on (B, T, V), temperature squared in front."""
    torch.manual_seed(0)
    z_s, z_t, y = torch.randn(4, 6, 9), torch.randn(4, 6, 9), torch.randint(9, (4, 6))
    kl = torch.nn.KLDivLoss(reduction="batchmean")((z_s / 2).log_softmax(-1), (z_t / 2).softmax(-1))
    expected = 0.5 * F.cross_entropy(z_s.view(-1, 9), y.view(-1)) + 0.5 * 4 * kl
    ours, _ = distillation_loss(z_s.flatten(0, 1), z_t.flatten(0, 1), y.flatten(), 0.5, 2.0, kl_weight=6)
    torch.testing.assert_close(ours, expected)


def test_the_step_is_the_formulas_gradient(data, teachers, tmp_path):
    """One optimizer step of the whole program against autograd on the formula, teachers loaded apart."""
    run_distill(data, tmp_path / "run", teachers[:2], max_iters=1, log_interval=1, grad_clip=0.0)
    cfg = distill_config(data, "none", max_iters=1)
    _, chunks = start(cfg)
    torch.manual_seed(cfg.seed)
    student = LanguageModel(model_config(cfg))
    chosen = np.random.default_rng([cfg.seed, 0]).permutation((len(chunks.shards) - 1) // 32)[:8]
    tokens = torch.from_numpy(chunks.shards.windows(chosen * 32, 33))
    x, y = tokens[:, :-1], tokens[:, 1:]
    z_s = student(x)
    z_t = torch.stack([load_checkpoint(path)[0](x) for path in teachers[:2]]).mean(0).detach()
    log_p_s, log_p_t = (z_s / 2).log_softmax(-1), (z_t / 2).log_softmax(-1)
    kl = (log_p_t.exp() * (log_p_t - log_p_s)).sum(-1).mean()
    ce = -z_s.log_softmax(-1).gather(-1, y[..., None]).mean()
    (0.5 * ce + 0.5 * 4 * kl).backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
    assert records(tmp_path / "run")[-1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


# --- runs -----------------------------------------------------------------------------------------

def test_a_run_logs_teachers_ensemble_ce_and_kl(data, teachers, tmp_path):
    run_distill(data, tmp_path / "run", teachers, temperature=2.0, alpha=0.25)
    first, *log = records(tmp_path / "run")
    assert first["step"] == 0
    for value, path in zip(first["teacher_val_ce"], teachers, strict=True):
        by_its_own_run = read_json(os.path.join(path, "best.json"))["val_ce"]
        assert value == pytest.approx(by_its_own_run, abs=1e-5)
    assert first["ensemble_val_ce"] < max(first["teacher_val_ce"])
    for record in log:
        assert record["loss"] == pytest.approx(0.25 * record["ce"] + 0.75 * 4 * record["kl"], rel=1e-5)
    best = read_json(tmp_path / "run" / "best.json")
    assert best["val_ce"] == min(record["val_ce"] for record in validations(tmp_path / "run"))
    assert load_checkpoint(str(tmp_path / "run"))[2]["teachers"] == teachers


def test_alpha_one_is_plain_training(data, teachers, tmp_path):
    run_distill(data, tmp_path / "taught", teachers[:1], alpha=1.0)
    run_train(data, tmp_path / "plain")
    assert_same(weights(tmp_path / "taught"), weights(tmp_path / "plain"), rtol=1e-4, atol=1e-5)


def test_resume_equals_uninterrupted(data, teachers, tmp_path, monkeypatch):
    settings = dict(teachers=teachers[:2], dropout=0.1, micro_batch_size=4)
    assert_resumes(partial(run_distill, data, **settings), tmp_path, monkeypatch, 5)


@pytest.mark.slow
def test_two_ranks_equal_one_that_accumulates_twice(data, teachers, tmp_path):
    settings = dict(teachers=teachers[:2], max_iters=8, kl_reduction="sequence", micro_batch_size=4,
                    learning_rate=3e-3)
    run_distill(data, tmp_path / "one", **settings)
    run_ranks(lambda: run_distill(data, tmp_path / "two", **settings))
    assert_same_log(tmp_path / "one", tmp_path / "two", ["ensemble_val_ce"], abs=1e-4)
    assert_same_log(tmp_path / "one", tmp_path / "two", ["loss", "ce", "kl", "val_ce"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_equals_plain(data, teachers, tmp_path):
    for compiles in ("off", "on"):
        run_distill(data, tmp_path / compiles, teachers[:1], n_layer=1, loss_chunk=128, compile=compiles)
    assert_same_log(tmp_path / "off", tmp_path / "on", ["loss", "ce", "kl", "val_ce"], rel=1e-4)
    assert weights(tmp_path / "off").keys() == weights(tmp_path / "on").keys()


# --- teachers -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype,close", [("bfloat16", 0.02), ("int8", 0.01)])
def test_teacher_dtypes_barely_change_its_loss(data, teachers, dtype, close):
    cfg = distill_config(data, "none", teachers=tuple(teachers), teacher_dtype=(dtype,))
    machine, chunks = start(cfg)

    def loaded(*dtypes):
        return distill.load_teachers(replace(cfg, teacher_dtype=dtypes), machine, chunks)

    def val_ce(teacher):
        return distill.evaluate(partial(distill.ensemble_logits, [teacher]), chunks.val, cfg, machine)

    exact = loaded("float32")
    for teacher, rounded in zip(exact, loaded(dtype), strict=True):
        assert val_ce(teacher) == pytest.approx(val_ce(rounded), abs=close)
        assert val_ce(teacher) != val_ce(rounded)
        assert not any(p.requires_grad for p in rounded.body.parameters())
    mixed = loaded("float32", dtype, "float32")
    assert_same(exact[0].body.state_dict(), mixed[0].body.state_dict())
    assert mixed[1].body.embed_tokens.weight.dtype == getattr(torch, dtype)


def test_bfloat16_runs_keep_teacher_matrices_in_bfloat16_bit_for_bit(data, teachers):
    """What autocast would do at each step is done once: the same logits."""
    cfg = distill_config(data, "none", teachers=tuple(teachers), dtype="bfloat16")
    machine, chunks = start(cfg)
    x = torch.randint(VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    for path, teacher in zip(teachers, distill.load_teachers(cfg, machine, chunks), strict=True):
        assert teacher.body.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        with torch.no_grad(), machine.autocast():
            assert torch.equal(teacher.logits(teacher.states(Batch(x))), load_checkpoint(path)[0](x))


def test_teachers_are_not_touched(data, teachers, tmp_path):
    before = weights(teachers[0])
    run_distill(data, tmp_path / "run", teachers[:1])
    assert_same(before, weights(teachers[0]))


def test_changed_teachers_show_on_resume(data, teachers, tmp_path, capsys):
    def said(teacher, max_iters):
        """What the run prints that is resumed with another teacher or for more steps."""
        run_distill(data, tmp_path / "run", [teacher], max_iters=max_iters, resume=True)
        return capsys.readouterr().out

    run_distill(data, tmp_path / "run", teachers[:1], max_iters=3)
    assert "is at step 3 of 3; raise --max_iters" in said(teachers[0], 3)
    assert "notice: resuming with changed teachers" in said(teachers[1], 6)
    assert "changed teachers" not in said(teachers[1], 9)
    folder = tmp_path / "run" / "ckpt_9"  # another machine's rounding of the teacher's loss:
    theirs = read_json(folder / "config.json")["teacher_val_ce"]
    edit_json(folder / "config.json", teacher_val_ce=[ce + 1e-7 for ce in theirs])
    reseal(folder, "config.json")
    assert "changed teachers" not in said(teachers[1], 12)


# --- bad input ------------------------------------------------------------------------------------

def test_no_teachers(data, tmp_path):
    with pytest.raises(SystemExit, match="no teachers; name run folders"):
        run_distill(data, tmp_path / "run", teachers=[])
    assert not os.path.exists(tmp_path / "run")


@pytest.fixture(scope="module")
def unfit(corpus, data, tmp_path_factory):
    """A folder of teachers that do not fit the fixture `data` and its students."""
    folder = tmp_path_factory.mktemp("unfit")
    prepare_corpus = partial(prepare.PrepareConfig, input_dir=f"{corpus}/text")
    prepare.main(prepare_corpus(data_dir=str(folder / "smaller"), vocab_size=400))
    run_train(str(folder / "smaller"), folder / "other_size", max_iters=1)
    run_train(data, folder / "short", max_iters=1, block_size=16, seq_len=16)
    (folder / "old.pt").write_bytes(b"\x80\x04")
    # the same corpus gives the same tokenizer, so its hash is changed to stand for another one
    run_train(data, folder / "other_tokenizer", max_iters=1)
    checkpoint = find_checkpoint(str(folder / "other_tokenizer"))
    edit_json(f"{checkpoint}/config.json", tokenizer_sha256="0")
    reseal(checkpoint, "config.json")
    return folder


@pytest.mark.parametrize("name,message", [
    ("other_tokenizer", "another tokenizer"),
    ("other_size", "vocabulary of 400"),
    ("short", "has 16 positions"),
    ("missing", "no checkpoint at"),
    ("old.pt", "pickled checkpoints are never opened"),
])
def test_unfit_teachers_are_refused_before_a_file_is_written(data, teachers, unfit, tmp_path, name, message):
    with pytest.raises(SystemExit, match=message) as e:
        run_distill(data, tmp_path / "run", [teachers[0], str(unfit / name)])
    assert name in str(e.value) and "\n" not in str(e.value)
    assert not os.path.exists(tmp_path / "run")


def test_overwrite_spares_teachers_and_what_is_not_ours(data, teachers, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(teachers[0], out)
    (out / "ckpt_keep").mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="--overwrite would delete teacher"):
        run_distill(data, out, [str(out)], overwrite=True)
    assert load_checkpoint(str(out))
    run_distill(data, out, teachers[:1], overwrite=True)
    assert (out / "ckpt_keep").is_dir() and (out / "thesis.tex").exists()
    with pytest.raises(SystemExit, match="was trained with teachers; resume it with distill.py"):
        run_train(data, out, resume=True)
    with pytest.raises(SystemExit, match="is a checkpoint folder; name a run folder"):
        run_train(data, find_checkpoint(str(out)))


@pytest.mark.parametrize("change,message", [
    (dict(alpha=2.0), "alpha=2.0 must be"),
    (dict(temperature=0.0), "temperature=0.0 must be"),
    (dict(teacher_dtype=("int4",)), "once or once per teacher"),
    (dict(teacher_dtype=("int8", "int8", "int8")), "once or once per teacher"),
])
def test_bad_settings_of_the_loss_and_the_teachers(data, teachers, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        run_distill(data, tmp_path / "run", teachers[:2], **change)
