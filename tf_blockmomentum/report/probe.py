"""`python -m tf_blockmomentum.report.probe FILE SCRIPT...`: what `tfbm-plan --measure` starts."""

import functools
import json
import os
import runpy
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tf_blockmomentum.boundary.observer import Observer
from tf_blockmomentum.callback import BlockTraining
from tf_blockmomentum.report.recorder import Recorder

BLOCKS = 3  # after those that compile
SECONDS = 1.5  # of steps: at first the pipeline has batches ready that it made meanwhile


class Probe(Recorder):
    """Writes what the first blocks have shown, and ends the process."""

    def __init__(self, path: str) -> None:
        super().__init__(0, 1)
        self._path, self._bytes = path, 0

    def told(self, numbers: Mapping[str, Any], replica: Any) -> None:
        super().told(numbers, replica)
        averaged = replica.travelling
        self._bytes = sum(v.shape.num_elements() * tf.as_dtype(v.dtype).size for v in averaged)
        if sum(b.stepping[0] * b.steps for b in self._timed) >= SECONDS:
            self.end()

    @property
    def _timed(self) -> list[Any]:
        return [b for b in self.blocks if not np.isnan(b.stepping[0])]

    def end(self) -> None:
        """Enough has been seen, or there is no more; unless it is too little."""
        steps = [b.stepping[0] for b in self._timed]
        if len(steps) < BLOCKS:
            return
        steps = steps[len(steps) // 2 :]
        with open(self._path, "w", encoding="utf-8") as file:
            json.dump({"step": float(np.median(steps)), "bytes": self._bytes}, file)
        os._exit(0)


def main() -> None:
    """Runs the script, with a probe in every fit."""
    path, script = sys.argv[1:3]
    probe = Probe(path)
    observe, begin = BlockTraining.observe, BlockTraining.on_train_begin

    def with_probe(self: BlockTraining, observer: Observer) -> Any:
        if type(observer) is Observer:  # fit has ended
            probe.end()
        return observe(self, probe)

    @functools.wraps(begin)
    def on_train_begin(self: BlockTraining, logs: dict[str, Any] | None = None) -> None:
        observe(self, probe)
        begin(self, logs)

    BlockTraining.observe = with_probe  # type: ignore[method-assign]
    BlockTraining.on_train_begin = on_train_begin  # type: ignore[method-assign]
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
