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
from chunks import evaluate
from loss import apply_loss, distillation_formula, ensemble_logits, head_weights, hidden_states
from model import quantize_int8_
from objectives import adversarial_loss_fn, contrastive_loss, projections
from teacher_cache import cached_states
from train import TrainConfig, start, train


@dataclass
class DistillConfig(TrainConfig):
    teachers: tuple[str, ...] = ()         # run or checkpoint folders; their logits are averaged
    alpha: float = 0.5                     # weight of CE; 1 - alpha is the weight of T^2 KL
    temperature: float = 2.0
    kl_reduction: Literal["token", "sequence"] = "token"  # 'sequence' sums KL over positions: the published code
    teacher_cache: str = ""                # folder: compute the teachers' states once, for all epochs and students
    teacher_dtype: tuple[str, ...] = ("float32",)  # float32 | bfloat16 | int8 (weights only): for all, or one each
    # beyond the loss above (objectives.py)
    contrastive: float = 0.0               # weight of the N-pair loss on hidden states; the loss above keeps the rest
    n_pairs: int = 32                      # sequences that it contrasts: one positive, the others negatives
    generator: str = ""                    # folder of a masked language model: MATE-KD with it (train.py's mask_rate counts)
    generator_steps: int = 10              # steps of the generator, then steps of the student, and so on
    student_steps: int = 100


def distill_loss_fn(model, batch, cfg, run, states, heads, project=None):
    """train()'s loss function: the student's step against the teachers on the same batch.

    states(batch) gives the teachers' final hidden states side by side (B, T, C_1 + ... + C_n); heads
    are their output layers; project, for the contrastive loss, takes the student's states to their widths.
    """
    formula = distillation_formula(cfg)
    with torch.no_grad():
        h_t = states(batch).to(run.dtype)
        w_t = head_weights(heads, run.dtype)

    def head_loss(h, head):
        loss, parts = apply_loss(formula, h, head, batch.y, (h_t, w_t, len(heads)), cfg.loss_chunk, run.compile)
        if cfg.contrastive:
            n_pair = contrastive_loss(h, h_t, project, cfg.n_pairs)
            loss, parts = (1 - cfg.contrastive) * loss + cfg.contrastive * n_pair, {**parts, "n_pair": n_pair.detach()}
        return loss, parts
    return model(batch.x, head_loss)


def check_distill_config(cfg, run):
    """Exit with one line if the settings make no distillation."""
    if not cfg.teachers:
        sys.exit("error: no teachers; name run folders: --teachers=out/gpt2_97m,out/llama_95m")
    for key, good, wanted in (
            ("alpha", cfg.alpha <= 1, "between 0 and 1"), ("temperature", 0.01 <= cfg.temperature <= 1000, "between 0.01 and 1000"),
            ("contrastive", cfg.contrastive <= 1, "between 0 and 1"), ("student_steps", cfg.student_steps > 0, "at least 1"),
            ("causal", cfg.causal, "True: train.py trains masked language models"),
            ("n_pairs", not cfg.contrastive or cfg.n_pairs > 1 and run.micro_batch % cfg.n_pairs == 0,
             f"at least 2 and divide the sequences that one rank sees at a time, {run.micro_batch}"),
            ("generator", not (cfg.generator and (cfg.contrastive or cfg.teacher_cache)), "without contrastive and teacher_cache")):
        if not good:
            sys.exit(f"error: {key}={getattr(cfg, key)} must be {wanted}")


def load_beside(cfg, run, path, what, causal=True):
    """A checkpoint's model and config.json, to be used beside the student. One that does not fit is refused by name."""
    model, _, described = disk.load_checkpoint(path, run.device)
    if cfg.overwrite and os.path.dirname(os.path.realpath(disk.find_checkpoint(path))) == os.path.realpath(cfg.out_dir):
        sys.exit(f"error: --overwrite would delete {what} {path}; name another --out_dir")
    if model.cfg.vocab_size != cfg.vocab_size:
        sys.exit(f"error: {what} {path} has a vocabulary of {model.cfg.vocab_size}, "
                 f"the student and {cfg.data_dir} of {cfg.vocab_size}")
    if described["tokenizer_sha256"] != run.shards.meta["tokenizer_sha256"]:
        sys.exit(f"error: {what} {path} was trained with another tokenizer than {cfg.data_dir}; train it on this data")
    if model.cfg.block_size < cfg.seq_len:
        sys.exit(f"error: {what} {path} has {model.cfg.block_size} positions, chunks have seq_len={cfg.seq_len}")
    if model.cfg.n_labels:
        sys.exit(f"error: {what} {path} is a classifier (n_labels={model.cfg.n_labels}), no language model")
    if model.cfg.causal != causal:
        sys.exit(f"error: {what} {path} has causal={model.cfg.causal}, wanted is causal={causal}")
    return model, described


def teacher_dtypes(cfg):
    """One for each teacher."""
    dtypes = cfg.teacher_dtype * len(cfg.teachers) if len(cfg.teacher_dtype) == 1 else cfg.teacher_dtype
    if len(dtypes) != len(cfg.teachers) or not set(dtypes) <= {"float32", "bfloat16", "int8"}:
        sys.exit(f"error: teacher_dtype={','.join(cfg.teacher_dtype)} wants float32, bfloat16 or int8, "
                 "once or once per teacher")
    return dtypes


def load_teachers(cfg, run):
    """Frozen teachers in evaluation mode, in the dtypes asked for."""
    teachers = []
    for path, dtype in zip(cfg.teachers, teacher_dtypes(cfg)):
        teacher, described = load_beside(cfg, run, path, "teacher")
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
    check_distill_config(cfg, run)
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
    loss_fn, companion = partial(distill_loss_fn, states=states, heads=[t.lm_head for t in teachers]), None
    provenance = dict(teachers=list(cfg.teachers), teacher_sha256=[t.weights_sha256 for t in teachers], teacher_val_ce=val_ce)
    if cfg.contrastive:
        torch.manual_seed(cfg.seed)
        companion = projections(cfg.n_embd, teachers).to(run.device)
        loss_fn = partial(loss_fn, project=companion)
    if cfg.generator:
        companion, described = load_beside(cfg, run, cfg.generator, "generator", causal=False)
        provenance["generator_sha256"] = described["weights_sha256"]
        loss_fn = partial(adversarial_loss_fn, teachers=teachers, generator=companion)
        if run.compile:
            companion.compile_blocks()
    train(cfg, run, loss_fn, companion, provenance, first_record=dict(teacher_val_ce=val_ce, ensemble_val_ce=ensemble))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    config.run(main, DistillConfig)
