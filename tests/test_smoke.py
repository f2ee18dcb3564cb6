"""The `smoke` sub-study end to end, through the same door as every other study: once undisturbed, once killed in the middle of pre-training, fine-tuning and evaluation.

Both must end with the same bytes: raw files, conversations, checkpoints, predictions, scores, tables and figures."""
import hashlib, json, os, signal, subprocess, sys, time
from pathlib import Path

import psutil
import pytest

from helpers import ROOT

# seconds, command lines, machines and git states differ between runs, and are kept apart from what was computed
PERSONAL = {"manifest.json", "result.json", "attempt.json", "training_log.jsonl", "last_run.json", ".lock", "report.json", "seconds.json"}


def environment(results):
    return {k: v for k, v in os.environ.items() if not k.startswith("TULU_")} | {"TULU_RESULTS": str(results), "TULU_ROOT": str(ROOT)}


def start(results, *words):
    return subprocess.Popen([sys.executable, "-m", "tulu_study", *words], cwd=ROOT, env=environment(results), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(results, *words):
    p = start(results, *words)
    out = p.communicate(timeout=900)[0]
    return p.returncode, out


def contents(results):
    "What a study leaves that must repeat: path -> hash."
    root = results/"smoke"
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*"))
            if p.is_file() and p.name not in PERSONAL and p.suffix != ".ipynb" and ".snakemake" not in p.parts and not p.name.startswith("done.")}


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
    root = tmp_path/"smoke"
    points = [lambda: (root/"base"/"nano-llama-xs"/"training_log.jsonl").exists() or any((root/"base").glob("*/attempt.json")),
              lambda: any((root/"checkpoints").glob("*/training_log.jsonl")),
              lambda: any(p.stat().st_size for p in (root/"predictions").glob("*/*.jsonl"))]
    finished = set()
    for ready in points:
        process = start(tmp_path, "run", "smoke")
        kill_when(process, ready)
        done = {p.parent: p.stat().st_mtime_ns for p in root.rglob("manifest.json")}
        assert finished <= set(done)
        finished = set(done)
    stamps = {p: (p/"manifest.json").stat().st_mtime_ns for p in finished}
    code, out = finish(tmp_path, "run", "smoke")
    assert code == 0, out
    assert all((p/"manifest.json").stat().st_mtime_ns == t for p, t in stamps.items()), "a finished cell ran again"
    ours, theirs = contents(tmp_path), contents(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if ours[n] != theirs[n]] == []
