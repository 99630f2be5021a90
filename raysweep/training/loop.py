"""The training loop of fine_tune and from_scratch, to be read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysweep.encoders.head import Classifier
from raysweep.training.augment import augmentation_draws, random_resized_crop
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
    seeded_generator,
    sum_over_workers,
    world_size,
)
from raysweep.training.metrics import MetricSums

EVALUATION_ROWS = 128
# In the names of parameters that are inputs of their own rather than weights; not "token": token mixers are weights.
LEARNED_INPUTS = ("position", "pos_embed", "_token", "head.probe", "class_embedding")


@dataclass(frozen=True)
class PixelSet:
    """Cached pixels of one split: uint8 `(num_rows, side, side, 3)` and labels `(num_rows,)` int64, in host memory."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class LoopOptions:
    """What all trials of a study share.

    `batch_size` is global. `augmentation` holds `min_crop_scale` and `horizontal_flip`, or is None. `precision` is
    `fp32` or `bf16`.
    """

    batch_size: int
    seed: int
    metric: str
    direction: str
    patience: int
    precision: str = "fp32"
    augmentation: dict[str, Any] | None = None
    warmup_fraction: float = 0.05
    gradient_clip: float = 1.0


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
    setting: dict[str, Any],
    options: LoopOptions,
    folder: Path,
    on_epoch: Callable[[dict[str, float]], None] = lambda _metrics: None,
) -> LoopResult:
    """Trains a classifier for the setting's epochs, keeping its best epoch.

    AdamW with layer-wise learning-rate decay, linear warm-up then cosine to zero, clipped gradients. A `last`
    checkpoint in `folder` from an earlier, interrupted call with the same setting is continued.

    Args:
        model: the classifier, on the device to train on.
        parallel: what to call for a forward pass: `model`, or its DistributedDataParallel wrapper.
        train: training rows; every worker holds them all and takes its share of each global batch.
        validation: rows that each epoch is evaluated on.
        setting: `learning_rate`, `epochs`, `weight_decay` and, optionally, `layer_decay`.
        options: what all trials share.
        folder: where `best.safetensors` and `last.safetensors` go (rank 0 writes).
        on_epoch: called on every rank with the epoch's metrics.
    """
    num_epochs, num_rows = int(setting["epochs"]), len(train.labels)
    steps_per_epoch = math.ceil(num_rows / options.batch_size)
    optimizer = build_optimizer(model, setting)
    schedule = warmup_cosine(num_epochs * steps_per_epoch, options.warmup_fraction)
    result = _restore(model, optimizer, folder)
    for metrics in result.history:
        on_epoch(metrics)
    for epoch in range(len(result.history), num_epochs):
        if _is_over(result, options):
            break
        started = time.perf_counter()
        # Dropout and the like draw from the global state: a function of epoch and rank, so a resumed trial agrees.
        torch.manual_seed(options.seed * 1_000_003 + epoch * 1_009 + rank())
        model.train()
        order = torch.randperm(num_rows, generator=seeded_generator(options.seed, epoch))
        draws = augmentation_draws(num_rows, options.seed, epoch)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device_of(model))
        # Cut into batches of nearly equal size: a last one of a few rows would spoil the batch-norm statistics.
        for step, batch in enumerate(order.tensor_split(steps_per_epoch)):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(epoch * steps_per_epoch + step)
            loss = _batch_loss(model, parallel, train, batch, draws, options)
            optimizer.zero_grad(set_to_none=True)
            # DistributedDataParallel averages over workers; the loss is a share of the global mean.
            (loss * world_size()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
            optimizer.step()
            loss_sum += loss.detach() * len(batch)
        train_loss = float(sum_over_workers(loss_sum)) / num_rows
        # Batch-norm statistics come from each worker's own rows; all must evaluate the model that is saved.
        copy_from_first(model.buffers())
        seconds = time.perf_counter() - started
        metrics = {"train/loss": train_loss, "train/images_per_second": num_rows / seconds}
        metrics |= evaluate_classifier(model, validation, options)
        metrics |= {"train/learning_rate": optimizer.param_groups[-1]["lr"], "time/epoch_s": seconds}
        result.history.append(metrics)
        if _improves(metrics, result.best, options):
            result.best_epoch = epoch
        if rank() == 0:
            _save(model, optimizer, result, folder)
        on_epoch(metrics)
    return result


def _is_over(result: LoopResult, options: LoopOptions) -> bool:
    """Whether training diverged, or has not improved for as many epochs as patience allows."""
    if not result.history:
        return False
    diverged = not math.isfinite(result.history[-1]["train/loss"])
    return diverged or len(result.history) - 1 - result.best_epoch >= options.patience


def _batch_loss(
    model: Classifier, parallel: nn.Module, train: PixelSet, batch: Tensor, draws: Tensor, options: LoopOptions
) -> Tensor:
    """This worker's share of the mean cross-entropy over the global batch of row indices."""
    rows = own_rows(batch)
    weight = 1.0 if len(rows) else 0.0
    if len(rows) == 0:  # a worker without a row must still join the others' gradient synchronisation
        rows = batch[:1]
    device = device_of(model)
    pixels, labels = train.pixels[rows].to(device, non_blocking=True), train.labels[rows].to(device)
    preprocessing = model.encoder.preprocessing
    if options.augmentation is None:
        pixels = preprocessing.centre_crop(pixels)
    else:
        scale, flip = options.augmentation["min_crop_scale"], options.augmentation["horizontal_flip"]
        pixels = random_resized_crop(pixels, draws[rows].to(device), preprocessing.output_size, scale, flip)
    with autocast(device, options.precision):
        logits = parallel(preprocessing.normalize(pixels))
    return F.cross_entropy(logits.float(), labels, reduction="sum") * weight / len(batch)


def evaluate_classifier(model: Classifier, validation: PixelSet, options: LoopOptions) -> dict[str, float]:
    """Returns `val/loss`, `val/accuracy`, `val/macro_f1`; every row is evaluated by exactly one worker."""
    sums = MetricSums(1, model.head.weight.shape[0], device_of(model))
    rows = own_rows(torch.arange(len(validation.labels)))
    for chunk in rows.split(EVALUATION_ROWS):
        logits = predict_logits(model, validation.pixels[chunk], options.precision)
        sums.add(logits[:, None], validation.labels[chunk].to(logits.device))
    metrics = {name: float(values[0]) for name, values in sums.compute().items()}
    assert metrics["num_rows"] == len(validation.labels), "evaluation must count every row once"
    return {f"val/{name}": metrics[name] for name in ("loss", "accuracy", "macro_f1")}


@torch.inference_mode()
def predict_logits(model: Classifier, pixels: Tensor, precision: str = "fp32") -> Tensor:
    """Logits `(batch, num_classes)` float32 of uint8 pixels `(batch, side, side, 3)`, on the model's device."""
    model.eval()
    device, preprocessing = device_of(model), model.encoder.preprocessing
    with autocast(device, precision):
        logits = model(preprocessing.normalize(preprocessing.centre_crop(pixels.to(device))))
    return logits.float()  # type: ignore[no-any-return]


def build_optimizer(model: Classifier, setting: dict[str, Any]) -> torch.optim.AdamW:
    """AdamW whose groups' `peak_lr` decays by `layer_decay` for every block below the head.

    Norms, biases, position embeddings and learned tokens take no weight decay. Frozen parameters are left out.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks = [*model.encoder.blocks(), list(model.head.parameters())]
    layer_decay = float(setting.get("layer_decay", 1.0))
    groups: list[dict[str, Any]] = []
    for depth, block in enumerate(blocks):
        rate = float(setting["learning_rate"]) * layer_decay ** (len(blocks) - 1 - depth)
        for decays in (True, False):
            members = [p for p in block if p.requires_grad and _takes_weight_decay(names[id(p)], p) is decays]
            if members:
                decay = float(setting["weight_decay"]) if decays else 0.0
                groups.append({"params": members, "peak_lr": rate, "lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, fused=device_of(model).type == "cuda")


def _takes_weight_decay(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and not any(word in name for word in LEARNED_INPUTS)


def freeze_unused_parameters(model: Classifier) -> None:
    """Freezes what a forward pass never reaches: a mask token, the projection of another feature source.

    To be called before DistributedDataParallel wraps the model: it would wait for gradients that never come.
    """
    model.eval()  # batch-norm statistics must not see this made-up image
    with torch.enable_grad():
        logits = model(torch.zeros(1, 3, *model.encoder.preprocessing.output_size, device=device_of(model)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def warmup_cosine(num_steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """Returns step -> factor of the peak rate: linear warm-up, then cosine to zero at `num_steps`."""
    num_warmup = int(num_steps * warmup_fraction)

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))

    return factor


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision for `bf16`, nothing for `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def device_of(model: nn.Module) -> torch.device:
    """Returns the device that a module's parameters lie on."""
    return next(model.parameters()).device


def _improves(metrics: dict[str, float], best: dict[str, float] | None, options: LoopOptions) -> bool:
    return best is None or ranking_key(metrics, options) > ranking_key(best, options)


def ranking_key(metrics: dict[str, float], options: LoopOptions) -> tuple[float, float]:
    """Larger is better: the study's metric, then the lower validation loss among equals."""
    value, loss = metrics[options.metric], metrics["val/loss"]
    sign = 1 if options.direction == "maximize" else -1
    return (sign * value if math.isfinite(value) else -math.inf, -loss if math.isfinite(loss) else -math.inf)


def _save(model: Classifier, optimizer: torch.optim.Optimizer, result: LoopResult, folder: Path) -> None:
    weights = model.state_dict()
    if result.best_epoch == len(result.history) - 1:
        save_checkpoint(result.checkpoint, weights, {"epoch": result.best_epoch, "metrics": result.best})
    state = {"history": result.history, "best_epoch": result.best_epoch}
    save_checkpoint(folder / "last.safetensors", weights | optimizer_tensors(optimizer), state)


def _restore(model: Classifier, optimizer: torch.optim.Optimizer, folder: Path) -> LoopResult:
    result, last = LoopResult(folder / "best.safetensors"), folder / "last.safetensors"
    if last.exists() and result.checkpoint.exists():
        tensors, state = load_checkpoint(last)
        model.load_state_dict({n: t for n, t in tensors.items() if not n.startswith("optimizer.")})
        load_optimizer_tensors(optimizer, tensors)
        result.history, result.best_epoch = state["history"], state["best_epoch"]
    return result
