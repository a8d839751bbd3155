"""A study: the right teachers, each seed, nothing done twice, nothing mixed in silently."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from test_train import cut_short, records

import config
import disk
import distill
import eval_blimp
import prepare
import study
import train


@pytest.fixture
def in_process(monkeypatch):
    """The commands of a study, run here (a test of train.py's command line is elsewhere)."""
    def command(script, *args, nproc=0, quiet=False):
        main, cls = {"train.py": (train.main, train.TrainConfig), "distill.py": (distill.main, distill.DistillConfig),
                     "eval_blimp.py": (eval_blimp.main, eval_blimp.EvalConfig)}[script]
        ran.append(script)
        main(config.configure(cls, list(args)))
    ran = []
    monkeypatch.setattr(study, "command", command)
    return ran


def study_config(corpus, data, tmp_path, *runs, **change):
    (tmp_path / "small.py").write_text("".join(f"{k} = {v!r}\n" for k, v in TINY.items()))
    lines = runs or (f"a {tmp_path}/small.py", f"b {tmp_path}/small.py a", f"c {tmp_path}/small.py --n_embd=48 a b --teacher_dtype=float32,int8")
    return study.StudyConfig(**{**dict(runs=tuple(lines), data_dir=data, out_dir=str(tmp_path / "study"), blimp=(f"{corpus}/pairs",)), **change})


def test_each_run_is_taught_by_those_named(corpus, data, tmp_path, in_process, capsys):
    cfg = study_config(corpus, data, tmp_path)
    study.main(cfg)
    for name, teachers in (("a", []), ("b", ["a"]), ("c", ["a", "b"])):
        described = disk.load_checkpoint(f"{cfg.out_dir}/{name}")[2]
        assert [os.path.basename(t) for t in described.get("teachers", [])] == teachers
        if teachers:  # the losses the run logged for its teachers are theirs
            assert records(f"{cfg.out_dir}/{name}")[0]["teacher_val_ce"] == pytest.approx(
                [disk.load_checkpoint(f"{cfg.out_dir}/{t}")[2]["val_ce"] for t in teachers], abs=0.01)
    rows = [json.loads(line) for line in open(f"{cfg.out_dir}/results.jsonl")]
    assert [r["name"] for r in rows] == ["a", "b", "c"] and rows[2]["parameters"] > rows[1]["parameters"]
    table = capsys.readouterr().out.split("| run |")[1]
    for r in rows:
        blimp = json.load(open(f"{cfg.out_dir}/{r['name']}/blimp.json"))["folders"]["pairs"]["accuracy"]
        assert r["accuracy"]["pairs"] == blimp and f"{r['val_ce']:.4f} | {100 * blimp:.2f}" in table
    ran = list(in_process)
    study.main(cfg)
    assert in_process == ran and capsys.readouterr().out.count("\n| a |") == 1  # nothing again but the table


def test_a_study_goes_on_where_it_was_cut(corpus, data, tmp_path, in_process, monkeypatch):
    cfg = study_config(corpus, data, tmp_path)
    study.main(study_config(corpus, data, tmp_path, out_dir=str(tmp_path / "whole")))
    study.main(study_config(corpus, data, tmp_path, *cfg.runs[:1]))
    with monkeypatch.context() as m:
        cut_short(m, 4)
        with pytest.raises(KeyboardInterrupt):
            study.main(cfg)
    with pytest.raises(SystemExit, match="has 'b' with other settings or data .alpha: 0.5 -> 0.9"):  # b was begun as it was
        study.main(study_config(corpus, data, tmp_path, cfg.runs[0], cfg.runs[1] + " --alpha=0.9"))
    study.main(cfg)
    losses = [[disk.load_checkpoint(f"{out}/{g}")[2]["val_ce"] for g in "abc"] for out in (cfg.out_dir, tmp_path / "whole")]
    assert losses[0] == losses[1]


def test_other_settings_are_not_mixed_in(corpus, data, tmp_path, in_process):
    study.main(study_config(corpus, data, tmp_path, f"a {tmp_path}/small.py"))
    with pytest.raises(SystemExit, match="has 'a' with other settings or data .seed: 42 -> 9.; delete its line"):
        study.main(study_config(corpus, data, tmp_path, f"a {tmp_path}/small.py --seed=9"))


def test_other_weights_and_pairs_are_not_mixed_in(corpus, data, tmp_path, in_process):
    """The same command after a teacher outside of the study, a run of it or the pairs have become others."""
    small, outside = f"{tmp_path}/small.py", str(tmp_path / "outside")
    shutil.copytree(f"{corpus}/pairs", tmp_path / "pairs")
    cfg = study_config(corpus, data, tmp_path, f"a {small}", f"b {small} a {outside}", "both ensemble a b", blimp=(str(tmp_path / "pairs"),))
    config_of = lambda out, **change: train.TrainConfig(**{**TINY, **change}, data_dir=data, out_dir=out, overwrite=True)
    train.main(config_of(outside))
    study.main(cfg)
    ran = list(in_process)
    study.main(cfg)
    assert in_process == ran
    for folder, message in ((outside, "has 'b' with other settings or data .its data, its pairs, or a run"), (f"{cfg.out_dir}/a", "weights in .*/study/a are not those that .* has for 'a'")):
        shutil.copytree(folder, tmp_path / "kept")
        train.main(config_of(folder, seed=9))
        with pytest.raises(SystemExit, match=message):
            study.main(cfg)
        shutil.rmtree(folder)
        (tmp_path / "kept").rename(folder)
    study.main(cfg)
    shutil.rmtree(f"{cfg.out_dir}/a")  # room is needed: its line stays good
    study.main(cfg)
    next((tmp_path / "pairs").glob("*.jsonl")).open("a").write('{"sentence_good": "a", "sentence_bad": "b"}\n')
    with pytest.raises(SystemExit, match="has 'a' with other settings or data"):
        study.main(cfg)
    assert in_process == ran


def test_what_lies_in_the_folders_is_known_by_its_line(corpus, data, tmp_path, in_process):
    """A run without its line, a line without its run, and a run whose teacher's recipe has changed."""
    small = f"{tmp_path}/small.py"
    cfg = study_config(corpus, data, tmp_path, f"a {small}", f"b {small} a")
    study.main(cfg)
    path, lines = f"{cfg.out_dir}/results.jsonl", open(f"{cfg.out_dir}/results.jsonl").readlines()
    open(path, "w").writelines(lines[1:])
    with pytest.raises(SystemExit, match="study/a holds a run that .* does not know; delete the folder"):
        study.main(cfg)
    shutil.rmtree(f"{cfg.out_dir}/a")
    with pytest.raises(SystemExit, match="has 'b' with other settings"):  # or b would stand beside a teacher that it never had
        study.main(study_config(corpus, data, tmp_path, f"a {small} --learning_rate=0.02", f"b {small} a"))
    open(path, "w").writelines(lines[:1])
    shutil.rmtree(f"{cfg.out_dir}/b")
    shutil.rmtree(f"{cfg.out_dir}/a", ignore_errors=True)
    ran = list(in_process)
    with pytest.raises(SystemExit, match="study/a is needed for 'b' and is gone: delete its line"):
        study.main(cfg)
    open(path, "w").write("")
    study.main(cfg)
    assert in_process[len(ran):] == ["train.py", "eval_blimp.py", "distill.py", "eval_blimp.py"]
    shutil.copytree(cfg.out_dir, tmp_path / "moved")  # where it lies is not what it is
    study.main(study_config(corpus, data, tmp_path, *cfg.runs, out_dir=str(tmp_path / "moved")))
    assert in_process[len(ran) + 4:] == []


def test_runs_that_are_the_same_and_members_that_do_not_go_together(corpus, data, tmp_path, in_process):
    small = f"{tmp_path}/small.py"
    for lines, seeds, message in (((f"a {small}", f"b {small} --seed=+100"), ("1", "101"), "runs b@1 and a@101 are the same"), ((f"a {small}", "e ensemble a a"), (), "or stands there twice"),
                                  ((f"a {small}", f"b {small} --eval_chunks=9", "e ensemble a b"), (), "not validated on the same chunks"), ((f"a {small}",), ("1", "01"), "'01' is not a whole number"),
                                  ((f"a {small} --init_from=b", f"b {small}"), (), "no checkpoint at 'b'"), ((f"a {small} {data}",), (), "holds no checkpoint")):
        with pytest.raises(SystemExit, match=message):
            study.main(study_config(corpus, data, tmp_path, *lines, seeds=seeds))
    assert in_process == []
    for name in "ab":
        train.main(train.TrainConfig(**TINY, seed=ord(name), data_dir=data, out_dir=str(tmp_path / name)))
    cfg = study_config(corpus, data, tmp_path, f"both ensemble {tmp_path}/a {tmp_path}/b", f"c {small} --seed=+5", blimp=())
    study.main(cfg)  # measured as its members were
    rows = [json.loads(line) for line in open(f"{cfg.out_dir}/results.jsonl")]
    assert rows[0]["val_ce"] < max(disk.load_checkpoint(tmp_path.joinpath(n).as_posix())[2]["val_ce"] for n in "ab") and rows[1]["seed"] == train.TrainConfig.seed + 5


def test_a_signal_reaches_the_command_alone(tmp_path):
    """Also in its first seconds, where Python would print a traceback on Ctrl-C."""
    code = f"import sys; sys.path.insert(0, {ROOT!r}); import study; print('ready', flush=True); study.command('eval_blimp.py', '--ckpt=none')"
    for s in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout.readline() == "ready\n" and process.stdout.readline().startswith("$ eval_blimp.py")
        time.sleep(0.3)
        os.killpg(process.pid, s)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and err.startswith("error: eval_blimp.py ended with code -15") and err.count("\n") == 1


@pytest.mark.parametrize("line,message", [
    ("", "is not 'name config_file teacher"), ("a", "is not 'name config_file"), ("a ensemble", "or 'name ensemble run"), ("a ensemble b", "member 'b' is neither"), ("a x.py", "no config file 'x.py'"),
    ("a small.py b", "teacher 'b' is neither an earlier run of the study nor a run folder"), ("a small.py --n_lyer=1", "did you mean 'n_layer'"),
    ("../a small.py", "is not 'name"), (".. small.py", "is not 'name"), ("results.jsonl small.py", "is not 'name"), ("a small.py out --teacher_dtype=int8,int8", "teacher 'out' is neither")])
def test_bad_studies_are_one_line(corpus, data, tmp_path, in_process, line, message):
    with pytest.raises(SystemExit, match=message):
        study.main(study_config(corpus, data, tmp_path, line.replace("small.py", f"{tmp_path}/small.py")))
    assert in_process == []


def test_the_papers_chain_is_a_window_of_three():
    """models.md's order: sizes 58, 95, 360, three of each; from 95-0 on the three before."""
    cfg = config.configure(study.StudyConfig, [f"{ROOT}/config/reverse_distillation.py"])
    names = [line.split()[0] for line in cfg.runs]
    assert names == [f"{size}-{k}" for size in (58, 95, 360) for k in range(3)]
    for i, line in enumerate(cfg.runs[1:], 1):
        file, *teachers = [w for w in line.split()[1:] if not w.startswith("--")]
        assert teachers == names[max(0, i - 3):i] and file == f"config/reverse_{names[i].split('-')[0]}m.py"


def test_a_run_that_never_trained_may_be_corrected(corpus, data, tmp_path, in_process):
    with pytest.raises(SystemExit, match="must be a multiple of micro_batch_size"):
        study.main(study_config(corpus, data, tmp_path, f"a {tmp_path}/small.py --batch_size=7 --micro_batch_size=3"))
    study.main(study_config(corpus, data, tmp_path, f"a {tmp_path}/small.py"))


@pytest.mark.parametrize("rows", ['{"name": "a"}', '{"name": "a", "recipe": "a", "settings_sha256": "x", "data_sha256": "y", "val_ce": 1.0}', "[]", "{"])
def test_damaged_results_are_one_line(corpus, data, tmp_path, in_process, rows):
    (tmp_path / "study").mkdir()
    (tmp_path / "study/results.jsonl").write_text(rows + "\n")
    with pytest.raises(SystemExit, match="^error: .*results.jsonl, line 1, is damaged[^\n]*$"):
        study.main(study_config(corpus, data, tmp_path))


def test_what_a_run_cannot_say(corpus, data, tmp_path, in_process):
    with pytest.raises(SystemExit, match="is study.py's to say"):
        study.main(study_config(corpus, data, tmp_path, f"a {tmp_path}/small.py --resume"))
    with pytest.raises(SystemExit, match="cannot be scored, nor taught"):
        study.main(study_config(corpus, data, tmp_path, f"a {tmp_path}/small.py --causal=False"))
    assert in_process == []


def test_seeds_are_runs_of_one_recipe(corpus, data, tmp_path, in_process, capsys):
    """Each recipe once a seed, taught by the run of its own seed; the table has mean and standard deviation."""
    with pytest.raises(SystemExit, match="has a test split of 0 chunks"):
        study.main(study_config(corpus, data, tmp_path, f"a {tmp_path}/small.py", test_loss=True))
    shutil.copytree(f"{corpus}/text", tmp_path / "text")
    shutil.copytree(tmp_path / "text/dev", tmp_path / "text/test")
    for name in os.listdir(tmp_path / "text/test"):
        os.rename(tmp_path / "text/test" / name, tmp_path / "text/test" / name.replace(".dev", ".test"))
    data = str(tmp_path / "data")
    prepare.main(prepare.PrepareConfig(input_dir=str(tmp_path / "text"), data_dir=data, vocab_size=500, bos="line"))
    capsys.readouterr()
    cfg = study_config(corpus, data, tmp_path, f"a {tmp_path}/small.py", f"b {tmp_path}/small.py a", seeds=("3", "5"), test_loss=True)
    study.main(cfg)
    rows = {r["name"]: r for r in map(json.loads, open(f"{cfg.out_dir}/results.jsonl"))}
    assert list(rows) == ["a@3", "b@3", "a@5", "b@5"] and [r["seed"] for r in rows.values()] == [3, 3, 5, 5]
    assert [os.path.basename(t) for t in rows["b@5"]["teachers"]] == ["a@5"] and rows["b@5"]["ensemble_val_ce"] == pytest.approx(rows["a@5"]["val_ce"], abs=1e-5)
    out = capsys.readouterr().out
    for key in ("val_ce", "test_ce"):
        values = [rows[f"a@{seed}"][key] for seed in "35"]
        assert f" {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} |" in out
    model, _, _ = disk.load_checkpoint(f"{cfg.out_dir}/a@3")
    test = disk.Shards(data, "test")
    chosen = np.random.default_rng(2023).permutation((len(test) - 1) // 32)[:TINY["eval_chunks"]]
    tokens = torch.from_numpy(np.concatenate([test.windows([i * 32], 33) for i in chosen]))
    with torch.no_grad():
        ce = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert rows["a@3"]["test_ce"] == pytest.approx(ce.item(), abs=1e-4)
    ran = list(in_process)
    study.main(study_config(corpus, data, tmp_path, *cfg.runs, seeds=("3", "5", "6"), test_loss=True))
    assert in_process[len(ran):] == ["train.py", "eval_blimp.py", "distill.py", "eval_blimp.py"]  # seed 6 alone


def test_ensembles_seeds_apart_and_what_starts_from_another(corpus, data, tmp_path, in_process, capsys):
    """'name ensemble a b' is the mean of the logits; --seed=+k lies k above the study's; --init_from takes the run of the same seed."""
    small = f"{tmp_path}/small.py"
    cfg = study_config(corpus, data, tmp_path, f"a {small}", f"b {small} --seed=+10", "both ensemble a b", f"on {small} --init_from=a --max_iters=1", seeds=("3", "5"))
    study.main(cfg)
    rows = {r["name"]: r for r in map(json.loads, open(f"{cfg.out_dir}/results.jsonl"))}
    assert [(r["recipe"], r["seed"]) for r in rows.values()] == [("a", 3), ("b", 13), ("both", 3), ("on", 3), ("a", 5), ("b", 15), ("both", 5), ("on", 5)]
    models = [disk.load_checkpoint(f"{cfg.out_dir}/{name}")[0] for name in ("a@5", "b@5")]
    shards = disk.Shards(data, "val")
    T, n = TINY["seq_len"], TINY["eval_chunks"]
    starts = np.sort(np.random.default_rng(2023).permutation((len(shards) - 1) // T)[:n or None]) * T
    tokens = torch.from_numpy(shards.windows(starts, T + 1)).long()
    with torch.no_grad():
        z = (models[0](tokens[:, :-1]) + models[1](tokens[:, :-1])) / 2
    both = rows["both@5"]
    assert both["val_ce"] == pytest.approx(torch.nn.functional.cross_entropy(z.flatten(0, 1), tokens[:, 1:].flatten()).item(), abs=1e-5)
    assert both["parameters"] == rows["a@5"]["parameters"] + rows["b@5"]["parameters"] and len(both["teachers"]) == 2
    assert both["accuracy"]["pairs"] == json.load(open(f"{cfg.out_dir}/both@5/blimp.json"))["folders"]["pairs"]["accuracy"]
    described = disk.load_checkpoint(f"{cfg.out_dir}/on@5")[2]["train_config"]
    assert described["init_from"] == f"{cfg.out_dir}/a@5"
    assert "| both | 2 | (ensemble of a, b) |" in capsys.readouterr().out
    ran = list(in_process)
    study.main(cfg)
    assert in_process == ran
    with pytest.raises(SystemExit, match="c's teacher 'both' is neither"):
        study.main(study_config(corpus, data, tmp_path, *cfg.runs, f"c {small} both"))


def test_other_code_is_pointed_out(corpus, data, tmp_path, in_process, monkeypatch, capsys):
    cfg = study_config(corpus, data, tmp_path, f"a {tmp_path}/small.py")
    study.main(cfg)
    assert "another git_revision" not in capsys.readouterr().out
    monkeypatch.setattr(disk, "git_revision", lambda: "other")
    study.main(cfg)
    assert "1 of 1 runs are of another git_revision than other: a" in capsys.readouterr().out
