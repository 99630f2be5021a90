"""Probe heads trained together: K settings as one stacked parameter, one matrix product per step.

Heads that read the same inputs (feature source and normalisation) form a stack. Every head sees the batches it would
see alone, keeps its own learning rate, weight decay and cosine schedule, and stops after its own epochs, so the
result equals training each head by itself (docs/decisions/0002).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raysweep.encoders.head import Head, normalize_features
from raysweep.training.distributed import own_rows, seeded_generator, sum_over_workers
from raysweep.training.metrics import MetricSums

BETAS = (0.9, 0.999)
EPSILON = 1e-8
EVALUATION_ROWS = 4096


@dataclass(frozen=True)
class FeatureSet:
    """Cached features of one split: `parts[name]` is `(num_rows, num_features)`, labels `(num_rows,)` int64."""

    parts: dict[str, Tensor]
    labels: Tensor

    def source(self, parts: Sequence[str], rows: Tensor) -> Tensor:
        """Returns float32 features `(len(rows), num_features)` of the parts a source concatenates."""
        return torch.cat([self.parts[part][rows] for part in parts], dim=-1).float()


@dataclass
class HeadResult:
    """A trained head and its history: one dict of metrics per epoch."""

    setting: dict[str, Any]
    head: Head
    history: list[dict[str, float]] = field(default_factory=list)


def train_population(
    train: FeatureSet,
    validation: FeatureSet,
    settings: Sequence[dict[str, Any]],
    *,
    sources: dict[str, tuple[str, ...]],
    num_classes: int,
    batch_size: int,
    seed: int,
    on_epoch: Callable[[int, int], None] = lambda _epoch, _num_epochs: None,
) -> list[HeadResult]:
    """Trains one linear head per setting, all together.

    Args:
        train: features that the heads are trained on, on the device to train on.
        validation: features that every head is evaluated on after each of its epochs.
        settings: one dict per head: `learning_rate`, `weight_decay`, `epochs`, `features`, `normalize`.
        sources: feature source -> the cached parts it concatenates.
        num_classes: number of classes.
        batch_size: global batch size, over all workers.
        seed: decides the order of the rows, the same for every head and any number of workers.
        on_epoch: called with (epochs done, epochs in all).

    Returns:
        One result per setting, in the order of `settings`.
    """
    stacks = _build_stacks(train, settings, sources, num_classes, batch_size)
    num_rows, num_epochs = len(train.labels), max(int(setting["epochs"]) for setting in settings)
    for epoch in range(num_epochs):
        order = torch.randperm(num_rows, generator=seeded_generator(seed, epoch)).to(train.labels.device)
        for stack in stacks:
            if stack.start_epoch(epoch):
                for rows in order.split(batch_size):
                    stack.step(train, rows)
                stack.finish_epoch(validation)
        on_epoch(epoch + 1, num_epochs)
    results = {index: result for stack in stacks for index, result in stack.results()}
    return [results[index] for index in range(len(settings))]


def _build_stacks(
    train: FeatureSet,
    settings: Sequence[dict[str, Any]],
    sources: dict[str, tuple[str, ...]],
    num_classes: int,
    batch_size: int,
) -> list[_Stack]:
    groups: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    for index, setting in enumerate(settings):
        groups.setdefault((setting["features"], setting["normalize"]), []).append((index, setting))
    steps_per_epoch = math.ceil(len(train.labels) / batch_size)
    return [
        _Stack(train, members, sources[source], normalize, num_classes, steps_per_epoch)
        for (source, normalize), members in groups.items()
    ]


class _Stack:
    """Heads over the same inputs, longest schedule first, so that the heads still training are always a prefix."""

    def __init__(
        self,
        train: FeatureSet,
        members: list[tuple[int, dict[str, Any]]],
        parts: tuple[str, ...],
        normalize: str,
        num_classes: int,
        steps_per_epoch: int,
    ) -> None:
        self.members = sorted(members, key=lambda member: -int(member[1]["epochs"]))
        self.parts, self.normalize, self.num_classes = parts, normalize, num_classes
        settings, device = [setting for _, setting in self.members], train.labels.device
        self.epochs = [int(setting["epochs"]) for setting in settings]
        self.learning_rates = torch.tensor([float(s["learning_rate"]) for s in settings], device=device)
        self.weight_decays = torch.tensor([float(s["weight_decay"]) for s in settings], device=device)
        self.num_steps = torch.tensor([epochs * steps_per_epoch for epochs in self.epochs], device=device)
        num_features = sum(train.parts[part].shape[1] for part in parts)
        self.mean, self.scale = torch.zeros(num_features), torch.ones(num_features)
        if normalize == "standardize":
            self.mean, self.scale = feature_statistics(train, parts)
        # The stacked parameter, (heads, classes, features), and its bias; each with Adam's two moments.
        self.weight, self.weight_m, self.weight_v = torch.zeros(
            3, len(settings), num_classes, num_features, device=device
        )
        self.bias, self.bias_m, self.bias_v = torch.zeros(3, len(settings), num_classes, device=device)
        self.histories: list[list[dict[str, float]]] = [[] for _ in settings]
        self.step_count = 0

    def start_epoch(self, epoch: int) -> int:
        """Drops the heads whose epochs are over; returns how many still train."""
        self.active = sum(epochs > epoch for epochs in self.epochs)
        self.train_sums = torch.zeros(self.active + 1, dtype=torch.float64, device=self.weight.device)
        self.started = time.perf_counter()
        return self.active

    def step(self, train: FeatureSet, batch: Tensor) -> None:
        """One AdamW step of every active head on the global batch of row indices `(batch,)`."""
        rows = own_rows(batch)
        features = self._inputs(train, rows)
        log_probabilities = self._logits(features).log_softmax(-1)
        places, labels = torch.arange(len(rows), device=rows.device), train.labels[rows]
        self.train_sums[: self.active] -= log_probabilities[places, :, labels].sum(0).double()
        self.train_sums[self.active] += len(rows)
        # The gradient of mean cross-entropy in closed form: (softmax - one-hot) / batch, then one product per stack.
        errors = log_probabilities.exp()
        errors[places, :, labels] -= 1
        errors = errors.flatten(1) / len(batch)
        weight_gradient = sum_over_workers(errors.T @ features).view(self.active, self.num_classes, -1)
        bias_gradient = sum_over_workers(errors.sum(0)).view(self.active, self.num_classes)
        self._adamw(weight_gradient, bias_gradient)

    def finish_epoch(self, validation: FeatureSet) -> None:
        """Evaluates every active head on the validation rows and adds a line to its history."""
        sums = MetricSums(self.active, self.num_classes, self.weight.device)
        for rows in own_rows(torch.arange(len(validation.labels), device=self.weight.device)).split(EVALUATION_ROWS):
            sums.add(self._logits(self._inputs(validation, rows)), validation.labels[rows])
        metrics = {name: values.tolist() for name, values in sums.compute().items()}
        train_losses = (sum_over_workers(self.train_sums)[:-1] / self.train_sums[-1]).tolist()
        seconds = (time.perf_counter() - self.started) / self.active
        for index in range(self.active):
            values = {f"val/{name}": metrics[name][index] for name in ("loss", "accuracy", "macro_f1")}
            self.histories[index].append({"train/loss": train_losses[index], **values, "time/epoch_s": seconds})

    def results(self) -> Iterator[tuple[int, HeadResult]]:
        """Yields (index among the settings, result) for every head."""
        for position, (index, setting) in enumerate(self.members):
            head = Head(self.weight.shape[-1], self.num_classes, self.normalize)
            head.weight.data.copy_(self.weight[position])
            head.bias.data.copy_(self.bias[position])
            head.mean.copy_(self.mean)
            head.scale.copy_(self.scale)
            yield index, HeadResult(setting, head, self.histories[position])

    def _inputs(self, features: FeatureSet, rows: Tensor) -> Tensor:
        return normalize_features(features.source(self.parts, rows), self.normalize, self.mean, self.scale)

    def _logits(self, inputs: Tensor) -> Tensor:
        """Logits `(batch, active heads, num_classes)` by one matrix product."""
        flat = self.weight[: self.active].flatten(0, 1)
        logits = torch.addmm(self.bias[: self.active].flatten(), inputs, flat.T)
        return logits.view(len(inputs), self.active, self.num_classes)

    def _adamw(self, weight_gradient: Tensor, bias_gradient: Tensor) -> None:
        """AdamW (Loshchilov & Hutter 2019) with a learning rate and weight decay per head, cosine to zero."""
        n = self.active
        progress = self.step_count / self.num_steps[:n]
        rates = self.learning_rates[:n] * 0.5 * (1 + torch.cos(math.pi * progress))
        self.step_count += 1
        self.weight[:n].mul_((1 - rates * self.weight_decays[:n])[:, None, None])
        corrections = [1 - beta**self.step_count for beta in BETAS]
        for parameter, gradient, m, v in (
            (self.weight[:n], weight_gradient, self.weight_m[:n], self.weight_v[:n]),
            (self.bias[:n], bias_gradient, self.bias_m[:n], self.bias_v[:n]),
        ):
            m.lerp_(gradient, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            update = m / (v.sqrt().div_(math.sqrt(corrections[1])).add_(EPSILON))
            parameter.sub_(update.mul_((rates / corrections[0]).view(-1, *[1] * (parameter.ndim - 1))))


def feature_statistics(train: FeatureSet, parts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation `(num_features,)` of the train rows; a constant feature gets scale 1."""
    total = squares = torch.zeros((), dtype=torch.float64, device=train.labels.device)
    for rows in torch.arange(len(train.labels), device=train.labels.device).split(EVALUATION_ROWS):
        features = train.source(parts, rows).double()
        total, squares = total + features.sum(0), squares + features.square().sum(0)
    mean = total / len(train.labels)
    scale = (squares / len(train.labels) - mean.square()).clamp(min=0).sqrt()
    # Relative to the mean: squares that cancel leave a constant feature a scale of about 1e-8 of it.
    varies = scale > 1e-6 * mean.abs().clamp(min=1)
    return mean.float(), torch.where(varies, scale, 1.0).float()
