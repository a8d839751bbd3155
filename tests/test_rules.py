"""Zero-shot scoring by the rules of each year against a slow and plain reading of them: transformers'
tokenizer and model, one text a forward pass, float64."""
import json
import math
import os
import random
import re
import statistics
import zipfile

import numpy as np
import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_blimp
from distill import Teacher
from helpers import VOCAB, read_jsonl, real, thorough
from lib import scoring, tasks
from lib.checkpoints import load_ensemble
from lib.files import read_json
from lib.rules import RULES
from lib.scoring import Candidate, added_bos
from lib.tasks import encoder, read_items
from model import LanguageModel, ModelConfig
from tools import hf

CPU = torch.device("cpu")


# --- the models: random, with weights so large that every token before a token matters ------------

def save_bytelevel(corpus, folder):
    """A byte-level BPE that `tokenizers` trained."""
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe._tokenizer.normalizer = normalizers.NFKC()
    files = [f"{corpus}/text/train_10M/{name}" for name in os.listdir(f"{corpus}/text/train_10M")]
    bpe.train(files, vocab_size=VOCAB, min_frequency=2, special_tokens=["<pad>", "<s>", "</s>"],
              show_progress=False)
    bpe.save(f"{folder}/tokenizer.json")
    with open(f"{folder}/tokenizer_config.json", "w") as f:
        json.dump(dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>",
                       pad_token="<pad>"), f)


@pytest.fixture(scope="module")
def runs(corpus, data, tmp_path_factory):
    """{name: (run folder, its export)}: a Llama of 128 positions with a sentencepiece tokenizer, a GPT-2 of
    1024 with a byte-level one."""
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-6))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=1024))
    made = {}
    for name, model in (("llama", llama), ("gpt2", gpt2)):
        torch.manual_seed(1)
        for p in model.parameters():
            p.data.normal_(std=0.3)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder / "theirs")
        if name == "llama":
            os.link(f"{data}/tokenizer.model", folder / "theirs/tokenizer.model")
        else:
            save_bytelevel(corpus, folder / "theirs")
        hf.main(["import", str(folder / "theirs"), str(folder / "run")])
        hf.main(["export", str(folder / "run"), str(folder / "hf")])
        made[name] = str(folder / "run"), str(folder / "hf")
    return made


class Reference:
    """An exported model, scored as the official pipelines do it."""

    def __init__(self, folder, adds_bos):
        self.model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if adds_bos:
            self.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", self.tokenizer.bos_token_id)])
        self.known = {}

    def log_probabilities(self, ids):
        """Of each token but the first, given those before it."""
        if tuple(ids) not in self.known:
            with torch.no_grad():
                logp = self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            self.known[tuple(ids)] = [row[token].item() for row, token in zip(logp, ids[1:])]
        return self.known[tuple(ids)]

    def scored(self, sentence, completion):
        """Section 1 of 2025 and 2026: the log-probabilities of the tokens that end after the boundary."""
        given = self.tokenizer(sentence, return_offsets_mapping=True)
        ids, ends = given["input_ids"], [end for _, end in given["offset_mapping"]]
        start = len(sentence) - len(completion)
        logp = self.log_probabilities(ids)
        return [logp[i - 1] for i in range(1, len(ids)) if ends[i] > start]

    def after_prefix(self, prefix, text):
        """2023 and 2024, no context: one token and then the text."""
        return sum(self.log_probabilities([prefix, *self.encode(text)]))

    def after_context(self, context, text):
        """2024's EWoK: cut where the context's tokens would end."""
        return sum(self.log_probabilities(self.encode(context + text))[len(self.encode(context)) - 1:])

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def references(runs):
    """reference(name, adds_bos), each made once."""
    made = {}

    def reference(name, adds_bos):
        if (name, adds_bos) not in made:
            made[name, adds_bos] = Reference(runs[name][1], adds_bos)
        return made[name, adds_bos]
    return reference


# --- the rules in plain words: of a line the UID, the scores, the right one, what a prediction says

def expected_2025(task, file, row, reference, year):
    """(UID, scores, place of the right one, texts), or None if the line is left out."""
    def total(sentence, completion):
        return sum(reference.scored(sentence, completion))
    if task in ("blimp", "supplement"):
        pair = row["sentence_good"], row["sentence_bad"]
        return file, [total(s, s) for s in pair], 0, pair
    if task == "ewok" and year == "2025":
        ends = " " + row["Target1"], " " + row["Target2"]
        return row["Domain"], [total(row["Context1"] + end, end) for end in ends], 0, ends
    if task == "ewok":
        wholes = row["Context1"] + " " + row["Target1"], row["Context2"] + " " + row["Target1"]
        return row["Domain"], [total(whole, " " + row["Target1"]) for whole in wholes], 0, wholes
    if task == "entity":
        if year == "2026" and any("nothing" in option for option in row["options"]):
            return None
        scores = [total(row["input_prefix"] + option, option) for option in row["options"]]
        return f"{file}_{row['numops']}_ops", scores, 0, row["options"]
    if task == "comps":
        wholes = [row[f"prefix_{kind}"] + " " + row["property_phrase"]
                  for kind in ("acceptable", "unacceptable")]
        uid = {"comps_base": "base", "comps_wugs": "wugs", "comps_wugs_dist-before": "wugs_dist_before",
               "comps_wugs_dist-in-between": "wugs_dist_in_between"}[file]
        return uid, [total(whole, row["property_phrase"]) for whole in wholes], 0, wholes
    if task == "wug":
        pair = row["sentences"].split("\t")
        uid = dict(wug_past_tense="wug_past", wug_adj_nominalization="wug_adj")[file]
        return uid, [total(s, s) for s in pair], 0, pair
    assert task == "piqa" and year == "2026"
    ends = [" " + row[f"solution{i}"] for i in range(4) if f"solution{i}" in row]
    each = [reference.scored(row["prompt"] + end, end) for end in ends]
    return row["example_id"], [sum(logp) / max(1, len(logp)) for logp in each], row["label"], ends


def expected_2024(task, file, row, reference, year):
    if task in ("blimp", "supplement"):
        texts = " " + row["sentence_good"], " " + row["sentence_bad"]
        tokenizer = reference.tokenizer
        prefix = tokenizer.eos_token_id if year == "2023" else tokenizer.bos_token_id
        return file, [reference.after_prefix(prefix, text) for text in texts], 0, texts
    assert task == "ewok" and year == "2024"
    texts = " " + row["Target1"], " " + row["Target2"]
    return file, [reference.after_context(row["Context1"], text) for text in texts], 0, texts


def points(scores, right, year):
    """1 for the right one, and by the rules of 2026 1/k if it is one of k."""
    best = [i for i, s in enumerate(scores) if s == max(scores)]
    if year == "2026":
        return 1 / len(best) if right in best else 0.0
    return float(best[0] == right)


def ranks(values):
    """From 1; equal values share the mean of theirs."""
    in_order = sorted(values)
    return [in_order.index(v) + (in_order.count(v) + 1) / 2 for v in values]


def rho(scores, ratios):
    scores = np.array(scores, np.float32)
    e = np.exp(scores - scores.max(1, keepdims=True))
    p = (e[:, 0] / e.sum(1)).tolist()
    return np.corrcoef(ranks(p), ranks(ratios))[0, 1], p


def expected(folder, task, reference, year):
    """Of each line of a folder, in the order of the files' names."""
    read = expected_2025 if year >= "2025" else expected_2024
    rows = [(name[:-6], row) for name in sorted(os.listdir(folder)) for row in read_jsonl(f"{folder}/{name}")]
    answers = [(file, row, read(task, file, row, reference, year)) for file, row in rows]
    return [(file, row, *answer) for file, row, answer in answers if answer]


def scored_by_us(run, folder, year, bos, out):
    """(the folder's results, the lines of --items, the predictions)."""
    eval_blimp.main(eval_blimp.EvalConfig(
        ckpt=(run,), data=(str(folder),), rules=year, bos=bos, device="cpu", items=f"{out}/items",
        out=f"{out}/result"))
    result, lines = read_json(f"{out}/result"), read_jsonl(f"{out}/items")
    assert result["rules"] == year
    models, tokenizer, described = load_ensemble([run], CPU)
    items = read_items(folder, year, encoder(year, tokenizer, described, bos), math.inf)
    scores = [line["scores"] for line in lines]
    (folder,) = result["folders"].values()
    return dict(folder, rules=year), lines, eval_blimp.preferred(items, scores, eval_blimp.RULES[year])


def check(run, reference, folder, task, year, bos, out):
    """Scores within 1e-4 of the reference, and the same decisions, averages and predictions."""
    result, lines, predictions = scored_by_us(run, folder, year, bos, out)
    answers = expected(folder, task, reference, year)
    places, by_task, said, seen = {}, {}, {}, []
    for (file, row, uid, scores, right, texts), line in zip(answers, lines, strict=True):
        assert set(line) == {"task", "line", "scores", *(["logp_good", "logp_bad"] * (len(scores) == 2))}
        assert (line["task"], line["line"]) == (uid, places.get(uid, 0))
        assert line["scores"] == pytest.approx(scores, rel=0, abs=1e-4)
        if len(scores) == 2:
            assert [line["logp_good"], line["logp_bad"]] == [line["scores"][i] for i in (right, 1 - right)]
        name = file if task in ("piqa", "comps", "wug") else uid
        by_task.setdefault(name, []).append(points(scores, right, year))
        said.setdefault(uid, []).append((f"{uid}_{places.get(uid, 0)}", texts[scores.index(max(scores))]))
        places[uid] = places.get(uid, 0) + 1
        seen.append((scores, row))
    assert said == {uid: [(row["id"], row["pred"]) for row in group["predictions"]]
                    for uid, group in predictions.items()}
    check_averages(result, by_task)
    if task == "wug":
        check_wug(result, predictions, seen)


def check_averages(result, by_task):
    assert result["tasks"].keys() == by_task.keys()
    for name, got in by_task.items():
        row = result["tasks"][name]
        assert row["accuracy"] == pytest.approx(sum(got) / len(got)) and row["n"] == len(got)
        assert row["right"] == "".join(str(round(1 / p)) if p else "0" for p in got)
        se = statistics.stdev(got) / len(got) ** 0.5 if len(got) > 1 else 0
        assert row["se"] == pytest.approx(se)
    if result["phenomena"] and result["rules"] == "2023":
        return  # test_2023_pools_phenomena
    assert result["accuracy"] == pytest.approx(statistics.mean(map(statistics.mean, by_task.values())))
    spread = sum((len(got) - 1) * statistics.variance(got) for got in by_task.values() if len(got) > 1)
    n, k = sum(map(len, by_task.values())), len(by_task)
    assert result["se"] == pytest.approx((spread / (n - k) / n) ** 0.5 if n > k else 0)


def check_wug(result, predictions, seen):
    value, p = rho([scores for scores, _ in seen], [row["ratio"] for _, row in seen])
    assert result["rho"] == pytest.approx(value)
    (group,) = predictions.values()
    assert [row["prob"] for row in group["predictions"]] == pytest.approx(p, abs=1e-4)


# --- the lines ------------------------------------------------------------------------------------

def pair(good, bad, **also):
    return dict(sentence_good=good, sentence_bad=bad, **also)


SNOW = "\u2603"  # in no vocabulary: the blank before it is a token of its own
STORY = "Box 0 contains the dog, Box 1 contains nothing. Box 1 contains "
INVENTED = {
    "blimp": {"one": [
        pair("The dog sees a cat.", "The dog see a cat."), pair("same words.", "same words."),
        pair("Zoë saw the naïve café.", "Zoë see the naïve cafés."), pair("漢字 🙂 dog.", "漢 🙂🙂 dogs."),
        pair("a ﬁsh ① swims.", "a ﬁsh ① swim."), pair("e\u0301t dogs.", "dogs e\u0301te\u0301."),
        pair("x", "yy zz"), pair("  two  blanks ", " two blanks"), pair("the girl runs.", "the girl run.")],
        "two": [pair("the dog runs.", "the dog run."), pair("a cat sleeps", "a cat sleep")]},
    "supplement": {"turn": [
        pair("What did you get?\nI got a chair.", "What did you get?\nI got a teacher."),
        pair("A: the dog?\nB: a cat.\n", "A: the dog?\n\nB: a cat."), pair("\ta dog", "\ta dogs")]},
    "ewok": {"first": [
        dict(Domain=domain, Context1=c1, Context2=c2, Target1=t1, Target2=t2)
        for domain, c1, c2, t1, t2 in (
            ("social", "A lamp is over it.", "A lamp is under it.", "It is above.", "It is below."),
            ("social", "A lamp is under it.", "A lamp is over it.", "It is below.", "It is above."),
            ("spatial", "The dog runs.", "The dog sleeps.", "It moves.", "It dreams well."),
            ("spatial", "A cat sees.", "A cat sees.", "It moves.", "It moves."),
            ("social", "Zoë eats.", f"The {SNOW}.", f"{SNOW} is cold.", "é."))]},
    "entity": {file: [
        dict(sample_id=1, numops=ops, input_prefix=before, options=options, example_id=1)
        for ops, before, options in (
            (0, STORY, ["the dog.", "the cat.", "a dog and a cat.", "the girl.", "dogs."]),
            (0, STORY, ["nothing.", "the cat.", "the dog.", "the girl.", "dogs."]),
            (0, STORY, ["the dog.", "nothing and cats.", "the boy.", "the girl.", "dogs."]),
            (0, STORY + "the dog. Box 2 contains ", ["the cat.", "nothing.", "the boy.", "girls.", "x."]),
            (1, STORY, ["the dog.", "the dog.", "the dog.", "the dog.", "the dog."]),
            (1, STORY, [f"{SNOW}.", "the cat.", "\nthe dog.", " the dog.", "1."]),
            (1, STORY, ["the girl sees.", "cat.", "x.", "cat.", "the girl sees."]))]
        for file in ("regular", "ambiref")},
    "comps": {file: [
        dict(prefix_acceptable=a, prefix_unacceptable=b, property_phrase=c)
        for a, b, c in (("A robin", "A trout", "can fly."), ("A wug is a dog. Therefore, a wug",
                        "A wug is a cat. Therefore, a wug", "barks."), ("A robin", "A robin", "can sing."),
                        ("A dog", "A cat", f"{SNOW} sees."), ("Zoë", "A ﬁsh", "é reads."))]
        for file in ("comps_base", "comps_wugs", "comps_wugs_dist-before", "comps_wugs_dist-in-between")},
    "wug": {"wug_past_tense": [
        dict(sentences=f"{a}\t{b}", ratio=ratio) for a, b, ratio in (
            ("Every day they gliv.", "Every day they glove.", 0.5), ("a dog.", "a dog.", 0.25),
            ("x", "the girl sees a cat and the boy " * 9, 0.75),
            ("y", "the dog sees the boy and a cat " * 8, 0.1),
            ("the girl sees a cat and the boy " * 9, "z", 0.2), ("the dog sees the boy and " * 9, "x", 0.9),
            ("a cat.", "the cat.", 0.25), ("Yesterday they splang.", "Yesterday they splinged.", 0.5))]},
    "piqa": {"eng_latn": [
        dict(prompt=prompt, label=label, example_id=f"e{i}",
             **{f"solution{k}": text for k, text in enumerate(solutions)})
        for i, (prompt, label, *solutions) in enumerate((
            ("What keeps soup warm?", 2, "A bottle with a lid.", "Soup.", "A wet towel and the dog.", "Ice"),
            ("To hang a picture,", 1, "close both eyes while you hammer.", "use a level."),
            ("The dog", 0, "runs to the girl and sees her.", "runs."),
            ("The dog", 1, "runs.", "runs."), ("How?", 3, "x", "yy", "x", f"{SNOW} x")))]},
}
YEARS = dict(blimp=("2023", "2024", "2025", "2026"), supplement=("2023", "2024", "2025", "2026"),
             ewok=("2024", "2025", "2026"), entity=("2025", "2026"), comps=("2025", "2026"), wug=("2025",),
             piqa=("2026",))
MODELS = [(name, bos) for bos in ("yes", "no") for name in ("llama", "gpt2")]
TASKS = [(task, year) for task, years in YEARS.items() for year in years]


def with_models(pairs):
    """(model, bos, task, year) of each pair, and for `make test-all` with the other models too."""
    cases = [(*MODELS[(i + k) % 4], *pair) for k in range(4) for i, pair in enumerate(pairs)]
    return thorough(cases, len(pairs))


def write_folder(folder, files):
    os.makedirs(folder)
    for name, rows in files.items():
        with open(f"{folder}/{name}.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    """{task: folder} of INVENTED."""
    folder = tmp_path_factory.mktemp("invented")
    return {task: str(write_folder(folder / task, files)) for task, files in INVENTED.items()}


@pytest.mark.parametrize("case", with_models(TASKS), ids="-".join)
def test_scores_decisions_and_averages_are_the_rules(runs, references, invented, tmp_path, case):
    name, bos, task, year = case
    bos = bos if year >= "2025" else "auto"  # before, what stands before a text was the rules' own
    check(runs[name][0], references(name, bos == "yes"), invented[task], task, year, bos, tmp_path)


# --- the traps: each rule broken once, and the test above fails -----------------------------------

def another_candidate(text=lambda before, scored: before + scored, later=0, length=None):
    """lib/scoring.py's candidate() of another text, boundary, or cut."""
    def broken(tokenizer, whole, n, bos):
        c = scoring.candidate(tokenizer, text(whole[:n], whole[n:]), n + later, bos)
        return c._replace(ids=c.ids[:length])
    return tasks, dict(candidate=broken)


def no_blank_in_2024(rules, tokenizer, described, bos):
    return lambda before, scored: Candidate((tokenizer.bos, *tokenizer.encode(scored)), 1)


def other_formats(change):
    return tasks, dict(FORMATS=tuple(map(change, tasks.FORMATS)))


def templates(a, b):
    """Formats with their candidates' templates changed."""
    return other_formats(lambda f: f._replace(candidates=tuple(c.replace(a, b) for c in f.candidates)))


def turned_round(form):
    years = {"2025": "2026", "2026": "2025"} if "{Target1}" in form.candidates[0] else {}
    return form._replace(rules=years.get(form.rules, form.rules))


def other_rules(module, **change):
    return module, dict(RULES={year: rules._replace(**change) for year, rules in RULES.items()})


def in_float64(scores):
    return torch.tensor(scores, dtype=torch.float64).softmax(0)[0].item()


def in_order(a, b):
    """Spearman's rho with equal values in the order in which they stand."""
    a, b = (np.argsort(np.argsort(values, kind="stable")) for values in (a, b))
    return np.corrcoef(a, b)[0, 1]


TRAPS = {
    "1-leading-space": ("blimp", "2025", another_candidate(lambda before, scored: before + " " + scored)),
    "1-none-in-2024": ("blimp", "2024", (eval_blimp, dict(encoder=no_blank_in_2024))),
    "2-another-bos": ("supplement", "2026", (tasks, dict(
        added_bos=lambda described, tokenizer, choice: None if choice == "yes" else tokenizer.bos))),
    "2-eos-scored": ("blimp", "2026", another_candidate(lambda before, scored: before + scored + "</s>")),
    "2-prefix-2023": ("blimp", "2023", other_rules(tasks, prefix="<s>")),
    "2-prefix-2024": ("blimp", "2024", other_rules(tasks, prefix="</s>")),
    "3-boundary-before": ("entity", "2026", another_candidate(later=-1)),
    "3-boundary-after": ("comps", "2026", another_candidate(later=1)),
    "3-comps-blank-scored": ("comps", "2025", templates("} |{", "}| {")),
    "3-ewok-blank-unscored": ("ewok", "2025", templates("}| {", "} |{")),
    "3-piqa-blank-unscored": ("piqa", "2026", templates("}| {", "} |{")),
    "4-sum-in-piqa": ("piqa", "2026", other_formats(lambda f: f._replace(per_token=False))),
    "4-mean-elsewhere": ("blimp", "2025", other_formats(lambda f: f._replace(per_token=True))),
    "5-ties-shared-2025": ("blimp", "2025", other_rules(eval_blimp, split_ties=True)),
    "5-ties-right-2026": ("entity", "2026", other_rules(eval_blimp, split_ties=False)),
    "6-ewok-turned-2026": ("ewok", "2026", other_formats(turned_round)),
    "6-ewok-turned-2025": ("ewok", "2025", other_formats(turned_round)),
    "7-nothing": ("entity", "2026", other_formats(lambda f: f._replace(without=""))),
    "7-nothing-alone": ("entity", "2026", other_formats(lambda f: f._replace(
        without="nothing." if f.without else ""))),
    "8-truncated": ("wug", "2025", another_candidate(length=64)),
    "9-float64": ("wug", "2025", (eval_blimp, dict(p_first=in_float64))),
    "9-ranks-in-order": ("wug", "2025", (eval_blimp, dict(spearman=in_order))),
    "label": ("piqa", "2026", other_formats(lambda f: f._replace(right=""))),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_broken_rule_shows(runs, references, invented, tmp_path, monkeypatch, trap):
    task, year, (module, broken) = TRAPS[trap]
    for name, value in broken.items():
        monkeypatch.setattr(module, name, value)
    with pytest.raises((AssertionError, ValueError)):  # ValueError: of zip, not as many items
        check(runs["llama"][0], references("llama", False), invented[task], task, year,
              "no" if year >= "2025" else "auto", tmp_path)


# --- what the folders above do not have -----------------------------------------------------------

def test_a_tokenizer_adds_bos_as_the_text_was_prepared(runs, teachers, tmp_path):
    """--bos=auto."""
    tokenizer = load_ensemble([teachers[1]], CPU)[1]
    added = {bos: added_bos(dict(bos=bos), tokenizer, "auto")
             for bos in ("line", "document", "none", "unknown")}
    assert added == dict(line=tokenizer.bos, document=tokenizer.bos, none=None, unknown=None)
    folder = write_folder(tmp_path / "p", {"t": INVENTED["blimp"]["one"]})
    for run, same in ((teachers[1], "yes"), (runs["llama"][0], "no")):  # bos=line, and unknown
        auto, chosen = (scored_by_us(run, folder, "2025", bos, tmp_path)[1] for bos in ("auto", same))
        assert auto == chosen


def test_2023_pools_phenomena(runs, references, tmp_path):
    """A phenomenon's accuracy is that of its pairs, not the mean of its tasks; s-selection is argument
    structure."""
    dog = [pair("the dog runs.", "the dog run."), pair("a dog sees.", "see a dog."), pair("x y.", "y x.")]
    cat = [pair(f"the cat sees {it}.", f"cat the sees {it}.") for it in ("me", "a boy", "us", "x", "it")]
    terms = dict(a=("s-selection", dog), b=("argument_structure", cat), c=("binding", cat[:2] + dog[:1]))
    folder = write_folder(tmp_path / "p", {
        name: [dict(row, linguistics_term=term) for row in rows] for name, (term, rows) in terms.items()})
    reference = references("llama", False)
    got = {name: [points(expected_2024("blimp", name, row, reference, "2023")[1], 0, "2023") for row in rows]
           for name, (_, rows) in terms.items()}
    phenomena = dict(argument_structure=got["a"] + got["b"], binding=got["c"])
    assert statistics.mean(phenomena["argument_structure"]) != statistics.mean(
        map(statistics.mean, (got["a"], got["b"])))
    result, *_ = scored_by_us(runs["llama"][0], folder, "2023", "auto", tmp_path)
    for name, row in result["phenomena"].items():
        assert row["accuracy"] == pytest.approx(statistics.mean(phenomena[name]))
        assert row["se"] == pytest.approx(statistics.stdev(phenomena[name]) / len(phenomena[name]) ** 0.5)
    assert result["accuracy"] == pytest.approx(statistics.mean(map(statistics.mean, phenomena.values())))


def test_a_llama_reads_on_and_a_gpt2_does_not(runs, references, tmp_path, capsys):
    """More than 256 tokens: the Llama's 128 positions are exceeded with a notice, and its scores are
    transformers'. 1024 of the GPT-2 are not."""
    long = "the dog sees a cat and the girl " * 40
    lines = [INVENTED["blimp"]["one"][0], pair(long + "runs.", long + "run.")]
    folder = write_folder(tmp_path / "p", {"t": lines})
    check(runs["llama"][0], references("llama", False), folder, "blimp", "2026", "no", tmp_path)
    notice = r"^notice: texts of up to \d{3} tokens, a block_size of 128: .*go on"
    assert re.search(notice, capsys.readouterr().out)
    with pytest.raises(SystemExit, match=r"p/t.jsonl, line 2: \d{3} tokens, the model has 128 positions"):
        scored_by_us(runs["llama"][0], folder, "2024", "auto", tmp_path)
    check(runs["gpt2"][0], references("gpt2", False), folder, "blimp", "2026", "no", tmp_path)
    for name, n, limit in (("gpt2", 1026, 1024), ("llama", 4098, 4096)):
        write_folder(tmp_path / name, {"t": [*lines, pair("x" * n, "x")]})
        with pytest.raises(SystemExit, match=f"t.jsonl, line 3: {n - 1} tokens, the model has {limit} pos"):
            scored_by_us(runs[name][0], tmp_path / name, "2026", "no", tmp_path)


def test_settings_that_the_rules_do_not_have(runs, invented, tmp_path):
    for change in (dict(rules="2024", bos="yes"), dict(rules="2026", predictions=str(tmp_path / "p"))):
        with pytest.raises(SystemExit, match="^error: (bos|predictions)=[^\n]+ must be '[^\n]+$"):
            eval_blimp.main(eval_blimp.EvalConfig(ckpt=(runs["llama"][0],), data=(invented["blimp"],),
                                                  out=str(tmp_path / "o"), device="cpu", **change))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_boundaries_are_those_of_the_offsets(runs, name):
    """Of random texts with normalised, composed and unknown characters: the same tokens are scored. (Not
    where normalisation joins characters across the boundary.)"""
    theirs = AutoTokenizer.from_pretrained(runs[name][1])
    _, ours, _ = load_ensemble([runs[name][0]], CPU)
    rng = random.Random(1)
    letters = [*"abc the dog  .\n", *"éﬁ①Å漢🙂☃½\u00a0\u3000가", "e\u0301", "\u1100\u1161"]
    for _ in range(1000):
        before, scored = ("".join(rng.choices(letters, k=rng.randrange(1, 8))) for _ in range(2))
        given = theirs(before + scored, return_offsets_mapping=True)
        ends = [end for _, end in given["offset_mapping"]]
        wanted = max(1, sum(end <= len(before) for end in ends))
        got = scoring.candidate(ours, before + scored, len(before), None)
        assert got == (tuple(given["input_ids"]), wanted), (before, scored)


# --- trees of tokens ------------------------------------------------------------------------------

def random_texts(rng):
    """Candidates of which many begin alike, some are others' beginnings, and some are there twice."""
    texts = [()]
    for _ in range(40):
        start = texts[rng.integers(len(texts))]
        start = start[:rng.integers(len(start) + 1)]
        texts.append((*start, *rng.integers(0, 4, rng.integers(1, 9)).tolist()))
    texts += [texts[i] for i in rng.integers(1, len(texts), 15)]
    return [Candidate(ids, int(rng.integers(1, len(ids) + 1))) for ids in texts[1:]]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_tree_gives_each_text_its_own_score(arch, monkeypatch):
    """As if each was read alone, whatever the length of rows and number of them, of one model and of two."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(LanguageModel(ModelConfig(arch=arch, vocab_size=7, n_layer=2, n_head=4, n_kv_head=2,
                                                n_embd=16, intermediate_size=24, block_size=128)).eval())
        for p in models[-1].parameters():
            p.data.normal_(std=0.4)
    for seed in range(2):
        texts = random_texts(np.random.default_rng(seed))
        for members in (models[:1], models):
            with torch.no_grad():
                alone = [sum(m(torch.tensor([c.ids]))[0] for m in members).div(len(members)).log_softmax(-1)
                         for c in texts]
            alone = [sum(logp[i - 1, c.ids[i]].item() for i in range(c.n_context, len(c.ids)))
                     for c, logp in zip(texts, alone)]
            for row, batch_tokens in ((1, 1), (7, 50), (64, 200), (192, 1024)):
                monkeypatch.setattr(eval_blimp, "ROW", row)
                ours = eval_blimp.log_probabilities([Teacher(m) for m in members], texts, batch_tokens)
                assert ours == pytest.approx(alone, rel=0, abs=2e-5)


def test_trees_read_once_what_texts_share():
    """Every node is a different beginning, if one row has room for all."""
    for seed in range(4):
        texts = random_texts(np.random.default_rng(seed))
        (row,), _ = scoring.plant(texts, 10_000)
        assert len(row.tokens) == len({c.ids[:n] for c in texts for n in range(1, len(c.ids))})


# --- lines that are none --------------------------------------------------------------------------

def without(row, name):
    return {key: value for key, value in row.items() if key != name}


BLIMP, EWOK, ENTITY, COMPS, WUG, PIQA = (INVENTED[task][file][0] for task, file in (
    ("blimp", "one"), ("ewok", "first"), ("entity", "regular"), ("comps", "comps_base"),
    ("wug", "wug_past_tense"), ("piqa", "eng_latn")))
BAD = [
    *[("2026", without(row, name), f"no field '{name}'") for row, names in (
        (BLIMP, ["sentence_good", "sentence_bad"]), (EWOK, ["Domain", "Target1"]),
        (ENTITY, ["numops", "options", "input_prefix"]), (COMPS, ["prefix_acceptable", "property_phrase"]),
        (PIQA, ["prompt", "label", "example_id", "solution3", "solution2", "solution0"])) for name in names],
    ("2025", without(WUG, "ratio"), "no field 'ratio'"),
    ("2026", without(EWOK, "Context2"), "no task by the rules of 2026, but of 2025"),
    ("2026", {}, "no field"), ("2026", [], "not an object"), ("2026", None, "not an object"),
    ("2023", EWOK, "no task by the rules of 2023, but of 2025"),
    ("2024", COMPS, "no task by the rules of 2024, but of 2025 2026"),
    ("2026", WUG, "no task by the rules of 2026, but of 2025"),
    ("2026", dict(ENTITY, options=["a."] * 4), "options is .* not 5 texts"),
    ("2026", dict(ENTITY, options=["a."] * 6), "options is .* not 5 texts"),
    ("2026", dict(ENTITY, options=["a.", 5, "b.", "c.", "d."]), "options is .* not 5 texts"),
    ("2026", dict(ENTITY, options="abcde"), "options is 'abcde', not 5 texts"),
    ("2026", dict(ENTITY, options={"0": "a"}), "options is .* not 5 texts"),
    ("2026", dict(ENTITY, options=["a.", "b.", " ", "c.", "d."]), "an empty context or sentence"),
    ("2026", dict(ENTITY, input_prefix=" "), "an empty context or sentence"),
    ("2026", dict(ENTITY, numops=[0]), r"numops is \[0\], not a name or number"),
    ("2026", dict(EWOK, Domain={"a": 1}), "Domain is .* not a name or number"),
    ("2024", dict(EWOK, Context1=""), "an empty context or sentence"),
    ("2025", dict(BLIMP, sentence_good=["a", "b"]), "sentence_good is .* not a text"),
    ("2025", dict(BLIMP, sentence_bad={"a": ["b"]}), "sentence_bad is .* not a text"),
    ("2025", dict(BLIMP, sentence_bad=None), "sentence_bad is None, not a text"),
    ("2025", dict(BLIMP, sentence_bad=" \n "), "an empty context or sentence"),
    ("2025", dict(BLIMP, sentence_bad="\ud800"), "not a minimal pair"),
    ("2025", dict(BLIMP, sentence_bad=[["x" * 10_000]] * 9), "sentence_bad is .{,300} not a text"),
    ("2025", dict(WUG, sentences="a dog."), "sentences is .* not 2 texts"),
    ("2025", dict(WUG, sentences="a\tb\tc"), "sentences is .* not 2 texts"),
    ("2025", dict(WUG, sentences="a\t"), "an empty context or sentence"),
    ("2025", dict(WUG, sentences=["a\tb"]), "sentences is .* not 2 texts"),
    ("2025", dict(WUG, sentences=5), "sentences is 5, not 2 texts"),
    *[("2025", dict(WUG, ratio=ratio), "ratio is .*, not from 0 to 1")
      for ratio in ("0.5", None, True, [0.5], -0.1, 1.5, math.nan, 10 ** 400)],
    *[("2026", dict(PIQA, label=label), "label is .*, not from 0 to 3")
      for label in ("1", None, True, 1.0, 4, -1, [1], 10 ** 400)],
    ("2026", dict(PIQA, example_id=None), "example_id is None, not a name or number"),
    ("2026", dict(PIQA, prompt=""), "an empty context or sentence"),
    ("2026", dict(PIQA, solution1=7), "solution1 is 7, not a text"),
]


@pytest.fixture(scope="module")
def encode(runs):
    """encode[year](before, scored)."""
    _, tokenizer, described = load_ensemble([runs["llama"][0]], CPU)
    return {year: encoder(year, tokenizer, described, "auto") for year in RULES}


@pytest.mark.parametrize("i", range(len(BAD)))
def test_a_bad_line_is_named_in_one(encode, tmp_path, i):
    year, row, message = BAD[i]
    good = {"2023": BLIMP, "2024": BLIMP, "2025": WUG, "2026": COMPS}[year]
    folder = write_folder(tmp_path / "p", {"t": [good, row]})
    with pytest.raises(SystemExit, match=rf"^error: {folder}/t\.jsonl, line 2: [^\n]*{message}[^\n]*$") as e:
        read_items(folder, year, encode[year], 128)
    assert len(str(e.value)) < 600


def test_fields_that_formats_do_not_have_do_not_matter(runs, tmp_path):
    """Not even those named like what templates are filled with; files of several formats in a folder."""
    rows = [dict(BLIMP, file=1, comps=[], self="x", field="y", UID=3, linguistics_term=None), WUG, COMPS]
    folder = write_folder(tmp_path / "p", {"b": rows[:1], "w": rows[1:2], "c": rows[2:]})
    result, lines, _ = scored_by_us(runs["llama"][0], folder, "2025", "no", tmp_path)
    assert [line["task"] for line in lines] == ["b", "c", "w"] and result["n"] == 3 and result["rho"] == 0


# --- the real files -------------------------------------------------------------------------------

def entity_tracking(folder):
    """The real files, unpacked."""
    with zipfile.ZipFile(real("eval2025", "full_eval", "entity_tracking.zip")) as z:
        z.extractall(folder, pwd=b"iamnotaLM")
    return str(folder / "entity_tracking")


def sample(source, folder, lines):
    """Some lines of each file of a folder, from all over it."""
    files = {}
    for name in sorted(os.listdir(source)):
        rows = read_jsonl(f"{source}/{name}")
        files[name[:-6]] = rows[::max(1, len(rows) // lines)][:lines]
    return write_folder(folder, files)


COUNTS = {  # of items, per file and number of operations
    "2025": dict(regular="606 607 606 606 568 159", ambiref="607 607 604 604 615 187",
                 move_contents="605 606 605 606 529 156"),
    "2026": dict(regular="517 409 405 425 388 94", ambiref="508 428 413 409 434 123",
                 move_contents="516 437 399 406 353 116"),
}


@pytest.mark.parametrize("year", COUNTS)
def test_entity_trackings_items_are_the_official_ones(tmp_path, year):
    items = read_items(entity_tracking(tmp_path), year, lambda before, scored: Candidate((1, 2), 1), 1)
    result = eval_blimp.summary(items, [[0.0, -1, -1, -1, -1]] * len(items), RULES[year])
    wanted = {f"{file}_{ops}_ops": int(n)
              for file, counts in COUNTS[year].items() for ops, n in enumerate(counts.split())}
    assert {task: row["n"] for task, row in result["tasks"].items()} == wanted


REAL = {
    "blimp": ("fast_eval/blimp_fast", 1), "supplement": ("fast_eval/supplement_fast", 4),
    "entity": ("full_eval/entity_tracking.zip", 5), "comps": ("invented_samples/full_eval/comps", 12),
    "wug": ("full_eval/wug_adj_nominalization", 40),
    "piqa": ("invented_samples/full_eval/global_piqa_parallel", 12),
}


@pytest.mark.parametrize("case", with_models([pair for pair in TASKS if pair[0] in REAL]), ids="-".join)
def test_real_files_by_the_rules(runs, references, tmp_path, case):
    name, bos, task, year = case
    bos = bos if year >= "2025" else "auto"
    path, lines = REAL[task]
    source = entity_tracking(tmp_path) if task == "entity" else real("eval2025", path)
    folder = sample(source, tmp_path / "sample", lines)
    check(runs[name][0], references(name, bos == "yes"), folder, task, year, bos, tmp_path)
