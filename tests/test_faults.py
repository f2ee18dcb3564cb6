"""Kill -9 of a study, at every level of its process tree, then the same command.

The run notebooks are replaced by slow ones with the same parameters, which append to a file as long as they live: what goes on writing after a kill is an orphan,
and what is written twice was not remembered. (That real results are byte-identical after kills is shown by test_smoke.py.)"""
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import psutil
import pytest

from helpers import ROOT, notebook

SLOW = """import time
log = run.out_dir.parent.parent/'ticks.log'
me = run.out_dir.parent.name + '/' + run.out_dir.name
for tick in range(8):
    with open(log, 'a') as f: f.write(f'{me} {tick}\\n')
    time.sleep(0.1)
(run.out_dir/f'{run.out_dir.name}_data.jsonl').write_text('{}')"""


@pytest.fixture
def house(tmp_path):
    "The project with stand-in run notebooks."
    for name in ("tulu_study", "params"): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "Snakefile"): shutil.copy(ROOT/name, tmp_path)
    study = (tmp_path/"params"/"studies"/"smoke.yaml").read_text()
    (tmp_path/"params"/"studies"/"smoke.yaml").write_text(study.replace("tables: [table1, table3]", "").replace("figures: [change_by_dataset]", ""))
    (tmp_path/"params"/"studies"/"one.yaml").write_text((tmp_path/"params"/"studies"/"smoke.yaml").read_text().replace("study: smoke", "study: one").replace("[vanilla, dolly, cot]", "[vanilla, dolly]"))
    for path in (ROOT/"nbs"/"runs").glob("*.ipynb"):
        cell = next("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if "parameters" in c["metadata"].get("tags", []))
        notebook(tmp_path/"nbs"/"runs"/path.name, cell, "from tulu_study.core.cells import start\nrun = start(globals())", SLOW, "run.finish()")
    return tmp_path


def command(house, *words, more={}, **options):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TULU_", "SLURM_"))} | {"PYTHONPATH": str(house), "TULU_ROOT": str(house), **more}
    return subprocess.Popen([sys.executable, "-m", "tulu_study", *words], cwd=house, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def finish(house, *words):
    p = command(house, *words)
    out = p.communicate(timeout=240)[0]
    return p.returncode, out


def ticks(house, study="smoke"):
    log = house/"results"/study/"ticks.log"
    return log.read_text().splitlines() if log.exists() else []


def wait_for(condition, seconds=90):
    end = time.time() + seconds
    while time.time() < end:
        if condition(): return True
        time.sleep(0.05)
    return False


def tree(process):
    "Every process below one, and the one itself."
    try: return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess: return []


def pick(level, run):
    "The process to kill: the command, Snakemake, the process of a cell, or its kernel."
    def is_level(p):
        try: line = " ".join(p.cmdline())
        except psutil.Error: return False
        return {"run": p.pid == run.pid, "snakemake": "-m snakemake" in line, "cell": " cell " in line and "snakemake" not in line, "kernel": "ipykernel_launcher" in line}[level]
    return next((p for p in tree(psutil.Process(run.pid)) if is_level(p)), None)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["run", "snakemake", "cell", "kernel"])
def test_kill_then_the_same_command(house, level):
    run = command(house, "run", "one", "--jobs", "2")
    assert wait_for(lambda: any(t.startswith("data/") for t in ticks(house, "one"))), run.communicate()[0]
    below = tree(psutil.Process(run.pid))
    finished = {p.parent.name for p in (house/"results"/"one").rglob("manifest.json")}
    pick(level, run).send_signal(signal.SIGKILL)
    if level in ("run", "snakemake"):
        gone, alive = psutil.wait_procs([p for p in below if p.pid != run.pid], timeout=5)
        assert not alive, [p.cmdline() for p in alive if p.is_running()]
        still = len(ticks(house, "one"))
        time.sleep(1)
        assert len(ticks(house, "one")) == still, "an orphan goes on writing"
        run.kill()
    run.communicate(timeout=240)
    written = {p.parent.name for p in (house/"results"/"one").rglob("manifest.json")}
    between = {t.split()[0] for t in ticks(house, "one") if t.endswith(" 7")} - {name for t in ticks(house, "one") if (name := t.split()[0]).split("/")[1] in written}   # killed after their last tick and before their manifest: not finished
    code, out = finish(house, "run", "one", "--jobs", "2")
    assert code == 0, out
    lines = ticks(house, "one")
    for name in {l.split()[0] for l in lines}:
        count = sum(l == f"{name} 7" for l in lines)
        assert count == 1 + (name in between), f"{name} was completed {count} times"
        if name.split("/")[1] in finished: assert sum(l == f"{name} 0" for l in lines) == 1, f"{name} was finished and ran again"
    code, out = finish(house, "run", "one")
    assert code == 0 and "are done" in out and len(ticks(house, "one")) == len(lines), "a second run starts no kernel"


@pytest.mark.slow
def test_asked_to_stop(house):
    "SIGTERM to the command reaches the running cells, which count as interrupted and not as failed; the same command continues."
    run = command(house, "run", "one", "--jobs", "2")
    assert wait_for(lambda: any(t.startswith("data/") for t in ticks(house, "one"))), run.communicate()[0]
    below = tree(psutil.Process(run.pid))
    run.send_signal(signal.SIGTERM)
    out = run.communicate(timeout=60)[0]
    assert run.returncode != 0 and "failed" not in finish(house, "plan", "one")[1], out
    assert not psutil.wait_procs(below[1:], timeout=5)[1]
    code, out = finish(house, "run", "one", "--jobs", "2")
    assert code == 0, out


@pytest.mark.slow
def test_a_cell_stops_before_the_time_of_its_job_is_over(house):
    path = house/"nbs"/"runs"/"world.ipynb"
    path.write_text(path.read_text().replace("range(8)", "range(400)"))
    (house / "bin").mkdir()
    (house / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")   # a Slurm that does not know the job
    (house / "bin" / "squeue").chmod(0o755)
    job = command(house, "cell", "one", "world", more={"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 24), "TULU_SIGNAL_SECONDS": "10", "PATH": f"{house}/bin:{os.environ['PATH']}"})
    out = job.communicate(timeout=60)[0]
    assert job.returncode == 75 and "the time of Slurm job 7 is over in" in out and "~ world: stopped as asked; the same command continues" in out, out
    assert re.search(r"~ +world +interrupted +continues", plan := finish(house, "plan", "one")[1]), plan


SAVES = """import signal
class StandInInterrupted(RuntimeError): pass
asked, state = [], run.out_dir/'state'/'tick'
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
first = int(state.read_text()) if state.exists() else 0
for tick in range(first, first + 40):
    with open(run.out_dir.parent.parent/'ticks.log', 'a') as f: f.write(f'{run.out_dir.name} {tick}\\n')
    time.sleep(0.1)
    if asked:
        time.sleep(SECONDS)
        state.parent.mkdir(exist_ok=True)
        state.write_text(str(tick + 1))
        raise StandInInterrupted('asked to stop')
    if tick == 39: break
(run.out_dir/f'{run.out_dir.name}_data.jsonl').write_text('{}')"""


def interrupted(house, seconds):
    "A study whose conversions save when they are asked to stop, under a terminal's Ctrl-C: SIGINT to its whole process group."
    path = house/"nbs"/"runs"/"convert.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"][2]["source"] = "import time\n" + SAVES.replace("SECONDS", str(seconds))
    path.write_text(json.dumps(nb))
    run = command(house, "run", "one", "--jobs", "1", start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert wait_for(lambda: any(re.fullmatch(r"\w+ \d+", t) for t in ticks(house, "one"))), run.communicate()[0]   # a conversion, which need not be the first cell
    below = tree(psutil.Process(run.pid))
    os.killpg(run.pid, signal.SIGINT)
    return run, below


@pytest.mark.slow
def test_ctrl_c_saves(house):
    run, below = interrupted(house, 2)
    out = run.communicate(timeout=60)[0]
    assert run.returncode == 130 and "stopping: what is running is saved; press Ctrl-C again to end at once" in out and "Stopped as asked; the same command continues" in out, out
    assert not psutil.wait_procs(below[1:], timeout=5)[1] and "failed" not in finish(house, "plan", "one")[1]
    assert len(list((house/"results"/"one"/"data").glob("*/state/tick"))) == 1, out
    code, out = finish(house, "run", "one", "--jobs", "2")
    lines = [t for t in ticks(house, "one") if re.fullmatch(r"\w+ \d+", t)]
    assert code == 0 and len(lines) == len(set(lines)) and {f"{t.split()[0]} 39" for t in lines} <= set(lines), (out, lines)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(house):
    run, below = interrupted(house, 300)
    assert any(line.startswith("stopping:") for line in run.stdout)
    time.sleep(1)
    os.killpg(run.pid, signal.SIGINT)
    out = run.communicate(timeout=20)[0]
    assert run.returncode == 130 and "stopped; the same command continues" in out and not psutil.wait_procs(below[1:], timeout=5)[1], out


@pytest.mark.slow
def test_a_failing_cell_does_not_stop_the_others(house):
    path = house/"nbs"/"runs"/"convert.ipynb"
    good = path.read_text()
    nb = json.loads(good)
    nb["cells"][2]["source"] = "if dataset == 'dolly': raise ValueError('row 7: no response')\n" + nb["cells"][2]["source"]
    path.write_text(json.dumps(nb))
    code, out = finish(house, "run", "smoke")
    assert code == 1 and "row 7: no response" in out and "convert-dolly" in out
    assert (house/"results"/"smoke"/"scores"/"7B-cot"/"manifest.json").exists(), out
    plan = finish(house, "plan", "smoke")[1]
    assert "failed" in plan and "row 7: no response" in plan and "convert.ipynb" in plan
    path.write_text(good)
    code, out = finish(house, "run", "smoke")
    assert code == 0, out
    lines = ticks(house)
    assert sum(l == "base/" + l.split("/")[1].split()[0] + " 7" for l in lines if l.startswith("base/")) == 1, "what was finished is not run again"


@pytest.mark.slow
def test_two_runs_of_one_study(house):
    first = command(house, "run", "smoke")
    assert wait_for(lambda: ticks(house))
    code, out = finish(house, "run", "smoke")
    assert code == 1 and f"Process {first.pid} is running this study already" in out
    first.kill()
    first.communicate()
