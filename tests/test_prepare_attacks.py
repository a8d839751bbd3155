"""What kills, foreign files and hostile text do to prepare.py and tokenizers: one line, and nothing lost."""
import contextlib
import errno
import http.server
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile

import pytest
import tiktoken

import lib.tokenizers
import prepare
from helpers import edit_json, thorough
from lib.configurator import launch
from lib.download import OFFICIAL
from lib.shards import Shards, data_sha256, read_meta
from lib.tokenizers import load_tokenizer, save_tiktoken
from prepare import CLEANERS, PrepareConfig, main
from tools.hf import sentencepiece_json

WORDS = 3 * "".join(f"the {a} {b} saw {c} things, and {b}s ran.\n" for a in ("big", "red", "old", "new")
                    for b in ("dog", "cat", "cow", "pig")
                    for c in ("two", "six", "ten", "some", "many", "no"))


def config(folder, **change):
    return PrepareConfig(**{"input_dir": str(folder / "in"), "data_dir": str(folder / "d"), "vocab_size": 330,
                            "val_fraction": 0.1, "workers": 1, **change})


@pytest.fixture
def folder(tmp_path):
    """in/a.txt, to be prepared as d/."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(WORDS)
    return tmp_path


def one_line(work, message):
    with pytest.raises(SystemExit, match=message) as e:
        work()
    assert "\n" not in str(e.value)


# --- killed, and other things in the way ----------------------------------------------------------

CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile")


def in_child(work, under, at=None, fault=None):
    """Exit status, error line and number of changes of files under a folder, of work() in a child process,
    to which fault(path) happens at the change `at`."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, changes, line = 99, 0, ""

        def hook(event, args):
            nonlocal changes
            if event in CHANGES and str(args[0]).startswith(str(under)) and not (
                    event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
                changes += 1
                if changes - 1 == at:
                    fault(str(args[0]))
        try:
            sys.addaudithook(hook)
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                launch(lambda _: work())
            code = 0
        except SystemExit as e:
            code, line = 1, str(e.code)
        except BaseException as e:
            line = f"Traceback: {type(e).__name__}: {e}"
        finally:
            os.write(write, json.dumps([line, changes]).encode())
            os._exit(code)  # come what may: there is a second pytest in here
    os.close(write)
    with open(read, "rb") as f:
        line, changes = json.loads(f.read() or b'["", 0]')
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), line, changes


def kill(path):
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def archive(**change):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", change.pop("compression", zipfile.ZIP_DEFLATED)) as z:
        for name, text in {"train_10M/cbt.train": WORDS, "dev/cbt.dev": WORDS, **change}.items():
            z.writestr(name, text)
    return buffer.getvalue()


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.server.body
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(200 if not start else 416 if start >= len(body) else 206)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:])

    def log_message(self, *a):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server whose `body` is 2023's archive."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.body, server.address = archive(), f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setitem(OFFICIAL, "2023", {"babylm_data.zip": server.address + "/babylm_data.zip"})
    yield server
    server.shutdown()


@pytest.mark.parametrize("fault", [kill, disk_full])
@pytest.mark.parametrize("residue", thorough((3, 0, 1, 2), sample=1))
@pytest.mark.parametrize("overwrite", thorough([False, True], sample=1))
def test_the_same_command_goes_on_after_any_file_operation(tmp_path, server, fault, residue, overwrite):
    """Of prepare.py --download, into a new folder or over another one's data."""
    def begin(name):
        cfg = config(tmp_path / name, val_fraction=0.0, download="2023", overwrite=overwrite)
        os.makedirs(tmp_path / name / "in")
        if overwrite:
            shutil.copytree(tmp_path / "old", cfg.data_dir)
        return cfg
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text(WORDS * 2)
    main(config(tmp_path, input_dir=str(tmp_path / "text"), data_dir=str(tmp_path / "old")))
    whole = begin("whole")
    _, line, changes = in_child(lambda: main(whole), tmp_path / "whole")
    assert changes > 15 and not line
    for at in range(residue, changes, 4):
        cfg = begin(str(at))
        code, line, _ = in_child(lambda: main(cfg), tmp_path / str(at), at, fault)
        assert code == -signal.SIGKILL or fault is disk_full and (
            code == 0 or line.startswith("error: ") and "\n" not in line), (at, line)
        if code and os.path.exists(cfg.data_dir + "/meta.json"):  # what is there is whole
            assert read_meta(cfg.data_dir)["words"]["train"]
        code, line, _ = in_child(lambda: main(cfg), tmp_path / str(at))
        assert code == 0 or "is already prepared" in line, (at, line)
        main(PrepareConfig(verify=cfg.data_dir))
        assert data_sha256(read_meta(cfg.data_dir)) == data_sha256(read_meta(whole.data_dir))
        for part in ("", "in", "d"):
            left, expected = (os.listdir(tmp_path / name / part) for name in (str(at), "whole"))
            assert sorted(left) == sorted(expected)


def is_worker(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as f:
        return b"spawn_main" in f.read()


def test_a_killed_prepare_leaves_no_workers(tmp_path):
    """They would wait for work for ever. Nor does one that loses a worker end in a traceback."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(WORDS * 2000)
    for victim in ("parent", "worker"):
        command = [sys.executable, prepare.__file__, f"--input_dir={tmp_path}/in", "--workers=2",
                   "--val_fraction=0.1", f"--data_dir={tmp_path}/{victim}", "--vocab_size=330"]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        children = f"/proc/{child.pid}/task/{child.pid}/children"
        while True:
            with open(children) as f:
                workers = [int(pid) for pid in f.read().split()]
            workers = [pid for pid in workers if is_worker(pid)]
            if len(workers) == 2 or child.poll() is not None:
                break
        os.kill(child.pid if victim == "parent" else workers[0], signal.SIGKILL)
        _, stderr = child.communicate(timeout=60)  # which workers hold open
        if victim == "worker":
            assert stderr.startswith("error: a worker process was killed") and len(stderr.splitlines()) == 1


# prepare.py, of whose first worker there is an end while the second is being started
WORKER_ENDS = """import os, signal, sys, time
import multiprocessing.popen_spawn_posix as _posix
sys.path.insert(0, {root!r})
import prepare
if __name__ == "__main__":
    launch, started = _posix.Popen._launch, []
    def killing(self, process):
        launch(self, process)
        started.append(self.pid)
        if len(started) == 2:
            os.kill(started[0], signal.SIGKILL)
            time.sleep(0.3)  # the pool hears of it before it knows of the second
    _posix.Popen._launch = killing
    prepare.launch(prepare.main, prepare.PrepareConfig)
"""


def test_a_worker_may_end_while_another_is_being_started(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(WORDS * 2000)
    (tmp_path / "main.py").write_text(WORKER_ENDS.format(root=os.path.dirname(prepare.__file__)))
    command = [sys.executable, tmp_path / "main.py", f"--input_dir={tmp_path}/in", "--workers=2",
               "--val_fraction=0.1", f"--data_dir={tmp_path}/d", "--vocab_size=330"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                             start_new_session=True)
    try:
        _, stderr = child.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert stderr.startswith("error: a worker process was killed") and len(stderr.splitlines()) == 1


def test_links_and_mount_points_stay(folder, monkeypatch):
    """Of the folder itself nothing is renamed or removed: it may be another disk's."""
    (folder / "disk").mkdir()
    (folder / "d").symlink_to("disk")
    (folder / "disk/lost+found").mkdir()

    def busy(name, real=None):
        real = real or getattr(os, name)

        def call(path, *args, **options):
            if os.path.realpath(path) == str(folder / "disk"):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
            return real(path, *args, **options)
        monkeypatch.setattr(os, name, call)
    for name in ("rename", "replace", "rmdir"):
        busy(name)
    main(config(folder))
    first = data_sha256(read_meta(str(folder / "disk")))
    main(config(folder, vocab_size=310, overwrite=True))
    assert data_sha256(read_meta(str(folder / "disk"))) != first
    assert (folder / "d").is_symlink() and sorted(os.listdir(folder)) == ["d", "disk", "in"]
    assert ".unfinished" not in os.listdir(folder / "disk")


def test_what_came_between_the_look_and_the_lock_counts(folder, monkeypatch):
    real = prepare.find_blocks

    def slow(cfg):
        blocks = real(cfg)
        monkeypatch.setattr(prepare, "find_blocks", real)
        main(config(folder, vocab_size=310))
        return blocks
    monkeypatch.setattr(prepare, "find_blocks", slow)
    one_line(lambda: main(config(folder)), "already prepared")
    assert read_meta(str(folder / "d"))["vocab_size"] == 310


def test_other_files_are_never_deleted(folder):
    for name in ("tokenizer.txt", "tokenizer.json.bak", "train_1.bin.txt", ".unfinished"):
        os.makedirs(folder / "d", exist_ok=True)
        (folder / "d" / name).write_text("mine")
        one_line(lambda: main(config(folder, overwrite=True)), f"holds other things .*{name}")
        assert (folder / "d" / name).read_text() == "mine"
        os.remove(folder / "d" / name)


@pytest.mark.parametrize("ending", ["", ".spm"])
def test_a_tokenizer_of_another_name_can_be_replaced(folder, ending):
    main(config(folder))
    shutil.copy(folder / "d/tokenizer.model", folder / f"t{ending}")
    for _ in range(2):
        main(config(folder, tokenizer=str(folder / f"t{ending}"), overwrite=True))
        assert read_meta(str(folder / "d"))["tokenizer"] == "tokenizer.model"


# --- inputs ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["in/x.txt", "in/train_10M/x.train", "in/dev/x.dev", "t.json", "t.model"])
@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir, lambda p: os.symlink("/nowhere", p),
                                  lambda p: os.symlink("/dev/zero", p)])
def test_only_regular_files_are_read(folder, path, kind):
    if "/dev/" in path or "train" in path:
        (folder / "in/train_10M").mkdir()
        (folder / "in/dev").mkdir()
    kind(folder / path)
    change = {} if path.startswith("in") else dict(tokenizer=str(folder / path))
    one_line(lambda: main(config(folder, **change)), "is not a regular file|no tokenizer file")


def test_names_that_are_not_utf8(tmp_path):
    """Of input files, and of the folder that prepare.py is started in."""
    here = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.makedirs(os.path.join(here, b"in"))
    for name in (b"caf\xe9.txt", b"b\xff.txt"):
        with open(os.path.join(here, b"in", name), "w") as f:
            f.write(WORDS * 4)
    command = [sys.executable, prepare.__file__, "--input_dir=in", "--val_fraction=0.1", "--data_dir=d",
               "--train_fraction=0.7", "--vocab_size=330"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*command[:2], "--verify=d"], cwd=here, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(read_meta(os.fsdecode(here) + "/d")["words"]["train"]) == 2


def test_text_that_becomes_shorter(folder, monkeypatch):
    real = prepare.read_block

    def cut(block):
        os.truncate(block.path, 100)
        return real(block)
    monkeypatch.setattr(prepare, "read_block", cut)
    one_line(lambda: main(config(folder)), "became shorter while it was read")


def deflated(flags=0, method=None, flip=None):
    """The archive with other flags or another method in all its headers, or a byte of its text changed."""
    body = bytearray(archive())
    for mark, at_flags, at_method in ((b"PK\3\4", 6, 8), (b"PK\1\2", 8, 10)):
        at = -1
        while (at := body.find(mark, at + 1)) >= 0:
            body[at + at_flags] |= flags
            if method is not None:
                body[at + at_method] = method
    if flip is not None:
        body[flip] ^= 255
    return bytes(body)


@pytest.mark.parametrize("body", thorough([
    b"", b"<html>moved</html>", archive()[:200], archive()[:-30], deflated(flip=80), deflated(flip=-63),
    deflated(flags=1), deflated(flags=0x40), *(deflated(method=m) for m in (1, 6, 9, 12, 14, 93, 95, 97, 99)),
    archive(**{"dev": "a file and a folder"}), archive(**{"x" * 300: "a long name"}),
    archive(**{"dev/cbt.dev/x": "y"})], sample=9))
def test_an_archive_that_cannot_be_unpacked(tmp_path, server, body):
    """One line; the same command fetches it again, and goes on when the server is mended."""
    cfg = config(tmp_path, val_fraction=0.0, download="2023")
    server.body = body
    for _ in range(2):
        one_line(lambda: main(cfg), "download of 2023 failed .*(cannot be unpacked|zip.bad)|416")
    assert not {"dev", "train_10M", ".unpacking"} & set(os.listdir(cfg.input_dir))
    server.body = archive()
    main(cfg)
    main(PrepareConfig(verify=cfg.data_dir))


@pytest.mark.parametrize("listing", [
    "[" * 100_000, "1e999", "[]", "{}", '{"data": 5, "links": {}}', '{"data": [5], "links": {}}',
    '{"data": [{"attributes": null}], "links": {}}', '{"data": [], "links": []}', '{"data": [], "links": {}}',
    "\xff"])
def test_a_listing_that_is_none(tmp_path, server, monkeypatch, listing):
    server.body = listing.encode("latin-1")
    monkeypatch.setitem(OFFICIAL, "2024", server.address)
    one_line(lambda: main(config(tmp_path, download="2024")), "download of 2024 failed")


# --- meta.json and tokenizer files ----------------------------------------------------------------

SHARD = dict(split="train", file="train_00000.bin", tokens=1, sha256="")


@pytest.mark.parametrize("change", [
    dict(words=None), dict(words={}), dict(words={"val": {"a": 1}}), dict(words={"train": 5, "val": {}}),
    dict(words={"train": {"a": "x"}, "val": {}}), dict(words={"train": {"a": -1}, "val": {}}),
    dict(sources=[]), dict(sources={"train": {"a": None}}), dict(sources={"train": []}),
    dict(options=[]), dict(options={}), dict(options={"bos": "sometimes"}), dict(options={"bos": []}),
    dict(tokenizer="../in/a.txt"), dict(tokenizer="/etc/passwd"), dict(tokenizer=".."), dict(tokenizer=""),
    dict(tokenizer="x\0y"), dict(tokenizer_sha256=5), dict(vocab_size=True), dict(vocab_size=331),
    dict(vocab_size=330.0), dict(vocab_size=0), dict(vocab_size=10 ** 30), dict(pad="<pad>"), dict(pad=7),
    dict(shards={}), dict(shards=[5]), dict(shards=[{**SHARD, "file": "../d/train_00000.bin"}]),
    dict(shards=[{**SHARD, "tokens": True}]), dict(shards=[{**SHARD, "tokens": 0}]),
    dict(shards=[{**SHARD, "tokens": 1.5}]), dict(shards=[{**SHARD, "split": "dev"}]),
    dict(shards=[{**SHARD, "split": []}]), dict(format_version=[]), "[" * 100_000,
    '{"format_version": 1e999}', "\xff"])
def test_a_description_that_was_edited(folder, change):
    main(config(folder))
    if isinstance(change, dict):
        edit_json(folder / "d/meta.json", **change)
    else:
        (folder / "d/meta.json").write_text(change, encoding="latin-1")
    one_line(lambda: main(PrepareConfig(verify=str(folder / "d"))), "^error: .*(meta.json|tokenizer)")
    one_line(lambda: Shards(str(folder / "d"), "train"), "^error: .*(meta.json|tokenizer)")


GPT2_LIKE = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def byte_level(path, pattern=GPT2_LIKE):
    ranks = {bytes([i]): i for i in range(256)} | {b" " * 2 ** i: 255 + i for i in range(1, 12)}
    save_tiktoken(tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks,
                                    special_tokens={"<|endoftext|>": 267}), str(path))
    return str(path)


@pytest.mark.parametrize("change", [
    dict(ranks=5), dict(ranks={}), dict(ranks={"YQ==": "x"}), dict(ranks={"YQ==": -1}),
    dict(ranks={"YQ==": 1.5}), dict(ranks={"YQ==": True}), dict(ranks={"YQ==": 1, "Yg==": 1}),
    dict(ranks={"YQ==": 2 ** 40}), dict(ranks={"Y": 1}), dict(specials=[]), dict(specials={"<s>": "1"}),
    dict(specials={"<s>": -1}), dict(pattern=None), dict(pattern="("),
    dict(pattern="((a{1000}){1000}){1000}"), dict(bos=[]), dict(pad={}), dict(vocab_size=5),
    dict(vocab_size="x"), dict(vocab_size=300.0), "[" * 100_000, "[]", '{"name": 1e999}', "\xff", ""])
def test_a_tokenizer_file_that_is_none(tmp_path, change):
    path = byte_level(tmp_path / "t.json")
    if isinstance(change, dict):
        edit_json(path, **change)
    else:
        (tmp_path / "t.json").write_text(change, encoding="latin-1")
    one_line(lambda: load_tokenizer(path), "t.json is not a tokenizer file of ours")


# --- text -----------------------------------------------------------------------------------------

MARKS = ("toa\u0323\u0302n vie\u0302\u0323t \u05e9\u05c1\u05bc\u05b8\u05dc\u05d5\u05b9\u05dd "
         "q\u0307\u0323 a\u0315\u0300\u05ae b\n")


def random_text(seed, n):
    """Of marks and letters whose order matters, none of them younger than anybody's Unicode."""
    rng, ranges = random.Random(seed), [
        (0x20, 0x250), (0x300, 0x370), (0x591, 0x5c8), (0x610, 0x660), (0x900, 0xe00), (0xf00, 0xfff),
        (0x1100, 0x1200), (0x1e00, 0x2000), (0xac00, 0xd7a4)]
    text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(n))
    return "".join(c for c in text if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cc"))


def test_marks_out_of_order_come_back_as_nfkc_and_export_the_same(folder):
    """Trained on and encoded; U+2581, sentencepiece's sign for a blank, comes back as one."""
    (folder / "in/a.txt").write_text((WORDS + MARKS * 30) * 3)
    main(config(folder, vocab_size=400))
    tokenizer, shards = load_tokenizer(str(folder / "d/tokenizer.model")), Shards(str(folder / "d"), "val")
    assert unicodedata.normalize("NFKC", MARKS) != MARKS
    assert unicodedata.normalize("NFKC", MARKS * 5) in tokenizer.decode(shards.windows([0], len(shards))[0])
    exported = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(sentencepiece_json(tokenizer)))
    for text in [MARKS, "a\u2581b \u2581\u2581 \u2581", *(random_text(seed, 40) for seed in range(500))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFKC", text).replace("\u2581", " ")
        assert exported.encode(text).ids == ids, ascii(text)


@pytest.mark.thorough
def test_long_runs_of_blanks_for_tiktoken(folder):
    tokenizer = load_tokenizer(byte_level(folder / "t.json"))
    for run in (" ", "\n", "\t ", "\r\n", "\u3000"):
        for text in (run * 1_000_000 + "a b", "a" + run * 1_000_000):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        for text in (run * 3000 + "a b  c", "it's 12 a" + run * 3000, "\x1c\x85\u00a0 x\u2028 \n y", MARKS):
            ids = tokenizer.bpe.encode_ordinary(text)
            assert tokenizer.encode_by_word(text) == tokenizer.encode(text) == ids
    text = WORDS + " " * 1_000_000 + "\n" * 1_000_000 + WORDS
    (folder / "in/a.txt").write_text(text)
    main(config(folder, tokenizer=tokenizer.file, val_fraction=0.01))
    shards = Shards(str(folder / "d"), "train")
    assert text.startswith(tokenizer.decode(shards.windows([0], len(shards))[0]))


def test_a_pattern_that_goes_back_for_ever(folder, monkeypatch, capfd):
    monkeypatch.setattr(lib.tokenizers, "PATIENCE", 1)
    path = byte_level(folder / "t.json", pattern=r"(?:(?=a)(?:a|aa))+!|\s+|\w+|\W")
    (folder / "in/b.txt").write_text("a" * 60 + "\n" + WORDS)
    start = time.time()
    one_line(lambda: main(config(folder, tokenizer=path)),
             r"pattern of .*tokenizer.json cannot cut .*\(.*b.txt, bytes 0 to")
    assert time.time() - start < 20


@pytest.mark.parametrize("pattern", [r"(\s*)", r"(a)|(b)|\s+|[^ab\s]+", r"(?=a)|\S+|\s+", r"x*"])
def test_patterns_with_groups_and_empty_matches(tmp_path, pattern):
    tokenizer, text = load_tokenizer(byte_level(tmp_path / "t.json", pattern=pattern)), "ab cab  x"
    assert tokenizer.encode_by_word(text) == tokenizer.encode(text)


UNITS = [" ", "A. ", ". ", "= = = ", " \n", "[ ", " n't", "subtitle ", "\t", " \t", "\n", "\r\n", "A",
         "! ", "l ", "I ", "(", '"', "= ", "= = = x", "= = = x = = = ", " = = =", "= = = x = = =\n", "n't",
         " '", "* ", "- \n", ".", " .", ", ", "?!?", "_", "a b\n", "\u00a0", "\u2028", "\x1c", "\r",
         "\u0301", "A.\u00a0(", "AB [", "\u24d0. "]


@pytest.mark.parametrize("unit", thorough(UNITS, sample=1))
def test_cleaners_take_time_in_proportion(unit):
    """2 MB of a line of any kind."""
    for clean in {f.__name__: f for f in CLEANERS.values()}.values():
        for before, after in (("A", "x"), ("= = = ", "")):
            text, start = before + unit * (2_000_000 // len(unit)) + after, time.process_time()
            clean(text)
            assert time.process_time() - start < 8, (clean.__name__, before, after)


def test_cleaners_are_as_they_were():
    """The two that were mended, against their definitions."""
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices("aA lI.!? \t\n=([\u00a0\u24d0\u0345\u00df\r", k=rng.randrange(40)))
        line = prepare.re.sub(r"\bi\b", "I", text.replace("l", "I").lower())
        assert prepare.recapitalised(text) == prepare.re.sub(
            r"(?:^|[.!?]\s)\W*\w", lambda m: m[0].upper(), line)
        titled = prepare.HEADING.sub(r"\1", text)
        assert prepare.clean_wikipedia(text) == prepare.re.sub(
            r"^[ \t]+|[ \t]+$", "", titled, flags=prepare.re.MULTILINE)
