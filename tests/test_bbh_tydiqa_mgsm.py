"""BBH, TydiQA and MGSM: which questions are asked, in which order, what a broken source says, and which mean is the paper's. Rows are invented."""
import json
import random

import pytest

from tulu_study.core.files import write_atomic
from tulu_study.core.params import benchmarks
from tulu_study.core.sources import SourceError
from tulu_study.evaluation import load_benchmark
from tulu_study.evaluation.bbh import same_answer
from tulu_study.evaluation.mgsm import CUES
from tulu_study.evaluation.tydiqa import TEMPLATES

TASKS = {"colours": 60, "animals": 50, "numbers": 12}


@pytest.fixture
def root(tmp_path):
    "All three benchmarks in their raw schemas: three tasks, three languages of TydiQA, two of MGSM."
    for task, size in TASKS.items():
        shots = "\n\n".join(f"Q: {task} {i}?\nA: Let's think step by step.\nIt is {i}. So the answer is {i}." for i in range(3))
        write_atomic(tmp_path / "bbh" / "cot-prompts" / f"{task}.txt", f"canary\n-----\nAbout {task}.\n\n{shots}\n")
        rows = [{"input": f"{task} number {i}?", "target": str(i)} for i in range(size)]
        write_atomic(tmp_path / "bbh" / "bbh" / f"{task}.json", json.dumps({"examples": rows}))
    for split, size in (("dev", 130), ("train", 7)):
        rows = [{"paragraphs": [{"context": f"{language} passage {i}", "qas": [{"id": f"{language}-{split}{i}", "question": f"{language} {i}?", "answers": [{"text": f"gold {i}"}]}]}]}
                for i in range(size) for language in ("swahili", "arabic", "finnish")]
        write_atomic(tmp_path / "tydiqa" / f"tydiqa-goldp-v1.1-{split}.json", json.dumps({"data": rows}))
    for language in ("de", "sw"): write_atomic(tmp_path / "mgsm" / f"mgsm_{language}.tsv", "".join(f"{language} {{{i}}}?\t{i}\n" for i in range(250)))
    write_atomic(tmp_path / "mgsm" / "exemplars.json", json.dumps({language: {str(i): {"q": f"q{i}", "a": f"a{i}"} for i in range(1, 9)} for language in ("de", "sw")}))
    return tmp_path


def test_records_name_every_task_and_language():
    records = benchmarks()
    assert sum(file.name.startswith("bbh/") for file in records["bbh"].files) == 27 == records["bbh"].n // records["bbh"].options["per_group"]
    assert len(TEMPLATES) == 9 == records["tydiqa"].n // records["tydiqa"].options["per_group"]
    assert {file.name for file in records["mgsm"].files} == {f"mgsm_{language}.tsv" for language in CUES} | {"exemplars.json", "exemplars.py"}
    assert all(file.url or file.optional for key in ("bbh", "tydiqa", "mgsm") for file in records[key].files)


def test_bbh_is_drawn_task_by_task_from_one_stream(root):
    stream, expected = random.Random(42), []
    for task in sorted(TASKS):
        members = [f"{task}/{i}" for i in range(TASKS[task])]
        expected += stream.sample(members, 40) if len(members) > 40 else members
    assert [example.id for example in load_benchmark("bbh", "cot", source_root=root).examples()] == expected


def test_tydiqa_draws_questions_of_all_languages_before_the_first_shot(root):
    stream = random.Random(42)
    languages = ("arabic", "finnish", "swahili")
    expected = [f"{language}-dev{i}" for language in languages for i in stream.sample(range(130), 100)]
    shots = [f"{language}-train{stream.sample(range(7), 1)[0]}" for language in languages]
    benchmark = load_benchmark("tydiqa", "closed_book", source_root=root)
    assert [example.id for example in benchmark.examples()] == expected
    assert [benchmark.exemplars[language][0]["id"] for language in languages] == shots
    (root / "tydiqa" / "tydiqa-goldp-v1.1-train.json").unlink()   # not needed, and not asked for, without shots
    bare = load_benchmark("tydiqa", "gold_passage", source_root=root, n_shot=0)
    assert bare.prompt(bare.examples("all")[2]) == f"{TEMPLATES['finnish'][0]}\n\nKappale: finnish passage 0\nKysymys: finnish 0?\nVastaus:"


@pytest.mark.parametrize("per_group", [None, 3])
def test_mgsm_keeps_its_draws_when_languages_are_absent(root, per_group):
    both = load_benchmark("mgsm", "cot", source_root=root)
    wanted = [both.prompt(example) for example in both.examples(per_group=per_group) if example.group == "sw"]
    (root / "mgsm" / "mgsm_de.tsv").unlink()
    one = load_benchmark("mgsm", "cot", source_root=root)
    assert [one.prompt(example) for example in one.examples(per_group=per_group)] == wanted
    assert "Swali: sw {0}?" in one.prompt(one.rows[0]), "braces in a question are text"
    assert len(both.examples()) == 500


@pytest.mark.parametrize("key, setting", [("bbh", "direct"), ("tydiqa", "closed_book"), ("mgsm", "cot")])
def test_both_means_are_stored_and_the_paper_s_one_is_clustered(root, key, setting):
    benchmark = load_benchmark(key, setting, source_root=root)
    examples = benchmark.examples("all")
    last = examples[-1].group
    few = [example for example in examples if example.group != last] + [example for example in examples if example.group == last][:5]
    rows = [{"group": e.group, "target": e.target, "answer": "nothing" if e.group == last else (e.target[0] if key == "tydiqa" else e.target)} for e in few]
    score, groups = benchmark.score(rows + [rows[0] | {"error": "prompt too long"}]), len({e.group for e in few})
    assert score["value"] == score["macro"] == pytest.approx(100 * (groups - 1) / groups)
    assert score["micro"] == pytest.approx(100 * (len(few) - 5) / len(few)) and score["n_errors"] == 1
    assert score["interval"]["method"] == f"bootstrap over {groups} groups" and score["low"] < score["value"] < score["high"]
    if key == "tydiqa": assert score["exact_match"]["value"] == score["value"]


@pytest.mark.parametrize("key, setting, name, text, said", [
    ("bbh", "cot", "bbh/animals.json", None, "bbh/<task>.json and cot-prompts/<task>.txt; the partner is missing of cot-prompts/animals.txt"),
    ("bbh", "cot", "bbh/animals.json", '{"examples": [{"input": "one?', "bbh animals.json: no JSON object"),
    ("bbh", "cot", "bbh/animals.json", '{"examples": [{"input": "one?", "target": 1}, {"target": "2"}]}', "2 of 2 rows cannot be used"),
    ("bbh", "cot", "cot-prompts/animals.txt", "canary\n-----\nAbout animals.\n\nQ: one?\nA: It is 1.", "bbh animals.txt: 1 worked examples"),
    ("bbh", "direct", "cot-prompts/animals.txt", "canary\n-----\nAbout animals." + "\n\nQ: one?\nA: It is 1." * 3, "bbh animals.txt: a worked example lacks"),
    ("bbh", "cot", "bbh/animals.json", '{"examples": {"input": "one?", "target": "1"}}', "bbh animals.json: no JSON object with a list"),
    ("bbh", "cot", "cot-prompts/animals.txt", b"canary\n-----\nAbout \xff", "bbh animals.txt: not UTF-8 text"),
    ("mgsm", "cot", "mgsm_de.tsv", b"Wie viele \xc4pfel?\t3\n", "mgsm mgsm_de.tsv: not UTF-8 text"),
    ("mgsm", "cot", "exemplars.json", "[1]", "mgsm exemplars.json: expected {language"),
    ("tydiqa", "closed_book", "tydiqa-goldp-v1.1-dev.json", '{"data": [{"paragraphs": [{"context": "", "qas": [{"id": "finnish-1", "question": "Kuka?", "answers": [{"text": "Ei"}, {"text": null}]}]}]}]}', "no text in answer"),
    ("tydiqa", "closed_book", "tydiqa-goldp-v1.1-dev.json", '{"data": [{"paragraphs": [{"qas": [{"id": "finnish-1", "question": "Kuka?"}]}]}]}', "no text in context, answer"),
    ("tydiqa", "closed_book", "tydiqa-goldp-v1.1-train.json", '{"data": [{"paragraphs": [{"context": "", "qas": [{"id": "finnish-1", "question": "Kuka?", "answers": [{"text": "Ei"}]}]}]}]}',
     "too few examples (arabic 0, swahili 0)"),
    ("mgsm", "cot", "mgsm_de.tsv", "Wie viele?\nWie viele?\t3\nWie viele?\tdrei\n", "mgsm mgsm_de.tsv (a question, a tab and a number on every line): 2 of 3 rows"),
    ("mgsm", "cot", "mgsm_xx.tsv", "How many?\t3\n", "mgsm_xx.tsv: no such language"),
    ("mgsm", "cot", "exemplars.json", '{"de": {"1": {"q": "Wie?"}}}', "mgsm exemplars.json, de: 1 of 1 rows"),
])
def test_a_broken_source_says_which_file_and_what_to_do(root, key, setting, name, text, said):
    if text is None: (root / key / name).unlink()
    else: write_atomic(root / key / name, text)
    with pytest.raises((ValueError, SourceError)) as caught: load_benchmark(key, setting, source_root=root)
    assert said in str(caught.value)
    assert any(advice in str(caught.value) for advice in ("et the file again", "Copy both folders", "Remove or rename"))


@pytest.mark.parametrize("key, setting", [("bbh", "direct"), ("tydiqa", "closed_book"), ("mgsm", "cot")])
def test_impossible_numbers_are_refused(root, key, setting):
    with pytest.raises(ValueError, match="n_shot is -1; expected 0 or more"): load_benchmark(key, setting, source_root=root, n_shot=-1)
    for per_group in (0, -2):
        with pytest.raises(ValueError, match=f"per_group is {per_group}; expected None or a positive"): load_benchmark(key, setting, source_root=root).examples(per_group=per_group)


@pytest.mark.parametrize("answer, target, right", [("-3", "3", 0), ("3.0", "3", 1), ("30", "3.0", 0), ("< >", "> <", 0), ("[]", "[ ]", 1), ("yes.", "Yes", 1), ("NaN", "3", 0), ("", "] ]", 0)])
def test_fixed_equality_of_bbh(answer, target, right):
    assert same_answer(answer, target) == right
