"What a study will cost is known before anything is spent."
import json, os, subprocess, sys

import pytest

from helpers import ROOT
from tulu_study import planning
from tulu_study.core import grid
from tulu_study.core.params import ParamsError, load_study, models
from tulu_study.training.scale import Rates, Scale, activation_bytes, device_memory, model_size


@pytest.fixture
def paper(tmp_path, monkeypatch):
    monkeypatch.setenv("TULU_RESULTS", str(tmp_path))
    return grid.load("paper")


def test_parameters_are_counted_without_weights():
    "Against the models that can be built here, and the published counts of those that cannot."
    from transformers import AutoModelForCausalLM
    from tulu_study.training.scale import shape_config
    small = models()["nano-llama-s"]
    assert model_size(small, 1000).total == sum(p.numel() for p in AutoModelForCausalLM.from_config(shape_config(small, 1000)).parameters())
    for key, count in {"llama-7b": 6_738_415_616, "llama-65b": 65_285_660_672, "opt-6.7b": 6_658_473_984, "pythia-6.9b": 6_857_302_016}.items(): assert model_size(models()[key]).total == count, key


def test_the_paper_fits_on_the_hardware_of_its_records(paper):
    rows = planning.cost_rows(paper, Rates())
    assert len(rows) == sum(c.stage == "finetune" for c in paper.values()) and all("why" not in row and row["fits"] for row in rows)
    by = {row["cell"]: row for row in rows}
    assert by["finetune-65B-tulu_mix"]["gpus"] == 32 and by["finetune-13B-dolly"]["tokens"] == round(2 * 15_011 * (118.1 + 91.3 + planning.CHAT_TOKENS))
    assert paper["finetune-65B-tulu_mix"].params["learning_rate"] == 1e-5 and paper["finetune-65B-tulu_mix"].params["max_seq_length"] == 1024
    twice = planning.cost_rows(paper, Rates(price=4.0))
    assert sum(r["cost"] for r in twice) == pytest.approx(2 * sum(r["cost"] for r in rows))
    assert not any(row["fits"] for row in planning.cost_rows(paper, Rates(memory_gib=16)))


def test_counted_lengths_win_over_the_papers(paper):
    folder = paper.root/"data"/"dolly"
    folder.mkdir(parents=True)
    (folder/"report.json").write_text(json.dumps({"n_out": 10, "lengths": {"tokenizer": "llama", "total": {"mean": 100.0}}}))
    row = next(r for r in planning.cost_rows(paper, Rates()) if r["cell"] == "finetune-13B-dolly")
    assert row["tokens"] == 2 * 10 * (100 + planning.CHAT_TOKENS) and row["known_from"] == "counted"


def test_what_cannot_be_known_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("TULU_RESULTS", str(tmp_path))
    study = (ROOT/"params"/"studies"/"mini.yaml").read_text().replace("study: mini", "study: odd").replace("oasst1]", "nano_mix]")
    (tmp_path/"odd.yaml").write_text(study)
    monkeypatch.setattr(planning, "printed", lambda key: None)
    head, rows, below = planning.cost_lines(planning.cost_rows(grid.load(str(tmp_path/"odd.yaml")), Rates()), Rates())
    assert all("run the cells convert-" in row[-1] for row in rows) and len(rows[0]) == len(head)


def test_more_of_anything_needs_more_memory():
    record = models()["llama-13b"]
    base = device_memory(record, Scale(8, 1, 3, "none", 2, 8, True), 2048).device
    for bigger in (Scale(8, 1, 2, "none", 2, 8, True), Scale(4, 1, 3, "none", 2, 16, True), Scale(8, 1, 3, "none", 4, 4, True), Scale(8, 1, 3, "none", 2, 8, False)): assert device_memory(record, bigger, 2048).device > base
    assert device_memory(record, Scale(8, 1, 3, "all", 2, 8, True), 2048).device < base < device_memory(record, Scale(8, 1, 3, "none", 2, 8, True), 4096).device
    assert activation_bytes(record, 2048, False) > activation_bytes(record, 2048, True)


def test_hardware_that_does_not_divide_the_batch_is_found_before_anything_runs(tmp_path):
    study = (ROOT/"params"/"studies"/"paper.yaml").read_text().replace("data: [vanilla, sharegpt, human_mix, tulu_mix], training: {learning_rate: 1.0e-5,", "data: [vanilla], training: {ranks: 7, learning_rate: 1.0e-5,", 1)
    (tmp_path/"mine.yaml").write_text(study)
    with pytest.raises(ParamsError, match=r"mine.yaml, line \d+: models.30B.training: batch_size 128 is not a multiple"): load_study(str(tmp_path/"mine.yaml"))


def test_the_command_prints_the_total(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tulu_study", "plan", "--study", "paper", "--price", "1"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "TULU_RESULTS": str(tmp_path)})
    assert done.returncode == 0 and "finetune-65B-tulu_mix" in done.stdout and "\ntotal" in done.stdout and "at 1.00 USD an hour" in done.stdout, done.stdout + done.stderr
