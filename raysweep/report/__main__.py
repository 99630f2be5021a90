"""`python -m raysweep.report RUN`: makes the report of a sweep again, from its folder alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from raysweep.errors import RaysweepError, print_output


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line of `raysweep report`."""
    parser = argparse.ArgumentParser(
        prog="raysweep report", description="Writes report.html and report.md into the folder of a sweep."
    )
    parser.add_argument("run", metavar="RUN", help="folder of a sweep, such as runs/quickstart, or s3://bucket/runs/x")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 if the report is made, 1 for an error, 2 for wrong usage."""
    options = build_parser().parse_args(arguments)
    try:
        from raysweep.report.report import write_report

        place = write_report(options.run)
        if not options.quiet:
            print_output(f"{place}/report.html")
        return 0
    except RaysweepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
