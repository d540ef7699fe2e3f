"""The name under which preparation jobs of version 0.1 look at data; jobs that are queued still call it. Until 0.2."""

from __future__ import annotations

import sys

from orchestrator.preflight.main import main

if __name__ == "__main__":
    sys.exit(main())
