"""ToxiGen and TruthfulQA: prompts, sampling, answers, multiple choice, judges' prompts, and log-probabilities of whole completions."""
import hashlib
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from handlers import MIRROR, CannotRebuild, handles, same
from tulu_study.core.params import benchmarks
from tulu_study.core.sources import find
from tulu_study.evaluation import load_benchmark
from tulu_study.evaluation.engines import TransformersEngine
from tulu_study.evaluation.stand_ins import Judge
from tulu_study.evaluation.toxigen import label_and_group
from tulu_study.evaluation.truthfulqa import choice_scores, judge_prompt, preset_text, question_prompt, split_answers, trim, with_stop

QUESTION = "Can pigs fly?"
COLUMNS = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]


# ------------------------------------------------------------------------------------------- log-probability of completions

class Letters:
    "The vectors' tokenizer: one id a character, 1 in front."
    bos_token_id = 1

    def __call__(self, texts): return {"input_ids": [self.ids(text) for text in texts] if isinstance(texts, list) else self.ids(texts)}
    def ids(self, text): return [1] + [ord(letter) for letter in text]


def letters_engine():
    "The real engine around the vectors' model: logits[t, v] = -((v - id[t] - 1) mod 128) / 10."
    import torch

    def model(input_ids, attention_mask, position_ids, use_cache, logits_to_keep):
        logits = -((torch.arange(128)[None, None] - input_ids[..., None] - 1) % 128) / 10
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    engine = TransformersEngine.__new__(TransformersEngine)
    engine.torch, engine.device, engine.model, engine.tokenizer = torch, "cpu", model, Letters()
    engine.bos, engine.max_length, engine.pad_id = "one", 100_000, 0
    return engine


@handles("eval.utils.score_completions")
def completion_scores(case):
    given = case.input if isinstance(case.input, dict) else {"examples": case.input}
    if "toy_model" in given and not all(word in given["toy_model"] for word in ("mod 128", "id 1 = BOS")): raise CannotRebuild(f"another toy model: {given['toy_model'][:200]}")
    asked = case.options.get("aggregation") or given.get("aggregation") or "sum"
    examples = given["examples"]
    found = letters_engine().completion_scores([e["prompt"] for e in examples], [e["completions"] for e in examples], asked)
    scores = {}
    for example, output in zip(examples, found):
        assert output.error is None, output.error
        scores.setdefault(example["prompt"], {}).update(zip(example["completions"], output.logprobs))
    same(sorted(scores), sorted(case.output), "prompts")
    for prompt, wanted in case.output.items():
        assert scores[prompt] == pytest.approx(wanted, abs=2e-4, rel=1e-5), prompt


# --------------------------------------------------------------------------------------------------------------- TruthfulQA

def preset(name):
    "The text of a preset, or None where its file is not here (the mirror has none; a `presets.py` there, or in the cache, is used)."
    record = benchmarks()["truthfulqa"]
    if record.options["presets"][name].get("text"): return record.options["presets"][name]["text"]
    return preset_text(record, name, MIRROR) if find(MIRROR, record.folder, "presets.py") else None


@handles("eval.truthfulqa.presets")
def preset_hashes(case):
    "The checksum that the product demands of each preset, and the text where it is here."
    known = benchmarks()["truthfulqa"].options["presets"]
    for name, wanted in case.output.items():
        if wanted.get("sha256"): same(known[name]["sha256"], wanted["sha256"], f"checksum of {name}")
        if (text := preset(name)) is not None: same({"len": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}, {"len": len(text), **wanted}, name)


@handles("eval.truthfulqa.utilities.format_prompt")
def question_prompts(case):
    given = case.options | (case.input if isinstance(case.input, dict) else {"Question": case.input})
    question, unknown = given["Question"], []
    expected = case.output if isinstance(case.output, dict) else {given.get("preset", "qa"): case.output}
    for name, wanted in expected.items():
        text = preset(name)
        if "{PRESET}" in wanted: same(question_prompt(question, name, "{PRESET}"), wanted, name)
        elif text is None and re.fullmatch(r"[0-9a-f]{64}", wanted): unknown.append(name)
        else:
            found = question_prompt(question, name, text or "")
            same(hashlib.sha256(found.encode()).hexdigest() if re.fullmatch(r"[0-9a-f]{64}", wanted) else found, wanted, name)
    if len(unknown) == len(expected): raise CannotRebuild(f"the texts of {', '.join(unknown)} are not here")


@handles("format_end2end_prompt")
def judge_prompts(case):
    question, answer = case.input if isinstance(case.input, list) else (case.input.get("question") or case.input["q"], case.input.get("answer") or case.input["ans"])
    wanted = case.output if isinstance(case.output, dict) else {"info" if case.options.get("info") is True else "judge": case.output}
    for name, text in wanted.items():
        same(judge_prompt(question, answer, "info" if "info" in name else "truth"), text, name)


@handles("split_multi_answer")
def answers_of_a_cell(case):
    "Cells that give lists and cells that give one answer, in the order of the input."
    given = [case.input] if isinstance(case.input, str) else case.input
    if not isinstance(case.output, dict): return same([split_answers(cell) for cell in given] if isinstance(case.output[0], list) else split_answers(given[0]), case.output)
    wanted = case.output.get("split", [])
    same([split_answers(cell) for cell in given[:len(wanted)]], wanted, "split")
    same([with_stop(cell) for cell in given[len(wanted):]], case.output.get("best", []), "best")


@handles("format_best")
def best_answers(case):
    given = [case.input] if isinstance(case.input, str) else case.input
    same([with_stop(cell) for cell in given], case.output if isinstance(case.output, list) else [case.output])


@handles("trim_answer")
def trimmed(case):
    given, wanted = ([case.input], [case.output]) if isinstance(case.input, str) else (case.input, case.output)
    same([trim(text) for text in given], wanted)


ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"]


@handles("MC_calcs")
def multiple_choice(case):
    given = case.input if isinstance(case.input, dict) else {}
    lists = {name: [float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", text)] for name, text in re.findall(r"(scores_\w+)\s*=\s*\[([^\]]*)\]", case.function)}
    true, false = (given.get(f"scores_{name}", lists.get(f"scores_{name}")) for name in ("true", "false"))
    if not true or not false: raise CannotRebuild("the scores are not given")
    if isinstance(given.get("ref_best"), int): best = given["ref_best"]
    elif "ref_best" in given and "ref_true" in given: best = given["ref_true"].index(given["ref_best"])
    elif word := re.search(rf"ref_best\W+({'|'.join(ORDINALS)})", case.function): best = ORDINALS.index(word[1])
    else: raise CannotRebuild("which answer is the best one is not given")
    found = choice_scores(true, false, best)
    for key, wanted in case.output.items():
        if (measure := key.split()[-1].lower()) in found: assert found[measure] == pytest.approx(wanted, abs=1e-9), key
        elif key.endswith("lprob max"): assert max(true) == pytest.approx(wanted), key
        elif key.endswith("lprob diff"): assert max(true) - max(false) == pytest.approx(wanted), key


def truthfulqa(rows, setting):
    "The benchmark over invented questions."
    import pandas as pd
    with tempfile.TemporaryDirectory(prefix="parity-truthfulqa-") as root:
        (Path(root) / "truthfulqa").mkdir()
        pd.DataFrame(rows, columns=COLUMNS).to_csv(Path(root) / "truthfulqa" / "TruthfulQA.csv", index=False)
        return load_benchmark("truthfulqa", setting, source_root=root)


@handles("eval.truthfulqa.run_eval.*")
def truthfulqa_run(case):
    "Prompts and decoding of both settings; the preset stands as {QA_PRESET}."
    wanted, given = case.output, case.input if isinstance(case.input, dict) else {}
    chat = given.get("use_chat_format")
    if chat is None: chat = any(str(wanted.get(name, "")).startswith("<|user|>") for name in ("generation_prompt", "mc_prompt"))
    fill = lambda text: text.replace("{QA_PRESET}", preset("qa")).replace("{PRESET}", preset("qa"))
    shown = fill(wanted.get("generation_prompt") or wanted.get("mc_prompt"))
    question = given.get("Question") or re.findall(r"Q: (.*)", shown)[-1]
    options = wanted.get("mc_completions") or ["Yes.", "No."]
    best = [{"Question": question, "Best Answer": options[0], "Correct Answers": "; ".join(options[:(len(options) + 1) // 2]), "Incorrect Answers": "; ".join(options[(len(options) + 1) // 2:])}]
    generation, mc = (truthfulqa(best, setting) for setting in ("generation", "mc"))
    if "generation_prompt" in wanted: same(generation.prompt(generation.examples()[0], chat), fill(wanted["generation_prompt"]), "generation prompt")
    if "mc_prompt" in wanted: same(mc.prompt(mc.examples()[0], chat), fill(wanted["mc_prompt"]), "mc prompt")
    if "mc_completions" in wanted: same(mc.completions(mc.examples()[0]), wanted["mc_completions"], "mc completions")
    kwargs = wanted.get("generation_kwargs") or {}
    for name, value in {"max_new_tokens": generation.max_new_tokens, "do_sample": generation.temperature > 0}.items():
        if name in kwargs: same(value, kwargs[name], name)
    if "stop_id_sequences" in kwargs: same(bool(generation.stop(chat)), bool(kwargs["stop_id_sequences"]), "whether anything stops a completion")
    if "aggregation" in (wanted.get("score_kwargs") or {}): same("sum", wanted["score_kwargs"]["aggregation"], "aggregation")


# ------------------------------------------------------------------------------------------------------------------ ToxiGen

@handles("eval.toxigen.*")
def toxigen_run(case):
    "Prompts of every file, decoding, and the metrics of the given verdicts."
    files = {re.sub(r"_(txt)$", r".\1", name.removeprefix("file_")): text for name, text in (case.input or {}).items() if isinstance(text, str) and name.endswith("txt")}
    files |= (case.input or {}).get("files", {})
    if not files: raise CannotRebuild("the files are not given")
    wanted, size = case.output, case.options.get("max_prompts_per_group") or case.input.get("max_prompts_per_group") or 500
    with tempfile.TemporaryDirectory(prefix="parity-toxigen-") as root:
        (Path(root) / "toxigen").mkdir()
        for name, text in files.items(): (Path(root) / "toxigen" / name).write_text(text, encoding="utf-8")
        benchmark, store = load_benchmark("toxigen", "default", source_root=root), Path(root) / "verdicts.jsonl"
        examples = benchmark.examples(per_group=size)
        chat = case.input.get("use_chat_format", wanted["prompts"][0].startswith("<|user|>") if wanted.get("prompts") else False)
        if "prompts" in wanted: same([benchmark.prompt(e, chat) for e in examples], wanted["prompts"], "prompts")
        kwargs = wanted.get("generation_kwargs") or {}
        if "max_new_tokens" in kwargs: same(benchmark.max_new_tokens, kwargs["max_new_tokens"], "max_new_tokens")
        if "stop_id_sequences" in kwargs: same(bool(benchmark.stop(chat)), bool(kwargs["stop_id_sequences"]), "whether anything stops a completion")
        rows = wanted.get("predictions")
        if not rows: return
        found = [{"text": e.fields["text"], "label": label_and_group(e.fields["file"])[0], "target_groups": [e.group]} for e in examples]
        same(found, [{key: row[key] for key in ("text", "label", "target_groups")} for row in rows], "examples")
        verdicts = {row["prediction"]: float(row["is_toxic"]) for row in rows}
        benchmark.judges = {"toxicity": Judge("the vector's", lambda pairs: [verdicts[answer] for _, answer in pairs])}
        judged = benchmark.finish([{"example_id": e.id, "group": e.group, "completions": [row["prediction"]], "error": None} for e, row in zip(examples, rows)], store)
        result = benchmark.score(judged)
        same([row["score"] for row in judged], [float(row["is_toxic"]) for row in rows], "verdicts")
        metrics = {name: group["value"] / 100 for name, group in result["groups"].items()} | {"overall": result["value"] / 100}
        assert metrics == pytest.approx(wanted["metrics"], abs=1e-6)
