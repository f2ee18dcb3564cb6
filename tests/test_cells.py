"The door to papermill: what it refuses before a kernel starts, what it records, when it runs again."
import json, os, shutil, subprocess, sys, tempfile
from pathlib import Path

import pytest

from helpers import ROOT, notebook
from tulu_study.core import cells
from tulu_study.core.cells import CellError, cell_key, check_parameters, code_parts, parameters, read_manifest, run_cell

PARAMS = 'dataset: str = "dolly"  # which dataset\nlimit: int = 0  # conversations, 0 = all\nrate: float = 0.5  # share\nchat: bool = False  # chat format\nout_dir: str = "results/try"  # folder'
START = "from tulu_study.core.cells import start\nrun = start(globals())"


@pytest.fixture
def made(project):
    "A run notebook that works."
    return notebook(project/"nbs"/"runs"/"made.ipynb", PARAMS, START, "answer = limit + 1", "run.finish(answer=answer)")


@pytest.fixture
def no_kernel(monkeypatch):
    "Fail if a kernel would start."
    import papermill
    def refuse(*a, **k): raise AssertionError("a kernel was started")
    monkeypatch.setattr(papermill, "execute_notebook", refuse)


# ------------------------------------------------------------------------------------------- refused before a kernel starts
@pytest.mark.parametrize("tags, found", [({}, 0), ({0: ["parameters"], 1: ["parameters"]}, 2)])
def test_needs_exactly_one_parameters_cell(project, no_kernel, tags, found):
    path = notebook(project/"nbs"/"runs"/"odd.ipynb", PARAMS, "x = 1", tags=tags)
    with pytest.raises(CellError, match=rf"odd\.ipynb: expected exactly one code cell tagged 'parameters', found {found}"): run_cell(path, {}, project/"out")


def test_unknown_and_mistyped_parameters_are_named_together(made, project, no_kernel):
    with pytest.raises(CellError) as e: run_cell("made", {"limt": 3, "dataset": 7, "chat": 1, "limit": True}, project/"out")
    said = str(e.value)
    assert "made.ipynb: unknown parameter 'limt'; did you mean 'limit'?" in said
    assert "parameter 'dataset' should be str (which dataset), found int 7" in said
    assert "parameter 'chat' should be bool" in said and "parameter 'limit' should be int" in said


def test_types(made):
    assert check_parameters("made", {"rate": 1})["rate"] == 1
    for kind, good, bad in [("int | None", [None, 3], ["3", 2.5]), ("list[str]", [["a"]], ["a"]), ("dict", [{}], [[]]), ("float", [1, 1.5], ["1", True])]:
        assert all(cells._fits(v, kind) for v in good) and not any(cells._fits(v, kind) for v in bad), kind


def test_parameters_carry_their_comments(made):
    assert parameters("made")["limit"].comment == "conversations, 0 = all" and parameters("made")["rate"].type == "float"


def test_parameters_cell_holds_literals_only(project):
    notebook(project/"nbs"/"runs"/"odd.ipynb", "import os\nx = 1")
    with pytest.raises(CellError, match="may hold only"): parameters("odd")
    notebook(project/"nbs"/"runs"/"odd.ipynb", "x = max(1, 2)")
    with pytest.raises(CellError, match="not a literal"): parameters("odd")


def test_missing_notebook_names_those_there_are(made):
    with pytest.raises(CellError, match="or one of made"): run_cell("mad", {}, "out")


# ------------------------------------------------------------------------------------------------------------- running
def test_runs_once_and_records(made, project):
    manifest = run_cell("made", {"limit": 4}, project/"out")
    assert json.loads((project/"out"/"result.json").read_text())["answer"] == 5
    assert manifest["parameters"]["limit"] == 4 and manifest["parameters"]["dataset"] == "dolly"
    assert manifest["versions"]["papermill"] and manifest["hardware"]["cores"] and manifest["seconds"] > 0 and "result.json" in manifest["outputs"]
    assert read_manifest(project/"out") == manifest
    stamp = (project/"out"/"made.ipynb").stat().st_mtime_ns
    assert run_cell("made", {"limit": 4}, project/"out") == manifest
    assert (project/"out"/"made.ipynb").stat().st_mtime_ns == stamp
    assert run_cell("made", {"limit": 5}, project/"out")["key"] != manifest["key"]


def test_a_kernel_needs_no_port_that_something_else_may_have_taken(project):
    notebook(project/"nbs"/"runs"/"heard.ipynb", PARAMS, START, """from ipykernel.connect import get_connection_info
said = get_connection_info(unpack=True)
run.finish(transport=said["transport"], sockets=[f"{said['ip']}-{port}" for name, port in said.items() if name.endswith("_port")])""")
    run_cell("heard", {}, project/"out")
    result = json.loads((project/"out"/"result.json").read_text())
    assert result["transport"] == "ipc" and len(result["sockets"]) == 5 and len(result["sockets"][0]) < 90
    assert not [path for path in result["sockets"] if Path(path).parent.exists()], "the cell leaves its sockets behind"


def test_nothing_else_is_cleared_away_with_the_sockets(tmp_path, monkeypatch):
    (tmp_path/"precious").mkdir()
    (tmp_path/"precious"/"lock").write_text("kept")
    place = tempfile.mkdtemp(prefix="t-", dir="/tmp")
    monkeypatch.setattr(tempfile, "tempdir", place)
    monkeypatch.setattr(os, "getuid", lambda mine=os.getuid(): mine + 1)   # whatever lies there is somebody else's
    os.symlink(tmp_path/"precious", f"{place}/tulu_study-kernel-link")
    with cells.kernel_sockets(): assert (tmp_path/"precious"/"lock").read_text() == "kept"
    assert os.listdir(place) == ["tulu_study-kernel-link"]
    shutil.rmtree(place)


def test_sockets_of_killed_processes_are_cleared_away_and_those_in_use_are_not():
    code = "import os, signal\nfrom tulu_study.core.cells import kernel_sockets\nwith kernel_sockets() as config:\n    print(config.KernelManager.ip, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)"
    with cells.kernel_sockets() as mine:
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        left = Path(done.stdout.strip()).parent
        assert done.returncode == -9 and left.name.startswith("tulu_study-kernel-"), done.stderr
        with cells.kernel_sockets() as another:
            assert not left.exists() and all(Path(config.KernelManager.ip).parent.is_dir() for config in (mine, another))


def test_failure_is_recorded_with_its_notebook(project):
    notebook(project/"nbs"/"runs"/"bad.ipynb", PARAMS, START, "raise ValueError('row 7 of dolly has no response')")
    with pytest.raises(CellError, match="row 7 of dolly"): run_cell("bad", {}, project/"out")
    failed = json.loads((project/"out"/"failed.json").read_text())
    assert failed["error"] == "ValueError: row 7 of dolly has no response" and failed["notebook"].endswith("bad.ipynb")
    assert (project/"out"/"bad.ipynb").exists() and read_manifest(project/"out") is None


def test_parameters_changed_inside_the_notebook_are_found_out(project):
    notebook(project/"nbs"/"runs"/"sly.ipynb", PARAMS, "limit = 99", START, "run.finish()")
    with pytest.raises(CellError, match="limit: asked 4, the notebook used 99"): run_cell("sly", {"limit": 4}, project/"out")
    notebook(project/"nbs"/"runs"/"late.ipynb", PARAMS, START, "limit = 99", "run.finish()")
    with pytest.raises(CellError, match="changed its own parameters.*limit: 4 became 99"): run_cell("late", {"limit": 4}, project/"late")


@pytest.mark.parametrize("value, kind, fits", [
    (["gsm"], "list[str]", True), ([1], "list[str]", False), ([], "list[str]", True), ({"n": 1}, "dict[str, int]", True), ({"n": "1"}, "dict[str, int]", False),
    ([1], "list[str] | list[int]", True), (["a", 1], "list", True), (True, "int", False), ([True], "list[int]", False), (None, "list[str] | None", True),
])
def test_types_of_what_lists_and_mappings_hold(value, kind, fits):
    assert cells._fits(value, kind) is fits


def test_a_notebook_without_result_is_no_cell(project):
    notebook(project/"nbs"/"runs"/"mute.ipynb", PARAMS, START)
    with pytest.raises(CellError, match="without writing result.json"): run_cell("mute", {}, project/"out")


def test_lost_or_cut_outputs_run_again(made, project):
    run_cell("made", {}, project/"out")
    (project/"out"/"result.json").write_text("{")
    assert cells.missing_outputs(project/"out", read_manifest(project/"out")) == ["result.json"]
    run_cell("made", {}, project/"out")
    assert cells.missing_outputs(project/"out", read_manifest(project/"out")) == []


def test_same_key_continues_other_key_starts_anew(made, project):
    notebook(project/"nbs"/"runs"/"grow.ipynb", PARAMS, START, "done = run.out_dir/'part.txt'\nseen = done.exists()\ndone.write_text('x')\nif not seen and limit == 0: raise SystemError('cut off')", "run.finish(seen=seen)")
    with pytest.raises(CellError): run_cell("grow", {}, project/"out")
    assert json.loads((project/"out"/"attempt.json").read_text())["key"]
    (project/"out"/".scores.json.x1y2.part").write_text("torn")
    run_cell("grow", {}, project/"out")
    assert not list((project/"out").glob(".*.part")), "what a kill left half-written is gone"
    assert json.loads((project/"out"/"result.json").read_text())["seen"] is True
    run_cell("grow", {"limit": 1}, project/"out")
    assert json.loads((project/"out"/"result.json").read_text())["seen"] is False


def test_a_folder_of_somebody_else_is_not_cleared(made, project):
    (project/"out").mkdir()
    (project/"out"/"thesis.tex").write_text("precious")
    with pytest.raises(CellError, match="thesis.tex"): run_cell("made", {}, project/"out")
    assert (project/"out"/"thesis.tex").read_text() == "precious"


def test_two_processes_do_not_write_one_cell(made, project):
    with cells._only_one(project/"out"):
        with pytest.raises(CellError, match=f"is being written by process {os.getpid()}"): run_cell("made", {}, project/"out")


def test_torn_manifest_counts_as_none(made, project):
    run_cell("made", {}, project/"out")
    whole = (project/"out"/"manifest.json").read_text()
    (project/"out"/"manifest.json").write_text(whole[:100])
    assert read_manifest(project/"out") is None


# --------------------------------------------------------------------------------------------------------------- keys
def key(path): return cell_key(path, check_parameters(path, {}))


def test_prose_comments_docstrings_and_outputs_do_not_move_the_key(made, project):
    before = key(made)
    notebook(made, PARAMS + "  # more words", START, "#md A new page of prose", "# a comment\nanswer = limit + 1\n\n", "run.finish(answer=answer)  # done", tags={0: ["parameters"]})
    assert key(made) == before


def test_code_moves_the_key(made):
    before = key(made)
    notebook(made, PARAMS, START, "answer = limit + 2", "run.finish(answer=answer)")
    assert key(made) != before


def test_places_do_not_move_the_key_but_science_does(project):
    path = notebook(project/"nbs"/"runs"/"p.ipynb", 'source_root: str = ""\ndata_file: str = ""\nseed: int = 42\nout_dir: str = ""', "1")
    base = cell_key(path, check_parameters(path, {}))
    assert cell_key(path, check_parameters(path, {"source_root": "/elsewhere", "data_file": "/x.jsonl", "out_dir": "/y"})) == base
    assert cell_key(path, check_parameters(path, {"seed": 43})) != base
    assert cell_key(path, check_parameters(path, {}), {"needs": {"world": "abc"}}) != base


def test_modules_are_followed(project):
    path = notebook(project/"nbs"/"runs"/"m.ipynb", 'dataset: str = "dolly"\nout_dir: str = ""', "def f():\n    from tulu_study.data import convert")
    parts = code_parts(path, {"dataset": "dolly"})
    assert {"notebook", "tulu_study.data", "tulu_study.data.conversion", "tulu_study.core.files", "tulu_study.data.dolly"} <= set(parts)
    assert "tulu_study.data.cot" not in parts and "tulu_study.cli" not in parts
    assert "tulu_study.data.cot" in code_parts(path, {"dataset": "cot"})


def test_without_identity_the_files_at_places_count(project):
    "run_cell called by hand: another input file is another cell, though its path is no part of the key."
    notebook(project/"nbs"/"runs"/"reads.ipynb", 'data_file: str = ""  # input\nout_dir: str = ""  # folder', START, "from pathlib import Path\ntext = Path(data_file).read_text()", "run.finish(text=text)")
    for name, text in (("a", "one"), ("b", "two"), ("a", "three")):
        (project/name).write_text(text)
        run_cell("reads", {"data_file": str(project/name)}, project/"out")
        assert json.loads((project/"out"/"result.json").read_text())["text"] == text


def test_predictions_of_somebody_else_are_not_cleared(project):
    notebook(project/"nbs"/"runs"/"writes.ipynb", 'predictions_dir: str = ""  # folder\nout_dir: str = ""  # folder', START, "run.finish()")
    (project/"mine").mkdir()
    (project/"mine"/"thesis.tex").write_text("precious")
    with pytest.raises(CellError, match="thesis.tex"): run_cell("writes", {"predictions_dir": str(project/"mine")}, project/"out")
    assert (project/"mine"/"thesis.tex").exists()


def test_a_kill_while_clearing_leaves_a_folder_that_can_be_cleared(made, project):
    run_cell("made", {}, project/"out")
    for name in ("manifest.json", "result.json"): (project/"out"/name).unlink()      # as far as the clearing had come
    assert run_cell("made", {"limit": 1}, project/"out")["parameters"]["limit"] == 1


def test_code_edited_while_it_runs_makes_no_cell(project):
    path = notebook(project/"nbs"/"runs"/"edited.ipynb", PARAMS, START, "from pathlib import Path\nimport json\nfile = Path('nbs/runs/edited.ipynb')\nnb = json.loads(file.read_text())\nnb['cells'][1]['source'] += '\\nx = 1'\n_ = file.write_text(json.dumps(nb))", "run.finish()")
    with pytest.raises(CellError, match="notebook changed while edited.ipynb ran"): run_cell(path, {}, project/"out")
    assert read_manifest(project/"out") is None


def test_the_callers_environment_is_left_alone(made, project, monkeypatch):
    monkeypatch.delenv("TULU_CELL", raising=False)
    before = dict(os.environ)
    run_cell("made", {}, project/"out")
    assert dict(os.environ) == before


def test_a_notebook_without_out_dir_is_told_so(project, no_kernel):
    path = notebook(project/"nbs"/"runs"/"odd.ipynb", "limit: int = 0", "1")
    with pytest.raises(CellError, match="has no parameter 'out_dir'"): run_cell(path, {}, project/"out")
    notebook(path, "limit: int", "1")
    with pytest.raises(CellError, match="may hold only"): parameters(path)
    notebook(path, "limit = (", "1")
    with pytest.raises(CellError, match="not valid Python"): parameters(path)


def test_a_saved_state_survives_an_edit_but_not_force(tmp_path):
    "It says itself what it belongs to; the rest of the folder does not."
    from tulu_study.core.cells import _begin
    for place in ("state/step-00000004", "runs"): (tmp_path/place).mkdir(parents=True)
    (tmp_path/"attempt.json").write_text('{"key": "before"}')
    _begin(tmp_path, [tmp_path], "after", force=False)
    assert (tmp_path/"state"/"step-00000004").is_dir() and not (tmp_path/"runs").exists()
    _begin(tmp_path, [tmp_path], "after", force=True)
    assert not (tmp_path/"state").exists()


# ------------------------------------------------------------------------------------------------- without the door
def test_plain_papermill_runs_a_notebook(tmp_path):
    "`papermill nbs/runs/x.ipynb out.ipynb -p …` does the work too; what it leaves is no finished cell, for nobody checked what was asked."
    from tulu_study.data import convert
    (tmp_path/"raw"/"dolly").mkdir(parents=True)
    (tmp_path/"raw"/"dolly"/"databricks-dolly-15k.jsonl").write_text("".join(json.dumps({"instruction": f"Name {i}.", "context": "", "response": "Ebro"}) + "\n" for i in range(3)))
    convert("dolly", tmp_path/"raw", tmp_path/"data")
    env = {k: v for k, v in os.environ.items() if not k.startswith("TULU_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(Path(sys.executable).parent/"papermill"), "nbs/runs/table1.ipynb", str(tmp_path/"out.ipynb"), "-p", "study", "mine", "-y", "datasets: [dolly]",
                           "-p", "data_dir", str(tmp_path/"data"), "-p", "out_dir", str(tmp_path/"table")], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result, executed = json.loads((tmp_path/"table"/"result.json").read_text()), json.loads((tmp_path/"out.ipynb").read_text())
    assert result["parameters"]["study"] == "mine" and result["ran"] == ["dolly"]
    assert "mine" in (tmp_path/"table"/"table1.md").read_text() and (tmp_path/"table"/"table1.csv").exists()
    assert [c for c in executed["cells"] if "injected-parameters" in c["metadata"].get("tags", [])] and read_manifest(tmp_path/"table") is None
