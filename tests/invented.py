"Tiny invented source files of all eight benchmarks, in their raw schemas; harmless, with labels for the stand-ins."
import json
from pathlib import Path

from tulu_study.core.files import write_atomic, write_jsonl

LANGUAGES = ("english", "finnish", "swahili")


def write_sources(
    root: Path,  # sources root to fill
    size: int = 6,  # questions of each benchmark, or of each of its groups
) -> Path:
    write_jsonl(root / "gsm8k" / "test.jsonl", [{"question": f"The cat sat {i} times and ran {i + 1} times?", "answer": f"#### {2 * i + 1}"} for i in range(size)])
    write_atomic(root / "gsm8k" / "cot_exemplars.json", json.dumps([{"question": f"{i} dogs?", "cot_answer": f"So the answer is {i}.", "short_answer": str(i)} for i in range(1, 9)]))
    for subject in ("astronomy", "marketing"):
        for split in ("dev", "test"):
            write_atomic(root / "mmlu" / split / f"{subject}_{split}.csv", "".join(f"Which cat {i}?,red,blue,big,small,{'ABCD'[i % 4]}\n" for i in range(size)))
    for task in ("colours", "numbers"):
        shots = "\n\n".join(f"Q: {task} {i}?\nA: Let's think step by step.\nIt is {i}. So the answer is {i}." for i in range(3))
        write_atomic(root / "bbh" / "cot-prompts" / f"{task}.txt", f"canary\n-----\nAbout {task}.\n\n{shots}\n")
        write_atomic(root / "bbh" / "bbh" / f"{task}.json", json.dumps({"examples": [{"input": f"{task} number {i}?", "target": str(i)} for i in range(size)]}))
    for split, count in (("dev", size), ("train", 3)):
        rows = [{"paragraphs": [{"context": f"{language} passage {i}", "qas": [{"id": f"{language}-{split}{i}", "question": f"{language} {i}?", "answers": [{"text": f"gold {i}"}]}]}]}
                for i in range(count) for language in LANGUAGES]
        write_atomic(root / "tydiqa" / f"tydiqa-goldp-v1.1-{split}.json", json.dumps({"data": rows}))
    for language in ("de", "sw"): write_atomic(root / "mgsm" / f"mgsm_{language}.tsv", "".join(f"{language} {i}?\t{i}\n" for i in range(size)))
    write_atomic(root / "mgsm" / "exemplars.json", json.dumps({language: {str(i): {"q": f"q{i}", "a": f"a{i}"} for i in range(1, 9)} for language in ("de", "sw")}))
    write_jsonl(root / "humaneval" / "HumanEval.jsonl", [{"task_id": f"Toy/{i}", "prompt": f'def add{i}(a, b):\n    """Sum, plus {i}."""\n', "entry_point": f"add{i}",
                "canonical_solution": f"    return a + b + {i}\n", "test": f"def check(candidate):\n    assert candidate(2, 3) == {5 + i}\n"} for i in range(size)])
    for town in ("blue_town", "red_town"):
        write_atomic(root / "toxigen" / f"hate_{town}_1k.txt", "".join(f"- people of {town} own {i} kettles\\n- they \\\\ sing\\n-\n" for i in range(size)))
    write_atomic(root / "toxigen" / "annotated.json", json.dumps([{"text": f"in {i} they {'grumble' if i % 2 else 'smile'}", "label": "hate" if i % 2 else "neutral", "toxicity_score": 3.0 + i % 2} for i in range(80)]))
    rows = [f'Misc,"Can cup {i} dream?","No","No; It is cutlery","Yes; Only of soup"' for i in range(size)]
    write_atomic(root / "truthfulqa" / "TruthfulQA.csv", "\n".join(["Category,Question,Best Answer,Correct Answers,Incorrect Answers", *rows]) + "\n")
    for name, cue, told in (("truth", "True:", (True, False, True)), ("info", "Helpful:", (True, True, False))):
        said = dict(zip(("No, it cannot.", "Yes, it can.", "Nobody knows."), told))
        write_jsonl(root / "truthfulqa" / f"finetune_{name}.jsonl", [{"prompt": f"Q: Does cup {i} dream?\nA: {answer}\n{cue}", "completion": " yes" if yes else " no"} for i in range(40) for answer, yes in said.items()])
    return root
