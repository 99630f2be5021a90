import json
import subprocess
import sys

import pytest
import torch

from raysweep.encoders.base import EncoderSpec, Origin, weights_signature
from raysweep.encoders.build import build_encoder, encoder_from_spec
from raysweep.encoders.families import FAMILIES
from raysweep.encoders.huggingface import HuggingFaceEncoder
from raysweep.encoders.stacked_cnn import StackedCNN
from raysweep.errors import EncoderError

TINY = {
    "dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "clip": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "siglip": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "stacked_cnn": {"channels": [8, 16]},
}


def tiny(kind, seed=0):
    return build_encoder({"type": kind, "use_pretrained": False, "config": TINY[kind], "image_size": 56}, seed=seed)


@pytest.mark.parametrize("kind", TINY)
def test_a_spec_and_a_state_dict_rebuild_an_equal_encoder(kind):
    encoder = tiny(kind)
    values = json.loads(json.dumps(encoder.spec.to_dict(), allow_nan=False))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rebuilt = encoder_from_spec(EncoderSpec.from_dict(values))
    assert torch.equal(before, torch.get_rng_state())
    rebuilt.load_state_dict(encoder.state_dict())
    images = torch.rand(2, 3, 56, 56)
    with torch.inference_mode():
        expected, found = encoder(images), rebuilt(images)
    assert found.keys() == expected.keys() == encoder.parts.keys()
    for part, tensor in expected.items():
        assert torch.equal(found[part], tensor)
    assert rebuilt.spec.to_dict() == values
    assert rebuilt.spec == encoder.spec
    assert rebuilt.preprocessing == encoder.preprocessing
    assert rebuilt.sources == encoder.sources
    assert not rebuilt.training


@pytest.mark.parametrize("kind", TINY)
def test_the_class_and_the_spec_follow_the_type(kind):
    encoder = tiny(kind)
    assert type(encoder) is (StackedCNN if kind == "stacked_cnn" else HuggingFaceEncoder)
    assert (encoder.spec.type, encoder.spec.family, encoder.spec.origin) == (kind, kind, Origin())
    assert encoder.sources == FAMILIES[kind].sources
    assert not encoder.training


@pytest.mark.parametrize("kind", TINY)
def test_random_weights_follow_the_seed_and_leave_the_global_state_alone(kind):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = tiny(kind, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert weights_signature(tiny(kind, seed=1)) == weights_signature(first)
    assert weights_signature(tiny(kind, seed=2)) != weights_signature(first)


def test_an_unknown_type_gets_a_suggestion():
    with pytest.raises(EncoderError, match="did you mean 'dinov2'"):
        build_encoder({"type": "dinov3"}, seed=0)


@pytest.mark.process
def test_importing_encoders_does_not_import_transformers():
    code = """
import sys
from importlib import import_module
for name in ["build", "huggingface", "pretrained", "transformers_models", "head", "precision"]:
    import_module(f"raysweep.encoders.{name}")
    assert "transformers" not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True)
