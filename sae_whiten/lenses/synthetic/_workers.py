"""Setup of a worker process. Imports nothing, because libraries read these variables on import."""

import os

__all__ = ["start"]


def start() -> None:
    """Turn off progress bars, which the parent shows, and use one thread in each process."""
    os.environ["TQDM_DISABLE"] = "1"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
