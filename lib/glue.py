"""(Super)GLUE and MSGS: their tasks, the rules of the pipelines of 2023 to 2026, their texts as tokens, and
the results of tools/finetune.py. Without torch: tools read results too."""
import glob
import os
import re
import sys
from typing import NamedTuple

from lib.files import parse_json, read_json, regular

# task: (first text, second text, metric that is reported), texts as templates over a line's fields
GLUE = {
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
MSGS = dict.fromkeys((
    "control_raising_lexical_content_the", "control_raising_relative_token_position",
    "main_verb_lexical_content_the", "main_verb_relative_token_position",
    "syntactic_category_lexical_content_the", "syntactic_category_relative_position",
    "control_raising_control", "lexical_content_the_control", "main_verb_control",
    "relative_position_control", "syntactic_category_control"), ("{sentence}", "", "mcc"))
TASKS = GLUE | MSGS
LORA_FORMATS = {
    "multirc": ("{paragraph}", "{question} {answer}", "accuracy"),
    "wsc": ("{text}", 'Does "{span2_text}" refer to "{span1_text}"?', "accuracy"),
}

# what --rules=2025 and 2026 say where the user says nothing
SINCE_2025 = dict(
    tasks=("boolq", "mnli", "mrpc", "multirc", "qqp", "rte", "wsc"), seeds=("42",), max_length=512,
    learning_rate=3e-5, warmup_share=0.06, warmup_from_0=True, schedule="cosine", min_lr_share=0.1,
    weight_decay=0.01, decay_all=True, grad_clip=0.0, epochs=10, batch_size=32, patience=0,
    per_task=("boolq --batch_size=16", "multirc --batch_size=16", "wsc --epochs=30"))
TRAIN_TEXTS = dict(mnli=10_000, qqp=10_000)  # since 2025, drawn by the organisers


class Rules(NamedTuple):
    head: str        # "linear", without bias, or "mlp"
    reads: str       # the "first" token's final hidden state, or the "last" one's
    padding: str     # "left": GPT-2's positions count the padding before a text
    last_batch: str  # of an epoch, where it is not whole: "kept" or "dropped"
    best_by: str     # "f1" of two labels, accuracy of three; or the score that is "reported"
    last_step: str   # "validated", or not ("skipped") where it is no multiple of eval_interval
    mismatched: str  # mnli-mm: "trained" for itself, "scored" with mnli's model, or "left out"
    tasks: tuple     # whose mean is the score
    settings: dict   # that are not the defaults


RULES = {
    "2023": Rules("linear", "last", "right", "kept", "f1", "skipped", "trained", tuple(GLUE),
                  dict(eval_interval=200, patience=10)),
    "2024": Rules("linear", "last", "right", "kept", "f1", "validated", "scored", tuple(GLUE), {}),
    "2025": Rules("mlp", "first", "right", "dropped", "reported", "validated", "left out",
                  SINCE_2025["tasks"], SINCE_2025),
    "2026": Rules("mlp", "last", "left", "dropped", "reported", "validated", "left out",
                  SINCE_2025["tasks"], SINCE_2025),
}


# --- the texts ------------------------------------------------------------------------------------

class Example(NamedTuple):
    ids: list
    label: int             # place among the labels
    reported: bool = True  # counts for the score; MSGS: where the two features disagree


def find_files(cfg, task, split):
    """A task's texts: a file in one of its places, or several parts."""
    found = [files for place in places(task, split)
             if (files := sorted(glob.glob(os.path.join(glob.escape(cfg.data), place))))]
    if len(found) > 1:
        sys.exit(f"error: {task}'s {split} texts are in two places, {found[0][0]} and {found[1][0]}; "
                 "leave one")
    return found[0] if found else []


def places(task, split):
    """Where texts may be in the data folder: <task>.<split>.jsonl or parts of it, since 2024; the names of
    2023; each also in the task's subfolder, and there what MSGS was published as. mnli-mm learns mnli's."""
    validation_2023 = {"mnli": "mnli.validation_matched.json", "mnli-mm": "mnli.validation_mismatched.json"}
    if split == "train":
        task = task.removesuffix("-mm")
        name_2023, name_published = f"{task}.train.json", "train.jsonl"
    else:
        name_2023, name_published = validation_2023.get(task, f"{task}.validation.json"), "test.jsonl"
    names = [f"{task}.{split}.jsonl", f"{task}.{split}.*.jsonl", name_2023]
    published = [f"{task}/{name_published}"] if task in MSGS else []
    return names + [f"{task}/{name}" for name in names] + published


def read_examples(cfg, task, split, tokenizer, labels=None):
    """A task's texts as tokens, and its labels (those of the training texts, sorted)."""
    files = find_files(cfg, task, split)
    if not files:
        sys.exit(f"error: no {task}.{split}.jsonl in '{cfg.data}', nor another of "
                 + ", ".join(places(task, split)))
    first, second, _ = (LORA_FORMATS if cfg.formats == "lora" else {}).get(task, TASKS[task])
    bos = [tokenizer.bos] if cfg.bos == "yes" else []
    rows = [row for file in files for row in read_rows(file, (first, second), tokenizer, cfg.max_length, bos)]
    if RULES[cfg.rules].reads == "first":  # which does not see the others
        rows = [(ids[:1], *rest) for ids, *rest in rows]
    if not rows:
        sys.exit(f"error: {files[0]} is empty")
    if split == "valid" and not any(reported for _, _, reported in rows):
        sys.exit(f"error: {files[0]}: no row has the condition 'test', of which the score is")
    try:
        labels = sorted({label for _, label, _ in rows}) if labels is None else labels
    except TypeError:
        sys.exit(f"error: {files[0]}: labels of several types")
    unknown = [label for _, label, _ in rows if label not in labels]
    if unknown:
        sys.exit(f"error: {files[0]}: label {unknown[0]!r} is not one of the training texts' {labels}")
    most = 3 if task.startswith("mnli") else 2  # neutral, beside true and false
    if not 2 <= len(labels) <= most:
        some = ", ".join(map(str, labels[:5]))
        sys.exit(f"error: {files[0]}: {len(labels)} labels ({some}), {task} has {most}")
    return [Example(ids, labels.index(label), reported) for ids, label, reported in rows], labels


def read_rows(file, templates, tokenizer, max_length, bos):
    """(tokens, label, whether it is reported) of each line."""
    rows, fields = [], re.findall(r"{(\w+)}", "".join(templates))
    with open(regular(file), "rb") as f:
        for n, line in enumerate(f):
            try:
                row = parse_json(line)
                for name in fields:
                    if not isinstance(row[name], str):
                        raise TypeError(f"{name} is {row[name]!r}")
                label = label_of(row)
                if not isinstance(label, (int, str)):
                    raise TypeError(f"label is {label!r}")
                texts = [tokenizer.encode(template.format(**row)) for template in templates if template]
                ids = truncated(texts, max_length, bos) or [tokenizer.pad or 0]
                rows.append((ids, label, row.get("condition", "test") == "test"))
            except KeyError as e:
                sys.exit(f"error: {file}, line {n + 1}: no field {e}")
            except (ValueError, TypeError, RuntimeError) as e:
                sys.exit(f"error: {file}, line {n + 1}: not a text with a label in JSON ({e})")
    return rows


def label_of(row):
    """MSGS as it was published has a label for each feature: the linguistic one counts, and where there is
    none (the controls of surface features) the surface one."""
    if "label" in row or "linguistic_feature_label" not in row:
        return row["label"]
    linguistic = row["linguistic_feature_label"]
    return row["surface_feature_label"] if linguistic is None else linguistic


def truncated(texts, length, bos=()):
    """One or two lists of tokens as one of at most `length`, with `bos` before each. What is too much is
    taken from the end of the longer list first."""
    a, b = texts if len(texts) == 2 else (texts[0], [])
    room = length - len(texts) * len(bos)
    if len(a) + len(b) > room:
        short = min(len(a), len(b), room // 2)
        a, b = (a[:room - short], b[:short]) if len(a) > len(b) else (a[:short], b[:room - short])
    return [*bos, *a, *bos, *b] if len(texts) == 2 else [*bos, *a]


# --- results --------------------------------------------------------------------------------------

def read_results(path):
    """task -> seed -> origin and scores, as far as there are any."""
    results = read_json(path) if os.path.isfile(path) else {}
    try:
        for task, rows in results.items():
            for row in rows.values():
                float(row[TASKS[task][2]]), float(row["accuracy"])
                if "identity_sha256" not in row:
                    row["settings"].keys(), row["inputs_sha256"]["weights"], row["inputs_sha256"]["texts"]
    except (KeyError, TypeError, AttributeError, ValueError):
        sys.exit(f"error: {path} is damaged; repair or delete it, then use tools.finetune again")
    return results
