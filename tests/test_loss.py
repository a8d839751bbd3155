"""The loss in chunks against the formula on whole logits."""
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import distill
import train
from distill import DistillConfig, Teacher
from helpers import assert_same_log, run_distill
from lib.chunked_loss import chunked_loss
from lib.data import Batch
from lib.machine import Machine
from model import LanguageModel, ModelConfig, float_weight, quantize_int8_

B, T, V, C = 3, 20, 200, 16
SMALL = dict(vocab_size=V, n_layer=2, n_head=2, n_embd=C, intermediate_size=24, block_size=32)
TEACHERS = (dict(n_embd=24, arch="gpt2"), dict(n_embd=32, arch="llama"), dict(n_embd=16, arch="llama"))


def language_model(**change):
    """A model far from uniform predictions."""
    torch.manual_seed(len(change))
    model = LanguageModel(ModelConfig(**{**SMALL, **change}))
    for p in model.parameters():
        p.data = p.data * 3 + torch.randn_like(p) / 10
    return model


def gradients(n_teachers, chunk, compiled=False, dtype=torch.float32, **change):
    """Loss, parts and the student's gradients, of a formula with so many teachers."""
    student = language_model(**change)
    models = [language_model(**teacher).eval() for teacher in TEACHERS[:n_teachers]]
    torch.manual_seed(0)
    x, y = torch.randint(V, (2, B, T))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with torch.no_grad():
            teachers = [Teacher(model, dtype) for model in models]
            states = [teacher.states(Batch(x)) for teacher in teachers]
        formula = train.cross_entropy
        if teachers:
            formula = partial(distill.formula, teachers=teachers, alpha=0.3, temperature=2.0, kl_weight=T)
        loss, parts = chunked_loss(formula, student.model(x), student.lm_head, y, *states,
                                   chunk=chunk, compiled=compiled)
    (loss / 4).backward()
    return loss.detach(), parts, {name: p.grad for name, p in student.named_parameters()}


def assert_close(a, b, tolerance):
    """Relative in norm, tensor by tensor; the bias of k_proj has gradient 0 but for rounding."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * b[name].norm() + 1e-7, name


# --- the gradient ---------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [{}, dict(arch="gpt2", tie_weights=True, norm_eps=1e-5)])
@pytest.mark.parametrize("n_teachers", [0, 1, 3])
@pytest.mark.parametrize("chunk", [7, 20, 1000])
def test_chunks_give_the_formulas_gradient(n_teachers, chunk, change):
    loss, parts, expected = gradients(n_teachers, 0, **change)
    loss_in_chunks, parts_in_chunks, found = gradients(n_teachers, chunk, **change)
    assert loss_in_chunks.item() == pytest.approx(loss.item(), rel=1e-6)
    assert parts_in_chunks.keys() == parts.keys()
    for name, value in parts.items():
        assert parts_in_chunks[name].item() == pytest.approx(value.item(), rel=1e-5), name
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("n_teachers", [0, 2])
def test_bfloat16_chunks_are_as_near_float32_as_bfloat16_is(n_teachers):
    exact_loss, _, exact = gradients(n_teachers, 0)

    def error(chunk):
        loss, _, found = gradients(n_teachers, chunk, dtype=torch.bfloat16)
        assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-2)
        differences = torch.cat([(found[name] - exact[name]).flatten() for name in exact])
        return differences.norm() / torch.cat([gradient.flatten() for gradient in exact.values()]).norm()
    assert error(7) < 1.05 * error(0) < 0.1


def test_a_changed_formula_changes_both_ways(monkeypatch):
    """Reverse KL in place of KL: whole and in chunks again agree, and on something else."""
    _, _, of_kl = gradients(2, 0)

    def reverse_kl(z_s, z_t, y, *_):
        log_p_s, log_p_t = z_s.float().log_softmax(-1), z_t.log_softmax(-1)
        return (log_p_s.exp() * (log_p_s - log_p_t)).sum(-1).mean(), {}
    monkeypatch.setattr(distill, "distillation_loss", reverse_kl)
    (_, _, whole), (_, _, in_chunks) = gradients(2, 0), gradients(2, 7)
    assert_close(in_chunks, whole, 1e-5)
    head = "lm_head.weight"
    assert (whole[head] - of_kl[head]).norm() > 0.1 * of_kl[head].norm()


class Largest(TorchDispatchMode):
    """The most elements any tensor had that an operation made."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_logits_never_exist_as_a_whole():
    with Largest() as whole:
        gradients(2, 0)
    with Largest() as in_chunks:
        gradients(2, 4)
    head = V * 32  # the larger teacher's, independent of the batch
    assert whole.numel >= B * T * V
    assert in_chunks.numel <= head < B * T * V


def test_float_weight_of_an_int8_head_is_what_the_head_does():
    model = quantize_int8_(language_model())
    h = torch.randn(5, C)
    torch.testing.assert_close(h @ float_weight(model.lm_head, torch.float32).T, model.lm_head(h))


def test_a_run_in_chunks_is_the_run_on_whole_logits(data, teachers, tmp_path):
    for chunk in (0, 50):
        run_distill(data, tmp_path / str(chunk), teachers[:2], loss_chunk=chunk, kl_reduction="sequence")
    assert_same_log(tmp_path / "0", tmp_path / "50", ["loss", "ce", "kl", "grad_norm", "val_ce"], rel=1e-4)


# --- compiled -------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_chunks_too():
    (_, _, compiled), (_, _, whole) = gradients(2, 20, compiled=True), gradients(2, 0)
    assert_close(compiled, whole, 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_alpha_and_temperature_change_from_step_to_step_without_compiling_anew():
    """They are tensors: compiled once, and each value counts."""
    torch.manual_seed(0)
    student, teacher = language_model(), Teacher(language_model(**TEACHERS[0]).eval())
    x, y = torch.randint(V, (2, B, T))
    h = student.model(x).detach()
    states = teacher.states(Batch(x)).detach()
    cfg = DistillConfig(alpha=0.5, temperature=2.0, seq_len=T)
    formula = distill.formula_of(cfg, Machine(torch.device("cpu")), [teacher])
    alpha, temperature = formula.keywords["alpha"], formula.keywords["temperature"]

    def loss(**how):
        value, parts = chunked_loss(formula, h, student.lm_head, y, states, **how)
        return [part.item() for part in (value, parts["ce"], parts["kl"])]

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    losses = [loss(chunk=20, compiled=True)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for values in ((0.9, 2.0), (0.9, 1.0), (0.0, 3.5), (1.0, 1.5)):
            alpha.fill_(values[0])
            temperature.fill_(values[1])
            losses.append(loss(chunk=20, compiled=True))
            assert losses[-1] == pytest.approx(loss(chunk=0), rel=1e-5)
    assert len({total for total, _, _ in losses}) == len(losses)
