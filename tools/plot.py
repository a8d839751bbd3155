"""Pictures of runs, as PNG and SVG (pip install matplotlib).

    python -m tools.plot --curves=out/babyllama,out/llama_58m      # loss and gradients: Nair et al., figure 2
    python -m tools.plot --phenomena=out/babyllama,out/llama_58m   # BLiMP by phenomenon: Baby Llama, figure 2
    python -m tools.plot --phenomena=out/a,out/b --widest=15       # by paradigm: Nair et al., figure 5
    python -m tools.plot --tasks=out/glue_a,out/glue_b             # GLUE, MSGS: Baby Llama, figures 3 and 4
    python -m tools.plot --violin=out/a_1+out/a_2,out/b_1+out/b_2  # seeds of a recipe: BabyLlama-2, figure 1
    python -m tools.plot --sizes=out/1M,out/3M,out/10M             # loss against words: its figure 3
    python -m tools.plot --scatter=out/study/results.jsonl         # accuracy against loss: its figure 2

Runs are run folders; scores come from the blimp.json that eval_blimp.py left in them, and from the
results.json of tools.finetune: its folders are named with --tasks, or joined to a violin's runs by + too.
"""
import importlib.util
import itertools
import math
import os
import sys
import textwrap
from dataclasses import dataclass
from functools import partial

import numpy as np

from lib.checkpoints import find_checkpoint, read_checkpoint_config
from lib.configurator import launch, need
from lib.files import check_writable, read_json
from lib.lineage import records
from tools import compare
from tools.compare import check_same_pairs, is_finetuned, read_glue, read_results, shared_tasks
from tools.study import finished_rows, same_pairs

# told apart by all eyes (Okabe and Ito, and a grey)
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999"]
# of lines: a colour comes again with another stroke and marker
LOOKS = [dict(color=color, linestyle=stroke, marker="os^DvPX*"[(i + j) % 8])
         for i, stroke in enumerate(("-", "--", ":", "-.")) for j, color in enumerate(COLORS)]


@dataclass
class PlotConfig:
    curves: tuple[str, ...] = ()
    phenomena: tuple[str, ...] = ()
    widest: int = 0                # of --phenomena: in their place so many paradigms, where runs differ most
    tasks: tuple[str, ...] = ()    # out_dirs of tools.finetune
    accuracy: bool = False         # of --tasks: in the place of F1 and Matthews' correlation (Nair et al.)
    violin: tuple[str, ...] = ()   # runs of one recipe joined by +
    sizes: tuple[str, ...] = ()
    scatter: tuple[str, ...] = ()  # results files of study.py, or of sweep.py's scored trials
    labels: tuple[str, ...] = ()   # in the place of folders' names
    out: str = ""                  # OUT.png and OUT.svg are written; '' = the picture's name
    width: float = 7.0             # inches
    height: float = 4.2


def main(cfg):
    pictures = dict(curves=curves, phenomena=partial(phenomena, n_widest=cfg.widest),
                    tasks=partial(tasks, accuracy=cfg.accuracy), violin=violins, sizes=sizes, scatter=scatter)
    asked = [name for name in pictures if getattr(cfg, name)]
    if len(asked) != 1:
        sys.exit(f"error: name one picture: {', '.join('--' + name for name in pictures)}")
    picture, columns = asked[0], getattr(cfg, asked[0])
    cfg.out = cfg.out or picture
    check_plot_config(cfg, picture, columns)
    labels = [label.replace("$", r"\$").lstrip("_")  # $ would begin a formula, _ hides a label
              for label in cfg.labels or map(folder_name, columns)]
    figure = new_figure(cfg)
    pictures[picture](figure, columns, labels)
    for ending, metadata in (("png", None), ("svg", {"Date": None})):
        figure.savefig(f"{cfg.out}.{ending}", dpi=160, metadata=metadata)
    print(f"written to {cfg.out}.png\nwritten to {cfg.out}.svg")


def check_plot_config(cfg, picture, columns):
    if not importlib.util.find_spec("matplotlib"):
        sys.exit("error: tools.plot needs matplotlib: pip install matplotlib")
    for ending in ("png", "svg"):
        check_writable(f"{cfg.out}.{ending}")
    need(cfg,
         widest=(not cfg.widest or picture == "phenomena", "0 but with --phenomena"),
         accuracy=(not cfg.accuracy or picture == "tasks", "False but with --tasks"),
         labels=(not cfg.labels or picture not in ("sizes", "scatter"), "() with --sizes and --scatter"),
         width=(1 <= cfg.width <= 50, "between 1 and 50 inches"),
         height=(1 <= cfg.height <= 50, "between 1 and 50 inches"))
    if picture in ("curves", "phenomena", "tasks") and len(columns) > len(LOOKS):
        sys.exit(f"error: {picture}: {len(columns)} runs; more than {len(LOOKS)} cannot be told apart")
    if cfg.labels and len(cfg.labels) != len(columns):
        sys.exit(f"error: labels: {len(cfg.labels)} for {len(columns)} runs")


def new_figure(cfg):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "axes.prop_cycle": plt.cycler(color=COLORS), "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "svg.hashsalt": "nanobabyllama"})
    return plt.figure(figsize=(cfg.width, cfg.height), layout="constrained")


def folder_name(column):
    """The first folder's, without its seed if there are several."""
    name = os.path.basename(os.path.normpath(column.split("+")[0]))
    return name.split("@")[0] if "+" in column else name


def curves(figure, runs, labels):
    """Validation CE as a thick line with points, the mean of training CE since the validation before as a
    faint one; gradient norms below."""
    from matplotlib.ticker import EngFormatter
    (axes, norms), ensembles, seen = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1)), set(), []
    for run, label, look in zip(runs, labels, LOOKS):
        rows = records(run)
        train, val, norm = ([(row["tokens"], row[key]) for row in rows
                             if row.get(key) is not None and "tokens" in row]
                            for key in ("ce", "val_ce", "grad_norm"))
        if val:
            ends = [0, *(x for x, _ in val)]
            train = [(high, np.mean([ce for x, ce in train if low < x <= high]))
                     for low, high in zip(ends, ends[1:])]
            axes.plot(*zip(*val), **look, markersize=3, label=label)
        axes.plot(*zip(*train), **look | dict(marker=""), alpha=0.4, linewidth=1)
        norms.plot(*zip(*norm), **look | dict(marker=""), linewidth=0.7)
        ensembles.update(row["ensemble_val_ce"] for row in rows if "ensemble_val_ce" in row)
        seen += [ce for _, ce in val] or [np.quantile([ce for _, ce in train], 0.95)]
    for i, val_ce in enumerate(sorted(ensembles)):
        axes.axhline(val_ce, color="gray", linestyle=":", label="teachers' ensemble" if i == 0 else None)
    norms.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1M
    axes.set_ylabel("cross-entropy, nats per token")
    axes.set_ylim(top=1.01 * max(seen))  # the very first steps would leave no room for the rest
    norms.set(xlabel="tokens seen", ylabel="gradient norm", yscale="log")  # of a summed KL 100 times as large
    legend_beside(figure, axes, title="thick: validation,\nfaint: training")


def phenomena(figure, runs, labels, n_widest=0):
    """Parallel coordinates: an axis a phenomenon (or task, where the data names none), a line a run."""
    results = list(map(scores_of, runs))
    folders = shared_folders(results, runs)
    scored = [accuracies(result, folders, by_task=n_widest > 0) for result in results]
    names = compare.widest(scored, n_widest) if n_widest else list(scored[0])
    if not names:
        sys.exit("error: the runs were not scored on the same data folders")
    axes = figure.subplots()
    parallel(axes, scored, names, labels)
    axes.axhline(50, color="gray", linewidth=1, linestyle=":")
    axes.set_ylabel("accuracy, % (dotted: chance)")
    legend_beside(figure, axes)


def parallel(axes, scored, names, labels):
    """An axis a name, a line a dict of values by name."""
    for values, label, look in zip(scored, labels, LOOKS):
        axes.plot([values[name] for name in names], **look, markersize=4, label=label)
    axes.set_xticks(range(len(names)), [textwrap.fill(name, 26) for name in names], rotation=60, ha="right",
                    rotation_mode="anchor", fontsize=8)


def legend_beside(figure, axes, **look):
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", **look)


def tasks(figure, folders, labels, accuracy=False):
    """Parallel coordinates of fine-tuned models, means over seeds: a panel for GLUE and one for MSGS."""
    for folder in folders:
        if not is_finetuned(folder):
            sys.exit(f"error: no {folder}/results.json; make it with tools.finetune --out_dir={folder}")
    scored = read_glue([[folder] for folder in folders], accuracy)
    panels = shared_tasks(scored)
    widths = [2 + len(names) for names in panels.values()]
    for axes, ((benchmark, rules), names) in zip(
            np.atleast_1d(figure.subplots(1, len(panels), width_ratios=widths)), panels.items()):
        title = compare.short if accuracy else compare.task_title
        means = [{title(task).removesuffix(", accuracy"): np.mean(result[rules][task]) for task in names}
                 for result in scored]
        parallel(axes, means, list(means[0]), labels)
        axes.set_title(f"{benchmark}, rules of {rules}", fontsize=10)
    figure.axes[0].set_ylabel("accuracy, %" if accuracy else "accuracy, or as named, %")
    legend_beside(figure, axes)


def accuracies(result, folders, by_task):
    rows = {}
    for scores in map(result["folders"].get, folders):
        found = scores["tasks"] if by_task or not scores["phenomena"] else scores["phenomena"]
        if both := rows.keys() & found.keys():
            sys.exit(f"error: phenomena: {', '.join(folders)} have tasks of the same names ({min(both)}); "
                     "leave one of them out of the result files")
        rows.update(found)
    return {name.replace("_", " "): 100 * row["accuracy"] for name, row in rows.items()}


def scores_of(run):
    """What blimp.json says: by the rules of 2024."""
    results = read_results(run)
    if "2024" not in results:
        sys.exit(f"error: {run} has no blimp.json; make it with eval_blimp.py --ckpt={run} --data=...")
    return results["2024"]


def shared_folders(results, runs):
    """The data folders that all the runs were scored on: exits if not on the same pairs."""
    folders = [name for name in (results[0]["folders"] if results else ())
               if all(name in result["folders"] for result in results)]
    for name in folders:
        check_same_pairs(name, results, runs)
    return folders


def violins(figure, columns, labels):
    """A panel for validation loss, test loss, a folder's accuracy, GLUE's mean: a violin a recipe, a point a
    seed."""
    columns = [column.split("+") for column in columns]
    runs = [[path for path in column if not is_finetuned(path)] for column in columns]
    scored = [run for run in sum(runs, []) if os.path.isfile(os.path.join(run, "blimp.json"))]
    results = list(map(scores_of, scored))
    shared_folders(results, scored)
    measured = [result["test_on"] for result in results if "test_on" in result]
    if any(each != measured[0] for each in measured):
        sys.exit("error: violin: the test losses are of other data, seq_len or eval_chunks than each other")
    trained = [run for run in sum(runs, []) if not os.path.isfile(os.path.join(run, "val.json"))]
    check_same_chunks(trained, [read_checkpoint_config(find_checkpoint(run)) for run in trained])
    per_column = [panels(*each) for each in zip(runs, glue_panels(columns))]
    titles = [title for title in per_column[0] if all(values.get(title) for values in per_column)]
    if not titles:
        sys.exit("error: violin: the columns have no loss or score in common")
    for axes, title in zip(np.atleast_1d(figure.subplots(1, len(titles))), titles):
        for i, (values, color) in enumerate(zip(per_column, itertools.cycle(COLORS))):
            violin(axes, i, values[title], color)
        axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.set_title(textwrap.fill(title, 24), fontsize=10)
    figure.supxlabel("points: seeds; bars: mean ± standard deviation", fontsize=9)


def glue_panels(columns):
    """Per column the title of a panel -> its fine-tuned models' means over the tasks that all have."""
    read_glue(columns)  # exits if a column's results are not of its runs
    folders = [path for path in sum(columns, []) if is_finetuned(path)]
    results = dict(zip(folders, read_glue([[folder] for folder in folders])))
    shared = shared_tasks(list(results.values())) if folders else {}

    def mean(folder, rules, tasks):
        return np.mean([np.mean(results[folder][rules][task]) for task in tasks])
    return [{f"GLUE {rules}, {len(names)} tasks, %": [mean(path, rules, names) for path in column
                                                      if is_finetuned(path)]
             for (benchmark, rules), names in shared.items() if benchmark == "GLUE"} for column in columns]


def violin(axes, x, values, color):
    if len(values) > 1 and np.ptp(values) > 0:
        if len(values) >= 5:  # of fewer points no density is known
            for body in axes.violinplot([values], [x], showextrema=False)["bodies"]:
                body.set(facecolor=color, alpha=0.3)
        axes.errorbar(x, np.mean(values), np.std(values, ddof=1), color=color, capsize=6, linewidth=1.5)
    axes.plot([x] * len(values), values, "o", color=color, markersize=4)


def panels(runs, glue):
    """Title of a panel -> the runs' values."""
    values = {"validation loss, nats per token": [best_val_ce(run) for run in runs]}
    for run in runs:
        if os.path.isfile(os.path.join(run, "blimp.json")):
            result = scores_of(run)
            if "test_ce" in result:
                values.setdefault("test loss, nats per token", []).append(result["test_ce"])
            for folder, row in result["folders"].items():
                values.setdefault(f"{folder}, %", []).append(100 * row["accuracy"])
    values.update(glue)
    for title, found in values.items():
        if len(found) < len(runs):
            print(f"notice: no panel for {title}: {len(found)} of {len(runs)} runs have it")
    return {title: found for title, found in values.items() if len(found) >= len(runs)}


def best_val_ce(run):
    if os.path.isfile(os.path.join(run, "val.json")):  # an ensemble that study.py scored
        return read_json(os.path.join(run, "val.json"), ["val_ce"])["val_ce"]
    value = read_checkpoint_config(find_checkpoint(run)).get("val_ce")
    if value is None:
        sys.exit(f"error: {run} has no validation loss")
    return value


def sizes(figure, runs, labels):
    """Best validation loss against words of training text, and with three sizes or more a fitted
    a + b / words^c; plain and distilled models apart."""
    groups = {}
    for run, described in zip(runs, comparable(runs)):
        kind = described["parameters"], bool(described.get("teachers"))
        groups.setdefault(kind, []).append((described["words"], described["val_ce"]))
    axes = figure.subplots()
    for ((parameters, distilled), group), color in zip(sorted(groups.items()), itertools.cycle(COLORS)):
        words, loss = np.array(sorted(group)).T
        name = f"{parameters / 1e6:.3g}M parameters" + ", distilled" * distilled
        axes.plot(words, loss, "o", color=color, label=name)
        if len(set(words)) < 3:
            continue
        a, b, c = power_law(words, loss)
        if b > 0 and 0.02 < c < 2:
            x, curve = np.geomspace(words[0], words[-1]), f"{a:.2f} + {b:.2g} words$^{{-{c:.2f}}}$"
            axes.plot(x, a + b * x ** -c, color=color, linewidth=1, label=curve)
        else:
            print(f"notice: no curve for {name}: its points lie on no a + b / words^c")
    axes.set(xscale="log", xlabel="words of training text", ylabel="validation loss, nats per token")
    axes.legend()


def comparable(runs):
    """The runs' config.json: they must have been validated on the same chunks."""
    described = [read_checkpoint_config(find_checkpoint(run)) for run in runs]
    for run, config in zip(runs, described):
        if not config.get("words") or config.get("val_ce") is None:
            sys.exit(f"error: {run} does not say how many words it was trained on, "
                     "or has no validation loss")
    check_same_chunks(runs, described)
    return described


def check_same_chunks(runs, described):
    """Exit if the validation losses of some, with these config.json, are of other chunks."""
    for run, config in zip(runs, described):
        if validated_on(config) != validated_on(described[0]):
            sys.exit(f"error: {run} was validated with another text, tokenizer, bos, seq_len or eval_chunks "
                     f"than {runs[0]}")


def validated_on(config):
    settings = config.get("train_config", {})
    return (config.get("val_sha256"), config["tokenizer_sha256"], config.get("bos"),
            *map(settings.get, ("seq_len", "eval_chunks")))


def power_law(x, y):
    """a, b, c of the least-squares fit y = a + b x^-c, 0.02 <= c <= 2 by search: for each c it is a line."""
    def fit(c):
        b, a = np.polyfit(x ** -c, y, 1)
        return ((a + b * x ** -c - y) ** 2).sum(), a, b, c
    return min(map(fit, np.geomspace(0.02, 2, 400)))[1:]


def scatter(figure, files, labels):
    """Against validation loss a panel for the loss on the test split, if all runs have it, and one for a data
    folder's accuracy; each with a fitted line and R^2."""
    rows = [row for file in files for row in finished_rows(file)]
    folders = same_pairs(rows)
    tested = all(row["test_ce"] is not None for row in rows)
    different = len({row["val_ce"] for row in rows}) > 1
    if len(rows) < 3 or not (folders or tested) or not different:
        sys.exit(f"error: {', '.join(files)}: three finished runs or more, scored on the same pairs or "
                 "the test split, are needed")
    measured = {"test loss, nats per token": [row["test_ce"] for row in rows]} if tested else {}
    measured |= {f"{folder}, %": [100 * row["accuracy"][folder] for row in rows] for folder in folders}
    loss, recipes = np.array([row["val_ce"] for row in rows]), np.array([row["recipe"] for row in rows])
    for axes, (name, values) in zip(np.atleast_1d(figure.subplots(1, len(measured))), measured.items()):
        panel(axes, loss, np.array(values), recipes)
        axes.set_title(f"R² = {np.corrcoef(loss, values)[0, 1] ** 2:.3f}", fontsize=10)
        axes.set_ylabel(name)
    figure.supxlabel(f"validation loss of {len(rows)} runs, nats per token", fontsize=10)
    legend_beside(figure, axes, fontsize=8, ncols=math.ceil(len(set(recipes)) / 18))


def panel(axes, loss, values, recipes):
    """A point a run, recipes told apart."""
    for recipe, look in zip(dict.fromkeys(recipes), itertools.cycle(LOOKS)):
        seeds = recipes == recipe
        axes.plot(loss[seeds], values[seeds], **look | dict(linestyle=""), markersize=4, label=recipe)
    ends = np.array([loss.min(), loss.max()])
    axes.plot(ends, np.poly1d(np.polyfit(loss, values, 1))(ends), color="gray", linewidth=1)


if __name__ == "__main__":
    launch(main, PlotConfig)
