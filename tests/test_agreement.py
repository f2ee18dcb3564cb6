"""The benchmark of engine agreement, small: both engines through the runner, on every benchmark, with a random model and invented files."""
import csv
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from helpers import ROOT
from invented import write_sources
from test_evaluation import checkpoint, quick  # noqa: F401  fixtures
from tulu_study.core.params import benchmarks
from tulu_study.evaluation import sandbox

SPEC = importlib.util.spec_from_file_location("agreement", ROOT / "bench" / "agreement.py")
agreement = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(agreement)


@pytest.fixture(scope="module")
def larger(checkpoint, tmp_path_factory):  # noqa: F811
    "The checkpoint with room for every benchmark's prompts."
    import shutil
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("model") / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder


@pytest.mark.slow
def test_both_engines_on_every_benchmark(larger, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    write_sources(tmp_path / "sources", 3)
    left = "codex_eval" if sandbox.problem() else ""
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "agreement.py"), "--model", str(larger), "--sources", str(tmp_path / "sources"), "--examples", "3", "--others", "0", "--tokens", "6",
                           "--leave-out", left, "--work", str(tmp_path / "work"), "--into", str(tmp_path)], capture_output=True, text=True, timeout=540, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    rows = {row["setting"]: row for row in csv.DictReader((tmp_path / "agreement.csv").read_text().splitlines())}
    assert set(rows) == {f"{key} {setting}" for key, settings in agreement.wanted(left).items() for setting in settings} and len(rows) >= len(benchmarks())
    for name, row in rows.items():
        assert row["n"] == "3" and row["too long"] == "0" and row["score, first"] == row["score, second"] != "", name
        assert float(row["identical"] or row["same choice"]) == 1 or float(row["largest gap there"]) < agreement.TIE, name
        if row["same choice"]: assert float(row["largest difference of log-probabilities"]) < agreement.NOISE[name.endswith(" mc")], name
    for engine in ("vllm", "transformers"):  # what a difference would be explained from
        kept = agreement.tokens_of(tmp_path / "work" / f"{engine}-float32-64-3")
        assert all(row["prompt_hash"] in kept and kept[row["prompt_hash"]][1] for row in agreement.rows_of(tmp_path / "work" / f"{engine}-float32-64-3", "gsm-cot"))
    page = (tmp_path / "agreement.md").read_text()
    assert "mmlu 5shot" in page and "tydiqa gold_passage" in page and "mgsm cot" in page and "none." in page


def write_run(out, name, rows):
    (out / "predictions").mkdir(parents=True, exist_ok=True)
    (out / "predictions" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(i, **more): return {"example_id": str(i), "prompt_hash": f"h{i}", "error": None, "score": 1.0, "answer": "A", "completions": []} | more


def test_a_difference_beyond_rounding_is_found(tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"
    write_run(first, "gsm-cot", [row(0, completions=["x"]), row(1, completions=["y z"]), row(2, error="prompt too long")])
    write_run(second, "gsm-cot", [row(0, completions=["x"]), row(1, completions=["y w"], score=0.0), row(2, error="prompt too long")])
    write_run(first, "mmlu-0shot", [row(0, option_logprobs=[-1.0, -2.0])])
    write_run(second, "mmlu-0shot", [row(0, option_logprobs=[-1.0, -2.5], answer="B")])
    for out, last in ((first, 7), (second, 8)): (out / "tokens.jsonl").write_text("".join(json.dumps([f"h{i}", [1, 2], [5, 6, last]]) + "\n" for i in range(2)))
    asked = []
    def child(*words):
        asked.extend(json.loads(words[1].read_text()))
        words[1].write_text(json.dumps([0.5] * len(asked)))
    monkeypatch.setattr(agreement, "child", child)
    gsm, mmlu = agreement.compared(first, second, "model", tmp_path, {"gsm": ["cot"], "mmlu": ["0shot"]})
    assert asked == [[1, 2, 5, 6]] and (gsm["n"], gsm["too long"], gsm["identical"], gsm["first difference at token"], gsm["largest gap there"]) == (2, 1, 0.5, 2, 0.5)
    assert (mmlu["same choice"], mmlu["largest difference of log-probabilities"], gsm["score, second"]) == (0.0, 0.5, 50.0)
    assert len(agreement.problems([gsm, mmlu])) == 2 and not agreement.problems([gsm | {"largest gap there": 0.001}])
