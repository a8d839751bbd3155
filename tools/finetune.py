"""Fine-tune on (Super)GLUE by the rules of the 2024 BabyLM pipeline.

    python -m tools.finetune --ckpt=out/babyllama --data=glue_filtered --tasks=rte,wsc --seeds=12,13,14
    python -m tools.finetune config/glue/babyllama2.py --ckpt=out/babyllama2        # a paper's settings for each task
    python -m tools.finetune config/glue/lora.py --ckpt=out/a,out/b --tasks=rte     # LoRA; several: one model of averaged logits

A text is its tokens, a pair the tokens of both one after the other: no <s>, no separator. Pairs longer than
max_length lose tokens at the end of the longer text. A head without bias reads the final hidden state of the last
token. The best epoch, chosen on the validation set that the scores are also on, counts: official, and
optimistic. results.json in out_dir is skipped where it has a task and seed already.

Shapes: B texts, T tokens of the longest, K labels.
"""
import glob
import hashlib
import json
import math
import os
import re
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, get_type_hints

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import config
import disk
from eval_blimp import add_predictions, load_ensemble, read_predictions
from model import LanguageModel
from train import LoopConfig, Run, check_loop_config, start_machine, train


@dataclass
class FinetuneConfig(LoopConfig):
    ckpt: tuple[str, ...] = ()     # run or checkpoint folder; several: all trained as one model of averaged logits
    data: str = "glue_filtered"    # folder of <task>.train.jsonl and <task>.valid.jsonl, or of a folder for each task
    tasks: tuple[str, ...] = ()    # cola, sst2, mrpc, qqp, mnli (and mnli-mm with it), qnli, rte, boolq, multirc, wsc
    per_task: tuple[str, ...] = () # "rte --epochs=3 --batch_size=2": what holds for one task alone
    seeds: tuple[str, ...] = ("12",)
    out_dir: str = "out/glue"
    max_length: int = 128          # tokens
    lora_rank: int = 0             # 0 = all weights are trained; else adapters of this rank, and the head
    lora_alpha: float = 16.0
    lora_dropout: float = 0.1
    warmup_share: float = 0.0      # of all steps, in the place of warmup_iters
    formats: Literal["full", "lora"] = "full"  # how multirc and wsc read: the pipeline's two scripts differ
    select: Literal["score", "loss"] = "score" # best epoch: binary F1 (accuracy with three labels), or validation loss
    predictions: str = ""          # also add the first seed's predictions to this .json.gz, as the 2024 challenge takes them
    keep_model: bool = False       # also write the fine-tuned weights
    # the pipeline's defaults
    learning_rate: float = 5e-5
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    warmup_iters: int = 0
    batch_size: int = 64
    epochs: int = 10
    patience: int = 3              # validations without a gain of 0.001
    eval_interval: int = 0         # validate after each epoch; the 2023 pipeline: 200 steps
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"


# task: (first text, second text, metric that is reported), texts as templates over a line's fields
TASKS = {
    "cola": ("{sentence}", "", "mcc"),
    "sst2": ("{sentence}", "", "accuracy"),
    "mrpc": ("{sentence1}", "{sentence2}", "f1"),
    "qqp": ("{question1}", "{question2}", "f1"),
    "mnli": ("{premise}", "{hypothesis}", "accuracy"),
    "mnli-mm": ("{premise}", "{hypothesis}", "accuracy"),
    "qnli": ("{question}", "{sentence}", "accuracy"),
    "rte": ("{sentence1}", "{sentence2}", "accuracy"),
    "boolq": ("{question}", "{passage}", "accuracy"),
    "multirc": ("Question: {question} Answer: {answer}", "{paragraph}", "accuracy"),
    "wsc": ('Does "{span2_text}" refer to "{span1_text}" in this passage?', "{text}", "accuracy"),
}
LORA_FORMATS = {
    "multirc": ("{paragraph}", "{question} {answer}", "accuracy"),
    "wsc": ("{text}", 'Does "{span2_text}" refer to "{span1_text}"?', "accuracy"),
}


def main(cfg):
    check(cfg)
    models, tokenizer, _ = load_ensemble(cfg.ckpt, torch.device("cpu"))
    block_size = min(m.cfg.block_size for m in models)
    del models
    plan = [(task, task_config(cfg, task, seed)) for task in cfg.tasks for seed in cfg.seeds]
    for task, own in plan[::len(cfg.seeds)]:  # mistakes show before the first is trained
        check(own)
        if own.max_length > block_size:
            sys.exit(f"error: max_length={own.max_length} is longer than the model's block_size={block_size}")
        _, labels = read_examples(own, task, "train", tokenizer)
        for name in scored_on(own, task):
            read_examples(own, name, "valid", tokenizer, labels)
    if cfg.predictions:
        read_predictions(cfg.predictions)
    os.makedirs(cfg.out_dir, exist_ok=True)
    disk.lock(cfg.out_dir)
    path = os.path.join(cfg.out_dir, "results.json")
    results = read_results(path)
    for task, own in plan:
        identity, seed = identity_sha256(own, task), str(own.seed)
        done = results.get(task, {}).get(seed)
        if done and done["identity_sha256"] != identity and not cfg.overwrite:
            sys.exit(f"error: {path} has {task}, seed {seed}, with other settings, weights or data; name another --out_dir, or use --overwrite for these tasks")
        if not done or cfg.overwrite:
            print(f"\n=== {task}, seed {seed}", flush=True)
            scores, predicted, interrupted = finetune(own, task, cfg.ckpt, tokenizer)
            disk.write_json(os.path.join(own.out_dir, "predictions.json"), predicted)
            for name, score in scores.items():  # mnli brings mnli-mm
                results.setdefault(name, {})[seed] = dict(identity_sha256=identity, **score)
            disk.write_json(path, results)
            if interrupted:
                sys.exit(f"stopped by a signal; {task}, seed {seed} is done, the same command goes on")
    if cfg.predictions:
        for task, own in plan[::len(cfg.seeds)]:
            add_predictions(cfg.predictions, {"glue": disk.read_json(os.path.join(own.out_dir, "predictions.json"))})
    seeds = {str(own.seed) for _, own in plan}
    table({name: {seed: results[name][seed] for seed in seeds if seed in results[name]} for task in cfg.tasks for name in scored_on(cfg, task)})


def check(cfg):
    """Exit with one line if the settings cannot be meant."""
    check_loop_config(cfg)
    if not cfg.ckpt or not cfg.tasks:
        sys.exit("error: say which model learns what: --ckpt=out/run --tasks=rte,wsc")
    for task in cfg.tasks:
        if task not in TASKS or task == "mnli-mm":
            sys.exit(f"error: tasks: no task '{task}'; there are {', '.join(t for t in TASKS if t != 'mnli-mm')} (mnli brings mnli-mm)")
    config.check_seeds(cfg.seeds)
    for key, good, wanted in (("seeds", cfg.seeds, "one or more"), ("max_length", cfg.max_length > 0, "at least 1"),
                              ("resume", not cfg.resume, "False: the same command goes on with the tasks and seeds that are missing"),
                              ("lora_dropout", cfg.lora_dropout < 1, "below 1"), ("warmup_share", cfg.warmup_share < 1, "below 1")):
        if not good:
            sys.exit(f"error: {key}={getattr(cfg, key)} must be {wanted}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit("error: finetune.py runs in one process; start it without torchrun")


def task_config(cfg, task, seed):
    """cfg with what per_task says of the task."""
    types, values = get_type_hints(FinetuneConfig), {}
    for line in cfg.per_task:
        name, *flags = line.split() or [""]
        if name not in TASKS or name == "mnli-mm" or not all(flag.startswith("--") and "=" in flag for flag in flags):
            sys.exit(f"error: per_task: '{line}' is not 'task --key=value ...'")
        for key, _, text in (flag[2:].partition("=") for flag in flags if name == task):
            if key in NOT_PER_TASK or key == "seed" and len(cfg.seeds) > 1:
                sys.exit(f"error: per_task '{line}': {key} cannot be set for one task alone" + " where there are several seeds" * (key == "seed"))
            values[key] = config.checked(types, key, config.parsed(types, key, text), f"per_task '{line}'")
    values.setdefault("seed", int(seed))
    return replace(cfg, **values, out_dir=os.path.join(cfg.out_dir, f"{task}_{values['seed']}"), overwrite=True)


NOT_PER_TASK = ("ckpt", "data", "tasks", "per_task", "seeds", "out_dir", "predictions", "resume", "overwrite")


def identity_sha256(cfg, task):
    """One hash for the settings, weights and texts that a result follows from."""
    settings = asdict(cfg)
    for key in (*NOT_PER_TASK, "device", "wandb", "tensorboard", "log_interval", "keep_model"):  # where and how, not what
        del settings[key]
    files = [f for name, split in ((task, "train"), *((name, "valid") for name in scored_on(cfg, task))) for f in find_files(cfg, name, split)]
    return hashlib.sha256(json.dumps([settings, list(map(disk.weights_sha256, cfg.ckpt)), list(map(disk.sha256, files))]).encode()).hexdigest()


def scored_on(cfg, task):
    """The tasks that a task's model is scored on."""
    return [task, "mnli-mm"] if task == "mnli" and find_files(cfg, "mnli-mm", "valid") else [task]


def read_results(path):
    """task -> seed -> scores, as far as there are any."""
    results = disk.read_json(path) if os.path.isfile(path) else {}
    try:
        for task, rows in results.items():
            for row in rows.values():
                row["identity_sha256"], float(row[TASKS[task][2]])
    except (KeyError, TypeError, AttributeError, ValueError):
        sys.exit(f"error: {path} is damaged; repair it, or name another --out_dir")
    return results


def finetune(cfg, task, paths, tokenizer):
    """Train on one task with one seed: {task: scores} and {task: predictions} of the best epoch, and whether a signal came at the end."""
    device, bf16 = start_machine(cfg)
    examples, labels = read_examples(cfg, task, "train", tokenizer)
    valid, _ = read_examples(cfg, task, "valid", tokenizer, labels)
    torch.manual_seed(cfg.seed)  # before the heads are made
    model, *others = [classifier(disk.load_checkpoint(path)[0], len(labels)).to(device) for path in paths]
    if cfg.lora_rank:
        for m in (model, *others):
            add_lora(m, cfg)
    ensemble = nn.ModuleList(others) if others else None
    data = Examples(cfg, examples, valid, partial(logits, others=ensemble), bf16, device)
    if cfg.warmup_share:
        cfg = replace(cfg, warmup_iters=math.ceil(cfg.warmup_share * data.total))
    run = Run(device, rank=0, world=1, micro_batch=cfg.batch_size, bf16=bf16, compile=False, shards=None, val=None)
    print(f"{len(examples):,} texts to train on, {len(valid):,} to validate, {len(labels)} labels; {data.total:,} steps of {cfg.batch_size} at most", flush=True)
    train(cfg, run, partial(classification_loss, others=ensemble), ensemble, model=model, data=data)
    model.companion = None
    for m, state in zip((model, *others), data.best_weights):
        m.load_state_dict(state)
        m.eval()
    scores, predicted = {task: data.best_scores}, {task: listed(task, data.best_predictions, labels)}
    if "mnli-mm" in scored_on(cfg, task):
        mismatched, _ = read_examples(cfg, "mnli-mm", "valid", tokenizer, labels)
        scores["mnli-mm"], found = Examples(cfg, examples, mismatched, data.logits, bf16, device).scores(model)
        predicted["mnli-mm"] = listed("mnli-mm", found, labels)
    if cfg.keep_model:
        for i, (m, path) in enumerate(zip((model, *others), paths)):
            described = disk.read_checkpoint_config(disk.find_checkpoint(path))
            del described["format_version"]
            described.update(model=asdict(m.cfg), parameters=m.n_params(), finetuned=task, labels=labels, scores=scores, train_config=asdict(cfg))
            disk.save_checkpoint(cfg.out_dir, f"member_{i}", m, described, os.path.join(disk.find_checkpoint(path), described["tokenizer"]))
    return scores, predicted, data.interrupted


# --- the model --------------------------------------------------------------------------------------

def classifier(model, n_labels):
    """A language model with a new head of `n_labels` rows in the place of its own; its body is kept."""
    new = LanguageModel(replace(model.cfg, n_labels=n_labels, tie_weights=False))
    new.model = model.model
    return new.train()


def logits(model, batch, others=None):
    """(B, K) of the last token of each text, the mean over the models."""
    head_loss = lambda h, head: head(h[torch.arange(len(h), device=h.device), batch.last]).float()
    members = [m(batch.x, head_loss) for m in (model, *(others or ()))]
    return sum(members) / len(members)


def classification_loss(model, batch, cfg, run, others):
    return F.cross_entropy(logits(model, batch, others), batch.y), {}


class LoRALinear(nn.Linear):
    """A frozen linear layer and an adapter: x W^T + (alpha / r) dropout(x) A^T B^T, with A (r, in), B (out, r).
    Its state_dict has the sum as `weight`, so that checkpoints are plain ones."""

    def __init__(self, base, rank, alpha, dropout):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.a = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as PEFT does
        self.scale, self.drop = alpha / rank, nn.Dropout(dropout)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(self.drop(x), self.a), self.b) * self.scale

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = (self.weight + self.scale * self.b @ self.a).detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        with torch.no_grad():
            self.weight.copy_(state_dict[prefix + "weight"])  # has the adapter in it
            self.b.zero_()
            if self.bias is not None:
                self.bias.copy_(state_dict[prefix + "bias"])


def add_lora(model, cfg):
    """Freeze all but the head, and adapt what PEFT does by default: queries and values; GPT-2's keys too, which are fused with them
    there (in PEFT the three share one A)."""
    model.model.requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj") if model.cfg.arch == "llama" else ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, LoRALinear(getattr(layer.self_attn, name), cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout))


# --- the texts --------------------------------------------------------------------------------------

class Example(NamedTuple):
    ids: list
    label: int  # place among the labels


class ExampleBatch(NamedTuple):
    x: torch.Tensor     # (B, T) token ids, padded on the right, which a causal model does not see
    last: torch.Tensor  # (B,) position of each text's last token
    y: torch.Tensor     # (B,) labels


class Examples:
    """What the loop sees of a task: batches, each epoch in a new order, and the validation."""

    def __init__(self, cfg, examples, valid, logits, bf16, device):
        self.cfg, self.examples, self.valid, self.logits, self.bf16, self.device = cfg, examples, valid, logits, bf16, device
        self.steps_per_epoch = math.ceil(len(examples) / cfg.batch_size)
        total = cfg.epochs * self.steps_per_epoch
        self.total = min(total, cfg.max_iters) if cfg.max_iters else total
        self.n_labels = len({e.label for e in examples})
        self.best, self.of = math.inf, None
        self.validation = "validation loss" if cfg.select == "loss" else f"1 - {'F1' if self.n_labels == 2 else 'accuracy'}"

    def batch(self, step, micro_step):
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.of:
            self.of, self.order = epoch, np.random.default_rng([self.cfg.seed, epoch]).permutation(len(self.examples))
        return to_batch([self.examples[i] for i in self.order[position * self.cfg.batch_size:(position + 1) * self.cfg.batch_size]], self.device)

    def epoch(self, step):
        return step / self.steps_per_epoch

    def seen(self, step):
        epochs, steps = divmod(step, self.steps_per_epoch)
        return "texts", epochs * len(self.examples) + steps * self.cfg.batch_size

    def validate(self, model):
        """What the best epoch has least of, then the scores; keeps the best epoch's weights and predictions."""
        scores, predicted = self.scores(model)
        loss = scores["val_ce"] if self.cfg.select == "loss" else 1 - scores["f1" if self.n_labels == 2 else "accuracy"]
        if loss < self.best:
            self.best, self.best_scores, self.best_predictions = loss, scores, predicted
            self.best_weights = [{k: v.detach().cpu().clone() for k, v in m.state_dict().items() if not k.startswith("companion.")}
                                 for m in (model, *(model.companion or ()))]
        return {"val_loss": loss, **scores}

    @torch.no_grad()
    def scores(self, model):
        """Scores on the validation texts, and the label predicted for each."""
        z, y = [], []
        for m in (model, *(model.companion or ())):
            m.eval()
        for i in range(0, len(self.valid), 64):
            batch = to_batch(self.valid[i:i + 64], self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                z.append(self.logits(model, batch).cpu())
            y.append(batch.y.cpu())
        for m in model.companion or ():
            m.train()
        z, y = torch.cat(z), torch.cat(y)
        predicted = z.argmax(-1)
        return dict(val_ce=F.cross_entropy(z, y).item(), **metrics(predicted.numpy(), y.numpy(), z.shape[1])), predicted.tolist()


def metrics(predicted, y, n_labels):
    """Accuracy; with two labels also F1 of label 1 and Matthews' correlation."""
    scores = dict(accuracy=float((predicted == y).mean()))
    if n_labels == 2:
        tp, tn, fp, fn = (float(((predicted == p) & (y == t)).sum()) for p, t in ((1, 1), (0, 0), (1, 0), (0, 1)))
        scores["f1"] = 2 * tp / (2 * tp + fp + fn) if tp else 0.0
        spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        scores["mcc"] = (tp * tn - fp * fn) / math.sqrt(spread) if spread else 0.0
    return scores


def to_batch(examples, device):
    x = torch.zeros(len(examples), max(len(e.ids) for e in examples), dtype=torch.int64)
    for row, e in zip(x, examples):
        row[:len(e.ids)] = torch.tensor(e.ids)
    last = torch.tensor([len(e.ids) - 1 for e in examples])
    return ExampleBatch(x.to(device), last.to(device), torch.tensor([e.label for e in examples]).to(device))


def find_files(cfg, task, split):
    """<task>.<split>.jsonl in the data folder or in its subfolder, or the parts <task>.<split>.*.jsonl."""
    found = [files for folder in (cfg.data, os.path.join(cfg.data, task)) for ending in (".jsonl", ".*.jsonl")
             if (files := sorted(glob.glob(os.path.join(glob.escape(folder), f"{task}.{split}{ending}"))))]
    if len(found) > 1:
        sys.exit(f"error: {task}'s {split} texts are in two places, {found[0][0]} and {found[1][0]}; leave one")
    return found[0] if found else []


def read_examples(cfg, task, split, tokenizer, labels=None):
    """A task's texts as tokens, and its labels (those of the training texts, sorted)."""
    files = find_files(cfg, task, split)
    if not files:
        sys.exit(f"error: no {task}.{split}.jsonl in '{cfg.data}' or '{os.path.join(cfg.data, task)}'")
    first, second, _ = (LORA_FORMATS if cfg.formats == "lora" else {}).get(task, TASKS[task])
    rows = []
    for file in files:
        with open(file, "rb") as f:
            for n, line in enumerate(f):
                try:
                    row = json.loads(line.decode("utf-8"))
                    for name in re.findall(r"{(\w+)}", first + second):
                        if not isinstance(row[name], str):
                            raise TypeError(f"{name} is {row[name]!r}")
                    if not isinstance(row["label"], (int, str)):
                        raise TypeError(f"label is {row['label']!r}")
                    ids = truncated(*(tokenizer.encode(text.format(**row)) for text in (first, second)), cfg.max_length)
                    rows.append((ids or [tokenizer.pad or 0], row["label"]))
                except KeyError as e:
                    sys.exit(f"error: {file}, line {n + 1}: no field {e}")
                except (ValueError, TypeError, RuntimeError) as e:
                    sys.exit(f"error: {file}, line {n + 1}: not a text with a label in JSON ({e})")
    if not rows:
        sys.exit(f"error: {files[0]} is empty")
    try:
        labels = sorted({label for _, label in rows}) if labels is None else labels
    except TypeError:
        sys.exit(f"error: {files[0]}: labels of several types")
    unknown = next((label for _, label in rows if label not in labels), None)
    if unknown is not None or len(labels) < 2:
        sys.exit(f"error: {files[0]}: " + (f"label {unknown!r} is not one of the training texts' {labels}" if unknown is not None else "fewer than two labels"))
    return [Example(ids, labels.index(label)) for ids, label in rows], labels


def truncated(a, b, length):
    """Two lists of tokens as one of at most `length`, tokens taken from the end of the longer list first."""
    if len(a) + len(b) <= length:
        return a + b
    short = min(len(a), len(b), length // 2)
    return a[:length - short] + b[:short] if len(a) > len(b) else a[:short] + b[:length - short]


# --- what is written --------------------------------------------------------------------------------

def listed(task, predicted, labels):
    return {"predictions": [{"id": f"{task}_{i}", "pred": labels[p]} for i, p in enumerate(predicted)]}


def table(results):
    """A row a task: mean and standard deviation over seeds of what is reported."""
    print("\n| task | metric | seeds | mean, % | standard deviation |\n|---|---|---:|---:|---:|")
    means = []
    for task in (t for t in TASKS if results.get(t)):
        scores = [100 * row[TASKS[task][2]] for row in results[task].values()]
        means.append(statistics.mean(scores))
        print(f"| {task} | {TASKS[task][2]} | {len(scores)} | {means[-1]:.1f} | {f'{statistics.stdev(scores):.1f}' if scores[1:] else ''} |")
    print(f"| mean of {len(means)} tasks (the official score has {len(TASKS)}) | | | {statistics.mean(means):.1f} | |")


if __name__ == "__main__":
    config.run(main, FinetuneConfig)
