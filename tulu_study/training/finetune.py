"""The process that trains, one per rank: `python -m tulu_study.training.finetune settings.json`.

`tulu_study.training.launch` starts it. It is `transformers.Trainer` with DeepSpeed ZeRO; ours are the order of the data, its packing, the choice of the loss's
denominator, the optimiser's groups and schedule (those of the reference), the log, and the numbers that the saved checkpoint is checked against.
"""
import json, math, os, random, shutil, sys, time
from pathlib import Path

from tulu_study.core.files import read_jsonl, write_atomic
from tulu_study.core.process import die_with_parent
from .config import MARK, FinetuneConfig, TrainingError
from .encoding import IGNORED, Encoded, encode_all
from .packing import best_fit, flatten, register_segments, spread, supervised, token_weights, waste, weighted_loss
from .schedule import schedule, total_steps, warmup_steps
from .tokenizers import _gathered, grow_embeddings, load_tokenizer

PRODUCTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
            "chat_template.jinja", "README.md", "training_log.jsonl", "sample.json", "trained.json", "verification.json", "seconds.json")


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
    "Read, sample and encode the conversations. Raises TrainingError when nothing is left to learn from."
    conversations = [row for row in read_jsonl(config.data_file) if row.get("messages") or "completion" in row]
    if not conversations: raise TrainingError(f"{config.data_file} holds no conversations: convert the dataset {config.data!r} again")
    sampled, drawn = sample_conversations(conversations, config.limit, config.seed)
    encoded = encode_all(sampled, tokenizer, config.max_seq_length)
    if not encoded.rows:
        raise TrainingError(f"{config.data}: no answer is left within max_seq_length {config.max_seq_length} in any of {len(sampled)} conversations: raise max_seq_length")
    return encoded, drawn


class Rows:
    """The encoded rows as a torch dataset, with one more at index `len(rows)`: a padding row without any label, which fills up micro-batches so
    that all ranks get the same number of them. It adds nothing to a loss that is divided by the number of supervised tokens."""

    def __init__(self, rows: list, padding_id: int):
        self.rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        self.rows.append({"input_ids": [padding_id] * 2, "labels": [IGNORED] * 2, "attention_mask": [1, 1]})

    def __len__(self): return len(self.rows) - 1
    def __getitem__(self, i): return self.rows[i]


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

    def __init__(self, rows: list): self.rows = rows
    def __len__(self): return len(self.rows)
    def __getitem__(self, pack): return [(self.rows[i], weight) for i, weight in pack]


class PackOrder(EpochOrder):
    """The packs of every epoch: the same order as `EpochOrder`, taken `batch_size` conversations at a time, each such step laid into
    the same number of packs, so that every rank makes as many forward passes in every step."""

    def __init__(self, rows: list, config: FinetuneConfig):
        super().__init__(len(rows), config.seed)
        self.config, self.lengths, self.counts = config, [len(row["input_ids"]) for row in rows], [supervised(row) for row in rows]
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


def layout(config: FinetuneConfig, encoded: Encoded) -> tuple[EpochOrder, int, dict]:
    "The sampler, the forward passes per rank and optimiser step, and what they compute in vain (the first epoch's; the others hardly differ)."
    if config.packing:
        sampler = PackOrder(encoded.rows, config)
        return sampler, sampler.accumulation, waste([[sampler.lengths[i] for i, _ in pack] for pack in sampler.packs(0)], packed=True)
    filled = config.micro_batch_size * config.ranks if config.loss == "token" else 1
    sampler, lengths = EpochOrder(len(encoded.rows), config.seed, filled), [len(row["input_ids"]) for row in encoded.rows]
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
            "gradient_accumulation_steps": accumulation, "wall_clock_breakdown": False}


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
        adam_epsilon=1e-8, max_grad_norm=1.0, bf16=config.precision == "bf16", deepspeed=deepspeed_config(config, cuda, accumulation), use_cpu=not cuda,
        seed=config.seed, data_seed=config.seed, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, dataloader_num_workers=0, dataloader_pin_memory=cuda, average_tokens_across_devices=True, **checkpointing)


def parameter_groups(model, weight_decay: float) -> list[dict]:
    "The reference's two groups: no decay where a name contains `bias` or `layer_norm.weight`."
    free = lambda name: any(part in name for part in ("bias", "layer_norm.weight"))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if not free(n)], "weight_decay": weight_decay}, {"params": [p for n, p in named if free(n)], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_trainer(config: FinetuneConfig, arguments, model, tokenizer, encoded: Encoded, sampler: EpochOrder, log: Path):
    "Put the Trainer together."
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback

    class StudyTrainer(Trainer):
        "Trainer with the study's order, optimiser, schedule and loss."
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if config.packing: self.loss_is_scaled_for_ga, self.model_accepts_loss_kwargs = True, False   # the weights are those of the whole step
            elif config.loss == "microbatch": self.model_accepts_loss_kwargs = False   # the Trainer then averages micro-batch means
            self.window = torch.zeros(4, dtype=torch.float64)                        # loss, micro-batches, tokens, supervised tokens

        def _get_train_sampler(self, *_): return sampler

        def create_optimizer(self, *_):
            if self.optimizer is None:
                self.optimizer = torch.optim.AdamW(parameter_groups(self.model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8)
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
            self.window += torch.tensor([loss.detach().float().item(), *counts], dtype=torch.float64)
            return loss

        def packed_loss(self, model, inputs):
            "The pack's share of the step's loss, times the ranks because gradients are averaged over them."
            targets, of, weights, *counts = (inputs.pop(name) for name in ("targets", "of", "weights", "tokens", "supervised"))
            loss = weighted_loss(model(**inputs, use_cache=False).logits, targets, of, weights) * config.ranks   # with a cache the boundaries would be lost
            self.window += torch.tensor([loss.detach().item(), 1.0, *counts], dtype=torch.float64)
            return loss

        def take_window(self) -> list[float]:
            "Sums of the step over all ranks; clears them."
            total = self.window.clone()
            if config.ranks > 1:
                device = total.to(self.args.device)
                torch.distributed.all_reduce(device)
                total = device.cpu()
            self.window.zero_()
            return total.tolist()

    class Log(TrainerCallback):
        "One row per optimiser step in training_log.jsonl, and a line for people now and then."
        def on_train_begin(self, args, state, control, **_):
            self.begun = self.last = time.monotonic()
            self.shown = 0.0
            self.file = open(log, "w", encoding="utf-8") if args.process_index == 0 else None
            say(f"training: {state.max_steps} steps of {config.batch_size} conversations, {len(encoded.rows)} in all, {config.ranks} rank(s), ZeRO {config.zero_stage}, {config.precision}")

        def on_step_begin(self, args, state, control, optimizer=None, **_):
            self.rate = trainer.optimizer.param_groups[0]["lr"]

        def on_step_end(self, args, state, control, **_):
            summed, batches, tokens, supervised = trainer.take_window()
            loss, now = summed / (config.ranks if config.packing or config.loss == "token" else batches), time.monotonic()
            row = {"step": state.global_step, "loss": loss, "learning_rate": self.rate, "tokens": int(tokens), "supervised_tokens": int(supervised), "seconds": round(now - self.last, 4)}
            self.last = now
            if self.file:
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()
            if not math.isfinite(loss): raise TrainingError(f"the loss became {loss} at step {state.global_step}: lower learning_rate (now {config.learning_rate:g}), raise warmup_ratio (now {config.warmup_ratio:g}), or use precision fp32 (now {config.precision})")
            if now - self.shown > 5 or state.global_step in (1, state.max_steps):
                self.shown = now
                say(f"step {state.global_step}/{state.max_steps}  loss {loss:.4f}  rate {self.rate:.2e}  {tokens / max(row['seconds'], 1e-9):,.0f} tokens/s  {now - self.begun:.0f} s")

        def on_train_end(self, args, state, control, **_):
            if self.file: self.file.close()

    rows, collate = Rows(encoded.rows, tokenizer.pad_token_id), DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=IGNORED)
    if config.packing: rows, collate = Packs(encoded.rows), lambda packs: flatten(packs[0], tokenizer.pad_token_id)
    trainer = StudyTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, data_collator=collate, callbacks=[Log()])
    return trainer


def load_model(config: FinetuneConfig, n_tokens: int):
    "The base model in float32 (the library's default would be the checkpoint's type), with rows for new tokens, its cache off."
    import torch
    from transformers import AutoModelForCausalLM
    attention = {"attn_implementation": register_segments()} if config.packing else {}
    model = AutoModelForCausalLM.from_pretrained(config.base_dir, dtype=torch.float32, **attention)
    grown = grow_embeddings(model, n_tokens, config.protocol, config.seed)
    model.config.use_cache = False
    return model, grown


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
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)   # collective under ZeRO-3; a tied output layer comes twice
    if int(os.environ.get("RANK", 0)): return
    once = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    state = {name: tensor for name, tensor in state.items() if name in once}
    out = Path(config.out_dir)
    model.config.use_cache = True
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(out, state_dict=state)
    tokenizer.save_pretrained(out)
    for weights in out.glob("*.safetensors"): shutil.copymode(out / "config.json", weights)   # the library leaves them readable to their owner alone
    write_atomic(out / "README.md", model_card(config, facts))
    write_atomic(out / "trained.json", json.dumps({**facts, "settings": config.science(), "tokenizer_length": len(tokenizer),
                                                   "parameters": sum(n["size"] for n in norms.values()), "tensors": norms}, indent=1))


def model_card(config: FinetuneConfig, facts: dict) -> str:
    "A short README for the checkpoint."
    table = "\n".join(f"| {name} | {value} |" for name, value in config.science().items() if name not in ("model", "size"))
    return (f"# {config.model or 'fine-tuned model'}\n\n{config.base or 'A base model'} fine-tuned on {config.data or 'conversations'} in the Tülu chat format, "
            f"by the study of \"How Far Can Camels Go?\" (arXiv 2306.04751).\n\n{facts['conversations']} conversations, {facts['steps']} optimiser steps, "
            f"{facts['tokens']} tokens, {facts['supervised_tokens']} of them supervised. Licences of the base model and of the data apply.\n\n| setting | value |\n|---|---|\n{table}\n")


# ---- the process

def explain(error: BaseException, config: FinetuneConfig) -> str:
    "Say what went wrong, with the setting to change where it is known."
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, TrainingError): return str(error)
    low = text.lower()
    if isinstance(error, MemoryError) or "out of memory" in low or "can't allocate memory" in low or "not enough memory" in low:
        return (f"out of memory: lower micro_batch_size (now {config.micro_batch_size}) or max_seq_length (now {config.max_seq_length}), set gradient_checkpointing, "
                f"or spread the model over more ranks with zero_stage 3 (now {config.ranks} rank(s), stage {config.zero_stage}). {text.splitlines()[0][:300]}")
    if getattr(error, "errno", None) == 28 or "no space left" in low:
        return f"the disk is full: free some space, or move the results root ([roots] results in settings.ini, TULU_RESULTS); {config.out_dir} is incomplete and will be made again. {text.splitlines()[0][:200]}"
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


def train(config: FinetuneConfig) -> None:
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
    say(f"data: {len(encoded.rows)} conversations, {encoded.tokens} tokens, {encoded.supervised} supervised; {len(encoded.dropped)} more dropped (nothing left to learn), {len(encoded.unmasked)} trained on every token (nothing masked)")
    sampler, accumulation, idle = layout(config, encoded)
    say(f"layout: {'packs of at most ' + format(config.pack_size, ',') + ' tokens' if config.packing else str(config.micro_batch_size) + ' padded rows'}, {accumulation} per rank and step; "
        f"{idle['padding_share']:.1%} of the positions are padding, {idle['attention_waste']:.1%} of the attention is wasted")
    arguments = training_arguments(config, cuda, accumulation)
    model, grown = load_model(config, len(tokenizer))
    trainer = make_trainer(config, arguments, model, tokenizer, encoded, sampler, out / "training_log.jsonl")
    ready = time.monotonic()
    trainer.train()
    trained = time.monotonic()
    expected = total_steps(len(encoded.rows), config.batch_size, config.epochs)
    if trainer.state.global_step != expected: raise TrainingError(f"the trainer made {trainer.state.global_step} steps, expected {expected}: please report this")
    facts = {"conversations": len(encoded.rows), "dropped": len(encoded.dropped), "unmasked": len(encoded.unmasked), "tokens": encoded.tokens, "supervised_tokens": encoded.supervised,
             "steps": expected, "forward_passes_per_step": accumulation * config.ranks, **idle, "embedding_rows_added": grown}
    save(config, trainer, model, tokenizer, facts)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if first:
        from .verification import verify
        write_atomic(out / "sample.json", json.dumps({"limit": config.limit, "seed": config.seed, "datasets": drawn, "dropped": encoded.dropped, "unmasked": encoded.unmasked}, indent=1))
        unset_hf_deepspeed_config()
        saved = time.monotonic()
        verify(out)
        seconds = {"starting": ready - begun, "training": trained - ready, "saving": saved - trained, "verifying": time.monotonic() - saved}
        write_atomic(out / "seconds.json", json.dumps({name: round(value, 2) for name, value in seconds.items()}))
        say("seconds: " + ", ".join(f"{value:.1f} {name}" for name, value in seconds.items()))


def main(path: str) -> int:  # exit status
    "Run one rank; the last line of a failure says what to do."
    die_with_parent()
    config = FinetuneConfig.load(path)
    try: train(config)
    except BaseException as error:
        import traceback
        traceback.print_exc()
        print(MARK, f"error: {explain(error, config)}".replace("\n", " "), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)   # a rank that fails must not wait for the others
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
