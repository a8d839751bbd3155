"""How surprising a model finds each word of a text: what a study of the age of acquisition needs (Baby Llama,
appendix A).

    python -m tools.surprisal --ckpt=out/babyllama --text=childes.txt --out=surprisal.tsv
    python -m tools.surprisal --ckpt=out/babyllama --text=childes.txt --words=words.txt --out=surprisal.tsv

A context is a line of the text. A word's surprisal is the sum of -log p(token | prefix token and the line
so far) over its tokens, in nats; the mean over all its occurrences is printed. A word is what stands between
blanks, lower-cased, without punctuation at its ends: tokens of that punctuation do not count.
The 2023 pipeline reads its table one position off (its "surprisal" is of the next position's
distribution); these are the shifted, right ones. tools.aoa has both, and the study's regression.
"""
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from distill import Teacher, ensemble_logits
from lib.checkpoints import load_ensemble
from lib.configurator import launch
from lib.data import Batch
from lib.files import check_writable, regular, write_lines
from lib.machine import pick_device
from lib.tokenizers import prefix_token


@dataclass
class SurprisalConfig:
    ckpt: tuple[str, ...] = ()  # run folder (its best checkpoint) or checkpoint folder; several: as one
    text: str = ""              # UTF-8, a context a line
    words: str = ""             # a word a line: only these, in this order; '' = every word of the text
    out: str = ""               # a table of word, occurrences, mean surprisal, tab-separated; '' = print it
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def main(cfg):
    if not cfg.ckpt or not cfg.text:
        sys.exit("error: say which model reads what: --ckpt=out/run --text=FILE")
    if cfg.out:
        check_writable(cfg.out)
    models, tokenizer, _ = load_ensemble(cfg.ckpt, pick_device(cfg.device))
    teachers, prefix = [Teacher(m) for m in models], prefix_token(tokenizer)  # the models speak as one
    wanted = [bare(word) for word in read_lines(cfg.words)] if cfg.words else None
    found = {}  # word -> its surprisals
    for line in read_lines(cfg.text):
        for word, nats in line_surprisals(teachers, tokenizer, prefix, line):
            found.setdefault(word, []).append(nats)
    rows = ["word\toccurrences\tsurprisal\n"]
    rows += [f"{word}\t{len(found[word])}\t{sum(found[word]) / len(found[word]):.4f}\n"
             for word in (sorted(found) if wanted is None else wanted) if word in found]
    if cfg.out:
        write_lines(cfg.out, rows)
    else:
        sys.stdout.writelines(rows)
        sys.stdout.flush()
    absent = [word for word in wanted or [] if word not in found]
    if absent:
        print(f"notice: {len(absent)} of {len(wanted)} words are not in the text: {', '.join(absent[:10])}",
              file=sys.stderr)


def read_lines(path):
    try:
        with open(regular(path), encoding="utf-8") as f:
            return [line for line in map(str.strip, f) if line]
    except UnicodeDecodeError as e:
        sys.exit(f"error: {path}: byte {e.start} is not UTF-8")


def bare(word):
    """`word` lower-cased, without what is no letter or digit at its ends."""
    inner = [i for i, c in enumerate(word) if c.isalnum()]
    return word[inner[0]:inner[-1] + 1].lower() if inner else ""


@torch.no_grad()
def line_surprisals(teachers, tokenizer, prefix, line):
    """[(word, surprisal in nats)] of a line. What does not fit the model's positions is read from the middle
    of its context: the last half of it."""
    ids, spans = [prefix], []  # spans: (word, its tokens' positions in ids)
    for word in line.split():
        tokens = tokenizer.encode(" " + word)
        texts = token_texts(tokenizer, tokens)
        inner = [i for i, text in enumerate(texts) if any(map(str.isalnum, text))]
        if bare(word) and inner:
            first = inner[0]
            if first > 0 and texts[first - 1].isspace():  # a blank that is a token by itself is the word's
                first -= 1
            spans.append((bare(word), range(len(ids) + first, len(ids) + inner[-1] + 1)))
        ids += tokens
    if ids[1:] != tokenizer.encode(" " + " ".join(line.split())):
        sys.exit("error: this tokenizer's tokens reach over blanks: a word has no tokens of its own")
    device, block_size = teachers[0].head.device, min(teacher.cfg.block_size for teacher in teachers)
    nats, known = [0.0], 1  # of ids[:known]
    while known < len(ids):
        start = max(0, known - block_size // 2) if len(ids) > block_size + 1 else 0
        window = torch.tensor([ids[start:start + block_size + 1]], device=device)
        logp = ensemble_logits(teachers, Batch(window[:, :-1])).log_softmax(-1)  # (T, V)
        nats += (-logp.gather(-1, window[0, 1:, None])[known - start - 1:, 0]).tolist()
        known = start + window.shape[1]
    return [(word, sum(nats[i] for i in span)) for word, span in spans]


def token_texts(tokenizer, tokens):
    """Each token's text; of a token that is part of a character, the text of all such tokens beside it."""
    texts = [tokenizer.decode([t]) for t in tokens]
    i = 0
    while i < len(texts):
        end = i
        while end < len(texts) and "\ufffd" in texts[end]:
            end += 1
        if end > i:
            texts[i:end] = [tokenizer.decode(tokens[i:end])] * (end - i)
        i = end + 1
    return texts


if __name__ == "__main__":
    launch(main, SurprisalConfig)
