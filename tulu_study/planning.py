"""What a study will cost before anything is spent: tokens, memory per GPU, hours, money and disk of every fine-tuning, and in total.

The predictions are `tulu_study.training.scale`'s; this module finds out what they are made of: how many tokens the data has (counted where it was converted, else, for the
paper's own datasets, from its Table 1), what hardware each size runs on, and, for what has run already, how long it really took. What has run is also predicted for the device that it ran on, so that
prediction and measurement stand side by side."""
import functools, json
from pathlib import Path

from tulu_study.core.cells import hardware
from tulu_study.core.grid import Grid
from tulu_study.core.params import Lora, datasets, mixes, models
from tulu_study.training.scale import Rates, Scale, adapter_size, estimate, growth_bytes, probe, training_flops


CHAT_TOKENS = 17   # tokens that the chat format adds to a round with LLaMA's tokenizer: both role marks, line ends, end of sequence


class PlanError(ValueError):
    "A study whose cost cannot be predicted; says what is missing."


def converted(
    grid: Grid,   # of the study
    key: str,     # dataset or mix
) -> tuple | None:   # (conversations, mean tokens of one, tokenizer), None where nothing was converted or counted
    "Read how much data there is from the report of its conversion."
    try: report = json.loads((grid.root/"data"/key/"report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError): return None
    lengths = report.get("lengths") or {}
    return (report["n_out"], lengths["total"]["mean"] + CHAT_TOKENS * report.get("turns", {}).get("mean", 1), lengths.get("tokenizer", "")) if lengths.get("total") else None


def printed(
    key: str,   # dataset of the paper
) -> tuple | None:   # (conversations, mean tokens of one), None where Table 1 has no such row
    "How much data the paper counts: rounds times both lengths."
    from tulu_study.reporting.published import published
    cells = [published("table1", datasets()[key].name, column) for column in ("n_instances", "avg_rounds", "avg_prompt_length", "avg_completion_length")]
    if any(cell.value in (None, "") for cell in cells): return None
    count, rounds, prompt, completion = (float(cell.value) for cell in cells)
    return count, rounds * (prompt + completion + CHAT_TOKENS)


def amount(
    grid: Grid,   # of the study
    key: str,     # dataset or mix
) -> tuple:       # (conversations, mean tokens of one, where this is known from)
    "How much data one fine-tuning reads, its limit applied. PlanError where neither a conversion nor, for real data, the paper says."
    parts = mixes()[key].parts if key in mixes() else [key]
    rows = []
    for part in parts:
        found = converted(grid, part)
        rows.append((*found[:2], "counted") if found else (*known, "Table 1") if grid.study.world is None and part in datasets() and (known := printed(part)) else None)
    if missing := [part for part, row in zip(parts, rows) if row is None]:
        raise PlanError(f"nobody knows yet how long the conversations of {', '.join(missing)} are: run {'the cell' if len(missing) == 1 else 'the cells'} {', '.join(f'convert-{part}' for part in missing)} first")
    limit = grid.study.data.limit
    counts = [min(n, limit) if limit else n for n, _, _ in rows]
    return sum(counts), sum(n * row[1] for n, row in zip(counts, rows)) / sum(counts), " and ".join(sorted({row[2] for row in rows}))


def cost_rows(
    grid: Grid,     # of the study
    rates: Rates,   # memory, speed and price of a GPU
) -> list[dict]:    # one per fine-tuning: the estimate, and what was measured where it has run
    "Predict every fine-tuning of a study. What cannot be predicted says why under `why`."
    rows = []
    for cell in (c for c in grid.values() if c.stage == "finetune"):
        took = measured(cell.out_dir) if grid.state(cell.name).word == "done" else None
        row = {"cell": cell.name, "data": cell.params["data"], "base": cell.params["base"], "measured": took, "compared": compared(cell.params["base"], took) if took else None}
        try: rows.append(row | predict(grid, cell.params, rates))
        except (PlanError, ValueError) as e: rows.append(row | {"why": str(e)})
    return rows


def scale_of(params: dict) -> Scale:
    "The hardware of one fine-tuning, from its settings."
    lora = Lora(**params["lora"]) if params.get("lora") else None
    return Scale(params["ranks"] // params["nodes"], params["nodes"], params["zero_stage"], params["offload"], params["micro_batch_size"],
                 params["batch_size"] // (params["ranks"] * params["micro_batch_size"]), params["gradient_checkpointing"], params["precision"],
                 *((lora.rank, tuple(lora.targets), lora.qlora) if lora else ()))


def predict(grid: Grid, params: dict, rates: Rates) -> dict:
    "Predict one fine-tuning from its cell's parameters."
    conversations, length, source = amount(grid, params["data"])
    return estimate(models()[params["base"]], scale_of(params), rates, conversations, length, params["epochs"], params["max_seq_length"]) | {"known_from": source}


def measured(
    folder: Path,   # of a finished fine-tuning
) -> dict | None:   # what it took, and what a prediction of just this run needs; None where that was not recorded
    "Read what a finished fine-tuning took."
    try:
        seconds, trained, config = (json.loads((folder/name).read_text(encoding="utf-8")) for name in ("seconds.json", "trained.json", "config.json"))
        steps = [json.loads(line) for line in (folder/"training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError): return None
    settings, passes = trained["settings"], trained["forward_passes_per_step"]
    filled = 1 - trained["padding_share"]
    return {"tokens": sum(row["tokens"] for row in steps), "seconds": seconds["training"], "cpu_seconds": seconds.get("cpu_seconds"), "peak_bytes": seconds.get("peak_bytes"), "start_bytes": seconds.get("start_bytes"),
            "device": seconds.get("device"), "threads": seconds.get("threads"), "settings": settings, "vocabulary": config["vocab_size"], "mean_length": trained["tokens"] / trained["conversations"],
            "pass_tokens": round(sum(row["tokens"] for row in steps) / (len(steps) * passes * filled)), "largest_pass": round(max(row["tokens"] for row in steps) / (passes * filled))}


@functools.cache
def _rate(base: str, tokens: int, precision: str, vocabulary: int, threads: int) -> float:
    return probe(models()[base], tokens, precision, vocabulary, threads)


def compared(
    base: str,    # key of the base model
    took: dict,   # of `measured`
    rate: float | None = None,   # operations per second of the device that it ran on; None = measured now, if it is this machine's
) -> dict:        # {"seconds", "predicted_seconds", "bytes", "predicted_bytes"}; None for what cannot be compared
    "Predict a fine-tuning that has run, for the device that it ran on. On a CPU the seconds are those of a processor: what other processes take away is not the model's error."
    record, settings, machine = models()[base], took["settings"], hardware()
    scale, here = scale_of(settings), (machine["gpus"][0].split(",")[0] if machine["gpus"] else machine["processor"])
    found = {"seconds": took["seconds"], "predicted_seconds": None, "bytes": None, "predicted_bytes": None}
    if not took["device"] or "layers" not in record.shape: return found
    if rate is None and took["device"] == here: rate = _rate(base, min(took["pass_tokens"], 2048), settings["precision"], took["vocabulary"], took["threads"])
    if not machine["gpus"] and took["cpu_seconds"]: found["seconds"] = took["cpu_seconds"] / took["threads"]
    if rate:
        flops = training_flops(record, took["tokens"], took["mean_length"], scale.gradient_checkpointing, took["vocabulary"], adapter_size(record, scale, took["vocabulary"]))
        found["predicted_seconds"] = flops / rate / scale.ranks
    if took["peak_bytes"]: found |= {"bytes": took["peak_bytes"] - took["start_bytes"], "predicted_bytes": growth_bytes(record, scale, took["largest_pass"], took["vocabulary"])}
    return found


def size_text(n: float) -> str:
    "Bytes or counts with a suffix that fits."
    for unit in ("", "K", "M", "G", "T"):
        if n < 1000 or unit == "T": return f"{n:.0f}" if unit == "" else f"{n:.1f} {unit}" if n < 100 else f"{n:.0f} {unit}"
        n /= 1000


def cost_lines(
    rows: list[dict],   # as cost_rows gives them
    rates: Rates,       # memory, speed and price of a GPU
) -> tuple:             # (head, table rows, what stands below)
    "The plan as text."
    head = ["cell", "tokens", "GPUs", "GB per GPU", "fits", "GPU-hours", "hours", "host GB", rates.currency, "checkpoint", "while training", "took", "memory here", "seconds here"]
    known = [row for row in rows if "why" not in row]
    table = []
    for row in rows:
        if "why" in row: table.append([row["cell"], *["–"] * (len(head) - 2), row["why"]]); continue
        took, both = row["measured"], row["compared"] or {}
        table.append([row["cell"], size_text(row["tokens"]), str(row["gpus"]), f"{row['device_bytes'] / 1e9:.1f}", "yes" if row["fits"] else "NO", hours_text(row["gpu_hours"]), hours_text(row["wall_hours"]),
                      f"{row['host_bytes'] / 1e9:.1f}", f"{row['cost']:,.0f}", size_text(row["disk_bytes"]) + "B", size_text(row["working_bytes"]) + "B", measured_text(took) if took else "not run",
                      ratio_text(both.get("predicted_bytes"), both.get("bytes"), 1e9, "GB"), ratio_text(both.get("predicted_seconds"), both.get("seconds"), 1, "s")])
    if known:
        total = {name: sum(row[name] for row in known) for name in ("tokens", "gpu_hours", "cost", "disk_bytes")}
        table.append(["total", size_text(total["tokens"]), "", f"{max(row['device_bytes'] for row in known) / 1e9:.1f}", "yes" if all(row["fits"] for row in known) else "NO", hours_text(total["gpu_hours"]), "",
                      f"{max(row['host_bytes'] for row in known) / 1e9:.1f}", f"{total['cost']:,.0f}", size_text(total["disk_bytes"]) + "B", size_text(max(row["working_bytes"] for row in known)) + "B", "", "", ""])
    below = [f"Predicted for GPUs of {rates.memory_gib:.1f} GiB, {rates.tflops:g} TFLOP/s of which training reaches {rates.utilisation:.0%}, at {rates.price:.2f} {rates.currency} an hour (--gpu_memory, --tflops, --utilisation, --price).",
             "Fine-tuning alone; evaluation and storage of raw data are not in it. Lengths from " + (", ".join(sorted({row["known_from"] for row in known})) if known else "nowhere") + "."]
    if any(row["compared"] for row in rows): below.append("Here: what has run, predicted for the device that it ran on (its speed measured now by a few passes of one block), beside what was measured; in brackets measured over predicted. Memory is what a process takes beyond "
                                                          "its libraries; on a CPU seconds are a processor's. What ran on another device than this machine's has no predicted seconds.")
    if known and not all(row["fits"] for row in known): below.append("What does not fit: raise gpus or nodes, zero_stage or offload, or lower micro_batch_size, in the base model's record (params/models.yaml, scale) or in the study.")
    return head, table, below


def hours_text(hours: float) -> str:
    "Hours, or seconds where they are few."
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}" if hours >= 0.1 else f"{hours * 3600:.1f} s"


def measured_text(took: dict) -> str:
    "What a finished fine-tuning took, in a few words."
    return f"{hours_text(took['seconds'] / 3600)}, {size_text(took['tokens'])} tokens"


def ratio_text(predicted: float | None, found: float | None, unit: float, name: str) -> str:
    "A prediction, what was measured, and their ratio."
    return f"{predicted / unit:.2f} / {found / unit:.2f} {name} ({found / predicted:.1f})" if predicted and found else "–"
