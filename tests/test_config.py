"""Settings: typos and wrong types cannot pass; every config in config/ is a model and a recipe."""
import glob
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import config
import distill
import train
from bench import BenchConfig
from study import StudyConfig
from config import configure
from distill import DistillConfig
from eval_blimp import EvalConfig
from model import LanguageModel
from prepare import PrepareConfig
from train import TrainConfig, model_config

COUNTS = {  # from the papers' dimensions, counted with another implementation
    "llama_16m": 16_584_960, "llama_58m": 58_343_936, "llama_95m": 95_371_008, "llama_360m": 359_973_888,
    "gpt2_705m": 704_928_768, "gpt2_97m": 97_540_608, "gpt2_10m": 10_480_128, "babyllama": 58_343_936,
    "reverse_58m": 58_343_936, "reverse_95m": 95_371_008, "reverse_360m": 359_973_888, "babyllama2": 345_355_200, "babyllama2_teacher": 345_355_200}


@pytest.mark.parametrize("path", [p for p in sorted(glob.glob(f"{ROOT}/config/*.py")) if "glue_" not in p], ids=os.path.basename)
def test_every_config_builds_and_counts(path):
    name = os.path.basename(path)[:-3]
    if "\nruns =" in open(path).read():
        assert configure(StudyConfig, [path]).runs
        return
    distilled = "alpha" in open(path).read()
    cfg = configure(DistillConfig if distilled else TrainConfig, [path])
    with torch.device("meta"):
        n = LanguageModel(model_config(cfg)).n_params()
    assert n == COUNTS.get(name, n)
    assert open(path).read().startswith("# ") and cfg.seq_len <= cfg.block_size
    assert cfg.batch_size % (cfg.micro_batch_size or 1) == 0


def test_twins_differ_by_distillation_only():
    plain, distilled = (configure(DistillConfig, [f"{ROOT}/config/{n}.py"]) for n in ("llama_58m", "babyllama"))
    changed = {k for k in vars(plain) if getattr(plain, k) != getattr(distilled, k)}
    assert changed == {"out_dir", "teachers", "kl_reduction"}


def test_model_py_prints_the_count():
    out = subprocess.run([sys.executable, f"{ROOT}/model.py", f"{ROOT}/config/babyllama.py"], capture_output=True, text=True)
    assert "58,343,936 parameters" in out.stdout and out.returncode == 0


def test_order_types_and_lists(tmp_path):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("import math\n_half = 4\nn_layer = _half * 2\nlearning_rate = 1\nteachers = ['x', 'y']\nseed = 5\n")
    b.write_text("n_layer = 3\n")
    cfg = configure(DistillConfig, ["--seed=6", str(a), str(b), "--resume", "--compile=off", "--out_dir=a=b", "--learning_rate=1e-3"])
    assert (cfg.n_layer, cfg.seed, cfg.resume, cfg.compile, cfg.out_dir, cfg.learning_rate) == (3, 6, True, "off", "a=b", 1e-3)
    assert cfg.teachers == ("x", "y") and isinstance(configure(DistillConfig, [str(a)]).learning_rate, float)
    assert configure(DistillConfig, ["--teachers=p,q"]).teachers == ("p", "q") and configure(DistillConfig, ["--teachers="]).teachers == ()


@pytest.mark.parametrize("argument,message", [
    ("--learnign_rate=1", "no setting 'learnign_rate': did you mean 'learning_rate'"),
    ("--xyzzy=1", "no setting 'xyzzy': it belongs to another script"),
    ("--n_layer=two", "'n_layer' wants int, got 'two'"),
    ("--n_layer=2.5", "'n_layer' wants int"),
    ("--n_layer", "'n_layer' wants int, got True"),
    ("--random_offset=no", "'random_offset' wants True or False, got 'no'"),
    ("--learning_rate=-1", "wants a finite number, 0 or more"),
    ("--learning_rate=nan", "wants a finite number"),
    ("--arch=bert", "'arch' wants one of llama, gpt2, got 'bert'"),
    ("-n", "'-n' is not a setting; write --key=value"),
    ("missing.py", "no config file 'missing.py'"),
    ("n_layer=3", "no config file 'n_layer=3' \\(a setting is written --key=value"),
])
def test_bad_arguments_are_one_line(argument, message):
    with pytest.raises(SystemExit, match=message) as e:
        configure(DistillConfig, [argument])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text,message", [
    ("learnign_rate = 1", "no setting 'learnign_rate': did you mean 'learning_rate'"),
    ("n_layer = '3'", "'n_layer' wants int, got '3'"),
    ("n_layer = True", "'n_layer' wants int, got True"),
    ("random_offset = 1", "'random_offset' wants True or False, got 1"),
    ("teachers = 'a'", "'teachers' wants a list of strings"),
    ("out_dir = None", "'out_dir' wants text, got None"),
    ("def helper(): pass", "no setting 'helper'"),
    ("n_layer = ", "line 1: invalid syntax"),
    ("n_layer = 1 / 0", "failed: ZeroDivisionError"),
    ("raise ValueError('two\\nlines')", "failed: ValueError: two lines"),
    ("exit(0)", "failed: SystemExit"),
    ("n_layer = 10 ** 400", "'n_layer' wants a finite number"),
    ("learning_rate = 10 ** 400", "'learning_rate' wants float"),
])
def test_bad_config_files_are_one_line(tmp_path, text, message):
    path = tmp_path / "c.py"
    path.write_text(text + "\n")
    with pytest.raises(SystemExit, match=message) as e:
        configure(DistillConfig, [str(path)])
    assert str(path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("error,message", [
    (KeyboardInterrupt(), "interrupted; .* --resume"), (OSError(28, "No space left on device", "out/x"), "out/x: No space left"),
    (MemoryError(), "out of memory; set a smaller --micro_batch_size"), (torch.OutOfMemoryError("x"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory")])
def test_what_the_machine_refuses_is_one_line(monkeypatch, error, message):
    def main(cfg):
        raise error
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit, match=message) as e:
        config.run(main, TrainConfig)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("cls", [TrainConfig, DistillConfig, PrepareConfig, EvalConfig, StudyConfig, BenchConfig])
def test_help_shows_every_setting_with_its_comment(cls):
    text = config.help_text(cls)
    for key in cls.__dataclass_fields__:
        assert re.search(rf"^    {key}: .* = ", text, re.MULTILINE)


@pytest.mark.parametrize("script", ["prepare", "train", "distill", "eval_blimp", "sample", "demo", "model"])
def test_scripts_answer_help_and_refuse_typos(script):
    good = subprocess.run([sys.executable, f"{ROOT}/{script}.py", "--help"], capture_output=True, text=True)
    assert good.returncode == 0 and "Settings and defaults" in good.stdout
    bad = subprocess.run([sys.executable, f"{ROOT}/{script}.py", "--typo=1"], capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1 and "no setting 'typo'" in bad.stderr and not bad.stdout


RECIPES = [p for p in sorted(glob.glob(f"{ROOT}/config/*.py")) if "arch = " in open(p).read()]


@pytest.mark.parametrize("path", RECIPES, ids=os.path.basename)
def test_every_recipe_runs_in_small(data, teachers, tmp_path, path):
    """Each model and recipe of config/ as its command runs it, at two narrow layers."""
    text = open(path).read()
    cls, main = (DistillConfig, distill.main) if "alpha = " in text else (TrainConfig, train.main)
    kv = 5 if "n_kv_head" in text else 0  # BabyLlama-2's 15 heads share 5
    small = dict(data_dir=data, out_dir=tmp_path / "r", vocab_size=500, n_layer=2, n_embd=60 if kv else 32, n_head=15 if kv else 2, n_kv_head=kv,
                 intermediate_size=48, block_size=64, seq_len=32, epochs=1, max_iters=3, eval_chunks=8, batch_size=32, micro_batch_size=0, compile="off", device="cpu")
    if cls is DistillConfig:
        small["teachers"] = ",".join(teachers[:2])
    if "generator = " in text:
        train.main(configure(TrainConfig, [f"{ROOT}/config/electra_56m.py", *(f"--{k}={v}" for k, v in {**small, "out_dir": tmp_path / "g"}.items() if k != "teachers")]))
        small |= dict(generator=tmp_path / "g", generator_steps=1)
    main(configure(cls, [path, *(f"--{k}={v}" for k, v in small.items())]))
    log = [json.loads(line) for line in open(tmp_path / "r" / "metrics.jsonl")]
    assert log[-1]["step"] == 3 and log[-1]["val_ce"] < 6.3
    parts = {"ce"} | ({"kl"} if cls is DistillConfig else set()) | ({"n_pair"} if "contrastive = " in text else set()) | ({"adversarial_kl"} if "generator = " in text else set())
    assert parts <= log[-1].keys()


def test_the_readme_lists_every_script_and_its_size():
    """Each top-level file has a row, its lines counted to a tenth; every promise names a test that exists."""
    readme = open(f"{ROOT}/README.md", encoding="utf-8").read()
    rows = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme, re.M))
    files = {name: sum(1 for _ in open(f"{ROOT}/{name}", encoding="utf-8")) for name in os.listdir(ROOT) if name.endswith(".py")}
    assert rows.keys() == files.keys()
    assert all(abs(int(rows[name]) - lines) <= 0.1 * lines for name, lines in files.items())
    assert f"| {len(glob.glob(f'{ROOT}/config/*.py'))} files |" in readme
    tests = "".join(open(path, encoding="utf-8").read() for path in glob.glob(f"{ROOT}/tests/test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", readme))
    assert len(named) > 20 and not [name for name in named if f"def {name}(" not in tests]
