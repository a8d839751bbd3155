"""What several test files use: a tiny recipe, runs of it, and what they leave."""
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import traceback

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import distill  # noqa: E402
import train  # noqa: E402
from distill import DistillConfig  # noqa: E402
from lib.checkpoints import find_resumable, load_checkpoint, load_state  # noqa: E402
from lib.files import sha256  # noqa: E402
from lib.shards import Shards  # noqa: E402
from train import TrainConfig  # noqa: E402

# a model and recipe of which a step takes milliseconds
TINY = dict(n_layer=2, n_head=2, n_embd=32, intermediate_size=48, block_size=64, seq_len=32, batch_size=8,
            epochs=1, max_iters=6, eval_interval=3, eval_chunks=16, log_interval=1, learning_rate=1e-2,
            warmup_iters=2, device="cpu", dtype="float32", compile="off")
GPT2 = dict(arch="gpt2", tie_weights=True, norm_eps=1e-5, dropout=0.1)
VOCAB = 500  # of the tests' corpus

# real text and evaluation data, in the layout corpus/ and eval/; the tests that want them skip without
REAL = os.environ.get("NANOBABYLLAMA_DATA", "")


def real(*names):
    """The path of something in the folder of real data, or skip."""
    path = os.path.join(REAL, *names)
    if not REAL or not os.path.exists(path):
        pytest.skip(f"wants {os.path.join(*names)} in the folder that NANOBABYLLAMA_DATA names")
    return path


def thorough(cases, sample):
    """All cases for `make test-all`, `sample` of them for `make test`."""
    rest = [pytest.param(case, marks=pytest.mark.thorough) for case in cases[sample:]]
    return [*cases[:sample], *rest]


def train_config(data, out, **change):
    return TrainConfig(**{**TINY, **change, "data_dir": data, "out_dir": str(out)})


def distill_config(data, out, **change):
    return DistillConfig(**{**TINY, **change, "data_dir": data, "out_dir": str(out)})


def run_train(data, out, **change):
    train.main(train_config(data, out, **change))


def run_distill(data, out, teachers, **change):
    distill.main(distill_config(data, out, teachers=tuple(teachers), **change))


def flags_of(settings):
    return [f"--{k}={','.join(v) if isinstance(v, (list, tuple)) else v}" for k, v in settings.items()]


def start_torchrun(script, *args, ranks=2, options=(), **popen):
    """A script on `ranks` processes of one thread each: the Popen. options: torchrun's own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    if not any(option.startswith("--nnodes") for option in options):
        launcher.append("--standalone")
    return subprocess.Popen([*launcher, *options, os.path.join(ROOT, script), *args],
                            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **popen},
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_ranks(work, ranks=2):
    """work() by several ranks, all of them to a good end: what torchrun does, in processes forked from this
    one, which has imported torch."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                                  MASTER_PORT=str(port))
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)  # come what may: there is a second pytest in here
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * ranks


class GraphOnCPU:
    """torch.cuda.CUDAGraph without a GPU: the operations that ran while it was recorded, run again on the
    same tensors."""

    def __init__(self):
        self.calls, self.replays = [], 0

    def pool(self):
        pass

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, outs in self.calls:
            for old, new in zip(tree_leaves(outs), tree_leaves(func(*args, **kwargs))):
                old.copy_(new)


class RecordOnCPU(TorchDispatchMode):
    """torch.cuda.graph for it."""

    def __init__(self, graph, pool=None):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outs = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, outs))
        return outs


def graphs_on_cpu(setattr=setattr):
    """Runs on the CPU record and replay their models' bodies from here on. setattr: a monkeypatch's. Returns
    the list of the graphs."""
    graphs = []
    setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(GraphOnCPU()) or graphs[-1])
    setattr(torch.cuda, "graph", RecordOnCPU)
    setattr(torch.cuda, "Stream", lambda: None)
    setattr(torch.cuda, "stream", contextlib.nullcontext)
    setattr(torch.cuda, "synchronize", lambda: None)
    start = train.start

    def start_with_graphs(cfg):
        machine, data = start(cfg)
        return machine._replace(graphs=True), data
    for module in train, distill:
        setattr(module, "start", start_with_graphs)
    return graphs


def records(out):
    """The lines of a run's metrics.jsonl."""
    return read_jsonl(os.path.join(out, "metrics.jsonl"))


def validations(out):
    """The records of a run that have a validation loss."""
    return [record for record in records(out) if "val_ce" in record]


def assert_same_log(a, b, keys, **tolerance):
    """Two runs' records have the same values of `keys`, at the same steps."""
    for one, other in zip(records(a), records(b), strict=True):
        for key in keys:
            assert (key in one) == (key in other), (one["step"], key)
            assert key not in one or one[key] == pytest.approx(other[key], **tolerance), (one["step"], key)


def read_jsonl(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def weights(out):
    return load_checkpoint(str(out))[0].state_dict()


def saved_state(folder):
    """The tensors beside the weights that a checkpoint folder resumes from."""
    return load_state(str(folder))[0]


def validation_tokens(data):
    """The chunks that runs of TINY are validated on, each with the token after it."""
    shards, length = Shards(data, "val"), TINY["seq_len"]
    chosen = np.random.default_rng(2023).permutation((len(shards) - 1) // length)[:TINY["eval_chunks"]]
    return shards.windows(chosen * length, length + 1)


def assert_same(a, b, **tolerance):
    """Two state dicts, bit for bit unless a tolerance is named."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or dict(rtol=0, atol=0)))


def cut_short(monkeypatch, after):
    """Make a run die like a killed process at the beginning of optimizer step `after`."""
    real_rate = train.learning_rate

    def dying(cfg, step, total):
        if step == after:
            raise KeyboardInterrupt
        return real_rate(cfg, step, total)
    monkeypatch.setattr(train, "learning_rate", dying)


def assert_same_run(a, b):
    """Weights, all that a run goes on from, and metrics, bit for bit; no step twice and none missing."""
    assert_same(weights(a), weights(b))
    (tensors, counters), (other_tensors, other_counters) = (load_state(find_resumable(str(out)))
                                                            for out in (a, b))
    assert_same(tensors, other_tensors)
    assert counters == other_counters
    log, other_log = ([{**record, "tokens_per_s": 0} for record in records(out)] for out in (a, b))
    assert log == other_log
    assert [record["step"] for record in log if record["step"]] == list(range(1, counters["step"] + 1))


@contextlib.contextmanager
def killed_at(monkeypatch, step):
    """The run within dies like a killed process at the beginning of that step."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_short(patch, step)
        yield


def assert_resumes(run, folder, monkeypatch, step):
    """run(out_dir, resume) into folder/whole, and into folder/cut killed at that step and resumed: the same
    bits."""
    run(folder / "whole", resume=False)
    with killed_at(monkeypatch, step):
        run(folder / "cut", resume=False)
    assert records(folder / "cut")[-1]["step"] == step
    run(folder / "cut", resume=True)
    assert_same_run(folder / "whole", folder / "cut")


def edit_json(path, **change):
    with open(path) as f:
        value = json.load(f)
    with open(path, "w") as f:
        json.dump({**value, **change}, f)


def reseal(folder, file):
    """Give a changed file of a checkpoint its right checksum."""
    edit_json(os.path.join(folder, "sha256.json"), **{file: sha256(os.path.join(folder, file))})


def write_pairs(folder, task, rows):
    """A task of minimal pairs, (good, bad) or (good, bad, phenomenon) each."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, task + ".jsonl"), "w", encoding="utf-8") as f:
        for good, bad, *term in rows:
            named = {"linguistics_term": term[0]} if term else {}
            f.write(json.dumps(dict(sentence_good=good, sentence_bad=bad, **named)) + "\n")


def write_task(folder, task="rte", n=96, valid=32, labels=(0, 1), noise=0.0):
    """A fine-tuning task a tiny model can learn: does the first text name a dog?"""
    rng = random.Random(3)
    os.makedirs(folder, exist_ok=True)
    for split, count in (("train", n), ("valid", valid)):
        with open(os.path.join(folder, f"{task}.{split}.jsonl"), "w") as f:
            for i in range(count):
                label = i % len(labels)
                noun = ("cat", "dog", "boy")[label]
                row = dict(sentence1=f"the {noun} sees a {rng.choice(['girl', 'teacher'])}.",
                           sentence2=f"{rng.choice(['a', 'the'])} girl runs.",
                           label=labels[label if rng.random() >= noise else 0], premise="the " + noun,
                           hypothesis="a girl.")
                f.write(json.dumps(row) + "\n")
    return str(folder)
