"""As a normal user, on a cluster with accounting: what the controller has forgotten is found in sacct."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from launching import STAND_INS, make_slurm_spec, wait_until
from slurm_cluster import MINICLUSTER, Cluster, run

from launchers.spec import JobSpec
from launchers.submission import read_jobs
from slurm.client import find_by_token
from slurm.query import query

TOKEN = "accounting.sft.1"
PYTHON = "/usr/bin/python3"
"""An interpreter that every user may run; the one of the tests may live in root's home."""
SUBMIT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_slurm_accounting import make_users_spec
from launchers import sbatch
from launchers.submission import Stage, submit
spec = make_users_spec(Path({run!r}))
print(submit(Stage(spec, sbatch.render(spec), {token!r})))
"""


def make_users_spec(folder: Path) -> JobSpec:
    plain = make_slurm_spec(folder, nodes=1)
    environment = {"PYTHONPATH": str(STAND_INS.parents[2]), "REAL_PYTHON": PYTHON}
    return replace(
        plain,
        python=str(STAND_INS / "python"),
        command=(PYTHON, *plain.command[1:]),
        decide=(PYTHON, *plain.decide[1:]),
        environment=environment,
    )


@pytest.fixture
def accounting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("a cluster of virtual nodes needs root")
    if not Path(PYTHON).exists():
        pytest.skip(f"there is no {PYTHON} that a normal user may run")
    done = subprocess.run(["bash", MINICLUSTER, "install", "--accounting"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"slurmdbd and MariaDB cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="mc-", dir="/tmp")))
    cluster.manage("start", "--nodes", "2", "--gpus", "0", "--accounting", "--timeout", "60", "--conf", "MinJobAge=2")
    monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "etc" / "slurm.conf"))
    yield cluster
    cluster.manage("stop")
    shutil.rmtree(cluster.folder, ignore_errors=True)


def submit_as_nobody(spec: JobSpec) -> str:
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent), *(path for path in sys.path if path)]
    code = SUBMIT.format(paths=paths, run=spec.working_directory, token=TOKEN)
    user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    done = subprocess.run([*user, sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_normal_users_job_is_found_after_the_controller_forgot_it(accounting: Cluster) -> None:
    folder = Path(tempfile.mkdtemp(prefix="run-", dir="/tmp"))
    folder.chmod(0o777)
    try:
        spec = make_users_spec(folder)
        for path in [folder, *folder.rglob("*")]:
            shutil.chown(path, "nobody", "nogroup")
        job = submit_as_nobody(spec)
        assert submit_as_nobody(spec) == job  # the same token: the same job
        assert accounting.wait(job) == "COMPLETED", run("bash", "-c", f"cat {folder}/sft/logs/*.log; ls -lR {folder}")
        assert read_jobs(spec.log_directory) == (job,)
        wait_until(lambda: not run("squeue", "-h", "-t", "all"), seconds=120, what="the controller forgets the job")
        fact = query([job, "999999"])
        assert (fact[job].state.name, fact[job].exit_code, fact[job].source) == ("COMPLETED", "0:0", "sacct")
        assert fact["999999"].state.name == "UNKNOWN"
        assert find_by_token(TOKEN) == (None, True)  # another user's
        assert submit_as_nobody(spec) == job
    finally:
        shutil.rmtree(folder)
