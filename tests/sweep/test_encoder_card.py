import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from raysweep.encoders.base import weights_signature
from raysweep.encoders.build import build_encoder
from raysweep.errors import EncoderError
from raysweep.experiment.studies import EncoderConfig
from raysweep.sweep import encoder_card as cards
from raysweep.sweep.encoder_card import read_card

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
RANDOM = {"type": "dinov2", "use_pretrained": False, "image_size": 16, "config": TINY}


@pytest.fixture
def num_built(monkeypatch):
    built = []

    def build(config, seed):
        built.append(config["type"])
        return build_encoder(config, seed)

    monkeypatch.setattr(cards, "build_encoder", build)
    return built


@pytest.fixture
def checkpoint(tmp_path):
    """A pretrained checkpoint in a folder, with tiny random weights."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    Dinov2Model(Dinov2Config(**TINY, image_size=16)).save_pretrained(tmp_path / "weights")
    sizes = {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}}
    BitImageProcessorPil(**sizes).save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def open_encoder(folder, seed=1, **config):
    return read_card(EncoderConfig.model_validate(config), seed, folder / "cards")


def test_an_encoder_with_a_card_is_loaded_only_when_its_weights_are_needed(tmp_path, num_built):
    first = open_encoder(tmp_path, **RANDOM)
    assert num_built == ["dinov2"]
    second = open_encoder(tmp_path, **RANDOM)
    assert num_built == ["dinov2"]
    assert second.spec == first.spec == first.model.spec
    assert second.weights == first.weights == weights_signature(first.model)
    assert weights_signature(second.model) == first.weights
    assert num_built == ["dinov2"] * 2


def test_loading_ahead_loads_once(tmp_path, num_built):
    open_encoder(tmp_path, **RANDOM)
    again = open_encoder(tmp_path, **RANDOM)
    again.load_ahead()
    again.load_ahead()
    assert again.model is again.model
    assert len(num_built) == 2


def test_random_weights_follow_the_seed_and_the_architecture(tmp_path):
    first = open_encoder(tmp_path, **RANDOM)
    assert open_encoder(tmp_path, seed=2, **RANDOM).weights != first.weights
    other = RANDOM | {"config": TINY | {"num_hidden_layers": 3}}
    assert open_encoder(tmp_path, **other).spec.config != first.spec.config


@pytest.mark.parametrize("keeps_time", [False, True])
def test_changed_weights_get_a_card_of_their_own(tmp_path, checkpoint, num_built, keeps_time):
    config = {"type": "dinov2", "pretrained_model_name_or_path": str(checkpoint)}
    first = open_encoder(tmp_path, **config)
    assert open_encoder(tmp_path, **config).weights == first.weights
    assert len(num_built) == 1
    file = checkpoint / "model.safetensors"
    before = file.stat()
    tensors = load_file(file)
    name = "embeddings.cls_token"
    tensors[name] = tensors[name] + 1
    if keeps_time:
        tensors["unused"] = torch.zeros(3)  # of another size, but the same time of change
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if keeps_time else 1_000_000)))
    assert open_encoder(tmp_path, **config).weights != first.weights


GARBLED = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no object": lambda text: "[1]",
    "no spec": lambda text: '{"weights": "x"}',
    "a spec of nothing": lambda text: '{"spec": {}, "weights": "x"}',
    "another digit": lambda text: text.replace("0.485", "0.585"),
    "other weights": lambda text: text.replace('"weights": "', '"weights": "0'),
}


@pytest.mark.parametrize("damage", GARBLED)
def test_a_damaged_card_is_made_again_with_a_word(tmp_path, num_built, damage):
    said, config = [], EncoderConfig.model_validate(RANDOM)
    first = read_card(config, 1, tmp_path, said.append)
    (card,) = tmp_path.glob("*.json")
    text = card.read_text()
    assert GARBLED[damage](text) != text
    card.write_text(GARBLED[damage](text))
    again = read_card(config, 1, tmp_path, said.append)
    assert (again.spec, again.weights, card.read_text()) == (first.spec, first.weights, text)
    assert (len(num_built), len(said)) == (2, 1)
    assert said[0].startswith(f"dinov2: {card}: ")
    assert said[0].endswith("; the card is made again")
    read_card(config, 1, tmp_path, said.append)
    assert (len(num_built), len(said)) == (2, 1)


def test_an_encoder_that_is_no_function_gets_no_card(tmp_path, monkeypatch):
    def noisy(config, seed):
        encoder = build_encoder(config, seed)
        forward = encoder.forward
        encoder.forward = lambda pixels: {part: x + torch.rand_like(x) for part, x in forward(pixels).items()}
        return encoder

    monkeypatch.setattr(cards, "build_encoder", noisy)
    with pytest.raises(EncoderError, match="two calls for the same images differ"):
        open_encoder(tmp_path, **RANDOM)
    assert not list(tmp_path.rglob("*.json"))


def test_weights_that_are_gone_are_an_error_whatever_the_card_says(tmp_path, checkpoint):
    config = {"type": "dinov2", "pretrained_model_name_or_path": str(checkpoint)}
    open_encoder(tmp_path, **config)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="no weights in"):
        open_encoder(tmp_path, **config)
    assert len(list((tmp_path / "cards").iterdir())) == 1
