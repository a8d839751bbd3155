"""A study: runs that belong together, over several seeds, some of them taught by others; one results file and one table.

    python study.py config/demo_study.py --seeds=1,2,3         # on what `make demo` left: recipes side by side, mean ± deviation
    python study.py config/reverse_distillation.py --nproc_per_node=4    # nine generations, each taught by earlier ones
    python study.py --runs="gpt2_10m config/gpt2_10m.py config/cpu.py" --seeds=1,2,3 --out_dir=out/seeds   # any config

A run is one line, "name config_file teacher teacher ...". A teacher is an earlier run of the study (of the
same seed) or any run folder; with none it is plain training. Further config files and flags may stand in the
line too. Each is trained by train.py or distill.py and scored by eval_blimp.py. Repeat the command to go on:
what is in results.jsonl is skipped, a run that was cut short is resumed, one whose settings or data have
changed is refused, and other code is pointed out.
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
    test_loss: bool = False            # also the loss on the data's test split
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
    for seed in cfg.seeds:
        if not seed.isdecimal() or cfg.seeds.count(seed) > 1:
            sys.exit(f"error: seeds: '{seed}' is not a whole number, or stands there twice")
    plan = [plan_run(cfg, i, seed) for seed in cfg.seeds or ("",) for i in range(len(cfg.runs))]  # mistakes show before the first is trained
    results = read_results(cfg)
    for run in plan:
        begun = {key: run[key] for key in BEGUN}
        row = results.setdefault(run["name"], begun)
        if "val_ce" not in row and not has_checkpoint(run["folder"]):
            row = results[run["name"]] = begun  # nothing came of it: its settings may have been the mistake
        if {k: row[k] for k in begun} != begun:
            sys.exit(f"error: {cfg.out_dir}/results.jsonl has '{run['name']}' with other settings or data; name another --out_dir")
        if row == begun:
            write_results(cfg, results)
            print(f"\n=== {run['name']}", flush=True)
            results[run["name"]] = {**begun, **train_and_score(cfg, run)}
            write_results(cfg, results)
    table([results[run["name"]] for run in plan])


def plan_run(cfg, i, seed):
    """The i-th run with a seed: its name and recipe, folder, script, arguments, and hashes of resolved settings and data."""
    recipe, *words = cfg.runs[i].split() or [""]
    earlier = [line.split()[0] for line in cfg.runs[:i]]
    own = [w for w in words if w.startswith("--") or w.endswith(".py")]
    words = [w for w in words if w not in own]
    if not own or recipe in earlier or not re.fullmatch(r"\w[\w-]*", recipe):
        sys.exit(f"error: run {i + 1}, '{cfg.runs[i]}', is not 'name config_file teacher ...' with a new name of letters, digits, - and _")
    for flag in (w for w in [*own, *cfg.settings] if w.split("=")[0] in ("--out_dir", "--teachers", "--resume", "--overwrite", *(["--seed"] if seed else []))):
        sys.exit(f"error: {flag} in run '{recipe}' is study.py's to say; see its --help")
    folder_of = lambda name: os.path.join(cfg.out_dir, f"{name}@{seed}" if seed else name)
    teachers = [folder_of(w) if w in earlier else w for w in words]
    for teacher in words:
        if teacher not in earlier and not os.path.isdir(teacher):
            sys.exit(f"error: {recipe}'s teacher '{teacher}' is neither an earlier run of the study nor a run folder")
    flags = [f"--data_dir={cfg.data_dir}", *(w for w in [*cfg.settings, *own] if w.startswith("--"))]  # a run's own win
    argv = [*(w for w in [*own, *cfg.settings] if w not in flags), *flags, f"--out_dir={folder_of(recipe)}"]
    if seed:
        argv.append(f"--seed={seed}")
    if teachers:
        argv.append(f"--teachers={','.join(teachers)}")
    resolved = config.configure(DistillConfig if teachers else TrainConfig, argv)
    if teachers:
        teacher_dtypes(resolved)
    if (cfg.blimp or cfg.test_loss) and not resolved.causal:
        sys.exit(f"error: run '{recipe}' is a masked language model (causal=False): it cannot be scored, nor taught")
    meta = disk.read_meta(resolved.data_dir)
    if cfg.test_loss and not any(s["split"] == "test" for s in meta["shards"]):
        sys.exit(f"error: test_loss: {resolved.data_dir} has no test split; prepare it again with one")
    settings = {**asdict(resolved), "blimp": cfg.blimp, "eval_dtype": cfg.eval_dtype, "test_loss": cfg.test_loss}
    for key in ("data_dir", "out_dir", "device", "compile", "micro_batch_size", "log_interval", "wandb", "tensorboard"):  # where and how, not what
        del settings[key]
    return dict(name=os.path.basename(folder_of(recipe)), recipe=recipe, folder=folder_of(recipe), script="distill.py" if teachers else "train.py", argv=argv,
                data_dir=resolved.data_dir, seq_len=resolved.seq_len, settings_sha256=hashlib.sha256(json.dumps(settings).encode()).hexdigest(),
                data_sha256=disk.data_sha256(meta))


def train_and_score(cfg, run):
    """Train or resume a run, score its best checkpoint, and give what the results say of it."""
    command(run["script"], *run["argv"], "--resume", nproc=cfg.nproc_per_node)
    folder, scores = run["folder"], dict(folders={})
    if cfg.blimp or cfg.test_loss:
        flags = [f"--data={','.join(cfg.blimp)}"] * bool(cfg.blimp) + [f"--data_dir={run['data_dir']}", "--split=test", "--eval_chunks=0", f"--seq_len={run['seq_len']}"] * cfg.test_loss
        command("eval_blimp.py", f"--ckpt={folder}", *flags, f"--dtype={cfg.eval_dtype}", f"--out={folder}/blimp.json", quiet=True)
        scores = disk.read_json(os.path.join(folder, "blimp.json"), ["folders"])
    described = disk.read_checkpoint_config(disk.find_checkpoint(folder))
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        first = json.loads(f.readline())
    return dict(teachers=described.get("teachers", []), parameters=described["parameters"], seed=described["train_config"]["seed"], words=described["words"],
                step=described["step"], val_ce=described["val_ce"], test_ce=scores.get("test_ce"), ensemble_val_ce=first.get("ensemble_val_ce"),
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
DONE = ("teachers", "parameters", "seed", "val_ce", "test_ce", "accuracy", "git_revision", "hardware")


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
    path = os.path.join(cfg.out_dir, "results.jsonl")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in results.values())
    os.replace(path + ".tmp", path)


def has_checkpoint(folder):
    return os.path.isdir(folder) and any(re.fullmatch(r"ckpt_\d+", name) for name in os.listdir(folder))


def table(rows):
    """A row a recipe: mean ± standard deviation over its seeds."""
    recipes = {}
    for row in rows:
        recipes.setdefault(row["recipe"], []).append(row)
    test = any(row["test_ce"] is not None for row in rows)
    folders = list(rows[0]["accuracy"])
    print("\n| run | seeds | taught by | parameters | validation loss |" + " test loss |" * test + "".join(f" {f}, % |" for f in folders))
    print("|---|---:|---|---:|---:|" + "---:|" * (test + len(folders)))
    for recipe, own in recipes.items():
        taught_by = ", ".join(os.path.basename(os.path.normpath(t)).split("@")[0] for t in own[0]["teachers"])
        print(f"| {recipe} | {len(own)} | {taught_by} | {own[0]['parameters']:,} | {spread([row['val_ce'] for row in own], 4)} |"
              + f" {spread([row['test_ce'] for row in own], 4) if test else ''} |" * test
              + "".join(f" {spread([100 * row['accuracy'][f] for row in own], 2)} |" for f in folders))
    for what, now in (("git_revision", disk.git_revision()), ("hardware", rows[-1]["hardware"])):
        others = [row["name"] for row in rows if row[what] != now]
        if others:
            print(f"notice: {len(others)} of {len(rows)} runs are of another {what} than {now}: {', '.join(others[:8])}")


if __name__ == "__main__":
    config.run(main, StudyConfig)
