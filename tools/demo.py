"""The whole pipeline on text it makes itself: `make demo`, or

    python -m tools.demo --seed=1 --dir=demo

A seeded grammar of child-like English writes a corpus and held-out minimal pairs in BLiMP's format;
then the commands a user would type prepare it, train a GPT-2 and a Llama teacher, a student without
and one with distillation (same size, same steps), evaluate all of them and the teachers' ensemble,
and sample. Ends in one table.
"""
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from lib.configurator import ROOT, launch
from lib.files import read_json

MADE = ("text", "pairs", "data", "gpt2", "llama", "plain", "distilled")


@dataclass
class DemoConfig:
    seed: int = 1        # of the text, the models and the order of the data
    dir: str = "demo"    # everything goes here, in the place of an earlier demo's
    lines: int = 2000    # of training text


def main(cfg):
    marker = ".made_by_demo"
    there = os.listdir(cfg.dir) if os.path.isdir(cfg.dir) else []
    if not cfg.dir or there and marker not in there or os.path.isfile(cfg.dir):
        sys.exit(f"error: dir='{cfg.dir}' is not an earlier demo; name another --dir")
    os.makedirs(cfg.dir, exist_ok=True)
    open(os.path.join(cfg.dir, marker), "w").close()
    for name in MADE:  # not the studies that config/demo/ puts beside them
        shutil.rmtree(os.path.join(cfg.dir, name), ignore_errors=True)
    write_text(cfg)
    begin = time.perf_counter()
    train_and_score(cfg.dir, f"--seed={cfg.seed}")
    table(cfg, time.perf_counter() - begin)


def train_and_score(d, seed):
    """From text to scores, one command after the other."""
    data, pairs = f"--data_dir={d}/data", f"--data={d}/pairs"
    recipe, student = "config/demo/demo.py", "config/demo/student.py"
    command("prepare.py", f"--input_dir={d}/text", data, "--bos=line", "--vocab_size=600")
    command("train.py", recipe, "config/demo/gpt2.py", data, f"--out_dir={d}/gpt2", seed)
    command("train.py", recipe, "config/demo/llama.py", data, f"--out_dir={d}/llama", seed)
    command("train.py", recipe, student, data, f"--out_dir={d}/plain", seed)
    command("distill.py", recipe, student, data, f"--teachers={d}/gpt2,{d}/llama", "--temperature=1",
            f"--out_dir={d}/distilled", seed)
    for name in ("gpt2", "llama", "plain", "distilled"):
        command("eval_blimp.py", f"--ckpt={d}/{name}", pairs)
    command("eval_blimp.py", f"--ckpt={d}/gpt2,{d}/llama", pairs, f"--out={d}/ensemble_blimp.json")
    command("sample.py", f"--ckpt={d}/distilled", "--prompt=the little dog", "--length=60")


def command(script, *args):
    """Show the command a user would type, and run it with this Python. Stops the demo if it fails."""
    print("\n$", shlex.join(["python", script, *args]), flush=True)
    paths = [os.path.join(ROOT, arg) if arg.startswith("config/") else arg for arg in args]
    code = subprocess.run([sys.executable, os.path.join(ROOT, script), *paths]).returncode
    if code:
        sys.exit(f"error: {script} failed, the demo stops here")


def table(cfg, seconds):
    """What the runs left in their folders, side by side."""
    def read(path):
        return read_json(os.path.join(cfg.dir, path))

    def metrics(name):
        with open(os.path.join(cfg.dir, name, "metrics.jsonl")) as f:
            return [json.loads(line) for line in f]

    rows = []
    for title, name in (("teacher, GPT-2", "gpt2"), ("teacher, Llama", "llama"),
                        ("student, plain", "plain"), ("student, distilled", "distilled")):
        best = read(f"{name}/best.json")
        parameters = read(f"{name}/{best['folder']}/config.json")["parameters"]
        speed = statistics.median_high(line["tokens_per_s"] for line in metrics(name) if line["step"])
        rows.append((title, f"{parameters:,}", best["val_ce"], read(f"{name}/blimp.json"), f"{speed:,}"))
    rows.append(("ensemble of both teachers", "", metrics("distilled")[0]["ensemble_val_ce"],
                 read("ensemble_blimp.json"), ""))
    print(f"\nseed {cfg.seed}, {seconds / 60:.1f} minutes\n")
    print("| model                     | parameters | validation loss | accuracy | tokens/s |")
    print("|---------------------------|------------|-----------------|----------|----------|")
    for title, parameters, ce, blimp, speed in rows:
        accuracy = 100 * blimp["folders"]["pairs"]["accuracy"]
        print(f"| {title:25} | {parameters:>10} | {ce:15.4f} | {accuracy:7.1f}% | {speed:>8} |")
    print("\nvalidation loss in nats per token on held-out text; "
          "accuracy on held-out minimal pairs, chance is 50%")


# --- the grammar ----------------------------------------------------------------------------------

PEOPLE = {"boy": "himself", "girl": "herself", "man": "himself", "woman": "herself", "king": "himself",
          "queen": "herself", "father": "himself", "mother": "herself", "uncle": "himself", "aunt": "herself",
          "prince": "himself", "sister": "herself", "brother": "himself", "actress": "herself",
          "waiter": "himself", "nurse": "herself"}
ANIMALS = """dog cat bird duck horse cow pig bear fox rabbit hen frog lion tiger mouse goose sheep
    monkey""".split()
THINGS = """ball book cup hat box car boat apple cake egg fish cookie flower tree house door chair table shoe
    coat toy train kite stone leaf knife spoon plate picture song story letter bottle basket blanket pillow
    bell drum""".split()
PLURALS = {"man": "men", "woman": "women", "mouse": "mice", "goose": "geese", "sheep": "sheep",
           "fish": "fish", "leaf": "leaves", "knife": "knives", "fox": "foxes", "box": "boxes",
           "actress": "actresses", "story": "stories", "monkey": "monkeys"}
# base, third person, past, participle; the first list is intransitive
SLEEP = [verb.split() for verb in """sleep sleeps slept slept, run runs ran run, sing sings sang sung,
    swim swims swam swum, laugh laughs laughed laughed, fall falls fell fallen, wait waits waited waited,
    dance dances danced danced, jump jumps jumped jumped, smile smiles smiled smiled, cry cries cried cried,
    shout shouts shouted shouted, hide hides hid hidden, fly flies flew flown""".split(",")]
SEE = [verb.split() for verb in """see sees saw seen, eat eats ate eaten, take takes took taken,
    give gives gave given, break breaks broke broken, draw draws drew drawn, bring brings brought brought,
    find finds found found, like likes liked liked, want wants wanted wanted, push pushes pushed pushed,
    carry carries carried carried, hold holds held held, throw throws threw thrown, wear wears wore worn,
    choose chooses chose chosen, steal steals stole stolen, write writes wrote written, know knows knew known,
    follow follows followed followed, wash washes washed washed, hurt hurts hurt hurt,
    help helps helped helped, paint paints painted painted""".split(",")]
SELF = [verb for verb in SEE if verb[0] in "see like draw wash hurt help know push hide paint follow".split()]
IRREGULAR = [verb for verb in SEE + SLEEP if verb[2] != verb[3]]  # past and participle differ
ADJECTIVES = """big little old young happy sad red blue green yellow funny quiet fast slow hungry clever brave
    lazy kind tired small tall round soft warm cold clean new""".split()
PREPOSITIONS = "near behind under beside above with".split()
PLACES = ("in the garden,at home,in the park,by the river,at school,on the hill,in the kitchen,"
          "under the bridge,in the forest,on the farm").split(",")
TIMES = "today,every day,at night,in the morning,again,now,after lunch,on sunday".split(",")
SAYS = "i think,mom says,dad knows,we hope,you said,they say".split(",")


class Grammar:
    """Sentences of a probabilistic grammar. Who does what to whom, where, is drawn with weights of
    its own for each verb and noun (Zipf over a shuffled list): there is more to learn than syntax."""

    def __init__(self, seed):
        self.taste = random.Random(f"taste {seed}")  # what goes with what: one language for all its texts
        self.orders = {}

    def favourite(self, rng, key, words):
        """A word of `words`, of those that go with `key` rather than others."""
        key = (key, words[0] if isinstance(words[0], str) else words[0][0], len(words))
        if key not in self.orders:
            self.orders[key] = self.taste.sample(range(len(words)), len(words))
        rank = min(int(rng.paretovariate(0.9)) - 1, len(words) * 3) % len(words)
        return words[self.orders[key][rank]]

    def noun(self, rng, key, words):
        """(form, plural?, base form)."""
        base, plural = self.favourite(rng, key, words), rng.random() < 0.4
        return (PLURALS.get(base, base + "s") if plural else base), plural, base

    def noun_phrase(self, rng, key, words, depth=1, determiner=None):
        """('the big dogs near the boy', plural?, base form of the head)."""
        form, plural, base = self.noun(rng, key, words)
        number = ["these", "those", "some", "many"] if plural else ["this", "that", "a", "every"]
        det = determiner or rng.choice(["the", "the", "the", "my", *number])
        adjective = [self.favourite(rng, base, ADJECTIVES)] if rng.random() < 0.35 else []
        if det == "a" and (adjective or [form])[0][0] in "aeiou":
            det = "an"
        tail = []
        if depth and rng.random() < 0.3:
            other, other_plural, other_base = self.noun_phrase(rng, base, living(), 0)
            verb = self.favourite(rng, other_base, SEE)
            draw = rng.random()
            if draw < 0.45:
                tail = [self.favourite(rng, base, PREPOSITIONS), other]
            elif draw < 0.75:
                tail = ["that", other, verb[0] if other_plural else verb[1]]       # object gap
            else:
                tail = ["that", self.favourite(rng, base, SEE)[0 if plural else 1], other]
        return " ".join([det, *adjective, form, *tail]), plural, base

    def object(self, rng, verb, depth=1):
        return self.noun_phrase(rng, verb[0], THINGS if rng.random() < 0.7 else living(), depth)[0]

    def ending(self, rng, verb):
        where = " " + self.favourite(rng, verb[0], PLACES) if rng.random() < 0.3 else ""
        when = " " + self.favourite(rng, verb[0], TIMES) if rng.random() < 0.15 else ""
        return where + when

    def predicate(self, rng, base):
        """(verb, what follows it) of subject `base`."""
        if rng.random() < 0.35:
            verb = self.favourite(rng, base, SLEEP)
            return verb, self.ending(rng, verb)
        verb = self.favourite(rng, base, SEE)
        return verb, " " + self.object(rng, verb) + self.ending(rng, verb)

    def sentence(self, rng):
        draw = rng.random()
        subject, plural, base = self.noun_phrase(rng, "who", living())
        verb, rest = self.predicate(rng, base)
        if draw < 0.30:
            return f"{subject} {verb[0 if plural else 1]}{rest}."
        if draw < 0.48:
            return f"{subject} {verb[2]}{rest}."
        if draw < 0.58:
            return f"{subject} {'have' if plural else 'has'} {verb[3]}{rest}."
        if draw < 0.66:
            return self.reflexive(rng)[0]
        if draw < 0.74:
            return self.negative(rng)[0]
        if draw < 0.80:
            return f"{'do' if plural else 'does'} {subject} {verb[0]}{rest}?"
        if draw < 0.86:
            return self.wh_question(rng)[0]
        if draw < 0.90:
            return f"who {verb[1]}{rest}?"
        if draw < 0.95:
            adjective = self.favourite(rng, base, ADJECTIVES)
            return f"{subject} {'are' if plural else 'is'} {adjective}."
        return f"{rng.choice(SAYS)} {subject} {verb[0 if plural else 1]}{rest}."

    def reflexive(self, rng):
        """(good, wrong gender, wrong number)."""
        subject, plural, base = self.noun_phrase(rng, "self", list(PEOPLE))
        verb, past = self.favourite(rng, base, SELF), rng.random() < 0.5
        form = verb[2] if past else verb[0 if plural else 1]
        right = "themselves" if plural else PEOPLE[base]
        other = {"himself": "herself", "herself": "himself"}.get(right)
        number = PEOPLE[base] if plural else "themselves"
        return tuple(f"{subject} {form} {word}." if word else None for word in (right, other, number))

    def negative(self, rng):
        """(good, the same without what licenses 'ever' or 'any')."""
        form, plural, base = self.noun(rng, "who", living())
        verb, do = self.favourite(rng, base, SEE), "do" if plural else "does"
        if rng.random() < 0.5:
            says = rng.choice(SAYS)
            tail = f"{form} ever {verb[0 if plural else 1]} {self.object(rng, verb, 0)}."
            return f"{says} no {tail}", f"{says} the {tail}"
        thing = self.noun(rng, verb[0], THINGS)[2]
        tail = f"{verb[0]} any {PLURALS.get(thing, thing + 's')}{self.ending(rng, verb)}."
        return f"the {form} {do} not {tail}", f"the {form} {do} also {tail}"

    def wh_question(self, rng):
        """(good, the same with the gap filled)."""
        subject, plural, base = self.noun_phrase(rng, "who", living(), depth=0)
        verb = self.favourite(rng, base, SEE)
        start = f"what {'do' if plural else 'does'} {subject} {verb[0]}"
        return f"{start}?", f"{start} {self.object(rng, verb, 0)}?"

    # minimal pairs: (good, bad), or None where this draw does not make one

    pair_npi_licensing = negative
    pair_filler_gap = wh_question

    def pair_agreement(self, rng):
        subject, plural, base = self.noun_phrase(rng, "who", living(), depth=0)
        verb, rest = self.predicate(rng, base)
        return tuple(f"{subject} {form}{rest}." for form in agreeing(verb, plural))

    def pair_agreement_distractor(self, rng):
        head, plural, base = self.noun_phrase(rng, "who", living(), depth=0)
        other, other_plural, _ = self.noun_phrase(rng, "who", living(), depth=0)
        verb, rest = self.predicate(rng, base)
        link = self.favourite(rng, base, PREPOSITIONS)
        if plural != other_plural:
            return tuple(f"{head} {link} {other} {form}{rest}." for form in agreeing(verb, plural))

    def pair_agreement_relative_clause(self, rng):
        head, plural, base = self.noun_phrase(rng, "who", living(), depth=0)
        other, other_plural, other_base = self.noun_phrase(rng, "who", living(), depth=0)
        verb, rest = self.predicate(rng, base)
        inner = self.favourite(rng, other_base, SEE)[0 if other_plural else 1]
        if plural != other_plural:
            return tuple(f"{head} that {other} {inner} {form}{rest}." for form in agreeing(verb, plural))

    def pair_determiner_noun(self, rng):
        subject, plural, base = self.noun_phrase(rng, "who", living(), 0, determiner="the")
        verb, (form, many, thing) = self.favourite(rng, base, SEE), self.noun(rng, "what", THINGS)
        wrong = thing if many else PLURALS.get(thing, thing + "s")
        determiner = rng.choice(["these", "those", "many"] if many else ["this", "that", "every"])
        start = f"{subject} {verb[2]} {determiner}"
        return None if wrong == form else (f"{start} {form}.", f"{start} {wrong}.")

    def pair_reflexive_gender(self, rng):
        good, bad, _ = self.reflexive(rng)
        return bad and (good, bad)

    def pair_reflexive_number(self, rng):
        good, _, bad = self.reflexive(rng)
        return good, bad

    def pair_irregular_forms(self, rng):
        subject, plural, base = self.noun_phrase(rng, "who", living(), depth=0)
        verb = rng.choice(IRREGULAR)
        perfect = rng.random() < 0.5
        start = f"{subject} {'have' if plural else 'has'}" if perfect else subject
        forms = (verb[3], verb[2]) if perfect else (verb[2], verb[3])
        rest = " " + self.object(rng, verb, 0) if verb in SEE else self.ending(rng, verb)
        return tuple(f"{start} {form}{rest}." for form in forms)

    def pair_question_agreement(self, rng):
        subject, plural, base = self.noun_phrase(rng, "who", living(), depth=0)
        verb, rest = self.predicate(rng, base)
        return tuple(f"{do} {subject} {verb[0]}{rest}?" for do in agreeing(("do", "does"), plural))


def living():
    return list(PEOPLE) + ANIMALS


def agreeing(verb, plural):
    """(the form that agrees with its subject, the one that does not)."""
    return verb[:2] if plural else verb[1::-1]


def write_text(cfg):
    """<dir>/text in BabyLM's layout and <dir>/pairs: held-out text and pairs share no line with train."""
    grammar = Grammar(cfg.seed)
    train = text_lines(grammar, random.Random(f"train {cfg.seed}"), cfg.lines)
    dev = text_lines(grammar, random.Random(f"dev {cfg.seed}"), 800)
    for file, lines in (("train_10M/children_stories.train", train), ("dev/children_stories.dev", dev)):
        path = os.path.join(cfg.dir, "text", file)
        os.makedirs(os.path.dirname(path))
        with open(path, "w") as f:
            f.writelines(" ".join(line) + "\n" for line in lines)
    seen = {sentence for line in train for sentence in line}
    os.makedirs(os.path.join(cfg.dir, "pairs"))
    for method in sorted(name for name in dir(grammar) if name.startswith("pair_")):
        rng, pairs = random.Random(f"{method} {cfg.seed}"), {}
        while len(pairs) < 300:
            pair = getattr(grammar, method)(rng)
            if pair and pair[0] not in seen:
                pairs[pair] = None
        task = method.removeprefix("pair_")
        with open(os.path.join(cfg.dir, "pairs", task + ".jsonl"), "w") as f:
            for i, (good, bad) in enumerate(pairs):
                f.write(json.dumps(dict(sentence_good=good, sentence_bad=bad, UID=task, pair_id=i)) + "\n")


def text_lines(grammar, rng, n):
    """n lines of one to four sentences."""
    return [[grammar.sentence(rng) for _ in range(rng.choice((1, 1, 2, 3, 4)))] for _ in range(n)]


if __name__ == "__main__":
    launch(main, DemoConfig)
