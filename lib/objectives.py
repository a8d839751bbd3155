"""What a model can learn beside the next token, and how else: masked tokens, contrast, adversarial text,
sharpness.

    python train.py config/electra_56m.py                        # a masked language model
    python distill.py config/contrastive_llama.py                # Teaching Tiny Minds, section 4.3
    python distill.py config/masked_adversarial_llama.py         # section 4.4: MATE-KD (Rashid et al. 2021)
    python train.py config/gpt2_10m.py config/sam.py ...         # Baby Llama, appendix B

`formula` is the script's: cross-entropy of train.py, or the distillation loss of distill.py.

Shapes: B sequences, T positions, C width, V vocabulary, k masked positions a sequence.
"""
import contextlib
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.chunked_loss import chunked_loss
from lib.data import Batch, mask_tokens, take
from model import float_weight


def masked_token_loss(trainee, batch, cfg, machine, formula):
    """Cross-entropy in nats at `mask_rate` of the positions, whose tokens the model does not see. Every
    masked token is replaced by MASK (BERT leaves a tenth as it is and puts another in for a tenth)."""
    student = trainee.student
    x, at = mask_tokens(batch.x, cfg.mask_rate, torch.rand(batch.x.shape, device=batch.x.device))
    return chunked_loss(formula, take(student.model(x), at), student.lm_head, batch.x.gather(1, at),
                        **machine.chunking(cfg))


# --- contrast -------------------------------------------------------------------------------------

def projections(width, teachers):
    """From the student's width to each teacher's, learned where they differ."""
    widths = [t.cfg.n_embd for t in teachers]
    return nn.ModuleList(nn.Identity() if w == width else nn.Linear(width, w, bias=False) for w in widths)


def contrastive_loss(h, states, project, n_pairs):
    """The N-pair loss of student states h (B, T, C) against each teacher's, states [(B, T, C_i)], the mean
    over teachers.

    A text's representation is the mean of its final hidden states, which the paper leaves open. Each group
    of n_pairs sequences: the teacher's and the student's representation of one text are the positive pair,
    the student's of the other n_pairs - 1 texts the negatives. """
    s = h.mean(1)
    terms = [n_pair_loss(h_t.float().mean(1).unflatten(0, (-1, n_pairs)), p(s).unflatten(0, (-1, n_pairs)))
             for p, h_t in zip(project, states)]
    return sum(terms) / len(terms)


def n_pair_loss(anchor, other):
    """-log( exp(a_i o_i) / sum_j exp(a_i o_j) ), mean over i, of anchors and others (groups, N, C): Sohn's
    N-pair loss (2016), its products over the root of the width."""
    with torch.autocast(anchor.device.type, enabled=False):
        z = anchor.float() @ other.float().mT / anchor.shape[-1] ** 0.5  # (groups, N, N)
    return -z.log_softmax(-1).diagonal(dim1=1, dim2=2).mean()


# --- adversarial text -----------------------------------------------------------------------------

def adversarial_loss(trainee, batch, cfg, machine, teachers, formula):
    """MATE-KD: `generator_steps` steps in which the generator, trained beside the student, learns to
    rewrite masked tokens so that teachers and student disagree, then `student_steps` in which the student
    learns from the text and from what the generator makes of it: (2 L(text) + T^2 KL(rewritten)) / 3, where
    L is distill.py's loss. With alpha = 1/2 CE, KD and adversarial KD have equal weights, as in the
    paper."""
    student, generator = trainee.student, trainee.companion
    x, at = mask_tokens(batch.x, cfg.mask_rate, torch.rand(batch.x.shape, device=batch.x.device))
    maximise = batch.step % (cfg.generator_steps + cfg.student_steps) < cfg.generator_steps
    with contextlib.nullcontext() if maximise else torch.no_grad():
        z = generator.lm_head(take(generator.model(x), at))  # (B, k, V)
        token = F.gumbel_softmax(z.float(), hard=True)       # a sample, one-hot, with the softmax's gradient
    kl_alone = partial(formula, alpha=0.0)

    if maximise:
        with frozen(student):
            z_s = student.lm_head(student.model(rewritten(student.model, batch.x, at, token)))
        states = [t.states(Batch(rewritten(t.body, batch.x, at, token))).flatten(0, 1) for t in teachers]
        kl, parts = kl_alone(z_s.flatten(0, 1), batch.y.flatten(), *states)
        return -kl, {"adversarial_kl": parts["kl"]}

    both = torch.cat([batch.x, x.scatter(1, at, token.argmax(-1))])  # (2 B, T)
    with torch.no_grad():
        states = [t.states(Batch(both)).chunk(2) for t in teachers]
    text, other = student.model(both).chunk(2)
    apply = partial(chunked_loss, **machine.chunking(cfg))
    on_text, parts = apply(formula, text, student.lm_head, batch.y, *(s for s, _ in states))
    on_other, other_parts = apply(kl_alone, other, student.lm_head, batch.y, *(s for _, s in states))
    return (2 * on_text + on_other) / 3, {**parts, "adversarial_kl": other_parts["kl"]}


def rewritten(body, x, at, token):
    """Embeddings (B, T, C) by a model's `body` of x with one-hot `token` (B, k, V) at positions at."""
    weight = body.embed_tokens.weight
    table = float_weight(body.embed_tokens, torch.float32)
    h = table[x].scatter(1, at[..., None].expand(-1, -1, table.shape[1]), (token @ table).to(table.dtype))
    return h.to(weight.dtype) if weight.is_floating_point() else h


@contextlib.contextmanager
def frozen(module):
    """The module's parameters get no gradient from what is computed within."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


# --- another direction ----------------------------------------------------------------------------

@contextlib.contextmanager
def climbed(module, rho):
    """Sharpness-aware minimisation (Foret et al. 2021): within, the weights are where the loss is worst
    nearby, at w + rho g / |g|, and the gradient g is gone, so that the one taken there takes its place."""
    params = [p for p in module.parameters() if p.grad is not None]
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            p += rho / (norm + 1e-12) * p.grad
    module.zero_grad(set_to_none=False)
    yield
    with torch.no_grad():
        for p, w in zip(params, before):
            p.copy_(w)
