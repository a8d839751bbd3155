"""Pre-train a GPT-2 or Llama on token shards. `train()` is the one training loop: distill.py hands
it another loss.

    python train.py config/llama_16m.py --data_dir=data/babylm --out_dir=out/llama_16m
    torchrun --nproc_per_node=4 train.py config/gpt2_705m.py
    python train.py config/gpt2_705m.py --resume

A step is an optimizer step; a chunk is `seq_len` contiguous tokens and the one after them.
Shapes: B sequences, T = seq_len positions, C width, V vocabulary, N = B T.
"""
import contextlib
import importlib.util
import math
import sys
import warnings
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from lib.chunked_loss import chunked_loss
from lib.configurator import launch, need
from lib.data import Chunks
from lib.machine import (
    KINDS,
    Guard,
    can_compile,
    mean_gradients,
    own_gradients,
    ranks,
    record,
    seed_dropout,
    start_machine,
)
from lib.objectives import climbed, masked_token_loss
from lib.runs import Keeper, refuse_out_dir, spare, start_from
from lib.shards import Shards
from model import Experts, LanguageModel, ModelConfig, check_model_config


@dataclass
class LoopConfig:
    """What the loop needs, whatever it trains."""
    out_dir: str = "out/run"
    resume: bool = False          # go on from the last checkpoint in out_dir, if there is one
    overwrite: bool = False       # delete the run in out_dir first
    seed: int = 42
    epochs: int = 4
    max_iters: int = 0            # stop after this many optimizer steps; 0 = all that the epochs have
    batch_size: int = 128         # sequences per optimizer step, all ranks together
    # AdamW and its schedule: linear warm-up, then down to min_lr; decay on matrices only
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the layers' matrices, with AdamW's rates
    learning_rate: float = 3e-4
    min_lr: float = 0.0
    warmup_iters: int = 200
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8
    grad_clip: float = 1.0        # global norm; 0 = off
    sam_rho: float = 0.0          # sharpness-aware minimisation with this radius (objectives.py); 0 = off
    not_finite: Literal["stop", "skip"] = "stop"  # a step with inf or nan: it never reaches the weights
    # validation and logging, in steps
    eval_interval: int = 500      # validation and checkpoint; 0 = at the end of each epoch
    patience: int = 0             # stop after so many validations in a row without a gain of 0.001; 0 = never
    log_interval: int = 10
    wandb: bool = False           # also log there (pip install wandb)
    tensorboard: bool = False     # also write its event files into out_dir (pip install tensorboard)
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: never mps (Apple), where nobody tried it
    # auto: bfloat16 where hardware has it; else float16 (its loss scaled) on CUDA, float32 on a CPU and mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    deterministic: Literal["auto", "on", "off"] = "auto"    # same seed, same bits. auto: on for CPU


@dataclass
class TrainConfig(LoopConfig, ModelConfig):
    data_dir: str = "data/babylm"
    seq_len: int = 128            # tokens in a training chunk, at most block_size
    micro_batch_size: int = 0     # sequences at a time on one rank (memory); 0 = batch_size / ranks
    router_balance: float = 0.01  # with n_experts, weight in the loss of: as many tokens to each expert
    router_z: float = 0.001       # and of: small router logits
    mask_rate: float = 0.15       # share of positions that a model with causal=False predicts
    curriculum: tuple[str, ...] = ()  # buckets of sources, "childes" or "switchboard cbt": epochs over the
                                  # first, then over the first two, and so on
    curriculum_epochs: int = 3    # epochs until the next bucket is added
    init_from: str = ""           # run or checkpoint folder whose weights training starts from
    ascent: bool = False          # climb the loss instead (gradient ascent post-training, Yoon et al. 2023)
    random_offset: bool = False   # shift each chunk by 0..seq_len-1 at each visit (the published code)
    eval_chunks: int = 8192       # validation chunks, the same each time, or as many as there are; 0 = all
    keep_words: bool = False      # keep weights at 1M, 2M .. 10M, 20M .. words (the challenge since 2025)
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on, but for runs of a few minutes on CPU
    cuda_graphs: Literal["auto", "off"] = "auto"    # auto: on a GPU, one launch for all of a model's body
    loss_chunk: int = 512         # positions whose logits exist at a time (GPU: 8 times as many); 0 = all


def main(cfg):
    machine, data = start(cfg)
    keeper = Keeper(cfg, machine, data)  # out_dir is ours from here on
    loss_fn = partial(next_token_loss, cfg=cfg, machine=machine)
    if not cfg.causal:
        loss_fn = partial(masked_token_loss, cfg=cfg, machine=machine, formula=cross_entropy)
    train(cfg, machine, data, Trainee(new_model(cfg, machine, data)), loss_fn, keeper)
    leave(machine)


# --- the loss -------------------------------------------------------------------------------------

def cross_entropy(z_s, y):
    """Next-token cross-entropy of logits z_s (N, V) at targets y (N,), in nats per token, and the parts to
    log."""
    ce = mean_nll(z_s.float(), y)
    return ce, {"ce": ce.detach()}


def mean_nll(z, y):
    return (z.logsumexp(-1) - z.gather(-1, y[:, None])[:, 0]).mean()


def next_token_loss(trainee, batch, cfg, machine):
    h = trainee.student.model(batch.x)  # (B, T, C)
    return chunked_loss(cross_entropy, h, trainee.student.lm_head, batch.y, **machine.chunking(cfg))


def with_routers(loss_fn, trainee, batch, cfg):
    """Any loss function's loss, and what keeps the routers of a student's experts in order: router_balance
    E sum_e f_e P_e, with a sequence's share of tokens that met e and mean of p_e, and router_z (log sum_e
    exp z_e)^2: means over their layers."""
    loss, parts = loss_fn(trainee, batch)
    experts = [layer.mlp for layer in trainee.student.model.layers if isinstance(layer.mlp, Experts)]
    balance, z, dropped = (sum(values) / len(experts) for values in zip(*(m.measured for m in experts)))
    loss = loss + cfg.router_balance * balance + cfg.router_z * z
    return loss, {**parts, "router_balance": balance.detach(), "router_z": z.detach(), "dropped": dropped}


# --- the loop -------------------------------------------------------------------------------------

class Trainee(nn.Module):
    """The student, and what is trained or kept beside it (projections, a generator, an average of its
    weights): one module for DDP and the optimizers. Only the student is validated and is a checkpoint's
    model."""

    def __init__(self, student, companion=None):
        super().__init__()
        self.student, self.companion = student, companion

    def forward(self, loss_fn, batch):
        """loss_fn(trainee, batch) -> (loss, {name: detached scalar}), a mean over the batch's sequences.
        Called in here, so that DDP sees all of it."""
        return loss_fn(self, batch)


def train(cfg, machine, data, trainee, loss_fn, keeper):
    """Train until data.total steps are done, or the keeper has seen enough. data gives `batch(step,
    micro_step)`; the keeper (lib/runs.py) says where to begin, and logs, validates and saves between the
    steps."""
    if getattr(cfg, "n_experts", 0):
        loss_fn = partial(with_routers, loss_fn, cfg=cfg)
    optimizers = make_optimizers(trainee, cfg)
    guard = Guard(cfg, machine, optimizers)
    step = keeper.begin(trainee, optimizers, guard)
    micro_steps = cfg.batch_size // (machine.micro_batch * machine.world)
    ddp, params = distributed(trainee, machine), list(trainee.parameters())
    if machine.graphs:
        record(trainee.student.model, machine, cfg)
    summed = machine.graphs and (micro_steps > 1 or cfg.sam_rho > 0)  # several replays to a step
    if summed:
        own_gradients(params)

    def forward_backward():
        """The gradient of the whole step: all micro-batches, all ranks. Returns the means of the loss and
        its parts."""
        sums = {}
        for micro_step in range(micro_steps):
            batch = data.batch(step, micro_step)
            seed_dropout(machine.device, cfg.seed, step, micro_step, machine.rank)
            last = micro_step == micro_steps - 1
            with contextlib.nullcontext() if last or ddp is trainee else ddp.no_sync():
                with machine.autocast():
                    loss, parts = ddp(loss_fn, batch)
                machine.scaled(loss / micro_steps).backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0) + value / micro_steps
        if machine.graphs and machine.world > 1:
            mean_gradients(params, machine)
        return sums

    while keeper.wants(step):
        lr = learning_rate(cfg, step, data.total)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * group.get("lr_scale", 1)
        sums = forward_backward()
        if cfg.sam_rho:
            with climbed(trainee, cfg.sam_rho):
                sums["sam_loss"] = forward_backward()["loss"]
        guard.unscale(trainee)
        grad_norm = clip_gradients(params, cfg.grad_clip or math.inf)
        guard.step(step + 1, sums["loss"], grad_norm)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=not summed)
        step += 1
        keeper.after_step(step, sums, lr, grad_norm)
    keeper.finish(step)


def make_optimizers(trainee, cfg):
    """AdamW; weight decay on matrices and embeddings, not on biases and norms (as in HF's Trainer). With
    muon the layers' matrices have Muon (Jordan 2024), its steps as large as AdamW's (Liu et al. 2025,
    arXiv 2502.16982, so one rate and decay suit both). A group with an 'lr_scale' has so many times the
    learning rate."""
    matrices = [p for name, p in trainee.student.named_parameters() if cfg.optimizer == "muon"
                and ".layers." in name and p.dim() == 2 and p.requires_grad]
    muon = [torch.optim.Muon([dict(params=matrices)], lr=cfg.learning_rate, weight_decay=cfg.weight_decay,
                             adjust_lr_fn="match_rms_adamw")] if matrices else []
    inside = set(matrices)
    params = [p for p in trainee.parameters() if p.requires_grad and p not in inside]
    of_vectors = cfg.weight_decay if getattr(cfg, "decay_all", False) else 0.0
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=cfg.weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=of_vectors)]
    return [torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
                              fused=KINDS[params[0].device.type].fused,
                              maximize=getattr(cfg, "ascent", False)), *muon]


def clip_gradients(params, max_norm):
    """Scale the gradients g to min(1, max_norm / |g|) g, |g| over all of them, and return |g|: torch's
    clip_grad_norm_ without its sorting by device, which takes as long as the rest."""
    gradients = [p.grad for p in params if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1))
    return norm


def learning_rate(cfg, step, total):
    """Linear warm-up to learning_rate over warmup_iters steps, then half a cosine or a line to min_lr, which
    the step after the last would have. The warm-up's steps are 1/(warmup_iters + 1) and so on; Hugging
    Face's begin with a step at 0, and with warmup_from_0 (tools/finetune.py) these do."""
    if step < cfg.warmup_iters:
        first = 0 if getattr(cfg, "warmup_from_0", False) else 1
        return cfg.learning_rate * (step + first) / (cfg.warmup_iters + first)
    progress = (step - cfg.warmup_iters) / max(total - cfg.warmup_iters, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    share = {"cosine": cosine, "linear": 1 - progress, "constant": 1.0}[cfg.schedule]
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * share


def distributed(trainee, machine):
    """The trainee, with DDP around it where there are several ranks and no CUDA graphs."""
    if machine.world == 1 or machine.graphs:
        return trainee
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # since 2.13 broadcast_buffers has a new name
        return DistributedDataParallel(
            trainee, broadcast_buffers=False, gradient_as_bucket_view=True,
            # a step may leave parts alone; and on CPU, where a resumed run has the same bits, DDP must not
            # arrange its sums anew after the first step
            find_unused_parameters=trainee.companion is not None or machine.kind.deterministic,
            device_ids=[machine.device] if machine.device.type == "cuda" else None)


def leave(machine):
    """End the process group, after `train` has let go of DDP: gloo's thread would wait for it for ever."""
    if machine.world > 1:
        dist.destroy_process_group()


# --- starting: machine, data, checks --------------------------------------------------------------

def start(cfg):
    """(Machine, Chunks) for `cfg`, with the process group started under torchrun. What a user can get wrong
    in settings, data or out_dir ends here in one line; nothing is written."""
    check_loop_config(cfg)
    need(cfg,
         seq_len=(cfg.seq_len > 0, "at least 1"),
         mask_rate=(cfg.mask_rate <= 1, "at most 1"),
         curriculum_epochs=(cfg.curriculum_epochs, "at least 1"),
         ascent=(not (cfg.ascent and (cfg.sam_rho or cfg.n_experts or cfg.optimizer == "muon")),
                 "False with sam_rho, n_experts or muon"),
         n_labels=(cfg.n_labels == 0, "0: tools/finetune.py makes classifiers"))
    shards = Shards(cfg.data_dir, "train")
    vocab_size = shards.meta["vocab_size"]
    need(cfg, vocab_size=(cfg.vocab_size in (0, vocab_size), f"0 or that of {cfg.data_dir}, {vocab_size}"))
    cfg.vocab_size = vocab_size
    check_model_config(cfg)
    rank, world = ranks()
    micro_batch = cfg.micro_batch_size or max(cfg.batch_size // world, 1)
    need(cfg,
         seq_len=(cfg.seq_len <= cfg.block_size, f"at most the model's block_size={cfg.block_size}"),
         batch_size=(cfg.batch_size % (micro_batch * world) == 0,
                     f"a multiple of micro_batch_size x ranks = {micro_batch} x {world}"),
         causal=(cfg.causal or shards.meta["pad"] == 0,
                 f"True, as {cfg.data_dir} has pad={shards.meta['pad']}: tokens are hidden behind <pad> as "
                 "token 0; prepare it with a tokenizer of prepare.py's own"))
    refuse_out_dir(cfg)
    if cfg.init_from and not cfg.resume:
        spare(cfg, cfg.init_from, "init_from")
    machine = start_machine(cfg)._replace(rank=rank, world=world, micro_batch=micro_batch)
    device, backend = machine.device, machine.kind.backend
    need(cfg, device=(world == 1 or backend, "cpu or cuda for several ranks"))
    if world > 1:
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    data = Chunks(cfg, machine, shards)
    compile = pays_to_compile(cfg, machine, data) and can_compile(device, rank)
    graphs = machine.kind.graphs and cfg.cuda_graphs == "auto"
    if cfg.n_experts and graphs:
        graphs = False
        if rank == 0:
            print("notice: no CUDA graphs with n_experts: a replay leaves no balance and z loss behind")
    return machine._replace(compile=compile, graphs=graphs), data


def check_loop_config(cfg):
    need(cfg,
         batch_size=(cfg.batch_size > 0, "at least 1"),
         log_interval=(cfg.log_interval > 0, "at least 1"),
         epochs=(cfg.epochs > 0, "at least 1"),
         optimizer=(cfg.optimizer == "adamw" or hasattr(torch.optim, "Muon"),
                    f"adamw: Muon wants torch 2.9, this is {torch.__version__}"),
         beta1=(cfg.beta1 < 1, "below 1"),
         beta2=(cfg.beta2 < 1, "below 1"),
         adam_eps=(cfg.adam_eps > 0, "above 0"),
         out_dir=(cfg.out_dir, "a folder's name"),
         overwrite=(not (cfg.overwrite and cfg.resume), "without --resume"))
    for package in ("wandb", "tensorboard"):
        if getattr(cfg, package) and not importlib.util.find_spec(package):
            sys.exit(f"error: --{package} needs the package: pip install {package}")


def pays_to_compile(cfg, machine, data):
    """What --compile=auto means: on a CPU the half minute it takes is lost on a run of a few minutes."""
    if cfg.compile != "auto":
        return cfg.compile == "on"
    with torch.device("meta"):
        parameters = LanguageModel(model_config(cfg)).n_params()
    flops = 6 * parameters * data.total * cfg.batch_size * cfg.seq_len / machine.world
    return flops > machine.kind.compile_flops


def new_model(cfg, machine, data):
    """The model that training starts from: random by `seed`, or with the weights of init_from."""
    torch.manual_seed(cfg.seed)
    model = LanguageModel(model_config(cfg))
    if cfg.init_from and not cfg.resume:
        start_from(cfg.init_from, model, data.meta)
    if machine.compile:
        model.model.compile_layers()
    return model.to(machine.device)


def model_config(cfg):
    return ModelConfig(**{f.name: getattr(cfg, f.name) for f in fields(ModelConfig)})


if __name__ == "__main__":
    launch(main, TrainConfig)
