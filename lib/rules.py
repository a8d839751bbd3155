"""The rules of the challenge's years, and what a result by them is. Without torch: tools read results too."""
from typing import NamedTuple


class Rules(NamedTuple):
    prefix: str               # before a text without context: '<s>', '</s>', or what the tokenizer puts there
    split_ties: bool = False  # k best give 1/k of a point (officially one is drawn); else the first is it
    pooled: bool = False      # a phenomenon's accuracy is that of all its pairs, not its tasks' mean


RULES = {
    "2023": Rules("</s>", pooled=True),
    "2024": Rules("<s>"),
    "2025": Rules("tokenizer"),
    "2026": Rules("tokenizer", split_ties=True),
}


def result_name(rules):
    return "blimp.json" if rules == "2024" else f"blimp_{rules}.json"


def unit(folder, rules):
    """What a folder's accuracy is the unweighted mean over: a key of its result."""
    return "phenomena" if RULES[rules].pooled and folder["phenomena"] else "tasks"


def units(folder, rules):
    """The tasks of each unit, whose items are one pool."""
    if unit(folder, rules) == "phenomena":
        return [row["tasks"] for row in folder["phenomena"].values()]
    return [[task] for task in folder["tasks"]]


def mean_title(folder, rules):
    name = unit(folder, rules)
    return f"mean of {len(folder[name])} {name}"
