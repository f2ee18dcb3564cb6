"""The state of a fine-tuning on disk, so that the same command continues where a killed one stood.

A state is a folder `<out_dir>/state/step-00000042` with DeepSpeed's shards (weights, master weights, moments), the schedule, the random generators of every rank, the
Trainer's counters, from which the position in the data follows, and the log so far. It is written under another name, its checksums last, and renamed: what has the name
is whole, and what is damaged afterwards is found out. It names the settings, data, base model and code that it belongs to; no other training continues from it."""
import ast, contextlib, functools, json, os, shutil, time
from array import array
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from tulu_study.core.files import hash_json, sha256_file, write_atomic

KEPT = 2                       # states on disk, the newest ones
CHECKSUMS = "checksums.json"   # of a state, written last
PROGRESS = "progress"          # beside the states: the launcher's last line about a step
ELSEWHERE = ("__init__", "base", "cards", "launch", "pretrain", "scale", "verification", "weight_diff")   # modules of this package that decide nothing about the training itself
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate")


def state_root(out_dir) -> Path:   # the folder of all states of a training
    return Path(out_dir) / "state"


def finished_states(root: Path) -> list[Path]:
    "Every folder with the name of a whole state, newest first."
    return sorted((path for path in root.glob("step-*") if path.is_dir()), reverse=True)


# ---- whose state it is

def rows_hash(rows: list) -> str:
    "Hash encoded conversations: data, sample, tokenizer, template and truncation at once."
    digest = sha256()
    for row in rows:
        for name in ("input_ids", "labels"): digest.update(array("q", [len(row[name]), *row[name]]).tobytes())
    return digest.hexdigest()


def folder_hash(folder: Path) -> str:
    "Hash names, sizes, and the first and last mebibyte of every file: enough to tell two base models apart, in a second for the largest."
    digest = sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.is_file() and p.suffix in (".safetensors", ".bin", ".json", ".model", ".jinja") and p.name not in ("manifest.json", "attempt.json", "result.json")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(size - (1 << 20), 0))
            digest.update(file.read())
    return digest.hexdigest()


def code_hash() -> str:
    "Hash the syntax trees of the modules that train: comments and layout do not count."
    here = Path(__file__).parent
    return hash_json({path.stem: ast.dump(ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(here.glob("*.py")) if path.stem not in ELSEWHERE})


def identity(config, rows: list) -> dict:
    "What a state must agree in before a training continues from it."
    return {"settings": json.loads(json.dumps(config.science())), "data": rows_hash(rows), "base model": folder_hash(config.base_dir), "code": code_hash(),
            "versions": {name: version(name) for name in PACKAGES}}


def inputs_of(config) -> dict:
    "Hashes of what a fine-tuning is made from, found without encoding anything."
    return {"data": sha256_file(Path(config.data_file)), "base model": folder_hash(config.base_dir), "code": code_hash()}


def differences(mine: dict, theirs: dict) -> str:
    "Name what two identities disagree in; empty where they agree."
    found = []
    for part in mine:
        one, other = mine[part], theirs.get(part)
        if one == other: continue
        if not isinstance(one, dict) or not isinstance(other, dict): found.append(f"other {part}")
        else: found += [f"{name} {other.get(name)!r}, now {one.get(name)!r}" for name in {**one, **other} if one.get(name) != other.get(name)]
    return "; ".join(found[:4])


# ---- the ranks act as one

def gathered(value) -> list:
    "Every rank's value, on every rank."
    from torch import distributed
    if not distributed.is_initialized() or distributed.get_world_size() == 1: return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def files_of(folder: Path) -> list[str]:   # relative names, in order
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)


def checksums(folder: Path, names: list[str], rank: int, ranks: int, flush: bool = False) -> dict:
    "Hash a rank's share of a state's files."
    found = {}
    for name in names[rank::ranks]:
        path = folder / name
        if flush:
            with open(path, "rb") as file: os.fsync(file.fileno())
        found[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return found


# ---- reading

def read_record(folder: Path) -> dict | None:
    "A state's checksums and identity, None where they cannot be read."
    try: record = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError): return None
    return record if isinstance(record, dict) and {"identity", "files", "step"} <= set(record) else None


def damage(folder: Path, record: dict, rank: int, ranks: int) -> str:
    "Say what is wrong with a rank's share of a state's files, empty where they are whole. Sizes first: most damage is a cut."
    for name in sorted(record["files"])[rank::ranks]:
        path, expected = folder / name, record["files"][name]
        if not path.is_file(): return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]: return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
        if sha256_file(path) != expected["sha256"]: return f"the checksum of {name} is another one"
    return ""


def choose(
    root: Path,     # folder of the states
    mine,           # () -> identity of the training that asks; called only where there is a state
    rank: int,      # of this process
    ranks: int,     # processes
    say,            # shows a line
) -> tuple:         # (folder, record) of the newest whole state of this training, (None, None) without one
    "Find the state to continue from. All ranks take part and decide alike; what is passed over is named."
    names = gathered([path.name for path in finished_states(root)] if rank == 0 else None)[0]
    foreign, broken, own = set(), 0, gathered(mine() if rank == 0 and names else None)[0]
    for folder in (root / name for name in names):
        record = gathered(read_record(folder) if rank == 0 else None)[0]
        why = f"its {CHECKSUMS} cannot be read" if record is None else ""
        if record is not None and (other := differences(own, record["identity"])):
            foreign.add(other)
            continue
        why = next(filter(None, gathered(why or damage(folder, record, rank, ranks))), "")
        if not why: return folder, record
        broken += 1
        say(f"warning: the state in {folder.name} is damaged ({why}); trying the one before it")
    for other in sorted(foreign): say(f"warning: a state of another training is not used ({other}); it is kept until this one is finished")
    if broken: say("warning: no whole state is left; the training starts anew")
    elif foreign: say("the training starts anew")
    return None, None


# ---- writing

@contextlib.contextmanager
def collected(engine, problems: list):
    "While DeepSpeed saves: collect what goes wrong in writing instead of raising it, because the other ranks wait for this one at the next barrier."
    writer = getattr(engine, "checkpoint_engine", None)
    if writer is None:
        yield
        return
    original = writer.save

    @functools.wraps(original)
    def save(*args, **kwargs):
        try: return original(*args, **kwargs)
        except (OSError, RuntimeError) as error: problems.append(error)
    writer.save, engine._copy_recovery_script = save, lambda *_: None   # a script that turns shards into weights is of no use here
    try: yield
    finally: del writer.save, engine._copy_recovery_script


def attempt(problems: list, action) -> None:
    "Do something that may fail for want of space; keep the reason."
    if problems: return
    try: action()
    except (OSError, RuntimeError) as error: problems.append(error)


def first_problem(problems: list) -> str:
    "The reason that any rank has, the same on all of them."
    said = f"{type(problems[0]).__name__}: {problems[0]}".splitlines()[0][:200] if problems else ""
    return next(filter(None, gathered(said)), "")


def seal(part: Path, folder: Path, identity: dict) -> None:
    "Give a complete state its name. Another training's state of that step gets a longer one; a damaged one is removed."
    if folder.exists():
        record = read_record(folder)
        if record and differences(identity, record["identity"]): os.replace(folder, folder.with_name(f"{folder.name}.{hash_json(record)[:8]}"))
        else: shutil.rmtree(folder)
    os.rename(part, folder)
    place = os.open(folder.parent, os.O_RDONLY)
    try: os.fsync(place)
    finally: os.close(place)


def write_state(
    root: Path,      # folder of the states
    step: int,       # optimiser steps made
    identity: dict,  # whose state it is
    facts: dict,     # what else belongs in its record
    parts,           # (folder, problems, first) -> None: writes this rank's files, `first` for what only one rank writes
    rank: int,       # of this process
    ranks: int,      # processes
    shards: str,     # name of the folder that DeepSpeed writes into, made here because all ranks wait for it
) -> str:            # why there is no new state, empty where there is one
    "Write a state; all ranks take part. Where one cannot write, nobody keeps the new state, the old ones stay, and the training may go on."
    part, folder, problems = root / f".step-{step:08d}.part", root / f"step-{step:08d}", []

    def prepare():
        for old in root.glob(".step-*.part"): shutil.rmtree(old)
        (part / shards).mkdir(parents=True)
    if rank == 0: attempt(problems, prepare)
    if not (why := first_problem(problems)):
        parts(part, problems, rank == 0)
        why = first_problem(problems)
    if not why:
        names, sums = gathered(files_of(part) if rank == 0 else None)[0], {}
        attempt(problems, lambda: sums.update(checksums(part, names, rank, ranks, flush=True)))
        files = {name: entry for share in gathered(sums) for name, entry in share.items()}
        if rank == 0:
            attempt(problems, lambda: write_atomic(part / CHECKSUMS, json.dumps({"step": step, "identity": identity, **facts, "files": files}, indent=1)))
            attempt(problems, lambda: seal(part, folder, identity))
        why = first_problem(problems)
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        if not why: rotate(root, identity, folder.name)
    return why


def rotate(root: Path, identity: dict, newest: str) -> None:
    "Keep the newest states of this training up to the one just written; later ones were damaged. What belongs to another training stays until this one is finished: whoever takes a setting back continues there."
    mine = 0
    for folder in finished_states(root):
        record = read_record(folder)
        if record and differences(identity, record["identity"]): continue
        mine += (own := record is not None and folder.name[:len(newest)] <= newest)
        if not own or mine > KEPT: shutil.rmtree(folder, ignore_errors=True)


def remove(root: Path) -> None:
    "Remove all states: the training is finished and its checkpoint verified."
    shutil.rmtree(root, ignore_errors=True)


# ---- when

class Clock:
    "Says when the next state is due. Only the first rank's answer counts; the ranks' answers are added up, so that all save at the same step."

    def __init__(self, minutes: float, steps: int):
        self.minutes, self.steps, self.last = minutes, steps, time.monotonic()

    def due(self, step: int) -> bool:
        by_time = self.minutes > 0 and time.monotonic() - self.last >= 60 * self.minutes
        return by_time or self.steps > 0 and step % self.steps == 0

    def saved(self) -> None: self.last = time.monotonic()
