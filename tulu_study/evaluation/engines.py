"""Engines: what turns prompts into completions and option log-probabilities.

Two of them, with one contract. `VLLMEngine` is the default, `TransformersEngine` the referee and the fallback; `make_engine` chooses.

The contract, for both:

* Prompts are tokenised here, by the checkpoint's own tokenizer with its special tokens, and handed over as ids. A tokenizer that adds a BOS
  token adds exactly one (checked on every prompt). One that adds none stays without where its family has none (SmolLM2, Pythia); a LLaMA or OPT
  whose tokenizer has lost its BOS is refused. `engine.bos` says which.
* A prompt that leaves no room for one new token, or a request that fails, gives an `Output` with `error` and without text. Nothing that
  failed can be mistaken for an empty answer.
* Every decoding option is passed explicitly; a checkpoint's generation config changes nothing, except that its end-of-sequence tokens count.
* A completion ends before the first stop string; `completion_tokens` counts what was generated, the stopping token included.
* Sampled text belongs to its prompt: the noise is drawn from the engine's seed and the prompt's hash, so that no two problems share it and company changes none of it.
* An engine that was started for greedy completions alone (`greedy=True`) refuses everything else. On a CPU vLLM then reads repetitions ahead: it guesses that a text goes on as it did after
  the same words before, has the model judge several guessed tokens in one step, and keeps those that the model chooses too. That moves a completion as another batch does: by rounding.
* `stream` hands over each answer as soon as it is there, in whatever order; the other methods collect.

torch, transformers and vLLM are imported inside functions: importing this module costs nothing.
"""
import gc
import hashlib
import importlib.metadata
import json
import os
import warnings
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from types import MappingProxyType

from tulu_study.core.settings import settings

__all__ = ["EngineError", "Output", "Decoding", "Request", "Engine", "TransformersEngine", "VLLMEngine", "choose_engine", "leading_bos", "make_engine"]

UNANSWERED = "engine: unanswered"  # how the error of a request begins that may succeed at another time
UNBOUNDED = 1 << 40  # a tokenizer's own limit is silenced: length is checked here, against the model
FRONT = {"<s>": "LLaMA", "<|begin_of_text|>": "Llama 3", "</s>": "OPT"}  # BOS tokens of families that saw one in front of every text
FRONTED = ("llama", "mistral", "opt")  # and the model types of these families


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


@dataclass(frozen=True)
class Decoding:
    "All decoding options of a request."
    max_new_tokens: int
    stop: tuple = ()  # strings
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    n: int = 1  # samples per prompt


@dataclass(frozen=True)
class Request:
    "One prompt and what is wanted of it: text, log-probabilities of next tokens, or of whole completions."
    prompt: str  # without BOS
    decoding: Decoding | None = None  # text
    options: tuple = ()  # token ids: log-probability of each as the next token, over the full vocabulary, at one forward pass
    completions: tuple = ()  # of str: a blank joins prompt and completion unless the prompt ends in white space; what follows the prompt's own tokens is the completion
    aggregation: str = "sum"  # over a completion's tokens: "sum", "mean" or "max"

    @property
    def kind(self) -> str: return "generate" if self.decoding else "options" if self.options else "completions"

    @property
    def greedy(self) -> bool: return self.kind == "generate" and not self.decoding.temperature


@dataclass
class Piece:
    "What one forward pass or one generation works on; a request with several completions has several."
    at: int  # the request's position
    part: int  # which of its completions
    ids: list  # token ids, BOS included
    request: Request
    start: int = 0  # where the completion to be scored begins
    seed: int = 0  # of sampled text

    @property
    def work(self): return self.request.decoding or self.request.options or "completions"


class Engine:
    "Tokenisation, length and error handling that both engines share; a sub-class runs the model."
    name = ""
    kinds = ("generate",)  # what it can be asked for, of "generate", "options" and "completions"
    greedy = False  # True: it takes greedy completions alone
    as_turn = False  # True: every prompt becomes the user's turn in a chat format that is not ours to choose
    block = 256  # requests tokenised together

    def __init__(
        self,
        checkpoint: str | Path,  # Hugging Face folder with model and tokenizer
        dtype: str = "float32",  # "float32" or "bfloat16"
        seed: int = 42,  # for sampling; greedy decoding ignores it
        max_length: int | None = None,  # prompt + completion, tokens; None: the model's own maximum
        note: str | None = None,  # why this engine and not the one asked for; goes into every score
        greedy: bool = False,  # nothing but greedy completions will be asked for: vLLM on a CPU then reads repetitions ahead
    ):
        from transformers import AutoConfig, AutoTokenizer
        self.checkpoint, self.dtype, self.seed, self.note, self.greedy = Path(checkpoint), dtype, seed, note, greedy
        if not (self.checkpoint / "config.json").is_file():
            raise EngineError(f"{self.checkpoint} holds no config.json; expected a Hugging Face model folder. Was the checkpoint written?")
        self.config = config = AutoConfig.from_pretrained(self.checkpoint)
        self.max_length = max_length or getattr(config, "max_position_embeddings", None) or 2048
        self.tokenizer = AutoTokenizer.from_pretrained(self.checkpoint)
        self.tokenizer.model_max_length = UNBOUNDED
        self.eos_ids = end_tokens(self.checkpoint, config, self.tokenizer)
        self.bos = leading_bos(self.tokenizer, config.model_type, self.checkpoint.name)
        self.start()

    @property
    def version(self) -> str: return f"{self.name} {installed_version(self.name)}"

    def start(self): "Load the model."
    def reset(self): "Forget everything that depends on earlier requests."
    def release(self): "Give memory back: nothing can be asked any more."
    def run_generate(self, ids, decoding, seeds): raise EngineError(f"the engine {self.name!r} generates no text")
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

    # ---- what is asked

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
        return self.answers([Request(prompt, decoding) for prompt in prompts])

    def option_scores(
        self,
        prompts: list,  # of str, without BOS
        option_token_ids: list,  # candidate next tokens
    ) -> list:  # of Output with `logprobs`
        "Log-probability of each candidate as the next token; see `Request.options`."
        return self.answers([Request(prompt, options=tuple(option_token_ids)) for prompt in prompts])

    def completion_scores(
        self,
        prompts: list,  # of str, without BOS
        completions: list,  # of lists of str: the completions of each prompt
        aggregation: str = "sum",  # over a completion's tokens: "sum", "mean" or "max"
    ) -> list:  # of Output with `logprobs`, one for each completion of the prompt
        "Log-probability of whole completions; see `Request.completions`. One completion that fails fails its prompt."
        return self.answers([Request(prompt, completions=tuple(texts), aggregation=aggregation) for prompt, texts in zip(prompts, completions, strict=True)])

    def answers(self, requests: list) -> list:
        "The Output of each request, in order."
        found = dict(self.stream(requests))
        return [found[at] for at in range(len(requests))]

    def require(self, kind: str) -> None:
        "Raise EngineError where this engine cannot be asked for something, before it is asked for anything."
        if kind in self.kinds: return
        if kind == "completions": raise EngineError(f"the engine {self.name!r} gives no log-probabilities of whole completions, which a benchmark by choice needs (TruthfulQA, setting mc); leave that setting out, or run the model with vllm or transformers")
        raise EngineError(f"the engine {self.name!r} can be asked for {' and '.join(self.kinds)} alone, found a benchmark that needs {kind}; run the model with vllm or transformers")

    def stream(
        self,
        requests: list,  # of Request, of whatever kinds
    ):  # yields (position, Output) as answers come
        "Answer requests. Never raises for a single one; see `Output.error`."
        for kind in dict.fromkeys(request.kind for request in requests): self.require(kind)
        if self.greedy and not all(request.greedy for request in requests):
            raise EngineError("this engine was started for greedy completions alone (greedy=True), found a request for log-probabilities or sampled text; start it without greedy")
        ready, parts = [], {}
        for piece, output in self.serve(self.pieces(requests, ready, parts)):
            while ready: yield ready.pop()
            if piece.request.kind == "completions":
                parts[piece.at][piece.part] = output
                if None in (scored := parts[piece.at]): continue
                output = self.gather(parts.pop(piece.at), piece)
            else: output.prompt_tokens = len(piece.ids)
            yield piece.at, output
        yield from ready

    def pieces(self, requests, ready, parts):
        "Tokenised pieces of the requests, a block at a time. What does not fit goes to `ready` as an error; `parts` gets room for the outputs of each request's completions."
        for begin in range(0, len(requests), self.block):
            block = requests[begin:begin + self.block]
            for at, (request, ids) in enumerate(zip(block, self.encode([request.prompt for request in block])), begin):
                if request.kind != "completions": pieces = [Piece(at, 0, ids, request, seed=prompt_seed(self.seed, request.prompt))]
                else:
                    join = "" if request.prompt.endswith(("\n", " ")) else " "
                    pieces = [Piece(at, part, whole, request, len(ids)) for part, whole in enumerate(self.encode([request.prompt + join + text for text in request.completions]))]
                longest = max((len(piece.ids) for piece in pieces), default=0)
                if longest >= self.max_length: ready.append((at, Output(prompt_tokens=len(ids), error=f"prompt too long: {longest} tokens, the model takes {self.max_length} with one new token")))
                elif not pieces: ready.append((at, Output(prompt_tokens=len(ids), logprobs=[])))
                else:
                    if request.kind == "completions": parts[at] = [None] * len(pieces)
                    yield from pieces

    def gather(self, scored, piece):
        "One Output of the scored completions of a prompt."
        problem = next((output.error for output in scored if output.error), None)
        if not problem and not all(output.logprobs for output in scored): problem = "a completion adds no token to its prompt"
        if problem: return Output(prompt_tokens=piece.start, error=problem)
        reduce = {"sum": sum, "mean": lambda values: sum(values) / len(values), "max": max}[piece.request.aggregation]
        return Output(logprobs=[float(reduce(output.logprobs)) for output in scored], prompt_tokens=piece.start, completion_tokens=sum(len(output.logprobs) for output in scored))

    def serve(self, pieces):
        "Yield (piece, Output), batch after batch; a batch that fails is repeated piece by piece, so that one bad request costs only itself."
        for _, group in groupby(pieces, key=lambda piece: piece.work):
            while block := list(islice(group, self.block)):
                for batch in self.batches(block):
                    try: results = self.run(batch)
                    except Exception as error:
                        self.recover(error)
                        results = [self.alone(piece) for piece in batch]
                    yield from zip(batch, results)

    def batches(self, pieces): return [pieces]

    def run(self, batch) -> list:
        "Outputs of pieces of the same work."
        ids, request = [piece.ids for piece in batch], batch[0].request
        if request.kind == "options": return self.run_options(ids, list(request.options))
        if request.kind == "completions": return self.run_tails([(piece.ids, piece.start) for piece in batch])
        return self.run_generate(ids, request.decoding, [piece.seed for piece in batch])

    def alone(self, piece):
        try: return self.run([piece])[0]
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


def leading_bos(
    tokenizer,
    model_type: str,  # of the checkpoint's config
    name: str,  # of the checkpoint, for the message
) -> str:  # "one", "none" (its family has none) or "missing" (there is one to add, and whether the family does is not known)
    "How many BOS tokens the tokenizer puts in front of every prompt. Raises EngineError where the family's models always saw one and this tokenizer adds none."
    if list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]: return "one"
    family = FRONT.get(tokenizer.bos_token)
    if family and model_type in FRONTED:
        raise EngineError(f"the tokenizer of {name} puts no BOS token in front of a prompt, but has {tokenizer.bos_token!r} of the {family} family, whose models saw one in front of every text; scores without it would be too low. "
                          "Set add_bos_token to true in its tokenizer_config.json, or take the tokenizer of the model that it was made from")
    return "missing" if family else "none"


def prompt_seed(seed: int, prompt: str) -> int:
    "Seed of a prompt's noise (its k-th sample adds k): problems do not share it, and it is the same in whatever company the prompt is asked."
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt}".encode()).digest()[:4], "big") >> 1  # 31 bits: what every engine and server takes


def cut_at_stop(text: str, stop: tuple) -> tuple:
    "The text before the earliest stop string, and whether there was one."
    places = [at for string in stop if (at := text.find(string)) >= 0]
    return (text[:min(places)], True) if places else (text, False)


class TransformersEngine(Engine):
    "`transformers` in left-padded batches: slow, simple, and the referee for the other engine."
    name = "transformers"
    kinds = ("generate", "options", "completions")
    batch_tokens = 16384  # tokens held for a batch: padded prompts and what may be generated
    max_batch = 32  # sequences, each sample one

    def start(self):
        import torch
        from transformers import AutoModelForCausalLM
        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=getattr(torch, self.dtype)).to(self.device).eval()
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (self.eos_ids or [0])[0]

    def release(self):
        self.model = None
        gc.collect()
        self.recover(None)

    def batches(self, pieces):
        "Pieces in batches of similar length, longest first; the same for the same pieces. Near the model's limit each goes alone, so that none shortens another."
        decoding, batch = pieces[0].request.decoding, []
        new, each = (decoding.max_new_tokens, decoding.n) if decoding else (0, 1)
        for piece in sorted(pieces, key=lambda piece: (-len(piece.ids), piece.at, piece.part)):
            sequences = (len(batch) + 1) * each
            if batch and (sequences > self.max_batch or (width := len(batch[0].ids) + new) * sequences > self.batch_tokens or width > self.max_length):
                yield batch
                batch = []
            batch.append(piece)
        if batch: yield batch

    def padded(self, ids):
        "Left-padded ids and mask of a batch."
        width = max(map(len, ids))
        tokens = self.torch.tensor([[self.pad_id] * (width - len(row)) + row for row in ids], device=self.device)
        mask = self.torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.device)
        return tokens, mask

    def recover(self, error):
        if self.device == "cuda": self.torch.cuda.empty_cache()

    def logits(self, ids, keep):
        "Logits of the last `keep` positions of left-padded prompts, and the padded ids."
        tokens, mask = self.padded(ids)
        with self.torch.inference_mode():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            return self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep).logits, tokens

    def run_options(self, ids, option_ids):
        logits, _ = self.logits(ids, 1)
        return [Output(logprobs=values, completion_tokens=1) for values in logits[:, -1].float().log_softmax(-1)[:, option_ids].cpu().tolist()]

    def run_tails(self, tails):
        sizes = [len(ids) - start for ids, start in tails]
        logits, tokens = self.logits([ids for ids, _ in tails], max(sizes) + 1)  # of the longest completion and of the token before it
        found = []
        for row, size in enumerate(sizes):
            values = logits[row, logits.shape[1] - 1 - size:-1].float().log_softmax(-1)
            found.append(Output(logprobs=values.gather(-1, tokens[row, tokens.shape[1] - size:, None])[:, 0].cpu().tolist() if size > 0 else []))
        return found

    def run_generate(self, ids, decoding, seeds):
        "Every sample is a sequence of its own, with noise of its own; no more of them at once than a batch may hold."
        samples, rows = [(i, k) for i in range(len(ids)) for k in range(decoding.n)], []
        size = max(1, min(self.max_batch, self.batch_tokens // (max(map(len, ids)) + decoding.max_new_tokens)))
        for at in range(0, len(samples), size):
            part = samples[at:at + size]
            rows += self.complete([ids[i] for i, _ in part], decoding, [seeds[i] + k for i, k in part])
        return [self.read(ids[i], rows[i * decoding.n:(i + 1) * decoding.n], decoding) for i in range(len(ids))]

    def complete(self, ids, decoding, seeds):
        "Token ids generated after each row of ids."
        from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
        engine, torch, width = self, self.torch, max(map(len, ids))

        class StopStrings(StoppingCriteria):
            "True for the rows whose latest tokens complete a stop string."
            def __call__(self, tokens, scores, **options):
                tails = [engine.tokenizer.decode(row[max(width, len(row) - 16):], skip_special_tokens=True) for row in tokens.tolist()]
                return torch.tensor([cut_at_stop(tail, decoding.stop)[1] for tail in tails], device=tokens.device)

        class Noise(LogitsProcessor):
            "The token of the largest p / e, e from an exponential distribution, is a draw from p (Gumbel); every row draws from a stream of its own."
            streams = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

            def __call__(self, tokens, scores):
                noise = torch.stack([torch.empty(scores.shape[-1], device=scores.device).exponential_(generator=stream) for stream in self.streams])
                return scores.float().log_softmax(-1) - noise.log()

        wanted = [(decoding.temperature, TemperatureLogitsWarper), (decoding.top_k, TopKLogitsWarper), (decoding.top_p < 1 and decoding.top_p, TopPLogitsWarper)]
        processors = [make(value) for value, make in wanted if value] + [Noise()] if decoding.temperature else []
        config = GenerationConfig(max_new_tokens=min(decoding.max_new_tokens, self.max_length - width), do_sample=False, eos_token_id=self.eos_ids or None,
                                  pad_token_id=self.pad_id, bos_token_id=self.tokenizer.bos_token_id)
        tokens, mask = self.padded(ids)
        criteria = StoppingCriteriaList([StopStrings()] if decoding.stop else [])
        with torch.inference_mode():
            out = self.model.generate(input_ids=tokens, attention_mask=mask, generation_config=config, stopping_criteria=criteria, logits_processor=LogitsProcessorList(processors))
        return out[:, width:].tolist()


def vllm_environment() -> None:
    "Environment that vLLM reads, before its first import; what the user has set stays."
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # stay in this process: notebooks have no main guard, and a kill leaves no orphan
                        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads are the settings' business
                        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed.reduce_op`")  # of vLLM's look at all modules, said to whoever reads a run notebook


# How vLLM reads ahead on a CPU: where the last two to four tokens stood earlier in a text, it guesses that what followed them follows again. Done with up to 16 answers under way, 100 questions of GSM
# take SmolLM2-135M 190 steps instead of 539; with more, a step takes the longer the more tokens it has, and nothing is guessed. Only for greedy completions: beside guesses vLLM gives no log-probabilities of tokens
# named by the caller, and how many random numbers a sample takes would depend on them. The guessing is compiled in the first step, in 1.4 s.
READING_AHEAD = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_min": 2, "prompt_lookup_max": 4, "num_speculative_tokens_per_batch_size": [[1, 4, 8], [5, 16, 4], [17, 64, 0]]}


def start_beside_numba() -> None:
    """Let vLLM start on a CPU where numba is imported already, by the user or by an engine that reads ahead. vLLM 0.32 looks for its kernels in `vars` of whatever any module holds, which llvmlite's
    library answers with something that is no dictionary."""
    try: from vllm.triton_utils import dispatcher
    except ImportError: return  # an older version, which does not look
    dispatcher.vars = lambda value: found if isinstance(found := vars(value), (dict, MappingProxyType)) else {}


class VLLMEngine(Engine):
    "vLLM, on a GPU or (vllm-cpu) on a CPU, in this process; a queue that is never let run dry, whatever the requests' kinds, so that the model always has a full batch."
    name = "vllm"
    kinds = ("generate", "options", "completions")

    def start(self):
        vllm_environment()
        import torch
        import torch._dynamo
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind
        start_beside_numba()
        eager = not torch.cuda.is_available()  # graphs are captured on GPUs alone
        if eager: torch._dynamo.config.disable = True  # enforce_eager leaves one helper to compile, which takes 4 to 30 s and saves nothing
        self.params, self.whole, self.numbers = SamplingParams, RequestOutputKind.FINAL_ONLY, iter(range(UNBOUNDED))
        try:
            self.llm = LLM(model=str(self.checkpoint), tokenizer=str(self.checkpoint), dtype=self.dtype, seed=self.seed, max_model_len=self.max_length,
                           enforce_eager=eager, enable_prefix_caching=True, generation_config="vllm", disable_log_stats=True, use_tqdm_on_load=False,
                           **self.device_options())
            self.window = 2 * self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs  # requests handed over: as many wait as run
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
        if self.greedy: options["speculative_config"] = READING_AHEAD
        if "VLLM_CPU_KVCACHE_SPACE" in os.environ: return options  # the user's own choice, in GiB
        return options | {"kv_cache_memory_bytes": min(max(64 << 20, sequences * self.max_length * self.bytes_per_token()), 1 << 30)}

    def bytes_per_token(self) -> int:
        "Size of the key and value cache of one token, all layers."
        config = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * head_dim * (2 if self.dtype == "bfloat16" else 4)

    def reset(self): self.llm.reset_prefix_cache()

    def release(self):
        from vllm.distributed import cleanup_dist_env_and_memory
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        cleanup_dist_env_and_memory()

    def drop(self):
        "Take unfinished requests off the scheduler."
        self.llm.llm_engine.abort_request(list(self.llm.llm_engine.output_processor.request_states), internal=True)

    def recover(self, error):
        "Take unfinished requests off the scheduler; EngineError where the engine itself is gone."
        try: self.drop()
        except Exception as fatal:
            raise EngineError(f"vLLM broke on a request ({describe(error)}) and cannot go on ({describe(fatal)}); run the same command again, finished chunks are kept") from error

    def serve(self, pieces):
        "Yield (piece, Output) as requests finish. Where a step fails, each of the requests under way is tried once more by itself."
        pieces, running = iter(pieces), {}
        try:
            while True:
                for piece in islice(pieces, self.window - len(running)):
                    try: running[self.add(piece)] = piece
                    except Exception as error: yield piece, Output(error=f"engine: {describe(error)}")
                if not running: break
                try: finished = self.step()
                except Exception as error:
                    self.recover(error)
                    failed, running = list(running.values()), {}
                    for piece in failed: yield piece, self.alone(piece)
                else:
                    for number, answer in finished:
                        piece = running.pop(number)
                        yield piece, self.result(piece, answer)
        finally:
            if running: self.drop()  # whoever asked has stopped listening

    def run(self, batch):
        numbers, found = [self.add(piece) for piece in batch], {}
        while len(found) < len(batch): found |= dict(self.step())
        return [self.result(piece, found[number]) for piece, number in zip(batch, numbers)]

    def step(self) -> list:
        "One step of the model: the requests that it finished."
        return [(answer.request_id, answer) for answer in self.llm.llm_engine.step() if answer.finished]

    def add(self, piece) -> str:
        "Put a piece into the queue; returns its number."
        number = str(next(self.numbers))
        self.llm.llm_engine.add_request(number, {"prompt_token_ids": piece.ids}, self.sampling(piece))
        return number

    def sampling(self, piece):
        "Sampling parameters with every field that changes tokens set explicitly."
        request, decoding = piece.request, piece.request.decoding
        if request.kind == "options": own = {"max_tokens": 1, "logprobs": len(request.options), "logprob_token_ids": list(request.options), "detokenize": False}
        elif request.kind == "completions": own = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}  # 0: of the prompt's own tokens alone
        else: own = {"max_tokens": decoding.max_new_tokens, "n": decoding.n, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k, "stop": list(decoding.stop) or None}
        return self.params(**{"n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
                              "repetition_penalty": 1.0, "seed": piece.seed, "stop": None, "stop_token_ids": self.eos_ids, "ignore_eos": False,
                              "min_tokens": 0, "skip_special_tokens": True, "spaces_between_special_tokens": True,
                              "include_stop_str_in_output": False, "detokenize": True, "output_kind": self.whole} | own)

    def result(self, piece, answer):
        "The Output of a finished request."
        request = piece.request
        if request.kind == "generate": return self.read(piece.ids, [list(sample.token_ids) for sample in answer.outputs], request.decoding)
        if request.kind == "options":
            found = answer.outputs[0].logprobs[0]
            return Output(logprobs=[float(found[token].logprob) for token in request.options], completion_tokens=1)
        return Output(logprobs=[float(at[token].logprob) for token, at in zip(piece.ids[piece.start:], answer.prompt_logprobs[piece.start:])])


ENGINES = {"vllm": VLLMEngine, "transformers": TransformersEngine}


def choose_engine(
    wanted: str = "",  # "vllm", "transformers", "auto" or "" (the site's setting)
) -> tuple:  # engine name, note (None, or why it is not the one asked for)
    "Decide which engine runs: vLLM where it can be imported, else transformers, with a warning."
    wanted = wanted or settings().engine or "auto"
    if wanted not in (*ENGINES, "auto"): raise ValueError(f"engine {wanted!r} is unknown; choose vllm, transformers or auto")
    if wanted == "transformers": return "transformers", None
    try:
        vllm_environment()
        from vllm import LLM, SamplingParams  # noqa: F401  the import itself is the test: an installed vLLM can still be unusable here
        return "vllm", None
    except Exception as error:
        note = f"vLLM cannot be imported ({describe(error)}): the transformers engine took over"
        warnings.warn(note, stacklevel=2)
        return "transformers", note


def make_engine(
    checkpoint: str | Path,  # Hugging Face folder
    engine: str = "",  # "vllm", "transformers", "auto" or "" (the site's setting)
    **options,  # dtype, seed, max_length, greedy
) -> Engine:  # started
    "Start the engine that `choose_engine` decides on."
    name, note = choose_engine(engine)
    return ENGINES[name](checkpoint, note=note, **options)
