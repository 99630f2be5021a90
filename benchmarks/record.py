"""`make record`: the time and cost of the whole command, from images to leaderboard, as one row of a Markdown table.

    python -m benchmarks.record --images 1300 --encoder dinov2-small --encoder ../shared/weights/mobilenet_v2

The sweep has no caches. Its time is that of `python -m raysweep.run`, measured from outside, with all imports and
starts. Images are repeated with other bytes to any number; a GPU is used if there is one.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.encoders import CLIP_SMALL, TINY_CLIP
from benchmarks.figures import Options, cpu_model, machine_facts
from benchmarks.images import repeat_images, source_images
from benchmarks.sweeps import DINOV2_SMALL, TINY_DINOV2, Finished, leaderboard, make_experiment, run_sweep
from raysweep.cluster.resources import Resources, local_resources

NUM_IMAGES, NUM_TRIALS = 1_300, 64
# With random weights, because the time does not depend on them.
ENCODERS = {
    "dinov2-small": DINOV2_SMALL,
    "clip-small": CLIP_SMALL,
    "dinov2-base": {"type": "dinov2", "use_pretrained": False},
    "tiny-dinov2": TINY_DINOV2,
    "tiny-clip": TINY_CLIP,
}
DEFAULT_ENCODERS = ("dinov2-small", "clip-small")
PASS_LINE = re.compile(r"encoder pass \(.*\): [\d,]+ images in ([\d.]+) s")
VERSIONS = ("raysweep", "torch", "ray")


@dataclass(frozen=True)
class Record:
    """What one sweep cost.

    Attributes:
        num_images: Images of all splits.
        encoders: Names of the encoders.
        num_trials: Probe trials of all encoders.
        wall_seconds: Time of the whole command.
        pass_seconds: Time of its encoder pass, in which each image was decoded once and encoded by all encoders.
        device: The GPUs, or the CPU.
        num_devices: Number of GPUs, or of CPU cores.
        uses_gpus: Whether the devices are GPUs.
        price_per_hour: Of the whole machine, in any currency; None if it is not known.
        versions: Versions of packages.
    """

    num_images: int
    encoders: tuple[str, ...]
    num_trials: int
    wall_seconds: float
    pass_seconds: float
    device: str
    num_devices: int
    uses_gpus: bool
    price_per_hour: float | None
    versions: Mapping[str, str]

    def columns(self) -> dict[str, str]:
        """Returns the cells of the row, by the heads of their columns."""
        hours = self.wall_seconds / 3600
        cost = f"{self.num_devices * hours:.3f} {'GPU' if self.uses_gpus else 'CPU'}-hours"
        if self.price_per_hour is not None:
            cost += f", {self.price_per_hour * hours:.4f} at {self.price_per_hour:g} an hour"
        return {
            "images": f"{self.num_images:,}",
            "encoders": f"{len(self.encoders)}: {', '.join(self.encoders)}",
            "trials": f"{self.num_trials:,}",
            "whole command": f"{self.wall_seconds:.1f} s",
            "images/s of the pass": f"{self.num_images / self.pass_seconds:.1f}",
            "trials/hour": f"{self.num_trials / hours:,.0f}",
            "cost": cost,
            "device": f"{self.num_devices} x {self.device}",
            "versions": ", ".join(f"{name} {self.versions[name]}" for name in VERSIONS),
        }


def markdown(records: Sequence[Record]) -> str:
    """Returns records as a Markdown table."""
    rows = [list(record.columns().values()) for record in records]
    heads = list(records[0].columns())
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def encoder_block(name: str) -> dict[str, Any]:
    """Returns the encoder block of a name in `ENCODERS`, or of a folder or hub id of any transformers vision model."""
    if name in ENCODERS:
        return ENCODERS[name]
    folder = Path(name).expanduser()
    return {"type": "auto", "pretrained_model_name_or_path": str(folder.resolve()) if folder.is_dir() else name}


def devices(present: Resources) -> tuple[str, int]:
    """Returns the name and the number of what encodes: GPUs if there are any, else CPU cores."""
    if not present.num_gpus:
        return cpu_model(), present.num_cpus
    import torch

    return torch.cuda.get_device_name(0), present.num_gpus


def measure(names: Sequence[str], num_images: int, options: Options, num_trials: int, price: float | None) -> Record:
    """Runs one sweep over `num_images` images in the scratch folder, and returns what it cost.

    Raises:
        RuntimeError: the sweep failed, or not all trials are in its leaderboard.
    """
    repeat_images(source_images(options), options.scratch / "images", num_images)
    blocks = [encoder_block(name) for name in names]
    experiment = make_experiment("record", options.scratch / "images", blocks, num_trials)
    finished = run_sweep(options.scratch / "sweep", experiment)
    probes = [row for row in leaderboard(options.scratch / "sweep", "record") if row["mode"] == "linear_probe"]
    num_done = sum(row["num_trials"] for row in probes)
    if num_done != num_trials * len(names):
        raise RuntimeError(f"{num_done} trials, {num_trials * len(names)} expected:\n{finished.stderr}")
    present = local_resources()
    device, num_devices = devices(present)
    return Record(
        num_images=num_images,
        encoders=tuple(Path(name).name for name in names),
        num_trials=num_done,
        wall_seconds=finished.seconds,
        pass_seconds=pass_seconds(finished),
        device=device,
        num_devices=num_devices,
        uses_gpus=present.num_gpus > 0,
        price_per_hour=price,
        versions=machine_facts()["versions"],
    )


def pass_seconds(finished: Finished) -> float:
    """Returns the seconds in the line about the encoder pass.

    Raises:
        RuntimeError: there is no such line.
    """
    found = PASS_LINE.search(finished.stderr)
    if not found:
        raise RuntimeError(f"no line about the encoder pass:\n{finished.stderr}")
    return float(found[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command: one sweep for each number of images, then the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[NUM_IMAGES], metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--encoder",
        action="append",
        metavar="NAME",
        help=f"one of {', '.join(ENCODERS)}, or a folder or hub id; repeat it for more encoders "
        f"(default: {', '.join(DEFAULT_ENCODERS)})",
    )
    parser.add_argument("--trials", type=int, default=NUM_TRIALS, metavar="N", help="of each encoder: %(default)s")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="class folders of images to repeat")
    parser.add_argument("--price", type=float, metavar="PRICE", help="of this machine for an hour")
    given = parser.parse_args(arguments)
    records = []
    for num_images in given.images:
        with tempfile.TemporaryDirectory(prefix="raysweep-record-", ignore_cleanup_errors=True) as scratch:
            options = Options(quick=False, images=given.folder, scratch=Path(scratch))
            names = given.encoder or list(DEFAULT_ENCODERS)
            records.append(measure(names, num_images, options, given.trials, given.price))
            print(markdown(records[-1:]), flush=True)
    if len(records) > 1:
        print(markdown(records))


if __name__ == "__main__":
    main()
