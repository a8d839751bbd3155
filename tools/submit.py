"""The hand-in of the BabyLM challenge (2025, 2026; strict and strict-small): score what is not scored yet,
write the results as the challenge wants them, and say what is missing.

    python -m tools.submit --ckpt=out/babyllama --data=evaluation_data
    python -m tools.submit --ckpt=out/babyllama --data=evaluation_data --rules=2025 --track=strict

evaluation_data/ has the organisers' folders full_eval/ and fast_eval/. The run's best checkpoint is scored on
the full sets, each checkpoint that train.py's keep_words kept on the fast ones; the age of acquisition is
from all of these. GLUE is what `python -m tools.finetune --rules=2026` left in --glue. Scores stay in the
run's folder, scores_<rules>/<main or chck_1M>/<data folder>.json: the same command goes on, and does again
only what has other weights or data. The hand-in:

    results_2026/<model>/<main or chck_1M>/zero_shot/causal/..., finetune/...   predictions as official
    results_2026/<model>/all_full_preds_and_fast_scores_causal.json             scripts write them, all in one

What is not there, or has not the official number of items, is null in it; the leaderboard counts it as 0.
A pair of equal texts is half a point in the scores printed here (2026), and right for the organisers, who
compare texts.
"""
import hashlib
import importlib.util
import math
import os
import pathlib
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from distill import Teacher
from eval_blimp import EvalConfig, preferred, read_folders, score_items, summary
from lib import glue
from lib.checkpoints import find_checkpoint, load_ensemble, run_folder, weights_sha256
from lib.configurator import launch
from lib.files import check_writable, lock, read_json, sha256, write_json, write_lines
from lib.machine import can_compile, pick_device
from lib.rules import RULES
from lib.scoring import added_bos
from tools import aoa, finetune, reading
from tools.compare import score


@dataclass
class SubmitConfig:
    ckpt: str = ""                  # run folder: its best checkpoint, and chck_1M, chck_2M, ... beside it
    data: str = "evaluation_data"   # folder with full_eval/ and fast_eval/
    rules: Literal["2025", "2026"] = "2026"
    track: Literal["strict-small", "strict"] = "strict-small"  # 19 checkpoints to 100M words; 28 to 1000M
    glue: str = "out/glue"          # out_dir of tools.finetune, by the same rules
    name: str = ""                  # the model's, cut at its last dot as officially; '' = the run folder's
    out: str = ""                   # '' = results_<rules>
    bos: Literal["auto", "yes", "no"] = "auto"  # <s> before a text; auto: if the model was trained so
    batch_tokens: int = 1024        # positions scored at a time; a GPU wants more
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # auto: the final model, which reads the full sets


class Task(NamedTuple):
    rules: str
    key: str                   # in the collated file
    folder: str                # in the results: zero_shot/causal/<folder>/<data folder>
    full: str                  # data folder in full_eval/
    full_size: tuple           # UIDs, and items in all
    fast: str = ""             # data folder in fast_eval/, '' = none
    fast_size: tuple = (0, 0)


TASKS = (
    Task("2025 2026", "blimp", "blimp", "blimp_filtered", (67, 59_875), "blimp_fast", (67, 13_400)),
    Task("2025 2026", "blimp_supplement", "blimp", "supplement_filtered", (5, 5_218),
         "supplement_fast", (5, 250)),
    Task("2025 2026", "ewok", "ewok", "ewok_filtered", (11, 7_618), "ewok_fast", (11, 1_100)),
    Task("2025", "entity_tracking", "entity_tracking", "entity_tracking", (18, 9_483),
         "entity_tracking_fast", (6, 3_152)),
    Task("2026", "entity_tracking_filtered", "entity_tracking", "entity_tracking", (18, 6_780),
         "entity_tracking_fast", (6, 2_238)),
    Task("2025 2026", "comps", "comps", "comps", (4, 91_028)),
    Task("2025", "wug_adj", "wug_adj", "wug_adj_nominalization", (1, 200),
         "wug_adj_nominalization", (1, 200)),
    Task("2025", "wug_past", "wug_past", "wug_past_tense", (1, 50), "wug_past_tense", (1, 50)),
    Task("2026", "global_piqa_parallel", "global_piqa_parallel", "global_piqa_parallel", (103, 103),
         "global_piqa_parallel", (103, 103)),
    Task("2026", "global_piqa_nonparallel", "global_piqa_nonparallel", "global_piqa_nonparallel", (100, 100),
         "global_piqa_nonparallel", (100, 100)),
    Task("2025 2026", "reading", "", "reading", (1, 1_726), "reading", (1, 1_726)),
)
AOA_ROWS = 8_005  # for each checkpoint
GLUE_SIZES = dict(boolq=1_635, mnli=4_908, mrpc=204, multirc=2_424, qqp=20_215, rte=139, wsc=52)

# what the leaderboard has a column for: the unweighted mean of these keys' scores
BENCHMARKS = {
    "2025": {"BLiMP": ("blimp",), "supplement": ("blimp_supplement",), "EWoK": ("ewok",),
             "entity tracking": ("entity_tracking",), "COMPS": ("comps",), "WUG adjectives": ("wug_adj",),
             "WUG past tense": ("wug_past",), "reading": ("reading",), "AoA": ("aoa",),
             "GLUE": tuple(GLUE_SIZES)},
    "2026": {"BLiMP": ("blimp",), "supplement": ("blimp_supplement",), "EWoK": ("ewok",),
             "entity tracking": ("entity_tracking_filtered",), "COMPS": ("comps",),
             "GlobalPIQA": ("global_piqa_parallel", "global_piqa_nonparallel"), "reading": ("reading",),
             "AoA": ("aoa",), "GLUE": tuple(GLUE_SIZES)},
}

# The organisers' baselines, a number for each benchmark. 2026: the README of babylm-org/babylm-eval after
# 8 July 2026. 2025: a part of the README of babylm/evaluation-pipeline-2025 that is commented out, so
# provisional, reading being the mean of its two columns (WUG was still an accuracy there, and is left out);
# "GPT-2 (2026)" is that year's, scored by the code of 2025.
PUBLISHED = {
    "2025": {
        "strict-small": {
            "GPT-BERT, causal focus": (71.66, 63.21, 49.49, 33.96, None, None, None, 6.67, None, None),
            "GPT-2": (67.29, 59.09, 49.80, 18.92, None, None, None, 0.085, None, None),
            "GPT-2 (2026)": (65.08, None, None, 21.07, None, 56, 16, None, None, None)},
        "strict": {
            "GPT-BERT, causal focus": (79.29, 70.42, 52.32, None, None, None, None, 5.69, None, None),
            "GPT-2": (75.07, 64.96, 51.22, 30.11, None, None, None, 0.265, None, None),
            "GPT-2 (2026)": (74.53, None, None, 23.58, None, 62, 19, None, None, None)}},
    "2026": {
        "strict-small": {
            "GPT-2": (65.23, 57.25, 50.63, 19.10, 51.81, 35.09, 5.63, -12.15, 63.80),
            "interaction": (63.07, 58.13, 51.45, 19.62, 51.29, 36.14, 5.10, None, 63.62)},
        "strict": {
            "GPT-2": (74.73, 65.00, 54.37, 16.91, 55.85, 36.62, 6.93, -11.58, 67.75),
            "interaction": (72.89, 65.09, 54.23, 15.89, 55.37, 36.18, 3.43, -11.36, 67.28)}},
}


class Score(NamedTuple):
    value: float      # in %
    se: float | None
    n: int            # items
    complete: bool    # has the official number of them


def main(cfg):
    if not cfg.ckpt:
        sys.exit("error: say what to hand in: --ckpt=out/run --data=evaluation_data")
    if not os.path.isdir(os.path.join(cfg.data, "full_eval")):
        sys.exit(f"error: no folder {cfg.data}/full_eval; name the organisers' evaluation data: --data=...")
    run, best = run_folder(cfg.ckpt), find_checkpoint(cfg.ckpt)
    os.makedirs(scores_folder(cfg), exist_ok=True)
    lock(scores_folder(cfg))
    collated = in_results(cfg, "all_full_preds_and_fast_scores_causal.json")
    check_writable(collated)
    missing = {}  # what is missing -> what makes it
    steps = official_steps(cfg.track)
    kept = [step for step in steps if os.path.isdir(os.path.join(run, step))]
    if len(kept) < len(steps):
        absent = shortened([step for step in steps if step not in kept])
        missing[f"{len(steps) - len(kept)} of {len(steps)} checkpoints, {absent}"] = (
            "train.py --keep_words keeps those that training comes to (at most 10 epochs)")
    full = zero_shot(cfg, "main", best, missing)
    fast = {step: zero_shot(cfg, step, os.path.join(run, step), missing) for step in kept}
    learned = age_of_acquisition(cfg, run, kept, missing)
    tuned = finetuned(cfg, weights_sha256(best), missing)
    write_tree(cfg, {"main": full, **fast}, learned, tuned, collated)
    write_json(collated, hand_in(cfg, full, [fast.get(step, {}) for step in steps], learned, tuned))
    result = dict(rules=cfg.rules, track=cfg.track, name=model_name(cfg), weights_sha256=weights_sha256(best),
                  step=read_json(os.path.join(best, "config.json"), ["step"])["step"],
                  **scores_and_means(cfg, full, learned, tuned), missing=missing)
    write_json(os.path.join(scores_folder(cfg), "summary.json"), result)
    print_table(cfg, result)
    print(f"written to {collated}")


def scores_folder(cfg, *names):
    return os.path.join(run_folder(cfg.ckpt), f"scores_{cfg.rules}", *names)


def model_name(cfg):
    """As the official scripts have it: they take what follows the last dot for a file's ending."""
    return pathlib.PurePath(cfg.name or os.path.abspath(run_folder(cfg.ckpt))).stem


def in_results(cfg, *names):
    """A path in the results' tree, in a folder that is there."""
    path = os.path.join(cfg.out or f"results_{cfg.rules}", model_name(cfg), *names)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


def official_steps(track):
    return [f"chck_{mark}M" for mark in aoa.MARKS if track == "strict" or mark <= 100]


def shortened(names):
    return ", ".join(names if len(names) < 5 else [*names[:2], "...", names[-1]])


# --- scores, each made once -----------------------------------------------------------------------

@lru_cache(1)
def opened(path, device, compiled):
    """([model], tokenizer, config.json) of a checkpoint."""
    models, tokenizer, described = load_ensemble([path], device)
    if compiled and can_compile(device):
        models[0].model.compile_layers()
    return models, tokenizer, described


def zero_shot(cfg, revision, path, missing):
    """{key: result} of a checkpoint: of the final model, 'main', on the full sets, else on the fast ones."""
    results, device = {}, pick_device(cfg.device)
    compiled = cfg.compile == "on" or cfg.compile == "auto" and revision == "main"
    os.makedirs(scores_folder(cfg, revision), exist_ok=True)
    for task in TASKS:
        kind, name, size = (("full_eval", task.full, task.full_size) if revision == "main" else
                            ("fast_eval", task.fast, task.fast_size))
        if not name or cfg.rules not in task.rules:
            continue
        data, file = os.path.join(cfg.data, kind, name), scores_folder(cfg, revision, f"{name}.json")
        if not os.path.isdir(data):
            missing[f"{kind}/{name}"] = f"put it at {data}, from " + (
                "its authors, who grant access" if task.key == "ewok" else "the organisers' evaluation data")
            continue
        key = dict(weights_sha256=weights_sha256(path), data_sha256=folder_sha256(data), bos=cfg.bos)
        result = kept_result(file, key)
        if result is None:
            model = opened(path, device, compiled)
            print(f"{revision}: {name}", flush=True)
            try:
                result = (score_reading if task.key == "reading" else score_choices)(cfg, task, data, *model)
            except SystemExit as e:  # of one task alone: a GPT-2 has too few positions, a file is damaged
                missing[f"{kind}/{name}"] = str(e).removeprefix("error: ")
                continue
            write_json(file, {**key, "rules": cfg.rules, **result})
        results[task.key] = {**result, "complete": check_count(f"{kind}/{name}", result, size, missing)}
    return results


def folder_sha256(folder):
    """Of the names and contents of its data files."""
    names = sorted(name for name in os.listdir(folder) if name.endswith((".jsonl", ".csv")))
    sums = [f"{sha256(os.path.join(folder, name))} {name}" for name in names]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def kept_result(path, key):
    """The result at `path` if it is of this key, else None."""
    result = read_json(path) if os.path.isfile(path) else {}
    return result if key.items() <= result.items() else None


def check_count(name, result, size, missing):
    """True if there are as many UIDs and items as the organisers check for."""
    counts = [len(rows["predictions"]) for rows in result["predictions"].values()]
    if (len(counts), sum(counts)) == size:
        return True
    missing[f"{name}: {sum(counts):,} items in {len(counts)} parts"] = (
        f"the official set has {size[1]:,} in {size[0]}: null in the hand-in")
    return False


def score_choices(cfg, task, data, models, tokenizer, described):
    """A task's scores, its predictions, and by UID the share of them that is right."""
    rules = RULES[cfg.rules]
    reads = EvalConfig(data=(data,), rules=cfg.rules, bos=cfg.bos)
    (items,) = read_folders(reads, models, tokenizer, described).values()
    scores = score_items([Teacher(m) for m in models], items, cfg.batch_tokens, os.path.basename(data))
    found, predictions = summary(items, scores, rules), preferred(items, scores, rules)
    shares = right_shares(items, predictions)
    if task.key.startswith("global_piqa"):  # each item is a UID of its own
        shares = {task.key: sum(shares.values()) / len(shares)}
    if "rho" in found:
        shares = dict.fromkeys(predictions, found["rho"])
    return dict(step=described["step"], **found, predictions=predictions, shares=shares)


def right_shares(items, predictions):
    """{UID: share of predictions whose text is the right one's}, as the organisers count."""
    right = {}
    for item in items:
        right.setdefault(item.uid, []).append(item.texts[item.right].strip())
    return {uid: sum(row["pred"].strip() == text for row, text in
                     zip(predictions[uid]["predictions"], texts, strict=True)) / len(texts)
            for uid, texts in right.items()}


def score_reading(cfg, task, data, models, tokenizer, described):
    rows = reading.read_rows(os.path.join(data, "reading_data.csv"))
    bos = added_bos(described, tokenizer, cfg.bos)
    pred = reading.surprisals([Teacher(m) for m in models], tokenizer, bos, rows, cfg.batch_tokens)
    found = reading.reading_scores(rows, *pred)
    return dict(step=described["step"], **found, predictions=reading.official_predictions(*pred),
                shares=dict(spr=found["self_paced"] / 100, rt=found["eye_tracking"] / 100))


def age_of_acquisition(cfg, run, kept, missing):
    """The score, and the surprisals that it is from; {} where there is none."""
    data = os.path.join(cfg.data, "full_eval", "aoa")
    files = [os.path.join(data, name) for name in ("cdi_childes.json", "cdi_human.csv")]
    if not all(map(os.path.isfile, files)):
        missing["age of acquisition"] = f"put the organisers' cdi_childes.json and cdi_human.csv into {data}"
    elif len(kept) < 3:
        missing["age of acquisition"] = f"{len(kept)} checkpoints by words seen, a curve wants 3"
    elif not importlib.util.find_spec("scipy"):
        missing["age of acquisition"] = "pip install scipy"
    if "age of acquisition" in missing:
        return {}
    occurrences = aoa.read_occurrences(files[0])
    surprisals, tokenizer = aoa.aoa_surprisals(run, occurrences, cfg.bos, cfg.batch_tokens,
                                               pick_device(cfg.device))
    surprisals = {step: surprisals[step] for step in kept}
    path = scores_folder(cfg, "main", "aoa.json")
    key = dict(weights_sha256=[weights_sha256(os.path.join(run, step)) for step in kept],
               data_sha256=[sha256(file) for file in files], bos=cfg.bos)
    found = kept_result(path, key)
    if found is None:
        chance = aoa.chance_levels({o.word for o in occurrences}, tokenizer, cfg.rules)
        children = aoa.read_children(files[1])
        found = aoa.aoa_score(occurrences, surprisals, children, chance, cfg.rules)
        write_json(path, {**key, "rules": cfg.rules, **found})
    complete = kept == official_steps(cfg.track) and len(occurrences) == AOA_ROWS
    if not complete:
        missing[f"age of acquisition: {len(kept)} checkpoints, {len(occurrences):,} contexts"] = (
            f"{len(official_steps(cfg.track))} and {AOA_ROWS:,} officially: null in the hand-in")
    return {**found, "predictions": aoa.official_surprisals(model_name(cfg), occurrences, surprisals),
            "complete": complete}


def finetuned(cfg, weights, missing):
    """{task: scores and predictions} of what was fine-tuned from these weights by these rules; of the
    official seed if that is there."""
    every, results = glue.read_results(os.path.join(cfg.glue, "results.json")), {}
    for task, size in GLUE_SIZES.items():
        rows = {seed: row for seed, row in every.get(task, {}).items() if row.get("rules") == cfg.rules
                and row["inputs_sha256"]["weights"] == [weights]}
        seed = "42" if "42" in rows else next(iter(rows), None)
        file = os.path.join(cfg.glue, f"{task}_{seed}", "predictions.json")
        if os.path.isfile(file):
            found = {task: read_json(file, [task])[task]}
            results[task] = dict(rows[seed], seed=seed, predictions=found)
            results[task]["complete"] = check_count(f"GLUE: {task}", results[task], (1, size), missing)
            if changed := finetune.other_settings(cfg.rules, task, rows[seed]):
                missing[f"GLUE: {task} as officially"] = f"its settings were others ({changed})"
    absent = [task for task in GLUE_SIZES if task not in results]
    if absent:
        missing[f"GLUE: {', '.join(absent)}"] = (
            f"python -m tools.finetune --ckpt={cfg.ckpt} --data={cfg.data}/full_eval/glue_filtered "
            f"--rules={cfg.rules} --out_dir={cfg.glue} --tasks={','.join(absent)}")
    return results


# --- what is handed in ----------------------------------------------------------------------------

def write_tree(cfg, by_revision, learned, tuned, collated):
    """The files that the official scripts write; says if there are others."""
    written = {collated}
    for names, content in official_files(cfg, by_revision, learned, tuned):
        path = in_results(cfg, *names)
        (write_lines if path.endswith(".txt") else write_json)(path, content)
        written.add(path)
    folder = os.path.dirname(collated)
    others = sorted({os.path.join(at, name) for at, _, names in os.walk(folder) for name in names} - written)
    if others:
        print(f"notice: {len(others)} files in {folder} are not of this hand-in, as {others[0]}: delete "
              "them, or name another --out")


def official_files(cfg, by_revision, learned, tuned):
    """(names of folders and file, its lines or what is JSON in it)"""
    for revision, results in by_revision.items():
        for task in TASKS:
            if cfg.rules in task.rules and task.key in results:
                result, name = results[task.key], task.full if revision == "main" else task.fast
                where = ("reading",) if task.key == "reading" else (task.folder, name)
                where = (revision, "zero_shot", "causal", *where)
                yield (*where, "predictions.json"), result["predictions"]
                report = "report.txt" if task.key == "reading" else "best_temperature_report.txt"
                yield (*where, report), report_lines(result)
    if learned:
        where = ("main", "zero_shot", "causal", "AoA_word")
        yield (*where, "surprisal.json"), learned["predictions"]
        if cfg.rules == "2026" and learned["complete"]:
            yield (*where, "aoa_score.json"), {"aoa": learned["score"]}
    for task, result in tuned.items():
        yield ("main", "finetune", task, "predictions.json"), result["predictions"]
        scores = [f"{name}: {result[name]}\n" for name in ("accuracy", "f1", "mcc") if name in result]
        yield ("main", "finetune", task, "results.txt"), scores


def report_lines(result):
    """A score by UID, in %, and the average."""
    yield from (f"{uid}: {100 * share:.2f}\n" for uid, share in result["shares"].items())
    yield f"\nAVERAGE\n{result['reading'] if 'reading' in result else score(result):.2f}\n"


def hand_in(cfg, full, fast, learned, tuned):
    """The collated file. fast: results of each official checkpoint in order, {} of one that is not there."""
    def handed(result, part):
        return result[part] if result.get("complete") else None
    tasks = [task for task in TASKS if cfg.rules in task.rules]
    surprisals = handed(learned, "predictions")
    collated = {task.key: handed(full.get(task.key, {}), "predictions") for task in tasks}
    collated |= dict(aoa=surprisals) if cfg.rules == "2025" else dict(
        aoa_surprisals=surprisals, aoa={"aoa": learned["score"]} if surprisals else None)
    collated["glue"] = {}
    for result in tuned.values():
        collated["glue"] |= handed(result, "predictions") or {}
    collated["fast_eval_results"] = {
        task.key: [handed(results.get(task.key, {}), "shares") for results in fast]
        for task in tasks if task.fast}
    return collated


# --- the scores -----------------------------------------------------------------------------------

def scores_and_means(cfg, full, learned, tuned):
    """Of each key its Score; of each benchmark the mean of its keys that are there; and the means of those:
    officially what is missing, or not complete, counts 0."""
    scores = {}
    for key, result in full.items():
        value = result["reading"] if key == "reading" else score(result)
        se = None if key == "reading" or "rho" in result else 100 * result["se"]
        n = result["rows"][reading.SELF_PACED] if key == "reading" else result["n"]
        scores[key] = Score(value, se, n, result["complete"])
    if learned:
        scores["aoa"] = Score(100 * learned["score"], None, learned["n_words"], learned["complete"])
    for task, result in tuned.items():
        rows = result["predictions"][task]["predictions"]
        scores[task] = Score(100 * result[glue.TASKS[task][2]], None, len(rows), result["complete"])
    benchmarks, official = {}, {}
    for title, keys in BENCHMARKS[cfg.rules].items():
        there = [scores[key] for key in keys if key in scores]
        errors = [score.se for score in there]
        official[title] = sum(score.value for score in there if score.complete) / len(keys)
        benchmarks[title] = dict(
            score=mean(score.value for score in there) if there else None,
            se=math.hypot(*errors) / len(there) if there and None not in errors else None,
            n=sum(score.n for score in there), there=len(there), of=len(keys),
            complete=len(there) == len(keys) and all(score.complete for score in there))
    return dict(scores={key: score._asdict() for key, score in scores.items()}, benchmarks=benchmarks,
                means=means(cfg.rules, official, [row["score"] for row in benchmarks.values()]))


def means(rules, official, there):
    """official: {benchmark: %, 0 where it is missing, None where it is not known}; there: % or None."""
    found = {f"overall, the mean of {len(official)}, missing = 0": mean(official.values())}
    if rules == "2026":
        human = ("reading", "AoA")
        found["NLP, of 7"] = mean(value for title, value in official.items() if title not in human)
        found["human-like, of 2"] = mean(official[title] for title in human)
    there = [value for value in there if value is not None]
    return found | ({f"mean of the {len(there)} that are there": mean(there)} if there else {})


def mean(values):
    values = list(values)
    return None if None in values else sum(values) / len(values)


def print_table(cfg, result):
    """Ours beside the organisers' baselines, and what is missing."""
    def cell(value, se=None, mark=""):
        error = "" if se is None else f" ± {se:.2f}"
        return "" if value is None else f"{value:.2f}{error}{mark}"
    published = PUBLISHED[cfg.rules][cfg.track]
    print(f"\n| rules of {cfg.rules}, {cfg.track}, % | {result['name']} | " + " | ".join(published) + " |")
    print("|---|---:|" + "---:|" * len(published))
    for i, (title, row) in enumerate(result["benchmarks"].items()):
        parts = f" ({row['there']} of {row['of']})" * (0 < row["there"] < row["of"])
        ours = cell(row["score"], row["se"], "" if row["complete"] or row["score"] is None else "*")
        print(f"| {title}{parts} | {ours} | " + " | ".join(cell(theirs[i]) for theirs in published.values())
              + " |")
    baselines = [means(cfg.rules, dict(zip(BENCHMARKS[cfg.rules], theirs)), theirs)
                 for theirs in published.values()]
    for i, (title, value) in enumerate(result["means"].items()):
        theirs = [cell([*row.values()][i]) if "there" not in title else "" for row in baselines]
        print(f"| {title} | {cell(value)} | " + " | ".join(theirs) + " |")
    print("\nWUG, AoA: correlations x 100; GLUE: F1 of MRPC and QQP, else accuracy; reading: mean gain in R2."
          + "\n* not as many items as officially" * any(
              row["score"] is not None and not row["complete"] for row in result["benchmarks"].values())
          + "\nThe challenge of 2025 has published no formula: a plain mean." * (cfg.rules == "2025"))
    for what, remedy in result["missing"].items():
        print(f"missing: {what}: {remedy}")


if __name__ == "__main__":
    launch(main, SubmitConfig)
