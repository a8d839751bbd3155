"""Experts (Switch Transformer) against transformers, against the dense model, and in all that trains or reads
models."""
import json
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers import modeling_switch_transformers as theirs

import train
from distill import Teacher, load_teachers
from eval_blimp import log_probabilities
from helpers import (
    GPT2,
    assert_resumes,
    assert_same,
    assert_same_log,
    distill_config,
    graphs_on_cpu,
    records,
    reseal,
    run_distill,
    run_ranks,
    run_train,
    thorough,
    train_config,
    validations,
    weights,
    write_task,
)
from lib import glue
from lib.checkpoints import find_checkpoint, load_checkpoint
from lib.costs import forward_flops, training_flops
from lib.machine import KINDS, Machine
from lib.scoring import Candidate
from model import Experts, LanguageModel, ModelConfig
from sample import generate
from tools import finetune, hf, plan

SIZES = dict(vocab_size=97, n_layer=4, n_head=4, n_embd=32, intermediate_size=56, block_size=40)
PARTS = ["loss", "ce", "kl", "router_balance", "router_z", "dropped", "grad_norm", "val_ce"]
SWITCH = dict(n_experts=4, expert_capacity=0.75, router_jitter=0.0)  # some are dropped, nothing is random


def experts_of(model):
    return [m for m in model.modules() if isinstance(m, Experts)]


def new_model(**change):
    """With routers that differ from token to token, so that each expert has something to do."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**{**SIZES, **SWITCH, **change}))
    with torch.no_grad():
        for m in experts_of(model):
            m.router.normal_(std=1.0)
    return model


def one_text(model, ids):
    """log p of each token of a text alone in a row, in evaluation."""
    z = model.eval()(torch.tensor([ids[:-1]]))[0].detach().double().log_softmax(-1)
    return z[range(len(ids) - 1), ids[1:]]


# --- the layer ------------------------------------------------------------------------------------

@pytest.mark.parametrize("capacity", [1, 5, 32])
@pytest.mark.parametrize("E", [1, 4, 8])
def test_the_layer_is_that_of_transformers(E, capacity):
    """Outputs, all gradients, balance and z loss. Their capacity is a number of tokens."""
    B, T, C, inner = 3, 32, 24, 40
    torch.manual_seed(E)
    layer = theirs.SwitchTransformersSparseMLP(SwitchTransformersConfig(
        d_model=C, d_ff=inner, num_experts=E, expert_capacity=capacity, dense_act_fn="gelu_new",
        router_jitter_noise=0.0, dropout_rate=0.0)).train()
    ours = Experts(ModelConfig(arch="gpt2", n_embd=C, intermediate_size=inner, n_experts=E, router_jitter=0.0,
                               expert_capacity=capacity * E / T)).train()
    pairs = [(ours.router, layer.router.classifier.weight)]
    for i, expert in enumerate(ours.experts):
        pairs += [(expert.up_proj.weight, layer.experts[f"expert_{i}"].wi.weight),
                  (expert.down_proj.weight, layer.experts[f"expert_{i}"].wo.weight)]
        torch.nn.init.zeros_(expert.up_proj.bias)  # theirs have none
        torch.nn.init.zeros_(expert.down_proj.bias)
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other.normal_(std=0.3))
    x, y = torch.randn(B, T, C, requires_grad=True), torch.randn(B, T, C, requires_grad=True)
    y.data.copy_(x.data)

    _, _, logits = layer.router(y)
    p = logits.softmax(-1)
    balance = theirs.load_balancing_loss_func(p, p.argmax(-1))
    z = theirs.router_z_loss_func(logits)
    target, out, expected = torch.randn(B, T, C), ours(x), layer(y)
    ((out * target).sum() + ours.measured[0] + ours.measured[1]).backward()
    ((expected * target).sum() + balance + z).backward()

    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    close(out, expected)
    close(torch.stack(ours.measured[:2]), torch.stack([balance, z]))
    close(x.grad, y.grad)
    for mine, other in pairs:
        none = torch.zeros_like(mine)  # an expert that nobody met
        close(mine.grad, none if other.grad is None else other.grad, rtol=1e-5, atol=2e-5)
    gone = (expected == 0).all(-1).float().mean()
    assert ours.measured[2] == gone and (gone > 0) == (capacity < 32)


def test_jitter_is_that_of_transformers():
    """In training alone, and it moves the router's input, not the experts'."""
    torch.manual_seed(0)
    ours = Experts(ModelConfig(n_embd=24, n_experts=4, router_jitter=0.2)).train()
    router = theirs.SwitchTransformersTop1Router(SwitchTransformersConfig(
        d_model=24, num_experts=4, router_jitter_noise=0.2))
    x = torch.randn(2, 16, 24)
    with torch.no_grad():
        ours.router.copy_(router.classifier.weight.normal_())
        torch.manual_seed(1)
        logits = router(x.clone())[2]
        torch.manual_seed(1)
        ours(x)
        torch.testing.assert_close(ours.measured[1], theirs.router_z_loss_func(logits))
        assert not torch.equal(ours(x), ours(x))
        assert torch.equal(ours.eval()(x), ours(x))
        ours.router.zero_()  # the same expert for all, whatever the noise
        ours.capacity = 0
        assert torch.equal(ours(x), ours.train()(x))


def test_the_first_in_a_row_have_the_places():
    """Where all choose one expert: 10 tokens, 4 experts, 0.9 x 10 / 4 = 2.25 places are 3."""
    layer = Experts(ModelConfig(arch="gpt2", n_experts=4, expert_capacity=0.9, n_embd=8)).train()
    torch.nn.init.zeros_(layer.router)
    kept = (layer(torch.randn(2, 10, 8)) != 0).any(-1)
    assert kept.tolist() == [[True] * 3 + [False] * 7] * 2
    assert layer.measured[2].item() == pytest.approx(0.7)


@pytest.mark.parametrize("causal", [True, False])
def test_the_future_and_other_rows_drop_nobody(causal):
    """In training, where tokens are dropped: what comes later, and other rows, change nothing before."""
    model = new_model(causal=causal).train()
    x = torch.randint(97, (2, 40))
    changed = x.clone()
    changed[0, 25:] = (changed[0, 25:] + 1) % 97
    before = [experts(h) for experts, h in inputs_of_experts(model, x)]
    dropped = [m.measured[2].item() for m in experts_of(model)]
    assert min(dropped) > 0.05
    z, other = model(x), model(changed)
    assert torch.equal(z[1], other[1])
    assert torch.allclose(z[0, :25], other[0, :25], rtol=0, atol=1e-6) == causal
    assert not torch.allclose(z[0, 25:], other[0, 25:])
    assert all((y == 0).all(-1).any() for y in before)  # the dropped


def inputs_of_experts(model, x):
    """(layer, what it was given) when the model reads x."""
    seen = []
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.append((m, *args))) for m in experts_of(model)]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_one_expert_is_the_dense_model(arch):
    """Bit for bit, from the same seed on: weights, logits, gradients; only the z loss moves its router."""
    kind = GPT2 if arch == "gpt2" else {}
    torch.manual_seed(3)
    dense = LanguageModel(ModelConfig(**{**SIZES, **kind}))
    torch.manual_seed(3)
    single = LanguageModel(ModelConfig(**{**SIZES, **kind}, n_experts=1, router_jitter=0.0))
    assert single.n_params() == dense.n_params() + 2 * 32
    found = {name.replace(".experts.0", ""): p for name, p in single.named_parameters()}
    routers = {name: found.pop(name) for name in list(found) if name.endswith("router")}
    assert_same(dict(dense.named_parameters()), found)
    x = torch.randint(97, (3, 40))
    for mode in True, False:
        logits = []
        for model in dense.train(mode), single.train(mode):
            torch.manual_seed(5)  # dropout
            logits.append(model(x))
        assert torch.equal(*logits)
    torch.manual_seed(5)
    F.cross_entropy(dense.train()(x).flatten(0, 1), x.flatten()).backward()
    torch.manual_seed(5)
    ce = F.cross_entropy(single.train()(x).flatten(0, 1), x.flatten())
    (ce + sum(m.measured[0] for m in experts_of(single))).backward()
    assert all(torch.equal(p.grad, found[name].grad) for name, p in dense.named_parameters())
    assert len(routers) == 2 and not any(router.grad.any() for router in routers.values())
    single(x)
    sum(m.measured[1] for m in experts_of(single)).backward()
    assert all(router.grad.any() for router in routers.values())


@pytest.mark.parametrize("dtype", thorough(["bfloat16", "float32"], sample=1))
def test_a_run_with_one_expert_is_the_dense_run(data, tmp_path, dtype):
    change = dict(GPT2, dtype=dtype, grad_clip=0.0, weight_decay=0.1, max_iters=3)
    run_train(data, tmp_path / "dense", **change)
    run_train(data, tmp_path / "single", n_experts=1, router_z=0.0, router_jitter=0.0, **change)
    assert_same_log(tmp_path / "dense", tmp_path / "single", ["ce", "val_ce"], rel=0, abs=0)
    found = {name.replace(".experts.0", ""): p for name, p in weights(tmp_path / "single").items()}
    assert_same(weights(tmp_path / "dense"), {k: p for k, p in found.items() if not k.endswith("router")})


def test_routers_are_float32_in_bfloat16(data, tmp_path):
    """In the arithmetic, and where a teacher's matrices are made bfloat16 ahead."""
    layer = experts_of(new_model())[0]
    x = torch.randn(2, 16, 32)
    layer(x)
    exact = layer.measured[1]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert layer.measured[1] == exact and y.dtype == torch.bfloat16
    run_train(data, tmp_path / "t", max_iters=2, **SWITCH)
    cfg = distill_config(data, tmp_path / "r", teachers=(str(tmp_path / "t"),))
    teacher, = load_teachers(cfg, Machine(torch.device("cpu"), dtype=torch.bfloat16), train.start(cfg)[1])
    layer, = experts_of(teacher.body)
    assert layer.router.dtype == torch.float32 and layer.experts[3].up_proj.weight.dtype == torch.bfloat16


def test_initialisation():
    model = LanguageModel(ModelConfig(**{**SIZES, **GPT2, "n_embd": 128, "vocab_size": 10}, n_experts=8))
    layers = model.model.layers
    assert [isinstance(layer.mlp, Experts) for layer in layers] == [False, True, False, True]
    for p, std in ((layers[3].mlp.router, 0.02), (layers[1].mlp.experts[7].up_proj.weight, 0.02),
                   (layers[1].mlp.experts[7].down_proj.weight, 0.02 / 8 ** 0.5)):
        assert p.std().item() == pytest.approx(std, rel=0.1)
    model = LanguageModel(ModelConfig(**SIZES, n_experts=2, sparse_every=1))
    assert len(experts_of(model)) == 4


# --- reading: what one text alone in a row gives --------------------------------------------------

def test_nobody_is_dropped_in_evaluation():
    """Each token by itself, with its expert: also where all choose the same."""
    layer = experts_of(new_model())[0].eval()
    layer.router.data[1:] = layer.router.data[0]
    layer.router.data[2] *= -1
    x = torch.randn(2, 40, 32)
    for b, t in [(0, 0), (0, 39), (1, 20), (1, 39)]:
        p = (layer.router @ x[b, t]).softmax(-1)
        expected = p.max() * layer.experts[p.argmax()](x[b, t])
        torch.testing.assert_close(layer(x)[b, t], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_texts_as_trees_have_the_scores_of_each_alone(arch):
    torch.manual_seed(7)
    model = new_model(arch=arch, expert_capacity=0.25)
    start = torch.randint(97, (12,)).tolist()
    texts = [tuple(start[:n] + torch.randint(97, (8 + n,)).tolist()) for n in (3, 3, 7, 7, 12, 12)]
    scores = log_probabilities([Teacher(model.eval())], [Candidate(ids, 2) for ids in texts], 512)
    for ids, score in zip(texts, scores):
        assert score == pytest.approx(one_text(model, ids)[1:].sum().item(), abs=1e-4)


def test_sampling_goes_on_as_the_whole_text_reads():
    model = new_model(expert_capacity=0.25).eval()
    ids = generate([model], [5], 20, temperature=0)
    for n in range(1, 21):
        assert model(torch.tensor([ids[:20]]))[0, n - 1].argmax() == ids[n]


def test_fine_tuning_reads_each_text_as_if_alone(data, tmp_path):
    """Also in training, whatever the padding; the loss is the task's alone."""
    run_train(data, tmp_path / "run", max_iters=2, **{**SWITCH, "expert_capacity": 1.0})
    cfg = finetune.FinetuneConfig(
        ckpt=(str(tmp_path / "run"),), data=write_task(tmp_path / "glue", n=16, valid=8), tasks=("rte",),
        out_dir=str(tmp_path / "glue"), device="cpu", max_length=32, batch_size=8, epochs=1, log_interval=1)
    ensemble = finetune.new_ensemble(cfg, 2, torch.device("cpu")).train()
    for layer in experts_of(ensemble):
        torch.nn.init.zeros_(layer.router)  # all choose one, whose places would be 1, 3 and 5 here
        torch.nn.init.normal_(layer.experts[0].down_proj.weight)
    texts = [glue.Example(list(range(10, 10 + n)), 0) for n in (4, 9, 20)]
    together = ensemble(finetune.to_batch(texts, torch.device("cpu")))
    alone = torch.cat([ensemble(finetune.to_batch([text], torch.device("cpu"))) for text in texts])
    torch.testing.assert_close(together, alone)
    finetune.main(cfg)
    assert "router_z" not in records(tmp_path / "glue" / "rte_12")[0]


# --- training -------------------------------------------------------------------------------------

def test_the_step_is_the_gradient_of_the_whole_loss(data, tmp_path):
    """With another form of the two losses, at one step of two micro-batches; the validation's is plain."""
    change = dict(SWITCH, n_layer=4, micro_batch_size=4, router_balance=0.5, router_z=0.1)
    cfg = train_config(data, tmp_path / "run", **change)
    machine, chunks = train.start(cfg)
    model = train.new_model(cfg, machine, chunks)
    ces, balances, zs = [], [], []
    for micro_step in 0, 1:
        batch = chunks.batch(0, micro_step)
        for layer, x in inputs_of_experts(model, batch.x):
            z = x @ layer.router.T
            p = z.softmax(-1)
            counts = F.one_hot(p.argmax(-1), 4).sum(1) / 32  # (B, E)
            balances.append(4 * torch.einsum("be,bte->", counts, p) / 32 / 4)
            zs.append(torch.log(z.exp().sum(-1)).pow(2).sum() / 32 / 4)
        ces.append(F.cross_entropy(model(batch.x).flatten(0, 1), batch.y.flatten()))
    ce, balance, z = (sum(values) / len(values) for values in (ces, balances, zs))
    loss = ce + 0.5 * balance + 0.1 * z
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()

    run_train(data, tmp_path / "run", **change, max_iters=1)
    record, = records(tmp_path / "run")
    for key, value in dict(loss=loss, ce=ce, router_balance=balance, router_z=z, grad_norm=norm).items():
        assert record[key] == pytest.approx(value.item(), rel=1e-4), key
    assert 0 < record["dropped"] < 1
    trained, _, described = load_checkpoint(str(tmp_path / "run"))
    z = trained(torch.from_numpy(chunks.val[:, :-1]))
    plain = F.cross_entropy(z.flatten(0, 1), torch.from_numpy(chunks.val[:, 1:]).flatten())
    assert record["val_ce"] == pytest.approx(plain.item(), rel=1e-5) == described["val_ce"]


@pytest.mark.parametrize("change", [dict(sam_rho=1e-6), dict(causal=False), dict(loss_chunk=0)])
def test_any_loss_has_the_routers_in_it(data, tmp_path, change):
    """The masked loss too, and both passes of SAM."""
    run_train(data, tmp_path / "run", max_iters=2, router_balance=0.5, router_z=0.1, **SWITCH, **change)
    for record in records(tmp_path / "run"):
        whole = record["ce"] + 0.5 * record["router_balance"] + 0.1 * record["router_z"]
        assert record["loss"] == pytest.approx(whole, rel=1e-5)
        assert record.get("sam_loss", whole) == pytest.approx(whole, rel=1e-4)


def test_micro_batches_change_nothing(data, tmp_path):
    for size in 0, 2:
        run_train(data, tmp_path / str(size), micro_batch_size=size, max_iters=3, **SWITCH)
    assert_same_log(tmp_path / "0", tmp_path / "2", PARTS, rel=1e-4)


@pytest.mark.parametrize("change", thorough([
    dict(GPT2, micro_batch_size=4), dict(dtype="bfloat16"), dict(sparse_every=1)], sample=1))
def test_resume_is_the_same_run_bit_for_bit(data, tmp_path, monkeypatch, change):
    """With dropout and jitter, killed beyond the last checkpoint."""
    assert_resumes(partial(run_train, data, n_experts=4, max_iters=8, **change), tmp_path, monkeypatch, 7)


@pytest.mark.thorough
def test_two_ranks_equal_one(data, tmp_path):
    run_train(data, tmp_path / "one", **SWITCH)
    run_ranks(lambda: run_train(data, tmp_path / "two", micro_batch_size=2, **SWITCH))
    assert_same_log(tmp_path / "one", tmp_path / "two", PARTS, rel=1e-3)
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), rtol=1e-3, atol=1e-3)


@pytest.mark.thorough
@pytest.mark.usefixtures("compiler")
def test_compiled_equals_plain(data, tmp_path):
    change = {**SWITCH, "n_experts": 2, "n_layer": 1, "sparse_every": 1}
    for compile in "off", "on":
        run_train(data, tmp_path / compile, compile=compile, **change)
    assert_same_log(tmp_path / "off", tmp_path / "on", PARTS, rel=1e-3)


@pytest.fixture(scope="module")
def switch(data, tmp_path_factory):
    """The run folder of a trained model with experts."""
    out = str(tmp_path_factory.mktemp("switch") / "run")
    run_train(data, out, n_experts=4)
    return out


def test_experts_teach_and_learn(data, switch, teachers, tmp_path):
    run_distill(data, tmp_path / "run", [switch, teachers[0]], n_experts=2, alpha=0.3, temperature=1.0)
    first, *steps = records(tmp_path / "run")
    own = validations(switch)[-1]["val_ce"]
    assert first["teacher_val_ce"][0] == pytest.approx(own, abs=1e-6)
    for record in steps:
        whole = (0.3 * record["ce"] + 0.7 * record["kl"] + 0.01 * record["router_balance"]
                 + 0.001 * record["router_z"])
        assert record["loss"] == pytest.approx(whole, rel=1e-5)
    assert steps[-1]["val_ce"] < steps[2]["val_ce"]


def test_a_student_with_experts_takes_the_plain_way(data, tmp_path, monkeypatch, capfd):
    """On a machine that records graphs: a replay would leave no losses behind."""
    start = train.start
    graphs = graphs_on_cpu(monkeypatch.setattr)
    monkeypatch.setattr(train, "start", start)
    monkeypatch.setitem(KINDS, "cpu", KINDS["cpu"]._replace(graphs=True))
    run_train(data, tmp_path / "run", max_iters=1, **SWITCH)
    assert capfd.readouterr().out.count("notice: no CUDA graphs") == 1 and not graphs
    run_train(data, tmp_path / "dense", max_iters=1)
    assert len(graphs) == 2


def test_a_teacher_with_experts_is_recorded(data, switch, tmp_path, monkeypatch):
    run_distill(data, tmp_path / "plain", [switch], max_iters=3)
    graphs = graphs_on_cpu(monkeypatch.setattr)
    run_distill(data, tmp_path / "graphs", [switch], max_iters=3)
    assert_same_log(tmp_path / "plain", tmp_path / "graphs", PARTS, rel=1e-5)
    assert len(graphs) == 4 and graphs[0].replays >= 3 == graphs[2].replays


# --- refused, and counted -------------------------------------------------------------------------

def test_what_has_no_experts_says_so(data, switch, teachers, tmp_path):
    def refused(message, call, *args, **kwargs):
        with pytest.raises(SystemExit, match=message) as e:
            call(*args, **kwargs)
        assert "\n" not in str(e.value)
    refused(r"run has experts \(n_experts=4\), which have no int8 form", run_distill, data, tmp_path / "r",
            [teachers[0], switch], teacher_dtype=("float32", "int8"))
    refused(r"has experts \(n_experts=4\), which neither format has", hf.main,
            ["export", switch, str(tmp_path / "hf")])
    refused("without contrastive, teacher_cache and n_experts", run_distill, data, tmp_path / "r",
            teachers[:1], generator="x", n_experts=2)
    run_train(data, tmp_path / "masked", max_iters=1, causal=False, n_experts=2)
    refused(r"generator \S*masked has experts", run_distill, data, tmp_path / "r", teachers[:1],
            generator=str(tmp_path / "masked"))
    refused("ascent=True must be False with sam_rho, n_experts or muon", run_train, data, tmp_path / "r",
            ascent=True, n_experts=2)
    refused("n_experts=2 must be 0 with n_layer=1", run_train, data, tmp_path / "r", n_layer=1, n_experts=2)
    refused("sparse_every=0 must be at least 1", run_train, data, tmp_path / "r", sparse_every=0)
    refused("router_jitter=1.0 must be below 1", run_train, data, tmp_path / "r", router_jitter=1.0)
    assert not os.path.exists(tmp_path / "r") and not os.path.exists(tmp_path / "hf")


def test_a_checkpoint_of_a_million_experts_is_refused_at_once(data, tmp_path):
    run_train(data, tmp_path / "run", max_iters=1, n_experts=2)
    folder = find_checkpoint(str(tmp_path / "run"))
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    config["model"]["n_experts"] = 10 ** 7
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f)
    reseal(folder, "config.json")
    with pytest.raises(SystemExit, match="too few for n_experts=10000000"):
        load_checkpoint(folder)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [
    {}, dict(sparse_every=1), dict(expert_capacity=0.0), dict(expert_capacity=1.3),
    dict(arch="gpt2", tie_weights=True), dict(n_experts=1, expert_capacity=9.0)])
def test_operations_are_counted_as_torch_counts_them(change, training):
    cfg = ModelConfig(**{**SIZES, "n_experts": 4, **change})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        LanguageModel(cfg).train(training)(torch.zeros(3, 40, dtype=torch.int64))
    half_attention = 4 * 2 * 40 * 32  # torch counts all of it
    assert 3 * 40 * (forward_flops(cfg, 40, training) + half_attention) == counter.get_total_flops()


def test_a_plan_counts_places_of_a_student_and_all_experts_of_a_teacher(tmp_path, capsys):
    sizes = dict(vocab_size=16000, n_layer=8, n_head=16, n_embd=256, intermediate_size=1024, block_size=128)
    student = ModelConfig(**sizes, arch="gpt2", tie_weights=True, n_experts=8, expert_capacity=1.25)
    mlp, C = 2 * 256 * 1024, 256
    dense = 8 * (4 * C * C + mlp) + 16000 * C + 8 * 128 * C
    assert forward_flops(student, 128, True) == 2 * (dense + 4 * (mlp * 0.25 + 8 * C))
    assert training_flops(student, [student], 128) == (3 * forward_flops(student, 128, True)
                                                       + 2 * (dense + 4 * (7 * mlp + 8 * C)))
    with torch.device("meta"):
        assert LanguageModel(student).n_params() == 10_480_128 + 4 * (7 * 525_568 + 8 * 256) + (128 - 256) * C
    path = tmp_path / "switch.py"
    path.write_text("".join(f"{k} = {v!r}\n" for k, v in {**vars(student), "vocab_size": 0}.items()))
    plan.main([str(path)])
    flops = 3 * forward_flops(student, 128, True) / 1e6
    assert f"| switch | {flops:,.0f} |" in capsys.readouterr().out


def test_settings_that_are_left_alone_change_nothing(data, tmp_path):
    run_train(data, tmp_path / "a", max_iters=2)
    run_train(data, tmp_path / "b", max_iters=2, expert_capacity=3.0, sparse_every=1, router_jitter=0.5,
              router_balance=9.0, router_z=9.0)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert "router_z" not in records(tmp_path / "a")[0]
