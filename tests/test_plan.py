"""lib/costs.py counts a step's operations and memory right, tools/plan.py what a run takes."""
import glob
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from distill import DistillConfig
from helpers import ROOT, flags_of
from lib.configurator import configure, read_config_file
from lib.costs import forward_flops, layer_bytes, training_bytes, training_flops
from lib.machine import Machine
from model import LanguageModel, ModelConfig, Transformer
from tools import plan

SIZES = dict(n_layer=2, n_head=4, n_embd=32, intermediate_size=48, block_size=16, vocab_size=500)
MODELS = {"gpt2": dict(arch="gpt2", tie_weights=True), "llama": {}, "grouped": dict(n_kv_head=1),
          "masked": dict(causal=False)}


@pytest.mark.parametrize("change", MODELS.values(), ids=MODELS)
def test_operations_are_counted_as_torch_counts_them(change):
    cfg = ModelConfig(**SIZES, **change)
    x = torch.zeros(3, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        LanguageModel(cfg)(x)
    half_attention = 2 * 2 * 16 * 32 if cfg.causal else 0  # torch counts all of it, we what causality leaves
    assert 3 * 16 * (forward_flops(cfg, 16) + half_attention) == counter.get_total_flops()


def test_a_step_is_three_times_forward_and_once_for_a_teacher():
    """Backward by torch's count; the input of the first layer wants no gradient, as embeddings are free."""
    student, teacher = ModelConfig(**SIZES), ModelConfig(**{**SIZES, "n_embd": 64})
    x = torch.zeros(3, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        LanguageModel(student)(x).sum().backward()
        with torch.no_grad():
            LanguageModel(teacher)(x)
    half_attention = 3 * 2 * 2 * 16 * 32 + 2 * 2 * 16 * 64
    ours = 3 * 16 * (training_flops(student, [teacher], 16) + half_attention)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05)  # attention's backward multiplies again
    cached = training_flops(student, [teacher], 16, cached=True)
    assert cached == 3 * forward_flops(student, 16) + 2 * 500 * 64


def saved_bytes(cfg, B, T):
    """What autograd keeps of compiled layers for the way back, in bytes per position and layer. B x T divides
    no weight's size, so what it divides is of positions."""
    torch.manual_seed(0)
    body, kept = Transformer(cfg), {}
    rope = None if body.cos is None else (body.cos[:T], body.sin[:T])
    body.compile_layers()

    def pack(t):
        if t.numel() % (B * T) == 0:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    h = torch.randn(B, T, cfg.n_embd, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        for layer in body.layers:
            h = layer(h, rope)
        h.sum().backward()
    return sum(kept.values()) / B / T / cfg.n_layer


@pytest.mark.thorough
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["gpt2", "llama", "grouped"])
def test_activations_are_what_autograd_keeps(name):
    cfg = ModelConfig(**{**SIZES, **MODELS[name], "n_embd": 256, "intermediate_size": 512})
    assert layer_bytes(cfg, 2) == pytest.approx(saved_bytes(cfg, 60, 8), rel=0.1)


def peak_gib(name, micro_batch=0, world=1, **change):
    """Of a config of ours with CUDA graphs."""
    path = f"{ROOT}/config/{name}.py"
    cfg = configure(DistillConfig, [path, *flags_of(change)])
    described = (cfg, *plan.teacher_configs(path, cfg.teachers))
    student, *teachers = [plan.sizes(c, plan.PlanConfig()) for c in described]
    machine = Machine(torch.device("cuda"), micro_batch=micro_batch or cfg.micro_batch_size or cfg.batch_size,
                      dtype=torch.bfloat16, graphs=True, world=world)
    with torch.device("meta"):
        n = LanguageModel(student).n_params()
    return training_bytes(cfg, machine, n, teachers) / 2 ** 30


# GiB that torch's allocator reserved on a simulated H100, in whole runs of 6 steps and a validation
@pytest.mark.parametrize("name, micro_batch, reserved", [
    ("gpt2_97m", 0, 4.41), ("gpt2_97m", 128, 10.59), ("llama_360m", 0, 15.81), ("llama_360m", 128, 37.42),
    ("gpt2_705m", 0, 20.04), ("gpt2_705m", 64, 26.29), ("gpt2_705m", 128, 39.02),
    ("babyllama2_teacher", 0, 11.33), ("babyllama2_teacher", 128, 24.36), ("llama_95m", 0, 5.76),
    ("llama_16m", 0, 1.65), ("tinyminds_gpt2_44m", 0, 5.65), ("tinyminds_llama_60m", 0, 5.92),
    ("tinyminds_llama_20m", 0, 5.53), ("tinyminds_gpt2_18m", 0, 4.80), ("contrastive_llama", 0, 5.68),
    ("gpt2_10m", 0, 1.59), ("babyllama", 0, 5.56), ("babyllama2", 0, 12.96),
    ("babyllama2", 128, 26.62), ("llama_58m", 0, 2.86), ("distilledgpt_44m", 0, 2.41)])
def test_memory_is_what_the_allocator_takes_from_a_card(name, micro_batch, reserved):
    assert peak_gib(name, micro_batch) == pytest.approx(reserved, rel=0.1)


def test_more_takes_more():
    less = peak_gib("llama_360m", 8)
    assert less < peak_gib("llama_360m", 16) < peak_gib("llama_360m", 16, n_layer=25)
    assert less > peak_gib("llama_360m", 8, batch_size=8)  # no sum beside the graph's gradients
    assert peak_gib("babyllama") > peak_gib("llama_58m") + 2
    n = 705_000_000 * 4 / 2 ** 30  # GiB of a copy of the weights
    assert peak_gib("gpt2_705m", 64, world=2) - peak_gib("gpt2_705m", 64) == pytest.approx(n, rel=0.01)
    one_replay = peak_gib("gpt2_705m", 8, batch_size=8)
    climbing = peak_gib("gpt2_705m", 8, batch_size=8, sam_rho=0.05)  # two replays, and where it began
    assert climbing - one_replay == pytest.approx(2 * n, rel=0.01)


@pytest.mark.parametrize("change", [{}, dict(n_kv_head=1), dict(n_experts=3)])
def test_muon_keeps_one_moment_of_a_matrix(change):
    def kept(optimizer):
        cfg = train.TrainConfig(**SIZES, **change, optimizer=optimizer)
        student = LanguageModel(cfg)
        trainee = train.Trainee(student)
        for p in student.parameters():
            p.grad = torch.ones_like(p)
        states = []
        for each in train.make_optimizers(trainee, cfg):
            each.step()
            states += [t.nbytes for state in each.state.values() for t in state.values() if t.dim()]
        machine = Machine(torch.device("cpu"), micro_batch=4)
        return sum(states), training_bytes(cfg, machine, student.n_params())
    of_adamw, of_muon = kept("adamw"), kept("muon")
    routers = 4 * 32 * change.get("n_experts", 0)  # are matrices too, and left out
    assert of_adamw[0] - of_muon[0] - routers == of_adamw[1] - of_muon[1] > 0


def rows(printed):
    """A Markdown table's cells by the first of each line."""
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return {name: dict(zip(lines[0][1:], cells)) for name, *cells in lines[1:]}


def test_steps_and_hours_of_a_config(data, tmp_path, capsys):
    config = tmp_path / "mine.py"
    config.write_text("arch, n_layer, n_embd, block_size, seq_len = 'llama', 2, 64, 64, 32\n"
                      "n_head, batch_size, micro_batch_size, epochs, random_offset = 4, 12, 4, 3, True\n")
    plan.main([str(config), f"--data_dir={data}", "--cards=one:24:1e-6:0.5"])
    row = rows(capsys.readouterr().out)["mine"]
    cfg = configure(DistillConfig, [str(config), f"--data_dir={data}", "--device=cpu"])
    steps = train.start(cfg)[1].total
    assert row["epochs, steps"] == f"3, {steps:,}"
    flops = 3 * forward_flops(train.model_config(cfg), 32) * steps * 12 * 32
    assert float(row["one, hours"]) == pytest.approx(flops / 0.5e6 / 3600, rel=0.01)


def test_a_config_laid_over_another_is_planned_with_it(capsys):
    plan.main([f"{ROOT}/config/babyllama.py", f"{ROOT}/config/babyllama.py+{ROOT}/config/strong_student.py"])
    planned = rows(capsys.readouterr().out)
    once, laid_over = planned["babyllama"], planned["babyllama+strong_student"]
    assert laid_over["MFLOP/token"] == once["MFLOP/token"]
    (_, steps), (epochs, more) = ([int(n.replace(",", "")) for n in row["epochs, steps"].split(", ")]
                                  for row in (once, laid_over))
    assert epochs == 10 and more / 10 == steps / 6
    plan.main([f"{ROOT}/config/gpt2_10m.py", f"{ROOT}/config/gpt2_10m.py+{ROOT}/config/sam.py"])
    plain, twice = rows(capsys.readouterr().out).values()
    assert int(twice["MFLOP/token"]) == pytest.approx(2 * int(plain["MFLOP/token"]), abs=1)


def test_each_config_has_a_row_or_is_named(capsys):
    plan.main([])
    printed = capsys.readouterr().out
    models = {os.path.basename(path)[:-3] for path in glob.glob(f"{ROOT}/config/*.py")
              if "arch" in read_config_file(path)}
    left_out = {"electra_56m", "masked_adversarial_llama"}
    assert rows(printed).keys() == models - left_out and all(name in printed for name in left_out)
    for row in rows(printed).values():  # what fits is no more than the card has
        assert float(row["largest in 24 GiB"].split(": ")[1]) <= 0.9 * 24


@pytest.mark.parametrize("args, message", [
    (["--cards=H100:80"], "name:GiB:TFLOP/s:share"), (["--cards=H100:80:989:0"], "name:GiB:TFLOP/s:share"),
    (["CONFIG"], "teacher out/nobody has no config beside it"),
    ([f"{ROOT}/config/strong_student.py"], "strong_student.py has no arch: name the model's config"),
    (["--tokens=0"], "tokens=0 must be at least 1")])
def test_what_cannot_be_planned_is_one_line(tmp_path, args, message):
    (tmp_path / "c.py").write_text("arch = 'llama'\nteachers = ['out/nobody']\n")
    with pytest.raises(SystemExit, match=message):
        plan.main([arg.replace("CONFIG", str(tmp_path / "c.py")) for arg in args])
