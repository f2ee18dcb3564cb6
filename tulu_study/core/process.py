"Processes that end together: a killed study leaves no orphan that goes on writing."
import contextlib, ctypes, datetime, fcntl, math, os, signal, subprocess, sys, threading, time

PR_SET_PDEATHSIG = 1
PATIENCE = 600   # seconds that a trainer gets to finish its step and save its state after SIGTERM


def die_with_parent(
    parent: int | None = None,   # process id of the parent, where the caller was told; None = whoever it is now
) -> None:
    """Ask for this process to end when its parent does, however the parent ends.

    On Linux the kernel sends SIGKILL at the moment of the parent's death; elsewhere a thread looks once a second. A parent that died before the call is noticed
    where its id is given."""
    expected = parent or os.getppid()
    if sys.platform == "linux": ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else: threading.Thread(target=_watch, args=(expected,), daemon=True, name="die-with-parent").start()
    if os.getppid() != expected: os._exit(137)


def _watch(parent: int) -> None:
    "Leave as soon as the parent is another one."
    while os.getppid() == parent: time.sleep(1)
    os._exit(137)


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


def ask_slurm(
    what: str,        # squeue's fields, "%D %N"
    tries: int = 1,   # with ever longer pauses between them: a busy controller answers late
) -> str:             # its answer, "" where nobody gives one
    "Ask Slurm about the job that this process runs in: Snakemake starts a cell without most of the variables that Slurm sets."
    for pause in (0, 5, 20, 60)[:tries]:
        time.sleep(pause)
        try: said = subprocess.run(["squeue", "-h", "-j", os.environ["SLURM_JOB_ID"], "-o", what], capture_output=True, text=True, timeout=30)
        except (KeyError, FileNotFoundError): return ""
        except (OSError, subprocess.TimeoutExpired): continue
        if said.returncode == 0: return said.stdout.strip()
    return ""


def job_nodes() -> tuple[int, str]:   # how many, and their names in Slurm's short form; 0 and "" where nobody says
    "Which nodes the Slurm job that this process runs in has."
    if (said := os.environ.get("SLURM_JOB_NUM_NODES", "")).isdigit(): return int(said), os.environ.get("SLURM_JOB_NODELIST", "")
    said, _, names = ask_slurm("%D %N", tries=4).partition(" ")
    return (int(said), names) if said.isdigit() else (0, "")


def job_end() -> float | None:   # seconds since the epoch, None where Slurm does not say
    "When the time of the Slurm job that this process runs in is over. Limits change, and pre-emption sets a new one."
    try: return datetime.datetime.fromisoformat(ask_slurm("%e")).timestamp()
    except ValueError: return None


def stop_in_time(
    seconds: int,   # before the end of the job; 0 = never
) -> None:
    """In a Slurm job, send this process SIGTERM before the job's time is over; elsewhere do nothing.

    The warning that Slurm can be asked for goes to job steps or to the batch shell, and a cell is neither. Where less than twice the seconds is left, half of it passes first."""
    if seconds and os.environ.get("SLURM_JOB_ID"): threading.Thread(target=_stop_in_time, args=(seconds,), daemon=True, name="end-of-job").start()


def _stop_in_time(seconds: int) -> None:
    "Ask once a minute when the job ends, wait for the moment, say so, and stop this process. What the job was told when it began counts until Slurm says something."
    told = os.environ.get("SLURM_JOB_END_TIME", "")
    end, moment = None, math.inf
    while True:
        said = job_end() or (float(told) if end is None and told.isdigit() else end)
        now = time.time()
        if said and said > now and said != end: end, moment = said, max(said - seconds, (now + said) / 2)
        if moment - now <= 90: break   # a minute, and as long as Slurm may take to answer
        time.sleep(60)
    time.sleep(max(moment - time.time(), 0))
    print(f"the time of Slurm job {os.environ['SLURM_JOB_ID']} is over in {end - time.time():.0f} s: stopping", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


class Held(RuntimeError):
    "A lock that another process holds; the text is that process's id, as far as it left one."


@contextlib.contextmanager
def hold(
    path,   # the lock file, made where it is missing; it stays
):
    "Hold a lock for the length of a block. The kernel gives it back when its holder dies, so that nothing has to be unlocked by hand. Raises Held at once where another process has it."
    with open(path, "a+") as lock:
        try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Held(lock.read().strip() or "unknown") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
