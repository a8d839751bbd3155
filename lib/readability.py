"""How hard text is to read: counts of each source, which prepare.py keeps in meta.json, and from them the
five measures and the buckets of Baby Llama's curriculum (appendix B, footnote 9).

The paper used the package textstat. As there, sentences of one or two words are not counted. Not as there, a
line end is a sentence end too, for speech is often written without full stops; but not after a comma, where
Switchboard's sentences go on in the next line. Syllables are groups of vowels, without a mute e at the end.
"""
import json
import re

import numpy as np

NO_TEXT = re.compile(r"\n(?:= = =.*|\*?[A-Z][A-Z0-9]*:[ \t])")  # headings, and marks of who speaks
MEASURES = ("reading ease", "Flesch-Kincaid", "Gunning fog", "ARI", "SMOG")


def table(characters):
    return bytes(byte in characters for byte in range(256))


VOWEL, LETTER = table(b"aeiouy"), table(b"abcdefghijklmnopqrstuvwxyz0123456789")
BLANK, STOP = table(b" \t\n\r\f\v"), table(b".!?")


def count_text(text):
    """W words, S sentences, Y syllables, K characters without blanks, P words of three syllables or more.
    By arrays over all bytes: word by word it would be a fifth of prepare.py's work."""
    text = NO_TEXT.sub("\n", f"\n{text}\n")
    raw = text.encode().lower()
    byte = np.frombuffer(raw, np.uint8)
    vowel, letter, blank, stop = (np.frombuffer(raw.translate(t), bool) for t in (VOWEL, LETTER, BLANK, STOP))
    consonant = letter & ~vowel
    first = np.flatnonzero(before(blank) & ~blank)  # bytes of words
    le = (byte == ord("l")) & before(consonant)     # 'table' has two syllables, 'whole' one
    mute = (byte == ord("e")) & before(consonant & ~le) & ~before(letter, -1)
    begins = vowel & ~before(vowel) & ~mute
    y = np.maximum(np.add.reduceat(begins, first, dtype=np.int32), 1)  # syllables of each word
    ends = stop | (byte == ord("\n")) & ~before(byte == ord(","))
    lengths = np.bincount(np.cumsum(ends, dtype=np.int32)[first])      # words of each sentence
    return dict(W=len(first), S=int((lengths > 2).sum()), Y=int(y.sum()), K=len(text) - int(blank.sum()),
                P=int((y > 2).sum()))


def before(true, n=1):
    """What is true n bytes before each. Around the end: there are line ends at both."""
    return np.roll(true, n)


def measures(W, S, Y, K, P):
    """In the order of MEASURES; P is also fog's 'difficult words'."""
    W, S = max(W, 1), max(S, 1)
    return (206.835 - 1.015 * W / S - 84.6 * Y / W,
            0.39 * W / S + 11.8 * Y / W - 15.59,
            0.4 * (W / S + 100 * P / W),
            4.71 * K / W + 0.5 * W / S - 21.43,
            1.043 * (30 * P / S) ** 0.5 + 3.1291)


def curriculum(counts, n_buckets):
    """The sources of {source: its counts} from easy to hard, as the text of a config. The paper gives no rule
    from measures to buckets. Ours: a source's difficulty is the mean of its five z-scores among the sources,
    that of reading ease negated; cut at the widest gaps."""
    names, values = list(counts), np.array([measures(**n) for n in counts.values()])
    z = (values - values.mean(0)) / np.maximum(values.std(0), 1e-9) * (-1, 1, 1, 1, 1)
    difficulty = z.mean(1)
    order = np.argsort(difficulty, kind="stable")
    gaps = np.diff(difficulty[order])
    cuts = np.sort(np.argsort(-gaps, kind="stable")[:n_buckets - 1]) + 1
    rows = [f"# {'source':20} {'words':>11}" + "".join(f"{name:>16}" for name in MEASURES) + "  difficulty"]
    rows += [f"# {names[i]:20} {counts[names[i]]['W']:>11,}" + "".join(f"{v:16.1f}" for v in values[i])
             + f"{difficulty[i]:12.2f}" for i in order]
    buckets = [" ".join(names[i] for i in part) for part in np.split(order, cuts)]
    return "\n".join([*rows, f"curriculum = {json.dumps(buckets, ensure_ascii=False)}",
                      "curriculum_epochs = 3", f"epochs = {3 * n_buckets}"])
