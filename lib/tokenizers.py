"""Tokenizers in a file: sentencepiece models and tiktoken's ranks."""
import base64
import json
import os
import sys
import unicodedata

import regex  # tiktoken's own
import sentencepiece
import tiktoken

from lib.files import write_json


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
        pieces = map(self.sp.id_to_piece, range(self.vocab_size))
        inner = any("\u2581" in p[1:] or len(p) > 1 and set(p) & set("\n\t") for p in pieces)
        return (not inner and self.decode(self.encode("  a  b ")) == "  a  b "
                and self.encode("a b") == self.encode("a") + self.encode(" b"))


class TiktokenTokenizer:
    """A byte-level BPE kept in one JSON file: name, pattern, special tokens, ranks (base64); of an imported
    one (tools/hf.py) also whether text is normalised (nfkc), which specials are bos, eos and pad, and the
    model's vocab_size. Bytes that have no token are dropped, as the tokenizers library does; `dropped`
    counts them."""

    def __init__(self, path):
        self.file = path
        try:
            with open(path, encoding="utf-8") as f:
                spec = json.load(f)
            self.ranks = {base64.b64decode(token): rank for token, rank in spec["ranks"].items()}
            self.pattern, self.specials = spec["pattern"], spec["specials"]
            self.bpe = tiktoken.Encoding(spec["name"], pat_str=self.pattern, mergeable_ranks=self.ranks,
                                         special_tokens=self.specials)
        except Exception as e:
            sys.exit(f"error: {path} is not a tokenizer file of ours, or is damaged "
                     f"({type(e).__name__}: {e})")
        self.missing = bytes(i for i in range(256) if bytes([i]) not in self.ranks)
        self.dropped = 0
        self.nfkc = spec.get("nfkc", False)
        self.vocab_size = spec.get("vocab_size", self.bpe.n_vocab)
        self.bos = self.special(spec.get("bos"), "<s>", "<|endoftext|>")
        self.eos = self.special(spec.get("eos"), "</s>", "<|endoftext|>")
        self.pad = self.special(spec.get("pad"), "<pad>")

    def special(self, *names):
        return next((self.specials[name] for name in names if name in self.specials), None)

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
