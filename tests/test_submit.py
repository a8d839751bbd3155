"""The challenge's hand-in: its form as the reference has it, from invented data in the official layout."""
import json
import math
import os
import random
import shutil

import numpy as np
import pytest
from scipy.stats import spearmanr

from helpers import edit_json, read_jsonl
from lib import glue
from lib.checkpoints import RUN_FILES, find_checkpoint, weights_sha256
from lib.files import read_json, write_json
from tools import aoa, compare, finetune, submit
from tools.reading import NUMBERS, TEXTS
from tools.submit import SubmitConfig

MARKS = (1, 2, 10)
STEPS = ["chck_1M", "chck_2M", "chck_10M"]
NOUNS, VERBS = ("dog", "cat", "girl", "teacher", "nurse", "boy"), ("sees", "likes", "carries", "follows")


# --- invented data in the official layout ---------------------------------------------------------

def sentence(rng, end="."):
    return f"the {rng.choice(NOUNS)} {rng.choice(VERBS)} a {rng.choice(NOUNS)}{end}"


def write_lines(folder, name, rows):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f"{name}.jsonl"), "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def write_choices(folder, rng):
    """BLiMP, supplement, EWoK, entity tracking, COMPS, WUG, GlobalPIQA."""
    full, fast = f"{folder}/full_eval", f"{folder}/fast_eval"
    for task, uids in (("blimp", ("agreement", "principle_A")), ("supplement", ("hypernym",))):
        for uid in uids:
            rows = [dict(sentence_good=sentence(rng), sentence_bad=sentence(rng)) for _ in range(6)]
            rows.append(dict(sentence_good="the dog runs.", sentence_bad="the dog runs."))
            rows = [dict(row, UID=uid, field="syntax") for row in rows] if task == "blimp" else rows
            write_lines(f"{full}/{task}_filtered", uid, rows)
            write_lines(f"{fast}/{task}_fast", uid, rows[:2:-1])
    for place, n in ((f"{full}/ewok_filtered", 6), (f"{fast}/ewok_fast", 4)):
        for domain in ("social-relations", "spatial-relations"):
            rows = [dict(Domain=domain, Context1=sentence(rng), Context2=sentence(rng), Target1=sentence(rng),
                         Target2=sentence(rng)) for _ in range(n // 2)]
            other = dict(Context1="Context2", Context2="Context1", Target1="Target2", Target2="Target1")
            rows = [pair for row in rows for pair in (row, row | {a: row[b] for a, b in other.items()})]
            write_lines(place, domain, rows)
    for name in ("regular", "ambiref", "move_contents"):
        rows = [dict(sample_id=i, numops=i % 3, input_prefix=f"{sentence(rng)} Box {i} contains ",
                     options=[f"the {noun}." for noun in rng.sample(NOUNS, 5)]) for i in range(12)]
        rows[4]["options"][3] = rows[7]["options"][0] = "nothing."
        write_lines(f"{full}/entity_tracking", name, rows)
        if name == "regular":
            write_lines(f"{fast}/entity_tracking_fast", name, rows)
    for name in ("comps_base", "comps_wugs", "comps_wugs_dist-before", "comps_wugs_dist-in-between"):
        pairs = [rng.sample(NOUNS, 2) for _ in range(5)]
        write_lines(f"{full}/comps", name, [
            dict(prefix_acceptable=f"A wug is a {a}. Therefore, a wug",
                 prefix_unacceptable=f"A wug is a {b}. Therefore, a wug",
                 property_phrase=f"{rng.choice(VERBS)} it.") for a, b in pairs])
    for kind in (full, fast):
        for name in ("wug_adj_nominalization", "wug_past_tense"):
            write_lines(f"{kind}/{name}", name, [
                dict(sentences=f"{sentence(rng)}\t{sentence(rng)}", ratio=rng.random()) for _ in range(8)])
        for name, n in (("global_piqa_parallel", 4), ("global_piqa_nonparallel", 2)):
            write_lines(f"{kind}/{name}", "eng_latn", [
                dict(prompt=sentence(rng), label=rng.randrange(n), example_id=f"{name[12]}{i}",
                     **{f"solution{k}": sentence(rng) for k in range(n)}) for i in range(5)])


@pytest.fixture(scope="module")
def evaluation_data(tmp_path_factory):
    folder, rng = str(tmp_path_factory.mktemp("evaluation")), random.Random(6)
    write_choices(folder, rng)
    for kind in ("full_eval", "fast_eval"):
        os.mkdir(f"{folder}/{kind}/reading")
        with open(f"{folder}/{kind}/reading/reading_data.csv", "w") as f:
            f.write(",".join(["", *TEXTS, *NUMBERS]) + "\n")
            for i in range(60):
                a, b, c = (rng.choice(NOUNS) for _ in range(3))
                numbers = [str(rng.randrange(1, 400)) for _ in NUMBERS]
                item = "" if i % 20 == 0 else f"the {b}"
                f.write(",".join([str(i), f"the {b} {a}", c, item, a if item else "", *numbers]) + "\n")
    os.mkdir(f"{folder}/full_eval/aoa")
    write_json(f"{folder}/full_eval/aoa/cdi_childes.json",
               {noun: [{"context": f"the {rng.choice(NOUNS)} sees a"} for _ in range(2)] for noun in NOUNS})
    with open(f"{folder}/full_eval/aoa/cdi_human.csv", "w") as f:
        f.write("word," + ",".join(map(str, range(16, 31))) + "\n")
        for k, noun in enumerate(NOUNS):
            shares = [round(1 / (1 + math.exp(-0.5 * (month - 18 - k))), 3) for month in range(16, 31)]
            f.write(f"{noun}," + ",".join(map(str, shares)) + "\n")
    return folder


@pytest.fixture
def run(teachers, tmp_path):
    """A run with three kept checkpoints (other models with its tokenizer)."""
    shutil.copytree(teachers[1], tmp_path / "baby-0.5b")
    for step, source in zip(STEPS, (teachers[2], teachers[0], teachers[1])):
        shutil.copytree(find_checkpoint(source), tmp_path / "baby-0.5b" / step)
    return str(tmp_path / "baby-0.5b")


def write_glue(folder, run, rules, **change):
    """Results as tools.finetune writes them, of two seeds."""
    weights = change.get("weights", weights_sha256(run))
    rng, results = random.Random(1), {}
    for task in glue.RULES[rules].tasks:
        for seed in ("7", "42"):
            cfg = finetune.task_config(finetune.FinetuneConfig.from_given(rules=rules), task, seed)
            settings = finetune.non_defaults(cfg, (*finetune.NOT_PER_TASK, *finetune.WHERE_AND_HOW))
            results.setdefault(task, {})[seed] = dict(
                rules=rules, settings=settings, inputs_sha256=dict(weights=[weights], texts=[]),
                accuracy=rng.random(), f1=rng.random(), mcc=0.1)
            os.makedirs(f"{folder}/{task}_{seed}")
            write_json(f"{folder}/{task}_{seed}/predictions.json", {task: {"predictions": [
                {"id": f"{task}_{i}", "pred": rng.randrange(2)} for i in range(int(seed))]}})
    write_json(f"{folder}/results.json", results)
    return results


@pytest.fixture
def small(monkeypatch):
    """The official sizes are those of the invented data."""
    sizes = dict(blimp_filtered=(2, 14), blimp_fast=(2, 8), supplement_filtered=(1, 7),
                 supplement_fast=(1, 4), ewok_filtered=(2, 12), ewok_fast=(2, 8), comps=(4, 20),
                 wug_adj_nominalization=(1, 8), wug_past_tense=(1, 8), global_piqa_parallel=(5, 5),
                 global_piqa_nonparallel=(5, 5), reading=(1, 60), entity_tracking=(9, 36),
                 entity_tracking_fast=(3, 12))
    filtered = dict(sizes, entity_tracking=(9, 30), entity_tracking_fast=(3, 10))
    table = [(task, filtered if task.key == "entity_tracking_filtered" else sizes) for task in submit.TASKS]
    monkeypatch.setattr(submit, "TASKS", [
        task._replace(full_size=sizes[task.full], fast_size=sizes.get(task.fast)) for task, sizes in table])
    monkeypatch.setattr(submit, "GLUE_SIZES", dict.fromkeys(submit.GLUE_SIZES, 42))
    monkeypatch.setattr(submit, "AOA_ROWS", 12)
    monkeypatch.setattr(aoa, "MARKS", MARKS)


def hand_in(run, data, out, **change):
    submit.main(SubmitConfig(**{**dict(ckpt=run, data=data, out=str(out), glue=f"{out}/glue", device="cpu",
                                       compile="off"), **change}))


def collated(out, name="baby-0"):
    return read_json(f"{out}/{name}/all_full_preds_and_fast_scores_causal.json")


# --- the form, by the reference's section 7 -------------------------------------------------------

FOLDERS = dict(blimp="blimp/blimp_{}", blimp_supplement="blimp/supplement_{}", ewok="ewok/ewok_{}",
               entity_tracking="entity_tracking/entity_tracking", comps="comps/comps",
               entity_tracking_filtered="entity_tracking/entity_tracking",
               wug_adj="wug_adj/wug_adj_nominalization", wug_past="wug_past/wug_past_tense",
               global_piqa_parallel="global_piqa_parallel/global_piqa_parallel",
               global_piqa_nonparallel="global_piqa_nonparallel/global_piqa_nonparallel")
KEYS = {"2025": ["blimp", "blimp_supplement", "ewok", "entity_tracking", "comps", "wug_adj", "wug_past"],
        "2026": ["blimp", "blimp_supplement", "ewok", "entity_tracking_filtered", "comps",
                 "global_piqa_parallel", "global_piqa_nonparallel"]}


def result_folder(task, kind):
    """<task>/<data folder> of the results."""
    folder = FOLDERS[task].format("filtered" if kind == "full" else "fast")
    return folder + "_fast" * (kind == "fast" and "entity" in task)


def gold(data, rules, task, kind):
    """{UID: [(texts to choose from, the right one's place)]} of a task's items, in file order."""
    items, place = {}, f"{data}/{kind}_eval/{result_folder(task, kind).split('/')[1]}"
    for name in sorted(os.listdir(place)):
        stem = name.removesuffix(".jsonl")
        for row in read_jsonl(f"{place}/{name}"):
            right = 0
            if "blimp" in task:
                uid, texts = stem, [row["sentence_good"], row["sentence_bad"]]
            elif task == "ewok":
                uid = row["Domain"]
                texts = [" " + row["Target1"], " " + row["Target2"]]
                if rules == "2026":
                    texts = [row[context] + " " + row["Target1"] for context in ("Context1", "Context2")]
            elif "entity" in task:
                uid, texts = f"{stem}_{row['numops']}_ops", row["options"]
                if rules == "2026" and any("nothing" in text for text in texts):
                    continue
            elif task == "comps":
                uid = dict(comps_base="base", comps_wugs="wugs").get(stem, stem[6:].replace("-", "_"))
                texts = [f"{row[f'prefix_{un}acceptable']} {row['property_phrase']}" for un in ("", "un")]
            elif "wug" in task:
                uid, texts = task, row["sentences"].split("\t")  # wug_adj, whatever the file
            else:
                uid, right = row["example_id"], row["label"]
                texts = [" " + row[f"solution{k}"] for k in range(4) if f"solution{k}" in row]
            items.setdefault(uid, []).append((texts, right))
    return items


def assert_form(predictions, items):
    assert set(predictions) == set(items)
    for uid, rows in items.items():
        got = predictions[uid]["predictions"]
        assert [row["id"] for row in got] == [f"{uid}_{n}" for n in range(len(rows))]
        assert all(row["pred"] in texts for row, (texts, _) in zip(got, rows, strict=True))


def official_shares(predictions, items):
    """By UID the share of predictions with the right text."""
    return {uid: np.mean([row["pred"].strip() == texts[right].strip() for row, (texts, right)
                          in zip(predictions[uid]["predictions"], rows, strict=True)])
            for uid, rows in items.items()}


def official_rho(predictions, folder):
    (name, rows), = predictions.items()
    lines, rows = read_jsonl(f"{folder}/{os.path.basename(folder)}.jsonl"), rows["predictions"]
    for line, row in zip(lines, rows, strict=True):
        assert row["pred"] == line["sentences"].split("\t")[row["prob"] < 0.5]
    return {name: spearmanr([row["prob"] for row in rows], [line["ratio"] for line in lines])[0]}


@pytest.mark.parametrize("rules", ["2026", "2025"])
def test_the_hand_in_has_the_official_form(run, evaluation_data, small, tmp_path, rules, capsys):
    scores = write_glue(tmp_path / "out/glue", run, rules)
    hand_in(run, evaluation_data, tmp_path / "out", rules=rules)
    tree, whole = f"{tmp_path}/out/baby-0", collated(tmp_path / "out")
    years = ["aoa", "aoa_surprisals"] if rules == "2026" else ["aoa"]
    assert set(whole) == {*KEYS[rules], "reading", "glue", "fast_eval_results", *years}
    assert set(whole["fast_eval_results"]) == {*KEYS[rules], "reading"} - {"comps"}
    for key in KEYS[rules]:
        assert_form(whole[key], gold(evaluation_data, rules, key, "full"))
        where = result_folder(key, "full")
        assert read_json(f"{tree}/main/zero_shot/causal/{where}/predictions.json") == whole[key]
        for step, entry in zip(STEPS, whole["fast_eval_results"].get(key, [])):
            items, where = gold(evaluation_data, rules, key, "fast"), result_folder(key, "fast")
            got = read_json(f"{tree}/{step}/zero_shot/causal/{where}/predictions.json")
            assert_form(got, items)
            expected = official_shares(got, items)
            if "piqa" in key:
                expected = {key: np.mean([*expected.values()])}
            if "wug" in key:
                expected = official_rho(got, f"{evaluation_data}/fast_eval/{where.split('/')[1]}")
            assert entry == pytest.approx(expected)
    assert_words(whole, tree, rules)
    for task in ("boolq", "mnli", "mrpc", "multirc", "qqp", "rte", "wsc"):
        folder, rows = f"{tree}/main/finetune/{task}", whole["glue"][task]["predictions"]
        assert [row["id"] for row in rows] == [f"{task}_{i}" for i in range(42)]  # of seed 42
        assert read_json(f"{folder}/predictions.json") == {task: whole["glue"][task]}
        assert f"accuracy: {scores[task]['42']['accuracy']}" in open(f"{folder}/results.txt").read()
    assert len(whole["glue"]) == 7
    assert "missing: " not in capsys.readouterr().out


@pytest.mark.parametrize("complete", [True, False])
def test_a_curve_over_some_of_the_checkpoints_is_not_handed_in(complete):
    learned = dict(score=0.4, predictions={"results": []}, complete=complete)
    whole = submit.hand_in(submit.SubmitConfig(rules="2026"), {}, [], learned, {})
    assert (whole["aoa"], whole["aoa_surprisals"]) == (
        ({"aoa": 0.4}, {"results": []}) if complete else (None, None))


def assert_words(whole, tree, rules):
    """Reading and age of acquisition."""
    rows = whole["reading"]["reading"]["predictions"]
    assert [row["id"] for row in rows] == list(range(60)) and all(row["pred"] > 0 for row in rows)
    assert [math.isnan(row["prev_pred"]) for row in rows] == [i % 20 == 0 for i in range(60)]
    assert os.path.isfile(f"{tree}/main/zero_shot/causal/reading/predictions.json")
    assert [set(entry) for entry in whole["fast_eval_results"]["reading"]] == [{"spr", "rt"}] * 3
    assert max(abs(x) for entry in whole["fast_eval_results"]["reading"] for x in entry.values()) < 1
    surprisals = whole["aoa_surprisals" if rules == "2026" else "aoa"]
    assert surprisals["metadata"] == dict(model_name="baby-0", use_bos_only=False, total_steps=3,
                                          completed_steps=3)
    assert [row["step"] for row in surprisals["results"]] == [step for step in STEPS for _ in range(12)]
    assert set(surprisals["results"][0]) == {"step", "word_count", "target_word", "context_id", "context",
                                             "surprisal"}
    assert surprisals["results"][-1]["word_count"] == 10_000_000
    place = f"{tree}/main/zero_shot/causal/AoA_word"
    assert read_json(f"{place}/surprisal.json") == surprisals
    assert os.path.isfile(f"{place}/aoa_score.json") == (rules == "2026")
    if rules == "2026":
        assert read_json(f"{place}/aoa_score.json") == whole["aoa"] and set(whole["aoa"]) == {"aoa"}
        assert -1 <= whole["aoa"]["aoa"] <= 1


# --- the scores -----------------------------------------------------------------------------------

def test_means_are_the_leaderboards(run, evaluation_data, small, tmp_path, capsys):
    scores = write_glue(tmp_path / "out/glue", run, "2026")
    hand_in(run, evaluation_data, tmp_path / "out")
    text = capsys.readouterr().out
    result, whole = read_json(f"{run}/scores_2026/summary.json"), collated(tmp_path / "out")
    columns = {}
    for title, key in (("BLiMP", "blimp"), ("supplement", "blimp_supplement"), ("EWoK", "ewok"),
                       ("entity tracking", "entity_tracking_filtered"), ("COMPS", "comps")):
        shares = official_shares(whole[key], gold(evaluation_data, "2026", key, "full"))
        ties = 0.5 / 7 if "blimp" in key else 0  # a pair of equal texts in each UID
        columns[title] = 100 * (np.mean([*shares.values()]) - ties)
    sets = [official_shares(whole[key], gold(evaluation_data, "2026", key, "full")).values()
            for key in KEYS["2026"][5:]]
    columns["GlobalPIQA"] = 100 * np.mean([np.mean([*shares]) for shares in sets])
    columns["GLUE"] = 100 * np.mean([scores[task]["42"]["f1" if task in ("mrpc", "qqp") else "accuracy"]
                                     for task in scores])
    for title, value in columns.items():
        assert result["benchmarks"][title]["score"] == pytest.approx(value), title
    human = [result["benchmarks"][title]["score"] for title in ("reading", "AoA")]
    found = list(result["means"].values())
    assert found[0] == pytest.approx((sum(columns.values()) + sum(human)) / 9)
    assert found[1:3] == pytest.approx([sum(columns.values()) / 7, sum(human) / 2])
    assert found[3] == pytest.approx(found[0])  # all are there
    assert whole["blimp"]["agreement"]["predictions"][6]["pred"] == "the dog runs."  # of two equal texts
    assert read_json(f"{run}/scores_2026/main/blimp_filtered.json")["tasks"]["agreement"]["right"][6] == "2"
    row = result["benchmarks"]["BLiMP"]
    assert f"| BLiMP | {row['score']:.2f} ± {row['se']:.2f} | 65.23 | 63.07 |" in text
    assert f"overall, the mean of 9, missing = 0 | {found[0]:.2f} | {336.39 / 9:.2f} | " in text
    compare.main([run])
    assert f"| BLiMP (submit) | 2026 | {row['score']:.2f} | {row['se']:.2f} | 14 |" in capsys.readouterr().out


def test_baselines_are_the_references():
    """The reference's section 10, 2026: strict-small GPT-2's overall by hand."""
    gpt2 = submit.PUBLISHED["2026"]["strict-small"]["GPT-2"]
    assert dict(zip(submit.BENCHMARKS["2026"], gpt2)) == dict(zip(
        ("BLiMP", "supplement", "EWoK", "entity tracking", "COMPS", "GlobalPIQA", "reading", "AoA", "GLUE"),
        (65.23, 57.25, 50.63, 19.10, 51.81, 35.09, 5.63, -12.15, 63.80)))
    for rules, tracks in submit.PUBLISHED.items():
        rows = [row for models in tracks.values() for row in models.values()]
        assert {len(row) for row in rows} == {len(submit.BENCHMARKS[rules])}


def test_the_official_sizes():
    sizes = {(rules, task.key): (task.full_size, task.fast_size) for task in submit.TASKS
             for rules in task.rules.split()}
    filtered = [517, 409, 405, 425, 388, 94, 508, 428, 413, 409, 434, 123, 516, 437, 399, 406, 353, 116]
    every = [606, 607, 606, 606, 568, 159, 607, 607, 604, 604, 615, 187, 605, 606, 605, 606, 529, 156]
    assert sizes["2026", "entity_tracking_filtered"] == ((18, sum(filtered)), (6, sum(filtered[:6])))
    assert sizes["2025", "entity_tracking"] == ((18, sum(every)), (6, sum(every[:6])))
    assert sizes["2026", "comps"] == ((4, 49_340 + 3 * 13_896), (0, 0))
    assert ("2026", "wug_adj") not in sizes and ("2025", "global_piqa_parallel") not in sizes
    assert len(submit.official_steps("strict-small")) == 19 and len(submit.official_steps("strict")) == 28


# --- done once, and what is not there -------------------------------------------------------------

def count_scored(monkeypatch, die_at=None):
    """The names of what is scored from here on; a killed process at the n-th."""
    scored = []

    def counting(name):
        real = getattr(submit, name)

        def score(cfg, task, data, *model):
            if len(scored) == die_at:
                raise KeyboardInterrupt
            scored.append(os.path.basename(data))
            return real(cfg, task, data, *model)
        monkeypatch.setattr(submit, name, score)
    counting("score_choices")
    counting("score_reading")
    return scored


def test_a_killed_one_goes_on_and_nothing_is_done_twice(run, evaluation_data, small, tmp_path, monkeypatch):
    data = str(tmp_path / "data")
    shutil.copytree(evaluation_data, data)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_scored(patch, die_at=10)
        hand_in(run, data, tmp_path / "cut")
    with monkeypatch.context() as patch:
        rest = count_scored(patch)
        hand_in(run, data, tmp_path / "cut")
        assert len(rest) == 8 + 3 * 7 - 10
        rest.clear()
        hand_in(run, data, tmp_path / "again")
        assert rest == []
        assert repr(collated(tmp_path / "again")) == repr(collated(tmp_path / "cut"))  # nan = nan
        write_lines(f"{data}/fast_eval/supplement_fast", "hypernym", [
            dict(sentence_good="a dog runs.", sentence_bad="a dog run.")] * 4)
        shutil.rmtree(f"{run}/chck_2M")
        shutil.copytree(f"{run}/chck_1M", f"{run}/chck_2M")
        hand_in(run, data, tmp_path / "other")
        assert sorted(rest) == sorted(["supplement_fast"] * 3 + [
            "blimp_fast", "ewok_fast", "entity_tracking_fast", "global_piqa_parallel",
            "global_piqa_nonparallel", "reading"])
        hand_in(run, data, tmp_path / "no", bos="no")
        assert len(rest) == 9 + 8 + 3 * 7  # another text: scored anew
    fast = collated(tmp_path / "other")["fast_eval_results"]["reading"]
    assert fast[0] == fast[1] != fast[2]
    left = sorted(os.listdir(run))
    assert {"scores_2026", "aoa_surprisals.json"} <= set(left) and all(map(RUN_FILES.fullmatch, left))


def test_what_is_missing_is_null_and_named(run, evaluation_data, tmp_path, capsys):
    """With the official sizes, no EWoK, no COMPS, a broken file, fine-tuning of other rules, of 2 kept
    checkpoints."""
    data = str(tmp_path / "data")
    shutil.copytree(evaluation_data, data)
    for name in ("full_eval/ewok_filtered", "fast_eval/ewok_fast", "full_eval/comps"):
        shutil.rmtree(f"{data}/{name}")
    os.remove(f"{data}/full_eval/reading/reading_data.csv")
    with open(f"{data}/full_eval/global_piqa_parallel/eng_latn.jsonl", "a") as f:
        f.write('{"prompt": 3}\n')
    shutil.rmtree(f"{run}/chck_10M")
    write_glue(tmp_path / "out/glue", run, "2025")
    hand_in(run, data, tmp_path / "out")
    whole, text = collated(tmp_path / "out"), capsys.readouterr().out
    assert all(whole[key] is None for key in (*KEYS["2026"], "reading", "aoa", "aoa_surprisals"))
    assert whole["glue"] == {}
    assert all(entries == [None] * 19 for entries in whole["fast_eval_results"].values())
    tree = f"{tmp_path}/out/baby-0/chck_1M/zero_shot/causal"
    assert os.path.isfile(f"{tree}/blimp/blimp_fast/predictions.json")
    for line in ("missing: 17 of 19 checkpoints, chck_3M, chck_4M, ..., chck_100M: train.py --keep_words",
                 f"missing: full_eval/ewok_filtered: put it at {data}/full_eval/ewok_filtered, from its ",
                 f"missing: full_eval/comps: put it at {data}/full_eval/comps, from the organisers'",
                 "missing: full_eval/blimp_filtered: 14 items in 2 parts: the official set has 59,875 in 67:",
                 "missing: full_eval/global_piqa_parallel: ", "eng_latn.jsonl, line 6: ",
                 f"missing: full_eval/reading: no {data}/full_eval/reading/reading_data.csv",
                 "missing: age of acquisition: 2 checkpoints by words seen",
                 "missing: GLUE: boolq, mnli, mrpc, multirc, qqp, rte, wsc: python -m tools.finetune "
                 f"--ckpt={run} --data={data}/full_eval/glue_filtered --rules=2026 --out_dir="):
        assert line in text, line
    blimp = [line for line in text.splitlines() if line.startswith("| BLiMP ")][0]
    assert "* |" in blimp and "overall, the mean of 9, missing = 0 | 0.00 |" in text
    result = read_json(f"{run}/scores_2026/summary.json")
    there = [row["score"] for row in result["benchmarks"].values() if row["score"] is not None]
    assert result["means"]["mean of the 4 that are there"] == pytest.approx(np.mean(there))
    assert len(there) == 4


def test_glue_of_other_weights_or_settings_is_told_from_it(run, evaluation_data, small, tmp_path, capsys):
    data = str(tmp_path / "data")
    os.makedirs(f"{data}/full_eval")
    write_glue(tmp_path / "out/glue", run, "2026", weights="other")
    hand_in(run, data, tmp_path / "out")
    assert collated(tmp_path / "out")["glue"] == {} and "GLUE: boolq, mnli" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out/glue")
    results = write_glue(tmp_path / "out/glue", run, "2026")
    results["rte"]["42"]["settings"]["max_length"] = 64
    del results["wsc"]["42"]
    write_json(f"{tmp_path}/out/glue/results.json", results)
    hand_in(run, data, tmp_path / "out")
    text = capsys.readouterr().out
    assert "GLUE: rte as officially: its settings were others (max_length: 512 -> 64)" in text
    assert "GLUE: wsc as officially: its settings were others (seed: 42 -> 7)" in text
    assert "GLUE: wsc: 7 items in 1 parts" in text and "wsc" not in collated(tmp_path / "out")["glue"]
    assert text.count("as officially: ") == 2 and "not of this hand-in" not in text
    shutil.rmtree(tmp_path / "out/glue")  # and what was handed in of it lies about still
    hand_in(run, data, tmp_path / "out")
    assert f"notice: 14 files in {tmp_path}/out/baby-0 are not of this hand-in" in capsys.readouterr().out


@pytest.mark.parametrize("change,message", [
    (dict(ckpt=""), "what to hand in"), (dict(data="nowhere"), "no folder nowhere/full_eval"),
    (dict(ckpt="nowhere"), "no checkpoint at 'nowhere'")])
def test_bad_settings_are_one_line(run, evaluation_data, tmp_path, change, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
        hand_in(**{**dict(run=run, data=evaluation_data, out=tmp_path / "out"), **change})
    assert not os.path.exists("nowhere")


def test_a_name_is_cut_at_its_last_dot(run, tmp_path):
    def name(**change):
        return submit.model_name(SubmitConfig(ckpt=run, **change))
    assert name() == "baby-0" and name(name="org/llama-1.5.2b") == "llama-1.5"
    assert name(name="plain") == "plain"
    edit_json(f"{run}/best.json", folder=os.path.basename(find_checkpoint(run)))
    assert submit.model_name(SubmitConfig(ckpt=find_checkpoint(run))) == "baby-0"
