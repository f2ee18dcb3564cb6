"""Files that grow while a conversion runs, and the conversion of large files on several cores.

A record's random numbers depend on how many records came before it, so parts of a file cannot simply be converted apart. Each worker therefore parses and
reads its part first, tells how many records it found, is told in return where it stands (records and the state of the generator), and only then lays
them out. Where records draw nothing and bring their own names, there is nothing to agree on. The result is the same to the byte, whatever the number of workers.
"""
import json, multiprocessing, os, random, re, sys
from collections import Counter
from io import BytesIO
from itertools import chain, islice
from json.encoder import encode_basestring_ascii as quoted
from multiprocessing.connection import wait
from pathlib import Path

from tulu_study.data.reading import DAMAGED, RECORD_SIZE, open_raw

BATCH = 512  # conversations that are counted and written together
BLOCK = 2 * 1024 * 1024  # bytes of a raw file that a worker converts at a time
LARGE = 32 * 1024 * 1024  # bytes of raw files from which several cores pay, unless a converter says otherwise
FIRST = re.compile(rb'(?:\xef\xbb\xbf)?\s*\[\s*\{\s*("(?:[^"\\]|\\.)*")')  # the beginning of a list of objects, up to the first one's first key
HEADS = {role: f'{{"role": "{role}", "content": ' for role in ("system", "user", "assistant")}
KEYS = ("role", "content")


class Growing:
    "A file that takes its name when it is whole; until then it is a hidden file beside it. A context manager: an exception leaves the old file as it was."

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.stream = open(self.part, "wb")
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self.stream.flush()
                os.fsync(self.stream.fileno())
        finally:
            self.stream.close()
            if kind is not None:
                self.part.unlink(missing_ok=True)

    def write(self, data: bytes):
        self.stream.write(data)

    def keep(self):
        "Give the finished file its name."
        os.replace(self.part, self.path)

    def drop(self):
        "Remove the finished file, and one of an earlier run with its name: there is nothing to tell."
        self.part.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class Ledger(Growing):
    "A list of rows that lies on disk: it can be appended to, and knows how many rows it has and how often each reason."

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.reasons = Counter()

    def __len__(self):
        return sum(self.reasons.values())

    def append(self, row: dict):
        self.reasons[row["reason"]] += 1
        self.write((json.dumps(row) + "\n").encode())


def json_line(dataset: str, name: str, messages: list) -> str:
    "The line of a conversation, whose dataset is a plain key: what `json.dumps` writes for it, put together from the texts alone."
    try:
        if len(messages) == 2 and tuple(messages[0]) == KEYS == tuple(messages[1]):  # one round: the usual case, in fewer steps
            (role, text), (other, answer) = messages[0].values(), messages[1].values()
            said = f"{HEADS[role]}{quoted(text)}}}, {HEADS[other]}{quoted(answer)}}}"
        elif all(tuple(message) == KEYS for message in messages):
            said = ", ".join([f"{HEADS[message['role']]}{quoted(message['content'])}}}" for message in messages])
        else:
            raise KeyError
        return f'{{"dataset": "{dataset}", "id": {quoted(name)}, "messages": [{said}]}}\n'
    except (KeyError, TypeError):
        return json.dumps({"dataset": dataset, "id": name, "messages": messages}) + "\n"


def write_conversations(made, dataset: str, tally, out, first: int = 0, lengths=None) -> int:
    "Write what a converter yields, counting and measuring it in passing; `first` is added to its numbers. Returns how many there were."
    n, made = 0, iter(made)
    while batch := list(islice(made, BATCH)):
        n += len(batch)
        named = [(f"{dataset}_{number + first if first else number}", messages) for number, messages in batch]
        tally.add(named)
        if lengths:
            lengths.add([messages for _, messages in named])
        out.write("".join([json_line(dataset, name, messages) for name, messages in named]).encode("ascii"))
    return n


class Unsplittable(Exception):
    "A file that cannot be converted in parts; it is converted in one piece instead."


def cores() -> int:
    "Cores that this process may use; one where processes cannot be forked safely."
    if sys.platform != "linux":
        return 1
    return len(os.sched_getaffinity(0))


def between(head: bytes) -> re.Pattern:
    "What stands between two objects of the JSON list that begins with `head`, or something that looks like it: the next one begins with the same key as the first."
    first = FIRST.match(head)
    return re.compile(rb"\}\s*,\s*(?=\{" + (rb"\s*" + re.escape(first[1]) if first else b"") + rb")")


def blocks_of(path: str | Path, lines: bool, size: int = BLOCK, *, large: int = LARGE):
    "Cut a raw file into parts, each a small file of the same kind, and at least four when it is large. Places between list items are guessed; the worker that reads the part before finds out."
    size = min(size, large // 4)
    with open_raw(path) as stream:
        try:
            if lines:
                if not (first := stream.read(size)):
                    yield b""  # an empty file has a reader too, who says so
                    return
                for i, block in enumerate(chain([first], iter(lambda: stream.read(size), b""))):
                    block += stream.readline(RECORD_SIZE)
                    if len(block) >= RECORD_SIZE or (i and block.startswith(b"\xef\xbb\xbf")):
                        raise Unsplittable
                    yield block
                return
            head, rest, entry = b"", b"", None
            while data := stream.read(size):
                rest += data
                entry = entry or between(rest)
                if len(rest) > RECORD_SIZE:
                    raise Unsplittable
                tail = max(0, len(rest) - 65536)
                if places := list(entry.finditer(rest, tail)):
                    yield head + rest[: places[-1].start() + 1] + b"]"
                    head, rest = b"[", rest[places[-1].end() :]
            yield head + rest
        except DAMAGED:
            raise Unsplittable from None


class Place:
    "A worker's side of the agreement: it says how many records its part has and is told where they stand."

    def __init__(self, connection, rng: random.Random, draws: int):
        self.connection, self.rng, self.draws, self.records, self.expected = connection, rng, draws, 0, rng.getstate()

    def agree(self, n_records: int):
        "Exchange counts for positions, and set the generator to where it would be. Without draws there is nothing to agree on."
        if not self.draws:
            return
        self.connection.send(("counted", n_records))
        self.records, state = self.connection.recv()
        self.rng.setstate(state)
        for _ in range(n_records * self.draws):
            self.rng.random()
        self.expected = self.rng.getstate()
        self.rng.setstate(state)


def serve(connection, others: list, task):
    "A worker's life: take a part, do the task, send the result, until the other end is closed."
    for other in others:
        other.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker has one core, and threads of the parent did not come along
    while True:
        try:
            file, block = connection.recv()
        except (EOFError, OSError):
            return
        try:
            found = ("done", task(file, BytesIO(block), connection))
        except BaseException as error:
            found = ("failed", error)
        try:
            connection.send(found)
        except (BrokenPipeError, ConnectionError):
            return


class WorkerLost(RuntimeError):
    "A worker ended before its part was converted."


class Pool:
    "Workers that convert the parts of files; a context manager that ends them. What `task` refers to is shared with the workers, and is best complete before."

    def __init__(self, workers: int, task):
        self.workers, self.task, self.members = workers, task, []

    def __enter__(self):
        context = multiprocessing.get_context("fork")
        for _ in range(self.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, [*(connection for connection, _ in self.members), ours], self.task), daemon=True)
            process.start()
            theirs.close()
            self.members.append((ours, process))
        return self

    def __exit__(self, *_):
        for connection, process in self.members:
            connection.close()
            process.terminate()
            process.join()

    def talk(self, connection, method: str, *what):
        "Send to a worker or receive from it; WorkerLost when there is nobody at the other end."
        try:
            return getattr(connection, method)(*what)
        except (EOFError, OSError):
            process = next(process for ours, process in self.members if ours is connection)
            process.join(5)
            code = process.exitcode
            how = f"was ended by signal {-code}" if code and code < 0 else f"ended with code {code}"
            raise WorkerLost(f"a worker of the conversion (process {process.pid}, one of {self.workers}) {how} before its part was done; nothing was written. "
                             "Signal 9 usually means that memory ran out: convert again with fewer workers (workers=1 needs none)") from None

    def results(self, blocks, rng: random.Random, draws: int):
        "Yield the result of each part (file name, bytes) in the order given. An exception of a worker is raised here."
        blocks, busy, counts, done = enumerate(blocks), {}, {}, {}
        agreed, records, given, finished = 0, 0, 0, False
        while True:
            for connection, _ in self.members:
                if not finished and connection not in busy and len(done) < 2 * self.workers:
                    number, block = next(blocks, (None, None))
                    finished = number is None
                    if not finished:
                        busy[connection] = number
                        self.talk(connection, "send", block)
            if not busy:
                return
            for connection in wait(list(busy)):
                kind, found = self.talk(connection, "recv")
                if kind == "failed":
                    raise found
                if kind == "done":
                    done[busy.pop(connection)] = found
                else:
                    counts[busy[connection]] = (connection, found)
            while agreed in counts:
                connection, n_records = counts.pop(agreed)
                self.talk(connection, "send", (records, rng.getstate()))
                for _ in range(n_records * draws):
                    rng.random()
                agreed, records = agreed + 1, records + n_records
            while given in done:
                yield done.pop(given)
                given += 1
