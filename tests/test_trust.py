"""A run survives anything: killed, cut short, out of disk, or fed nonsense, it goes on exactly or says why not.

The whole of it is `make test-all`; `make test` takes a sample.
"""
import contextlib
import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

import distill
import lib.checkpoints
import lib.files
import lib.runs
import train
from helpers import (
    GPT2,
    ROOT,
    TINY,
    assert_same,
    distill_config,
    records,
    run_train,
    thorough,
    torchrun,
    weights,
)
from lib import configurator
from lib.checkpoints import RUN_FILES, find_resumable, load_checkpoint, load_state, read_checkpoint_config
from lib.files import sha256
from train import TrainConfig

# what the runs below do: (program, settings)
RUNS = {
    "train, accumulation, offsets, dropout": ("train", dict(micro_batch_size=4, random_offset=True, **GPT2)),
    "train, bfloat16": ("train", dict(dtype="bfloat16", dropout=0.1)),
    "distill, bfloat16, accumulation, dropout": ("distill", dict(dtype="bfloat16", micro_batch_size=4, dropout=0.1, teacher_dtype=("int8",))),
    "distill, offsets": ("distill", dict(random_offset=True)),
    "train, compiled": ("train", dict(n_layer=1, compile="on")),
    "distill, bfloat16, compiled": ("distill", dict(n_layer=1, compile="on", dtype="bfloat16")),
}
PLAIN = [name for name in RUNS if "compiled" not in name]
STEPS = dict(max_iters=8, eval_interval=3, log_interval=1)


def settings(name, data, teachers, out, **change):
    program, own = RUNS[name]
    if program == "distill":
        return distill_config(data, out, **{**STEPS, **own, "teachers": tuple(teachers[:2]), **change})
    return TrainConfig(**{**TINY, **STEPS, **own, "data_dir": data, "out_dir": str(out), **change})


def run(name, data, teachers, out):
    main = distill.main if RUNS[name][0] == "distill" else train.main
    main(settings(name, data, teachers, out, resume=True))


@pytest.fixture(scope="session")
def whole(data, teachers, tmp_path_factory):
    """The uninterrupted run of that name, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / "r"
            if in_child(lambda: run(name, data, teachers, made[name])) != 0:
                pytest.fail(f"the uninterrupted run failed: {name}")
        return made[name]
    return get


def in_child(work, kill_at_event=None, kill_after=None, number=signal.SIGKILL):
    """Exit status of work() in a child process (below 0: the signal). It can be signalled at its n-th
    file operation, or some seconds after its first."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, events = 99, 0

        def hook(event, args):
            nonlocal events
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile") and "/ckpt" in str(args[0]) + str(args[:2]) \
                    or event in ("open", "os.rename") and ".json" in str(args[0]):
                if events == 0:
                    os.write(write, b"1")
                if events == kill_at_event:
                    os.kill(os.getpid(), number)
                events += 1
        sys.addaudithook(hook)
        try:
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                work()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
            print(e.code, file=sys.stderr)
        except BaseException as e:
            print(f"Traceback: {type(e).__name__}: {e}", file=sys.stderr)
        finally:
            os._exit(code)  # come what may: there is a second pytest in here
    os.close(write)
    if kill_after is not None:
        os.read(read, 1)
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def assert_same_run(a, b):
    """Weights, optimizer state and metrics, bit for bit; no step twice and none missing."""
    assert_same(weights(a), weights(b))
    states = [load_state(find_resumable(str(r))) for r in (a, b)]
    assert_same(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]
    logs = [[{k: v for k, v in r.items() if k != "tokens_per_s"} for r in records(r)] for r in (a, b)]
    assert logs[0] == logs[1]
    assert [r["step"] for r in logs[1] if r["step"]] == list(range(1, 9))


# --- killed ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", thorough(range(30), sample=4))
def test_killed_at_any_file_operation_and_resumed(data, teachers, tmp_path, whole, seed):
    """Two SIGKILLs a seed: the first anywhere in the run, the second in the run that resumes it."""
    name, rng = PLAIN[seed % len(PLAIN)], np.random.default_rng(seed)
    expected = whole(name)
    for _ in range(2):
        assert in_child(lambda: run(name, data, teachers, tmp_path / "r"), kill_at_event=rng.integers(60)) in (0, -signal.SIGKILL)
    run(name, data, teachers, tmp_path / "r")
    assert_same_run(expected, tmp_path / "r")


@pytest.mark.parametrize("seed", thorough(range(12), sample=2))
def test_killed_at_any_time_and_resumed(data, teachers, tmp_path, whole, seed):
    name, rng = list(RUNS)[seed % len(RUNS)], np.random.default_rng(seed)
    expected = whole(name)
    in_child(lambda: run(name, data, teachers, tmp_path / "r"), kill_after=rng.random() * 0.2)
    assert in_child(lambda: run(name, data, teachers, tmp_path / "r")) == 0
    assert_same_run(expected, tmp_path / "r")


@pytest.mark.parametrize("name", thorough(["train, compiled", "distill, bfloat16, compiled"], sample=0))
def test_compiled_runs_killed_and_resumed(data, teachers, tmp_path, whole, name):
    if not train.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work on this machine")
    for at in (15, 30, 45):
        in_child(lambda: run(name, data, teachers, tmp_path / f"r{at}"), kill_at_event=at)
        assert in_child(lambda: run(name, data, teachers, tmp_path / f"r{at}")) == 0
        assert_same_run(whole(name), tmp_path / f"r{at}")


@pytest.mark.parametrize("number,wait", [(signal.SIGTERM, 2), *(pytest.param(signal.SIGKILL, wait, marks=pytest.mark.thorough) for wait in (3, 4, 7))])
def test_two_ranks_killed_and_resumed(data, teachers, tmp_path, number, wait):
    """torchrun, `wait` lines into the log; SIGTERM saves on all ranks at one step."""
    change = {**STEPS, "teachers": teachers[:2], "dropout": 0.1, "micro_batch_size": 2, "dtype": "bfloat16"}
    torchrun("distill.py", data, tmp_path / "whole", **change)
    flags = [f"--{k}={','.join(v) if isinstance(v, list) else v}" for k, v in {**TINY, **change, "data_dir": data, "out_dir": tmp_path / "cut"}.items()]
    child = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"{ROOT}/distill.py", *flags],
                             start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "cut" / "metrics.jsonl"
    while child.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < wait):
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number) if number == signal.SIGKILL else child.send_signal(number)
    child.communicate()
    if not list((tmp_path / "cut").glob("ckpt_?")):
        pytest.skip("killed before the first checkpoint")
    torchrun("distill.py", data, tmp_path / "cut", resume=True, **change)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end(data, teachers, tmp_path, whole, capfd, number):
    name = PLAIN[0]
    whole(name)
    assert in_child(lambda: run(name, data, teachers, tmp_path / "r"), kill_at_event=9, number=number) == 1  # while step 3 is saved
    assert "stopped by a signal at step 4 of 8 and saved; go on with --resume" in capfd.readouterr().err
    assert json.load(open(tmp_path / "r" / "last.json"))["step"] == 4
    run(name, data, teachers, tmp_path / "r")
    assert_same_run(whole(name), tmp_path / "r")


def test_torchrun_restarts_go_on(data, teachers, tmp_path):
    """The first try dies at step 5; torchrun repeats the command."""
    (tmp_path / "die.py").write_text(
        "import os, train as _t\n_real = _t.learning_rate\n"
        "def _dying(cfg, step, total):\n    if step == 5 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': os._exit(3)\n"
        "    return _real(cfg, step, total)\n_t.learning_rate = _dying\n")
    change = {**TINY, **STEPS, "teachers": ",".join(teachers[:2]), "data_dir": data}
    for out, more in (("whole", []), ("cut", [str(tmp_path / "die.py")])):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1", f"{ROOT}/distill.py",
                               *more, *(f"--{k}={v}" for k, v in change.items()), f"--out_dir={tmp_path / out}", "--resume"], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
        assert done.returncode == 0, done.stderr
    assert "exitcode: 3" in done.stderr  # it did die
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


# --- a save that fails ----------------------------------------------------------------------------

FAILING = {"fsync": (os, "fsync"), "rename": (os, "rename"), "replace": (os, "replace"), "copy": (shutil, "copy"), "makedirs": (os, "makedirs"),
           "rmtree": (shutil, "rmtree"), "remove": (os, "remove"), "json": (json, "dump"), "sha256": (lib.checkpoints, "sha256")}


@pytest.mark.parametrize("what", FAILING)
@pytest.mark.parametrize("call", thorough([2, 0, 1, 3, 5, 8, 13], sample=1))
def test_every_step_of_a_save_may_fail_once(data, teachers, tmp_path, monkeypatch, what, call):
    """One call of one function raises; `call` counts round and round through those a whole run makes."""
    name, calls, failing_call = PLAIN[0], [], None
    module, function = FAILING[what]
    real, measured = getattr(module, function), lib.runs.evaluate

    def counting(*args, **kwargs):
        if what in ("fsync", "json") or any(RUN_FILES.search(str(a)) for a in args):
            calls.append(args)
            if len(calls) - 1 == failing_call:
                raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
        return real(*args, **kwargs)
    monkeypatch.setattr(lib.runs, "evaluate", lambda *a: -measured(*a))  # the first checkpoint stays the best: files are removed from it
    with monkeypatch.context() as m:
        m.setattr(module, function, counting)
        run(name, data, teachers, tmp_path / "whole")
        failing_call, calls[:] = call % len(calls), []
        with pytest.raises(OSError, match="No space left"):  # launch makes one line of it
            run(name, data, teachers, tmp_path / "r")
    run(name, data, teachers, tmp_path / "r")
    assert_same_run(tmp_path / "whole", tmp_path / "r")


@pytest.mark.parametrize("limit", thorough([60_000, 0, 100, 1_000, 20_000, 133_000, 140_000, 250_000, 300_000], sample=2))
def test_a_file_size_limit_loses_nothing(data, teachers, tmp_path, whole, capfd, limit):
    name = PLAIN[0]
    expected = whole(name)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        configurator.configure = lambda *_, **__: settings(name, data, teachers, tmp_path / "r")
        configurator.launch(train.main, TrainConfig)
    assert in_child(limited) in (0, 1)
    err = capfd.readouterr().err
    assert "Traceback" not in err and (not err or err.startswith("error: "))
    run(name, data, teachers, tmp_path / "r")
    assert_same_run(expected, tmp_path / "r")


def test_a_full_disk_loses_nothing(data, teachers, tmp_path, whole, capfd):
    mount = tmp_path / "small"
    mount.mkdir()
    name = PLAIN[0]
    size = sum(f.stat().st_size for f in (whole(name) / "ckpt_8").iterdir())
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        def full():
            configurator.configure = lambda *_, **__: settings(name, data, teachers, mount / "r")
            configurator.launch(train.main, TrainConfig)
        assert in_child(full) == 1 and capfd.readouterr().err.startswith("error: ")
        assert json.load(open(mount / "r" / "last.json"))["step"] == 3  # the second did not fit
        subprocess.run(["mount", "-o", f"remount,size={10 * size}", mount], check=True)
        run(name, data, teachers, mount / "r")
        assert_same_run(whole(name), mount / "r")
    finally:
        subprocess.run(["umount", "-l", mount])


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json", "config.json", "tokenizer.model", "sha256.json"])
def test_a_damaged_last_checkpoint_names_the_one_before(data, teachers, tmp_path, whole, file):
    """Cut short at many lengths or with a bit flipped: refused, and going on as the message says is exact."""
    name = PLAIN[0]
    shutil.copytree(whole(name), tmp_path / "r")
    path = tmp_path / "r" / "ckpt_8" / file
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in [content[:n] for n in {0, 1, 7, 8, 100, len(content) // 2, len(content) - 2} if n < len(content)] + [bytes(flipped)]:
        path.write_bytes(damaged)
        with pytest.raises(SystemExit) as e:
            train.main(settings(name, data, teachers, tmp_path / "r", resume=True, max_iters=9))
        assert "ckpt_8" in str(e.value) and str(e.value).endswith(f"the last good checkpoint is {tmp_path}/r/ckpt_6: delete {tmp_path}/r/ckpt_8 to resume from there")
    shutil.rmtree(path.parent)
    run(name, data, teachers, tmp_path / "r")
    assert_same_run(whole(name), tmp_path / "r")


# --- guards ---------------------------------------------------------------------------------------

def train_with(cfg, loss_fn):
    machine, chunks = train.start(cfg)
    keeper = lib.runs.Keeper(cfg, machine, chunks)
    trainee = train.Trainee(train.new_model(cfg, machine, chunks))
    train.train(cfg, machine, chunks, trainee, partial(loss_fn, cfg=cfg, machine=machine), keeper)


def poisoned(at, real=train.next_token_loss):
    """next_token_loss with a gradient that is not finite at step `at`."""
    calls = []

    def loss_fn(*args, **kw):
        loss, parts = real(*args, **kw)
        calls.append(1)
        return loss * (math.nan if len(calls) == at else 1), parts
    return loss_fn


def test_a_step_that_is_not_finite_stops_the_run_and_reaches_nothing(data, tmp_path):
    cfg = TrainConfig(**{**TINY, "data_dir": data, "out_dir": str(tmp_path / "r"), "log_interval": 3, "eval_interval": 2})
    with pytest.raises(SystemExit, match=r"the loss on rank 0 was not finite at step 5; the last good checkpoint is .*ckpt_4"):
        train_with(cfg, poisoned(5))
    assert all(w.isfinite().all() for w in weights(tmp_path / "r").values())
    run_train(data, tmp_path / "r", log_interval=3, eval_interval=2, resume=True)
    run_train(data, tmp_path / "whole", log_interval=3, eval_interval=2)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "r"))


def test_a_step_that_is_not_finite_is_skipped_if_so_chosen(data, tmp_path):
    cfg = TrainConfig(**{**TINY, "data_dir": data, "out_dir": str(tmp_path / "r"), "max_iters": 4, "eval_interval": 3, "not_finite": "skip"})
    train_with(cfg, poisoned(4))
    before, after = (load_checkpoint(str(tmp_path / "r" / f))[0].state_dict() for f in ("ckpt_3", "ckpt_4"))
    assert_same(before, after)
    assert_same(*({k: v for k, v in load_state(str(tmp_path / "r" / f))[0].items() if not k.startswith("step.")} for f in ("ckpt_3", "ckpt_4")))
    log = records(tmp_path / "r")
    assert [r["skipped"] for r in log] == [0, 0, 0, 1] and log[3]["loss"] is None
    train.main(TrainConfig(**{**vars(cfg), "resume": True, "max_iters": 6}))  # and it goes on
    assert math.isfinite(records(tmp_path / "r")[-1]["loss"])


def test_a_rank_whose_loss_is_not_finite_is_named(data, teachers, tmp_path):
    (tmp_path / "poison.py").write_text(
        "import os, sys as _sys, math\n_m = _sys.modules['__main__']\n_real, _calls = _m.chunked_loss, []\n"
        "def _poisoned(*args, **kw):\n    loss, parts = _real(*args, **kw)\n    _calls.append(1)\n"
        "    bad = len(_calls) == 4 and os.environ['RANK'] == '1'\n"
        "    return (loss * math.nan if bad else loss), parts\n_m.chunked_loss = _poisoned\n")
    change = {**TINY, **STEPS, "teachers": teachers[0], "data_dir": data, "out_dir": tmp_path / "r"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"{ROOT}/distill.py", str(tmp_path / "poison.py"),
                           *(f"--{k}={v}" for k, v in change.items())], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode and f"error: the loss on rank 1 was not finite at step 4; the last good checkpoint is {tmp_path}/r/ckpt_3" in done.stderr
    assert all(w.isfinite().all() for w in weights(tmp_path / "r").values())


def test_a_validation_loss_that_is_not_finite_becomes_no_checkpoint(data, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.runs, "evaluate", lambda *a: math.inf)
    with pytest.raises(SystemExit, match="validation loss is not finite at step 3"):
        run_train(data, tmp_path / "r")
    assert not os.path.exists(tmp_path / "r" / "last.json")


def test_one_process_to_a_run_folder(data, tmp_path, capfd):
    run_train(data, tmp_path / "r", max_iters=3)

    def second():
        lib.files._locks.clear()  # as another process would, whose parent did not hold it
        run_train(data, tmp_path / "r", max_iters=6, resume=True)
    assert in_child(second) == 1 and "another process is writing into" in capfd.readouterr().err


def test_a_pickle_is_never_opened(tmp_path, data):
    """A .pt whose unpickling would create a file, as a teacher by itself and as a file of a checkpoint."""
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")
    torch.save({"model": Bomb()}, tmp_path / "teacher.pt")
    with pytest.raises(SystemExit, match="pickled checkpoints are never opened"):
        distill.main(distill_config(data, tmp_path / "s", teachers=(str(tmp_path / "teacher.pt"),)))
    run_train(data, tmp_path / "t", max_iters=3)
    shutil.copy(tmp_path / "teacher.pt", tmp_path / "t" / "ckpt_3" / "model.safetensors")
    with pytest.raises(SystemExit, match="model.safetensors is damaged"):
        distill.main(distill_config(data, tmp_path / "s", teachers=(str(tmp_path / "t"),)))
    sums = json.load(open(tmp_path / "t" / "ckpt_3" / "sha256.json"))
    sums["model.safetensors"] = sha256(tmp_path / "t" / "ckpt_3" / "model.safetensors")
    json.dump(sums, open(tmp_path / "t" / "ckpt_3" / "sha256.json", "w"))
    with pytest.raises(Exception, match="(?i)header|safetensor"):
        distill.main(distill_config(data, tmp_path / "s", teachers=(str(tmp_path / "t"),)))
    assert not os.path.exists(tmp_path / "exploded")


def test_the_best_is_decided_again_where_the_user_deleted_it(data, tmp_path):
    """ckpt_8 was the best, was damaged and deleted; trained again it may be worse, and best.json must not take it for the old one."""
    run_train(data, tmp_path / "run", eval_interval=2, max_iters=8)
    step = lambda: json.load(open(tmp_path / "run/best.json"))
    assert step()["folder"] == "ckpt_8"
    shutil.rmtree(tmp_path / "run/ckpt_8")
    run_train(data, tmp_path / "run", eval_interval=2, max_iters=10, resume=True, learning_rate=30.0, min_lr=30.0, grad_clip=0.0)
    assert step()["folder"] == "ckpt_6"
    assert step()["val_ce"] == read_checkpoint_config(str(tmp_path / "run/ckpt_6"))["val_ce"]
    assert min(r["val_ce"] for r in records(tmp_path / "run") if "val_ce" in r) == step()["val_ce"]


def test_metrics_that_a_power_cut_left_damaged(data, tmp_path):
    run_train(data, tmp_path / "run", max_iters=3)
    with open(tmp_path / "run/metrics.jsonl", "ab") as f:
        f.write(b'{"step": null}\n\xff\xfe\x00bad\n')
    run_train(data, tmp_path / "run", max_iters=6, resume=True)
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_last_checkpoint_without_its_state_is_refused(data, tmp_path):
    run_train(data, tmp_path / "run", max_iters=6)
    os.remove(tmp_path / "run/ckpt_6/state.json")
    with pytest.raises(SystemExit, match="ckpt_6/state.json is missing; the last good checkpoint is .*ckpt_3: delete"):
        run_train(data, tmp_path / "run", max_iters=9, resume=True)


@pytest.mark.parametrize("change", [dict(batch_size=4), dict(seed=1), dict(seq_len=16), dict(random_offset=True)])
def test_what_the_data_order_depends_on_stays_as_it_was(data, tmp_path, change):
    run_train(data, tmp_path / "run", max_iters=3)
    with pytest.raises(SystemExit, match=f"trained with {next(iter(change))}="):
        run_train(data, tmp_path / "run", max_iters=6, resume=True, **change)


def test_a_signal_during_the_last_validation_is_not_lost(data, tmp_path, monkeypatch):
    measured = lib.runs.evaluate
    monkeypatch.setattr(lib.runs, "evaluate", lambda *a: (signal.raise_signal(signal.SIGTERM), measured(*a))[1])
    with pytest.raises(SystemExit, match="run is complete"):
        run_train(data, tmp_path / "run", max_iters=3)
    assert json.load(open(tmp_path / "run/last.json"))["step"] == 3
