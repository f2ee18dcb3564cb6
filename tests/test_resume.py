"""A fine-tuning that is killed, asked to stop, or out of space continues from its saved state, to the same bytes."""
import json, os, resource, shutil, signal, subprocess, sys, sysconfig, time
from pathlib import Path

import pytest

from finetunings import SETTINGS, TOLERANCE, fork, gap, log, place, settings, train, weights  # noqa: F401 (fork, place and train are fixtures)
from tulu_study.training import finetune
from tulu_study.training.config import INTERRUPTED, FinetuneConfig, TrainingError, TrainingInterrupted
from tulu_study.training.launch import environment_for, launch
from tulu_study.training.resume import CHECKSUMS, code_hash, differences, finished_states, rows_hash, state_root

# 21 conversations, 8 in a step, two epochs: six steps, of which 3 and 6 are the epochs' last


def broken_off(path, step, sign, when="after"):
    "A rank that gets a signal at the end of an optimiser step, after its state was saved or in the middle of saving."
    make, seal = finetune.make_trainer, finetune.write_state.__globals__["seal"]
    def hurt(): os.kill(os.getpid(), sign)
    def trainer_with_end(*args, **kwargs):
        from transformers import TrainerCallback
        class End(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if when == "begin" and state.global_step == step - 1: hurt()
            def on_step_end(self, args, state, control, **_):
                if when == "after" and state.global_step == step: hurt()
        trainer = make(*args, **kwargs)
        trainer.add_callback(End())
        return trainer
    def seal_or_die(part, folder, identity):
        if when == "sealing" and folder.name == f"step-{step:08d}": hurt()
        seal(part, folder, identity)
    finetune.make_trainer = trainer_with_end
    finetune.write_state.__globals__["seal"] = seal_or_die
    return finetune.main(path)


def continued(place, fork, name, step, sign=signal.SIGKILL, when="after", status=-9, expected_from=None, prepare=lambda root: None, **changes):
    "Break a training off, look at what it left, start it again; returns (its folder, what it said)."
    config = settings(place, name, **{"save_steps": 1, **changes})
    (place / name).mkdir()
    path = str(config.save(place / f"{name}.json"))
    fork(broken_off, path, step, sign, when, ranks=config.ranks, status=status)
    assert not (place / name / "trained.json").exists(), "it was not broken off"
    prepare(state_root(place / name))
    spoken = place / f"{name}.said"
    fork(spoken_main, path, str(spoken), ranks=config.ranks)
    said = spoken.read_text().splitlines()
    if expected_from is not None: assert f"continuing from the state of step {expected_from}" in said
    assert not state_root(place / name).exists(), "the state of a finished training is left"
    return place / name, said


def spoken_main(path, spoken):
    "Train and write down what is said."
    def note(text):
        if int(os.environ["RANK"]) == 0: open(spoken, "a").write(text + "\n")
    finetune.say = note
    return finetune.main(path)


def same_bytes(folder, reference):
    "Weights, loss curve and records, to the last byte."
    for name in ("training_log.jsonl", "model.safetensors", "trained.json", "config.json", "README.md"): assert (folder / name).read_bytes() == (reference / name).read_bytes(), name


# Three full combinations; the others differ from these in one setting each.
@pytest.mark.parametrize("step, changes", [
    (2, dict(zero_stage=2)),
    (4, dict(zero_stage=3, ranks=2, precision="bf16")),
    (5, dict(zero_stage=0, packing=False, precision="bf16")),
    (3, dict(zero_stage=2, ranks=2, packing=False, loss="microbatch")),
    (1, dict(zero_stage=3, packing=False, family="opt")),   # with dropout
    (4, dict(zero_stage=2, precision="bf16", lora={"rank": 4, "dropout": 0.3})),
], ids=["zero2", "zero3-2ranks-bf16", "zero0-padded-bf16", "zero2-2ranks-padded-epoch", "zero3-padded-dropout", "zero2-lora-dropout"])
def test_killed_at_any_step_it_continues_to_the_same_bytes(place, fork, train, step, changes):
    name = "-".join(map(str, changes.values())).translate(str.maketrans("", "", "{}': ,"))
    reference = train(f"whole-{name}", **changes)
    folder, _ = continued(place, fork, f"cut-{name}", step, expected_from=step, **changes)
    same_bytes(folder, reference)


def test_asked_to_stop_it_finishes_the_step_saves_and_says_so(place, fork, train):
    "SIGTERM at the beginning of step 2, on one rank of two: both leave after that step."
    def prepare(root): assert [path.name for path in finished_states(root)] == ["step-00000002"]
    folder, _ = continued(place, fork, "asked", 2, signal.SIGTERM, "begin", INTERRUPTED, 2, prepare, save_steps=0, zero_stage=2)
    same_bytes(folder, train("whole-2", zero_stage=2))


def test_killed_while_it_saves_it_continues_from_the_state_before(place, fork, train):
    def prepare(root):
        assert [path.name for path in finished_states(root)] == ["step-00000004", "step-00000003"]   # the newest two
        assert [path.name for path in root.glob(".step-*.part")] == [".step-00000005.part"]
        assert not list(root.rglob("*.py"))   # DeepSpeed would copy a script, outside of what `collected` guards against a full disk
    folder, _ = continued(place, fork, "sealing", 5, when="sealing", expected_from=4, prepare=prepare, zero_stage=2)
    same_bytes(folder, train("whole-2", zero_stage=2))


def cut(path): path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def shard(folder): return max((p for p in folder.rglob("*.pt")), key=lambda p: p.stat().st_size)


def test_a_damaged_state_is_passed_over_for_the_one_before(place, fork, train):
    folder, said = continued(place, fork, "cut", 4, expected_from=3, prepare=lambda root: cut(shard(root / "step-00000004")), zero_stage=2)
    assert any(line.startswith("warning: the state in step-00000004 is damaged") and "bytes, expected" in line for line in said)
    same_bytes(folder, train("whole-2", zero_stage=2))


def test_with_both_states_damaged_it_starts_anew(place, fork, train):
    def prepare(root):
        flip(shard(root / "step-00000004"))
        (root / "step-00000003" / CHECKSUMS).write_text('{"step": 3')
    folder, said = continued(place, fork, "both", 4, prepare=prepare, zero_stage=2)
    assert any("step-00000004 is damaged" in line and "the checksum of" in line for line in said) and any("step-00000003 is damaged (its checksums.json cannot be read)" in line for line in said)
    assert "warning: no whole state is left; the training starts anew" in said and not any(line.startswith("continuing") for line in said)
    same_bytes(folder, train("whole-2", zero_stage=2))


def test_a_state_of_other_settings_is_not_used(place, fork):
    changed = {}
    def prepare(root):
        path = place / "other.json"
        config = FinetuneConfig.load(path)
        config.learning_rate = changed["rate"] = 5e-4
        config.save(path)
    folder, said = continued(place, fork, "other", 4, prepare=prepare, zero_stage=2)
    assert "warning: a state of another training is not used (learning_rate 0.001, now 0.0005); it is kept until this one is finished" in said and "the training starts anew" in said
    assert log(folder)[1]["learning_rate"] == changed["rate"]


def test_a_state_of_other_settings_waits_until_the_new_training_is_finished(place, fork, train):
    "Stopped at step 4, tried with another rate up to step 5, taken back: it continues from step 4."
    def trial(root):
        path = place / "back.json"
        before, config = path.read_text(), FinetuneConfig.load(path)
        config.learning_rate = 5e-4
        config.save(path)
        fork(broken_off, str(path), 5, signal.SIGKILL, "after", status=-9)
        assert [p.name[:13] for p in finished_states(root)] == ["step-00000005", "step-00000004", "step-00000004", "step-00000003"]
        path.write_text(before)
        assert finetune.kept_text(FinetuneConfig.load(path)) == "the same command would continue from step 4"
    folder, _ = continued(place, fork, "back", 4, expected_from=4, prepare=trial, zero_stage=2)
    same_bytes(folder, train("whole-2", zero_stage=2))


def test_a_sentence_on_a_card_refuses_no_state(tmp_path, monkeypatch):
    import shutil
    from tulu_study.training import resume
    for path in Path(resume.__file__).parent.glob("*.py"): shutil.copy(path, tmp_path)
    monkeypatch.setattr(resume, "__file__", str(tmp_path / "resume.py"))
    before, texts = code_hash(), {name: (tmp_path / f"{name}.py").read_text() for name in ("cards", "weight_diff", "packing", "store")}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text + "\nMORE = 1\n")
        assert (code_hash() == before) == (name in ("cards", "weight_diff")), name
        (tmp_path / f"{name}.py").write_text(text)


def test_what_a_state_belongs_to():
    mine = {"settings": {"seed": 1, "limit": 0}, "data": "a", "code": "x"}
    assert not differences(mine, json.loads(json.dumps(mine)))
    assert differences(mine, {**mine, "data": "b", "settings": {"seed": 2, "limit": 0}}) == "seed 2, now 1; other data"
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}]
    assert len({rows_hash(rows), rows_hash(rows[::-1]), rows_hash([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]), rows_hash([{**rows[0], "labels": [1, 2]}, rows[1]])}) == 4
    assert code_hash() == code_hash()


def test_settings_of_place_and_speed_are_no_part_of_the_result(place):
    one, other = settings(place, "x"), settings(place, "y", save_minutes=1, save_steps=7, threads=3)
    assert one.science() == other.science() and not {"save_minutes", "save_steps", "report_to"} & set(one.science())


def test_settings_of_saving_come_from_the_environment(place, monkeypatch):
    monkeypatch.setenv("TULU_SAVE_MINUTES", "2.5")
    assert settings(place, "x").save_minutes == 2.5
    monkeypatch.setenv("TULU_SAVE_MINUTES", "often")
    with pytest.raises(TrainingError, match="save_minutes .*found 'often'"): settings(place, "x")
    with pytest.raises(TrainingError, match="report_to .*found 'paper'.*expected none, tensorboard, wandb"): settings(place, "x", save_minutes=1, report_to="paper")


# ---- memory, disk, numbers

def small_files(path, limit, spoken):
    "Train where no file may be larger than `limit` bytes, as on a full disk."
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return spoken_main(path, spoken)


def test_a_full_disk_while_saving_a_state_is_a_warning(place, fork, train):
    "The shard of the optimiser is larger than the limit, the model is not."
    config = settings(place, "full", zero_stage=2, save_steps=2)
    (place / "full").mkdir()
    fork(small_files, str(config.save(place / "full.json")), 600_000, str(place / "full.said"))
    said = (place / "full.said").read_text()
    assert said.count("was not saved") == 3 and "training goes on, the same command would start anew" in said and "TULU_RESULTS" in said
    same_bytes(place / "full", train("whole-2", zero_stage=2))


def test_a_full_disk_at_the_end_is_an_error_and_the_state_stays(place, train):
    config, said = settings(place, "end", zero_stage=2, save_steps=2), []
    code = f"""import resource, runpy, sys
from tulu_study.training import finetune
save = finetune.save
def late(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save(*args)
finetune.save = late
sys.exit(finetune.main({str(place / 'end.json')!r}))"""
    (place / "end").mkdir()
    config.save(place / "end.json")
    done = subprocess.run([sys.executable, "-c", code], env=environment_for(config, direct=True), capture_output=True, text=True)
    assert done.returncode == 1 and "error: the disk is full" in done.stderr and "the same command would continue from step 6" in done.stderr, done.stderr[-3000:]
    assert not (place / "end" / "trained.json").exists()
    launch(config, echo=said.append)   # nothing is left to train, only to save
    assert "continuing from the state of step 6" in said and not state_root(place / "end").exists()
    same_bytes(place / "end", train("whole-2", zero_stage=2))


def out_of_memory(path, spoken):
    from transformers import Trainer
    def fail(*_, **__): raise MemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    Trainer.training_step = fail
    sys.stderr = open(spoken, "w")
    return spoken_main(path, spoken + ".said")


def test_out_of_memory_names_the_settings(place, fork):
    config = settings(place, "memory")
    (place / "memory").mkdir()
    fork(out_of_memory, str(config.save(place / "memory.json")), str(place / "memory.err"), status=1)
    assert "error: out of memory: lower micro_batch_size (now 2) or max_seq_length (now 96), set gradient_checkpointing" in (place / "memory.err").read_text()


def poisoned(path, spoken):
    "Spoil one weight after the first step, as an overflow would."
    import torch
    load = finetune.load_model
    def spoilt(*args):
        model, grown = load(*args)
        with torch.no_grad(): model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
        return model, grown
    finetune.load_model = spoilt
    sys.stderr = open(spoken, "w")
    return spoken_main(path, spoken + ".said")


def test_a_loss_that_is_no_number_stops_at_that_step_and_names_its_data(place, fork):
    config = settings(place, "poisoned", save_steps=1)
    (place / "poisoned").mkdir()
    fork(poisoned, str(config.save(place / "poisoned.json")), str(place / "poisoned.err"), status=1)
    said = (place / "poisoned.err").read_text()
    assert "the loss became nan at step 1: lower learning_rate (now 0.001)" in said and "precision fp32 (now fp32)" in said and "look at the data of that step, sums: sums_" in said and "and 4 more" in said
    assert not finished_states(state_root(place / "poisoned")), "a state without a value must not be kept"


@pytest.mark.parametrize("launched, expected", [(30.0, 25.0), (9.0, 6.0), (0.1, 0.0)])   # in one go; continued for its last seconds; finished before
def test_the_run_notebook_counts_the_compute_of_this_attempt_alone(tmp_path, launched, expected):
    from helpers import ROOT
    from tulu_study.core.cells import Run
    source = next("".join(cell["source"]) for cell in json.loads((ROOT / "nbs" / "runs" / "finetune.ipynb").read_text())["cells"] if 'timings["compute"]' in "".join(cell["source"]))
    (tmp_path / "seconds.json").write_text(json.dumps({"starting": 3.0, "training": 20.0, "saving": 2.0, "verifying": 3.0}))
    run = Run({}, tmp_path)
    exec(source, {"run": run, "config": None, "launch": lambda config: run.timings.update(launch=launched)})
    assert run.timings["compute"] == pytest.approx(expected, abs=0.05) and run.timings["compute"] <= run.timings["launch"]


def test_memory_and_time_are_recorded_for_the_plan(train):
    from tulu_study.planning import compared, measured, measured_text
    folder = train("recorded", zero_stage=2, base="nano-llama-s")
    seconds = json.loads((folder / "seconds.json").read_text())
    assert set(seconds) == {"starting", "training", "saving", "verifying", "cpu_seconds", "step", "start_bytes", "peak_bytes", "device", "threads", "precision"}
    assert 1e8 < seconds["start_bytes"] <= seconds["peak_bytes"] < 1e10 and 0 < seconds["step"] <= seconds["training"] and seconds["device"] and seconds["threads"] == 1
    took = measured(folder)
    rows = log(folder)
    assert took["tokens"] == sum(row["tokens"] for row in rows) and measured_text(took).endswith(" tokens") and took["pass_tokens"] <= took["largest_pass"] <= 2 * 96
    found = compared("nano-llama-s", took)
    assert found["predicted_seconds"] > 0 and found["predicted_bytes"] > 0 and found["bytes"] == seconds["peak_bytes"] - seconds["start_bytes"] and found["seconds"] == seconds["cpu_seconds"]


@pytest.mark.parametrize("stage, precision, lora", [(2, "bf16", {}), (3, "bf16", {}), (0, "bf16", {}), (0, "fp32", {}), (2, "fp32", {}), (3, "fp32", {}), (2, "bf16", {"rank": 32})])
def test_a_state_is_as_large_as_the_plan_says(place, fork, stage, precision, lora):
    "Tensors alone: a state's records, the log and the generators do not grow with the model."
    import torch
    from transformers import AutoConfig
    from tulu_study.training.scale import Scale, Size, disk_bytes
    name = f"size-{stage}-{precision}-{len(lora)}"
    (place / name).mkdir()
    config = settings(place, name, zero_stage=stage, precision=precision, lora=lora, save_steps=2)
    fork(broken_off, str(config.save(place / f"{name}.json")), 2, signal.SIGKILL, "after", status=-9)
    state = finished_states(state_root(place / name))[0]
    seen, found = set(), 0
    def count(value):
        nonlocal found
        if isinstance(value, torch.Tensor):
            if value.data_ptr() not in seen and value.numel() > 64: found += value.numel() * value.element_size()
            seen.add(value.data_ptr())
        elif isinstance(value, dict): [count(one) for one in value.values()]
        elif isinstance(value, (list, tuple)): [count(one) for one in value]
        elif hasattr(value, "__dict__"): count(vars(value))
    keep = [torch.load(path, weights_only=False) for path in state.rglob("*.pt") if "rng" not in path.name and "scheduler" not in path.name]
    count(keep)
    total = sum(tensor.numel() for tensor in weights(place / "llama").values()) + 2 * 48   # the padding token's rows
    adapter = 2 * 32 * (4 * (48 + 48) + 3 * (48 + 96)) if lora else 0
    expected = disk_bytes(Size(total, 0, 0), Scale(zero_stage=stage, precision=precision, lora_rank=32 if lora else 0), adapter)[1] / 3
    assert found == pytest.approx(expected, rel=0.03), (found / (adapter or total), [p.name for p in state.rglob("*.pt")])


# ---- what lies in the host's memory

@pytest.mark.parametrize("stage, offload, ranks", [(2, "optimizer", 1), (3, "all", 2)])
def test_offloading_changes_where_things_lie_and_nothing_else(place, fork, train, stage, offload, ranks):
    changes = dict(zero_stage=stage, offload=offload, ranks=ranks)
    folder = train(f"offload-{stage}", **changes)
    assert gap(folder, train("whole-2", zero_stage=2)) <= TOLERANCE
    same_bytes(continued(place, fork, f"offload-{stage}-cut", 4, expected_from=4, **changes)[0], folder)


# ---- through the launcher and through the cell

def until(condition, seconds=120):
    end = time.time() + seconds
    while time.time() < end:
        if condition(): return True
        time.sleep(0.05)
    return False


def started(code, **env):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **env})


def test_the_launcher_hands_a_signal_on_through_torchrun(place, train):
    changes = dict(zero_stage=2, ranks=2, epochs=30)
    config = settings(place, "signalled", **changes)
    process = started(f"""import json
from tulu_study.training.launch import launch
try: launch(json.loads({json.dumps(vars(config))!r}))
except Exception as error: print(type(error).__name__, error)""")
    log_file = place / "signalled" / "training_log.jsonl"
    assert until(lambda: log_file.exists() and log_file.stat().st_size), process.communicate()[0]
    for sign in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM):   # a queue that asks more than once
        process.send_signal(sign)
        time.sleep(0.06)
    out = process.communicate(timeout=120)[0]
    assert "TrainingInterrupted fine-tuning sums was interrupted: asked to stop after step" in out and "the same command would continue from step" in out, out
    lines = []
    launch(config, echo=lines.append)
    assert any(line.startswith("continuing from the state of step") for line in lines)
    same_bytes(place / "signalled", train("whole-long", **changes))


def test_an_interrupted_notebook_saves(place):
    "A notebook's interrupt goes to the whole group of its kernel; the trainer saves its state, however many ranks it has."
    for ranks in (1, 2):
        name = f"interrupted-{ranks}"
        code = f"""import json, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from tulu_study.training.launch import launch
launch(json.loads({json.dumps(vars(settings(place, name, zero_stage=2, ranks=ranks, epochs=300)))!r}))"""
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        log_file = place / name / "training_log.jsonl"
        assert until(lambda: log_file.exists() and log_file.stat().st_size), process.communicate()[0]
        os.killpg(process.pid, signal.SIGINT)
        out = process.communicate(timeout=120)[0]
        assert "KeyboardInterrupt" in out and "stopping: the training saves its state" in out and finished_states(state_root(place / name)), out


CELL = """import sys
from tulu_study.core.cells import CellError, run_cell
try: run_cell("finetune", {params!r}, {out!r})
except CellError as error: sys.exit(type(error).__name__ + ": " + str(error))"""


def cell(place, out, **changes):
    params = {**{name: SETTINGS[name] for name in ("batch_size", "micro_batch_size", "learning_rate", "warmup_ratio", "max_seq_length", "precision", "data")}, "epochs": 30.0, "base": "nano-llama-s",
              "base_dir": str(place / "llama"), "data_file": str(place / "data.jsonl"), **changes}
    return started(CELL.format(params=params, out=str(out)), TULU_SAVE_MINUTES="0.001")


@pytest.fixture(scope="module")
def whole_cell(place):
    "A cell that nobody disturbed."
    process = cell(place, place / "whole-cell")
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 0, said
    return place / "whole-cell"


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_cell_continues_where_it_was_stopped(place, whole_cell, tmp_path, sign):
    out = tmp_path / "stopped"
    first = cell(place, out)
    assert until(lambda: len(finished_states(state_root(out))) == 2), first.communicate()[0]
    first.send_signal(sign)
    said = first.communicate(timeout=120)[0]
    assert not (out / "manifest.json").exists() and not (out / "failed.json").exists() and (out / "attempt.json").exists(), said
    if sign == signal.SIGTERM: assert "CellInterrupted" in said and "asked to stop after step" in said, said
    left = int(finished_states(state_root(out))[0].name[5:])
    assert 0 < left < 90
    again = cell(place, out)
    said = again.communicate(timeout=180)[0]
    assert again.returncode == 0, said
    assert "continuing from the state of step" in (out / "finetune.ipynb").read_text()
    same_bytes(out, whole_cell)
    one, other = (json.loads((folder / "manifest.json").read_text()) for folder in (out, whole_cell))
    assert one["key"] == other["key"] and not [name for name in one["outputs"] if name.startswith("state")]


# ---- who watches

WRITER = '''import json, pathlib
class SummaryWriter:
    def __init__(self, log_dir): self.file = open(pathlib.Path(log_dir).parent / "seen.jsonl", "a")
    def add_text(self, *_): pass
    def add_scalar(self, name, value, step): print(json.dumps([name, value, step]), file=self.file, flush=True)
    def flush(self): pass
    def close(self): self.file.close()
'''


def watched(path, packages):
    "Train with a stand-in for TensorBoard's writer."
    sys.path.insert(0, packages)
    sys.modules["torch.utils.tensorboard"] = None
    return finetune.main(path)


def test_tensorboard_gets_what_the_log_gets_and_changes_nothing(place, fork, train, tmp_path, monkeypatch):
    (tmp_path / "tensorboardX").mkdir()
    (tmp_path / "tensorboardX" / "__init__.py").write_text(WRITER)
    (tmp_path / "tensorboardX-2.6.dist-info").mkdir()
    (tmp_path / "tensorboardX-2.6.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorboardX\nVersion: 2.6\n")
    monkeypatch.syspath_prepend(tmp_path)
    (place / "watched").mkdir()
    fork(watched, str(settings(place, "watched", zero_stage=2, report_to="tensorboard").save(place / "watched.json")), str(tmp_path))
    seen = [json.loads(line) for line in open(place / "watched" / "seen.jsonl")]
    assert [value for name, value, _ in seen if name == "train/loss"] == [row["loss"] for row in log(place / "watched")]
    assert {"train/learning_rate", "train/tokens_per_second"} <= {name for name, *_ in seen}
    same_bytes(place / "watched", train("whole-2", zero_stage=2))


WANDB = """import json, os
run = None
class Run:
    id = name = url = "x"
    summary = {}
    def _label(self, **_): pass
class config(dict):
    def update(self, *_, **__): pass
config = config()
def init(**_):
    global run
    run = Run()
    print(json.dumps([os.environ.get("WANDB_RUN_ID"), os.environ.get("WANDB_RESUME")]), file=open(os.environ["SEEN"], "a"))
def log(*_, **__): pass
def define_metric(*_, **__): pass
"""


def test_a_continued_training_is_one_run_for_wandb(place, fork, tmp_path, monkeypatch):
    package = tmp_path / "wandb"
    (package / "sdk" / "lib").mkdir(parents=True)
    for folder, text in ((package, WANDB), (package / "sdk", ""), (package / "sdk" / "lib", "")): (folder / "__init__.py").write_text(text)
    (package / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): pass")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("one-run", "another"):
        (place / name).mkdir()
        path = str(settings(place, name, zero_stage=2, report_to="wandb", save_steps=1).save(place / f"{name}.json"))
        fork(with_wandb, path, str(tmp_path), 2, status=-9)
        fork(with_wandb, path, str(tmp_path), 0)
    (first, how), (second, _), (third, _), (fourth, _) = [json.loads(line) for line in open(tmp_path / "seen")]
    assert first == second and third == fourth and first != third and len(first) == 12 and how == "allow"


def with_wandb(path, package, step):
    "Train under a stand-in for W&B, killed after a step where one is given."
    sys.path.insert(0, package)
    os.environ.pop("WANDB_RUN_ID", None)
    return broken_off(path, step, signal.SIGKILL) if step else finetune.main(path)


def test_a_watcher_that_is_not_installed_is_refused(place, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="report_to .*'wandb', which is not installed: pip install wandb"): settings(place, "x", report_to="wandb")


def test_progress_says_how_long_it_will_take(place, fork):
    _, said = continued(place, fork, "progress", 2, expected_from=2, zero_stage=2)
    assert any("tokens/s" in line and line.startswith("step 6/6  loss ") and line.endswith("left") for line in said) and finetune.clock_text(3900) == "1 h 05 min"


# ---- what is saved under ZeRO-3

def one_rank_short(path, spoken):
    "Lose half of a matrix while the shards are gathered, as a rank that was left out would."
    from accelerate import Accelerator
    gather = Accelerator.get_state_dict
    def short(*args, **kwargs):
        state = gather(*args, **kwargs)
        if state: state["model.layers.1.mlp.up_proj.weight"][48:] = 0
        return state
    Accelerator.get_state_dict = short
    sys.stderr = open(spoken + os.environ["RANK"], "w")
    return spoken_main(path, spoken + ".said")


def test_a_zero_3_checkpoint_is_read_again_and_compared(place, fork):
    config = settings(place, "short", zero_stage=3, save_steps=3)
    (place / "short").mkdir()
    fork(one_rank_short, str(config.save(place / "short.json")), str(place / "short.err"), status=1)
    said = (place / "short.err0").read_text()
    assert "is not the trained model" in said and "up_proj" in said and "Run the cell again" in said
    assert [path.name for path in finished_states(state_root(place / "short"))] == ["step-00000006", "step-00000003"], "the state stays until the checkpoint is verified"


# ---- compiled layers

compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")) or not Path(sysconfig.get_paths()["include"], "Python.h").exists(),
                              reason="compiled layers need a C++ compiler (sudo make system-deps) and Python's headers (python3-dev)")


def compiling_main(path):
    "Train, and fail where nothing was compiled."
    from torch._dynamo.utils import counters
    return finetune.main(path) or (0 if counters["stats"]["unique_graphs"] else 3)


@compiler
def test_compiled_layers_train_the_same_model_and_continue_to_the_same_bytes(place, fork, train, tmp_path, monkeypatch):
    "Also where the continuation finds nothing of what the first run compiled."
    name, changes = "compiled", dict(ranks=2, gradient_checkpointing=True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "first"))
    config, reference = settings(place, name, compile=True, **changes), train("not-compiled", **changes)
    (place / name).mkdir()
    fork(compiling_main, str(config.save(place / f"{name}.json")), ranks=config.ranks)
    assert list(weights(place / name)) == list(weights(reference)) and gap(place / name, reference) <= TOLERANCE
    for mine, theirs in zip(log(place / name), log(reference), strict=True): assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "second"))
    folder, _ = continued(place, fork, f"{name}-cut", 2, expected_from=2, compile=True, **changes)
    same_bytes(folder, place / name)


def test_a_compiler_that_is_not_there_is_named(place, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(TrainingError, match=r"compile: found no C\+\+ compiler that works.*install both.*or take compile false"): launch(settings(place, "uncompiled", compile=True), echo=lambda line: None)
