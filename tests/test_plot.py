"""Pictures: what they draw is what the runs' files say, and both files are written."""
import json
import os
import shutil
import xml.etree.ElementTree

import numpy as np
import pytest

import distill
import eval_blimp
from helpers import distill_config, edit_json, records, run_train
from lib.checkpoints import find_checkpoint, read_checkpoint_config
from tools import plot
from tools.plot import PlotConfig

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402


def lines(figure):
    return {line.get_label(): line.get_xydata() for axes in figure.axes for line in axes.lines}


def test_curves_are_the_metrics(teachers):
    figure = Figure()
    plot.curves(figure, teachers[:2], ["a", "b"])
    for run, label in zip(teachers, "ab"):
        rows = [row for row in records(run) if "val_ce" in row]
        assert lines(figure)[label].tolist() == [[row["tokens"], row["val_ce"]] for row in rows]


@pytest.fixture(scope="module")
def scored(corpus, teachers):
    for run in teachers:
        eval_blimp.main(eval_blimp.EvalConfig(ckpt=(run,), data=(f"{corpus}/pairs",), device="cpu"))
    return teachers


def test_phenomena_are_the_scores(scored):
    figure = Figure()
    plot.phenomena(figure, scored, ["a", "b", "c"])
    tasks = json.load(open(f"{scored[1]}/blimp.json"))["folders"]["pairs"]["tasks"]
    assert lines(figure)["b"][:, 1].tolist() == [100 * row["accuracy"] for row in tasks.values()]
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert ticks == [name.replace("_", " ") for name in tasks]


def test_violins_have_a_point_for_each_seed(scored):
    figure = Figure()
    plot.violins(figure, [f"{scored[0]}+{scored[1]}", scored[2]], ["x", "y"])
    assert [axes.get_title() for axes in figure.axes] == ["validation loss, nats per token", "pairs, %"]
    drawn = sorted(y for line in figure.axes[0].lines if line.get_marker() == "o" for y in line.get_ydata())
    assert drawn == sorted(read_checkpoint_config(find_checkpoint(run))["val_ce"] for run in scored)


def test_what_cannot_be_compared_is_not_drawn_together(scored, data, tmp_path):
    """Other pairs, other chunks; distilled models are a series of their own; ensembles have a val.json."""
    shutil.copytree(scored[1], tmp_path / "other")
    result = json.load(open(tmp_path / "other/blimp.json"))
    result["folders"]["pairs"]["sha256"] = "x"
    json.dump(result, open(tmp_path / "other/blimp.json", "w"))
    with pytest.raises(SystemExit, match="other pairs of pairs than"):
        plot.violins(Figure(), [scored[0], str(tmp_path / "other")], ["x", "y"])
    run_train(data, str(tmp_path / "short"), max_iters=2, seq_len=16)
    with pytest.raises(SystemExit, match="short was validated with another tokenizer, seq_len"):
        plot.sizes(Figure(), [scored[1], str(tmp_path / "short")], ["x", "y"])
    distill.main(distill_config(data, tmp_path / "taught", max_iters=2, teachers=(scored[1],)))
    figure = Figure()
    plot.sizes(figure, [scored[1], str(tmp_path / "taught")], ["x", "y"])
    assert ["distilled" in label for label in lines(figure)] == [False, True]
    (tmp_path / "ensemble").mkdir()
    (tmp_path / "ensemble/val.json").write_text('{"val_ce": 1.5}')
    plot.violins(figure := Figure(), [str(tmp_path / "ensemble")], ["x"])
    assert figure.axes[0].lines[0].get_ydata().tolist() == [1.5]


def test_sizes_are_fitted(data, tmp_path):
    runs = []
    for words in (10 ** 6, 10 ** 7, 10 ** 8):
        shutil.copytree(data, tmp_path / f"d{words}")
        edit_json(tmp_path / f"d{words}/meta.json", words={"train": {"x": words}, "val": {}})
        runs.append(str(tmp_path / f"r{words}"))
        run_train(str(tmp_path / f"d{words}"), runs[-1], max_iters=2)
    figure = Figure()
    plot.sizes(figure, runs, ["a", "b", "c"])
    points = next(line.get_xydata() for line in figure.axes[0].lines if line.get_marker() == "o")
    assert points[:, 0].tolist() == [10 ** 6, 10 ** 7, 10 ** 8] and len(figure.axes[0].lines) == 2
    x = np.array([1e6, 3e6, 1e7, 3e7, 1e8])
    assert plot.power_law(x, 2.5 + 300 * x ** -0.4) == pytest.approx((2.5, 300, 0.4), rel=0.05)


def test_both_files_are_written_and_the_same_each_time(scored, tmp_path):
    for name in ("a", "b"):
        plot.main(PlotConfig(curves=tuple(scored), out=str(tmp_path / name)))
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert xml.etree.ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert open(tmp_path / "a.svg").read() == open(tmp_path / "b.svg").read()


@pytest.mark.parametrize("change,message", [
    ({}, "name one picture"), (dict(curves=("x",), sizes=("x",)), "name one picture"),
    (dict(curves=("nowhere",)), "no nowhere/metrics.jsonl"),
    (dict(phenomena=("nowhere",)), "no scores at nowhere"),
    (dict(curves=("a", "b"), labels=("x",)), "1 for 2 runs"), (dict(sizes=("nowhere",)), "no checkpoint at"),
    (dict(curves=("x",), out="no/where"), "in a folder that is not there"),
    (dict(curves=("x",), width=60.0), "width=60.0 must be between 1 and 50 inches")])
def test_mistakes_are_one_line(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as e:
        plot.main(PlotConfig(**change))
    assert "\n" not in str(e.value) and not os.listdir(tmp_path)


def test_scatter_has_each_run_and_its_r_squared(tmp_path):
    base = dict(settings_sha256="", data_sha256="", teachers=[], weights_sha256=[], kind="train.py",
                pairs_sha256={"pairs": "x"}, parameters=1, seed=1, words=9, step=1, test_ce=None,
                ensemble_val_ce=None, git_revision="", hardware="")
    rows = [dict(base, name=f"a@{i}", recipe="a", val_ce=2 + 0.1 * i, accuracy={"pairs": y})
            for i, y in enumerate((0.9, 0.85, 0.83, 0.7))]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = Figure()
    plot.scatter(figure, [str(tmp_path / "results.jsonl")], ["x"])
    x, y = np.array([[row["val_ce"], row["accuracy"]["pairs"]] for row in rows]).T
    assert lines(figure)["a"].tolist() == np.stack([x, 100 * y], 1).tolist()
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    r_squared = 1 - (residual ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert f"R² = {r_squared:.2f}, 4 runs" in figure.axes[0].get_title()
