"""Age of acquisition: surprisals against transformers, the fits of both years against scipy alone, and every
rule by which a naive version would differ."""
import json
import math
import os
import pathlib
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, curve_fit
from scipy.stats import pearsonr
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import edit_json
from lib.checkpoints import find_checkpoint, load_checkpoint, read_checkpoint_config, save_checkpoint
from lib.files import read_json
from lib.tokenizers import load_tokenizer
from tools import aoa, hf
from tools.aoa import AoaConfig, Occurrence

STEPS = {"chck_1M": 0.4, "chck_2M": 0.7, "chck_10M": 1.0, "chck_100M": 1.3}  # and how much of the weights
CONTEXTS = {
    "dog": [{"context": "the little"}, {"context": " the cat sees a "}],
    "teacher": [{"context": "my", "word_in_context_stats": {}}, {"context": "who sees the"}],
    "a": [{"context": "one character is no word"}],
    "naïve nurse": [{"context": "the “old”"}],
    "zebra": [{"context": "the dog"}],
    "cat": [{"context": "my"}]}


def write_children(path, rows, months=range(16, 31)):
    with open(path, "w", encoding="utf-8") as f:
        f.write(",".join(["word", *map(str, months), "category"]) + "\n")
        f.writelines(",".join([word, *map(str, shares), "x"]) + "\n" for word, shares in rows)


def growing(middle, slope=0.5, months=range(16, 31)):
    """Shares of children, half of whom know the word at that month."""
    return [round(1 / (1 + math.exp(-slope * (month - middle))), 3) for month in months]


def kept_run(source, out):
    """A run folder with checkpoints by words seen: a model's weights, more and more of them."""
    for step, share in STEPS.items():
        model, tokenizer, config = load_checkpoint(source)
        with torch.no_grad():
            for p in model.parameters():
                p *= share
        del config["format_version"]
        save_checkpoint(str(out), step, model, config, pathlib.Path(tokenizer.file).read_bytes())
    return str(out)


@pytest.fixture
def run(teachers, tmp_path):
    return kept_run(teachers[1], tmp_path / "run")


@pytest.fixture
def cdi(tmp_path):
    """The challenge's folder, with words of our own."""
    os.mkdir(tmp_path / "aoa")
    with open(tmp_path / "aoa/cdi_childes.json", "w", encoding="utf-8") as f:
        json.dump(CONTEXTS, f)
    write_children(tmp_path / "aoa/cdi_human.csv", [("dog", growing(19)), ("teacher", growing(24)),
                                                    ("cat", growing(21)), ("dog", growing(28))])
    return str(tmp_path / "aoa")


# --- surprisals -----------------------------------------------------------------------------------

@torch.no_grad()
def slow_surprisal(model, tokenizer, context, word):
    """By the tokenizer's own offsets, a text a forward pass."""
    before = context.strip() + " "
    encoded = tokenizer(before + word.strip(), return_offsets_mapping=True)
    ids = encoded["input_ids"]
    logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(logp[i - 1, ids[i]].item() for i, (_, end) in enumerate(encoded["offset_mapping"])
                if end > len(before) and i > 0)


@pytest.mark.parametrize("bos", ["yes", "no"])
@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_surprisals_are_the_official_recipes(teachers, byte_gpt2, cdi, tmp_path, which, bos):
    source = teachers[1] if which == "llama" else byte_gpt2[1]
    run = kept_run(source, tmp_path / "run")
    occurrences = aoa.read_occurrences(f"{cdi}/cdi_childes.json")
    assert [o.word for o in occurrences] == ["dog"] * 2 + ["teacher"] * 2 + ["naïve nurse", "zebra", "cat"]
    surprisals, _ = aoa.aoa_surprisals(run, occurrences, bos, 512, torch.device("cpu"))
    assert list(surprisals) == list(STEPS)
    for step in ("chck_1M", "chck_100M"):
        hf.export(os.path.join(run, step), str(tmp_path / step))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / step).double().eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / step)
        template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]) if bos == "yes" else None
        tokenizer._tokenizer.post_processor = template
        expected = [slow_surprisal(model, tokenizer, o.context, o.word) for o in occurrences]
        assert surprisals[step] == pytest.approx(expected, abs=1e-3)


def test_what_is_done_is_not_done_again(run, cdi, monkeypatch):
    occurrences, done = aoa.read_occurrences(f"{cdi}/cdi_childes.json"), []
    score = aoa.log_probabilities

    def counting(teachers, candidates, batch_tokens, title):
        if len(done) == 2 and "stop" in title_of:
            raise KeyboardInterrupt
        done.append(title)
        return score(teachers, candidates, batch_tokens, title)
    monkeypatch.setattr(aoa, "log_probabilities", counting)

    def again(occurrences=occurrences, bos="auto"):
        done.clear()
        surprisals, _ = aoa.aoa_surprisals(run, occurrences, bos, 512, torch.device("cpu"))
        return surprisals, list(done)
    title_of = ["stop"]
    with pytest.raises(KeyboardInterrupt):
        again()
    title_of.clear()
    first, computed = again()
    assert computed == ["chck_10M", "chck_100M"]  # a killed command's are there
    assert again() == (first, [])
    kept_run(os.path.join(run, "chck_1M"), os.path.join(run, "other"))
    os.rename(os.path.join(run, "chck_2M"), os.path.join(run, "chck_3M"))
    os.rename(os.path.join(run, "other", "chck_2M"), os.path.join(run, "chck_2M"))
    second, computed = again()
    assert computed == ["chck_2M", "chck_3M"] and second["chck_2M"] != first["chck_2M"]  # other weights; new
    assert second["chck_3M"] == first["chck_2M"] and list(second)[:3] == ["chck_1M", "chck_2M", "chck_3M"]
    assert len(again(bos="no")[1]) == 5
    changed = [occurrences[0]._replace(context="the big"), *occurrences[1:]]
    assert len(again(changed, bos="no")[1]) == 5
    path = os.path.join(run, "aoa_surprisals.json")
    edit_json(path, chck_1M={**read_json(path)["chck_1M"], "surprisals": ["x"]}, chck_3M=7)
    assert again(changed, bos="no")[1] == ["chck_1M", "chck_3M"]  # damaged


def test_a_gpt2_with_too_few_positions_has_no_surprisal(byte_gpt2):
    model, tokenizer, _ = load_checkpoint(byte_gpt2[1])
    candidates = [aoa.candidate(tokenizer, text, 3, None) for text in ("the dog", "the dog " * 60)]
    short, long = aoa.step_surprisals(model, candidates, 512, "")
    assert short > 0 and math.isnan(long)
    assert all(map(math.isnan, aoa.step_surprisals(model, candidates[1:], 512, "")))


# --- the fits -------------------------------------------------------------------------------------

def sigmoid(x, a, b, c, d):
    return a / (1 + np.exp(-b * (x - c))) + d


def slow_fit(target, x, y, start, least=0.0, **limits):
    """The fitted sigmoid's crossing of `target`, looked for and not solved."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            (a, b, c, d), _ = curve_fit(sigmoid, x, y, start, **limits)
        except Exception:
            return None
        if a <= least or b <= least or target <= d or target >= a + d:
            return None
        return brentq(lambda x: sigmoid(x, a, b, c, d) - target, c - 500 / b, c + 500 / b, xtol=1e-12)


def slow_model_age(seen, nats, k, vocabulary, rules, wrong=""):
    """A word's age by the table of rules; `wrong` names one that is broken."""
    points = [(s, value) for s, row in zip(seen, nats) for value in row]
    if (rules == "2026") != (wrong == "points"):
        points = [(s, sum(row) / len(row)) for s, row in zip(seen, nats)]
    points = [(s, value) for s, value in points if value == value]
    x, y = np.log10([s + 1 for s, _ in points]), np.array([-value for _, value in points])
    chance = math.log(300_000, 2) if rules == "2025" else k * math.log(vocabulary)
    if wrong == "chance":
        chance = math.log(vocabulary)
    r = y.max() - y.min()
    limits, least = dict(maxfev=1000), 0.0
    if (rules == "2026") != (wrong == "bounds"):
        limits, least = dict(maxfev=20000, bounds=(
            [0, 0, x.min() - 1, y.min() - 2 * r - 1],
            [10 * r + 1, 100, x.max() + 1, y.max() + 1])), 1e-6
    threshold = chance - 0.5 * (chance - (-y).min()) if wrong != "half" else 0.5 * chance
    age = slow_fit(-threshold, x, y, [r, 1.0, x.mean(), y.min()], least, **limits)
    outside = age is not None and not points[0][0] <= 10 ** age - 1 <= points[-1][0]
    return None if age is None or outside and wrong != "range" else age


def curves(n, rng):
    """(words seen, surprisals of each step and context, tokens of the word) of n invented words."""
    seen = 1e6 * np.array([*range(1, 10), *range(10, 101, 10)])
    for i in range(n):
        k, middle, noise = i % 3 + 1, rng.uniform(5.5, 8.5), rng.choice([0.05, 0.3, 2.0])
        x = np.log10(seen)[:, None]
        nats = k * (4 + rng.uniform(3, 7) / (1 + np.exp(rng.uniform(1, 8) * (x - middle))))
        yield seen, nats + rng.uniform(0, 2, 6) + rng.normal(0, noise, (len(seen), 6)), k


@pytest.mark.parametrize("rules", ["2025", "2026"])
def test_model_ages_are_scipys(rules):
    words = list(curves(13, np.random.default_rng(7)))
    seen = words[0][0]
    learnt_before = 6 + 12 / (1 + np.exp(3 * (np.log10(seen) - 5.8)))  # the first step
    words.append((seen, np.column_stack([learnt_before, learnt_before + 0.1]), 2))
    words[0][1][3] = math.nan                         # a whole step
    words[1][1][3, 2] = words[4][1][0, 0] = math.nan  # one context of a step
    ages = []
    for seen, nats, k in words:
        chance = math.log2(300_000) if rules == "2025" else k * math.log(16000)
        ages.append(aoa.model_age(seen, nats, chance, rules))
    slow = [slow_model_age(*word, 16000, rules) for word in words]
    assert [age is None for age in ages] == [age is None for age in slow]
    assert None in ages and sum(age is not None for age in ages) > 5
    for age, expected in zip(ages, slow):
        assert age == pytest.approx(expected, abs=1e-6)

    def differs(word, age, wrong):
        other = slow_model_age(*word, 16000, rules, wrong)
        return (age is None) != (other is None) or age is not None and abs(age - other) > 1e-3
    for wrong in ("points", "chance", "bounds", "half", "range"):  # each rule decides some of these words
        assert any(differs(word, age, wrong) for word, age in zip(words, ages)), wrong


def test_too_few_points_make_no_curve():
    seen, nats = np.array([1e6, 2e6, 3e6]), np.array([[9.0, 9.1], [5.0, 5.1], [3.0, 3.1]])
    assert aoa.model_age(seen[:2], nats[:2], 9.7, "2026") is None
    assert aoa.model_age(seen, nats * math.nan, 9.7, "2026") is None
    assert aoa.model_age(seen, nats[:, :1], 18.2, "2025") is None  # 3 points for 4 parameters
    assert aoa.model_age(seen, nats, 9.7, "2026") is not None
    rng = np.random.default_rng(3)  # near chance a fit may say 10^400 words
    nats = math.log2(300_000) + 0.03 * rng.normal(size=(19, 1))
    assert aoa.model_age(1e6 * np.array(aoa.MARKS[:19]), nats, math.log2(300_000), "2025") is None


def test_childrens_ages_are_scipys(tmp_path):
    rng, rows = np.random.default_rng(8), []
    for i in range(30):
        shares = np.clip(growing(rng.uniform(12, 34), rng.uniform(0.1, 1.5)) + rng.normal(0, 0.05, 15), 0, 1)
        rows.append((f"w{i}", [round(s, 3) for s in shares]))
    rows[0][1][4] = rows[1][1][0] = ""
    rows[2][1][2] = "NA"
    rows.append(("few", ["", *[""] * 12, 0.4, 0.6]))
    rows.append(("w5", growing(20)))  # again: the first counts
    write_children(tmp_path / "c.csv", rows)
    children = aoa.read_children(str(tmp_path / "c.csv"))
    assert len(children) == 31
    ages = {word: aoa.children_age(*known) for word, known in children.items()}
    for word, shares in reversed(rows):
        known = [(month, share) for month, share in zip(range(16, 31), shares) if isinstance(share, float)]
        if len(known) < 3:
            assert ages[word] is None
            continue
        x, y = np.array(known).T
        age = slow_fit(0.5, x, y, [1, 0.1, x.mean(), 0], maxfev=1000,
                       bounds=([0, 0, x[0], -0.5], [2, 1, x[-1], 0.5]))
        expected = age if age is not None and x[0] <= age <= x[-1] else None
        if word != "w5" or shares == rows[5][1]:
            assert ages[word] == pytest.approx(expected, abs=1e-6), word
    assert None in ages.values() and sum(age is not None for age in ages.values()) > 10


# --- the score ------------------------------------------------------------------------------------

def invented_score(n, order, rules):
    """n words that the model learns one after another, and children in that order: the result and ages."""
    seen = [*range(1, 10), *range(10, 101, 10)]
    occurrences = [Occurrence(f"w{i}", 0, "") for i in range(n)]
    middles = np.linspace(6.4, 7.6, n)
    surprisals = {f"chck_{mark}M": list(6 + 30 / (1 + np.exp(5 * (math.log10(mark * 1e6) - middles))))
                  for mark in seen}
    months = np.arange(16.0, 31)
    children = {f"w{i}": (months, np.array(growing(18 + order[i]))) for i in range(n)}
    return aoa.aoa_score(occurrences, surprisals, children, {o.word: 36.0 for o in occurrences}, rules)


@pytest.mark.parametrize("rules", ["2025", "2026"])
def test_the_score_is_a_correlation(rules):
    order = [0, 2, 1, 5, 3, 4, 6, 8]
    got = invented_score(8, order, rules)
    ages = got["words"].values()
    r, p = pearsonr([age["model"] for age in ages], [age["children"] for age in ages])
    assert got["score"] == pytest.approx(r) and p < 0.1 and got["n_words"] == 8
    assert all(6 < age["model"] < 8 and 16 < age["children"] < 30 for age in ages)  # log10 words; months
    assert invented_score(8, order[::-1], rules)["score"] < -0.5
    assert invented_score(2, order, rules)["score"] == 0.0  # fewer than 3 words


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_doubtful_correlations_count_nothing_in_2026():
    order = [3, 0, 5, 1, 4, 2]
    old, new = (invented_score(6, order, rules) for rules in ("2025", "2026"))
    assert 0.1 < new["p"] and new["score"] == 0.0 and new["r"] == pytest.approx(old["r"], abs=0.05)
    assert old["score"] == old["r"] != 0
    same = invented_score(4, [3, 3, 3, 3], "2025")
    assert same["score"] == 0.0 and same["n_words"] == 4


def test_chance_is_the_exported_tokenizers(teachers, byte_gpt2, tmp_path):
    words = ["dog", "teacher", "zebra", "ice cream", "☃"]
    hf.export(teachers[1], str(tmp_path / "llama"))
    for run, folder in ((teachers[1], str(tmp_path / "llama")), byte_gpt2[::-1]):
        checkpoint = find_checkpoint(run)
        ours = load_tokenizer(os.path.join(checkpoint, read_checkpoint_config(checkpoint)["tokenizer"]))
        theirs = AutoTokenizer.from_pretrained(folder)
        tokens = {word: len(theirs("The " + word)["input_ids"]) - len(theirs("The")["input_ids"])
                  for word in words}
        assert len(set(tokens.values())) > 1
        expected = {word: k * math.log(theirs.vocab_size) for word, k in tokens.items()}
        assert aoa.chance_levels(words, ours, "2026") == pytest.approx(expected)
        assert aoa.chance_levels(words, ours, "2025") == dict.fromkeys(words, pytest.approx(18.19, abs=0.01))


# --- the command ----------------------------------------------------------------------------------

def test_the_command(run, cdi, tmp_path, capsys, monkeypatch):
    cfg = dict(ckpt=run, data=cdi, device="cpu")
    aoa.main(AoaConfig(**cfg, surprisals=str(tmp_path / "surprisal.json")))
    assert "4 of the challenge's 19 checkpoints" in capsys.readouterr().out
    monkeypatch.setattr(aoa, "log_probabilities", None)  # the other year needs no model
    aoa.main(AoaConfig(**cfg, rules="2025"))
    for rules in ("2025", "2026"):
        result = read_json(os.path.join(run, f"aoa_{rules}.json"))
        assert result["rules"] == rules and result["steps"] == list(STEPS)
        children = {word: ages["children"] for word, ages in result["words"].items()}
        assert children == dict(dog=pytest.approx(19, abs=0.1), teacher=pytest.approx(24, abs=0.1),
                                cat=pytest.approx(21, abs=0.1))
    official = json.load(open(tmp_path / "surprisal.json"))
    assert official["metadata"] == dict(model_name="run", use_bos_only=False, total_steps=19,
                                        completed_steps=4)
    kept = read_json(os.path.join(run, "aoa_surprisals.json"))
    assert len(official["results"]) == 4 * 7
    assert official["results"][8] == dict(
        step="chck_2M", word_count=2_000_000, target_word="dog", context_id=1, context=" the cat sees a ",
        surprisal=kept["chck_2M"]["surprisals"][1])


def test_runs_beyond_100_million_words_have_28_checkpoints(run):
    os.rename(os.path.join(run, "chck_2M"), os.path.join(run, "chck_200M"))
    os.rename(os.path.join(run, "chck_10M"), os.path.join(run, "chck_11M"))  # no mark of the challenge's
    steps = aoa.kept_steps(run)
    assert steps == ["chck_1M", "chck_100M", "chck_200M"] and aoa.official_count(steps) == 28
    assert len(aoa.MARKS) == 28 and aoa.official_count(["chck_100M"]) == 19


@pytest.mark.parametrize("name, text, message", [
    ("cdi_childes.json", '{"dog": ["the"]}', "cdi_childes.json: 'dog' has no list"),
    ("cdi_childes.json", '{"dog": [{"context": 3}]}', "cdi_childes.json: 'dog' has no list"),
    ("cdi_childes.json", '{"dog": 3}', "cdi_childes.json: 'dog' has no list"),
    ("cdi_childes.json", '{"a": [{"context": "the"}]}', "no words with contexts"),
    ("cdi_childes.json", "[]", "not a JSON object"),
    ("cdi_human.csv", "item,16\ndog,1\n", "cdi_human.csv, line 1: no column 'word'"),
    ("cdi_human.csv", "word,16,17\ndog,0.5,half\n", "cdi_human.csv, line 2: could not convert"),
    ("cdi_human.csv", "word,15\ndog,0.5\n", "cdi_human.csv, line 2: no columns of months")])
def test_bad_data_is_one_line(run, cdi, name, text, message):
    with open(os.path.join(cdi, name), "w") as f:
        f.write(text)
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
        aoa.main(AoaConfig(ckpt=run, data=cdi, device="cpu"))


def test_what_is_missing_is_named(run, cdi, monkeypatch):
    with pytest.raises(SystemExit, match="^error: .* wants 3: train with --keep_words"):
        aoa.main(AoaConfig(ckpt=cdi, data=cdi))
    with pytest.raises(SystemExit, match="^error: say which run"):
        aoa.main(AoaConfig(ckpt=run))
    monkeypatch.setattr(aoa.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install scipy"):
        aoa.main(AoaConfig(ckpt=run, data=cdi))
