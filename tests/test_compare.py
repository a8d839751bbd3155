"""Comparison of scored runs: statistics against brute force, and what the table says."""
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

import eval_blimp
from eval_blimp import EvalConfig
from helpers import ROOT, write_pairs
from lib.files import read_json
from tools import compare


@pytest.mark.parametrize("differences", [
    [0.1, -0.2, 0.3, 0.05], [0.1, 0.1, -0.1, 0.2, 0.0, 0.3, -0.2], [1, 2, 3, 4, 5, 6, 7, 8, 9, -10],
    [0.0, 0.0], [0.5]])
def test_wilcoxon_is_the_share_of_sign_choices_as_extreme(differences):
    d = np.array([x for x in differences if x])
    in_order = sorted(abs(d))
    ranks = np.array([np.mean([i + 1 for i, y in enumerate(in_order) if y == abs(x)]) for x in d])
    choices = itertools.product((1, -1), repeat=len(d))
    sums = np.array([ranks[np.array(signs) > 0].sum() for signs in choices]) if len(d) else np.zeros(1)
    seen = ranks[d > 0].sum()
    expected = min(1, 2 * min((sums <= seen).mean(), (sums >= seen).mean()))
    assert compare.wilcoxon(differences) == pytest.approx(expected)


def test_bootstrap_is_that_of_drawing_pairs():
    rng = np.random.default_rng(3)
    a = [rng.integers(0, 2, (2, n)) for n in (300, 50)]
    b = [(rng.random((1, n)) < 0.3).astype(int) for n in (300, 50)]
    means = []
    for _ in range(4000):
        draws = [rng.integers(0, x.shape[1], x.shape[1]) for x in a]
        means.append(np.mean([x[:, i].mean() - y[:, i].mean() for x, y, i in zip(a, b, draws)]))
    assert compare.paired_bootstrap(a, b) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    assert compare.paired_bootstrap(a, a) == pytest.approx([0, 0])  # the same answers: no uncertainty


def test_the_table(corpus, teachers, capsys):
    for path in teachers:
        eval_blimp.main(EvalConfig(ckpt=(path,), data=(f"{corpus}/pairs",), device="cpu"))
    capsys.readouterr()
    compare.main([teachers[0], f"{teachers[1]}+{teachers[2]}"])
    out = capsys.readouterr().out
    scores = [read_json(os.path.join(path, "blimp.json"))["folders"]["pairs"] for path in teachers]
    one, *two = [100 * row["accuracy"] for row in scores]
    means = f"| {one:.2f} | {np.mean(two):.2f} ± {np.std(two, ddof=1):.2f} |"
    assert means in out.split("mean of 10 tasks")[1]
    assert f"gpt2 - llama and 1 more: {one - np.mean(two):+.2f} points" in out
    for task, row in scores[0]["tasks"].items():
        assert f"| {task} | {100 * row['accuracy']:.2f} |" in out and len(row["right"]) == row["n"]


def test_what_cannot_be_compared(teachers, tmp_path):
    write_pairs(tmp_path / "a/pairs", "t", [("the dog runs.", "the dog run.")])
    write_pairs(tmp_path / "b/pairs", "t", [("a dog runs.", "a dog run.")])
    write_pairs(tmp_path / "c/other", "t", [("a dog runs.", "a dog run.")])
    folders = [str(tmp_path / name) for name in ("a/pairs", "b/pairs", "c/other")]
    a, b, c = [folder + ".json" for folder in folders]
    for folder in folders:
        eval_blimp.main(EvalConfig(ckpt=(teachers[0],), data=(folder,), out=folder + ".json", device="cpu"))
    for columns, message in (([], "name scored runs"), ([a, b, "--out=b"], "without flags"),
                             ([str(tmp_path)], "no scores at"), (["none"], "no scores at none"),
                             ([a, b], "other pairs"), ([a, c], "same data folders"),
                             ([a, "none"], "no scores at none")):
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
            compare.main(columns)


def test_it_is_a_command():
    def command(*args):
        return subprocess.run([sys.executable, "-m", "tools.compare", *args], cwd=ROOT, capture_output=True,
                              text=True)
    asked, alone = command("--help"), command("out/a")
    assert asked.returncode == 0 and asked.stdout == compare.__doc__ + "\n"
    assert alone.returncode == 1 and alone.stderr.startswith("error: no scores at out/a")
    assert alone.stderr.count("\n") == 1
