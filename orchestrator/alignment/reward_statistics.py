"""How far a reward model's scores of held-out pairs can be trusted; N pairs, W words; must not import launchers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from orchestrator.errors import DataError, TrainingFailed
from orchestrator.training.correlations import pearson, spearman

NUM_BINS = 10
SIGNIFICANCE = 0.05
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""L2 regularisation strengths to try, the strongest first: it wins a tie."""
_NORMAL_QUANTILE_975 = 1.959963984540054


@dataclass(frozen=True)
class Pairs:
    """Pairs of answers to the same prompts, in the same order."""

    chosen: Sequence[str]
    rejected: Sequence[str]
    tokens_chosen_N: np.ndarray
    tokens_rejected_N: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)


@dataclass(frozen=True)
class Rate:
    """A share of pairs, ties counting half, and its 95 % Wilson interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Verdict:
    """What the accuracy proves on these pairs; p-values are two-sided and exact (McNemar)."""

    beats_chance: bool
    """The lower end of the accuracy's interval is above 0.5."""
    beats_length: bool
    length_p_value: float
    beats_words: bool
    words_p_value: float

    def __str__(self) -> str:
        beaten = {"chance": self.beats_chance, "length": self.beats_length, "words": self.beats_words}
        wins, others = (", ".join(name for name in beaten if beaten[name] is wanted) for wanted in (True, False))
        return "; ".join([f"beats {wins}"] * bool(wins) + [f"not shown to beat {others}"] * bool(others))


@dataclass(frozen=True)
class RewardReport:
    """The health of a reward model on held-out pairs. A correlation is None where scores or lengths are all equal."""

    pairs: int
    accuracy: Rate
    calibration_error: float
    """Expected calibration error of sigmoid(score difference), in [0, 1]."""
    brier: float
    """Mean squared error of sigmoid(score difference), in [0, 1]; 0.25 for a model that knows nothing."""
    length_pearson: float | None
    length_spearman: float | None
    longer_wins: bool
    """Which length the training pairs prefer; the length baseline predicts it."""
    length_baseline: Rate
    words_baseline: Rate
    words: int
    """Size of the bag-of-words baseline's vocabulary."""
    words_strength: float
    """Its L2 regularisation strength, chosen on a fifth of the training pairs."""
    verdict: Verdict

    def as_json(self) -> dict[str, float | int | bool | None]:
        """Every figure under one flat name, as JSON types."""
        figures: dict[str, float | int | bool | None] = {}
        for name, value in vars(self).items():
            if isinstance(value, Rate):
                figures |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            else:
                figures |= vars(value) if isinstance(value, Verdict) else {name: value}
        return figures


def report_of(
    scores_chosen_N: np.ndarray, scores_rejected_N: np.ndarray, *, held_out: Pairs, training: Pairs, seed: int = 0
) -> RewardReport:
    """The report on a model's scores of the held-out pairs; the baselines are fitted on the training pairs.

    Raises DataError if there are no pairs and TrainingFailed if a score is not finite.
    """
    _check(scores_chosen_N, scores_rejected_N, held_out=held_out, training=training)
    chosen_N, rejected_N = scores_chosen_N.astype(np.float64), scores_rejected_N.astype(np.float64)
    scores_2N = np.concatenate([chosen_N, rejected_N])
    tokens_2N = np.concatenate([held_out.tokens_chosen_N, held_out.tokens_rejected_N]).astype(np.float64)
    longer = longer_wins(training)
    words = WordsBaseline.fitted(training, seed=seed)
    credits_N = credits_of(chosen_N - rejected_N)
    accuracy = rate_of(credits_N)
    length_credits_N = credits_of(_extra_tokens(held_out) * (1 if longer else -1))
    words_credits_N = credits_of(words.differences_of(held_out))
    return RewardReport(
        pairs=len(held_out),
        accuracy=accuracy,
        calibration_error=calibration_error(chosen_N - rejected_N),
        brier=float(np.mean((1 - torch.sigmoid(torch.from_numpy(chosen_N - rejected_N)).numpy()) ** 2)),
        length_pearson=pearson(scores_2N, tokens_2N),
        length_spearman=spearman(scores_2N, tokens_2N),
        longer_wins=longer,
        length_baseline=rate_of(length_credits_N),
        words_baseline=rate_of(words_credits_N),
        words=len(words.vocabulary),
        words_strength=words.strength,
        verdict=Verdict(accuracy.low > 0.5, *_beats(credits_N, length_credits_N), *_beats(credits_N, words_credits_N)),
    )


def credits_of(differences_N: np.ndarray) -> np.ndarray:
    """1 where the chosen answer scores higher, 0 where it scores lower, 0.5 for a tie."""
    return (np.sign(differences_N) + 1) / 2


def rate_of(credits_N: np.ndarray) -> Rate:
    return Rate(float(np.mean(credits_N)), *wilson_interval(float(np.sum(credits_N)), len(credits_N)))


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927); `successes` may hold halves."""
    share, z = successes / trials, _NORMAL_QUANTILE_975
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mcnemar_p_value(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """Two-sided exact p-value that two raters of the same pairs are equally good (McNemar 1947, binomial form).

    Only pairs with different credits count; where one rater ties (0.5), the other wins if right and loses if wrong.
    """
    wins, losses = int(np.sum(first_N > second_N)), int(np.sum(first_N < second_N))
    trials, term, tail = wins + losses, 1, 0
    for count in range(min(wins, losses) + 1):
        tail += term
        term = term * (trials - count) // (count + 1)
    return min(1.0, 2 * tail / 2**trials)


def calibration_error(differences_N: np.ndarray, *, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 5) of sigmoid(chosen - rejected).

    Every pair counts in both orders (p and right, 1 - p and wrong): if only chosen - rejected counted, every outcome
    would be "right", and there would be nothing to calibrate against.
    """
    p_2N = torch.sigmoid(torch.from_numpy(np.concatenate([differences_N, -differences_N]))).numpy()
    right_2N = np.repeat([1.0, 0.0], len(differences_N))
    bins_2N = np.minimum((p_2N * num_bins).astype(np.int64), num_bins - 1)
    gaps = np.bincount(bins_2N, weights=right_2N - p_2N, minlength=num_bins)
    return float(np.sum(np.abs(gaps)) / len(p_2N))


def longer_wins(training: Pairs) -> bool:
    """Whether the longer answer was chosen at least as often as the shorter one."""
    return bool(np.sum(np.sign(_extra_tokens(training))) >= 0)


@dataclass(frozen=True)
class WordsBaseline:
    """Logistic regression on the difference of log(1 + count) of each word: how far one gets without understanding."""

    vocabulary: dict[str, int]
    weights_W: torch.Tensor
    strength: float

    @classmethod
    def fitted(cls, training: Pairs, *, seed: int) -> WordsBaseline:
        """Weights for words in at least 2 training pairs; the strength is selected on a fifth of the pairs."""
        counted = _counted(training)
        seen = Counter(word for differences in counted for word in differences)
        vocabulary = {word: i for i, word in enumerate(sorted(word for word in seen if seen[word] >= 2))}
        order = np.random.default_rng(seed).permutation(len(counted))
        parts = np.split(order, [len(counted) // 5])
        validation_NW, fit_NW = (_features([counted[i] for i in part], vocabulary) for part in parts)

        def validation_loss(strength: float) -> float:
            return float(functional.softplus(-(validation_NW @ _fit(fit_NW, strength))).mean())

        best = min(STRENGTHS, key=validation_loss) if len(parts[0]) and vocabulary else STRENGTHS[0]
        return cls(vocabulary, _fit(_features(counted, vocabulary), best), best)

    def differences_of(self, pairs: Pairs) -> np.ndarray:
        """Score of the chosen minus score of the rejected answer, N float64 numbers."""
        return (_features(_counted(pairs), self.vocabulary) @ self.weights_W).numpy()


def _counted(pairs: Pairs) -> list[dict[str, float]]:
    """For each pair log(1 + count in chosen) - log(1 + count in rejected) of every word of either answer."""
    counts = ([Counter(re.findall(r"\w+", text.lower())) for text in texts] for texts in (pairs.chosen, pairs.rejected))
    return [
        {word: math.log((1 + chosen[word]) / (1 + rejected[word])) for word in sorted(chosen | rejected)}
        for chosen, rejected in zip(*counts, strict=True)
    ]


def _features(counted: Sequence[dict[str, float]], vocabulary: dict[str, int]) -> torch.Tensor:
    """The differences as a sparse float64 matrix of N rows and W columns."""
    entries = [
        (row, vocabulary[word], value)
        for row, differences in enumerate(counted)
        for word, value in differences.items()
        if value and word in vocabulary
    ]
    table_E3 = torch.tensor(entries, dtype=torch.float64).reshape(-1, 3)
    indices_2E = table_E3[:, :2].t().long()
    size = (len(counted), len(vocabulary))
    return torch.sparse_coo_tensor(indices_2E, table_E3[:, 2], size, check_invariants=True).coalesce()


def _fit(features_NW: torch.Tensor, strength: float) -> torch.Tensor:
    """The weights that minimise mean log loss + strength / 2 |weights|²: convex, from zero, so the same every time."""
    transposed_WN = features_NW.t().coalesce()
    weights_W = torch.zeros(features_NW.shape[1], dtype=torch.float64)
    limits = {"max_iter": 200, "history_size": 20, "tolerance_grad": 1e-8, "tolerance_change": 1e-12}
    optimizer = torch.optim.LBFGS([weights_W], line_search_fn="strong_wolfe", **limits)

    def closure() -> torch.Tensor:
        logits_N = features_NW @ weights_W
        weights_W.grad = strength * weights_W - transposed_WN @ torch.sigmoid(-logits_N) / len(logits_N)
        return functional.softplus(-logits_N).mean() + strength / 2 * weights_W @ weights_W

    if len(weights_W):
        optimizer.step(closure)
    return weights_W


def _extra_tokens(pairs: Pairs) -> np.ndarray:
    return pairs.tokens_chosen_N.astype(np.float64) - pairs.tokens_rejected_N.astype(np.float64)


def _beats(credits_N: np.ndarray, baseline_N: np.ndarray) -> tuple[bool, float]:
    p_value = mcnemar_p_value(credits_N, baseline_N)
    return bool(p_value < SIGNIFICANCE and credits_N.mean() > baseline_N.mean()), p_value


def _check(scores_chosen_N: np.ndarray, scores_rejected_N: np.ndarray, *, held_out: Pairs, training: Pairs) -> None:
    for name, pairs in (("held-out", held_out), ("training", training)):
        if not len(pairs):
            raise DataError(
                f"a reward report needs {name} pairs and got none: give more data or another held-out share"
            )
        sizes = {len(pairs.chosen), len(pairs.rejected), len(pairs.tokens_chosen_N), len(pairs.tokens_rejected_N)}
        assert sizes == {len(pairs)}, f"{name} pairs of unequal lengths: {sizes}"
    assert scores_chosen_N.shape == scores_rejected_N.shape == (len(held_out),)
    if num_bad := int(np.sum(~np.isfinite([scores_chosen_N, scores_rejected_N]))):
        raise TrainingFailed(f"{num_bad} of {2 * len(held_out)} scores of held-out answers are not finite numbers")
