"""A fine-tuning that is killed, asked to stop, or out of space continues from its saved state, to the same bytes."""
import json, os, resource, shutil, signal, subprocess, sys, time

import pytest

from finetunings import SETTINGS, fork, gap, log, place, settings, train, weights  # noqa: F401 (fork, place and train are fixtures)
from tulu_study.training import finetune
from tulu_study.training.config import INTERRUPTED, FinetuneConfig, TrainingError, TrainingInterrupted
from tulu_study.training.launch import environment_for, launch
from tulu_study.training.resume import CHECKSUMS, code_hash, damage, differences, finished_states, read_record, rows_hash, state_root

STEPS = 6   # 21 conversations, 8 in a step, two epochs: steps 3 and 6 are the epochs' last


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
    def seal_or_die(part, folder):
        if when == "sealing" and folder.name == f"step-{step:08d}": hurt()
        seal(part, folder)
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
    for name in ("training_log.jsonl", "model.safetensors", "trained.json", "config.json", "README.md"): assert (folder / name).read_bytes() == (reference / name).read_bytes(), name


# Three full combinations; the others differ from these in one setting each.
@pytest.mark.parametrize("step, changes", [
    (2, dict(zero_stage=2)),
    (4, dict(zero_stage=3, ranks=2, precision="bf16")),
    (5, dict(zero_stage=0, packing=False, precision="bf16")),
    (3, dict(zero_stage=2, ranks=2, packing=False, loss="microbatch")),
    (1, dict(zero_stage=3, packing=False, family="opt")),   # with dropout
], ids=["zero2", "zero3-2ranks-bf16", "zero0-padded-bf16", "zero2-2ranks-padded-epoch", "zero3-padded-dropout"])
def test_killed_at_any_step_it_continues_to_the_same_bytes(place, fork, train, step, changes):
    reference = train("whole-" + "-".join(map(str, changes.values())), **changes)
    folder, _ = continued(place, fork, "cut-" + "-".join(map(str, changes.values())), step, expected_from=step, **changes)
    same_bytes(folder, reference)
