"""A user's metrics and callbacks: what is wrong with them is known from the plan, and what they return is checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.composition.compose import compose
from orchestrator.errors import ConfigError
from orchestrator.planning.absolute_paths import resolve
from orchestrator.rewards.builtin import Sample
from orchestrator.rewards.extensions import load_callback, load_metric
from orchestrator.run_state.resume_rules import may_differ

CODE = """
def share(samples, digits=3):
    return round(sum(s.completion == s.row["answer"] for s in samples) / len(samples), digits)
def two(samples): return {"first": 1, "second": 2.5}
def text(samples): return "much"
def unnamed(samples): return {1: 0.5}
def infinite(samples): return float("inf")
def breaks(samples): return samples[99]
def by_rows(rows): return 0.0
def notify(event, values): return "stop" if event == "evaluation" else None
def wrong(event, values): return True
def fails(event, values): raise OSError("no network")
"""
SAMPLES = [
    Sample(prompt="a", completion=text, tokens=1, is_finished=True, row={"answer": "yes"})
    for text in ("yes", "no", "no")
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


def problems_of(*overrides: str) -> Sequence[str]:
    with pytest.raises(ConfigError) as caught:
        compose(["+experiment=llama_lora", *overrides])
    return caught.value.problems


def test_a_metric_gives_columns(file: Path) -> None:
    assert load_metric(f"{file}:share", {})(SAMPLES) == {"share": 0.333}
    assert load_metric(f"{file}:share", {"digits": 1})(SAMPLES) == {"share": 0.3}
    assert load_metric(f"{file}:two", {})(SAMPLES) == {"first": 1.0, "second": 2.5}


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("text", "returned 'much' (str); allowed is a finite number, or a dict of them"),
        ("unnamed", "returned the key 1; allowed are names"),
        ("infinite", "returned inf (float)"),
        ("breaks", "failed: IndexError: list index out of range (line 8 of"),
    ],
)
def test_what_a_metric_may_not_do(file: Path, function: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match="metric") as caught:
        load_metric(f"{file}:{function}", {})(SAMPLES)
    assert sentence in str(caught.value)


def test_a_callback_asks_to_stop_with_one_word(file: Path) -> None:
    notify = load_callback(f"{file}:notify", {})
    assert notify("evaluation", {}) is True and notify("step", {}) is False
    with pytest.raises(ConfigError, match='returned True at step; allowed is nothing or "stop"'):
        load_callback(f"{file}:wrong", {})("step", {})
    with pytest.raises(ConfigError, match="failed at save: OSError: no network"):
        load_callback(f"{file}:fails", {})("save", {})


def test_what_is_wrong_is_known_from_the_plan(file: Path) -> None:
    found = problems_of(
        f"stages.sft.metrics.functions=[{{source: '{file}:shar'}},{{source: '{file}:by_rows'}}]",
        f"stages.sft.callbacks=[{{source: '{file}:notify',options:{{loud:true}}}},{{source: 'gone.py:notify'}}]",
    )
    assert len(found) == 4
    assert "stages.sft.metrics.functions.0: " in found[0] and "did you mean 'share'?" in found[0]
    assert "stages.sft.metrics.functions.1: " in found[1] and "allowed is (samples, ...)" in found[1]
    assert "stages.sft.callbacks.0: " in found[2] and "takes no option 'loud'" in found[2]
    assert "stages.sft.callbacks.1: callback 'gone.py:notify': there is no file gone.py" in found[3]


def test_metrics_need_held_out_rows_and_answers(file: Path) -> None:
    functions = f"metrics.functions=[{{source: '{file}:share'}}]"
    (problem,) = problems_of(f"stages.sft.{functions}", "stages.sft.data.eval.path=none")
    assert problem.startswith("stages.sft.metrics.functions: nothing is held out to measure")
    with pytest.raises(ConfigError, match="a reward model generates nothing"):
        compose(["+experiment=llama_reward", f"stages.reward.{functions}"])


def test_files_become_absolute_and_may_change_between_attempts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    functions = "stages.sft.metrics.functions=[{source: 'mine.py:share'}]"
    config = compose(["+experiment=llama_lora", functions, "stages.sft.callbacks=[{source: 'mine.py:notify'}]"])
    stage = resolve(config, file.parent).stages["sft"]
    assert stage.metrics.functions[0].source == f"{file}:share" and stage.callbacks[0].source == f"{file}:notify"
    assert {"stages.sft.metrics", "stages.sft.callbacks"} <= may_differ(config)
    stopping = "stages.sft.early_stopping={metric: eval_share, mode: max, patience: 1, min_delta: 0.0}"
    judged = compose(["+experiment=llama_lora", functions, stopping, "stages.sft.evaluate_every_steps=2"])
    assert "stages.sft.metrics" not in may_differ(judged)
