"""The encoder families and their published variants, as tables. Data only: torch and transformers are not imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raysweep.encoders.preprocess import Preprocessing

# Values of PIL.Image.Resampling.
_BILINEAR, _BICUBIC = 2, 3
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family of encoders differs from the others.

    Attributes:
        sources: Feature source to the parts that it concatenates, for every source the family can have. The first is
            the default.
        default_weights: Hub id of the pretrained weights that are used when none is named; None where there is no
            default.
        has_weights: Whether pretrained weights exist.
        model_types: The `model_type` of a transformers checkpoint to the class that is its image encoder.
        only_for: Part to the attribute of the model that serves only this part. Without the weights of this attribute
            the encoder does not have the part.
        preprocessing: The published preprocessing, for random weights and for checkpoints without a processor config.
        fixed_image_size: Whether `preprocessing` keeps its size when the config's image_size differs.
    """

    sources: Mapping[str, tuple[str, ...]]
    default_weights: str | None = None
    has_weights: bool = True
    model_types: Mapping[str, str] = field(default_factory=dict)
    only_for: Mapping[str, str] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    fixed_image_size: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Every part that a source of the family uses, each once."""
        return tuple(dict.fromkeys(part for parts in self.sources.values() for part in parts))


# The keys are the accepted values of `type:` in an experiment file.
FAMILIES: Mapping[str, Family] = {
    "stacked_cnn": Family(
        sources={"pooled": ("pooled",)},
        has_weights=False,
        # Any fixed statistics do for a network that starts from random weights. Those of ImageNet keep encoders
        # comparable.
        preprocessing=Preprocessing(
            "shortest_edge", round(1.14 * 128), 128, _BILINEAR, mean=_IMAGENET_MEAN, std=_IMAGENET_STD
        ),
    ),
    "dinov2": Family(
        sources={"cls": ("cls",), "cls+mean": ("cls", "mean")},
        default_weights="facebook/dinov2-base",
        model_types={"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"},
        preprocessing=Preprocessing("shortest_edge", 256, 224, _BICUBIC, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
        # The configs say 518, the size at the end of training. The published evaluation is at 224.
        fixed_image_size=True,
    ),
    "clip": Family(
        sources={"cls": ("cls",), "projected": ("projected",)},
        default_weights="openai/clip-vit-base-patch32",
        model_types={"clip": "CLIPVisionModelWithProjection", "clip_vision_model": "CLIPVisionModelWithProjection"},
        only_for={"projected": "visual_projection"},
        preprocessing=Preprocessing(
            "shortest_edge",
            224,
            224,
            _BICUBIC,
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
        ),
    ),
    "siglip": Family(
        sources={"pooler": ("pooler",), "mean": ("mean",)},
        default_weights="google/siglip-base-patch16-224",
        model_types={"siglip": "SiglipVisionModel", "siglip_vision_model": "SiglipVisionModel"},
        only_for={"pooler": "head"},
        preprocessing=Preprocessing("exact", (224, 224), None, _BICUBIC, mean=(0.5,) * 3, std=(0.5,) * 3),
    ),
    # Any other vision model of transformers that yields pooled features or tokens.
    "auto": Family(sources={"pooler": ("pooler",), "mean": ("mean",)}, only_for={"pooler": "pooler"}),
}

# The feature sources that a search can choose from: those of every family with pretrained weights. Error messages and
# the JSON schema show them in this order.
FEATURE_SOURCES: tuple[str, ...] = ("cls", "mean", "cls+mean", "projected", "pooler")

# The ways in which a head can normalise its features; see `head.normalize_features`.
NORMALIZATIONS: tuple[str, ...] = ("none", "l2", "standardize")

# Architectures by hub id (from the models' config.json), so that random weights of a published shape need no network.
_LARGE_VIT = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "facebook/dinov2-small": {"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6},
    "facebook/dinov2-base": {"model_type": "dinov2"},
    "facebook/dinov2-large": {
        "model_type": "dinov2", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    },
    "facebook/dinov2-giant": {
        "model_type": "dinov2", "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24,
        "use_swiglu_ffn": True,
    },
    "openai/clip-vit-base-patch32": {"model_type": "clip_vision_model"},
    "openai/clip-vit-base-patch16": {"model_type": "clip_vision_model", "patch_size": 16},
    "openai/clip-vit-large-patch14": {
        "model_type": "clip_vision_model", **_LARGE_VIT, "patch_size": 14, "projection_dim": 768,
    },
    "google/siglip-base-patch16-224": {"model_type": "siglip_vision_model"},
    "google/siglip-large-patch16-256": {"model_type": "siglip_vision_model", **_LARGE_VIT, "image_size": 256},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16,
        "intermediate_size": 4304, "patch_size": 14, "image_size": 384,
    },
}  # fmt: skip
