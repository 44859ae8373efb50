"""What a rank under mpirun runs in these tests: the job files of its command line, one after the other."""

from __future__ import annotations

import os
import sys

from ddp.job import load_job
from ddp.topology import from_environment

if __name__ == "__main__":
    here = from_environment(os.environ)  # before anything imports mpi4py
    from ddp.training.run import train

    for path in sys.argv[1:]:
        train(load_job(path), here, allow_import=["multinode.wide_regression"])
