"""Any model on any benchmarks, without a study: a folder, a hub repository, a record, an address."""
import json

import pytest
from test_endpoint import KEY, server  # noqa: F401  fixtures
from test_evaluation import checkpoint, quick, sources  # noqa: F401  fixtures

from tulu_study.core.files import write_atomic
from tulu_study.evaluation import standalone
from tulu_study.evaluation.engines import EngineError
from tulu_study.evaluation.standalone import evaluate_any, find_model, parse_benchmarks, speaks_chat

WANTED = {"gsm": {"settings": ["direct"], "n": 4}, "mmlu": {"settings": ["0shot"], "per_group": 2}}


def test_which_benchmarks():
    assert parse_benchmarks("gsm:cot,mmlu", n=5) == {"gsm": {"settings": ["cot"], "n": 5, "per_group": None}, "mmlu": {"settings": ["0shot", "5shot"], "n": 5, "per_group": None}}
    assert parse_benchmarks("mmlu:5shot+0shot,mmlu:0shot")["mmlu"]["settings"] == parse_benchmarks("mmlu:5shot+5shot+0shot")["mmlu"]["settings"] == ["5shot", "0shot"]
    with pytest.raises(ValueError, match="no benchmark 'gms'; mmlu has no setting '3shot', it has 0shot, 5shot"): parse_benchmarks("gms,mmlu:3shot")
    with pytest.raises(ValueError, match="names none"): parse_benchmarks(" , ")


def test_a_folder(checkpoint, sources, tmp_path):  # noqa: F811
    options = {"engine": "transformers", "dtype": "float32", "max_length": 448, "source_root": sources}
    report = evaluate_any(str(checkpoint), WANTED, tmp_path, **options)
    assert (report.made, report.kept, len(report.scores), report.scores[0]["chat"]) == (8, 0, 2, False)
    results_file, = tmp_path.glob("results_*.json")
    before = results_file.read_bytes()
    again = evaluate_any(str(checkpoint), WANTED, tmp_path, **options)
    assert (again.made, again.kept) == (0, 8) and results_file.read_bytes() == before, "the same command continues, and writes the same"
    found = json.loads(before)
    assert {"results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "git_hash", "model_name", "task_hashes"} <= set(found)
    gsm, mmlu = found["results"]["tulu_gsm_direct"], found["results"]["tulu_mmlu_0shot"]
    assert gsm["exact_match,none"] == pytest.approx(report.scores[0]["value"] / 100) and mmlu["acc,none"] == pytest.approx(report.scores[1]["value"] / 100)
    assert set(gsm) == {"name", "alias", "sample_len", "exact_match,none", "exact_match_stderr,none"} and 0 <= gsm["exact_match_stderr,none"] <= 1
    assert found["group_subtasks"] == {"tulu_gsm_direct": [], "tulu_mmlu_0shot": ["tulu_mmlu_0shot_astronomy", "tulu_mmlu_0shot_marketing"]}
    assert found["n-samples"]["tulu_mmlu_0shot_astronomy"] == {"original": 6, "effective": 2} and found["n-samples"]["tulu_gsm_direct"] == {"original": 30, "effective": 4} and found["n-shot"]["tulu_gsm_direct"] == 8
    assert set(found["results"]) == set(found["configs"]) == set(found["versions"]) == set(found["n-samples"])
    config = found["configs"]["tulu_gsm_direct"]
    assert config["output_type"] == "generate_until" and config["generation_kwargs"]["max_gen_toks"] == 16 and not config["generation_kwargs"]["do_sample"]
    assert found["config"]["model"] == "transformers" and found["config"]["model_args"].startswith("pretrained=") and found["config"]["limit"] is None and found["config"]["limits"] == {"gsm": {"n": 4}, "mmlu": {"per_group": 2}}


def test_the_folder_is_named_after_what_changes_every_prompt(checkpoint, sources, tmp_path, monkeypatch):  # noqa: F811
    "Asking once more in another protocol or form costs the earlier answers nothing."
    monkeypatch.setenv("TULU_RESULTS", str(tmp_path))
    options = {"engine": "transformers", "max_length": 448, "source_root": sources}
    folders = [evaluate_any(str(checkpoint), {"mmlu": WANTED["mmlu"]}, **options | more).folder for more in ({}, {"chat": True}, {"protocol": "fixed"})]
    assert [folder.relative_to(tmp_path / "evaluation").as_posix().removeprefix(checkpoint.name) for folder in folders] == ["-paper-plain", "-paper-chat", "-fixed-plain"]
    assert all((folder / "predictions" / "mmlu-0shot.jsonl").is_file() for folder in folders)
    assert evaluate_any(str(checkpoint), {"mmlu": WANTED["mmlu"]}, **options).made == 0


def test_chat_format_follows_the_template(checkpoint, tmp_path):  # noqa: F811
    import shutil
    from transformers import AutoTokenizer
    assert not speaks_chat(checkpoint)
    for name, template, warned in (("tulu", "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}<|assistant|>\n", 0), ("other", "{{ messages[0].content }}", 1)):
        folder = shutil.copytree(checkpoint, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        with (pytest.warns(UserWarning, match="other than Tülu's") if warned else _no_warning()): assert speaks_chat(folder)


def _no_warning():
    import contextlib
    return contextlib.nullcontext()


def test_an_address(server, sources, tmp_path):  # noqa: F811
    server.answer = lambda body: [" B" if body["max_tokens"] == 1 else "3"]
    said = []
    options = {"served": "served", "source_root": sources, "recording": "record", "say": said.append}
    report = evaluate_any(server.url, WANTED, tmp_path, **options)
    assert report.scores[1]["option_scoring"].startswith("4 of 4") and report.scores[0]["chat"] is False
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost["all_predictions"]["prompt_tokens"] == 80 and cost["this_call"]["requests"] == 8 and cost["estimate_at_most"]["requests"] == 8 and not cost["replayed"]
    assert said[0].startswith("served: at most 8 requests, ") and said[1] == "served: 8 requests now, 0.00 dollars; all predictions together 0.00 dollars"
    found = json.loads((tmp_path / "results_served.json").read_text())
    assert found["config"]["model"] == "endpoint" and found["config"]["model_args"] == f"model=served,base_url={server.url}" and any("first letter" in note for note in found["notes"])
    replay = evaluate_any(server.url, WANTED, tmp_path, **options | {"recording": "replay"})
    assert len(server.requests) == 8 and replay.made == 8 and "replayed" in replay.scores[0]["engine"] and any("replayed" in note for note in json.loads((tmp_path / "results_served.json").read_text())["notes"])
    assert all(KEY not in path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.json*"))


def test_too_dear_is_refused_before_asking(server, sources, tmp_path, monkeypatch):  # noqa: F811
    from tulu_study.core.params import models
    record = models()["gpt-4"]
    dear = record.model_copy(update={"endpoint": record.endpoint.model_copy(update={"url": server.url})})
    monkeypatch.setattr(standalone, "models", lambda: {"gpt-4": dear})
    with pytest.raises(ValueError, match=r"may cost up to 0\.\d+ dollars, more than max_dollars=0.0001.*nothing was asked"): evaluate_any("gpt-4", WANTED, tmp_path, source_root=sources, max_dollars=0.0001)
    assert not server.requests
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(EngineError, match="OPENAI_API_KEY"): evaluate_any("gpt-4", WANTED, tmp_path, source_root=sources)


def test_what_is_no_model_is_said(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no such folder, no such key"): find_model("no-such-model")
    with pytest.raises(ValueError, match="a study makes"): find_model("nano-llama-s")
    write_atomic(tmp_path / "weights.txt", "x")
    with pytest.raises(FileNotFoundError, match="holds no config.json .found weights.txt"): find_model(str(tmp_path))
    with pytest.raises(ValueError, match="does not list its models"): find_model("http://127.0.0.1:9/v1")


def test_a_hub_repository(tmp_path, monkeypatch):
    import huggingface_hub
    asked = []
    def download(name, revision=None, allow_patterns=None):
        asked.append((name, revision, "*.bin" in allow_patterns))
        if name == "owner/closed": raise PermissionError("401 gated")
        if not name.endswith("old"): write_atomic(tmp_path / "model.safetensors", b"")
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("owner/old").folder == tmp_path
    target = find_model("owner/model@abc")
    assert (target.folder, target.name) == (tmp_path, "owner__model") and find_model("llama-7b").name == "huggyllama__llama-7b"
    assert asked[:3] == [("owner/old", None, False), ("owner/old", None, True), ("owner/model", "abc", False)] and asked[3][1].startswith("8416d3f")
    with pytest.raises(FileNotFoundError, match="gated.*hf auth login"): find_model("owner/closed")
