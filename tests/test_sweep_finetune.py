"""The sweep over fine-tuning: the published priors task by task, the pipeline's score, best lines that repeat
it; and the models of a sweep scored as a study's."""
import json
import os
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import transformers

import eval_blimp
import prepare
import train
from helpers import ROOT, TINY, VOCAB, read_jsonl, write_pairs, write_task
from lib.configurator import configure
from tools import finetune, plot, study, sweep
from tools.finetune import FinetuneConfig
from tools.sweep import SweepConfig

optuna = pytest.importorskip("optuna")

# as they were published; mu and sigma of the rate's and of the warm-up's logarithm, the most epochs
PUBLISHED = {"cola": (-9.9, 1, 5.7, 10, "mcc"), "rte": (-9.9, 1, 5.7, 10, "accuracy"),
             "mrpc": (-9.9, 1, 5.7, 10, "f1"), "sst2": (-10.5, 1.5, 5.7, 10, "accuracy"),
             "qnli": (-10.5, 1.5, 6, 10, "accuracy"), "boolq": (-9, 1.5, 6, 10, "accuracy"),
             "multirc": (-9, 1.5, 6, 10, "accuracy"), "wsc": (-14.5, 1, 5.7, 32, "accuracy"),
             "mnli": (-11, 1, 500, 1, "accuracy"), "qqp": (-11, 1, 500, 1, "f1")}
PRIORS = ("learning_rate loguniform 0.001 0.02", "batch_size choice 8 16", "epochs int-loguniform 2 4",
          "schedule choice constant linear", "warmup_iters int-lognormal 1 1", "mrpc epochs choice 1")


class InProcess:
    """A child process without the seconds that it takes to start."""
    pid, returncode = os.getpid(), 0

    def __init__(self, argv, **_):
        script, args = (argv[2], argv[3:]) if argv[1] == "-m" else (os.path.basename(argv[1]), argv[2:])
        main, cls = {"tools.finetune": (finetune.main, FinetuneConfig),
                     "train.py": (train.main, train.TrainConfig)}[script]
        main(configure(cls, args))

    def poll(self):
        return 0


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(sweep, "subprocess", types.SimpleNamespace(Popen=InProcess))


@pytest.fixture
def cfg_of(teachers, tmp_path):
    """SweepConfig of two tasks, with further flags in its run line."""
    for task in ("rte", "mrpc"):
        write_task(tmp_path / "glue", task, noise=0.4)

    def cfg_of(flags="--tasks=rte,mrpc", **change):
        run = (f"--ckpt={teachers[1]} --data={tmp_path}/glue --device=cpu --max_length=32 --patience=0 "
               f"--log_interval=1 {flags}")
        return SweepConfig(**{"run": run, "priors": PRIORS, "n_trials": 3,
                              "out_dir": str(tmp_path / "sweep"), **change})
    return cfg_of


# --- what is drawn --------------------------------------------------------------------------------

def test_each_task_has_its_published_priors():
    base = f"{ROOT}/config/glue/babyllama2.py --ckpt=x --tasks={','.join(PUBLISHED)}"
    cfg = configure(SweepConfig, [f"{ROOT}/config/glue/sweep.py", f"--run={base}"])
    rng = np.random.default_rng(0)
    for one, (task, (mu, sigma, warmup, most, metric)) in zip(sweep.by_task(cfg), PUBLISHED.items()):
        rows = [sweep.drawn(one, lambda name: rng.uniform(0.001, 0.999)) for _ in range(1500)]
        logs = np.log([row["learning_rate"] for row in rows])
        assert np.median(logs) == pytest.approx(mu, abs=0.15 * sigma)
        assert np.std(logs) == pytest.approx(sigma, rel=0.07)
        assert np.median(np.log([row["weight_decay"] for row in rows])) == pytest.approx(0, abs=0.2)
        if task in ("mnli", "qqp"):
            fixed = {(int(row["epochs"]), row["schedule"], int(row["warmup_iters"])) for row in rows}
            assert fixed == {(1, "linear", 500)} and {int(row["batch_size"]) for row in rows} == {1, 32}
        else:
            for key, high in (("epochs", most), ("batch_size", 32)):
                values = np.array([row[key] for row in rows])
                assert values.min() == 1 and values.max() == high and values.dtype.kind == "i"
                assert np.mean(values <= high ** 0.5) == pytest.approx(0.5, abs=0.12)  # in logarithms
            assert {row["schedule"] for row in rows} == {"linear", "cosine", "constant"}
            assert {row["warmup_iters"] for row in rows if row["schedule"] == "constant"} == {0}
            steps = [row["warmup_iters"] for row in rows if row["schedule"] != "constant"]
            assert np.median(np.log(steps)) == pytest.approx(warmup, abs=0.12)
        run_cfg = sweep.resolve(one, rows[0], "f")  # what the trial's command line comes to
        assert {key: getattr(run_cfg, key) for key in rows[0]} == {
            key: type(getattr(run_cfg, key))(value) for key, value in rows[0].items()}
        assert (run_cfg.seed, run_cfg.dtype, run_cfg.patience) == (12, "bfloat16", 0)
        assert (one.reduction == 1) == (task in ("mnli", "qqp"))
        assert (sweep.goal_of(one).score, sweep.goal_of(one).direction) == (metric, "maximize")


def test_a_constant_schedule_has_no_warm_up_as_hugging_faces():
    """SST-2 in table 4 has 200 steps of it on paper."""
    cfg = configure(FinetuneConfig, [f"{ROOT}/config/glue/babyllama2.py", "--ckpt=x"])
    sst2 = finetune.task_config(cfg, "sst2", "12")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-6)
    theirs = transformers.get_scheduler("constant", optimizer, num_warmup_steps=200, num_training_steps=900)
    assert [train.learning_rate(sst2, step, 900) for step in (0, 199, 500)] == theirs.get_last_lr() * 3


# --- a sweep --------------------------------------------------------------------------------------

def test_every_task_is_searched_and_its_best_line_repeats_the_score(cfg_of, in_process, tmp_path, capsys):
    cfg = cfg_of()
    sweep.main(cfg)
    lines = []
    for task, metric in (("rte", "accuracy"), ("mrpc", "f1")):
        rows = read_jsonl(f"{cfg.out_dir}/{task}/results.jsonl")
        assert len(rows) == 3 and rows[0][metric] == max(row[metric] for row in rows)
        for row in rows:
            with open(f"{row['folder']}/results.json") as f:  # finetune.py's own
                theirs = json.load(f)[task]["12"]
            assert row[metric] == theirs[metric] and row["seed"] == 12
            assert theirs["settings"]["learning_rate"] == row["settings"]["learning_rate"]
            assert row["settings"]["epochs"] == "1" if task == "mrpc" else 2 <= row["settings"]["epochs"] <= 4
        words = [task, *(f"--{key}={value}" for key, value in rows[0]["settings"].items())]
        lines.append(" ".join(words))
    argv = [*cfg.run.split(), f"{cfg.out_dir}/best.py", f"--out_dir={tmp_path}/again"]
    again = configure(FinetuneConfig, argv)
    assert list(again.per_task) == lines
    finetune.main(again)
    with open(tmp_path / "again/results.json") as f:
        found = json.load(f)
    for task, metric in (("rte", "accuracy"), ("mrpc", "f1")):
        best, *_ = read_jsonl(f"{cfg.out_dir}/{task}/results.jsonl")
        assert found[task]["12"][metric] == best[metric]
    assert "| trial | mrpc's f1 | epochs run |" in capsys.readouterr().out
    # the same command goes on with what is missing, and with nothing else
    sweep.main(cfg_of("--tasks=rte", n_trials=4))
    assert len(read_jsonl(f"{cfg.out_dir}/rte/results.jsonl")) == 4
    for flags, change, named in (("--max_length=16", {}, "settings .max_length: 32 -> 16"),
                                 ("", dict(priors=PRIORS[:3]), "priors"),
                                 (f"--data={write_task(tmp_path / 'more', noise=0.1)}", {}, "data")):
        with pytest.raises(SystemExit, match=f"begun with other {named}"):
            sweep.main(cfg_of(f"--tasks=rte {flags}", **change))


class Written:
    """A run that has written these validations, and goes on until it is told to stop."""
    pid, returncode = os.getpid(), 0

    def __init__(self, folder, rows):
        os.makedirs(folder)
        with open(f"{folder}/metrics.jsonl", "w") as f:
            for epoch, (f1, accuracy) in enumerate(rows, 1):
                row = dict(step=9 * epoch, epoch=float(epoch), f1=f1, accuracy=accuracy)
                row.update(val_loss=1 - f1, val_ce=1.0)
                f.write(json.dumps(row) + "\n")
        self.stopped, self.polls = False, 0

    def poll(self):
        self.polls += 1
        return 0 if self.stopped or self.polls > 3 else None

    def terminate(self):
        self.stopped = True


@pytest.fixture
def trial_of(cfg_of, monkeypatch):
    """What run_trial says of a run of `epochs` that has these validations."""
    def trial_of(rows, epochs, flags=""):
        cfg, = sweep.by_task(cfg_of(f"--tasks=rte {flags}", priors=("learning_rate uniform 0 1",)))
        os.makedirs(cfg.out_dir, exist_ok=True)
        settings = dict(learning_rate=0.01, epochs=epochs)
        monkeypatch.setattr(sweep, "subprocess", types.SimpleNamespace(
            Popen=lambda argv, **_: Written(f"{argv[-2].removeprefix('--out_dir=')}/rte_12", rows)))
        trial = optuna.create_study(direction="maximize").ask()
        return sweep.run_trial(cfg, trial, settings)[:2]
    return trial_of


def test_the_score_is_that_of_the_epoch_of_best_f1(trial_of):
    """Not the best accuracy, nor the last; of two equal ones the first's."""
    assert trial_of([(0.1, 0.9), (0.7, 0.6), (0.7, 0.65), (0.2, 0.8)], epochs=4) == ("COMPLETE", 0.6)


def test_a_trial_that_is_at_its_end_is_not_stopped(trial_of, monkeypatch):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: True)
    assert trial_of([(0.1, 0.9)], epochs=1) == ("COMPLETE", 0.9)
    assert trial_of([(0.1, 0.9)], epochs=2) == ("PRUNED", None)
    assert trial_of([(0.1, 0.9)], epochs=3, flags="--max_iters=9") == ("COMPLETE", 0.9)


def command(cfg):
    return [sys.executable, "-m", "tools.sweep", f"--run={cfg.run}", f"--priors={','.join(cfg.priors)}",
            f"--out_dir={cfg.out_dir}", f"--n_trials={cfg.n_trials}"]


@pytest.mark.thorough
def test_a_killed_workers_trial_is_begun_anew(cfg_of):
    """By the same command, with the same settings; finetune.py keeps nothing of a task that is not done."""
    cfg = cfg_of("--tasks=rte", n_trials=1, priors=("learning_rate uniform 0.001 0.002",
                                                    "epochs choice 100"))
    worker = subprocess.Popen(command(cfg), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    out = f"{cfg.out_dir}/rte"

    def trained():
        return [n for n in (os.listdir(out) if os.path.isdir(out) else ()) if os.path.isdir(f"{out}/{n}")]
    while not any(sweep.validations(f"{out}/{name}/rte_12") for name in trained()):
        time.sleep(0.05)
        assert worker.poll() is None
    with open(f"/proc/{worker.pid}/task/{worker.pid}/children") as f:
        children = list(map(int, f.read().split()))
    for pid in (worker.pid, *children):
        os.kill(pid, 9)
    worker.wait()
    begun = trained()
    done = subprocess.run(command(cfg), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    row, = read_jsonl(f"{out}/results.jsonl")
    assert trained() == begun == [os.path.basename(row["folder"])] and row["epochs"] == 100
    assert os.path.isfile(f"{cfg.out_dir}/best.py")


# --- the models of a sweep, scored ----------------------------------------------------------------

def test_a_sweeps_models_are_scored_as_a_studys(corpus, in_process, monkeypatch, tmp_path):
    """On pairs and on the test split, once; tools/plot.py reads the rows."""
    ran = []

    def score_here(script, *args, **_):
        ran.append(script)
        eval_blimp.main(configure(eval_blimp.EvalConfig, [*args, "--device=cpu"]))
    monkeypatch.setattr(study, "command", score_here)
    data = str(tmp_path / "data")
    prepare.main(prepare.PrepareConfig(input_dir=f"{corpus}/text", data_dir=data, vocab_size=VOCAB,
                                       bos="line", val_fraction=0.3))
    write_pairs(tmp_path / "pairs", "t", [("the dog runs.", "the dog run."), ("a cat sees.", "cat a see.")])
    recipe = {**TINY, "max_iters": 20, "data_dir": data}
    (tmp_path / "small.py").write_text("".join(f"{k} = {v!r}\n" for k, v in recipe.items()))
    cfg = SweepConfig(run=f"{tmp_path}/small.py", priors=("learning_rate loguniform 0.0001 0.05",),
                      n_trials=3, out_dir=str(tmp_path / "sweep"))
    sweep.main(cfg)
    assert not ran
    cfg.blimp, cfg.test_loss = (str(tmp_path / "pairs"),), True
    sweep.main(cfg)
    assert len(ran) == 3
    rows = study.result_rows(f"{cfg.out_dir}/results.jsonl")  # exits at a row that is not a study's
    for row in rows:
        alone = str(tmp_path / "alone.json")
        eval_blimp.main(eval_blimp.EvalConfig(
            ckpt=(row["folder"],), data=cfg.blimp, data_dir=data, split="test", device="cpu", out=alone,
            seq_len=TINY["seq_len"], eval_chunks=TINY["eval_chunks"]))
        with open(alone) as f:
            scores = json.load(f)
        assert row["test_ce"] == pytest.approx(scores["test_ce"], abs=1e-6)
        assert row["accuracy"] == {"pairs": scores["folders"]["pairs"]["accuracy"]}
        assert row["val_ce"] == min(line["val_ce"] for line in sweep.validations(row["folder"]))
    assert len({row["test_ce"] for row in rows}) == 3
    before = (tmp_path / "sweep/results.jsonl").read_bytes()
    sweep.main(cfg)  # nothing again
    assert len(ran) == 3 and (tmp_path / "sweep/results.jsonl").read_bytes() == before
    figure = pytest.importorskip("matplotlib.figure").Figure()
    plot.scatter(figure, [f"{cfg.out_dir}/results.jsonl"], ["sweep"])
    heights = [line.get_ydata().tolist() for axes in figure.axes for line in axes.lines]
    assert [100 * row["accuracy"]["pairs"] for row in rows] in heights


# --- mistakes -------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags,change,message", [
    ("--tasks=rte", dict(priors=sweep.PRIORS), "must be others with --tasks: see config/glue/sweep.py"),
    ("--tasks=rte --seeds=1,2", {}, "must be one alone in a sweep"),
    ("--tasks=rtx", {}, "no task 'rtx' in 2024"),
    ("--tasks=rte,wsc", {}, "no wsc.train.jsonl"),
    ("--tasks=rte --ckpt=nowhere", {}, "no checkpoint at 'nowhere'"),
    ("--tasks=rte", dict(blimp=("x",)), "no model is kept"),
    ("--tasks=rte", dict(priors=("rte lerning_rate uniform 0 1",)), "did you mean 'learning_rate'"),
    ("--tasks=rte", dict(priors=("rte batch_size choice 8",) * 2), "stands there twice"),
    ("--tasks=rte", dict(priors=("mrpc batch_size choice 8",)), "'' is no setting to draw"),
    ("--tasks=rte", dict(priors=("seeds choice 8",)), "seeds cannot be set for one task"),
    ("--tasks=rte", dict(priors=("rte epochs int-uniform 1 3",)), "is not 'setting lognormal.int-lognormal"),
    ("--tasks=rte --max_length=500", {}, "at most the model's block_size=64"),
    ("--tasks=rte --resume", {}, "resume=True must be False")])
def test_mistakes_are_one_line_and_write_nothing(cfg_of, tmp_path, flags, change, message):
    with pytest.raises(SystemExit, match=message) as e:
        sweep.main(cfg_of(flags, **change))
    assert "\n" not in str(e.value) and not os.path.exists(tmp_path / "sweep")


def test_a_batch_size_may_be_one_of_several():
    settings = sweep.drawn(SweepConfig(priors=("batch_size choice 96 192",)), lambda name: 0.9)
    assert settings == dict(batch_size="192", micro_batch_size=64)
