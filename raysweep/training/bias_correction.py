"""What the best of many tried settings is worth on rows that did not choose it, estimated from the validation rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 1_000
CHUNK_VALUES = 2**22  # elements of the largest array
WORST_LOSS = 1e30  # of a loss that is not finite

Floats = npt.NDArray[np.floating]


def corrected_score(
    hits: npt.NDArray[np.bool_], seed: int, losses: Floats | None = None, num_resamples: int = NUM_RESAMPLES
) -> float:
    """Returns the accuracy of the best setting, without the optimism of having been chosen on the same rows.

    The maximum over settings is too high by luck, the more so the more settings and the fewer rows. Bootstrap bias
    correction (BBC, Tsamardinos, Greasidou & Borboudakis 2018) resamples the rows; each time, the setting that is best
    on the drawn rows is scored on the rows that were not drawn. The mean of these scores is returned.

    Args:
        hits: `(num_settings, num_rows)`, whether a setting is right on a validation row. With cross-validation, each
            row's hit is that of the model that did not train on it.
        seed: seed of the bootstrap.
        losses: `(num_settings, num_rows)`; the lower mean chooses among settings of the same accuracy. None: the first.
        num_resamples: number of resamples.
    """
    num_rows = hits.shape[1]
    if num_rows == 1:
        return float(hits.mean())  # a resample leaves no row out
    values = hits.T.astype(np.float64)
    costs = None if losses is None else np.nan_to_num(losses.T, nan=WORST_LOSS, posinf=WORST_LOSS)
    generator, scores = np.random.default_rng(seed), []
    step = max(1, CHUNK_VALUES // max(hits.shape))
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        counts = generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size)
        is_left_out = counts == 0
        num_right = counts @ values
        is_best = num_right == num_right.max(1, keepdims=True)
        chosen = is_best.argmax(1) if costs is None else np.where(is_best, counts @ costs, np.inf).argmin(1)
        right = (is_left_out * values.T[chosen]).sum(1)
        usable = is_left_out.any(1)
        scores.append(right[usable] / is_left_out.sum(1)[usable])
    return float(np.concatenate(scores).mean())
