"""prepare.py: nothing is lost but NFKC, blocks do not show, each cleaner does its one thing."""
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
import tiktoken

import prepare
from helpers import ROOT, edit_json, real
from lib.download import OFFICIAL
from lib.files import sha256
from lib.shards import Shards, data_sha256, read_meta
from lib.tokenizers import load_tokenizer, save_tiktoken
from prepare import PrepareConfig, main

WORDS = 3 * "".join(f"the {a} {b} saw {c} things, and {b}s ran.\n" for a in ("big", "red", "old", "new")
                    for b in ("dog", "cat", "cow", "pig")
                    for c in ("two", "six", "ten", "some", "many", "no"))


def write(folder, files):
    for name, text in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def prepared(input_dir, data_dir, **change):
    """The path of a data folder made of the text in `input_dir`, with a small vocabulary."""
    main(PrepareConfig(input_dir=str(input_dir), data_dir=str(data_dir), **{"vocab_size": 330, **change}))
    return str(data_dir)


def tokens(data_dir, split="train"):
    shards = Shards(data_dir, split)
    return shards.windows([0], len(shards))[0]


def tokenizer_of(data_dir):
    return load_tokenizer(os.path.join(data_dir, "tokenizer.model"))


def first_block(path, val_fraction):
    """What is left for training of a file that is a single block."""
    return prepare.read_block(prepare.cut_file(path, "a", "train", val_fraction)[0])[0]


def test_workers_start_without_torch():
    """Each of them imports prepare.py, and what that imports."""
    code = "import sys, prepare; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("source,text,clean", [
    ("childes", "*MOT:\tlook   at  that , Bill !\n\n", "*MOT: look at that, Bill!\n\n"),
    ("aochildes", "well ; yes . no ?\n", "well; yes. no?\n"),
    ("bnc_spoken", "a  b\tc\n d\n", "a b c\n d\n"),
    ("cbt", "I do n't know , it 's Mary 's . We 'll see , CA N'T we ?\n",
     "I don't know, it's Mary's. We'll see, CAN'T we?\n"),
    ("cbt", "a 'standing quote' n 't\n", "a 'standing quote' n 't\n"),
    ("simple_wiki", "\n\nA one.\n\n \nB two.\nC\n", "A one.\nB two.\nC\n"),
    ("wikipedia", " = x\n= = = The Title = = =\n  indented  \n\n", "= x\nThe Title\nindented\n\n"),
    ("open_subtitles", "Hello.\n- Subtitles by X -\nSUBTITLE: y\nI like subtitles.\nsubtitled",
     "Hello.\nI like subtitles.\n"),
    ("qed", "THlS lS A TALK. AND l AM HERE! ok\nnormal line of Text\n12\n",
     "This is a talk. And I am here! Ok\nnormal line of Text\n12\n"),
    ("gutenberg", "  as  it is ,\n\n\n", "  as  it is ,\n\n\n"),
    ("children_stories", "a , b", "a , b"),
    ("switchboard", "A:\tUh ,  yes\n", "A:\tUh ,  yes\n"),
])
def test_cleaners(source, text, clean):
    assert prepare.CLEANERS[source](text) == clean


def test_the_fault_of_a_cleaner_is_not_taken_for_bad_text(tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.CLEANERS, "mine", lambda text: text[:int("x")])
    write(tmp_path / "in", {"mine.txt": WORDS})
    with pytest.raises(ValueError, match="invalid literal"):
        prepared(tmp_path / "in", tmp_path / "d", val_fraction=0.1)


@pytest.mark.parametrize("bos", ["none", "line", "document"])
def test_nothing_is_lost_but_nfkc(tmp_path, bos):
    text = WORDS + ("  two  blanks and\ttabs \n\n\n\u00a0ﬁne … ½ ☃ 漢字 e\u0301 \U0001f600 <s> </s> \r\n"
                    "  last line without end")
    write(tmp_path / "in", {"a.txt": text, "b.txt": WORDS})
    d = prepared(tmp_path / "in", tmp_path / "d", vocab_size=380, bos=bos, val_fraction=0.1)
    t = tokenizer_of(d)
    assert (t.pad, t.bos, t.eos, t.vocab_size) == (0, 1, 2, 380)
    decoded = {split: t.decode(i for i in tokens(d, split) if i != t.bos) for split in ("train", "val")}
    expected = unicodedata.normalize("NFKC", text)  # WORDS has no room for a cut inside `text` to hide in
    cut = len(unicodedata.normalize("NFKC", first_block(str(tmp_path / "in/a.txt"), 0.1)))
    assert decoded["train"].startswith(expected[:cut]) and decoded["val"].startswith(expected[cut:])
    assert len(decoded["train"]) + len(decoded["val"]) == len(expected) + len(WORDS)


def test_word_by_word_equals_sentencepiece_on_the_text(tmp_path):
    """Tokenizer and tokens are those of plain sentencepiece over whole lines."""
    write(tmp_path / "in", {"a.txt": WORDS})
    d = prepared(tmp_path / "in", tmp_path / "d", val_fraction=0.01)
    text = first_block(str(tmp_path / "in/a.txt"), 0.01)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_prefix=str(tmp_path / "plain"), model_type="bpe",
        vocab_size=330, normalization_rule_name="nfkc", remove_extra_whitespaces=False,
        add_dummy_prefix=False, byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "plain.model"))
    ours = tokenizer_of(d)
    assert ours.splits_at_blanks()
    assert [ours.sp.id_to_piece(i) for i in range(330)] == [plain.id_to_piece(i) for i in range(330)]
    assert len(text) > 1000 and tokens(d).tolist() == plain.encode(text)


def test_blocks_and_workers_do_not_show(corpus, tmp_path, monkeypatch):
    results = []
    with open(f"{corpus}/text/train_10M/children_stories.train") as f:
        lines = f.read().split("\n")
    documents = "".join(line + ("\n\n\n" if i % 3 else "\n") for i, line in enumerate(lines))
    other = "\r\n".join(line + "\r\n" * (i % 3) for i, line in enumerate(lines))
    write(tmp_path / "in", {"train_10M/gutenberg.train": documents, "dev/gutenberg.dev": other})
    for size, workers in ((1 << 22, 1), (900, 1), (20_000, 2)):
        monkeypatch.setattr(prepare, "BLOCK_BYTES", size)
        d = prepared(tmp_path / "in", tmp_path / str(size), bos="document", workers=workers)
        results.append([tokens(d, split).tolist() for split in ("train", "val")])
    assert results[0] == results[1] == results[2]
    assert results[0][0].count(1) > 300 and results[0][1].count(1) > 300


def test_shards_are_cut_and_read_as_one_stream(corpus, tmp_path, monkeypatch):
    one = prepared(f"{corpus}/text", tmp_path / "one")
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 5000)
    many = prepared(f"{corpus}/text", tmp_path / "many")
    sizes = [s["tokens"] for s in read_meta(many)["shards"] if s["split"] == "train"]
    assert len(sizes) > 2 and set(sizes[:-1]) == {5000}
    assert tokens(many).tolist() == tokens(one).tolist()
    starts = [0, 4990, 4999, 5000, 9999, sum(sizes) - 11]
    whole = np.fromfile(f"{one}/train_00000.bin", "<u2")
    assert Shards(many, "train").windows(starts, 11).tolist() == [whole[s:s + 11].tolist() for s in starts]


def test_where_documents_begin():
    headings = "preface\n= = = One = = =\n\ntext\n\nmore\n= = = Two = = =\nend\n"
    assert prepare.split_documents(headings, True, True) == [
        (True, "preface\n"), (True, "= = = One = = =\n\ntext\n\nmore\n"), (True, "= = = Two = = =\nend\n")]
    assert prepare.split_documents("rest\n= = = One = = =\n", True, False)[0] == (False, "rest\n")
    assert prepare.split_documents("a\r\n\r\nb\r\n", False, True) == [(True, "a\r\n\r\n"), (True, "b\r\n")]
    assert prepare.split_documents("a\nb\n\n\nc\n", False, True) == [(True, "a\nb\n\n\n"), (True, "c\n")]


def test_bos_per_line_and_per_document(tmp_path):
    text = "= = = A = = =\n\n" + WORDS + "= = = B = = =\n" + WORDS
    write(tmp_path / "in", {"train_10M/simple_wiki.train": text, "dev/simple_wiki.dev": WORDS})
    for bos, where in (("line", lambda text: text.split("\n")),
                       ("document", lambda text: ["= = = A = = =", "= = = B = = ="])):
        d = prepared(tmp_path / "in", tmp_path / bos, bos=bos)
        t, ids = tokenizer_of(d), tokens(d).tolist()
        after = [t.decode(ids[i + 1:i + 20]) for i, token in enumerate(ids) if token == 1]
        lines = [line for line in where(t.decode(i for i in ids if i != 1)) if line]
        assert len(after) == len(lines)
        assert all(a.startswith(line[:5]) for a, line in zip(after, lines))


def test_a_document_that_its_cleaner_empties_has_no_bos(tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.CLEANERS, "cbt", lambda text: "" if text.strip() == "credits" else text)
    write(tmp_path / "in", {"train_10M/cbt.train": WORDS + "\n\ncredits\n\n" + WORDS, "dev/cbt.dev": WORDS})
    assert tokens(prepared(tmp_path / "in", tmp_path / "d", bos="document")).tolist().count(1) == 2


def test_held_out_share_and_what_dev_becomes(tmp_path):
    write(tmp_path / "in", {"babylm_10M/cbt.train": WORDS * 4, "babylm_dev/cbt.dev": WORDS,
                            "babylm_test/cbt.test": WORDS * 2})
    meta = read_meta(prepared(tmp_path / "in", tmp_path / "d", val_fraction=0.05))
    words = {split: sum(by_source.values()) for split, by_source in meta["words"].items()}
    assert words["train"] + words["val"] == 4 * words["test"]
    assert words["val"] / (words["train"] + words["val"]) == pytest.approx(0.05, abs=0.01)
    write(tmp_path / "in", {"dev/other.dev": WORDS})  # of another year
    meta = read_meta(prepared(tmp_path / "in", tmp_path / "both"))
    assert list(meta["words"]["val"]) == ["cbt"]
    write(tmp_path / "in", {"train_10M/other.train": WORDS})
    assert list(read_meta(prepared(tmp_path / "in", tmp_path / "new"))["words"]["val"]) == ["other"]


def small_tiktoken(path):
    """A byte-level BPE with a few merges, as tests cannot download gpt2's."""
    ranks = {bytes([i]): i for i in range(256)}
    for i, token in enumerate([b"th", b"the", b" the", b"og", b"dog", b" dog"]):
        ranks[token] = 256 + i
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    save_tiktoken(tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks,
                                    special_tokens={"<|endoftext|>": 262}), path)
    return path


def test_existing_tokenizers(tmp_path):
    folder = write(tmp_path / "in", {"a.txt": WORDS + "naïve ☃\n"})
    path = small_tiktoken(str(tmp_path / "small.json"))
    d = prepared(folder, tmp_path / "t", tokenizer=path, bos="line", val_fraction=0.1)
    t = load_tokenizer(f"{d}/tokenizer.json")
    text = t.decode(i for i in tokens(d) if i != t.bos)
    assert WORDS.startswith(text) and t.bos == 262 and t.encode(" the dog") == [258, 261]
    # a sentencepiece model with other habits (a blank put in front) is used as it is
    write(tmp_path, {"lines": WORDS})
    uni = str(tmp_path / "uni")
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "lines"), model_prefix=uni, vocab_size=36,
                                             minloglevel=2)
    d = prepared(folder, tmp_path / "u", tokenizer=f"{uni}.model", val_fraction=0.1)
    plain = sentencepiece.SentencePieceProcessor(model_file=f"{uni}.model")
    assert not load_tokenizer(f"{uni}.model").splits_at_blanks()
    assert tokens(d).tolist() == plain.encode(first_block(f"{folder}/a.txt", 0.1))


def test_a_folder_replaced_in_the_same_process_has_its_new_tokenizer(tmp_path):
    write(tmp_path / "in", {"a.txt": WORDS})
    for vocab_size in (350, 310):
        d = prepared(tmp_path / "in", tmp_path / "d", vocab_size=vocab_size, val_fraction=0.1, overwrite=True)
        assert tokenizer_of(d).decode(tokens(d)) == first_block(str(tmp_path / "in/a.txt"), 0.1)


def test_interrupted_prepare_leaves_nothing_that_looks_finished(corpus, tmp_path, monkeypatch):
    def killed(*a, **k):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(prepare, "encode_block", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(f"{corpus}/text", tmp_path / "d")
    assert not os.listdir(tmp_path / "d")
    prepared(f"{corpus}/text", tmp_path / "d")
    assert ".unfinished" not in os.listdir(tmp_path / "d") and os.listdir(tmp_path) == ["d"]


class Server(http.server.BaseHTTPRequestHandler):
    """A zip that breaks off in the middle of the first answer, and an OSF-like listing."""
    zip = b""
    requests = []

    def do_GET(self):
        self.requests.append((self.path, self.headers.get("Range")))
        if self.path.endswith(".zip"):
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            body = self.zip[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if start else body[:len(body) // 2])
            return
        self.send_response(200)
        self.end_headers()
        data = [self.archive() if self.path == "/list" else self.folder()]
        self.wfile.write(json.dumps(dict(data=data, links=dict(next=None))).encode())

    def folder(self):
        files = dict(links=dict(related=dict(href=self.base() + "/list")))
        return dict(attributes=dict(name="text_data", kind="folder"), relationships=dict(files=files))

    def archive(self):
        hashes = dict(sha256=self.digest)
        return dict(attributes=dict(name="train_10M.zip", extra=dict(hashes=hashes)),
                    links=dict(download=self.base() + "/f.zip"))

    def base(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def log_message(self, *a):
        pass


@pytest.mark.parametrize("good_digest", [True, False])
def test_download_resumes_and_checks(tmp_path, monkeypatch, good_digest):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("train_10M/cbt.train", WORDS)
        z.writestr("dev/cbt.dev", WORDS)
    Server.zip, Server.requests = buffer.getvalue(), []
    write(tmp_path, {"z": Server.zip})
    Server.digest = sha256(str(tmp_path / "z")) if good_digest else "0" * 64
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(OFFICIAL, "2024", f"http://127.0.0.1:{server.server_port}/root")
    cfg = PrepareConfig(input_dir=str(tmp_path / "in"), data_dir=str(tmp_path / "d"), download="2024",
                        vocab_size=330)
    with pytest.raises(SystemExit, match="broke off"):
        main(cfg)
    if good_digest:
        main(cfg)
        assert read_meta(cfg.data_dir)["words"]["train"]["cbt"] > 0
        assert ("/f.zip", f"bytes={len(Server.zip) // 2}-") in Server.requests
        with pytest.raises(SystemExit, match="has another year's download"):  # its archives have these names
            main(replace(cfg, download="2025", data_dir=str(tmp_path / "d2")))
    else:
        with pytest.raises(SystemExit, match="expected 0000"):
            main(cfg)
    server.shutdown()


def test_offline_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(OFFICIAL, "2023", {"babylm_data.zip": "http://127.0.0.1:9/x.zip"})
    with pytest.raises(SystemExit, match="download of 2023 failed.*by hand"):
        main(PrepareConfig(input_dir=str(tmp_path / "in"), download="2023"))


def test_real_text_round_trips(tmp_path):
    shutil.copytree(real("corpus", "dev"), tmp_path / "dev")
    os.makedirs(tmp_path / "train_10M")
    names = sorted(os.listdir(tmp_path / "dev"))
    for name in names:
        shutil.copy(tmp_path / "dev" / name, tmp_path / "train_10M" / name.replace(".dev", ".train"))
    d = prepared(tmp_path, tmp_path / "d", vocab_size=3300, bos="line")
    text = ""
    for name in names:
        with open(tmp_path / "dev" / name, encoding="utf-8", newline="") as f:
            text += prepare.CLEANERS[name.removesuffix(".dev")](f.read())
    decoded = tokenizer_of(d).decode(i for i in tokens(d, "val") if i != 1)
    assert decoded == unicodedata.normalize("NFKC", text)


# --- bad input ------------------------------------------------------------------------------------

HELD_OUT = dict(val_fraction=0.1)


@pytest.mark.parametrize("files,change,message", [
    ({}, dict(input_dir=""), "say where the text is"),
    ({}, {}, "no input folder"),
    ({"x/readme.md": "hi"}, {}, "holds neither train_10M/"),
    ({"train_100M/cbt.train": WORDS}, {}, "see --track"),
    ({"a.txt": ""}, HELD_OUT, "is empty"),
    ({"a.txt": WORDS}, {}, "no validation text"),
    ({"a.txt": WORDS.encode() + b"caf\xe9 \n"}, HELD_OUT,
     rf"a\.txt: byte {len(WORDS) + 3} \(0xe9\) is not UTF-8"),
    ({"a.txt": WORDS}, dict(HELD_OUT, vocab_size=70000), "between 300 and 65536"),
    ({"a.txt": WORDS}, dict(HELD_OUT, vocab_size=9000),
     "cannot make vocab_size=9000 entries from this text, at most"),
    ({"a.txt": WORDS}, dict(HELD_OUT, tokenizer="none.model"), "no tokenizer file"),
    ({"a.txt": WORDS, "t.model": "no"}, dict(HELD_OUT, tokenizer="t.model"), "is not a sentencepiece model"),
    ({"a.txt": WORDS, "t.json": "{}"}, dict(HELD_OUT, tokenizer="t.json"), "is not a tokenizer file"),
    ({"a.txt": WORDS, "../d/meta.json": "{}"}, HELD_OUT, "already prepared"),
    ({"a.txt": WORDS, "../d/thesis.tex": "x"}, HELD_OUT, "/d holds other things than prepared data"),
    ({"a.txt": WORDS, "../d/meta.json": "{}", "../d/thesis.tex": "x"}, dict(HELD_OUT, overwrite=True),
     "holds other things"),
    ({"a.txt": WORDS}, dict(HELD_OUT, data_dir=""), "data_dir= must be a folder's name"),
    ({"a.txt": WORDS}, dict(val_fraction=1.0), "val_fraction=1.0 must be below 1"),
    ({"a.txt": "one line only"}, HELD_OUT, "too few lines to hold some out"),
    ({"train_10M/open_subtitles.train": "Subtitles by X", "dev/cbt.dev": WORDS}, {},
     "nothing is left of the training text"),
])
def test_bad_input_is_one_line(tmp_path, files, change, message):
    write(tmp_path / "in", files)
    if "tokenizer" in change:
        change = dict(change, tokenizer=str(tmp_path / "in" / change["tokenizer"]))
    with pytest.raises(SystemExit, match=message) as e:
        prepared(**{"input_dir": tmp_path / "in", "data_dir": tmp_path / "d", **change})
    assert "\n" not in str(e.value) and not os.path.exists(tmp_path / "d" / "train_00000.bin")
    assert all(os.path.exists(tmp_path / "in" / name) for name in files)


def test_vocabulary_over_65536_is_refused(tmp_path):
    ranks = {bytes([i]): i for i in range(256)}
    ranks.update({bytes([i // 256, i % 256]): 256 + i for i in range(65536)})
    big = str(tmp_path / "big.json")
    save_tiktoken(tiktoken.Encoding("big", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={}), big)
    write(tmp_path / "in", {"a.txt": WORDS})
    with pytest.raises(SystemExit, match="65792 entries"):
        prepared(tmp_path / "in", tmp_path / "d", tokenizer=big, val_fraction=0.1)


# --- trust ----------------------------------------------------------------------------------------

HOSTILE = {  # name: text, which must come back but for NFKC, or bytes that are not UTF-8, to be reported
    "empty": "", "only blanks": "   \t  ", "only line ends": "\n\n\n", "one blank": " ", "one letter": "a",
    "no line end": "abc", "crlf": "a b\r\nc\r\n\r\nd", "cr": "a\rb\rc", "mixed line ends": "a\nb\r\nc\rd\n\r",
    "nul": "a\x00b \x00\x00 c\n", "bell and escape": "\x07\x1b[31mred\x1b[0m\n", "delete": "a\x7fb\n",
    "vertical tab, form feed": "a\x0bb\x0cc\n", "tabs": "\ta\t\tb\t\n", "blanks in front": "     a\n   b\n",
    "blanks behind": "a     \nb   \n", "utf-8 bom": "\ufeffa b\n", "bom inside": "a\ufeffb\n",
    "right to left": "שלום \u202eabc\u202c عالم\n", "zero width": "a\u200bb\u200cc\u200dd\u2060e\n",
    "soft hyphen": "a\u00adb\n", "combining": "e\u0301 o\u0308 \u0301a\n",
    "emoji": "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\n",
    "many combining": "a" + "\u0301" * 500 + "\n", "ligatures": "ﬁ ﬂ ½ ² ™ … ﷺ\n",
    "full width": "ＡＢＣ　１２３\n", "hangul jamo": "\u1112\u1161\u11ab\n", "kana": "ﾊﾟ ﾞ\n",
    "cjk": "漢字かな交じり文。\n", "cjk compatibility": "\uf900 \u3392\n",
    "special tokens": "<s> </s> <pad> <unk> <0x41> <|endoftext|>\n", "bytes as text": "\\x00 \\u0000 0x00\n",
    "lower one eighth block": "a\u2581b \u2581 \u2581\u2581\n", "lone \u2581": "\u2581",
    "private use": "\ue000\uf8ff\n", "replacement": "\ufffd\n",
    "not a character": "\ufffe \uffff \U0010ffff\n",
    "line separators": "a\u2028b\u2029c\u0085d\n", "hard blank": "a\u00a0b\u202fc\u3000d\n",
    "mathematics": "𝐀 𝓑 ∑ ∫ ℝ\n", "old scripts": "𐍈 𒀀 𓀀\n", "accents": "ÀÉÎÕÜ àéîõü ß ŉ ǆ\n",
    "long word": "ab" * 20000 + "\n", "long line": "word " * 40000 + "\n", "many short lines": "a\n" * 20000,
    "headings": "= = = A = = =\n= = = = = =\n = = = B = = = \n", "json": '{"a": [1, null, "\\u00e9"]}\n',
    "html": "<p>a &amp; b</p><!-- -->\n", "backslashes": "\\n \\\\ \\t\n", "quotes": "“a” ‘b’ „c” «d» '\n",
    "turkish": "İ ı\n",
    "latin-1": b"caf\xe9\n", "utf-16": b"\xff\xfea\x00b\x00c\x00\n\x00", "cut short": b"a\xc3",
    "overlong": b"a\xc0\xafb\n", "surrogate": b"a\xed\xa0\x80b\n", "beyond": b"a\xf4\x90\x80\x80\n",
    "lone continuation": b"abc\x80def\n",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    source = write(folder / "in", {"a.txt": WORDS})
    return prepared(source, folder / "d", vocab_size=350, val_fraction=0.1) + "/tokenizer.model"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_round_trips_or_is_reported(tmp_path, tokenizer, name):
    assert len(HOSTILE) >= 50
    text = HOSTILE[name]
    source = write(tmp_path / "in", {"train_10M/a.train": WORDS, "train_10M/hostile.train": text,
                                     "dev/a.dev": WORDS})
    if isinstance(text, bytes):
        with pytest.raises(UnicodeDecodeError) as e:
            text.decode()
        at = e.value.start
        with pytest.raises(SystemExit, match=rf"hostile.train: byte {at} \(0x{text[at]:02x}\) is not UTF-8"):
            prepared(source, tmp_path / "d", tokenizer=tokenizer)
        assert not os.listdir(tmp_path / "d")
        return
    d = prepared(source, tmp_path / "d", tokenizer=tokenizer)
    expected = unicodedata.normalize("NFKC", text).replace("\u2581", " ")
    assert load_tokenizer(tokenizer).decode(tokens(d)) == unicodedata.normalize("NFKC", WORDS) + expected


@pytest.mark.thorough
def test_a_line_of_ten_megabytes(tmp_path, tokenizer):
    text = "".join(f"word{i % 997} " for i in range(1_300_000))
    source = write(tmp_path / "in", {"train_10M/a.train": text, "dev/a.dev": WORDS})
    d = prepared(source, tmp_path / "d", tokenizer=tokenizer, workers=1)
    assert len(text) > 10_000_000 and load_tokenizer(tokenizer).decode(tokens(d)) == text


def flip_a_bit(path):
    with open(path, "r+b") as f:
        content = bytearray(f.read())
        content[len(content) * 2 // 3] ^= 16
        f.seek(0)
        f.write(content)


def test_verify_finds_a_flipped_bit(corpus, tmp_path, capsys):
    d = prepared(f"{corpus}/text", tmp_path / "d", vocab_size=500)
    main(PrepareConfig(verify=d))
    assert "are as meta.json says" in capsys.readouterr().out
    for name in sorted(os.listdir(d)):
        flip_a_bit(os.path.join(d, name))
        with pytest.raises(SystemExit, match=name if name != "meta.json" else "^error"):
            main(PrepareConfig(verify=d))
        flip_a_bit(os.path.join(d, name))
    main(PrepareConfig(verify=d))


@pytest.mark.parametrize("change", [
    dict(shards=[]), dict(shards=[dict(split="train", file="x", tokens=None, sha256="")]),
    dict(vocab_size=400), dict(options=None), dict(tokenizer=5)])
def test_verify_finds_an_edited_description(data, tmp_path, change):
    shutil.copytree(data, tmp_path / "d")
    edit_json(tmp_path / "d/meta.json", **change)
    with pytest.raises(SystemExit, match="^error: [^\n]*meta.json[^\n]*$"):
        main(PrepareConfig(verify=str(tmp_path / "d")))


def prepare_command(corpus, data_dir):
    return [sys.executable, prepare.__file__, f"--input_dir={corpus}/text", f"--data_dir={data_dir}",
            "--vocab_size=500"]


def test_two_at_once_do_not_mix(corpus, tmp_path):
    """One of two that write the same folder at the same time ends in one line; what is there is whole."""
    d = str(tmp_path / "d")
    both = [subprocess.Popen([*prepare_command(corpus, d), f"--bos={bos}"], text=True,
                             stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for bos in ("none", "line")]
    errors = [p.communicate()[1] for p in both]
    codes = [p.returncode for p in both]
    assert 0 in codes
    for code, err in zip(codes, errors):
        assert (code == 0) == (not err) and len(err.splitlines()) <= 1, err
    main(PrepareConfig(verify=d))
    winner = read_meta(d)["options"]["bos"]
    alone = prepared(f"{corpus}/text", tmp_path / "alone", vocab_size=500, bos=winner)
    assert data_sha256(read_meta(d)) == data_sha256(read_meta(alone))


@pytest.mark.parametrize("wait", [0.7, 1.0, 1.3])
def test_killed_prepare_starts_clean(corpus, tmp_path, wait):
    command = prepare_command(corpus, tmp_path / "d")
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    time.sleep(wait)
    child.kill()
    child.wait()
    if os.path.exists(tmp_path / "d/meta.json"):  # then it is whole
        main(PrepareConfig(verify=f"{tmp_path}/d"))
    else:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    main(PrepareConfig(verify=f"{tmp_path}/d"))


def test_a_share_cuts_at_line_feeds_alone(tmp_path):
    lines = [f"{i} begin\f{i} end .\n" for i in range(2000)]
    source = write(tmp_path / "in", {"train_10M/gutenberg.train": "".join(lines),
                                     "dev/gutenberg.dev": "".join(lines[:9])})
    d = prepared(source, tmp_path / "d", train_fraction=0.3)
    kept = tokenizer_of(d).decode(tokens(d)).split("\n")
    assert 300 < len(kept) < 900 and {f"{line}\n" for line in kept if line} <= set(lines)


def test_shares_of_the_text_are_nested(tmp_path):
    """A share has about its size, lies within every larger one, and leaves validation and test alone."""
    lines = [f"line number {i} of the corpus .\n" for i in range(40_000)]
    source = write(tmp_path / "in", {"train_10M/cbt.train": "".join(lines),
                                     "dev/cbt.dev": "".join(lines[:500])})
    whole = prepared(source, tmp_path / "whole")
    kept = []
    for share in (0.05, 0.3, 1.0):
        d = prepared(source, tmp_path / str(share), tokenizer=f"{whole}/tokenizer.model",
                     train_fraction=share)
        kept.append(tokenizer_of(whole).decode(tokens(d)).splitlines())
        assert len(kept[-1]) == pytest.approx(share * 40_000, rel=0.25)
        assert np.array_equal(tokens(d, "val"), tokens(whole, "val"))
        assert read_meta(d)["words"]["train"]["cbt"] == 6 * len(kept[-1])
    assert set(kept[0]) < set(kept[1]) < set(kept[2])
    some = set(kept[1])
    assert kept[1] == [line for line in kept[2] if line in some]
    for share in (0.0, 1.5):
        with pytest.raises(SystemExit, match="train_fraction"):
            prepared(source, tmp_path / "x", train_fraction=share)
