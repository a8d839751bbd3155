"""tools/bench.py measures the real program."""
import json
import subprocess
import sys

import pytest

from helpers import ROOT
from tools import bench

SMALL = dict(steps=2, batch_size=2, seq_len=8, device="cpu", dtype="float32", compile="off")


def test_one_json_line(monkeypatch, capsys, tmp_path):
    tiny = [("llama", 1, 2, 16, 32), ("gpt2", 1, 2, 16, 32), ("llama", 1, 2, 32, 32)]
    monkeypatch.setitem(bench.PRESETS, "small", tiny)
    monkeypatch.setattr(bench, "VOCAB", 500)
    cfg = bench.BenchConfig(json=True, **SMALL)
    bench.main(cfg)
    live, = capsys.readouterr().out.splitlines()
    live = json.loads(live)
    assert live["tokens_per_s"] > 0 and live["peak_gib"] > 0
    assert live["step_ms"] == pytest.approx(1e3 * 16 / live["tokens_per_s"], rel=0.05)
    cfg.teacher_cache = str(tmp_path)
    bench.main(cfg)
    cached = json.loads(capsys.readouterr().out)
    assert cached["teacher_cache"] and cached["flops_per_token"] < live["flops_per_token"]
    cfg.teachers_dir = str(tmp_path / "teachers")
    bench.main(cfg)  # the cache of another process is recognised
    out, err = capsys.readouterr()
    assert json.loads(out) and "GB to write" not in err
    monkeypatch.setattr(bench, "write_teacher", None)
    bench.main(cfg)  # teachers are there
    assert json.loads(capsys.readouterr().out)


@pytest.mark.thorough
def test_of_several_ranks_one_tells(tmp_path):
    (tmp_path / "small_bench.py").write_text(
        f"import sys; sys.path.insert(0, {ROOT!r}); from tools import bench\n"
        "bench.PRESETS['small'] = [('llama', 1, 2, 16, 32)] * 2; bench.VOCAB = 500\n"
        f"bench.main(bench.BenchConfig(json=True, **{SMALL!r}))\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, str(tmp_path / "small_bench.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["tokens_per_s"] > 0


PEER = """
import json, sys
assert sys.argv[1:9] == "--preset small --batch 2 --seq 8 --steps 7".split()
print("a line of its log")
print(json.dumps(dict(tokens_per_s=100, step_ms=160.0, peak_gib=0.5, seen=sys.argv[9:])))
"""


@pytest.mark.thorough
def test_the_table_has_each_way_and_its_ratio_to_a_peer(monkeypatch, capsys, tmp_path):
    """Ways are processes of their own, `python -m tools.bench`, whatever the folder."""
    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "multiplies_bf16", lambda device: False)
    monkeypatch.setattr(bench, "WAYS", {"plain": "--dtype=float32 --compile=off --loss_chunk=0"})
    bench.main(bench.BenchConfig(peer="peer.py", repeats=1, **SMALL))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| way", "| plain", "| peer, float32", "| peer, float32, compiled"]
    speed = float(rows[1][1].replace(",", ""))
    assert float(rows[1][-1].rstrip(" |")) == pytest.approx(speed / 100, abs=0.01) and rows[2][1] == "100"
