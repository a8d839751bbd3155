"""When a model learns words, and when children do: the challenge's age of acquisition from learning curves;
and by the rules of 2023, Baby Llama's table 4.

    python -m tools.aoa --ckpt=out/babyllama --data=aoa --rules=2026     # pip install scipy
    python -m tools.aoa --ckpt=out/babyllama --words=word_list.csv --contexts=sent_words.json

The second predicts children's months from one checkpoint's surprisals (lib/acquisition.py): table 4's row as
the official code has it, which reads surprisals one position off, and the right one; beside them, since they
cannot be read without, the rows of no surprisal and of random numbers, and the difference from none with its
standard error over words.

The first: for each checkpoint that the run has kept by words seen (train.py --keep_words) the surprisal of
every word after every context is computed and written into the run's folder; the same command goes on, and
other rules need no model again. A word's learning curve is a sigmoid,

    f(x) = a / (1 + exp(-b (x - c))) + d,

fitted to -surprisal over x = log10(words seen + 1). The model has learnt the word where f is half-way from
chance to the least surprisal, children where f of their months is 0.5. The score is Pearson's correlation of
both ages, over the words that have both.
"""
import hashlib
import importlib.util
import math
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from distill import Teacher
from eval_blimp import log_probabilities, make_room
from lib.acquisition import CATEGORIES, CUT, Word, mean_surprisals, months_table
from lib.checkpoints import load_ensemble, read_checkpoint_config, weights_sha256
from lib.configurator import launch, need
from lib.files import check_writable, parse_json, read_json, regular, sha256, write_json
from lib.machine import pick_device
from lib.published import AOA_MONTHS
from lib.scoring import added_bos, candidate
from lib.tokenizers import SentencePieceTokenizer, load_tokenizer
from tools.reading import number, read_table

# the challenge's checkpoints, in millions of words; of the strict-small track the first 19
MARKS = (*range(1, 10), *range(10, 100, 10), *range(100, 1001, 100))
MONTHS = range(16, 31)


@dataclass
class AoaConfig:
    ckpt: str = ""              # a run folder with chck_1M, chck_2M, ... in it; for --words any checkpoint
    data: str = ""              # the challenge's folder with cdi_childes.json and cdi_human.csv
    words: str = ""             # or the word_list.csv of 2023 for table 4, where rules and bos do not count,
    contexts: str = ""          # and its sent_words.json: [{"sent": "a dog .", "words": ["a", "dog"]}, ...]
    rules: Literal["2025", "2026"] = "2026"
    surprisals: str = ""        # also write all surprisals to this .json, as the challenge wants them
    out: str = ""               # where the result goes; '' = aoa_<rules> or aoa_months.json in --ckpt
    bos: Literal["auto", "yes", "no"] = "auto"  # <s> before a text; auto: if the model was trained so
    batch_tokens: int = 1024    # positions scored at a time; a GPU wants more
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Occurrence(NamedTuple):
    word: str
    context_id: int  # from 0 within the word
    context: str     # the text before it


def main(cfg):
    if cfg.words or cfg.contexts:
        return table_4(cfg)
    if not cfg.ckpt or not cfg.data:
        sys.exit("error: say which run on what: --ckpt=out/run --data=aoa")
    if not importlib.util.find_spec("scipy"):
        sys.exit("error: tools.aoa needs scipy: pip install scipy")
    steps = kept_steps(cfg.ckpt)
    out = cfg.out or os.path.join(cfg.ckpt, f"aoa_{cfg.rules}.json")
    for path in filter(None, (out, cfg.surprisals)):
        check_writable(path)
    contexts, children = (os.path.join(cfg.data, name) for name in ("cdi_childes.json", "cdi_human.csv"))
    occurrences, shares = read_occurrences(contexts), read_children(children)
    if len(steps) < official_count(steps):
        print(f"notice: {len(steps)} of the challenge's {official_count(steps)} checkpoints are there")
    surprisals, tokenizer = aoa_surprisals(cfg.ckpt, occurrences, cfg.bos, cfg.batch_tokens,
                                           pick_device(cfg.device))
    chance = chance_levels({o.word for o in occurrences}, tokenizer, cfg.rules)
    result = dict(ckpt=cfg.ckpt, rules=cfg.rules, steps=steps, bos=cfg.bos,
                  weights_sha256=[weights_sha256(os.path.join(cfg.ckpt, step)) for step in steps],
                  data_sha256=[sha256(contexts), sha256(children)],
                  **aoa_score(occurrences, surprisals, shares, chance, cfg.rules))
    write_json(out, result)
    if cfg.surprisals:
        write_json(cfg.surprisals, official_surprisals(cfg.ckpt, occurrences, surprisals))
    print(f"age of acquisition, rules of {cfg.rules}: {result['score']:.4f}, the correlation over "
          f"{result['n_words']} words that both learn, of {len(result['words'])} that children do\n"
          f"written to {out}")


# --- what is read ---------------------------------------------------------------------------------

def kept_steps(run):
    """The names of the run's checkpoints that the challenge knows, by words seen."""
    steps = [f"chck_{mark}M" for mark in MARKS if os.path.isdir(os.path.join(run, f"chck_{mark}M"))]
    if len(steps) < 3:
        sys.exit(f"error: {run} has {len(steps)} checkpoints by words seen (chck_1M, chck_2M, ...), a curve "
                 "wants 3: train with --keep_words")
    return steps


def words_seen(step):
    return 1e6 * int(step.removeprefix("chck_").removesuffix("M"))


def official_count(steps):
    """19 checkpoints, or 28 of a run that saw more than 100 million words."""
    limit = 100 if words_seen(steps[-1]) <= 1e8 else 1000
    return sum(mark <= limit for mark in MARKS)


def read_occurrences(path):
    """All contexts of all words in the file; words of one character are left out."""
    occurrences = []
    for word, contexts in read_json(path).items():
        try:
            found = [Occurrence(word, i, context["context"] + "") for i, context in enumerate(contexts)]
        except (KeyError, TypeError):
            sys.exit(f"error: {path}: '{word}' has no list of objects with a text 'context'")
        occurrences += found if len(word) > 1 else []
    if not occurrences:
        sys.exit(f"error: {path} has no words with contexts")
    return occurrences


def read_children(path):
    """{word: (months, shares)}, the shares of children who know it at these months; missing ones left out. Of
    rows with one word the first."""
    def read_row(fields):
        shares = {month: number(fields[str(month)]) for month in MONTHS if str(month) in fields}
        if not shares:
            raise ValueError("no columns of months, 16 to 30")
        known = [(month, share) for month, share in shares.items() if not math.isnan(share)]
        return fields["word"], tuple(np.array(known).reshape(-1, 2).T)
    return dict(reversed(read_table(path, ("word",), read_row)))


# --- surprisals -----------------------------------------------------------------------------------

def aoa_surprisals(run, occurrences, bos, batch_tokens, device):
    """({step: surprisals in nats, one per occurrence}, tokenizer) of the run's kept checkpoints: those in the
    run's aoa_surprisals.json that are of the same weights and texts, the others computed and put there. bos:
    'auto' | 'yes' | 'no'."""
    steps = kept_steps(run)
    described = [read_checkpoint_config(os.path.join(run, step)) for step in steps]
    if len({config["tokenizer_sha256"] for config in described}) > 1:
        sys.exit(f"error: the checkpoints of {run} have not one tokenizer")
    tokenizer = load_tokenizer(os.path.join(run, steps[0], described[0]["tokenizer"]))
    bos = added_bos(described[0], tokenizer, bos)
    texts = [(o.context.strip(), o.word.strip()) for o in occurrences]
    candidates = [candidate(tokenizer, f"{context} {word}", len(context) + 1, bos) for context, word in texts]
    asked = hashlib.sha256(repr(candidates).encode()).hexdigest()
    path, surprisals = os.path.join(run, "aoa_surprisals.json"), {}
    entries = read_json(path) if os.path.exists(path) else {}
    check_writable(path)
    for step in steps:
        key = dict(weights_sha256=weights_sha256(os.path.join(run, step)), candidates_sha256=asked)
        surprisals[step] = computed_before(entries.get(step), key)
        if surprisals[step] is None:
            (model,), _, _ = load_ensemble([os.path.join(run, step)], device)
            surprisals[step] = step_surprisals(model, candidates, batch_tokens, step)
            entries[step] = dict(key, surprisals=surprisals[step])
            write_json(path, entries)
    return surprisals, tokenizer


def computed_before(entry, key):
    """The surprisals of an entry of aoa_surprisals.json if it has this key, else None."""
    try:
        return [float(nats) for nats in entry["surprisals"]] if key.items() <= entry.items() else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def step_surprisals(model, candidates, batch_tokens, title):
    """In nats; nan where a GPT-2 has too few positions, as the official code has it."""
    limit = model.cfg.block_size if model.cfg.arch == "gpt2" else math.inf
    fitting = [c for c in candidates if len(c.ids) - 1 <= limit]
    logp = log_probabilities([Teacher(model)], fitting, batch_tokens, title) if fitting else []
    logp = dict(zip(fitting, logp))
    return [-logp.get(c, math.nan) for c in candidates]


def official_surprisals(run, occurrences, surprisals):
    """All surprisals as the challenge's collation reads them."""
    name, steps = os.path.basename(os.path.abspath(run)), list(surprisals)
    results = [dict(step=step, word_count=int(words_seen(step)), target_word=o.word, context_id=o.context_id,
                    context=o.context, surprisal=nats)
               for step in steps for o, nats in zip(occurrences, surprisals[step], strict=True)]
    return dict(metadata=dict(model_name=name, use_bos_only=False, total_steps=official_count(steps),
                              completed_steps=len(steps)), results=results)


# --- ages and the score ---------------------------------------------------------------------------

def aoa_score(occurrences, surprisals, children, chance, rules):
    """The score, and for each word that children learn in these months: that month, and log10 of the words
    that the model had seen when it learnt it, or None. surprisals: {step: nats, one per occurrence};
    children: {word: (months, shares)}; chance: {word: nats}."""
    from scipy.stats import pearsonr
    seen, table = np.array([words_seen(step) for step in surprisals]), np.array([*surprisals.values()])
    columns, words = {}, {}
    for i, o in enumerate(occurrences):
        columns.setdefault(o.word, []).append(i)
    common = [word for word in columns if word in children]
    for word in tqdm(common, "fits", unit="word", disable=not sys.stderr.isatty()):
        age = children_age(*children[word])
        if age is not None:  # fitting a flat curve takes seconds
            model = model_age(seen, table[:, columns[word]], chance[word], rules)
            words[word] = dict(model=model, children=age)
    both = [(ages["model"], ages["children"]) for ages in words.values() if ages["model"] is not None]
    r, p = map(float, pearsonr(*zip(*both))) if len(both) >= 3 else (0.0, 1.0)
    score = r if p <= (1 if rules == "2025" else 0.1) else 0.0  # 0 too where one of both never varies
    return dict(score=score, r=r, p=p, n_words=len(both), words=words)


def chance_levels(words, tokenizer, rules):
    """The surprisal of each word for who knows nothing. 2025: log2(300,000), although surprisals are in nats.
    2026: ln V a token, V the entries of the exported tokenizer; tokens are counted after "The"."""
    if rules == "2025":
        return dict.fromkeys(words, math.log2(300_000))
    entries = (tokenizer.vocab_size if isinstance(tokenizer, SentencePieceTokenizer)
               else len(tokenizer.ranks) + len(tokenizer.specials))
    before = len(tokenizer.encode("The"))
    return {word: max(1, len(tokenizer.encode("The " + word)) - before) * math.log(entries) for word in words}


def model_age(seen, nats, chance, rules):
    """log10 of the words seen when a word is learnt, or None. seen (S,), nats (S, contexts). 2025 fits all
    points, 2026 the means over contexts, within bounds."""
    if rules == "2025":
        seen, nats = np.repeat(seen, nats.shape[1]), nats.ravel()
    else:
        nats = nats.mean(1)
    if len(nats) < 3 or np.isnan(nats).all():
        return None
    seen, y = seen[~np.isnan(nats)], -nats[~np.isnan(nats)]
    x, low, high, span = np.log10(seen + 1), y.min(), y.max(), np.ptp(y)
    limits = dict(maxfev=1000) if rules == "2025" else dict(maxfev=20000, bounds=(
        [0, 0, x.min() - 1, low - 2 * span - 1], [10 * span + 1, 100, x.max() + 1, high + 1]))
    age = age_at(-(chance - (chance + high) / 2), 0 if rules == "2025" else 1e-6,
                 x, y, p0=[span, 1, x.mean(), low], **limits)  # least surprisal = -high
    return age if age is not None and x[0] <= age <= x[-1] else None


def children_age(months, shares):
    """The month in which half of the children know a word, or None."""
    if len(months) < 3:
        return None
    age = age_at(0.5, 0, months, shares, p0=[1, 0.1, months.mean(), 0], maxfev=1000,
                 bounds=([0, 0, months[0], -0.5], [2, 1, months[-1], 0.5]))
    return age if age is not None and months[0] <= age <= months[-1] else None


def age_at(target, least, x, y, **fit):
    """Where the sigmoid fitted to y over x is `target`; None if it never is, if no curve fits, or if a or b
    is not above `least`."""
    from scipy.optimize import curve_fit
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of a covariance that cannot be estimated
        try:
            (a, b, c, d), _ = curve_fit(sigmoid, x, y, **fit)
        except (RuntimeError, TypeError, ValueError):  # no convergence; fewer points than parameters
            return None
        if min(a, b) <= least or not d < target < a + d:
            return None
        return float(c - np.log(a / (target - d) - 1) / b)


def sigmoid(x, a, b, c, d):
    return a / (1 + np.exp(-b * (x - c))) + d


# --- Baby Llama's table 4 -------------------------------------------------------------------------

def table_4(cfg):
    need(cfg, ckpt=(cfg.ckpt, "a run or checkpoint folder"), words=(cfg.words, "the word_list.csv of 2023"),
         contexts=(cfg.contexts, "the sent_words.json of 2023"), data=(not cfg.data, "'' with --words"),
         surprisals=(not cfg.surprisals, "'' with --words, whose result has the surprisals"))
    words, contexts, device = read_words(cfg.words), read_contexts(cfg.contexts), pick_device(cfg.device)
    (model,), tokenizer, described = load_ensemble([cfg.ckpt], device)
    out = cfg.out or os.path.join(cfg.ckpt, "aoa_months.json")
    check_writable(out)
    make_room([Teacher(model)], CUT)
    found = mean_surprisals(model, tokenizer, contexts, {w.text for w in words}, cfg.batch_tokens, device)
    kept, absent = [w for w in words if w.text in found], [w.text for w in words if w.text not in found]
    if not np.isfinite([*found.values()]).all():
        sys.exit("error: the model gives surprisals that are not finite numbers")
    if absent:
        print(f"notice: {len(absent)} of {len(words)} rows have words that are not in the contexts: "
              f"{', '.join(absent[:10])}")
    official, right = ([found[w.text][i] for w in kept] for i in (1, 2))
    months = months_table(kept, official, right)
    result = dict(ckpt=cfg.ckpt, step=described["step"], weights_sha256=weights_sha256(cfg.ckpt),
                  data_sha256=[sha256(cfg.words), sha256(cfg.contexts)], n_words=len(kept), absent=absent,
                  columns=["all", *CATEGORIES], months=months,
                  words={word: dict(zip(("n", "official", "right"), row)) for word, row in found.items()})
    write_json(out, result)
    print_months(months, len(kept))
    print(f"written to {out}")


def read_words(path):
    def read_row(fields):
        word = Word(fields["word_clean"], fields["lexical_category"],
                    *(number(fields[name]) for name in ("aoa", "concreteness", "frequency")))
        if not word.text or word.category not in CATEGORIES:
            raise ValueError(f"{word.text!r} is no word of {', '.join(CATEGORIES)}")
        if not word.frequency > 0 or math.isnan(word.age + word.concreteness):
            raise ValueError(f"{word.text!r} wants an age, a concreteness and a frequency above 0")
        return word
    return read_table(path, ("word_clean", "lexical_category", "aoa", "concreteness", "frequency"), read_row)


def read_contexts(path):
    """[(sentence, the list's words in it)]"""
    try:
        with open(regular(path), "rb") as f:
            contexts = parse_json(f.read())
        if not all(context["sent"] and isinstance(context["words"], list) for context in contexts):
            raise TypeError
        return [(context["sent"] + "", set(context["words"])) for context in contexts]
    except (OSError, ValueError) as e:
        sys.exit(f"error: cannot read {path}: {e}")
    except (KeyError, TypeError):
        sys.exit(f"error: {path} is no list of objects with a text 'sent' and a list 'words'")


def print_months(months, n):
    def line(name, cells):
        print(f"{name:<36}" + "".join(f"{cell:>17}" for cell in cells))
    line(f"mean error in months, {n} rows", ["all", *(name.replace("_", " ") for name in CATEGORIES)])
    for name, row in months.items():
        line(name, [" ± ".join(f"{x:.3f}" for x in cell) for cell in zip(*row.values())])
    for name, row in AOA_MONTHS.items():
        line(f"Baby Llama's table 4: {name}", [f"{x:.2f}" for x in row])


if __name__ == "__main__":
    launch(main, AoaConfig)
