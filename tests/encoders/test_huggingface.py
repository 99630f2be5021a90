import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModel

from raysweep.encoders.base import Origin, weights_signature
from raysweep.encoders.build import build_encoder, encoder_from_spec
from raysweep.encoders.checks import check_is_function
from raysweep.encoders.families import FAMILIES, VARIANTS
from raysweep.errors import EncoderError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
MOBILENET = SHARED / "weights" / "mobilenet_v2"
needs_weights = pytest.mark.skipif(not MOBILENET.is_dir(), reason="the shared pretrained weights are not here")
TEXT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY_DINOV2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 518, "patch_size": 14}


def perturbed(model):
    """Random values everywhere, so that no weight is at a default (zero biases, unit scales) that hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) if parameter.numel() < 5000 else None
        parameter.data.add_(0.02 if noise is None else 0.1 * noise)
    return model.eval()


def saved(folder, class_name, config):
    model = perturbed(getattr(transformers, class_name)(config))
    model.save_pretrained(folder)
    return model


def two_tower(kind, vision, **more):
    prefix = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    config = getattr(transformers, f"{prefix}Config")(vision_config=vision, text_config=TEXT, **more)
    return f"{prefix}Model", config


def load(kind, folder, **more):
    return build_encoder({"type": kind, "pretrained_model_name_or_path": str(folder), **more}, seed=0)


def images(size, batch=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def expected_parts(kind, model, pixels):
    """The parts as the plain transformers model gives them."""
    if kind == "clip":
        vision = model.vision_model(pixels, interpolate_pos_encoding=True)
        cls = model.vision_model.post_layernorm(vision.last_hidden_state[:, 0])
        return {"cls": cls, "projected": model.visual_projection(vision.pooler_output)}
    if kind == "siglip":
        out = model.vision_model(pixels, interpolate_pos_encoding=True)
        return {"pooler": out.pooler_output, "mean": out.last_hidden_state.mean(1)}
    out = model(pixels)
    first = 1 + getattr(model.config, "num_register_tokens", 0)
    return {"cls": out.pooler_output, "mean": out.last_hidden_state[:, first:].mean(1)}


@torch.inference_mode()
def assert_same(encoder, expected, pixels):
    outputs = encoder(pixels)
    assert {part: tensor.shape[-1] for part, tensor in outputs.items()} == encoder.parts
    assert outputs.keys() == expected.keys()
    for part, tensor in expected.items():
        torch.testing.assert_close(outputs[part], tensor, rtol=1e-4, atol=1e-4)


def cut(values):
    """A published architecture with everything but its depth."""
    return {key: value for key, value in values.items() if key != "model_type"} | {"num_hidden_layers": 1}


@pytest.mark.process
@pytest.mark.parametrize("name", VARIANTS)
def test_every_published_shape_gives_what_transformers_gives(tmp_path, name):
    kind = VARIANTS[name]["model_type"].removesuffix("_vision_model")
    vision = cut(VARIANTS[name])
    if kind == "dinov2":
        model = saved(tmp_path, "Dinov2Model", transformers.Dinov2Config(**vision, image_size=518))
        size = 224
    else:
        outer = {"projection_dim": vision["projection_dim"]} if "projection_dim" in vision else {}
        model = saved(tmp_path, *two_tower(kind, vision, **outer))
        size = vision.get("image_size", 224)
    encoder = load(kind, tmp_path)
    assert encoder.preprocessing.output_size == (size, size)
    pixels = images(size, batch=1)
    assert_same(encoder, expected_parts(kind, model, pixels), pixels)
    widths = {source: encoder.num_features(source) for source in encoder.sources}
    assert widths == PUBLISHED_WIDTHS[name]
    assert encoder.spec.origin == Origin(name=str(tmp_path), revision=None)


PUBLISHED_WIDTHS = {
    "facebook/dinov2-small": {"cls": 384, "cls+mean": 768},
    "facebook/dinov2-base": {"cls": 768, "cls+mean": 1536},
    "facebook/dinov2-large": {"cls": 1024, "cls+mean": 2048},
    "facebook/dinov2-giant": {"cls": 1536, "cls+mean": 3072},
    "openai/clip-vit-base-patch32": {"cls": 768, "projected": 512},
    "openai/clip-vit-base-patch16": {"cls": 768, "projected": 512},
    "openai/clip-vit-large-patch14": {"cls": 1024, "projected": 768},
    "google/siglip-base-patch16-224": {"pooler": 768, "mean": 768},
    "google/siglip-large-patch16-256": {"pooler": 1024, "mean": 1024},
    "google/siglip-so400m-patch14-384": {"pooler": 1152, "mean": 1152},
}


def test_dinov2_with_registers_leaves_them_out_of_the_mean(tmp_path):
    config = transformers.Dinov2WithRegistersConfig(**TINY_DINOV2)
    model = saved(tmp_path, "Dinov2WithRegistersModel", config)
    encoder = load("dinov2", tmp_path)
    pixels = images(224)
    assert_same(encoder, expected_parts("dinov2", model, pixels), pixels)
    with torch.inference_mode():
        with_registers = model(pixels).last_hidden_state[:, 1:].mean(1)
        assert not torch.allclose(encoder(pixels)["mean"], with_registers, atol=1e-4)


def test_518_px_position_embeddings_run_at_224_and_at_their_own_size(tmp_path):
    model = saved(tmp_path, "Dinov2Model", transformers.Dinov2Config(**TINY_DINOV2))
    for size in (224, 518):
        encoder = load("dinov2", tmp_path, image_size=None if size == 224 else size)
        assert encoder.preprocessing.output_size == (size, size)
        assert encoder.model.embeddings.position_embeddings.shape[1] == 37 * 37 + 1
        pixels = images(size)
        assert_same(encoder, expected_parts("dinov2", model, pixels), pixels)


@pytest.mark.parametrize(("kind", "size"), [("clip", 160), ("siglip", 96)])
def test_image_size_interpolates_position_embeddings(tmp_path, kind, size):
    model = saved(tmp_path, *two_tower(kind, TINY | {"image_size": 64, "patch_size": 16}))
    encoder = load(kind, tmp_path, image_size=size)
    assert load(kind, tmp_path).preprocessing.output_size == (64, 64)
    assert encoder.preprocessing.output_size == (size, size)
    pixels = images(size)
    assert_same(encoder, expected_parts(kind, model, pixels), pixels)


def test_clip_takes_500_px_images(tmp_path):
    model = saved(tmp_path, *two_tower("clip", TINY))
    transformers.CLIPImageProcessor().save_pretrained(tmp_path)
    encoder = load("clip", tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8))
    pixels = encoder.preprocessing.normalize(torch.from_numpy(encoder.preprocessing.resize_and_crop(image))[None])
    theirs = transformers.CLIPImageProcessor()(images=[image], return_tensors="pt")["pixel_values"]
    assert_same(encoder, expected_parts("clip", model, theirs), pixels)


def test_clip_without_a_projection_offers_the_class_token_only(tmp_path):
    saved(tmp_path, "CLIPVisionModel", transformers.CLIPVisionConfig(**TINY))
    encoder, again = load("clip", tmp_path), load("clip", tmp_path)
    assert encoder.sources == {"cls": ("cls",)}
    assert not any("projection" in name for name in encoder.state_dict())
    assert weights_signature(encoder) == weights_signature(again)


def test_siglip_without_a_head_offers_the_mean_only(tmp_path):
    saved(tmp_path, "SiglipVisionModel", transformers.SiglipVisionConfig(**TINY, vision_use_head=False))
    assert load("siglip", tmp_path).sources == {"mean": ("mean",)}


def test_loading_is_repeatable_quiet_and_leaves_the_global_state_alone(tmp_path, capfd):
    saved(tmp_path, *two_tower("siglip", TINY))
    before = torch.get_rng_state()
    capfd.readouterr()
    signatures = {weights_signature(load("siglip", tmp_path)) for _ in range(2)}
    assert capfd.readouterr() == ("", "")
    assert len(signatures) == 1
    assert torch.equal(before, torch.get_rng_state())


def test_half_precision_checkpoints_become_float32(tmp_path):
    transformers.Dinov2Model(transformers.Dinov2Config(**TINY_DINOV2)).to(torch.float16).save_pretrained(tmp_path)
    encoder = load("dinov2", tmp_path)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert encoder_from_spec(encoder.spec).state_dict().keys() == encoder.state_dict().keys()


def test_masked_autoencoders_see_the_whole_image_each_time(tmp_path):
    """By default they drop three quarters of the patches at random, also in evaluation mode."""
    config = transformers.ViTMAEConfig(**TINY, image_size=32, patch_size=8, mask_ratio=0.75)
    model = saved(tmp_path, "ViTMAEModel", config)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder, pixels = load("auto", tmp_path), images(32)
    check_is_function(encoder)
    model.config.mask_ratio = 0.0
    with torch.no_grad():
        first, second = encoder(pixels), encoder(pixels)
        tokens = model(pixels, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    assert torch.equal(first["mean"], second["mean"])
    assert torch.allclose(first["mean"], tokens[:, 1:].mean(dim=1), atol=1e-6)
    assert encoder.spec.config["mask_ratio"] == 0.0
    rebuilt = encoder_from_spec(encoder.spec)
    rebuilt.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(pixels)["mean"], first["mean"])


@needs_weights
def test_auto_on_the_real_mobilenet():
    encoder = load("auto", MOBILENET)
    assert (encoder.spec.family, encoder.parts, encoder.sources) == ("auto", {"pooler": 1280}, {"pooler": ("pooler",)})
    assert (encoder.preprocessing.resize_size, encoder.preprocessing.output_size) == (256, (224, 224))
    pixels = images(224)
    model = AutoModel.from_pretrained(MOBILENET).eval()
    with torch.inference_mode():
        assert_same(encoder, {"pooler": model(pixels).pooler_output}, pixels)
    assert len(encoder.blocks()) == 17
    rebuilt = encoder_from_spec(encoder.spec)
    rebuilt.load_state_dict(encoder.state_dict())
    assert weights_signature(rebuilt) == weights_signature(encoder) == weights_signature(load("auto", MOBILENET))


@needs_weights
def test_auto_can_start_from_random_weights(tmp_path):
    shutil.copytree(MOBILENET, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    block = {"use_pretrained": False, "image_size": 64, "config": {"depth_multiplier": 0.35}}
    encoder = load("auto", tmp_path / "m", **block)
    assert encoder.preprocessing.output_size == (64, 64)
    assert encoder.spec.origin.name is None
    assert encoder(images(64))["pooler"].shape == (2, encoder.parts["pooler"])


@pytest.fixture
def vit(tmp_path):
    """A classifier's checkpoint: its pooler was never trained, and is not in it."""
    config = transformers.ViTConfig(**TINY, image_size=32, patch_size=16)
    model = saved(tmp_path, "ViTForImageClassification", config)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    return tmp_path, model


def test_auto_never_offers_a_pooler_whose_weights_are_missing(vit):
    folder, model = vit
    encoder = load("auto", folder)
    assert encoder.sources == {"mean": ("mean",)}
    assert not any("pooler" in name for name in encoder.state_dict())
    pixels = images(32)
    with torch.inference_mode():
        tokens = model.vit(pixels).last_hidden_state
    assert_same(encoder, {"mean": tokens[:, 1:].mean(1)}, pixels)
    rebuilt = encoder_from_spec(encoder.spec)
    rebuilt.load_state_dict(encoder.state_dict())
    assert_same(rebuilt, {"mean": tokens[:, 1:].mean(1)}, pixels)


def test_auto_interpolates_where_the_model_can(vit):
    folder, model = vit
    pixels = images(64)
    with torch.inference_mode():
        tokens = model.vit(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert_same(load("auto", folder, image_size=64), {"mean": tokens[:, 1:].mean(1)}, pixels)


def swin(folder, window_size):
    config = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    model = saved(folder, "SwinModel", transformers.SwinConfig(**config, window_size=window_size))
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def test_auto_rebuilds_a_model_of_nested_stages(tmp_path):
    model = swin(tmp_path, window_size=4)
    encoder = load("auto", tmp_path)
    with torch.inference_mode():
        output = model(images(32))
        expected = {"pooler": output.pooler_output, "mean": output.last_hidden_state.mean(1)}
    assert_same(encoder, expected, images(32))
    rebuilt = encoder_from_spec(encoder.spec)
    rebuilt.load_state_dict(encoder.state_dict())
    assert_same(rebuilt, expected, images(32))
    assert len(encoder.blocks()) == 3


def test_auto_says_when_the_model_refuses_the_image_size(tmp_path):
    swin(tmp_path, window_size=7)
    with pytest.raises(EncoderError, match=r"SwinModel yields no features for images of \(32, 32\)"):
        load("auto", tmp_path)


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
def test_auto_delegates_to_the_families(tmp_path, kind):
    if kind == "dinov2":
        saved(tmp_path, "Dinov2Model", transformers.Dinov2Config(**TINY_DINOV2))
    else:
        saved(tmp_path, *two_tower(kind, TINY))
    encoder = load("auto", tmp_path)
    assert (encoder.spec.type, encoder.spec.family) == ("auto", kind)
    assert encoder.sources == FAMILIES[kind].sources
    assert encoder.spec.to_dict()["type"] == "auto"


def test_auto_refuses_text_models(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**TINY, vocab_size=32))
    model.save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="BertModel is not an encoder of images"):
        load("auto", tmp_path)


def test_auto_needs_a_processor(vit):
    folder, _ = vit
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(EncoderError, match=r"no preprocessor_config\.json.*copy the base model's preprocessor_config"):
        load("auto", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "google/vit-base-patch16-224"}))
    with pytest.raises(EncoderError, match=r"the base model is google/vit-base-patch16-224"):
        load("auto", folder)


def test_the_wrong_family_is_named(tmp_path):
    saved(tmp_path, *two_tower("clip", TINY))
    with pytest.raises(EncoderError, match=r"model_type is 'clip', which is not dinov2.*type: clip would take it"):
        load("dinov2", tmp_path)


def test_missing_weights_are_never_replaced_by_random_ones(tmp_path):
    saved(tmp_path, "Dinov2Model", transformers.Dinov2Config(**TINY_DINOV2))
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"1 weights of Dinov2Model are missing.*layernorm\.bias"):
        load("dinov2", tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"not safetensors"])
def test_damaged_weights_are_an_encoder_error(tmp_path, damage):
    saved(tmp_path, "Dinov2Model", transformers.Dinov2Config(**TINY_DINOV2))
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(EncoderError, match="weights cannot be loaded"):
        load("dinov2", tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    saved(tmp_path, "Dinov2Model", transformers.Dinov2Config(**TINY_DINOV2))
    transformers.Dinov2Config(**(TINY_DINOV2 | {"hidden_size": 48})).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="weights cannot be loaded"):
        load("dinov2", tmp_path)


def random_encoder(kind="dinov2", **more):
    return build_encoder({"type": kind, "use_pretrained": False, **more}, seed=0)


def test_an_unknown_config_override_gets_a_suggestion():
    with pytest.raises(EncoderError, match="'hidden_sise' is unknown to dinov2; did you mean 'hidden_size'"):
        random_encoder(config={"hidden_sise": 32})


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"hidden_size": "big"}, "hidden_size"), ({"hidden_size": 100}, "hidden_size: 100 is not a multiple")],
)
def test_a_wrong_config_value_is_named(config, expected):
    with pytest.raises(EncoderError, match=expected):
        random_encoder(config=config)


def test_overrides_need_random_weights():
    with pytest.raises(EncoderError, match="use_pretrained: false"):
        build_encoder({"type": "dinov2", "config": {"hidden_size": 32}}, seed=0)


def test_image_size_smaller_than_a_patch_is_refused():
    with pytest.raises(EncoderError, match="smaller than one patch"):
        random_encoder(config=TINY_DINOV2, image_size=8)


def test_random_position_embeddings_are_made_for_the_size_they_see():
    small = {key: value for key, value in TINY_DINOV2.items() if key != "image_size"}
    from_block = random_encoder(config=small, image_size=98)
    from_config = random_encoder(config=small | {"image_size": 98})
    assert from_block.model.embeddings.position_embeddings.shape[1] == 7 * 7 + 1
    assert from_block.preprocessing == from_config.preprocessing
    assert from_block.preprocessing.output_size == (98, 98)


def test_random_weights_take_the_shape_of_a_published_name():
    name = "openai/clip-vit-large-patch14"
    encoder = random_encoder("clip", pretrained_model_name_or_path=name, config={"num_hidden_layers": 1})
    assert encoder.parts == {"cls": 1024, "projected": 768}


def test_batch_norm_keeps_a_running_mean_of_many_batches(tmp_path):
    from transformers import MobileNetV2Config, MobileNetV2ImageProcessorPil, MobileNetV2Model

    MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.35)).save_pretrained(tmp_path)
    MobileNetV2ImageProcessorPil().save_pretrained(tmp_path)
    encoder = build_encoder({"type": "auto", "pretrained_model_name_or_path": str(tmp_path)}, seed=0)
    momenta = {m.momentum for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert momenta == {0.1}, "transformers hands TensorFlow's decay to torch as a momentum"
