"""MSGS, what a model generalises by; and the rules of 2023, by which it was scored."""
import itertools
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import ROOT, read_jsonl, real, validations, write_task
from lib import glue
from lib.checkpoints import load_checkpoint
from lib.configurator import configure
from lib.files import read_json
from lib.machine import Machine
from tools import finetune
from tools.finetune import FinetuneConfig, TaskKeeper

AMBIGUOUS, SURFACE_CONTROL = "main_verb_lexical_content_the", "lexical_content_the_control"
AGREE, DISAGREE = [(1, 1), (0, 0)], [(1, 0), (0, 1)]
ROWS = {  # split -> (condition, labels of the linguistic and the surface feature)
    AMBIGUOUS: {"train": [("training", AGREE)],
                "valid": [("training", AGREE), ("test", DISAGREE), ("control", AGREE)]},
    SURFACE_CONTROL: {"train": [("training", [(None, 1), (None, 0)])],
                      "valid": [(condition, [(None, 1), (None, 0)]) for condition in ("training", "test")]}}
NAMES_2023 = {"train": "{}.train.json", "valid": "{}.validation.json"}
PUBLISHED = {"train": "{}/train.jsonl", "valid": "{}/test.jsonl"}


def write_msgs(folder, task=AMBIGUOUS, first="linguistic", names=NAMES_2023, n=16):
    """n rows of each kind, in the form of 2023, with a label, or as published, with one of each feature. The
    linguistic feature is here that a dog is named (or a cat), the surface one "the" (or "a"); `first` is the
    one that the first word shows."""
    for split, name in names.items():
        path = os.path.join(folder, name.format(task))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as f:
            for (condition, labels), _ in itertools.product(ROWS[task][split], range(n)):
                for linguistic, surface in labels:
                    noun, article = ("cat", "dog")[linguistic or 0], ("a", "the")[surface]
                    sentence = (f"{noun} sees {article} girl." if first == "linguistic" else
                                f"{article} girl sees a {noun}.")
                    row = dict(sentence=sentence, condition=condition, linguistic_feature_label=linguistic,
                               surface_feature_label=surface, linguistic_feature_type="x")
                    if names is NAMES_2023:
                        row["label"] = surface if linguistic is None else linguistic
                    f.write(json.dumps(row) + "\n")
    return str(folder)


@pytest.fixture
def run(teachers, tmp_path):
    """run(**settings): fine-tunes the tiny Llama, and gives what results.json has of the seed."""
    def tuned(**change):
        base = dict(rules="2023", ckpt=(teachers[1],), data=str(tmp_path / "data"), device="cpu",
                    out_dir=str(tmp_path / "out"), max_length=32, learning_rate=1e-2, batch_size=16, epochs=4)
        cfg = FinetuneConfig.from_given(**{**base, **change})
        finetune.main(cfg)
        results = read_json(f"{cfg.out_dir}/results.json")
        return {task: rows["12"] for task, rows in results.items()}
    return tuned


# --- MSGS -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("first,sign", [("linguistic", 1), ("surface", -1)])
def test_the_sign_says_which_feature_was_learned(first, sign, run, tmp_path, capsys):
    """A model that reads the first token alone can learn the one feature that this shows."""
    write_msgs(tmp_path / "data", first=first)
    row = run(tasks=(AMBIGUOUS,), max_length=1, eval_interval=4)[AMBIGUOUS]
    gold = read_jsonl(tmp_path / f"data/{AMBIGUOUS}.validation.json")
    predicted = read_json(tmp_path / f"out/{AMBIGUOUS}_12/predictions.json")[AMBIGUOUS]["predictions"]
    assert len(predicted) == len(gold) == 96
    y, p = (np.array(values) for values in zip(*[
        (row["label"], guess["pred"]) for row, guess in zip(gold, predicted) if row["condition"] == "test"]))
    assert row["mcc"] == pytest.approx(np.corrcoef(y, p)[0, 1]) == pytest.approx(sign)
    assert row["accuracy"] == (1 + sign) / 2
    # the choice is by the F1 of all rows, a third of which are wrong for who goes by the surface
    last = validations(tmp_path / f"out/{AMBIGUOUS}_12")[-1]
    assert last["val_loss"] == pytest.approx({1: 0, -1: 1 / 3}[sign])
    out = capsys.readouterr().out
    assert f"\n| {AMBIGUOUS} | 1 | {100 * sign}.0 |  |\n" in out and "mean of" not in out


class Answers(torch.nn.Module):
    """Predicts these labels, whatever it reads."""

    def __init__(self, labels):
        super().__init__()
        self.labels = torch.tensor(labels)

    def forward(self, batch):
        return F.one_hot(self.labels, 2).float()


def test_the_choice_sees_all_rows(tmp_path):
    """Of two epochs the one with the better F1 over all rows is kept, though it is worse where it counts."""
    texts = [glue.Example([1], label, reported) for reported in (False, True) for label in (1, 0)]
    keeper = TaskKeeper(FinetuneConfig(out_dir=str(tmp_path)), Machine(torch.device("cpu")), None, texts,
                        AMBIGUOUS, 2)
    for step, answers in enumerate(([0, 0, 1, 0], [1, 0, 1, 1]), 1):  # F1 2/3 and 4/5; MCC reported 1 and 0
        keeper.trainee = SimpleNamespace(student=Answers(answers))
        keeper.judged(step)
    assert keeper.best_step == 2 and keeper.best == pytest.approx(1 - 4 / 5)
    assert keeper.best_scores["mcc"] == 0 and keeper.best_scores["accuracy"] == 0.5
    assert keeper.best_predictions == [1, 0, 1, 1]


@pytest.mark.parametrize("task", [AMBIGUOUS, SURFACE_CONTROL])
def test_both_forms_are_read_alike(task, teachers, tmp_path):
    """That of 2023 and that of the published data, whose label is the linguistic feature's if it has one."""
    tokenizer = load_checkpoint(teachers[1])[1]
    for names, folder in ((NAMES_2023, "a"), (PUBLISHED, "b")):
        write_msgs(tmp_path / folder, task, names=names, n=3)
    for split in ("train", "valid"):
        one, other = (
            glue.read_examples(FinetuneConfig(data=str(tmp_path / folder)), task, split, tokenizer)
            for folder in ("a", "b"))
        assert one == other and one[1] == [0, 1]
        assert [example.label for example in one[0]][:6] == [1, 0] * 3
    wanted = [condition == "test" for condition, _ in ROWS[task]["valid"] for _ in range(6)]
    assert [example.reported for example in one[0]] == wanted
    write_msgs(tmp_path / "a", task, names=PUBLISHED)
    with pytest.raises(SystemExit, match="in two places"):
        glue.find_files(FinetuneConfig(data=str(tmp_path / "a")), task, "train")


def test_msgs_has_a_table_of_its_own(capsys):
    """Ambiguous tasks first, then the controls; GLUE's mean is of GLUE alone."""
    rows = {"1": dict(mcc=0.5, accuracy=0.75), "2": dict(mcc=-0.5, accuracy=0.25)}
    results = {task: rows for task in ("main_verb_control", AMBIGUOUS)}
    finetune.table({**results, "rte": {"1": dict(accuracy=0.6)}}, FinetuneConfig.from_given(rules="2023"))
    glue, msgs = capsys.readouterr().out.split("\n| MSGS | seeds |")
    assert "| mean of 1 tasks (the official score of 2023 has 11) | | | 60.0 | | 60.0 |" in glue
    assert [line.split(" | ") for line in msgs.splitlines()[2:4]] == [
        ["| " + task, "2", "0.0", "70.7 |"] for task in (AMBIGUOUS, "main_verb_control")]


def test_the_stand_in_is_read(teachers):
    folder, tokenizer = real("eval", "msgs_standin"), load_checkpoint(teachers[1])[1]
    for task in glue.MSGS:
        cfg = FinetuneConfig(data=folder)
        texts, labels = glue.read_examples(cfg, task, "train", tokenizer)
        valid, _ = glue.read_examples(cfg, task, "valid", tokenizer, labels)
        counts = (len(texts), len(valid), sum(text.reported for text in valid))
        assert counts == (800, 480 if task.endswith("control") else 720, 240) and labels == [0, 1]


# --- the rules of 2023 ----------------------------------------------------------------------------

@pytest.mark.parametrize("interval,steps_2023,steps_2024", [
    (3, [3, 6], [3, 6]), (4, [4], [4, 6]), (9, [], [6])])
def test_the_last_step_is_validated_if_it_is_a_multiple(interval, steps_2023, steps_2024, run, tmp_path):
    """In 2023; where none is, the last weights count. All else is as in 2024."""
    write_task(tmp_path / "data")
    kept, logged = {}, {}
    for rules, steps in (("2023", steps_2023), ("2024", steps_2024)):
        out = tmp_path / rules
        kept[rules] = run(rules=rules, tasks=("rte",), epochs=1, eval_interval=interval, out_dir=str(out))
        logged[rules] = validations(out / "rte_12")
        assert [record["step"] for record in logged[rules]] == steps
    wanted = logged["2024"][0] if interval == 4 else kept["2024"]["rte"]
    keys = ("val_ce", "accuracy", "f1", "mcc")
    assert {key: kept["2023"]["rte"][key] for key in keys} == {key: wanted[key] for key in keys}


def test_mnli_mm_is_trained_for_itself(run, tmp_path):
    """On mnli's texts, chosen on its own; predictions are added to the JSON lines that were handed in."""
    data, lines = tmp_path / "data", tmp_path / "all_predictions.json"
    for task, name, n in (("mnli", "matched", 33), ("mnli-mm", "mismatched", 9)):
        write_task(data, task, labels=(0, 1, 2), valid=n)
        os.rename(data / f"{task}.valid.jsonl", data / f"mnli.validation_{name}.json")
    os.rename(data / "mnli.train.jsonl", data / "mnli.train.json")
    os.remove(data / "mnli-mm.train.jsonl")
    assert list(run(tasks=("mnli",), predictions=str(lines), epochs=1)) == ["mnli"]
    rows = run(tasks=("mnli-mm",), predictions=str(lines), epochs=2)
    assert [rows[task]["settings"]["epochs"] for task in ("mnli", "mnli-mm")] == [1, 2]
    write_msgs(data)
    run(tasks=(AMBIGUOUS,), predictions=str(lines), epochs=1)
    handed = read_jsonl(lines)
    assert [(line["task"], line["sub_task"], len(line["predictions"])) for line in handed] == [
        ("glue", "mnli", 33), ("glue", "mnli-mm", 9), ("msgs", AMBIGUOUS, 96)]
    assert handed[1]["predictions"][3]["id"] == "mnli-mm_3"
    predicted = read_json(tmp_path / "out/mnli-mm_12/predictions.json")["mnli-mm"]["predictions"]
    assert [row["pred"] for row in handed[1]["predictions"]] == [str(row["pred"]) for row in predicted]
    # the same files by the rules of 2024: mnli's model is scored on both
    assert list(run(rules="2024", tasks=("mnli",), epochs=1, out_dir=str(tmp_path / "2024"))) == [
        "mnli", "mnli-mm"]


def test_the_papers_table_is_its_config():
    """Baby Llama's table 3: rate, batch, epochs, patience, interval, seed; the controls' are official."""
    cfg = configure(FinetuneConfig, [f"{ROOT}/config/glue/msgs_babyllama.py", "--ckpt=x"])
    finetune.check(cfg)
    assert set(cfg.tasks) == set(glue.MSGS) and len(cfg.tasks) == 11
    short, long = (1e-3, 64, 2, 10, 10, 12), (5e-5, 64, 6, 10, 200, 12)
    for task, wanted in zip(glue.MSGS, [short, long, long, long, short, short] +
                            [(5e-5, 64, 10, 10, 200, 12)] * 5):
        of = finetune.task_config(cfg, task, "12")
        assert (of.learning_rate, of.batch_size, of.epochs, of.patience, of.eval_interval, of.seed) == wanted
        assert (of.schedule, of.warmup_iters, of.weight_decay, of.grad_clip) == ("linear", 0, 0, 1)
    assert finetune.departures(cfg) == "settings by task"


@pytest.mark.parametrize("change,message", [
    (dict(tasks=("rte", AMBIGUOUS), formats="lora"), "formats=lora must be full for MSGS"),
    (dict(tasks=(SURFACE_CONTROL,)),
     f"no {SURFACE_CONTROL}.train.jsonl in .*, {SURFACE_CONTROL}/train.jsonl$"),
    (dict(tasks=("mnli-mm",), rules="2024"), "no task 'mnli-mm' in 2024.*mnli brings mnli-mm.*MSGS's contr"),
    (dict(bos="yes"), "bos=yes must be auto: those of 2023 have no <s>"),
    (dict(max_length=65), "max_length=65 must be at most the model's block_size=64"),
    (dict(predictions="{}/damaged.json"), "damaged.json is no JSON lines of predictions"),
    (dict(tasks=("main_verb_control",)), "no row has the condition 'test'")])
def test_mistakes_are_one_line(change, message, run, tmp_path):
    write_msgs(tmp_path / "data")
    (tmp_path / "damaged.json").write_text("[]\n")
    for split, name in NAMES_2023.items():
        row = dict(sentence="the dog runs.", condition="training")
        with open(tmp_path / "data" / name.format("main_verb_control"), "w") as f:
            f.writelines(json.dumps(dict(row, label=label)) + "\n" for label in (0, 1))
    change = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(SystemExit, match=message) as e:
        run(**{"tasks": (AMBIGUOUS,), **change})
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)
