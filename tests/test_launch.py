"""One node or many: the commands as strings, Slurm's resources, and two agents on this machine."""
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from finetunings import TOLERANCE, fork, gap, place, settings, train  # noqa: F401 (fork, place and train are fixtures)
from helpers import free_ports
from tulu_study.core import process
from tulu_study.core.grid import Cell, slurm_resources, warning_seconds
from tulu_study.core.process import PATIENCE, job_end, job_nodes
from tulu_study.training.config import TrainingError, TrainingInterrupted
from tulu_study.training.launch import Progress, command_for, first_host, launch
from tulu_study.training.resume import finished_states, state_root


@pytest.fixture
def slurm(monkeypatch):
    for name in [n for n in os.environ if n.startswith("SLURM_")]: monkeypatch.delenv(name)
    def job(**said):
        for name, value in said.items(): monkeypatch.setenv(f"SLURM_{name}", value)
    return job


@pytest.fixture
def asked(tmp_path, monkeypatch):
    "Puts a stand-in for squeue on the PATH, which notes what it was asked."
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    def squeue(text):
        (tmp_path / "squeue").write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/asked\n{text}\n')
        (tmp_path / "squeue").chmod(0o755)
    return squeue


def test_one_node(place, slurm):
    slurm(JOB_ID="7", JOB_NODELIST="gpu1")   # one node needs no srun, in a job or not
    words = command_for(settings(place, "x", ranks=2), Path("s.json"))
    assert words[1:4] == ["-m", "torch.distributed.run", "--standalone"] and "--nproc-per-node=2" in words and words[-2:] == ["tulu_study.training.finetune", "s.json"]
    assert command_for(settings(place, "x"), Path("s.json"))[1:] == ["-m", "tulu_study.training.finetune", "s.json"]


def test_several_nodes_in_a_slurm_job(place, slurm):
    slurm(JOB_ID="1234567", JOB_NODELIST="nid[002345-002346,002400]", JOB_NUM_NODES="4", CPUS_PER_TASK="56")
    text = shlex.join(command_for(settings(place, "x", ranks=32, nodes=4, batch_size=128), Path("/work/s.json")))
    assert text.startswith("srun --nodes=4 --ntasks=4 --ntasks-per-node=1 --kill-on-bad-exit=1 --export=ALL --cpus-per-task=56 " + shlex.quote(sys.executable) + " -m torch.distributed.run --nnodes=4 --nproc-per-node=8 ")
    assert " --rdzv-backend=c10d --rdzv-endpoint=nid002345:30567 --rdzv-id=1234567 " in text and text.endswith(" -m tulu_study.training.finetune /work/s.json")


def test_nodes_where_snakemake_took_slurms_variables_away(place, slurm, asked):
    "The executor plugin leaves a cell little more than SLURM_JOB_ID: Slurm is asked, and the processors are those that `slurm_resources` asked for."
    config = settings(place, "asked", ranks=16, nodes=2, threads=7, batch_size=128)
    asked("echo 2 gpu[007-008]")
    slurm(JOB_ID="123")
    words = command_for(config, Path("s.json"))
    assert words[:7] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--export=ALL", "--cpus-per-task=56"] and "--rdzv-endpoint=gpu007:20123" in words
    slurm(JOB_NUM_NODES="2", JOB_NODELIST="gpu[007-008]")   # a job of one's own: what it says of its processors holds
    assert not any(word.startswith("--cpus-per-task") for word in command_for(config, Path("s.json")))


def test_a_busy_controller_is_asked_again(place, slurm, asked, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(process, "time", types.SimpleNamespace(sleep=waited.append))
    slurm(JOB_ID="123")
    asked(f"test -f {tmp_path}/late && echo 2 'n[1-2]' && exit; touch {tmp_path}/late; exit 1")
    assert job_nodes() == (2, "n[1-2]") and waited == [0, 5]
    asked("exit 1")
    with pytest.raises(TrainingError, match="Slurm does not say which nodes job 123 has"): command_for(settings(place, "asked", ranks=2, nodes=2), Path("s.json"))
    assert waited == [0, 5, 0, 5, 20, 60]


@pytest.mark.parametrize("answer, found", [("echo 2 'n[1-2]'", (2, "n[1-2]")), ("echo 1 n1", (1, "n1")), ("echo", (0, ""))])
def test_how_many_nodes_a_job_has(slurm, asked, answer, found):
    slurm(JOB_ID="123")
    asked(answer)
    assert job_nodes() == found
    slurm(JOB_NUM_NODES="4", JOB_NODELIST="m[1-4]")
    assert job_nodes() == (4, "m[1-4]")


@pytest.mark.parametrize("nodes, first", [("n1", "n1"), ("n[1-4]", "n1"), ("gpu[007-009,12],login1", "gpu007"), ("a,b", "a"), ("rack[1-2]gpu[3,5]", "rack1gpu3"), ("a-b-1.site.org", "a-b-1.site.org")])
def test_first_host(nodes, first): assert first_host(nodes) == first


def test_several_nodes_without_slurm(place, slurm):
    config = settings(place, "by-hand", ranks=2, nodes=2, model="13B-dolly")
    with pytest.raises(TrainingError) as error: launch(config)
    text = str(error.value)
    assert "not in a Slurm job" in text and f"--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29400 --rdzv-id=13B-dolly" in text
    assert json.loads((place / "by-hand" / "settings.json").read_text())["nodes"] == 2   # what the printed command names
    slurm(JOB_ID="7", JOB_NUM_NODES="1", JOB_NODELIST="n1")
    with pytest.raises(TrainingError, match=r"this Slurm job \(7\) has 1: ask for --nodes=2"): launch(config)


def test_resources(tmp_path):
    cell = lambda gpus, nodes=1: Cell("finetune-x", "finetune", "finetune", {}, tmp_path, [], {}, gpus, nodes)
    assert slurm_resources(cell(32, 4), 7) == {"nodes": 4, "tasks": 4, "cpus_per_task": 56, "mpi": "srun", "slurm_extra": "--gpus-per-node=8"}
    assert slurm_resources(cell(1)) == {"nodes": 1, "tasks": 1, "cpus_per_task": 1, "mpi": "", "slurm_extra": "--gpus-per-node=1"}
    assert slurm_resources(cell(0))["slurm_extra"] == "" == slurm_resources(cell(8, 2), 2, False)["slurm_extra"]
    assert slurm_resources(cell(8, 2), 2, False)["cpus_per_task"] == 8


def test_how_long_before_the_end_a_cell_stops(monkeypatch):
    monkeypatch.delenv("TULU_SIGNAL_SECONDS", raising=False)
    assert warning_seconds() == 300
    for said, expected in (("120", 120), ("3600", PATIENCE), ("0", 0)):
        monkeypatch.setenv("TULU_SIGNAL_SECONDS", said)
        assert warning_seconds() == expected
    monkeypatch.setenv("TULU_SIGNAL_SECONDS", "soon")
    with pytest.raises(ValueError, match="TULU_SIGNAL_SECONDS is 'soon'; expected how many seconds"): warning_seconds()


def test_when_a_job_ends(slurm, tmp_path, asked):
    "As squeue says, since a limit may be changed."
    assert job_end() is None
    asked("echo 2030-01-02T03:04:05")
    slurm(JOB_ID="7")
    assert datetime.datetime.fromtimestamp(job_end()).isoformat() == "2030-01-02T03:04:05" and (tmp_path / "asked").read_text() == "-h -j 7 -o %e\n"
    for text in ("echo N/A", "exit 1"):
        asked(text)
        assert job_end() is None


@pytest.mark.parametrize("job, seconds, stopped", [("7", 1, True), ("7", 0, False), (None, 1, False)])
def test_a_process_stops_before_the_time_of_its_job_is_over(slurm, asked, job, seconds, stopped):
    asked("exit 1")
    if job: slurm(JOB_ID=job)
    slurm(JOB_END_TIME=str(int(time.time()) + 5))
    code = f"""import signal, sys, time
from tulu_study.core.process import stop_in_time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"asked {{int(time.time())}}"))
stop_in_time({seconds})
time.sleep(6)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("the time of Slurm job 7 is over in ") == stopped and done.returncode == int(stopped), done
    if stopped: assert int(done.stderr.split()[1]) < int(os.environ["SLURM_JOB_END_TIME"])


def test_a_limit_that_changes_on_the_way_is_noticed(monkeypatch):
    "Pre-emption with a grace time sets a new end: it is asked for once a minute, and stops the process before it."
    clock, killed = [0.0], []
    monkeypatch.setattr(process, "time", types.SimpleNamespace(time=lambda: clock[0], sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds)))
    monkeypatch.setattr(process, "job_end", lambda: 3600.0 if clock[0] < 120 else None if clock[0] < 180 else 300.0)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "7200")   # what it was told counts only as long as Slurm has said nothing
    monkeypatch.setattr(process.os, "kill", lambda pid, sign: killed.append((clock[0], pid, sign)))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    process._stop_in_time(100)
    assert killed == [(240.0, os.getpid(), signal.SIGTERM)]   # at 180 s it hears of 300, less than twice 100 s away: half of what is left passes first


STEPS = [f"step {n}/2000  loss {3 - n / 1000:.4f}  rate 2.00e-05  1,234 tokens/s  {n} s passed  {2000 - n} s left" for n in range(1, 2001)]


def test_an_executed_notebook_gets_some_dozens_of_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TULU_CELL", "1")
    (tmp_path / "state").mkdir()
    show = Progress(tmp_path)
    for line in ["data: 5 conversations", *STEPS, "seconds: 1"]: show(line)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "data: 5 conversations" and said[1] == STEPS[0] and said[-2:] == [STEPS[-1], "seconds: 1"] and 25 < len(said) < 40
    assert (tmp_path / "state" / "progress").read_text() == STEPS[-1]


def test_people_see_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TULU_CELL", raising=False)
    show = Progress(tmp_path)
    for line in STEPS[99:150]: show(line)      # continued from step 99
    show("warning: mind this")
    assert (show.bar.n, show.bar.total, show.bar.initial) == (150, 2000, 99) and "loss=2.8500" in show.bar.postfix and "tokens/s=1,234" in show.bar.postfix
    for line in STEPS[150:]: show(line)
    said = capsys.readouterr()
    assert "warning: mind this" in said.out and "2000/2000" in said.err and "step 100/2000" not in said.out and not (tmp_path / "state").exists()


def test_a_running_cell_tells_how_far_it_is(tmp_path, capsys):
    from tulu_study.cli import _telling
    with _telling("finetune-13B-dolly", tmp_path / "progress", 0.02):
        (tmp_path / "progress").write_text(STEPS[7])
        time.sleep(0.3)
    assert capsys.readouterr().out == f"  … finetune-13B-dolly: {STEPS[7]}\n"


SRUN = """import os, signal, subprocess, sys, time
words = sys.argv[1:]
while words[0].startswith("--"): words.pop(0)
tasks = [subprocess.Popen(words) for _ in range(2)]
def kill(*_):
    for task in tasks: task.kill()
signal.signal(signal.SIGTERM, kill)
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks): kill()
    time.sleep(0.01)
sys.exit(max(abs(task.returncode) for task in tasks))"""


@pytest.fixture
def srun(tmp_path, monkeypatch, slurm):
    "A stand-in that starts two tasks on this machine, kills them on SIGTERM and when one fails, and hands SIGUSR1 on, as Slurm's does."
    (tmp_path / "srun").write_text(f"#!{sys.executable}\n{SRUN}")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm(JOB_ID=str(free_ports(1)[0] - 20000), JOB_NODELIST="localhost", JOB_NUM_NODES="2")


@pytest.mark.slow
def test_srun_by_another_name(place, train, srun):
    "Two agents on this machine train what one process trains."
    config = settings(place, "two-nodes", ranks=2, nodes=2)
    checks = launch(config)
    assert all(check["passed"] for check in checks) and not (place / "two-nodes" / "settings.json").exists()
    assert gap(place / "two-nodes", train("one-process")) <= TOLERANCE


@pytest.mark.slow
def test_a_training_on_two_nodes_saves_when_it_is_asked_to_stop(place, srun):
    config, lines = settings(place, "two-stopped", ranks=2, nodes=2, epochs=30), []
    def echo(line):
        lines.append(line)
        if line.startswith("step "): os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match="asked to stop after step .* the same command would continue from step"): launch(config, echo=echo)
    kept = int(finished_states(state_root(place / "two-stopped"))[0].name[5:])
    with pytest.raises(TrainingInterrupted): launch(config, echo=echo)
    assert f"continuing from the state of step {kept}" in lines
