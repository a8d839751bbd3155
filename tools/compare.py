"""Scored runs side by side: what `eval_blimp.py --compare=A,B+C+D` prints.

A column is a run (or a JSON file that eval_blimp.py wrote), or several seeds of one recipe joined by `+`,
shown as mean ± standard deviation over seeds. The first column is compared with each other one over the
same pairs: a 95% interval of the difference, from a paired bootstrap over pairs (within each task, as the
mean is over tasks), and Wilcoxon's signed-rank test over tasks (as in Teaching Tiny Minds). Both speak of
pairs and tasks; how a recipe varies from seed to seed, only several seeds show.
"""
import os
import sys

import numpy as np

import disk

RESAMPLES = 10_000


def main(columns):
    """columns: strings "A" or "A+B+...", each part a run folder or a result file."""
    if len(columns) < 2:
        sys.exit("error: --compare wants two or more: --compare=out/babyllama,out/llama_58m")
    paths = [column.split("+") for column in columns]
    runs = [[read_result(path) for path in column] for column in paths]
    labels = [os.path.basename(os.path.normpath(column[0])) + (f" and {len(column) - 1} more" if column[1:] else "") for column in paths]
    every = [run["folders"] for column in runs for run in column]
    folders = [name for name in every[0] if all(name in run for run in every)]
    if not folders:
        sys.exit("error: the runs to compare were not scored on the same data folders")
    for name in folders:
        check_same_pairs(name, [run for column in runs for run in column], sum(paths, []))
        print_folder(name, labels, [[run["folders"][name] for run in column] for column in runs])


def read_result(path):
    file = os.path.join(path, "blimp.json") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        sys.exit(f"error: no scores at {file}; make them with eval_blimp.py --ckpt={path} --data=...")
    result = disk.read_json(file, ["folders"])
    try:
        for folder in result["folders"].values():
            folder["sha256"], folder["phenomena"], [(row["accuracy"], row["right"]) for row in folder["tasks"].values()]
    except (KeyError, TypeError, AttributeError):
        sys.exit(f"error: {file} is damaged, or of older code; score {path} again")
    return result


def check_same_pairs(name, runs, paths):
    """Exit if one of the runs was scored on other pairs of data folder `name` than the first."""
    for run, path in zip(runs, paths):
        if run["folders"][name]["sha256"] != runs[0]["folders"][name]["sha256"]:
            sys.exit(f"error: {path} was scored on other pairs of {name} than {paths[0]}")


def print_folder(name, labels, columns):
    """columns: per label its runs' results on folder `name`."""
    kind = "phenomena" if columns[0][0]["phenomena"] else "tasks"
    print(f"\n| {name}, % | " + " | ".join(labels) + " |\n|---|" + "---:|" * len(labels))
    for row in columns[0][0][kind]:
        print(f"| {row} | " + " | ".join(spread([100 * run[kind][row]["accuracy"] for run in column], 2) for column in columns) + " |")
    print(f"| **mean of {len(columns[0][0]['tasks'])} tasks** | " + " | ".join(spread([100 * run["accuracy"] for run in column], 2) for column in columns) + " |\n")
    first = right(columns[0])
    for label, column in zip(labels[1:], columns[1:]):
        low, high, p = *paired_bootstrap(first, right(column)), wilcoxon([a.mean() - b.mean() for a, b in zip(first, right(column))])
        difference = np.mean([a.mean() - b.mean() for a, b in zip(first, right(column))])
        print(f"{labels[0]} - {label}: {100 * difference:+.2f} points, 95% interval {100 * low:+.2f} to {100 * high:+.2f} over pairs; "
              f"Wilcoxon over {len(first)} tasks p = {p:.2g}")


def spread(values, digits):
    """Mean, and standard deviation where there are several."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def right(column):
    """Per task an array (runs, pairs) of 0 and 1."""
    return [np.array([list(map(int, run["tasks"][task]["right"])) for run in column]) for task in column[0]["tasks"]]


def paired_bootstrap(a, b):
    """2.5% and 97.5% quantiles of the mean over tasks of accuracy a minus b when each task's pairs are drawn anew,
    with replacement, the same ones for both. Several runs count as one that is right in part."""
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
    ranks = [2 * (size < x).sum() + (size == x).sum() + 1 for x in size]  # twice the mean rank: a whole number
    share = np.zeros(sum(ranks) + 1)  # of the choices of signs, by the sum of positive ranks
    share[0] = 1
    for r in ranks:
        share = (share + np.concatenate([np.zeros(r), share[:-r]])) / 2
    positive = sum(r for r, x in zip(ranks, d) if x > 0)
    return min(1.0, 2 * min(share[:positive + 1].sum(), share[positive:].sum()))
