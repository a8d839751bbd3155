"""Hyper-parameter search (pip install optuna), by default over BabyLlama-2's published priors.

    python -m tools.sweep --run="config/llama_16m.py --data_dir=data/babylm --max_iters=2000" --n_trials=30
    CUDA_VISIBLE_DEVICES=1 python -m tools.sweep ...    # the same command again: one more worker
    python -m tools.sweep ... --blimp=blimp_filtered --test_loss    # also score the model of each trial
    python -m tools.sweep config/glue/sweep.py --run="config/glue/babyllama2.py --ckpt=out/a --tasks=rte,wsc"

A worker may also be on another machine that shares out_dir. Each trial draws settings, runs train.py
(distill.py, if the run line names teachers) with them, and is stopped early by Hyperband if its validation
losses are not among the better ones. The search is optuna's, its journal a file in out_dir: no server.
Repeat the command to go on; a trial that died is resumed. results.jsonl has a line a trial, best.py the best
settings as a config file.

A run line with --tasks is tools/finetune.py's: there is a search for each task, in a folder of its name, for
the score that the task reports, of the epoch that finetune.py chooses. What is drawn is a per_task line, in
the place of any that the run line's config has; best.py has the best line of each task.
"""
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from distill import DistillConfig
from lib import glue
from lib.checkpoints import find_checkpoint, load_ensemble, read_checkpoint_config
from lib.configurator import ROOT, configure, launch, need, read_config_file
from lib.files import git_revision, parse_json, regular, write_lines
from lib.machine import hardware, pick_device
from lib.shards import data_sha256, read_meta
from tools import finetune
from tools.study import Run, check_pairs, check_scored, differing, origin, point_out_others, score_run
from train import TrainConfig

# BabyLlama-2's sweep file: setting, distribution and its two numbers (mu and sigma of the natural logarithm
# for the log-normal ones), or choices
PRIORS = (
    "batch_size int-lognormal 5 1.5", "epochs int-lognormal 1.8 0.7", "learning_rate lognormal -7.3 0.7",
    "beta1 one-minus-loguniform 0.01 1", "beta2 one-minus-loguniform 0.0001 0.01",
    "adam_eps lognormal -13.8 3.5", "schedule choice linear cosine", "weight_decay lognormal 1 1.5",
    "grad_clip lognormal 0 1", "warmup_iters int-lognormal 5.7 1", "attn_dropout uniform 0 1")
DISTRIBUTIONS = ("lognormal", "int-lognormal", "uniform", "loguniform", "int-loguniform",
                 "one-minus-loguniform")
NOT_DRAWN = ("", "out_dir", "teachers", "resume", "overwrite", "eval_interval", "micro_batch_size")


@dataclass
class SweepConfig:
    run: str = ""                      # config files, flags and teachers of one run
    priors: tuple[str, ...] = PRIORS   # "setting distribution number number", "setting choice value ...";
                                       # for one task alone "rte setting ..."
    search: Literal["bayesian", "random"] = "bayesian"  # optuna's TPE, or draws from the priors alone
    n_trials: int = 30                 # of all workers together, those stopped early included; of each task
    min_epochs: int = 1                # Hyperband: no trial is stopped before
    reduction: int = 2                 # and one in so many goes on (eta); 1 = all do
    not_stopped: tuple[str, ...] = ()  # tasks of which no trial is stopped
    max_micro_batch: int = 64          # sequences at a time; the batch size drawn is split to fit
    blimp: tuple[str, ...] = ()        # folders of minimal pairs to score each trial's model on
    test_loss: bool = False            # also its loss on the test split
    eval_dtype: Literal["float32", "bfloat16"] = "float32"  # for eval_blimp.py
    out_dir: str = "out/sweep"


def main(cfg):
    check_sweep(cfg)
    sweeps = [(one, *identity(one)) for one in by_task(cfg)]  # mistakes show before anything is written
    pairs = check_pairs(cfg)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by a signal; the same command goes on"))
    for one, run_cfg, not_drawn, data in sweeps:
        study = open_search(one)
        refuse_another_sweep(one, study, data, run_cfg, not_drawn)
        run_trials(one, study)
        if cfg.blimp or cfg.test_loss:
            score_trials(one, study, pairs)
        table(one, study, write_results(one, study))
        if task_of(cfg):
            write_best_lines(cfg, sweeps)


def run_trials(cfg, study):
    import optuna
    repeat_dead_trials(study)
    failures = 0
    while len(trials(study, "COMPLETE", "PRUNED", "RUNNING")) < cfg.n_trials:
        trial = study.ask()
        trial.set_user_attr("worker", [socket.gethostname(), os.getpid(), os.getpid()])
        settings = drawn(cfg, lambda name: trial.suggest_float(name, 0.001, 0.999))
        state, score, outcome = run_trial(cfg, trial, settings)
        study.tell(trial, score, state=optuna.trial.TrialState[state])
        write_results(cfg, study)
        print(f"trial {trial.number}{outcome}")
        failures = failures + 1 if state == "FAIL" else 0
        if failures == 3:
            sys.exit("error: three trials failed one after the other, the reasons are above; the same "
                     "command goes on with the others")


def check_sweep(cfg):
    if not importlib.util.find_spec("optuna"):
        sys.exit("error: tools.sweep needs optuna: pip install optuna")
    need(cfg,
         run=(cfg.run.split(), "the config files and flags of a run"),
         priors=(not task_of(cfg) or cfg.priors != PRIORS, "others with --tasks: see config/glue/sweep.py"),
         n_trials=(cfg.n_trials, "at least 1"),
         min_epochs=(cfg.min_epochs, "at least 1"),
         reduction=(cfg.reduction, "at least 1"),
         max_micro_batch=(cfg.max_micro_batch, "at least 1"),
         out_dir=(cfg.out_dir, "a folder's name"),
         blimp=(not (task_of(cfg) and (cfg.blimp or cfg.test_loss)),
                "(), and test_loss False, with --tasks: no model is kept"))
    for one in by_task(cfg):
        names = names_drawn(one)
        for i, name in enumerate(names or [""]):
            if name in NOT_DRAWN or name in names[:i]:
                sys.exit(f"error: priors: '{name}' is no setting to draw, or stands there twice")


def names_drawn(cfg):
    return [line.split()[0] for line in cfg.priors if line.split()]


# --- pre-training and fine-tuning -----------------------------------------------------------------

class Goal(NamedTuple):
    """What a search is for: a number in those lines of a run's metrics.jsonl that have a validation."""
    score: str
    chosen_by: str  # a run's score is that of its line with the least of this
    direction: str
    title: str


def goal_of(cfg):
    if not (task := task_of(cfg)):
        return Goal("val_ce", "val_ce", "minimize", "validation loss")
    metric = glue.TASKS[task][2]
    return Goal(metric, "val_loss", "maximize", f"{task}'s {metric}")


def task_of(cfg):
    """The task that a run line of finetune.py names (several: with commas), '' = it is of pre-training."""
    return (re.findall(r"--tasks=(\S+)", cfg.run) or [""])[-1]


def by_task(cfg):
    """The sweep itself; of fine-tuning one for each task. Its own priors win over those for all tasks."""
    sweeps = []
    for task in dict.fromkeys(filter(None, task_of(cfg).split(","))):
        own = [line.split(maxsplit=1)[-1] for line in cfg.priors if line.split()[:1] == [task]]
        others = {"", *glue.TASKS, *(line.split()[0] for line in own)}
        shared = [line for line in cfg.priors if (line.split() or [""])[0] not in others]
        sweeps.append(replace(
            cfg, run=f"{cfg.run} --tasks={task}", priors=(*shared, *own),
            reduction=1 if task in cfg.not_stopped else cfg.reduction,
            out_dir=os.path.join(cfg.out_dir, task)))
    return sweeps or [cfg]


def identity(cfg):
    """A run's settings, those of them that no prior is for, and its data: what a sweep is known by."""
    middle = drawn(cfg, lambda name: 0.5)
    run_cfg = resolve(cfg, middle, "none")
    if task := task_of(cfg):
        models, tokenizer, _ = load_ensemble(run_cfg.ckpt, torch.device("cpu"))
        finetune.look_ahead(run_cfg, [(task, run_cfg)], tokenizer, [model.cfg for model in models])
        known = finetune.origin_of(run_cfg, task)
        settings, data = known["settings"], known["inputs_sha256"]
    else:
        meta = read_meta(run_cfg.data_dir)
        check_scored(cfg, cfg.run, run_cfg, meta)
        settings, data = origin(run_cfg), data_sha256(meta)
    return run_cfg, {key: value for key, value in settings.items() if key not in middle}, data


def arguments(cfg, settings, folder):
    """What runs a trial, a script or a tool, and its arguments."""
    words, flags = cfg.run.split(), [f"--{k}={v}" for k, v in settings.items()]
    where = [f"--out_dir={folder}", "--eval_interval=0"]
    if task_of(cfg):
        return ["-m", "tools.finetune"], [*words, f"--per_task={per_task(cfg, settings)}", *where]
    teachers = [w for w in words if not w.startswith("--") and not w.endswith(".py")]
    argv = [w for w in words if w not in teachers] + flags + where
    if teachers:
        return [os.path.join(ROOT, "distill.py")], [*argv, f"--teachers={','.join(teachers)}"]
    return [os.path.join(ROOT, "train.py")], argv


def per_task(cfg, settings):
    """Settings as finetune.py's line for the task."""
    return " ".join([task_of(cfg), *(f"--{k}={v}" for k, v in settings.items())])


def resolve(cfg, settings, folder):
    """What a trial's arguments come to."""
    script, argv = arguments(cfg, settings, folder)
    if not task_of(cfg):
        return configure(DistillConfig if script[0].endswith("distill.py") else TrainConfig, argv)
    run_cfg = configure(finetune.FinetuneConfig, argv)
    finetune.check(run_cfg)
    need(run_cfg, seeds=(len(run_cfg.seeds) == 1, "one alone in a sweep"))
    return finetune.task_config(run_cfg, task_of(cfg), *run_cfg.seeds)


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
    pruner = optuna.pruners.NopPruner() if cfg.reduction == 1 else optuna.pruners.HyperbandPruner(
        min_resource=cfg.min_epochs, max_resource="auto", reduction_factor=cfg.reduction)
    try:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(journal))
        return optuna.create_study(
            storage=storage, study_name="sweep", sampler=samplers[cfg.search](),  # every worker draws its own
            pruner=pruner, direction=goal_of(cfg).direction, load_if_exists=True)
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
            sys.exit(f"error: priors: '{line}' is not 'setting {'|'.join(DISTRIBUTIONS)} a b' or 'setting "
                     "choice a b ...'")
    if task_of(cfg):
        if settings.get("schedule") == "constant" and "warmup_iters" in settings:
            settings["warmup_iters"] = 0  # Hugging Face's schedule of this name has none
    elif re.fullmatch("[1-9][0-9]*", str(settings.get("batch_size", ""))):  # of others configure() tells
        batch_size = int(settings["batch_size"])
        fitting = range(min(cfg.max_micro_batch, batch_size), 0, -1)
        settings["micro_batch_size"] = next(m for m in fitting if batch_size % m == 0)
    return settings


def quantile(kind, numbers, u):
    """The `u` quantile of a distribution."""
    if kind == "choice":
        return numbers[int(u * len(numbers))]
    a, b = map(float, numbers)
    if kind not in DISTRIBUTIONS:
        raise ValueError
    if kind == "uniform":
        return a + u * (b - a)
    if kind.endswith("lognormal"):
        x = math.exp(statistics.NormalDist(a, b).inv_cdf(u))
    else:
        x = math.exp(math.log(a) + u * (math.log(b) - math.log(a)))
    if kind.startswith("int-"):
        return max(1, round(x))
    return 1 - x if kind.startswith("one-minus-") else x


# --- a trial --------------------------------------------------------------------------------------

def run_trial(cfg, trial, settings):
    """(state, score, the same in words) of a trial: a run of its script, watched through its
    metrics.jsonl."""
    folder = os.path.join(cfg.out_dir, hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:10])
    trial.set_user_attr("folder", folder)
    trial.set_user_attr("settings", settings)
    script, argv = arguments(cfg, settings, folder)
    run_cfg, goal = resolve(cfg, settings, folder), goal_of(cfg)
    goes_on = [] if task_of(cfg) else ["--resume"]  # finetune.py does so by itself
    shown = " ".join(f"{k}={short(v)}" for k, v in settings.items())
    print(f"\n=== trial {trial.number}: {shown}", flush=True)
    with open(f"{folder}.log", "a") as log:
        child = subprocess.Popen([sys.executable, *script, *argv, *goes_on],
                                 stdout=log, stderr=log, start_new_session=True)
        trial.set_user_attr("worker", [socket.gethostname(), os.getpid(), child.pid])
        try:
            pruned = watch(child, trial, run_cfg, goal.score)
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if child.returncode and not pruned:
        return "FAIL", None, f" failed with code {child.returncode}: {last_line(log.name)}"
    if task_of(cfg):  # which leaves no checkpoint that says
        described = dict(git_revision=git_revision(), hardware=hardware(pick_device(run_cfg.device)))
    else:
        described = read_checkpoint_config(find_checkpoint(folder))
    for key in ("hardware", "git_revision"):
        trial.set_user_attr(key, described[key])
    rows = validations(run_cfg.out_dir)
    score = min(rows, key=lambda row: row[goal.chosen_by])[goal.score]
    if pruned:
        return "PRUNED", None, f": stopped early, {goal.title} {score:.4f}"
    return "COMPLETE", score, f": {goal.title} {score:.4f}"


def watch(child, trial, run_cfg, score):
    """Report a run's scores to the search until it ends; True if the search had it stopped."""
    seen, pruned = 0, False
    while True:
        ended = child.poll() is not None
        rows = validations(run_cfg.out_dir)
        for row in rows[seen:]:
            trial.report(row[score], max(1, math.ceil(row["epoch"])))
            over = ended or row["epoch"] >= run_cfg.epochs or row["step"] == run_cfg.max_iters
            if not (pruned or over) and trial.should_prune():
                pruned = True
                child.terminate()  # it saves and ends
        seen = max(seen, len(rows))  # finetune.py begins a killed run anew
        if ended:
            return pruned
        time.sleep(0.2)


def validations(folder):
    """The lines of a run's metrics.jsonl, so far, that have a validation."""
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.isfile(path):
        return []
    with open(path, errors="replace") as f:
        rows = [parse_json(line) for line in f if line.endswith("}\n")]
    return [row for row in rows if "val_ce" in row]


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
    goal, scored = goal_of(cfg), study.user_attrs
    best, sign = (max, -1) if goal.direction == "maximize" else (min, 1)
    rows = []
    for trial in ended(study):
        attrs, complete = trial.user_attrs, trial.state.name == "COMPLETE"
        run_cfg = resolve(cfg, attrs["settings"], attrs["folder"])
        score = trial.value if complete else best(trial.intermediate_values.values())
        rows.append({
            "name": f"trial_{trial.number}", "state": trial.state.name.lower(), goal.score: score,
            "epochs": max(trial.intermediate_values), "folder": attrs["folder"],
            "settings": attrs["settings"], "seed": run_cfg.seed, "data_sha256": scored["data"],
            "git_revision": attrs["git_revision"], "hardware": attrs["hardware"],
            **scored.get(f"scores_{trial.number}", {})})
    return sorted(rows, key=lambda row: (row["state"] != "complete", sign * row[goal.score]))


def ended(study):
    return [trial for trial in trials(study, "COMPLETE", "PRUNED") if trial.intermediate_values]


def write_results(cfg, study):
    """results.jsonl, a line a trial, and best.py, the best one's settings as a config file. The rows."""
    rows, goal = result_rows(cfg, study), goal_of(cfg)
    write_lines(os.path.join(cfg.out_dir, "results.jsonl"), [json.dumps(row) + "\n" for row in rows])
    if rows and rows[0]["state"] == "complete":
        title = (f"# The best of {len(rows)} trials of a sweep: {goal.title} {rows[0][goal.score]:.4f}, "
                 f"laid over\n#   {shlex.join(cfg.run.split())}\n")
        best = rows[0]["settings"]
        settings = dict(per_task=[per_task(cfg, best)]) if task_of(cfg) else best
        write_lines(os.path.join(cfg.out_dir, "best.py"),
                    [title, *(f"{key} = {value!r}\n" for key, value in settings.items())])
    return rows


def write_best_lines(cfg, sweeps):
    """best.py of all tasks: their best lines, as far as there are."""
    paths = [os.path.join(one.out_dir, "best.py") for one, *_ in sweeps]
    lines = [line for path in filter(os.path.isfile, paths) for line in read_config_file(path)["per_task"]]
    write_lines(os.path.join(cfg.out_dir, "best.py"), [
        f"# The best of a sweep for each task, laid over\n#   {shlex.join(cfg.run.split())}\n",
        "per_task = [\n", *(f"    {line!r},\n" for line in lines), "]\n"])


def table(cfg, study, rows):
    names = names_drawn(cfg)
    goal = goal_of(cfg)
    print(f"\n| trial | {goal.title} | epochs run | " + " | ".join(names) + " |\n|---:|---:|---:|"
          + "---:|" * len(names))
    for row in rows[:10]:
        stopped = "" if row["state"] == "complete" else ", stopped"
        print(f"| {row['name']} | {row[goal.score]:.4f} | {row['epochs']}{stopped} | "
              + " | ".join(short(row["settings"][name]) for name in names) + " |")
    complete = any(row["state"] == "complete" for row in rows)
    print(f"{len(rows)} trials, {sum(row['state'] == 'pruned' for row in rows)} stopped early"
          + (f"; best settings in {os.path.join(cfg.out_dir, 'best.py')}" if complete else ""))
    if rows:
        point_out_others(rows)
    for trial in trials(study, "RUNNING"):
        host = trial.user_attrs.get("worker", ["?"])[0]
        print(f"notice: trial {trial.number} is still running on {host}; if it is dead, the same command "
              "takes it up an hour after its last line")


def score_trials(cfg, study, pairs):
    """Score the models of the trials that ended, those stopped early too, and keep that with the sweep. The
    rows of results.jsonl are then tools/study.py's too, for tools/plot.py --scatter."""
    for trial in ended(study):
        key = f"scores_{trial.number}"
        there = study.user_attrs.get(key)
        if there and there["pairs_sha256"] == pairs and not (cfg.test_loss and there["test_ce"] is None):
            continue
        folder, settings = trial.user_attrs["folder"], trial.user_attrs["settings"]
        script, argv = arguments(cfg, settings, folder)
        run = Run(name=f"trial_{trial.number}", recipe="sweep", study_seed="", folder=folder,
                  kind=os.path.basename(script[0]), argv=argv, cfg=resolve(cfg, settings, folder),
                  scored=[folder], needs=[], settings=settings, data_sha256=study.user_attrs["data"])
        print(f"\n=== {run.name}", flush=True)
        study.set_user_attr(key, dict(score_run(cfg, run, pairs), recipe=run.recipe))


if __name__ == "__main__":
    launch(main, SweepConfig)
