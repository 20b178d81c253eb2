"""The tutorial as a Jupyter notebook, made from its page, whose code and outputs tests check."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path
from typing import Any


def files(folder: Path) -> dict[str, str]:
    """Name to content of the notebook."""
    text = (folder / "tutorial.md").read_text(encoding="utf-8")
    return {"learn/tutorial.ipynb": json.dumps(notebook(text), indent=1, ensure_ascii=False)}


def notebook(text: str) -> dict[str, Any]:
    """Prose as Markdown cells, each block of code as a cell with its output."""
    cells: list[dict[str, Any]] = []
    for number, part in enumerate(re.split(r"^```python\n(.*?)^```\n", text, flags=re.M | re.S)):
        if number % 2:
            cells.append(_code(part, number))
        elif part.strip():
            cells.append(_cell("markdown", part.strip(), number))
    return {
        "cells": cells,
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(kind: str, source: str, number: int) -> dict[str, Any]:
    return {
        "cell_type": kind,
        "id": f"cell-{number}",
        "metadata": {},
        "source": source.splitlines(keepends=True),
    }


def _code(block: str, number: int) -> dict[str, Any]:
    examples = doctest.DocTestParser().get_examples(block)
    source = "".join(example.source for example in examples).rstrip()
    printed = "".join(example.want for example in examples)
    outputs = [{"output_type": "stream", "name": "stdout", "text": printed}] if printed else []
    return {**_cell("code", source, number), "execution_count": None, "outputs": outputs}
