"Helpers that several tests share."
import itertools, json, random, socket
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notebook(path: Path, *cells: str, tags: dict | None = None) -> Path:
    "Write a notebook: cell 0 is tagged `parameters` unless `tags` (index -> list) says otherwise; cells starting with '#md ' are prose."
    tags = {0: ["parameters"]} if tags is None else tags
    made = [{"cell_type": "markdown", "id": f"c{i}", "metadata": {}, "source": source[4:]} if source.startswith("#md ") else
            {"cell_type": "code", "id": f"c{i}", "metadata": {"tags": tags.get(i, [])}, "execution_count": None, "outputs": [], "source": source} for i, source in enumerate(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}, "cells": made}))
    return path


def free_ports(count: int) -> list[int]:
    "Ports that nobody takes by chance before a daemon does: they lie below those that Linux hands out by itself, from a random one on."
    found = []
    for port in range(random.randrange(20000, 31000), 32000):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)): found.append(port)
        if len(found) == count: return found
    raise AssertionError(f"no {count} free ports")


class MadeUpEngine:
    "An engine for the runner without a model: a sub-class has `generate` or `completion_scores`, asked in the lists that the runner hands over, each kind by itself."
    tokenizer, bos = None, "one"

    def __init__(self, checkpoint, **options): pass
    def reset(self): pass
    def release(self): pass

    def stream(self, requests):
        for decoding, group in itertools.groupby(enumerate(requests), key=lambda pair: pair[1].decoding):
            places, asked = zip(*group)
            prompts = [request.prompt for request in asked]
            yield from zip(places, self.generate(prompts, decoding.max_new_tokens, list(decoding.stop), decoding.temperature, decoding.top_p, decoding.top_k, decoding.n) if decoding else
                           self.completion_scores(prompts, [list(request.completions) for request in asked]))
