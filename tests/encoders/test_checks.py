"""Encoders whose features depend on chance or on other images."""

import pytest
import torch
from torch import nn

from raysweep.encoders.base import Encoder, EncoderSpec, Origin
from raysweep.encoders.build import build_encoder
from raysweep.encoders.checks import check_is_function
from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import EncoderError

SPEC = EncoderSpec(
    type="auto",
    family="auto",
    config={},
    preprocessing=Preprocessing("exact", (16, 16), None, 3, (0.5,) * 3, (0.5,) * 3),
    parts={"mean": 6},
    sources={"mean": ("mean",)},
    origin=Origin("some/model"),
)


class Toy(Encoder):
    """Features from a function of an image's mean colours and their deviations, `(batch, 6)`."""

    def __init__(self, function):
        super().__init__(SPEC)
        self.function = function

    def forward(self, pixel_values):
        pixels = pixel_values.flatten(2)
        return {"mean": self.function(torch.cat([pixels.mean(2), pixels.std(2)], dim=1))}


class StaysInTraining(nn.Dropout):
    """A module that eval() does not reach."""

    def train(self, mode=True):
        return super().train(True)


def without_statistics(features):
    return nn.functional.instance_norm(features.T[None], use_input_stats=True)[0].T if len(features) > 1 else features


WRONG = {
    "dropout in every mode": (lambda x: nn.functional.dropout(x, 0.3, training=True), "two calls .* differ by"),
    "noise": (lambda x: x + 0.01 * torch.rand_like(x), "two calls .* differ by .* accepted: at most 0.001"),
    "patches in random order": (lambda x: x[:, torch.randperm(6)], "two calls .* differ by"),
    "statistics of the batch": (without_statistics, "an image alone and the same image beside another differ by"),
    "centred by the batch": (lambda x: x - x.mean(0), "an image alone and the same image beside another differ by"),
    "the other image": (lambda x: x.flip(0), "an image alone and the same image beside another differ by"),
    "no numbers": (lambda x: x / 0 * 0, "12 of 12 features 'mean' are NaN or infinite"),
    "infinity": (lambda x: x / 0, "12 of 12 features 'mean' are NaN or infinite"),
    "an error": (lambda x: x.view(1, 6), "it fails on two images of noise or on one: RuntimeError: shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_function_of_one_image_is_refused(name):
    function, told = WRONG[name]
    with pytest.raises(EncoderError, match=f"some/model: .*{told}"):
        check_is_function(Toy(function).eval())


def test_a_module_that_stays_in_training_mode_is_named():
    with pytest.raises(EncoderError, match=r"some/model: function\.1 stays in training mode after eval\(\)"):
        check_is_function(Toy(nn.Sequential(nn.Identity(), StaysInTraining(0.1))).eval())


@pytest.mark.parametrize("function", [lambda x: x, nn.Dropout(0.5), nn.BatchNorm1d(6), lambda x: x + 1e-9])
def test_functions_of_one_image_are_accepted(function):
    encoder, num_images = Toy(function).eval(), []
    encoder.register_forward_pre_hook(lambda _encoder, arguments: num_images.append(len(arguments[0])))
    check_is_function(encoder)
    assert num_images == [2, 2, 1], "two images twice and one alone were compared"


@pytest.mark.parametrize("kind", ["stacked_cnn", "dinov2", "clip", "siglip"])
def test_our_families_are_functions_and_the_global_random_state_stays(kind):
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    config = {"channels": [4, 8]} if kind == "stacked_cnn" else tiny
    encoder = build_encoder({"type": kind, "use_pretrained": False, "image_size": 16, "config": config}, seed=0)
    state = torch.random.get_rng_state()
    check_is_function(encoder)
    assert torch.equal(torch.random.get_rng_state(), state)
