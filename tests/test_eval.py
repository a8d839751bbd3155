"""BLiMP scoring against an independent one: Hugging Face's model, one sentence at a time, float64."""
import gzip
import io
import json
import math
import os

import pytest
import torch
from conftest import GPT2, run_train
from test_distill import config
from test_train import records
from transformers import LlamaConfig, LlamaForCausalLM

import disk
import distill
import eval_blimp
import sample
from eval_blimp import EvalConfig, Pair


def write_pairs(folder, task, rows):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, task + ".jsonl"), "w", encoding="utf-8") as f:
        for good, bad, *term in rows:
            f.write(json.dumps(dict(sentence_good=good, sentence_bad=bad, **({"linguistics_term": term[0]} if term else {}))) + "\n")


def items(path):
    return [json.loads(line) for line in open(path)]


def reference_logp(run, sentence):
    """Sum of log p of " " + sentence after <s>, by the rules of the 2024 pipeline, with another model implementation."""
    ours, tokenizer, config = disk.load_checkpoint(run)
    c = ours.cfg
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head or c.n_head,
        hidden_size=c.n_embd, intermediate_size=c.intermediate_size, max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=False)).eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.double()
    ids = [1] + tokenizer.sp.encode(" " + sentence)
    with torch.no_grad():
        z = theirs(torch.tensor([ids[:-1]])).logits[0]
    return z, ids[1:]


def score(z, ids):
    return sum((z[i, t] - z[i].logsumexp(0)).item() for i, t in enumerate(ids))


def test_scores_equal_an_independent_computation(corpus, teachers, tmp_path):
    rows = [json.loads(line) for line in open(f"{corpus}/pairs/agreement_relative_clause.jsonl")][:12]
    write_pairs(tmp_path / "p", "agreement", [(r["sentence_good"], r["sentence_bad"]) for r in rows])
    write_pairs(tmp_path / "p", "odd", [("What did you get?\nI got a chair.", "What did you get?\nI got a teacher."), ("x", "the long other one ☃")])
    eval_blimp.main(EvalConfig(ckpt=(teachers[1],), data=(str(tmp_path / "p"),), items=str(tmp_path / "items"), device="cpu", batch_tokens=100))
    got = items(tmp_path / "items")
    assert [(g["task"], g["line"]) for g in got] == [("agreement", i) for i in range(12)] + [("odd", 0), ("odd", 1)]
    sentences = [(r["sentence_good"], r["sentence_bad"]) for r in rows] + [
        ("What did you get?\nI got a chair.", "What did you get?\nI got a teacher."), ("x", "the long other one ☃")]
    for g, pair in zip(got, sentences):
        for key, sentence in zip(("logp_good", "logp_bad"), pair):
            assert g[key] == pytest.approx(score(*reference_logp(teachers[1], sentence)), abs=1e-4)
    result = json.load(open(os.path.join(teachers[1], "blimp.json")))["folders"]["p"]
    assert result["tasks"]["agreement"]["accuracy"] == sum(g["logp_good"] >= g["logp_bad"] for g in got[:12]) / 12
    assert result["accuracy"] == (result["tasks"]["agreement"]["accuracy"] + result["tasks"]["odd"]["accuracy"]) / 2


def test_an_ensemble_averages_logits(corpus, teachers, tmp_path):
    write_pairs(tmp_path / "p", "t", [("the dog sees a cat.", "the dog see a cat.")])
    eval_blimp.main(EvalConfig(ckpt=tuple(teachers[1:]), data=(str(tmp_path / "p"),), items=str(tmp_path / "i"), device="cpu"))
    (z1, ids), (z2, _) = (reference_logp(t, "the dog sees a cat.") for t in teachers[1:])
    assert items(tmp_path / "i")[0]["logp_good"] == pytest.approx(score((z1 + z2) / 2, ids), abs=1e-4)


def test_validation_loss_is_trainings(data, teachers, tmp_path, capsys):
    """Of one model as its run logged it; of an ensemble as distill.py measures it."""
    how = dict(data_dir=data, seq_len=32, eval_chunks=16, device="cpu")
    eval_blimp.main(EvalConfig(ckpt=(teachers[1],), out=str(tmp_path / "one.json"), **how))
    logged = disk.read_checkpoint_config(disk.find_checkpoint(teachers[1]))["val_ce"]
    assert json.load(open(tmp_path / "one.json"))["val_ce"] == pytest.approx(logged, rel=1e-6)
    distill.main(config(data, tmp_path / "s", teachers=tuple(teachers[:2]), max_iters=3))
    capsys.readouterr()
    eval_blimp.main(EvalConfig(ckpt=tuple(teachers[:2]), **how))
    assert f"{records(tmp_path / 's')[0]['ensemble_val_ce']:.4f} nats" in capsys.readouterr().out


def test_batching_does_not_show(corpus, teachers, tmp_path):
    models, tokenizer, _ = eval_blimp.load_ensemble([teachers[0]], torch.device("cpu"))
    pairs = eval_blimp.read_pairs(f"{corpus}/pairs", tokenizer, 1, 64)[::37]
    one = eval_blimp.score_pairs(models, pairs, 1)
    many = eval_blimp.score_pairs(models, pairs, 5000)
    assert torch.tensor(one).sub(torch.tensor(many)).abs().max() < 1e-4


@pytest.mark.parametrize("good,bad", [([5], [5, 0]), ([5, 0], [5]), ([5, 0, 7], [5, 0, 0, 7]), ([0], [0, 0])])
def test_token_0_is_not_taken_for_padding(teachers, good, bad):
    models, _, _ = eval_blimp.load_ensemble([teachers[1]], torch.device("cpu"))
    together, = eval_blimp.score_pairs(models, [Pair("t", 0, [1, *good], [1, *bad], 1, "", ("", ""), "")], 1000)
    for ids, ours in zip((good, bad), together):
        logp = models[0](torch.tensor([[1] + ids[:-1]]))[0].log_softmax(-1)
        assert ours == pytest.approx(sum(logp[i, t].item() for i, t in enumerate(ids)), abs=1e-5)


def test_the_same_sentence_twice_ties_and_counts_as_right(teachers, tmp_path):
    write_pairs(tmp_path / "p", "same", [("a cat sat.", "a cat sat."), ("the dog.", "the dog.")] * 40)
    eval_blimp.main(EvalConfig(ckpt=(teachers[0],), data=(str(tmp_path / "p"),), items=str(tmp_path / "i"), device="cpu", batch_tokens=64))
    assert all(i["logp_good"] == i["logp_bad"] for i in items(tmp_path / "i"))
    assert json.load(open(os.path.join(teachers[0], "blimp.json")))["folders"]["p"]["accuracy"] == 1.0


def test_averages_and_standard_errors():
    """The worked example of the pipeline's formulas: 3 of 5 and 2 of 3."""
    pairs = [Pair(t, i, [1, 1], [1, 2], 1, "", (" a", " b"), term) for t, n, term in (("a", 5, "binding"), ("b", 3, "s-selection")) for i in range(n)]
    result = eval_blimp.summary(pairs, [(0.0, -1.0)] * 3 + [(-1.0, 0.0)] * 2 + [(0.0, -1.0), (0.0, 0.0), (-2.0, -1.0)])
    assert result["tasks"]["a"]["accuracy"] == 0.6 and result["tasks"]["a"]["se"] == pytest.approx(0.2449, abs=1e-4)
    assert result["tasks"]["b"]["se"] == pytest.approx(0.3333, abs=1e-4)
    assert result["accuracy"] == pytest.approx(0.63333, abs=1e-5) and result["se"] == pytest.approx(0.1972, abs=1e-4)
    assert set(result["phenomena"]) == {"binding", "argument_structure"}


def test_bfloat16_is_close(corpus, teachers):
    run = dict(ckpt=(teachers[1],), data=(f"{corpus}/pairs",), device="cpu")
    accuracy = {}
    for dtype in ("bfloat16", "float32"):
        eval_blimp.main(EvalConfig(**run, dtype=dtype))
        accuracy[dtype] = json.load(open(os.path.join(teachers[1], "blimp.json")))["folders"]["pairs"]["accuracy"]
    assert accuracy["bfloat16"] == pytest.approx(accuracy["float32"], abs=0.02)


@pytest.mark.parametrize("text,message", [
    ('{"sentence_good": "a", "sentence_bad": "b"}\n{"sentence_good": "a"}\n', r"t\.jsonl, line 2: no field 'sentence_bad'"),
    ('{"sentence_good": "a", \n', r"t\.jsonl, line 1: not a minimal pair"),
    ('["a", "b"]\n', r"t\.jsonl, line 1: not a minimal pair"),
    ('{"sentence_good": 1, "sentence_bad": "b"}\n', r"t\.jsonl, line 1: not a minimal pair"),
    ('{"sentence_good": "%s", "sentence_bad": "b"}\n' % ("cat " * 99), r"t\.jsonl, line 1: \d+ tokens, the model has 64 positions"),
    ('{"sentence_good": "\\ud800", "sentence_bad": "b"}\n', r"t\.jsonl, line 1: not a minimal pair"),
    ("", "has no minimal pairs"),
    (None, "no data folder"),
])
def test_bad_pairs_are_one_line(teachers, tmp_path, text, message):
    if text is not None:
        os.makedirs(tmp_path / "p")
        open(tmp_path / "p" / "t.jsonl", "w").write(text)
    with pytest.raises(SystemExit, match=message) as e:
        eval_blimp.main(EvalConfig(ckpt=(teachers[0],), data=(str(tmp_path / "p"),), device="cpu"))
    assert "\n" not in str(e.value)


def test_unwritable_results_are_refused_before_scoring(corpus, teachers, tmp_path):
    for change in (dict(out=str(tmp_path / "no" / "x.json")), dict(items=str(tmp_path))):
        with pytest.raises(SystemExit, match="cannot write"):
            eval_blimp.main(EvalConfig(ckpt=(teachers[0],), data=(f"{corpus}/pairs",), device="cpu", **change))


def test_prompts_are_read_where_none_is_given(teachers, capsys, monkeypatch):
    """Each line is answered as `--prompt` would be, with the next seed; an empty one too."""
    cfg = dict(ckpt=(teachers[1],), length=8, device="cpu")
    monkeypatch.setattr("sys.stdin", io.StringIO("the dog\n\na cat\n"))
    sample.main(sample.SampleConfig(**cfg))
    answers = capsys.readouterr().out
    expected = []
    for seed, prompt in ((1, "the dog"), (3, "a cat")):
        sample.main(sample.SampleConfig(**cfg, prompt=prompt, seed=seed))
        expected.append(capsys.readouterr().out)
    assert answers.startswith(expected[0]) and answers.endswith(expected[1]) and answers != "".join(expected)


def test_sampling(teachers, capsys):
    cfg = dict(ckpt=(teachers[1],), length=12, device="cpu")
    outputs = []
    for change in (dict(seed=1), dict(seed=1), dict(seed=2), dict(temperature=0.0), dict(temperature=1e-40, seed=2), dict(prompt="漢字 \x00☃"), dict(top_k=0)):
        sample.main(sample.SampleConfig(**{**cfg, "prompt": "the dog", **change}))
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2] and outputs[3] == outputs[4] and outputs[0].startswith("the dog")
    assert outputs[5].startswith("漢字 \x00☃")


def test_sampling_is_greedy_by_hand_and_longer_than_the_context(teachers):
    models, tokenizer, _ = eval_blimp.load_ensemble(teachers[:2], torch.device("cpu"))
    torch.manual_seed(0)
    for p in (p for m in models for p in m.parameters()):  # so that the next token depends on all before it
        p.data += 0.3 * torch.randn_like(p)
    ids = sample.generate(models, [1, 40, 41], 80, temperature=0)
    assert len(ids) == 83 and len(set(ids)) > 20
    for i in (3, 20, 82):
        context = torch.tensor([ids[max(0, i - 64):i]])
        assert ids[i] == sum(m(context)[0, -1] for m in models).argmax().item()
    sampled = sample.generate(models, [1], 200, temperature=5.0, top_k=2)
    context = torch.tensor([sampled[:9]])
    assert sampled[9] in sum(m(context)[0, -1] for m in models).topk(2).indices.tolist()


BLIMP = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data", "eval")


@pytest.mark.skipif(not os.path.isdir(BLIMP), reason="BLiMP is not here")
def test_real_blimp_counts(data, tmp_path):
    """The filtered sets as the official pipeline reports them: tasks, items, phenomena."""
    run_train(data, tmp_path / "r", max_iters=1, block_size=256, **{k: v for k, v in GPT2.items()})
    tokenizer = disk.load_checkpoint(str(tmp_path / "r"))[1]
    for folder, tasks, n in (("blimp_filtered", 67, 59875), ("supplement_filtered", 5, 5218)):
        pairs = eval_blimp.read_pairs(os.path.join(BLIMP, folder), tokenizer, 1, 256)
        result = eval_blimp.summary(pairs, [(0.0, 0.0)] * len(pairs))
        assert (len(result["tasks"]), result["n"]) == (tasks, n)
        assert len(result["phenomena"]) == (12 if folder == "blimp_filtered" else 0)
    assert math.isclose(result["accuracy"], 1.0)


def test_ewok_compares_two_targets_after_one_context(teachers, tmp_path):
    """No <s>, the context unscored, each line an item; predictions in the challenge's form."""
    rows = [("The lamp is over the desk.", "The lamp is above it.", "The lamp is below it."), ("The dog runs.", "It moves.", "It sleeps well.")]
    rows += [(c, bad, good) for c, good, bad in rows]
    (tmp_path / "ewok_filtered").mkdir()
    with open(tmp_path / "ewok_filtered/physical-relations.jsonl", "w") as f:
        f.writelines(json.dumps(dict(Domain="physical-relations", Context1=c, Context2="unused", Target1=a, Target2=b)) + "\n" for c, a, b in rows)
    eval_blimp.main(EvalConfig(ckpt=(teachers[1],), data=(str(tmp_path / "ewok_filtered"),), items=str(tmp_path / "items"), device="cpu",
                               predictions=str(tmp_path / "p.json.gz")))
    ours, tokenizer, _ = disk.load_checkpoint(teachers[1])
    ours.double()

    def logp(context, target):
        ids = tokenizer.encode(context + " " + target)
        with torch.no_grad():
            lp = ours(torch.tensor([ids]))[0].log_softmax(-1)
        return sum(lp[i - 1, ids[i]].item() for i in range(len(tokenizer.encode(context)), len(ids)))
    got = items(tmp_path / "items")
    for (context, a, b), item in zip(rows, got, strict=True):
        assert (item["logp_good"], item["logp_bad"]) == (pytest.approx(logp(context, a), abs=1e-4), pytest.approx(logp(context, b), abs=1e-4))
    assert json.load(open(os.path.join(teachers[1], "blimp.json")))["folders"]["ewok_filtered"]["accuracy"] == 0.5  # each line and its mirror image
    with gzip.open(tmp_path / "p.json.gz", "rt") as f:
        predictions = json.load(f)["ewok"]["physical-relations"]["predictions"]
    assert predictions == [{"id": f"physical-relations_{i}", "pred": " " + (r[1] if g["logp_good"] >= g["logp_bad"] else r[2])}
                           for i, (r, g) in enumerate(zip(rows, got))]


def test_pairs_that_differ_in_their_context_alone_are_other_pairs():
    """So that --compare does not take them for the same."""
    pair = eval_blimp.Pair("t", 0, [1, 2], [1, 3], 1, "The lamp is over the desk.", (" a", " b"), "")
    hashes = {eval_blimp.summary([p], [(0.0, 0.0)])["sha256"] for p in (pair, pair._replace(context="The lamp is under the desk."), pair._replace(context=""))}
    assert len(hashes) == 3


def test_predictions_of_several_commands_are_in_one_file(teachers, tmp_path):
    path = str(tmp_path / "p.json.gz")
    for name in ("blimp_filtered", "supplement_filtered", "mine"):
        write_pairs(tmp_path / name, "t", [("the dog runs.", "the dog run.")])
        eval_blimp.main(EvalConfig(ckpt=(teachers[1],), data=(str(tmp_path / name),), predictions=path, device="cpu"))
    with gzip.open(path, "rt") as f:
        assert set(json.load(f)) == {"blimp", "blimp_supplement", "mine"}
    for content in (b"{}", gzip.compress(b"5"), gzip.compress(b'{"glue": []}'), gzip.compress(b"{}")[:-9]):
        open(path, "wb").write(content)
        with pytest.raises(SystemExit, match="no gzipped JSON"):
            eval_blimp.main(EvalConfig(ckpt=(teachers[1],), data=(str(tmp_path / "mine"),), predictions=path, device="cpu"))
