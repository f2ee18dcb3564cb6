"""The `smoke` sub-study end to end, through the same door as every other study: once undisturbed, once killed in the middle of pre-training, fine-tuning, evaluation and drawing.

Both must end with the same bytes: raw files, conversations, checkpoints, predictions, scores, tables and figures."""
import hashlib, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import psutil
import pytest

from helpers import ROOT

# seconds, command lines, machines and git states differ between runs, and are kept apart from what was computed
PERSONAL = {"manifest.json", "attempt.json", "last_run.json", ".lock", "seconds.json"}
TIMED = {"result.json", "training_log.jsonl"}                                                      # compared without these fields:
OF_A_RUN = {"timings", "seconds", "parameters", "predictions_made", "predictions_kept"}            # times, places, and what an earlier attempt had left


def environment(results):
    return {k: v for k, v in os.environ.items() if not k.startswith("TULU_")} | {"TULU_RESULTS": str(results), "TULU_ROOT": str(ROOT), "PYTHONPATH": str(ROOT)}


def start(results, *words):
    return subprocess.Popen([sys.executable, "-m", "tulu_study", *words], cwd=ROOT, env=environment(results), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(results, *words):
    p = start(results, *words)
    out = p.communicate(timeout=900)[0]
    return p.returncode, out


def content(path):
    "Hash of what must repeat in a file."
    if path.name not in TIMED: return hashlib.sha256(path.read_bytes()).hexdigest()
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
    own = lambda row: OF_A_RUN | ({"tokens"} if "predictions_made" in row else set())   # of an evaluation: those that this run generated
    return hashlib.sha256(json.dumps([{k: v for k, v in row.items() if k not in own(row)} for row in rows]).encode()).hexdigest()


def contents(results):
    "What a study leaves that must repeat: path -> hash."
    root = results/"smoke"
    return {str(p.relative_to(root)): content(p) for p in sorted(root.rglob("*"))
            if p.is_file() and p.name not in PERSONAL and p.suffix != ".ipynb" and ".snakemake" not in p.parts and not p.name.startswith("done.")}


def begun(folder, pattern):
    "Whether a cell has written something into a file."
    return any(p.stat().st_size for p in folder.glob(pattern))


def kill_when(process, ready, seconds=300):
    "Wait until the study has reached a point, then kill the command and see that all of its processes go."
    end = time.time() + seconds
    while not ready():
        assert time.time() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(below, timeout=6)
    assert not alive, [p.cmdline()[:6] for p in alive]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    results = tmp_path_factory.mktemp("undisturbed")
    began = time.time()
    code, out = finish(results, "run", "smoke")
    assert code == 0, out
    print(out, f"\n{time.time() - began:.0f} s")
    return results


@pytest.mark.slow
def test_smoke_runs(undisturbed):
    root = undisturbed/"smoke"
    score = json.loads((root/"scores"/"7B-cot"/"gsm-cot.json").read_text())
    assert score["n"] == 16 and score["low"] <= score["value"] <= score["high"] and score["protocol"] == "paper" and score["n_errors"] == 0
    assert {"table1.csv", "table1.md"} <= {p.name for p in (root/"tables"/"table1").iterdir()}
    assert "not run" in (root/"tables"/"table3"/"table3.md").read_text()
    assert {".svg", ".png"} <= {p.suffix for p in (root/"figures"/"change_by_dataset").iterdir()}
    report = json.loads((root/"data"/"dolly"/"report.json").read_text())
    assert report["n_in"] == report["n_records"] + report["n_rejected"] and report["n_rejected"] > 0


@pytest.mark.slow
def test_a_second_run_starts_no_kernel(undisturbed):
    began = time.time()
    code, out = finish(undisturbed, "run", "smoke")
    assert code == 0 and "cells of smoke are done" in out and time.time() - began < 30
    assert "All" in out and "missing" not in finish(undisturbed, "plan", "smoke")[1]


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes(undisturbed, tmp_path):
    """A copy of the study (where files lie is no part of a key, so that its cells are done) without one cell of each long stage, and without tables and figure, is
    killed in each of these cells at work; the others are never run again."""
    root = tmp_path/"smoke"
    shutil.copytree(undisturbed/"smoke", root)
    for emptied in ("base/nano-llama-xs", "checkpoints/7B-cot", "scores/7B-cot", "predictions/7B-cot", "tables", "figures"): shutil.rmtree(root/emptied)
    stamps = lambda: {p.parent: p.stat().st_mtime_ns for p in root.rglob("manifest.json")}
    finished = stamps()
    assert len(finished) == 6, "of 12 cells"
    points = [(root/"base"/"nano-llama-xs", "training_log.jsonl"), (root/"checkpoints"/"7B-cot", "training_log.jsonl"), (root/"predictions"/"7B-cot", "*.jsonl"),
              (root/"figures"/"change_by_dataset", "*.svg")]
    for folder, pattern in points:
        kill_when(start(tmp_path, "run", "smoke"), lambda: begun(folder, pattern))
        cell = root/"scores"/folder.name if folder.parent.name == "predictions" else folder
        assert begun(folder, pattern) and not (cell/"manifest.json").exists(), f"{cell} was not at work"
        assert finished.items() <= stamps().items(), "a finished cell ran again"
        finished = stamps()
    code, out = finish(tmp_path, "run", "smoke")
    assert code == 0, out
    assert finished.items() <= stamps().items(), "a finished cell ran again"
    ours, theirs = contents(tmp_path), contents(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if ours[n] != theirs[n]] == []
