"""Golden cases as pytest parameters, and the line that says how many were really checked."""
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import handlers  # noqa: E402  (the folder beside this file)

TALLY = {"checked": 0, "not yet": 0, "cannot be rebuilt": 0}
REASONS = []   # why a case could not be rebuilt


def golden_is_here():
    "Absent golden files skip the tests, except where somebody named a folder that does not exist."
    for variable, folder in (("TULU_GOLDEN", handlers.GOLDEN), ("TULU_MIRROR", handlers.MIRROR)):
        if os.environ.get(variable) and not folder.is_dir():
            raise pytest.UsageError(f"{variable}={os.environ[variable]}: no such folder")
    return handlers.GOLDEN.is_dir() and handlers.MIRROR.is_dir()


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    if not golden_is_here():
        skip = pytest.mark.skip(reason="golden files not on this machine (TULU_GOLDEN, TULU_MIRROR)")
        metafunc.parametrize("case", [pytest.param(None, marks=skip, id="absent")])
        return
    every, names = list(handlers.cases()), []
    for case in every:
        taken = sum(name.split("#")[0] == case.name for name in names)
        names.append(f"{case.name}#{taken + 1}" if taken else case.name)
    metafunc.parametrize("case", every, ids=names)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" and (verdict := getattr(item, "parity_verdict", None)):
        report.user_properties.append(("parity", [*verdict, item.callspec.id]))   # travels from a worker process to the one that counts


def pytest_runtest_logreport(report):
    for name, value in report.user_properties if report.when == "call" else ():
        if name == "parity":
            kind, why, case = value
            TALLY[kind] += 1
            if kind == "cannot be rebuilt":
                REASONS.append(f"{case}: {why}")


@pytest.fixture
def verdict(request):
    "A test tells the tally what became of its case: checked, not yet, cannot be rebuilt."
    def tell(kind, reason=""):
        request.node.parity_verdict = (kind, reason)
    return tell


def pytest_terminal_summary(terminalreporter):
    if any(TALLY.values()) or (golden_is_here() and any("parity" in str(a) for a in terminalreporter.config.args)):
        terminalreporter.write_line("parity: " + ", ".join(f"{kind} {n}" for kind, n in TALLY.items()))
        for file in (handlers.VECTORS, *handlers.MIRROR_FILES):
            if not (handlers.GOLDEN / file).exists():
                terminalreporter.write_line(f"  absent: {file}")
        for reason in REASONS:
            terminalreporter.write_line(f"  cannot be rebuilt: {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workerinput"):   # one of several processes: the one that started them counts
        return
    items = getattr(session, "items", None)
    asked = any("parity" in str(a) for a in session.config.args) or (any("case" in getattr(item, "fixturenames", ()) for item in items) if items is not None else session.config.args == session.config.getini("testpaths"))
    chosen = session.config.option.keyword or session.config.option.collectonly
    if asked and not chosen and golden_is_here() and not TALLY["checked"] and exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
