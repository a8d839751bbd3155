"""Texts that a model is to choose between: as files have them, and the tokens that a year's rules make of
them."""
import os
import re
import reprlib
import sys
from functools import cache
from typing import NamedTuple

from lib.files import parse_json, regular
from lib.rules import RULES
from lib.scoring import Candidate, added_bos, candidate
from lib.tokenizers import prefix_token


class Format(NamedTuple):
    """What a line of a file is, recognised by its fields."""
    rules: str               # that have it
    candidates: tuple        # "what stands before|what is scored"; the right one first
    task: str = "{file}"     # whose accuracy it counts for
    uid: str = ""            # the official name of that, if it is another
    right: str = ""          # a field that has the right one's place
    without: str = ""        # a line with this word in a candidate is left out
    per_token: bool = False  # a score is a mean over tokens
    share: str = ""          # a field with the share of people who chose the first: Spearman's rho with it


FIVE, FOUR, TWO = (tuple(map(template.__mod__, range(n))) for n, template in (
    (5, "{input_prefix}|{options[%d]}"), (4, "{prompt}| {solution%d}"), (2, "{prompt}| {solution%d}")))

FORMATS = (
    Format("2023 2024 2025 2026", ("|{sentence_good}", "|{sentence_bad}")),        # BLiMP, its supplement
    Format("2024", ("{Context1}| {Target1}", "{Context1}| {Target2}")),            # EWoK
    Format("2025", ("{Context1}| {Target1}", "{Context1}| {Target2}"), task="{Domain}"),
    Format("2026", ("{Context1}| {Target1}", "{Context2}| {Target1}"), task="{Domain}"),
    Format("2025", FIVE, task="{file}_{numops}_ops"),                              # entity tracking
    Format("2026", FIVE, task="{file}_{numops}_ops", without="nothing"),
    Format("2025 2026", ("{prefix_acceptable} |{property_phrase}",                 # COMPS
                         "{prefix_unacceptable} |{property_phrase}"), uid="{comps}"),
    Format("2025", ("|{sentences[0]}", "|{sentences[1]}"), uid="{wug}", share="ratio"),  # WUG
    Format("2026", FOUR, uid="{example_id}", right="label", per_token=True),       # GlobalPIQA
    Format("2026", TWO, uid="{example_id}", right="label", per_token=True),
)


class Item(NamedTuple):
    task: str
    uid: str
    line: int             # within the uid, from 0
    candidates: tuple
    context: str          # what stands before all candidates alike, else ''
    texts: tuple          # the candidates after it: how a prediction names them
    right: int = 0
    per_token: bool = False
    share: float | None = None
    phenomenon: str = ""  # '' where the file names none


def encoder(rules, tokenizer, described, bos):
    """encode(before, scored) -> Candidate, by the rules. described: the checkpoint's config.json; bos:
    'auto', 'yes' or 'no'."""
    prefix = RULES[rules].prefix
    if prefix == "tokenizer":
        first = added_bos(described, tokenizer, bos)
        return lambda before, scored: candidate(tokenizer, before + scored, len(before), first)
    if described["bos"] == "none":
        print("notice: trained with bos=none: every sentence is scored after a token the model has never "
              "seen (prepare.py --bos=line avoids it)")
    first = tokenizer.eos if prefix == "</s>" and tokenizer.eos is not None else prefix_token(tokenizer)

    def encode(before, scored):
        if before:  # cut where the tokens of the context alone would end
            return Candidate(tuple(tokenizer.encode(before + scored)), len(tokenizer.encode(before)))
        return Candidate((first, *tokenizer.encode(" " + scored)), 1)
    return encode


def read_items(folder, rules, encode, limit):
    """All items of the .jsonl files in `folder`, none with more than `limit` tokens to read."""
    if not os.path.isdir(folder):
        sys.exit(f"error: no data folder '{folder}' (name the folder that holds the .jsonl files)")
    items, count = [], {}  # uid -> its items so far
    for file in sorted(f for f in os.listdir(folder) if f.endswith(".jsonl")):
        path = os.path.join(folder, file)
        with open(regular(path), "rb") as f:
            for n, line in enumerate(f):
                where = f"error: {path}, line {n + 1}"
                try:
                    item = read_item(parse_json(line), file.removesuffix(".jsonl"), rules, encode)
                except KeyError as e:
                    sys.exit(f"{where}: no field {e}")
                except (ValueError, TypeError, RuntimeError) as e:  # RuntimeError: half a surrogate pair
                    sys.exit(f"{where}: not a minimal pair in JSON ({e})")
                if item is None:
                    continue
                longest = max(len(c.ids) for c in item.candidates) - 1
                if longest > limit:
                    sys.exit(f"{where}: {longest} tokens, the model has {limit} positions")
                items.append(item._replace(line=count.get(item.uid, 0)))
                count[item.uid] = items[-1].line + 1
    if not items:
        sys.exit(f"error: {folder} has no minimal pairs (.jsonl files with one JSON object a line)")
    return items


def read_item(row, file, rules, encode):
    """A line's item (its place is not known yet), or None if the rules leave it out."""
    if not isinstance(row, dict):
        raise TypeError("not an object")
    form = format_of(row, rules)
    row = dict(row, file=file, comps=file.removeprefix("comps_").replace("-", "_"),
               wug=re.sub("_(nominalization|tense)$", "", file))
    if form.share and isinstance(row["sentences"], str):
        row["sentences"] = row["sentences"].split("\t")
    check_values(row, form)
    parts = [tuple(half.format(**row) for half in template.split("|")) for template in form.candidates]
    if form.without and any(form.without in scored for _, scored in parts):
        return None
    before_each = {template.split("|")[0] for template in form.candidates}
    context = parts[0][0] if len(before_each) == 1 else ""
    blank = "" if context or RULES[rules].prefix == "tokenizer" else " "
    texts = tuple(blank + (scored if len(before_each) == 1 else before + scored) for before, scored in parts)
    candidates = tuple(encode(before, scored) for before, scored in parts)
    for (before, scored), c in zip(parts, candidates):
        empty = not scored.strip() or not before.strip() and before_each != {""}
        if empty or not 0 < c.n_context <= max(1, len(c.ids) - 1):
            raise ValueError("an empty context or sentence")
    task = form.task.format(**row)
    return Item(task, form.uid.format(**row) or task, 0, candidates, context, texts,
                row[form.right] if form.right else 0, form.per_token,
                row[form.share] if form.share else None, str(row.get("linguistics_term", "")))


def check_values(row, form):
    """TypeError or ValueError that names the first field of a line that has not what its format wants."""
    n = len(form.candidates)
    for name in fields(form.candidates):
        if "{%s[" % name not in form.candidates[0]:
            good, wanted = isinstance(row[name], str), "a text"
        else:
            good = isinstance(row[name], list) and [type(text) for text in row[name]] == [str] * n
            wanted = f"{n} texts"
        if not good:
            raise TypeError(f"{name} is {reprlib.repr(row[name])}, not {wanted}")
    for name in fields((form.task, form.uid)):
        if type(row[name]) not in (str, int):
            raise TypeError(f"{name} is {reprlib.repr(row[name])}, not a name or number")
    right, share = (row[name] if name else 0 for name in (form.right, form.share))
    if type(right) is not int or not 0 <= right < n:
        raise ValueError(f"{form.right} is {reprlib.repr(right)}, not from 0 to {n - 1}")
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise ValueError(f"{form.share} is {reprlib.repr(share)}, not from 0 to 1")


@cache
def fields(templates):
    return list(dict.fromkeys(re.findall(r"{(\w+)", " ".join(templates))))


def format_of(row, rules):
    """The format of these rules that has most of the line's fields. KeyError of what it lacks."""
    def fit(form):
        there = sum(name in row for name in all_fields(form))
        return there, there - len(all_fields(form))
    nearest = max((form for form in FORMATS if rules in form.rules.split()), key=fit)
    for name in all_fields(nearest):
        if name not in row:
            other = max(FORMATS, key=fit)
            if fit(other)[0] > fit(nearest)[0] and fit(other)[1] == 0:
                raise ValueError(f"no task by the rules of {rules}, but of {other.rules}")
            raise KeyError(name)
    return nearest


@cache
def all_fields(form):
    """The fields that lines of a format have."""
    also = (form.task, form.uid, "{%s}" % form.right, "{%s}" % form.share)
    return [name for name in fields((*form.candidates, *also)) if name not in ("file", "comps", "wug")]
