"""`python -m phalanx.train` is `phalanx train`, in the form that torchrun needs."""

import os
import sys

from phalanx.launch.cli import train_main

if __name__ == "__main__":
    code = train_main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Past the interpreter's own end: gloo's threads may still let go of tensors, for which they
    # need an interpreter, and abort without one (pytorch 179291, 190489).
    os._exit(code)
