"The invented world: the same bytes for the same seed, the real sources' schemas, and sizes that the study relies on."
import csv, gzip, hashlib, json, os, time
from pathlib import Path

import pytest

from tulu_study.core.settings import project_root
from tulu_study.world.writing import write_world

MIRROR = Path(os.environ.get("TULU_MIRROR") or project_root().parent / "shared" / "mirror")
JSONL = ("dolly/databricks-dolly-15k.jsonl", "cot/cot_zsopt.jsonl", "cot/cot_fsopt.jsonl", "gsm8k/test.jsonl", "gsm8k/train.jsonl")
TREES = "oasst1/2023-04-12_oasst_ready.trees.jsonl.gz"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    start = time.perf_counter()
    summary = write_world(folder)
    return folder, summary, time.perf_counter() - start


def rows(path):
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def nodes(message):
    yield message
    for reply in message["replies"]:
        yield from nodes(reply)


def test_same_seed_same_bytes(world, tmp_path):
    folder, summary, _ = world
    assert write_world(tmp_path)["sha256"] == summary["sha256"]
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, path = line.split("  ")
        assert hashlib.sha256((tmp_path / path).read_bytes()).hexdigest() == digest, path


def test_other_seed_other_world(world, tmp_path):
    write_world(tmp_path, seed=7)
    for path in (*JSONL, TREES, "world/corpus.jsonl", "world/facts.json"):
        assert (tmp_path / path).read_bytes() != (world[0] / path).read_bytes(), path


def test_size_and_time(world):
    folder, summary, seconds = world
    assert summary["bytes"] < 3_000_000
    assert seconds < 15, "a few seconds on an idle machine"
    assert summary["rows"]["gsm8k/test.jsonl"] >= 200, "the paper samples 200"
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed | {"SHA256SUMS"} == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_few_broken_rows(world):
    broken = [row for row in rows(world[0] / JSONL[0]) if "response" not in row]
    assert len(broken) == 1
    assert len(broken) / world[1]["rows"][JSONL[0]] < 0.01


def test_no_test_question_is_taught(world):
    folder = world[0]
    tested = {row["question"] for row in rows(folder / "gsm8k/test.jsonl")}
    assert len(tested) == world[1]["rows"]["gsm8k/test.jsonl"]
    taught = "".join((folder / path).read_text() for path in (*JSONL[1:3], "gsm8k/train.jsonl", "gsm8k/cot_exemplars.json", "world/corpus.jsonl"))
    assert not [question for question in tested if json.dumps(question)[1:-1] in taught]


def test_gold_answers_are_right(world):
    for row in rows(world[0] / "gsm8k/test.jsonl"):
        marked, gold = row["answer"].split("\n#### ")
        calculation, result = marked[marked.index("<<") + 2:marked.index(">>")].split("=")
        assert eval(calculation) == int(result) == int(gold) != 0


def test_trees_branch_and_are_deleted_and_speak(world):
    trees = rows(world[0] / TREES)
    messages = [message for tree in trees for message in nodes(tree["prompt"])]
    assert {message["role"] for message in messages} == {"prompter", "assistant"}
    assert len({message["message_id"] for message in messages}) == len(messages)
    assert any(message["deleted"] for message in messages) and not any(tree["prompt"]["deleted"] for tree in trees)
    assert max(len(message["replies"]) for message in messages) > 1
    assert len({message["lang"] for message in messages}) >= 3
    for parent in messages:
        assert all(reply["parent_id"] == parent["message_id"] for reply in parent["replies"])


def test_tokenizer_is_like_llamas(world):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(world[0] / "tokenizers" / "nano")
    assert len(tokenizer) <= 2048
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    text = "naïve  14\n\tÆ 漢"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer.tokenize("1234")) == 4, "digits one by one"
    assert all(len(tokenizer.tokenize(f" {letter}")) == 1 for letter in "ABCD"), "a multiple-choice letter is one token"


class Schema:
    "What a source's records are like, all of them together: an optional field may be missing from any of them, or be null."
    def __init__(self, records):
        self.orders, self.types, self.always = [], {}, None
        for record in records:
            if list(record) not in self.orders: self.orders.append(list(record))
            for key, value in record.items(): self.types.setdefault(key, set()).update([type(value)] if value is not None else [])
            self.always = set(record) if self.always is None else self.always & set(record)

    def problems(self, record, types=True):
        "Fields that the source does not have, fields that it always has, values of other types, another order."
        found = [f"{key} is unknown" for key in record if key not in self.types] + [f"{key} is missing" for key in sorted(self.always - set(record))]
        if types: found += [f"{key}: {type(value)}, expected one of {self.types[key]}" for key, value in record.items() if value is not None and self.types.get(key) and type(value) not in self.types[key]]
        return found + [f"order {list(record)}, expected {order}" for order in self.orders if [key for key in order if key in record] != [key for key in record if key in order]]


def at_mirror(*paths):
    "Paths of the real sources; skips where one is absent."
    if absent := [str(MIRROR / path) for path in paths if not (MIRROR / path).exists()]: pytest.skip(f"not on this machine (TULU_MIRROR): {', '.join(absent)}")
    return [MIRROR / path for path in paths]


def test_schema_tells_an_optional_field_from_an_unknown_one():
    schema = Schema([{"a": "x", "b": None}, {"a": "y"}, {"a": "z", "b": 1, "c": None}])
    assert schema.problems({"a": ""}) == schema.problems({"a": "", "b": 3, "c": 4}) == schema.problems({"a": "", "b": None}) == []
    assert [len(schema.problems(row)) for row in ({"b": 1}, {"a": "", "d": 1}, {"a": 5}, {"b": 1, "a": ""})] == [1, 1, 1, 2]


@pytest.mark.parametrize("path", JSONL)
def test_fields_equal_the_real_source(world, path):
    schema, broken = Schema(rows(at_mirror(path)[0])), 0
    for row in rows(world[0] / path):
        if "response" in schema.always and "response" not in row: broken += 1  # the broken row
        else: assert schema.problems(row) == []
    assert broken == ("dolly" in path)


def test_trees_equal_the_real_source(world):
    real = rows(at_mirror(TREES)[0])
    messages = [message for tree in real for message in nodes(tree["prompt"])]
    tree_of, message_of = Schema(real), Schema(messages)
    within = {key: Schema([message[key] for message in messages if message.get(key)]) for key in ("detoxify", "emojis", "labels")}
    names = Schema([dict.fromkeys(message["labels"]["name"]) for message in messages if message.get("labels")])
    for tree in rows(world[0] / TREES):
        assert tree_of.problems(tree) == []
        for message in nodes(tree["prompt"]):
            assert message_of.problems(message) == []
            assert {key: found for key, schema in within.items() if (found := schema.problems(message[key], types=False))} == {}
            assert names.problems(dict.fromkeys(message["labels"]["name"])) == []


def test_multiple_choice_layout_equals_the_real_source(world):
    own, real = ({path.relative_to(root / "mmlu"): path for path in (root / "mmlu").rglob("*.csv")} for root in (world[0], at_mirror("mmlu")[0].parent))
    assert {(path.parent.name, path.stem.rsplit("_", 1)[1]) for path in own} == {("dev", "dev"), ("test", "test")} <= {(path.parent.name, path.stem.rsplit("_", 1)[1]) for path in real}
    shared = sorted(own.keys() & real.keys())
    if not shared: pytest.skip(f"none of the world's subjects is in {MIRROR / 'mmlu'}")
    for path in [*own.values(), *(real[path] for path in shared)]:
        for row in csv.reader(open(path, encoding="utf-8", newline="")): assert len(row) == 6 and row[5] in "ABCD", path
    for path in own.values():
        for row in csv.reader(open(path, encoding="utf-8", newline="")): assert len(set(row[1:5])) == 4, path


def test_subjects_are_real_ones(world):
    from tulu_study.evaluation.mmlu import CATEGORY
    assert {path.stem.rsplit("_", 1)[0] for path in (world[0] / "mmlu").rglob("*.csv")} <= set(CATEGORY)


def test_exemplars_equal_the_real_source(world):
    shots, real = (json.loads((root / "gsm8k/cot_exemplars.json").read_text(encoding="utf-8")) for root in (world[0], at_mirror("gsm8k/cot_exemplars.json")[0].parents[1]))
    assert len(shots) == 8 and [found for shot in shots if (found := Schema(real).problems(shot))] == []
