"README.md is what nbs/index.ipynb says, and its commands work."
import json, re, subprocess, sys
from pathlib import Path

import pytest

from helpers import ROOT

README = re.sub(r"<!--.*?-->", "", (ROOT/"README.md").read_text(encoding="utf-8"), flags=re.S) if (ROOT/"README.md").exists() else ""
BIN = Path(sys.executable).parent   # where set-up puts the commands; the README says how they get on the PATH

# How each command of the README is tried. `make study` runs here as a user runs it, in the checkout.
TRIED = {
    "make study": ["make", "study"],
    "make report": ["make", "report"],
    "make plan": ["make", "plan"],
    "make plan STUDY=paper": ["make", "plan", "STUDY=paper"],
    "make doctor": ["make", "doctor"],
    "make lab": ["make", "-n", "lab"],                                  # a server that does not return: its command is shown, its parts are tried below
    "make test": None,                                                  # this is it
    "make study STUDY=mini SOURCES=path/to/raw/files": ["make", "plan", "STUDY=mini", "SOURCES=path/to/raw/files"],   # most of an hour, and real data: planned here
    "make study STUDY=path/to/mine.yaml": ["make", "plan", "STUDY=params/studies/smoke.yaml"],
    "tulu-study sources": [str(BIN/"tulu-study"), "sources"],
    "pytest -m slurm tests/test_slurm.py": [str(BIN/"pytest"), "-q", "--collect-only", "-m", "slurm", "tests/test_slurm.py"],   # eight minutes where there is Slurm: they are part of this run already
    "pytest -m gpu tests/test_gpu.py": [str(BIN/"pytest"), "-q", "-m", "gpu", "tests/test_gpu.py"],   # skipped where there is no GPU
}


def commands():
    fenced = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
    inline = re.findall(r"`((?:make|tulu-study|pytest) [^`]+)`", README)
    return list(dict.fromkeys(c for c in [*fenced, *inline] if c))


def test_readme_is_current():
    done = subprocess.run([sys.executable, str(ROOT/"tools"/"readme.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_is_tried():
    assert set(commands()) - set(TRIED) == set(), "say in TRIED how it is tried"


def test_it_says_how_the_commands_are_reached_before_it_names_one():
    first = min(README.find(f"`{command}") for command in commands() if not command.startswith("make"))
    assert 0 < README.find("`. .venv/bin/activate`") < first


@pytest.mark.parametrize("environment, study, typed", [
    ({}, "nano", "tulu-study run nano"), ({"TULU_SOURCES": "/raw"}, "mini", "tulu-study run mini"), ({"TULU_TIED": "1"}, "nano", "make study"),
    ({"TULU_TIED": "1", "TULU_SOURCES": "/raw files"}, "mini", "make study STUDY=mini SOURCES='/raw files'")])
def test_what_continues_a_study_is_what_was_typed(monkeypatch, environment, study, typed):
    from tulu_study.cli import _command
    for name in ("TULU_TIED", "TULU_SOURCES", "TULU_RESULTS"): monkeypatch.delenv(name, raising=False)
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    assert _command(study) == typed


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT/target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if TRIED.get(c)])
def test_command(command):
    done = subprocess.run(TRIED[command], cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if command == "make study":
        again = subprocess.run(TRIED[command], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert "are done" in again.stdout, again.stdout
        learning_shows()


def learning_shows():
    """What the tables and pictures of the README's study are there for: worked answers teach the larger base model sums, beyond chance, alone and in the mix.

    Asked without exemplars' chains of thought, where it shows on every kind of processor; with them, a model this small sometimes loses itself in its prompt of 330 tokens."""
    from tulu_study.core.settings import settings
    scores = settings().results/"nano"/"scores"
    vanilla, *taught = (json.loads((scores/model/"gsm-direct.json").read_text()) for model in ("13B-vanilla", "13B-cot", "13B-nano_mix"))
    for one in taught: assert one["low"] > vanilla["high"] and vanilla["n"] == one["n"] == 200, (vanilla["value"], one)


def test_jupyterlab_is_there():
    done = subprocess.run([str(BIN/"jupyter"), "lab", "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
