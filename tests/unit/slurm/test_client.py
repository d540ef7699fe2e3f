"""The client against recorded answers of Slurm: submitted once, found, cancelled, understood; no Slurm needed."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from launchers.secrets import write_secrets
from slurm.client import NoAnswerError, cancel, check_submission, find_by_token, submit
from slurm.commands import Answer, SlurmError, clean_environment, run_command
from slurm.query import parse_key_values, query
from slurm.states import STATES, UNKNOWN, explain_reason, parse_state

TOKEN = "run-1234.sft.1"
TIMED_OUT = Answer(1, "", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
FROZEN = Answer(1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")


class Site:
    """Answers from lists, by program; the last one stays. Keeps the calls."""

    def __init__(self, **answers: list[Answer]) -> None:
        self.answers = answers
        self.calls: list[list[str]] = []
        self.slept: list[float] = []

    def run(self, argv: Sequence[str], seconds: float) -> Answer:
        assert seconds <= 60
        self.calls.append(list(argv))
        if argv[0] not in self.answers:
            raise SlurmError(f"{argv[0]} is not on the PATH")
        answers = self.answers[argv[0]]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def count(self, program: str) -> int:
        return sum(call[0] == program for call in self.calls)


NOTHING = Answer(0, "", "")
NO_ACCOUNTING = Answer(1, "", "Slurm accounting storage is disabled")


def test_a_job_is_submitted_with_its_token_and_dependency() -> None:
    site = Site(squeue=[NOTHING], sacct=[NO_ACCOUNTING], sbatch=[Answer(0, "42;cluster\n", "")])
    assert submit("/x.sbatch", token=TOKEN, after_success_of="41", run=site.run) == "42"
    assert site.calls[-1] == [
        "sbatch",
        "--parsable",
        f"--comment={TOKEN}",
        "--dependency=afterok:41",
        "--kill-on-invalid-dep=yes",
        "/x.sbatch",
    ]


def test_a_frozen_controller_does_not_get_a_second_job() -> None:
    squeue = [NOTHING, FROZEN, FROZEN, Answer(0, f"40|other\n43|{TOKEN}\n", "")]
    site = Site(squeue=squeue, sacct=[NO_ACCOUNTING], sbatch=[TIMED_OUT])
    assert submit("/x.sbatch", token=TOKEN, run=site.run, sleep=site.slept.append) == "43"
    assert site.count("sbatch") == 1
    assert site.slept == [2, 4, 8]


def test_a_killed_client_finds_its_job_again() -> None:
    site = Site(squeue=[Answer(0, f"43_[0-2]|{TOKEN}\n44|{TOKEN}x\n", "")])
    assert submit("/x.sbatch", token=TOKEN, run=site.run) == "43"
    assert site.count("sbatch") == 0


def test_a_job_that_left_the_controller_is_found_in_the_accounting() -> None:
    site = Site(squeue=[NOTHING], sacct=[Answer(0, f"41|x\n43|{TOKEN}\n", "")])
    assert find_by_token(TOKEN, run=site.run) == ("43", True)


def test_a_controller_that_stays_frozen_is_reported_without_a_blind_retry() -> None:
    site = Site(squeue=[FROZEN], sbatch=[Answer(0, "1", "")])
    with pytest.raises(NoAnswerError, match="run the same command again"):
        submit("/x.sbatch", token=TOKEN, run=site.run, sleep=site.slept.append, patience_seconds=100)
    assert site.count("sbatch") == 0


def test_a_refusal_is_told_in_slurms_words_and_not_repeated() -> None:
    refusal = Answer(1, "", "sbatch: error: Batch job submission failed: Invalid partition name specified\n")
    site = Site(squeue=[NOTHING], sacct=[NO_ACCOUNTING], sbatch=[refusal])
    with pytest.raises(SlurmError, match="Invalid partition name specified"):
        submit("/x.sbatch", token=TOKEN, run=site.run)
    with pytest.raises(SlurmError, match=r"would refuse /x\.sbatch: Batch job submission failed: Invalid partition"):
        check_submission("/x.sbatch", run=site.run)
    assert site.count("sbatch") == 2
    with pytest.raises(SlurmError, match="The token is"):
        submit("/x.sbatch", token="a b", run=site.run)


def test_cancelling_what_has_ended_is_no_error() -> None:
    gone = Answer(1, "", "scancel: error: Kill job error on job id 7: Invalid job id specified\n")
    cancel(["7"], run=Site(scancel=[gone]).run)
    cancel([], run=Site().run)
    denied = Answer(1, "", "scancel: error: Kill job error on job id 7: Access/permission denied\n")
    with pytest.raises(SlurmError, match="permission denied"):
        cancel(["7"], run=Site(scancel=[denied]).run)
    with pytest.raises(NoAnswerError):
        cancel(["7"], run=Site(scancel=[Answer(None, "", "timeout")]).run)


def test_facts_come_from_whoever_still_knows_the_job(tmp_path: Path) -> None:
    completion = tmp_path / "jobcomp.txt"
    completion.write_text(
        "JobId=4 UserId=u(1) JobState=NODE_FAIL Partition=b TimeLimit=10 StartTime=x NodeList=n1 ExitCode=0:0\n"
    )
    squeue = "1|1|RUNNING|None|1:00|10:00|2026-01-01T00:00:00|n[1-2]\n2_[1-3]|2|PENDING|Resources|0:00|10:00|N/A|\n"
    config = f"JobCompLoc              = {completion}\nJobCompType             = jobcomp/filetxt\n"
    site = Site(
        squeue=[Answer(0, squeue, "")],
        sacct=[Answer(0, "3|3|FAILED|1:0|00:01:00|n1\n3|3|CANCELLED by 1000|0:15|00:02:00|n1\n", "")],
        scontrol=[Answer(1, "", "Invalid job id specified"), Answer(1, "", ""), Answer(0, config, "")],
    )
    facts = query(["1", "2", "3", "4", "5"], run=site.run)
    assert {job: (fact.state.name, fact.source) for job, fact in facts.items()} == {
        "1": ("RUNNING", "squeue"),
        "2": ("PENDING", "squeue"),
        "3": ("CANCELLED", "sacct"),
        "4": ("NODE_FAIL", "completion file"),
        "5": ("UNKNOWN", "none"),
    }
    assert facts["2"].sentence == "is waiting for its turn: it is next, and waits until enough nodes are free"
    assert (facts["1"].elapsed, facts["1"].time_limit, facts["1"].nodes) == ("1:00", "10:00", "n[1-2]")
    assert site.count("squeue") == 1


def test_a_failed_start_is_explained() -> None:
    row = "7|7|FAILED|JobLaunchFailure|0:00|10:00|N/A|\n8|8|FAILED|NonZeroExitCode|0:00|10:00|N/A|\n"
    facts = query(["7", "8"], run=Site(squeue=[Answer(0, row, "")]).run)
    assert "the log folder may be missing" in facts["7"].sentence
    assert facts["8"].sentence == "ended with a nonzero exit code"


def test_no_source_at_all_is_unknown_and_not_failed() -> None:
    for site in (Site(), Site(squeue=[FROZEN], sacct=[NO_ACCOUNTING], scontrol=[Answer(None, "", "")])):
        fact = query(["9"], run=site.run)["9"]
        assert site.count("squeue") == 1 and site.count("scontrol") < 3
        assert fact.state is UNKNOWN and fact.state.phase == "unknown" and not fact.state.succeeded
    assert query([], run=Site().run) == {}


def test_ten_thousand_jobs_take_one_squeue_call() -> None:
    rows = "".join(f"{job}|{job}|RUNNING|None|1:00|10:00|N/A|n1\n" for job in range(1_000_000, 1_010_000))
    site = Site(squeue=[Answer(0, rows, "")])
    facts = query([str(job) for job in range(1_000_000, 1_010_000)], run=site.run)
    assert len(facts) == 10_000 and {fact.state.name for fact in facts.values()} == {"RUNNING"}
    assert len(site.calls) == 1


def test_a_row_of_scontrol_is_read() -> None:
    line = "JobId=7 JobName=a b JobState=PENDING Reason=Dependency RunTime=00:00:00 ExitCode=0:53 NodeList=(null)"
    fact = parse_key_values(line, source="scontrol")
    assert fact is not None
    assert (fact.state.name, fact.reason, fact.nodes) == ("PENDING", "Dependency", "")
    assert parse_key_values("slurm_load_jobs error", source="scontrol") is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RUNNING", "RUNNING"),
        ("CANCELLED by 1000", "CANCELLED"),
        ("CANCELLED+", "CANCELLED"),
        ("['PENDING', 'REQUEUED']", "PENDING"),
        ("CD", "COMPLETED"),
        ("OUT_OF_ME+", "UNKNOWN"),
        ("SOMETHING_NEW", "UNKNOWN"),
        ("", "UNKNOWN"),
    ],
)
def test_states_are_understood_in_every_spelling(text: str, name: str) -> None:
    assert parse_state(text).name == name


def test_every_state_says_what_it_means() -> None:
    assert len(STATES) == 28
    assert all(state.sentence and state.phase != "unknown" for state in STATES.values())
    assert [name for name, state in STATES.items() if state.succeeded] == ["COMPLETED"]


def test_reasons_become_sentences() -> None:
    assert "can never start" in explain_reason("(DependencyNeverSatisfied)")
    assert explain_reason("ReqNodeNotAvail, UnavailableNodes:n2").endswith("(ReqNodeNotAvail, UnavailableNodes:n2)")
    assert "limit of the account or QOS" in explain_reason("QOSMaxGRESPerUser")
    assert explain_reason("BrandNew") == "Slurm's reason is BrandNew"
    assert "no reason" in explain_reason("None")


def test_the_environment_of_slurms_programs_is_clean() -> None:
    dirty = {
        "SBATCH_PARTITION": "x",
        "SLURM_JOB_ID": "1",
        "SQUEUE_FORMAT": "x",
        "SLURM_CONF": "/etc/s",
        "WANDB_API_KEY": "k",
        "HF_TOKEN": "t",
        "PATH": "/bin",
    }
    assert clean_environment(dirty) == {"SLURM_CONF": "/etc/s", "PATH": "/bin"}


def test_a_missing_program_and_a_slow_one_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SlurmError, match="no-such-program is not on the PATH"):
        run_command(["no-such-program"], 5)
    assert run_command(["sleep", "5"], 0.1) == Answer(None, "", "sleep did not answer within 0.1 s")


def test_secrets_stand_in_a_private_file_only(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "secrets.sh"
    environment = {"WANDB_API_KEY": "a'b", "HF_TOKEN": "t", "PATH": "/bin", "EMPTY_TOKEN": ""}
    assert write_secrets(str(path), environment) == ("HF_TOKEN", "WANDB_API_KEY")
    assert path.stat().st_mode & 0o777 == 0o600
    assert run_command(["bash", "-c", f". '{path}'; printf %s \"$WANDB_API_KEY\""], 5).output == "a'b"
    assert write_secrets(str(path), {"PATH": "/bin"}) == ()
    assert not path.exists()
