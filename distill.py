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
import torch.nn.functional as F

import config
import disk
from model import quantize_int8_
from train import TrainConfig, evaluate, start, train


@dataclass
class DistillConfig(TrainConfig):
    teachers: tuple[str, ...] = ()         # run or checkpoint folders; their logits are averaged
    alpha: float = 0.5                     # weight of CE; 1 - alpha is the weight of T^2 KL
    temperature: float = 2.0
    kl_reduction: Literal["token", "sequence"] = "token"  # 'sequence' sums KL over positions: the published code
    teacher_dtype: tuple[str, ...] = ("float32",)  # float32 | bfloat16 | int8 (weights only): for all, or one each


def distillation_loss(z_s, z_t, y, alpha, temperature, kl_reduction):
    """alpha CE(y, z_s) + (1 - alpha) T^2 KL(softmax(z_t / T) || softmax(z_s / T)).

    z_s, z_t (batch, positions, V): logits of the student and of the averaged teachers; y the targets;
    T the temperature. CE is a mean per token. KL is a mean per token ('token', Baby Llama's equation 1 as it reads) or summed over
    the chunk's positions and averaged over chunks ('sequence': KLDivLoss's 'batchmean' in the
    published code, seq_len times as heavy). Returns the loss and CE and KL to log, both per token.
    """
    z_s, z_t = z_s.float(), z_t.float()
    ce = F.cross_entropy(z_s.flatten(0, 1), y.flatten())
    log_p_s, log_p_t = F.log_softmax(z_s / temperature, -1), F.log_softmax(z_t / temperature, -1)
    kl = F.kl_div(log_p_s, log_p_t, log_target=True, reduction="sum") / y.numel()
    weight = y.shape[1] if kl_reduction == "sequence" else 1
    loss = alpha * ce + (1 - alpha) * temperature ** 2 * weight * kl
    return loss, {"ce": ce.detach(), "kl": kl.detach()}


def ensemble_logits(teachers, x):
    """The mean of the teachers' logits, (B, T, V) in float32. Logits are averaged, not probabilities."""
    z = teachers[0](x).float()
    for teacher in teachers[1:]:
        z = z + teacher(x)
    return z / len(teachers)


def distill_loss_fn(model, batch, teachers, cfg):
    """train()'s loss function: the student's step against the teachers on the same batch."""
    with torch.no_grad():
        z_t = ensemble_logits(teachers, batch.x)

    def head_loss(h, head):  # h (B, T, C)
        return distillation_loss(head(h), z_t, batch.y, cfg.alpha, cfg.temperature, cfg.kl_reduction)
    return model(batch.x, head_loss)


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
            t.compile(dynamic=False)
    train(cfg, run, partial(distill_loss_fn, teachers=teachers, cfg=cfg),
          provenance=dict(teachers=list(cfg.teachers), teacher_val_ce=val_ce),
          first_record=dict(teacher_val_ce=val_ce, ensemble_val_ce=ensemble))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    config.run(main, DistillConfig)
