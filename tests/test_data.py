"""Conversion under bad input: nothing raises, nothing is lost, nothing half-written stays behind."""
import gzip
import hashlib
import json
import random

import pytest

from tulu_study.core.cells import CellError, run_cell
from tulu_study.core.files import read_jsonl
from tulu_study.core.messages import check_messages
from tulu_study.core.params import Dataset, Mix
from tulu_study.core.sources import SourceError
from tulu_study.data import DatasetError, convert, converter, converters, require_accepted
from tulu_study.data.conversion import CONVERTERS
from tulu_study.data.mixes import mix_datasets

FILES = {"dolly": ["databricks-dolly-15k.jsonl"], "cot": ["cot_zsopt.jsonl", "cot_fsopt.jsonl"], "oasst1": ["2023-04-12_oasst_ready.trees.jsonl.gz"]}


def message(text, role, *replies, **more):
    return {"text": text, "role": role, "deleted": False, "labels": {}, "replies": list(replies), **more}


def good(key, n):
    "One sound raw record."
    if key == "dolly":
        return {"instruction": f"Name river {n}.", "context": "" if n % 2 else f"Rivers of region {n}.", "response": f"River {n}, café", "category": "qa"}
    if key == "cot":
        return {"inputs": f"What is {n} + 1?", "targets": f"It is {n + 1}."}
    return {"message_tree_id": str(n), "prompt": message(f"ask {n}", "prompter", message(f"one {n}", "assistant"), message(f"two {n}", "assistant"))}


def missing(key):
    return {"dolly": {"instruction": "x", "response": "y"}, "cot": {"inputs": "x"}, "oasst1": {"message_tree_id": "t"}}[key]


def mistyped(key):
    return {"dolly": {"instruction": 3, "context": "", "response": "y"}, "cot": {"inputs": "x", "targets": ["y"]},
            "oasst1": {"prompt": message(None, "prompter")}}[key]


BAD = {   # name -> (line for a dataset, reason)
    "malformed": (lambda key: b'{"instruction": "cut o', "malformed_json"),
    "not utf-8": (lambda key: b'{"instruction": "caf\xe9", "inputs": "\xff"}', "invalid_utf8"),
    "empty line": (lambda key: b"", "empty_line"),
    "list": (lambda key: b'["a", "list"]', "not_an_object"),
    "text": (lambda key: b'"a text"', "not_an_object"),
    "null": (lambda key: b"null", "not_an_object"),
    "number": (lambda key: b"7", "not_an_object"),
    "NaN": (lambda key: b"NaN", "not_an_object"),
    "huge number": (lambda key: b"9" * 6000, "malformed_json"),
    "deep": (lambda key: b"[" * 200_000, "nested_too_deep"),
    "missing key": (lambda key: json.dumps(missing(key)).encode(), "missing_key"),
    "wrong type": (lambda key: json.dumps(mistyped(key)).encode(), "wrong_type"),
    "half a surrogate": (lambda key: json.dumps(good(key, 1)).replace("1", "\\ud83d").encode(), "invalid_unicode"),
    "binary": (lambda key: bytes(range(128, 256)), "invalid_utf8"),
}


def lay(root, key, lines, pack=False):
    "Write a dataset's first file, and its other files with three sound records each."
    folder = root / "sources" / key
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(FILES[key]):
        rows = lines if i == 0 else [json.dumps(good(key, n)).encode() for n in range(3)]
        data = b"".join(row + b"\n" for row in rows)
        packed = pack and i == 0 or name.endswith(".gz")
        (folder / name).write_bytes(gzip.compress(data) if packed else data)
    return root / "sources"


def rows_of(out, key, name=None):
    return list(read_jsonl(out / key / (name or f"{key}_data.jsonl")))


@pytest.mark.parametrize("key", FILES)
def test_every_kind_of_bad_row_is_rejected_with_its_place_and_the_rest_is_as_if_it_were_not_there(key, tmp_path):
    sound = [json.dumps(good(key, n)).encode() for n in range(len(BAD) + 1)]
    clean = lay(tmp_path / "clean", key, sound)
    mixed = [line for n, (make, _) in enumerate(BAD.values()) for line in (sound[n], make(key))] + sound[-1:]
    report_clean, report = convert(key, clean, tmp_path / "a"), convert(key, lay(tmp_path / "mixed", key, mixed), tmp_path / "b")
    assert report_clean.n_rejected == 0 and report.n_rejected == len(BAD)
    assert report.n_in == report.n_records + report.n_rejected == report_clean.n_in + len(BAD)
    assert (tmp_path / "a" / key / f"{key}_data.jsonl").read_bytes() == (tmp_path / "b" / key / f"{key}_data.jsonl").read_bytes()
    rejects = rows_of(tmp_path / "b", key, "rejects.jsonl")
    assert [(r["row"], r["reason"]) for r in rejects] == [(2 * n + 2, reason) for n, (_, reason) in enumerate(BAD.values())]
    assert all(list(r) == ["dataset", "file", "row", "reason", "detail", "raw"] and r["dataset"] == key and r["file"] == FILES[key][0] for r in rejects)
    assert all(len(r["raw"]) <= 500 and r["detail"] for r in rejects)
    stored = json.loads((tmp_path / "b" / key / "report.json").read_text())
    assert stored == report.to_dict() and sum(stored["reasons"].values()) == len(BAD)
    assert str(tmp_path) not in (tmp_path / "b" / key / "report.json").read_text()


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize("seed", range(3))
def test_random_damage_never_raises(key, seed, tmp_path):
    rng, out = random.Random(f"{key}-{seed}"), tmp_path / "out"
    for attempt in range(15):
        data = bytearray(b"\n".join(json.dumps(good(key, n)).encode() for n in range(6)))
        for _ in range(rng.randrange(1, 12)):
            place = rng.randrange(len(data))
            data[place:place + rng.choice([0, 1, 5])] = bytes(rng.randrange(256) for _ in range(rng.choice([0, 1, 3])))
        report = convert(key, lay(tmp_path, key, bytes(data).split(b"\n")), out)
        assert report.n_in == report.n_records + report.n_rejected
        assert report.n_out == len(rows_of(out, key)) and report.n_rejected == len(rows_of(out, key, "rejects.jsonl"))


@pytest.mark.parametrize("key", FILES)
def test_a_truncated_gzip_gives_the_rows_before_the_tear(key, tmp_path):
    rng = random.Random(0)
    rows = [json.dumps({**good(key, n), "noise": f"{rng.random()}"}).encode() for n in range(400)]
    source = lay(tmp_path, key, rows, pack=True)
    path = source / key / FILES[key][0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    report = convert(key, source, tmp_path / "out")
    torn = rows_of(tmp_path / "out", key, "rejects.jsonl")[-1]
    assert torn["reason"] == "damaged_gzip" and 50 < torn["row"] < 400 and report.n_out > 50
    assert report.n_in == report.n_records + report.n_rejected


def test_gzip_is_told_by_content_and_not_by_name(tmp_path):
    source = lay(tmp_path, "oasst1", [json.dumps(good("oasst1", 1)).encode()])
    path = source / "oasst1" / FILES["oasst1"][0]
    path.write_bytes(gzip.decompress(path.read_bytes()))
    assert convert("oasst1", source, tmp_path / "a").n_out == 2
    path.rename(path.with_suffix(""))
    assert convert("oasst1", source, tmp_path / "b").n_out == 2


@pytest.mark.parametrize("key", FILES)
def test_root_or_own_folder_and_any_protocol_repeat_to_the_byte(key, tmp_path):
    source = lay(tmp_path, key, [json.dumps(good(key, n)).encode() for n in range(5)])
    for protocol in converters()[key].protocols:
        made = [convert(key, place, tmp_path / name, protocol=protocol) and (tmp_path / name / key / f"{key}_data.jsonl").read_bytes()
                for name, place in (("a", source), ("b", source / key))]
        assert made[0] == made[1] and made[0].isascii()
        for line in made[0].splitlines():
            row = json.loads(line)
            assert list(row) == ["dataset", "id", "messages"] and row["id"].startswith(f"{key}_") and check_messages(row["messages"]) == []


def test_the_fixed_protocol_draws_from_a_stream_of_its_own(tmp_path):
    source = lay(tmp_path, "dolly", [json.dumps(good("dolly", n)).encode() for n in range(30)])
    prompts = {}
    for protocol, seed in (("paper", 42), ("fixed", 42), ("fixed", 43)):
        convert("dolly", source, tmp_path, protocol=protocol, seed=seed)
        prompts[protocol, seed] = [row["messages"][0]["content"] for row in rows_of(tmp_path, "dolly")]
    assert len({tuple(value) for value in prompts.values()}) == 3


def test_cot_options_and_its_guard(tmp_path):
    source = lay(tmp_path, "cot", [json.dumps(good("cot", n)).encode() for n in range(5)])
    n_out = {(z, f, p): convert("cot", source, tmp_path, p, num_zero_shot_examples=z, num_few_shot_examples=f).n_out
             for z, f in ((2, 2), (2, 0), (0, 2), (9, 9)) for p in ("paper", "fixed")}
    assert n_out == {(2, 2, "paper"): 4, (2, 2, "fixed"): 4, (2, 0, "paper"): 0, (2, 0, "fixed"): 2,
                     (0, 2, "paper"): 2, (0, 2, "fixed"): 2, (9, 9, "paper"): 8, (9, 9, "fixed"): 8}


def test_an_unknown_role_rejects_the_tree_and_nothing_else(tmp_path):
    bad = good("oasst1", 2)
    bad["prompt"]["replies"][1]["role"] = "system"
    report = convert("oasst1", lay(tmp_path, "oasst1", [json.dumps(row).encode() for row in (good("oasst1", 1), bad, good("oasst1", 3))]), tmp_path)
    assert report.reasons == {"unknown_role": 1} and report.n_out == 4


def test_a_very_deep_tree_is_a_reject(tmp_path):
    deep = message("end", "assistant")
    for n in range(400):
        deep = message(str(n), "prompter" if n % 2 == 0 else "assistant", deep)
    nested = json.dumps({"prompt": deep})
    report = convert("oasst1", lay(tmp_path, "oasst1", [nested.encode(), json.dumps(good("oasst1", 1)).encode()]), tmp_path)
    assert report.n_in == 2 and report.n_out in (2, 3)   # walked where the interpreter's stack allows it, else rejected


@pytest.mark.parametrize("call, said", [
    (dict(key="doly"), "no dataset 'doly'"),
    (dict(key=Dataset(key="riddles", name="Riddles", folder="riddles", licence="none", authors="nobody")), "converters for .*cot, .*dolly, .*oasst1"),
    (dict(key="dolly", protocol="june2023"), "knows paper, fixed"),
    (dict(key="dolly", top_k_reply=1), "unknown option top_k_reply; its converter has num_examples"),
    (dict(key="dolly", num_examples=99), "at least the 99"),
    (dict(key="dolly", tokenizer="nowhere"), None),
])
def test_wrong_names_say_what_there_is(call, said, tmp_path):
    source = lay(tmp_path, "dolly", [json.dumps(good("dolly", 1)).encode()])
    with pytest.raises((DatasetError, FileNotFoundError), match=said):
        convert(source_root=source, out_dir=tmp_path / "out", **call)
    assert not list((tmp_path / "out").rglob("*.*"))


def test_missing_raw_files_are_an_error_and_leave_nothing(tmp_path, project):
    (tmp_path / "params" / "datasets.yaml").write_text("datasets:\n  dolly: {name: Dolly, folder: dolly, authors: x, licence: y, files: [{name: some.jsonl}]}\nmixes: {}\n")
    with pytest.raises(SourceError, match="some.jsonl"):
        convert("dolly", tmp_path / "sources", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_dies_leaves_the_old_files_whole(tmp_path):
    source = lay(tmp_path, "dolly", [json.dumps(good("dolly", n)).encode() for n in range(50)])
    convert("dolly", source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "dolly").iterdir()}
    assert sorted(before) == ["dolly_data.jsonl", "rejects.jsonl", "report.json"]
    whole = CONVERTERS["dolly"]

    @converter("dolly")
    def dies(raw, rng, protocol, *, num_examples=None):
        for i, pair in enumerate(whole(raw, rng, protocol)):
            if i == 20:
                raise KeyboardInterrupt
            yield pair

    try:
        with pytest.raises(KeyboardInterrupt):
            convert("dolly", source, tmp_path / "out", seed=1)
    finally:
        CONVERTERS["dolly"] = whole
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "dolly").iterdir()} == before


def test_too_many_rejects_fail_after_the_report_is_written(tmp_path):
    source = lay(tmp_path, "dolly", [b"{", json.dumps(good("dolly", 1)).encode()])
    report = convert("dolly", source, tmp_path)
    require_accepted(report, 0.5)
    with pytest.raises(DatasetError, match=r"dolly: 1 of 2 raw records rejected \(50.0%\), expected at most 1.0%: malformed_json 1"):
        require_accepted(report, 0.01)


def test_a_mix_is_its_parts_in_order_or_an_error(tmp_path):
    for key in ("dolly", "cot"):
        convert(key, lay(tmp_path, key, [json.dumps(good(key, n)).encode() for n in range(4)]), tmp_path)
    report = mix_datasets(Mix(key="two", name="Dolly + CoT", parts=["dolly", "cot"]), tmp_path, tmp_path)
    parts = [(tmp_path / key / f"{key}_data.jsonl").read_bytes() for key in ("dolly", "cot")]
    assert (tmp_path / "two" / "two_data.jsonl").read_bytes() == b"".join(parts)
    assert [part["key"] for part in report.parts] == ["dolly", "cot"] and report.n_out == sum(part["n_out"] for part in report.parts) == 11
    with pytest.raises(DatasetError, match="nano_mix: no conversations of oasst1"):
        mix_datasets("nano_mix", tmp_path, tmp_path)
    with pytest.raises(DatasetError, match="no mix 'nanomix'"):
        mix_datasets("nanomix", tmp_path, tmp_path)


def test_the_run_notebook_converts_and_applies_the_threshold(tmp_path):
    source = lay(tmp_path, "dolly", [json.dumps(good("dolly", n)).encode() for n in range(3)] + [b"{"])
    params = {"dataset": "dolly", "source_root": str(source)}
    manifest = run_cell("convert", {**params, "max_rejected": 0.5}, tmp_path / "a" / "dolly")
    assert {"dolly_data.jsonl", "rejects.jsonl", "report.json"} <= set(manifest["outputs"])
    data = (source / "dolly" / FILES["dolly"][0]).read_bytes()
    assert json.loads((tmp_path / "a" / "dolly" / "result.json").read_text())["raw_files"] == {FILES["dolly"][0]: hashlib.sha256(data).hexdigest()}
    assert "tulu_study.data.dolly" in manifest["code"] and "tulu_study.data.cot" not in manifest["code"]
    with pytest.raises(CellError, match="1 of 4 raw records rejected"):
        run_cell("convert", params, tmp_path / "b" / "dolly")
    assert (tmp_path / "b" / "dolly" / "report.json").exists()


@pytest.mark.slow
def test_conversations_load_with_the_datasets_library(tmp_path):
    from datasets import load_dataset
    for key in FILES:
        report = convert(key, lay(tmp_path, key, [json.dumps(good(key, n)).encode() for n in range(6)]), tmp_path / "out")
        loaded = load_dataset("json", data_files=str(tmp_path / "out" / key / f"{key}_data.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded.column_names == ["dataset", "id", "messages"] and len(loaded) == report.n_out
        assert loaded[0]["messages"] == rows_of(tmp_path / "out", key)[0]["messages"]
