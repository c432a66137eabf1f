"""Errors of an estimation name the hook."""

import pytest

from sae_whiten._checks import FieldError
from sae_whiten.estimation.stopping import naming


def test_an_error_of_any_kind_keeps_its_kind_and_names_the_hook() -> None:
    expected = pytest.raises(FieldError, match=r"^blocks\.0: n_samples=0: too few")
    with expected as raised, naming("blocks.0"):
        raise FieldError("n_samples", 0, "too few")
    assert (raised.value.field, raised.value.value) == ("n_samples", 0)
    with pytest.raises(ValueError, match="^no hook has a name$"), naming(""):
        raise ValueError("no hook has a name")
