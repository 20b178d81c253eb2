"""What MkDocs does not do itself: widgets, formulas, study pages, files from outside of docs.

MkDocs calls these functions while it builds the site; mkdocs.yml names this file.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

sys.path.insert(0, str(Path(__file__).parent))

import gallery
import notebook
import slides
import widgets

ROOT = Path(__file__).resolve().parents[2]
#: Files outside of docs that pages link to; their folders become part of the site.
LINKED = ("examples", "benchmarks/results")


def on_files(files: Files, config: Any) -> Files:
    """Add files that pages link to, and those that are made here."""
    for folder in LINKED:
        for path in sorted((ROOT / folder).iterdir()):
            if path.is_file():
                content = path.read_bytes()
                files.append(File.generated(config, f"{folder}/{path.name}", content=content))
    made = {**gallery.files(ROOT / "docs" / "studies"), **notebook.files(ROOT / "docs" / "learn")}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in widgets, and lead links to where their files are in the site."""
    depth = page.file.src_uri.count("/")
    up, here = "../" * (depth + 1), "../" * depth
    for folder in LINKED:
        markdown = markdown.replace(f"]({up}{folder}/", f"]({here}{folder}/")
    markdown = re.sub(
        r"^<!-- study: (\S+) -->$",
        lambda found: gallery.summary(ROOT / "docs" / "studies" / f"{found[1]}.json", here),
        markdown,
        flags=re.MULTILINE,
    )
    if "<!-- slides -->" in markdown:
        markdown = markdown.replace("<!-- slides -->", slides.explained())
    return re.sub(
        r"^<!-- widget: (\w+) -->$",
        lambda found: widgets.WIDGETS[found[1]](),
        markdown,
        flags=re.MULTILINE,
    )


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    r"""Make MathML of formulas, \(...\) and \[...\], and colour the verdicts of tables."""

    def drawn(found: re.Match[str]) -> str:
        inline = found[2].startswith("\\(")
        formula = html.unescape(found[2][2:-2]).strip()
        return latex2mathml.converter.convert(formula, display="inline" if inline else "block")

    pattern = r'<(span|div) class="arithmatex">(.*?)</\1>'
    content = re.sub(pattern, drawn, content, flags=re.DOTALL)
    if 'class="verdicts"' in content:
        for sign, kind in {"✓": "reproduced", "✗": "not", "!": "depends"}.items():
            colored = rf'<span class="verdict {kind}">\1</span>'
            content = re.sub(rf"(?<=[> ])({sign}[ ∞.\d]*)(?=[<,])", colored, content)
    return content


#: Of Material for MkDocs, on every page; the site has a copy.
SHIM, COPY = "https://unpkg.com/iframe-worker/shim", "assets/iframe-worker.js"


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Load nothing from elsewhere."""
    return output.replace(SHIM, get_relative_url(COPY, page.url))


def on_post_template(output: str, template_name: str, config: Any) -> str:
    """Nor on the page for addresses that are not there, which may be opened from disk."""
    output = output.replace(SHIM, COPY)
    return re.sub(r'(href|src)="/(?!/)', r'\1="', output)
