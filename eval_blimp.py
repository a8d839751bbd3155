"""Score minimal pairs by the rules of the 2024 BabyLM pipeline: BLiMP, its supplement, EWoK.

    python eval_blimp.py --ckpt=out/babyllama --data=blimp_filtered,supplement_filtered,ewok_filtered
    python eval_blimp.py --ckpt=out/gpt2_705m,out/llama_360m --data=blimp_filtered   # an ensemble
    python eval_blimp.py --ckpt=out/gpt2_705m,out/llama_360m --data_dir=data/babylm  # its validation loss
    python -m tools.compare out/babyllama out/llama_58m              # runs scored before, side by side

A sentence's score is the sum of log-probabilities of the tokens of " " + sentence after one prefix
token (<s>; else </s>, else <pad>), in float32, over the whole vocabulary, nothing appended. An EWoK
line compares " " + Target1 and " " + Target2 after Context1, without a prefix. A pair is right if the good
sentence's score is at least the bad one's. A task is a .jsonl file; a folder's accuracy is the
unweighted mean over its tasks. Several checkpoints score as one: averaged logits.
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
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from distill import Teacher, ensemble_logits, mean_logits
from lib.checkpoints import load_ensemble, run_folder
from lib.configurator import launch, need
from lib.data import Batch, evaluate, validation_chunks
from lib.files import check_writable, parse_json, regular, write_json, write_lines
from lib.machine import Machine, can_compile, pick_device
from lib.shards import Shards
from lib.tokenizers import prefix_token
from train import TrainConfig


@dataclass
class EvalConfig:
    ckpt: tuple[str, ...] = ()   # run (its best checkpoint) or checkpoint folder; several: their ensemble
    data: tuple[str, ...] = ()   # folders of .jsonl files with the fields of FIELDS
    data_dir: str = ""           # prepared data: also the validation loss on it, as train.py measures it
    split: Literal["val", "test"] = "val"  # of that data
    seq_len: int = 128
    eval_chunks: int = 8192
    items: str = ""              # also write one JSON line per pair to this file
    predictions: str = ""        # also add what was preferred to this .json.gz, for the 2024 challenge
    out: str = ""                # where the result goes; '' = blimp.json in a single checkpoint's run folder
    batch_tokens: int = 1024     # positions scored at a time; a GPU wants more
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"     # auto: for 20,000 pairs and more
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 moves an average by about 0.1 at random


class Pair(NamedTuple):
    task: str
    line: int        # from 0
    good: list       # token ids, the first n_context of which have no score
    bad: list
    n_context: int
    context: str
    texts: tuple     # (good, bad) as scored, with the leading blank
    phenomenon: str  # '' where the file names none


FIELDS = (  # (good, bad, context or '') of a line: the first of these of which all are there
    ("sentence_good", "sentence_bad", ""),
    ("Target1", "Target2", "Context1"),
)


def main(cfg):
    if not cfg.ckpt or not (cfg.data or cfg.data_dir):
        sys.exit("error: say what to score on what: --ckpt=out/run --data=blimp_filtered")
    device = pick_device(cfg.device)
    models, tokenizer, described = load_ensemble(cfg.ckpt, device)
    teachers = [Teacher(m) for m in models]  # they score as one: averaged logits
    block_size = min(m.cfg.block_size for m in models)
    out = result_path(cfg)
    folders = read_folders(cfg, tokenizer, described, block_size)
    begin = time.perf_counter()
    many = sum(map(len, folders.values())) >= 20000
    if (cfg.compile == "on" or cfg.compile == "auto" and many) and can_compile(device):
        for m in models:
            m.model.compile_layers(dynamic=True)  # batches come in hundreds of shapes
    result = dict(ckpt=list(cfg.ckpt), step=described["step"], dtype=cfg.dtype, folders={})
    if cfg.data_dir:
        result[f"{cfg.split}_ce"] = mean_loss(cfg, teachers, block_size, described, device)
    items, predictions = [], {}
    for name, pairs in folders.items():
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            scores = score_pairs(teachers, pairs, cfg.batch_tokens, device, name)
        result["folders"][name] = summary(pairs, scores)
        predictions[name] = preferred(pairs, scores)
        items += [json.dumps(dict(task=pair.task, line=pair.line, logp_good=good, logp_bad=bad)) + "\n"
                  for pair, (good, bad) in zip(pairs, scores)]
    result["seconds"] = round(time.perf_counter() - begin, 1)
    if out:
        write_json(out, result)
    if cfg.items:
        write_lines(cfg.items, items)
    if cfg.predictions:
        add_predictions(cfg.predictions, predictions)
    print_table(cfg, result)  # last: what is written is safe from a closed pipe
    if out:
        print(f"written to {out}")


def result_path(cfg):
    """Where the result goes, '' for nowhere. Exits if that or another file asked for cannot be written."""
    out = cfg.out
    if not out and len(cfg.ckpt) == 1 and cfg.data:
        out = os.path.join(run_folder(cfg.ckpt[0]), "blimp.json")
    for path in filter(None, (out, cfg.items)):
        check_writable(path)
    if cfg.predictions:
        read_predictions(cfg.predictions)
    return out


def mean_loss(cfg, teachers, block_size, described, device):
    """Nats per token of the averaged logits on the split's chunks, chosen as train.py chooses them."""
    shards = Shards(cfg.data_dir, cfg.split)
    if shards.meta["tokenizer_sha256"] != described["tokenizer_sha256"]:
        sys.exit(f"error: {cfg.data_dir} has another tokenizer than {cfg.ckpt[0]}")
    need(cfg, seq_len=(0 < cfg.seq_len <= block_size, f"between 1 and the model's block_size={block_size}"))
    machine = Machine(device, bf16=cfg.dtype == "bfloat16")
    chunks = validation_chunks(cfg, shards, machine)
    return evaluate(partial(ensemble_logits, teachers), chunks, TrainConfig(seq_len=cfg.seq_len), machine)


# --- reading --------------------------------------------------------------------------------------

def read_folders(cfg, tokenizer, described, block_size):
    """{name: pairs} of the data folders."""
    if not cfg.data:
        return {}
    prefix = prefix_token(tokenizer)
    if described["bos"] == "none":
        print("notice: trained with bos=none: every sentence is scored after a token the model has never "
              "seen (prepare.py --bos=line avoids it)")
    folders = {os.path.basename(os.path.normpath(folder)): read_pairs(folder, tokenizer, prefix, block_size)
               for folder in cfg.data}
    if len(folders) < len(cfg.data):
        sys.exit("error: two of the data folders have the same name")
    return folders


def read_pairs(folder, tokenizer, prefix, block_size):
    """All pairs of the .jsonl files in `folder`, as tokens."""
    if not os.path.isdir(folder):
        sys.exit(f"error: no data folder '{folder}' (name the folder that holds the .jsonl files)")
    pairs = []
    for file in sorted(f for f in os.listdir(folder) if f.endswith(".jsonl")):
        path, task = os.path.join(folder, file), file.removesuffix(".jsonl")
        with open(regular(path), "rb") as f:
            for n, line in enumerate(f):
                where = f"error: {path}, line {n + 1}"
                try:
                    pair = read_pair(parse_json(line), task, n, tokenizer, prefix)
                except KeyError as e:
                    sys.exit(f"{where}: no field {e}")
                except (ValueError, TypeError, RuntimeError) as e:  # RuntimeError: half a surrogate pair
                    sys.exit(f"{where}: not a minimal pair in JSON ({e})")
                longest = max(len(pair.good), len(pair.bad))
                if longest > block_size + 1:
                    sys.exit(f"{where}: {longest - 1} tokens, the model has {block_size} positions")
                if not 0 < pair.n_context < min(len(pair.good), len(pair.bad)):
                    sys.exit(f"{where}: an empty context or sentence")
                pairs.append(pair)
    if not pairs:
        sys.exit(f"error: {folder} has no minimal pairs (.jsonl files with one JSON object a line)")
    return pairs


def read_pair(row, task, line, tokenizer, prefix):
    """A line's pair. With a context, the text is tokenised as a whole and cut where the tokens of the context
    alone would end."""
    if not isinstance(row, dict):
        raise TypeError("not an object")
    present = [names for names in FIELDS if set(filter(None, names)) <= row.keys()]
    good, bad, context = (present or FIELDS)[0]
    texts = (" " + row[good], " " + row[bad])
    before = row[context] if context else ""
    if context:
        ids, n_context = [tokenizer.encode(before + text) for text in texts], len(tokenizer.encode(before))
    else:
        ids, n_context = [[prefix] + tokenizer.encode(text) for text in texts], 1
    return Pair(task, line, *ids, n_context, before, texts, str(row.get("linguistics_term", "")))


# --- scoring --------------------------------------------------------------------------------------

@torch.no_grad()
def score_pairs(teachers, pairs, batch_tokens, device, title=""):
    """[(log-probability of good, of bad)] in nats, in the order of `pairs`."""
    length = [max(len(p.good), len(p.bad)) for p in pairs]
    # the longest first: padding stays small, and the memory it takes shows at once
    order = sorted(range(len(pairs)), key=length.__getitem__, reverse=True)
    scores = [None] * len(pairs)
    with tqdm(total=len(pairs), desc=title, unit="pair", disable=not sys.stderr.isatty()) as bar:
        while order:
            n = max(1, batch_tokens // max(1, 2 * length[order[0]]))
            batch, order = order[:n], order[n:]
            for i, score in zip(batch, pair_logp(teachers, [pairs[i] for i in batch], device)):
                scores[i] = score
            bar.update(len(batch))
    if not all(math.isfinite(s) for pair in scores for s in pair):
        sys.exit("error: the model gives scores that are not finite numbers")
    return scores


def pair_logp(teachers, pairs, device):
    """[(good, bad)], each the sum of log p(token | the tokens before) of the sentence after its context, in
    nats. What both begin with is predicted once."""
    sentences = [p.good for p in pairs] + [p.bad for p in pairs]
    length = torch.tensor([len(ids) - 1 for ids in sentences])[:, None]
    tokens = torch.zeros(len(sentences), length.max() + 1, dtype=torch.int64)  # padded on the right
    for row, ids in zip(tokens, sentences):
        row[:len(ids)] = torch.tensor(ids)
    x, y = tokens[:, :-1], tokens[:, 1:]  # (B, T)
    position = torch.arange(y.shape[1])
    first = torch.tensor([p.n_context - 1 for p in pairs] * 2)[:, None]
    good, bad = tokens.chunk(2)
    both = position < length.view(2, -1, 1).amin(0)          # 0 may be padding or a token
    shared = (good == bad).cumprod(1)[:, 1:].bool() & both   # (pairs, T)
    mask = (position >= first) & (position < length) & ~torch.cat([torch.zeros_like(shared), shared])
    scored, target, batch = mask.to(device), y[mask].to(device), Batch(x.to(device))
    states = [teacher.states(batch)[scored] for teacher in teachers]
    z = mean_logits(teachers, states)  # (scored positions, V)
    logp = torch.zeros(mask.shape, dtype=torch.float64)
    logp[mask] = -F.cross_entropy(z, target, reduction="none").double().cpu()
    good, bad = logp.chunk(2)
    bad = torch.where(shared, good, bad)
    return list(zip(good.sum(1).tolist(), bad.sum(1).tolist()))


def summary(pairs, scores):
    """Accuracy, standard error and number of pairs per task, for the folder and per phenomenon. `right` of a
    task has a digit per pair, `sha256` the sentences': what tools/compare.py needs."""
    right = {}
    for pair, (good, bad) in zip(pairs, scores):
        right.setdefault(pair.task, []).append(good >= bad)  # a tie is right, as in the official pipeline
    tasks = {task: dict(task_row(sum(answers), len(answers)), right="".join(str(int(x)) for x in answers))
             for task, answers in right.items()}
    phenomena = {}
    for task, phenomenon in {p.task: p.phenomenon for p in pairs}.items():
        if phenomenon:  # two paradigms are s-selection in the data, argument structure in the BLiMP paper
            name = "argument_structure" if phenomenon == "s-selection" else phenomenon
            phenomena.setdefault(name, []).append(tasks[task])
    sentences = json.dumps([(p.task, p.context, p.texts) for p in pairs])
    return dict(**mean_row(list(tasks.values())), tasks=tasks,
                phenomena={name: mean_row(rows) for name, rows in sorted(phenomena.items())},
                sha256=hashlib.sha256(sentences.encode()).hexdigest())


def preferred(pairs, scores):
    """task -> the text preferred in each pair, as the challenge's scorer reads it."""
    tasks = {}
    for pair, (good, bad) in zip(pairs, scores):
        rows = tasks.setdefault(pair.task, {"predictions": []})["predictions"]
        rows.append({"id": f"{pair.task}_{len(rows)}", "pred": pair.texts[0 if good >= bad else 1]})
    return tasks


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


def task_row(right, n):
    p = right / n
    return dict(accuracy=p, se=math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0, n=n)


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
        print(f"{' ' * indent}{name:<{58 - indent}} {100 * row['accuracy']:6.2f} ± {100 * row['se']:.2f}  "
              f"{row['n']:>6}")
    for name, folder in result["folders"].items():
        print(f"{name + ': accuracy in %, standard error, pairs':<58}")
        for task, row in folder["tasks"].items():
            line(task, row, 4)
        for phenomenon, row in folder["phenomena"].items():
            line(phenomenon, row, 2)
        line(f"{name}: mean of {len(folder['tasks'])} tasks", folder, 0)


if __name__ == "__main__":
    launch(main, EvalConfig)
