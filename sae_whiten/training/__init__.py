"""SAELens' trainers and runners, for training under whitening.

Raises:
    ImportError: The installed SAELens lacks methods that training relies on.
"""

from sae_whiten.training._saelens import check_saelens

check_saelens()
