"""What full disks, closed pipes, kills and foreign files do to scoring and the tools: nothing is lost."""
import fcntl
import gzip
import io
import json
import os
import re
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import eval_blimp
import train
from distill import DistillConfig
from eval_blimp import EvalConfig
from helpers import TINY, edit_json, read_jsonl, thorough, write_pairs, write_task
from lib.configurator import configure, launch
from tools import bench, compare, finetune, hf, plot, study, surprisal, sweep
from tools.finetune import FinetuneConfig
from tools.study import StudyConfig
from tools.surprisal import SurprisalConfig
from tools.sweep import SweepConfig
from train import TrainConfig

DEEP = "[" * 100_000
NORM = "model.norm.weight"
WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile")


# --- a tool in a child process --------------------------------------------------------------------

def in_child(work, stdout=None, encoding="utf-8", kill_at=None, fail_at=None, under="/"):
    """Exit status (below 0: the signal), stderr and number of changes of files under a folder, of work() in a
    child process. It can be killed at one of these changes, or find the disk full."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, events = 120, 0

        def hook(event, args):
            nonlocal events
            if event not in WRITES or not str(args[0]).startswith(str(under)):
                return
            if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            events += 1
            if events - 1 == fail_at:
                raise OSError(28, "No space left on device", str(args[0]))
        try:
            os.dup2(os.open(stdout or os.devnull, os.O_WRONLY) if not isinstance(stdout, int) else stdout, 1)
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding)
            sys.stderr = io.StringIO()
            sys.addaudithook(hook)
            work()
            sys.stdout.flush()
            code = 0
        except OSError:  # what the interpreter does at its end
            code = 120
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1 if e.code else 0
            print(e.code if isinstance(e.code, str) else "", file=sys.stderr)
        except BaseException as e:
            print(f"Traceback: {type(e).__name__}: {e}", file=sys.stderr)
        finally:
            under = "\0"
            os.write(write, json.dumps([sys.stderr.getvalue(), events]).encode())
            os._exit(code)  # come what may: there is a second pytest in here
    os.close(write)
    with open(read, "rb") as f:
        stderr, events = json.loads(f.read() or b'["", 0]')
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), stderr, events


def started(main, cls, *argv):
    """A tool's work as its command line has it."""
    def work():
        sys.argv = ["x", *map(str, argv)]
        launch(main, cls)
    return work


class Tools:
    """Commands that end in seconds, each with its results in a folder of its own."""

    def __init__(self, data, teachers, folder):
        self.data, self.folder, self.teacher = data, folder, teachers[1]
        write_pairs(folder / "p", "t", [("the dog runs.", "the dog run."), ("a cat.", "cat a.")] * 3)
        write_task(folder / "glue", n=16, valid=8)
        (folder / "text").write_text("the dog sees a cat .\nthe boy runs .\n")
        os.makedirs(folder / "out", exist_ok=True)
        settings = {**TINY, "data_dir": data, "max_iters": 3}
        (folder / "small.py").write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))

    def work(self, name, out):
        ckpt, folder = [f"--ckpt={self.teacher}", "--device=cpu"], self.folder
        return {
            "eval": started(eval_blimp.main, EvalConfig, *ckpt, f"--data={folder}/p", f"--out={out}/o.json",
                            f"--items={out}/i", f"--predictions={out}/p.json.gz"),
            "surprisal": started(surprisal.main, SurprisalConfig, *ckpt, f"--text={folder}/text",
                                 f"--out={out}/o.tsv"),
            "finetune": started(finetune.main, FinetuneConfig, *ckpt, f"--data={folder}/glue", "--tasks=rte",
                                "--seeds=1,2", "--epochs=2", f"--out_dir={out}", "--max_length=32",
                                "--keep_model", f"--predictions={out}/p.json.gz"),
            "export": started(hf.main, None, "export", self.teacher, f"{out}/hf"),
            "import": started(hf.main, None, "import", f"{folder}/hf", f"{out}/run"),
            "study": started(study.main, StudyConfig, f"--runs=a {folder}/small.py,b {folder}/small.py a,"
                             "c ensemble a b", f"--out_dir={out}", f"--blimp={folder}/p",
                             f"--data_dir={self.data}"),
            "sweep": started(sweep.main, SweepConfig, f"--run={folder}/small.py", "--n_trials=1",
                             "--priors=learning_rate loguniform 0.001 0.01", f"--out_dir={out}"),
        }[name]


@pytest.fixture(scope="module")
def tools(data, teachers, tmp_path_factory):
    made = Tools(data, teachers, tmp_path_factory.mktemp("tools"))
    hf.main(["export", made.teacher, str(made.folder / "hf")])
    return made


def results(out):
    """file -> its bytes, but for what a clock says; hidden files too."""
    files = {}
    for folder, _, names in os.walk(out):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as f:
                data = f.read()
            if name.endswith(".gz"):
                data = gzip.decompress(data)
            data = re.sub(rb'"(seconds|\w+_per_s)": [0-9.]+|"config.json": "[0-9a-f]{64}"', b"", data)
            files[os.path.relpath(path, out)] = data.replace(os.fsencode(out), b"OUT")
    return files


# --- written first, printed after -----------------------------------------------------------------

@pytest.mark.parametrize("name", ["eval", "surprisal", "finetune"])
@pytest.mark.parametrize("how", ["pipe", "full", "ascii"])
def test_what_cannot_be_printed_loses_nothing(tools, tmp_path, name, how):
    os.makedirs(tmp_path / "whole")
    os.makedirs(tmp_path / "out")
    assert in_child(tools.work(name, tmp_path / "whole"))[0] == 0
    read, write = os.pipe()
    os.close(read)  # `| head -1` that has read its line
    stdout = dict(pipe=write, full="/dev/full", ascii=str(tmp_path / "log"))[how]
    open(tmp_path / "log", "w").close()
    encoding = "ascii" if how == "ascii" else "utf-8"
    status, stderr, _ = in_child(tools.work(name, tmp_path / "out"), stdout, encoding)
    assert "Traceback" not in stderr and ("error: " in stderr) <= (how == "full")
    if how == "ascii":
        assert status == 0 and (name != "eval" or r"\xb1" in (tmp_path / "log").read_text())
    else:  # surprisal has nothing to print
        assert status == (name != "surprisal")
    assert results(tmp_path / "out") == results(tmp_path / "whole")


# --- killed, or a full disk, at any change of a file ----------------------------------------------

EVENTS = [0, 1, 2, 3, 5, 7, 4, 6, *range(8, 60), *range(60, 200, 5)]


def in_process(script, *args, **_):
    """study.py's command() without the minutes that a process takes to start."""
    if script == "eval_blimp.py":
        return eval_blimp.main(configure(EvalConfig, [*args, "--device=cpu"]))
    main, cls = (train.main, TrainConfig) if script == "train.py" else (distill.main, DistillConfig)
    main(configure(cls, list(args)))


@pytest.mark.parametrize("name", ["eval", "surprisal", "finetune", "export", "import", "study"])
@pytest.mark.parametrize("how", ["kill_at", "fail_at"])
@pytest.mark.parametrize("event", thorough(EVENTS, sample=6))
def test_the_same_command_goes_on(tools, tmp_path, name, how, event, monkeypatch):
    monkeypatch.setattr(study, "command", in_process)
    whole = tools.folder / "whole" / name
    if not whole.exists():
        os.makedirs(whole)
        assert in_child(tools.work(name, whole))[0] == 0
    out = tmp_path / "out"
    os.makedirs(out)
    status, stderr, events = in_child(tools.work(name, out), under=out, **{how: event})
    if event >= events and status == 0:
        return  # it does not change that many files
    assert status in (0, -signal.SIGKILL) or "error: " in stderr and "\n" not in stderr.strip(), stderr
    if name in ("export", "import"):  # there whole, or not at all
        assert [f for f in os.listdir(out) if not f.startswith(".")] in ([], os.listdir(whole))
    status, stderr, _ = in_child(tools.work(name, out))
    assert status == 0 or "is there already" in stderr, stderr
    assert results(out) == results(whole)


@pytest.mark.thorough
@pytest.mark.parametrize("event", thorough([3, 9, *range(0, 60, 4)], sample=2))
def test_a_sweep_goes_on(tools, tmp_path, event, monkeypatch):
    lock = pytest.importorskip("optuna").storages.journal.JournalFileSymlinkLock
    monkeypatch.setattr(lock.__init__, "__defaults__", (3,))  # a killed worker's lock holds 3 s, not 30
    status, stderr, _ = in_child(tools.work("sweep", tmp_path), under=tmp_path, kill_at=event)
    if os.path.exists(tmp_path / "journal.log"):
        with open(tmp_path / "journal.log", "a") as f:  # and in the middle of a line
            f.write('{"op_code": 4, "wor')
    status, stderr, _ = in_child(tools.work("sweep", tmp_path), under=tmp_path)
    assert status == 0, stderr
    row, = read_jsonl(tmp_path / "results.jsonl")
    assert row["val_ce"] > 0 and os.path.exists(tmp_path / "best.py")


def test_a_lock_of_a_killed_worker_is_a_link_to_the_journal(tools, tmp_path, monkeypatch):
    """And not to a name that is wrong from where the link lies: then it would be waited for for ever."""
    monkeypatch.chdir(tmp_path)
    journal = pytest.importorskip("optuna").storages.journal
    seen = []
    monkeypatch.setattr(journal, "JournalFileSymlinkLock", lambda path: seen.append(path) or 1 / 0)
    (tmp_path / "s").mkdir()
    (tmp_path / "s/journal.log").write_text("")
    with pytest.raises(ZeroDivisionError):
        sweep.open_search(SweepConfig(out_dir="s"))
    assert seen == [str(tmp_path / "s/journal.log")]


# --- wrong and hostile Hugging Face folders -------------------------------------------------------

def imported(folder, tmp_path):
    """What an import of a folder is refused with."""
    with pytest.raises(SystemExit) as e:
        hf.main(["import", str(folder), str(tmp_path / "run")])
    assert os.listdir(tmp_path) == ["hf"] and "\n" not in str(e.value) and str(folder) in str(e.value)
    return str(e.value)


@pytest.fixture
def llama(tools, tmp_path):
    return shutil.copytree(tools.folder / "hf", tmp_path / "hf")


@pytest.mark.parametrize("change,message", [
    (dict(num_hidden_layers="two"), "'n_layer' wants int, got 'two'"),
    (dict(num_hidden_layers=True), "'n_layer' wants int, got True"),
    (dict(num_hidden_layers=10 ** 7), "too few for 10000000 layers"),
    (dict(num_hidden_layers=10 ** 300), "'n_layer' wants a finite number"),
    (dict(hidden_size=2 ** 40, head_dim=None), "impossible sizes|missing|model.py has"),
    (dict(hidden_size=10 ** 18, head_dim=None), "impossible sizes|missing|model.py has|must be"),
    (dict(max_position_embeddings=10 ** 12), "1000000000000 positions are more than 1048576"),
    (dict(rms_norm_eps="1e-6"), "'norm_eps' wants float, got '1e-6'"),
    (dict(rms_norm_eps=-1), "'norm_eps' wants a finite number"),
    (dict(rope_theta="big", rope_parameters=None), "'rope_theta' wants float"),
    (dict(rope_theta=0, rope_parameters=None), "rope_theta=0.0 must be above 0"),
    (dict(rope_parameters=["x"]), "does not describe a llama"),
    (dict(attention_dropout=2), "attn_dropout=2.0 must be below 1"),
    (dict(num_attention_heads=0), "does not describe a llama"),
    (dict(model_type=["llama"]), "is of type"),
    (dict(tie_word_embeddings="no"), "'tie_weights' wants True or False"),
    (dict(vocab_size=10 ** 9), "model.py has"),
])
def test_a_config_that_is_wrong(llama, tmp_path, change, message):
    edit_json(llama / "config.json", **change)
    assert re.search(message, imported(llama, tmp_path))


@pytest.mark.parametrize("text", [DEEP, '{"model_type": 1e999}', "[]", "", "{", b"\xff"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none(llama, tmp_path, file, text):
    (llama / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    imported(llama, tmp_path)


@pytest.mark.parametrize("weight_map", [
    ["x"], {"a": 5}, {"a": "../hf/model.safetensors"}, {"a": "/dev/zero"}, {"a": "no.safetensors"},
    {"a": "fifo"}, {"a": ["model.safetensors"]}, {}])
def test_an_index_names_files_of_the_folder(llama, tmp_path, weight_map):
    os.mkfifo(llama / "fifo")
    (llama / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    imported(llama, tmp_path)


@pytest.mark.parametrize("change,message", [
    (lambda w: w[NORM].fill_(float("nan")), "model.norm.weight is not finite"),
    (lambda w: w.update({NORM: torch.full((32,), 1e300, dtype=torch.float64)}), "is not finite"),
    (lambda w: w.update({NORM: torch.ones(32, dtype=torch.int8)}), "tensor model.norm.weight is I8"),
    (lambda w: w.update({NORM: torch.ones(33)}), r"norm.weight is \(33,\), model.py has \(32,\)"),
    (lambda w: w.update(extra=torch.ones(3)), "tensor extra"),
    (lambda w: w.pop(NORM), "tensor model.norm.weight is missing"),
])
def test_weights_that_are_wrong(llama, tmp_path, change, message):
    tensors = load_file(llama / "model.safetensors")
    change(tensors)
    save_file(tensors, llama / "model.safetensors")
    assert re.search(message, imported(llama, tmp_path))


@pytest.mark.parametrize("change,message", [
    (lambda t: t["model"]["vocab"].update({"a": 1}), "two tokens have one id"),
    (lambda t: t["model"]["vocab"].update({"a": 10 ** 6}), "one beyond the model's"),
    (lambda t: t["model"]["vocab"].update({"a": "x"}), "not one that is understood"),
    (lambda t: t["added_tokens"].append({"content": ["x"], "id": 3}), "not one that is understood"),
    (lambda t: t.update(pre_tokenizer=["x"]), "not one that is understood"),
    (lambda t: t.update(added_tokens=None), "not one that is understood"),
])
def test_a_tokenizer_that_is_wrong(llama, tmp_path, change, message):
    os.remove(llama / "tokenizer.model")
    vocab = {hf.BYTE_CHAR[b]: b for b in range(256)}
    spec = dict(model=dict(type="BPE", vocab=vocab, merges=[]), normalizer=None, added_tokens=[],
                pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, use_regex=True))
    change(spec)
    (llama / "tokenizer.json").write_text(json.dumps(spec))
    assert re.search(message, imported(llama, tmp_path))


def test_a_tokenizer_larger_than_the_model(llama, tmp_path, corpus):
    edit_json(llama / "config.json", vocab_size=400)
    tensors = load_file(llama / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:400].clone()
    save_file(tensors, llama / "model.safetensors")
    assert "a tokenizer of 500 entries, a model of 400" in imported(llama, tmp_path)


def test_a_hidden_folder_is_swept_and_a_link_followed(tools, tmp_path):
    os.makedirs(tmp_path / ".x.unfinished" / "ckpt_0")
    os.makedirs(tmp_path / "disk" / "x")
    os.symlink(tmp_path / "disk" / "x", tmp_path / "x")
    hf.main(["export", tools.teacher, str(tmp_path / "x")])
    assert os.path.islink(tmp_path / "x") and os.path.isfile(tmp_path / "disk/x/config.json")
    with pytest.raises(SystemExit, match="is there already"):
        hf.main(["export", tools.teacher, str(tmp_path / "x")])


def test_two_exports_at_once(tools, tmp_path):
    os.makedirs(tmp_path / ".x.unfinished")
    with open(tmp_path / ".x.unfinished/theirs", "w"):
        held = os.open(tmp_path / ".x.unfinished", os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another process is writing"):
            hf.main(["export", tools.teacher, str(tmp_path / "x")])
    os.close(held)
    assert os.listdir(tmp_path / ".x.unfinished") == ["theirs"] and not os.path.exists(tmp_path / "x")


# --- names, pipes, devices and folders in the place of files --------------------------------------

NOT_UTF8 = os.fsdecode(b"caf\xe9")


def put(kind, path):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        os.symlink("/dev/zero", path)
    else:
        os.makedirs(path)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("where,argv", [
    ("p/x.jsonl", ["eval"]), ("p.json.gz", ["eval"]), ("o", ["eval"]),
    ("glue/rte.valid.x.jsonl", ["finetune"]),
    ("glue/rte.train.jsonl", ["finetune"]), ("text", ["surprisal"]),
    ("words", ["surprisal", "--words=words"]),
    ("r/metrics.jsonl", ["plot", "--curves=r"]), ("results.jsonl", ["plot", "--scatter=results.jsonl"]),
    ("blimp.json", ["compare"])])
def test_only_regular_files_are_read(tools, tmp_path, kind, where, argv):
    for name in ("p", "glue", "text"):
        source = tools.folder / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path)
    if where == "glue/rte.valid.x.jsonl":
        os.remove(tmp_path / "glue/rte.valid.jsonl")
    if where in ("text", "glue/rte.train.jsonl"):
        os.remove(tmp_path / where)
    os.makedirs(tmp_path / "r")
    put(kind, tmp_path / where)
    ckpt = f"--ckpt={os.path.abspath(tools.teacher)}"
    work = {
        "eval": started(eval_blimp.main, EvalConfig, ckpt, "--data=p", "--out=o", "--predictions=p.json.gz"),
        "finetune": started(finetune.main, FinetuneConfig, ckpt, "--data=glue", "--tasks=rte",
                            "--max_length=32", "--out_dir=out"),
        "surprisal": started(surprisal.main, SurprisalConfig, ckpt, "--text=text", *argv[1:]),
        "plot": started(plot.main, plot.PlotConfig, *argv[1:]),
        "compare": started(compare.main, None, "blimp.json", "blimp.json"),
    }[argv[0]]

    def there():
        os.chdir(tmp_path)
        signal.alarm(60)
        work()
    status, stderr, _ = in_child(there)
    assert status == 1 and re.fullmatch(r"error: .*\n", stderr) and os.path.basename(where) in stderr, stderr
    assert where == "o" or not os.path.exists(tmp_path / "o")


@pytest.mark.parametrize("name", ["eval", "surprisal", "finetune", "export", "import", "compare", "plot"])
def test_names_that_are_not_utf8(tools, tmp_path, name):
    """Work, or are refused in one line: as names of results and of what is read."""
    out = tmp_path / NOT_UTF8
    os.makedirs(out)
    source = shutil.copytree(tools.folder, out / "tools", ignore=shutil.ignore_patterns("whole"))
    write_pairs(source / "p", NOT_UTF8, [("the dog runs.", "the dog run.")])
    run = shutil.copytree(tools.teacher, out / "run")
    there = Tools.__new__(Tools)
    there.data = tools.data
    there.folder, there.teacher = source, str(run)
    for made, target in ((there, out), (there, tmp_path), (tools, out)):
        if name in ("compare", "plot"):
            work = (started(compare.main, None, run, run) if name == "compare" else
                    started(plot.main, plot.PlotConfig, f"--curves={run}", f"--out={target}/x"))
        else:
            work = made.work(name, target)
        status, stderr, _ = in_child(work)
        assert status == 0 or status == 1 and re.fullmatch(r"error: .*\n", stderr), (status, stderr)
    # a file of such a name, in folders of others
    os.rename(source / "p", tmp_path / "p")
    there.folder, there.teacher = tmp_path, tools.teacher
    if name == "eval":
        status, stderr, _ = in_child(there.work(name, tmp_path))
        assert status == 0 and len(read_jsonl(tmp_path / "i")) == 7, stderr


# --- JSON -----------------------------------------------------------------------------------------

BAD_JSON = [DEEP, '{"x": 1e999}', '{"x": ' + "9" * 5000 + "}", "\x00", '"\\ud800"', "{}"]


@pytest.mark.parametrize("text", BAD_JSON)
@pytest.mark.parametrize("where", ["pairs", "predictions", "task", "results.json", "metrics", "study",
                                   "blimp.json"])
def test_json_with_no_measure(tools, tmp_path, where, text):
    ckpt = dict(ckpt=(tools.teacher,), device="cpu")
    write_task(tmp_path / "glue", n=4, valid=4)
    os.makedirs(tmp_path / "p")
    os.makedirs(tmp_path / "out")
    files = dict(pairs="p/t.jsonl", task="glue/rte.train.jsonl", metrics="metrics.jsonl", study="s.jsonl")
    file = tmp_path / files.get(where, "out/" + where)
    file.write_text(text + "\n")
    if where == "predictions":
        file.write_bytes(gzip.compress(text.encode()))
        write_pairs(tmp_path / "p", "t", [("a", "b")])

    def tune():
        finetune.main(FinetuneConfig(**ckpt, data=str(tmp_path / "glue"), tasks=("rte",), max_length=32,
                                     out_dir=str(tmp_path / "out")))
    if where in ("predictions", "results.json") and text == "{}":
        return  # which is none yet
    with pytest.raises(SystemExit) as e:
        if where in ("pairs", "predictions"):
            eval_blimp.main(EvalConfig(**ckpt, data=(str(tmp_path / "p"),), out=str(tmp_path / "o"),
                                       predictions=str(file) if where == "predictions" else ""))
        if where in ("task", "results.json"):
            tune()
        if where == "metrics":
            plot.records(str(tmp_path))
        if where == "study":
            study.result_rows(str(file))
        if where == "blimp.json":
            compare.main([str(tmp_path / "out"), str(tmp_path / "out")])
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value) and str(file) in str(e.value)


@pytest.mark.parametrize("change", [
    lambda f: f["tasks"]["t"].update(right="01x"), lambda f: f["tasks"]["t"].update(right=""),
    lambda f: f["tasks"]["t"].update(right=5), lambda f: f["tasks"]["t"].update(accuracy=None),
    lambda f: f.update(tasks={}), lambda f: f.update(accuracy="all"), lambda f: f.update(phenomena=5),
    lambda f: f.pop("sha256")])
def test_scores_that_are_none(tmp_path, change):
    folder = dict(accuracy=0.5, se=0.1, n=2, sha256="a", phenomena={},
                  tasks=dict(t=dict(accuracy=0.5, se=0.1, n=2, right="01")))
    for name in "ab":
        (tmp_path / name).write_text(json.dumps(dict(folders=dict(p=folder))))
    compare.main([str(tmp_path / "a"), str(tmp_path / "b")])
    change(folder)
    (tmp_path / "b").write_text(json.dumps(dict(folders=dict(p=folder))))
    with pytest.raises(SystemExit, match="b is damaged"):
        compare.main([str(tmp_path / "a"), str(tmp_path / "b")])


def test_other_answers_under_the_same_hash(tmp_path):
    for name, right in (("a", "01"), ("b", "011")):
        row = dict(accuracy=0.5, se=0.1, n=2)
        folder = dict(row, sha256="a", phenomena={}, tasks=dict(t=dict(row, right=right)))
        (tmp_path / name).write_text(json.dumps(dict(folders=dict(p=folder))))
    with pytest.raises(SystemExit, match="scored on other pairs"):
        compare.main([str(tmp_path / "a"), str(tmp_path / "b")])


@pytest.mark.parametrize("printed", ["", "{}", DEEP, "[1]", '{"tokens_per_s": "x"}', "\\xff"])
def test_a_peer_that_prints_no_results(tmp_path, printed, capsys):
    peer = tmp_path / "peer.py"
    peer.write_text(f"import sys; sys.stdout.buffer.write({printed.encode()!r})")
    with pytest.raises(SystemExit, match="'p' printed no JSON line of results last"):
        bench.measure_in_turn({"p": [str(peer)]}, 1)
    with pytest.raises(SystemExit, match="peer=nowhere.py must be a script"):
        bench.main(bench.BenchConfig(peer="nowhere.py"))


# --- where results go, and labels -----------------------------------------------------------------

def test_a_folder_that_cannot_be_written_is_found_before_work(tools, tmp_path, monkeypatch):
    """A file system that is read-only (root may write anywhere else)."""
    def refuse(path):
        raise SystemExit(f"error: cannot write {path}")
    for module in (finetune, eval_blimp, surprisal):
        monkeypatch.setattr(module, "check_writable", refuse)
    monkeypatch.setattr(finetune, "finetune", None)
    monkeypatch.setattr(eval_blimp, "score_items", None)
    monkeypatch.setattr(surprisal, "line_surprisals", None)
    for name in ("finetune", "eval", "surprisal"):
        status, stderr, _ = in_child(tools.work(name, tmp_path))
        assert status == 1 and stderr.startswith("error: cannot write"), stderr


@pytest.mark.parametrize("labels", [(0, 1, 2), ("a", "b", "c"), (0,)])
def test_labels_are_counted_before_training(tools, tmp_path, labels, monkeypatch):
    monkeypatch.setattr(finetune, "finetune", None)
    write_task(tmp_path / "glue", "rte", n=9, valid=9, labels=labels)
    with pytest.raises(SystemExit, match=r"rte.train.jsonl: \d labels \(.*\), rte has 2"):
        finetune.main(FinetuneConfig(ckpt=(tools.teacher,), data=str(tmp_path / "glue"), tasks=("rte",),
                                     out_dir=str(tmp_path / "out"), max_length=32, device="cpu"))
    assert not os.path.exists(tmp_path / "out")
