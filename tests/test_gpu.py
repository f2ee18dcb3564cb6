"""What only a GPU can show: `pytest -m gpu tests/test_gpu.py`. Every other test of training runs without one.

The flash kernel wants heads whose width is a multiple of 8, and 16 bits: `wide` is a tiny LLaMA with such heads."""
import shutil

import pytest
import torch

from finetunings import fork, gap, log, place, settings, train, weights  # noqa: F401 (fork, place and train are fixtures)
from test_resume import compiling_main, continued
from tulu_study.training.launch import launch
from tulu_study.training.packing import flatten, has_flash, register_segments, segment_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]
FLASH = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)
flash = pytest.mark.skipif(not FLASH, reason="PyTorch's flash kernel needs an NVIDIA GPU of compute capability 8.0 or more")


@pytest.fixture(scope="module")
def wide(place):
    from transformers import LlamaConfig, LlamaForCausalLM
    base = place / "wide"
    shutil.copytree(place / "llama", base, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=2)).save_pretrained(base)
    return str(base)


def heads(length, heads, width=64, seed=0):
    return torch.randn(1, heads, length, width, dtype=torch.bfloat16, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


@flash
@pytest.mark.parametrize("kv", [8, 2])
def test_flash_is_attention_by_segments(kv, monkeypatch):
    from tulu_study.training import packing
    bounds = torch.tensor([0, 7, 107, 128], dtype=torch.int32, device="cuda")
    grouped = type("Layer", (torch.nn.Module,), {"num_key_value_groups": 8 // kv, "is_causal": True})()
    found = []
    for with_flash in (True, False):
        query, key, value = (heads(128, n, seed=n + i).requires_grad_() for i, n in enumerate((8, kv, kv)))
        assert has_flash(query, 0.0)
        if not with_flash: monkeypatch.setattr(packing, "has_flash", lambda *_: False)
        out, _ = segment_attention(grouped, query, key, value, scaling=0.125, cu_seq_lens_q=bounds, max_length_q=100)
        out.float().square().sum().backward()
        found.append([x.float() for x in (out, query.grad, key.grad, value.grad)])
    for one, other in zip(*found): assert (one - other).abs().max() <= 2e-2 * other.abs().max()


@flash
def test_conversations_in_a_pack_do_not_see_each_other_on_the_flash_path():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM._from_config(config, attn_implementation=register_segments(), dtype=torch.bfloat16).cuda()
    def logits(first):
        rows = [{"input_ids": ids, "labels": ids} for ids in (first, list(range(20, 60)), list(range(60, 75)))]
        pack = {name: value.cuda() if torch.is_tensor(value) else value for name, value in flatten([(row, 1.0) for row in rows]).items()}
        return model(input_ids=pack["input_ids"], position_ids=pack["position_ids"], cu_seq_lens_q=pack["cu_seq_lens_q"], cu_seq_lens_k=pack["cu_seq_lens_k"],
                     max_length_q=pack["max_length_q"], max_length_k=pack["max_length_k"], use_cache=False).logits[0]
    for mode in (model.train, model.eval):
        mode()
        one, other = logits(list(range(100, 130))), logits(list(range(130, 160)))
        assert torch.equal(one[30:85], other[30:85]) and not torch.equal(one[:30], other[:30])


def test_bf16_under_zero_2_and_3(train, wide):
    two, three = (train(f"gpu-zero-{stage}", zero_stage=stage, precision="bf16", base_dir=wide) for stage in (2, 3))
    for folder in (two, three): assert log(folder)[-1]["loss"] < log(folder)[0]["loss"] - 0.3 and {t.dtype for t in weights(folder).values()} == {torch.bfloat16}
    assert gap(two, three) < 1e-2 and [row["loss"] for row in log(two)] == pytest.approx([row["loss"] for row in log(three)], abs=2e-2)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 3e-2)])
def test_packing_changes_nothing_but_the_work_on_a_gpu(train, wide, precision, tolerance):
    packed, padded = (train(f"gpu-{precision}-{packing}", zero_stage=2, packing=packing, precision=precision, base_dir=wide) for packing in (True, False))
    assert [row["loss"] for row in log(packed)] == pytest.approx([row["loss"] for row in log(padded)], abs=tolerance)


def test_qlora_from_base_to_merged_checkpoint(place, wide):
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from tulu_study.training.lora import quantised
    from tulu_study.training.tokenizers import grow_embeddings
    config = settings(place, "gpu-qlora", base_dir=wide, zero_stage=0, precision="bf16", lora={"rank": 8, "alpha": 16, "dropout": 0.0, "qlora": True}, learning_rate=1e-2)
    checks = launch(config, echo=lambda line: None)
    assert all(check["passed"] for check in checks) and log(place / "gpu-qlora")[-1]["loss"] < log(place / "gpu-qlora")[0]["loss"]
    merged = AutoModelForCausalLM.from_pretrained(place / "gpu-qlora", dtype=torch.float32)
    before, after = weights(place / "wide"), merged.state_dict()
    moved = {name for name in after if not torch.equal(before[name].bfloat16().float(), after[name][:before[name].shape[0]])}   # what is not quantised was loaded in 16 bits
    assert moved == {name for name in after if "_proj" in name}
    base = AutoModelForCausalLM.from_pretrained(wide, **quantised(config))
    grow_embeddings(base, 260, config.protocol, config.seed)
    adapted = PeftModel.from_pretrained(base, place / "gpu-qlora" / "adapter").eval()
    ids = torch.arange(5, 45, device="cuda")[None]
    with torch.no_grad(): one, other = adapted(input_ids=ids).logits.float(), merged.cuda().eval()(input_ids=ids).logits
    assert (one - other).abs().max() < 0.05 * other.abs().max()  # 16-bit products beside float32


def noting_main(path, noted):
    "Train, and write down with which types the flash kernel was called, and which its queries had before."
    import json
    from torch.nn.attention import varlen
    from transformers import AttentionInterface
    from tulu_study.training import finetune, packing
    kernel, attention, found = varlen.varlen_attn, packing.segment_attention, {"kernel": set(), "queries": set()}
    def called(query, *given, **more):
        found["kernel"].add(str(query.dtype))
        return kernel(query, *given, **more)
    def asked(module, query, *given, **more):
        found["queries"].add(str(query.dtype))
        return attention(module, query, *given, **more)
    varlen.varlen_attn = called
    finetune.register_segments = lambda compiled: AttentionInterface.register(packing.SEGMENTS, asked) or packing.SEGMENTS
    status = finetune.main(path)
    with open(noted, "w") as f: json.dump({name: sorted(types) for name, types in found.items()}, f)
    return status


@flash
@pytest.mark.parametrize("checkpointing", [False, True])
def test_qlora_uses_the_flash_kernel(place, fork, wide, checkpointing):
    "Its normalisations are float32, and so are its queries; its products are 16 bits."
    import json
    pytest.importorskip("bitsandbytes")
    name = f"gpu-qlora-flash-{checkpointing}"
    config = settings(place, name, base_dir=wide, zero_stage=0, precision="bf16", gradient_checkpointing=checkpointing, lora={"rank": 8, "alpha": 16, "dropout": 0.0, "qlora": True}, learning_rate=1e-2)
    (place / name).mkdir()
    fork(noting_main, str(config.save(place / f"{name}.json")), str(place / f"{name}.types"))
    assert json.loads((place / f"{name}.types").read_text()) == {"kernel": ["torch.bfloat16"], "queries": ["torch.float32"]}
    assert losses(place / name)[-1] < losses(place / name)[0]


def test_merging_4_bits_takes_one_layer_of_the_gpu(place, wide):
    "The trained model has made room before; then no second copy of the model may be there, in 16 bits or more."
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM
    from tulu_study.training.lora import dequantised, quantised, release
    config = settings(place, "gpu-room", base_dir=wide, zero_stage=0, precision="bf16", lora={"rank": 8, "qlora": True})
    empty = torch.cuda.memory_allocated()
    trained = AutoModelForCausalLM.from_pretrained(wide, **quantised(config))
    held = torch.cuda.memory_allocated() - empty
    release(trained)
    assert held > 0 and torch.cuda.memory_allocated() - empty < held / 4
    base = AutoModelForCausalLM.from_pretrained(wide, **quantised(config))
    torch.cuda.reset_peak_memory_stats()
    before, layer = torch.cuda.memory_allocated(), 2 * 64 * 128   # bytes of the largest layer in 16 bits; there are 14 layers
    merged = dequantised(base)
    assert torch.cuda.max_memory_allocated() - before < 2 * layer and {p.device.type for p in merged.parameters()} == {"cpu"}


def test_one_kernel_updates_all(place):
    from transformers import AutoModelForCausalLM
    from tulu_study.training.finetune import make_optimizer
    optimizer = make_optimizer(settings(place, "gpu-adamw"), AutoModelForCausalLM.from_pretrained(place / "llama").cuda())
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]


def apart(one, other, base):
    "How far two trainings ended from each other, as a share of the way that the second went: on a CPU 0.01 for packed and padded or compiled and plain, 0.2 for a rate a fifth lower, 0.4 for another order of the data."
    one, other, before = weights(one), weights(other), weights(base)
    differ = lambda a, b: sum((a[name][:len(before[name])].double() - b[name][:len(before[name])].double()).square().sum() for name in before).sqrt().item()
    return differ(one, other) / differ(other, before)


def losses(folder): return [row["loss"] for row in log(folder)]


def test_compiled_layers_on_a_gpu_train_the_same_model(place, fork, train, wide):
    changes = dict(zero_stage=2, precision="bf16", base_dir=wide)
    plain, compiled = train("gpu-plain", **changes), settings(place, "gpu-compiled", compile=True, **changes)
    (place / "gpu-compiled").mkdir()
    fork(compiling_main, str(compiled.save(place / "gpu-compiled.json")))   # fails where nothing was compiled
    assert losses(place / "gpu-compiled") == pytest.approx(losses(plain), abs=2e-3) and apart(place / "gpu-compiled", plain, place / "wide") < 0.1


def test_an_optimiser_in_the_hosts_memory_trains_the_same_model(place, train, wide):
    "DeepSpeed compiles its AdamW for the processor the first time."
    host, device = (train(f"gpu-offload-{offload}", zero_stage=2, precision="bf16", base_dir=wide, offload=offload) for offload in ("optimizer", "none"))
    assert losses(host) == pytest.approx(losses(device), abs=2e-3) and apart(host, device, place / "wide") < 0.1


@pytest.mark.parametrize("name, changes", [("zero2", dict(zero_stage=2)), ("zero3", dict(zero_stage=3)), ("checkpointing", dict(zero_stage=2, gradient_checkpointing=True))], ids=["zero2", "zero3", "checkpointing"])
def test_killed_on_a_gpu_it_continues_on_the_same_curve(place, fork, train, wide, name, changes):
    "To within what a backward kernel that adds in any order leaves open."
    changes = changes | dict(precision="bf16", base_dir=wide, save_steps=1)
    folder, _ = continued(place, fork, f"gpu-cut-{name}", 3, expected_from=3, **changes)
    whole = train(f"gpu-whole-{name}", **changes)
    assert losses(folder) == pytest.approx(losses(whole), abs=2e-3) and apart(folder, whole, place / "wide") < 0.1
