"""A chain of generations: the right teachers, nothing done twice, nothing mixed in silently."""
import json
import os

import pytest
from conftest import ROOT, TINY
from test_train import cut_short, records

import chain
import config
import disk
import distill
import eval_blimp
import train


@pytest.fixture
def in_process(monkeypatch):
    """The commands of a chain, run here (a test of train.py's command line is elsewhere)."""
    def command(script, *args, nproc=0, quiet=False):
        main, cls = {"train.py": (train.main, train.TrainConfig), "distill.py": (distill.main, distill.DistillConfig),
                     "eval_blimp.py": (eval_blimp.main, eval_blimp.EvalConfig)}[script]
        ran.append(script)
        main(config.configure(cls, list(args)))
    ran = []
    monkeypatch.setattr(chain, "command", command)
    return ran


def chain_config(corpus, data, tmp_path, *generations, **change):
    (tmp_path / "small.py").write_text("".join(f"{k} = {v!r}\n" for k, v in TINY.items()))
    lines = generations or (f"a {tmp_path}/small.py", f"b {tmp_path}/small.py a", f"c {tmp_path}/small.py --n_embd=48 a b --teacher_dtype=float32,int8")
    return chain.ChainConfig(**{**dict(generations=tuple(lines), data_dir=data, out_dir=str(tmp_path / "chain"), blimp=(f"{corpus}/pairs",)), **change})


def test_each_generation_is_taught_by_those_named(corpus, data, tmp_path, in_process, capsys):
    cfg = chain_config(corpus, data, tmp_path)
    chain.main(cfg)
    for name, teachers in (("a", []), ("b", ["a"]), ("c", ["a", "b"])):
        described = disk.load_checkpoint(f"{cfg.out_dir}/{name}")[2]
        assert [os.path.basename(t) for t in described.get("teachers", [])] == teachers
        if teachers:  # the losses the generation logged for its teachers are theirs
            assert records(f"{cfg.out_dir}/{name}")[0]["teacher_val_ce"] == pytest.approx(
                [disk.load_checkpoint(f"{cfg.out_dir}/{t}")[2]["val_ce"] for t in teachers], abs=0.01)
    rows = [json.loads(line) for line in open(f"{cfg.out_dir}/results.jsonl")]
    assert [r["generation"] for r in rows] == ["a", "b", "c"] and rows[2]["parameters"] > rows[1]["parameters"]
    table = capsys.readouterr().out.split("| generation |")[1]
    for r in rows:
        blimp = json.load(open(f"{cfg.out_dir}/{r['generation']}/blimp.json"))["folders"]["pairs"]["accuracy"]
        assert r["accuracy"]["pairs"] == blimp and f"{r['val_ce']:.4f} | {100 * blimp:.2f}" in table
    ran = list(in_process)
    chain.main(cfg)
    assert in_process == ran and capsys.readouterr().out.count("\n| a |") == 1  # nothing again but the table


def test_a_chain_goes_on_where_it_was_cut(corpus, data, tmp_path, in_process, monkeypatch):
    cfg = chain_config(corpus, data, tmp_path)
    chain.main(chain_config(corpus, data, tmp_path, out_dir=str(tmp_path / "whole")))
    chain.main(chain_config(corpus, data, tmp_path, *cfg.generations[:1]))
    with monkeypatch.context() as m:
        cut_short(m, 4)
        with pytest.raises(KeyboardInterrupt):
            chain.main(cfg)
    with pytest.raises(SystemExit, match="has 'b' with other settings or data"):  # b was begun as it was
        chain.main(chain_config(corpus, data, tmp_path, cfg.generations[0], cfg.generations[1] + " --alpha=0.9"))
    chain.main(cfg)
    losses = [[disk.load_checkpoint(f"{out}/{g}")[2]["val_ce"] for g in "abc"] for out in (cfg.out_dir, tmp_path / "whole")]
    assert losses[0] == losses[1]


def test_other_settings_are_not_mixed_in(corpus, data, tmp_path, in_process):
    chain.main(chain_config(corpus, data, tmp_path, f"a {tmp_path}/small.py"))
    with pytest.raises(SystemExit, match="has 'a' with other settings or data; name another --out_dir"):
        chain.main(chain_config(corpus, data, tmp_path, f"a {tmp_path}/small.py --seed=9"))


@pytest.mark.parametrize("line,message", [
    ("", "is not 'name config_file teacher"), ("a", "is not 'name config_file"), ("a x.py", "no config file 'x.py'"),
    ("a small.py b", "teacher 'b' is neither an earlier generation nor a run folder"), ("a small.py --n_lyer=1", "did you mean 'n_layer'"),
    ("../a small.py", "is not 'name"), (".. small.py", "is not 'name"), ("results.jsonl small.py", "is not 'name"), ("a small.py out --teacher_dtype=int8,int8", "teacher 'out' is neither")])
def test_bad_chains_are_one_line(corpus, data, tmp_path, in_process, line, message):
    with pytest.raises(SystemExit, match=message):
        chain.main(chain_config(corpus, data, tmp_path, line.replace("small.py", f"{tmp_path}/small.py")))
    assert in_process == []


def test_the_papers_chain_is_a_window_of_three():
    """models.md's order: sizes 58, 95, 360, three of each; from 95-0 on the three before."""
    cfg = config.configure(chain.ChainConfig, [f"{ROOT}/config/reverse_distillation.py"])
    names = [line.split()[0] for line in cfg.generations]
    assert names == [f"{size}-{k}" for size in (58, 95, 360) for k in range(3)]
    for i, line in enumerate(cfg.generations[1:], 1):
        file, *teachers = [w for w in line.split()[1:] if not w.startswith("--")]
        assert teachers == names[max(0, i - 3):i] and file == f"config/reverse_{names[i].split('-')[0]}m.py"


def test_a_generation_that_never_trained_may_be_corrected(corpus, data, tmp_path, in_process):
    with pytest.raises(SystemExit, match="must be a multiple of micro_batch_size"):
        chain.main(chain_config(corpus, data, tmp_path, f"a {tmp_path}/small.py --batch_size=7 --micro_batch_size=3"))
    chain.main(chain_config(corpus, data, tmp_path, f"a {tmp_path}/small.py"))


@pytest.mark.parametrize("rows", ['{"generation": "a"}', '{"generation": "a", "settings_sha256": "x", "data_sha256": "y", "val_ce": 1.0}', "[]", "{"])
def test_damaged_results_are_one_line(corpus, data, tmp_path, in_process, rows):
    (tmp_path / "chain").mkdir()
    (tmp_path / "chain/results.jsonl").write_text(rows + "\n")
    with pytest.raises(SystemExit, match="^error: .*results.jsonl is damaged[^\n]*$"):
        chain.main(chain_config(corpus, data, tmp_path))


def test_what_a_generation_cannot_say(corpus, data, tmp_path, in_process):
    with pytest.raises(SystemExit, match="is chain.py's to say"):
        chain.main(chain_config(corpus, data, tmp_path, f"a {tmp_path}/small.py --resume"))
    with pytest.raises(SystemExit, match="cannot be scored on pairs"):
        chain.main(chain_config(corpus, data, tmp_path, f"a {tmp_path}/small.py --causal=False"))
    assert in_process == []
