"""The sandbox for generated code: run a program against its tests without trusting one line of it.

    run_check(Check(prompt, completion, test, entry_point))  ->  "passed" | "timed out" | "failed: …"

**Threat model.** The program is hostile: it wants to harm the machine, to learn something, or to be counted as passed. The tests, the
problem's prompt, this package and the interpreter are trusted.

*Harm.* Every check runs in a bubblewrap sandbox of its own: new user, process, network, IPC, host-name and control-group name spaces, no
capability, an environment without variables, and a file system that holds the interpreter and its standard library read-only, `/dev/null`, and an
empty `/tmp` of 16 MiB; no home, no `/proc`, no shell, no other program. Inside, the program's process has hard limits on memory, processor
time, file size and open files, and a system call filter refuses it new processes, threads, programs, sockets, shared memory, name spaces, mounts and
tracing. `RLIMIT_NPROC` alone would not do: the kernel does not apply it to root, and older kernels count a user's processes outside the sandbox too. One
process without children makes the memory limit exact, and leaves nothing behind that could run on. When the checker ends, or the
wall clock or the parent ends it, the kernel kills the whole process namespace.

*Cheating.* The program and the tests never share an interpreter. The checker (process 1 in there, whom signals from inside do not kill)
holds the tests; the program sits in a process forked before the checker has read anything. It gets the arguments of one call and may answer with plain values. Leaving early, patching
`builtins`, replacing `check` or `assert`, walking frames, printing a verdict, returning objects that equal everything: none reaches the
process that decides. The verdict's pipe is closed in the program's process and cannot be reopened (no `/proc`; the checker is not dumpable, so
neither ptrace nor `pidfd_getfd` work even without the filter).

*Out of scope.* A program that answers the tests' calls correctly has passed, whatever it does to find the answers; kernel exploits; timing.

**What differs from the reference**, which runs everything in one process: the limit of three seconds is stretched on a busy machine, so that a score does not
depend on what else runs (for a program that waits for the processor, not for one that sleeps); arguments that the program changes in place do not change in the test
(no HumanEval test looks); a returned object of an own class equals nothing; only the standard library can be imported; threads and
processes cannot be started.
"""
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

from tulu_study.evaluation import sandbox_inside

__all__ = ["SandboxError", "Limits", "Check", "run_check", "run_checks", "problem", "require"]

INSTALL = "install it with `sudo apt-get install bubblewrap` (Fedora: `sudo dnf install bubblewrap`; in a checkout: `sudo make system-deps`)"
ALLOW = ("Unprivileged user namespaces are probably forbidden on this machine. Debian: `sudo sysctl kernel.unprivileged_userns_clone=1`; Ubuntu 24.04 and later: "
         "`sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`; where there are none at all: `sudo sysctl user.max_user_namespaces=15000`; "
         "in a container: start it with `--security-opt seccomp=unconfined --security-opt apparmor=unconfined` or `--privileged`")
GRACE = 20.0  # seconds beyond the program's own limit after which a sandbox that is silent is killed from outside


class SandboxError(RuntimeError):
    "The sandbox itself cannot be used; says why and what to do. Never raised for what a program does."


@dataclass(frozen=True)
class Limits:
    "What one program may use."
    timeout: float = 3.0  # seconds by the clock for the program and all its tests; up to three times as long where a busy machine gave it less processor time and it does not sleep
    cpu: int = 4  # seconds of processor time
    memory: int = 512 << 20  # bytes of address space
    file: int = 8 << 20  # bytes of one file
    tmp: int = 16 << 20  # bytes of /tmp


@dataclass(frozen=True)
class Check:
    "One completion and the tests that it shall pass."
    prompt: str  # the problem: a function's beginning, and its helpers
    completion: str  # what the model wrote after it
    test: str  # defines check(candidate)
    entry_point: str  # name of the function
    limits: Limits = field(default_factory=Limits)


@lru_cache
def command(tmp: int) -> tuple:
    "The bubblewrap call up to the program's standard input; everything that is not named here does not exist inside."
    base, python = Path(sys.base_prefix), Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()
    words = ["bwrap", "--unshare-user", "--uid", "65534", "--gid", "65534", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
             "--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL", "--clearenv", "--setenv", "LD_LIBRARY_PATH", "/python/lib"]
    for folder in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(folder): words += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder): words += ["--ro-bind", folder, folder]
    for folder in ("lib", "lib64"):
        if (base / folder).is_dir(): words += ["--ro-bind", str((base / folder).resolve()), f"/python/{folder}"]
    words += ["--ro-bind", str(python), "/python/bin/python3", "--ro-bind", str(Path(sandbox_inside.__file__).resolve()), "/check.py", "--dev-bind", "/dev/null", "/dev/null",
              "--size", str(tmp), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--", "/python/bin/python3", "-I", "-S", "-B", "/check.py"]
    return tuple(words)


def run_check(
    check: Check,  # program and tests
) -> str:  # "passed", "timed out" or "failed: …"
    "Run one check in a sandbox of its own. Raises SandboxError where the sandbox does not start, twice."
    task = json.dumps({"program": check.prompt + check.completion, "prompt": check.prompt, "test": check.test, "entry_point": check.entry_point, "limits": asdict(check.limits)})
    for _ in range(2):
        try: process = subprocess.Popen(command(check.limits.tmp), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", env={"PATH": os.environ.get("PATH", "")})
        except OSError as error: raise SandboxError(f"bubblewrap (bwrap) cannot be started ({error}); {INSTALL}") from None
        try: out, err = process.communicate(task.encode(), timeout=sandbox_inside.PATIENCE * check.limits.timeout + GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            return "timed out"
        finally:
            if process.poll() is None: process.kill()
        started, _, rest = out.partition(b"\n")
        if started == b"started": return result_of(rest)
    said = (err.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}, no message"])[-1]
    raise SandboxError(f"the sandbox for generated code does not start here; bubblewrap said: {said}. {ALLOW}")


def result_of(line: bytes) -> str:
    "The checker's verdict; without one the program is taken to have broken the checker."
    try: return str(json.loads(line)["result"])
    except (ValueError, KeyError, TypeError): return "failed: the checker gave no verdict"


def run_checks(
    checks,  # iterable of (key, Check)
    workers: int | None = None,  # sandboxes at a time; None: one per processor that this process may use
):  # yields (key, result) as they finish
    "Run many checks side by side."
    checks, workers = iter(checks), workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        running = {}
        try:
            while True:
                for key, check in islice(checks, 2 * workers - len(running)): running[pool.submit(run_check, check)] = key
                if not running: return
                for done in wait(running, return_when=FIRST_COMPLETED).done: yield running.pop(done), done.result()
        finally:
            for future in running: future.cancel()


PROBE = "def double(number):\n    \"\"\"Twice the number.\"\"\"\n"
PROBE_TEST = "def check(candidate):\n    assert candidate(4) == 8\n"
PROBES = {"a right program": ("    return 2 * number\n", True), "a wrong program": ("    return number\n", False),
          "a program that starts a process": ("    import os\n    if os.fork() == 0: os._exit(0)\n    return 2 * number\n", False),
          "a program that starts a thread": ("    import threading\n    threading.Thread(target=print).start()\n    return 2 * number\n", False),
          "a program that opens a socket": ("    import socket\n    socket.socket()\n    return 2 * number\n", False),
          "a program that takes 600 MiB": ("    kept = bytearray(600 << 20)\n    return 2 * number\n", False),
          "a program that reads the host's files": ("    open('/etc/hostname')\n    return 2 * number\n", False),
          "a program that writes beside /tmp": ("    open('/dev/file', 'w')\n    return 2 * number\n", False)}


@lru_cache
def problem() -> str | None:  # what is wrong and what to do; None where generated code can be run
    "Try the sandbox once per process: it must start, tell right from wrong, and hold."
    if not sys.platform.startswith("linux"): return f"generated code is run in bubblewrap, which needs Linux; this is {sys.platform}"
    if not shutil.which("bwrap"): return f"generated code is run in bubblewrap (bwrap), which is not installed; {INSTALL}"
    for name, (body, passes) in PROBES.items():
        try: result = run_check(Check(PROBE, body, PROBE_TEST, "double", Limits(timeout=20.0)))
        except SandboxError as error: return str(error)
        if (result == "passed") != passes:
            return f"the sandbox for generated code does not hold on this machine ({os.uname().machine}, Linux {os.uname().release}): {name} gave {result!r}"
    return None


def require() -> None:
    "Raise SandboxError where generated code cannot be run safely."
    if found := problem(): raise SandboxError(found)
