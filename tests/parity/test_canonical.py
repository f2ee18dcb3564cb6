"""HumanEval's own solutions in the sandbox: all of them pass, wrong answers do not, and running the tests in the program's process says the same."""
import ast
import gzip
import json
import random
import resource
import shutil

import pytest

from handlers import MIRROR
from tulu_study.core.files import sha256_file
from tulu_study.core.params import benchmarks
from tulu_study.evaluation.codex_eval import check_of, read_problems
from tulu_study.evaluation.sandbox import Check, run_checks

FILE = MIRROR / "humaneval" / "HumanEval.jsonl.gz"
pytestmark = [pytest.mark.skipif(not FILE.is_file(), reason="HumanEval is not on this machine (TULU_MIRROR)"),
              pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed: sudo make system-deps")]


@pytest.fixture(scope="module")
def problems(): return read_problems(FILE)


def test_file_is_read_as_it_is(problems):
    assert problems == [json.loads(line) for line in gzip.open(FILE, "rt", encoding="utf-8")]
    registered = next(file for file in benchmarks()["codex_eval"].files if file.name == FILE.name)
    if sha256_file(FILE) == "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef":   # the published one
        assert len(problems) == 164 and (registered.sha256, registered.size) == (sha256_file(FILE), FILE.stat().st_size)


def test_all_canonical_solutions_pass(problems):
    "… and 164 problems x 20 completions take two processors less than four minutes, by the processor time of one round (other work on the machine does not count)."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = dict(run_checks([(row["task_id"], check_of(row, row["canonical_solution"], timeout=10.0)) for row in problems]))
    assert found.keys() == {row["task_id"] for row in problems} and {name: result for name, result in found.items() if result != "passed"} == {}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 0 < 20 * seconds / 2 < 240 * len(problems) / 164, f"{seconds:.1f} s for {len(problems)} checks"


def test_answering_nothing_passes_nowhere(problems):
    stream = random.Random(1)
    found = dict(run_checks([(row["task_id"], check_of(row, stream.choice(["    return None\n", "    pass\n", "\n    return object()\n"]), timeout=10.0)) for row in problems]))
    assert {name: result for name, result in found.items() if result == "passed"} == {}


class Mutate(ast.NodeTransformer):
    "Change the n-th thing that can be changed: a comparison, an operation, a constant."
    def __init__(self, wanted): self.wanted, self.seen = wanted, 0

    def change(self, node, changed):
        self.generic_visit(node)
        self.seen += 1
        return changed(node) if self.seen - 1 == self.wanted else node

    def visit_Compare(self, node):
        other = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
        return self.change(node, lambda n: ast.Compare(n.left, [other.get(type(n.ops[0]), type(n.ops[0]))(), *n.ops[1:]], n.comparators))

    def visit_BinOp(self, node):
        other = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.FloorDiv, ast.FloorDiv: ast.Div, ast.Div: ast.FloorDiv}
        return self.change(node, lambda n: ast.BinOp(n.left, other.get(type(n.op), type(n.op))(), n.right))

    def visit_Constant(self, node):
        return self.change(node, lambda n: ast.Constant(n.value + 1 if type(n.value) is int else not n.value if type(n.value) is bool else n.value))


def mutant(row, stream):
    "The canonical solution with one small change, as a whole program."
    tree = ast.parse(row["prompt"] + row["canonical_solution"])
    counter = Mutate(-1)
    counter.visit(ast.parse(row["prompt"] + row["canonical_solution"]))
    return ast.unparse(ast.fix_missing_locations(Mutate(stream.randrange(max(1, counter.seen))).visit(tree))) + "\n"


def test_checker_and_program_apart_say_what_one_process_says(problems, size=60):
    "The reference runs program and tests in one interpreter; here that is done inside the sandbox too, with the tests at the end of the program."
    stream = random.Random(5)
    chosen = stream.sample(problems, min(size, len(problems)))
    mutants = {row["task_id"]: mutant(row, stream) for row in chosen}
    apart = {("apart", row["task_id"]): Check(row["prompt"], mutants[row["task_id"]], row["test"], row["entry_point"]) for row in chosen}  # defines everything again
    together = {("together", row["task_id"]): Check("", f"{mutants[row['task_id']]}\n{row['test']}\ncheck({row['entry_point']})\n", "def check(candidate): pass", row["entry_point"]) for row in chosen}
    found = dict(run_checks([*apart.items(), *together.items()]))
    words = {key: result.split(":")[0] for key, result in found.items()}
    differing = {name: (found["apart", name], found["together", name]) for name in mutants if words["apart", name] != words["together", name]}
    assert differing == {}
    assert {"passed", "failed"} <= {words["apart", name] for name in mutants}  # the changes are neither all harmless nor all fatal
