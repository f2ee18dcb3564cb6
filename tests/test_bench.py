"""The benchmark of training runs, and compares what it says it compares. How fast anything is, no test asks: `make bench-train` does."""
import importlib.util
import os
import re
import subprocess
import sys

import pytest

from finetunings import byte_tokenizer
from helpers import ROOT


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_train", ROOT / "bench" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Invented raw files, and a tokenizer of bytes."
    from tulu_study.world.sources import write_raw
    root = tmp_path_factory.mktemp("bench")
    write_raw("code_alpaca", root, n=40)
    byte_tokenizer("<unk>", "<s>", "</s>", bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(root / "bytes")
    return root


def supervised_tokens(place, conversations):
    "Counted here, from the raw files on."
    from tulu_study.core.files import read_jsonl
    from tulu_study.data import convert
    from tulu_study.training import encode_all, load_tokenizer
    from tulu_study.training.finetune import sample_conversations
    convert("code_alpaca", place, place / "counted")
    rows = list(read_jsonl(place / "counted" / "code_alpaca" / "code_alpaca_data.jsonl"))
    encoded = encode_all(sample_conversations(rows, conversations, 42)[0], load_tokenizer(place / "bytes", "llama"), 512).rows
    return sum(label != -100 for row in encoded for label in row["labels"][1:])


def test_the_training_benchmark_runs_and_all_contenders_learn_from_the_same_tokens(place, bench):
    done = subprocess.run([sys.executable, "bench/train.py", "--models", "tiny", "--sources", place, "--tokenizer", place / "bytes", "--rows", "16", "--batch-size", "8", "--epochs", "2", "--rounds", "1", "--no-install", "--no-compile"],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    learnt = re.search(r"supervised tokens that each contender learnt from: ([\d,]+)", done.stdout)
    assert int(learnt[1].replace(",", "")) == 2 * supervised_tokens(place, 16)
    ratios = dict(re.findall(r"ours against ([^:]+?), (?:supervised )?tokens/s: ([\d.]+) ×", done.stdout))
    absent = "TRL: not measured, .bench/trl-1.16.0 is not there" in done.stdout
    assert {"dense", "reference's way"} <= set(ratios) and all(float(ratio) > 0 for ratio in ratios.values())
    assert absent != any(name.startswith("TRL packing") for name in ratios)
    lines = {name: next(line for line in done.stdout.splitlines() if line.startswith(f"{name}  ")) for name in bench.STACK}
    padding = {name: float(re.findall(r"([\d.]+)%", line)[0]) for name, line in lines.items()}
    assert padding["dense"] == 0.0 and padding["reference's way"] > padding["ours"]


def test_dense_rows_hold_the_same_tokens_in_equal_lengths(bench):
    rows = [{"input_ids": [*range(k, k + n)], "labels": [-100, *range(k + 1, k + n)]} for k, n in ((0, 7), (100, 4), (200, 10))]
    dense = bench.joined(rows, 3)
    assert [len(row["input_ids"]) for row in dense] == [7, 7, 7] == [len(row["labels"]) for row in dense]
    for key in ("input_ids", "labels"): assert [i for row in dense for i in row[key]] == [i for row in rows for i in row[key]]


def test_a_ratio_below_its_target_is_counted(bench, monkeypatch, tmp_path, capsys):
    "Ours twice as fast as dense, three times as fast as the reference's way, and only 1.1 times as fast as the faster TRL."
    speeds = {bench.OURS: 3.3, bench.DENSE: 1.65, bench.REFERENCE: 1.1, bench.FLOAT: 1.0, bench.BF16: 3.0}
    made = lambda name: {"seconds": 60 / speeds[name], "cpu": 1.0, "steps": 3, "tokens": 120, "supervised": 60, "trained": 90, "starting": 1.0, "first": 1.0, "peak": 1 << 20, "padding_share": 0.0, "attention_waste": 0.0}
    monkeypatch.setattr(bench, "prepare", lambda *_: dict.fromkeys(speeds, tmp_path))
    monkeypatch.setattr(bench, "run", lambda name, *_: made(name))
    given = type("Given", (), {"rounds": 3, "compile": False})
    assert bench.race("13m", given, tmp_path, "") == 1
    said = capsys.readouterr().out
    assert "ours against dense, tokens/s: 2.00 × (2.00–2.00; target 0.85)\n" in said and "TRL packing, bf16 weights, supervised tokens/s: 1.10 × (1.10–1.10; target 2.5), missed" in said
    assert bench.race("13m", given, tmp_path, "it is not there") == 0
    monkeypatch.setattr(bench, "run", lambda name, *_: made(name) | {"trained": 91 if name == bench.OURS else 90})
    with pytest.raises(SystemExit, match="different numbers of supervised tokens"): bench.race("13m", given, tmp_path, "")


@pytest.fixture(scope="module")
def gpu():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_the_gpu_benchmark_measures_beside_the_plan(gpu, place, tmp_path, monkeypatch):
    "On the processor, in small; what only a GPU can tell is put in by hand."
    import csv
    from tulu_study.training.scale import training_flops
    monkeypatch.setitem(gpu.CASES, "tiny", ("smollm2-135m", {"gradient_checkpointing": True}))
    monkeypatch.setattr(gpu, "BATCH", 8)
    base = tmp_path / "base"
    gpu.train.make_model("tiny", base, place, place / "bytes")
    rows = gpu.conversations(place, place / "bytes", tmp_path, 16)
    found = gpu.measure("tiny", 1, base, tmp_path, rows)
    record, memory, _ = gpu.planned(*gpu.CASES["tiny"])
    assert found["steps"] == 2 and found["trained"] == sum(label != -100 for row in rows for label in row["labels"][1:])
    tokens = [len(row["input_ids"]) for row in rows]
    assert found["flops"] * found["seconds"] == pytest.approx(training_flops(record, found["tokens"], sum(tokens) / len(tokens), True)) and 0 < found["tokens"] < sum(tokens)
    assert found["planned"] == memory.device > found["planned_used"] == memory.device - memory.buffers
    found["reserved"] = 3 << 30
    assert gpu.shown(found).startswith("tiny ") and " 3.0 " in gpu.shown(found) and len(gpu.shown(found)) == len(gpu.HEAD)
    row = gpu.written(found, "a card")
    assert row["gradient_checkpointing"] and row["layers"] == 30 and row["kv_heads"] == 3 and row["reserved_bytes"] == 3 << 30
    with open(ROOT / "nbs" / "training" / "measured_gpu.csv") as f: kept = list(csv.DictReader(f))
    assert list(row) == list(kept[0]) and {one["training"] for one in kept} <= set(gpu.CASES)


def test_the_plan_of_every_gpu_case(gpu):
    planned = {name: gpu.planned(*case)[1].device for name, case in gpu.CASES.items()}
    assert planned["7b"] > planned["7b-lora"] > planned["7b-qlora"] and planned["1b"] > planned["1b-checkpointing"] > planned["1b-offload"] and planned["1b"] == planned["1b-padded"] == planned["1b-compiled"]


def test_a_process_of_its_own_calls_and_answers(gpu):
    assert gpu.apart(os.getpid) != os.getpid()


def test_without_a_gpu_the_gpu_benchmark_says_so(place):
    done = subprocess.run([sys.executable, "bench/gpu.py", "--sources", place], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "found no CUDA device; `make bench-train` measures on the processor" in done.stderr
