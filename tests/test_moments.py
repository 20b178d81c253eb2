import pickle
import tracemalloc
import weakref
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from batchnorm import Moments, batch_norm, moments, normalize
from batchnorm.errors import ArgumentError, BatchNormError, DTypeError, ShapeError

# A merge or a sum of n ≤ 100 values below 1e3 in float64: n·u·κ² with room. Mean relative to the
# largest value, m2 relative to the largest square times n, for both are sums of such terms.
ROUNDING = 1e-13


def _exact(x, weights=None):
    """Count, mean and m2 of (n, C) in rationals, rounded once."""
    weights = np.ones(len(x)) if weights is None else weights
    w = [Fraction(float(v)) for v in weights]
    n = sum(w)
    means, m2s = [], []
    for column in np.asarray(x, np.float64).T:
        values = [Fraction(float(v)) for v in column]
        mean = sum(a * b for a, b in zip(w, values, strict=True)) / n
        means.append(float(mean))
        m2s.append(float(sum(a * (b - mean) ** 2 for a, b in zip(w, values, strict=True))))
    return float(n), np.array(means), np.array(m2s)


def _assert_same(a, b, largest):
    n = float(np.max(a.count))
    np.testing.assert_allclose(a.count, b.count, rtol=1e-15)
    np.testing.assert_allclose(a.mean, b.mean, rtol=0, atol=ROUNDING * largest)
    np.testing.assert_allclose(a.m2, b.m2, rtol=0, atol=ROUNDING * largest**2 * max(n, 1))


values = hnp.arrays(
    np.float64,
    st.tuples(st.integers(3, 40), st.integers(1, 4)),
    elements=st.floats(-1e3, 1e3, allow_subnormal=False),
)


# ---- the value ----------------------------------------------------------------------------------


def test_moments_of_gives_count_mean_and_m2():
    m = Moments.of(np.array([[1.0, 4.0], [3.0, 4.0], [5.0, 7.0]]))
    assert m.count == 3
    np.testing.assert_array_equal(m.mean, [3.0, 5.0])
    np.testing.assert_array_equal(m.m2, [8.0, 6.0])


@pytest.mark.parametrize("name", ["count", "mean", "m2"])
def test_moments_attributes_cannot_be_set(name):
    with pytest.raises(AttributeError):
        setattr(Moments.of(np.ones((2, 2))), name, np.zeros(2))


@pytest.mark.parametrize("name", ["count", "mean", "m2"])
@pytest.mark.parametrize(
    "make", [lambda: Moments.of(np.ones((2, 2))), lambda: Moments(2, [1], [0])]
)
def test_moments_arrays_are_read_only(make, name):
    array = getattr(make(), name)
    with pytest.raises(ValueError, match="read-only"):
        array[...] = 1


def test_moments_do_not_share_memory_with_their_arguments():
    mean = np.zeros(2)
    m = Moments(3, mean, np.zeros(2))
    mean[0] = 5
    assert m.mean[0] == 0


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i4", "?"])
def test_moments_are_float64_whatever_the_values_are(kind):
    m = Moments.of(np.array([[0, 1], [1, 1]]).astype(kind))
    assert {m.count.dtype, m.mean.dtype, m.m2.dtype} == {np.dtype(np.float64)}


def test_moments_of_integers_are_those_of_their_values():
    m = Moments.of(np.array([[2**53], [2**53 - 2]], np.int64))
    assert m.mean[0] == 2.0**53 - 1


def test_moments_var_divides_by_count_minus_ddof():
    m = Moments(5, [0.0], [12.0])
    assert [m.var()[0], m.var(ddof=1)[0], m.var(2)[0]] == [12 / 5, 3.0, 4.0]


def test_moments_std_is_the_root_of_var():
    m = Moments(5, [0.0], [36.0])
    assert m.std(ddof=1)[0] == 3.0


@pytest.mark.parametrize(("count", "ddof"), [(0, 0), (1, 1), (0.5, 1)])
def test_moments_var_is_nan_when_count_is_not_above_ddof(count, ddof):
    assert np.isnan(Moments(count, [0.0], [0.0]).var(ddof)[0])


def test_moments_var_is_nan_only_in_the_channels_without_values():
    v = Moments([0, 2], [0.0, 1.0], [0.0, 8.0]).var()
    np.testing.assert_array_equal(v, [np.nan, 4.0])


def test_moments_of_an_empty_batch_have_count_zero():
    m = Moments.of(np.empty((0, 3)))
    assert m.count == 0
    np.testing.assert_array_equal([m.mean, m.m2], np.zeros((2, 3)))


def test_moments_of_no_channels_keep_the_count():
    m = Moments.of(np.empty((4, 0)))
    assert m.mean.shape == (0,)


def test_moments_of_a_zero_size_spatial_axis_have_count_zero():
    assert Moments.of(np.empty((2, 3, 0))).count == 0


def test_moments_equal_when_all_three_are():
    x = np.arange(6.0).reshape(3, 2)
    assert Moments.of(x) == Moments.of(x.copy())


def test_moments_differ_when_one_value_does():
    x = np.arange(6.0).reshape(3, 2)
    assert Moments.of(x) != Moments.of(x + 1)


def test_moments_differ_from_another_type():
    assert Moments() != 0


def test_moments_survive_pickling():
    m = Moments.of(np.arange(6.0).reshape(3, 2))
    assert pickle.loads(pickle.dumps(m)) == m


def test_moments_repr_shows_the_values_of_few_channels():
    assert "count=2" in repr(Moments(2, [1.0], [3.0]))


@pytest.mark.parametrize(
    ("count", "mean", "m2"),
    [(1, [0.0], [0.0, 0.0]), ([1, 2, 3], [0.0], [0.0]), (1, [[0.0]], [[0.0]]), ([1], 0.0, 0.0)],
)
def test_moments_refuse_shapes_that_do_not_fit(count, mean, m2):
    with pytest.raises(ShapeError, match=r"mean and m2 must have shape \(C,\).*got"):
        Moments(count, mean, m2)


@pytest.mark.parametrize(("count", "m2"), [(-1, [0.0]), (1, [-1e-300])])
def test_moments_refuse_negative_values(count, m2):
    with pytest.raises(ArgumentError, match="must not be negative"):
        Moments(count, [0.0], m2)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_moments_of_refuses_fewer_than_two_axes(shape):
    with pytest.raises(ShapeError, match="x must have at least 2 axes"):
        Moments.of(np.ones(shape))


@pytest.mark.parametrize("dtype", [complex, "U3", object, np.longdouble])
def test_moments_of_refuses_what_is_not_a_supported_number(dtype):
    with pytest.raises(DTypeError, match=r"x must be real numbers.*got"):
        Moments.of(np.ones((2, 2)).astype(dtype))


# ---- merging ------------------------------------------------------------------------------------


@given(values, st.data())
def test_moments_merged_over_any_partition_equal_those_of_the_whole(x, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=5)))
    parts = np.split(x, cuts)
    _assert_same(Moments.merge(Moments.of(p) for p in parts), Moments.of(x), np.abs(x).max())


@given(values, st.integers(0, 40), st.integers(0, 40))
def test_moments_merging_is_associative_to_rounding(x, i, j):
    i, j = sorted((min(i, len(x)), min(j, len(x))))
    a, b, c = Moments.of(x[:i]), Moments.of(x[i:j]), Moments.of(x[j:])
    _assert_same((a + b) + c, a + (b + c), np.abs(x).max())


@given(values, st.integers(0, 40))
def test_moments_merging_is_commutative_to_rounding(x, i):
    a, b = Moments.of(x[:i]), Moments.of(x[i:])
    _assert_same(a + b, b + a, np.abs(x).max())


@given(values)
def test_moments_neutral_element_changes_no_bit_on_either_side(x):
    m = Moments.of(x)
    for merged in (Moments() + m, m + Moments()):
        assert [v.tobytes() for v in (merged.count, merged.mean, merged.m2)] == [
            v.tobytes() for v in (m.count, m.mean, m.m2)
        ]


@pytest.mark.parametrize("left", [True, False])
def test_moments_of_an_empty_batch_change_no_bit_when_merged(left):
    m, empty = (
        Moments.of(np.random.default_rng(0).normal(size=(7, 3))),
        Moments.of(np.empty((0, 3))),
    )
    merged = empty + m if left else m + empty
    assert merged.mean.tobytes() == m.mean.tobytes()
    assert merged.m2.tobytes() == m.m2.tobytes()


def test_moments_merge_of_nothing_is_the_neutral_element():
    assert Moments.merge([]) == Moments()


def test_moments_merge_of_one_is_that_one():
    m = Moments.of(np.arange(6.0).reshape(3, 2))
    assert Moments.merge([m]) == m


def test_moments_merge_of_a_thousand_parts_equals_the_whole():
    x = np.random.default_rng(1).normal(1e6, 1.0, (3000, 2))
    merged = Moments.merge(Moments.of(p) for p in np.split(x, 1000))
    _, mean, m2 = _exact(x)
    # The corrected two-pass bound for float64 plus ten levels of merging, each a few u of a part
    # of m2; u·κ from the rounded means of the parts: δ is known to 1e6·u.
    np.testing.assert_allclose(merged.mean, mean, rtol=1e-15)
    np.testing.assert_allclose(merged.m2, m2, rtol=1e-9)


def test_moments_merge_takes_a_generator():
    assert Moments.merge(Moments(1, [float(i)], [0.0]) for i in range(3)).mean[0] == 1.0


def test_moments_merge_counts_each_channel_for_itself():
    merged = Moments([1, 3], [0.0, 0.0], [0.0, 0.0]) + Moments([1, 1], [2.0, 4.0], [0.0, 0.0])
    np.testing.assert_array_equal(merged.count, [2, 4])
    np.testing.assert_array_equal(merged.mean, [1.0, 1.0])
    np.testing.assert_array_equal(merged.m2, [2.0, 12.0])


def test_moments_merge_keeps_a_channel_that_one_side_has_not_seen():
    merged = Moments([0, 1], [0.0, 1.0], [0.0, 0.0]) + Moments([2, 1], [7.0, 1.0], [5.0, 0.0])
    np.testing.assert_array_equal(merged.mean, [7.0, 1.0])
    np.testing.assert_array_equal(merged.m2, [5.0, 0.0])


def test_moments_merge_of_two_empty_batches_is_empty():
    merged = Moments.of(np.empty((0, 2))) + Moments.of(np.empty((0, 2)))
    assert merged.count == 0
    np.testing.assert_array_equal(merged.mean, np.zeros(2))


def test_moments_merge_of_equal_constants_has_no_variance_when_they_are_huge():
    # scikit-learn/scikit-learn#5602: partial_fit on a constant 1.8e301 gave NaN.
    m = Moments.of(np.full((3, 1), 1.8e301)) + Moments.of(np.full((5, 1), 1.8e301))
    assert m.mean[0] == 1.8e301
    assert m.var()[0] == 0


def test_moments_merge_keeps_nan_in_its_channel():
    x = np.array([[np.nan, 1.0], [2.0, 3.0]])
    merged = Moments.of(x) + Moments.of(np.ones((2, 2)))
    np.testing.assert_array_equal(np.isnan(merged.mean), [True, False])


def test_moments_merge_refuses_another_number_of_channels():
    with pytest.raises(ShapeError, match=r"same number of channels, got \(2,\) and \(3,\)"):
        Moments.of(np.ones((2, 2))) + Moments.of(np.ones((2, 3)))


def test_moments_add_refuses_another_type():
    with pytest.raises(TypeError):
        Moments() + 1


@pytest.mark.parametrize("number", [1, 2, 7])
def test_moments_sum_merges_them(rng, number):
    x = rng.normal(size=(number, 5, 3))
    total = sum(Moments.of(part) for part in x)
    assert isinstance(total, Moments)
    _assert_same(total, Moments.of(x.reshape(-1, 3)), np.abs(x).max())


@pytest.mark.parametrize("other", [1, 0.5, None, [0]])
def test_moments_radd_refuses_what_is_not_zero(other):
    with pytest.raises(TypeError):
        other + Moments.of(np.ones((2, 2)))


@pytest.mark.parametrize("other", [0, 3, np.ones((4, 2))])
def test_moments_merge_refuses_what_is_not_moments(other):
    with pytest.raises(ArgumentError, match=r"parts must be Moments, got .*Moments\.of"):
        Moments.merge([other])


def _one_by_one(parts):
    """Merge pairwise by ``+``, in a binary counter: part 2k with 2k + 1, and so on."""
    stack = []
    for part in parts:
        size = 1
        while stack and stack[-1][0] == size:
            part = stack.pop()[1] + part
            size *= 2
        stack.append((size, part))
    total = Moments()
    for _, part in reversed(stack):
        total = part + total
    return total


def _bits(m):
    return [(v.shape, v.tobytes()) for v in (m.count, m.mean, m.m2, m.dof)] + [m._dof is None]


def _parts(random, number, channels, kinds):
    """`number` moments: plain, with a count per channel, weighted, both, empty, or neutral."""
    for _ in range(number):
        kind = random.choice(kinds)
        mean, m2 = random.normal(1e3, 1, channels), random.exponential(1, channels)
        count, dof = random.integers(0, 9, channels), random.uniform(0, 5, channels)
        if kind == "neutral":
            yield Moments()
        elif kind == "empty":
            yield Moments.of(np.empty((0, channels)))
        else:
            one = (lambda v: v) if kind in ("channels", "both") else (lambda v: v[0])
            weighted = kind in ("weighted", "both")
            yield Moments(one(count), mean, m2, one(dof) if weighted else None)


@given(
    st.integers(0, 140),
    st.integers(1, 3),
    st.lists(
        st.sampled_from(["plain", "channels", "weighted", "both", "empty", "neutral"]),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 2**32 - 1),
)
def test_moments_merge_gives_the_bits_of_merging_one_by_one(number, channels, kinds, seed):
    parts = list(_parts(np.random.default_rng(seed), number, channels, kinds))
    assert _bits(Moments.merge(parts)) == _bits(_one_by_one(parts))


@pytest.mark.parametrize("number", [4095, 4096, 4097, 9000])
@pytest.mark.parametrize("kind", ["plain", "both"])
def test_moments_merge_of_more_than_are_merged_together_gives_the_same_bits(rng, number, kind):
    parts = list(_parts(rng, number, 2, [kind]))
    assert number > moments.MERGED_VALUES // 2
    assert _bits(Moments.merge(iter(parts))) == _bits(_one_by_one(parts))


@pytest.mark.parametrize("channels", [0, 1, 700])
def test_moments_merge_of_few_or_many_channels_gives_the_same_bits(rng, channels):
    parts = [Moments.of(rng.normal(size=(3, channels))) for _ in range(40)]
    assert _bits(Moments.merge(parts)) == _bits(_one_by_one(parts))


@pytest.mark.parametrize(("channels", "most"), [(1, 1 << 12), (64, 64), (5000, 1)])
def test_moments_merge_holds_few_parts_of_a_generator(channels, most):
    alive, largest = 0, 0

    def ended():
        nonlocal alive
        alive -= 1

    def generate():
        nonlocal alive, largest
        for _ in range(5 * most):
            alive += 1
            largest = max(largest, alive)
            part = Moments(1, np.zeros(channels), np.zeros(channels))
            weakref.finalize(part, ended)
            yield part
            del part

    merged = Moments.merge(generate())
    assert merged.count == 5 * most
    assert largest <= 2 * most + 3  # those that are merged, the next, and some on their way


# ---- weights ------------------------------------------------------------------------------------


@given(values, st.data())
def test_moments_integer_weights_are_repetition(x, data):
    w = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(x), max_size=len(x))))
    weighted, repeated = Moments.of(x, weights=w), Moments.of(np.repeat(x, w, axis=0))
    _assert_same(weighted, repeated, np.abs(x).max())


def test_moments_real_weights_give_numpys_weighted_average(rng):
    x, w = rng.normal(5, 2, (50, 3)), rng.uniform(0, 2, 50)
    m = Moments.of(x, weights=w)
    mean = np.average(x, axis=0, weights=w)
    np.testing.assert_allclose(m.count, w.sum(), rtol=1e-14)
    np.testing.assert_allclose(m.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(m.var(), np.average((x - mean) ** 2, axis=0, weights=w), rtol=1e-13)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_moments_zero_weight_hides_what_it_covers(instruction_set, rng, bad, channel_axis):
    x = rng.normal(size=(6, 5, 7))
    w = (rng.uniform(size=(6, 7 if channel_axis == 1 else 5)) > 0.4).astype(float)
    clean = np.where(np.expand_dims(w, channel_axis) > 0, x, 0)
    dirty = np.where(np.expand_dims(w, channel_axis) > 0, x, bad)
    a = Moments.of(clean, weights=w, channel_axis=channel_axis)
    b = Moments.of(dirty, weights=w, channel_axis=channel_axis)
    assert a.mean.tobytes() == b.mean.tobytes()
    assert a.m2.tobytes() == b.m2.tobytes()


def test_moments_weights_of_whole_examples_broadcast(rng):
    x, w = rng.normal(size=(4, 3, 2, 5)), np.array([1.0, 0.0, 1.0, 1.0])
    m = Moments.of(x, weights=w[:, None, None])
    _assert_same(m, Moments.of(x[w > 0]), np.abs(x).max())


def test_moments_weights_of_all_zero_give_count_zero():
    m = Moments.of(np.full((3, 2), np.nan), weights=np.zeros(3))
    assert m.count == 0
    np.testing.assert_array_equal([m.mean, m.m2], np.zeros((2, 2)))


def test_moments_boolean_weights_are_a_mask(rng):
    x, mask = rng.normal(size=(10, 2)), np.arange(10) % 3 > 0
    _assert_same(Moments.of(x, weights=mask), Moments.of(x[mask]), np.abs(x).max())


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_moments_refuse_weights_that_are_negative_or_not_finite(bad):
    with pytest.raises(ArgumentError, match=r"weights must be finite and not negative.*got"):
        Moments.of(np.ones((3, 2)), weights=[1.0, bad, 1.0])


def test_moments_refuse_weights_that_do_not_broadcast():
    with pytest.raises(ShapeError, match=r"weights must broadcast.*\(3, 4\).*got \(3,\)"):
        Moments.of(np.ones((3, 2, 4)), weights=np.ones(3))


def test_moments_refuse_complex_weights():
    with pytest.raises(DTypeError, match="weights must be real numbers, got complex"):
        Moments.of(np.ones((3, 2)), weights=np.ones(3, complex))


def test_moments_errors_are_of_the_librarys_base():
    assert issubclass(ShapeError, (BatchNormError, ValueError))
    assert issubclass(DTypeError, BatchNormError)


# ---- degrees of freedom -------------------------------------------------------------------------


def _average_over_pairs(x, weights):
    """Σ wᵢwⱼ(xᵢ - xⱼ)²/2 over Σ wᵢwⱼ, i ≠ j, of (n,) in rationals."""
    x, w = ([Fraction(float(v)) for v in values] for values in (x, weights))
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    total = sum(w[i] * w[j] for i, j in pairs)
    return float(sum(w[i] * w[j] * (x[i] - x[j]) ** 2 / 2 for i, j in pairs) / total)


def test_moments_dof_is_count_minus_one_without_weights(rng):
    moments = Moments.of(rng.normal(size=(7, 3, 2)))
    assert (moments.count, moments.dof) == (14, 13)
    assert (moments + moments).dof == 27
    assert Moments(5, [0.0], [1.0]).dof == 4


def test_moments_dof_of_an_empty_batch_is_zero():
    assert Moments.of(np.empty((0, 3))).dof == 0
    assert Moments().dof == 0


# The dominated weights leave Σw - Σw²/Σw no digits if the two are subtracted.
@pytest.mark.parametrize(
    "weights", [[0.5, 0.3, 0.2], [1, 1e-12, 1e-20], [1e-200, 2e-200, 3e-200], [1e200, 1e190, 1]]
)
def test_moments_weighted_variance_is_the_average_over_pairs(weights):
    x = np.array([[1.0], [2.0], [5.0]])
    exact = _average_over_pairs(x[:, 0], weights)
    whole = Moments.of(x, weights=weights)
    np.testing.assert_allclose(whole.var(ddof=1), exact, rtol=1e-14)


def test_moments_merged_weighted_variance_is_the_average_over_pairs(rng):
    x, w = rng.normal(size=(12, 1)), rng.random(12) ** 8
    exact = _average_over_pairs(x[:, 0], w)
    parts = [Moments.of(x[s], weights=w[s]) for s in (slice(0, 5), slice(5, 6), slice(6, 12))]
    np.testing.assert_allclose(Moments.merge(parts).var(ddof=1), exact, rtol=1e-13)


def test_moments_variance_of_a_softmax_is_near_that_of_the_values(rng):
    # Divided by Σw - 1, which rounds to 1e-16, it would be of the order of 1e15.
    w = np.exp(rng.normal(size=1000))
    x = rng.normal(0, 3, (1000, 2))
    np.testing.assert_allclose(Moments.of(x, weights=w / w.sum()).var(ddof=1), 9, rtol=0.3)


# ---- merging at the ends of float64 -------------------------------------------------------------


def test_moments_merge_of_means_further_apart_than_float64_reaches():
    merged = Moments(1, [1.7e308], [0.0]) + Moments(3, [-1.7e308], [0.0])
    np.testing.assert_allclose(merged.mean, [-0.85e308])
    np.testing.assert_array_equal(merged.m2, [np.inf])


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_moments_merge_of_small_parts_at_a_large_offset_is_within_its_bound(rng, rows):
    # docs/numerics.md: 4·u·|mean|/std, for the means of parts are rounded to float64.
    offset = 1e8
    x = offset + rng.normal(size=(700, 20))
    merged = Moments.merge(Moments.of(x[i : i + rows]) for i in range(0, 700, rows))
    exact = _exact(x)[2]
    assert np.abs(merged.m2 / exact - 1).max() < 4 * 2.0**-53 * offset


# ---- masked arrays ------------------------------------------------------------------------------


def _masked(rng, shape, dtype=np.float64, shared=False, axis=1):
    """Values with NaN (or 99) where they are masked."""
    x = rng.normal(3, 2, shape).astype(dtype)
    mask = rng.random(shape) < 0.3
    if shared:
        mask[...] = mask.take([0], axis)
    hidden = x.copy()
    hidden[mask] = np.nan if x.dtype.kind in "fV" else 99
    return np.ma.MaskedArray(hidden, mask)


def _of_present(x, axis=1, weights=None):
    """Exact count, mean and m2 of each channel of a masked array, without its masked values."""
    by_channel = np.moveaxis(x.data, axis, 0), ~np.moveaxis(x.mask, axis, 0)
    w = np.ones(by_channel[0].shape[1:]) if weights is None else weights
    found = [
        _exact(values[present][:, None], np.broadcast_to(w, values.shape)[present])
        for values, present in zip(*by_channel, strict=True)
    ]
    return (np.hstack(row) for row in zip(*found, strict=True))


@pytest.mark.parametrize(("shape", "axis"), [((40, 3), 1), ((7, 4, 6), -1), ((3, 5, 6), 0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_a_masked_array_are_those_of_its_other_values(rng, shape, axis, weighted):
    x = _masked(rng, shape, axis=axis)
    others = tuple(n for k, n in enumerate(shape) if k != axis % len(shape))
    w = rng.choice([0.5, 1.0, 2.0], others) if weighted else None
    found = Moments.of(x, channel_axis=axis, weights=w)
    count, mean, m2 = _of_present(x, axis, w)
    np.testing.assert_array_equal(found.count, count)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(found.m2, m2, rtol=1e-13)


def test_moments_of_a_masked_array_take_every_type(rng, dtype):
    x = _masked(rng, (40, 3), dtype)
    count, mean, m2 = _of_present(x)
    found = Moments.of(x)
    np.testing.assert_array_equal(found.count, count)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.m2, m2, rtol=1e-9)


def test_moments_of_masked_integers_are_those_of_the_other_values(rng):
    x = _masked(rng, (40, 3), np.int16)
    count, mean, m2 = _of_present(x)
    found = Moments.of(x)
    np.testing.assert_array_equal(found.count, count)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(found.m2, m2, rtol=1e-13)


def test_moments_of_a_mask_that_channels_share_have_one_count(rng):
    x = _masked(rng, (20, 3, 4), shared=True)
    m = Moments.of(x)
    assert m.count.shape == ()
    _assert_same(m, Moments.of(x.data, weights=~x.mask[:, 0]), 20)


def test_moments_of_a_masked_array_with_nothing_masked_are_those_of_its_data(rng):
    x = rng.normal(size=(20, 3))
    for mask in (np.ma.nomask, np.zeros(x.shape, bool)):
        assert _bits(Moments.of(np.ma.MaskedArray(x, mask))) == _bits(Moments.of(x))


def test_moments_of_a_channel_that_is_masked_are_empty(rng):
    x = np.ma.MaskedArray(rng.normal(size=(5, 2)))
    x[:, 1] = np.ma.masked
    m = Moments.of(x)
    np.testing.assert_array_equal([m.count, m.dof], [[5, 0], [4, 0]])
    assert (m.mean[1], m.m2[1]) == (0, 0)


def test_moments_of_masked_parts_merge_to_those_of_the_whole(rng):
    x = _masked(rng, (60, 3))
    _assert_same(
        Moments.merge(Moments.of(x[k : k + 7]) for k in range(0, 60, 7)), Moments.of(x), 20
    )


def test_moments_masked_weights_are_zero(rng):
    x, w = rng.normal(size=(6, 3)), np.ma.MaskedArray([1.0, np.nan, 2, 3, 1, 1], [0, 1, 0, 0, 0, 1])
    assert Moments.of(x, weights=w) == Moments.of(x, weights=[1, 0, 2, 3, 1, 0])


@pytest.mark.parametrize("name", ["count", "mean", "m2", "dof"])
def test_moments_refuse_masked_arguments(name):
    given = {"count": [3.0, 3.0], "mean": [1.0, 1.0], "m2": [1.0, 1.0], "dof": [2.0, 2.0]}
    given[name] = np.ma.MaskedArray(given[name], [False, True])
    with pytest.raises(ArgumentError, match=f"{name} must not have masked values, got 1 of 2"):
        Moments(**given)


# ---- values that are converted in blocks --------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(moments, "BLOCK_VALUES", 1 << 11)


_LAYOUTS_OF_BLOCKS = {
    "rows": ((5000, 3), 1),
    "wide rows": ((300, 50), 1),
    "one long channel": ((1, 20000), 0),
    "channel first": ((4, 9000), 0),
    "images": ((9, 3, 20, 30), 1),
    "one image": ((1, 5, 60, 50), 1),
    "images, channels last": ((9, 20, 30, 3), -1),
    "in the middle": ((700, 4, 10), 1),
}


@pytest.mark.parametrize("kind", ["u1", "?", "i2", "u4", "i8", ">f4", ">f8", ">f2", ">i4"])
@pytest.mark.parametrize("case", _LAYOUTS_OF_BLOCKS)
def test_moments_in_blocks_are_those_of_the_converted_array(small_blocks, rng, kind, case):
    shape, axis = _LAYOUTS_OF_BLOCKS[case]
    x = rng.integers(0, 2 if kind == "?" else 100, shape).astype(kind)
    found = Moments.of(x, channel_axis=axis)
    expected = Moments.of(x.astype(np.float64), channel_axis=axis)
    assert (found.count, found._dof) == (expected.count, None)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-15)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-13)


@pytest.mark.parametrize(
    "view", [np.asfortranarray, lambda x: x[::-1, ::2], lambda x: x.T.copy().T]
)
def test_moments_in_blocks_take_any_strides(small_blocks, rng, view):
    x = view(rng.integers(0, 100, (900, 8, 3)).astype(np.uint8))
    expected = Moments.of(x.astype(np.float64))
    np.testing.assert_allclose(Moments.of(x).m2, expected.m2, rtol=1e-13)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("axis", [1, -1, 0])
def test_moments_in_blocks_are_masked_and_weighted(small_blocks, rng, shared, weighted, axis):
    x = _masked(rng, (30, 20, 25), np.float32, shared, axis)
    x[(slice(None),) * (axis % 3) + (2,)] = np.ma.masked  # nor does the first block have any of it
    others = [n for k, n in enumerate(x.shape) if k != axis % 3]
    w = rng.choice([0.0, 0.5, 2.0], others) if weighted else None
    found = Moments.of(x, channel_axis=axis, weights=w)
    values = np.moveaxis(x, axis, 0)
    for c in (0, 2, 7):
        present = (~values.mask[c]).ravel() * (1 if w is None else w.ravel())
        one = Moments.of(values.data[c].reshape(-1, 1), weights=present)
        np.testing.assert_allclose((found.count + 0 * found.mean)[c], one.count)
        np.testing.assert_allclose(found.mean[c], one.mean[0], rtol=1e-12)
        np.testing.assert_allclose(found.m2[c], one.m2[0], rtol=1e-9)
        np.testing.assert_allclose(found.var(1)[c], one.var(1)[0], rtol=1e-9)


@pytest.mark.parametrize("hidden", [0, 9000])
def test_moments_in_blocks_keep_the_digits_of_the_variance_at_a_large_offset(
    small_blocks, rng, hidden
):
    # The difference from the offset is known exactly; merging rounded means would lose all digits.
    small = rng.integers(-2, 3, (20000, 2))
    exact = Moments.of(small[hidden:].astype(np.float64))
    x = np.ma.MaskedArray(small + 2**52)
    if hidden:  # more than the first blocks
        x[:hidden] = np.ma.masked
    found = Moments.of(x)
    np.testing.assert_allclose(found.m2, exact.m2, rtol=1e-13)
    np.testing.assert_array_equal(found.mean, 2.0**52 + exact.mean)


def test_moments_in_blocks_see_nan_and_infinity_where_they_are(small_blocks, rng):
    x = rng.normal(size=(5000, 5)).astype(">f4")
    x[0, 0] = x[4000, 1] = np.nan
    x[0, 2] = x[4000, 3] = -np.inf
    m = Moments.of(x)
    np.testing.assert_array_equal(np.isnan(m.m2), [True, True, True, True, False])
    np.testing.assert_array_equal(m.mean[:4], [np.nan, np.nan, -np.inf, -np.inf])
    np.testing.assert_array_equal(Moments.of(x.astype("=f4")).mean[:4], m.mean[:4])


def test_moments_in_blocks_of_weighted_integers_are_those_of_the_converted_array(small_blocks, rng):
    x, w = rng.integers(0, 100, (3000, 4, 2)).astype(np.int16), rng.random((3000, 1))
    found, expected = Moments.of(x, weights=w), Moments.of(x.astype(np.float64), weights=w)
    for name in ("count", "mean", "m2", "dof"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)


def test_moments_in_blocks_have_the_same_bits_each_time(small_blocks, rng):
    x = rng.integers(0, 200, (5000, 7)).astype(np.uint8)
    assert _bits(Moments.of(x)) == _bits(Moments.of(x.copy()))


@pytest.mark.parametrize("kind", ["u1", ">f4"])
@pytest.mark.parametrize("masked", [False, True])
def test_moments_need_little_memory_for_what_is_converted(small_blocks, kind, masked):
    x = np.zeros((1 << 17, 8), kind)
    if masked:
        mask = np.zeros(x.shape, bool)
        mask[::3, 1] = True
        x = np.ma.MaskedArray(x, mask)
    Moments.of(x[:4])
    tracemalloc.start()
    try:
        Moments.of(x)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20  # as float64, x has 8 MiB


@pytest.mark.parametrize("function", [Moments.of, normalize, batch_norm])
def test_lists_of_masked_rows_are_refused(function):
    rows = [np.ma.array([1.0, 99.0], mask=[0, 1]), np.ma.array([3.0, 4.0])]
    with pytest.raises(DTypeError, match=r"list of masked ones.* numpy\.ma\.stack"):
        function(rows)
