"""What a study will cost before anything is spent: tokens, memory per GPU, hours, money and disk of every fine-tuning, and in total.

The predictions are `tulu_study.training.scale`'s; this module finds out what they are made of: how many tokens the data has (counted where it was converted, else from
the paper's Table 1), what hardware each size runs on, and, for what has run already, how long it really took."""
import json
from pathlib import Path

from tulu_study.core.cells import read_manifest
from tulu_study.core.grid import Grid
from tulu_study.core.params import datasets, mixes, models
from tulu_study.training.scale import Rates, Scale, estimate


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
    "How much data one fine-tuning reads, its limit applied. PlanError where neither a conversion nor the paper says."
    parts = mixes()[key].parts if key in mixes() else [key]
    rows = []
    for part in parts:
        found = converted(grid, part)
        rows.append((*found[:2], "counted") if found else (*known, "Table 1") if part in datasets() and (known := printed(part)) else None)
    if missing := [part for part, row in zip(parts, rows) if row is None]:
        raise PlanError(f"nobody knows yet how long the conversations of {', '.join(missing)} are: run the cells convert-{missing[0]} … first")
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
        row = {"cell": cell.name, "data": cell.params["data"], "base": cell.params["base"], "measured": measured(cell.out_dir) if grid.state(cell.name).word == "done" else None}
        try: rows.append(row | predict(grid, cell.params, rates))
        except (PlanError, ValueError) as e: rows.append(row | {"why": str(e)})
    return rows


def predict(grid: Grid, params: dict, rates: Rates) -> dict:
    "Predict one fine-tuning from its cell's parameters."
    record = models()[params["base"]]
    conversations, length, source = amount(grid, params["data"])
    scale = Scale(params["ranks"] // params["nodes"], params["nodes"], params["zero_stage"], params["offload"], params["micro_batch_size"],
                  params["batch_size"] // (params["ranks"] * params["micro_batch_size"]), params["gradient_checkpointing"], params["precision"])
    return estimate(record, scale, rates, conversations, length, params["epochs"], params["max_seq_length"]) | {"known_from": source}


def measured(
    folder: Path,   # of a finished fine-tuning
) -> dict | None:   # {tokens, seconds, peak_bytes}
    "What a finished fine-tuning took."
    manifest = read_manifest(folder)
    try: seconds = json.loads((folder/"seconds.json").read_text(encoding="utf-8"))
    except (OSError, ValueError): return None
    return {"tokens": manifest.get("tokens"), "seconds": seconds["training"], "peak_bytes": seconds.get("peak_bytes"), "start_bytes": seconds.get("start_bytes")} if manifest else None


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
    head = ["cell", "tokens", "GPUs", "GB per GPU", "fits", "GPU-hours", "hours", rates.currency, "checkpoint", "while training", "measured"]
    known = [row for row in rows if "why" not in row]
    table = []
    for row in rows:
        if "why" in row: table.append([row["cell"], *["–"] * (len(head) - 2), row["why"]]); continue
        took = row["measured"]
        table.append([row["cell"], size_text(row["tokens"]), str(row["gpus"]), f"{row['device_bytes'] / 1e9:.1f}", "yes" if row["fits"] else "NO", hours_text(row["gpu_hours"]), hours_text(row["wall_hours"]),
                      f"{row['cost']:,.0f}", size_text(row["disk_bytes"]) + "B", size_text(row["working_bytes"]) + "B", measured_text(took) if took else "not run"])
    if known:
        total = {name: sum(row[name] for row in known) for name in ("tokens", "gpu_hours", "cost", "disk_bytes")}
        table.append(["total", size_text(total["tokens"]), "", f"{max(row['device_bytes'] for row in known) / 1e9:.1f}", "yes" if all(row["fits"] for row in known) else "NO", hours_text(total["gpu_hours"]), "",
                      f"{total['cost']:,.0f}", size_text(total["disk_bytes"]) + "B", size_text(max(row["working_bytes"] for row in known)) + "B", ""])
    below = [f"Predicted for GPUs of {rates.memory_gib:.1f} GiB, {rates.tflops:g} TFLOP/s of which training reaches {rates.utilisation:.0%}, at {rates.price:.2f} {rates.currency} an hour (--gpu_memory, --tflops, --utilisation, --price).",
             "Fine-tuning alone; evaluation and storage of raw data are not in it. Lengths from " + (", ".join(sorted({row["known_from"] for row in known})) if known else "nowhere") + "."]
    if known and not all(row["fits"] for row in known): below.append("What does not fit: raise gpus or nodes, zero_stage or offload, or lower micro_batch_size, in the base model's record (params/models.yaml, scale) or in the study.")
    return head, table, below


def hours_text(hours: float) -> str:
    "Hours, or seconds where they are few."
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}" if hours >= 0.1 else f"{hours * 3600:.1f} s"


def measured_text(took: dict) -> str:
    "What a finished fine-tuning took, in a few words."
    grown = f", {(took['peak_bytes'] - took['start_bytes']) / 1e9:.2f} GB" if took.get("peak_bytes") else ""
    return f"{hours_text(took['seconds'] / 3600)}, {size_text(took['tokens'] or 0)} tokens{grown}"
