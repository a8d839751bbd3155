"""Scored runs side by side.

    python -m tools.compare out/babyllama out/llama_58m           # both scored by eval_blimp.py before
    python -m tools.compare out/a@1+out/a@2 out/b@1+out/b@2       # two recipes of two seeds each

A column is a run (or a JSON file that eval_blimp.py wrote), or several seeds of one recipe joined by `+`,
shown as mean ± standard deviation over seeds. The first column is compared with each other one over the
same pairs: a 95% interval of the difference, from a paired bootstrap over pairs (within each task, as the
mean is over tasks), and Wilcoxon's signed-rank test over tasks (as in Teaching Tiny Minds). Both speak of
pairs and tasks; how a recipe varies from seed to seed, only several seeds show.
"""
import os
import re
import sys

import numpy as np

from lib.configurator import launch
from lib.files import read_json

RESAMPLES = 10_000


def main(columns):
    """columns: strings "A" or "A+B+...", each part a run folder or a result file."""
    if "--help" in columns or "-h" in columns:
        print(__doc__)
        return
    if len(columns) < 2 or any(column.startswith("-") for column in columns):
        sys.exit("error: name two or more scored runs, without flags: python -m tools.compare out/babyllama "
                 "out/llama_58m (--help tells more)")
    paths = [column.split("+") for column in columns]
    results = [[read_result(path) for path in column] for column in paths]
    every = sum(results, [])
    folders = [name for name in every[0]["folders"] if all(name in result["folders"] for result in every)]
    if not folders:
        sys.exit("error: the runs to compare were not scored on the same data folders")
    for name in folders:
        check_same_pairs(name, every, sum(paths, []))
        print_folder(name, list(map(label, paths)),
                     [[result["folders"][name] for result in column] for column in results])


def label(paths):
    name = os.path.basename(os.path.normpath(paths[0]))
    return f"{name} and {len(paths) - 1} more" if len(paths) > 1 else name


def read_result(path):
    file = os.path.join(path, "blimp.json") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        sys.exit(f"error: no scores at {file}; make them with eval_blimp.py --ckpt={path} --data=...")
    result = read_json(file, ["folders"])
    try:
        for folder in result["folders"].values():
            for row in (folder, *folder["phenomena"].values(), *folder["tasks"].values()):
                f"{row['accuracy']:.2f}"  # a number?
            good = all(re.fullmatch("[01]+", right) for right in answers(folder))
            if not (good and folder["tasks"] and folder["sha256"]):
                raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError):
        sys.exit(f"error: {file} is damaged, or of older code; score {path} again")
    return result


def answers(folder):
    """Per task a digit per pair: 1 = right."""
    return [row["right"] for row in folder["tasks"].values()]


def check_same_pairs(name, results, paths):
    """Exit if one of the runs was scored on other pairs of data folder `name` than the first."""
    def pairs(result):
        folder = result["folders"][name]
        return folder["sha256"], [*folder["tasks"], *folder["phenomena"]], list(map(len, answers(folder)))
    for result, path in zip(results, paths):
        if pairs(result) != pairs(results[0]):
            sys.exit(f"error: {path} was scored on other pairs of {name} than {paths[0]}")


def print_folder(name, labels, columns):
    """columns: per label its runs' scores on folder `name`."""
    example = columns[0][0]
    kind = "phenomena" if example["phenomena"] else "tasks"

    def print_row(title, accuracy_of):
        cells = [spread([100 * accuracy_of(scores) for scores in column], 2) for column in columns]
        print(f"| {title} | " + " | ".join(cells) + " |")
    print(f"\n| {name}, % | " + " | ".join(labels) + " |\n|---|" + "---:|" * len(labels))
    for term in example[kind]:
        print_row(term, lambda scores: scores[kind][term]["accuracy"])
    print_row(f"**mean of {len(example['tasks'])} tasks**", lambda scores: scores["accuracy"])
    print()
    first = right(columns[0])
    for title, column in zip(labels[1:], columns[1:]):
        other = right(column)
        differences = [a.mean() - b.mean() for a, b in zip(first, other)]
        low, high = 100 * paired_bootstrap(first, other)
        print(f"{labels[0]} - {title}: {100 * np.mean(differences):+.2f} points, 95% interval {low:+.2f} to "
              f"{high:+.2f} over pairs; Wilcoxon over {len(first)} tasks p = {wilcoxon(differences):.2g}")


def spread(values, digits):
    """Mean, and standard deviation where there are several."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def right(column):
    """Per task an array (runs, pairs) of 0 and 1."""
    return [np.array([list(map(int, text)) for text in texts]) for texts in zip(*map(answers, column))]


def paired_bootstrap(a, b):
    """2.5% and 97.5% quantiles of the mean over tasks of accuracy a minus b when each task's pairs are drawn
    anew, with replacement, the same ones for both. Several runs count as one that is right in part."""
    rng = np.random.default_rng(0)
    mean = np.zeros(RESAMPLES)
    for task_a, task_b in zip(a, b):
        values, counts = np.unique(np.round(task_a.mean(0) - task_b.mean(0), 12), return_counts=True)
        n = counts.sum()  # drawing n pairs is drawing how often each difference comes
        mean += rng.multinomial(n, counts / n, RESAMPLES) @ values / n / len(a)
    return np.quantile(mean, [0.025, 0.975])


def wilcoxon(differences):
    """Two-sided p of the signed-rank test: the share of all 2^n choices of signs with a rank sum as far from
    the middle. Exact, ties included (they share the mean of their ranks); differences of 0 are left out."""
    d = np.round(np.asarray(differences, float), 12)
    d = d[d != 0]
    size = np.abs(d)
    ranks = [2 * (size < x).sum() + (size == x).sum() + 1 for x in size]  # twice the mean: whole numbers
    share = np.zeros(sum(ranks) + 1)  # of the choices of signs, by the sum of positive ranks
    share[0] = 1
    for r in ranks:
        share = (share + np.concatenate([np.zeros(r), share[:-r]])) / 2
    positive = sum(r for r, x in zip(ranks, d) if x > 0)
    return min(1.0, 2 * min(share[:positive + 1].sum(), share[positive:].sum()))


if __name__ == "__main__":
    launch(main)
