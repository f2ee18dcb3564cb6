"""One model, any benchmarks, no study: what `tulu-study evaluate MODEL` does.

MODEL is a folder with a Hugging Face checkpoint, a repository on the hub, the key of a record in `params/models.yaml`, or the address of an OpenAI-compatible
server. The numbers are made by the same runner, benchmarks and engines as a study's. The same command continues after any interruption, and asks nothing twice
that was answered: the requests of all benchmarks go through one queue, and every answer is stored when it comes.

In the output folder (named after the model, the protocol and whether it is asked in chat format, as each of these changes every prompt or score): `predictions/` and `scores/` as a study has them, `results_<model>.json` in the layout of lm-evaluation-harness (values between 0 and 1; tasks are
called `tulu_<benchmark>_<setting>`, since prompts and extraction are the paper's and not those of the harness's tasks of similar name), and for an endpoint `cost.json`.
"""
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from tulu_study.core.files import hash_json, write_atomic
from tulu_study.core.messages import CHAT_TEMPLATE
from tulu_study.core.params import Endpoint, Model, benchmarks as benchmark_records, models
from tulu_study.core.process import Held, hold
from tulu_study.core.settings import project_root, settings
from tulu_study.evaluation.benchmark import load_benchmark
from tulu_study.evaluation.endpoint import EndpointEngine
from tulu_study.evaluation.runner import Report, Task, evaluate, read_predictions

__all__ = ["evaluate_any", "Target", "find_model", "parse_benchmarks", "speaks_chat", "harness_results"]

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # what a checkpoint needs; never code
METRICS = {"accuracy": "acc"}  # what lm-evaluation-harness calls a metric, where that differs


@dataclass
class Target:
    "A model that can be asked."
    name: str  # short, as files and tables print it
    folder: Path | None = None  # checkpoint with weights and tokenizer
    endpoint: Endpoint | None = None  # or who to ask
    source: str = ""  # as it was given, for the record


def evaluate_any(
    model: str,  # folder, hub repository ("owner/name" or "owner/name@revision"), key of params/models.yaml, or address of a server ("http://host:8000/v1")
    benchmarks: str | dict = "gsm,mmlu",  # "gsm,mmlu:5shot,bbh:cot+direct"; or key -> {"settings": […], "n": …, "per_group": …}
    out_dir: str | Path | None = None,  # gets predictions, scores and the results file; None: evaluation/<model>-<protocol>-<chat or plain> below the results root
    n: int | None = None,  # examples of each benchmark; None: the paper's sample
    per_group: int | None = None,  # examples of each subject, task or language; a benchmark without groups (gsm) refuses it
    chat: bool | None = None,  # Tülu chat format; None: where the tokenizer has a chat template (never for an endpoint)
    engine: str = "",  # "vllm", "transformers", "auto"; "": the site's setting
    dtype: str = "bfloat16",  # "float32" or "bfloat16"
    protocol: str = "paper",  # "paper" or "fixed"
    max_length: int | None = None,  # prompt + completion, tokens; None: the model's own
    source_root: str | Path | None = None,  # folder with the benchmarks' raw files; None: settings, cache, download
    served: str = "",  # at an address: the model's name there; "": the only one that the server lists
    api: str = "completions",  # at an address: "completions" or "chat"
    recording: str = "off",  # endpoint: "record" answers, "replay" them without network, or "off"
    max_dollars: float | None = None,  # endpoint: stop before asking where it may cost more
    seed: int = 42,  # of sampled completions
    say=print,  # gets a line about the cost before an endpoint is asked, and one afterwards
) -> Report:  # scores as written, seconds, and how many predictions were made and kept
    "Evaluate any model on any benchmarks of the registry. Raises ValueError, KeyError, FileNotFoundError, SourceError, EngineError."
    wanted = parse_benchmarks(benchmarks, n, per_group)
    target = find_model(model, served, api)
    chat = bool(chat) if target.endpoint else speaks_chat(target.folder) if chat is None else chat
    out = Path(out_dir) if out_dir is not None else settings().results / "evaluation" / f"{target.name}-{protocol}-{'chat' if chat else 'plain'}"
    facts = {"model": target.name, "base_model": target.name, "training_data": "unknown", "size": "unknown"}
    options = {"protocol": protocol, "seed": seed, "max_length": max_length, "resume": "example"}
    if target.endpoint:
        asked = EndpointEngine(target.endpoint, seed, max_length, recording, out / "recording.jsonl" if recording != "off" else None)
        estimate = price(asked, wanted, chat, protocol, source_root, out)
        if not asked.replayed: say(f"{target.name}: at most {estimate['requests']:,} requests, {estimate['prompt_tokens']:,} prompt{'' if asked.exact_count else ' (estimated)'} and {estimate['completion_tokens']:,} completion tokens, {estimate['dollars']:.2f} dollars")
        if max_dollars is not None and not asked.replayed and estimate["dollars"] > max_dollars:
            raise ValueError(f"asking {target.name} may cost up to {estimate['dollars']:.2f} dollars, more than max_dollars={max_dollars:g}. Ask for fewer examples (n, per_group), or allow more; nothing was asked")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with hold(out / ".lock"):
            if target.endpoint:
                report = evaluate(facts, wanted, None, out / "predictions", out / "scores", source_root, asked, chat=chat, **options)
                cost = write_cost(out / "cost.json", asked, estimate, report, out / "predictions")
                say(f"{target.name}: {cost['this_call']['requests']:,} requests now, {cost['this_call']['dollars']:.2f} dollars; all predictions together {cost['all_predictions']['dollars']:.2f} dollars")
            else: report = evaluate(facts, wanted, target.folder, out / "predictions", out / "scores", source_root, engine, dtype, chat, **options)
            results = harness_results(target, report, wanted, out / "predictions", protocol)
            write_atomic(out / f"results_{target.name}.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    except Held as pid: raise ValueError(f"{out} is being written by process {pid}: wait for it, end it, or name another folder") from None
    report.folder = out
    return report


def parse_benchmarks(
    wanted: str | dict,  # "gsm,mmlu:5shot,bbh:cot+direct": without a setting, all of them
    n: int | None = None,  # examples of each
    per_group: int | None = None,  # examples of each group; a benchmark without groups refuses it
) -> dict:  # key -> {"settings", "n", "per_group"}, in the order given
    "Read which benchmarks are wanted. Raises ValueError that names everything unknown at once."
    if isinstance(wanted, dict): return wanted
    known, found, strange = benchmark_records(), {}, []
    for word in filter(None, (part.strip() for part in wanted.split(","))):
        key, _, settings_wanted = word.partition(":")
        if key not in known: strange.append(f"no benchmark {key!r}")
        else:
            chosen = list(dict.fromkeys(settings_wanted.split("+"))) if settings_wanted else list(known[key].settings)
            strange += [f"{key} has no setting {name!r}, it has {', '.join(known[key].settings)}" for name in chosen if name not in known[key].settings]
            found.setdefault(key, {"settings": [], "n": n, "per_group": per_group})["settings"] += [name for name in chosen if name not in found.get(key, {"settings": []})["settings"]]
    if strange: raise ValueError(f"benchmarks {wanted!r}: {'; '.join(strange)}. There are {', '.join(known)}; write for example gsm:cot,mmlu:0shot+5shot")
    if not found: raise ValueError(f"benchmarks {wanted!r} names none; there are {', '.join(known)}")
    return found


def find_model(
    model: str,  # see `evaluate_any`
    served: str = "",  # the model's name at an address
    api: str = "completions",  # "completions" or "chat"
) -> Target:
    "Find out what kind of model is meant and get it. Raises FileNotFoundError or ValueError with what was tried."
    record = models().get(model)
    if re.match(r"https?://", model):
        endpoint = Endpoint(url=model.rstrip("/"), model=served or only_model(model), api=api, logprobs=5 if "api.openai.com" in model and api == "completions" else 20, key_variable="OPENAI_API_KEY" if "api.openai.com" in model else None)
        return Target(file_name(endpoint.model), endpoint=endpoint, source=model)
    if record and record.kind == "endpoint": return Target(record.key, endpoint=record.endpoint, source=model)
    if (Path(model) / "config.json").is_file(): return Target(file_name(Path(model).resolve().name), folder=Path(model), source=model)
    if Path(model).is_dir(): raise FileNotFoundError(f"{model} holds no config.json (found {', '.join(sorted(p.name for p in Path(model).iterdir())[:8]) or 'nothing'}); expected a Hugging Face model folder")
    if record and record.kind != "hub":
        raise ValueError(f"{model} is a base model that a study makes; run the study and give the folder of its checkpoint instead (results/<study>/…)")
    name, _, revision = (f"{record.hub}@{record.revision or ''}" if record else model).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"no model {model!r}: there is no such folder, no such key in params/models.yaml (there are {', '.join(models())}), and a hub repository is written owner/name")
    return Target(file_name(name), folder=download(name, revision or None, record), source=model)


def download(
    name: str,  # "owner/name"
    revision: str | None,  # branch, tag or commit
    record: Model | None = None,  # its record, for the licence
) -> Path:
    "The folder of a hub repository, fetched if it is not in the hub's cache. Raises FileNotFoundError that says what can be done."
    from huggingface_hub import snapshot_download
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
        if any(folder.glob("*.safetensors")): return folder
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*HUB_FILES, "*.bin"]))  # older repositories have no other weights
    except Exception as error:
        about = f" Its licence: {record.licence}." if record else ""
        raise FileNotFoundError(f"the hub did not give {name}{'@' + revision if revision else ''} ({type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else 'no reason'}).{about} "
                                "Look at the name, log in where it is gated (hf auth login), or give the path of a folder that holds it") from error


def only_model(url: str) -> str:
    "The name of the model that a server offers, where it offers one."
    import httpx
    try: names = [row["id"] for row in httpx.get(f"{url.rstrip('/')}/models", timeout=10).json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{url} does not list its models ({type(error).__name__}); expected an address that ends in /v1. Is the server running? Or name the model with --served") from error
    if len(names) != 1: raise ValueError(f"{url} offers {', '.join(names) or 'no model'}; name one with --served")
    return names[0]


def file_name(text: str) -> str:
    "A name without characters that a file's name should not have."
    return re.sub(r"[^\w.-]+", "__", text).strip("_") or "model"


def speaks_chat(
    folder: str | Path,  # checkpoint
) -> bool:
    "Whether a checkpoint's tokenizer brings a chat template; warns where it is not the Tülu format, in which all prompts are wrapped."
    import warnings
    from transformers import AutoTokenizer
    template = AutoTokenizer.from_pretrained(folder).chat_template
    if template and "<|assistant|>" not in str(template):
        warnings.warn(f"{Path(folder).name} brings a chat template other than Tülu's; prompts are wrapped in Tülu's, as the paper does with every tuned model. chat=False asks in plain form", stacklevel=3)
    return bool(template)


def price(asked, wanted, chat, protocol, source_root, out) -> dict:
    "What a run may cost at most: all prompts of all benchmarks, every completion as long as allowed. Raises EngineError for a benchmark that cannot be asked in this way."
    total = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
    for key, options in wanted.items():
        for setting in options["settings"]:
            b = load_benchmark(key, setting, protocol, source_root, asked.tokenizer)
            asked.require(b.kind)
            task = Task(b, options, chat, 1, out / "predictions", asked.max_length - 2, asked.as_turn)
            part = asked.estimate(task.prompts, b.max_new_tokens, b.n_samples)
            total = {name: total[name] + part[name] for name in total}
    return total | {"dollars": asked.dollars(total["prompt_tokens"], total["completion_tokens"])}


def write_cost(path, asked, estimate, report, predictions) -> dict:
    "What was expected at most, what this call spent, and what all predictions together have cost."
    rows = [row for score in report.scores for row in read_predictions(predictions / f"{score['benchmark']}-{score['setting']}.jsonl")]
    tokens = {name: sum(row[name] for row in rows if not row["error"]) for name in ("prompt_tokens", "completion_tokens")}
    cost = {"model": asked.record.model, "replayed": asked.replayed, "prices_per_million": {"in": asked.record.price_in, "out": asked.record.price_out},
            "estimate_at_most": estimate, "this_call": asked.spent(), "all_predictions": tokens | {"dollars": asked.dollars(**tokens)}}
    write_atomic(path, json.dumps(cost, indent=1) + "\n")
    return cost


# ---- lm-evaluation-harness's results file

def harness_results(
    target: Target,  # what was evaluated
    report: Report,  # what the runner returned
    wanted: dict,  # key -> settings, n, per_group
    predictions: Path,  # folder of the predictions
    protocol: str = "paper",  # "paper" or "fixed"
) -> dict:  # results, groups, group_subtasks, configs, versions, n-shot, higher_is_better, n-samples, config, git_hash, …
    "The scores in the layout of lm-evaluation-harness (version 0.4). n-samples: questions in the test set and those that have a score; standard errors: half the interval over the normal quantile."
    kept = {name: {} for name in ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")}
    scores = report.scores
    for score in scores:
        record = benchmark_records()[score["benchmark"]]
        setting, task = record.settings[score["setting"]], f"tulu_{score['benchmark']}_{score['setting']}"
        parts = {f"{task}_{file_name(name)}": group for name, group in score["groups"].items()}
        identity = identity_of(predictions, score)
        metric, better = METRICS.get(score["metric"], score["metric"]), "toxic" not in score["metric"]
        there = report.available[f"{score['benchmark']}-{score['setting']}"]
        originals = {task: sum(there.values()), **{f"{task}_{file_name(name)}": there.get(name, group["n"]) for name, group in score["groups"].items()}}
        kept["results"][task] = {"name": task, "alias": task, "sample_len": score["n"], **metric_entry(metric, score["value"], half_width(score))}
        kept["results"] |= {name: {"name": name, "alias": f" - {name}", "sample_len": group["n"], **metric_entry(metric, group["value"])} for name, group in parts.items()}
        if parts: kept["groups"][task] = kept["results"][task]
        kept["group_subtasks"][task] = list(parts)
        for name, count in {task: score["n"], **{name: group["n"] for name, group in parts.items()}}.items():
            kept["configs"][name] = {"task": name, "tag": "tulu_study", "dataset_path": record.homepage, "output_type": "generate_until" if identity["kind"] == "generate" else "multiple_choice",
                                     "num_fewshot": setting.n_shot, "metric_list": [{"metric": metric, "aggregation": score["average"], "higher_is_better": better}],
                                     "generation_kwargs": {"until": identity["stop"], "max_gen_toks": identity["max_new_tokens"], "do_sample": identity["temperature"] > 0, "temperature": identity["temperature"],
                                                           "top_p": identity["top_p"]}, "repeats": identity["n_samples"], "metadata": {"version": record.version, "protocol": protocol, "matches": setting.matches}}
            kept["versions"][name], kept["n-shot"][name] = record.version, setting.n_shot
            kept["higher_is_better"][name] = {metric: better}
            kept["n-samples"][name] = {"original": originals[name], "effective": count}
    limits = {key: {name: options[name] for name in ("n", "per_group") if options.get(name)} for key, options in wanted.items()}
    same = {options.get("n") for options in wanted.values()}
    first = scores[0] if scores else {}
    folder = target.endpoint is None
    return kept | {"config": {"model": first.get("engine", "").split(" ")[0], "model_args": f"pretrained={target.source},dtype={first.get('dtype')}" if folder else f"model={target.endpoint.model},base_url={target.endpoint.url}",
                              "batch_size": "auto", "batch_sizes": [], "device": None, "use_cache": None, "limit": same.pop() if len(same) == 1 and not any(options.get("per_group") for options in wanted.values()) else None, "limits": limits, "bootstrap_iters": 2000,
                              "gen_kwargs": None, "random_seed": first.get("seed"), "numpy_seed": first.get("seed"), "torch_seed": first.get("seed"), "fewshot_seed": 42},
                   "git_hash": git_hash(), "model_source": "local" if folder else "endpoint", "model_name": target.source, "model_name_sanitized": target.name, "chat_template": CHAT_TEMPLATE if first.get("chat") else None, "max_length": identity_of(predictions, first).get("max_length"), "bos": first.get("bos"),
                   "system_instruction": None, "fewshot_as_multiturn": False, "task_hashes": {f"tulu_{s['benchmark']}_{s['setting']}": hash_json([s["prompts_sha256"], s["version"]]) for s in scores},
                   "made_by": "tulu-study", "notes": sorted({note for s in scores for note in (s["engine_note"], s.get("option_scoring"), f"{s['benchmark']}: {s['stand_in']['words']}" if s["stand_in"] else None) if note})}


def identity_of(predictions: Path, score: dict) -> dict:
    "The identity of the predictions that a score was made from."
    file = predictions / f"{score.get('benchmark')}-{score.get('setting')}.identity.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def metric_entry(metric: str, value: float | None, error: float | None = None) -> dict:
    "A metric and its standard error under the harness's keys, between 0 and 1; no filter has a name here."
    return {f"{metric},none": None if value is None else round(value / 100, 8), f"{metric}_stderr,none": "N/A" if error is None else round(error / 100, 8)}


def half_width(score: dict) -> float | None:
    "Standard error in percent, from the interval."
    if score["low"] is None: return None
    return (score["high"] - score["low"]) / 2 / NormalDist().inv_cdf((1 + score["interval"]["level"]) / 2)


def git_hash() -> str | None:
    "The commit of the checkout that made the numbers; None outside of one."
    try: done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project_root(), capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError): return None
    return done.stdout.strip() if done.returncode == 0 else None
