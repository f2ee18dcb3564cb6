"The grid: which cells a study has, and which of them an edit touches."
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

from helpers import ROOT

KEYS = "import json, sys; from tulu_study.core import grid; print(json.dumps({n: c.key for n, c in grid.load(sys.argv[1]).items()}))"


@pytest.fixture
def house(tmp_path):
    "A copy of library, params and run notebooks that may be edited."
    for name in ("tulu_study", "params", "nbs/runs"): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT/"settings.ini", tmp_path)
    return tmp_path


def keys(house, study="nano"):
    env = {k: v for k, v in os.environ.items() if not k.startswith("TULU_")} | {"PYTHONPATH": str(house), "TULU_ROOT": str(house), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", KEYS, study], capture_output=True, text=True, cwd=house, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def moved(before, after): return {n for n in before if before[n] != after[n]}


def edit(path, old, new):
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new, 1))


def add_code(path): path.write_text(path.read_text() + "\n_edited = 1\n")


def test_nano_has_every_stage(house):
    names = set(keys(house))
    assert {"world", "convert-dolly", "convert-cot", "convert-oasst1", "mix-nano_mix", "pretrain-nano-llama-s", "finetune-13B-dolly", "evaluate-7B-vanilla", "table-table1"} <= names
    assert "finetune-7B-vanilla" not in names


def test_prose_docstrings_and_comments_move_nothing(house):
    before = keys(house)
    for path in (house/"nbs"/"runs").glob("*.ipynb"):
        nb = json.loads(path.read_text())
        for c in nb["cells"]: c["source"] = "".join(c["source"]) + ("\n\nMore prose." if c["cell_type"] == "markdown" else "\n# a comment")
        path.write_text(json.dumps(nb))
    for path in (house/"tulu_study").rglob("*.py"):
        if not path.read_text().lstrip().startswith(('"""', "'")): path.write_text('"A docstring."\n' + path.read_text())
        path.write_text("# a comment\n" + path.read_text())
    assert moved(before, keys(house)) == set()


def test_a_converter_edit_moves_its_dataset_and_what_follows(house):
    before = keys(house)
    add_code(house/"tulu_study"/"data"/"dolly.py")
    got = moved(before, keys(house))
    assert {n for n in before if "dolly" in n or "nano_mix" in n or n.startswith(("table", "figure"))} == got


def test_an_evaluation_edit_leaves_data_and_training(house):
    before = keys(house)
    add_code(house/"tulu_study"/"evaluation"/"gsm.py")
    got = moved(before, keys(house))
    assert got and all(n.startswith(("evaluate", "table-table3", "figure")) for n in got) and {n for n in before if n.startswith("evaluate")} <= got


def test_the_trainer_process_counts_though_no_notebook_imports_it(house):
    before = keys(house)
    add_code(house/"tulu_study"/"training"/"finetune.py")
    got = moved(before, keys(house))
    assert {n for n in before if n.startswith("finetune")} <= got and not any(n.startswith(("convert", "pretrain", "world", "mix")) for n in got)


def test_a_run_notebook_edit_moves_its_stage(house):
    before = keys(house)
    path = house/"nbs"/"runs"/"table1.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"].insert(-1, {"cell_type": "code", "id": "edited", "metadata": {}, "source": "edited = 1", "outputs": [], "execution_count": None})
    path.write_text(json.dumps(nb))
    assert moved(before, keys(house)) == {"table-table1"}


def test_a_parameter_edit_moves_what_depends_on_it(house):
    before = keys(house)
    study = house/"params"/"studies"/"nano.yaml"
    study.write_text(re.sub(r"learning_rate: [\d.e-]+", "learning_rate: 1.0e-3", study.read_text(), count=1))
    got = moved(before, keys(house))
    assert {n for n in before if n.startswith("finetune")} <= got and "evaluate-7B-vanilla" not in got and "table-table1" not in got


def test_a_registry_record_counts(house):
    before = keys(house)
    path = house/"params"/"models.yaml"
    head, tail = path.read_text().split("nano-llama-s:", 1)
    path.write_text(head + "nano-llama-s:" + tail.replace("steps: ", "steps: 1", 1))
    got = moved(before, keys(house))
    assert "pretrain-nano-llama-s" in got and "pretrain-nano-llama-m" not in got


def test_what_a_record_says_to_people_does_not_count(house):
    before = keys(house)
    edit(house/"params"/"datasets.yaml", "licence: CC BY-SA 3.0", "licence: CC BY-SA 3.0 Unported")
    assert moved(before, keys(house)) == set()
    edit(house/"params"/"datasets.yaml", "hub: datasets/databricks/", "hub: datasets/someone/")
    assert "convert-dolly" in moved(before, keys(house))


def test_raw_files_count_by_content_and_not_by_time(house, tmp_path):
    "With a sources root of the site's, a changed raw file moves its dataset; a touched one moves nothing."
    root = tmp_path/"raw"
    for folder, name in (("dolly", "databricks-dolly-15k.jsonl"), ("cot", "cot_zsopt.jsonl"), ("cot", "cot_fsopt.jsonl")):
        (root/folder).mkdir(parents=True, exist_ok=True)
        (root/folder/name).write_text('{"a": 1}\n')
    edit(house/"settings.ini", "sources =", f"sources = {root}")
    before = keys(house, "mini")
    os.utime(root/"dolly"/"databricks-dolly-15k.jsonl")
    assert moved(before, keys(house, "mini")) == set()
    (root/"dolly"/"databricks-dolly-15k.jsonl").write_text('{"a": 2}\n')
    got = moved(before, keys(house, "mini"))
    assert "convert-dolly" in got and "finetune-13B-dolly" in got and "convert-cot" not in got and "base_model-smollm2-135m" not in got


def test_files_that_a_raw_file_names_count_too(house, tmp_path):
    "SuperNI's record names a list of tasks, and the list names the task files."
    root = tmp_path/"raw"
    (root/"super_ni"/"tasks").mkdir(parents=True)
    for name in ("splits.txt", "tasks/one.json"): (root/"super_ni"/name).write_text("{}")
    edit(house/"settings.ini", "sources =", f"sources = {root}")
    edit(house/"params"/"studies"/"mini.yaml", "[vanilla, dolly, cot, oasst1]", "[vanilla, dolly, super_ni]")
    before = keys(house, "mini")
    (root/"super_ni"/"tasks"/"one.json").write_text("[]")
    assert "convert-super_ni" in moved(before, keys(house, "mini"))


def test_tokenizers_and_local_base_models_count_by_content(house, tmp_path):
    root = tmp_path/"raw"
    for folder, name in (("tokenizers/llama", "tokenizer.json"), ("models/smollm2-135m", "model.gguf")):
        (root/folder).mkdir(parents=True)
        (root/folder/name).write_text("one")
    edit(house/"settings.ini", "sources =", f"sources = {root}")
    before = keys(house, "mini")
    (root/"tokenizers"/"llama"/"tokenizer.json").write_text("two")
    got = moved(before, before := keys(house, "mini"))
    assert "convert-cot" in got and "base_model-smollm2-135m" not in got
    (root/"models"/"smollm2-135m"/"model.gguf").write_text("two")
    got = moved(before, keys(house, "mini"))
    assert "base_model-smollm2-135m" in got and "convert-cot" not in got


def test_stale_scores_are_not_read_as_this_studys(tmp_path, monkeypatch):
    "Before tables are drawn from what there is, a cell that did not run again loses what older code or parameters left; an interrupted one keeps its own."
    from tulu_study.core import grid
    monkeypatch.setenv("TULU_RESULTS", str(tmp_path))
    made = grid.load("smoke")
    cell = made["evaluate-7B-vanilla"]
    predictions = Path(cell.params["predictions_dir"])
    for key, kept in ((cell.key, True), ("0" * 16, False)):
        for folder, name in ((cell.out_dir, "gsm-cot.json"), (predictions, "gsm-cot.jsonl")):
            folder.mkdir(parents=True, exist_ok=True)
            (folder/name).write_text("{}")
        (cell.out_dir/"attempt.json").write_text(json.dumps({"key": key}))
        made.discard_stale(cell.name)
        assert (cell.out_dir/"gsm-cot.json").exists() is kept and (predictions/"gsm-cot.jsonl").exists() is kept


def test_a_cell_does_not_run_on_inputs_that_are_not_there(tmp_path, monkeypatch):
    from tulu_study.core import grid
    from tulu_study.core.cells import CellError
    monkeypatch.setenv("TULU_RESULTS", str(tmp_path))
    with pytest.raises(CellError, match="evaluate-7B-dolly needs cells that are not done: finetune-7B-dolly"): grid.run(grid.load("smoke"), "evaluate-7B-dolly")


def test_a_benchmark_file_that_comes_later_moves_no_conversion(house, tmp_path):
    root = tmp_path/"raw"
    (root/"gsm8k").mkdir(parents=True)
    (root/"gsm8k"/"test.jsonl").write_text('{"question": "one"}\n')
    edit(house/"settings.ini", "sources =", f"sources = {root}")
    before = keys(house, "mini")
    (root/"toxigen").mkdir()
    (root/"toxigen"/"hate_women_1k.txt").write_text("- text\n")
    assert moved(before, before := keys(house, "mini")) == {"table-overlap"}
    (root/"gsm8k"/"test.jsonl").write_text('{"question": "two"}\n')
    got = moved(before, keys(house, "mini"))
    assert {"table-overlap", "evaluate-13B-vanilla"} <= got and not any(n.startswith(("convert", "finetune")) for n in got)


def test_a_model_is_evaluated_on_as_many_gpus_as_hold_it(tmp_path, monkeypatch):
    from tulu_study.core import grid
    monkeypatch.setenv("TULU_RESULTS", str(tmp_path))
    study = (ROOT/"params"/"studies"/"paper.yaml").read_text()
    said = {}
    for name, evaluation in {"paper": "", "wide": "gpus: 8, "}.items():
        (tmp_path/f"{name}.yaml").write_text(study.replace("evaluation: {", f"evaluation: {{{evaluation}"))
        said[name] = grid.load(str(tmp_path/f"{name}.yaml"))
    asked = {name: cell.gpus for name, cell in said["paper"].items() if cell.stage == "evaluate"}
    assert {name.split("-")[1]: n for name, n in asked.items() if name.split("-")[1] in ("7B", "13B", "30B", "65B")} == {"7B": 1, "13B": 1, "30B": 2, "65B": 4} and set(asked.values()) == {1, 2, 4}
    assert grid.slurm_resources(said["paper"]["evaluate-65B-vanilla"])["slurm_extra"].startswith("--gpus-per-node=4")
    assert all(said["wide"][name].gpus == 8 and said["wide"][name].key == said["paper"][name].key for name in asked)   # hardware, not what is computed


def test_the_weights_to_evaluate_are_those_that_the_plan_counts():
    from tulu_study.core.grid import ROOM, evaluation_gpus
    from tulu_study.core.params import models
    from tulu_study.training.scale import model_size
    for record in models().values():
        if record.kind in ("nano", "endpoint"): continue
        for dtype, each in (("bfloat16", 2), ("float32", 4)):
            n, weights = evaluation_gpus(record, dtype), each * model_size(record).total
            assert weights <= 1.001 * n * ROOM and (n == 1 or weights > 0.999 * n / 2 * ROOM) and record.shape["heads"] % n == 0, record.key
    odd = models()["llama-65b"].model_copy(update={"shape": models()["llama-65b"].shape | {"heads": 66}})
    assert evaluation_gpus(odd, "bfloat16") == 2 and evaluation_gpus(odd.model_copy(update={"shape": {}}), "bfloat16") == 1
