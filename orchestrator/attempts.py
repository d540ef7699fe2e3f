"""The name under which scripts of version 0.1 decide on a new attempt; chains that are queued still call it. Until 0.2."""

from __future__ import annotations

import sys

from orchestrator.run_state.attempts import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
