"""The command `tulu-study`: plan a study, run it, draw its figures into the checkout, and ask what this machine can do.

The comments after each argument are its `--help`."""
import collections, concurrent.futures, contextlib, importlib.util, inspect, itertools, json, os, re, shlex, shutil, signal, subprocess, sys, tempfile, threading, time
from pathlib import Path

from fastcore.script import anno_parser, call_parse

from tulu_study.core.cells import CellError, CellInterrupted, read_manifest, run_cell
from tulu_study.core.grid import Grid, load
from tulu_study.core import grid as grids
from tulu_study.core.params import ParamsError, benchmarks, datasets, models, tokenizers
from tulu_study.core.process import Held, die_with_parent, hold, start_child, stop_in_time
from tulu_study.core.settings import Settings, packaged_root, project_root, settings
from tulu_study.core.sources import SourceError, acquisition

MARKS = {"done": "✓", "missing": "·", "failed": "✗", "interrupted": "~", "changed": "≠"}


def _table(rows: list[list[str]], head: list[str]) -> str:
    "Align columns; the last one is left as long as it is."
    widths = [max(len(str(r[i])) for r in [head, *rows]) for i in range(len(head) - 1)]
    line = lambda r: "  ".join([*(str(c).ljust(w) for c, w in zip(r, widths)), str(r[-1])]).rstrip()
    return "\n".join([line(head), *map(line, rows)])


def _command(study: str) -> str:
    "What a user types to run a study: under make its own words, because there `tulu-study` may not be on the PATH."
    if not os.environ.get("TULU_TIED"): return f"tulu-study run {study}"
    words = {"STUDY": "" if study == "nano" else study} | {name: os.environ.get(f"TULU_{name}", "") for name in ("SOURCES", "RESULTS")}
    return " ".join(["make study", *(f"{name}={shlex.quote(said)}" for name, said in words.items() if said)])


@call_parse(pos=["study"])
def plan(
    study: str = "nano",   # a study of params/studies, or a path to a study file
    unfinished: bool = False,   # leave out cells that are done
    cost: bool = False,    # predict what every fine-tuning takes (always for studies of published base models)
    gpu_memory: float = 74.5,   # GiB of one GPU (an 80 GB card shows 74.5)
    tflops: float = 312.0,      # its advertised speed in bf16
    utilisation: float = 0.4,   # share of it that training reaches
    price: float = 2.0,         # USD for one GPU and hour
):
    "List every cell of a study with its state and the reason, and what its fine-tunings will cost."
    grid = load(study)
    states = {name: grid.state(name) for name in grid}
    rows = [[MARKS[s.word], name, s.word, s.reason] for name, s in states.items() if not (unfinished and s.word == "done")]
    print(f"{grid.study.study}: {grid.study.title}\nresults in {os.path.relpath(grid.root)}\n")
    print(_table(rows, ["", "cell", "state", "reason"]))
    counts = collections.Counter(s.word for s in states.values())
    print(f"\n{len(grid)} cells: " + ", ".join(f"{n} {word}" for word, n in counts.items()) + "." + ("" if counts["done"] == len(grid) else f" `{_command(study)}` does the rest."))
    if lacking := grid.without_tokenizer(): print(f"\n{lacking}")
    if cost or any(models()[m.base].kind == "hub" for m in grid.study.models.values()): _costs(grid, gpu_memory, tflops, utilisation, price)


def _costs(grid: Grid, gpu_memory: float, tflops: float, utilisation: float, price: float) -> None:
    "Print what the fine-tunings of a study will cost."
    from tulu_study.planning import cost_lines, cost_rows
    from tulu_study.training.scale import Rates
    rates = Rates(gpu_memory, tflops, utilisation, price)
    head, rows, below = cost_lines(cost_rows(grid, rates), rates)
    print("\n" + _table(rows, head) + "\n\n" + "\n".join(below))


@contextlib.contextmanager
def _alone(grid: Grid):
    "Let one process at a time run a study."
    grid.root.mkdir(parents=True, exist_ok=True)
    try:
        with hold(grid.root/".lock"): yield
    except Held as pid: raise CellError(f"Process {pid} is running this study already; `tulu-study plan {grid.study.study}` shows how far it is.") from None


def _snakemake(grid: Grid, study: str, jobs: int) -> tuple[int, list[int]]:   # its exit status, and the signals by which it was asked to stop
    "Run the grid; Snakemake's own lock is not needed, since ours ends with the process that holds it."
    site, gpus = grid.site, _gpus()
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(project_root()/"Snakefile"), "--directory", str(grid.root), "--nolock", "--rerun-incomplete", "--keep-going", "--rerun-triggers", "mtime",
               "--config", f"study={study}", f"gpus={len(gpus)}"]
    env = {**os.environ, "TULU_ROOT": str(project_root()), "TULU_RESULTS": str(site.results), "TULU_CACHE": str(site.cache)} | ({"TULU_SOURCES": str(site.sources)} if site.sources else {})
    if site.executor == "slurm": return _through_slurm(grid, [*command, *_slurm_options(site), "--jobs", str(jobs)], env)
    command += ["--quiet", "all", "--cores", str(jobs)] + (["--resources", f"gpus={len(gpus)}"] if gpus else [])
    return _wait(start_child(command, start_new_session=True, env=env), "what is running is saved; press Ctrl-C again to end at once")


def _through_slurm(grid: Grid, command: list[str], env: dict) -> tuple[int, list[int]]:   # as _wait
    "Let Snakemake submit the cells. What it says goes into a file, of which errors are shown: an unknown partition is known to nobody else."
    log = grid.root/"snakemake.log"
    if conf := os.environ.get("SLURM_CONF"): env["TULU_SLURM_CONF"] = conf   # Snakemake's job step takes Slurm's own away
    with open(log, "w") as out:
        child = start_child([*command, "--quiet", "progress", "host", "reason"], start_new_session=True, env=env, stdout=out, stderr=subprocess.STDOUT)
        code, asked = _wait(child, "no more jobs are submitted, and those in the queue go on; press Ctrl-C again to cancel them", 60, _news(grid))
    said = dict.fromkeys(line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip())
    if code and not asked:
        telling = [line for line in said if re.search(r"sbatch failed|sbatch: error|SLURM-job|Exception in run_job|submission failed|[Ee]rror: \S", line)] or list(said)
        print(f"Snakemake says (all of it is in {os.path.relpath(log)}):\n" + "\n".join(f"  {line[:300]}" for line in telling[-8:]), file=sys.stderr)
    return code, asked


SLURM_WORDS = ("slurm_partition", "slurm_account", "runtime", "mem", "mem_mb", "mem_mb_per_cpu", "qos", "constraint", "clusters", "gpus")   # of the plugin's, those that the study does not decide


def _slurm_lacks() -> list[str]:
    "What is missing before Slurm can run cells."
    needed = {"sbatch (run this on the cluster's login node)": shutil.which("sbatch"), "snakemake-executor-plugin-slurm (pip install 'tulu-study[slurm]')": importlib.util.find_spec("snakemake_executor_plugin_slurm")}
    return [what for what, there in needed.items() if not there]


def _slurm_options(site: Settings) -> list[str]:   # words for Snakemake
    "Let Slurm run the cells. Raises CellError where something for it is missing."
    if lacking := _slurm_lacks(): raise CellError(f"[executor] profile is slurm, and not found: {' and '.join(lacking)}. Or take profile = local.")
    for name, value in site.resources.items():
        if name not in SLURM_WORDS: raise CellError(f"[executor] resources (TULU_RESOURCES) holds {name}={value}; the words that Slurm's executor knows are {', '.join(SLURM_WORDS)}.")
        if name.startswith("mem_") and not value.isdigit(): raise CellError(f"[executor] resources (TULU_RESOURCES) holds {name}={value}; expected megabytes as a number ({name}=64000), or mem=64GB.")
    asked = ({} if any(name.startswith("mem") for name in site.resources) else {"mem_mb": "0"}) | site.resources   # 0: what the cluster gives by itself, where Snakemake would ask for 1 GB
    quoted = [f"{name}={value if re.fullmatch('0|[1-9][0-9]*', value) else repr(value)}" for name, value in asked.items()]
    # squeue answers without accounting too, and calls a cancelled job CANCELLED, where sacct adds by whom and the plugin then waits for ever (and asks sacct all the same where MinJobAge is under two minutes)
    return ["--executor", "slurm", "--latency-wait", "60", "--slurm-status-command", "squeue", "--default-resources", *quoted]


def _news(grid: Grid):   # a function to be called now and then
    "Cells that Slurm runs print into its logs: tell here from their files which have finished and which failed."
    changed = lambda path: path.stat().st_mtime_ns if path.exists() else 0
    done, wide = {name for name, cell in grid.items() if cell.stamp.exists()}, len(str(len(grid)))
    failures = {name: changed(cell.out_dir/"failed.json") for name, cell in grid.items()}
    def look():
        for name, cell in grid.items():
            if name in done: continue
            with contextlib.suppress(OSError, ValueError, KeyError):   # a file may come and go while one looks
                if cell.stamp.exists() and (manifest := read_manifest(cell.out_dir)):
                    done.add(name)
                    print(f"✓ [{len(done):>{wide}}/{len(grid)}] {name}: {manifest['seconds']:.1f} s", flush=True)
                elif (when := changed(cell.out_dir/"failed.json")) not in (0, failures[name]):
                    failures[name] = when
                    print(f"✗ {name}: {json.loads((cell.out_dir/'failed.json').read_text())['error'].strip().splitlines()[-1]}\n  executed notebook: {os.path.relpath(cell.executed)}", flush=True)
    return look


def _wait(
    child: subprocess.Popen,   # Snakemake, in a session of its own: a terminal's Ctrl-C reaches this process alone
    said: str,                 # what a first Ctrl-C does
    cancelling: int = 0,       # seconds that Snakemake gets to cancel its jobs after a second one
    look=None,                 # called every few seconds
) -> tuple[int, list[int]]:    # its exit status, and the signals by which it was asked to stop
    "Wait for Snakemake. SIGTERM and a first Ctrl-C stop the study; a second one ends it at once."
    asked, told = [], set()
    def stop(sign, _):
        if sign == signal.SIGINT in asked: raise KeyboardInterrupt
        asked.append(sign)
    before = {one: signal.signal(one, stop) for one in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(one) != signal.SIG_IGN}
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired): return child.wait(timeout=2 if look else 0.5), asked
            if look: look()
            if signal.SIGINT in asked and said: print(f"\nstopping: {said}", flush=True); said = ""
            if asked: _stop_cells(child, told)
    except KeyboardInterrupt:
        if cancelling:
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired): child.wait(timeout=cancelling)
        raise
    finally:
        for one, handler in before.items(): signal.signal(one, handler)
        if look: look()


def _stop_cells(snakemake: subprocess.Popen, told: set) -> None:
    "Asked to stop: ask each running cell once, which saves what it has, and start no more."
    import psutil
    if not told: snakemake.send_signal(signal.SIGTERM)
    told.add(snakemake.pid)
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(snakemake.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.pid not in told and "tulu_study" in (words := process.cmdline()) and "cell" in words: told.add(process.pid); process.send_signal(signal.SIGTERM)


def _gpus() -> list[str]:
    "Ids of the GPUs that this process may use."
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None: return [g for g in named.split(",") if g]
    if not shutil.which("nvidia-smi"): return []
    said = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return said.stdout.split() if said.returncode == 0 else []


def _partial(grid: Grid, todo: list[str]) -> None:
    "After failures, draw the tables and figures from what there is; they are drawn again once the rest has run."
    for name in todo:
        cell = grid[name]
        if cell.stage not in ("table", "figure") or grid.state(name).word == "done" or (cell.out_dir/"failed.json").exists(): continue
        lacking = [n for n in cell.needs if grid.state(n).word != "done"]
        if len(lacking) == len(cell.needs): continue
        for other in lacking: grid.discard_stale(other)
        try: run_cell(cell.notebook, cell.params, cell.out_dir, cell.inputs | {"not_run": lacking})
        except CellError as e: print(f"{name}: not drawn from what there is: {str(e).splitlines()[-1]}")
        else: print(f"  {name}: drawn without {', '.join(lacking)}, which did not run")


@call_parse(pos=["study"])
def run(
    study: str = "nano",   # a study of params/studies, or a path to a study file
    jobs: int = 0,         # cells side by side, 0 = as in settings.ini (there 0 = one per core, or 100 in Slurm's queue)
    force: str = "",       # cells to run again even where they are done, comma-separated
):
    "Run what a study has not finished yet. The same command continues after any interruption."
    if os.environ.get("TULU_TIED"): die_with_parent()
    study = str(Path(study).resolve()) if study.endswith((".yaml", ".yml")) else study
    grid = load(study)
    jobs = jobs or grid.site.jobs or (100 if grid.site.executor == "slurm" else os.cpu_count()) or 1
    with _alone(grid):
        for name in filter(None, force.split(",")):
            if name not in grid: raise CellError(f"No cell {name!r} in this study; `tulu-study plan {study}` lists them.")
            (grid[name].out_dir/"manifest.json").unlink(missing_ok=True)
        todo = grid.sync()
        if not todo:
            print(f"All {len(grid)} cells of {grid.study.study} are done. Results: {os.path.relpath(grid.root)}")
            return
        print(f"{grid.study.study}: {len(grid) - len(todo)} of {len(grid)} cells done, {len(todo)} to run, {f'at most {jobs} in the queue' if grid.site.executor == 'slurm' else f'{jobs} at a time'}", flush=True)
        began = time.time()
        code, asked = _snakemake(grid, study, jobs)
        grid = load(study)
        left = grid.sync()
        if left and not asked: _partial(grid, left)
        print(_summary(grid, [n for n in todo if n not in left], time.time() - began, jobs))
    if left or code:
        print("\nNot finished:\n" + _table([[n, grid.state(n).word, grid.state(n).reason] for n in left], ["cell", "state", "reason"]) + f"\n\n{'Stopped as asked;' if asked else 'Mend the cause, then'} the same command continues: {_command(study)}", file=sys.stderr)
        sys.exit(128 + asked[0] if asked else 1)


def _summary(grid: Grid, ran: list[str], wall: float, jobs: int) -> str:
    "Wall time and what share of it was not compute, from the manifests of the cells that ran."
    manifests = [m for n in ran if (m := read_manifest(grid[n].out_dir))]
    compute = sum(m["timings"].get("compute", 0) for m in manifests)
    overhead = 1 - compute / (wall * jobs) if wall else 0
    queued = grid.site.executor == "slurm"   # where nobody knows what waited for what
    text = f"{len(ran)} cells in {wall:.0f} s ({'through Slurm' if queued else f'{jobs} at a time'}): {compute:.0f} s of compute"
    if not queued: text += f"; {overhead:.0%} of the {wall * jobs:.0f} s of all places was something else (imports, kernels, waiting)"
    (grid.root/"last_run.json").write_text(json.dumps({"cells": len(ran), "wall_seconds": round(wall, 1), "jobs": jobs, "compute_seconds": round(compute, 1), "not_compute": None if queued else round(overhead, 3)}))
    return text


@contextlib.contextmanager
def _hold_gpus(wanted: int):
    "Lock as many GPUs as a cell asks for and show it only those: Snakemake counts them, but assigns none. Slurm assigns them itself."
    ids = _gpus()
    if not wanted or not ids or os.environ.get("SLURM_JOB_ID"): yield; return
    if wanted > len(ids): raise CellError(f"This cell asks for {wanted} GPUs, and this machine shows {len(ids)}. Lower training.ranks in the study file (evaluation.gpus for an evaluation), or run it where there are more.")
    while True:
        with contextlib.ExitStack() as stack:          # all of them or none: two cells that each hold half would wait for ever
            mine = []
            for gpu in ids:
                try: stack.enter_context(hold(Path(tempfile.gettempdir())/f"tulu_study-{os.getuid()}-gpu-{gpu}.lock"))
                except Held: continue
                mine.append(gpu)
                if len(mine) == wanted: break
            if len(mine) == wanted:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
                yield
                return
        time.sleep(1)


@contextlib.contextmanager
def _telling(name: str, note: Path, first: float = 30):
    "Show now and then how far a running fine-tuning is, ever more rarely."
    done = threading.Event()
    def tell():
        seen, pause = "", first
        while not done.wait(pause):
            with contextlib.suppress(OSError):
                if (text := note.read_text()) and text != seen: print(f"  … {name}: {text}", flush=True)
                seen = text
            pause = min(1.25 * pause, 600)
    thread = threading.Thread(target=tell, daemon=True, name="progress")
    thread.start()
    try: yield
    finally:
        done.set()
        thread.join()


@call_parse
def cell(
    study: str,            # a study of params/studies, or a path to a study file
    name: str,             # one of its cells, as `tulu-study plan` lists them
    force: bool = False,   # run even where it is done
):
    "Run one cell of a study (Snakemake calls this for each)."
    die_with_parent(int(os.environ.get("TULU_PARENT", 0)) or None)
    if (conf := os.environ.get("TULU_SLURM_CONF")) and os.path.exists(conf): os.environ["SLURM_CONF"] = conf
    stop_in_time(grids.warning_seconds())
    grid = load(study)
    if name not in grid: raise CellError(f"No cell {name!r} in {study}; there are {', '.join(grid)}.")
    known = read_manifest(grid[name].out_dir)
    try:
        with _hold_gpus(grid[name].gpus), _telling(name, grid[name].out_dir/"state"/"progress"): manifest = grids.run(grid, name, force)
    except CellInterrupted:
        print(f"~ {name}: stopped as asked; the same command continues", flush=True)
        sys.exit(75)
    except Exception as e:
        print(f"✗ {name}: {str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__}\n  executed notebook: {os.path.relpath(grid[name].executed)}", flush=True)
        sys.exit(1)
    count = sum(c.stamp.exists() for c in grid.values())
    print(f"✓ [{count:>{len(str(len(grid)))}}/{len(grid)}] {name}: " + ("was done" if known and known["key"] == manifest["key"] and not force else f"{manifest['seconds']:.1f} s"), flush=True)


@call_parse(pos=["study"])
def figures(
    study: str = "nano",   # a study of params/studies, or a path to a study file
    into: str = "",        # folder, empty = figures/<study> in the checkout
):
    "Copy a study's tables and figures, with what made them, into the checkout; a re-run changes no byte."
    from tulu_study.reporting.copying import copy_figures
    grid = load(study)
    base = Path.cwd() if project_root() == packaged_root() else project_root()
    target = Path(into) if into else base/"figures"/grid.study.study
    states = {cell.out_dir.relative_to(grid.root).as_posix(): grid.state(name) for name, cell in grid.items() if cell.stage in ("table", "figure")}
    old = {place: state for place, state in states.items() if state.word == "changed" and not state.reason.startswith("drawn without")}
    copied = copy_figures(grid.root, target, leave_out=set(old))
    print(f"{len(copied)} files in {os.path.relpath(target)}")
    for place, state in old.items(): print(f"not copied: {place}, drawn by other code or from other inputs than now ({state.reason}). `{_command(study)}` draws it again.")


@call_parse(pos=["study"])
def report(
    study: str = "nano",   # a study of params/studies, or a path to a study file
):
    "Print a study's tables, and say where its figures and executed notebooks are."
    grid = load(study)
    for name, cell in ((n, c) for n, c in grid.items() if c.stage in ("table", "figure")):
        state = grid.state(name)
        print(f"── {name}: {state.word} ({state.reason})")
        for path in sorted(cell.out_dir.glob("*")) if state.word == "done" else ():
            if path.suffix == ".md": print("\n" + _for_terminal(path.read_text(encoding="utf-8")) + "\n")
            if path.suffix in (".md", ".csv", ".png", ".svg", ".ipynb"): print(f"   {os.path.relpath(path)}")


def _for_terminal(
    text: str,   # Markdown of a page with tables
) -> str:        # the same, columns aligned, several lines to a row where its cells hold several
    "Set Markdown tables for reading in a terminal; rows of which nothing ran are counted, not shown."
    blocks = itertools.groupby(text.splitlines(), key=lambda line: line.startswith("|"))
    return "\n".join(itertools.chain.from_iterable(_aligned([line.strip("| \n") for line in lines]) if is_table else lines for is_table, lines in blocks))


def _aligned(
    lines: list[str],   # of a Markdown table, outer bars removed
) -> list[str]:         # for the terminal
    "Align a table's columns."
    head, _, *body = [[cell.strip().replace("**", "").split("<br>") for cell in line.split("|")] for line in lines]
    ran = [row for row in body if any(cell[0] != "not run" for cell in row[1:])]
    widths = [max(len(part) for row in (head, *ran) for part in row[i]) for i in range(len(head))]
    height = lambda row: range(max(map(len, row)))
    said = lambda row: ["  ".join((cell[k] if k < len(cell) else "").ljust(width) for cell, width in zip(row, widths)).rstrip() for k in height(row)]
    return [*said(head), "─" * (sum(widths) + 2 * len(widths) - 2), *itertools.chain.from_iterable(map(said, ran)), *([f"… and {len(body) - len(ran)} rows that did not run"] if len(ran) < len(body) else [])]


@call_parse(pos=["model"])
def evaluate(
    model: str = "",                # folder, hub repository ("owner/name@revision"), key of params/models.yaml, or address of a server ("http://host:8000/v1")
    benchmarks: str = "gsm,mmlu",   # e.g. "gsm,mmlu:5shot,bbh:cot+direct"
    into: str = "",                 # folder for predictions, scores and the results file, empty = evaluation/<model>-<protocol>-<chat or plain> below the results root
    n: int = 0,                     # examples of each benchmark, 0 = the paper's sample
    per_group: int = 0,             # examples of each subject, task or language, 0 = the paper's sample
    chat: str = "auto",             # Tülu chat format: yes, no, auto = where the tokenizer has a chat template
    engine: str = "",               # vllm, transformers, auto; empty = the site's setting
    dtype: str = "bfloat16",        # float32 or bfloat16
    protocol: str = "paper",        # paper = the reference exactly, bugs included; fixed = known bugs repaired
    served: str = "",               # at an address: the model's name there
    api: str = "completions",       # at an address: completions or chat
    recording: str = "off",         # at an address: record answers, replay them without network, or off
    max_dollars: float = 0.0,       # at an address: stop before asking where it may cost more, 0 = no limit
):
    "Evaluate any model: a folder, a hub repository or a server. The same command continues after any interruption."
    from tulu_study.evaluation.standalone import evaluate_any
    if not model: raise CellError("Name a model: a Hugging Face folder, a hub repository, a key of params/models.yaml, or the address of a server. `tulu-study evaluate --help` says more.")
    if chat not in ("auto", "yes", "no"): raise CellError(f"--chat is {chat!r}; expected yes, no or auto.")
    report = evaluate_any(model, benchmarks, into or None, n=n or None, per_group=per_group or None, chat={"auto": None, "yes": True, "no": False}[chat], engine=engine, dtype=dtype, protocol=protocol,
                          served=served, api=api, recording=recording, max_dollars=max_dollars or None)
    value = lambda score: "–" if score["value"] is None else f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"
    print(_table([[s["benchmark"], s["setting_name"], value(s), "–" if s["detectable"] is None else f"{s['detectable']:.1f}", str(s["n"]), str(s["n_errors"]), s["stand_in"]["words"] if s.get("stand_in") else "–"] for s in report.scores], ["benchmark", "setting", "percent, 95 %", "detectable", "n", "failed", "stand-in judge"]))
    print("\ndetectable: the smallest true difference to a model that fails independently, in points, found 4 times in 5; `tulu-study compare` measures it for two models on the same questions")
    for s in report.scores:
        if s["n_errors"]: print(f"{s['benchmark']} {s['setting_name']}: {s['n_errors']} of {s['n_examples']} failed ({'; '.join(s['errors'])}); each is in its predictions file")
    print(f"\n{report.made} predictions made, {report.kept} kept from before; everything is in {os.path.relpath(report.folder)}")


@call_parse(pos=["first", "second"])
def compare(
    first: str = "",    # a folder that evaluate wrote, or a model of a study as <study>/<size>-<data>
    second: str = "",   # the model that it is compared with
):
    "Compare two models question by question: differences with intervals and p-values; refuses where they were not asked the same."
    from tulu_study.reporting.comparison import HEAD, compare_models, comparison_rows
    if not (first and second): raise CellError("Name two models: folders that tulu-study evaluate wrote, or <study>/<size>-<data> of a study, such as nano/13B-dolly nano/13B-vanilla.")
    found, alone = compare_models(first, second)
    print(f"first: {first}\nsecond: {second}\n\n" + _table(comparison_rows(found), HEAD))
    print("\nfirst minus second, in points; detectable: the smallest true difference that this many questions would have shown, 4 times in 5")
    if alone: print(f"only one of them has {', '.join(alone)}")
    if refused := sum(bool(row["refused"]) for row in found):
        print(f"{refused} of {len(found)} settings were not compared", file=sys.stderr)
        sys.exit(1)


@call_parse(pos=["name"])
def sources(
    name: str = "",        # a dataset, benchmark or tokenizer, with every place of its files; empty = one line for each file of all
):
    "Say where raw files are, or where they can be had; downloads nothing."
    records = {**datasets(), **benchmarks(), **{record.folder: record for record in tokenizers().values()}}
    if name and name not in records: raise CellError(f"No dataset, benchmark or tokenizer {name!r}; there are {', '.join(records)}.")
    rows = [[key, row["file"], row["state"], row["pinned"], row["place"]] for key, record in records.items() if name in ("", key) for row in acquisition(record)]
    print(_table(rows if name else _shortened(rows), ["record", "file", "state", "pinned", "place"]))
    if name:
        record = records[name]
        for row in acquisition(record): print(*(f"  {row['file']}, else: {other}" for other in row["alternatives"]), sep="\n", end="\n" if row["alternatives"] else "")
        print("\n".join(filter(None, [f"\nlicence: {record.licence}", record.homepage, record.gated and f"to be accepted or requested: {record.gated}"])))


def _shortened(rows: list[list[str]], most: int = 2) -> list[list[str]]:
    "The first files of each record; how many more there are stands in the place of the rest."
    kept = []
    for key, group in itertools.groupby(rows, key=lambda row: row[0]):
        group = list(group)
        kept += group[:most] + ([[key, f"… {len(group) - most} more", "", "", f"tulu-study sources {key}"]] if len(group) > most else [])
    return kept


@call_parse(pos=["path"])
def export(
    path: str = "",        # a conversation file, the folder of a conversion or mix, or a dataset or mix of the study
    into: str = "",        # folder to write, empty = export/<name>-<format> below the study's results
    format: str = "huggingface",   # huggingface (a dataset folder with its card), llama-factory or axolotl
    study: str = "nano",   # the study that a dataset's key is looked up in
):
    "Write conversations for other tools: a Hugging Face dataset with its card, LLaMA-Factory, axolotl."
    from tulu_study.data.export import export_dataset
    grid = load(study)
    here = Path(path) if path and Path(path).exists() else grid.root/"data"/path
    if not path or not here.exists():
        there = sorted(p.name for p in (grid.root/"data").glob("*") if p.is_dir())
        raise CellError(f"No file or folder {path!r}, and no conversions of that name in study {grid.study.study}; there are {', '.join(there) or 'none yet (tulu-study run)'}.")
    name = here.stem.removesuffix("_data") if here.is_file() else here.name
    done = export_dataset(here, Path(into) if into else grid.root/"export"/f"{name}-{format}", format)
    print(done)


@call_parse(pos=["path"])
def card(
    path: str = "",        # a finished fine-tuning: results/<study>/checkpoints/<model>
):
    "Write into a checkpoint's card what its manifest says of its making, and the scores that it has by now."
    from tulu_study.training.cards import update_card
    folder = Path(path)
    if not (folder/"config.json").is_file(): raise CellError("Expected the folder of a finished fine-tuning: results/<study>/checkpoints/<model>.")
    scores = folder.parent.parent/"scores"/folder.name
    written = update_card(folder, scores if scores.is_dir() else None)
    print(f"{os.path.relpath(written)}: " + ("with its scores" if scores.is_dir() else f"no scores yet ({os.path.relpath(scores)})"))


@call_parse(pos=["path"])
def push(
    path: str = "",        # a finished fine-tuning: results/<study>/checkpoints/<model>
    repo: str = "",        # owner/name on the hub
    public: bool = False,  # anybody may see it
    dry_run: bool = False, # only say what would be uploaded
):
    "Put a checkpoint's scores into its card and publish it on the hub. Nothing else in this project uploads anything."
    from tulu_study.training.cards import push as publish, update_card
    folder = Path(path)
    if not (folder/"config.json").is_file() or not repo: raise CellError("Expected the folder of a finished fine-tuning and --repo owner/name.")
    scores = folder.parent.parent/"scores"/folder.name
    update_card(folder, scores if scores.is_dir() else None)
    done = publish(folder, repo, private=not public, dry_run=dry_run)
    print("\n".join(f"{size:>15,}  {name}" for name, size in done["files"].items()) + f"\n{done['bytes']:>15,}  bytes " + ("would go" if dry_run else "went") + f" to {repo} ({'public' if public else 'private'})")


@call_parse(pos=["action"])
def weight_diff(
    action: str = "",      # make (tuned − base) or recover (base + difference)
    base: str = "",        # folder of the base model
    other: str = "",       # folder of the tuned model (make) or of the difference (recover), ours or a published one
    into: str = "",        # folder to make
    dtype: str = "float32",   # recover: float32, bfloat16 or float16
):
    "Weights that may not be passed on, as a difference to their base model; and back."
    from tulu_study.training.weight_diff import make_diff, recover
    if action not in ("make", "recover") or not all((base, other, into)): raise CellError("Expected: tulu-study weight-diff make|recover --base FOLDER --other FOLDER --into FOLDER")
    found = make_diff(base, other, into) if action == "make" else recover(base, other, into, dtype)
    print(f"{found['tensors']} tensors in {into}" + ("" if action == "make" else ", every checksum as expected" if found["verified"] else ", not verified: the difference carries no checksums"))


def _can_import(module: str, seconds: int = 120) -> tuple[bool, str]:
    "Import a package in a process of its own: a broken one may take its process along."
    if importlib.util.find_spec(module) is None: return False, "not installed"
    done = subprocess.run([sys.executable, "-c", f"import {module} as m; print(getattr(m, '__version__', ''))"], capture_output=True, text=True, timeout=seconds, env={**os.environ, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")})
    return done.returncode == 0, (done.stdout.strip().splitlines() or [""])[-1] if done.returncode == 0 else (done.stderr.strip().splitlines() or ["fails"])[-1][:120]


def _reachable(url: str) -> bool:
    "Whether a server answers within five seconds."
    import urllib.error, urllib.request
    try: urllib.request.urlopen(url, timeout=5)
    except urllib.error.HTTPError: return True
    except Exception: return False
    return True


def _sources_root(
    root: Path | None,   # as set on this site
) -> tuple:              # whether it is there, what was found, advice, whether that is a fault
    "Look which datasets and benchmarks have a folder below the sources root."
    if root is None: return False, "none set", "only needed where the hub cannot be reached (settings.ini, [roots] sources)", False
    if not root.is_dir(): return False, f"{root}, which is no folder", "correct [roots] sources in settings.ini (TULU_SOURCES, make … SOURCES=), or make the folder: <dataset or benchmark>/<file>", True
    records = {**datasets(), **benchmarks(), **{record.folder: record for record in tokenizers().values()}}
    there = [key for key, record in records.items() if (root/record.folder).is_dir()]
    return bool(there), f"{root}: {len(there)} of {len(records)} datasets and benchmarks ({', '.join(there) or 'none'})", "its folders should be named as the records in params/ say (tulu-study sources)", True


@call_parse
def doctor():
    "Say what will work on this machine, and what to install for the rest."
    from tulu_study.evaluation import sandbox
    site, checks = settings(), []
    def check(what, ok, found, advice="", needed=True):
        checks.append(["✓" if ok else "✗" if needed else "–", what, found + ("" if ok or not advice else f"  → {advice}")])
    extra = "pip install 'tulu-study[gpu]'" if _gpus() else "pip install 'tulu-study[cpu]' (make setup)"
    check("Python", (3, 10) <= sys.version_info[:2] < (3, 13), sys.version.split()[0], "use Python 3.10 to 3.12")
    modules = {"training: torch": "torch", "training: transformers": "transformers", "training: DeepSpeed": "deepspeed", "engine: vLLM": "vllm"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for what, found in zip(modules, pool.map(_can_import, modules.values())): check(what, *found, extra)
    check("C++ compiler (the setting compile; offloading the optimiser on GPU machines)", bool(cxx := shutil.which(os.environ.get("CXX", "g++"))), cxx or "not found", "apt-get install g++ python3-dev", False)
    check("GPUs", bool(_gpus()), f"{len(_gpus())} found" if _gpus() else "none: the nano and mini studies run on the CPU; the paper's sizes need GPUs", needed=False)
    lacking = sandbox.problem()
    check("sandbox for generated code (Codex-Eval)", not lacking, lacking or "holds against its own probes", needed=False)
    site.results.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(site.results).free / 2**30
    check("disk for results", free > 5, f"{free:.0f} GiB free", "nano needs 1 GiB, mini 5 GiB; set [roots] results")
    check("sources root", *_sources_root(site.sources))
    hub = _reachable("https://huggingface.co")
    check("Hugging Face hub", hub, "answers" if hub else "does not answer", "downloads will fail; set a sources root (the nano study needs neither)", False)
    lacking = _slurm_lacks()
    check("Slurm", not lacking, f"not found: {' and '.join(lacking)}" if lacking else shutil.which("sbatch"), "only needed for [executor] profile = slurm", False)
    print(_table(checks, ["", "check", "found"]) + "\n\n✓ works   ✗ needed and not there   – optional and not there")


COMMANDS = {"plan": plan, "run": run, "cell": cell, "figures": figures, "report": report, "evaluate": evaluate, "compare": compare, "sources": sources, "export": export, "card": card, "push": push, "weight-diff": weight_diff, "doctor": doctor}


def main() -> None:
    "Dispatch `tulu-study COMMAND …`; known errors end with their message alone."
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command not in COMMANDS:
        wrong = command not in ("-h", "--help")
        lines = [f"usage: tulu-study COMMAND [options]   (tulu-study COMMAND --help)\n"] + [f"  {n:<13}{f.__doc__.splitlines()[0]}" for n, f in COMMANDS.items()]
        print((f"tulu-study: no command {command!r}\n" if wrong else "") + "\n".join(lines), file=sys.stderr if wrong else sys.stdout)
        sys.exit(2 if wrong else 0)
    function = COMMANDS[command].__wrapped__
    words, places = sys.argv[2:], {"export": ("path",), "card": ("path",), "push": ("path",), "weight-diff": ("action",), "evaluate": ("model",), "compare": ("first", "second")}.get(command, ("study", "name"))
    if "study" in places and "--study" in words and words.index("--study") + 1 < len(words): words = [words[words.index("--study") + 1], *(w for i, w in enumerate(words) if i not in (at := words.index("--study"), at + 1))]
    given = vars(anno_parser(function, prog=f"tulu-study {command}", pos=[n for n in places if n in inspect.signature(function).parameters]).parse_args(words))
    try: function(**{k: v for k, v in given.items() if k not in ("pdb", "xtra")})
    except (CellError, ParamsError, SourceError, ValueError, FileNotFoundError, KeyError) as e:
        print(f"tulu-study {command}: {e.args[0] if isinstance(e, KeyError) and e.args else e}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as e:
        if type(e).__name__ not in ("EngineError", "WeightDiffError", "CardError"): raise
        print(f"tulu-study {command}: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\ntulu-study {command}: stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
