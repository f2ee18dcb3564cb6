"Pre-training of the nano base models: the same bytes for the same seed, a complete Hugging Face folder, a recall that can tell knowing from not knowing."
import json
from types import SimpleNamespace

import pytest

from tulu_study.core.files import read_jsonl
from tulu_study.core.params import models
from tulu_study.training.pretrain import packed_batches, pretrain, recall
from tulu_study.world.writing import write_world

SHAPE = {"layers": 1, "width": 32, "heads": 1, "inner": 48, "positions": 256, "rope_theta": 100, "init": 0.1}
SETTINGS = {"phases": [{"steps": 8, "batch_size": 2, "block": 32}, {"steps": 2, "batch_size": 1, "block": 64}], "learning_rate": 5e-3, "warmup_steps": 2, "weight_decay": 0.1, "beta2": 0.98}
TINY = SimpleNamespace(shape=SHAPE, pretrain=SETTINGS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_world(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_ten_steps_are_the_same_to_the_byte(sources, tmp_path):
    made = [pretrain(TINY, sources, tmp_path / name, seed) for name, seed in (("one", 42), ("two", 42), ("other", 43))]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other")]
    assert weights[0] == weights[1] != weights[2]
    assert made[0] == made[1] and made[0]["tokens"] == 8 * 64 + 2 * 64
    log = list(read_jsonl(tmp_path / "one" / "training_log.jsonl"))
    assert set(log[0]) == {"step", "loss", "learning_rate", "tokens", "supervised_tokens", "seconds"}
    assert [row["step"] for row in log] == list(range(1, 11)) and log[-1]["loss"] < log[0]["loss"]


def test_folder_loads_as_any_other(sources, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    pretrain(TINY, sources, tmp_path / "base")
    assert AutoConfig.from_pretrained(tmp_path / "base").model_type == "llama"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


def test_a_rerun_starts_its_log_anew(sources, tmp_path):
    for _ in range(2): pretrain(TINY, sources, tmp_path / "base")
    assert len(list(read_jsonl(tmp_path / "base" / "training_log.jsonl"))) == 10


def test_missing_world_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="write the world first"): pretrain(TINY, tmp_path, tmp_path / "base")


def test_untrained_model_knows_next_to_nothing(sources, tmp_path):
    pretrain(TINY, sources, tmp_path / "base")
    facts = json.loads((sources / "world" / "facts.json").read_text())
    known = recall(tmp_path / "base", facts)
    assert sum(count["n"] for count in known.values()) == len(facts)
    assert sum(count["known"] for count in known.values()) < 0.3 * len(facts)


def test_batches_go_through_the_whole_corpus_before_repeating():
    documents = [[1, i, 2] for i in range(10, 20)]
    first, second = (batch.flatten().tolist() for batch in packed_batches(documents, [{"steps": 2, "batch_size": 3, "block": 10}], seed=1))
    assert sorted(first[1::3]) == sorted(second[1::3]) == list(range(10, 20)) and first != second


def test_registered_shapes_fit_vllm_and_the_prompts():
    nano = {key: model for key, model in models().items() if model.kind == "nano"}
    assert {"nano-llama-s", "nano-llama-m"} <= set(nano)
    for key, model in nano.items():
        assert model.shape["width"] // model.shape["heads"] in (32, 64, 80, 96, 112, 128, 192, 256), f"{key}: vLLM's CPU attention has no such head"
        assert model.shape["positions"] >= 1024
    for key in ("nano-llama-s", "nano-llama-m"): assert max(phase["block"] for phase in nano[key].pretrain["phases"]) >= 512
