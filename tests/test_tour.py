"The pages for readers run from top to bottom, offline, and leave nothing behind."
import ast
import json
import os
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tulu_study.core.cells import kernel_sockets

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "nbs" / "tour"


def outputs(nb):
    "Everything that a page shows, as one text."
    return "\n".join(json.dumps(output, ensure_ascii=False) for cell in nb.cells if cell.cell_type == "code" for output in cell.outputs)


@pytest.fixture
def run(tmp_path, monkeypatch):
    "Execute a page in a folder of its own, without a network and without this project's environment; the notebook as executed."
    for name in list(os.environ):
        if name.startswith(("TULU_", "TQDM_")): monkeypatch.delenv(name)
    for name, value in {"HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "TMPDIR": str(tmp_path / "scratch"), "PYTHONPATH": str(ROOT)}.items(): monkeypatch.setenv(name, value)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)

    def execute(name):
        nb = nbformat.read(TOUR / f"{name}.ipynb", 4)
        with kernel_sockets() as config: NotebookClient(nb, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}, config=config).execute()
        return nb
    return execute


def test_adding_a_dataset_of_ones_own(run, tmp_path):
    before = (ROOT / "params" / "datasets.yaml").read_bytes()
    nb = run("add_a_dataset")
    shown = outputs(nb)
    for said in ("| raw records | 10 |", "| conversations | 8 |", "wrong_cells", "no_answer", "datasets.bike_faq.license: unknown key", "expected at most 1.0%", "**Bicycle workshop**", "**Workshop + a little Dolly**", "pretty_name: Bicycle workshop", "license: cc-by-4.0", "'workshop_mix'"):
        assert said in shown, said
    table = next(o["data"]["text/markdown"] for c in nb.cells if c.cell_type == "code" for o in c.outputs if "Table 1" in "".join(o.get("data", {}).get("text/markdown", "")))
    assert [line.split(" | ")[1].split("<br>")[0].strip() for line in "".join(table).splitlines() if line.startswith(("| **Bicycle", "| **Workshop"))] == ["8", "70"]
    assert (ROOT / "params" / "datasets.yaml").read_bytes() == before, "the page works in a copy of the params"
    left = [path.name for path in (tmp_path / "scratch").iterdir() if (path / "settings.ini").exists()]
    assert not left, "the page clears its scratch project away"


def test_the_page_has_the_two_files_and_no_more():
    code = ["".join(cell["source"]) for cell in json.loads((TOUR / "add_a_dataset.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    code = ["\n".join(line for line in source.splitlines() if not line.startswith("%")) for source in code]   # without magics
    functions = [node.name for cell in code for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.FunctionDef)]
    assert functions == ["read_question", "convert_bike_faq"], "a dataset of one's own takes a reader and a converter"


def test_what_a_study_asks_a_cluster_for(run):
    kept, made = nbformat.read(TOUR / "cluster.ipynb", 4), run("cluster")
    texts = lambda nb: ["".join(o.get("text") or o["data"].get("text/plain", "")) for cell in nb.cells if cell.cell_type == "code" for o in cell.outputs]
    assert texts(made) == texts(kept)
    table, command = texts(made)
    assert "finetune" in table and "--nodes=4" in command and "--rdzv-endpoint=gpu017:20815" in command


def test_footguns_shows_what_it_says(run):
    kept = nbformat.read(TOUR / "footguns.ipynb", 4)
    made = run("footguns")
    texts = lambda nb: ["".join(o.get("text") or o["data"].get("text/plain", "")) for cell in nb.cells if cell.cell_type == "code" for o in cell.outputs]
    assert texts(made) == texts(kept), "the outputs that readers see are those that the code gives"
    assert len([cell for cell in kept.cells for line in cell.source.splitlines() if cell.cell_type == "markdown" and line.startswith("## ")]) == 14 and "fourteen" in kept.cells[0].source
