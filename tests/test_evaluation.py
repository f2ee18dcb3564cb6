"""The engines and the runner: agreement, resumption, errors, fallback. A random model of 0.1 M parameters stands for the checkpoint."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import MadeUpEngine

from tulu_study.core.files import write_atomic, write_jsonl
from tulu_study.evaluation import engines
from tulu_study.evaluation.runner import checkpoint_hash, evaluate, read_predictions

WORDS = "the a cat dog sat ran on under red blue mat tree and then it was happy sad big small house ball play said".split()
MODEL = {"model": "tiny-none", "base_model": "tiny", "training_data": "none", "size": "tiny"}
BENCHMARKS = {"gsm": {"settings": ["direct"], "n": 12}, "mmlu": {"settings": ["0shot"], "per_group": 3}}
OPTIONS = {"engine": "transformers", "chunk_size": 5, "max_length": 448}


@pytest.fixture(scope="module", autouse=True)
def quick():
    "One thread (two that share a busy machine wait for each other) and short answers."
    import torch
    from tulu_study.evaluation.gsm import GSM
    threads, tokens = torch.get_num_threads(), GSM.max_new_tokens
    torch.set_num_threads(1)
    GSM.max_new_tokens = 16
    yield
    torch.set_num_threads(threads)
    GSM.max_new_tokens = tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A random LLaMA with head size 32 (the smallest that vLLM's CPU attention takes) and a byte-level tokenizer that adds one BOS."
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                                         num_key_value_heads=1, head_dim=32, max_position_embeddings=512, bos_token_id=0, eos_token_id=1))
    with torch.no_grad():
        for weight in model.parameters(): weight.mul_(3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    "GSM and MMLU in their raw schemas, invented."
    root = tmp_path_factory.mktemp("sources")
    write_jsonl(root / "gsm8k" / "test.jsonl", [{"question": f"The cat sat {i} times and ran {i + 1} times?", "answer": f"#### {2 * i + 1}"} for i in range(30)])
    write_atomic(root / "gsm8k" / "cot_exemplars.json", json.dumps([{"question": f"{i} dogs?", "cot_answer": f"So the answer is {i}.", "short_answer": str(i)} for i in range(1, 9)]))
    for subject in ("astronomy", "marketing"):
        for split in ("dev", "test"):
            write_atomic(root / "mmlu" / split / f"{subject}_{split}.csv", "".join(f"Which cat {i}?,red,blue,big,small,{'ABCD'[i % 4]}\n" for i in range(6)))
    return root


@pytest.fixture(scope="module")
def whole(checkpoint, sources, tmp_path_factory):
    "An uninterrupted run."
    out = tmp_path_factory.mktemp("whole")
    report = evaluate(MODEL, BENCHMARKS, checkpoint, out / "predictions", out / "scores", sources, **OPTIONS)
    return out, report


def files(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_scores_say_what_was_measured(whole):
    out, report = whole
    assert sorted(p.name for p in (out / "scores").iterdir()) == ["gsm-direct.json", "mmlu-0shot.json"]
    gsm, mmlu = (json.loads((out / "scores" / name).read_text()) for name in ("gsm-direct.json", "mmlu-0shot.json"))
    wanted = {"model", "base_model", "training_data", "size", "benchmark", "version", "setting", "metric", "protocol", "value", "low", "high", "interval", "n",
              "groups", "n_errors", "engine", "dtype", "judge", "stand_in", "unit", "bos", "prompts_sha256"}
    assert wanted <= set(gsm) and wanted <= set(mmlu)
    assert (gsm["n"], mmlu["n"], set(mmlu["groups"]), gsm["bos"]) == (12, 6, {"astronomy", "marketing"}, "one")
    assert gsm["low"] <= gsm["value"] <= gsm["high"] and gsm["unit"] == "percent" and gsm["engine"].startswith("transformers ")
    rows = read_predictions(out / "predictions" / "mmlu-0shot.jsonl")
    assert all(row["answer"] == "ABCD"[row["option_logprobs"].index(max(row["option_logprobs"]))] for row in rows)
    assert mmlu["value"] == pytest.approx(100 * sum(row["score"] for row in rows) / len(rows))
    assert (report.made, report.kept) == (18, 0) and report.tokens > 0


def test_second_run_makes_nothing_and_changes_no_byte(whole, checkpoint, sources, monkeypatch):
    out, _ = whole
    before = files(out)
    monkeypatch.setitem(engines.ENGINES, "transformers", None)  # starting an engine would fail
    report = evaluate(MODEL, BENCHMARKS, checkpoint, out / "predictions", out / "scores", sources, **OPTIONS)
    assert (report.made, report.kept, files(out)) == (0, 18, before)


def test_kill_and_resume_is_byte_identical(whole, checkpoint, sources, tmp_path):
    "Kill -9 in the middle of the second chunk, from another process; the same call then does that chunk again and completes."
    script = f"""
import torch; torch.set_num_threads(1)
import tulu_study.evaluation.runner as runner
from pathlib import Path
from tulu_study.evaluation.gsm import GSM
GSM.max_new_tokens = 16
add, seen = runner.Growing.add, []
def slow(file, row):
    add(file, row); seen.append(row)
    if len(seen) == 8: Path({str(tmp_path / 'ready')!r}).touch(); import time; time.sleep(60)
runner.Growing.add = slow
runner.evaluate({MODEL!r}, {BENCHMARKS!r}, {str(checkpoint)!r}, {str(tmp_path / 'predictions')!r}, {str(tmp_path / 'scores')!r}, {str(sources)!r}, **{OPTIONS!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.time() + 90
    while not (tmp_path / "ready").exists():
        assert process.poll() is None and time.time() < deadline, "the first run ended or hung in its second chunk"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(read_predictions(tmp_path / "predictions" / "gsm-direct.jsonl")) == 8 and not (tmp_path / "scores").exists()
    report = evaluate(MODEL, BENCHMARKS, checkpoint, tmp_path / "predictions", tmp_path / "scores", sources, **OPTIONS)
    assert report.kept == 5
    assert files(tmp_path / "predictions") == files(whole[0] / "predictions") and files(tmp_path / "scores") == files(whole[0] / "scores")


@pytest.mark.parametrize("damage", ["torn line", "half a chunk", "another prompt", "another gold answer", "bytes that are no JSON"])
def test_damaged_predictions_are_made_again(damage, whole, checkpoint, sources, tmp_path):
    for name, content in files(whole[0] / "predictions").items(): write_atomic(tmp_path / name, content)
    path = tmp_path / "gsm-direct.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    broken = {"torn line": lines[:8] + [lines[8][:20]], "half a chunk": lines[:7], "bytes that are no JSON": [*lines[:6], b"\xff\xfe{\n", *lines[7:]],
              "another gold answer": [*lines[:6], lines[6].replace(b'"target": "', b'"target": "1'), *lines[7:]],
              "another prompt": [*lines[:6], lines[6].replace(json.loads(lines[6])["prompt_hash"].encode(), b"0" * 16), *lines[7:]]}[damage]
    path.write_bytes(b"".join(broken))
    report = evaluate(MODEL, BENCHMARKS, checkpoint, tmp_path, tmp_path / "scores", sources, **OPTIONS)
    assert (report.kept, report.made) == (5 + 6, 7)
    assert path.read_bytes() == (whole[0] / "predictions" / "gsm-direct.jsonl").read_bytes()


@pytest.mark.parametrize("name, content, said", [
    ("test.jsonl", '{"question": "How many?"}\n', "gsm test.jsonl: 1 of 1 rows cannot be used"),
    ("test.jsonl", '{"question": "How many?", "answer": "#### nan"}\n', "gsm test.jsonl row 0: the answer ends in"),
    ("cot_exemplars.json", '[{"quest', "gsm cot_exemplars.json: no JSON"), ("cot_exemplars.json", '[{"question": "How many?"}]', "gsm cot_exemplars.json: 1 of 1 rows")])
def test_damaged_gsm_files_are_named(name, content, said, sources, tmp_path):
    import shutil
    from tulu_study.evaluation import load_benchmark
    write_atomic(shutil.copytree(sources, tmp_path / "sources") / "gsm8k" / name, content)
    with pytest.raises(ValueError, match=said): load_benchmark("gsm", "cot", source_root=tmp_path / "sources")


def test_a_question_that_occurs_twice_is_refused_before_generating(checkpoint, sources, tmp_path, monkeypatch):
    "Two models are compared question by question; the tables would refuse the predictions after everything had run."
    from tulu_study.evaluation.gsm import GSM
    once = GSM.load
    def twice(self):
        once(self)
        self.rows += self.rows[:2]
    monkeypatch.setattr(GSM, "load", twice)
    with pytest.raises(ValueError, match="gsm-direct: 2 ids occur more than once among the questions .test-0, test-1.*Remove the repeated rows"):
        evaluate(MODEL, {"gsm": {"settings": ["direct"], "n": "all"}}, checkpoint, tmp_path, tmp_path, sources, **OPTIONS)
    assert not any(tmp_path.iterdir())


def test_other_settings_do_not_reuse_predictions(whole, checkpoint, sources, tmp_path):
    for name, content in files(whole[0] / "predictions").items(): write_atomic(tmp_path / name, content)
    report = evaluate(MODEL, {"gsm": BENCHMARKS["gsm"]}, checkpoint, tmp_path, tmp_path / "scores", sources, **OPTIONS | {"dtype": "bfloat16"})
    assert (report.kept, report.made) == (0, 12)


def test_more_examples_keep_the_whole_chunks(whole, checkpoint, sources, tmp_path):
    "Full chunks are kept when the sample grows; the shorter last chunk is not, as its requests travelled in other company."
    for name, content in files(whole[0] / "predictions").items(): write_atomic(tmp_path / name, content)
    report = evaluate(MODEL, {"gsm": {"settings": ["direct"], "n": 14}}, checkpoint, tmp_path, tmp_path / "scores", sources, **OPTIONS)
    same = [row["example_id"] for row in read_predictions(tmp_path / "gsm-direct.jsonl")][:10] == [row["example_id"] for row in read_predictions(whole[0] / "predictions" / "gsm-direct.jsonl")][:10]
    assert (report.kept, report.made) == ((10, 4) if same else (0, 14))


def test_long_prompts_are_errors_not_answers(checkpoint, sources, tmp_path):
    report = evaluate(MODEL, {"gsm": {"settings": ["direct"], "n": 3}}, checkpoint, tmp_path, tmp_path, sources, **OPTIONS | {"max_length": 60})
    row = read_predictions(tmp_path / "gsm-direct.jsonl")[0]
    assert row["error"].startswith("prompt too long") and "the model takes 60" in row["error"]
    assert (row["completions"], row["answer"], row["score"]) == ([], None, None)
    score = report.scores[0]
    assert (score["value"], score["n"], score["n_errors"], score["errors"]) == (None, 0, 3, ["prompt too long"])


class Broken(engines.Engine):
    "Fails on prompts that contain a word, or on everything."
    name = "broken"

    def run_generate(self, ids, decoding, seeds):
        if any("13" in self.tokenizer.decode(row) or self.fail_all for row in ids): raise MemoryError("no room for the cache\nsecond line")
        return [engines.Output(texts=["7"], finish=["stop"], completion_tokens=1) for _ in ids]

    fail_all = False


def test_an_engine_error_costs_only_its_own_request(checkpoint):
    outputs = Broken(checkpoint).generate(["cat 12", "cat 13", "cat 14"], 5)
    assert [output.error for output in outputs] == [None, "engine: MemoryError: no room for the cache", None]
    assert [output.texts for output in outputs] == [["7"], [], ["7"]]


def test_a_chunk_that_fails_as_a_whole_stops_the_run(checkpoint, sources, tmp_path, monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "transformers", type("AllBroken", (Broken,), {"fail_all": True}))
    with pytest.raises(engines.EngineError, match="gsm-direct: every request failed; the first: engine: MemoryError"):
        evaluate(MODEL, {"gsm": BENCHMARKS["gsm"]}, checkpoint, tmp_path, tmp_path, sources, **OPTIONS)
    assert not (tmp_path / "gsm-direct.jsonl").exists() and not (tmp_path / "gsm-direct.json").exists()


def test_two_bos_tokens_are_refused(checkpoint):
    engine = Broken(checkpoint)
    assert engine.bos == "one" and engine.encode(["cat"])[0][0] == 0
    with pytest.raises(engines.EngineError, match="found 2 BOS tokens"): engine.encode(["<s>cat"])


def test_without_vllm_transformers_takes_over_and_says_so(checkpoint, sources, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # what import sees where vLLM is not installed
    with pytest.warns(UserWarning, match="vLLM cannot be imported"):
        report = evaluate(MODEL, {"mmlu": BENCHMARKS["mmlu"]}, checkpoint, tmp_path, tmp_path, sources, **OPTIONS | {"engine": "vllm"})
    assert report.scores[0]["engine"].startswith("transformers") and "took over" in report.scores[0]["engine_note"]


def test_batches_do_not_change_completions(checkpoint):
    "Left padding: a prompt alone and in company of longer ones gives the same text, tokens and log-probabilities."
    engine = engines.TransformersEngine(checkpoint)
    prompts = ["The cat", "The dog ran under the big red tree and then it was", "a", "the happy dog said"]
    together, alone = engine.generate(prompts, 12), [engine.generate([prompt], 12)[0] for prompt in prompts]
    assert together == alone and {output.completion_tokens for output in together} != {0}
    scores = [engine.option_scores(group, [66, 67, 68]) for group in (prompts, prompts[:1])]
    assert scores[0][0].logprobs == pytest.approx(scores[1][0].logprobs, abs=1e-4)


def test_sampling_gives_n_texts_and_repeats(checkpoint):
    engine = engines.TransformersEngine(checkpoint)
    first, second = (engine.generate(["The cat"], 6, temperature=0.8, top_p=0.95, n=3) for _ in range(2))
    assert first == second and len(first[0].texts) == 3 and len(set(first[0].texts)) > 1


def test_sampled_text_belongs_to_its_prompt(checkpoint):
    "No two problems share their noise, the company changes none of it, and what is drawn follows the model's distribution."
    import torch
    engine = engines.TransformersEngine(checkpoint)
    ask = lambda prompts, n=4, tokens=6: engine.generate(prompts, tokens, temperature=0.8, top_p=0.95, n=n)
    prompts = ["The cat", "The dog ran under the big red tree", "a"]
    assert ask(prompts) == [ask([prompt])[0] for prompt in prompts] == ask(prompts[::-1])[::-1]
    assert len({engines.prompt_seed(42, prompt) for prompt in prompts}) == 3 and engines.prompt_seed(42, "a") != engines.prompt_seed(43, "a")
    rows = engine.complete([engine.encode_one("The cat")] * 500, engines.Decoding(1, temperature=0.5), list(range(500)))
    likely = (engine.model(torch.tensor([engine.encode_one("The cat")])).logits[0, -1] / 0.5).softmax(-1)
    best = int(likely.argmax())
    share, expected = sum(row[0] == best for row in rows) / 500, likely[best].item()
    assert share == pytest.approx(expected, abs=5 * (expected * (1 - expected) / 500) ** 0.5 + 1e-6), "five standard errors"
    assert 0.02 < expected < 0.98, "the test would say nothing"


def test_batches_hold_no_more_sequences_and_tokens_than_they_may(checkpoint, monkeypatch):
    "Each sample is a sequence, and what may be generated takes room too."
    engine, held = engines.TransformersEngine(checkpoint), []
    generate = engine.model.generate
    monkeypatch.setattr(engine.model, "generate", lambda **given: held.append((given["input_ids"].shape, given["generation_config"].max_new_tokens)) or generate(**given))
    outputs = engine.generate(["The cat", "a", "the dog"], 4, temperature=0.8, n=20)
    assert [len(output.texts) for output in outputs] == [20] * 3 and [shape[0] for shape, _ in held] == [20] * 3
    held.clear()
    monkeypatch.setattr(engine, "max_batch", 8)
    engine.generate(["The cat"], 4, temperature=0.8, n=20)
    assert [shape[0] for shape, _ in held] == [8, 8, 4]
    held.clear()
    monkeypatch.setattr(engine, "batch_tokens", 100)
    engine.generate(["The cat sat on the mat"] * 9, 20)
    engine.generate(["The cat sat on the mat"], 20, temperature=0.8, n=9)
    assert len(held) > 4 and all(rows * (width + new) <= 100 for (rows, width), new in held)


@pytest.mark.parametrize("there", [False, True])
def test_vllm_captures_graphs_where_there_is_a_gpu(there, checkpoint, monkeypatch):
    "And asks every prompt with noise of its own. vLLM itself is made up here."
    import types
    import torch
    import torch._dynamo
    asked = []
    class LLM:
        def __init__(self, **options):
            asked.append(options)
            self.llm_engine = types.SimpleNamespace(vllm_config=types.SimpleNamespace(scheduler_config=types.SimpleNamespace(max_num_seqs=4)))
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=dict))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", types.SimpleNamespace(RequestOutputKind=types.SimpleNamespace(FINAL_ONLY="whole")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with torch._dynamo.config.patch(disable=False):
        engine = engines.VLLMEngine(checkpoint)
        assert asked[0]["enforce_eager"] is not there and torch._dynamo.config.disable is not there and asked[0]["enable_prefix_caching"] and "speculative_config" not in asked[0]
        engines.VLLMEngine(checkpoint, greedy=True)
        assert ("speculative_config" in asked[1]) is not there  # no GPU has confirmed it
    requests = [engines.Request(prompt, engines.Decoding(5, temperature=0.8, n=3)) for prompt in ("one", "two")]
    first, second = (engine.sampling(piece) for piece in engine.pieces(requests, [], {}))
    assert first["seed"] == engines.prompt_seed(42, "one") != second["seed"] and first["n"] == 3


@pytest.mark.parametrize("bos, model_type, wanted", [("<s>", "llama", None), ("</s>", "opt", None), ("<s>", "phi3", "missing"), ("<|endoftext|>", "gpt_neox", "none"), ("<|im_start|>", "llama", "none")])
def test_a_family_that_always_saw_a_bos_is_not_asked_without(bos, model_type, wanted):
    class Tokenizer:
        bos_token, bos_token_id = bos, 7
        def __call__(self, text): return {"input_ids": [9]}
    if wanted: assert engines.leading_bos(Tokenizer(), model_type, "x") == wanted
    else:
        with pytest.raises(engines.EngineError, match="puts no BOS token in front of a prompt, but has '.*add_bos_token"): engines.leading_bos(Tokenizer(), model_type, "x")
    Tokenizer.__call__ = lambda self, text: {"input_ids": [7, 9]}
    assert engines.leading_bos(Tokenizer(), model_type, "x") == "one"


def test_a_llama_that_has_lost_its_bos_is_refused_before_anything_is_asked(checkpoint, sources, tmp_path):
    import shutil
    folder = shutil.copytree(checkpoint, tmp_path / "lost")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    write_atomic(folder / "tokenizer.json", json.dumps(tokenizer))
    with pytest.raises(engines.EngineError, match="LLaMA family"): evaluate(MODEL, BENCHMARKS, folder, tmp_path / "p", tmp_path / "s", sources, **OPTIONS)
    with pytest.raises(engines.EngineError, match="LLaMA family"): engines.TransformersEngine(folder)
    assert not (tmp_path / "p").exists()


# ---- example by example

class Noted(MadeUpEngine):
    "Answers at once, the last request first; notes what it was asked."
    asked, resets, released = [], 0, 0

    def reset(self): Noted.resets += 1
    def release(self): Noted.released += 1

    def stream(self, requests):
        Noted.asked.append(requests)
        for at in reversed(range(len(requests))):
            yield at, engines.Output(texts=["3"], finish=["stop"], completion_tokens=1) if requests[at].decoding else engines.Output(logprobs=[-1.0, -2.0, -3.0, -4.0], completion_tokens=1)


@pytest.fixture
def noted(monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "transformers", Noted)
    monkeypatch.setattr(Noted, "asked", [])
    monkeypatch.setattr(Noted, "resets", 0)
    monkeypatch.setattr(Noted, "released", 0)
    monkeypatch.setattr("tulu_study.evaluation.mmlu.MMLU.option_ids", lambda self, tokenizer: [1, 2, 3, 4])
    return Noted


def test_all_benchmarks_go_through_one_queue(noted, checkpoint, sources, tmp_path):
    "No barrier between chunks and benchmarks, the cache kept, prompts with the same beginning one after the other; the files in the examples' order all the same."
    def run(folder, **options): return evaluate(MODEL, BENCHMARKS, checkpoint, folder / "predictions", folder / "scores", sources, **OPTIONS | options)
    run(tmp_path / "example", resume="example")
    requests, = noted.asked
    assert len(requests) == 18 and noted.resets == 0 and [request.kind for request in requests] == ["generate"] * 12 + ["options"] * 6
    prompts = [request.prompt for request in requests]
    assert prompts[:12] == sorted(prompts[:12]) and prompts[12:] == sorted(prompts[12:])
    noted.asked.clear()
    run(tmp_path / "chunk")
    assert [len(asked) for asked in noted.asked] == [5, 5, 2, 5, 1] and noted.resets == 5
    example, chunk = (files(tmp_path / mode / "predictions") for mode in ("example", "chunk"))
    for name in ("gsm-direct.jsonl", "mmlu-0shot.jsonl"):
        name = next(path for path in chunk if path.name == name)
        assert example[name] == chunk[name]
    with pytest.raises(ValueError, match="expected chunk or example"): run(tmp_path, resume="both")


def test_the_engine_is_told_where_all_is_greedy(noted, checkpoint, sources, tmp_path, monkeypatch):
    "Not in chunks, whose bytes may not depend on what else is asked; nor on what is left of a run that was broken off."
    from tulu_study.evaluation.gsm import GSM
    told = []
    monkeypatch.setattr(Noted, "__init__", lambda self, folder, **options: told.append(options["greedy"]))
    def run(folder, benchmarks, **options): return evaluate(MODEL, benchmarks, checkpoint, tmp_path / folder, tmp_path / folder, sources, **OPTIONS | options)
    gsm = {"gsm": BENCHMARKS["gsm"]}
    run("both", gsm, resume="example")
    run("both", BENCHMARKS, resume="example")
    (tmp_path / "both" / "gsm-direct.jsonl").unlink()
    run("both", BENCHMARKS, resume="example")  # GSM alone is missing
    run("chunks", gsm)
    monkeypatch.setattr(GSM, "temperature", 0.8)
    run("sampled", gsm, resume="example")
    assert told == [True, False, False, False, False]


def test_chunks_and_threads_matter_only_where_chunks_keep_company(noted, checkpoint, sources, tmp_path, monkeypatch):
    def run(**options): return evaluate(MODEL, BENCHMARKS, checkpoint, tmp_path / "p", tmp_path / "s", sources, **OPTIONS | options)
    run(resume="example")
    monkeypatch.setenv("TULU_THREADS", "7")
    assert (again := run(resume="example", chunk_size=3)).made == 0 and again.kept == 18
    with pytest.warns(UserWarning, match="made with another chunk_size, threads; they are kept as gsm-direct"): assert run().made == 18
    with pytest.warns(UserWarning, match="made with another chunk_size; they"): assert run(chunk_size=3).made == 18


def test_predictions_of_another_setting_are_put_aside_and_come_back(noted, checkpoint, sources, tmp_path):
    "They may have been paid for."
    def run(n=12, **options): return evaluate(MODEL, {"gsm": {"settings": ["direct"], "n": n}}, checkpoint, tmp_path / "p", tmp_path / "s", sources, **OPTIONS | {"resume": "example"} | options)
    run()
    write_atomic(tmp_path / "p" / "gsm-direct.checks.jsonl", "{}\n")
    before = files(tmp_path / "p")
    with pytest.warns(UserWarning, match=r"made with another dtype; they are kept as gsm-direct\.[0-9a-f]{8}\.old\.jsonl, and come back"): assert run(dtype="bfloat16").made == 12
    old, = (tmp_path / "p").glob("*.old.jsonl")
    assert old.read_bytes() == before[next(path for path in before if path.name == "gsm-direct.jsonl")] and not (tmp_path / "p" / "gsm-direct.checks.jsonl").exists()
    with pytest.warns(UserWarning, match="another dtype"): assert (back := run()).made == 0 and back.kept == 12
    assert {name: content for name, content in files(tmp_path / "p").items() if ".old" not in name.name} == before


def test_examples_that_are_not_asked_for_this_time_are_kept(noted, checkpoint, sources, tmp_path):
    def run(n): return evaluate(MODEL, {"gsm": {"settings": ["direct"], "n": n}}, checkpoint, tmp_path / "p", tmp_path / "s", sources, **OPTIONS | {"resume": "example"})
    assert run("all").made == 30
    whole = (tmp_path / "p" / "gsm-direct.jsonl").read_bytes()
    fewer = run(6)
    assert (fewer.made, fewer.scores[0]["n_examples"]) == (0, 6) and len(read_predictions(tmp_path / "p" / "gsm-direct.jsonl")) == 6
    assert run("all").made == 0 and (tmp_path / "p" / "gsm-direct.jsonl").read_bytes() == whole and not list((tmp_path / "p").glob("*.old.jsonl"))


def test_where_chunks_keep_company_too(noted, checkpoint, sources, tmp_path):
    "They are put aside, and said so; a chunk with them in it is not whole and is asked anew."
    def run(n): return evaluate(MODEL, {"gsm": {"settings": ["direct"], "n": n}}, checkpoint, tmp_path / "p", tmp_path / "s", sources, **OPTIONS)
    run("all")
    before = {json.dumps(row, sort_keys=True) for row in read_predictions(tmp_path / "p" / "gsm-direct.jsonl")}
    with pytest.warns(UserWarning, match="24 predictions are of examples that are not asked for now; they are kept as gsm-direct"): run(6)
    old, = (tmp_path / "p").glob("*.old.jsonl")
    assert {json.dumps(row, sort_keys=True) for row in [*read_predictions(old), *read_predictions(tmp_path / "p" / "gsm-direct.jsonl")]} == before


def test_a_kill_while_predictions_change_places_mixes_nothing(noted, checkpoint, sources, tmp_path, monkeypatch):
    from tulu_study.evaluation import runner
    def run(**options): return evaluate(MODEL, {"gsm": {"settings": ["direct"], "n": 12}}, checkpoint, tmp_path / "p", tmp_path / "s", sources, **OPTIONS | {"resume": "example"} | options)
    path, write = tmp_path / "p" / "gsm-direct.jsonl", runner.write_atomic
    run()
    first = path.read_bytes()
    with pytest.warns(UserWarning, match="another dtype"): run(dtype="bfloat16")
    write_atomic(path, path.read_bytes().replace(b'"finish"', b'"sixteen": 1, "finish"'))
    second = path.read_bytes()
    def dies(place, content):
        if place.name.endswith(".identity.json"): raise KeyboardInterrupt
        write(place, content)
    monkeypatch.setattr(runner, "write_atomic", dies)
    with pytest.warns(UserWarning, match="another dtype"), pytest.raises(KeyboardInterrupt): run()
    monkeypatch.setattr(runner, "write_atomic", write)
    assert run(dtype="bfloat16").made == 0 and path.read_bytes() == second
    with pytest.warns(UserWarning, match="another dtype"): assert run().made == 0
    assert path.read_bytes() == first


def test_rows_of_a_second_writer_are_no_second_answer(noted, checkpoint, sources, tmp_path):
    def run(): return evaluate(MODEL, {"gsm": {"settings": ["direct", "direct"], "n": 12}}, checkpoint, tmp_path / "p", tmp_path / "s", sources, **OPTIONS | {"resume": "example"})
    with pytest.raises(ValueError, match="holds 24 predictions, expected one for each of 12 examples"): run()


def test_the_engine_is_gone_before_a_judge_is_asked(noted, checkpoint, sources, tmp_path, monkeypatch):
    "Both want the GPU."
    from tulu_study.evaluation.gsm import GSM
    seen = []
    monkeypatch.setattr(GSM, "finish", lambda self, rows, store: seen.append((noted.released, len(rows))) or rows)
    evaluate(MODEL, {"gsm": BENCHMARKS["gsm"]}, checkpoint, tmp_path / "p", tmp_path / "s", sources, **OPTIONS)
    assert seen == [(1, 12)]
    engine = engines.TransformersEngine(checkpoint)
    engine.release()
    assert engine.model is None and engine.generate(["a"], 2)[0].error.startswith("engine: ")


def test_kill_in_the_middle_repeats_no_finished_example(checkpoint, sources, tmp_path):
    "Kill -9 at the seventh prediction; the same command asks for the other eleven and nothing else, and ends with the same scores."
    script = f"""
import torch; torch.set_num_threads(1)
import tulu_study.evaluation.runner as runner, sys, os, signal
from tulu_study.evaluation.gsm import GSM
GSM.max_new_tokens = 16
add, seen = runner.Growing.add, []
def counted(file, row):
    add(file, row); seen.append(row["example_id"])
    if sys.argv[2] == "kill" and len(seen) == 7: os.kill(os.getpid(), signal.SIGKILL)
runner.Growing.add = counted
runner.evaluate({MODEL!r}, {BENCHMARKS!r}, {str(checkpoint)!r}, sys.argv[1] + "/predictions", sys.argv[1] + "/scores", {str(sources)!r}, **{OPTIONS!r} | dict(resume="example"))
print("MADE", *seen)
"""
    def run(folder, how): return subprocess.run([sys.executable, "-c", script, str(tmp_path / folder), how], capture_output=True, text=True, timeout=120)
    assert run("cut", "kill").returncode == -signal.SIGKILL
    there = {row["example_id"] for row in read_predictions(tmp_path / "cut" / "predictions" / "gsm-direct.jsonl")}
    assert len(there) == 7
    made = run("cut", "on").stdout.split("MADE")[1].split()
    assert len(made) == 11 and not there & set(made[:5])
    assert run("whole", "on").returncode == 0
    scores = [[json.loads(content) for content in files(tmp_path / folder / "scores").values()] for folder in ("cut", "whole")]
    assert scores[0] == scores[1]
    for name in ("gsm-direct", "mmlu-0shot"):
        rows = [read_predictions(tmp_path / folder / "predictions" / f"{name}.jsonl") for folder in ("cut", "whole")]
        assert [(row["example_id"], row["completions"], row["answer"]) for row in rows[0]] == [(row["example_id"], row["completions"], row["answer"]) for row in rows[1]]


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(engines.EngineError, match="holds no config.json"): engines.TransformersEngine(tmp_path)
    with pytest.raises(FileNotFoundError, match="found nothing"): checkpoint_hash(tmp_path)
    with pytest.raises(ValueError, match="choose vllm, transformers or auto"): engines.choose_engine("llama.cpp")


AGREE = """
import json, sys, weakref
import numba  # as in a notebook that used it before: vLLM starts all the same
from tulu_study.evaluation.engines import EngineError, TransformersEngine, VLLMEngine
checkpoint, stop, repeating = sys.argv[1:]
prompts = ["The cat sat", "the big red dog ran under the tree and", "a", "it was " * 30, "cat " * 2000]
found = {}
for cls in (VLLMEngine, TransformersEngine):
    engine = cls(checkpoint)
    found[engine.name] = runs = []
    for _ in range(2):
        engine.reset()
        runs.append([[vars(o) for o in engine.generate(prompts, 24)], [vars(o) for o in engine.generate(prompts, 24, stop=[stop])], [vars(o) for o in engine.option_scores(prompts, [66, 67, 68, 69])],
                     [vars(o) for o in engine.completion_scores(prompts, [["on the mat.", "under a happy tree"]] * 5)]])
    found[engine.name + " sampled"] = [o.texts for o in engine.generate(prompts[:2], 8, temperature=0.8, n=3)]
    model = weakref.ref(engine.model if engine.name == "transformers" else engine.llm.apply_model(lambda model: model)[0])
    engine.release()
    found[engine.name + " gone"] = model() is None
long = [prompts[i % 3] + " cat" * i for i in range(18)]  # more at once than are read ahead
for name, folder, greedy in (("plain", checkpoint, False), ("ahead", checkpoint, True), ("repeating", repeating, False), ("repeating ahead", repeating, True)):
    engine, steps = VLLMEngine(folder, greedy=greedy), []
    step = engine.step
    engine.step = lambda: steps.append(1) or step()
    found[name] = [[[vars(o) for o in engine.generate(asked, n, stop=stops)] for asked, n, stops in ((prompts, 24, ()), (prompts, 24, (stop,)), (long, 24, ()), (long[:3], 600, ()))]]  # the last to the model's limit of 512
    again = [prompts[0] + engine.generate(prompts[:1], 40)[0].texts[0]]
    said = engine.generate(again, 40)[0].texts[0]
    found[name][0].append([vars(o) for o in engine.generate(again, 40, stop=[max((said[i:i + 3] for i in range(len(said) - 2)), key=said.index)])])  # where the text repeats itself: within what is guessed
    found[name].append(len(steps))
    if name == "ahead":
        for ask in (lambda: engine.option_scores(prompts[:1], [66]), lambda: engine.completion_scores(prompts[:1], [["a"]]), lambda: engine.generate(prompts[:1], 4, temperature=0.8)):
            try: ask()
            except EngineError as error: found.setdefault("refused", []).append(str(error))
    engine.release()
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def repeating(checkpoint, tmp_path_factory):
    "The checkpoint, made to say the same twelve tokens over and over: its layers add little, and its head answers every token with the next."
    import shutil
    import torch
    from transformers import LlamaForCausalLM
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("repeating") / "m")
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight): weight.mul_(0.01)
        before = torch.arange(320) - 1
        before[2::12] += 12  # the first of every twelve follows the last
        model.lm_head.weight.copy_(model.model.embed_tokens.weight[before.clamp(0, 319)])
    model.save_pretrained(folder)
    return folder


def test_engines_agree(checkpoint, repeating):
    "vLLM and transformers: same texts, token counts, reasons to stop, errors and log-probabilities; and vLLM repeats itself after a reset."
    pytest.importorskip("vllm", reason="vLLM is not installed")
    plain = engines.TransformersEngine(checkpoint).generate(["The cat sat"], 24)[0].texts[0]
    stop = plain[4:6]  # a string that does occur
    done = subprocess.run([sys.executable, "-c", AGREE, str(checkpoint), stop, str(repeating)], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND", 1)[1])
    assert found["vllm"][0] == found["vllm"][1], "the same requests after a reset gave something else"
    (texts, cut, options, whole), (texts_ref, cut_ref, options_ref, whole_ref) = found["vllm"][0], found["transformers"][0]
    assert texts == texts_ref and cut == cut_ref
    assert cut[0]["texts"] == [plain[:plain.index(stop)]] and cut[0]["finish"] == ["stop"] and texts[4]["error"].startswith("prompt too long")
    for ours, theirs in zip(options[:4], options_ref[:4]): assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-3)
    for ours, theirs in zip(whole[:4], whole_ref[:4]): assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-2) and ours["completion_tokens"] == theirs["completion_tokens"]
    assert whole[4]["error"] == whole_ref[4]["error"] and options[4]["error"] == options_ref[4]["error"] and all(len(row) == 3 for row in found["vllm sampled"])
    assert found["vllm gone"] and found["transformers gone"], "a released engine still holds its model"
    (plain, steps), (ahead, fewer) = found["plain"], found["ahead"]
    assert ahead == plain and plain[0] == texts and plain[1] == cut, "reading ahead changed greedy completions"
    (plain, steps), (ahead, fewer) = found["repeating"], found["repeating ahead"]
    assert ahead == plain and fewer < 0.5 * steps, "nothing was read ahead"
    assert [output["finish"] for output in plain[3]] == [["length"]] * 3 and plain[3][0]["prompt_tokens"] + plain[3][0]["completion_tokens"] == 512
    assert plain[4][0]["finish"] == ["stop"] and 2 < plain[4][0]["completion_tokens"] < 40
    assert len(found["refused"]) == 3 and all("greedy completions alone" in said for said in found["refused"])
