"""The halves of a pilot's held-out pictures, for the search and for the figures, whether captions are names or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from difftuning_control.data.examples import Example, ImageData
from difftuning_control.evaluation.figures import Sampling
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.verbs.pilot import judge
from difftuning_control.verbs.pilot.judge import Judge, halves_of

CONFIG = PilotConfig(sides=["plain", "prior"], pictures=6)


def held_out(*captions: str) -> ImageData:
    examples = [Example(f"{i}.png", caption, f"digest {i}", Image.new, None) for i, caption in enumerate(captions)]
    return ImageData("mine", examples)


def names(examples: list[Example]) -> list[str]:
    return [example.name for example in examples]


def test_captions_that_are_names_lie_in_one_half_each_in_turn():
    search, final = halves_of(CONFIG, held_out("a", "b", "c", "d", "e"))
    assert names(search) == ["0.png", "2.png", "4.png"] * 2
    assert names(final) == ["1.png", "3.png"] * 3


def test_a_caption_of_several_pictures_is_as_often_as_they_are_and_in_one_half():
    search, final = halves_of(CONFIG, held_out("a", "b", "a", "b", "a", "b"))
    assert names(search) == ["0.png", "2.png", "4.png"] * 2
    assert names(final) == ["1.png", "3.png", "5.png"] * 2


@pytest.mark.parametrize("odd", [[], ["zbx red"]])
def test_pictures_of_one_caption_are_shared_between_the_halves(odd):
    search, final = halves_of(CONFIG, held_out(*["zbx"] * 7, *odd))
    assert not set(names(search)) & set(names(final))
    assert {"zbx"} <= {e.caption for e in search} & {e.caption for e in final}


def test_one_picture_is_all_there_is():
    search, final = halves_of(CONFIG, held_out("zbx"))
    assert names(search) == names(final) == ["0.png"] * 6


@pytest.mark.parametrize(("prompts", "apart"), [(["b"], False), (["a"], True)])
def test_the_same_prompt_is_drawn_from_other_noise_for_the_search(monkeypatch, prompts, apart):
    seeds: list[int] = []
    monkeypatch.setattr(judge, "drawn", lambda family, sampling, seed, guidance: seeds.append(seed) or [])
    monkeypatch.setattr(judge, "figures", lambda pictures, prompts, reference: {})
    both = Judge(None, Sampling(["a"]), Sampling(["a"]))
    for final in (False, True):
        replace(both, final=Sampling(prompts)).figures(None, 3, final)
    assert (seeds[0] != seeds[1], seeds[1]) == (apart, 3)
