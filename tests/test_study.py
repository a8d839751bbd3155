"""A study: the right teachers, each seed, nothing done twice, nothing mixed in silently."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import distill
import eval_blimp
import prepare
import train
from helpers import ROOT, TINY, VOCAB, cut_short, read_jsonl, records, run_train, train_config
from lib.checkpoints import load_checkpoint
from lib.configurator import configure
from lib.shards import Shards
from tools import demo, study

A_RUN = ["train.py", "eval_blimp.py"]
A_TAUGHT_RUN = ["distill.py", "eval_blimp.py"]


@pytest.fixture
def in_process(monkeypatch):
    """The commands of a study, run here (a test of train.py's command line is elsewhere)."""
    scripts = {"train.py": (train.main, train.TrainConfig),
               "distill.py": (distill.main, distill.DistillConfig),
               "eval_blimp.py": (eval_blimp.main, eval_blimp.EvalConfig)}

    def command(script, *args, nproc=0, quiet=False):
        main, cls = scripts[script]
        ran.append(script)
        main(configure(cls, list(args)))
    ran = []
    monkeypatch.setattr(study, "command", command)
    return ran


@pytest.fixture
def small(tmp_path):
    """A config file."""
    (tmp_path / "small.py").write_text("".join(f"{k} = {v!r}\n" for k, v in TINY.items()))
    return str(tmp_path / "small.py")


@pytest.fixture
def cfg_of(corpus, data, tmp_path):
    """StudyConfig of lines."""
    def cfg_of(*lines, **change):
        settings = dict(runs=lines, data_dir=data, out_dir=str(tmp_path / "study"))
        return study.StudyConfig(**{**settings, "blimp": (f"{corpus}/pairs",), **change})
    return cfg_of


@pytest.fixture
def chain(cfg_of, small):
    """Three runs, the second and third taught."""
    third = f"c {small} --n_embd=48 a b --teacher_dtype=float32,int8"
    return lambda **change: cfg_of(f"a {small}", f"b {small} a", third, **change)


def results(cfg):
    return {row["name"]: row for row in read_jsonl(f"{cfg.out_dir}/results.jsonl")}


def val_ce(out):
    return load_checkpoint(str(out))[2]["val_ce"]


def test_quantiles_of_students_t():
    """Each leaves a fortieth of its density above it."""
    for n, quantile in enumerate(study.T95, 1):
        x = np.tan(np.linspace(np.arctan(quantile), np.pi / 2, 200_001)[:-1])  # to infinity
        density = (1 + x ** 2 / n) ** (-(n + 1) / 2)
        x0 = np.tan(np.linspace(-np.pi / 2, np.pi / 2, 400_001)[1:-1])
        whole = np.trapezoid((1 + x0 ** 2 / n) ** (-(n + 1) / 2), x0)
        assert np.trapezoid(density, x) / whole == pytest.approx(0.025, rel=2e-3)


# --- what is trained ------------------------------------------------------------------------------

def test_each_run_is_taught_by_those_named(chain, in_process, capsys):
    cfg = chain()
    study.main(cfg)
    for name, teachers in (("a", []), ("b", ["a"]), ("c", ["a", "b"])):
        described = load_checkpoint(f"{cfg.out_dir}/{name}")[2]
        assert [os.path.basename(t) for t in described.get("teachers", [])] == teachers
        if teachers:  # the losses the run logged for its teachers are theirs
            logged = records(f"{cfg.out_dir}/{name}")[0]["teacher_val_ce"]
            assert logged == pytest.approx([val_ce(f"{cfg.out_dir}/{t}") for t in teachers], abs=0.01)
    rows = results(cfg)
    assert list(rows) == ["a", "b", "c"] and rows["c"]["parameters"] > rows["b"]["parameters"]
    table = capsys.readouterr().out.split("| run |")[1]
    for name, row in rows.items():
        with open(f"{cfg.out_dir}/{name}/blimp.json") as f:
            accuracy = json.load(f)["folders"]["pairs"]["accuracy"]
        assert row["accuracy"]["pairs"] == accuracy
        assert f"{row['val_ce']:.4f} | {100 * accuracy:.2f}" in table
    ran = list(in_process)
    study.main(cfg)
    assert in_process == ran and capsys.readouterr().out.count("\n| a |") == 1  # nothing again but the table


def test_a_study_goes_on_where_it_was_cut(chain, cfg_of, tmp_path, in_process, monkeypatch):
    cfg, whole = chain(), chain(out_dir=str(tmp_path / "whole"))
    study.main(whole)
    study.main(cfg_of(*cfg.runs[:1]))
    with monkeypatch.context() as m:
        cut_short(m, 4)
        with pytest.raises(KeyboardInterrupt):
            study.main(cfg)
    with pytest.raises(SystemExit, match="has 'b' with other settings or data .alpha: 0.5 -> 0.9"):
        study.main(cfg_of(cfg.runs[0], cfg.runs[1] + " --alpha=0.9"))  # b was begun as it was
    study.main(cfg)
    for name in "abc":
        assert val_ce(f"{cfg.out_dir}/{name}") == val_ce(f"{whole.out_dir}/{name}")


def test_seeds_are_runs_of_one_recipe(cfg_of, small, corpus, tmp_path, in_process, capsys):
    """Each recipe once a seed, taught by the run of its own seed; the table has mean and deviation."""
    with pytest.raises(SystemExit, match="has a test split of 0 chunks"):
        study.main(cfg_of(f"a {small}", test_loss=True))
    shutil.copytree(f"{corpus}/text", tmp_path / "text")
    shutil.copytree(tmp_path / "text/dev", tmp_path / "text/test")
    for path in (tmp_path / "text/test").iterdir():
        path.rename(path.with_suffix(".test"))
    data = str(tmp_path / "data")
    prepare.main(prepare.PrepareConfig(input_dir=str(tmp_path / "text"), data_dir=data, vocab_size=VOCAB,
                                       bos="line"))
    capsys.readouterr()
    lines = f"a {small}", f"b {small} a"
    cfg = cfg_of(*lines, data_dir=data, seeds=("3", "5"), test_loss=True)
    study.main(cfg)
    rows = results(cfg)
    assert {name: row["seed"] for name, row in rows.items()} == {"a@3": 3, "b@3": 3, "a@5": 5, "b@5": 5}
    assert [os.path.basename(t) for t in rows["b@5"]["teachers"]] == ["a@5"]
    assert rows["b@5"]["ensemble_val_ce"] == pytest.approx(rows["a@5"]["val_ce"], abs=1e-5)
    out = capsys.readouterr().out
    for key in ("val_ce", "test_ce"):
        values = [rows[f"a@{seed}"][key] for seed in "35"]
        assert f" {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} |" in out
    model, _, _ = load_checkpoint(f"{cfg.out_dir}/a@3")
    assert rows["a@3"]["test_ce"] == pytest.approx(loss_on(Shards(data, "test"), model), abs=1e-4)
    # the same table of the file alone, and what b has less than a: of two seeds t is 12.7062
    study.main(study.StudyConfig(table=f"{cfg.out_dir}/results.jsonl", against="a"))
    again, less = capsys.readouterr().out.split("| minus a |")
    assert again.strip() in out
    low, high = sorted(rows[f"b@{seed}"]["val_ce"] - rows[f"a@{seed}"]["val_ce"] for seed in "35")
    assert f"\n| b | {(low + high) / 2:+.4f} ± {12.7062 * (high - low) / 2:.4f} |" in less
    with pytest.raises(SystemExit, match="against=c is none of the recipes: a, b"):
        study.main(study.StudyConfig(table=f"{cfg.out_dir}/results.jsonl", against="c"))
    with pytest.raises(SystemExit, match="against=c is none of the recipes: a, b"):  # before the hours
        study.main(cfg_of(*lines, data_dir=data, seeds=("3", "5", "6"), test_loss=True, against="c"))
    (tmp_path / "begun.jsonl").write_text('{"name": "a", "recipe": "a", "data_sha256": "", "settings": {}}\n')
    with pytest.raises(SystemExit, match="begun.jsonl has no finished run"):
        study.main(study.StudyConfig(table=str(tmp_path / "begun.jsonl")))
    ran = len(in_process)
    study.main(cfg_of(*lines, data_dir=data, seeds=("3", "5", "6"), test_loss=True))
    assert in_process[ran:] == A_RUN + A_TAUGHT_RUN  # seed 6 alone


def loss_on(shards, model):
    """On the chunks that are measured, of the logits of a model or a function."""
    T, n = TINY["seq_len"], TINY["eval_chunks"]
    starts = np.random.default_rng(2023).permutation((len(shards) - 1) // T)[:n] * T
    tokens = torch.from_numpy(shards.windows(starts, T + 1))
    with torch.no_grad():
        z = model(tokens[:, :-1])
    return torch.nn.functional.cross_entropy(z.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.thorough
def test_ensembles_seeds_apart_and_what_starts_from_another(cfg_of, small, data, in_process, capsys):
    """'name ensemble a b' is the mean of the logits; --seed=+k lies k above the study's; --init_from takes
    the run of the same seed."""
    lines = (f"a {small}", f"b {small} --seed=+10", "both ensemble a b",
             f"on {small} --init_from=a --max_iters=1")
    cfg = cfg_of(*lines, seeds=("3", "5"))
    study.main(cfg)
    rows = results(cfg)
    assert [row["recipe"] for row in rows.values()] == ["a", "b", "both", "on"] * 2
    assert [row["seed"] for row in rows.values()] == [3, 13, 3, 3, 5, 15, 5, 5]
    a, b = (load_checkpoint(f"{cfg.out_dir}/{name}")[0] for name in ("a@5", "b@5"))
    expected = loss_on(Shards(data, "val"), lambda x: (a(x) + b(x)) / 2)
    both = rows["both@5"]
    assert both["val_ce"] == pytest.approx(expected, abs=1e-5) and len(both["teachers"]) == 2
    assert both["parameters"] == rows["a@5"]["parameters"] + rows["b@5"]["parameters"]
    with open(f"{cfg.out_dir}/both@5/blimp.json") as f:
        assert both["accuracy"]["pairs"] == json.load(f)["folders"]["pairs"]["accuracy"]
    described = load_checkpoint(f"{cfg.out_dir}/on@5")[2]["train_config"]
    assert described["init_from"] == f"{cfg.out_dir}/a@5"
    assert "| both | 2 | (ensemble of a, b) |" in capsys.readouterr().out
    ran = list(in_process)
    study.main(cfg)
    assert in_process == ran
    with pytest.raises(SystemExit, match="c's teacher 'both' is neither"):
        study.main(cfg_of(*lines, f"c {small} both"))


def test_a_new_demo_leaves_the_studies_beside_it(tmp_path, monkeypatch):
    for name in ("write_text", "train_and_score", "table"):
        monkeypatch.setattr(demo, name, lambda *_: None)
    for name in (".made_by_demo", "study", "gpt2"):
        (tmp_path / name).mkdir() if name[0] != "." else (tmp_path / name).touch()
    demo.main(demo.DemoConfig(dir=str(tmp_path)))
    assert sorted(os.listdir(tmp_path)) == [".made_by_demo", "study"]


def test_data_are_the_configs_but_for_the_studys_and_the_lines(cfg_of, small, data, tmp_path):
    other, own = shutil.copytree(data, tmp_path / "other"), tmp_path / "own.py"
    own.write_text(f"data_dir = {data!r}\n")
    for of_study, flag, expected in (("", "", data), (str(other), "", str(other)),
                                     (str(other), f"--data_dir={data}", data)):
        line = f"a {small} {own} {flag}"
        assert study.plan_run(cfg_of(line, data_dir=of_study), line, "", {}, []).cfg.data_dir == expected


def test_the_papers_chain_is_a_window_of_three():
    """models.md's order: sizes 58, 95, 360, three of each; from 95-0 on the three before. One recipe."""
    cfg = configure(study.StudyConfig, [f"{ROOT}/config/study/reverse_distillation.py"])
    names = [line.split()[0] for line in cfg.runs]
    assert names == [f"{size}-{k}" for size in (58, 95, 360) for k in range(3)]
    recipe = dict(epochs=10, batch_size=64, micro_batch_size=0, learning_rate=2.5e-4, warmup_iters=200,
                  weight_decay=0.0, seq_len=128, seed=42, alpha=0.5, temperature=2.0, kl_reduction="sequence")
    for i, line in enumerate(cfg.runs):
        words = [w for w in line.split()[1:] if not w.startswith("--")]
        assert words[0] == f"config/llama_{names[i].split('-')[0]}m.py"
        assert words[1:] == (names[max(0, i - 3):i] or ["out/gpt2_705m", "out/llama_360m"])
        run = configure(distill.DistillConfig, [f"{ROOT}/{words[0]}", *cfg.settings])
        assert {key: getattr(run, key) for key in recipe} == recipe


# --- what must not be mixed -----------------------------------------------------------------------

def test_other_settings_are_not_mixed_in(cfg_of, small, in_process):
    study.main(cfg_of(f"a {small}"))
    with pytest.raises(SystemExit, match="'a' with other settings or data .seed: 42 -> 9.; delete its line"):
        study.main(cfg_of(f"a {small} --seed=9"))


def test_a_new_setting_invalidates_nothing_until_it_is_used(cfg_of, small, in_process, monkeypatch):
    """A tinkerer's own, at its default; nor does a line that says the same in other words."""
    @dataclass
    class Tinkered(train.TrainConfig):
        invented: float = 0.5

    @dataclass
    class TinkeredDistillation(distill.DistillConfig):
        invented: float = 0.5

    lines = f"a {small}", f"b {small} a"
    study.main(cfg_of(*lines))
    ran = list(in_process)
    monkeypatch.setattr(study, "TrainConfig", Tinkered)
    monkeypatch.setattr(study, "DistillConfig", TinkeredDistillation)
    study.main(cfg_of(*lines))
    study.main(cfg_of(f"a {small} --invented=0.5 --vocab_size={VOCAB}", lines[1]))
    assert in_process == ran
    for a, b, message in (("--invented=0.7", "", "'a' with other .* .invented: 0.5 -> 0.7.;"),
                          ("", "--temperature=3", "'b' with other .* .temperature: 2.0 -> 3.0.;")):
        with pytest.raises(SystemExit, match=message):
            study.main(cfg_of(f"{lines[0]} {a}", f"{lines[1]} {b}"))
    assert in_process == ran


def test_rows_of_older_code_count_by_data_and_weights(cfg_of, small, data, in_process, tmp_path, capsys):
    """They have a hash of all settings, which no code can make any more."""
    lines = f"a {small}", f"b {small} a"
    cfg = cfg_of(*lines)
    study.main(cfg)
    path, rows = f"{cfg.out_dir}/results.jsonl", list(results(cfg).values())

    def older(row):
        row = {**row, "settings_sha256": "0" * 64}
        return {key: value for key, value in row.items() if key != "settings"}

    def write(*rows):
        with open(path, "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)

    write(*map(older, rows))
    ran = list(in_process)
    capsys.readouterr()
    study.main(cfg_of(*lines, f"c {small} a b"))
    out = capsys.readouterr().out
    assert in_process[len(ran):] == A_TAUGHT_RUN and out.count("older code") == 1
    assert "rows made by older code, whose settings are not compared: a, b\n" in out
    assert "| c | 1 | a, b |" in out
    after = results(cfg)
    assert "settings" not in after["a"] and "settings" in after["c"]
    write(older({**rows[0], "data_sha256": "1" * 64}))
    with pytest.raises(SystemExit, match="has 'a' with other settings or data .data: 11111111 -> "):
        study.main(cfg)
    write(older({**rows[0], "weights_sha256": ["1" * 64]}))
    with pytest.raises(SystemExit, match="the weights in .*/study/a are not those"):
        study.main(cfg)
    write(older(rows[0]))  # as far as it says what it is
    with pytest.raises(SystemExit, match="has 'a' with other settings or data .seed: 42 -> 9."):
        study.main(cfg_of(f"{lines[0]} --seed=9"))
    begun = {key: rows[0][key] for key in study.BEGUN}
    write(older(begun))
    with pytest.raises(SystemExit, match="has 'a' .* .it was begun by older code"):
        study.main(cfg)


@pytest.mark.thorough
def test_other_weights_and_pairs_are_not_mixed_in(cfg_of, small, corpus, data, tmp_path, in_process):
    """The same command after a teacher outside of the study, a run of it or the pairs have become others."""
    outside = str(tmp_path / "outside")
    shutil.copytree(f"{corpus}/pairs", tmp_path / "pairs")
    lines = f"a {small}", f"b {small} a {outside}", "both ensemble a b"
    cfg = cfg_of(*lines, blimp=(str(tmp_path / "pairs"),))
    run_train(data, outside)
    study.main(cfg)
    ran = list(in_process)
    study.main(cfg)
    assert in_process == ran
    for folder, message in (
            (outside, "has 'b' with other settings or data .teachers: .*; delete its line"),
            (f"{cfg.out_dir}/a", "weights in .*/study/a are not those that .* has for 'a'")):
        shutil.copytree(folder, tmp_path / "kept")
        run_train(data, folder, seed=9, overwrite=True)
        with pytest.raises(SystemExit, match=message):
            study.main(cfg)
        shutil.rmtree(folder)
        (tmp_path / "kept").rename(folder)
    study.main(cfg)
    shutil.rmtree(f"{cfg.out_dir}/a")  # room is needed: its line stays good
    study.main(cfg)
    with next((tmp_path / "pairs").glob("*.jsonl")).open("a") as f:
        f.write('{"sentence_good": "a", "sentence_bad": "b"}\n')
    with pytest.raises(SystemExit, match="has 'a' with other settings or data .pairs: "):
        study.main(cfg)
    assert in_process == ran


@pytest.mark.thorough
def test_what_lies_in_the_folders_is_known_by_its_line(cfg_of, small, tmp_path, in_process):
    """A run without its line, a line without its run, and a run whose teacher's recipe has changed."""
    cfg = cfg_of(f"a {small}", f"b {small} a")
    study.main(cfg)
    path = tmp_path / "study/results.jsonl"
    a, b = path.read_text().splitlines(True)
    path.write_text(b)
    with pytest.raises(SystemExit, match="study/a holds a run that .* does not know; delete the folder"):
        study.main(cfg)
    shutil.rmtree(f"{cfg.out_dir}/a")
    with pytest.raises(SystemExit, match="has 'b' with other settings"):
        # or b would stand beside a teacher that it never had
        study.main(cfg_of(f"a {small} --learning_rate=0.02", f"b {small} a"))
    path.write_text(a)
    shutil.rmtree(f"{cfg.out_dir}/b")
    shutil.rmtree(f"{cfg.out_dir}/a", ignore_errors=True)
    ran = len(in_process)
    with pytest.raises(SystemExit, match="study/a is needed for 'b' and is gone: delete its line"):
        study.main(cfg)
    path.write_text("")
    study.main(cfg)
    assert in_process[ran:] == A_RUN + A_TAUGHT_RUN
    shutil.copytree(cfg.out_dir, tmp_path / "moved")  # where it lies is not what it is
    study.main(cfg_of(*cfg.runs, out_dir=str(tmp_path / "moved")))
    assert len(in_process) == ran + 4


def test_runs_that_are_the_same_and_members_that_do_not_fit(cfg_of, small, data, tmp_path, in_process):
    for lines, seeds, message in (
            ((f"a {small}", f"b {small} --seed=+100"), ("1", "101"), "runs b@1 and a@101 are the same"),
            ((f"a {small}", "e ensemble a a"), (), "or stands there twice"),
            ((f"a {small}", f"b {small} --eval_chunks=9", "e ensemble a b"), (), "not validated on the same"),
            ((f"a {small}",), ("1", "01"), "'01' is not a whole number"),
            ((f"a {small} --init_from=b", f"b {small}"), (), "no checkpoint at 'b'"),
            ((f"a {small} {data}",), (), "holds no checkpoint")):
        with pytest.raises(SystemExit, match=message):
            study.main(cfg_of(*lines, seeds=seeds))
    assert in_process == []
    for name in "ab":
        train.main(train_config(data, tmp_path / name, seed=ord(name)))
    cfg = cfg_of(f"both ensemble {tmp_path}/a {tmp_path}/b", f"c {small} --seed=+5", blimp=())
    study.main(cfg)  # measured as its members were
    rows = results(cfg)
    assert rows["both"]["val_ce"] < max(val_ce(tmp_path / name) for name in "ab")
    assert rows["c"]["seed"] == train.TrainConfig.seed + 5


def test_other_code_is_pointed_out(cfg_of, small, in_process, monkeypatch, capsys):
    cfg = cfg_of(f"a {small}")
    study.main(cfg)
    assert "another git_revision" not in capsys.readouterr().out
    monkeypatch.setattr(study, "git_revision", lambda: "other")
    study.main(cfg)
    assert "1 of 1 runs are of another git_revision than other: a" in capsys.readouterr().out


# --- mistakes, and commands -----------------------------------------------------------------------

@pytest.mark.parametrize("line,message", [
    ("", "is not 'name config_file teacher"),
    ("a", "is not 'name config_file"),
    ("a ensemble", "or 'name ensemble run"),
    ("a ensemble b", "member 'b' is neither"),
    ("a x.py", "no config file 'x.py'"),
    ("a small.py b", "teacher 'b' is neither an earlier run of the study nor a run folder"),
    ("a small.py --n_lyer=1", "did you mean 'n_layer'"),
    ("a small.py --n_layer=0", "n_layer=0 must be at least 1"),
    ("../a small.py", "is not 'name"),
    (".. small.py", "is not 'name"),
    ("results.jsonl small.py", "is not 'name"),
    ("a small.py --resume", "is study.py's to say"),
    ("a small.py --causal=False", "cannot be scored, nor taught"),
    ("a small.py --data_dir=nowhere", "no data folder nowhere"),
    ("a small.py nobody --teacher_dtype=int8,int8", "teacher 'nobody' is neither")])
def test_bad_studies_are_one_line(cfg_of, small, in_process, line, message):
    with pytest.raises(SystemExit, match=message) as e:
        study.main(cfg_of(line.replace("small.py", small)))
    assert in_process == [] and "\n" not in str(e.value)


def test_a_run_that_never_trained_may_be_corrected(cfg_of, small, in_process):
    with pytest.raises(SystemExit, match="must be a multiple of micro_batch_size"):
        study.main(cfg_of(f"a {small} --batch_size=7 --micro_batch_size=3"))
    study.main(cfg_of(f"a {small}"))


@pytest.mark.parametrize("row", [
    '{"name": "a"}', "[]", "{",
    '{"name": "a", "recipe": "a", "settings": "x", "data_sha256": "y"}',
    '{"name": "a", "recipe": "a", "settings_sha256": "x", "data_sha256": "y", "val_ce": 1.0}'])
def test_damaged_results_are_one_line(chain, tmp_path, in_process, row):
    (tmp_path / "study").mkdir()
    (tmp_path / "study/results.jsonl").write_text(row + "\n")
    with pytest.raises(SystemExit, match="^error: .*results.jsonl, line 1, is damaged[^\n]*$"):
        study.main(chain())


@pytest.mark.thorough
def test_a_signal_reaches_the_command_alone():
    """Also in its first seconds, where Python would print a traceback on Ctrl-C."""
    code = ("from tools import study; print('ready', flush=True); "
            "study.command('eval_blimp.py', '--ckpt=none')")
    for s in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.readline().startswith("$ eval_blimp.py")
        time.sleep(0.3)
        os.killpg(process.pid, s)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and err.count("\n") == 1
        assert err.startswith("error: eval_blimp.py ended with code -15")


def test_the_command_trains_with_the_scripts_of_the_root(small, data, tmp_path):
    """Started in another folder too."""
    argv = [sys.executable, "-m", "tools.study", f"--runs=a {small}", f"--data_dir={data}", "--out_dir=s"]
    run = subprocess.run(argv, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    assert "\n$ train.py " in run.stdout and "\n| a | 1 |" in run.stdout
