"""bench.py measures the real program, and counts its work right."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import bench
from model import LanguageModel, ModelConfig


def test_one_json_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(bench.PRESETS, "small", [("llama", 1, 2, 16, 32), ("gpt2", 1, 2, 16, 32), ("llama", 1, 2, 32, 32)])
    monkeypatch.setattr(bench, "VOCAB", 500)
    cfg = bench.BenchConfig(json=True, steps=2, batch_size=2, seq_len=8, device="cpu", dtype="float32", compile="off")
    bench.main(cfg)
    live, = capsys.readouterr().out.splitlines()
    live = json.loads(live)
    assert live["tokens_per_s"] > 0 and live["step_ms"] == pytest.approx(1e3 * 16 / live["tokens_per_s"], rel=0.05) and live["peak_gib"] > 0
    cfg.teacher_cache = str(tmp_path)
    bench.main(cfg)
    cached = json.loads(capsys.readouterr().out)
    assert cached["teacher_cache"] and cached["flops_per_token"] < live["flops_per_token"]
    bench.main(cfg)  # the cache of another process is recognised
    out, err = capsys.readouterr()
    assert json.loads(out) and "GB to write" not in err


def test_of_several_ranks_one_tells(tmp_path):
    code = ("import bench; bench.PRESETS['small'] = [('llama', 1, 2, 16, 32)] * 2; bench.VOCAB = 500; "
            "bench.main(bench.BenchConfig(json=True, steps=1, batch_size=2, seq_len=8, device='cpu', dtype='float32', compile='off'))")
    (tmp_path / "run.py").write_text(f"import sys; sys.path.insert(0, {ROOT!r}); {code}")
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "run.py")], capture_output=True, text=True)
    assert out.returncode == 0 and json.loads(out.stdout)["tokens_per_s"] > 0


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_operations_are_counted_as_torch_counts_them(arch):
    cfg = ModelConfig(arch=arch, n_layer=2, n_head=2, n_embd=32, intermediate_size=48, block_size=16, vocab_size=bench.VOCAB, tie_weights=arch == "gpt2")
    model, x = LanguageModel(cfg), torch.zeros(3, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    half_attention = 2 * 2 * 16 * 32  # torch counts all of it, we the half that causality leaves
    assert 3 * 16 * (bench.forward_flops(cfg, 16) + half_attention) == counter.get_total_flops()
