"""Files: JSON, atomic replacement, locks, hashes, the code's revision."""
import contextlib
import fcntl
import hashlib
import json
import math
import os
import subprocess
import sys

FORMAT_VERSION = 1  # of data folders, checkpoints and teacher caches


def parse_json(text):
    """The value of a JSON text (bytes: UTF-8). ValueError too for numbers beyond any float, and for nesting
    beyond any use."""
    def finite(number):
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is not a finite number")
        return value
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path, keys=()):
    """The JSON object in a file, which must have `keys`."""
    try:
        with open(regular(path), "rb") as f:
            value = parse_json(f.read())
    except (OSError, ValueError) as e:
        sys.exit(f"error: cannot read {path}: {e}")
    if not isinstance(value, dict):
        sys.exit(f"error: {path} is damaged: not a JSON object")
    for key in keys:
        if key not in value:
            sys.exit(f"error: {path} is damaged: no '{key}'")
    return value


@contextlib.contextmanager
def replacing(path):
    """A text file to write, which takes the place of `path` in one step: a reader sees the old one or the new
    one. Processes take turns; what a killed one left is written over."""
    tmp, turn = path + ".tmp", False
    while not turn:
        f = open(tmp, "a", encoding="utf-8", errors="backslashreplace")  # names may not be UTF-8
        fcntl.flock(f, fcntl.LOCK_EX)
        turn = os.path.exists(tmp) and os.path.samestat(os.fstat(f.fileno()), os.stat(tmp))
        if not turn:
            f.close()
    with f:
        f.truncate(0)
        yield f
        f.flush()
        os.fsync(f.fileno())
        os.replace(tmp, path)
    flush_to_disk(os.path.dirname(path) or ".")


def write_json(path, value):
    with replacing(path) as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")


def write_lines(path, lines):
    with replacing(path) as f:
        f.writelines(lines)


def check_writable(path):
    """Exit if a file cannot be put at `path`, which is tried: before hours of work, not after."""
    if os.path.exists(path) and not os.path.isfile(path) or not os.path.isdir(os.path.dirname(path) or "."):
        sys.exit(f"error: cannot write {path}: no regular file, or in a folder that is not there")
    trial = path + ".trial"
    try:
        with open(trial, "wb") as f:
            f.write(b"x")
        os.remove(trial)
    except FileNotFoundError:
        pass  # another process tried at the same time
    except OSError as e:
        sys.exit(f"error: cannot write {path}: {e.strerror}")


def regular(path):
    """`path`, unless it is there and no regular file or link to one: a pipe would be waited for for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        sys.exit(f"error: {path} is not a regular file")
    return path


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
    """The code's commit, with + and a hash of the change if Python files differ from it; 'unknown' outside
    a checkout."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def git(*args):
        return subprocess.run(["git", "-C", root, *args], capture_output=True, check=True).stdout.strip()
    try:
        commit, change = git("rev-parse", "--short", "HEAD").decode(), git("diff", "HEAD", "--", "*.py")
        return f"{commit}+{hashlib.sha256(change).hexdigest()[:6]}" if change else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
