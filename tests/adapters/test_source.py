"""A difference to the source gives that source back, within what its precision allows, and shares all that is equal."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from difftuning_control.adapters.source import load_source, save_difference
from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.recipe.adapter import AdapterConfig
from support.tiny_sd import tiny_pipeline

PART = ("conv_in", "mid_block", "up_blocks.0.attentions")
ROUNDING = {torch.float16: (2**-11, 2**-25), torch.float32: (2**-24, 0.0)}


def tuned_from(source: nn.Module, names: tuple[str, ...] = PART, scale: float = 1e-2) -> nn.Module:
    """The source with other weights in the named parts."""
    tuned = copy.deepcopy(source)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in tuned.named_parameters():
        if name.startswith(names):
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return tuned


@pytest.fixture
def source() -> nn.Module:
    return tiny_pipeline().unet


@pytest.fixture
def tuned(source) -> nn.Module:
    return tuned_from(source)


@pytest.mark.sample("dtype1-0.01")
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_source_comes_back_within_the_rounding_of_the_difference(source, tmp_path, dtype, scale):
    tuned = tuned_from(source, scale=scale)
    save_difference(tuned, source, tmp_path / "d.safetensors", dtype)
    found, expected, own = (m.state_dict() for m in (load_source(tuned, tmp_path / "d.safetensors"), source, tuned))
    assert found.keys() == expected.keys()
    relative, absolute = ROUNDING[dtype]
    for name, value in found.items():
        delta = (expected[name] - own[name]).double().abs()
        sums = 2**-23 * (expected[name].double().abs() + own[name].double().abs() + delta)  # float32's own
        error = (value.double() - expected[name].double()).abs()
        assert (error <= relative * delta + absolute + sums).all(), name
        assert value.equal(expected[name]) or name.startswith(PART)


def test_only_what_differs_is_stored_and_in_the_precision_asked_for(source, tuned, tmp_path):
    differing = {n for n, t in tuned.state_dict().items() if not t.equal(source.state_dict()[n])}
    sizes = {}
    for dtype, name in ((torch.float16, "F16"), (torch.float32, "F32")):
        path = tmp_path / f"{name}.safetensors"
        save_difference(tuned, source, path, dtype)
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == differing
            assert {file.get_slice(n).get_dtype() for n in file.keys()} == {name}  # noqa: SIM118
        sizes[name] = path.stat().st_size
    assert sizes["F16"] < 0.6 * sizes["F32"]


def test_equal_tensors_are_the_tuned_models_own_and_stay_so(source, tuned, tmp_path):
    save_difference(tuned, source, tmp_path / "d.safetensors")
    found = load_source(tuned, tmp_path / "d.safetensors")
    own = dict(tuned.named_parameters())
    shared = {n for n, p in found.named_parameters() if p.data_ptr() == own[n].data_ptr()}
    assert shared == {n for n in own if not n.startswith(PART)}
    before = {n: p.detach().clone() for n, p in found.named_parameters()}
    tuned.half()
    found.half()
    for name, parameter in found.named_parameters():
        assert (parameter.data_ptr() == own[name].data_ptr()) == (name in shared)
        assert parameter.equal(before[name].half())


def test_the_source_predicts_what_the_source_did_and_the_tuned_model_stays_as_it_was(source, tuned, tmp_path):
    before = copy.deepcopy(tuned.state_dict())
    save_difference(tuned, source, tmp_path / "d.safetensors", torch.float32)
    found = load_source(tuned, tmp_path / "d.safetensors")
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16))
    with torch.no_grad():
        a, b, c = (m.eval()(*inputs).sample for m in (found, source, tuned))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert (a - c).abs().max() > 1e-2
    torch.testing.assert_close(dict(tuned.state_dict()), before, atol=0, rtol=0)
    assert not found.training
    assert not any(p.is_meta for p in found.parameters())


@pytest.mark.wide
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tuned_weights_may_be_loaded_in_a_lower_precision(source, tuned, tmp_path, dtype):
    save_difference(tuned, source, tmp_path / "d.safetensors")
    lower = copy.deepcopy(tuned).to(dtype)
    found = load_source(lower, tmp_path / "d.safetensors")
    step = {torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    for name, value in found.state_dict().items():
        assert value.dtype == dtype
        bound = step * (source.state_dict()[name].abs() + tuned.state_dict()[name].abs()) + 2**-20
        assert ((value.float() - source.state_dict()[name]).abs() <= bound).all(), name


# --- refusals -------------------------------------------------------------------------------------------------------


def test_other_tuned_weights_are_refused(source, tuned, tmp_path):
    save_difference(tuned, source, tmp_path / "d.safetensors")
    for other in (source, tuned_from(source, ("conv_out",)), tiny_pipeline(seed=1).unet):
        with pytest.raises(UserError, match=r"belongs to other tuned weights; give it the model that was exported wi"):
            load_source(other, tmp_path / "d.safetensors")


def test_a_model_with_an_adapter_is_refused(source, tuned, tmp_path):
    save_difference(tuned, source, tmp_path / "d.safetensors")
    pipe = tiny_pipeline()
    pipe.register_modules(unet=tuned)
    AdapterTuning(family_of(pipe), AdapterConfig(rank=2))
    with pytest.raises(UserError, match=r"the model has an adapter; load its source first, and adapters after it\.$"):
        load_source(tuned, tmp_path / "d.safetensors")


def missing(path: Path) -> None:
    path.unlink(missing_ok=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def of_something_else(path: Path) -> None:
    save_file({"conv_in.weight": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(missing, "cannot be read"), (cut, "cannot be read"), (of_something_else, "holds no difference to a source")],
)
def test_a_file_that_is_no_difference_is_refused(source, tuned, tmp_path, damage, expected):
    path = tmp_path / "d.safetensors"
    save_difference(tuned, source, path)
    damage(path)
    with pytest.raises(UserError, match=rf"d\.safetensors {expected}.*\.$"):
        load_source(tuned, path)


def test_nothing_to_keep_is_refused(source, tmp_path):
    with pytest.raises(UserError, match=r"the tuned weights equal the source's; there is no difference to keep\.$"):
        save_difference(copy.deepcopy(source), source, tmp_path / "d.safetensors")
    assert not list(tmp_path.iterdir())


def test_two_architectures_are_refused(source, tmp_path):
    other = type(source).from_config({**source.config, "cross_attention_dim": 8})
    with pytest.raises(UserError, match=r"have different tensors; give two of one architecture\.$"):
        save_difference(other, source, tmp_path / "d.safetensors")


def test_a_difference_that_half_precision_cannot_hold_is_refused(source, tmp_path):
    tuned = tuned_from(source, scale=1e6)
    with pytest.raises(UserError, match=r"too large for float16; keep it in float32\.$"):
        save_difference(tuned, source, tmp_path / "d.safetensors")
    save_difference(tuned, source, tmp_path / "d.safetensors", torch.float32)
    assert (tmp_path / "d.safetensors").is_file()
