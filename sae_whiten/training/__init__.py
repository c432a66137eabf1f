"""SAELens' trainers and runners, training under whitening.

Raises:
    ImportError: The SAELens that is installed lacks what training relies on.
"""

from sae_whiten.training._saelens import check_saelens

check_saelens()
