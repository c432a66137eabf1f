"""Losses of an SAE in whitened coordinates, measured in the original space.

Let e = z_hat - z be the error in whitened coordinates. The squared error in the original space is
|e @ W_inv|^2. For pca this is sum_i l~_i^a e_i^2, an elementwise weight. Every reconstruction term
is measured like this: the main loss, the inner losses of Matryoshka SAEs and the auxiliary losses.
Residuals are mapped in the same way; the mean cancels. Saraswatula & Klindt, arXiv 2511.13981.

Sparsity penalties weight latents by the norms of decoder rows d_j. `sparsity_norms="whitened"`
means |d_j|, as in SAELens. "original" means |d_j @ W_inv|, the norms of the folded decoder.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_whiten._dtypes import float32_at_least
from sae_whiten.whitening import Whitening, full_precision

__all__ = ["ReconstructionMetric", "SparsityNorms", "ranking_norms"]


class ReconstructionMetric:
    """Squared error between whitened activations, measured in the configured space.

    The error is scaled such that predicting the mean costs d_in on average. The factor is
    d / sum(l~) in the original space and d / sum(l~^(1-a)) in whitened space (1 for full
    whitening). Learning rates, sparsity coefficients and gradient clipping therefore carry over
    between the spaces. (In l~, directions without variance have the average eigenvalue. If there
    are any, predicting the mean costs less than d_in.)

    Examples:
        >>> from sae_whiten import ActivationStatistics
        >>> x = torch.randn(1000, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> statistics = ActivationStatistics(4)
        >>> statistics.update(x)
        >>> whitening = Whitening.from_statistics(statistics)
        >>> z = whitening.whiten(x)
        >>> loss = ReconstructionMetric(whitening, "cpu")(torch.zeros_like(z), z).sum(-1).mean()
        >>> round(float(loss), 1)
        4.0

    Args:
        whitening: The transform; its `config.loss_space` chooses the space.
        device: The device of the SAE.
    """

    def __init__(self, whitening: Whitening, device: torch.device | str) -> None:
        values, a = whitening.eigenvalues, whitening.strength
        if whitening.config.loss_space == "whitened":
            scale = values.numel() / values.pow(1 - a).sum()
            # no weights at strength 1, so that the loss is bit-identical to SAELens'
            self.weights = None if a == 1 else torch.full_like(values, float(scale))
            self.residual_map = None
        else:
            scale = values.numel() / values.sum()
            if whitening.kind == "pca":
                self.weights, self.residual_map = values.pow(a) * scale, None
            else:
                self.weights, self.residual_map = None, whitening.W_inv * scale.sqrt()
        self.weights = None if self.weights is None else self.weights.float().to(device)
        if self.residual_map is not None:
            self.residual_map = self.residual_map.float().to(device)

    def __call__(
        self, preds: Float[Tensor, "*batch d_in"], target: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_in"]:
        """Elementwise contributions to the squared error; sum them over the last dimension.

        Args:
            preds: Reconstructions in whitened coordinates.
            target: Whitened activations.

        Returns:
            The contributions, in float32 or better. SAELens' own metric keeps the dtype.
        """
        mse = torch.nn.functional.mse_loss
        if self.weights is not None:
            dtype = torch.promote_types(preds.dtype, torch.float32)
            return mse(preds.to(dtype), target.to(dtype), reduction="none").mul_(self.weights)
        if self.residual_map is None:
            dtype = torch.promote_types(preds.dtype, target.dtype)  # PyTorch 2.6 needs one dtype
            return mse(preds.to(dtype), target.to(dtype), reduction="none")
        with full_precision(preds.device):
            residual_map = self.residual_map
            dtype = torch.promote_types(preds.dtype, residual_map.dtype)
            error = (preds.to(dtype) - target.to(dtype)) @ residual_map.to(dtype)
            # bit-identical to error.square(), whose backward pass makes three copies of error
            return mse(error, error.new_zeros(()).expand_as(error), reduction="none")


class SparsityNorms:
    """Norms of decoder rows in the space of the original activations, |d_j @ W_inv|.

    The norms are scaled by the root of d / tr(W_inv W_inv^T). Averaged over all directions, the
    squared norm is then the same as in whitened space, and penalties keep their magnitude.

    Examples:
        >>> from sae_whiten import ActivationStatistics, WhiteningConfig
        >>> statistics = ActivationStatistics(2)
        >>> statistics.update(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0], [0.0, -4.0]]))
        >>> config = WhiteningConfig(eps=0.0, shrinkage=0.0)
        >>> norms = SparsityNorms(Whitening.from_statistics(statistics, config))
        >>> norms(torch.eye(2))  # the directions of smaller and of larger variance
        tensor([0.8485, 1.1314])

    Args:
        whitening: The transform.
    """

    def __init__(self, whitening: Whitening) -> None:
        gains = whitening.eigenvalues.pow(whitening.strength / 2)
        scale = gains.square().mean().rsqrt()
        # pca needs no rotation, because rotations preserve lengths
        self._map = scale * (gains if whitening.kind == "pca" else whitening.W_inv)
        self._casts: dict[Any, Tensor] = {}

    def __call__(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae"]:
        """The norms of the rows of a decoder in whitened coordinates, in the decoder's dtype."""
        dtype = torch.promote_types(W_dec.dtype, torch.float32)
        key = (W_dec.device, dtype)
        if key not in self._casts:
            self._casts[key] = self._map.to(dtype).to(W_dec.device)
        to_original = self._casts[key]
        with full_precision(W_dec.device):
            rows = W_dec.to(dtype)
            rows = rows * to_original if to_original.ndim == 1 else rows @ to_original
            return torch.linalg.vector_norm(rows, dim=-1).to(W_dec.dtype)


def ranking_norms(sae: Any, dtype: torch.dtype | None = None) -> Float[Tensor, "d_sae"]:
    """The decoder norms by which an SAE of the TopK family multiplies pre-activations to rank them.

    At least 1e-8, as in SAELens' `get_W_dec_norm`. All are 1 without
    `rescale_acts_by_decoder_norm`.

    Examples:
        >>> from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        >>> config = TopKTrainingSAEConfig(d_in=4, d_sae=3, k=1, rescale_acts_by_decoder_norm=True)
        >>> sae = TopKTrainingSAE(config)
        >>> sae.W_dec.data.fill_(2.0).shape
        torch.Size([3, 4])
        >>> ranking_norms(sae, torch.float64).tolist()
        [4.0, 4.0, 4.0]

    Args:
        sae: The SAE.
        dtype: Dtype to compute in, at least as fine as that of the weights, which is the default.
    """
    W_dec = sae.W_dec
    if not sae.cfg.rescale_acts_by_decoder_norm:
        return torch.ones(len(W_dec), dtype=dtype or W_dec.dtype, device=W_dec.device)
    # set while an SAE is trained with sparsity_norms="original"
    in_original_space = getattr(sae, "sparsity_norms", None)
    if in_original_space is not None:
        norms = in_original_space(float32_at_least(W_dec)).to(dtype or W_dec.dtype)
    elif dtype == torch.float64:
        # blocks of rows, because on a CPU the whole argument is converted first
        norms = torch.cat(
            [torch.linalg.vector_norm(rows, dim=-1, dtype=dtype) for rows in W_dec.split(128)]
        )
    else:
        norms = torch.linalg.vector_norm(W_dec, dim=-1, dtype=dtype)
    return norms.clamp(min=1e-8)
