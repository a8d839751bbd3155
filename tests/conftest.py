"""What several test files share: a small corpus from the demo's grammar, prepared, and two tiny teachers."""
import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import demo  # noqa: E402
import prepare  # noqa: E402
import train  # noqa: E402

# a model and recipe of which a step takes milliseconds
TINY = dict(vocab_size=500, n_layer=2, n_head=2, n_embd=32, intermediate_size=48, block_size=64, seq_len=32, batch_size=8,
            epochs=1, max_iters=6, eval_interval=3, eval_chunks=16, log_interval=1, learning_rate=1e-2, warmup_iters=2,
            device="cpu", dtype="float32", compile="off")
GPT2 = dict(arch="gpt2", tie_weights=True, norm_eps=1e-5, dropout=0.1)


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: only in `make test-all`")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with text/ (BabyLM layout) and pairs/ (minimal pairs)."""
    folder = tmp_path_factory.mktemp("corpus")
    demo.write_text(demo.DemoConfig(seed=7, dir=str(folder), lines=600))
    return str(folder)


@pytest.fixture(scope="session")
def data(corpus):
    """The corpus prepared, <s> at each line."""
    prepare.main(prepare.PrepareConfig(input_dir=f"{corpus}/text", data_dir=f"{corpus}/data", vocab_size=500, bos="line"))
    return f"{corpus}/data"


@pytest.fixture(scope="session")
def teachers(data, tmp_path_factory):
    """Run folders of a trained GPT-2, a Llama and a grouped-query Llama."""
    out = tmp_path_factory.mktemp("teachers")
    for name, change in (("gpt2", GPT2), ("llama", {}), ("gqa", dict(n_head=4, n_kv_head=2, seed=3))):
        run_train(data, str(out / name), **change)
    return [str(out / name) for name in ("gpt2", "llama", "gqa")]


def run_train(data, out, **change):
    train.main(train.TrainConfig(**{**TINY, **change, "data_dir": data, "out_dir": str(out)}))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
