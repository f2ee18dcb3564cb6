"""What mixed precision and recomputation really do, seen in the weights and counted in the model."""
import json

import pytest

from finetunings import SETTINGS, fork, log, place, settings, train, weights  # noqa: F401 (fixtures)
from tulu_study.training import finetune
from tulu_study.training.finetune import EpochOrder

SMALL = dict(learning_rate=1e-5, warmup_ratio=0.0, epochs=20, zero_stage=2)   # 60 steps, each far below a 16-bit weight's resolution


def counted(path, tally):
    "Train, and count how often a block computes until the training is over."
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    forward, save, calls = LlamaDecoderLayer.forward, finetune.save, []
    def counting(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)
    def saving(*args):
        open(tally, "w").write(str(len(calls)))
        save(*args)
    LlamaDecoderLayer.forward, finetune.save = counting, saving
    return finetune.main(path)


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 4}}, {"zero_stage": 3}, {"packing": False}], ids=["all weights", "adapter", "ZeRO-3", "padded"])
def test_checkpointing_computes_every_block_twice(place, fork, tmp_path, changes):
    found = []
    for checkpointing in (False, True):
        name = f"counted-{checkpointing}-{'-'.join(changes)}"
        (place / name).mkdir()
        fork(counted, str(settings(place, name, gradient_checkpointing=checkpointing, **changes).save(tmp_path / "s.json")), str(tmp_path / "tally"))
        found.append(int((tmp_path / "tally").read_text()))
    passes = json.loads((place / name / "trained.json").read_text())["forward_passes_per_step"]
    assert found == [6 * passes * 2, 6 * passes * 2 * 2] if changes != {"packing": False} else found[1] == 2 * found[0]   # 6 steps, 2 blocks


def in_16_bits_alone(place):
    "The same training with weights and moments in 16 bits: what mixed precision must not be."
    import torch
    from transformers import AutoModelForCausalLM
    from tulu_study.training import encode_all, grow_embeddings, load_tokenizer
    tokenizer = load_tokenizer(place / "llama", "llama")
    rows = encode_all([json.loads(line) for line in open(place / "data.jsonl")], tokenizer, SETTINGS["max_seq_length"]).rows
    model = AutoModelForCausalLM.from_pretrained(place / "llama", dtype=torch.float32)
    grow_embeddings(model, len(tokenizer), "paper")
    model.bfloat16()
    optimizer, order, step = torch.optim.AdamW(model.parameters(), lr=SMALL["learning_rate"], weight_decay=0.0), EpochOrder(len(rows), 42), 0
    for epoch in range(SMALL["epochs"]):
        places = order.order(epoch)
        for begin in range(0, len(places), 8):
            batch = [rows[i] for i in places[begin:begin + 8]]
            count = sum(label != -100 for row in batch for label in row["labels"][1:])
            for row in batch:
                logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].float()
                (torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum") / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups: group["lr"] = SMALL["learning_rate"] * (60 - step) / 60
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def followed(start, exact, other):
    "How far weights have gone along the way of the exact training: 1 = all of it, 0 = nowhere. Weights whose 16-bit neighbours are further away than a step goes."
    import torch
    along = length = 0.0
    for name in exact:
        if exact[name].shape != start[name].shape: continue   # the embedding, which has grown
        large = start[name].abs() > 0.01
        way, gone = (exact[name] - start[name]).double()[large], (other[name].float() - start[name].bfloat16().float()).double()[large]
        along, length = along + (way @ gone).item(), length + (way @ way).item()
    return along / length


def test_small_steps_are_kept_in_float32_master_weights(place, train):
    start, exact = weights(place / "llama"), weights(train("small-fp32", **SMALL))
    assert max((exact[n] - start[n]).abs().max().item() for n in start if exact[n].shape == start[n].shape) > 1e-4      # the exact training has gone somewhere, by steps of at most 1e-5
    mixed, control = followed(start, exact, weights(train("small-bf16", precision="bf16", **SMALL))), followed(start, exact, in_16_bits_alone(place))
    assert 0.9 < mixed < 1.1 and abs(control) < 0.2, (mixed, control)
    assert log(place / "small-bf16")[-1]["loss"] == pytest.approx(log(place / "small-fp32")[-1]["loss"], rel=0.01)
