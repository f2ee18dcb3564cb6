"Helpers that several tests share."
import json
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
