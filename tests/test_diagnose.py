"""check: every sick network of the zoo by its code, nothing on the healthy ones."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

import zoo  # noqa: E402
from batchnorm.diagnose import RULES, Batch, Layer, Network, examine  # noqa: E402
from batchnorm.errors import ArgumentError  # noqa: E402
from batchnorm.moments import Moments  # noqa: E402
from batchnorm.torch import check, convert, freeze, recalibrate  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def _codes(findings):
    return {finding.code for finding in findings}


@pytest.mark.parametrize("name", zoo.SICK)
def test_sick_network_is_found_by_its_code(name):
    case = zoo.SICK[name]()
    found = check(case.model, case.data, case.optimizer, progress=False)
    assert case.code in _codes(found), str(found)
    assert _codes(found) <= {case.code, *case.also}, str(found)
    if case.layers is not None:
        assert {f.layer for f in found if f.code == case.code} == set(case.layers)


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "batchnorm"])
@pytest.mark.parametrize("name", zoo.HEALTHY)
def test_healthy_network_has_no_findings(name, ours):
    make, of = zoo.HEALTHY[name]
    model, data = make(), zoo.loader(*of())
    if ours:
        convert(model)
    assert not check(model, data, progress=False)
    zoo.train(model, data, 5)
    assert not check(model, data, progress=False)
    zoo.train(model, data, 80)
    optimizer = zoo.cured_optimizer(model)
    assert not check(model, data, optimizer, progress=False)
    assert not check(model.eval(), data, progress=False)
    assert not check(model.eval(), progress=False)


def test_averaged_weights_with_measured_statistics_have_no_findings():
    model, data = zoo.averaged_and_measured()
    assert not check(model, data, progress=False)


@pytest.mark.parametrize("name", ["checkpointed", "last_batch_of_one", "dropout_before"])
def test_check_leaves_the_model_as_it_was(name):
    case = zoo.SICK[name]()
    before = zoo.state_of(case.model)
    check(case.model, case.data, progress=False)
    after = zoo.state_of(case.model)
    for (key, one), other in zip(before[0].items(), after[0].values(), strict=True):
        assert torch.equal(one, other), key
    assert before[1] == after[1]
    assert [g is None for g in before[2]] == [g is None for g in after[2]]
    assert before[3] == after[3]
    assert torch.equal(before[4], after[4])


def test_check_leaves_the_model_as_it_was_when_its_forward_raises():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.calls = nn.BatchNorm1d(20), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 12:
                raise RuntimeError("no more")
            return self.norm(x)

    model = Fails()
    before = zoo.state_of(model)
    with pytest.raises(RuntimeError, match="no more"):
        check(model, zoo.loader(*zoo.rows()), progress=False)
    after = zoo.state_of(model)
    assert before[1] == after[1]
    assert before[3] == after[3]
    assert all(map(torch.equal, before[0].values(), after[0].values()))


def test_check_runs_no_optimizer_that_waits_in_hooks_of_parameters():
    model, data = zoo.mlp(), zoo.loader(*zoo.rows())
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    before = zoo.state_of(model)[0]
    found = check(model, data, progress=False)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert any("hooks of parameters" in text for text in found.skipped)


def test_masked_values_do_not_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = convert(nn.BatchNorm1d(4))

        def forward(self, x):
            mask = torch.arange(10) < 3
            return self.norm(torch.where(mask, x, 100.0), mask=mask)

    model = Masked()
    data = [torch.randn(32, 4, 10) for _ in range(60)]
    with torch.no_grad():
        for x in data:
            model(x)
    assert not check(model, data, progress=False)
    assert not check(model.eval(), data, progress=False)


@pytest.mark.parametrize("compiled", [lambda m: m.compile(backend="eager"), lambda m: m[1].compile(
    backend="eager")], ids=["all", "layer"])  # fmt: skip
def test_compiled_models_are_looked_at_uncompiled(compiled):
    model, data = zoo.mlp(), zoo.loader(*zoo.rows())
    compiled(model)
    assert not check(model, data, progress=False)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: m[1].weight.data.__setitem__(0, float("nan")), "BN104"),
        (lambda m: m[4].bias.data.__setitem__(2, float("inf")), "BN104"),
    ],
)
def test_parameters_that_are_not_finite_are_found(change, code):
    model = zoo.mlp()
    change(model)
    assert _codes(check(model, progress=False)) == {code}


def test_data_that_are_not_finite_are_said():
    found = check(zoo.mlp(), [torch.full((32, 20), float("nan"))], progress=False)
    assert any("not finite" in text for text in found.skipped)


def test_batches_of_one_are_found():
    model = zoo.train(zoo.mlp(), zoo.loader(*zoo.rows()))
    assert "BN301" in _codes(check(model, [torch.randn(1, 20)] * 20, progress=False))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (3, 4)), nn.BatchNorm1d(3)),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(10)),
    ],
)
def test_bias_of_another_axis_is_no_finding(model):
    x = torch.randn(64, 4) if len(model) == 3 else torch.randn(64, 10, 4)
    assert not check(model, [x], progress=False)


def test_models_that_return_their_loss_have_no_outputs_to_compare():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = zoo.mlp()

        def forward(self, x):
            return {"loss": self.body(x).square().mean()}

    model, data = Loss(), zoo.loader(*zoo.rows())
    zoo.train(model.body, data)
    assert not check(model.eval(), data, progress=False)


def test_lazy_layers_are_named():
    with pytest.raises(ArgumentError, match="got one with uninitialized tensors in '1'"):
        check(nn.Sequential(nn.LazyLinear(8, bias=False), nn.LazyBatchNorm1d()))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mode_does_not_decide_what_is_found(mode):
    case = zoo.SICK["few_steps_at_a_small_momentum"]()
    found = check(getattr(case.model, mode)(), case.data, progress=False)
    assert {"BN102", "BN103", "BN105"} <= _codes(found)


def test_measured_statistics_hold_nothing_of_the_initial_ones():
    model, data = zoo.mlp(lambda n: nn.BatchNorm1d(n, momentum=0.001)), zoo.loader(*zoo.rows())
    with torch.no_grad():
        model[0].weight.mul_(0.3)
    recalibrate(model, data, progress=False)
    assert not check(model.eval(), progress=False)


# ---- what it returns ----------------------------------------------------------------------------


def test_finding_has_code_layer_message_evidence_fix_and_page():
    case = zoo.SICK["few_steps_at_a_small_momentum"]()
    found = check(case.model, case.data, progress=False)
    finding = next(f for f in found if f.code == "BN105")
    assert (finding.code, finding.layer) == ("BN105", "1")
    assert finding.evidence == {"left": 0.999**150, "updates": 150, "momentum": 0.001}
    assert "86%" in finding.message
    assert finding.fix
    assert finding.url.endswith("BN105.md")


def test_findings_print_a_paragraph_for_each_code_with_five_layers():
    model = nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4))))
    text = str(check(model, progress=False))
    assert text.count("BN401 bias before a batch norm") == 1
    assert text.count("has no effect: batch norm") == 5
    assert "and 3 more: 11, 13, 15" in text
    assert "8 findings" in text


class Branches(nn.Module):
    """Of its four batch norms, one could be folded."""

    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(4))

    def forward(self, x):
        ys = [linear(x) for linear in self.linears]
        zs = [norm(y) for norm, y in zip(self.norms, ys, strict=True)]
        again = self.linears[1](x + 1)  # called twice
        return zs, again, ys[2], ys[3].relu()


@pytest.mark.parametrize("data", [None, [torch.ones(8, 4)]], ids=["traced", "run"])
def test_batch_norm_that_could_be_folded_is_noted_if_that_is_selected(data):
    model = Branches().eval()
    found = check(model, data, select="BN501", progress=False)
    assert [(f.code, f.layer, f.level) for f in found] == [("BN501", "norms.0", "note")]
    assert "BN501 could be folded into the layer before (note)" in str(found)
    assert "BN501" not in _codes(check(model, data, progress=False))
    assert not check(model.train(), data, select="BN501", progress=False)


def test_linear_layer_on_sequences_could_not_take_in_the_batch_norm():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)).eval()
    assert check(model, [torch.ones(8, 4)], select="BN501", progress=False)
    assert not check(model, [torch.ones(8, 4, 4)], select="BN501", progress=False)


def test_no_findings_say_so():
    model, data = zoo.mlp(), zoo.loader(*zoo.rows())
    found = check(model, data, progress=False)
    assert len(found) == 0
    assert str(found) == "no findings"


def test_select_and_ignore_take_beginnings_of_codes():
    case = zoo.SICK["weights_changed_after_training"]()
    everything = check(case.model, case.data, progress=False)
    assert _codes(everything) == {"BN102", "BN103"}
    assert _codes(check(case.model, case.data, select=["BN102"], progress=False)) == {"BN102"}
    assert not check(case.model, case.data, ignore="BN1", progress=False)


@pytest.mark.parametrize("argument", ["select", "ignore"])
def test_unknown_code_is_refused_before_the_work(argument):
    def never():
        raise AssertionError("the data were used")
        yield

    with pytest.raises(ArgumentError, match="got 'BN9'. The codes are BN101"):
        check(zoo.mlp(), never(), **{argument: ["BN9"]})


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("net", None, "takes a torch.nn.Module, got str"),
        (nn.Linear(2, 2), None, "a model with batch norms, got one without"),
        (nn.BatchNorm1d(2), [], "at least one batch, got none"),
        (nn.BatchNorm1d(2), 3, "an iterable of batches, such as a DataLoader, got int"),
    ],
)
def test_unusable_arguments_are_refused(model, data, message):
    with pytest.raises(ArgumentError, match=message):
        check(model, data)


# ---- what it mends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "never_trained_in_evaluation", "other_data_at_test_time", "outputs_apart",
        "nan_in_the_statistics", "far_from_zero", "checkpointed",
        "frozen_parameters_in_training", "weight_decay", "averaged_weights",
        "half_precision_statistics",
    ],
)  # fmt: skip
def test_fix_mends_what_is_safe_and_says_so(name):
    case = zoo.SICK[name]()
    found = check(case.model, case.data, case.optimizer, fix=True, progress=False)
    assert case.code not in _codes(found), str(found)
    assert any(case.code in text for text in found.fixed)


def test_fix_reports_what_it_cannot_do():
    class Mine(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) * 1.0

    model = nn.Sequential(nn.BatchNorm1d(4), Mine(4)).requires_grad_(False)
    model(torch.randn(32, 4))
    found = check(model, fix=True)
    assert model[0].stats_frozen
    assert any("Mine cannot be converted" in text for text in found.skipped)
    fresh = check(zoo.mlp().requires_grad_(False), fix=True)
    assert any("never been measured" in text for text in fresh.skipped)


def test_fix_with_a_last_batch_of_one():
    data = zoo.loader(*zoo.rows(257), drop_last=False, shuffle=False)
    model = zoo.mlp().eval()
    found = check(model, data, fix=True, progress=False)
    assert "BN101" not in _codes(found)
    assert found.fixed


def test_fix_refuses_data_that_can_be_read_once():
    with pytest.raises(ArgumentError, match="runs data several times, got an iterator"):
        check(zoo.mlp(), iter([torch.randn(32, 20)]), fix=True)


def test_fix_leaves_the_rest():
    case = zoo.SICK["biases_before"]()
    found = check(case.model, case.data, fix=True, progress=False)
    assert _codes(found) == {"BN401"}
    assert not found.fixed
    assert any("nothing was mended" in text for text in found.skipped)


def test_fix_keeps_the_state_of_the_optimizer():
    case = zoo.SICK["weight_decay"]()
    model, optimizer = case.model, case.optimizer
    x, y = zoo.rows(32)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    moments = {id(p): s["exp_avg"].clone() for p, s in optimizer.state.items()}
    check(model, optimizer=optimizer, fix=True, progress=False)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == len(list(model.parameters()))
    assert decays[id(model[1].weight)] == 0
    assert decays[id(model[0].weight)] == 0.05
    assert all(
        torch.equal(optimizer.state[p]["exp_avg"], moments[id(p)]) for p in model.parameters()
    )


# ---- rules on plain records ---------------------------------------------------------------------


def test_rules_have_codes_of_their_own_in_bands():
    codes = [rule.code for rule in RULES]
    assert len(set(codes)) == len(codes) >= 30
    assert codes == sorted(codes)


def test_nothing_is_found_where_nothing_is_known():
    assert not examine(Network())
    assert not examine(Network(layers=[Layer(name="a", channels=3)]))


def _batch(examples):
    count = np.full(3, 100.0 * examples)
    return Batch(Moments(count, np.zeros(3), count), examples)


def _layer(**known):
    ones = np.ones(3)
    return Layer(name="a", channels=3, mean=0 * ones, var=ones, updates=500, **known)


def test_processes_with_different_statistics_are_found():
    ranks = [{"a": (np.zeros(3), np.ones(3))}, {"a": (np.array([0.0, 0.9, 0.0]), np.ones(3))}]
    found = examine(Network(layers=[_layer()], ranks=ranks))
    assert _codes(found) == {"BN108"}
    assert found[0].evidence["largest_shift"] == pytest.approx(0.9, rel=1e-4)
    near = [ranks[0], {"a": (np.full(3, 0.1), np.full(3, 1.2))}]
    assert not examine(Network(layers=[_layer()], ranks=near))


@pytest.mark.parametrize(
    ("known", "wrong"),
    [
        ({}, True),
        ({"synchronized": True}, False),
        ({"frozen": True}, False),
        ({"batches": (_batch(32),)}, False),
    ],
)
def test_processes_that_do_not_share_statistics_are_found_if_batches_are_small(known, wrong):
    network = Network(layers=[_layer(training=True, **known)], processes=4)
    assert _codes(examine(network)) == ({"BN409"} if wrong else set())


@settings(deadline=None, max_examples=60)
@given(
    shift=st.floats(-0.4, 0.4),
    factor=st.floats(0.75, 1.35),
    examples=st.integers(4, 10_000),
    offset=st.floats(-1e3, 1e3),
    scale=st.floats(0.1, 1e3),
)
def test_statistics_near_the_data_are_no_finding_at_any_scale(
    shift, factor, examples, offset, scale
):
    count = np.full(3, float(examples))
    population = Moments(count, np.full(3, offset), count * scale**2)
    layer = Layer(
        name="a", channels=3, updates=500, population=population, examples=examples, training=False,
        mean=np.full(3, offset + shift * scale), var=np.full(3, (factor * scale) ** 2), exact=True,
    )  # fmt: skip
    assert not examine(Network(layers=[layer]))


@settings(deadline=None, max_examples=60)
@given(
    shift=st.floats(1.3, 50),
    sign=st.sampled_from([-1, 1]),
    examples=st.integers(64, 10_000),
    scale=st.floats(0.1, 1e3),
)
def test_statistics_far_from_the_data_are_found_at_any_scale(shift, sign, examples, scale):
    count = np.full(3, float(examples))
    population = Moments(count, np.zeros(3), count * scale**2)
    layer = Layer(
        name="a", channels=3, updates=500, population=population, examples=examples, training=False,
        mean=np.full(3, sign * shift * scale), var=np.full(3, scale**2),
    )  # fmt: skip
    assert "BN102" in _codes(examine(Network(layers=[layer])))


def test_frozen_layers_of_ours_are_no_finding():
    model, data = zoo.mlp(), zoo.loader(*zoo.rows())
    zoo.train(model, data)
    freeze(convert(model), affine=True)
    assert not check(model, data, progress=False)
