"""Compiled encoders: the same features by other code, or a warning and the encoder itself."""

import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from raysweep.encoders import compiled
from raysweep.encoders.base import weights_signature
from raysweep.encoders.build import build_encoder
from raysweep.encoders.checks import check_is_function
from raysweep.encoders.compiled import MIN_IMAGES, CompiledEncoder, compile_for_pass, encode_batch

CPU, BATCH_SIZE = torch.device("cpu"), 4
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
ENCODERS = {
    "dinov2": {"type": "dinov2", "use_pretrained": False, "image_size": 32, "config": TINY},
    "clip": {"type": "clip", "use_pretrained": False, "image_size": 32, "config": TINY},
    "siglip": {"type": "siglip", "use_pretrained": False, "image_size": 32, "config": TINY},
    "stacked_cnn": {"type": "stacked_cnn", "image_size": 16, "config": {"channels": [8, 16]}},
}


@pytest.fixture(autouse=True)
def nothing_compiled_yet(monkeypatch):
    """Tests compile on CPUs. Without a C++ compiler, all of torch.compile runs but its last step."""
    monkeypatch.setattr(compiled, "COMPILED_ON", "cpu")
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def calls(monkeypatch):
    """How often the compiler was called, and how often what it made."""
    counts = Counter()

    def backend(graph, _example_inputs):
        counts["compiled"] += 1

        def run(*inputs):
            counts["ran"] += 1
            return graph.forward(*inputs)

        return run

    monkeypatch.setattr(compiled, "BACKEND", backend)
    return counts


def build(name="dinov2"):
    return build_encoder(ENCODERS[name], 0).requires_grad_(False)


def images_of(encoder, count):
    size = encoder.preprocessing.output_size
    return torch.randint(256, (count, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def compile_it(encoder, warnings=None, precision="fp32", num_images=MIN_IMAGES, device=CPU):
    warn = [].append if warnings is None else warnings.append
    return compile_for_pass(encoder, device, precision, batch_size=BATCH_SIZE, num_images=num_images, warn=warn)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_compiled_encoder_gives_the_same_features(name, precision):
    encoder, warnings = build(name), []
    found = compile_it(encoder, warnings, precision)
    assert isinstance(found, CompiledEncoder)
    assert warnings == []
    assert found.parts == encoder.parts
    for count in (BATCH_SIZE, BATCH_SIZE - 1, 1):
        images = images_of(encoder, count)
        features, expected = (encode_batch(one, images, precision) for one in (found, encoder))
        assert features.keys() == expected.keys()
        for part in expected:
            assert torch.cosine_similarity(features[part].float(), expected[part].float(), dim=1).min() > 0.9999


@pytest.mark.process
def test_the_compiler_that_gpus_use_compiles_it_too(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    encoder, warnings = build(), []
    found = compile_it(encoder, warnings, "bf16")
    if warnings:
        pytest.skip(warnings[0])
    images = images_of(encoder, BATCH_SIZE)
    features, expected = (encode_batch(one, images, "bf16")["cls"] for one in (found, encoder))
    assert torch.cosine_similarity(features.float(), expected.float(), dim=1).min() > 0.9999


def test_the_encoder_keeps_its_names_and_its_signature():
    encoder = build()
    names, before = list(encoder.state_dict()), weights_signature(encoder)
    found = compile_it(encoder)
    assert found.encoder is encoder
    assert list(encoder.state_dict()) == names
    assert weights_signature(encoder) == before
    check_is_function(encoder)


def test_only_full_batches_run_compiled_and_nothing_is_compiled_twice(calls):
    encoder = build()
    found = compile_it(encoder)
    assert calls == {"compiled": 1, "ran": 1}
    for count, num_runs in ((BATCH_SIZE, 2), (1, 2), (BATCH_SIZE - 1, 2), (BATCH_SIZE + 1, 2), (BATCH_SIZE, 3)):
        encode_batch(found, images_of(encoder, count), "fp32")
        assert calls == {"compiled": 1, "ran": num_runs}


def test_threads_share_what_was_compiled(calls):
    """An actor answers two calls at once. Code that one thread compiled must hold for the other, too."""
    encoder = build()
    found, images, start = compile_it(encoder), images_of(encoder, BATCH_SIZE), threading.Barrier(2)

    def encode_in_a_thread(_number):
        start.wait()
        return [encode_batch(found, images, "fp32")["cls"] for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(encode_in_a_thread, range(2))
    assert calls == {"compiled": 1, "ran": 11}
    assert all(torch.equal(features, first[0]) for features in [*first, *second])


def test_many_encoders_of_one_pass_are_all_compiled(calls):
    for number in range(10):  # of one family, each of another width
        block = {**ENCODERS["dinov2"], "config": {**TINY, "hidden_size": 16 + 4 * number}}
        assert isinstance(compile_it(build_encoder(block, 0).requires_grad_(False)), CompiledEncoder)
        assert calls == {"compiled": number + 1, "ran": number + 1}


@pytest.mark.parametrize(
    ("device", "num_images"), [("cpu", MIN_IMAGES - 1), ("meta", MIN_IMAGES), ("cuda", MIN_IMAGES)]
)
def test_short_passes_and_other_devices_get_the_encoder_itself(device, num_images, calls):
    encoder, warnings = build(), []
    assert compile_it(encoder, warnings, num_images=num_images, device=torch.device(device)) is encoder
    assert warnings == []
    assert not calls


def fails_to_compile(_graph, _example_inputs):
    raise RuntimeError("no C compiler\nwas found")


def fails_when_it_runs(_graph, _example_inputs):
    def run(*_inputs):
        raise torch.OutOfMemoryError("no memory left")

    return run


def gives_other_features(graph, _example_inputs):
    return lambda *inputs: [output.flip(1) for output in graph.forward(*inputs)]


def gives_no_numbers(graph, _example_inputs):
    return lambda *inputs: [output * float("nan") for output in graph.forward(*inputs)]


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (fails_to_compile, "RuntimeError: no C compiler was found"),
        (fails_when_it_runs, "OutOfMemoryError: no memory left"),
        (gives_other_features, "have a cosine of .* accepted: at least 0.9999"),
        (gives_no_numbers, "have a cosine of nan; accepted: at least 0.9999"),
    ],
)
def test_what_cannot_be_compiled_is_used_as_it_is_with_a_warning(monkeypatch, backend, reason):
    monkeypatch.setattr(compiled, "BACKEND", backend)
    encoder, warnings = build(), []
    assert compile_it(encoder, warnings) is encoder
    (warning,) = warnings
    assert warning.startswith("warning: dinov2: it is not compiled, so the pass takes longer: ")
    assert "\n" not in warning
    assert re.search(reason, warning)
    expected = encoder(encoder.preprocessing.normalize(images_of(encoder, 2)))["cls"]
    torch.testing.assert_close(encode_batch(encoder, images_of(encoder, 2), "fp32")["cls"], expected)
