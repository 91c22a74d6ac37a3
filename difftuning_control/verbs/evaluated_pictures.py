"""The pictures of an evaluation: those that its runs were tuned on, and real ones that they were not."""

from __future__ import annotations

from collections.abc import Callable

from difftuning_control.data.datasets import Choice
from difftuning_control.data.examples import ImageData
from difftuning_control.data.prepare import read_data
from difftuning_control.data.sources import load_images
from difftuning_control.data.splits import FOR_JUDGING
from difftuning_control.errors import UserError
from difftuning_control.evaluation.figures import LEAST_REAL, MOST_REAL, check_held_out
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import Evaluation
from difftuning_control.runs.record import RunRecord

READ_ALIKE = (
    "caption_column",
    "image_column",
    "default_caption",
    "trigger",
    "skip_bad",
    "classes",
    "max_pixels",
)  # settings of a run's data by which other pictures are read too


def judged_pictures(
    request: Evaluation, records: dict[str, RunRecord], recipes: dict[str, Recipe], tell: Callable[[str], object]
) -> tuple[ImageData, ImageData]:
    """The pictures that the runs were tuned on, and real ones that they were not: those given, or those held out; none
    where these are too few and nothing asks for them.

    Raises:
        UserError: if the runs were tuned on different pictures or labels, or too few are left for what must be judged.
    """
    first = request.runs[0]
    recipe = recipes[first]
    training, real = read_data(recipe)
    if request.data is not None:
        read = {name: getattr(recipe.data, name) for name in READ_ALIKE}
        apart = recipe.folders_apart
        real = load_images(request.data, **read, choice=Choice(None, FOR_JUDGING, "a folder"), apart=apart)
    for run, record in records.items():
        masked_alike = recipes[run].data.masking == recipe.data.masking
        own = training if masked_alike else read_data(recipes[run])[0]
        _check_data(run, record, first, own, training, real)
        if recipes[run].tuning.label_space != recipe.tuning.label_space:
            raise UserError(f"{run} was tuned in another label space than {first}; evaluate them apart.")
    for line in real.notes:
        tell(line)
    if len(real) < LEAST_REAL and request.data is None and not any(_needs_pictures(r) for r in recipes.values()):
        tell(
            f"note: too few pictures were held out to judge the new style by ({len(real)}, {LEAST_REAL} are needed); "
            "only what is drawn for other prompts and what was forgotten is judged; name others with --data."
        )
        return training, real.sample(0)
    check_held_out(real)
    return training, real.sample(MOST_REAL)


def _needs_pictures(recipe: Recipe) -> bool:
    """Whether a run cannot be judged without held-out pictures: of their conditions, or by its gates."""
    return recipe.method == "controlnet" or recipe.gates.draws


def _check_data(run: str, record: RunRecord, first: str, own: ImageData, training: ImageData, real: ImageData) -> None:
    """Refuse runs of other pictures than the first one's as they are now, and real pictures that were tuned on.

    Args:
        own, training: the run's pictures and the first one's; their masks may differ.

    Raises:
        UserError: in these cases.
    """
    if (record.fingerprints.data, own.unmasked.fingerprint) != (own.fingerprint, training.unmasked.fingerprint):
        what = "its pictures have changed since" if run == first else f"it was tuned on other pictures than {first}"
        raise UserError(f"{run} cannot be judged here: {what}; evaluate runs of the same unchanged pictures.")
    shared = {e.digest for e in training.examples} & {e.digest for e in real.examples}
    if shared:
        raise UserError(
            f"{len(shared)} of the {len(real)} pictures to judge with were tuned on; give pictures that were not, with "
            "--data."
        )
