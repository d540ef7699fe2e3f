"""What every test may use: golden files with a one-command refresh."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import forking
import minutes
import pytest

from orchestrator.machine.openmp import limit_spinning

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--refresh-golden", action="store_true", help="write the golden files anew; then read the diff")
    parser.addoption(
        "--no-forks", action="store_true", help="every program in an interpreter of its own, as users run it"
    )
    parser.addoption("--write-minutes", action="store_true", help="record what each file of tests takes")


def pytest_configure(config: pytest.Config) -> None:
    """Started in the background, a shell's child ignores SIGINT, and so would every program that the tests interrupt."""
    os.environ.setdefault(
        "ORCHESTRATOR_PROBE", "off"
    )  # a plan times the processor, for seconds, where a test asks for it
    limit_spinning(os.environ)  # as the programs do: one value, so that they share the processes they are forked from
    if forking.ADDRESS not in os.environ and not config.getoption("--no-forks"):  # workers of xdist share one server
        config.add_cleanup(forking.start())
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if minutes.is_worker():
        minutes.longest_first(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    minutes.summarise(terminalreporter, write=config.getoption("--write-minutes"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Comparison of a text with tests/golden/NAME, by name and text."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--refresh-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        expected = path.read_text(encoding="utf-8") if path.exists() else ""
        assert text == expected, (
            f"{path} differs: if the change is meant, run pytest --refresh-golden and read the diff"
        )

    return compare
