"""Benchmark of the conversion, against a straightforward implementation of the same rule in the same run.

    python bench/data.py                     # 1,000,000 synthetic records
    python bench/data.py --records 200000    # smaller

(a) peak memory of a conversion at 1 and at 20 times the size of the Dolly file: it should not grow;
(b) synthetic Alpaca records, validation included, against a loop that reads the whole list, draws a template, and writes JSON: per core, and on all cores.

Everything is generated. Each measurement is a process of its own; both sides alternate, and the median of the repetitions counts. The outputs of both sides are compared byte for byte.
"""
import argparse, hashlib, json, os, random, re, statistics, subprocess, sys, tempfile, time
from pathlib import Path

WORDS = ("the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you were her all she there would their we him been has when who will no "
         "more if out so said what up its about into than them can only other new some could time these two may then do first any my now such like our over man me even most made after also did many").split()
DOLLY_RECORDS = 15_011


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


def measured(side: str, source: str, target: str, workers: int):
    "Run one side in this process; print seconds (wall, CPU of this process and its children) and peak memory in MiB."
    os.environ["TQDM_DISABLE"] = "1"
    from tulu_study.data import convert  # both sides pay for the import before the clock starts
    from tulu_study.data.conversion import find_converter
    import numpy  # the report counts hashes with it
    from tulu_study.core.params import datasets
    find_converter(side if side != "plain" else "stanford_alpaca"), datasets()
    wall, cpu = time.perf_counter(), os.times()
    if side == "plain":
        plain(source, target)
    else:
        convert(side, Path(source).parent, target, workers=workers)
    spent = [after - before for after, before in zip(os.times()[:4], cpu[:4])]
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": sum(spent), "peak": peak}))


def run(side: str, source: Path, target: Path, workers: int = 1) -> dict:
    "A measurement in a fresh process."
    command = [sys.executable, __file__, "--measure", side, str(source), str(target), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def same(one: Path, other: Path) -> bool:
    return len({hashlib.file_digest(open(path, "rb"), "sha256").hexdigest() for path in (one, other)}) == 1


def memory(folder: Path, scale: float) -> list:
    "Peak memory at 1 and 20 times Dolly."
    rows, peaks = [], []
    for times in (1, 20):
        source = folder / f"dolly{times}" / "databricks-dolly-15k.jsonl"
        source.parent.mkdir()
        write_dolly(source, int(DOLLY_RECORDS * times * scale))
        peaks.append(run("dolly", source, folder / f"out{times}")["peak"])
        rows.append((f"peak memory at {times} × Dolly ({source.stat().st_size / 1e6:.0f} MB)", f"{peaks[-1]:.0f} MiB", ""))
    return rows + [("growth from 1 × to 20 ×", f"{peaks[1] / peaks[0]:.2f} ×", "at most 1.25")]


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
    rows = [(f"plain loop, {n:,} records ({source.stat().st_size / 1e6:.0f} MB)", f"{median('cpu', 'plain'):.1f} s", ""),
            ("conversion with validation, 1 process", f"{median('cpu', 'one'):.1f} s", ""),
            ("speed per core against the plain loop (CPU time)", f"{ratio('cpu', 'one'):.2f} ×", "at least 0.80"),
            (f"conversion with validation, {cores} cores, elapsed", f"{median('wall', 'all'):.1f} s", f"plain {median('wall', 'plain'):.1f} s"),
            (f"speed on {cores} cores against the plain loop (elapsed)", f"{ratio('wall', 'all'):.2f} ×", f"{cores} × 0.80 = {0.8 * cores:.1f} on an idle machine"),
            ("speed per core on all cores (CPU time)", f"{ratio('cpu', 'all'):.2f} ×", "at least 0.80")]
    peaks = {name: median("peak", name) for name in times}
    return rows + [("peak memory: plain, 1 process", f"{peaks['plain']:.0f}, {peaks['one']:.0f} MiB", ""), ("outputs of all three", "identical", "")]


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
    for name, value, expected in rows:
        print(f"{name:{wide}}  {value:>16}  {f'(expected: {expected})' if expected.startswith('at') or '×' in expected else expected}")


if __name__ == "__main__":
    main()
