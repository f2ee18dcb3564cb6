"""What runs inside the sandbox: a checker, and the program that it checks in a process of its own.

This file is mounted into the sandbox and started there by `sandbox.run_check`; it needs nothing but the standard library. Two processes:

* the *checker*, process 1 of its own process namespace. It holds the tests, calls `check` and writes the verdict;
* the *candidate*, forked before the checker has read anything, which runs the generated program and answers calls.

Between them go plain values only (numbers, text, lists, …), length-prefixed JSON over two pipes. The candidate never holds the tests, the
verdict's file descriptor or an object of the checker, and what it returns is rebuilt from plain values, so an object that claims to equal
everything arrives as an object that equals nothing.
"""
import json
import os
import sys

__all__ = ["encode", "decode", "Opaque", "main"]

LARGEST_MESSAGE = 16 << 20  # bytes
LONGEST_ERROR = 300  # characters
PATIENCE = 3  # times the limit by the clock, for a program that has had little processor time in it
AWAKE = 0.005  # seconds of processor time within half a second that tell a program that waits for the processor from one that sleeps

# System calls that a candidate may not make, by number: other processes and programs, sockets, shared memory (outside the memory limit),
# name spaces, mounts, tracing, and the kernel's larger surfaces.
FORBIDDEN = {
    "x86_64": (0xC000003E, {
        "fork": 57, "vfork": 58, "clone": 56, "clone3": 435, "execve": 59, "execveat": 322, "socket": 41, "connect": 42,
        "shmget": 29, "shmat": 30, "msgget": 68, "semget": 64, "mq_open": 240, "memfd_create": 319, "memfd_secret": 447,
        "unshare": 272, "setns": 308, "chroot": 161, "pivot_root": 155, "mount": 165, "umount2": 166, "open_tree": 428, "move_mount": 429, "fsopen": 430,
        "mount_setattr": 442, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_open": 434, "pidfd_getfd": 438,
        "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425}),
    "aarch64": (0xC00000B7, {
        "clone": 220, "clone3": 435, "execve": 221, "execveat": 281, "socket": 198, "connect": 203,
        "shmget": 194, "shmat": 196, "msgget": 186, "semget": 190, "mq_open": 180, "memfd_create": 279, "memfd_secret": 447,
        "unshare": 97, "setns": 268, "chroot": 51, "pivot_root": 41, "mount": 40, "umount2": 39, "open_tree": 428, "move_mount": 429, "fsopen": 430,
        "mount_setattr": 442, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "pidfd_open": 434, "pidfd_getfd": 438,
        "add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425}),
}


class TimedOut(BaseException):
    "The wall clock ran out; no `except Exception` of a test may swallow it."


class Gone(BaseException):
    "The candidate's process ended, or talks nonsense."


class Opaque:
    "A value of the candidate that is no plain value: equals nothing, keeps only whether it was true."

    def __init__(self, name, true): self.name, self.true = name, true
    def __bool__(self): return self.true
    def __repr__(self): return f"<{self.name}>"


# ------------------------------------------------------------------------------------------------------------------ values

def encode(value):
    "A value as JSON knows it; sub-classes as the plain type they extend."
    from decimal import Decimal
    from fractions import Fraction
    if value is None or value is True or value is False: return value
    if isinstance(value, int): return ["int", format(int.__index__(value), "x")]
    if isinstance(value, float): return ["float", float.hex(value)]
    if isinstance(value, str): return str.__str__(value)
    if isinstance(value, complex): return ["complex", value.real.hex(), value.imag.hex()]
    if isinstance(value, (bytes, bytearray)): return [type(value).__mro__[-2].__name__, value.hex()]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind): return [kind.__name__, [encode(item) for item in kind.__iter__(value)]]
    if isinstance(value, dict): return ["dict", [[encode(key), encode(dict.__getitem__(value, key))] for key in dict.keys(value)]]
    if isinstance(value, Fraction): return ["fraction", format(value.numerator, "x"), format(value.denominator, "x")]
    if isinstance(value, Decimal): return ["decimal", str(value)]
    return ["opaque", type(value).__name__, bool(value)]


def decode(value):
    "The plain value that `encode` wrote; raises on anything else."
    if value is None or value is True or value is False or isinstance(value, str): return value
    kind, *rest = value
    if kind == "int": return int(rest[0], 16)
    if kind == "float": return float.fromhex(rest[0])
    if kind == "complex": return complex(*map(float.fromhex, rest))
    if kind in ("bytes", "bytearray"): return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(rest[0])
    if kind in ("list", "tuple", "set", "frozenset"): return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(item) for item in rest[0])
    if kind == "dict": return {decode(key): decode(item) for key, item in rest[0]}
    if kind == "opaque": return Opaque(str(rest[0]), rest[1] is True)
    if kind == "fraction":
        from fractions import Fraction
        return Fraction(int(rest[0], 16), int(rest[1], 16))
    if kind == "decimal":
        from decimal import Decimal
        return Decimal(rest[0])
    raise ValueError(f"no plain value: {str(kind)[:40]!r}")


# ---------------------------------------------------------------------------------------------------------------- messages

def send(fd, message):
    "Write one message."
    data = json.dumps(message).encode()
    data = len(data).to_bytes(8, "big") + data
    while data: data = data[os.write(fd, data):]


def receive(fd):
    "Read one message; `Gone` at the end of the pipe or where it is too long."
    size = int.from_bytes(read(fd, 8), "big")
    if size > LARGEST_MESSAGE: raise Gone(f"a value of {size} bytes, more than {LARGEST_MESSAGE}")
    return json.loads(read(fd, size))


def read(fd, size):
    "Exactly so many bytes."
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 16))
        if not part: raise Gone("ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# --------------------------------------------------------------------------------------------------------------- candidate

def forbid(machine):
    "Refuse the forbidden system calls from now on (seccomp); on a machine without a list nothing happens, and the sandbox's own probe finds out."
    import ctypes
    import struct
    if machine not in FORBIDDEN: return
    architecture, calls = FORBIDDEN[machine]
    refuse, kill, allow = 0x00050000 | 1, 0x80000000, 0x7FFF0000  # EPERM, kill, allow
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, kill), (0x20, 0, 0, 0)]  # load the architecture, compare, load the call's number
    if machine == "x86_64": program += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, refuse)]  # the x32 numbers reach the same calls
    for number in sorted(calls.values()): program += [(0x15, 0, 1, number), (0x06, 0, 0, refuse)]
    program.append((0x06, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP" if ctypes.sizeof(ctypes.c_void_p) == 8 else "HxxP", len(program), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.addressof(header), 0, 0):  # no new privileges; filter
        raise OSError(ctypes.get_errno(), "the system call filter was refused")


def limit(limits):
    "Resource limits of the candidate's process, hard and soft alike."
    import resource
    wanted = {"AS": limits["memory"], "CPU": limits["cpu"], "FSIZE": limits["file"], "NOFILE": 64, "NPROC": 0, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}
    for name, value in wanted.items(): resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def candidate(requests, replies):
    "The candidate's process: run the program, then answer calls until the pipe ends. Never returns."
    try:
        os.dup2(requests, 100), os.dup2(replies, 101)
        for fd in range(3): os.dup2(os.open(os.devnull, os.O_RDWR), fd)
        os.closerange(3, 100), os.closerange(102, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 65536 else 65536)
        os.dup2(100, 3), os.dup2(101, 4), os.closerange(5, 102)
        os.environ.clear()
        machine = os.uname().machine
        task = receive(3)
        limit(task["limits"])
        forbid(machine)
        namespace = {}
        reply = attempt(lambda: exec(compile(task["program"], "<string>", "exec"), namespace))
        while True:
            send(4, reply)
            call = receive(3)
            reply = attempt(lambda: eval(task["entry_point"], namespace)(*decode(call["args"]), **decode(call["kwargs"])))
    finally: os._exit(1)


def attempt(action):
    "The value of an action, or its error, as a message."
    try: return {"value": encode(action())}
    except BaseException as error: return {"error": type(error).__name__, "message": text_of(error)}


def text_of(error):
    "An error's message, shortened; errors can have broken messages."
    try: return str(error)[:LONGEST_ERROR]
    except BaseException: return ""


# ----------------------------------------------------------------------------------------------------------------- checker

def error_of(message):
    "The exception that a candidate's error becomes here: the builtin of that name, or a plain one. Those that end loops silently do not pass."
    import builtins
    kind = getattr(builtins, str(message["error"]), None)
    silent = (StopIteration, StopAsyncIteration)
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, silent): kind = RuntimeError
    try: return kind(str(message["message"]))
    except TypeError: return RuntimeError(str(message["message"]))


def ask(requests, replies, message):
    "One question to the candidate and its plain answer; raises what it raised."
    try: send(requests, message)
    except OSError: raise Gone("ended") from None
    try:
        reply = receive(replies)
        if "error" in reply: failure = error_of(reply)
        else: return decode(reply["value"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, MemoryError, ArithmeticError) as error:
        raise Gone(f"sent no plain value ({type(error).__name__})") from None
    raise failure


def helpers(prompt):
    "What the prompt itself defines: tests use its helper functions. A prompt that is no program alone gets an empty body."
    for text in (prompt, prompt + "\n    pass\n"):
        namespace = {}
        try:
            exec(compile(text, "<prompt>", "exec"), namespace)
            return namespace
        except SyntaxError: continue
    return {}


def verdict(task, requests, replies, child):
    "Load the program, run the tests against it; the reference's three words."
    import signal
    import time
    limit, began, working = task["limits"]["timeout"], time.monotonic(), [True]  # working: the tests, not the program

    def stop(number, frame):
        used = processor_time(child) + time.process_time()
        if used > 0.8 * limit or time.monotonic() - began > PATIENCE * limit or not working[0] and asleep(child): raise TimedOut
        signal.setitimer(signal.ITIMER_REAL, max(0.1, limit - used))  # a busy machine gave it less than its share

    def asked(message):
        working[0] = False
        try: return ask(requests, replies, message)
        finally: working[0] = True

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        try:
            asked({"program": task["program"], "entry_point": task["entry_point"], "limits": task["limits"]})
            namespace = helpers(task["prompt"])
            namespace[task["entry_point"]] = lambda *args, **kwargs: asked({"args": encode(args), "kwargs": encode(kwargs)})
            exec(compile(task["test"], "<test>", "exec"), namespace)
            namespace["check"](namespace[task["entry_point"]])
            result = "passed"
        except TimedOut: result = "timed out"
        except Gone as error: result = f"failed: {farewell(child, error)}"
        except BaseException as error: result = f"failed: {text_of(error)}"
        signal.setitimer(signal.ITIMER_REAL, 0)
    except TimedOut: result = "timed out"
    return result


def asleep(child):
    "Whether a process lets half a second pass without using the processor."
    import time
    before, end = processor_time(child), time.monotonic() + 0.5
    while time.monotonic() < end:
        time.sleep(0.01)
        if processor_time(child) > before + AWAKE: return False
    return True


def processor_time(child):
    "Seconds of processor time that a process has used; infinite where it is gone."
    import time
    try: return time.clock_gettime(~child << 3 | 2)  # the kernel's number of another process's processor clock
    except OSError: return float("inf")


def farewell(child, error):
    "How the candidate's process ended, in words."
    import signal
    if str(error) != "ended": return f"the program {error}" if str(error).startswith("sent") else str(error)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status >= 0: return f"the program left with exit code {status}"
    return "timed out on the processor" if -status == signal.SIGXCPU else f"the program was killed by {signal.Signals(-status).name}"


def main():
    "The checker's process. The candidate is forked first, before there is anything to inherit."
    import ctypes
    import resource
    import signal
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # not dumpable: no process of the same user may trace it or read its memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from_checker, requests = os.pipe()
    replies, to_checker = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(requests), os.close(replies)
        candidate(from_checker, to_checker)
    os.close(from_checker), os.close(to_checker)
    given, answer = os.dup(0), os.dup(1)
    for fd in range(3): os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    with os.fdopen(given, "rb") as stream: task = json.loads(stream.read())
    resource.setrlimit(resource.RLIMIT_AS, (task["limits"]["memory"] * 2,) * 2)
    os.write(answer, b"started\n")
    os.write(answer, json.dumps({"result": verdict(task, requests, replies, child)}).encode() + b"\n")
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)  # its processor time counts as the sandbox's
    except OSError: pass  # it had ended
    os._exit(0)


if __name__ == "__main__": main()
