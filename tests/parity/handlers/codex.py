"""Codex-Eval: pass@k, prompts, stops, results and scores of HumanEval."""
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from handlers import CannotRebuild, handles, same
from tulu_study.core.files import write_jsonl
from tulu_study.evaluation import load_benchmark
from tulu_study.evaluation.codex_eval import check_of, pass_at_k
from tulu_study.evaluation.sandbox import run_checks

needs_sandbox = bool(shutil.which("bwrap"))


@handles("codex_humaneval.*")
def unbiased_estimator(case):
    "Rows [n, c, k, value], as a table or as input and output; an input may hold lists of counts."
    if case.input is None: rows = case.output
    else:
        given = case.input
        if isinstance(given, dict):
            names = [next((given[name] for name in names if name in given), None) for names in (("n", "num_samples"), ("c", "num_correct"), ("k",))]
            if None in names: raise CannotRebuild(f"cannot read n, c and k from {str(given)[:200]}")
            correct = names[1] if isinstance(names[1], list) else [names[1]]
            samples = names[0] if isinstance(names[0], list) else [names[0]] * len(correct)
            given = [[n, c, names[2]] for n, c in zip(samples, correct)]
        given = given if isinstance(given[0], list) else [given]
        rows = [[*counts, value] for counts, value in zip(given, case.output if isinstance(case.output, list) else [case.output])]
    for n, c, k, expected in rows: assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12), f"pass@{k} of {c} among {n}"


@handles("eval.codex_humaneval.*")
def codex_main(case):
    given, wanted = (case.input if isinstance(case.input, dict) else {}), case.output
    options = case.options | given
    problems = given.get("problems") or given.get("test_rows")
    if not problems: raise CannotRebuild("the problems are not given")
    temperature = float(options.get("temperature") or (re.findall(r"temperature\W+([\d.]+)", case.function) or ["0.1"])[0])
    benchmark = _codex(problems, "t0.8" if temperature == 0.8 else "t0.1")
    limit = options.get("max_num_examples")
    examples = benchmark.examples(limit if limit is not None else "all")
    rows = [example.fields for example in examples]
    if "prompt0" in wanted:
        asked = options.get("use_chat_format")   # where the input says nothing, the expected prompt says which form was asked for
        chat = bool(asked) if asked is not None else wanted["prompt0"].startswith("<|user|>")
        same(benchmark.prompt(examples[0], chat), wanted["prompt0"], "prompt 0")
    if kwargs := wanted.get("generation_kwargs") or wanted.get("sampling_params"): _decoding(benchmark, kwargs)
    _results(rows, options.get("completions"), wanted)


def _codex(problems, setting):
    root = Path(tempfile.mkdtemp(prefix="parity-codex-"))
    write_jsonl(root / "humaneval" / "HumanEval.jsonl", problems)
    benchmark = load_benchmark("codex_eval", setting, source_root=root)
    shutil.rmtree(root)
    return benchmark


def _decoding(benchmark, kwargs):
    "Options that are the benchmark's; stop strings as toy ids (1000 + character) or as they are."
    toy = [[1000 + ord(character) for character in text] for text in benchmark.stop()]
    found = {"max_new_tokens": benchmark.max_new_tokens, "max_tokens": benchmark.max_new_tokens, "top_p": benchmark.top_p, "temperature": benchmark.temperature, "do_sample": benchmark.temperature > 0}
    for name, value in found.items():
        if name in kwargs: same(value, kwargs[name], name)
    if kwargs.get("stop_id_sequences") is not None: same(sorted(toy), sorted(kwargs["stop_id_sequences"]), "stop ids")
    if kwargs.get("stop") is not None: same(sorted(benchmark.stop()), sorted(kwargs["stop"]), "stop strings")


def _results(problems, completions, wanted):
    "Every completion run in the sandbox: rows, results and pass@k."
    if not completions or not {"metrics", "result_rows"} & set(wanted): return
    if not needs_sandbox: pytest.skip("bubblewrap is not installed: sudo make system-deps")
    pairs = [(row, text) for row in problems for text in completions.get(row["entry_point"]) or completions[row["task_id"]]]
    results = dict(run_checks([(i, check_of(row, text)) for i, (row, text) in enumerate(pairs)]))
    found = [{"task_id": row["task_id"], "prompt": row["prompt"], "completion": text, "result": results[i], "passed": results[i] == "passed"} for i, (row, text) in enumerate(pairs)]
    if "result_rows" in wanted: same(found, wanted["result_rows"], "results")
    for name, value in wanted.get("metrics", {}).items():
        k = int(name.split("@")[1])
        each = [[result["passed"] for result in found if result["task_id"] == row["task_id"]] for row in problems]
        assert sum(pass_at_k(len(passed), sum(passed), k) for passed in each) / len(each) == pytest.approx(value), name
