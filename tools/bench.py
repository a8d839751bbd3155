"""How fast is distillation on this machine? The real distill.py on random tokens and random teachers.

    python -m tools.bench --preset=small                          # our ways side by side, a Markdown table
    python -m tools.bench --preset=small --peer=hf_distill.py     # alternating with another program
    python -m tools.bench --preset=small --json                   # the fastest exact way, one JSON line
    torchrun --nproc_per_node=4 bench.py --preset=small --json    # the same on four GPUs

Times are medians over 20 optimizer steps after 5 to warm up, each way in a process of its own;
a table shows the median of `repeats` such processes, run in turn.
"""
import contextlib
import json
import os
import resource
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

import config
import disk
import distill
from model import LanguageModel, ModelConfig
from train import can_compile, multiplies_bf16, pick_device

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
    peer: str = ""               # a script that takes --preset --steps --batch --seq [--bf16] [--compile] and prints such a line
    repeats: int = 3
    steps: int = 20
    batch_size: int = 16
    seq_len: int = 128
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # what --json measures; the table goes through WAYS
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["on", "off"] = "on"
    loss_chunk: int = 512
    teacher_dtype: tuple[str, ...] = ("float32",)  # with bfloat16 arithmetic their matrices are bfloat16 anyway
    teacher_cache: str = ""      # folder


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
PEER_WAYS = {"peer, float32": "", "peer, float32, compiled": "--compile", "peer, bfloat16": "--bf16", "peer, bfloat16, compiled": "--bf16 --compile"}


def main(cfg):
    if not (cfg.steps and cfg.repeats):
        sys.exit(f"error: steps={cfg.steps} and repeats={cfg.repeats} must be at least 1")
    if "RANK" in os.environ and not cfg.json:
        sys.exit("error: the table is made by one process; under torchrun it is --json")
    if cfg.json:
        result = measure(cfg)
        if result:
            print(json.dumps(result))
    else:
        table(cfg)


def table(cfg):
    """Every way in turn, `repeats` times over; one row each."""
    with tempfile.TemporaryDirectory() as folder:
        size = f"--preset={cfg.preset} --batch_size={cfg.batch_size} --seq_len={cfg.seq_len} --steps={cfg.steps} --device={cfg.device}".split()
        commands = {name: [__file__, "--json", *size, *(f.replace("CACHE", folder) for f in flags.split())] for name, flags in WAYS.items()}
        if cfg.peer:
            size = f"--preset {cfg.preset} --batch {cfg.batch_size} --seq {cfg.seq_len} --steps {cfg.steps + WARMUP}".split()
            commands |= {name: [cfg.peer, *size, *flags.split()] for name, flags in PEER_WAYS.items()}
        if not multiplies_bf16(pick_device(cfg.device)):  # emulated, it takes many times as long
            commands = {name: command for name, command in commands.items() if not {"--bf16", "--dtype=bfloat16"} & set(command)}
        runs = {name: [] for name in commands}
        for r in range(cfg.repeats):
            for name, command in commands.items():
                print(f"run {r + 1} of {cfg.repeats}: {name}", file=sys.stderr, flush=True)
                done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                if done.returncode:
                    sys.exit(f"error: '{name}' failed: {done.stderr.strip().splitlines()[-1]}")
                runs[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    rows = {name: {k: statistics.median(run[k] for run in of) for k in ("tokens_per_s", "step_ms", "peak_gib", "utilisation") if k in of[0]}
            for name, of in runs.items()}
    first = runs[next(iter(WAYS))][0]
    print(f"{cfg.preset}, {cfg.batch_size} x {cfg.seq_len} tokens a step, {first['device']}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    peers = [name for name in rows if name in PEER_WAYS]
    print("| way | tokens/s | step, ms | peak, GiB | of the ceiling |" + "".join(f" / {p} |" for p in peers))
    print("|---|" + "---:|" * (4 + len(peers)))
    for name, row in rows.items():
        utilisation = f"{100 * row['utilisation']:.0f}%" if "utilisation" in row else ""
        print(f"| {name} | {row['tokens_per_s']:,.0f} | {row['step_ms']:,.0f} | {row['peak_gib']:.2f} | {utilisation} |"
              + "".join(f" {row['tokens_per_s'] / rows[p]['tokens_per_s']:.2f} |" for p in peers))


def measure(cfg):
    """Run distill.py's main on a folder made for it and read its metrics.jsonl; of several ranks the first."""
    device, begin = pick_device(cfg.device), time.perf_counter()
    if cfg.compile == "on" and not can_compile(device):
        sys.exit("error: compile=on, but torch.compile does not work here; use --compile=off")
    cache = os.path.abspath(cfg.teacher_cache) if cfg.teacher_cache else ""
    # relative names in a folder of its own, so that a teacher cache is recognised the next time
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):
        student, *teachers = (ModelConfig(arch=arch, n_layer=n_layer, n_head=n_head, n_embd=n_embd, intermediate_size=width,
                                          vocab_size=VOCAB, block_size=2 * cfg.seq_len, tie_weights=arch == "gpt2")
                              for arch, n_layer, n_head, n_embd, width in PRESETS[cfg.preset])
        write_data("data", (WARMUP + cfg.steps) * cfg.batch_size * cfg.seq_len)
        for i, teacher in enumerate(teachers):
            write_teacher(f"teacher_{i}", teacher, "data")
        settings = {**asdict(cfg), "data_dir": "data", "out_dir": "out", "teachers": [f"teacher_{i}" for i in range(len(teachers))],
                    "max_iters": WARMUP + cfg.steps, "epochs": 1, "teacher_cache": cache, "eval_chunks": 1, "log_interval": 1, "warmup_iters": 5, **asdict(student)}
        settings = {k: v for k, v in settings.items() if k in distill.DistillConfig.__dataclass_fields__}
        distill.main(distill.DistillConfig(**settings))
        if int(os.environ.get("RANK", 0)):
            return None
        with open("out/metrics.jsonl") as f:
            records = [json.loads(line) for line in f][1 + WARMUP:]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    bf16 = multiplies_bf16(device) if cfg.dtype == "auto" else cfg.dtype == "bfloat16"
    rate = statistics.median(r["tokens_per_s"] for r in records)
    flops = 3 * forward_flops(student, cfg.seq_len) + sum(
        2 * VOCAB * t.n_embd if cfg.teacher_cache else forward_flops(t, cfg.seq_len) for t in teachers)
    ceiling = matmul_flops(device, torch.bfloat16 if bf16 else torch.float32)
    return dict(preset=cfg.preset, tokens_per_s=round(rate), step_ms=round(1e3 * cfg.batch_size * cfg.seq_len / rate, 1),
                peak_gib=round(peak / 2 ** 30, 2), utilisation=round(rate * flops / ceiling / int(os.environ.get("WORLD_SIZE", 1)), 3),
                dtype="bfloat16" if bf16 else "float32", compile=cfg.compile, loss_chunk=cfg.loss_chunk, teacher_dtype=cfg.teacher_dtype,
                teacher_cache=bool(cfg.teacher_cache), batch_size=cfg.batch_size, seq_len=cfg.seq_len, flops_per_token=flops,
                ceiling_tflops=round(ceiling / 1e12, 2), start_s=round(time.perf_counter() - begin - sum(
                    cfg.batch_size * cfg.seq_len / r["tokens_per_s"] for r in records), 1),
                device=torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads")


def forward_flops(m, seq_len):
    """Per token, by matrix products; embeddings are free, causal attention counts half."""
    projections = 4 * m.n_embd ** 2 + (3 if m.arch == "llama" else 2) * m.n_embd * m.intermediate_size
    return 2 * (m.n_layer * (projections + seq_len * m.n_embd) + VOCAB * m.n_embd)


def matmul_flops(device, dtype):
    """The rate of a large square matrix product: what no training step can exceed."""
    n = 8192 if device.type == "cuda" else 2048
    a, b, times = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(8):
        begin = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * n ** 3 / statistics.median(times[2:])


def write_data(folder, n_tokens):
    """A data folder of random tokens, as prepare.py would leave it."""
    os.makedirs(folder)
    tokens = np.random.default_rng(0).integers(VOCAB, size=n_tokens + 1)
    tokens.astype(disk.DTYPE).tofile(os.path.join(folder, "train_00000.bin"))
    words = [bytes([i]) for i in range(256)] + [bytes([i // 256, i % 256]) for i in range(VOCAB - 256)]
    bpe = tiktoken.Encoding("random", pat_str=r".", mergeable_ranks={w: i for i, w in enumerate(words)}, special_tokens={})
    disk.save_tiktoken(bpe, os.path.join(folder, "tokenizer.json"))
    shard = dict(file="train_00000.bin", tokens=n_tokens + 1, sha256=disk.sha256(os.path.join(folder, "train_00000.bin")))
    disk.write_json(os.path.join(folder, "meta.json"), dict(
        format_version=disk.FORMAT_VERSION, vocab_size=VOCAB, tokenizer="tokenizer.json", pad=None, options=dict(bos="none"), words=dict(train={}),
        tokenizer_sha256=disk.sha256(os.path.join(folder, "tokenizer.json")), shards=[dict(split=s, **shard) for s in ("train", "val")]))


def write_teacher(run_folder, cfg, data):
    """A checkpoint of an untrained teacher."""
    torch.manual_seed(0)
    meta = disk.read_meta(data)
    disk.save_checkpoint(run_folder, "ckpt_0", LanguageModel(cfg), dict(
        model=asdict(cfg), tokenizer=meta["tokenizer"], tokenizer_sha256=meta["tokenizer_sha256"], bos="none"),
        os.path.join(data, meta["tokenizer"]), ({}, {}))
    disk.point_to(run_folder, "last.json", "ckpt_0", 0, 0.0)


if __name__ == "__main__":
    config.run(main, BenchConfig)
