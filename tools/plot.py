"""Pictures of runs, as PNG and SVG (pip install matplotlib).

    python -m tools.plot --curves=out/babyllama,out/llama_58m             # loss against tokens, from their metrics.jsonl
    python -m tools.plot --phenomena=out/babyllama,out/llama_58m          # BLiMP by phenomenon, lines side by side (Baby Llama, figure 2)
    python -m tools.plot --violin=out/a_1+out/a_2+out/a_3,out/b_1+out/b_2 # seeds of one recipe each (BabyLlama-2, figure 1)
    python -m tools.plot --sizes=out/1M,out/3M,out/10M                    # validation loss against words (BabyLlama-2, figure 3)
    python -m tools.plot --scatter=out/study/results.jsonl                # accuracy against loss over a study's runs (BabyLlama-2, figure 2)

Runs are run folders; scores come from the blimp.json that eval_blimp.py left in them.
"""
import importlib.util
import itertools
import json
import os
import sys
from dataclasses import dataclass

import numpy as np

import config
import disk
from compare import check_same_pairs, read_result
from study import result_rows

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]  # told apart by all eyes (Okabe and Ito)


@dataclass
class PlotConfig:
    curves: tuple[str, ...] = ()
    phenomena: tuple[str, ...] = ()
    violin: tuple[str, ...] = ()   # runs of one recipe joined by +
    sizes: tuple[str, ...] = ()
    scatter: tuple[str, ...] = ()  # results files of study.py
    labels: tuple[str, ...] = ()   # in the place of folders' names
    out: str = "plot"              # OUT.png and OUT.svg are written
    width: float = 7.0             # inches
    height: float = 4.2


def main(cfg):
    kinds = {"curves": curves, "phenomena": phenomena, "violin": violins, "sizes": sizes, "scatter": scatter}
    asked = [name for name in kinds if getattr(cfg, name)]
    if len(asked) != 1:
        sys.exit(f"error: name one picture: {', '.join('--' + name for name in kinds)}")
    if not importlib.util.find_spec("matplotlib"):
        sys.exit("error: plot.py needs matplotlib: pip install matplotlib")
    disk.check_writable(f"{cfg.out}.png")
    if not (1 <= cfg.width <= 50 and 1 <= cfg.height <= 50):
        sys.exit(f"error: width={cfg.width} and height={cfg.height} must be between 1 and 50 inches")
    columns = getattr(cfg, asked[0])
    if asked[0] in ("curves", "phenomena") and len(columns) > len(COLORS):
        sys.exit(f"error: {asked[0]}: {len(columns)} runs; more than {len(COLORS)} cannot be told apart")
    if cfg.labels and len(cfg.labels) != len(columns):
        sys.exit(f"error: labels: {len(cfg.labels)} for {len(columns)} runs")
    labels = [label.replace("$", r"\$").lstrip("_") for label in  # $ would begin a formula, _ hides a label
              cfg.labels or map(folder_name, columns)]
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.prop_cycle": plt.cycler(color=COLORS), "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "svg.hashsalt": "nanobabyllama"})
    figure = plt.figure(figsize=(cfg.width, cfg.height), layout="constrained")
    kinds[asked[0]](figure, columns, labels)
    for ending in ("png", "svg"):
        figure.savefig(f"{cfg.out}.{ending}", dpi=160, metadata={"Date": None} if ending == "svg" else None)
        print(f"written to {cfg.out}.{ending}")


def folder_name(column):
    """The first folder's, without its seed if there are several."""
    name = os.path.basename(os.path.normpath(column.split("+")[0]))
    return name.split("@")[0] if "+" in column else name


def curves(figure, runs, labels):
    """Training CE as a faint line, validation as a strong one with points."""
    axes, ensembles = figure.subplots(), set()
    for run, label, color in zip(runs, labels, itertools.cycle(COLORS)):
        rows = records(run)
        train, val = ([(r["tokens"], r[key]) for r in rows if r.get(key) is not None and "tokens" in r] for key in ("ce", "val_ce"))
        axes.plot(*zip(*train), color=color, alpha=0.3, linewidth=1)
        if val:
            axes.plot(*zip(*val), color=color, marker="o", markersize=3, label=label)
        ensembles.update(r["ensemble_val_ce"] for r in rows if "ensemble_val_ce" in r)
    for i, val_ce in enumerate(sorted(ensembles)):
        axes.axhline(val_ce, color="gray", linestyle=":", label="teachers' ensemble" if i == 0 else None)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="tokens seen", ylabel="cross-entropy, nats per token")
    axes.legend(title="strong: validation, faint: training")


def phenomena(figure, runs, labels):
    """Parallel coordinates: an axis a phenomenon (or task, where the data names none), a line a run."""
    results = [read_result(run) for run in runs]
    folders = [name for name in results[0]["folders"] if all(name in r["folders"] for r in results)]
    for folder in folders:
        check_same_pairs(folder, results, runs)
    results = [{name: row for folder in folders for name, row in (r["folders"][folder]["phenomena"] or r["folders"][folder]["tasks"]).items()} for r in results]
    names = list(results[0])
    if not names:
        sys.exit("error: the runs were not scored on the same data folders")
    axes = figure.subplots()
    for result, label in zip(results, labels):
        axes.plot([100 * result[name]["accuracy"] for name in names], marker="o", markersize=4, label=label)
    axes.axhline(50, color="gray", linewidth=1, linestyle=":")
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], rotation=40, ha="right")
    axes.set_ylabel("accuracy, % (dotted: chance)")
    axes.legend()


def violins(figure, columns, labels):
    """A panel for validation loss, test loss and each data folder's accuracy; a violin a recipe, a point a seed."""
    scored = [run for column in columns for run in column.split("+") if os.path.isfile(os.path.join(run, "blimp.json"))]
    results = list(map(read_result, scored))
    for name in results[0]["folders"] if results else ():
        if all(name in result["folders"] for result in results):
            check_same_pairs(name, results, scored)
    values = {}  # panel -> per column its runs' values
    for column in columns:
        for panel, found in panels(column.split("+")).items():
            values.setdefault(panel, []).append(found)
    values = {panel: v for panel, v in values.items() if len(v) == len(columns)}
    for axes, (panel, per_column) in zip(np.atleast_1d(figure.subplots(1, len(values))), values.items()):
        for i, (found, color) in enumerate(zip(per_column, itertools.cycle(COLORS))):
            if len(found) > 1 and np.ptp(found) > 0:
                for body in axes.violinplot([found], [i], showextrema=False)["bodies"]:
                    body.set(facecolor=color, alpha=0.3)
                axes.errorbar(i, np.mean(found), np.std(found, ddof=1), color=color, capsize=6, linewidth=1.5)
            axes.plot([i] * len(found), found, "o", color=color, markersize=4)
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.set_title(panel, fontsize=10)
    figure.supxlabel("points: seeds; bars: mean ± standard deviation", fontsize=9)


def panels(runs):
    """Title of a panel -> the runs' values."""
    values = {"validation loss, nats per token": [best_val_ce(run) for run in runs]}
    for run in runs:
        if os.path.isfile(os.path.join(run, "blimp.json")):
            result = read_result(run)
            if "test_ce" in result:
                values.setdefault("test loss, nats per token", []).append(result["test_ce"])
            for folder, row in result["folders"].items():
                values.setdefault(f"{folder}, %", []).append(100 * row["accuracy"])
    for panel, found in values.items():
        if len(found) < len(runs):
            print(f"notice: no panel for {panel}: {len(found)} of {len(runs)} runs have it")
    return {panel: found for panel, found in values.items() if len(found) == len(runs)}


def sizes(figure, runs, labels):
    """Best validation loss against words of training text, and with three sizes or more a fitted a + b / words^c;
    plain and distilled models apart."""
    described = [disk.read_checkpoint_config(disk.find_checkpoint(run)) for run in runs]
    measured = [(d["tokenizer_sha256"], *(d.get("train_config", {}).get(key) for key in ("seq_len", "eval_chunks"))) for d in described]
    for run, d, m in zip(runs, described, measured):
        if not d.get("words") or d.get("val_ce") is None:
            sys.exit(f"error: {run} does not say how many words it was trained on, or has no validation loss")
        if m != measured[0]:
            sys.exit(f"error: {run} was validated with another tokenizer, seq_len or eval_chunks than {runs[0]}")
    axes = figure.subplots()
    kind = [(d["parameters"], bool(d.get("teachers"))) for d in described]
    for (n, taught), color in zip(sorted(set(kind)), itertools.cycle(COLORS)):
        words, loss = np.array(sorted((d["words"], d["val_ce"]) for d, k in zip(described, kind) if k == (n, taught))).T
        axes.plot(words, loss, "o", color=color, label=f"{n / 1e6:.3g}M parameters" + ", distilled" * taught)
        if len(set(words)) > 2:
            a, b, c = power_law(words, loss)
            if b > 0 and 0.02 < c < 2:
                x = np.geomspace(words[0], words[-1])
                axes.plot(x, a + b * x ** -c, color=color, linewidth=1, label=f"{a:.2f} + {b:.2g} words$^{{-{c:.2f}}}$")
            else:
                print(f"notice: no curve for {n / 1e6:.3g}M parameters{', distilled' * taught}: its points lie on no a + b / words^c")
    axes.set(xscale="log", xlabel="words of training text", ylabel="validation loss, nats per token")
    axes.legend()


def scatter(figure, files, labels):
    """A panel a data folder: accuracy against loss on the test split, or else validation, with a fitted line and R^2."""
    rows = [row for file in files for row in result_rows(file) if "val_ce" in row]
    names = [name for name in (rows[0]["accuracy"] if rows else ()) if all(name in row["accuracy"] for row in rows)]
    if len(rows) < 3 or not names or len({row["val_ce"] for row in rows}) < 2 or any(row["pairs_sha256"] != rows[0]["pairs_sha256"] for row in rows):
        sys.exit(f"error: {', '.join(files)}: three finished runs or more, scored on the same pairs, are needed")
    key = "test_ce" if all(row["test_ce"] is not None for row in rows) else "val_ce"
    loss = np.array([row[key] for row in rows])
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names):
        accuracy = np.array([100 * row["accuracy"][name] for row in rows])
        looks = itertools.cycle([(color, marker) for marker in "os^D" for color in COLORS])
        for recipe, (color, marker) in zip(dict.fromkeys(row["recipe"] for row in rows), looks):
            own = np.array([row["recipe"] == recipe for row in rows])
            axes.plot(loss[own], accuracy[own], marker, color=color, markersize=4, label=recipe)
        line = np.poly1d(np.polyfit(loss, accuracy, 1))
        ends = np.array([loss.min(), loss.max()])
        axes.plot(ends, line(ends), color="gray", linewidth=1)
        axes.set_title(f"{name}: R² = {np.corrcoef(loss, accuracy)[0, 1] ** 2:.2f}, {len(rows)} runs", fontsize=10)
        axes.set(xlabel=f"{'test' if key == 'test_ce' else 'validation'} loss, nats per token", ylabel="accuracy, %")
    axes.legend(fontsize=8)


def power_law(x, y):
    """a, b, c of the least-squares fit y = a + b x^-c, c between 0.02 and 2 by search: for each c it is a line."""
    def fit(c):
        b, a = np.polyfit(x ** -c, y, 1)
        return ((a + b * x ** -c - y) ** 2).sum(), a, b, c
    return min(map(fit, np.geomspace(0.02, 2, 400)))[1:]


def best_val_ce(run):
    if os.path.isfile(os.path.join(run, "val.json")):  # an ensemble that study.py scored
        return disk.read_json(os.path.join(run, "val.json"), ["val_ce"])["val_ce"]
    value = disk.read_checkpoint_config(disk.find_checkpoint(run)).get("val_ce")
    if value is None:
        sys.exit(f"error: {run} has no validation loss")
    return value


def records(run):
    """The lines of a run's metrics.jsonl."""
    path = os.path.join(run, "metrics.jsonl")
    if not os.path.isfile(path):
        sys.exit(f"error: no {path}; name a run folder")
    with open(path, errors="replace") as f:
        try:
            rows = [dict(json.loads(line)) for line in f if line.endswith("\n")]  # the last may be half written
        except (ValueError, TypeError) as e:
            sys.exit(f"error: {path} is damaged: {e}")
    if not any("ce" in r for r in rows):
        sys.exit(f"error: {path} has no training loss yet")
    return rows


if __name__ == "__main__":
    config.run(main, PlotConfig)
