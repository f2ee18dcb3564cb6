"Fixtures that several tests share."
import os

import pytest

# The files that take minutes. Two processes share the tests, a file at a time: the long ones come first, so that neither process waits for the other at the end.
LONG = ("test_readme", "test_smoke", "test_faults", "test_resume", "test_parity", "test_finetune", "test_canonical", "test_sandbox")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project root of its own, with an empty nbs/runs."
    (tmp_path/"settings.ini").write_text("[project]\nname = tulu-study\n")
    (tmp_path/"params").mkdir()
    (tmp_path/"nbs"/"runs").mkdir(parents=True)
    for name in list(os.environ):
        if name.startswith("TULU_"): monkeypatch.delenv(name)
    monkeypatch.setenv("TULU_ROOT", str(tmp_path))
    return tmp_path
