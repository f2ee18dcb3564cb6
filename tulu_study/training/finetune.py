"""The process that trains, one per rank: `python -m tulu_study.training.finetune settings.json`.

`tulu_study.training.launch` starts it. It is `transformers.Trainer` with DeepSpeed ZeRO; ours are the order of the data, its packing, the choice of the loss's
denominator, the optimiser's groups and schedule (those of the reference), the log, and the numbers that the saved checkpoint is checked against.
"""
import functools, json, math, os, random, re, shutil, signal, statistics, sys, time, uuid
from pathlib import Path

from tulu_study.core.cells import hardware
from tulu_study.core.files import write_atomic
from tulu_study.core.process import die_with_parent
from .cards import model_card
from .config import INTERRUPTED, MARK, FinetuneConfig, TrainingError
from .encoding import IGNORED, Encoded
from .lora import adapter_weights, merge, quantised, release, wrap
from .packing import best_fit, flatten, register_segments, spread, token_weights, waste, weighted_loss
from .resume import Clock, attempt, choose, collected, finished_states, gathered, identity, inputs_of, read_record, remove, state_root, write_state
from .schedule import schedule, total_steps, warmup_steps
from .store import encoded_once, sizes
from .tokenizers import _gathered, grow_embeddings, load_tokenizer

PRODUCTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
            "chat_template.jinja", "README.md", "adapter", "training_log.jsonl", "sample.json", "trained.json", "verification.json", "seconds.json")


def say(text: str) -> None:
    "Print a line for the launcher, from the first rank only."
    if int(os.environ.get("RANK", 0)) == 0: print(MARK, text, flush=True)


# ---- data

def sample_conversations(
    conversations: list,   # [{dataset, id, messages}], in file order
    limit: int,            # per dataset, 0 = all
    seed: int,             # of the study
) -> tuple[list, dict]:    # the sampled rows in file order, {dataset: {"of": n, "ids": [...] or "all"}}
    "Draw `limit` conversations of every dataset with a generator named by the dataset: adding a dataset changes no other one's sample."
    places: dict[str, list[int]] = {}
    for i, one in enumerate(conversations): places.setdefault(one["dataset"], []).append(i)
    kept, drawn = [], {}
    for name, all_places in places.items():
        everything = not limit or limit >= len(all_places)
        chosen = all_places if everything else sorted(random.Random(f"{seed}/{name}").sample(all_places, limit))
        kept += chosen
        drawn[name] = {"of": len(all_places), "ids": "all" if everything else [conversations[i]["id"] for i in chosen]}
    return [conversations[i] for i in sorted(kept)], drawn


def load_data(
    config: FinetuneConfig,   # names the file, the limit and the length
    tokenizer,                # of the model to be trained
) -> tuple[Encoded, dict]:    # encoded rows, and what was drawn
    "Read, sample and encode the conversations, once for all ranks. Raises TrainingError when nothing is left to learn from."
    encoded, drawn = encoded_once(config, tokenizer, lambda rows: sample_conversations(rows, config.limit, config.seed), int(os.environ.get("RANK", 0)))
    found = len(encoded.ids) + len(encoded.dropped) + len(encoded.empty)
    if found == len(encoded.empty): raise TrainingError(f"{config.data_file} holds no conversations ({found} rows, none with a message): convert the dataset {config.data!r} again")
    if not encoded.rows:
        raise TrainingError(f"{config.data}: no answer is left within max_seq_length {config.max_seq_length} in any of {found} conversations: raise max_seq_length")
    return encoded, drawn


class Rows:
    """The encoded rows as a torch dataset, with one more at index `len(rows)`: a padding row without any label, which fills up micro-batches so
    that all ranks get the same number of them. It adds nothing to a loss that is divided by the number of supervised tokens."""

    def __init__(self, rows, padding_id: int): self.rows, self.filling = rows, {"input_ids": [padding_id] * 2, "labels": [IGNORED] * 2}
    def __len__(self): return len(self.rows)

    def __getitem__(self, i):
        row = self.filling if i == len(self.rows) else self.rows[i]
        return {**row, "attention_mask": [1] * len(row["input_ids"])}


class EpochOrder:
    "A new order of the rows for every epoch, the same on all ranks and for any number of them."

    def __init__(self, n: int, seed: int, multiple: int = 1):
        self.n, self.seed, self.multiple, self.epoch = n, seed, multiple, 0

    def set_epoch(self, epoch: int): self.epoch = epoch
    def __len__(self): return math.ceil(self.n / self.multiple) * self.multiple

    def order(self, epoch: int) -> list[int]:   # the rows
        order = list(range(self.n))
        random.Random(f"{self.seed}/epoch {epoch}").shuffle(order)
        return order

    def __iter__(self): yield from self.order(self.epoch) + [self.n] * (len(self) - self.n)


class Packs:
    "The encoded rows as a torch dataset whose index is a pack, [(row, weight of its supervised tokens)]."

    def __init__(self, rows): self.rows = rows
    def __len__(self): return len(self.rows)
    def __getitem__(self, pack): return [(self.rows[i], weight) for i, weight in pack]


class PackOrder(EpochOrder):
    """The packs of every epoch: the same order as `EpochOrder`, taken `batch_size` conversations at a time, each such step laid into
    the same number of packs, so that every rank makes as many forward passes in every step."""

    def __init__(self, rows, config: FinetuneConfig):
        super().__init__(len(rows), config.seed)
        self.config, (self.lengths, self.counts) = config, sizes(rows)
        fullest = max(len(best_fit([self.lengths[i] for i in step], config.pack_size)) for epoch in range(math.ceil(config.epochs)) for step in self.steps(epoch))
        self.accumulation = math.ceil(fullest / config.ranks)   # packs per rank and step

    def steps(self, epoch: int) -> list[list[int]]:   # the rows of each optimiser step
        order = self.order(epoch)
        return [order[i:i + self.config.batch_size] for i in range(0, self.n, self.config.batch_size)]

    def packs(self, epoch: int):
        "Yield the packs of an epoch, [(row, weight)], step after step."
        config = self.config
        for step in self.steps(epoch):
            weights = token_weights([self.counts[i] for i in step], config.loss, config.micro_batch_size)
            for pack in spread([self.lengths[i] for i in step], config.pack_size, self.accumulation * config.ranks): yield [(step[k], weights[k]) for k in pack]

    def __len__(self): return math.ceil(self.n / self.config.batch_size) * self.accumulation * self.config.ranks
    def __iter__(self): return self.packs(self.epoch)


def step_ids(config: FinetuneConfig, encoded: Encoded, sampler: EpochOrder, step: int) -> list[str]:
    "Ids of the conversations of an optimiser step, counted from 1."
    epoch, index = divmod(step - 1, math.ceil(len(encoded.rows) / config.batch_size))
    return [encoded.ids[i] for i in sampler.order(epoch)[index * config.batch_size:(index + 1) * config.batch_size]]


def layout(config: FinetuneConfig, encoded: Encoded) -> tuple[EpochOrder, int, dict]:
    "The sampler, the forward passes per rank and optimiser step, and what they compute in vain (the first epoch's; the others hardly differ)."
    if config.packing:
        sampler = PackOrder(encoded.rows, config)
        return sampler, sampler.accumulation, waste([[sampler.lengths[i] for i, _ in pack] for pack in sampler.packs(0)], packed=True)
    filled = config.micro_batch_size * config.ranks if config.loss == "token" else 1
    sampler, lengths = EpochOrder(len(encoded.rows), config.seed, filled), sizes(encoded.rows)[0]
    order = sampler.order(0)
    return sampler, config.accumulation, waste([[lengths[i] for i in order[k:k + config.micro_batch_size]] for k in range(0, len(order), config.micro_batch_size)], packed=False)


# ---- the trainer

def deepspeed_config(config: FinetuneConfig, cuda: bool, accumulation: int | None = None) -> dict:
    "DeepSpeed's settings: the reference's, with the study's stage and batch."
    zero = {"stage": config.zero_stage, "overlap_comm": cuda and config.zero_stage > 0, "contiguous_gradients": True,
            "reduce_bucket_size": int(5e7)}   # numbers; the reference's "auto" (the hidden size squared) means dozens of exchanges a step for a small model
    if config.zero_stage == 3:
        zero |= {"sub_group_size": 1e9, "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
                 "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True}
    if config.offload != "none": zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if config.offload == "all": zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    rows, accumulation = 1 if config.packing else config.micro_batch_size, accumulation or config.accumulation   # a pack is one row
    return {"bf16": {"enabled": config.precision == "bf16"}, "zero_optimization": zero, "gradient_clipping": 1.0, "steps_per_print": 10**9,
            "train_batch_size": rows * accumulation * config.ranks, "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": accumulation, "wall_clock_breakdown": False,
            **({"zero_force_ds_cpu_optimizer": cuda} if config.offload != "none" else {})}   # without a GPU everything is in the host's memory, and torch's AdamW needs no compiler


def join_ranks(cuda: bool) -> None:
    "Form the process group through DeepSpeed: ZeRO-3 asks it for the number of ranks as soon as the model is loaded."
    import deepspeed
    if cuda:
        import torch
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)


def training_arguments(config: FinetuneConfig, cuda: bool, accumulation: int | None = None):
    "The Trainer's settings, with the forward passes per rank and optimiser step. Under ZeRO-3 they must exist before the model is loaded, and be kept."
    from transformers import TrainingArguments
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}} if config.gradient_checkpointing else {}
    return TrainingArguments(
        output_dir=config.out_dir, per_device_train_batch_size=1 if config.packing else config.micro_batch_size, gradient_accumulation_steps=accumulation or config.accumulation,
        num_train_epochs=config.epochs, learning_rate=config.learning_rate, weight_decay=config.weight_decay, adam_beta1=0.9, adam_beta2=0.999,
        adam_epsilon=1e-8, max_grad_norm=1.0, bf16=config.precision == "bf16", deepspeed=None if config.lora.get("qlora") else deepspeed_config(config, cuda, accumulation), use_cpu=not cuda,
        seed=config.seed, data_seed=config.seed, report_to=config.watchers or "none", run_name=config.model or Path(config.out_dir).name, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, dataloader_num_workers=0, dataloader_pin_memory=cuda, average_tokens_across_devices=True,
        ddp_find_unused_parameters=False, **checkpointing)   # without DeepSpeed: every trained matrix takes part in every pass


def parameter_groups(model, weight_decay: float) -> list[dict]:
    "The reference's two groups: no decay where a name contains `bias` or `layer_norm.weight`."
    free = lambda name: any(part in name for part in ("bias", "layer_norm.weight"))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if not free(n)], "weight_decay": weight_decay}, {"params": [p for n, p in named if free(n)], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


ASKED = {"stop": False}   # set by a signal, looked at after every optimiser step


def stop_when_asked() -> None:
    "Let SIGTERM and SIGUSR1 (a queue's pre-emption) end the training after the optimiser step that it is in, with its state saved."
    def ask(*_): ASKED["stop"] = True
    ASKED["stop"] = False
    for one in (signal.SIGTERM, signal.SIGUSR1): signal.signal(one, ask)


def make_optimizer(config: FinetuneConfig, model):
    """AdamW with the reference's groups; DeepSpeed's own where a GPU's optimiser lies in the host's memory, because torch's is many times slower there.

    On GPUs one kernel does all of an update, as the Trainer has it by default: otherwise intermediate results as large as a rank's share of the weights lie in memory meanwhile."""
    import torch
    make = functools.partial(torch.optim.AdamW, parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    if config.lora.get("qlora"):
        from bitsandbytes.optim import PagedAdamW32bit
        return PagedAdamW32bit(*make.args, **make.keywords)
    if not torch.cuda.is_available(): return make()
    if config.offload == "none": return make(fused=True)
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    return DeepSpeedCPUAdam(*make.args, **make.keywords, adamw_mode=True)


def make_trainer(config: FinetuneConfig, arguments, model, tokenizer, encoded: Encoded, sampler: EpochOrder, log: Path, resumed: Path | None = None, whose=None):
    "Put the Trainer together. `resumed` is the state that it continues from, `whose` gives the identity under which it saves new ones."
    import torch
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback

    class StudyTrainer(Trainer):
        "Trainer with the study's order, optimiser, schedule and loss."
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if config.packing: self.loss_is_scaled_for_ga, self.model_accepts_loss_kwargs = True, False   # the weights are those of the whole step
            elif config.loss == "microbatch": self.model_accepts_loss_kwargs = False   # the Trainer then averages micro-batch means
            self.window = torch.zeros(6, dtype=torch.float64)                        # loss, micro-batches, tokens, supervised tokens, ranks that want to save, that were asked to stop
            self.interrupted, self.seconds, self.cpu_seconds, self.step_seconds, self.log_file = False, 0.0, 0.0, [], None

        def _get_train_sampler(self, *_): return sampler

        def create_optimizer(self, *_):
            if self.optimizer is None: self.optimizer = make_optimizer(config, self.model)
            return self.optimizer

        def create_scheduler(self, num_training_steps, optimizer=None):
            if self.lr_scheduler is None:
                steps = total_steps(len(encoded.rows), config.batch_size, config.epochs)
                self.lr_scheduler = schedule(optimizer or self.optimizer, steps, warmup_steps(steps, config.warmup_ratio), config.schedule)
            return self.lr_scheduler

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if config.packing: return self.packed_loss(model, inputs)
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            real = (inputs["labels"] != IGNORED).any(dim=1, keepdim=True)   # not a padding row
            counts = [1.0, (inputs["attention_mask"] * real).sum().item(), (inputs["labels"][:, 1:] != IGNORED).sum().item()]
            self.window[:4] += torch.tensor([loss.detach().float().item(), *counts], dtype=torch.float64)
            return loss

        def packed_loss(self, model, inputs):
            "The pack's share of the step's loss, times the ranks because gradients are averaged over them."
            targets, of, weights, *counts = (inputs.pop(name) for name in ("targets", "of", "weights", "tokens", "supervised"))
            loss = weighted_loss(model(**inputs, use_cache=False).logits, targets, of, weights) * config.ranks   # with a cache the boundaries would be lost
            self.window[:4] += torch.tensor([loss.detach().item(), 1.0, *counts], dtype=torch.float64)
            return loss

        def take_window(self, want_save: bool, want_stop: bool) -> list[float]:
            "Sums of the step over all ranks; clears them. What one rank wants, all learn at the same step."
            self.window[4:] = torch.tensor([want_save, want_stop], dtype=torch.float64)
            total = self.window.clone()
            if config.ranks > 1:
                device = total.to(self.args.device)
                torch.distributed.all_reduce(device)
                total = device.cpu()
            self.window.zero_()
            return total.tolist()

        def save_state(self) -> str:
            "Write everything that continuing needs; returns why it could not."
            step = self.state.global_step
            def parts(folder, problems, first):
                if self.is_deepspeed_enabled:
                    with collected(self.model_wrapped, problems):
                        self.model_wrapped.save_checkpoint(str(folder), tag=f"global_step{step}", save_latest=False, exclude_frozen_parameters=hasattr(self.model, "peft_config"))
                else:
                    attempt(problems, lambda: self.save_model(str(folder), _internal_call=True))
                    attempt(problems, lambda: self._save_optimizer_and_scheduler(str(folder)))
                attempt(problems, lambda: self._save_rng_state(str(folder)))
                if not first: return
                if self.is_deepspeed_enabled:
                    attempt(problems, lambda: (folder / "latest").write_text(f"global_step{step}"))
                    attempt(problems, lambda: torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt"))
                attempt(problems, lambda: self.state.save_to_json(str(folder / "trainer_state.json")))
                attempt(problems, self.log_file.flush)
                attempt(problems, lambda: shutil.copyfile(log, folder / log.name))
            return write_state(state_root(config.out_dir), step, whose(), {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "run_id": os.environ.get("WANDB_RUN_ID", "")}, parts, self.args.process_index, config.ranks, f"global_step{step}")

    class Log(TrainerCallback):
        "One row per optimiser step in training_log.jsonl, and a line for people now and then."
        def on_train_begin(self, args, state, control, **_):
            self.begun, self.cpu_begun = time.monotonic(), time.process_time() - trainer.cpu_seconds
            self.last = self.begun
            self.shown, self.at, self.clock, self.earlier = 0.0, state.global_step, Clock(config.save_minutes, config.save_steps), trainer.seconds
            if args.process_index == 0:
                log.write_bytes((resumed / log.name).read_bytes() if resumed else b"")
                trainer.log_file = open(log, "ab", buffering=1 << 20)   # what a full disk does not take now is kept and written later
            say(f"training: {state.max_steps} steps of {config.batch_size} conversations, {len(encoded.rows)} in all, {config.ranks} rank(s), ZeRO {config.zero_stage}, {config.precision}"
                + (f", from step {self.at} on" if resumed else ""))

        def on_epoch_begin(self, args, state, control, **_):
            sampler.set_epoch(state.global_step // math.ceil(len(encoded.rows) / config.batch_size))   # the skipping data loader of a resumed run does not pass it on

        def on_step_begin(self, args, state, control, optimizer=None, **_):
            self.rate = trainer.optimizer.param_groups[0]["lr"]

        def on_step_end(self, args, state, control, **_):
            step = state.global_step
            summed, batches, tokens, supervised, want_save, want_stop = trainer.take_window(args.process_index == 0 and self.clock.due(step), ASKED["stop"])
            loss, now = summed / (config.ranks if config.packing or config.loss == "token" else batches), time.monotonic()
            took, self.last, trainer.seconds = now - self.last, now, self.earlier + now - self.begun
            trainer.cpu_seconds = time.process_time() - self.cpu_begun
            trainer.step_seconds.append(took)
            if trainer.log_file:
                row = {"step": step, "loss": loss, "learning_rate": self.rate, "tokens": int(tokens), "supervised_tokens": int(supervised)}
                trainer.log_file.write(json.dumps(row).encode() + b"\n")
                try: trainer.log_file.flush()
                except OSError as error: say(f"warning: {log.name} cannot be written now ({error}): free some space; training goes on")
            if not math.isfinite(loss): raise TrainingError(not_finite(config, f"the loss became {loss} at step {step}", step_ids(config, encoded, sampler, step)))
            if config.watchers: trainer.log({"loss": loss, "learning_rate": self.rate, "tokens_per_second": tokens / max(took, 1e-9)})
            if now - self.shown > 5 or step in (self.at + 1, state.max_steps):
                self.shown = now
                left = (state.max_steps - step) * (now - self.begun) / (step - self.at)
                say(f"step {step}/{state.max_steps}  loss {loss:.4f}  rate {self.rate:.2e}  {tokens / max(took, 1e-9):,.0f} tokens/s  {clock_text(now - self.begun)} passed  {clock_text(left)} left")
            if want_save or want_stop: self.save(step, want_stop, control)

        def save(self, step, stopping, control):
            why = trainer.save_state()
            self.clock.saved()
            if why: say(f"warning: the state of step {step} was not saved ({why}): free some space or move the results root (TULU_RESULTS); training goes on, {kept_text(config)}")
            if stopping: trainer.interrupted = control.should_training_stop = True

        def on_train_end(self, args, state, control, **_):
            if trainer.log_file: trainer.log_file.close()

    rows, collate = Rows(encoded.rows, tokenizer.pad_token_id), DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=IGNORED)
    if config.packing: rows, collate = Packs(encoded.rows), lambda packs: flatten(packs[0], tokenizer.pad_token_id)
    trainer = StudyTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, data_collator=collate, callbacks=[Log()])
    trainer.remove_callback(PrinterCallback)   # it would print every row that goes to TensorBoard
    return trainer


def clock_text(seconds: float) -> str:   # e.g. "1 h 05 min", "4 min 10 s", "12 s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def kept_text(config: FinetuneConfig) -> str:
    "What a restart would continue from."
    mine = json.loads(json.dumps(config.science()))
    step = next((record["step"] for folder in finished_states(state_root(config.out_dir)) if (record := read_record(folder)) and record["identity"].get("settings") == mine), None)
    return "the same command would start anew" if step is None else f"the same command would continue from step {step}"


def not_finite(config: FinetuneConfig, what: str, ids: list[str]) -> str:
    "The message for numbers that are none."
    named = ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
    return (f"{what}: lower learning_rate (now {config.learning_rate:g}), raise warmup_ratio (now {config.warmup_ratio:g}), or use precision fp32 (now {config.precision})"
            + (f"; or look at the data of that step, {config.data or Path(config.data_file).name}: {named}" if ids else ""))


def load_model(config: FinetuneConfig, n_tokens: int):
    "The base model in float32 (the library's default would be the checkpoint's type), with rows for new tokens, its cache off."
    import torch
    from transformers import AutoModelForCausalLM
    options = {"dtype": torch.float32} | ({"attn_implementation": register_segments(config.compile)} if config.packing else {}) | quantised(config)
    model = AutoModelForCausalLM.from_pretrained(config.base_dir, **options)
    grown = grow_embeddings(model, n_tokens, config.protocol, config.seed)
    model.config.use_cache = False
    if config.compile:
        from accelerate.utils import compile_regions_deepspeed
        compile_regions_deepspeed(model, dynamic=True)   # in place: DeepSpeed and the saved names see the same modules; the blocks share one compilation, for packs of any length
    return wrap(model, config) if config.lora else model, grown


def tensor_norms(model) -> dict:
    "Size and Euclidean norm of every parameter as trained, gathered one at a time under ZeRO-3; the same on all ranks."
    norms = {}
    for name, parameter in model.named_parameters():
        with _gathered(parameter, modifier_rank=None):
            norms[name] = {"size": parameter.numel(), "norm": parameter.detach().double().norm().item()}
    return norms


def save(config: FinetuneConfig, trainer, model, tokenizer, facts: dict) -> None:
    "Write the checkpoint as an ordinary Hugging Face folder, and the numbers to check it against."
    norms = tensor_norms(model)
    if bad := [name for name, entry in norms.items() if not math.isfinite(entry["norm"])]:
        raise TrainingError(not_finite(config, f"the last step left {len(bad)} of {len(norms)} weights without a value ({bad[0]})", []))
    if config.lora: state = adapter_weights(model)
    else: state = trainer.accelerator.get_state_dict(trainer.model_wrapped)   # collective under ZeRO-3; a tied output layer comes twice
    if int(os.environ.get("RANK", 0)): return
    if config.lora.get("qlora"):
        trainer.optimizer.state.clear()
        release(model)
    if config.lora:
        model, adapter = merge(config, state, len(tokenizer))
        facts, norms, state = facts | {"adapter": adapter}, tensor_norms(model), model.state_dict()
    once = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    state = {name: tensor for name, tensor in state.items() if name in once}
    out = Path(config.out_dir)
    model.config.use_cache = True
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(out, state_dict=state)
    tokenizer.backend_tokenizer.no_truncation()   # else the file keeps the length of the last call, and whoever reads it with `tokenizers` alone gets texts cut off
    tokenizer.save_pretrained(out)
    for weights in out.glob("*.safetensors"): shutil.copymode(out / "config.json", weights)   # the library leaves them readable to their owner alone
    write_atomic(out / "README.md", model_card(config, facts))
    write_atomic(out / "trained.json", json.dumps({**facts, "settings": config.science(), "inputs": inputs_of(config), "tokenizer_length": len(tokenizer),
                                                   "parameters": sum(n["size"] for n in norms.values()), "tensors": norms}, indent=1))


# ---- the process

def sizes_in(
    text: str,     # PyTorch's words
    pattern: str,  # a regular expression with {} for the size
) -> float:        # MiB, 0 where it does not say
    "Read a size from what PyTorch says of a GPU's memory."
    found = re.search(pattern.format(r"([\d.]+) (GiB|MiB)"), text)
    return float(found[1]) * {"GiB": 1024, "MiB": 1}[found[2]] if found else 0.0


def explain(error: BaseException, config: FinetuneConfig) -> str:
    "Say what went wrong, with the setting to change where it is known."
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, TrainingError): return str(error)
    low = text.lower()
    if isinstance(error, MemoryError) or "out of memory" in low or "can't allocate memory" in low or "not enough memory" in low:
        tried, free, torn = (sizes_in(text, pattern) for pattern in (r"Tried to allocate {}", r"of which {} is free", r"and {} is reserved by PyTorch but unallocated"))   # what it says of a GPU
        torn = torn if tried and tried <= torn + free and "expandable_segments:True" not in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "") else 0
        pieces = f"{torn / 1024:.1f} GiB of the GPU lay free in pieces too small: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True and try again, or " if torn else ""
        return (f"out of memory: {pieces}lower micro_batch_size (now {config.micro_batch_size}) or max_seq_length (now {config.max_seq_length}), set gradient_checkpointing, "
                f"or spread the model over more ranks with zero_stage 3 (now {config.ranks} rank(s), stage {config.zero_stage}). {text.splitlines()[0][:300]}")
    if getattr(error, "errno", None) in (27, 28, 122) or any(sign in low for sign in ("no space left", "file too large", "disk quota", "pytorchstreamwriter failed")):
        return (f"the disk is full (or a file larger than allowed): free some space, or move the results root ([roots] results in settings.ini, TULU_RESULTS); {config.out_dir} is incomplete and will be made again, "
                f"{kept_text(config)}. {text.splitlines()[0][:200]}")
    if config.compile and any(sign in low for sign in ("invalidcxxcompiler", "no working c++ compiler", "failed to find c compiler", "python.h")):
        return f"compile: found no C++ compiler that works, or no headers of Python: install both (apt-get install g++ python3-dev), or take compile false. {text.splitlines()[0][:300]}"
    if config.compile and any(sign in low for sign in ("inductor", "dynamo", "backendcompilerfailed", "cppcompileerror")):
        reason = next((line for line in text.splitlines() if "error:" in line), text.splitlines()[0])
        return f"compile: the layers could not be compiled; take compile false, and please report this. {reason.strip()[:300]}"
    return text


def clear(out: Path) -> None:
    "Remove what an earlier or interrupted run left, so that nothing of it can pass for this one's."
    for pattern in PRODUCTS:
        for path in out.glob(pattern): shutil.rmtree(path) if path.is_dir() else path.unlink()


def skip_unused_libraries() -> None:
    "Keep the Trainer from importing `datasets` (a second per process), and DeepSpeed from compiling an operator that only inference uses (40 s, needs g++)."
    sys.modules.setdefault("datasets", None)
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def memory(peak: bool) -> int:
    "Bytes that this process holds, or held at most since the last look: of the GPU, else of the host."
    import torch
    if torch.cuda.is_available():
        if not peak: torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    try:
        if not peak: Path("/proc/self/clear_refs").write_text("5")   # forget the peak of loading
    except OSError: pass
    try: fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    except OSError:
        import psutil
        return psutil.Process().memory_info().rss
    return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def train(config: FinetuneConfig) -> int:   # 0, or the status of an interrupted training
    "Fine-tune, save and verify: what every rank does."
    begun = time.monotonic()
    skip_unused_libraries()
    import torch
    from transformers import set_seed, logging as hf_logging
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    torch.set_num_threads(config.threads)
    set_seed(config.seed)
    out, first, cuda = Path(config.out_dir), int(os.environ.get("RANK", 0)) == 0, torch.cuda.is_available()
    join_ranks(cuda)
    tokenizer = load_tokenizer(config.base_dir, config.family)
    encoded, drawn = load_data(config, tokenizer)
    say(f"data: {len(encoded.rows)} conversations, {encoded.tokens} tokens, {encoded.supervised} supervised; {len(encoded.dropped)} more dropped (nothing left to learn), {len(encoded.empty)} empty (no message), {len(encoded.unmasked)} trained on every token (nothing masked)")
    sampler, accumulation, idle = layout(config, encoded)
    say(f"layout: {'packs of at most ' + format(config.pack_size, ',') + ' tokens' if config.packing else str(config.micro_batch_size) + ' padded rows'}, {accumulation} per rank and step; "
        f"{idle['padding_share']:.1%} of the positions are padding, {idle['attention_waste']:.1%} of the attention is wasted")
    arguments = training_arguments(config, cuda, accumulation)
    model, grown = load_model(config, len(tokenizer))
    rank = int(os.environ.get("RANK", 0))
    whose = functools.cache(lambda: identity(config, encoded.rows))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(out / "runs"))   # one folder, so that the curve of a continued training is one
    resumed, record = choose(state_root(out), whose, rank, config.ranks, say)
    watch_as_one(config, record)
    trainer = make_trainer(config, arguments, model, tokenizer, encoded, sampler, out / "training_log.jsonl", resumed, whose)
    if resumed:
        trainer.seconds, trainer.cpu_seconds = record["seconds"], record["cpu_seconds"]
        say(f"continuing from the state of step {record['step']}")
    elif first: shutil.rmtree(out / "runs", ignore_errors=True)
    ready, start_bytes = time.monotonic(), memory(peak=False)
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    trained, peak_bytes = time.monotonic(), memory(peak=True)
    if trainer.interrupted:
        if first: print(MARK, f"interrupted: asked to stop after step {trainer.state.global_step} of {trainer.state.max_steps}; {kept_text(config)}", flush=True)
        leave()
        return INTERRUPTED
    expected = total_steps(len(encoded.rows), config.batch_size, config.epochs)
    if trainer.state.global_step != expected: raise TrainingError(f"the trainer made {trainer.state.global_step} steps, expected {expected}: please report this")
    facts = {"conversations": len(encoded.rows), "dropped": len(encoded.dropped), "empty": len(encoded.empty), "unmasked": len(encoded.unmasked), "tokens": encoded.tokens, "supervised_tokens": encoded.supervised,
             "steps": expected, "forward_passes_per_step": accumulation * config.ranks, **idle, "embedding_rows_added": grown}
    save(config, trainer, model, tokenizer, facts)
    (start_bytes, peak_bytes, cpu_seconds), training = map(max, zip(*gathered((start_bytes, peak_bytes, trainer.cpu_seconds)))), trainer.seconds   # of the rank that has most
    leave()
    if first:
        from .verification import verify
        write_atomic(out / "sample.json", json.dumps({"limit": config.limit, "seed": config.seed, "datasets": drawn, "dropped": encoded.dropped, "empty": encoded.empty, "unmasked": encoded.unmasked}, indent=1))
        unset_hf_deepspeed_config()
        saved = time.monotonic()
        verify(out)
        seconds = {"starting": ready - begun, "training": training, "saving": saved - trained, "verifying": time.monotonic() - saved}
        machine = hardware()
        more = {"step": round(statistics.median(trainer.step_seconds or [0.0]), 4), "start_bytes": start_bytes, "peak_bytes": peak_bytes, "device": machine["gpus"][0].split(",")[0] if machine["gpus"] else machine["processor"], "threads": config.threads, "precision": config.precision}
        write_atomic(out / "seconds.json", json.dumps({name: round(value, 2) for name, value in (seconds | {"cpu_seconds": cpu_seconds}).items()} | more))
        remove(state_root(out))
        say("seconds: " + ", ".join(f"{value:.1f} {name}" for name, value in seconds.items()))


def watch_as_one(config: FinetuneConfig, record: dict | None) -> None:
    "Let W&B show a training and its continuations as one run: the run's id stays in the saved states. A name that somebody has set stays."
    if "wandb" not in config.watchers: return
    os.environ.setdefault("WANDB_RUN_ID", (record or {}).get("run_id") or uuid.uuid4().hex[:12])
    os.environ.setdefault("WANDB_RESUME", "allow")


def leave() -> None:
    "Wait for the other ranks and close the process group."
    from torch import distributed
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def main(path: str) -> int:  # exit status: 0, 1 after a failure, INTERRUPTED when asked to stop
    "Run one rank; the last line of a failure says what to do."
    die_with_parent()
    stop_when_asked()
    config = FinetuneConfig.load(path)
    try: status = train(config)
    except BaseException as error:
        import traceback
        traceback.print_exc()
        print(MARK, f"error: {explain(error, config)}".replace("\n", " "), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)   # a rank that fails must not wait for the others
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
