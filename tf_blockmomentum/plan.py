"""Predicts which K, overlap and compression a network needs, before there is a run.

    python -m tf_blockmomentum.plan --weights 100MB --step 50ms --link 1gbit --workers 2 8

prints, for each number of workers, the speed of blocks of K local steps as a share of training
without any communication, by `tf_blockmomentum.cost.CostModel`, and the smallest K that reaches
0.9 in each form. Also the console script `tfbm-plan`. Starts without TensorFlow.
"""

import sys

from tf_blockmomentum.report.planning import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
