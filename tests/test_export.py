"Exports: other tools read what was written, and what cannot be exported is said."
import json

import pytest
import yaml

from tulu_study.core.files import read_jsonl, write_jsonl
from tulu_study.core.messages import CHAT_TEMPLATE
from tulu_study.core.params import Dataset, Mix
from tulu_study.data.conversion import convert
from tulu_study.data.export import FORMATS, ExportError, card_head, conversations, export_dataset
from tulu_study.data.mixes import mix_datasets
from tulu_study.world.sources import write_raw

BAD = [{"dataset": "dolly", "id": "dolly_bad", "messages": []}, {"dataset": "dolly", "id": "dolly_odd", "messages": [{"role": "user", "content": "only a question"}]}]


@pytest.fixture
def data(tmp_path):
    "Dolly and OASST1 of the invented world, converted, and a mix of both."
    for key in ("dolly", "oasst1"):
        write_raw(key, tmp_path / "raw")
        convert(key, tmp_path / "raw", tmp_path)
    mix_datasets(Mix(key="both", name="Both", parts=["dolly", "oasst1"]), tmp_path, tmp_path)
    return tmp_path


@pytest.fixture
def load(tmp_path, monkeypatch):
    "`datasets.load_dataset` without a network and with a cache of its own."
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    return lambda *a, **k: datasets.load_dataset(*a, split="train", cache_dir=str(tmp_path / "hf"), **k)


@pytest.mark.parametrize("key", ["dolly", "both"])
def test_our_own_files_load_with_the_hubs_library(data, load, key):
    rows, ours = load("json", data_files=str(data / key / f"{key}_data.jsonl")), list(read_jsonl(data / key / f"{key}_data.jsonl"))
    assert rows.column_names == ["dataset", "id", "messages"] and list(rows) == ours


@pytest.mark.parametrize("form", FORMATS)
def test_every_export_loads_and_holds_the_same_messages(data, load, form):
    done = export_dataset(data / "oasst1", data / "out", form)
    rows, ours = load("json", data_files=str(done.files[0])), list(read_jsonl(data / "oasst1/oasst1_data.jsonl"))
    assert [r["messages"] for r in rows] == [r["messages"] for r in ours] and done.n_in == done.n_out == len(ours) and not done.left_out
    assert all(path.is_file() for path in done.files) and str(len(ours)) in str(done)


def test_a_folder_for_the_hub_loads_as_a_dataset_through_its_card(data, load):
    export_dataset(data / "both", data / "hub")
    assert len(load(str(data / "hub"))) == len(list(read_jsonl(data / "both/both_data.jsonl")))


def test_the_card_is_valid_and_says_what_was_done(data):
    from huggingface_hub import DatasetCard
    export_dataset(data / "dolly", data / "hub")
    card, report = DatasetCard.load(data / "hub/README.md"), json.loads((data / "dolly/report.json").read_text())
    assert card.data.license == "cc-by-sa-3.0" and card.data.size_categories == ["n<1K"] and card.data.language == ["en"] and card.data.configs[0]["data_files"][0]["path"] == "data/dolly.jsonl"
    for said in ("databricks/databricks-dolly-15k/databricks-dolly-15k.jsonl on the hub, at bdd27f4d94b9", "CC BY-SA 3.0", f"Protocol `{report['protocol']}`, seed 42", f"| conversations | {report['n_out']:,} |", "| the paper counts | 15,011 |", "2306.04751"):
        assert said in card.text, said


def test_rejects_parts_and_choices_are_on_the_card(data):
    with open(data / "raw/dolly/databricks-dolly-15k.jsonl", "a") as f: f.write('{"instruction": "no response"}\n')
    convert("dolly", data / "raw", data)
    export_dataset(data / "dolly", data / "hub")
    assert "| rejected | 1 |" in (data / "hub/README.md").read_text() and "| – missing_key | 1 |" in (data / "hub/README.md").read_text()
    mix = Mix(key="half", name="Half | of it", parts=["dolly", "oasst1"], weights={"dolly": 0.5}, exclude=["zzz"])
    mix_datasets(mix, data, data)
    export_dataset(data / "half", data / "half_hub", record=mix)
    card = (data / "half_hub/README.md").read_text()
    assert '"weights": {"dolly": 0.5}' in card and "| part dolly | 60 |" in card and "license: other" in card and "multilingual" in card and "Apache-2.0" in card


def test_without_record_and_report_the_card_says_that_nothing_is_known(data):
    write_jsonl(data / "own/faq_data.jsonl", [{"dataset": "faq", "id": "faq_0", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}])
    export_dataset(data / "own/faq_data.jsonl", data / "hub")
    card = (data / "hub/README.md").read_text()
    assert "license: other" in card and "origin and licence are not recorded" in card and "how it was made is not recorded" in card
    mine = Dataset(key="faq", name="FAQ", folder="faq", authors="us", licence="MIT", languages=["de"])
    export_dataset(data / "own", data / "hub", record=mine)
    assert "license: mit" in (data / "hub/README.md").read_text() and "- de" in (data / "hub/README.md").read_text()


@pytest.mark.parametrize("form", ["llama-factory", "axolotl"])
def test_conversations_that_no_trainer_can_use_are_left_out_and_counted(data, form):
    rows = list(read_jsonl(data / "dolly/dolly_data.jsonl"))
    write_jsonl(data / "dolly/dolly_data.jsonl", [BAD[0], *rows, BAD[1]])
    done = export_dataset(data / "dolly", data / "out", form)
    assert (done.n_in, done.n_out) == (len(rows) + 2, len(rows)) and [line.split(":")[0] for line in done.left_out] == ["dolly_bad", "dolly_odd"]
    assert "2 left out (dolly_bad: messages field is empty, …)" in str(done)
    assert len(list(read_jsonl(done.files[0]))) == len(rows) and len(list(read_jsonl(export_dataset(data / "dolly", data / "hub").files[0]))) == len(rows) + 2


def test_llama_factorys_registry_keeps_other_datasets(data):
    (data / "out").mkdir()
    (data / "out/dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    for key in ("dolly", "oasst1", "dolly"): export_dataset(data / key, data / "out", "llama-factory")
    known = json.loads((data / "out/dataset_info.json").read_text())
    assert list(known) == ["mine", "dolly", "oasst1"] and known["mine"] == {"file_name": "mine.json"}
    assert known["dolly"]["formatting"] == "sharegpt" and known["dolly"]["tags"] == {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    assert (data / "out" / known["dolly"]["file_name"]).is_file()


@pytest.mark.parametrize("broken", ["{cut o", "[1, 2]"])
def test_a_broken_registry_is_left_as_it_is(data, broken):
    (data / "out").mkdir()
    (data / "out/dataset_info.json").write_text(broken)
    with pytest.raises(ExportError, match="expected a JSON object"): export_dataset(data / "dolly", data / "out", "llama-factory")
    assert (data / "out/dataset_info.json").read_text() == broken and not (data / "out/dolly.jsonl").exists()


def test_axolotls_lines_are_yaml_with_our_template(data):
    done = export_dataset(data / "dolly", data / "out", "axolotl")
    config = yaml.safe_load(done.files[1].read_text())
    assert config["chat_template_jinja"] == CHAT_TEMPLATE and config["datasets"][0]["type"] == "chat_template" and config["datasets"][0]["field_messages"] == "messages"
    assert config["datasets"][0]["path"] == done.files[0].name and config["datasets"][0]["roles_to_train"] == ["assistant"]


def test_what_cannot_be_exported_is_said(data):
    with pytest.raises(ExportError, match="found format 'jsonl', expected one of huggingface, llama-factory, axolotl"): export_dataset(data / "dolly", data / "out", "jsonl")
    with pytest.raises(ExportError, match="found no conversation file"): export_dataset(data / "raw", data / "out")
    with pytest.raises(ExportError, match="found no conversation file"): export_dataset(data / "nowhere", data / "out")
    write_jsonl(data / "dolly/other_data.jsonl", [])
    with pytest.raises(ExportError, match="dolly_data.jsonl, other_data.jsonl"): export_dataset(data / "dolly", data / "out")
    assert not (data / "out").exists()


def test_every_licence_of_the_registry_has_a_name_on_the_hub_or_is_other(data):
    from tulu_study.core.params import datasets
    heads = {key: card_head(type(conversations(data / "dolly"))(data, key, record), 1)["license"] for key, record in datasets().items()}
    assert "other" not in heads.values() and heads["unnatural_instructions"] == "mit" and heads["baize"] == "gpl-3.0" and heads["tulu_v1"] == "odc-by"
