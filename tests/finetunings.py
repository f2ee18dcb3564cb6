"""Fine-tunings that take a second or two: tiny base models of three families, 22 invented conversations, and processes forked from one that has the imports.

The tiny LLaMA has 71 thousand float32 parameters. Two runs that add the same numbers in another order may differ by `TOLERANCE` in any
weight after six optimiser steps at rate 1e-3 (AdamW's first steps have nearly the size of the rate, whatever the gradient's)."""
import json
import multiprocessing
import os
import random
import sys

import pytest

from helpers import free_ports
from tulu_study.training.config import FinetuneConfig
from tulu_study.training.finetune import main
from tulu_study.training.launch import environment_for

TOLERANCE = 2e-5
SETTINGS = dict(batch_size=8, micro_batch_size=2, learning_rate=1e-3, warmup_ratio=0.2, max_seq_length=96, precision="fp32", data="sums")


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

def _rank(env, function, args):
    os.environ.update(env)
    sys.exit(function(*args))


@pytest.fixture(scope="module")
def fork(place):
    """fork(function, *args, ranks=1, status=0): call it in as many processes as there are ranks, in a trainer's environment, and expect their exit status.

    With a GPU each process imports for itself: CUDA does not survive a fork."""
    import torch
    os.environ.update({k: v for k, v in environment_for(settings(place, "x"), direct=True).items() if k in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")})
    context = multiprocessing.get_context("forkserver")
    if not torch.cuda.is_available(): context.set_forkserver_preload(["torch", "transformers.trainer", "transformers.models.llama.modeling_llama", "deepspeed", "tulu_study.training.finetune", "tulu_study.training.verification"])

    def run(function, *args, ranks=1, status=0):
        env = environment_for(settings(place, "x"), direct=True) | {"WORLD_SIZE": str(ranks)} | ({"MASTER_PORT": str(free_ports(1)[0])} if ranks > 1 else {})
        processes = [context.Process(target=_rank, args=({**env, "RANK": str(r), "LOCAL_RANK": str(r)}, function, args)) for r in range(ranks)]
        for process in processes: process.start()
        for process in processes: process.join(400)
        assert [process.exitcode for process in processes] == [status] * ranks
    return run


@pytest.fixture(scope="module")
def train(place, fork):
    "train('name', zero_stage=3, …) -> folder of the checkpoint; once per name."
    def run(name, **changes):
        config = settings(place, name, **changes)
        if not (place / name / "verification.json").exists():
            (place / name).mkdir()
            fork(main, str(config.save(place / f"{name}.json")), ranks=config.ranks)
        return place / name
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
