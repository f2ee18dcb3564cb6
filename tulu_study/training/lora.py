"""Low-rank adaptation: train small matrices beside frozen weights, and merge them into an ordinary checkpoint at the end.

As in the reference, new embedding rows are made before the model is wrapped, stay frozen and are no part of the adapter. The merge is done in float32, from
the base model's own files: what DeepSpeed holds of frozen weights are 16-bit copies. With QLoRA the base model lies in 4 bits (NF4, twice quantised) while
training, and the adapter is merged into what these 4 bits stand for, because that is the model it was trained beside."""
import importlib.util, json, os
from pathlib import Path

from tulu_study.core.params import Lora
from .config import FinetuneConfig, TrainingError
from .tokenizers import _gathered, grow_embeddings

ADAPTER = "adapter"   # folder of the adapter beside the merged weights
NO_CUDA = "lora.qlora: found true, but there is no CUDA device, which 4-bit training needs: take qlora: false (the same adapter beside 16-bit weights), or a machine with an NVIDIA GPU"

TARGETS = {   # every linear layer of a block
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


def lora_config(config: FinetuneConfig):
    "The settings in peft's words. TrainingError where peft is not installed."
    if not importlib.util.find_spec("peft"): raise TrainingError("lora: found settings for it, but peft is not installed: pip install 'tulu-study[learn]', or take lora: {} (all weights are trained)")
    from peft import LoraConfig
    wanted = Lora(**config.lora)
    return LoraConfig(task_type="CAUSAL_LM", r=wanted.rank, lora_alpha=wanted.alpha, lora_dropout=wanted.dropout, target_modules=wanted.targets or TARGETS[config.family], bias="none")


def quantised(config: FinetuneConfig) -> dict:
    "What QLoRA adds to the loading of a base model. TrainingError without CUDA or bitsandbytes."
    import torch
    if not config.lora.get("qlora"): return {}
    if not torch.cuda.is_available(): raise TrainingError(NO_CUDA)
    if not importlib.util.find_spec("bitsandbytes"): raise TrainingError("lora.qlora: found true, but bitsandbytes is not installed: pip install 'tulu-study[gpu]'")
    from transformers import BitsAndBytesConfig
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16),
            "device_map": {"": int(os.environ.get("LOCAL_RANK", 0))}, "dtype": torch.bfloat16}


def wrap(model, config: FinetuneConfig):
    "Freeze a model whose embeddings have grown already, and put the trainable matrices beside its linear layers. TrainingError for a target that it does not have."
    from peft import get_peft_model, prepare_model_for_kbit_training
    settings = lora_config(config)
    have = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if missing := sorted(set(settings.target_modules) - have):
        raise TrainingError(f"lora.targets: found {', '.join(missing)}, which no layer of this model is called; expected some of {', '.join(TARGETS[config.family])}")
    if config.lora.get("qlora"):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, settings)


def adapter_weights(model) -> dict:
    "The trained matrices on the CPU, gathered one at a time under ZeRO-3; the same on all ranks."
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad: continue
        with _gathered(parameter, modifier_rank=None): found[name] = parameter.detach().to("cpu", copy=True)
    return found


def release(model) -> None:
    "Give back the memory of a trained model's weights, whoever still refers to it: the merge loads the base model once more."
    import torch
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]: tensor.data, tensor.grad = torch.empty(0, dtype=tensor.dtype), None
        if getattr(module, "quant_state", None) is not None: module.quant_state = None          # scales of a 4-bit layer, which the layer and its weight both hold
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None: module.weight.quant_state = None
    torch.cuda.empty_cache()


def dequantised(model):
    "Turn a model of 4-bit layers into what these bits stand for, in float32 on the CPU. Layer by layer: the GPU holds the 4 bits and never more than one layer beside them."
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    for name in [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]:
        layer = model.get_submodule(name)
        whole = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        whole.weight = torch.nn.Parameter(dequantize_4bit(layer.weight.data, layer.weight.quant_state).cpu().float())   # `.to("cpu", float32)` would widen it on the GPU
        if layer.bias is not None: whole.bias = torch.nn.Parameter(layer.bias.detach().cpu().float())
        model.set_submodule(name, whole)
    model.hf_quantizer.remove_quantization_config(model)
    return model.cpu().float()


def merge(config: FinetuneConfig, weights: dict, n_tokens: int) -> tuple:   # (merged model in float32, {name in the adapter's file: {"size", "norm"}})
    "Write the adapter beside the checkpoint, and add it to a fresh copy of the base model. TrainingError when the adapter does not fit."
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    unset_hf_deepspeed_config()   # this copy is nobody's to spread
    base = AutoModelForCausalLM.from_pretrained(config.base_dir, **({"dtype": torch.float32} | quantised(config)))
    if config.lora.get("qlora"): base = dequantised(base)
    grow_embeddings(base, n_tokens, config.protocol, config.seed)
    model = get_peft_model(base, lora_config(config))
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wanted != set(weights): raise TrainingError(f"the trained adapter has {len(set(weights) - wanted)} matrices too many and {len(wanted - set(weights))} too few: please report this")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    model.peft_config["default"].base_model_name_or_path = config.base or Path(config.base_dir).name
    folder = Path(config.out_dir) / ADAPTER
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)   # peft's empty form; the checkpoint's card speaks for both
    norms = {name.replace(".default.", "."): {"size": tensor.numel(), "norm": tensor.double().norm().item()} for name, tensor in weights.items()}
    return model.merge_and_unload(), norms


def adapter_norms(folder: Path) -> dict:   # {name: norm}
    "Measure the adapter that lies beside a checkpoint."
    from safetensors.torch import load_file
    return {name: tensor.double().norm().item() for name, tensor in load_file(str(folder / ADAPTER / "adapter_model.safetensors")).items()}


def lora_problems(config: FinetuneConfig):
    "Say what is wrong with the settings of the adapter, one sentence each."
    from pydantic import ValidationError
    try: wanted = Lora(**config.lora)
    except ValidationError as error:
        for one in error.errors(): yield f"lora.{'.'.join(map(str, one['loc']))}: found {json.dumps(one['input'], default=str)}, {one['msg'][0].lower() + one['msg'][1:]}; the settings are {', '.join(Lora.model_fields)}"
        return
    except TypeError as error:
        yield f"lora: found {config.lora!r}, expected settings by name ({error})"
        return
    if not wanted.qlora: return
    if config.zero_stage != 0 or config.offload != "none": yield f"lora.qlora: found true with zero_stage {config.zero_stage} and offload {config.offload}; 4-bit weights cannot be spread: take zero_stage 0, offload none"
    if config.precision != "bf16": yield f"lora.qlora: found true with precision {config.precision}; take bf16"
