"""What the best of many tried settings is worth on rows that did not choose it, estimated from the validation rows."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

NUM_RESAMPLES = 1_000
CHUNK_VALUES = 2**22  # elements of the largest array
WORST_LOSS = 1e30  # of a loss that is not finite
# Rows whose losses a trial keeps. What is added by more is below the standard error.
MAX_ROWS = 2048

Floats = npt.NDArray[np.floating]
Rows = npt.NDArray[np.integer]
RowsT = TypeVar("RowsT", Rows, Tensor)


def pack_row_losses(logits: Tensor, labels: Tensor) -> str:
    """Returns the loss of each row and whether it is right, as text: float16 in base64, negative where it is wrong.

    Args:
        logits: `(num_rows, num_classes)`, of at most `MAX_ROWS` rows.
        labels: int64 `(num_rows,)`.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none").abs().nan_to_num(nan=torch.inf)  # no -0.0
    signed = torch.where(logits.argmax(1) == labels, losses, -losses.clamp(min=torch.finfo(torch.float16).tiny))
    return base64.b64encode(signed.cpu().numpy().astype(np.float16).tobytes()).decode()


def unpack_row_losses(text: str) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Returns which rows are right, and their losses, each `(num_rows,)`, from `pack_row_losses`.

    Raises:
        ValueError: it is no such text.
    """
    signed = np.frombuffer(base64.b64decode(text, validate=True), np.float16).astype(np.float64)
    return ~np.signbit(signed), np.abs(signed)


def kept_positions(draws: RowsT) -> RowsT:
    """Returns the validation rows whose losses are kept, `(num_kept,)`: those of all draws one after another.

    Args:
        draws: int64 `(num_draws, num_rows)`, an array or a tensor; one draw where all rows are used.
    """
    step = max(1, -(-draws.shape[1] // max(1, MAX_ROWS // draws.shape[0])))
    return draws[:, ::step].reshape(-1)


def optimism_of_best(
    scores: Floats,
    costs: Floats,
    seed: int,
    images: Rows | None = None,
    num_resamples: int = NUM_RESAMPLES,
) -> float:
    """Returns by how much the mean score of the setting of least cost is above what that setting is worth.

    The best of many settings looks too good by luck, the more so the more settings and the fewer rows. Bootstrap bias
    correction (BBC, Tsamardinos, Greasidou & Borboudakis 2018) resamples the images; each time, the best setting on the
    drawn rows is scored on the rows that were not drawn. Here the setting that is best on all rows is scored on
    the same rows, and the mean difference is returned: it varies less, and is 0 for one setting.

    Args:
        scores: `(num_settings, num_rows)`, of which the mean over rows is wanted: hits, or losses.
        costs: `(num_settings, num_rows)`; the setting with the lowest mean is chosen, the first of several.
        seed: seed of the bootstrap.
        images: the image of each row, `(num_rows,)`. Rows of one image, in several few-shot draws, are drawn together.
            None if each has its own.
        num_resamples: number of resamples.
    """
    places = np.arange(scores.shape[1]) if images is None else np.unique(images, return_inverse=True)[1]
    num_images = int(places.max()) + 1
    if len(scores) == 1 or num_images == 1:  # a resample of one image leaves none out
        return 0.0
    values = np.nan_to_num(scores.astype(np.float64), posinf=WORST_LOSS)
    costs = np.nan_to_num(costs, nan=WORST_LOSS, posinf=WORST_LOSS)
    best = costs.sum(1).argmin()
    generator, differences = np.random.default_rng(seed), []
    step = max(1, CHUNK_VALUES // max(scores.shape))
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        counts = generator.multinomial(num_images, np.full(num_images, 1 / num_images), size)[:, places]
        is_left_out = counts == 0
        usable = is_left_out.any(1)
        chosen = (counts @ costs.T).argmin(1)
        sums = (is_left_out * (values[best] - values[chosen])).sum(1)
        differences.append(sums[usable] / is_left_out.sum(1)[usable])
    return float(np.concatenate(differences).mean())


def search_optimism(metric: str, row_losses: Mapping[int, str], best: int, draws: Rows, seed: int) -> float | None:
    """Returns by how much a metric of the best trial is above what the trial is worth, because it is the best of many.

    None if the metric is not a mean over rows, or if not all trials kept the losses of the same rows.

    Args:
        metric: a validation metric that ranks studies.
        row_losses: from `pack_row_losses`, by number of the trial; empty where it is not known.
        best: number of the trial that was chosen, by its loss.
        draws: the validation rows that it was chosen on, `(num_draws, num_rows)`. Luck falls with their square root.
        seed: seed of the bootstrap.
    """
    if metric not in ("val/accuracy", "val/loss") or best not in row_losses:
        return None
    try:
        tables = [unpack_row_losses(text) for text in row_losses.values()]
    except ValueError:
        return None
    images = kept_positions(draws)
    if {len(losses) for _, losses in tables} != {len(images)}:
        return None
    tables.insert(0, tables.pop(list(row_losses).index(best)))  # of trials with the same loss, it was chosen
    hits, losses = (np.stack(columns) for columns in zip(*tables, strict=True))
    scores = hits if metric == "val/accuracy" else losses
    return optimism_of_best(scores, losses, seed, images) * math.sqrt(len(images) / draws.size)
