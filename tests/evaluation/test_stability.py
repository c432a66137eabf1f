"""Agreement of dictionaries, on cases whose answer is known."""

import itertools

import pytest
import torch

from sae_whiten.evaluation.stability import stability
from tests.support import whitening_of


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def anisotropic(n: int = 4000, d: int = 16) -> torch.Tensor:
    x = torch.randn(n, d, generator=generator(9), dtype=torch.float64)
    return x * torch.logspace(0, -3, d, dtype=torch.float64)


def test_dictionaries_that_differ_in_order_sign_and_length_agree_wholly():
    first = torch.randn(20, 16, generator=generator(0))
    order = torch.randperm(20, generator=generator(1))
    second = first[order] * torch.linspace(-3, 2, 20)[:, None]
    a, b = stability([first, second], whitening_of(anisotropic()))
    assert (a.whitened, a.raw) == pytest.approx((1, 1), abs=1e-6)
    assert a == b


def test_random_dictionaries_reach_the_null_which_is_high_only_in_raw_cosines():
    whitening = whitening_of(anisotropic())
    dictionaries = [
        torch.randn(64, 16, generator=generator(i), dtype=torch.float64) @ whitening.W_inv
        for i in range(3)
    ]
    for found in stability(dictionaries, whitening):
        assert found.whitened == pytest.approx(found.whitened_null, abs=0.03)
        assert found.raw == pytest.approx(found.raw_null, abs=0.03)
        assert found.raw_null > found.whitened_null + 0.2


def test_agreement_is_the_best_matching_averaged_over_the_other_seeds():
    whitening = whitening_of(anisotropic(d=5))
    dictionaries = [
        torch.randn(5, 5, generator=generator(i), dtype=torch.float64) for i in (1, 2, 3)
    ]
    found = stability(dictionaries, whitening)

    def best(i: int, j: int) -> float:
        a, b = (torch.nn.functional.normalize(dictionaries[k] @ whitening.W, dim=1) for k in (i, j))
        cosines = (a @ b.T).abs()
        sums = (
            sum(float(cosines[row, column]) for row, column in enumerate(order))
            for order in itertools.permutations(range(5))
        )
        return max(sums) / 5

    assert found[0].whitened == pytest.approx((best(0, 1) + best(0, 2)) / 2, abs=1e-6)
    assert found[2].whitened == pytest.approx((best(0, 2) + best(1, 2)) / 2, abs=1e-6)


def test_what_has_nothing_to_agree_with_is_refused():
    whitening = whitening_of(anisotropic())
    one = torch.eye(16)
    with pytest.raises(ValueError, match="1 dictionaries"):
        stability([one], whitening)
    with pytest.raises(ValueError, match="of the same shape"):
        stability([one, one[:3]], whitening)
