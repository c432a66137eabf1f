"""The directories that training writes: checkpoints and finished SAEs."""

import logging
from pathlib import Path

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME

from sae_whiten._files import recover

__all__ = ["is_complete_sae"]

logger = logging.getLogger(__name__)


def is_complete_sae(path: str | Path) -> bool:
    """Whether a folder holds an SAE, of which every part is there: whether SAELens loads it."""
    recover(path)
    if not (Path(path) / SAE_CFG_FILENAME).is_file():
        return False
    try:
        SAE.load_from_disk(path)
    except Exception as error:  # whatever it is, this is no SAE to go on with
        logger.warning("%s does not hold a whole SAE: %r", path, error)
        return False
    return True
