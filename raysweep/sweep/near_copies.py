"""Groups near copies once a pass has hashed the images: folds keep them whole, and the user is told of trouble."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from raysweep.errors import DataError
from raysweep.images.image_hashes import METHOD, hashes_file, read_hashes
from raysweep.images.listed_rows import image_name
from raysweep.images.near_copies import (
    Groups,
    describe_conflicts,
    describe_leaks,
    group_near_copies,
    join_groups,
    judge_groups,
)
from raysweep.storage.copies import remove
from raysweep.storage.paths import read_json, signature, write_json
from raysweep.sweep.state import SweepState

STORED = TypeAdapter(Groups)


def join_near_copies(state: SweepState) -> None:
    """Joins the groups of near copies to those of the index, and warns of groups that leak or have several labels.

    They are written to `near_copies.json`, which also tells later invocations: these compare no images again. Without
    hashes, as where all caches are of an earlier version, nothing is known.
    """
    index, path = state.index, state.paths.near_copies
    key = signature([METHOD, index.fingerprint, index.row_signature, sorted(state.bad_rows)])
    groups = _stored_groups(path, key)
    if groups is None:
        hashes = read_hashes(hashes_file(state.paths.caches, index), index.table["row_id"].to_numpy())
        if hashes is None:
            remove(path)
            why = "there are no readable hashes of these images; the next pass over them makes some"
            state.progress.say(f"near copies are not known: {why}")
            return
        groups = group_near_copies(index, hashes, list(state.bad_rows))
    state.near_copies, state.index = groups, join_groups(index, groups)
    found, rows = judge_groups(index, groups), _described_rows(state, groups)
    leaks = {
        split: [{"image": rows[image]["image"], "train_image": rows[copy]["image"]} for image, copy in pairs]
        for split, pairs in found.leaks.items()
    }
    conflicts = [[rows[row_id] for row_id in pair] for pair in found.conflicts]
    members = [[rows[row_id] for row_id in group] for group in groups]
    report = {"signature": key, "row_ids": groups, "groups": members, "leaks": leaks, "conflicts": conflicts}
    write_json(path, report)
    for split, pairs in found.leaks.items():
        if pairs:
            num_images, first = sum(index.counts()[split].values()), leaks[split][0]
            warning = describe_leaks(split, num_images, len(pairs), first["image"], first["train_image"])
            state.progress.warn(warning)
    if conflicts:
        one, other = conflicts[0]
        images, classes = (one["image"], other["image"]), (one["class"], other["class"])
        state.progress.warn(describe_conflicts(len(conflicts), images, classes))


def _stored_groups(path: Path, key: str) -> Groups | None:
    try:
        found = read_json(path)
        if isinstance(found, dict) and found.get("signature") == key:
            return STORED.validate_python(found.get("row_ids"))
    except (DataError, ValidationError):
        pass
    return None


def _described_rows(state: SweepState, groups: Groups) -> dict[int, dict[str, str]]:
    """Returns image, split and class of each row of the groups, by row id."""
    table = state.index.table.select(["row_id", "path", "position", "split", "label"])
    wanted = [row_id for group in groups for row_id in group]
    rows = table.filter(pa.array(np.isin(table["row_id"].to_numpy(), wanted))).to_pylist()
    return {
        row["row_id"]: {
            "image": image_name(row["path"], row["position"]),
            "split": row["split"],
            "class": state.index.classes[row["label"]],
        }
        for row in rows
    }
