# The grid of one study: a rule for each stage, wildcards for dataset, base model and size. `tulu-study run STUDY` calls it (and `make study` calls that).
# Which cells there are, what each needs and whether it is finished is decided by tulu_study.core.grid; a finished cell is a file done.<key> in its folder.
# The executed notebooks lie beside it and are no output of a rule, so that a failed cell keeps its own for reading.
import os, shlex, sys
from tulu_study.core import grid

GRID = grid.load(config["study"])
ROOT = str(GRID.root)
SLURM = GRID.site.executor == "slurm"
quoted = lambda text: shlex.quote(text).replace("{", "{{").replace("}", "}}")
# exec: the cell is Snakemake's own child, knows it by its number, and ends with it
CELL = f"exec env TULU_PARENT={os.getpid()} {quoted(sys.executable)} -m tulu_study cell {quoted(config['study'])}"


def needs(stage, label="label"):
    "The stamps that a cell waits for; `ancient`, because keys and not times say what is new."
    return lambda w: [ancient(str(GRID[n].stamp)) for n in GRID[f"{stage}-{w[label]}" if label in w.keys() else stage].needs]


def gpus(stage):
    asked = "gpus" not in GRID.site.resources if SLURM else config.get("gpus")   # a site can only say gpus=0
    return lambda w: GRID[f"{stage}-{w.label}"].gpus if asked else 0


def slurm(stage):
    "Nodes, tasks, processors and GPUs of a cell as Slurm's plugin wants to hear them; nothing for cells that run here."
    def value(name): return lambda w: grid.slurm_resources(GRID[f"{stage}-{w.label}" if "label" in w.keys() else stage], GRID.site.threads, "gpus" not in GRID.site.resources)[name]
    return {name: value(name) for name in ("nodes", "tasks", "cpus_per_task", "mpi", "slurm_extra")} if SLURM else {}


wildcard_constraints:
    label = r"[\w.-]+",
    key = r"[0-9a-f]{16}",


rule all:
    input: [str(cell.stamp) for cell in GRID.values()]


rule world:            # the invented world of the nano study, as raw files
    output: ROOT + "/sources/done.{key}"
    resources: **slurm("world")
    shell: CELL + " world"


def by_stage(stage):
    "Two rules may write into one folder (a dataset or a mix; a made or a fetched base model): each takes its own labels."
    labels = [n.split("-", 1)[1] for n, c in GRID.items() if c.stage == stage]
    return "|".join(l.replace(".", r"\.") for l in labels) or "no-such-cell"


rule convert:          # raw files of one dataset -> conversations and rejects
    input: needs("convert")
    output: ROOT + "/data/{label}/done.{key}"
    wildcard_constraints: label = by_stage("convert")
    resources: **slurm("convert")
    shell: CELL + " convert-{wildcards.label}"


rule mix:              # conversations of several datasets, concatenated
    input: needs("mix")
    output: ROOT + "/data/{label}/done.{key}"
    wildcard_constraints: label = by_stage("mix")
    resources: **slurm("mix")
    shell: CELL + " mix-{wildcards.label}"


rule pretrain:         # a nano base model, made from the world's corpus
    input: needs("pretrain")
    output: ROOT + "/base/{label}/done.{key}"
    wildcard_constraints: label = by_stage("pretrain")
    resources: gpus = gpus("pretrain"), **slurm("pretrain")
    shell: CELL + " pretrain-{wildcards.label}"


rule base_model:       # a published base model, as a Hugging Face folder
    input: needs("base_model")
    output: ROOT + "/base/{label}/done.{key}"
    wildcard_constraints: label = by_stage("base_model")
    resources: **slurm("base_model")
    shell: CELL + " base_model-{wildcards.label}"


rule finetune:         # <size>-<data>: a base model and conversations -> a checkpoint
    input: needs("finetune")
    output: ROOT + "/checkpoints/{label}/done.{key}"
    resources: gpus = gpus("finetune"), **slurm("finetune")
    shell: CELL + " finetune-{wildcards.label}"


rule evaluate:         # a checkpoint and the benchmarks -> predictions and scores
    input: needs("evaluate")
    output: ROOT + "/scores/{label}/done.{key}"
    resources: gpus = gpus("evaluate"), **slurm("evaluate")
    shell: CELL + " evaluate-{wildcards.label}"


rule table:
    input: needs("table")
    output: ROOT + "/tables/{label}/done.{key}"
    resources: **slurm("table")
    shell: CELL + " table-{wildcards.label}"


rule figure:
    input: needs("figure")
    output: ROOT + "/figures/{label}/done.{key}"
    resources: **slurm("figure")
    shell: CELL + " figure-{wildcards.label}"
