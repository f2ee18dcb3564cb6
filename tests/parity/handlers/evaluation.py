"""Benchmarks of this issue: GSM and MMLU, their metrics, and every prompt that they make of the mirror."""
import functools
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from handlers import MIRROR, CannotRebuild, VECTORS, golden, handles, same
from tulu_study.core.files import write_jsonl
from tulu_study.evaluation import load_benchmark
from tulu_study.evaluation.benchmark import prompts_hash
from tulu_study.evaluation.gsm import demonstration, demonstrations, last_number
from tulu_study.evaluation.metrics import exact_match, squad_exact_match, squad_f1
from tulu_study.evaluation.mmlu import cells, question_text, read_rows


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------- metrics

@handles("evaluate")
def metric_tables(case):
    "Rows of (prediction, reference or references, score), as a table or as input and output."
    rows = case.output if case.input is None else [[*pair, value] for pair, value in zip(_pairs(case.input), _values(case.output))]
    for prediction, references, expected in rows:
        where = f"{prediction!r} against {references!r}"
        if "squad" in case.function:
            references = [references] if isinstance(references, str) else references
            found = {"exact_match": 100 * squad_exact_match(prediction, references), "f1": 100 * squad_f1(prediction, references)}
            expected = expected if isinstance(expected, dict) else dict(zip(("exact_match", "f1"), expected))
            assert found == pytest.approx(expected), f"{where}: found {found}, expected {expected}"
        else:
            options = {name: value for name, value in case.options.items() if name in ("ignore_case", "ignore_punctuation")}
            found = exact_match(prediction, references if isinstance(references, str) else references[0], **options)
            same(found, float(expected["exact_match"] if isinstance(expected, dict) else expected), where)


def _pairs(given):
    if isinstance(given, dict):
        names = [next((given[name] for name in names if name in given), None) for names in (("predictions", "prediction"), ("references", "reference"))]
        if None not in names:
            return list(zip(*names)) if isinstance(names[0], list) else [tuple(names)]
    elif given and all(isinstance(row, (list, tuple)) and len(row) >= 2 for row in given):
        return [row[:2] for row in given]
    raise CannotRebuild(f"cannot read pairs of prediction and reference from {str(given)[:200]}")


def _values(given):
    return given if isinstance(given, list) else [given]


# -------------------------------------------------------------------------------------------------------------------- gsm

@handles("number")
def number_extraction(case):
    rows = case.output if case.input is None else list(zip(case.input if isinstance(case.input, list) else [case.input], _values(case.output)))
    for text, expected in rows:
        same(last_number(text), expected, repr(text))


def exemplars():
    return json.loads((MIRROR / "gsm8k" / "cot_exemplars.json").read_text(encoding="utf-8"))


@handles("eval/gsm")
def demonstration_hashes(case):
    said = case.input if isinstance(case.input, str) else json.dumps(case.input)
    setting = "direct" if re.search(r"direct|no_cot\W+true", said) else "cot"
    shots = exemplars()
    block = demonstrations(shots, setting)
    found = {"length_chars": len(block), "sha256": sha256(block), "starts": block[:len(case.output.get("starts", ""))],
             "per_exemplar_sha256": [sha256(demonstration(shot, setting)) for shot in shots]}
    variants = [found | {"length_chars": len(text), "sha256": sha256(text)} for text in (block, block.removesuffix("\n\n"), block[len("Answer the following questions.\n\n"):-2])]
    wanted = case.output
    assert any({key: value for key, value in variant.items() if key in wanted} == wanted for variant in variants), f"{setting}: none of {variants} is {wanted}"


@handles("eval.gsm.run_eval.main")
def gsm_main(case):
    options = case.options | (case.input if isinstance(case.input, dict) else {})
    rows = options.get("test_rows") or _sibling_rows(case)
    benchmark = _gsm(rows, "direct" if options.get("no_cot") else "cot", options.get("n_shot", 8))
    chat, wanted = bool(options.get("use_chat_format")), case.output
    limit = options.get("max_num_examples")
    examples = benchmark.examples(limit if limit is not None else "all")
    if "questions_kept" in wanted: same([example.fields["question"] for example in examples], wanted["questions_kept"], "questions")
    if "exemplar_indices_kept" in wanted: same([exemplars().index(shot) for shot in benchmark.exemplars], wanted["exemplar_indices_kept"], "exemplars")
    prompt = benchmark.prompt(examples[0], chat)
    for key, size in (("prompt0_before_demos", None), ("prompt0_after_demos", None)):
        if key in wanted: assert (prompt.startswith if "before" in key else prompt.endswith)(wanted[key]), f"{key}: {prompt!r}"
    if "prompt0_sha256" in wanted: same(sha256(prompt), wanted["prompt0_sha256"], "prompt 0")
    if "prompt0" in wanted: same(prompt, wanted["prompt0"], "prompt 0")
    if kwargs := wanted.get("generation_kwargs"):
        stop = [[1000 + ord(text)] for text in benchmark.stop(chat)] or None   # toy ids of the vectors
        same((benchmark.max_new_tokens, stop, benchmark.temperature > 0), (kwargs["max_new_tokens"], kwargs["stop_id_sequences"], kwargs["do_sample"]), "decoding")
    if "model_outputs" in options: _gsm_scores(benchmark, examples, options["model_outputs"], wanted)


def _gsm(rows, setting, n_shot):
    root = Path(tempfile.mkdtemp(prefix="parity-gsm-"))
    write_jsonl(root / "gsm8k" / "test.jsonl", rows)
    shutil.copy(MIRROR / "gsm8k" / "cot_exemplars.json", root / "gsm8k")
    benchmark = load_benchmark("gsm", setting, source_root=root, n_shot=n_shot)
    shutil.rmtree(root)
    return benchmark


def _sibling_rows(case):
    "A vector without rows speaks of the rows of the other vectors of this function."
    rows = {json.dumps(v["input"]["test_rows"]): v["input"]["test_rows"] for v in golden(VECTORS)[case.group]
            if v["function"].startswith(case.word) and isinstance(v["input"], dict) and "test_rows" in v["input"]}
    size = re.search(r"of (\d+)", case.function)
    fitting = [found for found in rows.values() if not size or len(found) == int(size[1])]
    if len(fitting) != 1: raise CannotRebuild("the test rows are not given, and no other vector of this function says which they are")
    return fitting[0]


def _gsm_scores(benchmark, examples, outputs, wanted):
    answers = [benchmark.extract(text) for text in outputs]
    predictions = [{"example_id": e.id, "group": e.group, "target": e.target, "answer": a} for e, a in zip(examples, answers)]
    if "metrics" in wanted: assert benchmark.score(predictions)["value"] / 100 == pytest.approx(wanted["metrics"]["exact_match"])
    if wanted.get("predictions"):
        found = [{"question": e.fields["question"], "answer": e.target, "model_output": o, "prediction": a} for e, o, a in zip(examples, outputs, answers)]
        same(found, wanted["predictions"], "predictions")


# ------------------------------------------------------------------------------------------------------------------- mmlu

class Characters:
    "The vectors' toy tokenizer: id 1000 + ord(character)."
    def __call__(self, text, add_special_tokens=True): return {"input_ids": [1000 + ord(c) for c in text]}
    def encode(self, text, add_special_tokens=True): return self(text)["input_ids"]


def _mmlu(subject, dev, test, setting="5shot", n_shot=None):
    "A benchmark of one subject, written as csv and read back as text: the vectors give the cells as they are printed."
    import pandas as pd
    root = Path(tempfile.mkdtemp(prefix="parity-mmlu-"))
    for split, rows in (("dev", dev), ("test", test)):
        (root / "mmlu" / split).mkdir(parents=True)
        pd.DataFrame(rows).to_csv(root / "mmlu" / split / f"{subject}_{split}.csv", header=False, index=False)
    benchmark = load_benchmark("mmlu", setting, protocol="fixed", source_root=root, tokenizer=Characters(), n_shot=n_shot)
    shutil.rmtree(root)
    return benchmark


@handles("eval.mmlu")
def mmlu_prompts(case):
    "gen_prompt + format_example with k shots; k = -1 means all of them."
    given = case.input
    found = {}
    for key in case.output:
        k = int(re.sub(r"\D", "", key) or 0) * (-1 if "minus" in key else 1)
        benchmark = _mmlu(given["subject"], given["dev"], [given["test_row"]], n_shot=len(given["dev"]) if k < 0 else k)
        found[key] = benchmark.prompt(benchmark.examples()[0])
    same(found, case.output, "prompts")


@handles("eval.mmlu.eval_hf_model")
def mmlu_eval(case):
    "Prompt, candidates and accuracy. The toy model's answers are given only as right or wrong: predictions are made to match."
    given = case.input if isinstance(case.input, dict) else _mmlu_sibling(case)
    options, wanted = case.options | given, case.output
    chat = options.get("use_chat_format", wanted["prompt0"].startswith("<|user|>"))   # where the input says nothing, the expected prompt
    k = options.get("ntrain", options.get("k", wanted["prompt0"].count("\nAnswer: ")))   # says which of the forms was asked for
    benchmark = _mmlu(given["subject"], given["dev"], given.get("test") or [given["test_row"]], n_shot=int(k))
    same(benchmark.prompt(benchmark.examples()[0], chat), wanted["prompt0"], "prompt 0")
    if "candidate_token_ids_toy" in wanted: same(benchmark.option_ids(), wanted["candidate_token_ids_toy"], "candidates")
    if "correct" in wanted and "acc" in wanted:
        rows = [{"group": given["subject"], "target": "A", "answer": "A" if right else "B"} for right in wanted["correct"]]
        assert benchmark.score(rows)["value"] / 100 == pytest.approx(wanted["acc"])


def _mmlu_sibling(case):
    found = [v["input"] for v in golden(VECTORS)[case.group] if v["function"].startswith("eval.mmlu ") and isinstance(v["input"], dict) and "dev" in v["input"]]
    if len(found) != 1: raise CannotRebuild("the subject's rows are not given, and no other vector says which they are")
    return found[0]


@handles("pandas.read_csv")
def csv_quirks(case):
    "Each expected text is one row of one csv, in order, with or without its answer."
    printed = [question_text(row, answered) for name in sorted(key for key in case.input if key.startswith("csv"))
               for row in cells(read_rows(case.input[name].encode())) for answered in (False, True)]
    at = 0
    for expected in case.output:
        assert expected in printed[at:], f"{expected!r} is not among {printed[at:]}"
        at += printed[at:].index(expected) + 1


# ------------------------------------------------------------------------------------------------------ the whole mirror

@functools.lru_cache(maxsize=None)
def llama():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(MIRROR / "tokenizers" / "llama")


@handles("mirror_prompts")
def every_prompt(case):
    key, setting, form = case.id.split("/")
    benchmark = load_benchmark(key, setting, source_root=MIRROR, tokenizer=llama())
    prompts = [benchmark.prompt(example, chat=form == "chat") for example in benchmark.examples()]
    same({"prompts": len(prompts), "characters": sum(map(len, prompts)), "sha256": prompts_hash(prompts)}, case.output, case.id)
