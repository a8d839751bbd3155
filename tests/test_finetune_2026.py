"""Fine-tuning by the rules of 2025 and 2026 against a slow one with transformers; what the rules decide."""
import base64
import copy
import json
import math
import os
import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer

import prepare
from helpers import GPT2, edit_json, read_jsonl, real, reseal, run_train, thorough, write_task
from lib import classifiers, glue
from lib.checkpoints import find_checkpoint, load_checkpoint, load_ensemble
from lib.configurator import configure
from lib.files import read_json, write_json
from tools import finetune, hf
from tools.finetune import FinetuneConfig
from train import learning_rate


@pytest.fixture(scope="module")
def models(corpus, data, tmp_path_factory):
    """kind -> (run folder, its export): a Llama with a sentencepiece tokenizer, a GPT-2 with a byte-level
    one, both of 64 positions and trained with <s>."""
    out = tmp_path_factory.mktemp("models")
    ranks = {bytes([i]): i for i in range(256)}
    for word in (b" the", b" sees", b" girl", b" dog"):
        for n in range(2, len(word) + 1):
            ranks.setdefault(word[:n], len(ranks))
    specials = {name: len(ranks) + i for i, name in enumerate(("<pad>", "<s>", "</s>"))}
    write_json(f"{out}/tokenizer.json", dict(
        name="bytes", pattern=r" ?\w+| ?[^\s\w]+|\s+", specials=specials,
        ranks={base64.b64encode(token).decode(): rank for token, rank in ranks.items()}))
    prepare.main(prepare.PrepareConfig(input_dir=f"{corpus}/text", data_dir=f"{out}/bytes", bos="line",
                                       tokenizer=f"{out}/tokenizer.json"))
    for kind, folder, shape in (("llama", data, {}), ("gpt2", f"{out}/bytes", GPT2 | dict(dropout=0.0))):
        run_train(folder, f"{out}/{kind}", **shape)
        hf.main(["export", f"{out}/{kind}", f"{out}/hf_{kind}"])
    return {kind: (f"{out}/{kind}", f"{out}/hf_{kind}") for kind in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with rte, pairs of very different lengths: 19 to train on (4 batches of 4, and 3 left over),
    66 to validate (a batch of 64, and another)."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(4)
    for split, n in (("train", 19), ("valid", 66)):
        with open(folder / f"rte.{split}.jsonl", "w") as f:
            for _ in range(n):
                a, b = ("".join(rng.choice("TUVW") + " the dog sees a girl." * rng.randrange(1, 7))
                        for _ in range(2))
                f.write(json.dumps(dict(sentence1=a, sentence2=b, label=int(a[0] in "TU"))) + "\n")
    return str(folder)


def settings(models, kind, year, texts, out, *flags):
    """As a user's, of rates at which every rule shows in 36 steps, 2 of them warm-up."""
    return configure(FinetuneConfig, [
        f"--rules={year}", f"--ckpt={models[kind][0]}", f"--data={texts}", "--tasks=rte", f"--out_dir={out}",
        "--device=cpu", "--log_interval=1", "--batch_size=4", "--epochs=9", "--learning_rate=3e-3",
        "--weight_decay=0.3", "--eval_interval=99", f"--max_length={96 if kind == 'llama' else 48}", *flags])


# --- the same as transformers ---------------------------------------------------------------------

class Official(nn.Module):
    """The classifier of 2025 and 2026 over transformers' body, padding on the side that it has officially."""

    def __init__(self, export, bos, year, max_length):
        super().__init__()
        self.body = AutoModel.from_pretrained(export)
        self.tokenizer = AutoTokenizer.from_pretrained(export)
        self.tokenizer.padding_side = "left" if year == "2026" else "right"
        self.tokenizer.backend_tokenizer.post_processor = None
        if bos == "yes":
            self.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", pair="<s> $A <s> $B",
                special_tokens=[("<s>", self.tokenizer.convert_tokens_to_ids("<s>"))])
        self.max_length, self.place = max_length, -1 if year == "2026" else 0
        C = self.body.config.hidden_size
        self.first, self.second = nn.Linear(C, C), nn.Linear(C, 2)

    def forward(self, rows):
        encoded = self.tokenizer([r["sentence1"] for r in rows], [r["sentence2"] for r in rows], padding=True,
                                 truncation=True, max_length=self.max_length, return_tensors="pt")
        h = self.body(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
        h = h.last_hidden_state[:, self.place]
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        h = self.first(h)
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return self.second(h)


def official_run(model, folder, seed, batch_size, epochs, lr, weight_decay):
    """Losses of all steps, and of the validation after the last. The order of the texts is ours."""
    train, valid = (read_jsonl(f"{folder}/rte.{split}.jsonl") for split in ("train", "valid"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    total = epochs * (len(train) // batch_size)
    W = int(0.06 * total)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / W if k < W else max(
        0.1, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (k - W) / (total - W)))))
    losses = []

    def loss_of(rows, **how):
        return F.cross_entropy(model(rows), torch.tensor([row["label"] for row in rows]), **how)
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(train))
        for i in range(0, len(train) - batch_size + 1, batch_size):
            optimizer.zero_grad()
            loss = loss_of([train[j] for j in order[i:i + batch_size]])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    with torch.no_grad():
        sums = [loss_of(valid[i:i + 64], reduction="sum").item() for i in range(0, len(valid), 64)]
    return losses, sum(sums) / len(valid)


def our_run(cfg, monkeypatch):
    """The same of ours without dropout in the head, and the head that it began with."""
    heads, make = [], classifiers.mlp_classifier

    def without_dropout(model, n_labels):
        new = make(model, n_labels)
        new.lm_head[4].p = 0.0
        heads.append(copy.deepcopy(new.lm_head))
        return new
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "mlp_classifier", without_dropout)
        finetune.main(cfg)
    logged = read_jsonl(f"{cfg.out_dir}/rte_42/metrics.jsonl")
    return [r["loss"] for r in logged], logged[-1]["val_ce"], heads[0]


@pytest.fixture(scope="module")
def official():
    """(kind, bos, year) -> what official_run gave; our heads all begin alike, by the seed."""
    return {}


@pytest.fixture
def gaps(models, texts, official, tmp_path, monkeypatch):
    """gaps(kind, bos, year, ...): the largest between our losses and transformers', in the first epoch and in
    all; and that of the last validation's."""
    def compare(kind, bos, year, *flags):
        cfg = settings(models, kind, year, texts, tmp_path, f"--bos={bos}", *flags)
        losses, validation, head = our_run(cfg, monkeypatch)
        if (kind, bos, year) not in official:
            model = Official(models[kind][1], bos, year, 96 if kind == "llama" else 48).train()
            model.first.load_state_dict(head[1].state_dict())
            model.second.load_state_dict(head[5].state_dict())
            official[kind, bos, year] = official_run(model, texts, 42, 4, 9, 3e-3, 0.3)
        others, other_validation = official[kind, bos, year]
        gap = np.abs(np.array(losses)[:36] - np.array(others))
        return gap[:4].max(), gap.max(), abs(validation - other_validation)
    return compare


@pytest.mark.parametrize("case", thorough([
    ("gpt2", "yes", "2026"), ("llama", "no", "2026"), ("gpt2", "no", "2025"), ("llama", "yes", "2025"),
    ("gpt2", "no", "2026"), ("llama", "yes", "2026"), ("gpt2", "yes", "2025"), ("llama", "no", "2025")],
    sample=4))
def test_losses_are_those_of_transformers(case, gaps):
    """Of every step, and of the validation. The Llama's texts are longer than its block_size."""
    first_epoch, all_epochs, validation = gaps(*case)
    assert first_epoch < 1e-5 and all_epochs < 1e-3 and validation < 1e-3


@pytest.mark.parametrize("flag", thorough([
    "decay_all=False", "warmup_from_0=False", "warmup_share=0", "min_lr_share=0", "grad_clip=1.0",
    "schedule=linear", "max_length=47"], sample=2))
def test_another_setting_is_another_loss(flag, gaps):
    """So that the test above sees it."""
    assert max(gaps("gpt2", "yes", "2026", "--" + flag)) > 5e-3


@pytest.mark.parametrize("rule", thorough([
    dict(padding="right"), dict(reads="first"), dict(last_batch="kept")], sample=1))
def test_another_rule_is_another_loss(rule, gaps, monkeypatch):
    monkeypatch.setitem(glue.RULES, "2026", glue.RULES["2026"]._replace(**rule))
    assert max(gaps("gpt2", "yes", "2026")) > 5e-3


def test_the_head_begins_as_torch_does(models):
    """Uniform up to 1 / sqrt(C), biases too; and has its dropout."""
    head = classifiers.mlp_classifier(load_checkpoint(models["llama"][0])[0], 3).lm_head
    for layer, rows in ((head[1], 32), (head[5], 3)):
        values = torch.cat([layer.weight.flatten(), layer.bias])
        assert layer.weight.shape == (rows, 32) and 0.9 < values.abs().max() * 32 ** 0.5 <= 1
        assert layer.bias.abs().min() > 0
    assert head.training and [m.p for m in head if isinstance(m, nn.Dropout)] == [0.1]


# --- what the rules set, and what the user does ---------------------------------------------------

@pytest.mark.parametrize("year", ["2025", "2026"])
def test_one_flag_is_the_official_recipe(year):
    cfg = configure(FinetuneConfig, [f"--rules={year}", "--ckpt=x"])
    finetune.check(cfg)
    assert sorted(cfg.tasks) == ["boolq", "mnli", "mrpc", "multirc", "qqp", "rte", "wsc"]
    assert cfg.seeds == ("42",) and finetune.departures(cfg) == ""
    for task in cfg.tasks:
        task_cfg = finetune.task_config(cfg, task, "42")
        assert task_cfg.batch_size == (16 if task in ("boolq", "multirc") else 32)
        assert task_cfg.epochs == (30 if task == "wsc" else 10)
        assert (task_cfg.learning_rate, task_cfg.weight_decay, task_cfg.max_length) == (3e-5, 0.01, 512)
        assert (task_cfg.patience, task_cfg.grad_clip, task_cfg.dtype) == (0, 0, "float32")
        assert (task_cfg.beta1, task_cfg.beta2, task_cfg.adam_eps) == (0.9, 0.999, 1e-8)


def test_files_and_flags_win(tmp_path):
    """Over what the rules say of one task too, and are named."""
    (tmp_path / "mine.py").write_text('rules = "2026"\nlearning_rate = 1e-4\nseeds = ["1", "2"]\n')
    mine = [str(tmp_path / "mine.py"), "--ckpt=x"]
    cfg = configure(FinetuneConfig, [*mine, "--per_task=wsc --batch_size=8"])
    wsc, boolq = (finetune.task_config(cfg, task, "1") for task in ("wsc", "boolq"))
    assert (wsc.learning_rate, wsc.batch_size, wsc.epochs, boolq.batch_size) == (1e-4, 8, 30, 16)
    assert finetune.departures(cfg) == "learning_rate: 3e-05 -> 0.0001, settings by task"
    cfg = configure(FinetuneConfig, [*mine, "--epochs=2", "--batch_size=64"])
    wsc, boolq = (finetune.task_config(cfg, task, "1") for task in ("wsc", "boolq"))
    assert (wsc.epochs, boolq.epochs, boolq.batch_size) == (2, 2, 64)  # also where 64 is 2024's
    cfg = configure(FinetuneConfig, ["--rules=2026", "--ckpt=x", "--epochs=10"])  # not those of wsc
    assert finetune.departures(cfg) == "settings by task"


def test_those_of_2024_are_the_defaults():
    for argv in (["--ckpt=x"], ["--ckpt=x", "--rules=2024"]):
        assert configure(FinetuneConfig, argv) == FinetuneConfig(ckpt=("x",))


@pytest.mark.parametrize("total", [1, 16, 17, 510])
def test_the_rate_is_the_formula(total):
    cfg = finetune.with_shares(configure(FinetuneConfig, ["--rules=2026"]), total)
    W = int(0.06 * total)
    for k in range(total):
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (k - W) / (total - W)))
        expected = k / W if k < W else max(0.1, cosine)
        assert learning_rate(cfg, k, total) == pytest.approx(3e-5 * expected, rel=1e-12)


@pytest.mark.parametrize("year,task,best", [("2025", "rte", 1), ("2026", "mrpc", 4), ("2024", "rte", 4)])
def test_the_best_epoch_is_chosen_by_the_rules(year, task, best, models, tmp_path, monkeypatch):
    """The earliest of the best; and no epoch is left out."""
    write_task(tmp_path / "glue", task, n=16, valid=4)
    accuracy, f1 = iter([.5, .6, .6, .4, .4, .5]), iter([.5, .1, .1, .2, .7, .7])
    monkeypatch.setattr(finetune, "metrics",
                        lambda *_: dict(accuracy=next(accuracy), f1=next(f1), mcc=0.0))
    cfg = configure(FinetuneConfig, [
        f"--rules={year}", f"--ckpt={models['gpt2'][0]}", f"--data={tmp_path}/glue", f"--tasks={task}",
        "--max_length=64", "--epochs=6", "--batch_size=16", f"--out_dir={tmp_path}/out", "--device=cpu",
        "--seeds=42", *["--patience=0"] * (year == "2024")])
    finetune.main(cfg)
    logged = [r for r in read_jsonl(f"{cfg.out_dir}/{task}_42/metrics.jsonl") if "val_loss" in r]
    kept = read_json(f"{cfg.out_dir}/results.json")[task]["42"]
    assert len(logged) == 6 and kept["rules"] == year
    assert {key: kept[key] for key in ("accuracy", "f1")} == {
        key: logged[best][key] for key in ("accuracy", "f1")}


# --- <s>, and texts longer than the model has positions -------------------------------------------

def test_auto_is_as_the_training_text_was(models, tmp_path):
    """<s> comes before each text of a model that was trained with it."""
    run, without = models["llama"][0], shutil.copytree(models["llama"][0], tmp_path / "without")
    folder = find_checkpoint(str(without))
    edit_json(f"{folder}/config.json", bos="none")
    reseal(folder, "config.json")

    def decided(ckpts, *flags, year="2026"):
        cfg = configure(FinetuneConfig, [f"--rules={year}", f"--ckpt={','.join(map(str, ckpts))}", *flags])
        _, tokenizer, described = load_ensemble(cfg.ckpt, torch.device("cpu"))
        return finetune.with_bos_decided(cfg, described, tokenizer).bos
    assert decided([run]) == "yes" and decided([without]) == "no" and decided([run], year="2024") == "auto"
    assert decided([run], "--bos=no") == "no" and decided([run, without], "--bos=no") == "no"
    with pytest.raises(SystemExit, match="say --bos=yes or no"):
        decided([run, without])
    tokenizer = load_checkpoint(run)[1]
    write_task(tmp_path / "glue", n=2, valid=2)
    for bos, each in (("yes", [tokenizer.bos]), ("no", [])):
        cfg = FinetuneConfig(data=str(tmp_path / "glue"), bos=bos)
        read, _ = glue.read_examples(cfg, "rte", "train", tokenizer)
        row = read_jsonl(tmp_path / "glue/rte.train.jsonl")[0]
        a, b = (tokenizer.encode(row[key]) for key in ("sentence1", "sentence2"))
        assert read[0].ids == each + a + each + b
    assert glue.truncated([[5, 6, 7]], 3, [1]) == [1, 5, 6]  # a text alone has one <s>, as it is exported


def test_a_gpt2_cannot_read_beyond_its_positions(models, texts, tmp_path, capsys):
    def cfg(kind, *flags):
        return configure(FinetuneConfig, [
            "--rules=2026", f"--ckpt={models[kind][0]}", f"--data={texts}", "--tasks=rte",
            f"--out_dir={tmp_path}/{kind}", "--epochs=1", "--batch_size=8", *flags])
    with pytest.raises(SystemExit, match=r"rte has texts of up to \d+ tokens.*--max_length=64 .*official"):
        finetune.main(cfg("gpt2"))
    assert not os.path.exists(tmp_path / "gpt2")
    finetune.main(cfg("gpt2", "--max_length=64"))
    out = capsys.readouterr().out
    assert "by the rules of 2026 but for" in out and "max_length: 512 -> 64" in out
    finetune.main(cfg("llama"))
    assert "notice: a Llama of block_size=64 reads texts of up to" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="max_length=128 must be at most the model's block_size=64"):
        finetune.main(configure(FinetuneConfig, [f"--ckpt={models['llama'][0]}", f"--data={texts}",
                                                 "--tasks=rte", f"--out_dir={tmp_path}/2024"]))


# --- tasks, results, mistakes ---------------------------------------------------------------------

def test_what_is_written_and_printed(models, tmp_path, capsys):
    """mnli without mnli-mm; predictions as they are handed in; the mean of seven; the rules' name."""
    for task in ("mnli", "mnli-mm"):
        write_task(tmp_path / "glue", task, labels=(0, 1, 2), n=33)
    write_task(tmp_path / "glue", "rte", n=33)
    argv = ["--rules=2026", f"--ckpt={models['gpt2'][0]}", f"--data={tmp_path}/glue", "--tasks=mnli,rte",
            f"--out_dir={tmp_path}/out", "--epochs=2", "--device=cpu"]
    finetune.main(configure(FinetuneConfig, argv))
    out = capsys.readouterr().out
    assert "notice: mnli has 33 texts to train on; those of the rules of 2026 are 10,000" in out
    assert "=== rte, seed 42, rules of 2026" in out and "2 steps of 32" in out
    assert "\nby the rules of 2026 but for epochs: 10 -> 2, settings by task\n" in out
    assert "| mean of 2 tasks (the official score of 2026 has 7) |" in out
    results = read_json(tmp_path / "out/results.json")
    assert list(results) == ["mnli", "rte"] and results["rte"]["42"]["rules"] == "2026"
    assert {"accuracy", "f1", "mcc"} <= results["rte"]["42"].keys() and "f1" not in results["mnli"]["42"]
    predicted = read_json(tmp_path / "out/mnli_42/predictions.json")
    assert list(predicted) == ["mnli"] and len(predicted["mnli"]["predictions"]) == 32
    assert {p["pred"] for p in predicted["mnli"]["predictions"]} <= {0, 1, 2}
    assert predicted["mnli"]["predictions"][3]["id"] == "mnli_3"
    with pytest.raises(SystemExit, match="other settings, weights or data .*rules: 2026 -> 2025"):
        finetune.main(configure(FinetuneConfig, [*argv, "--rules=2025"]))
    assert "notice: by the rules of 2025 the first token is read, which sees no other: <s>, the same" in \
        capsys.readouterr().out


def test_lora_is_adapted_under_these_rules_too(models, texts, tmp_path):
    finetune.main(settings(models, "llama", "2026", texts, tmp_path, "--lora_rank=2", "--epochs=1"))
    assert read_json(tmp_path / "results.json")["rte"]["42"]["settings"]["lora_rank"] == 2


@pytest.mark.parametrize("flags,message", [
    (["--tasks=cola"], "no task 'cola' in 2026; there are boolq, mnli, mrpc, multirc, qqp, rte, wsc, and M"),
    (["--rules=2027"], "wants one of 2023, 2024, 2025, 2026"),
    (["--keep_model"], "keep_model=True must be False"),
    (["--predictions=p.json.gz"], "has a predictions.json"), (["--max_length=2"], "max_length=2 must be"),
    (["--batch_size=20"], "batch_size=20 must be at most rte's 19 texts"),
    (["--per_task=rte --rules=2025"], "rules cannot be set"), (["--min_lr=1e-6"], "0 where min_lr=1e-06"),
    (["--warmup_iters=5"], "0 where warmup_iters=5 is not 0"),
    (["--rules=2024", "--bos=yes"], "bos=yes must be auto")])
def test_mistakes_are_one_line(flags, message, models, texts, tmp_path):
    with pytest.raises(SystemExit, match=message) as e:
        finetune.main(settings(models, "gpt2", "2026", texts, tmp_path / "out", *flags))
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)


def test_real_tasks_have_the_counts_of_the_rules(models):
    folder, tokenizer = real("eval2025", "full_eval", "glue_filtered"), load_checkpoint(models["llama"][0])[1]
    cfg = configure(FinetuneConfig, ["--rules=2026", f"--data={folder}"])
    for task, train, valid in (("mrpc", 3668, 204), ("rte", 2490, 139), ("wsc", 554, 52)):
        texts, labels = glue.read_examples(cfg, task, "train", tokenizer)
        others, _ = glue.read_examples(cfg, task, "valid", tokenizer, labels)
        assert (len(texts), len(others), labels) == (train, valid, [0, 1])
        assert max(len(text.ids) for text in texts) <= 512
