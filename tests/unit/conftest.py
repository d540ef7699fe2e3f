"""What the unit tests may use."""

from pathlib import Path

import pytest
from asking import Asker


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Asker:
    """Commands in this process, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return Asker(tmp_path, capsys)
