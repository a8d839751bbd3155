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

import numpy as np
import pytest
from conftest import ROOT, TINY

import config
import study
import sweep
import train
from sweep import SweepConfig

optuna = pytest.importorskip("optuna")


def sweep_config(data, tmp_path, **change):
    (tmp_path / "small.py").write_text("".join(f"{k} = {v!r}\n" for k, v in {**TINY, "max_iters": 0}.items() if k != "learning_rate"))
    return SweepConfig(**{**dict(run=f"{tmp_path}/small.py --data_dir={data}", priors=("learning_rate lognormal -5 1", "schedule choice linear cosine"),
                                 out_dir=str(tmp_path / "sweep"), n_trials=2), **change})


def test_draws_have_the_priors_quantiles():
    """Medians and deviations of 4,000 draws against the log-normal's own; beta = 1 - log-uniform."""
    rng = np.random.default_rng(0)
    rows = [sweep.drawn(SweepConfig(), lambda name: rng.uniform(0.001, 0.999)) for _ in range(4000)]
    for name, mu, sigma in (("learning_rate", -7.3, 0.7), ("weight_decay", 1, 1.5), ("grad_clip", 0, 1), ("adam_eps", -13.8, 3.5)):
        logs = np.log([r[name] for r in rows])
        assert np.median(logs) == pytest.approx(mu, abs=0.1 * sigma) and np.std(logs) == pytest.approx(sigma, rel=0.05)
    for name, low in (("beta1", 0.01), ("beta2", 0.0001)):
        logs = np.log([1 - r[name] for r in rows])
        assert logs.min() >= math.log(low) and np.median(logs) == pytest.approx((math.log(low) + math.log({"beta1": 1, "beta2": 0.01}[name])) / 2, abs=0.2)
    assert {r["schedule"] for r in rows} == {"linear", "cosine"} and all(isinstance(r["epochs"], int) for r in rows)
    assert all(r["batch_size"] % r["micro_batch_size"] == 0 and r["micro_batch_size"] <= 64 for r in rows)
    for r in rows[:50]:
        train.check_loop_config(config.configure(train.TrainConfig, [f"--{k}={v}" for k, v in r.items()]))


def test_trials_are_runs_ranked_and_continued(data, tmp_path, capsys):
    cfg = sweep_config(data, tmp_path)
    sweep.main(cfg)
    rows = [json.loads(line) for line in open(f"{cfg.out_dir}/results.jsonl")]
    assert len(rows) == 2 and rows[0]["val_ce"] <= rows[1]["val_ce"]
    for row in rows:
        assert row["val_ce"] == pytest.approx(min(ce for _, ce in sweep.validations(row["folder"])))
        own = json.load(open(f"{row['folder']}/train_config.json"))
        assert {k: own[k] for k in row["settings"]} == row["settings"]
    best = config.configure(train.TrainConfig, [f"{cfg.out_dir}/best.py"])
    assert best.learning_rate == rows[0]["settings"]["learning_rate"]
    sweep.main(sweep_config(data, tmp_path, n_trials=3))
    assert len(open(f"{cfg.out_dir}/results.jsonl").readlines()) == 3 and "| trial |" in capsys.readouterr().out
    assert {row["seed"] for row in rows} == {train.TrainConfig.seed} and len({row["settings_sha256"] for row in rows}) == 2
    with pytest.raises(SystemExit, match="was begun with other settings"):
        sweep.main(sweep_config(data, tmp_path, run=cfg.run + " --seed=9"))
    with pytest.raises(SystemExit, match="was begun with other priors"):
        sweep.main(sweep_config(data, tmp_path, priors=cfg.priors[:1]))
    with open(tmp_path / "small.py", "a") as f:  # the same words, another run
        f.write("weight_decay = 0.3\n")
    with pytest.raises(SystemExit, match="was begun with other settings"):
        sweep.main(cfg)


def kill(worker, its_run=True):
    run = open(f"/proc/{worker.pid}/task/{worker.pid}/children").read().split()
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    for pid in map(int, run if its_run else ()):
        os.kill(pid, signal.SIGKILL)
    return map(int, run)


@pytest.mark.thorough
def test_a_run_that_outlives_its_worker_is_waited_for(data, tmp_path):
    """Then taken up as it is: not begun beside it, and not lost."""
    cfg = sweep_config(data, tmp_path, n_trials=1, run=sweep_config(data, tmp_path).run + " --epochs=60")
    argv = [sys.executable, f"{ROOT}/sweep.py", f"--run={cfg.run}", f"--priors={','.join(cfg.priors)}", f"--out_dir={cfg.out_dir}", "--n_trials=1"]
    worker = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    while not any(sweep.validations(f"{cfg.out_dir}/{name}") for name in (os.listdir(cfg.out_dir) if os.path.isdir(cfg.out_dir) else ())):
        time.sleep(0.05)
        assert worker.poll() is None
    pid, = kill(worker, its_run=False)
    out = subprocess.run(argv, capture_output=True, text=True)
    if sweep.lives(pid):  # else the machine was slow
        assert out.returncode == 0 and "notice: trial 0 is still running" in out.stdout
    while sweep.lives(pid):
        time.sleep(0.1)
    out = subprocess.run(argv, capture_output=True, text=True)
    row, = map(json.loads, open(f"{cfg.out_dir}/results.jsonl"))
    assert out.returncode == 0 and row["state"] == "complete" and row["epochs"] == 60


@pytest.mark.thorough
def test_a_killed_workers_trial_is_resumed(data, tmp_path):
    cfg = sweep_config(data, tmp_path, n_trials=1, run=sweep_config(data, tmp_path).run + " --epochs=400")
    argv = [sys.executable, f"{ROOT}/sweep.py", f"--run={cfg.run}", f"--priors={','.join(cfg.priors)}", f"--out_dir={cfg.out_dir}", "--n_trials=1"]
    worker = subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True)
    while not any(sweep.validations(f"{cfg.out_dir}/{name}") for name in (os.listdir(cfg.out_dir) if os.path.isdir(cfg.out_dir) else ())):
        time.sleep(0.05)
        assert worker.poll() is None
    kill(worker)
    folder, = (name for name in os.listdir(cfg.out_dir) if os.path.isdir(f"{cfg.out_dir}/{name}"))
    before = len(sweep.validations(f"{cfg.out_dir}/{folder}"))
    time.sleep(0.2)
    worker = subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True)
    while len(sweep.validations(f"{cfg.out_dir}/{folder}")) <= before:
        time.sleep(0.05)
        assert worker.poll() is None
    kill(worker)
    assert [name for name in os.listdir(cfg.out_dir) if os.path.isdir(f"{cfg.out_dir}/{name}")] == [folder]
    assert "notice: resum" in open(f"{cfg.out_dir}/{folder}.log").read() or "no checkpoint yet" in open(f"{cfg.out_dir}/{folder}.log").read()


def test_the_best_loss_counts_also_within_an_epoch(data, tmp_path):
    """Two validations in one epoch are one step to the search; and what a killed worker did not write is written again."""
    cfg = sweep_config(data, tmp_path, n_trials=1, run=sweep_config(data, tmp_path).run + " --max_iters=70")
    sweep.main(cfg)
    for name in ("results.jsonl", "best.py"):
        os.remove(f"{cfg.out_dir}/{name}")
    sweep.main(cfg)
    row, = map(json.loads, open(f"{cfg.out_dir}/results.jsonl"))
    assert row["val_ce"] == min(ce for _, ce in sweep.validations(row["folder"])) and os.path.isfile(f"{cfg.out_dir}/best.py")


def test_trials_that_fail_end_the_sweep(data, tmp_path, monkeypatch, capsys):
    cfg = sweep_config(data, tmp_path, run=sweep_config(data, tmp_path).run + " --batch_size=7 --micro_batch_size=3", n_trials=9)
    with pytest.raises(SystemExit, match="three trials failed one after the other"):
        sweep.main(cfg)
    assert capsys.readouterr().out.count("must be a multiple of micro_batch_size") == 3


def test_a_trial_of_another_machine_is_dead_after_an_hour_of_silence(tmp_path):
    now = datetime.datetime.now()
    for age, folder_age, expected in ((10, None, True), (7200, None, False), (7200, 10, True), (7200, 7000, False)):
        folder = str(tmp_path / f"{age}_{folder_age}")
        if folder_age:
            open(folder + ".log", "w").close()
            os.utime(folder + ".log", (time.time() - folder_age,) * 2)
        trial = types.SimpleNamespace(user_attrs=dict(worker=["elsewhere", 1, 2], folder=folder), datetime_start=now - datetime.timedelta(seconds=age))
        assert sweep.alive(trial) == expected


def test_folders_of_others_and_torn_journals(data, tmp_path):
    cfg = sweep_config(data, tmp_path)
    os.makedirs(cfg.out_dir)
    open(f"{cfg.out_dir}/results.jsonl", "w").write("{}\n")
    with pytest.raises(SystemExit, match="holds a study"):
        sweep.main(cfg)
    os.remove(f"{cfg.out_dir}/results.jsonl")
    open(f"{cfg.out_dir}/journal.log", "w").write('{"op_code": 4, "wor')
    with pytest.raises(SystemExit, match="ends in half a line"):
        sweep.main(cfg)
    with pytest.raises(SystemExit, match="holds a sweep"):
        study.main(study.StudyConfig(runs=(f"a {tmp_path}/small.py",), data_dir=data, out_dir=cfg.out_dir))


def test_a_bad_trial_is_stopped_and_saved(data, tmp_path, monkeypatch):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: True)
    cfg = sweep_config(data, tmp_path, n_trials=1, run=sweep_config(data, tmp_path).run + " --epochs=4000")
    sweep.main(cfg)
    row, = map(json.loads, open(f"{cfg.out_dir}/results.jsonl"))
    assert row["state"] == "pruned" and row["epochs"] < 4000 and os.path.isfile(f"{row['folder']}/last.json") and not os.path.exists(f"{cfg.out_dir}/best.py")


@pytest.mark.parametrize("change,message", [(dict(run=""), "run="), (dict(priors=("learning_rate normal 1 2",)), "is not 'setting lognormal"), (dict(n_trials=0), "n_trials=0"),
                                            (dict(priors=("lerning_rate lognormal 1 2",)), "did you mean 'learning_rate'"), (dict(reduction=1), "reduction=1"),
                                            (dict(run="none.py"), "no config file 'none.py'"), (dict(run="--data_dir=nowhere"), "no data folder nowhere"), (dict(run="--init_from=nowhere"), "no checkpoint at 'nowhere'|no data folder"),
                                            (dict(priors=("out_dir choice a b",)), "'out_dir' is no setting to draw"), (dict(priors=("dropout uniform 0 1",) * 2), "or stands there twice"), (dict(priors=()), "no setting to draw")])
def test_mistakes_are_one_line_and_write_nothing(data, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message) as e:
        sweep.main(sweep_config(data, tmp_path, **change))
    assert "\n" not in str(e.value) and not os.path.exists(tmp_path / "sweep")
