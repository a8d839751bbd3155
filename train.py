"""Pre-train a GPT-2 or Llama on token shards. `train()` is the one training loop: distill.py hands
it another loss.

    python train.py config/llama_16m.py --data_dir=data/babylm --out_dir=out/llama_16m
    torchrun --nproc_per_node=4 train.py config/gpt2_705m.py
    python train.py config/gpt2_705m.py --resume

A step is an optimizer step; a chunk is `seq_len` contiguous tokens and the one after them.
"""
import contextlib
import ctypes
import importlib.util
import math
import os
import re
import signal
import sys
import time
import warnings
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config
import disk
from chunks import ChunkOrder, mean_over_ranks, seed_dropout, validation_chunks
from loss import apply_loss, cross_entropy
from model import LanguageModel, ModelConfig, check_model_config
from objectives import ascent_loss, masked_token_loss, sam_loss
from runs import Metrics, describe_run, last_checkpoint, load_run, save_run, start_from, tokenizer_file, word_mark


@dataclass
class LoopConfig:
    """What the loop needs, whatever it trains."""
    out_dir: str = "out/run"
    resume: bool = False          # go on from the last checkpoint in out_dir, if there is one
    overwrite: bool = False       # delete the run in out_dir first
    seed: int = 42
    epochs: int = 4
    max_iters: int = 0            # stop after this many optimizer steps, if the epochs have them; 0 = all they have
    batch_size: int = 128         # sequences per optimizer step, all ranks together
    # AdamW and its schedule: linear warm-up, then down to min_lr; decay on matrices only
    learning_rate: float = 3e-4
    min_lr: float = 0.0
    warmup_iters: int = 200
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8
    grad_clip: float = 1.0        # global norm; 0 = off
    not_finite: Literal["stop", "skip"] = "stop"  # a step whose loss or gradient is inf or nan: it never reaches the weights
    # validation and logging, in steps
    eval_interval: int = 500      # validation and checkpoint; 0 = at the end of each epoch
    patience: int = 0             # stop after so many validations in a row that do not improve on the best by 0.001; 0 = never
    log_interval: int = 10
    wandb: bool = False           # also log there (pip install wandb)
    tensorboard: bool = False     # also write its event files into out_dir (pip install tensorboard)
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the arithmetic; auto: bfloat16 where hardware has it
    deterministic: Literal["auto", "on", "off"] = "auto"    # same seed, same bits. auto: on for CPU


@dataclass
class TrainConfig(LoopConfig, ModelConfig):
    data_dir: str = "data/babylm"
    seq_len: int = 128            # tokens in a training chunk, at most block_size
    micro_batch_size: int = 0     # sequences at a time on one rank (memory); 0 = batch_size / ranks
    mask_rate: float = 0.15       # share of positions that a model with causal=False predicts
    curriculum: tuple[str, ...] = ()  # buckets of sources, "childes" or "switchboard cbt": epochs over the first, then over the first two, and so on
    curriculum_epochs: int = 3    # epochs until the next bucket is added
    init_from: str = ""           # run or checkpoint folder whose weights training starts from
    sam_rho: float = 0.0          # sharpness-aware minimisation with this radius (objectives.py); 0 = off
    ascent: bool = False          # climb the loss instead (gradient ascent post-training)
    random_offset: bool = False   # shift each chunk by 0..seq_len-1 at each visit (the published code; the papers do not)
    eval_chunks: int = 8192       # validation chunks, the same ones each time; 0 = all
    keep_words: bool = False      # keep the weights at 1M, 2M .. 10M, 20M .. 100M words seen (the BabyLM challenge, since 2025)
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on, but for runs of a few minutes on CPU
    loss_chunk: int = 512         # positions whose logits exist at a time; 0 = all, the loss as its formula reads


def next_token_loss(model, batch, cfg, run):
    """Cross-entropy in nats per token, and the parts to log."""
    return model(batch.x, lambda h, head: apply_loss(
        cross_entropy, h, head, batch.y, chunk=cfg.loss_chunk, compiled=run.compile))


def train(cfg, run, loss_fn=next_token_loss, companion=None, provenance={}, first_record={}, model=None, data=None):
    """Train a model from `cfg` on `run` (see `start`) until its steps are done.

    loss_fn(model, batch, cfg, run) -> (loss, {name: detached scalar}): a mean over the batch's
    sequences; `model` may be DDP's wrapper. companion is a module to train beside it (objectives.py).
    provenance goes into every checkpoint's config.json, first_record into step 0 of metrics.jsonl.
    model and data: a new model and its token chunks, unless finetune.py brings others; those write
    no checkpoints. data is like ChunkOrder; what `validate` names first is to be small.
    """
    torch.manual_seed(cfg.seed)
    pretraining = data is None
    if pretraining:
        model, data = LanguageModel(model_config(cfg)).to(run.device), ChunkOrder(cfg, run)
        if cfg.init_from:
            start_from(cfg.init_from, model, run)
        if cfg.sam_rho or cfg.ascent:
            loss_fn = partial(sam_loss if cfg.sam_rho else ascent_loss, loss_fn)
    model.companion = companion
    optimizer = make_optimizer(model, cfg)
    total = data.total
    if run.rank == 0:
        os.makedirs(cfg.out_dir, exist_ok=True)
        disk.lock(cfg.out_dir)
    # the last three: of the least validation loss so far, and validations since it was clearly beaten
    step, best, best_step, waited = load_run(cfg, run, model, optimizer, provenance) if cfg.resume else (0, math.inf, 0, 0)
    if mean_over_ranks(torch.tensor(float(step)).to(run.device), run) != step:
        sys.exit(f"error: rank {run.rank} finds step {step} in {cfg.out_dir}, others another: all machines need the same folder")
    if step >= total or 0 < cfg.patience <= waited:
        if run.rank == 0:
            print(f"nothing to do: {cfg.out_dir} is at step {step} of {total}; raise --max_iters, --epochs or --patience for more")
        return model
    metrics = Metrics(cfg, run, step, first_record)
    if pretraining:
        announce(cfg, run, model, data)
    if run.compile:
        model.compile_blocks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has a new name for broadcast_buffers, 2.11 only this one
        ddp = model if run.world == 1 else DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=bool(getattr(cfg, "generator", "")),
            device_ids=[run.device] if run.device.type == "cuda" else None)
    micro_steps = cfg.batch_size // (run.micro_batch * run.world)
    guard = Guard(cfg, run, optimizer)
    signals = catch_signals()
    bar = tqdm(total=total, initial=step, disable=run.rank > 0 or not sys.stderr.isatty(), dynamic_ncols=True)
    clock, (unit, clock_seen) = time.perf_counter(), data.seen(step)

    model.train()
    while step < total and not 0 < cfg.patience <= waited:
        lr = learning_rate(cfg, step, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = {}
        for micro_step in range(micro_steps):
            batch = data.batch(step, micro_step)
            seed_dropout(cfg.seed, step, micro_step, run.rank)
            last = micro_step == micro_steps - 1
            with contextlib.nullcontext() if last or ddp is model else ddp.no_sync():
                with run.autocast():
                    loss, parts = loss_fn(ddp, batch, cfg, run)
                (loss / micro_steps).backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0) + value / micro_steps
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        guard.check(step + 1, sums["loss"], grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()

        # from here on the host waits for the device, at some steps only
        evaluation = step == total or (step % cfg.eval_interval == 0 if cfg.eval_interval else data.epoch(step) % 1 == 0)
        mark = word_mark(cfg, run, step) if pretraining and cfg.keep_words else ""
        log = evaluation or mark or step % cfg.log_interval == 0
        asked = bool(signals)  # ranks agree on it where they meet anyway
        if log:
            _, seen = data.seen(step)
            *values, asked = mean_over_ranks(torch.stack([*sums.values(), torch.tensor(float(asked), device=run.device)]), run).tolist()
            record = {"step": step, "epoch": round(data.epoch(step), 4), unit: seen,
                      **dict(zip(sums, values)), "lr": lr, "grad_norm": grad_norm.item(), **guard.report(),
                      f"{unit}_per_s": round((seen - clock_seen) / (time.perf_counter() - clock))}
            if evaluation:
                model.eval()
                validation = data.validate(model)
                model.train()
                record.update(validation)
                val_loss = guard.finite(next(iter(validation.values())), step)
                waited = 0 if val_loss < best - 0.001 else waited + 1
                if val_loss < best:
                    best, best_step = val_loss, step
            metrics.log(record, bar)
        stop = asked and (log or run.world == 1) and step < total
        if stop and not log:
            guard.report()
        if mark and run.rank == 0:
            disk.save_checkpoint(cfg.out_dir, mark, model, describe_run(cfg, run, model, step, record.get("val_ce"), provenance), tokenizer_file(cfg, run))
        if pretraining and (evaluation or stop):
            save_run(cfg, run, model, optimizer, record["val_ce"] if evaluation else None, provenance,
                     dict(step=step, best_val_ce=best, best_step=best_step, waited=waited))
        if log:
            clock, clock_seen = time.perf_counter(), seen
        if stop:
            bar.close()
            how = "and saved; go on with --resume" if pretraining else "with nothing of this run kept; the same command begins it again"
            sys.exit(f"stopped by a signal at step {step} of {total} {how}" if run.rank == 0 else 1)
    bar.close()
    release_signals()
    metrics.finish()
    if run.rank == 0:
        early = f" (stopped early: {waited} validations without a gain of 0.001)" if step < total else ""
        print(f"done: {cfg.out_dir}, best {data.validation} {best:.4f} at step {best_step}{early}")
    if signals and pretraining:
        sys.exit(f"a signal came at the end: {cfg.out_dir} is complete" if run.rank == 0 else 1)
    data.interrupted = bool(signals)
    return model


# --- starting: machine, data, checks --------------------------------------------------------------

class Run(NamedTuple):
    """What a config becomes on this machine."""
    device: torch.device
    rank: int
    world: int
    micro_batch: int     # sequences per forward on this rank
    bf16: bool
    compile: bool
    shards: disk.Shards  # the training split
    val: np.ndarray      # (this rank's validation chunks, T + 1)

    @property
    def dtype(self):
        """Of matrix products."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def start(cfg):
    """The Run for `cfg`, with the process group started under torchrun. What a user can get wrong
    in settings, data or out_dir ends here in one line; nothing is written."""
    check_loop_config(cfg)
    for key, good, wanted in (("seq_len", cfg.seq_len > 0, "at least 1"), ("mask_rate", cfg.mask_rate <= 1, "at most 1"),
                              ("curriculum_epochs", cfg.curriculum_epochs, "at least 1"), ("ascent", not (cfg.ascent and cfg.sam_rho), "False with sam_rho"),
                              ("n_labels", cfg.n_labels == 0, "0: finetune.py makes classifiers")):
        if not good:
            sys.exit(f"error: {key}={getattr(cfg, key)} must be {wanted}")
    check_model_config(cfg)
    if cfg.seq_len > cfg.block_size:
        sys.exit(f"error: chunks of seq_len={cfg.seq_len} are longer than the model's block_size={cfg.block_size}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    micro_batch = cfg.micro_batch_size or max(cfg.batch_size // world, 1)
    if cfg.batch_size % (micro_batch * world):
        sys.exit(f"error: batch_size={cfg.batch_size} must be a multiple of micro_batch_size x ranks = "
                 f"{micro_batch} x {world}")
    shards = disk.Shards(cfg.data_dir, "train")
    if shards.meta["vocab_size"] != cfg.vocab_size:
        sys.exit(f"error: vocab_size={cfg.vocab_size}, but {cfg.data_dir} has {shards.meta['vocab_size']}: "
                 f"use --vocab_size={shards.meta['vocab_size']}")
    if not cfg.causal and shards.meta["pad"] != 0:
        sys.exit(f"error: causal=False hides tokens behind <pad> as token 0, but {cfg.data_dir} has pad={shards.meta['pad']}; "
                 "prepare it with a tokenizer of prepare.py's own")
    val = validation_chunks(cfg, disk.Shards(cfg.data_dir, "val"))[rank::world]
    names = os.listdir(cfg.out_dir) if os.path.isdir(cfg.out_dir) else []
    if "config.json" in names:
        sys.exit(f"error: out_dir={cfg.out_dir} is a checkpoint folder; name a run folder")
    if any(map(disk.RUN_FILES.fullmatch, names)) and not (cfg.resume or cfg.overwrite):
        sys.exit(f"error: {cfg.out_dir} already holds a run; use --resume to go on with it or --overwrite to delete it")
    if cfg.resume and not disk.checkpoint_steps(cfg.out_dir):
        cfg.resume, cfg.overwrite = False, True  # what is there is of a run that died before its first checkpoint
        if rank == 0:
            print(f"notice: {cfg.out_dir} has no checkpoint yet: starting at step 0")
    device, bf16 = start_machine(cfg)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run = Run(device, rank, world, micro_batch, bf16, False, shards, val)
    return run._replace(compile=pays_to_compile(cfg, run) and can_compile(device, rank))


def check_loop_config(cfg):
    for key, good, wanted in (*((key, getattr(cfg, key) > 0, "at least 1") for key in ("batch_size", "log_interval", "epochs")),
                              ("beta1", cfg.beta1 < 1, "below 1"), ("beta2", cfg.beta2 < 1, "below 1"), ("adam_eps", cfg.adam_eps > 0, "above 0"),
                              ("out_dir", cfg.out_dir, "a folder's name"),
                              ("overwrite", not (cfg.overwrite and cfg.resume), "without --resume")):
        if not good:
            sys.exit(f"error: {key}={getattr(cfg, key)} must be {wanted}")
    for package in ("wandb", "tensorboard"):
        if getattr(cfg, package) and not importlib.util.find_spec(package):
            sys.exit(f"error: --{package} needs the package: pip install {package}")


def start_machine(cfg):
    """The device, and whether its arithmetic is bfloat16."""
    device = pick_device(cfg.device)
    if cfg.deterministic == "on" or cfg.deterministic == "auto" and device.type == "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return device, cfg.dtype == "bfloat16" or cfg.dtype == "auto" and multiplies_bf16(device)


def pick_device(name):
    """'auto', 'cpu' or 'cuda' as a torch.device; under torchrun each local rank its own GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit("error: device='cuda', but torch finds no CUDA device; use --device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # on CPU too: bfloat16 attention stays in bfloat16
        return torch.device("cpu")  # Apple's MPS is left out: nobody has tested it
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.index >= torch.cuda.device_count():
        sys.exit(f"error: {torch.cuda.device_count()} GPUs here, fewer than --nproc_per_node")
    torch.cuda.set_device(device)
    return device


def keep_freed_memory():
    """Stop glibc from handing large freed blocks back to the kernel: faulting them in again at every
    step cost a third of the time on CPU."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)          # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: 2 GiB
    except (OSError, AttributeError):
        pass  # another C library


def multiplies_bf16(device):
    """True where the hardware multiplies bfloat16 faster than float32: AMX or AVX-512-BF16 on CPU."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open("/proc/cpuinfo") as f:
            return bool(re.search(r"\b(amx_bf16|avx512_bf16)\b", f.read()))
    except OSError:
        return False


def pays_to_compile(cfg, run):
    """What --compile=auto means: on a CPU the half minute it takes is lost on a run of a few minutes."""
    if cfg.compile != "auto":
        return cfg.compile == "on"
    with torch.device("meta"):
        parameters = LanguageModel(model_config(cfg)).n_params()
    flops = 6 * parameters * ChunkOrder(cfg, run).total * cfg.batch_size * cfg.seq_len / run.world
    return run.device.type == "cuda" or flops > 5e13


def can_compile(device, rank=0):
    """Try torch.compile on a trivial function; one line of notice if the machine lacks what it needs."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return True
    except Exception as e:
        if rank == 0:
            print(f"notice: running uncompiled, torch.compile does not work here: {str(e).strip().splitlines()[0]}")
        return False


def model_config(cfg):
    return ModelConfig(**{f.name: getattr(cfg, f.name) for f in fields(ModelConfig)})


def make_optimizer(model, cfg):
    """AdamW; weight decay on matrices and embeddings, not on biases and norms (as in HF's Trainer)."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=cfg.weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)


def learning_rate(cfg, step, total):
    """Linear warm-up to learning_rate over warmup_iters steps, then half a cosine or a line to min_lr at the last. The
    warm-up's steps are 1/(warmup_iters + 1) and so on; Hugging Face's begin with a step at 0."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    progress = (step - cfg.warmup_iters) / max(total - cfg.warmup_iters, 1)
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[cfg.schedule]
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * share


def announce(cfg, run, model, data):
    """One line each: parameters, tokens per epoch, steps, estimated memory."""
    if run.rank > 0:
        return
    n, rows = model.n_params(), run.micro_batch * cfg.seq_len
    width = 2 if run.bf16 else 4
    logits = 3 * 4 * cfg.vocab_size * (min(cfg.loss_chunk, rows) or rows)
    activations = rows * cfg.n_layer * (10 * cfg.n_embd + 4 * cfg.intermediate_size) * width + logits
    print(f"parameters: {n:,} ({cfg.arch})")
    print(f"tokens per epoch: {(data.starts[-1] - data.starts[-2]) * cfg.batch_size * cfg.seq_len:,}" + " at the end" * bool(cfg.curriculum))
    print(f"steps: {data.total:,} of {cfg.batch_size} x {cfg.seq_len} tokens, {data.epoch(data.total):.2f} epochs")
    if cfg.max_iters > data.total:
        print(f"notice: max_iters={cfg.max_iters}, but {cfg.epochs} epochs have {data.total} steps; raise --epochs")
    print(f"memory, estimated: {(16 * n + activations) / 2**30:.2f} GiB for the model trained; ranks: {run.world}, "
          f"{run.device}, {'bfloat16' if run.bf16 else 'float32'}, {'compiled' if run.compile else 'not compiled'}", flush=True)


# --- what must not reach the weights, and signals --------------------------------------------------

class Guard:
    """Keeps a step whose loss or gradient is not finite away from weights and moments. The device
    decides, through the flag that gates fused AdamW (GradScaler's); the host reads it when it logs."""

    def __init__(self, cfg, run, optimizer):
        self.cfg, self.run, self.optimizer = cfg, run, optimizer
        self.bad_steps = torch.zeros((), device=run.device)           # since the last report
        self.first = torch.full((2,), math.inf, device=run.device)    # first bad step: of this rank's loss, of all

    def check(self, step, loss, grad_norm):
        mine = ~loss.isfinite()
        bad = (mine | ~grad_norm.isfinite()).float()
        if self.run.world > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)  # all ranks skip or none
        self.first = self.first.minimum(torch.where(torch.stack([mine, bad > 0]), step, math.inf))
        self.bad_steps += bad
        self.optimizer.found_inf = bad if self.cfg.not_finite == "skip" else self.bad_steps.clamp(max=1)

    def report(self):
        """{'skipped': steps since the last report}, or the end of the run."""
        if self.cfg.not_finite == "skip":
            skipped, self.bad_steps = int(self.bad_steps), torch.zeros_like(self.bad_steps)
            return dict(skipped=skipped)
        if self.bad_steps:
            mine, first = self.first.tolist()
            rank = torch.tensor(self.run.rank if mine == first else self.run.world, device=self.run.device)
            if self.run.world > 1:
                dist.all_reduce(rank, dist.ReduceOp.MIN)
            what = f"the loss on rank {int(rank)}" if rank < self.run.world else "the gradient"
            sys.exit(f"error: {what} was not finite at step {int(first)}; the last good checkpoint is {last_checkpoint(self.cfg)}; "
                     "lower learning_rate or raise warmup_iters, or skip such steps with --not_finite=skip")
        return {}

    def finite(self, val_ce, step):
        if not math.isfinite(val_ce):
            sys.exit(f"error: the validation loss is not finite at step {step}; the last good checkpoint is {last_checkpoint(self.cfg)}")
        return val_ce


def catch_signals():
    """A list that SIGTERM or Ctrl-C puts itself into, so that the loop saves and ends; the second ends at once."""
    caught = []

    def handler(number, frame):
        caught.append(number)
        release_signals()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return caught


def release_signals():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main(cfg):
    train(cfg, start(cfg), next_token_loss if cfg.causal else masked_token_loss)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    config.run(main, TrainConfig)
