"""Slurm: what Snakemake is told, what is told of cells that ran elsewhere, and, where Slurm is installed, a study on a cluster of two nodes.

The cluster is Slurm's own daemons on this machine, under the user who runs the tests, with nodes 127.0.0.1 and 127.0.0.2: `apt-get install slurm-wlm`, `pip install 'tulu-study[slurm]'`,
then `pytest -m slurm tests/test_slurm.py` (eight minutes). Its GPUs are none: a training asks for one per rank."""
import getpass, importlib.util, json, os, shutil, signal, socket, subprocess, sys, time
from pathlib import Path

import pytest

from helpers import ROOT, free_ports
from tulu_study import cli
from tulu_study.core.cells import CellError
from tulu_study.core.grid import load
from tulu_study.core.settings import settings
from tulu_study.training.resume import finished_states, state_root

DAEMONS = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin") for name in ("slurmctld", "slurmd")}
PLUGIN = importlib.util.find_spec("snakemake_executor_plugin_slurm")
STUDY = """study: two
title: One fine-tuning on two nodes
protocol: paper
seed: 42
world: {seed: 42}
tokenizer: tokenizers/nano
models:
  7B: {base: nano-llama-xs, data: [cot]}
data: {max_rejected: 0.01, limit: 64}
training: {epochs: EPOCHS, learning_rate: 2.0e-3, max_seq_length: 512, batch_size: 16, micro_batch_size: 8, ranks: 2, nodes: 2, zero_stage: 2, precision: fp32}
evaluation: {dtype: float32, chunk_size: 16}
benchmarks:
  gsm: {settings: [cot], n: 4}
tables: []
figures: []
"""


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


# ---- without Slurm

@pytest.fixture
def site(tmp_path, monkeypatch):
    "A site with a Slurm by name, and nothing else on the PATH."
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TULU_EXECUTOR", "slurm")
    monkeypatch.setenv("TULU_RESOURCES", "slurm_partition=gpu runtime=1440")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: object() if name == "snakemake_executor_plugin_slurm" else find(name))
    program(tmp_path, "sbatch", "exit 1")
    return tmp_path


def test_what_snakemake_is_told(site, monkeypatch):
    options = ["--executor", "slurm", "--latency-wait", "60", "--slurm-status-command", "squeue", "--default-resources"]
    for said, asked in (("slurm_partition=gpu runtime=24h", ["mem_mb=0", "slurm_partition='gpu'", "runtime='24h'"]), ("mem=200GB constraint=a100|h100", ["mem='200GB'", "constraint='a100|h100'"]),
                        ("mem_mb_per_cpu=4000 gpus=0 slurm_account=0123", ["mem_mb_per_cpu=4000", "gpus=0", "slurm_account='0123'"])):   # quoted: Snakemake takes `all`, a partition like any other, for Python's
        monkeypatch.setenv("TULU_RESOURCES", said)
        assert cli._slurm_options(settings()) == [*options, *asked]


def test_a_site_without_slurm_is_told_what_is_missing(site, monkeypatch):
    (site / "sbatch").unlink()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CellError, match=r"not found: sbatch .* and snakemake-executor-plugin-slurm \(pip install 'tulu-study\[slurm\]'\)"): cli._slurm_options(settings())


@pytest.mark.parametrize("said, problem", [("partition=gpu", "partition=gpu; the words that Slurm's executor knows are slurm_partition,"), ("mem_gb=64", "mem_gb=64; the words"), ("mem_mb=64G", "mem_mb=64G; expected megabytes")])
def test_words_that_slurm_would_not_hear(site, monkeypatch, said, problem):
    monkeypatch.setenv("TULU_RESOURCES", said)
    with pytest.raises(CellError, match=problem): cli._slurm_options(settings())


@pytest.mark.parametrize("said, problem", [("partition", "holds 'partition'; expected words like slurm_partition=gpu"), ("slurm_partition= runtime=5", "holds 'slurm_partition'; expected words"), ("=gpu", "holds 'gpu'; expected words"),
                                           ("nodes=2", "holds nodes=2; the study says that of each cell"), ("gpus=4", "holds gpus=4; the study says"), ("runtime=1-00:00:00", "runtime=1-00:00:00; expected minutes")])
def test_resources_that_are_none(monkeypatch, said, problem):
    monkeypatch.setenv("TULU_RESOURCES", said)
    with pytest.raises(ValueError, match=f"TULU_RESOURCES.*({problem})"): settings()


def test_cells_that_ran_elsewhere_are_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TULU_RESULTS", str(tmp_path))
    (study := tmp_path / "two.yaml").write_text(STUDY.replace("EPOCHS", "1"))
    grid = load(str(study))
    world, convert = grid["world"], grid["convert-cot"]
    for cell in (world, convert): cell.out_dir.mkdir(parents=True)
    (convert.out_dir / "failed.json").write_text(json.dumps({"error": "of an earlier run"}))
    look = cli._news(grid)
    look()
    assert capsys.readouterr().out == ""
    (world.out_dir / "manifest.json").write_text(json.dumps({"seconds": 4.24}))
    world.stamp.touch()
    (convert.out_dir / "failed.json").write_text("half of it")
    look()
    time.sleep(0.02)   # until the clock of files ticks
    (convert.out_dir / "failed.json").write_text(json.dumps({"error": "Traceback\nDatasetError: no file {x}"}))
    look()
    look()
    said = capsys.readouterr().out
    assert said.startswith("✓ [1/5] world: 4.2 s\n✗ convert-cot: DatasetError: no file {x}\n  executed notebook: ") and said.count("\n") == 3
    (convert.out_dir / "manifest.json").write_text(json.dumps({"seconds": 1.0}))
    convert.stamp.touch()
    look()
    assert capsys.readouterr().out == "✓ [2/5] convert-cot: 1.0 s\n"   # tried again, and done


@pytest.mark.parametrize("line, shown", [("Exception in run_job for rule finetune: The given account lab appears to be invalid.", True), ("error: unrecognized arguments: --slurm-x", True), ("Building DAG of jobs...", False)])
def test_what_snakemake_says_when_it_fails(tmp_path, monkeypatch, capsys, line, shown):
    "What is wrong with a request, else its last words; never nothing."
    monkeypatch.setenv("TULU_RESULTS", str(tmp_path))
    (study := tmp_path / "two.yaml").write_text(STUDY.replace("EPOCHS", "1"))
    grid = load(str(study))
    grid.root.mkdir()
    said = [line, *(f"and so on {k}" for k in range(9))]
    assert cli._through_slurm(grid, [sys.executable, "-c", f"print({chr(10).join(said)!r}); raise SystemExit(1)"], dict(os.environ)) == (1, [])
    error = capsys.readouterr().err
    assert "snakemake.log" in error and (line in error) == shown and ("and so on 8" in error) != shown


# ---- with Slurm

def needs_slurm(test):
    lacking = pytest.mark.skipif(not (all(DAEMONS.values()) and PLUGIN), reason="needs Slurm on this machine (apt-get install slurm-wlm) and Snakemake's plugin for it (pip install 'tulu-study[slurm]')")
    return pytest.mark.slurm(pytest.mark.slow(lacking(test)))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "The environment of a cluster's login node."
    home, me, host = tmp_path_factory.mktemp("slurm"), getpass.getuser(), socket.gethostname().split(".")[0]
    ports = free_ports(3)
    nodes = "\n".join(f"NodeName=127.0.0.{k} NodeHostname={host} NodeAddr=127.0.0.{k} Port={ports[k]} CPUs={os.cpu_count()} Gres=gpu:1" for k in (1, 2))
    (home / "slurm.conf").write_text(f"""ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
SlurmUser={me}
SlurmdUser={me}
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/ctld.pid
SlurmdPidFile={home}/%n.pid
SlurmctldLogFile={home}/ctld.log
SlurmdLogFile={home}/%n.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
KillWait=60
GresTypes=gpu
{nodes}
PartitionName=all Nodes=127.0.0.[1-2] Default=YES MaxTime=INFINITE State=UP
""")
    (home / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    for folder in ("state", "spool-127.0.0.1", "spool-127.0.0.2"): (home / folder).mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TULU_", "SLURM_", "SBATCH_"))}
    env |= {"SLURM_CONF": str(home / "slurm.conf"), "TULU_EXECUTOR": "slurm", "TULU_ROOT": str(ROOT), "TULU_RESULTS": str(home / "results"), "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    daemons = [subprocess.Popen([DAEMONS["slurmctld"], "-D", "-i"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
    daemons += [subprocess.Popen([DAEMONS["slurmd"], "-D", "-N", f"127.0.0.{k}"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for k in (1, 2)]
    try:
        for _ in range(60):
            if subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], env=env, capture_output=True, text=True).stdout.split() == ["idle"] * 2: break
            time.sleep(1)
        else: pytest.fail("Slurm did not start:\n" + "\n".join(log.read_text()[-1500:] for log in home.glob("*.log")))
        yield env
    finally:
        for one in reversed(daemons): one.terminate()
        for one in daemons:
            try: one.wait(timeout=30)
            except subprocess.TimeoutExpired: one.kill()


def run(cluster, tmp_path: Path, epochs: int, profile: str = "", **options):
    (tmp_path / "two.yaml").write_text(STUDY.replace("EPOCHS", str(epochs)))
    (tmp_path / "config.yaml").write_text("slurm-init-seconds-before-status-checks: 5\n" + profile)   # else the plugin looks after 40 s for the first time
    return subprocess.Popen([sys.executable, "-m", "tulu_study", "run", str(tmp_path / "two.yaml")], env=cluster | {"SNAKEMAKE_PROFILE": str(tmp_path)} | options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


@needs_slurm
def test_a_study_with_a_training_on_two_nodes(cluster, tmp_path):
    process = run(cluster, tmp_path, 1, TULU_RESOURCES="slurm_partition=all gpus=0")
    out = process.communicate(timeout=400)[0]
    assert process.returncode == 0, out
    home = Path(cluster["TULU_RESULTS"]) / "two"
    assert "✓ [5/5] evaluate-7B-cot: " in out and "(through Slurm)" in out, out
    assert "2 rank(s)" in (home / "checkpoints" / "7B-cot" / "finetune.ipynb").read_text()


@needs_slurm
def test_what_slurm_refuses_is_said(cluster, tmp_path):
    out = run(cluster, tmp_path, 2, TULU_RESOURCES="slurm_partition=nosuch").communicate(timeout=200)[0]
    assert "invalid partition specified: nosuch" in out and "finetune-7B-cot" in out, out


STOPS = {"signalled": "scancel --signal=TERM --full", "cancelled": "scancel", "out of time": "", "interrupted twice": ""}


@needs_slurm
@pytest.mark.parametrize("how", STOPS)
def test_a_training_on_two_nodes_is_stopped_and_continues(cluster, tmp_path, how):
    checkpoint = Path(cluster["TULU_RESULTS"]) / "two" / "checkpoints" / "7B-cot"
    progress, before = checkpoint / "state" / "progress", finished_states(state_root(checkpoint))
    progress.unlink(missing_ok=True)
    process = run(cluster, tmp_path, 1500, *(["set-resources:\n  finetune:\n    runtime: 1\n"] if how == "out of time" else []), TULU_SIGNAL_SECONDS="20")
    until = time.time() + 300
    while not progress.exists():
        assert process.poll() is None and time.time() < until, process.communicate(timeout=5)[0] if process.poll() is not None else "the training has not begun"
        time.sleep(0.5)
    if STOPS[how]:
        job = subprocess.run(["squeue", "-h", "-t", "R", "-o", "%i"], env=cluster, capture_output=True, text=True).stdout.strip()
        subprocess.run([*STOPS[how].split(), job], env=cluster, check=True)
    if how == "interrupted twice":
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(3)
    out = process.communicate(timeout=300)[0]
    assert process.returncode and "the same command continues" in out and ("stopping: no more jobs are submitted" in out) == (how == "interrupted twice"), out
    until = time.time() + 60
    while (kept := finished_states(state_root(checkpoint))) == before:
        assert time.time() < until, out
        time.sleep(1)
    if before: assert f"continuing from the state of step {int(before[0].name[5:])}" in (checkpoint / "finetune.ipynb").read_text()
