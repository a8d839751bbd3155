"""Config files and command lines, mutated at random: each ends in success or in one clear line."""
import contextlib
import os
import re
import resource
import signal
import sys

import numpy as np
import pytest

import distill
import eval_blimp
import prepare
import sample
import train
from helpers import TINY, flags_of, thorough, write_task
from lib.configurator import launch
from tools import finetune, plot, surprisal

HOSTILE = [
    "", "0", "-1", "1", "2", "7", "1e400", "nan", "inf", "-inf", "0.5", "1e-320", "99999999999999999999",
    "9223372036854775807", "123456789", "None", "True", "false", "[]", "{}", "()", "a,b", ",", ",,", "'", '"',
    "\\", "%s", "{0}", "$HOME", "~", "/", ".", "..", "/dev/null", "/proc/self/mem", "=", "==", "--", "-", "ü",
    "\u202e", "\U0001f600", "a" * 5000, "\x00", "\n", "\t", " ", "float32", "bfloat16", "int8", "cpu", "gpt2",
    "llama", "token", "x.pt", "0x10", "1_000", "١٢", "1,2,3", "*", "lambda: 0", "__import__('os')", "1/0"]
LINES = [
    "n_layer = 'x'", "n_layer = None", "n_layer: int = 1", "from math import *", "import os", "def f(): pass",
    "class A: pass", "1/0", "raise SystemExit", "raise KeyboardInterrupt", "raise RecursionError", "x = (",
    "\tn_layer = 1", "n_layer = [1]", "n_layer = float('nan')", "learning_rate = 1j", "teachers = 'a'",
    "teachers = ('a', 1)", "seed = True", "seed = 10**400", "exit()", "import sys; sys.exit('bye')",
    "n_layer = n_layer", "del n_layer", "\x00", "# -*- coding: nope -*-", "dropout = 2**0.5", "_ = 1",
    "__name__ = 1", "lr = 3e-4", "assert False, 'two\\nlines'", "out_dir = b'x'", "vocab_size = 500.0",
    "beta1 = '0.9'", "open('/nonexistent')", "batch_size = 8 if seed else 4", "print('hello')",
    "warmup_iters = 1e3", "import nothing_like_this"]


def programs(corpus, data, teachers, out):
    """name -> (main, settings class, arguments that work)."""
    write_task(f"{out}/glue", n=8, valid=4)
    with open(f"{out}/text", "w") as f:
        f.write("the dog sees a cat\n")
    base = {**TINY, "max_iters": 2, "data_dir": data, "out_dir": f"{out}/run"}
    return {
        "train": (train.main, train.TrainConfig, base),
        "distill": (distill.main, distill.DistillConfig, dict(
            base, teachers=",".join(teachers[:2]), alpha=0.5, temperature=2.0)),
        "prepare": (prepare.main, prepare.PrepareConfig, dict(
            input_dir=f"{corpus}/text", data_dir=f"{out}/data", vocab_size=500, bos="line", workers=1)),
        "eval": (eval_blimp.main, eval_blimp.EvalConfig, dict(
            ckpt=teachers[1], data=f"{corpus}/pairs", device="cpu", out=f"{out}/e.json")),
        "finetune": (finetune.main, finetune.FinetuneConfig, dict(
            ckpt=teachers[1], data=f"{out}/glue", tasks="rte", out_dir=f"{out}/ft", device="cpu",
            max_length=32, batch_size=4, epochs=1, lora_rank=2, lora_dropout=0.1, warmup_share=0.1)),
        "surprisal": (surprisal.main, surprisal.SurprisalConfig, dict(
            ckpt=teachers[1], text=f"{out}/text", words=f"{out}/text", device="cpu")),
        "plot": (plot.main, plot.PlotConfig, dict(curves=",".join(teachers), out=f"{out}/p", width=5.0)),
        "sample": (sample.main, sample.SampleConfig, dict(
            ckpt=teachers[1], prompt="the", length=3, device="cpu")),
    }


def mutated(settings, rng, folder):
    """A command line with one to three faults, part of it in a config file."""
    flags = flags_of(settings)
    lines = []
    for _ in range(rng.integers(1, 4)):
        i = int(rng.integers(len(flags)))
        key, _, value = flags[i].partition("=")
        hostile = HOSTILE[rng.integers(len(HOSTILE))]
        match rng.integers(8):
            case 0 | 1 | 2:
                flags[i] = f"{key}={hostile}"
            case 3:
                flags[i] = key
            case 4:
                flags[i] = flags[i][:rng.integers(len(flags[i]))] + flags[i][rng.integers(len(flags[i])):]
            case 5:
                flags.append(hostile)
            case 6:
                del flags[i]
                if not flags:
                    flags = [hostile]
            case 7:
                lines.append(LINES[rng.integers(len(LINES))])
    if lines or rng.random() < 0.3:
        path = os.path.join(folder, "c.py")
        settings = [f"seed = {rng.integers(9)}", f"log_interval = {HOSTILE[rng.integers(20)]}"]
        with open(path, "w") as f:
            f.write("\n".join(lines + settings[:int(rng.integers(3))]) + "\n")
        flags.insert(int(rng.integers(len(flags) + 1)), path)
    return flags


def outcome(main, cls, argv, folder):
    """(exit status, what was printed as the error) of a script in a child with bounded memory and time."""
    path = os.path.join(folder, "stderr")
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)  # a run that long is a run
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
        os.chdir(folder)
        sys.argv = ["script", *argv]
        with (open(path, "w") as err, open(os.devnull, "w") as null,
              contextlib.redirect_stderr(err), contextlib.redirect_stdout(null)):
            code = 0
            try:
                launch(main, cls)
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 1
                if isinstance(e.code, str):
                    print(e.code, file=err)
            except BaseException as e:
                code = 99
                print(f"{type(e).__name__}: {e}", file=err)
            err.flush()
        os._exit(code or 0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(path) as f:
        return status, f.read()


def test_settings_that_are_not_mutated_succeed(corpus, data, teachers, tmp_path):
    """Or the test below would be passed by scripts that always fail."""
    for name in programs(corpus, data, teachers, tmp_path):
        folder = str(tmp_path / name)
        os.mkdir(folder)
        main, cls, settings = programs(corpus, data, teachers, folder)[name]
        assert outcome(main, cls, flags_of(settings), folder)[0] == 0, name


@pytest.mark.parametrize("seeds", thorough([range(i, i + 20) for i in range(0, 500, 20)], 5))
def test_mutated_settings_end_in_success_or_one_line(corpus, data, teachers, tmp_path, seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        folder = str(tmp_path / str(seed))
        os.mkdir(folder)
        chosen = programs(corpus, data, teachers, folder)
        name = list(chosen)[seed % len(chosen)]
        main, cls, settings = chosen[name]
        argv = mutated(settings, rng, folder)
        status, err = outcome(main, cls, argv, folder)
        errors = [line for line in err.splitlines() if not re.match(r"notice:|\s*\d+%|.*Warning|  ", line)]
        told = (seed, name, status, argv, err[-500:])
        assert status in (0, 1, -signal.SIGALRM), told
        assert len(errors) == (status == 1) and not any("Traceback" in line for line in errors), told
