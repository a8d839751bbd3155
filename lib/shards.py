"""Token shards: what prepare.py writes and everything else reads, memory-mapped.

    data/<name>/  train_00000.bin val_00000.bin ... (uint16, little endian, no header), tokenizer, meta.json

meta.json is written last and names every other file with its SHA-256. No torch in here: prepare.py's
worker processes start fast.
"""
import bisect
import hashlib
import os
import pathlib
import sys

import numpy as np

from lib.files import FORMAT_VERSION, read_json, sha256
from lib.tokenizers import load_tokenizer

DTYPE = np.dtype("<u2")  # a token on disk: vocabularies end at 65,536


class Shards:
    """One split of a data folder as a single memory-mapped token stream.

    len() is the number of tokens; `windows(starts, n)` gives int64 (len(starts), n).
    """

    def __init__(self, data_dir, split):
        self.meta = read_meta(data_dir)
        names = [s for s in self.meta["shards"] if s["split"] == split]
        if not names:
            sys.exit(f"error: {data_dir} has no '{split}' split; prepare it again with one")
        self.maps = [np.asarray(open_shard(data_dir, s)) for s in names]  # a memmap is slow to slice
        self.ends = np.cumsum([len(m) for m in self.maps]).tolist()
        # the folder may be prepared anew while a run trains
        self.tokenizer = pathlib.Path(data_dir, self.meta["tokenizer"]).read_bytes()

    def __len__(self):
        return self.ends[-1]

    def windows(self, starts, n):
        out = np.empty((len(starts), n), np.int64)
        for row, start in zip(out, starts):
            k, filled = bisect.bisect_right(self.ends, start), 0
            start -= self.ends[k] - len(self.maps[k])
            while filled < n:  # a window may reach over the end of a shard
                part = self.maps[k][start:start + n - filled]
                row[filled:filled + len(part)] = part
                k, start, filled = k + 1, 0, filled + len(part)
        return out


def read_meta(data_dir):
    """meta.json of a finished data folder, after all that is read of it was found good."""
    path = os.path.join(data_dir, "meta.json")
    if not os.path.isdir(data_dir):
        sys.exit(f"error: no data folder {data_dir}; make it with prepare.py")
    if not os.path.isfile(path):
        sys.exit(f"error: {data_dir} is unfinished (no meta.json); run prepare.py again")
    meta = read_json(path, ("format_version",))
    if meta["format_version"] != FORMAT_VERSION:
        sys.exit(f"error: {path} has format {meta['format_version']}, this code reads {FORMAT_VERSION}; "
                 "prepare it again")
    for key, is_good in META.items():
        if not is_good(meta.get(key)):
            sys.exit(f"error: {path} is damaged: '{key}' is not what prepare.py writes")
    if not {"train", *(s["split"] for s in meta["shards"])} <= meta["words"].keys():
        sys.exit(f"error: {path} is damaged: 'words' lacks a split that 'shards' has")
    tokenizer = os.path.join(data_dir, meta["tokenizer"])
    if not os.path.isfile(tokenizer) or sha256(tokenizer) != meta["tokenizer_sha256"]:
        sys.exit(f"error: {tokenizer} is missing or not the tokenizer meta.json describes; "
                 f"prepare {data_dir} again")
    has = load_tokenizer(tokenizer)
    for key in ("vocab_size", "pad"):
        if meta[key] != getattr(has, key):
            sys.exit(f"error: {path} says {key}={meta[key]}, its tokenizer has {getattr(has, key)}; "
                     f"prepare {data_dir} again")
    return meta


def is_whole(value, least=0):
    return type(value) is int and least <= value < 2 ** 63


def is_file_name(value):
    """Of a file in the folder itself: no path leads out of it."""
    return isinstance(value, str) and value == os.path.basename(value) and value not in ("", ".", "..")


def is_counts(value):
    """split -> source -> a number."""
    return isinstance(value, dict) and all(
        isinstance(counts, dict) and all(map(is_whole, counts.values())) for counts in value.values())


def is_shard(entry):
    return (isinstance(entry, dict) and entry.get("split") in ("train", "val", "test")
            and is_file_name(entry.get("file")) and isinstance(entry.get("sha256"), str)
            and is_whole(entry.get("tokens"), 1))


META = dict(  # what is read of meta.json -> is it what prepare.py writes?
    vocab_size=lambda v: is_whole(v, 1) and v <= 65536,
    tokenizer=is_file_name, tokenizer_sha256=lambda v: isinstance(v, str),
    pad=lambda v: v is None or is_whole(v),
    options=lambda v: isinstance(v, dict) and v.get("bos") in ("none", "document", "line"),
    shards=lambda v: isinstance(v, list) and v and all(map(is_shard, v)),
    words=is_counts,
    # older folders lack these
    sources=lambda v: v is None or is_counts(v),
    readability=lambda v: v is None or is_counts(v) and all(n.keys() == set("WSYKP") for n in v.values()))


def data_sha256(meta, split=None):
    """One hash for what a data folder's tokens are: its tokenizer and shards, or those of a split."""
    shards = [s["sha256"] for s in meta["shards"] if split in (None, s["split"])]
    parts = [meta["tokenizer_sha256"], *shards]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def open_shard(data_dir, entry):
    """The shard as a read-only memory map, after its size and SHA-256 agree with meta.json."""
    path = os.path.join(data_dir, entry["file"])
    if not os.path.isfile(path):
        sys.exit(f"error: {path} is missing; prepare {data_dir} again")
    if os.path.getsize(path) != entry["tokens"] * DTYPE.itemsize:
        sys.exit(f"error: {path} has {os.path.getsize(path)} bytes, meta.json says "
                 f"{entry['tokens'] * DTYPE.itemsize}: truncated or foreign; prepare {data_dir} again")
    if sha256(path) != entry["sha256"]:
        sys.exit(f"error: {path} is not the shard meta.json describes (SHA-256 differs); "
                 f"prepare {data_dir} again")
    return np.memmap(path, DTYPE, "r")
