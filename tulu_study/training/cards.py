"""The card of a checkpoint, its scores as metadata that the hub reads, and the explicit step of publishing it."""
import json
from pathlib import Path

from tulu_study.core.files import sha256_file, write_atomic
from tulu_study.core.params import benchmarks, datasets, mixes, models
from .config import FinetuneConfig

PAPER = "2306.04751"
SCORES = "## Scores"   # heading of the section that `update_card` writes anew
MADE = "## Made with"  # likewise
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PUBLISHED = (*WEIGHTS, "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template.jinja", "README.md", "adapter/*", "trained.json", "training_log.jsonl", "verification.json")
ON_REQUEST = "to be requested"   # in the licence of a base model that nobody may pass on


class CardError(ValueError):
    "A checkpoint that cannot be described or published as asked; says what was found and what to do."


def parts_of(
    key: str,   # dataset or mix
) -> list:      # records of the datasets that it is made of; none for data that is in no registry
    "Find out what data is made of."
    known = datasets()
    return [known[part] for part in (mixes()[key].parts if key in mixes() else [key]) if part in known]


def _hub(record) -> list[str]:
    "Names of a dataset's repositories on the hub."
    return list(dict.fromkeys(file.hub.removeprefix("datasets/") for file in record.files if file.hub and file.hub.startswith("datasets/")))


def card_data(settings: dict):   # of a fine-tuning, as in trained.json
    "What machines read of a card. The licence is `other`: those of the base model and of every dataset apply together."
    from huggingface_hub import ModelCardData
    base, parts = models().get(settings["base"]), parts_of(settings["data"])
    about = {"base_model": base.hub if base and base.hub else None, "datasets": [name for record in parts for name in _hub(record)] or None}
    return ModelCardData(model_name=settings["model"] or "fine-tuned-model", license="other", license_name="base-model-and-data", library_name="transformers", pipeline_tag="text-generation", language=["en"],
                         tags=["instruction-tuning", "tulu", f"arxiv:{PAPER}", *(["lora"] if settings.get("lora") else [])], **{name: value for name, value in about.items() if value})


def model_card(
    config: FinetuneConfig,   # settings
    facts: dict,              # conversations, steps, tokens, supervised_tokens, …
) -> str:                     # Markdown with a YAML head
    "Write the card of a checkpoint from what it was made with."
    settings = config.science()
    base, parts = models().get(config.base), parts_of(config.data)
    licences = [("base model", base.name if base else config.base or "not recorded", base.licence if base else "not recorded")] + [("data", record.name, record.licence) for record in parts]
    shown = [(name, f"`{json.dumps(value)}`" if isinstance(value, dict) else value) for name, value in settings.items() if name not in ("model", "size")]
    rows = lambda table: "\n".join("| " + " | ".join(map(str, row)) + " |" for row in table)
    how = "a low-rank adapter (in `adapter/`), merged into its weights" if config.lora else "all of its weights"
    return (f"---\n{card_data(settings).to_yaml()}\n---\n\n# {config.model or 'fine-tuned model'}\n\n{base.name if base else config.base or 'A base model'} fine-tuned on {config.data or 'conversations'} ({how}) in the Tülu chat format, "
            f"by a study of *How Far Can Camels Go? Exploring the State of Instruction Tuning on Open Resources* (Wang et al., 2023, arXiv:{PAPER}).\n\n{facts['conversations']:,} conversations, {facts['steps']:,} optimiser steps, "
            f"{facts['tokens']:,} tokens, {facts['supervised_tokens']:,} of them supervised.\n\n## Use\n\nThe tokenizer carries the chat template:\n\n"
            "```\n<|user|>\nYour question\n<|assistant|>\n```\n\nThe newline after `<|assistant|>` belongs to the prompt. Answers end with the end-of-sequence token.\n\n"
            f"## Licences\n\nAll of these go on to apply, as their publishers state them.\n\n| | name | licence |\n|---|---|---|\n{rows(licences)}\n\n## Settings\n\n| setting | value |\n|---|---|\n{rows(shown)}\n")


def _trained(folder: Path) -> dict:
    "What a finished fine-tuning left of its settings. CardError when there is none."
    try: return json.loads((folder / "trained.json").read_text(encoding="utf-8"))
    except (OSError, ValueError): raise CardError(f"{folder} has no readable trained.json: it is no checkpoint of a finished fine-tuning; run its cell (tulu-study run)") from None


def read_scores(scores) -> list[dict]:   # a folder of score files, or the scores themselves
    "Take scores as they come. CardError when a folder has none."
    if not isinstance(scores, (str, Path)): return list(scores)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(scores).glob("*.json"))]
    found = [one for one in found if isinstance(one, dict) and {"benchmark", "setting", "metric", "value"} <= set(one)]
    return found or _none(scores)


def _none(scores):
    raise CardError(f"{scores} holds no scores: evaluate the checkpoint first (tulu-study run, or tulu-study evaluate)")


def eval_results(scores: list[dict]) -> list:
    "Scores in the hub's terms; what was not scored is left out."
    from huggingface_hub import EvalResult
    named = benchmarks()
    kept = lambda one, *names: {name: one[name] for name in names if one.get(name) is not None}
    return [EvalResult(task_type="text-generation", dataset_type=one["benchmark"], dataset_name=named[one["benchmark"]].name if one["benchmark"] in named else one["benchmark"], dataset_config=one["setting"],
                       dataset_args=kept(one, "n", "n_errors", "protocol", "version", "chat", "seed", "prompts_sha256", "judge", "stand_in"), metric_type=one["metric"], metric_name=one.get("setting_name") or one["metric"], metric_value=round(one["value"], 4),
                       metric_args={"unit": one.get("unit", "percent"), **kept(one, "low", "high", "interval")})
            for one in scores if one["value"] is not None]


def _table(scores: list[dict]) -> str:
    "Scores for people."
    def line(one):
        between = f"{one['low']:.1f} – {one['high']:.1f}" if one.get("low") is not None else "–"
        note = "; ".join(filter(None, [f"{one['n_errors']} failed" if one.get("n_errors") else "", f"stand-in: {one['stand_in']}" if one.get("stand_in") else ""]))
        return f"| {one['benchmark']} | {one.get('setting_name') or one['setting']} | {one['value']:.1f} | {between} | {one.get('n', '–')} | {one.get('protocol', '–')} | {note} |"
    rows = "\n".join(line(one) for one in scores if one["value"] is not None)
    levels = sorted({one["interval"]["level"] for one in scores if (one.get("interval") or {}).get("level")})
    return f"{SCORES}\n\n| benchmark | setting | percent | interval ({', '.join(f'{level:.0%}' for level in levels) or 'none'}) | examples | protocol | remarks |\n|---|---|---|---|---|---|---|\n{rows}\n"


def update_card(
    checkpoint_dir: str | Path,   # a finished fine-tuning
    scores=None,                  # folder of its score files, or [{benchmark, setting, metric, value, low, high, n, protocol, …}]; None = none yet
) -> Path:                        # its README.md
    "Put into a checkpoint's card what its manifest says of its making, and its scores, with intervals, protocol and number of examples: for people and as model-index. CardError for scores of another model."
    from huggingface_hub import ModelCard
    folder = Path(checkpoint_dir)
    settings, found = _trained(folder)["settings"], read_scores(scores) if scores is not None else []
    if strange := sorted({str(one["model"]) for one in found if one.get("model") not in (None, settings["model"])}):
        raise CardError(f"these scores are of {', '.join(strange)}, and {folder} holds {settings['model']}: give the scores of this checkpoint")
    if not (results := eval_results(found)) and scores is not None: _none(scores)
    card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    data = card_data(settings)
    data.eval_results = results or None
    text, manifest = card.text.split(f"\n{SCORES}\n")[0].split(f"\n{MADE}\n")[0].strip(), _manifest(folder)
    written = write_atomic(folder / "README.md", "\n\n".join(filter(None, [f"---\n{data.to_yaml()}\n---", text, _made(manifest), _table(found) if found else ""])).rstrip() + "\n")
    if manifest:   # else the cell would count as damaged: a card is a description, no result
        manifest["outputs"]["README.md"] = {"bytes": written.stat().st_size, "sha256": sha256_file(written)}
        write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))
    return written


def _made(manifest: dict) -> str:
    "What a cell's manifest says of the making, for people; nothing without one."
    if not manifest: return ""
    git, machine = manifest.get("git") or {}, manifest.get("hardware") or {}
    flat = {name: next(iter(entry.values())) for name, entry in manifest.get("inputs", {}).items() if isinstance(entry, dict) and set(entry) & {"sha256", "cell"}}
    rows = [("commit", (git.get("commit") or "not recorded") + (" with changes" if git.get("dirty") else "")), ("begun", manifest.get("began")), ("seconds", f"{manifest['seconds']:,.0f}" if "seconds" in manifest else None),
            ("hardware", ", ".join(machine["gpus"]) if machine.get("gpus") else f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB" if machine else None),
            *((f"version of {name}", value) for name, value in manifest.get("versions", {}).items()), ("cell", manifest.get("key")), *((f"input {name}", value) for name, value in flat.items())]
    return f"{MADE}\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows if value)


def _manifest(folder: Path) -> dict:   # {} where the checkpoint is no finished cell of a study
    "Read a cell's manifest."
    try: return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError): return {}


def publishable(folder: Path) -> list[Path]:
    "The files that would be published. CardError that says everything which is missing, unfinished or unverified."
    from .base import BaseModelError, inspect_base
    problems = [f"{name} is missing" for name in ("README.md", "trained.json", "verification.json", "config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    manifest = _manifest(folder)
    if not manifest and ((folder / "failed.json").exists() or (folder / "attempt.json").exists()): problems.append("its cell has not ended well: there is an attempt, but no manifest.json")
    problems += [f"{path.name} is half-written" for path in folder.glob(".*.part")]
    try: inspect_base(folder)
    except (BaseModelError, ValueError) as error: problems.append(str(error))
    try: failed = [row["check"] for row in json.loads((folder / "verification.json").read_text(encoding="utf-8")) if not row["passed"]]
    except OSError: failed = []
    except (ValueError, KeyError, TypeError): failed = ["verification.json cannot be read"]
    problems += [f"verification failed: {check}" for check in failed]
    files = sorted({path for pattern in PUBLISHED for path in folder.glob(pattern) if path.is_file()})
    recorded = manifest.get("outputs", {})
    problems += [f"{name} is not what its manifest records" for name in (path.relative_to(folder).as_posix() for path in files) if name in recorded and sha256_file(folder / name) != recorded[name]["sha256"]]
    if problems: raise CardError(f"{folder} is not fit to be published: " + "; ".join(problems) + ". Run its cell again (tulu-study run).")
    return files


def push(
    checkpoint_dir: str | Path,   # a finished and verified fine-tuning
    repo_id: str,                 # owner/name on the hub
    private: bool = True,         # nobody else sees it
    dry_run: bool = False,        # only say what would be uploaded
) -> dict:                        # {"repo_id", "private", "files": {name: bytes}, "bytes", "url"}
    "Publish a checkpoint. Nothing else in this library uploads anything. CardError for what is unfinished or unverified, and for public weights that their base model's licence forbids."
    folder = Path(checkpoint_dir)
    files, base = publishable(folder), models().get(_trained(folder)["settings"]["base"])
    if not private and base and ON_REQUEST in base.licence:
        raise CardError(f"the weights of {base.name} may not be passed on ({base.licence}): publish the difference to it (tulu_study.training.weight_diff.make_diff), or keep the repository private")
    listed = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    said = {"repo_id": repo_id, "private": private, "files": listed, "bytes": sum(listed.values()), "url": None}
    if dry_run: return said
    from huggingface_hub import HfApi
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private: raise CardError(f"{repo_id} exists already and is public: take another name, or private=False if that is what you want")
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(listed), commit_message=f"Checkpoint {folder.name}")
    return said | {"url": str(commit.commit_url)}
