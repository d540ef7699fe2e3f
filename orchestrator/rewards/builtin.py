"""The sample that a reward scores, and the built-in rewards. Must not import torch."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeAlias

from orchestrator.errors import ConfigError


@dataclass(frozen=True)
class Sample:
    """One completion of a model, and its context."""

    prompt: str
    completion: str
    tokens: int
    """Number of tokens of the completion, including the end-of-turn token."""
    is_finished: bool
    """Whether the model produced an end-of-turn token, rather than being cut at the limit."""
    row: Mapping[str, Any]
    """The other fields of the data row, such as a reference answer."""


Reward: TypeAlias = Callable[[Sample], float]


def exact_match(*, field: str = "answer", ignore_case: bool = False, ignore_outer_blanks: bool = True) -> Reward:
    """1 if the whole completion equals the row's `field`, else 0."""

    def comparable(text: str) -> str:
        text = text.strip() if ignore_outer_blanks else text
        return text.casefold() if ignore_case else text

    def reward(sample: Sample) -> float:
        return float(comparable(sample.completion) == comparable(_reference(sample, field)))

    return reward


def numeric_answer(*, field: str = "answer") -> Reward:
    """1 if the completion's final number equals the one in the row's `field`, else 0, as GSM8K is scored.

    Both are the number at the last `####`, or the last number if no `####` has one. Commas between thousands,
    currency signs and a trailing dot are ignored; 18 equals 18.00; fractions, powers and exponents are not numbers.
    """

    def reward(sample: Sample) -> float:
        reference = _reference(sample, field)
        expected = _final_number(reference, needs_mark="####" in reference)
        if expected is None:
            raise ValueError(f"the row's field '{field}' holds no number to compare with: {reference[-80:]!r}")
        return float(_final_number(sample.completion) == expected)

    return reward


def regex_format(*, pattern: str, is_full_match: bool = True) -> Reward:
    """1 if the completion matches `pattern` (all of it, or any part unless `is_full_match`), else 0.

    The pattern is Python's; `.` does not match line ends unless the pattern begins with (?s).
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"regex_format: pattern {pattern!r} is not a regular expression: {error}") from error
    match = compiled.fullmatch if is_full_match else compiled.search
    return lambda sample: float(match(sample.completion) is not None)


def length_penalty(*, target_tokens: int, maximum_tokens: int) -> Reward:
    """0 up to `target_tokens`, falling linearly to -1 at `maximum_tokens` and staying there.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), where target_tokens is L_max - L_cache and
    maximum_tokens is L_max.
    """
    if not 0 <= target_tokens < maximum_tokens:
        raise ConfigError(
            f"length_penalty: target_tokens is {target_tokens} and maximum_tokens is {maximum_tokens}; allowed is "
            "0 <= target_tokens < maximum_tokens: lower target_tokens or raise maximum_tokens"
        )

    def reward(sample: Sample) -> float:
        excess_tokens = min(max(sample.tokens - target_tokens, 0), maximum_tokens - target_tokens)
        return 0.0 - excess_tokens / (maximum_tokens - target_tokens)

    return reward


def repetition_penalty(*, ngram_words: int = 3) -> Reward:
    """Minus the share of the completion's n-grams that repeat an earlier one, in (-1, 0]; 0 if it has too few words.

    Words are separated by whitespace and compared without case; n is `ngram_words`.
    """
    if ngram_words < 1:
        raise ConfigError(f"repetition_penalty: ngram_words is {ngram_words}; allowed is 1 or more, such as 3")

    def reward(sample: Sample) -> float:
        words = sample.completion.casefold().split()
        ngrams = list(zip(*(words[start:] for start in range(min(ngram_words, len(words) + 1))), strict=False))
        return (len(set(ngrams)) - len(ngrams)) / len(ngrams) if ngrams else 0.0

    return reward


BUILT_INS: Mapping[str, Callable[..., Reward]] = {
    "exact_match": exact_match,
    "numeric_answer": numeric_answer,
    "regex_format": regex_format,
    "length_penalty": length_penalty,
    "repetition_penalty": repetition_penalty,
}

_NUMBER = r"""
    (?<! [A-Za-z0-9^/] ) (?<! \d\. ) (?<! /\s )                      # inside no word, version or fraction,
    (?<! \}\{ ) (?<! \^[-{] ) (?<! \^\{- ) (?<! \d[eE][-+] )       # nor the lower half of \frac or an exponent
    (?: (?<! [)\]}] ) (?P<sign> [-+\u2212] ) )?                     # 7-5 holds 7 and 5
    (?: \\? [$\u00a3\u20ac\u00a5\u20b9] \s? (?P<late_sign> [-+\u2212] )? )?
    (?P<digits>
        \d{1,3}+ (?: ,\d{3} (?!\d) )++ (?: \.\d++ )?             # 1,234,567.8
      | \d{1,2}+ (?: ,\d{2} (?!\d) )++ ,\d{3} (?: \.\d++ )?       # 12,34,567.8, as in India
      | \d++ (?: \.\d++ )?
      | (?<!\.) \.\d++
    )
    (?! \d | [.,]\d | [eE][-+]?\d | \s?/\s?\d | \}\{ | \^ )      # no fraction, power or list goes on
"""
_ANY_NUMBER = re.compile(_NUMBER, re.ASCII | re.VERBOSE)
_MARKED_NUMBER = re.compile(r"\#\#\#\# [\s*_:=]*+" + _NUMBER, re.ASCII | re.VERBOSE)


def _final_number(text: str, *, needs_mark: bool = False) -> Decimal | None:
    """The number at the last `####` that has one, or unless `needs_mark` the last number, or None."""
    last = _last_match(_MARKED_NUMBER, text)
    if last is None and not needs_mark:
        last = _last_match(_ANY_NUMBER, text)
    if last is None:
        return None
    value = Decimal(last["digits"].replace(",", ""))
    return value.copy_negate() if (last["sign"] or last["late_sign"] or "+") != "+" else value


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _reference(sample: Sample, field: str) -> str:
    if field not in sample.row:
        raise ValueError(
            f"the row has no field '{field}', it has {', '.join(map(str, sample.row)) or 'none'}; name one with `field`"
        )
    value = sample.row[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the row's field '{field}' is {repr(value)[:80]}; allowed is a text or a number")
    return str(value)
