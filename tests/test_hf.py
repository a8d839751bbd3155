"""Export and import against transformers and tokenizers, and the official scoring on what they load."""
import json
import os
import random
import shutil
import unicodedata
from dataclasses import replace

import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer, normalizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

import distill
import eval_blimp
import prepare
from helpers import (
    GPT2,
    VOCAB,
    assert_same,
    distill_config,
    edit_json,
    read_jsonl,
    run_distill,
    run_train,
    write_pairs,
)
from lib.checkpoints import find_checkpoint, load_checkpoint, read_checkpoint_config
from lib.files import write_json
from lib.scoring import candidate
from lib.tokenizers import load_tokenizer
from tools import hf

HARD = ["<s> is text</s>", " leading", "  two   blanks ", "lines\n\nand\ttabs\r\n", "ﬁ ① Å ½", "a\u2581b", "",
        "\u00a0x", "\u3000", "漢字 🙂 e\u0301", "\u200b\u2060", "What did you get?\nI got a chair.",
        "don't CAN'T 1234 5", "\u05d0\u05d1", "...!?", "<unk>", "<|endoftext|>", "A" * 300]


def lines(corpus, n=10_000):
    """Hard cases, the corpus's lines, and strings put together at random."""
    rng = random.Random(5)
    folder = f"{corpus}/text/train_10M"
    text = [line for name in sorted(os.listdir(folder))
            for line in open(f"{folder}/{name}", encoding="utf-8")]
    letters = [*map(chr, range(32, 127)), *"\n\t  éßŒ№ﬃ漢🙂▁\u00a0"]
    others = n - len(HARD) - len(text)
    return HARD + text + ["".join(rng.choices(letters, k=rng.randrange(40))) for _ in range(others)]


@pytest.fixture(scope="module")
def byte_data(corpus, tmp_path_factory):
    """The corpus with a byte-level BPE that `tokenizers` trained and hf.py imported, as Baby Llama's was."""
    folder = tmp_path_factory.mktemp("bytes")
    save_bytelevel(corpus, folder / "hf", alphabet=True)
    random_llama().save_pretrained(folder / "hf")
    hf.main(["import", str(folder / "hf"), str(folder / "run")])
    prepare.main(prepare.PrepareConfig(input_dir=f"{corpus}/text", data_dir=str(folder / "data"), bos="line",
                                       tokenizer=str(folder / "run/ckpt_0/tokenizer.json")))
    return str(folder / "data")


def save_bytelevel(corpus, folder, alphabet):
    os.makedirs(folder, exist_ok=True)
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe._tokenizer.normalizer = normalizers.NFKC()
    files = [f"{corpus}/text/train_10M/{name}" for name in os.listdir(f"{corpus}/text/train_10M")]
    recipe = dict(vocab_size=VOCAB, min_frequency=2, special_tokens=["<pad>", "<s>", "</s>"],
                  show_progress=False)
    if alphabet:
        bpe.train(files, **recipe)
    else:
        bpe._tokenizer.train(files, BpeTrainer(**recipe))
    bpe.save(str(folder / "tokenizer.json"))
    with open(folder / "tokenizer_config.json", "w") as f:
        json.dump(dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>",
                       pad_token=dict(content="<pad>")), f)


def random_llama(**change):
    torch.manual_seed(1)
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **change}))


def random_gpt2(**change):
    torch.manual_seed(1)
    sizes = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **change}))
    for p in model.parameters():
        p.data.normal_(std=0.1)
    return model.eval()


EXPORTED = {
    "sentencepiece-llama": {}, "sentencepiece-gpt2": GPT2,
    "bytes-gqa": dict(n_head=4, n_kv_head=2), "bytes-gpt2": dict(GPT2, attn_dropout=0.2),
}


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request, data, byte_data, tmp_path_factory):
    """A trained run and its export."""
    kind, change = request.param.split("-")[0], EXPORTED[request.param]
    out = tmp_path_factory.mktemp("exported")
    run_train(data if kind == "sentencepiece" else byte_data, str(out / "run"), **change)
    hf.main(["export", str(out / "run"), str(out / "hf")])
    return str(out / "run"), str(out / "hf")


def test_transformers_computes_the_same_logits(exported):
    run, folder = exported
    ours, _, _ = load_checkpoint(run)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    x = torch.randint(0, VOCAB, (4, 64))
    with torch.no_grad():
        assert (ours(x) - theirs(x).logits).abs().max() < 1e-5
    assert sum(p.numel() for p in theirs.parameters()) == ours.n_params()


def test_transformers_gives_the_same_tokens(exported, corpus):
    run, folder = exported
    _, ours, _ = load_checkpoint(run)
    theirs = AutoTokenizer.from_pretrained(folder)
    for line in lines(corpus):
        ids = ours.encode(line)
        assert theirs.encode(line, add_special_tokens=False) == ids, line
        assert theirs.decode(ids) == ours.decode(ids), line
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.eos, ours.pad)


@pytest.mark.parametrize("choice,added", [("auto", True), ("yes", True), ("no", False)])
def test_transformers_scores_the_tokens_that_we_score(exported, corpus, tmp_path, choice, added):
    """By the rules since 2025: the tokenizer's plain call, a token counted by where it ends, but never the
    first of the row. The runs' text had <s>."""
    run, folder = exported
    if choice != "auto":
        folder = str(tmp_path / "hf")
        hf.main(["export", run, folder, f"--bos={choice}"])
    _, ours, _ = load_checkpoint(run)
    theirs = AutoTokenizer.from_pretrained(folder)
    bos = [ours.bos] * added
    rng = random.Random(2)
    for line in ["the dog sees a cat.", "What did you get?\nI got a chair.", "<s> x \u6f22",
                 *rng.sample(lines(corpus, 1000)[len(HARD):], 40)]:
        line = line.rstrip("\n") or "a"
        if unicodedata.normalize("NFKC", line) != line or "\u2581" in line:
            continue
        encoded = theirs(line, return_offsets_mapping=True)
        for start in {0, rng.randrange(len(line)), line.rfind(" ") + 1, max(0, line.rfind(" "))}:
            counted = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if i and end > start]
            c = candidate(ours, line, start, ours.bos if added else None)
            assert list(c.ids) == encoded["input_ids"], line
            assert list(range(c.n_context, len(c.ids))) == counted, (line, start)
    settings = json.load(open(f"{folder}/tokenizer_config.json"))  # no token types, which GPT-2 would add up
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    pair = [*bos, *ours.encode("the dog"), *bos, *ours.encode("a cat")]
    assert theirs("the dog", "a cat")["input_ids"] == pair


def test_official_scores_are_ours(exported, corpus, tmp_path):
    """The 2024 pipeline's rules (lm-evaluation-harness, batches of one) on what transformers loads."""
    run, folder = exported
    rows = [row for name in sorted(os.listdir(f"{corpus}/pairs"))[:4]
            for row in read_jsonl(f"{corpus}/pairs/{name}")[:10]]
    rows = [(row["sentence_good"], row["sentence_bad"]) for row in rows]
    rows += [("What did you get?\nI got a chair.", "What did you get?\nI got a teacher."),
             ("same", "same"), ("<s> x", "</s> x")]
    write_pairs(tmp_path / "pairs", "task", rows)
    eval_blimp.main(eval_blimp.EvalConfig(ckpt=(run,), data=(str(tmp_path / "pairs"),),
                                          items=str(tmp_path / "items"), device="cpu"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def log_likelihood(sentence):
        ids = tokenizer.encode(" " + sentence, add_special_tokens=False)
        x = torch.tensor([[tokenizer.bos_token_id] + ids])
        with torch.no_grad():
            logp = model(x[:, :-1]).logits.log_softmax(-1)
        return logp.gather(-1, x[:, 1:, None]).sum().item()

    for row, got in zip(rows, read_jsonl(tmp_path / "items"), strict=True):
        good, bad = map(log_likelihood, row)
        assert [got["logp_good"], got["logp_bad"]] == pytest.approx([good, bad], rel=0, abs=1e-4)
        assert (got["logp_good"] >= got["logp_bad"]) == (good >= bad) or abs(good - bad) < 1e-4


def test_export_and_import_change_nothing(exported, tmp_path):
    run, folder = exported
    hf.main(["import", folder, str(tmp_path / "back")])
    ours, tokenizer, _ = load_checkpoint(run)
    back, same, described = load_checkpoint(str(tmp_path / "back"))
    assert_same(ours.state_dict(), back.state_dict())
    assert described["parameters"] == ours.n_params()
    assert replace(back.cfg, dropout=0, n_kv_head=0) == replace(ours.cfg, dropout=0, n_kv_head=0)
    assert tokenizer.encode("the dog <s> ①") == same.encode("the dog <s> ①")
    assert tokenizer.vocab_size == same.vocab_size
    assert described["bos"] == "document"  # there was <s>; whether it was at each line, no export says
    hf.main(["export", run, str(tmp_path / "without"), "--bos=no"])
    hf.main(["import", str(tmp_path / "without"), str(tmp_path / "again")])
    assert read_checkpoint_config(find_checkpoint(str(tmp_path / "again")))["bos"] == "unknown"


@pytest.mark.parametrize("make", [
    random_llama, random_gpt2, lambda: random_llama(tie_word_embeddings=True),
    lambda: random_gpt2(tie_word_embeddings=False), lambda: random_llama(rope_theta=500.0)])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_import_computes_the_same_logits(make, shard, corpus, tmp_path):
    theirs = make().eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    save_bytelevel(corpus, tmp_path / "hf", alphabet=True)
    assert (shard == "20KB") == os.path.isfile(tmp_path / "hf/model.safetensors.index.json")
    hf.main(["import", str(tmp_path / "hf"), str(tmp_path / "run")])
    ours, _, described = load_checkpoint(str(tmp_path / "run"))
    x = torch.randint(0, VOCAB, (4, 64))
    with torch.no_grad():
        assert (ours(x) - theirs(x).logits).abs().max() < 1e-5
    assert described["parameters"] == sum(p.numel() for p in theirs.parameters())


def test_an_imported_model_teaches(byte_data, tmp_path):
    run = os.path.join(os.path.dirname(byte_data), "run")
    distill.main(distill_config(byte_data, tmp_path / "s", max_iters=3, teachers=(run,)))
    assert read_checkpoint_config(find_checkpoint(str(tmp_path / "s")))["teachers"] == [run]


@pytest.mark.parametrize("alphabet", [True, False])
def test_bytelevel_tokens_equal_the_tokenizers_librarys(alphabet, corpus, tmp_path, capsys):
    save_bytelevel(corpus, tmp_path, alphabet)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True  # '<s>' in text stays text, as with ours
    (tmp_path / "out").mkdir()
    ours = load_tokenizer(hf.import_tokenizer(str(tmp_path), str(tmp_path / "out"), VOCAB))
    for line in lines(corpus):
        assert ours.encode(line) == theirs.encode(line).ids, line
    missing = [b for b in range(256) if hf.BYTE_CHAR[b] not in theirs.get_vocab()]
    assert bool(missing) != alphabet
    assert ("bytes have no token" in capsys.readouterr().out) == bool(missing)
    ours.dropped = 0
    ours.encode("\u00ff" * 3)  # U+00FF is two bytes in UTF-8
    assert ours.dropped == 3 * sum(b in missing for b in "\u00ff".encode())


def test_dropped_bytes_are_counted_by_prepare(corpus, tmp_path, capsys):
    save_bytelevel(corpus, tmp_path / "hf", alphabet=False)
    (tmp_path / "t").mkdir()
    file = hf.import_tokenizer(str(tmp_path / "hf"), str(tmp_path / "t"), VOCAB)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("the dog\n漢字\n" * 50, encoding="utf-8")
    prepare.main(prepare.PrepareConfig(input_dir=str(tmp_path / "text"), data_dir=str(tmp_path / "d"),
                                       tokenizer=file, val_fraction=0.5))
    kept = load_tokenizer(file)
    kept.encode("漢字")
    assert kept.dropped > 0
    assert f"{50 * kept.dropped:,} bytes have no token and were dropped" in capsys.readouterr().out


@pytest.mark.parametrize("make,file,change,message", [
    (random_llama, "config.json", dict(model_type="opt"), "type 'opt'"),
    (random_llama, "config.json", dict(attention_bias=True), "attention_bias=True"),
    (random_llama, "config.json", dict(sliding_window=32), "sliding_window=32"),
    (random_llama, "config.json", dict(hidden_act="gelu"), "hidden_act=gelu"),
    (random_llama, "config.json", dict(head_dim=4), "head_dim=4"),
    (random_llama, "config.json", dict(rope_scaling=dict(type="linear", factor=2.0)), "RoPE"),
    (random_llama, "config.json", dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "RoPE"),
    (random_llama, "config.json", dict(intermediate_size=40), "up_proj.weight|gate_proj.weight"),
    (random_llama, "config.json", dict(num_hidden_layers=1), "model.layers.1"),
    (random_gpt2, "config.json", dict(activation_function="relu"), "activation_function=relu"),
    (random_gpt2, "config.json", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse"),
    (random_gpt2, "tokenizer.json", dict(pre_tokenizer=dict(type="Whitespace")), "pre_tokenizer"),
    (random_gpt2, "tokenizer.json", dict(normalizer=dict(type="Lowercase")), "normalizer"),
    (random_gpt2, "tokenizer.json",
     dict(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=True, use_regex=True)), "add_prefix_space"),
])
def test_what_cannot_be_represented_is_refused_by_name(make, file, change, message, corpus, tmp_path):
    make().save_pretrained(tmp_path / "hf")
    save_bytelevel(corpus, tmp_path / "hf", alphabet=True)
    edit_json(tmp_path / "hf" / file, **change)
    with pytest.raises(SystemExit, match=message):
        hf.main(["import", str(tmp_path / "hf"), str(tmp_path / "run")])
    assert not os.path.exists(tmp_path / "run/best.json")


def test_biases_pickles_and_masked_models_are_refused(corpus, data, tmp_path):
    random_llama(attention_bias=True).save_pretrained(tmp_path / "biased")
    edit_json(tmp_path / "biased/config.json", attention_bias=False)  # it lies
    with pytest.raises(SystemExit, match="bias"):
        hf.main(["import", str(tmp_path / "biased"), str(tmp_path / "run")])
    random_llama().save_pretrained(tmp_path / "pickled")
    os.rename(tmp_path / "pickled/model.safetensors", tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(SystemExit, match="pickle is never opened"):
        hf.main(["import", str(tmp_path / "pickled"), str(tmp_path / "run")])
    run_train(data, str(tmp_path / "masked"), causal=False)
    with pytest.raises(SystemExit, match="causal=False"):
        hf.main(["export", str(tmp_path / "masked"), str(tmp_path / "out")])
    run_train(data, str(tmp_path / "gqa"), **{**GPT2, "n_kv_head": 1})
    with pytest.raises(SystemExit, match="n_kv_head=1"):
        hf.main(["export", str(tmp_path / "gqa"), str(tmp_path / "out")])
    assert not os.path.exists(tmp_path / "out")


@pytest.mark.parametrize("argv", [
    [], ["export"], ["exprot", "a", "b"], ["export", "--x", "b"], ["export", "nowhere", "b"],
    ["export", "nowhere", "b", "--bos=maybe"], ["import", "nowhere", "b", "--bos=no"], ["--bos=no"],
    ["export", "nowhere", "b", "--bos=no", "--bos=yes"],
    ["import", "nowhere", "b"]])
def test_bad_commands_are_one_line(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^error: [^\n]+$"):
        hf.main(argv)


def test_a_card_tells_the_recipe_and_the_scores(corpus, teachers, tmp_path):
    eval_blimp.main(eval_blimp.EvalConfig(ckpt=(teachers[1],), data=(f"{corpus}/pairs",), device="cpu"))
    hf.main(["export", teachers[1], str(tmp_path / "out")])
    card = open(tmp_path / "out/README.md").read()
    score = json.load(open(f"{teachers[1]}/blimp.json"))["folders"]["pairs"]["accuracy"]
    assert f"{100 * score:.2f}" in card and "| learning_rate | 0.01 |" in card
    val_ce = read_checkpoint_config(find_checkpoint(teachers[1]))["val_ce"]
    assert float(card.split("nats per token | ")[1].split(" ")[0]) == pytest.approx(val_ce, abs=1e-4)


def test_a_card_of_other_weights_and_of_a_teacher_with_a_slash(teachers, data, tmp_path):
    run_distill(data, tmp_path / "student", [f"{teachers[0]}/"], max_iters=3)
    row = dict(accuracy=0.75, se=0.1, n=4, tasks={"t": {}}, phenomena={})
    write_json(f"{tmp_path}/student/blimp.json", dict(step=3, weights_sha256="x", folders=dict(pairs=row)))
    hf.main(["export", str(tmp_path / "student"), str(tmp_path / "out")])
    card = open(tmp_path / "out/README.md").read()
    assert "75.00" not in card and "distilled from 1 teachers (gpt2)" in card


def test_ids_without_a_token_give_no_text(byte_gpt2):
    """As of an imported model whose vocabulary is padded."""
    theirs, ours = AutoTokenizer.from_pretrained(byte_gpt2[0]), load_checkpoint(byte_gpt2[1])[1]
    ids = ours.encode("the dog sees")
    padded = [*ids[:1], 10 ** 6, *ids[1:], VOCAB]
    assert ours.decode(padded) == theirs.decode(padded) == "the dog sees"


def test_checkpoints_by_words_are_exported_as_revisions(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    edit_json(tmp_path / "data/meta.json", words={"train": {"all": 10 ** 12}, "val": {}})
    run_train(str(tmp_path / "data"), tmp_path / "run", keep_words=True, max_iters=2)
    kept = [name for name in os.listdir(tmp_path / "run") if name.startswith("chck_")]
    hf.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")])
    for name in kept:
        x = torch.arange(10)[None]
        ours, _, _ = load_checkpoint(str(tmp_path / "run" / name))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / name).eval()
        with torch.no_grad():
            assert (ours(x) - theirs(x).logits).abs().max() < 1e-5
    assert len(kept) == 2
