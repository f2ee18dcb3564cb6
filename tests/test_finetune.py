"""Fine-tuning end to end on the CPU: DeepSpeed ZeRO 2 and 3 with one and two ranks, packed and padded, against a plain loop, killed, damaged."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetunings import SETTINGS, TOLERANCE, fork, gap, log, place, settings, train, weights  # noqa: F401 (fork, place and train are fixtures)
from tulu_study.training.config import TrainingError
from tulu_study.training import finetune
from tulu_study.training.finetune import EpochOrder, PackOrder, explain, load_data, sample_conversations
from tulu_study.training.launch import _why, environment_for, launch
from tulu_study.training.tokenizers import load_tokenizer

SAME = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "trained.json", "sample.json", "README.md")


@pytest.fixture(scope="module")
def launched(place, train):
    "launched(zero_stage, ranks) -> folder of a checkpoint, once each: ZeRO stages 2 and 3 with one rank and with two through torchrun, stage 0 forked."
    done = {}

    def run(stage, ranks):
        if stage == 0: return train(f"zero-{stage}-{ranks}", zero_stage=stage, ranks=ranks)
        if (stage, ranks) not in done:
            config = settings(place, f"torchrun-{stage}-{ranks}", zero_stage=stage, ranks=ranks)
            lines = []
            checks = launch(config, launcher="torchrun", echo=lines.append)
            assert all(check["passed"] for check in checks) and any(line.startswith("step 6/6") for line in lines)
            done[stage, ranks] = Path(config.out_dir)
        return done[stage, ranks]
    return run


def same_training(folder, reference):
    "Weights within the tolerance, losses within 1e-5, the same conversations in every step."
    assert gap(folder, reference) <= TOLERANCE
    for mine, theirs in zip(log(folder), log(reference), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert [mine[k] for k in ("step", "learning_rate", "tokens", "supervised_tokens")] == [theirs[k] for k in ("step", "learning_rate", "tokens", "supervised_tokens")]


@pytest.mark.parametrize("stage, ranks", [(0, 1), (3, 1), (2, 2), (3, 2)])
def test_zero_stages_and_ranks_train_the_same_model(launched, stage, ranks):
    same_training(launched(stage, ranks), launched(2, 1))


def test_packing_changes_nothing_but_the_work(launched, train):
    packed, padded = launched(2, 1), train("padded", packing=False)
    same_training(packed, padded)
    less, more = (json.loads((folder / "trained.json").read_text()) for folder in (packed, padded))
    assert less["forward_passes_per_step"] <= more["forward_passes_per_step"] == 4 and less["attention_waste"] < more["attention_waste"]
    assert less["settings"]["packing"] and "segments" not in (packed / "config.json").read_text()   # whoever loads it gets ordinary attention


def test_training_moves_the_weights_and_lowers_the_loss(launched, place):
    assert gap(launched(2, 1), {**weights(launched(2, 1)), "model.norm.weight": weights(place / "llama")["model.norm.weight"]}) > 100 * TOLERANCE
    assert log(launched(2, 1))[-1]["loss"] < log(launched(2, 1))[0]["loss"] - 0.3


def test_log_counts_every_token_once_per_epoch(launched):
    rows, trained = log(launched(2, 1)), json.loads((launched(2, 1) / "trained.json").read_text())
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and trained["dropped"] == 1 and trained["conversations"] == 21
    assert sum(row["tokens"] for row in rows[:3]) == sum(row["tokens"] for row in rows[3:]) == trained["tokens"]
    assert sum(row["supervised_tokens"] for row in rows) == 2 * trained["supervised_tokens"]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.0, 1e-3, 8e-4, 6e-4, 4e-4, 2e-4])   # 6 steps, int(0.2 x 6) = 1 of them warm-up


def plain_loop(place, loss, micro=2):
    "The same training, written out: AdamW, the schedule, clipping, and the two ways to take the mean."
    import torch
    from transformers import AutoModelForCausalLM
    from tulu_study.training import encode_all, grow_embeddings, load_tokenizer
    tokenizer = load_tokenizer(place / "llama", "llama")
    rows = encode_all([json.loads(line) for line in open(place / "data.jsonl")], tokenizer, SETTINGS["max_seq_length"]).rows
    model = AutoModelForCausalLM.from_pretrained(place / "llama", dtype=torch.float32)
    grow_embeddings(model, len(tokenizer), "paper")
    optimizer, step, order = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0), 0, EpochOrder(len(rows), 42)
    for epoch in range(2):
        order.set_epoch(epoch)
        places = list(order)
        for begin in range(0, len(places), 8):
            batch = [rows[i] for i in places[begin:begin + 8]]
            sums = []
            for row in batch:
                logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
                sums.append((torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum"), sum(label != -100 for label in row["labels"][1:])))
            groups = [sums[i:i + micro] for i in range(0, len(sums), micro)]
            mean = lambda pairs: sum(total for total, _ in pairs) / sum(n for _, n in pairs)
            (mean(sums) if loss == "token" else sum(map(mean, groups)) / len(groups)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups: group["lr"] = 1e-3 * (step if step < 1 else (6 - step) / 5)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def test_the_token_loss_is_that_of_a_plain_loop(launched, place):
    assert gap(launched(2, 1), plain_loop(place, "token")) <= TOLERANCE


@pytest.mark.parametrize("packing", [True, False])
def test_the_microbatch_loss_is_the_mean_of_micro_batch_means(train, place, packing):
    folder = train(f"microbatch-{packing}", loss="microbatch", packing=packing)
    assert gap(folder, plain_loop(place, "microbatch")) <= TOLERANCE
    assert gap(folder, plain_loop(place, "token")) > 10 * TOLERANCE   # the choice matters


@pytest.mark.parametrize("micro, ranks, packing", [(8, 1, True), (1, 1, True), (8, 1, False), (1, 1, False), (1, 2, False)])
def test_the_token_loss_does_not_depend_on_the_split(train, launched, micro, ranks, packing):
    same_training(train(f"split-{micro}-{ranks}-{packing}", micro_batch_size=micro, ranks=ranks, packing=packing), launched(2, 1))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_tied_output_layer_is_saved_once(train, place, stage):
    from transformers import LlamaConfig, LlamaForCausalLM
    base = place / "tied"
    if not base.exists():
        shutil.copytree(place / "llama", base)
        (base / "model.safetensors").unlink()
        LlamaForCausalLM(LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True)).save_pretrained(base)
    saved = weights(train(f"tied-{stage}", base_dir=str(base), zero_stage=stage, epochs=1))
    assert "lm_head.weight" not in saved and saved["model.embed_tokens.weight"].shape == (260, 16)


@pytest.mark.parametrize("family, rows", [("gpt_neox", 272), ("opt", 264)])
def test_other_families_keep_their_embedding_rows(train, family, rows):
    config = json.loads((train(f"family-{family}", family=family, epochs=1) / "config.json").read_text())
    assert config["vocab_size"] == rows and config["use_cache"] is True


def test_bf16_with_gradient_checkpointing_is_saved_in_16_bits(train):
    import torch
    folder = train("bf16", precision="bf16", gradient_checkpointing=True, zero_stage=3, epochs=1)
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}


def test_a_saved_tokenizer_cuts_nothing_off(launched):
    saved = json.loads((launched(2, 1) / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None


def test_a_limit_is_stored_with_the_ids_that_it_left(train):
    drawn = json.loads((train("limit", limit=10, epochs=1) / "sample.json").read_text())["datasets"]["sums"]
    assert drawn["of"] == 22 and len(set(drawn["ids"])) == 10


def odd_data(place):
    "The usual conversations, and rows without any message: an empty list, none, and an empty prompt beside one."
    file = place / "odd.jsonl"
    rows = [{"dataset": "sums", "id": f"sums_bare_{i}", "messages": messages} for i, messages in enumerate([[], None, []])]
    file.write_text((place / "data.jsonl").read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_rows_without_messages_are_counted_and_named(train, place, launched):
    folder = train("odd", data_file=str(odd_data(place)), zero_stage=2)
    said, trained = json.loads((folder / "sample.json").read_text()), json.loads((folder / "trained.json").read_text())
    assert said["empty"] == ["sums_bare_0", "sums_bare_1", "sums_bare_2"] and said["dropped"] == ["sums_long"] and said["datasets"]["sums"]["of"] == 25
    assert (trained["conversations"], trained["dropped"], trained["empty"]) == (21, 1, 3) and gap(folder, launched(2, 1)) == 0
    nothing = place / "nothing.jsonl"
    nothing.write_text(json.dumps({"dataset": "sums", "id": "sums_0", "messages": []}) + "\n")
    with pytest.raises(TrainingError, match=r"nothing.jsonl holds no conversations \(1 rows, none with a message\)"): load_data(settings(place, "nothing", data_file=str(nothing)), load_tokenizer(place / "llama", "llama"))


# ---- encoded once

def counted_encoding(path, tally):
    "A rank that notes down when it encodes."
    from tulu_study.training import store
    encode = store.encode_all
    def noting(*args):
        with open(tally, "a") as file: file.write(os.environ["RANK"] + "\n")
        return encode(*args)
    store.encode_all = noting
    return finetune.main(path)


def test_one_rank_encodes_and_the_others_map_what_it_wrote(place, fork, launched, tmp_path):
    config = settings(place, "mapped", zero_stage=2, ranks=2)
    Path(config.out_dir).mkdir()
    fork(counted_encoding, str(config.save(tmp_path / "s.json")), str(tmp_path / "tally"), ranks=2)
    assert (tmp_path / "tally").read_text() == "0\n" and not (place / "mapped" / "state").exists()
    same_training(place / "mapped", launched(2, 1))


def test_encoded_rows_on_disk_are_those_in_memory(place, monkeypatch):
    from tulu_study.training import encode_all, store
    from tulu_study.training.resume import rows_hash
    tokenizer, rows = load_tokenizer(place / "llama", "llama"), [json.loads(line) for line in open(odd_data(place))]
    monkeypatch.setattr(store, "CHUNK", 4)
    config = settings(place, "stored", data_file=str(place / "odd.jsonl"))
    stored, drawn = load_data(config, tokenizer)
    plain = encode_all(rows, tokenizer, 96)
    assert list(stored.rows) == plain.rows and rows_hash(stored.rows) == rows_hash(plain.rows) and stored.rows[-1] == plain.rows[-1]
    for name in ("ids", "dropped", "unmasked", "empty", "tokens", "supervised"): assert getattr(stored, name) == getattr(plain, name), name
    assert store.sizes(stored.rows) == store.sizes(plain.rows) and drawn["sums"]["of"] == 25
    monkeypatch.setattr(store, "encode_all", None)                      # a second time nothing is encoded
    assert list(load_data(config, tokenizer)[0].rows) == plain.rows
    monkeypatch.undo()
    file = next((place / "stored" / "state").glob("encoded-*/labels"))
    file.write_bytes(file.read_bytes()[:-4] + b"\1\0\0\0")              # a damaged file is made again
    assert list(load_data(config, tokenizer)[0].rows) == plain.rows
    folders = {one.name for changes in ({}, {"max_seq_length": 64}, {"limit": 5}, {"seed": 1}, {"limit": 5, "seed": 1})
               if load_data(settings(place, "stored", data_file=str(place / "odd.jsonl"), **changes), tokenizer) for one in (place / "stored" / "state").iterdir()}
    assert len(folders) == 5 and len(list((place / "stored" / "state").iterdir())) == 1


# ---- faults

def test_killed_at_work_and_started_again_gives_the_same_bytes(launched, place):
    reference, config = launched(2, 1), settings(place, "killed", epochs=400)
    start = f"import json; from tulu_study.training.launch import launch; launch(json.loads({json.dumps(vars(config))!r}))"
    process = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment_for(config, direct=False))
    try:
        written, until = place / "killed" / "training_log.jsonl", time.time() + 60
        while not (written.exists() and written.stat().st_size) and time.time() < until: time.sleep(0.05)
        import psutil
        children = psutil.Process(process.pid).children(recursive=True)
        assert children, "the trainer was not running"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not psutil.wait_procs(children, timeout=5)[1], "a trainer outlived its launcher"
    assert not (place / "killed" / "verification.json").exists()
    launch(settings(place, "killed"), echo=lambda line: None)   # finds the leftovers of the longer run (400 epochs: long enough to be killed at work)
    again = place / "killed"
    assert [name for name in SAME if (again / name).read_bytes() != (reference / name).read_bytes()] == []


def damaged(folder, tmp_path, damage):
    copy = tmp_path / "checkpoint"
    shutil.copytree(folder, copy)
    damage(copy)
    from tulu_study.training.verification import verify
    with pytest.raises(Exception) as failure: verify(copy)
    return str(failure.value)


def rewrite(change):
    def damage(folder):
        from safetensors.torch import load_file, save_file
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return damage


@pytest.mark.parametrize("damage, named", [
    (rewrite(lambda t: t["model.layers.1.mlp.up_proj.weight"].mul_(1.001)), "up_proj"),
    (rewrite(lambda t: t.pop("model.layers.0.self_attn.q_proj.weight")), "q_proj"),
    (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
    (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}"), "chat template wrote"),
    (lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100]), ""),
])
def test_a_damaged_checkpoint_is_refused(launched, tmp_path, damage, named):
    assert named in damaged(launched(2, 1), tmp_path, damage)


def test_a_loss_that_is_not_a_number_names_the_settings_to_change(place):
    with pytest.raises(TrainingError, match=r"loss became \S+ at step \d+: lower learning_rate \(now 1e\+30\)"):
        launch(settings(place, "nan", learning_rate=1e30, warmup_ratio=0.0), echo=lambda line: None)


def test_missing_inputs_are_named_before_anything_starts(place):
    with pytest.raises(TrainingError, match="not there: base model .*nowhere.* and data file"):
        launch(settings(place, "missing", base_dir="nowhere", data_file="none.jsonl"))


def test_texts_longer_than_the_base_model_can_take_are_refused_at_once(place):
    with pytest.raises(TrainingError, match=r"max_seq_length: found 256, but the base model .* has 128 positions .*take 128 or less"):
        launch(settings(place, "long", max_seq_length=256), echo=lambda line: None)
    assert not (place / "long").exists()


def test_a_finished_training_is_not_made_again(train, place, monkeypatch):
    from tulu_study.training import launch as module
    folder = train("padded", packing=False)
    before, checks = (folder / "model.safetensors").stat().st_mtime_ns, json.loads((folder / "verification.json").read_text())
    assert launch(settings(place, "padded", packing=False, threads=2)) == checks and (folder / "model.safetensors").stat().st_mtime_ns == before
    finished = lambda **changes: module.finished(settings(place, "padded", **{"packing": False, **changes}))
    assert finished() == checks and finished(seed=1) is None
    data = place / "other.jsonl"
    data.write_text((place / "data.jsonl").read_text().replace("plus", "and"))
    trained = (folder / "trained.json").read_text()
    assert finished(data_file=str(data)) is None and finished(base_dir=str(place / "opt")) is None
    (folder / "trained.json").write_text(trained[:-40])
    try: assert finished() is None
    finally: (folder / "trained.json").write_text(trained)
    monkeypatch.setattr("tulu_study.training.resume.code_hash", lambda: "other code")
    assert finished() is None


FREE = "GPU 0 has a total capacity of 139.80 GiB of which 12.30 GiB is free. Of the allocated memory 101.95 GiB is allocated by PyTorch, and {} is reserved by PyTorch but unallocated."


@pytest.mark.parametrize("error, named", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), "lower micro_batch_size (now 2)"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory: lower micro_batch_size"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "zero_stage 3 (now 1 rank(s), stage 2)"),
    (RuntimeError("CUDA out of memory. Tried to allocate 12.55 GiB. " + FREE.format("23.64 GiB")), "out of memory: 23.6 GiB of the GPU lay free in pieces too small: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"),
    (RuntimeError("CUDA out of memory. Tried to allocate 12.55 GiB. " + FREE.format("23.64 MiB")), "out of memory: lower micro_batch_size"),
    (RuntimeError("CUDA out of memory. Tried to allocate 40.00 GiB. " + FREE.format("23.64 GiB")), "out of memory: lower micro_batch_size"),
    (OSError(28, "No space left on device"), "the disk is full"),
    (RuntimeError("backend='inductor' raised:\nNotImplementedError: aten.what"), "compile: the layers could not be compiled; take compile false"),
    (RuntimeError("InductorError: CppCompileError: C++ compile error\n/tmp/x.cpp:1:2: fatal error: write: No space left on device"), "the disk is full"),
    (RuntimeError("InductorError: CppCompileError: C++ compile error\nx.h:1: fatal error: Python.h: No such file or directory"), "apt-get install g++ python3-dev"),
    (ValueError("the compiler of this message is innocent"), "ValueError: the compiler of this message is innocent"),
])
def test_errors_name_what_to_change(place, error, named):
    assert named in explain(error, settings(place, "x", compile=True))


def test_a_killed_trainer_points_at_memory(place):
    assert "TULU_JOBS" in _why(-9, [], [], settings(place, "x"))
    assert "last words" in _why(1, [], ["last words"], settings(place, "x"))


@pytest.mark.parametrize("changes, named", [
    (dict(batch_size=10, micro_batch_size=4, ranks=2), r"batch_size: found 10, expected a multiple of micro_batch_size 4 x ranks 2 = 8: take 8 or 16"),
    (dict(zero_stage=4, loss="sum"), r"(?s)loss: found 'sum'.*zero_stage: found 4"),
    (dict(max_seq_length=0), r"max_seq_length: found 0, expected more than 0"),
    (dict(compile=True, zero_stage=3, lora={"rank": 4}), r"(?s)compile: found true with zero_stage 3.*take stage 2.*compile: found true with lora"),
])
def test_settings_that_do_not_work_are_all_named(place, changes, named):
    with pytest.raises(TrainingError, match=named): settings(place, "x", **changes)


# ---- order and sample

def test_another_dataset_does_not_change_a_sample():
    one = [{"dataset": "a", "id": f"a_{i}"} for i in range(50)]
    two = [{"dataset": "b", "id": f"b_{i}"} for i in range(50)]
    alone, both = sample_conversations(one, 7, 42)[0], sample_conversations(two + one, 7, 42)[0]
    assert alone == [row for row in both if row["dataset"] == "a"] and len(both) == 14
    assert alone == sorted(alone, key=lambda row: int(row["id"][2:]))
    assert sample_conversations(one, 7, 43)[0] != alone and sample_conversations(one, 0, 42)[0] == one


def test_every_pack_order_holds_the_steps_of_the_plain_order(place):
    draw = random.Random(0)
    rows = [{"input_ids": [1] * n, "labels": [-100, *[1] * (n - 1)]} for n in (draw.randrange(4, 97) for _ in range(53))]
    config = settings(place, "x", ranks=2, micro_batch_size=1)
    order, plain = PackOrder(rows, config), EpochOrder(53, config.seed)
    packs = [list(order.packs(epoch)) for epoch in range(2)]
    assert len(order) == len(packs[0]) == 7 * order.accumulation * 2 and packs == [list(PackOrder(rows, config).packs(epoch)) for epoch in range(2)]
    for epoch in range(2):
        steps = [packs[epoch][i:i + order.accumulation * 2] for i in range(0, len(order), order.accumulation * 2)]
        assert [sorted(i for pack in step for i, _ in pack) for step in steps] == [sorted(plain.order(epoch)[i:i + 8]) for i in range(0, 53, 8)]
        assert all(sum(weight * order.counts[i] for pack in step for i, weight in pack) == pytest.approx(1) for step in steps)
        assert max(sum(order.lengths[i] for i, _ in pack) for pack in packs[epoch]) <= 96


def test_an_epoch_takes_every_row_once_in_a_new_order():
    order = EpochOrder(10, 42, multiple=4)
    first = list(order)
    order.set_epoch(1)
    assert sorted(first) == [*range(10), 10, 10] and first[-2:] == [10, 10] and len(order) == 12
    assert list(order) != first and math.isclose(sum(list(order)[:10]), 45)
