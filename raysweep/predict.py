"""`python -m raysweep.predict MODEL IMAGES...`: labels and probabilities from an exported model."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.cluster.signals import stop_signals
from raysweep.errors import DataError, RaysweepError, print_output, printable

if TYPE_CHECKING:
    from raysweep.results.model import Model

BATCH = 32


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line of `raysweep predict`."""
    parser = argparse.ArgumentParser(prog="raysweep predict", description="Classifies images with an exported model.")
    parser.add_argument("model", metavar="MODEL", help="a folder such as runs/NAME/models/STUDY, also in a bucket")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE",
                        help="a file, or a folder: its images, also those in the folders in it")  # fmt: skip
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
        except RaysweepError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return signals.exit_status


def _run(options: argparse.Namespace) -> int:
    from raysweep.results.model import load_model
    from raysweep.storage.copies import fetch_folder, is_bucket, local_path

    folder = local_path(options.model)
    if is_bucket(options.model):
        fetch_folder(folder)
    model = load_model(folder)
    failures: list[str] = []
    paths = [path for named in options.images for path in _images_of(named, failures)]
    predictions = list(_predict(model, paths, failures))
    if options.format == "json":
        print_output(json.dumps(predictions, indent=2))
    else:
        _print_table(predictions)
    for failure in failures:
        print(f"error: {printable(failure)}", file=sys.stderr)
    return 1 if failures else 0


def _images_of(named: Path, failures: list[str]) -> list[Path]:
    """Returns the images of a folder and the folders in it, sorted, or the named file. Says what it passes over."""
    if not os.path.isdir(named):  # unlike a path's own method, it takes names that are too long
        return [named]
    from raysweep.images.folder_files import kinds_of, list_folder
    from raysweep.images.formats import IMAGE_SUFFIXES

    try:
        found = list_folder(str(named.absolute()))
    except OSError as error:
        failures.append(f"{named}: {error.strerror or error}")
        return []
    images = [file for file in found.files if file.lower().endswith(IMAGE_SUFFIXES)]
    others = sorted(set(found.files) - set(images))
    notes = [f"{len(others)} files that are no images left out: {kinds_of(others)}"] if others else []
    for note in [*notes, *found.describe_ignored()]:
        print(f"{printable(str(named))}: {printable(note)}", file=sys.stderr)
    if not images:
        failures.append(f"{named}: no images in this folder; looked for {' '.join(IMAGE_SUFFIXES)}")
    return [named / image for image in images]


def _predict(model: Model, paths: Sequence[Path], failures: list[str]) -> Iterator[dict[str, Any]]:
    """Yields one prediction for each readable image, in order. Adds the errors of other images to `failures`."""
    for start in range(0, len(paths), BATCH):
        readable, pixels = [], []
        for path in paths[start : start + BATCH]:
            try:
                if os.path.exists(path) and not os.path.isfile(path):  # a pipe would block
                    raise DataError("not a regular file")
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
    names = [printable(prediction["image"]) for prediction in predictions]
    width = max(map(len, names), default=0)
    for name, prediction in zip(names, predictions, strict=True):
        ordered = sorted(prediction["probabilities"].items(), key=lambda item: -item[1])[:5]
        others = "  ".join(f"{printable(label)} {probability:.3f}" for label, probability in ordered)
        print_output(f"{name:<{width}}  {printable(prediction['label'])}  ({others})")


if __name__ == "__main__":
    sys.exit(main())
