"Tables as raw files, the hub's ready-made mixture, and its reconciliation with Table 1."
import csv
import gzip
import json

import pandas as pd
import pytest

from tulu_study.core.files import read_jsonl, write_jsonl
from tulu_study.core.params import Dataset, datasets, mixes, params_dir
from tulu_study.data.conversion import Raw, convert
from tulu_study.data.reading import BadRecord, text_of
from tulu_study.data.tabular import read_csv, read_parquet, table_items
from tulu_study.data.tulu_v1 import folder_counts, mixture_counts, paper_counts, reconcile, split_mixture

FAULTS = {"wrong_cells, too many": (b"a,b,c\n", "wrong_cells"), "wrong_cells, too few": (b"a\n", "wrong_cells"), "encoding": ("é,x\n".encode("latin-1"), "invalid_utf8"),
          "open quote": (b'"never closed,x\n', "malformed_csv"), "letters after a quote": (b'"a"b,x\n', "malformed_csv")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_csv_row_is_a_reason_and_not_an_error(tmp_path, fault):
    content, reason = FAULTS[fault]
    (tmp_path / "t.csv").write_bytes(b"q,a\n1,2\n" + content)
    found = list(read_csv(tmp_path / "t.csv"))
    assert [(r.row, r.reason) for r in found] == [(1, ""), (2, reason)] and found[0].value == {"q": "1", "a": "2"} and found[1].detail


@pytest.mark.parametrize("content, rows", [(b"", 0), (b"q,a\n", 0), (b"\xef\xbb\xbfq,a\n1,2\n", 1), (b"q,a\r\n1,2\r\n", 1), (b'q,a\n"x\ny","say ""hi"""\n', 1), (b"q,a\n" + b"x" * 300_000 + b",2\n", 1), (b"\x00\x01\x02", 0)])
def test_csv_files_of_every_sort_are_read(tmp_path, content, rows):
    (tmp_path / "t.csv").write_bytes(content)
    limit = csv.field_size_limit()
    assert len([r for r in read_csv(tmp_path / "t.csv") if not r.reason]) == rows
    assert csv.field_size_limit() == limit or csv.field_size_limit() > 300_000
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(content))
    assert len([r for r in read_csv(tmp_path / "t.csv.gz") if not r.reason]) == rows


@pytest.mark.parametrize("head, reason", [(b"q,a,q", "bad_header"), (b"", "bad_header"), (b'"q"x,a', "malformed_csv"), (b'"q,a', "malformed_csv")])
def test_a_faulty_header_is_one_reason_and_no_row_is_taken_for_another(tmp_path, head, reason):
    (tmp_path / "t.csv").write_bytes(head + b"\n1,2,3\n4,5,6\n")
    [found] = read_csv(tmp_path / "t.csv")
    assert (found.row, found.reason, found.value) == (1, reason, None) and found.detail


def test_a_torn_gzip_csv_ends_with_a_reason(tmp_path):
    packed = gzip.compress(b"q,a\n" + b"1,2\n" * 5000)
    (tmp_path / "t.csv.gz").write_bytes(packed[: len(packed) // 2])
    *good, last = read_csv(tmp_path / "t.csv.gz")
    assert last.reason == "damaged_gzip" and not any(r.reason for r in good)


def test_parquet_is_read_in_batches_with_rows_counted_on(tmp_path):
    pd.DataFrame({"n": range(25)}).to_parquet(tmp_path / "t.parquet", row_group_size=10)
    assert [(r.row, r.value["n"]) for r in read_parquet(tmp_path / "t.parquet", batch=4)] == [(i + 1, i) for i in range(25)]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"{}", b"PAR1" + b"\x00" * 100 + b"PAR1"])
def test_what_is_no_parquet_is_one_reason(tmp_path, content):
    (tmp_path / "t.parquet").write_bytes(content)
    [found] = read_parquet(tmp_path / "t.parquet")
    assert (found.row, found.reason) == (1, "damaged_parquet")


def test_table_items_account_for_every_row_whatever_read_does(tmp_path):
    (tmp_path / "t.csv").write_text("q\ngood\nbad\nworse\n\"cut\n")
    def read(row):
        if row["q"] == "bad": raise BadRecord("not_wanted", "found bad")
        return {"good": text_of(row, "q")}[row["q"]]
    raw = Raw(Dataset(key="t", name="T", folder="t", authors="x", licence="y"), {"t.csv": tmp_path / "t.csv"})
    assert list(table_items(raw, "t.csv", read)) == ["good"]
    assert (raw.n_in, raw.n_records) == (4, 1) and [(r["row"], r["reason"]) for r in raw.rejects] == [(2, "not_wanted"), (3, "unreadable"), (4, "malformed_csv")]
    json.dumps(raw.rejects)


@pytest.fixture
def mixture(tmp_path):
    "Three Parquet files in the layout of the hub's, 30 rows of two datasets, interleaved; the folder."
    (tmp_path / "hub/data").mkdir(parents=True)
    rows = [{"dataset": part, "id": f"{part}_{i}", "messages": [{"role": "user", "content": f" é {i} "}, {"role": "assistant", "content": "ok"}]} for i in range(15) for part in ("dolly", "sharegpt")]
    for number, file in enumerate(datasets()["tulu_v1"].files): pd.DataFrame(rows[number::3]).to_parquet(tmp_path / "hub" / file.name)
    return tmp_path, rows


def test_the_mixture_converts_with_its_ids_and_texts_unchanged(mixture):
    folder, rows = mixture
    report = convert("tulu_v1", folder / "hub", folder)
    made = list(read_jsonl(folder / "tulu_v1/tulu_v1_data.jsonl"))
    assert {r["id"]: r["messages"] for r in made} == {f"tulu_v1_{r['id']}": r["messages"] for r in rows} and {r["dataset"] for r in made} == {"tulu_v1"}
    assert (report.n_in, report.n_rejected, report.n_out, report.expected) == (30, 0, 30, None)


def test_the_mixture_is_taken_apart_into_files_like_converted_ones(mixture):
    folder, rows = mixture
    reports = split_mixture(folder / "hub", folder / "parts")
    for part in ("dolly", "sharegpt"):
        made = list(read_jsonl(folder / "parts" / part / f"{part}_data.jsonl"))
        assert sorted(r["id"] for r in made) == sorted(r["id"] for r in rows if r["dataset"] == part) and list(made[0]) == ["dataset", "id", "messages"]
        assert b"\xc3" not in (folder / "parts" / part / f"{part}_data.jsonl").read_bytes(), "escaped like every conversation file"
        assert json.loads((folder / "parts" / part / "report.json").read_text())["n_out"] == reports[part].n_out == 15
    assert folder_counts(folder / "parts") == {"dolly": 15, "sharegpt": 15}
    assert not list((folder / "parts").rglob("*.part")) and (folder / "parts/tulu_v1_rejects.jsonl").read_text() == ""


@pytest.mark.parametrize("bad, reason", [({"messages": None}, "wrong_type"), ({"messages": [{"role": "gpt", "content": "x"}]}, "bad_message"), ({"messages": [{"role": "user", "content": None}]}, "bad_message"), ({"dataset": None}, "wrong_type")])
def test_rows_that_are_no_rows_of_a_mixture_are_rejected(mixture, bad, reason):
    folder, rows = mixture
    pd.DataFrame([{**rows[0], **bad}, rows[3]]).to_parquet(folder / "hub" / datasets()["tulu_v1"].files[0].name)
    report = convert("tulu_v1", folder / "hub", folder)
    assert report.reasons == {reason: 1} and report.n_out == 21


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/b", "", ".", "x" * 200])
def test_a_part_that_would_leave_its_folder_is_rejected(mixture, name):
    folder, rows = mixture
    pd.DataFrame([{**rows[0], "dataset": name}, rows[3]]).to_parquet(folder / "hub" / datasets()["tulu_v1"].files[0].name)
    assert sum(report.n_out for report in split_mixture(folder / "hub", folder / "parts").values()) == 21
    assert [reject["reason"] for reject in read_jsonl(folder / "parts/tulu_v1_rejects.jsonl")] == ["bad_name"]
    assert not list(folder.glob("outside")) and {path.name for path in (folder / "parts").iterdir()} == {"dolly", "sharegpt", "tulu_v1_rejects.jsonl"}


def test_the_numbers_of_the_reconciliation_are_the_published_ones():
    with open(params_dir() / "published" / "table1.csv", encoding="utf-8") as file:
        printed = {row["row"]: int(row["value"]) for row in csv.DictReader(file) if row["benchmark"] == "n_instances"}
    released = next(n for name, n in printed.items() if name.startswith("released allenai/tulu-v1"))
    for part, n in paper_counts().items(): assert printed[datasets()[part].name] == n
    assert datasets()["tulu_v1"].stated == released == sum(mixture_counts().values()) == 489_818
    assert sum(paper_counts().values()) == 490_694 and mixture_counts()["oasst1"] == 33_919 and list(paper_counts()) == mixes()["tulu_mix"].parts


def test_reconciliation_names_what_differs_and_explains_only_what_it_can():
    rows = {row["part"] or "sum": row for row in reconcile(mixture_counts(), names=("mixture", "paper"))}
    assert [part for part, row in rows.items() if row["difference"]] == ["oasst1", "sum"] and rows["oasst1"]["difference"] == rows["sum"]["difference"] == -876
    assert "reply trees" in rows["oasst1"]["why"] and rows["sum"]["mixture"] == 489_818
    other = {row["part"]: row["why"] for row in reconcile({"oasst1": 100, "dolly": 7, "mine": 3}, {"oasst1": 90, "dolly": 7, "cot": 1})}
    assert other["oasst1"].startswith("not explained") and other["dolly"] == "" and other["mine"] == "not in expected" and other["cot"] == "not in found"
