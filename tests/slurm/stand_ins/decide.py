"""Stand-in for the verb that closes an attempt: STAGE_DIRECTORY --attempt K --exit-code N [--cause TEXT]."""

import json
import sys
from pathlib import Path

stage = Path(sys.argv[1])
attempt = int(sys.argv[sys.argv.index("--attempt") + 1])
exit_code = int(sys.argv[sys.argv.index("--exit-code") + 1])
with (stage / "decisions").open("a", encoding="utf-8") as log:
    log.write(f"{attempt} {exit_code}\n")
record = stage / "attempts" / f"{attempt}.json"
record.parent.mkdir(exist_ok=True)
print("a line for people")
if (stage / "result.json").exists():
    word, code = "finished", 0
elif record.exists() and json.loads(record.read_text(encoding="utf-8"))["state"] == "stopped":
    word, code = "requeue", 75
else:
    cause = sys.argv[sys.argv.index("--cause") + 1] if "--cause" in sys.argv else None
    record.write_text(json.dumps({"state": "failed", "exit_code": exit_code, "cause": cause}), encoding="utf-8")
    word, code = ("stop", exit_code) if exit_code in {2, 93} else ("retry", 1)
print(word)
sys.exit(code)
