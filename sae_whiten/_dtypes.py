"""Dtypes in which sums and differences do not lose digits."""

import torch
from jaxtyping import Shaped
from torch import Tensor

__all__ = ["as_float64", "float32_at_least"]


def as_float64(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """`x` in float64; moved to the CPU if it was on MPS, which has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


def float32_at_least(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """`x` in float32, or unchanged if its dtype is finer."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
