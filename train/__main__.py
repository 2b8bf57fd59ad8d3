"""`python -m phalanx.train OVERRIDES` is `phalanx train OVERRIDES`, the form that torchrun needs."""

import sys

from phalanx.launch.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
