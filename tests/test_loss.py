"""The loss in chunks against the formula on whole logits, and the teachers' cache against live teachers."""
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import distill
import prepare
import train
from distill import Teacher
from helpers import assert_same, cut_short, distill_config, records, torchrun, weights
from lib import teacher_cache
from lib.checkpoints import load_checkpoint
from lib.chunked_loss import chunked_loss
from lib.data import Batch, n_chunks, to_batch
from lib.shards import read_meta
from model import LanguageModel, ModelConfig, float_weight, quantize_int8_

B, T, V, C = 3, 20, 200, 16


def language_model(**change):
    torch.manual_seed(len(change))
    model = LanguageModel(ModelConfig(**{**dict(vocab_size=V, n_layer=2, n_head=2, n_embd=C, intermediate_size=24, block_size=32), **change}))
    for p in model.parameters():  # far from uniform predictions
        p.data = p.data * 3 + torch.randn_like(p) / 10
    return model


def gradients(n_teachers, chunk, compiled=False, dtype=torch.float32, kl_weight=20, **change):
    """Loss, parts and the student's gradients."""
    student = language_model(**change)
    teachers = [language_model(n_embd=w, arch=arch).eval() for w, arch in ((24, "gpt2"), (32, "llama"), (16, "llama"))][:n_teachers]
    torch.manual_seed(0)
    x, y = torch.randint(V, (2, B, T))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with torch.no_grad():
            teachers = [Teacher(t, dtype) for t in teachers]
            states = [t.states(Batch(x)) for t in teachers]
        formula = train.cross_entropy
        if teachers:
            formula = partial(distill.formula, teachers=teachers, alpha=0.3, temperature=2.0, kl_weight=kl_weight)
        loss, parts = chunked_loss(formula, student.model(x), student.lm_head, y, *states, chunk=chunk, compiled=compiled)
    (loss / 4).backward()
    return loss.detach(), parts, {name: p.grad for name, p in student.named_parameters()}


def close(a, b, tolerance):
    """Relative in norm, tensor by tensor; the bias of k_proj has gradient 0 but for rounding."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * b[name].norm() + 1e-7, name


@pytest.mark.parametrize("change", [{}, dict(arch="gpt2", tie_weights=True, norm_eps=1e-5)])
@pytest.mark.parametrize("n_teachers", [0, 1, 3])
@pytest.mark.parametrize("chunk", [7, 20, 1000])
def test_chunks_give_the_formulas_gradient(n_teachers, chunk, change):
    loss, parts, grads = gradients(n_teachers, 0, **change)
    in_chunks = gradients(n_teachers, chunk, **change)
    assert in_chunks[0].item() == pytest.approx(loss.item(), rel=1e-6)
    assert in_chunks[1].keys() == parts.keys() and all(in_chunks[1][k].item() == pytest.approx(parts[k].item(), rel=1e-5) for k in parts)
    close(in_chunks[2], grads, 1e-5)


@pytest.mark.parametrize("n_teachers", [0, 2])
def test_bfloat16_chunks_are_as_near_float32_as_bfloat16_is(n_teachers):
    exact = gradients(n_teachers, 0)

    def error(chunk):
        loss, _, grads = gradients(n_teachers, chunk, dtype=torch.bfloat16)
        assert loss.item() == pytest.approx(exact[0].item(), rel=1e-2)
        return torch.cat([(grads[k] - exact[2][k]).flatten() for k in grads]).norm() / torch.cat(
            [g.flatten() for g in exact[2].values()]).norm()
    assert error(7) < 1.05 * error(0) < 0.1


def test_compiled_chunks_too():
    if not train.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work on this machine")
    close(gradients(2, 20, compiled=True)[2], gradients(2, 0)[2], 1e-5)


def test_a_changed_formula_changes_both_ways(monkeypatch):
    """Reverse KL in place of KL: whole and in chunks again agree, and on something else."""
    kl = gradients(2, 0)[2]

    def reverse_kl(z_s, z_t, y, *_):
        log_p_s, log_p_t = z_s.float().log_softmax(-1), z_t.log_softmax(-1)
        return (log_p_s.exp() * (log_p_s - log_p_t)).sum(-1).mean(), {}
    monkeypatch.setattr(distill, "distillation_loss", reverse_kl)
    whole, in_chunks = gradients(2, 0)[2], gradients(2, 7)[2]
    close(in_chunks, whole, 1e-5)
    assert (whole["lm_head.weight"] - kl["lm_head.weight"]).norm() > 0.1 * kl["lm_head.weight"].norm()


class Largest(TorchDispatchMode):
    """The most elements any tensor had that an operation made."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_logits_never_exist_as_a_whole():
    with Largest() as whole:
        gradients(2, 0)
    with Largest() as in_chunks:
        gradients(2, 4)
    head = V * 32  # the larger teacher's, independent of the batch
    assert whole.numel >= B * T * V and in_chunks.numel <= head < B * T * V


def test_float_weight_of_an_int8_head_is_what_the_head_does():
    model = quantize_int8_(language_model())
    h = torch.randn(5, C)
    torch.testing.assert_close(h @ float_weight(model.lm_head, torch.float32).T, model.lm_head(h))


def test_a_run_in_chunks_is_the_run_on_whole_logits(data, teachers, tmp_path):
    for chunk in (0, 50):
        distill.main(distill_config(data, tmp_path / str(chunk), teachers=tuple(teachers[:2]), loss_chunk=chunk, kl_reduction="sequence"))
    for a, b in zip(records(tmp_path / "0"), records(tmp_path / "50")):
        for key in ("loss", "ce", "kl", "grad_norm", "val_ce"):
            assert a.get(key) == (pytest.approx(b[key], rel=1e-4) if key in b else None)


def test_bfloat16_runs_keep_teacher_matrices_in_bfloat16_bit_for_bit(data, teachers):
    """What autocast would do at each step is done once: the same logits."""
    cfg = distill_config(data, "none", teachers=tuple(teachers), dtype="bfloat16")
    machine, chunks = train.start(cfg)
    batch = Batch(torch.randint(500, (4, 32), generator=torch.Generator().manual_seed(0)))
    for path, ours in zip(teachers, distill.load_teachers(cfg, machine, chunks)):
        assert ours.body.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        with torch.no_grad(), machine.autocast():
            assert torch.equal(ours.logits(ours.states(batch)), load_checkpoint(path)[0](batch.x))


# --- teachers computed once -----------------------------------------------------------------------

def cached(data, out, teachers, cache, **change):
    distill.main(distill_config(data, out, teachers=tuple(teachers), teacher_cache=str(cache), **change))


@pytest.mark.parametrize("dtype,rel", [("float32", 1e-2), ("bfloat16", 1e-3)])
def test_cached_teachers_train_the_same_student(data, teachers, tmp_path, monkeypatch, dtype, rel):
    """All epochs and a second student from one pass. Rounding states to bfloat16 is all that differs."""
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 100_000)
    distill.main(distill_config(data, tmp_path / "live", teachers=tuple(teachers), dtype=dtype, epochs=2, max_iters=100, eval_interval=0, log_interval=10))
    cached(data, tmp_path / "cached", teachers, tmp_path / "c", dtype=dtype, epochs=2, max_iters=100, eval_interval=0, log_interval=10)
    assert len(os.listdir(tmp_path / "c" / os.listdir(tmp_path / "c")[0])) > 5  # several shards
    for a, b in zip(records(tmp_path / "live"), records(tmp_path / "cached")):
        for key in ("loss", "kl", "val_ce"):
            assert a.get(key) == (pytest.approx(b[key], rel=rel) if key in b else None)
    before = {f: os.path.getmtime(f) for f in walk(tmp_path / "c")}
    cached(data, tmp_path / "second", teachers[:1], tmp_path / "c", dtype=dtype, n_layer=1)
    assert {f: os.path.getmtime(f) for f in walk(tmp_path / "c") if not f.endswith("cache.json")} == {
        f: t for f, t in before.items() if not f.endswith("cache.json")}


def walk(folder):
    return [os.path.join(path, f) for path, _, files in os.walk(folder) for f in files]


def test_states_are_the_teachers(data, teachers, tmp_path, monkeypatch):
    """Chunks looked up in any order, over shard borders, are the teachers' own hidden states."""
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 70_000)
    cfg = distill_config(data, "none", teachers=tuple(teachers), teacher_cache=str(tmp_path / "c"))
    machine, chunks = train.start(cfg)
    cached_ones = teacher_cache.cached_teachers(cfg, machine, chunks, distill.load_teachers(cfg, machine, chunks))
    n = n_chunks(cfg, chunks.shards)
    index = np.array([n - 1, 0, n // 2, 3])
    batch = to_batch(chunks.shards.windows(index * 32, 33), machine.device, index)
    for path, teacher in zip(teachers, cached_ones, strict=True):
        expected = load_checkpoint(path)[0].model(batch.x)
        torch.testing.assert_close(teacher.states(batch).float(), expected, rtol=2 ** -8, atol=1e-4)


def test_an_interrupted_pass_goes_on(data, teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 100_000)
    cached(data, tmp_path / "whole", teachers, tmp_path / "a")
    real, calls = teacher_cache.flush_to_disk, []

    def dying(path):
        calls.append(path)
        if path.endswith("states_00002.bin"):
            raise KeyboardInterrupt
        real(path)
    monkeypatch.setattr(teacher_cache, "flush_to_disk", dying)
    with pytest.raises(KeyboardInterrupt):
        cached(data, tmp_path / "cut", teachers, tmp_path / "b")
    monkeypatch.setattr(teacher_cache, "flush_to_disk", real)
    kept = os.path.getmtime(next(f for f in walk(tmp_path / "b") if f.endswith("states_00001.bin")))
    cached(data, tmp_path / "cut", teachers, tmp_path / "b")
    assert kept == os.path.getmtime(next(f for f in sorted(walk(tmp_path / "b")) if f.endswith("states_00001.bin")))
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_resuming_with_a_cache_is_the_same_run(data, teachers, tmp_path, monkeypatch):
    cached(data, tmp_path / "whole", teachers[:2], tmp_path / "c", dtype="bfloat16")
    with monkeypatch.context() as m:
        cut_short(m, 5)
        with pytest.raises(KeyboardInterrupt):
            cached(data, tmp_path / "cut", teachers[:2], tmp_path / "c", dtype="bfloat16")
    cached(data, tmp_path / "cut", teachers[:2], tmp_path / "c", dtype="bfloat16", resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_two_ranks_share_a_cache(data, teachers, tmp_path):
    cached(data, tmp_path / "one", teachers[:2], tmp_path / "a")
    torchrun("distill.py", data, tmp_path / "two", teachers=teachers[:2], teacher_cache=tmp_path / "b")
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two")):
        assert a.get("loss") == (pytest.approx(b["loss"], rel=1e-4) if "loss" in b else None)


def test_foreign_stale_and_damaged_caches_are_refused(corpus, data, teachers, tmp_path, capsys):
    own = str(tmp_path / "teacher")
    shutil.copytree(teachers[0], own)
    change = dict(teachers=[own], cache=tmp_path / "c")
    cached(data, tmp_path / "s", **change)
    out = capsys.readouterr().out
    assert "GB to write into" in out and "64 bytes per token" in out
    prepare.main(prepare.PrepareConfig(input_dir=f"{corpus}/text", data_dir=str(tmp_path / "other"), vocab_size=500, bos="document"))
    if read_meta(str(tmp_path / "other"))["tokenizer_sha256"] == read_meta(data)["tokenizer_sha256"]:
        refused("data_sha256 was", str(tmp_path / "other"), tmp_path / "n", **change)
    refused("seq_len was 32, is 16", data, tmp_path / "n", seq_len=16, **change)
    refused("teacher_dtype was float32, is int8", data, tmp_path / "n", teacher_dtype=("int8",), **change)
    refused("random_offset=False", data, tmp_path / "n", random_offset=True, **change)
    shard = next(f for f in walk(tmp_path / "c") if f.endswith("00000.bin"))
    content = bytearray(open(shard, "rb").read())
    content[1000] ^= 1
    open(shard, "wb").write(content)
    refused("states_00000.bin is missing or damaged", data, tmp_path / "n", **change)
    os.remove(shard[:-3] + "json")  # as the message says
    cached(data, tmp_path / "again", **change)
    shutil.rmtree(own)
    shutil.copytree(teachers[1], own)  # another model under the same name
    refused("delete that folder or name another --teacher_cache", data, tmp_path / "n", **change)
    os.remove(os.path.join(os.path.dirname(shard), "cache.json"))  # not enough
    refused("states_0000..json is of another teacher or data", data, tmp_path / "n", **change)


def refused(message, data, out, teachers, cache, **change):
    with pytest.raises(SystemExit, match=message) as e:
        cached(data, out, teachers, cache, **change)
    assert "\n" not in str(e.value) and not (os.path.exists(out) and os.listdir(out))


def test_a_cache_that_does_not_fit_is_not_begun(data, teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(SystemExit, match="GB free, the teacher cache wants"):
        cached(data, tmp_path / "s", teachers[:1], tmp_path / "c")
    assert not walk(tmp_path / "c")
