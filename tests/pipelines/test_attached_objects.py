"""What users do to the objects: copies, pickles, moves, threads, and sources that do not fit."""

from __future__ import annotations

import copy
import pickle
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils.source_code_parsing_utils import ReturnNameVisitor

from difftuning_control import DiffTuningPipeline, add_control, attach
from difftuning_control.errors import UserError
from difftuning_control.pipelines.hooks import SamplingHook, hooked
from difftuning_control.pipelines.settings import attachment_of
from support.other_tasks import inputs, made
from support.pipeline_samples import OURS, add_adapter, controlnet, draw, drop_in, source_unet, stock

NAME = "StableDiffusionImg2ImgPipeline"


def picture(pipe: Any, **given: Any) -> np.ndarray:
    return pipe(**inputs(NAME, **given)).images


def with_source(**settings: Any) -> Any:
    return attach(made(NAME), domain_guidance=True, source=made(NAME, 3).unet, **settings)


def pickled(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
def test_an_attached_pipeline_comes_back_attached_and_shares_nothing(again):
    pipe = with_source(hand_over=0.5)
    expected = picture(pipe)
    other = again(pipe)
    assert np.array_equal(picture(other), expected)
    assert attachment_of(other) is not attachment_of(pipe)
    for parameter in attachment_of(pipe).source.parameters():
        parameter.data.zero_()
    assert np.array_equal(picture(other), expected)
    assert not np.array_equal(picture(pipe), expected)


def test_a_source_goes_where_the_pipeline_is_moved():
    pipe = with_source()
    assert pipe.to(torch.bfloat16) is pipe
    assert attachment_of(pipe).source.dtype == torch.bfloat16
    assert np.isfinite(picture(pipe)).all()
    source = made(NAME, 3).unet.to(torch.float16)
    attach(pipe, source=source)
    pipe.to(torch.bfloat16)  # moves nothing, and the source is nobody's to move
    assert source.dtype == torch.float16


def test_a_source_in_another_precision_is_told():
    pipe = with_source()
    attachment_of(pipe).source.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"source_unet is in bfloat16 and the UNet in float32; .*\(torch.float32\)"):
        picture(pipe)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.isfinite(picture(pipe)).all()
    ours = drop_in("sd", source_unet=source_unet("sd").to(torch.bfloat16), domain_guidance=True)
    with pytest.raises(UserError, match="source_unet is in bfloat16"):
        draw(ours, "sd")


def test_a_source_on_another_device_is_told():
    pipe = with_source()
    attachment_of(pipe).source.to("meta")
    with pytest.raises(UserError, match="source_unet is on meta and the pipeline computes on cpu; move it"):
        picture(pipe)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda pipe: "runwayml/some-model", "is a str; expected the pretrained UNet, loaded"),
        (lambda pipe: pipe, "is a StableDiffusion.*Pipeline; expected the pretrained UNet"),
        (lambda pipe: pipe.unet, "is the UNet that was tuned; give a second one"),
        (lambda pipe: torch.compile(pipe.unet), "is the UNet that was tuned; give a second one"),
    ],
    ids=["path", "pipeline", "itself", "compiled itself"],
)
def test_what_is_no_source_is_refused(source, message):
    pipe = made(NAME)
    with pytest.raises(UserError, match=f"source_unet {message}"):
        attach(pipe, domain_guidance=True, source=source(pipe))
    assert attachment_of(pipe) is None
    plain = stock("sd")
    with pytest.raises(UserError, match=f"source_unet {message}"):
        OURS["sd"](**plain.components, source_unet=source(plain), requires_safety_checker=False)


def test_another_thread_is_told_that_the_denoiser_is_in_use():
    """Its pipeline knows nothing of the settings, and would draw with whatever weights act at the moment."""
    pipe = made(NAME)
    add_adapter(pipe.unet, "tuned", 1, ["to_q", "to_v"])
    attach(pipe, domain_guidance=True)
    expected, plain, told = picture(pipe), stock("sd"), []
    plain.unet = pipe.unet
    ended = Event()

    def other() -> None:
        try:
            draw(plain, "sd")
        except UserError as error:
            told.append(str(error))
        ended.set()

    thread = Thread(target=other)

    def meanwhile(module: Any, given: Any) -> None:
        if thread.ident is None:
            thread.start()
            assert ended.wait(60)

    handle = pipe.unet.conv_out.register_forward_pre_hook(meanwhile)
    found = picture(pipe)
    handle.remove()
    assert len(told) == 1
    assert "another call is sampling with this UNet2DConditionModel" in told[0]
    assert np.array_equal(found, expected)
    assert np.isfinite(draw(plain, "sd")).all()


def test_a_callback_of_the_deprecated_kind_may_draw_with_the_same_denoiser_too():
    pipe = made(NAME)
    add_adapter(pipe.unet, "tuned", 1, ["to_q", "to_v"])
    plain, found = stock("sd"), []
    plain.unet = pipe.unet
    expected = draw(plain, "sd")
    attach(pipe, domain_guidance=True)
    picture(pipe, callback=lambda *step: found.append(draw(plain, "sd")), callback_steps=2)
    assert found
    assert all(np.array_equal(one, expected) for one in found)


def test_diffusers_own_tools_find_the_source_of_a_drop_in():
    ours, theirs = ReturnNameVisitor(), ReturnNameVisitor()
    ours.visit(ours.get_ast_tree(cls=OURS["sd"]))
    theirs.visit(theirs.get_ast_tree(cls=type(stock("sd"))))
    assert ours.return_names == theirs.return_names == ["prompt_embeds", "negative_prompt_embeds"]


# --- other pipelines around its modules -----------------------------------------------------------------------------

LATE = {"kind": "power", "tau": 1.0}


def test_a_drop_in_made_from_an_attached_pipeline_draws_as_it_does():
    pipe = stock("sd")
    add_adapter(pipe.unet, "tuned", 1)
    attach(pipe, unconditional_strength=0.5, hand_over=0.3, adapter_schedule=lambda u: u)
    again = DiffTuningPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again, "sd"), draw(pipe, "sd"))
    assert DiffTuningPipeline.from_pipe(pipe, hand_over=None).extras.hand_over is None
    plain = DiffTuningPipeline.from_pipe(pipe, domain_guidance=False)
    assert (plain.extras.domain_guidance, plain.extras.unconditional_strength) == (False, 0)


def test_a_source_comes_along_from_an_attached_pipeline():
    pipe, source = stock("sd"), source_unet("sd")
    attach(pipe, source=source, domain_guidance=True)
    again = DiffTuningPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert again.source is source
    assert np.array_equal(draw(again, "sd"), draw(pipe, "sd"))


def test_a_control_is_added_to_an_attached_pipeline_with_its_settings():
    pipe = stock("sd")
    add_adapter(pipe.unet, "tuned", 1)
    attach(pipe, domain_guidance=True, hand_over=0.3)
    made = add_control(pipe, controlnet(stock("sd")))
    assert (made.extras.domain_guidance, made.extras.hand_over) == (True, 0.3)
    controlled = stock("sd-control")
    attach(controlled, control_schedule=LATE)
    two = add_control(controlled, controlnet(stock("sd"), 6))
    kept, none = two.extras.control_schedule
    assert (kept.values, none) == ({"kind": "power", "tau": 1.0}, None)
    same = OURS["sd-control"].from_pipe(controlled)
    assert [s.values for s in same.extras.control_schedule] == [{"kind": "power", "tau": 1.0}]


def test_freeu_acts_in_an_attached_source_and_leaves_it_as_it_was():
    """Whenever it was turned on, and without touching a UNet that may be another pipeline's."""
    factors = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}
    before, plain = stock("sd"), stock("sd")
    pipe = attach(stock("sd"), source=before.unet, domain_guidance=True)
    expected = draw(before, "sd")
    for one in (pipe, plain):
        one.enable_freeu(**factors)
    assert np.abs(draw(pipe, "sd") - draw(plain, "sd")).max() < 1e-4
    assert np.array_equal(draw(before, "sd"), expected)
    late = drop_in("sd", plain, domain_guidance=True, source_unet=before.unet)
    assert np.abs(draw(late, "sd") - draw(plain, "sd")).max() < 1e-4


class _Passing(SamplingHook):
    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs)


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_denoiser_is_one_whether_it_is_compiled_or_not(compiled_first):
    plain = torch.nn.Linear(2, 2)
    both = [plain, torch.compile(plain, backend="eager")]
    first, second = reversed(both) if compiled_first else both
    mine = _Passing()
    with hooked(first, mine, "mine"):
        with pytest.raises(UserError, match="another call is sampling with this"), hooked(second, _Passing(), "other"):
            pass
        mine.is_paused = True  # as in a callback
        with hooked(second, _Passing(), "other"):
            assert plain(torch.ones(1, 2)).shape == (1, 2)
    assert not [name for name in vars(plain) if "difftuning" in name]
    with hooked(second, _Passing(), "other"):
        pass
