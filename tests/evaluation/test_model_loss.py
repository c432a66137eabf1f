"""Cross-entropy score and KL divergence on cases whose answer is known by hand."""

import math

import pytest
import torch

from sae_whiten.evaluation import model_loss as core
from sae_whiten.evaluation.model_loss import ce_loss_score, kl_divergence


def test_ce_loss_score() -> None:
    assert ce_loss_score(3.0, 3.0, 10.0) == 1
    assert ce_loss_score(3.0, 10.0, 10.0) == 0
    assert ce_loss_score(3.0, 4.75, 10.0) == 0.75
    assert ce_loss_score(3.0, 13.5, 10.0) == -0.5
    # an SAE may make a model better
    assert ce_loss_score(3.0, 2.3, 10.0) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ((3.0, 3.5, 3.0), "no loss to recover; is the language-modelling head trained"),
        ((11.2, 11.3, 11.1), "loss of 11.1 where the unchanged model has 11.2"),
        ((3.0, math.nan, 10.0), "ce_sae=nan: a cross-entropy is finite"),
        ((3.0, 4.0, math.inf), "ce_ablated=inf"),
        ((-0.1, 4.0, 5.0), "ce_clean=-0.1"),
    ],
)
def test_ce_loss_score_refuses(losses: tuple[float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ce_loss_score(*losses)


def test_kl_divergence_by_hand() -> None:
    half, quarter = math.log(0.5), math.log(0.25)
    logits = torch.tensor([[half, half], [half, half], [quarter, math.log(0.75)]])
    # a constant added to all logits of a token changes nothing
    sae_logits = torch.tensor([[7.0, 7.0], [quarter, math.log(0.75)], [half, half]])
    expected = [
        0.0,
        0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75),
        0.25 * math.log(0.5) + 0.75 * math.log(1.5),
    ]
    assert kl_divergence(logits, sae_logits).tolist() == pytest.approx(expected, abs=1e-7)


def test_kl_divergence_equals_that_of_torch_distributions() -> None:
    g = torch.Generator().manual_seed(0)
    logits, sae_logits = 5 * torch.randn(2, 3, 7, 11, generator=g, dtype=torch.float64)
    p, q = (torch.distributions.Categorical(logits=x) for x in (logits, sae_logits))
    expected = torch.distributions.kl_divergence(p, q)
    divergence = kl_divergence(logits, sae_logits)
    assert divergence.shape == (3, 7)
    torch.testing.assert_close(divergence, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_divergences_are_not_lost_in_rounding(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(20, 5000, generator=g)).to(dtype)
    sae_logits = logits.float() + 1e-3 * torch.randn(20, 5000, generator=g)
    # to second order half of the variance of the change, under p
    p, change = logits.double().softmax(-1), sae_logits.double() - logits.double()
    variance = (p * change**2).sum(-1) - (p * change).sum(-1) ** 2
    torch.testing.assert_close(kl_divergence(logits, sae_logits), variance / 2, rtol=1e-2, atol=0)


def test_blocks_do_not_change_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    logits, sae_logits = torch.randn(2, 4, 5, 6, generator=g)
    whole = kl_divergence(logits, sae_logits)
    monkeypatch.setattr(core, "_BLOCK", 7)
    assert torch.equal(kl_divergence(logits, sae_logits), whole)


def test_impossible_tokens() -> None:
    inf = math.inf
    logits = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, -inf], [0.0, 0.0, 0.0]])
    sae_logits = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, 0.0], [0.0, 0.0, -inf]])
    expected = [0, math.log(1.5), inf]
    assert kl_divergence(logits, sae_logits).tolist() == pytest.approx(expected, abs=1e-12)
