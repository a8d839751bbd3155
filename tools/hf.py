"""Checkpoints to Hugging Face folders and back.

    python -m tools.hf export out/babyllama hf/babyllama   # AutoModelForCausalLM and AutoTokenizer load it
    python -m tools.hf import hf/gpt2 out/gpt2             # a local GPT-2 or Llama folder becomes a teacher

Nothing here needs transformers and nothing is downloaded. What a format cannot say is refused by
name: an export that would score differently is worse than none. An export of a run that kept
checkpoints by words seen (train.py's keep_words) has them in the subfolders chck_1M, chck_2M, ...

The tokenizer of an export puts <s> before a text if the training text had it so (prepare.py's bos), else
nothing: by the rules since 2025 that decides whether a text's first word counts. `export --bos=yes` and
`--bos=no` (auto) say it otherwise.
"""
import base64
import contextlib
import os
import pathlib
import re
import shutil
import sys
import tempfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.checkpoints import described_model, load_checkpoint, point_to, save_checkpoint
from lib.configurator import checked, launch
from lib.files import git_revision, lock, read_json, regular, sha256, write_json
from lib.scoring import added_bos
from lib.tokenizers import SentencePieceTokenizer, load_tokenizer
from model import LanguageModel

USAGE = ("usage: python -m tools.hf export CKPT DIR [--bos=no], or python -m tools.hf import DIR CKPT "
         "(--help tells more)")
BOS = ("--bos=auto", "--bos=yes", "--bos=no")


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return
    command, *paths = [a for a in argv if a not in BOS] or [""]
    choices = [a.removeprefix("--bos=") for a in argv if a in BOS]
    if (command not in ("export", "import") or len(paths) != 2 or any(p.startswith("-") for p in paths)
            or len(choices) > (command == "export")):
        sys.exit(f"error: {USAGE}")
    source, target = (checked(dict(path=str), "path", path, command) for path in paths)
    with new_folder(target) as tmp:
        report = import_folder(source, tmp) if command == "import" else export_run(source, tmp, *choices)
    print(report.replace(tmp, target))


@contextlib.contextmanager
def new_folder(target):
    """A folder to fill, which becomes `target`: there whole, or not at all. What a killed command left of it
    is deleted by the next one."""
    parent, name = os.path.split(os.path.realpath(target))
    tmp = os.path.join(parent, f".{name}.unfinished")
    os.makedirs(tmp, exist_ok=True)
    lock(tmp)
    try:
        if os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
            sys.exit(f"error: {target} is there already; name a new folder")
        if os.path.ismount(target):
            sys.exit(f"error: {target} is a mount point; name a folder in it")
        for left in os.listdir(tmp):
            path = os.path.join(tmp, left)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        yield tmp
        os.rename(tmp, os.path.join(parent, name))
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def export_run(path, folder, bos="auto"):
    """The checkpoint `path` means, and what its run kept by words seen, as Hugging Face folders. bos: 'auto',
    'yes' or 'no'."""
    export(path, folder, bos)
    kept = [name for name in os.listdir(path) if re.fullmatch(r"chck_\d+M", name)]
    for name in kept:
        export(os.path.join(path, name), os.path.join(folder, name), bos)
    source = path if os.path.isfile(os.path.join(path, "config.json")) else f"the best checkpoint of {path}"
    return f"{folder}: {source}" + (
        f" and {len(kept)} by words seen\neach chck_ folder is for a branch of that name: "
        "hf upload NAME FOLDER/chck_1M . --revision=chck_1M") * bool(kept)


def export(path, folder, bos="auto"):
    """One checkpoint as one Hugging Face folder."""
    model, tokenizer, described = load_checkpoint(path)
    cfg = model.cfg
    if not cfg.causal:
        sys.exit(f"error: {path} is a masked language model (causal=False), which neither format has")
    if cfg.n_labels:
        sys.exit(f"error: {path} is a classifier (n_labels={cfg.n_labels}); "
                 "only language models are exported")
    if cfg.n_experts:
        sys.exit(f"error: {path} has experts (n_experts={cfg.n_experts}), which neither format has")
    if cfg.arch == "gpt2" and cfg.n_kv_head not in (0, cfg.n_head):
        sys.exit(f"error: {path} has n_kv_head={cfg.n_kv_head}: Hugging Face's GPT-2 has no grouped queries")
    sentencepiece = isinstance(tokenizer, SentencePieceTokenizer)
    spec = sentencepiece_json(tokenizer) if sentencepiece else bytelevel_json(tokenizer)
    ids = dict(bos=tokenizer.bos, eos=tokenizer.eos, pad=tokenizer.pad)
    text = {token["id"]: token["content"] for token in spec["added_tokens"]}
    if added_bos(described, tokenizer, bos) is not None:
        spec["post_processor"] = bos_template(text[tokenizer.bos], tokenizer.bos)
    os.makedirs(folder, exist_ok=True)
    save_file(their_weights(model), os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    write_json(os.path.join(folder, "config.json"), dict(
        (gpt2_config if cfg.arch == "gpt2" else llama_config)(cfg),
        vocab_size=cfg.vocab_size, tie_word_embeddings=cfg.tie_weights, initializer_range=0.02,
        torch_dtype="float32", **{f"{name}_token_id": i for name, i in ids.items()}))
    write_json(os.path.join(folder, "tokenizer.json"), spec)
    write_json(os.path.join(folder, "tokenizer_config.json"), dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=cfg.block_size,
        clean_up_tokenization_spaces=False, split_special_tokens=True,  # text such as '<s>' stays text
        model_input_names=["input_ids", "attention_mask"],  # no token types, which GPT-2 would add up
        **{f"{name}_token": text[i] for name, i in ids.items() if i is not None}))
    if sentencepiece:
        shutil.copy(tokenizer.file, os.path.join(folder, "tokenizer.model"))  # `import` takes this one
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as f:
        f.write(model_card(os.path.basename(os.path.abspath(path)), path, described))


def import_folder(folder, out_dir):
    """A Hugging Face folder's model and tokenizer as checkpoint 0 of a new run folder."""
    theirs = read_json(os.path.join(folder, "config.json"), ["model_type"])
    arch = theirs["model_type"]
    if arch not in list(READ):
        sys.exit(f"error: {folder} is of type '{arch}'; model.py has gpt2 and llama")
    try:
        settings = READ[arch](theirs, folder)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        sys.exit(f"error: {folder}/config.json does not describe a {arch}: {type(e).__name__} {e}")
    cfg = described_model(folder, dict(arch=arch, **settings))
    model = read_model(folder, cfg)
    with tempfile.TemporaryDirectory() as tmp:
        try:
            file = import_tokenizer(folder, tmp, cfg.vocab_size)
            bos = "document" if adds_bos(folder) else "unknown"
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            sys.exit(f"error: {folder}/tokenizer.json is not one that is understood: {type(e).__name__} {e}")
        name, size = os.path.basename(file), load_tokenizer(file).vocab_size
        if size > cfg.vocab_size:
            sys.exit(f"error: {folder} has a tokenizer of {size} entries, a model of {cfg.vocab_size}")
        described = dict(
            model=vars(cfg), parameters=model.n_params(), step=0, val_ce=None, tokenizer=name,
            tokenizer_sha256=sha256(file), bos=bos,
            imported_from=theirs.get("_name_or_path") or os.path.basename(os.path.abspath(folder)),
            git_revision=git_revision(), torch=torch.__version__)
        save_checkpoint(out_dir, "ckpt_0", model, described, pathlib.Path(file).read_bytes())
    point_to(out_dir, "best.json", "ckpt_0", 0, None)
    return (f"{out_dir}: {model.n_params():,} parameters; its data is prepared with "
            f"--tokenizer={out_dir}/ckpt_0/{name}"
            + (f"\nnotice: the tokenizer has {size} entries, the model {cfg.vocab_size}: "
               "it can be scored and sampled from, not be a teacher") * (size != cfg.vocab_size))


# --- models ---------------------------------------------------------------------------------------

def llama_config(cfg):
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=cfg.n_embd,
        intermediate_size=cfg.intermediate_size, num_hidden_layers=cfg.n_layer,
        num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_kv_head or cfg.n_head,
        head_dim=cfg.n_embd // cfg.n_head, max_position_embeddings=cfg.block_size, rms_norm_eps=cfg.norm_eps,
        hidden_act="silu", attention_bias=False, mlp_bias=False,
        attention_dropout=max(cfg.dropout, cfg.attn_dropout),  # theirs has none on embeddings and residuals
        rope_theta=cfg.rope_theta,
        rope_parameters=dict(rope_type="default", rope_theta=cfg.rope_theta))  # since transformers 5


def gpt2_config(cfg):
    return dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", n_embd=cfg.n_embd,
        n_inner=cfg.intermediate_size, n_layer=cfg.n_layer, n_head=cfg.n_head, n_positions=cfg.block_size,
        layer_norm_epsilon=cfg.norm_eps, activation_function="gelu_new",
        resid_pdrop=cfg.dropout, embd_pdrop=cfg.dropout, attn_pdrop=max(cfg.dropout, cfg.attn_dropout))


def from_llama_config(theirs, folder):
    refuse(folder, theirs, hidden_act="silu", attention_bias=False, mlp_bias=False, sliding_window=None,
           pretraining_tp=1, head_dim=theirs["hidden_size"] // theirs["num_attention_heads"],
           partial_rotary_factor=1.0)
    # the name before transformers 5, and since
    ropes = [theirs[key] for key in ("rope_scaling", "rope_parameters") if theirs.get(key)]
    for rope in ropes:
        if (rope.get("rope_type", rope.get("type", "default")) != "default"
                or rope.get("partial_rotary_factor", 1.0) != 1.0):
            sys.exit(f"error: {folder} cannot be represented: its RoPE is scaled or partial ({ropes})")
    thetas = [rope["rope_theta"] for rope in ropes if "rope_theta" in rope]
    return dict(
        vocab_size=theirs["vocab_size"], n_layer=theirs["num_hidden_layers"],
        n_head=theirs["num_attention_heads"], n_kv_head=theirs.get("num_key_value_heads") or 0,
        n_embd=theirs["hidden_size"], intermediate_size=theirs["intermediate_size"],
        block_size=theirs.get("max_position_embeddings", 2048),
        tie_weights=theirs.get("tie_word_embeddings", False),
        rope_theta=thetas[0] if thetas else theirs.get("rope_theta", 10000.0),
        norm_eps=theirs.get("rms_norm_eps", 1e-6), attn_dropout=theirs.get("attention_dropout") or 0)


def from_gpt2_config(theirs, folder):
    if theirs.get("activation_function") == "gelu_pytorch_tanh":  # the same function
        theirs["activation_function"] = "gelu_new"
    resid, embd, attn = rates = [theirs.get(f"{place}_pdrop", 0.1) for place in ("resid", "embd", "attn")]
    if embd != resid or attn < resid:
        print(f"notice: {folder} has dropout {rates} on residual, embedding and attention; "
              f"model.py has one rate: {resid} (of attention, {max(attn, resid)})")
    refuse(folder, theirs, activation_function="gelu_new", scale_attn_weights=True,
           scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return dict(
        vocab_size=theirs["vocab_size"], n_layer=theirs["n_layer"], n_head=theirs["n_head"],
        n_embd=theirs["n_embd"], intermediate_size=theirs.get("n_inner") or 4 * theirs["n_embd"],
        block_size=theirs.get("n_positions", 1024), tie_weights=theirs.get("tie_word_embeddings", True),
        norm_eps=theirs.get("layer_norm_epsilon", 1e-5), dropout=resid,
        attn_dropout=attn if attn > resid else 0.0)


READ = {"llama": from_llama_config, "gpt2": from_gpt2_config}


def refuse(folder, theirs, **ours):
    """Exit at the first setting of config.json that is there, set, and not what model.py computes."""
    for key, value in ours.items():
        if theirs.get(key) not in (None, value):
            sys.exit(f"error: {folder} cannot be represented: its config.json has {key}={theirs[key]}, "
                     f"model.py {key}={value}")


def their_weights(model):
    """A model's tensors under the names and in the layout of Hugging Face."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.cfg.tie_weights:
        del weights["lm_head.weight"]
    return to_gpt2(weights, model.cfg.n_layer) if model.cfg.arch == "gpt2" else weights


def read_model(folder, cfg):
    """The folder's model, or exit at the first tensor that does not fit. Shapes are compared before anything
    is allocated."""
    found, shapes = {}, {}  # their names -> file and name in it; shape
    for path in weight_files(folder):
        with opened(path) as f:
            for name in f.keys():
                if re.search(r"\.attn\.(masked_)?bias$|\.inv_freq$", name):
                    continue
                part, ours = f.get_slice(name), name
                if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    sys.exit(f"error: {folder} cannot be represented: tensor {name} is {part.get_dtype()}")
                if cfg.arch == "gpt2" and name != "lm_head.weight":
                    ours = "transformer." + name.removeprefix("transformer.")
                found[ours], shapes[ours] = (path, name), tuple(part.get_shape())
    if cfg.tie_weights:  # some files have the table twice
        shapes.pop("lm_head.weight", None)
    compare_shapes(folder, cfg, shapes)
    weights = {}
    for path in sorted({path for path, _ in found.values()}):
        with opened(path) as f:
            weights |= {ours: f.get_tensor(name).float() for ours, (where, name) in found.items()
                        if where == path and ours in shapes}
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            sys.exit(f"error: {folder}: tensor {name} is not finite in float32")
    model = LanguageModel(cfg)
    weights = from_gpt2(weights, cfg.n_layer) if cfg.arch == "gpt2" else weights
    if cfg.tie_weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


def compare_shapes(folder, cfg, found):
    """Exit unless the folder's tensors, name -> shape, are those of the model that cfg describes."""
    if cfg.n_layer > len(found):  # an outline of a million layers would take minutes
        sys.exit(f"error: {folder} has {len(found)} tensors, too few for {cfg.n_layer} layers")
    if cfg.block_size > 2 ** 20:  # of which no tensor of a Llama speaks
        sys.exit(f"error: {folder}: {cfg.block_size} positions are more than 1048576")
    try:
        with torch.device("meta"):
            wanted = {name: tuple(t.shape) for name, t in their_weights(LanguageModel(cfg)).items()}
    except (RuntimeError, OverflowError) as e:  # of sizes that no computer has
        sys.exit(f"error: {folder}: config.json has impossible sizes: {str(e).splitlines()[0]}")
    wrong = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if wrong:
        sys.exit(f"error: {folder} cannot be represented: tensor {wrong[0]} is "
                 f"{found.get(wrong[0], 'missing')}, model.py has {wanted.get(wrong[0], 'none')}"
                 + f"; so with {len(wrong) - 1} more" * bool(wrong[1:]))


def gpt2_modules(n_layer):
    """(Hugging Face's module, ours, Conv1D?): Conv1D keeps its matrix transposed; one holds three of ours."""
    yield "wte", ["model.embed_tokens"], False
    yield "wpe", ["model.embed_positions"], False
    yield "ln_f", ["model.norm"], False
    for i in range(n_layer):
        theirs, ours = f"h.{i}.", f"model.layers.{i}."
        yield theirs + "ln_1", [ours + "input_layernorm"], False
        yield theirs + "attn.c_attn", [ours + f"self_attn.{part}_proj" for part in "qkv"], True
        yield theirs + "attn.c_proj", [ours + "self_attn.o_proj"], True
        yield theirs + "ln_2", [ours + "post_attention_layernorm"], False
        yield theirs + "mlp.c_fc", [ours + "mlp.up_proj"], True
        yield theirs + "mlp.c_proj", [ours + "mlp.down_proj"], True


def to_gpt2(weights, n_layer):
    renamed = {}
    for theirs, ours, conv in gpt2_modules(n_layer):
        for kind in ("weight", "bias"):
            if f"{ours[0]}.{kind}" in weights:
                w = torch.cat([weights.pop(f"{name}.{kind}") for name in ours])
                renamed[f"transformer.{theirs}.{kind}"] = w.T.contiguous() if conv and kind == "weight" else w
    return {**renamed, **weights}


def from_gpt2(weights, n_layer):
    renamed = {}
    for theirs, ours, conv in gpt2_modules(n_layer):
        for kind in ("weight", "bias"):
            if f"transformer.{theirs}.{kind}" in weights:
                w = weights.pop(f"transformer.{theirs}.{kind}")
                parts = (w.T if conv and kind == "weight" else w).chunk(len(ours))
                renamed |= {f"{name}.{kind}": part.contiguous() for name, part in zip(ours, parts)}
    return {**renamed, **weights}


def weight_files(folder):
    """model.safetensors, or the shards that its index names."""
    index, single = (os.path.join(folder, f) for f in ("model.safetensors.index.json", "model.safetensors"))
    if os.path.isfile(index):
        names = read_json(index, ["weight_map"])["weight_map"]
        names = list(names.values()) if isinstance(names, dict) else [None]
        if not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
            sys.exit(f"error: {index} is damaged: 'weight_map' does not name files of the folder")
        return [os.path.join(folder, name) for name in sorted(set(names))]
    if os.path.isfile(single):
        return [single]
    pickled = any(f.endswith((".bin", ".pt")) for f in os.listdir(folder))
    sys.exit(f"error: {folder} has no model.safetensors"
             + "; its weights are pickled, and pickle is never opened: "
               "save them with safetensors first" * pickled)


def opened(path):
    """A safetensors file of which nothing is read yet."""
    try:
        return safe_open(regular(path), "pt")
    except (OSError, SafetensorError) as e:
        sys.exit(f"error: cannot read {path}: {e}")


# --- tokenizers -----------------------------------------------------------------------------------

def tokenizer_json(vocab, ranked, specials, normalizer, pre_tokenizer, decoder, byte_fallback, unk=None):
    """tokenizer.json of a BPE. ranked: its pieces in the order in which pairs that make them are merged.

    Their libraries merge pairs by a list of pairs, ours (sentencepiece and tiktoken) whatever pair makes
    the best piece. So every way to cut a piece in two others is in the list.
    """
    known = set(ranked) | {piece for piece in vocab if len(piece) == 1}
    merges = [[piece[:i], piece[i:]] for piece in ranked for i in range(1, len(piece))
              if piece[:i] in known and piece[i:] in known]
    added = [dict(id=i, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False,
                  special=True) for text, i in specials.items()]
    bpe = dict(type="BPE", dropout=None, unk_token=unk, continuing_subword_prefix=None,
               end_of_word_suffix=None, fuse_unk=False, byte_fallback=byte_fallback, ignore_merges=False,
               vocab=vocab, merges=merges)
    return dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=normalizer,
                pre_tokenizer=pre_tokenizer, post_processor=None, decoder=decoder, model=bpe)


def sentencepiece_json(tokenizer):
    """tokenizer.json of a sentencepiece model as prepare.py trains them."""
    sp = tokenizer.sp
    pieces = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    special = {piece: i for piece, i in pieces.items() if sp.is_control(i) or sp.is_unknown(i)}
    normal = [piece for piece, i in pieces.items()
              if not (piece in special or sp.is_byte(i) or sp.is_unused(i))]
    in_order = [sp.get_score(pieces[piece]) for piece in normal] == [-rank for rank in range(len(normal))]
    if not in_order or sum(map(sp.is_byte, pieces.values())) != 256 \
            or not tokenizer.nfkc:
        sys.exit(f"error: {tokenizer.file} is not a BPE with byte fallback, NFKC and all blanks kept, "
                 "as prepare.py trains them: its tokenizer.json would give other tokens")
    mark = dict(type="Replace", pattern=dict(String=" "), content="▁")
    unmark = dict(type="Replace", pattern=dict(String="▁"), content=" ")
    return tokenizer_json(
        pieces, normal, special,
        normalizer=dict(type="Sequence", normalizers=[dict(type="NFKC"), mark]), pre_tokenizer=None,
        decoder=dict(type="Sequence", decoders=[unmark, dict(type="ByteFallback"), dict(type="Fuse")]),
        byte_fallback=True, unk=sp.id_to_piece(sp.unk_id()))


def bytelevel_json(tokenizer):
    """tokenizer.json of a byte-level BPE."""
    ranked = sorted(tokenizer.ranks.items(), key=lambda item: item[1])
    pieces = {"".join(BYTE_CHAR[b] for b in token): rank for token, rank in ranked}
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type="Split", pattern=dict(Regex=tokenizer.pattern), behavior="Isolated", invert=False)
    return tokenizer_json(
        {**tokenizer.specials, **pieces}, list(pieces), tokenizer.specials,
        normalizer=dict(type="NFKC") if tokenizer.nfkc else None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, level]), decoder=level, byte_fallback=False)


def bos_template(text, token):
    """A post-processor that puts `token`, called `text`, before a text and before each of two."""
    before, (a, b) = dict(SpecialToken=dict(id=text, type_id=0)), (
        dict(Sequence=dict(id=name, type_id=0)) for name in "AB")
    return dict(type="TemplateProcessing", single=[before, a], pair=[before, a, before, b],
                special_tokens={text: dict(id=text, ids=[token], tokens=[text])})


def byte_chars():
    """GPT-2's printable character for each byte: itself where it is printable, else 256 + a count."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


BYTE_CHAR = byte_chars()
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # ByteLevel's


def import_tokenizer(folder, out_dir, vocab_size):
    """The folder's tokenizer as a file of ours in out_dir: its sentencepiece model or byte-level BPE."""
    path = os.path.join(folder, "tokenizer.model")
    if os.path.isfile(path):
        return shutil.copy(path, os.path.join(out_dir, "tokenizer.model"))
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        sys.exit(f"error: {folder} has no tokenizer.model or tokenizer.json")
    spec = read_json(path, ("model", "pre_tokenizer", "normalizer", "added_tokens"))
    settings = os.path.join(folder, "tokenizer_config.json")
    settings = read_json(settings) if os.path.isfile(settings) else {}
    pattern, nfkc = pattern_and_nfkc(path, spec, settings)
    specials = {token["content"]: token["id"] for token in spec["added_tokens"] if token["id"] < vocab_size}
    left_out = [token["content"] for token in spec["added_tokens"] if token["id"] >= vocab_size]
    if left_out:
        print(f"notice: left out, beyond the model's vocabulary: {', '.join(left_out)}")
    ranks = bytelevel_ranks(path, spec["model"], specials, vocab_size)
    missing = sum(bytes([b]) not in ranks for b in range(256))
    if missing:
        print(f"notice: {missing} of the 256 bytes have no token: text loses them, "
              "as with the tokenizers library")
    named = {name: settings.get(f"{name}_token") or None for name in ("bos", "eos", "pad")}
    named = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    if not all(isinstance(token, str | None) for token in named.values()):
        raise TypeError(f"special tokens {named}")
    file = os.path.join(out_dir, "tokenizer.json")
    write_json(file, dict(
        name=os.path.basename(os.path.abspath(folder)), pattern=pattern, specials=specials, nfkc=nfkc,
        **named, vocab_size=vocab_size,
        ranks={base64.b64encode(token).decode(): i for token, i in ranks.items()}))
    return file


def adds_bos(folder):
    """Does the folder's tokenizer put one token, the beginning of text, before a text?"""
    path, settings = (os.path.join(folder, name) for name in ("tokenizer.json", "tokenizer_config.json"))
    if not (os.path.isfile(path) and os.path.isfile(settings)):
        return False
    bos = read_json(settings).get("bos_token")
    for step in sequence(read_json(path).get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            first = step["single"][0].get("SpecialToken", {}).get("id")
            return first is not None and first == (bos["content"] if isinstance(bos, dict) else bos)
    return False


def pattern_and_nfkc(path, spec, settings):
    """How tokenizer.json cuts text into words, and whether it normalises it. Exits if it does anything else
    than a GPT-2-style byte-level BPE does."""
    model, steps = spec["model"], sequence(spec["pre_tokenizer"], "pretokenizers")
    cuts = [step["pattern"]["Regex"] for step in steps
            if step["type"] == "Split" and step["behavior"] == "Isolated" and "Regex" in step["pattern"]]
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    patterns = cuts + [GPT2_PATTERN] * sum(step.get("use_regex", True) for step in levels)
    normalizers = [step["type"] for step in sequence(spec["normalizer"], "normalizers")]
    beside_bpe = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    checks = dict(
        model=model.get("type", "BPE") == "BPE" and not any(map(model.get, beside_bpe)),
        pre_tokenizer=len(levels) == 1 and len(steps) == 1 + len(cuts) and len(patterns) == 1,
        normalizer=normalizers in ([], ["NFKC"]),
        # Hugging Face's class for GPT-2 switches it off, whatever the file says
        add_prefix_space=(str(settings.get("tokenizer_class")).startswith("GPT2")
                          or not any(step.get("add_prefix_space") for step in levels)))
    for part, good in checks.items():
        if not good:
            sys.exit(f"error: {path} cannot be represented: its {part} is not that of a GPT-2-style "
                     "byte-level BPE")
    return patterns[0], normalizers == ["NFKC"]


def bytelevel_ranks(path, model, specials, vocab_size):
    """bytes -> id of the tokens of tokenizer.json's model, in the order of the ids."""
    byte_of = {char: byte for byte, char in BYTE_CHAR.items()}
    vocab = {token: i for token, i in model["vocab"].items() if token not in specials}
    ids = sorted([*vocab.values(), *specials.values()])
    if any(a == b for a, b in zip(ids, ids[1:])) or not 0 <= ids[0] <= ids[-1] < vocab_size:
        sys.exit(f"error: {path} cannot be represented: two tokens have one id, or one beyond the model's")
    merges = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
    merged = [vocab.get("".join(pair)) for pair in merges]
    if None in merged or merged != sorted(merged) or not all(set(token) <= byte_of.keys() for token in vocab):
        sys.exit(f"error: {path} cannot be represented: its merges are not in the order of their ids, "
                 "or its pieces not bytes")
    return {bytes(map(byte_of.get, token)): i for token, i in sorted(vocab.items(), key=lambda item: item[1])}


def sequence(step, key):
    """A step of tokenizer.json as the list of steps it stands for."""
    return step[key] if step and step["type"] == "Sequence" else [step] if step else []


# --- the model card -------------------------------------------------------------------------------

def model_card(name, path, described):
    """README.md: what it is, how it was trained, what it scored."""
    teachers = [os.path.basename(os.path.normpath(path)) for path in described.get("teachers", ())]
    about = (f"{described['parameters']:,} parameters ({described['model']['arch']}), "
             f"step {described['step']:,} of its training")
    if teachers:
        about += f", distilled from {len(teachers)} teachers ({', '.join(teachers)})"
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", f"# {name}", "",
            about + ".", "", "| | |", "|---|---|"]
    rows = [f"| {key} | {value} |" for key, value in facts(described).items() if value is not None]
    return "\n".join([*head, *rows, *scores(path, described["weights_sha256"])]) + "\n"


def facts(described):
    recipe = described.get("train_config", {})
    keys = ("seq_len", "epochs", "batch_size", "learning_rate", "weight_decay", "seed",
            "alpha", "temperature", "kl_reduction")
    return {"validation loss, nats per token": described["val_ce"] and round(described["val_ce"], 4),
            "data": recipe.get("data_dir"), "data, SHA-256": described.get("data_sha256"),
            **{key: recipe.get(key) for key in keys},
            "`<s>` in the training text": described["bos"], "code": described["git_revision"]}


def scores(path, weights):
    """Rows for what eval_blimp.py left in the run folder, if it is of these weights."""
    file = os.path.join(path, "blimp.json")
    result = read_json(file, ("folders",)) if os.path.isfile(file) else {}
    if result.get("weights_sha256") == weights:
        for folder, row in result["folders"].items():
            yield (f"| {folder}, %, mean of {len(row['tasks'])} tasks ({result['dtype']}) "
                   f"| {100 * row['accuracy']:.2f} ± {100 * row['se']:.2f} |")


if __name__ == "__main__":
    launch(main)
