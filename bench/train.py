"""Benchmark of fine-tuning on a CPU, as ratios against three opponents in the same run.

    python bench/train.py --sources <folder of raw files>                  # a LLaMA of 13 M parameters, then SmolLM2-135M
    python bench/train.py --sources … --models 13m --rounds 5              # one model, more rounds

All train on the same Code-Alpaca conversations, encoded before any clock starts, with the same number of supervised tokens, in bf16, on as many threads:

- ours: `tulu_study`'s packs. The stack is DeepSpeed ZeRO-2 with one rank for every thread and compiled layers (the settings `ranks` and `compile`);
- the reference's way: the same stack, two conversations in a forward pass, padded to the longer one;
- dense: the ceiling. The same stack on the same tokens, joined and cut into as many rows of equal length as fill every optimiser step, about as long as a conversation is on average: no padding, nothing to
  tell apart;
- TRL: its `SFTTrainer` with packing (best fit, packs of the same size), in one process with all threads, without DeepSpeed and not compiled, as its documentation has it; with float32 weights under autocast and
  with weights loaded in bf16; the faster of the two counts.

`--ranks 1 --no-compile` is the stack as the study's defaults have it: what packing gains by itself.

Every measurement is a process of its own; contenders alternate, and the median of the rounds' ratios counts. The clock runs from the end of the first optimiser step to the end of the last one,
data loading included. Starting (from the process to its first step) and the first step, which waits for the compiler (or only for its cache, from the second round on), are reported apart; so is what was
compiled later, within the clock, and what a second of CPU time did, which other work on the machine disturbs less. Peak memory is the sum of the ranks'. GPUs are left alone.
TRL goes into a folder of its own (.bench/), never into the project's environment.
"""
import argparse, importlib.metadata, json, os, platform, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from environment import ROOT, side_folder  # noqa: E402

TRL = "trl==1.16.0"
DATASET, SEED, LENGTH, PACK = "code_alpaca", 42, 512, 2048
OURS, REFERENCE, DENSE, FLOAT, BF16 = "ours", "reference's way", "dense", "TRL packing", "TRL packing, bf16 weights"
STACK = (OURS, REFERENCE, DENSE)
TARGETS = (("dense", "tokens", 0.85), ("reference's way", "supervised", 1.5), ("TRL packing", "supervised", 2.5))   # ours at least so many times as fast
SHAPES = {"13m": dict(hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4, tie_word_embeddings=True),   # 13 M, 8 M of them in the embedding
          "tiny": dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True)}     # to try the benchmark itself
SIZES = {"13m": (300, 1), "smollm2": (96, 1), "tiny": (8, 2)}   # conversations, epochs


# ---- before the clock

def make_model(name: str, folder: Path, sources: Path, tokenizer: Path) -> None:
    "A base model's folder: random weights in LLaMA's shape, or SmolLM2-135M."
    if name == "smollm2":
        from tulu_study.core.params import models
        from tulu_study.training.base import make_base
        make_base(models()["smollm2-135m"], folder, sources)
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    folder.mkdir()
    for path in tokenizer.iterdir():
        if path.is_file(): shutil.copyfile(path, folder / path.name)
    torch.manual_seed(0)
    words = len(PreTrainedTokenizerFast.from_pretrained(str(folder)))
    LlamaForCausalLM(LlamaConfig(vocab_size=words, max_position_embeddings=PACK, bos_token_id=1, eos_token_id=2, **SHAPES[name])).save_pretrained(folder)


def joined(rows: list, count: int) -> list:
    "The same tokens and labels in `count` rows of equal length; what is left over is less than a token a row."
    ids, labels = ([i for row in rows for i in row[key]] for key in ("input_ids", "labels"))
    each = len(ids) // count
    return [{"input_ids": ids[k * each:(k + 1) * each], "labels": labels[k * each:(k + 1) * each]} for k in range(count)]


def prepare(name: str, folder: Path, given) -> dict:   # contender -> file of its settings
    "Write the model, the encoded conversations and what each contender is told."
    from tulu_study.core.files import read_jsonl
    from tulu_study.data import convert
    from tulu_study.training import encode_all, load_tokenizer
    from tulu_study.training.finetune import sample_conversations
    from tulu_study.training.packing import best_fit
    convert(DATASET, given.sources, folder)
    make_model(name, folder / "base", given.sources, given.tokenizer)
    conversations, epochs = given.rows or SIZES[name][0], given.epochs or SIZES[name][1]
    sampled, _ = sample_conversations(list(read_jsonl(folder / DATASET / f"{DATASET}_data.jsonl")), conversations, SEED)
    encoded = encode_all(sampled, load_tokenizer(folder / "base", "llama"), LENGTH)
    lengths = [len(row["input_ids"]) for row in encoded.rows]
    steps, each = -(-len(lengths) // given.batch_size), given.batch_size // given.ranks
    dense = joined(encoded.rows, steps * given.batch_size)
    wide = max(n for n in range(1, each + 1) if each % n == 0 and (n == 1 or n * len(dense[0]["input_ids"]) <= PACK))   # rows in a forward pass: as many as a pack has tokens for
    settings = dict(base_dir=str(folder / "base"), data_file="-", family="llama", epochs=epochs, max_seq_length=LENGTH, loss="token", precision="bf16", zero_stage=2, save_minutes=0,
                    ranks=given.ranks, threads=given.threads // given.ranks, compile=given.compile)
    layouts = {OURS: dict(packing=True, micro_batch_size=PACK // LENGTH, batch_size=given.batch_size), REFERENCE: dict(packing=False, micro_batch_size=2, batch_size=given.batch_size),
               DENSE: dict(packing=False, micro_batch_size=wide, batch_size=given.batch_size)}
    others = {"base_dir": str(folder / "base"), "epochs": epochs, "accumulation": max(1, round(len(best_fit(lengths, PACK)) / steps)), "threads": given.threads}
    specs = {}
    for k, contender in enumerate((*STACK, FLOAT, BF16)):
        out = folder / f"out{k}"
        out.mkdir()
        told = {**settings, **layouts[contender], "out_dir": str(out)} if contender in STACK else {**others, "dtype": "bfloat16" if contender == BF16 else "float32", "out_dir": str(out)}
        specs[contender] = folder / f"spec{k}.json"
        specs[contender].write_text(json.dumps({"settings": told, "rows": dense if contender == DENSE else encoded.rows}))
    print(f"{name}: {len(lengths)} conversations, {sum(lengths):,} tokens (mean {statistics.mean(lengths):.0f}), {encoded.supervised:,} supervised; {epochs} epoch(s) of {steps} optimiser steps", flush=True)
    return specs


# ---- one measurement, in a process of its own

class Clock:
    "What a Trainer's callback notes: when the first step began, and when each ended."

    def __init__(self): self.started, self.first, self.ends, self.worked, self.graphs = None, None, [], [], []

    def callback(self):
        from transformers import TrainerCallback
        clock = self

        class Note(TrainerCallback):
            def on_step_begin(self, *_, **__): clock.started = clock.started or time.time()
            def on_step_end(self, *_, **__):
                if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized(): sys.modules["torch"].cuda.synchronize()
                clock.first = clock.first or time.time()
                clock.ends.append(time.perf_counter())
                clock.worked.append(time.process_time())
                if dynamo := sys.modules.get("torch._dynamo"): clock.graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
        return Note()

    @property
    def cpu(self) -> float: return self.worked[-1] - self.worked[0]

    def result(self, per_step: list, idle: dict, peak: int, cpu: float) -> dict:   # per_step: (tokens, supervised tokens) of each step; peak and CPU time of all ranks together
        import psutil
        if len(self.ends) != len(per_step) or len(per_step) < 2: raise SystemExit(f"found {len(self.ends)} steps and tokens of {len(per_step)}, expected the same number and at least 2: take more rows")
        tokens, supervised = (sum(step[k] for step in per_step[1:]) for k in (0, 1))
        process = psutil.Process()
        if "TORCHELASTIC_RUN_ID" in os.environ: process = process.parent()   # the launcher was there first
        return {"seconds": self.ends[-1] - self.ends[0], "cpu": cpu, "steps": len(self.ends), "tokens": tokens, "supervised": supervised, "trained": sum(step[1] for step in per_step),
                "starting": self.started - process.create_time(), "first": self.first - self.started,
                "graphs": self.graphs[:1] + self.graphs[-1:], "peak": peak, **idle}


def measure_stack(spec: dict) -> dict:
    "Train as the product does, with rows that are encoded already, and leave when the last step has ended."
    from tulu_study.training import finetune
    from tulu_study.training.encoding import Encoded
    encoded, clock, make = Encoded(rows=spec["rows"], ids=[str(i) for i in range(len(spec["rows"]))]), Clock(), finetune.make_trainer
    class Done(Exception): "The last step has ended."

    def watched(config, *args, **kwargs):
        trainer = make(config, *args, **kwargs)
        trainer.add_callback(clock.callback())
        train = trainer.train
        def and_leave(*args, **kwargs):
            train(*args, **kwargs)
            found["peak"], found["cpu"] = map(sum, zip(*finetune.gathered((finetune.memory(peak=True), clock.cpu))))
            raise Done
        trainer.train = and_leave
        return trainer

    found, config = {}, finetune.FinetuneConfig(**spec["settings"])
    finetune.load_data, finetune.make_trainer = lambda *_: (encoded, {}), watched
    try: finetune.train(config)
    except Done: pass
    import torch
    log = [json.loads(line) for line in open(Path(config.out_dir) / "training_log.jsonl")]
    idle = finetune.layout(config, encoded)[2] | ({"reserved": torch.cuda.max_memory_reserved()} if torch.cuda.is_available() else {})   # of this rank
    return clock.result([(row["tokens"], row["supervised_tokens"]) for row in log], idle, found["peak"], found["cpu"])


def measure_trl(spec: dict) -> dict:
    "Train with TRL's SFTTrainer as its documentation packs: best fit, no padding."
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer
    from tulu_study.training import grow_embeddings, load_tokenizer
    from tulu_study.training.finetune import memory
    told, clock, batches = spec["settings"], Clock(), []
    torch.set_num_threads(told["threads"])
    tokenizer = load_tokenizer(told["base_dir"], "llama")
    model = AutoModelForCausalLM.from_pretrained(told["base_dir"], dtype=getattr(torch, told["dtype"]))
    grow_embeddings(model, len(tokenizer), "paper")
    arguments = SFTConfig(output_dir=told["out_dir"], packing=True, packing_strategy="bfd", max_length=PACK, per_device_train_batch_size=1, gradient_accumulation_steps=told["accumulation"],
                          num_train_epochs=told["epochs"], gradient_checkpointing=False, bf16=True, use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=SEED)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(spec["rows"]), processing_class=tokenizer, callbacks=[clock.callback()])
    collate = trainer.data_collator

    def counted(examples):
        batch = collate(examples)
        batches.append((batch["input_ids"].numel(), (batch["labels"][:, 1:] != -100).sum().item(), (batch["cu_seq_lens_q"].diff().long() ** 2).sum().item()))
        return batch

    trainer.data_collator = counted
    memory(peak=False)
    trainer.train()
    peak, epoch, per_step = memory(peak=True), len(trainer.train_dataset), []
    for begin in range(0, len(batches), epoch):   # an epoch's last step may have fewer packs
        packs = batches[begin:begin + epoch]
        per_step += [tuple(sum(pack[k] for pack in packs[i:i + told["accumulation"]]) for k in (0, 1)) for i in range(0, len(packs), told["accumulation"])]
    return clock.result(per_step, {"padding_share": 0.0, "attention_waste": 1 - sum(square for *_, square in batches) / sum(tokens ** 2 for tokens, *_ in batches)}, peak, clock.cpu)


# ---- rounds

def with_trl(install: bool) -> tuple[Path, str]:   # folder, and why it cannot be used ("" = it can)
    "TRL's folder, filled when it is not there; what TRL needs is in the project's environment already."
    name = TRL.replace("==", "-")
    folder = ROOT / ".bench" / name
    if not install: return folder, "" if folder.is_dir() else f"{folder.relative_to(ROOT)} is not there"
    try: return side_folder(name, [TRL]), ""
    except SystemExit as error: return folder, str(error)


def run(contender: str, spec: Path, trl: Path) -> dict:
    "A measurement in a fresh process."
    from tulu_study.training.config import FinetuneConfig
    from tulu_study.training.launch import environment_for
    told = json.loads(spec.read_text())["settings"]
    ranks = told.get("ranks", 1)
    env = environment_for(FinetuneConfig(base_dir="-", data_file="-", out_dir="-", threads=told["threads"]), direct=contender in STACK and ranks == 1)
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    if contender not in STACK: env["PYTHONPATH"] = os.pathsep.join((str(trl), env["PYTHONPATH"]))
    done = subprocess.run([*start, __file__, "--measure", contender, str(spec)], capture_output=True, text=True, env=env, cwd=spec.parent)
    if done.returncode: raise SystemExit(f"{contender} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def shown(name: str, runs: list, wide: int) -> str:
    "A contender's line: medians, and the slowest and fastest round."
    rates = [run["supervised"] / run["seconds"] for run in runs]
    median = lambda key: statistics.median(run[key] for run in runs)
    return (f"{name:{wide}}  {statistics.median(rates):>9,.0f} ({min(rates):,.0f}–{max(rates):,.0f})".ljust(wide + 30) + f"{statistics.median(run['tokens'] / run['seconds'] for run in runs):>9,.0f}"
            f"{statistics.median(run['tokens'] / run['cpu'] for run in runs):>13,.0f}{median('padding_share'):>10.1%}{median('attention_waste'):>10.1%}{median('peak') / 2 ** 20:>11,.0f}{median('starting'):>9.1f}{median('first'):>9.1f}{median('steps'):>7.0f}")


def race(name: str, given, trl: Path, why: str) -> int:   # targets missed
    "All rounds with one model; prints the contenders and the ratios."
    from tulu_study.training.base import BaseModelError
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        try: specs, found = prepare(name, Path(folder), given), {}
        except BaseModelError as error: return print(f"{name}: not measured, {error}") or len(TARGETS)
        contenders = [one for one in specs if not (why and one not in STACK)]
        for turn in range(given.rounds):
            for one in contenders: found.setdefault(one, []).append(run(one, specs[one], trl))
            print(f"  round {turn + 1} of {given.rounds}: " + ", ".join(f"{one} {found[one][-1]['supervised'] / found[one][-1]['seconds']:,.0f}" for one in contenders) + " supervised tokens/s", flush=True)
    trained = {one: {run["trained"] for run in runs} for one, runs in found.items() if one != DENSE}   # a cut through a conversation costs a dense row its first label
    if len(set().union(*trained.values())) != 1: raise SystemExit(f"the contenders learnt from different numbers of supervised tokens, no comparison: {trained}")
    wide = max(map(len, contenders))
    print(f"{'':{wide}}  {'supervised tokens/s':30}{'tokens/s':>7}{'per CPU s':>13}{'padding':>10}{'att. waste':>11}{'peak MiB':>10}{'start s':>9}{'first s':>9}{'steps':>7}")
    for one in contenders: print(shown(one, found[one], wide))
    print(f"supervised tokens that each contender learnt from: {trained[OURS].pop():,}")
    if given.compile: print("graphs compiled in the first step, and later within the clock: " + ", ".join(f"{one} {found[one][-1]['graphs'][0]} and {found[one][-1]['graphs'][1] - found[one][-1]['graphs'][0]}" for one in STACK))
    if why: print(f"TRL: not measured, {why}")
    missed = 0
    for other, key, target in TARGETS:
        rates = {one: [run[key] / run["seconds"] for run in runs] for one, runs in found.items()}
        if other == FLOAT:
            if why: continue
            other = max((FLOAT, BF16), key=lambda one: statistics.median(rates[one]))
        ratios = [mine / theirs for mine, theirs in zip(rates[OURS], rates[other])]
        ratio, missed = statistics.median(ratios), missed + (statistics.median(ratios) < target)
        print(f"ours against {other}, {'supervised ' * (key == 'supervised')}tokens/s: {ratio:.2f} × ({min(ratios):.2f}–{max(ratios):.2f}; target {target})" + ("" if ratio >= target else ", missed"))
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, help="folder of raw files; default: the site's (TULU_SOURCES, settings.ini)")
    parser.add_argument("--tokenizer", type=Path, help="folder with LLaMA's tokenizer; default: tokenizers/llama in the sources")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["13m", "smollm2"])
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--rows", type=int, help="conversations; default: " + ", ".join(f"{rows} for {name}" for name, (rows, _) in SIZES.items()))
    parser.add_argument("--epochs", type=int, help="passes over them; default: " + ", ".join(f"{epochs} for {name}" for name, (_, epochs) in SIZES.items()))
    parser.add_argument("--batch-size", type=int, default=32, help="conversations per optimiser step")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="compute threads of a contender")
    parser.add_argument("--ranks", type=int, help="processes of the stack that share them; default: as many as threads")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave the stack's layers as they are")
    parser.add_argument("--no-install", action="store_true", help="leave TRL out where it has not been installed by an earlier run")
    parser.add_argument("--check", action="store_true", help="end with status 1 when a target is missed")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        contender, spec = given.measure[0], json.loads(Path(given.measure[1]).read_text())
        found = measure_stack(spec) if contender in STACK else measure_trl(spec)
        if os.environ.get("RANK", "0") == "0": print(json.dumps(found), flush=True)
        os._exit(0)   # process groups and worker threads need no farewell
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}
    from tulu_study.core.settings import settings
    given.sources = given.sources or settings().sources
    if not given.sources: parser.error("give --sources (make bench-train SOURCES=…): a folder with code_alpaca/, and for the default models tokenizers/llama/")
    given.ranks = given.ranks or given.threads
    if given.threads < 1 or given.ranks < 1 or given.threads % given.ranks: parser.error(f"--threads {given.threads} cannot be shared by --ranks {given.ranks}")
    if given.batch_size % (together := PACK // LENGTH * given.ranks): parser.error(f"--batch-size {given.batch_size} is no multiple of {together}, which {given.ranks} rank(s) take at a time: take another, or other --ranks")
    if given.compile and not shutil.which(os.environ.get("CXX", "g++")): parser.error("found no C++ compiler, which compiled layers need: make system-deps (apt-get install g++ python3-dev), or --no-compile")
    given.sources = given.sources.resolve()
    given.tokenizer = (given.tokenizer or given.sources / "tokenizers" / "llama").resolve()
    if "13m" in given.models and not (given.tokenizer / "tokenizer.json").is_file(): parser.error(f"found no tokenizer.json in {given.tokenizer}: give --tokenizer, a folder with LLaMA's tokenizer")
    trl, why = with_trl(not given.no_install)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    print(f"{cpu}, {given.threads} threads, in {given.ranks} rank(s)" + ", compiled" * given.compile + "; " + ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "transformers", "deepspeed", "accelerate")) + ("" if why else f", {TRL.replace('==', ' ')}"), flush=True)
    missed = sum(race(name, given, trl, why) for name in given.models)
    return 1 if given.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
