"""The published numbers: every cell equals the collection that it was copied from (where that is present), and printed averages re-compute."""
import csv
import os
from pathlib import Path

import pytest

from tulu_study.core.params import datasets, mixes, params_dir
from tulu_study.reporting.published import FIELDS, PublishedError, STATUSES, all_cells, published, read_folder, recomputed_averages, table_columns, table_rows

PAPER = Path(os.environ.get("TULU_PAPER", Path(__file__).resolve().parents[1] / ".." / "shared" / "paper"))
FOLDER = params_dir() / "published"
STANDARD = {"table3_datasets_13b": "table3", "table4_base_models": "table4", "table5_sizes": "table5", "table6_safety": "table6", "table7_alpacaeval_sizes": "table7"}
# file -> (our table, columns that name the row, columns that hold values, column with the state of knowledge or None)
OTHERS = {
    "table1_datasets": ("table1", ("dataset",), ("n_instances", "avg_rounds", "avg_prompt_length", "avg_completion_length", "sourced_from"), "provenance"),
    "table2_base_models": ("table2", ("family", "nominal"), ("n_params", "n_tokens"), "status"),
    "appendix_model_cards_v1": ("model_cards", ("dataset",), ("value",), "confidence"),
    "conflicts_v1_v2_13b": ("conflicts", ("training_data",), ("v1_model_card", "v2_table3", "v2_minus_v1"), None),
    "eval_protocol": ("eval_protocol", ("benchmark",), ("protocol",), None),
    "figure2_unique_tokens": ("figure2", ("item",), ("value",), "provenance"),
    "figure3_human_acceptance": ("figure3", ("model",), ("n_acceptable", "n_judged", "pct_recomputed", "pct_printed_in_v2"), None),
    "figure4_human_preference": ("figure4", ("model_a", "model_b"), tuple(f"{kind}{name}" for kind in ("", "pct_") for name in ("a_clearly", "a_slightly", "tie", "b_slightly", "b_clearly")) + ("pct_a_wins", "pct_b_wins", "printed_check"), None),
    "headline_versions": ("headline", (), ("pct_of_ChatGPT", "pct_of_GPT4", "other differences"), None),
    "human_eval_agreement": ("human_eval_agreement", ("pair",), ("n_doubly_annotated", "acceptance_agreement", "pairwise_agreement_strict", "pairwise_agreement_tie_counts_half"), None),
    "human_eval_details": ("human_eval_details", ("item",), ("value",), "provenance"),
    "hyperparameters": ("hyperparameters", ("item",), ("value",), "provenance"),
    "licences_partial": ("licences", ("dataset",), ("licence",), "provenance"),
}
ONE_VALUE = {"value", "protocol", "licence"}    # files with one value a row: our `benchmark` is then the file's, or a word of ours
here = pytest.mark.skipif(not PAPER.is_dir(), reason=f"the collection of published numbers is not at {PAPER.name}/")


def source_rows(stem):
    with (PAPER / f"{stem}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ours(table):
    return [cell for cell in all_cells() if cell.table == table]


@here
def test_no_file_of_the_collection_is_left_out():
    assert {path.stem for path in PAPER.glob("*.csv")} == set(STANDARD) | set(OTHERS)
    assert {cell.table for cell in all_cells()} == set(STANDARD.values()) | {table for table, *_ in OTHERS.values()}


@here
@pytest.mark.parametrize("stem", STANDARD)
def test_score_tables_equal_their_source(stem):
    wanted = [(row["version"], row["training_data"], row["base_model"], row["size"], row["benchmark"], row["setting"], row["value"], row["status"], row["source"] or "none") for row in source_rows(stem)]
    found = [(cell.version, cell.row, cell.base_model, cell.size, cell.benchmark, cell.setting, cell.value, cell.status, cell.source) for cell in ours(STANDARD[stem])]
    assert found == wanted and wanted


def expected_status(row, state, column, value):
    "The status that the collection's own words give a cell, or None where it has no column for it."
    if not value or value == "not seen printed":
        return "missing"
    if column == "v2_minus_v1" or row.get("confidence") == "derived":
        return "derived"
    if not state:
        return None
    return next(status for status in STATUSES if row[state].startswith(status))


@here
@pytest.mark.parametrize("stem", OTHERS)
def test_other_files_equal_their_source(stem):
    table, names, columns, state = OTHERS[stem]
    cells, checked = ours(table), 0
    rows = source_rows(stem)
    assert len(cells) == len(rows) * len(columns)
    for cell, (row, column) in zip(cells, [(row, column) for row in rows for column in columns]):
        value = row[column]
        assert cell.value == ("" if value == "not seen printed" else value), (row, column)
        for part in names:
            assert row[part] in cell.row, (cell, part)
        if "size" in row:
            assert cell.size == row["size"] and cell.benchmark == row["benchmark"] and cell.setting == row["setting"]
        if "base" in row:
            assert cell.base_model == row["base"] and row["model"] in cell.note
        if "version" in row:
            assert cell.version == row["version"]
        if "size" not in row and column not in ONE_VALUE:
            assert cell.benchmark == column
        status = expected_status(row, state, column, value)
        assert status is None or cell.status == status, (cell, status)
        source = row.get("source") or row.get("source_printed" if column == "pct_printed_in_v2" else "source_recomputed")
        if source and cell.value:
            assert cell.source == source.replace(" (docs corpus)", ""), cell
        checked += 1
    assert checked == len(cells) > 0


def test_every_cell_has_a_status_and_a_source():
    assert len(all_cells()) > 900
    assert all(cell.status in STATUSES and cell.source for cell in all_cells())


def test_printed_averages_recompute():
    rows = [row for table in ("table3", "table4", "table5") for row in recomputed_averages(table)]
    assert sum(row["table"] == "table3" for row in rows) == 14 and len(rows) >= 26
    assert all(abs(row["difference"]) <= 0.0501 for row in rows), rows


def test_model_card_averages_recompute():
    "The June cards average a benchmark's two settings first."
    cards, checked = {}, 0
    for cell in ours("model_cards"):
        if cell.version.startswith("v1"):
            cards.setdefault(cell.note.split(";")[0], []).append(cell)
    for cells in cards.values():
        printed = [cell for cell in cells if cell.benchmark == "Average"][0]
        groups = {}
        for cell in cells:
            if cell.benchmark != "Average":
                groups.setdefault(cell.benchmark, []).append(cell.number)
        if printed.value and None not in [value for values in groups.values() for value in values]:
            mean = sum(sum(values) / len(values) for values in groups.values()) / len(groups)
            assert mean == pytest.approx(printed.number, abs=0.0501), printed
            checked += 1
    assert checked >= 9


def test_conflicts_are_the_difference_of_their_cells():
    cells = {(cell.row, cell.benchmark, cell.version): cell for cell in ours("conflicts")}
    checked = 0
    for (row, benchmark, version), cell in cells.items():
        if version == "v2 - v1" and cell.value:
            assert cell.number == pytest.approx(cells[row, benchmark, "v2"].number - cells[row, benchmark, "v1 card"].number, abs=0.051)
            checked += 1
    assert checked > 20


def test_rows_and_columns_lead_to_cells_and_to_the_registries():
    known = {**datasets(), **mixes()}
    assert [row.key for row in table_rows()][0] == "vanilla"
    for row in table_rows()[1:]:
        assert known[row.key].name == row.label
        assert published("table1", row.table1, "n_instances").number > 10_000
        for column in table_columns():
            assert published("table3", row.table3, column.published, column.published_setting).testable


def test_the_sources_have_a_key():
    with (FOLDER / "_sources.csv").open(newline="", encoding="utf-8") as file:
        keys = {row["key"] for row in csv.DictReader(file)}
    import re
    used = {key for cell in all_cells() for key in re.findall(r"\bS\d+\b", cell.source)}
    assert used <= keys


def test_all_problems_are_reported_together(tmp_path):
    head = ",".join(FIELDS)
    (tmp_path / "table8.csv").write_text(f"{head}\ntable8,v2,A,,,GSM,,x,%,seen,S1,\ntable8,v2,A,,,GSM,,1,%,sure,S1,\ntable7,v2,B,,,GSM,,1,%,missing,,\n")
    (tmp_path / "table9.csv").write_text("a,b\n1,2\n")
    (tmp_path / "table10.csv").write_text(f"{head}\ntable10,v2,A\n")
    with pytest.raises(PublishedError) as error:
        read_folder(tmp_path)
    for words in ("line 2: found 'x'", "line 3: found status 'sure'", "line 3: found the cell of line 2 again", "line 4: found table 'table7'", "expected none", "found no source", "table9.csv: found columns", "another number of columns"):
        assert words in str(error.value), words
    with pytest.raises(PublishedError, match="found no table"):
        read_folder(tmp_path / "nowhere")
