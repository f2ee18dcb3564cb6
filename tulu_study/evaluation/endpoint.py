"""An engine for models that others run: any address that speaks OpenAI's completions or chat protocol, a vLLM server included.

`EndpointEngine` keeps the contract of `tulu_study.evaluation.engines` as far as one can from outside: the server tokenises, so the engine cannot
say how many BOS tokens a prompt begins with (`bos` is "server"), and log-probabilities come from the few tokens that the server lists.

* Asked politely: a bounded number of requests in flight, evenly spaced within the limits on requests and tokens a minute. What may succeed later
  (throttling, server errors, lost connections, timeouts, answers that are no JSON) is tried again, after doubling waits with jitter, and never before the moment that
  `Retry-After` names. A refused key or an unknown model ends the run at once: no further request could succeed.
* A chat API (ChatGPT, GPT-4) wraps the prompt in a format of its own, so nothing is cut at a newline there and two benchmarks ask in other words
  (`Benchmark.as_turn`), as the reference does for these models.
* Failed requests are errors of their example, never an empty answer. An empty text counts as an answer only where the server says that the
  model itself stopped there.
* Recorded: `recording="record"` keeps every answer in a JSON-lines file under the hash of its request, and asks only for what is not there yet; `"replay"` answers from that
  file alone, without network or key, and every score made so is labelled `replayed`.
* Keys come from an environment variable, go into one request header and nowhere else. Every text that comes back is searched for them first.

Option scoring (MMLU): the log-probabilities that the server lists for the next token, where one of the options is among them; else the reference's way for
OpenAI's models, one generated token whose first letter is the answer. The score says how many examples were read in which way.
"""
import json
import os
import random
import re
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from pathlib import Path

from tulu_study.core.files import append_jsonl, hash_json
from tulu_study.core.params import Endpoint
from tulu_study.evaluation.engines import UNANSWERED, UNBOUNDED, Engine, EngineError, Output, cut_at_stop, describe, prompt_seed

__all__ = ["EndpointEngine", "EstimatedTokens", "Recording", "Pace", "NOT_LISTED"]

NOT_LISTED = -100.0  # log-probability written for an option that the server did not list: less likely than any that it did
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses after which the same request may succeed
FATAL = {401: "refuses the key", 402: "asks for payment", 403: "refuses access", 404: "does not know this address or model"}


class Failed(Exception):
    "A request that has no answer; the text says why."


class EstimatedTokens:
    "Stands in for a tokenizer that is not at hand: splits text in pieces about as long as tokens. Exact in both directions, but its counts are estimates."
    bos_token_id = eos_token_id = chat_template = None
    exact = False
    pieces = re.compile(r" ?[A-Za-z]{1,7}|\d{1,3}| ?[^\w\s]|\s|.", re.DOTALL)

    def __init__(self): self.ids, self.texts, self.model_max_length = {}, [], UNBOUNDED

    def encode(self, text, add_special_tokens=True) -> list:
        "Numbers of the pieces of a text, given in the order in which they are met."
        found = []
        for piece in self.pieces.findall(text):
            if piece not in self.ids:
                self.ids[piece] = len(self.texts)
                self.texts.append(piece)
            found.append(self.ids[piece])
        return found

    def decode(self, ids, **options) -> str: return "".join(self.texts[i] for i in ids)

    def __call__(self, text, add_special_tokens=True, **options) -> dict:
        return {"input_ids": self.encode(text) if isinstance(text, str) else [self.encode(one) for one in text]}


class Pace:
    "Spaces requests evenly, so that no minute holds more of them, or of their tokens, than allowed."

    def __init__(self, requests_per_minute=None, tokens_per_minute=None, clock=time.monotonic, sleep=time.sleep):
        self.requests, self.tokens, self.clock, self.sleep = requests_per_minute, tokens_per_minute, clock, sleep
        self.lock, self.free_at = threading.Lock(), clock()

    def take(self, tokens: int):
        "Wait for this request's turn."
        cost = max(60 / self.requests if self.requests else 0, 60 * tokens / self.tokens if self.tokens else 0)
        with self.lock:
            turn = max(self.free_at, self.clock())
            self.free_at = turn + cost
        self.wait_until(turn)

    def hold(self, seconds: float):
        "Let nobody begin before so many seconds have passed: the server has asked for it."
        with self.lock: self.free_at = max(self.free_at, self.clock() + seconds)

    def wait_until(self, moment):
        while (left := moment - self.clock()) > 0: self.sleep(left)


class Recording:
    "Answers by the hash of their request, in a JSON-lines file."

    def __init__(self, path: str | Path):
        self.path, self.lock, self.answers = Path(path), threading.Lock(), {}
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []  # what follows the last newline is torn
        for number, line in enumerate(lines, 1):
            try: row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self.path.name}, line {number}: expected one recorded answer, found {line[:60]!r} ({error}). Remove the line; its request is asked again when recording") from error
            self.answers[row["key"]] = row["answer"]

    def add(self, key, request, answer):
        "Keep an answer, durably."
        with self.lock:
            self.answers[key] = answer
            append_jsonl(self.path, [{"key": key, "request": request, "answer": answer}])


class EndpointEngine(Engine):
    "Asks a model that others run."
    name = "endpoint"
    kinds = ("generate", "options")
    attempts = 6  # times that a request is sent before it counts as failed
    first_wait, longest_wait = 1.0, 120.0  # seconds: doubled from one to the other; a Retry-After beyond the longest wait ends the attempts

    def __init__(
        self,
        record: Endpoint,  # address, model, prices, limits
        seed: int = 42,  # of sampled completions, where the server honours it
        max_length: int | None = None,  # prompt + completion, tokens; None: the record's context
        recording: str = "off",  # "record", "replay" or "off"
        recordings: str | Path | None = None,  # file of the recorded answers
        timeout: float = 120.0,  # seconds without an answer
        note: str | None = None,  # goes into every score
        clock=time.monotonic,  # for tests: the time in seconds
        sleep=time.sleep,  # for tests: how to wait
    ):
        if recording not in ("record", "replay", "off"): raise ValueError(f"recording is {recording!r}; expected record, replay or off")
        if recording != "off" and recordings is None: raise ValueError(f"recording={recording!r} needs a file: pass recordings=")
        if recording == "replay" and not Path(recordings).is_file(): raise EngineError(f"there is no recording {recordings} to replay; make one with recording='record'")
        self.record, self.seed, self.dtype, self.bos, self.mode = record, seed, "unknown", "server", recording
        self.max_length, self.timeout = max_length or record.context, timeout
        self.recording = Recording(recordings) if recording != "off" else None
        self.tokenizer = self.load_tokenizer()
        self.exact_count = getattr(self.tokenizer, "exact", True)
        self.pace, self.sleep, self.random = Pace(record.requests_per_minute, record.tokens_per_minute, clock, sleep), sleep, random.Random(seed)
        self.usage = dict.fromkeys(("requests", "retries", "from_recording", "prompt_tokens", "completion_tokens", "estimated"), 0)
        self.lock, self.given_up, self.client, self.key = threading.Lock(), threading.Event(), None, os.environ.get(record.key_variable or "", "")
        self.note = "; ".join(filter(None, [note, "replayed" if self.replayed else "", "" if self.exact_count else "token counts before asking are estimates"])) or None
        if record.key_variable and not self.key and not self.replayed:
            raise EngineError(f"the endpoint {record.url} wants a key: set the environment variable {record.key_variable}, or replay a recording")

    @property
    def replayed(self) -> bool: return self.mode == "replay"
    @property
    def as_turn(self) -> bool: return self.record.api == "chat"
    @property
    def version(self) -> str: return f"endpoint {self.record.model} ({self.record.api}{', replayed' if self.replayed else ''})"

    def identity(self) -> dict:
        "What decides an answer, for the runner's sidecar; no key, no price."
        return {"checkpoint": hash_json(self.record.model_dump(include={"url", "model", "api", "options", "logprobs"})), "engine": self.version, "dtype": self.dtype}

    def load_tokenizer(self):
        if not self.record.tokenizer: return EstimatedTokens()
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(self.record.tokenizer)
        tokenizer.model_max_length = UNBOUNDED
        return tokenizer

    def count(self, text) -> int: return len(self.tokenizer(text)["input_ids"])

    def generously(self, text) -> int:
        "The tokens of a prompt; where they are estimated, with a quarter and the chat's own markers on top."
        return self.count(text) if self.exact_count else int(self.count(text) * 1.25) + 16

    # ---- the contract

    def stream(self, requests):
        """Yield (position, Output) as answers come, a bounded number of requests at a time; what fails is an error of its own request. Before an EngineError,
        and before a caller that stops listening is let go, whoever is still waiting for an answer gives up asking; answers that do come are handed over first."""
        for kind in dict.fromkeys(request.kind for request in requests): self.require(kind)
        if top_k := next((request.decoding.top_k for request in requests if request.decoding and request.decoding.top_k), 0):
            raise EngineError(f"top_k={top_k} is no part of the protocol; put it into the record's options where the server knows it")
        self.given_up.clear()
        pool, rest, asked, fatal = ThreadPoolExecutor(max(1, self.record.concurrency)), iter(enumerate(requests)), {}, None
        try:
            while True:
                while fatal is None and len(asked) < 2 * self.record.concurrency and (following := next(rest, None)): asked[pool.submit(self.one, following[1])] = following[0]
                if not asked: break
                for done in wait(asked, return_when=FIRST_COMPLETED).done:
                    at = asked.pop(done)
                    if fatal is not None and done.cancelled(): continue
                    try: answered = done.result()
                    except EngineError as error: fatal = fatal or error
                    else:
                        if fatal is None or answered.error is None: yield at, answered  # errors of those who gave up are not theirs
                if fatal is not None:
                    self.given_up.set()
                    for waiting in asked: waiting.cancel()
            if fatal is not None: raise fatal
        finally:
            self.given_up.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def one(self, request) -> Output:
        "The answer to one request."
        size = self.count(request.prompt)
        if self.exact_count and size >= self.max_length:
            return Output(prompt_tokens=size, error=f"prompt too long: {size} tokens, the model takes {self.max_length} with one new token")
        try: return self.complete(request.prompt, request.decoding) if request.decoding else self.choose(request.prompt, [self.tokenizer.decode([token]).strip() for token in request.options])
        except Failed as error: return Output(prompt_tokens=size, error=str(error))

    # ---- one request

    def body(self, prompt, max_tokens, stop=(), temperature=0.0, top_p=1.0, n=1) -> dict:
        "The request for one prompt. Four stop strings are sent, as many as the protocol takes; all of them are applied here."
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.record.api == "chat" else {"prompt": prompt}
        sampling = {"seed": prompt_seed(self.seed, prompt)} if temperature else {}
        return {"model": self.record.model, **asked, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "n": n,
                **({"stop": list(stop)[:4]} if stop else {}), **sampling, **self.record.options}

    def complete(self, prompt, decoding) -> Output:
        "Text of one prompt; `top_k` cannot be asked for in this protocol."
        size = self.generously(prompt)  # servers refuse what may not fit
        room = max(1, min(decoding.max_new_tokens, self.max_length - size))
        answer = self.answer(self.body(prompt, room, decoding.stop, decoding.temperature, decoding.top_p, decoding.n), prompt)
        if len(answer["texts"]) != decoding.n: raise Failed(f"no text: {len(answer['texts'])} completions came back, {decoding.n} were asked for")
        output = Output(prompt_tokens=answer["prompt_tokens"], completion_tokens=answer["completion_tokens"])
        for text, finish in zip(answer["texts"], answer["finish"]):
            if text is None or (text == "" and finish != "stop"): raise Failed(f"no text: the answer is empty and ended with {finish!r}")
            text, stopped = cut_at_stop(text, decoding.stop)
            output.texts.append(text)
            output.finish.append("stop" if stopped or finish != "length" else "length")
        return output

    def choose(self, prompt, options) -> Output:
        "Log-probabilities of options where the server lists them, else `texts` with the first letter of one generated token."
        listing = ({"logprobs": True, "top_logprobs": self.record.logprobs} if self.record.api == "chat" else {"logprobs": self.record.logprobs}) if self.record.logprobs else {}
        answer = self.answer(self.body(prompt, 1) | listing, prompt)
        output = Output(prompt_tokens=answer["prompt_tokens"], completion_tokens=answer["completion_tokens"])
        listed = {}
        for text, value in answer["top"] or (): listed[text.strip()] = max(value, listed.get(text.strip(), NOT_LISTED))
        if any(option in listed for option in options): output.logprobs = [listed.get(option, NOT_LISTED) for option in options]
        else:
            text = (answer["texts"] or [None])[0]
            if not (text or "").strip(): raise Failed(f"no text: none of the options {', '.join(options)} is among the listed tokens, and the generated token is empty")
            letter = text.strip()[:1]
            output.texts, output.finish = [letter if letter in options else text.strip()], ["length"]
        return output

    def answer(self, body, prompt) -> dict:
        "The answer to a request: from the recording, or asked and recorded."
        key = hash_json([self.record.api, body])
        if self.recording is not None and (known := self.recording.answers.get(key)):
            with self.lock: self.usage["from_recording"] += 1
            return known
        if self.replayed: raise Failed(f"{UNANSWERED}: no recorded answer to this request in {self.recording.path.name}; record it first")
        found = self.ask(body, self.count(prompt) + body["max_tokens"] * body["n"])
        if found["prompt_tokens"] is None:
            found["prompt_tokens"], found["completion_tokens"] = self.count(prompt), sum(self.count(text or "") for text in found["texts"])
            with self.lock: self.usage["estimated"] += 1
        with self.lock:
            for name in ("prompt_tokens", "completion_tokens"): self.usage[name] += found[name]
        if self.recording is not None: self.recording.add(key, body, found)
        return found

    def ask(self, body, tokens) -> dict:
        "Send a request until it is answered. Raises Failed, or EngineError where no request can succeed."
        import httpx
        reason = ""
        for attempt in range(self.attempts):
            self.pace.take(tokens)
            if self.given_up.is_set(): raise Failed("engine: not asked, another request has shown that none can succeed")
            with self.lock: self.usage["requests" if attempt == 0 else "retries"] += 1
            wait = None
            try: reply = self.connection().post("/chat/completions" if self.record.api == "chat" else "/completions", json=body)
            except httpx.RequestError as error: reason = self.hide(describe(error))
            else:
                if reply.status_code == 200:
                    try: return self.read(reply)
                    except (ValueError, KeyError, TypeError, AttributeError) as error: reason = f"the answer cannot be read ({self.hide(describe(error))})"
                else:
                    reason = self.refusal(reply)
                    wait = retry_after(reply.headers)
            if attempt + 1 == self.attempts: break
            if wait is not None and wait > self.longest_wait: raise Failed(f"{UNANSWERED}: {reason}; the endpoint asks to wait {wait:.0f} s, longer than {self.longest_wait:.0f} s")
            self.back_off(attempt, wait)
        raise Failed(f"{UNANSWERED}: {self.attempts} attempts, the last: {reason}")

    def back_off(self, attempt, asked):
        "Wait before the next attempt; everybody waits where the server has named a time."
        doubled = min(self.longest_wait, self.first_wait * 2 ** attempt)
        with self.lock: jitter = self.random.random()
        if asked is not None: self.pace.hold(asked)
        self.sleep(doubled * (0.5 + jitter / 2) if asked is None else asked + min(doubled, 1.0) * jitter)

    def refusal(self, reply) -> str:
        "What a status other than 200 means. Raises EngineError for what no further request can mend, Failed for a request that is wrong by itself."
        status = reply.status_code
        try: error = reply.json().get("error") or {"message": reply.json().get("message")}
        except (ValueError, AttributeError): error = {}
        error = error if isinstance(error, dict) else {"message": str(error)}
        code, said = str(error.get("code") or ""), self.hide(" ".join(str(error.get("message") or "").split())[:200])
        if status in FATAL:
            about = f" (variable {self.record.key_variable})" if status in (401, 403) and self.record.key_variable else ""
            raise EngineError(f"the endpoint {self.record.url} {FATAL[status]}{about}: HTTP {status} for model {self.record.model!r}")
        if code == "insufficient_quota": raise EngineError(f"the endpoint {self.record.url} says that the account's quota is used up; the same command continues once it is not")
        if status in AGAIN or status >= 500: return f"HTTP {status}" + (f" ({said})" if said else "")
        if code == "context_length_exceeded" or "maximum context length" in said: raise Failed(f"prompt too long: {said}")
        raise Failed(f"engine: HTTP {status}: {said or 'no reason given'}")

    def read(self, reply) -> dict:
        "The parts of an answer that are kept. Raises ValueError, KeyError or TypeError where they are missing."
        value = json.loads(self.hide(reply.text))
        choices = sorted(value["choices"], key=lambda choice: choice.get("index", 0))
        if not choices: raise ValueError("no choices")
        usage = value.get("usage") or {}
        chat = self.record.api == "chat"
        texts = [choice["message"]["content"] if chat else choice["text"] for choice in choices]
        if not all(text is None or isinstance(text, str) for text in texts): raise TypeError("a completion is no text")
        return {"texts": [whole(text) for text in texts], "finish": [choice.get("finish_reason") for choice in choices], "top": first_token(choices[0].get("logprobs"), chat),
                "prompt_tokens": usage.get("prompt_tokens"), "completion_tokens": usage.get("completion_tokens") if usage.get("prompt_tokens") is not None else None,
                "model": value.get("model")}

    def connection(self):
        "The client, with the key in its header."
        import httpx
        with self.lock:
            if self.client is None:
                headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
                self.client = httpx.Client(base_url=self.record.url.rstrip("/"), headers=headers, timeout=httpx.Timeout(self.timeout, connect=min(10.0, self.timeout)),
                                           limits=httpx.Limits(max_connections=self.record.concurrency))
            return self.client

    def hide(self, text: str) -> str:
        "A text without the key."
        return text.replace(self.key, "[key]") if self.key else text

    # ---- money

    def estimate(
        self,
        prompts,  # of str
        max_new_tokens: int,  # of each sample
        n: int = 1,  # samples per prompt
    ) -> dict:  # requests, prompt_tokens, completion_tokens and dollars, the last two at most
        "What asking will cost at most: every completion as long as it may be, nothing recorded yet."
        prompt_tokens, completion_tokens = sum(map(self.generously, prompts)), len(prompts) * max_new_tokens * n
        return {"requests": len(prompts), "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "dollars": self.dollars(prompt_tokens, completion_tokens)}

    def dollars(self, prompt_tokens, completion_tokens) -> float:
        "The record's prices."
        return round((prompt_tokens * self.record.price_in + completion_tokens * self.record.price_out) / 1e6, 6)

    def spent(self) -> dict:
        "What this engine has asked for and what that cost; requests that failed on the way may have been charged besides."
        return self.usage | {"dollars": self.dollars(self.usage["prompt_tokens"], self.usage["completion_tokens"])}


def whole(text: str | None) -> str | None:
    "A text without halves of characters: an answer that is cut off in the middle of an emoji ends in one, and no file can hold it."
    return text and text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def first_token(logprobs, chat: bool) -> list | None:
    "Texts and log-probabilities that the server lists for the first generated token; None where it lists none."
    if not logprobs: return None
    if chat or logprobs.get("content"):
        content = logprobs.get("content") or []
        return [[whole(row["token"]), row["logprob"]] for row in content[0]["top_logprobs"]] if content else None
    rows = logprobs.get("top_logprobs") or []
    return [[whole(text), value] for text, value in rows[0].items()] if rows and rows[0] else None


def retry_after(headers) -> float | None:
    "Seconds that the server asks to wait: a number, or a date."
    if re.fullmatch(r"\d+(\.\d+)?", value := headers.get("retry-after-ms", "").strip()): return float(value) / 1000
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value): return float(value)
    try: return max(0.0, parsedate_to_datetime(value).timestamp() - time.time()) if value else None
    except (TypeError, ValueError): return None
