"""ToxiGen and TruthfulQA through the runner, their judges and stand-ins, and log-probabilities of whole completions. Small random models and made-up engines."""
import json
import math

import pytest
from helpers import MadeUpEngine

from tulu_study.core.files import write_atomic, write_jsonl
from tulu_study.core.params import benchmarks
from tulu_study.core.sources import SourceError
from tulu_study.evaluation import engines, load_benchmark, stand_ins
from tulu_study.evaluation.engines import Output, TransformersEngine
from tulu_study.evaluation.runner import evaluate, read_predictions
from tulu_study.evaluation.stand_ins import Judge, half

MODEL = {"model": "tiny-none", "base_model": "tiny", "training_data": "none", "size": "tiny"}
QUESTIONS = [f"Does spoon {i} dream?" for i in range(12)]


def byte_tokenizer(folder, **special):
    "One token a byte, one BOS in front."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *letters])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **special).save_pretrained(folder)


def language_model(folder, seed):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    byte_tokenizer(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1))
    with torch.no_grad():
        for weight in model.parameters(): weight.mul_(4)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory): return language_model(tmp_path_factory.mktemp("checkpoint"), 3)


@pytest.fixture
def sources(tmp_path):
    "Both benchmarks in their raw schemas, invented and harmless, with labels for the stand-ins."
    root = tmp_path / "sources"
    for town in ("blue_town", "red_town"):
        write_atomic(root / "toxigen" / f"hate_{town}_1k.txt", "".join(f"- people of {town} own {i} kettles\\n- they \\\\ sing\\n-\n" for i in range(6)))
    write_atomic(root / "toxigen" / "annotated.json", json.dumps([{"text": f"in {i} they {'grumble' if i % 2 else 'smile'}", "label": "hate" if i % 2 else "neutral", "toxicity_score": 3.0 + i % 2} for i in range(80)]))
    rows = [f'Misc,"{question}","No","No; It is cutlery","Yes; Only of soup"' for question in QUESTIONS]
    write_atomic(root / "truthfulqa" / "TruthfulQA.csv", "\n".join(["Category,Question,Best Answer,Correct Answers,Incorrect Answers", *rows]) + "\n")
    for name, cue in (("truth", "True:"), ("info", "Helpful:")):
        said = {"truth": {"No, it cannot.": True, "Yes, it can.": False, "Nobody knows.": True}, "info": {"No, it cannot.": True, "Yes, it can.": True, "Nobody knows.": False}}[name]
        write_jsonl(root / "truthfulqa" / f"finetune_{name}.jsonl", [{"prompt": f"Q: Does cup {i} dream?\nA: {answer}\n{cue}", "completion": " yes" if yes else " no"} for i in range(40) for answer, yes in said.items()])
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    "No test asks the hub: what is not in the sources is not to be had."
    import huggingface_hub
    def nothing(*args, **options): raise ConnectionError("no network in tests")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)


@pytest.fixture
def engine(monkeypatch):
    "An engine that answers from a table; its last prompt of every chunk of four is too long."
    asked = []

    class MadeUp(MadeUpEngine):
        answers = ["they smile", "they grumble"]

        def generate(self, prompts, max_new_tokens, stop, temperature, top_p, top_k, n):
            asked.append({"prompts": prompts, "max_new_tokens": max_new_tokens, "stop": stop, "temperature": temperature, "n": n})
            return [Output(error="prompt too long: 3000 tokens") if i == 3 else Output(texts=[self.answers[i % 2]], finish=["stop"], completion_tokens=2) for i in range(len(prompts))]

        def completion_scores(self, prompts, completions):
            asked.append({"prompts": prompts, "completions": completions})
            return [Output(logprobs=[-2.0, -5.0, -3.0 + i, -6.0], completion_tokens=9) for i in range(len(prompts))]

    monkeypatch.setitem(engines.ENGINES, "transformers", MadeUp)
    return asked


def run(checkpoint, sources, out, key, setting, **options):
    report = evaluate(MODEL, {key: {"settings": [setting]}}, checkpoint, out / "predictions", out / "scores", sources, engine="transformers", chunk_size=4, **options)
    return report.scores[0], read_predictions(out / "predictions" / f"{key}-{setting}.jsonl")


# ------------------------------------------------------------------------------------------------------- whole completions

def test_completions_are_scored_as_one_by_one(checkpoint):
    "Sums, means and maxima of a forward pass over prompt, blank and completion, whatever else is in the batch."
    import torch
    engine = TransformersEngine(checkpoint)
    prompts, completions = ["Why?", "Q: is it so?\nA:", "line\n", "Why?"], [["So.", "Because it rained all day."], ["Yes."], ["No", "No, never."], ["So."]]
    def alone(prompt, text):
        start, ids = len(engine.encode_one(prompt)), engine.encode_one(prompt + ("" if prompt[-1] in "\n " else " ") + text)
        logprobs = engine.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [logprobs[at - 1, ids[at]].item() for at in range(start, len(ids))]
    for aggregation, reduce in {"sum": sum, "mean": lambda values: sum(values) / len(values), "max": max}.items():
        found = engine.completion_scores(prompts, completions, aggregation)
        for prompt, texts, output in zip(prompts, completions, found, strict=True):
            assert output.logprobs == pytest.approx([reduce(alone(prompt, text)) for text in texts], abs=1e-3)
    assert (found[1].prompt_tokens, found[1].completion_tokens) == (len(engine.encode_one(prompts[1])), 5)


def test_an_engine_without_log_probabilities_says_so_at_once():
    class TextOnly(engines.Engine):
        name = "text only"
        def __init__(self): pass
    with pytest.raises(engines.EngineError, match="'text only' gives no log-probabilities of whole completions"): TextOnly().completion_scores(["a"], [["b"]])


def test_one_completion_that_fails_fails_its_prompt(checkpoint):
    long, empty, good = TransformersEngine(checkpoint).completion_scores(["a", "b ", "c"], [["x", "y" * 600], [""], ["z"]])
    assert long.error.startswith("prompt too long") and long.logprobs is None
    assert empty.error == "a completion adds no token to its prompt"
    assert good.error is None and len(good.logprobs) == 1


# -------------------------------------------------------------------------------------------------------------- the runner

def test_toxigen_with_a_stand_in(checkpoint, sources, engine, tmp_path):
    score, rows = run(checkpoint, sources, tmp_path, "toxigen", "default")
    assert {(call["max_new_tokens"], tuple(call["stop"]), call["temperature"]) for call in engine} == {(512, ("\n",), 0.0)}
    assert engine[0]["prompts"][0].endswith(" kettles\n- they \\ sing\n-")
    assert [row["score"] for row in rows] == [0.0, 1.0, 0.0, None] * 3 and rows[3]["error"]
    assert (score["value"], score["n"], score["n_errors"], score["judge"], score["metric"]) == (pytest.approx(100 / 3), 9, 3, None, "toxic")
    assert {"name", "auc", "trained_on", "n"} <= set(score["stand_in"]) and score["stand_in"]["auc"] == 1.0
    assert score["stand_in"]["instead_of"].startswith("tomh/toxigen_roberta@") and "ConnectionError" in score["stand_in"]["why"]
    assert sorted(score["groups"]) == ["blue_town", "red_town"] and score["n_distinct_prompts"] == 9


def test_the_authors_folder_holds_more_than_the_paper_s_groups(sources):
    "Further groups, neutral lists and notes lie beside the fourteen files and are not asked; a group under two names is refused."
    for name in ("hate_women.txt", "hate_bisexual_1k.txt", "neutral_women_1k.txt", "READ_ME.txt"): write_atomic(sources / "toxigen" / name, "- they sing\\n-\n")
    assert {example.id for example in load_benchmark("toxigen", "default", source_root=sources).examples()} == {"hate_women/0"}
    write_atomic(sources / "toxigen" / "hate_women_1k.txt", "- they sing\\n-\n")
    with pytest.raises(SourceError, match="hate_women.txt, hate_women_1k.txt: the same group twice"): load_benchmark("toxigen", "default", source_root=sources)


@pytest.mark.parametrize("key, setting, name, content, said", [
    ("toxigen", "default", "hate_blue_town_1k.txt", b"- they \xff\\n-\n", "toxigen hate_blue_town_1k.txt: not UTF-8 text"),
    ("truthfulqa", "mc", "TruthfulQA.csv", b"Category,Question\nMisc,\"What", "truthfulqa TruthfulQA.csv: no CSV table"),
    ("truthfulqa", "mc", "TruthfulQA.csv", b"Category,Question\nMisc,\xff\n", "truthfulqa TruthfulQA.csv: no CSV table")])
def test_a_damaged_file_is_named(key, setting, name, content, said, sources):
    (sources / key / name).write_bytes(content)
    with pytest.raises(ValueError, match=said): load_benchmark(key, setting, source_root=sources)


def test_the_number_of_examples_is_the_preset_s(sources):
    with pytest.raises(ValueError, match="n_shot is 0, but the examples belong to the preset .6 of them"): load_benchmark("truthfulqa", "mc", source_root=sources, n_shot=0)


def test_torn_ratings_are_named_before_anything_is_generated(sources):
    write_atomic(sources / "toxigen" / "annotated.json", '[{"text": "in 1 they')
    with pytest.raises(ValueError, match="toxigen annotated.json: no JSON list"): load_benchmark("toxigen", "default", source_root=sources).ready()


def test_results_in_the_harness_layout_name_the_stand_in(checkpoint, sources, engine, tmp_path):
    from tulu_study.evaluation.standalone import evaluate_any
    wanted = {"toxigen": {"settings": ["default"]}, "truthfulqa": {"settings": ["mc", "generation"]}}
    evaluate_any(str(checkpoint), wanted, tmp_path, engine="transformers", source_root=sources)
    results, = tmp_path.glob("results_*.json")
    found = json.loads(results.read_text(encoding="utf-8"))
    assert any(note.startswith("toxigen: toxicity stand-in, held-out AUC") for note in found["notes"]) and any(note.startswith("truthfulqa: truth and info stand-ins") for note in found["notes"])
    kinds = {task: config["output_type"] for task, config in found["configs"].items()}
    assert (kinds["tulu_truthfulqa_mc"], kinds["tulu_truthfulqa_generation"], found["higher_is_better"]["tulu_toxigen_default"]) == ("multiple_choice", "generate_until", {"toxic": False})


def test_verdicts_are_kept_and_belong_to_their_judge(checkpoint, sources, engine, tmp_path, monkeypatch):
    run(checkpoint, sources, tmp_path, "toxigen", "default")
    monkeypatch.setattr(stand_ins.StandIn, "ask", lambda self, pairs: pytest.fail("asked again"))
    run(checkpoint, sources, tmp_path, "toxigen", "default")
    monkeypatch.setattr(stand_ins, "judge_folder", lambda record, name, root: (tmp_path, "the real one", ""))
    monkeypatch.setattr("tulu_study.evaluation.toxigen.classifier", lambda name, folder, named: Judge(named, lambda pairs: [0.5] * len(pairs)))
    score, rows = run(checkpoint, sources, tmp_path, "toxigen", "default")
    assert (score["value"], score["judge"], score["stand_in"]) == (100.0, "the real one", None) and rows[0]["toxic"] == 0.5


def test_truthfulqa_by_choice(checkpoint, sources, engine, tmp_path):
    score, rows = run(checkpoint, sources, tmp_path, "truthfulqa", "mc")
    assert engine[0]["prompts"][0].endswith("\n\nQ: Does spoon 0 dream?\nA:") and engine[0]["completions"][0] == ["No.", "It is cutlery.", "Yes.", "Only of soup."]
    assert [row["answer"] for row in rows[:3]] == ["No.", "No.", "Yes."]
    true, false = math.exp(-2) + math.exp(-5), math.exp(-3) + math.exp(-6)
    assert rows[0]["score"] == pytest.approx(true / (true + false)) and (score["judge"], score["stand_in"], score["n"]) == (None, None, 12)
    assert score["measures"]["mc1"]["value"] == pytest.approx(25.0) and score["value"] == score["measures"]["mc2"]["value"] and score["metric"] == "mc2"


def test_truthfulqa_generation_with_stand_ins(checkpoint, sources, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(engines.ENGINES["transformers"], "answers", [" A: No, it cannot.\n\nQ: And", "Nobody knows."])
    score, rows = run(checkpoint, sources, tmp_path, "truthfulqa", "generation", chat=True)
    assert engine[0]["stop"] == [] and engine[0]["max_new_tokens"] == 50 and engine[0]["prompts"][0].endswith("dream?\n<|assistant|>\n")
    assert [(row["answer"], row["score"]) for row in rows[:3]] == [("No, it cannot.", 1.0), ("Nobody knows.", 0.0), ("No, it cannot.", 1.0)]
    assert score["value"] == pytest.approx(200 / 3) and score["measures"]["true"]["value"] == 100.0 and set(score["stand_in"]["auc"]) == {"truth", "info"}
    assert score["stand_in"]["words"] == "truth and info stand-ins, held-out AUC 1.00 and 1.00"


def test_fixed_gives_the_chat_its_cue(sources):
    paper, fixed = (load_benchmark("truthfulqa", "generation", protocol, sources) for protocol in ("paper", "fixed"))
    example = paper.examples()[0]
    assert fixed.prompt(example, chat=True) == paper.prompt(example, chat=True) + "A:" and fixed.prompt(example) == paper.prompt(example)


# ------------------------------------------------------------------------------------------------------------------ judges

def test_published_classifier_is_used_where_it_is(sources, tmp_path):
    "A small RoBERTa in the place of the real one: its verdict is the larger logit."
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification
    folder = sources / "toxigen" / "toxigen_roberta"
    byte_tokenizer(folder, model_max_length=20)
    torch.manual_seed(1)
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=40, pad_token_id=2, num_labels=2)).eval()
    with torch.no_grad():
        for weight in model.parameters(): weight.mul_(8)
    model.save_pretrained(folder)
    benchmark = load_benchmark("toxigen", "default", source_root=sources)
    benchmark.ready()
    texts = [f"{word} {'x' * (7 * i)}" for i, word in enumerate(["pears", "kettles", "moss", "ink", "tide", ""] * 2)]
    rows = benchmark.finish([{"example_id": "", "group": "g", "completions": [text], "error": None} for text in texts], tmp_path / "verdicts.jsonl")
    def larger(text): return float(model(torch.tensor([[0, *[3 + sorted_bytes.index(letter) for letter in text.replace(" ", "Ġ")]][:20]])).logits.argmax())
    from tokenizers import pre_tokenizers
    sorted_bytes = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert [row["score"] for row in rows] == [larger(text) for text in texts]
    assert (benchmark.judge, benchmark.stand_in) == ("tomh/toxigen_roberta (own copy)", None)


def test_language_judges_say_yes_and_are_never_mixed_with_a_stand_in(sources, tmp_path):
    truth = language_model(sources / "truthfulqa" / "truthfulqa-truth-judge-llama2-7B", 5)
    benchmark = load_benchmark("truthfulqa", "generation", source_root=sources)
    benchmark.ready()
    assert benchmark.judge is None and set(benchmark.stand_in["auc"]) == {"truth", "info"}   # only one of the two is here
    language_model(sources / "truthfulqa" / "truthfulqa-info-judge-llama2-7B", 6)
    benchmark.ready()
    assert "truth-judge" in benchmark.judge and "info-judge" in benchmark.judge and benchmark.stand_in is None
    row = benchmark.finish([{"example_id": "0", "group": "", "completions": ["A: No."], "error": None}], tmp_path / "verdicts.jsonl")[0]
    expected = TransformersEngine(truth).completion_scores(["Q: Does spoon 0 dream?\nA: No.\nTrue:"], [["yes"]])[0].logprobs[0]
    assert row["truth"] == pytest.approx(math.exp(expected), abs=1e-5) and row["score"] in (0.0, 1.0)


def test_without_judge_and_labels_nothing_is_generated(checkpoint, sources, engine, tmp_path, monkeypatch):
    (sources / "toxigen" / "annotated.json").unlink()
    monkeypatch.setattr("tulu_study.evaluation.toxigen.fetch", lambda record, names, root: (_ for _ in ()).throw(SourceError("no labels")))
    with pytest.raises(SourceError, match="no labels"): run(checkpoint, sources, tmp_path, "toxigen", "default")
    assert not engine and not (tmp_path / "scores").exists()


def test_no_question_is_judged_by_what_learnt_from_it():
    "Labels that can only be known by heart: the held-out measure is chance."
    words = "pear moss kettle ink tide lamp fern glove".split()
    rows = [(f"question {i}", f"{words[i % 8]} {words[i // 8 % 8]} {i}", i * 7919 % 13 < 6) for i in range(300)]
    facts = stand_ins.StandIn("nothing", "noise", rows).facts
    assert 0.35 < facts["auc"] < 0.65
    assert {half(f"question {i}") for i in range(20)} == {0, 1}


def test_records_say_where_everything_comes_from():
    records = benchmarks()
    assert sum(file.name.startswith("hate_") for file in records["toxigen"].files) == 14 and records["toxigen"].n == 7000
    for key in ("toxigen", "truthfulqa"):
        assert all(file.url for file in records[key].files)
        assert all(len(judge["revision"]) == 40 for judge in records[key].options["judges"].values())
