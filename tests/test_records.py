"""The records of `params/benchmarks.yaml` say what the classes do: sample, decoding, extractor. And every page shows a prompt in full."""
import ast
import importlib
import json
import re

import pytest
import yaml

from helpers import ROOT
from invented import write_sources
from tulu_study.core.params import Benchmark, benchmarks
from tulu_study.evaluation import load_benchmark

SETTINGS = [(key, setting) for key, record in benchmarks().items() for setting in record.settings]
COMPLETIONS = ["So the answer is 1,250.\nQ: next", " The answer is (B). Well, 7. ", "A: Nobody.\n\nQ: and?", "    return 1\n\ndef more():\n", "", " ABC "]


@pytest.fixture(scope="module")
def root(tmp_path_factory): return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("key, setting", SETTINGS)
def test_the_class_decodes_as_its_record_says(key, setting, root):
    b = load_benchmark(key, setting, source_root=root)
    said = b.record.settings[setting].decoding
    assert (b.kind, b.max_new_tokens, b.temperature, b.top_p, b.n_samples) == (said.kind, said.max_new_tokens, said.temperature, said.top_p, said.n_samples)
    if said.kind == "generate": assert (b.stop(False), b.stop(True)) == (said.stop, said.stop_chat)


@pytest.mark.parametrize("key, setting", SETTINGS)
def test_the_class_extracts_as_its_record_says(key, setting, root):
    b = load_benchmark(key, setting, source_root=root)
    module, name = b.record.settings[setting].extractor.split(".")
    extractor = getattr(importlib.import_module(f"tulu_study.evaluation.{module}"), name)
    if b.kind == "generate": assert [b.extract(text) for text in COMPLETIONS] == [extractor(text) for text in COMPLETIONS]
    if b.kind == "options": assert all(b.choose(values) == extractor(values) for values in ([-3.0, -1.0, -1.0, -2.0], [-1.0, -9.0, -9.0, -9.0]))
    if b.kind == "completions":
        row = {"target": b.rows[0].target, "option_logprobs": [-1.0, -2.0, -3.0, -4.0], "error": None}
        assert b.measures(row) == extractor([-1.0, -2.0], [-3.0, -4.0], 0)


def test_the_paper_s_samples_have_their_sizes():
    assert {key: record.n for key, record in benchmarks().items()} == {"gsm": 200, "mmlu": 14042, "bbh": 1080, "tydiqa": 900, "mgsm": 2750, "codex_eval": 164, "toxigen": 7000, "truthfulqa": 817}


@pytest.mark.parametrize("key, setting", [("mmlu", "0shot"), ("mgsm", "cot"), ("codex_eval", "t0.1"), ("truthfulqa", "mc")])
def test_a_complete_test_set_is_asked_in_file_order(key, setting, root):
    b = load_benchmark(key, setting, source_root=root)
    assert [e.id for e in b.examples()] == [row.id for row in b.rows] == [e.id for e in b.examples("all")]


@pytest.mark.parametrize("field", ["few_shot", "decoding", "extractor", "metric", "matches", "n", "version", "average"])
def test_a_record_without_one_of_them_is_refused(field):
    raw = yaml.safe_load((ROOT / "params" / "benchmarks.yaml").read_text(encoding="utf-8"))["benchmarks"]["gsm"]
    Benchmark(key="gsm", **raw)
    for place in (raw, raw["shared"], raw["settings"]["cot"]): place.pop(field, None)
    with pytest.raises(ValueError, match=f"{field}\n  Field required"): Benchmark(key="gsm", **raw)


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "nbs" / "evaluation").glob("0[2-9]_*.ipynb")))
def test_every_page_shows_a_prompt_in_full(page):
    "Plain and as a chat, text and token ids, with exactly one BOS (id 1, as every toy tokenizer here has it)."
    cells = json.loads((ROOT / "nbs" / "evaluation" / page).read_text(encoding="utf-8"))["cells"]
    shown = ["".join(output["text"]) for cell in cells if ".rendered(" in "".join(cell["source"]) for output in cell.get("outputs", []) if output.get("name") == "stdout"]
    assert shown, "no cell prints benchmark.rendered(…)"
    for text in shown:
        found = re.fullmatch(r"── plain\n(.*)\n── plain: (\d+) tokens\n(\[.*?\])\n\n── chat\n(<\|user\|>\n.*<\|assistant\|>\n.*)\n── chat: (\d+) tokens\n(\[.*?\])\n", text, re.DOTALL)
        assert found, text[:300]
        plain, size, ids, chat, chat_size, chat_ids = found.groups()
        for count, listed in ((size, ids), (chat_size, chat_ids)):
            numbers = ast.literal_eval(listed)
            assert len(numbers) == int(count) > 10 and numbers[0] == 1 and numbers.count(1) == 1
        question = [line for line in plain.split("\n") if line.strip()][0]
        assert question in chat


def test_a_prompt_with_two_bos_is_not_rendered(root):
    class Twice:
        bos_token_id = 1
        def __call__(self, text): return {"input_ids": [1, 1, 5]}
    b = load_benchmark("gsm", "cot", source_root=root)
    with pytest.raises(ValueError, match="2 BOS tokens .*expected exactly one, in front"): b.rendered(b.rows[0], Twice())


def test_a_score_lists_its_questions(root):
    "Every benchmark's score has the ids of all questions, failed ones too, with the hashes of their prompts."
    for key, setting in SETTINGS:
        b = load_benchmark(key, setting, source_root=root)
        rows = [{"example_id": f"x{i}", "prompt_hash": f"h{i}", "group": "", "target": "1", "completions": [], "error": "prompt too long"} for i in range(3)]
        assert b.score(rows)["examples"] == {"x0": "h0", "x1": "h1", "x2": "h2"}, (key, setting)
