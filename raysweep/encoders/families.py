"""The families of encoders that transformers holds, as tables, and the configs that their models are made from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import EncoderError

_BICUBIC = 3


@dataclass(frozen=True)
class Family:
    """What is special about one family.

    Attributes:
        default_name: Hub id of the weights when none is named.
        model_types: transformers `model_type` of a checkpoint to the class that is its image encoder.
        sources: Every feature source the family can have, the default first.
        only_for: A part to the attribute of the model that serves this part alone; absent weights cost the part.
        preprocessing: The published default, for checkpoints without a processor config and for random weights.
        fixed_image_size: Whether the default preprocessing stays when the config's image_size differs.
    """

    default_name: str | None
    model_types: Mapping[str, str]
    sources: Mapping[str, tuple[str, ...]]
    only_for: Mapping[str, str] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    fixed_image_size: bool = False


FAMILIES: dict[str, Family] = {
    "dinov2": Family(
        default_name="facebook/dinov2-base",
        model_types={"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"},
        sources={"cls": ("cls",), "cls+mean": ("cls", "mean")},
        preprocessing=Preprocessing(
            "shortest_edge", 256, 224, _BICUBIC, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        ),
        # Its configs say 518, where training ended; the published evaluation is at 224.
        fixed_image_size=True,
    ),
    "clip": Family(
        default_name="openai/clip-vit-base-patch32",
        model_types={"clip": "CLIPVisionModelWithProjection", "clip_vision_model": "CLIPVisionModelWithProjection"},
        sources={"cls": ("cls",), "projected": ("projected",)},
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
        default_name="google/siglip-base-patch16-224",
        model_types={"siglip": "SiglipVisionModel", "siglip_vision_model": "SiglipVisionModel"},
        sources={"pooler": ("pooler",), "mean": ("mean",)},
        only_for={"pooler": "head"},
        preprocessing=Preprocessing("exact", (224, 224), None, _BICUBIC, mean=(0.5,) * 3, std=(0.5,) * 3),
    ),
    "auto": Family(
        default_name=None,
        model_types={},
        sources={"pooler": ("pooler",), "mean": ("mean",)},
        only_for={"pooler": "pooler"},
    ),
}

# Architectures by hub id, so that random weights of a published shape need no network (from the models' config.json).
_LARGE_VIT = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
VARIANTS: dict[str, dict[str, Any]] = {
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

# Keys of a config that name files, labels or backbone stages: nothing that an encoder is rebuilt from.
_NOT_ARCHITECTURE = (
    "_name_or_path", "architectures", "id2label", "label2id", "out_features", "out_indices", "stage_names",
    "transformers_version",
)  # fmt: skip


def family_of(kind: str, model_type: str, name: str) -> str:
    """Returns the family that a checkpoint belongs to; `auto` for whatever has no family of its own.

    Raises:
        EncoderError: the experiment asked for another family.
    """
    owner = next((family for family, table in FAMILIES.items() if model_type in table.model_types), "auto")
    if kind not in ("auto", owner):
        hint = f"type: {owner} would take it" if owner != "auto" else "type: auto may take it"
        raise EncoderError(
            f"{name}: its model_type is '{model_type}', which is not {kind} "
            f"(accepted: {', '.join(FAMILIES[kind].model_types)}); {hint}"
        )
    return owner


def default_preprocessing(family: str, config: Any, name: str) -> Preprocessing:
    """Returns the family's published preprocessing at the size of `config`.

    Raises:
        EncoderError: the family has none.
    """
    table = FAMILIES[family]
    if table.preprocessing is None:
        raise EncoderError(f"{name}: no preprocessor_config.json, so that its preprocessing is unknown")
    size = getattr(config, "image_size", None)
    if table.fixed_image_size or not isinstance(size, int):
        return table.preprocessing
    return table.preprocessing.with_image_size(size)


def vision_config(raw: Mapping[str, Any]) -> Any:
    """The config of the image encoder, also where the checkpoint holds a text encoder beside it."""
    config = make_config(raw)
    if config.model_type not in ("clip", "siglip"):
        return config
    vision = config.vision_config
    if config.model_type == "clip":
        # The projection's width stands in the outer config, and only sometimes in the inner one too.
        vision.projection_dim = config.projection_dim
    return vision


def make_config(values: Mapping[str, Any]) -> Any:
    """Makes a transformers config from a config.json's content.

    Raises:
        EncoderError: transformers does not know the model_type, or refuses a value.
    """
    from transformers import CONFIG_MAPPING

    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise EncoderError(f"model_type: '{model_type}' is unknown to the installed transformers")
    try:
        with quiet():
            config = CONFIG_MAPPING[model_type].from_dict(dict(values))
    except Exception as error:
        raise EncoderError(f"config: {model_type} refuses it: {' '.join(str(error).split())}") from error
    width, num_heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if isinstance(width, int) and isinstance(num_heads, int) and width % max(num_heads, 1):
        raise EncoderError(f"config.hidden_size: {width} is not a multiple of num_attention_heads ({num_heads})")
    return config


def architecture(config: Any) -> dict[str, Any]:
    """Returns what `make_config` needs to make an equal config, JSON-able."""
    values = config.to_dict()
    return {key: value for key, value in values.items() if key not in _NOT_ARCHITECTURE}


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' load reports and progress bars off the terminal, and restores both."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
