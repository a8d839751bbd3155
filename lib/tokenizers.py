"""Tokenizers in a file: sentencepiece models and tiktoken's ranks."""
import base64
import itertools
import os
import re
import sys
import unicodedata
from functools import cached_property

import regex  # tiktoken's own
import sentencepiece
import tiktoken

from lib.files import parse_json, regular, write_json


class SentencePieceTokenizer:
    """A sentencepiece `.model` file. Text such as '<s>' never becomes a special token.

    With a model as prepare.py trains them, decode(encode(text)) is NFKC(text), but for U+2581, the library's
    sign for a blank, which comes back as one. Of characters younger than one's Unicode, Python, sentencepiece
    and the library that reads an exported tokenizer.json (its marks end about 2017) may think differently."""

    dropped = 0  # what has no piece becomes bytes

    def __init__(self, path):
        self.file = path
        try:
            self.sp = sentencepiece.SentencePieceProcessor()
            with open(regular(path), "rb") as f:  # its own reading wants names in UTF-8
                self.sp.LoadFromSerializedProto(f.read())
        except Exception:
            sys.exit(f"error: {path} is not a sentencepiece model, or is damaged")
        self.vocab_size = self.sp.vocab_size()
        # its NFKC leaves combining marks in the order in which they stand: unicodedata's comes before it
        self.nfkc = self.sp.normalize(" \ufb01\u2460  x\n\t y ") == "\u2581fi1\u2581\u2581x\n\t\u2581y\u2581"
        self.pad, self.bos, self.eos = (i if i >= 0 else None for i in
                                        (self.sp.pad_id(), self.sp.bos_id(), self.sp.eos_id()))

    def encode(self, text):
        """Token ids of `text` (after the model's normalisation), without special tokens."""
        return self.sp.encode(unicodedata.normalize("NFKC", text) if self.nfkc else text)

    def normalized(self, text):
        return (unicodedata.normalize("NFKC", text) if self.nfkc else text).replace("\u2581", " ")

    def encode_with_ends(self, text):
        """Token ids, and where each ends in the bytes of normalized(text)."""
        ids = self.encode(text)
        return ids, token_ends([self.sizes[i] for i in ids], self.normalized(text), self.file)

    @cached_property
    def sizes(self):
        """Of each token in bytes."""
        return [1 if self.sp.is_byte(i) else len(self.sp.id_to_piece(i).replace("\u2581", " ").encode())
                for i in range(self.vocab_size)]

    def decode(self, ids):
        return self.sp.decode([int(i) for i in ids])

    def splits_at_blanks(self):
        """True if encoding text equals encoding it cut before each blank: no piece reaches over a
        blank, and none is added or removed. Then prepare.py encodes each distinct word once."""
        pieces = map(self.sp.id_to_piece, range(self.vocab_size))
        inner = any("\u2581" in p[1:] or len(p) > 1 and set(p) & set("\n\t") for p in pieces)
        return (not inner and self.decode(self.encode("  a  b ")) == "  a  b "
                and self.encode("a b") == self.encode("a") + self.encode(" b"))


LONG_RUN = re.compile(r"(?<!\s)\s{10000}")  # of blanks: tiktoken's stack is too small for tens of them
PATIENCE = 60  # seconds for a foreign pattern on a block of text


def is_panic(e):
    """A panic of tiktoken's Rust: its class is no Exception, and has no name to import."""
    return type(e).__name__ == "PanicException"


class TiktokenTokenizer:
    """A byte-level BPE kept in one JSON file: name, pattern, special tokens, ranks (base64); of an imported
    one (tools/hf.py) also whether text is normalised (nfkc), which specials are bos, eos and pad, and the
    model's vocab_size. Bytes that have no token are dropped, as the tokenizers library does; `dropped`
    counts them."""

    def __init__(self, path):
        self.file = path
        try:
            with open(regular(path), "rb") as f:
                spec = parse_json(f.read())
            self.ranks = {base64.b64decode(token): rank for token, rank in spec["ranks"].items()}
            self.pattern, self.specials = spec["pattern"], spec["specials"]
            ids = [*self.ranks.values(), *self.specials.values()]
            self.vocab_size = spec.get("vocab_size", max(ids) + 1)
            if (not all(type(i) is int and 0 <= i < self.vocab_size for i in [*ids, self.vocab_size - 1])
                    or len(set(self.ranks.values())) < len(spec["ranks"])):
                raise ValueError("its token ids are not whole numbers below vocab_size, each there once")
            self.bos, self.eos, self.pad = (
                next((self.specials[name] for name in (spec.get(key), *usual) if name in self.specials), None)
                for key, *usual in (("bos", "<s>", "<|endoftext|>"), ("eos", "</s>", "<|endoftext|>"),
                                    ("pad", "<pad>")))
            self.bpe = tiktoken.Encoding(spec["name"], pat_str=self.pattern, mergeable_ranks=self.ranks,
                                         special_tokens=self.specials)
        except BaseException as e:
            if not isinstance(e, Exception) and not is_panic(e):
                raise
            sys.exit(f"error: {path} is not a tokenizer file of ours, or is damaged "
                     f"({type(e).__name__}: {e})")
        self.missing = bytes(i for i in range(256) if bytes([i]) not in self.ranks)
        self.dropped = 0
        self.nfkc = spec.get("nfkc", False)

    def encode(self, text):
        text = self.normalized(text)
        data = text.encode()
        if len(data.translate(None, self.missing)) == len(data) and not LONG_RUN.search(text):
            try:
                return self.bpe.encode_ordinary(text)
            except BaseException as e:
                if not is_panic(e):
                    raise
        return self.encode_by_word(text)

    def encode_by_word(self, text):
        """The same tokens where tiktoken panics: on a byte that it does not know, on a long run of blanks, or
        where its pattern goes back too often."""
        ids = []
        try:
            for match in regex.finditer(self.pattern, text, timeout=PATIENCE):
                data = match[0].encode()
                kept = data.translate(None, self.missing)
                self.dropped += len(data) - len(kept)
                ids += self.bpe._encode_single_piece(kept) if kept else []
        except (TimeoutError, regex.error) as e:
            sys.exit(f"error: the pattern of {self.file} cannot cut {len(text):,} characters of text in "
                     f"{PATIENCE} s ({type(e).__name__}); use another tokenizer")
        return ids

    def normalized(self, text):
        return unicodedata.normalize("NFKC", text) if self.nfkc else text

    def encode_with_ends(self, text):
        """Token ids, and where each ends in the bytes of normalized(text)."""
        ids = self.encode(text)
        return ids, token_ends([self.sizes[i] for i in ids], self.normalized(text), self.file)

    @cached_property
    def sizes(self):
        """Of each token in bytes."""
        return {rank: len(token) for token, rank in self.ranks.items()}

    @cached_property
    def known(self):
        return {*self.ranks.values(), *self.specials.values()}

    def decode(self, ids):
        """Ids that no token has (the padding of an imported model's vocabulary) give no text."""
        return self.bpe.decode([i for i in map(int, ids) if i in self.known])

    def splits_at_blanks(self):
        return False


def token_ends(sizes, text, file):
    """Where tokens of so many bytes end in a text. Some tokenizers put a blank before it."""
    added = sum(sizes) - len(text.encode())
    if added not in (0, 1):
        sys.exit(f"error: {file} drops or adds characters in {text[:40]!r}: its tokens' places are not known")
    return [end - added for end in itertools.accumulate(sizes)]


def load_tokenizer(path):
    """The tokenizer in file `path`: sentencepiece (`.model`) or a tiktoken JSON (`.json`)."""
    if not os.path.isfile(path):
        sys.exit(f"error: no tokenizer file {path}")
    return TiktokenTokenizer(path) if path.endswith(".json") else SentencePieceTokenizer(path)


def prefix_token(tokenizer):
    """The token that stands before a text: <s>, else </s>, else <pad>."""
    prefix = next((t for t in (tokenizer.bos, tokenizer.eos, tokenizer.pad) if t is not None), None)
    if prefix is None:
        sys.exit("error: the tokenizer has no token to put before a sentence (<s>, </s> or <pad>)")
    return prefix


def save_tiktoken(encoding, path):
    """Write a tiktoken Encoding to our JSON file, so that nothing is downloaded later."""
    ranks = {base64.b64encode(token).decode(): rank for token, rank in encoding._mergeable_ranks.items()}
    write_json(path, dict(name=encoding.name, pattern=encoding._pat_str,
                          specials=encoding._special_tokens, ranks=ranks))
