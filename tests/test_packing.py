"""Packs: nothing leaks from one conversation to another, and nothing but the layout differs from conversations by themselves.

Losses that agree at random weights prove little. A conversation is changed instead, every token of it, and the others' logits must stay as they were to the last bit."""
import copy
import json
import random

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from finetunings import fork, place, settings  # noqa: F401 (place and fork are fixtures)
from tulu_study.training.packing import best_fit, flatten, register_segments, segment_attention, spread, supervised, token_weights, weighted_loss

FAMILIES = ("llama", "gpt_neox", "opt")
LENGTHS = (20, 31, 9, 2)
OURS = ("targets", "of", "weights", "tokens", "supervised")   # of a flattened pack, not for the model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(family, attention, dropout=0.0):
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, OPTConfig
    configs = {"llama": LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, attention_dropout=dropout),
               "gpt_neox": GPTNeoXConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, attention_dropout=dropout, hidden_dropout=dropout),
               "opt": OPTConfig(vocab_size=100, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64, dropout=dropout, attention_dropout=dropout)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[family], attn_implementation=attention)
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=0.3)   # large enough for attention to matter
    return model


def conversation(length, draw):
    ids = [draw.randrange(1, 100) for _ in range(length)]
    return {"input_ids": ids, "labels": [i if k == 0 or draw.random() < 0.6 else -100 for k, i in enumerate(ids)]}   # the first token has a label that nothing predicts


def four(seed=0):
    draw = random.Random(seed)
    return [conversation(n, draw) for n in LENGTHS]


def pack_of(rows, weights=None):
    return flatten(list(zip(rows, weights or [1.0] * len(rows))))


def logits_of(model, rows, **options):
    "Logits at every position, conversation by conversation."
    import torch
    batch = {name: value for name, value in pack_of(rows).items() if name not in (*OURS, "logits_to_keep")}
    torch.manual_seed(1)   # the same dropout
    with torch.no_grad(): logits = model(**batch, **options).logits[0]
    return logits[:sum(LENGTHS)].split(LENGTHS)


def leaks(model, **options):
    "(places whose logits moved when others changed, places whose own change did not show)"
    import torch
    rows, moved, blind = four(), [], []
    before = logits_of(model, rows, **options)
    for changed in range(len(rows)):
        after = logits_of(model, [*rows[:changed], four(seed=7)[changed], *rows[changed + 1:]], **options)
        moved += [(changed, k) for k in range(len(rows)) if k != changed and not torch.equal(before[k], after[k])]
        blind += [changed] if torch.equal(before[changed], after[changed]) else []
    return moved, blind


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_changed_conversation_leaves_the_others_as_they_were(family, training, use_cache):
    model = tiny(family, register_segments(), dropout=0.1)
    assert leaks(model.train(training), use_cache=use_cache) == ([], [])


def test_the_search_for_leaks_finds_one(monkeypatch):
    "One segment for the whole row is what packing without bounds would be."
    from tulu_study.training import packing
    bounds = packing.flatten
    monkeypatch.setitem(globals(), "flatten", lambda pack: {**bounds(pack), "cu_seq_lens_q": bounds(pack)["cu_seq_lens_q"][[0, -1]]})
    moved, _ = leaks(tiny("llama", register_segments()).eval(), use_cache=False)
    assert {(0, 1), (0, 2), (0, 3), (1, 2), (2, 3)} <= set(moved)


def _under_deepspeed(base, stage, out):
    "In a process of its own: DeepSpeed's state is global."
    import deepspeed
    import torch
    from tulu_study.training.config import FinetuneConfig
    from tulu_study.training.finetune import join_ranks, load_model, skip_unused_libraries
    skip_unused_libraries()
    join_ranks(cuda=False)
    model, _ = load_model(FinetuneConfig(base_dir=base, data_file="-", out_dir="-"), 100)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
                                      config={"train_batch_size": 1, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True})
    batch = pack_of(four())
    targets, of, weights, *_ = (batch.pop(name) for name in OURS)
    first = weighted_loss(engine(**batch, use_cache=False).logits, targets, of, weights)
    engine.backward(first)
    engine.step()
    second = weighted_loss(engine(**batch, use_cache=False).logits, targets, of, weights)
    found = {"learnt": second.item() != first.item()}
    for mode in ("train", "eval"):
        getattr(engine, mode)()
        found[mode] = leaks(engine, use_cache=False)
    with open(out, "w") as f: json.dump(found, f)


@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_leaks_under_deepspeed(place, fork, tmp_path, stage):
    fork(_under_deepspeed, str(place / "llama"), stage, str(tmp_path / "found.json"))
    assert json.loads((tmp_path / "found.json").read_text()) == {"train": [[], []], "eval": [[], []], "learnt": True}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss", ["token", "microbatch"])
def test_loss_and_gradients_are_those_of_padded_conversations(family, loss):
    "Both ways to take the mean; the padded side is transformers' own loss over a padded batch."
    import torch
    rows, packed, padded = four(), tiny(family, register_segments()), tiny(family, "sdpa")
    packed.load_state_dict(padded.state_dict())
    weights = token_weights([supervised(row) for row in rows], loss, 2)
    batches = [[pair for pair, keep in zip(zip(rows, weights), pattern) if keep] for pattern in ((1, 0, 1, 0), (0, 1, 0, 1))]   # another split than the micro-batches
    ours = 0.0
    for batch in map(flatten, batches):
        targets, of, weights_, *_ = (batch.pop(name) for name in OURS)
        part = weighted_loss(packed(**batch, use_cache=False).logits, targets, of, weights_)
        part.backward()
        ours += part.item()
    theirs = 0.0
    total = sum(supervised(row) for row in rows)
    for group in (rows[:2], rows[2:]):
        width = max(len(row["input_ids"]) for row in group)
        fill = lambda name, value: torch.tensor([row[name] + [value] * (width - len(row["input_ids"])) for row in group])
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in group])
        part = padded(input_ids=fill("input_ids", 0), labels=fill("labels", -100), attention_mask=mask, use_cache=False, **({"num_items_in_batch": total} if loss == "token" else {})).loss
        (part / (1 if loss == "token" else 2)).backward()
        theirs += part.item() / (1 if loss == "token" else 2)
    assert ours == pytest.approx(theirs, abs=1e-5)
    pairs = zip(packed.parameters(), padded.parameters(), strict=True)
    assert max((mine.grad - other.grad).abs().max().item() / (1 + other.grad.abs().max().item()) for mine, other in pairs) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_conversations_alone(family):
    import torch
    packed, plain = tiny(family, register_segments()).eval(), tiny(family, "sdpa").eval()
    plain.load_state_dict(packed.state_dict())
    for mine, row in zip(logits_of(packed, four(), use_cache=False), four(), strict=True):
        with torch.no_grad(): alone = plain(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        assert torch.allclose(mine, alone, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    import torch
    gradients = []
    for checkpointing in (False, True):
        model = tiny("llama", register_segments()).train()
        if checkpointing: model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = pack_of(four())
        targets, of, weights, *_ = (batch.pop(name) for name in OURS)
        weighted_loss(model(**batch, use_cache=False).logits, targets, of, weights).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_the_flash_kernel_is_called_as_it_is_documented(monkeypatch):
    "No GPU here: the kernel is replaced by what its documentation says that it computes."
    import torch
    from torch.nn.attention import varlen
    from tulu_study.training import packing

    def kernel(query, key, value, begins, begins_key, longest, longest_key, *, scale=None, window_size, enable_gqa):
        assert window_size == (-1, 0) and enable_gqa and torch.equal(begins, begins_key) and longest == longest_key == int(begins.diff().max())
        out = torch.empty_like(query)
        for a, b in zip(begins.tolist(), begins.tolist()[1:]):
            q, k, v = (x[a:b].transpose(0, 1) for x in (query, key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)))
            scores = (q @ k.transpose(1, 2)) * (scale or q.shape[-1] ** -0.5) + torch.full((b - a, b - a), -torch.inf).triu(1)
            out[a:b] = (scores.softmax(-1) @ v).transpose(0, 1)
        return out

    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 24, 8) for heads in (4, 2, 2))
    module = copy.copy(torch.nn.Identity())
    module.num_key_value_groups, module.is_causal = 2, True
    call = lambda: segment_attention(module, query, key, value, None, scaling=0.3, cu_seq_lens_q=torch.tensor([0, 7, 20, 24], dtype=torch.int32), max_length_q=13)[0]
    by_pieces = call()
    monkeypatch.setattr(packing, "has_flash", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    assert torch.allclose(call(), by_pieces, atol=1e-6) and call().shape == (1, 24, 4, 8)


def test_under_autocast_float32_queries_reach_the_flash_kernel(monkeypatch):
    "As QLoRA makes them, whose normalisations are float32."
    import torch
    from torch.nn.attention import varlen
    from tulu_study.training import packing
    asked = []
    monkeypatch.setattr(packing, "has_flash", lambda query, _: query.dtype is torch.bfloat16)
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, *others, **_: asked.append({x.dtype for x in (query, *others[:2])}) or query)
    query, key, value = (torch.randn(1, 4, 24, 8) for _ in range(3))
    call = lambda: segment_attention(torch.nn.Identity(), query, key, value, None, scaling=0.3, cu_seq_lens_q=torch.tensor([0, 24], dtype=torch.int32), max_length_q=24)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16): assert call().dtype is torch.float32
    assert asked == [{torch.bfloat16}] and call().dtype is torch.float32 and len(asked) == 1


def test_two_rows_or_no_bounds_are_refused():
    import torch
    model = tiny("llama", register_segments())
    for ids in ([[1, 2, 3]], [[1, 2], [3, 4]]):
        with pytest.raises(ValueError, match="lay packs out with `flatten`"): model(input_ids=torch.tensor(ids), use_cache=False)


lists = st.lists(st.integers(1, 50), max_size=40)


@given(lists, st.integers(50, 120))
@hypothesis_settings(max_examples=100, deadline=None, derandomize=True)
def test_best_fit_fills_packs(lengths, capacity):
    packs = best_fit(lengths, capacity)
    loads = sorted(sum(lengths[i] for i in pack) for pack in packs)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths))) and all(load <= capacity for load in loads)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity   # no two packs would go into one


@given(lists, st.integers(50, 120), st.integers(0, 5))
@hypothesis_settings(max_examples=100, deadline=None, derandomize=True)
def test_spread_makes_as_many_packs_as_asked(lengths, capacity, more):
    count = max(1, len(best_fit(lengths, capacity)) + more)
    packs = spread(lengths, capacity, count)
    assert len(packs) == count and sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in pack) for pack in packs) <= capacity and packs == spread(lengths, capacity, count)
