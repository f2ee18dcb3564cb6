"""A checkpoint's card from its settings, with scores; and what may be published. No network: the hub's client is a stand-in."""
import json

import pytest
from huggingface_hub import ModelCard

from finetunings import fork, place, train  # noqa: F401 (fixtures)
from tulu_study.training import cards
from tulu_study.training.cards import CardError, model_card, push, update_card
from tulu_study.training.config import FinetuneConfig

FACTS = {"conversations": 15011, "steps": 234, "tokens": 3_000_000, "supervised_tokens": 1_200_000}
SCORE = {"model": "13B-dolly", "benchmark": "gsm", "version": 1, "setting": "cot", "setting_name": "EM 8-shot CoT", "metric": "exact_match", "unit": "percent", "protocol": "paper", "chat": True,
         "value": 12.5, "low": 8.0, "high": 17.5, "interval": {"method": "bootstrap over examples", "level": 0.95}, "n": 200, "n_errors": 2, "seed": 42, "judge": None, "stand_in": None}


def config(**changes):
    return FinetuneConfig(**{"base_dir": "b", "data_file": "d", "out_dir": "o", "model": "13B-dolly", "base": "llama-13b", "data": "dolly", **changes})


@pytest.fixture
def checkpoint(train, tmp_path):
    import shutil
    folder = tmp_path / "13B-dolly"
    shutil.copytree(train("carded", model="13B-dolly", base="nano-llama-s", data="dolly"), folder)
    return folder


def test_what_a_card_says():
    text = model_card(config(lora={"rank": 8}), FACTS)
    card = ModelCard(text)
    assert card.data.datasets == ["databricks/databricks-dolly-15k"] and card.data.pipeline_tag == "text-generation" and card.data.license == "other" and "lora" in card.data.tags
    assert "CC BY-SA 3.0" in text and "LLaMA licence" in text and "15,011 conversations" in text and "| learning_rate | 2e-05 |" in text and "base_dir" not in text
    assert 'arxiv:2306.04751' in card.data.tags and "<|assistant|>\n" in text


def test_a_mix_and_data_of_nobodys():
    from tulu_study.core.params import mixes
    key, record = next((k, m) for k, m in mixes().items() if len(m.parts) > 2)
    assert all(part.licence in model_card(config(data=key), FACTS) for part in cards.parts_of(key)) and len(cards.parts_of(key)) == len(record.parts)
    assert "datasets:" not in model_card(config(data="mine", base="own"), FACTS).split("---")[1]


def test_a_finished_checkpoint_has_card_and_generation_config(checkpoint):
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.library_name == "transformers" and "# 13B-dolly" in card.text
    said = json.loads((checkpoint / "generation_config.json").read_text())
    assert said["eos_token_id"] == 2 and said["pad_token_id"] == 259


def test_scores_become_a_model_index(checkpoint, tmp_path):
    update_card(checkpoint, [SCORE])
    (tmp_path / "scores").mkdir()
    for name, one in (("gsm-cot", SCORE), ("mmlu-0shot", {**SCORE, "benchmark": "mmlu", "setting": "0shot", "setting_name": "EM 0-shot", "n": 500, "stand_in": None}),
                      ("none", {**SCORE, "setting": "direct", "value": None, "low": None, "high": None}), ("manifest", {"key": "x"})):
        (tmp_path / "scores" / f"{name}.json").write_text(json.dumps(one))
    card = ModelCard.load(update_card(checkpoint, tmp_path / "scores"))   # a second time: the section is written anew
    assert card.text.count("## Scores") == 1 and "| gsm | EM 8-shot CoT | 12.5 | 8.0 – 17.5 | 200 | paper | 2 failed |" in card.text and "## Settings" in card.text
    gsm, mmlu = card.data.eval_results
    assert (gsm.dataset_type, gsm.metric_value, gsm.metric_args["low"], gsm.dataset_args["n"], gsm.dataset_args["protocol"]) == ("gsm", 12.5, 8.0, 200, "paper")
    assert mmlu.dataset_name == "MMLU" and card.data.model_name == "13B-dolly"


def test_the_manifest_stands_on_the_card(checkpoint):
    manifest = {"key": "abc", "git": {"commit": "0123abcd", "dirty": True}, "seconds": 1234.5, "began": "2026-01-01T00:00:00+00:00", "versions": {"torch": "2.13.0"}, "outputs": {},
                "hardware": {"processor": "Xeon", "cores": 2, "memory_gib": 24, "gpus": []}, "inputs": {"base_dir": {"cell": "base1"}, "data_file": {"sha256": "d" * 64}, "record": {"key": "x"}}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    for scores, titles in ((None, 1), ([SCORE], 2), (None, 1)):   # written anew each time
        card = ModelCard.load(update_card(checkpoint, scores))
        assert card.text.count("## Made with") == 1 and card.text.count("## Scores") == titles - 1 and "## Settings" in card.text
        for row in ("| commit | 0123abcd with changes |", "| seconds | 1,23", "| hardware | Xeon, 2 cores, 24 GiB |", "| version of torch | 2.13.0 |", f"| input data_file | {'d' * 64} |", "| input base_dir | base1 |"): assert row in card.text, row
    assert json.loads((checkpoint / "manifest.json").read_text())["outputs"]["README.md"]["bytes"] == (checkpoint / "README.md").stat().st_size


def test_the_command(checkpoint, capsys, monkeypatch):
    import shutil, sys
    from tulu_study import cli
    folder = checkpoint.parent / "study" / "checkpoints" / "13B-dolly"
    shutil.copytree(checkpoint, folder)
    monkeypatch.setattr(sys, "argv", ["tulu-study", "card", str(folder)])
    cli.main()
    assert "no scores yet" in capsys.readouterr().out
    (folder.parent.parent / "scores" / "13B-dolly").mkdir(parents=True)
    (folder.parent.parent / "scores" / "13B-dolly" / "gsm-cot.json").write_text(json.dumps(SCORE))
    cli.main()
    assert "with its scores" in capsys.readouterr().out and "| gsm | EM 8-shot CoT | 12.5 |" in (folder / "README.md").read_text()


def test_scores_of_another_model(checkpoint, tmp_path):
    with pytest.raises(CardError, match="these scores are of 7B-cot, and .* holds 13B-dolly"): update_card(checkpoint, [SCORE, {**SCORE, "model": "7B-cot"}])
    with pytest.raises(CardError, match="holds no scores"): update_card(checkpoint, tmp_path)
    with pytest.raises(CardError, match="no readable trained.json"): update_card(tmp_path, [SCORE])


class Hub:
    "Remembers what it was asked."
    calls, public = [], False

    def create_repo(self, repo_id, **options): self.calls.append(("create", repo_id, options))
    def repo_info(self, repo_id): return type("Info", (), {"private": not self.public})
    def upload_folder(self, **options):
        self.calls.append(("upload", options))
        return type("Commit", (), {"commit_url": "https://hub/commit/1"})


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.calls, Hub.public = [], False
    return Hub


def test_push(checkpoint, hub):
    (checkpoint / "notes.txt").write_text("mine")
    said = push(checkpoint, "someone/13B-dolly", dry_run=True)
    assert {"model.safetensors", "README.md", "chat_template.jinja", "verification.json"} <= set(said["files"]) and "notes.txt" not in said["files"] and not hub.calls
    assert push(checkpoint, "someone/13B-dolly")["url"] == "https://hub/commit/1"
    (create, upload) = hub.calls
    assert create == ("create", "someone/13B-dolly", {"private": True, "exist_ok": True}) and set(upload[1]["allow_patterns"]) == set(said["files"])
    hub.public = True
    with pytest.raises(CardError, match="exists already and is public"): push(checkpoint, "someone/13B-dolly")
    assert len([c for c in hub.calls if c[0] == "upload"]) == 1


def test_what_is_not_published(checkpoint, hub):
    trained = json.loads((checkpoint / "trained.json").read_text())
    trained["settings"]["base"] = "llama-13b"
    (checkpoint / "trained.json").write_text(json.dumps(trained))
    with pytest.raises(CardError, match="may not be passed on.*make_diff"): push(checkpoint, "a/b", private=False)
    rows = json.loads((checkpoint / "verification.json").read_text())
    (checkpoint / "verification.json").write_text(json.dumps([{**rows[0], "passed": False}, *rows[1:]]))
    (checkpoint / "attempt.json").write_text("{}")
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (checkpoint / "README.md").unlink()
    with pytest.raises(CardError) as error: push(checkpoint, "a/b")
    assert all(part in str(error.value) for part in ("README.md is missing", "its cell has not ended well", "verification failed: weights missing", "model.safetensors")) and not hub.calls


def test_a_studys_cell_stays_whole(checkpoint, hub):
    from tulu_study.core.cells import _outputs, missing_outputs
    (checkpoint / "attempt.json").write_text("{}")   # stays beside a manifest
    (checkpoint / "manifest.json").write_text(json.dumps({"key": "x", "outputs": _outputs(checkpoint, [checkpoint])}))
    update_card(checkpoint, [SCORE])
    assert missing_outputs(checkpoint, json.loads((checkpoint / "manifest.json").read_text())) == []
    assert push(checkpoint, "a/b", dry_run=True)["bytes"] > 100_000
    (checkpoint / "tokenizer.json").write_text((checkpoint / "tokenizer.json").read_text() + " ")
    with pytest.raises(CardError, match="tokenizer.json is not what its manifest records"): push(checkpoint, "a/b", dry_run=True)
