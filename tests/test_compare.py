"""Comparison of scored runs: statistics against brute force, and what the table says."""
import itertools
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import eval_blimp
from eval_blimp import EvalConfig
from helpers import ROOT, edit_json, write_pairs
from lib.checkpoints import find_checkpoint, weights_sha256
from lib.files import read_json, write_json
from lib.rules import RULES
from lib.scoring import Candidate
from lib.tasks import Item
from tools import compare, finetune


@pytest.mark.parametrize("differences", [
    [0.1, -0.2, 0.3, 0.05], [0.1, 0.1, -0.1, 0.2, 0.0, 0.3, -0.2], [1, 2, 3, 4, 5, 6, 7, 8, 9, -10],
    [0.0, 0.0], [0.5]])
def test_wilcoxon_is_the_share_of_sign_choices_as_extreme(differences):
    d = np.array([x for x in differences if x])
    in_order = sorted(abs(d))
    ranks = np.array([np.mean([i + 1 for i, y in enumerate(in_order) if y == abs(x)]) for x in d])
    choices = itertools.product((1, -1), repeat=len(d))
    sums = np.array([ranks[np.array(signs) > 0].sum() for signs in choices]) if len(d) else np.zeros(1)
    seen = ranks[d > 0].sum()
    expected = min(1, 2 * min((sums <= seen).mean(), (sums >= seen).mean()))
    assert compare.wilcoxon(differences) == pytest.approx(expected)


def test_bootstrap_is_that_of_drawing_pairs():
    rng = np.random.default_rng(3)
    a = [rng.integers(0, 2, (2, n)) for n in (300, 50)]
    b = [(rng.random((1, n)) < 0.3).astype(int) for n in (300, 50)]
    means = []
    for _ in range(4000):
        draws = [rng.integers(0, x.shape[1], x.shape[1]) for x in a]
        means.append(np.mean([x[:, i].mean() - y[:, i].mean() for x, y, i in zip(a, b, draws)]))
    assert compare.paired_bootstrap(a, b) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    assert compare.paired_bootstrap(a, a) == pytest.approx([0, 0])  # the same answers: no uncertainty


def test_the_table(corpus, teachers, tmp_path, capsys):
    for path in teachers:
        eval_blimp.main(EvalConfig(ckpt=(path,), data=(f"{corpus}/pairs",), device="cpu"))
    capsys.readouterr()
    compare.main([teachers[0], f"{teachers[1]}+{teachers[2]}"])
    out = capsys.readouterr().out
    scores = [read_json(os.path.join(path, "blimp.json"))["folders"]["pairs"] for path in teachers]
    one, *two = [100 * row["accuracy"] for row in scores]
    means = f"| {one:.2f} | {np.mean(two):.2f} ± {np.std(two, ddof=1):.2f} |"
    assert means in out.split("mean of 10 tasks")[1]
    assert f"gpt2 - llama and 1 more: {one - np.mean(two):+.2f} points" in out
    for task, row in scores[0]["tasks"].items():
        assert f"| {task} | {100 * row['accuracy']:.2f} |" in out and len(row["right"]) == row["n"]
    assert "notice" not in out
    shutil.copytree(teachers[0], run := tmp_path / "run")
    edit_json(run / "blimp.json", step=1)
    compare.main([str(run), teachers[1]])
    out = capsys.readouterr().out
    assert "notice" not in out  # the weights count, which two runs of a step may have otherwise
    edit_json(run / "blimp.json", weights_sha256="x")
    compare.main([str(run), teachers[1]])
    out = capsys.readouterr().out
    assert f"the scores of {run} by the rules of 2024 are of other weights than it has now (step 1)" in out


def test_one_of_k_best_is_a_kth_of_a_point():
    (points,) = compare.right([{"tasks": {"t": {"right": "0124"}}}, {"tasks": {"t": {"right": "1050"}}}],
                              "2024")
    assert points.tolist() == [[0, 1, 1 / 2, 1 / 4], [1, 0, 1 / 5, 0]]


def unscored(run, folder):
    return str(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("blimp*.json")))


def score(run, folder, rules):
    eval_blimp.main(EvalConfig(ckpt=(run,), data=(str(folder),), rules=rules, device="cpu"))


def test_a_difference_by_the_rules_of_2023_is_that_of_the_means_over_phenomena(tmp_path, capsys):
    """Where a phenomenon's tasks are not of one size it is not that of the means over tasks."""
    candidates = (Candidate((1, 5), 1), Candidate((1, 6), 1))
    items = [Item(task, task, line, candidates, "", ("a", "b"), phenomenon=term)
             for task, term, n in (("small", "x", 2), ("large", "x", 18), ("other", "y", 10))
             for line in range(n)]

    def column(name, right):
        scores = [[1, 0] if item.line < right[item.task] else [0, 1] for item in items]
        folder = eval_blimp.summary(items, scores, RULES["2023"])
        write_json(f"{tmp_path}/{name}.json", dict(rules="2023", folders={"blimp": folder}))
        mean = ((right["small"] + right["large"]) / 20 + right["other"] / 10) / 2
        return f"{tmp_path}/{name}.json", 100 * mean
    (a, mean_a), (b, mean_b) = (column("a", dict(small=2, large=6, other=5)),
                                column("b", dict(small=0, large=10, other=5)))
    compare.main([a, b])
    out = capsys.readouterr().out
    assert f"| **mean of 2 phenomena** | {mean_a:.2f} | {mean_b:.2f} |" in out
    assert f"{mean_a - mean_b:+.2f} points" in out and "over 2 phenomena" in out
    compare.main([a])
    assert "blimp, mean of 2 phenomena | 2023" in capsys.readouterr().out
    items = [item._replace(phenomenon="") if item.task == "other" else item for item in items]
    mean_a = 100 * (8 / 20 + 5 / 10) / 2  # a task without a phenomenon is one by itself
    folder = eval_blimp.summary(items, [[1, 0] if item.line < dict(small=2, large=6, other=5)[item.task]
                                        else [0, 1] for item in items], RULES["2023"])
    assert 100 * folder["accuracy"] == pytest.approx(mean_a) and folder["n"] == 30


def test_only_scores_by_the_same_rules_are_compared(teachers, tmp_path, capsys):
    pairs = [("the dog runs.", "the dog run."), ("a cat sees.", "a cat see."), ("same", "same")]
    write_pairs(tmp_path / "pairs", "t", pairs)
    a, b = unscored(teachers[0], tmp_path / "a"), unscored(teachers[1], tmp_path / "b")
    score(a, tmp_path / "pairs", "2024")
    score(b, tmp_path / "pairs", "2026")
    with pytest.raises(SystemExit, match="by the same rules"):
        compare.main([a, b])
    score(a, tmp_path / "pairs", "2026")
    capsys.readouterr()
    compare.main([a, b])
    text = capsys.readouterr().out
    assert "notice" not in text
    edit_json(f"{b}/blimp_2026.json", bos="no")
    compare.main([a, b])
    assert "by the rules of 2026 some were scored with another bos" in capsys.readouterr().out
    accuracy = [read_json(f"{run}/blimp_2026.json")["folders"]["pairs"]["accuracy"] for run in (a, b)]
    assert all(round(6 * x) % 2 for x in accuracy)  # a tie is half a point
    assert "| pairs by the rules of 2026, % | a | b |" in text and "2024" not in text
    assert f"a - b: {100 * (accuracy[0] - accuracy[1]):+.2f} points" in text


def test_all_scores_of_a_run(teachers, tmp_path, capsys):
    run = unscored(teachers[1], tmp_path / "run")
    write_pairs(tmp_path / "pairs", "t", [("the dog runs.", "the dog run."), ("a cat sees.", "a cat see.")])
    for rules in ("2023", "2024", "2026"):
        score(run, tmp_path / "pairs", rules)
    write_json(f"{run}/reading.json", dict(step=6, rules=["2025", "2026"], reading=4.0, eye_tracking=3.0,
                                           self_paced=5.0, weights_sha256=[weights_sha256(run)]))
    shutil.copytree(find_checkpoint(teachers[0]), f"{run}/chck_1M")
    write_json(f"{run}/aoa_2025.json", dict(rules="2025", score=-0.125, n_words=7, steps=["chck_1M"] * 3,
                                            weights_sha256=[weights_sha256(teachers[0])] * 3))
    os.makedirs(f"{run}/scores_2026")
    benchmarks = dict(EWoK=dict(score=None, se=None, n=0, complete=False),
                      BLiMP=dict(score=61.0, se=0.5, n=3, complete=True),
                      GLUE=dict(score=50.0, se=None, n=7, complete=False))
    write_json(f"{run}/scores_2026/summary.json", dict(rules="2026", step=6, means={"overall": 12.0},
                                                       benchmarks=benchmarks))
    os.makedirs(tmp_path / "glue")
    official = finetune.task_config(finetune.FinetuneConfig.from_given(rules="2026"), "mrpc", "42")
    settings = finetune.non_defaults(official, (*finetune.NOT_PER_TASK, *finetune.WHERE_AND_HOW))
    row = dict(rules="2026", settings=settings, accuracy=0.9,
               inputs_sha256=dict(weights=[weights_sha256(run)], texts=[]))
    seeds = {"1": dict(row, f1=0.5), "2": dict(row, f1=0.6), "3": dict(row, f1=0.4)}
    write_json(f"{tmp_path}/glue/results.json", dict(mrpc=seeds))
    capsys.readouterr()
    compare.main([run, str(tmp_path / "glue")])
    lines = capsys.readouterr().out.splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[1] for row in cells[:3]] == ["2023", "2024", "2026"]
    assert {row[0] for row in cells[:3]} == {"pairs, mean of 1 tasks"}
    assert cells[3:] == [
        ["eye tracking", "2025, 2026", "3.00", "", "", "step 6"],
        ["self paced", "2025, 2026", "5.00", "", "", "step 6"],
        ["reading", "2025, 2026", "4.00", "", "", "step 6"],
        ["age of acquisition, correlation x 100", "2025", "-12.50", "", "7", "3 checkpoints"],
        ["BLiMP (submit)", "2026", "61.00", "0.50", "3", "step 6"],
        ["GLUE (submit, a part of it)", "2026", "50.00", "", "7", "step 6"],
        ["overall (submit)", "2026", "12.00", "", "", ""],
        ["mrpc, f1", "2026", "50.00", f"{10 / 3 ** 0.5:.2f}", "", "3 seeds"]]
    scores = read_json(f"{run}/blimp_2026.json")["folders"]["pairs"]
    assert cells[2][2:5] == [f"{100 * scores['accuracy']:.2f}", f"{100 * scores['se']:.2f}", "2"]
    with pytest.raises(SystemExit, match="mrpc of another model than the runs it is joined to"):
        compare.main([teachers[0], str(tmp_path / "glue")])
    for name in ("reading", "aoa_2025"):
        edit_json(f"{run}/{name}.json", weights_sha256=["x"])
    for seed in seeds.values():
        seed["settings"] = {**settings, "epochs": 1}
    write_json(f"{tmp_path}/glue/results.json", dict(mrpc=seeds))
    compare.main([run, str(tmp_path / "glue")])
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"notice: reading.json of {run} is of other weights than it has now",
        f"notice: aoa_2025.json of {run} is of other weights than it has now",
        "notice: not as the rules of 2026 have it: mrpc (epochs: 10 -> 1)"]


def test_what_is_neither_right_nor_wrong_has_a_correlation_alone(tmp_path, capsys):
    """WUG: no accuracy, and no test over items."""
    for name, rho, accuracy in (("a", 0.25, 0.75), ("b", -0.5, 0.25)):
        row = dict(accuracy=accuracy, se=0.1, n=4, rho=rho)
        folder = dict(row, sha256="x", phenomena={}, tasks=dict(t=dict(row, right="0101")))
        os.makedirs(tmp_path / name)
        write_json(f"{tmp_path}/{name}/run.json", dict(rules="2025", folders=dict(wug=folder)))
    compare.main([f"{tmp_path}/a/run.json", f"{tmp_path}/b/run.json"])
    out = capsys.readouterr().out
    assert "| **mean of 1 tasks, rank correlation with people x 100** | 25.00 | -50.00 |" in out
    assert f"{tmp_path}/a/run.json - {tmp_path}/b/run.json: +75.00 points\n" in out  # of one name: by path
    compare.main([f"{tmp_path}/a/run.json"])
    out += capsys.readouterr().out
    assert "75.00 |" not in out and "Wilcoxon" not in out and "interval" not in out


def test_widest_tasks(tmp_path, capsys):
    """Those whose accuracy deviates most between columns (means over seeds), in the place of phenomena."""
    accuracies = dict(even=[0.5, 0.5, 0.5], seeds=[0.1, 0.9, 0.5], little=[0.5, 0.5, 0.6],
                      much=[0.9, 0.9, 0.2])
    for i in range(3):
        tasks = {task: dict(accuracy=each[i], se=0.1, n=2, right="01") for task, each in accuracies.items()}
        folder = dict(tasks["even"], sha256="s", tasks=tasks, phenomena=dict(p=tasks["even"]))
        write_json(f"{tmp_path}/{i}.json", dict(folders=dict(pairs=folder)))
    a, b, c = [str(tmp_path / f"{i}.json") for i in range(3)]
    compare.main([f"{a}+{b}", c])
    assert "| p | 50.00 ± 0.00 | 50.00 |" in capsys.readouterr().out
    compare.main([f"{a}+{b}", c, "--widest=2"])
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[3:6]]
    assert rows == ["| much", "| little", "| **mean of 4 tasks**"]
    for columns in ([a], [f"{a}+{b}"], [str(tmp_path)]):
        with pytest.raises(SystemExit, match="widest=2 must be 0 unless scored runs are compared"):
            compare.main([*columns, "--widest=2"])


# Teaching Tiny Minds, table 4: DistilledGPT-44M, BabyLlama-58M
TINY_MINDS = dict(mrpc=(80.9, 82.0), rte=(55.4, 49.6), multirc=(64.9, 60.1), qqp=(75.1, 83.6),
                  qnli=(77.4, 82.8), wsc=(57.7, 38.5), mnli=(66.9, 72.4), sst2=(75.9, 86.2),
                  boolq=(65.3, 65.0), cola=(-0.01, 2.2))


def finetuned(folder, scores, weights=("w",), texts=("t",)):
    """results.json of tools.finetune with scores (task -> one a seed, in %) in all metrics."""
    os.makedirs(folder)
    write_json(f"{folder}/results.json", {task: {
        str(seed): dict(dict.fromkeys(("accuracy", "f1", "mcc"), score / 100), settings={}, rules="2024",
                        inputs_sha256=dict(weights=weights, texts=texts)) for seed, score in enumerate(each)}
        for task, each in scores.items()})
    return str(folder)


def test_fine_tuned_models_side_by_side(tmp_path, capsys):
    """The paper's means over nine tasks without CoLA, and scipy's test over the tasks."""
    stats = pytest.importorskip("scipy.stats")
    a, b = [finetuned(tmp_path / name, {task: [both[i]] for task, both in TINY_MINDS.items()})
            for i, name in enumerate(("distilled", "baby"))]
    nine = [task for task in TINY_MINDS if task != "cola"]
    compare.main([a, b, f"--tasks={','.join(nine)}"])
    out = capsys.readouterr().out
    assert "| qqp, f1 | 75.10 | 83.60 |" in out and "cola" not in out
    assert "| **mean of 9 tasks** | 68.83 | 68.91 |" in out
    for tasks, flags in ((nine, [f"--tasks={','.join(nine)}"]), (list(TINY_MINDS), [])):
        compare.main([a, b, *flags])
        expected = stats.wilcoxon(*zip(*map(TINY_MINDS.get, tasks)), method="exact").pvalue
        assert f"Wilcoxon over {len(tasks)} tasks p = {expected:.2g}\n" in capsys.readouterr().out


def test_seeds_of_models_and_of_fine_tuning_are_one_spread(tmp_path, capsys):
    """MSGS is a table of its own, by short names, in no mean; tasks that a column lacks are left out."""
    a = finetuned(tmp_path / "a", dict(wsc=[40, 50], rte=[10], cola=[1]))
    b = finetuned(tmp_path / "b", dict(wsc=[90], rte=[30]))
    compare.main([f"{a}+{b}", b])
    out = capsys.readouterr().out
    assert f"| wsc, accuracy | 60.00 ± {np.std([40, 50, 90], ddof=1):.2f} | 90.00 |" in out
    assert "| **mean of 2 tasks** | 40.00 | 60.00 |" in out and "- b: -20.00 points" in out
    assert [compare.short(task) for task in (
        "control_raising_lexical_content_the", "control_raising_relative_token_position",
        "main_verb_lexical_content_the", "main_verb_relative_token_position",
        "syntactic_category_lexical_content_the", "syntactic_category_relative_position",
        "main_verb_control", "mnli-mm")] == ["CR_LC", "CR_RTP", "MV_LC", "MV_RTP", "SC_LC", "SC_RP",
                                             "MV_control", "mnli-mm"]
    found = compare.shared_tasks([{"2024": dict.fromkeys(("rte", "main_verb_control"))}] * 2)
    assert found == {("GLUE", "2024"): ["rte"], ("MSGS", "2024"): ["main_verb_control"]}


def test_macro_average_is_the_mean_over_benchmarks(tmp_path, capsys):
    """BabyLlama-2's table 3, its rows of two models."""
    names = ("blimp_filtered", "supplement_filtered", "ewok_filtered")
    models = dict(run1=((73.2, 63.1, 50.6), 69.3), ltg=((69.2, 66.5, 51.9), 68.4))
    columns = []
    for model, (scores, glue) in models.items():
        folders = {name: dict(accuracy=score / 100, se=0.1, n=2, sha256=name, phenomena={},
                              tasks=dict(t=dict(accuracy=0.5, se=0.1, n=2, right="01")))
                   for name, score in zip(names, scores)}
        write_json(f"{tmp_path}/{model}.json", dict(folders=folders))
        tuned = finetuned(tmp_path / f"glue_{model}", dict(rte=[glue - 1, glue - 3], wsc=[glue + 2]))
        columns.append(f"{tmp_path}/{model}.json+{tuned}")
    compare.main(columns)
    table = capsys.readouterr().out.split("| means by the rules of 2024, % | run1.json | ltg.json |\n")[1]
    expected = [f"| {name} | {a:.2f} | {b:.2f} |"
                for name, a, b in zip(names, models["run1"][0], models["ltg"][0])]
    expected += ["| GLUE, 2 tasks | 69.30 | 68.40 |", "| **macro-average of 4** | 64.05 | 64.00 |"]
    assert table.splitlines()[1:] == expected


def test_results_of_other_models_or_texts_are_not_joined(teachers, tmp_path):
    a, b = unscored(teachers[0], tmp_path / "a"), unscored(teachers[1], tmp_path / "b")
    write_pairs(tmp_path / "pairs", "t", [("the dog runs.", "the dog run.")])
    for run in (a, b):
        score(run, tmp_path / "pairs", "2024")
    tuned = [finetuned(f"{run}_glue", dict(rte=[50]), weights=[weights_sha256(run)]) for run in (a, b)]
    compare.main([f"{a}+{tuned[0]}", f"{b}+{tuned[1]}"])
    others = finetuned(tmp_path / "texts", dict(rte=[50]), weights=[weights_sha256(b)], texts=["u"])
    mixed, other_rate, rate = (finetuned(tmp_path / name, dict(rte=[50, 60], wsc=[50]))
                               for name in ("mixed", "other_rate", "rate"))
    of_v, slow = dict(inputs_sha256=dict(weights=["v"], texts=["t"])), dict(settings=dict(learning_rate=0.1))
    for folder, task, seeds, change in ((mixed, "wsc", "0", of_v), (other_rate, "rte", "1", slow),
                                        (rate, "rte", "01", slow)):
        results = read_json(f"{folder}/results.json")
        for seed in seeds:
            results[task][seed].update(change)
        write_json(f"{folder}/results.json", results)
    for columns, message in (([f"{a}+{tuned[0]}", f"{b}+{tuned[0]}"], "rte of another model than the runs"),
                             ([f"{a}+{tuned[0]}", f"{b}+{others}"], "rte of other texts"),
                             ([f"{a}+{tuned[0]}", b], "a task in common"),
                             ([*tuned, "--tasks=rte,wsc"], "do not all have wsc"),
                             ([mixed, tuned[0]], "wsc of another model than its other results"),
                             ([other_rate, tuned[1]], "rte with other settings .*rate: None -> 0.1"),
                             ([f"{tuned[0]}+{rate}", tuned[1]], "rte with other settings")):
        with pytest.raises(SystemExit, match=message):
            compare.main(columns)


def test_what_cannot_be_compared(teachers, tmp_path):
    write_pairs(tmp_path / "a/pairs", "t", [("the dog runs.", "the dog run.")])
    write_pairs(tmp_path / "b/pairs", "t", [("a dog runs.", "a dog run.")])
    write_pairs(tmp_path / "c/other", "t", [("a dog runs.", "a dog run.")])
    folders = [str(tmp_path / name) for name in ("a/pairs", "b/pairs", "c/other")]
    a, b, c = [folder + ".json" for folder in folders]
    for folder in folders:
        eval_blimp.main(EvalConfig(ckpt=(teachers[0],), data=(folder,), out=folder + ".json", device="cpu"))
    for columns, message in (([], "name scored runs"), ([a, b, "--out=b"], "no setting 'out'"),
                             ([str(tmp_path)], "no scores at"), (["none"], "no scores at none"),
                             ([a, b], "other pairs"), ([a, c], "same data folders"),
                             ([a, "none"], "no scores at none")):
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
            compare.main(columns)


def test_it_is_a_command():
    def command(*args):
        return subprocess.run([sys.executable, "-m", "tools.compare", *args], cwd=ROOT, capture_output=True,
                              text=True)
    asked, alone = command("--help"), command("out/a")
    assert asked.returncode == 0 and asked.stdout.startswith(compare.__doc__)
    assert alone.returncode == 1 and alone.stderr.startswith("error: no scores at out/a")
    assert alone.stderr.count("\n") == 1
