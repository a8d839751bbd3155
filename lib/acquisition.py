"""When children learn a word, predicted from how surprising a model finds it: Baby Llama's table 4, by the
rules of 2023.

A word's surprisal s is the mean over its places in child-directed speech. Then least squares, in each of
three categories of words for itself, with c a word's concreteness and f its frequency in that speech:

    age in months = a + b c + d ln f + e s

A score is the mean |error| over words, each left out of its own fit. The official code fits all categories
at once, on their dummies times c, ln f and the residual of s on ln f, all standardised. Both span the same
columns, so they predict the same; a test fits the official ones anew without each word.
"""
import math
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lib.tokenizers import prefix_token

CATEGORIES = ("nouns", "predicates", "function_words")
SENTENCES = 32  # that are searched together
CUT = 50        # tokens of a sentence that are read
DRAWS = 200     # of random numbers


class Word(NamedTuple):
    text: str
    category: str
    age: float           # months
    concreteness: float
    frequency: float


# --- surprisal ------------------------------------------------------------------------------------

def mean_surprisals(model, tokenizer, contexts, words, batch_tokens, device):
    """{word: (number of places, official mean, right mean)} in nats, of the words that are found. contexts:
    [(sentence, its words)]; what is a word of one of 32 sentences is looked for in all of them, with a blank
    before it and without: a form without one is found inside of longer words too."""
    forms = {word: {tuple(tokenizer.encode(text)) for text in (word, " " + word)} - {()} for word in words}
    sums, prefix = {word: np.zeros(3) for word in words}, prefix_token(tokenizer)
    for i in tqdm(range(0, len(contexts), SENTENCES), "contexts", disable=not sys.stderr.isatty()):
        sentences, named = zip(*contexts[i:i + SENTENCES])
        ids = [torch.tensor(tokenizer.encode(sentence)[:CUT], dtype=torch.int64) for sentence in sentences]
        x = pad_sequence(ids, batch_first=True, padding_value=-1)  # (B, T); no word has a -1
        rows = max(1, batch_tokens // max(1, x.shape[1]))
        nats = np.concatenate([token_nats(model, part.clamp(min=0).to(device), prefix)
                               for part in x.split(rows)], axis=1)  # (2, B, T)
        for word in set().union(*named) & sums.keys():
            for form in forms[word]:
                b, t = find(x.numpy(), form)
                both = sum(nats[:, b, t + k].sum(1) for k in range(len(form)))
                sums[word] += len(b), *both
    return {word: (int(n), official / n, right / n) for word, (n, official, right) in sums.items() if n}


@torch.no_grad()
def token_nats(model, x, prefix):
    """(2, B, T), of each token of x (B, T): -log p(token | the text up to and with it), which is how the
    official code reads its logits, one position too far; and -log p(token | prefix, the text before it)."""
    before = torch.cat([torch.full_like(x[:, :1], prefix), x[:, :-1]], dim=1)
    nats = [F.cross_entropy(model(inputs).flatten(0, 1), x.flatten(), reduction="none").view_as(x)
            for inputs in (x, before)]
    return torch.stack(nats).cpu().double().numpy()


def find(x, form):
    """Rows and first columns where the tokens `form` stand in x (B, T). Of several tokens, those that end in
    the last column are not found: the official search stops one too early."""
    width = x.shape[1] if len(form) == 1 else max(0, x.shape[1] - len(form))
    return np.logical_and.reduce([x[:, k:k + width] == token for k, token in enumerate(form)]).nonzero()


# --- the regression -------------------------------------------------------------------------------

def months_table(words, official, right):
    """{row: mean |error| in months over all words and over each category's, and where there is one a
    deviation}: over draws of random numbers; a difference's is its standard error over words. official,
    right: surprisals (n,)."""
    rng = np.random.default_rng(2023)
    draws = np.array([means(left_out_errors(words, rng.normal(size=len(words)))) for _ in range(DRAWS)])
    without, surprisals = left_out_errors(words), {"official surprisal": official, "surprisal": right}
    errors = {name: left_out_errors(words, s) for name, s in surprisals.items()}
    rows = {name: dict(mean=means(e)) for name, e in (errors | {"no surprisal": without}).items()}
    rows[f"random numbers, {DRAWS} draws"] = dict(
        mean=draws.mean(0).tolist(), deviation=draws.std(0, ddof=1).tolist())
    for name, e in errors.items():
        less = [with_it - without_it for with_it, without_it in zip(e, without)]
        rows[f"{name} - no surprisal"] = dict(
            mean=means(less), deviation=[float(d.std(ddof=1)) / math.sqrt(len(d)) for d in less])
    return rows


def left_out_errors(words, *surprisal):
    """|error| in months of all words, and of each category's: four arrays. surprisal: (n,), or none."""
    categories, ages = np.array([w.category for w in words], dtype=str), np.array([w.age for w in words])
    x = np.column_stack([np.ones(len(words)), [w.concreteness for w in words],
                         np.log([w.frequency for w in words]), *surprisal])
    parts = [fit_without(ages[categories == name], x[categories == name], name) for name in CATEGORIES]
    return [np.concatenate(parts), *parts]


def fit_without(y, x, name):
    """|error| (n,) of each y by the least squares of all others on x (n, k): |e_i| / (1 - H_ii), with e what
    the fit of all of them leaves and H = X X^+."""
    inverse = np.linalg.pinv(x)
    leverage = (x * inverse.T).sum(1)
    if len(y) == 0 or leverage.max() > 1 - 1e-9:
        sys.exit(f"error: {len(y)} {name.replace('_', ' ')} have a surprisal, and without one of them they "
                 f"determine no {x.shape[1]} coefficients: more words must be in the contexts")
    return np.abs(y - x @ (inverse @ y)) / (1 - leverage)


def means(errors):
    return [float(part.mean()) for part in errors]
