"""Files of a run: written whole or not at all, proven by their manifest, frozen with one configuration."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.config.base import flatten
from orchestrator.errors import CheckpointError, ConfigError, RunFolderError
from orchestrator.files.atomic import publish, read_json, write_json, write_text
from orchestrator.files.manifest import MANIFEST, file_digest, read_manifest, write_manifest
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.freeze import all_or_nothing, check_writable, freeze
from orchestrator.run_state.frozen import read_config


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- writing -------------------------------------------------------------------------------------


def test_a_written_file_is_there_with_its_folder_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.sh"
    write_text(path, "Größe\n", mode=0o755)
    assert path.read_text(encoding="utf-8") == "Größe\n" and path.stat().st_mode & 0o777 == 0o755
    assert names(path.parent) == ["file.sh"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail) if call == "fsync" else patch.setattr(Path, call, fail)
        with pytest.raises(RunFolderError) as error:
            write_json(path, {"a": 2})
    (told,) = error.value.problems
    expected = {errno.EROFS: "no permission to write there", errno.EIO: os.strerror(errno.EIO)}.get(
        code, "the disk is full ("
    )
    assert told.startswith(f"{path}: {expected}")
    assert read_json(path) == {"a": 1} and names(tmp_path) == ["run.json"]


def test_a_missing_or_torn_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"run\.json is missing"):
        read_json(tmp_path / "run.json")
    (tmp_path / "run.json").write_text('{"a"')
    with pytest.raises(RunFolderError, match=r"run\.json is damaged: Expecting ':' delimiter"):
        read_json(tmp_path / "run.json")


# ---- manifests -----------------------------------------------------------------------------------


@pytest.fixture
def proven(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(256)) * 16)
    (folder / "inner" / "config").write_text("{}")
    write_manifest(folder, {"step": 7})
    return folder


def test_a_manifest_lists_every_file_with_size_and_sha256(proven: Path) -> None:
    manifest = read_manifest(proven)
    assert manifest["step"] == 7 and sorted(manifest["files"]) == ["inner/config", "weights"]
    assert manifest["files"]["weights"] == {"bytes": 4096, "sha256": file_digest(proven / "weights")}
    assert (
        manifest["files"]["inner/config"]["sha256"]
        == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    )


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "weights").read_bytes())
    content[2000] ^= 1
    (folder / "weights").write_bytes(content)


def edit(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / MANIFEST).write_text(text) and None


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip_a_bit, "/weights: its sha256 differs from the one that was written"),
    "a byte less": (lambda f: os.truncate(f / "weights", 4095), "/weights: 4095 bytes, 4096 were written"),
    "a byte more": (lambda f: (f / "weights").open("ab").write(b"x"), "/weights: 4097 bytes, 4096 were written"),
    "an empty file": (lambda f: os.truncate(f / "weights", 0), "/weights: 0 bytes, 4096 were written"),
    "a missing file": (lambda f: (f / "inner" / "config").unlink(), "/inner/config: missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), f": no {MANIFEST}; it was never finished"),
    "half a manifest": (edit('{"files": {'), f"/{MANIFEST} is damaged"),
    "a manifest of another kind": (edit("[]"), f"/{MANIFEST} is damaged"),
    "a manifest without files": (edit('{"files": {}}'), f"/{MANIFEST} lists no file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_not_proven(proven: Path, damage: str) -> None:
    act, sentence = DAMAGES[damage]
    act(proven)
    with pytest.raises(CheckpointError) as error:
        read_manifest(proven)
    assert error.value.problems == (f"{proven}{sentence}",) and error.value.exit_code == 93


def test_all_damages_are_told_at_once(proven: Path) -> None:
    flip_a_bit(proven)
    (proven / "inner" / "config").unlink()
    with pytest.raises(CheckpointError) as error:
        read_manifest(proven)
    assert len(error.value.problems) == 2


def test_publishing_puts_a_folder_in_the_place_of_an_older_one(tmp_path: Path) -> None:
    final, temporary = tmp_path / "artifact", tmp_path / ".artifact.partial"
    for content in ("old", "new"):
        temporary.mkdir()
        (temporary / "file").write_text(content)
        publish(temporary, final)
        assert (final / "file").read_text() == content and names(tmp_path) == ["artifact", "artifact/file"]


# ---- freezing ------------------------------------------------------------------------------------


def record(**changes: object) -> dict[str, object]:
    config = {"seed": 0, "model": {"base": "a", "dtype": "float32"}, "environment": {}, "pipeline": ["sft"]}
    return {"orchestrator": "0.1.0", "config": config | changes}


def test_a_new_run_is_frozen_and_the_same_one_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for _ in range(2):
        freeze(folder, record(), may_differ=frozenset())
        assert read_config(folder) == record()["config"]
    assert names(folder.root) == ["run.json"]


def test_another_configuration_is_refused_with_every_key(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    freeze(folder, record(), may_differ=frozenset())
    before = folder.run.read_bytes()
    changed = record(seed=1, model={"base": "b", "dtype": "float32"}, environment={"A": "x"}, pipeline=["sft", "dpo"])
    with pytest.raises(RunFolderError) as error:
        freeze(folder, changed, may_differ=frozenset())
    assert error.value.problems[1:] == (
        'environment.A: null in the folder, "x" now',
        'model.base: "a" in the folder, "b" now',
        'pipeline: ["sft"] in the folder, ["sft", "dpo"] now',
        "seed: 0 in the folder, 1 now",
    )
    assert folder.run.read_bytes() == before


def test_keys_that_may_differ_are_written_anew(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    freeze(folder, record(), may_differ=frozenset())
    changed = record(model={"base": "b", "dtype": "bfloat16"})
    freeze(folder, changed, may_differ=frozenset({"model"}))
    assert read_config(folder) == changed["config"]
    with pytest.raises(RunFolderError, match=r"model\.dtype"):
        freeze(folder, record(model={"base": "c", "dtype": "float32"}), may_differ=frozenset({"model.base"}))


def test_a_block_that_fails_leaves_no_new_folder_and_keeps_an_old_one(tmp_path: Path) -> None:
    def write_half(folder: Path) -> None:
        with pytest.raises(ConfigError), all_or_nothing(folder):
            write_text(folder / "half", "x")
            raise ConfigError("no")

    write_half(tmp_path / "deep" / "er" / "new")
    assert names(tmp_path) == []
    (tmp_path / "old").mkdir()
    write_half(tmp_path / "old")
    assert names(tmp_path) == ["old", "old/half"]
    with all_or_nothing(tmp_path / "good"):
        write_text(tmp_path / "good" / "whole", "x")
    assert names(tmp_path) == ["good", "good/whole", "old", "old/half"]


def test_looking_whether_a_folder_is_writable_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "not" / "there" / "yet")
    assert names(tmp_path) == []


def test_leaves_are_named_by_dots() -> None:
    tree = {"a": 1, "b": {"c": None, "d": {}, "e": [1, {"x": 2}]}, "f": {}}
    assert flatten(tree) == {"a": 1, "b.c": None, "b.d": {}, "b.e": [1, {"x": 2}], "f": {}}
    assert json.dumps(flatten(tree))
