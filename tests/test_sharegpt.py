"""ShareGPT: splitting against a budget, every kind of bad record, and counts that equal the tokenizer's own."""
import json
import os
import random
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_study.core.files import read_jsonl
from tulu_study.core.messages import check_messages
from tulu_study.core.params import SourceFile, datasets
from tulu_study.data import DatasetError, conversion, convert, sharegpt, streams
from tulu_study.data.counting import joining_groups, safe_cuts, token_counter
from tulu_study.data.sharegpt import pieces_of, read_turns, role_fault, rounds_left_out, split_fixed, split_paper

FILES = [file.name for file in datasets()["sharegpt"].files]


def chat(key, *texts, senders=("human", "gpt")):
    return {"id": key, "conversations": [{"from": senders[i % 2], "value": text} for i, text in enumerate(texts)]}


class Words:
    "A tokenizer that is neither of the `tokenizers` library nor wraps one."
    name_or_path = "words"

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [list(range(len(text.split()) + add_special_tokens)) for text in texts]}


def lay(root, first, second=()):
    folder = root / "sources" / "sharegpt"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(FILES, (first, second)):
        (folder / name).write_text(json.dumps(list(rows)))
    return root / "sources"


def rows_of(out, name="sharegpt_data.jsonl"):
    return list(read_jsonl(out / "sharegpt" / name))


BAD = {   # name -> (record, reason)
    "null": (None, "not_an_object"),
    "number": (7, "not_an_object"),
    "text": ("hello", "not_an_object"),
    "list": ([{"from": "human", "value": "x"}], "not_an_object"),
    "no id": ({"conversations": []}, "missing_key"),
    "number for an id": ({"id": 3, "conversations": []}, "wrong_type"),
    "no conversations": ({"id": "b"}, "missing_key"),
    "null conversations": ({"id": "b", "conversations": None}, "wrong_type"),
    "text for conversations": ({"id": "b", "conversations": "Hi"}, "wrong_type"),
    "object for conversations": ({"id": "b", "conversations": {"from": "human", "value": "x"}}, "wrong_type"),
    "empty": ({"id": "b", "conversations": []}, "empty_conversation"),
    "single": (chat("b", "alone"), "too_short"),
    "no from": ({"id": "b", "conversations": [{"value": "x"}, {"from": "gpt", "value": "y"}]}, "missing_key"),
    "no value": ({"id": "b", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt"}]}, "missing_key"),
    "null value": ({"id": "b", "conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "y"}]}, "wrong_type"),
    "number value": ({"id": "b", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": 4.5}]}, "wrong_type"),
    "list for from": ({"id": "b", "conversations": [{"from": ["human"], "value": "x"}, {"from": "gpt", "value": "y"}]}, "wrong_type"),
    "text for a message": ({"id": "b", "conversations": ["Hi", "Hello"]}, "not_an_object"),
    "half a surrogate": (chat("b", "Hi \ud83d", "Hello"), "invalid_unicode"),
    "unknown sender": (chat("b", "Hi", "Hello", senders=("human", "alice")), "unknown_sender"),
    "system": (chat("b", "Hi", "Hello", senders=("system", "human")), "system_or_bing"),
    "bing": (chat("b", "Hi", "Hello", senders=("human", "bing")), "system_or_bing"),
    "other names": (chat("b", "Hi", "Hello", senders=("user", "chatgpt")), "user_or_chatgpt"),
    "answer first": (chat("b", "Hi", "Hello", senders=("gpt", "human")), "starts_with_gpt"),
    "not in turn": (chat("b", "Hi", "Hello", senders=("human", "human")), "not_in_turn"),
    "too long": (chat("b", "Hi " * 60, "Hello"), "round_too_long"),
}


@pytest.mark.parametrize("protocol", ["paper", "fixed"])
def test_every_bad_record_is_a_reject_with_its_place_and_the_rest_is_as_if_it_were_not_there(protocol, tmp_path):
    good = [chat(f"g{n}", f"ask {n}", "answer") for n in range(len(BAD))]
    mixed = [row for pair in zip(good, (bad for bad, _ in BAD.values())) for row in pair]
    clean = convert("sharegpt", lay(tmp_path / "clean", good), tmp_path / "a", protocol, tokenizer=Words(), max_length=60)
    report = convert("sharegpt", lay(tmp_path / "mixed", mixed), tmp_path / "b", protocol, tokenizer=Words(), max_length=60)
    assert clean.n_rejected == 0 and rows_of(tmp_path / "a") == rows_of(tmp_path / "b") and report.n_out == len(good)
    assert report.n_in == report.n_records + report.n_rejected == len(mixed)
    found = [(row["file"], row["row"], row["reason"]) for row in rows_of(tmp_path / "b", "rejects.jsonl")]
    assert found == [(FILES[0], 2 * n + 2, reason) for n, (_, reason) in enumerate(BAD.values())]
    assert all(row["detail"] for row in rows_of(tmp_path / "b", "rejects.jsonl"))


def test_a_damaged_list_is_read_up_to_the_damage(tmp_path):
    source = lay(tmp_path, [chat("a", "Hi", "Hello"), chat("b", "Hi", "Hello")], [chat("c", "Hi", "Hello")])
    path = source / "sharegpt" / FILES[0]
    path.write_text(path.read_text()[:-20])
    report = convert("sharegpt", source, tmp_path / "out", tokenizer=Words())
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["sharegpt_a_0", "sharegpt_c_0"] and report.reasons == {"malformed_json": 1}


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_never_raises_and_everything_is_accounted_for(seed, tmp_path):
    rng, things = random.Random(seed), [None, 3, "x", [], {}, "human", "gpt", "\ud800", True, 1e400]
    rows = [chat(f"r{n}", *["word " * rng.randrange(30) for _ in range(rng.randrange(9))]) for n in range(60)]
    for row in rows:
        if rng.random() < 0.5 and row["conversations"]:
            rng.choice(row["conversations"])[rng.choice(["from", "value", "more"])] = rng.choice(things)
        elif rng.random() < 0.3:
            row[rng.choice(["id", "conversations"])] = rng.choice(things)
    for protocol in ("paper", "fixed"):
        report = convert("sharegpt", lay(tmp_path, rows), tmp_path / protocol, protocol, tokenizer=Words(), max_length=50)
        assert report.n_in == report.n_records + report.n_rejected == len(rows) and report.n_rejected == len(rows_of(tmp_path / protocol, "rejects.jsonl"))
        assert all(check_messages(row["messages"]) == [] for row in rows_of(tmp_path / protocol)) and "unreadable" not in report.reasons


@given(rounds=st.lists(st.integers(2, 60), max_size=12), odd=st.booleans(), max_length=st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_fixed_keeps_every_round_that_fits_once_and_paper_keeps_a_part_of_that(rounds, odd, max_length):
    costs = [half for cost in rounds for half in (cost // 2, cost - cost // 2)] + [9] * odd
    cost = lambda piece: sum(costs[piece[0]:piece[1]])
    fixed, paper = split_fixed(costs, max_length), [piece for piece in split_paper(costs, max_length) if piece[0] < piece[1]]
    assert [i for start, stop in fixed for i in range(start, stop)] == [i for n, size in enumerate(rounds) if size <= max_length for i in (2 * n, 2 * n + 1)]
    assert all(cost(piece) <= max_length for piece in fixed + paper) and all(start % 2 == stop % 2 == 0 for start, stop in fixed)
    assert set(paper) <= set(fixed) and len(set(fixed) - set(paper)) <= 1
    assert {reason for reason, _ in rounds_left_out(costs, fixed, max_length)} <= {"round_too_long"}
    left = [reason for reason, _ in rounds_left_out(costs, paper, max_length)]
    assert len(left) + sum(stop - start for start, stop in paper) // 2 == len(rounds) and left.count("last_round_lost") <= 1


def test_parts_left_out_are_named_and_a_clean_run_removes_the_old_list(tmp_path):
    source = lay(tmp_path, [chat("a", "Hi", "Hello", "x " * 60, "y", "x " * 20, "y " * 20, "Bye?"), chat("b", "Hi", "Hello", "x " * 20, "y " * 20)])
    lost = {}
    for protocol in ("paper", "fixed"):
        report = convert("sharegpt", source, tmp_path / "out", protocol, tokenizer=Words(), max_length=60)
        lost[protocol] = [(row["row"], row["reason"]) for row in rows_of(tmp_path / "out", "lost.jsonl")]
        assert sum(report.lost.values()) == len(lost[protocol]) and report.n_records == 2 and report.n_rejected == 0
    assert lost == {"paper": [(1, "round_too_long"), (1, "last_round_lost"), (1, "odd_message"), (2, "last_round_lost")], "fixed": [(1, "round_too_long"), (1, "odd_message")]}
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["sharegpt_a_0", "sharegpt_a_4", "sharegpt_b_0", "sharegpt_b_2"]
    convert("sharegpt", lay(tmp_path, [chat("a", "Hi", "Hello")]), tmp_path / "out", tokenizer=Words())
    assert not (tmp_path / "out" / "sharegpt" / "lost.jsonl").exists()


def test_a_piece_with_wrong_senders_is_lost_and_the_others_are_kept():
    row = chat("a", "w " * 20, "w " * 20, "w " * 20, "w " * 20)
    row["conversations"][2]["from"] = "bing"
    lost = []
    pieces = pieces_of(*read_turns(row), [21] * 4, max_length=60, protocol="fixed", lose=lambda *what: lost.append(what))
    assert [key for key, _ in pieces] == ["a_0"] and [reason for reason, _ in lost] == ["system_or_bing"]


def test_the_same_senders_are_judged_the_same_whatever_the_length():
    for n in range(1, 9):
        assert role_fault([("human", "gpt")[i % 2] for i in range(n)]) == ""
        assert role_fault([("gpt", "human")[i % 2] for i in range(n)]) == "starts_with_gpt"


def test_no_tokenizer_and_no_budget_are_errors_that_say_what_to_do(tmp_path):
    source = lay(tmp_path, [chat("a", "Hi", "Hello")])
    with pytest.raises(DatasetError, match="found no tokenizer.*tokenizer.json.*fetches the paper's"):
        convert("sharegpt", source, tmp_path / "out")
    for budget in (0, -1, 2.5, "2048", None):
        with pytest.raises(DatasetError, match="max_length"):
            convert("sharegpt", source, tmp_path / "out", tokenizer=Words(), max_length=budget)
    assert not list((tmp_path / "out").rglob("*.*"))


def test_split_files_are_taken_as_they_are(tmp_path):
    rows = [chat("a_0", " Hi ", "Hello\n"), chat("b_2", "u", "c", senders=("user", "chatgpt")), chat("c_0", "u", "s", senders=("human", "bing")),
            chat("d_0", "u", "s", senders=("human", "alice")), chat("e_0"), {"id": "f_0"}, 3]
    (tmp_path / "split.json").write_text(json.dumps(rows))
    record = datasets()["sharegpt"].model_copy(update={"files": [SourceFile(name="split.json")]})
    report = convert(record, tmp_path, tmp_path / "out", already_split=True)
    assert [(row["id"], row["messages"][0]["content"]) for row in rows_of(tmp_path / "out")] == [("sharegpt_a_0", " Hi "), ("sharegpt_b_2", "u")]
    assert [row["reason"] for row in rows_of(tmp_path / "out", "rejects.jsonl")] == ["system_or_bing", "unknown_sender", "empty_conversation", "missing_key", "not_an_object"]
    assert report.n_in == report.n_records + report.n_rejected == len(rows)


def test_a_sample_is_drawn_from_the_pieces(tmp_path):
    source = lay(tmp_path, [chat(f"r{n}", "Hi", "Hello") for n in range(30)])
    whole = convert("sharegpt", source, tmp_path / "a", tokenizer=Words()) and rows_of(tmp_path / "a")
    part = convert("sharegpt", source, tmp_path / "b", tokenizer=Words(), num_examples=7) and rows_of(tmp_path / "b")
    assert len(part) == 7 and all(row in whole for row in part)


@pytest.fixture(scope="module")
def llama_like():
    "A byte-pair tokenizer that writes spaces as LLaMA's does, with merges among letters and among signs."
    from tokenizers import Tokenizer, models, normalizers, processors
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁"), ("!", "!"), ("!!", "?"), ("▁", "!"), ("ab", "ab"), ("é", "a"), ("═", "═"), ("b", "b"), ("▁a", "b"), ("▁▁", "▁a")]
    pieces = dict.fromkeys(["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ab!?é═ 1", *(left + right for left, right in merges)])
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


@given(texts=st.lists(st.text(alphabet=st.one_of(st.sampled_from("ab!?é═1 ▁\n\t<s>"), st.characters(exclude_categories=["Cs"]))), max_size=6))
@settings(max_examples=300, deadline=None)
def test_counts_are_the_tokenizers_own(llama_like, texts):
    assert safe_cuts(json.loads(llama_like.to_str()))
    for special in (True, False):
        assert token_counter(llama_like, special)(texts) == [len(llama_like.encode(text, add_special_tokens=special).ids) for text in texts]


def test_a_tokenizer_of_another_construction_is_never_cut(llama_like):
    base = json.loads(llama_like.to_str())
    assert joining_groups([("a▁", "b"), ("a", "b")]) == ["ab"] and joining_groups([("a", "▁b")]) is None
    for change in ({"normalizer": None}, {"pre_tokenizer": {"type": "Whitespace"}}, {"normalizer": {"type": "NFC"}},
                   *({"model": {**base["model"], name: value}} for name, value in (("type", "Unigram"), ("byte_fallback", False), ("dropout", 0.1), ("ignore_merges", True), ("end_of_word_suffix", "</w>"),
                                                                                    ("merges", [["a", "▁"], ["a", "▁a"]]), ("vocab", {"a": 0})))):
        assert safe_cuts({**base, **change}) is None


def test_limits_set_on_the_tokenizer_do_not_change_counts(llama_like):
    texts, limited = ["ab ab ab", "", "a <s> b"], type(llama_like).from_str(llama_like.to_str())
    limited.enable_truncation(2)
    limited.enable_padding(length=9)
    assert token_counter(limited)(texts) == token_counter(llama_like)(texts)


def mixed_talks(n, seed=1):
    "Talks of every kind: of one piece, of several, of none; with lost parts, with faults, with texts that look like the place between two records."
    rng, bits = random.Random(seed), ["ab", "}, {", '"}]}, {"id": "', "é═", "a!! b", "<s>", "\n", "1", "\\"]
    rows = [chat(f"t{i}", *[" ".join(rng.choices(bits, k=rng.randrange(1, 40))) for _ in range(rng.randrange(9))]) for i in range(n)]
    for row, (bad, _) in zip(rng.sample(rows, len(BAD)), BAD.values()):
        rows[rows.index(row)] = bad
    return rows


def everything(folder):
    return {path.name: path.read_bytes() for path in (folder / "sharegpt").iterdir()}


@pytest.mark.parametrize("protocol", ["paper", "fixed"])
@pytest.mark.parametrize("layout", ["compact", "indented", "a damaged second file"])
def test_any_number_of_workers_gives_the_same_bytes(layout, protocol, llama_like, tmp_path, monkeypatch):
    source = lay(tmp_path, mixed_talks(300), mixed_talks(120, seed=2))
    if layout == "indented":
        for name in FILES:
            path = source / "sharegpt" / name
            path.write_text(json.dumps(json.loads(path.read_text()), indent=1, ensure_ascii=True))
    elif layout == "a damaged second file":
        path = source / "sharegpt" / FILES[1]
        path.write_text(path.read_text()[:-30])
    made, parts = {}, []
    monkeypatch.setattr(streams.blocks_of, "__defaults__", (5000,))
    monkeypatch.setattr(conversion, "add_tallies", lambda *tallies, add=conversion.add_tallies: parts.append(1) or add(*tallies))
    for workers in (1, 2, 3):
        report = convert("sharegpt", source, tmp_path / str(workers), protocol, tokenizer=llama_like, max_length=400, workers=workers)
        made[workers] = (report, everything(tmp_path / str(workers)))
        assert bool(parts) == (workers > 1)
    assert made[1] == made[2] == made[3] and set(made[1][1]) == {"sharegpt_data.jsonl", "rejects.jsonl", "lost.jsonl", "report.json"}
    assert report.n_out > report.n_records > 200 and report.n_rejected > len(BAD) and report.lengths["assistant"]["n"] > 200
    assert len(parts) > 15 and {row["file"] for row in rows_of(tmp_path / "3", "lost.jsonl")} == set(FILES)


def test_a_tokenizer_of_any_kind_counts_in_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(streams.blocks_of, "__defaults__", (2000,))
    source = lay(tmp_path, mixed_talks(150))
    made = [(convert("sharegpt", source, tmp_path / str(workers), tokenizer=Words(), max_length=60, workers=workers), everything(tmp_path / str(workers))) for workers in (1, 2)]
    assert made[0] == made[1]


@pytest.mark.parametrize("size, several", [(1 << 17, False), (1 << 21, True)])
def test_several_cores_convert_what_is_large_and_never_a_sample(size, several, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "cores", lambda: 2)
    source, pools = lay(tmp_path, [chat(f"t{n}", "word " * 2000, "word " * 2000) for n in range(size // 40_000)], [chat("z", "word " * (size // 10), "y")]), []
    monkeypatch.setattr(conversion, "Pool", lambda *given, make=conversion.Pool: pools.append(1) or make(*given))
    convert("sharegpt", source, tmp_path / "out", tokenizer=Words())
    assert bool(pools) == several
    pools.clear()
    convert("sharegpt", source, tmp_path / "out", tokenizer=Words(), num_examples=1, max_length=100_000)
    assert not pools


def test_a_worker_that_is_killed_ends_the_conversion_with_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    parent, read = os.getpid(), sharegpt.read_pieces

    def deadly(row, **how):
        if os.getpid() != parent and row["id"] == "t70":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(row, **how)

    monkeypatch.setattr(sharegpt, "read_pieces", deadly)
    monkeypatch.setattr(streams.blocks_of, "__defaults__", (2000,))
    source = lay(tmp_path, [chat(f"t{n}", "Hi " * 30, "Hello") for n in range(150)])
    with pytest.raises(streams.WorkerLost, match="process [0-9]+, one of 2. was ended by signal 9.*workers=1"):
        convert("sharegpt", source, tmp_path / "out", tokenizer=Words(), workers=2)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
