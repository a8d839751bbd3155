"""Surprisal per word against the difference of two texts' log-probabilities."""
import pytest
import torch

from distill import Teacher
from lib.checkpoints import load_checkpoint
from tools import surprisal
from tools.surprisal import SurprisalConfig


def table(path):
    with open(path, encoding="utf-8") as f:
        rows = [line.split("\t") for line in f.read().splitlines()[1:]]
    return {word: (int(n), float(nats)) for word, n, nats in rows}


def logp(model, ids):
    """log p(ids[1:] | ids[0]), in float64 if the model is."""
    with torch.no_grad():
        z = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return sum(z[i, t].item() for i, t in enumerate(ids[1:]))


@pytest.mark.parametrize("which", [0, 1])
def test_a_words_surprisal_is_what_it_adds(teachers, tmp_path, which):
    (tmp_path / "t").write_text("The dog sees a cat .\nA naïve dog, barks!\n\n", encoding="utf-8")
    surprisal.main(SurprisalConfig(ckpt=(teachers[which],), text=str(tmp_path / "t"), out=str(tmp_path / "o"),
                                   device="cpu"))
    got = table(tmp_path / "o")
    model, tokenizer, _ = load_checkpoint(teachers[which])
    model.double()

    def added(before, word):
        ids = [1] + tokenizer.encode(before)
        so_far = logp(model, ids) if len(ids) > 1 else 0
        return so_far - logp(model, ids + tokenizer.encode(word))

    def near(*nats):
        return pytest.approx(sum(nats) / len(nats), abs=1e-3)
    assert set(got) == {"the", "dog", "sees", "a", "cat", "naïve", "barks"}
    assert got["the"] == (1, near(added("", " The")))
    assert got["sees"] == (1, near(added(" The dog", " sees")))
    assert got["naïve"] == (1, near(added(" A", " naïve")))
    assert got["dog"] == (2, near(added(" The", " dog"), added(" A naïve", " dog")))  # without its comma
    assert got["a"] == (2, near(added(" The dog sees", " a"), added("", " A")))


def test_several_models_speak_as_one(teachers, tmp_path):
    """The mean of their logits, as everywhere."""
    (tmp_path / "t").write_text("the dog\n")
    surprisal.main(SurprisalConfig(ckpt=tuple(teachers[:2]), text=str(tmp_path / "t"),
                                   out=str(tmp_path / "o"), device="cpu"))
    models = [load_checkpoint(path)[0] for path in teachers[:2]]
    tokenizer = load_checkpoint(teachers[0])[1]
    expected = -logp(lambda x: (models[0](x) + models[1](x)) / 2, [1] + tokenizer.encode(" the"))
    assert table(tmp_path / "o")["the"] == (1, pytest.approx(expected, abs=1e-3))


def test_a_line_longer_than_the_model_keeps_half_its_context(teachers):
    model, tokenizer, _ = load_checkpoint(teachers[1])
    line = " ".join(["the dog sees a cat ."] * 40)
    got = surprisal.line_surprisals([Teacher(model)], tokenizer, 1, line)
    ids = [1] + tokenizer.encode(" " + line)
    assert len(ids) > 3 * 64 and len(got) == 5 * 40
    cat = len(tokenizer.encode(" cat"))
    last = len(ids) - len(tokenizer.encode(" .")) - cat
    full = [logp(model, ids[k:last]) - logp(model, ids[k:last + cat]) for k in range(last - 62, last - 31)]
    assert min(abs(got[-1][1] - nats) for nats in full) < 1e-3


def test_chosen_words_and_bad_input(teachers, tmp_path, capsys):
    text = str(tmp_path / "t")
    (tmp_path / "t").write_text("the dog sees\n")
    (tmp_path / "w").write_text("sees\nzebra\nDog\n")
    surprisal.main(SurprisalConfig(ckpt=(teachers[1],), text=text, words=str(tmp_path / "w"), device="cpu"))
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == ["word", "sees", "dog"]
    assert "1 of 3 words" in err
    (tmp_path / "bad").write_bytes(b"ab\xff")
    for change, message in ((dict(text=""), "which model reads what"),
                            (dict(text=str(tmp_path / "bad")), "byte 2 is not UTF-8"),
                            (dict(text=text, out=str(tmp_path)), "cannot write")):
        with pytest.raises(SystemExit, match=message):
            surprisal.main(SurprisalConfig(**{"ckpt": (teachers[1],), **change}))


def test_punctuation_made_of_bytes_is_not_the_words(teachers):
    model, tokenizer, _ = load_checkpoint(teachers[1])
    model.double()
    (word, nats), = surprisal.line_surprisals([Teacher(model, torch.float64)], tokenizer, 1, "“dog”")
    quote = tokenizer.encode(" “")
    assert len(quote) == 4  # a blank and three bytes
    ids = [1] + tokenizer.encode(" “dog")
    assert word == "dog" and nats == pytest.approx(logp(model, [1] + quote) - logp(model, ids), abs=1e-3)
