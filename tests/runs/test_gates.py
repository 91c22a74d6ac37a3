"""Gates: judged on held-out data by the figures of an evaluation; a run that fails is marked, refused, and told."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from difftuning_control.cli import main
from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.errors import UserError
from difftuning_control.evaluation.band_losses import read_losses
from difftuning_control.families.hub import best_device
from difftuning_control.recipe.gates import GatesConfig
from difftuning_control.recipe.inputs import BankConfig, ControlConfig, DataConfig, FidelityConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.recipe.training import TuningConfig
from difftuning_control.runs.audit import read_audit
from difftuning_control.runs.gates import judge
from difftuning_control.runs.verify import verify
from difftuning_control.verbs import evaluate as evaluation
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.train import train
from support.command_line import flags, settings
from support.feature_models import save_tiny_dinov2
from support.pictures import write_pictures
from support.refusals import assert_refused

PLAIN = TuningConfig(retention_ratio=0.0, retention_weight=0.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def words(root: Path, model_dir: Path) -> Callable[..., list[str]]:
    """The words of a training of two steps with six held-out pictures: `words(output, **{"gates.kid": …})`."""
    data = write_pictures(root / "data", count=13)
    features = save_tiny_dinov2(root / "features")

    def command(output: str, drawn: bool = True, **changes: Any) -> list[str]:
        values = {"data.holdout": 0.45, "bank.size": 10, "output": root / output}
        if drawn:
            values |= {"gates.features": features, "gates.pictures": 5, "gates.seeds": "[0, 1]", "gates.steps": 2}
        return ["train", *flags(settings(model_dir, data, root, **values, **changes))]

    return command


@pytest.fixture(scope="module")
def failed(root: Path, words: Callable[..., list[str]]) -> Path:
    """A run that fails one of three gates."""
    given = {"gates.kid": 1e6, "gates.memorisation": -1, "gates.retention_loss": 1e6}
    with pytest.raises(SystemExit) as stopped:
        main(words("failed", **given))
    assert stopped.value.code == 4
    return root / "failed"


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


# --- judged, marked, shown ------------------------------------------------------------------------------------------


def test_a_failed_run_is_kept_whole_and_marked(failed):
    record = record_of(failed)
    assert record["status"] == "complete"
    judged = record["gates"]
    assert judged["passed"] is False
    assert {name: (g["limit"], g["at"], g["passed"]) for name, g in judged["figures"].items()} == {
        "kid": (1e6, "most", True),
        "retention_loss": (1e6, "most", True),
        "memorisation": (-1, "most", False),
    }
    assert all(math.isfinite(g["value"]) for g in judged["figures"].values())
    assert verify(VerifyRequest(str(failed)))["status"] == "same"
    last = read_audit(failed).entries[-1]
    assert last["outcome"] == "done"
    assert last["said"].startswith("memorisation is ")
    card = (failed / "README.md").read_text()
    assert "**The run fails its gates.**" in card
    assert "| kid |" in card


def test_an_evaluation_of_other_pictures_judges_no_gate(failed, root, tmp_path, capsys):
    values = {"runs": json.dumps([str(failed)]), "features": root / "features", "pictures": 5, "seeds": "[0, 1]"}
    main(["evaluate", *flags(values | {"steps": 1, "output": tmp_path / "out"})])
    assert "are for pictures of other settings" in capsys.readouterr().out
    (side,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sides"]
    assert "gates" not in side


def test_what_was_forgotten_is_measured_on_samples_that_no_run_trained_on():
    """Of banks that begin alike, whichever run stands first; of another seed's nothing is known."""
    latents = torch.arange(40.0)[:, None, None, None].expand(40, 1, 2, 2).clone()
    large = KnowledgeBank.from_latents(latents, ["a"] * 40, "m", "0")
    small = KnowledgeBank.from_latents(latents[:20], ["a"] * 20, "m", "0")
    other = KnowledgeBank.from_latents(latents[:20] + 0.5, ["a"] * 20, "m", "0")
    assert evaluation.first_unseen(small, 4, [(small, 16), (large, 35)]) == 20
    assert evaluation.first_unseen(large, 4, [(large, 35), (small, 16)]) == 36
    assert evaluation.first_unseen(small, 4, [(small, 16), (other, 20)]) == 16
    assert evaluation.first_unseen(large, 4, [(large, 36), (large, 38)]) == 38


@pytest.mark.wide
def test_gates_are_judged_by_the_numbers_of_an_evaluation(failed, root, capsys):
    values = {
        "runs": json.dumps([str(failed)]),
        "features": root / "features",
        "pictures": 5,
        "seeds": "[0, 1]",
        "steps": 2,
        "output": root / "evaluation",
    }
    evaluate = ["evaluate", *flags(values)]
    with pytest.raises(SystemExit) as stopped:
        main(evaluate)
    assert stopped.value.code == 4
    assert "gate FAILED: memorisation is" in capsys.readouterr().out
    (side,) = json.loads((root / "evaluation" / "evaluation.json").read_text())["sides"]
    figures = record_of(failed)["gates"]["figures"]
    for name in ("kid", "memorisation"):
        assert figures[name]["value"] == side["summary"][name]["mean"]
    forgotten = side["forgetting"]["mean"]
    assert figures["retention_loss"]["value"] == pytest.approx(sum(forgotten) / len(forgotten))
    assert side["gates"] == record_of(failed)["gates"]
    own = json.loads((failed / "gates" / "evaluation.json").read_text())
    assert own["sides"][0]["summary"] == side["summary"]
    assert read_audit(failed).last_hash_of("evaluation.json") is not None


def test_the_loss_of_the_run_is_the_one_that_the_evaluation_measures(failed):
    """So a gate on it alone needs no picture."""
    record = record_of(failed)
    of_losses = judge(GatesConfig(retention_loss=0), {}, read_losses(record["losses"]))
    of_both = record["gates"]["figures"]["retention_loss"]
    rounding = 1e-6 if best_device().type == "cpu" else 1e-4
    assert of_losses.figures["retention_loss"].value == pytest.approx(of_both["value"], rel=1e-4, abs=rounding)


@pytest.mark.wide
def test_a_run_that_keeps_its_limits_passes_and_loads_no_picture_for_the_loss(words, root, capsys):
    main(words("passes", drawn=False, **{"gates.retention_loss": 1e6}))
    assert "gate passed: retention_loss is" in capsys.readouterr().out
    record = record_of(root / "passes")
    assert record["gates"]["passed"] is True
    assert not (root / "passes" / "gates").exists()
    main(["export", str(root / "passes"), "--to", str(root / "export-passes"), "--base", "referenced"])


@pytest.mark.wide
def test_gates_do_not_touch_what_is_trained(words, root, failed):
    main(words("without", drawn=False))
    name = "pytorch_lora_weights.safetensors"
    assert (root / "without" / name).read_bytes() == (failed / name).read_bytes()
    assert record_of(root / "without")["identity"] == record_of(failed)["identity"]
    assert "gates" not in record_of(root / "without")


@pytest.mark.wide
def test_gates_given_later_are_judged_when_the_run_is_resumed(words, root, capsys):
    main(words("later", drawn=False))
    weights = (root / "later" / "pytorch_lora_weights.safetensors").stat().st_mtime_ns
    with pytest.raises(SystemExit) as stopped:
        main([*words("later", drawn=False, **{"gates.retention_loss": -1}), "--training.resume"])
    assert stopped.value.code == 4
    record = record_of(root / "later")
    assert record["gates"]["passed"] is False
    assert record["recipe"]["gates"]["retention_loss"] == -1
    assert (root / "later" / "pytorch_lora_weights.safetensors").stat().st_mtime_ns == weights
    assert verify(VerifyRequest(str(root / "later")))["status"] == "same"
    before = record_of(root / "later")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:  # the mark does not go by leaving out the gates
        main([*words("later", drawn=False), "--training.resume"])
    assert stopped.value.code == 4
    assert "fails its gates (retention_loss is" in capsys.readouterr().err
    assert record_of(root / "later") == before


def test_a_record_that_was_edited_is_not_judged_and_not_vouched_for(failed, tmp_path, capsys):
    run = tmp_path / "edited"
    shutil.copytree(failed, run)
    edited = json.loads((run / "run.json").read_text())
    edited["losses"]["bank"]["tuned"]["mean"] = 0.0
    (run / "run.json").write_text(json.dumps(edited))
    words = ["resume", str(run), "--gates.retention_loss", "0.5"]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "has changed since the run, and only a run that is as it was is judged" in capsys.readouterr().err
    assert verify(VerifyRequest(str(run)))["status"] == "changed"


# --- export ---------------------------------------------------------------------------------------------------------


def test_a_failed_run_is_not_exported_unasked(failed, tmp_path, capsys):
    words = ["export", str(failed), "--to", str(tmp_path / "out"), "--base", "referenced"]
    assert_refused(words, capsys, tmp_path, "fails its gates (memorisation is", "--despite-gates")


@pytest.mark.parametrize("flag", ["--despite-gates", "--despite_gates=true"])
def test_a_failed_run_is_exported_where_that_is_said_and_written_down(failed, tmp_path, flag):
    main(["export", str(failed), "--to", str(tmp_path / "out"), "--base", "referenced", flag])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Exported despite its quality gates**" in card
    assert "**The run fails its gates.**" in card
    marker = json.loads((tmp_path / "out" / "export.json").read_text())
    assert marker["despite_gates"] is True
    assert marker["gates"]["figures"]["memorisation"]["passed"] is False
    assert str(failed.parent) not in json.dumps(marker)
    assert flag in read_audit(failed).entries[-1]["command"]


def test_a_run_that_was_not_judged_by_its_gates_is_not_exported(failed, tmp_path, capsys):
    copy = Path(shutil.copytree(failed, tmp_path / "copy"))
    record = record_of(copy)
    del record["gates"]
    (copy / "run.json").write_text(json.dumps(record))
    words = ["export", str(copy), "--to", str(tmp_path / "out"), "--base", "referenced"]
    assert_refused(words, capsys, tmp_path, "has not been judged by its gates")


# --- a ControlNet ---------------------------------------------------------------------------------------------------


@pytest.mark.wide
def test_a_controlnet_is_judged_by_how_it_follows_and_its_report_says_so(recipe, root, words, tmp_path):
    made = Recipe(
        "controlnet",
        recipe.model,
        DataConfig(str(root / "data"), holdout=0.45, cache=str(tmp_path / "cache")),
        bank=BankConfig(size=6, steps=1),
        control=ControlConfig(fidelity=FidelityConfig(every=0)),
        training=replace(recipe.training, max_steps=1),
        gates=GatesConfig(fidelity=1, features=str(root / "features"), pictures=5, seeds=[0], steps=1),
        output=recipe.output,
    )
    judged = train(made).record.gates
    found = judged.figures["fidelity"]
    assert (found.at, found.passed) == ("least", False)
    assert 0 <= found.value < 1
    report = (Path(recipe.output) / "report.html").read_text()
    assert "Quality gates" in report
    assert "at least 1" in report


@pytest.mark.parametrize(
    ("value", "passed"), [(0.1, True), (0.2, True), (0.3, False), (math.nan, False), (None, False)]
)
def test_a_limit_is_kept_up_to_itself_and_depth_is_judged_the_other_way(value, passed):
    side = {"summary": {"kid": {"mean": value}, "rmse": {"mean": value}}}
    found = judge(GatesConfig(kid=0.2, fidelity=0.2), side)
    assert [found.figures[n].passed for n in ("kid", "fidelity")] == [passed, passed]
    assert found.figures["fidelity"].at == "most"


def test_a_figure_that_was_not_measured_fails(recipe):
    found = judge(GatesConfig(retention_loss=0.1, kid=1), {"summary": {}})
    assert [gate.passed for gate in found.figures.values()] == [False, False]


# --- refused before training ----------------------------------------------------------------------------------------


@pytest.mark.sample("gates.fidelity=0.5-")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gates.kid": -0.1}, "gates.kid is -0.1; expected a finite number of at least 0."),
        ({"gates.kid": "nan"}, "gates.kid is nan"),
        ({"gates.kid": "inf"}, "gates.kid is inf"),
        ({"gates.memorisation": 1.5}, "gates.memorisation is 1.5; expected -1 to 1."),
        ({"gates.fidelity": 2}, "gates.fidelity is 2.0; expected 0 to 1."),
        ({"gates.retention_loss": -2}, "gates.retention_loss is -2.0; expected a finite number of at least -1."),
        ({"gates.kid": 1, "gates.pictures": 4}, "gates.pictures is 4; expected at least 5."),
        ({"gates.kid": 1, "gates.seeds": "[1, 1]"}, "gates.seeds is [1, 1]"),
        ({"gates.pictures": 5}, "gates has settings of the pictures to draw, but no limit"),
        ({"gates.fidelity": 0.5}, "gates.fidelity is for ControlNets, but method is lora"),
        ({"method": "controlnet", "gates.retention_loss": 0.1}, "beside a ControlNet it stays as it is"),
        ({"gates.kid": 1, "data.holdout": 0}, "gates.kid is judged on held-out pictures, and there are none"),
        ({"gates.kid": 1, "data.holdout": 0.2}, "an evaluation needs at least 6 held-out pictures; there are 3."),
        ({"gates.kid": 1, "bank.size": 4, "training.batch_size": 5}, "bank.size is 4; expected at least 5"),
        ({"gates.kid": 1, "gates.features": "resnet"}, "features is 'resnet'"),
        (
            {"gates.retention_loss": 0.1, "tuning.retention_ratio": 0, "tuning.retention_weight": 0},
            "gates.retention_loss needs a knowledge bank",
        ),
    ],
    ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_a_gate_that_cannot_be_judged_is_refused_before_anything(words, root, capsys, changes, expected):
    place = root / "refused"
    place.mkdir(exist_ok=True)
    command = words("refused/run", drawn=False)
    for key, value in changes.items():
        command += [f"--{key}", str(value)]
    assert_refused(command, capsys, place, expected)


def test_held_out_copies_of_what_is_tuned_on_are_refused(words, root, tmp_path, capsys):
    held = write_pictures(tmp_path / "held", count=6, seed=5)
    first = json.loads((root / "data" / "metadata.jsonl").read_text().splitlines()[0])["file_name"]
    shutil.copy(root / "data" / first, held / "0.png")
    command = words("refused/run", **{"gates.kid": 1, "data.validation_path": held})
    assert_refused([*command, "--data.holdout", "0"], capsys, tmp_path, "1 of the 6 held-out pictures are tuned on too")


def test_no_gate_is_no_gate():
    recipe = Recipe(tuning=PLAIN)
    assert recipe.gates.limits == {}
    with pytest.raises(UserError, match=r"gates\.kid needs a knowledge bank"):
        Recipe(tuning=PLAIN, gates=GatesConfig(kid=0.1))
    assert Recipe(tuning=PLAIN, gates=GatesConfig(kid=0.1), bank=BankConfig(path="pictures")).gates.draws
    _, command = parse(["train", "--gates", "{kid: 0.1, memorisation: 0.9}"])
    assert {k: v for k, v in asdict(command.gates).items() if v is not None and k in ("kid", "memorisation")} == {
        "kid": 0.1,
        "memorisation": 0.9,
    }
