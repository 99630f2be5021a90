"""Encoders out of transformers: DINOv2, CLIP, SigLIP, and `auto` for any other vision model with pooled features."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from raysweep.encoders import Encoder, seeded, spec_arguments
from raysweep.encoders.checkpoints import Checkpoint, first_line, load_checkpoint
from raysweep.encoders.families import (
    FAMILIES,
    VARIANTS,
    architecture,
    default_preprocessing,
    family_of,
    make_config,
    quiet,
    vision_config,
)
from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import EncoderError, did_you_mean

TORCH_MOMENTUM = 0.1


class HuggingFaceEncoder(Encoder):
    """A transformers vision model and the parts that are taken from its output."""

    def __init__(self, model: nn.Module, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model = model
        # Position embeddings are resized only where the size differs, so that asking for it always costs nothing.
        accepted = inspect.signature(model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        mask_token = getattr(getattr(model, "embeddings", None), "mask_token", None)
        if isinstance(mask_token, nn.Parameter):
            # Used in self-supervised pretraining only; DDP would wait for its gradient.
            mask_token.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.momentum or 0) > 0.5:
                # TensorFlow's decay, .997 in MobileNet, handed to torch as its momentum: the running statistics
                # would be those of the last batch alone, and a fine-tuned model's accuracy a matter of luck.
                module.momentum = TORCH_MOMENTUM
        self.keep_parts(self.parts)

    def keep_parts(self, parts: Mapping[str, int]) -> None:
        """Settles what the encoder yields, and drops the weights that serve nothing else.

        Those may be random, and would be part of the weights' signature.
        """
        table = FAMILIES[self.family]
        self.parts = dict(parts)
        self.sources = {name: wanted for name, wanted in table.sources.items() if set(wanted) <= set(parts)}
        for part, attribute in table.only_for.items():
            if part not in parts and hasattr(self.model, attribute):
                setattr(self.model, attribute, None)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps float (batch, 3, height, width) to one (batch, num_features) for each of `parts`."""
        outputs = self.all_outputs(pixel_values)
        return {part: outputs[part] for part in self.parts}

    def all_outputs(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps float (batch, 3, height, width) to every pooled output that the model yields."""
        if self.family == "clip":
            # Not the model's own image_embeds alone: the state before the projection is the better feature.
            model: Any = self.model
            cls, projection = model.vision_model(pixel_values, **self._options).pooler_output, model.visual_projection
            return {"cls": cls} if projection is None else {"cls": cls, "projected": projection(cls)}
        output = self.model(pixel_values=pixel_values, **self._options)
        if self.family == "dinov2":
            tokens = output.last_hidden_state
            num_registers = self.config.get("num_register_tokens", 0)
            return {"cls": tokens[:, 0], "mean": tokens[:, 1 + num_registers :].mean(dim=1)}
        if self.family == "siglip":
            return {"pooler": output.pooler_output, "mean": output.last_hidden_state.mean(dim=1)}
        return _pooled(output, self._num_patches(pixel_values))

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """As `Encoder.supports_gradient_checkpointing`; most transformers can, most convolutional nets cannot."""
        return bool(getattr(self.model, "supports_gradient_checkpointing", False))

    def enable_gradient_checkpointing(self) -> None:
        """As `Encoder.enable_gradient_checkpointing`."""
        model: Any = self.model
        model.activation_checkpointing_enable()

    def _num_patches(self, pixel_values: torch.Tensor) -> int | None:
        patch = self.config.get("patch_size")
        return (pixel_values.shape[2] // patch) * (pixel_values.shape[3] // patch) if isinstance(patch, int) else None


def _pooled(output: Any, num_patches: int | None) -> dict[str, torch.Tensor]:
    """Whatever pooled features an unknown model yields: its own, and the mean over its tokens or positions."""
    parts = {}
    pooled, hidden = getattr(output, "pooler_output", None), getattr(output, "last_hidden_state", None)
    if pooled is not None:
        parts["pooler"] = pooled.flatten(1)
    if hidden is not None and hidden.ndim == 3:
        # Class and register tokens come first; where the patches can be counted, these stay out of the mean.
        first = max(hidden.shape[1] - num_patches, 0) if num_patches else 0
        parts["mean"] = hidden[:, first:].mean(dim=1)
    elif hidden is not None and hidden.ndim == 4 and pooled is None:
        parts["mean"] = hidden.mean(dim=(2, 3))
    return parts


def build(config: Mapping[str, Any], seed: int) -> HuggingFaceEncoder:
    """Builds an encoder from its experiment block: pretrained, or random by `seed`.

    Raises:
        EncoderError: the weights cannot be had, are of another family, incomplete, or the config is wrong.
    """
    kind = config["type"]
    name = config.get("pretrained_model_name_or_path") or FAMILIES[kind].default_name
    if name is None:
        raise EncoderError(f"pretrained_model_name_or_path: {kind} needs a local folder or a Hugging Face id")
    overrides, image_size = dict(config.get("config") or {}), config.get("image_size")
    if not config.get("use_pretrained", True):
        return _build_random(kind, name, config.get("revision"), overrides=overrides, image_size=image_size, seed=seed)
    if overrides:
        raise EncoderError("config: overrides are for use_pretrained: false; pretrained weights fix the architecture")
    return _build_pretrained(kind, load_checkpoint(name, config.get("revision")), image_size)


def from_spec(spec: Mapping[str, Any]) -> HuggingFaceEncoder:
    """Rebuilds the architecture of a spec without loading or drawing weights.

    Raises:
        EncoderError: the installed transformers cannot build it.
    """
    from transformers.initialization import no_init_weights

    # Not on the meta device: non-persistent buffers (position ids) are in no state dict and would stay empty.
    with seeded(0), no_init_weights():
        model = _new_model(spec["family"], make_config(spec["config"]))
    return HuggingFaceEncoder(model, **spec_arguments(spec))


def _build_pretrained(kind: str, checkpoint: Checkpoint, image_size: int | None) -> HuggingFaceEncoder:
    family = family_of(kind, checkpoint.config["model_type"], checkpoint.name)
    config = vision_config(checkpoint.config)
    model, missing = _load_weights(family, checkpoint, config)
    preprocessing = checkpoint.preprocessing() or default_preprocessing(family, config, checkpoint.name)
    if image_size:
        preprocessing = preprocessing.with_image_size(image_size)
    lost = {part for part, name in FAMILIES[family].only_for.items() if any(_under(key, name) for key in missing)}
    unusable = sorted(key for key in missing if not any(_under(key, FAMILIES[family].only_for[part]) for part in lost))
    if unusable:
        raise EncoderError(
            f"{checkpoint.name}: {len(unusable)} weights of {type(model).__name__} are missing in the checkpoint, "
            f"the first: {', '.join(unusable[:3])}; random ones are never put in their place"
        )
    origin = {"name": checkpoint.name, "revision": checkpoint.revision}
    return _assemble(kind, family, model, config=config, preprocessing=preprocessing, origin=origin, lost=lost)


def _build_random(
    kind: str, name: str, revision: str | None, *, overrides: dict[str, Any], image_size: int | None, seed: int
) -> HuggingFaceEncoder:
    preprocessing = None
    if name in VARIANTS:
        base = make_config(VARIANTS[name])
    else:
        checkpoint = load_checkpoint(name, revision, with_weights=False)
        base, preprocessing = vision_config(checkpoint.config), checkpoint.preprocessing()
    family = family_of(kind, base.model_type, name)
    accepted = architecture(base)
    for key in overrides:
        if key not in accepted or key == "model_type":
            raise EncoderError(f"config: '{key}' is unknown to {base.model_type}; {did_you_mean(key, accepted)}")
    size = image_size or overrides.get("image_size")
    preprocessing = preprocessing or default_preprocessing(family, base, name)
    preprocessing = preprocessing.with_image_size(size) if size else preprocessing
    if "image_size" in accepted:
        # Random position embeddings are made for the size they will see; nothing is to be interpolated.
        overrides = {"image_size": preprocessing.output_size[0], **overrides}
    config = make_config({**accepted, **overrides})
    with seeded(seed):
        model = _new_model(family, config)
    origin = {"name": None, "revision": None}
    return _assemble(kind, family, model, config=config, preprocessing=preprocessing, origin=origin, lost=set())


def _assemble(
    kind: str,
    family: str,
    model: nn.Module,
    *,
    config: Any,
    preprocessing: Preprocessing,
    origin: Mapping[str, str | None],
    lost: set[str],
) -> HuggingFaceEncoder:
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and min(preprocessing.output_size) < patch:
        raise EncoderError(f"image_size: {min(preprocessing.output_size)} is smaller than one patch ({patch} px)")
    candidates = [part for part in _all_parts(family) if part not in lost and _has_part(family, model, part)]
    encoder = HuggingFaceEncoder(
        model,
        encoder_type=kind,
        family=family,
        config=architecture(config),
        preprocessing=preprocessing,
        parts=dict.fromkeys(candidates, 0),
        sources={},
        origin=origin,
    ).eval()
    # One black image tells what the model yields, and that it accepts this size, before any real one is read.
    try:
        # no_grad, not inference_mode: what a model caches on its first call must still be usable in training.
        with torch.no_grad():
            outputs = encoder.all_outputs(torch.zeros(1, 3, *preprocessing.output_size))
    except Exception as error:
        raise EncoderError(
            f"{origin['name'] or kind}: {type(model).__name__} yields no features for images of "
            f"{preprocessing.output_size} alone: {first_line(error)}"
        ) from error
    encoder.keep_parts({part: outputs[part].shape[-1] for part in candidates if part in outputs})
    if not encoder.parts:
        raise EncoderError(f"{origin['name']}: {type(model).__name__} yields neither pooled features nor tokens")
    return encoder


def _all_parts(family: str) -> list[str]:
    return list(dict.fromkeys(part for parts in FAMILIES[family].sources.values() for part in parts))


def _has_part(family: str, model: nn.Module, part: str) -> bool:
    attribute = FAMILIES[family].only_for.get(part)
    # Models under `auto` may name their pooler otherwise: what they yield decides.
    return attribute is None or family == "auto" or getattr(model, attribute, None) is not None


def _new_model(family: str, config: Any) -> nn.Module:
    import transformers

    automatic: Any = transformers.AutoModel
    model: nn.Module
    try:
        with quiet():
            if family == "auto":
                model = automatic.from_config(config, trust_remote_code=False, dtype=torch.float32)
            else:
                model = _model_class(family, config)._from_config(
                    config, attn_implementation="sdpa", dtype=torch.float32
                )
    except Exception as error:
        raise EncoderError(f"{config.model_type}: transformers cannot build it: {first_line(error)}") from error
    return model


def _load_weights(family: str, checkpoint: Checkpoint, config: Any) -> tuple[nn.Module, set[str]]:
    """Loads a model in float32; returns it with the names of weights that the checkpoint lacks."""
    import transformers

    known = family != "auto"
    loader = _model_class(family, config) if known else transformers.AutoModel
    # Where a model has no scaled-dot-product attention, `auto` must leave the choice to transformers.
    options = {"attn_implementation": "sdpa"} if known else {"trust_remote_code": False}
    try:
        # Missing weights are drawn before they are reported, and that must not move the global random state.
        with seeded(0), quiet():
            model, report = loader.from_pretrained(
                str(checkpoint.folder),
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=checkpoint.has_safetensors,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        raise EncoderError(f"{checkpoint.name}: its weights cannot be loaded: {first_line(error)}") from error
    if not known and getattr(model, "main_input_name", None) != "pixel_values":
        raise EncoderError(f"{checkpoint.name}: {type(model).__name__} is not an encoder of images alone")
    return model, set(report["missing_keys"])


def _model_class(family: str, config: Any) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[family].model_types[config.model_type])


def _under(key: str, attribute: str) -> bool:
    return key.startswith(f"{attribute}.")
