"""bitsandbytes and DeepSpeed stay out of a process where nothing of its run uses them, and only there; the collector rests."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.composition.compose import compose
from orchestrator.distributed.import_blocking import garbage_collection_paused, needs_bitsandbytes


@pytest.mark.parametrize(
    ("words", "config_json", "needed"),
    [
        ((), "{}", False),
        (("quantization=nf4",), "{}", True),
        (("optimizer@stages.sft.optimizer=adamw_8bit",), "{}", True),
        (("optimizer@stages.sft.optimizer=adamw_paged",), "{}", True),
        ((), '{"quantization_config": {"load_in_4bit": true}}', True),
    ],
)
def test_who_needs_it(tmp_path: Path, words: tuple[str, ...], config_json: str, needed: bool) -> None:
    (tmp_path / "config.json").write_text(config_json)
    assert needs_bitsandbytes(compose(["+experiment=llama_lora", *words]), tmp_path) == needed


@pytest.mark.parametrize(
    ("words", "found"),
    [("", "False False"), ("quantization=nf4", "True False"), ("sharding=zero2", "False True")],
)
def test_it_looks_as_if_it_were_not_installed(tmp_path: Path, words: str, found: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import sys; from importlib.util import find_spec; from pathlib import Path\n"
        "from orchestrator.composition.compose import compose\n"
        "from orchestrator.distributed.import_blocking import leave_out_deepspeed, leave_out_unused\n"
        "config = compose(['+experiment=llama_lora', *sys.argv[2:]])\n"
        "leave_out_unused(config, Path(sys.argv[1])); leave_out_deepspeed(config)\n"
        "print(find_spec('bitsandbytes') is not None, find_spec('deepspeed') is not None)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    argv = [sys.executable, "-c", code, str(tmp_path), *words.split()]
    done = subprocess.run(argv, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == found


def test_the_collector_rests_while_modules_are_imported_and_goes_on_after_a_fault() -> None:
    with pytest.raises(ZeroDivisionError), garbage_collection_paused():
        assert not gc.isenabled()
        print(1 / 0)
    assert gc.isenabled()


def test_what_a_verb_does_not_need_is_not_imported(tmp_path: Path) -> None:
    """Nobody waits for Hydra and pydantic to read how a verb is called, nor for the screen and Slurm to see a plan."""
    program = "import sys; from orchestrator.cli.main import main; main(sys.argv[1:]); print(*sorted(sys.modules))"

    def imported(*words: str) -> set[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        argv = [sys.executable, "-c", program, *words]
        done = subprocess.run(argv, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        return set(done.stdout.splitlines()[-1].split())

    assert {"hydra", "omegaconf", "pydantic", "rich"} & imported("--help") == set()
    planned = imported("plan", "+experiment=llama_lora", "sharding=zero2", "launcher=local")
    assert {"hydra", "pydantic", "rich"} <= planned
    unneeded = {
        "torch",
        "orchestrator.execution.run_pipeline",
        "orchestrator.planning.auto_settings",
        "orchestrator.execution.slurm_submission",
        "launchers.sbatch",
    }
    assert unneeded & planned == set()
