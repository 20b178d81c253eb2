"""`batchnorm study`: the literature's claims about batch norm as experiments with verdicts.

declare         what a study is: an experiment, its records, its claims
experiments/    the studies, a file each
training        networks, digits and the loop that several of them share
charts          the charts that several of them share
verdicts        from the numbers of several seeds to a verdict
results         the results as a JSON file
runner          seeds side by side in processes; resumes what is there
tables          the results as text
"""

from __future__ import annotations

from batchnorm.study.declare import Claim, Records, Study, Trial
from batchnorm.study.results import Results
from batchnorm.study.runner import choose, find, names, place, run
from batchnorm.study.verdicts import Outcome, Verdict, judge

__all__ = [
    "Claim",
    "Outcome",
    "Records",
    "Results",
    "Study",
    "Trial",
    "Verdict",
    "choose",
    "find",
    "judge",
    "names",
    "place",
    "run",
]
