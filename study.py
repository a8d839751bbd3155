"""A study: runs that belong together, over several seeds, some of them taught by others; one results file and one table.

    python study.py config/demo_study.py --seeds=1,2,3         # on what `make demo` left: recipes side by side, mean ± deviation
    python study.py config/reverse_distillation.py --nproc_per_node=4    # nine generations, each taught by earlier ones
    python study.py --runs="gpt2_10m config/gpt2_10m.py config/cpu.py" --seeds=1,2,3 --out_dir=out/seeds   # any config

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
from train import TrainConfig


@dataclass
class StudyConfig:
    runs: tuple[str, ...] = ()         # "name config_file teacher ...", in order
    seeds: tuple[str, ...] = ()        # each run once for each of these; () = once, with its config's seed
    settings: tuple[str, ...] = ()     # for every run: more config files and flags, such as --max_iters=500
    data_dir: str = "data/babylm"      # a run's own --data_dir wins
    out_dir: str = "out/study"         # a run folder each, and results.jsonl
    blimp: tuple[str, ...] = ()        # folders of minimal pairs to score each run on
    test_loss: bool = False            # also the loss on the data's test split, on as many chunks as for validation
    eval_dtype: Literal["float32", "bfloat16"] = "float32"  # for eval_blimp.py
    nproc_per_node: int = 0            # GPUs: each run under torchrun; 0 = one process


def main(cfg):
    if not cfg.runs:
        sys.exit("error: no runs; name a config that lists them: python study.py config/demo_study.py")
    for folder in cfg.blimp:
        if not os.path.isdir(folder):
            sys.exit(f"error: no folder of minimal pairs '{folder}'")
    if len({os.path.basename(os.path.normpath(folder)) for folder in cfg.blimp}) < len(cfg.blimp):
        sys.exit("error: two of the folders of minimal pairs have the same name")
    config.check_seeds(cfg.seeds)
    pairs = list(map(pairs_sha256, cfg.blimp))
    plan = [plan_run(cfg, i, seed, pairs) for seed in cfg.seeds or ("",) for i in range(len(cfg.runs))]  # mistakes show before the first is trained
    results = read_results(cfg)
    for run in plan:
        begun = {key: run[key] for key in BEGUN}
        row = results.setdefault(run["name"], begun)
        if "val_ce" not in row and not disk.checkpoint_steps(run["folder"]):
            row = results[run["name"]] = begun  # nothing came of it: its settings may have been the mistake
        if {k: row[k] for k in begun} != begun:
            sys.exit(f"error: {cfg.out_dir}/results.jsonl has '{run['name']}' with other settings or data; name another --out_dir")
        if "val_ce" in row and all(map(os.path.isdir, run["scored"])) and row["weights_sha256"] != list(map(disk.weights_sha256, run["scored"])):
            sys.exit(f"error: the weights in {', '.join(run['scored'])} are not those that {cfg.out_dir}/results.jsonl has for '{run['name']}'; name another --out_dir")
        if row == begun:
            write_results(cfg, results)
            print(f"\n=== {run['name']}", flush=True)
            results[run["name"]] = {**begun, **train_and_score(cfg, run)}
            write_results(cfg, results)
    table([results[run["name"]] for run in plan])


def plan_run(cfg, i, seed, pairs):
    """The i-th run with a seed: its name, recipe and folder, script, arguments and settings, and hashes of settings and data."""
    recipe, *words = cfg.runs[i].split() or [""]
    names = [line.split()[0] for line in cfg.runs[:i]]
    trained = [name for name, line in zip(names, cfg.runs) if line.split()[1] != "ensemble"]
    ensemble = words[:1] == ["ensemble"]
    own = [w for w in words if w.startswith("--") or w.endswith(".py")]
    others = [w for w in words[ensemble:] if w not in own]  # teachers, or the ensemble's members
    if ensemble and others and others[0] in trained:  # measured as its first member
        own = [w for w in cfg.runs[names.index(others[0])].split() if w.startswith("--") or w.endswith(".py")] + own
    if not (others if ensemble else own) or recipe in names or not re.fullmatch(r"\w[\w-]*", recipe):
        sys.exit(f"error: run {i + 1}, '{cfg.runs[i]}', is not 'name config_file teacher ...' or 'name ensemble run ...' with a new name of letters, digits, - and _")
    more = next((w for w in own if re.fullmatch(r"--seed=\+\d+", w)), "--seed=+0")
    theirs = ("--out_dir", "--teachers", "--resume", "--overwrite", *(["--seed"] if seed else []))
    for flag in (w for w in [*own, *cfg.settings] if w.split("=")[0] in theirs and w != more):
        sys.exit(f"error: {flag} in run '{recipe}' is study.py's to say; see its --help")
    folder_of = lambda name: os.path.join(cfg.out_dir, f"{name}@{seed}" if seed else name)
    for other in others:
        if other not in trained and not os.path.isdir(other):
            sys.exit(f"error: {recipe}'s {'member' if ensemble else 'teacher'} '{other}' is neither an earlier run of the study nor a run folder")
    others = [folder_of(w) if w in trained else w for w in others]
    own = [f"--init_from={folder_of(w[12:])}" if w.startswith("--init_from=") and w[12:] in trained else w for w in own]
    flags = [f"--data_dir={cfg.data_dir}", *(w for w in [*cfg.settings, *own] if w.startswith("--"))]  # a run's own win
    argv = [*(w for w in [*own, *cfg.settings] if w not in flags), *flags, f"--out_dir={folder_of(recipe)}"]
    if seed:
        argv.append(f"--seed={int(seed) + int(more[8:])}")
    if others:
        argv.append(f"--teachers={','.join(others)}")
    settings = config.configure(DistillConfig if others else TrainConfig, argv)
    if others and not ensemble:
        teacher_dtypes(settings)
    if (cfg.blimp or cfg.test_loss) and not settings.causal:
        sys.exit(f"error: run '{recipe}' is a masked language model (causal=False): it cannot be scored, nor taught")
    meta = disk.read_meta(settings.data_dir)
    test_chunks = (sum(s["tokens"] for s in meta["shards"] if s["split"] == "test") - 1) // settings.seq_len
    if cfg.test_loss and test_chunks < max(settings.eval_chunks, 1):
        sys.exit(f"error: test_loss: {settings.data_dir} has a test split of {max(test_chunks, 0)} chunks, eval_chunks={settings.eval_chunks}; prepare it again with one")
    inside = dict(zip(map(folder_of, trained), trained))  # an earlier run's line has its own hashes
    return dict(name=os.path.basename(folder_of(recipe)), recipe=recipe, folder=folder_of(recipe),
                script="" if ensemble else "distill.py" if others else "train.py", argv=argv, settings=settings,
                scored=others if ensemble else [folder_of(recipe)],
                settings_sha256=settings_sha256(settings, inside, ensemble=ensemble, blimp=pairs, eval_dtype=cfg.eval_dtype, test_loss=cfg.test_loss),
                data_sha256=disk.data_sha256(meta))


def settings_sha256(settings, names={}, **more):
    """SHA-256 of what a run is, not where and how it is run. Other runs count by their weights, or by `names`: folder -> name."""
    hashed = {**asdict(settings), **more}
    for key in ("data_dir", "out_dir", "device", "compile", "micro_batch_size", "log_interval", "wandb", "tensorboard"):
        del hashed[key]
    for key in ("teachers", "init_from", "generator"):
        paths = hashed.get(key) or ()
        hashed[key] = [names.get(path) or disk.weights_sha256(path) for path in ([paths] if isinstance(paths, str) else paths)]
    return hashlib.sha256(json.dumps(hashed).encode()).hexdigest()


def pairs_sha256(folder):
    """Name and SHA-256 of a folder of minimal pairs."""
    files = sorted(f for f in os.listdir(folder) if f.endswith(".jsonl"))
    return os.path.basename(os.path.normpath(folder)), [(f, disk.sha256(os.path.join(folder, f))) for f in files]


def train_and_score(cfg, run):
    """Train or resume a run, score its best checkpoint, and give what the results say of it. An ensemble is scored alone."""
    folder, settings = run["folder"], run["settings"]

    def score(out, *flags):
        command("eval_blimp.py", f"--ckpt={','.join(run['scored'])}", *flags, f"--dtype={cfg.eval_dtype}", f"--out={folder}/{out}", quiet=True)
        return disk.read_json(os.path.join(folder, out), ["folders"])

    def loss_on(split):
        return [f"--data_dir={settings.data_dir}", f"--split={split}", f"--eval_chunks={settings.eval_chunks}", f"--seq_len={settings.seq_len}"]

    scores = dict(folders={})
    if run["script"]:
        command(run["script"], *run["argv"], "--resume", nproc=cfg.nproc_per_node)
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            ensemble_val_ce = json.loads(f.readline()).get("ensemble_val_ce")  # its teachers'
    else:
        os.makedirs(folder, exist_ok=True)
        ensemble_val_ce = score("val.json", *loss_on("val"))["val_ce"]
    if cfg.blimp or cfg.test_loss:
        scores = score("blimp.json", *[f"--data={','.join(cfg.blimp)}"] * bool(cfg.blimp), *loss_on("test") * cfg.test_loss)
    members = [disk.read_checkpoint_config(disk.find_checkpoint(path)) for path in run["scored"]]
    described = members[0]
    if not run["script"]:
        described = dict(described, teachers=run["scored"], step=None, val_ce=ensemble_val_ce, git_revision=disk.git_revision())
    return dict(teachers=described.get("teachers", []), weights_sha256=list(map(disk.weights_sha256, run["scored"])), parameters=sum(m["parameters"] for m in members), seed=settings.seed, words=described["words"],
                step=described["step"], val_ce=described["val_ce"], test_ce=scores.get("test_ce"), ensemble_val_ce=ensemble_val_ce,
                accuracy={name: scores["folders"][name]["accuracy"] for name in scores["folders"]},
                git_revision=described["git_revision"], torch=described["torch"], hardware=described["hardware"])


def command(script, *args, nproc=0, quiet=False):
    """Show the command a user would type, and run it with this Python. Ends the study if it fails."""
    print("$", shlex.join([script, *args]), flush=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc else []
    here = os.path.dirname(os.path.abspath(__file__))
    child = subprocess.Popen([sys.executable, *launcher, os.path.join(here, script), *args], stdout=subprocess.DEVNULL if quiet else None)
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while child.poll() is None:
        try:
            child.wait()
        except KeyboardInterrupt:
            pass  # the child got it too: it saves first
    signal.signal(signal.SIGTERM, before)
    if child.returncode:
        sys.exit(f"error: {script} ended with code {child.returncode}, the reason is above; the same command goes on with what is done so far")


# --- results.jsonl ----------------------------------------------------------------------------------

BEGUN = ("name", "recipe", "settings_sha256", "data_sha256")
DONE = ("teachers", "weights_sha256", "parameters", "seed", "words", "step", "val_ce", "ensemble_val_ce", "test_ce", "accuracy", "git_revision", "hardware")


def read_results(cfg):
    """name -> its line of results.jsonl, and the study's folder locked."""
    os.makedirs(cfg.out_dir, exist_ok=True)
    disk.lock(cfg.out_dir)
    path = os.path.join(cfg.out_dir, "results.jsonl")
    return {row["name"]: row for row in result_rows(path)} if os.path.isfile(path) else {}


def result_rows(path):
    """The rows of a results file, each begun or done."""
    try:
        with open(path, encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        for row in rows:
            if not set(BEGUN) <= row.keys() or "val_ce" in row and not (set(DONE) <= row.keys() and isinstance(row["val_ce"], float)):
                raise ValueError("a row lacks something")
        return rows
    except (ValueError, TypeError, AttributeError) as e:
        sys.exit(f"error: {path} is damaged ({type(e).__name__}: {e}); repair it, or name another --out_dir")


def write_results(cfg, results):
    """One line a run: as it was begun, then with what came of it."""
    disk.write_lines(os.path.join(cfg.out_dir, "results.jsonl"), [json.dumps(row) + "\n" for row in results.values()])


def table(rows):
    """A row a recipe: mean ± standard deviation over its seeds. Columns that say nothing are left out."""
    recipes = {}
    for row in rows:
        recipes.setdefault(row["recipe"], []).append(row)
    columns = {"seeds": lambda own: str(len(own)), "taught by": taught_by, "parameters": lambda own: f"{own[0]['parameters']:,}"}
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
    return names if own[0]["step"] is not None else f"(ensemble of {names})"


if __name__ == "__main__":
    config.run(main, StudyConfig)
