"LLaMA's tokenizer is a source: found, fetched, made into an exact fast version, and missed early."
import json, os, subprocess, sys
from pathlib import Path

import pytest

from helpers import ROOT
from tulu_study.core.grid import Grid
from tulu_study.core.params import Study, tokenizers
from tulu_study.core.settings import settings
from tulu_study.core.sources import SourceError
from tulu_study.data import llama_tokenizer
from tulu_study.data.llama_tokenizer import awkward_texts, differences, fast_version, make_fast, tokenizer_folder

MIRROR = Path(os.environ.get("TULU_MIRROR") or ROOT.parent / "shared" / "mirror")
LLAMA = MIRROR / "tokenizers" / "llama"
real = pytest.mark.skipif(not (LLAMA / "tokenizer.model").is_file(), reason="LLaMA's tokenizer is not on this machine (TULU_MIRROR)")
sentencepiece = pytest.importorskip("sentencepiece")


@pytest.fixture
def model(tmp_path):
    "A small SentencePiece file made like LLaMA's."
    file = tmp_path / "small.model"
    with open(file, "wb") as out:  # made of the texts that it is compared on
        texts = [" ".join(["river", "lake", "mountain"][n % 3] * (n % 4 + 1) for n in range(i, i + 30)) + "  " * (i % 9) for i in range(300)] + awkward_texts(300)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=out, vocab_size=320, model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
                                                 normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True)
    return file


@pytest.fixture
def site(tmp_path, monkeypatch):
    "No sources root, and a cache of its own."
    monkeypatch.setenv("TULU_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TULU_SOURCES", raising=False)
    return tmp_path


@real
def test_llamas_fast_version_is_the_exact_one():
    processor = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA / "tokenizer.model"))
    made, known = json.loads(fast_version(processor)), json.loads((LLAMA / "tokenizer.json").read_text(encoding="utf-8"))
    assert made == known and len(made["model"]["merges"]) == 61249
    from tokenizers import Tokenizer
    fast = Tokenizer.from_str(json.dumps(made))
    texts = [json.loads(line)["response"] for line, _ in zip(open(MIRROR / "dolly" / "databricks-dolly-15k.jsonl", encoding="utf-8"), range(1500))]
    assert differences(fast, processor, texts + awkward_texts(2000, seed=1)) == []


@real
def test_the_record_names_the_file_that_is_here():
    import hashlib
    [file] = tokenizers()["llama"].files
    data = (LLAMA / "tokenizer.model").read_bytes()
    assert (file.sha256, file.size) == (hashlib.sha256(data).hexdigest(), len(data))


def test_a_tokenizer_is_taken_from_the_sources_or_fetched_and_made_once(model, site, monkeypatch):
    root = site / "sources" / "tokenizers" / "llama"
    root.mkdir(parents=True)
    (root / "tokenizer.model").write_bytes(model.read_bytes())
    made = tokenizer_folder("tokenizers/llama", site / "sources")
    assert made == settings().cache / "tokenizers/llama" and (made / "tokenizer.json").is_file()
    monkeypatch.setattr(llama_tokenizer, "make_fast", None)   # not made again
    assert tokenizer_folder("tokenizers/llama", site / "sources") == made
    (root / "tokenizer.json").write_text("{}")
    assert tokenizer_folder("tokenizers/llama", site / "sources") == root
    assert tokenizer_folder("") is None and tokenizer_folder(str(site)) == site


def test_a_conversion_that_is_not_exact_is_an_error(model, site, monkeypatch):
    whole = llama_tokenizer.merges_of
    monkeypatch.setattr(llama_tokenizer, "merges_of", lambda processor: whole(processor)[::-1])
    with pytest.raises(SourceError, match="otherwise than SentencePiece.*expected none"):
        make_fast(model, site / "made")
    assert not (site / "made").exists()


def test_a_study_without_the_tokenizer_says_so_early_and_hands_its_record_to_the_cells(site):
    study = Study(study="t", title="t", models={"7B": {"base": "llama-7b", "data": ["vanilla", "dolly"]}}, benchmarks={})
    grid = Grid(study, settings())
    assert grid["convert-dolly"].params["tokenizer_dir"] == "tokenizers/llama"
    assert "tokenizers/llama is not here: it will be downloaded from oobabooga/llama-tokenizer" in grid.without_tokenizer()
    assert list(grid["convert-dolly"].identity["tokenizer_files"].values()) == [tokenizers()["llama"].files[0].sha256]
    (site / "cache" / "tokenizers" / "llama").mkdir(parents=True)
    (site / "cache" / "tokenizers" / "llama" / "tokenizer.json").write_text("{}")
    assert grid.without_tokenizer() == ""
    other = Grid(study.model_copy(update={"tokenizer": "tokenizers/none"}), settings())
    assert other["convert-dolly"].params["tokenizer_dir"] == "" and "no download is known" in other.without_tokenizer()


def test_the_command_shows_it(site):
    done = subprocess.run([sys.executable, "-m", "tulu_study", "sources", "tokenizers/llama"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "oobabooga/llama-tokenizer" in done.stdout and "checksum" in done.stdout and "tokenizer.model" in done.stdout
