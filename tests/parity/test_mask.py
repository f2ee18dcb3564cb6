"""The loss mask, which is found by counting the tokens of prefixes, beside one that is read off the characters: random conversations, every tokenizer at hand."""
import functools
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings, strategies as st

from handlers import MIRROR

HERE = sorted(folder.name for folder in (MIRROR / "tokenizers").iterdir() if (folder / "tokenizer.json").exists()) if (MIRROR / "tokenizers").is_dir() else []
NAMES = HERE + ["opt"] * ("gpt2" in HERE)
FAMILIES = {"llama": "llama", "gpt_neox": "gpt_neox", "opt": "opt"}   # what each is completed as; others are taken as they are

words = st.sampled_from(["a", "heron ", " fish", "\n", "\n\n", "\t", "  ", "<|user|>", "<|assistant|>\n", "</s>", "<|endoftext|>", "<s>", "é", "鷺", "🙂", "\u200b", "ـ", "1234", "!?", "'s"])
contents = st.lists(st.one_of(words, st.text(max_size=4)), max_size=8).map("".join)
conversations = st.lists(st.tuples(st.sampled_from(["user", "assistant", "assistant", "system"]), contents).map(lambda pair: dict(zip(("role", "content"), pair))), min_size=1, max_size=5)


@functools.cache
def opt_folder():
    "OPT's tokenizer, made of GPT-2's: the same pieces behind <s>, <pad>, </s> and <unk>, and no <|endoftext|>."
    folder = Path(tempfile.mkdtemp(prefix="opt-"))
    saved = json.loads((MIRROR / "tokenizers" / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = [piece for piece, _ in sorted(saved["model"]["vocab"].items(), key=lambda item: item[1]) if piece != "<|endoftext|>"]
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    saved["model"]["vocab"] = {piece: i for i, piece in enumerate([*specials, *pieces])}
    saved["added_tokens"] = [{"id": i, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for i, piece in enumerate(specials)]
    (folder / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}))
    return folder


@functools.cache
def tokenizer_of(name):
    from tulu_study.training import load_tokenizer
    return load_tokenizer(opt_folder() if name == "opt" else MIRROR / "tokenizers" / name, FAMILIES.get(name))


@pytest.mark.skipif("opt" not in NAMES, reason="the tokenizers are not on this machine (TULU_MIRROR)")
def test_opts_tokenizer_is_completed_as_the_reference_does():
    tokenizer = tokenizer_of("opt")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == ("</s>", "</s>", "<pad>", "<unk>") and len(tokenizer) == 50260
    assert tokenizer("a")["input_ids"][:1] == [2] and tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<s>", "<pad>", "</s>", "<unk>"]


def spans(messages, eos):
    "(text, character ranges that carry loss, whether the very beginning does), written down from the description of the format."
    text, ranges = "", []
    for i, message in enumerate(messages):
        head, answers = f"<|{message['role']}|>\n", message["role"] == "assistant"
        given_header = i > 0 and messages[i - 1]["role"] != "assistant"   # masked together with what it follows
        start = len(text) + (len(head) if given_header else 0)
        text += head + message["content"].strip() + (eos if answers else "") + "\n"
        if answers: ranges.append((start, len(text)))
    return text.strip(), ranges, messages[0]["role"] == "assistant"


def oracle(messages, tokenizer, length):
    text, ranges, first = spans(messages, tokenizer.eos_token)
    made = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)
    front = 1 if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else 0
    inside = lambda begin, end: any(a <= begin and end <= b for a, b in ranges)
    keep = [first if i < front else inside(*offset) for i, offset in enumerate(made["offset_mapping"])]
    return made["input_ids"], [token if kept else -100 for token, kept in zip(made["input_ids"], keep)]


@pytest.mark.skipif(not NAMES, reason="the tokenizers are not on this machine (TULU_MIRROR)")
@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_that_of_the_characters(name):
    from tulu_study.training import encode, encode_all
    tokenizer = tokenizer_of(name)
    if not tokenizer.eos_token: pytest.skip(f"tokenizers/{name} has no end-of-sequence token: no answer can be ended")

    @given(conversations, st.sampled_from([8, 24, 2048]))
    @example([{"role": "assistant", "content": "said"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "  "}, {"role": "system", "content": "x"}, {"role": "assistant", "content": "</s>"}], 2048)
    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    def check(messages, length):
        row = encode(messages, tokenizer, length)
        input_ids, labels = oracle(messages, tokenizer, length)
        assert row["input_ids"] == list(input_ids)
        assert row["labels"] == labels, [(tokenizer.convert_ids_to_tokens(i), mine != -100, kept != -100) for i, mine, kept in zip(input_ids, row["labels"], labels)]
        together = encode_all([{"dataset": "random", "id": "random_0", "messages": messages}], tokenizer, length)
        learnt, complete = any(label != -100 for label in labels), all(label != -100 for label in labels)
        assert together.rows == ([row] if learnt else []) and together.dropped == ([] if learnt else ["random_0"]) and together.unmasked == (["random_0"] if complete else [])

    check()
