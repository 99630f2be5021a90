"""The optimiser of fine_tune and from_scratch: AdamW by depth of layer, its schedule, and a moving average."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raysweep.encoders.head import Classifier

# Parts of the names of parameters that are inputs, not weights. "token" is not here, because token mixers are weights.
LEARNED_INPUTS = ("position", "pos_embed", "_token", "head.probe", "class_embedding")


def build_optimizer(model: Classifier, setting: Mapping[str, Any]) -> torch.optim.AdamW:
    """Returns AdamW (Loshchilov & Hutter 2019); `peak_lr` is multiplied by `layer_decay` per block below the head.

    Layer-wise decay: Bao et al. 2022 (BEiT). No weight decay for norms, biases, position embeddings and learned tokens.
    Frozen parameters are left out.
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
    return torch.optim.AdamW(groups, fused=model.head.weight.is_cuda)


def _takes_weight_decay(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and not any(word in name for word in LEARNED_INPUTS)


def freeze_unused_parameters(model: Classifier) -> None:
    """Freezes parameters that a forward pass does not use: a mask token, the projection of another feature source.

    Call it before DistributedDataParallel wraps the model, which would wait for their gradients.
    """
    model.eval()  # so that this blank image does not change batch-norm statistics
    with torch.enable_grad():
        image = torch.zeros(1, 3, *model.encoder.preprocessing.output_size, device=model.head.weight.device)
        logits = model(image)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def set_training(model: nn.Module, freezes_batch_norm: bool) -> None:
    """Puts a model into training mode; if asked, batch norm goes on using its running statistics, and keeps them."""
    model.train()
    for module in model.modules():
        if freezes_batch_norm and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def warmup_cosine(num_steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """Returns step -> factor of the peak rate: linear warm-up, then cosine to zero (Loshchilov & Hutter 2017)."""
    num_warmup = int(num_steps * warmup_fraction)

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))

    return factor


def average_weights(model: Classifier, decay: float | Literal["auto"] | None, num_steps: int) -> AveragedModel | None:
    """Returns a moving average of the model over steps, with batch-norm statistics; None if `decay` is None.

    As in Tarvainen & Valpola 2017, the decay after t steps is at most (1 + t) / (10 + t). Otherwise the first weights
    would count too much in short trials. `auto` averages over about a tenth of the `num_steps`: a decay of .98 to .999.
    """
    if decay is None:
        return None
    most = min(0.999, max(0.98, 1 - 10 / num_steps)) if decay == "auto" else decay

    def update(averages: Any, values: Any, num_averaged: Tensor | int) -> None:
        if not averages[0].is_floating_point():  # for example the position ids of CLIP
            torch._foreach_copy_(averages, values)
            return
        # In host memory; to read `num_averaged` would wait for the GPU.
        num_done = int(average.n_averaged)
        get_ema_multi_avg_fn(min(most, (1 + num_done) / (10 + num_done)))(averages, values, num_averaged)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True).eval()
    return average
