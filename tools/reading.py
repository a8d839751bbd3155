"""How well a model's surprisals explain reading times: the challenge's reading task (2025 and 2026 alike).

    python -m tools.reading --ckpt=out/babyllama --data=reading/reading_data.csv

A word's surprisal is -ln of the product of its pieces' probabilities, each after the text before it, which
is cut into tokens anew; the word stands there without its blank ("Arthur placed" + "the"), as in the
official code. A score is what surprisal adds to a regression of reading times on frequency, length,
position and their products: (R2 with - R2 without) / (1 - R2 without), in %. Eye tracking is the mean over
four measures; for self-paced reading, length and surprisal of the word before are in the regression too.
"""
import csv
import math
import os
import sys
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from distill import Teacher
from eval_blimp import log_probabilities
from lib.checkpoints import load_ensemble, weights_sha256
from lib.configurator import launch
from lib.files import check_writable, regular, sha256, write_json
from lib.machine import pick_device
from lib.scoring import Candidate, added_bos

EYE_TRACKING = ("RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound")
SELF_PACED = "self_paced_reading_time"
KNOWN = ("Subtlex_log10", "length", "context_length")  # of a word, without a model: log frequency, ...
KNOWN_BEFORE = (*KNOWN, "prev_length", "prev_pred")     # and of the word before it
TEXTS = ("item", "word", "prev_item", "prev_word")
NUMBERS = (*EYE_TRACKING, SELF_PACED, *KNOWN, "prev_length")
MISSING = ("", "NA", "None")  # some of what pandas reads as a missing value


@dataclass
class ReadingConfig:
    ckpt: tuple[str, ...] = ()  # run folder (its best checkpoint) or checkpoint folder; several: as one
    data: str = ""              # the challenge's reading_data.csv
    predictions: str = ""       # also write the surprisals to this .json, as the challenge wants them
    out: str = ""               # where the result goes; '' = reading.json in the folder of a single --ckpt
    bos: Literal["auto", "yes", "no"] = "auto"  # <s> before a text; auto: if the model was trained so
    batch_tokens: int = 1024    # positions scored at a time; a GPU wants more
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main(cfg):
    if not cfg.ckpt or not cfg.data:
        sys.exit("error: say which model reads what: --ckpt=out/run --data=reading/reading_data.csv")
    out = result_path(cfg)
    rows = read_rows(cfg.data)
    models, tokenizer, described = load_ensemble(cfg.ckpt, pick_device(cfg.device))
    bos = added_bos(described, tokenizer, cfg.bos)
    pred, prev_pred = surprisals([Teacher(m) for m in models], tokenizer, bos, rows, cfg.batch_tokens)
    result = dict(ckpt=list(cfg.ckpt), step=described["step"], rules=["2025", "2026"], bos=bos is not None,
                  weights_sha256=[weights_sha256(path) for path in cfg.ckpt], data_sha256=sha256(cfg.data),
                  **reading_scores(rows, pred, prev_pred))
    if out:
        write_json(out, result)
    if cfg.predictions:
        write_json(cfg.predictions, official_predictions(pred, prev_pred))
    print_scores(result)
    if out:
        print(f"written to {out}")


def result_path(cfg):
    """Where the result goes, '' for nowhere. Exits if that or another file asked for cannot be written."""
    out = cfg.out or (os.path.join(cfg.ckpt[0], "reading.json") if len(cfg.ckpt) == 1 else "")
    for path in filter(None, (out, cfg.predictions)):
        check_writable(path)
    return out


# --- the words ------------------------------------------------------------------------------------

def read_rows(path):
    """The file's rows: texts as they are, prev_item None where it is missing; numbers, nan where missing."""
    return read_table(path, (*TEXTS, *NUMBERS), read_row)


def read_table(path, columns, read_row):
    """What read_row makes of each row, a dict of texts, of a CSV file that has `columns`."""
    rows = []
    if not os.path.isfile(path):
        sys.exit(f"error: no {path}")
    try:
        with open(regular(path), encoding="utf-8-sig", newline="") as f:
            reader = csv.DictReader(f, strict=True)
            absent = [name for name in columns if name not in (reader.fieldnames or ())]
            if absent:
                sys.exit(f"error: {path}, line 1: no column '{absent[0]}'")
            for fields in reader:
                if None in fields or None in fields.values():
                    sys.exit(f"error: {path}, line {reader.line_num}: not as many fields as in line 1")
                rows.append(read_row(fields))
    except UnicodeDecodeError as e:
        sys.exit(f"error: {path}: byte {e.start} is not UTF-8")
    except (csv.Error, ValueError) as e:
        sys.exit(f"error: {path}, line {reader.line_num}: {e}")
    if not rows:
        sys.exit(f"error: {path} has no rows")
    return rows


def read_row(fields):
    """The text before "of" in "None of the city people" was lost as a missing value. The official code puts
    it right in `item`; in `prev_item` "None" stays a missing value."""
    row = {name: fields[name] for name in TEXTS}
    row["item"] = row["item"] or "None"
    row["prev_item"] = None if row["prev_item"] in MISSING else row["prev_item"]
    if not row["word"] or row["prev_item"] and not row["prev_word"]:
        raise ValueError("a text without its word")
    return row | {name: number(fields[name]) for name in NUMBERS}


def number(text):
    """A number of a CSV file, nan where it is missing."""
    value = math.nan if text in MISSING else float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def surprisals(teachers, tokenizer, bos, rows, batch_tokens):
    """(pred, prev_pred): of each row's word after its text, and of the word before that, in nats; nan where
    there is none."""
    both = [[(row["item"], row["word"]) for row in rows],
            [(row["prev_item"], row["prev_word"]) for row in rows]]
    pieces = {(text, word): word_candidates(tokenizer, text, word, bos)
              for text, word in both[0] + both[1] if text is not None}
    every = [c for candidates in pieces.values() for c in candidates]
    logp = dict(zip(every, log_probabilities(teachers, every, batch_tokens, "reading")))
    nats = {pair: -sum(logp[c] for c in candidates) for pair, candidates in pieces.items()}
    return [[nats.get(pair, math.nan) for pair in pairs] for pairs in both]


def word_candidates(tokenizer, text, word, bos):
    """A candidate per token of `word`: that token alone, after all the text before it, cut anew. From the
    second on it is the first token of the token's text, another one where that is part of a character."""
    candidates = []
    for n, token in enumerate(tokenizer.encode(word)):
        piece = tokenizer.decode([token])
        before = [bos] * (bos is not None) + tokenizer.encode(text)
        sought = tokenizer.encode(piece)[:1] if n else [token]
        if not before or not sought:
            break
        candidates.append(Candidate((*before, *sought), len(before)))
        text += piece
    else:
        if candidates:
            return candidates
    sys.exit(f"error: {word!r} after {text!r}: the tokenizer has no token for one of them")


# --- the scores -----------------------------------------------------------------------------------

def reading_scores(rows, pred, prev_pred):
    """Both scores and their mean, in %; the gain of each measure; the rows that a regression has. rows: dicts
    of KNOWN, prev_length and the measures; pred, prev_pred: surprisals in nats. nan = missing."""
    columns = {name: [row[name] for row in rows] for name in NUMBERS}
    columns |= dict(pred=pred, prev_pred=prev_pred)
    gains, used = {}, {}
    for measure in (*EYE_TRACKING, SELF_PACED):
        known = KNOWN_BEFORE if measure == SELF_PACED else KNOWN
        table = np.array([columns[name] for name in (measure, "pred", *known)], dtype=np.float64).T
        table = table[~np.isnan(table).any(1)]
        gains[measure], used[measure] = gain(measure, *np.split(table, [1, 2], axis=1)), len(table)
    eye_tracking = sum(gains[measure] for measure in EYE_TRACKING) / len(EYE_TRACKING)
    return dict(reading=(eye_tracking + gains[SELF_PACED]) / 2, eye_tracking=eye_tracking,
                self_paced=gains[SELF_PACED], gains=gains, rows=used)


def gain(measure, y, pred, known):
    """What `pred` (n, 1) adds to the regression of y (n, 1) on the columns of `known` (n, k) and their
    products, in % of what that leaves unexplained."""
    products = [known[:, [i]] * known[:, [j]] for i, j in combinations(range(known.shape[1]), 2)]
    base = np.hstack([known, *products])
    if len(y) < base.shape[1] + 3 or np.ptp(y) == 0:
        sys.exit(f"error: {measure}: {len(y)} rows without missing values, or of one value: no regression")
    without, with_pred = r_squared(y, base), r_squared(y, np.hstack([base, pred]))
    return float((with_pred - without) / (1 - without) * 100)


def r_squared(y, x):
    """Of the least squares of y (n, 1) on x (n, k) and a constant. Centred, and not by normal equations: the
    products are nearly dependent."""
    y, x = y - y.mean(0), x - x.mean(0)
    residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return 1 - (residual ** 2).sum() / (y ** 2).sum()


def official_predictions(pred, prev_pred):
    """The surprisals as the challenge's collation reads them."""
    return {"reading": {"predictions": [dict(id=i, pred=nats, prev_pred=before)
                                        for i, (nats, before) in enumerate(zip(pred, prev_pred))]}}


def print_scores(result):
    print("what surprisal explains of the variance that is left, in %")
    for measure, value in result["gains"].items():
        print(f"  {measure:<28} {value:6.2f}  {result['rows'][measure]:>6} rows")
    for name in ("eye_tracking", "self_paced", "reading"):
        print(f"{name.replace('_', ' '):<30} {result[name]:6.2f}")


if __name__ == "__main__":
    launch(main, ReadingConfig)
