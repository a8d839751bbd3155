"""The report card: what is on the page is what the run's files say, whatever is in them, and nothing else is
loaded. The page is read back with an HTML parser, the markdown with another's renderer."""
import html
import html.parser
import io
import os
import re
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest

import eval_blimp
import sample
from helpers import (
    TINY,
    edit_json,
    read_jsonl,
    records,
    reseal,
    run_distill,
    validations,
    write_pairs,
)
from lib import charts
from lib.checkpoints import find_checkpoint, weights_sha256
from lib.files import read_json, write_json
from lib.lineage import lineage
from lib.page import Code, Heading, Paragraph, Quotes, Table, to_html, to_markdown
from tools import report

EVIL = ("a <script>b()</script> dog's &amp;", "`a` *b* _c_ | d & $e$ \\ [f](http://g)")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def runs(data, teachers, tmp_path_factory):
    """A folder with text/, gpt2, llama, mid (taught by both) and student (taught by mid and llama), under
    another name than when they were trained; llama and student are scored."""
    folder = tmp_path_factory.mktemp("runs")
    before, after = str(folder / "before"), str(folder / "after")
    shutil.copytree(data, f"{before}/text")
    for name, path in zip(("gpt2", "llama"), teachers):
        shutil.copytree(path, f"{before}/{name}", ignore=shutil.ignore_patterns("blimp*"))  # another test's
    run_distill(f"{before}/text", f"{before}/mid", [f"{before}/gpt2", f"{before}/llama"])
    run_distill(f"{before}/text", f"{before}/student", [f"{before}/mid", f"{before}/llama"], seed=4)
    os.rename(before, after)
    rng = np.random.default_rng(5)
    words = "the a dog boy sees runs girl teacher".split()
    for task in range(6):
        sentences = [" ".join(rng.choice(words, 5)) for _ in range(24)]
        pairs = [(s + ".", s + " the.") if i % 2 else (s + " the.", s + ".") for i, s in enumerate(sentences)]
        write_pairs(f"{after}/blimp_filtered", f"task_{task}", [(*p, f"term_{task // 2}") for p in pairs])
    write_pairs(f"{after}/blimp_filtered", "task_6", [(text, "the.", "term_2") for text in EVIL])
    for name in ("student", "llama"):
        score(f"{after}/{name}", f"{after}/blimp_filtered", items=f"{after}/{name}.jsonl")
    return after


def score(run, folder, **change):
    eval_blimp.main(eval_blimp.EvalConfig(ckpt=(run,), data=(folder,), device="cpu", **change))


class Page(html.parser.HTMLParser):
    """Of a page: its tables {caption: rows}, headings, texts, and every tag."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.headings, self.quotes, self.tags = {}, [], [], []
        self.cell = self.caption = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.rows = self.tables.setdefault(self.caption, [])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "figcaption", "summary", "p", "blockquote") or re.fullmatch("h[1-6]", tag):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if self.cell is None:
            return
        text = self.cell
        if tag in ("td", "th"):
            self.rows[-1].append(text)
        elif tag in ("figcaption", "summary", "p"):  # in markdown a caption is a paragraph
            self.caption = text
        elif tag == "blockquote":
            self.quotes.append(text)
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), text))
        if tag not in ("code", "span", "wbr", "strong"):
            self.cell = None

    def column(self, caption, name):
        """{row's name: cell} of a table."""
        header, *rows = self.tables[caption]
        return {row[0]: row[header.index(name)] for row in rows}


def make(run, *flags):
    """The page of a run, and its HTML."""
    report.main([run, "--samples=0", *flags])
    with open(f"{run}/report.html", encoding="utf-8") as f:
        text = f.read()
    return Page(text), text


def test_lineage_in_numbers(runs):
    """Each model once; words and hours are those of its own log."""
    page, _ = make(f"{runs}/student")
    caption, meta = "The models of the pipeline", read_json(f"{runs}/text/meta.json")
    names = ["student, this run", "mid, teacher of student", "gpt2, teacher of mid", "llama, teacher of mid"]
    assert [row[0] for row in page.tables[caption][1:]] == [*names, "together"]
    short = [name.split(",")[0] for name in names]
    tokens = TINY["max_iters"] * TINY["batch_size"] * TINY["seq_len"]
    words = tokens * sum(meta["words"]["train"].values()) / sum(meta["sources"]["train"].values())
    seen = page.column(caption, "words seen")
    assert [seen[name] for name in names] == [f"{words:,.0f}"] * 4 and seen["together"] == f"{4 * words:,.0f}"
    total, hours = 0, page.column(caption, "hours")
    for name in names:
        log = [row for row in records(f"{runs}/{name.split(',')[0]}") if row["step"]]
        each = sum(tokens / TINY["max_iters"] / row["tokens_per_s"] for row in log) / 3600
        assert hours[name] == f"{each:.3g}"
        total += each
    assert hours["together"] == f"{total:.3g}"
    loss = page.column(caption, "validation loss")
    assert [loss[name] for name in names] == [
        f"{read_json(f'{runs}/{name}/best.json')['val_ce']:.4f}" for name in short]
    described = read_json(f"{runs}/student/ckpt_6/config.json")
    assert page.tables["Made with"][1] == [
        "student", *[described[key] for key in ("hardware", "torch", "git_revision")], "4"]
    (caption,) = [name for name in page.tables if name and name.startswith("Words of text")]
    assert page.column(caption, "train")["together"] == f"{sum(meta['words']['train'].values()):,}"


def test_two_checkpoints_of_a_run_cost_it_once(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "r")
    run = str(tmp_path / "r/student")
    edit_config(run, teachers=["r/llama/ckpt_3", "r/llama/ckpt_6"], teacher_sha256=["", ""])
    seen = make(run)[0].column("The models of the pipeline", "words seen")
    each, together = (int(seen[name].replace(",", "")) for name in ("student, this run", "together"))
    assert len(seen) == 4 and together == pytest.approx(2 * each, abs=1)


def edit_config(run, **change):
    """Of the best checkpoint."""
    folder = find_checkpoint(run)
    edit_json(f"{folder}/config.json", **change)
    reseal(folder, "config.json")


def test_another_model_of_a_teachers_name(runs, tmp_path, monkeypatch):
    """In the current folder is no teacher; one that was trained on is not shown with its new scores."""
    shutil.copytree(runs, tmp_path / "r")
    shutil.copytree(f"{runs}/student", tmp_path / "here/llama")
    run = str(tmp_path / "r/student")
    mid = read_json(f"{find_checkpoint(run)}/config.json")["teacher_sha256"][0]
    edit_config(run, teachers=["mid", "llama"], teacher_sha256=[mid, weights_sha256(f"{runs}/llama")])
    monkeypatch.chdir(tmp_path / "here")
    member = lineage(run)[-1] if lineage(run)[-1].name == "llama" else lineage(run)[-2]
    assert os.path.realpath(member.path) == os.path.realpath(tmp_path / "r/llama") and not member.reason
    edit_json(f"{tmp_path}/r/llama/blimp.json", weights_sha256="x")
    page, _ = make(run)
    shown = [row[0] for row in page.tables["Accuracies in 7 tasks of blimp_filtered, rules of 2024"]]
    assert shown == ["model", "student"]


def test_losses_of_the_teachers_that_it_has(runs, tmp_path):
    """And not of those that it had when it was begun."""
    shutil.copytree(runs, tmp_path / "r")
    run = str(tmp_path / "r/student")
    edit_config(run, teacher_val_ce=[1.25, 2.5])
    rows = make(run)[0].tables["Loss in nats per token"]
    assert [row[2] for row in rows if row[0].startswith("teacher")] == ["1.2500", "2.5000"]
    assert "teachers' ensemble" not in [row[0] for row in rows]


def test_what_is_not_there_is_named(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "r")
    shutil.rmtree(tmp_path / "r/gpt2")
    shutil.rmtree(tmp_path / "r/text")
    shutil.copytree(f"{runs}/student", tmp_path / "other")
    shutil.rmtree(tmp_path / "r/mid")
    shutil.copytree(tmp_path / "other", tmp_path / "r/mid")  # of other weights
    page, text = make(str(tmp_path / "r/student"))
    assert [row[0] for row in page.tables["The models of the pipeline"][2:]] == [
        "mid, teacher of student", "llama, teacher of student", "together, at least"]
    assert "mid has other weights now" in text and "prepared text is not at hand" in text
    missing = page.column("What is not there, and what makes it", "command")
    assert "mid, teacher of student" in missing and "prepare.py" in missing["the prepared text"]
    # without the text an epoch is all of its words
    row = records(f"{runs}/student")[-1]
    words = read_json(f"{runs}/student/ckpt_6/config.json")["words"]
    assert page.column("The models of the pipeline", "words seen")["student, this run"] == (
        f"{row['epoch'] * words:,.0f}")
    assert page.column("The models of the pipeline", "parameters")["mid, teacher of student"] == "–"


def test_a_beginning_and_a_generator_are_in_the_lineage(runs, tmp_path):
    shutil.copytree(f"{runs}/llama", tmp_path / "llama")
    (folder,) = [folder for folder in (tmp_path / "llama").iterdir() if folder.name == "ckpt_6"]
    config = read_json(folder / "config.json")
    config["train_config"].update(init_from=f"{runs}/gpt2", generator="gone/mlm")
    write_json(str(folder / "config.json"), config)
    reseal(folder, "config.json")
    members = lineage(str(tmp_path / "llama"))
    assert [(m.name, m.role, bool(m.described)) for m in members] == [
        ("llama", "this run", True), ("gpt2", "what llama began as", True),
        ("mlm", "generator of llama", False)]


def test_losses_are_the_metrics(runs):
    page, text = make(f"{runs}/student", f"--twin={runs}/mid")
    rows = page.tables["Loss in nats per token"]
    log, twin = validations(f"{runs}/student"), validations(f"{runs}/mid")
    assert rows[1:1 + len(log)] == [
        [f"{a['step']}", f"{a['ce']:.4f}", f"{a['val_ce']:.4f}", f"{b['val_ce']:.4f}"]
        for a, b in zip(log, twin, strict=True)]
    first = records(f"{runs}/student")[0]
    assert [row[2] for row in rows[1 + len(log):]] == [
        f"{loss:.4f}" for loss in (*first["teacher_val_ce"], first["ensemble_val_ce"])]
    svg = text[text.index("<svg"):text.index("</svg>")]
    dots = np.array([[float(x) for x in dot] for dot in re.findall(r'class="c1" cx="(.*?)" cy="(.*?)"', svg)])
    for values, places in zip(([row["step"] for row in log], [row["val_ce"] for row in log]), dots.T):
        slope, start = np.polyfit(values, places, 1)
        assert np.allclose(start + slope * np.array(values), places, atol=0.1)


def test_scores_are_the_results(runs):
    page, text = make(f"{runs}/student", f"--data={runs}/blimp_filtered")
    folder = read_json(f"{runs}/student/blimp.json")["folders"]["blimp_filtered"]

    def cell(row):
        return f"{100 * row['accuracy']:.2f} ± {100 * row['se']:.2f}"
    assert page.column("Scores in %, ± standard error, beside published baselines", "this run")["BLiMP"] == (
        cell(folder))
    for kind, n in (("tasks", 7), ("phenomena", 3)):
        assert page.tables[f"blimp_filtered, rules of 2024: {n} {kind}"][1:] == [
            [name, cell(row), f"{row['n']}"] for name, row in folder[kind].items()]
    accuracies = [100 * row["accuracy"] for row in folder["tasks"].values()]
    caption = "Accuracies in 7 tasks of blimp_filtered, rules of 2024"
    quartiles = np.percentile(accuracies, (0, 25, 50, 75, 100))
    assert page.tables[caption][1] == ["student", *[f"{x:.2f}" for x in (np.mean(accuracies), *quartiles)]]
    assert [row[0] for row in page.tables[caption][1:]] == ["student", "llama"]  # scored on the same
    svg = text[text.rindex("<svg"):text.rindex("</svg>")]
    dots = [float(x) for x in re.findall(r'class="c1" cx="(.*?)"', svg)]
    assert dots == pytest.approx([8 + 422 * x / 100 for x in accuracies], abs=0.06)


def test_those_with_scores_of_other_texts_are_not_beside_it(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "r")
    write_pairs(tmp_path / "r/blimp_filtered", "task_0", [("a dog.", "a a.")] * 24)
    score(f"{tmp_path}/r/llama", f"{tmp_path}/r/blimp_filtered")
    page, _ = make(f"{tmp_path}/r/student")
    title = "Accuracies in 7 tasks of blimp_filtered, rules of 2024"
    assert [row[0] for row in page.tables[title]] == ["model", "student"]
    shutil.copytree(f"{runs}/student", tmp_path / "twin/student")  # two runs of one name are two rows
    page, _ = make(f"{runs}/student", f"--twin={tmp_path}/twin/student")
    assert [row[0] for row in page.tables[title]][:2] == ["model", f"{runs}/student"]
    assert page.tables[title][-1][0] == f"{tmp_path}/twin/student"


def test_the_worst_are_those_with_the_least_logp(runs):
    page, _ = make(f"{runs}/student", f"--data={runs}/blimp_filtered")
    items, pairs, wrong, share = read_jsonl(f"{runs}/student.jsonl"), {}, {}, {}
    for name in {item["task"] for item in items}:
        pairs[name] = read_jsonl(f"{runs}/blimp_filtered/{name}.jsonl")
        logp = [(i["logp_good"], i["logp_bad"]) for i in items if i["task"] == name]
        wrong[name] = [pair for pair, (good, bad) in zip(pairs[name], logp, strict=True) if good < bad]
        share[name] = len(wrong[name]) / len(pairs[name])
    titles = [text.split(":")[0] for level, text in page.headings if text.startswith("task_")]
    assert [share[title] for title in titles] == sorted(share.values())[:-6:-1]
    shown = [row for caption, rows in page.tables.items() if str(caption).startswith("The first it got wrong")
             for row in rows if row != ["right", "preferred"]]
    expected = [[pair["sentence_good"], pair["sentence_bad"]]
                for title in titles for pair in wrong[title][:3]]
    assert sorted(shown) == sorted(expected) and all([text, "the."] in shown for text in EVIL)


def test_other_scores_are_on_the_page(runs, tmp_path):
    """Reading, age of acquisition, fine-tuning of several seeds, what tools.submit wrote, a stale result."""
    shutil.copytree(runs, tmp_path / "r")
    run = str(tmp_path / "r/student")
    write_json(f"{run}/reading.json", dict(rules=["2025", "2026"], reading=3.456, eye_tracking=5.4321,
                                           self_paced=1.4799, weights_sha256=["x"]))
    write_json(f"{run}/aoa_2025.json", dict(score=-0.12345))
    edit_json(f"{run}/reading.json", step=2)
    rows = {seed: dict(rules="2026", accuracy=x, f1=0.1, settings=dict(max_length=512),
                       inputs_sha256=dict(weights=[weights_sha256(run)], texts=[]))
            for seed, x in (("1", 0.5), ("2", 0.53))}
    os.makedirs(tmp_path / "glue")
    write_json(f"{tmp_path}/glue/results.json", {"rte": rows})
    score(run, f"{runs}/blimp_filtered", rules="2025")
    edit_json(f"{run}/blimp_2025.json", step=3, weights_sha256="x")
    page, text = make(run, f"--glue={tmp_path}/glue")
    caption = "Scores in %, ± standard error, beside published baselines"
    every = dict((row[0], row[1]) for row in page.tables[caption] if row[1] != "–")
    assert every["reading"] == "3.46" and every["eye tracking"] == "5.43" and every["AoA"] == "-12.35"
    assert every["rte"] == "51.50 ± 1.50"  # (0.53 - 0.5) / sqrt(2) / sqrt(2)
    assert "Scored with other weights than it has here: blimp_filtered (step 3), reading (step 2)." in text
    assert "Not fine-tuned as the rules have it: rte (batch_size: 32 -&gt; 64, learning_rate: " in text
    published = page.tables[caption]
    assert ["rte", "51.50 ± 1.50", "56.83", "57.55"] in published and any(
        row[0] == "EWoK" and row[3:] == ["49.49", "49.80", "–", "52.32", "51.22", "–"] for row in published)
    rows["1"]["inputs_sha256"]["weights"] = ["x"]
    write_json(f"{tmp_path}/glue/results.json", {"rte": rows})
    with pytest.raises(SystemExit, match="rte of another model than"):
        make(run, f"--glue={tmp_path}/glue")


def test_a_hand_in_is_shown_as_it_was_summed_up(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "r")
    run = str(tmp_path / "r/student")
    os.makedirs(f"{run}/scores_2026/main")
    score(run, f"{runs}/blimp_filtered", rules="2026", out=str(tmp_path / "s.json"))
    result = read_json(tmp_path / "s.json")
    write_json(f"{run}/scores_2026/main/blimp_filtered.json",
               {"step": result["step"], "weights_sha256": weights_sha256(run),
                **result["folders"]["blimp_filtered"]})
    write_json(f"{run}/scores_2026/summary.json", dict(
        step=result["step"], weights_sha256=weights_sha256(run),
        benchmarks={"BLiMP": dict(score=61.234, se=0.5, there=1, of=1, complete=True),
                    "EWoK": dict(score=None, se=None, there=0, of=1, complete=False),
                    "GLUE": dict(score=50.0, se=None, there=1, of=7, complete=False)},
        means={"NLP, of 7": 8.7654, "human-like, of 2": 1.0},
        missing={"full_eval/comps": "get it", "GLUE": "python -m tools.finetune"}))
    page, text = make(run)
    assert "other weights" not in text
    assert "Of a part of the official tasks or items: GLUE (1 of 7 tasks)." in text
    rows = page.tables["Scores in %, ± standard error, beside published baselines"]
    assert [row[1] for row in rows if row[0] in ("BLiMP", "NLP, of 7")][:2] == ["61.23 ± 0.50", "8.77"]
    (theirs,) = [row[3:] for row in rows if row[0] == "NLP, of 7"]
    assert theirs[0] == f"{np.mean((65.23, 57.25, 50.63, 19.10, 51.81, 35.09, 63.80)):.2f}"
    (theirs,) = [row[3:] for row in rows if row[0] == "human-like, of 2"]
    assert theirs[:2] == [f"{(5.63 - 12.15) / 2:.2f}", "–"]  # the other's AoA is not published
    assert "Accuracies in 7 tasks of blimp_filtered, rules of 2026" in page.tables
    missing = page.column("What is not there, and what makes it", "command")
    assert missing["full_eval/comps"] == "get it" and missing["GLUE"] == "python -m tools.finetune"


@pytest.fixture(scope="module")
def evil(runs, tmp_path_factory):
    """The page of a run with a name that no one should give, with everything on it; its folder."""
    folder = tmp_path_factory.mktemp("evil")
    name = "a<b>_&_`c`|$d$ 'e"
    for part in ("text", "mid", "llama", "gpt2", "blimp_filtered"):
        shutil.copytree(f"{runs}/{part}", folder / part)
    shutil.copytree(f"{runs}/student", folder / name)
    report.main([str(folder / name), f"--twin={folder}/mid", f"--data={folder}/blimp_filtered", "--samples=2",
                 "--length=8", f"--out={folder}/card.html"])
    return folder, name


def test_text_is_text(evil):
    """Escaped in HTML; and the markdown, as another renders it, has the same tables, headings and texts."""
    folder, name = evil
    text = (folder / "card.html").read_text()
    page = Page(text)
    assert page.headings[0] == (1, f"Report card: {name}") and "script" not in dict(page.tags)
    assert not re.search(r"https?://(?!g\))", text) and "<script" not in text
    markdown_it = pytest.importorskip("markdown_it")
    rendered = markdown_it.MarkdownIt("commonmark").enable("table").render((folder / "card.md").read_text())
    other = Page(rendered)
    assert "script" not in dict(other.tags) and other.headings == page.headings
    assert len(page.tables) > 8 and other.tables == page.tables
    assert len(page.quotes) == 2


def test_headings_are_in_order_and_figures_named(evil):
    page = Page((evil[0] / "card.html").read_text())
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    svgs = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(svgs) == 2 and all(attrs["role"] == "img" for attrs in svgs)
    assert (evil[0] / "card.html").read_text().count("<title>") == 3
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")


def test_nothing_is_loaded(evil):
    text = (evil[0] / "card.html").read_text()
    for tag, attrs in Page(text).tags:
        assert tag not in "script link img iframe object embed base image use a".split(), tag
        assert not [key for key in attrs if key in "src href srcset action data background".split()
                    or key.startswith(("on", "xlink"))]
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text  # and the browser would refuse it


def test_markdown_of_what_begins_a_block():
    texts = ["# a", "- a", "+ a", "1. a", "23) a", "=== a", "> a", "a  \n b", "-1.5", "--flag", "a\n# b\n- c"]
    blocks = [Heading(1, "t"), *map(Paragraph, texts), Quotes(texts),
              Table("c", ["a"], [[t] for t in texts]), Paragraph(Code("``x`` <b>"))]
    page = Page(to_html("t", blocks))
    markdown_it = pytest.importorskip("markdown_it")
    rendered = markdown_it.MarkdownIt("commonmark").enable("table").render(to_markdown(blocks))
    assert not re.search("<(ul|ol|hr|h[2-6])", rendered)
    flat = [[" ".join(row[0].split())] for row in Page(rendered).tables["c"]]
    assert flat == [[" ".join(row[0].split())] for row in page.tables["c"]]
    assert rendered.count("<blockquote>") == len(texts) and "<code>``x`` &lt;b&gt;</code>" in rendered


def test_samples_are_those_of_sample_py(runs, capsys, monkeypatch):
    """Of the same seeds, from an empty prompt."""
    report.main([f"{runs}/student", "--samples=2", "--length=9", "--seed=7"])
    page = Page(open(f"{runs}/student/report.html", encoding="utf-8").read())
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    sample.main(sample.SampleConfig(ckpt=(f"{runs}/student",), length=9, seed=7, device="cpu"))
    assert " ".join(" ".join(page.quotes).split()) == " ".join(capsys.readouterr().out.split())


def test_density_is_a_gaussian_kernel_estimate():
    mlab = pytest.importorskip("matplotlib.mlab")
    values = np.random.default_rng(1).uniform(20, 100, 67)
    x, y = charts.density(values)
    assert y == pytest.approx(mlab.GaussianKDE(values, "scott").evaluate(x)) and np.ptp(x) == np.ptp(values)


@pytest.mark.parametrize("flags,message", [
    ((), "name one run"), (("a", "b"), "name one run"), (("{runs}/nowhere",), "no checkpoint at"),
    (("{runs}/student", "--twin={runs}/nowhere"), "twin: no checkpoint at"),
    (("{runs}/student", "--glue={runs}/nowhere"), "no .*nowhere/results.json"),
    (("{runs}/student", "--out={runs}/nowhere/x"), "cannot write"),
    (("{runs}/student", "--data={other}/blimp_filtered"), "has other texts than were scored"),
    (("{runs}/student", "--data={runs}/nowhere"), "data: no folder .*nowhere"),
    (("{runs}/student", "--what=1"), "no setting 'what'")])
def test_bad_input_is_refused_in_a_line(runs, tmp_path, flags, message):
    write_pairs(tmp_path / "blimp_filtered", "task_1", [("a.", "b.")])
    with pytest.raises(SystemExit, match=message):
        report.main([flag.format(runs=runs, other=tmp_path) for flag in flags])


def test_a_run_that_is_not_scored_has_a_page(runs):
    page, _ = make(f"{runs}/gpt2")
    assert (2, "What is missing") in page.headings and (2, "The worst paradigms") not in page.headings
    missing = page.column("What is not there, and what makes it", "command")
    assert missing["fine-tuning"].endswith("--glue=out/glue") and missing["texts"].endswith("--samples=5")


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium")
def test_a_browser_shows_it(evil, tmp_path):
    """Not blank; nothing reaches over the edge of a narrow or wide window but what scrolls by itself."""
    text = (evil[0] / "card.html").read_text()
    frames = "".join(f'<iframe width={width} style="border: 0" srcdoc="{html.escape(text)}"></iframe>'
                     for width in (400, 1280))  # a window itself is not made as narrow
    (tmp_path / "frames.html").write_text(f"""<p id=measure></p>{frames}<script>
        onload = () => measure.textContent = [...document.querySelectorAll("iframe")].map(frame => {{
            const page = frame.contentDocument; return `${{page.title.length}} characters, ` +
            `${{page.documentElement.scrollWidth}} of ${{frame.clientWidth}}` }}).join("; ")</script>""")

    def browse(*flags):
        return subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                               f"--user-data-dir={tmp_path}/profile", "--window-size=500,2000", *flags],
                              capture_output=True, text=True, timeout=120).stdout
    n = len(f"Report card: {evil[1]}")
    measured = browse("--dump-dom", f"file://{tmp_path}/frames.html")
    assert f"{n} characters, 400 of 400; {n} characters, 1280 of 1280" in measured
    browse(f"--screenshot={tmp_path}/shot.png", f"file://{evil[0]}/card.html")
    data = (tmp_path / "shot.png").read_bytes()
    chunks = [data[m.start() + 4:m.start() + 4 + int.from_bytes(data[m.start() - 4:m.start()], "big")]
              for m in re.finditer(b"IDAT", data)]
    pixels = np.frombuffer(zlib.decompress(b"".join(chunks)), np.uint8)
    assert (pixels > 0).mean() > 0.005  # filtered rows: 0 = as its neighbour
