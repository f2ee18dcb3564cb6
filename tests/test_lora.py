"""Low-rank adaptation end to end on the CPU: what trains, what is saved, and that merging changes nothing."""
import json

import pytest
import torch

from finetunings import fork, log, place, settings, train, weights  # noqa: F401 (fork, place and train are fixtures)
from tulu_study.core.params import StudyTraining
from tulu_study.training.config import TrainingError
from tulu_study.training.finetune import load_model
from tulu_study.training.launch import launch
from tulu_study.training.lora import TARGETS, adapter_norms, quantised
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


def test_a_study_file_may_ask_for_it():
    assert StudyTraining().lora == {} and StudyTraining(lora={"rank": 8}).lora == {"rank": 8}
    with pytest.raises(ValueError, match="rank"): StudyTraining(lora={"rank": -1})
