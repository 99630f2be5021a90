"""What every encoder has: a specification that JSON can hold, and a module that computes features."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import nn

from raysweep.encoders.families import FAMILIES
from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import EncoderError, did_you_mean

MAX_FEATURES = 1_000_000  # of one part


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the weights of an encoder come from; random weights have neither a name nor a revision.

    Attributes:
        name: Hub id, folder or bucket, as the user wrote it.
        revision: Commit of the hub repository; None for weights that did not come from the hub.
    """

    name: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """Everything about an encoder except its weights.

    It is sent to other processes, and it is written into exported models and encoder cards.

    Attributes:
        type: The type that the experiment names, a key of `families.FAMILIES`.
        family: The family that the encoder belongs to; differs from `type` only for `auto`.
        config: The architecture, as the family's config class (or StackedCNN) takes it.
        preprocessing: The steps from a decoded image to `pixel_values`.
        parts: Name of each pooled output to its num_features. Parts are computed and cached.
        sources: Name of each feature source to the parts that it concatenates. The first is the default.
        origin: Where the weights come from.
    """

    type: str
    family: str
    config: Mapping[str, Any]
    preprocessing: Preprocessing
    parts: Mapping[str, int]
    sources: Mapping[str, tuple[str, ...]]
    origin: Origin

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict that JSON can hold. The signatures of caches depend on its keys and values."""
        return {
            "type": self.type,
            "family": self.family,
            "config": dict(self.config),
            "preprocessing": self.preprocessing.to_dict(),
            "parts": dict(self.parts),
            "sources": {source: list(parts) for source, parts in self.sources.items()},
            "origin": asdict(self.origin),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuilds a spec from the result of `to_dict`, also after it was written as JSON and read back.

        Raises:
            KeyError: a key is missing.
            TypeError: a value has the wrong type, or an inner key is missing or unknown.
        """
        spec = cls(
            type=values["type"],
            family=values["family"],
            config=dict(values["config"]),
            preprocessing=Preprocessing.from_dict(values["preprocessing"]),
            parts=dict(values["parts"]),
            sources={source: tuple(parts) for source, parts in values["sources"].items()},
            origin=Origin(**values["origin"]),
        )
        spec._check()
        return spec

    def _check(self) -> None:
        if self.family not in FAMILIES or self.type not in FAMILIES:
            raise TypeError(f"type, family: {self.type!r}, {self.family!r}; accepted: {', '.join(FAMILIES)}")
        if not all(type(width) is int and 0 < width <= MAX_FEATURES for width in self.parts.values()):
            raise TypeError(f"parts: {dict(self.parts)}; accepted: whole numbers from 1 to {MAX_FEATURES:,}")
        if not self.sources or not all(parts and set(parts) <= set(self.parts) for parts in self.sources.values()):
            raise TypeError(f"sources: {dict(self.sources)}; accepted: names of parts ({', '.join(self.parts)})")

    def parts_of(self, source: str) -> tuple[str, ...]:
        """Returns the parts that a feature source concatenates, in order.

        Raises:
            EncoderError: the encoder has no such source.
        """
        if source not in self.sources:
            hint = did_you_mean(source, self.sources)
            raise EncoderError(f"features: '{source}' is not a feature source of {self.type}; {hint}")
        return self.sources[source]

    def num_features(self, source: str) -> int:
        """Returns the number of features of a source.

        Raises:
            EncoderError: the encoder has no such source.
        """
        return sum(self.parts[part] for part in self.parts_of(source))

    @property
    def widest(self) -> int:
        """The number of features of the source that has most."""
        return max(self.num_features(source) for source in self.sources)

    @property
    def default_source(self) -> str:
        """The feature source that is used when none is named: the first."""
        return next(iter(self.sources))


class Encoder(nn.Module):
    """An image encoder with one or more pooled outputs, called parts.

    Attributes:
        spec: Everything about the encoder except its weights.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps float `(batch, 3, height, width)` to one tensor `(batch, num_features)` for each part."""
        raise NotImplementedError

    @property
    def preprocessing(self) -> Preprocessing:
        """The steps from a decoded image to `pixel_values`."""
        return self.spec.preprocessing

    @property
    def parts(self) -> Mapping[str, int]:
        """Name of each pooled output to its num_features."""
        return self.spec.parts

    @property
    def sources(self) -> Mapping[str, tuple[str, ...]]:
        """Name of each feature source to the parts that it concatenates."""
        return self.spec.sources

    def num_features(self, source: str) -> int:
        """Returns the number of features of a source.

        Raises:
            EncoderError: the encoder has no such source.
        """
        return self.spec.num_features(source)

    def select(self, outputs: Mapping[str, torch.Tensor], source: str) -> torch.Tensor:
        """Concatenates the parts of a feature source to `(batch, num_features(source))`.

        Raises:
            EncoderError: the encoder has no such source.
        """
        return torch.cat([outputs[part] for part in self.spec.parts_of(source)], dim=-1)

    def blocks(self) -> list[list[nn.Parameter]]:
        """Groups the parameters from the input stem to the last block, for layer-wise learning rates.

        Each parameter is in exactly one group. The blocks are the members of the largest ModuleList. Parameters that
        are registered before it belong to the stem. Those that are registered after it (final norm, pooler) belong to
        the last block.
        """
        sizes = {
            name: sum(parameter.numel() for parameter in module.parameters())
            for name, module in self.named_modules()
            if isinstance(module, nn.ModuleList)
        }
        # named_modules is pre-order and max takes the first: of a list that only contains another list, the outer wins.
        trunk = max(sizes, key=lambda name: sizes[name], default="")
        stem: list[nn.Parameter] = []
        blocks: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if trunk and name.startswith(f"{trunk}."):
                blocks.setdefault(name[len(trunk) + 1 :].split(".")[0], []).append(parameter)
            else:
                (list(blocks.values())[-1] if blocks else stem).append(parameter)
        return [group for group in (stem, *blocks.values()) if group]

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """Whether the backward pass can compute activations again, so that they need not be kept in memory."""
        return False

    def enable_gradient_checkpointing(self) -> None:
        """Turns gradient checkpointing on; call it only where it is supported."""
        raise NotImplementedError


def weights_signature(encoder: nn.Module) -> str:
    """Returns the SHA-256, in hex, of the names, dtypes, shapes and bytes in the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # Viewed as uint8, because numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws CPU random numbers from `seed` inside the block, and restores the global random state after it.

    It does not call `torch.manual_seed`, which would also reseed every GPU: the states of the GPUs are not restored.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
