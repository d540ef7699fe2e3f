"""Entry point by which version 0.1 preparation jobs inspect data; queued jobs still call it. Remove in 0.2."""

from __future__ import annotations

import sys

from orchestrator.preflight.main import main

if __name__ == "__main__":
    sys.exit(main())
