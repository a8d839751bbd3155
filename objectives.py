"""What a model can learn beside the next token, and how else: masked tokens, contrast, adversarial text, sharpness, ascent.

    python train.py config/electra_56m.py                        # a masked language model
    python distill.py config/contrastive_llama.py                # Teaching Tiny Minds, section 4.3
    python distill.py config/masked_adversarial_llama.py         # section 4.4: MATE-KD (Rashid et al. 2021)

Two are loss functions for train(), contrast is a term beside distill.py's. What is trained beside the student (projections, the generator)
is the model's `companion`: in its optimizer and its resumable state, not in its weights.

Shapes: B sequences, T positions, C width, V vocabulary, k masked positions a sequence.
"""
import contextlib
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from loss import apply_loss, cross_entropy, distillation_formula, ensemble_logits, head_weights, hidden_states
from model import float_weight

MASK = 0  # <pad>: the papers' vocabulary has no mask token


# --- masked tokens --------------------------------------------------------------------------------

def masked_token_loss(model, batch, cfg, run):
    """Cross-entropy in nats at `mask_rate` of the positions, whose tokens the model does not see. Every
    masked token is replaced by MASK (BERT leaves a tenth as it is and puts another in for a tenth)."""
    x, at = mask_tokens(batch.x, cfg.mask_rate, torch.rand(batch.x.shape, device=batch.x.device))
    return model(x, lambda h, head: apply_loss(
        cross_entropy, take(h, at), head, batch.x.gather(1, at), chunk=cfg.loss_chunk, compiled=run.compile))


def mask_tokens(x, rate, noise):
    """x (B, T) with the round(rate T), at least one, positions of least noise (B, T) masked, and these (B, k)."""
    at = noise.argsort(1)[:, :max(1, round(rate * x.shape[1]))]
    return x.scatter(1, at, MASK), at


def take(h, at):
    """h (B, T, C) at positions at (B, k): (B, k, C)."""
    return h.gather(1, at[..., None].expand(-1, -1, h.shape[-1]))


# --- contrast -------------------------------------------------------------------------------------

def projections(width, teachers):
    """From the student's width to each teacher's, learned where they differ."""
    return nn.ModuleList(nn.Identity() if t.cfg.n_embd == width else nn.Linear(width, t.cfg.n_embd, bias=False) for t in teachers)


def contrastive_loss(h, h_t, project, n_pairs):
    """The N-pair loss of student states h (B, T, C) against each teacher's, h_t (B, T, C_1 + ... + C_n), the
    mean over teachers.

    A text's representation is the mean of its final hidden states, which the paper leaves open. Each run
    of n_pairs sequences is a group: the teacher's and the student's representation of one text are the
    positive pair, the student's of the other n_pairs - 1 texts the negatives.
    """
    widths = [getattr(p, "out_features", h.shape[-1]) for p in project]
    s = h.mean(1)
    terms = [n_pair_loss(t.view(-1, n_pairs, width), p(s).view(-1, n_pairs, width))
             for p, width, t in zip(project, widths, h_t.float().mean(1).split(widths, dim=-1))]
    return sum(terms) / len(terms)


def n_pair_loss(anchor, other):
    """-log( exp(a_i o_i) / sum_j exp(a_i o_j) ), mean over i, of anchors and others (groups, N, C): Sohn's N-pair loss
    (2016), its products over the root of the width."""
    with torch.autocast(anchor.device.type, enabled=False):
        z = anchor.float() @ other.float().mT / anchor.shape[-1] ** 0.5  # (groups, N, N)
    return -z.log_softmax(-1).diagonal(dim1=1, dim2=2).mean()


# --- adversarial text -----------------------------------------------------------------------------

def adversarial_loss_fn(model, batch, cfg, run, teachers, generator):
    """MATE-KD: `generator_steps` steps in which the generator learns to rewrite masked tokens so that teachers
    and student disagree, then `student_steps` in which the student learns from the text and from what
    the generator makes of it: (2 L(text) + T^2 KL(rewritten)) / 3, where L is distill.py's loss. With
    alpha = 1/2 CE, KD and adversarial KD have equal weights, as in the paper."""
    x, at = mask_tokens(batch.x, cfg.mask_rate, torch.rand(batch.x.shape, device=batch.x.device))
    maximise = batch.step % (cfg.generator_steps + cfg.student_steps) < cfg.generator_steps
    with contextlib.nullcontext() if maximise else torch.no_grad():
        z = generator(x, lambda h, head: head(take(h, at)))  # (B, k, V)
        token = F.gumbel_softmax(z.float(), hard=True)       # a sample, one-hot; its gradient is the softmax's
    formula = distillation_formula(cfg)
    adversarial = partial(formula, alpha=0.0)

    if maximise:
        with frozen(model):
            z_s = model(rewritten(getattr(model, "module", model), batch.x, at, token))
        z_t = ensemble_logits([lambda x, t=t: t(rewritten(t, x, at, token)) for t in teachers], batch.x)
        kl, parts = adversarial(z_s.flatten(0, 1), z_t.flatten(0, 1), batch.y.flatten())
        return -kl, {"adversarial_kl": parts["kl"]}

    both = torch.cat([batch.x, x.scatter(1, at, token.argmax(-1))])  # (2 B, T)
    with torch.no_grad():
        h_t = hidden_states(teachers, both).to(run.dtype)
        w_t = head_weights([t.lm_head for t in teachers], run.dtype)

    def head_loss(h, head):
        (text, other), (text_t, other_t) = h.chunk(2), h_t.chunk(2)
        a, parts = apply_loss(formula, text, head, batch.y, (text_t, w_t, len(teachers)), cfg.loss_chunk, run.compile)
        b, adversarial_parts = apply_loss(adversarial, other, head, batch.y, (other_t, w_t, len(teachers)), cfg.loss_chunk, run.compile)
        return (2 * a + b) / 3, {**parts, "adversarial_kl": adversarial_parts["kl"]}
    return model(both, head_loss)


def rewritten(model, x, at, token):
    """Embeddings (B, T, C) by `model` of x with one-hot `token` (B, k, V) at positions at."""
    weight = model.model.embed_tokens.weight
    table = float_weight(model.model.embed_tokens, torch.float32)
    h = table[x].scatter(1, at[..., None].expand(-1, -1, table.shape[1]), (token @ table).to(table.dtype))
    return h.to(weight.dtype) if weight.is_floating_point() else h


# --- another direction ----------------------------------------------------------------------------

def sam_loss(loss_fn, model, batch, cfg, run):
    """Sharpness-aware minimisation (Foret et al. 2021) of another loss function: the gradient is taken where that
    loss is worst nearby, at w + sam_rho g / |g|. Each micro-batch of each rank climbs by its own g (m-SAM).
    The backward pass is done in here, while the weights are moved; the loop's own then adds nothing."""
    own = getattr(model, "module", model)  # the first gradient is not for DDP to average
    params = [p for p in own.parameters() if p.requires_grad]
    loss, parts = loss_fn(own, batch, cfg, run)
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    norm = torch.stack([g.norm() for g in grads if g is not None]).norm()
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, grads):
            if g is not None:
                p += cfg.sam_rho / (norm + 1e-12) * g
    micro_steps = cfg.batch_size // (run.micro_batch * run.world)
    moved, _ = loss_fn(model, batch, cfg, run)
    (moved / micro_steps).backward()
    with torch.no_grad():
        for p, w in zip(params, before):
            p.copy_(w)
    return loss.detach().requires_grad_(), {**parts, "sam_loss": moved.detach()}


def ascent_loss(loss_fn, model, batch, cfg, run):
    """Gradient ascent post-training (Yoon et al. 2023): up another loss function, for a few steps at a small learning rate."""
    loss, parts = loss_fn(model, batch, cfg, run)
    return -loss, parts


@contextlib.contextmanager
def frozen(model):
    """The student's parameters get no gradient from what is computed within; the companion's do."""
    own = [p for name, p in model.named_parameters() if "companion." not in name]
    for p in own:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in own:
            p.requires_grad_(True)
