"""Score texts that a model is to choose between, by the rules of the BabyLM challenge of a year: BLiMP and
its supplement, EWoK, entity tracking, COMPS, WUG, GlobalPIQA.

    python eval_blimp.py --ckpt=out/babyllama --data=blimp_filtered,supplement_filtered,ewok_filtered
    python eval_blimp.py --ckpt=out/babyllama --data=blimp_filtered,comps --rules=2026
    python eval_blimp.py --ckpt=out/gpt2_705m,out/llama_360m --data=blimp_filtered   # an ensemble
    python eval_blimp.py --ckpt=out/gpt2_705m,out/llama_360m --data_dir=data/babylm  # its validation loss
    python -m tools.compare out/babyllama out/llama_58m              # runs scored before, side by side

A candidate's score is the sum of log-probabilities of its tokens, in float32, over the whole vocabulary,
nothing appended; the highest is chosen. How years differ is a table in lib/rules.py:

    2023, 2024   one token (2024: <s>, else </s>, else <pad>; 2023: </s>), then " " + sentence
    2025, 2026   the text as the tokenizer gives it: without <s>, a text's first token has no score

The default is 2024: the tables of that year's papers are by it (Baby Llama's: 2023), and so is every number
in README and RESULTS.md that names no other rules. Today's challenge is --rules=2026, or `python -m
tools.submit`. A task is a .jsonl file (of EWoK and entity tracking a part of one); a folder's accuracy is
the unweighted mean over its tasks (2023: over its phenomena). Several checkpoints score as one: averaged
logits. Scores are kept in the folder that --ckpt names, a run's (of its best checkpoint) or a checkpoint's
own; those of other commands stay there, as long as they are of the same weights.
"""
import gzip
import hashlib
import json
import math
import os
import sys
import time
import zlib
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from distill import Teacher, ensemble_logits, mean_logits
from lib.checkpoints import load_ensemble
from lib.configurator import launch, need
from lib.data import evaluate, validation_chunks
from lib.files import check_writable, parse_json, regular, write_json, write_lines
from lib.machine import Machine, can_compile, pick_device
from lib.rules import RULES, mean_title, result_name
from lib.scoring import ROW, flattened, plant
from lib.shards import Shards, data_sha256
from lib.tasks import encoder, read_items
from train import TrainConfig

BEYOND = 4096  # tokens of a text that a Llama of fewer positions reads too
HEAD = 256     # nodes of which a CPU has logits at a time


@dataclass
class EvalConfig:
    ckpt: tuple[str, ...] = ()   # run (its best checkpoint) or checkpoint folder; several: their ensemble
    data: tuple[str, ...] = ()   # folders of .jsonl files with the fields of lib/tasks.py's FORMATS
    rules: Literal["2023", "2024", "2025", "2026"] = "2024"
    bos: Literal["auto", "yes", "no"] = "auto"  # 2025, 2026: <s> before a text; auto: if in training
    data_dir: str = ""           # prepared data: also the validation loss on it, as train.py measures it
    split: Literal["val", "test"] = "val"  # of that data
    seq_len: int = 128
    eval_chunks: int = 8192
    items: str = ""              # also write one JSON line per item to this file: each candidate's score
    predictions: str = ""        # also add what was preferred to this .json.gz, for the 2024 challenge
    out: str = ""                # where the result goes; '' = blimp.json (blimp_2026.json) in --ckpt
    batch_tokens: int = 1024     # positions scored at a time; a GPU wants more
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"     # auto: for 20,000 items and more
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 moves an average by about 0.1 at random


def main(cfg):
    if not cfg.ckpt or not (cfg.data or cfg.data_dir):
        sys.exit("error: say what to score on what: --ckpt=out/run --data=blimp_filtered")
    need(cfg, predictions=(not cfg.predictions or cfg.rules == "2024",
                           f"'' with rules={cfg.rules}: tools/submit.py writes that hand-in"),
         bos=(cfg.bos == "auto" or RULES[cfg.rules].prefix == "tokenizer",
              f"'auto' with rules={cfg.rules}, which say what stands before a text"))
    device = pick_device(cfg.device)
    machine = Machine(device, dtype=getattr(torch, cfg.dtype))
    models, tokenizer, described = load_ensemble(cfg.ckpt, device)
    teachers = [Teacher(m) for m in models]  # they score as one: averaged logits
    about = dict(ckpt=list(cfg.ckpt), step=described["step"], weights_sha256=described["weights_sha256"],
                 dtype=cfg.dtype, rules=cfg.rules, bos=cfg.bos)
    out = result_path(cfg)
    if not cfg.out:
        scored_before(out, about)
    folders = read_folders(cfg, models, tokenizer, described)
    begin = time.perf_counter()
    many = sum(map(len, folders.values())) >= 20000
    if (cfg.compile == "on" or cfg.compile == "auto" and many) and can_compile(device):
        for m in models:
            m.model.compile_layers()
    result = dict(about, folders={})
    if cfg.data_dir:
        shards = Shards(cfg.data_dir, cfg.split)
        result[f"{cfg.split}_ce"] = mean_loss(cfg, shards, teachers, described, machine)
        result[f"{cfg.split}_on"] = dict(data_sha256=data_sha256(shards.meta), seq_len=cfg.seq_len,
                                         eval_chunks=cfg.eval_chunks)
    lines, predictions = [], {}
    for name, items in folders.items():
        with machine.autocast():
            scores = score_items(teachers, items, cfg.batch_tokens, name)
        result["folders"][name] = summary(items, scores, RULES[cfg.rules])
        predictions[name] = preferred(items, scores, RULES[cfg.rules])
        lines += map(json_line, items, scores)
    result["seconds"] = round(time.perf_counter() - begin, 1)
    if out:
        before = {} if cfg.out else scored_before(out, about)  # now: another command may have written there
        folders = {**before.get("folders", {}), **result["folders"]}
        write_json(out, {**before, **result, "folders": folders})
    if cfg.items:
        write_lines(cfg.items, lines)
    if cfg.predictions:
        add_predictions(cfg.predictions, predictions)
    print_table(cfg, result)  # last: what is written is safe from a closed pipe
    if out:
        print(f"written to {out}")


def result_path(cfg):
    """Where the result goes, '' for nowhere. Exits if that or another file asked for cannot be written."""
    out = cfg.out
    if not out and len(cfg.ckpt) == 1 and cfg.data:
        out = os.path.join(cfg.ckpt[0], result_name(cfg.rules))
    for path in filter(None, (out, cfg.items)):
        check_writable(path)
    if cfg.predictions:
        read_predictions(cfg.predictions)
    return out


def scored_before(path, about):
    """What the file has of the same weights, by the same rules: it stays there. Exits if it was scored
    otherwise."""
    try:
        with open(path) as f:
            old = parse_json(f.read())
        if old["weights_sha256"] != about["weights_sha256"]:
            return {}
        old["folders"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or damaged
        return {}
    for key in ("dtype", "bos"):
        if old.get(key, about[key]) != about[key]:
            sys.exit(f"error: {path} has scores of these weights with {key}={old[key]}; delete it, or put "
                     f"those with {key}={about[key]} elsewhere: --out=...")
    return old


def mean_loss(cfg, shards, teachers, described, machine):
    """Nats per token of the averaged logits on a split's chunks, chosen as train.py chooses them."""
    if shards.meta["tokenizer_sha256"] != described["tokenizer_sha256"]:
        sys.exit(f"error: {cfg.data_dir} has another tokenizer than {cfg.ckpt[0]}")
    block_size = min(teacher.cfg.block_size for teacher in teachers)
    need(cfg, seq_len=(0 < cfg.seq_len <= block_size, f"between 1 and the model's block_size={block_size}"))
    chunks = validation_chunks(cfg, shards, machine)
    return evaluate(partial(ensemble_logits, teachers), chunks, TrainConfig(seq_len=cfg.seq_len), machine)


# --- reading --------------------------------------------------------------------------------------

def read_folders(cfg, models, tokenizer, described):
    """{name: items} of the data folders."""
    if not cfg.data:
        return {}
    encode = encoder(cfg.rules, tokenizer, described, cfg.bos)
    # rotary positions go on past block_size, and today's rules let them; learned ones end there
    beyond = dict(llama=BEYOND) if RULES[cfg.rules].prefix == "tokenizer" else {}
    limit = min(max(m.cfg.block_size, beyond.get(m.cfg.arch, 0)) for m in models)
    folders = {os.path.basename(os.path.normpath(folder)): read_items(folder, cfg.rules, encode, limit)
               for folder in cfg.data}
    if len(folders) < len(cfg.data):
        sys.exit("error: two of the data folders have the same name")
    return folders


# --- scoring --------------------------------------------------------------------------------------

@torch.no_grad()
def log_probabilities(teachers, candidates, batch_tokens, title=""):
    """Of each candidate the sum of log p(token | all tokens before it) over its scored tokens, in nats. What
    candidates begin with alike is read once (lib/scoring.py)."""
    longest = max(len(c.ids) for c in candidates) - 1
    row_length = ROW * max(1, math.ceil(longest / ROW))
    n_rows = max(1, batch_tokens // row_length)
    make_room(teachers, longest)
    rows, places = plant(candidates, row_length)
    logp = []  # of each row's edges
    with tqdm(total=len(rows), desc=title, unit="row", disable=not sys.stderr.isatty()) as bar:
        for i in range(0, len(rows), n_rows):
            batch = flattened(rows[i:i + n_rows], row_length, n_rows, teachers[0].head.device)
            nodes, of_node = batch.nodes.unique(return_inverse=True)
            states = [teacher.body(batch.x, batch.positions, batch.mask).flatten(0, 1)[nodes]
                      for teacher in teachers]
            edges = edge_log_probabilities(teachers, states, of_node, batch.targets)
            logp += edges.split([len(row.edges) for row in rows[i:i + n_rows]])
            bar.update(n_rows)
    if not all(edges.isfinite().all() for edges in logp):
        sys.exit("error: the model gives scores that are not finite numbers")
    return [logp[row][edges].sum().item() for row, edges in map(places.__getitem__, candidates)]


def edge_log_probabilities(teachers, states, of_node, targets):
    """log p of tokens (E,), each after a place of_node (E,) in states (nodes, C). A CPU has the logits of
    HEAD nodes at a time: more do not stay in its cache."""
    n = HEAD if targets.device.type == "cpu" else max(1, len(targets))
    logp = torch.empty(len(targets), dtype=torch.float64)
    for i in range(0, len(states[0]), n):
        z = mean_logits(teachers, [s[i:i + n] for s in states])  # (up to n, V)
        here = (of_node >= i) & (of_node < i + n)
        node = of_node[here] - i
        logp[here.cpu()] = z[node, targets[here]].cpu().double() - z.logsumexp(-1)[node].cpu().double()
    return logp


def make_room(teachers, longest):
    """Let rotary positions go on to those of the longest text; refuse where learned ones end before it."""
    for teacher in teachers:
        if longest > teacher.cfg.block_size:
            if teacher.cfg.arch == "gpt2":
                sys.exit(f"error: a text of {longest} tokens, and the model has {teacher.cfg.block_size} "
                         "positions; the rules cut nothing: train it with a larger block_size")
            print(f"notice: texts of up to {longest} tokens, a block_size of {teacher.cfg.block_size}: "
                  "rotary positions go on, unseen in training")
            teacher.body.extend(longest)


def score_items(teachers, items, batch_tokens, title=""):
    """Of each item a list: the score of each candidate, in nats."""
    candidates = [c for item in items for c in item.candidates]
    logp = iter(log_probabilities(teachers, candidates, batch_tokens, title))

    def score(item, c):
        return next(logp) / (max(1, len(c.ids) - c.n_context) if item.per_token else 1)
    return [[score(item, c) for c in item.candidates] for item in items]


def choice(item, scores, rules):
    """What is chosen, and the points for it."""
    best = [i for i, score in enumerate(scores) if score == max(scores)]
    points = (item.right in best) / len(best) if rules.split_ties else float(best[0] == item.right)
    return best[0], points


def summary(items, scores, rules):
    """Accuracy, standard error and number of items per task, for the folder and per phenomenon. `right` of a
    task has a digit per item: 0, or k where the right one was among k best; `sha256` is the texts': what
    tools/compare.py needs."""
    points, shares = {}, {}
    for item, s in zip(items, scores):
        points.setdefault(item.task, []).append(choice(item, s, rules)[1])
        if item.share is not None:
            shares.setdefault(item.task, []).append((p_first(s), item.share))
    tasks = {task: dict(task_row(p), right="".join(str(round(1 / x) if x else 0) for x in p))
             for task, p in points.items()}
    for task, pairs in shares.items():
        tasks[task]["rho"] = spearman(*zip(*pairs))
    terms, of_task = {}, {item.task: item.phenomenon for item in items}
    for task, term in of_task.items():
        if rules.pooled and any(of_task.values()):
            term = term or task
        if term:  # two paradigms are s-selection in the data, argument structure in the BLiMP paper
            terms.setdefault("argument_structure" if term == "s-selection" else term, []).append(task)
    phenomena = {term: dict(task_row(sum((points[task] for task in names), [])) if rules.pooled
                            else mean_row([tasks[task] for task in names]), tasks=names)
                 for term, names in sorted(terms.items())}
    whole = mean_row(list((phenomena if rules.pooled and phenomena else tasks).values()))
    if shares:
        whole["rho"] = sum(tasks[task]["rho"] for task in shares) / len(shares)
    return dict(**whole, tasks=tasks, phenomena=phenomena, sha256=texts_sha256(items))


def texts_sha256(items):
    texts = json.dumps([(item.task, item.context, item.texts) for item in items])
    return hashlib.sha256(texts.encode()).hexdigest()


def p_first(scores):
    """P(the first of two), in float32 as officially: it is 0 or 1 at times, and those are ties."""
    return torch.tensor(scores, dtype=torch.float32).softmax(0)[0].item()


def spearman(a, b):
    """Correlation of ranks, equal values sharing the mean of theirs; 0 where one of both is constant."""
    def ranks(values):
        values = np.asarray(values)
        rank = np.array([(values < x).sum() + ((values == x).sum() - 1) / 2 for x in values])
        return rank - rank.mean()
    a, b = ranks(a), ranks(b)
    spread = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread else 0.0


def preferred(items, scores, rules):
    """uid -> the text preferred in each item, as the challenge's scorer reads it."""
    tasks = {}
    for item, s in zip(items, scores):
        rows = tasks.setdefault(item.uid, {"predictions": []})["predictions"]
        row = {"id": f"{item.uid}_{item.line}", "pred": item.texts[choice(item, s, rules)[0]]}
        rows.append(row if item.share is None else dict(row, prob=p_first(s)))
    return tasks


def json_line(item, scores):
    row = dict(task=item.uid, line=item.line, scores=scores)
    if len(scores) == 2:
        row.update(logp_good=scores[item.right], logp_bad=scores[1 - item.right])
    return json.dumps(row) + "\n"


def read_predictions(path):
    """What the gzipped JSON at `path` has: {} if there is no such file."""
    check_writable(path)
    if not os.path.exists(regular(path)):
        return {}
    try:
        with gzip.open(path) as f:
            there = parse_json(f.read())
        if not isinstance(there, dict) or not all(isinstance(tasks, dict) for tasks in there.values()):
            raise ValueError("not tasks by group")
        return there
    except (OSError, ValueError, EOFError, zlib.error) as e:
        sys.exit(f"error: {path} is no gzipped JSON of predictions to add to: {e}")


def add_predictions(path, groups):
    """Put folder -> task -> predictions into the gzipped JSON at `path`, beside what else it has."""
    names = {"blimp_filtered": "blimp", "supplement_filtered": "blimp_supplement", "ewok_filtered": "ewok"}
    there = read_predictions(path)
    with gzip.open(path + ".tmp", "wt", encoding="utf-8") as f:
        for group, tasks in groups.items():
            there.setdefault(names.get(group, group), {}).update(tasks)
        json.dump(there, f)
    os.replace(path + ".tmp", path)


def task_row(points):
    n = len(points)
    se = float(np.std(points, ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return dict(accuracy=sum(points) / n, se=se, n=n)


def mean_row(rows):
    """Unweighted mean accuracy over tasks, and the pipeline's pooled standard error:
    sqrt( sum (n_k - 1) n_k s_k^2 / (N - K) / N ), with n_k pairs in task k and N in all K."""
    N, K = sum(r["n"] for r in rows), len(rows)
    pooled = sum((r["n"] - 1) * r["n"] * r["se"] ** 2 for r in rows) / (N - K) / N if N > K else 0.0
    return dict(accuracy=sum(r["accuracy"] for r in rows) / K, se=math.sqrt(pooled), n=N)


def print_table(cfg, result):
    if cfg.data_dir:
        kind = "validation" if cfg.split == "val" else cfg.split
        print(f"{kind} loss on {cfg.data_dir}: {result[f'{cfg.split}_ce']:.4f} nats per token")

    def line(name, row, indent):
        value = f"{100 * row['accuracy']:6.2f} ± {100 * row['se']:.2f}"
        if "rho" in row:
            value = f"{row['rho']:6.2f} rank correlation with the share of people,"
        print(f"{' ' * indent}{name:<{58 - indent}} {value}  {row['n']:>6}")
    for name, folder in result["folders"].items():
        print(f"{name} by the rules of {cfg.rules}: accuracy in %, standard error, items")
        for task, row in folder["tasks"].items():
            line(task, row, 4)
        for phenomenon, row in folder["phenomena"].items():
            line(phenomenon, row, 2)
        line(f"{name}: {mean_title(folder, cfg.rules)}", folder, 0)


if __name__ == "__main__":
    launch(main, EvalConfig)
