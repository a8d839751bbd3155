"""Fine-tuning against transformers: the same tokens, head and steps; and the pipeline's rules of choice."""
import contextlib
import gzip
import json
import os
import random
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from helpers import GPT2, ROOT, edit_json, read_jsonl, real, run_train, write_task
from lib import classifiers, configurator, glue
from lib.checkpoints import load_checkpoint
from lib.machine import Machine
from tools import finetune, hf
from tools.finetune import Examples, FinetuneConfig, TaskKeeper, metrics
from train import Trainee, train


def settings(teachers, tmp_path, cls=FinetuneConfig, **change):
    base = dict(ckpt=(teachers[1],), data=str(tmp_path / "glue"), tasks=("rte",),
                out_dir=str(tmp_path / "out"), device="cpu", max_length=32, learning_rate=1e-2, batch_size=16,
                epochs=4, log_interval=1)
    return cls(**{**base, **change})


def results(tmp_path):
    with open(tmp_path / "out/results.json") as f:
        return json.load(f)


def predictions(path):
    with gzip.open(path, "rt") as f:
        return json.load(f)["glue"]


@pytest.fixture
def trained(monkeypatch):
    """The tasks and seeds that finetune() is called for."""
    calls, real_finetune = [], finetune.finetune

    def counting(cfg, task, tokenizer):
        calls.append((task, cfg.seed))
        return real_finetune(cfg, task, tokenizer)
    monkeypatch.setattr(finetune, "finetune", counting)
    return calls


def test_it_learns_and_reports_the_best_epoch(teachers, tmp_path, capsys):
    write_task(tmp_path / "glue")
    cfg = settings(teachers, tmp_path, seeds=("1", "2"), predictions=str(tmp_path / "p.json.gz"),
                   keep_model=True)
    finetune.main(cfg)
    rows = results(tmp_path)["rte"]
    assert rows["1"]["accuracy"] == 1.0 and "| rte | accuracy | 2 | 100.0 | 0.0 |" in capsys.readouterr().out
    logged = [r for r in read_jsonl(f"{cfg.out_dir}/rte_1/metrics.jsonl") if "val_loss" in r]
    best = min(logged, key=lambda r: r["val_loss"])  # the first of the least
    assert rows["1"]["val_ce"] == best["val_ce"]
    predicted = predictions(tmp_path / "p.json.gz")["rte"]["predictions"]
    gold = [row["label"] for row in read_jsonl(tmp_path / "glue/rte.valid.jsonl")]
    assert [p["pred"] for p in predicted] == gold and predicted[3]["id"] == "rte_3"
    # the kept weights are those of the best epoch
    model, tokenizer, described = load_checkpoint(f"{cfg.out_dir}/rte_1/member_0")
    valid, _ = glue.read_examples(cfg, "rte", "valid", tokenizer, [0, 1])
    with torch.no_grad():
        z = classifiers.Ensemble([model])(finetune.to_batch(valid, "cpu"))
    assert F.cross_entropy(z, torch.tensor(gold)).item() == pytest.approx(best["val_ce"], abs=1e-5)
    assert described["finetuned"] == "rte"


# --- what is done already -------------------------------------------------------------------------

def test_what_is_done_is_skipped_and_what_is_other_refused(teachers, tmp_path, trained):
    write_task(tmp_path / "glue")
    finetune.main(settings(teachers, tmp_path, epochs=1))
    first = results(tmp_path)["rte"]["12"]
    finetune.main(settings(teachers, tmp_path, epochs=1, seeds=("12", "13")))
    assert trained == [("rte", 12), ("rte", 13)] and results(tmp_path)["rte"]["12"] == first
    other = write_task(tmp_path / "other", noise=0.3)
    for change, named in ((dict(epochs=2), "epochs: 1 -> 2"), (dict(epochs=10), "epochs: 1 -> 10"),
                          (dict(ckpt=(teachers[0],)), "other weights"), (dict(data=other), "other texts"),
                          (dict(data=other, lora_rank=2), "lora_rank: 0 -> 2, other texts")):
        for seeds in (("14", "12"), ("14",)):  # of another seed they would be averaged with it
            with pytest.raises(SystemExit, match=fr"with other settings, weights or data \({named}\)"):
                finetune.main(settings(teachers, tmp_path, **{"epochs": 1, "seeds": seeds, **change}))
    assert len(trained) == 2  # seed 14 was not begun
    finetune.main(settings(teachers, tmp_path, epochs=2, overwrite=True))  # this seed alone is done again
    after = results(tmp_path)["rte"]
    assert set(after) == {"12", "13"} and after["12"] != first and trained[2:] == [("rte", 12)]
    with pytest.raises(SystemExit, match="seed 13, with other settings, weights or data .*epochs: 1 -> 2"):
        finetune.main(settings(teachers, tmp_path, epochs=2))
    edit_json(tmp_path / "out/results.json", rte={"12": after["12"]})
    foreign = dict(after["12"], inputs_sha256=dict(weights=["x"], texts=[]))
    edit_json(tmp_path / "out/results.json", wsc={"12": foreign})
    with pytest.raises(SystemExit, match="has wsc of another model"):
        finetune.main(settings(teachers, tmp_path, epochs=2))
    edit_json(tmp_path / "out/results.json", wsc={})
    file = tmp_path / "p.json.gz"  # predictions of what was done before; how it is logged is not compared
    finetune.main(settings(teachers, tmp_path, epochs=2, predictions=str(file), log_interval=5))
    assert len(predictions(file)["rte"]["predictions"]) == 32 and len(trained) == 3


def test_a_new_setting_invalidates_nothing_at_its_default(teachers, tmp_path, trained, capsys):
    @dataclass
    class LaterConfig(FinetuneConfig):
        novelty: float = 0.0

    write_task(tmp_path / "glue")
    finetune.main(settings(teachers, tmp_path, epochs=1))
    finetune.main(settings(teachers, tmp_path, LaterConfig, epochs=1))
    assert len(trained) == 1 and "notice" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="novelty: None -> 0.5"):
        finetune.main(settings(teachers, tmp_path, LaterConfig, epochs=1, novelty=0.5))


def test_results_of_older_code_are_taken_as_they_are(teachers, tmp_path, trained, capsys):
    """Those with one hash of all settings, weights and texts."""
    write_task(tmp_path / "glue")
    seeds = ("12", "13", "14")
    finetune.main(settings(teachers, tmp_path, epochs=1, seeds=seeds[:2]))
    row = dict(identity_sha256="0" * 64, val_ce=1.0, accuracy=0.25, f1=0.0, mcc=0.0)
    old = {seed: row for seed in seeds[:2]}
    edit_json(tmp_path / "out/results.json", rte=old)
    capsys.readouterr()
    finetune.main(settings(teachers, tmp_path, epochs=2, seeds=seeds))
    notices = [line for line in capsys.readouterr().out.splitlines() if line.startswith("notice: ")]
    assert len(notices) == 1 and "of older code" in notices[0] and notices[0].endswith(": rte_12, rte_13")
    after = results(tmp_path)["rte"]
    assert {seed: after[seed] for seed in old} == old and after["14"]["settings"]["epochs"] == 2
    assert trained[2:] == [("rte", 14)]
    finetune.main(settings(teachers, tmp_path, epochs=2, overwrite=True))
    assert "notice" not in capsys.readouterr().out and "identity_sha256" not in results(tmp_path)["rte"]["12"]


# --- the same as transformers ---------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tokens_head_and_steps_are_transformers(kind, data, teachers, tmp_path):
    """Pairs tokenised and truncated by their tokenizer, the logits of their classification model, and its
    weights after three steps of AdamW with a linear schedule."""
    shape = GPT2 | dict(dropout=0.0) if kind == "gpt2" else dict(n_head=4, n_kv_head=2)
    run_train(data, tmp_path / "run", **shape)
    hf.main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--bos=no"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", num_labels=2)
    write_task(tmp_path / "glue", n=40)
    cfg = settings(teachers, tmp_path, ckpt=(str(tmp_path / "run"),), max_length=24, batch_size=16, epochs=1,
                   weight_decay=0.1, learning_rate=1e-3, seed=12)
    model, our_tokenizer, _ = load_checkpoint(cfg.ckpt[0])
    examples, labels = glue.read_examples(cfg, "rte", "train", our_tokenizer)
    ours = classifiers.classifier(model, 2)
    with torch.no_grad():
        theirs.score.weight.copy_(ours.lm_head.weight)
    rows = read_jsonl(tmp_path / "glue/rte.train.jsonl")
    order = np.random.default_rng([12, 0]).permutation(40)
    encoded = tokenizer([r["sentence1"] for r in rows], [r["sentence2"] for r in rows], truncation=True,
                        max_length=24, padding="max_length", return_tensors="pt")
    texts = Examples(cfg, examples, torch.device("cpu"))
    theirs.train()
    params = [[p for p in theirs.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    groups = [dict(params=params[0], weight_decay=0.1), dict(params=params[1], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(3):
        chosen = order[step * 16:(step + 1) * 16]  # the last batch has 8
        batch = texts.batch(step, 0)
        out = theirs(**{k: v[chosen] for k, v in encoded.items() if k != "token_type_ids"})
        assert batch.y.tolist() == [rows[i]["label"] for i in chosen]
        if step == 0:
            assert (out.logits - classifiers.Ensemble([ours])(batch)).abs().max() < 1e-5
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-3 * (3 - step) / 3
        optimizer.zero_grad()
        F.cross_entropy(out.logits, batch.y).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
    machine = Machine(torch.device("cpu"), micro_batch=16)
    keeper = TaskKeeper(cfg, machine, texts, examples, "rte", 2)
    train(cfg, machine, texts, Trainee(classifiers.Ensemble([ours])), finetune.classification_loss, keeper)
    norm = theirs.transformer.ln_f if kind == "gpt2" else theirs.model.norm
    assert (ours.lm_head.weight - theirs.score.weight).abs().max() < 1e-5
    assert (ours.model.norm.weight - norm.weight).abs().max() < 1e-5


@pytest.mark.parametrize("lengths,kept", [
    ((10, 300), (10, 118)), ((80, 300), (64, 64)), ((300, 80), (64, 64)), ((70, 60), (68, 60)),
    ((200, 0), (128, 0)), ((5, 5), (5, 5))])
def test_the_longer_text_is_cut_first(lengths, kept):
    a, b = [1] * lengths[0], [2] * lengths[1]
    assert glue.truncated([a, b], 128) == [1] * kept[0] + [2] * kept[1]


def test_truncation_is_transformers(data, teachers, tmp_path):
    hf.main(["export", teachers[1], str(tmp_path / "hf"), "--bos=no"])
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), load_checkpoint(teachers[1])[1]
    rng = random.Random(1)
    for _ in range(300):
        a, b = ("the dog sees a cat. " * rng.randrange(1, 9) for _ in range(2))
        length = rng.randrange(2, 60)
        expected = theirs(a, b, truncation=True, max_length=length)["input_ids"]
        assert glue.truncated([ours.encode(a), ours.encode(b)], length) == expected, (a, b, length)


def test_metrics_by_other_formulas():
    rng = np.random.default_rng(0)
    for _ in range(20):
        y, p = rng.integers(0, 2, (2, 50))
        got = metrics(p, y, 2)
        precision, recall = y[p == 1].mean(), p[y == 1].mean()
        assert got["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
        assert got["mcc"] == pytest.approx(np.corrcoef(p, y)[0, 1])
        assert got["accuracy"] == pytest.approx(1 - abs(p - y).mean())
    y = np.array([0, 1, 1, 0])
    assert metrics(np.ones(4, int), y, 2)["mcc"] == 0 and metrics(np.zeros(4, int), y, 2)["f1"] == 0


@pytest.mark.parametrize("scores,stop,best", [
    ([.7, .7005, .7009, .7012, .9], 4, 4), ([.5, .6, .6, .6, .6, .9], 5, 2),
    ([.5, .4, .6, .4, .4, .7], 6, 6)])
def test_patience_counts_as_the_trainer_does(teachers, tmp_path, monkeypatch, scores, stop, best):
    """The worked example of the official rules: a gain under 0.001 is none for patience, but is the best."""
    write_task(tmp_path / "glue", n=16)
    sequence = iter(scores)
    monkeypatch.setattr(finetune, "metrics", lambda *_: dict(accuracy=0.0, f1=next(sequence), mcc=0.0))
    finetune.main(settings(teachers, tmp_path, epochs=len(scores), patience=3))
    logged = read_jsonl(tmp_path / "out/rte_12/metrics.jsonl")
    assert logged[-1]["epoch"] == stop and results(tmp_path)["rte"]["12"]["f1"] == scores[best - 1]


# --- LoRA, ensembles, tasks -----------------------------------------------------------------------

def test_lora_adapts_queries_and_values_alone(teachers, tmp_path):
    base = load_checkpoint(teachers[2])[0].state_dict()
    write_task(tmp_path / "glue")
    finetune.main(settings(teachers, tmp_path, ckpt=(teachers[2],), lora_rank=4, lora_dropout=0.0,
                           keep_model=True, select="loss", warmup_share=0.06, learning_rate=3e-2))
    assert results(tmp_path)["rte"]["12"]["accuracy"] > 0.9
    tuned = load_checkpoint(str(tmp_path / "out/rte_12/member_0"))[0].state_dict()
    changed = {k for k, v in tuned.items() if k != "lm_head.weight" and not torch.equal(v, base[k])}
    assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qv"}
    for key in changed:  # of rank 4
        assert torch.linalg.matrix_rank(tuned[key] - base[key], tol=1e-5) <= 4
    layer = classifiers.LoRALinear(torch.nn.Linear(8, 6), 2, 16.0, 0.0)
    torch.nn.init.normal_(layer.b)
    x = torch.randn(3, 8)
    assert torch.allclose(layer(x), F.linear(x, layer.state_dict()["weight"], layer.bias), atol=1e-6)


def test_an_ensemble_is_trained_as_one_model(teachers, tmp_path):
    write_task(tmp_path / "glue")
    cfg = settings(teachers, tmp_path, ckpt=(teachers[1], teachers[2]), keep_model=True)
    finetune.main(cfg)
    members = [load_checkpoint(f"{cfg.out_dir}/rte_12/member_{i}") for i in range(2)]
    valid, _ = glue.read_examples(cfg, "rte", "valid", members[0][1], [0, 1])
    batch = finetune.to_batch(valid, "cpu")
    with torch.no_grad():
        z = sum(classifiers.Ensemble([model])(batch) for model, _, _ in members) / 2
    val_ce = results(tmp_path)["rte"]["12"]["val_ce"]
    assert F.cross_entropy(z, batch.y).item() == pytest.approx(val_ce, abs=1e-5)
    for (model, _, _), path in zip(members, cfg.ckpt):  # both have learned
        before = load_checkpoint(path)[0].model.embed_tokens.weight
        assert not torch.equal(model.model.embed_tokens.weight, before)


def test_a_result_without_what_is_asked_for_is_made_again(teachers, tmp_path, monkeypatch):
    """A model to keep, or predictions that an --overwrite deleted before it was cut short."""
    write_task(tmp_path / "glue")
    cfg = settings(teachers, tmp_path)
    finetune.main(cfg)
    first = results(tmp_path)
    finetune.main(replace(cfg, keep_model=True))
    assert os.path.isdir(f"{cfg.out_dir}/rte_12/member_0") and results(tmp_path) == first
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "finetune", None)
        finetune.main(replace(cfg, keep_model=True))  # is done
        with pytest.raises(TypeError):  # cut short
            finetune.main(replace(cfg, overwrite=True))
    assert not results(tmp_path)["rte"]
    finetune.main(cfg)
    assert results(tmp_path) == first


def test_mnlis_model_is_scored_on_mnli_mm(teachers, tmp_path):
    write_task(tmp_path / "glue", "mnli", labels=(0, 1, 2))
    write_task(tmp_path / "glue", "mnli-mm", labels=(0, 1, 2), valid=9)
    os.remove(tmp_path / "glue/mnli-mm.train.jsonl")
    finetune.main(settings(teachers, tmp_path, tasks=("mnli",), predictions=str(tmp_path / "p.json.gz")))
    rows = results(tmp_path)
    assert set(rows) == {"mnli", "mnli-mm"} and rows["mnli-mm"]["12"]["accuracy"] == 1.0
    assert "f1" not in rows["mnli"]["12"]
    counts = {task: len(p["predictions"]) for task, p in predictions(tmp_path / "p.json.gz").items()}
    assert counts == {"mnli": 32, "mnli-mm": 9}


def test_what_holds_for_one_task_alone(teachers, tmp_path):
    lines = ("rte --epochs=7 --learning_rate=1e-5", "wsc --epochs=9")
    cfg = settings(teachers, tmp_path, per_task=lines, seeds=("5",))
    rte = finetune.task_config(cfg, "rte", "5")
    assert (rte.epochs, rte.learning_rate, rte.seed) == (7, 1e-5, 5)
    assert finetune.task_config(cfg, "cola", "5").epochs == cfg.epochs


@pytest.mark.parametrize("name", ["babyllama", "babyllama2", "lora", "reverse"])
def test_the_papers_tables_are_settings(name):
    cfg = configurator.configure(FinetuneConfig, [f"{ROOT}/config/glue/{name}.py", "--ckpt=x"])
    for task in cfg.tasks:
        finetune.check(finetune.task_config(cfg, task, cfg.seeds[0]))
    if name == "babyllama2":
        wsc = finetune.task_config(cfg, "wsc", "12")
        assert (wsc.learning_rate, wsc.batch_size, wsc.epochs, wsc.weight_decay) == (2e-6, 1, 24, 0.4)
        assert (wsc.schedule, wsc.warmup_iters, wsc.patience) == ("cosine", 500, 0)
        sst2 = finetune.task_config(cfg, "sst2", "12")  # transformers' constant schedule has no warm-up
        assert (sst2.schedule, sst2.warmup_iters, sst2.dtype) == ("constant", 0, "bfloat16")
    if name == "babyllama":
        mismatched = finetune.task_config(cfg, "mnli-mm", "12")
        assert (cfg.rules, mismatched.epochs, mismatched.patience) == ("2023", 6, 10)
    if name == "reverse":
        assert configurator.non_defaults(cfg, ignore=("ckpt", "tasks")) == dict(epochs=3)


# --- mistakes and interruptions -------------------------------------------------------------------

@pytest.mark.parametrize("change,message", [
    (dict(ckpt=()), "say which model learns what"), (dict(tasks=("cols",)), "no task 'cols'"),
    (dict(tasks=("wsc",)), "no wsc.train.jsonl"), (dict(tasks=("cola",)), "no cola.train.jsonl"),
    (dict(seeds=("x",)), "'x' is not a whole number"), (dict(seeds=("9" * 20,)), "too large"),
    (dict(seeds=()), "must be one or more"), (dict(batch_size=0), "batch_size=0"),
    (dict(max_length=500), "max_length=500 must be at most the model's block_size=64"),
    (dict(resume=True), "goes on with the tasks"), (dict(lora_dropout=1.0), "lora_dropout=1.0 must be below"),
    (dict(per_task=("rte --epoch=3",)), "did you mean 'epochs'"),
    (dict(per_task=("rte epochs",)), "is not 'task --key=value"),
    (dict(per_task=("mnli-mm --epochs=3",)), "is not 'task"),
    (dict(per_task=("rte --ckpt=x",)), "ckpt cannot be set"),
    (dict(per_task=("rte --seed=3",), seeds=("1", "2")), "where there are several seeds"),
    (dict(predictions="no/where.json.gz"), "in a folder that is not there")])
def test_mistakes_are_one_line(teachers, tmp_path, change, message):
    write_task(tmp_path / "glue")
    with pytest.raises(SystemExit, match=message) as e:
        finetune.main(settings(teachers, tmp_path, **change))
    assert "\n" not in str(e.value) and str(e.value).startswith("error: ")


def test_it_is_one_process(teachers, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="start it without torchrun"):
        finetune.main(settings(teachers, tmp_path))


@pytest.mark.parametrize("line,message", [
    ("{", "line 97: not a text"), ('{"sentence1": "a", "label": 1}', "line 97: no field 'sentence2'"),
    ('{"sentence1": "a", "sentence2": "b"}', "no field 'label'"),
    ('{"sentence1": "a", "sentence2": null, "label": 1}', "sentence2 is None"),
    ('{"sentence1": "a", "sentence2": "b", "label": [1]}', "label is .1.")])
def test_damaged_lines_are_named(teachers, tmp_path, line, message):
    write_task(tmp_path / "glue")
    with open(tmp_path / "glue/rte.train.jsonl", "a") as f:
        f.write(line + "\n")
    with pytest.raises(SystemExit, match=message):
        finetune.main(settings(teachers, tmp_path))


@pytest.mark.parametrize("task", ["cola", "mrpc", "rte", "wsc", "sst2"])
def test_real_tasks_are_read(teachers, tmp_path, task):
    cfg = settings(teachers, tmp_path, data=real("eval", "glue"))
    tokenizer = load_checkpoint(teachers[1])[1]

    def lines(split):
        return sum(len(read_jsonl(file)) for file in glue.find_files(cfg, task, split))
    examples, labels = glue.read_examples(cfg, task, "train", tokenizer)
    valid, _ = glue.read_examples(cfg, task, "valid", tokenizer, labels)
    assert len(examples) == lines("train") > 500 and len(valid) == lines("valid") > 50
    assert labels == [0, 1] and max(len(e.ids) for e in examples) <= 32


def test_no_text_at_all_still_has_a_last_token(teachers):
    assert finetune.to_batch([glue.Example([0], 1)], "cpu").last.tolist() == [0]


def test_what_is_read_and_what_is_reported():
    """The official formats and metrics (evaluation of 2024)."""
    row = dict(question="Who?", answer="Me", paragraph="P",
               span1_text="A", span2_text="he", text="A ran, he fell")

    def read(formats, task):
        first, second, _ = formats[task]
        return [first.format(**row), second.format(**row)]
    assert read(glue.TASKS, "multirc") == ["Question: Who? Answer: Me", "P"]
    assert read(glue.TASKS, "wsc") == ['Does "he" refer to "A" in this passage?', "A ran, he fell"]
    assert read(glue.LORA_FORMATS, "multirc") == ["P", "Who? Me"]
    other = {task: metric for task, (_, _, metric) in glue.GLUE.items() if metric != "accuracy"}
    assert other == {"cola": "mcc", "mrpc": "f1", "qqp": "f1"}


def test_the_table_is_a_mean_over_tasks(capsys):
    """In which mnli counts twice."""
    results = {"cola": {"1": dict(mcc=0.2, accuracy=0.9), "2": dict(mcc=0.4, accuracy=0.9)},
               "mnli": {"1": dict(accuracy=0.5), "2": dict(accuracy=0.5)},
               "mnli-mm": {"1": dict(accuracy=0.6), "2": dict(accuracy=0.6)}}
    finetune.table(results, FinetuneConfig(patience=1))
    out = capsys.readouterr().out
    assert "| cola | mcc | 2 | 30.0 | 14.1 | 90.0 |" in out  # the last is what Nair et al. report
    assert "| mean of 3 tasks (the official score of 2024 has 11) | | | 46.7 | | 66.7 |" in out
    assert "\nby the rules of 2024 but for patience: 3 -> 1\n" in out


def test_odd_files_are_refused_before_training(teachers, tmp_path):
    write_task(tmp_path / "glue")
    write_task(tmp_path / "glue/rte")
    with pytest.raises(SystemExit, match="in two places"):
        finetune.main(settings(teachers, tmp_path))
    for split in ("train", "valid"):
        os.remove(tmp_path / f"glue/rte/rte.{split}.jsonl")
    open(tmp_path / "glue/rte.valid.jsonl", "w").close()
    with pytest.raises(SystemExit, match="rte.valid.jsonl is empty"):
        finetune.main(settings(teachers, tmp_path))
    write_task(tmp_path / "glue")
    os.makedirs(tmp_path / "out")
    for damaged in ({"rte": 5}, {"rte": {"12": {"accuracy": 0.5}}},
                    {"rte": {"12": {"accuracy": 0.5, "settings": {}, "inputs_sha256": "abc"}}}):
        (tmp_path / "out/results.json").write_text(json.dumps(damaged))
        with pytest.raises(SystemExit, match="results.json is damaged"):
            finetune.main(settings(teachers, tmp_path))
    assert os.listdir(tmp_path / "out") == ["results.json"]


@pytest.fixture
def signalled(monkeypatch):
    """Within, a signal comes at each validation."""
    real_validate = TaskKeeper.validate

    def validate(self):
        signal.raise_signal(signal.SIGTERM)
        return real_validate(self)

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patched:
            patched.setattr(TaskKeeper, "validate", validate)
            yield
    return context


def test_a_signal_during_the_last_validation_ends_after_writing(teachers, tmp_path, signalled):
    write_task(tmp_path / "glue")
    cfg = settings(teachers, tmp_path, epochs=1, seeds=("1", "2"))
    with signalled(), pytest.raises(SystemExit, match="rte, seed 1 is done, the same command goes on"):
        finetune.main(cfg)
    assert set(results(tmp_path)["rte"]) == {"1"}
    finetune.main(cfg)
    assert set(results(tmp_path)["rte"]) == {"1", "2"}


def test_after_a_signal_what_is_done_is_not_to_be_done_again(teachers, tmp_path, signalled):
    write_task(tmp_path / "glue")
    cfg = settings(teachers, tmp_path, epochs=1, seeds=("1", "2"), overwrite=True)
    with signalled(), pytest.raises(SystemExit, match="is done, --overwrite with the --tasks and --seeds"):
        finetune.main(cfg)


def test_an_earlier_signal_keeps_nothing_of_the_run(teachers, tmp_path, signalled):
    write_task(tmp_path / "glue")
    cfg = settings(teachers, tmp_path, epochs=2)
    with signalled(), pytest.raises(SystemExit, match="at step 7 of 12 with nothing of this run kept"):
        finetune.main(cfg)
    assert not os.path.exists(tmp_path / "out/results.json")
    finetune.main(cfg)
    assert set(results(tmp_path)["rte"]) == {"12"}
