"""Reading times: surprisals against transformers, one probability at a time; regressions in another form."""
import csv
import json
import math
import os

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import real
from lib.checkpoints import load_ensemble
from lib.files import read_json, sha256
from tools import hf, reading
from tools.reading import EYE_TRACKING, KNOWN, NUMBERS, SELF_PACED, TEXTS, ReadingConfig

WORDS = [  # (item, word, prev_item, prev_word)
    ("the dog", "sees", "the", "dog"), ("the", "dog", "", ""),
    ("the dog sees a", "teacher.", "the dog sees", "a"),
    ("A naïve", "“café”", "A", "naïve"), ("", "of", "", ""), ("None of", "the", "None", "of"),
    ("None of the", "nurses,", "None of", "the"), ("he said, \"no\"", "zebra☃", "he said,", "\"no\""),
    ("the dog sees a", "cat", "the dog sees", "a"), ("the little", "None", "the", "little")]


@pytest.fixture(scope="module")
def readers(teachers, byte_gpt2, tmp_path_factory):
    """{name: (run folder, Hugging Face folder)} of a Llama with sentencepiece and a GPT-2 with bytes."""
    folder = str(tmp_path_factory.mktemp("hf") / "llama")
    hf.main(["export", teachers[1], folder])
    return {"llama": (teachers[1], folder), "gpt2": byte_gpt2[::-1]}


def transformers_pair(folder, bos):
    """Model in float64 and tokenizer; bos: whether the tokenizer puts <s> before a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]) if bos else None
    tokenizer._tokenizer.post_processor = template
    return AutoModelForCausalLM.from_pretrained(folder).double().eval(), tokenizer


@torch.no_grad()
def slow_surprisal(model, tokenizer, text, word, blank="", anew=True):
    """-ln of the product of the pieces' probabilities, each from a forward pass of its own. blank, anew: the
    wrong ways, a blank before the word, and its pieces as they are for its beginning's tokens."""
    p, pieces = 1.0, tokenizer(blank + word, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    for n, piece in enumerate(pieces):
        t = tokenizer.decode([piece])
        sought = piece if n == 0 or not anew else tokenizer(t, add_special_tokens=False)["input_ids"][0]
        p *= model(torch.tensor([ids])).logits[0, -1].softmax(-1)[sought].item()
        text += t
        ids = tokenizer(text)["input_ids"] if anew else [*ids, piece]
    return -math.log(p)


def write_rows(path, words, columns=None):
    """A reading_data.csv of these words, with random numbers."""
    rng = np.random.default_rng(4)
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["", *(columns or TEXTS), *NUMBERS])
        for i, texts in enumerate(words):
            writer.writerow([i, *texts, *rng.integers(1, 400, len(NUMBERS))])
    return str(path)


@pytest.mark.parametrize("bos", ["yes", "no"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_surprisals_are_the_official_recipes(readers, tmp_path, name, bos):
    run, folder = readers[name]
    rows = reading.read_rows(write_rows(tmp_path / "r.csv", WORDS))
    models, tokenizer, _ = load_ensemble([run], "cpu")
    pred, prev_pred = reading.surprisals([reading.Teacher(m) for m in models], tokenizer,
                                         1 if bos == "yes" else None, rows, 256)
    theirs = transformers_pair(folder, bos == "yes")
    slow = [slow_surprisal(*theirs, item or "None", word) for item, word, _, _ in WORDS]
    assert pred == pytest.approx(slow, abs=2e-3 if name == "gpt2" else 1e-4)
    for (_, _, item, word), nats in zip(WORDS, prev_pred):
        if item in ("", "None"):  # "None" is put right in `item` only
            assert math.isnan(nats)
        else:
            assert nats == pytest.approx(slow_surprisal(*theirs, item, word), abs=2e-3)
    for wrong in (dict(blank=" "), dict(anew=False)):  # the rules matter for these words
        others = [slow_surprisal(*theirs, item or "None", word, **wrong) for item, word, _, _ in WORDS]
        assert np.abs(np.subtract(others, slow)).max() > 0.05, wrong


def partial_correlation(y, pred, known):
    """100 r^2 of y and pred, both without what a constant, the columns and their products explain of them:
    the gain in R^2 as another formula."""
    n = len(y)
    pairs = [known[:, i] * known[:, j] for i in range(known.shape[1]) for j in range(i)]
    q, _ = np.linalg.qr(np.column_stack([np.ones(n), known, *pairs]))
    y, pred = (v - q @ (q.T @ v) for v in (y, pred))
    return 100 * (y @ pred) ** 2 / (y @ y) / (pred @ pred)


def invented(n=200):
    """Rows with gaps, and surprisals that matter."""
    rng = np.random.default_rng(5)
    rows = [dict(zip(NUMBERS, rng.gamma(2, 50, len(NUMBERS)))) for _ in range(n)]
    pred, prev_pred = rng.gamma(3, 3, n), rng.gamma(3, 3, n)
    for row, nats in zip(rows, pred):
        row.update({measure: row[measure] + 9 * nats + 0.01 * row["length"] * row["context_length"]
                    for measure in (*EYE_TRACKING, SELF_PACED)})
    for i in range(0, n, 9):
        rows[i]["Subtlex_log10"] = math.nan
    prev_pred[::7] = math.nan
    rows[3]["RTgopast"] = math.nan
    return rows, pred, prev_pred


def test_scores_are_squared_partial_correlations():
    rows, pred, prev_pred = invented()
    got = reading.reading_scores(rows, pred.tolist(), prev_pred.tolist())
    table = {name: np.array([row[name] for row in rows]) for name in NUMBERS}
    table["prev_pred"] = prev_pred
    expected, used = {}, {}
    for measure in (*EYE_TRACKING, SELF_PACED):
        known = [*KNOWN, "prev_length", "prev_pred"] if measure == SELF_PACED else KNOWN
        columns = np.column_stack([table[measure], pred, *(table[name] for name in known)])
        columns = columns[np.isfinite(columns).all(1)]
        expected[measure] = partial_correlation(columns[:, 0], columns[:, 1], columns[:, 2:])
        used[measure] = len(columns)
    assert got["gains"] == pytest.approx(expected, rel=1e-9) and got["rows"] == used
    assert len(set(used.values())) == 3  # gaps count where the column is used
    eye = np.mean([expected[measure] for measure in EYE_TRACKING])
    assert got["eye_tracking"] == pytest.approx(eye)
    assert got["self_paced"] == pytest.approx(expected[SELF_PACED])
    assert got["reading"] == pytest.approx((eye + expected[SELF_PACED]) / 2)


def test_real_rows():
    """1,726 rows, of which 30 have no frequency and 206 no word before."""
    rows = reading.read_rows(real("eval2025", "full_eval", "reading", "reading_data.csv"))
    assert len(rows) == 1726 and rows[320]["item"] == "None" and rows[971]["prev_item"] is None
    assert sum(row["prev_item"] is None for row in rows) == 206
    nats = np.random.default_rng(6).exponential(5, (2, len(rows)))
    nats[1, [row["prev_item"] is None for row in rows]] = math.nan
    used = reading.reading_scores(rows, *nats.tolist())["rows"]
    assert used == {**dict.fromkeys(EYE_TRACKING, 1696), SELF_PACED: 1496}


def test_the_command_writes_scores_and_predictions(teachers, tmp_path, capsys):
    path = write_rows(tmp_path / "r.csv", WORDS * 4)
    cfg = ReadingConfig(ckpt=(teachers[1],), data=path, predictions=str(tmp_path / "p.json"), device="cpu")
    reading.main(cfg)
    result = read_json(os.path.join(teachers[1], "reading.json"))
    assert result["data_sha256"] == sha256(path) and result["rules"] == ["2025", "2026"] and result["bos"]
    assert f"{result['eye_tracking']:.2f}" in capsys.readouterr().out
    predictions = json.load(open(tmp_path / "p.json"))["reading"]["predictions"]
    assert [row["id"] for row in predictions] == list(range(40))
    assert math.isnan(predictions[1]["prev_pred"]) and predictions[0] == {**predictions[10], "id": 0}
    again = reading.reading_scores(reading.read_rows(path), *[[row[name] for row in predictions]
                                                              for name in ("pred", "prev_pred")])
    assert again["gains"] == result["gains"]


@pytest.mark.parametrize("change, message", [
    (dict(columns=("item", "word", "prev_item", "prev")), "r.csv, line 1: no column 'prev_word'"),
    (dict(words=[("a", "b", "c", "d"), ("a", "", "c", "d")]), "r.csv, line 3: .*without its word"),
    (dict(words=[("a", "b", "c", "")]), "r.csv, line 2: .*without its word"),
    (dict(words=[]), "has no rows"),
    (dict(replace=(",", "x,")), "line 2: could not convert"),
    (dict(replace=("\n", ",9\n")), "line 2: not as many fields"),
    (dict(replace=("\n", "\n\udcff")), "not UTF-8")])
def test_bad_data_is_one_line(tmp_path, change, message):
    path = write_rows(tmp_path / "r.csv", change.get("words", WORDS), change.get("columns"))
    if "replace" in change:
        head, rest = open(path, encoding="utf-8", newline="").read().split("\r\n", 1)
        text = head + "\n" + rest.replace("\r", "").replace(*change["replace"])
        with open(path, "wb") as f:
            f.write(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
        reading.read_rows(path)


def test_too_few_rows_and_no_checkpoint(teachers, tmp_path):
    path = write_rows(tmp_path / "r.csv", WORDS[:4])
    with pytest.raises(SystemExit, match="^error: RTfirstfix: 4 rows"):
        reading.main(ReadingConfig(ckpt=(teachers[1],), data=path, device="cpu"))
    with pytest.raises(SystemExit, match="^error: say which"):
        reading.main(ReadingConfig(data=path))
