"""Learning from a teacher. Run: torchrun --nproc-per-node 2 launch/distill.py configs/demo/distill.yaml"""

import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    if Path(sys.path[0]).resolve() == folder:  # run as a script: Python put launch/ first, the packages are beside it
        sys.path[0] = str(folder.parent)
    from launch.main import main
    from parallel.failures import leave

    leave(main("distill", sys.argv[1:]))
