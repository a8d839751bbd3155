"""The losses, and how one is computed without ever holding the logits.

A formula maps logits to a mean over positions. To change what is trained, change a formula: the
readable way (`--loss_chunk=0`) and the fast one both follow, as both differentiate this very code.

Shapes: N = B T positions, C width, V vocabulary.
"""
from functools import partial

import torch
import torch.nn.functional as F

from model import float_weight


def cross_entropy(z_s, z_t, y):
    """Next-token cross-entropy of logits z_s (N, V) at targets y (N,), in nats per token, and the
    parts to log. There is no teacher: z_t is None."""
    ce = mean_nll(z_s.float(), y)
    return ce, {"ce": ce.detach()}


def distillation_loss(z_s, z_t, y, alpha, temperature, kl_weight=1):
    """alpha CE(y, z_s) + (1 - alpha) T^2 KL(softmax(z_t / T) || softmax(z_s / T)).

    z_s, z_t (N, V): logits of the student and of the averaged teachers; y (N,) the targets; T the
    temperature. Both terms are means per token: Baby Llama's equation 1 as it reads. With kl_weight
    = seq_len KL is a sum over a chunk's positions and a mean over chunks: KLDivLoss's 'batchmean' in
    the published code. Returns the loss, and CE and KL to log, both in nats per token.
    """
    z_s, z_t = z_s.float(), z_t.float()
    ce = mean_nll(z_s, y)
    # KL = sum_v p_t (log p_t - log p_s), where log p_s = s - logsumexp(s) and p_t sums to 1. Written
    # so, its gradient has no sum over V left in it: a quarter less time than F.kl_div and F.cross_entropy.
    s, log_p_t = z_s / temperature, F.log_softmax(z_t / temperature, -1)
    kl = ((log_p_t.exp() * (log_p_t - s)).sum(-1) + s.logsumexp(-1)).mean()
    return alpha * ce + (1 - alpha) * temperature ** 2 * kl_weight * kl, {"ce": ce.detach(), "kl": kl.detach()}


def distillation_formula(cfg):
    """distillation_loss with a config's alpha, temperature and kl_reduction."""
    return partial(distillation_loss, alpha=cfg.alpha, temperature=cfg.temperature,
                   kl_weight=cfg.seq_len if cfg.kl_reduction == "sequence" else 1)


def mean_nll(z, y):
    return (z.logsumexp(-1) - z.gather(-1, y[:, None])[:, 0]).mean()


def apply_loss(formula, h, head, y, teachers=None, chunk=0, compiled=False):
    """formula(z_s, z_t, y) of a whole batch: the loss and its detached parts.

    h (B, T, C): the student's final hidden states, head its output layer, y (B, T) the targets.
    teachers: (h_t, w_t, n), the final hidden states (B, T, C_1 + ... + C_n) of n teachers side by
    side and their heads likewise (V, C_1 + ... + C_n): one matrix product sums their logits.
    chunk: so many positions at a time; neither the student's nor the teachers' logits (N, V) ever
    exist as a whole, nor does their gradient. 0: the whole logits, and autograd.
    """
    h, y = h.flatten(0, 1), y.flatten()
    h_t, w_t, n = teachers or (None, None, 1)
    h_t = None if h_t is None else h_t.flatten(0, 1)
    if not chunk:
        return formula(head(h), teacher_logits(h_t, w_t, n), y)

    step = compiled_chunk_step if compiled else chunk_step
    with torch.no_grad():
        dtype = torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else h.dtype
        w = head.weight.to(dtype)
        dh, dw = torch.empty_like(h), torch.zeros_like(head.weight)
        sums = {}
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            values = step(formula, h[part].to(dtype), w, None if h_t is None else h_t[part], w_t, n, y[part],
                          dh[part], dw, 1 / len(h))
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value
    return WithGradient.apply(h, head.weight, sums.pop("loss"), dh, dw), sums


def teacher_logits(h_t, w_t, n):
    """The mean of n teachers' logits (N, V): logits are averaged, not probabilities."""
    return None if h_t is None else (h_t @ w_t.T).float() / n


def ensemble_logits(teachers, x):
    """The mean of the teachers' logits, (B, T, V) in float32, as a model whole of its own."""
    return sum(t(x).float() for t in teachers) / len(teachers)


def hidden_states(teachers, x):
    """The teachers' final hidden states side by side, (B, T, C_1 + ... + C_n)."""
    return torch.cat([t.model(x) for t in teachers], dim=-1)


def head_weights(heads, dtype):
    """The output layers' matrices side by side, (V, C_1 + ... + C_n)."""
    return torch.cat([float_weight(head, dtype) for head in heads], dim=1)


def chunk_step(formula, h, w, h_t, w_t, n, y, dh, dw, weight):
    """One chunk's share of the loss and of its parts; the gradient goes into dh and is added to dw.
    weight: 1 / positions in the batch, so that the chunks' means add up to the batch's."""
    z_t = teacher_logits(h_t, w_t, n)

    def loss_of(z_s):
        loss, parts = formula(z_s, z_t, y)
        return loss * len(y) * weight, parts

    dz, (loss, parts) = torch.func.grad_and_value(loss_of, has_aux=True)(h @ w.T)  # (chunk, V)
    dh.copy_(dz @ w)
    dw.add_(dz.T @ h)
    return dict(loss=loss, **{name: value * len(y) * weight for name, value in parts.items()})


compiled_chunk_step = torch.compile(chunk_step, dynamic=False)


class WithGradient(torch.autograd.Function):
    """`loss` as a function of h and w whose gradients are known already."""

    @staticmethod
    def forward(ctx, h, w, loss, dh, dw):
        ctx.save_for_backward(dh, dw)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return dh * grad, dw * grad, None, None, None
