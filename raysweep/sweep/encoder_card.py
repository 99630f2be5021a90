"""Encoder cards: small files with the specification of an encoder and the signature of its weights.

Importing transformers and loading weights takes seconds. A sweep whose features are cached needs neither until it
exports its models. So the first sweep that loads an encoder writes a card beside the caches. The card's name is a hash
of everything that the encoder depends on; files of weights count by size and modification time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import raysweep.encoders
from raysweep.encoders.base import Encoder, EncoderSpec, weights_signature
from raysweep.encoders.build import build_encoder
from raysweep.encoders.checks import check_is_function
from raysweep.encoders.families import FAMILIES, VARIANTS
from raysweep.encoders.pretrained import find_pretrained
from raysweep.errors import DataError, EncoderError
from raysweep.experiment.studies import EncoderConfig
from raysweep.storage.checksums import read_checked_json, write_checked_json
from raysweep.storage.paths import signature

# One thread, since building an encoder seeds a generator that all share. `read_card` builds in the caller's thread:
# `check_studies` asks for every card before anything is loaded ahead.
_loading = ThreadPoolExecutor(1, "encoders")


def read_card(
    config: EncoderConfig, seed: int, folder: Path, say: Callable[[str], None] = lambda _text: None
) -> LazyEncoder:
    """Reads an encoder's card. If there is none or it is damaged, loads and checks the encoder, and writes the card.

    Args:
        config: the encoder's entry in the experiment.
        seed: seed of random weights.
        folder: folder of the cards.
        say: called with a line if a card is damaged.

    Raises:
        EncoderError: the weights cannot be found, do not match the entry, or make no function of one image.
    """
    card = folder / f"encoder-{signature(_identity(config, seed))}.json"
    if card.exists():
        try:
            return _read(card, config, seed)
        except DataError as error:
            say(f"{config.type}: {error}; the card is made again")
    model = build_encoder(config.model_dump(), seed)
    check_is_function(model)
    write_checked_json(card, {"spec": model.spec.to_dict(), "weights": weights_signature(model)})
    encoder = _read(card, config, seed)  # JSON may change a value, and signatures depend on the spec
    encoder.model = model
    return encoder


def _read(card: Path, config: EncoderConfig, seed: int) -> LazyEncoder:
    content = read_checked_json(card)
    try:
        return LazyEncoder(config, seed, EncoderSpec.from_dict(content["spec"]), str(content["weights"]))
    except (KeyError, TypeError, ValueError, AttributeError, EncoderError) as error:
        raise DataError(f"{card}: not an encoder card ({type(error).__name__}: {error})") from error


def _identity(config: EncoderConfig, seed: int) -> list[Any]:
    """Returns everything that an encoder depends on."""
    code = Path(raysweep.encoders.__file__).parent.glob("*.py")
    versions = [version("torch"), version("transformers")]
    identity = [config.model_dump(), seed, versions, [path.read_text() for path in sorted(code)]]
    name, is_pretrained = config.pretrained_model_name_or_path, config.use_pretrained
    # Random weights of a known variant need no file. Those of other models need their configuration file.
    if not FAMILIES[config.type].has_weights or (not is_pretrained and name in VARIANTS):
        return identity
    assert name is not None, "an experiment fills in the default weights"
    files_of = find_pretrained(name, config.revision, with_weights=is_pretrained)
    files = sorted(path for path in files_of.folder.iterdir() if path.is_file())
    # Files in Hugging Face's cache are links to files whose names are hashes of their content.
    stats = [(path.name, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return [*identity, files_of.revision, stats]


class LazyEncoder:
    """An encoder whose weights are loaded when they are first needed; made by `read_card`.

    Attributes:
        spec: its specification: everything but the weights.
        weights: signature of its weights.
        precision: precision of its pass over the images, `fp32` or `bf16`; empty until it is chosen.
    """

    def __init__(self, config: EncoderConfig, seed: int, spec: EncoderSpec, weights: str) -> None:
        self.spec, self.weights, self.precision = spec, weights, ""
        self._config, self._seed = config, seed
        self._loaded: Future[Encoder] | None = None
        self._reference: Any = None

    def load_ahead(self) -> None:
        """Starts to load the weights in a thread, and does not wait."""
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
        """Returns a Ray object reference to the weights as numpy arrays; all studies of the encoder share it."""
        import ray

        if self._reference is None:
            self._reference = ray.put({name: tensor.numpy() for name, tensor in self.model.state_dict().items()})
        return self._reference
