"""Checkpoint folders: written whole or not at all, verified before they are opened. No pickle anywhere.

    out/<run>/    ckpt_<step>/ (config.json model.safetensors tokenizer sha256.json, the newest also
                  state.safetensors state.json), last.json, best.json, metrics.jsonl, train_config.json;
                  with keep_words also chck_<words>M/

Every folder explains itself: sha256.json is written last and names every other file.
"""
import os
import re
import shutil
import sys
from typing import get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lib.configurator import checked
from lib.files import FORMAT_VERSION, flush_to_disk, parse_json, read_json, regular, sha256, write_json
from lib.rules import RULES
from lib.shards import is_file_name
from lib.tokenizers import load_tokenizer
from model import LanguageModel, ModelConfig, check_model_config

COUNTERS = ("step", "best_val_ce", "best_step", "waited")  # of state.json


def save_checkpoint(out_dir, name, model, config, tokenizer, state=None):
    """Write out_dir/<name>/ whole or not at all.

    config: what config.json holds beside the format version. tokenizer: its file's bytes. state: (tensors,
    counters), what only resuming needs, both dicts. Tied tensors are stored once. Nothing points to the
    folder until `point_to` does.
    """
    folder, tmp = os.path.join(out_dir, name), os.path.join(out_dir, name + ".tmp")
    for stale in (tmp, folder):  # of a run that was killed here before
        remove_folder(stale)
    os.makedirs(tmp)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if model.cfg.tie_weights:
        del weights["lm_head.weight"]
    save_file(weights, os.path.join(tmp, "model.safetensors"))
    write_json(os.path.join(tmp, "config.json"), dict(format_version=FORMAT_VERSION, **config))
    with open(os.path.join(tmp, config["tokenizer"]), "wb") as f:
        f.write(tokenizer)
    if state:
        tensors = {k: v.detach().cpu().contiguous() for k, v in state[0].items()}
        save_file(tensors, os.path.join(tmp, "state.safetensors"))
        write_json(os.path.join(tmp, "state.json"), state[1])
    sums = {f: sha256(os.path.join(tmp, f)) for f in sorted(os.listdir(tmp))}
    write_json(os.path.join(tmp, "sha256.json"), sums)
    for f in os.listdir(tmp):
        flush_to_disk(os.path.join(tmp, f))
    flush_to_disk(tmp)
    os.rename(tmp, folder)
    flush_to_disk(out_dir)


def point_to(out_dir, pointer, name, step, val_ce):
    """Make `last.json` or `best.json` name a checkpoint folder; the old pointer holds until then."""
    write_json(os.path.join(out_dir, pointer), dict(folder=name, step=step, val_ce=val_ce))


def pointed(out_dir, pointer):
    """The name of the folder that `pointer` names, or None."""
    path = os.path.join(out_dir, pointer)
    name = read_json(path, ["folder"])["folder"] if os.path.isfile(path) else None
    if name is not None and not re.fullmatch(r"ckpt_\d+", str(name)):
        sys.exit(f"error: {path} is damaged: 'folder' is {name!r}")
    return name


def last_checkpoint(out_dir):
    """The folder last.json names, or 'none yet': for messages."""
    name = pointed(out_dir, "last.json")
    return os.path.join(out_dir, name) if name else "none yet"


# the names of what a run writes into its folder: nothing else in there is ever deleted
YEARS = "|".join(RULES)
RUN_FILES = re.compile(rf"(ckpt_\d+|chck_\d+M|member_\d+|scores_({YEARS}))(\.tmp)?(\.deleted)?"
                       rf"|((last|best|train_config|blimp(_({YEARS}))?|predictions|reading"
                       rf"|aoa_({YEARS}|surprisals|months))\.json|metrics\.jsonl|report\.(html|md))(\.tmp)?"
                       r"|events\.out\.tfevents\..*")


def remove_folder(path):
    """Delete a folder as it was written, whole or not at all: what a kill leaves is no checkpoint by name."""
    if os.path.isdir(path):
        doomed = path.removesuffix(".deleted") + ".deleted"
        if path != doomed:
            remove_folder(doomed)
            os.rename(path, doomed)
        shutil.rmtree(doomed)


def sweep(out_dir):
    """Delete what a kill left of a run's folders that were being written or deleted."""
    for name in os.listdir(out_dir):
        if RUN_FILES.fullmatch(name) and name.endswith((".tmp", ".deleted")):
            path = os.path.join(out_dir, name)
            remove_folder(path) if os.path.isdir(path) else os.remove(path)


def delete_run(out_dir):
    for name in sorted(filter(RUN_FILES.fullmatch, os.listdir(out_dir))):  # last.json after the checkpoints
        path = os.path.join(out_dir, name)
        remove_folder(path) if os.path.isdir(path) else os.remove(path)


def drop_old_checkpoints(out_dir):
    """Keep the folder last.json names and the one before it, should the disk lose that; of the best
    one only what is needed to use it."""
    best, last = (pointed(out_dir, pointer) for pointer in ("best.json", "last.json"))
    resumable = [os.path.basename(folder) for folder in checkpoints(out_dir, last)][:2]
    for name in os.listdir(out_dir):
        if re.fullmatch(r"ckpt_\d+", name) and name not in resumable:
            folder = os.path.join(out_dir, name)
            if name != best:
                remove_folder(folder)
                continue
            for file in ("state.json", "state.safetensors"):  # without the first none resumes from it
                if os.path.exists(os.path.join(folder, file)):
                    os.remove(os.path.join(folder, file))


def checkpoint_steps(out_dir):
    """The steps of a run's checkpoint folders, which are called ckpt_<step>, in order."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else ()
    return sorted(int(name.removeprefix("ckpt_")) for name in names if re.fullmatch(r"ckpt_\d+", name))


def checkpoints(out_dir, last):
    """Checkpoint folders a run can go on from, the latest first, from `last` on (None: all)."""
    folders = [os.path.join(out_dir, f"ckpt_{step}") for step in reversed(checkpoint_steps(out_dir))
               if last is None or step <= int(last.removeprefix("ckpt_"))]
    return [folder for folder in folders if os.path.isfile(os.path.join(folder, "state.json"))]


def find_resumable(out_dir):
    """The folder last.json names, whole. If it is damaged, exits naming the one before it."""
    last = pointed(out_dir, "last.json")
    folders = checkpoints(out_dir, last)
    if last and os.path.isdir(os.path.join(out_dir, last)) and os.path.join(out_dir, last) not in folders:
        folders.insert(0, os.path.join(out_dir, last))  # without state.json: damaged
    wrong = damage(folders[0]) if folders else "no checkpoint to resume from"
    if wrong:
        good = next((folder for folder in folders[1:] if not damage(folder)), None)
        remedy = f"{out_dir} has no other; use --overwrite to start again"
        if good:
            remedy = f"the last good checkpoint is {good}: delete {folders[0]} to resume from there"
        sys.exit(f"error: {wrong}; {remedy}")
    return folders[0]


def find_checkpoint(path):
    """The checkpoint folder meant by `path`: itself, or the one a run folder points to."""
    if path.endswith((".pt", ".pth", ".bin", ".pkl", ".ckpt")):
        sys.exit(f"error: {path}: pickled checkpoints are never opened (unpickling runs code); "
                 "name a run or checkpoint folder")
    if not os.path.isdir(path):
        sys.exit(f"error: no checkpoint at '{path}'")
    if os.path.isfile(os.path.join(path, "config.json")):
        return os.path.normpath(path)
    for pointer in ("best.json", "last.json"):
        name = pointed(path, pointer)
        if name:
            folder = os.path.join(path, name)
            if not os.path.isdir(folder):
                sys.exit(f"error: {os.path.join(path, pointer)} names {folder}, which is not there")
            return folder
    sys.exit(f"error: {path} holds no checkpoint (no config.json, best.json or last.json)")


def read_checkpoint_config(folder):
    """config.json of a checkpoint folder, of a format this code reads."""
    verify(folder, ["config.json"])
    config = read_json(os.path.join(folder, "config.json"),
                       ("format_version", "model", "step", "tokenizer", "tokenizer_sha256", "bos"))
    if config["format_version"] != FORMAT_VERSION:
        sys.exit(f"error: {folder} has checkpoint format {config['format_version']}, "
                 f"this code reads {FORMAT_VERSION}")
    if not is_file_name(config["tokenizer"]) or not isinstance(config["bos"], str):
        sys.exit(f"error: {folder}/config.json is damaged: 'tokenizer' is no file's name, or 'bos' no text")
    return config


def load_checkpoint(path, device="cpu"):
    """A model in evaluation mode, its tokenizer and its config.json (and its weights' SHA-256), from a
    run or checkpoint folder. Checksums are verified first, and that the parts belong together."""
    folder = find_checkpoint(path)
    config = read_checkpoint_config(folder)
    verify(folder, ["model.safetensors", config["tokenizer"]])
    if sha256(os.path.join(folder, config["tokenizer"])) != config["tokenizer_sha256"]:
        sys.exit(f"error: {folder} has another tokenizer than its model was trained with; name another "
                 "checkpoint")
    cfg = described_model(folder, config["model"])
    weights = read_weights(folder, cfg)
    model = LanguageModel(cfg)
    model.load_state_dict(weights)
    tokenizer = load_tokenizer(os.path.join(folder, config["tokenizer"]))
    if tokenizer.vocab_size > cfg.vocab_size:
        sys.exit(f"error: {folder} has a tokenizer of {tokenizer.vocab_size}, vocab_size={cfg.vocab_size}")
    config["weights_sha256"] = weights_sha256(folder)
    return model.to(device).eval(), tokenizer, config


def described_model(folder, settings):
    """The ModelConfig that a checkpoint's config.json has, or exit naming what is wrong with it."""
    types, where = get_type_hints(ModelConfig), os.path.join(folder, "config.json")
    if not isinstance(settings, dict):
        sys.exit(f"error: {where}: 'model' is no list of settings")
    cfg = ModelConfig(**{key: checked(types, key, value, where) for key, value in settings.items()})
    try:
        check_model_config(cfg)
    except SystemExit as e:
        sys.exit(f"{e} ({where})")
    return cfg


def read_weights(folder, cfg):
    """The tensors of model.safetensors, or exit naming the first that is not what the model has. Shapes are
    compared before anything is allocated."""
    path = os.path.join(folder, "model.safetensors")
    try:
        with safe_open(path, "pt") as f:
            found = {name: f.get_slice(name) for name in f.keys()}
            found = {name: (tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in found.items()}
    except SafetensorError as e:
        sys.exit(f"error: {path} is not a safetensors file, or is damaged: {e}")
    for key in "n_layer", "n_experts":  # an outline of a million layers would take minutes
        if getattr(cfg, key) > len(found):
            sys.exit(f"error: {path} has {len(found)} tensors, too few for {key}={getattr(cfg, key)}")
    try:
        with torch.device("meta"):
            expected = {name: (tuple(t.shape), "F32") for name, t in LanguageModel(cfg).state_dict().items()}
    except (RuntimeError, OverflowError) as e:  # of sizes that no computer has
        sys.exit(f"error: {path} is not of the sizes in config.json: {str(e).splitlines()[0]}")
    if cfg.tie_weights:
        del expected["lm_head.weight"]
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            sys.exit(f"error: {path}: tensor {name} is {found.get(name, 'missing')}, by config.json it is "
                     f"{expected.get(name, 'not there')}")
    weights = load_file(path)
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            sys.exit(f"error: {path}: tensor {name} is not finite")
    if cfg.tie_weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def load_ensemble(paths, device):
    """Models with one tokenizer, the tokenizer, and the first model's config.json; its bos is "mixed" if some
    of them were trained with <s> before their texts and some without."""
    loaded = [load_checkpoint(path, device) for path in paths]
    for path, (model, _, described) in zip(paths, loaded):
        if described["tokenizer_sha256"] != loaded[0][2]["tokenizer_sha256"]:
            sys.exit(f"error: {path} has another tokenizer than {paths[0]}; an ensemble needs one")
        if not model.cfg.causal or model.cfg.n_labels:
            kind = "classifier" if model.cfg.n_labels else "masked language model (causal=False)"
            sys.exit(f"error: {path} is a {kind}: it gives text no probability")
    models, (tokenizer, *_), every = zip(*loaded)
    mixed = len(set(map(trained_with_bos, every))) > 1
    return list(models), tokenizer, {**every[0], "bos": "mixed"} if mixed else every[0]


def trained_with_bos(described):
    """Whether <s> stood before the lines or documents that a checkpoint was trained on."""
    return described["bos"] in ("line", "document")


def run_folder(path):
    """The run folder of a run or checkpoint folder."""
    is_checkpoint = os.path.isfile(os.path.join(path, "config.json"))
    return os.path.dirname(os.path.abspath(path)) if is_checkpoint else path


def weights_sha256(path):
    """What a run or checkpoint folder says its weights' SHA-256 is."""
    sums = read_json(os.path.join(find_checkpoint(path), "sha256.json"), ["model.safetensors"])
    return sums["model.safetensors"]


def load_state(folder):
    """(tensors, counters) that `save_checkpoint` was given as state."""
    verify(folder, ["state.safetensors", "state.json"])
    tensors = load_file(os.path.join(folder, "state.safetensors"))
    return tensors, read_json(os.path.join(folder, "state.json"), COUNTERS)


def verify(folder, files):
    """Exit if one of `files` is missing or is not what the folder's sha256.json says."""
    wrong = damage(folder, files)
    if wrong:
        sys.exit(f"error: {wrong}")


def damage(folder, files=None):
    """What is wrong with `files` (all of them, if not named) by the folder's sha256.json, or ''."""
    path = os.path.join(folder, "sha256.json")
    try:
        with open(regular(path), "rb") as f:
            expected = dict(parse_json(f.read()))
    except FileNotFoundError:
        return f"{folder} is unfinished (no sha256.json)"
    except (OSError, ValueError, TypeError) as e:
        return f"cannot read {path}: {e}"
    for f in expected if files is None else files:
        path = os.path.join(folder, f)
        if not os.path.isfile(path):
            return f"{path} is missing"
        try:
            if sha256(path) != expected.get(f):
                return f"{path} is damaged (SHA-256 differs from sha256.json)"
        except OSError as e:
            return f"cannot read {path}: {e}"
    return ""


