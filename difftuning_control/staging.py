"""Staged sampling: quality against u₀ where the tuned model denoises above u₀ and the pretrained one below, and the
other way round. It shows which stage of the reverse process the new domain needs, and which one it can borrow. Where a
run brought classes of its own, the pretrained model is told the empty class: it knows nothing of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from difftuning_control.data.labels import as_pretrained
from difftuning_control.evaluation.features import Features
from difftuning_control.evaluation.figures import Sampling, figures, reference_of
from difftuning_control.pipelines.guidance import hand_over
from difftuning_control.runs.finished import tuned_model
from difftuning_control.system.terminal import progress

if TYPE_CHECKING:
    from difftuning_control.data.prepare import Materials
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.studies import AnalysisConfig

METRICS = ("kid", "domain_hit", "pair_similarity")


def staged_sampling(
    family: Family,
    features: Features,
    found: Materials,
    config: AnalysisConfig,
    run: str,
    record: dict[str, Any],
) -> dict[str, Any]:
    """{u0, tuned_above: {metric: [...]}, tuned_below: {...}}, every point with the same prompts and seeds.

    Raises:
        UserError: with fewer than 6 held-out pictures.
    """
    reference = reference_of(family, features, found)
    captions = [e.caption for e in found.held_out.sample(config.pictures).examples]
    prompts = [captions[i % len(captions)] for i in range(config.pictures)]
    sampling = Sampling(
        prompts, [config.seed], config.steps, config.guidance_scale, found.resolution, config.batch_size
    )
    result: dict[str, Any] = {"u0": config.u0, "tuned_above": {}, "tuned_below": {}, "pictures": len(prompts)}
    with (
        progress(2 * len(config.u0) * len(prompts), "staged sampling") as advance,
        as_pretrained(family, record),
        tuned_model(family, run, record) as tuned,
    ):
        base = family.denoiser if tuned is not family else None
        for key, above in (("tuned_above", True), ("tuned_below", False)):
            for u0 in config.u0:
                with hand_over(tuned, u0, tuned_above=above, base=base):
                    quality = figures(sampling.draw(tuned, advance), prompts, reference)
                for metric in METRICS:
                    result[key].setdefault(metric, []).append(quality[metric])
    return result
