"""The presentation: slides as HTML and PDF by Marp, and a page that says what to say to each.

python docs/site/slides.py OUT writes OUT/slides.html, and OUT/slides.pdf where there is a browser.
Both come from docs/slides/slides.md, of which a comment in each slide is what to say.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from batchnorm.study.verdicts import shade

DOCS = Path(__file__).resolve().parents[1]
SOURCE = DOCS / "slides" / "slides.md"
MARP = "@marp-team/marp-cli@4"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


def verdicts(name: str) -> str:
    """The claims of a study as a table for a slide."""
    path = DOCS / "studies" / f"{name}.json"
    if not path.exists():
        return f"`batchnorm study {name} --out docs/studies`"
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    rows = [
        f"| {claim['text']} | **{shade(claim['verdict'], [o['holds'] for o in claim['outcomes']])}** |"
        for claim in content["claims"]
    ]
    seeds = len(content["trials"])
    return "\n".join(
        [
            "| claim | here |",
            "|:--|:--|",
            *rows,
            "",
            f'<span class="small">{seeds} seeds; `batchnorm study {name}` repeats it</span>',
        ]
    )


def source() -> str:
    """The slides, with the verdicts of studies where they belong."""
    text = SOURCE.read_text(encoding="utf-8")
    text = re.sub(r"^STUDY: (\S+)$", lambda found: verdicts(found[1]), text, flags=re.M)
    # The notes' lines are those of the file, and Marp would keep them.
    joined = lambda found: f"<!--\n{' '.join(found[1].split())}\n-->"  # noqa: E731
    return re.sub(r"^<!--\n(.*?)\n-->$", joined, text, flags=re.M | re.S)


def slides(text: str) -> list[tuple[str, str]]:
    """Title and what to say of each slide."""
    _, _, body = text.split("---\n", 2)
    found = []
    for slide in re.split(r"^---$", body, flags=re.M):
        title = re.search(r"^# (.*)$", slide, flags=re.M)
        notes = re.findall(r"<!--\n(.*?)\n-->", slide, flags=re.S)
        assert title, slide
        found.append((title[1], "\n".join(notes)))
    return found


def explained() -> str:
    """The list of slides with what to say."""
    lines = []
    for number, (title, notes) in enumerate(slides(source()), 1):
        lines += [f"### {number}. {title}", "", notes, ""]
    return "\n".join(lines)


def build(out: Path) -> list[Path]:
    """Run Marp; returns what it has written."""
    npx = shutil.which("npx")
    if npx is None:
        raise SystemExit("slides: npx is needed, which comes with Node.js 18 or later.")
    out.mkdir(parents=True, exist_ok=True)
    text = out / "slides.md"
    text.write_text(source(), encoding="utf-8")
    base = [npx, "--yes", MARP, "--html", "--no-stdin", str(text)]
    written = [out / "slides.html"]
    try:
        subprocess.run([*base, "-o", str(written[0])], check=True)
        if any(map(shutil.which, BROWSERS)):
            written.append(out / "slides.pdf")
            pdf = ["--pdf", "--allow-local-files", "-o", str(written[1])]
            subprocess.run([*base, *pdf], check=True)
        else:
            print("slides: no PDF, for which Chromium or another browser of its kind is needed")
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"slides: Marp failed (exit status {error.returncode}); see above."
        ) from None
    finally:
        text.unlink()
    # Without an icon, browsers ask the server for one.
    icon = base64.b64encode((DOCS / "assets" / "favicon.svg").read_bytes()).decode()
    link = f'<head><link rel="icon" href="data:image/svg+xml;base64,{icon}">'
    written[0].write_text(written[0].read_text("utf-8").replace("<head>", link, 1), "utf-8")
    return written


if __name__ == "__main__":
    for path in build(Path(sys.argv[1])):
        print(f"wrote {path}")
