"""Benchmarks, engines and the runner: from a checkpoint to predictions and scores."""
from .benchmark import Benchmark, Example, load_benchmark, register

__all__ = ["Benchmark", "Example", "load_benchmark", "register"]
