"""LoReFT and DiReFT (2404.03592): interventions on the hidden states of prompt tokens, for any transformers decoder.

N intervened positions, R rank, W hidden size; B rows of T positions. An intervention is a module of its layer, run
in a forward hook, which gradient checkpointing leaves outside: none of it is computed twice.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from orchestrator.config.tuning import LoreftTuning
from orchestrator.errors import CheckpointError, ConfigError

SETTINGS, WEIGHTS = "reft_config.json", "reft.safetensors"
FIRST, LAST = "first", "last"
Site = Literal["first", "last"]
Variant = Literal["loreft", "direft"]


class Intervention(nn.Module):
    """The term added to a hidden state h. fp32 inside, whatever the model's dtype; 2 R W + R parameters.

    loreft: R^T (W h + b - R h), equation 3, where R is `rotation` with orthonormalised rows. W starts as R and b as
    0, so nothing is added before the first step. direft: W2^T (W1 h + b), equation 4, with W2 = 0 at first.
    """

    def __init__(self, hidden: int, rank: int, *, variant: Variant, dropout: float) -> None:
        super().__init__()
        self.variant: Variant = variant
        rows_RW = orthonormal_RW(torch.randn(rank, hidden)).contiguous()
        self.rotation = nn.Parameter(rows_RW if variant == "loreft" else torch.zeros(rank, hidden))
        self.weight = nn.Parameter((orthonormal_RW(rows_RW) if variant == "loreft" else rows_RW).clone().contiguous())
        self.bias = nn.Parameter(torch.zeros(rank))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_NW: torch.Tensor) -> torch.Tensor:
        """The term to add, fp32."""
        with torch.autocast(hidden_NW.device.type, enabled=False):
            wide_NW, rotation_RW = hidden_NW.float(), self.rotation.float()
            weight_RW = self.weight.float()
            if self.variant == "loreft":
                rotation_RW = orthonormal_RW(rotation_RW)
                weight_RW = weight_RW - rotation_RW
            low_NR = functional.linear(wide_NW, weight_RW, self.bias.float())
            return self.dropout(low_NR @ rotation_RW)


def orthonormal_RW(rows_RW: torch.Tensor) -> torch.Tensor:
    """The same row space with orthonormal rows: L^-1 Q where L L^T = Q Q^T (Gram-Schmidt). fp32.

    torch's own parametrisation has no kernel for 16-bit parameters, which DeepSpeed makes, and has a buffer that is not
    among the trained parameters; already orthonormal rows are returned unchanged.
    """
    lower_RR = torch.linalg.cholesky(rows_RW @ rows_RW.T)
    return torch.linalg.solve_triangular(lower_RR, rows_RW, upper=False)


@dataclass(kw_only=True)
class Reft:
    """The interventions of one model: where they act in the current forward pass, and whether they do."""

    settings: LoreftTuning
    layers: tuple[int, ...]
    positions: Mapping[Site, torch.Tensor] | None = None
    """Flat indices into B x T; None if no token belongs to a prompt: a generation step with a cache."""
    is_on: bool = True


def attach_reft(model: Any, settings: LoreftTuning) -> None:
    """Add interventions to a causal model and freeze its other parameters. ConfigError if a layer does not exist.

    Its forward pass takes the prompts from the `Query`; without one a row's prompt is all its real tokens.
    """
    model.requires_grad_(False)
    layers = _decoder_layers(model)
    chosen = tuple(range(len(layers))) if settings.layers == "all" else settings.layers
    beyond = sorted(number for number in chosen if number >= len(layers))
    if beyond:
        raise ConfigError(f"tuning.layers: {beyond}, but the {len(layers)} layers are numbered 0 to {len(layers) - 1}")
    reft = Reft(settings=settings, layers=chosen)
    hidden = model.config.get_text_config().hidden_size
    for number in chosen:
        layers[number].reft = nn.ModuleDict({site: _intervention(hidden, settings) for site in sites_of(settings)})
        layers[number].reft.to(next(layers[number].parameters()).device)
        layers[number].register_forward_hook(functools.partial(_intervene, reft))
    model.__class__ = _reading_class(type(model))
    model.reft = reft


def sites_of(settings: LoreftTuning) -> tuple[Site, ...]:
    """The interventions of one layer."""
    wanted: tuple[tuple[Site, int], ...] = ((FIRST, settings.first_positions), (LAST, settings.last_positions))
    sites: tuple[Site, ...] = tuple(site for site, count in wanted if count)
    return sites[:1] if settings.share_weights else sites


def _intervention(hidden: int, settings: LoreftTuning) -> Intervention:
    return Intervention(hidden, settings.rank, variant=settings.variant, dropout=settings.dropout)


def _decoder_layers(model: Any) -> nn.ModuleList:
    """The list of a model's decoder layers; ConfigError if it cannot be found."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise ConfigError(
            f"tuning=loreft: {type(model).__name__} has no list of {count} layers; use tuning=lora for this model"
        )
    return lists[0]


def _intervene(reft: Reft, layer: Any, _inputs: Any, output: Any) -> Any:
    if not reft.is_on or reft.positions is None:
        return output
    hidden_BTW = output[0] if isinstance(output, tuple) else output
    flat = hidden_BTW.reshape(-1, hidden_BTW.shape[-1])
    for site, intervention in layer.reft.items():
        positions_N = reft.positions[site]
        added_NW = intervention(flat.index_select(0, positions_N)).to(flat.dtype)
        flat = flat.index_add(0, positions_N, added_NW)
    changed = flat.view(hidden_BTW.shape)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _reading_class(original: type) -> type:
    """A class of the same name whose forward pass determines the prompt positions before its layers run."""

    @functools.wraps(original.forward)  # generate() reads the signature
    def forward(self: Any, *arguments: Any, **inputs: Any) -> Any:
        self.reft.positions = _site_positions(self.reft.settings, arguments, inputs)
        return original.forward(self, *arguments, **inputs)

    members = {"forward": forward, "disable_adapter": _switched_off, "__module__": original.__module__}
    return type(original.__name__, (original,), members)


@contextmanager
def _switched_off(self: Any) -> Generator[None]:
    """The base model inside this block; named as in PEFT."""
    before, self.reft.is_on = self.reft.is_on, False
    try:
        yield
    finally:
        self.reft.is_on = before


def _site_positions(
    settings: LoreftTuning, arguments: Sequence[Any], inputs: Mapping[str, Any]
) -> dict[Site, torch.Tensor] | None:
    tokens = inputs.get("input_ids", arguments[0] if arguments else None)
    if tokens is None:
        tokens = inputs["inputs_embeds"][..., 0]
    query, cache = inputs.get("query"), inputs.get("past_key_values")
    if query is not None and query.prompts is not None:
        spans = [(span.sequence, span.start, span.stop) for span in query.prompts]
    elif cache is not None and cache.get_seq_length() > 0:
        return None
    else:
        spans = _whole_rows(tokens, inputs.get("attention_mask"))
    return {
        site: torch.tensor(positions, dtype=torch.int64, device=tokens.device)
        for site, positions in site_positions(spans, settings, width=tokens.shape[1]).items()
    }


def _whole_rows(tokens: torch.Tensor, mask: torch.Tensor | None) -> list[tuple[int, int, int]]:
    """The real tokens of every row, wherever its padding is."""
    if mask is None or mask.dim() != 2:
        return [(row, 0, tokens.shape[1]) for row in range(tokens.shape[0])]
    real = [row.nonzero().flatten().tolist() for row in mask.cpu()]
    return [(number, positions[0], positions[-1] + 1) for number, positions in enumerate(real) if positions]


def site_positions(
    prompts: Sequence[tuple[int, int, int]], settings: LoreftTuning, *, width: int
) -> dict[Site, list[int]]:
    """Flat positions of each site's tokens in rows of `width`, from prompts as (row, start, stop).

    A prompt shorter than both ends together is divided, the first end getting the odd token: none is changed twice.
    """
    found: dict[Site, list[int]] = {site: [] for site in sites_of(settings)}
    first_site, last_site = (next(iter(found)),) * 2 if len(found) == 1 else (FIRST, LAST)
    for row, start, stop in prompts:
        length, base = stop - start, row * width
        first = min(settings.first_positions, max(length - settings.last_positions, -(-length // 2)))
        last = min(settings.last_positions, length - first)
        found[first_site] += range(base + start, base + start + first)
        found[last_site] += range(base + stop - last, base + stop)
    return found


def save_reft_settings(model: Any, folder: Path) -> None:
    (folder / SETTINGS).write_text(json.dumps(model.reft.settings.model_dump(mode="json"), indent=2) + "\n")


def read_settings(folder: Path) -> LoreftTuning:
    """Read the settings of a folder that `save_reft_settings` wrote. Raises CheckpointError."""
    try:
        return LoreftTuning.model_validate_json((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / SETTINGS} is not a LoReFT configuration: {' '.join(str(error).split())[:300]}"
        ) from None


def load_reft(model: Any, folder: Path) -> None:
    """Load a folder's tensors into a model with the same interventions. CheckpointError if they do not match."""
    written = load_file(folder / WEIGHTS)
    wanted = {name: parameter for name, parameter in model.named_parameters() if ".reft." in name}
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in wanted.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in written.items()}:
        other = sorted(shapes.keys() ^ written.keys())
        raise CheckpointError(
            f"{folder}: its interventions are not those of tuning=loreft here: {other[:5] or 'shapes'}"
        )
    for name, parameter in wanted.items():
        parameter.data.copy_(written[name])
