"""What the tests cost: the order in which files are given to workers, minutes per file at the end, and the budget.

The budget warns and never fails: a loaded machine is no fault of a test.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

RECORD = Path(__file__).with_name("minutes.json")
"""Minutes per file, as last written with --write-minutes on two cores."""
SUITE_MINUTES = 32
"""Of the 45 that `.ci/run` has on two cores with AVX2: installation takes 3, the demonstration 4, `make check` 2, and 4 are spare."""
TEST_SECONDS = 60
"""A test with its set-up; see CONTRIBUTING.md for what to do about one that takes longer."""
WHOLE_SUITE = 1500
"""Tests in a session that is judged as a whole."""
FILES_SHOWN = 15
UNKNOWN_MINUTES = 1.0
"""Of a file without a record: early rather than last, when nothing is left to fill the other workers."""


def longest_first(items: list[pytest.Item]) -> None:
    """Files by their recorded minutes, so that no worker is left alone with a long one at the end. The order in a file stays."""
    minutes: dict[str, float] = json.loads(RECORD.read_text(encoding="utf-8"))
    items.sort(key=lambda item: -minutes.get(_file(item.nodeid), UNKNOWN_MINUTES))


def summarise(reporter: pytest.TerminalReporter, *, write: bool) -> None:
    """Prints minutes per file and what is above the budget; writes the record where asked to."""
    tests = _seconds_of_tests(report for reports in reporter.stats.values() for report in reports)
    files: Counter[str] = Counter()
    for test, seconds in tests.items():
        files[_file(test)] += seconds
    if write:
        kept = {file: round(seconds / 60, 2) for file, seconds in sorted(files.items())}
        RECORD.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    if len(files) > 1:
        reporter.section("minutes per file")
        for file, seconds in files.most_common(FILES_SHOWN):
            reporter.line(f"{seconds / 60:6.1f} {file}")
        reporter.line(f"{files.total() / 60:6.1f} in all")
    _warn(reporter, tests)


def _warn(reporter: pytest.TerminalReporter, tests: Counter[str]) -> None:
    for test, seconds in tests.most_common():
        if seconds > TEST_SECONDS:
            reporter.line(f"above the budget of {TEST_SECONDS} s a test: {seconds:.0f} s {test}", yellow=True)
    wall = reporter._session_start.elapsed().seconds / 60
    if len(tests) > WHOLE_SUITE and wall > SUITE_MINUTES:
        sentence = (
            f"the suite took {wall:.0f} min of the {SUITE_MINUTES} in its budget (CONTRIBUTING.md, A time budget)"
        )
        reporter.line(sentence, yellow=True)


def _seconds_of_tests(reports: Iterable[object]) -> Counter[str]:
    """With set-up and end. Of a shared fixture the first test that uses it pays."""
    seconds: Counter[str] = Counter()
    for report in reports:
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid] += report.duration
    return seconds


def _file(test: str) -> str:
    return test.partition("::")[0]


def is_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ
