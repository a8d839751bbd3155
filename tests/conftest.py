"""Fixtures: a small corpus from the demo's grammar, prepared, and tiny teachers."""
import os

import pytest
import torch

from helpers import GPT2, VOCAB, run_train  # first: it makes the project importable

# isort: split
import prepare
from lib.machine import can_compile
from tools import demo


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: only in `make test-all`")
    config.addinivalue_line("markers", "slow: more than a few seconds; not in `make quick`")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with text/ (BabyLM layout) and pairs/ (minimal pairs)."""
    folder = tmp_path_factory.mktemp("corpus")
    demo.write_text(demo.DemoConfig(seed=7, dir=str(folder), lines=600))
    return str(folder)


@pytest.fixture(scope="session")
def data(corpus):
    """The corpus prepared, <s> at each line."""
    folder = f"{corpus}/data"
    prepare.main(prepare.PrepareConfig(input_dir=f"{corpus}/text", data_dir=folder, vocab_size=VOCAB,
                                       bos="line"))
    return folder


@pytest.fixture(scope="session")
def teachers(data, tmp_path_factory):
    """Run folders of a trained GPT-2, a Llama and a grouped-query Llama."""
    out = tmp_path_factory.mktemp("teachers")
    for name, change in (("gpt2", GPT2), ("llama", {}), ("gqa", dict(n_head=4, n_kv_head=2, seed=3))):
        run_train(data, str(out / name), **change)
    return [str(out / name) for name in ("gpt2", "llama", "gqa")]


@pytest.fixture(scope="session")
def byte_gpt2(corpus, tmp_path_factory):
    """(Hugging Face folder, run folder) of a GPT-2 with large random weights and a byte-level tokenizer."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    from tools import hf
    folder = tmp_path_factory.mktemp("byte_gpt2")
    files = [os.path.join(corpus, "text/train_10M", f) for f in os.listdir(f"{corpus}/text/train_10M")]
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train(sorted(files), vocab_size=VOCAB, show_progress=False, special_tokens=["<pad>", "<s>", "</s>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>",
                                         pad_token="<pad>").save_pretrained(folder / "hf")
    torch.manual_seed(1)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2)).save_pretrained(folder / "hf")
    hf.main(["import", str(folder / "hf"), str(folder / "run")])
    return str(folder / "hf"), str(folder / "run")


@pytest.fixture(scope="session")
def compiler():
    """For tests of compiled runs: skipped where torch.compile does not work."""
    if not can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work on this machine")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
