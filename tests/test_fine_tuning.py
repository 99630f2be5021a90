"""Frozen really is frozen, trainable really trains, and fine-tuning starts where the probe ended."""

import json
import subprocess
import sys

import pytest
import ray
import torch
import yaml
from jobs import make_job
from safetensors.torch import load_file

from raysweep.encoders.base import EncoderSpec
from raysweep.encoders.build import build_encoder
from raysweep.training.loop import predict_logits
from raysweep.training.population import FeatureSet, train_population
from raysweep.worker.inputs import build_classifier, save_heads

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "dinov2": TINY,
    "clip": TINY | {"intermediate_size": 32, "patch_size": 14, "projection_dim": 8},
    "siglip": TINY | {"intermediate_size": 32, "patch_size": 14},
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("normalize", ["none", "l2", "standardize"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_at_step_0_fine_tuning_gives_the_probes_logits(tmp_path, monkeypatch, kind, normalize, precision):
    """Kumar et al. 2022 (LP-FT), for every feature source: the head brings its source and its normalisation along."""
    encoder = build_encoder({"type": kind, "use_pretrained": False, "image_size": 28, "config": CONFIGS[kind]}, seed=0)
    generator = torch.Generator().manual_seed(1)
    size = encoder.preprocessing.training_size
    pixels = torch.randint(0, 256, (40, *size, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (40,), generator=generator)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        outputs = encoder(encoder.preprocessing.normalize(encoder.preprocessing.centre_crop(pixels)))
    features = FeatureSet({part: values.float() for part, values in outputs.items()}, labels)
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    for source, parts in encoder.sources.items():
        setting = {"learning_rate": 0.1, "epochs": 5, "weight_decay": 0.0, "features": source, "normalize": normalize}
        (result,) = train_population(
            features, features, [setting], sources=encoder.sources, num_classes=3, batch_size=8, seed=0
        )
        save_heads(tmp_path / "best.safetensors", [result.head], source, {})
        job = make_job(
            "fine_tune",
            encoder=EncoderSpec.from_dict(json.loads(json.dumps(encoder.spec.to_dict()))),
            weights={name: tensor.numpy() for name, tensor in encoder.state_dict().items()},
            head=str(tmp_path / "best.safetensors"),
        )
        with torch.no_grad():
            probed = result.head(features.source(parts, torch.arange(40)))
        assert probed.std() > 0.05, "zeros would agree with anything"
        found = predict_logits(build_classifier(job), pixels, precision)
        torch.testing.assert_close(found, probed, rtol=1e-4, atol=1e-4)


@pytest.mark.end_to_end
def test_frozen_is_frozen_and_trainable_trains_everything(tmp_path):
    """With batch norm, whose statistics are what a frozen encoder most easily loses."""
    from transformers import MobileNetV2Config, MobileNetV2ImageProcessorPil, MobileNetV2Model

    torch.manual_seed(0)
    pretrained = MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.25, image_size=32))
    for name, buffer in pretrained.named_buffers():  # statistics that a forward pass in training mode would move
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    pretrained.save_pretrained(tmp_path / "weights")
    MobileNetV2ImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "weights"
    )
    experiment = {
        "name": "bn",
        "data": {"source": "sklearn://digits"},
        "encoders": [
            {"type": "auto", "pretrained_model_name_or_path": str(tmp_path / "weights"), "trainable": trainable}
            for trainable in (False, True)
        ],
        "search": {
            "linear_probe": {"num_trials": 2, "space": {"epochs": 2}, "baselines": []},
            "fine_tune": {"num_trials": 1, "space": {"learning_rate": 1e-3, "epochs": 3, "layer_decay": 1.0}},
        },
        # Else the statistics would stay, too; and the start, whose statistics are wrong here, could be the best.
        "train": {"freeze_batch_norm": False, "ema_decay": None},
    }
    (tmp_path / "bn.yaml").write_text(yaml.safe_dump(experiment))
    command = [sys.executable, "-m", "raysweep.run", "bn.yaml"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    before = {f"encoder.model.{name}": tensor for name, tensor in pretrained.state_dict().items()}
    models = tmp_path / "runs" / "bn" / "models"
    probe, tuned = (
        load_file(models / f"weights-{mode}" / "model.safetensors") for mode in ("linear_probe", "fine_tune")
    )
    assert before.keys() <= probe.keys() == tuned.keys()
    assert any(name.endswith("running_var") for name in before)
    assert [name for name, tensor in before.items() if not torch.equal(probe[name], tensor)] == []
    assert [name for name, tensor in before.items() if torch.equal(tuned[name], tensor)] == []
    assert not torch.equal(tuned["head.weight"], probe["head.weight"])
