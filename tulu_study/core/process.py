"Processes that end together: a killed study leaves no orphan that goes on writing."
import ctypes, os, signal, subprocess, sys, threading, time

PR_SET_PDEATHSIG = 1


def die_with_parent(
    watch: int | None = None,   # process id to outlive by at most a second, None = the parent
) -> None:
    """Ask for this process to end when its parent does, however the parent ends.

    On Linux the kernel sends SIGKILL at the moment of the parent's death. Elsewhere, and for a parent that had died before the call, a
    thread looks once a second."""
    parent = watch or os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if watch is None and os.getppid() != parent: os._exit(137)
    if watch is not None or sys.platform != "linux":
        threading.Thread(target=_watch, args=(parent, watch is None), daemon=True, name="die-with-parent").start()


def _watch(pid: int, is_parent: bool) -> None:
    "Leave as soon as `pid` is gone."
    while True:
        if (os.getppid() != pid) if is_parent else not alive(pid): os._exit(137)
        time.sleep(1)


def alive(
    pid: int,   # a process id
) -> bool:      # whether a process of that id exists and is not a zombie
    "Tell whether a process still runs."
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    except PermissionError: return True
    try: return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError: return True


def start_child(
    command: list[str],   # program and arguments
    **options,            # as for subprocess.Popen
) -> subprocess.Popen:    # the running child, which the kernel ends when the calling thread's process dies
    "Start a process that dies with this one."
    return subprocess.Popen(command, preexec_fn=_tie if sys.platform == "linux" else None, **options)


def _tie() -> None:
    "Between fork and exec in the child: end with the parent."
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
