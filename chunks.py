"""What a step sees and what a model is validated on: chunks of the token stream.

The order is a pure function of (seed, epoch, position): neither the number of ranks nor micro_batch_size
changes it, and nothing of it is saved. cfg is a TrainConfig, run a Run (train.py).

Shapes: B sequences, T = seq_len positions, V vocabulary.
"""
import bisect
import itertools
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from objectives import mask_tokens, take


class Batch(NamedTuple):
    x: torch.Tensor      # (B, T) token ids
    y: torch.Tensor      # (B, T) the ids one position on: both losses see all T positions
    index: np.ndarray    # (B,) number of the chunk in the training split
    step: int            # optimizer steps done


class ChunkOrder:
    """Which chunks a step sees: an epoch's permutation and offsets follow from (seed, epoch). And how the model is validated."""

    validation = "validation loss (nats per token)"

    def __init__(self, cfg, run):
        self.cfg, self.run, self.of = cfg, run, None
        self.bucket = buckets(cfg, run)
        steps = [len(self.eligible(epoch)) // cfg.batch_size for epoch in range(cfg.epochs if cfg.curriculum else 1)]
        if min(steps) < 1:
            sys.exit(f"error: {cfg.data_dir} has {len(self.eligible(0))} training chunks of {cfg.seq_len} tokens, "
                     f"fewer than batch_size={cfg.batch_size}")
        self.starts = [0, *itertools.accumulate(steps if cfg.curriculum else steps * cfg.epochs)]  # of the epochs, and the end
        self.total = min(self.starts[-1], cfg.max_iters) if cfg.max_iters else self.starts[-1]

    def eligible(self, epoch):
        """The chunks an epoch sees (but for its last partial batch)."""
        return np.flatnonzero(self.bucket <= epoch // max(self.cfg.curriculum_epochs, 1))

    def epoch(self, step):
        """Epochs done after `step` steps: a whole number at the end of one."""
        i = min(bisect.bisect_right(self.starts, step), len(self.starts) - 1)
        return i - 1 + (step - self.starts[i - 1]) / (self.starts[i] - self.starts[i - 1])

    def seen(self, step):
        """What is counted, and how much of it `step` steps saw."""
        return "tokens", step * self.cfg.batch_size * self.cfg.seq_len

    def validate(self, model):
        return {"val_ce": evaluate(model, self.cfg, self.run)}

    def batch(self, step, micro_step):
        """This rank's share of a step's `micro_step`-th part."""
        cfg, run = self.cfg, self.run
        epoch = bisect.bisect_right(self.starts, step) - 1
        position = step - self.starts[epoch]
        if epoch != self.of:
            rng = np.random.default_rng([cfg.seed, epoch])
            self.of, self.chunks = epoch, rng.permutation(self.eligible(epoch))
            self.offsets = rng.integers(cfg.seq_len if cfg.random_offset else 1, size=len(self.chunks))
        first = position * cfg.batch_size + (micro_step * run.world + run.rank) * run.micro_batch
        mine = slice(first, first + run.micro_batch)
        tokens = run.shards.windows(self.chunks[mine] * cfg.seq_len + self.offsets[mine], cfg.seq_len + 1)
        return to_batch(tokens, run.device, self.chunks[mine], step)


def n_chunks(cfg, shards):
    """Whole chunks in a split; with random offsets the last one needs room to shift."""
    return (len(shards) - 1 - (cfg.seq_len - 1 if cfg.random_offset else 0)) // cfg.seq_len


def buckets(cfg, run):
    """For each chunk the bucket of the curriculum that its first token's source is in; 0 without a curriculum."""
    first = np.arange(n_chunks(cfg, run.shards)) * cfg.seq_len
    if not cfg.curriculum:
        return np.zeros(len(first), int)
    ends = run.shards.meta.get("sources", {}).get("train", {})
    if sorted(ends) != sorted(" ".join(cfg.curriculum).split()):
        sys.exit(f"error: curriculum={','.join(cfg.curriculum)} must name each source of {cfg.data_dir} once: {' '.join(ends) or 'prepare it again'}")
    of = np.array([next(i for i, bucket in enumerate(cfg.curriculum) if source in bucket.split()) for source in ends])
    return of[np.searchsorted(list(ends.values()), first, side="right")]


def to_batch(tokens, device, index, step=0):
    """tokens (B, T + 1) as inputs and targets."""
    tokens = torch.from_numpy(tokens)
    if device.type == "cuda":  # the host does not wait: it is steps ahead of the GPU when it gets here
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), index, step)


def seed_dropout(*key):
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


# --- validation -----------------------------------------------------------------------------------

def validation_chunks(cfg, shards):
    """(chunks, T + 1): the same `eval_chunks` random chunks for every model (seed 2023, as published)."""
    n = (len(shards) - 1) // cfg.seq_len
    if n < max(cfg.eval_chunks, 1):
        sys.exit(f"error: {cfg.data_dir} has {n} validation chunks of {cfg.seq_len} tokens, eval_chunks={cfg.eval_chunks}; "
                 "use --eval_chunks=0 for all of them" + (", or shorter chunks" if n < 1 else ""))
    chosen = np.sort(np.random.default_rng(2023).permutation(n)[:cfg.eval_chunks or n])
    return shards.windows(chosen * cfg.seq_len, cfg.seq_len + 1)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # nothing is compiled for validation's shapes
def evaluate(logits, cfg, run):
    """Mean cross-entropy over the validation chunks, nats per token, of `logits(x)` (B, T, V); of a masked
    language model, over the same masked tokens each time."""
    total = torch.zeros(2, dtype=torch.float64, device=run.device)  # sum, count
    rows = min(run.micro_batch, max(1, 2048 // cfg.seq_len))  # bounds the memory of the logits
    for i in range(0, len(run.val), rows):
        tokens = run.val[i:i + rows]
        x, y, *_ = to_batch(tokens, run.device, None)
        if not cfg.causal:
            noise = [np.random.default_rng([2023, run.rank + run.world * row]).random(cfg.seq_len) for row in range(i, i + len(tokens))]
            masked, at = mask_tokens(x, cfg.mask_rate, torch.tensor(np.stack(noise)).to(run.device))
            x, y = masked, x.gather(1, at)
        with run.autocast():
            z = logits(x)
        if not cfg.causal:
            z = take(z, at)
        total[0] += F.cross_entropy(z.float().flatten(0, 1), y.flatten(), reduction="sum")
        total[1] += y.numel()
    if run.world > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def mean_over_ranks(values, run):
    if run.world > 1:
        dist.all_reduce(values)
    return values / run.world
