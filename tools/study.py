"""A study: runs that belong together, over several seeds, some of them taught by others; one results file and one table.

    python -m tools.study config/demo/study.py --seeds=1,2,3         # on what `make demo` left: recipes side by side, mean ± deviation
    python -m tools.study config/study/reverse_distillation.py --nproc_per_node=4    # nine generations, each taught by earlier ones
    python -m tools.study --runs="gpt2_10m config/gpt2_10m.py config/cpu.py" --seeds=1,2,3 --out_dir=out/seeds   # any config

A run is one line, "name config_file teacher teacher ...". A teacher is an earlier run of the study (of the
same seed) or any run folder; with none it is plain training. Further config files and flags may stand in the
line too: --init_from may name an earlier run, --seed=+100 is 100 more than the study's seed (for teachers that
differ by seed alone). "name ensemble run run ..." trains nothing: it is the runs' averaged logits.
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
from typing import Literal

import config
import disk
from compare import spread
from distill import DistillConfig, teacher_dtypes
from model import check_model_config
from runs import differences
from train import TrainConfig, check_loop_config


@dataclass
class StudyConfig:
    runs: tuple[str, ...] = ()         # "name config_file teacher ...", in order
    seeds: tuple[str, ...] = ()        # each run once for each of these; () = once, with its config's seed
    settings: tuple[str, ...] = ()     # for every run: config files and flags that its own line wins over
    data_dir: str = "data/babylm"      # a run's own --data_dir wins
    out_dir: str = "out/study"         # a run folder each, and results.jsonl
    blimp: tuple[str, ...] = ()        # folders of minimal pairs to score each run on
    test_loss: bool = False            # also the loss on the data's test split, on as many chunks as for validation
    eval_dtype: Literal["float32", "bfloat16"] = "float32"  # for eval_blimp.py
    nproc_per_node: int = 0            # GPUs: each run under torchrun; 0 = one process


def main(cfg):
    if not cfg.runs:
        sys.exit("error: no runs; name a config that lists them: python -m tools.study config/demo/study.py")
    for folder in cfg.blimp:
        if not os.path.isdir(folder):
            sys.exit(f"error: no folder of minimal pairs '{folder}'; name one that is there with --blimp (demo/ is what `make demo` leaves)")
    pairs = dict(map(pairs_sha256, cfg.blimp))
    if len(pairs) < len(cfg.blimp):
        sys.exit("error: two of the folders of minimal pairs have the same name")
    if "," in "".join((cfg.out_dir, *cfg.blimp)):
        sys.exit("error: out_dir and blimp cannot have a comma in a folder's name: it parts the folders of a list")
    config.check_seeds(cfg.seeds)
    plan = []
    for seed in cfg.seeds or ("",):  # mistakes show before the first is trained
        for line in cfg.runs:
            plan.append(plan_run(cfg, line, seed, pairs, plan))
    results = read_results(cfg)
    for run in plan:
        begun, row = {key: run[key] for key in BEGUN}, results.get(run["name"])
        in_folder = disk.checkpoint_steps(run["folder"])
        if row is None and in_folder:
            sys.exit(f"error: {run['folder']} holds a run that {cfg.out_dir}/results.jsonl does not know; delete the folder, or name another --out_dir")
        if row is None or "val_ce" not in row and not in_folder:  # nothing came of it: its settings may have been the mistake
            row = begun
        if {key: row[key] for key in begun} != begun:
            sys.exit(f"error: {cfg.out_dir}/results.jsonl has '{run['name']}' with other settings or data ({what_changed(run)}); "
                     "delete its line and its folder to run it again, or name another --out_dir")
        if "val_ce" in row:
            if all(map(os.path.isdir, run["scored"])) and row["weights_sha256"] != list(map(disk.weights_sha256, run["scored"])):
                sys.exit(f"error: the weights in {', '.join(run['scored'])} are not those that {cfg.out_dir}/results.jsonl has for '{run['name']}'; name another --out_dir")
            continue
        for path in run["needs"]:
            if not os.path.isdir(path):
                sys.exit(f"error: {path} is needed for '{run['name']}' and is gone: delete its line in {cfg.out_dir}/results.jsonl to train it again")
        results[run["name"]] = begun
        write_results(cfg, results)
        print(f"\n=== {run['name']}", flush=True)
        results[run["name"]] = {**begun, **train_and_score(cfg, run, pairs)}
        write_results(cfg, results)
    table([results[run["name"]] for run in plan])


def plan_run(cfg, line, seed, pairs, plan):
    """What to do for a line of `runs` with a seed, after the runs of `plan`: name, recipe, folder, kind, arguments and settings,
    the folders it is scored by and those it needs, and hashes of settings and data."""
    recipe, *words = line.split() or [""]
    of_seed = {run["recipe"]: run for run in plan if run["study_seed"] == seed}
    trained = {name: run for name, run in of_seed.items() if run["kind"] != "ensemble"}
    own = [w for w in words if w.startswith("--") or w.endswith(".py")]
    others = [w for w in words if w not in own]
    kind = "ensemble" if others[:1] == ["ensemble"] and not own else "distill.py" if others else "train.py"
    others = others[kind == "ensemble":]
    if not (own or kind == "ensemble" and others) or recipe in of_seed or not re.fullmatch(r"\w[\w-]*", recipe):
        sys.exit(f"error: run '{line}' is not 'name config_file teacher ...' or 'name ensemble run ...' with a new name of letters, digits, - and _")
    for other in others:
        if other not in trained and not os.path.isdir(other) or others.count(other) > 1:
            sys.exit(f"error: {recipe}'s {'member' if kind == 'ensemble' else 'teacher'} '{other}' is neither an earlier run of the study nor a run folder, or stands there twice")
    name = f"{recipe}@{seed}" if seed else recipe
    folder = os.path.join(cfg.out_dir, name)
    others = [trained[w]["folder"] if w in trained else w for w in others]
    if kind == "ensemble":
        argv, settings = [], ensemble_settings(cfg, recipe, others, plan)
        settings.seed = int(seed or settings.seed)
    else:
        argv, settings = run_settings(cfg, recipe, own, others, seed, folder, trained)
    meta = disk.read_meta(settings.data_dir)
    test_chunks = (sum(s["tokens"] for s in meta["shards"] if s["split"] == "test") - 1) // settings.seq_len
    if cfg.test_loss and test_chunks < max(settings.eval_chunks, 1):
        sys.exit(f"error: test_loss: {settings.data_dir} has a test split of {max(test_chunks, 0)} chunks, eval_chunks={settings.eval_chunks}; prepare it again with one")
    known = {run["folder"]: run["settings_sha256"] for run in plan}
    run = dict(name=name, recipe=recipe, study_seed=seed, folder=folder, kind=kind, argv=argv, settings=settings,
               scored=others if kind == "ensemble" else [folder], needs=[path for path in (*others, settings.init_from) if path in known],
               settings_sha256=settings_sha256(settings, known, members=[known.get(o) or disk.weights_sha256(o) for o in others],
                                               kind=kind, blimp=pairs, eval_dtype=cfg.eval_dtype, test_loss=cfg.test_loss),
               data_sha256=disk.data_sha256(meta))
    for same in plan:
        if all(run[key] == same[key] for key in ("settings_sha256", "data_sha256")):
            sys.exit(f"error: runs {same['name']} and {name} are the same: settings, seed {settings.seed} and data")
    return run


def run_settings(cfg, recipe, own, teachers, seed, folder, trained):
    """Arguments for train.py or distill.py, and what they resolve to. A run's own files and flags win over the study's."""
    more = next((w for w in own if re.fullmatch(r"--seed=\+\d+", w)), "")
    theirs = ("--out_dir", "--teachers", "--resume", "--overwrite", *(["--seed"] if seed else []))
    for word in (w for w in [*own, *cfg.settings] if w.split("=")[0] in theirs and w != more):
        sys.exit(f"error: {word} in run '{recipe}' is study.py's to say; see its --help")
    own = [f"--init_from={trained[w[12:]]['folder']}" if w.startswith("--init_from=") and w[12:] in trained else w for w in own if w != more]
    words = [*cfg.settings, *own]
    argv = [w for w in words if not w.startswith("--")] + [f"--data_dir={cfg.data_dir}"] + [w for w in words if w.startswith("--")] + [f"--out_dir={folder}"]
    if teachers:
        argv.append(f"--teachers={','.join(teachers)}")
    settings = config.configure(DistillConfig if teachers else TrainConfig, argv)
    settings.seed = int(seed or settings.seed) + int(more[8:] or 0)
    check_loop_config(settings)
    check_model_config(settings)
    if teachers:
        teacher_dtypes(settings)
    if (cfg.blimp or cfg.test_loss) and not settings.causal:
        sys.exit(f"error: run '{recipe}' is a masked language model (causal=False): it cannot be scored, nor taught")
    return [*argv, f"--seed={settings.seed}"], settings


def ensemble_settings(cfg, recipe, members, plan):
    """On which chunks an ensemble is measured: on those that its members were validated on."""
    measured = []
    for path in members:
        of_plan = next((run["settings"] for run in plan if run["folder"] == path), None)
        own = asdict(of_plan) if of_plan else {**disk.read_checkpoint_config(disk.find_checkpoint(path)).get("train_config", {}), "data_dir": cfg.data_dir}
        measured.append({key: own[key] for key in ("data_dir", "seq_len", "eval_chunks") if key in own})
    if any(m != measured[0] for m in measured):
        sys.exit(f"error: the members of '{recipe}' were not validated on the same chunks: {measured}")
    return TrainConfig(**measured[0])


def settings_sha256(settings, known={}, **more):
    """SHA-256 of what a run is, not where and how it is run. Other runs count by their weights, or by their own hash in `known`."""
    hashed = {**asdict(settings), **more}
    for key in WHERE:
        del hashed[key]
    for key in ("teachers", "init_from", "generator"):
        paths = hashed.get(key) or ()
        hashed[key] = [known.get(path) or disk.weights_sha256(path) for path in ([paths] if isinstance(paths, str) else paths)]
    return hashlib.sha256(json.dumps(hashed).encode()).hexdigest()


WHERE = ("data_dir", "out_dir", "device", "compile", "micro_batch_size", "log_interval", "wandb", "tensorboard")


def what_changed(run):
    path = os.path.join(run["folder"], "train_config.json")
    old = disk.read_json(path) if os.path.isfile(path) else {}
    now = json.loads(json.dumps(asdict(run["settings"])))
    return old and differences(old, now, (*WHERE, "resume", "overwrite")) or "its data, its pairs, or a run it was taught by"


def pairs_sha256(folder):
    """Name of a folder of minimal pairs, and SHA-256 of its files."""
    files = sorted(f for f in os.listdir(folder) if f.endswith(".jsonl"))
    listing = json.dumps([(f, disk.sha256(os.path.join(folder, f))) for f in files])
    return os.path.basename(os.path.normpath(folder)), hashlib.sha256(listing.encode()).hexdigest()


def train_and_score(cfg, run, pairs):
    """Train or resume a run, score its best checkpoint, and give what the results say of it. An ensemble is scored alone."""
    folder, settings = run["folder"], run["settings"]

    def score(out, *flags):
        command("eval_blimp.py", f"--ckpt={','.join(run['scored'])}", *flags, f"--dtype={cfg.eval_dtype}", f"--out={folder}/{out}", quiet=True)
        return disk.read_json(os.path.join(folder, out), ["folders"])

    def loss_on(split):
        return [f"--data_dir={settings.data_dir}", f"--split={split}", f"--eval_chunks={settings.eval_chunks}", f"--seq_len={settings.seq_len}"]

    scores, ensemble_val_ce = dict(folders={}), None
    if run["kind"] == "ensemble":
        os.makedirs(folder, exist_ok=True)
        val_ce = score("val.json", *loss_on("val"))["val_ce"]
    else:
        command(run["kind"], *run["argv"], "--resume", nproc=cfg.nproc_per_node)
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            ensemble_val_ce = json.loads(f.readline()).get("ensemble_val_ce")  # its teachers'
    if cfg.blimp or cfg.test_loss:
        scores = score("blimp.json", *[f"--data={','.join(cfg.blimp)}"] * bool(cfg.blimp), *loss_on("test") * cfg.test_loss)
    members = [disk.read_checkpoint_config(disk.find_checkpoint(path)) for path in run["scored"]]
    about = {key: members[0].get(key) for key in ("teachers", "words", "step", "val_ce", "git_revision", "torch", "hardware")}
    if run["kind"] == "ensemble":
        about.update(teachers=run["scored"], step=None, val_ce=val_ce, git_revision=disk.git_revision())
    return dict(about, kind=run["kind"], teachers=about["teachers"] or [], seed=settings.seed, parameters=sum(m["parameters"] for m in members),
                weights_sha256=list(map(disk.weights_sha256, run["scored"])), test_ce=scores.get("test_ce"), ensemble_val_ce=ensemble_val_ce,
                accuracy={name: scores["folders"][name]["accuracy"] for name in scores["folders"]}, pairs_sha256=pairs)


def command(script, *args, nproc=0, quiet=False):
    """Show the command a user would type, and run it with this Python. Ends the study if it fails."""
    print("$", shlex.join([script, *args]), flush=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc else []
    here = os.path.dirname(os.path.abspath(__file__))
    child = subprocess.Popen([sys.executable, *launcher, os.path.join(here, script), *args], stdout=subprocess.DEVNULL if quiet else None,
                             start_new_session=True)  # a signal reaches it from here alone, and it saves first
    before = [(s, signal.signal(s, lambda *_: child.terminate())) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    child.wait()
    for s, handler in before:
        signal.signal(s, handler)
    if child.returncode:
        sys.exit(f"error: {script} ended with code {child.returncode}, the reason is above; the same command goes on with what is done so far")


# --- results.jsonl ----------------------------------------------------------------------------------

BEGUN = ("name", "recipe", "settings_sha256", "data_sha256")
NUMBERS = ("parameters", "val_ce", "test_ce", "ensemble_val_ce", "seed", "words", "step")  # of a finished run; None where there is none
DONE = (*NUMBERS, "kind", "teachers", "weights_sha256", "accuracy", "pairs_sha256", "git_revision", "hardware")


def read_results(cfg):
    """name -> its line of results.jsonl, and the study's folder locked."""
    os.makedirs(cfg.out_dir, exist_ok=True)
    disk.lock(cfg.out_dir)
    if os.path.exists(os.path.join(cfg.out_dir, "journal.log")):
        sys.exit(f"error: {cfg.out_dir} holds a sweep; name another --out_dir")
    path = os.path.join(cfg.out_dir, "results.jsonl")
    return {row["name"]: row for row in result_rows(path)} if os.path.isfile(path) else {}


def result_rows(path):
    """The rows of a results file, each begun or done."""
    rows = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for n, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                good = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in BEGUN) and ("val_ce" not in row or is_done(row))
            except ValueError:
                good = False
            if not good or any(row["name"] == other["name"] for other in rows):
                sys.exit(f"error: {path}, line {n}, is damaged, there twice or of older code; delete the line and its run's folder to run it again, or name another --out_dir")
            rows.append(row)
    return rows


def is_done(row):
    def number(x):
        return type(x) in (int, float) and math.isfinite(x)
    return set(DONE) <= row.keys() and number(row["val_ce"]) and all(row[key] is None or number(row[key]) for key in NUMBERS) and \
        isinstance(row["teachers"], list) and all(isinstance(t, str) for t in row["teachers"]) and isinstance(row["accuracy"], dict) and \
        all(map(number, row["accuracy"].values())) and isinstance(row["pairs_sha256"], dict)


def write_results(cfg, results):
    """One line a run: as it was begun, then with what came of it."""
    disk.write_lines(os.path.join(cfg.out_dir, "results.jsonl"), [json.dumps(row) + "\n" for row in results.values()])


def table(rows):
    """A row a recipe: mean ± standard deviation over its seeds. Columns that say nothing are left out."""
    recipes = {}
    for row in rows:
        recipes.setdefault(row["recipe"], []).append(row)
    columns = {"seeds": lambda own: str(len(own))}
    if any(row["teachers"] for row in rows):
        columns["taught by"] = taught_by
    columns["parameters"] = lambda own: f"{own[0]['parameters']:,}"
    if len({row["words"] for row in rows}) > 1:
        columns["words"] = lambda own: f"{own[0]['words']:,}" if own[0]["words"] else ""
    for key, title in (("ensemble_val_ce", "its teachers' ensemble"), ("val_ce", "validation loss"), ("test_ce", "test loss")):
        if any(row[key] is not None for row in rows):
            columns[title] = lambda own, key=key: spread([row[key] for row in own], 4) if own[0][key] is not None else ""
    for folder in rows[0]["accuracy"]:
        columns[f"{folder}, %"] = lambda own, folder=folder: spread([100 * row["accuracy"][folder] for row in own], 2)
    print(f"\n| run | {' | '.join(columns)} |\n|---|" + "".join("---|" if title == "taught by" else "---:|" for title in columns))
    for recipe, own in recipes.items():
        print(f"| {recipe} | {' | '.join(column(own) for column in columns.values())} |")
    point_out_others(rows)


def point_out_others(rows):
    """Say which rows other code or hardware made."""
    for what, now in (("git_revision", disk.git_revision()), ("hardware", rows[-1]["hardware"])):
        others = [row["name"] for row in rows if row[what] != now]
        if others:
            print(f"notice: {len(others)} of {len(rows)} runs are of another {what} than {now}: {', '.join(others[:8])}")


def taught_by(own):
    names = ", ".join(os.path.basename(os.path.normpath(t)).split("@")[0] for t in own[0]["teachers"])
    return f"(ensemble of {names})" if own[0]["kind"] == "ensemble" else names


if __name__ == "__main__":
    config.run(main, StudyConfig)
