"""Handlers for encoding (loss mask, token ids), the learning-rate schedule and weight differences."""
import functools
import hashlib
import itertools
import json
import re

from handlers import CannotRebuild, converted, handles, in_mirror, same

CHARACTERS = 'character-level toy: BOS "<s>" prepended, "</s>" one token, every other character one token'


class CharacterTokenizer:
    "The toy of the vectors: markers are one token each, every other character is one token."

    def __init__(self, bos, markers, eos):
        self.bos_token, self.eos_token, self.vocabulary = bos, eos, {}
        self.pattern = re.compile("|".join([*map(re.escape, markers), "."]), re.DOTALL)

    def _id(self, piece):
        return self.vocabulary.setdefault(piece, len(self.vocabulary))

    def __call__(self, text, truncation=False, max_length=None, **_):
        pieces = ([self.bos_token] if self.bos_token else []) + self.pattern.findall(text)
        return {"input_ids": [self._id(piece) for piece in pieces][:max_length if truncation else None]}

    def convert_ids_to_tokens(self, ids):
        pieces = {number: piece for piece, number in self.vocabulary.items()}
        return [pieces[number] for number in ids]


def toy_tokenizer(words):
    "Build the tokenizer that a vector describes."
    if "character" not in words:
        raise CannotRebuild(f"unknown toy tokenizer: {words}")
    bos = re.search(r'BOS "([^"]+)"', words)
    single = re.findall(r'"([^"]+)" (?:is |as )?(?:one|a single) token', words)
    eos = re.search(r'EOS "([^"]+)"', words)
    if not (single or eos):
        raise CannotRebuild(f"the description names no end-of-sequence token: {words}")
    eos = eos[1] if eos else single[0]
    markers = [*single, eos] + ([bos[1]] if bos else [])
    return CharacterTokenizer(bos[1] if bos else "", sorted(set(markers), key=len, reverse=True), eos)


def describe(row, tokenizer):
    "A row in the terms of the vectors: text and loss as spans of characters."
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    begins = bool(tokenizer.bos_token) and bool(pieces) and pieces[0] == tokenizer.bos_token
    widths = [0 if begins and i == 0 else len(piece) for i, piece in enumerate(pieces)]
    starts = [0, *itertools.accumulate(widths)]
    counts = [label != -100 for label in row["labels"]]
    text, spans = "".join(pieces[1:] if begins else pieces), []
    for counted, group in itertools.groupby(range(len(pieces)), key=counts.__getitem__):
        group = list(group)
        if counted:
            spans.append([starts[group[0]], starts[group[-1] + 1]])
    return {"text": text, "loss_char_spans": spans, "loss_text": [text[a:b] for a, b in spans], "n_tokens": len(pieces),
            "first_token": pieces[0] if pieces else None, "n_loss_tokens": sum(counts),
            "bos_label_masked": not counts[0] if counts else None}


def compare(row, tokenizer, case):
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    found = describe(row, tokenizer)
    same({key: found.get(key) for key in case.output}, case.output)


@handles("finetune.encode_with_messages_format")
def chat_encoding(case):
    from tulu_study.training import encode
    given = case.options | (case.input if isinstance(case.input, dict) else {"messages": case.input})
    tokenizer = toy_tokenizer(given.get("tokenizer", CHARACTERS))
    compare(encode(given["messages"], tokenizer, _length(given)), tokenizer, case)


def _length(given):
    if "max_seq_length" not in given: raise CannotRebuild("max_seq_length is not given")
    return given["max_seq_length"]


@handles("finetune.encode_with_prompt_completion_format")
def prompt_completion_encoding(case):
    from tulu_study.training import encode_prompt_completion
    given = case.options | case.input
    tokenizer = toy_tokenizer(given.get("tokenizer", CHARACTERS))
    compare(encode_prompt_completion(given["prompt"], given["completion"], tokenizer, _length(given)), tokenizer, case)


@handles("transformers.get_scheduler")
def learning_rate_schedule(case):
    import torch
    from tulu_study.training import schedule, warmup_steps
    given, expected = case.options | case.input, case.output["lr_over_peak_at_step_0_to_n"] if isinstance(case.output, dict) else case.output
    steps = given["num_training_steps"]
    said = given.get("warmup_steps", given["num_warmup_steps"] if isinstance(given.get("num_warmup_steps"), int) else None)
    if "warmup_ratio" in given and said is not None:
        same(warmup_steps(steps, given["warmup_ratio"]), said, "warm-up steps")
    warmup = said if said is not None else warmup_steps(steps, given.get("warmup_ratio", 0.0))
    kind = given.get("lr_scheduler_type", given.get("scheduler_type", given.get("name", "linear")))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, factors = schedule(optimizer, steps, warmup, kind), []
    for _ in expected:
        factors.append(round(scheduler.get_last_lr()[0], 10))
        optimizer.step()
        scheduler.step()
    same(factors, expected, "learning rate over its peak")


@functools.lru_cache(maxsize=None)
def mirror_tokenizer(name):
    from tulu_study.training import load_tokenizer
    return load_tokenizer(in_mirror("tokenizers", name))


@handles("mirror_encodings")
def encodings_of_real_data(case):
    "Every token and label of the first conversations of a dataset; `encode_all` gives the same but for fully masked rows."
    from tulu_study.core.files import read_jsonl
    from tulu_study.training import encode, encode_all
    *words, name, length = case.id.split("/")   # before the tokenizer and the length: a dataset, perhaps a protocol and options
    if not length.isdigit(): raise CannotRebuild(f"{case.id}: no length at the end")
    rows = (row for row in read_jsonl(converted("/".join(words))) if row.get("messages"))
    rows = list(itertools.islice(rows, case.output["conversations"]))
    tokenizer, length = mirror_tokenizer(name), int(length)
    encoded = [encode(row["messages"], tokenizer, length) for row in rows]
    learnt = [row for row in encoded if any(label != -100 for label in row["labels"])]
    same(encode_all(rows, tokenizer, length).rows, learnt, "encode_all beside encode")
    compact = lambda numbers: json.dumps(numbers, separators=(",", ":"))
    lines = [f"{compact(row['input_ids'])}|{compact(row['labels'])}\n" for row in encoded]
    found = {"conversations": len(encoded), "tokens": sum(len(row["input_ids"]) for row in encoded),
             "supervised": sum(label != -100 for row in encoded for label in row["labels"]),
             "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}
    same({key: found[key] for key in case.output}, case.output)


@handles("scripts/weight_diff.py")
def weight_differences(case):
    "Make a tiny base and a tuned model with a few rows more, go there and back, and measure as the vector did."
    import tempfile
    from pathlib import Path
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from tulu_study.training.weight_diff import make_diff, recover
    sizes = re.search(r"vocab\w* (\d+)(?: *-> *(\d+))?", str(case.input))
    if not sizes or "llama" not in str(case.input).lower(): raise CannotRebuild(f"neither a tiny LLaMA nor its vocabulary: {case.input}")
    old, new = int(sizes[1]), int(sizes[2] or sizes[1])
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        raw = LlamaForCausalLM(LlamaConfig(vocab_size=old, **shape)).float()
        raw.save_pretrained(folder / "raw")
        tuned = AutoModelForCausalLM.from_pretrained(folder / "raw", dtype=torch.float32)
        tuned.resize_token_embeddings(new, mean_resizing=False)
        with torch.no_grad():
            for parameter in tuned.parameters(): parameter += 1e-2 * torch.randn_like(parameter)
        tuned.save_pretrained(folder / "tuned")
        make_diff(folder / "raw", folder / "tuned", folder / "diff")
        recover(folder / "raw", folder / "diff", folder / "back")
        diff, back = (AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto").state_dict() for name in ("diff", "back"))
    wanted, started = tuned.state_dict(), raw.state_dict()
    error = lambda name, rows=slice(None): (back[name][rows] - wanted[name][rows]).abs().max().item()
    rounding = lambda name, rows=slice(None): wanted[name][rows].abs().max().item() * 2.0 ** -23   # a unit in the last place of the largest weight
    expected, given = case.output, case.output.get("embeddings", {})
    others = [name for name in wanted if name not in ("model.embed_tokens.weight", "lm_head.weight")]
    if "max_err_non_embedding" in expected:
        for name in others: assert error(name) <= max(expected["max_err_non_embedding"], rounding(name)), name
    for name, said in given.items():
        rows, pad = slice(0, old), slice(old, new)
        if "max_err_original_rows" in said: assert error(name, rows) <= max(said["max_err_original_rows"], rounding(name, rows)), name
        if "max_err_pad_row" in said and new > old: assert error(name, pad) <= max(said["max_err_pad_row"], rounding(name, pad)), name
        if "diff_equals_tuned_minus_raw_on_original_rows" in said:
            same(torch.equal(diff[name][rows], wanted[name][rows] - started[name]), said["diff_equals_tuned_minus_raw_on_original_rows"], f"{name}: tuned minus raw")
    if "diff_dtype" in expected: same({str(tensor.dtype) for tensor in diff.values()}, {expected["diff_dtype"]}, "type of the difference")
