from dataclasses import replace

import pytest
import torch

from raysweep.encoders.base import weights_signature
from raysweep.encoders.build import build_encoder, encoder_from_spec
from raysweep.errors import EncoderError


def build(seed=0, **config):
    return build_encoder({"type": "stacked_cnn", **config}, seed=seed)


def test_yields_one_pooled_part():
    encoder = build()
    outputs = encoder(torch.rand(2, 3, 128, 128))
    assert {part: tuple(tensor.shape) for part, tensor in outputs.items()} == {"pooled": (2, 256)}
    assert encoder.num_features("pooled") == 256
    assert 0.8e6 < sum(parameter.numel() for parameter in encoder.parameters()) < 1.5e6


def test_default_preprocessing_and_image_size():
    assert build().preprocessing.output_size == (128, 128)
    assert build().preprocessing.resize_size == 146
    assert build(image_size=32).preprocessing.output_size == (32, 32)
    assert build(image_size=8)(torch.rand(1, 3, 8, 8))["pooled"].shape == (1, 256)


def test_channels_override():
    encoder = build(config={"channels": [8, 16]})
    assert len(encoder.stages) == 2
    assert encoder(torch.rand(1, 3, 32, 32))["pooled"].shape == (1, 16)


@pytest.mark.parametrize("channels", [[], [8, 0], [8, True], "8", 8, [1.5]])
def test_channels_must_be_positive_whole_numbers(channels):
    with pytest.raises(EncoderError, match=r"config\.channels"):
        build(config={"channels": channels})


def test_a_spec_is_held_to_the_same_channels():
    """It may come from a model.json that someone has tampered with."""
    spec = build().spec
    for channels in ([0], "wide", None, [8] * 1_000_000, [10_000_000, 10_000_000]):
        with pytest.raises(EncoderError, match="config"):
            encoder_from_spec(replace(spec, config={"channels": channels}))


def test_an_unknown_override_gets_a_suggestion():
    with pytest.raises(EncoderError, match="did you mean 'channels'"):
        build(config={"chanels": [8]})


def test_seed_decides_the_weights_and_leaves_the_global_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights_signature(build(seed=3))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    assert weights_signature(build(seed=3)) == first
    assert weights_signature(build(seed=4)) != first


def test_blocks_are_the_stages():
    encoder = build()
    blocks = encoder.blocks()
    assert len(blocks) == 4
    assert [id(p) for block in blocks for p in block] == [id(p) for p in encoder.parameters()]
