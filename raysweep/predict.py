"""`python -m raysweep.predict MODEL IMAGES...`: labels and probabilities from an exported model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.cluster.signals import stop_signals
from raysweep.errors import DataError, RaysweepError

if TYPE_CHECKING:
    from raysweep.results.model import Model

BATCH = 32


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line of `raysweep predict`."""
    parser = argparse.ArgumentParser(prog="raysweep predict", description="Classifies images with an exported model.")
    parser.add_argument("model", metavar="MODEL", help="a folder such as runs/NAME/models/STUDY, also in a bucket")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0, 1 if the model or any image could not be read, 130 for Ctrl-C, 143 for SIGTERM.
    """
    options = build_parser().parse_args(arguments)
    with stop_signals() as signals:
        try:
            return _run(options)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return signals.exit_status


def _run(options: argparse.Namespace) -> int:
    from raysweep.results.model import load_model
    from raysweep.storage.copies import fetch_folder, local_path

    try:
        folder = local_path(options.model)
        fetch_folder(folder)
        model = load_model(folder)
    except RaysweepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failures: list[str] = []
    predictions = list(_predict(model, options.images, failures))
    if options.format == "json":
        print(json.dumps(predictions, indent=2))
    else:
        _print_table(predictions)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _predict(model: Model, paths: Sequence[Path], failures: list[str]) -> Iterator[dict[str, Any]]:
    """Yields one prediction for each readable image, in order. Adds the errors of other images to `failures`."""
    for start in range(0, len(paths), BATCH):
        readable, pixels = [], []
        for path in paths[start : start + BATCH]:
            try:
                pixels.append(model.preprocess(path.read_bytes()))
                readable.append(path)
            except (DataError, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                failures.append(f"{path}: {reason}")
        for path, row in zip(readable, model.probabilities(pixels), strict=True):
            probabilities = {label: round(float(p), 6) for label, p in zip(model.labels, row, strict=True)}
            label = model.labels[int(row.argmax())]
            yield {"image": str(path), "label": label, "probabilities": probabilities}


def _print_table(predictions: Sequence[dict[str, Any]]) -> None:
    width = max((len(prediction["image"]) for prediction in predictions), default=0)
    for prediction in predictions:
        ordered = sorted(prediction["probabilities"].items(), key=lambda item: -item[1])[:5]
        others = "  ".join(f"{label} {probability:.3f}" for label, probability in ordered)
        print(f"{prediction['image']:<{width}}  {prediction['label']}  ({others})")


if __name__ == "__main__":
    sys.exit(main())
