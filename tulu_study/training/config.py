"What one fine-tuning needs to know: checked before anything starts, handed to every rank as a JSON file."
import importlib.util, json, os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

PLACES = ("base_dir", "data_file", "out_dir", "threads", "save_minutes", "save_steps", "report_to")   # where, how fast and who watches, not what: no part of the result
INTERRUPTED = 75                                           # exit status of a training that was asked to stop, and did after saving its state
WATCHERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}   # what report_to may name -> packages of which one is needed

MARK = "tulu_study:"   # begins every line of a rank that the launcher shows


class TrainingError(RuntimeError):
    "A fine-tuning that cannot start or did not end well; says what was found and which setting to change."


class TrainingInterrupted(TrainingError):
    "A fine-tuning that was asked to stop (SIGTERM, SIGUSR1) and saved its state: the same command continues it."


def _minutes(text: str):   # a number, or the text itself, which the configuration then refuses
    try: return float(text)
    except ValueError: return text


@dataclass
class FinetuneConfig:
    "Settings of one fine-tuning. Epochs, learning rate, schedule and length are the paper's for 7B and 13B (Appendix D), the batch size is the authors' code's; loss and ZeRO stage are this study's choices (the reference: microbatch and 3)."
    base_dir: str                        # Hugging Face folder of the base model
    data_file: str                       # conversations, JSON lines of {dataset, id, messages}
    out_dir: str                         # where the checkpoint is saved
    family: str = "llama"                # llama, gpt_neox or opt: decides the special tokens
    model: str = ""                      # name of the checkpoint, e.g. "13B-dolly"
    base: str = ""                       # key of the base model in params/models.yaml
    data: str = ""                       # key of the dataset or mix
    size: str = ""                       # row or column of the tables that it fills
    limit: int = 0                       # conversations per dataset, 0 = all
    epochs: float = 2                    # passes over the data
    learning_rate: float = 2e-5          # peak
    warmup_ratio: float = 0.03           # share of the steps with rising rate
    schedule: str = "linear"             # see training.schedule.KINDS
    weight_decay: float = 0.0
    max_seq_length: int = 2048           # tokens
    batch_size: int = 128                # conversations per optimiser step, over all ranks
    micro_batch_size: int = 2            # conversations per rank and forward pass; with packing: a pack holds so many times max_seq_length tokens
    packing: bool = True                 # lay conversations end to end instead of padding them: same steps, same loss, less work
    zero_stage: int = 2                  # DeepSpeed ZeRO: 0, 1, 2 or 3
    ranks: int = 1                       # processes, one per GPU, on all nodes together
    nodes: int = 1                       # machines that they are spread over
    offload: str = "none"                # none, optimizer or all: what DeepSpeed keeps in the host's memory
    precision: str = "bf16"              # bf16 (with float32 master weights) or fp32
    gradient_checkpointing: bool = False # recompute activations: less memory, about a third slower
    compile: bool = False                # torch.compile of the layers: faster steps after a wait for a compiler (a minute on two cores); ZeRO 0 to 2, all weights trained
    # token: every supervised token of an optimiser step weighs the same, however the step is split into micro-batches.
    # microbatch: the reference's mean of micro-batch means, in which the split changes the result.
    loss: str = "token"
    lora: dict = field(default_factory=dict)   # low-rank adaptation, see core.params.Lora; {} = all weights are trained
    protocol: str = "paper"              # paper or fixed: how a new embedding row is filled
    seed: int = 42                       # of sampling, order, dropout and new embedding rows
    threads: int = 1                     # compute threads per rank
    save_minutes: float = field(default_factory=lambda: _minutes(os.environ.get("TULU_SAVE_MINUTES", "15")))   # between two states on disk, 0 = only when asked to stop
    save_steps: int = 0                  # a state every so many optimiser steps as well, 0 = by the clock alone
    report_to: str = field(default_factory=lambda: os.environ.get("TULU_REPORT_TO") or "none")   # none, tensorboard, wandb, or both with a comma

    def __post_init__(self):
        problems = list(self.problems())
        if problems: raise TrainingError("These training settings do not work:\n" + "\n".join(f"- {p}" for p in problems))

    def problems(self):
        "Say everything that is wrong with the settings, one sentence each."
        known = {"family": ("llama", "gpt_neox", "opt"), "precision": ("bf16", "fp32"), "loss": ("token", "microbatch"),
                 "protocol": ("paper", "fixed"), "zero_stage": (0, 1, 2, 3), "offload": ("none", "optimizer", "all")}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed: yield f"{name}: found {getattr(self, name)!r}, expected one of {', '.join(map(str, allowed))}"
        for name in ("batch_size", "micro_batch_size", "ranks", "threads", "epochs", "learning_rate", "max_seq_length"):
            if not getattr(self, name) > 0: yield f"{name}: found {getattr(self, name)!r}, expected more than 0"
        if self.ranks > 0 and (self.nodes < 1 or self.ranks % self.nodes): yield f"nodes: found {self.nodes}, expected a number that divides ranks {self.ranks}"
        if self.offload == "all" and self.zero_stage != 3: yield f"offload: found 'all' with zero_stage {self.zero_stage}; parameters can be offloaded under stage 3 alone: take 'optimizer', or zero_stage 3"
        if self.offload == "optimizer" and self.zero_stage == 0: yield "offload: found 'optimizer' with zero_stage 0; take a stage of 1 or more"
        if self.compile and self.zero_stage == 3: yield "compile: found true with zero_stage 3, which gathers weights while the layers run: take stage 2, or compile false"
        if self.compile and self.lora: yield "compile: found true with lora; only a training of all weights is compiled: take compile false"
        if self.limit < 0: yield f"limit: found {self.limit}, expected 0 (all) or a number of conversations"
        if not isinstance(self.save_minutes, (int, float)) or not self.save_minutes >= 0: yield f"save_minutes (TULU_SAVE_MINUTES): found {self.save_minutes!r}, expected minutes between two saved states, or 0 for none"
        if self.save_steps < 0: yield f"save_steps: found {self.save_steps}, expected 0 (by the clock alone) or a number of optimiser steps"
        for name in self.watchers:
            if name not in WATCHERS: yield f"report_to (TULU_REPORT_TO): found {name!r}, expected none, {', '.join(WATCHERS)}, or several with a comma"
            elif not any(importlib.util.find_spec(package) for package in WATCHERS[name]): yield f"report_to (TULU_REPORT_TO): found {name!r}, which is not installed: pip install {WATCHERS[name][0]}, or take none"
        if self.lora:
            from .lora import lora_problems
            yield from lora_problems(self)
        together = self.micro_batch_size * self.ranks
        if together > 0 and self.batch_size % together:
            below, above = self.batch_size // together * together, -(-self.batch_size // together) * together
            yield (f"batch_size: found {self.batch_size}, expected a multiple of micro_batch_size {self.micro_batch_size} x ranks {self.ranks} = {together}: "
                   f"take {' or '.join(str(n) for n in (below, above) if n)}, or another micro_batch_size")

    @property
    def watchers(self) -> list[str]:  # who gets the loss besides the log
        return [name for name in (part.strip() for part in self.report_to.split(",")) if name not in ("", "none")]

    @property
    def accumulation(self) -> int:  # micro-batches per rank and optimiser step, without packing
        return self.batch_size // (self.micro_batch_size * self.ranks)

    @property
    def pack_size(self) -> int:  # tokens of a pack at most: what a micro-batch of the longest conversations has
        return self.micro_batch_size * self.max_seq_length

    def science(self) -> dict:  # everything that may change the result
        return {name: value for name, value in asdict(self).items() if name not in PLACES}

    def save(self, path: str | Path) -> Path:
        Path(path).write_text(json.dumps(asdict(self), indent=1))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "FinetuneConfig":
        return cls(**json.loads(Path(path).read_text()))

    @classmethod
    def names(cls) -> tuple[str, ...]:  # of all settings
        return tuple(field.name for field in fields(cls))
