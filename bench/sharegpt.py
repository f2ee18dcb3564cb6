"""Convert ShareGPT's conversations: the converter against the same rule written straight down with SentencePiece.

    python bench/sharegpt.py --tokenizer <folder with tokenizer.json and tokenizer.model> [--source <folder with the two raw files>]

The straightforward version is one process that reads a file, tokenises one text at a time with the SentencePiece library, splits, filters, and writes the pieces. Both go from the raw files
to the same file of conversations, which is compared byte for byte. The converter's time is that of the whole of `convert`: it also checks and accounts for every record, validates what comes out,
measures all lengths in tokens for its report, and on several cores starts and ends its workers.
Runs alternate, medians of wall time are compared, first on one core and then on two (the straightforward version always has one).
Loading a tokenizer is timed on its own: it does not grow with the data.
Without --source the conversations are invented, which flatters the converter: an invented world has few words, and the converter remembers pieces of text. --times N makes a larger input of the
same files: each repetition has other ids, and its words are changed by a cipher of its own, so that what was remembered of one repetition does not serve the next; tokens are then shorter than in real text.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = {1: 1.5, 2: 2.5}  # cores -> times as fast as the straightforward version
RECORDS = 2000  # invented conversations in each file


def straightforward(paths, processor, max_length, target):
    "The rule of the paper's splitter and role filter, one text at a time, into a file."
    out = open(target, "w", encoding="utf-8")
    for path in paths:
        for row in json.loads(Path(path).read_text(encoding="utf-8")):
            messages = row["conversations"]
            if len(messages) % 2:
                messages = messages[:-1]
            if len(messages) < 2:
                continue
            costs = [len(processor.encode(message["value"])) + 1 + 6 for message in messages]
            begin, total, ranges = 0, 0, []
            for i in range(0, len(messages), 2):
                this = costs[i] + costs[i + 1]
                if total + this > max_length:
                    ranges.append((begin, i))
                    begin = i + 2 if this > max_length else i
                    total = 0
                elif i == len(messages) - 2:
                    ranges.append((begin, i + 2))
                total += this
            for begin, end in ranges:
                piece = messages[begin:end]
                if piece and all(message["from"] == ("human", "gpt")[k % 2] for k, message in enumerate(piece)):
                    turns = [{"role": ("user", "assistant")[k % 2], "content": message["value"]} for k, message in enumerate(piece)]
                    out.write(json.dumps({"dataset": "sharegpt", "id": f"sharegpt_{row['id']}_{begin}", "messages": turns}) + "\n")
    out.close()


def timed(function):
    "(result, seconds of wall time)"
    begin = time.perf_counter()
    return function(), time.perf_counter() - begin


def larger(source, target, times):
    "Write the raw files so many times over, each time with other ids and with letters exchanged within vowels and within consonants."
    from tulu_study.core.params import datasets
    from tulu_study.core.sources import fetch
    for path in fetch(datasets()["sharegpt"], root=source).values():
        rows, made = json.loads(Path(path).read_text(encoding="utf-8")), []
        for turn in range(times):
            rng, cipher = random.Random(turn), {}
            for letters in ("aeiou", "bcdfghjklmnpqrstvwxyz") if turn else ():
                exchanged = rng.sample(letters, len(letters))
                cipher.update(str.maketrans(letters + letters.upper(), "".join(exchanged) + "".join(exchanged).upper()))
            made += [{**row, "id": f"{row['id']}r{turn}", "conversations": [{**message, "value": message["value"].translate(cipher)} for message in row["conversations"]]} for row in rows]
        (target / Path(path).name).write_text(json.dumps(made, indent=1), encoding="utf-8")
    return target


def measure(source, tokenizer, rounds, max_length, cores, work):
    "Alternate both versions on so many cores, print what came out, and return the ratio."
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import sentencepiece
    import numpy  # noqa: F401 (the report needs it: imported before the clock starts)

    from tulu_study.core.params import datasets
    from tulu_study.core.sources import fetch
    from tulu_study.data import convert, counting
    from tulu_study.data.conversion import find_converter
    from tulu_study.data.counting import named_tokenizer
    find_converter("sharegpt")
    paths = fetch(datasets()["sharegpt"], root=source)
    processor, loading = timed(lambda: sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model")))
    ours, preparing, times = named_tokenizer(tokenizer)[0], [], {"straightforward": [], "converter": []}
    for _ in range(rounds):
        times["straightforward"].append(timed(lambda: straightforward(paths.values(), processor, max_length, work / "plain.jsonl"))[1])
        counting._ready.cache_clear()   # every round begins with nothing remembered
        preparing.append(timed(lambda: counting.token_counter(ours))[1])
        found, seconds = timed(lambda: convert("sharegpt", source, work, tokenizer=ours, max_length=max_length, workers=cores))
        times["converter"].append(seconds)
        if (work / "plain.jsonl").read_bytes() != (work / "sharegpt" / "sharegpt_data.jsonl").read_bytes():
            sys.exit("the conversations differ: the converter and the straightforward version disagree")
    if found.n_in != found.n_records + found.n_rejected:
        sys.exit("records are missing from the account")
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["straightforward"] / medians["converter"]
    size = sum(Path(path).stat().st_size for path in paths.values())
    print(f"{cores} core{'s' * (cores > 1)}: {found.n_in:,} raw conversations ({size / 1e6:.1f} MB), {found.n_out:,} pieces, identical files. SentencePiece one text at a time {medians['straightforward']:.2f} s, converter {medians['converter']:.2f} s: "
          f"{ratio:.2f} times as fast (target {TARGETS[cores]}). Loading: {loading:.2f} s and {statistics.median(preparing):.2f} s", flush=True)
    return ratio


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, help="folder that holds the raw files, or a sources root; default: invented conversations")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with LLaMA's tokenizer.json and tokenizer.model")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each version")
    parser.add_argument("--times", type=int, default=1, help="so many times the raw files, with other words each time")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a piece")
    parser.add_argument("--cores", type=int, choices=TARGETS, help="measure on so many cores only, in this process")
    options = parser.parse_args()
    if missing := [name for name in ("tokenizer.json", "tokenizer.model") if not (options.tokenizer / name).is_file()]:
        sys.exit(f"found no {' and no '.join(missing)} in {options.tokenizer}; give the folder of LLaMA's tokenizer")
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as work:
        if options.cores:
            return 0 if measure(options.source, options.tokenizer, options.rounds, options.max_length, options.cores, Path(work)) >= TARGETS[options.cores] else 1
        if options.source is None:
            from tulu_study.world.sources import write_raw
            options.source = Path(work)
            write_raw("sharegpt", options.source, n=RECORDS)
            print(f"conversations: invented, {2 * RECORDS:,}")
        if options.times > 1:
            (Path(work) / "larger").mkdir()
            options.source = larger(options.source, Path(work) / "larger", options.times)
            print(f"conversations: the raw files {options.times} times, with other ids and other words each time")
        missed = 0
        for cores in TARGETS:
            if len(os.sched_getaffinity(0)) < cores:
                print(f"{cores} cores: not measured, this machine has {len(os.sched_getaffinity(0))}")
                continue
            command = [sys.executable, __file__, "--source", str(options.source), "--tokenizer", str(options.tokenizer), "--rounds", str(options.rounds), "--max-length", str(options.max_length), "--cores", str(cores)]
            missed += subprocess.run(command).returncode != 0
    return missed


if __name__ == "__main__":
    sys.exit(main())
