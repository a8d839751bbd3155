"""A study: runs that belong together, over several seeds, some of them taught by others; one results file and
one table.

    python -m tools.study config/demo/study.py --seeds=1,2,3     # on what `make demo` left: mean ± deviation
    python -m tools.study config/study/reverse_distillation.py --nproc_per_node=4   # nine generations
    python -m tools.study --runs="gpt2_10m config/gpt2_10m.py config/cpu.py" --seeds=1,2,3 --out_dir=out/seeds
    python -m tools.study --table=config/study/million.jsonl --against=babyllama   # of a results file, no run

A run is one line, "name config_file teacher teacher ...". A teacher is an earlier run of the study (of the
same seed) or any run folder; with none it is plain training. Further config files and flags may stand in the
line too: --init_from may name an earlier run, --seed=+100 is 100 more than the study's seed (for teachers
that differ by seed alone). "name ensemble run run ..." trains nothing: it is the runs' averaged logits.
Each is trained by train.py or distill.py and scored by eval_blimp.py. Repeat the command to go on: what is in
results.jsonl is skipped, a run that was cut short is resumed, one whose settings or data have changed is
refused, and other code is pointed out.
"""
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Literal, NamedTuple

import numpy as np

from distill import DistillConfig, teacher_dtypes
from lib.checkpoints import checkpoint_steps, find_checkpoint, read_checkpoint_config, weights_sha256
from lib.configurator import ROOT, check_seeds, configure, differences, launch, non_defaults
from lib.files import git_revision, lock, parse_json, read_json, regular, sha256, write_lines
from lib.shards import data_sha256, read_meta
from model import check_model_config
from tools.compare import spread
from train import TrainConfig, check_loop_config


@dataclass
class StudyConfig:
    runs: tuple[str, ...] = ()         # "name config_file teacher ...", in order
    seeds: tuple[str, ...] = ()        # each run once for each of these; () = once, with its config's seed
    settings: tuple[str, ...] = ()     # for every run: files before its own, flags before its own
    data_dir: str = ""                 # for every run but one with --data_dir in its line; '' = its config's
    out_dir: str = "out/study"         # a run folder each, and results.jsonl
    blimp: tuple[str, ...] = ()        # folders of minimal pairs to score each run on
    test_loss: bool = False            # also the loss on the test split, on as many chunks as for validation
    eval_dtype: Literal["float32", "bfloat16"] = "float32"  # for eval_blimp.py
    nproc_per_node: int = 0            # GPUs: each run under torchrun; 0 = one process
    against: str = ""                  # a recipe: also a table of differences from it, seed by seed
    table: str = ""                    # a results file: its table, and nothing is run


class Run(NamedTuple):
    """What a line of `runs` asks for with one seed."""
    name: str            # recipe@seed, or the recipe alone
    recipe: str
    study_seed: str      # '' = the study has none
    folder: str
    kind: str            # the script that trains it, or "ensemble"
    argv: list           # that script's arguments
    cfg: TrainConfig     # what they come to
    scored: list         # the run folders it is scored by: its own, or an ensemble's members
    needs: list          # folders of earlier runs that it is made from
    settings: dict       # what makes it what it is: see origin()
    data_sha256: str


def main(cfg):
    if cfg.table:
        rows = finished_rows(cfg.table)
        if not rows:
            sys.exit(f"error: {cfg.table} has no finished run; repeat the command of its study")
        check_against(cfg.against, [row["recipe"] for row in rows])
        return table(rows, cfg.against)
    pairs = check_study(cfg)
    plan = []
    for seed in cfg.seeds or ("",):  # mistakes show before the first is trained
        for line in cfg.runs:
            plan.append(plan_run(cfg, line, seed, pairs, plan))
    check_against(cfg.against, [run.recipe for run in plan])
    results = read_results(cfg)
    point_out_older(cfg, plan, results)
    for run in plan:
        if is_finished(cfg, run, results.get(run.name)):
            continue
        for path in run.needs:
            if not os.path.isdir(path):
                sys.exit(f"error: {path} is needed for '{run.name}' and is gone: delete its line in "
                         f"{cfg.out_dir}/results.jsonl to train it again")
        begun = {key: getattr(run, key) for key in BEGUN}
        results[run.name] = begun
        write_results(cfg, results)
        print(f"\n=== {run.name}", flush=True)
        results[run.name] = {**begun, **train_and_score(cfg, run, pairs)}
        write_results(cfg, results)
    rows = [results[run.name] for run in plan]
    table(rows, cfg.against)
    point_out_others(rows)


# --- the plan -------------------------------------------------------------------------------------

def check_study(cfg):
    """{name: SHA-256} of the folders of minimal pairs; or exit with one line."""
    if not cfg.runs:
        sys.exit("error: no runs; name a config that lists them: python -m tools.study config/demo/study.py")
    pairs = check_pairs(cfg)
    check_seeds(cfg.seeds)
    return pairs


def check_against(against, recipes):
    if against and against not in recipes:
        sys.exit(f"error: against={against} is none of the recipes: {', '.join(dict.fromkeys(recipes))}")


def check_pairs(cfg):
    """{name: SHA-256} of the folders of minimal pairs, also for tools/sweep.py; or exit with one line."""
    for folder in cfg.blimp:
        if not os.path.isdir(folder):
            sys.exit(f"error: no folder of minimal pairs '{folder}'; name one that is there with --blimp "
                     "(demo/ is what `make demo` leaves)")
    pairs = dict(map(pairs_sha256, cfg.blimp))
    if len(pairs) < len(cfg.blimp):
        sys.exit("error: two of the folders of minimal pairs have the same name")
    if "," in "".join((cfg.out_dir, *cfg.blimp)):
        sys.exit("error: out_dir and blimp cannot have a comma in a folder's name: it parts the folders of a "
                 "list")
    return pairs


def pairs_sha256(folder):
    """Name of a folder of minimal pairs, and SHA-256 of its files."""
    files = sorted(f for f in os.listdir(folder) if f.endswith(".jsonl"))
    listing = [(f, sha256(regular(os.path.join(folder, f)))) for f in files]
    return os.path.basename(os.path.normpath(folder)), json_sha256(listing)


def json_sha256(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def plan_run(cfg, line, seed, pairs, plan):
    """The Run of a line of `runs` with a seed, after the runs of `plan`."""
    earlier = {run.recipe: run for run in plan if run.study_seed == seed}
    trained = {recipe: run.folder for recipe, run in earlier.items() if run.kind != "ensemble"}
    recipe, kind, words, others = read_line(line, earlier, trained)
    name = f"{recipe}@{seed}" if seed else recipe
    folder = os.path.join(cfg.out_dir, name)
    others = [trained.get(other, other) for other in others]
    facts = dict(kind=kind, pairs=pairs, eval_dtype=cfg.eval_dtype, test_loss=cfg.test_loss)
    if kind == "ensemble":
        argv, run_cfg, scored = [], ensemble_config(cfg, recipe, others, plan), others
        run_cfg.seed = int(seed or run_cfg.seed)
        facts["members"] = others
    else:
        argv, run_cfg = run_config(cfg, recipe, words, others, seed, folder, trained)
        scored = [folder]
    meta = read_meta(run_cfg.data_dir)
    check_scored(cfg, recipe, run_cfg, meta)
    known = {run.folder: json_sha256([run.settings, run.data_sha256]) for run in plan}
    run = Run(name, recipe, seed, folder, kind, argv, run_cfg, scored,
              needs=[path for path in (*others, run_cfg.init_from) if path in known],
              settings=origin(run_cfg, known, **facts), data_sha256=data_sha256(meta))
    for same in plan:
        if same.settings == run.settings and same.data_sha256 == run.data_sha256:
            sys.exit(f"error: runs {same.name} and {name} are the same: settings, seed {run_cfg.seed} and "
                     "data")
    return run


def read_line(line, earlier, trained):
    """A line's recipe, kind, config files and flags, and the teachers or members it names."""
    recipe, *words = line.split() or [""]
    others = [w for w in words if not w.startswith("--") and not w.endswith(".py")]
    words = [w for w in words if w not in others]
    kind = "distill.py" if others else "train.py"
    if others[:1] == ["ensemble"] and not words:
        kind, others = "ensemble", others[1:]
    complete = others if kind == "ensemble" else words
    if not complete or recipe in earlier or not re.fullmatch(r"\w[\w-]*", recipe):
        sys.exit(f"error: run '{line}' is not 'name config_file teacher ...' or 'name ensemble run ...' with "
                 "a new name of letters, digits, - and _")
    role = "member" if kind == "ensemble" else "teacher"
    for other in others:
        if other not in trained and not os.path.isdir(other) or others.count(other) > 1:
            sys.exit(f"error: {recipe}'s {role} '{other}' is neither an earlier run of the study nor a run "
                     "folder, or stands there twice")
    return recipe, kind, words, others


def run_config(cfg, recipe, words, teachers, seed, folder, trained):
    """Arguments for train.py or distill.py, and what they come to. A run's own files win over the study's,
    its flags over the study's, and any flag over any file."""
    added = next((w for w in words if re.fullmatch(r"--seed=\+\d+", w)), "")
    ours = ("--out_dir", "--teachers", "--resume", "--overwrite", *(["--seed"] if seed else []))
    for word in (*words, *cfg.settings):
        if word.split("=")[0] in ours and word != added:
            sys.exit(f"error: {word} in run '{recipe}' is study.py's to say; see its --help")
    init_from = {f"--init_from={recipe}": f"--init_from={path}" for recipe, path in trained.items()}
    words = [*cfg.settings, *(init_from.get(w, w) for w in words if w != added)]
    files, flags = ([w for w in words if w.startswith("--") == wanted] for wanted in (False, True))
    argv = [*files, *([f"--data_dir={cfg.data_dir}"] if cfg.data_dir else []), *flags, f"--out_dir={folder}"]
    if teachers:
        argv.append(f"--teachers={','.join(teachers)}")
    run_cfg = configure(DistillConfig if teachers else TrainConfig, argv)
    run_cfg.seed = int(seed or run_cfg.seed) + int(added.removeprefix("--seed=+") or 0)
    run_cfg.vocab_size = run_cfg.vocab_size or read_meta(run_cfg.data_dir)["vocab_size"]
    check_loop_config(run_cfg)
    check_model_config(run_cfg)
    if teachers:
        teacher_dtypes(run_cfg)
    return [*argv, f"--seed={run_cfg.seed}"], run_cfg


def ensemble_config(cfg, recipe, members, plan):
    """On which chunks an ensemble is measured: on those that its members were validated on."""
    planned, measured = {run.folder: asdict(run.cfg) for run in plan}, []
    on = {"data_dir": cfg.data_dir} if cfg.data_dir else {}
    for path in members:
        if path not in planned:
            described = read_checkpoint_config(find_checkpoint(path))
            planned[path] = {**described.get("train_config", {}), **on}
        theirs = planned[path]
        measured.append({key: theirs[key] for key in ("data_dir", "seq_len", "eval_chunks") if key in theirs})
    if any(m != measured[0] for m in measured):
        sys.exit(f"error: the members of '{recipe}' were not validated on the same chunks: {measured}")
    return TrainConfig(**measured[0])


def check_scored(cfg, recipe, run_cfg, meta):
    """Exit if a run cannot be scored as cfg asks for."""
    if (cfg.blimp or cfg.test_loss) and not run_cfg.causal:
        sys.exit(f"error: run '{recipe}' is a masked language model (causal=False): it cannot be scored, nor "
                 "taught")
    tokens = sum(s["tokens"] for s in meta["shards"] if s["split"] == "test")
    chunks = (tokens - 1) // max(run_cfg.seq_len, 1)
    if cfg.test_loss and chunks < max(run_cfg.eval_chunks, 1):
        sys.exit(f"error: test_loss: {run_cfg.data_dir} has a test split of {max(chunks, 0)} chunks, "
                 f"eval_chunks={run_cfg.eval_chunks}; prepare it again with one")


# --- what a run is, and whether it is still that --------------------------------------------------

# where and how it is run; data counts by its hash, and the vocabulary is the data's
WHERE_AND_HOW = ("data_dir", "vocab_size", "out_dir", "device", "compile", "micro_batch_size", "log_interval",
                 "wandb", "tensorboard")


def origin(run_cfg, known={}, **facts):
    """What makes a run what it is, for JSON: settings that are not their defaults, the seed, and `facts`.
    Other runs count by their weights, or by their hash in `known` (folder -> hash)."""
    def counted(path):
        return known.get(path) or weights_sha256(path)
    settings = {**non_defaults(run_cfg, ignore=WHERE_AND_HOW), "seed": run_cfg.seed, **facts}
    for key in settings.keys() & {"teachers", "members", "init_from", "generator"}:
        paths = settings[key]
        settings[key] = counted(paths) if isinstance(paths, str) else list(map(counted, paths))
    return settings


def is_finished(cfg, run, row):
    """Whether `row` of the results says all of a run. Exits if what is there is of another run."""
    path, in_folder = f"{cfg.out_dir}/results.jsonl", checkpoint_steps(run.folder)
    if row is None and in_folder:
        sys.exit(f"error: {run.folder} holds a run that {path} does not know; delete the folder, or name "
                 "another --out_dir")
    if row is None or "val_ce" not in row and not in_folder:
        return False  # nothing came of it: its settings may have been the mistake
    changed = changes(row, run)
    if changed:
        sys.exit(f"error: {path} has '{run.name}' with other settings or data ({changed}); delete its line "
                 "and its folder to run it again, or name another --out_dir")
    if "val_ce" not in row:
        return False
    if all(map(os.path.isdir, run.scored)) and row["weights_sha256"] != list(map(weights_sha256, run.scored)):
        sys.exit(f"error: the weights in {', '.join(run.scored)} are not those that {path} has for "
                 f"'{run.name}'; name another --out_dir")
    return True


def changes(row, run):
    """What of a row is no longer so, in words; '' = nothing."""
    if "settings" not in row and "val_ce" not in row:
        return "it was begun by older code, whose settings are not compared"
    then = row["settings"] if "settings" in row else {
        **run.settings, "kind": row["kind"], "seed": row["seed"], "pairs": row["pairs_sha256"],
        "test_loss": row["test_ce"] is not None}  # all that a row of older code says
    return differing(run.cfg, {**then, "data": row["data_sha256"]}, {**run.settings, "data": run.data_sha256})


def differing(run_cfg, then, now):
    """The differences of two origins in words, hashes shortened. Where one has no value it is the default."""
    defaults = asdict(type(run_cfg)())
    text = differences({**defaults, **then}, {**defaults, **now})
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", text)


def point_out_older(cfg, plan, results):
    rows = (results[run.name] for run in plan if run.name in results)
    older = [row["name"] for row in rows if "settings" not in row and "val_ce" in row]
    if older:
        print(f"notice: {cfg.out_dir}/results.jsonl has rows made by older code, whose settings are not "
              f"compared: {', '.join(older)}")


# --- a run ----------------------------------------------------------------------------------------

def train_and_score(cfg, run, pairs):
    """Train or resume a run, score its best checkpoint, and give what the results say of it. An ensemble is
    scored alone."""
    if run.kind != "ensemble":
        command(run.kind, *run.argv, "--resume", nproc=cfg.nproc_per_node)
    return score_run(cfg, run, pairs)


def score_run(cfg, run, pairs):
    """Score what was trained (also by tools/sweep.py), and give what the results say of it."""
    def score(out, *flags):
        command("eval_blimp.py", f"--ckpt={','.join(run.scored)}", *flags, f"--dtype={cfg.eval_dtype}",
                f"--out={run.folder}/{out}", quiet=True)
        return read_json(os.path.join(run.folder, out), ["folders"])

    def loss_on(split):
        return [f"--data_dir={run.cfg.data_dir}", f"--split={split}", f"--eval_chunks={run.cfg.eval_chunks}",
                f"--seq_len={run.cfg.seq_len}"]

    scores, ensemble_val_ce = dict(folders={}), None
    if run.kind == "ensemble":
        os.makedirs(run.folder, exist_ok=True)
        val_ce = score("val.json", *loss_on("val"))["val_ce"]
    else:
        with open(os.path.join(run.folder, "metrics.jsonl")) as f:
            ensemble_val_ce = parse_json(f.readline()).get("ensemble_val_ce")  # its teachers'
    if cfg.blimp or cfg.test_loss:
        blimp = [f"--data={','.join(cfg.blimp)}"] if cfg.blimp else []
        scores = score("blimp.json", *blimp, *(loss_on("test") if cfg.test_loss else []))
    members = [read_checkpoint_config(find_checkpoint(path)) for path in run.scored]
    about = {key: members[0].get(key) for key in ABOUT}
    if run.kind == "ensemble":
        about.update(teachers=run.scored, step=None, val_ce=val_ce, git_revision=git_revision())
    return dict(about, kind=run.kind, teachers=about["teachers"] or [], seed=run.cfg.seed,
                parameters=sum(m["parameters"] for m in members),
                weights_sha256=list(map(weights_sha256, run.scored)),
                test_ce=scores.get("test_ce"), ensemble_val_ce=ensemble_val_ce,
                accuracy={name: folder["accuracy"] for name, folder in scores["folders"].items()},
                pairs_sha256=pairs)


def command(script, *args, nproc=0, quiet=False):
    """Show the command a user would type, and run it with this Python. Ends the study if it fails."""
    print("$", shlex.join([script, *args]), flush=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc else []
    argv = [sys.executable, *launcher, os.path.join(ROOT, script), *args]
    # in a session of its own a signal reaches it from here alone, and it saves first
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL if quiet else None, start_new_session=True)
    before = {s: signal.signal(s, lambda *_: child.terminate())
              for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    child.wait()
    for s, handler in before.items():
        signal.signal(s, handler)
    if child.returncode:
        sys.exit(f"error: {script} ended with code {child.returncode}, the reason is above; the same command "
                 "goes on with what is done so far")


# --- results.jsonl --------------------------------------------------------------------------------

BEGUN = ("name", "recipe", "settings", "data_sha256")  # older code: settings_sha256, a hash of all of them
ABOUT = ("teachers", "words", "step", "val_ce", "git_revision", "torch", "hardware")  # from a checkpoint
NUMBERS = ("parameters", "val_ce", "test_ce", "ensemble_val_ce", "seed", "words", "step")  # or None
DONE = (*NUMBERS, "kind", "teachers", "weights_sha256", "accuracy", "pairs_sha256", "git_revision",
        "hardware")


def read_results(cfg):
    """name -> its line of results.jsonl, and the study's folder locked."""
    os.makedirs(cfg.out_dir, exist_ok=True)
    lock(cfg.out_dir)
    if os.path.exists(os.path.join(cfg.out_dir, "journal.log")):
        sys.exit(f"error: {cfg.out_dir} holds a sweep; name another --out_dir")
    path = os.path.join(cfg.out_dir, "results.jsonl")
    return {row["name"]: row for row in result_rows(path)} if os.path.exists(path) else {}


def result_rows(path):
    """The rows of a results file, each begun or done."""
    rows = []
    with open(regular(path), encoding="utf-8", errors="replace") as f:
        for n, line in enumerate(f, 1):
            try:
                row = parse_json(line)
                good = is_begun(row) and ("val_ce" not in row or is_done(row))
            except ValueError:
                row, good = None, False
            if isinstance(row, dict) and "state" in row and "accuracy" not in row:
                sys.exit(f"error: {path}, line {n}: a sweep's trial that was not scored; repeat the command "
                         "of the sweep (of pre-training) with --blimp=... or --test_loss")
            if not good or any(row["name"] == other["name"] for other in rows):
                sys.exit(f"error: {path}, line {n}, is damaged, there twice or of older code; delete the "
                         "line and its run's folder to run it again, or name another --out_dir")
            rows.append(row)
    return rows


def finished_rows(path):
    """Also for tools/plot.py."""
    return [row for row in result_rows(path) if "val_ce" in row]


def is_begun(row):
    texts = ("name", "recipe", "data_sha256")
    return (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in texts)
            and (isinstance(row.get("settings"), dict) or isinstance(row.get("settings_sha256"), str)))


def is_done(row):
    def number(x):
        return type(x) in (int, float) and math.isfinite(x)
    return (set(DONE) <= row.keys() and number(row["val_ce"])
            and all(row[key] is None or number(row[key]) for key in NUMBERS)
            and isinstance(row["teachers"], list) and all(isinstance(t, str) for t in row["teachers"])
            and isinstance(row["accuracy"], dict) and all(map(number, row["accuracy"].values()))
            and isinstance(row["pairs_sha256"], dict))


def write_results(cfg, results):
    """One line a run: as it was begun, then with what came of it."""
    lines = [json.dumps(row) + "\n" for row in results.values()]
    write_lines(os.path.join(cfg.out_dir, "results.jsonl"), lines)


# --- the table ------------------------------------------------------------------------------------

LOSSES = (("val_ce", "validation loss"), ("test_ce", "test loss"))
# 97.5% quantiles of Student's t with 1, 2, ... 10 degrees of freedom; the last also stands for more, a
# little wide
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def table(rows, against=""):
    """A row a recipe: mean ± standard deviation over its seeds. Columns that say nothing are left out. Then
    the differences from the recipe `against`."""
    recipes = {}
    for row in rows:
        recipes.setdefault(row["recipe"], []).append(row)
    print_table("run", table_columns(rows), recipes)
    apart = {folder for row in rows for folder in row["accuracy"]} - set(same_pairs(rows))
    if apart:
        print(f"notice: no column for {', '.join(sorted(apart))}: not all of these runs were scored on the "
              "same pairs of it")
    if against:
        reference = {study_seed(row): row for row in recipes.pop(against)}
        print_table(f"minus {against}", difference_columns(rows, reference), recipes)
        print("\n± is half of a 95% interval (Student's t), seeds in pairs; in the table before it the "
              "standard deviation over seeds.")


def print_table(title, columns, recipes):
    rules = ["---|" if column == "taught by" else "---:|" for column in columns]
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|" + "".join(rules))
    for recipe, seeds in recipes.items():
        print(f"| {recipe} | {' | '.join(cell(seeds) for cell in columns.values())} |")


def table_columns(rows):
    """title -> a function from a recipe's rows, one a seed, to what stands in the cell."""
    columns = {"seeds": lambda seeds: str(len(seeds))}
    if any(row["teachers"] for row in rows):
        columns["taught by"] = taught_by
    columns["parameters"] = lambda seeds: f"{seeds[0]['parameters']:,}"
    if len({row["words"] for row in rows}) > 1:
        columns["words"] = lambda seeds: f"{seeds[0]['words']:,}" if seeds[0]["words"] else ""

    def loss(key):
        return lambda seeds: "" if seeds[0][key] is None else spread([row[key] for row in seeds], 4)

    def accuracy(folder):
        return lambda seeds: spread([100 * row["accuracy"][folder] for row in seeds], 2)

    for key, title in (("ensemble_val_ce", "its teachers' ensemble"), *LOSSES):
        if any(row[key] is not None for row in rows):
            columns[title] = loss(key)
    for folder in same_pairs(rows):
        columns[f"{folder}, %"] = accuracy(folder)
    return columns


def difference_columns(rows, reference):
    """As table_columns, of what recipes have less than the rows of `reference`, {study's seed: row}."""
    def column(value, digits):
        return lambda seeds: interval([value(row) - value(reference[study_seed(row)]) for row in seeds
                                       if study_seed(row) in reference], digits)
    columns = {title: column(itemgetter(key), 4) for key, title in LOSSES
               if all(row[key] is not None for row in rows)}
    for folder in same_pairs(rows):
        columns[f"{folder}, points"] = column(lambda row, f=folder: 100 * row["accuracy"][f], 2)
    return columns


def same_pairs(rows):
    """Folders that all rows were scored on, the same pairs in them (also for tools/plot.py)."""
    return [folder for folder in (rows[0]["pairs_sha256"] if rows else ())
            if len({row["pairs_sha256"].get(folder) for row in rows}) == 1]


def interval(values, digits):
    """Mean, and half of its 95% interval (Student's t) where there are several."""
    if len(values) < 2:
        return "".join(f"{value:+.{digits}f}" for value in values)
    half = T95[min(len(values) - 2, len(T95) - 1)] * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{np.mean(values):+.{digits}f} ± {half:.{digits}f}"


def study_seed(row):
    return row["name"].partition("@")[2]


def taught_by(seeds):
    names = ", ".join(os.path.basename(os.path.normpath(t)).split("@")[0] for t in seeds[0]["teachers"])
    return f"(ensemble of {names})" if seeds[0]["kind"] == "ensemble" else names


def point_out_others(rows):
    """Say which rows other code or hardware made."""
    for key, now in (("git_revision", git_revision()), ("hardware", rows[-1]["hardware"])):
        others = [row["name"] for row in rows if row[key] != now]
        if others:
            print(f"notice: {len(others)} of {len(rows)} runs are of another {key} than {now}: "
                  f"{', '.join(others[:8])}")


if __name__ == "__main__":
    launch(main, StudyConfig)
