"""What is known of an encoder without loading it: its architecture and the signature of its weights, on a card.

Importing transformers and loading weights takes seconds, and a sweep whose features are cached needs neither until
it exports its models. So the first sweep that loads an encoder leaves a card beside the caches; the card is named
after the files of weights, by size and time of change, and all else that the encoder depends on.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import raysweep.encoders
from raysweep.encoders import Encoder, build_encoder, spec_arguments, weights_signature
from raysweep.encoders.checkpoints import load_checkpoint
from raysweep.encoders.families import VARIANTS
from raysweep.errors import EncoderError
from raysweep.experiment.config import EncoderConfig
from raysweep.paths import read_json, signature, write_json

_loading = ThreadPoolExecutor(1, "encoders")  # one after another: building an encoder seeds a generator they share


class EncoderInUse:
    """An encoder of a sweep: described at once, loaded when its weights are needed.

    Args:
        config: its entry in the experiment.
        seed: of random weights.
        cards: folder of the cards.

    Raises:
        EncoderError: the weights cannot be had, or are not what the entry says.
    """

    def __init__(self, config: EncoderConfig, seed: int, cards: Path) -> None:
        self._config, self._seed = config.model_dump(), seed
        self._loaded: Future[Encoder] | None = None
        self.weights = ""
        self.reference: Any = None
        self.precision = ""
        card = cards / f"encoder-{signature(self._identity())}.json"
        if not card.exists():
            write_json(card, {"spec": self.model.spec(), "weights": weights_signature(self.model)})
        content = read_json(card)
        self.description = Encoder(**spec_arguments(content["spec"]))
        self.weights = str(content["weights"])

    def _identity(self) -> list[Any]:
        code = Path(raysweep.encoders.__file__).parent.glob("*.py")
        versions = [version("torch"), version("transformers")]
        identity = [self._config, self._seed, versions, [path.read_text() for path in sorted(code)]]
        name, pretrained = self._config["pretrained_model_name_or_path"], self._config["use_pretrained"]
        # Random weights of a known variant need no file; of another, its configuration.
        if self._config["type"] == "stacked_cnn" or (not pretrained and name in VARIANTS):
            return identity
        checkpoint = load_checkpoint(name, self._config["revision"], with_weights=pretrained)
        files = sorted(path for path in checkpoint.folder.iterdir() if path.is_file())
        # Of a hub's snapshot, links to files that are named after their content.
        stats = [(path.name, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return [*identity, checkpoint.revision, stats]

    def load_ahead(self) -> None:
        """Begins to load the weights, without waiting for them."""
        if self._loaded is None:
            self._loaded = _loading.submit(build_encoder, self._config, self._seed)

    @cached_property
    def model(self) -> Encoder:
        """The encoder with its weights, on the CPU, in evaluation mode."""
        self.load_ahead()
        assert self._loaded is not None
        encoder = self._loaded.result()
        if self.weights and weights_signature(encoder) != self.weights:
            raise EncoderError(
                f"{self._config['type']}: its weights have changed since the sweep began; start it again"
            )
        return encoder

    def put(self) -> Any:
        """Reference to the weights in Ray's object store, shared by all studies of the encoder."""
        import ray

        if self.reference is None:
            self.reference = ray.put({name: t.numpy() for name, t in self.model.state_dict().items()})
        return self.reference
