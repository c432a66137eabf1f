"""Agreement of firing, on cases whose answer is known."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from scipy.sparse import csr_array

from sae_whiten.evaluation.firing import firing_agreement, held_out_firing
from sae_whiten.evaluation.tokens import Reading
from tests.support import tiny_model


def random_firing(seed: int, n: int = 3000, d_sae: int = 40, rate: float = 0.05) -> csr_array:
    return csr_array(np.random.default_rng(seed).random((n, d_sae)) < rate)


@pytest.mark.parametrize("d_sae", [40, 1030])  # correlations of 1024 latents at a time
def test_latents_that_fire_together_in_another_order_agree_wholly(d_sae):
    first = random_firing(0, d_sae=d_sae)
    second = first[:, np.random.default_rng(1).permutation(d_sae)]
    a, b = firing_agreement([first, second])
    assert a == b
    assert a.value == pytest.approx(1, abs=1e-6)
    assert a.null < 0.1


def test_latents_that_fire_independently_reach_the_null():
    for found in firing_agreement([random_firing(seed) for seed in range(3)]):
        assert found.value == pytest.approx(found.null, abs=0.01)
        assert found.value > 0  # the best matching is above chance


def test_agreement_is_the_best_matching_of_correlations_over_the_other_seeds():
    firing = [random_firing(seed, n=200, d_sae=5, rate=0.4) for seed in range(3)]
    found = firing_agreement(firing)

    def best(i: int, j: int) -> float:
        dense = np.hstack([firing[i].toarray(), firing[j].toarray()]).astype(float)
        correlations = np.corrcoef(dense.T)[:5, 5:]
        return max(
            float(correlations[range(5), order].mean())
            for order in itertools.permutations(range(5))
        )

    assert found[0].value == pytest.approx((best(0, 1) + best(0, 2)) / 2, abs=1e-6)
    assert found[1].value == pytest.approx((best(0, 1) + best(1, 2)) / 2, abs=1e-6)


def test_latents_that_never_or_always_fire_count_as_zero():
    first = random_firing(0, d_sae=4).toarray()
    first[:, 0], first[:, 1] = False, True
    (a, _) = firing_agreement([csr_array(first), csr_array(first)])
    assert a.value == pytest.approx(0.5, abs=1e-6)


def test_what_has_nothing_to_agree_with_is_refused():
    with pytest.raises(ValueError, match="firing of 1 SAEs"):
        firing_agreement([random_firing(0)])
    with pytest.raises(ValueError, match="on the same tokens"):
        firing_agreement([random_firing(0), random_firing(0, n=10)])


def test_firing_is_read_on_the_tokens_that_are_not_left_out():
    model = tiny_model()
    tokens = torch.randint(0, model.cfg.d_vocab, (3, 8), generator=torch.Generator().manual_seed(0))
    sae = SAE.from_dict(
        {
            "architecture": "standard",
            "d_in": model.cfg.d_model,
            "d_sae": 24,
            "metadata": {
                "hook_name": "blocks.0.hook_resid_post",
                "context_size": 8,
                "exclude_special_tokens": [int(tokens[0, 3])],
            },
        }
    )
    dataset = Dataset.from_dict({"tokens": tokens.tolist()})
    firing = held_out_firing({"sae": sae}, model, dataset, 24, Reading(8, False, 2))
    _, cache = model.run_with_cache(tokens)
    kept = tokens != tokens[0, 3]
    expected = sae.encode(cache["blocks.0.hook_resid_post"][kept]) != 0
    assert not kept.all()
    assert expected.any()
    assert not expected.all()
    assert np.array_equal(firing["sae"].toarray(), expected.numpy())
