"""The sweep: draws are the priors', trials are runs, the dead are resumed and the bad stopped."""
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass

import numpy as np
import pytest

import train
from helpers import ROOT, TINY, read_jsonl
from lib.configurator import configure
from tools import study, sweep
from tools.sweep import SweepConfig

optuna = pytest.importorskip("optuna")


@pytest.fixture
def cfg_of(data, tmp_path):
    """SweepConfig of two trials, with further flags in its run line."""
    recipe = {key: value for key, value in {**TINY, "max_iters": 0}.items() if key != "learning_rate"}
    (tmp_path / "small.py").write_text("".join(f"{k} = {v!r}\n" for k, v in recipe.items()))

    def cfg_of(flags="", **change):
        settings = dict(
            run=f"{tmp_path}/small.py --data_dir={data} {flags}", out_dir=str(tmp_path / "sweep"), n_trials=2,
            priors=("learning_rate lognormal -5 1", "schedule choice linear cosine"))
        return SweepConfig(**{**settings, **change})
    return cfg_of


def results(cfg):
    return read_jsonl(f"{cfg.out_dir}/results.jsonl")


def test_draws_have_the_priors_quantiles():
    """Medians and deviations of 4,000 draws against the log-normal's own; beta = 1 - log-uniform."""
    rng = np.random.default_rng(0)
    rows = [sweep.drawn(SweepConfig(), lambda name: rng.uniform(0.001, 0.999)) for _ in range(4000)]
    for name, mu, sigma in (("learning_rate", -7.3, 0.7), ("weight_decay", 1, 1.5), ("grad_clip", 0, 1),
                            ("adam_eps", -13.8, 3.5)):
        logs = np.log([r[name] for r in rows])
        assert np.median(logs) == pytest.approx(mu, abs=0.1 * sigma)
        assert np.std(logs) == pytest.approx(sigma, rel=0.05)
    for name, low, high in (("beta1", 0.01, 1), ("beta2", 0.0001, 0.01)):
        logs = np.log([1 - r[name] for r in rows])
        assert logs.min() >= math.log(low)
        assert np.median(logs) == pytest.approx((math.log(low) + math.log(high)) / 2, abs=0.2)
    assert {r["schedule"] for r in rows} == {"linear", "cosine"}
    for r in rows:
        assert isinstance(r["epochs"], int) and r["micro_batch_size"] <= 64
        assert r["batch_size"] % r["micro_batch_size"] == 0
    for r in rows[:50]:
        train.check_loop_config(configure(train.TrainConfig, [f"--{k}={v}" for k, v in r.items()]))


@pytest.mark.thorough
def test_trials_are_runs_ranked_and_continued(cfg_of, tmp_path, capsys):
    cfg = cfg_of()
    sweep.main(cfg)
    rows = results(cfg)
    assert len(rows) == 2 and rows[0]["val_ce"] <= rows[1]["val_ce"]
    for row in rows:
        assert row["val_ce"] == pytest.approx(min(r["val_ce"] for r in sweep.validations(row["folder"])))
        with open(f"{row['folder']}/train_config.json") as f:
            theirs = json.load(f)
        assert {k: theirs[k] for k in row["settings"]} == row["settings"]
    best = configure(train.TrainConfig, [f"{cfg.out_dir}/best.py"])
    assert best.learning_rate == rows[0]["settings"]["learning_rate"] != rows[1]["settings"]["learning_rate"]
    assert {row["seed"] for row in rows} == {train.TrainConfig.seed}
    sweep.main(cfg_of(n_trials=3))
    assert len(results(cfg)) == 3 and "| trial |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was begun with other settings .seed: 42 -> 9.; name another"):
        sweep.main(cfg_of("--seed=9"))
    with pytest.raises(SystemExit, match="was begun with other priors; name another"):
        sweep.main(cfg_of(priors=cfg.priors[:1]))
    with open(tmp_path / "small.py", "a") as f:  # the same words, another run
        f.write("weight_decay = 0.3\n")
    with pytest.raises(SystemExit, match="was begun with other settings .weight_decay: 0.0 -> 0.3."):
        sweep.main(cfg)


@pytest.mark.thorough
def test_new_settings_and_sweeps_of_older_code(cfg_of, monkeypatch, capsys):
    """A tinkerer's own setting at its default invalidates nothing; older code kept a hash: let be."""
    @dataclass
    class Tinkered(train.TrainConfig):
        invented: float = 0.5

    cfg = cfg_of(n_trials=1)
    with monkeypatch.context() as m:
        def remember(sweep_cfg, study, data, *_):
            for key, value in dict(priors=list(cfg.priors), search=["bayesian", 1, 2], data=data,
                                   settings="0" * 64).items():
                study.set_user_attr(key, value)
        m.setattr(sweep, "refuse_another_sweep", remember)
        sweep.main(cfg)
    capsys.readouterr()
    sweep.main(cfg)
    assert "was begun by older code, whose settings are not compared" in capsys.readouterr().out
    monkeypatch.setattr(sweep, "TrainConfig", Tinkered)
    sweep.main(cfg)
    assert "older code" not in capsys.readouterr().out  # from the second time on they are
    with pytest.raises(SystemExit, match="other settings .invented: 0.5 -> 0.7."):
        sweep.main(cfg_of("--invented=0.7", n_trials=1))
    assert len(results(cfg)) == 1


# --- workers that die, trials that fail -----------------------------------------------------------

def start(cfg, **popen):
    """A worker, and when its trial has a first validation."""
    worker = subprocess.Popen(command(cfg), cwd=ROOT, stdout=subprocess.DEVNULL, **popen)
    while not any(sweep.validations(f"{cfg.out_dir}/{name}") for name in folders(cfg)):
        time.sleep(0.05)
        assert worker.poll() is None
    return worker


def command(cfg):
    return [sys.executable, "-m", "tools.sweep", f"--run={cfg.run}", f"--priors={','.join(cfg.priors)}",
            f"--out_dir={cfg.out_dir}", f"--n_trials={cfg.n_trials}"]


def folders(cfg):
    names = os.listdir(cfg.out_dir) if os.path.isdir(cfg.out_dir) else ()
    return [name for name in names if os.path.isdir(f"{cfg.out_dir}/{name}")]


def kill(worker, its_run=True):
    with open(f"/proc/{worker.pid}/task/{worker.pid}/children") as f:
        children = list(map(int, f.read().split()))
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    for pid in children if its_run else ():
        os.kill(pid, signal.SIGKILL)
    return children


@pytest.mark.thorough
def test_a_run_that_outlives_its_worker_is_waited_for(cfg_of):
    """Then taken up as it is: not begun beside it, and not lost."""
    cfg = cfg_of("--epochs=30", n_trials=1)
    pid, = kill(start(cfg), its_run=False)
    out = subprocess.run(command(cfg), cwd=ROOT, capture_output=True, text=True)
    if sweep.lives(pid):  # else the machine was slow
        assert out.returncode == 0 and "notice: trial 0 is still running" in out.stdout
    while sweep.lives(pid):
        time.sleep(0.1)
    out = subprocess.run(command(cfg), cwd=ROOT, capture_output=True, text=True)
    row, = results(cfg)
    assert out.returncode == 0 and row["state"] == "complete" and row["epochs"] == 30


@pytest.mark.thorough
def test_a_killed_workers_trial_is_resumed(cfg_of):
    cfg = cfg_of("--epochs=400", n_trials=1)
    kill(start(cfg, start_new_session=True))
    folder, = folders(cfg)
    before = len(sweep.validations(f"{cfg.out_dir}/{folder}"))
    time.sleep(0.2)
    worker = start(cfg, start_new_session=True)
    while len(sweep.validations(f"{cfg.out_dir}/{folder}")) <= before:
        time.sleep(0.05)
        assert worker.poll() is None
    kill(worker)
    assert folders(cfg) == [folder]
    with open(f"{cfg.out_dir}/{folder}.log") as f:
        log = f.read()
    assert "notice: resum" in log or "no checkpoint yet" in log


@pytest.mark.thorough
def test_the_best_loss_counts_also_within_an_epoch(cfg_of):
    """Two validations in one epoch are one step to the search; and what a killed worker did not write is
    written again."""
    cfg = cfg_of("--max_iters=70", n_trials=1)
    sweep.main(cfg)
    for name in ("results.jsonl", "best.py"):
        os.remove(f"{cfg.out_dir}/{name}")
    sweep.main(cfg)
    row, = results(cfg)
    assert row["val_ce"] == min(r["val_ce"] for r in sweep.validations(row["folder"]))
    assert os.path.isfile(f"{cfg.out_dir}/best.py")


@pytest.mark.thorough
def test_trials_that_fail_end_the_sweep(cfg_of, capsys):
    with pytest.raises(SystemExit, match="three trials failed one after the other"):
        sweep.main(cfg_of("--batch_size=7 --micro_batch_size=3", n_trials=9))
    assert capsys.readouterr().out.count("must be a multiple of micro_batch_size") == 3


@pytest.mark.thorough
def test_a_bad_trial_is_stopped_and_saved(cfg_of, monkeypatch):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: True)
    cfg = cfg_of("--epochs=4000", n_trials=1)
    sweep.main(cfg)
    row, = results(cfg)
    assert row["state"] == "pruned" and row["epochs"] < 4000 and os.path.isfile(f"{row['folder']}/last.json")
    assert not os.path.exists(f"{cfg.out_dir}/best.py")


def test_a_trial_of_another_machine_is_dead_after_an_hour_of_silence(tmp_path):
    now = datetime.datetime.now()
    for age, log_age, alive in ((10, None, True), (7200, None, False), (7200, 10, True), (7200, 7000, False)):
        folder = str(tmp_path / f"{age}_{log_age}")
        if log_age:
            open(folder + ".log", "w").close()
            os.utime(folder + ".log", (time.time() - log_age,) * 2)
        trial = types.SimpleNamespace(user_attrs=dict(worker=["elsewhere", 1, 2], folder=folder),
                                      datetime_start=now - datetime.timedelta(seconds=age))
        assert sweep.alive(trial) == alive


# --- mistakes -------------------------------------------------------------------------------------

def test_folders_of_others_and_torn_journals(cfg_of, data, tmp_path):
    cfg = cfg_of()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/results.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="holds a study"):
        sweep.main(cfg)
    (tmp_path / "sweep/results.jsonl").unlink()
    for text in ("{}\n", "[" * 100_000 + "\n", '{"op_code": 99}\n{"op_code": 99}\n'):
        (tmp_path / "sweep/journal.log").write_text(text)
        with pytest.raises(SystemExit, match="journal.log is damaged"):
            sweep.main(cfg)
    with pytest.raises(SystemExit, match="holds a sweep"):
        study.main(study.StudyConfig(runs=(f"a {tmp_path}/small.py",), data_dir=data, out_dir=cfg.out_dir))


@pytest.mark.parametrize("change,message", [
    (dict(run=""), "run= must be the config files and flags"),
    (dict(n_trials=0), "n_trials=0"),
    (dict(reduction=0), "reduction=0"),
    (dict(priors=("learning_rate normal 1 2",)), "is not 'setting lognormal"),
    (dict(priors=("learning_rate lognormal 1",)), "is not 'setting lognormal"),
    (dict(priors=("schedule choice",)), "or 'setting choice a b"),
    (dict(priors=("lerning_rate lognormal 1 2",)), "did you mean 'learning_rate'"),
    (dict(priors=("out_dir choice a b",)), "'out_dir' is no setting to draw"),
    (dict(priors=("dropout uniform 0 1",) * 2), "or stands there twice"),
    (dict(priors=()), "no setting to draw"),
    (dict(priors=("batch_size choice 8 many",)), "'batch_size' wants int, got 'many'"),
    (dict(priors=("batch_size uniform 0 0.4",)), "'batch_size' wants int, got '0.2'"),
    (dict(blimp=("nowhere",)), "no folder of minimal pairs 'nowhere'"),
    (dict(blimp=("lib", "tests/../lib")), "minimal pairs have the same name"),
    (dict(run="none.py"), "no config file 'none.py'"),
    (dict(run="--data_dir=nowhere"), "no data folder nowhere"),
    (dict(run="--init_from=nowhere"), "no checkpoint at 'nowhere'|no data folder")])
def test_mistakes_are_one_line_and_write_nothing(cfg_of, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message) as e:
        sweep.main(cfg_of(**change))
    assert "\n" not in str(e.value) and not os.path.exists(tmp_path / "sweep")
