"""Benchmarks of this issue: GSM and MMLU, their metrics, and every prompt that they make of the mirror."""
import functools
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from handlers import MIRROR, USUAL_MIRROR, CannotRebuild, handles, in_mirror, published, same, siblings, with_any
from tulu_study.core.files import write_jsonl
from tulu_study.core.params import benchmarks
from tulu_study.evaluation import load_benchmark
from tulu_study.evaluation.benchmark import prompts_hash
from tulu_study.evaluation.gsm import demonstration, demonstrations, last_number
from tulu_study.evaluation.metrics import exact_match, squad_exact_match, squad_f1
from tulu_study.evaluation.mgsm import CUES, find_number
from tulu_study.evaluation.mmlu import cells, header, question_text, read_rows
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
            options = {name: value for name, value in (case.options | (case.input if isinstance(case.input, dict) else {})).items() if name in ("ignore_case", "ignore_punctuation")}
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
    rows = case.output if case.input is None else list(zip(case.input if isinstance(case.input, list) else [case.input], _values(case.output), strict=True))
    for text, expected in rows:
        same((find_number if "mgsm" in case.function else last_number)(text), expected, repr(text))   # MGSM's leaves commas alone


def exemplar_files():
    "The reference has its exemplars in the code: they are those of this mirror, or else of the usual one."
    found = {path.read_bytes(): path for mirror in (USUAL_MIRROR, MIRROR) if (path := mirror / "gsm8k" / "cot_exemplars.json").exists()}
    if not found: in_mirror("gsm8k", "cot_exemplars.json")
    return [found[text] for text in reversed(found)]


def with_exemplars(check):
    "A handler that is tried with each file of exemplars there is."
    return functools.wraps(check)(lambda case: with_any(exemplar_files(), lambda path: check(case, path)))


@handles("eval/gsm")
@with_exemplars
def demonstration_hashes(case, exemplars):
    said = case.input if isinstance(case.input, str) else json.dumps(case.input)
    setting = "direct" if re.search(r"direct|no_cot\W+true", f"{said} {case.function}", re.I) else "cot"
    shots = json.loads(exemplars.read_text(encoding="utf-8"))
    block = demonstrations(shots, setting)
    found = {"length_chars": len(block), "sha256": sha256(block), "starts": block[:len(case.output.get("starts", ""))],
             "per_exemplar_sha256": [sha256(demonstration(shot, setting)) for shot in shots]}
    variants = [found | {"length_chars": len(text), "sha256": sha256(text)} for text in (block, block.removesuffix("\n\n"), block[len("Answer the following questions.\n\n"):-2])]
    wanted = case.output
    assert any({key: value for key, value in variant.items() if key in wanted} == wanted for variant in variants), f"{setting}: none of {variants} is {wanted}"


def _asked_in_chat(options, texts):
    "Where the input does not say so, the expected prompts do."
    said = options.get("use_chat_format")
    return bool(said) if said is not None else any(text.startswith("<|user|>") for text in texts)


@handles("eval.gsm.run_eval.main")
@with_exemplars
def gsm_main(case, exemplars):
    options, wanted = case.options | (case.input if isinstance(case.input, dict) else {}), case.output
    texts = [text for key, text in wanted.items() if key.startswith("prompt0") and isinstance(text, str)]
    rows = [options["test_rows"]] if options.get("test_rows") else _sibling_rows(case)
    with_any(rows, lambda rows: _gsm_run(rows, options, texts, wanted, exemplars))


def _gsm_run(rows, options, texts, wanted, exemplars):
    benchmark = _gsm(rows, "direct" if options.get("no_cot", any("\nQuesion:" in text for text in texts)) else "cot", options.get("n_shot", 8), exemplars)
    chat = _asked_in_chat(options, texts)
    limit = options.get("max_num_examples")
    examples = benchmark.examples(limit if limit is not None else "all")
    if "questions_kept" in wanted: same([example.fields["question"] for example in examples], wanted["questions_kept"], "questions")
    if "exemplar_indices_kept" in wanted: same([json.loads(exemplars.read_text(encoding="utf-8")).index(shot) for shot in benchmark.exemplars], wanted["exemplar_indices_kept"], "exemplars")
    prompt = benchmark.prompt(examples[0], chat)
    for key, size in (("prompt0_before_demos", None), ("prompt0_after_demos", None)):
        if key in wanted: assert (prompt.startswith if "before" in key else prompt.endswith)(wanted[key]), f"{key}: {prompt!r}"
    if "prompt0_sha256" in wanted: same(sha256(prompt), wanted["prompt0_sha256"], "prompt 0")
    if "prompt0" in wanted: same(prompt, wanted["prompt0"], "prompt 0")
    _decoding(benchmark, chat, wanted)
    if "model_outputs" in options: _gsm_scores(benchmark, examples, options["model_outputs"], wanted)


def _gsm(rows, setting, n_shot, exemplars):
    root = Path(tempfile.mkdtemp(prefix="parity-gsm-"))
    write_jsonl(root / "gsm8k" / "test.jsonl", rows)
    shutil.copy(exemplars, root / "gsm8k")
    benchmark = load_benchmark("gsm", setting, source_root=root, n_shot=n_shot)
    shutil.rmtree(root)
    return benchmark


def _sibling_rows(case):
    "A vector without rows speaks of the rows of the other vectors of this function."
    size, kept = re.search(r"of (\d+)", case.function), set(case.output.get("questions_kept", []))

    def pick(function, given):
        rows = given.get("test_rows") or []
        if function.startswith(case.word) and rows and (not size or len(rows) == int(size[1])) and kept <= {row["question"] for row in rows}: return rows
    return siblings(pick, "the test rows are")


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
    given = case.options | case.input
    wanted = case.output if isinstance(case.output, dict) else {f"k{given.get('k', given.get('ntrain', 5))}": case.output}
    found = {}
    for key in wanted:
        k = int(re.sub(r"\D", "", key) or 0)
        benchmark = _mmlu(given["subject"], given["dev"], [given["test_row"]], n_shot=len(given["dev"]) if re.search("minus|-", key) else k)
        found[key] = benchmark.prompt(benchmark.examples()[0])
    same(found, wanted, "prompts")


@handles("eval.mmlu.eval_hf_model")
def mmlu_eval(case):
    "Prompt, candidates and accuracy. The toy model's answers are given only as right or wrong: predictions are made to match."
    with_any([case.input] if isinstance(case.input, dict) else _mmlu_sibling(case), lambda given: _mmlu_run(given, case.options | given, case.output))


def _mmlu_run(given, options, wanted):
    chat = _asked_in_chat(options, [wanted.get("prompt0", "")])
    k = options.get("ntrain", options.get("k", wanted.get("prompt0", "").count("\nAnswer: ")))   # where the input says nothing, the expected prompt does
    benchmark = _mmlu(given["subject"], given["dev"], given.get("test") or [given["test_row"]], n_shot=int(k))
    if "prompt0" in wanted: same(benchmark.prompt(benchmark.examples()[0], chat), wanted["prompt0"], "prompt 0")
    if "candidate_token_ids_toy" in wanted: same(benchmark.option_ids(), wanted["candidate_token_ids_toy"], "candidates")
    if "correct" in wanted and "acc" in wanted:
        rows = [{"group": given["subject"], "target": "A", "answer": "A" if right else "B"} for right in wanted["correct"]]
        assert benchmark.score(rows)["value"] / 100 == pytest.approx(wanted["acc"])


def _mmlu_sibling(case):
    def pick(function, given):
        rows = {name: given[name] for name in ("subject", "dev", "test", "test_row") if name in given}
        if function.startswith("eval.mmlu") and "dev" in rows and {"test", "test_row"} & set(rows):
            first = rows["test"][0] if rows.get("test") else rows["test_row"]
            if all(part in case.output.get("prompt0", "") for part in (header(rows["subject"]), question_text(first))): return rows
    return siblings(pick, "the subject's rows are")


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


def _decoding(benchmark, chat, wanted, nested=0):
    "Compare decoding options, where a vector has them; it writes a stop string as toy ids, 1000 + ord(character), BBH's one level deeper, or for vLLM as it is."
    kwargs = wanted.get("generation_kwargs") or wanted.get("sampling_params") or {}
    stop = [[1000 + ord(letter) for letter in text] for text in benchmark.stop(chat)]
    for _ in range(nested): stop = [stop] if stop else stop
    found = {"max_new_tokens": benchmark.max_new_tokens, "max_tokens": benchmark.max_new_tokens, "stop_id_sequences": stop or None, "temperature": benchmark.temperature,
             "do_sample": benchmark.temperature > 0, "stop": benchmark.stop(chat) or None, "top_p": benchmark.top_p}
    kwargs = kwargs | ({"stop": kwargs["stop"] or None} if "stop" in kwargs else {})   # none at all is written as null or as an empty list
    same({key: found[key] for key in kwargs if key in found}, {key: value for key, value in kwargs.items() if key in found}, "decoding")


@handles("eval.bbh.run_eval.main")
def bbh_main(case):
    "Prompts, extraction and scores of toy tasks; their rows are rebuilt from the predictions where they are not given."
    given, wanted = case.options | (case.input if isinstance(case.input, dict) else {}), case.output
    tasks = given["examples"] if isinstance(given.get("examples"), dict) else _bbh_rows(given.get("canned_outputs", {}), wanted.get("predictions", {}))
    if "cot_prompt_file" not in given: raise CannotRebuild("the worked examples are not given")
    shots, prompts = given["cot_prompt_file"], {key: text for key, text in wanted.items() if key.startswith("prompt")}
    setting = "direct" if given.get("no_cot", all("step by step" not in text for text in prompts.values())) else "cot"
    chat = given.get("use_chat_format", any(text.startswith("<|user|>") for text in prompts.values()))
    files = {f"bbh/{task}.json": json.dumps({"examples": rows}) for task, rows in tasks.items()} | {f"cot-prompts/{task}.txt": shots if isinstance(shots, str) else shots[task] for task in tasks}
    benchmark = _written("bbh", files, setting=setting, n_shot=given.get("n_shot", min(text.count("\n\nQ:") for text in ([shots] if isinstance(shots, str) else shots.values()))))
    limit = given.get("max_num_examples_per_task")
    examples = benchmark.examples(per_group=limit) if limit else benchmark.examples("all")
    for key, text in prompts.items():
        fitting = [e for e in examples if e.group.split("_")[-1] in key] or examples
        same(benchmark.prompt(fitting[0], chat), text, key)
    _decoding(benchmark, chat, wanted, nested=1)
    if not {"predictions", "metrics"} & set(wanted): return
    answers = {e.id: given["canned_outputs"][e.fields["input"]] for e in examples}
    found = {task: [[answers[e.id], benchmark.extract(answers[e.id]), e.target] for e in examples if e.group == task] for task in tasks}
    if "predictions" in wanted: same(found, wanted["predictions"], "predictions")
    result = benchmark.score([{"group": e.group, "target": e.target, "completions": [answers[e.id]]} for e in examples])
    scores = {task: group["value"] / 100 for task, group in result["groups"].items()} | {"average_exact_match": result["value"] / 100}
    if "metrics" in wanted: assert scores == pytest.approx(wanted["metrics"]), f"scores: found {scores}, expected {wanted['metrics']}"


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
    with_any([case.input] if isinstance(case.input, dict) else _tydiqa_sibling(case),
             lambda given: _tydiqa_run(given | case.options, case.output if isinstance(case.output, dict) else {"prompts": {"": case.output}}))


def _tydiqa_run(given, wanted):
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
    _decoding(benchmark, chat, wanted)
    if "metrics" in wanted: _tydiqa_scores(benchmark, examples, given.get("canned_outputs") or given.get("outputs"), wanted["metrics"])


def _tydiqa_sibling(case):
    asked = json.dumps(case.output, ensure_ascii=False)

    def pick(function, given):   # the rows alone: how they were asked is this vector's own
        if function.startswith(case.word) and "dev" in given and ("train" in given or case.options.get("n_shot") == 0) and any(row["question"] in asked for row in flatten(given["dev"])): return {name: given[name] for name in ("dev", "train") if name in given}
    return siblings(pick, "the rows are")


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
    known = json.loads(published("mgsm", "exemplars.json").read_text(encoding="utf-8"))
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
    _decoding(benchmark, chat, wanted)
    if "outputs" in given: _mgsm_scores(benchmark, examples, rows, given["outputs"], wanted)


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
    return AutoTokenizer.from_pretrained(published("tokenizers", "llama"))


ALIASES = {"no_context": "closed_book", "cb": "closed_book", "no_cot": "direct", "nocot": "direct", "with_context": "gold_passage", "context": "gold_passage", "gp": "gold_passage",
           "multiple_choice": "mc", "mc1": "mc", "mc2": "mc", "0.1": "t0.1", "0.8": "t0.8", "temperature0.1": "t0.1", "temperature0.8": "t0.8"}
FORMS = {"plain": False, "chat": True, "no_chat": False, "nochat": False, "chat0": False, "chat1": True}


def prompts_asked(key, parts):
    """What the parts of a mirror key behind the benchmark ask for: setting, protocol, chat, n_shot, n, per_group.
    `cot/chat`, `5shot/plain`, `direct/plain/n_shot=4`, `gold_passage/plain/per_lang=10`, `cot/plain/max_num_examples=50`; where a part is missing: the
    benchmark's only setting (or the first, where settings differ in decoding alone), the plain form, the paper's sample."""
    settings, found = benchmarks()[key].settings, {"protocol": "paper", "chat": False, "n_shot": None, "n": None, "per_group": None}
    if len(settings) == 1 or key == "codex_eval": found["setting"] = next(iter(settings))
    for part in parts:
        name = ALIASES.get(part, part)
        shots = re.fullmatch(r"(?:n_?shot|ntrain|shots?|k)\W?(\d+)|(\d+)[-_ ]?shots?", part)
        limit = re.fullmatch(r"(max_num_examples\w*|n_instances|max_prompts_per_group|per_\w+|n)\W(\d+)", part)
        if name in settings: found["setting"] = name
        elif shots and f"{shots[1] or shots[2]}shot" in settings: found["setting"] = f"{shots[1] or shots[2]}shot"
        elif part in FORMS: found["chat"] = FORMS[part]
        elif part in ("paper", "fixed"): found["protocol"] = part
        elif shots: found["n_shot"] = int(shots[1] or shots[2])
        elif part == "all": found["n"] = "all"
        elif limit: found["per_group" if "per_" in limit[1] or limit[1] == "n_instances" else "n"] = int(limit[2])
        else: raise CannotRebuild(f"{key}: {part!r} is no setting ({', '.join(settings)}), form ({', '.join(FORMS)}), protocol, number of exemplars or of examples")
    if "setting" not in found: raise CannotRebuild(f"{key}: no setting ({', '.join(settings)}) in {'/'.join(parts)!r}")
    return found


@handles("mirror_prompts")
def every_prompt(case):
    key, *parts = case.id.split("/")
    key = {"humaneval": "codex_eval", "codex_humaneval": "codex_eval", "gsm8k": "gsm"}.get(key, key)
    if key not in benchmarks(): raise CannotRebuild(f"{key!r} is no benchmark of the study")
    asked = prompts_asked(key, parts)
    in_mirror(benchmarks()[key].folder)
    if key == "gsm": in_mirror("gsm8k", "cot_exemplars.json")
    benchmark = load_benchmark(key, asked["setting"], asked["protocol"], source_root=MIRROR, tokenizer=llama(), n_shot=asked["n_shot"])
    prompts = [benchmark.prompt(example, chat=asked["chat"]) for example in benchmark.examples(asked["n"], asked["per_group"])]
    same({"prompts": len(prompts), "characters": sum(map(len, prompts)), "sha256": prompts_hash(prompts)}, case.output, case.id)
