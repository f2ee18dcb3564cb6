"""Tables and figures from hand-made scores, predictions and reports: what ran, what did not, what may be marked, and that the same input gives the same bytes."""
import csv
import hashlib
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tulu_study.core import params
from tulu_study.core.cells import run_cell
from tulu_study.core.stats import bootstrap
from tulu_study.reporting import figures, scores, tables
from tulu_study.reporting.copying import CopyError, copy_figures, write_published

ROWS = ["vanilla", "dolly", "cot", "oasst1"]
ASKED = {"gsm": {"settings": ["cot", "direct"], "n": 100}, "mmlu": {"settings": ["0shot"]}}
FULL = {"mmlu": ["0shot"], "gsm": ["cot"], "bbh": ["cot"], "tydiqa": ["gold_passage"], "codex_eval": ["t0.8"], "alpaca_eval": ["default"]}


def invent(root, row, share, benchmark="gsm", setting="cot", n=100, size="13B", base="nano-llama-m", shift=0, **more):
    "A score and its predictions: the easiest `share` of the examples is right, all but the first `shift`."
    rights = [int(shift <= number < n * share + shift) for number in range(n)]
    found = bootstrap(rights).scaled(100)
    model = f"{size}-{row}"
    score = {"model": model, "base_model": base, "training_data": row, "size": size, "benchmark": benchmark, "version": 1, "setting": setting, "metric": "exact_match", "protocol": "paper", "value": found.value, "low": found.low,
             "high": found.high, "interval": {"method": found.method, "level": found.level}, "n": n, "groups": {}, "n_errors": 0, "engine": "vllm", "dtype": "float32", "judge": None, "stand_in": None, "unit": "percent"} | more
    for kind, name, text in (("scores", f"{benchmark}-{setting}.json", json.dumps(score)),
                             ("predictions", f"{benchmark}-{setting}.jsonl", "".join(json.dumps({"example_id": f"{benchmark}_{number}", "group": f"g{number % 4}", "prompt_hash": "x", "completions": ["…"], "answer": "1", "target": "1", "score": right, "error": None}) + "\n"
                                                                                     for number, right in enumerate(rights)))):
        (root / kind / model).mkdir(parents=True, exist_ok=True)
        (root / kind / model / name).write_text(text)
    return root / "scores" / model / f"{benchmark}-{setting}.json"


@pytest.fixture
def results(tmp_path):
    for row, share in (("vanilla", 0.10), ("dolly", 0.11), ("cot", 0.40)):
        invent(tmp_path, row, share)
        invent(tmp_path, row, 0.25, "mmlu", "0shot")
    invent(tmp_path, "vanilla", 0.2, "gsm", "direct")
    return tmp_path


def build(results, rows=ROWS, asked=ASKED, size="13B"):
    return tables.table3("mine", size, rows, asked, results / "scores")


def one(cells, key, benchmark="gsm", setting="cot"):
    return next(cell for cell in cells if (cell["key"], cell["benchmark"], cell["setting"]) == (key, benchmark, setting))


def read_markdown(page):
    "The rows of all tables of a page, split at the pipes that are not escaped."
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.replace("\\|", "\0").strip("|").split("|")] for line in lines]


# -------------------------------------------------------------------------------------------------------------- table 3

def test_every_row_and_column_of_the_paper_is_there(results):
    cells = build(results)
    assert len({cell["key"] for cell in cells}) == 15 and len({cell["column"] for cell in cells}) == 6 + 1 + 1
    assert {cell["state"] for cell in cells} == {"ran", "not run"}
    assert all(bool(cell["why"]) == (cell["state"] == "not run") for cell in cells)


def test_not_run_says_why(results):
    cells = build(results)
    assert one(cells, "oasst1")["why"].startswith("no score")
    assert one(cells, "sharegpt")["why"] == "the study does not have this row"
    assert one(cells, "dolly", "bbh")["why"] == "the study does not have this column"
    page = tables.table3_markdown(cells)
    assert "not run ✗" in page and "| not run<br>paper 40.4 |" in page


def test_value_difference_and_published_value(results):
    cell = one(build(results), "cot")
    assert (cell["value"], cell["published"], cell["difference"]) == (40.0, 40.0, 0.0)
    assert cell["low"] < 40 < cell["high"] and cell["difference_low"] == pytest.approx(cell["low"] - 40)
    vanilla = one(build(results), "vanilla")
    assert vanilla["difference"] == pytest.approx(10 - 14.5) and vanilla["change"] is None


def test_only_changes_outside_noise_are_marked(results):
    cells = build(results)
    assert one(cells, "cot")["outside_noise"] is True and tables.mark(one(cells, "cot")) == "▲"
    assert one(cells, "dolly")["outside_noise"] is False and tables.mark(one(cells, "dolly")) == ""
    html = tables.styled(cells).to_html()
    assert html.count("background-color: #d9efdc") == 1 and "background-color: #f6dad6" not in html


def test_losses_are_marked_downwards(results):
    invent(results, "dolly", 0.0)
    cell = one(build(results), "dolly")
    assert cell["change"] == pytest.approx(-10) and tables.mark(cell) == "▼"
    assert "exact, all examples agree" in cell["interval"] and cell["high"] > 3


def test_equal_scores_on_other_examples_are_no_difference(results):
    invent(results, "dolly", 0.10, shift=50)
    cell = one(build(results), "dolly")
    assert cell["change"] == 0 and not cell["outside_noise"]


def test_average_needs_all_six(results):
    cells = build(results)
    assert all(cell["state"] == "not run" for cell in cells if cell["benchmark"] == "average")
    assert one(cells, "dolly", "average", "mean of 6")["why"] == "2 of 6 benchmarks ran"
    for benchmark, settings in FULL.items():
        invent(results, "dolly", 0.5, benchmark, settings[0])
    whole = build(results, asked={key: {"settings": settings} for key, settings in FULL.items()})
    average = one(whole, "dolly", "average", "mean of 6")
    assert average["value"] == 50 and average["published"] == 30.5 and average["difference"] == 19.5
    assert 50 - average["low"] < (50 - one(whole, "dolly")["low"]) / 2


def test_another_base_model_is_said_in_the_head(results):
    page = tables.table3_markdown(build(results))
    assert "different base model; the difference is not a reproduction error" in page.split("| data |")[0]


def test_the_papers_base_model_needs_no_warning(results, monkeypatch):
    record = params.Model(key="llama-13b", name="LLaMA 13B", family="llama", kind="hub", size="13B", licence="x", hub="a/b", published="LLaMA 13B", note="weights | on request")
    monkeypatch.setattr(scores, "models", lambda: {"llama-13b": record})
    for row, share in (("vanilla", 0.1), ("dolly", 0.1), ("cot", 0.4)):
        for benchmark, setting in (("gsm", "cot"), ("mmlu", "0shot"), ("gsm", "direct")):
            invent(results, row, share, benchmark, setting, base="llama-13b")
    page = tables.table3_markdown(build(results))
    assert "reproduction error" not in page and "weights | on request" in page


def test_foot_names_samples_engine_protocol_and_detectable_change(results):
    invent(results, "dolly", 0.2, "mmlu", "0shot", dtype="bfloat16", n_errors=3, judge="a local judge")
    page = tables.table3_markdown(build(results))
    for words in ("GSM EM 8-shot CoT: n = 100", "3 failed examples left out", "Protocol: paper", "Engine: vllm", "bfloat16; float32", "bootstrap over examples, 95%", "smallest detectable change", "a local judge", "sign-flip", "† = published"):
        assert words in page, words


def test_a_study_without_results_gives_the_papers_table(tmp_path):
    cells = build(tmp_path)
    page = tables.table3_markdown(cells)
    assert "Nothing has run yet" in page and page.count("not run") > 100 and "nan" not in page.lower().replace("nano", "")


def test_other_sizes_have_no_published_numbers(tmp_path):
    invent(tmp_path, "vanilla", 0.3, size="7B")
    cells = build(tmp_path, size="7B")
    assert one(cells, "vanilla")["state"] == "ran" and all(cell["published"] is None for cell in cells)
    page = tables.table3_markdown(cells)
    assert "nothing to compare 7B with" in page and "The paper's base model" not in page and "# Table 3 · nano model in the 7B column" in page


@pytest.fixture
def invented_world(monkeypatch):
    "As if `mine` were a study of an invented world."
    record = SimpleNamespace(title="small | one", world={"seed": 1}, data=SimpleNamespace(limit=64), training=SimpleNamespace(loss="token"), models={"7B": SimpleNamespace(base="nano-llama-s")})
    for module in (scores, tables):
        monkeypatch.setattr(module, "study_record", lambda study: record)


def test_an_invented_world_has_no_differences(results, invented_world):
    for benchmark, settings in FULL.items():
        invent(results, "dolly", 0.5, benchmark, settings[0])
    cells = build(results, asked={key: {"settings": settings} for key, settings in FULL.items()})
    dolly = [cell for cell in cells if cell["key"] == "dolly"]
    assert {cell["state"] for cell in dolly} == {"ran"} and one(cells, "dolly", "average", "mean of 6")["published"] == 30.5
    assert all(cell[name] is None for cell in cells for name in ("difference", "difference_low", "difference_high"))
    page = tables.table3_markdown(cells)
    assert "Δ" not in page and "paper 40.0" in page and scores.INVENTED in page.split("| data |")[0] and "reproduction error" not in page
    assert "small \\| one" in page and "Loss normalisation: token (the reference's: microbatch)" in page
    report(results, "dolly", n_out=15_011)
    rows = tables.table1("mine", ["dolly"], results / "data")
    page = tables.table1_markdown(rows)
    assert {row["difference"] for row in rows} == {None} and "Δ" not in page and "15,011<br>paper 15,011" in page and scores.INVENTED in page


def test_the_figure_of_an_invented_world_names_the_papers_benchmarks(results, invented_world):
    found = scores.grid("mine", "13B", ROWS, ASKED, results / "scores")
    handles = figures.legend_handles(figures.points(found, ROWS, ASKED))
    assert handles[-1].get_label() == "the paper (LLaMA 13B, real benchmarks)"
    assert "*" not in figures.caption_of("mine", found, figures.points(found, ROWS, ASKED))


def test_own_rows_come_last_and_are_labelled(results):
    invent(results, "my|mix", 0.3)
    cells = build(results, rows=[*ROWS, "my|mix"])
    page = tables.table3_markdown(cells)
    widths = {len(row) for row in read_markdown(page.split("##")[0])}
    assert widths == {8} and "my\\|mix** (not in the paper)" in page
    assert [cell["key"] for cell in cells][-1] == "my|mix"


def test_further_settings_have_their_own_table(results):
    page = tables.table3_markdown(build(results))
    extra = read_markdown(page.split("## Settings")[1])
    assert extra[0] == ["data", "GSM EM 8-shot direct"] and len(extra) == 2 + 4
    assert extra[2] == ["**Vanilla**", extra[2][1]] and extra[2][1].startswith("20.0 [")


def test_markup_in_names_is_text(results):
    path = invent(results, "dolly", 0.2, base="<script>alert(1)</script>")
    assert "<script>" not in tables.styled(build(results)).to_html()
    assert path.is_file() and tables.escape("<b>|`*_[x]\n") == "&lt;b&gt;\\|\\`\\*\\_\\[x\\]"


def test_csv_is_tidy_and_complete(results):
    tables.write_table3("mine", "13B", ROWS, ASKED, results / "scores", results / "out")
    read = list(csv.DictReader(io.StringIO((results / "out" / "table3.csv").read_text())))
    assert len(read) == 15 * 8 and set(read[0]) == set(scores.CELL_FIELDS)
    cot = next(row for row in read if (row["key"], row["column"]) == ("cot", "GSM EM 8-shot CoT"))
    assert (cot["value"], cot["published"], cot["outside_noise"], cot["published_source"]) == ("40", "40", "true", "S1;S14;S15;S16")


@pytest.mark.parametrize("damage, words", [
    (lambda path: path.write_text("{"), "found no JSON"),
    (lambda path: path.write_text(json.dumps({"value": 3})), "found no model"),
    (lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"value": 0.4, "low": 30.0})), "expected percentages"),
])
def test_damaged_score_files_are_named(results, damage, words):
    damage(results / "scores" / "13B-dolly" / "gsm-cot.json")
    with pytest.raises(scores.ResultsError, match=f"13B-dolly/gsm-cot.json: .*{words}"):
        build(results)


def test_a_score_over_nothing_is_not_run(results):
    invent(results, "dolly", 0.2, value=None, low=None, high=None, n=100)
    assert one(build(results), "dolly")["why"] == "every example failed"


def test_lost_predictions_leave_the_score_without_a_mark(results):
    (results / "predictions" / "13B-cot" / "gsm-cot.jsonl").unlink()
    cell = one(build(results), "cot")
    assert cell["value"] == 40 and cell["change"] is None and tables.mark(cell) == ""


def test_failed_examples_leave_both_sides_of_a_comparison(results):
    path = results / "predictions" / "13B-cot" / "gsm-cot.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:20]:
        row.update(score=None, error="engine died")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cell = one(build(results), "cot")
    assert cell["change_n"] == 80 and cell["change"] == pytest.approx(100 * 20 / 80)


def test_an_example_that_occurs_twice_stops_the_table(results):
    path = results / "predictions" / "13B-cot" / "gsm-cot.jsonl"
    path.write_text(path.read_text() * 2)
    with pytest.raises(scores.ResultsError, match="line 101: found example 'gsm_0' again"):
        build(results)


def test_groups_count_where_the_benchmark_averages_over_them(results):
    both = [results / "predictions" / f"13B-{row}" / "gsm-cot.jsonl" for row in ("cot", "vanilla")]
    assert scores.compare(*both).method == "paired bootstrap over examples"
    assert scores.compare(*both, "macro").method == "paired bootstrap over 4 groups"


# -------------------------------------------------------------------------------------------------------------- table 1

def report(root, key, tokenizer="llama", **more):
    found = {"key": key, "n_in": 100, "n_records": 98, "n_rejected": 2, "n_out": 98, "protocol": "paper", "reasons": {"empty": 2}, "turns": {"mean": 1.25, "max": 3, "counts": {}},
             "lengths": {"tokenizer": tokenizer, "user": {"mean": 110.0}, "assistant": {"mean": 95.5}} if tokenizer else None} | more
    (root / "data" / key).mkdir(parents=True, exist_ok=True)
    (root / "data" / key / "report.json").write_text(json.dumps(found))


def test_table1_compares_what_counts_the_same(tmp_path):
    report(tmp_path, "dolly", n_out=15_011)
    rows = tables.table1("mine", ["dolly", "cot"], tmp_path / "data")
    dolly = {row["measure"]: row for row in rows if row["key"] == "dolly"}
    assert dolly["n_instances"]["difference"] == 0 and dolly["avg_rounds"]["difference"] == pytest.approx(0.25)
    assert dolly["avg_prompt_length"]["difference"] == pytest.approx(110 - 118.1)
    page = tables.table1_markdown(rows)
    assert "15,011<br>paper 15,011<br>Δ +0" in page and "LLaMA tokens" in page and "Dolly 2 of 100" in page
    assert len([line for line in page.splitlines() if line.startswith("| **")]) == 14 and "sample" not in page.split("| data |")[0].lower()
    assert "249,806‡" in page and "not run ✗<br>paper 100,000" in page and "not run<br>paper 96,913" in page


def test_table1_with_another_tokenizer_shows_no_difference_of_lengths(tmp_path):
    report(tmp_path, "dolly", tokenizer="/home/someone/tokenizers/nano")
    rows = tables.table1("mine", ["dolly"], tmp_path / "data")
    lengths = [row for row in rows if row["key"] == "dolly" and "length" in row["measure"]]
    assert [row["difference"] for row in lengths] == [None, None] and [row["value"] for row in lengths] == [110.0, 95.5]
    page = tables.table1_markdown(rows)
    assert "prompt length (nano tokens; the paper: LLaMA's)" in page and "someone" not in page and "**A sample, not the whole**" in page and "98 of 15,011" in page


def test_table1_without_lengths_and_with_an_invented_world(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "load_study", lambda name: SimpleNamespace(title="small", world={"seed": 1}, data=SimpleNamespace(limit=64), models={}))
    assert scores.INVENTED in scores.study_facts("smoke") and any("at most 64" in fact for fact in scores.study_facts("smoke"))
    report(tmp_path, "dolly", tokenizer=None)
    rows = tables.table1("smoke", ["dolly"], tmp_path / "data")
    page = tables.table1_markdown(rows)
    assert "not measured<br>paper 118.1" in page and scores.INVENTED in page


def test_table1_names_a_damaged_report(tmp_path):
    report(tmp_path, "dolly")
    path = tmp_path / "data" / "dolly" / "report.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="dolly/report.json: found no n_in"):
        tables.table1("mine", ["dolly"], tmp_path / "data")
    path.write_text("{")
    with pytest.raises(ValueError, match="found no JSON"):
        tables.table1("mine", ["dolly"], tmp_path / "data")


# -------------------------------------------------------------------------------------------------------------- figure

def test_points_of_the_figure(results):
    found = scores.grid("mine", "13B", ROWS, ASKED, results / "scores")
    points = figures.points(found, ROWS, ASKED)
    assert len(points) == 3 * 3 and {point["key"] for point in points} == {"dolly", "cot", "oasst1"}
    by = {(point["key"], point["column"]): point for point in points}
    assert by["cot", "GSM EM 8-shot CoT"]["published_change"] == pytest.approx(25.5)
    assert by["dolly", "GSM EM 8-shot direct"]["state"] == "not run" and by["dolly", "GSM EM 8-shot direct"]["published_change"] is None
    assert figures.kind(by["cot", "GSM EM 8-shot CoT"]) == "up" and figures.kind(by["dolly", "MMLU EM 0-shot"]) == "noise"


def test_no_published_change_rests_on_an_uncertain_cell(monkeypatch):
    from dataclasses import replace
    column = figures.table_columns()[1]
    sure = figures.published_cell("cot", column, "13B")
    monkeypatch.setattr(figures, "published_cell", lambda key, column, size: replace(sure, status="unverified") if key == "cot" else sure)
    assert figures.published_change("cot", column, "13B") is None and figures.published_change("dolly", column, "13B") == 0


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_figure_has_the_same_bytes_in_another_process(results):
    code = ("import sys; from tulu_study.reporting.figures import write_change_by_dataset as draw; "
            f"draw('mine', '13B', {ROWS!r}, {ASKED!r}, sys.argv[1] + '/scores', sys.argv[1] + '/' + sys.argv[2])")
    for folder in ("first", "second"):
        subprocess.run([sys.executable, "-c", code, str(results), folder], check=True)
    assert digest(results / "first") == digest(results / "second") and len(digest(results / "first")) == 3
    svg = (results / "first" / "change_by_dataset.svg").read_text()
    assert "<dc:date>" not in svg and "<dc:creator>" not in svg and str(results) not in svg
    assert b"Software" not in (results / "first" / "change_by_dataset.png").read_bytes()[:400]


def test_figure_is_drawn_when_nothing_or_only_vanilla_ran(tmp_path):
    figures.write_change_by_dataset("mine", "13B", ROWS, ASKED, tmp_path / "scores", tmp_path / "out")
    assert (tmp_path / "out" / "change_by_dataset.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no row beside vanilla"):
        figures.write_change_by_dataset("mine", "13B", ["vanilla"], ASKED, tmp_path / "scores", tmp_path / "out")
    with pytest.raises(ValueError, match="no row beside vanilla"):
        figures.write_change_by_dataset("mine", "13B", ROWS, {}, tmp_path / "scores", tmp_path / "out")


def test_caption_says_what_stands_alone_must_say(results):
    found = scores.grid("mine", "13B", ROWS, ASKED, results / "scores")
    text = figures.caption_of("mine", found, figures.points(found, ROWS, ASKED))
    assert "different base model; the difference is not a reproduction error" in text and "same examples" in text and "*" not in text


# -------------------------------------------------------------------------------------------- run notebooks and copying

def test_run_notebooks_and_copies_that_change_no_byte(results):
    for key in ("dolly", "cot"):
        report(results, key)
    shared = {"study": "mine", "size": "13B", "rows": ROWS, "benchmarks": ASKED, "scores_dir": str(results / "scores")}
    made = {"tables/table1": run_cell("table1", {"study": "mine", "datasets": ["dolly", "cot"], "data_dir": str(results / "data")}, results / "tables" / "table1"),
            "tables/table3-13B": run_cell("table3", shared, results / "tables" / "table3-13B"),
            "figures/change_by_dataset": run_cell("change_by_dataset", shared, results / "figures" / "change_by_dataset")}
    assert json.loads((results / "figures" / "change_by_dataset" / "result.json").read_text())["outside_noise"] == ["cot GSM EM 8-shot CoT"]
    copied = copy_figures(results, results / "copy")
    names = {path.name for path in copied}
    assert names == {"table1.csv", "table1.md", "table1.provenance.json", "table3-13B.csv", "table3-13B.md", "table3-13B.provenance.json", "change_by_dataset.svg", "change_by_dataset.png", "change_by_dataset.csv", "change_by_dataset.provenance.json"}
    before, stamps = digest(results / "copy"), {path.name: path.stat().st_mtime_ns for path in copied}
    run_cell("table3", shared, results / "tables" / "table3-13B", force=True)
    copy_figures(results, results / "copy")
    assert digest(results / "copy") == before and {path.name: path.stat().st_mtime_ns for path in copied} == stamps
    text = (results / "copy" / "table3-13B.provenance.json").read_text()
    found = json.loads(text)
    assert found["key"] == made["tables/table3-13B"]["key"] and found["parameters"]["rows"] == ROWS and found["versions"]["numpy"]
    for word in ("seconds", "began", "hardware", "timings", str(results)):
        assert word not in text, word
    (results / "tables" / "table1" / "table1.csv").unlink()
    with pytest.raises(CopyError, match="table1/table1.csv: found no such file"):
        copy_figures(results, results / "other")
    assert not (results / "other").exists()
    assert "table1.md" not in {path.name for path in copy_figures(results, results / "other", leave_out={"tables/table1"})}, "an artefact that is out of date is not copied"


def test_provenance_follows_the_cells_behind_an_artefact(tmp_path):
    def cell(place, key, inputs, **more):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"notebook": "x", "key": key, "parameters": {"seed": 1, "out_dir": "/a/b"}, "code": {"notebook": "1"}, "inputs": inputs, "outputs": {}, "versions": {"numpy": more.get("numpy", "2")},
                                                          "git": {"commit": "c", "dirty": False}, "hardware": {"processor": "p"}, "seconds": 3.1, "began": "2020-01-01", "timings": {}, "command": "make"}))
    cell("data/dolly", "a" * 16, {"raw": {"sha256": "f" * 64, "file": "/somewhere/dolly.jsonl"}})
    cell("checkpoints/13B-dolly", "b" * 16, {"data_file": {"cell": "a" * 16}}, numpy="1")
    cell("scores/13B-cot", "d" * 16, {})
    cell("tables/table3", "c" * 16, {"13B-dolly": "b" * 16})
    (tmp_path / "tables" / "table3" / "table3.md").write_text("x")
    copy_figures(tmp_path, tmp_path / "copy")
    found = json.loads((tmp_path / "copy" / "table3.provenance.json").read_text())
    assert [entry["cell"] for entry in found["cells"]] == ["checkpoints/13B-dolly", "data/dolly"] and found["versions"]["numpy"] == ["1", "2"]
    assert found["parameters"] == {"seed": 1} and "/somewhere" not in json.dumps(found) and "2020" not in json.dumps(found)


def test_nothing_finished_is_an_error(tmp_path):
    with pytest.raises(CopyError, match="no finished table or figure"):
        copy_figures(tmp_path, tmp_path / "copy")


def test_published_artefacts_are_labelled_and_repeat(tmp_path):
    first = write_published(tmp_path / "one")
    write_published(tmp_path / "two")
    assert digest(tmp_path / "one") == digest(tmp_path / "two") and len(first) == 7
    for name in ("table1.md", "table3.md"):
        page = (tmp_path / "one" / name).read_text()
        assert "as published" in page and "none of this study" in page
    assert "| **Vanilla LLaMa 13B** | 42.3 | 14.5 | 39.3 | 43.2 | 28.6 | — | — |" in (tmp_path / "one" / "table3.md").read_text()
    rows = read_markdown((tmp_path / "one" / "table1.md").read_text())
    assert len(rows) == 2 + 12 + 1 + 2 and rows[14][0].startswith("*not a row of Table 1") and rows[15][:2] == ["**Human data mix**", "249,806‡"] and rows[16][:2] == ["**Human+GPT data mix**", "490,694"]


def test_importing_reporting_is_light():
    heavy = ("torch", "transformers", "vllm", "deepspeed", "datasets", "seaborn", "matplotlib", "pandas")
    code = f"import sys, tulu_study.reporting, tulu_study.reporting.tables, tulu_study.reporting.figures, tulu_study.reporting.copying; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


def test_a_size_that_the_paper_has_not_is_shown_alone():
    cells = tables.table3("nano", "7B", ["vanilla"], {"gsm": {"settings": ["cot"]}}, "nowhere")
    assert "paper —" not in tables.table3_markdown(cells) and "LLaMA 13B alone" in tables.table3_markdown(cells)
    assert "paper —" in tables.table3_markdown(tables.table3("nano", "13B", ["vanilla"], {"gsm": {"settings": ["cot"]}}, "nowhere"))


def test_table1_names_what_is_remarked_about_the_base_model(tmp_path):
    report(tmp_path, "dolly", tokenizer=None)
    assert "already instruction-tuned by its makers; dequantised" in tables.table1_markdown(tables.table1("mini", ["dolly"], tmp_path / "data"))
    assert "Base model" not in tables.table1_markdown(tables.table1("nano", ["dolly"], tmp_path / "data"))


def test_means_of_table1_carry_their_intervals(tmp_path):
    made = {"n_in": 5, "n_rejected": 0, "n_out": 5, "protocol": "paper", "turns": {"mean": 1.4, "counts": {"1": 3, "2": 2}},
            "lengths": {"tokenizer": "llama", "table1": {"prompt": 100.0, "prompt_se": 2.0, "completion": 50.0, "completion_se": 0.001}}}
    (tmp_path / "dolly").mkdir()
    (tmp_path / "dolly" / "report.json").write_text(json.dumps(made))
    rows = {row["measure"]: row for row in tables.table1("mini", ["dolly"], tmp_path) if row["key"] == "dolly"}
    assert (rows["avg_prompt_length"]["low"], rows["avg_prompt_length"]["high"]) == pytest.approx((96.08, 103.92))
    assert rows["avg_rounds"]["high"] - 1.4 == pytest.approx(1.96 * (1.2 / 4 / 5) ** 0.5)     # sample variance of 1, 1, 1, 2, 2
    assert rows["n_instances"]["low"] is None
    page = tables.table1_markdown(list(rows.values()))
    assert "100.0 ± 3.9<br>paper 118.1" in page and "| 50.0<br>paper 91.3" in page
