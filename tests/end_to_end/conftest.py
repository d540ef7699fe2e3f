"""One run of the main job on a tiny model, which the tests of this folder look at."""

from __future__ import annotations

import forking
import pytest
from bench import Bench, Done, make_bench

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdefdeadbeefc0ffee0123456789",
    "HF_TOKEN": "hf_NobodyMayEverReadThisTokenInARunFolder",
    "HUGGING_FACE_HUB_TOKEN": "hf_NorThisOneWhichIsOfTheOlderName",
    "OPENAI_API_KEY": "sk-and-none-of-other-tools-either",
}
WORDS = ("launcher=torchrun", "tracking=wandb", "tracking.mode=offline", "tuning.rank=4")


@pytest.fixture(scope="session")
def secrets() -> dict[str, str]:
    """What was in the environment of the run."""
    return SECRETS


@pytest.fixture(scope="session")
def words() -> tuple[str, ...]:
    """What the run was asked for beside the words of every run of the bench."""
    return WORDS


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("main_job"))


@pytest.fixture(scope="session")
def done(bench: Bench) -> Done:
    ended = bench.run("job", *WORDS, environment={**SECRETS, "OMP_NUM_THREADS": "1", **forking.FRESH})
    assert ended.code == 0, ended.told
    return ended
