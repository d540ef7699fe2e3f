"""Stand-in for orchestrator.worker (standard library only): counts steps in a file, obeys the stop file, records.

argv: SETTINGS.json --attempt K. Settings: stage_directory, stop_file, steps, step_seconds, and optionally
`faults`, a table "attempt:rank" -> {"step": S, "exit": code | "signal": number, "message": text};
`obeys_term`; `in_step`: no rank runs ahead of the others, as with collectives; `show`: variables to record.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
attempt = int(sys.argv[sys.argv.index("--attempt") + 1])
stage = Path(settings["stage_directory"])
rank = int(os.environ.get("RANK", "0"))
facts = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
seen = {
    "argv": sys.argv,
    "environment": {name: os.environ.get(name) for name in (*facts, *settings.get("show", []))},
    "pid": os.getpid(),
    "host": os.uname().nodename,
    "folder": str(Path.cwd()),
}
(stage / "seen").mkdir(parents=True, exist_ok=True)
(stage / "seen" / f"rank-{rank}.attempt-{attempt}.json").write_text(json.dumps(seen), encoding="utf-8")
print(f"rank {rank} begins attempt {attempt}", flush=True)
if settings.get("obeys_term"):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
else:  # a trainer in a collective does not end of TERM
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def write(path: Path, content: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def end(state: str, step: int) -> None:
    if rank == 0:
        (stage / "attempts").mkdir(exist_ok=True)
        record = {
            "attempt": attempt,
            "state": state,
            "why": "",
            "host": seen["host"],
            "rank": 0,
            "exit_code": 0,
            "step": step,
        }
        write(stage / "attempts" / f"{attempt}.json", record)
    sys.exit(0)


def fall(fault: dict[str, object]) -> None:
    if "message" in fault:
        error_file = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        error_file.write_text(json.dumps({"message": {"message": fault["message"]}}), encoding="utf-8")
    if "signal" in fault:
        os.kill(os.getpid(), int(str(fault["signal"])))
    if "exit" in fault:
        sys.exit(int(str(fault["exit"])))


def wait_for_others(step: int) -> None:
    while True:
        logs = [stage / f"steps.rank-{other}" for other in range(int(os.environ.get("WORLD_SIZE", "1")))]
        last = [log.read_text(encoding="utf-8").split()[-2:] if log.exists() else [] for log in logs]
        if all(one and int(one[0]) == attempt and int(one[1]) >= step for one in last):
            return
        time.sleep(0.02)


checkpoint = stage / "step.json"
step = json.loads(checkpoint.read_text(encoding="utf-8")) if checkpoint.exists() else 0
steps_log = stage / f"steps.rank-{rank}"
while step < settings["steps"]:
    time.sleep(settings["step_seconds"])
    step += 1
    fault = settings.get("faults", {}).get(f"{attempt}:{rank}")
    if fault and fault["step"] == step:
        fall(fault)
    with steps_log.open("a", encoding="utf-8") as log:
        log.write(f"{attempt} {step}\n")
    if settings.get("in_step"):
        wait_for_others(step)
    if Path(settings["stop_file"]).exists():
        if rank == 0:
            write(checkpoint, step)
        end("stopped", step)
if rank == 0:
    write(stage / "result.json", {"step": step})
end("finished", step)
