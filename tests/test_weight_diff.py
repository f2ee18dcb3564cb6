"""Weight differences: there and back, in every format of weights, with memory for one tensor only; what does not fit is named."""
import json
import subprocess
import sys

import pytest
import torch

from tulu_study.training.weight_diff import WeightDiffError, make_diff, plan_shards, recover, tensors_in

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def model(vocabulary, seed=0, tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, **SHAPE)).float()


def as_bin(one, folder, shards=1):
    "Save as in 2023: pickled, with the rotary frequencies among the weights."
    folder.mkdir()
    one.config.save_pretrained(folder)
    state = {**one.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    names = list(state)
    where = {name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, name in enumerate(names)}
    if shards == 1: return torch.save(state, folder / "pytorch_model.bin")
    for file in set(where.values()): torch.save({n: state[n] for n in names if where[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.fixture
def pair(tmp_path):
    base, tuned = model(12), model(13, seed=1)
    base.half().float().save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    return tmp_path, base, tuned


def state(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def test_there_and_back(pair):
    root, base, tuned = pair
    made = make_diff(root / "base", root / "tuned", root / "diff", shard_bytes=20_000)
    assert len(made["files"]) > 2 and made["new_rows"] == 2 and made["max_error"] < 1e-8
    report = recover(root / "base", root / "diff", root / "back", shard_bytes=10**6)
    assert report["verified"] and list(report["files"]) == ["model.safetensors"]
    back = state(root / "back")
    assert max((back[name] - tensor).abs().max().item() for name, tensor in tuned.state_dict().items()) == made["max_error"]


def test_the_same_bits_as_the_plain_formula(pair):
    root, base, tuned = pair
    make_diff(root / "base", root / "tuned", root / "diff")
    diff, old = state(root / "diff"), state(root / "base")
    for name, tensor in tuned.state_dict().items():
        rows = old[name].shape[0]
        assert torch.equal(diff[name][:rows], tensor[:rows] - old[name])
        assert diff[name].dtype == torch.float32


def test_the_published_layout(tmp_path):
    "Pickled shards, one row more than the base, rotary frequencies in both or in one, no checksums; the padding row gets the mean."
    base, tuned = model(32).half(), model(33, seed=1)
    as_bin(base, tmp_path / "base", shards=3)
    old = {name: tensor.float() for name, tensor in base.state_dict().items()}
    published = {name: tensor - torch.cat([old[name], torch.randn(1, 32) * 0.02]) if tensor.shape != old[name].shape else tensor - old[name] for name, tensor in tuned.state_dict().items()}
    diff = model(33)
    diff.load_state_dict(published)
    as_bin(diff, tmp_path / "diff", shards=2)
    report = recover(tmp_path / "base", tmp_path / "diff", tmp_path / "back")
    assert (report["verified"], report["new_rows"]) == (False, 2)
    back = state(tmp_path / "back")
    for name, tensor in tuned.state_dict().items(): assert (back[name][:32] - tensor[:32]).abs().max() < 1e-7
    expected = published["lm_head.weight"][32] + old["lm_head.weight"].mean(0)
    assert (back["lm_head.weight"][32] - expected).abs().max() < 1e-8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_back_in_sixteen_bits(pair, dtype):
    root, _, tuned = pair
    tuned.to(getattr(torch, dtype)).save_pretrained(root / "half")
    make_diff(root / "base", root / "half", root / "diff")
    recover(root / "base", root / "diff", root / "back", dtype=dtype)
    back = state(root / "back")
    assert json.loads((root / "back" / "config.json").read_text())["dtype"] == dtype
    assert all(torch.equal(back[name], tensor) for name, tensor in tuned.state_dict().items())


def test_tied_embeddings(tmp_path):
    model(12, tied=True).save_pretrained(tmp_path / "base")
    as_bin(model(12, seed=1, tied=True), tmp_path / "tuned")   # holds the output layer a second time
    make_diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "diff")
    recover(tmp_path / "base", tmp_path / "diff", tmp_path / "back")
    assert (state(tmp_path / "back")["lm_head.weight"] - model(12, seed=1, tied=True).lm_head.weight).abs().max() < 1e-7


def test_every_mismatch_is_named(pair):
    root, _, tuned = pair
    from safetensors.torch import load_file, save_file
    weights = load_file(root / "tuned" / "model.safetensors")
    weights["model.norm.bias"] = weights.pop("model.norm.weight")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(4, 4)
    save_file(weights, root / "tuned" / "model.safetensors")
    with pytest.raises(WeightDiffError) as error: make_diff(root / "base", root / "tuned", root / "diff")
    assert all(part in str(error.value) for part in ("3 mismatches", "model.norm.weight: in the base model only", "model.norm.bias: in the other folder only", "has [48, 32], the other folder [4, 4]"))
    assert not (root / "diff").exists()


def test_damage_and_the_wrong_base(pair):
    root, _, _ = pair
    make_diff(root / "base", root / "tuned", root / "diff")
    model(12, seed=5).save_pretrained(root / "other")
    with pytest.raises(WeightDiffError, match="another version of the base model"): recover(root / "other", root / "diff", root / "back")
    file = root / "diff" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(WeightDiffError, match="model.safetensors: another checksum"): recover(root / "base", root / "diff", root / "back")
    assert not list((root / "back").glob("*.safetensors"))


@pytest.mark.parametrize("place,message", [("tuned", "read from as well"), ("empty", "holds no weights"), ("full", "holds model.safetensors already")])
def test_folders(pair, place, message):
    root, _, _ = pair
    (root / "empty").mkdir()
    model(12).save_pretrained(root / "full")
    tuned = "empty" if place == "empty" else "tuned"
    with pytest.raises(WeightDiffError, match=message): make_diff(root / "base", root / tuned, root / (place if place != "empty" else "out"))


def test_a_cut_off_index(pair):
    root, base, _ = pair
    as_bin(base, root / "cut", shards=3)
    (root / "cut" / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(WeightDiffError, match="lacks 1 of 3 weight files: pytorch_model-00002-of-00003.bin"): tensors_in(root / "cut")


def test_no_code_in_a_bin_file(tmp_path):
    import os, pickle
    class Evil:
        def __reduce__(self): return os.system, ("true",)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError): tensors_in(tmp_path)


def test_plan_of_files():
    shards = plan_shards({"a": (3,), "large": (100,), "b": (3,), "scalar": ()}, shard_bytes=40)
    assert [list(shard) for shard in shards] == [["a"], ["large"], ["b", "scalar"]]
    assert shards[2]["scalar"] == {"dtype": "F32", "shape": [], "data_offsets": [12, 16]}


MEASURE = """
import json, sys, torch
from safetensors.torch import save_file
from pathlib import Path
root, count, side = Path(sys.argv[1]), 12, 1500
for name, seed in (("base", 0), ("tuned", 1)):
    (root/name).mkdir()
    (root/name/"config.json").write_text("{}")
    for i in range(count): save_file({f"t{i}": torch.randn(side, side)}, root/name/f"model-{i}.safetensors")
    (root/name/"model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"t{i}": f"model-{i}.safetensors" for i in range(count)}}))
from tulu_study.training.weight_diff import make_diff, recover
def anonymous(): return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
import tulu_study.training.weight_diff as module
make_diff(root/"base", root/"tuned", root/"first")
peak, before, real = 0, anonymous(), module._bytes
def watched(tensor):
    global peak
    peak = max(peak, anonymous() - before)
    return real(tensor)
module._bytes = watched
recover(root/"base", root/"first", root/"back")
print(peak / (side * side * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_few_tensors(tmp_path):
    "Twelve tensors pass through; memory holds no more than five at a time (two to add, their sum, and what the allocator keeps)."
    found = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 5
