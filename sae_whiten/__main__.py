"""`python -m sae_whiten` is the command `sae-whiten`."""

import sys

from sae_whiten.cli import main

if __name__ == "__main__":
    sys.exit(main())
