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


@pytest.mark.parametrize("path", JSONL)
def test_fields_equal_the_real_source(world, path):
    if not (MIRROR / path).exists(): pytest.skip(f"no {MIRROR / path}")
    with open(MIRROR / path, encoding="utf-8") as f: real = json.loads(f.readline())
    for row in rows(world[0] / path):
        if "response" in real and "response" not in row: continue  # the broken row
        assert list(row) == list(real)
        assert {key: type(value) for key, value in row.items()} == {key: type(value) for key, value in real.items()}


def test_trees_equal_the_real_source(world):
    if not (MIRROR / TREES).exists(): pytest.skip(f"no {MIRROR / TREES}")
    with gzip.open(MIRROR / TREES, "rt", encoding="utf-8") as f: real = json.loads(f.readline())
    for tree in rows(world[0] / TREES):
        assert list(tree) == list(real)
        for message in nodes(tree["prompt"]):
            assert list(message) == list(real["prompt"])
            for key in ("detoxify", "emojis", "labels"): assert list(message[key]) == list(real["prompt"][key]), key
            assert message["labels"]["name"] == real["prompt"]["labels"]["name"]


def test_benchmark_layout_equals_the_real_source(world):
    folder = world[0]
    if not (MIRROR / "mmlu").exists(): pytest.skip(f"no {MIRROR / 'mmlu'}")
    own = {str(path.relative_to(folder)) for path in (folder / "mmlu").rglob("*.csv")}
    assert own <= {str(path.relative_to(MIRROR)) for path in (MIRROR / "mmlu").rglob("*.csv")}
    for path in own:
        for row in csv.reader(open(folder / path, encoding="utf-8", newline="")):
            assert len(row) == 6 and row[5] in "ABCD" and len(set(row[1:5])) == 4
    shots, real = (json.loads((root / "gsm8k/cot_exemplars.json").read_text()) for root in (folder, MIRROR))
    assert len(shots) == len(real) == 8 and [list(shot) for shot in shots] == [list(shot) for shot in real]
