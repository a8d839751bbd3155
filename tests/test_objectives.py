"""Masked tokens, contrast, adversarial text and other directions: each against its own formula, and in whole
runs."""
import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import distill
import eval_blimp
import lib.runs
import train
from helpers import (
    VOCAB,
    assert_resumes,
    assert_same,
    distill_config,
    records,
    run_distill,
    run_ranks,
    run_train,
    saved_state,
    thorough,
    train_config,
    validations,
    weights,
)
from lib import objectives
from lib.checkpoints import load_checkpoint
from lib.data import evaluate, to_batch
from lib.files import read_json
from model import LanguageModel
from train import TrainConfig, Trainee, model_config, start

MASKED = dict(arch="gpt2", tie_weights=True, norm_eps=1e-5, causal=False)


@pytest.fixture(scope="session")
def generator(data, tmp_path_factory):
    """The run folder of a masked language model."""
    out = tmp_path_factory.mktemp("generator") / "run"
    run_train(data, out, max_iters=12, **MASKED)
    return str(out)


def fresh_model(data, **change):
    """The student as training starts with it."""
    cfg = distill_config(data, "none", vocab_size=VOCAB, **change)
    torch.manual_seed(cfg.seed)
    return LanguageModel(model_config(cfg))


def student_and_batch(cfg, chunks, rows=8):
    """A model far from uniform predictions, and a batch."""
    torch.manual_seed(5)
    student = LanguageModel(model_config(cfg))
    for p in student.parameters():
        p.data = p.data * 3 + torch.randn_like(p) / 10
    return student, to_batch(chunks.val[:rows], torch.device("cpu"), np.arange(rows))


def log_softmax(z):
    """In float64."""
    z = np.asarray(z.detach(), np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl_in_float64(z_s, z_t, temperature):
    """Mean per token of KL(teachers || student)."""
    log_p_s, log_p_t = log_softmax(z_s / temperature), log_softmax(z_t / temperature)
    return (np.exp(log_p_t) * (log_p_t - log_p_s)).sum(-1).mean()


def kl(z_s, z_t, temperature):
    """The same, differentiable."""
    p_t = (z_t / temperature).softmax(-1)
    return F.kl_div((z_s / temperature).log_softmax(-1), p_t, reduction="none").sum(-1).mean()


def gradients(*modules):
    """By name, of the parameters that have one."""
    named = [(f"{i}.{name}", p) for i, module in enumerate(modules) for name, p in module.named_parameters()]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_close(found, expected, smallest):
    """Gradients, relative in norm, tensor by tensor."""
    for name in found:
        difference = (found[name] - expected[name]).norm()
        assert difference <= 1e-4 * expected[name].norm() + smallest, name


# --- masked tokens --------------------------------------------------------------------------------

@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_only_a_masked_model_sees_what_follows(arch, causal):
    torch.manual_seed(1)
    cfg = TrainConfig(arch=arch, causal=causal, vocab_size=50, n_layer=2, n_head=2, n_embd=16,
                      intermediate_size=16, block_size=8)
    model = LanguageModel(model_config(cfg))
    x = torch.randint(50, (1, 8))
    other = x.clone()
    other[0, -1] = (x[0, -1] + 1) % 50
    assert torch.equal(model(x)[:, :-1], model(other)[:, :-1]) == causal


@pytest.mark.parametrize("chunk", [0, 7])
def test_masked_loss_is_cross_entropy_where_tokens_were_hidden(data, chunk):
    cfg = distill_config(data, "none", **MASKED, mask_rate=0.25, loss_chunk=chunk)
    machine, chunks = start(cfg)
    model, batch = student_and_batch(cfg, chunks)
    inputs = []
    model.model.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    loss, _ = objectives.masked_token_loss(Trainee(model), batch, cfg, machine, train.cross_entropy)
    seen = inputs[0]
    hidden = (seen != batch.x) | (batch.x == 0) & (seen == 0)
    assert (hidden.sum(1) == 8).all()  # a quarter of 32 positions
    assert (seen[hidden] == 0).all()
    log_p = log_softmax(model(seen))
    expected = -np.mean([log_p[i, j, batch.x[i, j]] for i, j in hidden.nonzero().tolist()])
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_masked_training_learns_and_resumes(data, tmp_path, monkeypatch):
    run = partial(run_train, data, **MASKED, max_iters=30, eval_interval=10)
    assert_resumes(run, tmp_path, monkeypatch, 15)
    val_ce = [record["val_ce"] for record in validations(tmp_path / "whole")]
    assert val_ce[-1] < val_ce[0] < math.log(VOCAB) + 0.1


def test_validation_hides_the_same_tokens_however_it_is_dealt_out(data, generator, monkeypatch):
    cfg = distill_config(data, "none", **MASKED)
    machine, chunks = start(cfg)
    model = load_checkpoint(generator)[0]

    def val_ce(val=chunks.val, **change):
        return evaluate(lambda batch: model(batch.x), val, cfg, machine._replace(**change))
    whole = val_ce()
    assert val_ce(micro_batch=3) == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    halves = [val_ce(chunks.val[rank::2], rank=rank, world=2) for rank in (0, 1)]
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-6)
    assert halves[0] != halves[1]


def test_a_masked_model_is_neither_scored_nor_a_teacher(data, corpus, generator, teachers, tmp_path):
    with pytest.raises(SystemExit, match="masked language model .* gives text no probability"):
        eval_blimp.main(eval_blimp.EvalConfig(ckpt=(generator,), data=(f"{corpus}/pairs",), device="cpu"))
    with pytest.raises(SystemExit, match="teacher .* has causal=False, wanted is causal=True"):
        run_distill(data, tmp_path / "run", [generator])
    with pytest.raises(SystemExit, match="generator .* has causal=True, wanted is causal=False"):
        run_distill(data, tmp_path / "run", teachers[:1], generator=teachers[1])


# --- contrast -------------------------------------------------------------------------------------

def test_n_pair_loss_is_its_formula():
    rng = np.random.default_rng(0)
    anchors, others = rng.normal(size=(2, 3, 5, 7))
    terms = []
    for group in range(3):
        for i in range(5):
            z = [anchors[group, i] @ others[group, j] / 7 ** 0.5 for j in range(5)]
            negatives = sum(math.exp(z[j] - z[i]) for j in range(5) if j != i)
            terms.append(math.log(1 + negatives))  # as Sohn writes it
    loss = objectives.n_pair_loss(torch.tensor(anchors), torch.tensor(others))
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.parametrize("n_pairs", [4, 8])
def test_the_contrastive_student_learns_the_weighted_sum(data, teachers, n_pairs):
    """Two teachers, one of another width than the student's: the loss, its parts and its gradients."""
    cfg = distill_config(data, "none", teachers=tuple(teachers[:2]), n_embd=48, contrastive=0.22,
                         n_pairs=n_pairs, loss_chunk=50)
    machine, chunks = start(cfg)
    loaded = distill.load_teachers(cfg, machine, chunks)
    student, batch = student_and_batch(cfg, chunks)
    project = objectives.projections(48, loaded)
    loss, parts = distill.distill_loss(Trainee(student, project), batch, cfg, machine, loaded,
                                       distill.formula_of(cfg, machine, loaded))
    loss.backward()
    found = gradients(student, project)

    models = [load_checkpoint(path)[0] for path in teachers[:2]]
    h = student.model(batch.x)
    terms = []
    for projection, model in zip(project, models):
        ours, theirs = projection(h.mean(1)), model.model(batch.x).mean(1)
        for i in range(0, 8, n_pairs):
            group = slice(i, i + n_pairs)
            terms.append(objectives.n_pair_loss(theirs[None, group], ours[None, group]))
    n_pair = sum(terms) / len(terms)
    z_s, z_t = student(batch.x), sum(model(batch.x) for model in models) / 2
    ce = F.cross_entropy(z_s.flatten(0, 1), batch.y.flatten())
    expected = 0.39 * ce + 0.39 * 4 * kl(z_s, z_t, 2) + 0.22 * n_pair
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert parts["n_pair"].item() == pytest.approx(n_pair.item(), rel=1e-5)
    student.zero_grad()
    project.zero_grad()
    expected.backward()
    assert found.keys() == gradients(student, project).keys()
    assert_close(found, gradients(student, project), smallest=1e-7)


@pytest.mark.slow
def test_contrast_brings_representations_together_and_resumes(data, teachers, tmp_path, monkeypatch):
    taught = str(tmp_path / "teacher")  # one that tells texts apart
    run_train(data, taught, max_iters=150, epochs=9, eval_interval=150)
    run = partial(run_distill, data, teachers=[taught, teachers[0]], n_embd=48, contrastive=0.5, n_pairs=8,
                  eval_interval=10)
    assert_resumes(partial(run, max_iters=60), tmp_path, monkeypatch, 45)
    n_pair = [record["n_pair"] for record in records(tmp_path / "whole")[1:]]
    assert np.mean(n_pair[-10:]) < 0.95 * math.log(8)  # all alike: log N
    described = read_json(tmp_path / "whole" / "ckpt_60" / "config.json")
    without_projections = fresh_model(data, n_embd=48).n_params()
    assert described["parameters"] == without_projections
    with pytest.raises(SystemExit, match="was trained with other contrastive or generator settings"):
        run(tmp_path / "cut", resume=True, contrastive=0.0, max_iters=70)


@pytest.mark.thorough
def test_two_ranks_contrast_as_one_that_accumulates(data, teachers, tmp_path):
    """A projection's gradient crosses ranks as the student's does."""
    settings = dict(teachers=teachers[:2], contrastive=0.5, n_pairs=4, n_embd=48, micro_batch_size=4,
                    max_iters=20)
    run_ranks(lambda: run_distill(data, tmp_path / "two", **settings))
    run_distill(data, tmp_path / "one", **settings)
    one, two = ([record["loss"] for record in records(tmp_path / name)[1:]] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


# --- adversarial text -----------------------------------------------------------------------------

@pytest.fixture
def mate_kd(data, teachers, generator):
    """mate_kd(**change): a student, its generator, a batch, two teachers as plain models, and loss(step),
    with the noise of one seed."""
    def build(**change):
        cfg = distill_config(data, "none", teachers=tuple(teachers[:2]), generator=generator, mask_rate=0.3,
                             loss_chunk=50, **change)
        machine, chunks = start(cfg)
        student, batch = student_and_batch(cfg, chunks)
        loaded = distill.load_teachers(cfg, machine, chunks)
        trainee = Trainee(student, load_checkpoint(generator)[0])
        loss_fn = partial(objectives.adversarial_loss, cfg=cfg, machine=machine, teachers=loaded,
                          formula=distill.formula_of(cfg, machine, loaded))

        def loss(step):
            torch.manual_seed(3)
            return loss_fn(trainee, batch._replace(step=step))
        models = [load_checkpoint(path)[0] for path in teachers[:2]]
        return SimpleNamespace(cfg=cfg, student=student, generator=trainee.companion, batch=batch,
                               models=models, loss=loss)
    return build


def rewritten_ids(generator, batch, seed=3):
    """What the generator makes of the batch from `seed` on, token by token."""
    torch.manual_seed(seed)
    noise = torch.rand(batch.x.shape)
    hidden = torch.zeros_like(batch.x, dtype=torch.bool)
    for row, row_noise in zip(hidden, noise):
        row[row_noise.argsort()[:round(0.3 * len(row_noise))]] = True
    z = generator(batch.x.masked_fill(hidden, 0))
    at = noise.argsort(1)[:, :hidden.sum(1)[0]]
    z = z.gather(1, at[..., None].expand(-1, -1, z.shape[-1]))
    sampled = F.gumbel_softmax(z, hard=True).argmax(-1)
    out = batch.x.clone()
    for row, positions, tokens in zip(out, at, sampled):
        for position, token in zip(positions, tokens):
            row[position] = token
    return out


def test_the_generator_climbs_and_the_student_stays(mate_kd):
    mate = mate_kd()
    for p in mate.generator.parameters():
        p.data *= 3  # a generator with opinions, far from uniform
    before = copy.deepcopy(mate.student.state_dict())

    loss, parts = mate.loss(step=0)
    loss.backward()
    ids = rewritten_ids(mate.generator, mate.batch)
    z_t = sum(model(ids) for model in mate.models) / 2
    expected = 4 * kl_in_float64(mate.student(ids), z_t, 2.0)  # T^2 KL on the text as rewritten
    assert -loss.item() == pytest.approx(expected, rel=1e-4)
    assert parts["adversarial_kl"].item() == pytest.approx(-loss.item() / 4)
    assert all(p.grad is None and p.requires_grad for p in mate.student.parameters())
    climbing = [p for name, p in mate.generator.named_parameters() if "k_proj.bias" not in name]
    assert all(p.grad is not None for p in climbing)

    optimizer = torch.optim.SGD(mate.generator.parameters(), lr=1.0)
    for _ in range(15):
        optimizer.zero_grad()
        mate.loss(step=0)[0].backward()
        torch.nn.utils.clip_grad_norm_(mate.generator.parameters(), 1.0)
        optimizer.step()
    assert mate.loss(step=0)[0] < loss - 0.02 * abs(loss)  # teachers and student disagree more
    assert_same(before, mate.student.state_dict())


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_the_student_learns_text_and_rewritten_text_alike(mate_kd, reduction):
    mate = mate_kd(kl_reduction=reduction)
    student, batch = mate.student, mate.batch
    loss, _ = mate.loss(step=mate.cfg.generator_steps)  # the student's first
    loss.backward()
    assert all(p.grad is None for p in mate.generator.parameters())
    found = gradients(student)

    weight = 4 * (32 if reduction == "sequence" else 1)
    expected = F.cross_entropy(student(batch.x).flatten(0, 1), batch.y.flatten())
    for x in (batch.x, rewritten_ids(mate.generator, batch)):
        z_t = sum(model(x) for model in mate.models).detach() / 2
        expected = expected + weight * kl(student(x), z_t, 2)
    expected = expected / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    student.zero_grad()
    expected.backward()
    assert_close(found, gradients(student), smallest=1e-6)


def companion(folder):
    """What a checkpoint keeps of the generator."""
    return {name: t for name, t in saved_state(folder).items() if name.startswith("companion.")}


def moves(models):
    """Whether anything changed from each to the next."""
    return [any(not torch.equal(a[name], b[name]) for name in a) for a, b in zip(models, models[1:])]


@pytest.mark.slow
@pytest.mark.parametrize("change", thorough([
    dict(micro_batch_size=4, teacher_dtype=("bfloat16",)),
    {},
    dict(dtype="bfloat16", teacher_dtype=("int8",)),
], sample=1))
def test_steps_alternate_and_resume(data, teachers, generator, tmp_path, monkeypatch, change):
    """Steps 1 and 2 are the generator's, 3 to 5 the student's, 6 and 7 the generator's."""
    monkeypatch.setattr(lib.runs, "drop_old_checkpoints", lambda *_: None)  # to look at them all
    run = partial(run_distill, data, teachers=teachers[:2], generator=generator, generator_steps=2,
                  student_steps=3, max_iters=9, eval_interval=1, mask_rate=0.3, **change)
    assert_resumes(run, tmp_path, monkeypatch, 6)
    folders = [tmp_path / "whole" / f"ckpt_{step}" for step in range(1, 10)]
    students = [weights(folder) for folder in folders]
    assert_same(students[0], fresh_model(data).state_dict())
    assert moves(students) == [False, True, True, True, False, False, True, True]
    assert moves([companion(folder) for folder in folders]) == [not moved for moved in moves(students)]


@pytest.mark.thorough
def test_two_ranks_alternate(data, teachers, generator, tmp_path):
    """Parameters without a gradient, in DDP: each side keeps still while the other moves."""
    for steps in (2, 4, 6):
        run_ranks(lambda: run_distill(
            data, tmp_path / str(steps), teachers[:2], generator=generator, generator_steps=2,
            student_steps=2, max_iters=steps, eval_interval=steps))
    two, four = weights(tmp_path / "2"), weights(tmp_path / "4")
    assert_same(two, fresh_model(data).state_dict())
    assert not torch.equal(four["lm_head.weight"], two["lm_head.weight"])
    moved = companion(tmp_path / "2" / "ckpt_2")["companion.model.embed_tokens.weight"]
    assert not torch.equal(moved, weights(generator)["model.embed_tokens.weight"])


# --- sharpness, ascent, bad input -----------------------------------------------------------------

def test_a_sam_step_is_the_formulas(data, tmp_path):
    """The gradient that a step takes, of two micro-batches, is that of the loss at w + rho g / |g|."""
    settings = dict(sam_rho=0.3, micro_batch_size=4)
    cfg = train_config(data, tmp_path / "run", **settings)
    machine, chunks = start(cfg)
    trainee = Trainee(train.new_model(cfg, machine, chunks))
    batches = [chunks.batch(0, micro_step) for micro_step in (0, 1)]
    before = {name: p.clone() for name, p in trainee.student.state_dict().items()}

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
        return sum(F.cross_entropy(z_i, batch.y.flatten()) for z_i, batch in zip(z, batches)) / 2
    params = {name: before[name].double() for name, _ in double.named_parameters()}
    g = torch.func.grad(ce)(params)
    expected = torch.func.grad(ce)({name: w + 0.3 * g[name] / norm_of(g) for name, w in params.items()})
    assert_close({name: p.grad for name, p in trainee.student.named_parameters()}, expected, smallest=1e-7)

    run_train(data, tmp_path / "run", **settings, max_iters=1, grad_clip=0.0)
    (record,) = records(tmp_path / "run")
    assert record["loss"] == pytest.approx(ce(params).item(), rel=1e-5)
    assert record["sam_loss"] > record["loss"]
    assert record["grad_norm"] == pytest.approx(norm_of(expected).item(), rel=1e-4)


def norm_of(tensors):
    return sum((t ** 2).sum() for t in tensors.values()).sqrt()


@pytest.mark.slow
def test_ascent_climbs(data, tmp_path):
    run_train(data, tmp_path / "down", max_iters=20)
    run_train(data, tmp_path / "up", max_iters=10, init_from=str(tmp_path / "down"), ascent=True,
              schedule="constant", warmup_iters=0, learning_rate=1e-3, eval_interval=5)
    before = validations(tmp_path / "down")[-1]["val_ce"]
    middle, end = (record["val_ce"] for record in validations(tmp_path / "up"))
    assert end > middle > before


@pytest.mark.parametrize("change,message", [
    (dict(contrastive=0.2, n_pairs=3),
     "n_pairs=3 must be at least 2 and a divisor of one rank's sequences, 8"),
    (dict(contrastive=1.5), "contrastive=1.5 must be between 0 and 1"),
    (dict(generator="x", contrastive=0.1, n_pairs=8), "generator=x must be without"),
    (dict(generator="x", student_steps=0), "student_steps=0 must be at least 1"),
    (dict(causal=False), "causal=False must be True"),
    (dict(mask_rate=2.0), "mask_rate=2.0 must be at most 1"),
])
def test_bad_objectives_are_one_line(data, teachers, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        run_distill(data, tmp_path / "run", teachers[:1], **change)
