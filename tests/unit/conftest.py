"""What the unit tests may use."""

from pathlib import Path

import pytest
from command_line import Asker


@pytest.fixture
def ask(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Asker:
    """Commands in this process, in an empty working folder, with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path_factory.mktemp("cache")))
    return Asker(tmp_path, capsys)
