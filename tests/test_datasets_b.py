"Alpaca, Code-Alpaca, GPT4-Alpaca and Baize: what raw files may do wrong, and the invented raw files of all twelve datasets."
import gzip
import json

import pytest

from tulu_study.core.files import read_jsonl
from tulu_study.core.params import datasets
from tulu_study.data.baize import AI, HUMAN, rounds_of
from tulu_study.data.conversion import convert
from tulu_study.world.sources import BAIZE, TASKS, write_raw

GOOD = {"instruction": "Name a tree.", "input": "", "output": "Oak."}
TWELVE = "super_ni cot flan_v2 dolly oasst1 self_instruct unnatural_instructions stanford_alpaca code_alpaca gpt4_alpaca baize sharegpt".split()
LISTS = {"stanford_alpaca": "alpaca_data.json", "code_alpaca": "code_alpaca_20k.json", "gpt4_alpaca": "alpaca_gpt4_data.json"}


def converted(key, folder, protocol="paper", **options):
    "Report, conversations and rejects of a conversion of <folder>/raw."
    report = convert(key, folder / "raw", folder / "out", protocol=protocol, **options)
    assert report.n_in == report.n_records + report.n_rejected
    out = folder / "out" / key
    return report, list(read_jsonl(out / f"{key}_data.jsonl")), list(read_jsonl(out / "rejects.jsonl"))


def put(folder, key, name, content):
    path = folder / "raw" / key / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def put_baize(folder, *transcripts):
    for source in BAIZE:
        rows = [{"topic": "t", "input": text} if isinstance(text, str) else text for text in transcripts] if source == "medical" else []
        put(folder, "baize", f"{source}_chat_data.json", rows)


@pytest.mark.parametrize("key", LISTS)
@pytest.mark.parametrize("bad, reason", [
    (None, "not_an_object"), (["Name a tree.", "", "Oak."], "not_an_object"), ({}, "missing_key"), ({"instruction": "a", "output": "b"}, "missing_key"),
    ({**GOOD, "output": None}, "wrong_type"), ({**GOOD, "instruction": None}, "wrong_type"), ({**GOOD, "input": 3}, "wrong_type"), ({**GOOD, "output": "\ud800"}, "invalid_unicode"),
])
def test_a_bad_record_is_named_and_leaves_no_gap(tmp_path, key, bad, reason):
    put(tmp_path, key, LISTS[key], [GOOD, GOOD])
    _, clean, _ = converted(key, tmp_path)
    put(tmp_path, key, LISTS[key], [GOOD, bad, GOOD])
    report, rows, rejects = converted(key, tmp_path)
    assert rows == clean and [row["id"] for row in rows] == [f"{key}_0", f"{key}_1"]
    assert [(r["file"], r["row"], r["reason"]) for r in rejects] == [(LISTS[key], 2, reason)] and report.reasons == {reason: 1}


def test_a_null_input_is_no_input(tmp_path):
    put(tmp_path, "stanford_alpaca", LISTS["stanford_alpaca"], [{**GOOD, "input": empty} for empty in (None, "", " \n")])
    rows = converted("stanford_alpaca", tmp_path)[1]
    assert len(rows) == 3 and not any("nput" in row["messages"][0]["content"] for row in rows)


@pytest.mark.parametrize("content, reason, kept", [
    (b" \n", "empty_file", 0), (b"", "empty_file", 0), (b"\xff\xfe[]", "invalid_utf8", 0), (b'[{"instruction": "Name', "malformed_json", 0),
    (json.dumps([GOOD]).encode()[:-1] + b" {}]", "malformed_json", 1), (gzip.compress(json.dumps([GOOD] * 50).encode(), mtime=0)[:40], "damaged_gzip", 0),
])
def test_a_damaged_file_is_a_reject_and_no_traceback(tmp_path, content, reason, kept):
    put(tmp_path, "code_alpaca", LISTS["code_alpaca"], content)
    report, rows, rejects = converted("code_alpaca", tmp_path)
    assert (report.n_out, [r["reason"] for r in rejects]) == (kept, [reason])


def test_a_bom_a_gzip_and_one_object_are_read(tmp_path):
    for content in (b"\xef\xbb\xbf" + json.dumps([GOOD]).encode(), gzip.compress(json.dumps([GOOD]).encode()), GOOD):
        put(tmp_path, "gpt4_alpaca", LISTS["gpt4_alpaca"], content)
        assert converted("gpt4_alpaca", tmp_path)[0].n_out == 1


def test_the_relatives_of_alpaca_differ_in_name_only(tmp_path):
    made = {}
    for key, name in LISTS.items():
        put(tmp_path, key, name, [{**GOOD, "output": f"Oak {i}."} for i in range(40)])
        made[key] = {protocol: [row["messages"] for row in converted(key, tmp_path, protocol)[1]] for protocol in ("paper", "fixed")}
    assert made["stanford_alpaca"]["paper"] == made["code_alpaca"]["paper"] == made["gpt4_alpaca"]["paper"]
    assert made["stanford_alpaca"]["fixed"] != made["code_alpaca"]["fixed"] != made["gpt4_alpaca"]["fixed"]


@pytest.mark.parametrize("transcript, rounds", [
    ("", []), (HUMAN, []), (AI, []), (f"{AI} a {HUMAN} q", []), (f"{HUMAN} q {AI} a", [("q", "a")]), (f"{HUMAN}{AI}", [("", "")]),
    (f"{HUMAN} lost {HUMAN} q {AI} a {HUMAN} \n", [("q", "a")]), (f"{AI} before {HUMAN} q\n{AI}\na\nb ", [("q", "a\nb")]),
])
def test_rounds_of_a_transcript(transcript, rounds):
    assert rounds_of(transcript) == rounds


@pytest.mark.parametrize("protocol", ["paper", "fixed"])
def test_several_answers_are_rejected_under_both_protocols(tmp_path, protocol):
    put_baize(tmp_path, f"{HUMAN} q {AI} a", f"{HUMAN} q {AI} a {AI} b", f"{HUMAN} r {AI} c")
    _, rows, rejects = converted("baize", tmp_path, protocol)
    assert [row["messages"][0]["content"] for row in rows] == ["q", "r"] and [row["id"] for row in rows] == ["baize_0", "baize_1"]
    assert [(r["file"], r["row"], r["reason"]) for r in rejects] == [("medical_chat_data.json", 2, "several_answers")]
    assert "found 2" in rejects[0]["detail"]


def test_a_transcript_without_a_round_is_kept_empty_by_the_paper_and_rejected_when_fixed(tmp_path):
    put_baize(tmp_path, "no marks", f"{HUMAN} q {AI} a", f"{HUMAN} nobody answers")
    report, rows, rejects = converted("baize", tmp_path, "paper")
    assert [len(row["messages"]) for row in rows] == [0, 2, 0] and not rejects and report.unsound["n"] == 2 and report.lost == {"unanswered": 1}
    report, rows, rejects = converted("baize", tmp_path, "fixed")
    assert [len(row["messages"]) for row in rows] == [2] and [(r["row"], r["reason"]) for r in rejects] == [(1, "no_round"), (3, "no_round")]
    assert report.lost == {} and report.unsound["n"] == 0


@pytest.mark.parametrize("bad, reason", [({"topic": "t"}, "missing_key"), ({"topic": "t", "input": None}, "wrong_type"), ([], "not_an_object")])
def test_a_row_that_is_no_transcript(tmp_path, bad, reason):
    put_baize(tmp_path, bad, f"{HUMAN} q {AI} a")
    report, rows, rejects = converted("baize", tmp_path)
    assert len(rows) == 1 and [(r["row"], r["reason"]) for r in rejects] == [(1, reason)]


def test_a_sample_is_drawn_over_the_four_files_together(tmp_path):
    write_raw("baize", tmp_path / "raw", n=10)
    rows = converted("baize", tmp_path, num_examples=12)[1]
    every = [row["messages"] for row in converted("baize", tmp_path)[1]]
    assert [row["id"] for row in rows] == [f"baize_{i}" for i in range(12)] and all(row["messages"] in every for row in rows)


@pytest.mark.parametrize("key", TWELVE)
def test_every_dataset_has_invented_raw_files(tmp_path, key):
    written = write_raw(key, tmp_path / "one", n=30)
    assert {file.name for file in datasets()[key].files} <= set(written)
    assert all(path == tmp_path / "one" / datasets()[key].folder / name for name, path in written.items())
    again, other = write_raw(key, tmp_path / "two", n=30), write_raw(key, tmp_path / "three", seed=7, n=30)
    assert [p.read_bytes() for p in written.values()] == [p.read_bytes() for p in again.values()] != [p.read_bytes() for p in other.values()]


def test_invented_raw_files_hold_what_converters_must_cope_with(tmp_path):
    listed = write_raw("super_ni", tmp_path)["splits/xlingual/train_tasks.txt"].read_text().split()
    sizes = [len(json.loads((tmp_path / "super_ni" / "tasks" / f"{name}.json").read_text())["Instances"]) for name in listed]
    assert listed == list(TASKS) and max(sizes) > 80 and any(60 < n <= 80 for n in sizes) and any("_mmmlu_" in name for name in listed)
    (unnatural,) = write_raw("unnatural_instructions", tmp_path).values()
    constraints = {instance["constraints"] for row in read_jsonl(unnatural) for instance in row["instances"]}
    assert {"None.", "None", "none."} < constraints
    shared = json.loads(write_raw("sharegpt", tmp_path)["sg_90k_part1_html_cleaned.json"].read_text())
    assert [len(row["conversations"]) % 2 for row in shared[1:5]] == [1, 0, 0, 0]
    assert [row["conversations"][0]["from"] for row in shared[:4]] == ["human", "human", "gpt", "system"] and shared[4]["conversations"] == []
    assert sum(len(m["value"].split()) for m in shared[0]["conversations"]) > 2048


def test_an_unknown_dataset_has_no_invented_files(tmp_path):
    with pytest.raises(ValueError, match="found dataset 'lima', expected one of baize"):
        write_raw("lima", tmp_path)
