"""The training loop of fine_tune and from_scratch. Read it from top to bottom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from raysweep.encoders.head import Classifier
from raysweep.errors import TrialError
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
from raysweep.training.optimizer import average_weights, build_optimizer, set_training, warmup_cosine
from raysweep.training.pixel_rows import PixelSet, read_ahead
from raysweep.training.ranking import Ranking

logger = logging.getLogger(__name__)

EVALUATION_ROWS = 128
# Default rows per forward pass on a CPU; a GPU takes its whole share of a batch. On CPUs the activations of many images
# do not fit into the cache: on two cores MobileNetV2 trained on 21 images/s with 16 rows, and on 11 images/s with 64.
CPU_MICRO_BATCH = 16


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """Options of the training loop that all trials of a study share.

    Attributes:
        batch_size: rows per step, of all workers together.
        seed: seed of the shuffle, the augmentation and dropout.
        ranking: how epochs are ranked.
        patience: number of epochs without a better one after which training ends; None for the whole schedule.
        evaluates_start: whether the weights before the first step are a candidate for the best, as epoch 0.
        freezes_batch_norm: whether batch-norm statistics stay as they are before the first step.
        precision: `fp32` or `bf16`.
        augmentation: augmentation of the training images; None for centre crops.
        warmup_fraction: share of the steps in which the learning rate rises.
        gradient_clip: largest norm of the gradient.
        label_smoothing: share of a label that is spread evenly over all classes (Szegedy et al. 2016).
        ema_decay: decay of an exponential moving average of the weights; `auto` by number of steps; None for none.
        micro_batch_size: rows of a worker per forward pass; None for the device's default.
    """

    batch_size: int
    seed: int
    ranking: Ranking
    patience: int | None = None
    evaluates_start: bool = False
    freezes_batch_norm: bool = False
    precision: str = "fp32"
    augmentation: Augmentation | None = None
    warmup_fraction: float = 0.05
    gradient_clip: float = 1.0
    label_smoothing: float = 0.0
    ema_decay: float | Literal["auto"] | None = None
    micro_batch_size: int | None = None


@dataclass
class LoopResult:
    """Metrics of each epoch, the index of the best one, and its checkpoint.

    Attributes:
        checkpoint: the weights of the best epoch.
        start: validation metrics before the first step; None if they are no candidate.
        history: metrics of each epoch.
        best_epoch: index of the best epoch; -1 if that is the start, or if there is none.
    """

    checkpoint: Path
    start: dict[str, float] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1

    @property
    def best(self) -> dict[str, float] | None:
        """Metrics of the best epoch, or of the start; None if there is none."""
        return self.history[self.best_epoch] if self.best_epoch >= 0 else self.start


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
    """Trains a classifier for the setting's epochs, and saves its best epoch.

    AdamW (Loshchilov & Hutter 2019) with layer-wise learning-rate decay, linear warm-up, cosine to zero, and gradient
    clipping. Continues from a `last` checkpoint in `folder`, of an interrupted call with the same setting; begins anew
    if a checkpoint there is damaged.

    Args:
        model: the classifier, on the training device.
        parallel: module for the forward pass: `model`, its DistributedDataParallel wrapper, or either compiled.
        train: training rows. Every worker can read all; each uses its share of every global batch.
        validation: rows that evaluate each epoch.
        setting: `learning_rate`, `epochs`, `weight_decay` and, optionally, `layer_decay`, `augmentation_strength`.
        options: options that all trials share.
        folder: folder of `best.safetensors` and `last.safetensors`; only rank 0 writes.
        on_epoch: called on every rank with the epoch's metrics.
    """
    num_epochs, num_rows, device = int(setting["epochs"]), len(train.labels), device_of(model)
    augmentation = options.augmentation
    if augmentation is not None:
        augmentation = augmentation.scaled(float(setting.get("augmentation_strength", 1.0)))
    num_at_once = rows_at_once(options, device)
    num_steps = num_epochs * math.ceil(num_rows / options.batch_size)
    optimizer, average = build_optimizer(model, setting), average_weights(model, options.ema_decay, num_steps)
    evaluated = cast(Classifier, average.module) if average else model
    schedule = warmup_cosine(num_steps, options.warmup_fraction)
    result = _restore(model, average, optimizer, setting, folder)
    if options.evaluates_start and result.start is None:
        _take_start(result, model, evaluate_classifier(model, validation, options))
    for metrics in result.history:
        on_epoch(metrics)
    for epoch in range(len(result.history), num_epochs):
        if _is_over(result, options):
            break
        started = time.perf_counter()
        # Dropout uses the global generator. Its seed depends on epoch and rank, so a resumed trial draws the same.
        torch.manual_seed(options.seed * 1_000_003 + epoch * 1_009 + rank())
        set_training(model, options.freezes_batch_norm)
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
        # Batch-norm statistics are from each worker's own rows, but all must evaluate the saved model.
        copy_from_first([*model.buffers(), *(average.module.buffers() if average else ())])
        pixels.close()  # frees batches that were read ahead, before the validation rows are read
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
    """Accumulates the gradients of this worker's micro-batches; returns their summed loss, float64 `()`."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=inputs_of.labels.device)
    for part in batch.micro_batches:
        inputs, targets = inputs_of(part, next(pixels))
        with nullcontext() if part is batch.micro_batches[-1] else _unsynchronised(parallel):
            with autocast(inputs.device, options.precision):
                logits = parallel(inputs)
            smoothing = options.label_smoothing
            loss = part.weight * F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
            # Part of the mean over the global batch; DistributedDataParallel averages over workers.
            (loss * (world_size() / batch.num_rows)).backward()
        loss_sum += loss.detach()
    return loss_sum


def _is_over(result: LoopResult, options: LoopOptions) -> bool:
    """Whether training diverged, or has not improved for `patience` epochs."""
    if not result.history:
        return False
    diverged = not math.isfinite(result.history[-1]["train/loss"])
    num_worse = len(result.history) - 1 - result.best_epoch
    return diverged or (options.patience is not None and num_worse >= options.patience)


def _unsynchronised(parallel: nn.Module) -> AbstractContextManager[None]:
    """Returns DistributedDataParallel's `no_sync`, for all micro-batches but the last; no-op for one worker."""
    no_sync: Any = getattr(parallel, "no_sync", nullcontext)
    return no_sync()  # type: ignore[no-any-return]


def evaluate_classifier(model: Classifier, validation: PixelSet, options: LoopOptions) -> dict[str, float]:
    """Returns every metric of the validation split. Exactly one worker evaluates each row."""
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
    """Yields chunks of `rows`, int64 `(chunk,)`, and their logits, float32 `(chunk, num_classes)`."""
    # Without gradients, twice as many images need less memory than in training.
    size = min(EVALUATION_ROWS, 2 * (rows_at_once(options, device_of(model)) or EVALUATION_ROWS))
    chunks = rows.split(size) if len(rows) else ()
    for chunk, pixels in zip(chunks, read_ahead(images.pixels.read(chunks), device_of(model)), strict=True):
        yield chunk, predict_logits(model, pixels, options.precision)


def rows_at_once(options: LoopOptions, device: torch.device) -> int | None:
    """Returns the micro-batch size: as configured, or the device's default; None for a worker's whole share."""
    return options.micro_batch_size or (CPU_MICRO_BATCH if device.type == "cpu" else None)


@torch.inference_mode()
def predict_logits(model: Classifier, pixels: Tensor, precision: str = "fp32") -> Tensor:
    """Returns float32 logits `(batch, num_classes)` of uint8 pixels `(batch, height, width, 3)`, on the model's device.

    If the device runs out of memory, splits the batch into halves.
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
    """Returns a context of mixed precision for `bf16`; no-op for `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of a module's parameters."""
    return next(model.parameters()).device


def _take_start(result: LoopResult, model: Classifier, metrics: dict[str, float]) -> None:
    result.start = metrics
    if rank() == 0:
        save_checkpoint(result.checkpoint, model.state_dict(), {"epoch": -1, "metrics": metrics})


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
    state = {
        "setting": dict(setting), "start": result.start, "history": result.history, "best_epoch": result.best_epoch
    }  # fmt: skip
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
        try:
            load_checkpoint(result.checkpoint)
            tensors, state = load_checkpoint(last)
        except TrialError as error:
            logger.warning("training begins anew: %s", error)
            return result
        if state.get("setting") != setting:  # from a trial with the same number in a journal that was lost
            return result
        model.load_state_dict({n: t for n, t in tensors.items() if not n.startswith(("optimizer.", "average."))})
        if average:
            averages = {n.removeprefix("average."): t for n, t in tensors.items() if n.startswith("average.")}
            average.load_state_dict(averages)
        load_optimizer_tensors(optimizer, tensors)
        result.start, result.history, result.best_epoch = state.get("start"), state["history"], state["best_epoch"]
    return result
