"""The README's six changes, each applied to a copy of the project and used, killed and resumed where it trains."""
import glob
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, TINY, assert_same, flags_of, records, run_train, weights, write_pairs

from lib.checkpoints import find_checkpoint, load_state
from lib.shards import Shards

# a config file that makes the run it is laid over die at the beginning of step 4
DIE = """import sys as _sys
_loop = _sys.modules.get("train") or _sys.modules["__main__"]
_real = _loop.learning_rate
def _dying(cfg, step, total):
    if step == 4:
        raise KeyboardInterrupt
    return _real(cfg, step, total)
_loop.learning_rate = _dying
"""


@pytest.fixture
def hacked(tmp_path):
    """hacked(name): a copy of the project with the diff applied, at most 25 lines in at most two files."""
    def apply(name):
        with open(os.path.join(ROOT, "tests", "hacks", f"{name}.diff")) as f:
            lines = f.read().splitlines()
        assert sum(line.startswith(("+", "-")) and not line.startswith(("+++", "---")) for line in lines) <= 25
        assert sum(line.startswith("+++") for line in lines) <= 2
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in glob.glob(f"{ROOT}/*.py"):
            shutil.copy(path, copy)
        for folder in ("lib", "tools"):
            shutil.copytree(os.path.join(ROOT, folder), copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        done = subprocess.run(["git", "apply", os.path.join(ROOT, "tests", "hacks", f"{name}.diff")], cwd=copy,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return copy
    return apply


# several command lines of one script in a process that imports torch once; prints their exit statuses
RUNNER = """import json, os, runpy, sys
sys.path.insert(0, os.getcwd())
import lib.objectives
for argv in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr)
"""


def start(copy, script, *runs, codes=None):
    """The script of the copy with each of the argument lists `runs`; what they printed."""
    argvs = json.dumps([[script, *map(str, args)] for args in runs])
    done = subprocess.run([sys.executable, "-c", RUNNER, argvs], cwd=copy, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = [int(line) for line in done.stderr.splitlines() if line.isdecimal()]
    assert found == (codes or [0] * len(runs)), done.stderr[-3000:]
    return done.stdout


def train_and_resume(copy, script, data, **settings):
    """A run, and one that was killed and resumed: the same bits. The run's folder."""
    (copy / "die.py").write_text(DIE)
    flags = flags_of({**TINY, **settings, "data_dir": data})
    whole, cut = [*flags, f"--out_dir={copy}/whole"], [*flags, f"--out_dir={copy}/cut"]
    start(copy, script, whole, ["die.py", *cut], [*cut, "--resume"], codes=[0, 1, 0])
    assert_same(weights(copy / "whole"), weights(copy / "cut"))
    states = [load_state(find_checkpoint(str(copy / out)))[0] for out in ("whole", "cut")]
    assert_same(*states)
    assert [r["step"] for r in records(copy / "cut") if r["step"]] == [1, 2, 3, 4, 5, 6]
    return copy / "whole"


def test_reverse_kl(hacked, data, teachers):
    out = train_and_resume(hacked("reverse_kl"), "distill.py", data, teachers=teachers[:2], reverse_kl=0.5)
    for r in records(out)[1:]:
        expected = 0.5 * r["ce"] + 0.5 * 4 * r["kl"] + 0.5 * r["reverse_kl"]
        assert r["reverse_kl"] > 0 and r["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_table_of_bigrams_teaches(hacked, data, teachers, tmp_path):
    """Alone it has the loss of its counts; beside a model it teaches whole, in chunks, compiled and from the cache."""
    shards = Shards(data, "train")
    tokens = shards.windows([0], len(shards))[0]
    counts = np.full((500, 500), 0.1)
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    table = np.log(counts / counts.sum(1, keepdims=True)).astype(np.float32)
    np.save(tmp_path / "bigrams.npy", table)
    copy = hacked("ngram")
    both = [str(tmp_path / "bigrams.npy"), teachers[1]]
    out = train_and_resume(copy, "distill.py", data, teachers=both)
    val = Shards(data, "val")
    chosen = np.random.default_rng(2023).permutation((len(val) - 1) // 32)[:16]
    chunks = val.windows(chosen * 32, 33)
    assert records(out)[0]["teacher_val_ce"][0] == pytest.approx(-table[chunks[:, :-1], chunks[:, 1:]].mean(), rel=1e-5)
    ways = dict(formula=dict(loss_chunk=0), chunks=dict(loss_chunk=50), cache=dict(teacher_cache=tmp_path / "c"),
                plain=dict(n_layer=1), compiled=dict(compile="on", n_layer=1))
    start(copy, "distill.py", *(flags_of({**TINY, **change, "teachers": both, "data_dir": data, "out_dir": copy / name})
                                for name, change in ways.items()))
    losses = {name: [r["loss"] for r in records(copy / name)[1:]] for name in ("whole", *ways)}
    assert losses["formula"] == pytest.approx(losses["whole"], rel=1e-4)
    assert losses["chunks"] == pytest.approx(losses["whole"], rel=1e-4)
    assert losses["cache"] == pytest.approx(losses["whole"], rel=1e-3)  # the model's states in bfloat16
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-4)


def test_the_students_average_teaches(hacked, data, teachers):
    out = train_and_resume(hacked("ema"), "distill.py", data, teachers=teachers[:1], ema=0.9, micro_batch_size=4)
    student, average = weights(out), load_state(find_checkpoint(str(out)))[0]
    assert not np.allclose(student["lm_head.weight"], average["companion.lm_head.weight"])


def test_muon_beside_adamw(hacked, data):
    out = train_and_resume(hacked("muon"), "train.py", data, muon_lr=0.05)
    with open(os.path.join(find_checkpoint(str(out)), "state.json")) as f:
        assert sorted(json.load(f)["optimizers"]) == ["AdamW", "Muon"]
    names = load_state(find_checkpoint(str(out)))[0].keys()
    assert "momentum_buffer.model.layers.0.mlp.up_proj.weight" in names and "exp_avg.lm_head.weight" in names
    with pytest.raises(SystemExit, match="the optimizer's state of model.layers.0"):  # by plain AdamW: refused
        run_train(data, out, resume=True, max_iters=9)


def test_a_source_with_its_cleaner(hacked, corpus, tmp_path):
    text = tmp_path / "text"
    shutil.copytree(f"{corpus}/text", text)
    (text / "train_10M" / "blog.train").write_text("see https://example.org/page for it .\n" * 50)
    copy = hacked("source")
    printed = start(copy, "prepare.py", [f"--input_dir={text}", f"--data_dir={copy}/data", "--vocab_size=500"])
    assert "no cleaner" not in printed
    with open(copy / "data" / "meta.json") as f:
        meta = json.load(f)
    assert meta["cleaners"]["blog"] == "clean_blog" and meta["words"]["train"]["blog"] == 4 * 50


def test_pairs_with_other_fields(hacked, teachers, tmp_path):
    write_pairs(tmp_path / "pairs", "task", [("the dog sees a cat.", "the dog see a cat.")] * 3)
    path = tmp_path / "pairs" / "task.jsonl"
    ours = path.read_text()
    copy = hacked("fields")
    args = [f"--ckpt={teachers[0]}", f"--data={tmp_path}/pairs", f"--out={copy}/blimp.json", "--device=cpu"]
    start(copy, "eval_blimp.py", [*args, f"--items={copy}/a.jsonl"])
    path.write_text(ours.replace("sentence_good", "grammatical").replace("sentence_bad", "ungrammatical"))
    start(copy, "eval_blimp.py", [*args, f"--items={copy}/b.jsonl"])
    assert (copy / "a.jsonl").read_text() == (copy / "b.jsonl").read_text()
