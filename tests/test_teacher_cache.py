"""Teachers computed once against live teachers."""
import os
import shutil
import weakref
from functools import partial

import numpy as np
import pytest
import torch

import distill
import prepare
import train
from helpers import (
    TINY,
    VOCAB,
    assert_resumes,
    assert_same,
    assert_same_log,
    distill_config,
    run_distill,
    run_ranks,
    weights,
)
from lib import teacher_cache
from lib.checkpoints import load_checkpoint
from lib.data import n_chunks, to_batch
from lib.shards import read_meta

T = TINY["seq_len"]


def files(folder):
    """Each file in and below a folder, and when it was written."""
    paths = (os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)
    return {path: os.path.getmtime(path) for path in paths}


def states_of(cache):
    """Its files without cache.json, which each run writes."""
    return {path: time for path, time in files(cache).items() if not path.endswith("cache.json")}


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


@pytest.fixture
def small_shards(monkeypatch):
    """Several shards where there would be one."""
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 70_000)


# --- the same states, the same student ------------------------------------------------------------

@pytest.mark.usefixtures("small_shards")
def test_states_are_the_teachers(data, teachers, cache):
    """Chunks looked up in any order, over shard borders, are the teachers' own hidden states."""
    cfg = distill_config(data, "none", teachers=tuple(teachers), teacher_cache=cache)
    machine, chunks = train.start(cfg)
    live = distill.load_teachers(cfg, machine, chunks)
    live[0].body.forward = live[0].body.forward  # in a cycle, as a compiled or recorded body is
    layer = weakref.ref(live[0].body.layers[0])
    cached = teacher_cache.cached_teachers(cfg, machine, chunks, live)
    assert layer() is None  # its memory is free
    last = n_chunks(cfg, chunks.shards) - 1
    index = np.array([last, 0, last // 2, 3])
    batch = to_batch(chunks.shards.windows(index * T, T + 1), machine.device, index)
    for path, teacher in zip(teachers, cached, strict=True):
        expected = load_checkpoint(path)[0].model(batch.x)
        torch.testing.assert_close(teacher.states(batch).float(), expected, rtol=2 ** -8, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("dtype,tolerance", [
    ("bfloat16", 1e-3), pytest.param("float32", 1e-2, marks=pytest.mark.thorough)])
def test_cached_teachers_train_the_same_student(data, teachers, cache, tmp_path, dtype, tolerance):
    """All epochs and a second student from one pass. Rounding states to bfloat16 is all that differs."""
    settings = dict(dtype=dtype, epochs=2, max_iters=100, eval_interval=0, log_interval=10)
    run_distill(data, tmp_path / "live", teachers, **settings)
    run_distill(data, tmp_path / "cached", teachers, teacher_cache=cache, **settings)
    assert len(os.listdir(os.path.join(cache, os.listdir(cache)[0]))) > 5  # several shards
    assert_same_log(tmp_path / "live", tmp_path / "cached", ["loss", "kl", "val_ce"], rel=tolerance)
    before = states_of(cache)
    run_distill(data, tmp_path / "second", teachers[:1], teacher_cache=cache, dtype=dtype, n_layer=1)
    assert states_of(cache) == before


@pytest.mark.thorough
def test_two_ranks_share_a_cache(data, teachers, tmp_path):
    run_distill(data, tmp_path / "one", teachers[:2], teacher_cache=str(tmp_path / "a"))
    run_ranks(lambda: run_distill(data, tmp_path / "two", teachers[:2], teacher_cache=str(tmp_path / "b")))
    assert_same_log(tmp_path / "one", tmp_path / "two", ["loss"], rel=1e-4)


# --- interrupted ----------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_pass_goes_on(data, teachers, tmp_path, monkeypatch):
    run = partial(run_distill, data, teachers=teachers)
    run(tmp_path / "whole", teacher_cache=str(tmp_path / "a"))
    flush_to_disk = teacher_cache.flush_to_disk

    def dying(path):
        if path.endswith("states_00002.bin"):
            raise KeyboardInterrupt
        flush_to_disk(path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teacher_cache, "flush_to_disk", dying)
        run(tmp_path / "cut", teacher_cache=str(tmp_path / "b"))

    def second_shards():
        found = files(tmp_path / "b")
        return {path: time for path, time in found.items() if path.endswith("states_00001.bin")}
    kept = second_shards()
    assert len(kept) == 1  # the first teacher's
    run(tmp_path / "cut", teacher_cache=str(tmp_path / "b"))
    assert kept.items() <= second_shards().items()
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.slow
def test_resuming_with_a_cache_is_the_same_run(data, teachers, cache, tmp_path, monkeypatch):
    run = partial(run_distill, data, teachers=teachers[:2], teacher_cache=cache, dtype="bfloat16")
    assert_resumes(run, tmp_path, monkeypatch, 5)


# --- refused --------------------------------------------------------------------------------------

@pytest.fixture
def teacher(teachers, tmp_path):
    """A run folder that may be changed."""
    return shutil.copytree(teachers[0], tmp_path / "teacher")


@pytest.fixture
def refused(data, teacher, cache, tmp_path):
    """refused(message, **change): a run with the cache says so in one line and writes nothing."""
    def refused(message, data=data, **change):
        out = tmp_path / "new"
        with pytest.raises(SystemExit, match=message) as e:
            run_distill(data, out, [str(teacher)], teacher_cache=cache, **change)
        assert "\n" not in str(e.value)
        assert not (out.exists() and os.listdir(out))
    return refused


@pytest.fixture
def written(data, teacher, cache, tmp_path):
    """A run has filled the cache: its one shard."""
    run_distill(data, tmp_path / "first", [str(teacher)], teacher_cache=cache)
    (shard,) = (path for path in files(cache) if path.endswith("states_00000.bin"))
    return shard


@pytest.mark.usefixtures("written")
def test_a_foreign_cache_is_refused(corpus, data, refused, tmp_path):
    other = str(tmp_path / "other")
    prepare.main(prepare.PrepareConfig(input_dir=f"{corpus}/text", data_dir=other, vocab_size=VOCAB,
                                       bos="document"))
    assert read_meta(other)["tokenizer_sha256"] == read_meta(data)["tokenizer_sha256"]
    refused("data_sha256 was", other)
    refused("seq_len was 32, is 16", seq_len=16)
    refused("teacher_dtype was float32, is int8", teacher_dtype=("int8",))
    refused("random_offset=False", random_offset=True)


def test_what_a_cache_wants_is_said(data, teachers, cache, tmp_path, capsys):
    run_distill(data, tmp_path / "run", teachers[:1], teacher_cache=cache, max_iters=1)
    out = capsys.readouterr().out
    assert "GB to write into" in out and "64 bytes per token" in out


def test_a_damaged_cache_is_refused(data, teacher, cache, written, refused, tmp_path):
    with open(written, "r+b") as f:
        content = bytearray(f.read())
        content[1000] ^= 1
        f.seek(0)
        f.write(content)
    refused("states_00000.bin is missing or damaged")
    os.remove(written.removesuffix("bin") + "json")  # as the message says
    run_distill(data, tmp_path / "again", [str(teacher)], teacher_cache=cache)


def test_a_cache_of_another_model_of_that_name_is_refused(teachers, teacher, written, refused):
    shutil.rmtree(teacher)
    shutil.copytree(teachers[1], teacher)
    refused("delete that folder or name another --teacher_cache")
    os.remove(os.path.join(os.path.dirname(written), "cache.json"))  # not enough
    refused("states_0000..json is of another teacher or data")


def test_a_cache_that_does_not_fit_is_not_begun(data, teachers, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(SystemExit, match="GB free, the teacher cache wants"):
        run_distill(data, tmp_path / "run", teachers[:1], teacher_cache=cache)
    assert not files(cache)
