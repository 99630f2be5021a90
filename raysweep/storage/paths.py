"""Every file name that raysweep writes, and small files as text and JSON."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysweep.errors import ConfigError, DataError
from raysweep.storage.copies import fetch_folder, is_bucket, local_path, publish, replacing


def signature(value: Any) -> str:
    """Returns 16 hex digits of the SHA-256 of `value` written as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_name(name: str) -> str:
    """Returns `name` with everything that is awkward in a file name replaced by `-`."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "unnamed"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part of it."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    publish(path)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error


@dataclass(frozen=True)
class SweepPaths:
    """Every place that a sweep writes to. Caches are shared by all sweeps of one storage.

    Raises:
        ConfigError: the storage is not a folder that this machine can write to.
    """

    storage: str
    name: str

    def __post_init__(self) -> None:
        above = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not above.is_dir():
            raise ConfigError(f"storage: '{self.storage}' cannot be a folder: {above} is a file")
        if not os.access(above, os.W_OK | os.X_OK):
            raise ConfigError(f"storage: '{self.storage}' cannot be used: no permission to write to {above}")

    @property
    def root(self) -> Path:
        """The sweep's own folder."""
        return local_path(self.storage).resolve() / self.name

    @property
    def caches(self) -> Path:
        """Caches and what else all sweeps of one storage share."""
        return local_path(self.storage).resolve() / ".cache"

    def fetch(self) -> None:
        """Brings what a sweep begins with from a bucket: all small files of its own, and what caches there are.

        Raises:
            RaysweepError: the bucket cannot be read.
        """
        if is_bucket(self.storage):
            fetch_folder(self.root, lambda name: not name.endswith(".safetensors"))
            fetch_folder(self.caches, lambda name: name.endswith(".json"))

    def cache(self, kind: str, key: str) -> Path:
        """A feature or pixel cache, by signature."""
        return self.caches / f"{kind}-{key}"

    @property
    def has_features(self) -> bool:
        """Whether any sweep of this storage has cached features of any encoder."""
        return any(self.caches.glob("features-*/manifest.json"))

    @property
    def optuna_journal(self) -> Path:
        """The Optuna studies of all invocations."""
        return self.root / "optuna.journal"

    @property
    def tune(self) -> Path:
        """What Ray Tune writes while it runs."""
        return self.root / "tune"

    def study(self, study: str, key: str) -> Path:
        """Checkpoints and the result of one study; `key` is the signature of all that its results depend on."""
        return self.root / "studies" / study / key

    def study_result(self, study: str, key: str) -> Path:
        """What a finished study found; it is not evaluated again while this stands for the same trials."""
        return self.study(study, key) / "result.json"

    def model(self, study: str) -> Path:
        """The exported model of one study."""
        return self.root / "models" / study

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
    def quarantine(self) -> Path:
        """Images that could not be used, and why."""
        return self.root / "quarantine.csv"
