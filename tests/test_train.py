"""The loop: what must not change its result, what it leaves on disk, what it refuses."""
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

import lib.runs
import prepare
import train
from helpers import (
    GPT2,
    TINY,
    VOCAB,
    assert_same,
    cut_short,
    edit_json,
    records,
    run_train,
    torchrun,
    train_config,
    weights,
)
from lib.checkpoints import load_checkpoint, load_state
from lib.data import n_chunks
from lib.files import sha256
from lib.shards import Shards
from lib.tokenizers import load_tokenizer
from model import LanguageModel
from train import TrainConfig, start


def test_it_learns_and_writes_what_it_says(data, tmp_path):
    run_train(data, tmp_path / "r", max_iters=30, eval_interval=10, log_interval=5)
    log = records(tmp_path / "r")
    assert [r["step"] for r in log] == [5, 10, 15, 20, 25, 30]
    assert log[-1]["val_ce"] < 0.8 * math.log(500) and log[-1]["tokens"] == 30 * 8 * 32
    model, tokenizer, config = load_checkpoint(str(tmp_path / "r"))
    assert config["val_ce"] == min(r.get("val_ce", 9) for r in log) and config["bos"] == "line"
    # validation loss again, by hand, in float64, one chunk at a time
    shards = Shards(data, "val")
    n = (len(shards) - 1) // 32
    chosen = np.random.default_rng(2023).permutation(n)[:16]
    chunks = torch.from_numpy(shards.windows(chosen * 32, 33))
    model.double()
    ce = [-model(c[None, :-1])[0].log_softmax(-1)[range(32), c[1:]].mean().item() for c in chunks]
    assert config["val_ce"] == pytest.approx(np.mean(ce), abs=1e-5)
    last = json.load(open(tmp_path / "r" / "last.json"))
    assert sorted(os.listdir(tmp_path / "r" / last["folder"])) == [
        "config.json", "model.safetensors", "sha256.json", "state.json", "state.safetensors", "tokenizer.model"]


@pytest.mark.parametrize("change", [dict(micro_batch_size=2), dict(micro_batch_size=1)])
def test_micro_batches_change_nothing(data, tmp_path, change):
    run_train(data, tmp_path / "whole")
    run_train(data, tmp_path / "parts", **change)
    for a, b in zip(records(tmp_path / "whole"), records(tmp_path / "parts")):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", [
    dict(micro_batch_size=4, random_offset=True, **GPT2),
    dict(dtype="bfloat16", epochs=5, batch_size=128, max_iters=9, eval_interval=4),
])
def test_resume_is_the_same_run_bit_for_bit(data, tmp_path, monkeypatch, change):
    change = {"max_iters": 8, **change}
    run_train(data, tmp_path / "whole", **change)
    with monkeypatch.context() as m:
        cut_short(m, 7)
        with pytest.raises(KeyboardInterrupt):
            run_train(data, tmp_path / "cut", **change)
    assert records(tmp_path / "cut")[-1]["step"] == 7  # beyond its last checkpoint
    run_train(data, tmp_path / "cut", resume=True, **change)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    drop = lambda r: {k: v for k, v in r.items() if k != "tokens_per_s"}
    assert list(map(drop, records(tmp_path / "whole"))) == list(map(drop, records(tmp_path / "cut")))
    folders = [os.path.join(tmp_path / r, json.load(open(tmp_path / r / "last.json"))["folder"]) for r in ("whole", "cut")]
    assert_same(*(load_state(f)[0] for f in folders))


def test_two_ranks_equal_one(data, tmp_path):
    """torchrun on CPU: same losses as one process, data order untouched by ranks."""
    run_train(data, tmp_path / "one", dropout=0.0, max_iters=8, eval_interval=4)
    torchrun("train.py", data, tmp_path / "two", max_iters=8, eval_interval=4, micro_batch_size=2)
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two")):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a.get("val_ce") == (pytest.approx(b["val_ce"], abs=1e-4) if "val_ce" in b else None)
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), rtol=1e-3, atol=1e-3)


def test_compiled_equals_plain(data, tmp_path):
    if not train.can_compile(torch.device("cpu"), 0):
        pytest.skip("torch.compile does not work on this machine")
    run_train(data, tmp_path / "plain", n_layer=1)
    run_train(data, tmp_path / "compiled", n_layer=1, compile="on")
    for a, b in zip(records(tmp_path / "plain"), records(tmp_path / "compiled")):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "compiled").keys()


def test_each_epoch_sees_each_chunk_once_in_another_order(data):
    cfg = TrainConfig(**{**TINY, "data_dir": data, "out_dir": "none", "epochs": 2, "max_iters": 0})
    machine, order = start(cfg)
    per_epoch, total = order.starts[1], order.total
    assert total == 2 * per_epoch and per_epoch == ((len(order.shards) - 1) // 32) // 8
    epochs = [[i for s in range(per_epoch) for i in order.batch(e * per_epoch + s, 0).index.tolist()] for e in (0, 1)]
    assert len(set(epochs[0])) == len(epochs[0]) == per_epoch * 8 and epochs[0] != epochs[1]
    batch = order.batch(1, 0)
    stream = order.shards.windows([0], len(order.shards))[0]
    for x, y, i in zip(batch.x, batch.y, batch.index.tolist()):
        assert x.tolist() == stream[i * 32:i * 32 + 32].tolist() and y.tolist() == stream[i * 32 + 1:i * 32 + 33].tolist()


def test_random_offsets_stay_inside_and_change(data):
    cfg = TrainConfig(**{**TINY, "data_dir": data, "out_dir": "none", "random_offset": True})
    machine, order = start(cfg)
    for epoch in (0, 1):
        order.batch(order.starts[epoch], 0)
        assert order.offsets.min() == 0 and order.offsets.max() == 31
        assert (order.chunks * 32 + order.offsets).max() + 33 <= len(order.shards)


def test_eval_chunks_is_an_upper_bound(data, tmp_path, capsys):
    run_train(data, tmp_path / "all", eval_chunks=0)
    run_train(data, tmp_path / "more", eval_chunks=100_000)
    assert "validation chunks of 32 tokens, fewer than eval_chunks=100000: all of them are used" in capsys.readouterr().out
    a, b = ([r["val_ce"] for r in records(tmp_path / name) if "val_ce" in r] for name in ("all", "more"))
    assert a == b


def test_decay_reaches_matrices_only():
    cfg = train_config("none", "none", **GPT2, weight_decay=0.5, vocab_size=VOCAB)
    model = LanguageModel(train.model_config(cfg))
    (optimizer,) = train.make_optimizers(train.Trainee(model), cfg)
    decayed, others = optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].endswith(("bias", "norm.weight", "layernorm.weight")) for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    assert not any("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in decayed["params"])


def test_schedule():
    cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9)
    lrs = [train.learning_rate(cfg, s, 109) for s in range(109)]
    assert lrs[0] == pytest.approx(0.1) and max(lrs) == lrs[9] == 1.0
    assert lrs[59] == pytest.approx(0.55) and lrs[-1] == pytest.approx(0.1, abs=1e-3)


def test_a_diverging_run_stops_before_a_checkpoint(data, tmp_path):
    with pytest.raises(SystemExit, match=r"the loss on rank 0 was not finite at step 2; the last good checkpoint is none yet"):
        run_train(data, tmp_path / "r", learning_rate=1e30, grad_clip=0.0)
    assert not os.path.exists(tmp_path / "r" / "last.json")


def test_the_best_and_the_last_two_are_kept(data, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 4.0, 2.5])
    monkeypatch.setattr(lib.runs, "evaluate", lambda *a: next(losses))
    run_train(data, tmp_path / "r", max_iters=8, eval_interval=2)
    last, best = (json.load(open(tmp_path / "r" / f"{p}.json")) for p in ("last", "best"))
    assert (best["step"], best["val_ce"], last["step"]) == (4, 2.0, 8)
    assert sorted(f for f in os.listdir(tmp_path / "r") if f.startswith("ckpt_")) == ["ckpt_4", "ckpt_6", "ckpt_8"]
    assert "state.safetensors" not in os.listdir(tmp_path / "r" / "ckpt_4")
    assert load_checkpoint(str(tmp_path / "r"))[2]["step"] == 4  # a run folder means its best


# --- bad input ------------------------------------------------------------------------------------

@pytest.mark.parametrize("change,message", [
    (dict(data_dir="nowhere"), "no data folder nowhere"),
    (dict(vocab_size=501), "vocab_size=501 must be 0 or that of .*, 500"),
    (dict(seq_len=65), "seq_len=65 must be at most the model's block_size=64"),
    (dict(batch_size=0), "batch_size=0 must be at least 1"),
    (dict(batch_size=8, micro_batch_size=3), "batch_size=8 must be a multiple of micro_batch_size"),
    (dict(batch_size=8000), "training chunks of 32 tokens, fewer than batch_size=8000"),
    (dict(n_head=3), "n_embd=32 must be a multiple of n_head=3"),
    (dict(n_head=32), "n_embd=32 must be an even multiple of n_head=32"),
    (dict(n_kv_head=4), "n_head=2 must be a multiple of n_kv_head=4"),
    (dict(n_layer=0), "n_layer=0 must be at least 1"),
    (dict(dropout=1.0), "dropout=1.0 must be below 1"),
    (dict(resume=True, overwrite=True), "must be without --resume"),
    (dict(epochs=0), "epochs=0 must be at least 1"),
    (dict(beta2=1.0), "beta2=1.0 must be below 1"),
    (dict(adam_eps=0.0), "adam_eps=0.0 must be above 0"),
    (dict(rope_theta=0.0), "rope_theta=0.0 must be above 0"),
    (dict(wandb=True), "pip install wandb"),
])
def test_bad_settings_are_one_line(data, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message) as e:
        run_train(**{"data": data, "out": tmp_path / "r", **{"data" if k == "data_dir" else k: v for k, v in change.items()}})
    assert "\n" not in str(e.value) and not os.path.exists(tmp_path / "r")


def copied(data, tmp_path):
    shutil.copytree(data, tmp_path / "d")
    return tmp_path / "d"


@pytest.mark.parametrize("damage,message", [
    (lambda d: os.remove(d / "meta.json"), "is unfinished"),
    (lambda d: open(d / "meta.json", "w").write('{"format'), "cannot read .*meta.json"),
    (lambda d: open(d / "meta.json", "w").write('{"format_version": 1}'), "meta.json is damaged: no 'vocab_size'"),
    (lambda d: edit_json(d / "meta.json", format_version=99), "has format 99"),
    (lambda d: os.remove(d / "val_00000.bin"), "val_00000.bin is missing"),
    (lambda d: os.truncate(d / "train_00000.bin", 1000), "train_00000.bin has 1000 bytes"),
    (lambda d: open(d / "train_00000.bin", "r+b").write(b"\1\0\2\0\1"), "not the shard meta.json describes"),
    (lambda d: open(d / "meta.json", "w").write("[]"), "not a JSON object"),
    (lambda d: os.remove(d / "tokenizer.model"), "tokenizer.model is missing or not the tokenizer"),
    (lambda d: open(d / "tokenizer.model", "w").write("junk"), "tokenizer.model is missing or not the tokenizer"),
])
def test_damaged_data_is_one_line(data, tmp_path, damage, message):
    d = copied(data, tmp_path)
    damage(d)
    with pytest.raises(SystemExit, match=message):
        run_train(str(d), tmp_path / "r")
    assert not os.path.exists(tmp_path / "r")


def test_a_run_is_not_overwritten_unless_asked(data, tmp_path):
    run_train(data, tmp_path / "r")
    before = weights(tmp_path / "r")
    with pytest.raises(SystemExit, match="already holds a run; use --resume .* or --overwrite"):
        run_train(data, tmp_path / "r", seed=9)
    with pytest.raises(SystemExit, match="is another model"):
        run_train(data, tmp_path / "r", resume=True, n_layer=1)
    assert_same(before, weights(tmp_path / "r"))
    run_train(data, tmp_path / "r", overwrite=True, seed=9)
    assert not torch.equal(before["lm_head.weight"], weights(tmp_path / "r")["lm_head.weight"])


def test_resume_on_other_data_is_refused(corpus, data, tmp_path):
    prepare.main(prepare.PrepareConfig(input_dir=f"{corpus}/text", data_dir=str(tmp_path / "d"), vocab_size=500, bos="none"))
    prepare.main(prepare.PrepareConfig(input_dir=f"{corpus}/text", data_dir=str(tmp_path / "same"), vocab_size=500, bos="line"))
    run_train(data, tmp_path / "r")
    with pytest.raises(SystemExit, match="was trained on other data"):
        run_train(str(tmp_path / "d"), tmp_path / "r", resume=True)
    run_train(str(tmp_path / "same"), tmp_path / "r", resume=True)  # the same text prepared again is the same data


@pytest.mark.parametrize("file,damage,message", [
    ("model.safetensors", lambda p: os.truncate(p, 5000), "model.safetensors is damaged"),
    ("model.safetensors", os.remove, "model.safetensors is missing"),
    ("model.safetensors", lambda p: flip(p, 4000), "model.safetensors is damaged"),
    ("config.json", lambda p: flip(p, 40), "config.json"),
    ("tokenizer.model", lambda p: flip(p, 900), "tokenizer.model is damaged"),
    ("state.safetensors", lambda p: flip(p, 4000), "state.safetensors is damaged"),
    ("sha256.json", os.remove, "is unfinished"),
    ("config.json", lambda p: rewrite(p, {**json.load(open(p)), "format_version": 9}), "has checkpoint format 9"),
    ("config.json", lambda p: rewrite(p, {"format_version": 1}), "config.json is damaged: no 'model'"),
    ("config.json", lambda p: rewrite(p, []), "config.json is damaged: not a JSON object"),
])
def test_damaged_checkpoint_is_named(data, tmp_path, file, damage, message):
    run_train(data, tmp_path / "r", max_iters=3)
    damage(tmp_path / "r" / "ckpt_3" / file)
    with pytest.raises(SystemExit, match=message):
        run_train(data, tmp_path / "r", max_iters=6, resume=True)


def rewrite(path, value):
    """Another content with a right checksum."""
    json.dump(value, open(path, "w"))
    sums = os.path.join(os.path.dirname(path), "sha256.json")
    json.dump({**json.load(open(sums)), os.path.basename(path): sha256(path)}, open(sums, "w"))


def flip(path, position):
    with open(path, "r+b") as f:
        f.seek(position)
        byte = f.read(1)[0]
        f.seek(position)
        f.write(bytes([byte ^ 4]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_learns_like_cpu(data, tmp_path):
    run_train(data, tmp_path / "cpu")
    run_train(data, tmp_path / "cuda", device="cuda")
    run_train(data, tmp_path / "fast", device="cuda", dtype="bfloat16", compile="on")
    for a, b, c in zip(*(records(tmp_path / r) for r in ("cpu", "cuda", "fast"))):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3) == pytest.approx(c["loss"], abs=0.05)


def test_checkpoints_by_words_seen(data, tmp_path):
    """chck_<n>M is the model of the first step that has seen so many words; a resumed run writes the same ones."""
    shutil.copytree(data, tmp_path / "data")
    meta = json.load(open(tmp_path / "data/meta.json"))
    n_tokens = sum(s["tokens"] for s in meta["shards"] if s["split"] == "train")
    meta["words"]["train"] = {"all": n_tokens * 3e6 / (8 * 32)}  # so that each step of 8 x 32 tokens sees 3M words
    json.dump(meta, open(tmp_path / "data/meta.json", "w"))
    run_train(str(tmp_path / "data"), tmp_path / "run", keep_words=True, max_iters=8, log_interval=100)
    kept = sorted(name for name in os.listdir(tmp_path / "run") if name.startswith("chck_"))
    assert kept == ["chck_10M", "chck_20M", "chck_3M", "chck_6M", "chck_9M"]  # 3, 6, 9, 12, 15, 18, 21, 24
    for name, step in (("chck_3M", 1), ("chck_9M", 3), ("chck_10M", 4), ("chck_20M", 7)):
        model, _, described = load_checkpoint(str(tmp_path / "run" / name))
        assert described["step"] == step
    run_train(str(tmp_path / "data"), tmp_path / "short", max_iters=4, warmup_iters=100)
    run_train(str(tmp_path / "data"), tmp_path / "cut", keep_words=True, max_iters=8, warmup_iters=100)
    run_train(str(tmp_path / "data"), tmp_path / "cut", keep_words=True, max_iters=8, warmup_iters=100, resume=True)  # nothing to do
    shutil.rmtree(tmp_path / "cut/ckpt_8")
    run_train(str(tmp_path / "data"), tmp_path / "cut", max_iters=7, warmup_iters=100, resume=True)  # from ckpt_6
    assert not os.path.exists(tmp_path / "cut/chck_20M") and os.path.exists(tmp_path / "cut/chck_10M")  # of a step that was taken back
    a, b = (load_checkpoint(str(tmp_path / name))[0].state_dict() for name in ("short/ckpt_4", "cut/chck_10M"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not os.path.exists(tmp_path / "cut/chck_10M/state.json")


def test_a_curriculum_adds_buckets(tmp_path):
    """Epochs 0 and 1 see the first bucket's text alone, each chunk once; then both buckets'."""
    os.makedirs(tmp_path / "text/train_10M"), os.makedirs(tmp_path / "text/dev")
    for source, word, n in (("cbt", "hard", 900), ("childes", "easy", 500), ("qed", "middle", 300)):
        (tmp_path / f"text/train_10M/{source}.train").write_text(f"{word} words of the corpus and more .\n" * n)
    (tmp_path / "text/dev/cbt.dev").write_text("hard words of the corpus and more .\n" * 400)
    data = str(tmp_path / "data")
    prepare.main(prepare.PrepareConfig(input_dir=str(tmp_path / "text"), data_dir=data, vocab_size=330))
    settings = {**TINY, "vocab_size": 330, "data_dir": data, "out_dir": str(tmp_path / "run"), "epochs": 6, "max_iters": 0, "eval_interval": 0,
                "curriculum": ("childes", "qed cbt"), "curriculum_epochs": 2}
    _, order = start(TrainConfig(**settings))
    tokenizer = load_tokenizer(f"{data}/tokenizer.model")
    for epoch in range(6):
        seen = [i for step in range(order.starts[epoch], order.starts[epoch + 1]) for i in order.batch(step, 0).index.tolist()]
        assert len(set(seen)) == len(seen)
        words = {word for i in seen for word in tokenizer.decode(order.shards.windows([i * 32 + 16], 8)[0]).split()}
        easy, all_of_it = (order.shards.meta["words"]["train"][s] / sum(order.shards.meta["words"]["train"].values()) for s in ("childes", "cbt"))
        assert ("hard" in words, "middle" in words, "easy" in words) == ((False, False, True) if epoch < 2 else (True, True, True))
        assert len(seen) == pytest.approx(n_chunks(TrainConfig(**settings), order.shards) * (easy if epoch < 2 else 1), rel=0.1)
    train.main(TrainConfig(**settings))
    ends = [r["epoch"] for r in records(tmp_path / "run") if "val_ce" in r]
    assert ends == [1, 2, 3, 4, 5, 6] and [r["step"] for r in records(tmp_path / "run") if "val_ce" in r] == order.starts[1:]
    for wrong in (("childes",), ("childes", "qed cbt", "x")):
        with pytest.raises(SystemExit, match="must name each source"):
            start(TrainConfig(**{**settings, "curriculum": wrong, "out_dir": "none"}))


def test_training_starts_from_other_weights(data, tmp_path):
    run_train(data, tmp_path / "first", max_iters=3)
    run_train(data, tmp_path / "second", max_iters=1, eval_interval=1, init_from=str(tmp_path / "first"), learning_rate=0.0)
    assert_same(weights(tmp_path / "second"), weights(tmp_path / "first"))
    with pytest.raises(SystemExit, match="init_from: .* is another model .n_embd: 32 -> 48"):
        run_train(data, tmp_path / "third", n_embd=48, init_from=str(tmp_path / "first"))


def test_tensorboard_has_the_metrics(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run_train(data, tmp_path / "run", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars("val_ce")] == \
        [(r["step"], r["val_ce"]) for r in records(tmp_path / "run") if "val_ce" in r]
    run_train(data, tmp_path / "run", overwrite=True, max_iters=3)  # its files are the run's: deleted with it
    assert not any("tfevents" in name for name in os.listdir(tmp_path / "run"))
