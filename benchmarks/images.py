"""Time the mean and deviation of a folder of images beside the loops that are passed around.

python benchmarks/images.py --out benchmarks/results
python benchmarks/images.py --quick

The first makes 20,000 images in --directory, removes them in the end, and writes images.csv and
images.json (what it was measured on); the second makes 300 and only prints. They are PNG and JPEG
of 64 to 400 pixels a side, made of blurred noise in several octaves, whose brightness and contrast
differ from image to image; most are coloured, others grey, with palette, with alpha, or CMYK.

Each provider goes through them once in every round, in a process of its own, in an order drawn
anew; the files have been read before. Exact are sums over whole numbers of what Pillow decodes to
red, green and blue, as every provider sees it.

``p20_ms, p50_ms, p80_ms``: from the start of the process to its end, imports included; ``ratio`` is
to ``batchnorm``. ``peak_bytes``: the most memory of the process and those that it started, pages
that they share counted once (looked at 20 times a second; on Linux alone). ``mean_error,
std_error``: largest difference over the channels to the exact value, in exact deviations.

Exit status: 0 done; 1 a provider failed, or batchnorm missed what it promises (1e-12); 2 the call
was unusable; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import command
import numpy as np
from PIL import Image

from batchnorm.bench.rows import TimedRow, timed
from batchnorm.bench.timing import Sample, interleave
from batchnorm.bench.worker import Worker
from batchnorm.progress import steps

OURS, OURS_ALONE = "batchnorm", "batchnorm, 1 process"
PROVIDERS = {
    OURS: "ours",
    OURS_ALONE: "ours_alone",
    "PIL, sums in float32": "float32_sums",
    "PIL, average of deviations": "average_of_deviations",
    "DataLoader, average of deviations": "loader",
    "DataLoader, resized, average of batches": "loader_resized",
}
SIDES = (64, 400)
LIMIT = 1e-12

#: Mode, file, and how many in 100.
KINDS = (("RGB", "jpg", 55), ("RGB", "png", 25), ("L", "jpg", 8), ("RGBA", "png", 5))
KINDS += (("P", "png", 5), ("CMYK", "jpg", 2))


@dataclass(frozen=True, kw_only=True)
class Row(TimedRow):
    """One provider; a line of the CSV file."""

    images: int
    pixels: int
    bytes: int
    images_per_s: float = math.nan
    mean_error: float = math.nan
    std_error: float = math.nan


# --- images ---------------------------------------------------------------------------------------


def picture(rng: np.random.Generator) -> Image.Image:
    """Blurred noise in octaves, like a photograph in its spectrum."""
    width, height = (int(side) for side in rng.integers(SIDES[0], SIDES[1], 2, endpoint=True))
    total = np.zeros((height, width, 3))
    for octave in range(5):
        side = 3 * 2**octave
        noise = rng.normal(0, 1, (side, side, 3)) + rng.normal(0, 1, (side, side, 1))
        blurred = Image.fromarray(np.uint8(np.clip(noise * 40 + 128, 0, 255)))
        total += (np.asarray(blurred.resize((width, height), Image.BICUBIC)) - 128.0) / 2**octave
    total = total * rng.uniform(0.1, 1.3) + rng.uniform(40, 210) + rng.uniform(-30, 30, 3)
    total += rng.normal(0, 3, (height, width, 1))
    return Image.fromarray(np.uint8(np.clip(total, 0, 255)))


def make(folder: Path, number: int, seed: int) -> tuple[list[Fraction], list[float], int]:
    """Write images; return the exact mean and the deviation of each channel, and their pixels."""
    modes, shares = [kind[:2] for kind in KINDS], np.array([kind[2] for kind in KINDS]) / 100
    n, first, second = 0, [0, 0, 0], [0, 0, 0]
    for k in range(number):
        rng = np.random.default_rng([seed, k])
        mode, suffix = modes[int(rng.choice(len(modes), p=shares))]
        image = picture(rng).convert(mode)
        path = folder / f"{k:06}.{suffix}"
        image.save(path)
        with Image.open(path) as read:
            x = np.asarray(read.convert("RGB"), np.int64).reshape(-1, 3)
        n += len(x)
        first = [a + int(b) for a, b in zip(first, x.sum(0), strict=True)]
        second = [a + int(b) for a, b in zip(second, np.einsum("ij,ij->j", x, x), strict=True)]
    mean = [Fraction(a, 255 * n) for a in first]
    var = [Fraction(b * n - a * a, (255 * n) ** 2) for a, b in zip(first, second, strict=True)]
    return mean, [math.sqrt(v) for v in var], n


# --- providers, each in a process of its own ------------------------------------------------------


class Provider:
    """Mean and deviation of each channel, of values divided by 255, as each would have it."""

    def read(self, provider: str, folder: str) -> dict[str, list[float]]:
        mean, std = getattr(self, provider)(Path(folder))
        return {"mean": [float(v) for v in mean], "std": [float(v) for v in std]}

    def ours(self, folder: Path, processes: int | None = None) -> tuple[Any, Any]:
        from batchnorm import dataset

        found = dataset.measure(folder, scale=255, processes=processes)
        return found.mean, found.std()

    def ours_alone(self, folder: Path) -> tuple[Any, Any]:
        return self.ours(folder, processes=1)

    def float32_sums(self, folder: Path) -> tuple[Any, Any]:
        """Σx and Σx² in the type of the images."""
        count, first, second = 0, np.zeros(3, np.float32), np.zeros(3, np.float32)
        for x in _arrays(folder):
            count += x.shape[0] * x.shape[1]
            first += x.sum(axis=(0, 1))
            second += (x**2).sum(axis=(0, 1))
        mean = first / count
        return mean, np.sqrt(second / count - mean**2)

    def average_of_deviations(self, folder: Path) -> tuple[Any, Any]:
        """The averages over images of their means and of their deviations."""
        means, stds = [], []
        for x in _arrays(folder):
            means.append(x.mean(axis=(0, 1)))
            stds.append(x.std(axis=(0, 1)))
        return np.mean(means, axis=0), np.mean(stds, axis=0)

    def loader(self, folder: Path) -> tuple[Any, Any]:
        """The same by torchvision, in batches of one, since sizes differ."""
        from torchvision import transforms

        mean, std, count = 0.0, 0.0, 0
        for x, _ in _loader(folder, 1, transforms.ToTensor()):
            x = x.view(x.size(0), 3, -1)
            mean += x.mean(2).sum(0)
            std += x.std(2).sum(0)
            count += x.size(0)
        return mean / count, std / count

    def loader_resized(self, folder: Path) -> tuple[Any, Any]:
        """Images resized to batches of 64, whose means are averaged, the last one's too."""
        from torchvision import transforms

        transform = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
        first, second, count = 0.0, 0.0, 0
        for x, _ in _loader(folder, 64, transform):
            first += x.mean(dim=[0, 2, 3])
            second += (x**2).mean(dim=[0, 2, 3])
            count += 1
        mean = first / count
        return mean, (second / count - mean**2) ** 0.5


def _arrays(folder: Path) -> Iterator[Any]:
    for path in sorted(folder.rglob("*.*")):
        yield np.asarray(Image.open(path).convert("RGB"), np.float32) / 255


def _loader(folder: Path, batch: int, transform: Any) -> Any:
    import torch
    from torchvision.datasets import ImageFolder

    data = ImageFolder(str(folder), transform)
    return torch.utils.data.DataLoader(data, batch_size=batch, num_workers=2)


# --- memory of several processes ------------------------------------------------------------------


class Watched:
    """The most memory that the children of this process have, in a thread."""

    def __enter__(self) -> Watched:
        self.peak, self._done = math.nan, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            total = sum(map(resident, descendants("self")))
            if total:
                self.peak = max(total, 0 if math.isnan(self.peak) else self.peak)


def descendants(process: str) -> Iterator[str]:
    """The processes that one has started, and so on."""
    for file in Path("/proc", process, "task").glob("*/children"):
        try:
            found = file.read_text().split()
        except OSError:  # it has ended
            continue
        for child in found:
            yield child
            yield from descendants(child)


def resident(process: str) -> int:
    """Bytes of a process; of pages that it shares with others its share."""
    try:
        lines = Path("/proc", process, "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


# --- the call -------------------------------------------------------------------------------------


def run_once(method: str, folder: Path) -> tuple[float, float, dict[str, Any]]:
    """Seconds from the start of the process to its end, its peak, and what it found."""
    with Watched() as watched:
        begin = time.perf_counter()
        with Worker(__file__, "Provider") as worker:
            found = worker.ask("read", provider=method, folder=str(folder))
        seconds = time.perf_counter() - begin
    return seconds, watched.peak, found


def largest(found: Sequence[float], exact: Sequence[Any], std: Sequence[float]) -> float:
    """Largest difference to the exact values, in exact deviations."""
    differences = (abs(float(Fraction(f) - Fraction(e))) for f, e in zip(found, exact, strict=True))
    return max(d / s for d, s in zip(differences, std, strict=True))


def measure_folder(folder: Path, options: argparse.Namespace) -> list[Row]:
    """Make the images, and let every provider go through them."""
    number = 300 if options.quick else options.images
    answers: dict[str, list[dict[str, Any]]] = {provider: [] for provider in PROVIDERS}
    peaks: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
    inside = folder / "all"  # ImageFolder wants a folder for each class
    inside.mkdir()
    with steps(options.rounds * len(PROVIDERS) + 1) as started:
        started("making the images")
        mean, std, pixels = make(inside, number, options.seed)

        def take(provider: str) -> Sample:
            started(f"{len(answers[provider]) + 1} of {options.rounds}: {provider}")
            seconds, peak, answer = run_once(PROVIDERS[provider], folder)
            answers[provider].append(answer)
            peaks[provider].append(peak)
            return Sample(seconds)

        samples = interleave(
            {provider: partial(take, provider) for provider in PROVIDERS},
            min_rounds=options.rounds,
            seed=options.seed,
        )
    size = sum(path.stat().st_size for path in inside.iterdir())
    rows = []
    for provider in PROVIDERS:
        row = Row(provider=provider, images=number, pixels=pixels, bytes=size)
        row = timed(row, samples[provider], samples[OURS])
        answer = answers[provider][-1]
        rows.append(
            replace(
                row,
                peak_bytes=max(peaks[provider]),
                images_per_s=number / row.p50_ms * 1e3,
                mean_error=largest(answer["mean"], mean, std),
                std_error=largest(answer["std"], std, std),
            )
        )
    return rows


def measure(options: argparse.Namespace, files: command.Files) -> list[str]:
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        rows = measure_folder(Path(folder), options)
    files["images.csv"] = rows
    files["images.json"] = {
        "seed": options.seed,
        "versions": {name: importlib.metadata.version(name) for name in ("pillow", "torchvision")},
    }
    columns = {
        "": "{0.provider}",
        "ms": "{0.p50_ms:.0f}",
        "images/s": "{0.images_per_s:.0f}",
        "times ours": "{0.ratio:.2f}",
        "peak MB": "{0.peak_mb:.0f}",
        "mean error": "{0.mean_error:.1e}",
        "std error": "{0.std_error:.1e}",
    }
    command.show(rows, columns, title=f"{rows[0].images:,} images, {rows[0].pixels:,} pixels")
    return [
        f"{row.provider}: {name} is {value:.3g}, where at most {LIMIT:g} is promised"
        for row in rows
        if row.provider in (OURS, OURS_ALONE)
        for name in ("mean_error", "std_error")
        if not (value := getattr(row, name)) <= LIMIT
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.make_parser(__file__, __doc__, rounds=1)
    add = parser.add_argument
    add("--images", type=command.at_least(1), default=20_000, help="20,000 if left out")
    add("--quick", action="store_true", help="300 images")
    add("--directory", type=Path, help="where to make them; a temporary one if left out")
    return command.main(parser, measure, arguments, needs=("torchvision",))


if __name__ == "__main__":
    sys.exit(main())
