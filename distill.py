"""Distill an ensemble of frozen teachers into a student.

    python distill.py config/babyllama.py --teachers=out/gpt2_705m,out/llama_360m
    torchrun --nproc_per_node=4 distill.py config/babyllama.py

The loop, data and validation are train.py's; here are the loss and the teachers. The student's
training differs from its plain twin's by one function, `distillation_loss`.

Shapes: B sequences, T positions, C width, V vocabulary, N = B T (or a part of it).
"""
import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from lib.checkpoints import (
    checkpoint_steps,
    described_model,
    find_resumable,
    load_checkpoint,
    read_checkpoint_config,
)
from lib.chunked_loss import chunked_loss
from lib.configurator import launch, need
from lib.data import evaluate
from lib.machine import record
from lib.objectives import adversarial_loss, contrastive_loss, projections
from lib.runs import Keeper, spare
from lib.teacher_cache import cached_teachers, check_cache
from model import LanguageModel, float_weight, quantize_int8_
from train import TrainConfig, Trainee, leave, mean_nll, new_model, start, train


@dataclass
class DistillConfig(TrainConfig):
    teachers: tuple[str, ...] = ()         # run or checkpoint folders; their logits are averaged
    alpha: float = 0.5                     # weight of CE; 1 - alpha is the weight of T^2 KL
    temperature: float = 2.0
    kl_reduction: Literal["token", "sequence"] = "token"  # 'sequence' sums over positions, as published
    teacher_cache: str = ""                # folder: teachers' states, computed once for all students
    teacher_dtype: tuple[str, ...] = ("float32",)  # float32 | bfloat16 | int8 (weights): for all, or each
    # beyond the loss above (objectives.py)
    contrastive: float = 0.0               # weight of the N-pair loss on hidden states, from the loss above
    n_pairs: int = 32                      # sequences that it contrasts: one positive, the others negatives
    generator: str = ""                    # folder of a masked language model, for MATE-KD (mask_rate counts)
    generator_steps: int = 10              # steps of the generator, then steps of the student, and so on
    student_steps: int = 100


def main(cfg):
    check_distill_config(cfg)
    machine, data = start(cfg)
    need(cfg, n_pairs=(not cfg.contrastive or cfg.n_pairs > 1 and machine.micro_batch % cfg.n_pairs == 0,
                       f"at least 2 and a divisor of one rank's sequences, {machine.micro_batch}"))
    if cfg.generator and machine.graphs:
        machine = machine._replace(graphs=False)
        if machine.rank == 0:
            print("notice: no CUDA graphs with a generator, whose texts come in other shapes")
    teachers = load_teachers(cfg, machine, data)
    loss_fn, companion, about = distill_loss, None, {}
    if cfg.contrastive:
        torch.manual_seed(cfg.seed)
        companion = projections(cfg.n_embd, teachers).to(machine.device)
    if cfg.generator:
        loss_fn, (companion, about["generator"]) = adversarial_loss, load_generator(cfg, machine, data)
    keeper = Keeper(cfg, machine, data, about)  # out_dir is ours from here on
    measure(teachers, cfg, machine, data, keeper)
    if cfg.teacher_cache:
        teachers = cached_teachers(cfg, machine, data, teachers)
    loss_fn = partial(loss_fn, cfg=cfg, machine=machine, teachers=teachers,
                      formula=formula_of(cfg, machine, teachers))
    train(cfg, machine, data, Trainee(new_model(cfg, machine, data), companion), loss_fn, keeper)
    leave(machine)


# --- the loss -------------------------------------------------------------------------------------

def distill_loss(trainee, batch, cfg, machine, teachers, formula):
    """A step of the student on a batch, against the teachers on the same batch: train()'s loss function."""
    with torch.no_grad():
        states = [teacher.states(batch) for teacher in teachers]  # (B, T, ...) each
    h = trainee.student.model(batch.x)                            # (B, T, C)
    loss, parts = chunked_loss(formula, h, trainee.student.lm_head, batch.y, *states,
                               **machine.chunking(cfg))
    if cfg.contrastive:
        n_pair = contrastive_loss(h, states, trainee.companion, cfg.n_pairs)
        loss, parts["n_pair"] = (1 - cfg.contrastive) * loss + cfg.contrastive * n_pair, n_pair.detach()
    return loss, parts


def formula_of(cfg, machine, teachers):
    """formula(z_s, y, *states) -> (loss, parts). alpha and temperature are tensors: a schedule may fill_()
    them from step to step, and nothing is compiled anew."""
    alpha, temperature = (torch.tensor(x, device=machine.device) for x in (cfg.alpha, cfg.temperature))
    kl_weight = cfg.seq_len if cfg.kl_reduction == "sequence" else 1
    return partial(formula, teachers=teachers, alpha=alpha, temperature=temperature, kl_weight=kl_weight)


def formula(z_s, y, *states, teachers, alpha, temperature, kl_weight):
    z_t = mean_logits(teachers, states)
    return distillation_loss(z_s, z_t, y, alpha, temperature, kl_weight)


def mean_logits(teachers, states):
    """The teachers' averaged logits (N, V) of their states, (N, ...) each: logits are averaged, not
    probabilities."""
    return sum(teacher.logits(s).float() for teacher, s in zip(teachers, states)) / len(teachers)


def distillation_loss(z_s, z_t, y, alpha, temperature, kl_weight=1):
    """alpha CE(y, z_s) + (1 - alpha) T^2 KL(softmax(z_t / T) || softmax(z_s / T)).

    z_s, z_t (N, V): logits of the student and of the averaged teachers; y (N,) the targets; T the
    temperature. Both terms are means per token: BabyLlama-2's equation 1 (Baby Llama's prints no T^2).
    With kl_weight = seq_len KL is a sum over a chunk's positions and a mean over chunks: KLDivLoss's
    'batchmean' in the published code. Returns the loss, and CE and KL to log, both in nats per token.
    """
    z_s, z_t = z_s.float(), z_t.float()
    ce = mean_nll(z_s, y)
    # KL = sum_v p_t (log p_t - log p_s), where log p_s = s - logsumexp(s) and p_t sums to 1. Written
    # so, its gradient has no sum over V left in it: a quarter less time than F.kl_div and F.cross_entropy.
    s, log_p_t = z_s / temperature, F.log_softmax(z_t / temperature, -1)
    kl = ((log_p_t.exp() * (log_p_t - s)).sum(-1) + s.logsumexp(-1)).mean()
    loss = alpha * ce + (1 - alpha) * temperature ** 2 * kl_weight * kl
    return loss, {"ce": ce.detach(), "kl": kl.detach()}


# --- teachers -------------------------------------------------------------------------------------

class Teacher:
    """A frozen language model as a teacher. Any object with these two methods teaches, alone or beside
    others."""

    def __init__(self, model, dtype=torch.float32):
        """dtype: of the head's matrix, made ready once (int8 too)."""
        self.cfg, self.body, self.head = model.cfg, model.model, float_weight(model.lm_head, dtype)

    def states(self, batch):
        """Something per position that `logits` needs, (B, T, ...): here final hidden states (B, T, C)."""
        return self.body(batch.x).to(self.head.dtype)

    def logits(self, states):
        """(N, V) of states (N, ...)."""
        return states.to(self.head.dtype) @ self.head.T


def load_teachers(cfg, machine, data):
    """A teacher for each of cfg.teachers, in the dtypes asked for."""
    teachers = []
    for path, dtype in zip(cfg.teachers, teacher_dtypes(cfg)):
        model, described = load_beside(cfg, machine, data, path, "teacher")
        if dtype == "int8":
            if model.cfg.n_experts:
                sys.exit(f"error: teacher {path} has experts (n_experts={model.cfg.n_experts}), which have "
                         "no int8 form; use teacher_dtype bfloat16 for it")
            quantize_int8_(model)
        elif dtype == "bfloat16":
            for p in model.parameters():  # the rotary tables stay float32
                p.data = p.data.bfloat16()
        elif machine.dtype != torch.float32:  # autocast would do this at every step
            for m in model.model.layers.modules():
                if isinstance(m, torch.nn.Linear):
                    m.to(machine.dtype)
        if machine.compile:
            model.model.compile_layers()
        model.requires_grad_(False)
        if machine.graphs:
            with torch.no_grad():
                record(model.model, machine, cfg)
        teacher = Teacher(model, machine.dtype)
        teacher.weights_sha256 = described["weights_sha256"]
        teachers.append(teacher)
    return teachers


def ensemble_logits(teachers, batch):
    """The teachers' averaged logits at each position of a batch, (B T, V): they speak as one model."""
    return mean_logits(teachers, [teacher.states(batch).flatten(0, 1) for teacher in teachers])


def measure(teachers, cfg, machine, data, keeper):
    """Validation loss of each teacher and of their mean, printed and kept with the run."""
    def val_ce(members):
        return evaluate(partial(ensemble_logits, members), data.val, cfg, machine)
    each = [val_ce([teacher]) for teacher in teachers]
    ensemble = val_ce(teachers) if len(teachers) > 1 else each[0]
    if machine.rank == 0:
        for path, ce in zip(cfg.teachers, each):
            print(f"teacher {path}: validation loss {ce:.4f}")
        print(f"ensemble of {len(teachers)}: validation loss {ensemble:.4f} nats per token", flush=True)
    keeper.first_record = dict(teacher_val_ce=each, ensemble_val_ce=ensemble)
    keeper.about.update(teachers=list(cfg.teachers), teacher_sha256=[t.weights_sha256 for t in teachers],
                        teacher_val_ce=each)


def load_generator(cfg, machine, data):
    """The masked language model that is trained beside the student (MATE-KD), and what config.json says of
    it. A run that goes on has it in its state, and wants no more than its sizes."""
    if cfg.resume and checkpoint_steps(cfg.out_dir) and not os.path.isdir(cfg.generator):
        folder = find_resumable(cfg.out_dir)
        about = read_checkpoint_config(folder).get("generator", {})
        generator = LanguageModel(described_model(folder, about.get("model"))).to(machine.device)
    else:
        generator, described = load_beside(cfg, machine, data, cfg.generator, "generator", causal=False)
        about = dict(model=asdict(generator.cfg), weights_sha256=described["weights_sha256"])
    if machine.compile:
        generator.model.compile_layers()
    return generator.train(), about


def load_beside(cfg, machine, data, path, role, causal=True):
    """A checkpoint's model and config.json, to be used beside the student as its `role`. One that does not
    fit is refused by name."""
    model, _, described = load_checkpoint(path, machine.device)
    spare(cfg, path, role)
    if model.cfg.vocab_size != cfg.vocab_size:
        sys.exit(f"error: {role} {path} has a vocabulary of {model.cfg.vocab_size}, "
                 f"the student and {cfg.data_dir} of {cfg.vocab_size}")
    if described["tokenizer_sha256"] != data.meta["tokenizer_sha256"]:
        sys.exit(f"error: {role} {path} was trained with another tokenizer than {cfg.data_dir}")
    if model.cfg.block_size < cfg.seq_len:
        sys.exit(f"error: {role} {path} has {model.cfg.block_size} positions, chunks seq_len={cfg.seq_len}")
    if model.cfg.n_labels:
        sys.exit(f"error: {role} {path} is a classifier (n_labels={model.cfg.n_labels}), no language model")
    if model.cfg.n_experts and role == "generator":
        sys.exit(f"error: generator {path} has experts (n_experts={model.cfg.n_experts}); MATE-KD has none")
    if model.cfg.causal != causal:
        sys.exit(f"error: {role} {path} has causal={model.cfg.causal}, wanted is causal={causal}")
    return model, described


def teacher_dtypes(cfg):
    """One for each teacher."""
    dtypes = cfg.teacher_dtype * len(cfg.teachers) if len(cfg.teacher_dtype) == 1 else cfg.teacher_dtype
    if len(dtypes) != len(cfg.teachers) or not set(dtypes) <= {"float32", "bfloat16", "int8"}:
        sys.exit(f"error: teacher_dtype={','.join(cfg.teacher_dtype)} wants float32, bfloat16 or int8, "
                 "once or once per teacher")
    return dtypes


def check_distill_config(cfg):
    """Exit with one line if the settings make no distillation."""
    if not cfg.teachers:
        sys.exit("error: no teachers; name run folders: --teachers=out/gpt2_97m,out/llama_95m")
    need(cfg,
         alpha=(cfg.alpha <= 1, "between 0 and 1"),
         temperature=(0.01 <= cfg.temperature <= 1000, "between 0.01 and 1000"),
         contrastive=(cfg.contrastive <= 1, "between 0 and 1"),
         student_steps=(cfg.student_steps > 0, "at least 1"),
         causal=(cfg.causal, "True: train.py trains masked language models"),
         generator=(not (cfg.generator and (cfg.contrastive or cfg.teacher_cache or cfg.n_experts)),
                    "without contrastive, teacher_cache and n_experts"))
    teacher_dtypes(cfg)
    if cfg.teacher_cache:
        check_cache(cfg)


if __name__ == "__main__":
    launch(main, DistillConfig)
