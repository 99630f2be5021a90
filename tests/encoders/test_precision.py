import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from raysweep.encoders import precision
from raysweep.encoders.build import build_encoder
from raysweep.encoders.precision import faster_precision, supports_bf16

CPU = torch.device("cpu")
TINY = {
    "dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "clip": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "siglip": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "stacked_cnn": {"channels": [8, 16]},
}


def tiny(kind):
    return build_encoder({"type": kind, "use_pretrained": False, "config": TINY[kind], "image_size": 56}, seed=0)


@pytest.mark.parametrize("kind", TINY)
def test_features_in_bf16_point_where_those_in_fp32_do(kind):
    encoder = tiny(kind)
    pixel_values = torch.randn(8, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = encoder(pixel_values)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = encoder(pixel_values)
    for part, features in exact.items():
        assert not torch.equal(rounded[part].float(), features)
        assert torch.cosine_similarity(rounded[part].float(), features).min() >= 0.999


class Timed:
    """An encoder that takes as long as it is told to, on a clock of its own."""

    preprocessing = SimpleNamespace(output_size=(4, 4), normalize=lambda images: images.permute(0, 3, 1, 2).float())

    def __init__(self, fp32, bf16):
        self.seconds, self.now, self.calls = {False: list(fp32), True: list(bf16)}, 0.0, []

    def __call__(self, pixel_values):
        assert pixel_values.shape == (2, 3, 4, 4)
        assert torch.get_num_threads() == 1
        half = torch.is_autocast_enabled("cpu")
        self.calls.append("bf16" if half else "fp32")
        self.now += self.seconds[half].pop(0)
        return {"cls": torch.zeros(2, 1)}


def chosen(monkeypatch, encoder, supported=True):
    monkeypatch.setattr(precision, "supports_bf16", lambda device: supported)
    monkeypatch.setattr(precision.time, "thread_time", lambda: encoder.now)
    num_threads = torch.get_num_threads()
    found = faster_precision(encoder, CPU, 2)
    assert torch.get_num_threads() == num_threads
    return found


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"),
    [
        ([0.010] * 4, [0.008] * 4, "bf16"),
        ([0.010] * 4, [0.0095] * 4, "fp32"),  # a gain too small to round every feature for
        ([0.010] * 4, [0.02] * 4, "fp32"),
        ([0.010] * 4, [0.9, 0.03, 0.008, 0.03], "bf16"),  # neither the warm-up nor a disturbed pass counts
        ([0.9, 0.03, 0.008, 0.03], [0.010] * 4, "fp32"),
    ],
)
def test_the_faster_precision_is_chosen(monkeypatch, fp32, bf16, expected):
    encoder = Timed(fp32, bf16)
    assert chosen(monkeypatch, encoder) == expected
    assert encoder.calls == ["fp32", "bf16"] * 4


def test_an_encoder_that_takes_long_is_timed_once(monkeypatch):
    encoder = Timed([5.0, 5.0], [3.0, 3.0])
    assert chosen(monkeypatch, encoder) == "bf16"
    assert encoder.calls == ["fp32", "bf16"] * 2


def test_nothing_is_timed_where_the_device_lacks_bf16(monkeypatch):
    encoder = Timed([], [])
    assert chosen(monkeypatch, encoder, supported=False) == "fp32"
    assert encoder.calls == []


def test_a_real_encoder_can_be_timed_and_still_be_trained(monkeypatch):
    monkeypatch.setattr(precision, "supports_bf16", lambda device: True)
    encoder = tiny("dinov2")
    assert faster_precision(encoder, CPU, 2) in ("fp32", "bf16")
    encoder(torch.rand(2, 3, 56, 56))["cls"].sum().backward()


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="Linux on x86 only")
def test_support_on_a_cpu_is_what_the_kernel_says():
    flags = Path("/proc/cpuinfo").read_text()
    assert supports_bf16(CPU) == ("avx512_bf16" in flags)


def test_devices_without_bf16_do_not_have_it(monkeypatch):
    assert not supports_bf16(torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not supports_bf16(torch.device("cuda"))
