"""The preprocessing that an encoder expects: resize, crop and normalisation, exactly as in its own image processor.

Resize and crop run on the CPU, on one decoded image. The normalisation runs on a batch, on the device of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil, isfinite
from typing import TYPE_CHECKING, Any, Literal, cast

from raysweep.errors import EncoderError

# Only for annotations: the experiment file reads `families`, which imports this module. It must not import torch, and
# has no use for numpy and Pillow, which are imported where they are needed.
if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

# Keys of an image processor's config that do not change the pixels of an RGB image.
_WITHOUT_EFFECT = {
    "_valid_kwargs_names", "_valid_processor_keys", "auto_map", "data_format", "default_to_square", "device",
    "disable_grouping", "do_convert_rgb", "feature_extractor_type", "image_processor_type", "image_seq_length",
    "input_data_format", "model_input_names", "pad_size", "processor_class", "return_tensors", "use_fast",
    "do_reduce_labels",  # changes only the label maps of segmentation
}  # fmt: skip
_UNDERSTOOD = {
    "crop_pct", "crop_size", "do_center_crop", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std",
    "resample", "rescale_factor", "size",
}  # fmt: skip

# 16 million pixels. After the resize, only images more than about 200 times as long as wide have more.
_MAX_RESIZED_PIXELS = 1 << 24
MAX_SIDE = 8_192  # of prepared images; the largest that is published is far below


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The preprocessing of one encoder. It equals its transformers image processor (PIL backend) within 1/255.

    Attributes:
        resize: `shortest_edge` keeps the aspect ratio, `exact` does not.
        resize_size: Pixels of the shorter side, or (height, width) for `exact`.
        crop_size: Side of the square centre crop in pixels; None for no crop. Smaller images are padded with zeros.
        resample: A value of `PIL.Image.Resampling`.
        mean: Mean of each RGB channel, in rescaled units.
        std: Standard deviation of each RGB channel, in rescaled units.
        rescale_factor: The 0..255 values are multiplied by it before the normalisation.
    """

    resize: Literal["shortest_edge", "exact"]
    resize_size: int | tuple[int, int]
    crop_size: int | None
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = 1 / 255

    def __post_init__(self) -> None:
        """Checks every value: it may come from a file that others wrote.

        Raises:
            EncoderError: a value is not one that images can be prepared with.
        """
        if self.resize not in ("shortest_edge", "exact"):
            raise _not_understood("resize", self.resize, "accepted: shortest_edge, exact")
        sizes = self.resize_size if isinstance(self.resize_size, tuple) else (self.resize_size,)
        num_sizes = 2 if self.resize == "exact" else 1
        if len(sizes) != num_sizes or not all(_is_side(size) for size in sizes):
            raise _not_understood("size", self.resize_size, f"accepted: 1 to {MAX_SIDE:,} pixels a side")
        if self.crop_size is not None and not _is_side(self.crop_size):
            raise _not_understood("crop_size", self.crop_size, f"accepted: 1 to {MAX_SIDE:,} pixels")
        if not _is_whole(self.resample) or not 0 <= self.resample <= 5:
            raise _not_understood("resample", self.resample, "accepted: a PIL resampling filter, 0 to 5")
        for key, values in {
            "image_mean": self.mean,
            "image_std": self.std,
            "rescale_factor": (self.rescale_factor,),
        }.items():
            if len(values) not in (1, 3) or not all(_is_finite(value) for value in values):
                raise _not_understood(key, values, "accepted: finite numbers")
            if key != "image_mean" and min(values) <= 0:
                raise _not_understood(key, values, "accepted: numbers above 0")

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict that JSON can hold and from which `from_dict` makes an equal object."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Preprocessing:
        """Rebuilds an object from the result of `to_dict`, also after it was written as JSON and read back.

        Raises:
            TypeError: a key is missing or unknown.
        """
        arguments: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in value.items()}
        return cls(**arguments)

    @property
    def resized_side(self) -> int:
        """The shorter side after the resize, in pixels."""
        return self.resize_size if isinstance(self.resize_size, int) else min(self.resize_size)

    @property
    def min_side(self) -> int:
        """The smallest shorter side, in pixels, to which a JPEG may be decoded in draft mode.

        It is twice the size after the resize. At this size the resize hides that the decoder skipped coefficients.
        (Pillow's own thumbnails use the same gap of 2.0.)
        """
        return 2 * (self.resize_size if isinstance(self.resize_size, int) else max(self.resize_size))

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the images that the encoder sees."""
        return (self.crop_size, self.crop_size) if self.crop_size else self._resize_pair

    @property
    def training_size(self) -> tuple[int, int]:
        """(height, width) of the images from `resize_for_training`: as resized, but at least the size of the crop."""
        height, width = self._resize_pair
        return max(height, self.crop_size or 0), max(width, self.crop_size or 0)

    @property
    def _resize_pair(self) -> tuple[int, int]:
        size = self.resize_size
        return (size, size) if isinstance(size, int) else size

    def with_image_size(self, image_size: int) -> Preprocessing:
        """Returns a copy whose output has `image_size` pixels a side. Resize and crop keep their proportion."""
        if self.crop_size is None:
            return replace(self, resize_size=(image_size, image_size))
        scale = image_size / self.crop_size
        size = self.resize_size
        resized = round(size * scale) if isinstance(size, int) else (round(size[0] * scale), round(size[1] * scale))
        return replace(self, resize_size=resized, crop_size=image_size)

    def resize_and_crop(self, image: Image.Image) -> np.ndarray:
        """Returns uint8 `output_size` + (3,), for evaluation and for computing features."""
        import numpy as np

        return np.ascontiguousarray(self.resize_for_training(image)[self._centre()])

    def resize_for_training(self, image: Image.Image) -> np.ndarray:
        """Returns uint8 `training_size` + (3,), from which augmentation crops.

        Its centre crop is the result of `resize_and_crop`.
        """
        import numpy as np
        from PIL import Image

        image = image if image.mode == "RGB" else image.convert("RGB")
        full_height, full_width = self._resized(image.height, image.width)
        training_height, training_width = self.training_size
        top, height = _window(full_height, training_height, self.output_size[0])
        left, width = _window(full_width, training_width, self.output_size[1])
        resample, window = Image.Resampling(self.resample), (left, top, left + width, top + height)
        if full_height * full_width <= _MAX_RESIZED_PIXELS:
            kept = np.array(image.resize((full_width, full_height), resample=resample).crop(window))
        else:
            # A strip of 1 x 10,000 pixels would become 256 x 2,560,000. So only the window that is kept is resized.
            # This is not done for every image: Pillow may take the two axes in another order and round differently.
            x, y = image.width / full_width, image.height / full_height
            box = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
            kept = np.array(image.resize((width, height), resample=resample, box=box))
        if kept.shape[:2] == self.training_size:
            return kept
        padded = np.zeros((training_height, training_width, 3), dtype=np.uint8)
        # The odd pixel of padding goes first, as in transformers.image_transforms.center_crop.
        above, before = ceil((training_height - height) / 2), ceil((training_width - width) / 2)
        padded[above : above + height, before : before + width] = kept
        return padded

    def centre_crop(self, images: torch.Tensor) -> torch.Tensor:
        """Crops `resize_for_training` images (batch, height, width, 3) to `output_size`."""
        return images[(slice(None), *self._centre())]

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Turns uint8 (batch, height, width, 3) into float32 (batch, 3, height, width) on the same device."""
        # Not made contiguous: the permuted view is channels-last, and convolutions on CPUs run 1.5 times as fast on it.
        pixels = images.permute(0, 3, 1, 2).float()
        mean, std = (
            pixels.new_tensor(values, device="cpu").view(1, -1, 1, 1).to(images.device, non_blocking=True)
            for values in (self.mean, self.std)
        )
        return (pixels * self.rescale_factor - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize == "exact":
            return self._resize_pair
        side = self.resized_side
        # The longer side is truncated, not rounded, as in transformers.image_transforms.get_resize_output_image_size.
        return (int(side * height / width), side) if width <= height else (side, int(side * width / height))

    def _centre(self) -> tuple[slice, slice]:
        (height, width), (full_height, full_width) = self.output_size, self.training_size
        top, left = (full_height - height) // 2, (full_width - width) // 2
        return slice(top, top + height), slice(left, left + width)


def _window(full: int, training: int, output: int) -> tuple[int, int]:
    """Returns start and length, in resized pixels, of the window that is kept along one axis.

    The centre `output` pixels of the window are exactly the centre `output` pixels of the full axis. Centring first
    the window and then the crop would be one pixel off where `training - output` is odd.
    """
    if full <= training:
        return 0, full
    return (full - output) // 2 - (training - output) // 2, training


def from_processor_config(config: Mapping[str, Any]) -> Preprocessing:
    """Makes a Preprocessing from the `to_dict()` of an image processor, or from a complete `preprocessor_config.json`.

    Raises:
        EncoderError: a key changes the pixels in an unknown way, or a value cannot be used. The message names the key;
            it is never ignored.
    """
    try:
        return _from_processor_config(config)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EncoderError(f"image processor: a value has the wrong type ({error})") from error


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_side(value: Any) -> bool:
    return _is_whole(value) and 1 <= value <= MAX_SIDE


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _from_processor_config(config: Mapping[str, Any]) -> Preprocessing:
    for key, value in config.items():
        # A step that is switched off does not matter, known or not.
        if key not in _WITHOUT_EFFECT | _UNDERSTOOD and value not in (None, False):
            raise _not_understood(key, value, "no such step is known")
    if not config.get("do_resize", True):
        raise _not_understood("do_resize", False, "images of different sizes cannot be batched")
    if config.get("resample") is None:
        raise _not_understood("resample", None, "a PIL resampling filter (0 to 5) is needed")
    rescales, normalizes = config.get("do_rescale", True) is not False, config.get("do_normalize", True) is not False
    resize, resize_size, crop_size = _geometry(config)
    return Preprocessing(
        resize=resize,
        resize_size=resize_size,
        crop_size=crop_size,
        resample=int(config["resample"]),
        rescale_factor=float(config.get("rescale_factor") or 1 / 255) if rescales else 1.0,
        mean=_channels(config, "image_mean") if normalizes else (0.0, 0.0, 0.0),
        std=_channels(config, "image_std") if normalizes else (1.0, 1.0, 1.0),
    )


_Geometry = tuple[Literal["shortest_edge", "exact"], int | tuple[int, int], int | None]


def _geometry(config: Mapping[str, Any]) -> _Geometry:
    size, crop_pct = _size(config), config.get("crop_pct")
    crop_size = _crop_size(config) if config.get("do_center_crop") else None
    if crop_pct is not None:
        return _convnext_geometry(config, size, float(crop_pct))
    if set(size) == {"height", "width"}:
        return "exact", (int(size["height"]), int(size["width"])), crop_size
    if set(size) != {"shortest_edge"}:
        raise _not_understood("size", size, "accepted: {shortest_edge: n} or {height: n, width: n}")
    if crop_size is None:
        raise _not_understood("size", size, "without a centre crop the images differ in size and cannot be batched")
    return "shortest_edge", int(size["shortest_edge"]), crop_size


def _convnext_geometry(config: Mapping[str, Any], size: Mapping[str, int], crop_pct: float) -> _Geometry:
    """The rule of ConvNeXt's image processor.

    Below 384 px it resizes to size / crop_pct and crops. From 384 px on it resizes without keeping the aspect ratio.
    """
    if "ConvNext" not in str(config.get("image_processor_type")) or set(size) != {"shortest_edge"}:
        raise _not_understood("crop_pct", crop_pct, "it is known of ConvNeXt's processor only")
    side = int(size["shortest_edge"])
    return ("shortest_edge", int(side / crop_pct), side) if side < 384 else ("exact", (side, side), None)


def _size(config: Mapping[str, Any]) -> dict[str, int]:
    size = config.get("size")
    if isinstance(size, int) and config.get("default_to_square") is not None:
        return {"height": size, "width": size} if config["default_to_square"] else {"shortest_edge": size}
    if size is None or isinstance(size, int):
        raise _not_understood("size", size, "accepted: {shortest_edge: n} or {height: n, width: n}")
    return {key: value for key, value in dict(size).items() if value is not None}


def _crop_size(config: Mapping[str, Any]) -> int:
    crop = config.get("crop_size")
    sides = {crop} if isinstance(crop, int) else set(dict(crop or {}).values()) - {None}
    if len(sides) != 1:
        raise _not_understood("crop_size", crop, "only square crops are understood")
    return int(cast(int, sides.pop()))


def _channels(config: Mapping[str, Any], key: str) -> tuple[float, ...]:
    value = config.get(key)
    values = (value,) * 3 if isinstance(value, int | float) else tuple(value or ())
    if len(values) != 3:
        raise _not_understood(key, value, "three numbers, one for each of red, green and blue, are needed")
    return tuple(float(item) for item in values)


def _not_understood(key: str, value: Any, reason: str) -> EncoderError:
    return EncoderError(f"image processor: {key}: {value!r} is not understood; {reason}")
