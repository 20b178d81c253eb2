"""Pages that load nothing from anywhere: a template filled with styles, scripts and values."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from string import Template
from typing import Any

import vl_convert

__all__ = ["as_json", "fill"]


def fill(name: str, **values: Any) -> str:
    """Fill the template ``NAME.html`` beside this file, whose script is ``NAME.js``.

    Parameters
    ----------
    name
        Of the template.
    values
        Text or numbers for the names in it that begin with a dollar sign.

    Returns
    -------
    str
        A complete HTML document.
    """
    return Template(_file(f"{name}.html")).substitute(
        style=_file("page.css"),
        script=_file("theme.js") + _file(f"{name}.js"),
        bundle=_bundle(),
        **values,
    )


def as_json(value: Any) -> str:
    """Write JSON that may stand inside a script element."""
    # "</" could end the script element early; in JSON it may be written "<\\/".
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")


@cache
def _bundle() -> str:
    """Return Vega, Vega-Lite and vega-embed; making the text takes a second or two."""
    # The stub of vl-convert misses that the snippet may be left out.
    text: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return text


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
