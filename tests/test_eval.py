"""BLiMP scoring against an independent one: Hugging Face's model, one sentence at a time, float64."""
import copy
import gzip
import io
import json
import os
import shutil
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import distill
import eval_blimp
import sample
from distill import Teacher
from eval_blimp import EvalConfig
from helpers import distill_config, read_jsonl, real, records, write_pairs
from lib import tasks
from lib.checkpoints import find_checkpoint, load_checkpoint, load_ensemble, read_checkpoint_config
from lib.files import read_json
from lib.rules import RULES
from lib.scoring import Candidate
from lib.tasks import Item, encoder, read_items

CPU = torch.device("cpu")


def evaluate(ckpt, *folders, **change):
    """eval_blimp.py on folders of pairs."""
    ckpt = (ckpt,) if isinstance(ckpt, str) else tuple(ckpt)
    eval_blimp.main(EvalConfig(ckpt=ckpt, data=tuple(map(str, folders)), device="cpu", **change))


def scored(ckpt, folder):
    """What blimp.json of a run says of a folder."""
    return read_json(os.path.join(ckpt, "blimp.json"))["folders"][folder]


def pair_of(good, bad, task="t", line=0, context="", phenomenon=""):
    """A pair of token ids after <s>."""
    candidates = tuple(Candidate((1, *ids), 1) for ids in (good, bad))
    return Item(task, task, line, candidates, context, (" a", " b"), phenomenon=phenomenon)


def summary(items, scores):
    return eval_blimp.summary(items, scores, RULES["2024"])


def reference_logits(ckpt, sentence):
    """Logits of " " + sentence after <s>, by the rules of the 2024 pipeline, with another implementation of
    the model, and the ids that they predict."""
    ours, tokenizer, _ = load_checkpoint(ckpt)
    c = ours.cfg
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head or c.n_head, hidden_size=c.n_embd,
        intermediate_size=c.intermediate_size, max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps,
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
    rows = read_jsonl(f"{corpus}/pairs/agreement_relative_clause.jsonl")[:12]
    sentences = [(row["sentence_good"], row["sentence_bad"]) for row in rows]
    odd = [("What did you get?\nI got a chair.", "What did you get?\nI got a teacher."),
           ("x", "the long other one ☃")]
    write_pairs(tmp_path / "p", "agreement", sentences)
    write_pairs(tmp_path / "p", "odd", odd)
    evaluate(teachers[1], tmp_path / "p", items=str(tmp_path / "items"), batch_tokens=100)
    got = read_jsonl(tmp_path / "items")
    where = [("agreement", i) for i in range(12)] + [("odd", 0), ("odd", 1)]
    assert [(g["task"], g["line"]) for g in got] == where
    for g, pair in zip(got, sentences + odd):
        for key, sentence in zip(("logp_good", "logp_bad"), pair):
            assert g[key] == pytest.approx(score(*reference_logits(teachers[1], sentence)), abs=1e-4)
    result = scored(teachers[1], "p")
    accuracy = {task: row["accuracy"] for task, row in result["tasks"].items()}
    assert accuracy["agreement"] == sum(g["logp_good"] >= g["logp_bad"] for g in got[:12]) / 12
    assert result["accuracy"] == (accuracy["agreement"] + accuracy["odd"]) / 2


def test_an_ensemble_averages_logits(teachers, tmp_path):
    write_pairs(tmp_path / "p", "t", [("the dog sees a cat.", "the dog see a cat.")])
    evaluate(teachers[1:], tmp_path / "p", items=str(tmp_path / "i"))
    (z1, ids), (z2, _) = (reference_logits(ckpt, "the dog sees a cat.") for ckpt in teachers[1:])
    assert read_jsonl(tmp_path / "i")[0]["logp_good"] == pytest.approx(score((z1 + z2) / 2, ids), abs=1e-4)


def test_validation_loss_is_trainings(data, teachers, tmp_path, capsys):
    """Of one model as its run logged it; of an ensemble as distill.py measures it."""
    how = dict(data_dir=data, seq_len=32, eval_chunks=16)
    evaluate(teachers[1], out=str(tmp_path / "one.json"), **how)
    logged = read_checkpoint_config(find_checkpoint(teachers[1]))["val_ce"]
    assert read_json(tmp_path / "one.json")["val_ce"] == pytest.approx(logged, rel=1e-6)
    distill.main(distill_config(data, tmp_path / "s", teachers=tuple(teachers[:2]), max_iters=3))
    capsys.readouterr()
    evaluate(teachers[:2], **how)
    assert f"{records(tmp_path / 's')[0]['ensemble_val_ce']:.4f} nats" in capsys.readouterr().out


def test_batching_does_not_show(corpus, teachers):
    models, tokenizer, described = load_ensemble([teachers[0]], CPU)
    items = read_items(f"{corpus}/pairs", "2024", encoder("2024", tokenizer, described, "auto"), 64)[::37]
    one, many = (eval_blimp.score_items([Teacher(models[0])], items, batch_tokens)
                 for batch_tokens in (1, 5000))
    assert torch.tensor(one).sub(torch.tensor(many)).abs().max() < 1e-4


@pytest.mark.parametrize("good,bad", [([5], [5, 0]), ([5, 0], [5]), ([5, 0, 7], [5, 0, 0, 7]), ([0], [0, 0])])
def test_token_0_is_not_taken_for_padding(teachers, good, bad):
    models, _, _ = load_ensemble([teachers[1]], CPU)
    together, = eval_blimp.score_items([Teacher(models[0])], [pair_of(good, bad)], 1000)
    for ids, ours in zip((good, bad), together):
        logp = models[0](torch.tensor([[1] + ids[:-1]]))[0].log_softmax(-1)
        assert ours == pytest.approx(sum(logp[i, t].item() for i, t in enumerate(ids)), abs=1e-5)


def test_the_same_sentence_twice_ties_and_counts_as_right(teachers, tmp_path):
    write_pairs(tmp_path / "p", "same", [("a cat sat.", "a cat sat."), ("the dog.", "the dog.")] * 40)
    evaluate(teachers[0], tmp_path / "p", items=str(tmp_path / "i"), batch_tokens=64)
    assert all(item["logp_good"] == item["logp_bad"] for item in read_jsonl(tmp_path / "i"))
    assert scored(teachers[0], "p")["accuracy"] == 1.0


def test_averages_and_standard_errors():
    """The worked example of the pipeline's formulas: 3 of 5 and 2 of 3."""
    pairs = [pair_of([1], [2], task, i, phenomenon=phenomenon)
             for task, n, phenomenon in (("a", 5, "binding"), ("b", 3, "s-selection")) for i in range(n)]
    scores = [(0.0, -1.0)] * 3 + [(-1.0, 0.0)] * 2 + [(0.0, -1.0), (0.0, 0.0), (-2.0, -1.0)]
    result = summary(pairs, scores)
    a, b = (result["tasks"][task] for task in "ab")
    assert a["accuracy"] == 0.6 and a["se"] == pytest.approx(0.2449, abs=1e-4)
    assert b["se"] == pytest.approx(0.3333, abs=1e-4)
    assert result["accuracy"] == pytest.approx(0.63333, abs=1e-5)
    assert result["se"] == pytest.approx(0.1972, abs=1e-4)
    assert set(result["phenomena"]) == {"binding", "argument_structure"}


def test_bfloat16_is_close(corpus, teachers, tmp_path):
    accuracy = {}
    for dtype in ("bfloat16", "float32"):
        evaluate(teachers[1], f"{corpus}/pairs", dtype=dtype, out=f"{tmp_path}/{dtype}.json")
        accuracy[dtype] = read_json(f"{tmp_path}/{dtype}.json")["folders"]["pairs"]["accuracy"]
    assert accuracy["bfloat16"] == pytest.approx(accuracy["float32"], abs=0.02)


@pytest.mark.parametrize("text,message", [
    ('{"sentence_good": "a", "sentence_bad": "b"}\n{"sentence_good": "a"}\n',
     r"t\.jsonl, line 2: no field 'sentence_bad'"),
    ('{"sentence_good": "a", \n', r"t\.jsonl, line 1: not a minimal pair"),
    ('["a", "b"]\n', r"t\.jsonl, line 1: not a minimal pair"),
    ('{"sentence_good": 1, "sentence_bad": "b"}\n', r"t\.jsonl, line 1: not a minimal pair"),
    ('{"sentence_good": "%s", "sentence_bad": "b"}\n' % ("cat " * 99),
     r"t\.jsonl, line 1: \d+ tokens, the model has 64 positions"),
    ('{"sentence_good": "\\ud800", "sentence_bad": "b"}\n', r"t\.jsonl, line 1: not a minimal pair"),
    ("", "has no minimal pairs"),
    (None, "no data folder"),
])
def test_bad_pairs_are_one_line(teachers, tmp_path, text, message):
    if text is not None:
        os.makedirs(tmp_path / "p")
        (tmp_path / "p" / "t.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=message) as e:
        evaluate(teachers[0], tmp_path / "p")
    assert "\n" not in str(e.value)


def test_unwritable_results_are_refused_before_scoring(corpus, teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_blimp, "score_items", None)
    for change in (dict(out=str(tmp_path / "no" / "x.json")), dict(items=str(tmp_path))):
        with pytest.raises(SystemExit, match="cannot write"):
            evaluate(teachers[0], f"{corpus}/pairs", **change)


def test_two_commands_at_once_keep_both_scores(teachers, tmp_path, monkeypatch):
    run, real_scores = shutil.copytree(teachers[1], tmp_path / "run"), eval_blimp.score_items
    for name in "ab":
        write_pairs(tmp_path / name, "task", [("the dog sees .", "the dog see .")])

    def score_items(*args):
        monkeypatch.setattr(eval_blimp, "score_items", real_scores)
        evaluate(str(run), tmp_path / "b")
        return real_scores(*args)
    monkeypatch.setattr(eval_blimp, "score_items", score_items)
    evaluate(str(run), tmp_path / "a")
    assert {"a", "b"} <= read_json(run / "blimp.json")["folders"].keys()


def test_scores_of_the_same_weights_by_the_same_rules_stay(data, teachers, tmp_path):
    """Not of other weights, nor in a file of the user's own, nor what cannot be read."""
    run, pairs, other = (str(tmp_path / name) for name in ("run", "pairs", "more"))
    shutil.copytree(teachers[0], run, ignore=shutil.ignore_patterns("blimp*"))
    for folder in (pairs, other):
        write_pairs(folder, "t", [("the dog runs.", "the dog run."), ("a cat sees.", "a cat see.")])

    def folders(**change):
        evaluate(run, other, **change)
        return list(read_json(change.get("out", f"{run}/blimp.json"))["folders"])
    evaluate(run, pairs)
    first = scored(run, "pairs")
    evaluate(run, pairs, data_dir=data, eval_chunks=8, seq_len=32)
    loss = read_json(f"{run}/blimp.json")["val_ce"]
    assert folders() == ["pairs", "more"] and scored(run, "pairs") == first
    assert read_json(f"{run}/blimp.json")["val_ce"] == loss
    assert folders(out=f"{tmp_path}/own.json") == ["more"]
    with pytest.raises(SystemExit, match="blimp.json has scores of these weights with dtype=float32; delete"):
        folders(dtype="bfloat16")
    assert list(read_json(f"{run}/blimp.json")["folders"]) == ["pairs", "more"]
    evaluate(find_checkpoint(run), other)  # a checkpoint that is named itself has scores of its own
    assert list(read_json(f"{find_checkpoint(run)}/blimp.json")["folders"]) == ["more"]
    assert list(read_json(f"{run}/blimp.json")["folders"]) == ["pairs", "more"]
    with open(f"{run}/blimp.json", "w") as f:
        f.write("{")
    assert folders() == ["more"]
    evaluate(run, pairs)
    name = os.path.basename(find_checkpoint(run))
    shutil.rmtree(f"{run}/{name}")
    shutil.copytree(find_checkpoint(teachers[1]), f"{run}/{name}")  # as if trained further
    assert folders() == ["more"]


# --- other fields than BLiMP's --------------------------------------------------------------------

def write_rows(folder, task, rows):
    os.makedirs(folder)
    with open(folder / f"{task}.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def test_ewok_compares_two_targets_after_one_context(teachers, tmp_path):
    """No <s>, the context unscored, each line an item; predictions in the challenge's form."""
    rows = [("The lamp is over the desk.", "The lamp is above it.", "The lamp is below it."),
            ("The dog runs.", "It moves.", "It sleeps well.")]
    rows += [(context, bad, good) for context, good, bad in rows]
    write_rows(tmp_path / "ewok_filtered", "physical-relations", [
        dict(Domain="physical-relations", Context1=context, Context2="unused", Target1=good, Target2=bad)
        for context, good, bad in rows])
    evaluate(teachers[1], tmp_path / "ewok_filtered", items=str(tmp_path / "items"),
             predictions=str(tmp_path / "p.json.gz"))
    ours, tokenizer, _ = load_checkpoint(teachers[1])
    ours.double()

    def logp(context, target):
        ids = tokenizer.encode(context + " " + target)
        with torch.no_grad():
            lp = ours(torch.tensor([ids]))[0].log_softmax(-1)
        return sum(lp[i - 1, ids[i]].item() for i in range(len(tokenizer.encode(context)), len(ids)))
    got = read_jsonl(tmp_path / "items")
    expected = []
    for i, ((context, a, b), item) in enumerate(zip(rows, got, strict=True)):
        assert item["logp_good"] == pytest.approx(logp(context, a), abs=1e-4)
        assert item["logp_bad"] == pytest.approx(logp(context, b), abs=1e-4)
        preferred = a if item["logp_good"] >= item["logp_bad"] else b
        expected.append({"id": f"physical-relations_{i}", "pred": " " + preferred})
    assert scored(teachers[1], "ewok_filtered")["accuracy"] == 0.5  # each line and its mirror image
    with gzip.open(tmp_path / "p.json.gz", "rt") as f:
        assert json.load(f)["ewok"]["physical-relations"]["predictions"] == expected


@pytest.mark.parametrize("context", ["", "The dog runs."])
def test_another_kind_of_fields_is_one_more_line(teachers, tmp_path, monkeypatch, context):
    """A line of FORMATS is all it takes: scores are those of the same texts under the names known before."""
    known = ("Target1", "Target2", "Context1") if context else ("sentence_good", "sentence_bad", "")
    for name, (good, bad, before) in dict(known=known, new=("right", "wrong", "given")).items():
        write_rows(tmp_path / name, "t", [
            {good: a, bad: b, **({before: context} if context else {})}
            for a, b in (("It moves.", "It sleeps well."), ("The cat sees it.", "The cat see it."))])
    with pytest.raises(SystemExit, match="line 1: no field"):
        evaluate(teachers[1], tmp_path / "new")
    start = "{given}| " if context else "|"
    added = tasks.Format("2024", (start + "{right}", start + "{wrong}"))
    monkeypatch.setattr(tasks, "FORMATS", (*tasks.FORMATS, added))
    for name in ("known", "new"):
        evaluate(teachers[1], tmp_path / name, items=str(tmp_path / f"{name}.jsonl"))
    scores = read_jsonl(tmp_path / "new.jsonl")
    assert len(scores) == 2 and scores == read_jsonl(tmp_path / "known.jsonl")


def test_pairs_that_differ_in_their_context_alone_are_other_pairs():
    """So that tools/compare.py does not take them for the same."""
    pairs = [pair_of([2], [3], context=context)
             for context in ("The lamp is over the desk.", "The lamp is under the desk.", "")]
    assert len({summary([pair], [(0.0, 0.0)])["sha256"] for pair in pairs}) == 3


def test_predictions_of_several_commands_are_in_one_file(teachers, tmp_path):
    path = tmp_path / "p.json.gz"
    for name in ("blimp_filtered", "supplement_filtered", "mine"):
        write_pairs(tmp_path / name, "t", [("the dog runs.", "the dog run.")])
        evaluate(teachers[1], tmp_path / name, predictions=str(path))
    with gzip.open(path, "rt") as f:
        assert set(json.load(f)) == {"blimp", "blimp_supplement", "mine"}
    for content in (b"{}", gzip.compress(b"5"), gzip.compress(b'{"glue": []}'), gzip.compress(b"{}")[:-9]):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match="no gzipped JSON"):
            evaluate(teachers[1], tmp_path / "mine", predictions=str(path))


@pytest.mark.parametrize("folder,tasks,n,phenomena", [("blimp_filtered", 67, 59875, 12),
                                                      ("supplement_filtered", 5, 5218, 0)])
def test_real_blimp_counts(teachers, folder, tasks, n, phenomena):
    """The filtered sets as the official pipeline reports them: tasks, items, phenomena."""
    path = real("eval", folder)
    _, tokenizer, described = load_checkpoint(teachers[0])
    items = read_items(path, "2024", encoder("2024", tokenizer, described, "auto"), 256)
    result = summary(items, [(0.0, 0.0)] * len(items))
    assert (len(result["tasks"]), result["n"], len(result["phenomena"])) == (tasks, n, phenomena)
    assert result["accuracy"] == pytest.approx(1.0)


# --- sample.py ------------------------------------------------------------------------------------

def sampled(capsys, ckpt, **change):
    """What sample.py prints."""
    sample.main(sample.SampleConfig(**{"ckpt": (ckpt,), "device": "cpu", **change}))
    return capsys.readouterr().out


def test_prompts_are_read_where_none_is_given(teachers, capsys, monkeypatch):
    """Each line is answered as `--prompt` would be, with the next seed; an empty one too."""
    monkeypatch.setattr("sys.stdin", io.StringIO("the dog\n\na cat\n"))
    answers = sampled(capsys, teachers[1], length=8)
    first = sampled(capsys, teachers[1], length=8, prompt="the dog", seed=1)
    third = sampled(capsys, teachers[1], length=8, prompt="a cat", seed=3)
    assert answers.startswith(first) and answers.endswith(third) and answers != first + third


def test_sampling(teachers, capsys):
    def answer(**change):
        return sampled(capsys, teachers[1], **{"prompt": "the dog", "length": 12, **change})
    one = answer(seed=1)
    assert one.startswith("the dog") and one == answer(seed=1) != answer(seed=2)
    assert answer(temperature=0.0) == answer(temperature=1e-40, seed=2)
    assert answer(prompt="漢字 \x00☃").startswith("漢字 \x00☃")
    assert answer(top_k=0).startswith("the dog")


def test_text_from_nothing_needs_no_special_token(teachers, capsys, monkeypatch):
    """Nor does a prompt get one where the tokenizer has none."""
    def without_special_tokens(*args):
        models, tokenizer, described = load_ensemble(*args)
        bare = copy.copy(tokenizer)
        bare.bos = bare.eos = bare.pad = None
        return models, bare, described
    monkeypatch.setattr(sample, "load_ensemble", without_special_tokens)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nthe dog\n"))
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    sample.main(sample.SampleConfig(ckpt=(teachers[1],), length=0, device="cpu"))
    assert capsys.readouterr().out.endswith("\nthe dog\n")


def test_sampling_is_greedy_by_hand_and_longer_than_the_context(teachers):
    models, _, _ = load_ensemble(teachers[:2], CPU)
    torch.manual_seed(0)
    for p in (p for m in models for p in m.parameters()):  # so that the next token depends on all before it
        p.data += 0.3 * torch.randn_like(p)
    ids = sample.generate(models, [1, 40, 41], 80, temperature=0)
    assert len(ids) == 83 and len(set(ids)) > 20
    for i in (3, 20, 82):
        context = torch.tensor([ids[max(0, i - 64):i]])
        assert ids[i] == sum(m(context)[0, -1] for m in models).argmax().item()
    ids = sample.generate(models, [1], 200, temperature=5.0, top_k=2)
    context = torch.tensor([ids[:9]])
    assert ids[9] in sum(m(context)[0, -1] for m in models).topk(2).indices.tolist()
    assert max(sample.generate(models, [1], 20, temperature=5.0, vocab_size=9)) < 9  # rows without a token
