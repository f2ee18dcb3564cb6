"""Fine-tuning on one GPU: its memory and speed beside what `tulu-study plan` predicts, and packs beside padded rows.

    python bench/gpu.py --sources <folder of raw files>          # everything below whose weights, gradients and optimiser this card has room for
    python bench/gpu.py --sources … --only 1b 1b-padded          # some of it

The models have the shapes of params/models.yaml (1b: that of TinyLlama) and random weights, which change neither memory nor time. They learn from Code-Alpaca's conversations, 128 in an optimiser
step, in bf16 with DeepSpeed ZeRO-2, two conversations of up to 2,048 tokens in a forward pass: packs of 4,096 tokens, or two padded rows (the reference's way).

Every measurement is a process of its own, whose clock runs from the end of the first optimiser step to the end of the last one. Memory is what PyTorch allocated and reserved at most. Operations are those of
the plan, which counts logits at every position, divided by the seconds; beside them stands what a large product of matrices reaches on the card. Nothing is saved. Where memory runs out, that is the result.
This process leaves the card alone: what else needs it (making models, the large product) ends before a measurement begins.
"""
import argparse, importlib.metadata, json, multiprocessing, os, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import train  # noqa: E402

LENGTH, BATCH = 2048, 128
ONE_B = {"layers": 22, "width": 2048, "heads": 32, "kv_heads": 4, "inner": 5632, "vocabulary": 32000, "positions": 2048}
LORA = {"rank": 64, "alpha": 16, "dropout": 0.1}
CASES = {   # name -> shape, what differs from the settings above
    "7b": ("llama-7b", dict(gradient_checkpointing=True)),
    "7b-lora": ("llama-7b", dict(gradient_checkpointing=True, lora=LORA)),
    "7b-qlora": ("llama-7b", dict(gradient_checkpointing=True, zero_stage=0, lora=LORA | {"qlora": True})),
    "1b": ("1b", {}),
    "1b-padded": ("1b", dict(packing=False)),
    "1b-compiled": ("1b", dict(compile=True)),
    "1b-checkpointing": ("1b", dict(gradient_checkpointing=True)),
    "1b-offload": ("1b", dict(offload="optimizer")),
    "135m": ("smollm2-135m", {}),
    "135m-padded": ("smollm2-135m", dict(packing=False)),
    "135m-compiled": ("smollm2-135m", dict(compile=True)),
}


def record_of(shape: str):
    "LLaMA 7B's record, which is planned for GPUs, with one of the shapes."
    from tulu_study.core.params import models
    return models()["llama-7b"].model_copy(update={"key": shape, "shape": ONE_B if shape == "1b" else models()[shape].shape})


def apart(function, *given):
    "Call a function in a process of its own, which takes its hold of the card with it."
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool: return pool.submit(function, *given).result()


def make_model(shape: str, folder: Path, tokenizer: Path) -> None:
    "A base model's folder with random weights in 16 bits, made on the GPU."
    import shutil, torch
    from transformers import AutoModelForCausalLM
    from tulu_study.training.scale import shape_config
    folder.mkdir()
    for path in tokenizer.iterdir():
        if path.is_file(): shutil.copyfile(path, folder / path.name)
    torch.manual_seed(0)
    with torch.device("cuda"): model = AutoModelForCausalLM.from_config(shape_config(record_of(shape)), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def conversations(sources: Path, tokenizer: Path, folder: Path, count: int):
    "Code-Alpaca's, encoded."
    from tulu_study.core.files import read_jsonl
    from tulu_study.data import convert
    from tulu_study.training import encode_all, load_tokenizer
    from tulu_study.training.finetune import sample_conversations
    convert(train.DATASET, sources, folder)
    sampled, _ = sample_conversations(list(read_jsonl(folder / train.DATASET / f"{train.DATASET}_data.jsonl")), count, train.SEED)
    return encode_all(sampled, load_tokenizer(tokenizer, "llama"), LENGTH).rows


def card(size: int = 8192, times: int = 20) -> tuple:   # name, bytes, operations per second
    "What the card is, and what its matrix units reach in bf16."
    import torch
    one, other = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for _ in range(3): one @ other
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(times): one @ other
    torch.cuda.synchronize()
    return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1], 2 * size ** 3 * times / (time.perf_counter() - begun)


def planned(shape: str, changes: dict):
    "The record, the plan's memory, and the adapter's parameters."
    from tulu_study.training.scale import Scale, adapter_size, device_memory
    lora, record = changes.get("lora", {}), record_of(shape)
    scale = Scale(gpus=1, zero_stage=changes.get("zero_stage", 2), offload=changes.get("offload", "none"), micro_batch_size=2, accumulation=BATCH // 2, gradient_checkpointing=changes.get("gradient_checkpointing", False),
                  lora_rank=lora.get("rank", 0), qlora=lora.get("qlora", False))
    return record, device_memory(record, scale, LENGTH), adapter_size(record, scale)


def measure(name: str, threads: int, base: Path, folder: Path, rows: list) -> dict:
    "Train in a process of its own."
    from tulu_study.training.scale import training_flops
    shape, changes = CASES[name]
    record, memory, adapter = planned(shape, changes)
    settings = dict(base_dir=str(base), data_file="-", out_dir=str(folder / name), family=record.family, epochs=1, max_seq_length=LENGTH, precision="bf16", zero_stage=2,
                    micro_batch_size=2, batch_size=BATCH, save_minutes=0, threads=threads, packing=True) | changes
    (folder / name).mkdir()
    spec = folder / f"{name}.json"
    spec.write_text(json.dumps({"settings": settings, "rows": rows}))
    found = train.run(train.OURS, spec, folder)
    found["mean_length"] = sum(len(row["input_ids"]) for row in rows) / len(rows)
    flops = training_flops(record, found["tokens"], found["mean_length"], settings.get("gradient_checkpointing", False), adapter=adapter)
    return found | {"name": name, "shape": shape, "planned": memory.device, "planned_used": memory.device - memory.buffers, "flops": flops / found["seconds"]}


def written(found: dict, device: str) -> dict:
    "A row of nbs/training/measured_gpu.csv."
    changes, shape = CASES[found["name"]][1], record_of(found["shape"]).shape
    lora = changes.get("lora", {})
    return {"training": found["name"], "layers": shape["layers"], "width": shape["width"], "heads": shape["heads"], "kv_heads": shape.get("kv_heads", shape["heads"]), "inner": shape["inner"], "vocabulary": shape["vocabulary"], "tied": shape.get("tied", False), "gradient_checkpointing": changes.get("gradient_checkpointing", False),
            "lora_rank": lora.get("rank", 0), "qlora": lora.get("qlora", False), "offload": changes.get("offload", "none"), "packing": changes.get("packing", True), "compile": changes.get("compile", False), "mean_length": round(found["mean_length"], 2),
            "tokens": found["tokens"], "supervised": found["supervised"], "seconds": round(found["seconds"], 3), "cpu_seconds": round(found["cpu"], 3), "allocated_bytes": found["peak"], "reserved_bytes": found["reserved"], "device": device}


HEAD = f"{'':18}{'supervised tokens/s':>21}{'tokens/s':>11}{'TFLOP/s':>9}{'padding':>9}{'allocated GiB':>15}{'planned':>9}{'reserved GiB':>14}{'planned':>9}{'start s':>9}{'first s':>9}{'step s':>8}"


def shown(found: dict) -> str:
    "A line below the head."
    gib = lambda key: found[key] / 2 ** 30
    return (f"{found['name']:18}{found['supervised'] / found['seconds']:>21,.0f}{found['tokens'] / found['seconds']:>11,.0f}{found['flops'] / 1e12:>9.0f}{found['padding_share']:>9.1%}{gib('peak'):>15.1f}{gib('planned_used'):>9.1f}"
            f"{gib('reserved'):>14.1f}{gib('planned'):>9.1f}{found['starting']:>9.1f}{found['first']:>9.1f}{found['seconds'] / (found['steps'] - 1):>8.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, help="folder of raw files; default: the site's (TULU_SOURCES, settings.ini)")
    parser.add_argument("--tokenizer", type=Path, help="folder with LLaMA's tokenizer; default: tokenizers/llama in the sources")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="of " + ", ".join(CASES))
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps, of which the first is not timed")
    parser.add_argument("--threads", type=int, default=min(16, len(os.sched_getaffinity(0))), help="of the processor, for what lies in the host's memory")
    parser.add_argument("--folder", type=Path, help="where the models lie meanwhile (16 GB); default: the system's place for temporary files")
    parser.add_argument("--csv", type=Path, help="also write what was measured here (nbs/training/measured_gpu.csv is such a file)")
    given = parser.parse_args()
    import pandas, torch
    if not torch.cuda.is_available(): parser.error("found no CUDA device; `make bench-train` measures on the processor")
    from tulu_study.core.settings import settings
    given.sources = given.sources or settings().sources
    if not given.sources: parser.error("give --sources (make bench-gpu SOURCES=…): a folder with code_alpaca/ and tokenizers/llama/")
    given.tokenizer = (given.tokenizer or given.sources / "tokenizers" / "llama").resolve()
    if not (given.tokenizer / "tokenizer.json").is_file(): parser.error(f"found no tokenizer.json in {given.tokenizer}: give --tokenizer, a folder with LLaMA's tokenizer")
    (device, room, rate), all_found, failed = apart(card), [], 0
    print(f"{device}, {room / 2 ** 30:.0f} GiB; " + ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "transformers", "deepspeed", "accelerate", "peft")), flush=True)
    print(f"a product of two bf16 matrices of 8,192 x 8,192: {rate / 1e12:.0f} TFLOP/s", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", dir=given.folder) as place:
        rows = conversations(given.sources.resolve(), given.tokenizer, Path(place), given.steps * BATCH)
        if len(rows) <= (given.steps - 1) * BATCH: parser.error(f"--steps {given.steps}: found {len(rows)} conversations, expected more than {(given.steps - 1) * BATCH}")
        print(f"{len(rows)} conversations, {sum(len(row['input_ids']) for row in rows) / len(rows):.0f} tokens on average\n{HEAD}", flush=True)
        for name in given.only:
            memory, base = planned(*CASES[name])[1], Path(place) / f"model-{CASES[name][0]}"
            if memory.states > room:
                print(f"{name:18}not run: weights, gradients and optimiser take {memory.states / 2 ** 30:.0f} GiB, the card has {room / 2 ** 30:.0f}", flush=True)
                continue
            if not base.exists(): apart(make_model, CASES[name][0], base, given.tokenizer)
            try: all_found.append(measure(name, given.threads, base, Path(place), rows))
            except SystemExit as error:
                out = next((line for line in str(error).splitlines() if "OutOfMemoryError" in line), "")
                failed += not out
                print(f"{name:18}{'memory ran out; the plan says ' + format(memory.device / 2 ** 30, '.0f') + ' GiB. ' + out.strip() if out else error}", flush=True)
                continue
            print(shown(all_found[-1]), flush=True)
            if given.csv: pandas.DataFrame([written(found, device) for found in all_found]).to_csv(given.csv, index=False)
    rates = {found["name"]: found["supervised"] / found["seconds"] for found in all_found}
    for one, other, what in (("1b", "1b-padded", "packs against padded rows"), ("135m", "135m-padded", "packs against padded rows"), ("1b-compiled", "1b", "compiled layers against plain ones"), ("135m-compiled", "135m", "compiled layers against plain ones")):
        if one in rates and other in rates: print(f"{one.removesuffix('-compiled')}, {what}, supervised tokens/s: {rates[one] / rates[other]:.2f} ×")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
