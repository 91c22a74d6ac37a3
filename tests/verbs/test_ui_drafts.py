"""Captions that a local model drafts: never a caption before a person has saved it, from safetensors alone, offline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from difftuning_control.errors import UserError
from difftuning_control.verbs.ui.captioning import DRAFTS, Captioner, draft_captions, drafts_of, forget_draft
from difftuning_control.verbs.ui.captions import caption_of
from difftuning_control.verbs.ui.importing import import_models
from difftuning_control.verbs.ui.pictures_view import gallery, one_picture, pictures_of
from difftuning_control.verbs.ui.places import Places

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "blue", "<script>", "cat", "##s")


def tiny_captioner(folder: Path) -> Path:
    """A BLIP model of some thousand random weights, with its processor."""
    import_models()  # which a page's thread of an earlier test may be doing
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**size, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "max_position_embeddings": 64, **special}
    config = BlipConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16}, projection_dim=8)
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def places(tmp_path: Path) -> Places:
    folder = tmp_path / "mine" / "photos"
    folder.mkdir(parents=True)
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (40, 32), colour).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("mine\n")
    return Places.of(tmp_path / "mine")


class Says:
    """A captioner that says one thing of every picture."""

    def __init__(self, text: str):
        self.text = text

    def caption(self, picture: Image.Image) -> str:
        return self.text


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    return tiny_captioner(tmp_path_factory.mktemp("models") / "blip")


def test_a_local_model_says_the_same_of_the_same_picture_every_time(blip):
    captioner = Captioner(blip)
    said = [captioner.caption(Image.new("RGB", (40, 32), colour)) for colour in ("red", "red")]
    assert said[0] == said[1]
    assert all(word in "".join(WORDS) for word in said[0].split())


def test_a_draft_is_no_caption_until_somebody_saves_it(places):
    folder, done = places.folder / "photos", []
    made = draft_captions(places, "photos", ["b.png", "c.png"], Says("<b>a cat"), done.append)
    assert made == {"b.png": "<b>a cat", "c.png": "<b>a cat"}
    assert sum(done) == 2
    assert [p.name for p in folder.iterdir() if p.suffix == ".txt"] == ["a.txt"]
    assert caption_of(folder, "b.png") is None
    found = {p.name: p for p in pictures_of(places, "photos", 32)}
    assert [found[n].draft for n in ("a.png", "b.png", "c.png")] == [None, "<b>a cat", "<b>a cat"]
    assert "has no caption" in found["b.png"].problems[0]  # as training says
    page = gallery(places, "photos", list(found.values()), 0, None)
    assert "2 without a caption (2 drafted)" in page
    assert page.count(">draft<") == 2
    assert "&lt;b&gt;a cat" in page
    assert "It becomes the caption when you save it." in one_picture(places, "photos", found["b.png"])
    forget_draft(places, folder, "b.png")
    assert drafts_of(places, folder) == {"c.png": "<b>a cat"}


def test_drafts_that_somebody_spoilt_are_none(places):
    places.state.mkdir()
    (places.state / DRAFTS).write_text("[1]")
    assert drafts_of(places, places.folder / "photos") == {}
    draft_captions(places, "photos", ["b.png"], Says("a cat"))
    assert drafts_of(places, places.folder / "photos") == {"b.png": "a cat"}


def test_a_draft_is_made_of_pictures_of_the_folder_alone(places, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png")
    for folder, name in (("photos", "../../out.png"), ("/etc", "x.png"), ("embedded/icons", "x.png")):
        with pytest.raises(UserError):
            draft_captions(places, folder, [name], Says("a cat"))
    (places.folder / "photos" / "b.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"b.png is not a picture"):
        draft_captions(places, "photos", ["b.png"], Says("a cat"))


def test_a_folder_without_a_captioning_model_is_named(tmp_path, blip):
    with pytest.raises(UserError, match="holds no model"):
        Captioner(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="cannot be loaded"):
        Captioner(tmp_path)
    pickled = Path(shutil.copytree(blip, tmp_path / "blip"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        Captioner(pickled)
