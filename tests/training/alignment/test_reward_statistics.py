"""The reward model's health report against known values, hand-made models and their faults."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from orchestrator.alignment.reward_statistics import (
    Pairs,
    RewardReport,
    WordsBaseline,
    calibration_error,
    credits_of,
    longer_wins,
    mcnemar_p_value,
    report_of,
    wilson_interval,
)
from orchestrator.errors import DataError, TrainingFailed
from orchestrator.training.correlations import pearson, ranks_of

WORDS = [f"word{i}" for i in range(30)]


def pairs_of(num: int, *, seed: int, good: str = "", longer_share: float = 0.5) -> Pairs:
    """Random words; `good` stands in chosen answers only; the chosen one is longer in `longer_share` of the pairs."""
    random = np.random.default_rng(seed)
    texts: tuple[list[str], list[str]] = ([], [])
    for _ in range(num):
        short, long = int(random.integers(3, 10)), int(random.integers(11, 30))
        sizes = (long, short) if random.random() < longer_share else (short, long)
        for side, size in zip(texts, sizes, strict=True):
            side.append(" ".join(random.choice(WORDS, size)))
    chosen = [f"{good} {text}".strip() for text in texts[0]] if good else texts[0]
    tokens = (np.array([len(text.split()) for text in side]) for side in (chosen, texts[1]))
    return Pairs(chosen, texts[1], *tokens)


def report(chosen_N: np.ndarray, rejected_N: np.ndarray, *, held_out: Pairs | None = None) -> RewardReport:
    held_out = held_out or pairs_of(len(chosen_N), seed=1)
    return report_of(chosen_N, rejected_N, held_out=held_out, training=pairs_of(200, seed=2))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # the first four: Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
        (10, 10, 0.7225, 1.0),
        (0.5, 1, 0.0546, 0.9454),
    ],
)
def test_wilson_interval(successes: float, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [
        (0, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (1, 8, 2 * (1 + 9) / 512),
        (3, 12, 2 * (1 + 15 + 105 + 455) / 2**15),
        (7, 7, 1.0),
        (7, 8, 1.0),
    ],
)
def test_mcnemar_exact(wins: int, losses: int, expected: float) -> None:
    first = np.array([1.0] * wins + [0.0] * losses + [1.0, 0.0, 0.5])
    second = np.array([0.0] * wins + [1.0] * losses + [1.0, 0.0, 0.5])
    assert mcnemar_p_value(first, second) == pytest.approx(expected)
    assert mcnemar_p_value(second, first) == pytest.approx(expected)


def test_mcnemar_of_many_pairs_agrees_with_the_normal_approximation() -> None:
    first = np.array([1.0] * 2600 + [0.0] * 2400)
    z = (2600 - 2400 - 1) / math.sqrt(5000)
    assert mcnemar_p_value(first, 1 - first) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_mcnemar_keeps_its_level() -> None:
    random = np.random.default_rng(0)
    rejections = [mcnemar_p_value(*random.integers(0, 2, (2, 100)).astype(float)) < 0.05 for _ in range(1000)]
    assert 0.01 < np.mean(rejections) <= 0.06


def test_perfect_scores() -> None:
    found = report(np.full(400, 30.0), np.full(400, -30.0))
    assert (found.accuracy.value, found.accuracy.high) == pytest.approx((1, 1), abs=1e-12)
    assert found.calibration_error == pytest.approx(0, abs=1e-12)
    assert found.brier == pytest.approx(0, abs=1e-12)
    assert found.verdict.beats_chance and found.verdict.beats_length and found.verdict.beats_words


def test_reversed_scores() -> None:
    found = report(np.full(400, -30.0), np.full(400, 30.0))
    assert (found.accuracy.value, found.accuracy.low) == pytest.approx((0, 0), abs=1e-12)
    assert found.calibration_error == pytest.approx(1)
    assert found.brier == pytest.approx(1)
    assert found.verdict.length_p_value < 1e-9, "significantly worse is not better"
    assert not (found.verdict.beats_chance or found.verdict.beats_length or found.verdict.beats_words)


def test_constant_scores_are_ties() -> None:
    found = report(np.full(400, 0.3), np.full(400, 0.3))
    assert found.accuracy.value == 0.5
    assert (found.calibration_error, found.brier) == (0.0, 0.25)
    assert (found.length_pearson, found.length_spearman) == (None, None)
    assert not found.verdict.beats_chance


def test_random_scores_beat_nothing() -> None:
    scores = np.random.default_rng(3).normal(size=(2, 2000))
    found = report(*scores)
    assert found.accuracy.low < 0.5 < found.accuracy.high
    assert abs(found.length_pearson or 1) < 0.05
    assert not found.verdict.beats_chance
    assert str(found.verdict) == "not shown to beat chance, length, words"


@pytest.mark.parametrize("longer_share", [0.8, 0.2])
def test_a_model_of_length_is_exposed(longer_share: float) -> None:
    held_out = pairs_of(500, seed=1, longer_share=longer_share)
    training = pairs_of(300, seed=2, longer_share=longer_share)
    sign = 1 if longer_share > 0.5 else -1
    scores = (sign * 0.1 * tokens for tokens in (held_out.tokens_chosen_N, held_out.tokens_rejected_N))
    found = report_of(*scores, held_out=held_out, training=training)
    assert found.length_pearson == pytest.approx(sign)
    assert found.length_spearman == pytest.approx(sign)
    assert found.longer_wins is (sign == 1)
    assert found.accuracy == found.length_baseline
    assert found.verdict.beats_chance
    assert (found.verdict.beats_length, found.verdict.length_p_value) == (False, 1.0)


def test_the_direction_of_length_is_learnt_on_the_training_pairs() -> None:
    held_out, training = pairs_of(300, seed=1, longer_share=1.0), pairs_of(300, seed=2, longer_share=0.0)
    found = report_of(np.ones(300), np.zeros(300), held_out=held_out, training=training)
    assert not longer_wins(training)
    assert found.length_baseline.value == 0.0


def test_words_that_tell_the_answer_are_found() -> None:
    held_out, training = pairs_of(200, seed=1, good="Please"), pairs_of(200, seed=2, good="please")
    found = report_of(np.ones(200), np.zeros(200), held_out=held_out, training=training)
    assert found.words_baseline.value > 0.99
    assert found.words == len(WORDS) + 1
    assert found.verdict.beats_chance and not found.verdict.beats_words


def test_words_without_a_sign_are_chance_and_strongly_regularised() -> None:
    found = report(np.ones(2000), np.zeros(2000))
    assert abs(found.words_baseline.value - 0.5) < 0.05
    assert found.words_strength >= 0.1


def test_the_words_baseline_is_the_minimum_of_its_loss() -> None:
    """One word, d = log 2 in every pair: the gradient strength w - d sigmoid(-w d) is 0."""
    training = Pairs(["yes"] * 40, ["maybe"] * 40, np.ones(40), np.ones(40))
    baseline = WordsBaseline.fitted(training, seed=0)
    weights = dict(zip(baseline.vocabulary, baseline.weights_W.tolist(), strict=True))
    difference = math.log(2)
    for word, side in (("yes", 1), ("maybe", -1)):
        logit = (weights["yes"] - weights["maybe"]) * difference
        wanted = side * difference / (1 + math.exp(logit)) / baseline.strength
        assert weights[word] == pytest.approx(wanted, rel=1e-3)


def test_the_words_baseline_is_deterministic_and_keeps_only_words_of_two_pairs() -> None:
    training = Pairs(["a a b", "a c", "d d d"], ["", "x", "x"], np.ones(3), np.ones(3))
    first, second = (WordsBaseline.fitted(training, seed=5) for _ in range(2))
    assert list(first.vocabulary) == ["a", "x"]
    assert first.weights_W.equal(second.weights_W)


def test_words_never_seen_and_single_pairs_are_ties() -> None:
    alone = Pairs(["one"], ["two"], np.array([3]), np.array([3]))
    found = report_of(np.array([1.0]), np.array([0.0]), held_out=alone, training=alone)
    assert found.words == 0
    assert found.words_baseline.value == found.length_baseline.value == 0.5
    assert found.verdict.words_p_value == 1.0


def test_scores_drawn_from_the_model_are_calibrated() -> None:
    """P(chosen wins) is sigmoid(difference) by construction; twice too sure is told."""
    random = np.random.default_rng(0)
    differences = random.normal(scale=2, size=200_000)
    p = 1 / (1 + np.exp(-differences))
    differences *= np.where(random.random(len(p)) < p, 1, -1)
    assert calibration_error(differences) < 0.005
    assert calibration_error(2 * differences) > 0.05
    assert calibration_error(differences / 2) > 0.05


def test_calibration_by_hand() -> None:
    """Three pairs at p = 0.75, two of them right: both orders give |2/3 - 3/4| in their bins."""
    difference = math.log(3)
    assert calibration_error(np.array([difference, difference, -difference])) == pytest.approx(1 / 12)


def test_accuracy_counts_ties_half() -> None:
    assert credits_of(np.array([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]


def test_correlations_by_hand() -> None:
    assert ranks_of(np.array([10, 20, 20, 5])).tolist() == [2, 3.5, 3.5, 1]
    assert pearson(np.array([1.0, 2, 3]), np.array([1.0, 2, 4])) == pytest.approx(9 / math.sqrt(84))
    assert pearson(np.array([1e300, 2e300]), np.array([1e-300, 2e-300])) == pytest.approx(1)
    values = np.arange(50.0)
    assert pearson(ranks_of(np.exp(values)), ranks_of(values)) == pytest.approx(1)


def test_every_figure_is_json() -> None:
    random = np.random.default_rng(0)
    found = report(random.normal(1, size=300).astype(np.float32), random.normal(size=300).astype(np.float32))
    figures = found.as_json()
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["accuracy_low"] == found.accuracy.low and len(figures) == 22


def test_what_cannot_be_reported_is_an_error() -> None:
    pairs, none = pairs_of(3, seed=1), Pairs([], [], np.array([]), np.array([]))
    with pytest.raises(DataError, match="held-out pairs and got none"):
        report_of(np.array([]), np.array([]), held_out=none, training=pairs)
    with pytest.raises(DataError, match="training pairs and got none"):
        report_of(np.ones(3), np.ones(3), held_out=pairs, training=none)
    with pytest.raises(TrainingFailed, match="2 of 6 scores"):
        report_of(np.array([1, np.nan, 1]), np.array([1, 1, -np.inf]), held_out=pairs, training=pairs)
