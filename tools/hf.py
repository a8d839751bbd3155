"""Checkpoints to Hugging Face folders and back.

    python -m tools.hf export out/babyllama hf/babyllama   # AutoModelForCausalLM and AutoTokenizer load it
    python -m tools.hf import hf/gpt2 out/gpt2             # a local GPT-2 or Llama folder becomes a teacher

Nothing here needs transformers and nothing is downloaded. What a format cannot say is refused by
name: an export that would score differently is worse than none. An export of a run that kept
checkpoints by words seen (train.py's keep_words) has them in the subfolders chck_1M, chck_2M, ...
"""
import base64
import os
import re
import shutil
import sys
import tempfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import config
import disk
from model import LanguageModel, ModelConfig

USAGE = "usage: python -m tools.hf export CKPT DIR, or python -m tools.hf import DIR CKPT (--help tells more)"


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__)
    elif len(argv) == 3 and argv[0] in ("export", "import") and not any(a.startswith("-") for a in argv[1:]):
        source, target = argv[1:]
        if os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
            sys.exit(f"error: {target} is there already; name a new folder")
        (export_run if argv[0] == "export" else import_folder)(source, target)
    else:
        sys.exit(f"error: {USAGE}")


def export_run(path, folder):
    """The checkpoint `path` means, and what its run kept by words seen, as Hugging Face folders."""
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as tmp:  # there whole, or not at all
        whole = os.path.join(tmp, "whole")
        export(path, whole)
        kept = [name for name in os.listdir(path) if re.fullmatch(r"chck_\d+M", name)]
        for name in kept:
            export(os.path.join(path, name), os.path.join(whole, name))
        os.rename(whole, folder)
    print(f"{folder}: the best checkpoint of {path}" + f" and {len(kept)} by words seen" * bool(kept))
    if kept:
        print("each chck_ folder is for a branch of that name: hf upload NAME FOLDER/chck_1M . --revision=chck_1M")


def export(path, folder):
    model, tokenizer, described = disk.load_checkpoint(path)
    cfg = model.cfg
    if not cfg.causal:
        sys.exit(f"error: {path} is a masked language model (causal=False), which neither format has")
    if cfg.n_labels:
        sys.exit(f"error: {path} is a classifier (n_labels={cfg.n_labels}); only language models are exported")
    if cfg.arch == "gpt2" and cfg.n_kv_head not in (0, cfg.n_head):
        sys.exit(f"error: {path} has n_kv_head={cfg.n_kv_head}: Hugging Face's GPT-2 has no grouped queries")
    spec = sentencepiece_json(tokenizer) if isinstance(tokenizer, disk.SentencePieceTokenizer) else bytelevel_json(tokenizer)
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    if cfg.tie_weights:
        del weights["lm_head.weight"]
    if cfg.arch == "gpt2":
        weights = to_gpt2(weights, cfg.n_layer)
    specials = {name: special_text(spec, i) for name, i in
                (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos), ("pad_token", tokenizer.pad)) if i is not None}
    os.makedirs(folder, exist_ok=True)
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    disk.write_json(os.path.join(folder, "config.json"), dict(
        (gpt2_config if cfg.arch == "gpt2" else llama_config)(cfg), vocab_size=cfg.vocab_size, tie_word_embeddings=cfg.tie_weights,
        initializer_range=0.02, torch_dtype="float32", bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad))
    disk.write_json(os.path.join(folder, "tokenizer.json"), spec)
    disk.write_json(os.path.join(folder, "tokenizer_config.json"), dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=cfg.block_size, clean_up_tokenization_spaces=False,
        split_special_tokens=True, **specials))  # text such as '<s>' stays text
    if tokenizer.file.endswith(".model"):
        shutil.copy(tokenizer.file, os.path.join(folder, "tokenizer.model"))  # `import` takes this one
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as f:
        f.write(model_card(os.path.basename(os.path.abspath(path)), path, described))


def import_folder(folder, out_dir):
    """A Hugging Face folder's model and tokenizer as checkpoint 0 of a new run folder."""
    theirs = disk.read_json(os.path.join(folder, "config.json"), ["model_type"])
    kind = theirs["model_type"]
    if kind not in READ:
        sys.exit(f"error: {folder} is of type '{kind}'; model.py has gpt2 and llama")
    try:
        cfg = ModelConfig(arch=kind, **READ[kind](theirs, folder))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        sys.exit(f"error: {folder}/config.json does not describe a {kind}: {type(e).__name__} {e}")
    weights = {k: v.float() for k, v in read_weights(folder).items() if not re.search(r"\.attn\.(masked_)?bias$|\.inv_freq$", k)}
    model = LanguageModel(cfg)
    if kind == "gpt2":
        weights = from_gpt2({k.removeprefix("transformer."): v for k, v in weights.items()}, cfg.n_layer, folder)
    if cfg.tie_weights and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    wanted = {k: v.shape for k, v in model.state_dict().items()}
    wrong = [k for k in {**wanted, **weights} if k not in weights or wanted.get(k) != weights[k].shape]
    if wrong:
        sys.exit(f"error: {folder} cannot be represented: tensor {wrong[0]} is {tuple(weights[wrong[0]].shape) if wrong[0] in weights else 'missing'}, "
                 f"model.py has {tuple(wanted[wrong[0]]) if wrong[0] in wanted else 'none'}" + (f"; so with {len(wrong) - 1} more" if wrong[1:] else ""))
    model.load_state_dict(weights)
    with tempfile.TemporaryDirectory() as tmp:
        try:
            file = import_tokenizer(folder, tmp, cfg.vocab_size)
        except (KeyError, TypeError, AttributeError) as e:
            sys.exit(f"error: {folder}/tokenizer.json is not one that is understood: {type(e).__name__} {e}")
        write_checkpoint(out_dir, model, file, folder, theirs)


def write_checkpoint(out_dir, model, file, folder, theirs):
    """An imported model and its tokenizer file as checkpoint 0 of a new run folder."""
    cfg, tokenizer = model.cfg, disk.load_tokenizer(file)
    os.makedirs(out_dir, exist_ok=True)
    described = dict(model=vars(cfg), parameters=model.n_params(), step=0, val_ce=None, tokenizer=os.path.basename(file),
                     tokenizer_sha256=disk.sha256(file), bos="unknown", imported_from=theirs.get("_name_or_path") or os.path.basename(os.path.abspath(folder)),
                     git_revision=disk.git_revision(), torch=torch.__version__)
    disk.save_checkpoint(out_dir, "ckpt_0", model, described, file)
    disk.point_to(out_dir, "best.json", "ckpt_0", 0, None)
    file = os.path.join(out_dir, "ckpt_0", os.path.basename(file))
    print(f"{out_dir}: {model.n_params():,} parameters; its data is prepared with --tokenizer={file}")
    if tokenizer.vocab_size != cfg.vocab_size:
        print(f"notice: the tokenizer has {tokenizer.vocab_size} entries, the model {cfg.vocab_size}: it can be scored and sampled from, not be a teacher")


# --- models ---------------------------------------------------------------------------------------

def llama_config(cfg):
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=cfg.n_embd, intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_kv_head or cfg.n_head,
        head_dim=cfg.n_embd // cfg.n_head, max_position_embeddings=cfg.block_size, rms_norm_eps=cfg.norm_eps, hidden_act="silu",
        attention_bias=False, mlp_bias=False, attention_dropout=max(cfg.dropout, cfg.attn_dropout),  # `dropout` is also on embeddings and residuals, theirs cannot be
        rope_theta=cfg.rope_theta,
        rope_parameters=dict(rope_type="default", rope_theta=cfg.rope_theta))  # rope_theta moved there in transformers 5


def gpt2_config(cfg):
    return dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", n_embd=cfg.n_embd, n_inner=cfg.intermediate_size, n_layer=cfg.n_layer,
        n_head=cfg.n_head, n_positions=cfg.block_size, layer_norm_epsilon=cfg.norm_eps, activation_function="gelu_new",
        resid_pdrop=cfg.dropout, embd_pdrop=cfg.dropout, attn_pdrop=max(cfg.dropout, cfg.attn_dropout))


def from_llama_config(c, folder):
    ropes = [r for r in (c.get("rope_scaling"), c.get("rope_parameters")) if r]  # its name before and since transformers 5
    refuse(folder, c, hidden_act="silu", attention_bias=False, mlp_bias=False, sliding_window=None, pretraining_tp=1,
           head_dim=c["hidden_size"] // c["num_attention_heads"], partial_rotary_factor=1.0)
    if any(r.get("rope_type", r.get("type", "default")) != "default" or r.get("partial_rotary_factor", 1.0) != 1.0 for r in ropes):
        sys.exit(f"error: {folder} cannot be represented: its RoPE is scaled or partial ({ropes})")
    return dict(vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"], n_head=c["num_attention_heads"],
                n_kv_head=c.get("num_key_value_heads") or 0, n_embd=c["hidden_size"], intermediate_size=c["intermediate_size"],
                block_size=c.get("max_position_embeddings", 2048), tie_weights=c.get("tie_word_embeddings", False),
                rope_theta=float(next((r["rope_theta"] for r in ropes if "rope_theta" in r), c.get("rope_theta", 10000.0))), norm_eps=c.get("rms_norm_eps", 1e-6),
                attn_dropout=float(c.get("attention_dropout") or 0))


def from_gpt2_config(c, folder):
    if c.get("activation_function") == "gelu_pytorch_tanh":  # the same function
        c["activation_function"] = "gelu_new"
    rates = [c.get(f"{place}_pdrop", 0.1) for place in ("resid", "embd", "attn")]
    if len(set(rates)) > 1:
        print(f"notice: {folder} has dropout {rates} on residual, embedding and attention; model.py has one rate: {rates[0]}")
    refuse(folder, c, activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
           add_cross_attention=False)
    return dict(vocab_size=c["vocab_size"], n_layer=c["n_layer"], n_head=c["n_head"], n_embd=c["n_embd"],
                intermediate_size=c.get("n_inner") or 4 * c["n_embd"], block_size=c.get("n_positions", 1024),
                tie_weights=c.get("tie_word_embeddings", True), norm_eps=c.get("layer_norm_epsilon", 1e-5), dropout=float(rates[0]))


READ = {"llama": from_llama_config, "gpt2": from_gpt2_config}


def refuse(folder, c, **ours):
    """Exit at the first setting of config.json that is there, set, and not what model.py computes."""
    for key, value in ours.items():
        if c.get(key) not in (None, value):
            sys.exit(f"error: {folder} cannot be represented: its config.json has {key}={c[key]}, model.py {key}={value}")


def gpt2_modules(n_layer):
    """(Hugging Face's module, ours, Conv1D?): Conv1D keeps its matrix transposed, and one holds three of ours."""
    yield "wte", ["model.embed_tokens"], False
    yield "wpe", ["model.embed_positions"], False
    yield "ln_f", ["model.norm"], False
    for i in range(n_layer):
        a, b = f"h.{i}.", f"model.layers.{i}."
        yield a + "ln_1", [b + "input_layernorm"], False
        yield a + "attn.c_attn", [b + f"self_attn.{p}_proj" for p in "qkv"], True
        yield a + "attn.c_proj", [b + "self_attn.o_proj"], True
        yield a + "ln_2", [b + "post_attention_layernorm"], False
        yield a + "mlp.c_fc", [b + "mlp.up_proj"], True
        yield a + "mlp.c_proj", [b + "mlp.down_proj"], True


def to_gpt2(weights, n_layer):
    out = {}
    for theirs, ours, conv in gpt2_modules(n_layer):
        for kind in ("weight", "bias"):
            if f"{ours[0]}.{kind}" in weights:
                w = torch.cat([weights.pop(f"{name}.{kind}") for name in ours])
                out[f"transformer.{theirs}.{kind}"] = w.T.contiguous() if conv and kind == "weight" else w
    return {**out, **weights}


def from_gpt2(weights, n_layer, folder):
    out = {}
    for theirs, ours, conv in gpt2_modules(n_layer):
        for kind in ("weight", "bias"):
            w = weights.pop(f"{theirs}.{kind}", None)
            if w is not None:
                w = w.T if conv and kind == "weight" else w
                if len(w) % len(ours):
                    sys.exit(f"error: {folder}: tensor {theirs}.{kind} of {len(w)} rows is not {len(ours)} projections")
                out.update({f"{name}.{kind}": part.contiguous() for name, part in zip(ours, w.chunk(len(ours)))})
    return {**out, **weights}


def read_weights(folder):
    """All tensors of model.safetensors, or of the shards that its index names."""
    index, single = (os.path.join(folder, f) for f in ("model.safetensors.index.json", "model.safetensors"))
    if os.path.isfile(index):
        files = sorted(set(disk.read_json(index, ["weight_map"])["weight_map"].values()))
    elif os.path.isfile(single):
        files = ["model.safetensors"]
    else:
        pickled = any(f.endswith((".bin", ".pt")) for f in os.listdir(folder))
        sys.exit(f"error: {folder} has no model.safetensors" + (
            "; its weights are pickled, and pickle is never opened: save them with safetensors first" if pickled else ""))
    weights = {}
    for file in files:
        path = os.path.join(folder, os.path.basename(file))
        try:
            weights.update(load_file(path))
        except (OSError, SafetensorError) as e:
            sys.exit(f"error: cannot read {path}: {e}")
    return weights


# --- tokenizers -----------------------------------------------------------------------------------

def tokenizer_json(vocab, ranked, specials, normalizer, pre_tokenizer, decoder, byte_fallback, unk=None):
    """tokenizer.json of a BPE. ranked: its pieces in the order in which pairs that make them are merged.

    Their libraries merge pairs by a list of pairs, ours (sentencepiece and tiktoken) whatever pair makes
    the best piece. So every way to cut a piece in two others is in the list.
    """
    known = set(ranked) | {piece for piece in vocab if len(piece) == 1}
    merges = [[p[:i], p[i:]] for p in ranked for i in range(1, len(p)) if p[:i] in known and p[i:] in known]
    added = [dict(id=i, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
             for text, i in specials.items()]
    return dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=normalizer, pre_tokenizer=pre_tokenizer,
                post_processor=None, decoder=decoder, model=dict(
                    type="BPE", dropout=None, unk_token=unk, continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=False,
                    byte_fallback=byte_fallback, ignore_merges=False, vocab=vocab, merges=merges))


def sentencepiece_json(tokenizer):
    """tokenizer.json of a sentencepiece model as prepare.py trains them."""
    sp = tokenizer.sp
    ids = range(sp.vocab_size())
    normal = [i for i in ids if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i))]
    probe = " ﬁ\u2460  x\n\t y "
    if [sp.get_score(i) for i in normal] != [-rank for rank in range(len(normal))] or sum(map(sp.is_byte, ids)) != 256 \
            or sp.normalize(probe) != "▁fi1▁▁x\n\t▁y▁":
        sys.exit(f"error: {tokenizer.file} is not a BPE with byte fallback, NFKC and all blanks kept, as prepare.py trains them: "
                 "its tokenizer.json would give other tokens")
    specials = {sp.id_to_piece(i): i for i in ids if sp.is_control(i) or sp.is_unknown(i)}
    return tokenizer_json(
        {sp.id_to_piece(i): i for i in ids}, [sp.id_to_piece(i) for i in normal], specials,
        dict(type="Sequence", normalizers=[dict(type="NFKC"), dict(type="Replace", pattern=dict(String=" "), content="▁")]), None,
        dict(type="Sequence", decoders=[dict(type="Replace", pattern=dict(String="▁"), content=" "), dict(type="ByteFallback"), dict(type="Fuse")]),
        byte_fallback=True, unk=sp.id_to_piece(sp.unk_id()))


def bytelevel_json(tokenizer):
    """tokenizer.json of a byte-level BPE."""
    text = {token: "".join(BYTE_CHAR[b] for b in token) for token in tokenizer.ranks}
    by_rank = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    return tokenizer_json(
        {**tokenizer.specials, **{text[token]: tokenizer.ranks[token] for token in by_rank}}, [text[token] for token in by_rank], tokenizer.specials,
        dict(type="NFKC") if tokenizer.nfkc else None,
        dict(type="Sequence", pretokenizers=[
            dict(type="Split", pattern=dict(Regex=tokenizer.pattern), behavior="Isolated", invert=False),
            dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)]),
        dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False), byte_fallback=False)


def special_text(spec, i):
    return next(token["content"] for token in spec["added_tokens"] if token["id"] == i)


def byte_chars():
    """GPT-2's printable character for each byte: itself where it is printable, else 256 + a count."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


BYTE_CHAR = byte_chars()
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # ByteLevel's own (use_regex)


def import_tokenizer(folder, out_dir, vocab_size):
    """The folder's tokenizer as a file of ours in out_dir: its sentencepiece model, or else its byte-level BPE."""
    path = os.path.join(folder, "tokenizer.model")
    if os.path.isfile(path):
        return shutil.copy(path, os.path.join(out_dir, "tokenizer.model"))
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        sys.exit(f"error: {folder} has no tokenizer.model or tokenizer.json")
    spec = disk.read_json(path, ("model", "pre_tokenizer", "normalizer", "added_tokens"))
    settings = os.path.join(folder, "tokenizer_config.json")
    settings = disk.read_json(settings) if os.path.isfile(settings) else {}
    model, steps = spec["model"], sequence(spec["pre_tokenizer"], "pretokenizers")
    cuts = [s["pattern"]["Regex"] for s in steps if s["type"] == "Split" and s["behavior"] == "Isolated" and "Regex" in s["pattern"]]
    levels = [s for s in steps if s["type"] == "ByteLevel"]
    patterns = cuts + [GPT2_PATTERN] * sum(s.get("use_regex", True) for s in levels)
    normalizers = [s["type"] for s in sequence(spec["normalizer"], "normalizers")]
    for what, good in (("model", model.get("type", "BPE") == "BPE" and not model.get("byte_fallback") and not model.get("dropout")
                        and not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix")),
                       ("pre_tokenizer", len(levels) == 1 and len(steps) == 1 + len(cuts) and len(patterns) == 1),
                       ("normalizer", normalizers in ([], ["NFKC"])),
                       # Hugging Face's class for GPT-2 switches add_prefix_space off, whatever the file says
                       ("add_prefix_space", str(settings.get("tokenizer_class")).startswith("GPT2") or not any(s.get("add_prefix_space") for s in levels))):
        if not good:
            sys.exit(f"error: {path} cannot be represented: its {what} is not that of a GPT-2-style byte-level BPE")
    byte = {c: b for b, c in BYTE_CHAR.items()}
    specials = {t["content"]: t["id"] for t in spec["added_tokens"] if t["id"] < vocab_size}
    left_out = [t["content"] for t in spec["added_tokens"] if t["id"] >= vocab_size]
    if left_out:
        print(f"notice: left out, beyond the model's vocabulary: {', '.join(left_out)}")
    vocab = {token: i for token, i in model["vocab"].items() if token not in specials}
    merged = [vocab.get("".join(m if isinstance(m, list) else m.split(" "))) for m in model["merges"]]
    if None in merged or merged != sorted(merged) or not all(set(token) <= byte.keys() for token in vocab):
        sys.exit(f"error: {path} cannot be represented: its merges are not in the order of their ids, or its pieces not bytes")
    ranks = {bytes(byte[c] for c in token): i for token, i in vocab.items()}
    missing = sum(bytes([b]) not in ranks for b in range(256))
    if missing:
        print(f"notice: {missing} of the 256 bytes have no token: text loses them, as with the tokenizers library")
    file = os.path.join(out_dir, "tokenizer.json")
    named = {kind: settings.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    disk.write_json(file, dict(name=os.path.basename(os.path.abspath(folder)), pattern=patterns[0], specials=specials, nfkc=normalizers == ["NFKC"],
                               **{kind: t["content"] if isinstance(t, dict) else t for kind, t in named.items()}, vocab_size=vocab_size,
                               ranks={base64.b64encode(token).decode(): i for token, i in sorted(ranks.items(), key=lambda item: item[1])}))
    return file


def sequence(step, key):
    """A step of tokenizer.json as the list of steps it stands for."""
    return step[key] if step and step["type"] == "Sequence" else [step] if step else []


# --- the model card -------------------------------------------------------------------------------

def model_card(name, path, described):
    """README.md: what it is, how it was trained, what it scored."""
    recipe = described.get("train_config", {})
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", f"# {name}", "",
             f"{described['parameters']:,} parameters ({described['model']['arch']}), step {described['step']:,} of its training"
             + (f", distilled from {len(described['teachers'])} teachers ({', '.join(map(os.path.basename, described['teachers']))})"
                if "teachers" in described else "") + ".", "", "| | |", "|---|---|"]
    facts = {"validation loss, nats per token": described["val_ce"] and round(described["val_ce"], 4), "data": recipe.get("data_dir"), "data, SHA-256": described.get("data_sha256"),
             **{key: recipe.get(key) for key in ("seq_len", "epochs", "batch_size", "learning_rate", "weight_decay", "seed", "alpha", "temperature",
                                                "kl_reduction")}, "`<s>` in the training text": described["bos"], "code": described["git_revision"]}
    lines += [f"| {key} | {value} |" for key, value in facts.items() if value is not None]
    scores = os.path.join(path, "blimp.json")
    if os.path.isfile(scores):
        result = disk.read_json(scores, ("folders", "step"))
        if result["step"] == described["step"]:
            lines += [f"| {folder}, %, mean of {len(row['tasks'])} tasks ({result['dtype']}) | {100 * row['accuracy']:.2f} ± {100 * row['se']:.2f} |"
                      for folder, row in result["folders"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    config.run(main)
