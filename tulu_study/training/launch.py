"Start the ranks of a fine-tuning, show their progress, end them with this process, and return when the checkpoint has been verified."
import collections, contextlib, json, os, signal, socket, subprocess, sys, tempfile, threading
from pathlib import Path

from tulu_study.core.process import start_child
from .config import MARK, FinetuneConfig, TrainingError, TrainingInterrupted

PATIENCE = 600   # seconds that a trainer gets to finish its step and save its state after SIGTERM


def command_for(
    config: FinetuneConfig,   # with the number of ranks
    settings_file: Path,      # the configuration as JSON
    launcher: str = "auto",   # auto | torchrun | direct
) -> list[str]:               # program and arguments
    "The command that trains. One rank needs no launcher (two seconds saved): it gets torchrun's environment variables."
    trainer = ["-m", "tulu_study.training.finetune", str(settings_file)]
    if launcher == "direct" or launcher == "auto" and config.ranks == 1: return [sys.executable, *trainer]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.ranks}", f"--shutdown-timeout={PATIENCE}", *trainer]


def environment_for(config: FinetuneConfig, direct: bool) -> dict:
    "Threads pinned, the CPU named where there is no GPU, and for a single rank what torchrun would set."
    env = {**os.environ, "OMP_NUM_THREADS": str(config.threads), "MKL_NUM_THREADS": str(config.threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
           "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "DS_DISABLE_CONFIG_PRINT": "true",
           "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}   # torchrun passes them on
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists(): env |= {"DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "passive"}   # waiting threads leave the core to others
    else: env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH", "")]))
    if direct: env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return env


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(
    config: FinetuneConfig | dict,   # what to train
    launcher: str = "auto",          # auto | torchrun | direct
    echo=print,                      # shows a line of progress
) -> list[dict]:                     # the checks of the saved checkpoint, {check, found, expected, passed}
    "Fine-tune in processes of their own. Raises TrainingError with the setting to change, or with the trainer's last lines."
    config = config if isinstance(config, FinetuneConfig) else FinetuneConfig(**config)
    _check_places(config)
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        command = command_for(config, config.save(Path(folder) / "settings.json"), launcher)
        env = environment_for(config, direct="torch.distributed.run" not in command)
        process = start_child(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        try:
            with _signals_to(process): said, last, stopped = _follow(process, echo)
        except BaseException:
            _end(process)
            raise
    checks = Path(config.out_dir) / "verification.json"
    if stopped: raise TrainingInterrupted(f"fine-tuning {config.model or config.data or Path(config.out_dir).name} was {stopped}")
    if process.returncode or not checks.exists(): raise TrainingError(_why(process.returncode, said, last, config))
    return json.loads(checks.read_text())


def _check_places(config: FinetuneConfig) -> None:
    "Look for the inputs, and remove what an earlier run left in the output folder."
    from .finetune import clear
    missing = [f"{what} {place}" for what, place in (("base model", config.base_dir), ("data file", config.data_file)) if not Path(place).exists()]
    if missing: raise TrainingError(f"not there: {' and '.join(missing)}: make the base model and convert the data first")
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    clear(out)


@contextlib.contextmanager
def _signals_to(process: subprocess.Popen):
    "Hand SIGTERM and SIGUSR1 on to the trainer and go on waiting: it saves its state and leaves by itself."
    if threading.current_thread() is not threading.main_thread():   # Python allows handlers in the main thread alone
        yield
        return
    hand_on = lambda *_: process.send_signal(signal.SIGTERM)
    before = {one: signal.signal(one, hand_on) for one in (signal.SIGTERM, signal.SIGUSR1)}
    try: yield
    finally:
        for one, handler in before.items(): signal.signal(one, handler)


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


def _end(process: subprocess.Popen) -> None:
    "Stop the trainer, gently first."
    for stop in (process.terminate, process.kill):
        stop()
        try: return process.wait(timeout=60) and None   # a step and a state
        except subprocess.TimeoutExpired: continue


def _why(code: int, said: list[str], last: list[str], config: FinetuneConfig) -> str:
    "The message for a training that failed."
    name = config.model or config.data or Path(config.out_dir).name
    if said: return f"fine-tuning {name} failed: {said[0]}"
    killed = -code if code < 0 else next((9 for line in last if "exitcode: -9" in line.replace(" ", "").replace("exitcode:-9", "exitcode: -9")), 0)
    if killed == signal.SIGKILL:
        return (f"fine-tuning {name} was killed (signal 9), most likely because memory ran out: lower micro_batch_size (now {config.micro_batch_size}) or max_seq_length "
                f"(now {config.max_seq_length}), set gradient_checkpointing, or take fewer cells at a time (TULU_JOBS)")
    return f"fine-tuning {name} ended with status {code}; its last lines:\n" + "\n".join(last)
