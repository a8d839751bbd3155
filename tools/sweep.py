"""Hyper-parameter search (pip install optuna), by default over BabyLlama-2's published priors.

    python -m tools.sweep --run="config/llama_16m.py --data_dir=data/babylm --max_iters=2000" --n_trials=30
    CUDA_VISIBLE_DEVICES=1 python -m tools.sweep ...    # the same command again: one more worker

A worker may also be on another machine that shares out_dir. Each trial draws settings, runs train.py
(distill.py, if the run line names teachers) with them, and is stopped early by Hyperband if its validation
losses are not among the better ones. The search is optuna's, its journal a file in out_dir: no server.
Repeat the command to go on; a trial that died is resumed. results.jsonl has a line a trial, best.py the best
settings as a config file.
"""
import hashlib
import importlib.util
import json
import math
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

from distill import DistillConfig
from lib.checkpoints import find_checkpoint, read_checkpoint_config
from lib.configurator import ROOT, configure, launch, need
from lib.files import parse_json, regular, write_lines
from lib.shards import data_sha256, read_meta
from tools.study import differing, origin, point_out_others
from train import TrainConfig

# BabyLlama-2's sweep file: setting, distribution and its two numbers (mu and sigma of the natural logarithm
# for the log-normal ones), or choices
PRIORS = (
    "batch_size int-lognormal 5 1.5", "epochs int-lognormal 1.8 0.7", "learning_rate lognormal -7.3 0.7",
    "beta1 one-minus-loguniform 0.01 1", "beta2 one-minus-loguniform 0.0001 0.01",
    "adam_eps lognormal -13.8 3.5", "schedule choice linear cosine", "weight_decay lognormal 1 1.5",
    "grad_clip lognormal 0 1", "warmup_iters int-lognormal 5.7 1", "attn_dropout uniform 0 1")
NOT_DRAWN = ("", "out_dir", "teachers", "resume", "overwrite", "eval_interval", "micro_batch_size")


@dataclass
class SweepConfig:
    run: str = ""                      # config files, flags and teachers of one run
    priors: tuple[str, ...] = PRIORS   # "setting distribution number number", "setting choice value ..."
    search: Literal["bayesian", "random"] = "bayesian"  # optuna's TPE, or draws from the priors alone
    n_trials: int = 30                 # of all workers together, those stopped early included
    min_epochs: int = 1                # Hyperband: no trial is stopped before
    reduction: int = 2                 # and one in so many goes on (eta)
    max_micro_batch: int = 64          # sequences at a time; the batch size drawn is split to fit
    out_dir: str = "out/sweep"


def main(cfg):
    check_sweep(cfg)
    middle = drawn(cfg, lambda name: 0.5)
    run_cfg = resolve(cfg, middle, "none")  # mistakes in the run line show before anything is written
    data = data_sha256(read_meta(run_cfg.data_dir))
    not_drawn = {key: value for key, value in origin(run_cfg).items() if key not in middle}
    import optuna
    study = open_search(cfg)
    refuse_another_sweep(cfg, study, data, run_cfg, not_drawn)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by a signal; the same command goes on"))
    repeat_dead_trials(study)
    failures = 0
    while len(trials(study, "COMPLETE", "PRUNED", "RUNNING")) < cfg.n_trials:
        trial = study.ask()
        trial.set_user_attr("worker", [socket.gethostname(), os.getpid(), os.getpid()])
        settings = drawn(cfg, lambda name: trial.suggest_float(name, 0.001, 0.999))
        state, val_ce, outcome = run_trial(cfg, trial, settings)
        study.tell(trial, val_ce, state=optuna.trial.TrialState[state])
        write_results(cfg, study)
        print(f"trial {trial.number}{outcome}")
        failures = failures + 1 if state == "FAIL" else 0
        if failures == 3:
            sys.exit("error: three trials failed one after the other, the reasons are above; the same "
                     "command goes on with the others")
    table(cfg, write_results(cfg, study))
    for trial in trials(study, "RUNNING"):
        host = trial.user_attrs.get("worker", ["?"])[0]
        print(f"notice: trial {trial.number} is still running on {host}; if it is dead, the same command "
              "takes it up an hour after its last line")


def check_sweep(cfg):
    if not importlib.util.find_spec("optuna"):
        sys.exit("error: sweep.py needs optuna: pip install optuna")
    need(cfg,
         run=(cfg.run.split(), "the config files and flags of a run"),
         n_trials=(cfg.n_trials, "at least 1"),
         min_epochs=(cfg.min_epochs, "at least 1"),
         reduction=(cfg.reduction > 1, "at least 2"),
         max_micro_batch=(cfg.max_micro_batch, "at least 1"),
         out_dir=(cfg.out_dir, "a folder's name"))
    names = names_drawn(cfg)
    for i, name in enumerate(names or [""]):
        if name in NOT_DRAWN or name in names[:i]:
            sys.exit(f"error: priors: '{name}' is no setting to draw, or stands there twice")


def names_drawn(cfg):
    return [line.split()[0] for line in cfg.priors if line.split()]


# --- the search -----------------------------------------------------------------------------------

def open_search(cfg):
    """The optuna study in out_dir, begun if there is none."""
    import optuna
    os.makedirs(cfg.out_dir, exist_ok=True)
    journal = os.path.abspath(os.path.join(cfg.out_dir, "journal.log"))  # the lock is a link to this name
    if os.path.exists(os.path.join(cfg.out_dir, "results.jsonl")) and not os.path.exists(journal):
        sys.exit(f"error: {cfg.out_dir} holds a study; name another --out_dir")
    if os.path.exists(regular(journal)):
        drop_half_a_line(journal)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = dict(bayesian=optuna.samplers.TPESampler, random=optuna.samplers.RandomSampler)
    pruner = optuna.pruners.HyperbandPruner(
        min_resource=cfg.min_epochs, max_resource="auto", reduction_factor=cfg.reduction)
    try:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(journal))
        return optuna.create_study(
            storage=storage, study_name="sweep", sampler=samplers[cfg.search](),  # every worker draws its own
            pruner=pruner, direction="minimize", load_if_exists=True)
    except (ValueError, LookupError, TypeError, AssertionError, RecursionError) as e:
        sys.exit(f"error: {journal} is damaged ({type(e).__name__}: {e}); name another --out_dir")


def drop_half_a_line(journal):
    """A worker that was killed while it wrote may have left one: nobody has acted on that yet."""
    import optuna
    lock = optuna.storages.journal.JournalFileSymlinkLock(journal)  # a killed worker's holds for 30 s
    lock.acquire()
    with open(journal, "r+b") as f:
        f.truncate(f.read().rfind(b"\n") + 1)
    lock.release()


def refuse_another_sweep(cfg, study, data, run_cfg, not_drawn):
    """Exit if the sweep in out_dir was begun as another; else note there what it is. not_drawn: the settings
    that no prior is for."""
    now = dict(priors=list(cfg.priors), search=[cfg.search, cfg.min_epochs, cfg.reduction], data=data,
               not_drawn=not_drawn)
    then = {**now, **study.user_attrs}
    others = [key for key in ("priors", "search", "data") if then[key] != now[key]]
    changed = differing(run_cfg, then["not_drawn"], not_drawn)
    if others or changed:
        sys.exit(f"error: the sweep in {cfg.out_dir} was begun with other "
                 f"{others[0] if others else f'settings ({changed})'}; name another --out_dir")
    if "settings" in then and "not_drawn" not in study.user_attrs:  # a hash, which any new setting changes
        print(f"notice: the sweep in {cfg.out_dir} was begun by older code, whose settings are not compared")
    for key, value in now.items():
        study.set_user_attr(key, value)


def trials(study, *states):
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in states]


def drawn(cfg, uniform):
    """Settings from `uniform(name)` numbers in (0, 1): the quantiles of the priors."""
    settings = {}
    for line in cfg.priors:
        name, kind, *rest = line.split() + [""] * (2 - len(line.split()))
        try:
            settings[name] = quantile(kind, rest, uniform(name))
        except (ValueError, IndexError, statistics.StatisticsError, OverflowError):
            sys.exit(f"error: priors: '{line}' is not 'setting lognormal|int-lognormal|uniform|loguniform|"
                     "one-minus-loguniform a b' or 'setting choice a b ...'")
    if "batch_size" in settings:
        batch_size = settings["batch_size"]
        fitting = range(min(cfg.max_micro_batch, batch_size), 0, -1)
        settings["micro_batch_size"] = next(m for m in fitting if batch_size % m == 0)
    return settings


def quantile(kind, numbers, u):
    """The `u` quantile of a distribution."""
    if kind == "choice":
        return numbers[int(u * len(numbers))]
    a, b = map(float, numbers)
    if kind in ("lognormal", "int-lognormal"):
        x = math.exp(statistics.NormalDist(a, b).inv_cdf(u))
        return max(1, round(x)) if kind == "int-lognormal" else x
    if kind in ("loguniform", "one-minus-loguniform"):
        x = math.exp(math.log(a) + u * (math.log(b) - math.log(a)))
        return 1 - x if kind == "one-minus-loguniform" else x
    if kind != "uniform":
        raise ValueError
    return a + u * (b - a)


# --- a trial --------------------------------------------------------------------------------------

def arguments(cfg, settings, folder):
    """train.py or distill.py, and its arguments."""
    words = cfg.run.split()
    teachers = [w for w in words if not w.startswith("--") and not w.endswith(".py")]
    argv = [w for w in words if w not in teachers] + [f"--{k}={v}" for k, v in settings.items()]
    argv += [f"--out_dir={folder}", "--eval_interval=0"]
    return ("distill.py", [*argv, f"--teachers={','.join(teachers)}"]) if teachers else ("train.py", argv)


def resolve(cfg, settings, folder):
    script, argv = arguments(cfg, settings, folder)
    return configure(DistillConfig if script == "distill.py" else TrainConfig, argv)


def run_trial(cfg, trial, settings):
    """(state, best validation loss, the same in words) of a trial: a run of train.py or distill.py, watched
    through its metrics.jsonl."""
    folder = os.path.join(cfg.out_dir, hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:10])
    trial.set_user_attr("folder", folder)
    trial.set_user_attr("settings", settings)
    script, argv = arguments(cfg, settings, folder)
    shown = " ".join(f"{k}={short(v)}" for k, v in settings.items())
    print(f"\n=== trial {trial.number}: {shown}", flush=True)
    with open(f"{folder}.log", "a") as log:
        child = subprocess.Popen([sys.executable, os.path.join(ROOT, script), *argv, "--resume"],
                                 stdout=log, stderr=log, start_new_session=True)
        trial.set_user_attr("worker", [socket.gethostname(), os.getpid(), child.pid])
        try:
            pruned = watch(child, trial, folder)
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if child.returncode and not pruned:
        return "FAIL", None, f" failed with code {child.returncode}: {last_line(log.name)}"
    described = read_checkpoint_config(find_checkpoint(folder))
    for key in ("hardware", "git_revision"):
        trial.set_user_attr(key, described[key])
    best = min((val_ce for _, val_ce in validations(folder)), default=math.inf)
    if pruned:
        return "PRUNED", None, f": stopped early at validation loss {best:.4f}"
    return "COMPLETE", best, f": best validation loss {best:.4f}"


def watch(child, trial, folder):
    """Report a run's validation losses to the search until it ends; True if the search had it stopped."""
    seen, pruned = 0, False
    while True:
        ended = child.poll() is not None
        losses = validations(folder)
        for epoch, val_ce in losses[seen:]:
            trial.report(val_ce, max(1, math.ceil(epoch)))
            if not (pruned or ended) and trial.should_prune():
                pruned = True
                child.terminate()  # it saves and ends
        seen = len(losses)
        if ended:
            return pruned
        time.sleep(0.2)


def validations(folder):
    """[(epoch, validation loss)] of a run so far."""
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.isfile(path):
        return []
    with open(path, errors="replace") as f:
        rows = [parse_json(line) for line in f if line.endswith("}\n")]
    return [(row["epoch"], row["val_ce"]) for row in rows if "val_ce" in row]


def last_line(path):
    with open(path, errors="replace") as f:
        return (f.read().strip().splitlines() or [""])[-1]


def short(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def repeat_dead_trials(study):
    """Trials left running by a worker that died are put in line again; their runs are resumed."""
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name == "RUNNING" and not alive(trial):
            try:
                study.tell(trial.number, state=type(trial.state).FAIL)
            except ValueError:
                continue  # another worker was first
            if trial.params:
                study.enqueue_trial(trial.params)


def alive(trial):
    """Whether a trial's worker or its run lives: here by their processes, elsewhere by a line in its log
    within the hour."""
    host, *pids = trial.user_attrs.get("worker", ["", 0])
    if host == socket.gethostname():
        return any(map(lives, pids))
    log = trial.user_attrs.get("folder", "") + ".log"
    began = trial.datetime_start.timestamp()
    return time.time() - max(began, os.path.getmtime(log) if os.path.exists(log) else 0) < 3600


def lives(pid):
    try:
        os.kill(pid, 0)
        return pid > 0
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's


# --- what comes of it -----------------------------------------------------------------------------

def result_rows(cfg, study):
    """A row a trial that ended, the best first; those stopped early after those that were not."""
    ended = [trial for trial in trials(study, "COMPLETE", "PRUNED") if trial.intermediate_values]
    rows = []
    for trial in ended:
        attrs, complete = trial.user_attrs, trial.state.name == "COMPLETE"
        run_cfg = resolve(cfg, attrs["settings"], attrs["folder"])
        rows.append(dict(
            name=f"trial_{trial.number}", state=trial.state.name.lower(),
            val_ce=trial.value if complete else min(trial.intermediate_values.values()),
            epochs=max(trial.intermediate_values), folder=attrs["folder"], settings=attrs["settings"],
            seed=run_cfg.seed, data_sha256=study.user_attrs["data"], git_revision=attrs["git_revision"],
            hardware=attrs["hardware"]))
    return sorted(rows, key=lambda row: (row["state"] != "complete", row["val_ce"]))


def write_results(cfg, study):
    """results.jsonl, a line a trial, and best.py, the best one's settings as a config file. The rows."""
    rows = result_rows(cfg, study)
    write_lines(os.path.join(cfg.out_dir, "results.jsonl"), [json.dumps(row) + "\n" for row in rows])
    if rows and rows[0]["state"] == "complete":
        title = (f"# The best of {len(rows)} trials of a sweep: validation loss {rows[0]['val_ce']:.4f}, "
                 f"laid over\n#   {shlex.join(cfg.run.split())}\n")
        settings = [f"{key} = {value!r}\n" for key, value in rows[0]["settings"].items()]
        write_lines(os.path.join(cfg.out_dir, "best.py"), [title, *settings])
    return rows


def table(cfg, rows):
    names = names_drawn(cfg)
    print("\n| trial | validation loss | epochs run | " + " | ".join(names) + " |\n|---:|---:|---:|"
          + "---:|" * len(names))
    for row in rows[:10]:
        stopped = "" if row["state"] == "complete" else ", stopped"
        print(f"| {row['name']} | {row['val_ce']:.4f} | {row['epochs']}{stopped} | "
              + " | ".join(short(row["settings"][name]) for name in names) + " |")
    complete = any(row["state"] == "complete" for row in rows)
    print(f"{len(rows)} trials, {sum(row['state'] == 'pruned' for row in rows)} stopped early"
          + (f"; best settings in {os.path.join(cfg.out_dir, 'best.py')}" if complete else ""))
    if rows:
        point_out_others(rows)


if __name__ == "__main__":
    launch(main, SweepConfig)
