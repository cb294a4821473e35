"""What the server that the pool's workers are forked from imports before the first fork: the whole trainer."""

import os
import warnings

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trainer.run.preload import preload

    preload()
