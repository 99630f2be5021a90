"""L-BFGS for many convex problems of the same size at once (Liu and Nocedal 1989), with Armijo's backtracking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NUM_PAIRS = 8
MAX_STEPS = 500
MAX_HALVINGS = 30
SUFFICIENT_DECREASE = 1e-4
LEAST_DECREASE = 1e-7
# Relative error of a value from float32 products: a step that changes the value by less is accepted.
ROUNDING = 1e-7


class Objective(Protocol):
    """Computes values and gradients of some of the problems."""

    def __call__(self, points: Tensor, problems: Tensor, /) -> tuple[Tensor, Tensor]:
        """Returns values, float64 `(m,)`, and gradients `(m, size)`.

        Args:
            points: one point for each problem, `(m, size)`.
            problems: numbers of the problems, int64 `(m,)`.
        """
        ...


@dataclass(frozen=True)
class _State:
    """Where the problems that are not yet solved stand, one row each; `pairs` are changes of point and gradient."""

    problems: Tensor
    points: Tensor
    values: Tensor
    gradients: Tensor
    scale: Tensor
    pairs: tuple[tuple[Tensor, Tensor], ...] = ()

    def take(self, rows: Tensor) -> _State:
        """Returns some of the problems, given as a mask."""
        pairs = tuple((change[rows], growth[rows]) for change, growth in self.pairs)
        values, gradients = self.values[rows], self.gradients[rows]
        return _State(self.problems[rows], self.points[rows], values, gradients, self.scale[rows], pairs)


def minimize(objective: Objective, start: Tensor, scale: Tensor, tolerance: float) -> Tensor:
    """Minimises every problem from its own start; those that are solved leave the batch.

    A problem is solved when the decrease that the next step promises is at most `tolerance` times its value, or at
    most `LEAST_DECREASE`: values are expected to be of order 1, and some have no minimum but come near to 0.

    Args:
        objective: values and gradients.
        start: `(num_problems, size)`.
        scale: diagonal of the preconditioner, an approximation of the inverse of the Hessian, `(num_problems, size)`.
        tolerance: see above.

    Returns:
        Solutions, `(num_problems, size)`.
    """
    solutions, problems = start.clone(), torch.arange(len(start), device=start.device)
    state = _State(problems, start, *objective(start, problems), scale)
    for _ in range(MAX_STEPS):
        steps = -_newton_steps(state)
        promised = -_dot(state.gradients, steps).double() / 2
        is_open = promised > (tolerance * state.values.abs()).clamp(min=LEAST_DECREASE)
        if not is_open.all():
            solved = ~is_open
            solutions[state.problems[solved]] = state.points[solved]
            state, steps, promised = state.take(is_open), steps[is_open], promised[is_open]
            if not len(state.problems):
                return solutions
        state = _advance(objective, state, steps, promised)
    solutions[state.problems] = state.points
    return solutions


def _newton_steps(state: _State) -> Tensor:
    """Returns the approximate inverse of each Hessian times the gradient: the two-loop recursion."""
    steps, parts = state.gradients.clone(), []
    for change, growth in reversed(state.pairs):
        curvature = _dot(change, growth)
        inverse = torch.where(curvature > 0, 1 / curvature, 0.0)
        part = inverse * _dot(change, steps)
        steps -= part[:, None] * growth
        parts.append((part, inverse))
    steps *= state.scale
    if state.pairs:
        change, growth = state.pairs[-1]
        factor = _dot(change, growth) / _dot(growth, state.scale * growth)
        steps *= torch.where(factor > 0, factor, 1.0)[:, None]
    for (change, growth), (part, inverse) in zip(state.pairs, reversed(parts), strict=True):
        steps += (part - inverse * _dot(growth, steps))[:, None] * change
    return steps


def _advance(objective: Objective, state: _State, steps: Tensor, promised: Tensor) -> _State:
    """Takes a step in each problem, halved until the value has decreased enough."""
    points = state.points + steps
    values, gradients = objective(points, state.problems)
    lengths = torch.ones_like(promised)
    for _ in range(MAX_HALVINGS):
        wanted = state.values - 2 * SUFFICIENT_DECREASE * lengths * promised + ROUNDING * state.values.abs()
        is_long = ~(values <= wanted)
        if not is_long.any():
            break
        lengths[is_long] /= 2
        points[is_long] = state.points[is_long] + lengths[is_long, None].to(points.dtype) * steps[is_long]
        values[is_long], gradients[is_long] = objective(points[is_long], state.problems[is_long])
    pair = points - state.points, gradients - state.gradients
    pairs = (*state.pairs, pair)[-NUM_PAIRS:]
    return _State(state.problems, points, values, gradients, state.scale, pairs)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(1)
