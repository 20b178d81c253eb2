"""Does batch norm allow larger learning rates?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from torch import nn

from batchnorm.study.charts import lines
from batchnorm.study.declare import Claim, Record, Records, Study, Trial
from batchnorm.study.training import batch_norm, digits, error, he, perceptron, train, xavier

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
STEPS, BATCH = 1500, 60
#: A network that answers less than this share of the test digits wrong has learned.
LEARNED = 0.2
NETWORKS = {
    "10 layers, ReLU, He": ((784, *[100] * 9, 10), he, nn.ReLU),
    "5 layers, sigmoid, Xavier": ((784, *[100] * 4, 10), xavier, nn.Sigmoid),
}


def run(trial: Trial) -> Iterator[Record]:
    """Train each network at each rate, with and without batch norm."""
    data, steps = digits(trial), trial.choose(STEPS, 200)
    for name, norm, rate in trial.each(product(NETWORKS, (None, batch_norm), RATES)):
        sizes, init, activation = NETWORKS[name]
        model = perceptron(sizes, trial, init, activation, norm)
        train(model, data.batches(trial, BATCH), steps, rate)
        yield {
            "network": name,
            "batch norm": norm is not None,
            "rate": rate,
            "error": error(model, data.test_images, data.test_labels),
        }


def largest_rate(records: Records, network: str, norm: bool) -> float:
    """The largest rate at which the network learns; the smallest of all if there is none."""
    found = records.where(network=network, **{"batch norm": norm})
    return max([r["rate"] for r in found if r["error"] < LEARNED], default=min(RATES))


def ratio_of_rates(records: Records) -> dict[str, float]:
    """By network."""
    return {
        name: largest_rate(records, name, True) / largest_rate(records, name, False)
        for name in NETWORKS
    }


def gain_at_small_rate(records: Records) -> dict[str, float]:
    """The error that batch norm saves at the rate that suits the network without it best."""
    gains = {}
    for name in NETWORKS:
        without = records.where(network=name, **{"batch norm": False})
        best = min(without, key=lambda r: r["error"])
        gains[name] = best["error"] - records.value(
            "error", network=name, rate=best["rate"], **{"batch norm": True}
        )
    return gains


def gain_at_best_rates(records: Records) -> dict[str, float]:
    """The error that batch norm saves, each at the rate that suits it best."""
    return {
        name: min(records.values("error", network=name, **{"batch norm": False}))
        - min(records.values("error", network=name, **{"batch norm": True}))
        for name in NETWORKS
    }


def chart(records: list[Record]) -> Any:
    """Test error over the rate."""
    return lines(records, x="rate", y="error", color="batch norm", column="network", log_x=True)


STUDY = Study(
    name="learning-rate",
    title="Larger learning rates",
    question="Does batch norm allow larger learning rates, and is that what makes it better?",
    protocol="Perceptrons of 10 layers with ReLU (He initialization) and of 5 layers with "
    "sigmoids (Xavier), 100 units each, on 4,000 MNIST digits moved by up to two pixels: "
    f"{STEPS:,} steps of plain gradient descent, batches of {BATCH}, seven rates from "
    f"{RATES[0]} to {RATES[-1]:g}, with and without batch norm, same weights and batches. "
    "Error on 1,000 test digits.",
    run=run,
    claims=(
        Claim(
            text="Batch norm allows larger learning rates.",
            source="Ioffe & Szegedy (2015), section 3.3; Bjorck et al. (2018), section 2",
            statistic=f"largest rate at which the test error falls below {LEARNED:.0%}, with "
            "batch norm, divided by the one without",
            measure=ratio_of_rates,
            side="above",
            threshold=1.0,
            depends_on="the network",
        ),
        Claim(
            text="At the rate that suits the network without batch norm best, batch norm "
            "makes it no better: the gain comes from larger rates.",
            source="Bjorck et al. (2018), section 2",
            statistic="test error without batch norm minus with it, at the former's best rate",
            measure=gain_at_small_rate,
            side="below",
            threshold=0.005,
            depends_on="the network",
        ),
        Claim(
            text="With the best rate for each, batch norm gives the smaller error.",
            source="Bjorck et al. (2018), section 2",
            statistic="smallest test error without batch norm minus smallest with it",
            measure=gain_at_best_rates,
            side="above",
            threshold=0.0,
            depends_on="the network",
        ),
    ),
    chart=chart,
)
