"""What the digest of prepared rows covers."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.architecture.tokenizer_files import TOKENIZER_FILES, VOCABULARY_FILES
from orchestrator.data.prepared.key import tokenizer_digest
from orchestrator.files.hash_cache import FileHashes


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_another_file_of_the_tokenizer_is_another_digest(tmp_path: Path, name: str) -> None:
    """With an spiece.model that was left out, rows of one tokenizer were taken for those of another."""
    hashes = FileHashes(tmp_path / "hashes")
    folder = tmp_path / "model"
    folder.mkdir()
    found: list[str] = []
    for content in (None, "one", "other one"):
        if content is not None:
            (folder / name).write_text(content)
        found.append(tokenizer_digest(folder, hashes))
    assert len(set(found)) == 3


def test_whatever_makes_a_tokenizer_is_in_its_digest() -> None:
    assert set(VOCABULARY_FILES) <= set(TOKENIZER_FILES)
