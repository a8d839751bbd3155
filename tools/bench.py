"""How fast is distillation on this machine? The real distill.py on random tokens and random teachers.

    python -m tools.bench --preset=small                          # our ways side by side, a Markdown table
    python -m tools.bench --preset=small --peer=hf_distill.py     # alternating with another program
    python -m tools.bench --preset=small --json                   # the fastest exact way, one JSON line
    torchrun --nproc_per_node=4 -m tools.bench --preset=small --json    # the same on four GPUs

Times are medians over 20 optimizer steps (on a GPU, which nothing should wait for, over every five of them)
after 5 to warm up, each way in a process of its own; a table shows the median of `repeats` such processes,
run in turn. On a GPU take --steps=100 or more.
"""
import contextlib
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import tiktoken
import torch

import distill
from lib.checkpoints import point_to, save_checkpoint
from lib.configurator import ROOT, launch, need
from lib.costs import training_flops
from lib.files import FORMAT_VERSION, parse_json, sha256, write_json
from lib.machine import can_compile, hardware, multiplies_bf16, pick_device, pick_dtype
from lib.shards import DTYPE, read_meta
from lib.tokenizers import save_tiktoken
from model import LanguageModel, ModelConfig

# arch, n_layer, n_head, n_embd, intermediate_size: the student and its two teachers
PRESETS = {
    "small": [("llama", 8, 8, 256, 1024), ("gpt2", 8, 8, 384, 1536), ("llama", 8, 8, 384, 1024)],
    "tinyminds": [("gpt2", 2, 8, 768, 3072), ("gpt2", 2, 8, 768, 3072), ("llama", 2, 8, 768, 2048)],
    "babyllama": [("llama", 16, 8, 512, 1024), ("gpt2", 24, 16, 1536, 6144), ("llama", 24, 8, 1024, 3072)],
}
VOCAB, WARMUP = 16000, 5


@dataclass
class BenchConfig:
    preset: Literal["small", "tinyminds", "babyllama"] = "small"
    json: bool = False           # measure the settings below once and print one JSON line
    peer: str = ""               # a script that prints such a line: see PEER_WAYS
    repeats: int = 3
    steps: int = 20
    batch_size: int = 16
    seq_len: int = 128
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    # what --json measures; the table goes through WAYS
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: Literal["on", "off"] = "on"
    loss_chunk: int = 512
    teacher_dtype: tuple[str, ...] = ("float32",)  # in bfloat16 arithmetic their matrices are bfloat16 anyway
    teacher_cache: str = ""      # folder
    teachers_dir: str = ""       # keep the random teachers in this folder for the next time


WAYS = {  # name: flags
    "float32, plain formula": "--dtype=float32 --compile=off --loss_chunk=0",
    "float32, compiled, loss in chunks": "--dtype=float32",
    "float32, compiled, loss in chunks, teacher cache": "--dtype=float32 --teacher_cache=CACHE/float32",
    "bfloat16, plain formula": "--dtype=bfloat16 --compile=off --loss_chunk=0",
    "bfloat16, compiled, plain formula": "--dtype=bfloat16 --loss_chunk=0",
    "bfloat16, compiled, loss in chunks": "--dtype=bfloat16",
    "bfloat16, compiled, loss in chunks, int8 teachers": "--dtype=bfloat16 --teacher_dtype=int8",
    "bfloat16, compiled, loss in chunks, teacher cache": "--dtype=bfloat16 --teacher_cache=CACHE/bfloat16",
}
PEER_WAYS = {  # of a script that also takes --preset --steps --batch --seq
    "peer, float32": "", "peer, float32, compiled": "--compile",
    "peer, bfloat16": "--bf16", "peer, bfloat16, compiled": "--bf16 --compile",
}


def main(cfg):
    need(cfg, steps=(cfg.steps, "at least 1"), repeats=(cfg.repeats, "at least 1"),
         peer=(not cfg.peer or os.path.isfile(cfg.peer), "a script"))
    if "RANK" in os.environ and not cfg.json:
        sys.exit("error: the table is made by one process; under torchrun it is --json")
    if not cfg.json:
        table(cfg)
    elif result := measure(cfg):
        print(json.dumps(result))


def table(cfg):
    """Every way in turn, `repeats` times over; one row each."""
    with tempfile.TemporaryDirectory() as folder:
        results = measure_in_turn(commands(cfg, folder), cfg.repeats)
    device = results[next(iter(WAYS))][0]["device"]
    columns = ("tokens_per_s", "step_ms", "peak_gib", "utilisation")
    rows = {name: {key: statistics.median(line[key] for line in lines) for key in columns if key in lines[0]}
            for name, lines in results.items()}
    peers = [name for name in rows if name in PEER_WAYS]
    print(f"{cfg.preset}, {cfg.batch_size} x {cfg.seq_len} tokens a step, {device}, "
          f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| way | tokens/s | step, ms | peak, GiB | of the ceiling |" + "".join(f" / {p} |" for p in peers))
    print("|---|" + "---:|" * (4 + len(peers)))
    for name, row in rows.items():
        utilisation = f"{100 * row['utilisation']:.0f}%" if "utilisation" in row else ""
        ratios = "".join(f" {row['tokens_per_s'] / rows[peer]['tokens_per_s']:.2f} |" for peer in peers)
        print(f"| {name} | {row['tokens_per_s']:,.0f} | {row['step_ms']:,.0f} | {row['peak_gib']:.2f} "
              f"| {utilisation} |{ratios}")


def commands(cfg, cache):
    """Name of a way -> what Python is to be called with."""
    size = [f"--{key}={getattr(cfg, key)}" for key in ("preset", "batch_size", "seq_len", "steps", "device")]
    size.append(f"--teachers_dir={os.path.abspath(cfg.teachers_dir or os.path.join(cache, 'teachers'))}")
    ways = {}
    for name, flags in WAYS.items():
        flags = [flag.replace("CACHE", cache) for flag in flags.split()]
        ways[name] = ["-m", "tools.bench", "--json", *size, *flags]
    if cfg.peer:
        size = ["--preset", cfg.preset, "--batch", str(cfg.batch_size), "--seq", str(cfg.seq_len),
                "--steps", str(WARMUP + cfg.steps)]
        for name, flags in PEER_WAYS.items():
            ways[name] = [os.path.abspath(cfg.peer), *size, *flags.split()]
    if not multiplies_bf16(pick_device(cfg.device)):  # emulated, it takes many times as long
        ways = {name: argv for name, argv in ways.items() if not {"--bf16", "--dtype=bfloat16"} & set(argv)}
    return ways


def measure_in_turn(ways, repeats):
    """Name of a way -> the JSON lines that its processes printed. Each is shown as it comes, so that nothing
    is lost with a later one."""
    results = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, argv in ways.items():
            print(f"run {repeat + 1} of {repeats}: {name}", file=sys.stderr, flush=True)
            done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True,
                                  errors="replace")
            printed, reason = ((text.strip().splitlines() or [""])[-1] for text in (done.stdout, done.stderr))
            if done.returncode:
                sys.exit(f"error: '{name}' failed: {reason}")
            print(printed, file=sys.stderr, flush=True)
            try:
                results[name].append(parse_json(printed))
                for key in ("tokens_per_s", "step_ms", "peak_gib"):
                    f"{results[name][-1][key]:.2f}"
            except (ValueError, TypeError, KeyError):
                sys.exit(f"error: '{name}' printed no JSON line of results last: {printed[:200]!r}")
    return results


def measure(cfg):
    """What the JSON line says; of several ranks the first speaks."""
    device, begin = pick_device(cfg.device), time.perf_counter()
    if cfg.compile == "on" and not can_compile(device):
        sys.exit("error: compile=on, but torch.compile does not work here; use --compile=off")
    student, *teachers = models(cfg)
    rates = run_distill(cfg, student, teachers, log_interval=1 if device.type == "cpu" else 5)
    tokens = cfg.batch_size * cfg.seq_len
    if int(os.environ.get("RANK", 0)):
        return None
    rate = statistics.median(rates)
    start_s = time.perf_counter() - begin - cfg.steps * tokens / rate
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    name = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else hardware(device)
    dtype = pick_dtype(cfg.dtype, device)
    flops = training_flops(student, teachers, cfg.seq_len, cached=bool(cfg.teacher_cache))
    ceiling = matmul_flops(device, dtype)
    world = int(os.environ.get("WORLD_SIZE", 1))
    return dict(
        preset=cfg.preset, tokens_per_s=round(rate), step_ms=round(1e3 * tokens / rate, 1),
        peak_gib=round(peak / 2 ** 30, 2), utilisation=round(rate * flops / ceiling / world, 3),
        dtype=str(dtype).removeprefix("torch."), compile=cfg.compile, loss_chunk=cfg.loss_chunk,
        teacher_dtype=cfg.teacher_dtype, teacher_cache=bool(cfg.teacher_cache), batch_size=cfg.batch_size,
        seq_len=cfg.seq_len, flops_per_token=flops, ceiling_tflops=round(ceiling / 1e12, 2),
        start_s=round(start_s, 1), device=name)


def models(cfg):
    """The preset's student and teachers."""
    return [ModelConfig(arch=arch, n_layer=n_layer, n_head=n_head, n_embd=n_embd, intermediate_size=width,
                        vocab_size=VOCAB, block_size=2 * cfg.seq_len, tie_weights=arch == "gpt2")
            for arch, n_layer, n_head, n_embd, width in PRESETS[cfg.preset]]


def run_distill(cfg, student, teachers, log_interval):
    """Tokens per second after the warm-up, as distill.py's main logs them in metrics.jsonl."""
    steps = WARMUP + cfg.steps
    folders = tuple(f"teacher_{i}" for i in range(len(teachers)))
    settings = distill.DistillConfig(
        data_dir="data", out_dir="out", teachers=folders, max_iters=steps, epochs=1, warmup_iters=5,
        eval_chunks=1, log_interval=log_interval, batch_size=cfg.batch_size, seq_len=cfg.seq_len,
        device=cfg.device, dtype=cfg.dtype, compile=cfg.compile, loss_chunk=cfg.loss_chunk,
        teacher_dtype=cfg.teacher_dtype, teacher_cache=absolute(cfg.teacher_cache), **asdict(student))
    kept = absolute(cfg.teachers_dir)
    # relative names in a folder of its own, so that a teacher cache is recognised the next time
    with (tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder),
          contextlib.redirect_stdout(sys.stderr)):
        write_data("data", steps * cfg.batch_size * cfg.seq_len)
        for name, teacher in zip(folders, teachers):
            if kept:  # what the name stands for lies there
                os.symlink(os.path.join(kept, "_".join(map(str, asdict(teacher).values()))), name)
            if not os.path.isfile(os.path.join(name, "last.json")):
                write_teacher(os.path.realpath(name), teacher, "data")
        distill.main(settings)
        if int(os.environ.get("RANK", 0)):
            return []
        with open("out/metrics.jsonl") as f:
            records = list(map(json.loads, f))
    return [record["tokens_per_s"] for record in records if record["step"] > WARMUP]


def absolute(path):
    return os.path.abspath(path) if path else ""


def matmul_flops(device, dtype):
    """The rate of a large square matrix product: what no training step can exceed."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        a @ b
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * n ** 3 / statistics.median(times[2:])


def write_data(folder, n_tokens):
    """A data folder of random tokens, as prepare.py would leave it."""
    os.makedirs(folder)
    tokens = np.random.default_rng(0).integers(VOCAB, size=n_tokens + 1)
    file, tokenizer = os.path.join(folder, "train_00000.bin"), os.path.join(folder, "tokenizer.json")
    tokens.astype(DTYPE).tofile(file)
    words = [bytes([i]) for i in range(256)] + [bytes([i // 256, i % 256]) for i in range(VOCAB - 256)]
    ranks = {word: i for i, word in enumerate(words)}
    bpe = tiktoken.Encoding("random", pat_str=r".", mergeable_ranks=ranks, special_tokens={})
    save_tiktoken(bpe, tokenizer)
    shards = [dict(split=split, file="train_00000.bin", tokens=n_tokens + 1, sha256=sha256(file))
              for split in ("train", "val")]
    write_json(os.path.join(folder, "meta.json"), dict(
        format_version=FORMAT_VERSION, vocab_size=VOCAB, tokenizer="tokenizer.json",
        tokenizer_sha256=sha256(tokenizer), pad=None, options=dict(bos="none"), words=dict(train={}, val={}),
        shards=shards))


def write_teacher(folder, cfg, data):
    """A run folder of an untrained teacher, at once: of several ranks one is the first."""
    torch.manual_seed(0)
    meta = read_meta(data)
    described = dict(model=asdict(cfg), step=0, bos="none", tokenizer=meta["tokenizer"],
                     tokenizer_sha256=meta["tokenizer_sha256"])
    mine = f"{folder}.{os.getpid()}"
    tokenizer = pathlib.Path(data, meta["tokenizer"]).read_bytes()
    save_checkpoint(mine, "ckpt_0", LanguageModel(cfg), described, tokenizer)
    point_to(mine, "last.json", "ckpt_0", 0, None)
    try:
        os.rename(mine, folder)
    except OSError:  # it is there now
        shutil.rmtree(mine)


if __name__ == "__main__":
    launch(main, BenchConfig)
