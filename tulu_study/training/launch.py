"Start the ranks of a fine-tuning, show their progress, end them with this process, and return when the checkpoint has been verified."
import collections, contextlib, json, os, re, shlex, signal, subprocess, sys, tempfile, threading, time
from pathlib import Path

from tulu_study.core.process import PATIENCE, job_nodes, start_child
from .config import MARK, FinetuneConfig, TrainingError, TrainingInterrupted
from .resume import PROGRESS, inputs_of, state_root

PORT = 29400     # where the agents of several nodes meet, outside Slurm
PORTS = range(20000, 32000)   # and in a Slurm job: one of these by its number. From 32768 on Linux hands ports out itself
STEP = re.compile(r"step (\d+)/(\d+)  loss (\S+)  .*?([\d,]+) tokens/s")   # what the trainer says of an optimiser step
LINES = 30       # of progress in an executed notebook, at most some more
SETTINGS = "settings.json"   # in the checkpoint's folder while several nodes train: all of them must see it


def command_for(
    config: FinetuneConfig,   # with the number of ranks
    settings_file: Path,      # the configuration as JSON
    launcher: str = "auto",   # auto | torchrun | direct
) -> list[str]:               # program and arguments
    "The command that trains. One rank needs no launcher (two seconds saved): it gets torchrun's environment variables."
    trainer = ["-m", "tulu_study.training.finetune", str(settings_file)]
    if launcher == "direct" or launcher == "auto" and config.ranks == 1: return [sys.executable, *trainer]
    if config.nodes > 1: return [*srun_for(config), *agent_for(config, settings_file, f"{first_host(_allocation()[1])}:{PORTS[int(os.environ['SLURM_JOB_ID']) % len(PORTS)]}", os.environ["SLURM_JOB_ID"])]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.ranks}", f"--shutdown-timeout={PATIENCE}", *trainer]


def agent_for(
    config: FinetuneConfig,   # with ranks and nodes
    settings_file: Path,      # on a disk that all nodes see
    endpoint: str,            # host:port of the first node, where the agents meet
    run_id: str,              # the same for all of them
) -> list[str]:               # program and arguments, the same on every node
    "torchrun for one of several nodes. Which ranks a node gets is decided when they meet."
    return [sys.executable, "-m", "torch.distributed.run", f"--nnodes={config.nodes}", f"--nproc-per-node={config.ranks // config.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}",
            f"--rdzv-id={run_id}", "--max-restarts=0", f"--shutdown-timeout={PATIENCE}", "-m", "tulu_study.training.finetune", str(settings_file)]


def srun_for(config: FinetuneConfig) -> list[str]:
    "Slurm's way to start one process on each node of the job that this process runs in. What srun does not take from the job by itself is said."
    submitted = "SLURM_JOB_NUM_NODES" not in os.environ   # by Snakemake, which takes the variables away; with the processors of `slurm_resources`
    cpus = config.ranks // config.nodes * config.threads if submitted else os.environ.get("SLURM_CPUS_PER_TASK")
    return ["srun", f"--nodes={config.nodes}", f"--ntasks={config.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--export=ALL", *([f"--cpus-per-task={cpus}"] if cpus else [])]


def _allocation() -> tuple[int, str]:   # nodes, and their names in Slurm's short form
    "What the job has. TrainingError where Slurm does not say."
    granted, names = job_nodes()
    if not names: raise TrainingError(f"Slurm does not say which nodes job {os.environ['SLURM_JOB_ID']} has (squeue): run the same command again when it answers")
    return granted, names


def first_host(
    nodes: str,   # as in SLURM_JOB_NODELIST, e.g. "gpu[007-009,12],login1"
) -> str:         # "gpu007"
    "Name the first host of Slurm's short form of a list."
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)[0])


def _check_nodes(config: FinetuneConfig) -> None:
    "Several nodes need something that starts a process on each: Slurm does, else a person."
    job = os.environ.get("SLURM_JOB_ID")
    if config.nodes == 1 or job and (granted := _allocation()[0]) >= config.nodes: return
    if job: raise TrainingError(f"nodes: found {config.nodes}, and this Slurm job ({job}) has {granted}: ask for --nodes={config.nodes}, or let `tulu-study run` submit the cell ([executor] profile = slurm)")
    file = config.save(Path(config.out_dir) / SETTINGS)
    command = shlex.join(agent_for(config, file, f"FIRST_NODE:{PORT}", config.model or Path(config.out_dir).name))
    raise TrainingError(f"nodes: found {config.nodes}, and this process is not in a Slurm job, so nothing here can start the others. Set [executor] profile = slurm, take nodes 1, "
                        f"or run this on each of the {config.nodes} nodes, with the first one's name for FIRST_NODE and folders that all of them see (it is done when verification.json is in {config.out_dir}):\n{command}")


def environment_for(config: FinetuneConfig, direct: bool) -> dict:
    "Threads pinned, the CPU named where there is no GPU, and for a single rank what torchrun would set."
    env = {**os.environ, "OMP_NUM_THREADS": str(config.threads), "MKL_NUM_THREADS": str(config.threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
           "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "DS_DISABLE_CONFIG_PRINT": "true",
           "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}   # torchrun passes them on
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists(): env |= {"DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "passive"}   # waiting threads leave the core to others
    else: env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH", "")]))
    if direct: env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}   # 0: whichever port is free when it is taken; nobody else has to know it
    return env


def launch(
    config: FinetuneConfig | dict,   # what to train
    launcher: str = "auto",          # auto | torchrun | direct
    echo=None,                       # takes each line that the trainer says; None = a progress bar, or a few lines in an executed notebook
) -> list[dict]:                     # the checks of the saved checkpoint, {check, found, expected, passed}
    "Fine-tune in processes of their own. Raises TrainingError with the setting to change, or with the trainer's last lines."
    config = config if isinstance(config, FinetuneConfig) else FinetuneConfig(**config)
    _check_inputs(config)
    if checks := finished(config): return checks
    _clear_places(config)
    _check_nodes(config)
    echo = echo or Progress(Path(config.out_dir))
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        command = command_for(config, config.save(Path(config.out_dir if config.nodes > 1 else folder) / SETTINGS), launcher)
        env = environment_for(config, direct="torch.distributed.run" not in command)
        process = start_child(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)   # an interrupt that goes to a whole group is this process's to hand on
        ask = Asking(process, config.nodes)
        try:
            with _signals_to(ask): said, last, stopped = _follow(process, echo)
        except BaseException:
            _end(process, ask)
            raise
    checks = Path(config.out_dir) / "verification.json"
    if config.nodes > 1:
        (Path(config.out_dir) / SETTINGS).unlink(missing_ok=True)
        for _ in range(30):   # another node wrote it: a network disk may take its time
            if process.returncode or stopped or checks.exists(): break
            time.sleep(1)
    if stopped: raise TrainingInterrupted(f"fine-tuning {config.model or config.data or Path(config.out_dir).name} was {stopped}")
    if process.returncode and ask.asked and not said: raise TrainingInterrupted(f"fine-tuning {config.model or config.data or Path(config.out_dir).name} was asked to stop and ended with status {process.returncode} before it said what it saved")
    if process.returncode or not checks.exists(): raise TrainingError(_why(process.returncode, said, last, config))
    return json.loads(checks.read_text())


def finished(config: FinetuneConfig) -> list[dict] | None:
    "The checks of a checkpoint that is there already, made of the same data and base model with the same settings and code; None for anything else."
    from .base import BaseModelError, inspect_base
    out = Path(config.out_dir)
    try:
        trained, checks = (json.loads((out / name).read_text(encoding="utf-8")) for name in ("trained.json", "verification.json"))
        inspect_base(out)
    except (OSError, ValueError, BaseModelError): return None
    same = trained.get("settings") == json.loads(json.dumps(config.science())) and all(check["passed"] for check in checks) and (out / "seconds.json").exists()
    return checks if same and trained.get("inputs") == inputs_of(config) else None


def _check_inputs(config: FinetuneConfig) -> None:
    "Look for the inputs, and at how long a text the base model can take."
    from .lora import NO_CUDA
    missing = [f"{what} {place}" for what, place in (("base model", config.base_dir), ("data file", config.data_file)) if not Path(place).exists()]
    if missing: raise TrainingError(f"not there: {' and '.join(missing)}: make the base model and convert the data first")
    if config.lora.get("qlora") and config.nodes == 1 and not Path("/dev/nvidiactl").exists(): raise TrainingError(NO_CUDA)
    try: positions = json.loads((Path(config.base_dir) / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    except (OSError, ValueError): return   # loading says what is wrong with it
    if positions and config.max_seq_length > positions:
        raise TrainingError(f"max_seq_length: found {config.max_seq_length}, but the base model {config.base or config.base_dir} has {positions} positions (max_position_embeddings in its config.json): take {positions} or less")


def _clear_places(config: FinetuneConfig) -> None:
    "Remove what an earlier run left in the output folder."
    from .finetune import clear
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    clear(out)


class Asking:
    """Asks a trainer to save its state and leave, once: torchrun gives up on its ranks when it is asked again while it waits for them.

    On several nodes the child is srun, which kills its tasks on SIGTERM and hands SIGUSR1 on."""

    def __init__(self, process: subprocess.Popen, nodes: int):
        self.process, self.sign, self.asked = process, signal.SIGUSR1 if nodes > 1 else signal.SIGTERM, False

    def __call__(self, *_) -> None:
        before, self.asked = self.asked, True
        if not before: self.process.send_signal(self.sign)


@contextlib.contextmanager
def _signals_to(ask):
    "Ask the trainer to stop on SIGTERM and SIGUSR1, and go on waiting: it saves its state and leaves by itself."
    if threading.current_thread() is not threading.main_thread():   # Python allows handlers in the main thread alone
        yield
        return
    before = {one: signal.signal(one, ask) for one in (signal.SIGTERM, signal.SIGUSR1)}
    try: yield
    finally:
        for one, handler in before.items(): signal.signal(one, handler)


class Progress:
    """Shows what a trainer says: its steps as a bar with loss, tokens per second and the time that is left; in a notebook that papermill executes, where nobody sees a
    bar move, as some thirty lines. The last step is also noted beside the saved states, for whoever runs the cell."""

    def __init__(self, out_dir: Path):
        self.note, self.bar, self.due = state_root(out_dir) / PROGRESS, None, 0.0

    def __call__(self, text: str) -> None:
        found = STEP.match(text)
        if not found: return self.say(text)
        step, total = int(found[1]), int(found[2])
        with contextlib.suppress(OSError): self.note.write_text(text)   # there is no folder once the training is finished
        if os.environ.get("TULU_CELL"):
            if step >= self.due or step == total: self.say(text)
            if step >= self.due: self.due = step + total / LINES
            return
        from tqdm.auto import tqdm
        if self.bar is None: self.bar = tqdm(total=total, initial=step - 1, desc="fine-tuning", unit="step")
        self.bar.set_postfix({"loss": found[3], "tokens/s": found[4]}, refresh=False)
        self.bar.update(step - self.bar.n)
        if step == total: self.bar.close()

    def say(self, text: str) -> None:
        "Print a line above the bar."
        self.bar.write(text) if self.bar is not None else print(text, flush=True)


def _follow(process: subprocess.Popen, echo) -> tuple[list[str], list[str], str]:
    "Show the trainer's own lines as they come; keep the reasons it gives, the last lines of everything else, and what it says when it stopped because it was asked to."
    said, last, stopped = [], collections.deque(maxlen=25), ""
    for line in process.stdout:
        line = line.rstrip()
        at = line.find(MARK)
        if at < 0: last.append(line) if line.strip() else None
        elif (text := line[at + len(MARK):].strip()).startswith("error:"): said.append(text.removeprefix("error:").strip())
        elif text.startswith("interrupted:"): stopped = text
        else: echo(text)
    process.wait()
    return said, list(last), stopped


def _end(process: subprocess.Popen, ask: Asking) -> None:
    "Stop the trainer: gently for as long as a step and a state may take, at once where that is interrupted too."
    try:
        ask()
        with contextlib.suppress(OSError): print("stopping: the training saves its state; interrupt again to end it at once", flush=True)
        process.communicate(timeout=PATIENCE)   # reads on: a trainer that nobody listens to would wait
    except subprocess.TimeoutExpired: pass
    finally:
        process.kill()
        process.wait()


def _why(code: int, said: list[str], last: list[str], config: FinetuneConfig) -> str:
    "The message for a training that failed."
    name = config.model or config.data or Path(config.out_dir).name
    if said: return f"fine-tuning {name} failed: {said[0]}"
    killed = -code if code < 0 else next((9 for line in last if "exitcode: -9" in line.replace(" ", "").replace("exitcode:-9", "exitcode: -9")), 0)
    if killed == signal.SIGKILL:
        return (f"fine-tuning {name} was killed (signal 9), most likely because memory ran out: lower micro_batch_size (now {config.micro_batch_size}) or max_seq_length "
                f"(now {config.max_seq_length}), set gradient_checkpointing, or take fewer cells at a time (TULU_JOBS)")
    return f"fine-tuning {name} ended with status {code}; its last lines:\n" + "\n".join(last)
