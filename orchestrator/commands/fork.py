"""The verb fork. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from orchestrator.commands.resume import resume
from orchestrator.errors import EXIT_DONE
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.freeze import refuse_inside_a_run


def fork(
    parent: RunFolder,
    overrides: Sequence[str],
    *,
    stage: str | None,
    source: Literal["checkpoint", "artifact"] | None,
    step: int | None,
    until: Literal["describe", "write", "train"],
) -> int:
    """Make a new run from the checkpoint or artifact of `parent`, which is only read: describe, write, or also train
    it.
    """
    from orchestrator.housekeeping.fork import describe, plan_fork
    from orchestrator.housekeeping.fork_files import write_fork

    planned = plan_fork(parent, overrides, stage=stage, source=source, step=step)
    refuse_inside_a_run(planned.folder.root)
    print("\n".join(describe(planned)), flush=True)
    if until == "describe":
        print("nothing was written")
        return EXIT_DONE
    write_fork(planned)
    if until == "write":
        print(f"start it with: orchestrator resume {planned.folder.root}")
        return EXIT_DONE
    return resume(planned.folder)
