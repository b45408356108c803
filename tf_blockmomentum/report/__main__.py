"""`python -m tf_blockmomentum.report TRACE... [--output FILE]`: draws timelines."""

import argparse
import os
import sys
from collections.abc import Sequence

from tf_blockmomentum.report.drawing import draw


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tf_blockmomentum.report",
        description="Draws what tfbm.BlockReport(timeline=...) has written; several files below "
        "each other, to compare.",
    )
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="a file, such as trace.json")
    parser.add_argument(
        "--output", metavar="FILE", help="the picture; default: the first trace's name, as .png"
    )
    parser.add_argument(
        "--title", action="append", default=[], metavar="TEXT", help="once for each trace"
    )
    parser.add_argument("--begin", type=float, metavar="SECONDS", help="where to begin")
    parser.add_argument("--seconds", type=float, metavar="SECONDS", help="how much to draw")
    options = parser.parse_args(arguments)
    if options.title and len(options.title) != len(options.traces):
        parser.error(
            f"--title is given once for each trace. Received: {len(options.title)} for "
            f"{len(options.traces)} traces."
        )
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds must be above 0. Received: {options.seconds:g}.")
    if options.begin is not None and not options.begin >= 0:
        parser.error(f"--begin must be at least 0. Received: {options.begin:g}.")
    target = options.output or os.path.splitext(options.traces[0])[0] + ".png"
    try:
        draw(options.traces, target, options.title, options.begin, options.seconds)
    except OSError as error:
        parser.error(f"{error.strerror}: {error.filename}.")
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    print(f"Drawn: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
