"""Teachers computed once: their final hidden states for every training chunk, kept on disk.

    python distill.py config/babyllama.py --teacher_cache=cache

With fixed chunks a teacher's states for a chunk are the same in each epoch and for each student; only
its output head is applied again. Exact but for rounding the states to bfloat16, which bfloat16
arithmetic does to them anyway; cached top-k logits are not.

    cache/<teacher>/  cache.json (whose states of what), states_00000.bin ... (bfloat16, chunks x seq_len x C),
                      states_00000.json ... (SHA-256, written last: a pass that was cut short goes on)
"""
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

import disk
from chunks import n_chunks, to_batch

SHARD_BYTES = 2 ** 28  # what an interrupted pass may lose


def cached_states(cfg, run, teachers):
    """Write what is missing, then give states(batch) -> (B, T, C_1 + ... + C_n) in bfloat16, read
    from disk by chunk index. Exits if the cache is of something else, damaged, or does not fit."""
    if cfg.random_offset:
        sys.exit("error: teacher_cache wants fixed chunks, since a state depends on where its chunk begins: "
                 "use --random_offset=False")
    if os.path.lexists(cfg.teacher_cache) and not os.path.isdir(cfg.teacher_cache):
        sys.exit(f"error: teacher_cache={cfg.teacher_cache} is not a folder; name one, or a new one")
    caches = [StateCache(cfg, run, i, t) for i, t in enumerate(teachers)]
    if len({c.folder for c in caches}) < len(caches):
        sys.exit(f"error: two of teachers={','.join(cfg.teachers)} would share a folder in {cfg.teacher_cache}")
    os.makedirs(cfg.teacher_cache, exist_ok=True)
    missing, free = sum(c.missing_bytes() for c in caches), shutil.disk_usage(cfg.teacher_cache).free
    if run.rank == 0 and missing:
        print(f"teacher cache: {missing / 1e9:.3g} GB to write into {cfg.teacher_cache}, {free / 1e9:.3g} GB free; "
              f"{sum(2 * c.width for c in caches):,} bytes per token", flush=True)
    if missing > free:
        sys.exit(f"error: {cfg.teacher_cache} has {free / 1e9:.3g} GB free, the teacher cache wants {missing / 1e9:.3g} GB")
    if run.world > 1:
        dist.barrier()  # every rank has looked before one writes
    for cache, teacher in zip(caches, teachers):
        cache.write(teacher)
    if run.world > 1:
        dist.barrier()
    maps = [c.open() for c in caches]

    def states(batch):
        rows = np.concatenate([c.rows(m, batch.index) for c, m in zip(caches, maps)], axis=-1)
        h = torch.from_numpy(rows).view(torch.bfloat16)
        return h if run.device.type == "cpu" else h.pin_memory().to(run.device, non_blocking=True)
    return states


class StateCache:
    """The i-th teacher's folder of a cache."""

    def __init__(self, cfg, run, i, teacher):
        path, width = cfg.teachers[i], teacher.cfg.n_embd
        self.cfg, self.run, self.width, self.chunks = cfg, run, width, n_chunks(cfg, run.shards)
        self.per_shard = max(1, SHARD_BYTES // (2 * width * cfg.seq_len))  # chunks
        self.shards = range(-(-self.chunks // self.per_shard))
        self.folder = os.path.join(cfg.teacher_cache, re.sub(r"\W+", "_", os.path.normpath(path)).strip("_"))
        self.identity = dict(
            format_version=disk.FORMAT_VERSION, seq_len=cfg.seq_len, width=width, chunks_per_shard=self.per_shard,
            weights_sha256=teacher.weights_sha256,
            data_sha256=disk.data_sha256(run.shards.meta), dtype="bfloat16" if run.bf16 else "float32",
            teacher_dtype=cfg.teacher_dtype[i % len(cfg.teacher_dtype)])
        self.identity_sha256 = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()
        if os.path.isfile(os.path.join(self.folder, "cache.json")):
            found = disk.read_json(os.path.join(self.folder, "cache.json"))
            for key, value in self.identity.items():
                if found.get(key) != value:
                    sys.exit(f"error: the teacher cache {self.folder} is of something else ({key} was {found.get(key)}, is "
                             f"{value}); delete that folder or name another --teacher_cache")

    def shard(self, k, ending="bin"):
        return os.path.join(self.folder, f"states_{k:05d}.{ending}")

    def chunks_of(self, k):
        return range(k * self.per_shard, min((k + 1) * self.per_shard, self.chunks))

    def has(self, k):
        """True if shard k is there; one of another teacher or data is refused."""
        path = self.shard(k, "json")
        if os.path.isfile(path) and disk.read_json(path, ("sha256", "identity_sha256"))["identity_sha256"] != self.identity_sha256:
            sys.exit(f"error: {path} is of another teacher or data; delete {self.folder} or name another --teacher_cache")
        return os.path.isfile(path)

    def missing_bytes(self):
        return sum(2 * self.width * self.cfg.seq_len * len(self.chunks_of(k)) for k in self.shards if not self.has(k))

    @torch.no_grad()
    def write(self, teacher):
        """One pass of the teacher over the chunks of the missing shards, dealt out to the ranks."""
        cfg, run = self.cfg, self.run
        os.makedirs(self.folder, exist_ok=True)
        if run.rank == 0 and self.missing_bytes():
            disk.lock(self.folder)
            disk.write_json(os.path.join(self.folder, "cache.json"), self.identity)
        if run.world > 1:
            dist.barrier()
        todo = [k for k in self.shards[run.rank::run.world] if not self.has(k)]
        for k in tqdm(todo, desc=self.folder, unit="shard", disable=run.rank > 0 or not sys.stderr.isatty()):
            chunks = self.chunks_of(k)
            with open(self.shard(k), "wb") as f:
                for i in range(chunks.start, chunks.stop, run.micro_batch):
                    index = np.arange(i, i + run.micro_batch).clip(max=chunks.stop - 1)  # one shape: compiled once
                    batch = to_batch(run.shards.windows(index * cfg.seq_len, cfg.seq_len + 1), run.device, index)
                    with run.autocast():
                        h = teacher.model(batch.x)  # (B, T, C)
                    h[:chunks.stop - i].bfloat16().view(torch.int16).cpu().numpy().tofile(f)
            disk.flush_to_disk(self.shard(k))
            disk.write_json(self.shard(k, "json"), dict(sha256=disk.sha256(self.shard(k)), identity_sha256=self.identity_sha256))

    def open(self):
        """The shards as memory maps; each rank verifies its share of the checksums."""
        maps = []
        for k in self.shards:
            path = self.shard(k)
            size = 2 * self.width * self.cfg.seq_len * len(self.chunks_of(k))
            good = os.path.isfile(path) and os.path.getsize(path) == size
            if good and k % self.run.world == self.run.rank:
                good = disk.sha256(path) == disk.read_json(self.shard(k, "json"), ["sha256"])["sha256"]
            if not good:
                sys.exit(f"error: {path} is missing or damaged; delete {self.shard(k, 'json')} to have it computed again")
            maps.append(np.memmap(path, np.int16, "r").reshape(-1, self.cfg.seq_len, self.width))
        return maps

    def rows(self, maps, index):
        """The chunks `index` as (B, T, C), the bits of bfloat16 in int16."""
        return np.stack([maps[chunk // self.per_shard][chunk % self.per_shard] for chunk in index])
