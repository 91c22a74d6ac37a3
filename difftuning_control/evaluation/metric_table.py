"""The table of metrics: of each its name, which way is better, how it is printed, and what it means.

Reports, comparisons, gates, evaluations and charts read it; a new metric is one row here, its figure in `figures` or
`condition_figures`, and its texts (`metric.<name>`, `explain.<name>`) in the language files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["lower", "higher", "neutral"]


@dataclass(frozen=True)
class Metric:
    """A figure of a model, or of its pictures.

    Args:
        name: its key in records.
        better: which way is better; neutral where neither is in itself.
        form: how a report prints it.
        meaning: what it is, in a line.
        cell: how the table of an evaluation prints it, after `scale`; it is not in that table when None.
        most: whether a gate on it is an upper limit; by its direction when None.
    """

    name: str
    better: Direction
    form: str
    meaning: str
    cell: str | None = None
    scale: float = 1.0
    most: bool | None = None

    @property
    def is_share(self) -> bool:
        return self.form.endswith("%}")

    @property
    def heading(self) -> str:
        """Of its column in the table of an evaluation."""
        return self.name if self.scale == 1 else f"{self.name} ×{self.scale:g}"

    def as_cell(self, value: float) -> str:
        assert self.cell is not None
        return self.cell.format(self.scale * value)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("kid", "lower", "{:.4f}", "kernel distance to held-out pictures", "{:.1f}", 1000),
        Metric("fid", "lower", "{:.1f}", "Fréchet distance to held-out pictures", "{:.1f}"),
        Metric("domain_hit", "higher", "{:.1%}", "share of pictures that a judge takes for the new domain", "{:.0%}"),
        Metric("domain_judge", "neutral", "{:.1%}", "accuracy of that judge on real pictures"),
        Metric("pair_similarity", "higher", "{:.3f}", "cosine to the true picture of the same caption", "{:.3f}"),
        Metric("memorisation", "neutral", "{:.3f}", "cosine to the nearest training picture", "{:.3f}", most=True),
        Metric("density", "higher", "{:.2f}", "how deep pictures lie among real ones"),
        Metric("coverage", "higher", "{:.2f}", "share of real pictures that have a drawn one near", "{:.2f}"),
        Metric("diversity", "higher", "{:.3f}", "1 − cosine between pictures of one prompt", "{:.3f}"),
        Metric("clip_score", "higher", "{:.1f}", "agreement of a picture with its prompt", "{:.1f}"),
        Metric("target_loss", "lower", "{:.4f}", "loss on held-out target pictures"),
        Metric("bank_loss", "lower", "{:.4f}", "loss on held-out bank samples"),
        Metric("retention_loss", "lower", "{:+.1%}", "rise of the loss on held-out bank samples"),
        Metric("outside_kid", "lower", "{:.4f}", "kernel distance to the pretrained model's pictures of other prompts"),
        Metric("still_drawn", "higher", "{:.1%}", "share of pictures of other prompts that are recognised as before"),
        Metric("pictures", "neutral", "{:.0f}", "number of pictures drawn"),
        Metric("f1", "higher", "{:.3f}", "agreement of edges with the condition", "{:.3f}"),
        Metric("ssim", "higher", "{:.3f}", "structural similarity to the condition", "{:.3f}"),
        Metric("rmse", "lower", "{:.3f}", "root mean square difference from the condition", "{:.3f}"),
        Metric("cosine", "higher", "{:.3f}", "cosine between surface directions and the condition's", "{:.3f}"),
        Metric("miou", "higher", "{:.3f}", "overlap of segments with the condition's", "{:.3f}"),
    )
}


def lower_is_better(name: str) -> bool:
    """Whether less of a metric is better.

    Raises:
        KeyError: if there is no such metric.
    """
    return METRICS[name].better == "lower"


def is_upper_limit(name: str) -> bool:
    """Whether a gate on a metric asks for at most its limit, not at least."""
    metric = METRICS[name]
    return metric.better == "lower" if metric.most is None else metric.most
