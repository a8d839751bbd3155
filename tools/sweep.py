"""Hyper-parameter search (pip install optuna), by default over BabyLlama-2's published priors.

    python -m tools.sweep --run="config/llama_16m.py --data_dir=data/babylm --max_iters=2000" --n_trials=30
    CUDA_VISIBLE_DEVICES=1 python -m tools.sweep ...    # the same command again: one more worker, here or on a machine that shares out_dir

Each trial draws settings, runs train.py (distill.py, if the run line names teachers) with them, and is stopped
early by Hyperband if its validation losses are not among the better ones. The search is optuna's, its journal a
file in out_dir: no server. Repeat the command to go on; a trial that died is resumed. results.jsonl has a line a
trial, best.py the best settings as a config file.
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

import config
import disk
from distill import DistillConfig
from study import point_out_others, settings_sha256
from train import TrainConfig

# setting, distribution and its two numbers (mu and sigma of the natural logarithm for the log-normal ones), or choices.
# Those of BabyLlama-2's sweep file.
PRIORS = (
    "batch_size int-lognormal 5 1.5", "epochs int-lognormal 1.8 0.7", "learning_rate lognormal -7.3 0.7",
    "beta1 one-minus-loguniform 0.01 1", "beta2 one-minus-loguniform 0.0001 0.01", "adam_eps lognormal -13.8 3.5",
    "schedule choice linear cosine", "weight_decay lognormal 1 1.5", "grad_clip lognormal 0 1", "warmup_iters int-lognormal 5.7 1",
    "attn_dropout uniform 0 1")


@dataclass
class SweepConfig:
    run: str = ""                      # config files, flags and teachers of one run
    priors: tuple[str, ...] = PRIORS   # "setting distribution number number", or "setting choice value value ..."
    search: Literal["bayesian", "random"] = "bayesian"  # optuna's TPE, or draws from the priors alone
    n_trials: int = 30                 # of all workers together, those stopped early included
    min_epochs: int = 1                # Hyperband: no trial is stopped before
    reduction: int = 2                 # and one in so many goes on (eta)
    max_micro_batch: int = 64          # sequences at a time; the batch size drawn is split to fit
    out_dir: str = "out/sweep"


def main(cfg):
    if not importlib.util.find_spec("optuna"):
        sys.exit("error: sweep.py needs optuna: pip install optuna")
    for key, good, wanted in (("run", cfg.run.split(), "the config files and flags of a run"), ("n_trials", cfg.n_trials, "at least 1"),
                              ("min_epochs", cfg.min_epochs, "at least 1"), ("reduction", cfg.reduction > 1, "at least 2"),
                              ("max_micro_batch", cfg.max_micro_batch, "at least 1"), ("out_dir", cfg.out_dir, "a folder's name")):
        if not good:
            sys.exit(f"error: {key}={getattr(cfg, key)!r} must be {wanted}")
    for i, name in enumerate(names := [line.split()[0] for line in cfg.priors if line.split()] or [""]):
        if name in ("", "out_dir", "teachers", "resume", "overwrite", "eval_interval", "micro_batch_size") or name in names[:i]:
            sys.exit(f"error: priors: '{name}' is no setting to draw, or stands there twice")
    run = resolve(cfg, drawn(cfg, lambda name: 0.5), "none")  # mistakes in the priors and the run line show before anything is written
    what = dict(priors=list(cfg.priors), search=[cfg.search, cfg.min_epochs, cfg.reduction], data=disk.data_sha256(disk.read_meta(run.data_dir)), settings=settings_sha256(run))
    import optuna
    os.makedirs(cfg.out_dir, exist_ok=True)
    journal = os.path.join(cfg.out_dir, "journal.log")
    if os.path.exists(os.path.join(cfg.out_dir, "results.jsonl")) and not os.path.exists(journal):
        sys.exit(f"error: {cfg.out_dir} holds a study; name another --out_dir")
    if os.path.exists(journal) and not ends_in_a_line(journal):
        sys.exit(f"error: {journal} ends in half a line: a worker died while writing it; delete that half, no trial is lost")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(journal))
    sampler = (optuna.samplers.TPESampler if cfg.search == "bayesian" else optuna.samplers.RandomSampler)()  # every worker draws its own
    pruner = optuna.pruners.HyperbandPruner(min_resource=cfg.min_epochs, max_resource="auto", reduction_factor=cfg.reduction)
    study = optuna.create_study(storage=storage, study_name="sweep", sampler=sampler, pruner=pruner, direction="minimize", load_if_exists=True)
    for key, value in what.items():
        if study.user_attrs.setdefault(key, value) != value:
            sys.exit(f"error: the sweep in {cfg.out_dir} was begun with other {key}; name another --out_dir")
        study.set_user_attr(key, value)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by a signal; the same command goes on"))
    repeat_dead_trials(study)
    failures = 0
    while sum(t.state.name in ("COMPLETE", "PRUNED", "RUNNING") for t in study.get_trials(deepcopy=False)) < cfg.n_trials:
        trial = study.ask()
        trial.set_user_attr("worker", [socket.gethostname(), os.getpid(), os.getpid()])
        settings = drawn(cfg, lambda name: trial.suggest_float(name, 0.001, 0.999))
        state, value = run_trial(cfg, trial, settings, optuna.trial.TrialState)
        study.tell(trial, value, state=state)
        write_results(cfg, study)
        failures = failures + 1 if state.name == "FAIL" else 0
        if failures == 3:
            sys.exit("error: three trials failed one after the other, the reasons are above; the same command goes on with the others")
    table(cfg, write_results(cfg, study))
    for t in study.get_trials(deepcopy=False):
        if t.state.name == "RUNNING":
            print(f"notice: trial {t.number} is still running on {t.user_attrs.get('worker', ['?'])[0]}; if it is dead, the same command takes it up an hour after its last line")


def drawn(cfg, uniform):
    """Settings from `uniform(name)` numbers in (0, 1): the quantiles of the priors."""
    settings = {}
    for line in cfg.priors:
        name, kind, *rest = line.split() + [""] * 2
        rest = [r for r in rest if r]
        try:
            u = uniform(name)
            if kind == "choice":
                settings[name] = rest[int(u * len(rest))]
            else:
                a, b = map(float, rest)
                if kind in ("lognormal", "int-lognormal"):
                    x = math.exp(statistics.NormalDist(a, b).inv_cdf(u))
                elif kind in ("uniform", "loguniform", "one-minus-loguniform"):
                    x = a + u * (b - a) if kind == "uniform" else math.exp(math.log(a) + u * (math.log(b) - math.log(a)))
                else:
                    raise ValueError
                settings[name] = max(1, round(x)) if kind.startswith("int") else 1 - x if kind.startswith("one-minus") else x
        except (ValueError, IndexError, statistics.StatisticsError, OverflowError):
            sys.exit(f"error: priors: '{line}' is not 'setting lognormal|int-lognormal|uniform|loguniform|one-minus-loguniform a b' or 'setting choice a b ...'")
    if "batch_size" in settings:
        settings["micro_batch_size"] = next(m for m in range(min(cfg.max_micro_batch, settings["batch_size"]), 0, -1) if settings["batch_size"] % m == 0)
    return settings


def arguments(cfg, settings, folder):
    """train.py or distill.py, and its arguments."""
    words = cfg.run.split()
    teachers = [w for w in words if not w.startswith("--") and not w.endswith(".py")]
    argv = [w for w in words if w not in teachers] + [f"--{k}={v}" for k, v in settings.items()] + [f"--out_dir={folder}", "--eval_interval=0"]
    return "distill.py" if teachers else "train.py", argv + ([f"--teachers={','.join(teachers)}"] if teachers else [])


def resolve(cfg, settings, folder):
    script, argv = arguments(cfg, settings, folder)
    return config.configure(DistillConfig if script == "distill.py" else TrainConfig, argv)


def run_trial(cfg, trial, settings, states):
    """(state, best validation loss) of a trial: a run of train.py or distill.py, watched through its metrics.jsonl."""
    folder = os.path.join(cfg.out_dir, hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:10])
    trial.set_user_attr("folder", folder)
    trial.set_user_attr("settings", settings)
    script, argv = arguments(cfg, settings, folder)
    here = os.path.dirname(os.path.abspath(__file__))
    print(f"\n=== trial {trial.number}: " + " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items()), flush=True)
    with open(os.path.join(cfg.out_dir, f"{os.path.basename(folder)}.log"), "a") as log:
        child = subprocess.Popen([sys.executable, os.path.join(here, script), *argv, "--resume"], stdout=log, stderr=log, start_new_session=True)
        trial.set_user_attr("worker", [socket.gethostname(), os.getpid(), child.pid])
        seen, pruned = 0, False
        try:
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
                    break
                time.sleep(0.2)
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if child.returncode and not pruned:
        print(f"trial {trial.number} failed with code {child.returncode}: {last_line(log.name)}")
        return states.FAIL, None
    described = disk.read_checkpoint_config(disk.find_checkpoint(folder))
    for key in ("hardware", "git_revision"):
        trial.set_user_attr(key, described[key])
    best = min((val_ce for _, val_ce in losses), default=math.inf)
    print(f"trial {trial.number}: {'stopped early at' if pruned else 'best'} validation loss {best:.4f}")
    return (states.PRUNED, None) if pruned else (states.COMPLETE, best)


def validations(folder):
    """[(epoch, validation loss)] of a run so far."""
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.isfile(path):
        return []
    with open(path, errors="replace") as f:
        rows = [json.loads(line) for line in f if line.endswith("}\n")]
    return [(row["epoch"], row["val_ce"]) for row in rows if "val_ce" in row]


def last_line(path):
    with open(path, errors="replace") as f:
        return (f.read().strip().splitlines() or [""])[-1]


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
    """Whether a trial's worker or its run lives: here by their processes, elsewhere by a line in its log within the hour."""
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


def ends_in_a_line(path):
    with open(path, "rb") as f:
        f.seek(0, os.SEEK_END)
        f.seek(max(f.tell() - 1, 0))
        return f.read() in (b"", b"\n")


# --- what comes of it -------------------------------------------------------------------------------

def result_rows(cfg, study):
    """A row a trial that ended, the best first; those stopped early after those that were not."""
    done = [t for t in study.get_trials(deepcopy=False) if t.state.name in ("COMPLETE", "PRUNED") and t.intermediate_values]
    best = lambda t: t.value if t.state.name == "COMPLETE" else min(t.intermediate_values.values())
    done.sort(key=lambda t: (t.state.name != "COMPLETE", best(t)))
    rows = []
    for t in done:
        own = t.user_attrs
        run = resolve(cfg, own["settings"], own["folder"])
        rows.append(dict(name=f"trial_{t.number}", state=t.state.name.lower(), val_ce=best(t), epochs=max(t.intermediate_values),
                         folder=own["folder"], settings=own["settings"], seed=run.seed, settings_sha256=settings_sha256(run),
                         data_sha256=study.user_attrs["data"], git_revision=own["git_revision"], hardware=own["hardware"]))
    return rows


def write_results(cfg, study):
    """results.jsonl, a line a trial, and best.py, the best one's settings as a config file. Returns the rows."""
    rows = result_rows(cfg, study)
    disk.write_lines(os.path.join(cfg.out_dir, "results.jsonl"), [json.dumps(row) + "\n" for row in rows])
    if rows and rows[0]["state"] == "complete":
        title = f"# The best of {len(rows)} trials of a sweep: validation loss {rows[0]['val_ce']:.4f}, laid over\n#   {shlex.join(cfg.run.split())}\n"
        disk.write_lines(os.path.join(cfg.out_dir, "best.py"), [title, *(f"{k} = {v!r}\n" for k, v in rows[0]["settings"].items())])
    return rows


def table(cfg, rows):
    names = [line.split()[0] for line in cfg.priors]
    print("\n| trial | validation loss | epochs run | " + " | ".join(names) + " |\n|---:|---:|---:|" + "---:|" * len(names))
    for row in rows[:10]:
        s = row["settings"]
        print(f"| {row['name']} | {row['val_ce']:.4f} | {row['epochs']}{'' if row['state'] == 'complete' else ', stopped'} | "
              + " | ".join(f"{s[n]:.3g}" if isinstance(s[n], float) else str(s[n]) for n in names) + " |")
    print(f"{len(rows)} trials, {sum(row['state'] == 'pruned' for row in rows)} stopped early"
          + (f"; best settings in {os.path.join(cfg.out_dir, 'best.py')}" if any(row["state"] == "complete" for row in rows) else ""))
    if rows:
        point_out_others(rows)


if __name__ == "__main__":
    config.run(main, SweepConfig)
