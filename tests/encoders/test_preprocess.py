import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from raysweep.encoders import preprocess
from raysweep.encoders.families import FAMILIES
from raysweep.encoders.preprocess import Preprocessing, from_processor_config
from raysweep.errors import EncoderError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared real images are not here")
DINOV2 = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
PROCESSORS = {
    "dinov2": lambda: BitImageProcessor(**DINOV2),
    "clip": CLIPImageProcessor,
    "siglip": SiglipImageProcessor,
    "siglip-384": lambda: SiglipImageProcessor(size={"height": 384, "width": 384}),
    "vit": ViTImageProcessor,
    "convnext": lambda: ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875),
    "convnext-384": lambda: ConvNextImageProcessor(size={"shortest_edge": 384}),
    "padded": lambda: BitImageProcessor(**(DINOV2 | {"size": {"shortest_edge": 180}})),
    "odd": lambda: BitImageProcessor(**(DINOV2 | {"crop_size": {"height": 201, "width": 201}})),
    "mobilenet_v2": lambda: AutoImageProcessor.from_pretrained(SHARED / "weights" / "mobilenet_v2"),
}
FAMILY_PROCESSORS = ["dinov2", "clip", "siglip"]


def noise(width, height, mode="RGB"):
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def difference(processor, preprocessing, image):
    """Largest difference in grey levels, before the normalisation; the promise is 1, the aim is none at all."""
    theirs = np.asarray(processor(images=[image], return_tensors="np")["pixel_values"][0])
    ours = preprocessing.normalize(torch.from_numpy(preprocessing.resize_and_crop(image))[None])[0].numpy()
    assert ours.shape == theirs.shape
    return (np.abs(ours - theirs).max(axis=(1, 2)) * np.array(preprocessing.std) * 255).max()


@needs_data
@pytest.mark.parametrize("name", [*FAMILY_PROCESSORS, "siglip-384", "mobilenet_v2"])
@pytest.mark.parametrize("folder", ["beans/test", "beans_500_test"])
def test_equals_the_transformers_processor_on_real_jpegs(name, folder):
    processor = PROCESSORS[name]()
    preprocessing = from_processor_config(processor.to_dict())
    files = sorted((SHARED / "data" / folder).glob("*/*.jpg"))[::16]
    assert len(files) >= 8
    for file in files:
        assert difference(processor, preprocessing, Image.open(file).convert("RGB")) <= 0.01


@pytest.mark.parametrize("name", [name for name in PROCESSORS if name != "mobilenet_v2"])
@pytest.mark.parametrize(
    "size", [(500, 500), (31, 17), (301, 256), (256, 256), (1024, 37), (9, 700), (100, 700), (1, 190), (223, 225)]
)
def test_equals_the_transformers_processor_on_awkward_sizes(name, size):
    processor = PROCESSORS[name]()
    assert difference(processor, from_processor_config(processor.to_dict()), noise(*size)) <= 0.01


@pytest.mark.parametrize("name", FAMILY_PROCESSORS)
def test_family_defaults_are_the_published_processors(name):
    expected = from_processor_config(PROCESSORS[name]().to_dict())
    assert FAMILIES[name].preprocessing == expected


@pytest.mark.parametrize("name", ["dinov2", "odd", "padded", "clip", "siglip"])
@pytest.mark.parametrize("size", [(300, 256), (301, 256), (257, 999), (10, 10)])
def test_centre_crop_of_a_training_image_is_the_evaluation_image(name, size):
    preprocessing = from_processor_config(PROCESSORS[name]().to_dict())
    image = noise(*size)
    training = preprocessing.resize_for_training(image)
    assert training.shape == (*preprocessing.training_size, 3)
    cropped = preprocessing.centre_crop(torch.from_numpy(training)[None])[0].numpy()
    np.testing.assert_array_equal(cropped, preprocessing.resize_and_crop(image))


def test_a_strip_is_never_blown_up_to_its_full_length(monkeypatch):
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, **kw: made.append(size) or resize(self, size, **kw))
    image = noise(1, 10_000)
    assert FAMILIES["dinov2"].preprocessing.resize_and_crop(image).shape == (224, 224, 3)
    assert made == [(256, 256)]
    FAMILIES["dinov2"].preprocessing.resize_and_crop(noise(10, 20))
    assert made[-1] == (256, 512)


def test_a_strip_shows_what_the_full_resize_would(monkeypatch):
    pixels = np.linspace(0, 255, 2000).astype(np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2)
    image, preprocessing = Image.fromarray(pixels), FAMILIES["clip"].preprocessing
    full = preprocessing.resize_and_crop(image).astype(int)
    monkeypatch.setattr(preprocess, "_MAX_RESIZED_PIXELS", 0)
    assert np.abs(preprocessing.resize_and_crop(image) - full).max() <= 1


def test_grey_images_become_rgb():
    pixels = FAMILIES["clip"].preprocessing.resize_and_crop(noise(40, 40, "L"))
    assert pixels.shape == (224, 224, 3)
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_round_trip_through_json():
    for family in ("dinov2", "siglip"):
        preprocessing = FAMILIES[family].preprocessing
        assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


def test_image_size_keeps_the_proportion_of_resize_and_crop():
    small = FAMILIES["dinov2"].preprocessing.with_image_size(98)
    assert (small.resize_size, small.crop_size, small.output_size) == (112, 98, (98, 98))
    assert FAMILIES["siglip"].preprocessing.with_image_size(64).resize_size == (64, 64)
    assert small.training_size == (112, 112)
    assert small.min_side == 224


def test_a_convnext_rule_matches_published_sizes():
    preprocessing = from_processor_config(PROCESSORS["convnext"]().to_dict())
    assert (preprocessing.resize_size, preprocessing.crop_size) == (256, 224)


def test_missing_normalisation_leaves_the_rescaled_pixels():
    config = BitImageProcessor(**DINOV2, do_normalize=False).to_dict()
    pixels = torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)
    assert torch.allclose(from_processor_config(config).normalize(pixels), torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"do_resize": False}, "do_resize"),
        ({"resample": None}, "resample"),
        ({"size": 224, "default_to_square": None}, "size"),
        ({"size": {"shortest_edge": 224, "longest_edge": 500}}, "size"),
        ({"do_center_crop": False}, "size"),
        ({"crop_size": {"height": 224, "width": 112}}, "crop_size"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"crop_pct": 0.9}, "crop_pct"),
    ],
)
def test_what_is_not_understood_is_named(change, named):
    config = BitImageProcessor(**DINOV2).to_dict() | change
    with pytest.raises(EncoderError, match=rf"image processor: {named}: "):
        from_processor_config(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resize", "stretch"),
        ("resize_size", 0),
        ("resize_size", 10**9),
        ("resize_size", 2.5),
        ("resize_size", True),
        ("resize_size", (8, 8)),
        ("crop_size", -1),
        ("crop_size", 10**9),
        ("resample", 6),
        ("resample", "2"),
        ("mean", (0.0, 0.0)),
        ("mean", (float("nan"),) * 3),
        ("std", (0.0,) * 3),
        ("std", (-1.0,) * 3),
        ("rescale_factor", float("inf")),
        ("rescale_factor", 0.0),
    ],
)
def test_values_that_no_image_can_be_prepared_with_are_refused(key, value):
    usual = Preprocessing("shortest_edge", 16, 12, 2, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(EncoderError, match="is not understood; accepted: "):
        replace(usual, **{key: value})
    with pytest.raises(EncoderError, match="is not understood; accepted: "):
        Preprocessing.from_dict(usual.to_dict() | {key: list(value) if isinstance(value, tuple) else value})


def test_steps_that_are_switched_off_need_no_understanding():
    config = BitImageProcessor(**DINOV2).to_dict() | {"do_pad": False, "do_flip_channel_order": None}
    assert from_processor_config(config) == FAMILIES["dinov2"].preprocessing
