"""Write finished fine-tunings down as rows of nbs/training/measured.csv, with what a prediction of each needs and the speed of this machine.

    python tools/measured.py FOLDER… > nbs/training/measured.csv

Run it on the machine that fine-tuned, and at a quiet moment: the speed of the device is measured now."""
import csv, sys
from pathlib import Path

from tulu_study.core.cells import hardware
from tulu_study.core.params import models
from tulu_study.planning import measured
from tulu_study.training.scale import probe

KEPT = ("precision", "zero_stage", "ranks", "nodes", "offload", "micro_batch_size", "batch_size", "gradient_checkpointing")


def row(folder: Path) -> dict:
    "One fine-tuning."
    took, machine = measured(folder), hardware()
    settings = took.pop("settings")
    if settings.get("compile"): raise SystemExit(f"{folder}: found a training of compiled layers, expected one without, which predictions are for")
    rate = probe(models()[settings["base"]], min(took["pass_tokens"], 2048), settings["precision"], took["vocabulary"], took["threads"])
    return {"base": settings["base"], "data": settings["data"], **{name: settings[name] for name in KEPT}, **took, "mean_length": round(took["mean_length"], 2), "cores": machine["cores"], "memory_gib": machine["memory_gib"], "gflops": round(rate / 1e9, 1)}


if __name__ == "__main__":
    rows = [row(Path(folder)) for folder in sys.argv[1:]]
    writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
