"""Encoded conversations on disk: made once, by the first rank, and mapped by all of them.

A conversation as Python lists takes some fifty bytes a token, on every rank; mapped, eight bytes that all ranks of a node share. The folder lies with the saved states and goes
with them, so that a continued training need not encode again. Its name says what it was made of, its checksums whether it is whole."""
import json, shutil, time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tulu_study.core.files import hash_json, read_jsonl, sha256_file, write_atomic
from .encoding import Encoded, encode_all
from .packing import supervised
from .resume import code_hash, gathered, state_root

ARRAYS = ("input_ids", "labels", "sizes")   # int32; sizes: length and supervised tokens of each row
ABOUT = "about.json"                        # written last
CHUNK = 4096                                # conversations encoded before their tokens are written out


class StoredRows(Sequence):
    "Rows in files, each read when it is asked for: {input_ids, labels}."

    def __init__(self, folder: Path):
        import numpy as np
        opened = [np.memmap(folder/name, np.int32, "r") for name in ARRAYS]
        self.ids, self.labels, sizes = opened[0], opened[1], opened[2].reshape(-1, 2)
        self.lengths, self.counts = sizes[:, 0].tolist(), sizes[:, 1].tolist()
        self.bounds = [0, *np.cumsum(sizes[:, 0], dtype=np.int64).tolist()]

    def __len__(self): return len(self.lengths)

    def __getitem__(self, i: int) -> dict:
        if not -len(self) <= i < len(self): raise IndexError(i)
        begin, end = self.bounds[i % len(self)], self.bounds[i % len(self) + 1]
        return {"input_ids": self.ids[begin:end].tolist(), "labels": self.labels[begin:end].tolist()}


@dataclass
class Stored(Encoded):
    "Encoded conversations whose rows lie in files; their sums were taken when they were written."
    sums: tuple = (0, 0)   # tokens, supervised tokens

    @property
    def tokens(self) -> int: return self.sums[0]
    @property
    def supervised(self) -> int: return self.sums[1]


def sizes(rows) -> tuple[list, list]:   # (tokens, supervised tokens) of each row
    "Measure rows, without reading them where that was done when they were written."
    if isinstance(rows, StoredRows): return rows.lengths, rows.counts
    return [len(row["input_ids"]) for row in rows], [supervised(row) for row in rows]


def write_encoded(
    folder: Path,          # to be made
    conversations: list,   # rows of a file, those that were drawn
    tokenizer,             # of the model to be trained
    max_seq_length: int,   # tokens
    more: dict,            # what else is worth keeping
) -> None:
    "Encode conversations a few thousand at a time, and write their tokens down as they come."
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    about = more | {"ids": [], "dropped": [], "unmasked": [], "empty": [], "sums": [0, 0]}
    files = [open(part/name, "wb") for name in ARRAYS]
    try:
        for begin in range(0, len(conversations), CHUNK):
            encoded = encode_all(conversations[begin:begin + CHUNK], tokenizer, max_seq_length)
            for row in encoded.rows:
                for file, numbers in zip(files, (row["input_ids"], row["labels"], (len(row["input_ids"]), supervised(row)))): file.write(array("i", numbers).tobytes())
            for name in ("ids", "dropped", "unmasked", "empty"): about[name] += getattr(encoded, name)
            about["sums"] = [about["sums"][0] + encoded.tokens, about["sums"][1] + encoded.supervised]
    finally:
        for file in files: file.close()
    about["sha256"] = {name: sha256_file(part/name) for name in ARRAYS}
    write_atomic(part/ABOUT, json.dumps(about))
    part.rename(folder)


def read_encoded(folder: Path) -> tuple[Stored, dict]:   # (the rows, what `write_encoded` was given in `more`)
    "Map what was written."
    about = json.loads((folder/ABOUT).read_text(encoding="utf-8"))
    rows = StoredRows(folder) if about["ids"] else []
    return Stored(rows, about.pop("ids"), about.pop("dropped"), about.pop("unmasked"), about.pop("empty"), tuple(about.pop("sums"))), about


def whole(folder: Path) -> bool:
    "Whether a folder holds what was written into it."
    try: return all(sha256_file(folder/name) == found for name, found in json.loads((folder/ABOUT).read_text(encoding="utf-8"))["sha256"].items())
    except (OSError, ValueError, KeyError): return False


def data_key(config) -> str:   # of a fine-tuning's settings
    "Name everything that decides the encoded rows: data, tokenizer, sample, length, code."
    from importlib.metadata import version
    own = {path.name: sha256_file(path) for path in sorted(Path(config.base_dir).iterdir()) if path.is_file() and (path.name.startswith("tokenizer") or path.name in ("special_tokens_map.json", "vocab.json", "merges.txt"))}
    return hash_json([sha256_file(Path(config.data_file)), own, config.family, config.limit, config.seed, config.max_seq_length, code_hash(), version("transformers"), version("tokenizers")])[:16]


def encoded_once(
    config,        # names the data, the sample and the folder
    tokenizer,     # of the model to be trained
    draw,          # conversations -> (those that are drawn, what was drawn)
    rank: int,     # of this process
) -> tuple[Stored, dict]:   # the rows, and what was drawn
    "Encode on the first rank, unless an earlier attempt has done so, and map the result on every rank. The others look for the file instead of meeting the first: encoding may take longer than ranks wait for one another."
    def prepare():
        folder = state_root(config.out_dir)/f"encoded-{data_key(config)}"
        for old in state_root(config.out_dir).glob("encoded-*"):
            if old != folder or not whole(old): shutil.rmtree(old)
        return str(folder)
    folder = Path(gathered(prepare() if rank == 0 else None)[0])
    if rank == 0 and not folder.exists():
        conversations, drawn = draw(list(read_jsonl(config.data_file)))
        write_encoded(folder, conversations, tokenizer, config.max_seq_length, {"drawn": drawn})
    while not (folder/ABOUT).exists(): time.sleep(0.2)
    encoded, more = read_encoded(folder)
    return encoded, more["drawn"]
