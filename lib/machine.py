"""The machine a run is on: device, arithmetic, compiling, ranks; what must not reach the weights; signals."""
import ctypes
import math
import os
import platform
import re
import signal
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from lib.checkpoints import last_checkpoint

SCALE, CALM = 2.0 ** 16, 2000  # of the loss in float16 at first, steps until it doubles: GradScaler's


class Kind(NamedTuple):
    """What follows from the type of a device alone."""
    dtype: torch.dtype    # of --dtype=auto where the hardware does not multiply bfloat16
    chunks: int           # times as many positions at a time as suit a CPU's cache
    compile_flops: float  # of a run, from which --compile=auto compiles; inf: torch.compile is left alone
    deterministic: bool   # what --deterministic=auto means
    graphs: bool          # the models' bodies are recorded as CUDA graphs
    fused: bool           # AdamW is one kernel, which can leave a step out by itself
    pinned: bool          # copies from pinned memory, for which the host does not wait
    widest: torch.dtype   # float64 where there is such a thing
    backend: str          # between ranks; '': there is one


KINDS = {  # mps: Apple's, never tried on one
    "cpu": Kind(dtype=torch.float32, chunks=1, compile_flops=5e13, deterministic=True, graphs=False,
                fused=True, pinned=False, widest=torch.float64, backend="gloo"),
    "cuda": Kind(dtype=torch.float16, chunks=8, compile_flops=0, deterministic=False, graphs=True,
                 fused=True, pinned=True, widest=torch.float64, backend="nccl"),
    "mps": Kind(dtype=torch.float32, chunks=8, compile_flops=math.inf, deterministic=False, graphs=False,
                fused=False, pinned=False, widest=torch.float32, backend=""),
}


class Machine(NamedTuple):
    device: torch.device
    rank: int = 0
    world: int = 1         # ranks
    micro_batch: int = 16  # sequences per forward on this rank
    dtype: torch.dtype = torch.float32  # of matrix products
    compile: bool = False
    graphs: bool = False   # record the models' bodies as CUDA graphs
    scale: torch.Tensor = None  # of the loss in float16, whose least number is 6e-8 (see Guard)

    @property
    def kind(self):
        return KINDS[self.device.type]

    def positions(self, n):
        """So many positions at a time suit a CPU's cache: the number that suits this device (0: all)."""
        return n * self.kind.chunks

    def chunking(self, cfg):
        """How chunked_loss applies a formula here."""
        return dict(chunk=self.positions(cfg.loss_chunk), compiled=self.compile, scale=self.scale)

    def autocast(self, **options):
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32, **options)

    def scaled(self, loss):
        return loss if self.scale is None else loss * self.scale


def start_machine(cfg):
    """A Machine of one rank with the device and arithmetic of `cfg`."""
    device = pick_device(cfg.device)
    if cfg.deterministic == "on" or cfg.deterministic == "auto" and KINDS[device.type].deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it rounds attention's weights to sixteenths
    dtype = pick_dtype(cfg.dtype, device)
    scale = torch.tensor(SCALE, device=device) if dtype == torch.float16 else None
    return Machine(device, dtype=dtype, scale=scale)


def pick_dtype(name, device):
    """'auto', or what torch calls it, as a torch.dtype."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bf16(device) else KINDS[device.type].dtype
    return getattr(torch, name)


def ranks():
    """(rank, world), as torchrun says them in the environment."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        rank, world = 1, 0
    if not 0 <= rank < world or world > 1 and not os.environ.keys() >= set(names):
        given = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        sys.exit(f"error: the environment has {given}; start several processes with torchrun, or unset them")
    return rank, world


def pick_device(name):
    """'auto', or a type of device, as a torch.device; under torchrun each local rank its own GPU."""
    if name == "mps":
        if not torch.backends.mps.is_available():
            sys.exit("error: device='mps', but torch finds no Apple GPU; use --device=cpu")
        return torch.device("mps")
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit("error: device='cuda', but torch finds no CUDA device; use --device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # on CPU too
        return torch.device("cpu")  # not Apple's: nobody has tested that
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.index >= torch.cuda.device_count():
        sys.exit(f"error: {torch.cuda.device_count()} GPUs here, fewer than --nproc_per_node")
    torch.cuda.set_device(device)
    return device


def keep_freed_memory():
    """Stop glibc from handing large freed blocks back to the kernel: faulting them in again at every
    step cost a third of the time on CPU."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)          # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: 2 GiB
    except (OSError, AttributeError):
        pass  # another C library


def multiplies_bf16(device):
    """True where the hardware multiplies bfloat16 faster than float32: AMX or AVX-512-BF16 on CPU."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        with open("/proc/cpuinfo") as f:
            return bool(re.search(r"\b(amx_bf16|avx512_bf16)\b", f.read()))
    except OSError:
        return False


def can_compile(device, rank=0):
    """Try torch.compile on a trivial function; one line of notice if the machine lacks what it needs."""
    try:
        if KINDS[device.type].compile_flops == math.inf:
            raise NotImplementedError(f"not tried on {device}")
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return True
    except Exception as e:
        if rank == 0:
            reason = str(e).strip().splitlines()[0]
            print(f"notice: running uncompiled, torch.compile does not work here: {reason}")
        return False


def hardware(device):
    """The GPU's or CPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "cpu"


def mean_over_ranks(values, machine):
    if machine.world > 1:
        dist.all_reduce(values)
    return values / machine.world


def seed_dropout(device, *key):
    """Make what is drawn at random from here on follow from `key`: numbers of seed, step, micro-step and
    rank."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device: a third of a ms
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


# --- CUDA graphs ----------------------------------------------------------------------------------

def record(body, machine, cfg):
    """Record a model's body as CUDA graphs, forward and backward: hundreds of launches, which a GPU waits
    for, become two. Replayed for token ids (micro_batch, seq_len); all else goes the plain way. Head and loss
    stay outside. Dropout draws anew at each replay, from the generator that seed_dropout seeds. This is
    torch's make_graphed_callables, but autograd sees one node, not each parameter: half a millisecond."""
    plain, trained = body.forward, [p for p in body.parameters() if p.requires_grad]
    forth, back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    x = torch.zeros(machine.micro_batch, cfg.seq_len, dtype=torch.int64, device=machine.device)
    with machine.autocast(cache_enabled=False):
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):  # compiles, and makes what is made at the first use
                h = plain(x)
                if trained:
                    torch.autograd.grad(h, trained, h)
        with torch.cuda.graph(forth):
            h = plain(x)
        if trained:
            dh = torch.zeros_like(h)
            with torch.cuda.graph(back, pool=forth.pool()):
                gradients = [g.contiguous() for g in torch.autograd.grad(h, trained, dh)]
    h = h.detach()

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, *one_parameter):  # so that there is a backward
            x.copy_(y)
            forth.replay()
            ctx.save_for_backward(x)
            return h.detach()

        @staticmethod
        def backward(ctx, grad):
            ctx.saved_tensors  # torch refuses, if another replay has since written over what this one left
            dh.copy_(grad)
            back.replay()
            add_gradients(trained, gradients)
            return None, None

    training = body.training
    body.forward = lambda y: (
        Replay.apply(y, *trained[:1])
        if y.shape == x.shape and y.dtype == x.dtype and body.training == training else plain(y))


def add_gradients(params, gradients):
    """Each parameter's `grad` is the graph's tensor, or that is added to the `grad` which is there."""
    old = [(p.grad, g) for p, g in zip(params, gradients) if p.grad is not None]
    if old:
        torch._foreach_add_(*map(list, zip(*old)))
    for p, g in zip(params, gradients):
        if p.grad is None:
            p.grad = g


def own_gradients(params):
    """Give each parameter a `grad` to add to. Else it is the first replay's, which lies in the graph's
    memory, and the second writes over it. To be zeroed after a step, not set to None."""
    for p in params:
        if p.requires_grad:
            p.grad = torch.zeros_like(p)


def mean_gradients(params, machine):
    """Over the ranks. DDP would not see gradients that come with a replay."""
    gradients = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients]).div_(machine.world)
    dist.all_reduce(flat)
    means = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(means, gradients)])


# --- what must not reach the weights --------------------------------------------------------------

class Guard:
    """Takes the optimizers' steps, but keeps one whose loss or gradient is not finite away from weights and
    moments. Where an optimizer can (fused AdamW), the device decides, through the flag that GradScaler
    sets, and the host reads it when it logs; elsewhere the host waits for the device at every step.

    In float16 the loss is multiplied by a scale, by the rule of torch.amp.GradScaler: a gradient that
    overflows leaves its step out and halves the scale, CALM steps in a row without one double it. That is
    how the scale is found, and no fault. It is one, as anywhere, if the loss itself is not finite, or the
    gradient where the scale is down to 1: then scaling is not what made it overflow."""

    def __init__(self, cfg, machine, optimizers):
        self.cfg, self.machine, self.optimizers = cfg, machine, optimizers
        self.bad_steps = torch.zeros((), device=machine.device)         # since the last report
        self.first = torch.full((2,), math.inf, device=machine.device)  # bad step: this rank's, anyone's
        self.scaled_steps = torch.zeros((), device=machine.device)      # in a row since the scale changed

    def unscale(self, trainee):
        """To be done before the gradient's norm is taken."""
        if self.machine.scale is not None:
            gradients = [p.grad for p in trainee.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.machine.scale)

    def step(self, step, loss, grad_norm):
        scale, mine, overflow = self.machine.scale, ~loss.isfinite(), ~grad_norm.isfinite()
        bad = (mine | (overflow if scale is None else overflow & (scale <= 1))).float()
        if self.machine.world > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)  # all ranks skip or none
        self.first = self.first.minimum(torch.where(torch.stack([mine, bad > 0]), step, math.inf))
        self.bad_steps += bad
        found_inf = bad if self.cfg.not_finite == "skip" else self.bad_steps.clamp(max=1)
        if scale is not None:  # the gradient is the mean over ranks: it overflows on all or none
            self.rescale(overflow)
            found_inf = found_inf.maximum(overflow.float())
        for optimizer in self.optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer.found_inf = found_inf
                optimizer.step()
            elif not found_inf:
                optimizer.step()

    def rescale(self, overflow):
        self.scaled_steps = torch.where(overflow, 0, self.scaled_steps + 1)
        grows = self.scaled_steps == CALM
        self.scaled_steps *= ~grows
        self.machine.scale.mul_(torch.where(overflow, 0.5, torch.where(grows, 2.0, 1.0))).clamp_(1, 2 ** 24)

    def state(self):
        """What a run goes on from; skipped are steps since the last report."""
        if self.machine.scale is None:
            return dict(skipped=int(self.bad_steps))
        return dict(skipped=int(self.bad_steps), scale=int(self.machine.scale),
                    scaled_steps=int(self.scaled_steps))

    def restore(self, state):
        if self.cfg.not_finite == "skip":  # else they would be this run's own
            self.bad_steps += state.get("skipped", 0)
        if self.machine.scale is not None and "scale" in state:
            self.machine.scale.fill_(state["scale"])
            self.scaled_steps += state["scaled_steps"]

    def report(self):
        """For the log: steps skipped since the last report, and the scale; or the end of the run."""
        scale = {} if self.machine.scale is None else dict(scale=int(self.machine.scale))
        if self.cfg.not_finite == "skip":
            skipped, self.bad_steps = int(self.bad_steps), torch.zeros_like(self.bad_steps)
            return dict(skipped=skipped, **scale)
        if self.bad_steps:
            (mine, first), nobody = self.first.tolist(), self.machine.world
            rank = torch.tensor(self.machine.rank if mine == first else nobody, device=self.machine.device)
            if self.machine.world > 1:
                dist.all_reduce(rank, dist.ReduceOp.MIN)
            culprit = f"the loss on rank {int(rank)}" if rank < nobody else "the gradient"
            sys.exit(f"error: {culprit} was not finite at step {int(first)}; the last good checkpoint is "
                     f"{last_checkpoint(self.cfg.out_dir)}; lower learning_rate or raise warmup_iters, or "
                     "skip such steps with --not_finite=skip")
        return scale


# --- signals --------------------------------------------------------------------------------------

def catch_signals():
    """A list that SIGTERM or Ctrl-C puts itself into, so that the loop saves and ends. Batch systems and
    torchrun send it to each process a second time: only one typed again or sent later ends at once."""
    caught = []

    def handler(number, frame):
        caught.append((number, time.monotonic()))
        if time.monotonic() - caught[0][1] > (1 if number == signal.SIGINT else 10):
            release_signals()
            signal.raise_signal(number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return caught


def release_signals():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
