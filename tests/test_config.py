"""Settings: typos and wrong types cannot pass; every config in config/ is a model and a recipe, and its
commands run; modules import downwards only."""
import ast
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import distill
import train
from distill import DistillConfig
from eval_blimp import EvalConfig
from helpers import ROOT, TINY, assert_same_log, flags_of, records, run_train, thorough
from lib import configurator, files
from lib.configurator import configure
from model import LanguageModel, check_model_config
from prepare import PrepareConfig
from sample import SampleConfig
from tools import study
from tools.bench import BenchConfig
from tools.compare import CompareConfig
from tools.finetune import FinetuneConfig
from tools.plot import PlotConfig
from tools.study import StudyConfig
from tools.sweep import SweepConfig
from train import TrainConfig, model_config

COUNTS = {  # from the papers' dimensions, counted with another implementation
    "llama_16m": 16_584_960, "llama_58m": 58_343_936, "llama_95m": 95_371_008, "llama_360m": 359_973_888,
    "gpt2_705m": 704_928_768, "gpt2_97m": 97_540_608, "gpt2_10m": 10_480_128, "babyllama": 58_343_936,
    "babyllama2": 345_355_200, "babyllama2_teacher": 345_355_200, "tinyminds_gpt2_705m": 704_928_768,
    "tinyminds_llama_360m": 359_973_888}

CONFIGS = sorted(os.path.relpath(path, ROOT) for path in glob.glob(f"{ROOT}/config/**/*.py", recursive=True)
                 if not path.endswith("__init__.py"))
TEXTS = {path: open(os.path.join(ROOT, path), encoding="utf-8").read() for path in CONFIGS}
STUDIES = [path for path in CONFIGS if "\nruns = " in TEXTS[path]]
RECIPES = [path for path in CONFIGS if "arch = " in TEXTS[path] and not path.startswith("config/demo/")]


def class_of(path):
    """Of the script that a config file is for."""
    if path in STUDIES:
        return StudyConfig
    if path.startswith("config/glue/"):
        return SweepConfig if "\npriors = " in TEXTS[path] else FinetuneConfig
    return DistillConfig if "alpha = " in TEXTS[path] else TrainConfig


def parameters(cfg):
    cfg.vocab_size = cfg.vocab_size or 16000  # the papers'
    with torch.device("meta"):
        return LanguageModel(model_config(cfg)).n_params()


# --- the config files -----------------------------------------------------------------------------

@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_is_accepted_by_its_script(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = configure(class_of(path), [path])
    assert TEXTS[path].startswith("# ")
    if path in STUDIES:
        assert cfg.runs and "vocab_size" not in " ".join((*cfg.runs, *cfg.settings))
    elif class_of(path) is FinetuneConfig:
        assert cfg.tasks
    elif class_of(path) is not SweepConfig:
        assert cfg.seq_len <= cfg.block_size and cfg.batch_size % (cfg.micro_batch_size or 1) == 0
        assert cfg.vocab_size == 0  # the data's


@pytest.mark.parametrize("path", RECIPES)
def test_counts_are_the_papers_and_the_headers(path):
    n = parameters(configure(class_of(path), [os.path.join(ROOT, path)]))
    assert n == COUNTS.get(os.path.basename(path).removesuffix(".py"), n)
    assert set(numbers(path)) <= {n}


def numbers(path):
    """Those of seven digits and more in a config's header."""
    header = "".join(line for line in TEXTS[path].splitlines() if line.startswith("#"))
    return [int(number.replace(",", "")) for number in re.findall(r"\b\d{1,3}(?:,\d{3}){2,}\b", header)]


def test_twins_differ_by_distillation_only():
    paths = [f"{ROOT}/config/{name}.py" for name in ("llama_58m", "babyllama")]
    plain, distilled = (configure(DistillConfig, [path]) for path in paths)
    changed = {k for k in vars(plain) if getattr(plain, k) != getattr(distilled, k)}
    assert changed == {"out_dir", "teachers", "kl_reduction"}


@pytest.mark.parametrize("name,width,layers,heads,epochs,lr,dropout", [  # Teaching Tiny Minds, table 1
    ("tinyminds_gpt2_18m", 320, 2, 4, 6, 7e-4, 0.0), ("tinyminds_gpt2_44m", 768, 2, 8, 6, 7e-4, 0.0),
    ("gpt2_97m", 768, 12, 12, 6, 7e-4, 0.0), ("tinyminds_gpt2_705m", 1536, 24, 16, 4, 2.5e-4, 0.1),
    ("tinyminds_llama_20m", 384, 2, 4, 4, 3e-4, 0.0), ("tinyminds_llama_60m", 768, 2, 8, 4, 3e-4, 0.0),
    ("tinyminds_llama_360m", 1024, 24, 8, 4, 3e-4, 0.0)])
def test_tiny_minds_recipes_are_its_table(name, width, layers, heads, epochs, lr, dropout):
    cfg = configure(TrainConfig, [f"{ROOT}/config/{name}.py"])
    assert (cfg.n_embd, cfg.n_layer, cfg.n_head) == (width, layers, heads)
    assert (cfg.epochs, cfg.learning_rate, cfg.dropout) == (epochs, lr, dropout)
    assert (cfg.batch_size, cfg.warmup_iters, cfg.seq_len) == (128, 300, 128)


@pytest.fixture
def as_if_all_were_there(monkeypatch):
    """Data folders, teachers and pairs that a study names, for planning."""
    def read_meta(data_dir):
        return dict(vocab_size=16000, shards=[dict(split="test", tokens=1 << 40)], name=data_dir)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(study, "read_meta", read_meta)
    monkeypatch.setattr(study, "data_sha256", lambda meta: meta["name"])
    monkeypatch.setattr(study, "weights_sha256", lambda path: path)
    monkeypatch.setattr(os.path, "isdir", lambda path: True)


def planned(cfg):
    plan = []
    for seed in cfg.seeds or ("",):
        for line in cfg.runs:
            plan.append(study.plan_run(cfg, line, seed, {}, plan))
    return plan


@pytest.mark.parametrize("path", STUDIES)
def test_every_study_is_a_plan(path, as_if_all_were_there):
    """Each line a run that its script takes, its model's size as the header says."""
    plan = planned(configure(StudyConfig, [path, "--seeds=1,2"]))
    models = [run for run in plan if run.kind != "ensemble"]
    for run in models:
        fits_the_machine(run.cfg, 1)
    if numbers(path):
        assert set(numbers(path)) == {parameters(run.cfg) for run in models}


def fits_the_machine(cfg, ranks):
    """What train.py would refuse."""
    cfg.vocab_size = cfg.vocab_size or 16000
    check_model_config(cfg)
    train.check_loop_config(cfg)
    assert cfg.seq_len <= cfg.block_size
    assert cfg.batch_size % ((cfg.micro_batch_size or cfg.batch_size // ranks) * ranks) == 0
    if isinstance(cfg, DistillConfig):
        distill.check_distill_config(cfg)


def commands(text):
    """The commands of a header, as lists of words: indented lines, those that end in \\ joined, loops with
    their first value."""
    lines = [line[4:] for line in text.splitlines() if line.startswith("#   ")]
    for line in "\n".join(lines).replace("\\\n", "").splitlines():
        for name, value in re.findall(r"for (\w+) in (\S+)", line):
            line = line.replace(f"${name}", value)
        for part in re.split(r";|&&", re.sub(r"\$\(.*?\)", "a,b", line)):
            words = shlex.split(re.sub(r"^ do\b", "", part), comments=True)
            if words and words[0] not in ("for", "make", "done"):
                yield words


ALL_COMMANDS = [(path, words) for path in CONFIGS for words in commands(TEXTS[path])]
SCRIPTS = {"train.py": TrainConfig, "distill.py": DistillConfig, "prepare.py": PrepareConfig,
           "tools.study": StudyConfig, "tools.finetune": FinetuneConfig, "tools.plot": PlotConfig,
           "tools.compare": CompareConfig, "tools.sweep": SweepConfig}


@pytest.mark.parametrize("path,words", ALL_COMMANDS, ids=[" ".join(words) for _, words in ALL_COMMANDS])
def test_the_headers_commands_run_as_written(path, words, as_if_all_were_there):
    """From the project's root: script and files are there, settings accepted, batches fit the ranks."""
    launcher, *words = words
    ranks = int(words.pop(0).removeprefix("--nproc_per_node=")) if launcher == "torchrun" else 1
    tool = words[0] == "-m"
    script, *args = words[1:] if tool else words
    assert launcher in ("python", "torchrun")
    assert os.path.isfile(script.replace(".", "/") + ".py" if tool else script)
    cfg = configure(SCRIPTS[script], [arg for arg in args if script != "tools.compare" or arg[0] == "-"])
    if script in ("train.py", "distill.py"):
        fits_the_machine(cfg, ranks)
    if script == "tools.study":
        assert path in args
        for run in planned(cfg):
            fits_the_machine(run.cfg, cfg.nproc_per_node or 1)


def test_most_configs_say_how_they_are_run():
    """All but those that `make demo` lays over each other."""
    silent = set(CONFIGS) - {path for path, _ in ALL_COMMANDS}
    assert silent == {f"config/demo/{name}.py" for name in ("demo", "gpt2", "llama", "student")}


@pytest.mark.parametrize("path", RECIPES)
def test_every_recipe_runs_in_small(data, teachers, tmp_path, path):
    """Each model and recipe of config/ as its command runs it, at two narrow layers."""
    text, cls = TEXTS[path], class_of(path)
    heads = dict(n_embd=60, n_head=15, n_kv_head=5) if "n_kv_head" in text else dict(n_embd=32, n_head=2)
    small = dict(data_dir=data, n_layer=2, **heads, intermediate_size=48, block_size=64, seq_len=32, epochs=1,
                 max_iters=3, eval_chunks=8, batch_size=32, micro_batch_size=0, compile="off", device="cpu")
    parts, extra = {"ce"}, {}
    if cls is DistillConfig:
        parts, extra = {"ce", "kl"}, dict(teachers=teachers[:2])
    if "contrastive = " in text:
        parts.add("n_pair")
    if "generator = " in text:
        parts.add("adversarial_kl")
        extra.update(generator=tmp_path / "generator", generator_steps=1)
        argv = [f"{ROOT}/config/electra_56m.py", *flags_of({**small, "out_dir": tmp_path / "generator"})]
        train.main(configure(TrainConfig, argv))
    main = distill.main if cls is DistillConfig else train.main
    main(configure(cls, [f"{ROOT}/{path}", *flags_of({**small, **extra, "out_dir": tmp_path / "run"})]))
    last = records(tmp_path / "run")[-1]
    assert last["step"] == 3 and last["val_ce"] < 6.3 and parts <= last.keys()


# --- settings -------------------------------------------------------------------------------------

def test_order_types_and_lists(tmp_path):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("import math\n_half = 4\nn_layer = _half * 2\nlearning_rate = 1\nteachers = ['x', 'y']\n"
                 "seed = 5\n")
    b.write_text("n_layer = 3\n")
    argv = ["--seed=6", str(a), str(b), "--resume", "--compile=off", "--out_dir=a=b", "--learning_rate=1e-3"]
    cfg = configure(DistillConfig, argv)
    assert (cfg.n_layer, cfg.seed, cfg.resume, cfg.compile) == (3, 6, True, "off")
    assert (cfg.out_dir, cfg.learning_rate, cfg.teachers) == ("a=b", 1e-3, ("x", "y"))
    assert isinstance(configure(DistillConfig, [str(a)]).learning_rate, float)
    assert configure(DistillConfig, ["--teachers=p,q"]).teachers == ("p", "q")
    assert configure(DistillConfig, ["--teachers="]).teachers == ()


def test_non_defaults_are_what_differs_as_json_gives_it():
    cfg = DistillConfig(teachers=("a", "b"), seed=43, alpha=0.5, n_layer=3)
    assert configurator.non_defaults(cfg, ignore=("n_layer",)) == dict(teachers=["a", "b"], seed=43)
    assert configurator.non_defaults(DistillConfig()) == {}


@pytest.mark.parametrize("argument,message", [
    ("--learnign_rate=1", "no setting 'learnign_rate': did you mean 'learning_rate'"),
    ("--xyzzy=1", "no setting 'xyzzy': --help lists this script's"),
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
    ("n_layer = 1 / 0", r"failed: ZeroDivisionError.*c\.py, line 1\)"),
    ("def _half(n):\n    return n / 0\nn_layer = _half(3)", r"ZeroDivisionError.*c\.py, line 2\)"),
    ("import os\n\nwidth = os.listdir('/nowhere')", r"FileNotFoundError.*c\.py, line 3\)"),
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


# --- starting -------------------------------------------------------------------------------------

def launched(monkeypatch, error, raised=SystemExit):
    """What a script ends in whose main calls `error`."""
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(raised) as e:
        configurator.launch(lambda cfg: error(), TrainConfig)
    return str(e.value)


@pytest.mark.parametrize("error,message", [
    (KeyboardInterrupt(), "interrupted; .* --resume"),
    (OSError(28, "No space left on device", "out/x"), "out/x: No space left"),
    (MemoryError(), "out of memory with micro_batch_size=128; try --micro_batch_size=64 .same results"),
    (torch.OutOfMemoryError("x"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory")])
def test_what_the_machine_refuses_is_one_line(monkeypatch, error, message):
    def refuse():
        raise error
    line = launched(monkeypatch, refuse)
    assert re.search(message, line) and "\n" not in line


@pytest.mark.parametrize("cls,settings,line", [
    (TrainConfig, dict(micro_batch_size=32), "micro_batch_size=32; try --micro_batch_size=16 ("),
    (TrainConfig, dict(batch_size=48), "micro_batch_size=48; try --micro_batch_size=24 (same results)"),
    (TrainConfig, dict(batch_size=15, micro_batch_size=5), "micro_batch_size=5; try --micro_batch_size=1 ("),
    (TrainConfig, dict(batch_size=7, micro_batch_size=1), "micro_batch_size=1; try a smaller --loss_chunk ("),
    (DistillConfig, dict(contrastive=0.1, n_pairs=16, batch_size=96),
     "micro_batch_size=96; try --micro_batch_size=48 ("),
    (DistillConfig, dict(contrastive=0.1, n_pairs=32, batch_size=96),
     "micro_batch_size=96; try --micro_batch_size=32 ("),
    (EvalConfig, {}, "batch_tokens=1024; try --batch_tokens=512 (same results)"),
    (FinetuneConfig, {}, "batch_size=64; try --batch_size=32 (other results)"),
    (BenchConfig, {}, "batch_size=16; try --batch_size=8 (other results)"),
    (PrepareConfig, dict(workers=6), "workers=6; try --workers=3 (same results)"),
    (SampleConfig, {}, "out of memory; use a smaller model, or --device=cpu")])
def test_too_little_memory_says_what_to_lower_and_to_what(monkeypatch, cls, settings, line):
    def fill(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(sys, "argv", ["x", *flags_of(settings)])
    with pytest.raises(SystemExit) as e:
        configurator.launch(fill, cls)
    assert line in str(e.value) and "\n" not in str(e.value)


def test_a_run_out_of_memory_goes_on_with_what_it_was_told(data, tmp_path, monkeypatch):
    """Where 4 sequences at a time are too many, following the advice ends in a run with the same losses."""
    real = train.next_token_loss

    def small_card(trainee, batch, **kwargs):
        if len(batch.x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(trainee, batch, **kwargs)
    run_train(data, tmp_path / "whole")
    monkeypatch.setattr(train, "next_token_loss", small_card)
    flags = flags_of({**TINY, "data_dir": data, "out_dir": tmp_path / "r", "overwrite": True})
    advice = ["--micro_batch_size=0"]
    for expected in ("--micro_batch_size=4", "--micro_batch_size=2"):
        monkeypatch.setattr(sys, "argv", ["x", *flags, *advice])
        with pytest.raises(SystemExit) as e:
            configurator.launch(train.main, TrainConfig)
        advice = re.findall(r"try (--\S+)", str(e.value))
        assert advice == [expected]
    monkeypatch.setattr(sys, "argv", ["x", *flags, *advice])
    configurator.launch(train.main, TrainConfig)
    assert_same_log(tmp_path / "whole", tmp_path / "r", ["loss"], abs=1e-5)


def test_a_file_that_fails_is_named_with_the_line_that_wanted_it(monkeypatch):
    """The innermost line of ours, where the error comes from Python's own code beneath it."""
    line = launched(monkeypatch, lambda: files.write_json("/nowhere/x.json", {}))
    assert re.search(r"^error: /nowhere/x.json.tmp: No such file .* \(lib/files.py, line \d+\)$", line)
    line = launched(monkeypatch, lambda: shutil.copy("/nowhere/y", "/nowhere/z"))
    assert re.search(r"^error: /nowhere/y: No such file .* \(tests/test_config.py, line \d+\)$", line)


def test_a_fault_of_the_code_keeps_its_traceback(monkeypatch):
    assert "invalid literal" in launched(monkeypatch, lambda: int("x"), raised=ValueError)


@pytest.mark.parametrize("cls", [TrainConfig, DistillConfig, PrepareConfig, EvalConfig, SampleConfig,
                                 StudyConfig, SweepConfig, FinetuneConfig, BenchConfig, PlotConfig])
def test_help_shows_every_setting_with_its_comment(cls):
    text = configurator.help_text(cls)
    for key in cls.__dataclass_fields__:
        assert re.search(rf"^    {key}: .* = ", text, re.MULTILINE)


def python(*args):
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)


TOOLS = ["-m tools." + name for name in "demo study sweep finetune plot compare bench surprisal".split()]


@pytest.mark.parametrize("script", thorough([TOOLS[0], "distill.py", "train.py", "model.py", "prepare.py",
                                             "eval_blimp.py", "sample.py", *TOOLS[1:]], sample=1))
def test_scripts_answer_help_and_refuse_typos(script):
    good = python(*script.split(), "--help")
    assert good.returncode == 0 and "Settings and defaults" in good.stdout
    bad = python(*script.split(), "--typo=1")
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1 and not bad.stdout
    assert "no setting 'typo'" in bad.stderr


@pytest.mark.slow
def test_model_py_prints_the_count_and_imports_no_script():
    """Also of a config with settings of other scripts."""
    code = ("import runpy, sys; sys.argv = ['model.py', 'config/babyllama.py']; "
            "runpy.run_path('model.py', run_name='__main__'); print(*sys.modules)")
    out = python("-c", code)
    assert out.returncode == 0 and "\n58,343,936 parameters\n" in out.stdout
    imported = out.stdout.splitlines()[-1].split()
    assert "lib.configurator" in imported and not {"distill", "train", "lib.checkpoints"} & set(imported)


# --- what may import what -------------------------------------------------------------------------

MODULES = {path.removesuffix(".py").replace(os.sep, "."): os.path.join(ROOT, path)
           for pattern in ("*.py", "lib/*.py", "tools/*.py")
           for path in sorted(glob.glob(pattern, root_dir=ROOT)) if not path.endswith("__init__.py")}
ALLOWED = {  # a module, or a folder and all in it
    "model": {"lib.configurator"}, "train": {"lib", "model"}, "distill": {"train", "lib", "model"},
    "eval_blimp": {"distill", "train", "lib", "model"}, "sample": {"distill", "train", "lib", "model"},
    "prepare": {"lib"}, "lib": {"lib", "model"}}


def nodes(path, module_level=False):
    """A file's syntax; of the module's level alone without what is in functions."""
    with open(path, encoding="utf-8") as f:
        stack = [ast.parse(f.read())]
    while stack:
        node = stack.pop()
        yield node
        if not module_level or not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            stack.extend(ast.iter_child_nodes(node))


def imports(path, module_level=False):
    """Names of all modules that a file imports, `lib.x` for `from lib import x`."""
    found = set()
    for node in nodes(path, module_level):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module}
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_only(name):
    """tools -> eval_blimp, sample -> distill -> train -> lib -> model; prepare.py stands on lib alone."""
    room = name.split(".")[0]
    ours = imports(MODULES[name]) & MODULES.keys()
    if room != "tools":
        assert not {other for other in ours if not {other, other.split(".")[0]} & ALLOWED[room]}
    has_main = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
                   for node in nodes(MODULES[name]))
    assert has_main == (room != "lib")


def test_no_imports_in_a_circle():
    graph = {name: imports(path, module_level=True) & MODULES.keys() for name, path in MODULES.items()}
    while leaves := [name for name in graph if not graph[name]]:
        graph = {name: others.difference(leaves) for name, others in graph.items() if name not in leaves}
    assert graph == {}


def test_nothing_is_imported_by_a_name_of_the_flat_house():
    """config/ is a folder of files to run: no module may be called so, nor is it a package."""
    flat = {"config", "disk", "chunks", "loss", "runs", "objectives", "teacher_cache", "finetune", "hf",
            "compare", "surprisal", "study", "sweep", "plot", "bench", "demo", "conftest"}
    for path in [*MODULES.values(), *glob.glob(f"{ROOT}/tests/*.py")]:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & flat, path
        assert not [name for name in roots if name.startswith("test_")], f"{path} imports another test file"
