"""The gradients kept by the chunked loss head: of -log p by bias, hidden states and weights; knows tensors only.

K trained tokens, C of them in a chunk, L of these in a block, W hidden size, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def scaled(gradients: Sequence[torch.Tensor | None], scale_K: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients of -log p by bias, hidden states, weights: scaled per token, or by one scale where summed over tokens.

    The sums are scaled in place: autograd refuses a second backward pass over them.
    """
    bias_V, *pairs = gradients
    hiddens, weights = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    scale_K1 = -scale_K.unsqueeze(1)
    by_hidden = [
        None if one_KW is None else torch.mul(one_KW, scale_K1, out=torch.empty_like(one_KW)) for one_KW in hiddens
    ]
    scale = -scale_K[0] if len(scale_K) else scale_K.new_zeros(())
    return [
        None if bias_V is None else bias_V.mul_(scale),
        *by_hidden,
        *(None if one is None else one.mul_(scale) for one in weights),
    ]


class HeadGradients:
    """Buffers for the requested gradients, to which each chunk of tokens is added; sums over tokens in fp32 or more."""

    def __init__(
        self,
        needs: Sequence[bool],
        bias_V: torch.Tensor | None,
        hiddens: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
    ) -> None:
        """`needs`: whether the bias, every hidden state and every weight need a gradient."""
        compute = hiddens[0].dtype
        # Sums over thousands of tokens: 16 bits would lose the later terms.
        precise, number = torch.promote_types(compute, torch.float32), len(hiddens)
        self._hiddens, self._weights = hiddens, weights
        self._bias_V = torch.zeros_like(bias_V, dtype=precise) if needs[0] else None  # pyright: ignore[reportArgumentType]  # a bias is there where it needs a gradient
        self._by_hidden = [
            torch.empty_like(hidden) if wanted else None
            for hidden, wanted in zip(hiddens, needs[1 : 1 + number], strict=True)
        ]
        self._by_weight = [
            torch.zeros_like(weight, dtype=precise) if wanted else None
            for weight, wanted in zip(weights, needs[1 + number :], strict=True)
        ]
        self._scratch = [
            None if one is None or one.dtype == compute else torch.empty_like(one, dtype=compute)
            for one in self._by_weight
        ]

    def add_bias(self, by_logits_LV: torch.Tensor) -> None:
        if self._bias_V is not None:
            self._bias_V += by_logits_LV.sum(0)

    def add(self, chunk: slice, by_products_CV: torch.Tensor) -> None:
        """Add the gradient of the negative log-probabilities by the products of a chunk, in the compute dtype."""
        for index, hidden_KW in enumerate(self._hiddens):
            if (gradient_KW := self._by_hidden[index]) is not None:
                torch.mm(by_products_CV, self._weights[index], out=gradient_KW[chunk])
            if (gradient_VW := self._by_weight[index]) is not None:
                _add_product(gradient_VW, by_products_CV.t(), hidden_KW[chunk], self._scratch[index])

    def as_types_of(self, bias_V: torch.Tensor | None, weights: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Gradients of the bias, of every hidden state and of every weight, each in the dtype of its tensor."""
        types = [None if bias_V is None else bias_V.dtype, *(hidden.dtype for hidden in self._hiddens)]
        types += [weight.dtype for weight in weights]
        found = [self._bias_V, *self._by_hidden, *self._by_weight]
        return [None if one is None else one.to(dtype) for one, dtype in zip(found, types, strict=True)]


def _add_product(
    sum_VW: torch.Tensor, left_VC: torch.Tensor, right_CW: torch.Tensor, scratch_VW: torch.Tensor | None
) -> None:
    """sum_VW += left_VC @ right_CW, through a buffer of the factors' dtype if that is not the sum's."""
    if scratch_VW is None:
        sum_VW.addmm_(left_VC, right_CW)
    else:
        sum_VW += torch.mm(left_VC, right_CW, out=scratch_VW)
