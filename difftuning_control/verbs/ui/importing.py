"""The import of diffusers and transformers, which takes ten seconds and is not safe in two threads at once."""

from __future__ import annotations

import threading

_ALONE = threading.Lock()


def import_models() -> None:
    """Import what draws, measures and captions, once; whoever needs it meanwhile waits here."""
    with _ALONE:
        import diffusers  # noqa: F401 these save ten seconds of the page's start
        import transformers  # noqa: F401

        import difftuning_control.evaluation.redrawing
        import difftuning_control.pipelines.domain_guidance
        import difftuning_control.runs.finished
        import difftuning_control.training.price  # noqa: F401
        from difftuning_control.families.loading import family_class

        family_class("embedded")


def begin_importing() -> None:
    """The same in the background, so that the first picture does not wait for it."""
    threading.Thread(target=import_models, daemon=True).start()
