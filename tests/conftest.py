"Fixtures that several tests share."
import os

import pytest


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
