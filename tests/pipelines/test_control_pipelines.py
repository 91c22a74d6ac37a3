"""ControlNets in the drop-ins: strength over the noise, conditions made as in training, and a control that is added."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionImg2ImgPipeline, T2IAdapter
from PIL import Image

from difftuning_control import add_control
from difftuning_control.data.control_spec import SPEC_FILE, Conditioner, ControlSpec
from difftuning_control.errors import UserError
from difftuning_control.families.hub import in_precision
from support.pipeline_samples import (
    OURS,
    SIDE,
    STEPS,
    add_adapter,
    arguments,
    condition,
    controlnet,
    denoiser_of,
    draw,
    drop_in,
    plain,
    same_traces,
    source_unet,
    stock,
    traces,
)

KINDS = ["sd-control", "xl-control"]
FLOWS = ["sd3-control", "flux-control"]
every = pytest.mark.parametrize("kind", [*KINDS, *FLOWS], indirect=True)
LATE = {"kind": "table", "u": [0, 0.49, 0.5, 1], "strength": [0, 0, 1, 1]}  # structure only, at high noise
SPEC = {"annotator": "canny", "params": {"low_threshold": 20, "high_threshold": 60}, "resolution": SIDE}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def photo(seed: int = 0, size: tuple[int, int] = (40, 28)) -> Image.Image:
    """A picture of two tones with an edge, of another shape than what is drawn."""
    pixels = np.full((size[1], size[0], 3), 30, np.uint8)
    pixels[:, 8 + 5 * seed :] = 220
    return Image.fromarray(pixels)


def spec_of(kind: str) -> dict:
    """SD3's and FLUX's ControlNets read conditions as the autoencoder does."""
    return SPEC | ({"value_range": (-1.0, 1.0)} if kind in FLOWS else {})


def image_of(kind: str, image) -> dict:
    """The argument of the call."""
    return {"control_image" if kind in FLOWS else "image": image}


def loaded_net(kind: str, place: str, **where):
    return OURS[kind].controlnet_class.from_pretrained(place, **where)


def saved_net(kind: str, folder: Path, seed: int = 5, **spec) -> str:
    """A ControlNet on disk as `difftune train` leaves it, its spec beside it."""
    controlnet(stock(plain(kind)), seed).save_pretrained(folder)
    ControlSpec(**(spec_of(kind) | spec)).save(folder)
    return str(folder)


def tensors_of(residuals) -> list[torch.Tensor]:
    """All of what a ControlNet gives."""
    if isinstance(residuals, torch.Tensor):
        return [residuals]
    return [t for part in residuals if part is not None for t in tensors_of(part)]


def residuals(pipe, kind: str, **given) -> tuple[list, list]:
    """What a ControlNet gave in a call, hooks included, and what its forward gives by itself for the same inputs."""
    found = []

    def keep(module, args, kwargs, output):
        found.append((args, kwargs, output))

    handle = pipe.controlnet.register_forward_hook(keep, with_kwargs=True)
    draw(pipe, kind, **given)
    handle.remove()
    alone = stock(kind).controlnet.eval()
    with torch.no_grad():
        answers = [alone(*args, **kwargs) for args, kwargs, _ in found]
    told = [float((args[1] if args else kwargs["timestep"]).reshape(-1)[0]) for args, kwargs, _ in found]
    places = [{"sd3-control": t / 1000, "flux-control": t}.get(kind, (t + 1) / 1000) for t in told]
    return [output for _, _, output in found], list(zip(places, answers))


# --- strength over the noise ----------------------------------------------------------------------------------------


@every
def test_residuals_are_scaled_by_the_strength_of_each_step(kind):
    table = {"kind": "table", "u": [0, 1], "strength": [0.2, 1]}
    pipe = drop_in(kind, control_schedule=table)
    found, alone = residuals(pipe, kind)
    assert len(found) == STEPS
    for scaled, (u, own) in zip(found, alone):
        pairs = list(zip(tensors_of(scaled), tensors_of(own), strict=True))
        assert pairs
        for a, b in pairs:  # u is that of the nearest of a thousand noise levels
            assert (a - (0.2 + 0.8 * u) * b).abs().max() < (2e-3 if kind in FLOWS else 1e-5) * max(1, b.abs().max())
            assert b.abs().max() > 1e-3


@every
def test_a_strength_of_1_is_the_stock_class(kind):
    pipe = drop_in(kind, control_schedule={"kind": "constant", "psi": 1.0})
    assert np.array_equal(draw(pipe, kind), draw(stock(kind), kind))
    assert pipe.control_use[0].run == STEPS


@pytest.mark.sample("sd-control")
@every
def test_where_it_is_0_the_controlnet_does_not_run_and_adds_nothing(kind):
    runs = []
    pipe = drop_in(kind, control_schedule=LATE)
    inside = pipe.controlnet.transformer_blocks[0] if kind in FLOWS else pipe.controlnet.mid_block
    inside.register_forward_hook(lambda *_: runs.append(1))
    found = draw(pipe, kind)
    use = pipe.control_use[0]
    late = 1 if kind in FLOWS else 2  # their levels are shifted to the noisy end
    assert (use.run, use.skipped) == (len(runs), STEPS - len(runs)) == (STEPS - late, late)
    assert use.seconds > 0
    assert use.seconds_saved == pytest.approx(use.seconds / use.run * late)
    # the stock class does the same by an end, but runs the ControlNet at every step
    expected = draw(stock(kind), kind, control_guidance_end=1 - late / STEPS)
    assert np.abs(found - expected).max() < 1e-5


@every
def test_never_running_is_drawing_without_control(kind):
    pipe = drop_in(kind, control_schedule=lambda u: 0)
    without = drop_in(plain(kind))
    given = {n: v for n, v in arguments(kind).items() if n not in image_of(kind, None)}
    # FLUX draws the condition's latents from the same generator first
    same = {"latents": torch.randn(1, 16, 16)} if kind == "flux-control" else {}
    assert np.abs(draw(pipe, kind, **same) - without(**given, **same).images).max() < 1e-5
    assert pipe.control_use[0].seconds_saved is None  # nothing ran that could be measured


@pytest.mark.sample("sd-control-control_guidance_start")
@pytest.mark.parametrize(
    "given",
    [
        {"count": 2},
        {"guess_mode": True},
        {"guess_mode": True, "count": 2},
        {"guidance_scale": 1.0},
        {"controlnet_conditioning_scale": 0.5},
        {"control_guidance_start": 0.25},
    ],
    ids=lambda g: ", ".join(g),
)
def test_it_composes_with_what_the_stock_call_takes(kind, given):
    """A table that is 1 at high noise and 0 below is an end; all else is the stock class's."""
    pipe = drop_in(kind, control_schedule=LATE)
    assert np.abs(draw(pipe, kind, **given) - draw(stock(kind), kind, control_guidance_end=0.5, **given)).max() < 1e-5


@pytest.mark.sample("1-order0-sd-control", "2-order1-flux-control", "1-order2-sd3-control")
@every
@pytest.mark.parametrize("order", [[LATE, None], [None, LATE], [LATE, LATE]])
@pytest.mark.parametrize("count", [1, 2])
def test_several_controlnets_have_a_strength_each(kind, order, count):
    pipe = drop_in(kind, stock(kind, nets=2), control_schedule=order)
    late = 1 if kind in FLOWS else 2
    ends = [1 - late / STEPS if one is LATE else 1.0 for one in order]
    given = {"nets": 2, "count": count}
    expected = draw(stock(kind, nets=2), kind, control_guidance_end=ends, control_guidance_start=[0.0, 0.0], **given)
    assert np.abs(draw(pipe, kind, **given) - expected).max() < 1e-5
    assert [use.skipped for use in pipe.control_use] == [late if one is LATE else 0 for one in order]


@every
def test_all_extras_at_once_leave_nothing_behind(kind):
    pipe = drop_in(kind, stock(kind, nets=2), control_schedule=LATE, domain_guidance=True, hand_over=0.3)
    add_adapter(pipe.denoiser, "tuned", 1)
    modules = [pipe.denoiser, *pipe.nets]
    before = [traces(m) for m in modules]
    assert np.isfinite(draw(pipe, kind, nets=2, count=2)).all()
    assert all(same_traces(b, traces(m)) for b, m in zip(before, modules))
    assert not any(hasattr(m, "_diffusers_hook") for m in modules)


@pytest.mark.wide
def test_a_controlnet_that_is_compiled_is_skipped_as_well():
    torch._dynamo.reset()
    pipe = drop_in("sd-control", control_schedule=LATE)
    expected = draw(pipe, "sd-control")
    pipe.controlnet = torch.compile(pipe.controlnet, backend="eager")
    assert np.abs(draw(pipe, "sd-control") - expected).max() < 1e-5
    assert pipe.control_use[0].skipped == 2


@pytest.mark.wide
def test_several_controlnets_are_compiled_one_by_one():
    torch._dynamo.reset()
    pipe = drop_in("sd-control", stock("sd-control", nets=2), control_schedule=LATE)
    expected, plain = draw(pipe, "sd-control", nets=2), pipe.controlnet
    pipe.controlnet = torch.compile(plain, backend="eager")
    with pytest.raises(UserError, match="the ControlNets were compiled as one"):
        draw(pipe, "sd-control", nets=2)
    pipe.controlnet = plain
    for i, net in enumerate(plain.nets):
        plain.nets[i] = torch.compile(net, backend="eager")
    assert np.abs(draw(pipe, "sd-control", nets=2) - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([LATE, LATE, LATE], "control_schedule has 3 entries; expected one for each of 2 ControlNets"),
        ({"kind": "table", "u": [0, 0.5], "strength": [0, 1]}, "covers u from 0 to 0.5"),
        (0.5, "the schedule is 0.5; expected a power"),
    ],
)
def test_a_schedule_that_does_not_fit_is_told(kind, given, message):
    pipe = drop_in(kind, stock(kind, nets=2))
    with pytest.raises(UserError, match=message):
        pipe.set_extras(control_schedule=given)
    assert pipe.config.control_schedule is None


@pytest.mark.parametrize("given", [(), None, 3, torch.nn.Linear(2, 2), T2IAdapter()], ids=lambda g: type(g).__name__)
def test_what_is_no_controlnet_is_told(kind, given):
    with pytest.raises(UserError, match="expected a ControlNetModel, its folder"):
        add_control(stock(plain(kind)), given)


def test_a_setting_beside_one_that_is_refused_is_not_taken(kind):
    pipe = drop_in(kind)
    with pytest.raises(UserError, match=r"the schedule is 0\.5"):
        pipe.set_extras(hand_over=0.5, control_schedule=0.5)
    assert pipe.extras.hand_over is None
    with pytest.raises(UserError, match="hand_over is 2"):
        pipe.set_extras(hand_over=2, control_schedule=LATE)
    assert pipe.config.control_schedule is None


def test_a_schedule_for_another_number_of_controlnets_is_told(kind):
    pipe = drop_in(kind, control_schedule=LATE)
    pipe.controlnet = stock(kind, nets=2).controlnet
    with pytest.raises(UserError, match="control_schedule was set for 1 ControlNets, and there are 2 now"):
        draw(pipe, kind, nets=2)


# --- conditions as in training --------------------------------------------------------------------------------------


@pytest.mark.sample("sd-control", "flux-control")
@every
def test_a_photo_becomes_the_condition_of_training(tmp_path, kind):
    place = saved_net(kind, tmp_path / "net")
    pipe = drop_in(kind, stock(kind), controlnet=loaded_net(kind, place))
    by_hand = Conditioner(ControlSpec(**spec_of(kind))).prepare(photo())
    assert np.array(by_hand).any()  # something was found
    found = draw(pipe, kind, **image_of(kind, photo()), preprocess=True)
    assert np.array_equal(found, draw(pipe, kind, **image_of(kind, by_hand)))
    assert not np.allclose(found, draw(pipe, kind, **image_of(kind, photo())))


@pytest.mark.sample("None-sd-control")
@every
@pytest.mark.parametrize("missing", [None, [None], []])
def test_a_photo_that_is_missing_is_told(kind, missing):
    pipe = drop_in(kind)
    pipe.set_control_specs(ControlSpec(**spec_of(kind)))
    (argument,) = image_of(kind, missing)
    found = "NoneType" if missing == [None] else "none"
    with pytest.raises(UserError, match=rf"takes PIL pictures; found {found}\. Give {argument}=Image\.open"):
        draw(pipe, kind, **image_of(kind, missing), preprocess=True)


def test_without_a_size_the_pictures_have_that_of_training(tmp_path, kind):
    place = saved_net(kind, tmp_path / "net", resolution=24)
    pipe = drop_in(kind, controlnet=loaded_net(kind, place))
    found = draw(pipe, kind, **image_of(kind, photo()), preprocess=True, height=None, width=None)
    assert found.shape == (1, 24, 24, 3)


@pytest.mark.sample("sd-control", "flux-control")
@every
def test_a_batch_of_photos(tmp_path, kind):
    pipe = drop_in(kind, controlnet=loaded_net(kind, saved_net(kind, tmp_path / "net")))
    photos = [photo(0), photo(1)]
    by_hand = [Conditioner(ControlSpec(**spec_of(kind))).prepare(p) for p in photos]
    found = draw(pipe, kind, count=2, **image_of(kind, photos), preprocess=True)
    assert np.array_equal(found, draw(pipe, kind, count=2, **image_of(kind, by_hand)))


@pytest.mark.sample("sd-control", "flux-control")
@every
def test_several_controlnets_prepare_each_in_its_own_way(tmp_path, kind):
    specs = [SPEC, SPEC | {"annotator": "shuffle", "params": {}}]
    scales = {"controlnet_conditioning_scale": [1.0, 1.0]}
    places = [saved_net(kind, tmp_path / str(i), 5 + i, **spec) for i, spec in enumerate(specs)]
    nets = [loaded_net(kind, p) for p in places]
    pipe = drop_in(kind, controlnet=nets)
    assert [pipe.control_spec(i).annotator for i in range(2)] == ["canny", "shuffle"]
    ready = condition(3)
    by_hand = [Conditioner(ControlSpec(**spec_of(kind))).prepare(photo()), ready]
    found = draw(pipe, kind, **scales, **image_of(kind, [photo(), ready]), preprocess=[True, False])
    assert np.array_equal(found, draw(pipe, kind, **scales, **image_of(kind, by_hand)))


def test_several_controlnets_and_a_batch_take_rows_as_in_the_stock_class(tmp_path):
    kind = "sd-control"  # the stock class for SDXL takes one condition for all of a batch
    nets = [ControlNetModel.from_pretrained(saved_net(kind, tmp_path / str(i), 5 + i)) for i in range(2)]
    pipe = drop_in(kind, controlnet=nets)
    rows = [[photo(0), photo(1)], [photo(2), photo(3)]]
    by_hand = [[Conditioner(ControlSpec(**SPEC)).prepare(p) for p in row] for row in rows]
    found = draw(pipe, kind, nets=2, count=2, image=rows, preprocess=True)
    assert np.array_equal(found, draw(pipe, kind, nets=2, count=2, image=by_hand))


@pytest.mark.sample("xl-control")
def test_the_spec_is_saved_and_found_again(tmp_path, kind):
    nets = [ControlNetModel.from_pretrained(saved_net(kind, tmp_path / str(i), 5 + i)) for i in range(2)]
    pipe = drop_in(kind, controlnet=nets)
    expected = draw(pipe, kind, nets=2, image=[photo(), photo(1)], preprocess=True)
    pipe.save_pretrained(tmp_path / "pipe")
    assert (tmp_path / "pipe" / "controlnet_1" / SPEC_FILE).is_file()
    again = DiffusionPipeline.from_pretrained(str(tmp_path / "pipe"))
    again.set_progress_bar_config(disable=True)
    found = draw(again, kind, nets=2, image=[photo(), photo(1)], preprocess=True)
    assert np.array_equal(found, expected)


def test_a_spec_that_was_set_goes_along(tmp_path, kind):
    pipe = drop_in(kind)
    pipe.set_control_specs(ControlSpec(**SPEC))
    expected = draw(pipe, kind, image=photo(), preprocess=True)
    other = OURS[kind].from_pipe(pipe)
    assert np.array_equal(draw(other, kind, image=photo(), preprocess=True), expected)
    pipe.save_pretrained(tmp_path)
    assert ControlSpec.load(tmp_path / "controlnet") == ControlSpec(**SPEC)


def test_a_controlnet_that_takes_another_s_place_has_a_spec_of_its_own(tmp_path, kind):
    specs = [SPEC, SPEC | {"annotator": "shuffle", "params": {}}]
    nets = [ControlNetModel.from_pretrained(saved_net(kind, tmp_path / str(i), **s)) for i, s in enumerate(specs)]
    pipe = drop_in(kind, controlnet=nets[0])
    draw(pipe, kind, image=photo(), preprocess=True)
    pipe.controlnet = nets[1]
    by_hand = Conditioner(ControlSpec(**specs[1])).prepare(photo())
    assert np.array_equal(draw(pipe, kind, image=photo(), preprocess=True), draw(pipe, kind, image=by_hand))


def test_a_spec_that_was_set_stays_with_a_controlnet_that_is_compiled():
    pipe = drop_in("sd-control")
    pipe.set_control_specs(ControlSpec(**SPEC))
    pipe.controlnet = torch.compile(pipe.controlnet, backend="eager")
    assert pipe.control_spec() == ControlSpec(**SPEC)


def test_a_tuple_says_which_are_prepared_as_a_list_does(kind):
    pipe = drop_in(kind, stock(kind, nets=2))
    pipe.set_control_specs([ControlSpec(**SPEC), None])
    ready = condition(3)
    found, _, _ = pipe.prepare_conditions([photo(), ready], (True, False), SIDE, SIDE)
    assert found[1] is ready


def test_what_is_pushed_to_the_hub_holds_the_spec(tmp_path, kind, monkeypatch):
    """The Hub is not asked: what would be uploaded is looked at instead."""
    import diffusers.pipelines.pipeline_utils as saving

    pipe, uploaded = drop_in(kind), []
    pipe.set_control_specs(ControlSpec(**SPEC))
    monkeypatch.setattr(saving, "create_repo", lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(saving, "load_or_create_model_card", lambda *_, **__: SimpleNamespace(save=lambda path: None))
    monkeypatch.setattr(saving, "populate_model_card", lambda card: card)
    monkeypatch.setattr(pipe, "_upload_folder", lambda folder, *_, **__: uploaded.extend(Path(folder).rglob("*.json")))
    pipe.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="somebody/something")
    assert tmp_path / "controlnet" / SPEC_FILE in uploaded


def test_the_spec_of_a_pipeline_from_the_hub_is_fetched(tmp_path, kind, monkeypatch):
    """diffusers downloads a pipeline's weights and configurations only; the Hub is a folder here."""
    revision = tmp_path / "models--some-body--something" / "snapshots" / "abc123"
    pipe, asked = drop_in(kind), []
    pipe.set_control_specs(ControlSpec(**SPEC))
    pipe.save_pretrained(revision)
    spec = (revision / "controlnet" / SPEC_FILE).rename(tmp_path / SPEC_FILE)

    def download(repository, file, **where):
        asked.append((repository, where))
        return str(spec.rename(revision / file))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    again = DiffusionPipeline.from_pretrained(str(revision))
    assert again.control_spec() == again.control_spec() == ControlSpec(**SPEC)
    assert asked == [("some-body/something", {"revision": "abc123", "cache_dir": tmp_path})]


@pytest.mark.sample("controlnet-sd-control", "controlnet_1-flux-control")
@every
@pytest.mark.parametrize("name", ["controlnet", "controlnet_1"])
def test_the_spec_is_found_beside_weights_from_a_subfolder(tmp_path, kind, name):
    """Of which a model keeps no record."""
    specs = {"controlnet": {}, "controlnet_1": {"annotator": "shuffle", "params": {}}}
    for i, (folder, spec) in enumerate(specs.items()):
        saved_net(kind, tmp_path / folder, 5 + i, **spec)
    net = loaded_net(kind, str(tmp_path), subfolder=name, **in_precision(torch.bfloat16))
    pipe = drop_in(kind, controlnet=net)
    assert pipe.control_spec() == ControlSpec(**(spec_of(kind) | specs[name]))


def test_the_spec_of_a_subfolder_of_the_hub_is_fetched(tmp_path, monkeypatch):
    """The Hub is a folder here."""
    saved_net("sd-control", tmp_path / "nets" / "edges")
    net = loaded_net("sd-control", str(tmp_path / "nets"), subfolder="edges")
    net.register_to_config(_name_or_path="somebody/nets")
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(tmp_path / "nets")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert drop_in("sd-control", controlnet=net).control_spec() == ControlSpec(**SPEC)
    assert asked == [("somebody/nets", f"*/{SPEC_FILE}")]


def test_a_missing_spec_is_told(kind):
    with pytest.raises(UserError, match=r"no control_spec\.json beside the ControlNet \(not loaded from a folder\)"):
        draw(drop_in(kind), kind, image=photo(), preprocess=True)


def test_a_missing_spec_in_a_folder_is_told_with_the_folder(tmp_path, kind):
    controlnet(stock(plain(kind))).save_pretrained(tmp_path)
    pipe = drop_in(kind, controlnet=ControlNetModel.from_pretrained(str(tmp_path)))
    with pytest.raises(UserError, match=str(tmp_path)):
        draw(pipe, kind, image=photo(), preprocess=True)


def test_a_spec_of_other_weights_is_refused(tmp_path, kind):
    place = saved_net(kind, tmp_path / "net")
    net = ControlNetModel.from_pretrained(place)
    controlnet(stock(plain(kind)), 8).save_pretrained(place)
    pipe = drop_in(kind, controlnet=net)
    with pytest.raises(UserError, match="was written for other weights"):
        draw(pipe, kind, image=photo(), preprocess=True)


@pytest.mark.sample("sd-control-*")
@pytest.mark.parametrize("image", [torch.zeros(1, 3, SIDE, SIDE), np.zeros((SIDE, SIDE, 3), np.uint8), "photo.png", []])
def test_what_is_no_photo_is_told(tmp_path, kind, image):
    pipe = drop_in(kind, controlnet=ControlNetModel.from_pretrained(saved_net(kind, tmp_path / "net")))
    with pytest.raises(UserError, match=r"preprocess=True takes PIL pictures; found \w+"):
        draw(pipe, kind, image=image, preprocess=True)


def test_too_few_photos_are_told(kind):
    pipe = drop_in(kind, stock(kind, nets=2))
    with pytest.raises(UserError, match="there are 1 images and 2 answers of preprocess for 2 ControlNets"):
        draw(pipe, kind, image=[photo()], preprocess=True)


@pytest.mark.parametrize("specs", [[], [ControlSpec(), ControlSpec()]])
def test_specs_for_another_number_of_controlnets_are_told(kind, specs):
    with pytest.raises(UserError, match=f"there are {len(specs)} control specs for 1 ControlNets"):
        drop_in(kind).set_control_specs(specs)


def test_a_spec_of_another_range_is_told(kind):
    with pytest.raises(UserError, match="values are in -1 to 1, the pipeline gives 0 to 1"):
        drop_in(kind).set_control_specs(ControlSpec(value_range=(-1.0, 1.0)))


# --- adding a control -----------------------------------------------------------------------------------------------


@pytest.mark.sample("stock-sd3-control", "ours-sd-control")
@every
@pytest.mark.parametrize("ours", [False, True], ids=["stock", "ours"])
def test_a_control_is_added_to_a_running_pipeline(tmp_path, kind, ours):
    before_it = stock(plain(kind))
    add_adapter(denoiser_of(before_it), "tuned", 1)
    running = drop_in(plain(kind), before_it, hand_over=0.2) if ours else before_it
    before = traces(denoiser_of(running))
    found = add_control(running, saved_net(kind, tmp_path / "net"))
    found.set_progress_bar_config(disable=True)
    assert type(found) is OURS[kind]
    assert found.denoiser is denoiser_of(running)
    assert found.vae is running.vae
    assert same_traces(before, traces(denoiser_of(running)))
    assert found.extras.hand_over == (0.2 if ours else None)
    reference = stock(kind)
    add_adapter(denoiser_of(reference), "tuned", 1)
    found.set_extras(hand_over=None)
    assert np.abs(draw(found, kind) - draw(reference, kind)).max() < 1e-3
    assert np.isfinite(draw(found, kind, **image_of(kind, photo()), preprocess=True)).all()


def test_settings_are_given_in_the_same_call(kind):
    found = add_control(
        stock(plain(kind)), controlnet(stock(plain(kind))), spec=ControlSpec(**SPEC), control_schedule=LATE
    )
    assert found.config.control_schedule == [LATE]
    assert found.control_spec() == ControlSpec(**SPEC)


@pytest.mark.sample("sd-control")
def test_a_further_control_comes_after_those_there_are(tmp_path, kind):
    first = add_control(stock(plain(kind)), saved_net(kind, tmp_path / "first"))
    both = add_control(first, controlnet(stock(plain(kind)), 6), spec=ControlSpec(**SPEC))
    both.set_progress_bar_config(disable=True)
    assert both.nets[0] is first.controlnet
    assert both.control_spec(0) == both.control_spec(1) == ControlSpec(**SPEC)
    assert np.array_equal(draw(both, kind, nets=2), draw(stock(kind, nets=2), kind, nets=2))


@pytest.mark.sample("sd-control-function")
@pytest.mark.parametrize("schedule", [LATE, lambda u: u], ids=["table", "function"])
def test_a_further_control_leaves_the_schedule_of_those_there_are(kind, schedule):
    first = add_control(stock(plain(kind)), controlnet(stock(plain(kind))), control_schedule=schedule)
    both = add_control(first, controlnet(stock(plain(kind)), 6))
    assert [None if s is None else s(0.8) for s in both.extras.control_schedule] == [
        first.extras.control_schedule[0](0.8),
        None,
    ]
    both = add_control(first, controlnet(stock(plain(kind)), 6), control_schedule=[None, LATE])
    assert both.config.control_schedule == [None, LATE]


@pytest.mark.sample("sd-control")
def test_a_control_is_added_to_a_pipeline_whose_modules_are_offloaded(kind):
    """As `enable_sequential_cpu_offload` does: the UNet's weights lie on no device while they are not needed."""
    running = stock(plain(kind))
    for name in ("unet", "vae"):
        cpu_offload(getattr(running, name), torch.device("cpu"))
    found = add_control(running, controlnet(stock(plain(kind))))
    found.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(found, kind), draw(stock(kind), kind))


@pytest.mark.sample("sd-control")
def test_several_at_once(kind):
    nets = [controlnet(stock(plain(kind)), 5 + i) for i in range(2)]
    found = add_control(stock(plain(kind)), nets)
    found.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(found, kind, nets=2), draw(stock(kind, nets=2), kind, nets=2))


def test_the_control_takes_the_pipeline_s_dtype(kind):
    running = stock(plain(kind)).to(torch.bfloat16)
    found = add_control(running, controlnet(stock(plain(kind))))
    assert {m.dtype for m in found.components.values() if isinstance(m, torch.nn.Module)} == {torch.bfloat16}


@pytest.mark.sample("flux-control")
@every
def test_a_control_of_another_base_is_told_with_what_differs(kind):
    if kind in FLOWS:
        net = controlnet(stock(plain(kind)))
        net.register_to_config(num_attention_heads=3)
        with pytest.raises(UserError, match="does not fit this model: its num_attention_heads is 3, the model's 4"):
            add_control(stock(plain(kind)), net)
        return
    other = {"sd-control": "xl", "xl-control": "sd"}[kind]
    with pytest.raises(UserError, match=r"does not fit this model: its cross_attention_dim is \d+, the model's \d+"):
        add_control(stock(plain(kind)), controlnet(stock(other)))


def test_a_controlnet_that_is_not_there_is_told(tmp_path, kind):
    with pytest.raises(UserError, match=r"the ControlNet .*nothing could not be loaded|is no directory here"):
        add_control(stock(plain(kind)), tmp_path / "nothing")


def test_another_kind_of_pipeline_is_told():
    pipe = StableDiffusionImg2ImgPipeline(**stock("sd").components, requires_safety_checker=False)
    with pytest.raises(
        UserError, match="and this is a StableDiffusionImg2ImgPipeline; make one of those with from_pipe"
    ):
        add_control(pipe, controlnet(stock("sd")))


@pytest.mark.sample("sd-control")
def test_a_full_run_s_source_comes_along(kind):
    running = drop_in(plain(kind), source_unet=source_unet(kind), domain_guidance=True)
    found = add_control(running, controlnet(stock(plain(kind))))
    assert found.source_unet is running.source_unet
    assert found.extras.domain_guidance


def test_a_function_that_a_spec_of_the_hub_names_is_not_run(tmp_path, kind):
    place = tmp_path / "models--some-body--net" / "snapshots" / "1"
    saved_net(kind, place, annotator="os:getcwd", params={})
    pipe = drop_in(kind, controlnet=ControlNetModel.from_pretrained(str(place)))
    with pytest.raises(UserError, match=r"names the function os:getcwd, which is not run unasked"):
        pipe.control_spec()
    pipe.set_control_specs(ControlSpec(annotator="os:getcwd", resolution=SIDE))
    assert pipe.control_spec().is_function
