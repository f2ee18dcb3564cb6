"Mixes: concatenations to the byte, and mixes of one's own that come out the same every time."
import json
import random

import pytest

from tulu_study.core.files import read_jsonl, sha256_file, write_jsonl
from tulu_study.core.params import Mix, ParamsError, mixes
from tulu_study.data import mixes as mixing
from tulu_study.data.conversion import DatasetError
from tulu_study.data.export import export_dataset
from tulu_study.data.mixes import mix_datasets, name_in


def talk(key, i, text="a question"):
    return {"dataset": key, "id": f"{key}_{i}", "messages": [{"role": "user", "content": f"{text} {i}"}, {"role": "assistant", "content": "ünïcode"}]}


@pytest.fixture
def data(tmp_path):
    "Three converted parts: dolly (10), cot (6; number 3 names a model), oasst1 (4; all name one)."
    write_jsonl(tmp_path / "dolly/dolly_data.jsonl", (talk("dolly", i) for i in range(10)), ensure_ascii=True)
    write_jsonl(tmp_path / "cot/cot_data.jsonl", (talk("cot", i, "ask chatgpt" if i == 3 else "sum") for i in range(6)), ensure_ascii=True)
    write_jsonl(tmp_path / "oasst1/oasst1_data.jsonl", (talk("oasst1", i, "I am Open Assistant") for i in range(4)), ensure_ascii=True)
    return tmp_path


def made(data, **record):
    "Make a mix; its ids, its report and its folder."
    mix = Mix(**({"key": "mine", "name": "Mine"} | record))
    report = mix_datasets(mix, data, data)
    return [row["id"] for row in read_jsonl(data / mix.key / f"{mix.key}_data.jsonl")], report, data / mix.key


def test_a_plain_mix_is_the_bytes_of_its_parts(data):
    ids, report, folder = made(data, parts=["oasst1", "dolly", "cot"])
    assert (folder / "mine_data.jsonl").read_bytes() == b"".join((data / k / f"{k}_data.jsonl").read_bytes() for k in ("oasst1", "dolly", "cot"))
    assert [p["n_in"] for p in report.parts] == [p["n_out"] for p in report.parts] == [4, 10, 6]
    assert (report.protocol, report.n_in, report.n_records, report.n_rejected, report.n_out) == ("concatenation", 20, 20, 0, 20)
    assert report.parts[0]["sha256"] == sha256_file(data / "oasst1/oasst1_data.jsonl") and not (folder / "mine_filtered.jsonl").exists()
    assert json.loads((folder / "report.json").read_text())["parts"] == report.parts


def test_weights_of_one_and_caps_that_do_not_bite_change_no_byte(data):
    made(data, parts=["dolly", "cot"])
    plain = (data / "mine/mine_data.jsonl").read_bytes()
    made(data, parts=["dolly", "cot"], weights={"dolly": 1}, caps={"cot": 6}, exclude=["no such name"])
    assert (data / "mine/mine_data.jsonl").read_bytes() == plain


@pytest.mark.parametrize("weight, n", [(0.5, 5), (1, 10), (2, 20), (2.5, 25), (0.01, 0), (0.06, 1)])
def test_a_weight_takes_so_many_and_keeps_the_order(data, weight, n):
    ids, report, _ = made(data, parts=["dolly", "cot"], weights={"dolly": weight})
    taken = [i for i in ids if i.startswith("dolly")]
    assert len(taken) == n == report.parts[0]["n_out"] and taken == sorted(taken, key=lambda i: int(i.split("_")[1]))
    assert max((taken.count(i) for i in taken), default=0) <= -(-n // 10) and ids[n:] == [f"cot_{i}" for i in range(6)]
    assert report.parts[0]["n_in"] == 10 and report.parts[0]["n_not_drawn"] == max(10 - n, 0)


def test_caps_bound_weights(data):
    ids, report, _ = made(data, parts=["dolly"], weights={"dolly": 3}, caps={"dolly": 12})
    assert len(ids) == 12 == report.n_out and all(ids.count(f"dolly_{i}") in (1, 2) for i in range(10))


def test_draws_belong_to_mix_part_and_seed_alone(data):
    state = random.getstate()
    alone = made(data, parts=["dolly"], caps={"dolly": 4})[0]
    among = made(data, parts=["cot", "dolly"], caps={"dolly": 4, "cot": 2})[0]
    assert [i for i in among if i.startswith("dolly")] == alone and random.getstate() == state
    drawn = {tuple(made(data, parts=["dolly"], caps={"dolly": 4}, seed=seed)[0]) for seed in range(6)}
    assert len(drawn) > 2 and tuple(alone) == tuple(made(data, parts=["dolly"], caps={"dolly": 4}, seed=42)[0])


def test_names_are_left_out_and_kept_beside_the_mix(data):
    ids, report, folder = made(data, parts=["cot", "oasst1", "dolly"], exclude=["ChatGPT", "open assistant"], caps={"dolly": 3})
    left = list(read_jsonl(folder / "mine_filtered.jsonl"))
    assert [(r["id"], r["name"]) for r in left] == [("cot_3", "ChatGPT")] + [(f"oasst1_{i}", "open assistant") for i in range(4)]
    assert {k: v for k, v in left[0].items() if k != "name"} == talk("cot", 3, "ask chatgpt"), "a row is set aside as it is"
    assert "cot_3" not in ids and len(ids) == 5 + 0 + 3
    assert report.reasons == {"names open assistant": 4, "names ChatGPT": 1} and report.n_in == report.n_records + report.n_rejected == 20
    assert [(p["n_in"], p["n_excluded"], p["n_not_drawn"], p["n_out"]) for p in report.parts] == [(6, 1, 0, 5), (4, 4, 0, 0), (10, 0, 7, 3)]
    assert report.options["exclude"] == ["ChatGPT", "open assistant"] and report.protocol == "selection" and report.seed == 42


def test_exempt_parts_keep_their_names_and_caps_count_what_stays(data):
    ids, report, _ = made(data, parts=["cot", "oasst1"], exclude=["chat", "assistant"], exempt=["oasst1"], weights={"cot": 0.4})
    assert ids[-4:] == [f"oasst1_{i}" for i in range(4)] and report.parts[1]["n_excluded"] == 0
    assert len(ids) == 2 + 4, "0.4 of the five that stay"


def test_a_mix_that_no_longer_filters_leaves_no_old_file(data):
    made(data, parts=["cot"], exclude=["chatgpt"])
    assert (data / "mine/mine_filtered.jsonl").exists()
    made(data, parts=["cot"])
    assert not (data / "mine/mine_filtered.jsonl").exists()


def test_only_every_message_decides(data):
    messages = [{"role": "system", "content": "GPT-4"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "CLAUDE"}]
    assert name_in(messages, ["claude", "gpt-4"]) == "claude" and name_in(messages[1:2], ["claude"]) == "" and name_in([], ["a"]) == ""


def test_a_killed_mix_leaves_the_old_file(data, monkeypatch):
    made(data, parts=["dolly"])
    before = (data / "mine/mine_data.jsonl").read_bytes()
    monkeypatch.setattr(mixing, "selected_rows", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): made(data, parts=["dolly"], caps={"dolly": 2})
    assert (data / "mine/mine_data.jsonl").read_bytes() == before and [p.name for p in (data / "mine").glob(".*")] == []


def test_a_damaged_part_is_named_with_its_line(data):
    with open(data / "cot/cot_data.jsonl", "a") as f: f.write('{"cut o')
    with pytest.raises(ValueError, match="cot_data.jsonl, line 7"): made(data, parts=["dolly", "cot"], caps={"dolly": 1})


@pytest.mark.parametrize("line, said", [(b"[]", "found '..'"), (b'{"id": "x"}', "list of messages"), (b'{"messages": []}', "an id"), (b'{"id": "x", "messages": ["hi"]}', "list of messages"), (b"\xff", "not UTF-8")])
@pytest.mark.parametrize("more", [{}, {"exclude": ["zz"]}, {"weights": {"cot": 1.5}}])
def test_what_is_no_conversation_is_named_with_its_place(data, line, said, more):
    path = data / "cot/cot_data.jsonl"
    n = len(path.read_bytes().splitlines())
    with open(path, "ab") as f: f.write(line + b"\n")
    with pytest.raises(ValueError, match=f"cot_data.jsonl, (conversation {n + 1}|after conversation [0-9]+):.*{said}"): made(data, parts=["dolly", "cot"], **more)
    with pytest.raises(ValueError, match="cot_data.jsonl"): export_dataset(data / "cot", data / "out", "axolotl")


RECORDS = {
    "{name: a, parts: [dolly], weights: {dolly: 0}}": "line 4: mixes.mine.weights.dolly: Input should be greater than 0",
    "{name: a, parts: [dolly], weights: {dolly: -1}}": "greater than 0",
    "{name: a, parts: [dolly], weights: {dolly: .nan}}": "mixes.mine.weights.dolly",
    "{name: a, parts: [dolly], weights: {dolly: .inf}}": "mixes.mine.weights.dolly",
    "{name: a, parts: [dolly], weights: {cot: 2}}": "mixes.mine.weights: no part cot; the parts of this mix are dolly",
    "{name: a, parts: [dolly], caps: {cot: 2}}": "mixes.mine.caps: no part cot",
    "{name: a, parts: [dolly], caps: {dolly: 0}}": "mixes.mine.caps.dolly",
    "{name: a, parts: [dolly], caps: {dolly: 1.5}}": "mixes.mine.caps.dolly",
    "{name: a, parts: [dolly], exempt: [cot]}": "mixes.mine.exempt: no part cot",
    "{name: a, parts: [dolly], exclude: [' ']}": "mixes.mine.exclude.0",
    "{name: a, parts: [dolly], exclude: ChatGPT}": "mixes.mine.exclude: Input should be a valid list",
    "{name: a, parts: [dolly, dolly]}": "mixes.mine.parts: dolly stands twice",
    "{name: a, parts: []}": "mixes.mine.parts",
    "{name: a, parts: [dolly, cott]}": "mixes.mine.parts.1: no dataset 'cott'; there are dolly",
    "{name: a, parts: [dolly], weigths: {dolly: 2}}": "mixes.mine.weigths: unknown key",
    "{name: a, parts: [dolly], seed: x}": "mixes.mine.seed",
    "[dolly]": "mixes.mine: expected a mapping",
}


@pytest.mark.parametrize("record", RECORDS)
def test_impossible_records_are_refused_with_file_and_line(project, record):
    (project / "params" / "datasets.yaml").write_text(f"datasets:\n  dolly: {{name: Dolly, folder: dolly, authors: x, licence: y}}\nmixes:\n  mine: {record}\n")
    with pytest.raises(ParamsError) as e: mixes()
    assert "datasets.yaml, line 4: mixes.mine" in str(e.value) and RECORDS[record] in str(e.value)


def test_a_mix_may_not_take_the_key_of_a_dataset(project):
    (project / "params" / "datasets.yaml").write_text("datasets:\n  dolly: {name: Dolly, folder: dolly, authors: x, licence: y}\nmixes:\n  dolly: {name: a, parts: [dolly]}\n")
    with pytest.raises(ParamsError, match="line 4: mixes.dolly: a dataset has this key already"): mixes()


def test_the_mixes_of_the_paper_are_plain(data):
    found = mixes()
    assert all(found[key].plain for key in ("human_mix", "tulu_mix", "nano_mix")) and found["tulu_mix_unnamed"].parts == found["tulu_mix"].parts
    with pytest.raises(DatasetError, match="tulu_mix_unnamed: no conversations of flan_v2"): mix_datasets("tulu_mix_unnamed", data, data)


def test_a_plain_mix_is_as_long_as_its_parts_together(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tulu_study.core.files import read_jsonl
    from tulu_study.data import convert
    from tulu_study.data.counting import Lengths, token_lengths
    from tulu_study.world.sources import write_raw
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for key, n in (("dolly", 30), ("oasst1", 20)):
        write_raw(key, tmp_path / "raw", n=n)
        convert(key, tmp_path / "raw", tmp_path, tokenizer=words)
    mix = Mix(key="two", name="Two", parts=["dolly", "oasst1"])
    report, whole = mix_datasets(mix, tmp_path, tmp_path / "out"), Lengths(words)
    whole.add([row["messages"] for row in read_jsonl(tmp_path / "out" / "two" / "two_data.jsonl")])
    counted = token_lengths(whole, report.lengths["tokenizer"])
    assert report.lengths["over"] == counted["over"] and report.lengths["table1"] == pytest.approx(counted["table1"])
    for kind in ("user", "assistant", "total"):
        assert report.lengths[kind] == pytest.approx({name: counted[kind][name] for name in ("n", "mean", "max")})
    assert mix_datasets(mix.model_copy(update={"caps": {"dolly": 5}}), tmp_path, tmp_path / "out").lengths is None
    convert("dolly", tmp_path / "raw", tmp_path)   # not measured any more
    assert mix_datasets(mix, tmp_path, tmp_path / "out").lengths is None
