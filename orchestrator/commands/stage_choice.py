"""The stage that a verb works on."""

from __future__ import annotations

from orchestrator.errors import ConfigError
from orchestrator.run_folder.folder import RunFolder


def stage_of(folder: RunFolder, chosen: str | None, what: str, more: tuple[str, ...]) -> str:
    """The requested stage, or the last one that yields a policy; `more` kinds are also allowed, `what` describes
    them.
    """
    from orchestrator.config.run import POLICY_KINDS, made_kind
    from orchestrator.run_state.frozen import load_config, warn_newer

    config = load_config(folder)
    warn_newer(folder)  # afterwards, so that an unreadable run gives one error and no warning
    kinds = (*POLICY_KINDS, *more)
    policies = [name for name in config.pipeline if made_kind(config, name) in kinds]
    stage = chosen or (policies[-1] if policies else "")
    if stage not in policies:
        given = f"--stage {stage}" if stage else str(folder.root)
        raise ConfigError(f"{given}: the stages that {what} are {', '.join(policies) or 'none'}")
    return stage
