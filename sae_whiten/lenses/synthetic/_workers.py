"""What a worker process does first; imports nothing, for libraries read these when imported."""

import os

__all__ = ["start"]


def start() -> None:
    """No progress bars, which belong to the parent, and one thread for each process."""
    os.environ["TQDM_DISABLE"] = "1"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
