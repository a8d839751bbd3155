"""What lives on disk: tokenizers, token shards, checkpoints. No pickle anywhere.

    data/<name>/  train_00000.bin val_00000.bin ... (uint16, little endian, no header), the tokenizer, meta.json
    out/<run>/    ckpt_<step>/ (config.json model.safetensors tokenizer sha256.json, the newest also
                  state.safetensors state.json), last.json, best.json, metrics.jsonl, train_config.json;
                  with keep_words also chck_<words>M/

Every folder explains itself: meta.json and sha256.json are written last and name every other file.
torch is imported where it is needed, so that prepare.py's worker processes start fast.
"""
import base64
import bisect
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import regex  # tiktoken's own
import sentencepiece
import tiktoken

FORMAT_VERSION = 1
COUNTERS = ("step", "best_val_ce", "best_step", "waited")  # of state.json
DTYPE = np.dtype("<u2")  # a token on disk: vocabularies end at 65,536


# --- tokenizers -----------------------------------------------------------------------------------

class SentencePieceTokenizer:
    """A sentencepiece `.model` file. Text such as '<s>' never becomes a special token."""

    dropped = 0  # what has no piece becomes bytes

    def __init__(self, path):
        self.file = path
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=path)
        except Exception:
            sys.exit(f"error: {path} is not a sentencepiece model, or is damaged")
        self.vocab_size = self.sp.vocab_size()
        self.pad, self.bos, self.eos = (i if i >= 0 else None for i in
                                        (self.sp.pad_id(), self.sp.bos_id(), self.sp.eos_id()))

    def encode(self, text):
        """Token ids of `text` (after the model's normalisation), without special tokens."""
        return self.sp.encode(text)

    def decode(self, ids):
        return self.sp.decode([int(i) for i in ids])

    def splits_at_blanks(self):
        """True if encoding text equals encoding it cut before each blank: no piece reaches over a
        blank, and none is added or removed. Then prepare.py encodes each distinct word once."""
        inner = any("\u2581" in self.sp.id_to_piece(i)[1:] for i in range(self.vocab_size))
        inner = inner or any(len(p) > 1 and set(p) & set("\n\t") for p in map(self.sp.id_to_piece, range(self.vocab_size)))
        return not inner and self.decode(self.encode("  a  b ")) == "  a  b " and self.encode("a b") == \
            self.encode("a") + self.encode(" b")


class TiktokenTokenizer:
    """A byte-level BPE kept in one JSON file: name, pattern, special tokens, ranks (base64); of an imported one (hf.py) also whether
    text is normalised (nfkc), which specials are bos, eos and pad, and the model's vocab_size. Bytes that have no token are
    dropped, as the tokenizers library does; `dropped` counts them."""

    def __init__(self, path):
        self.file = path
        try:
            with open(path, encoding="utf-8") as f:
                spec = json.load(f)
            self.ranks = {base64.b64decode(token): rank for token, rank in spec["ranks"].items()}
            self.pattern, self.specials = spec["pattern"], spec["specials"]
            self.bpe = tiktoken.Encoding(spec["name"], pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.specials)
        except Exception as e:
            sys.exit(f"error: {path} is not a tokenizer file of ours, or is damaged ({type(e).__name__}: {e})")
        self.missing = bytes(i for i in range(256) if bytes([i]) not in self.ranks)
        self.dropped = 0
        self.nfkc = spec.get("nfkc", False)
        self.vocab_size = spec.get("vocab_size", self.bpe.n_vocab)
        self.bos, self.eos, self.pad = (next((self.specials[n] for n in names if n in self.specials), None) for names in (
            (spec.get("bos"), "<s>", "<|endoftext|>"), (spec.get("eos"), "</s>", "<|endoftext|>"), (spec.get("pad"), "<pad>")))

    def encode(self, text):
        if self.nfkc:
            text = unicodedata.normalize("NFKC", text)
        data = text.encode()
        if len(data.translate(None, self.missing)) == len(data):
            return self.bpe.encode_ordinary(text)
        ids = []
        for piece in regex.findall(self.pattern, text):  # tiktoken panics on a byte it does not know
            data = piece.encode()
            kept = data.translate(None, self.missing)
            self.dropped += len(data) - len(kept)
            ids += self.bpe._encode_single_piece(kept) if kept else []
        return ids

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids])

    def splits_at_blanks(self):
        return False


def load_tokenizer(path):
    """The tokenizer in file `path`: sentencepiece (`.model`) or a tiktoken JSON (`.json`)."""
    if not os.path.isfile(path):
        sys.exit(f"error: no tokenizer file {path}")
    return TiktokenTokenizer(path) if path.endswith(".json") else SentencePieceTokenizer(path)


def save_tiktoken(encoding, path):
    """Write a tiktoken Encoding to our JSON file, so that nothing is downloaded later."""
    ranks = {base64.b64encode(token).decode(): rank for token, rank in encoding._mergeable_ranks.items()}
    write_json(path, dict(name=encoding.name, pattern=encoding._pat_str,
                          specials=encoding._special_tokens, ranks=ranks))


# --- token shards ---------------------------------------------------------------------------------

class Shards:
    """One split of a data folder as a single memory-mapped token stream.

    len() is the number of tokens; `windows(starts, n)` gives int64 (len(starts), n).
    """

    def __init__(self, data_dir, split):
        self.meta = read_meta(data_dir)
        names = [s for s in self.meta["shards"] if s["split"] == split]
        if not names:
            sys.exit(f"error: {data_dir} has no '{split}' split; prepare it again with one")
        self.maps = [open_shard(data_dir, s) for s in names]
        self.ends = np.cumsum([len(m) for m in self.maps]).tolist()

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
    """meta.json of a finished data folder."""
    path = os.path.join(data_dir, "meta.json")
    if not os.path.isdir(data_dir):
        sys.exit(f"error: no data folder {data_dir}; make it with prepare.py")
    if not os.path.isfile(path):
        sys.exit(f"error: {data_dir} is unfinished (no meta.json); run prepare.py again")
    meta = read_json(path, ("format_version", "vocab_size", "tokenizer", "tokenizer_sha256", "pad", "options", "shards"))
    if not isinstance(meta["shards"], list) or not meta["shards"] or not all(
            isinstance(s, dict) and all(isinstance(s.get(key), str) for key in ("split", "file", "sha256"))
            and isinstance(s.get("tokens"), int) and s["tokens"] > 0 for s in meta["shards"]):
        sys.exit(f"error: {path} is damaged: 'shards' does not describe shards")
    if not isinstance(meta["tokenizer"], str) or not isinstance(meta["vocab_size"], int) or "bos" not in dict(meta["options"] or {}):
        sys.exit(f"error: {path} is damaged: 'tokenizer', 'vocab_size' or 'options' is not what prepare.py writes")
    if meta["format_version"] != FORMAT_VERSION:
        sys.exit(f"error: {path} has format {meta['format_version']}, this code reads {FORMAT_VERSION}; "
                 "prepare it again")
    tokenizer = os.path.join(data_dir, meta["tokenizer"])
    if not os.path.isfile(tokenizer) or sha256(tokenizer) != meta["tokenizer_sha256"]:
        sys.exit(f"error: {tokenizer} is missing or not the tokenizer meta.json describes; prepare {data_dir} again")
    return meta


def data_sha256(meta):
    """One hash for what a data folder's tokens are: its tokenizer and shards."""
    parts = [meta["tokenizer_sha256"], *(s["sha256"] for s in meta["shards"])]
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
        sys.exit(f"error: {path} is not the shard meta.json describes (SHA-256 differs); prepare {data_dir} again")
    return np.memmap(path, DTYPE, "r")


# --- checkpoints ----------------------------------------------------------------------------------

def save_checkpoint(out_dir, name, model, config, tokenizer_file, state=None):
    """Write out_dir/<name>/ whole or not at all.

    config: what config.json holds beside the format version. state: (tensors, counters), what only
    resuming needs, both dicts. Tied tensors are stored once. Nothing points to the folder
    until `point_to` does.
    """
    from safetensors.torch import save_file

    folder, tmp = os.path.join(out_dir, name), os.path.join(out_dir, name + ".tmp")
    for stale in (tmp, folder):  # of a run that was killed here before
        shutil.rmtree(stale, ignore_errors=True)
    os.makedirs(tmp)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not k.startswith("companion.")}
    if model.cfg.tie_weights:
        del weights["lm_head.weight"]
    save_file(weights, os.path.join(tmp, "model.safetensors"))
    write_json(os.path.join(tmp, "config.json"), dict(format_version=FORMAT_VERSION, **config))
    shutil.copy(tokenizer_file, tmp)
    if state:
        tensors = {k: v.detach().cpu().contiguous() for k, v in state[0].items()}
        save_file(tensors, os.path.join(tmp, "state.safetensors"))
        write_json(os.path.join(tmp, "state.json"), state[1])
    write_json(os.path.join(tmp, "sha256.json"), {f: sha256(os.path.join(tmp, f)) for f in sorted(os.listdir(tmp))})
    for f in os.listdir(tmp):
        flush_to_disk(os.path.join(tmp, f))
    flush_to_disk(tmp)
    os.rename(tmp, folder)
    flush_to_disk(out_dir)


def point_to(out_dir, pointer, name, step, val_ce):
    """Make `last.json` or `best.json` name a checkpoint folder; the old pointer holds until then."""
    write_json(os.path.join(out_dir, pointer), dict(folder=name, step=step, val_ce=val_ce))


def pointed(out_dir, pointer):
    """The name of the folder that `pointer` names, or None."""
    path = os.path.join(out_dir, pointer)
    name = read_json(path, ["folder"])["folder"] if os.path.isfile(path) else None
    if name is not None and not re.fullmatch(r"ckpt_\d+", str(name)):
        sys.exit(f"error: {path} is damaged: 'folder' is {name!r}")
    return name


# the names of what a run writes into its folder: nothing else in there is ever deleted
RUN_FILES = re.compile(r"(ckpt_\d+|chck_\d+M|member_\d+)(\.tmp)?|((last|best|train_config|blimp|predictions)\.json|metrics\.jsonl)(\.tmp)?|events\.out\.tfevents\..*")


def delete_run(out_dir):
    for name in os.listdir(out_dir) if os.path.isdir(out_dir) else ():
        path = os.path.join(out_dir, name)
        if RUN_FILES.fullmatch(name):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def drop_old_checkpoints(out_dir):
    """Keep the folder last.json names and the one before it, should the disk lose that; of the best
    one only what is needed to use it."""
    best, last = (pointed(out_dir, pointer) for pointer in ("best.json", "last.json"))
    resumable = [os.path.basename(folder) for folder in checkpoints(out_dir, last)][:2]
    for name in os.listdir(out_dir):
        if re.fullmatch(r"ckpt_\d+(\.tmp)?", name) and name not in resumable:
            for f in os.listdir(os.path.join(out_dir, name)) if name == best else ():
                if f in ("state.safetensors", "state.json"):
                    os.remove(os.path.join(out_dir, name, f))
            if name != best:
                shutil.rmtree(os.path.join(out_dir, name))


def checkpoint_steps(out_dir):
    """The steps of a run's checkpoint folders, which are called ckpt_<step>, in order."""
    return sorted(int(name[5:]) for name in (os.listdir(out_dir) if os.path.isdir(out_dir) else ()) if re.fullmatch(r"ckpt_\d+", name))


def checkpoints(out_dir, last=None):
    """Checkpoint folders a run can go on from, the latest first, from the folder named `last` on."""
    folders = [os.path.join(out_dir, f"ckpt_{step}") for step in reversed(checkpoint_steps(out_dir)) if last is None or step <= int(last[5:])]
    return [folder for folder in folders if os.path.isfile(os.path.join(folder, "state.json"))]


def find_resumable(out_dir):
    """The folder last.json names, whole. If it is damaged, exits naming the one before it."""
    last = pointed(out_dir, "last.json")
    folders = checkpoints(out_dir, last)
    if last and os.path.isdir(os.path.join(out_dir, last)) and os.path.join(out_dir, last) not in folders:
        folders.insert(0, os.path.join(out_dir, last))  # without state.json: damaged
    wrong = damage(folders[0]) if folders else "no checkpoint to resume from"
    if wrong:
        good = next((folder for folder in folders[1:] if not damage(folder)), None)
        sys.exit(f"error: {wrong}; " + (f"the last good checkpoint is {good}: delete {folders[0]} to resume from there"
                                        if good else f"{out_dir} has no other; use --overwrite to start again"))
    return folders[0]


def find_checkpoint(path):
    """The checkpoint folder meant by `path`: itself, or the one a run folder points to."""
    if path.endswith((".pt", ".pth", ".bin", ".pkl", ".ckpt")):
        sys.exit(f"error: {path}: pickled checkpoints are never opened (unpickling runs code); "
                 "name a run or checkpoint folder")
    if not os.path.isdir(path):
        sys.exit(f"error: no checkpoint at '{path}'")
    if os.path.isfile(os.path.join(path, "config.json")):
        return os.path.normpath(path)
    for pointer in ("best.json", "last.json"):
        name = pointed(path, pointer)
        if name:
            folder = os.path.join(path, name)
            if not os.path.isdir(folder):
                sys.exit(f"error: {os.path.join(path, pointer)} names {folder}, which is not there")
            return folder
    sys.exit(f"error: {path} holds no checkpoint (no config.json, best.json or last.json)")


def read_checkpoint_config(folder):
    """config.json of a checkpoint folder, of a format this code reads."""
    verify(folder, ["config.json"])
    config = read_json(os.path.join(folder, "config.json"), ("format_version", "model", "tokenizer", "tokenizer_sha256", "bos"))
    if config["format_version"] != FORMAT_VERSION:
        sys.exit(f"error: {folder} has checkpoint format {config['format_version']}, "
                 f"this code reads {FORMAT_VERSION}")
    return config


def load_checkpoint(path, device="cpu"):
    """A model in evaluation mode, its tokenizer and its config.json (and its weights' SHA-256), from a
    run or checkpoint folder. Checksums are verified first."""
    from safetensors.torch import load_file

    from model import LanguageModel, ModelConfig

    folder = find_checkpoint(path)
    config = read_checkpoint_config(folder)
    verify(folder, ["model.safetensors", config["tokenizer"]])
    try:
        cfg = ModelConfig(**config["model"])
    except TypeError as e:
        sys.exit(f"error: {folder}/config.json does not describe a model of ours: {e}")
    model = LanguageModel(cfg)
    weights = load_file(os.path.join(folder, "model.safetensors"))
    if cfg.tie_weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    config["weights_sha256"] = weights_sha256(folder)
    return model.to(device).eval(), load_tokenizer(os.path.join(folder, config["tokenizer"])), config


def weights_sha256(path):
    """What a run or checkpoint folder says its weights' SHA-256 is."""
    return read_json(os.path.join(find_checkpoint(path), "sha256.json"), ["model.safetensors"])["model.safetensors"]


def load_state(folder):
    """(tensors, counters) that `save_checkpoint` was given as state."""
    from safetensors.torch import load_file

    verify(folder, ["state.safetensors", "state.json"])
    return load_file(os.path.join(folder, "state.safetensors")), read_json(os.path.join(folder, "state.json"), COUNTERS)


def verify(folder, files):
    """Exit if one of `files` is missing or is not what the folder's sha256.json says."""
    wrong = damage(folder, files)
    if wrong:
        sys.exit(f"error: {wrong}")


def damage(folder, files=None):
    """What is wrong with `files` (all of them, if not named) by the folder's sha256.json, or ''."""
    path = os.path.join(folder, "sha256.json")
    try:
        with open(path, encoding="utf-8") as f:
            expected = dict(json.load(f))
    except FileNotFoundError:
        return f"{folder} is unfinished (no sha256.json)"
    except (OSError, ValueError, TypeError) as e:
        return f"cannot read {path}: {e}"
    for f in expected if files is None else files:
        path = os.path.join(folder, f)
        if not os.path.isfile(path):
            return f"{path} is missing"
        try:
            if sha256(path) != expected.get(f):
                return f"{path} is damaged (SHA-256 differs from sha256.json)"
        except OSError as e:
            return f"cannot read {path}: {e}"
    return ""


# --- small things ---------------------------------------------------------------------------------

def read_json(path, keys=()):
    """The JSON object in a file, which must have `keys`."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (OSError, ValueError) as e:
        sys.exit(f"error: cannot read {path}: {e}")
    if not isinstance(value, dict):
        sys.exit(f"error: {path} is damaged: not a JSON object")
    for key in keys:
        if key not in value:
            sys.exit(f"error: {path} is damaged: no '{key}'")
    return value


def write_json(path, value):
    """Replace `path` by `value` in one step: a reader sees the old file or the new one."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)
    flush_to_disk(os.path.dirname(path) or ".")


def write_lines(path, lines):
    """Replace a text file by `lines`, as write_json does; several processes may do so at once."""
    tmp = f"{path}.{os.getpid()}.tmp"
    with open(tmp, "w", encoding="utf-8") as f:
        f.writelines(lines)
    os.replace(tmp, path)


def check_writable(path):
    """Exit if a file cannot be put at `path`: before hours of work, not after."""
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
        sys.exit(f"error: cannot write {path}: a folder, or in a folder that is not there")


_locks = {}  # folder -> file descriptor, held until the process ends


def lock(folder):
    """Hold `folder` against other processes that write into it."""
    folder = os.path.realpath(folder)
    if folder not in _locks:
        fd = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"error: another process is writing into {folder}")
        _locks[folder] = fd


def flush_to_disk(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def git_revision():
    """The code's commit, with + and a hash of the change if Python files differ from it; 'unknown' outside a checkout."""
    def git(*args):
        return subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), *args],
                              capture_output=True, check=True).stdout.strip()
    try:
        change = git("diff", "HEAD", "--", "*.py")
        return git("rev-parse", "--short", "HEAD").decode() + ("+" + hashlib.sha256(change).hexdigest()[:6] if change else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
