"""Everything that CI runs, in order: export in sync, notebooks clean, notebooks' own tests, pytest. Ends with pytest's summary line.

`make test` calls it inside the project's environment. Uncommitted work is allowed: what is compared is the tree before and after."""
import hashlib, os, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ENV = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}


def step(title: str, command: list[str]) -> None:
    "Run one step; leave with its exit code when it fails."
    print(f"── {title}", flush=True)
    began = time.time()
    code = subprocess.call(command, cwd=ROOT, env=ENV, stdin=subprocess.DEVNULL)
    if code: sys.exit(code)
    print(f"   {time.time() - began:.0f} s", flush=True)


def state() -> str:
    "A fingerprint of notebooks and exported modules as they lie in the tree."
    h = hashlib.sha256()
    for path in sorted([*(ROOT/"nbs").rglob("*.ipynb"), *(ROOT/"tulu_study").rglob("*.py")]): h.update(str(path).encode() + path.read_bytes())
    return h.hexdigest()


before = state()
step("export", [str(BIN/"nbdev-export")])
step("clean", [str(BIN/"nbdev-clean")])
if state() != before:
    subprocess.call(["git", "--no-pager", "diff", "--stat"], cwd=ROOT)
    sys.exit("The exported library or the notebooks were out of date: nbdev-export and nbdev-clean changed the files above. Commit what they made.")
step("notebook tests", [str(BIN/"nbdev-test"), "nbs", "--n-workers", "2", "--skip-folder-re", "^(runs|tour)$"])
print("── pytest", flush=True)
# two files at a time, the long ones first (tests/conftest.py): half of the long tests wait for processes that they have killed or started
sys.exit(subprocess.call([sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--durations", "12", *sys.argv[1:]], cwd=ROOT, env=ENV, stdin=subprocess.DEVNULL))
