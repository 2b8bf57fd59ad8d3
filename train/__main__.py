"""`python -m phalanx.train` is `phalanx train`, in the form that torchrun needs."""

import sys

from phalanx.launch.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
