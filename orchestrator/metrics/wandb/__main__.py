"""The supervisor: `python -m orchestrator.metrics.wandb SETTINGS WORKER_PROCESS`."""

from __future__ import annotations

import sys

from orchestrator.metrics.wandb.supervisor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
