import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from raysweep.encoders import build_encoder, encoder_from_spec, weights_signature
from raysweep.errors import EncoderError

TINY = {
    "dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "clip": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "siglip": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "stacked_cnn": {"channels": [8, 16]},
}


def tiny(kind, seed=0, image_size=56, **more):
    block = {"type": kind, "use_pretrained": False, "config": TINY[kind], "image_size": image_size, **more}
    return build_encoder(block, seed=seed)


@pytest.mark.parametrize("kind", TINY)
def test_a_spec_and_a_state_dict_rebuild_an_equal_encoder(kind):
    encoder = tiny(kind)
    spec = json.loads(json.dumps(encoder.spec(), allow_nan=False))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rebuilt = encoder_from_spec(spec)
    assert torch.equal(before, torch.get_rng_state())
    rebuilt.load_state_dict(encoder.state_dict())
    images = torch.rand(2, 3, 56, 56)
    with torch.inference_mode():
        expected, found = encoder(images), rebuilt(images)
    assert found.keys() == expected.keys() == encoder.parts.keys()
    for part, tensor in expected.items():
        assert torch.equal(found[part], tensor)
    assert rebuilt.spec() == spec
    assert rebuilt.preprocessing == encoder.preprocessing
    assert rebuilt.sources == encoder.sources
    assert not rebuilt.training


def test_spec_has_the_agreed_keys():
    spec = tiny("clip").spec()
    assert set(spec) == {"type", "family", "config", "preprocessing", "parts", "sources", "origin"}
    assert spec["origin"] == {"name": None, "revision": None}
    assert spec["parts"] == {"cls": 32, "projected": 512}


@pytest.mark.parametrize("kind", TINY)
def test_random_weights_follow_the_seed_and_leave_the_global_state_alone(kind):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = tiny(kind, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert weights_signature(tiny(kind, seed=1)) == weights_signature(first)
    assert weights_signature(tiny(kind, seed=2)) != weights_signature(first)


@pytest.mark.parametrize("kind", TINY)
def test_blocks_hold_every_parameter_once_from_stem_to_last(kind):
    encoder = tiny(kind)
    blocks = encoder.blocks()
    assert sorted(id(p) for block in blocks for p in block) == sorted(id(p) for p in encoder.parameters())
    assert all(blocks)
    if kind != "stacked_cnn":
        assert len(blocks) == 1 + TINY[kind]["num_hidden_layers"]
        names = {id(p): name for name, p in encoder.named_parameters()}
        assert any("patch_embed" in names[id(p)] for p in blocks[0])
        assert all(".1." in names[id(p)] for p in blocks[-1][:4])


def test_select_concatenates_the_parts_of_a_source():
    encoder = tiny("dinov2")
    outputs = {"cls": torch.zeros(2, 32), "mean": torch.ones(2, 32)}
    assert encoder.select(outputs, "cls").shape == (2, 32)
    both = encoder.select(outputs, "cls+mean")
    assert both.shape == (2, 64) == (2, encoder.num_features("cls+mean"))
    assert both[:, 32:].eq(1).all()
    assert next(iter(encoder.sources)) == "cls"


def test_an_unknown_source_gets_a_suggestion():
    with pytest.raises(EncoderError, match="did you mean 'cls\\+mean'"):
        tiny("dinov2").num_features("cls+meen")


def test_an_unknown_type_gets_a_suggestion():
    with pytest.raises(EncoderError, match="did you mean 'dinov2'"):
        build_encoder({"type": "dinov3"}, seed=0)


def test_weights_signature_sees_values_names_dtypes_and_shapes():
    def signed(change):
        module = nn.BatchNorm1d(4)
        change(module)
        return weights_signature(module)

    def set_weight(value):
        return lambda module: setattr(module, "weight", nn.Parameter(value))

    changes = [
        lambda module: None,
        set_weight(torch.tensor([1.0, 1.0, 1.0, 1.0000001])),
        set_weight(torch.ones(4, dtype=torch.bfloat16)),
        set_weight(torch.ones(2, 2)),
        lambda module: module.register_buffer("extra", torch.zeros(0)),
        lambda module: module.num_batches_tracked.add_(1),
    ]
    signatures = [signed(change) for change in changes]
    assert len(set(signatures)) == len(changes)
    assert signatures == [signed(change) for change in changes]
    assert len(signatures[0]) == 64


def test_importing_encoders_does_not_import_transformers():
    code = "import sys, raysweep.encoders; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
