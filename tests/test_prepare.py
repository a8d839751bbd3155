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

import numpy as np
import pytest
import sentencepiece
import tiktoken

import disk
import prepare
from prepare import PrepareConfig, main


def tokens(data_dir, split="train"):
    shards = disk.Shards(data_dir, split)
    return shards.windows([0], len(shards))[0]


def write(folder, files):
    for name, text in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(text if isinstance(text, bytes) else text.encode())
    return str(folder)


WORDS = "".join(f"the {a} {b} saw {c} things, and {b}s ran.\n" for a in ("big", "red", "old", "new") for b in ("dog", "cat", "cow", "pig")
                for c in ("two", "six", "ten", "some", "many", "no")) * 3


@pytest.mark.parametrize("source,text,clean", [
    ("childes", "*MOT:\tlook   at  that , Bill !\n\n", "*MOT: look at that, Bill!\n\n"),
    ("aochildes", "well ; yes . no ?\n", "well; yes. no?\n"),
    ("bnc_spoken", "a  b\tc\n d\n", "a b c\n d\n"),
    ("cbt", "I do n't know , it 's Mary 's . We 'll see , CA N'T we ?\n", "I don't know, it's Mary's. We'll see, CAN'T we?\n"),
    ("cbt", "a 'standing quote' n 't\n", "a 'standing quote' n 't\n"),
    ("simple_wiki", "\n\nA one.\n\n \nB two.\nC\n", "A one.\nB two.\nC\n"),
    ("wikipedia", " = x\n= = = The Title = = =\n  indented  \n\n", "= x\nThe Title\nindented\n\n"),
    ("open_subtitles", "Hello.\n- Subtitles by X -\nSUBTITLE: y\nI like subtitles.\nsubtitled", "Hello.\nI like subtitles.\n"),
    ("qed", "THlS lS A TALK. AND l AM HERE! ok\nnormal line of Text\n12\n", "This is a talk. And I am here! Ok\nnormal line of Text\n12\n"),
    ("gutenberg", "  as  it is ,\n\n\n", "  as  it is ,\n\n\n"),
    ("children_stories", "a , b", "a , b"),
    ("switchboard", "A:\tUh ,  yes\n", "A:\tUh ,  yes\n"),
])
def test_cleaners(source, text, clean):
    assert prepare.CLEANERS[source](text) == clean


@pytest.mark.parametrize("bos", ["none", "line", "document"])
def test_nothing_is_lost_but_nfkc(tmp_path, bos):
    text = WORDS + "  two  blanks and\ttabs \n\n\n\u00a0ﬁne … ½ ☃ 漢字 e\u0301 \U0001f600 <s> </s> \r\n  last line without end"
    write(tmp_path / "in", {"a.txt": text, "b.txt": WORDS})
    main(PrepareConfig(input_dir=str(tmp_path / "in"), data_dir=str(tmp_path / "d"), vocab_size=380, bos=bos, val_fraction=0.1))
    t = disk.load_tokenizer(str(tmp_path / "d" / "tokenizer.model"))
    assert (t.pad, t.bos, t.eos, t.vocab_size) == (0, 1, 2, 380)
    decoded = {split: t.decode(i for i in tokens(tmp_path / "d", split) if i != t.bos) for split in ("train", "val")}
    expected = unicodedata.normalize("NFKC", text)  # WORDS has no room for a cut inside `text` to hide in
    cut = len(unicodedata.normalize("NFKC", prepare.read_block(prepare.cut_file(str(tmp_path / "in" / "a.txt"), "a", "train", 0.1)[0])[0]))
    assert decoded["train"].startswith(expected[:cut]) and decoded["val"].startswith(expected[cut:])
    assert len(decoded["train"]) + len(decoded["val"]) == len(expected) + len(WORDS)


def test_word_by_word_equals_sentencepiece_on_the_text(tmp_path):
    """Tokenizer and tokens are those of plain sentencepiece over whole lines."""
    lines = [line for line in WORDS.split("\n") if line]
    write(tmp_path / "in", {"a.txt": WORDS})
    main(PrepareConfig(input_dir=str(tmp_path / "in"), data_dir=str(tmp_path / "d"), vocab_size=330, val_fraction=0.01))
    block = prepare.cut_file(str(tmp_path / "in" / "a.txt"), "a", "train", 0.01)[0]
    text = prepare.read_block(block)[0]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_prefix=str(tmp_path / "plain"), model_type="bpe", vocab_size=330,
        normalization_rule_name="nfkc", remove_extra_whitespaces=False, add_dummy_prefix=False, byte_fallback=True,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "plain.model"))
    ours = disk.load_tokenizer(str(tmp_path / "d" / "tokenizer.model"))
    assert ours.splits_at_blanks()
    assert [ours.sp.id_to_piece(i) for i in range(330)] == [plain.id_to_piece(i) for i in range(330)]
    assert tokens(tmp_path / "d").tolist() == plain.encode(text)
    assert lines


def test_blocks_and_workers_do_not_show(corpus, tmp_path, monkeypatch):
    results = []
    text = open(f"{corpus}/text/train_10M/children_stories.train").read().split("\n")  # with documents of some lines
    write(tmp_path / "in", {"train_10M/gutenberg.train": "".join(line + ("\n\n\n" if i % 3 else "\n") for i, line in enumerate(text)),
                            "dev/gutenberg.dev": "\r\n".join(line + "\r\n" * (i % 3) for i, line in enumerate(text))})
    for size, workers in ((1 << 22, 1), (900, 1), (20_000, 2)):
        monkeypatch.setattr(prepare, "BLOCK_BYTES", size)
        main(PrepareConfig(input_dir=str(tmp_path / "in"), data_dir=str(tmp_path / str(size)), vocab_size=330, bos="document", workers=workers))
        results.append([tokens(tmp_path / str(size), split).tolist() for split in ("train", "val")])
    assert results[0] == results[1] == results[2] and results[0][0].count(1) > 300 and results[0][1].count(1) > 300


def test_shards_are_cut_and_read_as_one_stream(corpus, tmp_path, monkeypatch):
    main(PrepareConfig(input_dir=f"{corpus}/text", data_dir=str(tmp_path / "one"), vocab_size=330))
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 5000)
    main(PrepareConfig(input_dir=f"{corpus}/text", data_dir=str(tmp_path / "many"), vocab_size=330))
    meta = disk.read_meta(str(tmp_path / "many"))
    sizes = [s["tokens"] for s in meta["shards"] if s["split"] == "train"]
    assert len(sizes) > 2 and set(sizes[:-1]) == {5000}
    assert tokens(tmp_path / "many").tolist() == tokens(tmp_path / "one").tolist()
    starts = [0, 4990, 4999, 5000, 9999, sum(sizes) - 11]
    whole = np.fromfile(tmp_path / "one" / "train_00000.bin", "<u2")
    assert disk.Shards(str(tmp_path / "many"), "train").windows(starts, 11).tolist() == [whole[s:s + 11].tolist() for s in starts]


def test_where_documents_begin():
    headings = "preface\n= = = One = = =\n\ntext\n\nmore\n= = = Two = = =\nend\n"
    assert [p for p in prepare.split_documents(headings, True, True)] == [
        (True, "preface\n"), (True, "= = = One = = =\n\ntext\n\nmore\n"), (True, "= = = Two = = =\nend\n")]
    assert prepare.split_documents("rest\n= = = One = = =\n", True, False)[0] == (False, "rest\n")
    assert prepare.split_documents("a\r\n\r\nb\r\n", False, True) == [(True, "a\r\n\r\n"), (True, "b\r\n")]
    assert prepare.split_documents("a\nb\n\n\nc\n", False, True) == [(True, "a\nb\n\n\n"), (True, "c\n")]


def test_bos_per_line_and_per_document(tmp_path):
    write(tmp_path / "in", {"train_10M/simple_wiki.train": "= = = A = = =\n\n" + WORDS + "= = = B = = =\n" + WORDS, "dev/simple_wiki.dev": WORDS})
    for bos, where in (("line", lambda text: text.split("\n")), ("document", lambda text: ["= = = A = = =", "= = = B = = ="])):
        main(PrepareConfig(input_dir=str(tmp_path / "in"), data_dir=str(tmp_path / bos), vocab_size=330, bos=bos))
        t = disk.load_tokenizer(str(tmp_path / bos / "tokenizer.model"))
        ids = tokens(tmp_path / bos).tolist()
        text = t.decode(i for i in ids if i != 1)
        after = [t.decode(ids[i + 1:i + 20]) for i, token in enumerate(ids) if token == 1]
        lines = [line for line in where(text) if line]
        assert len(after) == len(lines)
        assert all(a.startswith(line[:5]) for a, line in zip(after, lines))


def test_held_out_share_and_what_dev_becomes(tmp_path):
    write(tmp_path / "in", {"babylm_10M/cbt.train": WORDS * 4, "babylm_dev/cbt.dev": WORDS, "babylm_test/cbt.test": WORDS * 2})
    main(PrepareConfig(input_dir=str(tmp_path / "in"), data_dir=str(tmp_path / "d"), vocab_size=330, val_fraction=0.05))
    words = {split: sum(s.values()) for split, s in disk.read_meta(str(tmp_path / "d"))["words"].items()}
    assert words["train"] + words["val"] == 4 * words["test"]
    assert words["val"] / (words["train"] + words["val"]) == pytest.approx(0.05, abs=0.01)


def small_tiktoken(path):
    """A byte-level BPE with a few merges, as tests cannot download gpt2's."""
    ranks = {bytes([i]): i for i in range(256)}
    for i, token in enumerate([b"th", b"the", b" the", b"og", b"dog", b" dog"]):
        ranks[token] = 256 + i
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    disk.save_tiktoken(tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 262}), path)
    return path


def test_existing_tokenizers(tmp_path):
    folder = write(tmp_path / "in", {"a.txt": WORDS + "naïve ☃\n"})
    path = small_tiktoken(str(tmp_path / "small.json"))
    main(PrepareConfig(input_dir=folder, data_dir=str(tmp_path / "t"), tokenizer=path, bos="line", val_fraction=0.1))
    t = disk.load_tokenizer(str(tmp_path / "t" / "tokenizer.json"))
    text = t.decode(i for i in tokens(tmp_path / "t") if i != t.bos)
    assert WORDS.startswith(text) and t.bos == 262 and t.encode(" the dog") == [258, 261]
    # a sentencepiece model with other habits (a blank put in front) is used as it is
    open(tmp_path / "lines", "w").write(WORDS)
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "lines"), model_prefix=str(tmp_path / "uni"), vocab_size=36, minloglevel=2)
    main(PrepareConfig(input_dir=folder, data_dir=str(tmp_path / "u"), tokenizer=str(tmp_path / "uni.model"), val_fraction=0.1))
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "uni.model"))
    block = prepare.cut_file(f"{folder}/a.txt", "a", "train", 0.1)[0]
    assert not disk.load_tokenizer(str(tmp_path / "uni.model")).splits_at_blanks()
    assert tokens(tmp_path / "u").tolist() == plain.encode(prepare.read_block(block)[0])


def test_interrupted_prepare_leaves_nothing_that_looks_finished(corpus, tmp_path, monkeypatch, capsys):
    def killed(*a, **k):
        raise KeyboardInterrupt
    cfg = PrepareConfig(input_dir=f"{corpus}/text", data_dir=str(tmp_path / "d"), vocab_size=330)
    with monkeypatch.context() as m:
        m.setattr(prepare, "encode_block", killed)
        with pytest.raises(KeyboardInterrupt):
            main(cfg)
    assert not os.path.exists(tmp_path / "d")
    main(cfg)
    assert "lock" not in os.listdir(tmp_path / "d") and os.listdir(tmp_path) == ["d"]


class Server(http.server.BaseHTTPRequestHandler):
    """A zip that breaks off in the middle of the first answer, and an OSF-like listing."""
    zip = b""
    requests = []

    def do_GET(self):
        base = f"http://127.0.0.1:{self.server.server_port}"
        self.requests.append((self.path, self.headers.get("Range")))
        if self.path.endswith(".zip"):
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            body = self.zip[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if start else body[:len(body) // 2])
            return
        entry = dict(attributes=dict(name="text_data", kind="folder"), relationships=dict(files=dict(links=dict(related=dict(href=base + "/list")))))
        files = [dict(attributes=dict(name="train_10M.zip", extra=dict(hashes=dict(sha256=self.digest))), links=dict(download=base + "/f.zip"))]
        body = json.dumps(dict(data=files if self.path == "/list" else [entry], links=dict(next=None))).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *a):
        pass


@pytest.mark.parametrize("good_digest", [True, False])
def test_download_resumes_and_checks(tmp_path, monkeypatch, good_digest):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("train_10M/cbt.train", WORDS)
        z.writestr("dev/cbt.dev", WORDS)
    Server.zip, Server.requests = buffer.getvalue(), []
    open(tmp_path / "z", "wb").write(Server.zip)
    Server.digest = disk.sha256(str(tmp_path / "z")) if good_digest else "0" * 64
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(prepare.OFFICIAL, "2024", f"http://127.0.0.1:{server.server_port}/root")
    cfg = PrepareConfig(input_dir=str(tmp_path / "in"), data_dir=str(tmp_path / "d"), download="2024", vocab_size=330)
    with pytest.raises(SystemExit, match="broke off"):
        main(cfg)
    if good_digest:
        main(cfg)
        assert disk.read_meta(cfg.data_dir)["words"]["train"]["cbt"] > 0
        assert ("/f.zip", f"bytes={len(Server.zip) // 2}-") in Server.requests
    else:
        with pytest.raises(SystemExit, match="expected 0000"):
            main(cfg)
    server.shutdown()


def test_offline_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.OFFICIAL, "2023", {"babylm_data.zip": "http://127.0.0.1:9/x.zip"})
    with pytest.raises(SystemExit, match="download of 2023 failed.*by hand"):
        main(PrepareConfig(input_dir=str(tmp_path / "in"), download="2023"))


CORPUS = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data", "corpus")


@pytest.mark.skipif(not os.path.isdir(CORPUS), reason="the 10M-word corpus is not here")
def test_real_text_round_trips(tmp_path):
    shutil.copytree(os.path.join(CORPUS, "dev"), tmp_path / "dev")
    os.makedirs(tmp_path / "train_10M")
    for name in os.listdir(tmp_path / "dev"):
        shutil.copy(tmp_path / "dev" / name, tmp_path / "train_10M" / name.replace(".dev", ".train"))
    main(PrepareConfig(input_dir=str(tmp_path), data_dir=str(tmp_path / "d"), vocab_size=3300, bos="line"))
    t = disk.load_tokenizer(str(tmp_path / "d" / "tokenizer.model"))
    text = "".join(prepare.CLEANERS[n[:-4]](open(tmp_path / "dev" / n, encoding="utf-8", newline="").read()) for n in sorted(os.listdir(tmp_path / "dev")))
    assert t.decode(i for i in tokens(tmp_path / "d", "val") if i != 1) == unicodedata.normalize("NFKC", text)


# --- bad input ------------------------------------------------------------------------------------

@pytest.mark.parametrize("files,change,message", [
    ({}, dict(input_dir=""), "say where the text is"),
    ({}, {}, "no input folder"),
    ({"x/readme.md": "hi"}, {}, "holds neither train_10M/"),
    ({"train_100M/cbt.train": WORDS}, {}, "see --track"),
    ({"a.txt": ""}, dict(val_fraction=0.1), "is empty"),
    ({"a.txt": WORDS}, {}, "no validation text"),
    ({"a.txt": WORDS.encode() + b"caf\xe9 \n"}, dict(val_fraction=0.1), rf"a\.txt: byte {len(WORDS) + 3} \(0xe9\) is not UTF-8"),
    ({"a.txt": WORDS}, dict(val_fraction=0.1, vocab_size=70000), "between 300 and 65536"),
    ({"a.txt": WORDS}, dict(val_fraction=0.1, vocab_size=9000), "cannot make vocab_size=9000 entries from this text, at most"),
    ({"a.txt": WORDS}, dict(val_fraction=0.1, tokenizer="none.model"), "no tokenizer file"),
    ({"a.txt": WORDS, "t.model": "no"}, dict(val_fraction=0.1, tokenizer="t.model"), "is not a sentencepiece model"),
    ({"a.txt": WORDS, "t.json": "{}"}, dict(val_fraction=0.1, tokenizer="t.json"), "is not a tokenizer file"),
    ({"a.txt": WORDS, "../d/meta.json": "{}"}, dict(val_fraction=0.1), "already prepared"),
    ({"a.txt": WORDS, "../d/thesis.tex": "x"}, dict(val_fraction=0.1), "/d holds other things than prepared data"),
    ({"a.txt": WORDS, "../d/meta.json": "{}", "../d/thesis.tex": "x"}, dict(val_fraction=0.1, overwrite=True), "holds other things"),
    ({"a.txt": WORDS}, dict(val_fraction=0.1, data_dir=""), "data_dir='' is not a folder's name"),
    ({"a.txt": "one line only"}, dict(val_fraction=0.1), "too few lines to hold some out"),
    ({"train_10M/open_subtitles.train": "Subtitles by X", "dev/cbt.dev": WORDS}, {}, "nothing is left of the training text"),
])
def test_bad_input_is_one_line(tmp_path, files, change, message):
    write(tmp_path / "in", files)
    if "tokenizer" in change:
        change = dict(change, tokenizer=str(tmp_path / "in" / change["tokenizer"]))
    with pytest.raises(SystemExit, match=message) as e:
        main(PrepareConfig(**{"input_dir": str(tmp_path / "in"), "data_dir": str(tmp_path / "d"), "vocab_size": 330, **change}))
    assert "\n" not in str(e.value) and not os.path.exists(tmp_path / "d" / "train_00000.bin")
    assert all(os.path.exists(tmp_path / "in" / name) for name in files)


def test_vocabulary_over_65536_is_refused(tmp_path):
    ranks = {bytes([i]): i for i in range(256)}
    ranks.update({bytes([i // 256, i % 256]): 256 + i for i in range(65536)})
    disk.save_tiktoken(tiktoken.Encoding("big", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={}), str(tmp_path / "big.json"))
    write(tmp_path / "in", {"a.txt": WORDS})
    with pytest.raises(SystemExit, match="65792 entries"):
        main(PrepareConfig(input_dir=str(tmp_path / "in"), data_dir=str(tmp_path / "d"), tokenizer=str(tmp_path / "big.json"), val_fraction=0.1))


# --- trust ----------------------------------------------------------------------------------------

HOSTILE = {  # name: bytes. Text must come back but for NFKC; what is not UTF-8 is reported by file and byte
    "empty": b"", "only blanks": b"   \t  ", "only line ends": b"\n\n\n", "one blank": b" ", "one letter": b"a", "no line end": b"abc", "crlf": b"a b\r\nc\r\n\r\nd",
    "cr": b"a\rb\rc", "nul": b"a\x00b \x00\x00 c\n", "bell and escape": b"\x07\x1b[31mred\x1b[0m\n", "delete": b"a\x7fb\n", "vertical tab, form feed": b"a\x0bb\x0cc\n",
    "tabs": b"\ta\t\tb\t\n", "blanks in front": b"     a\n   b\n", "blanks behind": b"a     \nb   \n", "utf-8 bom": "\ufeffa b\n".encode(), "bom inside": "a\ufeffb\n".encode(),
    "right to left": "שלום \u202eabc\u202c عالم\n".encode(), "zero width": "a\u200bb\u200cc\u200dd\u2060e\n".encode(), "soft hyphen": "a\u00adb\n".encode(),
    "emoji": "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\n".encode(), "combining": "e\u0301 o\u0308 \u0301a\n".encode(),
    "many combining": ("a" + "\u0301" * 500 + "\n").encode(), "ligatures": "ﬁ ﬂ ½ ² ™ … ﷺ\n".encode(), "full width": "ＡＢＣ　１２３\n".encode(), "hangul jamo": "\u1112\u1161\u11ab\n".encode(),
    "kana": "ﾊﾟ ﾞ\n".encode(), "cjk": "漢字かな交じり文。\n".encode(), "cjk compatibility": "\uf900 \u3392\n".encode(), "special tokens": b"<s> </s> <pad> <unk> <0x41> <|endoftext|>\n",
    "bytes as text": b"\\x00 \\u0000 0x00\n", "lower one eighth block": "a\u2581b \u2581 \u2581\u2581\n".encode(), "lone \u2581": "\u2581".encode(), "private use": "\ue000\uf8ff\n".encode(),
    "replacement": "\ufffd\n".encode(), "not a character": "\ufffe \uffff \U0010ffff\n".encode(), "line separators": "a\u2028b\u2029c\u0085d\n".encode(), "hard blank": "a\u00a0b\u202fc\u3000d\n".encode(),
    "mathematics": "𝐀 𝓑 ∑ ∫ ℝ\n".encode(), "old scripts": "𐍈 𒀀 𓀀\n".encode(), "accents": "ÀÉÎÕÜ àéîõü ß ŉ ǆ\n".encode(), "long word": b"ab" * 20000 + b"\n", "long line": b"word " * 40000 + b"\n",
    "many short lines": b"a\n" * 20000, "headings": b"= = = A = = =\n= = = = = =\n = = = B = = = \n", "json": b'{"a": [1, null, "\\u00e9"]}\n', "html": b"<p>a &amp; b</p><!-- -->\n",
    "backslashes": b"\\n \\\\ \\t\n", "quotes": "“a” ‘b’ „c” «d» '\n".encode(), "turkish": "İ ı\n".encode(), "mixed line ends": b"a\nb\r\nc\rd\n\r",
    "latin-1": "caf\xe9\n".encode("latin-1"), "utf-16": "abc\n".encode("utf-16"), "cut short": "aé".encode()[:-1], "overlong": b"a\xc0\xafb\n", "surrogate": b"a\xed\xa0\x80b\n", "beyond": b"a\xf4\x90\x80\x80\n",
    "lone continuation": b"abc\x80def\n",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    main(PrepareConfig(input_dir=write(folder / "in", {"a.txt": WORDS}), data_dir=str(folder / "d"), vocab_size=350, val_fraction=0.1))
    return str(folder / "d" / "tokenizer.model")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_round_trips_or_is_reported(tmp_path, tokenizer, name):
    assert len(HOSTILE) >= 50
    raw = HOSTILE[name]
    source = write(tmp_path / "in", {"train_10M/a.train": WORDS, "train_10M/hostile.train": raw, "dev/a.dev": WORDS})
    cfg = PrepareConfig(input_dir=source, data_dir=str(tmp_path / "d"), tokenizer=tokenizer)
    try:
        text = raw.decode()
    except UnicodeDecodeError as e:
        with pytest.raises(SystemExit, match=rf"hostile.train: byte {e.start} \(0x{raw[e.start]:02x}\) is not UTF-8"):
            main(cfg)
        assert not os.path.exists(tmp_path / "d")
        return
    main(cfg)
    expected = unicodedata.normalize("NFKC", WORDS) + unicodedata.normalize("NFKC", text).replace("\u2581", " ")
    assert disk.load_tokenizer(tokenizer).decode(tokens(tmp_path / "d")) == expected


def test_a_line_of_ten_megabytes(tmp_path, tokenizer):
    text = "".join(f"word{i % 997} " for i in range(1_300_000))
    source = write(tmp_path / "in", {"train_10M/a.train": text, "dev/a.dev": WORDS})
    main(PrepareConfig(input_dir=source, data_dir=str(tmp_path / "d"), tokenizer=tokenizer, workers=1))
    assert len(text) > 10_000_000 and disk.load_tokenizer(tokenizer).decode(tokens(tmp_path / "d")) == text


def test_verify_finds_a_flipped_bit(corpus, tmp_path, capsys):
    d = str(tmp_path / "d")
    main(PrepareConfig(input_dir=f"{corpus}/text", data_dir=d, vocab_size=500))
    main(PrepareConfig(verify=d))
    assert "are as meta.json says" in capsys.readouterr().out
    for name in sorted(os.listdir(d)):
        path = os.path.join(d, name)
        content = bytearray(open(path, "rb").read())
        content[len(content) * 2 // 3] ^= 16
        open(path, "wb").write(content)
        with pytest.raises(SystemExit, match=name if name != "meta.json" else "^error"):
            main(PrepareConfig(verify=d))
        content[len(content) * 2 // 3] ^= 16
        open(path, "wb").write(content)
    main(PrepareConfig(verify=d))


@pytest.mark.parametrize("change", [dict(shards=[]), dict(shards=[dict(split="train", file="x", tokens=None, sha256="")]), dict(vocab_size=400),
                                    dict(options=None), dict(tokenizer=5)])
def test_verify_finds_an_edited_description(data, tmp_path, change):
    shutil.copytree(data, tmp_path / "d")
    meta = json.load(open(tmp_path / "d/meta.json"))
    json.dump({**meta, **change}, open(tmp_path / "d/meta.json", "w"))
    with pytest.raises(SystemExit, match="^error: [^\n]*meta.json[^\n]*$"):
        main(PrepareConfig(verify=str(tmp_path / "d")))


def test_two_at_once_do_not_mix(corpus, tmp_path):
    """One of two that write the same folder at the same time ends in one line; what is there is whole."""
    command = [sys.executable, prepare.__file__, f"--input_dir={corpus}/text", f"--data_dir={tmp_path}/d", "--vocab_size=500"]
    both = [subprocess.Popen([*command, f"--bos={bos}"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for bos in ("none", "line")]
    errors = [p.communicate()[1] for p in both]
    codes = [p.returncode for p in both]
    assert 0 in codes and all((code == 0) == (not err) and len(err.splitlines()) <= 1 for code, err in zip(codes, errors)), errors
    main(PrepareConfig(verify=f"{tmp_path}/d"))
    winner = disk.read_meta(f"{tmp_path}/d")["options"]["bos"]
    main(PrepareConfig(input_dir=f"{corpus}/text", data_dir=f"{tmp_path}/alone", vocab_size=500, bos=winner))
    assert disk.data_sha256(disk.read_meta(f"{tmp_path}/d")) == disk.data_sha256(disk.read_meta(f"{tmp_path}/alone"))


@pytest.mark.parametrize("wait", [0.7, 1.0, 1.3])
def test_killed_prepare_starts_clean(corpus, tmp_path, wait):
    command = [sys.executable, prepare.__file__, f"--input_dir={corpus}/text", f"--data_dir={tmp_path}/d", "--vocab_size=500"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    time.sleep(wait)
    child.kill()
    child.wait()
    if os.path.exists(tmp_path / "d"):  # then it is whole
        main(PrepareConfig(verify=f"{tmp_path}/d"))
    else:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    main(PrepareConfig(verify=f"{tmp_path}/d"))


def test_shares_of_the_text_are_nested(tmp_path):
    """A share has about its size, lies within every larger one, and leaves validation and test as they are."""
    lines = [f"line number {i} of the corpus .\n" for i in range(40_000)]
    folder = write(tmp_path / "in", {"train_10M/cbt.train": "".join(lines), "dev/cbt.dev": "".join(lines[:500])})
    main(PrepareConfig(input_dir=folder, data_dir=str(tmp_path / "whole"), vocab_size=330))
    tokenizer = disk.load_tokenizer(str(tmp_path / "whole/tokenizer.model"))
    kept = []
    for share in (0.05, 0.3, 1.0):
        d = str(tmp_path / f"d{share}")
        main(PrepareConfig(input_dir=folder, data_dir=d, tokenizer=str(tmp_path / "whole/tokenizer.model"), train_fraction=share))
        kept.append(tokenizer.decode(tokens(d)).splitlines())
        assert len(kept[-1]) == pytest.approx(share * 40_000, rel=0.25) and np.array_equal(tokens(d, "val"), tokens(tmp_path / "whole", "val"))
        assert json.load(open(f"{d}/meta.json"))["words"]["train"]["cbt"] == 6 * len(kept[-1])
    assert set(kept[0]) < set(kept[1]) < set(kept[2]) and kept[1] == [line for line in kept[2] if line in set(kept[1])]
    for share in (0.0, 1.5):
        with pytest.raises(SystemExit, match="train_fraction"):
            main(PrepareConfig(input_dir=folder, data_dir=str(tmp_path / "x"), train_fraction=share))
