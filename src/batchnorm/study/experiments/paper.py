"""The first experiment of the paper: does batch norm train faster, better and more stably?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import torch
from torch import nn

from batchnorm.study.charts import lines
from batchnorm.study.declare import Claim, Record, Records, Study, Trial
from batchnorm.study.training import batch_norm, digits, error, gaussian, perceptron, train

SIZES, BATCH = (784, 100, 100, 100, 10), 60
STEPS, EARLY = 10_000, 1_000
#: The paper says neither; both are swept.
RATES, STDS = (0.1, 0.5, 2.0), (0.03, 0.1, 0.3)
#: The unit whose input is looked at, and when.
UNIT, EVERY = 0, 250


def run(trial: Trial) -> Iterator[Record]:
    """Train at each rate from weights of each size, with and without batch norm."""
    data = digits(trial)
    shrink = trial.choose(1, 20)
    steps, early, every = STEPS // shrink, EARLY // shrink, EVERY // trial.choose(1, 10)
    for rate, std, norm in trial.each(product(RATES, STDS, (None, batch_norm))):
        arm = {"batch norm": norm is not None, "rate": rate, "std": std}
        model = perceptron(SIZES, trial, gaussian(std), nn.Sigmoid, norm)
        last_sigmoid = max(k for k, layer in enumerate(model) if isinstance(layer, nn.Sigmoid))
        found: list[Record] = []

        def watch(
            step: int,
            model: nn.Sequential = model,
            at: int = last_sigmoid,
            found: list[Record] = found,
        ) -> None:
            if step % every and step != early:
                return
            with torch.no_grad():
                model.eval()
                inputs = model[:at](data.test_images)[:, UNIT]
                model.train()
            low, median, high = torch.quantile(inputs, torch.tensor([0.15, 0.5, 0.85])).tolist()
            found.append(
                {
                    "step": step,
                    "error": error(model, data.test_images, data.test_labels),
                    "p15": low,
                    "p50": median,
                    "p85": high,
                }
            )

        train(model, data.batches(trial, BATCH), steps, rate, after=watch)
        for record in found:
            yield {**arm, "when": {early: "early", steps: "end"}.get(record["step"], ""), **record}


def gain(records: Records, when: str) -> dict[str, float]:
    """The error that batch norm saves, at equal settings and at each one's best."""
    gains: dict[str, float] = {}
    smallest = {}
    for norm in (False, True):
        errors = {
            (r["rate"], r["std"]): r["error"]
            for r in records.where(when=when, **{"batch norm": norm})
        }
        smallest[norm] = min(errors.values())
        for (rate, std), found in errors.items():
            name = f"rate {rate:g}, weights {std:g}"
            gains[name] = found - gains.get(name, 0.0) if not norm else gains[name] - found
    return {"each at its best": smallest[False] - smallest[True], **gains}


def instability(records: Records) -> dict[str, float]:
    """How much more the input of a sigmoid moves with batch norm, by two measures."""
    found = {}
    for norm in (False, True):
        best = min(
            records.where(when="end", **{"batch norm": norm}), key=lambda r: float(r["error"])
        )
        history = records.where(rate=best["rate"], std=best["std"], **{"batch norm": norm})
        spreads = [r["p85"] - r["p15"] for r in history]
        medians = [r["p50"] for r in history]
        found[norm] = {
            "widest over narrowest spread": max(spreads) / max(min(spreads), 1e-6),
            "way of the median, in spreads": sum(abs(b - a) for a, b in pairwise(medians))
            / (sum(spreads) / len(spreads)),
        }
    return {name: found[True][name] / found[False][name] for name in found[True]}


def chart(records: list[Record]) -> Any:
    """Test error over training."""
    return lines(records, x="step", y="error", color="batch norm", column="rate", row="std")


STUDY = Study(
    name="paper",
    title="The paper's first experiment",
    question="Does batch norm make a network train faster, to a higher accuracy, more stably?",
    protocol="The network of the paper's Figure 1: three layers of 100 sigmoids, batches of "
    f"{BATCH}, plain gradient descent; on 4,000 MNIST digits moved by up to two pixels, "
    f"{STEPS:,} steps. The paper gives neither rate nor initialization, so both are swept: "
    f"rates {', '.join(f'{r:g}' for r in RATES)}, Gaussian weights of standard deviation "
    f"{', '.join(f'{s:g}' for s in STDS)}. Error on 1,000 test digits, and 15th, 50th and 85th "
    f"percentile of the input of one sigmoid of the last hidden layer, every {EVERY} steps.",
    run=run,
    claims=(
        Claim(
            text="A network with batch norm trains faster.",
            source="Ioffe & Szegedy (2015), section 4.1 and Figure 1(a)",
            statistic=f"test error after {EARLY:,} steps without batch norm minus with it",
            measure=lambda records: gain(records, "early"),
            side="above",
            threshold=0.0,
            depends_on="rate and initialization",
        ),
        Claim(
            text="It reaches a higher accuracy.",
            source="Ioffe & Szegedy (2015), section 4.1 and Figure 1(a)",
            statistic=f"test error after {STEPS:,} steps without batch norm minus with it",
            measure=lambda records: gain(records, "end"),
            side="above",
            threshold=0.0,
            depends_on="rate and initialization",
        ),
        Claim(
            text="The input of a sigmoid is more stable over training.",
            source="Ioffe & Szegedy (2015), section 4.1 and Figure 1(b, c)",
            statistic="movement with batch norm over movement without it, each at its best "
            "settings",
            measure=instability,
            side="below",
            threshold=1.0,
            depends_on="the measure of stability",
        ),
    ),
    chart=chart,
)
