"""The shared frame of the parity tests: what a case is, who handles it, and what is left for later.

A handler is a function of one `Case`. It recomputes the case's output with the product and compares:

    from handlers import handles, same

    @handles("convert_*_data")
    def conversion(case):
        same(..., case.output)

`handles` takes the first word of a vector's function, or a shell pattern over such words; the most specific one wins.
The three files about the mirror have the words `mirror_conversations`, `mirror_encodings` and `mirror_prompts`.
A handler works from `case.input`, `case.options` and `case.output` alone, never from an id: other vectors of the
same functions may stand in the same files. It raises `CannotRebuild` when the words of an input say too little.
"""
import ast
import fnmatch
import functools
import hashlib
import importlib
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
USUAL_GOLDEN, USUAL_MIRROR = ROOT.parent / "shared" / "golden", ROOT.parent / "shared" / "mirror"
GOLDEN = Path(os.environ.get("TULU_GOLDEN") or USUAL_GOLDEN)
MIRROR = Path(os.environ.get("TULU_MIRROR") or USUAL_MIRROR)

VECTORS = "reference_vectors.json"
MIRROR_FILES = ("mirror_conversations.json", "mirror_encodings.json", "mirror_prompts.json")
HANDLER_MODULES = ("data", "training", "evaluation", "codex", "safety")

# What a later issue covers: a dataset key, a benchmark key, or a (pattern of a) function's first word, and the stage.
NOT_YET = {
    # other stages
    "eval.alpaca_farm.*": "judging", "human_eval/*": "human",
}


class CannotRebuild(Exception):
    "The words of a vector's input do not determine it; the message says what is missing."


@dataclass
class Case:
    "One input → output pair of the golden files."
    file: str        # name of the golden file
    group: str       # group in that file, "" for the files about the mirror
    id: str          # the vector's id, or the key in a file about the mirror ("dolly/llama/512")
    function: str    # as written in the file
    input: object = None
    output: object = None
    note: str = ""
    commits: list = field(default_factory=list)

    @property
    def word(self):  # first word of the function: what a handler is registered for
        return first_word(self.function)

    @property
    def options(self):  # keyword arguments written anywhere in the function string, as Python values where they are
        return parse_options(self.function)

    @property
    def keys(self):  # what NOT_YET may list this case under
        converter = re.fullmatch(r"convert_(\w+)_data", self.word)
        first = [self.id.split("/")[0]] if self.file in MIRROR_FILES else []
        return [self.word] + ([converter[1]] if converter else []) + first

    @property
    def name(self):
        return "/".join(filter(None, [self.group or self.file.removesuffix(".json"), self.id]))


def first_word(function):
    "`convert_cot_data(defaults)` → `convert_cot_data`"
    return re.split(r"[\s(,]", function.strip(), maxsplit=1)[0]


def parse_options(function):
    "`main (HF path, n=2, temperature 0.1) max_num_examples=3 of 5` → {'n': 2, 'max_num_examples': 3}"
    found = re.findall(r"(\w+)\s*=\s*(\"[^\"]*\"|'[^']*'|\[[^\]]*\]|[^\s,;()]+)", function)
    return {name: _literal(text) for name, text in found}


def seed_of(case):
    "The seed that a vector's input or function names; 42 as everywhere in the reference."
    given = case.input if isinstance(case.input, dict) else {}
    said = re.search(r"seed\W{0,2}(\d+)", case.function)
    return given.get("seed", int(said[1]) if said else 42)


PAPER = "b55563782"   # the state of the reference that the protocol `paper` follows; vectors of any state may say so themselves


def older_behaviour(case):
    "Whether only other states of the reference gave this output, of a function that the state of the paper has too: no protocol here follows those."
    elsewhere = ("eval.mgsm.*", "scripts/weight_diff.py", "human_eval/*", "convert_*_data")   # not in that state, or with a protocol of their own
    return bool(case.commits) and PAPER not in case.commits and not any(fnmatch.fnmatchcase(case.word, pattern) for pattern in elsewhere)


def _literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def golden(file, folder=None):
    "One golden file; an absent one holds nothing (the summary names it)."
    path = (folder or GOLDEN) / file
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def siblings(pick, missing):
    """Rows of other vectors, for a case that speaks of "the same rows": `pick(function, input)` takes them from an input, None where it will not do.
    Vectors of the case's own file come first, then the usual ones. Raises CannotRebuild, saying what is `missing`, where there are none."""
    for folder in dict.fromkeys([GOLDEN, USUAL_GOLDEN]):
        vectors = [v for group in golden(VECTORS, folder).values() if isinstance(group, list) for v in group]
        picked = [pick(v["function"], v["input"]) for v in vectors if isinstance(v.get("input"), dict)]
        if found := {json.dumps(rows, sort_keys=True): rows for rows in picked if rows is not None}: return list(found.values())
    raise CannotRebuild(f"{missing} not given, and no other vector has them")


def with_any(choices, check):
    "Call `check` with one choice after the other until one of them holds; what the last one raises stands."
    *others, last = choices
    for choice in others:
        try: return check(choice)
        except AssertionError: continue
    return check(last)


def in_mirror(*parts):
    "A path of the mirror. Raises CannotRebuild where the mirror has none: what cannot be read cannot be compared."
    path = MIRROR.joinpath(*parts)
    if not path.exists(): raise CannotRebuild(f"{path} is not on this machine")
    return path


def published(*parts):
    "A file that vectors rest on which are not about the mirror (exemplars, tokenizers): the mirror's, or the usual mirror's where that lacks it."
    return next((path for mirror in (MIRROR, USUAL_MIRROR) if (path := mirror.joinpath(*parts)).exists()), None) or in_mirror(*parts)


def cases():
    "Every case of the four golden files, in file order."
    for group, members in golden(VECTORS).items():
        for vector in members if isinstance(members, list) else []:
            known = {key: vector.get(key) for key in ("id", "function", "input", "output")}
            yield Case(VECTORS, group, **known, note=vector.get("note", ""), commits=vector.get("commits", []))
    for file in MIRROR_FILES:
        for key, expected in golden(file).items():
            if not key.startswith("_"):
                yield Case(file, "", key, f"{file.removesuffix('.json')} {key}", key, expected)


HANDLERS = {}
WORK = tempfile.TemporaryDirectory(prefix="parity-")   # removed when the process ends


def handles(pattern):
    "Register a handler for the functions whose first word is, or matches, `pattern`."
    def register(handler):
        if pattern in HANDLERS:
            raise ValueError(f"two handlers for {pattern!r}: {HANDLERS[pattern].__name__} and {handler.__name__}")
        HANDLERS[pattern] = handler
        return handler
    return register


def load_handlers():
    "Import the handler modules that exist; each registers its handlers."
    here = Path(__file__).parent
    for name in HANDLER_MODULES:
        if (here / f"{name}.py").exists():
            importlib.import_module(f"handlers.{name}")
    return HANDLERS


def handler_for(word):
    "The most specific handler for a function's first word, or None."
    fitting = [pattern for pattern in load_handlers() if pattern == word or fnmatch.fnmatchcase(word, pattern)]
    return HANDLERS[max(fitting, key=lambda p: (p == word, len(p)))] if fitting else None


def left_for_later(case):
    "The stage whose later issue covers this case, or None."
    fitting = (NOT_YET[pattern] for pattern in NOT_YET for key in case.keys if fnmatch.fnmatchcase(key, pattern))
    return next(fitting, None)


def same(found, expected, where=""):
    "Equality with a message that shows the first difference instead of two walls of text."
    assert found == expected, f"{where or 'value'}: {_difference(found, expected)}"


def _difference(found, expected, path=""):
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *(k for k in found if k not in expected)]:
            if key not in found or key not in expected or found[key] != expected[key]:
                if key in found and key in expected:
                    return _difference(found[key], expected[key], f"{path}.{key}")
                return f"at {path or 'top'}: key {key!r} is {'missing' if key not in found else 'not expected'}"
    if isinstance(found, (list, tuple)) and isinstance(expected, (list, tuple)):
        for i, (mine, theirs) in enumerate(zip(found, expected)):
            if mine != theirs:
                return _difference(mine, theirs, f"{path}[{i}]")
        return f"at {path or 'top'}: {len(found)} items, expected {len(expected)}"
    return f"at {path or 'top'}: found {found!r}, expected {expected!r}"[:1500]


def sha256_rows(rows, sort_keys=True):
    "The hash of the mirror files: rows as compact JSON, non-ASCII kept, joined by newlines."
    text = "\n".join(json.dumps(row, sort_keys=sort_keys, ensure_ascii=False, separators=(",", ":")) for row in rows)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@functools.lru_cache(maxsize=None)
def converted(words):
    """Path of the JSONL that the product makes of one raw folder of the mirror (made once a session). `words` are a dataset's key and,
    behind slashes, a protocol and options by name: `oasst1`, `oasst1/june2023`, `cot/num_zero_shot_examples=10`, `dolly/seed=7`, `sharegpt/4096`."""
    from tulu_study.core.params import datasets
    from tulu_study.data import convert, converters
    key, *rest = words.split("/")
    if key not in datasets(): raise CannotRebuild(f"{key!r} is no dataset of the study")
    folder = in_mirror(datasets()[key].folder)
    if absent := [file.name for file in datasets()[key].files if not file.optional and not (folder / file.name).exists() and not (folder / file.name.removesuffix(".gz")).exists()]:
        raise CannotRebuild(f"{folder} lacks {', '.join(absent)}")
    options = {name: value for part in rest for name, value in parse_options(part).items()}
    for part in (part for part in rest if "=" not in part):
        if part in ("v1", "13404e37a", *converters()[key].protocols): options["protocol"] = {"v1": "june2023", "13404e37a": "june2023"}.get(part, part)
        elif key == "sharegpt" and part.isdigit(): options["max_length"] = int(part)
        elif part not in ("v2", PAPER): raise CannotRebuild(f"{words}: {part!r} is neither a protocol of {key} ({', '.join(converters()[key].protocols)}) nor an option as name=value")
    if options.get("protocol") not in (None, *converters()[key].protocols): options.pop("protocol")   # a state of the reference in which this converter was the same
    out = Path(WORK.name) / words.replace("/", "-")
    convert(key, MIRROR, out, tokenizer=published("tokenizers", "llama") if key == "sharegpt" else None, **options)
    return out / key / f"{key}_data.jsonl"
