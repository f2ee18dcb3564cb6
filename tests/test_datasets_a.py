"""SuperNI, Flan V2, Self-instruct and Unnatural Instructions under bad input, and the drawing of FLAN's submixes."""
import gzip
import json
import random

import pytest

from tulu_study.core.files import read_jsonl
from tulu_study.core.params import datasets
from tulu_study.core.sources import SourceError
from tulu_study.data import DatasetError, convert
from tulu_study.data.flan_v2 import FLAN_MIXES, resample_flan_v2, submix_counts

GOOD = {
    "flan_v2": lambda n: {"inputs": f"What is {n} + 1?", "targets": f"{n + 1} "},
    "self_instruct": lambda n: {"instruction": f"Spell {n}.", "input": "" if n % 2 else f"number {n}", "output": f"n{n}"},
    "unnatural_instructions": lambda n: {"instruction": f"Spell {n}.", "instances": [{"input": str(n), "constraints": "None." if n % 2 else "In capitals.", "output": f"N{n}"}]},
}
UNUSABLE = {   # key -> [(a record, reason)]
    "flan_v2": [({"inputs": "x"}, "missing_key"), ({"inputs": 1, "targets": "y"}, "wrong_type"), ({"inputs": None, "targets": "y"}, "wrong_type")],
    "self_instruct": [({"instruction": "x", "output": "y"}, "missing_key"), ({"instruction": "x", "input": ["a"], "output": "y"}, "wrong_type"),
                      ({"instruction": "x", "input": "", "output": None}, "wrong_type")],
    "unnatural_instructions": [({"instruction": "x"}, "missing_key"), ({"instruction": "x", "instances": []}, "no_instances"), ({"instruction": "x", "instances": "y"}, "wrong_type"),
                               ({"instruction": "x", "instances": ["y"]}, "not_an_object"), ({"instruction": "x", "instances": [{"input": "a", "output": "b"}]}, "missing_key"),
                               ({"instruction": "x", "instances": [{"input": "a", "constraints": 1, "output": "b"}]}, "wrong_type")],
}
ANYWHERE = [("[1]", "not_an_object"), ("null", "not_an_object"), ("{", "malformed_json"), ("", "empty_line")]


def lay_lines(root, key, lines):
    "Write a dataset's one raw file."
    path = root / key / datasets()[key].files[0].name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return root


def rows_of(out, key, name=None):
    return list(read_jsonl(out / key / (name or f"{key}_data.jsonl")))


@pytest.mark.parametrize("key", GOOD)
def test_bad_rows_are_rejected_in_their_place_and_change_nothing_else(key, tmp_path):
    bad = [(json.dumps(record), reason) for record, reason in UNUSABLE[key]] + ANYWHERE
    sound = [json.dumps(GOOD[key](n)) for n in range(len(bad) + 1)]
    mixed = [line for n, (fault, _) in enumerate(bad) for line in (sound[n], fault)] + sound[-1:]
    for protocol in ("paper", "fixed"):
        clean = convert(key, lay_lines(tmp_path / "clean", key, sound), tmp_path / "a", protocol)
        report = convert(key, lay_lines(tmp_path / "mixed", key, mixed), tmp_path / "b", protocol)
        assert (clean.n_in, clean.n_rejected, clean.n_out) == (len(sound), 0, len(sound))
        assert (report.n_in, report.n_records, report.n_rejected) == (len(mixed), len(sound), len(bad))
        assert rows_of(tmp_path / "a", key) == rows_of(tmp_path / "b", key)
        assert [(r["row"], r["reason"]) for r in rows_of(tmp_path / "b", key, "rejects.jsonl")] == [(2 * n + 2, reason) for n, (_, reason) in enumerate(bad)]


@pytest.mark.parametrize("key", GOOD)
def test_a_sub_sample_is_numbered_from_nought_and_more_than_there_is_is_refused(key, tmp_path):
    root = lay_lines(tmp_path, key, [json.dumps(GOOD[key](n)) for n in range(9)])
    assert convert(key, root, tmp_path / "out", num_examples=4).n_out == 4
    assert [row["id"] for row in rows_of(tmp_path / "out", key)] == [f"{key}_{n}" for n in range(4)]
    with pytest.raises(DatasetError, match="found 9 usable records"):
        convert(key, root, tmp_path / "out", num_examples=10)
    for wrong in (-1, "4", 1.5):
        with pytest.raises(DatasetError, match="expected a whole number"):
            convert(key, root, tmp_path / "out", num_examples=wrong)


def ni_task(name, n, **more):
    shots = [{"input": f"in {i}", "output": f"out {i}", "explanation": ""} for i in range(4)]
    return {"Definition": ["Answer."], "Positive Examples": shots, "Instances": [{"id": f"{name}-{i}", "input": f"ask {i}", "output": [f"say {i}", "or"]} for i in range(n)], **more}


def lay_tasks(root, tasks, extra=()):
    "Write SuperNI's task list and the task files; `extra` names are listed and not written."
    folder = root / "super_ni"
    (folder / "splits/xlingual").mkdir(parents=True, exist_ok=True)
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "splits/xlingual/train_tasks.txt").write_text("".join(f"{name}\n" for name in [*tasks, *extra]), encoding="utf-8")
    for name, task in tasks.items():
        (folder / "tasks" / f"{name}.json").write_text(task if isinstance(task, str) else json.dumps(task), encoding="utf-8")
    return root


@pytest.mark.parametrize("n, zero, few", [(1, 1, 0), (60, 60, 0), (61, 60, 1), (80, 60, 20), (81, 60, 20)])
def test_super_ni_keeps_sixty_and_twenty_of_a_task(n, zero, few, tmp_path):
    report = convert("super_ni", lay_tasks(tmp_path, {"task1": ni_task("task1", n)}), tmp_path / "out")
    rows = rows_of(tmp_path / "out", "super_ni")
    shots = [row["messages"][0]["content"].count("\nOutput:\nout ") for row in rows]
    assert (report.n_in, report.n_records, report.n_out) == (n, n, zero + few)
    assert shots == [0] * zero + [2] * few and len({row["id"] for row in rows}) == len(rows)
    assert n == 81 or [row["id"] for row in rows] == [f"super_ni_task1-{i}" for i in range(n)]


BAD_TASKS = {
    "list": ([], "no_task"), "cut": ('{"Definition": ["A', "malformed_json"), "no definition": ({"Instances": []}, "missing_key"), "definition is text": (ni_task("x", 1, Definition="A"), "wrong_type"),
    "empty definition": (ni_task("x", 1, Definition=[]), "empty_list"), "number in definition": (ni_task("x", 1, Definition=[1]), "wrong_type"),
    "no instances": (ni_task("x", 0), "no_instances"), "instances are a mapping": (ni_task("x", 1, Instances={}), "wrong_type"),
    "example without answer": (ni_task("x", 61, **{"Positive Examples": [{"input": "a"}]}), "missing_key"), "text": ('"task"', "not_an_object"), "null example": (ni_task("x", 61, **{"Positive Examples": [None]}), "not_an_object"),
}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_super_ni_rejects_a_task_that_is_unusable_as_a_whole(name, tmp_path):
    task, reason = BAD_TASKS[name]
    alone = lay_tasks(tmp_path / "alone", {"task2": ni_task("task2", 90)})
    both = lay_tasks(tmp_path / "both", {"task1": task if isinstance(task, str) else json.dumps(task), "task2": ni_task("task2", 90)})
    convert("super_ni", alone, tmp_path / "a")
    report = convert("super_ni", both, tmp_path / "b")
    assert rows_of(tmp_path / "a", "super_ni") == rows_of(tmp_path / "b", "super_ni")
    assert [(r["file"], r["row"], r["reason"]) for r in rows_of(tmp_path / "b", "super_ni", "rejects.jsonl")] == [("tasks/task1.json", 1, reason)]
    assert report.n_in == 91 and report.n_records == 90


def test_super_ni_looks_at_exemplars_only_where_conversations_are_made_with_them(tmp_path):
    bad = {"Positive Examples": [{"input": "a"}]}
    report = convert("super_ni", lay_tasks(tmp_path, {"task1": ni_task("task1", 60, **bad), "task2": ni_task("task2", 61, **bad)}), tmp_path / "out")
    assert report.n_out == 60 and report.reasons == {"missing_key": 1}
    assert convert("super_ni", tmp_path, tmp_path / "out", few_shot_examples_per_task=0).n_out == 120


@pytest.mark.parametrize("place", [7, 85])
def test_one_bad_instance_costs_one_conversation_at_most(place, tmp_path):
    whole, damaged = ni_task("task1", 90), ni_task("task1", 90)
    damaged["Instances"][place]["output"] = []
    clean = lay_tasks(tmp_path / "clean", {"task1": whole, "task2": ni_task("task2", 90)})
    report = convert("super_ni", clean, tmp_path / "a")
    torn = convert("super_ni", lay_tasks(tmp_path / "damaged", {"task1": damaged, "task2": ni_task("task2", 90)}), tmp_path / "b")
    before, after = (rows_of(tmp_path / name, "super_ni") for name in ("a", "b"))
    assert [row for row in before if row["id"] != f"super_ni_task1-{place}"] == after
    assert torn.reasons == {"empty_list": 1} and torn.n_in == report.n_in == torn.n_records + 1


def test_super_ni_rejects_an_instance_by_its_place_in_the_task(tmp_path):
    good = ni_task("task1", 4)["Instances"]
    bad = [({"input": "a", "output": ["b"]}, "missing_key"), ({"id": "i", "input": None, "output": ["b"]}, "wrong_type"), ({"id": "i", "input": "a", "output": []}, "empty_list"),
           ({"id": "i", "input": "a", "output": "b"}, "wrong_type"), ({"id": "i", "input": "a", "output": [["b"]]}, "wrong_type"), ("text", "not_an_object"), ({"id": "i", "input": "\ud83d", "output": ["b"]}, "invalid_unicode")]
    task = ni_task("task1", 0, Instances=good[:2] + [instance for instance, _ in bad] + good[2:])
    report = convert("super_ni", lay_tasks(tmp_path, {"task1": task}), tmp_path / "out")
    assert [(r["row"], r["reason"]) for r in rows_of(tmp_path / "out", "super_ni", "rejects.jsonl")] == [(n + 3, reason) for n, (_, reason) in enumerate(bad)]
    assert (report.n_in, report.n_records, report.n_rejected, report.n_out) == (11, 4, 7, 4)


def test_super_ni_names_all_absent_tasks_at_once_and_never_asks_for_leaking_ones(tmp_path):
    record = datasets()["super_ni"].model_copy(update={"files": [datasets()["super_ni"].files[0].model_copy(update={"url": None, "alternatives": []})]})
    root = lay_tasks(tmp_path, {"task1": ni_task("task1", 3)}, extra=["task7_gone", "task8_mmmlu_questions", "", "task9_gone"])
    with pytest.raises(SourceError, match="2 of the 3 task files .* missing: tasks/task7_gone.json, tasks/task9_gone.json.*Clone") as caught:
        convert(record, root, tmp_path / "out")
    assert "mmmlu" not in str(caught.value) and not (tmp_path / "out/super_ni/super_ni_data.jsonl").exists()


@pytest.mark.parametrize("damage, said", [(lambda text: gzip.compress(text)[:-9], "unpacked only in part"), (lambda text: text + b"task\x00nul\n", "1 lines that name no task, such as 'task.x00nul'"),
                                          (lambda text: text + b"../secret\n" + b"x" * 300, "2 lines that name no task"), (lambda text: b"\xff\xfe" + text, "name no task")])
def test_a_damaged_task_list_is_an_error_that_says_so(damage, said, tmp_path):
    root = lay_tasks(tmp_path, {"task1": ni_task("task1", 3)})
    (path,) = root.rglob("train_tasks.txt")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SourceError, match=said):
        convert("super_ni", root, tmp_path / "out")
    assert not list((tmp_path / "out/super_ni").glob("*"))


@pytest.mark.parametrize("damage, said", [(lambda text: gzip.compress(text)[:-9], "unpacked only in part"), (lambda text: text + b"task\x00nul\n", "1 lines that name no task, such as 'task.{4}nul'"),
                                          (lambda text: text + b"../secret\n" + b"x" * 300, "2 lines that name no task"), (lambda text: b"\xff\xfe" + text, "name no task")])
def test_a_damaged_task_list_is_an_error_that_says_so(damage, said, tmp_path):
    root = lay_tasks(tmp_path, {"task1": ni_task("task1", 3)})
    (path,) = root.rglob("train_tasks.txt")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SourceError, match=said):
        convert("super_ni", root, tmp_path / "out")
    assert not list((tmp_path / "out/super_ni").glob("*"))


def lay_submixes(folder, mix, lines, nested=False):
    "Write invented submixes; each line tells where it comes from."
    for name in submix_counts(mix):
        path = folder / name / f"{name}.jsonl" if nested else folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(json.dumps({"inputs": f"{name} {i} é", "targets": "t"}) for i in range(lines)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("mix, nested", [("v1", False), ("v1", True), ("v2", True)])
def test_submixes_are_drawn_as_one_stream_in_file_order(mix, nested, tmp_path):
    total, rng, expected = 400, random.Random(7), []
    for name, portion in FLAN_MIXES[mix][2].items():
        expected += [f"{name} {i} é" for i in sorted(rng.sample(range(150), int(portion * total)))]
    path = resample_flan_v2(lay_submixes(tmp_path / "in", mix, 150, nested), tmp_path / "out", mix, total, seed=7)
    assert [row["inputs"] for row in read_jsonl(path)] == expected
    assert [p.name for p in path.parent.iterdir()] == [FLAN_MIXES[mix][1]]


def test_the_mixes_of_the_authors_have_their_sizes():
    assert list(submix_counts("v1").values()) == [10_000] * 4 + [8_000] * 4 + [10_000] * 2 + [2_500] * 2 + [1_500] * 2
    assert list(submix_counts("v2").values()) == [10_000, 10_000, 8_000, 8_000, 11_500, 2_500]
    assert FLAN_MIXES["v1"][1] == datasets()["flan_v2"].files[0].name


def test_absent_and_short_submixes_are_named_together_and_leave_nothing_behind(tmp_path):
    folder = lay_submixes(tmp_path / "in", "v2", 30)
    (folder / "flan_fsopt.jsonl").unlink()
    (folder / "cot_fsopt.jsonl").write_text("{}\n")
    with pytest.raises(SourceError, match="flan_fsopt.jsonl is not there .*cot_fsopt.jsonl has 1 lines, expected at least 5"):
        resample_flan_v2(folder, tmp_path / "out", "v2", 100)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DatasetError, match="no FLAN mix 'v3'; there are v1, v2"):
        resample_flan_v2(folder, tmp_path / "out", "v3")
