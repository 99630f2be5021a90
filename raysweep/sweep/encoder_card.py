"""What is known of an encoder without loading it: its specification and the signature of its weights, in a small file.

Importing transformers and loading weights takes seconds, and a sweep whose features are cached needs neither until it
exports its models. So the first sweep that loads an encoder leaves a card beside the caches. The card is named after
all that the encoder depends on; files of weights count by size and time of change.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import raysweep.encoders
from raysweep.encoders.base import Encoder, EncoderSpec, weights_signature
from raysweep.encoders.build import build_encoder
from raysweep.encoders.families import FAMILIES, VARIANTS
from raysweep.encoders.pretrained import find_pretrained
from raysweep.errors import EncoderError
from raysweep.experiment.studies import EncoderConfig
from raysweep.storage.paths import read_json, signature, write_json

_loading = ThreadPoolExecutor(1, "encoders")  # one after another: building an encoder seeds a generator they share


def read_card(config: EncoderConfig, seed: int, folder: Path) -> LazyEncoder:
    """Reads an encoder's card; where there is none yet, loads the encoder and writes it.

    Args:
        config: the encoder's entry in the experiment.
        seed: of random weights.
        folder: of the cards.

    Raises:
        EncoderError: the weights cannot be had, or are not what the entry says.
    """
    card = folder / f"encoder-{signature(_identity(config, seed))}.json"
    if card.exists():
        content = read_json(card)
        return LazyEncoder(config, seed, EncoderSpec.from_dict(content["spec"]), str(content["weights"]))
    model = build_encoder(config.model_dump(), seed)
    weights = weights_signature(model)
    write_json(card, {"spec": model.spec.to_dict(), "weights": weights})
    encoder = LazyEncoder(config, seed, model.spec, weights)
    encoder.model = model
    return encoder


def _identity(config: EncoderConfig, seed: int) -> list[Any]:
    """All that an encoder depends on."""
    code = Path(raysweep.encoders.__file__).parent.glob("*.py")
    versions = [version("torch"), version("transformers")]
    identity = [config.model_dump(), seed, versions, [path.read_text() for path in sorted(code)]]
    name, is_pretrained = config.pretrained_model_name_or_path, config.use_pretrained
    # Random weights of a known variant need no file; those of another need its configuration.
    if not FAMILIES[config.type].has_weights or (not is_pretrained and name in VARIANTS):
        return identity
    assert name is not None, "an experiment fills in the default weights"
    files_of = find_pretrained(name, config.revision, with_weights=is_pretrained)
    files = sorted(path for path in files_of.folder.iterdir() if path.is_file())
    # Files in the hub's cache are links to files that are named after their content.
    stats = [(path.name, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return [*identity, files_of.revision, stats]


class LazyEncoder:
    """An encoder of a sweep: described at once, loaded when its weights are needed; made by `read_card`.

    Attributes:
        spec: everything but its weights.
        weights: signature of its weights.
        precision: `fp32` or `bf16`, once its pass has been decided on; else empty.
    """

    def __init__(self, config: EncoderConfig, seed: int, spec: EncoderSpec, weights: str) -> None:
        self.spec, self.weights, self.precision = spec, weights, ""
        self._config, self._seed = config, seed
        self._loaded: Future[Encoder] | None = None
        self._reference: Any = None

    def load_ahead(self) -> None:
        """Begins to load the weights, without waiting for them."""
        if self._loaded is None and "model" not in vars(self):
            self._loaded = _loading.submit(build_encoder, self._config.model_dump(), self._seed)

    @cached_property
    def model(self) -> Encoder:
        """The encoder with its weights, on the CPU, in evaluation mode.

        Raises:
            EncoderError: the weights are not those of the card.
        """
        self.load_ahead()
        assert self._loaded is not None
        encoder = self._loaded.result()
        if weights_signature(encoder) != self.weights:
            raise EncoderError(f"{self._config.type}: its weights have changed since the sweep began; start it again")
        return encoder

    def put(self) -> Any:
        """Returns a reference to the weights in Ray's object store, shared by all studies of the encoder."""
        import ray

        if self._reference is None:
            self._reference = ray.put({name: tensor.numpy() for name, tensor in self.model.state_dict().items()})
        return self._reference
