"""What a step sees and what a model is validated on: chunks of the token stream.

The order is a pure function of (seed, epoch, position): neither the number of ranks nor micro_batch_size
changes it, and nothing of it is saved. cfg is a TrainConfig, machine a Machine.

Shapes: B sequences, T = seq_len positions, V vocabulary, k masked positions a sequence.
"""
import bisect
import itertools
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lib.machine import KINDS
from lib.shards import Shards

MASK = 0  # <pad>: the papers' vocabulary has no mask token


class Batch(NamedTuple):
    x: torch.Tensor           # (B, T) token ids
    y: torch.Tensor = None    # (B, T) the ids one position on: both losses see all T positions
    index: np.ndarray = None  # (B,) number of the chunk in the training split
    step: int = 0             # optimizer steps done


class Chunks:
    """Which chunks a step sees: an epoch's permutation and offsets follow from (seed, epoch)."""

    unit = "tokens"

    def __init__(self, cfg, machine, shards):
        self.cfg, self.machine, self.shards, self.meta = cfg, machine, shards, shards.meta
        self.val = validation_chunks(cfg, Shards(cfg.data_dir, "val"), machine)
        self.drawn = None  # the epoch whose permutation is at hand
        self.bucket = buckets(cfg, shards)
        different = cfg.epochs if cfg.curriculum else 1
        steps = [len(self.eligible(epoch)) // cfg.batch_size for epoch in range(different)]
        if min(steps) < 1:
            sys.exit(f"error: {cfg.data_dir} has {len(self.eligible(0))} training chunks of {cfg.seq_len} "
                     f"tokens, fewer than batch_size={cfg.batch_size}")
        steps = steps if cfg.curriculum else steps * cfg.epochs
        self.starts = [0, *itertools.accumulate(steps)]  # of the epochs, and the end
        self.total = min(self.starts[-1], cfg.max_iters) if cfg.max_iters else self.starts[-1]

    def eligible(self, epoch):
        """The chunks an epoch sees (but for its last partial batch)."""
        return np.flatnonzero(self.bucket <= epoch // self.cfg.curriculum_epochs)

    def epoch(self, step):
        """Epochs done after `step` steps: a whole number at the end of one."""
        i = min(bisect.bisect_right(self.starts, step), len(self.starts) - 1)
        return i - 1 + (step - self.starts[i - 1]) / (self.starts[i] - self.starts[i - 1])

    def seen(self, step):
        """Tokens that `step` steps saw."""
        return step * self.cfg.batch_size * self.cfg.seq_len

    def batch(self, step, micro_step):
        """This rank's share of a step's `micro_step`-th part."""
        cfg, machine = self.cfg, self.machine
        epoch = bisect.bisect_right(self.starts, step) - 1
        position = step - self.starts[epoch]
        if epoch != self.drawn:
            rng = np.random.default_rng([cfg.seed, epoch])
            self.drawn, self.chunks = epoch, rng.permutation(self.eligible(epoch))
            self.offsets = rng.integers(cfg.seq_len if cfg.random_offset else 1, size=len(self.chunks))
        first = position * cfg.batch_size + (micro_step * machine.world + machine.rank) * machine.micro_batch
        mine = slice(first, first + machine.micro_batch)
        tokens = self.shards.windows(self.chunks[mine] * cfg.seq_len + self.offsets[mine], cfg.seq_len + 1)
        return to_batch(tokens, machine.device, self.chunks[mine], step)


def n_chunks(cfg, shards):
    """Whole chunks in a split; with random offsets the last one needs room to shift."""
    return (len(shards) - 1 - (cfg.seq_len - 1 if cfg.random_offset else 0)) // cfg.seq_len


def buckets(cfg, shards):
    """For each chunk the bucket of the curriculum that its first token's source is in; 0 without a
    curriculum."""
    first = np.arange(n_chunks(cfg, shards)) * cfg.seq_len
    if not cfg.curriculum:
        return np.zeros(len(first), int)
    ends = shards.meta.get("sources", {}).get("train", {})
    if sorted(ends) != sorted(" ".join(cfg.curriculum).split()):
        sys.exit(f"error: curriculum={','.join(cfg.curriculum)} must name each source of {cfg.data_dir} "
                 f"once: {' '.join(ends) or 'prepare it again'}")
    bucket_of = np.array([next(i for i, bucket in enumerate(cfg.curriculum) if source in bucket.split())
                          for source in ends])
    return bucket_of[np.searchsorted(list(ends.values()), first, side="right")]


def to_batch(tokens, device, index=None, step=0):
    """tokens (B, T + 1) as inputs and targets."""
    tokens = to_device(torch.from_numpy(tokens), device)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), index, step)


def to_device(tensor, device):
    """The host does not wait where it need not: it is steps ahead of the GPU when it gets here."""
    if KINDS[device.type].pinned:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# --- masked tokens --------------------------------------------------------------------------------

def mask_tokens(x, rate, noise):
    """x (B, T) with the round(rate T), at least one, positions of least noise (B, T) masked, and these (B,
    k)."""
    at = noise.argsort(1)[:, :max(1, round(rate * x.shape[1]))]
    return x.scatter(1, at, MASK), at


def take(h, at):
    """h (B, T, C) at positions at (B, k): (B, k, C)."""
    return h.gather(1, at[..., None].expand(-1, -1, h.shape[-1]))


# --- validation -----------------------------------------------------------------------------------

def validation_chunks(cfg, shards, machine):
    """(chunks, T + 1): this rank's share of the same `eval_chunks` random chunks for every model (seed
    2023, as published), or of all where there are fewer."""
    n = (len(shards) - 1) // cfg.seq_len
    if n < 1:
        sys.exit(f"error: {cfg.data_dir} has {len(shards)} validation tokens, less than a chunk of "
                 f"seq_len={cfg.seq_len}; use shorter chunks")
    if n < cfg.eval_chunks and machine.rank == 0:
        print(f"notice: {cfg.data_dir} has {n:,} validation chunks of {cfg.seq_len} tokens, fewer than "
              f"eval_chunks={cfg.eval_chunks}: all of them are used")
    chosen = np.sort(np.random.default_rng(2023).permutation(n)[:cfg.eval_chunks or n])
    return shards.windows(chosen * cfg.seq_len, cfg.seq_len + 1)[machine.rank::machine.world]


def validation_rows(cfg, machine):
    """Chunks at a time: bounds the memory of their logits."""
    return min(machine.micro_batch, max(1, machine.positions(2048) // cfg.seq_len))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # nothing is compiled for validation's shapes
def evaluate(logits, val, cfg, machine):
    """Mean cross-entropy, nats per token, over this rank's chunks val (n, T + 1) and all other ranks', of
    `logits(batch)`: (B, T, V). Of a masked language model over the same masked tokens each time."""
    total = torch.zeros(2, dtype=machine.kind.widest, device=machine.device)  # sum, count
    rows = validation_rows(cfg, machine)
    for i in range(0, len(val), rows):
        batch = to_batch(val[i:i + rows], machine.device)
        y = batch.y
        if not cfg.causal:
            noise = [np.random.default_rng([2023, machine.rank + machine.world * row]).random(cfg.seq_len)
                     for row in range(i, i + len(batch.x))]
            noise = torch.tensor(np.stack(noise), dtype=machine.kind.widest).to(machine.device)
            masked, at = mask_tokens(batch.x, cfg.mask_rate, noise)
            batch, y = Batch(masked), batch.x.gather(1, at)
        with machine.autocast():
            z = logits(batch)
        if not cfg.causal:
            z = take(z, at)
        total[0] += F.cross_entropy(z.float().flatten(0, -2), y.flatten(), reduction="sum")
        total[1] += y.numel()
    if machine.world > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()
