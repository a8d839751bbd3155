"""Teachers computed once: their states for every training chunk, kept on disk.

    python distill.py config/babyllama.py --teacher_cache=cache

With fixed chunks a teacher's states for a chunk are the same in each epoch and for each student; only its
`logits(states)` are computed again. Exact but for rounding states that are not whole numbers to bfloat16,
which bfloat16 arithmetic does to them anyway; cached top-k logits are not.

    cache/<teacher>/  cache.json (whose states of what), states_00000.bin ... (chunks x seq_len x C, bfloat16;
                      of whole numbers int64), states_00000.json ... (SHA-256, written last: a pass that was
                      cut short goes on)
"""
import gc
import hashlib
import json
import os
import re
import shutil
import sys

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from lib.data import n_chunks, to_batch
from lib.files import FORMAT_VERSION, flush_to_disk, lock, read_json, sha256, write_json
from lib.shards import data_sha256

SHARD_BYTES = 2 ** 28  # what an interrupted pass may lose


def check_cache(cfg):
    """Exit if no cache can be where it was asked for: before any teacher is loaded."""
    if cfg.random_offset:
        sys.exit("error: teacher_cache wants fixed chunks, since a state depends on where its chunk begins: "
                 "use --random_offset=False")
    if os.path.lexists(cfg.teacher_cache) and not os.path.isdir(cfg.teacher_cache):
        sys.exit(f"error: teacher_cache={cfg.teacher_cache} is not a folder; name one, or a new one")


def cached_teachers(cfg, machine, data, teachers):
    """The teachers with their states on disk, where what was missing is written first. Exits if the cache
    is of something else, damaged, or does not fit."""
    caches = [StateCache(cfg, machine, data, i, t) for i, t in enumerate(teachers)]
    if len({c.folder for c in caches}) < len(caches):
        sys.exit(f"error: two of teachers={','.join(cfg.teachers)} would share a folder of the teacher_cache")
    os.makedirs(cfg.teacher_cache, exist_ok=True)
    missing, free = sum(c.missing_bytes() for c in caches), shutil.disk_usage(cfg.teacher_cache).free
    if machine.rank == 0 and missing:
        print(f"teacher cache: {missing / 1e9:.3g} GB to write into {cfg.teacher_cache}, {free / 1e9:.3g} GB "
              f"free; {sum(c.token_bytes for c in caches):,} bytes per token", flush=True)
    if missing > free:
        sys.exit(f"error: {cfg.teacher_cache} has {free / 1e9:.3g} GB free, the teacher cache wants "
                 f"{missing / 1e9:.3g} GB")
    if machine.world > 1:
        dist.barrier()  # every rank has looked before one writes
    for cache, teacher in zip(caches, teachers):
        cache.write(teacher)
    if machine.world > 1:
        dist.barrier()
    cached = [CachedTeacher(teacher, cache) for teacher, cache in zip(teachers, caches)]
    gc.collect()  # compiled and recorded bodies are in cycles, and would still be there beside the student
    return cached


class CachedTeacher:
    """A teacher whose states are read from disk, by the number of the chunk."""

    def __init__(self, teacher, cache):
        self.cache, self.shards, self.logits = cache, cache.open(), teacher.logits
        teacher.body = None  # a language model's: its memory is not needed from here on

    def states(self, batch):
        machine = self.cache.machine
        # torch hands pinned memory out anew only when the copies from it are done
        states = torch.empty(len(batch.index), *self.shards[0].shape[1:], pin_memory=machine.kind.pinned,
                             dtype=torch.int64 if self.cache.whole_numbers else torch.bfloat16)
        self.cache.read(self.shards, batch.index, states)
        return states.to(machine.device, non_blocking=True)


class StateCache:
    """The i-th teacher's folder of a cache."""

    def __init__(self, cfg, machine, data, i, teacher):
        self.cfg, self.machine, self.data = cfg, machine, data
        with torch.no_grad(), machine.autocast(), torch.compiler.set_stance("force_eager"):
            states = teacher.states(to_batch(data.val[:1], machine.device))  # (1, T, ...)
        self.whole_numbers, self.row_shape = not states.is_floating_point(), states.shape[2:]
        self.dtype = np.int64 if self.whole_numbers else np.int16  # NumPy has no bfloat16: its bits
        width = self.row_shape.numel()
        self.token_bytes = width * np.dtype(self.dtype).itemsize
        self.chunks = n_chunks(cfg, data.shards)
        self.per_shard = max(1, SHARD_BYTES // (self.token_bytes * cfg.seq_len))  # chunks
        self.shards = range(-(-self.chunks // self.per_shard))
        name = re.sub(r"\W+", "_", os.path.normpath(cfg.teachers[i])).strip("_")
        self.folder = os.path.join(cfg.teacher_cache, name)
        self.identity = dict(
            format_version=FORMAT_VERSION, seq_len=cfg.seq_len, width=width, chunks_per_shard=self.per_shard,
            weights_sha256=teacher.weights_sha256, data_sha256=data_sha256(data.meta),
            dtype="int64" if self.whole_numbers else str(machine.dtype).removeprefix("torch."),  # computed in
            teacher_dtype=cfg.teacher_dtype[i % len(cfg.teacher_dtype)])
        self.identity_sha256 = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()
        self.check_identity()

    def check_identity(self):
        """Exit if the folder's cache.json says that it is of something else."""
        if os.path.isfile(os.path.join(self.folder, "cache.json")):
            found = read_json(os.path.join(self.folder, "cache.json"))
            for key, value in self.identity.items():
                if found.get(key) != value:
                    sys.exit(f"error: the teacher cache {self.folder} is of something else ({key} was "
                             f"{found.get(key)}, is {value}); delete that folder or name another "
                             "--teacher_cache")

    def shard(self, k, ending="bin"):
        return os.path.join(self.folder, f"states_{k:05d}.{ending}")

    def chunks_of(self, k):
        return range(k * self.per_shard, min((k + 1) * self.per_shard, self.chunks))

    def has(self, k):
        """True if shard k is there; one of another teacher or data is refused."""
        path = self.shard(k, "json")
        if not os.path.isfile(path):
            return False
        if read_json(path, ("sha256", "identity_sha256"))["identity_sha256"] != self.identity_sha256:
            sys.exit(f"error: {path} is of another teacher or data; delete {self.folder} or name another "
                     "--teacher_cache")
        return True

    def shard_bytes(self, k):
        return self.token_bytes * self.cfg.seq_len * len(self.chunks_of(k))

    def missing_bytes(self):
        return sum(self.shard_bytes(k) for k in self.shards if not self.has(k))

    @torch.no_grad()
    def write(self, teacher):
        """One pass of the teacher over the chunks of the missing shards, dealt out to the ranks."""
        cfg, machine = self.cfg, self.machine
        os.makedirs(self.folder, exist_ok=True)
        if machine.rank == 0 and self.missing_bytes():
            lock(self.folder)
            self.check_identity()  # again: another process may have been here since
            write_json(os.path.join(self.folder, "cache.json"), self.identity)
        if machine.world > 1:
            dist.barrier()
        todo = [k for k in self.shards[machine.rank::machine.world] if not self.has(k)]
        quiet = machine.rank > 0 or not sys.stderr.isatty()
        for k in tqdm(todo, desc=self.folder, unit="shard", disable=quiet):
            chunks = self.chunks_of(k)
            with open(self.shard(k), "wb") as f:
                for i in range(chunks.start, chunks.stop, machine.micro_batch):
                    index = np.arange(i, i + machine.micro_batch)  # one shape: compiled once
                    index = index.clip(max=chunks.stop - 1)
                    tokens = self.data.shards.windows(index * cfg.seq_len, cfg.seq_len + 1)
                    with machine.autocast():
                        states = teacher.states(to_batch(tokens, machine.device, index))[:chunks.stop - i]
                    bits = states.long() if self.whole_numbers else states.bfloat16().view(torch.int16)
                    bits.cpu().numpy().tofile(f)
            flush_to_disk(self.shard(k))
            write_json(self.shard(k, "json"),
                       dict(sha256=sha256(self.shard(k)), identity_sha256=self.identity_sha256))

    def open(self):
        """The shards as memory maps; each rank verifies its share of the checksums."""
        maps = []
        for k in self.shards:
            path = self.shard(k)
            good = os.path.isfile(path) and os.path.getsize(path) == self.shard_bytes(k)
            if good and k % self.machine.world == self.machine.rank:
                good = sha256(path) == read_json(self.shard(k, "json"), ["sha256"])["sha256"]
            if not good:
                sys.exit(f"error: {path} is missing or damaged; delete {self.shard(k, 'json')} to have it "
                         "computed again")
            maps.append(np.memmap(path, self.dtype, "r").reshape(-1, self.cfg.seq_len, *self.row_shape))
        return maps

    def read(self, maps, index, states):
        """The chunks `index` into states (B, T, C)."""
        bits = states if self.whole_numbers else states.view(torch.int16)
        np.stack([maps[chunk // self.per_shard][chunk % self.per_shard] for chunk in index], out=bits.numpy())
