"""The loop: what must not change its result, what it leaves on disk, what it refuses."""
import math
import os
import shutil
from dataclasses import replace
from functools import partial

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
    assert_resumes,
    assert_same,
    assert_same_log,
    edit_json,
    records,
    reseal,
    run_ranks,
    run_train,
    train_config,
    validation_tokens,
    validations,
    weights,
)
from lib.checkpoints import find_checkpoint, load_checkpoint
from lib.data import n_chunks
from lib.files import read_json, sha256, write_json
from lib.lineage import lineage
from lib.tokenizers import load_tokenizer
from model import LanguageModel
from train import TrainConfig, start

T = TINY["seq_len"]


# --- what is learned and kept ---------------------------------------------------------------------

def test_it_learns_and_writes_what_it_says(data, tmp_path):
    run_train(data, tmp_path / "run", max_iters=30, eval_interval=10, log_interval=5)
    log = records(tmp_path / "run")
    assert [record["step"] for record in log] == [5, 10, 15, 20, 25, 30]
    assert log[-1]["val_ce"] < 0.8 * math.log(VOCAB)
    assert log[-1]["tokens"] == 30 * TINY["batch_size"] * T
    model, _, described = load_checkpoint(str(tmp_path / "run"))
    assert described["val_ce"] == min(record["val_ce"] for record in validations(tmp_path / "run"))
    assert described["bos"] == "line"
    # validation loss again, by hand, in float64, one chunk at a time
    model.double()
    losses = []
    for chunk in torch.from_numpy(validation_tokens(data)):
        log_p = model(chunk[None, :-1])[0].log_softmax(-1)
        losses.append(-log_p[range(T), chunk[1:]].mean().item())
    assert described["val_ce"] == pytest.approx(np.mean(losses), abs=1e-5)
    last = read_json(tmp_path / "run" / "last.json")
    assert sorted(os.listdir(tmp_path / "run" / last["folder"])) == [
        "config.json", "model.safetensors", "sha256.json", "state.json", "state.safetensors",
        "tokenizer.model"]


def test_the_best_and_the_last_two_are_kept(data, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 4.0, 2.5])
    monkeypatch.setattr(lib.runs, "evaluate", lambda *_: next(losses))
    run_train(data, tmp_path / "run", max_iters=8, eval_interval=2)
    last, best = (read_json(tmp_path / "run" / pointer) for pointer in ("last.json", "best.json"))
    assert (best["step"], best["val_ce"], last["step"]) == (4, 2.0, 8)
    kept = sorted(name for name in os.listdir(tmp_path / "run") if name.startswith("ckpt_"))
    assert kept == ["ckpt_4", "ckpt_6", "ckpt_8"]
    assert "state.safetensors" not in os.listdir(tmp_path / "run" / "ckpt_4")
    assert load_checkpoint(str(tmp_path / "run"))[2]["step"] == 4  # a run folder means its best


def test_ten_epochs_of_the_challenges_text_come_to_its_last_mark(data, tmp_path):
    """Though each epoch drops its incomplete batch."""
    cfg = train_config(data, tmp_path, epochs=10, max_iters=0, batch_size=6)
    chunks = train.start(cfg)[1]
    chunks.meta["words"] = {"train": {"all": 10_000_000}}
    assert chunks.total * 6 * cfg.seq_len < 10 * len(chunks.shards)
    marks = [lib.runs.word_mark(cfg, chunks, step) for step in range(1, chunks.total + 1)]
    official = [f"chck_{mark}M" for mark in (*range(1, 10), *range(10, 101, 10))]
    assert [mark for mark in marks if mark] == official and marks[-1] == "chck_100M"


def test_checkpoints_by_words_seen(data, tmp_path):
    """chck_<n>M is the model of the first step that has seen so many words; a resumed run writes the same
    ones."""
    shutil.copytree(data, tmp_path / "data")
    meta = read_json(tmp_path / "data" / "meta.json")
    n_tokens = sum(shard["tokens"] for shard in meta["shards"] if shard["split"] == "train")
    words = math.ceil(n_tokens * 3e6 / (8 * 32))  # each step of 8 x 32 tokens sees 3M words
    meta["words"]["train"] = {"all": words}
    write_json(str(tmp_path / "data" / "meta.json"), meta)
    run_on = partial(run_train, str(tmp_path / "data"))

    run_on(tmp_path / "run", keep_words=True, max_iters=8, log_interval=100)
    kept = sorted(name for name in os.listdir(tmp_path / "run") if name.startswith("chck_"))
    assert kept == ["chck_10M", "chck_20M", "chck_3M", "chck_6M", "chck_9M"]  # 3, 6, 9, 12, 15, 18, 21, 24
    for name, step in (("chck_3M", 1), ("chck_9M", 3), ("chck_10M", 4), ("chck_20M", 7)):
        assert load_checkpoint(str(tmp_path / "run" / name))[2]["step"] == step

    cut = tmp_path / "cut"
    run_on(tmp_path / "short", max_iters=4, warmup_iters=100)
    run_on(cut, keep_words=True, max_iters=8, warmup_iters=100)
    run_on(cut, keep_words=True, max_iters=8, warmup_iters=100, resume=True)  # nothing to do
    shutil.rmtree(cut / "ckpt_8")
    run_on(cut, max_iters=7, warmup_iters=100, resume=True)  # from ckpt_6
    assert not os.path.exists(cut / "chck_20M")  # of a step that was taken back
    assert not os.path.exists(cut / "chck_10M" / "state.json")
    assert_same(weights(tmp_path / "short" / "ckpt_4"), weights(cut / "chck_10M"))


def test_training_starts_from_other_weights(data, tmp_path):
    first = str(tmp_path / "first")
    run_train(data, first, max_iters=3)
    run_train(data, tmp_path / "second", max_iters=1, eval_interval=1, init_from=first, learning_rate=0.0)
    assert_same(weights(tmp_path / "second"), weights(first))
    with pytest.raises(SystemExit, match="init_from: .* is another model .n_embd: 32 -> 48"):
        run_train(data, tmp_path / "third", n_embd=48, init_from=first)
    run_train(data, tmp_path / "second", max_iters=2, init_from=first, resume=True)
    members = lineage(str(tmp_path / "second"))
    assert [(m.path, m.reason) for m in members] == [(str(tmp_path / "second"), ""), (first, "")]
    run_train(data, first, max_iters=1, overwrite=True)  # another model under the same name, since then
    assert lineage(str(tmp_path / "second"))[1].reason == f"{first} has other weights now"


def test_a_data_folder_may_be_prepared_anew_meanwhile(data, tmp_path, monkeypatch):
    """Checkpoints have the tokenizer that training began with; one that has another is not opened."""
    shutil.copytree(data, tmp_path / "d")
    real_save = lib.runs.save_checkpoint

    def save(*args, **options):
        (tmp_path / "d/tokenizer.model").unlink(missing_ok=True)
        real_save(*args, **options)
    monkeypatch.setattr(lib.runs, "save_checkpoint", save)
    run_train(str(tmp_path / "d"), tmp_path / "run")
    _, tokenizer, described = load_checkpoint(str(tmp_path / "run"))
    assert sha256(tokenizer.file) == described["tokenizer_sha256"] == sha256(f"{data}/tokenizer.model")
    folder = find_checkpoint(str(tmp_path / "run"))
    edit_json(f"{folder}/config.json", tokenizer_sha256="0" * 64)
    reseal(folder, "config.json")
    with pytest.raises(SystemExit, match="has another tokenizer than its model was trained with"):
        load_checkpoint(folder)


def test_resuming_in_other_arithmetic_is_pointed_out(data, tmp_path, capsys):
    run_train(data, tmp_path / "run", max_iters=3)
    folder = find_checkpoint(str(tmp_path / "run"))
    assert read_json(f"{folder}/config.json")["dtype"] == "float32"
    capsys.readouterr()
    run_train(data, tmp_path / "run", dtype="bfloat16", resume=True)
    assert "notice: resuming in other arithmetic: dtype: float32 -> bfloat16\n" in capsys.readouterr().out


@pytest.mark.slow
def test_tensorboard_has_the_metrics(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run_train(data, tmp_path / "run", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    found = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars("val_ce")]
    assert found == [(record["step"], record["val_ce"]) for record in validations(tmp_path / "run")]
    run_train(data, tmp_path / "run", overwrite=True, max_iters=3)  # its files are the run's: deleted with it
    assert not any("tfevents" in name for name in os.listdir(tmp_path / "run"))


# --- what must not change the result --------------------------------------------------------------

@pytest.mark.parametrize("size", [2, 1])
def test_micro_batches_change_nothing(data, tmp_path, size):
    run_train(data, tmp_path / "whole")
    run_train(data, tmp_path / "parts", micro_batch_size=size)
    assert_same_log(tmp_path / "whole", tmp_path / "parts", ["loss"], abs=1e-5)
    assert_same_log(tmp_path / "whole", tmp_path / "parts", ["grad_norm"], rel=1e-4)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", [
    dict(micro_batch_size=4, random_offset=True, **GPT2),
    dict(optimizer="muon", weight_decay=0.5),
    pytest.param(dict(dtype="bfloat16", epochs=5, batch_size=128, max_iters=9, eval_interval=4),
                 marks=pytest.mark.slow),
])
def test_resume_is_the_same_run_bit_for_bit(data, tmp_path, monkeypatch, change):
    """Killed at step 7, beyond its last checkpoint."""
    assert_resumes(partial(run_train, data, **{"max_iters": 8, **change}), tmp_path, monkeypatch, 7)


def test_two_ranks_equal_one(data, tmp_path):
    """On CPU: same losses as one process, data order untouched by ranks."""
    one, two = tmp_path / "one", tmp_path / "two"
    run_train(data, one, dropout=0.0, max_iters=8, eval_interval=4)
    run_ranks(lambda: run_train(data, two, max_iters=8, eval_interval=4, micro_batch_size=2))
    assert_same_log(one, two, ["loss", "val_ce"], abs=1e-4)
    assert_same(weights(one), weights(two), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_equals_plain(data, tmp_path):
    run_train(data, tmp_path / "plain", n_layer=1)
    run_train(data, tmp_path / "compiled", n_layer=1, compile="on")
    assert_same_log(tmp_path / "plain", tmp_path / "compiled", ["loss"], abs=1e-4)
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "compiled").keys()


# --- what a step sees, and how far it goes --------------------------------------------------------

def chunks_of_epoch(chunks, epoch):
    """The numbers of the chunks that an epoch sees, in order."""
    steps = range(chunks.starts[epoch], chunks.starts[epoch + 1])
    return [number for step in steps for number in chunks.batch(step, 0).index.tolist()]


def test_each_epoch_sees_each_chunk_once_in_another_order(data):
    _, chunks = start(train_config(data, "none", epochs=2, max_iters=0))
    per_epoch = chunks.starts[1]
    assert chunks.total == 2 * per_epoch
    assert per_epoch == ((len(chunks.shards) - 1) // T) // 8
    first, second = (chunks_of_epoch(chunks, epoch) for epoch in (0, 1))
    assert len(set(first)) == len(first) == per_epoch * 8
    assert first != second
    batch = chunks.batch(1, 0)
    stream = chunks.shards.windows([0], len(chunks.shards))[0]
    for x, y, number in zip(batch.x, batch.y, batch.index.tolist()):
        begin = number * T
        assert x.tolist() == stream[begin:begin + T].tolist()
        assert y.tolist() == stream[begin + 1:begin + T + 1].tolist()


def test_random_offsets_stay_inside_and_change(data):
    _, chunks = start(train_config(data, "none", random_offset=True))
    for epoch in (0, 1):
        chunks.batch(chunks.starts[epoch], 0)
        assert chunks.offsets.min() == 0 and chunks.offsets.max() == T - 1
        assert (chunks.chunks * T + chunks.offsets).max() + T + 1 <= len(chunks.shards)


def test_eval_chunks_is_an_upper_bound(data, tmp_path, capsys):
    run_train(data, tmp_path / "all", eval_chunks=0, max_iters=1)
    run_train(data, tmp_path / "too_many", eval_chunks=100_000, max_iters=1)
    notice = "validation chunks of 32 tokens, fewer than eval_chunks=100000: all of them are used"
    assert notice in capsys.readouterr().out
    assert_same_log(tmp_path / "all", tmp_path / "too_many", ["val_ce"], abs=0)


@pytest.fixture
def three_sources(tmp_path):
    """A data folder of three sources, each with a word that no other has."""
    train_text, val_text = tmp_path / "text" / "train_10M", tmp_path / "text" / "dev"
    train_text.mkdir(parents=True)
    val_text.mkdir()
    for source, word, lines in (("cbt", "hard", 450), ("childes", "easy", 250), ("qed", "middle", 150)):
        text = f"{word} words of the corpus and more .\n" * lines
        (train_text / f"{source}.train").write_text(text)
    (val_text / "cbt.dev").write_text("hard words of the corpus and more .\n" * 200)
    folder = str(tmp_path / "data")
    prepare.main(prepare.PrepareConfig(input_dir=str(tmp_path / "text"), data_dir=folder, vocab_size=330))
    return folder


def test_a_curriculum_adds_buckets(three_sources, tmp_path):
    """Epochs 0 and 1 see the first bucket's text alone, each chunk once; then both buckets'."""
    cfg_of = partial(train_config, three_sources, curriculum_epochs=2, epochs=6, max_iters=0, eval_interval=0)
    cfg = cfg_of(tmp_path / "run", curriculum=("childes", "qed cbt"))
    _, chunks = start(cfg)
    tokenizer = load_tokenizer(f"{three_sources}/tokenizer.model")
    counted = chunks.shards.meta["words"]["train"]
    share_of_easy = counted["childes"] / sum(counted.values())
    for epoch in range(6):
        seen = chunks_of_epoch(chunks, epoch)
        assert len(set(seen)) == len(seen)
        begins = [number * T + T // 2 for number in seen]  # in the middle of each chunk
        words = {word for tokens in chunks.shards.windows(np.array(begins), 8)
                 for word in tokenizer.decode(tokens).split()}
        easy_alone = epoch < 2
        assert "easy" in words
        assert ("hard" in words) == ("middle" in words) == (not easy_alone)
        expected = n_chunks(cfg, chunks.shards) * (share_of_easy if easy_alone else 1)
        assert len(seen) == pytest.approx(expected, rel=0.1)
    train.main(cfg)
    ends = [(record["epoch"], record["step"]) for record in validations(tmp_path / "run")]
    assert ends == list(zip([1, 2, 3, 4, 5, 6], chunks.starts[1:], strict=True))


@pytest.mark.parametrize("wrong", [("childes",), ("childes", "qed cbt", "x")])
def test_a_curriculum_names_each_source(three_sources, wrong):
    with pytest.raises(SystemExit, match="must name each source"):
        start(train_config(three_sources, "none", curriculum=wrong))


def test_decay_reaches_matrices_only():
    cfg = train_config("none", "none", **GPT2, weight_decay=0.5, vocab_size=VOCAB)
    model = LanguageModel(train.model_config(cfg))
    (optimizer,) = train.make_optimizers(train.Trainee(model), cfg)
    decayed, others = optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ([names[id(p)] for p in group["params"]] for group in (decayed, others))
    assert len(decayed) + len(others) == len(names)
    assert all(name.endswith(("bias", "norm.weight", "layernorm.weight")) for name in others)
    assert not any("norm" in name or name.endswith("bias") for name in decayed)


def test_muon_has_the_matrices_of_the_layers():
    cfg = train_config("none", "none", optimizer="muon", weight_decay=0.5, vocab_size=VOCAB)
    model = LanguageModel(train.model_config(cfg))
    adamw, muon = train.make_optimizers(train.Trainee(model), cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    of_muon, of_adamw = ([names[id(p)] for group in optimizer.param_groups for p in group["params"]]
                         for optimizer in (muon, adamw))
    assert sorted(of_muon + of_adamw) == sorted(names.values())
    assert set(of_muon) == {name for name in names.values() if ".layers." in name and "_proj" in name}
    assert muon.param_groups[0]["weight_decay"] == 0.5
    # as large as AdamW's: its first step has an rms near the rate, and Muon's 0.2 of it, AdamW's later on
    w = model.model.layers[0].mlp.up_proj.weight
    before, w.grad = w.detach().clone(), torch.randn_like(w)
    muon.param_groups[0]["weight_decay"] = 0.0
    muon.step()
    assert (w - before).pow(2).mean().sqrt().item() == pytest.approx(0.2 * cfg.learning_rate, rel=0.15)


def test_schedule():
    cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9)
    rates = [train.learning_rate(cfg, step, 109) for step in range(109)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0
    assert rates[59] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-3)


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
    (dict(optimizer="muon", ascent=True), "ascent=True must be False with sam_rho, n_experts or muon"),
    (dict(wandb=True), "pip install wandb"),
])
def test_bad_settings_are_one_line(data, tmp_path, change, message):
    cfg = replace(train_config(data, tmp_path / "run"), **change)
    with pytest.raises(SystemExit, match=message) as e:
        train.main(cfg)
    assert "\n" not in str(e.value) and not os.path.exists(tmp_path / "run")


@pytest.mark.parametrize("damage,message", [
    (lambda folder: os.remove(folder / "meta.json"), "is unfinished"),
    (lambda folder: (folder / "meta.json").write_text('{"format'), "cannot read .*meta.json"),
    (lambda folder: (folder / "meta.json").write_text('{"format_version": 1}'),
     "meta.json is damaged: 'vocab_size' is not what prepare.py writes"),
    (lambda folder: edit_json(folder / "meta.json", format_version=99), "has format 99"),
    (lambda folder: (folder / "meta.json").write_text("[]"), "not a JSON object"),
    (lambda folder: os.remove(folder / "val_00000.bin"), "val_00000.bin is missing"),
    (lambda folder: os.truncate(folder / "train_00000.bin", 1000), "train_00000.bin has 1000 bytes"),
    (lambda folder: flip(folder / "train_00000.bin", 2), "not the shard meta.json describes"),
    (lambda folder: os.remove(folder / "tokenizer.model"), "tokenizer.model is missing or not the tokenizer"),
    (lambda folder: (folder / "tokenizer.model").write_text("junk"),
     "tokenizer.model is missing or not the tokenizer"),
])
def test_damaged_data_is_one_line(data, tmp_path, damage, message):
    damaged = shutil.copytree(data, tmp_path / "damaged")
    damage(damaged)
    with pytest.raises(SystemExit, match=message):
        run_train(str(damaged), tmp_path / "run")
    assert not os.path.exists(tmp_path / "run")


def flip(path, position):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("file,damage,message", [
    ("model.safetensors", lambda path: os.truncate(path, 5000), "model.safetensors is damaged"),
    ("model.safetensors", os.remove, "model.safetensors is missing"),
    ("model.safetensors", lambda path: flip(path, 4000), "model.safetensors is damaged"),
    ("config.json", lambda path: flip(path, 40), "config.json"),
    ("tokenizer.model", lambda path: flip(path, 900), "tokenizer.model is damaged"),
    ("state.safetensors", lambda path: flip(path, 4000), "state.safetensors is damaged"),
    ("sha256.json", os.remove, "is unfinished"),
    ("config.json", lambda path: rewrite(path, {**read_json(path), "format_version": 9}),
     "has checkpoint format 9"),
    ("config.json", lambda path: rewrite(path, {"format_version": 1}), "config.json is damaged: no 'model'"),
    ("config.json", lambda path: rewrite(path, []), "config.json is damaged: not a JSON object"),
])
def test_damaged_checkpoint_is_named(data, tmp_path, file, damage, message):
    run_train(data, tmp_path / "run", max_iters=3)
    damage(tmp_path / "run" / "ckpt_3" / file)
    with pytest.raises(SystemExit, match=message):
        run_train(data, tmp_path / "run", max_iters=6, resume=True)


def rewrite(path, value):
    """Another content with a right checksum."""
    write_json(str(path), value)
    reseal(path.parent, path.name)


def test_a_run_is_not_overwritten_unless_asked(data, tmp_path):
    run_train(data, tmp_path / "run")
    before = weights(tmp_path / "run")
    with pytest.raises(SystemExit, match="already holds a run; use --resume .* or --overwrite"):
        run_train(data, tmp_path / "run", seed=9)
    with pytest.raises(SystemExit, match="is another model"):
        run_train(data, tmp_path / "run", resume=True, n_layer=1)
    assert_same(before, weights(tmp_path / "run"))
    run_train(data, tmp_path / "run", overwrite=True, seed=9)
    assert not torch.equal(before["lm_head.weight"], weights(tmp_path / "run")["lm_head.weight"])


def test_resume_on_other_data_is_refused(corpus, data, tmp_path):
    def prepared(bos):
        folder = str(tmp_path / bos)
        prepare.main(prepare.PrepareConfig(input_dir=f"{corpus}/text", data_dir=folder, vocab_size=VOCAB,
                                           bos=bos))
        return folder
    run_train(data, tmp_path / "run")
    with pytest.raises(SystemExit, match="was trained on other data"):
        run_train(prepared("none"), tmp_path / "run", resume=True)
    run_train(prepared("line"), tmp_path / "run", resume=True)  # prepared again: the same data


def test_a_diverging_run_stops_before_a_checkpoint(data, tmp_path):
    message = "the loss on rank 0 was not finite at step 2; the last good checkpoint is none yet"
    with pytest.raises(SystemExit, match=message):
        run_train(data, tmp_path / "run", learning_rate=1e30, grad_clip=0.0)
    assert not os.path.exists(tmp_path / "run" / "last.json")
