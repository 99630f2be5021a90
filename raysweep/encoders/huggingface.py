"""Encoders from transformers: DINOv2, CLIP, SigLIP, and `auto` for any other vision model with pooled features."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from raysweep.encoders.base import Encoder, EncoderSpec, Origin, seeded
from raysweep.encoders.families import FAMILIES, VARIANTS
from raysweep.encoders.preprocess import Preprocessing
from raysweep.encoders.pretrained import PretrainedFiles, describe_error, find_pretrained
from raysweep.encoders.transformers_models import (
    architecture,
    default_preprocessing,
    family_of,
    load_model,
    make_config,
    new_model,
    vision_config,
)
from raysweep.errors import EncoderError, did_you_mean

TORCH_MOMENTUM = 0.1


class HuggingFaceEncoder(Encoder):
    """A transformers vision model and the parts that are taken from its output.

    The constructor changes the model: it removes what serves no part of the spec, freezes the mask token, and corrects
    the momentum of batch norms.

    Attributes:
        model: The transformers model.
        options: Keyword arguments for each call of the model.
    """

    def __init__(self, spec: EncoderSpec, model: nn.Module) -> None:
        super().__init__(spec)
        self.model = model
        # A model resizes its position embeddings only where the size differs, so asking for it always costs nothing.
        accepted = inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        _drop_unused(model, spec)
        mask_token = getattr(getattr(model, "embeddings", None), "mask_token", None)
        if isinstance(mask_token, nn.Parameter):
            # Only self-supervised pretraining uses it, and DDP would wait for its gradient.
            mask_token.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.momentum or 0) > 0.5:
                # TensorFlow's decay (.997 in MobileNet), which transformers gives to torch as the momentum. The
                # running statistics would be those of the last batch only, and the accuracy of a fine-tuned model
                # would depend on that batch.
                module.momentum = TORCH_MOMENTUM

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Maps float `(batch, 3, height, width)` to one tensor `(batch, num_features)` for each part."""
        outputs = self.all_outputs(pixel_values)
        return {part: outputs[part] for part in self.parts}

    def all_outputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Maps float `(batch, 3, height, width)` to every pooled output of the model, also those that are not parts."""
        return _OUTPUTS.get(self.spec.family, _auto_outputs)(self, pixel_values)

    def run_model(self, pixel_values: Tensor) -> Any:
        """Maps float `(batch, 3, height, width)` to the output object of the transformers model."""
        if self.spec.config.get("model_type") != "vit_mae":
            return self.model(pixel_values=pixel_values, **self.options)
        # Its patches are sorted by noise, and random without this; see also `mask_ratio` in `transformers_models`.
        order = torch.arange(_num_patches(self.spec.config, pixel_values) or 0, device=pixel_values.device)
        return self.model(pixel_values=pixel_values, noise=order.expand(len(pixel_values), -1), **self.options)

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """As in `Encoder`. Most transformers support it, most convolutional networks do not."""
        return bool(getattr(self.model, "supports_gradient_checkpointing", False))

    def enable_gradient_checkpointing(self) -> None:
        """As in `Encoder`."""
        model: Any = self.model
        model.activation_checkpointing_enable()


def _drop_unused(model: nn.Module, spec: EncoderSpec) -> None:
    """Removes weights that serve no part of the spec: they may be random, and `weights_signature` would see them."""
    for part, attribute in FAMILIES[spec.family].only_for.items():
        if part not in spec.parts and hasattr(model, attribute):
            setattr(model, attribute, None)


def _dinov2_outputs(encoder: HuggingFaceEncoder, pixel_values: Tensor) -> dict[str, Tensor]:
    tokens = encoder.run_model(pixel_values).last_hidden_state
    num_registers = encoder.spec.config.get("num_register_tokens", 0)
    return {"cls": tokens[:, 0], "mean": tokens[:, 1 + num_registers :].mean(dim=1)}


def _clip_outputs(encoder: HuggingFaceEncoder, pixel_values: Tensor) -> dict[str, Tensor]:
    # Not `run_model`: its `image_embeds` is the projection, and the state before the projection is the better feature.
    model: Any = encoder.model
    cls, projection = model.vision_model(pixel_values, **encoder.options).pooler_output, model.visual_projection
    return {"cls": cls} if projection is None else {"cls": cls, "projected": projection(cls)}


def _siglip_outputs(encoder: HuggingFaceEncoder, pixel_values: Tensor) -> dict[str, Tensor]:
    output = encoder.run_model(pixel_values)
    return {"pooler": output.pooler_output, "mean": output.last_hidden_state.mean(dim=1)}


def _auto_outputs(encoder: HuggingFaceEncoder, pixel_values: Tensor) -> dict[str, Tensor]:
    """Returns the pooled features of an unknown model: its own, and the mean of its tokens or positions."""
    output, parts = encoder.run_model(pixel_values), {}
    pooled, hidden = getattr(output, "pooler_output", None), getattr(output, "last_hidden_state", None)
    if pooled is not None:
        parts["pooler"] = pooled.flatten(1)
    if hidden is not None and hidden.ndim == 3:
        # Class and register tokens come first. They stay out of the mean where the number of patches is known.
        num_patches = _num_patches(encoder.spec.config, pixel_values)
        first = max(hidden.shape[1] - num_patches, 0) if num_patches else 0
        parts["mean"] = hidden[:, first:].mean(dim=1)
    elif hidden is not None and hidden.ndim == 4 and pooled is None:
        parts["mean"] = hidden.mean(dim=(2, 3))
    return parts


def _num_patches(config: Mapping[str, Any], pixel_values: Tensor) -> int | None:
    patch = config.get("patch_size")
    return (pixel_values.shape[2] // patch) * (pixel_values.shape[3] // patch) if isinstance(patch, int) else None


_OUTPUTS: Mapping[str, Callable[[HuggingFaceEncoder, Tensor], dict[str, Tensor]]] = {
    "dinov2": _dinov2_outputs,
    "clip": _clip_outputs,
    "siglip": _siglip_outputs,
}


def build(config: Mapping[str, Any], seed: int) -> HuggingFaceEncoder:
    """Builds an encoder from an encoder block of an experiment: pretrained, or with random weights drawn from `seed`.

    Raises:
        EncoderError: the config is wrong, or the weights cannot be loaded, are incomplete or are of another family.
    """
    kind = config["type"]
    name = config.get("pretrained_model_name_or_path") or FAMILIES[kind].default_weights
    if name is None:
        raise EncoderError(f"pretrained_model_name_or_path: {kind} needs a local folder or a Hugging Face id")
    overrides, image_size = dict(config.get("config") or {}), config.get("image_size")
    if not config.get("use_pretrained", True):
        return _build_random(kind, name, config.get("revision"), overrides=overrides, image_size=image_size, seed=seed)
    if overrides:
        raise EncoderError("config: overrides are for use_pretrained: false; pretrained weights fix the architecture")
    return _build_pretrained(kind, find_pretrained(name, config.get("revision")), image_size)


def from_spec(spec: EncoderSpec) -> HuggingFaceEncoder:
    """Rebuilds the architecture of a spec. No weights are loaded or drawn.

    Raises:
        EncoderError: the installed transformers cannot build it.
    """
    from transformers.initialization import no_init_weights

    # Not on the meta device: no state dict has the non-persistent buffers (position ids), so they would stay empty.
    with seeded(0), no_init_weights():
        model = new_model(spec.family, make_config(spec.config))
    return HuggingFaceEncoder(spec, model)


def _build_pretrained(kind: str, pretrained: PretrainedFiles, image_size: int | None) -> HuggingFaceEncoder:
    family = family_of(kind, pretrained.config["model_type"], pretrained.name)
    config = vision_config(pretrained.config)
    model, missing = load_model(family, pretrained, config)
    preprocessing = pretrained.preprocessing()
    if preprocessing is None:
        base = str(pretrained.config.get("_name_or_path") or "")
        preprocessing = default_preprocessing(family, config, pretrained.name, base)
    if image_size:
        preprocessing = preprocessing.with_image_size(image_size)
    only_for = FAMILIES[family].only_for
    lost = {part for part, attribute in only_for.items() if any(_under(key, attribute) for key in missing)}
    unusable = sorted(key for key in missing if not any(_under(key, only_for[part]) for part in lost))
    if unusable:
        raise EncoderError(
            f"{pretrained.name}: {len(unusable)} weights of {type(model).__name__} are missing in the checkpoint, "
            f"the first: {', '.join(unusable[:3])}; random ones are never put in their place"
        )
    origin = Origin(pretrained.name, pretrained.revision)
    return _assemble(kind, family, model, config=config, preprocessing=preprocessing, origin=origin, lost=lost)


def _build_random(
    kind: str, name: str, revision: str | None, *, overrides: dict[str, Any], image_size: int | None, seed: int
) -> HuggingFaceEncoder:
    preprocessing = None
    if name in VARIANTS:
        base = make_config(VARIANTS[name])
    else:
        pretrained = find_pretrained(name, revision, with_weights=False)
        base, preprocessing = vision_config(pretrained.config), pretrained.preprocessing()
    family = family_of(kind, base.model_type, name)
    accepted = architecture(base)
    for key in overrides:
        if key not in accepted or key == "model_type":
            raise EncoderError(f"config: '{key}' is unknown to {base.model_type}; {did_you_mean(key, accepted)}")
    size = image_size or overrides.get("image_size")
    preprocessing = preprocessing or default_preprocessing(family, base, name)
    preprocessing = preprocessing.with_image_size(size) if size else preprocessing
    if "image_size" in accepted:
        # Random position embeddings are made for the size that the encoder will see, so none are interpolated.
        overrides = {"image_size": preprocessing.output_size[0], **overrides}
    config = make_config({**accepted, **overrides})
    with seeded(seed):
        model = new_model(family, config)
    return _assemble(kind, family, model, config=config, preprocessing=preprocessing, origin=Origin(), lost=())


def _assemble(
    kind: str,
    family: str,
    model: nn.Module,
    *,
    config: Any,
    preprocessing: Preprocessing,
    origin: Origin,
    lost: Collection[str],
) -> HuggingFaceEncoder:
    """Makes the encoder and its spec from a model; `lost` are the parts whose weights are missing."""
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and min(preprocessing.output_size) < patch:
        raise EncoderError(f"image_size: {min(preprocessing.output_size)} is smaller than one patch ({patch} px)")
    candidates = [part for part in FAMILIES[family].parts if part not in lost and _has_part(family, model, part)]
    spec = EncoderSpec(
        type=kind,
        family=family,
        config=architecture(config),
        preprocessing=preprocessing,
        parts=dict.fromkeys(candidates, 0),
        sources={},
        origin=origin,
    )
    outputs = _try_out(HuggingFaceEncoder(spec, model).eval())
    parts = {part: outputs[part].shape[-1] for part in candidates if part in outputs}
    if not parts:
        raise EncoderError(f"{origin.name}: {type(model).__name__} yields neither pooled features nor tokens")
    sources = {source: wanted for source, wanted in FAMILIES[family].sources.items() if set(wanted) <= set(parts)}
    return HuggingFaceEncoder(replace(spec, parts=parts, sources=sources), model)


def _try_out(encoder: HuggingFaceEncoder) -> dict[str, Tensor]:
    """Encodes one black image: what the model yields, and that it accepts this size, is known before any real image."""
    size = encoder.preprocessing.output_size
    try:
        # no_grad, not inference_mode: training must be able to use what a model caches in its first call.
        with torch.no_grad():
            return encoder.all_outputs(torch.zeros(1, 3, *size))
    except Exception as error:
        raise EncoderError(
            f"{encoder.spec.origin.name or encoder.spec.type}: {type(encoder.model).__name__} yields no features for "
            f"images of {size} alone: {describe_error(error)}"
        ) from error


def _has_part(family: str, model: nn.Module, part: str) -> bool:
    attribute = FAMILIES[family].only_for.get(part)
    # A model under `auto` may have its pooler under another name, so its output decides, not its attributes.
    return attribute is None or family == "auto" or getattr(model, attribute, None) is not None


def _under(key: str, attribute: str) -> bool:
    return key.startswith(f"{attribute}.")
