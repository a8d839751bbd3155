"""What a batch system, a mistyped command or a foreign file does to runs: one line, and nothing lost."""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import train
from helpers import (
    ROOT,
    TINY,
    assert_same,
    distill_config,
    edit_json,
    flags_of,
    records,
    reseal,
    run_ranks,
    run_train,
    start_torchrun,
    thorough,
    train_config,
    weights,
)
from lib.checkpoints import find_checkpoint, load_checkpoint, load_state
from lib.configurator import configure
from lib.runs import Keeper


@pytest.fixture
def checkpoint(teachers, tmp_path):
    """A checkpoint folder of a GPT-2 to be damaged."""
    return shutil.copytree(find_checkpoint(teachers[0]), tmp_path / "ckpt_6")


# --- parts that do not belong together ------------------------------------------------------------

@pytest.mark.parametrize("change,message", [
    (lambda w: w.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
    (lambda w: w.update(extra=torch.zeros(3)), r"tensor extra is \(\(3,\), 'F32'\), .* it is not there"),
    (lambda w: w.update({"model.norm.weight": torch.ones(33)}), r"model.norm.weight is \(\(33,\)"),
    (lambda w: w.update({"model.norm.weight": torch.ones(32).half()}), "model.norm.weight is .* 'F16'"),
    (lambda w: w["model.norm.weight"].fill_(float("nan")), "tensor model.norm.weight is not finite"),
])
def test_weights_that_are_not_the_models(checkpoint, change, message):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")
    reseal(checkpoint, "model.safetensors")
    with pytest.raises(SystemExit, match=message) as e:
        load_checkpoint(str(checkpoint))
    assert "\n" not in str(e.value) and "model.safetensors" in str(e.value)


@pytest.mark.parametrize("change,message", [
    (dict(n_layer="two"), "'n_layer' wants int, got 'two'"),
    (dict(arch="mamba"), "'arch' wants one of llama, gpt2, got 'mamba'"),
    (dict(n_head=5), "n_embd=32 must be a multiple of n_head=5"),
    (dict(n_layer=10 ** 7), "too few for n_layer=10000000"),
    (dict(n_embd=2 ** 40), "is not of the sizes in config.json"),
    (dict(vocab_size=499), r"by config.json it is \(\(499"),
    (dict(norm_eps=float("inf")), "'norm_eps' wants a finite number"),
    (dict(experts=8), "there is no setting 'experts'"),
])
def test_a_model_that_is_not_the_weights(checkpoint, change, message):
    with open(checkpoint / "config.json") as f:
        config = json.load(f)
    with open(checkpoint / "config.json", "w") as f:
        json.dump({**config, "model": {**config["model"], **change}}, f)
    reseal(checkpoint, "config.json")
    with pytest.raises(SystemExit, match=message) as e:
        load_checkpoint(str(checkpoint))
    assert "\n" not in str(e.value) and str(checkpoint) in str(e.value)


@pytest.mark.parametrize("change,message", [
    (dict(tokenizer=5), "'tokenizer' is no file's name"),
    (dict(tokenizer=None), "'tokenizer' is no file's name"),
    (dict(tokenizer="../model.model"), "'tokenizer' is no file's name"),
    (dict(bos=["line"]), "'bos' no text"),
])
def test_a_checkpoint_that_names_no_file_of_its_own(checkpoint, change, message):
    edit_json(checkpoint / "config.json", **change)
    reseal(checkpoint, "config.json")
    with pytest.raises(SystemExit, match=message):
        load_checkpoint(str(checkpoint))


# --- what a run needs and what would delete it ----------------------------------------------------

def test_overwrite_spares_what_a_run_begins_with(data, tmp_path):
    run_train(data, tmp_path / "r", max_iters=3)
    with pytest.raises(SystemExit, match="--overwrite would delete init_from"):
        run_train(data, tmp_path / "r", init_from=str(tmp_path / "r"), overwrite=True)
    assert load_checkpoint(str(tmp_path / "r"))


def test_a_resumed_run_needs_nothing_that_it_began_with(data, tmp_path):
    run_train(data, tmp_path / "first", max_iters=3)
    change = dict(init_from=str(tmp_path / "first"), max_iters=6)
    run_train(data, tmp_path / "whole", **change)
    run_train(data, tmp_path / "cut", **change)
    shutil.rmtree(tmp_path / "cut" / "ckpt_6")
    shutil.rmtree(tmp_path / "first")
    run_train(data, tmp_path / "cut", resume=True, **change)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    with pytest.raises(SystemExit, match="no checkpoint at"):
        run_train(data, tmp_path / "new", **change)


def test_a_generator_may_be_gone_on_resume(data, teachers, tmp_path):
    run_train(data, tmp_path / "g", max_iters=3, arch="gpt2", tie_weights=True, norm_eps=1e-5, causal=False)
    change = dict(teachers=tuple(teachers[:1]), generator=str(tmp_path / "g"), generator_steps=2,
                  student_steps=2)
    distill.main(distill_config(data, tmp_path / "whole", **change))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "ckpt_6")
    shutil.rmtree(tmp_path / "g")
    distill.main(distill_config(data, tmp_path / "cut", resume=True, **change))
    assert_same(*(load_state(str(tmp_path / r / "ckpt_6"))[0] for r in ("whole", "cut")))
    with pytest.raises(SystemExit, match="no checkpoint at"):
        distill.main(distill_config(data, tmp_path / "new", **change))


@pytest.mark.parametrize("change,message", [
    (dict(teacher_cache="FILE"), "teacher_cache=.* is not a folder"),
    (dict(teacher_cache="c", random_offset=True), "use --random_offset=False"),
    (dict(out_dir="FILE/r"), "out_dir=.* is no folder, or not yours"),
    (dict(n_pairs=3, contrastive=0.1), "n_pairs=3 must be"),
    (dict(teacher_dtype=("int4",)), "once or once per teacher"),
])
def test_refused_before_a_teacher_is_loaded(data, teachers, tmp_path, monkeypatch, change, message):
    (tmp_path / "file").write_text("")
    change = {key: value.replace("FILE", str(tmp_path / "file")) if isinstance(value, str) else value
              for key, value in change.items()}
    out = change.pop("out_dir", tmp_path / "r")
    monkeypatch.setattr(distill, "load_checkpoint", lambda *_: pytest.fail("a teacher was loaded"))
    with pytest.raises(SystemExit, match=message):
        distill.main(distill_config(data, out, teachers=tuple(teachers), **change))


def test_what_came_between_the_look_and_the_lock_counts(data, tmp_path):
    """Two runs look at an empty folder; the second to lock it finds the first one's run."""
    late = train_config(data, tmp_path / "r")
    machine, chunks = train.start(late)
    run_train(data, tmp_path / "r")
    with pytest.raises(SystemExit, match="already holds a run"):
        Keeper(late, machine, chunks)
    late.resume = True  # and a --resume that saw no checkpoint does not begin again
    assert Keeper(late, machine, chunks) and late.resume


# --- signals and processes ------------------------------------------------------------------------

@pytest.mark.thorough
def test_torchrun_and_its_ranks_are_signalled_at_once(data, tmp_path):
    """As batch systems do it: saved, and the same run when it goes on."""
    change = {**TINY, "max_iters": 400, "epochs": 50, "eval_interval": 100, "data_dir": data}
    out = tmp_path / "r"
    child = start_torchrun("train.py", *flags_of({**change, "out_dir": out}), start_new_session=True)
    while not (out / "metrics.jsonl").exists() or len(records(out)) < 5:
        time.sleep(0.05)
        assert child.poll() is None, child.communicate()[1]
    os.killpg(child.pid, signal.SIGTERM)
    _, stderr = child.communicate(timeout=60)
    assert "stopped by a signal at step" in stderr and os.path.exists(out / "last.json"), stderr[-2000:]


@pytest.mark.thorough
def test_four_ranks_resume_to_the_same_bits(data, tmp_path):
    change = dict(max_iters=6, eval_interval=3, micro_batch_size=1)
    run_ranks(lambda: run_train(data, tmp_path / "whole", **change), ranks=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "ckpt_6")
    run_ranks(lambda: run_train(data, tmp_path / "cut", resume=True, **change), ranks=4)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    whole, cut = ([(r["step"], r["loss"], r["grad_norm"]) for r in records(tmp_path / name)]
                  for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.parametrize("environment", [
    dict(RANK="1"), dict(WORLD_SIZE="2"), dict(RANK="0", WORLD_SIZE="2")])
def test_half_an_environment_of_ranks(data, tmp_path, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="the environment has RANK=.*start several processes with torchrun"):
        run_train(data, tmp_path / "r")
    assert not os.path.exists(tmp_path / "r")


def test_skipped_steps_are_counted_across_a_signal(data, tmp_path, monkeypatch):
    """The count of skipped steps since the last line of the log goes on with the run."""
    real, calls = train.next_token_loss, []

    def loss_fn(trainee, batch, cfg, machine):
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGTERM)
        loss, parts = real(trainee, batch, cfg, machine)
        return loss * (float("nan") if len(calls) == 5 else 1), parts
    monkeypatch.setattr(train, "next_token_loss", loss_fn)
    change = dict(not_finite="skip", log_interval=4, eval_interval=100, max_iters=8)
    with pytest.raises(SystemExit, match="stopped by a signal at step 6"):
        run_train(data, tmp_path / "r", **change)
    shutil.copytree(tmp_path / "r", tmp_path / "stop")
    run_train(data, tmp_path / "r", resume=True, **change)
    assert [(r["step"], r["skipped"]) for r in records(tmp_path / "r")] == [(4, 0), (8, 1)]
    run_train(data, tmp_path / "stop", resume=True, **{**change, "not_finite": "stop"})  # goes on
    assert_same(weights(tmp_path / "stop"), weights(tmp_path / "r"))


# --- streams and names ----------------------------------------------------------------------------

@pytest.mark.parametrize("closed", thorough(["<&- >&- 2>&-", ">&-", "2>&-"], sample=1))
def test_closed_streams_do_not_end_a_run(data, tmp_path, closed):
    """As of a daemon: it trains to its end, and its log is metrics.jsonl."""
    flags = flags_of({**TINY, "data_dir": data, "out_dir": tmp_path / "r"})
    command = shlex.join([sys.executable, os.path.join(ROOT, "train.py"), *flags])
    done = subprocess.run(["bash", "-c", f"{command} {closed}"], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and [r["step"] for r in records(tmp_path / "r")] == [1, 2, 3, 4, 5, 6]


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="'out_dir' wants a name in UTF-8") as e:
        configure(train.TrainConfig, ["--out_dir=" + os.fsdecode(b"out/\xff")])
    assert "\n" not in str(e.value)
