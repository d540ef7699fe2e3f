"""YAML files of the user's own folder: faults are told with file, line and nearest key; what is right is obeyed."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from command_line import Asker

from orchestrator.composition.compose import CONF, compose

HEAD = """\
# @package _global_
defaults:
  - /stage@stages.sft: sft
  - _self_
pipeline: [sft]
"""


def write_yaml(folder: Path, name: str, text: str | bytes, *, head: str = HEAD) -> Path:
    path = folder / "own" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else (head + textwrap.dedent(text)).encode())
    return path


def test_faults_at_every_depth_have_file_line_and_nearest_key(ask: Asker) -> None:
    file = write_yaml(
        ask.folder,
        "experiment/mine",
        """\
        nmae: mine
        stages:
          sft:
            max_stepz: 3
            log_every_steps: often
            optimizer: {lr: 1.0e-3, weight_decai: 0.1}
            data:
              mix:
                - path: a.jsonl
                - path: b.jsonl
                  formatt: text
        cluster:
          nodess: 2
        """,
    )
    told = ask.refused("plan", "--config-dir", "own", "+experiment=mine")
    assert sorted(told) == sorted(
        [
            f"{file}:6 nmae: unknown key; did you mean name?",
            f"{file}:9 stages.sft.max_stepz: unknown key; did you mean max_steps?",
            f'{file}:10 stages.sft.log_every_steps: input should be a valid integer, not "often"',
            f"{file}:11 stages.sft.optimizer.weight_decai: unknown key; did you mean weight_decay?",
            f"{file}:16 stages.sft.data.mix.1.formatt: unknown key; did you mean format?",
            f"{file}:18 cluster.nodess: unknown key; did you mean nodes?",
        ]
    )


def test_a_fault_of_the_command_line_is_not_blamed_on_a_file(ask: Asker) -> None:
    write_yaml(ask.folder, "experiment/mine", "stages: {sft: {max_steps: 3}}")
    told = ask.refused(
        "plan", "--config-dir=own", "+experiment=mine", "stages.sft.max_steps=x", "+stages.sft.optimizer.rank=3"
    )
    assert [line.split(":")[0] for line in told] == ["stages.sft.max_steps", "stages.sft.optimizer.rank"]


def test_a_group_of_the_users_own_is_judged_like_ours(ask: Asker) -> None:
    file = write_yaml(ask.folder, "tuning/small", "method: lora\nrnk: 2\n", head="")
    told = ask.refused("plan", "--config-dir", "own", "+experiment=llama_lora", "tuning=small")
    assert f"{file}:2 tuning.rnk: unknown key; did you mean rank?" in told
    assert "tuning.alpha: this key is missing" in told


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: [mine\n", "FILE:7 is not YAML: expected ',' or ']', but got '<stream end>'"),
        (b"\tname: mine\n", "FILE:1 is not YAML: found character '\\t' that cannot start any token"),
        ("name: a\nname: b\n", "FILE:7 is not YAML: found duplicate key name"),
        (b"name: \xff\n", "FILE is not YAML: 'utf-8' codec can't decode byte 0xff in position 6: invalid start byte"),
        (b"defaults: 3\n", "FILE: defaults must be a list of `- group: choice`"),
        (b"name: mine\n", "FILE:1 must say `# @package _global_`, so that the file's keys are at the root"),
        (b"- a\n- b\n", "FILE:1 must say `# @package _global_`, so that the file's keys are at the root"),
        (b"", "FILE:1 must say `# @package _global_`, so that the file's keys are at the root"),
        (
            b"# @package _global_\ndefaults:\n  - /stage@stages.sft: stf\n",
            "In 'experiment/mine': Could not find 'stage/stf' Available options in 'stage': classify dpo evaluate grpo interpolate merge reward self_training sft soup",
        ),
    ],
)
def test_a_file_that_is_no_yaml_or_no_experiment(ask: Asker, text: str | bytes, sentence: str) -> None:
    file = write_yaml(ask.folder, "experiment/mine", text)
    assert ask.refused("plan", "--config-dir", "own", "+experiment=mine") == (sentence.replace("FILE", str(file)),)


def test_own_files_are_obeyed_and_hide_ours(tmp_path: Path) -> None:
    odd = tmp_path / "a folder, with [odd] 'signs'=1"
    write_yaml(odd, "experiment/mine", "name: mine\nstages: {sft: {max_steps: 3}}\n")
    write_yaml(odd, "cluster/h100x8", (CONF / "cluster/local.yaml").read_bytes() + b"\n# ours\n")
    config = compose(["+experiment=mine", "cluster=h100x8"], config_directory=odd / "own")
    assert config.name == "mine" and config.stages["sft"].max_steps == 3
    assert config.cluster.gpus_per_node == 0
    assert compose(["+experiment=llama_lora"], config_directory=odd / "own").name == "llama_lora"


def test_an_unknown_experiment_lists_the_users_too(ask: Asker) -> None:
    write_yaml(ask.folder, "experiment/mine", "name: mine\n")
    (told,) = ask.refused("plan", "--config-dir", "own", "+experiment=miine")
    assert "did you mean mine?" in told and "llama_lora" in told


def test_a_file_that_speaks_of_hydra_is_composed_the_same(tmp_path: Path) -> None:
    """Hydra's own settings are composed only where a file speaks of them: a recipe that comes from elsewhere may."""
    write_yaml(tmp_path, "experiment/mine", "name: mine\n")
    without = compose(["+experiment=mine", "tuning=lora"], config_directory=tmp_path / "own")
    head = HEAD.replace("  - _self_", "  - override /hydra/job_logging: none\n  - _self_")
    write_yaml(tmp_path, "experiment/mine", "name: mine\nhydra: {verbose: true}\n", head=head)
    assert compose(["+experiment=mine", "tuning=lora"], config_directory=tmp_path / "own") == without


# ---- an experiment file by its path --------------------------------------------------------------

OWN = "# @package _global_\ndefaults:\n  - llama_lora\n  - _self_\nstages: {sft: {max_steps: 7}}\n"


def test_an_experiment_file_is_run_by_its_path(ask: Asker) -> None:
    (ask.folder / "my first (1).yaml").write_text(OWN)
    (ask.folder / "named.yml").write_text(OWN + "name: mine\n")
    answer = ask("plan", "tuning.rank=4", "my first (1).yaml", "format=json")
    assert answer.code == 0 and '"steps": 7' in answer.out
    config = compose([str(ask.folder / "my first (1).yaml")])
    assert config.name == "my_first_1"
    assert compose([str(ask.folder / "named.yml"), "seed=3"]).name == "mine"
    assert compose([str(ask.folder / "named.yml"), "name=other"]).name == "other"
    assert ask("render", "named.yml").code == 0 and (ask.folder / "runs" / "mine" / "run.json").is_file()
    assert ask("named.yml", "render").code == 0


def test_faults_of_an_experiment_file_have_its_path_and_line(ask: Asker) -> None:
    (ask.folder / "mine.yaml").write_text(OWN + "seeed: 3\ntuning: {learning_rate: 1}\n")
    assert tuple(sorted(ask.refused("plan", "mine.yaml"))) == (
        "mine.yaml:6 seeed: unknown key; did you mean seed?",
        "mine.yaml:7 tuning.learning_rate: unknown key; allowed are alpha, dropout, init, lora_plus_ratio, method, rank, "
        "target_modules, use_dora, use_rslora",
    )
    (ask.folder / "mine.yaml").write_text(OWN.replace("llama_lora", "llama_lara"))
    (told,) = ask.refused("plan", "mine.yaml")
    assert told.startswith("In mine.yaml: Could not load 'experiment/llama_lara'")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1\n", "mine.yaml:2 is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("- a\n", "mine.yaml holds a list; lines of `key: value` are expected"),
        ("just a text\n", "mine.yaml holds a str; lines of `key: value` are expected"),
        ("", "mine.yaml holds no keys; `init mine_new.yaml` writes an experiment file"),
        ("a: 1\n", "mine.yaml:1 is not an experiment file: its first line must be `# @package _global_`, so that its keys are at the root"),
        ("# mine\n# @package _global_\na: 1\n", "mine.yaml:1 is not an experiment file: its first line must be `# @package _global_`, so that its keys are at the root"),
    ],
)  # fmt: skip
def test_a_yaml_file_that_is_no_experiment(ask: Asker, text: str, sentence: str) -> None:
    (ask.folder / "mine.yaml").write_text(text)
    assert ask.refused("plan", "mine.yaml") == (sentence,)


def test_one_experiment_and_one_that_exists(ask: Asker) -> None:
    (ask.folder / "mine.yaml").write_text(OWN)
    assert ask.refused("run", "mine.yaml", "+experiment=llama_full") == (
        "mine.yaml +experiment=llama_full: a run has one experiment, and mine.yaml is one; leave out +experiment=llama_full, or let "
        "the file build on it: `- llama_full` as the first entry of its defaults",
    )
    assert ask.refused("run", "mine.yaml", "other.yaml") == (
        "mine.yaml other.yaml: a run has one experiment; leave out all files but one",
    )
    assert ask.refused("check", "mien.yaml") == ("mien.yaml: there is no such file; did you mean mine.yaml?",)
    (ask.folder / "folder.yaml").mkdir()
    assert ask.refused("check", "folder.yaml") == ("folder.yaml is a folder; an experiment file is needed",)
