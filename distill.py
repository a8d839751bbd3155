"""Distill an ensemble of frozen teachers into a student.

    python distill.py config/babyllama.py --teachers=out/gpt2_705m,out/llama_360m
    torchrun --nproc_per_node=4 distill.py config/babyllama.py

The loop, data and validation are train.py's; here are the teachers and the loss. The student's
training differs from its plain twin's by one function, `distillation_loss`.
"""
import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist

import config
import disk
from loss import apply_loss, distillation_loss
from model import head_weight, quantize_int8_
from teacher_cache import cached_states
from train import TrainConfig, evaluate, start, train


@dataclass
class DistillConfig(TrainConfig):
    teachers: tuple[str, ...] = ()         # run or checkpoint folders; their logits are averaged
    alpha: float = 0.5                     # weight of CE; 1 - alpha is the weight of T^2 KL
    temperature: float = 2.0
    kl_reduction: Literal["token", "sequence"] = "token"  # 'sequence' sums KL over positions: the published code
    teacher_cache: str = ""                # folder: compute the teachers' states once, for all epochs and students
    teacher_dtype: tuple[str, ...] = ("float32",)  # float32 | bfloat16 | int8 (weights only): for all, or one each


def ensemble_logits(teachers, x):
    """The mean of the teachers' logits, (B, T, V) in float32. Logits are averaged, not probabilities."""
    z = teachers[0](x).float()
    for teacher in teachers[1:]:
        z = z + teacher(x)
    return z / len(teachers)


def distill_loss_fn(model, batch, cfg, run, states, heads):
    """train()'s loss function: the student's step against the teachers on the same batch.

    states(batch) gives the teachers' final hidden states side by side (B, T, C_1 + ... + C_n); heads
    are their output layers.
    """
    formula = partial(distillation_loss, alpha=cfg.alpha, temperature=cfg.temperature,
                      kl_weight=cfg.seq_len if cfg.kl_reduction == "sequence" else 1)
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    with torch.no_grad():
        h_t = states(batch).to(dtype)
        w_t = torch.cat([head_weight(head, dtype) for head in heads], dim=1)  # (V, C_1 + ... + C_n)
    return model(batch.x, lambda h, head: apply_loss(
        formula, h, head, batch.y, (h_t, w_t, len(heads)), cfg.loss_chunk, run.compile))


def hidden_states(teachers, x):
    """The teachers' final hidden states side by side, (B, T, C_1 + ... + C_n)."""
    return torch.cat([t.model(x) for t in teachers], dim=-1)


def load_teachers(cfg, run):
    """Frozen teachers in evaluation mode. One that does not fit the data is refused by name."""
    if not cfg.teachers:
        sys.exit("error: no teachers; name run folders: --teachers=out/gpt2_97m,out/llama_95m")
    if not cfg.alpha <= 1:
        sys.exit(f"error: alpha={cfg.alpha} must lie between 0 and 1")
    if not 0.01 <= cfg.temperature <= 1000:
        sys.exit(f"error: temperature={cfg.temperature} must lie between 0.01 and 1000")
    dtypes = cfg.teacher_dtype * len(cfg.teachers) if len(cfg.teacher_dtype) == 1 else cfg.teacher_dtype
    if len(dtypes) != len(cfg.teachers) or not set(dtypes) <= {"float32", "bfloat16", "int8"}:
        sys.exit(f"error: teacher_dtype={','.join(cfg.teacher_dtype)} wants float32, bfloat16 or int8, "
                 "once or once per teacher")
    teachers = []
    for path, dtype in zip(cfg.teachers, dtypes):
        teacher, _, described = disk.load_checkpoint(path, run.device)
        if cfg.overwrite and os.path.realpath(disk.find_checkpoint(path)).startswith(os.path.realpath(cfg.out_dir) + os.sep):
            sys.exit(f"error: --overwrite would delete teacher {path}; name another --out_dir")
        if teacher.cfg.vocab_size != cfg.vocab_size:
            sys.exit(f"error: teacher {path} has a vocabulary of {teacher.cfg.vocab_size}, "
                     f"the student and {cfg.data_dir} of {cfg.vocab_size}")
        if described["tokenizer_sha256"] != run.shards.meta["tokenizer_sha256"]:
            sys.exit(f"error: teacher {path} was trained with another tokenizer than {cfg.data_dir}; "
                     "train it on this data")
        if teacher.cfg.block_size < cfg.seq_len:
            sys.exit(f"error: teacher {path} has {teacher.cfg.block_size} positions, chunks have seq_len={cfg.seq_len}")
        if dtype == "int8":
            quantize_int8_(teacher)
        elif dtype == "bfloat16":
            for p in teacher.parameters():  # the rotary tables stay float32
                p.data = p.data.bfloat16()
        elif run.bf16:  # autocast would do this at every step
            for m in teacher.model.layers.modules():
                if isinstance(m, torch.nn.Linear):
                    m.bfloat16()
        teacher.weights_sha256 = described["weights_sha256"]
        teachers.append(teacher.requires_grad_(False))
    return teachers


def main(cfg):
    run = start(cfg)
    teachers = load_teachers(cfg, run)
    val_ce = [evaluate(t, cfg, run) for t in teachers]
    ensemble = evaluate(partial(ensemble_logits, teachers), cfg, run)
    if run.rank == 0:
        for path, ce in zip(cfg.teachers, val_ce):
            print(f"teacher {path}: validation loss {ce:.4f}")
        print(f"ensemble of {len(teachers)}: validation loss {ensemble:.4f} nats per token", flush=True)
    if run.compile:
        for t in teachers:
            t.compile_blocks()
    if cfg.teacher_cache:
        states = cached_states(cfg, run, teachers)
        for t in teachers:
            t.model = None  # only the heads are needed from here on
    else:
        def states(batch):
            return hidden_states(teachers, batch.x)
    train(cfg, run, partial(distill_loss_fn, states=states, heads=[t.lm_head for t in teachers]),
          provenance=dict(teachers=list(cfg.teachers), teacher_sha256=[t.weights_sha256 for t in teachers], teacher_val_ce=val_ce),
          first_record=dict(teacher_val_ce=val_ce, ensemble_val_ce=ensemble))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    config.run(main, DistillConfig)
