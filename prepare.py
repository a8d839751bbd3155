"""Text to token shards: clean, train a tokenizer on the training split, encode, describe.

    python prepare.py --input_dir=babylm --data_dir=data/babylm --bos=line
    python prepare.py --input_dir=babylm --download=2024        # fetch the official archives first
    python prepare.py --input_dir=my_texts --val_fraction=0.05  # any folder of .txt
    python prepare.py --verify=data/babylm                      # are the files still what they were?
    python prepare.py --readability=data/babylm > mine.py       # from easy to hard: a curriculum for train.py

Input is the BabyLM layout (train_10M/*.train, dev/*.dev, test/*.test, or the 2023 names babylm_10M,
babylm_dev, babylm_test) or a folder of .txt files. Output: see lib/shards.py. Text is read in blocks by
worker processes, so memory does not grow with the corpus.
"""
import hashlib
import multiprocessing
import os
import re
import shutil
import sys
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import chdir, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from threading import Thread
from typing import Literal, NamedTuple

import numpy as np
import sentencepiece
import tiktoken
from tqdm import tqdm

from lib.configurator import launch, need
from lib.download import UNPACKING, download
from lib.files import FORMAT_VERSION, flush_to_disk, git_revision, lock, sha256, write_json
from lib.readability import count_text, curriculum
from lib.shards import DTYPE, open_shard, read_meta
from lib.tokenizers import load_tokenizer, save_tiktoken


@dataclass
class PrepareConfig:
    input_dir: str = ""               # folder of text; with --download, where the archives are unpacked
    data_dir: str = "data/babylm"     # folder to make
    track: Literal["10M", "100M"] = "10M"  # which training folder, where there are two
    tokenizer: str = ""               # a sentencepiece .model, our tiktoken .json, or gpt2; '' trains one
    vocab_size: int = 16000           # of the tokenizer to train
    bos: Literal["none", "document", "line"] = "none"  # where <s> goes. 'none' is the papers' way, but BLiMP
                                      # is scored after <s>, which a model trained so has never seen
    train_fraction: float = 1.0       # take this random share of train; smaller ones lie within larger ones
    val_fraction: float = 0.0         # hold out this share of train as 'val'; dev is then 'test'
                                      # (BabyLlama-2: 0.05)
    download: Literal["", "2023", "2024", "2025"] = ""  # fetch this year's official text first
    workers: int = 0                  # processes; 0 = one per core
    overwrite: bool = False           # replace a finished data folder
    verify: str = ""                  # only check this prepared folder against its checksums
    readability: str = ""             # only print how hard to read this prepared folder's sources are, and a
                                      # curriculum of them: a config
    buckets: int = 5                  # of that curriculum (the paper's number)


BLOCK_BYTES = 4 << 20    # text read at a time
SHARD_TOKENS = 1 << 26   # a shard file holds at most this many (128 MiB)
HEADING = re.compile(r"^= = = (.*?) = = =[ \t\r]*$", re.MULTILINE)
# what a data folder holds: nothing else is ever deleted
OURS = re.compile(r"meta\.json(\.tmp)?|tokenizer\.(model|json)|(train|val|test)_\d+\.bin")


def main(cfg):
    if cfg.verify:
        return verify(cfg.verify)
    if cfg.readability:
        return print_curriculum(cfg)
    check_prepare_config(cfg)
    check_data_dir(cfg)
    if cfg.download:
        download(cfg.download, cfg.track, cfg.input_dir)
    blocks = find_blocks(cfg)
    with unfinished_folder(cfg) as folder:
        with worker_map(cfg, blocks) as map_blocks:
            tokenizer = get_tokenizer(cfg, folder, blocks, map_blocks)
            meta = write_shards(cfg, folder, blocks, map_blocks, tokenizer)
        write_json(os.path.join(folder, "meta.json"), meta)
        replace_data(os.path.realpath(cfg.data_dir), folder)
    report(cfg.data_dir, meta)


def check_prepare_config(cfg):
    if not cfg.input_dir:
        sys.exit("error: say where the text is: --input_dir=FOLDER")
    need(cfg,
         data_dir=(os.path.basename(os.path.abspath(cfg.data_dir or "/")), "a folder's name"),
         train_fraction=(0 < cfg.train_fraction <= 1, "above 0 and at most 1"),
         val_fraction=(cfg.val_fraction < 1, "below 1"),
         # 4 specials, 256 bytes, some characters; tokens are uint16
         vocab_size=(cfg.tokenizer or 300 <= cfg.vocab_size <= 65536, "between 300 and 65536"))


def check_data_dir(cfg):
    """Exit unless there is nothing in the folder to make, or what may be replaced."""
    if os.path.exists(cfg.data_dir) and not os.path.isdir(cfg.data_dir):
        sys.exit(f"error: {cfg.data_dir} is not a folder; name another --data_dir")
    for entry in os.scandir(cfg.data_dir) if os.path.isdir(cfg.data_dir) else ():
        folder = entry.is_dir(follow_symlinks=False)
        if entry.name not in (".unfinished", "lost+found") if folder else not OURS.fullmatch(entry.name):
            sys.exit(f"error: {cfg.data_dir} holds other things than prepared data ({entry.name}); "
                     "name another --data_dir")
        if entry.name == "meta.json" and not cfg.overwrite:
            sys.exit(f"error: {cfg.data_dir} is already prepared; use --overwrite to replace it")


@contextmanager
def unfinished_folder(cfg):
    """A folder to write into, in data_dir itself, which may be a link or a mount point, and is locked."""
    folder = os.path.join(os.path.realpath(cfg.data_dir), ".unfinished")
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    lock(os.path.dirname(folder))
    check_data_dir(cfg)  # again: another prepare.py may have finished meanwhile
    shutil.rmtree(folder, ignore_errors=True)  # left by one that was killed
    os.mkdir(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_data(data_dir, folder):
    """What is in `folder` takes the place of the data in data_dir. Without meta.json, which goes first and
    comes last, it is no data."""
    for name in os.listdir(folder):
        flush_to_disk(os.path.join(folder, name))
    for name in sorted(filter(OURS.fullmatch, os.listdir(data_dir)), key="meta.json".__ne__):
        os.remove(os.path.join(data_dir, name))
    for name in sorted(os.listdir(folder), key="meta.json".__eq__):
        last = name == "meta.json"
        os.rename(os.path.join(folder, name), os.path.join(data_dir, name + ".tmp" * last))
    os.rmdir(folder)
    os.rename(os.path.join(data_dir, "meta.json.tmp"), os.path.join(data_dir, "meta.json"))
    flush_to_disk(data_dir)


def verify(data_dir):
    """Exit at the first file of a data folder that is not what meta.json says."""
    meta = read_meta(data_dir)
    tokens = sum(len(open_shard(data_dir, s)) for s in meta["shards"])
    print(f"{data_dir}: tokenizer and {len(meta['shards'])} shards with {tokens:,} tokens "
          "are as meta.json says")


def print_curriculum(cfg):
    counts = read_meta(cfg.readability).get("readability")
    if counts is None:
        sys.exit(f"error: {cfg.readability}/meta.json has no counts of sentences and syllables, which are "
                 "newer than it; prepare it again")
    need(cfg, buckets=(1 <= cfg.buckets <= len(counts),
                       f"1 to {len(counts)}, the number of {cfg.readability}'s sources"))
    parted = [source for source in counts if len(source.split()) != 1]
    if parted:
        sys.exit(f"error: a curriculum cannot name '{parted[0]}': blanks part the sources of a bucket; "
                 "rename its file and prepare the text again")
    print(f"# The sources of {cfg.readability} from easy to hard (lib/readability.py).\n"
          f"#   python prepare.py --readability={cfg.readability} --buckets={cfg.buckets}\n"
          + curriculum(counts, cfg.buckets))


# --- which text goes where ------------------------------------------------------------------------

class Block(NamedTuple):
    """Bytes [start, end) of a file, whole lines and at least one, and where they go."""
    path: str
    start: int
    end: int
    source: str     # e.g. 'childes': chooses the cleaner
    split: str      # train, val or test
    headings: bool  # the file has = = = Title = = = lines
    share: float = 1.0  # of its text that is taken


def find_blocks(cfg):
    """All text under input_dir as Blocks, file by file in sorted order, train first."""
    if not os.path.isdir(cfg.input_dir):
        sys.exit(f"error: no input folder '{cfg.input_dir}'")
    if os.path.exists(os.path.join(cfg.input_dir, UNPACKING)):
        sys.exit(f"error: {cfg.input_dir} was not unpacked to its end; use --download again, "
                 f"or delete {UNPACKING} in it")
    files = find_files(cfg)
    has_dev = any(folder_split == "dev" for folder_split, _ in files)
    dev = "test" if cfg.val_fraction else "val"
    blocks = []
    for folder_split, path in files:
        source = os.path.basename(path).rsplit(".", 1)[0]
        if folder_split == "train":
            if source not in CLEANERS:
                print(f"notice: no cleaner for source '{source}', its text is taken as it is")
            blocks += cut_file(path, source, "train", cfg.val_fraction)
        elif folder_split == "dev":
            blocks += cut_file(path, source, dev)
        elif not (cfg.val_fraction and has_dev):  # else dev has taken the place of test
            blocks += cut_file(path, source, "test")
    blocks = [b._replace(share=cfg.train_fraction) if b.split == "train" else b for b in blocks]
    splits = {b.split for b in blocks}
    if "train" not in splits:
        sys.exit(f"error: the training text under {cfg.input_dir} is empty")
    if "val" not in splits:
        reason = ("its files have too few lines to hold some out" if cfg.val_fraction else
                  "hold some out: --val_fraction=0.05")
        sys.exit(f"error: {cfg.input_dir} has no validation text; {reason}")
    return sorted(blocks, key=lambda b: ("train", "val", "test").index(b.split))


def find_files(cfg):
    """[(split, path)] of the BabyLM layout in input_dir or in a folder of it, else of .txt files."""
    for root in [cfg.input_dir] + sorted(e.path for e in os.scandir(cfg.input_dir) if e.is_dir()):
        for train, same, other in (("train_", "", "babylm_"), ("babylm_", "babylm_", "")):
            folders = [("train", os.path.join(root, train + cfg.track))]
            if not os.path.isdir(folders[0][1]):
                continue
            for split in ("dev", "test"):  # of the training text's year, where two years' are there
                names = [os.path.join(root, year + split) for year in (same, other)]
                folders += [(split, name) for name in names if os.path.isdir(name)][:1]
            return [(split, path) for split, folder in folders for path in list_files(folder, "." + split)]
    texts = [("train", path) for path in list_files(cfg.input_dir, ".txt")]
    if not texts:
        sys.exit(f"error: {cfg.input_dir} holds neither train_{cfg.track}/ or babylm_{cfg.track}/ "
                 "(see --track) nor .txt files")
    return texts


def list_files(folder, ending):
    if not os.path.isdir(folder):
        return []
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(ending)]
    for path in paths:
        if not os.path.isfile(path):  # reading a pipe would wait for ever
            sys.exit(f"error: {path} is not a regular file or a link to one")
    return paths


def cut_file(path, source, split, val_fraction=0.0):
    """Blocks of about BLOCK_BYTES that end at line ends. The last `val_fraction` of each goes to
    'val', so that what is held out is contiguous text from all over the file."""
    size, blocks, start = os.path.getsize(path), [], 0
    with open(path, "rb") as f:
        headings = any(HEADING.match(line.decode("utf-8", "replace"))
                       for line in f if line.startswith(b"= = ="))

        def next_line_end(position):
            f.seek(position)
            f.readline()
            while (line := f.readline()) and not line.strip(b"\r\n"):
                pass  # blank lines stay with the text before them: after them a document may begin
            return min(f.tell() - len(line), size)

        while start < size:
            end = next_line_end(min(start + BLOCK_BYTES, size) - 1)
            kept = start + int((end - start) * (1 - val_fraction))
            cut = min(next_line_end(kept), end) if val_fraction else end
            blocks.append(Block(path, start, cut, source, split, headings))
            if cut < end:
                blocks.append(Block(path, cut, end, source, "val", headings))
            start = end
    return blocks


def read_block(block):
    """The block's text, and whether a document begins at its first character."""
    with open(block.path, "rb") as f:
        f.seek(max(block.start - 3, 0))
        before = f.read(min(block.start, 3))
        raw = f.read(block.end - block.start)
    if len(raw) < block.end - block.start:
        sys.exit(f"error: {block.path} became shorter while it was read")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        at, byte = block.start + e.start, raw[e.start]
        sys.exit(f"error: {block.path}: byte {at} (0x{byte:02x}) is not UTF-8; convert the file")
    after_blank_line = not block.headings and before.endswith((b"\n\n", b"\n\r\n"))
    return chosen(text, block), block.start == 0 or after_blank_line


def chosen(text, block):
    """The block's share of its text: pieces of 32 lines, taken where a hash of their place lies below it."""
    if block.share == 1:
        return text
    lines, place = split_lines(text), f"{os.path.basename(block.path)}:{block.start}"

    def taken(piece):
        name = f"{place}:{piece}".encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(name, digest_size=8).digest()
        return int.from_bytes(digest, "big") < block.share * 2 ** 64
    pieces = ["".join(lines[i:i + 32]) for i in range(0, len(lines), 32)]
    return "".join(piece for i, piece in enumerate(pieces) if taken(i))


def split_lines(text):
    """At line feeds alone, which stay: str.splitlines knows ten more ends of lines."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def split_documents(text, headings, at_start):
    """[(begins a document, text)]: one begins at each = = = Title = = = heading or, in a file
    without headings, after each blank line, and at the file's start."""
    begin = HEADING if headings else re.compile(r"(?:(?<=\n\n)|(?<=\n\r\n))(?=[^\r\n])")
    cuts = sorted({0, len(text), *(m.start() for m in begin.finditer(text))})
    first = at_start or bool(headings and HEADING.match(text))
    return [(i > 0 or first, text[a:b]) for i, (a, b) in enumerate(zip(cuts, cuts[1:]))]


# --- cleaners, one per BabyLM source: text to text, each line by itself ----------------------------

def clean_spoken(text):
    """Runs of blanks become one, and none stands before . , ; ! ?"""
    return re.sub(r" +(?=[.,;!?])", "", re.sub(r"[ \t]+", " ", text))


def clean_cbt(text):
    """As spoken text; also puts "do n't", "it 's", "we 'll" together again."""
    return re.sub(r" (?=(?:n't|'(?:s|m|d|re|ve|ll))\b)", "", clean_spoken(text), flags=re.IGNORECASE)


def clean_simple_wiki(text):
    """Articles stand between blank lines: keep one line end between them."""
    return re.sub(r"\n(?:[ \t]*\n)+", "\n", re.sub(r"^(?:[ \t]*\n)+", "", text))


def clean_wikipedia(text):
    """'= = = Title = = =' becomes 'Title'; lines are stripped of blanks."""
    return "\n".join(line.strip(" \t") for line in HEADING.sub(r"\1", text).split("\n"))


def clean_open_subtitles(text):
    """Drops credit lines ('Subtitles by ...')."""
    return re.sub(r"^[^\w\n]*subtitle.*\n?", "", text, flags=re.IGNORECASE | re.MULTILINE)


def clean_qed(text):
    """Lines at least half in upper case: 'l' was 'I' before OCR; re-capitalised by sentence."""
    return "\n".join(recapitalised(line) if shouted(line) else line for line in text.split("\n"))


def shouted(line):
    letters = [c for c in line if c.isalpha()]
    return bool(letters) and 2 * sum(c.isupper() for c in letters) >= len(letters)


def recapitalised(line):
    line = re.sub(r"\bi\b", "I", line.replace("l", "I").lower())
    # one match takes all to the line's end where no word is left: looking from each full stop takes forever
    return re.sub(r"(?:^|[.!?]\s)\W*(\w?)", lambda m: m[0].upper() if m[1] else m[0], line)


def unchanged(text):
    return text


CLEANERS = dict(
    aochildes=clean_spoken, childes=clean_spoken, bnc_spoken=clean_spoken, cbt=clean_cbt,
    simple_wiki=clean_simple_wiki, simple_wikipedia=clean_simple_wiki, wikipedia=clean_wikipedia,
    open_subtitles=clean_open_subtitles, qed=clean_qed,
    children_stories=unchanged, gutenberg=unchanged, switchboard=unchanged)


# --- tokenizer ------------------------------------------------------------------------------------

# A word with the blank before it, if any. sentencepiece's BPE never merges over a blank, so counting
# and encoding such words one by one gives what it would give for the text. Tabs and line ends stand
# alone: they become byte tokens.
WORDS = re.compile(r" ?[^ \t\n]+|[ \t\n]")


def get_tokenizer(cfg, folder, blocks, map_blocks):
    """The tokenizer asked for, its file put into `folder`."""
    if not cfg.tokenizer:
        return train_tokenizer(cfg, os.path.join(folder, "tokenizer.model"), blocks, map_blocks)
    if cfg.tokenizer == "gpt2":
        path = os.path.join(folder, "tokenizer.json")
        try:
            save_tiktoken(tiktoken.get_encoding("gpt2"), path)
        except Exception as e:  # it downloads its ranks on first use, through requests
            sys.exit(f"error: tiktoken could not fetch gpt2's ranks ({type(e).__name__}); "
                     "go online once, or use another tokenizer")
    else:
        if not os.path.isfile(cfg.tokenizer):
            sys.exit(f"error: no tokenizer file '{cfg.tokenizer}' (a .model, a .json of ours, or gpt2)")
        load_tokenizer(cfg.tokenizer)  # says what is wrong with the user's file, not with our copy
        ending = ".json" if cfg.tokenizer.endswith(".json") else ".model"
        path = shutil.copyfile(cfg.tokenizer, os.path.join(folder, "tokenizer" + ending))
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > 65536:
        sys.exit(f"error: tokenizer '{cfg.tokenizer}' has {tokenizer.vocab_size} entries; "
                 "shards are uint16 and hold 65536 at most")
    return tokenizer


def train_tokenizer(cfg, path, blocks, map_blocks):
    """sentencepiece BPE on the word counts of the cleaned training split. Nothing but NFKC is lost:
    blanks are kept, no blank is put in front, what is not in the vocabulary becomes bytes."""
    counts = Counter()
    for words in map_blocks(count_words, [b for b in blocks if b.split == "train"], "counting words"):
        counts.update(words)
    if not counts:
        sys.exit("error: nothing is left of the training text after cleaning")
    folder, words = os.path.dirname(path), "words.tsv"
    with open(os.path.join(folder, words), "w", encoding="utf-8") as f:
        f.writelines(f"{word}\t{n}\n" for word, n in sorted(counts.items())
                     if word not in " \t\n" and "\r" not in word)
    try:
        with chdir(folder):  # the file records its inputs' paths: the same text gives the same file anywhere
            sentencepiece.SentencePieceTrainer.train(
                input=words, input_format="tsv", model_prefix="tokenizer", model_type="bpe",
                vocab_size=cfg.vocab_size, normalization_rule_name="nfkc", remove_extra_whitespaces=False,
                add_dummy_prefix=False, byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
                max_sentence_length=1 << 30, minloglevel=2)
    except RuntimeError as e:
        most = re.search(r"value <= (\d+)", str(e))
        sys.exit(f"error: sentencepiece cannot make vocab_size={cfg.vocab_size} entries from this text" +
                 (f", at most {most[1]}" if most else f": {e}"))
    for name in (words, "tokenizer.vocab"):
        os.remove(os.path.join(folder, name))
    try:
        return load_tokenizer(path)
    except SystemExit:  # sentencepiece does not look whether all was written
        sys.exit(f"error: {path} could not be written; is the disk full?")


def count_words(block):
    words = Counter()
    for word, n in Counter(WORDS.findall(clean(block, read_block(block)[0]))).items():
        words[unicodedata.normalize("NFKC", word)] += n  # as SentencePieceTokenizer encodes it
    return words


def clean(block, text):
    return CLEANERS.get(block.source, unchanged)(text)


# --- encoding -------------------------------------------------------------------------------------

def write_shards(cfg, folder, blocks, map_blocks, tokenizer):
    """Encode all blocks into shards, in order, and return what meta.json says."""
    if cfg.bos != "none" and tokenizer.bos is None:
        sys.exit(f"error: --bos={cfg.bos} needs a tokenizer with a beginning-of-text token")
    encoder.cache_clear()  # the file may be another than the last one of its name
    encode = partial(encode_block, tokenizer_file=tokenizer.file, bos=cfg.bos)
    shards, words, sources, dropped = [], defaultdict(Counter), defaultdict(dict), 0
    readability = defaultdict(Counter)  # of the training split
    for block, (tokens, n_words, counts, n_dropped) in zip(blocks, map_blocks(encode, blocks, "encoding")):
        split, source = block.split, block.source
        dropped += n_dropped
        words[split][source] += n_words
        if tokens:
            append_tokens(folder, shards, split, tokens)
            sources[split][source] = sum(s["tokens"] for s in shards if s["split"] == split)
        if tokens and split == "train":
            readability[source].update(counts)
    if not {"train", "val"} <= {s["split"] for s in shards}:
        sys.exit("error: nothing is left of the training or validation text after cleaning")
    for s in shards:
        s["bytes"], s["sha256"] = s["tokens"] * DTYPE.itemsize, s["sha256"].hexdigest()
    if dropped:
        print(f"notice: {dropped:,} bytes have no token and were dropped: "
              "the tokenizer was trained without them")
    no_matter = ["data_dir", "input_dir", "workers", "overwrite", "verify", "readability", "buckets"]
    no_matter += ["vocab_size"] if cfg.tokenizer else []
    return dict(
        format_version=FORMAT_VERSION, vocab_size=tokenizer.vocab_size,
        tokenizer=os.path.basename(tokenizer.file), tokenizer_sha256=sha256(tokenizer.file),
        pad=tokenizer.pad, bos=tokenizer.bos, eos=tokenizer.eos,
        options={k: v for k, v in asdict(cfg).items() if k not in no_matter},  # to the tokens
        cleaners={b.source: CLEANERS.get(b.source, unchanged).__name__ for b in blocks},
        git_revision=git_revision(), words=words, readability=readability, shards=shards,
        sources=sources)  # split -> source -> the token its text ends before: a split is source after source


def append_tokens(folder, shards, split, tokens):
    """Put tokens at the end of the last shard and, when that is full or another split's, of new ones."""
    while tokens:
        if not shards or shards[-1]["split"] != split or shards[-1]["tokens"] == SHARD_TOKENS:
            name = f"{split}_{sum(s['split'] == split for s in shards):05d}.bin"
            shards.append(dict(split=split, file=name, tokens=0, sha256=hashlib.sha256()))
        shard = shards[-1]
        room = (SHARD_TOKENS - shard["tokens"]) * DTYPE.itemsize
        part, tokens = tokens[:room], tokens[room:]
        with open(os.path.join(folder, shard["file"]), "ab") as f:
            f.write(part)
        shard["sha256"].update(part)
        shard["tokens"] += len(part) // DTYPE.itemsize


def encode_block(block, tokenizer_file, bos):
    """The block's tokens as little-endian uint16 bytes, its words after cleaning, what readability needs of
    a training block, and the bytes dropped."""
    tokenizer, encode, bos_token = encoder(tokenizer_file)
    before = tokenizer.dropped
    text, at_start = read_block(block)
    if bos == "document":
        documents = split_documents(text, block.headings, at_start)
        parts = [(new, clean(block, part)) for new, part in documents]
        parts = [(new and bool(part.strip()), part) for new, part in parts]
    elif bos == "line":
        parts = [(bool(line.strip()), line) for line in split_lines(clean(block, text))]
    else:
        parts = [(False, clean(block, text))]
    try:
        tokens = b"".join(bos_token + encode(part) if new else encode(part) for new, part in parts)
    except SystemExit as e:  # the tokenizer cannot, and says why
        sys.exit(f"{e} ({block.path}, bytes {block.start} to {block.end})")
    counts = count_text("".join(part for _, part in parts)) if block.split == "train" else None
    return tokens, sum(len(part.split()) for _, part in parts), counts, tokenizer.dropped - before


@cache
def encoder(tokenizer_file):
    """(tokenizer, text -> bytes, the BOS token as bytes) of a tokenizer file, made once per process: it keeps
    the words it has met."""
    tokenizer = load_tokenizer(tokenizer_file)
    words = WordTokens(tokenizer)
    by_word = lambda text: b"".join(map(words.__getitem__, WORDS.findall(text)))
    encode = by_word if tokenizer.splits_at_blanks() else words.tokens
    return tokenizer, encode, b"" if tokenizer.bos is None else DTYPE.type(tokenizer.bos).tobytes()


class WordTokens(dict):
    """word -> its tokens as bytes, each word encoded once. Emptied at a million words."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def tokens(self, text):
        return np.array(self.tokenizer.encode(text), DTYPE).tobytes()

    def __missing__(self, word):
        if len(self) > 1_000_000:
            self.clear()
        self[word] = tokens = self.tokens(word)
        return tokens


# --- helpers --------------------------------------------------------------------------------------

@contextmanager
def worker_map(cfg, blocks):
    """`with worker_map(cfg, blocks) as map_blocks: map_blocks(function, blocks, title)` maps in order, over
    worker processes where there is enough text to pay for them."""
    workers = min(cfg.workers or os.cpu_count(), len(blocks))
    if workers < 2 or sum(b.end - b.start for b in blocks) < 4 * BLOCK_BYTES:
        yield partial(with_progress, map)
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, initializer=end_with_parent) as pool:
            try:
                yield partial(with_progress, pool.map)
            except BrokenProcessPool:
                for child in multiprocessing.active_children():
                    child.terminate()  # the pool waits, for ever, for one it was starting when another ended
                sys.exit("error: a worker process was killed, perhaps for want of memory; use fewer "
                         "--workers")


def end_with_parent():
    """A worker whose prepare.py was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def with_progress(map_in_order, function, blocks, title):
    with tqdm(total=sum(b.end - b.start for b in blocks), desc=title, unit="B", unit_scale=True,
              disable=not sys.stderr.isatty()) as bar:
        for block, result in zip(blocks, map_in_order(function, blocks)):
            yield result
            bar.update(block.end - block.start)


def report(data_dir, meta):
    for split, sources in meta["words"].items():
        tokens = sum(s["tokens"] for s in meta["shards"] if s["split"] == split)
        print(f"{split:5}  {sum(sources.values()):>11,} words  {tokens:>11,} tokens  ({', '.join(sources)})")
    print(f"{data_dir}: vocabulary {meta['vocab_size']}, bos={meta['options']['bos']}")


if __name__ == "__main__":
    launch(main, PrepareConfig)
