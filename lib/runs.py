"""The keeper of a run: what happens between its steps, what it leaves in its folder, how it goes on from
there.

cfg is a TrainConfig, machine a Machine, data Chunks, trainee and optimizers what train.py's loop trains.
"""
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from tqdm import tqdm

from lib.checkpoints import (
    COUNTERS,
    RUN_FILES,
    checkpoint_steps,
    delete_run,
    drop_old_checkpoints,
    find_checkpoint,
    find_resumable,
    last_checkpoint,
    load_checkpoint,
    load_state,
    point_to,
    remove_folder,
    save_checkpoint,
    sweep,
    weights_sha256,
)
from lib.configurator import differences
from lib.costs import training_bytes
from lib.data import evaluate
from lib.files import check_writable, git_revision, lock, read_json, write_json
from lib.machine import catch_signals, hardware, mean_over_ranks, release_signals
from lib.shards import data_sha256


class Keeper:
    """Of a pre-training run. That of tools/finetune.py announces, validates, saves and ends otherwise."""

    measure = "validation loss (nats per token)"  # what the best checkpoint has least of
    stopped = "and saved; go on with --resume"

    def __init__(self, cfg, machine, data, about=()):
        """Hold out_dir from here on, and decide whether there is a run to go on with."""
        self.cfg, self.machine, self.data = cfg, machine, data
        self.about = dict(about)  # what every checkpoint's config.json says beside what `describe` knows
        self.first_record = {}  # step 0 of metrics.jsonl
        self.best, self.best_step = math.inf, 0
        self.git_revision = git_revision()  # of the code that runs; what is there when it saves may be other
        self.waited = 0         # validations since the best was clearly beaten
        self.metrics = None     # until there is something to do
        if machine.rank == 0:
            os.makedirs(cfg.out_dir, exist_ok=True)
            lock(cfg.out_dir)
            refuse_out_dir(cfg)  # again: another process may have been here since `start` looked
            check_writable(os.path.join(cfg.out_dir, "train_config.json"))
            sweep(cfg.out_dir)
        if machine.world > 1:
            dist.barrier()
        if cfg.resume and not checkpoint_steps(cfg.out_dir):
            cfg.resume, cfg.overwrite = False, True  # what is there is of a run that died before its first
            if machine.rank == 0:
                print(f"notice: {cfg.out_dir} has no checkpoint yet: starting at step 0")

    def begin(self, trainee, optimizers, guard):
        """The step to begin with; what is trained is as it was then."""
        cfg, machine, data = self.cfg, self.machine, self.data
        self.trainee, self.optimizers, self.guard = trainee, optimizers, guard
        if getattr(cfg, "init_from", "") and not cfg.resume:
            self.about["init_from_sha256"] = weights_sha256(cfg.init_from)
        step = self.resume() if cfg.resume else 0
        if mean_over_ranks(torch.tensor(float(step)).to(machine.device), machine) != step:
            sys.exit(f"error: rank {machine.rank} finds step {step} in {cfg.out_dir}, others another: all "
                     "machines need the same folder")
        if not self.wants(step):
            if machine.rank == 0:
                print(f"nothing to do: {cfg.out_dir} is at step {step} of {data.total}; raise --max_iters, "
                      "--epochs or --patience for more")
            return step
        self.metrics = Metrics(cfg, machine, step, self.first_record)
        self.announce()
        self.signals = catch_signals()
        self.bar = tqdm(total=data.total, initial=step, disable=machine.rank > 0 or not sys.stderr.isatty(),
                        dynamic_ncols=True)
        self.clock, self.clock_seen = time.perf_counter(), data.seen(step)
        return step

    def wants(self, step):
        """True if another step is to come after `step`."""
        return step < self.data.total and not 0 < self.cfg.patience <= self.waited

    def due(self, step):
        """True if it is time to validate."""
        interval, data = self.cfg.eval_interval, self.data
        return step == data.total or (step % interval == 0 if interval else data.epoch(step) % 1 == 0)

    def after_step(self, step, sums, lr, grad_norm):
        """Log, validate, save or stop, where it is time: only there the host waits for the device."""
        cfg, data = self.cfg, self.data
        self.bar.update()
        end = step == data.total
        validates = self.due(step)
        mark = word_mark(cfg, data, step) if getattr(cfg, "keep_words", False) else ""
        asked, record = bool(self.signals), {}  # ranks agree on a signal where they meet anyway
        if validates or mark or step % cfg.log_interval == 0:
            record, asked = self.record(step, sums, lr, grad_norm, asked)
            if validates:
                record.update(self.judged(step))
            self.metrics.log(record, self.bar)
        stop = asked and (record or self.machine.world == 1) and not end
        if stop and not record and cfg.not_finite == "stop":
            self.guard.report()
        if mark and self.machine.rank == 0:
            described = self.describe(step, record.get("val_ce"))
            save_checkpoint(cfg.out_dir, mark, self.trainee.student, described, self.data.shards.tokenizer)
        if validates or stop:
            self.save(step, record.get("val_ce"))
        if record:
            self.clock, self.clock_seen = time.perf_counter(), data.seen(step)
        if stop:
            self.bar.close()
            sys.exit(f"stopped by a signal at step {step} of {data.total} {self.stopped}"
                     if self.machine.rank == 0 else 1)

    def record(self, step, sums, lr, grad_norm, asked):
        """A line of metrics.jsonl, means over the ranks, and whether any rank was asked to stop."""
        data, unit = self.data, self.data.unit
        asked = torch.tensor(float(asked), device=self.machine.device)
        *values, asked = mean_over_ranks(torch.stack([*sums.values(), asked]), self.machine).tolist()
        seconds, seen = time.perf_counter() - self.clock, data.seen(step)
        return {"step": step, "epoch": round(data.epoch(step), 4), unit: seen, **dict(zip(sums, values)),
                "lr": lr, "grad_norm": grad_norm.item(), **self.guard.report(),
                f"{unit}_per_s": round((seen - self.clock_seen) / seconds)}, asked

    def judged(self, step):
        """The validation's part of a record; remembers the best."""
        value, measured = self.validate()
        if not math.isfinite(value):
            sys.exit(f"error: the validation loss is not finite at step {step}; the last good checkpoint is "
                     f"{last_checkpoint(self.cfg.out_dir)}")
        self.waited = 0 if value < self.best - 0.001 else self.waited + 1
        if value < self.best:
            self.best, self.best_step = value, step
        return measured

    def validate(self):
        """What the best checkpoint has least of, and what is logged."""
        student = self.trainee.student.eval()
        val_ce = evaluate(lambda batch: student(batch.x), self.data.val, self.cfg, self.machine)
        student.train()
        return val_ce, dict(val_ce=val_ce)

    def save(self, step, val_ce):
        """Checkpoint, last.json, best.json if this is the best, in this order; older folders go last.
        val_ce is None where a signal cut the run short between two validations."""
        out_dir, name = self.cfg.out_dir, f"ckpt_{step}"
        if self.machine.rank == 0:
            counters = dict(zip(COUNTERS, (step, self.best, self.best_step, self.waited)))
            tensors, optimizers = resumable(self.trainee, self.optimizers)
            counters.update(self.guard.state(), **optimizers)
            save_checkpoint(out_dir, name, self.trainee.student, self.describe(step, val_ce),
                            self.data.shards.tokenizer, state=(tensors, counters))
            point_to(out_dir, "last.json", name, step, val_ce)
            if self.best_step == step:
                point_to(out_dir, "best.json", name, step, val_ce)
            drop_old_checkpoints(out_dir)
        if self.machine.world > 1:
            dist.barrier()

    def describe(self, step, val_ce):
        """What a checkpoint's config.json says."""
        model, meta = self.trainee.student, self.data.meta
        return dict(model=asdict(model.cfg), parameters=model.n_params(), step=step, val_ce=val_ce,
                    tokenizer=meta["tokenizer"], tokenizer_sha256=meta["tokenizer_sha256"],
                    bos=meta["options"]["bos"], data_sha256=data_sha256(meta),
                    val_sha256=data_sha256(meta, "val"), words=train_words(self.data),
                    git_revision=self.git_revision, torch=torch.__version__,
                    hardware=hardware(self.machine.device), **arithmetic(self.machine),
                    train_config=asdict(self.cfg), **self.about)

    def announce(self):
        """One line each: parameters, tokens per epoch, steps, estimated memory."""
        cfg, machine, data, model = self.cfg, self.machine, self.data, self.trainee.student
        if machine.rank > 0:
            return
        n = model.n_params()
        print(f"parameters: {n:,} ({cfg.arch})")
        print(f"tokens per epoch: {(data.starts[-1] - data.starts[-2]) * cfg.batch_size * cfg.seq_len:,}"
              + " at the end" * bool(cfg.curriculum))
        print(f"steps: {data.total:,} of {cfg.batch_size} x {cfg.seq_len} tokens, "
              f"{data.epoch(data.total):.2f} epochs")
        if cfg.max_iters > data.total:
            print(f"notice: max_iters={cfg.max_iters}, but {cfg.epochs} epochs have {data.total} steps; "
                  "raise --epochs")
        memory = training_bytes(cfg, machine, n) / 2 ** 30
        print(f"memory, estimated: {memory:.2f} GiB for the model trained; ranks: {machine.world}, "
              f"{machine.device}, {str(machine.dtype).removeprefix('torch.')}, "
              f"{'compiled' if machine.compile else 'not compiled'}", flush=True)

    def finish(self, step):
        """After the last step."""
        if not self.metrics:
            return
        self.bar.close()
        release_signals()
        self.metrics.finish()
        if self.machine.rank == 0:
            early = step < self.data.total
            print(f"done: {self.cfg.out_dir}, best {self.measure} {self.best:.4f} at step {self.best_step}"
                  + f" (stopped early: {self.waited} validations without a gain of 0.001)" * early)
        if self.signals:
            self.interrupted()

    def interrupted(self):
        """A signal came too late to stop the run."""
        sys.exit(f"a signal came at the end: {self.cfg.out_dir} is complete" if self.machine.rank == 0 else 1)

    # --- going on with a run ---

    def resume(self):
        """Put the last checkpoint of out_dir into what is trained; the step it was saved after."""
        folder = find_resumable(self.cfg.out_dir)
        saved, _, described = load_checkpoint(folder)
        refuse_another_run(self.cfg, self.data, folder, self.trainee.student, saved, described)
        if self.machine.rank == 0:
            point_out_changes(self.cfg, described, self.about, self.machine)
        if "init_from_sha256" in described:
            self.about["init_from_sha256"] = described["init_from_sha256"]
        tensors, counters = load_state(folder)
        restore(self.trainee, self.optimizers, saved, tensors, counters, folder)
        step, self.best, self.best_step, self.waited = (counters[key] for key in COUNTERS)
        self.guard.restore(counters)
        self.settle_best(step)
        return step

    def settle_best(self, last_step):
        """Decide on the best checkpoint up to the step resumed from. best.json may name an older one, where
        a run died between its two pointers; or one that is gone or will be trained again, where the user
        deleted a damaged one."""
        out_dir, val_ce = self.cfg.out_dir, {}
        for step in checkpoint_steps(out_dir):
            if step <= last_step:
                config = os.path.join(out_dir, f"ckpt_{step}", "config.json")
                val_ce[step] = read_json(config, ("val_ce",))["val_ce"]
        val_ce = {step: value for step, value in val_ce.items() if value is not None}
        if self.best_step not in val_ce:
            self.best_step, self.waited = min(val_ce, key=val_ce.get, default=0), 0
            self.best = val_ce.get(self.best_step, math.inf)
        if self.machine.rank > 0:
            return
        for name in os.listdir(out_dir):  # of steps that will be trained again
            config = os.path.join(out_dir, name, "config.json")
            if re.fullmatch(r"chck_\d+M", name) and read_json(config, ("step",))["step"] > last_step:
                remove_folder(os.path.join(out_dir, name))
        if val_ce:
            point_to(out_dir, "best.json", f"ckpt_{self.best_step}", self.best_step, self.best)
        elif os.path.exists(os.path.join(out_dir, "best.json")):
            os.remove(os.path.join(out_dir, "best.json"))


# --- what is trained, as tensors by name ----------------------------------------------------------

def named(trainee):
    """(name, parameter) of what is trained: the student's under their own names, those of what is trained
    beside it as 'companion. ...'."""
    return [(name.removeprefix("student."), p) for name, p in trainee.named_parameters()]


def resumable(trainee, optimizers):
    """What resuming needs beside the student's weights: tensors (the optimizers' state of each parameter,
    as '<key>.<parameter>', and what is trained beside the student), and for state.json which optimizers
    these are, what each keeps, and which parameters none has touched yet."""
    params = named(trainee)
    names = {p: name for name, p in params}
    tensors = {name: p for name, p in params if name.startswith("companion.")}
    keys, untouched = {}, []
    for optimizer, p in optimized(optimizers):
        kind, state = type(optimizer).__name__, optimizer.state.get(p, {})
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{kind}'s '{key}' is a {type(value).__name__}, no tensor: it cannot resume")
            tensors[f"{key}.{names[p]}"] = value
        if state:
            keys[kind] = sorted(state)
        else:
            untouched.append(names[p])
    return tensors, dict(optimizers=keys, untouched=untouched)


def optimized(optimizers):
    """(optimizer, parameter), one after the other."""
    return [(optimizer, p) for optimizer in optimizers
            for group in optimizer.param_groups for p in group["params"]]


def restore(trainee, optimizers, saved, tensors, counters, folder):
    """Put weights and optimizer state into what is trained, or exit naming what is missing or left over."""
    def refuse(reason):
        sys.exit(f"error: {folder}: {reason}; resume with the settings and optimizers it was trained with, "
                 "or name another --out_dir")
    params = dict(named(trainee))
    beside = {name: p for name, p in params.items() if name.startswith("companion.")}
    state = {}  # parameter's name -> {key: tensor}
    for name, tensor in tensors.items():
        key, parameter = name.split(".", 1)
        if key != "companion":
            state.setdefault(parameter, {})[key] = tensor
    shapes = {name: t.shape for name, t in tensors.items() if name.startswith("companion.")}
    if {name: p.shape for name, p in beside.items()} != shapes:
        refuse("was trained with other contrastive or generator settings")
    trainee.student.load_state_dict(saved.state_dict())
    with torch.no_grad():
        for name, p in beside.items():
            p.copy_(tensors[name])
    names = {p: name for name, p in params.items()}
    keys = counters.get("optimizers", {"AdamW": ["exp_avg", "exp_avg_sq", "step"]})
    untouched = counters.get("untouched")
    for optimizer, p in optimized(optimizers):
        kind, found = type(optimizer).__name__, state.pop(names[p], {})
        if found and sorted(found) != keys.get(kind):
            refuse(f"the optimizer's state of {names[p]} is {', '.join(sorted(found))}, not {kind}'s "
                   f"({', '.join(keys.get(kind, ['none was saved']))})")
        for key, tensor in found.items():  # as large as the parameter, or reduced over some of its dimensions
            fits = tensor.dim() == p.dim() and all(n in (1, m) for n, m in zip(tensor.shape, p.shape))
            if tensor.dim() and not fits:
                refuse(f"the optimizer's {key} of {names[p]} is {tuple(tensor.shape)}, that {tuple(p.shape)}")
        if not found and untouched is not None and names[p] not in untouched:
            refuse(f"the optimizer's state of {names[p]} is missing")
        if found:
            optimizer.state[p] = {key: tensor.to(p.device) for key, tensor in found.items()}
    if state:
        refuse(f"there is optimizer state for {', '.join(sorted(state)[:3])}, which is not trained here")


# --- the run folder -------------------------------------------------------------------------------

def refuse_out_dir(cfg):
    """Exit if out_dir is no place for this run."""
    parent = os.path.abspath(cfg.out_dir)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        sys.exit(f"error: out_dir={cfg.out_dir}: {parent} is no folder, or not yours to write into")
    names = os.listdir(cfg.out_dir) if os.path.isdir(cfg.out_dir) else []
    if "config.json" in names:
        sys.exit(f"error: out_dir={cfg.out_dir} is a checkpoint folder; name a run folder")
    if any(map(RUN_FILES.fullmatch, names)) and not (cfg.resume or cfg.overwrite):
        sys.exit(f"error: {cfg.out_dir} already holds a run; use --resume to go on with it or --overwrite to "
                 "delete it")


def refuse_another_run(cfg, data, folder, model, saved, described):
    """Exit if the checkpoint `folder` is not of the run that cfg describes."""
    theirs, ours = described["train_config"], json.loads(json.dumps(asdict(cfg)))
    if ("teachers" in theirs) != ("teachers" in ours):
        how, script = ("with", "distill.py") if "teachers" in theirs else ("without", "train.py")
        sys.exit(f"error: {folder} was trained {how} teachers; resume it with {script}")
    if asdict(saved.cfg) != asdict(model.cfg):
        sys.exit(f"error: {folder} is another model ({differences(asdict(saved.cfg), asdict(model.cfg))}); "
                 "resume with its own settings")
    if described["data_sha256"] != data_sha256(data.meta):
        sys.exit(f"error: {folder} was trained on other data than {cfg.data_dir}; resume with "
                 f"--data_dir={theirs['data_dir']}")
    masked = () if cfg.causal else ("mask_rate",)
    for key in ("seed", "batch_size", "seq_len", "random_offset", "curriculum", "curriculum_epochs",
                "eval_chunks", *masked):
        if theirs.get(key) != ours[key]:
            sys.exit(f"error: {folder} was trained with {key}={theirs.get(key)}, not {ours[key]}: the data "
                     "order, what is counted or which checkpoint is best depend on it; resume with its own")


def arithmetic(machine):
    """What a resumed run's numbers depend on, and its settings need not say."""
    return dict(dtype=str(machine.dtype).removeprefix("torch."), ranks=machine.world)


def point_out_changes(cfg, described, about, machine):
    """One line each for settings, arithmetic and teachers that are not what the run was begun with."""
    ours = json.loads(json.dumps(asdict(cfg)))
    changed = differences(described["train_config"], ours, ("resume", "overwrite"))
    if changed:
        print(f"notice: resuming with changed settings: {changed}")
    now = arithmetic(machine)
    changed = differences({key: described.get(key, now[key]) for key in now}, now)
    if changed:
        print(f"notice: resuming in other arithmetic: {changed}")
    changed = differences({key: described.get(key) for key in about}, about, ("teacher_val_ce",))
    if changed:
        print(f"notice: resuming with changed teachers: {changed}")


def spare(cfg, path, role):
    """Exit if --overwrite would delete the checkpoint `path`, which the run needs as its `role`."""
    run_folder = os.path.dirname(os.path.realpath(find_checkpoint(path)))
    if cfg.overwrite and run_folder == os.path.realpath(cfg.out_dir):
        sys.exit(f"error: --overwrite would delete {role} {path}; name another --out_dir")


def start_from(path, model, meta):
    """Put another checkpoint's weights into a new model."""
    saved, _, described = load_checkpoint(path)
    theirs, ours = ({k: v for k, v in asdict(m.cfg).items() if "dropout" not in k} for m in (saved, model))
    if theirs != ours:
        sys.exit(f"error: init_from: {path} is another model ({differences(theirs, ours)})")
    if described["tokenizer_sha256"] != meta["tokenizer_sha256"]:
        sys.exit(f"error: init_from: {path} was trained with another tokenizer")
    model.load_state_dict(saved.state_dict())


def word_mark(cfg, data, step):
    """'chck_20M' if this step reaches 20M words, of the marks 1M to 10M, 20M to 100M, 200M and so on; else
    ''. Words are blank-separated and counted by prepare.py after cleaning; a token is its average share of
    one. The last step may be 1% short: ten epochs of ten million words are 100M to the challenge, though
    cleaning and each epoch's incomplete batch take some."""
    millions = train_words(data) / len(data.shards) / 1e6  # a token's
    before, words = ((step - past) * cfg.batch_size * cfg.seq_len * millions for past in (1, 0))
    words *= 1.01 if step == data.total else 1
    unit = 10 ** int(math.log10(max(words, 1)))
    mark = int(words / unit) * unit
    return f"chck_{mark}M" if before < mark else ""


def train_words(data):
    return sum(data.meta["words"]["train"].values())


class Metrics:
    """metrics.jsonl, the bar on a terminal or log lines in a file, and wandb or tensorboard if asked for."""

    def __init__(self, cfg, machine, step, first_record):
        self.rank = machine.rank
        if machine.rank > 0:
            return
        if cfg.overwrite:
            delete_run(cfg.out_dir)
        write_json(os.path.join(cfg.out_dir, "train_config.json"), asdict(cfg))
        path = os.path.join(cfg.out_dir, "metrics.jsonl")
        kept = []
        if cfg.resume and os.path.exists(path):  # cut back to the checkpoint
            with open(path, errors="replace") as f:
                kept = [line for line in f if line.endswith("\n") and step_of(line) <= step]
        with open(path + ".tmp", "w") as f:
            f.writelines(kept)
        os.replace(path + ".tmp", path)
        self.file = open(path, "a")
        self.wandb = self.tensorboard = None
        if cfg.wandb:
            import wandb
            name = os.path.basename(cfg.out_dir)
            self.wandb = wandb.init(project="nanobabyllama", name=name, config=asdict(cfg))
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(cfg.out_dir, purge_step=step + 1)
        if first_record and not kept:
            self.write(dict(step=0, **first_record))

    def finish(self):
        if self.rank == 0 and self.wandb:
            self.wandb.finish()

    def write(self, record):
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v  # JSON has no nan
                  for k, v in record.items()}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log(record, step=record["step"])
        if self.tensorboard:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.tensorboard.add_scalar(name, value, record["step"])
            self.tensorboard.flush()

    def log(self, record, bar):
        if self.rank > 0:
            return
        self.write(record)

        def text(key, value):
            digits = ".3g" if key in ("lr", "grad_norm") else ".4f" if isinstance(value, float) else ","
            return f"{key} {value:{digits}}"
        speed = next(f"{v:,} {k.replace('_per_s', '/s')}" for k, v in record.items() if k.endswith("_per_s"))
        bar.set_postfix_str(f"loss {record['loss']:.3f} lr {record['lr']:.2g} {speed}", refresh=False)
        if bar.disable or any(k.startswith("val_") for k in record):
            bar.write("  ".join(text(k, v) for k, v in record.items()), file=sys.stdout)
            sys.stdout.flush()


def step_of(line):
    """The step of a line of metrics.jsonl; a damaged line lies after every step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
