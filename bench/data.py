"""Benchmark of the conversion, against a straightforward implementation of the same rule in the same run.

    python bench/data.py                     # 1,000,000 synthetic records
    python bench/data.py --records 200000    # smaller

(a) peak memory of a conversion at 1 and at 20 times the size of the Dolly file, in one process and, summed over all processes, on all cores: it should not grow;
(b) synthetic Alpaca records, validation included, against a loop that reads the whole list, draws a template, and writes JSON: per core, and on all cores.

Everything is generated. Each measurement is a process of its own; both sides alternate, and the median of the repetitions counts. The outputs of both sides are compared byte for byte.
Each row that has a target says what it is. Exit code 1: a target was missed.
"""
import argparse, hashlib, json, os, random, re, statistics, subprocess, sys, tempfile, threading, time
from pathlib import Path

WORDS = ("the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you were her all she there would their we him been has when who will no "
         "more if out so said what up its about into than them can only other new some could time these two may then do first any my now such like our over man me even most made after also did many").split()
DOLLY_RECORDS = 15_011
GROWTH, RATIO = 1.25, 0.80  # targets: memory at most, speed at least


def sentence(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(WORDS, k=n)).capitalize() + "."


def write_alpaca(path: Path, n: int):
    "A JSON list in the layout of alpaca_data.json, with texts of its lengths."
    rng = random.Random(0)
    with open(path, "w") as out:
        for i in range(n):
            row = {"instruction": sentence(rng, rng.randrange(6, 18)), "input": sentence(rng, rng.randrange(5, 20)) if rng.random() < 0.4 else "", "output": sentence(rng, rng.randrange(5, 90))}
            body = json.dumps(row, indent=4).replace("\n", "\n    ")
            out.write(("[\n    " if i == 0 else ",\n    ") + body)
        out.write("\n]")


def write_dolly(path: Path, n: int):
    "JSON lines in Dolly's layout, with texts of its lengths."
    rng = random.Random(0)
    with open(path, "w") as out:
        for _ in range(n):
            row = {"instruction": sentence(rng, 12), "context": sentence(rng, rng.randrange(80, 350)) if rng.random() < 0.3 else "", "response": sentence(rng, rng.randrange(5, 120)), "category": "qa"}
            out.write(json.dumps(row) + "\n")


def plain(source: str, target: str):
    "The rule in the most direct way: read all, draw, format, write. It checks nothing and reports nothing."
    from tulu_study.data.templates import WITH_INPUT, WITHOUT_INPUT
    rng = random.Random(42)
    with open(source, encoding="utf-8") as stream:
        rows = json.load(stream)
    with open(target, "w", encoding="utf-8") as out:
        for i, row in enumerate(rows):
            table = WITH_INPUT if row["input"].strip() else WITHOUT_INPUT
            template = rng.choices(table, weights=[entry.weight for entry in table])[0]
            prompt = template.prompt.format(instruction=row["instruction"].strip(), input=row["input"].strip())
            answer = template.completion.format(output=row["output"].strip())
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"dataset": "stanford_alpaca", "id": f"stanford_alpaca_{i}", "messages": messages}) + "\n")


class Peak(threading.Thread):
    "The largest memory of this process and its children together, in MiB: proportional shares, so that pages which a fork shares count once; looked at every 20 ms."

    def __init__(self):
        super().__init__(daemon=True)
        self.largest, self.ended = 0.0, threading.Event()

    def look(self):
        import psutil
        process, total = psutil.Process(), 0
        for each in [process, *process.children()]:
            try:
                total += each.memory_full_info().pss
            except psutil.Error:
                continue  # it ended meanwhile
        self.largest = max(self.largest, total / 2**20)

    def run(self):
        while not self.ended.wait(0.02):
            self.look()


def processor_seconds() -> float:
    "Of this process and of its children that have ended, to the microsecond."
    import resource
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def measured(side: str, source: str, target: str, workers: int):
    "Run one side in this process; print seconds (wall, CPU of this process and its children) and peak memory in MiB."
    os.environ["TQDM_DISABLE"] = "1"
    from tulu_study.data import convert  # both sides pay for the import before the clock starts
    from tulu_study.data.conversion import find_converter
    import numpy  # the report counts hashes with it
    from tulu_study.core.params import datasets
    find_converter(side if side != "plain" else "stanford_alpaca"), datasets()
    watch = Peak()
    if side == "dolly":  # looking costs time, which is not measured there
        watch.start()
    wall, cpu = time.perf_counter(), processor_seconds()
    if side == "plain":
        plain(source, target)
    else:
        convert(side, Path(source).parent, target, workers=workers)
    spent = processor_seconds() - cpu
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    watch.ended.set()
    if side == "dolly":
        watch.look()  # a conversion that is over before the first look has a peak all the same
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": spent, "peak": peak, "together": watch.largest}))


def run(side: str, source: Path, target: Path, workers: int = 1) -> dict:
    "A measurement in a fresh process."
    command = [sys.executable, __file__, "--measure", side, str(source), str(target), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def same(one: Path, other: Path) -> bool:
    return len({hashlib.file_digest(open(path, "rb"), "sha256").hexdigest() for path in (one, other)}) == 1


def memory(folder: Path, scale: float) -> list:  # rows (what, value, target, whether it was met; None where there is none)
    "Peak memory at 1 and 20 times Dolly, in one process and on all cores."
    rows, peaks, cores = [], {}, len(os.sched_getaffinity(0))
    for times in (1, 20):
        source = folder / f"dolly{times}" / "databricks-dolly-15k.jsonl"
        source.parent.mkdir()
        write_dolly(source, int(DOLLY_RECORDS * times * scale))
        one, every = run("dolly", source, folder / f"out{times}"), run("dolly", source, folder / f"all{times}", cores)
        made = [folder / f"{name}{times}" / "dolly" / "dolly_data.jsonl" for name in ("out", "all")]
        if not same(*made):
            raise SystemExit("the outputs differ: no comparison")
        peaks[times] = one["peak"], every["together"]
        rows.append((f"peak memory at {times} × Dolly ({source.stat().st_size / 1e6:.0f} MB), 1 process; {cores} workers and their parent together", f"{one['peak']:.0f} MiB; {every['together']:.0f} MiB", "", None))
    for place, what in enumerate(("1 process", f"{cores} workers and their parent together")):
        growth = peaks[20][place] / peaks[1][place]
        rows.append((f"growth from 1 × to 20 ×, {what}", f"{growth:.2f} ×", f"at most {GROWTH}", growth <= GROWTH))
    return rows


def speed(folder: Path, n: int, repeats: int) -> list:
    "Records a second, against the plain loop."
    source, cores = folder / "alpaca" / "alpaca_data.json", len(os.sched_getaffinity(0))
    source.parent.mkdir()
    write_alpaca(source, n)
    sides = [("plain", "plain", folder / "plain.jsonl", 1), ("one", "stanford_alpaca", folder / "one", 1), ("all", "stanford_alpaca", folder / "all", cores)]
    times = {name: [] for name, *_ in sides}
    for _ in range(repeats):
        for name, side, target, workers in sides:
            times[name].append(run(side, source, target, workers))
    made = [folder / "plain.jsonl", *(folder / name / "stanford_alpaca" / "stanford_alpaca_data.jsonl" for name in ("one", "all"))]
    if not (same(made[0], made[1]) and same(made[0], made[2])):
        raise SystemExit("the outputs differ: no comparison")
    ratio = lambda key, name: statistics.median([base[key] / own[key] for base, own in zip(times["plain"], times[name])])
    median = lambda key, name: statistics.median([found[key] for found in times[name]])
    per_core = {name: ratio("cpu", name) for name in ("one", "all")}
    rows = [(f"plain loop, {n:,} records ({source.stat().st_size / 1e6:.0f} MB)", f"{median('cpu', 'plain'):.1f} s", "", None),
            ("conversion with validation, 1 process", f"{median('cpu', 'one'):.1f} s", "", None),
            ("speed per core against the plain loop (CPU time)", f"{per_core['one']:.2f} ×", f"at least {RATIO}", per_core["one"] >= RATIO),
            (f"conversion with validation, {cores} cores, elapsed", f"{median('wall', 'all'):.1f} s", f"plain {median('wall', 'plain'):.1f} s", None),
            (f"speed on {cores} cores against the plain loop (elapsed)", f"{ratio('wall', 'all'):.2f} ×", f"{cores} × {RATIO} = {RATIO * cores:.1f} on an idle machine", None),
            ("speed per core on all cores (CPU time)", f"{per_core['all']:.2f} ×", f"at least {RATIO}", per_core["all"] >= RATIO)]
    peaks = {name: median("peak", name) for name in times}
    return rows + [("peak memory: plain, 1 process", f"{peaks['plain']:.0f}, {peaks['one']:.0f} MiB", "", None), ("outputs of all three", "identical", "", None)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000, help="synthetic Alpaca records")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions, of which the median counts")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the Dolly file in (a), 1 = 15,011 records")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        return measured(*given.measure[:3], int(given.measure[3]))
    with tempfile.TemporaryDirectory() as folder:
        rows = memory(Path(folder), given.scale) + speed(Path(folder), given.records, given.repeats)
    wide = max(len(name) for name, *_ in rows)
    for name, value, target, met in rows:
        print(f"{name:{wide}}  {value:>20}  {target if met is None else f'target: {target}, ' + ('met' if met else 'MISSED')}".rstrip())
    return int(any(met is False for *_, met in rows))


if __name__ == "__main__":
    sys.exit(main())
