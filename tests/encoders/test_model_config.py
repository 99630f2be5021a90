"""A config.json that someone has tampered with: an EncoderError at once, and no code of theirs."""

import json
import time

import pytest
from safetensors.torch import load_file

from raysweep.encoders.base import EncoderSpec
from raysweep.encoders.build import build_encoder, encoder_from_spec
from raysweep.encoders.model_config import check_num_parameters, checked_config
from raysweep.errors import EncoderError

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 16}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny checkpoints of the families and of `auto`, by type."""
    import transformers
    from transformers import Dinov2Config, Dinov2Model, SwinConfig, SwinModel, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("checkpoints")
    Dinov2Model(Dinov2Config(**TINY)).save_pretrained(folder / "dinov2")
    swin = SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32, patch_size=4)
    SwinModel(swin).save_pretrained(folder / "auto")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "auto")
    vision = transformers.CLIPVisionConfig(**TINY, intermediate_size=32)
    transformers.CLIPVisionModelWithProjection(vision).save_pretrained(folder / "clip")
    return folder


def tampered(checkpoints, tmp_path, kind, change):
    config = json.loads((checkpoints / kind / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    for file in (checkpoints / kind).iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    return {"type": kind, "pretrained_model_name_or_path": str(tmp_path)}


HOSTILE = [
    ("dinov2", {"num_hidden_layers": 10_000_000}, "num_hidden_layers: 10000000; accepted: at most 500"),
    ("dinov2", {"hidden_size": 10**12}, "hidden_size: 1000000000000; accepted"),
    ("dinov2", {"hidden_size": 65_536}, "parameters"),
    ("dinov2", {"num_hidden_layers": 501}, "num_hidden_layers: 501; accepted: at most 500"),
    ("dinov2", {"mlp_ratio": 10_000_000}, "parameters"),
    ("dinov2", {"num_hidden_layers": -3}, ""),
    ("dinov2", {"num_hidden_layers": "many"}, ""),
    ("dinov2", {"num_hidden_layers": None}, ""),
    ("dinov2", {"num_hidden_layers": [1]}, ""),
    ("dinov2", {"num_hidden_layers": 1e7}, ""),
    ("dinov2", {"hidden_size": 0}, ""),
    ("dinov2", {"patch_size": 0}, ""),
    ("dinov2", {"patch_size": -8}, ""),
    ("dinov2", {"patch_size": "x"}, ""),
    ("dinov2", {"image_size": 10**7}, "parameters"),
    ("dinov2", {"num_attention_heads": 0}, ""),
    ("dinov2", {"hidden_act": "__import__('os').system('true')"}, ""),
    ("dinov2", {"layer_norm_eps": {"a": {}}}, ""),
    ("dinov2", {"model_type": ["dinov2"]}, "names no model_type"),
    ("auto", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}, "code of checkpoints is never run"),
    ("dinov2", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised weights are not read"),
    ("auto", {"depths": [10_000_000, 1]}, r"depths\.0: 10000000; accepted: at most 500"),
    ("auto", {"depths": [1] * 20_000}, "20,"),
    ("auto", {"depths": "deep"}, ""),
    ("auto", {"window_size": 10**6}, ""),
    ("auto", {"embed_dim": 10**6}, "parameters"),
    ("auto", {"quantization_config": {"quant_method": "gptq"}}, "quantised weights are not read"),
    ("clip", {"num_hidden_layers": 10**9}, "accepted: at most 500"),
    ("clip", {"projection_dim": 10**7}, "parameters"),
    ("clip", {"hidden_size": -1}, ""),
]


@pytest.mark.parametrize(("kind", "change", "told"), HOSTILE)
def test_a_tampered_config_is_an_encoder_error_at_once(checkpoints, tmp_path, kind, change, told):
    entry, started = tampered(checkpoints, tmp_path, kind, change), time.monotonic()
    with pytest.raises(EncoderError, match=told or "."):
        build_encoder(entry, seed=0)
    assert time.monotonic() - started < 10


HARMLESS = {
    "auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"},
    "attn_implementation": "kernels-community/evil",
    "_attn_implementation": "kernels-community/evil",
    "use_kernels": True,
    "device_map": "auto",
    "quantization_config": None,
}


@pytest.mark.parametrize("kind", ["dinov2", "auto", "clip"])
def test_names_of_code_are_left_out_and_nothing_of_it_is_run(checkpoints, tmp_path, kind):
    entry = tampered(checkpoints, tmp_path, kind, HARMLESS)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    encoder = build_encoder(entry, seed=0)
    usual = build_encoder(entry | {"pretrained_model_name_or_path": str(checkpoints / kind)}, seed=0)
    assert encoder.spec.config == usual.spec.config
    assert encoder.state_dict().keys() == usual.state_dict().keys()
    assert not (tmp_path / "ran").exists()
    assert not {"auto_map", "attn_implementation", "use_kernels"} & encoder.spec.config.keys()


def test_what_names_code_is_left_out_at_every_depth():
    values = {"a": 1, "vision_config": {"b": [{"auto_map": {}, "c": 2}], "attn_implementation": "evil"}}
    assert checked_config(values) == {"a": 1, "vision_config": {"b": [{"c": 2}]}}
    with pytest.raises(EncoderError, match=r"vision_config\.quantization_config: quantised"):
        checked_config({"vision_config": {"quantization_config": {"bits": 4}}})
    nested = {}
    for _ in range(20):
        nested = {"x": nested}
    with pytest.raises(EncoderError, match="more than 8 objects"):
        checked_config(nested)
    assert checked_config({"id2label": {str(number): "x" for number in range(50_000)}})


def test_a_model_must_fit_its_weights_and_the_memory(monkeypatch):
    check_num_parameters(100_000_000, num_stored=90_000_000)
    with pytest.raises(EncoderError, match="describes 500,000,000 parameters, the weights have 1,000"):
        check_num_parameters(500_000_000, num_stored=1_000)
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 1_000_000, "SC_PAGE_SIZE": 4_000}.get)
    check_num_parameters(900_000_000)
    with pytest.raises(EncoderError, match=r"1,100,000,000 parameters, 4 GB; this machine has 4 GB"):
        check_num_parameters(1_100_000_000)


def test_random_weights_of_a_tampered_shape_are_refused_too():
    for change in ({"num_hidden_layers": 10_000_000}, {"hidden_size": 10**9}, {"hidden_size": 262_144}):
        with pytest.raises(EncoderError, match="config"):
            build_encoder({"type": "dinov2", "use_pretrained": False, "config": {**TINY, **change}}, seed=0)


def test_the_spec_of_an_exported_model_is_held_to_the_same(checkpoints):
    spec = build_encoder({"type": "dinov2", "pretrained_model_name_or_path": str(checkpoints / "dinov2")}, 0).spec
    for change in ({"num_hidden_layers": 10_000_000}, {"model_type": "evil"}, {"quantization_config": {"a": 1}}):
        values = spec.to_dict()
        values["config"] |= change
        with pytest.raises(EncoderError):
            encoder_from_spec(EncoderSpec.from_dict(values))


def test_weights_that_are_whole_are_counted(checkpoints):
    from raysweep.encoders.pretrained import find_pretrained

    tensors = load_file(checkpoints / "dinov2" / "model.safetensors")
    stored = find_pretrained(str(checkpoints / "dinov2")).num_stored
    assert stored == sum(tensor.numel() for tensor in tensors.values())
