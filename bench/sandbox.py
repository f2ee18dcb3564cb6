"""How fast generated code is checked: HumanEval's 164 problems, 20 completions of each, in the sandbox.

    make bench-sandbox [SOURCES=<folder of raw files>]

Of every problem's completions a half is its own solution and the other half returns nothing; each has another comment, so that no result is reused. All of the first must pass, and whatever passes of
the others must be a problem whose tests accept None. What is measured is the whole of `run_checks`: a sandbox for each program, on all cores. Run it on an idle machine: wall time is the number.
"""
import argparse, os, platform, resource, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tulu_study.core.params import benchmarks
from tulu_study.core.sources import fetch
from tulu_study.evaluation import sandbox
from tulu_study.evaluation.codex_eval import check_of, read_problems

TARGET = 240    # seconds for 164 x 20 checks on two cores


def completions(problem: dict, samples: int) -> list[str]:
    "The solution and a program that returns nothing, in turns, each with a comment of its own."
    bodies = (problem["canonical_solution"], "    return None\n")
    return [f"    # sample {number}\n{bodies[number % 2]}" for number in range(samples)]


def measure(problems: list, samples: int, workers: int) -> dict:
    "Run all checks; seconds by the clock, processor seconds, and what they said."
    checks = [((number, sample), check_of(problem, text)) for number, problem in enumerate(problems) for sample, text in enumerate(completions(problem, samples))]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    results = dict(sandbox.run_checks(checks, workers))
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    missed = [problems[number]["task_id"] for (number, sample), said in results.items() if sample % 2 == 0 and said != "passed"]
    return {"checks": len(checks), "wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "missed": missed,
            "nothing passed": sum(said == "passed" for (_, sample), said in results.items() if sample % 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", default=os.environ.get("TULU_SOURCES", ""), help="folder of raw files; empty = the site's, cache, download")
    parser.add_argument("--problems", type=int, default=164)
    parser.add_argument("--samples", type=int, default=20)
    given = parser.parse_args()
    sandbox.require()
    problems = read_problems(fetch(benchmarks()["codex_eval"], names=["HumanEval.jsonl.gz"], root=given.sources or None)["HumanEval.jsonl.gz"])[:given.problems]
    workers = len(os.sched_getaffinity(0))
    found = measure(problems, given.samples, workers)
    load = os.getloadavg()[0]
    print(f"{found['checks']:,} checks in {found['wall']:.0f} s by the clock ({found['checks'] / found['wall']:.0f} a second), {found['cpu']:.0f} s of processor time; {workers} cores, {platform.machine()}, Python {platform.python_version()}, load {load:.1f}")
    print(f"{len(problems) * ((given.samples + 1) // 2) - len(found['missed'])} of {len(problems) * ((given.samples + 1) // 2)} solutions passed; {found['nothing passed']} programs that return nothing passed")
    if found["missed"]: sys.exit(f"solutions that did not pass: {', '.join(sorted(set(found['missed'])))}")
    whole = given.problems >= 164 and given.samples >= 20
    if whole: print(f"target, on two idle cores: {TARGET} s; {'met' if found['wall'] < TARGET else 'not shown by this run' if load > workers else 'missed'} (processor time alone, on two cores: {found['cpu'] / 2:.0f} s)")


if __name__ == "__main__": main()
