"""The runner: one checkpoint, all its benchmarks, one engine start, results that survive a kill.

A prediction is appended to its file as soon as its answer is there, whatever the order; when all are there, the file is put into the order of the
examples. What an interrupted run left is kept in one of two ways:

* `resume="chunk"` (studies): requests go out in fixed chunks with the engine's cache emptied before each. Whole chunks are kept, a chunk that was not
  finished is done again. A resumed run therefore sends exactly the requests that an uninterrupted run sends, in the same company, and writes the same bytes.
* `resume="example"` (`tulu-study evaluate`, and whatever is asked over a network): the requests of all benchmarks go through one queue, those with the same
  beginning one after the other, and no finished example is ever asked again. Where all of them are greedy completions, the engine is told so
  (`Engine`, greedy). Which requests kept each other company is not recorded; in bfloat16 it can move a completion.

Beside `<benchmark>-<setting>.jsonl` lies `<benchmark>-<setting>.identity.json`: the checkpoint's hash, engine, dtype and everything else that
changes a completion. When it differs, the predictions are not this run's: they go to `<benchmark>-<setting>.<hash of their identity>.old.jsonl` and come back
when that identity does. Examples that are not asked for this time go there too; with `resume="example"` they come back when they are asked for.

What a benchmark needs for scoring (a sandbox, a judge) is asked for before the engine starts (`Benchmark.ready`); what it does after generating
(`Benchmark.finish`: run code, ask the judge) begins when the engine has given its memory back, and is kept per completion in
`<benchmark>-<setting>.checks.jsonl`, so that a kill costs none of it.
"""
import json
import os
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tulu_study.core.files import cut_torn_line, hash_json, sha256_file, write_atomic, write_jsonl
from tulu_study.core.settings import settings
from tulu_study.evaluation.benchmark import load_benchmark, prompt_hash, prompts_hash
from tulu_study.evaluation.engines import ENGINES, UNANSWERED, Decoding, Engine, EngineError, Request, choose_engine, installed_version, leading_bos

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
    folder: Path | None = None  # where all of it lies, where that was chosen here


def checkpoint_hash(folder: str | Path) -> str:
    "Hash of the files that decide what a checkpoint says: weights, config, tokenizer."
    folder = Path(folder)
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".model") or p.name in (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"))
    if "config.json" not in names:
        raise FileNotFoundError(f"{folder} holds no config.json (found {', '.join(names) or 'nothing'}); expected a Hugging Face model folder")
    return hash_json([[name, sha256_file(folder / name)] for name in names])


class Growing:
    "A JSON-lines file that grows by one row at a time: a kill loses no row, a power failure those of a second."

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        self.file, self.synced = open(path, "a", encoding="utf-8"), time.monotonic()

    def add(self, row: dict):
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        if time.monotonic() - self.synced > 1: self.sync()

    def sync(self):
        os.fsync(self.file.fileno())
        self.synced = time.monotonic()

    def close(self):
        self.sync()
        self.file.close()


class Task:
    "One benchmark in one setting for one checkpoint: its requests and its predictions file."

    def __init__(self, benchmark, options, chat, chunk_size, predictions_dir, max_prompt_tokens=None, as_turn=False, resume="chunk"):
        self.benchmark, self.chat, self.chunk_size, self.mode = benchmark, chat and benchmark.chat_format and not as_turn, chunk_size, resume
        benchmark.as_turn = as_turn
        self.name = f"{benchmark.record.key}-{benchmark.setting}"
        self.path = Path(predictions_dir) / f"{self.name}.jsonl"
        self.sidecar, self.store = self.path.with_suffix(".identity.json"), self.path.with_suffix(".checks.jsonl")
        if benchmark.max_prompt_tokens and max_prompt_tokens:
            benchmark.limit_prompts(min(benchmark.max_prompt_tokens, max_prompt_tokens))
        self.examples = benchmark.examples(options.get("n"), options.get("per_group"))
        twice = [name for name, count in Counter(example.id for example in self.examples).items() if count > 1]
        if twice: raise ValueError(f"{self.name}: {len(twice)} ids occur more than once among the questions ({', '.join(twice[:3])}); expected every id once, as answers are compared by it. Remove the repeated rows from the benchmark's files")
        self.prompts = [benchmark.turn(example) if as_turn else benchmark.prompt(example, self.chat) for example in self.examples]
        self.stop = benchmark.stop(self.chat or as_turn)
        self.hashes = [prompt_hash(prompt) for prompt in self.prompts]
        self.places = {row_key({"example_id": example.id, "prompt_hash": digest, "target": example.target}): i for i, (example, digest) in enumerate(zip(self.examples, self.hashes))}
        self.dropped = sum(benchmark.dropped_shots(example, self.chat) > 0 for example in self.examples)

    def chunks(self):
        "Start and end of every chunk."
        return [(at, min(at + self.chunk_size, len(self.examples))) for at in range(0, len(self.examples), self.chunk_size)]

    def identity(self, common: dict) -> dict:
        "Everything besides the prompts that decides a completion; where chunks keep company, their size and the threads too."
        b = self.benchmark
        return common | {"benchmark": b.record.key, "setting": b.setting, "version": b.record.version, "protocol": b.protocol, "chat": self.chat,
                         "kind": b.kind, "max_new_tokens": b.max_new_tokens, "stop": self.stop, "temperature": b.temperature, "top_p": b.top_p, "n_samples": b.n_samples} | (
                         {"chunk_size": self.chunk_size, "threads": settings().threads} if self.mode == "chunk" else {})

    # ---- what an earlier run left

    def old(self, identity: dict) -> Path:
        "Where the predictions of another identity, or of examples that are not asked for, lie."
        return self.path.with_name(f"{self.name}.{hash_json(identity)[:8]}.old.jsonl")

    def resume(self, identity: dict) -> list:
        "Keep what belongs to this run, put what does not aside; returns the positions of the examples that are still to be asked."
        self.put_aside(identity)
        rows, pool = readable_rows(self.path), self.old(identity)
        if self.mode == "chunk":
            kept = self.whole_chunks(rows)
            if rest := [line for line in rows if row_key(json.loads(line)) not in self.places]:
                merge(pool, rest)
                warnings.warn(f"{self.name}: {len(rest)} predictions are of examples that are not asked for now; they are kept as {pool.name}", stacklevel=2)
        else: kept = self.wanted(rows, pool)
        content = "".join(line + "\n" for line in kept.values()).encode()
        if self.path.is_file() and self.path.read_bytes() != content or content and not self.path.is_file(): write_atomic(self.path, content)
        return [i for i in range(len(self.examples)) if i not in kept]

    def put_aside(self, identity):
        "Where the predictions are another identity's, exchange them for those that this identity left."
        known = json.loads(self.sidecar.read_text(encoding="utf-8")) if self.sidecar.is_file() else None
        pairs = [(self.path, self.old(identity)), (self.store, self.old(identity).with_suffix(".checks.jsonl"))]
        if known != identity: self.leave(known, identity)
        for path, back in pairs:   # after a kill in the middle, too
            if back.is_file() and not path.is_file(): os.replace(back, path)

    def leave(self, known, identity):
        "Move the predictions of another identity away; only then does the sidecar name the present one, so that no kill gives one the other's rows."
        if self.path.is_file() and self.path.stat().st_size:
            place = self.old(known or {})
            if place.is_file(): merge(place, readable_rows(self.path))
            else: os.replace(self.path, place)
            changed = [name for name in (known or {}).keys() | identity.keys() if (known or {}).get(name) != identity.get(name)]
            warnings.warn(f"{self.name}: the predictions in {self.path.parent} were made with another {', '.join(sorted(changed))}; they are kept as {place.name}, and come back when the same is asked for again", stacklevel=2)
            if self.store.is_file(): os.replace(self.store, place.with_suffix(".checks.jsonl"))
        for path in (self.path, self.store): path.unlink(missing_ok=True)
        write_atomic(self.sidecar, json.dumps(identity, indent=1, ensure_ascii=False) + "\n")

    def whole_chunks(self, lines) -> dict:
        "Position -> line of the chunks that are there as a whole, from the first on; each stands in a part of the file of its own."
        kept = {}
        for start, end in self.chunks():
            found = {self.places.get(row_key(json.loads(line))): line for line in lines[start:end]}
            alone = end - start == self.chunk_size or len(lines) <= end  # a longer file was made with another last chunk
            if not alone or len(lines[start:end]) != end - start or set(found) != set(range(start, end)): break
            kept |= {i: found[i] for i in range(start, end)}
        return kept

    def wanted(self, lines, pool: Path) -> dict:
        "Position -> line of every example that was answered before; what is not asked for goes to the pool, and nothing is in neither place at any time. What an endpoint left unanswered is asked again."
        there = readable_rows(pool)
        found = by_key([*there, *lines])
        kept = {self.places[key]: line for key, line in found.items() if key in self.places and not (json.loads(line).get("error") or "").startswith(UNANSWERED)}
        rest = [line for key, line in found.items() if key not in self.places]
        if rest == there: return kept
        write_atomic(pool, "".join(line + "\n" for line in found.values()))
        write_atomic(self.path, "".join(kept[i] + "\n" for i in kept))
        if rest: write_atomic(pool, "".join(line + "\n" for line in rest))
        else: pool.unlink()
        return kept

    # ---- what is asked

    @property
    def greedy(self) -> bool: return self.benchmark.kind == "generate" and not self.benchmark.temperature

    def request(self, i: int, engine) -> Request:
        "What the engine is asked about one example."
        b = self.benchmark
        if b.kind == "options": return Request(self.prompts[i], options=tuple(b.option_ids(engine.tokenizer)))
        if b.kind == "completions": return Request(self.prompts[i], completions=tuple(b.completions(self.examples[i])))
        return Request(self.prompts[i], Decoding(b.max_new_tokens, tuple(self.stop), b.temperature, b.top_p, 0, b.n_samples))

    def row(self, i: int, output) -> dict:
        "One prediction, in the schema of the predictions file."
        b, answer, example, digest = self.benchmark, None, self.examples[i], self.hashes[i]
        if output.error is None:
            if b.kind == "options" and output.logprobs is None: answer = b.extract(output.texts[0])  # an endpoint that lists no log-probabilities
            elif b.kind == "options": output.texts, answer = [], b.choose(output.logprobs)
            elif b.kind == "completions": output.texts, answer = [], b.completions(example)[output.logprobs.index(max(output.logprobs))]
            elif b.n_samples == 1: answer = b.extract(output.texts[0])
        row = {"example_id": example.id, "group": example.group, "prompt_hash": digest, "completions": output.texts, "answer": answer, "target": example.target,
               "score": None, "error": output.error, "prompt_tokens": output.prompt_tokens, "completion_tokens": output.completion_tokens, "finish": output.finish}
        if output.logprobs is not None: row["option_logprobs"] = [round(value, 5) for value in output.logprobs]
        return row | {"score": b.score_one(row)}


def row_key(row: dict) -> tuple:
    "What says that a prediction is an example's: its id, its prompt, its gold answer."
    return row.get("example_id"), row.get("prompt_hash"), json.dumps(row.get("target"), ensure_ascii=False)


def by_key(lines: list) -> dict:
    "Lines by what they answer; of two, the later one."
    return {row_key(json.loads(line)): line for line in lines}


def merge(place: Path, lines: list):
    "Add predictions to those that were put aside earlier."
    write_atomic(place, "".join(line + "\n" for line in by_key([*readable_rows(place), *lines]).values()))


def readable_rows(path: Path) -> list:
    "The lines of a predictions file that hold a row; what follows the last newline is torn."
    if not path.is_file(): return []
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try: text = line.decode()
        except UnicodeDecodeError: continue
        try: found += [text] if isinstance(json.loads(text), dict) else []
        except ValueError: continue
    return found


def run_requests(running, wanted: list, limit: int | None = None, before: int = 0):
    """Ask about (task, position) pairs and store each answer as it comes; yields the stored rows. An engine that is down is an EngineError, and none of its failures is stored:
    where nothing succeeds (nor was anything kept `before`), or `limit` requests fail one after the other."""
    files, failed, stored = {}, [], before

    def store(task, row):
        if task not in files: files[task] = Growing(task.path)
        files[task].add(row)
        return row

    answers = running.stream([task.request(i, running) for task, i in wanted])
    try:
        for at, output in answers:
            task, i = wanted[at]
            row = task.row(i, output)
            if row["error"] and row["error"].startswith("engine:"):
                failed.append((task, row))
                if limit and len(failed) >= limit: break
                continue
            for one in [*failed, (task, row)]:
                stored += 1
                yield store(*one)
            failed = []
        if failed and (not stored or limit and len(failed) >= limit):
            names = ", ".join(dict.fromkeys(task.name for task, _ in failed))
            raise EngineError(f"{names}: {'every request failed' if not stored else f'{len(failed)} requests failed one after the other'}; the first: {failed[0][1]['error']}. None of these was stored; the same command continues here")
        for one in failed: yield store(*one)
    finally:
        answers.close()
        for file in files.values(): file.close()


def finished_rows(task: Task) -> list:
    "The predictions in the examples' order, with what the benchmark does after generating; written back where that changed them."
    there = read_predictions(task.path)
    if len({row_key(row) for row in there}) != len(there) or len(there) != len(task.examples):
        raise ValueError(f"{task.path} holds {len(there)} predictions, expected one for each of {len(task.examples)} examples. Has another process written there too? Delete it, and the same command asks again")
    before = json.dumps(there)
    rows = task.benchmark.finish(sorted(there, key=lambda row: task.places[row_key(row)]), task.store)
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
            "dtype": identity["dtype"], "seed": identity["seed"], "bos": engine_facts["bos"], "chunk_size": task.chunk_size if task.mode == "chunk" else None, "judge": b.judge, "stand_in": b.stand_in}


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
    chunk_size: int = 64,  # requests sent together; with resume="example", so many failures one after the other end the run
    max_length: int | None = None,  # prompt + completion, tokens; None: the model's own
    resume: str = "chunk",  # what a restart keeps: whole chunks, to the same bytes ("chunk"), or every finished example ("example", always so for an endpoint)
    timed=None,  # context manager factory that takes a name, e.g. run.timed; None: seconds only in the report
) -> Report:
    "Evaluate a checkpoint on benchmarks, continuing where an earlier call stopped. Raises EngineError, SourceError, KeyError, ValueError."
    from tqdm.auto import tqdm
    started = engine if isinstance(engine, Engine) else None
    if resume not in ("chunk", "example"): raise ValueError(f"resume is {resume!r}; expected chunk or example")
    report, clock, mode = Report(), {"engine_start": 0.0, "prompts": 0.0, "compute": 0.0}, "example" if started else resume

    def timing(name):
        return _Timer(clock, name, timed(name) if timed else nullcontext())

    with timing("prompts"):
        limit, tokenizer, bos = (started.max_length, started.tokenizer, started.bos) if started else checkpoint_facts(checkpoint_dir, max_length)
        tasks = [Task(load_benchmark(key, setting, protocol, source_root, tokenizer), options, chat, chunk_size, predictions_dir, limit - 2, started.as_turn if started else False, mode)
                 for key, options in benchmarks.items() for setting in options["settings"]]  # room for BOS and one new token
        for task in tasks if started else (): started.require(task.benchmark.kind)
        for task in tasks:
            task.benchmark.ready()
            report.available[task.name] = dict(Counter(row.group for row in task.benchmark.rows))
    with timing("engine_start"):
        name, note = (started.name, started.note) if started else choose_engine(engine)
        common = started.identity() if started else {"checkpoint": checkpoint_hash(checkpoint_dir), "engine": f"{name} {installed_version(name)}", "dtype": dtype}
        common |= {"seed": seed, "max_length": limit}
    work = []  # of (task, position), in the lists that are asked one after the other
    for task in tasks:
        missing = task.resume(task.identity(common))
        report.kept += len(task.examples) - len(missing)
        if mode == "chunk": work += [[(task, i) for i in range(start, end)] for start, end in task.chunks() if start in missing]
        else: work.append([(task, i) for i in sorted(missing, key=lambda i: (task.prompts[i], i))])
    if mode == "example": work = [sum(work, [])] if any(work) else []
    if work:
        with timing("engine_start"):
            greedy = mode == "example" and all(task.greedy for task in tasks)  # chunks keep to one way, whatever else is asked, for the sake of their bytes
            running = started or ENGINES[name](checkpoint_dir, dtype=dtype, seed=seed, max_length=max_length, note=note, greedy=greedy)
        with timing("compute"), tqdm(total=sum(map(len, work)), desc=model["model"], unit="example") as bar:
            for wanted in work:
                if mode == "chunk": running.reset()
                for row in run_requests(running, wanted, *((None, 0) if mode == "chunk" else (chunk_size, report.kept))):
                    report.made += 1
                    report.tokens += row["completion_tokens"]
                    bar.update()
        if not started: running.release()  # a judge may need the room
    facts = {"note": note, "bos": bos}
    for task in tasks:
        score = score_object(task, model, task.identity(common), facts)
        write_atomic(Path(scores_dir) / f"{task.name}.json", json.dumps(score, indent=1, ensure_ascii=False) + "\n")
        report.scores.append(score)
    report.seconds = {key: round(value, 3) for key, value in clock.items()}
    return report


def checkpoint_facts(checkpoint_dir, max_length) -> tuple:
    "The most tokens that a checkpoint takes, prompt and completion together; its tokenizer, silent about lengths; how many BOS tokens that puts in front of a prompt."
    from transformers import AutoConfig, AutoTokenizer
    config, tokenizer = AutoConfig.from_pretrained(checkpoint_dir), AutoTokenizer.from_pretrained(checkpoint_dir)
    tokenizer.model_max_length = 1 << 40
    return max_length or getattr(config, "max_position_embeddings", None) or 2048, tokenizer, leading_bos(tokenizer, config.model_type, Path(checkpoint_dir).name)


class _Timer:
    "Adds the seconds of a block to a clock, inside another context manager."

    def __init__(self, clock, name, inner): self.clock, self.name, self.inner = clock, name, inner

    def __enter__(self):
        self.start = time.perf_counter()
        self.inner.__enter__()

    def __exit__(self, *error):
        self.clock[self.name] += time.perf_counter() - self.start
        return self.inner.__exit__(*error)
