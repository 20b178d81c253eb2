"""One batch on several processes is the batch on one."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

from torch import Tensor, nn  # noqa: E402

from batchnorm import Moments  # noqa: E402
from batchnorm.errors import ArgumentError  # noqa: E402
from batchnorm.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    SyncBatchNorm,
    convert,
    exact_sums,
    explain,
    freeze,
    functional,
    native,
    portable,
    processes,
    revert,
    sync,
)
from ranks import Ranks  # noqa: E402

FUNCTIONS = Path(__file__).parent / "sync_functions.py"
SIZES = (5, 0, 11, 2)
C = 3


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4, FUNCTIONS)
    yield ranks
    ranks.close()


def parts_at_far_means(seed: int = 0, spatial: tuple[int, ...] = (4, 4)) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, C, *spatial, generator=g) + 1e3 * rank for rank, n in enumerate(SIZES)]


def one_process(
    parts: list[Tensor],
    grads: list[Tensor],
    keywords: dict[str, Any],
    kind: type[nn.Module] = BatchNorm2d,
    **more: Any,
) -> dict[str, Any]:
    """The whole batch in float64 on one process."""
    keywords = {k: v for k, v in keywords.items() if k != "reproducible"}
    layer = kind(C, **keywords).double()
    x = torch.cat(parts).double().requires_grad_()
    residual = more.get("residual")
    if residual is not None:
        more["residual"] = residual = residual.double().requires_grad_()
    y = layer(x, **more)
    y.backward(torch.cat(grads).double())
    return {
        "y": y.detach(),
        "grad_x": x.grad,
        "grad_residual": None if residual is None else residual.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "tracked": layer.num_batches_tracked,
    }


def off(found: Tensor, right: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found.double() - right).abs().max() / right.abs().max().clamp(min=1e-30))


def assert_like_one(out: list[dict[str, Any]], right: dict[str, Any], bound: float) -> None:
    assert all(isinstance(rank, dict) for rank in out), out
    for name in ("y", "grad_x", "grad_residual"):
        if right[name] is not None:
            assert off(torch.cat([rank[name] for rank in out]), right[name]) < bound, name
    for name in ("grad_weight", "grad_bias"):
        assert off(sum(rank[name].double() for rank in out), right[name]) < bound, name
    for name in ("running_mean", "running_var"):
        assert off(out[0][name], right[name]) < bound, name
        for rank in out:
            assert torch.equal(rank[name], out[0][name]), name
    assert {int(rank["tracked"]) for rank in out} == {int(right["tracked"])}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu": {"activation": "relu"},
    "leaky": {"activation": "leaky_relu", "negative_slope": 0.2},
    "reproducible": {"reproducible": True},
}


@pytest.mark.parametrize("force_torch", [False, True], ids=["core", "torch"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("options", OPTIONS)
def test_parts_on_four_ranks_are_one_batch(four, options, with_mask, with_residual, force_torch):
    parts = parts_at_far_means()
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(p.shape, generator=g) for p in parts]
    more: list[dict[str, Any]] = [{} for _ in parts]
    if with_mask:
        masks = [torch.rand(p.shape[0], 4, 4, generator=g) < 0.7 for p in parts]
        for m, given in zip(masks, more, strict=True):
            given["mask"] = m
    if with_residual:
        for p, given in zip(parts, more, strict=True):
            given["residual"] = torch.randn(p.shape, generator=g)
    whole = {k: torch.cat([given[k] for given in more]) for k in more[0]}
    right = one_process(parts, grads, OPTIONS[options], **whole)
    out = four.run(
        "layer_step",
        *[{"x": p, "grad": q, **given} for p, q, given in zip(parts, grads, more, strict=True)],
        channels=C,
        keywords=OPTIONS[options],
        force_torch=force_torch,
    )
    assert_like_one(out, right, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_have_the_statistics_of_one_process(four, dtype):
    parts = [p.to(dtype) for p in parts_at_far_means()]
    grads = [torch.ones_like(p) for p in parts]
    right = one_process(parts, grads, {})
    out = four.run(
        "layer_step",
        *[{"x": p, "grad": q} for p, q in zip(parts, grads, strict=True)],
        channels=C,
        keywords={},
    )
    assert out[0]["y"].dtype == dtype
    assert off(torch.cat([rank["y"] for rank in out]), right["y"]) < torch.finfo(dtype).eps
    assert off(out[3]["running_var"], right["running_var"]) < 2e-6


@pytest.mark.parametrize("force_torch", [False, True], ids=["core", "torch"])
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("spatial", [(), (4, 4)])
def test_weights_on_some_ranks_only(four, spatial, reproducible, force_torch):
    parts = parts_at_far_means(spatial=spatial)
    g = torch.Generator().manual_seed(10)
    grads = [torch.randn(p.shape, generator=g) for p in parts]
    masks = [
        None if rank == 2 else 500 * torch.rand(p.shape[0], *spatial, generator=g)
        for rank, p in enumerate(parts)
    ]
    given = [{"x": p, "grad": q, "mask": m} for p, q, m in zip(parts, grads, masks, strict=True)]
    keywords = {"reproducible": reproducible}
    out = four.run("layer_step", *given, channels=C, keywords=keywords, force_torch=force_torch)
    whole = torch.cat(
        [
            torch.ones(p.shape[0], *spatial) if m is None else m
            for p, m in zip(parts, masks, strict=True)
        ]
    )
    right = one_process(parts, grads, {}, kind=BatchNorm2d if spatial else BatchNorm1d, mask=whole)
    assert_like_one(out, right, 2e-6)


def test_rank_whose_input_needs_no_gradient_exchanges_them_all_the_same(four):
    parts = parts_at_far_means()
    out = four.run(
        "gradients_where_needed", *[{"x": p, "need": rank != 1} for rank, p in enumerate(parts)]
    )
    x = torch.cat(parts).double().requires_grad_()
    BatchNorm2d(C).double()(x).pow(3).sum().backward()
    assert out[1] is None
    assert off(torch.cat([out[0], out[2], out[3]]), x.grad) < 2e-6


def test_negated_views_are_read_as_they_are(four):
    parts = parts_at_far_means()
    plain = four.run("negated", *[{"x": p, "lazily": False} for p in parts])
    lazy = four.run("negated", *[{"x": p, "lazily": True} for p in parts])
    for a, b in zip(plain, lazy, strict=True):
        assert torch.allclose(a[0], b[0], atol=1e-5)
        assert torch.allclose(a[1], b[1], atol=1e-5)


def test_equal_parts_have_no_variance():
    # Of three parts with these counts, the squares' difference was below zero.
    g = torch.Generator().manual_seed(11)
    for _ in range(1000):
        parts = torch.zeros(int(torch.randint(2, 9, (), generator=g)), 5, 1).double()
        parts[:, 0, 0] = torch.randint(1, 50, (len(parts),), generator=g)
        parts[:, 1] = torch.rand((), generator=g).double() * 1e30
        statistics = portable.merge(parts)
        assert statistics[0, 1, 0] == parts[0, 1, 0]
        assert statistics[0, 3, 0] == 0


def test_ranks_that_bring_nothing_at_all(four):
    nothing = [torch.zeros(0, C, 2, 2)] * 4
    out = four.run("layer_step", *[{"x": p, "grad": p} for p in nothing], channels=C, keywords={})
    for rank in out:
        assert int(rank["tracked"]) == 1
        assert rank["grad_weight"].tolist() == [0.0] * C
        assert rank["running_mean"].tolist() == [0.0] * C


def test_values_that_are_all_masked_change_nothing(four):
    parts = parts_at_far_means()
    out = four.run(
        "layer_step",
        *[
            {"x": p, "grad": p, "mask": torch.zeros(p.shape[0], 4, 4, dtype=torch.bool)}
            for p in parts
        ],
        channels=C,
        keywords={},
    )
    for rank in out:
        assert int(rank["tracked"]) == 0
        assert rank["running_var"].tolist() == [1.0] * C
        assert not rank["y"].any()


def test_groups_of_examples_stay_within_a_rank(four):
    parts = parts_at_far_means()
    grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) for p in parts]
    out = four.run(
        "layer_step",
        *[{"x": p, "grad": q} for p, q in zip(parts, grads, strict=True)],
        channels=C,
        keywords={"group_size": 4},
    )
    for rank, part in zip(out, parts, strict=True):
        alone = BatchNorm2d(C, group_size=4)
        assert torch.equal(rank["y"], alone(part).detach())
    right = one_process(parts, grads, {})
    assert off(out[0]["running_var"], right["running_var"]) < 2e-6


def test_no_more_than_one_value_in_all_ranks_is_refused_by_all(four):
    parts = [torch.zeros(1 if rank == 2 else 0, C) for rank in range(4)]
    out = four.run("layer_step", *[{"x": p, "grad": p} for p in parts], channels=C, keywords={})
    assert [error for error, _ in out] == ["ShapeError"] * 4
    assert all("Expected more than 1 value per channel" in message for _, message in out)


def test_one_value_is_normalized_by_the_population_where_asked(four):
    parts = [torch.full((1 if rank == 2 else 0, C), 3.0) for rank in range(4)]
    out = four.run(
        "layer_step",
        *[{"x": p, "grad": p} for p in parts],
        channels=C,
        keywords={"on_single": "population"},
    )
    assert torch.allclose(out[2]["y"], torch.full((1, C), 3.0), atol=1e-4)
    assert {int(rank["tracked"]) for rank in out} == {0}


def test_one_value_is_told_by_its_number_and_not_by_its_weight(four):
    parts = [torch.randn(1, C, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    weights = [torch.tensor([w]) for w in (0.25, 0.5, 0.25, 0.0)]
    given = [{"x": p, "grad": p, "mask": w} for p, w in zip(parts, weights, strict=True)]
    out = four.run("layer_step", *given, channels=C, keywords={})
    right = one_process(parts, parts, {}, kind=BatchNorm1d, mask=torch.cat(weights))
    assert off(torch.cat([rank["y"] for rank in out]), right["y"]) < 2e-6
    for k in range(3):
        given[k]["mask"] = torch.zeros(1)
    given[3]["mask"] = torch.tensor([2.0])
    out = four.run("layer_step", *given, channels=C, keywords={})
    assert [error for error, _ in out] == ["ShapeError"] * 4


@pytest.mark.parametrize("spatial", [(), (0,)])
@pytest.mark.parametrize("channels", [0, C])
@pytest.mark.parametrize("reproducible", [False, True])
def test_axes_without_values(four, reproducible, channels, spatial):
    x = torch.zeros(4, channels, *spatial)
    out = four.run(
        "layer_step", x=x, grad=x, channels=channels, keywords={"reproducible": reproducible}
    )
    for rank in out:
        assert rank["y"].shape == x.shape
        assert rank["grad_x"].shape == x.shape


def test_one_value_for_its_group_takes_the_population_where_asked(four):
    parts = [torch.full((1 if rank == 2 else 4, C), 3.0) for rank in range(4)]
    out = four.run(
        "layer_step",
        *[{"x": p, "grad": p} for p in parts],
        channels=C,
        keywords={"on_single": "population", "group_size": 2},
    )
    assert torch.allclose(out[2]["y"], torch.full((1, C), 3.0), atol=1e-4)
    assert torch.allclose(out[0]["running_mean"], torch.full((C,), 0.3))


def test_one_value_in_each_rank_is_a_batch(four):
    parts = [torch.full((1, C), float(rank)) for rank in range(4)]
    grads = [torch.randn(1, C, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    out = four.run(
        "layer_step",
        *[{"x": p, "grad": q} for p, q in zip(parts, grads, strict=True)],
        channels=C,
        keywords={},
    )
    layer = BatchNorm1d(C).double()
    y = layer(torch.cat(parts).double())
    assert off(torch.cat([rank["y"] for rank in out]), y.detach()) < 2e-6


def test_what_is_not_finite_is_left_out_by_all_ranks(four):
    parts = parts_at_far_means()
    parts[2][3, 1] = torch.nan
    out = four.run(
        "layer_step",
        *[{"x": p, "grad": p} for p in parts],
        channels=C,
        keywords={"on_nonfinite": "raise"},
    )
    assert [error for error, _ in out] == ["NonFiniteError"] * 4
    assert all("channel 1" in message for _, message in out)


# ---- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_offset", [0.0, 1e2, 1e4])
def test_reproducible_statistics_are_the_same_for_any_division(four, with_offset):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(19, C, 5, generator=g) * torch.tensor([1.0, 1e-3, 50.0])[:, None] + with_offset
    parts = {n: list(x[torch.randperm(19, generator=g)].tensor_split(n)) for n in (1, 2, 3, 4)}
    out = four.run("in_groups", sizes=[1, 2, 3, 4], parts=parts, keywords={"reproducible": True})
    mean, var, _ = out[0][1]
    wide = x.double()
    exact_mean = wide.mean((0, 2))
    exact_var = ((wide - exact_mean[:, None]) ** 2).mean((0, 2)) * (19 * 5 / (19 * 5 - 1))
    assert off(mean, exact_mean) < 1e-12
    assert ((var - exact_var).abs() / exact_var).max() < 1e-9
    for rank, found in enumerate(out):
        for size, (m, v, _) in found.items():
            assert rank < size
            assert torch.equal(m, mean)
            assert torch.equal(v, var)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_example_has_the_same_bits_wherever_it_lies(dtype, memory_format):
    g = torch.Generator().manual_seed(14)
    x = (torch.randn(5, 19, 7, 9, generator=g) + 100).to(dtype).to(memory_format=memory_format)
    whole = exact_sums.Examples.of(x, None, functional.statistics_of)
    room = torch.empty(19 * 7 * 9 + 3, dtype=dtype)
    for n, example in enumerate(x.split(1)):
        for begin in (0, 1, 3):  # another alignment
            moved = room[begin : begin + example.numel()].as_strided(
                example.shape, example.stride(), begin
            )
            alone = exact_sums.Examples.of(moved.copy_(example), None, functional.statistics_of)
            assert torch.equal(alone.mean[0], whole.mean[n])
            assert torch.equal(alone.var[0], whole.var[n])


@pytest.mark.parametrize("reproducible", [False, True])
def test_reproducible_statistics_of_images_are_those_of_all_values(four, reproducible):
    g = torch.Generator().manual_seed(15)
    x = torch.randn(13, C, 40, 41, generator=g) * 3 + 1e3
    masks = (torch.rand(13, 40, 41, generator=g) < 0.7).float()
    parts, weights = ({4: list(v.tensor_split([3, 4, 4]))} for v in (x, masks))
    out = four.run(
        "in_groups",
        sizes=[4],
        parts=parts,
        masks=weights,
        keywords={"reproducible": reproducible},
    )
    right = Moments.of(x.double().numpy(), weights=masks.double().numpy())
    for found in out:
        mean, var, _ = found[4]
        assert off(mean, torch.from_numpy(right.mean.copy())) < 1e-12
        assert off(var, torch.from_numpy(right.var(ddof=1))) < 1e-11


def test_reproducible_statistics_in_one_process_are_right():
    x = torch.randn(64, C, 3, 3, generator=torch.Generator().manual_seed(4)) * 3 + 1e4
    mask = torch.rand(64, 3, 3, generator=torch.Generator().manual_seed(5))
    layer = SyncBatchNorm(C, reproducible=True, momentum=1.0).double()
    y = layer(x, mask=mask)
    right = Moments.of(x.numpy(), weights=mask.double().numpy())
    assert off(layer.running_mean, torch.from_numpy(right.mean.copy())) < 1e-12
    assert off(layer.running_var, torch.from_numpy(right.var(ddof=1))) < 1e-9
    assert torch.isfinite(y).all()


def test_reproducible_statistics_with_weights_are_the_same_for_any_division(four):
    g = torch.Generator().manual_seed(12)
    x = torch.randn(19, C, 5, generator=g) + 1e2
    mask = (1e4 * torch.rand(19, 5, generator=g)).round()
    mask[3:9] = 0
    orders = {n: torch.randperm(19, generator=g) for n in (1, 2, 4)}
    parts = {n: list(x[order].tensor_split(n)) for n, order in orders.items()}
    masks = {n: list(mask[order].tensor_split(n)) for n, order in orders.items()}
    out = four.run(
        "in_groups", sizes=[1, 2, 4], parts=parts, masks=masks, keywords={"reproducible": True}
    )
    mean, var, _ = out[0][1]
    right = Moments.of(x.numpy(), weights=mask.double().numpy())
    assert off(mean, torch.from_numpy(right.mean.copy())) < 1e-12
    assert off(var, torch.from_numpy(right.var(ddof=1))) < 1e-9
    for found in out:
        for m, v, _ in found.values():
            assert torch.equal(m, mean)
            assert torch.equal(v, var)


@pytest.mark.parametrize("scale", [1e-290, 1e-160, 1e150, 1e200, 1e300, 1e308])
def test_reproducible_statistics_of_any_magnitude(scale):
    x = torch.rand(33, 2, generator=torch.Generator().manual_seed(13)).double() - 0.5
    layer = SyncBatchNorm(2, reproducible=True, momentum=1.0, on_nonfinite="propagate").double()
    layer(x * scale)
    if scale < 1e300:
        assert off(layer.running_mean / scale, x.mean(0)) < 1e-12
    if scale < 1e154:
        assert torch.allclose(layer.running_var, x.var(0) * scale * scale, rtol=1e-9)
    else:  # the square overflows, which no finite number may hide
        assert not torch.isfinite(layer.running_var).any()


@pytest.mark.parametrize("constant", [0.0, 1e7, -1e30, 1e-30])
def test_reproducible_statistics_of_a_constant_are_exact(constant):
    layer = SyncBatchNorm(1, reproducible=True, momentum=1.0)
    x = torch.full((33, 1), constant)
    assert not layer(x).any()
    assert layer.running_mean.item() == x[0, 0].item()


def test_reproducible_statistics_tell_what_is_not_finite():
    layer = SyncBatchNorm(2, reproducible=True)
    x = torch.randn(8, 2)
    x[3, 1] = torch.inf
    with pytest.warns(RuntimeWarning, match="channel 1"):
        layer(x)
    assert layer.nonfinite_batches == 1


def test_merged_parts_are_those_of_moments():
    g = torch.Generator().manual_seed(6)
    parts = [torch.randn(n, C, generator=g).double() + 1e6 * n for n in (1, 7, 0, 30)]
    messages = [sync._message_of(0, torch.from_numpy(native.moments(p, None))) for p in parts]
    found = portable.merge(sync._statistics_in(torch.stack(messages)))
    right = native.as_moments(native.moments(torch.cat(parts), None)[0])
    merged = native.as_moments(found[0].numpy())
    assert merged.count.tolist() == right.count.tolist()
    assert merged.dof.tolist() == right.dof.tolist()
    assert abs(merged.mean - right.mean).max() < 1e-12 * abs(right.mean).max()
    assert abs(merged.m2 / right.m2 - 1).max() < 1e-12


# ---- around it ----------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8),
        nn.Linear(8, 2),
    )  # fmt: skip


def test_twenty_steps_under_ddp_are_those_of_one_process(four):
    g = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(20):
        x = torch.randn(sum(SIZES), 6, generator=g).double()
        batches.append((x, torch.randn(sum(SIZES), 2, generator=g).double()))
    whole = network().double()
    optimizer = torch.optim.SGD(whole.parameters(), 0.05)
    for x, target in batches:
        optimizer.zero_grad()
        (((whole(x) - target) ** 2).sum() / len(x)).backward()
        optimizer.step()
    shares = [
        [(x.split(SIZES)[rank], t.split(SIZES)[rank]) for x, t in batches] for rank in range(4)
    ]
    # The gradients are averaged over ranks, and the loss over examples.
    scale = [4 / len(x) for x, _ in batches]
    out = four.run(
        "train", *[{"batches": share} for share in shares], model=network().double(), scale=scale
    )
    right = whole.state_dict()
    for rank in out:
        assert isinstance(rank, dict), rank
        for name, value in right.items():
            assert torch.equal(rank[name], out[0][name]), name
            assert off(rank[name], value) < 2e-6, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_forward_counts_once(four, reentrant):
    x = torch.randn(16, C, generator=torch.Generator().manual_seed(8))
    out = four.run("checkpointed", *[{"x": part} for part in x.split(4)], reentrant=reentrant)
    layer = BatchNorm1d(C)
    layer(x)
    for mean, tracked, grad in out:
        assert torch.allclose(mean, layer.running_mean)
        assert int(tracked) == 1
        assert torch.isfinite(grad).all()


def test_transforms_of_functions_are_refused_with_the_reason(four):
    for error, message in four.run("transformed", x=torch.randn(4, C)):
        assert error == "RuntimeError"
        assert "torch.func" in message


def test_compiled_model_exchanges_all_the_same(four):
    x = torch.randn(16, C, generator=torch.Generator().manual_seed(9))
    out = four.run("compiled", *[{"x": part} for part in x.split(4)])
    assert out == [(0.0, True)] * 4


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize(
    "bad",
    [
        {"x": torch.randn(4, C + 1)},
        {"x": torch.randn(4)},
        {"x": torch.ones(4, C, dtype=torch.int64)},
        {"mask": torch.tensor([-1.0, 1.0, 1.0, 1.0])},
        {"residual": torch.randn(5, C)},
    ],
    ids=["channels", "rank", "type", "mask", "residual"],
)
def test_rank_that_raises_in_the_layer_ends_the_others_at_once(four, bad, reproducible):
    good = {"x": torch.randn(4, C)}
    begin = time.monotonic()
    out = four.run(
        "raise_in_layer",
        *[{**good, **bad} if rank == 1 else good for rank in range(4)],
        channels=C,
        name="stem",
        reproducible=reproducible,
    )
    assert time.monotonic() - begin < 20
    assert out[1][0] != "SynchronizationError"
    for rank in (0, 2, 3):
        error, message = out[rank]
        assert error == "SynchronizationError"
        assert "rank 1" in message
        assert message.startswith("stem.0: ")
    # The group can go on.
    test_one_value_in_each_rank_is_a_batch(four)


@pytest.mark.parametrize(
    ("how", "backward"), [("killed", False), ("killed", True), ("late", False)]
)
def test_rank_that_does_not_come_ends_the_others_with_the_layers_name(how, backward):
    ranks = Ranks(3, FUNCTIONS, timeout=3.0 if how == "late" else 60.0)
    try:
        given = {"rank_that_leaves": 1, "how": how, "backward": backward}
        ranks.start("leave", [given] * 3)
        for rank in (0, 2):
            error, message = ranks.result(rank)
            assert error == "SynchronizationError"
            assert message.startswith(f"features.bn: rank {rank} of 3 could not exchange")
    finally:
        ranks.close()


# ---- without other processes --------------------------------------------------------------------


def test_without_a_process_group_it_is_plain_batch_norm():
    x = torch.randn(8, C, 4, 4)
    layer, plain = SyncBatchNorm(C), BatchNorm2d(C)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.running_var, plain.running_var)
    assert torch.equal(layer.eval()(x), plain.eval()(x))


def test_it_is_torchs_layer_to_all_who_ask():
    layer = SyncBatchNorm(C, 1e-3, 0.2, True, True, None)
    theirs = nn.SyncBatchNorm(C, 1e-3, 0.2, True, True, None)
    assert isinstance(layer, nn.SyncBatchNorm)
    assert repr(layer) == repr(theirs)
    assert layer.state_dict().keys() == theirs.state_dict().keys()
    assert layer.process_group is None
    theirs.load_state_dict(layer.state_dict())
    layer.load_state_dict(theirs.state_dict())


def test_options_show_and_survive_copies():
    layer = SyncBatchNorm(C, reproducible=True, activation="relu")
    assert repr(layer).endswith("activation=relu, reproducible=True)")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.reproducible
        assert other.activation == "relu"


def test_convert_synchronizes_and_revert_undoes_it():
    net = nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C), nn.ReLU(), nn.SyncBatchNorm(C))
    before, layer, state = repr(net), net[1], copy.deepcopy(net.state_dict())
    assert convert(net, sync=True, reproducible=True) is net
    assert net[1] is layer
    assert type(net[1]) is SyncBatchNorm
    assert net[1].reproducible
    assert net[3].reproducible
    assert "; synchronized" in str(explain(net))
    revert(net)
    assert repr(net) == before
    assert type(net[1]) is nn.BatchNorm1d
    assert type(net[3]) is nn.SyncBatchNorm
    assert net[1].__dict__.keys() == nn.BatchNorm1d(C).__dict__.keys()
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])


def test_converted_layers_keep_their_options_when_synchronized():
    net = convert(nn.Sequential(nn.BatchNorm1d(C)), group_size=4, on_single="population")
    convert(net, sync=True)
    assert (net[0].group_size, net[0].on_single) == (4, "population")


def test_torchs_way_to_convert_makes_layers_of_ours():
    net = nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C), nn.ReLU())
    assert SyncBatchNorm.convert_sync_batchnorm(net) is net
    assert type(net[1]) is SyncBatchNorm
    assert type(net[2]) is nn.ReLU


@pytest.mark.parametrize("option", [{"process_group": object()}, {"reproducible": True}])
def test_options_of_synchronization_need_it(option):
    net = nn.Sequential(nn.BatchNorm1d(C))
    with pytest.raises(ArgumentError, match="sync=True"):
        convert(net, **option)
    assert type(net[0]) is nn.BatchNorm1d


def test_frozen_and_evaluated_layers_exchange_nothing(monkeypatch):
    def refuse(self, *arguments):
        raise AssertionError

    monkeypatch.setattr(processes.Processes, "gather_from", refuse)
    layer = SyncBatchNorm(C, reproducible=True)
    layer.eval()(torch.randn(4, C))
    freeze(layer.train())(torch.randn(4, C))


def test_backward_cannot_be_differentiated_and_says_so():
    layer = SyncBatchNorm(C, reproducible=True)
    x = torch.randn(8, C, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_torchs_own_layer_is_refused_by_ddp_on_a_cpu_as_before(tmp_path):
    code = f"""
import torch, torch.distributed as dist
import batchnorm.torch
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.SyncBatchNorm(3))
try:
    torch.nn.parallel.DistributedDataParallel(model)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "SyncBatchNorm layers only work with GPU modules" in done.stdout
