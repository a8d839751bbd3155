"""How a loss is computed without ever holding the logits.

A formula maps logits to a mean over positions: `formula(z_s, y, ...) -> (loss, parts)`. The readable way
(`--loss_chunk=0`) and the fast one both differentiate that very function.

Shapes: N = B T positions, C width, V vocabulary.
"""
import torch


def chunked_loss(formula, h, head, *per_position, chunk=0, compiled=False, scale=None):
    """formula(z_s, *per_position) of a whole batch: the loss and its detached parts.

    h (B, T, C): the student's final hidden states, head its output layer. per_position: what the formula
    takes beside logits, each (B, T, ...): the targets, the teachers' states. chunk: so many positions at a
    time; the logits (N, V) never exist as a whole, nor does their gradient, nor what the formula makes of
    the chunk's part of `per_position`. 0: the whole logits, and autograd. scale: what the loss will be
    multiplied by before its gradient is taken; in float16 that of the logits would be zeros without it. """
    h, per_position = h.flatten(0, 1), [t.flatten(0, 1) for t in per_position]
    if not chunk:
        return formula(head(h), *per_position)

    step = compiled_chunk_step if compiled else chunk_step
    with torch.no_grad():
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        w = head.weight.to(dtype)
        dh, dw = torch.empty_like(h), torch.zeros_like(head.weight)
        sums = {}
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            values = step(formula, h[part].to(dtype), w, [t[part] for t in per_position],
                          dh[part], dw, 1 / len(h), scale)
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value
    return WithGradient.apply(h, head.weight, sums.pop("loss"), dh, dw, scale), sums


def chunk_step(formula, h, w, per_position, dh, dw, weight, scale):
    """One chunk's share of the loss and of its parts; the gradient, times scale, goes into dh and is added to
    dw. weight: 1 / positions in the batch, so that the chunks' means add up to the batch's."""
    n = len(h)

    def loss_of(z_s):
        loss, parts = formula(z_s, *per_position)
        share = loss * n * weight
        return share if scale is None else share * scale, (share, parts)

    dz, (_, (loss, parts)) = torch.func.grad_and_value(loss_of, has_aux=True)(h @ w.T)  # (chunk, V)
    dh.copy_(dz @ w)
    dw.add_(dz.T @ h)
    return dict(loss=loss, **{name: value * n * weight for name, value in parts.items()})


compiled_chunk_step = torch.compile(chunk_step, dynamic=False)


class WithGradient(torch.autograd.Function):
    """`loss` as a function of h and w whose gradients, times scale, are known already."""

    @staticmethod
    def forward(ctx, h, w, loss, dh, dw, scale):
        ctx.save_for_backward(dh, dw)
        ctx.scale = scale
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        grad = grad if ctx.scale is None else grad / ctx.scale
        return dh * grad, dw * grad, None, None, None, None
