"""Fine-tuning against transformers: the same tokens, the same head, the same steps; and the pipeline's rules of choice."""
import gzip
import json
import os
import random
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GPT2, ROOT, run_train
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import config
import disk
import finetune
import hf
from finetune import Example, Examples, FinetuneConfig, metrics, truncated

GLUE = os.path.join(ROOT, "..", "shared", "data", "eval", "glue")


def write_task(folder, task="rte", n=96, valid=32, labels=(0, 1), noise=0.0):
    """A task a tiny model can learn: does the first text name a dog?"""
    rng = random.Random(3)
    os.makedirs(folder, exist_ok=True)
    for split, count in (("train", n), ("valid", valid)):
        with open(os.path.join(folder, f"{task}.{split}.jsonl"), "w") as f:
            for i in range(count):
                label = i % len(labels)
                noun = ("cat", "dog", "boy")[label]
                row = dict(sentence1=f"the {noun} sees a {rng.choice(['girl', 'teacher'])}.", sentence2=f"{rng.choice(['a', 'the'])} girl runs.",
                           label=labels[label if rng.random() >= noise else 0], premise="the " + noun, hypothesis="a girl.")
                f.write(json.dumps(row) + "\n")
    return str(folder)


def settings(teachers, tmp_path, **change):
    return FinetuneConfig(**{**dict(ckpt=(teachers[1],), data=str(tmp_path / "glue"), tasks=("rte",), out_dir=str(tmp_path / "out"), device="cpu",
                                    max_length=32, learning_rate=1e-2, batch_size=16, epochs=4, log_interval=1), **change})


def results(cfg):
    return json.load(open(os.path.join(cfg.out_dir, "results.json")))


def test_it_learns_and_reports_the_best_epoch(teachers, tmp_path, capsys):
    write_task(tmp_path / "glue")
    cfg = settings(teachers, tmp_path, seeds=("1", "2"), predictions=str(tmp_path / "p.json.gz"), keep_model=True)
    finetune.main(cfg)
    rows = results(cfg)["rte"]
    assert rows["1"]["accuracy"] == 1.0 and "| rte | accuracy | 2 | 100.0 | 0.0 |" in capsys.readouterr().out
    logged = [json.loads(line) for line in open(f"{cfg.out_dir}/rte_1/metrics.jsonl")]
    best = min((r for r in logged if "val_loss" in r), key=lambda r: r["val_loss"])  # the first of the least
    assert rows["1"]["val_ce"] == best["val_ce"]
    with gzip.open(tmp_path / "p.json.gz", "rt") as f:
        predictions = json.load(f)["glue"]["rte"]["predictions"]
    gold = [json.loads(line)["label"] for line in open(tmp_path / "glue/rte.valid.jsonl")]
    assert [p["pred"] for p in predictions] == gold and predictions[3]["id"] == "rte_3"
    # the kept weights are those of the best epoch
    model, tokenizer, described = disk.load_checkpoint(f"{cfg.out_dir}/rte_1/member_0")
    valid, _ = finetune.read_examples(cfg, "rte", "valid", tokenizer, [0, 1])
    with torch.no_grad():
        z = finetune.logits(model, finetune.to_batch(valid, "cpu"))
    assert F.cross_entropy(z, torch.tensor(gold)).item() == pytest.approx(best["val_ce"], abs=1e-5) and described["finetuned"] == "rte"


def test_what_is_done_is_skipped_and_what_is_other_refused(teachers, tmp_path, monkeypatch, capsys):
    write_task(tmp_path / "glue")
    finetune.main(settings(teachers, tmp_path, epochs=1))
    first = results(settings(teachers, tmp_path))["rte"]["12"]
    trained = []
    real = finetune.finetune
    monkeypatch.setattr(finetune, "finetune", lambda cfg, task, *rest: (trained.append(cfg.seed), real(cfg, task, *rest))[1])
    before = dict(results(settings(teachers, tmp_path)))
    finetune.main(settings(teachers, tmp_path, epochs=1, seeds=("12", "13")))
    assert trained == [13] and results(settings(teachers, tmp_path))["rte"]["12"] == first
    for change in (dict(epochs=2), dict(ckpt=(teachers[0],)), dict(data=write_task(tmp_path / "other", noise=0.3))):
        with pytest.raises(SystemExit, match="with other settings, weights or data"):
            finetune.main(settings(teachers, tmp_path, **{"epochs": 1, **change}))
    write_task(tmp_path / "glue", "sst2")
    finetune.main(settings(teachers, tmp_path, epochs=2, overwrite=True))  # this seed alone is done again
    after = results(settings(teachers, tmp_path))["rte"]
    assert set(after) == {"12", "13"} and after["12"] != before["rte"]["12"] and trained == [13, 12]
    finetune.main(settings(teachers, tmp_path, epochs=2, predictions=str(tmp_path / "p.json.gz")))  # of what was done before
    with gzip.open(tmp_path / "p.json.gz", "rt") as f:
        assert len(json.load(f)["glue"]["rte"]["predictions"]) == 32


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tokens_head_and_steps_are_transformers(kind, data, teachers, tmp_path):
    """Pairs tokenised and truncated by their tokenizer, the logits of their classification model, and its weights after
    three steps of AdamW with a linear schedule."""
    run_train(data, tmp_path / "run", **(GPT2 | dict(dropout=0.0) if kind == "gpt2" else dict(n_head=4, n_kv_head=2)))
    hf.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", num_labels=2)
    write_task(tmp_path / "glue", n=40)
    cfg = settings(teachers, tmp_path, ckpt=(str(tmp_path / "run"),), max_length=24, batch_size=16, epochs=1, weight_decay=0.1, learning_rate=1e-3, seed=12)
    examples, labels = finetune.read_examples(cfg, "rte", "train", disk.load_checkpoint(cfg.ckpt[0])[1])
    ours = finetune.classifier(disk.load_checkpoint(cfg.ckpt[0])[0], 2)
    with torch.no_grad():
        theirs.score.weight.copy_(ours.lm_head.weight)
    rows = [json.loads(line) for line in open(tmp_path / "glue/rte.train.jsonl")]
    order = np.random.default_rng([12, 0]).permutation(40)
    encoded = tokenizer([r["sentence1"] for r in rows], [r["sentence2"] for r in rows], truncation=True, max_length=24, padding="max_length",
                        return_tensors="pt")
    data_ = Examples(cfg, examples, examples, finetune.logits, False, torch.device("cpu"))
    theirs.train()
    params = [[p for p in theirs.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=params[0], weight_decay=0.1), dict(params=params[1], weight_decay=0.0)], lr=1e-3)
    for step in range(3):
        chosen = order[step * 16:(step + 1) * 16]  # the last batch has 8
        batch = data_.batch(step, 0)
        out = theirs(**{k: v[chosen] for k, v in encoded.items() if k != "token_type_ids"})
        assert batch.y.tolist() == [rows[i]["label"] for i in chosen]
        if step == 0:
            assert (out.logits - finetune.logits(ours, batch)).abs().max() < 1e-5
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-3 * (3 - step) / 3
        optimizer.zero_grad()
        F.cross_entropy(out.logits, batch.y).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
    run = finetune.Run(torch.device("cpu"), 0, 1, 16, False, False, None, None)
    finetune.train(finetune.replace(cfg, out_dir=str(tmp_path / "out")), run, finetune.partial(finetune.classification_loss, others=None), model=ours, data=data_)
    assert (ours.lm_head.weight - theirs.score.weight).abs().max() < 1e-5
    assert (ours.model.norm.weight - (theirs.transformer.ln_f if kind == "gpt2" else theirs.model.norm).weight).abs().max() < 1e-5


@pytest.mark.parametrize("lengths,kept", [((10, 300), (10, 118)), ((80, 300), (64, 64)), ((300, 80), (64, 64)), ((70, 60), (68, 60)), ((200, 0), (128, 0)),
                                          ((5, 5), (5, 5))])
def test_the_longer_text_is_cut_first(lengths, kept):
    a, b = [1] * lengths[0], [2] * lengths[1]
    assert truncated(a, b, 128) == [1] * kept[0] + [2] * kept[1]


def test_truncation_is_transformers(data, teachers, tmp_path):
    hf.main(["export", teachers[1], str(tmp_path / "hf")])
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), disk.load_checkpoint(teachers[1])[1]
    rng = random.Random(1)
    for _ in range(300):
        a, b = ("the dog sees a cat. " * rng.randrange(1, 9) for _ in range(2))
        length = rng.randrange(2, 60)
        assert truncated(ours.encode(a), ours.encode(b), length) == theirs(a, b, truncation=True, max_length=length)["input_ids"], (a, b, length)


def test_metrics_by_other_formulas():
    rng = np.random.default_rng(0)
    for _ in range(20):
        y, p = rng.integers(0, 2, (2, 50))
        got = metrics(p, y, 2)
        precision, recall = y[p == 1].mean(), p[y == 1].mean()
        assert got["f1"] == pytest.approx(2 * precision * recall / (precision + recall)) and got["mcc"] == pytest.approx(np.corrcoef(p, y)[0, 1])
        assert got["accuracy"] == pytest.approx(1 - abs(p - y).mean())
    assert metrics(np.ones(4, int), np.array([0, 1, 1, 0]), 2)["mcc"] == 0 and metrics(np.zeros(4, int), np.array([0, 1, 1, 0]), 2)["f1"] == 0


@pytest.mark.parametrize("scores,stop,best", [([.7, .7005, .7009, .7012, .9], 4, 4), ([.5, .6, .6, .6, .6, .9], 5, 2), ([.5, .4, .6, .4, .4, .7], 6, 6)])
def test_patience_counts_as_the_trainer_does(teachers, tmp_path, monkeypatch, scores, stop, best):
    """The worked example of the official rules: a gain under 0.001 is no gain for patience, but still the best."""
    write_task(tmp_path / "glue", n=16)
    sequence = iter(scores)
    monkeypatch.setattr(finetune, "metrics", lambda *_: dict(accuracy=0.0, f1=next(sequence), mcc=0.0))
    cfg = settings(teachers, tmp_path, epochs=len(scores), patience=3)
    finetune.main(cfg)
    logged = [json.loads(line) for line in open(f"{cfg.out_dir}/rte_12/metrics.jsonl")]
    assert logged[-1]["epoch"] == stop and results(cfg)["rte"]["12"]["f1"] == scores[best - 1]


def test_lora_adapts_queries_and_values_alone(teachers, tmp_path):
    base, tokenizer, _ = disk.load_checkpoint(teachers[2])
    write_task(tmp_path / "glue")
    cfg = settings(teachers, tmp_path, ckpt=(teachers[2],), lora_rank=4, keep_model=True, select="loss", warmup_share=0.06, lora_dropout=0.0, learning_rate=3e-2)
    finetune.main(cfg)
    assert results(cfg)["rte"]["12"]["accuracy"] > 0.9
    tuned, _, _ = disk.load_checkpoint(f"{cfg.out_dir}/rte_12/member_0")
    changed = {k for k, v in tuned.state_dict().items() if k != "lm_head.weight" and not torch.equal(v, base.state_dict()[k])}
    assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qv"}
    for key in changed:  # of rank 4
        assert torch.linalg.matrix_rank(tuned.state_dict()[key] - base.state_dict()[key], tol=1e-5) <= 4
    layer = finetune.LoRALinear(torch.nn.Linear(8, 6), 2, 16.0, 0.0)
    torch.nn.init.normal_(layer.b)
    x = torch.randn(3, 8)
    assert torch.allclose(layer(x), F.linear(x, layer.state_dict()["weight"], layer.bias), atol=1e-6)


def test_an_ensemble_is_trained_as_one_model(teachers, tmp_path):
    write_task(tmp_path / "glue")
    cfg = settings(teachers, tmp_path, ckpt=(teachers[1], teachers[2]), keep_model=True)
    finetune.main(cfg)
    members = [disk.load_checkpoint(f"{cfg.out_dir}/rte_12/member_{i}") for i in range(2)]
    valid, _ = finetune.read_examples(cfg, "rte", "valid", members[0][1], [0, 1])
    batch = finetune.to_batch(valid, "cpu")
    with torch.no_grad():
        z = sum(finetune.logits(m, batch) for m, _, _ in members) / 2
    assert F.cross_entropy(z, batch.y).item() == pytest.approx(results(cfg)["rte"]["12"]["val_ce"], abs=1e-5)
    for (model, _, _), path in zip(members, cfg.ckpt):  # both have learned
        assert not torch.equal(model.model.embed_tokens.weight, disk.load_checkpoint(path)[0].model.embed_tokens.weight)


def test_mnlis_model_is_scored_on_mnli_mm(teachers, tmp_path):
    write_task(tmp_path / "glue", "mnli", labels=(0, 1, 2))
    write_task(tmp_path / "glue", "mnli-mm", labels=(0, 1, 2), valid=9)
    os.remove(tmp_path / "glue/mnli-mm.train.jsonl")
    cfg = settings(teachers, tmp_path, tasks=("mnli",), predictions=str(tmp_path / "p.json.gz"))
    finetune.main(cfg)
    rows = results(cfg)
    assert set(rows) == {"mnli", "mnli-mm"} and rows["mnli-mm"]["12"]["accuracy"] == 1.0 and "f1" not in rows["mnli"]["12"]
    with gzip.open(tmp_path / "p.json.gz", "rt") as f:
        assert {task: len(p["predictions"]) for task, p in json.load(f)["glue"].items()} == {"mnli": 32, "mnli-mm": 9}


def test_what_holds_for_one_task_alone(teachers, tmp_path):
    cfg = settings(teachers, tmp_path, per_task=("rte --epochs=7 --learning_rate=1e-5", "wsc --epochs=9"), seeds=("5",))
    own = finetune.task_config(cfg, "rte", "5")
    assert (own.epochs, own.learning_rate, own.seed) == (7, 1e-5, 5) and finetune.task_config(cfg, "cola", "5").epochs == cfg.epochs


@pytest.mark.parametrize("name", ["glue_babyllama", "glue_babyllama2", "glue_lora"])
def test_the_papers_tables_are_settings(name):
    cfg = config.configure(FinetuneConfig, [f"{ROOT}/config/{name}.py", "--ckpt=x"])
    for task in cfg.tasks:
        finetune.check(finetune.task_config(cfg, task, cfg.seeds[0]))
    if name == "glue_babyllama2":
        wsc = finetune.task_config(cfg, "wsc", "12")
        assert (wsc.learning_rate, wsc.batch_size, wsc.epochs, wsc.weight_decay, wsc.schedule, wsc.warmup_iters, wsc.patience) == (2e-6, 1, 24, 0.4, "cosine", 500, 0)


@pytest.mark.parametrize("change,message", [
    (dict(ckpt=()), "say which model learns what"), (dict(tasks=("cols",)), "no task 'cols'"), (dict(tasks=("wsc",)), "no wsc.train.jsonl"),
    (dict(seeds=("x",)), "'x' is not a whole number"), (dict(max_length=500), "longer than the model's block_size=64"), (dict(resume=True), "goes on with the tasks"),
    (dict(per_task=("rte --epoch=3",)), "did you mean 'epochs'"), (dict(per_task=("rte epochs",)), "is not 'task --key=value"), (dict(batch_size=0), "batch_size=0"),
    (dict(tasks=("cola",)), "no cola.train.jsonl"), (dict(seeds=("9" * 20,)), "too large"), (dict(per_task=("rte --ckpt=x",)), "ckpt cannot be set"),
    (dict(per_task=("rte --seed=3",), seeds=("1", "2")), "where there are several seeds"), (dict(per_task=("mnli-mm --epochs=3",)), "is not 'task"),
    (dict(predictions="no/where.json.gz"), "in a folder that is not there")])
def test_mistakes_are_one_line(teachers, tmp_path, change, message):
    write_task(tmp_path / "glue")
    with pytest.raises(SystemExit, match=message) as e:
        finetune.main(settings(teachers, tmp_path, **change))
    assert "\n" not in str(e.value) and str(e.value).startswith("error: ")


@pytest.mark.parametrize("line,message", [("{", "line 97: not a text"), ('{"sentence1": "a", "label": 1}', "line 97: no field 'sentence2'"),
                                          ('{"sentence1": "a", "sentence2": "b"}', "no field 'label'"),
                                          ('{"sentence1": "a", "sentence2": null, "label": 1}', "sentence2 is None"),
                                          ('{"sentence1": "a", "sentence2": "b", "label": [1]}', "label is .1.")])
def test_damaged_lines_are_named(teachers, tmp_path, line, message):
    write_task(tmp_path / "glue")
    with open(tmp_path / "glue/rte.train.jsonl", "a") as f:
        f.write(line + "\n")
    with pytest.raises(SystemExit, match=message):
        finetune.main(settings(teachers, tmp_path))


@pytest.mark.skipif(not os.path.isdir(GLUE), reason="GLUE is not here")
@pytest.mark.parametrize("task,n,valid", [("cola", 8551, 522), ("mrpc", 3668, 204), ("rte", 2490, 139), ("wsc", 554, 52), ("sst2", 67349, 436)])
def test_real_tasks_are_read(teachers, tmp_path, task, n, valid):
    cfg = settings(teachers, tmp_path, data=GLUE)
    tokenizer = disk.load_checkpoint(teachers[1])[1]
    examples, labels = finetune.read_examples(cfg, task, "train", tokenizer)
    assert len(examples) == n and labels == [0, 1] and max(len(e.ids) for e in examples) <= 32
    assert len(finetune.read_examples(cfg, task, "valid", tokenizer, labels)[0]) == valid


def test_no_text_at_all_still_has_a_last_token(teachers):
    assert finetune.to_batch([Example([0], 1)], "cpu").last.tolist() == [0]


def test_what_is_read_and_what_is_reported():
    """The official formats and metrics (evaluation of 2024), and a mean in which mnli counts twice."""
    row = dict(question="Who?", answer="Me", paragraph="P", span1_text="A", span2_text="he", text="A ran, he fell")
    assert [finetune.TASKS["multirc"][i].format(**row) for i in (0, 1)] == ["Question: Who? Answer: Me", "P"]
    assert [finetune.TASKS["wsc"][i].format(**row) for i in (0, 1)] == ['Does "he" refer to "A" in this passage?', "A ran, he fell"]
    assert [finetune.LORA_FORMATS["multirc"][i].format(**row) for i in (0, 1)] == ["P", "Who? Me"]
    assert {task: metric for task, (_, _, metric) in finetune.TASKS.items() if metric != "accuracy"} == {"cola": "mcc", "mrpc": "f1", "qqp": "f1"}


def test_the_table_is_a_mean_over_tasks(capsys):
    rows = {"cola": {"1": dict(mcc=0.2, accuracy=0.9), "2": dict(mcc=0.4, accuracy=0.9)}, "mnli": {"1": dict(accuracy=0.5), "2": dict(accuracy=0.5)},
            "mnli-mm": {"1": dict(accuracy=0.6), "2": dict(accuracy=0.6)}}
    finetune.table(rows)
    out = capsys.readouterr().out
    assert "| cola | mcc | 2 | 30.0 | 14.1 |" in out and "| mean of 3 tasks (the official score has 11) | | | 46.7 | |" in out


def test_odd_files_are_refused_before_training(teachers, tmp_path):
    write_task(tmp_path / "glue")
    write_task(tmp_path / "glue/rte")
    with pytest.raises(SystemExit, match="in two places"):
        finetune.main(settings(teachers, tmp_path))
    (tmp_path / "glue/rte/rte.train.jsonl").unlink(), (tmp_path / "glue/rte/rte.valid.jsonl").unlink()
    open(tmp_path / "glue/rte.valid.jsonl", "w").close()
    with pytest.raises(SystemExit, match="rte.valid.jsonl is empty"):
        finetune.main(settings(teachers, tmp_path))
    write_task(tmp_path / "glue")
    os.makedirs(tmp_path / "out")
    (tmp_path / "out/results.json").write_text('{"rte": 5}')
    with pytest.raises(SystemExit, match="results.json is damaged"):
        finetune.main(settings(teachers, tmp_path))
    assert os.listdir(tmp_path / "out") == ["results.json"]


def test_a_signal_during_the_last_validation_ends_after_writing(teachers, tmp_path, monkeypatch):
    write_task(tmp_path / "glue")
    real = Examples.validate
    monkeypatch.setattr(Examples, "validate", lambda self, model: (signal.raise_signal(signal.SIGTERM), real(self, model))[1])
    cfg = settings(teachers, tmp_path, epochs=1, seeds=("1", "2"))
    with pytest.raises(SystemExit, match="rte, seed 1 is done, the same command goes on"):
        finetune.main(cfg)
    assert set(results(cfg)["rte"]) == {"1"}
    monkeypatch.setattr(Examples, "validate", real)
    finetune.main(cfg)
    assert set(results(cfg)["rte"]) == {"1", "2"}
