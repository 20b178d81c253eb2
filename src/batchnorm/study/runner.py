"""Run studies: their seeds side by side in processes of one thread each."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import os
import pkgutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm import workers
from batchnorm.bench.environment import describe
from batchnorm.bench.rows import prepare_directory
from batchnorm.diagnose.shift import distances
from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm.extras import require
from batchnorm.progress import Show
from batchnorm.study import experiments
from batchnorm.study.declare import Record, Study, Trial
from batchnorm.study.results import Results

__all__ = ["ALL", "choose", "find", "names", "prepare", "run"]

#: The name of all studies together.
ALL = "all"
SEEDS, MOST_SEEDS = 5, 1000
#: Of the packages, by the name they are imported by, that the extra [study] installs.
REQUIRED = ("torch", "scipy", "mlxtend", "altair")


def names() -> list[str]:
    """Names of all studies; each is a module of `batchnorm.study.experiments`."""
    found = (module.name for module in pkgutil.iter_modules(experiments.__path__))
    return [name.replace("_", "-") for name in found if not name.startswith("_")]


def find(name: str) -> Study:
    """Return the study of that name.

    Raises
    ------
    ArgumentError
        There is none.
    BatchNormError
        It needs a package that is not installed.
    """
    if name not in names():
        raise ArgumentError(
            f"study must be one of {', '.join(names())}, or {ALL} for all of them, got {name!r}."
        )
    require("A study", "study", *REQUIRED)
    module = f"{experiments.__name__}.{name.replace('-', '_')}"
    try:
        study: Study = importlib.import_module(module).STUDY
    except (SyntaxError, AttributeError, NameError) as error:
        raise BatchNormError(
            f"{module}: must be a file that defines STUDY, but {type(error).__name__}: {error}."
        ) from error
    if study.name != name:
        raise BatchNormError(
            f"{module}: its study must have the file's name, '{name}', got '{study.name}'."
        )
    return study


def choose(wanted: Sequence[str]) -> list[Study]:
    """Return the studies of these names, each once; all of them for "all"."""
    chosen = {name: find(name) for name in wanted if name != ALL}  # refuses slips beside "all"
    return [find(name) for name in names()] if ALL in wanted else list(chosen.values())


def fingerprint(study: Study) -> str:
    """Hash the source of an experiment and of what experiments share."""
    names = (study.run.__module__, f"{__package__}.training", distances.__module__)
    source = "".join(inspect.getsource(importlib.import_module(name)) for name in names)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def prepare(study: Study, folder: Path, quick: bool) -> Results:
    """Return the results that `folder` holds of a study, or none yet.

    Raises
    ------
    ArgumentError
        What it holds is damaged, or of another experiment.
    """
    path = place(study, folder)
    fresh = Results(
        study=study.name, quick=quick, fingerprint=fingerprint(study), about=describe(threads=1)
    )
    if not os.path.lexists(path):  # pathlib raises if a name is too long
        return fresh
    found = Results.load(path)
    if (found.study, found.quick, found.fingerprint) != (study.name, quick, fresh.fingerprint):
        if found.quick == quick:
            kind = "another version of the study"
        else:
            kind = "the quick tour of the study" if found.quick else "the whole study"
        raise ArgumentError(
            f"{path}: must be of the same experiment to be continued, but holds {kind}. Move it "
            "away, or name another folder by --out."
        )
    return found


def place(study: Study, folder: Path) -> Path:
    """The file of a study's results."""
    return folder / f"{study.name}.json"


def run(
    studies: Sequence[Study],
    folder: Path,
    *,
    quick: bool = False,
    seeds: int | None = None,
    show: Show | None = None,
    finished: Callable[[Study, Results], None] | None = None,
) -> dict[str, Results]:
    """Run the seeds that are not finished yet, and save each when it is.

    Parameters
    ----------
    studies
        As `choose` returns them.
    folder
        Of the results, ``NAME.json`` each. What it holds of the same experiment is not repeated.
    quick
        Run quick tours.
    seeds
        Seeds of each study, two at least; None for five.
    show
        Called with a description, what is done, and how much there is in all.
    finished
        Called with each study whose seeds are all finished.

    Returns
    -------
    dict
        The results of each study by its name.

    Raises
    ------
    ArgumentError
        `seeds` is too small, or `folder` cannot hold the results.
    BatchNormError
        A process was killed; or a study failed or measured no number, after all other seeds.
    """
    seeds = SEEDS if seeds is None else seeds
    if not 2 <= seeds <= MOST_SEEDS:
        raise ArgumentError(
            f"seeds must be from 2, or nothing is known of their spread, to {MOST_SEEDS:,}, got "
            f"{seeds}."
        )
    results = {study.name: prepare(study, folder, quick) for study in studies}
    prepare_directory(folder)
    left = {study.name: set(range(seeds)) - set(results[study.name].records) for study in studies}
    by_name = {study.name: study for study in studies}
    tasks = [(study.name, seed) for study in studies for seed in sorted(left[study.name])]

    def done_with(name: str) -> None:
        if not left[name] and finished is not None:
            finished(by_name[name], results[name])

    for study in studies:
        done_with(study.name)  # all of it earlier
    if not tasks:
        return results
    shares = dict.fromkeys(tasks, 0.0)

    def told(task: tuple[str, int], share: float) -> None:
        shares[task] = share
        if show is not None:
            text = f"{task[0]}, seed {task[1] + 1} of {seeds}"
            show(text, round(1000 * sum(shares.values())), 1000 * len(tasks))

    failures: list[str] = []
    try:
        with workers.pool() as in_processes:
            for task, found in in_processes(partial(_run_trial, quick), tasks, told=told):
                name, seed = task
                if isinstance(found, str):
                    failures.append(f"{name}, seed {seed}: {found}")
                    continue
                path = place(by_name[name], folder)
                _merge(results[name], path)
                results[name].add(seed, *found)
                results[name].save(path, by_name[name])
                left[name].discard(seed)
                done_with(name)
    except workers.WorkerDied as error:
        raise BatchNormError(
            f"{str(error).rstrip('.')}. Finished seeds are in {folder}; the same command runs the "
            "others."
        ) from None
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise BatchNormError(f"{failures[0]}{more}. Finished seeds are in {folder}.")
    return results


def _merge(results: Results, path: Path) -> None:
    """Take over the seeds that another run has saved meanwhile."""
    try:
        found = Results.load(path)
    except ArgumentError:
        return
    if (found.quick, found.fingerprint) == (results.quick, results.fingerprint):
        for seed in found.records.keys() - results.records.keys():
            results.add(seed, found.records[seed], found.seconds[seed])


# --- in the processes -----------------------------------------------------------------------------


def _run_trial(quick: bool, task: tuple[str, int]) -> tuple[list[Record], float] | str:
    """Return a seed's records and the seconds it took; or the experiment's error as text."""
    import torch

    name, seed = task
    torch.manual_seed(seed)
    begin = time.process_time()
    last = [0.0]

    def report(share: float) -> None:
        if time.perf_counter() - last[0] > 0.2 or share == 1:
            last[0] = time.perf_counter()
            workers.report(share)

    try:
        records = [
            {key: _plain(key, value) for key, value in record.items()}
            for record in find(name).run(Trial(seed, quick=quick, report=report))
        ]
    except Exception as error:  # whatever the experiment does
        return f"{type(error).__name__}: {error}"
    return records, time.process_time() - begin


def _plain(key: str, value: Any) -> Any:
    """A Python number to six digits, as JSON holds it."""
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    number = float(f"{float(value):.6g}")
    if not math.isfinite(number):
        raise ValueError(f"a record must hold finite numbers, got {key} = {number}")
    return number
