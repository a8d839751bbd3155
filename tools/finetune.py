"""Fine-tune on (Super)GLUE and MSGS by the rules of the BabyLM pipelines of 2023 to 2026.

    python -m tools.finetune --ckpt=out/babyllama --data=glue_filtered --rules=2026   # all as it is official
    python -m tools.finetune --ckpt=out/babyllama --data=glue_filtered --tasks=rte,wsc --seeds=12,13,14
    python -m tools.finetune config/glue/babyllama2.py --ckpt=out/babyllama2  # a paper's settings, by task
    python -m tools.finetune config/glue/lora.py --ckpt=out/a,out/b           # LoRA; averaged logits
    python -m tools.finetune config/glue/msgs_babyllama.py --ckpt=out/babyllama --data=msgs_filtered

A text is its tokens, a pair the tokens of both one after the other, without a separator; since 2025 <s>
comes before each where training had it. Pairs longer than max_length lose tokens at the end of the longer
text. A head reads the final hidden state of the last token (2025: of the first). The best epoch, chosen on
the validation set that the scores are also on, counts: official, and optimistic. What results.json in out_dir
has is not done again; it must be of the same settings, weights and texts.

MSGS asks what a model generalises by. While it is trained, a linguistic and a surface feature of a sentence
agree; in the rows of `condition` "test" they do not, and the label is the linguistic one. Only these rows are
reported, as Matthews' correlation times 100: +100 goes by the linguistic feature, -100 by the surface one.
The best epoch is chosen on all rows. Controls have one feature alone, and are to be near +100.

The defaults below are those of 2024. Other --rules have others (RULES in lib/glue.py). Config files and flags
win over both, and what they change is named where the scores are printed.
"""
import json
import math
import os
import pathlib
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F

from eval_blimp import add_predictions, read_predictions
from lib.checkpoints import (
    find_checkpoint,
    load_checkpoint,
    load_ensemble,
    read_checkpoint_config,
    save_checkpoint,
    weights_sha256,
)
from lib.classifiers import Ensemble, add_lora, classifier, mlp_classifier
from lib.configurator import check_seeds, checked, differences, launch, need, non_defaults, parsed
from lib.files import check_writable, lock, parse_json, read_json, sha256, write_json, write_lines
from lib.glue import GLUE, MSGS, RULES, TASKS, TRAIN_TEXTS, find_files, read_examples, read_results
from lib.machine import start_machine
from lib.runs import Keeper
from lib.scoring import added_bos
from model import Experts
from train import LoopConfig, Trainee, check_loop_config, train


@dataclass
class FinetuneConfig(LoopConfig):
    rules: Literal["2023", "2024", "2025", "2026"] = "2024" # whose head, tokens, batches, choice of the best
    ckpt: tuple[str, ...] = ()     # run or checkpoint folder; several: trained as one, of averaged logits
    data: str = "glue_filtered"    # folder of <task>.train.jsonl and <task>.valid.jsonl, or one for each task
    #                                the names of 2023 and of MSGS itself, too (`places` in lib/glue.py)
    tasks: tuple[str, ...] = ()    # cola sst2 mrpc qqp mnli (mnli-mm with it; 2023: alone) qnli rte boolq
    #                                multirc wsc; MSGS's, such as main_verb_control
    per_task: tuple[str, ...] = () # "rte --epochs=3 --batch_size=2": what holds for one task alone
    seeds: tuple[str, ...] = ("12",)
    out_dir: str = "out/glue"
    max_length: int = 128          # tokens
    bos: Literal["auto", "yes", "no"] = "auto" # <s> before each text. auto: since 2025, if training had it
    lora_rank: int = 0             # 0 = all weights are trained; else adapters of this rank, and the head
    lora_alpha: float = 16.0
    lora_dropout: float = 0.1
    warmup_share: float = 0.0      # of all steps, in the place of warmup_iters
    warmup_from_0: bool = False    # the first step has rate 0
    min_lr_share: float = 0.0      # of learning_rate, in the place of min_lr
    decay_all: bool = False        # weight_decay on biases and norms too
    formats: Literal["full", "lora"] = "full"  # how multirc and wsc read: the pipeline's two scripts differ
    select: Literal["score", "loss"] = "score" # the best epoch: score by the rules, or validation loss
    predictions: str = ""          # also add the first seed's to this .json.gz of 2024, or .json of 2023
    keep_model: bool = False       # also write the fine-tuned weights
    # the pipeline's defaults
    learning_rate: float = 5e-5
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    warmup_iters: int = 0
    batch_size: int = 64
    epochs: int = 10
    patience: int = 3              # validations without a gain of 0.001
    eval_interval: int = 0         # validate after each epoch; the 2023 pipeline: 200 steps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"

    @classmethod
    def from_given(cls, **given):
        """The settings that are given, the others as the rules have them."""
        settings = RULES[given.get("rules", cls.rules)].settings
        by_task = [line for line in settings.get("per_task", ()) if not any(f"--{k}=" in line for k in given)]
        return cls(**{**settings, **given, "per_task": (*by_task, *given.get("per_task", ()))})


def main(cfg):
    check(cfg)
    models, tokenizer, described = load_ensemble(cfg.ckpt, torch.device("cpu"))
    shapes = [model.cfg for model in models]
    del models
    cfg = with_bos_decided(cfg, described, tokenizer)
    plan = [(task, task_config(cfg, task, seed)) for task in dict.fromkeys(cfg.tasks) for seed in cfg.seeds]
    with_first_seed = plan[::len(cfg.seeds)]
    look_ahead(cfg, with_first_seed, tokenizer, shapes)
    if cfg.predictions:
        (read_lines if cfg.rules == "2023" else read_predictions)(cfg.predictions)
    os.makedirs(cfg.out_dir, exist_ok=True)
    lock(cfg.out_dir)
    path = os.path.join(cfg.out_dir, "results.json")
    check_writable(path)
    results = read_results(path)
    for task, task_cfg in plan if cfg.overwrite else without_result(plan, results, path):
        seed, origin = str(task_cfg.seed), origin_of(task_cfg, task)
        print(f"\n=== {task}, seed {seed}, rules of {cfg.rules}", flush=True)
        replaced = [results.get(name, {}).pop(seed, None) for name in scored_on(cfg, task)]
        if any(replaced):
            write_json(path, results)  # first: what it was of is deleted as training begins
        scores, predicted, interrupted = finetune(task_cfg, task, tokenizer)
        write_json(os.path.join(task_cfg.out_dir, "predictions.json"), predicted)
        for name, score in scores.items():  # mnli brings mnli-mm
            results.setdefault(name, {})[seed] = {"rules": cfg.rules, **origin, **score}
        write_json(path, results)
        if interrupted:
            goes_on = ("--overwrite with the --tasks and --seeds that are left goes on" if cfg.overwrite else
                       "the same command goes on")
            sys.exit(f"stopped by a signal; {task}, seed {seed} is done, {goes_on}")
    if cfg.predictions:
        for task, task_cfg in with_first_seed:
            predicted = read_json(os.path.join(task_cfg.out_dir, "predictions.json"))
            if cfg.rules == "2023":
                add_lines(cfg.predictions, predicted)
            else:
                add_predictions(cfg.predictions, {"msgs" if task in MSGS else "glue": predicted})
    rows = {}
    for task, task_cfg in plan:
        for name in scored_on(cfg, task):
            if row := results.get(name, {}).get(str(task_cfg.seed)):
                rows.setdefault(name, {})[str(task_cfg.seed)] = row
    table(rows, cfg)


def check(cfg):
    """Exit with one line if the settings cannot be meant."""
    check_loop_config(cfg)
    if not cfg.ckpt or not cfg.tasks:
        sys.exit("error: say which model learns what: --ckpt=out/run --tasks=rte,wsc")
    rules = RULES[cfg.rules]
    known = [task for task in rules.tasks if task != "mnli-mm" or rules.mismatched == "trained"]
    for task in cfg.tasks:
        if task not in known and task not in MSGS:
            sys.exit(f"error: tasks: no task '{task}' in {cfg.rules}; there are {', '.join(known)}"
                     + " (mnli brings mnli-mm)" * (rules.mismatched == "scored")
                     + f", and MSGS's {', '.join(MSGS)}")
    check_seeds(cfg.seeds)
    need(cfg,
         seeds=(cfg.seeds, "one or more"),
         formats=(cfg.formats == "full" or not MSGS.keys() & set(cfg.tasks),
                  "full for MSGS, which the LoRA script does not know"),
         max_length=(cfg.max_length > (0 if cfg.rules < "2025" else 2), "at least 1 (since 2025: 3)"),
         bos=(cfg.bos == "auto" or cfg.rules >= "2025", f"auto: those of {cfg.rules} have no <s>"),
         predictions=(not cfg.predictions or cfg.rules < "2025",
                      f"left out by the rules of {cfg.rules}: out_dir has a predictions.json of each task"),
         keep_model=(not cfg.keep_model or rules.head == "linear",
                     f"False by the rules of {cfg.rules}: no checkpoint has their head"),
         min_lr_share=(not (cfg.min_lr_share and cfg.min_lr), f"0 where min_lr={cfg.min_lr}"),
         resume=(not cfg.resume, "False: the same command goes on with the tasks and seeds that are missing"),
         lora_dropout=(cfg.lora_dropout < 1, "below 1"),
         warmup_share=(cfg.warmup_share < 1 and not (cfg.warmup_share and cfg.warmup_iters),
                       f"below 1, and 0 where warmup_iters={cfg.warmup_iters} is not 0"))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit("error: tools.finetune runs in one process; start it without torchrun")


def with_bos_decided(cfg, described, tokenizer):
    """cfg with yes or no for auto: whether <s> stood before the lines or documents trained on."""
    if cfg.rules < "2025":
        return cfg
    return replace(cfg, bos="no" if added_bos(described, tokenizer, cfg.bos) is None else "yes")


def look_ahead(cfg, plan, tokenizer, shapes):
    """Exit at the first mistake in any task's settings or texts, before the first is trained."""
    longest = {}
    for task, task_cfg in plan:
        check(task_cfg)
        block_size = min(shape.block_size for shape in shapes)
        fits = cfg.rules >= "2025" or task_cfg.max_length <= block_size
        need(task_cfg, max_length=(fits, f"at most the model's block_size={block_size}"))
        texts, labels = read_examples(task_cfg, task, "train", tokenizer)
        check_count(task_cfg, task, len(texts))
        for name in scored_on(task_cfg, task):
            texts += read_examples(task_cfg, name, "valid", tokenizer, labels)[0]
        longest[task] = max(len(text.ids) for text in texts)
    check_positions(shapes, longest)
    if RULES[cfg.rules].reads == "first":
        print(f"notice: by the rules of {cfg.rules} the first token is read, which sees no other"
              + (": <s>, the same for all texts" if cfg.bos == "yes" else ""))


def check_count(cfg, task, n):
    """Of a task's n texts to train on."""
    if RULES[cfg.rules].last_batch == "dropped":
        need(cfg, batch_size=(cfg.batch_size <= n, f"at most {task}'s {n} texts: only whole batches count"))
    if cfg.rules >= "2025" and n != TRAIN_TEXTS.get(task, n):
        print(f"notice: {task} has {n:,} texts to train on; those of the rules of {cfg.rules} are "
              f"{TRAIN_TEXTS[task]:,}")


def check_positions(shapes, longest):
    """Refuse texts longer than a GPT-2, whose positions are learned; a Llama's are computed, and go on."""
    for shape in shapes:
        block_size = shape.block_size
        for task, n in longest.items():
            if n > block_size and shape.arch == "gpt2":
                sys.exit(f"error: {task} has texts of up to {n} tokens, a GPT-2 of block_size={block_size} "
                         f"takes no more than that; --max_length={block_size} cuts them (not official)")
        if max(longest.values()) > block_size:
            print(f"notice: a Llama of block_size={block_size} reads texts of up to {max(longest.values())} "
                  "tokens")


NOT_PER_TASK = ("ckpt", "data", "tasks", "per_task", "seeds", "out_dir", "predictions", "resume", "overwrite")
WHERE_AND_HOW = ("device", "wandb", "tensorboard", "log_interval", "keep_model")  # not what comes out


def task_config(cfg, task, seed):
    """cfg with what per_task says of the task."""
    types, values = get_type_hints(FinetuneConfig), {}
    for line in cfg.per_task:
        name, *flags = line.split() or [""]
        well_formed = all(flag.startswith("--") and "=" in flag for flag in flags)
        not_trained = name == "mnli-mm" and RULES[cfg.rules].mismatched != "trained"
        if name not in TASKS or not_trained or not well_formed:
            sys.exit(f"error: per_task: '{line}' is not 'task --key=value ...'")
        for key, _, text in (flag[2:].partition("=") for flag in flags if name == task):
            several = key == "seed" and len(cfg.seeds) > 1
            if key in (*NOT_PER_TASK, "rules", "bos") or several:
                sys.exit(f"error: per_task '{line}': {key} cannot be set for one task alone"
                         + " where there are several seeds" * several)
            values[key] = checked(types, key, parsed(types, key, text), f"per_task '{line}'")
    values.setdefault("seed", int(seed))
    out_dir = os.path.join(cfg.out_dir, f"{task}_{values['seed']}")
    return replace(cfg, **values, out_dir=out_dir, overwrite=True)


def scored_on(cfg, task):
    """The tasks that a task's model is scored on."""
    mismatched = task == "mnli" and RULES[cfg.rules].mismatched == "scored"
    return [task, "mnli-mm"] if mismatched and find_files(cfg, "mnli-mm", "valid") else [task]


# --- results: made once, and told from those of other settings ------------------------------------

def origin_of(cfg, task):
    """What a result follows from: settings that are not their defaults, and hashes of weights and texts."""
    files = find_files(cfg, task, "train")
    for name in scored_on(cfg, task):
        files += find_files(cfg, name, "valid")
    inputs = dict(weights=list(map(weights_sha256, cfg.ckpt)), texts=list(map(sha256, files)))
    return dict(settings=non_defaults(cfg, ignore=(*NOT_PER_TASK, *WHERE_AND_HOW)), inputs_sha256=inputs)


def without_result(plan, results, path):
    """The part of the plan that is to be done. A result of other settings, weights or texts is refused."""
    todo, older = [], []
    for task, cfg in plan:
        seed, origin = str(cfg.seed), origin_of(cfg, task)
        for other, row in results.get(task, {}).items():
            if "settings" not in row:  # a hash of all settings, which any new setting changes
                older.append(f"{task}_{other}")
            elif other == seed or row["rules"] == cfg.rules:  # those of other seeds are averaged with it
                if changed := changes(row, origin):
                    sys.exit(f"error: {path} has {task}, seed {other}, with other settings, weights or data "
                             f"({changed}); name another --out_dir, or use --overwrite for these tasks")
        kept = not cfg.keep_model or os.path.isdir(os.path.join(cfg.out_dir, "member_0"))
        if seed not in results.get(task, {}) or not kept and f"{task}_{seed}" not in older:
            todo.append((task, cfg))
    weights = origin["inputs_sha256"]["weights"]
    for task, rows in results.items():
        if any(row.get("inputs_sha256", {}).get("weights", weights) != weights for row in rows.values()):
            sys.exit(f"error: {path} has {task} of another model; name another --out_dir")
    if older:
        print(f"notice: {path} has results of older code, whose settings, weights and data are not compared: "
              f"{', '.join(dict.fromkeys(older))}")
    return todo


def changes(row, origin):
    """What of a result's origin, but for its seed, is not so now, in words; '' = nothing."""
    defaults = asdict(FinetuneConfig())
    settings = differences({**defaults, **row["settings"]}, {**defaults, **origin["settings"]}, ["seed"])
    inputs = [f"other {key}" for key in ("weights", "texts")
              if row["inputs_sha256"][key] != origin["inputs_sha256"][key]]
    return ", ".join(filter(None, [settings, *inputs]))


# --- training -------------------------------------------------------------------------------------

def finetune(cfg, task, tokenizer):
    """Train on one task with one seed: {task: scores} and {task: predictions} of the best epoch, and whether
    a signal came at the end."""
    machine = start_machine(cfg)._replace(micro_batch=cfg.batch_size)
    examples, labels = read_examples(cfg, task, "train", tokenizer)
    valid, _ = read_examples(cfg, task, "valid", tokenizer, labels)
    data = Examples(cfg, examples, machine.device)
    cfg = with_shares(cfg, data.total)
    ensemble = new_ensemble(cfg, len(labels), machine.device)
    for model in ensemble.models:
        model.model.extend(max(len(text.ids) for text in examples + valid))
    keeper = TaskKeeper(cfg, machine, data, valid, task, len(labels))
    train(cfg, machine, data, Trainee(ensemble), classification_loss, keeper)
    ensemble.load_state_dict(keeper.best_weights)
    ensemble.eval()
    scores, predicted = {task: keeper.best_scores}, {task: listed(task, keeper.best_predictions, labels)}
    if "mnli-mm" in scored_on(cfg, task):
        mismatched, _ = read_examples(cfg, "mnli-mm", "valid", tokenizer, labels)
        scores["mnli-mm"], _, found = validation(ensemble, mismatched, machine)
        predicted["mnli-mm"] = listed("mnli-mm", found, labels)
    if cfg.keep_model:
        save_members(cfg, task, ensemble, labels, scores)
    return scores, predicted, bool(keeper.signals)


def with_shares(cfg, total):
    """cfg with its shares of all steps and of the rate as numbers."""
    if cfg.warmup_share:
        whole = math.ceil if cfg.rules < "2025" else int
        cfg = replace(cfg, warmup_iters=whole(cfg.warmup_share * total))
    if cfg.min_lr_share:
        cfg = replace(cfg, min_lr=cfg.min_lr_share * cfg.learning_rate)
    return cfg


def best_by(cfg, task, n_labels):
    """The score that the best epoch has most of."""
    if RULES[cfg.rules].best_by == "reported":
        return TASKS[task][2]
    return "f1" if n_labels == 2 else "accuracy"


class TaskKeeper(Keeper):
    """Of a fine-tuning run: keeps the best epoch, in memory. On disk there is its log alone."""

    stopped = "with nothing of this run kept; the same command begins it again"

    def __init__(self, cfg, machine, data, valid, task, n_labels):
        super().__init__(cfg, machine, data)
        self.valid, self.n_labels, self.best_by = valid, n_labels, best_by(cfg, task, n_labels)
        self.measure = "1 - " + self.best_by.replace("f1", "F1")
        if cfg.select == "loss":
            self.measure = "validation loss"

    def announce(self):
        print(f"{len(self.data.examples):,} texts to train on, {len(self.valid):,} to validate, "
              f"{self.n_labels} labels; {self.data.total:,} steps of {self.cfg.batch_size} at most",
              flush=True)

    def due(self, step):
        interval = self.cfg.eval_interval
        if interval and RULES[self.cfg.rules].last_step == "skipped":
            return step % interval == 0
        return super().due(step)

    def validate(self):
        ensemble = self.trainee.student.eval()
        scores, of_all_rows, predicted = validation(ensemble, self.valid, self.machine)
        ensemble.train()
        value = 1 - of_all_rows[self.best_by]
        if self.cfg.select == "loss":
            value = scores["val_ce"]
        if value < self.best:
            self.best_scores, self.best_predictions = scores, predicted
            self.best_weights = {k: v.detach().cpu().clone() for k, v in ensemble.state_dict().items()}
        return value, dict(val_loss=value, **scores)

    def finish(self, step):
        if not self.best_step:  # no step was due: the last weights count
            self.judged(step)
        super().finish(step)

    def save(self, step, val_ce):
        """Nothing: a task takes minutes, and is begun again."""

    def interrupted(self):
        """Nothing yet: the results are to be written first (see main)."""


@torch.no_grad()
def validation(ensemble, texts, machine):
    """Scores on the rows that are reported, on all rows, and the label predicted for each."""
    z, y = [], []
    for i in range(0, len(texts), 64):
        batch = to_batch(texts[i:i + 64], machine.device)
        with machine.autocast():
            z.append(ensemble(batch).cpu())
        y.append(batch.y.cpu())
    z, y = torch.cat(z), torch.cat(y)
    predicted, n_labels = z.argmax(-1).numpy(), z.shape[1]
    of_all_rows = of_reported = metrics(predicted, y.numpy(), n_labels)
    reported = np.array([text.reported for text in texts])
    if not reported.all():
        of_reported = metrics(predicted[reported], y.numpy()[reported], n_labels)
    return dict(val_ce=F.cross_entropy(z, y).item(), **of_reported), of_all_rows, predicted.tolist()


def metrics(predicted, y, n_labels):
    """Accuracy; with two labels also F1 of label 1 and Matthews' correlation."""
    scores = dict(accuracy=float((predicted == y).mean()))
    if n_labels == 2:
        tp, tn, fp, fn = (float(((predicted == p) & (y == label)).sum())
                          for p, label in ((1, 1), (0, 0), (1, 0), (0, 1)))
        scores["f1"] = 2 * tp / (2 * tp + fp + fn) if tp else 0.0
        spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        scores["mcc"] = (tp * tn - fp * fn) / math.sqrt(spread) if spread else 0.0
    return scores


def save_members(cfg, task, ensemble, labels, scores):
    """The fine-tuned models, a checkpoint folder each."""
    for i, (model, path) in enumerate(zip(ensemble.models, cfg.ckpt)):
        source = find_checkpoint(path)
        described = read_checkpoint_config(source)
        del described["format_version"]
        described.update(model=asdict(model.cfg), parameters=model.n_params(), finetuned=task, labels=labels,
                         scores=scores, train_config=asdict(cfg))
        tokenizer = pathlib.Path(source, described["tokenizer"]).read_bytes()
        save_checkpoint(cfg.out_dir, f"member_{i}", model, described, tokenizer)


# --- the model ------------------------------------------------------------------------------------

def new_ensemble(cfg, n_labels, device):
    """The checkpoints' models with new heads, random by `seed`."""
    torch.manual_seed(cfg.seed)
    rules = RULES[cfg.rules]
    make = classifier if rules.head == "linear" else mlp_classifier
    models = [make(load_checkpoint(path)[0], n_labels).to(device) for path in cfg.ckpt]
    for m in (m for model in models for m in model.modules() if isinstance(m, Experts)):
        m.capacity = 0  # a token of a text must not be dropped for the padding of its row
    if cfg.lora_rank:
        for model in models:
            add_lora(model, cfg)
    return Ensemble(models, rules.padding)


def classification_loss(trainee, batch):
    return F.cross_entropy(trainee.student(batch), batch.y), {}


# --- the texts ------------------------------------------------------------------------------------

class ExampleBatch(NamedTuple):
    x: torch.Tensor     # (B, T) token ids, padded on the right, which a causal model does not see
    last: torch.Tensor  # (B,) position of each text's last token
    y: torch.Tensor     # (B,) labels


class Examples:
    """What the loop sees of a task: batches, each epoch in a new order."""

    unit = "texts"

    def __init__(self, cfg, examples, device):
        self.cfg, self.examples, self.device = cfg, examples, device
        whole = math.ceil if RULES[cfg.rules].last_batch == "kept" else math.floor
        self.steps_per_epoch = whole(len(examples) / cfg.batch_size)
        self.texts_per_epoch = min(len(examples), self.steps_per_epoch * cfg.batch_size)
        total = cfg.epochs * self.steps_per_epoch
        self.total = min(total, cfg.max_iters) if cfg.max_iters else total
        self.drawn = None  # the epoch whose order is at hand

    def batch(self, step, micro_step):
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.drawn:
            rng = np.random.default_rng([self.cfg.seed, epoch])
            self.drawn, self.order = epoch, rng.permutation(len(self.examples))
        first = position * self.cfg.batch_size
        chosen = self.order[first:first + self.cfg.batch_size]
        return to_batch([self.examples[i] for i in chosen], self.device)

    def epoch(self, step):
        return step / self.steps_per_epoch

    def seen(self, step):
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.texts_per_epoch + steps * self.cfg.batch_size


def to_batch(examples, device):
    x = torch.zeros(len(examples), max(len(e.ids) for e in examples), dtype=torch.int64)
    for row, e in zip(x, examples):
        row[:len(e.ids)] = torch.tensor(e.ids)
    last = torch.tensor([len(e.ids) - 1 for e in examples])
    return ExampleBatch(x.to(device), last.to(device), torch.tensor([e.label for e in examples]).to(device))


# --- what is written ------------------------------------------------------------------------------

def listed(task, predicted, labels):
    return {"predictions": [{"id": f"{task}_{i}", "pred": labels[p]} for i, p in enumerate(predicted)]}


def read_lines(path):
    """task -> line of the file at `path`, JSON lines as the 2023 challenge had them; {} if there is none."""
    check_writable(path)
    if not os.path.exists(path):
        return {}
    try:
        with open(path, "rb") as f:
            return {line["sub_task"]: line for line in map(parse_json, f)}
    except (ValueError, TypeError, KeyError) as e:
        sys.exit(f"error: {path} is no JSON lines of predictions to add to: {e}")


def add_lines(path, predicted):
    """Put task -> predictions there, labels as text, beside what else it has."""
    there = read_lines(path)
    for task, found in predicted.items():
        rows = [dict(row, pred=str(row["pred"])) for row in found["predictions"]]
        there[task] = dict(task="msgs" if task in MSGS else "glue", sub_task=task, predictions=rows)
    write_lines(path, [json.dumps(line) + "\n" for line in there.values()])


def other_settings(rules, task, row, seed="42"):
    """What of a result's settings is not as the rules have it, in words; '' = nothing."""
    theirs = {**asdict(FinetuneConfig()), **row["settings"]}
    official = task_config(FinetuneConfig.from_given(rules=rules), task, seed)
    return differences(asdict(official), theirs, (*NOT_PER_TASK, *WHERE_AND_HOW, "bos"))


def departures(cfg):
    """What is not as the rules have it, in words; '' = nothing."""
    official = type(cfg).from_given(rules=cfg.rules)
    ignored = (*NOT_PER_TASK, *WHERE_AND_HOW, "seed", "bos")
    changed = differences(asdict(official), asdict(cfg), ignored)
    by_task = "settings by task" if set(cfg.per_task) != set(official.per_task) else ""
    return ", ".join(filter(None, [changed, by_task]))


def table(results, cfg):
    """A row a task: mean and standard deviation over seeds of what is reported. MSGS is in no mean."""
    changed = departures(cfg)
    print(f"\nby the rules of {cfg.rules}" + f" but for {changed}" * bool(changed))
    glue, msgs = ({task: results[task] for task in tasks if results.get(task)} for tasks in (GLUE, MSGS))
    if glue:
        glue_table(glue, cfg)
    if msgs:
        msgs_table(msgs)


def glue_table(results, cfg):
    print("\n| task | metric | seeds | mean, % | standard deviation | accuracy, % |"
          "\n|---|---|---:|---:|---:|---:|")
    means, accuracies = [], []
    for task, rows in results.items():
        metric = GLUE[task][2]
        mean, deviation = over_seeds(rows, metric)
        accuracy, _ = over_seeds(rows, "accuracy")
        print(f"| {task} | {metric} | {len(rows)} | {mean:.1f} | {deviation} | {accuracy:.1f} |")
        means.append(mean)
        accuracies.append(accuracy)
    n = len(RULES[cfg.rules].tasks)
    print(f"| mean of {len(means)} tasks (the official score of {cfg.rules} has {n}) | | | "
          f"{statistics.mean(means):.1f} | | {statistics.mean(accuracies):.1f} |")


def msgs_table(results):
    print("\n| MSGS | seeds | MCC x 100 | standard deviation |\n|---|---:|---:|---:|")
    for task, rows in results.items():
        mean, deviation = over_seeds(rows, "mcc")
        print(f"| {task} | {len(rows)} | {mean:.1f} | {deviation} |")
    print("+100: goes by the linguistic feature, -100: by the surface one; a control near 100: knows its one")


def over_seeds(rows, metric):
    """The mean of a metric in %, and the standard deviation in words: none of one seed."""
    scores = [100 * row[metric] for row in rows.values()]
    return statistics.mean(scores), f"{statistics.stdev(scores):.1f}" if len(scores) > 1 else ""


if __name__ == "__main__":
    launch(main, FinetuneConfig)
