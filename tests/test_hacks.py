"""The README's six changes, each applied to a copy of the project and used, killed and resumed where it
trains."""
import glob
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from helpers import (
    ROOT,
    TINY,
    VOCAB,
    assert_same_run,
    flags_of,
    records,
    run_train,
    saved_state,
    validation_tokens,
    weights,
    write_pairs,
)
from lib.checkpoints import find_checkpoint
from lib.files import read_json
from lib.shards import Shards

pytestmark = pytest.mark.slow

# a config file that makes the run it is laid over die at the beginning of step 4
DIE = """import sys as _sys
_loop = _sys.modules.get("train") or _sys.modules["__main__"]
_learning_rate = _loop.learning_rate
def _dying(cfg, step, total):
    if step == 4:
        raise KeyboardInterrupt
    return _learning_rate(cfg, step, total)
_loop.learning_rate = _dying
"""

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


@pytest.fixture
def hacked(tmp_path):
    """hacked(name): a copy of the project with the diff applied, at most 25 lines in at most two files."""
    def apply(name):
        diff = os.path.join(ROOT, "tests", "hacks", f"{name}.diff")
        with open(diff) as f:
            lines = f.read().splitlines()
        files = [line for line in lines if line.startswith("+++")]
        changed = [line for line in lines if line.startswith(("+", "-"))]
        assert len(files) <= 2
        assert len(changed) - 2 * len(files) <= 25  # without the lines that name a file
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in glob.glob(f"{ROOT}/*.py"):
            shutil.copy(path, copy)
        for folder in ("lib", "tools"):
            shutil.copytree(os.path.join(ROOT, folder), copy / folder,
                            ignore=shutil.ignore_patterns("__pycache__"))
        done = subprocess.run(["git", "apply", diff], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return copy
    return apply


def start(copy, script, *command_lines, codes=None):
    """The script of the copy with each of the lists of arguments; what they printed."""
    argvs = json.dumps([[script, *map(str, args)] for args in command_lines])
    done = subprocess.run([sys.executable, "-c", RUNNER, argvs], cwd=copy, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = [int(line) for line in done.stderr.splitlines() if line.isdecimal()]
    assert found == (codes or [0] * len(command_lines)), done.stderr[-3000:]
    return done.stdout


def train_and_resume(copy, script, data, **settings):
    """A run, and one that was killed and resumed: the same bits. The run's folder."""
    (copy / "die.py").write_text(DIE)
    flags = flags_of({**TINY, **settings, "data_dir": data})
    whole, cut = [*flags, f"--out_dir={copy}/whole"], [*flags, f"--out_dir={copy}/cut"]
    start(copy, script, whole, ["die.py", *cut], [*cut, "--resume"], codes=[0, 1, 0])
    assert_same_run(copy / "whole", copy / "cut")
    assert records(copy / "cut")[-1]["step"] == TINY["max_iters"]
    return copy / "whole"


def test_reverse_kl(hacked, data, teachers):
    settings = dict(teachers=teachers[:2], reverse_kl=0.5)
    out = train_and_resume(hacked("reverse_kl"), "distill.py", data, **settings)
    for record in records(out)[1:]:
        expected = 0.5 * record["ce"] + 0.5 * 4 * record["kl"] + 0.5 * record["reverse_kl"]
        assert record["reverse_kl"] > 0
        assert record["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def bigrams(data, tmp_path):
    """The logarithm of how often a token follows another in the training text, and its file."""
    shards = Shards(data, "train")
    tokens = shards.windows([0], len(shards))[0]
    counts = np.full((VOCAB, VOCAB), 0.1)
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    table = np.log(counts / counts.sum(1, keepdims=True)).astype(np.float32)
    np.save(tmp_path / "bigrams.npy", table)
    return table, str(tmp_path / "bigrams.npy")


def test_a_table_of_bigrams_teaches(hacked, data, teachers, bigrams, tmp_path):
    """Alone it has the loss of its counts; beside a model it teaches in chunks, whole and from the cache."""
    table, path = bigrams
    copy, both = hacked("ngram"), [path, teachers[1]]
    out = train_and_resume(copy, "distill.py", data, teachers=both)
    chunks = validation_tokens(data)
    alone = -table[chunks[:, :-1], chunks[:, 1:]].mean()
    assert records(out)[0]["teacher_val_ce"][0] == pytest.approx(alone, rel=1e-5)

    ways = dict(
        formula=dict(loss_chunk=0),
        chunks=dict(loss_chunk=50),
        cache=dict(teacher_cache=tmp_path / "cache"),
    )
    losses = losses_of(copy, dict(teachers=both, data_dir=data), ways)
    losses["whole"] = [record["loss"] for record in records(out)[1:]]
    assert losses["formula"] == pytest.approx(losses["whole"], rel=1e-4)
    assert losses["chunks"] == pytest.approx(losses["whole"], rel=1e-4)
    assert losses["cache"] == pytest.approx(losses["whole"], rel=1e-3)  # the model's states in bfloat16


def losses_of(copy, settings, ways):
    """{way: its losses} of distill.py with some settings changed."""
    runs = [flags_of({**TINY, **settings, **change, "out_dir": copy / name}) for name, change in ways.items()]
    start(copy, "distill.py", *runs)
    return {name: [record["loss"] for record in records(copy / name)[1:]] for name in ways}


@pytest.mark.thorough
def test_a_table_of_bigrams_is_compiled(hacked, data, teachers, bigrams):
    ways = dict(plain=dict(n_layer=1), compiled=dict(n_layer=1, compile="on"))
    losses = losses_of(hacked("ngram"), dict(teachers=[bigrams[1], teachers[1]], data_dir=data), ways)
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-4)


def test_the_students_average_teaches(hacked, data, teachers):
    settings = dict(teachers=teachers[:1], ema=0.9, micro_batch_size=4)
    out = train_and_resume(hacked("ema"), "distill.py", data, **settings)
    student, average = weights(out), saved_state(find_checkpoint(str(out)))
    assert not np.allclose(student["lm_head.weight"], average["companion.lm_head.weight"])


def test_muon_with_a_rate_of_its_own(hacked, data):
    out = train_and_resume(hacked("muon"), "train.py", data, optimizer="muon", muon_lr=0.05)
    folder = find_checkpoint(str(out))
    assert sorted(read_json(os.path.join(folder, "state.json"))["optimizers"]) == ["AdamW", "Muon"]
    names = saved_state(folder).keys()
    assert "momentum_buffer.model.layers.0.mlp.up_proj.weight" in names and "exp_avg.lm_head.weight" in names
    # by plain AdamW: refused
    with pytest.raises(SystemExit, match="the optimizer's state of model.layers.0"):
        run_train(data, out, resume=True, max_iters=9, optimizer="adamw")


def test_a_source_with_its_cleaner(hacked, corpus, tmp_path):
    text = tmp_path / "text"
    shutil.copytree(f"{corpus}/text", text)
    (text / "train_10M" / "blog.train").write_text("see https://example.org/page for it .\n" * 50)
    copy = hacked("source")
    args = [f"--input_dir={text}", f"--data_dir={copy}/data", f"--vocab_size={VOCAB}"]
    assert "no cleaner" not in start(copy, "prepare.py", args)
    meta = read_json(copy / "data" / "meta.json")
    assert meta["cleaners"]["blog"] == "clean_blog"
    assert meta["words"]["train"]["blog"] == 4 * 50


def test_pairs_with_other_fields(hacked, teachers, tmp_path):
    write_pairs(tmp_path / "ours", "task", [("the dog sees a cat.", "the dog see a cat.")] * 3)
    lines = (tmp_path / "ours" / "task.jsonl").read_text()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "task.jsonl").write_text(
        lines.replace("sentence_good", "grammatical").replace("sentence_bad", "ungrammatical"))
    copy = hacked("fields")
    start(copy, "eval_blimp.py", *(
        [f"--ckpt={teachers[0]}", f"--data={tmp_path}/{name}", f"--out={copy}/blimp.json", "--device=cpu",
         f"--items={copy}/{name}.jsonl"] for name in ("ours", "theirs")))
    assert (copy / "ours.jsonl").read_text() == (copy / "theirs.jsonl").read_text()
