"""`python -m sae_whiten` is `sae-whiten`."""

import sys

from sae_whiten.cli import main

if __name__ == "__main__":
    sys.exit(main())
