"""Configs and models of transformers, from which encoders are made. transformers is imported when it is needed."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from raysweep.encoders.base import seeded
from raysweep.encoders.families import FAMILIES
from raysweep.encoders.model_config import check_num_parameters, checked_config
from raysweep.encoders.preprocess import Preprocessing
from raysweep.encoders.pretrained import PROCESSOR, PretrainedFiles, describe_error
from raysweep.errors import EncoderError, one_line

# Keys of a config that name files, labels or stages of a backbone. Rebuilding an encoder does not need them.
_NOT_ARCHITECTURE = (
    "_name_or_path", "architectures", "id2label", "label2id", "out_features", "out_indices", "stage_names",
    "transformers_version",
)  # fmt: skip

# Settings without which a model drops patches at random, also in evaluation mode.
_DETERMINISTIC: Mapping[str, Mapping[str, Any]] = {"vit_mae": {"mask_ratio": 0.0}}


def family_of(kind: str, model_type: str, name: str) -> str:
    """Returns the family of a checkpoint: `auto` if no other family has its model_type.

    Args:
        kind: The type that the experiment asks for.
        model_type: The checkpoint's, as its config.json says.
        name: The checkpoint's, for the error message.

    Raises:
        EncoderError: the experiment asks for another family.
    """
    owner = next((family for family, row in FAMILIES.items() if model_type in row.model_types), "auto")
    if kind not in ("auto", owner):
        hint = f"type: {owner} would take it" if owner != "auto" else "type: auto may take it"
        raise EncoderError(
            f"{name}: its model_type is '{model_type}', which is not {kind} "
            f"(accepted: {', '.join(FAMILIES[kind].model_types)}); {hint}"
        )
    return owner


def default_preprocessing(family: str, config: Any, name: str, base: str = "") -> Preprocessing:
    """Returns the published preprocessing of a family, at the image size of `config`.

    Args:
        family: The family.
        config: The transformers config.
        name: The checkpoint's name, for the error message.
        base: The checkpoint that it was trained from, for the error message; empty if unknown.

    Raises:
        EncoderError: the family has no published preprocessing.
    """
    row = FAMILIES[family]
    if row.preprocessing is None:
        raise EncoderError(
            f"{name}: no {PROCESSOR}, so that its preprocessing is unknown; copy the base model's {PROCESSOR} into its "
            f"folder{f' (the base model is {base})' if base else ''}; a Trainer saves it only if given a processor"
        )
    size = getattr(config, "image_size", None)
    if row.fixed_image_size or not isinstance(size, int):
        return row.preprocessing
    return row.preprocessing.with_image_size(size)


def vision_config(values: Mapping[str, Any]) -> Any:
    """Returns the config of the image encoder. A checkpoint of CLIP or SigLIP may hold a text encoder too.

    Args:
        values: The content of the checkpoint's config.json.

    Raises:
        EncoderError: transformers does not know the model_type, or refuses a value.
    """
    config = make_config(values)
    if config.model_type not in ("clip", "siglip"):
        return config
    vision = config.vision_config
    if config.model_type == "clip":
        # The outer config always has the projection's width; the inner one has it only sometimes.
        vision.projection_dim = config.projection_dim
    return vision


def make_config(values: Mapping[str, Any]) -> Any:
    """Makes a transformers config from the content of a config.json.

    Raises:
        EncoderError: transformers does not know the model_type, or refuses a value.
    """
    from transformers import CONFIG_MAPPING

    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise EncoderError(
            f"model_type: '{model_type}' is unknown to the installed transformers; code of checkpoints is never run"
        )
    checked = {**checked_config(values), **_DETERMINISTIC.get(model_type, {})}
    try:
        with quiet():
            config = CONFIG_MAPPING[model_type].from_dict(checked)
    except Exception as error:
        raise EncoderError(f"config: {model_type} refuses it: {one_line(error)}") from error
    width, num_heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if isinstance(width, int) and isinstance(num_heads, int) and width % max(num_heads, 1):
        raise EncoderError(f"config.hidden_size: {width} is not a multiple of num_attention_heads ({num_heads})")
    return config


def architecture(config: Any) -> dict[str, Any]:
    """Returns a dict that JSON can hold and from which `make_config` makes an equal config."""
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_ARCHITECTURE}


def new_model(family: str, config: Any) -> nn.Module:
    """Makes a model of a family from a config, in float32.

    Raises:
        EncoderError: the installed transformers cannot build it.
    """
    check_num_parameters(_num_parameters(family, config))
    return _new_model(family, config)


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
        raise EncoderError(f"{config.model_type}: transformers cannot build it: {describe_error(error)}") from error
    return model


def _num_parameters(family: str, config: Any) -> int:
    """Returns the number of parameters of a model that a config describes, without allocating any."""
    from transformers.initialization import no_init_weights

    with seeded(0), torch.device("meta"), no_init_weights():
        return sum(parameter.numel() for parameter in _new_model(family, copy.deepcopy(config)).parameters())


def load_model(family: str, pretrained: PretrainedFiles, config: Any) -> tuple[nn.Module, set[str]]:
    """Loads a pretrained model in float32; also returns the names of the weights that the checkpoint does not have.

    Raises:
        EncoderError: the weights are damaged or do not fit the config, or the model takes more than images.
    """
    import transformers

    try:
        check_num_parameters(_num_parameters(family, config), pretrained.num_stored)
    except EncoderError as error:
        raise EncoderError(f"{pretrained.name}: {error}") from None
    known = family != "auto"
    loader = _model_class(family, config) if known else transformers.AutoModel
    # Some models have no scaled-dot-product attention, so under `auto` transformers must choose.
    options = {"attn_implementation": "sdpa"} if known else {"trust_remote_code": False}
    try:
        # transformers draws missing weights before it reports them; that must not change the global random state.
        with seeded(0), quiet():
            model, report = loader.from_pretrained(
                str(pretrained.folder),
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,  # no pickle is ever loaded
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        raise EncoderError(f"{pretrained.name}: its weights cannot be loaded: {describe_error(error)}") from error
    if not known and getattr(model, "main_input_name", None) != "pixel_values":
        raise EncoderError(f"{pretrained.name}: {type(model).__name__} is not an encoder of images alone")
    return model, set(report["missing_keys"])


def _model_class(family: str, config: Any) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[family].model_types[config.model_type])


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' load reports and progress bars inside the block, and restores both settings after it."""
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
