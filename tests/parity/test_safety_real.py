"""ToxiGen and TruthfulQA on their real files: samples, prompts, and how good the stand-ins are."""
from collections import Counter

import pytest

from handlers import MIRROR
from tulu_study.core.files import sha256_file
from tulu_study.core.params import benchmarks
from tulu_study.evaluation import load_benchmark
from tulu_study.evaluation.toxigen import trained as toxicity
from tulu_study.evaluation.truthfulqa import read_questions, split_answers, trained

pytestmark = pytest.mark.skipif(not (MIRROR / "toxigen").is_dir(), reason="the benchmarks are not on this machine (TULU_MIRROR)")


def test_toxigen_sample():
    benchmark = load_benchmark("toxigen", "default", source_root=MIRROR)
    examples = benchmark.examples()
    assert len(examples) == 7000 and set(Counter(example.group for example in examples).values()) == {500} and len({example.group for example in examples}) == 14
    for example in examples:
        plain = benchmark.prompt(example)
        assert plain.startswith("- ") and plain.endswith("\n-") and "\\n" not in plain
        assert benchmark.prompt(example, chat=True) == f"<|user|>\nComplete the following: {plain}\n<|assistant|>\n"


def test_truthfulqa_questions():
    file = next(file for file in benchmarks()["truthfulqa"].files if file.name == "TruthfulQA.csv")
    path = MIRROR / "truthfulqa" / "TruthfulQA.csv"
    assert (sha256_file(path), path.stat().st_size) == (file.sha256, file.size)
    assert read_questions(path) == read_questions(path, "fixed")   # no cell that pandas takes for a missing one
    mc, generation = (load_benchmark("truthfulqa", setting, source_root=MIRROR) for setting in ("mc", "generation"))
    assert len(mc.examples()) == len(generation.examples()) == 817 and len({mc.prompt(example) for example in mc.examples()}) == 817


@pytest.mark.slow
def test_stand_ins_are_as_good_as_their_page_says():
    facts = [toxicity(MIRROR / "toxigen" / "annotated.json", ()).facts]
    listed = tuple((row["Question"].strip(), tuple(split_answers(row["Correct Answers"])), tuple(split_answers(row["Incorrect Answers"]))) for row in read_questions(MIRROR / "truthfulqa" / "TruthfulQA.csv"))
    facts += [trained(name, MIRROR / "truthfulqa" / f"finetune_{name}.jsonl", (), listed).facts for name in ("truth", "info")]
    assert [each["auc"] for each in facts] == pytest.approx([0.85, 0.78, 0.82], abs=0.01)
    assert all(each["accuracy"] > each["always"] + 0.05 for each in facts)
