import json

import pytest
import torch
from torch.nn import functional as F

from raysweep.encoders.build import build_encoder
from raysweep.encoders.families import NORMALIZATIONS
from raysweep.encoders.head import Classifier, Head, normalize_features, standard_scale


def trained(normalize, num_features=6, num_classes=3):
    head = Head(num_features, num_classes, normalize)
    generator = torch.Generator().manual_seed(1)
    for tensor in (head.weight.data, head.bias.data, head.mean, head.scale):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return head


def features(num_rows=5, num_features=6):
    return 3 * torch.randn(num_rows, num_features, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_logits_are_a_linear_layer_over_normalised_features(normalize):
    head, rows = trained(normalize), features()
    expected = {
        "none": rows,
        "l2": rows / rows.square().sum(1, keepdim=True).sqrt(),
        "standardize": (rows - head.mean) / head.scale,
    }[normalize]
    torch.testing.assert_close(head(rows), expected @ head.weight.T + head.bias)


def test_a_row_of_zeros_stays_finite_under_l2():
    assert normalize_features(torch.zeros(1, 4), "l2", torch.zeros(4), torch.ones(4)).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_feature_has_scale_1(dtype):
    mean = torch.tensor([0.0, 0.0, 0.0, 1e6, 1e6, -1e6, -1e6], dtype=dtype)
    deviation = torch.tensor([0.0, 0.9e-6, 1.1e-6, 0.9, 1.1, 0.9, 1.1], dtype=dtype)
    expected = torch.tensor([1.0, 1.0, 1.1e-6, 1.0, 1.1, 1.0, 1.1], dtype=dtype)
    scale = standard_scale(mean, deviation)
    assert scale.dtype == dtype
    assert torch.equal(scale, expected)


def test_a_constant_feature_has_scale_1_also_where_its_squares_cancel():
    rows = torch.full((1000, 1), 1 / 3, dtype=torch.float64)
    mean = rows.sum(0) / 1000 + 1e-15
    deviation = (mean.square() - rows.square().sum(0) / 1000).abs().sqrt()
    assert deviation > 0
    assert standard_scale(mean, deviation) == 1


def test_a_new_head_is_indifferent():
    assert Head(6, 3, "standardize")(features()).eq(0).all()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_spec_and_a_state_dict_rebuild_an_equal_head(normalize):
    head = trained(normalize)
    rebuilt = Head(**json.loads(json.dumps(head.spec())))
    rebuilt.load_state_dict(head.state_dict())
    assert torch.equal(rebuilt(features()), head(features()))
    assert rebuilt.spec() == head.spec() == {"num_features": 6, "num_classes": 3, "normalize": normalize}


def test_statistics_are_saved_and_not_trained():
    head = trained("standardize")
    assert set(head.state_dict()) == {"weight", "bias", "mean", "scale"}
    assert [name for name, _ in head.named_parameters()] == ["weight", "bias"]


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(AssertionError, match="layer"):
        Head(6, 3, "layer")


@pytest.mark.parametrize("source", ["cls", "cls+mean"])
def test_a_classifier_gives_the_probes_logits_over_its_source(source):
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    block = {"type": "dinov2", "use_pretrained": False, "image_size": 28, "config": config}
    encoder = build_encoder(block, seed=0)
    head = trained("standardize", encoder.num_features(source))
    images = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        outputs = encoder(images)
        probed = head(torch.cat([outputs[part] for part in encoder.sources[source]], dim=1))
        assert torch.equal(Classifier(encoder, head, source)(images), probed)


def test_gradients_reach_encoder_and_head():
    encoder = build_encoder({"type": "stacked_cnn", "config": {"channels": [4]}, "image_size": 16}, seed=0)
    classifier = Classifier(encoder, trained("l2", 4), "pooled")
    F.cross_entropy(classifier(torch.rand(4, 3, 16, 16)), torch.tensor([0, 1, 2, 0])).backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())
    assert encoder.stages[0][0].weight.grad.abs().sum() > 0
