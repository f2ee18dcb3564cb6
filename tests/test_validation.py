"""Bad raw files of every kind: collected, reported together, never a traceback and never silent; and the same result on any number of cores, in bounded memory."""
import gzip, json, random, subprocess, sys, tarfile

import pytest

from tulu_study.core.cells import CellError, run_cell
from tulu_study.core.files import read_jsonl
from tulu_study.core.params import Dataset, SourceFile
from tulu_study.data import DatasetError, convert, converter
from tulu_study.data import conversion, reading, streams
from tulu_study.data.conversion import CONVERTERS
from tulu_study.data.reading import read_items, read_lines
from tulu_study.data.streams import json_line
from tulu_study.data.validation import Tally, add_tallies, contamination, overlap_markdown, overlap_rows, summary_of, validation_table


def alpaca(n, **more):
    return {"instruction": f"Count to {n}. é", "input": "}, {" if n % 7 == 0 else "", "output": f"{n} " * (n % 40), **more}


def lay(root, key, name, data):
    path = root / "sources" / key / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return root / "sources"


def outputs(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


DOLLY = "databricks-dolly-15k.jsonl"


def dolly(n):
    return {"instruction": f"Name river {n}.", "context": "", "response": f"River {n}", "category": "qa"}


def test_all_faults_of_a_file_are_reported_together(tmp_path):
    huge = b'{"instruction": "' + b"x" * (50 << 20) + b'", "context": "", "response": "y"}'
    rows = [dolly(1), b'{"cut o', {"instruction": 3, "context": "", "response": ""}, {"instruction": "x"}, b'{"a": "\xff"}', huge, dolly(2)]
    report = convert("dolly", lay(tmp_path, "dolly", DOLLY, lines(rows)), tmp_path)
    assert (report.n_in, report.n_records, report.n_rejected, report.n_out) == (7, 2, 5, 2)
    assert report.reasons == {"malformed_json": 1, "wrong_type": 1, "missing_key": 1, "invalid_utf8": 1, "too_large": 1}
    rejects = list(read_jsonl(tmp_path / "dolly" / "rejects.jsonl"))
    assert [row["row"] for row in rejects] == [2, 3, 4, 5, 6] and all(len(row["raw"]) <= 500 for row in rejects)
    assert "52,428" in rejects[-1]["detail"] and sum(report.reasons.values()) == report.n_rejected


def test_a_huge_line_at_the_end_without_a_line_end(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"[" * (33 << 20))
    assert [(row.row, row.reason) for row in read_lines(path)] == [(1, ""), (2, "too_large")]


def test_a_truncated_gzip_of_lines_and_of_a_list(tmp_path):
    rng = random.Random(1)
    rows = [alpaca(n, noise=rng.random()) for n in range(3000)]
    for name, data, read in (("a.jsonl", lines(rows), read_lines), ("a.json", json.dumps(rows).encode(), read_items)):
        packed = gzip.compress(data)
        (tmp_path / name).write_bytes(packed[: len(packed) // 2])
        *good, last = read(tmp_path / name)
        assert last.reason == "damaged_gzip" and last.row == len(good) + 1 and 500 < len(good) < 2999
        assert [row.value for row in good] == rows[: len(good)]


def test_a_list_is_read_up_to_the_damage(tmp_path):
    path, rows = tmp_path / "a.json", [alpaca(n) for n in range(20_000)]
    text = json.dumps(rows, indent=4, ensure_ascii=False)
    path.write_text(text)
    assert [row.value for row in read_items(path)] == rows
    place = text.index('"Count to 12345.')
    data, at = text.encode(), len(text[: place + 5].encode())
    path.write_bytes(data[:at] + b'" "' + data[at:])
    *good, last = read_items(path)
    assert (last.reason, last.row, last.final, len(good)) == ("malformed_json", 12346, True, 12345)
    path.write_bytes(data[:at] + b"\xff" + data[at:])
    found = list(read_items(path))
    assert [(row.row, row.reason, row.final) for row in found if row.reason] == [(12346, "invalid_utf8", False)] and r"\xff" in found[12345].raw
    assert [row.value for row in found if not row.reason] == rows[:12345] + rows[12346:]
    path.write_text(text[:-2000])
    *good, last = read_items(path)
    assert last.reason == "malformed_json" and 19_900 < len(good) < 20_000 and "nothing after it can be read" in last.detail


def test_an_item_without_end_is_too_large_and_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "RECORD_SIZE", 3 << 20)
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": "' + "x" * (12 << 20) + '"}]')
    found = list(read_items(path))
    assert [(row.row, row.reason) for row in found] == [(1, ""), (2, "too_large")] and len(found[1].raw) <= 500


def test_the_text_of_a_rejected_list_item_is_its_own_and_not_its_neighbours(tmp_path, monkeypatch):
    rows = [{"instruction": "x" * n, "output": None} for n in (1, 40, 700)] * 30
    source = lay(tmp_path, "stanford_alpaca", "alpaca_data.json", json.dumps(rows).encode())
    for workers in (1, 2):
        convert("stanford_alpaca", source, tmp_path / "out", workers=workers)
        found = [row["raw"] for row in read_jsonl(tmp_path / "out" / "stanford_alpaca" / "rejects.jsonl")]
        assert found == [json.dumps(row)[:500] for row in rows]
        monkeypatch.setattr(streams.blocks_of, "__defaults__", (1000,))


def test_roles_that_do_not_alternate_are_counted_and_named(tmp_path):
    talks = [["user", "assistant"], ["user", "user", "assistant"], ["assistant", "user"], ["user"], ["user", "assistant"] * 2]
    record = Dataset(key="talks", name="Talks", folder="talks", files=[SourceFile(name="t.jsonl")], licence="CC0", authors="this test")

    @converter("talks")
    def convert_talks(raw, rng, protocol):
        for i, roles in enumerate(raw.items("t.jsonl", list)):
            yield i, [{"role": role, "content": "hi"} for role in roles]

    try:
        report = convert(record, lay(tmp_path, "talks", "t.jsonl", lines(talks)), tmp_path)
    finally:
        del CONVERTERS["talks"]
    assert report.unsound["n"] == report.validation["not_alternating"] == 3
    assert report.unsound["first"][0].startswith("talks_1: message 1: found user, expected assistant")
    assert report.validation["chains"] == {"user user assistant": 1, "assistant user": 1, "user": 1} and report.turns["mean"] == 1.0


def test_the_report_counts_repeats_empty_messages_scripts_and_languages(tmp_path):
    rows = [dolly(1), dolly(1), {**dolly(2), "response": " "}, {**dolly(3), "response": "Волга", "lang": "ru"}]
    report = convert("dolly", lay(tmp_path, "dolly", DOLLY, lines(rows)), tmp_path)
    found = report.validation
    assert found["empty_messages"] == 1 and found["messages"] == 8 and found["duplicate_messages"] >= 1 and found["languages"] == {"ru": 1}
    assert found["scripts"] == {"Latin": 6, "no letters": 1, "Cyrillic": 1}
    assert json.loads((tmp_path / "dolly" / "report.json").read_text())["validation"] == found


def test_overlap_with_a_benchmark_is_found_and_the_absent_ones_are_named(tmp_path):
    question = "A farmer with nine brown hens sells two of the hens and buys five white ones, how many hens now"
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    (tmp_path / "mmlu" / "test" / "farm_test.csv").write_text(f'"{question}",1,2,3,4,A\n"Something else altogether that nobody ever asked before in any of the files",1,2,3,4,B\n')
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "12"}]} for text in (f"Q: {question.upper()}!", "Name a river.")]
    found = contamination(rows, tmp_path)
    assert found["compared"]["mmlu"] == {"conversations": 1, "examples": 1, "examples_mostly": 1, "examples_in_all": 2}
    assert "gsm" in found["not_compared"] and "8-gram" in found["method"]
    assert overlap_rows({"mine": found}) == [{"dataset": "mine", "benchmark": "mmlu", "conversations": 1, "examples": 1, "examples_mostly": 1, "examples_in_all": 2, "method": found["method"]}]
    page = overlap_markdown({"mine": found, "other": contamination([], tmp_path)}, "example")
    assert "| **mine** | 1 mostly, 1 touched<br>in 1 conversations |" in page and "| **other** | – |" in page and "gsm" in page.split("not in the sources: ")[1]
    assert "No benchmark's files are in the sources." in overlap_markdown({"mine": contamination(rows, tmp_path / "nowhere")}, "example")


QUESTION = "A farmer with nine brown hens sells two of the hens and buys five white ones, how many hens now"
HIT = {"conversations": 1, "examples": 1, "examples_mostly": 1}


def searched(root):
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "12"}, "no message"]} for text in (f"Q: {QUESTION.upper()}!", "Name a river.")]
    return contamination(rows, root)


def put(root, name, data):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


SOUND, OTHER = json.dumps({"question": QUESTION}).encode(), json.dumps({"question": "Something else altogether that nobody ever asked before in any of the files"}).encode()


@pytest.mark.parametrize("data, unread", [
    (SOUND + b"\n\n" + OTHER + b"\n", {"empty_line": 1}), (b"\xef\xbb\xbf" + SOUND + b"\n" + OTHER, {}), (SOUND + b"\n" + OTHER[:-9], {"malformed_json": 1}),
    (SOUND + b"\n" + b"[" * 100_000 + b"\n", {"nested_too_deep": 1}), (SOUND + b"\n" + b"[" * 800 + b'"a"' + b"]" * 800, {}), (SOUND + b'\n{"a": "\xff"}\n', {"invalid_utf8": 1}),
    (gzip.compress(SOUND + b"\n" + b"".join(str(random.Random(n).random()).encode() + b"\n" for n in range(20_000)))[:50_000], {"damaged_gzip": 1}),
], ids=["blank line", "byte order mark", "torn", "too deep", "deep", "bytes", "torn gzip"])
def test_a_faulty_benchmark_file_is_read_as_far_as_it_goes(data, unread, tmp_path):
    put(tmp_path, "gsm8k/test.jsonl", data)
    found = searched(tmp_path)
    assert HIT.items() <= found["compared"]["gsm"].items() and found["unread"] == ({"gsm": unread} if unread else {})
    shown = overlap_markdown({"mine": found}, "example")
    assert all(f"Rows of benchmark files that could not be read: gsm: {reason} {n}" in shown for reason, n in unread.items())


def test_an_empty_benchmark_file_and_huge_or_broken_cells(tmp_path):
    put(tmp_path, "gsm8k/test.jsonl", b"")
    put(tmp_path, "mmlu/test/farm_test.csv", f'"{QUESTION}",1\n"{"x " * 200_000}",2\n"open,3\n'.encode())
    put(tmp_path, "mgsm/mgsm_en.tsv", f'{QUESTION}\t1\n"An open quote is a letter here as in the publisher own files, you know\t2\n'.encode())
    found = searched(tmp_path)
    assert found["unread"] == {"gsm": {"empty_file": 1}, "mmlu": {"malformed_csv": 1}} and "gsm" in found["not_compared"]
    assert HIT.items() <= found["compared"]["mmlu"].items() and found["compared"]["mgsm"]["examples_in_all"] == 2


@pytest.mark.parametrize("unpacked", [False, True])
def test_mmlu_is_compared_from_its_archive_and_from_what_was_unpacked(unpacked, tmp_path):
    for name in ("data/test/farm_test.csv", "data/dev/farm_dev.csv", "data/auxiliary_train/x_test.csv"):
        put(tmp_path / "there", name, f'"{QUESTION if "_test" in name else "none"}",1,2,3,4,A\n'.encode())
    (tmp_path / "mmlu").mkdir()
    with tarfile.open(tmp_path / "mmlu" / "data.tar", "w") as archive:
        archive.add(tmp_path / "there" / "data" / "dev" if unpacked else tmp_path / "there" / "data", "data/dev" if unpacked else "data")
    if unpacked:   # an archive without test files, and these beside it
        put(tmp_path, "mmlu/test/farm_test.csv", f'"{QUESTION}",1,2,3,4,A\n'.encode())
    assert searched(tmp_path)["compared"]["mmlu"] == HIT | {"examples_in_all": 1}
    put(tmp_path, "mmlu/data.tar", (tmp_path / "mmlu" / "data.tar").read_bytes()[:700])
    found = searched(tmp_path)
    assert found["unread"]["mmlu"] and ("mmlu" in found["compared"]) == unpacked


def test_judges_training_files_are_no_questions_and_prompts_are_read_by_line(tmp_path):
    put(tmp_path, "truthfulqa/TruthfulQA.csv", b"Type,Category,Question\na,b,Why is the sky blue in the morning and so red in the evening?\n")
    put(tmp_path, "truthfulqa/finetune_truth.jsonl", SOUND)
    put(tmp_path, "toxigen/annotated.json", b"[" + SOUND + b"]")
    assert searched(tmp_path)["compared"]["truthfulqa"]["examples"] == 0 and "toxigen" in searched(tmp_path)["not_compared"]
    put(tmp_path, "toxigen/hate_women_1k.txt", f"- {QUESTION}\n\n- and another line\n".encode())
    assert searched(tmp_path)["compared"]["toxigen"] == HIT | {"examples_in_all": 2}


def test_ids_that_occur_twice_are_counted(tmp_path):
    tallies = Tally(), Tally()
    for tally in tallies:
        tally.add([("a", [{"role": "user", "content": "hi"}]), ("b", []), ("b", [{"role": "user", "content": None}])])
    assert summary_of(tallies[0])["duplicate_ids"] == 1 and summary_of(add_tallies(*tallies))["duplicate_ids"] == 4
    assert "whose id an earlier one has | 4" in validation_table(summary_of(tallies[0])).data


def test_the_threshold_fails_the_cell_after_everything_is_written(tmp_path):
    source = lay(tmp_path, "dolly", DOLLY, lines([dolly(1), b"{", b'{"a": "\xff"}', dolly(2)]))
    with pytest.raises(CellError, match="2 of 4 raw records rejected.*malformed_json 1, invalid_utf8 1"):
        run_cell("convert", {"dataset": "dolly", "source_root": str(source), "max_rejected": 0.2}, tmp_path / "out" / "dolly")
    assert {"dolly_data.jsonl", "rejects.jsonl", "report.json"} <= {path.name for path in (tmp_path / "out" / "dolly").iterdir()}
    report = json.loads((tmp_path / "out" / "dolly" / "report.json").read_text())
    assert report["n_in"] == report["n_records"] + report["n_rejected"] == 4 and report["validation"]["messages"] == 4


@pytest.mark.parametrize("protocol", ["paper", "fixed"])
@pytest.mark.parametrize("faults", [False, True])
@pytest.mark.parametrize("kind", ["list", "compact list", "lines"])
def test_any_number_of_workers_gives_the_same_bytes(kind, faults, protocol, tmp_path, monkeypatch):
    rows = [alpaca(n) for n in range(3000)]
    if faults:
        for n in (0, 5, 1700, 2999):
            rows[n] = {"instruction": "x", "output": None}
    key, name = ("dolly", DOLLY) if kind == "lines" else ("stanford_alpaca", "alpaca_data.json")
    if kind == "lines":
        data = lines([{"instruction": row["instruction"], "context": row.get("input", ""), "response": row["output"]} for row in rows] + ([b"{", b"\xff"] if faults else []))
    else:
        data = json.dumps(rows, **({"indent": 4} if kind == "list" else {"separators": (",", ":")})).encode()
    source = lay(tmp_path, key, name, data)
    monkeypatch.setattr(streams, "BLOCK", 20_000)
    monkeypatch.setattr(streams.blocks_of, "__defaults__", (20_000,))
    made = {workers: (convert(key, source, tmp_path / str(workers), protocol, workers=workers), outputs(tmp_path / str(workers) / key)) for workers in (1, 2, 3)}
    assert made[1][1] == made[2][1] == made[3][1] and set(made[1][1]) == {f"{key}_data.jsonl", "rejects.jsonl", "report.json"}
    assert made[1][0].n_rejected == (4 + 2 * (kind == "lines") if faults else 0) and made[2][0] == made[1][0]


def test_a_damaged_list_falls_back_to_one_piece(tmp_path, monkeypatch):
    data = json.dumps([alpaca(n) for n in range(2000)]).encode()
    source = lay(tmp_path, "stanford_alpaca", "alpaca_data.json", data[:100_000])
    monkeypatch.setattr(streams.blocks_of, "__defaults__", (20_000,))
    made = [(convert("stanford_alpaca", source, tmp_path / str(workers), workers=workers), outputs(tmp_path / str(workers) / "stanford_alpaca")) for workers in (1, 2)]
    assert made[0] == made[1] and made[0][0].reasons == {"malformed_json": 1}


def test_a_false_promise_is_an_error(tmp_path, monkeypatch):
    whole = CONVERTERS["dolly"] if "dolly" in CONVERTERS else None
    source = lay(tmp_path, "dolly", DOLLY, lines([dolly(n) for n in range(500)]))
    monkeypatch.setattr(streams.blocks_of, "__defaults__", (5_000,))

    @converter("dolly", draws=2)
    def draws_once(raw, rng, protocol):
        for i, _ in enumerate(raw.items(DOLLY, str)):
            yield i, [{"role": "user", "content": str(rng.random())}, {"role": "assistant", "content": "x"}]

    try:
        with pytest.raises(DatasetError, match="promises draws=2"):
            convert("dolly", source, tmp_path, workers=2)
    finally:
        CONVERTERS["dolly"] = whole
        if whole is None:
            del CONVERTERS["dolly"]
    assert not (tmp_path / "dolly").exists() or not list((tmp_path / "dolly").iterdir())


@pytest.fixture
def register(monkeypatch):
    "Registers converters for one test only."
    monkeypatch.setattr(conversion, "CONVERTERS", dict(CONVERTERS))
    return converter


LETTERS = Dataset(key="letters", name="Letters", folder="letters", files=[SourceFile(name="a.jsonl"), SourceFile(name="b.json")], licence="CC0", authors="this test")


def test_records_with_names_of_their_own_come_from_several_files_in_any_number(register, tmp_path, monkeypatch):
    @register("letters", draws=0)
    def convert_letters(raw, rng, protocol):
        def read(row):
            if row["n"] % 11 == 5:
                raw.lose("odd", "lost while it is read")
            return row["id"], range(row["n"] % 4)
        for file in raw.files:
            for name, numbers in raw.items(file, read):
                if name.endswith("9"):
                    raw.lose("nine", "lost while it is laid out")
                for number in numbers:
                    yield f"{name}_{number}", [{"role": "user", "content": name * number}, {"role": "assistant", "content": "x"}]

    rows = [{"id": f"é{n}", "n": n, "more": [{"id": "}, {"}, {"id": 2}], **({"lang": "en" if n % 2 else "is"} if n > 700 else {})} for n in range(900)]
    rows[8] = rows[600] = {"id": "no number"}
    source = lay(tmp_path, "letters", "a.jsonl", lines([*rows, b"{"]))
    lay(tmp_path, "letters", "b.json", json.dumps(rows[:500], separators=(",", ": ")).encode())
    monkeypatch.setattr(streams.blocks_of, "__defaults__", (3000,))
    made = {workers: (convert(LETTERS, source, tmp_path / str(workers), workers=workers), outputs(tmp_path / str(workers) / "letters")) for workers in (1, 2, 3)}
    assert made[1] == made[2] == made[3] and set(made[1][1]) == {"letters_data.jsonl", "rejects.jsonl", "lost.jsonl", "report.json"}
    report = made[3][0]
    assert (report.n_in, report.n_rejected, report.validation["languages"]) == (1401, 4, {"en": 100, "is": 99})
    lost = [(row["file"], row["row"]) for row in read_jsonl(tmp_path / "3" / "letters" / "lost.jsonl") if row["reason"] == "nine"]
    assert lost == [(file, n + 1) for file, size in (("a.jsonl", 900), ("b.json", 500)) for n in range(9, size, 10)]


@pytest.mark.parametrize("draw, name", [(True, "text"), (False, 3)])
def test_a_false_promise_of_no_draws_is_an_error(draw, name, register, tmp_path):
    @register("letters", draws=0)
    def convert_letters(raw, rng, protocol):
        for _ in raw.items("a.jsonl", str):
            draw and rng.random()
            yield name, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]

    source = lay(tmp_path, "letters", "a.jsonl", lines([dolly(1)]))
    with pytest.raises(DatasetError, match="promises draws=0 and a text for each"):
        convert(LETTERS.model_copy(update={"files": LETTERS.files[:1]}), source, tmp_path, workers=2)


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": "é\u2028\ud83d\ude00\"\\\n"}], [{"content": "b", "role": "user"}], [{"role": "bot", "content": "x"}],
                                      [{"role": "user", "content": None}], [{"role": "user", "content": "x", "weight": 1}], [{"role": "system", "content": ""}, {"role": "assistant", "content": "\x00"}]])
def test_a_line_is_what_json_would_write(messages):
    assert json_line("dolly", "dolly_é", messages) == json.dumps({"dataset": "dolly", "id": "dolly_é", "messages": messages}) + "\n"


def test_a_tally_of_nothing_and_of_nonsense():
    tally = Tally()
    assert summary_of(tally)["messages"] == 0
    tally.add([("a", ["text"]), ("b", [None]), ("c", []), ("d", [{"role": ["x"], "content": 1}])])
    assert tally.n == tally.unsound == 4 and summary_of(tally)["not_alternating"] == 4


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    code = ("import re, sys; from tulu_study.data import convert; convert('dolly', sys.argv[1], sys.argv[2], workers=1); "
            "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])")   # ru_maxrss would hold the parent's size
    peaks = []
    for times in (1, 10):
        source = lay(tmp_path / str(times), "dolly", DOLLY, lines([{**dolly(n), "context": "word " * 100} for n in range(8000 * times)] + [b"bad"] * 1000 * times))
        done = subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / f"out{times}")], capture_output=True, text=True, env={"TQDM_DISABLE": "1", "PATH": ""})
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.25 * peaks[0], peaks
