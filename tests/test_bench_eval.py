"""The benchmark of evaluation: everybody gets the same prompts, and what is reported is what was measured. How fast anything is, no test asks: `make bench-eval` does."""
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from helpers import ROOT
from test_evaluation import checkpoint, sources  # noqa: F401  fixtures


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_eval", ROOT / "bench" / "eval.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_the_prompts_are_those_that_the_product_asks(bench, checkpoint, sources, tmp_path, monkeypatch):  # noqa: F811
    "Written down once for the others; the product makes its own, and they are the same."
    from tulu_study.evaluation.benchmark import prompt_hash
    from tulu_study.evaluation.runner import read_predictions
    from tulu_study.evaluation.standalone import evaluate_any
    monkeypatch.setattr("tulu_study.evaluation.gsm.GSM.max_new_tokens", 4)
    monkeypatch.setattr(bench, "LENGTH", 480)
    monkeypatch.setattr(bench, "NEW", 4)
    count = {"gsm": 3, "mmlu": 5}
    bench.write_prompts(tmp_path, checkpoint, sources, count)
    evaluate_any(str(checkpoint), bench.wanted(count), tmp_path / "out", engine="transformers", max_length=480, chat=False, source_root=sources)
    for key, setting in (("gsm", "cot"), ("mmlu", "5shot")):
        rows, asked = bench.rows_of(tmp_path / f"{key}.jsonl"), read_predictions(tmp_path / "out" / "predictions" / f"{key}-{setting}.jsonl")
        assert len(rows) == count[key] and [(row["id"], prompt_hash(row["prompt"])) for row in rows] == [(row["example_id"], row["prompt_hash"]) for row in asked]
    assert all(bench.LETTERS[row["gold"]] == row["target"] for row in bench.rows_of(tmp_path / "mmlu.jsonl"))


def test_the_tasks_of_the_harness_add_no_text(bench, tmp_path):
    bench.write_tasks(tmp_path)
    gsm, mmlu = (yaml.safe_load((tmp_path / f"bench_{key}.yaml").read_text()) for key in ("gsm", "mmlu"))
    assert gsm["doc_to_text"] == mmlu["doc_to_text"] == "{{prompt}}" and gsm["generation_kwargs"]["until"] == ["\n"] and gsm["generation_kwargs"]["max_gen_toks"] == 512
    assert gsm["doc_to_target"] == "{{target}}" and mmlu["doc_to_target"] == "gold" and mmlu["doc_to_choice"] == ["A", "B", "C", "D"] and mmlu["target_delimiter"] == " "
    assert gsm["filter_list"][0]["filter"][0]["regex_pattern"] == "(-?[$0-9.,]{2,})|(-?[0-9]+)" and gsm["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "gsm.jsonl")


def found(bench, ours, others):
    "Measurements of six processes: ours needs `ours` seconds for each benchmark, the others `others`."
    side = lambda seconds, wall: {"seconds": {"gsm": seconds, "mmlu": seconds}, "start": 1.0, "wall": wall, "peak": 1.0, "gsm": ["a", "b"], "mmlu": [[-1.0, -2.0, -3.0, -4.0]] * 2, "gsm score": 1.0, "mmlu score": 1.0}
    return {bench.GSM_ALONE: side(ours, 9), bench.MMLU_ALONE: side(ours, 9), bench.OURS: side(ours, 10) | {"seconds": {"gsm+mmlu": 2 * ours}}, bench.REFERENCE: side(others, 50), bench.HARNESS: side(others, 15) | {"gsm": ["a", "c"]}, bench.HARNESS_GSM: side(others, 9), bench.EACH: side(ours, 9)}


def test_a_missed_target_is_an_error_where_that_is_asked_for(bench, capsys):
    scores, count = {side: {"gsm": 1.0, "mmlu": 2.0} for side in (bench.OURS, bench.EACH, bench.REFERENCE, bench.HARNESS)}, {"gsm": 2, "mmlu": 2}
    bench.report(found(bench, 1.0, 8.0), [1.1, 1.3, 1.25], [0.9, 0.97, 1.0], scores, count, check=True)
    said = capsys.readouterr().out
    assert "8.00 ×" in said and "1.25 ×" in said and "1.50 ×" in said and "50%, 100%" in said and "0.97 ×" in said
    bench.report(found(bench, 1.0, 7.9), [1.2], [1.0], scores, count, check=False)
    with pytest.raises(SystemExit, match="Missed: GSM: prompts/s against the reference's way"): bench.report(found(bench, 1.0, 7.9), [1.2], [1.0], scores, count, check=True)
    slow = found(bench, 1.0, 8.0)
    slow[bench.OURS]["seconds"] = {"gsm+mmlu": 16 / 1.19}
    with pytest.raises(SystemExit, match="Missed: both: prompts/s against lm_eval"): bench.report(slow, [1.3], [1.0], scores, count, check=True)
    assert "1.19 ×" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="Missed: GSM alone: prompts/s against lm_eval"): bench.report(found(bench, 1.0, 8.0), [1.1, 1.1, 1.3], [1.0], scores, count, check=True)


def test_packages_to_compare_with_stay_out_of_the_environment(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("bench_environment", ROOT / "bench" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    asked = []
    def pip(command, **options):
        asked.append(command)
        if "broken==1" in command: return SimpleNamespace(returncode=1, stderr="ERROR: no such thing\n")
        (tmp_path / ".bench" / "peer.part").mkdir(parents=True)
        return SimpleNamespace(returncode=0, stderr="")
    monkeypatch.setattr(subprocess, "run", pip)
    folder = module.side_folder("peer", ["peer==1"], {"vllm": "0.1+cpu"})
    assert "--no-deps" in asked[0] and asked[0][asked[0].index("--target") + 1] == str(tmp_path / ".bench" / "peer.part")
    assert "Version: 0.1+cpu" in (folder / "vllm-0.1+cpu.dist-info" / "METADATA").read_text()
    assert module.side_folder("peer", ["peer==1"], {"vllm": "0.1+cpu"}) == folder and len(asked) == 1
    module.side_folder("peer", ["peer==2"])
    assert len(asked) == 2
    with pytest.raises(SystemExit, match="could not install broken==1: ERROR: no such thing"): module.side_folder("peer", ["broken==1"])
    assert folder.is_dir()
