"""The engine for models that others run, against a server of this machine's own that misbehaves on demand. No key, no network."""
import json
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tulu_study.core.files import read_jsonl, write_atomic, write_jsonl
from tulu_study.core.params import Endpoint, models
from tulu_study.evaluation.endpoint import NOT_LISTED, EndpointEngine, EstimatedTokens, Pace, retry_after
from tulu_study.evaluation.engines import Decoding, EngineError, Request, prompt_seed
from tulu_study.evaluation.runner import evaluate, read_predictions

KEY = "sk-a-key-that-nobody-may-see"


class StandIn(ThreadingHTTPServer):
    "Answers like an OpenAI-compatible server; `plan` says for the first requests what goes wrong, `answer` what a good one holds."
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.requests, self.headers, self.paths, self.most, self.now, self.lock = [], [], [], [], 0, 0, threading.Lock()
        self.answer = lambda body: ["42"] * body["n"]
        self.finish, self.top, self.usage, self.delay = "stop", None, True, 0

    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words): pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(body)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            wrong = server.plan.pop(0) if server.plan else None
        self.misbehave(wrong) if wrong else self.behave(body)

    def send(self, status, content, headers=()):
        self.send_response(status)
        for name, value in headers: self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def misbehave(self, wrong):
        kind, value = wrong if isinstance(wrong, tuple) else (wrong, None)
        if kind == "killed": self.connection.close()
        elif kind == "half":
            self.send_response(200)
            self.send_header("Content-Length", "500")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.connection.close()
        elif kind == "slow": time.sleep(value)
        elif kind == "no json": self.send(200, b"<html>502 Bad Gateway</html>")
        elif kind == "no choices": self.send(200, b'{"object": "list"}')
        elif kind == 429: self.send(429, json.dumps({"error": {"message": "slow down", "code": value[0] if value else None}}).encode(), value[1] if value else ())
        else: self.send(kind, json.dumps({"error": {"message": value or "no", "code": "context_length_exceeded" if "maximum context" in (value or "") else None}}).encode())

    def behave(self, body):
        server, chat = self.server, "messages" in body
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
        time.sleep(server.delay)
        with server.lock: server.now -= 1  # before the answer goes out: what follows it is another request
        texts = server.answer(body)
        top = server.top(body) if server.top else None
        listed = None if top is None else {"content": [{"token": next(iter(top)), "top_logprobs": [{"token": t, "logprob": v} for t, v in top.items()]}]} if chat else {"top_logprobs": [top]}
        choices = [{"index": i, "finish_reason": server.finish, "logprobs": listed, **({"message": {"role": "assistant", "content": text}} if chat else {"text": text})} for i, text in enumerate(texts)]
        usage = {"usage": {"prompt_tokens": 10, "completion_tokens": 3}} if server.usage else {}
        self.send(200, json.dumps({"model": "served-today", "choices": choices[::-1], **usage}).encode())


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    found = StandIn()
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def engine_for(server, waits=None, timeout=5.0, recording="off", recordings=None, **fields):
    "An engine that notes its waits instead of waiting."
    waits = [] if waits is None else waits
    engine = EndpointEngine(Endpoint(**{"url": server.url, "model": "served", "api": "completions"} | fields), recording=recording, recordings=recordings, timeout=timeout,
                            clock=time.monotonic if not fields.get("requests_per_minute") else lambda: sum(waits), sleep=waits.append)
    return engine


@pytest.mark.parametrize("api, path, field", [("completions", "/v1/completions", "prompt"), ("chat", "/v1/chat/completions", "messages")])
def test_a_prompt_is_completed(server, api, path, field):
    engine = engine_for(server, api=api, options={"top_k": 0})
    server.answer = lambda body: ["The answer is 42.\nQuestion: and now?"]
    output, = engine.generate(["How many?"], 32, ["\nQuestion:", "zb", "zc", "zd", "ze"])
    assert (output.texts, output.finish, output.error, output.prompt_tokens, output.completion_tokens) == (["The answer is 42."], ["stop"], None, 10, 3)
    body = server.requests[0]
    assert server.paths == [path] and body[field] == ("How many?" if api == "completions" else [{"role": "user", "content": "How many?"}])
    assert (body["temperature"], body["top_p"], body["n"], body["max_tokens"], body["top_k"], len(body["stop"])) == (0.0, 1.0, 1, 32, 0, 4), "every decoding option is sent; the protocol takes four stops"


def test_a_completion_is_asked_for_no_longer_than_the_context_allows(server):
    engine = engine_for(server, context=64)
    engine.generate(["short", "word " * 40, "word " * 100], 32)
    assert sorted(body["max_tokens"] for body in server.requests) == [1, 1, 32]
    assert 1 < engine.body("x", 20)["max_tokens"] and engine.generate(["word " * 20], 32)[0].error is None and 1 < server.requests[-1]["max_tokens"] < 32


def test_samples_come_back_in_order(server):
    server.answer = lambda body: [f"sample {i}" for i in range(body["n"])]
    output, = engine_for(server).generate(["x"], 8, temperature=0.8, top_p=0.95, n=3)
    assert output.texts == ["sample 0", "sample 1", "sample 2"] and server.requests[0]["seed"] == prompt_seed(42, "x")


def test_cut_off_completions_are_counted_as_such(server):
    server.finish = "length"
    assert engine_for(server).generate(["x"], 8)[0].finish == ["length"]


def test_half_a_character_at_the_end_can_be_kept(server, tmp_path):
    "A server that counts tokens may cut an emoji in two; JSON can say so, a file cannot hold it."
    server.answer = lambda body: ["Yes \U0001f600 and \ud83d"]
    output, = engine_for(server, recording="record", recordings=tmp_path / "answers.jsonl").generate(["x"], 8)
    assert output.texts == ["Yes \U0001f600 and \ufffd"] and "\ufffd" in (tmp_path / "answers.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("wrong", [(500, None), (503, None), "killed", "half", "no json", "no choices", (429, None)], ids=str)
def test_what_may_succeed_later_is_tried_again_with_growing_waits(server, wrong):
    server.plan, waits = [wrong] * 3, []
    engine = engine_for(server, waits)
    output, = engine.generate(["x"], 8)
    assert (output.texts, output.error) == (["42"], None) and len(server.requests) == 4
    assert len(waits) == 3 and all(2 ** i / 2 <= wait <= 2 ** i for i, wait in enumerate(waits)), "doubling, with jitter of at most a half"
    assert engine.usage["retries"] == 3 and engine.usage["requests"] == 1


def test_a_timeout_is_tried_again(server):
    server.plan = [("slow", 0.6)]
    assert engine_for(server, timeout=0.2).generate(["x"], 8)[0].texts == ["42"]


def test_it_gives_up_and_says_why(server):
    server.plan = ["no json"] * 6
    output, = engine_for(server).generate(["x"], 8)
    assert output.texts == [] and output.error.startswith("engine: unanswered: 6 attempts, the last: the answer cannot be read")


@pytest.mark.parametrize("headers, low", [([("Retry-After", "7")], 7), ([("retry-after-ms", "2500")], 2.5), ([("Retry-After", "date")], 8)])
def test_retry_after_is_honoured(server, headers, low):
    headers = [(name, formatdate(time.time() + 10, usegmt=True) if value == "date" else value) for name, value in headers]
    server.plan, waits = [(429, (None, headers))], []
    engine = engine_for(server, waits)
    engine.pace.clock = lambda: sum(waits)
    engine.pace.free_at = 0
    assert engine.generate(["x"], 8)[0].texts == ["42"]
    assert low <= sum(waits) <= low + 4


def test_an_endless_retry_after_ends_the_attempts(server):
    server.plan = [(429, (None, [("Retry-After", "86400")]))]
    output, = engine_for(server).generate(["x"], 8)
    assert "asks to wait 86400 s" in output.error and len(server.requests) == 1


def test_retry_after_that_means_nothing_is_ignored():
    assert [retry_after(headers) for headers in ({}, {"retry-after": "soon"}, {"retry-after": "-3"}, {"retry-after": "3"})] == [None, None, None, 3.0]


@pytest.mark.parametrize("wrong, words", [((401, "Incorrect key " + KEY), "refuses the key"), ((404, "no such model"), "does not know"), ((429, ("insufficient_quota", ())), "quota is used up")], ids=["key", "model", "quota"])
def test_what_cannot_succeed_ends_the_run_at_once(server, wrong, words):
    server.plan = [wrong] * 50
    with pytest.raises(EngineError, match=words) as raised: engine_for(server, concurrency=2).generate(["x"] * 40, 8)
    assert len(server.requests) < 10 and KEY not in str(raised.value)


def test_a_failure_costs_its_own_example_alone(server):
    server.plan = [(400, "bad request for " + KEY)]
    outputs = engine_for(server, concurrency=1).generate(["a", "b", "c"], 8)
    assert [output.texts for output in outputs] == [[], ["42"], ["42"]] and outputs[0].error == "engine: HTTP 400: bad request for [key]"


def test_too_long_prompts_are_named(server):
    server.plan = [(400, "This model's maximum context length is 10 tokens")]
    assert engine_for(server).generate(["x"], 8)[0].error.startswith("prompt too long: ")


@pytest.mark.parametrize("text, finish, error", [(None, "content_filter", True), ("", "length", True), ("", None, True), ("", "stop", False)])
def test_nothing_is_an_answer_only_where_the_model_stopped(server, text, finish, error):
    server.answer, server.finish = lambda body: [text], finish
    output, = engine_for(server, api="chat").generate(["x"], 8)
    assert bool(output.error) == error and (output.texts == ([] if error else [""]))


def test_no_more_requests_in_flight_than_allowed(server):
    server.delay = 0.05
    assert len(engine_for(server, concurrency=3).generate(["x"] * 12, 8)) == 12 and 2 <= server.most <= 3


def test_requests_and_tokens_are_spaced_within_the_limits():
    for limits, tokens, gap in (((120, None), 5, 0.5), ((None, 6000), 200, 2.0), ((120, 6000), 200, 2.0), ((None, None), 200, 0)):
        now = [0.0]
        def sleep(seconds): now[0] += seconds
        pace, began = Pace(*limits, clock=lambda: now[0], sleep=sleep), []
        for _ in range(4):
            pace.take(tokens)
            began.append(now[0])
        assert began == pytest.approx([0, gap, 2 * gap, 3 * gap])


def test_spacing_is_used_by_the_engine(server):
    waits = []
    engine_for(server, waits, requests_per_minute=60, concurrency=1).generate(["x"] * 3, 8)
    assert sum(waits) == pytest.approx(2.0)


# ---- options

LETTERS = [" A", " B", " C", " D"]


def ids(engine): return [engine.tokenizer.encode(letter)[-1] for letter in LETTERS]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_options_by_log_probability(server, api):
    server.top = lambda body: {" B": -0.2, "B": -3.0, "A": -2.0, " The": -4.0, " D": -5.0}
    engine = engine_for(server, api=api, logprobs=20)
    output, = engine.option_scores(["Which?\nAnswer:"], ids(engine))
    assert output.logprobs == [-2.0, -0.2, NOT_LISTED, -5.0]
    body = server.requests[0]
    assert body["max_tokens"] == 1 and ((body["logprobs"], body["top_logprobs"]) == (True, 20) if api == "chat" else body["logprobs"] == 20)


@pytest.mark.parametrize("text, wanted", [(" C", "C"), ("D.", "D"), (" The", "The")])
def test_options_by_letter_where_none_is_listed(server, text, wanted):
    server.answer = lambda body: [text]
    engine = engine_for(server)
    output, = engine.option_scores(["Which?"], ids(engine))
    assert (output.logprobs, output.texts, output.error) == (None, [wanted], None) and "logprobs" not in server.requests[0]


def test_an_empty_token_is_no_answer(server):
    server.answer = lambda body: ["\n"]
    engine = engine_for(server)
    assert engine.option_scores(["Which?"], ids(engine))[0].error.startswith("no text: ")


# ---- recordings and keys

def test_recordings_replay_without_server_or_key(server, tmp_path, monkeypatch):
    file = tmp_path / "answers.jsonl"
    server.answer = lambda body: [f"{body['prompt']}! {KEY}"]
    first = engine_for(server, recording="record", recordings=file).generate(["a", "b"], 8)
    assert KEY in server.headers[0]["Authorization"] and KEY not in file.read_text() and "Authorization" not in file.read_text()
    again = engine_for(server, recording="record", recordings=file)
    assert again.generate(["a", "b", "c"], 8)[:2] == first and len(server.requests) == 3, "what is recorded is not asked again"
    assert again.usage["from_recording"] == 2
    monkeypatch.delenv("OPENAI_API_KEY")
    replay = engine_for(server, url="http://127.0.0.1:9/v1", recording="replay", recordings=file)
    outputs = replay.generate(["a", "unheard of"], 8)
    assert outputs[0].texts == first[0].texts == ["a! [key]"] and "no recorded answer" in outputs[1].error
    assert len(server.requests) == 3 and "replayed" in replay.note and "replayed" in replay.version
    assert replay.generate(["a"], 9)[0].error, "another length is another request"


def test_a_torn_recording_keeps_its_whole_lines(server, tmp_path):
    file = tmp_path / "answers.jsonl"
    engine_for(server, recording="record", recordings=file, concurrency=1).generate(["a", "b"], 8)
    file.write_bytes(file.read_bytes()[:-20])
    engine = engine_for(server, recording="record", recordings=file)
    assert len(engine.recording.answers) == 1
    engine.generate(["a", "b"], 8)
    assert len(list(read_jsonl(file))) == 2 and len(server.requests) == 3
    write_atomic(file, "damage\n")
    with pytest.raises(ValueError, match="answers.jsonl, line 1"): engine_for(server, recording="record", recordings=file)


def test_what_it_needs_it_says(server, tmp_path, monkeypatch):
    with pytest.raises(EngineError, match="there is no recording"): engine_for(server, recording="replay", recordings=tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="expected record, replay or off"): engine_for(server, recording="yes")
    with pytest.raises(ValueError, match="needs a file"): engine_for(server, recording="record")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(EngineError, match="OPENAI_API_KEY"): engine_for(server)
    assert engine_for(server, key_variable=None).generate(["x"], 8)[0].texts == ["42"] and "Authorization" not in server.headers[0]


# ---- money and tokens

def test_cost_before_and_after(server):
    engine = engine_for(server, price_in=30, price_out=60)
    before = engine.estimate(["one two three", "four"], max_new_tokens=100, n=2)
    assert before == {"requests": 2, "prompt_tokens": 19 + 17, "completion_tokens": 400, "dollars": pytest.approx((36 * 30 + 400 * 60) / 1e6)}
    engine.generate(["one two three", "four"], 8)
    assert engine.spent()["dollars"] == pytest.approx((20 * 30 + 6 * 60) / 1e6) and engine.spent()["estimated"] == 0
    server.usage = False
    engine.generate(["one two three"], 8)
    assert engine.spent()["prompt_tokens"] == 23 and engine.spent()["estimated"] == 1


def test_estimated_tokens_come_back_as_the_text_that_they_were():
    tokens = EstimatedTokens()
    text = "Wie viele Äpfel?\n\n  কত? 12345 internationalisation <s>"
    assert tokens.decode(tokens.encode(text)) == text and len(tokens(["a b", "c"])["input_ids"]) == 2
    assert len({tokens.encode(letter)[-1] for letter in LETTERS}) == 4
    prose = "The committee will publish its findings about the river and its bridges early next year, once the reports are complete. " * 20
    assert 0.15 < len(tokens.encode(prose)) / len(prose) < 0.3, "about four to five letters a token"


def test_endpoint_records_are_read():
    records = {key: model.endpoint for key, model in models().items() if model.kind == "endpoint"}
    assert {"chatgpt", "gpt-4", "vllm-server"} <= set(records) and all(record.url.endswith("/v1") for record in records.values())


# ---- through the runner

@pytest.fixture
def sources(tmp_path):
    root = tmp_path / "sources"
    write_jsonl(root / "gsm8k" / "test.jsonl", [{"question": f"{i} and {i + 1}?", "answer": f"#### {2 * i + 1}"} for i in range(8)])
    write_atomic(root / "gsm8k" / "cot_exemplars.json", json.dumps([{"question": f"{i} dogs?", "cot_answer": f"So the answer is {i}.", "short_answer": str(i)} for i in range(1, 9)]))
    for split in ("dev", "test"): write_atomic(root / "mmlu" / split / f"astronomy_{split}.csv", "".join(f"Which star {i}?,red,blue,big,small,{'ABCD'[i % 4]}\n" for i in range(4)))
    return root


BENCHMARKS = {"gsm": {"settings": ["direct"], "n": "all"}, "mmlu": {"settings": ["0shot"], "n": "all"}}
MODEL = {"model": "served", "base_model": "served", "training_data": "unknown", "size": "unknown"}


def test_a_run_through_the_runner_resumes_and_is_labelled(server, sources, tmp_path):
    server.answer = lambda body: [" B" if body["max_tokens"] == 1 else "1 and 2 make 3"]
    out, file = tmp_path / "out", tmp_path / "answers.jsonl"
    def run(mode, folder=out): return evaluate(MODEL, BENCHMARKS, None, folder / "predictions", folder / "scores", sources, engine_for(server, recording=mode, recordings=file, concurrency=1), chunk_size=3)
    server.plan = [(400, "no")]
    report = run("record")
    gsm, mmlu = report.scores
    assert (gsm["n"], gsm["n_errors"], report.made) == (7, 1, 12) and gsm["value"] == pytest.approx(100 / 7) and gsm["errors"] == ["engine"]
    assert mmlu["value"] == 25 and mmlu["option_scoring"].startswith("4 of 4 by the first letter") and mmlu["bos"] == "server"
    asked = len(server.requests)
    assert run("record").kept == 12 and len(server.requests) == asked, "the same command repeats nothing"
    replayed = run("replay", tmp_path / "other")
    assert len(server.requests) == asked and "replayed" in replayed.scores[0]["engine"] and "replayed" in replayed.scores[1]["engine_note"]
    for path in tmp_path.rglob("*.json*"): assert KEY not in path.read_text(encoding="utf-8")


def test_a_chat_model_is_read_to_its_last_line(server, sources, tmp_path):
    "The newline ends the answer of a base model; ChatGPT reasons over several lines, and the reference reads them all."
    server.answer = lambda body: ["First, 8 and 8.\n\nSo the answer is 1."]
    scores = {}
    for api in ("completions", "chat"):
        report = evaluate(MODEL, {"gsm": BENCHMARKS["gsm"]}, None, tmp_path / api, tmp_path / api, sources, engine_for(server, api=api))
        scores[api] = report.scores[0]["value"]
    assert scores == {"completions": 0.0, "chat": 12.5} and "stop" not in server.requests[-1] and server.requests[0]["stop"] == ["\n"]
    assert server.requests[-1]["messages"][0]["content"].endswith("?\nAnswer:"), "the plain prompt is the user's turn"


def test_benchmarks_that_ask_chat_models_in_other_words():
    from tulu_study.evaluation.benchmark import Example
    from tulu_study.evaluation.codex_eval import CodexEval
    from tulu_study.evaluation.mgsm import MGSM
    from tulu_study.evaluation.toxigen import ToxiGen
    from tulu_study.evaluation.tydiqa import TydiQA
    codex, toxigen, tydiqa, mgsm = (cls.__new__(cls) for cls in (CodexEval, ToxiGen, TydiQA, MGSM))
    mgsm.protocol = "paper"
    for benchmark in (codex, toxigen, tydiqa, mgsm): benchmark.as_turn = True
    assert toxigen.turn(Example("", "", "", {"text": "- a\n-"})) == "Complete the following: - a\n-"
    assert codex.turn(Example("", "", "", {"prompt": "def f():\n"})) == "Complete the following python function. Please only output the code for the completed function.\n\n\ndef f():\n"
    whole = "import math\n\ndef f():\n    return 1\n"
    assert codex.extract(whole) == whole and (codex.stop(True), toxigen.stop(True), tydiqa.stop(True), mgsm.stop(True)) == ([], [], [], [])
    assert [tydiqa.extract(text) for text in ("\n\n Nairobi\nIt is a town.", "Nairobi\n", "")] == ["Nairobi", "Nairobi", ""], "stripped first, then the first line"
    codex.as_turn = tydiqa.as_turn = False
    assert tydiqa.stop() == ["\n"] and tydiqa.stop(True) == [] and tydiqa.extract(" a\nb ") == "a\nb"
    assert codex.extract(whole) == "import math\n"


def test_an_outage_stores_nothing_and_the_same_command_continues(server, sources, tmp_path):
    engine = engine_for(server, concurrency=1)
    server.plan = [None, None, None, *["no json"] * 18]
    with pytest.raises(EngineError, match="gsm-direct: 3 requests failed one after the other; the first: engine: unanswered: 6 attempts"): evaluate(MODEL, {"gsm": BENCHMARKS["gsm"]}, None, tmp_path / "p", tmp_path / "s", sources, engine, chunk_size=3)
    assert len(read_predictions(tmp_path / "p" / "gsm-direct.jsonl")) == 3
    report = evaluate(MODEL, {"gsm": BENCHMARKS["gsm"]}, None, tmp_path / "p", tmp_path / "s", sources, engine, chunk_size=3)
    assert (report.kept, report.made) == (3, 5)


def test_an_outage_over_the_last_questions_is_asked_again(server, sources, tmp_path):
    "Fewer failures than end a run: they are counted in the score, and are not taken for finished."
    def run(): return evaluate(MODEL, BENCHMARKS, None, tmp_path / "p", tmp_path / "s", sources, engine_for(server, concurrency=1))
    server.answer = lambda body: [" B" if body["max_tokens"] == 1 else "42"]
    server.plan = [None] * 8 + ["no json"] * 24
    report = run()
    assert report.made == 12 and report.scores[1]["n_errors"] == 4 and report.scores[1]["value"] is None
    report = run()
    assert (report.kept, report.made) == (8, 4) and report.scores[1]["n_errors"] == 0 and report.scores[1]["n"] == 4
    assert run().made == 0 and len(read_predictions(tmp_path / "p" / "mmlu-0shot.jsonl")) == 4


def test_answers_are_handed_over_as_they_come(server):
    "A slow answer holds up no other."
    release = threading.Event()
    server.answer = lambda body: [release.wait(10) and "late"] if body["prompt"] == "slow" else ["soon"]
    engine = engine_for(server, concurrency=2, timeout=30.0)
    answers = engine.stream([Request(prompt, Decoding(8)) for prompt in ["slow", *"abcdefgh"]])
    first = [next(answers) for _ in range(8)]
    release.set()
    assert sorted(at for at, _ in first) == list(range(1, 9)) and all(output.texts == ["soon"] for _, output in first)
    assert [(at, output.texts) for at, output in answers] == [(0, ["late"])]


def test_what_was_answered_before_a_refusal_is_stored(server, sources, tmp_path):
    "It was paid for."
    def run(): return evaluate(MODEL, BENCHMARKS, None, tmp_path / "p", tmp_path / "s", sources, engine_for(server, concurrency=2))
    server.plan = [None] * 5 + [(401, "no")]
    server.delay = 0.05
    with pytest.raises(EngineError, match="refuses the key"): run()
    stored = len(read_predictions(tmp_path / "p" / "gsm-direct.jsonl"))
    assert 5 <= stored <= 6 and len(server.requests) <= 8
    server.plan, server.delay = [], 0
    before = len(server.requests)
    report = run()
    assert (report.kept, report.made) == (stored, 12 - stored) and len(server.requests) == before + 12 - stored


def test_kill_in_the_middle_pays_for_nothing_twice(server, sources, tmp_path):
    "Kill -9 while requests are under way; what was stored is never asked again, and the end is that of an undisturbed run."
    import os, signal, subprocess, sys
    server.delay, server.answer = 0.2, lambda body: [" B" if body["max_tokens"] == 1 else "1 and 2 make 3"]
    script = """
import sys
from tulu_study.evaluation.standalone import evaluate_any
url, out, sources = sys.argv[1:]
evaluate_any(url, {"gsm": {"settings": ["direct"], "n": "all"}, "mmlu": {"settings": ["0shot"], "n": "all"}}, out, served="served", source_root=sources, chat=False)
"""
    def start(out): return subprocess.Popen([sys.executable, "-c", script, server.url, str(out), str(sources)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "TQDM_DISABLE": "1"})
    process, file = start(tmp_path / "cut"), tmp_path / "cut" / "predictions" / "gsm-direct.jsonl"
    deadline = time.time() + 90
    while not (file.is_file() and file.read_bytes().count(b"\n") >= 4): assert process.poll() is None and time.time() < deadline, process.stderr.read(); time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # the last answers go nowhere
    stored, asked = {row["example_id"] for row in read_predictions(file)}, len(server.requests)
    assert 4 <= len(stored) < 12
    server.delay = 0
    assert start(tmp_path / "cut").wait(90) == 0 and len(server.requests) == asked + 12 - len(stored)
    assert start(tmp_path / "whole").wait(90) == 0
    for part in ("predictions", "scores"):
        cut, whole = ({path.name: path.read_bytes() for path in (tmp_path / folder / part).iterdir()} for folder in ("cut", "whole"))
        assert cut == whole


def test_what_cannot_be_asked_is_refused_before_anything_is(server, sources, tmp_path):
    "TruthfulQA by choice needs log-probabilities of whole answers: said at once, not after the other benchmarks were paid for."
    from tulu_study.evaluation.standalone import evaluate_any
    write_atomic(sources / "truthfulqa" / "TruthfulQA.csv", "Category,Question,Best Answer,Correct Answers,Incorrect Answers\nMisc,Does it?,No,No,Yes\n")
    wanted = BENCHMARKS | {"truthfulqa": {"settings": ["mc"]}}
    with pytest.raises(EngineError, match="gives no log-probabilities of whole completions.*leave that setting out"): evaluate(MODEL, wanted, None, tmp_path / "p", tmp_path / "s", sources, engine_for(server))
    with pytest.raises(EngineError, match="leave that setting out"): evaluate_any(server.url, wanted, tmp_path / "any", served="served", source_root=sources, say=lambda line: pytest.fail(line))
    assert not server.requests and not (tmp_path / "p").exists() and not (tmp_path / "any").exists()


def test_one_refusal_stops_the_others_in_their_retries(server):
    "Three requests are in their retries when a fourth meets a refused key: nobody asks five more times."
    server.plan = [(503, None), (503, None), (503, None), (401, None), *[(503, None)] * 60]
    with pytest.raises(EngineError, match="refuses the key"): engine_for(server, concurrency=4).generate(["x"] * 4, 8)
    assert len(server.requests) <= 10
    server.plan = []
    engine = engine_for(server)
    engine.given_up.set()
    assert engine.generate(["x"], 8)[0].texts == ["42"], "the next call begins afresh"
