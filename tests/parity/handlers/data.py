"""Datasets and chat text: templates, converters, whole files of the mirror."""
import inspect
import json
import random
import re
import tempfile
from pathlib import Path

from handlers import MIRROR, PAPER, CannotRebuild, converted, handles, published, same, seed_of, sha256_rows
from tulu_study.core.files import read_jsonl
from tulu_study.core.messages import render_eval_chat
from tulu_study.core.params import SourceFile, datasets
from tulu_study.core.params import mixes
from tulu_study.data import convert, converters
from tulu_study.data.mixes import name_in
from tulu_study.data.templates import WITH_INPUT, WITHOUT_INPUT, encode_few_shot_example, encode_instruction_example


@handles("instruction_encode_templates.*")
def template_tables(case):
    "Every row of one table, filled with the same pieces as an example's draw would."
    with_input = "wo_input" not in case.function
    example = (case.input["instruction"], case.input["input"] if with_input else "", case.input["output"])
    table = WITH_INPUT if with_input else WITHOUT_INPUT
    same(len(table), len(case.output), "rows of the table")
    for expected in case.output:
        row = expected["index"]
        pair = encode_instruction_example(*example, rng=_Picks(row))
        same({"index": row, "weight": table[row].weight, **pair}, expected, f"row {row}")


class _Picks:
    "A generator whose draw is decided."
    def __init__(self, row):
        self.row = row

    def choices(self, table, weights=None, *, cum_weights=None):
        return [table[self.row]]


@handles("encode_instruction_example")
def instruction_examples(case):
    options, rng = _encoder_options(case), random.Random(seed_of(case))
    expected = case.output if isinstance(case.output, list) else [case.output]
    found = [encode_instruction_example(*example, rng=rng, **options) for example in _examples(case, expected, options.get("eos", ""))]
    if case.input is None:   # the draw is not given either: any row of the table that yields this prompt will do
        for example, wanted in zip(_examples(case, expected, options.get("eos", "")), expected, strict=True):
            table = WITH_INPUT if example[1].strip() else WITHOUT_INPUT
            assert wanted in [encode_instruction_example(*example, rng=_Picks(row), **options) for row in range(len(table))], f"no template gives {wanted!r}"
        return
    same(found, expected)


def _encoder_options(case):
    options = dict(case.options)
    return {"eos" if name == "eos_token" else name: value for name, value in options.items() if name in ("eos_token", "random_template")}


def _examples(case, expected, eos):
    "The calls behind a vector: a list of triples, an object, or a sentence about them."
    if isinstance(case.input, list):
        return [tuple(triple.get(name) for name in ("instruction", "input", "output")) if isinstance(triple, dict) else tuple(triple) for triple in case.input]
    if isinstance(case.input, dict) and "instruction" in case.input:
        return [(case.input["instruction"], case.input.get("input"), case.input["output"])]
    answers = [row["completion"].removesuffix(eos).strip() for row in expected]
    if isinstance(case.input, dict) and (listed := next((case.input[name] for name in ("calls", "examples") if name in case.input), None)):
        if isinstance(listed, list): return [tuple(row.get(name) for name in ("instruction", "input", "output")) if isinstance(row, dict) else tuple(row) for row in listed]
        return _examples_in_words(listed, answers)
    if isinstance(case.input, str): return _examples_in_words(case.input, answers)
    if case.input is None:
        pieces = [[piece for piece in re.split(r"\s*\n\s*", row["prompt"]) if piece] for row in expected]
        if all(len(found) in (1, 2) for found in pieces):
            return [(found[0], found[1] if len(found) == 2 else "", answer) for found, answer in zip(pieces, answers)]
    raise CannotRebuild(f"input {case.input!r} does not say what was encoded")


def _examples_in_words(words, answers):
    "'12 calls, instruction I0..I11, input is two spaces'"
    name = re.search(r"instructions? (?:is |are |= ?)?(\w*?)0\b", words)
    said = re.search(r"inputs? (?:is |are |= ?)?(.+?)(?:,|$)", words)
    if not (name and said):
        raise CannotRebuild(f"cannot read the calls from {words!r}")
    text, numbered = said[1].strip(), re.match(r"(\w*?)0\.\.", said[1])
    blanks = {"one space": " ", "a space": " ", "two spaces": "  ", "three spaces": "   ", "empty": "", "blank": " ", "null": None, "None": None, "a newline": "\n"}
    if not numbered and text not in blanks and not re.fullmatch(r"(['\"]).*\1", text):
        raise CannotRebuild(f"cannot read the input from {words!r}")
    def input_of(i):
        return f"{numbered[1]}{i}" if numbered else blanks[text] if text in blanks else text[1:-1]
    return [(f"{name[1]}{i}", input_of(i), answer) for i, answer in enumerate(answers)]


@handles("encode_few_shot_example")
def few_shot_example(case):
    given = case.input
    exemplars = given.get("examplars", given.get("exemplars"))
    eos = {"eos": case.options["eos_token"]} if "eos_token" in case.options else {}
    same(encode_few_shot_example(given["instruction"], exemplars, given["input"], given["output"], **eos), case.output)


@handles("convert_*_data")
def conversion(case):
    "Raw files written as given, converted with the seed and options of the vector, compared row by row."
    key = re.fullmatch(r"convert_(\w+)_data", case.word)[1]
    said = {**case.options, **{name: value for name, value in case.input.items() if name not in ("raw_files", "seed")}, **(case.input.get("options") or {})}
    options = {name: value for name, value in said.items() if name in inspect.signature(converters()[key]).parameters}
    if "june2023" in converters()[key].protocols and case.commits and PAPER not in case.commits:   # older than the protocol of the paper; other converters did not change
        if "13404e37a" not in case.commits:
            raise CannotRebuild(f"behaviour of {case.commits}, which the product has no protocol for")
        options["protocol"] = "june2023"
    with tempfile.TemporaryDirectory() as folder:
        given = case.input["raw_files"]
        given = {said["data_file"]: given[said["data_file"]]} if said.get("data_file") in given else given   # of several versions of a file the one that is asked for
        for name, content in _named_as_here(key, given).items():
            path = Path(folder) / "raw" / key / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        record, more = _record_and_more(key, given)
        report = convert(record, Path(folder) / "raw", folder, seed=seed_of(case), **options, **more)
        for name, rows in (case.output["files"] if isinstance(case.output, dict) else {f"{key}_data.jsonl": case.output}).items():
            same(list(read_jsonl(Path(folder) / key / name)), rows, name)
            assert [list(row) for row in read_jsonl(Path(folder) / key / name)] == [["dataset", "id", "messages"]] * len(rows)
        dropped = report.reasons.pop("system_or_bing", 0)   # of these the reference prints the number
        if said := re.search(r"invalid examples in sharegpt data: (\d+)", isinstance(case.output, dict) and case.output.get("stdout") or ""):
            same(dropped, int(said[1]), "conversations with system or bing")
        same({reason: n for reason, n in report.reasons.items() if reason not in SAYS_NOTHING}, {}, "rejected records")


SAYS_NOTHING = {"no_instances", "empty_conversation"}   # rejected here; the reference passes over them without a word


def _record_and_more(key, given):
    "The record that fits the raw files, and the options that they need: the reference's ShareGPT converter starts from split files."
    if key != "sharegpt":
        return key, {}
    ours = datasets()[key]
    ready = not {file.name for file in ours.files} & set(given)
    if ready:
        return ours.model_copy(update={"files": [SourceFile(name=name) for name in given]}), {"already_split": True}
    return key, {"tokenizer": published("tokenizers", "llama")}


@handles("split_one_sample")
def sharegpt_split(case):
    "Pieces and the role filter, with one token a word, one for the beginning of a text, and six a message."
    from tulu_study.data.sharegpt import HEADER, role_fault, split_paper
    given = case.input if isinstance(case.input, dict) else {}
    in_words = re.search(r"max_length\D{1,4}(\d+)", f"{case.function} {case.input}")
    max_length = given.get("max_length", case.options.get("max_length", in_words and int(in_words[1])))
    if not isinstance(max_length, int):
        raise CannotRebuild(f"neither input {case.input!r} nor function {case.function!r} says max_length")
    for expected in case.output if isinstance(case.output, list) else [case.output]:
        words, name = expected["conversation_word_counts"], expected["id"]
        senders = [("human", "gpt")[i % 2] for i in range(len(words))]
        ranges = split_paper([n + 1 + HEADER for n in words], max_length)
        same([[f"{name}_{start}", words[start:stop]] for start, stop in ranges], [list(piece) for piece in expected["after_split"]], name)
        if "after_role_filter" in expected:
            same([f"{name}_{start}" for start, stop in ranges if not role_fault(senders[start:stop])], expected["after_role_filter"], f"{name}, filtered")


@handles("filter_invalid_roles")
def sharegpt_roles(case):
    from tulu_study.data.sharegpt import role_fault
    rows = case.output if case.input is None else list(zip(case.input, case.output, strict=True))
    same([[senders, int(not role_fault(senders))] for senders, _ in rows], [[senders, int(kept)] for senders, kept in rows])


def _named_as_here(key, given):
    "Raw files under the names of the product's record: a publisher's file had other names at other times."
    names = [file.name for file in datasets()[key].files]
    if len(names) == len(given) == 1 and names != list(given):
        return {names[0]: content for content in given.values()}
    return given


@handles("mirror_conversations")
def whole_file(case):
    rows = list(read_jsonl(converted(case.id)))
    found = {"rows": len(rows), "sha256": sha256_rows(rows)} | ({"first_id": rows[0]["id"], "last_id": rows[-1]["id"]} if rows else {})
    assert {"rows", "sha256"} & set(case.output), f"nothing known is expected: {sorted(case.output)}"
    same(found, {key: case.output[key] for key in found if key in case.output}, f"{MIRROR.name}/{case.id}")


@handles("eval.templates.create_prompt_with_tulu_chat_format")
def evaluation_prompt(case):
    messages = case.input["messages"] if isinstance(case.input, dict) else case.input
    extra = {name: value for name, value in case.options.items() if name in ("eos", "bos", "add_bos")}
    if isinstance(case.output, dict):
        for add_bos, expected in case.output.items():
            same(render_eval_chat(messages, **{**extra, "add_bos": add_bos == "True"}), expected, f"add_bos={add_bos}")
    else:
        same(render_eval_chat(messages, **extra), case.output)


@handles("should_be_filtered")
def filtered_by_name(case):
    "One answer for each text, or conversation, of the input: is one of Tülu 2's names in it?"
    names = case.options.get("names") or mixes()["tulu_mix_unnamed"].exclude
    given = case.input if isinstance(case.output, list) else [case.input]
    found = [bool(name_in(_conversation(item), names)) for item in given]
    same(found, case.output if isinstance(case.output, list) else [case.output])


def _conversation(item):
    "A text, a message, a list of either, or a row {messages}, as messages."
    if isinstance(item, dict):
        return _conversation(item["messages"]) if "messages" in item else [{"role": "user", **item}]
    if isinstance(item, list):
        return [message for one in item for message in _conversation(one)]
    return [{"role": "user", "content": item}]
