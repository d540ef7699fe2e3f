"""Slurm's facts about jobs, from squeue, sacct, scontrol and the completion file; any of them may be missing."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.commands import NoAnswerError, Run, SlurmError, gave_no_answer, last_words, run_command
from slurm.states import UNKNOWN, State, explain_reason, parse_state

_CALL_SECONDS = 30.0
_MAX_ARGUMENT = 100_000
"""Characters of one argument; Linux takes 131,072."""
_MAX_SINGLE_QUESTIONS = 20
# Text formats: squeue's JSON changes its shape between versions, and scontrol has none in 22.05.
_SQUEUE_FORMAT = "%i|%A|%T|%r|%M|%l|%S|%N"
# One invalid field fails the whole call: only fields that 22.05 knows.
_SACCT_FIELDS = "JobIDRaw,JobID,State,ExitCode,Elapsed,NodeList"


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """One job as reported by Slurm; empty texts for what the source lacks."""

    job_id: str
    state: State
    reason: str = ""
    """Why it waits or ended, as Slurm's reason code."""
    elapsed: str = ""
    time_limit: str = ""
    starts: str = ""
    """When it started, or is expected to."""
    nodes: str = ""
    exit_code: str = ""
    """CODE:SIGNAL."""
    source: str = "none"

    @property
    def sentence(self) -> str:
        """The state in plain English, and why it waits or failed if Slurm says so."""
        # Slurm's code for a job whose log could not be opened.
        if self.exit_code == "0:53":
            return f"{self.state.sentence}: {explain_reason('JobLaunchFailure')}"
        tells_more = self.state.phase == "waiting" or (self.state.phase == "ended" and not self.state.succeeded)
        if tells_more and self.reason not in {"", "None", "NonZeroExitCode", "TimeLimit"}:
            return f"{self.state.sentence}: {explain_reason(self.reason)}"
        return self.state.sentence


def query(job_ids: Iterable[str], *, run: Run = run_command) -> dict[str, JobFacts]:
    """The facts of every job asked for, with one squeue call; UNKNOWN if nothing answers. Never raises."""
    wanted = list(dict.fromkeys(job_ids))
    if not wanted:
        return {}
    facts: dict[str, JobFacts] = {}
    silent = False
    for source in (_ask_squeue, _ask_sacct, _ask_scontrol, _ask_completion_file):
        missing = [job_id for job_id in wanted if job_id not in facts]
        if not missing or (silent and source is not _ask_sacct):
            continue
        try:
            facts |= source(missing, run)
        except NoAnswerError:
            silent = True  # asking the controller in another way would take as long again
        except SlurmError:
            continue  # this source is missing; the next one may not be
    return {job_id: facts.get(job_id, JobFacts(job_id=job_id, state=UNKNOWN)) for job_id in wanted}


def parse_squeue(output: str) -> dict[str, JobFacts]:
    """Rows of the format above, keyed by the id as shown (12, 12_3) and by the plain id of the task."""
    facts: dict[str, JobFacts] = {}
    for line in output.splitlines():
        row = line.strip().split("|")
        if len(row) != 8:
            continue
        shown, plain, state, reason, elapsed, limit, starts, nodes = row
        for job_id in (plain, shown, re.sub(r"_\[.*\]$", "", shown)):
            if job_id not in facts:
                facts[job_id] = JobFacts(
                    job_id=job_id,
                    state=parse_state(state),
                    reason="" if reason == "None" else reason,
                    elapsed=elapsed,
                    time_limit=limit,
                    starts="" if starts == "N/A" else starts,
                    nodes=nodes,
                    source="squeue",
                )
    return facts


def parse_sacct(output: str) -> dict[str, JobFacts]:
    """Rows of `sacct --parsable2`; the last row of a job wins (a requeued job has several)."""
    facts: dict[str, JobFacts] = {}
    for line in output.splitlines():
        row = line.split("|")
        if len(row) != 6:
            continue
        raw, shown, state, exit_code, elapsed, nodes = row
        for job_id in (raw, shown):
            facts[job_id] = JobFacts(
                job_id=job_id,
                state=parse_state(state),
                elapsed=elapsed,
                nodes="" if nodes == "None assigned" else nodes,
                exit_code=exit_code,
                source="sacct",
            )
    return facts


def parse_key_values(line: str, *, source: str) -> JobFacts | None:
    """One line of `scontrol show job -o` or of the completion file (Key=Value, blanks between)."""
    pairs = dict(re.findall(r"(?:^| )(\w+(?:/\w+)?)=(\S*)", line))
    if "JobId" not in pairs or "JobState" not in pairs:
        return None
    return JobFacts(
        job_id=pairs["JobId"],
        state=parse_state(pairs["JobState"]),
        reason="" if pairs.get("Reason", "None") == "None" else pairs["Reason"],
        elapsed=pairs.get("RunTime", ""),
        time_limit=pairs.get("TimeLimit", ""),
        nodes=pairs.get("NodeList", "").replace("(null)", ""),
        exit_code=pairs.get("ExitCode", ""),
        source=source,
    )


def _ask_squeue(job_ids: Sequence[str], run: Run) -> dict[str, JobFacts]:
    joined = ",".join(job_ids)
    chosen = [f"--jobs={joined}"] if len(joined) < _MAX_ARGUMENT else []
    answer = run(["squeue", "--noheader", "--states=all", f"--format={_SQUEUE_FORMAT}", *chosen], _CALL_SECONDS)
    if gave_no_answer(answer):
        raise NoAnswerError(last_words(answer))
    # Exit code 0 without a row (a finished id) and 1 (an unknown id) are no answer: the next source is asked.
    return _only(parse_squeue(answer.output), job_ids) if answer.exit_code == 0 else {}


def _ask_sacct(job_ids: Sequence[str], run: Run) -> dict[str, JobFacts]:
    facts: dict[str, JobFacts] = {}
    for first in range(0, len(job_ids), 5000):
        chosen = ",".join(job_ids[first : first + 5000])
        argv = ["sacct", "--allocations", "--noheader", "--parsable2", f"--format={_SACCT_FIELDS}", f"--jobs={chosen}"]
        answer = run(argv, _CALL_SECONDS)
        if answer.exit_code != 0:
            return facts
        facts |= _only(parse_sacct(answer.output), job_ids)
    return facts


def _ask_scontrol(job_ids: Sequence[str], run: Run) -> dict[str, JobFacts]:
    facts: dict[str, JobFacts] = {}
    for job_id in job_ids[:_MAX_SINGLE_QUESTIONS]:
        answer = run(["scontrol", "show", "job", "--oneliner", job_id], _CALL_SECONDS)
        if answer.exit_code is None:
            break
        found = parse_key_values(answer.output, source="scontrol") if answer.exit_code == 0 else None
        if found is not None:
            facts[job_id] = found
    return facts


def _ask_completion_file(job_ids: Sequence[str], run: Run) -> dict[str, JobFacts]:
    answer = run(["scontrol", "show", "config"], _CALL_SECONDS)
    settings = dict(re.findall(r"^(JobCompType|JobCompLoc)\s*=\s*(.*?)\s*$", answer.output, re.MULTILINE))
    if settings.get("JobCompType") != "jobcomp/filetxt":
        return {}
    try:
        lines = Path(settings.get("JobCompLoc", "")).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found = (parse_key_values(line, source="completion file") for line in lines)
    return _only({fact.job_id: fact for fact in found if fact is not None}, job_ids)


def _only(facts: dict[str, JobFacts], job_ids: Sequence[str]) -> dict[str, JobFacts]:
    return {job_id: facts[job_id] for job_id in job_ids if job_id in facts}
