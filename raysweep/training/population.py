"""Trains probe heads together: K settings x S subsets as stacked parameters, one batched product per step.

Heads with the same inputs (feature source and normalisation) form a stack. Every head sees the same batches as if
trained alone, has its own learning rate, weight decay and cosine schedule, and stops after its own epochs. So the
result equals training each head alone (docs/decisions/0002).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from raysweep.encoders.head import Head, normalize_features, standard_scale
from raysweep.experiment.metrics import METRICS, validation_key
from raysweep.training.distributed import own_rows, seeded_generator, sum_over_workers
from raysweep.training.metrics import MetricSums

BETAS = (0.9, 0.999)
EPSILON = 1e-8
# Probabilities are clamped to at least about 1e-16, which is negligible beside EPSILON. Otherwise gradients and their
# squares are denormal numbers in heads that separate their classes: products and AdamW get ten times slower or more.
LEAST_LOG_PROBABILITY = -36.0
STATISTICS_ROWS = 1024
# Limit for inputs that are normalised once and not once per epoch, for all stacks together. It is small beside the
# memory of Python, torch and Ray in a worker, and enough for a few thousand rows, where epochs are short.
PREPARED_BYTES = 128 * 2**20
# Inputs of all stacks per read: several batches share the cost of a read, and still fit into the CPU cache.
BLOCK_BYTES = 8 * 2**20
# Logits of all heads per evaluation step.
LOGITS_BYTES = 64 * 2**20


class FeatureRows(Protocol):
    """A matrix of features `(num_rows, num_features)`: a tensor, or a file with the same indexing."""

    @property
    def shape(self) -> Sequence[int]:
        """Number of rows and of features."""
        ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Returns the rows with these int64 numbers: `(*rows.shape, num_features)`."""
        ...


@dataclass(frozen=True)
class FeatureSet:
    """Cached features of one split: `parts[name]` is `(num_rows, num_features)`, labels `(num_rows,)` int64.

    Rows with the same number in `groups`, integers `(num_rows,)`, belong together; without it, each row stands alone.
    """

    parts: Mapping[str, FeatureRows]
    labels: Tensor
    groups: Tensor | None = None

    def source(self, parts: Sequence[str], rows: Tensor) -> Tensor:
        """Returns float32 features `(*rows.shape, num_features)`: the concatenated parts of a feature source."""
        return torch.cat([self.parts[part][rows] for part in parts], dim=-1).float()


@dataclass(frozen=True)
class Subsets:
    """Few-shot draws of one size: int64 positions in train and validation, each `(num_subsets, num_rows)`."""

    train: Tensor
    validation: Tensor


@dataclass
class HeadResult:
    """One setting's trained heads, one per subset.

    `history` has one dict of metrics per epoch, each the mean over the subsets.
    """

    setting: Mapping[str, Any]
    heads: tuple[Head, ...] = ()
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def head(self) -> Head:
        """The head of the first subset; the only head if training uses all rows."""
        return self.heads[0]


def train_population(
    train: FeatureSet,
    validation: FeatureSet,
    settings: Sequence[Mapping[str, Any]],
    *,
    sources: Mapping[str, tuple[str, ...]],
    num_classes: int,
    batch_size: int,
    seed: int,
    subsets: Subsets | None = None,
) -> list[HeadResult]:
    """Trains one linear head per setting and subset, all together.

    Args:
        train: training features; the labels are on the training device.
        validation: features that evaluate every head after each of its epochs.
        settings: one dict per head: `learning_rate` above zero, `weight_decay`, `epochs`, `features`, `normalize`.
        sources: feature source -> the cached parts it concatenates.
        num_classes: number of classes.
        batch_size: global batch size, over all workers.
        seed: seed of the order of the rows, which is the same for every head and any number of workers.
        subsets: few-shot subsets; each setting trains one head per subset. None for one head on all rows.

    Returns:
        One result per setting, in the order of `settings`.
    """
    if subsets is None:
        subsets = Subsets(*(torch.arange(len(split.labels))[None] for split in (train, validation)))
    num_rows = subsets.train.shape[1]
    stacks = _build_stacks(train, subsets.train, settings, sources, num_classes, math.ceil(num_rows / batch_size))
    train_rows, validation_rows = _Rows(train, subsets.train, stacks), _Rows(validation, subsets.validation, stacks)
    num_epochs = max(int(setting["epochs"]) for setting in settings)
    for epoch in range(num_epochs):
        started = time.perf_counter()
        active = [stack for stack in stacks if stack.start_epoch(epoch)]
        batches = torch.randperm(num_rows, generator=seeded_generator(seed, epoch)).split(batch_size)
        _train_epoch(active, train_rows, batches)
        _finish_epoch(active, num_rows, validation_rows, started)
    results = {index: result for stack in stacks for index, result in stack.results.items()}
    return [results[index] for index in range(len(settings))]


def _build_stacks(
    train: FeatureSet,
    subsets: Tensor,
    settings: Sequence[Mapping[str, Any]],
    sources: Mapping[str, tuple[str, ...]],
    num_classes: int,
    steps_per_epoch: int,
) -> list[_Stack]:
    groups: dict[tuple[str, str], list[tuple[int, Mapping[str, Any]]]] = {}
    for index, setting in enumerate(settings):
        groups.setdefault((setting["features"], setting["normalize"]), []).append((index, setting))
    return [
        _Stack(train, subsets, members, sources[source], normalize, num_classes, steps_per_epoch)
        for (source, normalize), members in groups.items()
    ]


def _train_epoch(stacks: Sequence[_Stack], rows: _Rows, batches: Sequence[Tensor]) -> None:
    """Trains on global batches of positions in the subsets; one read serves several batches."""
    length = max(1, rows.rows_per_read // len(batches[0]))
    for start in range(0, len(batches), length):
        block = batches[start : start + length]
        own = [own_rows(batch) for batch in block]
        inputs, labels = rows.read(torch.cat(own), stacks)
        sizes = [(len(batch), len(share)) for batch, share in zip(block, own, strict=True)]
        for stack in stacks:
            stack.train(inputs[stack], labels, sizes)


def _finish_epoch(stacks: Sequence[_Stack], num_train_rows: int, validation: _Rows, started: float) -> None:
    """Evaluates every head on its validation rows, and adds the metrics to its history."""
    num_heads, num_classes = sum(stack.num_heads for stack in stacks), stacks[0].num_classes
    row_bytes = 4 * len(validation.labels) * num_heads * num_classes
    rows = min(validation.rows_per_read, max(1, LOGITS_BYTES // row_bytes))
    sums = [MetricSums(num_heads, num_classes, validation.labels.device) for _ in validation.labels]
    for positions in own_rows(torch.arange(validation.labels.shape[1])).split(rows):
        inputs, labels = validation.read(positions, stacks)
        logits = torch.cat([stack.logits(inputs[stack]) for stack in stacks], dim=2)
        for subset_sums, subset_logits, subset_labels in zip(sums, logits, labels, strict=True):
            subset_sums.add(subset_logits, subset_labels)
    computed = [subset_sums.compute() for subset_sums in sums]
    losses = torch.cat([stack.loss_sums() for stack in stacks], dim=-1)
    table = {
        "train/loss": sum_over_workers(losses) / num_train_rows,
        **{validation_key(name): torch.stack([one[name] for one in computed]) for name in METRICS},
    }
    values = torch.stack(list(table.values()), dim=-1).transpose(0, 1).tolist()
    # The same for every head: they share the reads, and the code waits for a GPU only here.
    seconds = (time.perf_counter() - started) / num_heads
    for stack in stacks:
        own, values = values[: stack.num_heads], values[stack.num_heads :]
        stack.finish_epoch([[dict(zip(table, subset, strict=True)) for subset in head] for head in own], seconds)


class _Rows:
    """The inputs of each stack from a split's subsets: float32 `(num_subsets, rows, num_features)`."""

    def __init__(self, features: FeatureSet, subsets: Tensor, stacks: Sequence[_Stack]) -> None:
        self.features, self.subsets, self.labels = features, subsets.cpu(), features.labels[subsets]
        row_bytes = 4 * len(subsets) * sum(stack.num_features for stack in stacks)
        self.rows_per_read = max(1, BLOCK_BYTES // row_bytes)
        self.prepared: dict[_Stack, Tensor] = {}
        if row_bytes * subsets.shape[1] <= PREPARED_BYTES:
            self.prepared, _ = self.read(torch.arange(subsets.shape[1]), stacks)

    def read(self, positions: Tensor, stacks: Sequence[_Stack]) -> tuple[dict[_Stack, Tensor], Tensor]:
        """Returns the stacks' inputs, and int64 labels `(num_subsets, len(positions))`, at positions in the subsets."""
        on_device = positions.to(self.labels.device)
        labels = self.labels.index_select(1, on_device)
        if self.prepared:
            return {stack: self.prepared[stack].index_select(1, on_device) for stack in stacks}, labels
        rows = self.subsets[:, positions]
        parts = {part: self.features.parts[part][rows] for part in {part for stack in stacks for part in stack.parts}}
        return {s: s.normalized(torch.cat([parts[part] for part in s.parts], dim=-1).float()) for s in stacks}, labels


class _Stack:
    """Heads with the same inputs, longest schedule first, so that the heads that still train are always a prefix.

    AdamW (Loshchilov & Hutter 2019) with a learning rate and weight decay per head, and cosine to zero. Torch's fused
    kernel has one rate for all, which is set to 1. So parameters are stored divided by their head's current rate, and
    rescaled when the rate changes, in the same product as the weight decay. Logits are multiplied by the rate.
    """

    def __init__(
        self,
        train: FeatureSet,
        subsets: Tensor,
        members: list[tuple[int, Mapping[str, Any]]],
        parts: tuple[str, ...],
        normalize: str,
        num_classes: int,
        steps_per_epoch: int,
    ) -> None:
        self.members = sorted(members, key=lambda member: -int(member[1]["epochs"]))
        self.parts, self.normalize, self.num_classes = parts, normalize, num_classes
        self.num_features = sum(train.parts[part].shape[1] for part in parts)
        self.epochs = [int(setting["epochs"]) for _, setting in self.members]
        self.num_heads = len(self.members)
        self.results = {index: HeadResult(setting) for index, setting in self.members}
        device = train.labels.device
        columns = [[float(setting[name]) for _, setting in self.members] for name in ("learning_rate", "weight_decay")]
        self.learning_rates, self.weight_decays = torch.tensor(columns, dtype=torch.float64, device=device)
        self.num_steps = torch.tensor(self.epochs, dtype=torch.float64, device=device) * steps_per_epoch
        self.steps_per_epoch = steps_per_epoch
        self.mean = torch.zeros(len(subsets), self.num_features, device=device)
        self.scale = torch.ones_like(self.mean)
        if normalize == "standardize":
            self.mean, self.scale = feature_statistics(train, parts, subsets)
        self.adam_steps = torch.zeros((), device=device)
        num_parameters = len(subsets) * num_classes * self.num_heads * (self.num_features + 1)
        self._make_views(torch.zeros(4, num_parameters, device=device))
        self.units = self.learning_rates

    def _make_views(self, state: Tensor) -> None:
        """Makes views of parameters, gradients and Adam's two moments: flat vectors of all weights, then all biases."""
        shape = (len(self.mean), self.num_classes, self.num_heads)
        num_biases = math.prod(shape)
        weights, biases = state.split([num_biases * self.num_features, num_biases], dim=1)
        self.state = state.unbind()
        # Heads come after classes, because softmax over a short last dimension is many times slower.
        self.weights, self.biases = weights.view(4, *shape, self.num_features), biases.view(4, *shape)
        self.weight, self.weight_gradient = self.weights[:2]
        self.bias, self.bias_gradient = self.biases[:2]

    def start_epoch(self, epoch: int) -> int:
        """Removes heads that have trained all their epochs; returns the number of heads that still train."""
        active = sum(epochs > epoch for epochs in self.epochs)
        if active < self.num_heads:
            self.num_heads = active
            kept = self.weights[:, :, :, :active].flatten(1), self.biases[:, :, :, :active].flatten(1)
            self._make_views(torch.cat(kept, dim=1))
            self.units = self.units[:active]
        if not active:
            return 0
        steps = torch.arange(self.steps_per_epoch, device=self.units.device) + epoch * self.steps_per_epoch
        # Cosine to zero: (1 + cos x) / 2, computed as cos(x / 2) ** 2, which is never zero before x = pi.
        rates = self.learning_rates[:active] * (math.pi / 2 * steps[:, None] / self.num_steps[:active]).cos().square()
        before = torch.cat([self.units[None], rates[:-1]])
        growth = before / rates
        decay = growth * (1 - rates * self.weight_decays[:active])
        self.schedule, self.units = torch.stack([before, growth, decay], dim=1).float(), rates[-1]
        self.losses = torch.empty(len(steps), len(self.mean), active, device=steps.device)
        self.step = 0
        return active

    def train(self, inputs: Tensor, labels: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
        """Does one step of every active head for each batch.

        Args:
            inputs: this worker's rows of all batches, `(num_subsets, rows, num_features)`.
            labels: `(num_subsets, rows)`.
            sizes: rows of each batch: of all workers, and of this worker.
        """
        own_sizes = [own_size for _, own_size in sizes]
        index = labels[:, :, None, None].expand(-1, -1, 1, self.num_heads)
        batches = zip(sizes, inputs.split(own_sizes, dim=1), index.split(own_sizes, dim=1), strict=True)
        for (num_rows, _), batch_inputs, batch_index in batches:
            self._step(batch_inputs, batch_index, num_rows)

    def _step(self, inputs: Tensor, labels: Tensor, num_rows: int) -> None:
        before, growth, decay = self.schedule[self.step]
        log_probabilities = self._logits(inputs, before).log_softmax(2)
        torch.sum(log_probabilities.gather(2, labels), (1, 2), out=self.losses[self.step])
        self.step += 1
        # The gradient of mean cross-entropy in closed form: (softmax - one-hot) / batch, then one product per stack.
        errors = (
            log_probabilities.clamp_(min=LEAST_LOG_PROBABILITY)
            .exp_()
            .scatter_(2, labels, -1, reduce="add")
            .div_(num_rows)
        )
        torch.bmm(errors.flatten(2).transpose(1, 2), inputs, out=self.weight_gradient.flatten(1, 2))
        torch.sum(errors, 1, out=self.bias_gradient)
        self.weight.mul_(decay[:, None])
        self.bias.mul_(growth)
        parameters, gradients, means, squares = self.state
        adamw(
            [parameters],
            [sum_over_workers(gradients)],
            [means],
            [squares],
            [],
            [self.adam_steps],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPSILON,
            lr=1.0,
            weight_decay=0.0,
        )

    def logits(self, inputs: Tensor) -> Tensor:
        """Returns logits `(num_subsets, rows, num_heads, num_classes)`; inputs `(num_subsets, rows, num_features)`."""
        return self._logits(inputs, self.units.float()).transpose(2, 3).contiguous()

    def _logits(self, inputs: Tensor, units: Tensor) -> Tensor:
        weight, bias = self.weight.flatten(1, 2).transpose(1, 2), self.bias.flatten(1)[:, None]
        logits = torch.baddbmm(bias, inputs, weight)
        return logits.view(*inputs.shape[:2], self.num_classes, self.num_heads).mul_(units)

    def loss_sums(self) -> Tensor:
        """Returns the epoch's summed train losses, float64 `(num_subsets, num_heads)`."""
        return -self.losses.sum(0, dtype=torch.float64)

    def finish_epoch(self, metrics: list[list[dict[str, float]]], seconds: float) -> None:
        """Adds each active head's mean metrics over subsets to its history; stores the heads that have finished."""
        for position, subset_metrics in enumerate(metrics):
            index, _ = self.members[position]
            result = self.results[index]
            mean = {name: statistics.fmean(one[name] for one in subset_metrics) for name in subset_metrics[0]}
            result.history.append({**mean, "time/epoch_s": seconds})
            if len(result.history) == self.epochs[position]:
                result.heads = tuple(self._head(position, subset) for subset in range(len(subset_metrics)))

    def _head(self, position: int, subset: int) -> Head:
        head = Head(self.num_features, self.num_classes, self.normalize)
        unit = self.units[position].float()
        head.weight.data.copy_(self.weight[subset, :, position] * unit)
        head.bias.data.copy_(self.bias[subset, :, position] * unit)
        head.mean.copy_(self.mean[subset])
        head.scale.copy_(self.scale[subset])
        return head

    def normalized(self, features: Tensor) -> Tensor:
        """Returns normalised features; raw and normalised `(num_subsets, rows, num_features)`."""
        return normalize_features(features, self.normalize, self.mean[:, None], self.scale[:, None])


def feature_statistics(train: FeatureSet, parts: Sequence[str], subsets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and scale, each float32 `(num_subsets, num_features)`, of subsets of the train rows.

    The scale is the standard deviation; for a constant feature it is 1. `subsets` is int64 `(num_subsets, num_rows)`.
    """
    num_rows = subsets.shape[1]
    total = squares = torch.zeros((), dtype=torch.float64, device=train.labels.device)
    for rows in subsets.split(max(1, STATISTICS_ROWS // len(subsets)), dim=1):
        features = train.source(parts, rows).double()
        total, squares = total + features.sum(1), squares + features.square().sum(1)
    mean = total / num_rows
    deviation = (squares / num_rows - mean.square()).clamp(min=0).sqrt()
    return mean.float(), standard_scale(mean, deviation).float()
