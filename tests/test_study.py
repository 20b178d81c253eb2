"""Studies: verdicts, results that survive interruption and damage, the command, the experiments."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("scipy")
pytest.importorskip("altair")

import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import cli, study
from batchnorm.diagnose.shift import distances
from batchnorm.errors import ArgumentError
from batchnorm.study import Claim, Records, Results, Study, Trial, judge, runner
from batchnorm.study.verdicts import shade

NAMES = study.names()
ROOT = Path(__file__).resolve().parent.parent


def _claim(**changes):
    given = {
        "text": "It is large.",
        "source": "nobody",
        "statistic": "the value",
        "measure": lambda records: records.value("value"),
        "side": "above",
        "threshold": 1.0,
        "depends_on": "the weather",
    }
    return Claim(**(given | changes))


def _trials(*values):
    return [Records([{"value": v}]) for v in values]


# ---- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "values", "text", "holds"),
    [
        ("above", (2.0, 2.1, 1.9), "reproduced", "yes"),
        ("above", (0.5, 0.6, 0.4), "not reproduced", "no"),
        ("above", (0.0, 2.0, 3.0), "not reproduced", "undecided"),
        ("below", (0.5, 0.6, 0.4), "reproduced", "yes"),
        ("below", (2.0, 2.1, 1.9), "not reproduced", "no"),
        ("above", (2.0, 2.0, 2.0), "reproduced", "yes"),
        ("above", (1.0, 1.0, 1.0), "not reproduced", "undecided"),
    ],
)
def test_verdict_asks_on_which_side_the_interval_is(side, values, text, holds):
    verdict = judge(_claim(side=side), _trials(*values))
    assert (verdict.text, verdict.outcomes[0].holds) == (text, holds)


def test_verdict_names_what_it_depends_on_when_conditions_differ():
    claim = _claim(measure=lambda r: {"sun": r.value("value"), "rain": -r.value("value")})
    verdict = judge(claim, _trials(2.0, 2.1, 1.9))
    assert verdict.text == "depends on the weather"
    assert [(o.condition, o.holds) for o in verdict.outcomes] == [("sun", "yes"), ("rain", "no")]


@pytest.mark.parametrize(
    ("text", "holds", "shown"),
    [
        ("reproduced", ["yes"], "reproduced"),
        ("not reproduced", ["no", "undecided"], "not reproduced"),
        ("not reproduced", ["undecided"], "not reproduced (undecided)"),
        ("depends on it", ["yes", "no"], "depends on it"),
        ("depends on it", ["yes", "undecided"], "depends on it (others undecided)"),
    ],
)
def test_shade_tells_undecided_from_refuted(text, holds, shown):
    assert shade(text, holds) == shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": lambda r: {}}, "the same conditions for each seed, and one"),
        ({"measure": lambda r: {str(r.value("value")): 1.0}}, "the same conditions for each seed"),
        ({"measure": lambda r: {"a": 1.0, "b": 2.0}, "depends_on": ""}, "depends_on must say"),
    ],
)
def test_verdict_refuses_measures_that_decide_nothing(changes, message):
    with pytest.raises(ArgumentError, match=message):
        judge(_claim(**changes), _trials(1.0, 2.0))


def test_claim_refuses_an_unknown_side():
    with pytest.raises(ArgumentError, match="side must be 'above' or 'below', got 'over'"):
        _claim(side="over")


@pytest.mark.parametrize("values", [(2.0,), (np.inf, 1.0, 1.0), (np.nan, 2.0)])
def test_verdict_is_undecided_where_nothing_is_known_of_the_spread(values):
    (outcome,) = judge(_claim(), _trials(*values)).outcomes
    assert outcome.holds == "undecided"


def test_records_find_numbers_that_were_saved_with_six_digits():
    assert Records([{"eps": 0.333333, "y": 2.0}]).value("y", eps=1 / 3) == 2.0


def test_verdict_interval_is_students():
    # 95 % of t with two degrees of freedom: 4.302653.
    (outcome,) = judge(_claim(), _trials(1.0, 2.0, 4.0)).outcomes
    error = np.std([1, 2, 4], ddof=1) / 3**0.5
    assert outcome.mean == pytest.approx(7 / 3)
    assert outcome.high - outcome.mean == pytest.approx(4.302653 * error, rel=1e-6)
    assert outcome.mean - outcome.low == pytest.approx(4.302653 * error, rel=1e-6)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6))
def test_verdict_is_mirrored_when_sides_are(values):
    above = judge(_claim(), _trials(*values))
    below = judge(_claim(side="below", threshold=-1.0), _trials(*(-v for v in values)))
    assert above.text == below.text


def test_records_value_refuses_to_choose():
    records = Records([{"a": 1, "b": 2}, {"a": 1, "b": 3}])
    assert records.value("b", b=3) == 3
    with pytest.raises(LookupError, match="2 records have b"):
        records.value("b", a=1)
    with pytest.raises(LookupError, match="0 records"):
        records.value("b", a=7)


def test_trial_gives_each_purpose_a_generator_of_its_own():
    one, same, other = Trial(3).rng(0), Trial(3).rng(0), Trial(3).rng(1)
    assert (one.random(), one.random()) == (same.random(), same.random())
    assert Trial(3).rng(0).random() != other.random()


# ---- results ------------------------------------------------------------------------------------


def _study(**changes):
    return Study(
        **{
            "name": "made-up",
            "title": "Made up",
            "question": "Is it?",
            "protocol": "None.",
            "run": lambda trial: iter(()),
            "claims": (_claim(),),
            "chart": lambda records: None,
        }
        | changes
    )


def _results(*seeds):
    found = Results(study="made-up", quick=False, fingerprint="f", about={"cpu": "some"})
    for seed in seeds:
        found.add(seed, [{"value": 2.0 + seed / 100}, {"name": "x", "flag": True}], 1.25)
    return found


def test_results_come_back_as_they_were_saved(tmp_path):
    path = tmp_path / "made-up.json"
    _results(0, 2).save(path, _study())
    found = Results.load(path)
    assert found.records == _results(0, 2).records
    assert found.all_records()[-1] == {"seed": 2, "name": "x", "flag": True}
    assert (found.study, found.quick, found.fingerprint) == ("made-up", False, "f")


def test_results_hold_claims_from_two_seeds_on(tmp_path):
    path = tmp_path / "made-up.json"
    for seeds, verdicts in (((0,), []), ((0, 1), ["reproduced"])):
        _results(*seeds).save(path, _study())
        content = json.loads(path.read_text())
        assert [claim["verdict"] for claim in content["claims"]] == verdicts


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": 7}', '{"schema": 1}', "\0\1"])
def test_results_that_are_damaged_are_named(tmp_path, damage):
    path = tmp_path / "made-up.json"
    path.write_text(damage)
    with pytest.raises(ArgumentError, match=r"made-up\.json.*must be the results of a study"):
        Results.load(path)


def test_results_damaged_anywhere_are_read_or_refused(tmp_path):
    path = tmp_path / "made-up.json"
    _results(0, 1).save(path, _study())
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(ArgumentError):
            Results.load(path)


def test_results_that_cannot_be_written_leave_the_old_ones(tmp_path):
    path = tmp_path / "made-up.json"
    _results(0, 1).save(path, _study())
    before = path.read_bytes()
    wrong = _results(0, 1)
    wrong.records[0][0]["value"] = float("nan")
    with pytest.raises(ValueError, match="Out of range float"):
        wrong.save(path, _study())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", NAMES)
def test_committed_results_are_those_of_the_study_as_it_is(name):
    path = ROOT / "docs" / "studies" / f"{name}.json"
    if not path.exists():
        pytest.skip("only a checkout has them")
    found, results = study.find(name), Results.load(path)
    assert not results.quick
    assert len(results.records) >= 3
    assert results.fingerprint == runner.fingerprint(found)
    stored = json.loads(path.read_text("utf-8"))["claims"]
    decided = results.verdicts(found)
    assert [(c["text"], c["verdict"]) for c in stored] == [(c.text, v.text) for c, v in decided]


# ---- running ------------------------------------------------------------------------------------


def test_run_resumes_what_is_finished_and_adds_the_rest(tmp_path):
    chosen = study.choose(["numerics"])
    first = study.run(chosen, tmp_path, quick=True, seeds=2)["numerics"]
    path = tmp_path / "numerics.json"
    content = json.loads(path.read_text())
    content["trials"] = content["trials"][1:]  # as if interrupted after seed 1
    path.write_text(json.dumps(content))
    told, finished = [], []
    again = study.run(
        chosen, tmp_path, quick=True, seeds=2,
        show=lambda text, done, total: told.append(text),
        finished=lambda one, results: finished.append(one.name),
    )["numerics"]  # fmt: skip
    assert again.records == first.records  # the same seed, the same bits
    assert set(told) <= {"numerics, seed 1 of 2"}
    assert finished == ["numerics"]


def test_run_refuses_results_of_another_experiment(tmp_path):
    chosen = study.choose(["numerics"])
    (tmp_path / "numerics.json").write_text(
        json.dumps(
            {
                "schema": 1,
                "study": "numerics",
                "quick": True,
                "fingerprint": "other",
                "about": {},
                "trials": [],
            }
        )
    )
    with pytest.raises(ArgumentError, match="holds another version of the study"):
        study.run(chosen, tmp_path, quick=True)
    with pytest.raises(ArgumentError, match="holds the quick tour of the study"):
        study.run(chosen, tmp_path)


def test_run_takes_over_what_another_run_has_saved_meanwhile(tmp_path, monkeypatch):
    chosen = study.choose(["numerics"])
    study.run(chosen, tmp_path / "other", quick=True, seeds=4)
    path, beside = (folder / "numerics.json" for folder in (tmp_path, tmp_path / "other"))
    prepare = runner.prepare

    def prepared(*arguments):  # the other run saves after this one has looked
        found = prepare(*arguments)
        path.write_bytes(beside.read_bytes())
        return found

    monkeypatch.setattr(runner, "prepare", prepared)
    study.run(chosen, tmp_path, quick=True, seeds=2)
    assert sorted(Results.load(path).records) == [0, 1, 2, 3]


def test_record_without_a_number_is_named():
    assert runner._plain("a", np.float32(1.23456789)) == 1.23457
    with pytest.raises(ValueError, match="finite numbers, got a = nan"):
        runner._plain("a", float("nan"))


_PARENT = """
import sys
from batchnorm import study
if __name__ == "__main__":
    study.run(study.choose(["population"]), __import__("pathlib").Path(sys.argv[1]), quick=False)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path / "out")])

    def workers():
        found = []
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if b"spawn_main" in status.read_bytes():
                    stat = (status.parent / "environ").read_bytes()
                    if b"PYTEST_CURRENT_TEST=tests/test_study.py::test_workers_end" in stat:
                        found.append(status.parent.name)
            except OSError:
                continue
        return found

    deadline = time.monotonic() + 60
    while not workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers()


def test_interrupted_command_keeps_finished_seeds(tmp_path, monkeypatch, capsys):
    # Ctrl-C when the first seed has been saved.
    save = Results.save

    def interrupt(self, path, of):
        save(self, path, of)
        raise KeyboardInterrupt

    monkeypatch.setattr(Results, "save", interrupt)
    command = ["study", "numerics", "--quick", "--seeds", "3", "--out", str(tmp_path)]
    assert cli.main(command) == cli.INTERRUPTED
    assert "the same command runs the others" in capsys.readouterr().err
    assert len(Results.load(tmp_path / "numerics.json").records) == 1


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["leek"], "study must be one of batch-size, covariate-shift"),
        (["all", "leek"], "got 'leek'"),
        (["--list", "leek"], "got 'leek'"),
        ([], "study needs a name"),
        (["numerics", "--seeds", "1"], "seeds must be from 2"),
        (["numerics", "--seeds", "few"], "valid integer"),
        (["numerics", "--out", "/dev/null/x"], "Name another"),
    ],
)
def test_command_refuses_in_one_line(arguments, said, capsys):
    assert cli.main(["study", *arguments]) == cli.UNUSABLE
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_command_lists_all_studies(capsys):
    assert cli.main(["study", "--list"]) == cli.DONE
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)


def test_command_names_what_is_not_installed(monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "scipy" else find(name, *a)
    )
    assert cli.main(["study", "numerics"]) == cli.UNUSABLE
    assert "the extra [study]" in capsys.readouterr().err


def test_command_writes_results_and_shows_verdicts(tmp_path, capsys):
    command = ["study", "numerics", "--quick", "--seeds", "2", "--out", str(tmp_path)]
    assert cli.main(command) == cli.DONE
    printed = capsys.readouterr().out
    assert "reproduced" in printed
    assert "numerics.json" in printed
    content = json.loads((tmp_path / "numerics.json").read_text())
    assert (content["schema"], content["study"], content["quick"]) == (1, "numerics", True)


def test_import_of_the_package_loads_no_study():
    code = "import sys, batchnorm; sys.exit('batchnorm.study' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- the experiments ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_experiment_declares_what_a_reader_needs(name):
    found = study.find(name)
    assert found.name == name
    assert found.question.endswith("?")
    assert found.claims
    for claim in found.claims:
        assert claim.text.endswith(".")
        assert claim.source
        assert claim.statistic


@pytest.fixture(scope="module")
def quick_records():
    """The records of a seed of each study in its quick tour."""
    torch.set_num_threads(1)
    cache = {}

    def records_of(name):
        if name not in cache:
            torch.manual_seed(0)
            cache[name] = Records(list(study.find(name).run(Trial(0, quick=True))))
        return cache[name]

    return records_of


@pytest.mark.parametrize("name", NAMES)
def test_experiment_decides_its_claims_and_draws_its_chart(name, quick_records):
    found, records = study.find(name), quick_records(name)
    plain = [{k: runner._plain(k, v) for k, v in record.items()} for record in records]
    json.dumps(plain, allow_nan=False)
    for claim in found.claims:
        numbers = claim.numbers(Records(plain))
        assert numbers
        assert all(np.isfinite(v) for v in numbers.values())
        assert len(numbers) == 1 or claim.depends_on
    chart = found.chart([{"seed": 0, **record} for record in plain])
    assert '"seed": 0' in json.dumps(chart.to_dict(validate=False))


def test_mechanism_first_layer_has_no_gradient_shift(quick_records):
    # No layer is below the first, so its gradient does not change: exactly 0 and 1.
    first = [r for r in quick_records("mechanism").where(layer=1) if "gradient" in r]
    assert first
    assert all((r["gradient"], round(r["cosine"], 12)) == (0.0, 1.0) for r in first)


def test_mechanism_gradient_shift_is_that_of_updated_layers_below():
    from batchnorm.study.experiments.mechanism import gradient_shift

    torch.manual_seed(0)
    nn = torch.nn
    before = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    after = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    x, labels = torch.randn(7, 3), torch.randint(0, 2, (7,))

    def gradient(*models):
        model = nn.Sequential(*models)
        loss = nn.functional.cross_entropy(model(x), labels)
        return torch.autograd.grad(loss, before[2].weight)[0]

    old = gradient(*before)
    new = gradient(after[0], *list(before)[1:])
    change, cosine = gradient_shift(before, after, x, labels)[1]
    assert change == pytest.approx(float((old - new).norm() / old.norm()), rel=1e-5)
    assert cosine == pytest.approx(
        float((old * new).sum() / old.norm() / new.norm()), rel=1e-5, abs=1e-6
    )


def test_distances_of_a_shift_are_its_size():
    x = np.random.default_rng(0).normal(size=(500, 3))
    raw, relative = distances(x, np.random.default_rng(1).permutation(x) + 0.5)
    assert raw == pytest.approx(0.5)
    assert relative == pytest.approx((0.5 / x.std(0, ddof=1)).mean())


def test_distances_leave_constant_units_out():
    x = np.zeros((10, 2))
    x[:, 0] = np.arange(10.0)
    assert distances(x, x)[0] == 0.0
    moved = x.copy()
    moved[:, 0] += 1
    assert distances(x, moved)[0] == pytest.approx(1.0)
    assert distances(np.zeros((4, 2)), np.zeros((4, 2))) == (0.0, 0.0)


def test_renormalization_evaluates_as_it_trains_once_open():
    # With r and d unbounded, x̂ of training is that of the running statistics (Ioffe, 2017).
    from batchnorm.study.experiments import batch_size

    torch.manual_seed(0)
    layer = batch_size.Renorm2d(3, size=8, opens_after=1)
    layer.steps = 10
    layer.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
    layer.running_var.copy_(torch.tensor([1.2, 0.8, 1.0]))
    x = torch.randn(8, 3, 5, 5)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    y = layer(x)
    expected = (x - mean[:, None, None]) / (var[:, None, None] + layer.eps).sqrt()
    assert torch.allclose(y, expected, atol=1e-5)
    y.sum().backward()
    assert layer.weight.grad is not None


def test_corruptions_keep_pixels_between_black_and_white():
    from batchnorm.study.experiments import shift

    pixels = torch.rand(5, 784)
    for name, corrupted in shift.ALL.items():
        found = corrupted(pixels, torch.Generator().manual_seed(0))
        assert found.shape == pixels.shape, name
        assert found.min() >= 0, name
        assert found.max() <= 1 + 1e-6, name
