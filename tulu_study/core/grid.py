"""The set of cells that a study file asks for: names, notebooks, parameters, folders, what needs what, and the state of each.

Snakemake runs the grid. What it may ask for, and whether a cell is finished, is decided here, from manifests alone. A cell's key covers its code,
its parameters and the keys of all cells before it, so an edit anywhere changes exactly the keys after it. For each finished cell Snakemake sees an empty file
`done.<key>`: a changed key is a file that does not exist yet, and nothing has to be compared by time."""
import json, os
from dataclasses import dataclass, field
from pathlib import Path

from tulu_study.core import cells as door
from tulu_study.core.files import hash_json
from tulu_study.core.process import PATIENCE
from tulu_study.core.params import Benchmark, Dataset, Model, Study, benchmarks, datasets, load_study, mixes, models, params_dir, tokenizers
from tulu_study.core.sources import acquisition, find, fingerprint
from tulu_study.core.settings import Settings, settings

STAGES = ("world", "convert", "mix", "pretrain", "base_model", "finetune", "evaluate", "table", "figure")
NAMES = {"world": "sources", "convert": "data", "mix": "data", "pretrain": "base", "base_model": "base", "finetune": "checkpoints", "evaluate": "scores", "table": "tables", "figure": "figures"}


WHICH = {"name", "url", "hub", "path", "revision", "sha256", "optional"}   # of a raw file's record: what decides its bytes; other places and notes do not
ABOUT = {"files", "licence", "homepage", "authors", "gated", "stated", "languages"}   # of a source's record: for people alone
LARGE = 64 << 20   # bytes; `plan` must not read 130 GB of weights to say that nothing changed

ROOM = 60e9        # bytes of a GPU of 80 GB for weights, while evaluating


def _ends(path: Path) -> str:
    "Identify a large file by its size and its first and last MiB."
    with open(path, "rb") as file:
        first = file.read(1 << 20)
        file.seek(-(1 << 20), os.SEEK_END)
        return f"{path.stat().st_size} bytes, ends {hash_json([first.hex(), file.read().hex()])[:16]}"


def evaluation_gpus(
    record: Model,   # with `shape`; without one a single GPU
    dtype: str,      # of the weights while evaluating
) -> int:            # a power of two that divides the attention heads, as tensor parallelism wants
    "How many GPUs of 80 GB hold a model's weights with a quarter of each left to its cache, counted from the matrices of its shape."
    shape = record.shape
    if not {"layers", "width", "heads", "inner"} <= set(shape): return 1
    width, heads = shape["width"], shape["heads"]
    block = 2 * width * width * (1 + shape.get("kv_heads", heads) / heads) + (3 if record.family == "llama" else 2) * width * shape["inner"]
    weights = (4 if dtype == "float32" else 2) * (shape["layers"] * block + (1 if shape.get("tied", record.family == "opt") else 2) * shape.get("vocabulary", 0) * width)
    fitting = [n for n in (2**i for i in range(10)) if heads % n == 0]
    return next((n for n in fitting if weights <= n * ROOM), fitting[-1])


@dataclass
class Cell:
    "One papermill execution of one run notebook."
    name: str                  # e.g. "finetune-13B-dolly"
    stage: str                 # one of STAGES
    notebook: str              # name in nbs/runs
    params: dict               # its parameters, out_dir aside
    out_dir: Path
    needs: list[str]           # names of the cells whose files it reads
    identity: dict             # registry records and raw files that it reads
    gpus: int = 0
    nodes: int = 1             # machines that the GPUs are on
    inputs: dict = field(default_factory=dict)   # identity and the keys of `needs`
    key: str = ""

    @property
    def stamp(self) -> Path:
        "The file whose existence tells Snakemake that this very computation is finished."
        return self.out_dir/f"done.{self.key}"

    @property
    def executed(self) -> Path:
        "The executed notebook."
        return self.out_dir/f"{self.notebook}.ipynb"


def warning_seconds() -> int:
    "How long before the time of a Slurm job is over its cell stops: TULU_SIGNAL_SECONDS, at most what a trainer gets for it. ValueError for anything but a number."
    said = os.environ.get("TULU_SIGNAL_SECONDS") or "300"
    if not said.isdigit(): raise ValueError(f"TULU_SIGNAL_SECONDS is {said!r}; expected how many seconds before the end of a Slurm job's time its cell stops, or 0 for never")
    return min(int(said), PATIENCE)


def slurm_resources(
    cell: Cell,   # with gpus and nodes
    threads: int = 1,   # of one rank
    gpus: bool = True,  # False = none, where CPUs suffice
) -> dict:        # names of snakemake-executor-plugin-slurm
    """What a cell asks Slurm for: one task per node, which starts the ranks of that node, with the GPUs for them.

    Whatever `mpi` says, its presence makes the plugin run the cell in the job's own shell on the first node; without it, `srun` would start it, and an srun of its own inside that has to be told everything anew."""
    each = -(-cell.gpus // cell.nodes)
    return {"nodes": cell.nodes, "tasks": cell.nodes, "cpus_per_task": max(each, 1) * threads, "mpi": "srun" if cell.nodes > 1 else "", "slurm_extra": f"--gpus-per-node={each}" if each and gpus else ""}


@dataclass
class State:
    "Where a cell stands."
    word: str      # done, missing, failed, interrupted, changed
    reason: str    # for people


class Grid(dict):
    "The cells of a study by name, in an order in which they can run."

    def __init__(self, study: Study, site: Settings, file: str = ""):
        super().__init__()
        self.file = file                                         # the study file, where it is not one of params/studies
        self.study, self.site, self.root = study, site, site.results/study.study
        self.sources = self.root/"sources" if study.world is not None else site.sources
        self._world()
        self._data()
        for size, model in study.models.items(): self._models(size, model)
        self._reports()
        for cell in self.values():
            cell.inputs = cell.identity | {"needs": {n: self[n].key for n in cell.needs}}
            full = door.check_parameters(cell.notebook, {**cell.params, "out_dir": str(cell.out_dir)})
            cell.key = door.cell_key(cell.notebook, full, cell.inputs)

    def _add(self, stage: str, label: str, notebook: str, params: dict, needs=(), identity=None, gpus=0, nodes=1) -> str:
        name = stage if stage == "world" else f"{stage}-{label}"
        folder = self.root/NAMES[stage] if stage == "world" else self.root/NAMES[stage]/label
        self[name] = Cell(name, stage, notebook, params, folder, list(dict.fromkeys(needs)), identity or {}, gpus, nodes)
        return name

    # What a cell reads from outside the study
    def _origin(self, record: Dataset | Benchmark) -> dict:
        "Identify a record and, where they lie in a sources root of the site's, the bytes of its raw files."
        found = {"record": record.model_dump(mode="json", exclude=ABOUT) | {"files": [f.model_dump(mode="json", include=WHICH) for f in record.files]}}
        if self.study.world is None and self.sources:
            files = {f.name: find(self.sources, record.folder, f.name) for f in record.files if not f.name.endswith("/")}
            files |= {str(p.relative_to(self.sources)): p for p in sorted((self.sources/record.folder).rglob("*")) if p.is_file()}   # a file may name others that lie beside it
            found["files"] = {name: fingerprint(path) for name, path in files.items() if path}
        return found

    def _folder(self, place: str) -> dict | None:
        "The bytes of a folder below a sources root of the site's, None where there is none: a tokenizer, a base model."
        if self.study.world is not None or not self.sources or not (self.sources/place).is_dir(): return None
        return {p.name: fingerprint(p) if p.stat().st_size <= LARGE else _ends(p) for p in sorted((self.sources/place).iterdir()) if p.is_file() and not p.name.startswith(".")}

    @property
    def _before(self) -> list[str]:
        "The cell that writes the sources, in a study whose world is invented."
        return ["world"] if self.study.world is not None else []

    def _source_root(self) -> str:
        return str(self.sources or "")

    # The stages
    def _world(self):
        if self.study.world is not None: self._add("world", "", "world", dict(self.study.world))

    def _data(self):
        study, wanted = self.study, [d for m in self.study.models.values() for d in m.data if d != "vanilla"]
        parts = [p for d in wanted for p in (mixes()[d].parts if d in mixes() else [d])] + study.data.convert
        tokenizer = self._tokenizer()
        for key in dict.fromkeys(parts):
            self._add("convert", key, "convert", dict(dataset=key, protocol=study.protocol, seed=study.seed, max_rejected=study.data.max_rejected, source_root=self._source_root(),
                      tokenizer_dir=tokenizer), self._before, self._origin(datasets()[key]) | {"tokenizer": study.tokenizer if tokenizer else None, "tokenizer_files": self._folder(study.tokenizer) or self._tokenizer_files()})
        for key in dict.fromkeys(d for d in wanted if d in mixes()):
            self._add("mix", key, "mix", dict(mix=key, data_dir=str(self.root/"data")), [f"convert-{p}" for p in mixes()[key].parts], {"record": mixes()[key].model_dump(mode="json")})

    def _tokenizer(self) -> str:
        "The folder of the tokenizer below the sources, or of its record, which is fetched; empty for neither."
        place = self.study.tokenizer
        if self.study.world is not None or (self.sources and (self.sources/place/"tokenizer.json").is_file()): return str(self.sources/place)
        return place if any(t.folder == place for t in tokenizers().values()) else str(self.sources/place) if self.sources and (self.sources/place).is_dir() else ""

    def _tokenizer_files(self) -> dict | None:
        "The checksums of a tokenizer that is fetched."
        record = next((t for t in tokenizers().values() if t.folder == self._tokenizer()), None)
        return record and {f.name: f.sha256 for f in record.files}

    def without_tokenizer(self) -> str:
        "What a study lacks whose tokenizer is not here, and where it can be had; empty where it is here."
        place = self.study.tokenizer
        if self.study.world is not None or (self.sources and (self.sources/place/"tokenizer.json").is_file()) or (self.site.cache/place/"tokenizer.json").is_file(): return ""
        record = next((t for t in tokenizers().values() if t.folder == place), None)
        rows = acquisition(record, self.sources) if record else []
        if rows and all(row["state"].startswith("in ") for row in rows): return ""
        where = f"it will be downloaded from {rows[0]['place']} when the first dataset is converted" if rows else "no download is known"
        return f"The tokenizer {place} is not here: {where}. Where it cannot be had, ShareGPT is not converted and Table 1 shows no lengths; put it at <sources root>/{place} (tulu-study sources)."

    def _data_cell(self, key: str) -> str:
        return f"{'mix' if key in mixes() else 'convert'}-{key}"

    def _base(self, key: str) -> str:
        "The cell that makes or fetches a base model."
        record = models()[key]
        name = f"{'pretrain' if record.kind == 'nano' else 'base_model'}-{key}"
        if name in self: return name
        params = dict(base=key, source_root=self._source_root()) | (dict(seed=self.study.seed) if record.kind == "nano" else {})
        return self._add(*name.split("-", 1), name.split("-", 1)[0], params, self._before if record.kind == "nano" else [],
                         {"record": record.model_dump(mode="json")} | ({} if record.kind == "nano" else {"files": self._folder(f"models/{key}")}))

    def _models(self, size: str, model):
        study, base = self.study, self._base(model.base)
        for data in model.data:
            name, checkpoint, tuned = f"{size}-{data}", self[base].out_dir, base
            about = dict(model=name, base=model.base, data=data, size=size)
            if data != "vanilla":
                t = study.training_for(size)
                checkpoint = self.root/"checkpoints"/name
                tuned = self._add("finetune", name, "finetune", dict(**about, limit=study.data.limit, seed=study.seed, protocol=study.protocol, **t.model_dump(), base_dir=str(self[base].out_dir),
                                  data_file=str(self.root/"data"/data/f"{data}_data.jsonl")), [base, self._data_cell(data)], {"record": models()[model.base].model_dump(mode="json")}, t.ranks, t.nodes)
            wanted = {k: b.model_dump(exclude_none=True) for k, b in study.benchmarks.items()}
            self._add("evaluate", name, "evaluate", dict(**about, benchmarks=wanted, chat=data != "vanilla", protocol=study.protocol, seed=study.seed, dtype=study.evaluation.dtype,
                      chunk_size=study.evaluation.chunk_size, source_root=self._source_root(), checkpoint_dir=str(checkpoint), predictions_dir=str(self.root/"predictions"/name)),
                      [tuned, *self._before], {k: self._origin(benchmarks()[k]) for k in study.benchmarks},
                      study.evaluation.gpus or evaluation_gpus(models()[model.base], study.evaluation.dtype))

    def _reports(self):
        study = self.study
        used = list(dict.fromkeys(d for m in study.models.values() for d in m.data if d != "vanilla"))
        said = {"title": study.title, "world": study.world, "limit": study.data.limit, "published": {p.name: fingerprint(p) for p in sorted((params_dir()/"published").glob("*.csv"))}}
        for table in study.tables:
            if table == "table1":
                shown = list(dict.fromkeys(used + study.data.convert))
                self._add("table", table, table, dict(study=study.study, datasets=shown, data_dir=str(self.root/"data")), [self._data_cell(d) for d in shown], said | {"notes": {m.base: models()[m.base].note for m in study.models.values()}})
            if table == "overlap":   # reads the benchmarks' files: part of this cell's identity and of no conversion's, so that a file which comes later trains nothing anew
                shown = [name.removeprefix("convert-") for name, cell in self.items() if cell.stage == "convert"]
                self._add("table", table, table, dict(study=study.study, datasets=shown, ngram=study.data.ngram, data_dir=str(self.root/"data"), source_root=self._source_root()),
                          [*self._before, *(f"convert-{d}" for d in shown)], {k: self._origin(b) for k, b in benchmarks().items()})
        for kind, notebook in [("table", t) for t in study.tables if t not in ("table1", "overlap")] + [("figure", f) for f in study.figures]:
            for size, model in study.models.items():
                label = notebook if len(study.models) == 1 else f"{notebook}-{size}"
                params = dict(study=study.study, size=size, rows=model.data, benchmarks={k: b.model_dump(exclude_none=True) for k, b in study.benchmarks.items()}, scores_dir=str(self.root/"scores"))
                if kind == "figure": params["predictions_root"] = str(self.root/"predictions")
                record = models()[model.base].model_dump(mode="json", include={"name", "note", "published", "key"})
                self._add(kind, label, notebook, params, [f"evaluate-{size}-{d}" for d in model.data], said | {"base": record})

    # State
    def state(self, name: str) -> State:
        "Where a cell stands, read from its folder; nothing is remembered elsewhere."
        cell = self[name]
        manifest = door.read_manifest(cell.out_dir)
        if manifest is None: return self._unfinished(cell)
        if lost := door.missing_outputs(cell.out_dir, manifest): return State("missing", f"{len(lost)} of its files gone or cut off ({lost[0]})")
        return State("done", f"{manifest['seconds']:.0f} s") if manifest["key"] == cell.key else State("changed", self._why(cell, manifest))

    def _unfinished(self, cell: Cell) -> State:
        failed, attempt = cell.out_dir/"failed.json", cell.out_dir/"attempt.json"
        try:
            if failed.exists():
                said = json.loads(failed.read_text(encoding="utf-8"))
                return State("failed", f"{said['error']} [{os.path.relpath(said['notebook'])}]")
            if attempt.exists(): return State("interrupted", "continues" if json.loads(attempt.read_text(encoding="utf-8"))["key"] == cell.key else
                                                   "code or parameters changed since: starts anew" + (", unless its saved state still fits" if (cell.out_dir/"state").is_dir() else ""))
        except (OSError, json.JSONDecodeError, KeyError): pass
        return State("missing", "never run")

    def _why(self, cell: Cell, manifest: dict) -> str:
        "Name what differs between a manifest and what the study asks for now."
        if without := manifest["inputs"].get("not_run"): return "drawn without " + ", ".join(without)
        full = door.check_parameters(cell.notebook, {**cell.params, "out_dir": str(cell.out_dir)})
        now, then = door.science(full), door.science(manifest["parameters"])
        if changed := [k for k in {**then, **now} if now.get(k, door) != then.get(k, door)]:
            return "parameter changed: " + ", ".join(f"{k} {then.get(k, 'unset')!r} → {now.get(k, 'unset')!r}" for k in changed[:3])
        code = door.code_parts(cell.notebook, full)
        if changed := [k for k in {**code, **manifest["code"]} if code.get(k) != manifest["code"].get(k)]:
            return "code changed: " + ", ".join("its notebook" if k == "notebook" else k for k in changed[:3])
        needs = manifest["inputs"].get("needs", {})
        if changed := [n for n in cell.needs if needs.get(n) != self[n].key]: return "input changed: " + ", ".join(changed[:3])
        return "raw files or registry record changed"

    def discard_stale(self, name: str) -> None:
        "Clear what an unfinished cell holds from other code or parameters, so that nobody reads it as this study's."
        cell = self[name]
        try: same = json.loads((cell.out_dir/"attempt.json").read_text(encoding="utf-8"))["key"] == cell.key
        except (OSError, json.JSONDecodeError, KeyError): same = False
        if not same and (cell.out_dir/"attempt.json").exists():
            door.clear([cell.out_dir, *(Path(cell.params[k]) for k in door.OWNED[1:] if cell.params.get(k) and cell.stage == "evaluate")])

    def sync(self) -> list[str]:
        "Make the stamps that Snakemake sees agree with the manifests, and return the names of unfinished cells."
        todo = []
        for name, cell in self.items():
            for old in cell.out_dir.glob("done.*"):
                if old != cell.stamp: old.unlink()
            if self.state(name).word == "done": cell.stamp.touch()
            else: cell.stamp.unlink(missing_ok=True); todo.append(name)
        return todo


def load(
    study: str,                    # a study of params/studies, or a path to a study file
    site: Settings | None = None,  # None = the site's settings
) -> Grid:                         # its cells
    "Expand a study file into its grid. Raises ParamsError, CellError or SourceError with every problem."
    return Grid(load_study(study), site or settings(), str(Path(study).resolve()) if study.endswith((".yaml", ".yml")) else "")


def run(
    grid: Grid,      # an expanded study
    name: str,       # one of its cells
    force: bool = False,
) -> dict:           # the manifest
    "Run one cell of a grid through the door, and stamp it. Raises CellError when a cell that it needs is not done: a key may not name an input that is not there."
    cell = grid[name]
    if waiting := [f"{n} ({s.word}: {s.reason})" for n in cell.needs if (s := grid.state(n)).word != "done"]:
        raise door.CellError(f"{name} needs cells that are not done: {'; '.join(waiting)}. `tulu-study run` runs them in order.")
    if grid.file: os.environ["TULU_STUDY_FILE"] = grid.file      # for the captions of a study that is not in params/studies
    manifest = door.run_cell(cell.notebook, cell.params, cell.out_dir, cell.inputs, force)
    cell.stamp.touch()
    return manifest
