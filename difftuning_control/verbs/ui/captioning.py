"""Captions that a local image-to-text model proposes: drafts, which become captions when a person saves them.

A draft lies in the page's own folder and nowhere else, so that training never sees one that nobody has read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from difftuning_control.data.images import decode_image
from difftuning_control.errors import UserError
from difftuning_control.families.hub import best_device, quiet_loading
from difftuning_control.system.durable import write_json
from difftuning_control.system.untrusted import BYTES_PER_PIXEL, MAX_PIXELS, from_json, is_text, read_file, read_text
from difftuning_control.verbs.ui.captions import MOST
from difftuning_control.verbs.ui.importing import import_models
from difftuning_control.verbs.ui.places import Places

if TYPE_CHECKING:
    from PIL import Image

DRAFTS = "drafts.json"
ASKED = "Describe this picture in one short sentence."  # of a model that is told what to do
LONGEST = 48  # tokens of a draft


class Captioner:
    """A model of transformers that says what a picture shows.

    Args:
        folder: with its weights, of safetensors alone; nothing is downloaded.

    Raises:
        UserError: if there is no such model in it.
    """

    def __init__(self, folder: str | Path):
        import_models()
        from transformers import AutoModelForImageTextToText, AutoProcessor  # saves it until a draft is asked for

        place = Path(folder).expanduser()
        if not (place / "config.json").is_file():
            raise UserError(
                f"{folder} holds no model (no config.json); name the folder of a captioning model of transformers, "
                "such as a download of Salesforce/blip-image-captioning-base."
            )
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            with quiet_loading():
                self.processor = AutoProcessor.from_pretrained(place, **local)
                model = AutoModelForImageTextToText.from_pretrained(place, use_safetensors=True, **local)
        except Exception as error:
            reason = " ".join(str(error).split())[:200].rstrip(". ") or type(error).__name__
            raise UserError(
                f"the captioning model {folder} cannot be loaded ({reason}); name a folder with an image-to-text model "
                "of transformers, its processor and safetensors weights."
            ) from None
        self.model = model.eval().to(best_device())

    def caption(self, picture: Image.Image) -> str:
        """What a picture shows, in the model's words; the same every time."""
        import torch  # as above

        given: dict[str, Any] = {"images": picture}
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": ASKED}]
            said = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            given = {"images": [picture], "text": [said]}
        inputs = self.processor(**given, return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        if "text" in given:  # what was asked is part of the answer
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        text = self.processor.batch_decode(tokens, skip_special_tokens=True)[0]
        return " ".join(text.split())[:MOST]


def draft_captions(
    places: Places,
    folder: str,
    names: Sequence[str],
    captioner: Captioner,
    advance: Callable[[int], object] = lambda count: None,
) -> dict[str, str]:
    """Draft a caption for each of these pictures of a folder, and keep the drafts; returns them by name.

    Raises:
        UserError: naming the first picture that cannot be read; what was drafted before it is kept.
    """
    real, drafts = places.writable(folder), dict[str, str]()
    for name in names:
        try:
            picture = decode_image(read_file(places.readable(real / name), MAX_PIXELS * BYTES_PER_PIXEL))
        except UserError as error:
            raise UserError(f"{name} {error}") from None
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror}).") from None
        text = captioner.caption(picture)
        if text and is_text(text):
            drafts[name] = text
            _keep(places, real, {name: text})
        advance(1)
    return drafts


def drafts_of(places: Places, folder: Path) -> dict[str, str]:
    """The drafts of a folder that no one has seen yet, by picture."""
    try:
        drafts = from_json(read_text(places.state / DRAFTS)).get(str(folder), {})
        return {str(name): str(text) for name, text in drafts.items()}
    except (OSError, ValueError, AttributeError):  # there are none, or somebody wrote something else there
        return {}


def forget_draft(places: Places, folder: Path, name: str) -> None:
    """A person has seen the picture's caption: what was drafted for it goes."""
    if name in drafts_of(places, folder):
        _keep(places, folder, {name: None})


def _keep(places: Places, folder: Path, changed: Mapping[str, str | None]) -> None:
    """Write drafts, or take those away that are None."""
    places.state.mkdir(exist_ok=True)
    path = places.state / DRAFTS
    with FileLock(places.state / ".drafts.lock"):
        try:
            known = from_json(read_text(path))
        except (OSError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        own = {**known.get(str(folder), {}), **changed}
        write_json(path, known | {str(folder): {name: text for name, text in own.items() if text is not None}})
