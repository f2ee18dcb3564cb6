"The benchmarks of conversion run and compare identical output. How fast anything is, no test asks: `make bench-data` does."
import json, re, subprocess, sys

import pytest

from helpers import ROOT
from tulu_study.data.llama_tokenizer import awkward_texts, make_fast
from tulu_study.world.sources import write_raw


def bench(name, *arguments):
    return subprocess.run([sys.executable, str(ROOT / "bench" / name), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_conversion_against_the_plain_loop():
    done = bench("data.py", "--records", 400, "--repeats", 1, "--scale", 0.01)
    assert done.returncode in (0, 1), done.stderr
    assert re.search(r"outputs of all three +identical", done.stdout) and done.stdout.count("growth from 1 × to 20 ×") == 2
    verdicts = re.findall(r"target: at (?:most|least) [\d.]+, (met|MISSED)", done.stdout)
    assert len(verdicts) == 4 and done.returncode == ("MISSED" in verdicts)


def test_sharegpt_against_sentencepiece_one_text_at_a_time(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    paths = write_raw("sharegpt", tmp_path / "raw", n=40)
    texts = [turn["value"] for path in paths.values() for row in json.loads(path.read_text(encoding="utf-8")) for turn in row["conversations"]]
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    with open(folder / "tokenizer.model", "wb") as out:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts + awkward_texts(300)), model_writer=out, vocab_size=600, model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
                                                 normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True)
    make_fast(folder / "tokenizer.model", folder)
    done = bench("sharegpt.py", "--tokenizer", folder, "--source", tmp_path / "raw", "--rounds", 1, "--max-length", 256, "--cores", 1)
    assert done.returncode in (0, 1) and re.search(r"1 core: 80 raw conversations .* identical files", done.stdout), done.stdout + done.stderr
