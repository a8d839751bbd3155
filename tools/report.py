"""A run's report card: one page, as HTML that opens from disk without a network, and as markdown.

    python -m tools.report out/babyllama                         # report.html and report.md in the run folder
    python -m tools.report out/babyllama --data=blimp_filtered   # with pairs that it got wrong
    python -m tools.report out/babyllama --twin=out/llama_58m --glue=out/glue

Where the run came from, its loss, its scores by the rules of each year beside published ones, what it finds
hardest, texts that it writes, and what is missing with the command that makes it. All is read from the files
that training and scoring left; nothing is scored anew.
"""
import os
import shlex
import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from eval_blimp import texts_sha256
from lib import glue
from lib.charts import Line, line_chart, violins
from lib.checkpoints import load_ensemble, run_folder, weights_sha256
from lib.configurator import configure, launch
from lib.files import check_writable, read_json, write_lines
from lib.lineage import hours, lineage, look_at, prepared_text, trained, words_seen
from lib.machine import pick_device
from lib.page import Code, Figure, Heading, Paragraph, Quotes, Table, count, places, to_html, to_markdown
from lib.published import BASELINES_2024, CHANCE, GLUE
from lib.rules import RULES, result_name
from lib.scoring import Candidate
from lib.tasks import read_items
from sample import SampleConfig, first_token, generate
from tools import submit
from tools.compare import departures, is_finetuned, mean_and_error, read_glue, read_results
from tools.plot import validated_on

WORST, WRONG = 5, 3  # paradigms, and items of each


@dataclass
class ReportConfig:
    twin: str = ""              # another run, drawn beside this one: the same model without teachers
    data: tuple[str, ...] = ()  # folders it was scored on: for items that it got wrong
    glue: str = ""              # out_dir of tools/finetune.py
    samples: int = 5            # texts to write; 0 = none
    length: int = 60            # tokens of each
    seed: int = 1               # of the first
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: str = ""               # OUT.html and OUT.md are written; '' = report in the run folder


class Scores(NamedTuple):
    """What lies in the run folder, and in cfg.glue, by rules."""
    folders: dict    # rules -> data folder -> what eval_blimp.py or tools/submit.py found
    reading: dict    # what tools/reading.py wrote, by any rules
    aoa: dict        # rules -> what tools/aoa.py wrote
    summaries: dict  # rules -> what tools/submit.py made of all
    glue: dict       # rules -> task -> its seeds' scores in %
    departures: dict # (rules, what of the settings is not as these have it) -> tasks


def main(args):
    cfg = configure(ReportConfig, [arg for arg in args if arg.startswith("-")])
    paths = [arg for arg in args if not arg.startswith("-")]
    if len(paths) != 1:
        sys.exit("error: name one run: python -m tools.report out/babyllama (--help tells more)")
    members = lineage(paths[0])
    out = cfg.out.removesuffix(".html") or os.path.join(run_folder(paths[0]), "report")
    for ending in ("html", "md"):
        check_writable(f"{out}.{ending}")
    title, blocks = f"Report card: {members[0].name}", report(cfg, members)
    write_lines(f"{out}.html", [to_html(title, blocks)])
    write_lines(f"{out}.md", [to_markdown(blocks)])
    print(f"written to {out}.html\nwritten to {out}.md")


def report(cfg, members):
    """The page's blocks."""
    this, scores = members[0], read_scores(cfg, members[0].path)
    twin = read_twin(cfg, this)
    blocks = [Heading(1, f"Report card: {this.name}"), *model(this)]
    for heading, part in (
            ("Where it came from", [*came_from(members), *sources(this)]),
            ("Loss", losses(this, twin)),
            ("Scores", scored(scores, this)),
            ("Accuracies of all paradigms", distribution(members + twin, scores)),
            ("The worst paradigms", worst(cfg, this, scores)),
            ("What it writes", samples(cfg, this)),
            ("What is missing", missing(cfg, members, scores))):
        blocks += [Heading(2, heading), *part] if part else []
    return blocks


# --- the run and what it was made from ------------------------------------------------------------

def model(this):
    """What it is, in two lines."""
    shape, kind = this.described["model"], dict(gpt2="GPT-2", llama="Llama")
    loss, steps = this.described.get("val_ce"), [row["step"] for row in trained(this)]
    mlp = f"MLP {shape['intermediate_size']}"
    mlp += f" or {shape['n_experts']} experts of that" if shape.get("n_experts") else ""
    keys = f" ({shape['n_kv_head']} of keys and values)" if shape.get("n_kv_head") else ""
    return [
        Paragraph(f"{kind[shape['arch']]}, {count(this.described.get('parameters'))} parameters: "
                  f"{shape['n_layer']} layers of width {shape['n_embd']} ({mlp}), "
                  f"{shape['n_head']} heads{keys}, {shape['block_size']:,} positions, "
                  f"{shape['vocab_size']:,} tokens{', tied embeddings' if shape.get('tie_weights') else ''}"
                  f"{'' if shape.get('causal', True) else '; a masked language model'}."),
        Paragraph((f"Step {count(this.described.get('step'))} of {count(max(steps, default=None))} in ",
                   Code(this.path), f", validation loss {places(loss, 4)} nats per token."))]


def came_from(members):
    """What the models of the pipeline cost, each and together, and where each was made."""
    costs, made, there = [], [], [member for member in members if member.described]
    for member in members:
        described, rows = member.described, trained(member)
        time = hours(member)
        costs.append([
            f"{member.name}, {member.role}", count(described.get("parameters")),
            f"{count(described.get('words'))} × {rows[-1]['epoch']:.2f}" if rows else "–",
            count(words_seen(member)), "–" if time is None else f"{time:.3g}",
            places(described.get("val_ce"), 4)])
        made.append([member.name, *[str(described.get(key, "–"))
                                    for key in ("hardware", "torch", "git_revision")],
                     str(member.settings().get("seed", "–"))])
    runs = {os.path.realpath(run_folder(member.path)): member for member in there}.values()  # each once
    words, times = list(map(words_seen, runs)), list(map(hours, runs))
    known = len(there) == len(members) and None not in (*words, *times)
    costs.append(["together" if known else "together, at least", "", "",
                  count(sum(filter(None, words))), f"{sum(filter(None, times)):.3g}", ""])
    header = ["model", "parameters", "words × epochs", "words seen", "hours", "validation loss"]
    return [Table("The models of the pipeline", header, costs),
            Paragraph("Words seen are those of a model's own training up to its last step, not what teachers "
                      "read to teach. Hours are of training steps, without validation and saving."),
            *[Paragraph(f"Not here: {member.name}, {member.role} ({member.reason}).")
              for member in members if member.reason],
            Table("Made with", ["model", "machine", "torch", "code", "seed"], made)]


def sources(this):
    """Words of the text that it was trained on, by source."""
    folder, meta = prepared_text(this)
    if not meta:
        return [Paragraph("The prepared text is not at hand: how its words divide over sources is unknown.")]
    splits = [split for split in ("train", "val", "test") if split in meta["words"]]
    names = dict.fromkeys(name for split in splits for name in meta["words"][split])
    rows = [[name, *[count(meta["words"][split].get(name, 0)) for split in splits]] for name in names]
    rows.append(["together", *[count(sum(meta["words"][split].values())) for split in splits]])
    return [Table(f"Words of text in {folder}", ["source", *splits], rows)]


# --- loss -----------------------------------------------------------------------------------------

def read_twin(cfg, this):
    """[the twin] if one is named: validated on the same chunks."""
    if not cfg.twin:
        return []
    twin = look_at(cfg.twin, "twin")
    if twin.reason or not validations(twin):
        sys.exit(f"error: twin: {twin.reason or cfg.twin + ' has no validation loss'}")
    if validated_on(twin.described) != validated_on(this.described):
        sys.exit(f"error: twin: {cfg.twin} was validated with another text, tokenizer, bos, seq_len or "
                 "eval_chunks")
    return [twin]


def validations(member):
    """{step: loss}"""
    return {row["step"]: row["val_ce"] for row in member.rows if row.get("val_ce") is not None}


def losses(this, twin):
    train = {row["step"]: row["ce"] for row in trained(this) if row.get("ce") is not None}
    if not train:
        return []
    curves = {this.name: validations(this)} | {f"{m.name} (twin)": validations(m) for m in twin}
    lines = [Line(f"{this.name}, training", list(train.items()), "c1 faint")]
    lines += [Line(f"{name}, validation", list(curve.items()), look + " strong")
              for (name, curve), look in zip(curves.items(), ("c1", "c2 d1"))]
    first = next((row for row in this.rows if "teacher_val_ce" in row), {"teacher_val_ce": []})
    now = this.described.get("teacher_val_ce", first["teacher_val_ce"])  # others, if resumed with others
    taught = [(f"teacher {os.path.basename(os.path.normpath(path))}", loss)
              for path, loss in zip(this.described.get("teachers", []), now)]
    if len(taught) > 1 and now == first["teacher_val_ce"]:
        taught.append(("teachers' ensemble", first["ensemble_val_ce"]))
    lines += [Line(f"{name}: {loss:.4f}", [(0, loss), (max(train), loss)], f"c{3 + i % 4} d{1 + (i + 1) % 3}")
              for i, (name, loss) in enumerate(taught)]
    seen = [loss for line in lines[1:] for _, loss in line.points] or list(train.values())
    chart = line_chart(f"Training and validation loss of {this.name}", lines, "steps", "nats per token",
                       (min(*seen, *train.values()), max(seen)))
    rows = [[count(step), places(train.get(step), 4),
             *[places(curve.get(step), 4) for curve in curves.values()]] for step in validations(this)]
    rows += [[name, "", places(loss, 4), *[""] * len(twin)] for name, loss in taught]
    header = ["step", "training", *[f"{name}, validation" for name in curves]]
    return [Figure(chart, Table("Loss in nats per token", header, rows))]


# --- scores ---------------------------------------------------------------------------------------

def read_scores(cfg, path):
    """A checkpoint has what it was scored on by itself in its own folder, the rest in its run's."""
    def read(name, keys, folder=run_folder(path)):
        file = os.path.join(folder, name)
        return read_json(file, keys) if os.path.isfile(file) else {}
    folders, aoa, summaries = {}, {}, {}
    for rules in sorted(RULES, reverse=True):
        folders[rules] = {task.full: read(f"scores_{rules}/main/{task.full}.json", ("step", "sha256"))
                          for task in submit.TASKS if task.key != "reading"}
        folders[rules] |= read_folders(os.path.join(path, result_name(rules)))
        folders[rules] = {folder: row for folder, row in folders[rules].items() if row}
        aoa[rules] = read(f"aoa_{rules}.json", ("score",))
        summaries[rules] = read(f"scores_{rules}/summary.json", ("benchmarks", "means", "missing"))
    reading = read("reading.json", ("rules", "reading", "eye_tracking", "self_paced"), path)
    if cfg.glue and not is_finetuned(cfg.glue):
        sys.exit(f"error: no {os.path.join(cfg.glue, 'results.json')}; make it with tools.finetune "
                 f"--ckpt={path} --out_dir={cfg.glue}")
    tuned = read_glue([[path, cfg.glue]])[0] if cfg.glue else {}
    return Scores(folders, reading, aoa, summaries, tuned, departures([cfg.glue]) if cfg.glue else {})


def read_folders(file):
    """{data folder: result} of a file that eval_blimp.py wrote, if it is there."""
    if not os.path.isfile(file):
        return {}
    (result,) = read_results(file).values()
    about = {key: result.get(key) for key in ("step", "weights_sha256")}
    return {folder: {**row, **about} for folder, row in result["folders"].items()}


def scored(scores, this):
    """A part for each year's rules, the newest first."""
    blocks = []
    for rules, folders in scores.folders.items():
        values, seeds = benchmarks(scores, rules), scores.glue.get(rules, {})
        if values or seeds:
            blocks.append(Heading(3, f"Rules of {rules}"))
        if values:
            blocks.append(beside_published(["benchmark", "this run", "chance"], values,
                                           baselines(rules, bool(scores.summaries[rules]))))
        partial = [f"{name} ({row['there']} of {row['of']} tasks)"
                   for name, row in scores.summaries[rules].get("benchmarks", {}).items()
                   if row["score"] is not None and not row["complete"]]
        if partial:
            blocks.append(Paragraph(f"Of a part of the official tasks or items: {', '.join(partial)}."))
        dated = {**folders, "tools.submit's table": scores.summaries[rules],
                 "reading": scores.reading if rules in scores.reading.get("rules", ()) else {}}
        stale = [f"{name} (step {row.get('step')})" for name, row in dated.items()
                 if row and not is_of(this, row)]
        if stale:
            blocks.append(Paragraph(f"Scored with other weights than it has here: {', '.join(stale)}."))
        if seeds:
            values = {task: mean_and_error(each) for task, each in seeds.items()}
            blocks.append(beside_published(["task", "this run"], values, GLUE.get(rules, {})))
            counts = ", ".join(f"{task} {len(each)}" for task, each in seeds.items())
            blocks.append(Paragraph(f"Fine-tuned, ± over seeds, of which there are: {counts}."))
        for (year, changed), tasks in scores.departures.items():
            if year == rules:
                names = ", ".join(tasks)
                blocks.append(Paragraph(f"Not fine-tuned as the rules have it: {names} ({changed})."))
        for folder, row in folders.items():
            blocks += folder_tables(f"{folder}, rules of {rules}", row)
    return blocks or [Paragraph("Nothing was scored yet.")]


def is_of(member, row):
    """Whether a result is of the member's weights."""
    theirs = row.get("weights_sha256")  # tools/reading.py has a list of them
    return (theirs[0] if isinstance(theirs, list) else theirs) == weights_sha256(member.path)


def folder_tables(title, row):
    """Its phenomena and its tasks, where there are several."""
    for kind in ("phenomena", "tasks"):
        if len(row[kind]) > 1:
            cells = [[name, plus_minus(r), count(r["n"])] for name, r in row[kind].items()]
            folded = kind == "tasks" and (row["phenomena"] or len(cells) > 20)
            yield Table(f"{title}: {len(cells)} {kind}", [kind, "accuracy, %", "items"], cells, bool(folded))


def benchmarks(scores, rules):
    """{benchmark: (score in %, standard error or None)}."""
    if summary := scores.summaries[rules]:
        values = {name: (row["score"], row["se"]) for name, row in summary["benchmarks"].items()}
        return values | {name: (mean, None) for name, mean in summary["means"].items()}
    values = {}
    for folder, row in scores.folders[rules].items():
        score = (100 * row["rho"], None) if "rho" in row else (100 * row["accuracy"], 100 * row["se"])
        values[benchmark(folder)] = score
    if rules in scores.reading.get("rules", ()):
        values |= {name.replace("_", " "): (scores.reading[name], None)
                   for name in ("eye_tracking", "self_paced", "reading")}
    if scores.aoa[rules]:
        values["AoA"] = 100 * scores.aoa[rules]["score"], None
    tuned = scores.glue.get(rules, {})
    if tuned and all(task in tuned for task in glue.RULES[rules].tasks):
        values["GLUE"] = np.mean([np.mean(tuned[task]) for task in glue.RULES[rules].tasks]), None
    return values


def benchmark(folder):
    """That a data folder alone decides, else the folder's name."""
    keys = [(task.key,) for task in submit.TASKS if task.full == folder]
    titles = {**submit.BENCHMARKS["2025"], **submit.BENCHMARKS["2026"]}
    return next((title for title, parts in titles.items() if parts in keys), folder)


def baselines(rules, with_means):
    """{model: {benchmark or mean of them: score in %}}"""
    models = dict(BASELINES_2024) if rules == "2024" else {}
    for track, published in submit.PUBLISHED.get(rules, {}).items():
        words = {"strict-small": "10M", "strict": "100M"}[track]
        for model, values in published.items():
            known = dict(zip(submit.BENCHMARKS[rules], values, strict=True))
            means = submit.means(rules, known, [])
            models[f"{model}, {words}"] = known | (means if with_means else {})
    return models


def beside_published(header, values, models):
    """A Table of {benchmark or task: (score in %, standard error or None)} beside {model: {...: score}}."""
    rows, published = [], [pair for scores in models.values() for pair in scores.items()]
    digits = 1 if all(score == round(score or 0, 1) for _, score in published) else 2  # as they were printed
    for name in dict.fromkeys([*dict(published), *values]):
        score, se = values.get(name, (None, None))
        chance = [places(CHANCE.get(name), 1)] * (len(header) - 2)
        rows.append([name, places(score, 2) + ("" if se is None else f" ± {se:.2f}"), *chance,
                     *[places(scores.get(name), digits) for scores in models.values()]])
    caption = "Scores in %, ± standard error" + ", beside published baselines" * bool(models)
    return Table(caption, [*header, *models], rows)


# --- paradigms ------------------------------------------------------------------------------------

def paradigms(scores):
    """(rules, folder, its result) with the most tasks, of the newest rules that have it; None if all have
    fewer than five."""
    every = [(len(row["tasks"]), rules, folder) for rules, folders in scores.folders.items()
             for folder, row in folders.items()]
    n, rules, folder = max(every, default=(0, "", ""))
    return (rules, folder, scores.folders[rules][folder]) if n >= 5 else None


def distribution(members, scores):
    """Of accuracies over tasks: this run's, and those of its teachers and twin on the same items."""
    if not paradigms(scores):
        return []
    rules, folder, this = paradigms(scores)
    shown, names = {}, [member.name for member in members]
    for member in members:
        row = read_scores(ReportConfig(), member.path).folders[rules].get(folder, {})
        known = member is members[0] or not member.reason and is_of(member, row)
        if known and row.get("sha256") == this["sha256"]:
            name = member.name if names.count(member.name) == 1 else member.path
            shown[name] = [100 * task["accuracy"] for task in row["tasks"].values()]
    title = f"Accuracies in {len(this['tasks'])} tasks of {folder}, rules of {rules}"
    chart = violins(title, [(f"{name}, mean {np.mean(v):.2f}", v) for name, v in shown.items()],
                    CHANCE.get(benchmark(folder), 50.0),
                    "accuracy, %; a point a task, a line the median; broken line: chance")
    rows = [[name, f"{np.mean(v):.2f}", *[f"{q:.2f}" for q in np.quantile(v, (0, 0.25, 0.5, 0.75, 1))]]
            for name, v in shown.items()]
    header = ["model", "mean", "lowest", "first quartile", "median", "third quartile", "highest"]
    return [Figure(chart, Table(title, header, rows))]


def worst(cfg, this, scores):
    """The tasks with the least accuracy; with items that went wrong, where the texts are at hand."""
    if not paradigms(scores):
        return []
    rules, folder, result = paradigms(scores)
    tasks = sorted(result["tasks"].items(), key=lambda task: task[1]["accuracy"])[:WORST]
    items = read_texts(cfg, folder, rules, result)
    if not items:
        command = f"python -m tools.report {shlex.quote(this.path)} --data={shlex.quote(folder)}"
        return [Table(f"{folder}, rules of {rules}", ["task", "accuracy, %"],
                      [[name, plus_minus(row)] for name, row in tasks]),
                Paragraph(("With what it got wrong: ", Code(command), " (the folder, where it lies)"))]
    blocks = []
    for name, row in tasks:
        wrong = [item for item, digit in zip(items[name], row["right"], strict=True) if digit == "0"]
        blocks += [Heading(3, f"{name}: {plus_minus(row)}%"),
                   Table(f"The first it got wrong, of {row['n']:,}" if wrong else "None is wrong",
                         ["right", "preferred"], list(map(right_and_preferred, wrong[:WRONG])))]
    return blocks


def read_texts(cfg, folder, rules, result):
    """{task: items} of the folder, if cfg.data has it: it must be the texts that were scored."""
    for path in cfg.data:
        if not os.path.isdir(path):
            sys.exit(f"error: data: no folder {path}")
        if os.path.basename(os.path.normpath(path)) == folder:
            items = read_items(path, rules, lambda before, scored: Candidate((0, 0), 1), np.inf)
            if texts_sha256(items) != result["sha256"]:
                sys.exit(f"error: data: {path} has other texts than were scored; score them again")
            return {task: [item for item in items if item.task == task] for task in result["tasks"]}
    if cfg.data:
        print(f"notice: the page's worst paradigms are of {folder}, which is not in data")
    return {}


def right_and_preferred(item):
    texts = [(item.context + text).strip() for text in item.texts]
    others = texts[:item.right] + texts[item.right + 1:]
    return [texts[item.right], others[0] if len(others) == 1 else f"one of {len(others)} others"]


# --- texts, and what is missing -------------------------------------------------------------------

def samples(cfg, this):
    """Texts from nothing, as sample.py writes them."""
    shape = this.described["model"]
    if not cfg.samples or not shape.get("causal", True) or shape.get("n_labels"):
        return []
    models, tokenizer, _ = load_ensemble([this.path], pick_device(cfg.device))
    temperature, top_k = SampleConfig.temperature, SampleConfig.top_k
    first, texts = first_token(tokenizer), []
    for seed in range(cfg.seed, cfg.seed + cfg.samples):
        ids = generate(models, [first], cfg.length, temperature, top_k, seed, tokenizer.vocab_size)
        texts.append(tokenizer.decode(ids[1:]).strip())
    return [Paragraph(f"From nothing, {cfg.length} tokens each, temperature {temperature}, of the {top_k} "
                      f"likeliest tokens, seeds {cfg.seed} to {seed}; none was chosen."), Quotes(texts)]


def missing(cfg, members, scores):
    """What is not there, with the command that makes it."""
    this, path = members[0], shlex.quote(members[0].path)
    rows = [[f"{member.name}, {member.role}", f"its folder, at {member.path} or beside this run"]
            for member in members if member.reason]
    if not prepared_text(this)[0]:
        data_dir = shlex.quote(str(this.settings().get("data_dir", "data/babylm")))
        rows.append(["the prepared text",
                     Code(f"python prepare.py --input_dir=babylm --data_dir={data_dir}")])
    if not scores.summaries["2026"]:
        rows.append(["the challenge of 2026: its scores, and the hand-in",
                     Code(f"python -m tools.submit --ckpt={path} --data=evaluation_data")])
    for what, remedy in scores.summaries["2026"].get("missing", {}).items():
        rows.append([what, Code(remedy) if remedy.startswith(("python ", "pip ")) else remedy])
    folders = ("blimp_filtered", "supplement_filtered", "ewok_filtered")
    if absent := [folder for folder in folders if folder not in scores.folders["2024"]]:
        rows.append([f"by the rules of 2024: {', '.join(absent)}",
                     Code(f"python eval_blimp.py --ckpt={path} --data={','.join(absent)}")])
    if not scores.glue and not scores.summaries["2026"]:
        command = f"python -m tools.finetune --rules=2026 --ckpt={path} --out_dir=out/glue"
        rows.append(["fine-tuning", (Code(command), ", and here ", Code("--glue=out/glue"))])
    if not cfg.samples:
        rows.append(["texts", Code(f"python -m tools.report {path} --samples=5")])
    return [Table("What is not there, and what makes it", ["missing", "command"], rows)] if rows else []


def plus_minus(row):
    return f"{100 * row['accuracy']:.2f} ± {100 * row['se']:.2f}"


if __name__ == "__main__":
    launch(main)
