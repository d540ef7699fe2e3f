"""Slurm's job states and reasons in plain English; UNKNOWN is a separate state. Pure, imports nothing of ours."""

import re
from dataclasses import dataclass
from typing import Literal

Phase = Literal["waiting", "running", "ended", "unknown"]


@dataclass(frozen=True)
class State:
    """One state: Slurm's name, the phase of the job, and what it means for the user."""

    name: str
    phase: Phase
    sentence: str
    short: str = ""
    """squeue's short name."""

    @property
    def succeeded(self) -> bool:
        return self.name == "COMPLETED"


UNKNOWN = State("UNKNOWN", "unknown", "Slurm has no answer about this job, which is not a failure.")

_STATES = (
    State("PENDING", "waiting", "is waiting for its turn", "PD"),
    State("CONFIGURING", "waiting", "its nodes are being prepared", "CF"),
    State("REQUEUED", "waiting", "is being requeued", "RQ"),
    State("REQUEUE_FED", "waiting", "is being requeued in the federation", "RF"),
    State("REQUEUE_HOLD", "waiting", "was requeued and is held: release it with `scontrol release`", "RH"),
    State("SPECIAL_EXIT", "waiting", "was requeued after a special exit and is held: release it", "SE"),
    State("RESV_DEL_HOLD", "waiting", "is held because its reservation was deleted", "RD"),
    State("POWER_UP_NODE", "waiting", "its nodes are being powered up", "PU"),
    State("RUNNING", "running", "runs", "R"),
    State("COMPLETING", "running", "is ending: its last processes are being cleaned up", "CG"),
    State("STAGE_OUT", "running", "is staging out its results", "SO"),
    State("SIGNALING", "running", "is being signalled", "SI"),
    State("RESIZING", "running", "is being resized", "RS"),
    State("EXPEDITING", "running", "is being requeued immediately", "EQ"),
    State("SUSPENDED", "running", "is suspended: it keeps its nodes but does not compute", "S"),
    State("STOPPED", "running", "is stopped: it keeps its nodes but does not compute", "ST"),
    State("COMPLETED", "ended", "ended with exit code 0", "CD"),
    State("FAILED", "ended", "ended with a nonzero exit code", "F"),
    State("CANCELLED", "ended", "was cancelled by its user or an administrator", "CA"),
    State("TIMEOUT", "ended", "reached its time limit", "TO"),
    State("DEADLINE", "ended", "reached its deadline", "DL"),
    State("PREEMPTED", "ended", "was preempted by another job", "PR"),
    State("NODE_FAIL", "ended", "lost a node", "NF"),
    State("OUT_OF_MEMORY", "ended", "used more memory than it requested", "OOM"),
    State("BOOT_FAIL", "ended", "its nodes did not boot", "BF"),
    State("LAUNCH_FAILED", "ended", "could not be started on its nodes", "LF"),
    State("RECONFIG_FAIL", "ended", "its nodes could not be reconfigured"),
    State("REVOKED", "ended", "was taken over by another cluster of the federation", "RV"),
)
STATES = {state.name: state for state in _STATES}
_BY_SHORT_NAME = {state.short: state for state in _STATES if state.short}

_REASONS = {
    "Priority": "other jobs come first",
    "Resources": "it is next, and waits until enough nodes are free",
    "Dependency": "it is waiting for the previous stage",
    "DependencyNeverSatisfied": "the previous stage failed, so it can never start: cancel it",
    "BeginTime": "it was requeued and may start again in about two minutes",
    "JobHeldUser": "its user holds it: `scontrol release JOB`",
    "JobHeldAdmin": "an administrator holds it: ask the cluster's administrators",
    "JobHoldMaxRequeue": "it was requeued too often and is held: `scontrol release JOB`",
    "Reservation": "its reservation has not begun",
    "ReqNodeNotAvail": "a node that it needs is down, drained or reserved, or maintenance is scheduled first",
    "NodeDown": "a node that it needs is down",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is not active",
    "PartitionTimeLimit": "its time limit is above the limit of the partition: lower cluster.time_limit",
    "PartitionNodeLimit": "it requests more nodes than the partition allows: lower cluster.nodes",
    "PartitionConfig": "the partition does not allow what it requests",
    "BadConstraints": "no node has what it requests: check cluster.constraint, memory and GPUs",
    "InvalidAccount": "its account is not valid: check cluster.account",
    "InvalidQOS": "its QOS is not valid: check cluster.qos",
    "AccountNotAllowed": "its account may not use this partition",
    "QOSNotAllowed": "its QOS may not be used here",
    "AssociationJobLimit": "the account has reached its limit of jobs",
    "JobArrayTaskLimit": "its array already runs as many tasks as it may at a time",
    "Licenses": "it is waiting for a licence",
    "Prolog": "the site is still preparing the nodes",
    "launch failed requeued held": "it failed to start on the nodes and is held: `scontrol release JOB`",
    "JobLaunchFailure": "it failed to start on the nodes (the log folder may be missing)",
    "NonZeroExitCode": "it ended with a nonzero exit code",
    "RaisedSignal": "it was ended by a signal",
    "SystemFailure": "Slurm itself failed",
    "TimeLimit": "it reached its time limit",
    "OutOfMemory": "it used more memory than it requested",
}


def parse_state(text: str) -> State:
    """Parse a state as printed by squeue, sacct or scontrol: tolerates `CANCELLED by 1000`, short names, lists."""
    words = [word for word in re.split(r"[^A-Za-z_]+", text.strip()) if word]
    if not words:
        return UNKNOWN
    word = words[0].upper()
    return STATES.get(word) or _BY_SHORT_NAME.get(word) or UNKNOWN


def explain_reason(reason: str) -> str:
    """Why a job waits, in a sentence; an unlisted reason is passed through unchanged."""
    bare = reason.strip().strip("()")
    if bare in {"", "None", "null"}:
        return "Slurm has given no reason yet"
    key = bare.split(",")[0].strip()
    if key in _REASONS:
        return _REASONS[key] + (f" ({bare})" if key != bare else "")
    if re.match(r"(QOS|Assoc)\w*(Max|Grp|Limit)", key):
        return f"a limit of the account or QOS is reached ({bare})"
    return f"Slurm's reason is {bare}"
