"""Age of acquisition by the rules of 2023 (Baby Llama's table 4): the pooled search against a naive one, with
known logits and with transformers'; the regression against the official one, fitted without each word."""
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from helpers import real
from lib import acquisition
from lib.acquisition import CATEGORIES, Word, left_out_errors, mean_surprisals, months_table, token_nats
from lib.checkpoints import RUN_FILES, load_checkpoint
from lib.files import read_json
from lib.published import AOA_MONTHS
from tools import aoa, hf
from tools.aoa import AoaConfig

CPU, PREFIX = torch.device("cpu"), 1
WORDS = ["a", "in", "cat", "dog", "ice cream", "want to", "i", "see", "unseen"]


class Letters:
    """A tokenizer of letters, two of which are one token where they are "in"."""
    bos = eos = pad = PREFIX

    def encode(self, text):
        return [30 if part == "\0" else 2 + " abcdefghijklmnopqrstuvwxyz".index(part)
                for part in text.replace("in", "\0")]


class Bigrams:
    """A model whose logits are a table's."""

    def __init__(self, tokens=31):
        self.table = torch.randn(tokens, tokens, generator=torch.Generator().manual_seed(5))

    def __call__(self, x):
        return self.table[x]


def letters_contexts(n=100):
    """Sentences with their words; some are longer than the cut, some of one token, some name no word."""
    rng = random.Random(4)
    contexts = [("in", ["in"]), ("a cat", ["cat", "a"]), ("dog", [])]
    while len(contexts) < n:
        sentence = " ".join(rng.choices([*WORDS[:-1], "kitchen", "scat", "ice"], k=rng.choice([1, 2, 3, 20])))
        named = [word for word in WORDS if f" {word} " in f" {sentence} " and rng.random() < 0.3]
        contexts.append((sentence, named))
    return contexts


def naive_surprisals(logp, encode, contexts, wrong=""):
    """{word: [official, right] of each place}; `wrong` names a rule that is broken. logp(ids): (2, T), for
    each token after itself and after what is before it."""
    found = {}
    for start in range(0, len(contexts), 32):
        batch = contexts[start:start + (32 if wrong != "batch" else 1)]
        texts = [encode(sentence) for sentence, _ in batch]
        texts = texts if wrong == "cut" else [text[:50] for text in texts]
        longest = max(len(text) for text in texts)
        for word in {word for _, named in batch for word in named}:
            variants = [encode(word), encode(" " + word)][:1 if wrong == "blank" else 2]
            for form in ([variants[0]] if variants[0] == variants[-1] else variants):
                for text in texts:
                    table = logp(text)
                    for i in range(len(text) - len(form) + 1):
                        missed = len(form) > 1 and i + len(form) == longest and wrong != "end"
                        if text[i:i + len(form)] == form and not missed:
                            nats = -table[:, i:i + len(form)].sum(1)
                            found.setdefault(word, []).append(nats)
    return {word: np.array(places) for word, places in found.items()}


def bigram_logp(table):
    """In float64, by a softmax of our own."""
    z = table.double().numpy()
    p = np.log(np.exp(z) / np.exp(z).sum(1, keepdims=True))
    return lambda ids: np.array([[p[i, i] for i in ids], [p[i, j] for i, j in zip([PREFIX, *ids], ids)]])


def test_the_search_is_the_naive_one():
    model, contexts = Bigrams(), letters_contexts()
    got = mean_surprisals(model, Letters(), [(s, set(named)) for s, named in contexts], WORDS, 256, CPU)
    assert "unseen" not in got and len(got) == len(WORDS) - 1

    def expected(wrong=""):
        return naive_surprisals(bigram_logp(model.table), Letters().encode, contexts, wrong)
    for word, places in expected().items():
        assert got[word] == (len(places), *(pytest.approx(mean, abs=1e-5) for mean in places.mean(0))), word
    for wrong in ("batch", "cut", "blank", "end"):  # each rule decides how many places there are
        assert {w: len(p) for w, p in expected(wrong).items()} != {w: n for w, (n, *_) in got.items()}, wrong


def test_official_surprisals_are_of_the_next_position():
    """Nothing surprises a model that is sure of what comes next, but where the official code looks."""
    model = Bigrams()
    model.table = torch.full((31, 31), -20.0)
    model.table[torch.arange(31), (torch.arange(31) + 1) % 31] = 20.0  # after k comes k + 1
    official, right = token_nats(model, torch.tensor([[2, 3, 4, 5]]), PREFIX)
    assert right == pytest.approx(0, abs=1e-6) and official == pytest.approx(40)


def test_a_models_surprisals_are_transformers(teachers, tmp_path):
    model, tokenizer, _ = load_checkpoint(teachers[1])
    hf.export(teachers[1], str(tmp_path / "hf"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").double().eval()
    contexts = [("the dog sees a cat", ["dog", "cat"]), ("a big dog that a nurse follows sings", ["dog"]),
                ("dog", ["dog", "the dog"]), ("many teachers sing", ["a"])]

    @torch.no_grad()
    def logp(ids):
        after, before = (theirs(torch.tensor([x])).logits[0].log_softmax(-1) for x in (ids, [1, *ids[:-1]]))
        return np.array([[table[i, token] for i, token in enumerate(ids)] for table in (after, before)])
    words = ["dog", "cat", "the dog", "a"]
    got = mean_surprisals(model, tokenizer, [(s, set(named)) for s, named in contexts], words, 16, CPU)
    for word, places in naive_surprisals(logp, tokenizer.encode, contexts).items():
        assert got[word] == (len(places), *(pytest.approx(mean, abs=1e-3) for mean in places.mean(0))), word
    assert set(got) == set(words)


# --- the regression -------------------------------------------------------------------------------

def invented_words(n=90):
    rng = np.random.default_rng(6)
    return [Word(f"w{i}", CATEGORIES[i % 7 % 3], rng.normal(25, 4), rng.uniform(1, 5), rng.integers(8, 9000))
            for i in range(n)]


def official_row(words, surprisal=None, held_out=True):
    """The regression as it was written: 12 columns, standardised, and a fit for each word without it."""
    category, ages = np.array([w.category for w in words]), np.array([w.age for w in words])
    unigram = -np.log([w.frequency / sum(w.frequency for w in words) for w in words])
    numbers = [np.array([w.concreteness for w in words]), unigram]
    if surprisal is not None:
        slope, intercept = np.polyfit(unigram, surprisal, 1)
        numbers.append(surprisal - slope * unigram - intercept)
    numbers = [(v - v.mean()) / v.std() for v in numbers]
    dummies = [(category == name).astype(float) for name in ("function_words", "predicates")]
    X = np.column_stack([np.ones(len(words)), *dummies, *numbers, *(d * v for d in dummies for v in numbers)])
    assert X.shape[1] == (9 if surprisal is None else 12)
    errors = []
    for i in range(len(words)):
        rest = np.arange(len(words)) != i if held_out else slice(None)
        errors.append(abs(ages[i] - X[i] @ np.linalg.lstsq(X[rest], ages[rest], rcond=None)[0]))
    errors = np.array(errors)
    return [errors.mean(), *(errors[category == name].mean() for name in CATEGORIES)]


def test_the_row_is_the_official_regressions():
    words = invented_words()
    surprisal = np.random.default_rng(7).normal(6, 2, len(words))

    def row(*surprisal):
        return [part.mean() for part in left_out_errors(words, *surprisal)]
    assert row(surprisal) == pytest.approx(official_row(words, surprisal), abs=1e-9)
    assert row() == pytest.approx(official_row(words), abs=1e-9)
    in_sample = official_row(words, surprisal, held_out=False)
    assert all(a > b + 0.01 for a, b in zip(row(surprisal), in_sample))
    # what says the age itself is found in it; a constant says nothing
    assert row([w.age for w in words]) == pytest.approx([0] * 4, abs=1e-9)
    assert row(np.full(len(words), 7.0)) == pytest.approx(row(), abs=1e-9)


def test_the_list_without_a_model():
    """Baby Llama's row is within a deviation of random numbers'."""
    words = aoa.read_words(real("eval", "aoa", "word_list.csv"))
    assert len(words) == 591
    rows = months_table(words, *np.zeros((2, len(words))))
    assert [f"{x:.2f}" for x in rows["no surprisal"]["mean"]] == ["2.05", "1.99", "1.83", "2.62"]
    mean, deviation = rows["random numbers, 200 draws"].values()
    assert (np.abs(np.subtract(mean, AOA_MONTHS["Baby Llama"])) < deviation).all()


# --- the command ----------------------------------------------------------------------------------

HEADER = "language,uni_lemma,lexical_category,word_clean,aoa,concreteness,frequency\n"


@pytest.fixture
def files(tmp_path):
    """A word list and contexts of the tests' grammar; its 16th word is in no context."""
    words = "the a dog cat boy girl nurse teacher sees sings runs that big little my many old soft".split()
    rng = random.Random(8)
    rows = [f"E,{w},{CATEGORIES[i % 3]},{w},{rng.uniform(15, 30)},{rng.uniform(1, 5)},{rng.randint(9, 999)}\n"
            for i, w in enumerate(words * 2)]
    (tmp_path / "words.csv").write_text(HEADER + "".join(rows))
    words.remove("many")
    sentences = [rng.choices(words, k=6) for _ in range(40)]
    (tmp_path / "contexts.json").write_text(json.dumps(
        [dict(sent=" ".join(sentence), words=sorted({*sentence, "off the list"})) for sentence in sentences]))
    return dict(words=str(tmp_path / "words.csv"), contexts=str(tmp_path / "contexts.json"))


def test_the_command(teachers, files, tmp_path, capsys):
    run = shutil.copytree(teachers[0], str(tmp_path / "run"))
    aoa.main(AoaConfig(ckpt=run, **files, device="cpu"))
    result, printed = read_json(f"{run}/aoa_months.json"), capsys.readouterr().out.splitlines()
    assert RUN_FILES.fullmatch("aoa_months.json")  # --overwrite deletes it with the run
    assert result["n_words"] == 34 and result["absent"] == ["many"] * 2 and "many" not in result["words"]
    words = [w for w in aoa.read_words(files["words"]) if w.text != "many"]
    months = result["months"]
    rows = {name: official_row(words, np.array([result["words"][w.text][key] for w in words]))
            for name, key in (("official surprisal", "official"), ("surprisal", "right"))}
    rows["no surprisal"] = official_row(words)
    for name, row in rows.items():
        assert months[name] == dict(mean=pytest.approx(row, abs=1e-9))
    assert result["columns"] == ["all", *CATEGORIES] and rows["surprisal"] != rows["official surprisal"]
    for name in ("official surprisal", "surprisal"):
        difference = np.subtract(rows[name], rows["no surprisal"])
        assert months[f"{name} - no surprisal"]["mean"] == pytest.approx(difference, abs=1e-9)
    right = [result["words"][w.text]["right"] for w in words]
    paired = [a - b for a, b in zip(left_out_errors(words, right), left_out_errors(words))]
    assert months["surprisal - no surprisal"]["deviation"] == pytest.approx([stats.sem(d) for d in paired])
    assert "2 of 36 rows" in printed[0] and "34 rows" in printed[1]
    for line, row in zip(printed[2:5], rows.values()):
        assert [float(x) for x in line.split()[-4:]] == pytest.approx(row, abs=6e-4)
    assert [line.count(" ± ") for line in printed[5:8]] == [4] * 3
    assert printed[8].split()[-4:] == ["2.06", "1.99", "1.84", "2.63"]


@pytest.mark.parametrize("name, text, message", [
    ("words", "word_clean,aoa\ndog,3\n", "line 1: no column 'lexical_category'"),
    ("words", HEADER + "E,dog,verbs,dog,20,3,9\n", "line 2: 'dog' is no word of nouns, predicates, function"),
    ("words", HEADER + "E,dog,nouns,,20,3,9\n", "line 2: '' is no word of"),
    ("words", HEADER + "E,dog,nouns,dog,20,3,0\n", "line 2: 'dog' wants .* a frequency above 0"),
    ("words", HEADER + "E,dog,nouns,dog,NA,3,9\n", "line 2: 'dog' wants an age"),
    ("words", HEADER + "E,dog,nouns,dog,old,3,9\n", "line 2: could not convert"),
    ("words", HEADER + "E,dog,nouns,dog,20,3,9\n", "1 nouns have a surprisal, .* more words must be"),
    ("contexts", "[", "cannot read"),
    ("contexts", "[]", "0 nouns have a surprisal"),
    ("contexts", "3", "is no list of objects"),
    ("contexts", '{"sent": "a"}', "is no list of objects"),
    ("contexts", '[{"sent": "a dog"}]', "is no list of objects"),
    ("contexts", '[{"sent": 3, "words": ["a"]}]', "is no list of objects"),
    ("contexts", '[{"sent": "a", "words": "a"}]', "is no list of objects"),
    ("contexts", '[{"sent": "", "words": ["a"]}]', "is no list of objects")])
def test_bad_files_are_one_line(teachers, files, tmp_path, name, text, message):
    with open(files[name], "w") as f:
        f.write(text)
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
        aoa.main(AoaConfig(ckpt=teachers[1], **files, out=str(tmp_path / "o.json"), device="cpu"))


def test_settings_of_the_other_way_are_refused(files):
    for change, message in ((dict(contexts=""), "contexts= must be"), (dict(ckpt=""), "ckpt= must be a run"),
                            (dict(data="aoa"), "data=aoa must be ''"),
                            (dict(surprisals="s.json"), "surprisals=s.json must be ''")):
        with pytest.raises(SystemExit, match=message):
            aoa.main(AoaConfig(**{"ckpt": "out/x", **files, **change}))


def test_scores_that_are_no_numbers_are_refused(teachers, files, tmp_path, monkeypatch):
    monkeypatch.setattr(acquisition, "token_nats", lambda model, x, prefix: np.full((2, *x.shape), math.nan))
    with pytest.raises(SystemExit, match="not finite"):
        aoa.main(AoaConfig(ckpt=teachers[1], **files, out=str(tmp_path / "o.json"), device="cpu"))
