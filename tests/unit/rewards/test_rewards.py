"""Rewards by rule and a user's own: what they give, and that every wrong name, option, file and value is told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError
from orchestrator.rewards.builtin import (
    BUILT_INS,
    Sample,
    exact_match,
    length_penalty,
    numeric_answer,
    regex_format,
    repetition_penalty,
)
from orchestrator.rewards.load import load_reward, problems_of


def sample(completion: str = "", *, tokens: int = 1, prompt: str = "ask", **row: Any) -> Sample:
    return Sample(prompt=prompt, completion=completion, tokens=tokens, is_finished=True, row=row)


@pytest.mark.parametrize(
    ("completion", "answer", "options", "expected"),
    [
        ("Paris", "Paris", {}, 1),
        (" Paris\n", "Paris", {}, 1),
        (" Paris\n", "Paris", {"ignore_outer_blanks": False}, 0),
        ("paris", "Paris", {}, 0),
        ("STRASSE", "straße", {"ignore_case": True}, 1),
        ("It is Paris", "Paris", {}, 0),
        ("", "Paris", {}, 0),
        ("", "", {}, 1),
        ("18", 18, {}, 1),
        ("2.5", 2.5, {}, 1),
    ],
)
def test_exact_match(completion: str, answer: object, options: dict[str, Any], expected: float) -> None:
    assert exact_match(**options)(sample(completion, answer=answer)) == expected


NUMBERS = [
    ("#### 18", "18"),
    ("####18", "18"),
    ("first 4, then\n#### 18\nso 3 + 4 = 7", "18"),
    ("#### 5\n#### 18", "18"),
    ("#### **$18.00**", "18"),
    ("#### Step 2: multiply\nwhich makes 18", "18"),
    ("#### the answer\n18", "18"),
    ("It is 18.", "18"),
    ("It is 18...", "18"),
    ("it is...18", "18"),
    ("so $1,234,567.50!", "1234567.5"),
    ("₹12,34,567", "1234567"),
    ("€ 18", "18"),
    ("\\$18", "18"),
    ("$\\boxed{18}$", "18"),
    ("he loses -$5", "-5"),
    ("he loses $-5", "-5"),
    ("he loses \u22125", "-5"),
    ("x=-5", "-5"),
    ("+5", "5"),
    ("7-5", "5"),
    ("(7)-5", "5"),
    ("pages 10\u201315", "15"),
    (".5", "0.5"),
    ("0.50", ".5"),
    ("18 km/h", "18"),
    ("$18/hour", "18"),
    ("48/2=24", "24"),
    ("18th", "18"),
    ("50%", "50"),
    ("答案是18。", "18"),
    ("18 of H2O", "18"),
    ("18 in version 1.2.3", "18"),
    ("18, once 1/2 or 1 / 2 or \\frac{1}{2}", "18"),
    ("18, not 10^5, 10^-5, 10^{5} or 10^{-5}", "18"),
    ("18, not 1e5 or 1e-5", "18"),
    ("-0", "0"),
]


@pytest.mark.parametrize(("completion", "value"), NUMBERS)
def test_numeric_answer_reads_the_final_number(completion: str, value: str) -> None:
    reward = numeric_answer()
    assert reward(sample(completion, answer=f"working 99\n#### {value}")) == 1
    assert reward(sample(completion, answer=value)) == 1, "a bare reference"
    assert reward(sample(completion, answer="#### 424242")) == 0


@pytest.mark.parametrize("completion", ["", "none", "####", "x2", "1/2", "1e5", "٣", "1.2.3", "####\n" * 3, "-", "$"])
def test_numeric_answer_finds_no_number(completion: str) -> None:
    for value in ("1", "2", "3", "5", "0"):
        assert numeric_answer()(sample(completion, answer=value)) == 0


@pytest.mark.parametrize("answer", ["none", "", "4 apples\n#### none", "#### 1/2", "#### 10,00", True, None, [18]])
def test_a_reference_without_a_number_is_an_error(answer: object) -> None:
    with pytest.raises(ConfigError, match="field 'answer'"):
        load_reward("numeric_answer", {})(sample("18", answer=answer))


@pytest.mark.parametrize(
    "text", ["9" * 50_000 + "e5", "#" * 50_000, "#### " * 20_000, "1,111" * 20_000, "-$ " * 30_000]
)
def test_numeric_answer_is_quick_on_hostile_text(text: str) -> None:
    start = time.process_time()
    numeric_answer()(sample(text, answer="18"))
    assert time.process_time() - start < 2


def test_a_missing_field_names_those_that_are_there() -> None:
    with pytest.raises(ConfigError, match="no field 'answer', it has solution, level"):
        load_reward("exact_match", {})(sample("18", solution="18", level=1))


@pytest.mark.parametrize(
    ("completion", "options", "expected"),
    [
        ("<a>1</a>", {}, 1),
        ("say <a>1</a>", {}, 0),
        ("say <a>1</a>", {"is_full_match": False}, 1),
        ("<a>1</a>\n", {}, 0),
        ("<a>\n</a>", {}, 0),
    ],
)
def test_regex_format(completion: str, options: dict[str, Any], expected: float) -> None:
    assert regex_format(pattern=r"<a>.*</a>", **options)(sample(completion)) == expected


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (80, 0), (85, -0.25), (99, -0.95), (100, -1), (10**9, -1)])
def test_length_penalty_is_the_soft_overlong_punishment(tokens: int, expected: float) -> None:
    value = length_penalty(target_tokens=80, maximum_tokens=100)(sample(tokens=tokens))
    assert value == pytest.approx(expected)
    assert str(value) != "-0.0"


@pytest.mark.parametrize(
    ("completion", "ngram_words", "expected"),
    [
        ("", 3, 0),
        ("a b", 3, 0),
        ("a b c", 3, 0),
        ("a b c d e", 3, 0),
        ("a a a a", 1, -0.75),
        ("a b a b a b", 2, -3 / 5),
        ("The cat the CAT", 2, -1 / 3),
        ("a " * 1000, 3, -997 / 998),
    ],
)
def test_repetition_penalty(completion: str, ngram_words: int, expected: float) -> None:
    assert repetition_penalty(ngram_words=ngram_words)(sample(completion)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("exact_mach", {}, "did you mean 'exact_match'"),
        ("zzz", {}, ", ".join(BUILT_INS)),
        ("", {}, "no reward ''"),
        ("exact_match", {"feild": "x"}, "no option 'feild'; did you mean 'field'"),
        ("exact_match", {"ignore_case": "yes"}, "ignore_case is 'yes'; allowed is bool"),
        ("regex_format", {}, "needs the option 'pattern' (str)"),
        ("regex_format", {"pattern": "(a"}, "is not a regular expression"),
        ("regex_format", {"pattern": 3}, "pattern is 3; allowed is str"),
        ("length_penalty", {"target_tokens": 9, "maximum_tokens": 9}, "0 <= target_tokens < maximum_tokens"),
        ("length_penalty", {"target_tokens": True, "maximum_tokens": 9}, "allowed is int"),
        ("repetition_penalty", {"ngram_words": 0}, "allowed is 1 or more"),
        ("gone.py:f", {}, "there is no file gone.py"),
        ("reasoning_gym:", {}, "names no data set"),
        ("reasoning_gym:x", {"a": 1}, "no option 'a'"),
        (".:f", {}, "cannot be read"),
        ("\0.py:f", {}, "cannot be read"),
        ("folder/name", {}, "cannot be read"),
    ],
)
def test_a_wrong_name_or_option_is_told(name: str, options: dict[str, Any], told: str) -> None:
    assert told in "\n".join(problems_of(name, options))
    with pytest.raises(ConfigError) as caught:
        load_reward(name, options)
    assert told in str(caught.value)


def test_all_wrong_options_are_told_at_once() -> None:
    assert len(problems_of("length_penalty", {"target": 1, "maximum": 2})) == 4


SOURCE = '''\ufeff"""A user's rewards."""
from __future__ import annotations
import functools
from dataclasses import dataclass

@dataclass
class Config:
    word: str

def by_parts(prompt, completion, row, *, scale: float = 1.0):
    return scale * (len(completion) + 10 * len(prompt) + 100 * len(row))

def in_another_order(row, completion, prompt):
    return by_parts(prompt, completion, row)

def by_sample(sample, *, needed):
    return sample.tokens + needed

def of_anything(sample, **options):
    return len(options)

def with_default(sample, bonus=2):
    return bonus

def keeping(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) + 1
    return wrapper

@keeping
def decorated(sample):
    return 1

if Config:
    def conditional(sample):
        return True

by_lambda = lambda sample: 4
partly = functools.partial(by_sample, needed=7)
a_constant = 3
async def asynchronous(sample): return 1
def two(prompt, completion): return 1
def other_name(completion_text): return 1
def positional(sample, /): return 1
def takes_all(*args, **kwargs): return 1
'''


@pytest.fixture
def rewards_file(tmp_path: Path) -> Path:
    path = tmp_path / "my rewards.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("function", "options", "expected"),
    [
        ("by_parts", {}, 132),
        ("by_parts", {"scale": 0.5}, 66),
        ("in_another_order", {}, 132),
        ("by_sample", {"needed": 2}, 7),
        ("of_anything", {"a": 1, "b": 2}, 2),
        ("with_default", {}, 2),
        ("with_default", {"bonus": 3}, 3),
        ("decorated", {}, 2),
        ("conditional", {}, 1),
        ("by_lambda", {}, 4),
        ("partly", {}, 12),
    ],
)
def test_a_users_function(rewards_file: Path, function: str, options: dict[str, Any], expected: float) -> None:
    reward = load_reward(f"{rewards_file}:{function}", options)
    value = reward(sample("ab", prompt="ask", tokens=5, answer="x"))
    assert (value, type(value)) == (expected, float)
    assert [path.name for path in rewards_file.parent.iterdir()] == [rewards_file.name], "no byte code beside it"


@pytest.mark.parametrize(
    ("function", "options", "told"),
    [
        ("by_part", {}, "did you mean 'by_parts'? its functions: by_parts, in_another_order, by_sample"),
        ("Config", {}, "has no function 'Config'"),
        ("asynchronous", {}, "has no function 'asynchronous'"),
        ("", {}, "named without a function"),
        ("by_parts", {"scael": 1}, "no option 'scael'; did you mean 'scale'"),
        ("by_parts", {"row": 1}, "no option 'row'; allowed: scale"),
        ("by_sample", {}, "needs the option 'needed'"),
        ("two", {}, "takes (prompt, completion); allowed is (sample, ...) or (prompt, completion, row, ...)"),
        ("other_name", {}, "takes (completion_text)"),
        ("positional", {}, "takes (sample); allowed is"),
        ("takes_all", {}, "takes (args, kwargs)"),
    ],
)
def test_what_a_file_says_is_checked_without_running_it(
    rewards_file: Path, function: str, options: dict[str, Any], told: str
) -> None:
    rewards_file.write_text(SOURCE + "\nraise SystemExit('was run')\n", encoding="utf-8")
    assert told in "\n".join(problems_of(f"{rewards_file}:{function}", options))
    with pytest.raises(ConfigError) as caught:
        load_reward(f"{rewards_file}:{function}", options)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("function", "options", "told"),
    [("a_constant", {}, "is 3 once the file was run"), ("by_lambda", {"a": 1}, "no option 'a'; allowed: none")],
)
def test_what_only_running_the_file_tells(
    rewards_file: Path, function: str, options: dict[str, Any], told: str
) -> None:
    assert problems_of(f"{rewards_file}:{function}", options) == []
    with pytest.raises(ConfigError) as caught:
        load_reward(f"{rewards_file}:{function}", options)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (b"def f(sample:\n", "is not Python"),
        (b"def f(sample, sample): return 1\n", "is not Python"),
        (b"\xff\xfe", "cannot be read"),
        (b"\0", "is not Python"),
        (b"", "its functions: none"),
        (b"from os import *\n", "is None once the file was run"),
        (b"import no_such_package_here\ndef f(sample): return 1\n", "ModuleNotFoundError"),
        (b"def f(sample): return 1\n\nraise SystemExit(3)\n", "SystemExit: 3 (line 3 of "),
    ],
)
def test_a_file_that_is_no_reward_file(tmp_path: Path, source: bytes, told: str) -> None:
    path = tmp_path / "broken.py"
    path.write_bytes(source)
    with pytest.raises(ConfigError) as caught:
        load_reward(f"{path}:f", {})
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return None", "returned None (NoneType)"),
        ("return '1'", "returned '1' (str)"),
        ("return float('nan')", "returned nan (float)"),
        ("return -float('inf')", "returned -inf (float)"),
        ("return 10 ** 400", "returned 1000000"),
        ("return 1j", "returned 1j (complex)"),
        ("return [1.0]", "returned [1.0] (list)"),
        ("return sample.row['gone']", "KeyError: 'gone' (line 2 of "),
        ("import json; return json.loads('{')", "(line 2 of "),
        ("raise SystemExit", "SystemExit"),
        ("return f(sample)", "RecursionError"),
    ],
)
def test_a_fault_at_a_call_names_the_function_the_value_and_the_sample(tmp_path: Path, body: str, told: str) -> None:
    path = tmp_path / "faulty.py"
    path.write_text(f"def f(sample):\n    {body}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_reward(f"{path}:f", {})(sample("c" * 200, prompt="p" * 200))
    message = str(caught.value)
    assert told in message and f"{path}:f" in message
    assert "c" * 80 in message and "c" * 81 not in message and "p" * 81 not in message


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "numbers.py"
    path.write_text("import numpy as np\ndef f(sample, kind): return getattr(np, kind)(1)\n", encoding="utf-8")
    for kind in ("float32", "int64", "bool_"):
        assert load_reward(f"{path}:f", {"kind": kind})(sample()) == 1.0


def test_two_files_of_one_name_are_two_rewards(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "reward.py" for folder in ("a", "b")]
    for value, path in enumerate(paths):
        path.parent.mkdir()
        path.write_text(f"VALUE = {value}\ndef f(sample): return VALUE\n", encoding="utf-8")
    rewards = [load_reward(f"{path}:f", {}) for path in paths]
    assert [reward(sample()) for reward in rewards] == [0.0, 1.0]


GYM = """
def get_score_answer_fn(name):
    if name != "count":
        raise ValueError(f"Dataset {name} not registered")
    return lambda answer, entry: 1.0 if answer == entry["answer"] else 0.01
"""


def test_reasoning_gym(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reasoning_gym.py").write_text(GYM, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
    reward = load_reward("reasoning_gym:count", {})
    assert reward(sample("so <answer> 4 </answer>.", answer="4")) == 1.0
    assert reward(sample(" 4\n", answer="4")) == 1.0
    assert reward(sample("it is 4", answer="4")) == 0.01
    with pytest.raises(ConfigError, match="Dataset other not registered"):
        load_reward("reasoning_gym:other", {})
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)


def test_reasoning_gym_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.rewards.load.find_spec", lambda _: None)
    assert problems_of("reasoning_gym:count", {}) == [
        "'reasoning_gym:count' needs a package that is not installed: pip install reasoning-gym"
    ]


def test_the_login_side_stays_light() -> None:
    code = "import sys, orchestrator.rewards.load; print({'torch', 'transformers'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
