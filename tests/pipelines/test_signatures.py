"""The drop-ins are called as the stock classes are: every public method has the stock signature."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch

from difftuning_control import pipelines
from difftuning_control.pipelines.registry import DROP_INS
from support.marks import need_pipeline
from support.pipeline_samples import EVERY, add_adapter, drop_in, stock


@pytest.mark.parametrize("row", DROP_INS, ids=lambda row: row.name)
def test_fault_15_13_every_public_method_has_the_stock_signature(row):
    need_pipeline(row.stock)
    ours, theirs = getattr(pipelines, row.name), getattr(diffusers, row.stock)
    overridden = [
        name
        for name in dir(theirs)
        if (not name.startswith("_") or name == "__call__")
        and inspect.getattr_static(ours, name) is not inspect.getattr_static(theirs, name)
        and callable(getattr(theirs, name))
    ]
    assert {"__call__", "save_pretrained", "from_pipe", "to"} <= set(overridden)
    for name in overridden:
        found, expected = (inspect.signature(getattr(one, name)) for one in (ours, theirs))
        if name == "__call__" and "ControlNet" in row.stock:
            added = [p for n, p in found.parameters.items() if n not in expected.parameters]
            assert [(p.name, p.kind, p.default) for p in added] == [
                ("preprocess", inspect.Parameter.KEYWORD_ONLY, False)
            ]
            found = found.replace(parameters=[p for p in found.parameters.values() if p.name != "preprocess"])
        assert found == expected, name


@pytest.mark.sample("sd")
@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind != "dit"])
def test_fault_15_13_encode_prompt_gives_what_the_stock_class_gives(kind):
    """By place and by name; with a tuned text encoder too, outside of a call."""
    theirs, ours = stock(kind), drop_in(kind, domain_guidance=True)
    for pipe in (theirs, ours):
        add_adapter(pipe.text_encoder, "tuned", 1, ["q_proj", "v_proj"])
    several = {"sd": 1, "xl": 2, "sd3": 3, "flux": 2}[kind.removesuffix("-control")]
    more = {"max_sequence_length": 16} if several == 3 or kind.startswith("flux") else {}
    with torch.no_grad():
        by_place = [
            pipe.encode_prompt(*["red 1"] * several, device="cpu", **more)
            if several > 1
            else pipe.encode_prompt("red 1", "cpu", 1, True)
            for pipe in (theirs, ours)
        ]
    assert len(by_place[0]) == len(by_place[1])
    for one, other in zip(*by_place):
        assert (one is None and other is None) or torch.equal(one, other)
