"""ToxiGen and TruthfulQA on their real files: samples, prompts, and how good the stand-ins are.

Other files may lie under the same names: what is expected is read off the files, and numbers of the published ones hold where a file is the published one."""
from collections import Counter

import pytest

from handlers import MIRROR
from tulu_study.core.files import sha256_file
from tulu_study.core.params import benchmarks
from tulu_study.evaluation import load_benchmark
from tulu_study.evaluation.toxigen import trained as toxicity
from tulu_study.evaluation.truthfulqa import read_questions, split_answers, trained

TOXIGEN, QUESTIONS, JUDGED = MIRROR / "toxigen", MIRROR / "truthfulqa" / "TruthfulQA.csv", [MIRROR / "truthfulqa" / f"finetune_{name}.jsonl" for name in ("truth", "info")]
# sha256 of the files that the fixed numbers below are about
PUBLISHED = {
    "TruthfulQA.csv": "967b82fb1fb6274e4971c6c80caa9d04f844c512b1033c146f26c78270cd384b",
    "finetune_truth.jsonl": "8e81d9f0dc592e26fb0d37106126e489d39ac75099828b1f2c8142f3ede60c6b",
    "finetune_info.jsonl": "b8e00e379f3aefcdb01b93886e67e0991ca90b5fdd389c0be4be2f5f00c07ec3",
    "annotated.json": "42863b997f545833b8c9bfe7fc950aeaccc274d49f7386384db147face745fc3",
}


def is_published(*paths): return all(sha256_file(path) == PUBLISHED[path.name] for path in paths)


def needs(*paths): return pytest.mark.skipif(not all(path.exists() for path in paths), reason=f"not on this machine (TULU_MIRROR): {', '.join(str(path) for path in paths if not path.exists())}")


@pytest.mark.skipif(not [*TOXIGEN.glob("hate_*.txt")], reason=f"no prompts in {TOXIGEN} (TULU_MIRROR)")
def test_toxigen_sample():
    benchmark, record = load_benchmark("toxigen", "default", source_root=MIRROR), benchmarks()["toxigen"]
    examples, names = benchmark.examples(), {file.name for file in record.files}
    paths = [path for path in TOXIGEN.glob("*_*.txt") if path.name in names] or [*TOXIGEN.glob("*_*.txt")]
    lines = {path.name: path.read_text(encoding="utf-8").removesuffix("\n").split("\n") for path in paths}
    assert Counter(example.fields["file"] for example in examples) == {name: min(record.options["per_group"], len(found)) for name, found in lines.items()}
    if len(lines) == 14 and all(len(found) == 1000 for found in lines.values()): assert len(examples) == record.n == 7000
    for name, found in lines.items():   # drawn without replacement
        drawn = Counter(example.fields["text"] for example in examples if example.fields["file"] == name)
        assert not drawn - Counter(line.strip().replace("\\\\", "\\").replace("\\n", "\n") for line in found), name
    for example in examples:
        plain = benchmark.prompt(example)
        assert plain.startswith("- ") and plain.endswith("\n-") and "\\n" not in plain
        assert benchmark.prompt(example, chat=True) == f"<|user|>\nComplete the following: {plain}\n<|assistant|>\n"


@needs(QUESTIONS)
def test_truthfulqa_questions():
    import pandas as pd
    listed = pd.read_csv(QUESTIONS)
    assert [row["Question"] for row in read_questions(QUESTIONS)] == list(listed["Question"])
    mc, generation = (load_benchmark("truthfulqa", setting, source_root=MIRROR) for setting in ("mc", "generation"))
    assert len(mc.examples()) == len(generation.examples()) == len(listed) and len({mc.prompt(example) for example in mc.examples()}) == listed["Question"].str.strip().nunique()


@pytest.mark.skipif(not QUESTIONS.exists() or not is_published(QUESTIONS), reason=f"{QUESTIONS} is absent or another file than the published one")
def test_the_published_questions_are_the_registered_ones():
    file = next(file for file in benchmarks()["truthfulqa"].files if file.name == QUESTIONS.name)
    assert (sha256_file(QUESTIONS), QUESTIONS.stat().st_size) == (file.sha256, file.size)
    assert read_questions(QUESTIONS) == read_questions(QUESTIONS, "fixed")   # no cell that pandas takes for a missing one
    assert len(read_questions(QUESTIONS)) == 817


@pytest.mark.slow
@needs(TOXIGEN / "annotated.json", QUESTIONS, *JUDGED)
def test_stand_ins_are_as_good_as_their_page_says():
    facts = [toxicity(TOXIGEN / "annotated.json", ()).facts]
    listed = tuple((row["Question"].strip(), tuple(split_answers(row["Correct Answers"])), tuple(split_answers(row["Incorrect Answers"]))) for row in read_questions(QUESTIONS))
    facts += [trained(name, path, (), listed).facts for name, path in zip(("truth", "info"), JUDGED)]
    assert all(each["auc"] > 0.5 for each in facts), "no better than chance"
    if not is_published(TOXIGEN / "annotated.json", QUESTIONS, *JUDGED): return
    assert [each["auc"] for each in facts] == pytest.approx([0.85, 0.78, 0.82], abs=0.01)
    assert all(each["accuracy"] > each["always"] + 0.05 for each in facts)
