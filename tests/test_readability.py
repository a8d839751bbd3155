"""Readability: counts are those of a reader who goes word by word, whatever blocks, workers and <s>; the
measures are their formulas; what is printed is a config."""
import math
import os
import random
import re
import runpy
from collections import Counter

import numpy as np
import pytest

import prepare
import train
from helpers import (
    TINY,
    assert_same_run,
    edit_json,
    flags_of,
    killed_at,
    real,
    records,
    run_train,
    thorough,
)
from lib.configurator import configure
from lib.readability import MEASURES, count_text, curriculum, measures
from lib.shards import data_sha256, read_meta
from prepare import PrepareConfig, main
from train import TrainConfig

SYLLABLES = {  # by ear
    "the": 1, "a": 1, "home": 1, "whole": 1, "table": 2, "little": 2, "people": 2, "cat": 1, "banana": 3,
    "university": 5, "queue": 1, "agree": 2, "there's": 1, "home-made": 2, "BEAUTIFUL": 3, "bee": 1,
    '"Make,': 1, "mother": 2, "elephant": 3, "wheelie": 2, "smile).": 1, "hmm": 1}


@pytest.mark.parametrize("word", SYLLABLES)
def test_syllables_of_a_word(word):
    counts = count_text(f"{word}\n")
    assert (counts["W"], counts["Y"]) == (1, SYLLABLES[word])
    assert counts["P"] == (SYLLABLES[word] > 2) and counts["K"] == len(word)


def syllables(word):
    """Letter by letter: a vowel after none begins one, unless it is an e that ends a run of letters and comes
    after a consonant that is not the l of 'table'."""
    word, n = f"--{word.lower()}-", 0
    letter = lambda c: c.isascii() and c.isalnum()
    vowel = lambda c: c in "aeiouy"
    for i, c in enumerate(word):
        if vowel(c) and not vowel(word[i - 1]):
            consonant = letter(word[i - 1])
            of_table = word[i - 1] == "l" and letter(word[i - 2]) and not vowel(word[i - 2])
            mute = c == "e" and consonant and not letter(word[i + 1]) and not of_table
            n += not mute
    return max(n, 1)


def read_aloud(text):
    """The counts, word by word."""
    sentences, words = [[]], []
    for line in text.split("\n"):
        line = "" if line.startswith("= = =") else re.sub(r"^\*?[A-Z][A-Z0-9]*:[ \t]", "", line)
        words += [w for w in re.split("[ \t\r\f\v]+", line) if w]
        for i, part in enumerate(re.split("[.!?]", line)):
            if i:
                sentences.append([])
            sentences[-1] += [w for w in re.split("[ \t\r\f\v]+", part) if w]
        if not line.endswith(","):
            sentences.append([])
    return dict(W=len(words), S=sum(len(s) > 2 for s in sentences), Y=sum(map(syllables, words)),
                K=sum(map(len, words)), P=sum(syllables(w) > 2 for w in words))


def test_counts_are_those_of_reading_word_by_word():
    rng = random.Random(1)
    pieces = [*SYLLABLES, *"the mole ate apples , e le ée able idea 漢字 don’t l l, re-use -- 1984".split(),
              "\u00a0x", "Well.", "no!", "oh,\n", "so,\n", "one.\n", "why?!\n", "...\n", "\n", "\n\n",
              "*MOT:\t", "\n*MOT: ", "\nA:\t", "\nSTR1: ", "\n= = = A Title. Of it = = =\n", "\r\n", "\t",
              "Note: "]
    for n in (0, 1, 2, 5, 50, 500, 3000):
        text = "".join(rng.choice(pieces) + rng.choice(["", " ", " ", " "]) for _ in range(n))
        text = re.sub(r"(?<=[.!?])(?=\S)", " ", text)  # points within words: the next test
        assert count_text(text) == read_aloud(text), text[:300]


@pytest.mark.parametrize("text,n", [
    ("one two three. one two. ONE TWO THREE!", 2),      # those of two words are not counted
    ("one two three\none two three\n", 2),              # a line end is a sentence end
    ("one,\ntwo,\nthree\n", 1),                         # but for one after a comma
    ("it costs 3.5 pounds... really now, yes?\n", 2),
    ("= = = One Two Three = = =\n*MOT: one two\n*CHI:\tone two three\n", 1)])
def test_sentences(text, n):
    assert count_text(text)["S"] == n


def test_measures_are_their_formulas():
    """Of six sentences and a hundred words, by hand; Flesch's 'The cat sat on the mat' has 116."""
    cat = count_text("The cat sat on the mat.")
    assert cat == dict(W=6, S=1, Y=6, K=18, P=0)
    np.testing.assert_allclose(measures(**cat), [116.145, -1.45, 2.4, -4.3, 3.1291], atol=1e-9)
    per_sentence, per_word = 100 / 6, 1.43  # words, syllables
    np.testing.assert_allclose(
        measures(W=100, S=6, Y=143, K=470, P=12),
        [206.835 - per_sentence * 1.015 - per_word * 84.6, per_sentence * 0.39 + per_word * 11.8 - 15.59,
         (per_sentence + 12) * 0.4, 4.7 * 4.71 + per_sentence / 2 - 21.43, 3.1291 + 1.043 * np.sqrt(12 * 5)])
    assert np.isfinite(measures(W=0, S=0, Y=0, K=0, P=0)).all()


def buckets_of(text):
    return [line.split() for line in eval(re.search(r"curriculum = (.*)", text)[1])]


def test_buckets_are_cut_at_the_widest_gaps():
    """Sources that differ in the length of sentences alone: 4, 5; 9, 9.5; 30 words."""
    counts = {name: dict(W=1000, S=round(1000 / words), Y=1300, K=4500, P=80)
              for name, words in dict(d=9.5, a=4, e=30, c=9, b=5).items()}
    assert buckets_of(curriculum(counts, 3)) == [["a", "b"], ["c", "d"], ["e"]]
    assert buckets_of(curriculum(counts, 1)) == [["a", "b", "c", "d", "e"]]
    assert buckets_of(curriculum(counts, 5)) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    same = {name: counts["a"] for name in "xyz"}
    text = curriculum(same, 3)
    assert buckets_of(text) == [["x"], ["y"], ["z"]] and "nan" not in text


def test_each_measure_counts_and_ease_the_other_way():
    """One source is harder than the other by all five: difficulties 1 and -1. The table has the values."""
    counts = dict(hard=dict(W=1000, S=40, Y=1700, K=5500, P=180),
                  easy=dict(W=1000, S=200, Y=1200, K=3800, P=20))
    rows = curriculum(counts, 2).splitlines()
    assert all(name in rows[0] for name in MEASURES)
    for row, (name, difficulty) in zip(rows[1:], (("easy", -1), ("hard", 1))):
        _, source, words, *values = row.split()
        assert (source, words) == (name, "1,000")
        np.testing.assert_allclose([float(v) for v in values[:-1]], measures(**counts[name]), atol=0.051)
        assert float(values[-1]) == difficulty


# --- prepare.py -----------------------------------------------------------------------------------

EASY, MIDDLE, HARD = (
    "look at the dog. the dog can run. see it run to me.\n",
    "on monday the farmer took her little dog to the market in the village and sold her apples there .\n",
    "the university's administration investigated extraordinary irregularities in international agricultural "
    "communication, particularly concerning considerable governmental expenditures in several countries.\n")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of text whose sources have the names of one order and the difficulty of another."""
    folder = tmp_path_factory.mktemp("text")
    for source, sentence, n in (("cbt", HARD, 60), ("simple_wiki", EASY, 200), ("childes", MIDDLE, 110)):
        for split in ("train_10M/{}.train", "dev/{}.dev"):
            path = folder / split.format(source)
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(sentence + "\n" * (i % 3 == 2) for i in range(n)))
    (folder / "dev/qed.dev").write_text(MIDDLE * 20)
    return folder


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("prepared") / "data")
    main(PrepareConfig(input_dir=str(text), data_dir=folder, vocab_size=330))
    return folder


def counts_in(folder):
    return read_meta(str(folder))["readability"]


def test_counts_are_of_the_cleaned_training_text(text, prepared):
    cleaned = {source: prepare.CLEANERS[source]((text / f"train_10M/{source}.train").read_text())
               for source in ("cbt", "simple_wiki", "childes")}
    assert counts_in(prepared) == {source: read_aloud(part) for source, part in cleaned.items()}


@pytest.mark.parametrize("bos", ["none", "line", "document"])
def test_blocks_workers_and_bos_do_not_show(text, prepared, tmp_path, monkeypatch, bos):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 6_000)
    tokenizer = f"{prepared}/tokenizer.model"
    for workers in (1, 2) if bos == "line" else (1,):
        main(PrepareConfig(input_dir=str(text), data_dir=str(tmp_path / str(workers)), tokenizer=tokenizer,
                           bos=bos, workers=workers))
        assert counts_in(tmp_path / str(workers)) == counts_in(prepared)


def test_what_is_printed_is_a_config_that_trains(prepared, tmp_path, capsys):
    main(PrepareConfig(readability=prepared, buckets=3))
    path = tmp_path / "mine.py"
    path.write_text(capsys.readouterr().out)
    assert runpy.run_path(path)["curriculum"] == ["simple_wiki", "childes", "cbt"]
    assert runpy.run_path(path)["epochs"] == 9
    tiny = {**TINY, "batch_size": 32, "max_iters": 0, "eval_interval": 1000}
    del tiny["epochs"]
    flags = flags_of({**tiny, "data_dir": prepared, "out_dir": tmp_path / "run"})
    train.main(configure(TrainConfig, [str(path), *flags]))
    steps = Counter(math.ceil(record["epoch"]) for record in records(tmp_path / "run") if record["step"])
    a, b, c = steps[1], steps[4], steps[7]
    assert list(steps.items()) == [(epoch + 1, (a, b, c)[epoch // 3]) for epoch in range(9)] and a < b < c


def test_what_was_prepared_before_is_still_the_same_data(text, prepared, tmp_path, monkeypatch):
    """A folder without counts says to prepare it again; a run begun on it goes on after that."""
    old = tmp_path / "old"
    main(PrepareConfig(input_dir=str(text), data_dir=str(old), vocab_size=330))
    edit_json(old / "meta.json", readability=None)
    run_train(str(old), tmp_path / "whole")
    with killed_at(monkeypatch, 3):
        run_train(str(old), tmp_path / "cut")
    with pytest.raises(SystemExit, match="^error: .*no counts of sentences .*prepare it again$"):
        main(PrepareConfig(readability=str(old)))
    main(PrepareConfig(input_dir=str(text), data_dir=str(old), vocab_size=330, overwrite=True))
    assert data_sha256(read_meta(str(old))) == data_sha256(read_meta(prepared))
    main(PrepareConfig(readability=str(old), buckets=2))
    run_train(str(old), tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("n", [0, 4])
def test_there_are_no_more_buckets_than_sources(prepared, n):
    with pytest.raises(SystemExit, match=f"^error: buckets={n} must be 1 to 3, the number of .* sources$"):
        main(PrepareConfig(readability=prepared, buckets=n))


def test_a_source_with_a_blank_is_in_no_bucket(prepared, tmp_path):
    os.symlink(f"{prepared}/tokenizer.model", tmp_path / "tokenizer.model")
    with open(f"{prepared}/meta.json") as f:
        (tmp_path / "meta.json").write_text(f.read())
    edit_json(tmp_path / "meta.json", readability={"my text": dict(W=9, S=1, Y=9, K=9, P=0)})
    with pytest.raises(SystemExit, match="^error: a curriculum cannot name 'my text'"):
        main(PrepareConfig(readability=str(tmp_path), buckets=1))


@pytest.mark.parametrize("wrong", [[], {"cbt": 3}, {"cbt": dict(W=1, S=1, Y=1, K=1)},
                                   {"cbt": dict(W=1, S=-1, Y=1, K=1, P=1)}])
def test_an_edited_description_is_refused(text, prepared, tmp_path, wrong):
    os.symlink(f"{prepared}/tokenizer.model", tmp_path / "tokenizer.model")
    with open(f"{prepared}/meta.json") as f:
        (tmp_path / "meta.json").write_text(f.read())
    edit_json(tmp_path / "meta.json", readability=wrong)
    with pytest.raises(SystemExit, match="meta.json is damaged: 'readability'"):
        main(PrepareConfig(readability=str(tmp_path)))


@pytest.mark.parametrize("share", thorough([0.1, 1], sample=1))
def test_real_sources_are_in_the_papers_order(share):
    """Its buckets, of the sources that are here: childes; open_subtitles; switchboard, children_stories,
    bnc_spoken; then gutenberg before the encyclopaedia."""
    folder, counts = real("corpus", "train_10M"), {}
    for name in sorted(os.listdir(folder)):
        source = name.removesuffix(".train")
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            part = f.read(int(os.path.getsize(f.name) * share))
        counts[source] = count_text(prepare.CLEANERS[source](part))
    assert [sorted(bucket) for bucket in buckets_of(curriculum(counts, 5))] == [
        ["childes"], ["open_subtitles"], ["bnc_spoken", "children_stories", "switchboard"], ["gutenberg"],
        ["simple_wiki"]]
