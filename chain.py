"""A sequence of models, each taught by earlier ones: self- and reverse-distillation.

    python chain.py config/reverse_distillation.py --nproc_per_node=4
    python chain.py config/demo_chain.py                       # on what `make demo` left, minutes on a CPU

A generation is one line of the config, "name config_file teacher teacher ...". A teacher is an earlier
generation or any run folder; with none it is plain training. Further config files and flags may stand in
the line too. Each is trained by train.py or distill.py and scored by eval_blimp.py. Repeat the command
to go on: what is in results.jsonl is skipped, a generation that was cut short is resumed, one whose
settings have changed is refused.
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
from distill import DistillConfig, teacher_dtypes
from train import TrainConfig


@dataclass
class ChainConfig:
    generations: tuple[str, ...] = ()  # "name config_file teacher ...", in order
    settings: tuple[str, ...] = ()     # for every generation: more config files and flags, such as --max_iters=500
    data_dir: str = "data/babylm"
    out_dir: str = "out/chain"         # a run folder per generation, and results.jsonl
    blimp: tuple[str, ...] = ()        # folders of minimal pairs to score each generation on
    eval_dtype: Literal["float32", "bfloat16"] = "float32"  # for eval_blimp.py
    nproc_per_node: int = 0            # GPUs: each generation under torchrun; 0 = one process


def main(cfg):
    if not cfg.generations:
        sys.exit("error: no generations; name a config that lists them: python chain.py config/demo_chain.py")
    for folder in cfg.blimp:
        if not os.path.isdir(folder):
            sys.exit(f"error: no folder of minimal pairs '{folder}'")
    if len({os.path.basename(os.path.normpath(folder)) for folder in cfg.blimp}) < len(cfg.blimp):
        sys.exit("error: two of the folders of minimal pairs have the same name")
    plan = [plan_generation(cfg, i) for i in range(len(cfg.generations))]  # mistakes show before the first is trained
    data_sha256 = disk.data_sha256(disk.read_meta(cfg.data_dir))
    rows = read_results(cfg)
    for name, script, argv, settings_sha256 in plan:
        begun = dict(generation=name, settings_sha256=settings_sha256, data_sha256=data_sha256)
        row = rows.setdefault(name, begun)
        if "val_ce" not in row and not has_checkpoint(os.path.join(cfg.out_dir, name)):
            row = rows[name] = begun  # nothing came of it: its settings may have been the mistake
        if {k: row[k] for k in begun} != begun:
            sys.exit(f"error: {cfg.out_dir}/results.jsonl has '{name}' with other settings or data; name another --out_dir")
        if row == begun:
            write_results(cfg, rows)
            print(f"\n=== {name}", flush=True)
            rows[name] = {**begun, **train_and_score(cfg, name, script, argv)}
            write_results(cfg, rows)
    table([rows[name] for name, *_ in plan])


def plan_generation(cfg, i):
    """(name, script, arguments, hash of the resolved settings) of the i-th generation."""
    name, *words = cfg.generations[i].split() or [""]
    earlier = [line.split()[0] for line in cfg.generations[:i]]
    own = [w for w in words if w.startswith("--") or w.endswith(".py")]
    words = [w for w in words if w not in own]
    if not own or name in earlier or not re.fullmatch(r"\w[\w-]*", name):
        sys.exit(f"error: generation {i + 1}, '{cfg.generations[i]}', is not 'name config_file teacher ...' with a new name of letters, digits, - and _")
    for flag in (w for w in [*own, *cfg.settings] if w.split("=")[0] in ("--out_dir", "--data_dir", "--teachers", "--resume", "--overwrite")):
        sys.exit(f"error: {flag} in generation '{name}' is chain.py's to say; see its --help")
    teachers = [os.path.join(cfg.out_dir, w) if w in earlier else w for w in words]
    for teacher in words:
        if teacher not in earlier and not os.path.isdir(teacher):
            sys.exit(f"error: {name}'s teacher '{teacher}' is neither an earlier generation nor a run folder")
    flags = [w for w in [*cfg.settings, *own] if w.startswith("--")]  # a generation's own win, of flags
    argv = [*(w for w in [*own, *cfg.settings] if w not in flags), *flags, f"--data_dir={cfg.data_dir}", f"--out_dir={os.path.join(cfg.out_dir, name)}"]
    if teachers:
        argv.append(f"--teachers={','.join(teachers)}")
    resolved = config.configure(DistillConfig if teachers else TrainConfig, argv)
    if teachers:
        teacher_dtypes(resolved)
    if cfg.blimp and not resolved.causal:
        sys.exit(f"error: generation '{name}' is a masked language model (causal=False): it cannot be scored on pairs, nor taught")
    settings = {**asdict(resolved), "blimp": cfg.blimp, "eval_dtype": cfg.eval_dtype}
    for key in ("data_dir", "out_dir", "device", "compile", "micro_batch_size", "log_interval", "wandb"):  # where and how, not what
        del settings[key]
    return name, "distill.py" if teachers else "train.py", argv, hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def train_and_score(cfg, name, script, argv):
    """Train or resume a generation, score its best checkpoint, and give what the results say of it."""
    folder = os.path.join(cfg.out_dir, name)
    command(script, *argv, "--resume", nproc=cfg.nproc_per_node)
    if cfg.blimp:
        command("eval_blimp.py", f"--ckpt={folder}", f"--data={','.join(cfg.blimp)}", f"--dtype={cfg.eval_dtype}", quiet=True)
    described = disk.read_checkpoint_config(disk.find_checkpoint(folder))
    folders = disk.read_json(os.path.join(folder, "blimp.json"))["folders"] if cfg.blimp else {}
    return dict(teachers=described.get("teachers", []), parameters=described["parameters"], seed=described["train_config"]["seed"],
                step=described["step"], val_ce=described["val_ce"], accuracy={f: folders[f]["accuracy"] for f in folders},
                git_revision=disk.git_revision(), torch=described["torch"])


def command(script, *args, nproc=0, quiet=False):
    """Show the command a user would type, and run it with this Python. Ends the chain if it fails."""
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


def read_results(cfg):
    """generation -> its line of results.jsonl."""
    os.makedirs(cfg.out_dir, exist_ok=True)
    disk.lock(cfg.out_dir)
    path = os.path.join(cfg.out_dir, "results.jsonl")
    if not os.path.isfile(path):
        return {}
    with open(path) as f:
        try:
            rows = {row["generation"]: row for row in map(json.loads, f)}
            for row in rows.values():
                if not BEGUN <= row.keys() or "val_ce" in row and not (DONE <= row.keys() and isinstance(row["val_ce"], float)):
                    raise ValueError(f"'{row['generation']}' lacks something")
            return rows
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            sys.exit(f"error: {path} is damaged ({type(e).__name__}: {e}); repair it, or name another --out_dir")


BEGUN = {"generation", "settings_sha256", "data_sha256"}
DONE = BEGUN | {"teachers", "parameters", "accuracy"}


def has_checkpoint(folder):
    return os.path.isdir(folder) and any(re.fullmatch(r"ckpt_\d+", name) for name in os.listdir(folder))


def write_results(cfg, rows):
    """One line a generation: as it was begun, then with what came of it."""
    path = os.path.join(cfg.out_dir, "results.jsonl")
    with open(path + ".tmp", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows.values())
    os.replace(path + ".tmp", path)


def table(rows):
    folders = list(rows[0]["accuracy"])
    print("\n| generation | taught by | parameters | validation loss |" + "".join(f" {f}, % |" for f in folders))
    print("|---|---|---:|---:|" + "---:|" * len(folders))
    for row in rows:
        print(f"| {row['generation']} | {', '.join(map(os.path.basename, row['teachers']))} | {row['parameters']:,} | {row['val_ce']:.4f} |"
              + "".join(f" {100 * row['accuracy'][f]:.2f} |" for f in folders))


if __name__ == "__main__":
    config.run(main, ChainConfig)
