import json
import pickle

import pytest
import torch
from torch import nn

from raysweep.encoders.base import Encoder, EncoderSpec, Origin, weights_signature
from raysweep.encoders.build import build_encoder
from raysweep.errors import EncoderError

TINY = {
    "dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "clip": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "siglip": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "stacked_cnn": {"channels": [8, 16]},
}
# As exported models, encoder cards and the signatures of caches have it: a change here makes users lose them.
STACKED_CNN = {
    "type": "stacked_cnn",
    "family": "stacked_cnn",
    "config": {"channels": [8, 16]},
    "preprocessing": {
        "resize": "shortest_edge",
        "resize_size": 64,
        "crop_size": 56,
        "resample": 2,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "rescale_factor": 0.00392156862745098,
    },
    "parts": {"pooled": 16},
    "sources": {"pooled": ["pooled"]},
    "origin": {"name": None, "revision": None},
}


def tiny(kind):
    return build_encoder({"type": kind, "use_pretrained": False, "config": TINY[kind], "image_size": 56}, seed=0)


# The spec


def test_the_dict_of_a_spec_is_the_one_that_is_stored():
    values = tiny("stacked_cnn").spec.to_dict()
    assert values == STACKED_CNN
    assert json.dumps(values) == json.dumps(STACKED_CNN)  # the order of keys too


def test_spec_has_the_agreed_keys():
    values = tiny("clip").spec.to_dict()
    assert set(values) == {"type", "family", "config", "preprocessing", "parts", "sources", "origin"}
    assert values["origin"] == {"name": None, "revision": None}
    assert values["parts"] == {"cls": 32, "projected": 512}


@pytest.mark.parametrize("kind", TINY)
def test_a_spec_survives_json_and_pickle(kind):
    spec = tiny(kind).spec
    read_back = EncoderSpec.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False)))
    assert read_back == EncoderSpec.from_dict(spec.to_dict()) == spec
    assert read_back.to_dict() == spec.to_dict()
    assert list(read_back.sources) == list(spec.sources)
    assert all(isinstance(parts, tuple) for parts in read_back.sources.values())
    unpickled = pickle.loads(pickle.dumps(spec))
    assert unpickled == spec
    assert unpickled.to_dict() == spec.to_dict()


def test_a_spec_does_not_share_its_dicts_with_what_it_is_read_from():
    values = json.loads(json.dumps(STACKED_CNN))
    spec = EncoderSpec.from_dict(values)
    values["parts"]["pooled"] = values["config"]["channels"] = 0
    spec.to_dict()["parts"]["pooled"] = 1
    assert spec.to_dict() == STACKED_CNN


@pytest.mark.parametrize("key", STACKED_CNN)
def test_a_missing_key_is_a_key_error(key):
    values = {name: value for name, value in STACKED_CNN.items() if name != key}
    with pytest.raises(KeyError, match=key):
        EncoderSpec.from_dict(values)


@pytest.mark.parametrize(
    "change",
    [
        {"config": None},
        {"parts": None},
        {"origin": None},
        {"origin": {"path": "x"}},
        {"sources": {"pooled": None}},
        {"preprocessing": {"resize": "exact"}},
        {"family": "evil"},
        {"type": 5},
        {"parts": {"pooled": 10**12}},
        {"parts": {"pooled": "wide"}},
        {"sources": {"pooled": ["nothing"]}},
        {"sources": {}},
        {"preprocessing": STACKED_CNN["preprocessing"] | {"flip": True}},
    ],
)
def test_a_damaged_value_is_a_type_error(change):
    with pytest.raises(TypeError):
        EncoderSpec.from_dict(STACKED_CNN | change)


def test_an_origin_is_read_back():
    origin = {"name": "some/model", "revision": "0123"}
    spec = EncoderSpec.from_dict(STACKED_CNN | {"origin": origin})
    assert spec.origin == Origin("some/model", "0123")
    assert spec.to_dict()["origin"] == origin


def test_widest_and_default_source():
    spec = tiny("dinov2").spec
    assert (spec.default_source, spec.num_features("cls"), spec.widest) == ("cls", 32, 64)
    assert spec.parts_of("cls+mean") == ("cls", "mean")
    spec = tiny("clip").spec
    assert (spec.default_source, spec.num_features("projected"), spec.widest) == ("cls", 512, 512)


def test_an_unknown_source_gets_a_suggestion():
    encoder = tiny("dinov2")
    message = "features: 'cls\\+meen' is not a feature source of dinov2; did you mean 'cls\\+mean'"
    for find in (encoder.num_features, encoder.spec.num_features, encoder.spec.parts_of):
        with pytest.raises(EncoderError, match=message):
            find("cls+meen")
    with pytest.raises(EncoderError, match=message):
        encoder.select({}, "cls+meen")


# The encoder


def test_an_encoder_reads_its_spec():
    spec = EncoderSpec.from_dict(STACKED_CNN)
    encoder = Encoder(spec)
    assert encoder.spec is spec
    assert encoder.preprocessing is spec.preprocessing
    assert (encoder.parts, encoder.sources) == ({"pooled": 16}, {"pooled": ("pooled",)})
    assert encoder.num_features("pooled") == 16
    assert not encoder.supports_gradient_checkpointing


def test_select_concatenates_the_parts_of_a_source():
    encoder = tiny("dinov2")
    outputs = {"cls": torch.zeros(2, 32), "mean": torch.ones(2, 32)}
    assert encoder.select(outputs, "cls").shape == (2, 32)
    both = encoder.select(outputs, "cls+mean")
    assert both.shape == (2, 64) == (2, encoder.num_features("cls+mean"))
    assert both[:, 32:].eq(1).all()
    assert next(iter(encoder.sources)) == "cls"


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


# Weights


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
