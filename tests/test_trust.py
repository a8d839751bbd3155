"""A run survives anything: killed, cut short, out of disk, or fed nonsense, it goes on exactly or says why
not.

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
from safetensors.torch import save_file

import distill
import lib.checkpoints
import lib.files
import lib.runs
import train
from helpers import (
    GPT2,
    TINY,
    assert_resumes,
    assert_same,
    assert_same_run,
    distill_config,
    flags_of,
    records,
    reseal,
    run_distill,
    run_ranks,
    run_train,
    saved_state,
    start_torchrun,
    thorough,
    train_config,
    validations,
    weights,
)
from lib import configurator
from lib.checkpoints import RUN_FILES, read_checkpoint_config
from lib.files import read_json

# what the runs below do: the script's main, and settings
RECIPES = {
    "train, accumulation, offsets, dropout": (
        train.main, dict(micro_batch_size=4, random_offset=True, **GPT2)),
    "train, bfloat16": (
        train.main, dict(dtype="bfloat16", dropout=0.1)),
    "distill, bfloat16, accumulation, dropout": (
        distill.main, dict(dtype="bfloat16", micro_batch_size=4, dropout=0.1, teacher_dtype=("int8",))),
    "distill, offsets": (
        distill.main, dict(random_offset=True)),
    "train, compiled": (
        train.main, dict(n_layer=1, compile="on")),
    "distill, bfloat16, compiled": (
        distill.main, dict(n_layer=1, compile="on", dtype="bfloat16")),
}
COMPILED = [name for name in RECIPES if "compiled" in name]
PLAIN = [name for name in RECIPES if name not in COMPILED]
STEPS = dict(max_iters=8, eval_interval=3, log_interval=1)


@pytest.fixture(scope="session")
def config_of(data, teachers):
    """config_of(out_dir, recipe): its settings."""
    def config_of(out, name=PLAIN[0], **change):
        main, settings = RECIPES[name]
        settings = {**STEPS, **settings, **change}
        if main is distill.main:
            return distill_config(data, out, teachers=tuple(teachers[:2]), **settings)
        return train_config(data, out, **settings)
    return config_of


@pytest.fixture(scope="session")
def go_on(config_of):
    """go_on(out_dir, recipe): from the last checkpoint there, or from the beginning, to the end."""
    def go_on(out, name=PLAIN[0], **change):
        main, _ = RECIPES[name]
        main(config_of(out, name, resume=True, **change))
    return go_on


@pytest.fixture(scope="session")
def whole(go_on, tmp_path_factory):
    """whole(recipe): the folder of the uninterrupted run, made once."""
    made = {}

    def whole(name=PLAIN[0]):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / "run"
            if in_child(lambda: go_on(made[name], name)) != 0:
                pytest.fail(f"the uninterrupted run failed: {name}")
        return made[name]
    return whole


# --- killed ---------------------------------------------------------------------------------------

FOLDER_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile")


def is_of_the_run_folder(event, args):
    """Whether an audit event is an operation on a checkpoint folder, or on a JSON file."""
    if event in ("open", "os.rename") and ".json" in str(args[0]):
        return True
    return event in FOLDER_EVENTS and "/ckpt" in str(args[:2])


def in_child(work, kill_at_event=None, kill_after=None, number=signal.SIGKILL):
    """Exit status of work() in a child process (below 0: the signal). It can be signalled at its n-th file
    operation, or some seconds after its first."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, events = 99, 0

        def hook(event, args):
            nonlocal events
            if is_of_the_run_folder(event, args):
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", thorough(range(30), sample=4))
def test_killed_at_any_file_operation_and_resumed(go_on, whole, tmp_path, seed):
    """Two SIGKILLs a seed: the first anywhere in the run, the second in the run that resumes it."""
    name, rng = PLAIN[seed % len(PLAIN)], np.random.default_rng(seed)
    expected = whole(name)
    for _ in range(2):
        status = in_child(lambda: go_on(tmp_path / "run", name), kill_at_event=rng.integers(60))
        assert status in (0, -signal.SIGKILL)
    go_on(tmp_path / "run", name)
    assert_same_run(expected, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", thorough(range(12), sample=2))
def test_killed_at_any_time_and_resumed(go_on, whole, tmp_path, seed):
    name, rng = list(RECIPES)[seed % len(RECIPES)], np.random.default_rng(seed)
    expected = whole(name)
    in_child(lambda: go_on(tmp_path / "run", name), kill_after=rng.random() * 0.2)
    assert in_child(lambda: go_on(tmp_path / "run", name)) == 0
    assert_same_run(expected, tmp_path / "run")


@pytest.mark.thorough
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_runs_killed_and_resumed(go_on, whole, tmp_path, name):
    for event in (15, 30, 45):
        out = tmp_path / str(event)
        in_child(lambda: go_on(out, name), kill_at_event=event)
        assert in_child(lambda: go_on(out, name)) == 0
        assert_same_run(whole(name), out)


@pytest.mark.slow
@pytest.mark.parametrize("number,lines", [
    (signal.SIGTERM, 2),
    *(pytest.param(signal.SIGKILL, lines, marks=pytest.mark.thorough) for lines in (3, 4, 7)),
])
def test_two_ranks_killed_and_resumed(data, teachers, tmp_path, number, lines):
    """torchrun, so many lines into the log; SIGTERM saves on all ranks at one step."""
    cut = tmp_path / "cut"
    settings = {**STEPS, "teachers": teachers[:2], "dropout": 0.1, "micro_batch_size": 2, "dtype": "bfloat16"}
    run_ranks(lambda: run_distill(data, tmp_path / "whole", **settings))
    child = start_torchrun("distill.py", *flags_of({**TINY, **settings, "data_dir": data, "out_dir": cut}),
                           start_new_session=True, stdout=subprocess.DEVNULL)
    log = cut / "metrics.jsonl"
    while child.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < lines):
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number) if number == signal.SIGKILL else child.send_signal(number)
    child.communicate()
    if not list(cut.glob("ckpt_?")):
        pytest.skip("killed before the first checkpoint")
    run_ranks(lambda: run_distill(data, cut, resume=True, **settings))
    assert_same_run(tmp_path / "whole", cut)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end(go_on, whole, tmp_path, capfd, number):
    """One that comes while step 3 is saved: step 4 is the last."""
    out, expected = tmp_path / "run", whole()
    assert in_child(lambda: go_on(out), kill_at_event=9, number=number) == 1
    message = "stopped by a signal at step 4 of 8 and saved; go on with --resume"
    assert message in capfd.readouterr().err
    assert read_json(out / "last.json")["step"] == 4
    go_on(out)
    assert_same_run(expected, out)


def test_a_signal_during_the_last_validation_is_not_lost(data, tmp_path, monkeypatch):
    evaluate = lib.runs.evaluate

    def signalled(*args):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)
    monkeypatch.setattr(lib.runs, "evaluate", signalled)
    with pytest.raises(SystemExit, match="run is complete"):
        run_train(data, tmp_path / "run", max_iters=3)
    assert read_json(tmp_path / "run" / "last.json")["step"] == 3


# a config file: the run that it is laid over dies at step 5, the first time
DIES_ONCE = """import os, train as _train
_learning_rate = _train.learning_rate
def _dying(cfg, step, total):
    if step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(3)
    return _learning_rate(cfg, step, total)
_train.learning_rate = _dying
"""


@pytest.mark.thorough
def test_torchrun_restarts_go_on(data, teachers, tmp_path, monkeypatch):
    """The first try dies; torchrun repeats the command."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    (tmp_path / "dies_once.py").write_text(DIES_ONCE)
    flags = flags_of({**TINY, **STEPS, "teachers": teachers[:2], "data_dir": data})
    for name, files in (("whole", []), ("cut", [str(tmp_path / "dies_once.py")])):
        child = start_torchrun("distill.py", *files, *flags, f"--out_dir={tmp_path / name}", "--resume",
                               options=["--max-restarts=1"])
        _, err = child.communicate()
        assert child.returncode == 0, err
    assert "exitcode: 3" in err  # it did die
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


# --- a save that fails ----------------------------------------------------------------------------

# the functions that a save is made of, as module and name
FAILING = {
    "fsync": os,
    "rename": os,
    "replace": os,
    "save_file": lib.checkpoints,
    "makedirs": os,
    "rmtree": shutil,
    "remove": os,
    "dump": json,
    "sha256": lib.checkpoints,
}


@pytest.mark.slow
@pytest.mark.parametrize("function", FAILING)
@pytest.mark.parametrize("number", thorough([2, 0, 1, 3, 5, 8, 13], sample=1))
def test_every_step_of_a_save_may_fail_once(go_on, tmp_path, monkeypatch, function, number):
    """One call of one function raises; `number` counts round and round through those a whole run makes."""
    real, calls, failing_call = getattr(FAILING[function], function), 0, None

    def failing(*args, **kwargs):
        nonlocal calls
        paths = [arg for arg in args if isinstance(arg, str)]
        if function in ("fsync", "dump") or any(map(RUN_FILES.search, paths)):
            calls += 1
            if calls - 1 == failing_call:
                raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
        return real(*args, **kwargs)

    # each is worse than the one before: the first stays the best, files are removed from it, and the second
    # is deleted
    evaluate = lib.runs.evaluate
    monkeypatch.setattr(lib.runs, "evaluate", lambda *args: -evaluate(*args))
    go_on = partial(go_on, eval_interval=2)
    with monkeypatch.context() as patch:
        patch.setattr(FAILING[function], function, failing)
        go_on(tmp_path / "whole")
        failing_call, calls = number % calls, 0
        with pytest.raises((OSError, SystemExit), match="No space left"):  # launch makes one line of it
            go_on(tmp_path / "cut")
    go_on(tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def launched(cfg):
    """train.py with cfg, as from a command line, where errors become one line."""
    configurator.configure = lambda *_, **__: cfg
    configurator.launch(train.main, train.TrainConfig)


@pytest.mark.parametrize("limit", thorough(
    [60_000, 0, 100, 1_000, 20_000, 133_000, 140_000, 250_000, 300_000], sample=2))
def test_a_file_size_limit_loses_nothing(config_of, go_on, whole, tmp_path, capfd, limit):
    expected = whole()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        launched(config_of(tmp_path / "run"))
    assert in_child(limited) in (0, 1)
    err = capfd.readouterr().err
    assert "Traceback" not in err and (not err or err.startswith("error: "))
    go_on(tmp_path / "run")
    assert_same_run(expected, tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes): a folder that holds so many, or of another size from then on."""
    mount = tmp_path / "small"
    mount.mkdir()

    def small_disk(size):
        remount = "remount," if os.path.ismount(mount) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={int(size)}", "tmpfs", str(mount)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small disk")
        return mount
    yield small_disk
    if os.path.ismount(mount):
        subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_loses_nothing(config_of, go_on, whole, small_disk, capfd):
    expected = whole()
    size = sum(file.stat().st_size for file in (expected / "ckpt_8").iterdir())
    out = small_disk(1.6 * size) / "run"
    assert in_child(lambda: launched(config_of(out))) == 1
    assert capfd.readouterr().err.startswith("error: ")
    assert read_json(out / "last.json")["step"] == 3  # the second did not fit
    small_disk(10 * size)
    go_on(out)
    assert_same_run(expected, out)


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json", "config.json",
                                  "tokenizer.model", "sha256.json"])
def test_a_damaged_last_checkpoint_names_the_one_before(config_of, go_on, whole, tmp_path, file):
    """Cut short at many lengths or with a bit flipped: refused, and going on as the message says is exact."""
    out = shutil.copytree(whole(), tmp_path / "run")
    path = out / "ckpt_8" / file
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    lengths = {0, 1, 7, 8, 100, len(content) // 2, len(content) - 2}
    cut_short = [content[:length] for length in lengths if length < len(content)]
    remedy = f"the last good checkpoint is {out}/ckpt_6: delete {out}/ckpt_8 to resume from there"
    for damaged in [*cut_short, bytes(flipped)]:
        path.write_bytes(damaged)
        with pytest.raises(SystemExit) as e:
            train.main(config_of(out, resume=True, max_iters=9))
        assert "ckpt_8" in str(e.value) and str(e.value).endswith(remedy)
    shutil.rmtree(path.parent)
    go_on(out)
    assert_same_run(whole(), out)


# --- the optimizer's state ------------------------------------------------------------------------

adamw = train.make_optimizers


def sgd(trainee, cfg):
    """In the place of train.make_optimizers: one that is not AdamW, and does not skip steps by itself."""
    return [torch.optim.SGD(trainee.parameters(), lr=cfg.learning_rate, momentum=0.9)]


@pytest.fixture(params=["AdamW", "SGD"])
def optimizer(request, monkeypatch):
    """A test with train.py's optimizer and with another."""
    if request.param == "SGD":
        monkeypatch.setattr(train, "make_optimizers", sgd)
    return request.param


def test_another_optimizers_momentum_is_saved(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_optimizers", sgd)
    assert_resumes(partial(run_train, data), tmp_path, monkeypatch, 5)
    momentum = saved_state(tmp_path / "cut" / "ckpt_6")
    assert momentum.keys() == {f"momentum_buffer.{name}" for name in weights(tmp_path / "cut")}
    assert all(buffer.any() for buffer in momentum.values())


def test_resuming_with_another_optimizer_is_refused(data, tmp_path, optimizer, monkeypatch):
    run_train(data, tmp_path / "run", max_iters=3)
    make_other, message = {
        "AdamW": (sgd, "is exp_avg, exp_avg_sq, step, not SGD's .none was saved."),
        "SGD": (adamw, "is momentum_buffer, not AdamW's .none was saved."),
    }[optimizer]
    monkeypatch.setattr(train, "make_optimizers", make_other)
    with pytest.raises(SystemExit, match=f"the optimizer's state of model.embed_tokens.weight {message}"):
        run_train(data, tmp_path / "run", resume=True)


NORM = "model.norm.weight"


@pytest.mark.parametrize("change,message", [
    (lambda tensors: tensors.pop(f"exp_avg.{NORM}"),
     f"the optimizer's state of {NORM} is exp_avg_sq, step, not AdamW's .exp_avg, exp_avg_sq, step."),
    (lambda tensors: [tensors.pop(f"{key}.{NORM}") for key in ("exp_avg", "exp_avg_sq", "step")],
     f"the optimizer's state of {NORM} is missing"),
    (lambda tensors: tensors.update({f"momentum_buffer.{NORM}": torch.ones(32)}),
     f"the optimizer's state of {NORM} is exp_avg, exp_avg_sq, momentum_buffer, step, not AdamW's"),
    (lambda tensors: tensors.update({"exp_avg.model.norm.bias": torch.ones(32)}),
     "there is optimizer state for model.norm.bias, which is not trained here"),
    (lambda tensors: tensors.update({f"exp_avg.{NORM}": torch.ones(33)}),
     rf"the optimizer's exp_avg of {NORM} is \(33,\), that \(32,\)"),
])
def test_state_with_a_tensor_missing_or_left_over_is_refused(data, tmp_path, change, message):
    run_train(data, tmp_path / "run", max_iters=3)
    folder = tmp_path / "run" / "ckpt_3"
    tensors = saved_state(folder)
    change(tensors)
    save_file(tensors, folder / "state.safetensors")
    reseal(folder, "state.safetensors")
    with pytest.raises(SystemExit, match=message):
        run_train(data, tmp_path / "run", resume=True)
    assert len(records(tmp_path / "run")) == 3  # nothing was trained


# --- guards ---------------------------------------------------------------------------------------

@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(step): the loss and the gradient of that step of train.py are not finite. What is trained, in
    a list, once it is."""
    def poison(step):
        next_token_loss, trained = train.next_token_loss, []

        def poisoned_loss(trainee, batch, **kwargs):
            trained.append(trainee)
            loss, parts = next_token_loss(trainee, batch, **kwargs)
            return loss * (math.nan if len(trained) == step else 1), parts
        monkeypatch.setattr(train, "next_token_loss", poisoned_loss)
        return trained
    return poison


@pytest.mark.usefixtures("optimizer")
def test_a_step_that_is_not_finite_stops_the_run_and_reaches_nothing(data, poisoned, tmp_path):
    run = partial(run_train, data, log_interval=3, eval_interval=2)
    run(tmp_path / "whole")
    message = "the loss on rank 0 was not finite at step 5; the last good checkpoint is .*ckpt_4"
    trained = poisoned(5)
    with pytest.raises(SystemExit, match=message):
        run(tmp_path / "cut")
    assert_same(trained[-1].student.state_dict(), weights(tmp_path / "cut" / "ckpt_4"))
    run(tmp_path / "cut", resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_step_that_is_not_finite_is_skipped_if_so_chosen(data, poisoned, tmp_path, optimizer):
    run = partial(run_train, data, tmp_path / "run", eval_interval=3, not_finite="skip")
    poisoned(4)
    run(max_iters=4)
    before, after = tmp_path / "run" / "ckpt_3", tmp_path / "run" / "ckpt_4"
    assert_same(weights(before), weights(after))
    assert_same(saved_state(before), saved_state(after))
    key = {"AdamW": "exp_avg", "SGD": "momentum_buffer"}[optimizer]
    assert saved_state(after)[f"{key}.{NORM}"].any()
    log = records(tmp_path / "run")
    assert [record["skipped"] for record in log] == [0, 0, 0, 1]
    assert log[3]["loss"] is None
    run(max_iters=6, resume=True)  # and it goes on
    assert math.isfinite(records(tmp_path / "run")[-1]["loss"])
    assert not torch.equal(weights(tmp_path / "run")[NORM], weights(after)[NORM])


# a config file: the fourth loss of rank 1 is not finite
POISON = """import math, os, sys as _sys
_script, _calls = _sys.modules["__main__"], []
_chunked_loss = _script.chunked_loss
def _poisoned(*args, **kwargs):
    loss, parts = _chunked_loss(*args, **kwargs)
    _calls.append(1)
    bad = len(_calls) == 4 and os.environ["RANK"] == "1"
    return (loss * math.nan if bad else loss), parts
_script.chunked_loss = _poisoned
"""


@pytest.mark.thorough
def test_a_rank_whose_loss_is_not_finite_is_named(data, teachers, tmp_path):
    (tmp_path / "poison.py").write_text(POISON)
    out = tmp_path / "run"
    settings = {**TINY, **STEPS, "teachers": teachers[0], "data_dir": data, "out_dir": out}
    child = start_torchrun("distill.py", str(tmp_path / "poison.py"), *flags_of(settings))
    _, err = child.communicate()
    assert child.returncode
    message = f"the loss on rank 1 was not finite at step 4; the last good checkpoint is {out}/ckpt_3"
    assert f"error: {message}" in err
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_a_validation_loss_that_is_not_finite_becomes_no_checkpoint(data, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.runs, "evaluate", lambda *_: math.inf)
    with pytest.raises(SystemExit, match="validation loss is not finite at step 3"):
        run_train(data, tmp_path / "run")
    assert not os.path.exists(tmp_path / "run" / "last.json")


def test_one_process_to_a_run_folder(data, tmp_path, capfd):
    run_train(data, tmp_path / "run", max_iters=3)

    def second():
        lib.files._locks.clear()  # as another process would, whose parent did not hold it
        run_train(data, tmp_path / "run", max_iters=6, resume=True)
    assert in_child(second) == 1
    assert "another process is writing into" in capfd.readouterr().err


def test_a_pickle_is_never_opened(data, tmp_path):
    """A .pt whose unpickling would create a file, as a teacher by itself and as a file of a checkpoint."""
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")
    torch.save({"model": Bomb()}, tmp_path / "teacher.pt")
    run_train(data, tmp_path / "teacher", max_iters=3)
    folder = tmp_path / "teacher" / "ckpt_3"

    def refused(teacher, message):
        with pytest.raises(SystemExit, match=message):
            run_distill(data, tmp_path / "run", [str(tmp_path / teacher)])
    refused("teacher.pt", "pickled checkpoints are never opened")
    shutil.copy(tmp_path / "teacher.pt", folder / "model.safetensors")
    refused("teacher", "model.safetensors is damaged")
    reseal(folder, "model.safetensors")
    refused("teacher", "model.safetensors is not a safetensors file")
    assert not os.path.exists(tmp_path / "exploded")


# --- what a run goes on from ----------------------------------------------------------------------

def test_the_best_is_decided_again_where_the_user_deleted_it(data, tmp_path):
    """ckpt_8 was the best, was damaged and deleted; trained again it may be worse, and best.json must not
    take it for the old one."""
    out = tmp_path / "run"
    run = partial(run_train, data, out, eval_interval=2)
    run(max_iters=8)
    assert read_json(out / "best.json")["folder"] == "ckpt_8"
    shutil.rmtree(out / "ckpt_8")
    run(max_iters=10, resume=True, learning_rate=30.0, min_lr=30.0, grad_clip=0.0)
    best = read_json(out / "best.json")
    assert best["folder"] == "ckpt_6"
    assert best["val_ce"] == read_checkpoint_config(str(out / "ckpt_6"))["val_ce"]
    assert best["val_ce"] == min(record["val_ce"] for record in validations(out))


def test_metrics_that_a_power_cut_left_damaged(data, tmp_path):
    run_train(data, tmp_path / "run", max_iters=3)
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": null}\n\xff\xfe\x00bad\n')
    run_train(data, tmp_path / "run", max_iters=6, resume=True)
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_last_checkpoint_without_its_state_is_refused(data, tmp_path):
    run_train(data, tmp_path / "run", max_iters=6)
    os.remove(tmp_path / "run" / "ckpt_6" / "state.json")
    message = "ckpt_6/state.json is missing; the last good checkpoint is .*ckpt_3: delete"
    with pytest.raises(SystemExit, match=message):
        run_train(data, tmp_path / "run", max_iters=9, resume=True)


@pytest.mark.parametrize("change", [dict(batch_size=4), dict(seed=1), dict(seq_len=16),
                                    dict(random_offset=True), dict(eval_chunks=8)])
def test_what_the_data_order_depends_on_stays_as_it_was(data, tmp_path, change):
    run_train(data, tmp_path / "run", max_iters=3)
    with pytest.raises(SystemExit, match=f"trained with {next(iter(change))}="):
        run_train(data, tmp_path / "run", max_iters=6, resume=True, **change)


def test_masked_models_are_judged_at_the_same_rate(data, tmp_path):
    run_train(data, tmp_path / "run", max_iters=3, causal=False)
    with pytest.raises(SystemExit, match="trained with mask_rate=0.15"):
        run_train(data, tmp_path / "run", max_iters=6, resume=True, causal=False, mask_rate=0.3)


def test_checkpoints_name_the_code_that_ran(data, tmp_path, monkeypatch):
    """And not what was committed meanwhile."""
    revisions = iter(["begun", "later", "last"])
    monkeypatch.setattr(lib.runs, "git_revision", lambda: next(revisions))
    run_train(data, tmp_path / "run")
    assert {read_checkpoint_config(str(tmp_path / "run" / f"ckpt_{step}"))["git_revision"]
            for step in (3, 6)} == {"begun"}
