"""The path of every file that raysweep writes, and functions that read and write small text and JSON files."""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysweep.errors import ConfigError, DataError, printable
from raysweep.storage.copies import fetch_folder, is_bucket, local_path, location, publish, replacing

# Spreadsheets pass over blanks, and take the full-width signs as well.
_FORMULA = re.compile(r"\s*[=+\-@|%\uff1d\uff0b\uff0d\uff20]")
STUDIES, MODELS = "studies", "models"  # folders of a sweep
TEST_ROWS = "test_rows.parquet"  # in the folder of a study: what its model says of each test image


def signature(value: Any) -> str:
    """Returns 16 hex digits of the SHA-256 of `value` written as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_name(name: str) -> str:
    """Returns `name` with each group of unusual characters replaced by `-`."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "unnamed"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees either the old content or the new, never an incomplete file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    publish(path)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` atomically as indented JSON. NaN raises an error, because it is not JSON."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table atomically. A spreadsheet takes no cell of it for a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    write_atomically(path, text.getvalue())


def _cell(value: Any) -> Any:
    """Puts an apostrophe before text that a spreadsheet would run, such as `=HYPERLINK(...)` as a file name."""
    if not isinstance(value, str):
        return value
    text = printable(value)  # also because a carriage return alone would not be quoted
    return f"'{text}" if _FORMULA.match(text) else text


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error


@dataclass(frozen=True)
class SweepPaths:
    """All paths that a sweep writes to. All sweeps of one storage share its caches.

    Raises:
        ConfigError: The storage is not a folder that this machine can write to.
    """

    storage: str
    name: str

    def __post_init__(self) -> None:
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not existing.is_dir():
            raise ConfigError(f"storage: '{self.storage}' cannot be a folder: {existing} is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(f"storage: '{self.storage}' cannot be used: no permission to write to {existing}")

    @property
    def root(self) -> Path:
        """The folder of this sweep."""
        return local_path(self.storage).resolve() / self.name

    @property
    def caches(self) -> Path:
        """The folder of caches and other files that all sweeps of one storage share."""
        return local_path(self.storage).resolve() / ".cache"

    def relative(self, place: str) -> str:
        """Returns how a location in this sweep's folder is stored: relative to it, so that the folder can be moved."""
        return place.removeprefix(f"{location(self.root)}/")

    def resolve(self, stored: str) -> str:
        """Returns the location from `relative`. Earlier versions stored whole paths, which a moved folder has not."""
        root = location(self.root)
        if not is_bucket(stored) and not Path(stored).is_absolute():
            return f"{root}/{stored}"
        if stored.startswith(f"{root}/"):
            return stored
        parts = stored.split("/")
        inner = max((place for place, part in enumerate(parts) if part in (STUDIES, MODELS)), default=None)
        return stored if inner is None else "/".join([root, *parts[inner:]])

    def fetch(self) -> None:
        """Downloads what a sweep needs at its start from a bucket: its own small files, and the JSON files of caches.

        Raises:
            RaysweepError: The bucket cannot be read.
        """
        if is_bucket(self.storage):
            fetch_folder(self.root, lambda name: not name.endswith((".safetensors", ".parquet", ".html")))
            fetch_folder(self.caches, lambda name: name.endswith(".json"))

    def cache(self, kind: str, key: str) -> Path:
        """The folder of a feature or pixel cache. `key` is its signature."""
        return self.caches / f"{kind}-{key}"

    @property
    def has_features(self) -> bool:
        """Whether this storage has a feature cache, of any sweep and encoder."""
        return any(self.caches.glob("features-*/manifest.json"))

    @property
    def optuna_journal(self) -> Path:
        """The journal of the Optuna studies, for all invocations of the sweep."""
        return self.root / "optuna.journal"

    @property
    def tune(self) -> Path:
        """The folder of Ray Tune's files."""
        return self.root / "tune"

    def study(self, study: str, key: str) -> Path:
        """The folder of a study's checkpoints and result. `key` is the signature of all inputs of the result."""
        return self.root / STUDIES / study / key

    def study_result(self, study: str, key: str) -> Path:
        """The result of a finished study. The study is evaluated again only if its trials have changed."""
        return self.study(study, key) / "result.json"

    @property
    def models(self) -> Path:
        """The folder of exported models."""
        return self.root / MODELS

    def model(self, study: str) -> Path:
        """The exported model of one study."""
        return self.models / study

    @property
    def leaderboard_json(self) -> Path:
        """The leaderboard, as a list of rows."""
        return self.root / "leaderboard.json"

    @property
    def leaderboard_csv(self) -> Path:
        """The same rows as a table."""
        return self.root / "leaderboard.csv"

    @property
    def resolved_experiment(self) -> Path:
        """The experiment with every default filled in."""
        return self.root / "experiment.resolved.yaml"

    @property
    def precisions(self) -> Path:
        """The precision that was chosen for the features of each encoder."""
        return self.root / "precisions.json"

    @property
    def near_copies(self) -> Path:
        """Groups of images that look the same, and which of them leak or have several labels."""
        return self.root / "near_copies.json"

    @property
    def feature_copies(self) -> Path:
        """Images of validation and test that have a near copy in train by their features."""
        return self.root / "feature_copies.json"

    @property
    def quarantine(self) -> Path:
        """Table of the images that could not be used, with reasons."""
        return self.root / "quarantine.csv"

    @property
    def sweep_record(self) -> Path:
        """What a report says of the whole sweep: data, encoders, versions."""
        return self.root / "sweep.json"

    @property
    def trials(self) -> Path:
        """Table of all trials, with the metrics of each epoch."""
        return self.root / "trials.parquet"

    @property
    def predictions(self) -> Path:
        """Table of each study's predictions for the test images."""
        return self.root / "predictions.parquet"

    @property
    def thumbnails(self) -> Path:
        """Small copies of the images that a report shows."""
        return self.root / "thumbnails.parquet"

    @property
    def report_html(self) -> Path:
        """The report, one file that needs no other."""
        return self.root / "report.html"

    @property
    def report_md(self) -> Path:
        """The report's text and tables as Markdown."""
        return self.root / "report.md"
