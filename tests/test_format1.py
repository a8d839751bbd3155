"""Folders made by the first version of this code (format_version 1) open and go on as before."""
import os
import tarfile

import pytest

import distill
from distill import DistillConfig
from helpers import ROOT, read_jsonl, records
from lib.checkpoints import load_checkpoint
from lib.shards import Shards

# how tests/fixtures/format1.tar.xz was trained: a student with projections beside it, cut short after step 4
# of 8
STUDENT = dict(
    n_layer=1, n_head=2, n_embd=16, intermediate_size=16, block_size=32, seq_len=16, batch_size=8, epochs=4,
    max_iters=8, log_interval=1, eval_interval=2, eval_chunks=0, learning_rate=1e-2, warmup_iters=2,
    device="cpu", dtype="float32", compile="off", teachers=("gpt2", "llama"), teacher_cache="cache",
    temperature=1.5, alpha=0.3, contrastive=0.3, n_pairs=4, data_dir="data", out_dir="student")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """data/, gpt2/, llama/, cache/ and student/ in the current folder."""
    with tarfile.open(os.path.join(ROOT, "tests", "fixtures", "format1.tar.xz")) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)


def test_data_and_checkpoints_open():
    model, tokenizer, described = load_checkpoint("gpt2")
    assert described["step"] == 6
    assert model.cfg.vocab_size == tokenizer.vocab_size == 400
    assert len(Shards("data", "train")) == 5915


def test_a_run_goes_on_with_its_cache():
    """The losses of steps 5 to 8 are those of the old code (but for the order of one sum)."""
    before = times("cache")
    distill.main(DistillConfig(**STUDENT, resume=True))
    for ours, theirs in zip(records("student"), read_jsonl("expected.jsonl"), strict=True):
        for key in theirs.keys() - {"tokens_per_s"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key
    after = times("cache")
    assert {path: after[path] for path in before} == before  # nothing was computed again


def times(folder):
    """When each file in and below a folder was written."""
    paths = (os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)
    return {path: os.path.getmtime(path) for path in paths}
