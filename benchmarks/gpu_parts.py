"""The parts of `gpu_check.py`, one a call: each prints one JSON line for each result."""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "examples")]

import gpu_fast  # noqa: E402
import gpu_machine  # noqa: E402
import gpu_right  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stop", type=int, default=0)
    parser.add_argument("--directory")
    options = parser.parse_args()
    if options.part == "backup_run":
        gpu_right.backup_run(options)
        return
    parts = {**vars(gpu_machine), **vars(gpu_right), **vars(gpu_fast)}
    part = parts["part_input" if options.part == "input" else options.part]
    part(options.quick or not gpu_machine.GPUS)


if __name__ == "__main__":
    main()
