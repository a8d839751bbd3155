"""What a run leaves in its folder and how it goes on from there: metrics.jsonl and checkpoints.

cfg is a TrainConfig, run a Run (train.py). How a checkpoint is written is disk.py's.
"""
import json
import math
import os
import platform
import re
import shutil
import sys
from dataclasses import asdict

import torch
import torch.distributed as dist

import disk


class Metrics:
    """metrics.jsonl, the bar on a terminal or log lines in a file, and wandb or tensorboard if asked for."""

    def __init__(self, cfg, run, step, first_record):
        self.rank = run.rank
        if run.rank > 0:
            return
        if cfg.overwrite:
            disk.delete_run(cfg.out_dir)
        disk.write_json(os.path.join(cfg.out_dir, "train_config.json"), asdict(cfg))
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
            self.wandb = wandb.init(project="nanobabyllama", name=os.path.basename(cfg.out_dir), config=asdict(cfg))
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(cfg.out_dir, purge_step=step + 1)
        if first_record and not kept:
            self.write(dict(step=0, **first_record))

    def finish(self):
        if self.rank == 0 and self.wandb:
            self.wandb.finish()

    def write(self, record):
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}  # JSON has no nan
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
        line = "  ".join(f"{k} {v:.3g}" if k in ("lr", "grad_norm") else f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v:,}"
                         for k, v in record.items())
        speed = next(f"{v:,} {k.replace('_per_s', '/s')}" for k, v in record.items() if k.endswith("_per_s"))
        bar.set_postfix_str(f"loss {record['loss']:.3f} lr {record['lr']:.2g} {speed}", refresh=False)
        if bar.disable or any(k.startswith("val_") for k in record):
            bar.write(line, file=sys.stdout)
            sys.stdout.flush()


def step_of(line):
    """The step of a line of metrics.jsonl; a damaged line lies after every step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def word_mark(cfg, run, step):
    """'chck_20M' if this step reaches 20M words, of the marks 1M to 10M, 20M to 100M, 200M and so on; else ''.
    Words are blank-separated and counted by prepare.py after cleaning; a token is its average share of one."""
    words_per_token = train_words(run) / len(run.shards)
    before, words = ((step - past) * cfg.batch_size * cfg.seq_len * words_per_token / 1e6 for past in (1, 0))
    unit = 10 ** int(math.log10(max(words, 1)))
    mark = int(words / unit) * unit
    return f"chck_{mark}M" if before < mark else ""


def hardware(device):
    """The GPU's or CPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "cpu"


def train_words(run):
    return sum(run.shards.meta["words"]["train"].values())


def describe_run(cfg, run, model, step, val_ce, provenance):
    """What a checkpoint's config.json says."""
    return dict(model=asdict(model.cfg), parameters=model.n_params(), step=step, val_ce=val_ce,
                tokenizer=run.shards.meta["tokenizer"], tokenizer_sha256=run.shards.meta["tokenizer_sha256"],
                bos=run.shards.meta["options"]["bos"], data_sha256=disk.data_sha256(run.shards.meta), words=train_words(run),
                git_revision=disk.git_revision(), torch=torch.__version__, hardware=hardware(run.device), train_config=asdict(cfg), **provenance)


def tokenizer_file(cfg, run):
    return os.path.join(cfg.data_dir, run.shards.meta["tokenizer"])


def save_run(cfg, run, model, optimizer, val_ce, provenance, counters):
    """Checkpoint, last.json, best.json if this is the best, in this order; older folders go last.
    val_ce is None where a signal cut the run short between two evaluations."""
    if run.rank == 0:
        step = counters["step"]
        name = f"ckpt_{step}"
        disk.save_checkpoint(cfg.out_dir, name, model, describe_run(cfg, run, model, step, val_ce, provenance), tokenizer_file(cfg, run),
                             state=(resumable_tensors(model, optimizer), counters))
        disk.point_to(cfg.out_dir, "last.json", name, step, val_ce)
        if counters["best_step"] == step:
            disk.point_to(cfg.out_dir, "best.json", name, step, val_ce)
        disk.drop_old_checkpoints(cfg.out_dir)
    if run.world > 1:
        dist.barrier()


def load_run(cfg, run, model, optimizer, provenance):
    """Put the last checkpoint of out_dir into model and optimizer; returns its counters."""
    folder = disk.find_resumable(cfg.out_dir)
    saved, _, described = disk.load_checkpoint(folder)
    if ("teachers" in described["train_config"]) != hasattr(cfg, "teachers"):
        sys.exit(f"error: {folder} was trained {'without' if hasattr(cfg, 'teachers') else 'with'} teachers; "
                 f"resume it with {'train.py' if hasattr(cfg, 'teachers') else 'distill.py'}")
    if asdict(saved.cfg) != asdict(model.cfg):
        sys.exit(f"error: {folder} is another model ({differences(asdict(saved.cfg), asdict(model.cfg))}); "
                 "resume with its own settings")
    if described["data_sha256"] != disk.data_sha256(run.shards.meta):
        sys.exit(f"error: {folder} was trained on other data than {cfg.data_dir}; resume with "
                 f"--data_dir={described['train_config']['data_dir']}")
    theirs, ours = described["train_config"], json.loads(json.dumps(asdict(cfg)))
    for key in ("seed", "batch_size", "seq_len", "random_offset", "curriculum", "curriculum_epochs"):
        if theirs.get(key) != ours[key]:
            sys.exit(f"error: {folder} was trained with {key}={theirs.get(key)}, not {ours[key]}: the data order and what is "
                     "counted depend on it; resume with its own")
    changed = differences(theirs, ours, ("resume", "overwrite"))
    if changed and run.rank == 0:
        print(f"notice: resuming with changed settings: {changed}")
    changed = differences({k: described.get(k) for k in provenance}, provenance)
    if changed and run.rank == 0:
        print(f"notice: resuming with changed teachers: {changed}")
    tensors, counters = disk.load_state(folder)
    beside = companion_parameters(model)
    if {name: p.shape for name, p in beside.items()} != {name: v.shape for name, v in tensors.items() if name.startswith("companion.")}:
        sys.exit(f"error: {folder} was trained with other contrastive or generator settings; resume with its own, or name another --out_dir")
    model.load_state_dict(saved.state_dict(), strict=False)  # of the companion nothing
    with torch.no_grad():
        for name, p in beside.items():
            p.copy_(tensors[name])
    settle_best(cfg, run, counters)
    for name, p in model.named_parameters():
        if f"step.{name}" in tensors:  # a step may leave parts alone (adversarial_loss_fn)
            optimizer.state[p] = {key: tensors[f"{key}.{name}"].to(run.device) for key in ("step", "exp_avg", "exp_avg_sq")}
    return tuple(counters[key] for key in disk.COUNTERS)


def settle_best(cfg, run, counters):
    """Make best.json name the best checkpoint up to the step resumed from. It may name an older one, where a run died
    between its two pointers; or one that is gone or will be trained again, where the user deleted a damaged one."""
    val_ce = {}
    for step in disk.checkpoint_steps(cfg.out_dir):
        if step <= counters["step"]:
            described = disk.read_json(os.path.join(cfg.out_dir, f"ckpt_{step}", "config.json"), ("val_ce",))
            if described["val_ce"] is not None:
                val_ce[step] = described["val_ce"]
    if counters["best_step"] not in val_ce:
        counters["best_step"] = min(val_ce, key=val_ce.get, default=0)
        counters["best_val_ce"] = val_ce.get(counters["best_step"], math.inf)
        counters["waited"] = 0
    if run.rank == 0:
        for name in os.listdir(cfg.out_dir):  # of steps that will be trained again
            folder = os.path.join(cfg.out_dir, name)
            if re.fullmatch(r"chck_\d+M", name) and disk.read_json(os.path.join(folder, "config.json"), ("step",))["step"] > counters["step"]:
                shutil.rmtree(folder)
        if val_ce:
            disk.point_to(cfg.out_dir, "best.json", f"ckpt_{counters['best_step']}", counters["best_step"], counters["best_val_ce"])
        elif os.path.exists(os.path.join(cfg.out_dir, "best.json")):
            os.remove(os.path.join(cfg.out_dir, "best.json"))


def start_from(path, model, run):
    """Put another checkpoint's weights into a new model."""
    saved, _, described = disk.load_checkpoint(path)
    theirs, ours = ({k: v for k, v in asdict(m.cfg).items() if "dropout" not in k} for m in (saved, model))
    if theirs != ours:
        sys.exit(f"error: init_from: {path} is another model ({differences(theirs, ours)})")
    if described["tokenizer_sha256"] != run.shards.meta["tokenizer_sha256"]:
        sys.exit(f"error: init_from: {path} was trained with another tokenizer")
    model.load_state_dict(saved.state_dict())


def resumable_tensors(model, optimizer):
    """What resuming needs beside the weights: AdamW's moments, and the companion with its own."""
    moments = {f"{key}.{name}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}
    return moments | companion_parameters(model)


def companion_parameters(model):
    return {name: p for name, p in model.named_parameters() if name.startswith("companion.")}


def differences(old, new, ignore=()):
    return ", ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k) and k not in ignore)


def last_checkpoint(cfg):
    name = disk.pointed(cfg.out_dir, "last.json")
    return os.path.join(cfg.out_dir, name) if name else "none yet"
