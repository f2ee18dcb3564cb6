"A checkpoint is what its files give when they are loaded again: this looks, before the cell counts as done."
import json, math
from pathlib import Path

from tulu_study.core.files import write_atomic
from .config import TrainingError
from .tokenizers import load_tokenizer, template_problem


def verify(
    folder: str | Path,          # a saved checkpoint with the trainer's trained.json
    tolerance: float = 1e-5,     # largest relative difference of a norm (sums over the same values in another order)
) -> list[dict]:                 # rows of {check, found, expected, passed}, also in verification.json
    """Load a checkpoint on the CPU as a user would, and compare it with what the trainer measured before saving.

    Raises TrainingError naming every check that failed."""
    folder = Path(folder)
    rows = list(_checks(folder, json.loads((folder / "trained.json").read_text()), tolerance))
    failed = [row for row in rows if not row["passed"]]
    if failed:
        raise TrainingError(f"the saved checkpoint in {folder} is not the trained model: "
                            + "; ".join(f"{row['check']}: found {row['found']}, expected {row['expected']}" for row in failed) + ". Run the cell again; if it fails again, the disk or a library version is at fault.")
    write_atomic(folder / "verification.json", json.dumps(rows, indent=1))
    return rows


def _checks(folder: Path, trained: dict, tolerance: float):
    "Yield one row per check."
    def row(check, found, expected, passed=None): return {"check": check, "found": found, "expected": expected, "passed": bool(found == expected if passed is None else passed)}
    from transformers import AutoModelForCausalLM
    model, loading = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", output_loading_info=True)
    yield row("weights missing or left over", sorted([*loading["missing_keys"], *loading["unexpected_keys"]]), [])
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    yield row("parameters", sum(t.numel() for t in tensors.values()), trained["parameters"])
    worst, at = 0.0, ""
    for name, expected in trained["tensors"].items():
        found = tensors[name].double().norm().item() if name in tensors else math.nan
        gap = abs(found - expected["norm"]) / max(expected["norm"], 1e-12)
        if not gap <= worst: worst, at = gap, name   # also when it is not a number
        if math.isnan(gap): break
    yield row("largest relative difference of a norm" + (f" ({at})" if at else ""), worst, f"at most {tolerance:g}", worst <= tolerance)
    if "adapter" in trained:
        from .lora import adapter_norms
        found = adapter_norms(folder)
        yield row("matrices of the adapter", sorted(found), sorted(trained["adapter"]))
        gaps = [abs(found[name] - expected["norm"]) / max(expected["norm"], 1e-12) for name, expected in trained["adapter"].items() if name in found]
        yield row("largest relative difference of a norm in the adapter", max(gaps, default=math.nan), f"at most {tolerance:g}", max(gaps, default=math.nan) <= tolerance)
    tokenizer = load_tokenizer(folder)
    yield row("tokens of the tokenizer", len(tokenizer), trained["tokenizer_length"])
    yield row("embedding rows for all tokens", model.get_input_embeddings().weight.shape[0] >= len(tokenizer), True)
    yield row("chat template", template_problem(tokenizer) or "as render_chat", "as render_chat")
