"""The runner: one checkpoint, all its benchmarks, one engine start, results that survive a kill.

Requests go out in fixed chunks. A chunk's predictions are appended to the predictions file at once and durably; when the same command runs
again, whole chunks that are there are kept, a partial chunk is dropped and done again, and the engine's cache is emptied before every chunk.
A resumed run therefore sends exactly the requests that an uninterrupted run sends, in the same company, and writes the same bytes.

Beside `<benchmark>-<setting>.jsonl` lies `<benchmark>-<setting>.identity.json`: the checkpoint's hash, engine, dtype and everything else that
changes a completion. When it differs, the predictions are not this run's and are made anew.

What a benchmark needs for scoring (a sandbox, a judge) is asked for before the engine starts (`Benchmark.ready`); what it does after generating
(`Benchmark.finish`: run code, ask the judge) is kept per completion in `<benchmark>-<setting>.checks.jsonl`, so that a kill costs none of it.
"""
import json
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tulu_study.core.files import append_jsonl, hash_json, sha256_file, write_atomic, write_jsonl
from tulu_study.core.settings import settings
from tulu_study.evaluation.benchmark import load_benchmark, prompt_hash, prompts_hash
from tulu_study.evaluation.engines import ENGINES, Engine, EngineError, choose_engine, installed_version

__all__ = ["evaluate", "Report", "Task", "checkpoint_hash", "read_predictions"]


@dataclass
class Report:
    "What `evaluate` returns."
    scores: list = field(default_factory=list)  # the score objects as written, in order
    seconds: dict = field(default_factory=dict)  # engine_start, prompts, compute
    tokens: int = 0  # completion tokens made by this call (0 when everything was there)
    kept: int = 0  # predictions found from an earlier run
    made: int = 0  # predictions made by this call
    available: dict = field(default_factory=dict)  # "<benchmark>-<setting>" -> group -> questions in the test set, sampled or not


def checkpoint_hash(folder: str | Path) -> str:
    "Hash of the files that decide what a checkpoint says: weights, config, tokenizer."
    folder = Path(folder)
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".model") or p.name in (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"))
    if "config.json" not in names:
        raise FileNotFoundError(f"{folder} holds no config.json (found {', '.join(names) or 'nothing'}); expected a Hugging Face model folder")
    return hash_json([[name, sha256_file(folder / name)] for name in names])


class Task:
    "One benchmark in one setting for one checkpoint: its requests, its predictions file, its chunks."

    def __init__(self, benchmark, options, chat, chunk_size, predictions_dir, max_prompt_tokens=None, as_turn=False):
        self.benchmark, self.chat, self.chunk_size = benchmark, chat and benchmark.chat_format and not as_turn, chunk_size
        benchmark.as_turn = as_turn
        self.name = f"{benchmark.record.key}-{benchmark.setting}"
        self.path = Path(predictions_dir) / f"{self.name}.jsonl"
        self.store = self.path.with_suffix(".checks.jsonl")
        if benchmark.max_prompt_tokens and max_prompt_tokens:
            benchmark.limit_prompts(min(benchmark.max_prompt_tokens, max_prompt_tokens))
        self.examples = benchmark.examples(options.get("n"), options.get("per_group"))
        twice = [name for name, count in Counter(example.id for example in self.examples).items() if count > 1]
        if twice: raise ValueError(f"{self.name}: {len(twice)} ids occur more than once among the questions ({', '.join(twice[:3])}); expected every id once, as answers are compared by it. Remove the repeated rows from the benchmark's files")
        self.prompts = [benchmark.turn(example) if as_turn else benchmark.prompt(example, self.chat) for example in self.examples]
        self.stop = benchmark.stop(self.chat or as_turn)
        self.hashes = [prompt_hash(prompt) for prompt in self.prompts]
        self.dropped = sum(benchmark.dropped_shots(example, self.chat) > 0 for example in self.examples)

    def chunks(self):
        "Start and end of every chunk."
        return [(at, min(at + self.chunk_size, len(self.examples))) for at in range(0, len(self.examples), self.chunk_size)]

    def identity(self, common: dict) -> dict:
        "Everything besides the prompts that decides a completion."
        b = self.benchmark
        return common | {"benchmark": b.record.key, "setting": b.setting, "version": b.record.version, "protocol": b.protocol, "chat": self.chat,
                         "chunk_size": self.chunk_size, "kind": b.kind, "max_new_tokens": b.max_new_tokens, "stop": self.stop,
                         "temperature": b.temperature, "top_p": b.top_p, "n_samples": b.n_samples}

    def resume(self, identity: dict) -> int:
        "Keep the whole chunks that belong to this run, cut off everything else; returns how many chunks are done."
        sidecar, text = self.path.with_suffix(".identity.json"), json.dumps(identity, indent=1, ensure_ascii=False) + "\n"
        if not sidecar.is_file() or sidecar.read_text(encoding="utf-8") != text:
            self.path.unlink(missing_ok=True)
            self.store.unlink(missing_ok=True)
            write_atomic(sidecar, text)
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []  # what follows the last newline is torn
        done, keep = 0, 0
        for start, end in self.chunks():
            full = end - start == self.chunk_size or len(lines) <= end  # a longer file was made with another last chunk
            if not full or not self.match(lines[start:end], start, end): break
            done, keep = done + 1, end
        kept = b"".join(line + b"\n" for line in lines[:keep])
        if self.path.is_file() and self.path.read_bytes() != kept: write_atomic(self.path, kept)
        return done

    def match(self, lines, start, end) -> bool:
        "True when these lines are the predictions of examples start..end, their prompts and their gold answers."
        if len(lines) != end - start: return False
        for line, example, digest in zip(lines, self.examples[start:end], self.hashes[start:end]):
            try: row = json.loads(line)
            except ValueError: return False
            if (row.get("example_id"), row.get("prompt_hash"), row.get("target")) != (example.id, digest, example.target): return False
        return True

    def predict(self, engine, start, end) -> list:
        "Send one chunk; returns its prediction rows."
        b, prompts = self.benchmark, self.prompts[start:end]
        if b.kind == "options": outputs = engine.option_scores(prompts, b.option_ids(engine.tokenizer))
        elif b.kind == "completions": outputs = engine.completion_scores(prompts, [b.completions(example) for example in self.examples[start:end]])
        else: outputs = engine.generate(prompts, b.max_new_tokens, self.stop, b.temperature, b.top_p, 0, b.n_samples)
        failed = [output.error for output in outputs if output.error and output.error.startswith("engine:")]
        if failed and len(failed) == len(outputs):
            raise EngineError(f"{self.name}: every request of examples {start} to {end - 1} failed; the first: {failed[0]}. Nothing of this chunk was stored; the same command continues here")
        return [self.row(example, digest, output) for example, digest, output in zip(self.examples[start:end], self.hashes[start:end], outputs)]

    def row(self, example, digest, output) -> dict:
        "One prediction, in the schema of the predictions file."
        b, answer = self.benchmark, None
        if output.error is None:
            if b.kind == "options" and output.logprobs is None: answer = b.extract(output.texts[0])  # an endpoint that lists no log-probabilities
            elif b.kind == "options": output.texts, answer = [], b.choose(output.logprobs)
            elif b.kind == "completions": output.texts, answer = [], b.completions(example)[output.logprobs.index(max(output.logprobs))]
            elif b.n_samples == 1: answer = b.extract(output.texts[0])
        row = {"example_id": example.id, "group": example.group, "prompt_hash": digest, "completions": output.texts, "answer": answer, "target": example.target,
               "score": None, "error": output.error, "prompt_tokens": output.prompt_tokens, "completion_tokens": output.completion_tokens, "finish": output.finish}
        if output.logprobs is not None: row["option_logprobs"] = [round(value, 5) for value in output.logprobs]
        return row | {"score": b.score_one(row)}


def finished_rows(task: Task) -> list:
    "The predictions with what the benchmark does after generating; written back where that changed them."
    rows = read_predictions(task.path)
    before = json.dumps(rows)
    rows = task.benchmark.finish(rows, task.store)
    if json.dumps(rows) != before: write_jsonl(task.path, rows)
    return rows


def read_predictions(path: str | Path) -> list:
    "The rows of a finished predictions file."
    with open(path, encoding="utf-8") as lines: return [json.loads(line) for line in lines]


def score_object(task: Task, model: dict, identity: dict, engine_facts: dict) -> dict:
    "The score file's content: what was measured, on what, with what."
    b, record = task.benchmark, task.benchmark.record
    rows = finished_rows(task)
    result = b.score(rows)
    value = {key: result.pop(key) for key in ("value", "low", "high", "interval", "n", "n_errors")}
    finish = [reason for row in rows for reason in row["finish"]]
    letters = sum("option_logprobs" not in row for row in rows if not row["error"]) if b.kind == "options" else 0
    if letters: result["option_scoring"] = f"{letters} of {value['n']} by the first letter of one generated token, the others by log-probability"
    return {"model": model["model"], "base_model": model["base_model"], "training_data": model["training_data"], "size": model["size"],
            "benchmark": record.key, "version": record.version, "setting": b.setting, "setting_name": record.settings[b.setting].name,
            "metric": record.settings[b.setting].metric, "unit": "percent", "average": record.average, "protocol": b.protocol, "chat": task.chat,
            **value, "n_examples": len(rows), "n_truncated_prompts": task.dropped, "n_unfinished": finish.count("length"),
            "errors": sorted({row["error"].split(":")[0] for row in rows if row["error"]}), **result,
            "max_prompt_tokens": b.max_prompt_tokens, "prompts_sha256": prompts_hash(task.prompts), "engine": identity["engine"], "engine_note": engine_facts["note"],
            "dtype": identity["dtype"], "seed": identity["seed"], "bos": engine_facts["bos"], "chunk_size": task.chunk_size, "judge": b.judge, "stand_in": b.stand_in}


def evaluate(
    model: dict,  # {model, base_model, training_data, size}: how the score names the checkpoint
    benchmarks: dict,  # key -> {"settings": [...], "n": int | "all" | None, "per_group": int | None}
    checkpoint_dir: str | Path | None,  # Hugging Face folder; None where `engine` is one that has been started
    predictions_dir: str | Path,  # gets <benchmark>-<setting>.jsonl
    scores_dir: str | Path,  # gets <benchmark>-<setting>.json
    source_root: str | Path | None = None,  # folder with the raw files
    engine: str | Engine = "",  # "vllm", "transformers", "auto"; "": the site's setting; or an engine that has been started, such as an endpoint's
    dtype: str = "float32",  # "float32" or "bfloat16"
    chat: bool = False,  # wrap prompts in the Tülu chat format (tuned models)
    protocol: str = "paper",  # "paper" or "fixed"
    seed: int = 42,  # of the engine's sampling; sampling of examples is the benchmark's own
    chunk_size: int = 64,  # requests sent together
    max_length: int | None = None,  # prompt + completion, tokens; None: the model's own
    timed=None,  # context manager factory that takes a name, e.g. run.timed; None: seconds only in the report
) -> Report:
    "Evaluate a checkpoint on benchmarks, continuing where an earlier call stopped. Raises EngineError, SourceError, KeyError, ValueError."
    from tqdm.auto import tqdm
    started = engine if isinstance(engine, Engine) else None
    report, clock = Report(), {"engine_start": 0.0, "prompts": 0.0, "compute": 0.0}

    def timing(name):
        return _Timer(clock, name, timed(name) if timed else nullcontext())

    with timing("prompts"):
        limit, tokenizer = (started.max_length, started.tokenizer) if started else length_and_tokenizer(checkpoint_dir, max_length)
        tasks = [Task(load_benchmark(key, setting, protocol, source_root, tokenizer), options, chat, chunk_size, predictions_dir, limit - 2, started.as_turn if started else False)
                 for key, options in benchmarks.items() for setting in options["settings"]]  # room for BOS and one new token
        for task in tasks:
            task.benchmark.ready()
            report.available[task.name] = dict(Counter(row.group for row in task.benchmark.rows))
    with timing("engine_start"):
        name, note = (started.name, started.note) if started else choose_engine(engine)
        common = started.identity() if started else {"checkpoint": checkpoint_hash(checkpoint_dir), "engine": f"{name} {installed_version(name)}", "dtype": dtype}
        common |= {"seed": seed, "max_length": limit, "threads": settings().threads}
    work = []
    for task in tasks:
        done = task.resume(task.identity(common))
        report.kept += sum(end - start for start, end in task.chunks()[:done])
        work += [(task, start, end) for start, end in task.chunks()[done:]]
    if work:
        with timing("engine_start"):
            running = started or ENGINES[name](checkpoint_dir, dtype=dtype, seed=seed, max_length=max_length, note=note)
        with timing("compute"):
            for task, start, end in tqdm(work, desc=model["model"], unit="chunk"):
                running.reset()
                rows = task.predict(running, start, end)
                append_jsonl(task.path, rows)
                report.made += len(rows)
                report.tokens += sum(row["completion_tokens"] for row in rows)
    facts = {"note": note, "bos": started.bos if started else leading_bos(tokenizer)}
    for task in tasks:
        score = score_object(task, model, task.identity(common), facts)
        write_atomic(Path(scores_dir) / f"{task.name}.json", json.dumps(score, indent=1, ensure_ascii=False) + "\n")
        report.scores.append(score)
    report.seconds = {key: round(value, 3) for key, value in clock.items()}
    return report


def length_and_tokenizer(checkpoint_dir, max_length) -> tuple:
    "The most tokens that a checkpoint takes, prompt and completion together, and its tokenizer, silent about lengths."
    from transformers import AutoConfig, AutoTokenizer
    config, tokenizer = AutoConfig.from_pretrained(checkpoint_dir), AutoTokenizer.from_pretrained(checkpoint_dir)
    tokenizer.model_max_length = 1 << 40
    return max_length or getattr(config, "max_position_embeddings", None) or 2048, tokenizer


def leading_bos(tokenizer) -> str:
    "'one' where the tokenizer puts a BOS token in front of every prompt, 'none' where it does not."
    return "one" if list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id] else "none"


class _Timer:
    "Adds the seconds of a block to a clock, inside another context manager."

    def __init__(self, clock, name, inner): self.clock, self.name, self.inner = clock, name, inner

    def __enter__(self):
        self.start = time.perf_counter()
        self.inner.__enter__()

    def __exit__(self, *error):
        self.clock[self.name] += time.perf_counter() - self.start
        return self.inner.__exit__(*error)
