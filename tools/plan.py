"""How many hours, and how much memory? Of configs, on one card, by arithmetic: nothing is run.

    python -m tools.plan                                       # all of config/, as a Markdown table
    python -m tools.plan config/gpt2_705m.py mine.py --cards="mine:24:71:0.4" --data_dir=data/babylm
    python -m tools.plan config/babyllama.py+config/strong_student.py     # one laid over the other

Hours are a config's operations over the share of its rate that a card is supposed to reach. Memory is
lib/costs.py's, in bfloat16 with CUDA graphs (without for a student with experts): within 10% of what torch's
allocator took from a simulated card (tests/test_plan.py). A micro-batch fits where it leaves a tenth of the
card. A teacher out/NAME is taken to have the sizes of NAME.py beside the config (digits at NAME's end aside),
and to run on the fly.
"""
import glob
import math
import os
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch

from distill import DistillConfig
from lib.configurator import ROOT, configure, launch, need, read_config_file
from lib.costs import training_bytes, training_flops
from lib.data import n_chunks
from lib.machine import Machine
from lib.shards import Shards
from model import LanguageModel
from train import check_loop_config, model_config


@dataclass
class PlanConfig:
    # name:GiB:TFLOP/s:share. The rate is that of dense bfloat16 products summed in float32
    cards: tuple[str, ...] = ("H100:80:989:0.45", "RTX 3090:24:71:0.5")
    tokens: int = 16_100_000      # of the text: the papers' 10M words
    vocab_size: int = 16000
    data_dir: str = ""            # a prepared folder, whose tokens and vocabulary count instead


class Card(NamedTuple):
    name: str
    gib: float
    tflops: float
    share: float


def main(argv):
    cfg = configure(PlanConfig, [arg for arg in argv if arg.startswith("-")])
    need(cfg, tokens=(cfg.tokens, "at least 1"), vocab_size=(cfg.vocab_size, "at least 1"))
    if cfg.data_dir:
        shards = Shards(cfg.data_dir, "train")
        cfg.tokens, cfg.vocab_size = len(shards), shards.meta["vocab_size"]
    cards = [read_card(text) for text in cfg.cards]
    paths = [arg for arg in argv if not arg.startswith("-")] or [
        path for path in sorted(glob.glob(os.path.join(ROOT, "config", "*.py")))
        if "arch" in read_config_file(path)]
    rows = {"+".join(os.path.basename(file).removesuffix(".py") for file in path.split("+")):
            cells(path.split("+"), cfg, cards) for path in paths}
    heading = ["config", "MFLOP/token", "epochs, steps", *(f"{card.name}, hours" for card in cards),
               "micro-batch, GiB", *(f"largest in {card.gib:g} GiB" for card in cards)]
    print(f"Computed, not measured: {cfg.tokens / 1e6:.1f}M tokens; " + ", ".join(
        f"{card.name} at {100 * card.share:g}% of {card.tflops:g} TFLOP/s" for card in cards) + "\n")
    print(f"| {' | '.join(heading)} |\n|---|" + "---:|" * (len(heading) - 1))
    for name, row in rows.items():
        if row:
            print(f"| {name} | {' | '.join(row)} |")
    left_out = [name for name, row in rows.items() if not row]
    if left_out:
        print(f"\nLeft out: {', '.join(left_out)}: masked tokens, MATE-KD's steps and curricula are not "
              "counted here.")


def read_card(text):
    name, *numbers = text.split(":")
    try:
        card = Card(name, *map(float, numbers))
        if not all(0 < number < math.inf for number in card[1:]):
            raise ValueError
    except (ValueError, TypeError):
        sys.exit(f"error: cards: '{text}' must be name:GiB:TFLOP/s:share, as H100:80:989:0.45")
    return card


def cells(files, plan, cards):
    """The row of a config, of one file or several, after its name; none if it cannot be planned."""
    if not any("arch" in read_config_file(file) for file in files):
        sys.exit(f"error: {files[0]} has no arch: name the model's config that it is laid over too, as "
                 f"config/llama_58m.py+{files[0]}")
    cfg = configure(DistillConfig, files)
    if cfg.generator or not cfg.causal or cfg.curriculum:
        return []
    check_loop_config(cfg)
    micro_batch = cfg.micro_batch_size or cfg.batch_size
    need(cfg, seq_len=(0 < cfg.seq_len <= cfg.block_size, f"between 1 and block_size={cfg.block_size}"),
         micro_batch_size=(cfg.batch_size % micro_batch == 0, f"a divisor of batch_size={cfg.batch_size}"))
    described = cfg, *teacher_configs(files[0], cfg.teachers)
    student, *teachers = [sizes(each, plan) for each in described]
    flops = training_flops(student, teachers, cfg.seq_len) * (2 if cfg.sam_rho else 1)
    steps = n_chunks(cfg, range(plan.tokens)) // cfg.batch_size * cfg.epochs
    steps = min(steps, cfg.max_iters or steps)
    total = flops * steps * cfg.batch_size * cfg.seq_len
    with torch.device("meta"):
        n = LanguageModel(student).n_params()

    def gib(micro_batch):
        machine = Machine(torch.device("cuda"), micro_batch=micro_batch, dtype=torch.bfloat16,
                          graphs=not cfg.n_experts)
        return training_bytes(cfg, machine, n, teachers) / 2 ** 30

    def largest(card):
        fitting = [m for m in divisors(cfg.batch_size) if gib(m) <= 0.9 * card.gib]
        return f"{fitting[-1]}: {gib(fitting[-1]):.1f}" if fitting else "none"
    return [f"{flops / 1e6:,.0f}", f"{cfg.epochs}, {steps:,}",
            *(f"{total / (card.share * card.tflops * 1e12) / 3600:.2f}" for card in cards),
            f"{micro_batch}: {gib(micro_batch):.1f}", *map(largest, cards)]


def divisors(n):
    return [m for m in range(1, n + 1) if n % m == 0]


def teacher_configs(path, teachers):
    """The DistillConfigs that the teachers' names stand for."""
    described = []
    for teacher in teachers:
        name = os.path.basename(os.path.normpath(teacher))
        tried = [os.path.join(os.path.dirname(path), f"{n}.py") for n in (name, name.rstrip("0123456789"))]
        found = [config for config in tried if os.path.isfile(config)]
        if not found:
            sys.exit(f"error: {path}: teacher {teacher} has no config beside it ({' or '.join(tried)})")
        described.append(configure(DistillConfig, found[:1]))
    return described


def sizes(described, plan):
    """Its ModelConfig, with the plan's vocabulary."""
    described.vocab_size = plan.vocab_size
    return model_config(described)


if __name__ == "__main__":
    launch(main)
