"""Low-rank adaptation end to end on the CPU: what trains, what is saved, and that merging changes nothing."""
import json, sys, types

import pytest
import torch

from finetunings import fork, log, place, settings, train, weights  # noqa: F401 (fork, place and train are fixtures)
from tulu_study.core.params import StudyTraining
from tulu_study.training.config import TrainingError
from tulu_study.training.finetune import load_model
from tulu_study.training.launch import launch
from tulu_study.training.lora import TARGETS, adapter_norms, dequantised, quantised, release
from tulu_study.training.tokenizers import load_tokenizer
from tulu_study.training.verification import verify

SMALL = {"rank": 4, "alpha": 8, "dropout": 0.0}
ALL = {"llama": 7 * 2, "opt": 6, "gpt_neox": 4}   # linear layers of the tiny models


def base_of(config):
    "The base model with its grown embedding, as training begins."
    model, _ = load_model(settings(config[0], "x", **{**config[1], "lora": {}}), len(load_tokenizer(config[0] / config[1].get("family", "llama"), config[1].get("family", "llama"))))
    return model


@pytest.mark.parametrize("name, changes", [
    ("packed", {}), ("padded", {"packing": False}), ("zero-3", {"zero_stage": 3}), ("two", {"ranks": 2}), ("microbatch", {"packing": False, "loss": "microbatch"}),
    ("bf16", {"precision": "bf16", "gradient_checkpointing": True}), ("opt", {"family": "opt", "learning_rate": 2e-2}), ("gpt_neox", {"family": "gpt_neox", "learning_rate": 2e-2})])
def test_only_the_adapter_trains_and_merging_changes_nothing(place, train, name, changes):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    folder = train(f"lora-{name}", lora=SMALL, **changes)
    rows = log(folder)
    assert rows[-1]["loss"] < rows[0]["loss"]
    base = base_of((place, changes))
    embeddings = base.get_input_embeddings().weight.detach().clone()
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert merged.dtype == torch.float32 and torch.equal(merged.get_input_embeddings().weight, embeddings)   # the new row too
    before, after = base.state_dict(), merged.state_dict()
    moved = {n for n in after if not torch.equal(before[n], after[n])}
    assert len(moved) == ALL[changes.get("family", "llama")] and all(n.split(".")[-2] in TARGETS[changes.get("family", "llama")] for n in moved)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    ids = torch.arange(5, 45)[None]
    base.set_attn_implementation("sdpa")
    with torch.no_grad(): assert (adapted(input_ids=ids).logits - merged.eval()(input_ids=ids).logits).abs().max() < 1e-5


def test_paddings_and_ranks_give_the_same_adapter(train):
    one = weights(train("lora-packed", lora=SMALL))
    for name, changes in (("padded", {"packing": False}), ("zero-3", {"zero_stage": 3}), ("two", {"ranks": 2})):
        other = weights(train(f"lora-{name}", lora=SMALL, **changes))
        assert max((one[n] - other[n]).abs().max().item() for n in one) < 1e-4, name


def test_what_is_written(train):
    folder = train("lora-packed", lora=SMALL)
    trained = json.loads((folder / "trained.json").read_text())
    assert len(trained["adapter"]) == 28 and trained["settings"]["lora"] == SMALL
    checks = {row["check"]: row["passed"] for row in json.loads((folder / "verification.json").read_text())}
    assert all(checks.values()) and "matrices of the adapter" in checks
    said = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], sorted(said["target_modules"])) == (4, 8, sorted(TARGETS["llama"])) and "/" not in said["base_model_name_or_path"]


def test_a_damaged_adapter_is_noticed(train):
    from safetensors.torch import load_file, save_file
    folder = train("lora-packed", lora=SMALL)
    file = folder / "adapter" / "adapter_model.safetensors"
    kept, tensors = file.read_bytes(), load_file(file)
    save_file({n: t * (2 if "lora_B" in n else 1) for n, t in tensors.items()}, file)
    try:
        with pytest.raises(TrainingError, match="norm in the adapter"): verify(folder)
    finally: file.write_bytes(kept)
    assert len(adapter_norms(folder)) == 28


def test_own_targets(place, train):
    folder = train("lora-own", lora={**SMALL, "targets": ["q_proj", "v_proj"]})
    assert len(json.loads((folder / "trained.json").read_text())["adapter"]) == 8   # the library's default, as in the paper's code
    with pytest.raises(TrainingError, match="lora.targets: found nothing_proj, which no layer of this model is called; expected some of q_proj"):
        load_model(settings(place, "x", lora={"targets": ["q_proj", "nothing_proj"]}), 260)


@pytest.mark.parametrize("lora, changes, message", [
    ({"rnk": 8}, {}, "lora.rnk: found 8.*the settings are rank, alpha"), ({"rank": 0}, {}, "lora.rank: found 0"), ({"dropout": 1.5}, {}, "lora.dropout"),
    ({"qlora": True}, {}, "lora.qlora: found true with zero_stage 2"), ({"qlora": True}, {"zero_stage": 0}, "lora.qlora: found true with precision fp32")])
def test_settings_that_do_not_work(place, lora, changes, message):
    with pytest.raises(TrainingError, match=message): settings(place, "x", lora=lora, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_qlora_needs_cuda(place):
    config = settings(place, "qlora", lora={"qlora": True}, zero_stage=0, precision="bf16")
    with pytest.raises(TrainingError, match="there is no CUDA device.*take qlora: false"): quantised(config)
    with pytest.raises(TrainingError, match="there is no CUDA device"): launch(config)   # before a process is started


@pytest.fixture
def whole_numbers(place, monkeypatch):
    "A model as QLoRA loads it, by a made-up bitsandbytes whose layers hold whole numbers with one scale each in place of 4 bits."
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.base import HfQuantizer
    class Layer(torch.nn.Linear): pass
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", types.SimpleNamespace(Linear4bit=Layer))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", types.SimpleNamespace(dequantize_4bit=lambda data, state: (data * state).bfloat16()))
    model = AutoModelForCausalLM.from_pretrained(place / "opt", dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or name == "lm_head": continue
        layer, scale = Layer(module.in_features, module.out_features), module.weight.abs().max().float() / 7
        layer.weight, layer.bias = torch.nn.Parameter((module.weight / scale).round().to(torch.int8), requires_grad=False), module.bias
        layer.quant_state = layer.weight.quant_state = scale
        model.set_submodule(name, layer)
    model.is_quantized, model.hf_quantizer = True, types.SimpleNamespace(remove_quantization_config=lambda model: HfQuantizer.remove_quantization_config(None, model))
    return model


def test_a_merge_gets_float32_layers_of_what_the_small_numbers_stand_for(whole_numbers):
    expected = {name: (module.weight * module.weight.quant_state).bfloat16().float() if hasattr(module, "quant_state") else module.weight.float() for name, module in whole_numbers.named_modules() if getattr(module, "weight", None) is not None}
    found = dequantised(whole_numbers)
    assert sum(type(module) is torch.nn.Linear for module in found.modules()) == ALL["opt"] + 1 and {p.dtype for p in found.parameters()} == {torch.float32} and not found.is_quantized
    for name, weight in expected.items(): assert torch.equal(found.get_submodule(name).weight, weight), name


def test_a_trained_model_gives_its_memory_back_to_the_merge(whole_numbers):
    held = dict(whole_numbers.named_parameters())   # as a trainer and its optimiser hold them
    release(whole_numbers)
    assert held and all(parameter.numel() == 0 and getattr(parameter, "quant_state", None) is None for parameter in held.values())
    assert all(getattr(module, "quant_state", None) is None for module in whole_numbers.modules())


def test_a_study_file_may_ask_for_it():
    assert StudyTraining().lora == {} and StudyTraining(lora={"rank": 8}).lora == {"rank": 8}
    with pytest.raises(ValueError, match="rank"): StudyTraining(lora={"rank": -1})
