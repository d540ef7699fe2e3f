"""Data sets of the Hugging Face hub as local files; the only module that downloads them."""

from __future__ import annotations

from pathlib import Path

from orchestrator.config.data import SourceConfig
from orchestrator.data.sources.locate import hub_files
from orchestrator.data.sources.readers import SUFFIXES
from orchestrator.errors import DataError


def fetch(source: SourceConfig, field: str) -> tuple[Path, ...]:
    """The files of a hub data set, downloaded into the hub's own cache. Raises DataError if the hub refuses."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [f"*{suffix}{end}" for suffix in SUFFIXES for end in ("", ".gz")]
    try:
        folder = snapshot_download(source.path, repo_type="dataset", revision=source.revision, allow_patterns=patterns)
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{field}.path={source.path} is neither a local path nor a data set on the hub that you can access"
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(f"{field}.revision={source.revision} is not a revision of {source.path}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise DataError(
            f"{field}.path={source.path} is not on this machine and the hub cannot be reached ({type(error).__name__}): "
            "download it where there is a network, or give a local path"
        ) from error
    return hub_files(Path(folder), source, field=field)
