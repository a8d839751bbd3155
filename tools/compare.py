"""All scores of a run, or several runs' side by side.

    python -m tools.compare out/babyllama                         # a row for each score it has, and its rules
    python -m tools.compare out/babyllama out/glue                # and what tools.finetune wrote in out/glue
    python -m tools.compare out/babyllama out/llama_58m           # both scored by eval_blimp.py before
    python -m tools.compare out/a@1+out/a@2 out/b@1+out/b@2       # two recipes of two seeds each
    python -m tools.compare out/a+out/a_glue out/b+out/b_glue     # and fine-tuned: BabyLlama-2, table 3
    python -m tools.compare out/a out/b out/c --widest=15         # Nair et al., table 5

A column is a run (or a JSON file that eval_blimp.py wrote), or several seeds of one recipe joined by `+`,
shown as mean ± standard deviation over seeds; of what eval_blimp.py scored by the same rules. The first
column is compared with each other one over the same items: a 95% interval of the difference, from a paired
bootstrap over items (within each task, as the mean is over tasks; by the rules of 2023 over phenomena, whose
items are one pool), and Wilcoxon's signed-rank test over tasks (as in Teaching Tiny Minds). Both speak of
items and tasks; how a recipe varies from seed to seed, only several seeds show. A column's folders of
fine-tuning results (out_dir of tools.finetune) are joined to its runs by `+` too, or stand alone: a table
more, of which the tasks alone are compared.
"""
import os
import re
import sys
from dataclasses import dataclass

import numpy as np

from lib import glue
from lib.configurator import configure, differences, launch, need
from lib.files import read_json
from lib.rules import RULES, mean_title, result_name, unit, units

RESAMPLES = 10_000
FILES = {rules: result_name(rules) for rules in RULES}
# of MSGS' tasks, as Baby Llama's figure 4 names them
FEATURES = dict(control_raising="CR", main_verb="MV", syntactic_category="SC", lexical_content_the="LC",
                relative_token_position="RTP", relative_position="RP")


@dataclass
class CompareConfig:
    widest: int = 0              # in the place of phenomena, so many tasks: where the columns differ most
    tasks: tuple[str, ...] = ()  # of fine-tuning, as mrpc,rte,wsc; () = all that each column has


def main(args):
    cfg = configure(CompareConfig, [arg for arg in args if arg.startswith("-")])
    columns = [arg for arg in args if not arg.startswith("-")]
    if not columns:
        sys.exit("error: name scored runs: python -m tools.compare out/babyllama out/llama_58m (--help tells "
                 "more)")
    paths = [column.split("+") for column in columns]
    alone = [column for column in columns if not is_finetuned(column)]
    if (len(columns) == 1 or len(alone) == 1) and max(map(len, paths)) == 1 and cfg == CompareConfig():
        print_everything(alone, list(filter(is_finetuned, columns)))
        return
    runs = [[path for path in column if not is_finetuned(path)] for column in paths]
    need(cfg, widest=(not cfg.widest or all(runs) and len(runs) > 1, "0 unless scored runs are compared"),
         tasks=(not cfg.tasks or runs != paths, "() unless folders of fine-tuning results are named"))
    labels = list(map(label, paths))
    if len(set(labels)) < len(labels):
        labels = columns
    folders = compare_runs(cfg, labels, runs) if all(runs) else {}
    if runs != paths:
        compare_finetuned(cfg, labels, paths, folders)


def is_finetuned(path):
    """Whether it is an out_dir of tools.finetune."""
    return os.path.isfile(os.path.join(path, "results.json"))


def label(paths):
    runs = [path for path in paths if not is_finetuned(path)] or paths
    name = os.path.basename(os.path.normpath(runs[0]))
    return f"{name} and {len(runs) - 1} more" if len(runs) > 1 else name


# --- pairs ----------------------------------------------------------------------------------------

def compare_runs(cfg, labels, paths):
    """A table a data folder. Returns rules -> folder -> the columns' accuracies in %."""
    results, means = [[read_results(path) for path in column] for column in paths], {}
    every = sum(results, [])
    shared = [(rules, name) for rules in FILES if all(rules in result for result in every)
              for name in every[0][rules]["folders"]
              if all(name in result[rules]["folders"] for result in every)]
    if not shared:
        sys.exit("error: the runs to compare were not scored on the same data folders by the same rules")
    for rules, name in shared:
        check_same_pairs(name, [result[rules] for result in every], sum(paths, []))
        columns = [[result[rules]["folders"][name] for result in column] for column in results]
        print_folder(cfg, name, rules, labels, columns)
        means.setdefault(rules, {})[name] = [np.mean(list(map(score, column))) for column in columns]
    for rules in means:
        for key in ("bos", "dtype"):
            if len(values := {result[rules].get(key) for result in every}) > 1:
                print(f"notice: by the rules of {rules} some were scored with another {key} than others: "
                      f"{', '.join(sorted(map(str, values)))}")
    return means


def measure(folder, rules):
    return mean_title(folder, rules) + ", rank correlation with people x 100" * ("rho" in folder)


def score(folder):
    """In %: accuracy, or where nothing is right or wrong (WUG) the rank correlation with people."""
    return 100 * folder.get("rho", folder["accuracy"])


def read_results(path):
    """{rules: what eval_blimp.py wrote} of a run folder or a result file."""
    files = [path]
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in FILES.values()]
    results = [read_result(file, path) for file in files if os.path.isfile(file)]
    if not results:
        sys.exit(f"error: no scores at {path}; make them with eval_blimp.py --ckpt={path} --data=...")
    now = weights_now(path)
    for result in results:
        if now not in ("", result.get("weights_sha256")):
            print(f"notice: the scores of {path} by the rules of {result.get('rules', '2024')} are of other "
                  f"weights than it has now (step {result.get('step')})")
    return {result.get("rules", "2024"): result for result in results}


def weights_now(path):
    """SHA-256 of the weights of a run's best checkpoint, or of a checkpoint folder; '' of another path. As
    lib/checkpoints.py has it, without torch, which takes a second to import."""
    best = os.path.join(path, "best.json")
    folder = os.path.join(path, read_json(best, ["folder"])["folder"]) if os.path.isfile(best) else path
    sums = os.path.join(folder, "sha256.json")
    return read_json(sums, ["model.safetensors"])["model.safetensors"] if os.path.isfile(sums) else ""


def read_result(file, path):
    result = read_json(file, ["folders"])
    try:
        for folder in result["folders"].values():
            for row in (folder, *folder["phenomena"].values(), *folder["tasks"].values()):
                f"{row['accuracy']:.2f} {row['se']:.2f} {row.get('rho', 0):.2f}"  # numbers?
            tasks = folder["tasks"]
            good = all(re.fullmatch("[0-9]+", row["right"]) for row in tasks.values())
            known = all(tasks.keys() >= set(each) for each in units(folder, result.get("rules", "2024")))
            if not (good and known and tasks and folder["sha256"]):
                raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError):
        sys.exit(f"error: {file} is damaged, or of older code; score {path} again")
    return result


def check_same_pairs(name, results, paths):
    """Exit if one of the runs was scored on other pairs of data folder `name` than the first."""
    def pairs(result):
        folder = result["folders"][name]
        n_answers = [len(row["right"]) for row in folder["tasks"].values()]
        return folder["sha256"], [*folder["tasks"], *folder["phenomena"]], n_answers
    for result, path in zip(results, paths):
        if pairs(result) != pairs(results[0]):
            sys.exit(f"error: {path} was scored on other pairs of {name} than {paths[0]}")


def print_folder(cfg, name, rules, labels, columns):
    """columns: per label its runs' scores on folder `name`."""
    example = columns[0][0]
    kind = "phenomena" if example["phenomena"] and not cfg.widest else "tasks"
    terms = list(example[kind])
    if cfg.widest:
        terms = widest([{term: np.mean([score(scores["tasks"][term]) for scores in column])
                         for term in terms} for column in columns], cfg.widest)

    def print_row(title, row_of):
        print_cells(title, [spread([score(row_of(scores)) for scores in column], 2) for column in columns])
    print_header(f"{name} by the rules of {rules}", labels)
    for term in terms:
        print_row(term, lambda scores: scores[kind][term])
    print_row(f"**{measure(example, rules)}**", lambda scores: scores)
    print()
    first = right(columns[0], rules)
    for title, column in zip(labels[1:], columns[1:]):
        difference = np.mean(list(map(score, columns[0]))) - np.mean(list(map(score, column)))
        print(f"{labels[0]} - {title}: {difference:+.2f} points"
              + ("" if "rho" in example else of_items(first, right(column, rules), unit(example, rules))))


def of_items(first, other, units):
    """How sure a difference is, in words."""
    low, high = 100 * paired_bootstrap(first, other)
    p = wilcoxon([a.mean() - b.mean() for a, b in zip(first, other)])
    return (f", 95% interval {low:+.2f} to {high:+.2f} over items; Wilcoxon over {len(first)} {units} "
            f"p = {p:.2g}")


def print_header(title, labels):
    print()
    print_cells(f"{title}, %", labels)
    print("|---|" + "---:|" * len(labels))


def print_cells(title, cells):
    print(f"| {title} | " + " | ".join(cells) + " |")


def widest(columns, n):
    """The n tasks of the largest standard deviation over columns (task -> accuracy), the largest first."""
    return sorted(columns[0], key=lambda task: -np.std([column[task] for column in columns]))[:n]


def spread(values, digits):
    """Mean, and standard deviation where there are several."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def right(column, rules):
    """Per task (by the rules of 2023 per phenomenon) an array (runs, items) of points: one of k best is 1/k
    right."""
    points = [0, *(1 / k for k in range(1, 10))]
    return [np.array([[points[int(digit)] for task in tasks for digit in scores["tasks"][task]["right"]]
                      for scores in column]) for tasks in units(column[0], rules)]


def paired_bootstrap(a, b):
    """2.5% and 97.5% quantiles of the mean over tasks of accuracy a minus b when each task's items are drawn
    anew, with replacement, the same ones for both. Several runs count as one that is right in part."""
    rng = np.random.default_rng(0)
    mean = np.zeros(RESAMPLES)
    for task_a, task_b in zip(a, b):
        values, counts = np.unique(np.round(task_a.mean(0) - task_b.mean(0), 12), return_counts=True)
        n = counts.sum()  # drawing n items is drawing how often each difference comes
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


# --- fine-tuning ----------------------------------------------------------------------------------

def compare_finetuned(cfg, labels, paths, folders):
    """A table for GLUE, one for MSGS, and one of the means of GLUE and each data folder."""
    columns = read_glue(paths)
    point_out_departures(sum(paths, []))
    for (benchmark, rules), tasks in shared_tasks(columns, cfg.tasks).items():
        print_header(f"{benchmark} by the rules of {rules}", labels)
        for task in tasks:
            print_cells(task_title(task), [spread(column[rules][task], 2) for column in columns])
        if benchmark == "MSGS":
            continue  # a mean over features says nothing
        scores = np.array([[np.mean(column[rules][task]) for task in tasks] for column in columns])
        print_cells(f"**mean of {len(tasks)} tasks**", [f"{x:.2f}" for x in scores.mean(1)])
        print()
        for title, other in zip(labels[1:], scores[1:]):
            print(f"{labels[0]} - {title}: {(scores[0] - other).mean():+.2f} points; Wilcoxon over "
                  f"{len(tasks)} tasks p = {wilcoxon(scores[0] - other):.2g}")
        if rules in folders:
            benchmarks = {**folders[rules], f"GLUE, {len(tasks)} tasks": scores.mean(1)}
            print_macro_average(rules, labels, benchmarks)


def print_macro_average(rules, labels, benchmarks):
    """BabyLlama-2's table 3, if the benchmarks are BLiMP, the supplement, EWoK and SuperGLUE."""
    print_header(f"means by the rules of {rules}", labels)
    macro = {f"**macro-average of {len(benchmarks)}**": np.mean(list(benchmarks.values()), axis=0)}
    for name, means in {**benchmarks, **macro}.items():
        print_cells(name, [f"{x:.2f}" for x in means])


def read_glue(columns, accuracy=False):
    """Per column (list of paths) rules -> task -> the reported metric, or accuracy, in %, one a seed, of its
    folders of fine-tuning results; these must be of its runs' models and of the other columns' texts, a
    folder's of one model, a column's of one recipe."""
    found, texts = [], {}
    for column in columns:
        found.append(scores := {})
        weights, first = weights_of([path for path in column if not is_finetuned(path)]), {}
        for file, task, metric, row in finetuned_rows(column):
            rules, inputs = row.get("rules", "2024"), row.get("inputs_sha256", {})
            if weights and not weights.issuperset(inputs.get("weights", ["of older code"])):
                sys.exit(f"error: {file} has {task} of another model than the runs it is joined to")
            if inputs and texts.setdefault((rules, task), inputs["texts"]) != inputs["texts"]:
                sys.exit(f"error: {file} has {task} of other texts than the results before it")
            if inputs and first.setdefault(file, inputs["weights"]) != inputs["weights"]:
                sys.exit(f"error: {file} has {task} of another model than its other results")
            settings = {**row.get("settings", {}), "seed": None}
            if inputs and (changed := differences(first.setdefault((rules, task), settings), settings)):
                sys.exit(f"error: {file} has {task} with other settings than the results that it would be "
                         f"averaged with ({changed})")
            score = row["accuracy" if accuracy else metric]
            scores.setdefault(rules, {}).setdefault(task, []).append(100 * score)
    return found


def finetuned_rows(column):
    """(file, task, its reported metric, a seed's results), the tasks in the order of tools.finetune."""
    for file in (os.path.join(path, "results.json") for path in column if is_finetuned(path)):
        results = glue.read_results(file)
        for task in filter(results.get, glue.TASKS):
            for row in results[task].values():
                yield file, task, glue.TASKS[task][2], row


def departures(column):
    """{(rules, what of the settings is not as these have it): tasks} of a column's fine-tuning results."""
    from tools.finetune import other_settings  # here: torch takes a second to import
    found = {}
    for _, task, _, row in finetuned_rows(column):
        if "settings" in row:
            rules = row.get("rules", "2024")
            if changed := other_settings(rules, task, row, row["settings"].get("seed", 42)):
                tasks = found.setdefault((rules, changed), [])
                tasks += [task] if task not in tasks else []
    return found


def point_out_departures(column):
    for (rules, changed), tasks in departures(column).items():
        print(f"notice: not as the rules of {rules} have it: {', '.join(tasks)} ({changed})")


def weights_of(runs):
    """Hashes of their weights; none if one is a file of scores or an ensemble's folder."""
    from lib.checkpoints import weights_sha256
    pointers = ("best.json", "last.json", "config.json")
    trained = [any(os.path.isfile(os.path.join(run, name)) for name in pointers) for run in runs]
    return set(map(weights_sha256, runs)) if all(trained) else set()


def shared_tasks(columns, wanted=()):
    """(GLUE or MSGS, rules) -> the tasks that each column has, if any are wanted, of those."""
    found = {}
    for rules in FILES:
        for task in columns[0].get(rules, ()):
            if all(task in column.get(rules, ()) for column in columns) and (not wanted or task in wanted):
                found.setdefault(("GLUE" if short(task) == task else "MSGS", rules), []).append(task)
    missing = [task for task in wanted if task not in sum(found.values(), [])]
    if missing or not found:
        sys.exit("error: the fine-tuning results of the columns do not all have "
                 + (", ".join(missing) or "a task in common, by the same rules"))
    return found


def task_title(task):
    return f"{short(task)}, {glue.TASKS[task][2]}"


def short(task):
    """MSGS' tasks as in Baby Llama's table 2, CR_LC; others as they are."""
    for feature, initials in FEATURES.items():
        task = task.replace(feature, initials)
    return task


# --- all scores of a run --------------------------------------------------------------------------

def print_everything(runs, finetuned):
    """One table of what the run's folder has, and of fine-tuning results."""
    rows = [row for path in runs for row in (*choice_rows(path), *word_rows(path), *summary_rows(path))]
    if finetuned:
        point_out_departures(finetuned)
        rows += glue_rows([*runs, *finetuned])
    if not rows:
        sys.exit(f"error: no scores at {(runs + finetuned)[0]}; make them with eval_blimp.py or tools.submit")
    print("| score | rules | | standard error | items | of |\n|---|---|---:|---:|---:|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def cells(title, rules, score, se=None, n="", source=""):
    """A row of that table, score and standard error in %."""
    return title, rules, f"{score:.2f}", "" if se is None else f"{se:.2f}", f"{n}", source


def choice_rows(path):
    if os.path.isfile(path) or any(os.path.isfile(os.path.join(path, name)) for name in FILES.values()):
        for rules, result in read_results(path).items():
            for name, folder in result["folders"].items():
                se = None if "rho" in folder else 100 * folder["se"]
                yield cells(f"{name}, {measure(folder, rules)}", rules, score(folder), se, folder["n"],
                            f"step {result.get('step')}")


def word_rows(path):
    """Of reading.json, aoa_2025.json and aoa_2026.json."""
    file = os.path.join(path, "reading.json")
    if os.path.isfile(file):
        result = read_json(file, ("step", "rules", "reading", "eye_tracking", "self_paced"))
        point_out_age("reading.json", path, [weights_now(path)], result)
        for name in ("eye_tracking", "self_paced", "reading"):
            yield cells(name.replace("_", " "), ", ".join(result["rules"]), result[name],
                        source=f"step {result['step']}")
    for file in (os.path.join(path, f"aoa_{rules}.json") for rules in FILES):
        if os.path.isfile(file):
            result = read_json(file, ("rules", "score", "n_words", "steps"))
            now = [weights_now(os.path.join(path, step)) for step in result["steps"]]
            point_out_age(os.path.basename(file), path, now, result)
            yield cells("age of acquisition, correlation x 100", result["rules"], 100 * result["score"],
                        n=result["n_words"], source=f"{len(result['steps'])} checkpoints")


def point_out_age(name, path, now, result):
    if result.get("weights_sha256") != now:
        print(f"notice: {name} of {path} is of other weights than it has now")


def summary_rows(path):
    """Of what tools.submit left."""
    for file in (os.path.join(path, f"scores_{rules}", "summary.json") for rules in FILES):
        if os.path.isfile(file):
            result = read_json(file, ("rules", "step", "benchmarks", "means"))
            for name, row in result["benchmarks"].items():
                if row["score"] is not None:
                    part = "" if row["complete"] else ", a part of it"
                    yield cells(f"{name} (submit{part})", result["rules"], row["score"], row["se"], row["n"],
                                f"step {result['step']}")
            for name, mean in result["means"].items():
                yield cells(f"{name} (submit)", result["rules"], mean)


def glue_rows(column):
    """Of results.json of tools.finetune: mean and standard error over seeds."""
    for rules, by_task in read_glue([column])[0].items():
        for task, scores in by_task.items():
            yield cells(task_title(task), rules, *mean_and_error(scores), source=f"{len(scores)} seeds")


def mean_and_error(scores):
    """Their mean and its standard error, None of one."""
    return np.mean(scores), np.std(scores, ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else None


if __name__ == "__main__":
    launch(main)
