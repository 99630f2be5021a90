"""Encoders: image batch in, features out. Torch and transformers only; transformers is imported when one is built."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import EncoderError, did_you_mean


class Encoder(nn.Module):
    """An image encoder with one or more pooled outputs, its parts.

    Attributes:
        encoder_type: What the experiment asked for, one of `ENCODERS`.
        family: What it turned out to be; differs from `encoder_type` for `auto` only.
        config: The architecture, as the family's config class (or StackedCNN) takes it.
        preprocessing: From a decoded image to `pixel_values`.
        parts: Output name to num_features; these are what is computed and cached.
        sources: Feature source to the parts that it concatenates; the first is the default.
        origin: `name` and `revision` of the weights; both None where they are random.
    """

    def __init__(
        self,
        *,
        encoder_type: str,
        family: str,
        config: Mapping[str, Any],
        preprocessing: Preprocessing,
        parts: Mapping[str, int],
        sources: Mapping[str, tuple[str, ...]],
        origin: Mapping[str, str | None],
    ) -> None:
        super().__init__()
        self.encoder_type, self.family, self.config = encoder_type, family, dict(config)
        self.preprocessing, self.origin = preprocessing, dict(origin)
        self.parts, self.sources = dict(parts), dict(sources)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps float (batch, 3, height, width) to one (batch, num_features) for each of `parts`."""
        raise NotImplementedError

    def num_features(self, source: str) -> int:
        """Returns the width of a feature source.

        Raises:
            EncoderError: the encoder has no such source.
        """
        return sum(self.parts[part] for part in self._parts_of(source))

    def select(self, outputs: Mapping[str, torch.Tensor], source: str) -> torch.Tensor:
        """Concatenates the parts of a feature source: (batch, num_features(source)).

        Raises:
            EncoderError: the encoder has no such source.
        """
        return torch.cat([outputs[part] for part in self._parts_of(source)], dim=-1)

    def blocks(self) -> list[list[nn.Parameter]]:
        """Groups every parameter once, from the input stem to the last block, for layer-wise learning rates.

        The blocks are the members of the largest ModuleList; what is registered before it joins the stem, what
        comes after (final norm, pooler) joins the last block.
        """
        sizes = {
            name: sum(parameter.numel() for parameter in module.parameters())
            for name, module in self.named_modules()
            if isinstance(module, nn.ModuleList)
        }
        # named_modules is pre-order, so that of a list nested alone in another the outer one wins.
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
        """Whether activations can be computed again in the backward pass rather than kept."""
        return False

    def enable_gradient_checkpointing(self) -> None:
        """Begins to do so; only for encoders that can."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """Returns a JSON-able dict from which `encoder_from_spec` rebuilds the architecture without a network."""
        return {
            "type": self.encoder_type,
            "family": self.family,
            "config": dict(self.config),
            "preprocessing": self.preprocessing.to_dict(),
            "parts": dict(self.parts),
            "sources": {source: list(parts) for source, parts in self.sources.items()},
            "origin": dict(self.origin),
        }

    def _parts_of(self, source: str) -> tuple[str, ...]:
        if source not in self.sources:
            hint = did_you_mean(source, self.sources)
            raise EncoderError(f"features: '{source}' is not a feature source of {self.encoder_type}; {hint}")
        return self.sources[source]


def _build_stacked_cnn(config: Mapping[str, Any], seed: int) -> Encoder:
    from raysweep.encoders import stacked_cnn

    return stacked_cnn.build(config, seed)


def _build_huggingface(config: Mapping[str, Any], seed: int) -> Encoder:
    from raysweep.encoders import huggingface

    return huggingface.build(config, seed)


ENCODERS: dict[str, Callable[[Mapping[str, Any], int], Encoder]] = {
    "stacked_cnn": _build_stacked_cnn,
    "dinov2": _build_huggingface,
    "clip": _build_huggingface,
    "siglip": _build_huggingface,
    "auto": _build_huggingface,
}


def build_encoder(config: Mapping[str, Any], seed: int) -> Encoder:
    """Builds the encoder of an experiment, in evaluation mode, on the CPU, in float32.

    Args:
        config: An encoder block of the experiment, as a dict; absent keys take their defaults.
        seed: Decides random weights, where there are any; the global random state is left as it was.

    Raises:
        EncoderError: the type is unknown, or weights, config or preprocessing cannot be used.
    """
    kind = str(config.get("type"))
    if kind not in ENCODERS:
        raise EncoderError(f"type: '{kind}' is not an encoder; {did_you_mean(kind, ENCODERS)}")
    return ENCODERS[kind](config, seed).eval()


def encoder_from_spec(spec: Mapping[str, Any]) -> Encoder:
    """Rebuilds the architecture that `Encoder.spec` describes; its weights are arbitrary until they are loaded.

    Raises:
        EncoderError: the installed transformers cannot build it.
    """
    if spec["family"] == "stacked_cnn":
        from raysweep.encoders import stacked_cnn

        return stacked_cnn.from_spec(spec).eval()
    from raysweep.encoders import huggingface

    return huggingface.from_spec(spec).eval()


def spec_arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Turns a spec, fresh or read from JSON, into the arguments of `Encoder`."""
    return {
        "encoder_type": spec["type"],
        **{key: spec[key] for key in ("family", "config", "parts", "origin")},
        "preprocessing": Preprocessing.from_dict(spec["preprocessing"]),
        "sources": {source: tuple(parts) for source, parts in spec["sources"].items()},
    }


def weights_signature(encoder: nn.Module) -> str:
    """Returns the SHA-256, in hex, over names, dtypes, shapes and bytes of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # Through uint8, because numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws CPU random numbers from `seed` inside, and leaves the global random state as it was.

    Not `torch.manual_seed`, which also reseeds every GPU, and those states would not be put back.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
