"""The training loop of fine_tune and from_scratch, to be read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from raysweep.encoders.head import Classifier
from raysweep.storage.copies import exists
from raysweep.training.augment import Augmentation
from raysweep.training.batches import Batch, EpochInputs, plan_epoch
from raysweep.training.checkpoint import (
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from raysweep.training.distributed import (
    copy_from_first,
    own_rows,
    rank,
    sum_over_workers,
    world_size,
)
from raysweep.training.metrics import MetricSums, validation_metrics
from raysweep.training.optimizer import average_weights, build_optimizer, warmup_cosine
from raysweep.training.pixel_rows import PixelSet, read_ahead
from raysweep.training.ranking import Ranking

EVALUATION_ROWS = 128
# Rows at once where a worker is not told how many: a GPU takes its whole share of a batch. On CPUs the activations of
# many images fall out of the cache: MobileNetV2 trained on 21 images/s in sixteens and on 11 in 64s, on two cores.
CPU_MICRO_BATCH = 16


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """What all trials of a study share.

    Attributes:
        batch_size: rows a step, of all workers together.
        seed: decides the shuffle, the augmentation and dropout.
        ranking: how epochs are ranked.
        patience: epochs without a better one before training ends.
        precision: `fp32` or `bf16`.
        augmentation: of the training images; None for centre crops.
        warmup_fraction: share of the steps in which the learning rate rises.
        gradient_clip: largest norm of the gradient.
        label_smoothing: share of a label that is given to all classes alike.
        ema_decay: of a moving average of the weights; None for no average.
        micro_batch_size: rows that a worker trains on at once; None for what suits the device.
    """

    batch_size: int
    seed: int
    ranking: Ranking
    patience: int
    precision: str = "fp32"
    augmentation: Augmentation | None = None
    warmup_fraction: float = 0.05
    gradient_clip: float = 1.0
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    micro_batch_size: int | None = None


@dataclass
class LoopResult:
    """History by epoch, the best epoch (from 0; -1 when there was none), and where its weights lie."""

    checkpoint: Path
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1

    @property
    def best(self) -> dict[str, float] | None:
        """Metrics of the best epoch."""
        return self.history[self.best_epoch] if self.best_epoch >= 0 else None


def train_classifier(
    model: Classifier,
    parallel: nn.Module,
    train: PixelSet,
    validation: PixelSet,
    setting: Mapping[str, Any],
    options: LoopOptions,
    folder: Path,
    on_epoch: Callable[[dict[str, float]], None] = lambda _metrics: None,
) -> LoopResult:
    """Trains a classifier for the setting's epochs, keeping its best epoch.

    AdamW with layer-wise learning-rate decay, linear warm-up then cosine to zero, clipped gradients. A `last`
    checkpoint in `folder` from an earlier, interrupted call is continued if its setting is the same.

    Args:
        model: the classifier, on the device to train on.
        parallel: what to call for a forward pass: `model`, its DistributedDataParallel wrapper, or either compiled.
        train: training rows, which every worker can read; each takes its share of every global batch.
        validation: rows that each epoch is evaluated on.
        setting: `learning_rate`, `epochs`, `weight_decay` and, optionally, `layer_decay`, `augmentation_strength`.
        options: what all trials share.
        folder: where `best.safetensors` and `last.safetensors` go (rank 0 writes).
        on_epoch: called on every rank with the epoch's metrics.
    """
    num_epochs, num_rows, device = int(setting["epochs"]), len(train.labels), device_of(model)
    augmentation = options.augmentation
    if augmentation is not None:
        augmentation = augmentation.scaled(float(setting.get("augmentation_strength", 1.0)))
    num_at_once = rows_at_once(options, device)
    num_steps = num_epochs * math.ceil(num_rows / options.batch_size)
    optimizer, average = build_optimizer(model, setting), average_weights(model, options.ema_decay)
    evaluated = cast(Classifier, average.module) if average else model
    schedule = warmup_cosine(num_steps, options.warmup_fraction)
    result = _restore(model, average, optimizer, setting, folder)
    for metrics in result.history:
        on_epoch(metrics)
    for epoch in range(len(result.history), num_epochs):
        if _is_over(result, options):
            break
        started = time.perf_counter()
        # Dropout and the like draw from the global state: a function of epoch and rank, so a resumed trial agrees.
        torch.manual_seed(options.seed * 1_000_003 + epoch * 1_009 + rank())
        model.train()
        inputs_of = EpochInputs.draw(model, train.labels.to(device), augmentation, options.seed, epoch)
        batches = plan_epoch(num_rows, options.batch_size, num_at_once, options.seed, epoch, mixes=inputs_of.mixes)
        reads = [part.reads for batch in batches for part in batch.micro_batches]
        pixels = read_ahead(train.pixels.read(reads), device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for step, batch in enumerate(batches, start=epoch * len(batches)):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step)
            optimizer.zero_grad(set_to_none=True)
            loss_sum += _backward(parallel, batch, inputs_of, pixels, options)
            nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
            optimizer.step()
            if average:
                average.update_parameters(model)
        train_loss = float(sum_over_workers(loss_sum)) / num_rows
        # Batch-norm statistics come from each worker's own rows; all must evaluate the model that is saved.
        copy_from_first([*model.buffers(), *(average.module.buffers() if average else ())])
        pixels.close()  # what was made ready is given back before the validation rows are
        seconds = time.perf_counter() - started
        metrics = {"train/loss": train_loss, "train/images_per_second": num_rows / seconds}
        metrics |= evaluate_classifier(evaluated, validation, options)
        metrics |= {"train/learning_rate": optimizer.param_groups[-1]["lr"], "time/epoch_s": seconds}
        if options.micro_batch_size is not None:
            metrics["train/micro_batch_size"] = options.micro_batch_size
        result.history.append(metrics)
        if result.best is None or options.ranking.key(metrics) > options.ranking.key(result.best):
            result.best_epoch = epoch
        if rank() == 0:
            _save(model, average, optimizer, setting, result, folder)
        on_epoch(metrics)
    return result


def _backward(
    parallel: nn.Module, batch: Batch, inputs_of: EpochInputs, pixels: Iterator[Tensor], options: LoopOptions
) -> Tensor:
    """Adds up the gradients of this worker's share of a batch, by micro-batches; returns its summed loss."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=inputs_of.labels.device)
    for part in batch.micro_batches:
        inputs, targets = inputs_of(part, next(pixels))
        with nullcontext() if part is batch.micro_batches[-1] else _unsynchronised(parallel):
            with autocast(inputs.device, options.precision):
                logits = parallel(inputs)
            smoothing = options.label_smoothing
            loss = part.weight * F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
            # A share of the mean over the global batch; DistributedDataParallel averages over workers.
            (loss * (world_size() / batch.num_rows)).backward()
        loss_sum += loss.detach()
    return loss_sum


def _is_over(result: LoopResult, options: LoopOptions) -> bool:
    """Whether training diverged, or has not improved for as many epochs as patience allows."""
    if not result.history:
        return False
    diverged = not math.isfinite(result.history[-1]["train/loss"])
    return diverged or len(result.history) - 1 - result.best_epoch >= options.patience


def _unsynchronised(parallel: nn.Module) -> AbstractContextManager[None]:
    """Gradients of all micro-batches but the last stay with their worker; a lone worker has none to wait for."""
    no_sync: Any = getattr(parallel, "no_sync", nullcontext)
    return no_sync()  # type: ignore[no-any-return]


def evaluate_classifier(model: Classifier, validation: PixelSet, options: LoopOptions) -> dict[str, float]:
    """Returns every metric of the validation split; every row is evaluated by exactly one worker."""
    sums = MetricSums(1, model.head.weight.shape[0], device_of(model))
    rows = own_rows(torch.arange(len(validation.labels)))
    for chunk, logits in predict_rows(model, validation, rows, options):
        sums.add(logits[:, None], validation.labels[chunk].to(logits.device))
    computed = sums.compute()
    assert int(computed["num_rows"]) == len(validation.labels), "evaluation must count every row once"
    return validation_metrics(computed)


def predict_rows(
    model: Classifier, images: PixelSet, rows: Tensor, options: LoopOptions
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields chunks of `rows` with their logits `(chunk, num_classes)`, as `predict_logits`."""
    # Without gradients twice as many images take less memory than training does.
    size = min(EVALUATION_ROWS, 2 * (rows_at_once(options, device_of(model)) or EVALUATION_ROWS))
    chunks = rows.split(size) if len(rows) else ()
    for chunk, pixels in zip(chunks, read_ahead(images.pixels.read(chunks), device_of(model)), strict=True):
        yield chunk, predict_logits(model, pixels, options.precision)


def rows_at_once(options: LoopOptions, device: torch.device) -> int | None:
    """Size of micro-batches: as told, or what suits the device; None for all that a worker has of a batch."""
    return options.micro_batch_size or (CPU_MICRO_BATCH if device.type == "cpu" else None)


@torch.inference_mode()
def predict_logits(model: Classifier, pixels: Tensor, precision: str = "fp32") -> Tensor:
    """Logits `(batch, num_classes)` float32 of uint8 pixels `(batch, side, side, 3)`, on the model's device.

    Half as many at a time where the device's memory does not hold them.
    """
    model.eval()
    device, preprocessing = device_of(model), model.encoder.preprocessing
    try:
        with autocast(device, precision):
            logits: Tensor = model(preprocessing.normalize(preprocessing.centre_crop(pixels.to(device))))
            return logits
    except torch.OutOfMemoryError:
        if len(pixels) == 1:
            raise
    return torch.cat([predict_logits(model, half, precision) for half in pixels.chunk(2)])


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision for `bf16`, nothing for `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def device_of(model: nn.Module) -> torch.device:
    """Returns the device that a module's parameters lie on."""
    return next(model.parameters()).device


def _save(
    model: Classifier,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    setting: Mapping[str, Any],
    result: LoopResult,
    folder: Path,
) -> None:
    if result.best_epoch == len(result.history) - 1:
        weights = (average.module if average else model).state_dict()
        save_checkpoint(result.checkpoint, weights, {"epoch": result.best_epoch, "metrics": result.best})
    averages = {f"average.{name}": tensor for name, tensor in average.state_dict().items()} if average else {}
    tensors = model.state_dict() | averages | optimizer_tensors(optimizer)
    state = {"setting": dict(setting), "history": result.history, "best_epoch": result.best_epoch}
    save_checkpoint(folder / "last.safetensors", tensors, state)


def _restore(
    model: Classifier,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    setting: Mapping[str, Any],
    folder: Path,
) -> LoopResult:
    result, last = LoopResult(folder / "best.safetensors"), folder / "last.safetensors"
    if exists(last) and exists(result.checkpoint):
        tensors, state = load_checkpoint(last)
        if state.get("setting") != setting:  # of a trial that a lost journal knew by the same number
            return result
        model.load_state_dict({n: t for n, t in tensors.items() if not n.startswith(("optimizer.", "average."))})
        if average:
            averages = {n.removeprefix("average."): t for n, t in tensors.items() if n.startswith("average.")}
            average.load_state_dict(averages)
        load_optimizer_tensors(optimizer, tensors)
        result.history, result.best_epoch = state["history"], state["best_epoch"]
    return result
