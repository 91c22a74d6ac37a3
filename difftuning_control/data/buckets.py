"""Aspect-ratio buckets: pictures of like shape are framed and trained on together, so that little is cropped away.

A picture and its condition are framed by one `Framing`, and the family is told of the same frame, so that all of them
agree. An optimizer step's target rows are of one bucket. Bank rows keep the shape that the bank was drawn in, and where
it is another one they take a forward of their own; the loss is the mean over the rows of each role, as without buckets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from difftuning_control.data.batches import BatchSource, TargetSet, TrainingRows
from difftuning_control.data.examples import ImageData
from difftuning_control.data.framing import Framing
from difftuning_control.errors import UserError
from difftuning_control.system.seeds import shuffled

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.inputs import DataConfig

BUCKET = 2  # the stream of random orders, beside those of `batches`
TOLD = 8  # buckets that a line names
Shape = tuple[int, int]  # height and width in pixels


def bucket_shapes(resolution: int, step: int, aspect: float) -> list[Shape]:
    """The square, and of every width the largest height with at most its area; sides are multiples of `step`, and none
    is longer than `aspect` times the other."""
    sides = range(step, int(resolution * aspect**0.5) // step * step + step, step)
    shapes = {(resolution, resolution)}
    for side in sides:
        other = resolution * resolution // side // step * step
        if other >= step and max(side, other) <= aspect * min(side, other):
            shapes |= {(side, other), (other, side)}
    return sorted(shapes)


def kept(size: tuple[int, int], shape: Shape) -> float:
    """The share of a picture of (width, height) that is left once it covers a frame and is cropped to it."""
    scale = max(shape[0] / size[1], shape[1] / size[0])
    return shape[0] * shape[1] / (scale * size[0] * scale * size[1])


@dataclass(frozen=True)
class Bucket:
    """Pictures of one frame."""

    framing: Framing
    data: ImageData

    @property
    def shape(self) -> Shape:
        return self.framing.height, self.framing.width


def into_buckets(family: Family, config: DataConfig, data: ImageData, framing: Framing) -> list[Bucket]:
    """Each picture in the bucket that crops least of it, the fullest bucket first.

    A picture that is smaller than its bucket is enlarged, as it is without buckets.

    Args:
        framing: of the square; the other frames have about its area.

    Raises:
        UserError: if the family draws at one shape only, or takes no sides of this step.
    """
    if not config.buckets:
        return [Bucket(framing, data)]
    unit, resolution = family.resolution_step, framing.resolution
    step = config.bucket_step or max(unit, resolution // 16 // unit * unit)
    if step % unit:
        raise UserError(f"data.bucket_step is {step}; this model takes sides that are multiples of {unit}.")
    shapes = bucket_shapes(resolution, step, config.bucket_aspect)
    for side in sorted({side for shape in shapes for side in shape}):
        family.check_resolution(side, "a side of data.buckets")
    chosen: dict[Shape, list[int]] = {}
    for number, example in enumerate(data.examples):
        best = max(shapes, key=lambda shape: (round(kept(example.size, shape), 9), shape[0] * shape[1], shape))
        chosen.setdefault(best, []).append(number)
    buckets = [
        Bucket(
            replace(framing, shape=None if shape == (resolution, resolution) else shape),
            ImageData(data.source, [data.examples[i] for i in numbers]),
        )
        for shape, numbers in chosen.items()
    ]
    return sorted(buckets, key=lambda bucket: (-len(bucket.data), bucket.shape))


def describe(buckets: list[Bucket]) -> dict[str, Any]:
    """How many pictures each bucket has, as height×width, and the mean share of a picture that is cropped away."""
    shares = [1 - kept(e.size, bucket.shape) for bucket in buckets for e in bucket.data.examples]
    counts = {f"{height}×{width}": len(b.data) for b in buckets for height, width in [b.shape]}
    return {"pictures": counts, "cropped": sum(shares) / len(shares)}


def bucket_line(described: dict[str, Any]) -> str:
    """A line of what `describe` gives, of the fullest buckets."""
    counts = [f"{count} of {shape}" for shape, count in described["pictures"].items()]
    more = f" and {len(counts) - TOLD} more" if len(counts) > TOLD else ""
    return (
        f"pictures in {len(counts)} frames (height×width): {', '.join(counts[:TOLD])}{more}; on average "
        f"{described['cropped']:.0%} of a picture is cropped away"
    )


@dataclass
class BucketSource:
    """Batches like those of `BatchSource`, each optimizer step's target rows from one bucket.

    Steps are dealt out as evenly as can be: after any number of them each bucket has had its share, by its pictures, to
    within about two steps. Within a bucket every picture comes once before any comes again, and a step that reaches the
    end of the order goes on in the next one, so nothing is left out and no batch is short. A bucket with fewer pictures
    than the step has rows has some of them several times in its steps, which are so much rarer.

    Args:
        plain: with the settings, the bank and the embeddings; its own targets are not used.
    """

    plain: BatchSource
    buckets: list[TargetSet]
    _order: list[tuple[int, int]] = field(default_factory=list)
    _taken: list[int] = field(default_factory=list)

    def rows(self, step: int, forward: int = 0) -> TrainingRows:
        """The rows of this process in one of the forwards of optimizer step `step`."""
        number, turn = self.turn(step)
        source = replace(self.plain, targets=self.buckets[number])
        targets, _ = source.counts
        order = shuffled(source.seed, BUCKET + number, turn * targets, targets, len(source.targets))
        return replace(source, items=dict(enumerate(order))).rows(step, forward)

    def turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps it has had before."""
        taken = self._taken = self._taken or [0] * len(self.buckets)
        total = sum(map(len, self.buckets))
        while len(self._order) <= step:
            due = [len(b) * (len(self._order) + 1) - total * n for b, n in zip(self.buckets, taken)]
            number = due.index(max(due))
            self._order.append((number, taken[number]))
            taken[number] += 1
        return self._order[step]
