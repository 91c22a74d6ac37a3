"""Annotators give maps of the picture's size and nothing else: no state, no sound, no pickles."""

import io
import os
import pickle
import random
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from difftuning_control.data.annotators import ANNOTATORS, annotator, load_annotator, without_weights
from difftuning_control.errors import UserError

cv2 = pytest.importorskip("cv2")
pytest.importorskip("controlnet_aux")

FREE = "canny, lineart_standard and shuffle work without weights."
SIZES = [(16, 16), (64, 64), (100, 130), (40, 200)]
NETWORKS = ["pidinet", "teed", "mlsd", "anyline"]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blocks of 8×8 pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return np.ascontiguousarray(small.repeat(8, 0).repeat(8, 1)[:height, :width])


def flat(height: int, width: int, value: int = 128) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=300)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of small networks, in the files that controlnet_aux reads."""
    from controlnet_aux.hed import ControlNetHED_Apache2
    from controlnet_aux.mlsd import MobileV2_MLSD_Large
    from controlnet_aux.pidi.model import pidinet
    from controlnet_aux.teed.ted import TED

    folder = tmp_path_factory.mktemp("annotators")
    (folder / "Anyline").mkdir()
    torch.manual_seed(0)
    torch.save(ControlNetHED_Apache2().state_dict(), folder / "ControlNetHED.pth")
    named = {f"module.{k}": v for k, v in pidinet().state_dict().items()}
    torch.save({"state_dict": named}, folder / "table5_pidinet.pth")
    torch.save(TED().state_dict(), folder / "5_model.pth")
    torch.save(TED().state_dict(), folder / "Anyline" / "MTEED.pth")
    torch.save(MobileV2_MLSD_Large().state_dict(), folder / "mlsd_large_512_fp32.pth")
    return folder


# --- the table ------------------------------------------------------------------------------------------------------


def test_every_name_is_a_class_of_controlnet_aux():
    import controlnet_aux

    names = (
        "canny hed pidinet teed lineart lineart_anime lineart_standard mlsd midas zoe leres normalbae openpose dwpose "
        "mediapipe_face sam shuffle anyline"
    )
    assert sorted(ANNOTATORS) == sorted(names.split(" "))
    for name, row in ANNOTATORS.items():
        made = getattr(controlnet_aux, row.class_name)
        assert callable(made), name
        assert row.kind in ("edges", "depth", "normals", "masks", "pose", "other")
        assert (row.weights is None) == (not hasattr(made, "from_pretrained") and name != "dwpose"), name


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"'canni' is unknown; expected canny\b") as found:
        annotator("canni")
    assert str(found.value).count(".") == 1
    with pytest.raises(UserError, match="expected mlsd"):
        load_annotator("mlsdd", {})
    with pytest.raises(UserError) as found:
        annotator("qqqqqqqq")
    assert all(name in str(found.value) for name in ANNOTATORS)


def test_those_without_weights_load_and_no_other_does():
    assert without_weights() == ["canny", "lineart_standard", "shuffle"]
    for name in without_weights():
        load_annotator(name, {})


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (64, 192), (512, 768)])
def test_canny_is_that_of_opencv_itself(size: tuple[int, int]):
    picture = noise(*size)
    expected = cv2.Canny(picture, 50, 150)
    found = load_annotator("canny", {"low_threshold": 50, "high_threshold": 150})(picture)
    assert expected.any()
    assert np.array_equal(found, np.stack([expected] * 3, 2))


def test_edges_stay_where_they_are_at_other_sizes():
    picture = flat(100, 130, 0)
    picture[20:70, 30:100] = 255
    found = load_annotator("canny", {})(picture)[:, :, 0]
    near = cv2.dilate(cv2.Canny(picture, 100, 200), np.ones((5, 5)))
    assert (near[found > 0] == 255).all()
    rows, columns = np.nonzero(found > 64)
    assert (abs(rows.min() - 20) <= 2, abs(rows.max() - 70) <= 2) == (True, True)
    assert (abs(columns.min() - 30) <= 2, abs(columns.max() - 100) <= 2) == (True, True)


def test_a_chosen_resolution_is_resampled_once_and_by_area():
    picture = noise(64, 64)
    large = cv2.Canny(cv2.resize(picture, (192, 192), interpolation=cv2.INTER_LANCZOS4), 100, 200)
    found = load_annotator("canny", {"detect_resolution": 192})(picture)
    assert np.array_equal(found[:, :, 0], cv2.resize(large, (64, 64), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("name", without_weights())
@pytest.mark.parametrize("size", SIZES)
def test_maps_have_the_size_of_their_pictures(name: str, size: tuple[int, int]):
    annotate = load_annotator(name, {})
    for picture in (noise(*size), flat(*size), flat(*size, 255), noise(*size)[:, ::-1]):
        before = picture.copy()
        found = annotate(picture)
        assert found.shape == (*size, 3)
        assert (found.dtype, found.flags.c_contiguous) == (np.uint8, True)
        assert np.array_equal(found, annotate(picture))
        assert np.array_equal(picture, before)
        assert not np.shares_memory(found, picture)


def test_standard_lines_are_those_of_controlnet_aux():
    from controlnet_aux import LineartStandardDetector

    picture = noise(64, 128)
    expected = LineartStandardDetector()(picture, detect_resolution=64, guassian_sigma=2.0, output_type="np")
    assert expected.any()
    assert np.array_equal(load_annotator("lineart_standard", {"guassian_sigma": 2.0})(picture), expected)


@pytest.mark.parametrize("size", SIZES)
def test_standard_lines_of_plain_paper_are_black_and_silent(size: tuple[int, int]):
    annotate = load_annotator("lineart_standard", {})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not annotate(flat(*size, 255)).any()
    assert not said


# --- shuffle --------------------------------------------------------------------------------------------------------


def test_shuffle_is_a_function_of_its_picture():
    annotate, picture = load_annotator("shuffle", {}), noise(64, 64)
    first = annotate(picture)
    np.random.seed(7)
    random.seed(7)
    assert np.array_equal(first, annotate(picture.copy()))
    assert np.array_equal(first, load_annotator("shuffle", {})(picture))
    assert not np.array_equal(first, picture)
    assert not np.array_equal(first, annotate(noise(64, 64, seed=1)))
    assert (annotate(flat(64, 64)) == 128).all()


def test_shuffle_is_the_same_in_threads():
    annotate, pictures = load_annotator("shuffle", {}), [noise(64, 64, seed=i % 4) for i in range(32)]
    expected = [annotate(p) for p in pictures]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(np.array_equal, pool.map(annotate, pictures), expected))


def test_shuffle_leaves_the_random_states_alone():
    annotate = load_annotator("shuffle", {})
    arrays, python, tensors = np.random.get_state(), random.getstate(), torch.get_rng_state()
    annotate(noise(64, 64))
    assert pickle.dumps(np.random.get_state()) == pickle.dumps(arrays)
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), tensors)


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("canny", {"low_treshold": 5}, "has no parameter 'low_treshold'; expected low_threshold"),
        ("canny", {"qqqq": 5}, "expected low_threshold, high_threshold, detect_resolution, image_resolution"),
        ("canny", {"input_image": 5}, "has no parameter 'input_image'"),
        ("canny", {"output_type": "pil"}, "has no parameter 'output_type'"),
        ("hed", {"return_pil": True}, "has no parameter 'return_pil'"),
        ("canny", {"img": 5}, "has no parameter 'img'"),
        ("midas", {"depth_and_normal": True}, "has no parameter 'depth_and_normal'"),
        ("canny", {"filename": "x.pth"}, "has no parameter 'filename'"),
        ("hed", {"fielname": "x.pth"}, "expected filename"),
        ("canny", {"low_threshold": "low"}, "low_threshold of the annotator canny is 'low'; expected a number"),
        ("hed", {"scribble": "no"}, "scribble of the annotator hed is 'no'; expected true or false"),
        ("canny", {"detect_resolution": 32}, "is 32; expected a whole number from 64"),
        ("midas", {"model_type": 5}, "is 5; expected a name"),
    ],
)
def test_wrong_parameters_are_named(name: str, params: dict, message: str):
    with pytest.raises(UserError) as found:
        load_annotator(name, params)
    assert message in str(found.value)


def test_parameters_that_fail_on_a_picture_are_named():
    with pytest.raises(UserError, match=r"shuffle failed on a picture of 128×64 pixels with .*'f': 0") as found:
        load_annotator("shuffle", {"f": 0})(noise(64, 128))
    assert "ZeroDivisionError" in str(found.value)


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.sample("anyline")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_load_from_a_directory_and_are_deterministic(name: str, weights: Path):
    tensors, benchmark, loaders = torch.get_rng_state(), torch.backends.cudnn.benchmark, (torch.load, torch.hub.load)
    annotate = load_annotator(name, {}, str(weights))
    again = load_annotator(name, {}, str(weights), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), tensors)
    assert (torch.backends.cudnn.benchmark, torch.load, torch.hub.load) == (benchmark, *loaders)
    for size in [(16, 16), (100, 130), (64, 64)]:
        picture = noise(*size)
        found = annotate(picture)
        assert (found.shape, found.dtype) == ((*size, 3), np.uint8)
        assert np.array_equal(found, again(picture))
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(found, other) for other in pool.map(annotate, [picture] * 4))


@pytest.mark.wide
def test_a_network_is_the_one_in_the_file(weights: Path):
    from controlnet_aux import HEDdetector

    picture = noise(64, 64)
    for options in ({}, {"safe": True}, {"scribble": True}):
        expected = HEDdetector.from_pretrained(str(weights))(
            picture, detect_resolution=64, image_resolution=64, output_type="np", **options
        )
        found = load_annotator("hed", options, str(weights))(picture)
        assert np.array_equal(found, expected)
        assert found.any()


def test_files_may_be_named(weights: Path, tmp_path: Path):
    (tmp_path / "mine.pth").write_bytes((weights / "5_model.pth").read_bytes())
    picture = noise(64, 64)
    mine = load_annotator("teed", {"filename": "mine.pth", "safe_steps": 3}, str(tmp_path))(picture)
    assert np.array_equal(mine, load_annotator("teed", {"safe_steps": 3}, str(weights))(picture))


def test_missing_weights_name_the_annotators_that_need_none(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in [n for n, row in ANNOTATORS.items() if row.weights and not row.needs]:
        with pytest.raises(UserError) as found:
            load_annotator(name, {})
        message = str(found.value)
        assert message.startswith(f"the annotator {name} cannot use the weights in {ANNOTATORS[name].weights} (")
        assert message.endswith(FREE)
        assert message.count(". ") == 0
    with pytest.raises(UserError, match=r"midas .* has no dpt_hybrid-midas-501f0c75\.pt"):
        load_annotator("midas", {}, str(tmp_path))


@pytest.mark.parametrize("name", ["dwpose", "mediapipe_face"])
def test_missing_packages_name_the_annotators_that_need_none(name: str):
    if all(map(find_spec, ANNOTATORS[name].needs)):
        pytest.skip("they are installed")
    with pytest.raises(UserError, match=r" needs .*which controlnet_aux does not install") as found:
        load_annotator(name, {})
    assert str(found.value).endswith(FREE)
    assert all(package in str(found.value) for package in ANNOTATORS[name].needs if find_spec(package) is None)


def test_weights_that_do_not_fit_are_refused(weights: Path):
    with pytest.raises(UserError, match=r"hed cannot use the weights in .*Missing key"):
        load_annotator("hed", {"filename": "5_model.pth"}, str(weights))
    with pytest.raises(UserError, match=r"canny has no weights, and they are given as some/where; leave them out\.$"):
        load_annotator("canny", {}, "some/where")


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.sample("leres-False-False")
@pytest.mark.parametrize("unsafe_by_default", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["hed", "pidinet", "leres", "sam"])
def test_pickles_are_not_run(name: str, zipped: bool, unsafe_by_default: bool, tmp_path: Path, monkeypatch):
    if unsafe_by_default:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    files = {"hed": "ControlNetHED.pth", "pidinet": "table5_pidinet.pth", "leres": "res101.pth", "sam": "mobile_sam.pt"}
    file = tmp_path / files[name]
    if zipped:
        torch.save({"state_dict": Malicious(tmp_path / "made")}, file)
    else:
        file.write_bytes(pickle.dumps({"state_dict": Malicious(tmp_path / "made")}))
    params = {"model_type": "vit_t", "filename": "mobile_sam.pt"} if name == "sam" else {}
    with pytest.raises(UserError, match="is not of tensors alone, and reading it might run code"):
        load_annotator(name, params, str(tmp_path))
    assert not (tmp_path / "made").exists()
    with suppress(RuntimeError):
        torch.load(file, weights_only=False)
    assert (tmp_path / "made").exists()  # so the file is as bad as it is meant to be


def test_scripted_models_are_not_run(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "ControlNetHED.pth")
    with pytest.raises(UserError, match="TorchScript"):
        load_annotator("hed", {}, str(tmp_path))


def test_no_code_is_fetched(tmp_path: Path):
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(UserError, match="it would run code from GitHub"):
        load_annotator("midas", {"model_type": "midas_v21", "filename": "x.pt"}, str(tmp_path))


@pytest.mark.slow
def test_zoe_does_not_keep_random_weights(tmp_path: Path):
    torch.save({"model": {"core.core.pretrained.model.cls_token": torch.zeros(1, 1, 1024)}}, tmp_path / "ZoeD_M12_N.pt")
    with pytest.raises(UserError, match=r"zoe cannot use .*\d+ tensors are missing"):
        load_annotator("zoe", {}, str(tmp_path))


@pytest.mark.slow
def test_leres_reads_no_command_line_and_sets_no_benchmark(tmp_path: Path, monkeypatch):
    from controlnet_aux import leres

    torch.manual_seed(0)
    torch.save({"depth_model": leres.RelDepthModel(backbone="resnext101").state_dict()}, tmp_path / "res101.pth")
    monkeypatch.setattr(sys, "argv", ["test"])
    options = leres.TestOptions().parse()
    options.gpu_ids = []
    torch.save(leres.Pix2Pix4DepthModel(options).netG.state_dict(), tmp_path / "latest_net_G.pth")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(sys, "argv", ["difftune", "--gpu_ids", "none", "--num_threads", "many"])
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        annotate = load_annotator("leres", {}, str(tmp_path))
    found = annotate(noise(64, 64))
    assert not torch.backends.cudnn.benchmark
    assert sys.argv[0] == "difftune"
    assert not said.getvalue()
    assert np.array_equal(found, annotate(noise(64, 64)))


# --- imports --------------------------------------------------------------------------------------------------------


@pytest.mark.wide
def test_the_package_does_not_import_controlnet_aux():
    code = "import sys, difftuning_control, difftuning_control.data.annotators\n"
    done = run(code + "print([m for m in ('controlnet_aux', 'cv2') if m in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.wide
def test_loading_and_annotating_are_silent():
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    import numpy as np\n"
        "    from difftuning_control.data.annotators import load_annotator\n"
        "    said.clear()\n"
        "    for name in ('canny', 'lineart_standard', 'shuffle'):\n"
        "        load_annotator(name, {})(np.full((64, 64, 3), 255, np.uint8))\n"
        "assert not said, [str(w.message) for w in said]\n"
    )
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.wide
def test_a_mediapipe_without_solutions_spoils_only_its_own_annotator(tmp_path: Path):
    (tmp_path / "mediapipe.py").write_text("")  # as from 0.10.30 on
    code = (
        "import sys, numpy as np\n"
        "from difftuning_control.data.annotators import load_annotator\n"
        "from difftuning_control.errors import UserError\n"
        "print(load_annotator('canny', {})(np.zeros((64, 64, 3), np.uint8)).shape, 'mediapipe' in sys.modules)\n"
        "try:\n"
        "    load_annotator('mediapipe_face', {})\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = run(code, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    first, second = done.stdout.splitlines()
    assert first == "(64, 64, 3) True"
    assert (
        second
        == f"the annotator mediapipe_face needs a mediapipe older than 0.10.30, which still has its solutions; {FREE}"
    )
