"""`tulu-study compare`: the same questions in the same words, or a refusal that says why; and what a comparison could have shown."""
import json
import math
import subprocess
import sys

import pytest
from scipy.stats import binomtest, t

from helpers import ROOT
from test_evaluation import BENCHMARKS, MODEL, OPTIONS, checkpoint, quick, sources  # noqa: F401  fixtures
from tulu_study.core.files import read_jsonl, write_atomic, write_jsonl
from tulu_study.core.stats import bootstrap, minimum_detectable, paired_difference, sign_flip_p
from tulu_study.evaluation.benchmark import percent_with_interval
from tulu_study.evaluation.runner import evaluate
from tulu_study.reporting.comparison import compare_models, result_folders
from tulu_study.reporting.scores import ResultsError, smallest_change

import numpy as np


@pytest.fixture(scope="module")
def results(checkpoint, sources, tmp_path_factory):  # noqa: F811
    "A model's results as evaluate leaves them, twice: once as it is, once with other scores of the same questions."
    root = tmp_path_factory.mktemp("results")
    evaluate(MODEL, BENCHMARKS, checkpoint, root / "one" / "predictions", root / "one" / "scores", sources, **OPTIONS)
    change(root, "two", lambda row, i: row | {"score": float(i % 3 != 0)})
    return root


def change(root, name, row, score=lambda score: score):
    "A copy of model `one` with changed rows and scores."
    for path in (root / "one").rglob("*.json*"):
        target = root / name / path.relative_to(root / "one")
        if path.suffix == ".jsonl": write_jsonl(target, [row(r, i) for i, r in enumerate(read_jsonl(path))])
        else: write_atomic(target, json.dumps(score(json.loads(path.read_text()))))
    return str(root / name)


def test_two_models_on_the_same_questions(results):
    found, alone = compare_models(str(results / "two"), str(results / "one"))
    assert [row["setting"] for row in found] == ["direct", "0shot"] and not alone and not any(row["refused"] for row in found)
    rows = [list(read_jsonl(results / name / "predictions" / "gsm-direct.jsonl")) for name in ("two", "one")]
    gained, lost = (sum((a["score"] > b["score"]) if up else (a["score"] < b["score"]) for a, b in zip(*rows)) for up in (True, False))
    assert found[0]["n"] == 12 and found[0]["p"] == pytest.approx(binomtest(gained, gained + lost).pvalue)
    assert found[0]["difference"] == pytest.approx(100 * (gained - lost) / 12)


@pytest.mark.parametrize("name, row, score, said", [
    ("fewer", lambda r, i: r | {"example_id": f"other {i}"} if i == 3 else r, lambda s: s, "2 of 13 questions were asked of one model only"),
    ("other words", lambda r, i: r | {"prompt_hash": "0" * 16} if i == 2 else r, lambda s: s, "1 of 12 prompts read differently"),
    ("protocol", lambda r, i: r, lambda s: s | {"protocol": "fixed"}, "protocol fixed against paper"),
    ("version", lambda r, i: r, lambda s: s | {"version": 9}, "version 9 against 1"),
    ("judge", lambda r, i: r, lambda s: s | {"stand_in": {"words": "x"}}, "judged by a stand-in"),
    ("failed", lambda r, i: r | {"error": "engine: x", "score": None}, lambda s: s, "no question has a score from both")])
def test_not_the_same_is_refused(name, row, score, said, results):
    found, _ = compare_models(change(results, name, row, score), str(results / "one"))
    assert said in found[0]["refused"] and "p" not in found[0]


def test_formats_may_differ_and_are_named(results):
    found, _ = compare_models(change(results, "chat", lambda r, i: r | {"prompt_hash": "c" + r["prompt_hash"]}, lambda s: s | {"chat": True}), str(results / "one"))
    assert not found[0]["refused"] and "one as a chat" in found[0]["formats"]


def test_a_study_s_models_are_found_by_name(results, tmp_path):
    for kind in ("scores", "predictions"): (tmp_path / "mine" / kind).mkdir(parents=True)
    for kind in ("scores", "predictions"): (tmp_path / "mine" / kind / "7B-dolly").symlink_to(results / "one" / kind)
    assert result_folders("mine/7B-dolly", tmp_path) == tuple(tmp_path / "mine" / kind / "7B-dolly" for kind in ("scores", "predictions"))
    assert result_folders(str(tmp_path / "mine" / "scores" / "7B-dolly")) == result_folders("mine/7B-dolly", tmp_path)
    with pytest.raises(ResultsError, match="found no score files; looked in"): result_folders("mine/7B-cot", tmp_path)


def test_the_command(results):
    def command(*names): return subprocess.run([sys.executable, "-m", "tulu_study", "compare", *names], capture_output=True, text=True, cwd=ROOT)
    good, bad, none = command(str(results / "two"), str(results / "one")), command(change(results, "fixed", lambda r, i: r, lambda s: s | {"protocol": "fixed"}), str(results / "one")), command("one")
    assert good.returncode == 0 and "gsm direct" in good.stdout and "mmlu 0shot" in good.stdout and "detectable" in good.stdout, good.stderr
    assert bad.returncode == 1 and "not compared: protocol" in bad.stdout and "2 of 2 settings were not compared" in bad.stderr
    assert none.returncode == 1 and "Name two models" in none.stderr


def test_mcnemar_is_exact_and_other_differences_are_drawn():
    for gained, lost in ((6, 0), (9, 2), (20, 14), (400, 350)):
        assert sign_flip_p(np.array([1.0] * gained + [-1.0] * lost + [0.0] * 30)) == pytest.approx(binomtest(gained, gained + lost).pvalue, abs=1e-12)
    drawn = sign_flip_p(np.array([0.5, 0.25, 0.75, -0.1]))
    assert round(drawn * 10000) == pytest.approx(drawn * 10000) and 0.1 < drawn < 0.4


def test_few_groups_need_student_s_quantiles():
    few = minimum_detectable(900, 0.2, groups=9)
    assert few == pytest.approx((t.ppf(0.975, 8) + t.ppf(0.8, 8)) * 0.2 / 3) and few > minimum_detectable(9, 0.2) > minimum_detectable(900, 0.2)
    assert minimum_detectable(900, 0.2, groups=5000) == pytest.approx(minimum_detectable(5000, 0.2), rel=1e-3)
    with pytest.raises(ValueError, match="groups: found 1"): minimum_detectable(900, 0.2, groups=1)


def test_a_score_says_what_it_could_have_shown():
    rng, names = np.random.default_rng(0), np.repeat([f"language {i}" for i in range(9)], 20)
    values = np.clip(np.repeat(rng.random(9), 20) + rng.normal(0, 0.1, 180), 0, 1)
    macro, micro = (percent_with_interval(list(values), list(names), average) for average in ("macro", "micro"))
    se = bootstrap(values, names, average="macro").se
    assert macro["detectable"] == pytest.approx((t.ppf(0.975, 8) + t.ppf(0.8, 8)) * 100 * se * math.sqrt(2), abs=1e-5)
    assert percent_with_interval([0.0] * 180, [f"g{i % 9}" for i in range(180)], "macro")["detectable"] == micro["detectable"], "nothing right anywhere shows no difference more easily"
    assert micro["detectable"] == pytest.approx(100 * minimum_detectable(180, math.sqrt(0.5)), abs=1e-5) and percent_with_interval([], [])["detectable"] is None
    change = paired_difference(values, np.clip(values - 0.1 - 0.3 * rng.random(180), 0, 1), names, average="macro")
    assert change.units == 9 and smallest_change(change.se, change.n, change.units) == pytest.approx((t.ppf(0.975, 8) + t.ppf(0.8, 8)) * change.se)


def test_evaluate_prints_what_each_benchmark_could_show(monkeypatch, tmp_path, capsys):
    from tulu_study import cli
    from tulu_study.evaluation import standalone
    from tulu_study.evaluation.runner import Report
    score = {"benchmark": "gsm", "setting_name": "EM", "n": 50, "n_errors": 0, "errors": [], "n_examples": 50} | percent_with_interval([1.0] * 20 + [0.0] * 30, [""] * 50)
    monkeypatch.setattr(standalone, "evaluate_any", lambda *args, **options: Report([score], folder=tmp_path))
    cli.evaluate.__wrapped__("model", into=str(tmp_path))
    assert f" {100 * minimum_detectable(50, math.sqrt(0.5)):.1f} " in capsys.readouterr().out
