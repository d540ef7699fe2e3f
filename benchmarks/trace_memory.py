"""Purpose: the coefficients of the memory forecast, from traces of transformers' own modules (no GPU, no weights).
Command: python benchmarks/trace_memory.py [FAMILY ...]     (all families: a few minutes on one core, 1 GB of memory)
Writes orchestrator/estimate/coefficients/FAMILY.json.

Every tensor of a trace is small, but each dimension has a value of its own, so that its shape says what it is made of: 509 x 264
are N tokens x hidden width. The live bytes at every moment are therefore a polynomial in the model's dimensions, exact at any
width. Two depths give the base and the slope per layer. Of the moments only those are kept that can be the peak of some model.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
from polynomial_fit import DEPTHS, Moments, as_polynomial, chosen, negligible

import orchestrator
from orchestrator.architecture.families import FAMILIES
from orchestrator.config.model import Architecture
from orchestrator.config.tuning import LoraTuning
from orchestrator.models.tracing.live_bytes import Event, Precision, Trace, trace
from orchestrator.models.tracing.untrained_models import AttentionPath, Mode, build_model

FOLDER = Path(orchestrator.__file__).parent / "estimate" / "coefficients"
LENGTH, RANK = 509, 11


def dimensions(family: str, layers: int) -> Architecture:
    """Dimensions that can be told apart."""
    is_square = not family_of_type(family) or family in ("phi3",)
    has_groups = family not in ("gpt2", "gpt_neox", "bert")
    is_mixture = family in ("mixtral", "qwen3_moe")
    return Architecture(
        model_type=family,
        vocab_size=1019,
        hidden_size=480 if is_square else 264,
        intermediate_size=368,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4 if has_groups else 12,
        head_dim=40,
        tie_word_embeddings=False,
        num_experts=7 if is_mixture else 0,
        num_experts_per_token=5 if is_mixture else 0,
        attention_bias=False,
        feed_forward_bias=False,
        num_positions=600 if family in ("gpt2", "bert") else 0,
        sliding_window=None,
    )


def family_of_type(family: str) -> bool:
    return FAMILIES[family].gated


def symbols(model: Architecture) -> dict[int, tuple[str, ...]]:
    """Size of a dimension -> what it is."""
    mixture = model.num_experts > 0
    known: dict[int, tuple[str, ...]] = {
        LENGTH: ("N",), LENGTH + 1: ("N",), model.vocab_size: ("V",), model.intermediate_size: ("f",),
        2 * model.intermediate_size: ("f",), 12: ("H",), 40: ("D",), 20: ("D",), 10: ("D",), 30: ("D",), 120: ("D",),
        480: ("q",), 1440: ("q",), 160: ("k",), 800: ("q",), RANK: ("r",), 2 * RANK: ("r",), 4: ("K",),
    }  # fmt: skip
    known |= {model.hidden_size: ("h",)}
    if mixture:
        known |= {7: ("E",), 5: ("A",), 5 * LENGTH: ("N", "A"), 7 * RANK: ("r", "E"), 14 * RANK: ("r", "E")}
    else:
        known |= {5: ("D",)}
    if model.num_positions:
        known |= {model.num_positions: ("P",)}
    return known


def values(model: Architecture) -> dict[str, float]:
    return {
        "N": LENGTH, "V": model.vocab_size, "f": model.intermediate_size, "H": 12, "D": 40, "q": 480, "k": 160, "r": RANK,
        "K": 4, "h": model.hidden_size, "E": 7, "A": 5, "P": model.num_positions,
    }  # fmt: skip


def monomial(event: Event, model: Architecture) -> tuple[str, float]:
    """What a tensor's bytes grow with, and the factor."""
    names: list[str] = []
    for size in with_heads(event.shape):
        found = symbols(model).get(size)
        if found is None and size > 8:
            raise SystemExit(f"{model.model_type}: {event.operation} makes {event.shape}: what is {size}?")
        names += found or ()
    numbers = values(model)
    return ".".join(sorted(names)), event.bytes / float(np.prod([numbers[name] for name in names] or [1.0]))


def with_heads(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Keys that were repeated for the queries of their group: 4 heads x 3 are 12 heads."""
    places = [place for place in range(len(shape) - 1) if shape[place : place + 2] == (4, 3)]
    return shape if not places else (*shape[: places[0]], 12, *shape[places[0] + 2 :])


def timeline(events: Sequence[Event], model: Architecture, names: list[str]) -> np.ndarray:
    """Live bytes after every event, by monomial."""
    steps = np.zeros((len(events), 64))
    for place, event in enumerate(events):
        name, factor = monomial(event, model)
        if name not in names:
            names.append(name)
        steps[place, names.index(name)] += factor
    return np.cumsum(steps, axis=0)


def coefficients(family: str, mode: Mode) -> dict[str, Any]:
    """The polynomials of one way to train one family."""
    traces = [
        trace(lambda n=n: build_model(dimensions(family, n), mode), rows=1, length=LENGTH, precision=mode.precision)
        for n in DEPTHS
    ]
    names: list[str] = []
    model = dimensions(family, 2)
    small, large = ([timeline(part, model, names) for part in parts(one)] for one in traces)
    kinds = [[[event.bytes > 0 for event in part] for part in parts(one)] for one in traces]
    forward = aligned(small[0], large[0], kinds[0][0], kinds[1][0])
    backward, bottom = backward_windows(small, large, kinds)
    evaluation = aligned(small[2], large[2], kinds[0][2], kinds[1][2])
    kept = (small[0][-1], large[0][-1] - small[0][-1])
    return {
        "kept": as_polynomial(kept, names, negligible([kept], [0], names)),
        "forward": chosen(forward, names),
        "backward": chosen(backward, names),
        "bottom": chosen(bottom, names),
        "evaluation": chosen(evaluation, names),
    }


def parts(one: Trace) -> tuple[Sequence[Event], Sequence[Event], Sequence[Event]]:
    """Forward, all, evaluation."""
    return one.events[: one.logits], one.events, one.evaluation


def until_last_allocation(live: np.ndarray, is_new: list[bool]) -> tuple[np.ndarray, list[bool]]:
    end = len(is_new) - is_new[::-1].index(True)
    return live[:end], is_new[:end]


def common(one: list[bool], two: list[bool]) -> int:
    """Length of the longest common start."""
    pairs = zip(one, two, strict=False)
    return next((place for place, (left, right) in enumerate(pairs) if left != right), min(len(one), len(two)))


def aligned(small: np.ndarray, large: np.ndarray, one: list[bool], two: list[bool]) -> Moments:
    """Moments of two depths that are the same place of the last layer, or after it."""
    small, one = until_last_allocation(small, one)
    large, two = until_last_allocation(large, two)
    count = common(one[::-1], two[::-1])
    assert count >= len(large) - len(small), "the two depths do not do the same in their last layer"
    pairs = zip(small[-count:], large[-count:], one[-count:], strict=True)
    return [(base, more - base) for base, more, is_new in pairs if is_new]


def backward_windows(
    small: list[np.ndarray], large: list[np.ndarray], kinds: list[list[list[bool]]]
) -> tuple[Moments, Moments]:
    """Backward through the head and the last layer, seen from the logits; and through the first layer, seen from the end."""
    begin = [len(small[0]), len(large[0])]
    cut = [
        until_last_allocation(one[1][start:], kind[1][start:])
        for one, kind, start in zip((small, large), kinds, begin, strict=True)
    ]
    pair, new = [live for live, _ in cut], [is_new for _, is_new in cut]
    layer = len(pair[1]) - len(pair[0])
    layer_and_rest = min(common(new[0][::-1], new[1][::-1]), len(new[0]) - 1)
    head = min(common(new[0], new[1]), len(new[0]) - 1)
    assert head >= layer and layer_and_rest >= layer and head + layer_and_rest >= len(new[0]), (
        "the two depths do not do the same"
    )
    layer = layer_and_rest
    first = [
        (base, more - base)
        for base, more, is_new in zip(pair[0][:head], pair[1][:head], new[0][:head], strict=True)
        if is_new
    ]
    last = [
        (base, more - base)
        for base, more, is_new in zip(pair[0][-layer:], pair[1][-layer:], new[0][-layer:], strict=True)
        if is_new
    ]
    return first, last


def modes(family: str) -> Iterator[tuple[str, Mode]]:
    lora = LoraTuning(
        method="lora",
        rank=RANK,
        alpha=2.0 * RANK,
        dropout=0.0,
        target_modules="all-linear",
        use_rslora=False,
        use_dora=False,
        init="default",
        lora_plus_ratio=None,
    )
    mixture = dimensions(family, 2).num_experts > 0
    for tuning, settings in (("full", None), ("lora", lora)):
        for precision in ("autocast", "bfloat16", "adapters32", "float32"):
            if precision == "adapters32" and settings is None:
                continue
            if mixture and (precision == "float32" or (precision, tuning) == ("autocast", "full")):
                continue  # grouped matrix products are made for 16 bits
            for attention in ("sdpa", "masked", "eager"):
                if family == "gemma2" and attention != "eager":
                    continue  # soft caps of the scores: no fused kernel
                for checkpointing in (False, True):
                    mode = Mode(
                        precision=cast("Precision", precision),
                        checkpoint_every=int(checkpointing),
                        attention=cast("AttentionPath", attention),
                        lora=settings,
                    )
                    yield "/".join([tuning, precision, attention, "checkpointed" if checkpointing else "kept"]), mode


def main(families: Sequence[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for family in families or FAMILIES:
        made = {key: coefficients(family, mode) for key, mode in modes(family)}
        write(FOLDER / f"{family}.json", made)
        print(family, sum(len(moments) for table in made.values() for moments in table.values()), flush=True)


def write(file: Path, made: dict[str, Any]) -> None:
    """What several modes share is written once."""
    texts = {key: json.dumps(table, sort_keys=True, separators=(",", ":")) for key, table in made.items()}
    tables = sorted(set(texts.values()))
    lines = ",\n".join(tables)
    places = json.dumps({key: tables.index(text) for key, text in sorted(texts.items())}, indent=0)
    versions = json.dumps({name: metadata.version(name) for name in ("torch", "transformers", "peft")})
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'{{"versions": {versions},\n"modes": {places},\n"tables": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
