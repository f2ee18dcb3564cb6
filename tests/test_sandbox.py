"""The sandbox for generated code: right programs pass, hostile ones neither pass nor harm.

Most hostile programs here answer correctly *if and only if* their attack worked (`return a + b if worked else None`), so that "not passed" shows that it did not."""
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tulu_study.evaluation import sandbox, sandbox_inside
from tulu_study.evaluation.sandbox import Check, Limits, SandboxError, run_check, run_checks

needs_sandbox = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed: sudo make system-deps")

PROMPT = 'def add(a, b):\n    """Sum of two numbers."""\n'
TEST = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n    assert candidate(1000, 337) == 1337\n"


def attempt(body, timeout=3.0, prompt=PROMPT, test=TEST, entry_point="add"):
    "The result of a completion; `body` is indented by four blanks where it does not begin with one."
    return run_check(Check(prompt, body if body.startswith(" ") else "".join(f"    {line}\n" for line in body.strip("\n").splitlines()), test, entry_point, Limits(timeout=timeout)))


def worked(action):
    "A completion that is right where an action raises nothing."
    return "try:\n" + "".join(f"    {line}\n" for line in action.strip("\n").splitlines()) + "    worked = True\nexcept BaseException: worked = False\nreturn a + b if worked else None"


LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"

HOSTILE = {
    # leaving before the check
    "sys.exit(0) before the check": "    return 0\nimport sys\nsys.exit(0)\n",
    "os._exit(0) before the check": "    return 0\nimport os\nos._exit(0)\n",
    "os._exit(0) in the call": "import os\nos._exit(0)",
    "SystemExit in the call": "raise SystemExit(0)",
    "a StopIteration that ends loops": "raise StopIteration",
    "a verdict at exit": "    return 0\nimport atexit, os\natexit.register(lambda: [os.write(fd, b'started\\n{\"result\": \"passed\"}\\n') for fd in range(100)])\nraise SystemExit(0)\n",
    # deciding oneself
    "patched builtins": "    return 0\nimport builtins\nbuiltins.AssertionError = builtins.Exception = None\nbuiltins.all = builtins.any = builtins.bool = builtins.abs = lambda *given: True\nbuiltins.compile = builtins.exec = lambda *given: None\n",
    "another check": "    return 0\nimport sys\ndef check(candidate): return True\nfor module in list(sys.modules.values()): setattr(module, 'check', check)\n",
    "another verdict": "    return 0\nimport gc, types\nfor thing in gc.get_objects():\n    if isinstance(thing, types.FunctionType) and thing.__name__ in ('verdict', 'ask', 'error_of', 'helpers'): thing.__code__ = (lambda *given: 'passed').__code__\n",
    "frames": "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_globals.update(check=print, verdict=lambda *given: 'passed', ask=lambda *given: True)\n    frame = frame.f_back\nreturn None",
    "tracing": "import sys\nsys.settrace(lambda *given: None)\nsys.setprofile(lambda *given: None)\nsys.addaudithook(lambda *given: None)\nreturn 0",
    "a printed verdict": "print('passed', flush=True)\nimport os\nfor fd in range(300):\n    try: os.write(fd, b'started\\n{\"result\": \"passed\"}\\n')\n    except OSError: pass\nreturn 0",
    "answers before questions": "    return 0\nimport json, os\nfor value in [None, True, ['int', '5'], True]:\n    data = json.dumps({'value': value}).encode()\n    os.write(4, len(data).to_bytes(8, 'big') + data)\n",
    "garbage for an answer": "import os\nos.write(4, (1 << 60).to_bytes(8, 'big') + b'x' * 1000)\nreturn 0",
    "broken values": "import os\ndata = b'{\"value\": [\"dict\", [[[\"list\", []], 1]]]}'\nos.write(4, len(data).to_bytes(8, 'big') + data)",
    "an object equal to everything": "class Yes:\n    def __eq__(self, other): return True\n    __bool__ = __lt__ = __ge__ = lambda self, *other: True\nreturn Yes()",
    "a number equal to everything": "class Yes(int):\n    __eq__ = lambda self, other: True\n    __hash__ = int.__hash__\nreturn Yes(99)",
    "the verdict's pipe by /proc": worked("open('/proc/1/fd/1', 'w').write('started\\n{\"result\": \"passed\"}\\n')"),
    "finding the tests": worked("import gc\nassert any('candidate' + '(2, 3)' in str(thing)[:10000] for thing in gc.get_objects() if isinstance(thing, (str, dict, list)))"),
    # processes
    "a fork bomb": "import os\nwhile True: os.fork()",
    "a fork bomb that does not give up": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "a daemon": worked("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(600)\n    os._exit(0)"),
    "vfork by libc": worked(LIBC + "assert libc.vfork() > 0"),
    "a bomb of threads": worked("import threading, time\nfor _ in range(10000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"),
    "one thread": worked("import threading\nthreading.Thread(target=print).start()"),
    "multiprocessing": worked("import multiprocessing\nmultiprocessing.Pool(2).map(abs, [1, 2])"),
    "a shell": worked("import os, subprocess\nassert os.system('true') == 0 or subprocess.run(['/bin/sh', '-c', 'true']).returncode == 0"),
    "another program": worked("import os\nos.execv('/python/bin/python3', ['python3', '-c', 'pass'])"),
    "killing the parent": "import os, signal\nfor pid in (os.getppid(), 1, -1):\n    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP):\n        try: os.kill(pid, number)\n        except OSError: pass\nreturn 0",
    "the parent's alarm": "import os, signal\nos.kill(os.getppid(), signal.SIGALRM)\nreturn 0",
    "the parent's limits": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))\nreturn 0",
    "tracing the parent": worked(LIBC + "import os\nassert libc.ptrace(16, os.getppid(), 0, 0) == 0"),
    "the parent's memory": worked(LIBC + "import os\nclass Part(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]\nhere = ctypes.create_string_buffer(8)\nparts = Part(ctypes.addressof(here), 8)\nassert libc.process_vm_readv(os.getppid(), ctypes.byref(parts), 1, ctypes.byref(parts), 1, 0) == 8"),
    # memory, time, space
    "a memory bomb": "kept = []\nwhile True: kept.append(bytearray(1 << 24))",
    "memory by libc": worked(LIBC + "import mmap\nkept = [mmap.mmap(-1, 1 << 26) for _ in range(64)]"),
    "shared memory": worked(LIBC + "assert libc.shmget(0, 1 << 20, 0o1600) >= 0"),
    "a file in memory": worked("import os\nos.memfd_create('file')"),
    "a stack overflow": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef down(n): return down(n + 1) + 1\nreturn down(0)",
    "a crash": "import ctypes\nreturn ctypes.string_at(0)",
    "endless output": "while True: print('x' * 1000000)",
    "a giant answer": "return 'x' * (300 << 20)",
    "a deep answer": "found = []\nfor _ in range(10 ** 6): found = [found]\nreturn found",
    "an answer that contains itself": "found = []\nfound.append(found)\nreturn found",
    "an endless loop": "while True: pass",
    "an endless loop that ignores signals": "import signal\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "sleeping past the limit": "import time\ntime.sleep(60)\nreturn a + b",
    "a slow C call": "return 10 ** 10 ** 9",
    "a disk full of files": worked("for number in range(64): open(f'/tmp/{number}', 'wb').write(bytes(1 << 20))"),
    "one large file": worked("open('/tmp/file', 'wb').write(bytes(10 << 20))"),
    "higher limits": worked("import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"),
    # the machine
    "reading the canary": worked("import sys\nopen(CANARY_PATH).read()"),
    "reading the home folder": worked("import os\nassert os.listdir(HOME_PATH) or os.listdir(os.path.expanduser('~'))"),
    "reading the accounts": worked("open('/etc/passwd').read()"),
    "deleting everything": "import os, shutil\nshutil.rmtree('/', ignore_errors=True)\nfor path in (CANARY_PATH, os.path.dirname(CANARY_PATH), HOME_PATH):\n    shutil.rmtree(path, ignore_errors=True)\n    try: os.remove(path)\n    except OSError: pass\nreturn 0",
    "writing the interpreter": worked("import os\nopen(os.__file__, 'a').write('x')"),
    "writing the checker": worked("open('/check.py', 'a').write('x')"),
    "writing at the root": worked("open('/file', 'w').write('x')"),
    "writing the devices": worked("open('/dev/file', 'w').write('x')"),
    "the environment": worked("import os\nassert os.environ or os.getenv('HOME')"),
    "the project": worked("import sys\nsys.path += [HOME_PATH, PROJECT_PATH]\nimport tulu_study"),
    "a server on this machine": worked("import socket\nsocket.create_connection(('127.0.0.1', SERVER_PORT), timeout=2)"),
    "the network": worked("import socket\nsocket.create_connection(('1.1.1.1', 53), timeout=2)"),
    "a name look-up": worked("import socket\nassert socket.getaddrinfo('example.org', 80)"),
    "the network by urllib": worked("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:%d' % SERVER_PORT, timeout=2)"),
    # the kernel
    "new name spaces": worked(LIBC + "assert libc.unshare(0x10000000) == 0"),
    "a mount": worked(LIBC + "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0"),
    "chroot": worked("import os\nos.chroot('/tmp')"),
    "another user": worked("import os\nos.setuid(0)"),
    "devices": worked("import os\nos.mknod('/tmp/disk', 0o60600, os.makedev(254, 0))"),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    "What the programs are after: a file, a folder, a server. The file and the folder are there afterwards as they were."
    folder = tmp_path_factory.mktemp("host")
    (folder / "canary").write_text("alive")
    home = Path.home()
    before = sorted(os.listdir(home))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield {"CANARY_PATH": str(folder / "canary"), "HOME_PATH": str(home), "PROJECT_PATH": str(Path(sandbox.__file__).parents[2]), "SERVER_PORT": server.getsockname()[1]}
        with pytest.raises(BlockingIOError): server.accept()  # nobody came
    assert (folder / "canary").read_text() == "alive" and set(before) <= set(os.listdir(home))


def running():
    "Processes of sandboxes that are alive, by their command line."
    found = []
    for process in Path("/proc").iterdir():
        try: words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError: continue
        if b"/check.py" in words: found.append(process.name)
    return found


def settled(before, seconds=5):
    "True once no sandbox process is left that was not there before."
    deadline = time.time() + seconds
    while set(running()) - set(before) and time.time() < deadline: time.sleep(0.02)
    return not set(running()) - set(before)


@needs_sandbox
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_does_not_pass_and_leaves_nothing(name, host):
    body, before = HOSTILE[name], running()
    for word, value in host.items(): body = body.replace(word, repr(value))
    result = attempt(body, timeout=1.0)
    assert result != "passed" and (result == "timed out" or result.startswith("failed: ")), f"{name}: {result}"
    assert settled(before), f"{name}: sandbox processes live on"
    assert Path(host["CANARY_PATH"]).read_text() == "alive"


@needs_sandbox
def test_attacks_would_work_outside(host):
    "The attacks are real: without the sandbox a sample of them answers correctly, so that 'not passed' above means something."
    for name in ("reading the canary", "reading the home folder", "one thread", "a shell", "a server on this machine", "the environment", "a file in memory", "memory by libc", "one large file"):
        body = HOSTILE[name].replace("'/tmp/file'", repr(str(Path(host["CANARY_PATH"]).parent / "file")))
        for word, value in host.items(): body = body.replace(word, repr(value))
        program = PROMPT + "".join(f"    {line}\n" for line in body.splitlines()) + "\nassert add(2, 3) == 5\n"
        if name == "a server on this machine":  # not connected to here: the fixture checks that nobody comes
            with socket.create_server(("127.0.0.1", 0)) as server: done = subprocess.run([sys.executable, "-c", program.replace(str(host["SERVER_PORT"]), str(server.getsockname()[1]))], capture_output=True)
        else: done = subprocess.run([sys.executable, "-c", program], capture_output=True)
        assert done.returncode == 0, f"{name}: {done.stderr.decode()[-300:]}"


@needs_sandbox
@pytest.mark.parametrize("name", ["tracing the parent", "the parent's memory", "the verdict's pipe by pidfd", "a server on this machine", "writing the checker", "killing the parent"])
def test_without_the_system_call_filter_the_other_walls_stand(name, host, tmp_path, monkeypatch):
    "Name spaces keep the network and the files away, and the checker cannot be read or killed, even where the filter does nothing."
    source = Path(sandbox_inside.__file__).read_text()
    (tmp_path / "inside.py").write_text(source.replace("        forbid(machine)\n", ""))
    assert (tmp_path / "inside.py").read_text() != source
    monkeypatch.setattr(sandbox, "sandbox_inside", type("Inside", (), {"__file__": str(tmp_path / "inside.py"), "PATIENCE": 3}))
    monkeypatch.setattr(sandbox, "command", sandbox.command.__wrapped__)
    by_pidfd = worked(LIBC + "import os\nhandle = libc.syscall(434, os.getppid(), 0)\nassert handle >= 0\nassert libc.syscall(438, handle, 1, 0) >= 0")
    body = (HOSTILE | {"the verdict's pipe by pidfd": by_pidfd})[name]
    for word, value in host.items(): body = body.replace(word, repr(value))
    assert attempt(body).startswith("failed: ")
    assert attempt("    return a + b") == "passed"


@needs_sandbox
@pytest.mark.parametrize("body, expected", {
    "right": ("    return a + b", "passed"), "wrong": ("    return a - b", "failed: "), "raises": ("    raise ValueError('too small')", "failed: too small"),
    "does not compile": ("    return a +", "failed: invalid syntax (<string>, line 3)"), "does not define it": ("    return 0\ndel add", "failed: name 'add' is not defined"),
    "loops": ("    while True: pass", "timed out"), "leaves": ("    import os; os._exit(3)", "failed: the program left with exit code 3"),
    "crashes": ("    import ctypes; ctypes.string_at(0)", "failed: the program was killed by SIGSEGV"), "uses a helper": ("    return total([a, b])\n\ndef total(numbers): return sum(numbers)", "passed"),
    "writes to /tmp": ("    open('/tmp/note', 'w').write('x')\n    return a + b", "passed"), "prints": ("    print(a)\n    return a + b", "passed"),
    "standard library": ("    import math, re, collections, itertools, hashlib, heapq, typing, decimal, datetime, random\n    return int(math.fsum([a, b]))", "passed"),
}.values(), ids=lambda value: repr(value)[:30])
def test_results(body, expected): assert attempt(body, timeout=1.5) == expected


@needs_sandbox
def test_the_message_of_a_failing_test_is_kept_and_not_swallowed():
    test = "def check(candidate):\n    assert candidate(1, 1) == 3, 'one and one'\n"
    assert attempt("    return a + b", test=test) == "failed: one and one"
    lenient = "def check(candidate):\n    try: candidate(1, 1)\n    except ValueError as error: assert 'small' in str(error)\n    else: assert False, 'no error'\n"
    assert attempt("    raise ValueError('too small')", test=lenient) == "passed"
    assert attempt("    raise KeyError('too small')", test=lenient).startswith("failed")
    silent = "def check(candidate):\n    assert all(map(candidate, [1, 2], [3, 4]))\n"
    assert attempt("    raise StopIteration", test=silent).startswith("failed")


@needs_sandbox
def test_tests_may_use_the_prompts_helpers():
    prompt = "import math\n\ndef area(r):\n    return math.pi * r * r\n\n\ndef radius(a):\n    \"\"\"Inverse of area.\"\"\"\n"
    test = "def check(candidate):\n    for r in range(1, 20): assert abs(candidate(area(r)) - r) < 1e-9\n    assert radius(0) == 0\n"
    assert attempt("    return math.sqrt(a / math.pi)\n", prompt=prompt, test=test, entry_point="radius") == "passed"


@pytest.mark.parametrize("value", [None, True, 0, -5, 10 ** 5000, 0.1, float("inf"), 1e-320, 2j, "text\ud800\0", b"\xff", [1, [2, (3,)]], (), {"a": {1: None}, (1, 2): [True]}, {1, 2}, frozenset("ab"), [[]] * 3], ids=lambda value: type(value).__name__)
def test_values_survive(value):
    found = sandbox_inside.decode(sandbox_inside.encode(value))
    assert found == value and type(found) is type(value)


def test_values_that_are_no_plain_values():
    import collections
    import decimal
    import fractions
    import json
    encode, decode = sandbox_inside.encode, sandbox_inside.decode
    assert decode(encode(collections.Counter("aab"))) == {"a": 2, "b": 1} and decode(encode(collections.OrderedDict(a=1))) == {"a": 1}
    assert decode(encode(fractions.Fraction(1, 2))) == 0.5 and decode(encode(decimal.Decimal("1.5"))) == 1.5
    assert decode(encode(float("nan"))) != decode(encode(float("nan")))
    opaque = decode(encode(range(3)))
    assert opaque != [0, 1, 2] and opaque != range(3) and bool(opaque) and not decode(encode(range(0)))
    for nonsense in (["list"], ["eval", "1"], [], 5, {"a": 1}, ["dict", [[["list", []], None]]], ["float", "x"]):
        with pytest.raises((ValueError, TypeError, IndexError)): decode(json.loads(json.dumps(nonsense)))


@needs_sandbox
def test_limit_by_the_clock_is_stretched_for_a_starved_program_only():
    busy, asleep = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass\nreturn a + b", "import time\ntime.sleep({})\nreturn a + b"
    began = time.monotonic()
    assert attempt(busy, timeout=1.0) == "timed out" and time.monotonic() - began < 10
    one_call = "def check(candidate): assert candidate(2, 3) == 5"
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * len(os.sched_getaffinity(0)))]
    try: assert attempt("import time\nwhile time.process_time() < 0.25: pass\nreturn a + b", timeout=1.0, test=one_call) == "passed"
    finally:
        for other in others: other.kill(), other.wait()
    assert attempt(asleep.format(0.2), timeout=1.0, test=one_call) == "passed"
    assert attempt(asleep.format(2.0), timeout=1.0, test=one_call) == "timed out"
    assert attempt("import threading\nthreading.Event().wait(2.0)\nreturn a + b", timeout=1.0, test=one_call) == "timed out"


@needs_sandbox
def test_many_at_once_keep_their_results():
    numbers = list(range(12))
    checks = [(i, Check(PROMPT, f"    return a + b + {i % 3}", TEST, "add")) for i in numbers]
    assert sorted(run_checks(checks, workers=3)) == [(i, "passed" if i % 3 == 0 else "failed: ") for i in numbers]
    assert list(run_checks([])) == []


@needs_sandbox
def test_killed_caller_takes_its_sandboxes_along(tmp_path):
    before = running()
    script = f"from tulu_study.evaluation.sandbox import *\nrun_check(Check({PROMPT!r}, '    while True: pass', {TEST!r}, 'add', Limits(timeout=60, cpu=60)))"
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.time() + 20
    while not set(running()) - set(before) and time.time() < deadline: time.sleep(0.05)
    assert set(running()) - set(before)
    process.kill()
    process.wait()
    assert settled(before)


@needs_sandbox
def test_sandbox_is_usable_here():
    assert sandbox.problem() is None
    sandbox.require()


def test_a_leak_is_a_problem(monkeypatch):
    "A sandbox that lets one attack through is refused, with the attack named."
    monkeypatch.setattr(sandbox, "run_check", lambda check: "failed: " if "return number" in check.completion else "passed")
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: f"/usr/bin/{name}")
    sandbox.problem.cache_clear()
    try: assert "starts a process gave 'passed'" in sandbox.problem()
    finally: sandbox.problem.cache_clear()


@pytest.mark.parametrize("says, advice", [(None, "apt-get install bubblewrap"), ("bwrap: No permissions to create new namespace", "unprivileged_userns")])
def test_without_a_sandbox_the_error_says_what_to_do(says, advice, tmp_path, monkeypatch):
    if says:
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 1\n")
        (tmp_path / "bwrap").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    else: monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.problem.cache_clear()
    try:
        with pytest.raises(SandboxError, match=advice): sandbox.require()
        with pytest.raises(SandboxError, match="bubblewrap"): attempt("    return a + b")
    finally: sandbox.problem.cache_clear()


@needs_sandbox
def test_honest_and_slightly_wrong_programs_agree_with_running_them_in_one_process():
    "Checker and candidate apart change no verdict of programs that do not cheat: the same tests in one interpreter say the same."
    stream = random.Random(7)
    bodies = [f"    return {stream.choice(['a + b', 'a - b', 'b + a', 'a * b', 'abs(a) + b', 'float(a + b)', 'str(a + b)', '[a + b]', 'a + b if a > 0 else b', 'sum((a, b))', 'max(a, b)', 'a | b'])}" for _ in range(24)]
    for body in sorted(set(bodies)):
        try: exec(PROMPT + body + "\n" + TEST + "\ncheck(add)", {})
        except Exception: right = False
        else: right = True
        assert (attempt(body) == "passed") == right, body


@needs_sandbox
def test_the_benchmark_of_throughput_finds_a_solution_that_fails(monkeypatch):
    "164 x 20 checks are timed by bench/sandbox.py; here two problems, with real sandboxes."
    import importlib.util
    from helpers import ROOT
    spec = importlib.util.spec_from_file_location("bench_sandbox", ROOT / "bench" / "sandbox.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    problems = [{"task_id": f"Toy/{i}", "prompt": "def add(a, b):\n", "entry_point": "add", "canonical_solution": f"    return a + b + {i}\n", "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"} for i in range(2)]
    assert len({text for problem in problems for text in bench.completions(problem, 20)}) == 40 - 10, "the ten programs that return nothing are the same for both, the rest differ"
    found = bench.measure(problems, 4, 1)
    assert (found["checks"], found["missed"], found["nothing passed"]) == (8, ["Toy/1", "Toy/1"], 0) and found["wall"] > 0 < found["cpu"]
