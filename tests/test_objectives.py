"""Masked tokens, contrast and adversarial text: each against its own formula, and in whole runs."""
import copy
import json
import math
from functools import partial

import numpy as np
import pytest
import torch

import distill
import eval_blimp
import lib.runs
import train
from helpers import (
    VOCAB,
    assert_same,
    cut_short,
    distill_config,
    records,
    run_train,
    torchrun,
    train_config,
    weights,
)
from lib import objectives
from lib.checkpoints import load_checkpoint, load_state
from lib.data import evaluate, to_batch
from model import LanguageModel
from train import TrainConfig, Trainee, model_config, start

MASKED = dict(arch="gpt2", tie_weights=True, norm_eps=1e-5, causal=False)


@pytest.fixture(scope="session")
def generator(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("generator") / "g"
    run_train(data, out, max_iters=12, **MASKED)
    return str(out)


def student_and_batch(cfg, chunks, rows=8):
    """A model far from uniform predictions, and a batch."""
    torch.manual_seed(5)
    student = LanguageModel(model_config(cfg))
    for p in student.parameters():
        p.data = p.data * 3 + torch.randn_like(p) / 10
    return student, to_batch(chunks.val[:rows], torch.device("cpu"), np.arange(rows))


def log_softmax(z):
    z = np.asarray(z.detach(), np.float64)
    return z - z.max(-1, keepdims=True) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))


def kl(z_s, z_t, T):
    """Mean per token of KL(teachers || student) in float64."""
    p, q = log_softmax(z_s / T), log_softmax(z_t / T)
    return (np.exp(q) * (q - p)).sum(-1).mean()


# --- masked tokens --------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_only_a_masked_model_sees_what_follows(arch):
    for causal in (True, False):
        torch.manual_seed(1)
        model = LanguageModel(model_config(TrainConfig(arch=arch, vocab_size=50, n_layer=2, n_head=2, n_embd=16, intermediate_size=16, block_size=8, causal=causal)))
        x = torch.randint(50, (1, 8))
        other = x.clone()
        other[0, -1] = (x[0, -1] + 1) % 50
        assert torch.equal(model(x)[:, :-1], model(other)[:, :-1]) == causal


@pytest.mark.parametrize("chunk", [0, 7])
def test_masked_loss_is_cross_entropy_where_tokens_were_hidden(data, tmp_path, chunk):
    cfg = distill_config(data, tmp_path / "r", **MASKED, mask_rate=0.25, loss_chunk=chunk)
    machine, chunks = start(cfg)
    model, batch = student_and_batch(cfg, chunks)
    seen = []
    model.model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    loss, _ = objectives.masked_token_loss(Trainee(model), batch, cfg, machine, train.cross_entropy)
    hidden = (seen[0] != batch.x) | (batch.x == 0) & (seen[0] == 0)
    assert (hidden.sum(1) == 8).all() and (seen[0][hidden] == 0).all()  # a quarter of 32 positions
    logp = log_softmax(model(seen[0]))
    assert loss.item() == pytest.approx(-np.mean([logp[i, j, batch.x[i, j]] for i, j in hidden.nonzero().tolist()]), rel=1e-5)


def test_masked_training_learns_and_resumes(data, tmp_path, monkeypatch):
    change = dict(**MASKED, max_iters=30, eval_interval=10)
    run_train(data, tmp_path / "whole", **change)
    val = [r["val_ce"] for r in records(tmp_path / "whole") if "val_ce" in r]
    assert val[-1] < val[0] < math.log(500) + 0.1
    with monkeypatch.context() as m:
        cut_short(m, 15)
        with pytest.raises(KeyboardInterrupt):
            run_train(data, tmp_path / "cut", **change)
    run_train(data, tmp_path / "cut", resume=True, **change)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_validation_hides_the_same_tokens_however_it_is_dealt_out(data, tmp_path, generator, monkeypatch):
    cfg = distill_config(data, tmp_path / "x", **MASKED)
    (machine, chunks), model = start(cfg), load_checkpoint(generator)[0]

    def val_ce(val=chunks.val, **change):
        return evaluate(lambda batch: model(batch.x), val, cfg, machine._replace(**change))
    whole = val_ce()
    assert val_ce(micro_batch=3) == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *a: None)
    halves = [val_ce(chunks.val[rank::2], rank=rank, world=2) for rank in (0, 1)]
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-6) and halves[0] != halves[1]


def test_a_masked_model_is_neither_scored_nor_a_teacher(data, corpus, generator, teachers, tmp_path):
    with pytest.raises(SystemExit, match="masked language model .* gives text no probability"):
        eval_blimp.main(eval_blimp.EvalConfig(ckpt=(generator,), data=(f"{corpus}/pairs",), device="cpu"))
    with pytest.raises(SystemExit, match="teacher .* has causal=False, wanted is causal=True"):
        distill.main(distill_config(data, tmp_path / "s", teachers=(generator,)))
    with pytest.raises(SystemExit, match="generator .* has causal=True, wanted is causal=False"):
        distill.main(distill_config(data, tmp_path / "s", teachers=tuple(teachers[:1]), generator=teachers[1]))


# --- contrast -------------------------------------------------------------------------------------

def test_n_pair_loss_is_its_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 5, 7))
    expected = []
    for g in range(3):
        for i in range(5):
            z = [a[g, i] @ b[g, j] / 7 ** 0.5 for j in range(5)]
            expected.append(math.log(1 + sum(math.exp(z[j] - z[i]) for j in range(5) if j != i)))  # as Sohn writes it
    assert objectives.n_pair_loss(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("n_pairs", [4, 8])
def test_the_contrastive_student_learns_the_weighted_sum(data, teachers, tmp_path, n_pairs):
    """Two teachers, one of another width than the student's: the loss, its parts and its gradients."""
    cfg = distill_config(data, tmp_path / "s", teachers=tuple(teachers[:2]), n_embd=48, contrastive=0.22, n_pairs=n_pairs, loss_chunk=50)
    machine, chunks = start(cfg)
    loaded = distill.load_teachers(cfg, machine, chunks)
    student, batch = student_and_batch(cfg, chunks)
    project = objectives.projections(48, loaded)
    loss, parts = distill.distill_loss(Trainee(student, project), batch, cfg, machine, loaded,
                                       distill.formula_of(cfg, machine, loaded))
    loss.backward()
    loaded = [load_checkpoint(t)[0] for t in teachers[:2]]
    h = student.model(batch.x)
    terms = []
    for p, t in zip(project, loaded):
        s, a = p(h.mean(1)), t.model(batch.x).mean(1)
        terms += [objectives.n_pair_loss(a[None, i:i + n_pairs], s[None, i:i + n_pairs]) for i in range(0, 8, n_pairs)]
    n_pair = sum(terms) / len(terms)
    z, z_t = student(batch.x), sum(t(batch.x) for t in loaded) / 2
    ce = torch.nn.functional.cross_entropy(z.flatten(0, 1), batch.y.flatten())
    kd = torch.nn.functional.kl_div((z / 2).log_softmax(-1), (z_t / 2).softmax(-1), reduction="none").sum(-1).mean() * 4
    expected = 0.39 * ce + 0.39 * kd + 0.22 * n_pair
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and parts["n_pair"].item() == pytest.approx(n_pair.item(), rel=1e-5)
    ours = [p.grad.clone() for p in [*student.parameters(), *project.parameters()]]
    student.zero_grad()
    project.zero_grad()
    expected.backward()
    for a, p in zip(ours, [*student.parameters(), *project.parameters()], strict=True):
        assert (a - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-7


def test_contrast_brings_representations_together_and_resumes(data, teachers, tmp_path, monkeypatch):
    run_train(data, tmp_path / "t", max_iters=150, epochs=9, eval_interval=150)  # one that tells texts apart
    change = dict(teachers=(str(tmp_path / "t"), teachers[0]), n_embd=48, n_pairs=8, max_iters=60, eval_interval=10)
    distill.main(distill_config(data, tmp_path / "with", contrastive=0.5, **change))
    log = [r["n_pair"] for r in records(tmp_path / "with")[1:]]
    assert np.mean(log[-10:]) < 0.95 * math.log(8)  # all alike: log N
    described = json.load(open(tmp_path / "with" / "ckpt_60" / "config.json"))
    assert described["parameters"] == LanguageModel(model_config(distill_config(data, "x", n_embd=48, vocab_size=VOCAB))).n_params()  # without the projections
    with monkeypatch.context() as m:
        cut_short(m, 45)
        with pytest.raises(KeyboardInterrupt):
            distill.main(distill_config(data, tmp_path / "cut", contrastive=0.5, **change))
    distill.main(distill_config(data, tmp_path / "cut", contrastive=0.5, resume=True, **change))
    assert_same(weights(tmp_path / "with"), weights(tmp_path / "cut"))
    assert_same(*(load_state(str(tmp_path / r / "ckpt_60"))[0] for r in ("with", "cut")))
    with pytest.raises(SystemExit, match="was trained with other contrastive or generator settings"):
        distill.main(distill_config(data, tmp_path / "cut", resume=True, **{**change, "max_iters": 70}))


# --- adversarial text -----------------------------------------------------------------------------

def adversaries(data, tmp_path, teachers, generator, **change):
    """The trainee, a batch, the teachers as plain models, and the loss of (trainee, batch)."""
    cfg = distill_config(data, tmp_path / "s", teachers=tuple(teachers[:2]), generator=generator, mask_rate=0.3,
                         loss_chunk=50, **change)
    machine, chunks = start(cfg)
    student, batch = student_and_batch(cfg, chunks)
    loaded = distill.load_teachers(cfg, machine, chunks)
    loss_fn = partial(objectives.adversarial_loss, cfg=cfg, machine=machine, teachers=loaded,
                      formula=distill.formula_of(cfg, machine, loaded))
    trainee = Trainee(student, load_checkpoint(generator)[0])
    return cfg, trainee, batch, [load_checkpoint(t)[0] for t in teachers[:2]], loss_fn


def rewritten_ids(trainee, batch, seed):
    """What the generator makes of the batch from `seed` on, token by token."""
    torch.manual_seed(seed)
    noise = torch.rand(batch.x.shape)
    hidden = torch.zeros_like(batch.x, dtype=torch.bool)
    for row, n in zip(hidden, noise):
        row[n.argsort()[:round(0.3 * len(n))]] = True
    z = trainee.companion(batch.x.masked_fill(hidden, 0))
    at = noise.argsort(1)[:, :hidden.sum(1)[0]]
    sampled = torch.nn.functional.gumbel_softmax(z.gather(1, at[..., None].expand(-1, -1, z.shape[-1])), hard=True).argmax(-1)
    out = batch.x.clone()
    for i in range(len(out)):
        for j, token in zip(at[i], sampled[i]):
            out[i, j] = token
    return out


def test_the_generator_climbs_and_the_student_stays(data, teachers, generator, tmp_path):
    cfg, trainee, batch, loaded, loss_fn = adversaries(data, tmp_path, teachers, generator)
    student = trainee.student
    for p in trainee.companion.parameters():
        p.data *= 3  # a generator with opinions, far from uniform
    before = copy.deepcopy(student.state_dict())

    def step():
        torch.manual_seed(3)
        return loss_fn(trainee, batch)
    loss, parts = step()
    loss.backward()
    ids = rewritten_ids(trainee, batch, 3)
    z_t = sum(t(ids) for t in loaded) / 2
    assert -loss.item() == pytest.approx(4 * kl(student(ids), z_t, 2.0), rel=1e-4)  # T^2 KL on the text as rewritten
    assert parts["adversarial_kl"].item() == pytest.approx(-loss.item() / 4)
    assert all(p.grad is None and p.requires_grad for p in student.parameters())
    climber = torch.optim.SGD(trainee.companion.parameters(), lr=1.0)
    assert all(p.grad is not None for n, p in trainee.companion.named_parameters() if "k_proj.bias" not in n)
    for _ in range(15):
        climber.zero_grad()
        step()[0].backward()
        torch.nn.utils.clip_grad_norm_(trainee.companion.parameters(), 1.0)
        climber.step()
    assert step()[0] < loss - 0.02 * abs(loss)  # teachers and student disagree more
    assert_same(before, student.state_dict())


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_the_student_learns_text_and_rewritten_text_alike(data, teachers, generator, tmp_path, reduction):
    cfg, trainee, batch, loaded, loss_fn = adversaries(data, tmp_path, teachers, generator, kl_reduction=reduction)
    student = trainee.student
    torch.manual_seed(3)
    loss, parts = loss_fn(trainee, batch._replace(step=cfg.generator_steps))
    loss.backward()
    assert all(p.grad is None for p in trainee.companion.parameters())
    ours = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    ids = rewritten_ids(trainee, batch, 3)
    weight = 4 * (32 if reduction == "sequence" else 1)
    F = torch.nn.functional
    expected = F.cross_entropy(student(batch.x).flatten(0, 1), batch.y.flatten())
    for x in (batch.x, ids):
        z_t = sum(t(x) for t in loaded).detach() / 2
        expected = expected + weight * F.kl_div((student(x) / 2).log_softmax(-1), (z_t / 2).softmax(-1), reduction="none").sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item() / 3, rel=1e-5)
    student.zero_grad()
    (expected / 3).backward()
    for n, g in ours.items():
        p = dict(student.named_parameters())[n]
        assert (g - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6, n


def companion(run, step):
    return {k: v for k, v in load_state(str(run / f"ckpt_{step}"))[0].items() if k.startswith("companion.")}


@pytest.mark.parametrize("change", [{}, dict(dtype="bfloat16", teacher_dtype=("int8",)), dict(micro_batch_size=4, teacher_dtype=("bfloat16",))])
def test_steps_alternate_and_resume(data, teachers, generator, tmp_path, monkeypatch, change):
    change = dict(teachers=tuple(teachers[:2]), generator=generator, generator_steps=2, student_steps=3, max_iters=9, eval_interval=1, mask_rate=0.3, **change)
    monkeypatch.setattr(lib.runs, "drop_old_checkpoints", lambda *a: None)  # to look at them all
    whole = tmp_path / "whole"
    distill.main(distill_config(data, whole, **change))
    student = [load_checkpoint(str(whole / f"ckpt_{i}"))[0].state_dict() for i in range(1, 10)]
    torch.manual_seed(42)
    fresh = LanguageModel(model_config(distill_config(data, "x", vocab_size=VOCAB))).state_dict()
    assert_same(student[0], fresh)  # steps 1 and 2 are the generator's, 3 to 5 the student's, 6 and 7 the generator's
    moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in zip(student, student[1:])]
    assert moved == [False, True, True, True, False, False, True, True]
    states = [companion(whole, i) for i in range(1, 10)]
    assert [any(not torch.equal(a[k], b[k]) for k in a) for a, b in zip(states, states[1:])] == [not m for m in moved]
    with monkeypatch.context() as m:
        cut_short(m, 6)
        with pytest.raises(KeyboardInterrupt):
            distill.main(distill_config(data, tmp_path / "cut", **change))
    distill.main(distill_config(data, tmp_path / "cut", resume=True, **change))
    assert_same(weights(whole), weights(tmp_path / "cut"))
    assert_same(*(load_state(str(r / "ckpt_9"))[0] for r in (whole, tmp_path / "cut")))


@pytest.mark.thorough
def test_two_ranks_contrast_as_one_that_accumulates(data, teachers, tmp_path):
    """A projection's gradient crosses ranks as the student's does."""
    change = dict(teachers=",".join(teachers[:2]), contrastive=0.5, n_pairs=4, n_embd=48, micro_batch_size=4, max_iters=20)
    torchrun("distill.py", data, tmp_path / "two", **change)
    distill.main(distill_config(data, tmp_path / "one", **{**change, "teachers": tuple(teachers[:2])}))
    one, two = ([r["loss"] for r in records(tmp_path / r)[1:]] for r in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.thorough
def test_two_ranks_alternate(data, teachers, generator, tmp_path):
    """Parameters without a gradient, in DDP: each side keeps still while the other moves."""
    change = dict(teachers=",".join(teachers[:2]), generator=generator, generator_steps=2, student_steps=2)
    for steps in (2, 4, 6):
        torchrun("distill.py", data, tmp_path / str(steps), eval_interval=steps, **{**change, "max_iters": steps})
    torch.manual_seed(42)
    fresh = LanguageModel(model_config(distill_config(data, "x", vocab_size=VOCAB))).state_dict()
    two, four = (load_checkpoint(str(tmp_path / n))[0].state_dict() for n in "24")
    assert_same(two, fresh)
    assert not torch.equal(four["lm_head.weight"], two["lm_head.weight"])
    states = [companion(tmp_path / n, n) for n in "246"]
    start_ = load_checkpoint(generator)[0].state_dict()
    assert not torch.equal(states[0]["companion.lm_head.weight"] if "companion.lm_head.weight" in states[0] else states[0]["companion.model.embed_tokens.weight"],
                           start_["model.embed_tokens.weight"])


@pytest.mark.parametrize("change,message", [
    (dict(contrastive=0.2, n_pairs=3), "n_pairs=3 must be at least 2 and divide the sequences that one rank sees at a time, 8"),
    (dict(contrastive=1.5), "contrastive=1.5 must be between 0 and 1"), (dict(generator="x", contrastive=0.1, n_pairs=8), "generator=x must be without"),
    (dict(generator="x", student_steps=0), "student_steps=0 must be at least 1"), (dict(causal=False), "causal=False must be True"),
    (dict(mask_rate=2.0), "mask_rate=2.0 must be at most 1")])
def test_bad_objectives_are_one_line(data, teachers, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        distill.main(distill_config(data, tmp_path / "s", teachers=tuple(teachers[:1]), **change))


def test_a_sam_step_is_the_formulas(data, tmp_path):
    """The gradient that a step takes, of two micro-batches, is that of the loss at w + rho g / |g|."""
    cfg = train_config(data, tmp_path / "run", sam_rho=0.3, micro_batch_size=4)
    machine, chunks = start(cfg)
    trainee = Trainee(train.new_model(cfg, machine, chunks))
    batches = [chunks.batch(0, i) for i in (0, 1)]
    before = {k: v.clone() for k, v in trainee.student.state_dict().items()}

    def forward_backward():
        for batch in batches:
            (train.next_token_loss(trainee, batch, cfg, machine)[0] / 2).backward()
    forward_backward()
    with objectives.climbed(trainee, cfg.sam_rho):
        forward_backward()
    assert_same(before, trainee.student.state_dict())
    double = LanguageModel(model_config(cfg)).double()

    def ce(params):
        z = [torch.func.functional_call(double, params, (batch.x,)).flatten(0, 1) for batch in batches]
        return sum(torch.nn.functional.cross_entropy(a, batch.y.flatten()) for a, batch in zip(z, batches)) / 2
    params = {k: before[k].double() for k, _ in double.named_parameters()}
    g = torch.func.grad(ce)(params)
    norm = sum((v ** 2).sum() for v in g.values()).sqrt()
    expected = torch.func.grad(ce)({k: v + 0.3 * g[k] / norm for k, v in params.items()})
    for name, p in trainee.student.named_parameters():
        assert (p.grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name
    run_train(data, tmp_path / "run", sam_rho=0.3, micro_batch_size=4, max_iters=1, grad_clip=0.0)
    (record,) = records(tmp_path / "run")
    assert record["loss"] == pytest.approx(ce(params).item(), rel=1e-5) and record["sam_loss"] > record["loss"]
    norm = sum((v ** 2).sum() for v in expected.values()).sqrt()
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_ascent_climbs(data, tmp_path):
    run_train(data, tmp_path / "a", max_iters=20)
    run_train(data, tmp_path / "b", max_iters=10, init_from=str(tmp_path / "a"), ascent=True, schedule="constant", warmup_iters=0, learning_rate=1e-3, eval_interval=5)
    val = [r["val_ce"] for out in ("a", "b") for r in records(tmp_path / out) if "val_ce" in r]
    assert val[-1] > val[-2] > val[-3]
