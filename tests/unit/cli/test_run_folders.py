"""Run folders that cannot be used: another configuration, a file in the way, no permission, a full disk; nothing half-written."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Asker, files_of

LORA = "+experiment=llama_lora"
WRITTEN = {"run.json", "plan.json", "environment.json", "location.json", "scripts/sft.sh"}
is_root = os.geteuid() == 0


def written_in(folder: Path) -> set[str]:
    return {name for name, content in files_of(folder).items() if content is not None}


def test_render_writes_the_whole_run_folder_and_the_same_bytes_again(ask: Asker) -> None:
    first = ask("render", LORA)
    run = ask.folder / "runs" / "llama_lora"
    assert first.code == 0 and written_in(run) == WRITTEN
    assert f"# {run}/scripts/sft.sh" in first.out and (run / "scripts" / "sft.sh").read_text() in first.out
    before = files_of(run)
    assert ask("render", LORA).out == first.out
    assert files_of(run) == before


def test_render_writes_the_deepspeed_dict(ask: Asker) -> None:
    assert ask("render", LORA, "sharding=zero2", "output_dir=elsewhere", "name=sharded").code == 0
    assert written_in(ask.folder / "elsewhere" / "sharded") == {*WRITTEN, "sft/deepspeed.json"}


def test_plan_and_help_write_nothing(ask: Asker) -> None:
    for words in (("plan", LORA, "format=json"), ("--help",)):
        assert ask(*words).code == 0
    assert files_of(ask.folder) == {}


@pytest.mark.parametrize("verb", ["run", "render"])
def test_another_configuration_is_refused_with_the_keys_that_differ(ask: Asker, verb: str) -> None:
    assert ask("render", LORA).code == 0
    words = ("stages.sft.optimizer.lr=0.5", "tuning.rank=4", "seed=7", "tracking=none", "stages.sft.batch.micro_size=2")
    told = ask.refused(verb, LORA, *words)
    run = ask.folder / "runs" / "llama_lora"
    assert told[0].startswith(
        f"{run} holds a run with another configuration; set name= to start a new one, or repeat the old values"
    )
    assert told[1:] == (
        "seed: 0 in the folder, 7 now",
        "seeds.data: 0 in the folder, 7 now",
        "seeds.split: 0 in the folder, 7 now",
        "seeds.weights: 0 in the folder, 7 now",
        "stages.sft.optimizer.lr: 0.002 in the folder, 0.5 now",
        "tuning.rank: 16 in the folder, 4 now",
    )


def test_what_does_not_change_the_result_may_change(ask: Asker) -> None:
    assert ask("render", LORA).code == 0
    assert ask("render", LORA, "tracking=none", "launcher=local", "stages.sft.log_every_steps=5").code == 0


@pytest.mark.parametrize(
    ("content", "sentence"), [("{", "is damaged: Expecting"), ("[]", "is damaged: it holds no config")]
)
def test_a_damaged_run_folder_is_told(ask: Asker, content: str, sentence: str) -> None:
    run = ask.folder / "runs" / "llama_lora"
    run.mkdir(parents=True)
    (run / "run.json").write_text(content)
    for words in (("status", str(run)), ("resume", str(run)), ("render", LORA)):
        (told,) = ask.refused(*words)
        assert told.startswith(f"{run}/run.json {sentence}")


def test_a_file_where_the_folder_should_be(ask: Asker) -> None:
    (ask.folder / "runs").write_text("")
    assert ask.refused("render", LORA) == (f"{ask.folder}/runs is a file; output_dir must be a folder",)
    (ask.folder / "mine").mkdir()
    (ask.folder / "mine" / "llama_lora").write_text("")
    told = ask.refused("run", LORA, "output_dir=mine")
    assert told == (f"{ask.folder}/mine/llama_lora is a file; output_dir must be a folder",)


def test_several_nodes_and_slurm_are_not_started_here(ask: Asker) -> None:
    (told,) = ask.refused("run", "+experiment=mixtral_8x7b_lora_zero3")
    assert told.startswith("cluster.nodes=2: this machine is one node; type render, and start ")


# ---- no permission -------------------------------------------------------------------------------


@pytest.fixture
def foreign_folder(ask: Asker) -> Iterator[Path]:
    """A folder of somebody else, while this process acts as a user without rights."""
    ask("render", LORA, "output_dir=warm_up")  # everything is imported before the rights are gone
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755 if is_root else 0o555)
        os.chdir("/")  # pytest's own folders are closed to others
        if is_root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o755)


@pytest.mark.parametrize("place", ["runs", "deep/er/runs"])
def test_no_permission_to_write(ask: Asker, foreign_folder: Path, place: str) -> None:
    for verb in ("run", "render"):
        answer = ask(verb, LORA, f"output_dir={foreign_folder}/{place}")
        sentence = f"{foreign_folder}/{place}/llama_lora: no permission to write there; set output_dir to a folder you can write to"
        assert (answer.code, answer.errors[-1]) == (2, sentence)
    assert files_of(foreign_folder) == {}


@pytest.mark.skipif(not is_root, reason="a folder that this user may not even enter needs another user")
def test_no_permission_to_enter(ask: Asker, foreign_folder: Path) -> None:
    os.seteuid(0)
    foreign_folder.chmod(0o700)
    os.seteuid(65534)
    words = (f"output_dir={foreign_folder}", f"stages.sft.data.train.path={foreign_folder}/rows.jsonl")
    for word in words:
        answer = ask("run", LORA, word)
        assert answer.code == 2 and str(foreign_folder) in answer.errors[-1] and "no permission" in answer.errors[-1], (
            answer
        )


# ---- a full or a read-only disk ------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of its own with the mount options of the parameter."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not let us mount a disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path, *, leave: int) -> None:
    """Leaves so many bytes free on the disk of `folder`."""
    facts = os.statvfs(folder)
    (folder / "ballast").write_bytes(bytes(facts.f_bavail * facts.f_bsize - leave))


@pytest.mark.parametrize("tiny_disk", ["size=256k"], indirect=True)
@pytest.mark.parametrize(("pages", "verb"), [(0, "run"), (1, "render"), (2, "run"), (3, "render"), (5, "run")])
def test_a_full_disk(ask: Asker, tiny_disk: Path, pages: int, verb: str) -> None:
    fill(tiny_disk, leave=4096 * pages)
    told = ask.refused(verb, LORA, f"output_dir={tiny_disk}/runs", "launcher=local")
    assert "the disk is full (0 MiB free); free some space or set output_dir to another disk" in told[-1], told
    assert files_of(tiny_disk).keys() == {"ballast"}


@pytest.mark.parametrize("tiny_disk", ["size=256k"], indirect=True)
def test_a_disk_that_fills_up_later_leaves_an_older_run_as_it_was(ask: Asker, tiny_disk: Path) -> None:
    assert ask("render", LORA, f"output_dir={tiny_disk}/runs").code == 0
    fill(tiny_disk, leave=0)
    (told,) = ask.refused("render", LORA, f"output_dir={tiny_disk}/runs", "launcher=local")
    assert "the disk is full" in told


@pytest.mark.parametrize("tiny_disk", ["size=64k,ro"], indirect=True)
def test_a_read_only_disk(ask: Asker, tiny_disk: Path) -> None:
    (told,) = ask.refused("render", LORA, f"output_dir={tiny_disk}/runs")
    assert (
        told
        == f"{tiny_disk}/runs/llama_lora: no permission to write there; set output_dir to a folder you can write to"
    )
