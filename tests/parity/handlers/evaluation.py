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
from tulu_study.core.params import benchmarks
from tulu_study.evaluation import load_benchmark
from tulu_study.evaluation.benchmark import prompts_hash
from tulu_study.evaluation.gsm import demonstration, demonstrations, last_number
from tulu_study.evaluation.metrics import exact_match, squad_exact_match, squad_f1
from tulu_study.evaluation.mgsm import CUES, find_number
from tulu_study.evaluation.mmlu import cells, question_text, read_rows
from tulu_study.evaluation.tydiqa import TEMPLATES, flatten


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


# -------------------------------------------------------------------------------------------------------------------- bbh

def _written(key, files, **options):
    "A benchmark made of files that are written for the moment: name below the benchmark's folder -> text."
    root = Path(tempfile.mkdtemp(prefix=f"parity-{key}-"))
    for name, text in files.items():
        (root / key / name).parent.mkdir(parents=True, exist_ok=True)
        (root / key / name).write_text(text, encoding="utf-8")
    benchmark = load_benchmark(key, source_root=root, **options)
    shutil.rmtree(root)
    return benchmark


def _decoding(benchmark, chat, kwargs, nested=0):
    "Compare decoding options; the vectors write a stop string as toy ids, 1000 + ord(character), and BBH's one level deeper."
    stop = [[1000 + ord(letter) for letter in text] for text in benchmark.stop(chat)]
    for _ in range(nested): stop = [stop] if stop else stop
    found = {"max_new_tokens": benchmark.max_new_tokens, "stop_id_sequences": stop or None, "temperature": benchmark.temperature, "do_sample": benchmark.temperature > 0}
    same({key: found[key] for key in kwargs if key in found}, {key: value for key, value in kwargs.items() if key in found}, "decoding")


@handles("eval.bbh.run_eval.main")
def bbh_main(case):
    "Prompts, extraction and scores of toy tasks; their rows are rebuilt from the predictions where they are not given."
    given, wanted = case.options | (case.input if isinstance(case.input, dict) else {}), case.output
    tasks = given["examples"] if isinstance(given.get("examples"), dict) else _bbh_rows(given.get("canned_outputs", {}), wanted.get("predictions", {}))
    shots, prompts = given["cot_prompt_file"], {key: text for key, text in wanted.items() if key.startswith("prompt")}
    setting = "direct" if given.get("no_cot", all("step by step" not in text for text in prompts.values())) else "cot"
    chat = given.get("use_chat_format", any(text.startswith("<|user|>") for text in prompts.values()))
    files = {f"bbh/{task}.json": json.dumps({"examples": rows}) for task, rows in tasks.items()} | {f"cot-prompts/{task}.txt": shots for task in tasks}
    benchmark = _written("bbh", files, setting=setting, n_shot=given.get("n_shot", shots.count("\n\nQ:")))
    limit = given.get("max_num_examples_per_task")
    examples = benchmark.examples(per_group=limit) if limit else benchmark.examples("all")
    for key, text in prompts.items():
        fitting = [e for e in examples if e.group.split("_")[-1] in key] or examples
        same(benchmark.prompt(fitting[0], chat), text, key)
    _decoding(benchmark, chat, wanted.get("generation_kwargs", {}), nested=1)
    answers = {e.id: given["canned_outputs"][e.fields["input"]] for e in examples}
    found = {task: [[answers[e.id], benchmark.extract(answers[e.id]), e.target] for e in examples if e.group == task] for task in tasks}
    if "predictions" in wanted: same(found, wanted["predictions"], "predictions")
    result = benchmark.score([{"group": e.group, "target": e.target, "completions": [answers[e.id]]} for e in examples])
    scores = {task: group["value"] / 100 for task, group in result["groups"].items()} | {"average_exact_match": result["value"] / 100}
    assert scores == pytest.approx(wanted["metrics"]), f"scores: found {scores}, expected {wanted['metrics']}"


def _bbh_rows(outputs, predictions):
    "Inputs are known by what was written for them, targets by the prediction's row."
    tasks, left = {}, dict(outputs)
    for task, rows in predictions.items():
        for raw, _, target in rows:
            asked = next((question for question, text in left.items() if text == raw), None)
            if asked is None: raise CannotRebuild(f"no input is given for the output {raw!r} of {task}")
            left.pop(asked)
            tasks.setdefault(task, []).append({"input": asked, "target": target})
    if not tasks: raise CannotRebuild("the toy tasks are not given, and no predictions to rebuild them from")
    return tasks


# ----------------------------------------------------------------------------------------------------------------- tydiqa

class CharactersWithBos(Characters):
    "The toy tokenizer of the truncation vectors: one id per character behind a BOS, which decoding keeps."
    def encode(self, text, add_special_tokens=True): return [1, *super().encode(text)]
    def decode(self, ids): return "".join("<s>" if i == 1 else chr(i - 1000) for i in ids)


@handles("eval.tydiqa.run_eval.main")
def tydiqa_main(case):
    "Prompts by language, decoding, and averages; where a vector gives scores without completions, completions are made to match."
    given = (case.input if isinstance(case.input, dict) else _tydiqa_sibling(case)) | case.options
    wanted = case.output if isinstance(case.output, dict) else {"prompts": {"": case.output}}
    texts = list(wanted.get("prompts", {}).values())
    chat = given.get("use_chat_format", any(text.startswith("<|user|>") for text in texts))
    closed = given.get("no_context", not any(words[0] in text for words in TEMPLATES.values() for text in texts))
    files = {f"tydiqa-goldp-v1.1-{split}.json": json.dumps(given[split]) for split in ("dev", "train") if split in given}
    benchmark = _written("tydiqa", files, setting="closed_book" if closed else "gold_passage", tokenizer=CharactersWithBos(), n_shot=given.get("n_shot", 1))
    benchmark.max_context_tokens = given.get("max_context_length", 512)
    limit = given.get("max_num_examples_per_lang")
    examples = benchmark.examples(per_group=limit) if limit else benchmark.examples("all")
    for language, text in wanted.get("prompts", {}).items():
        found = [benchmark.prompt(e, chat) for e in examples if language in ("", e.group)]
        if not language: assert text in found, f"{text!r} is none of {found}"
        else: same(found[0], text, f"prompt in {language}")
    _decoding(benchmark, chat, wanted.get("generation_kwargs", {}))
    if "metrics" in wanted: _tydiqa_scores(benchmark, examples, given.get("canned_outputs") or given.get("outputs"), wanted["metrics"])


def _tydiqa_sibling(case):
    found = {json.dumps(v["input"]): v["input"] for v in golden(VECTORS)[case.group] if v["function"].startswith(case.word) and isinstance(v["input"], dict) and "dev" in v["input"]}
    fitting = [given for given in found.values() if any(row["question"] in json.dumps(case.output, ensure_ascii=False) for row in flatten(given["dev"]))]
    if len(fitting) != 1: raise CannotRebuild("the rows are not given, and no other vector of this function says which they are")
    return fitting[0]


def _tydiqa_scores(benchmark, examples, outputs, metrics):
    rows = []
    for at, example in enumerate(examples):
        if isinstance(outputs, dict): text = next((outputs[key] for key in (example.id, example.fields["question"], example.group) if key in outputs), None)
        else: text = outputs[at] if outputs else _completion_with(metrics[example.group], example.target, sum(e.group == example.group for e in examples))
        if text is None: raise CannotRebuild(f"no completion is given for {example.id}")
        rows.append({"group": example.group, "target": example.target, "completions": [text]})
    result = benchmark.score(rows)
    found = {group: {"f1": value["value"], "exact_match": result["exact_match"]["groups"][group]["value"]} for group, value in result["groups"].items()}
    found["average"] = {"f1": result["value"], "exact_match": result["exact_match"]["value"]}
    for name, values in metrics.items(): assert found[name] == pytest.approx(values), f"{name}: found {found[name]}, expected {values}"


def _completion_with(scores, accepted, members):
    "A completion of the accepted answer and other words that has these scores."
    tries = ["", *(accepted[0] + " x" * k for k in range(40))]
    fitting = [text for text in tries if (100 * squad_exact_match(text, accepted), 100 * squad_f1(text, accepted)) == pytest.approx((scores["exact_match"], scores["f1"]))]
    if members > 1 or not fitting: raise CannotRebuild(f"the completions are not given, and none is known that scores {scores}")
    return fitting[0]


# ------------------------------------------------------------------------------------------------------------------- mgsm

def _mgsm_shots():
    "The published exemplars where the mirror has their language; others get the English numbers, which all languages share."
    known = json.loads((MIRROR / "mgsm" / "exemplars.json").read_text(encoding="utf-8"))
    english = {at: find_number(shot["a"].rstrip(".")) for at, shot in known["en"].items()}
    return known, {language: known.get(language) or {at: {"q": "?", "a": f"= {number}."} for at, number in english.items()} for language in CUES}


@handles("eval.mgsm.run_eval.main")
def mgsm_main(case):
    "Every language has the same rows. Of a language whose exemplars the mirror lacks, the order of the exemplars is compared by their results."
    given, wanted = case.options | case.input, case.output
    known, shots = _mgsm_shots()
    rows = given["rows"] if isinstance(given["rows"], dict) else {language: given["rows"] for language in CUES}
    files = {f"mgsm_{language}.tsv": "".join(f"{question}\t{answer}\n" for question, answer in pairs) for language, pairs in rows.items()}
    benchmark = _written("mgsm", files | {"exemplars.json": json.dumps(shots)}, setting="cot", n_shot=given.get("n_shot", 6))
    limit = given.get("max_num_examples_per_lang")
    examples = benchmark.examples(per_group=limit) if limit else benchmark.examples("all")
    first = {language: next(e for e in examples if e.group == language) for language in rows}
    texts = {key: value for key, value in wanted.items() if "prompt" in key}
    chat = given.get("use_chat_format", any("<|assistant|>" in text or text.startswith("<|user|>") for text in texts.values()))
    for key, text in texts.items():
        language = key.split("_")[0]
        found = benchmark.prompt(first[language], chat)
        if language in known: assert text in (found, found[:len(text)], found[-len(text):]), f"{key}: {found!r}"
        elif "tail" in key:
            (demos, asked), (_, mine) = text.rsplit("\n\n", 1), found.rsplit("\n\n", 1)
            same((mine, find_number(benchmark.exemplars[language][-1]["a"].rstrip("."))), (asked, find_number(demos.rstrip(".。"))), key)
    for key in [key for key in wanted if key.endswith("_n_demos")]: same(len(benchmark.exemplars[key.split("_")[0]]), wanted[key], key)
    _decoding(benchmark, chat, wanted.get("generation_kwargs", {}))
    _mgsm_scores(benchmark, examples, rows, given["outputs"], wanted)


def _mgsm_scores(benchmark, examples, rows, outputs, wanted):
    "Completions are given for the rows of one language, in order."
    at = {language: {question: i for i, (question, _) in enumerate(pairs)} for language, pairs in rows.items()}
    texts = {e.id: (outputs[e.group] if isinstance(outputs, dict) else outputs)[at[e.group][e.fields["question"]]] for e in examples}
    result = benchmark.score([{"group": e.group, "target": e.target, "completions": [texts[e.id]]} for e in examples])
    found = {language: group["value"] / 100 for language, group in result["groups"].items()} | {"average": result["value"] / 100}
    if "metrics" in wanted: assert found == pytest.approx(wanted["metrics"]), f"found {found}, expected {wanted['metrics']}"
    for key in [key for key in wanted if key.endswith("_rows")]:
        same([{"question": e.fields["question"], "answer": e.target, "model_output": texts[e.id], "prediction": benchmark.extract(texts[e.id])}
              for e in examples if e.group == key.split("_")[0]], wanted[key], key)


# ------------------------------------------------------------------------------------------------------ the whole mirror

@functools.lru_cache(maxsize=None)
def llama():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(MIRROR / "tokenizers" / "llama")


@handles("mirror_prompts")
def every_prompt(case):
    "benchmark/setting/form, and further parts for another number of exemplars or examples."
    key, rest = case.id.split("/")[0], case.id.split("/")[1:]
    found = re.findall(r"(?:n_?shot|ntrain|shots?)\W?=?(\d+)|(?<!\w)(\d+)[-_ ]?shots?(?!\w)", "/".join(rest)) if key != "mmlu" else []
    n_shot = int("".join(found[0])) if found else None
    limits = {name: int(number) for part in rest for name, number in re.findall(r"(per_group|per_task|per_lang\w*|max_num_examples\w*|n_instances|n)=(\d+)", part)}
    per_group = next((number for name, number in limits.items() if "per_" in name or name == "n_instances"), None)
    n = next((number for name, number in limits.items() if name in ("n", "max_num_examples")), "all" if "all" in rest else None)
    settings = benchmarks()[key].settings
    aliases = {"no_context": "closed_book", "no_cot": "direct", "with_context": "gold_passage", "context": "gold_passage"}
    setting = next((aliases.get(part, part) for part in rest if aliases.get(part, part) in settings), None)
    form = next((part for part in rest if part in ("plain", "chat")), None)
    if not (setting and form): raise CannotRebuild(f"{case.id}: no setting of {key} ({', '.join(settings)}) or no form (plain, chat) in it")
    benchmark = load_benchmark(key, setting, source_root=MIRROR, tokenizer=llama(), n_shot=n_shot)
    prompts = [benchmark.prompt(example, chat=form == "chat") for example in benchmark.examples(n, per_group)]
    same({"prompts": len(prompts), "characters": sum(map(len, prompts)), "sha256": prompts_hash(prompts)}, case.output, case.id)
