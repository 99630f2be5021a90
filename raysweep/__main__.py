"""`raysweep run|submit|predict|report ...`: the console script, the same as `python -m raysweep.run` and so on."""

import sys

from raysweep import __version__

COMMANDS = ("run", "submit", "predict", "report")
USAGE = f"usage: raysweep {{{','.join(COMMANDS)}}} ...   (raysweep COMMAND --help says more)"


def main() -> int:
    """Calls the module of the command. Only that module is imported."""
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command == "run":
        from raysweep import run

        return run.main(arguments)
    if command == "submit":
        from raysweep import submit

        return submit.main(arguments)
    if command == "predict":
        from raysweep import predict

        return predict.main(arguments)
    if command == "report":
        from raysweep.report import __main__ as report

        return report.main(arguments)
    if command == "--version":
        print(__version__)
        return 0
    print(USAGE, file=sys.stdout if command in ("-h", "--help") else sys.stderr)
    return 0 if command in ("-h", "--help") else 2


def script() -> None:
    """The console script."""
    from raysweep.cluster.signals import leave_at_once

    leave_at_once(main())


if __name__ == "__main__":
    script()
