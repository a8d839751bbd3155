"""Pictures: what they draw is what the runs' files say, and both files are written."""
import json
import os
import shutil
import xml.etree.ElementTree

import numpy as np
import pytest

import distill
import eval_blimp
from helpers import distill_config, edit_json, records, reseal, run_train
from lib import glue
from lib.checkpoints import find_checkpoint, read_checkpoint_config, weights_sha256
from lib.files import sha256, write_json
from tools import plot, study
from tools.plot import PlotConfig

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402


def lines(figure):
    return {line.get_label(): line.get_xydata() for axes in figure.axes for line in axes.lines}


def test_curves_are_the_metrics(teachers):
    figure = Figure()
    plot.curves(figure, teachers[:2], ["a", "b"])
    for run, label, norms in zip(teachers, "ab", figure.axes[1].lines):
        rows = [row for row in records(run) if "val_ce" in row]
        assert lines(figure)[label].tolist() == [[row["tokens"], row["val_ce"]] for row in rows]
        steps = [row for row in records(run) if row["step"]]
        assert norms.get_xydata().tolist() == [[row["tokens"], row["grad_norm"]] for row in steps] != []


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


def test_widest_paradigms_are_in_the_place_of_phenomena(scored, tmp_path, monkeypatch):
    """Those of the largest deviation, the largest first, though the data names phenomena; of nine runs, which
    all look different."""
    result = json.load(open(f"{scored[0]}/blimp.json"))
    tasks = result["folders"]["pairs"]["tasks"]
    result["folders"]["pairs"]["phenomena"] = dict(x=dict(accuracy=0.5, se=0.1, n=1))
    chosen = dict(zip(tasks, [0.01, 0.3, 0.02, 0.2, 0.25] + [0.1] * 5))
    for i in range(9):
        for name, deviation in chosen.items():
            tasks[name]["accuracy"] = 0.5 + deviation * (-1) ** i
        json.dump(result, open(tmp_path / f"{i}.json", "w"))
    monkeypatch.setattr(plot, "new_figure", lambda cfg: figure)
    figure, runs = Figure(), tuple(f"{tmp_path}/{i}.json" for i in range(9))
    plot.main(PlotConfig(phenomena=runs, widest=3, labels=tuple("abcdefghi"), out=f"{tmp_path}/plot"))
    names = [name.replace("_", " ") for name in chosen]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == [names[i] for i in (1, 4, 3)]
    assert lines(figure)["b"][:, 1] == pytest.approx([20, 25, 30])
    looks = {(x.get_color(), x.get_linestyle()) for x in figure.axes[0].lines[:9]}
    markers = {(x.get_color(), x.get_marker()) for x in figure.axes[0].lines[:9]}
    assert len(looks) == len(markers) == 9


def write_glue(folder, weights=("w",), texts=("t",), **scores):
    """results.json of tools.finetune: task=(metric, its scores, one a seed)."""
    os.makedirs(folder)
    rows = {task: {str(seed): {"rules": "2024", "settings": {}, "accuracy": 0.125, metric: score,
                               "inputs_sha256": dict(weights=weights, texts=texts)}
                   for seed, score in enumerate(values)} for task, (metric, values) in scores.items()}
    write_json(f"{folder}/results.json", rows)
    return str(folder)


def test_tasks_are_the_means_over_seeds(tmp_path, monkeypatch):
    """In the order of tools.finetune; MSGS in a panel of its own, by its short names."""
    msgs = "main_verb_relative_token_position"
    monkeypatch.setitem(glue.TASKS, msgs, ("{sentence}", "", "mcc"))
    a = write_glue(tmp_path / "a", rte=("accuracy", [0.5, 0.75]), **{msgs: ("mcc", [-0.5])},
                   mrpc=("f1", [0.25]), wsc=("accuracy", [1.0]))
    b = write_glue(tmp_path / "b", mrpc=("f1", [0.75]), rte=("accuracy", [0.25]), **{msgs: ("mcc", [1.0])})
    plot.tasks(figure := Figure(), [a, b], ["a", "b"])
    ticks = [[tick.get_text() for tick in axes.get_xticklabels()] for axes in figure.axes]
    assert ticks == [["mrpc, f1", "rte"], ["MV_RTP, mcc"]]
    drawn = [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert drawn == [[[25, 62.5], [75, 25]], [[-50], [100]]]
    monkeypatch.setattr(plot, "new_figure", lambda cfg: figure)
    figure = Figure()
    plot.main(PlotConfig(tasks=(a, b), accuracy=True, out=f"{tmp_path}/plot"))
    assert figure.axes[0].lines[1].get_ydata().tolist() == [12.5, 12.5 * 2]
    assert figure.axes[0].get_xticklabels()[0].get_text() == "mrpc"


def test_violins_have_a_panel_of_fine_tuned_models(scored, tmp_path, capsys):
    """A point a folder, over the tasks that all have; of the runs they are joined to."""
    tuned = [write_glue(tmp_path / str(i), [weights_sha256(run)], rte=("accuracy", [x, x + 0.25]),
                        mrpc=("f1", [0.75]), **{"wsc": ("accuracy", [0.5])} if i else {})
             for i, (run, x) in enumerate(zip(scored, (0.25, 0.5, 0.75)))]
    column = "+".join([*scored[:2], *tuned[:2]])
    plot.violins(figure := Figure(), [column, f"{scored[2]}+{tuned[2]}"], ["x", "y"])
    assert figure.axes[-1].get_title() == "GLUE 2024, 2 tasks, %"
    points = [line.get_ydata().tolist() for line in figure.axes[-1].lines if line.get_marker() == "o"]
    assert points == [[56.25, 68.75], [81.25]]  # (37.5 + 75) / 2 ...
    plot.violins(figure := Figure(), [column, scored[2]], ["x", "y"])
    assert "GLUE" not in figure.axes[-1].get_title()
    with pytest.raises(SystemExit, match="rte of another model|mrpc of another model"):
        plot.violins(Figure(), [f"{scored[0]}+{tuned[2]}"], ["x"])
    with pytest.raises(SystemExit, match="no loss or score in common"):
        plot.violins(Figure(), [scored[0], tuned[2]], ["x", "y"])


def test_violins_have_a_point_for_each_seed(scored):
    figure = Figure()
    plot.violins(figure, [f"{scored[0]}+{scored[1]}", scored[2]], ["x", "y"])
    assert [axes.get_title() for axes in figure.axes] == ["validation loss, nats\nper token", "pairs, %"]
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
    for picture in (plot.sizes, plot.violins):
        with pytest.raises(SystemExit, match="short was validated with another text, tokenizer, bos, seq"):
            picture(Figure(), [scored[1], str(tmp_path / "short")], ["x", "y"])
    shutil.copytree(data, tmp_path / "data")
    meta = json.load(open(tmp_path / "data/meta.json"))
    val = next(shard for shard in meta["shards"] if shard["split"] == "val")
    tokens = np.fromfile(tmp_path / "data" / val["file"], "<u2")[::-1]
    tokens.tofile(tmp_path / "data" / val["file"])
    val["sha256"] = sha256(str(tmp_path / "data" / val["file"]))
    write_json(str(tmp_path / "data/meta.json"), meta)
    run_train(str(tmp_path / "data"), str(tmp_path / "elsewhere"), max_iters=2)
    with pytest.raises(SystemExit, match="elsewhere was validated with another text"):
        plot.violins(Figure(), [scored[1], str(tmp_path / "elsewhere")], ["x", "y"])
    shutil.copytree(scored[1], tmp_path / "bare")
    folder = find_checkpoint(str(tmp_path / "bare"))
    edit_json(f"{folder}/config.json", bos="none")
    reseal(folder, "config.json")
    with pytest.raises(SystemExit, match="bare was validated with another text, tokenizer, bos"):
        plot.violins(Figure(), [scored[1], str(tmp_path / "bare")], ["x", "y"])
    result = json.load(open(f"{scored[1]}/blimp.json"))
    for name, chunks in (("a", 16), ("b", 8)):
        shutil.copytree(scored[1], tmp_path / name)
        result.update(test_ce=1.0, test_on=dict(eval_chunks=chunks))
        write_json(f"{tmp_path}/{name}/blimp.json", result)
    with pytest.raises(SystemExit, match="the test losses are of other data, seq_len or eval_chunks"):
        plot.violins(Figure(), [str(tmp_path / "a"), str(tmp_path / "b")], ["x", "y"])
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
    (dict(curves=("a", "b"), labels=("x",)), "1 for 2 runs"),
    (dict(scatter=("a",), labels=("x",)), "must be .. with --sizes and --scatter"),
    (dict(sizes=("nowhere",)), "no checkpoint at"),
    (dict(curves=("x",) * 33), "more than 32 cannot be told apart"),
    (dict(curves=("x",), widest=3), "widest=3 must be 0 but with --phenomena"),
    (dict(phenomena=("x",), accuracy=True), "accuracy=True must be False but with --tasks"),
    (dict(tasks=("nowhere",)), "no nowhere/results.json; make it"),
    (dict(curves=("x",), out="no/where"), "in a folder that is not there"),
    (dict(curves=("x",), width=60.0), "width=60.0 must be between 1 and 50 inches")])
def test_mistakes_are_one_line(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as e:
        plot.main(PlotConfig(**change))
    assert "\n" not in str(e.value) and not os.listdir(tmp_path)


def study_rows(path, n, **columns):
    """results.jsonl of a study of n runs, a column a list of values."""
    base = dict(settings_sha256="", data_sha256="", teachers=[], weights_sha256=[], kind="train.py",
                pairs_sha256={"pairs": "x"}, parameters=1, seed=1, words=9, step=1, test_ce=None, recipe="a",
                ensemble_val_ce=None, git_revision="", hardware="")
    rows = [base | dict(name=f"a@{i}", **{key: values[i] for key, values in columns.items()})
            for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def r_squared(x, y):
    x, y = np.array([x, y])
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    return 1 - (residual ** 2).sum() / ((y - y.mean()) ** 2).sum()


def titles(figure):
    return [(axes.get_ylabel(), axes.get_title()) for axes in figure.axes]


def test_scatter_has_each_run_and_its_r_squared(tmp_path):
    """Of scores, and of the loss on the test split where all runs have it."""
    val, scores, test = [2.0, 2.1, 2.2, 2.3], [0.9, 0.85, 0.83, 0.7], [2.1, 2.3, 2.3, 2.6]
    accuracy = [{"pairs": score} for score in scores]
    files = study_rows(tmp_path / "a", 4, val_ce=val, accuracy=accuracy)
    plot.scatter(figure := Figure(), files, ["x"])
    assert lines(figure)["a"] == pytest.approx(np.stack([val, 100 * np.array(scores)], 1))
    assert titles(figure) == [("pairs, %", f"R² = {r_squared(val, scores):.3f}")]
    files = study_rows(tmp_path / "b", 4, val_ce=val, accuracy=accuracy, test_ce=test)
    plot.scatter(figure := Figure(), files, ["x"])
    assert titles(figure) == [("test loss, nats per token", f"R² = {r_squared(val, test):.3f}"),
                              ("pairs, %", f"R² = {r_squared(val, scores):.3f}")]
    assert figure.axes[0].lines[0].get_ydata().tolist() == test


def test_scores_on_other_pairs_stay_out(tmp_path, capsys):
    """Of several studies' rows in one file, a table and a picture have what all were scored on."""
    pairs = [{"both": "x", "other": sha, **less}
             for sha, less in (("y", {"less": "w"}), ("z", {}), ("y", {}))]
    files = study_rows(tmp_path / "a", 3, val_ce=[2.0, 2.1, 2.2], pairs_sha256=pairs,
                       accuracy=[dict.fromkeys(folders, 0.5 + i / 10) for i, folders in enumerate(pairs)])
    plot.scatter(figure := Figure(), files, ["x"])
    assert [ylabel for ylabel, _ in titles(figure)] == ["both, %"]
    study.main(study.StudyConfig(table=files[0], against="a"))
    out = capsys.readouterr().out
    assert "both, % |" in out and "both, points |" in out and "other, %" not in out and "less, %" not in out
    assert "notice: no column for less, other:" in out


def test_a_sweep_that_was_not_scored_is_not_called_damaged(tmp_path):
    """Its user would delete what is good."""
    row = dict(name="trial_0", state="complete", val_ce=2.0, settings={}, data_sha256="")
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match="trial that was not scored; repeat the command .* --blimp"):
        plot.scatter(Figure(), [f"{tmp_path}/results.jsonl"], ["x"])
