"""Fine-tuning end to end on the CPU: DeepSpeed ZeRO 2 and 3 with one and two ranks, against a plain loop, killed, damaged.

The tiny LLaMA has 71 thousand float32 parameters. Two runs that add the same numbers in another order may differ by `TOLERANCE` in any
weight after six optimiser steps at rate 1e-3 (AdamW's first steps have nearly the size of the rate, whatever the gradient's)."""
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tulu_study.training.config import FinetuneConfig, TrainingError
from tulu_study.training.finetune import EpochOrder, explain, main, sample_conversations
from tulu_study.training.launch import _why, environment_for, launch

TOLERANCE = 2e-5
SETTINGS = dict(batch_size=8, micro_batch_size=2, learning_rate=1e-3, warmup_ratio=0.2, max_seq_length=96, precision="fp32", data="sums")
SAME = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "trained.json", "sample.json", "README.md")


def byte_tokenizer(*specials, **roles):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, **roles)


def make_base(folder, family):
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, OPTConfig
    torch.manual_seed(0)
    if family == "llama":
        tokenizer = byte_tokenizer("<unk>", "<s>", "</s>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        config = LlamaConfig(vocab_size=259, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=2)
    elif family == "gpt_neox":
        tokenizer = byte_tokenizer("<|endoftext|>", bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
        config = GPTNeoXConfig(vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128)
    else:
        tokenizer = byte_tokenizer("<s>", "<pad>", "</s>", "<unk>", bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")
        config = OPTConfig(vocab_size=264, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128, word_embed_proj_dim=32)
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with three base models and 21 conversations of unequal length: the last step of an epoch is a smaller one."
    root, draw = tmp_path_factory.mktemp("finetune"), random.Random(0)
    for family in ("llama", "gpt_neox", "opt"):
        make_base(root / family, family)
    with open(root / "data.jsonl", "w") as f:
        for i in range(21):
            a, b = draw.randrange(50), draw.randrange(50)
            messages = [{"role": "user", "content": f"What is {a} plus {b}?"}, {"role": "assistant", "content": f"{a + b} " * draw.randrange(1, 6)}]
            f.write(json.dumps({"dataset": "sums", "id": f"sums_{i}", "messages": messages}) + "\n")
        long = [{"role": "user", "content": "why? " * 40}, {"role": "assistant", "content": "no"}]
        f.write(json.dumps({"dataset": "sums", "id": "sums_long", "messages": long}) + "\n")
    return root


def settings(place, out, **changes):
    family = changes.get("family", "llama")
    return FinetuneConfig(**{**SETTINGS, "base_dir": str(place / family), "data_file": str(place / "data.jsonl"), "out_dir": str(place / out), **changes})


# One rank or more without paying each time for the imports: processes forked from one that has them.

def _rank(path, env):
    os.environ.update(env)
    sys.exit(main(path))


@pytest.fixture(scope="module")
def train(place):
    "train('name', zero_stage=3, …) -> folder of the checkpoint; once per name."
    os.environ.update({k: v for k, v in environment_for(settings(place, "x"), direct=True).items() if k in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.trainer", "transformers.models.llama.modeling_llama", "deepspeed", "tulu_study.training.finetune", "tulu_study.training.verification"])

    def run(name, **changes):
        config = settings(place, name, **changes)
        if not (place / name / "verification.json").exists():
            (place / name).mkdir()
            env, path = environment_for(config, direct=True), str(config.save(place / f"{name}.json"))
            env |= {"WORLD_SIZE": str(config.ranks)}
            ranks = [context.Process(target=_rank, args=(path, {**env, "RANK": str(r), "LOCAL_RANK": str(r)})) for r in range(config.ranks)]
            for process in ranks: process.start()
            for process in ranks: process.join(60)
            assert [process.exitcode for process in ranks] == [0] * config.ranks
        return place / name
    return run


@pytest.fixture(scope="module")
def launched(place, train):
    "launched(zero_stage, ranks) -> folder of a checkpoint, once each: stage 2 with one rank and stage 3 with two through torchrun, the others forked."
    done = {}

    def run(stage, ranks):
        if (stage, ranks) not in ((2, 1), (3, 2)): return train(f"zero-{stage}-{ranks}", zero_stage=stage, ranks=ranks)
        if (stage, ranks) not in done:
            config = settings(place, f"torchrun-{stage}-{ranks}", zero_stage=stage, ranks=ranks)
            lines = []
            checks = launch(config, launcher="torchrun", echo=lines.append)
            assert all(check["passed"] for check in checks) and any(line.startswith("step 6/6") for line in lines)
            done[stage, ranks] = Path(config.out_dir)
        return done[stage, ranks]
    return run


def weights(folder):
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


def gap(one, other):
    "Largest difference of any weight between two checkpoints, or between one and a state dict."
    one, other = weights(one), other if isinstance(other, dict) else weights(other)
    return max((one[name] - other[name]).abs().max().item() for name in one)


def log(folder):
    return [json.loads(line) for line in open(folder / "training_log.jsonl")]


@pytest.mark.parametrize("stage, ranks", [(2, 1), (3, 1), (2, 2), (3, 2)])
def test_zero_stages_and_ranks_train_the_same_model(launched, stage, ranks):
    reference, folder = launched(2, 1), launched(stage, ranks)
    assert gap(folder, reference) <= TOLERANCE
    for mine, theirs in zip(log(folder), log(reference), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert [mine[k] for k in ("step", "learning_rate", "tokens", "supervised_tokens")] == [theirs[k] for k in ("step", "learning_rate", "tokens", "supervised_tokens")]


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


def test_the_microbatch_loss_is_the_mean_of_micro_batch_means(train, place):
    expected = plain_loop(place, "microbatch")
    assert gap(train("microbatch", loss="microbatch"), expected) <= TOLERANCE
    assert gap(train("microbatch", loss="microbatch"), plain_loop(place, "token")) > 10 * TOLERANCE   # the choice matters


@pytest.mark.parametrize("micro, ranks", [(8, 1), (1, 2)])
def test_the_token_loss_does_not_depend_on_the_split(train, launched, micro, ranks):
    assert gap(train(f"split-{micro}-{ranks}", micro_batch_size=micro, ranks=ranks), launched(2, 1)) <= TOLERANCE


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


def test_a_limit_is_stored_with_the_ids_that_it_left(train):
    drawn = json.loads((train("limit", limit=10, epochs=1) / "sample.json").read_text())["datasets"]["sums"]
    assert drawn["of"] == 22 and len(set(drawn["ids"])) == 10


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


@pytest.mark.parametrize("error, named", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), "lower micro_batch_size (now 2)"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "zero_stage 3 (now 1 rank(s), stage 2)"),
    (OSError(28, "No space left on device"), "the disk is full"),
])
def test_errors_name_what_to_change(place, error, named):
    assert named in explain(error, settings(place, "x"))


def test_a_killed_trainer_points_at_memory(place):
    assert "TULU_JOBS" in _why(-9, [], [], settings(place, "x"))
    assert "last words" in _why(1, [], ["last words"], settings(place, "x"))


@pytest.mark.parametrize("changes, named", [
    (dict(batch_size=10, micro_batch_size=4, ranks=2), r"batch_size: found 10, expected a multiple of micro_batch_size 4 x ranks 2 = 8: take 8 or 16"),
    (dict(zero_stage=4, loss="sum"), r"(?s)loss: found 'sum'.*zero_stage: found 4"),
    (dict(max_seq_length=0), r"max_seq_length: found 0, expected more than 0"),
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


def test_an_epoch_takes_every_row_once_in_a_new_order():
    order = EpochOrder(10, 42, multiple=4)
    first = list(order)
    order.set_epoch(1)
    assert sorted(first) == [*range(10), 10, 10] and first[-2:] == [10, 10] and len(order) == 12
    assert list(order) != first and math.isclose(sum(list(order)[:10]), 45)
