"""A real Slurm of three virtual nodes for the whole test session; skipped only where Slurm cannot run."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import MINICLUSTER, Cluster, run


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("a cluster of virtual nodes needs root (munge, namespaces, device nodes)")
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        pytest.skip("Slurm is not installed, and there is no apt-get to install it with")
    installed = subprocess.run(["bash", MINICLUSTER, "install"], capture_output=True, text=True, check=False)
    if installed.returncode != 0:
        pytest.skip(f"Slurm's packages cannot be installed here: {installed.stderr.strip().splitlines()[-1:]}")
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="mc-", dir="/tmp")))  # a short path: unix sockets
    before = os.environ.get("SLURM_CONF")
    cluster.start()
    os.environ["SLURM_CONF"] = str(cluster.folder / "etc" / "slurm.conf")
    yield cluster
    cluster.manage("stop")
    shutil.rmtree(cluster.folder, ignore_errors=True)
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with every node up and nothing in the queue, before and after."""
    yield running_cluster
    subprocess.run(["scancel", "--user=root"], check=False, timeout=60)
    deadline = time.monotonic() + 60
    while run("squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.3)
