"""Where a model came from: its run, its teachers, what it began as, and theirs in turn, as far as the folders
are there; and what each of them cost."""
import contextlib
import os
import sys
from typing import NamedTuple

from lib.checkpoints import find_checkpoint, read_checkpoint_config, run_folder, weights_sha256
from lib.files import parse_json
from lib.shards import data_sha256, read_meta


class Member(NamedTuple):
    name: str
    role: str
    path: str
    described: dict  # the checkpoint's config.json; {} = it is not there
    rows: list       # of the run's metrics.jsonl
    reason: str      # why it is not there

    def settings(self):
        return self.described.get("train_config", {})

    def parents(self):
        """(path, role, SHA-256 of the weights or '') of what it was made from."""
        teachers, generator = self.described.get("teachers", []), self.described.get("generator", {})
        sums = self.described.get("teacher_sha256", [""] * len(teachers))
        yield from ((path, f"teacher of {self.name}", sha) for path, sha in zip(teachers, sums))
        if self.settings().get("init_from"):
            sha = self.described.get("init_from_sha256", "")
            yield self.settings()["init_from"], f"what {self.name} began as", sha
        if self.settings().get("generator"):
            sha = generator.get("weights_sha256", "")
            yield self.settings()["generator"], f"generator of {self.name}", sha


def lineage(path):
    """Members: the run, what it was made from, what that was made from, and so on; each folder once."""
    members, seen = [], set()

    def visit(path, role, sha, near):
        there = beside(path, near) or [path]
        path = next((folder for folder in there if not sha or weights_of(folder) == sha), there[0])
        if os.path.realpath(path) in seen:
            return
        seen.add(os.path.realpath(path))
        members.append(look_at(path, role, sha))
        for parent in members[-1].parents():
            visit(*parent, near=parent_folder(path))
    visit(path, "this run", "", ".")
    if members[0].reason:
        sys.exit(f"error: {members[0].reason}")
    return members


def look_at(path, role, sha=""):
    """The Member at `path`. One that is gone, damaged or not the model it was (by its weights' SHA-256) is
    named, with the reason."""
    name = os.path.relpath(path, parent_folder(path))  # babyllama, babyllama/ckpt_500
    metrics = os.path.join(run_folder(path), "metrics.jsonl")
    try:
        described = read_checkpoint_config(find_checkpoint(path))
        if sha and weights_of(path) != sha:
            return Member(name, role, path, {}, [], f"{path} has other weights now")
        rows = records(run_folder(path)) if os.path.isfile(metrics) else []
    except SystemExit as e:
        return Member(name, role, path, {}, [], str(e).removeprefix("error: "))
    return Member(name, role, path, described, rows, "")


def weights_of(path):
    """The SHA-256 of its weights, '' if there are none."""
    try:
        return weights_sha256(path)
    except SystemExit:
        return ""


def beside(path, near):
    """Folders that a config's path may mean, of those that are there: as it is from here, and in the folder
    `near` if all were moved there. A checkpoint's has its run's name too."""
    parts = os.path.normpath(path).split(os.sep)
    moved = [os.path.join(near, *parts[-n:]) for n in (1, 2)]
    return [folder for folder in [path, *moved] if os.path.isdir(folder)]


def parent_folder(path):
    return os.path.dirname(os.path.abspath(run_folder(path)))


def records(run):
    """The lines of a run's metrics.jsonl."""
    path = os.path.join(run, "metrics.jsonl")
    if not os.path.isfile(path):
        sys.exit(f"error: no {path}; name a run folder")
    with open(path, errors="replace") as f:
        try:
            rows = [dict(parse_json(line)) for line in f if line.endswith("\n")]  # the last may be cut off
        except (ValueError, TypeError) as e:
            sys.exit(f"error: {path} is damaged: {e}")
    if not any("ce" in row for row in rows):
        sys.exit(f"error: {path} has no training loss yet")
    return rows


def prepared_text(member):
    """The data folder that a member was trained on and its meta.json; ('', None) if that is not there."""
    if not member.settings().get("data_dir"):
        return "", None
    for folder in beside(member.settings()["data_dir"], parent_folder(member.path)):
        with contextlib.suppress(SystemExit):
            meta = read_meta(folder)
            if data_sha256(meta) == member.described.get("data_sha256"):
                return folder, meta
    return "", None


def words_seen(member):
    """In training, up to its last step: for each token its share of the text's words. Without the text an
    epoch is all of them, but for a curriculum. None = not known."""
    rows, words = trained(member), member.described.get("words")
    if not rows or not words:
        return None
    meta = prepared_text(member)[1]
    if meta:
        return rows[-1]["tokens"] * words / sum(s["tokens"] for s in meta["shards"] if s["split"] == "train")
    return None if member.settings().get("curriculum") else rows[-1]["epoch"] * words


def hours(member):
    """Of all training steps, without validation and saving. None = not known."""
    tokens, total = 0, 0.0
    for row in trained(member):
        if not row.get("tokens_per_s"):
            return None
        total += (row["tokens"] - tokens) / row["tokens_per_s"] / 3600
        tokens = row["tokens"]
    return total or None


def trained(member):
    """Its log's lines about training."""
    return [row for row in member.rows if "tokens" in row]
