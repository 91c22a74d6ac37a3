"""The hook: rows are checked at every entry, bank rows go to whatever a model is told, and items are named."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.errors import UserError
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.difftuning import DiffTuningObjective, per_sample_loss
from difftuning_control.objective.rows import draw_items, extend_rows, rows_of_share

OBJECTIVE = DiffTuningObjective.from_scheduler(DDPMScheduler(), preset="paper")
ROLES = torch.tensor([False] * 4 + [True] * 2)
BANK = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 4, 8, 8)


def numbered(rows: int, *shape: int, start: int = 0) -> Tensor:
    """Row k holds the number start + k."""
    return (start + torch.arange(rows)).view(rows, *(1 for _ in shape)).expand(rows, *shape).float()


# --- 19: rows are checked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latents", "prompts", "bank", "empty", "said"),
    [
        ((4, 16, 8, 8), (1, 7, 8), (9, 16, 8, 8), (1, 7, 8), "prompt_embeds has 1 rows.* 4 target rows"),
        ((4, 16, 8, 8), (4, 7, 8), (9, 4, 8, 8), (1, 7, 8), r"the bank gives latents \(1, 4, 8, 8\).*\(1, 16, 8, 8\)"),
        ((4, 16, 8, 8), (4, 7, 8), (9, 16, 4, 4), (1, 7, 8), r"\(1, 16, 4, 4\)"),
        ((4, 16, 8, 8), (4, 7, 8), (9, 16, 8, 8), (1, 9, 8), r"a row of prompt_embeds is \(7, 8\).*\(9, 8\); pad=True"),
        ((4, 16, 8, 8), (4, 7, 8), (9, 16, 8, 8), (1, 7, 6), r"\(7, 8\).*\(7, 6\); expected one shape"),
        ((4, 16, 8, 8), (4, 7, 8), (9, 16, 8, 8), (3, 7, 8), "has 3 rows, but the batch has 1 bank rows; expected 1"),
        ((4, 16, 8, 8), (4, 7, 8), (0, 16, 8, 8), (1, 7, 8), "the bank has no items"),
        ((0, 16, 8, 8), (0, 7, 8), (9, 16, 8, 8), (1, 7, 8), "expected at least one target row"),
    ],
)
def test_fault_15_19_mix_refuses_parts_that_do_not_agree(latents, prompts, bank, empty, said):
    with pytest.raises(ValueError, match=said):
        OBJECTIVE.mix(torch.zeros(latents), torch.zeros(prompts), torch.zeros(bank), torch.zeros(empty))


ENTRIES = {
    "reduced losses": lambda: OBJECTIVE.reduce(torch.tensor(0.3), torch.zeros(6), ROLES),
    "losses of pixels": lambda: OBJECTIVE.reduce(torch.zeros(6, 4, 8, 6), torch.zeros(6), ROLES),
    "losses of fewer rows": lambda: OBJECTIVE.combine(torch.zeros(1), torch.zeros(6, dtype=torch.long), ROLES),
    "one timestep": lambda: OBJECTIVE.reduce(torch.zeros(6), torch.zeros(1), ROLES),
    "levels of fewer rows": lambda: OBJECTIVE.row_weights(torch.zeros(1, dtype=torch.long), ROLES),
    "multipliers": lambda: OBJECTIVE.row_weights(torch.zeros(6, dtype=torch.long), ROLES, torch.ones(1)),
    "roles that are numbers": lambda: OBJECTIVE.sample_timesteps(ROLES.long()),
    "roles of two dimensions": lambda: OBJECTIVE.sample_levels(ROLES[None]),
    "noise": lambda: OBJECTIVE.add_noise(torch.zeros(6, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(6).long()),
    "one level": lambda: OBJECTIVE.add_noise(torch.zeros(6, 4, 8, 8), torch.zeros(6, 4, 8, 8), torch.zeros(1).long()),
    "predictions": lambda: per_sample_loss(torch.zeros(6, 4, 8, 8), torch.zeros(6, 1, 8, 8)),
    "a batch's number": lambda: LatentBatch(torch.zeros(6, 4, 8, 8), {"guidance": torch.tensor(3.5)}, ROLES),
    "a batch's rows": lambda: LatentBatch(torch.zeros(6, 4, 8, 8), {"prompt_embeds": torch.zeros(1, 7, 8)}, ROLES),
    "a batch's roles": lambda: LatentBatch(torch.zeros(6, 4, 8, 8), {}, torch.tensor(True)),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_fault_15_19_no_entry_broadcasts_rows(entry):
    with pytest.raises(ValueError, match=r"expected|needs the same rows"):
        ENTRIES[entry]()


def test_fault_15_19_losses_that_were_averaged_are_told_what_to_take_instead():
    with pytest.raises(ValueError, match=r"per_sample_loss is \(\).*reduction='none'"):
        OBJECTIVE.reduce(torch.tensor(0.3), torch.zeros(6), ROLES)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"prompts": ["a"]}, "2 latents and 1 prompts"),
        ({"prompts": ["a", "b"], "seeds": [1]}, "2 latents and 1 seeds"),
        ({"prompts": ["a", "b"], "sizes": torch.zeros(3, 6)}, "2 latents and 3 sizes"),
        ({"latents": torch.zeros(0, 4, 8, 8), "prompts": []}, "0 latents"),
    ],
)
def test_fault_15_19_a_bank_has_a_prompt_an_item(parts, said):
    with pytest.raises(UserError, match=said):
        KnowledgeBank(**{"latents": torch.zeros(2, 4, 8, 8)} | parts)


# --- 20: one call that adds bank rows, one that extends any value ---------------------------------------------------


@pytest.mark.parametrize("bank", [BANK, KnowledgeBank(BANK, [str(i) for i in range(10)])], ids=["tensor", "bank"])
def test_fault_15_20_added_rows_are_the_named_items(bank):
    latents, is_retention, items = OBJECTIVE.add_bank_rows(
        numbered(16, 4, 8, 8, start=100), bank, torch.Generator().manual_seed(1)
    )
    assert is_retention.tolist() == [False] * 16 + [True] * 4
    assert latents[:16, 0, 0, 0].tolist() == list(range(100, 116))
    assert latents[16:, 0, 0, 0].tolist() == items.tolist()
    assert len(set(items.tolist())) > 1


def test_fault_15_20_without_retention_nothing_is_added_and_nothing_drawn():
    plain = DiffTuningObjective.from_scheduler(DDPMScheduler(), preset="plain")
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    latents, is_retention, items = plain.add_bank_rows(numbered(3, 4, 8, 8), BANK, generator)
    assert (len(latents), is_retention.tolist(), items.tolist()) == (3, [False] * 3, [])
    assert torch.equal(generator.get_state(), state)
    told = {"embeds": numbered(3, 5), "names": ["a", "b", "c"]}
    extended = extend_rows(told, {"embeds": torch.zeros(2, 5), "names": ["", ""]}, is_retention)
    assert torch.equal(extended["embeds"], told["embeds"])
    assert extended["names"] == told["names"]


def test_fault_15_20_any_structure_is_extended():
    """What the scripts of SDXL, Sana, Z-Image and ControlNet hold, in one value."""
    value = {
        "embeds": (numbered(4, 7, 3), numbered(4, 3)),
        "time_ids": numbered(4, 6).long(),
        "mask": torch.ones(4, 7, dtype=torch.bool),
        "features": [torch.full((i + 1, 2), float(i)) for i in range(4)],
        "prompts": ["a", "b", "c", "d"],
        "guidance": None,
    }
    extra = {
        "embeds": (numbered(1, 7, 3, start=90), numbered(2, 3, start=90)),
        "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]]),
        "mask": torch.tensor([[True, True] + [False] * 5]),
        "features": [torch.zeros(9, 2)],
        "prompts": ["e", "f"],
        "guidance": None,
    }
    found = extend_rows(value, extra, ROLES)
    assert list(found) == list(value)
    embeds, pooled = found["embeds"]
    assert embeds[:, 0, 0].tolist() == [0, 1, 2, 3, 90, 90]
    assert pooled[:, 0].tolist() == [0, 1, 2, 3, 90, 91]
    assert found["time_ids"][4:].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert found["mask"].sum(1).tolist() == [7] * 4 + [2] * 2
    assert [len(f) for f in found["features"]] == [1, 2, 3, 4, 9, 9]
    assert found["prompts"] == ["a", "b", "c", "d", "e", "f"]
    assert found["guidance"] is None


@pytest.mark.parametrize("masks", [(None, None), (torch.ones(4, 7), None)])
def test_what_would_be_padded_without_a_mask_is_refused(masks):
    told = ({"embeds": numbered(4, 7, 3), "mask": masks[0]}, {"embeds": numbered(1, 2, 3), "mask": masks[1]})
    with pytest.raises(ValueError, match=r"has None beside embeddings of other lengths; .* make it first: embeds"):
        extend_rows(*told, ROLES, pad=True)
    alike = extend_rows((numbered(4, 7, 3), None), (numbered(1, 7, 3), None), ROLES, pad=True)
    assert (alike[0].shape, alike[1]) == ((6, 7, 3), None)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_another_none_than_a_masks_is_let_through(as_tuple):
    value = {"embeds": numbered(4, 7, 3), "mask": torch.ones(4, 7), "guidance": None}
    extra = {"embeds": numbered(1, 2, 3), "mask": torch.ones(1, 2), "guidance": None}
    if as_tuple:
        found = dict(zip(value, extend_rows(tuple(value.values()), tuple(extra.values()), ROLES, pad=True)))
    else:
        found = extend_rows(value, extra, ROLES, pad=True)
    assert (found["embeds"].shape, found["guidance"]) == ((6, 7, 3), None)
    assert found["mask"].sum(1).tolist() == [7] * 4 + [2] * 2


def test_fault_15_20_roles_say_where_the_rows_go_and_not_their_position():
    roles = torch.tensor([True, False, False, True, False])
    found = extend_rows((numbered(3, 2), ["a", "b", "c"]), (numbered(2, 2, start=10), ["x", "y"]), roles)
    assert found[0][:, 0].tolist() == [10, 0, 1, 11, 2]
    assert found[1] == ["x", "a", "b", "y", "c"]


@pytest.mark.parametrize(("length", "other"), [(7, 3), (3, 7)])
def test_fault_15_20_an_empty_prompt_of_another_length_is_padded_and_masked(length, other):
    value = {"embeds": torch.ones(4, length, 5), "mask": torch.ones(4, length, dtype=torch.long)}
    extra = {"embeds": torch.full((1, other, 5), 2.0), "mask": torch.ones(1, other, dtype=torch.long)}
    found = extend_rows(value, extra, ROLES, pad=True)
    assert found["embeds"].shape == (6, 7, 5)
    assert found["mask"].sum(1).tolist() == [length] * 4 + [other] * 2
    for row, number in ((found["embeds"][0], length), (found["embeds"][-1], other)):
        assert (row[:number] > 0).all()
        assert (row[number:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fault_15_20_extended_tensors_keep_their_dtype_and_gradient(dtype):
    value = torch.ones(4, 3, dtype=dtype, requires_grad=True)
    found = extend_rows(value, torch.zeros(1, 3), ROLES)
    assert found.dtype == dtype
    (found * torch.arange(6).view(-1, 1)).sum().backward()
    assert value.grad[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("value", "extra", "said"),
    [
        ({"a": torch.zeros(4, 2)}, {"b": torch.zeros(1, 2)}, "value has 'a', what is added for bank rows 'b'"),
        ((torch.zeros(4), torch.zeros(4)), (torch.zeros(1),), "value has 2 values.* 1; expected as many"),
        (torch.zeros(4, 2), [torch.zeros(2)], "value is a Tensor, what is added for bank rows a list"),
        (torch.zeros(4, 2), None, "value is a Tensor, what is added for bank rows a NoneType"),
        ({"a": {"b": torch.zeros(3)}}, {"a": {"b": torch.zeros(1)}}, r"value\['a'\]\['b'\] has 3 rows"),
        (torch.zeros(4).long(), torch.zeros(1), "expected whole numbers"),
        (torch.tensor(3.5), torch.tensor(3.5), "value is a single number"),
        ([torch.zeros(2, 5)] * 4, [torch.zeros(2, 6)], r"\(5,\) and \(6,\)"),
        (["a"] * 4, [torch.zeros(2)], "expected one shape"),
    ],
)
def test_fault_15_20_values_that_do_not_fit_are_refused_by_name(value, extra, said):
    with pytest.raises(ValueError, match=said):
        extend_rows(value, extra, ROLES)


def test_fault_15_20_items_follow_the_generator_and_cover_the_bank():
    drawn = [draw_items(BANK, 500, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == set(range(10))


# --- 21: a value made before the loop ---------------------------------------------------------------------------------


def test_fault_15_21_prompts_that_grow_from_step_to_step_are_told_why():
    latents, prompt_embeds, empty = torch.zeros(4, 4, 8, 8), torch.zeros(4, 7, 8), torch.zeros(1, 7, 8)
    _, prompt_embeds, _ = OBJECTIVE.mix(latents, prompt_embeds, BANK, empty)
    said = "prompt_embeds has 5 rows, .* made before the loop and overwritten in it, .* keep what was made under"
    with pytest.raises(ValueError, match=said):
        OBJECTIVE.mix(latents, prompt_embeds, BANK, empty)


def test_fault_15_21_fewer_rows_are_not_said_to_have_grown():
    with pytest.raises(ValueError, match="prompt_embeds has 3 rows") as raised:
        OBJECTIVE.mix(torch.zeros(4, 4, 8, 8), torch.zeros(3, 7, 8), BANK, torch.zeros(1, 7, 8))
    assert "grows" not in str(raised.value)


# --- 22: what the page says of shares -----------------------------------------------------------------------------


@pytest.mark.parametrize(("targets", "banks"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 2), (8, 2), (16, 4)])
def test_fault_15_22_the_banks_rows_by_batch_size(targets, banks):
    assert len(OBJECTIVE.add_bank_rows(torch.zeros(targets, 4, 8, 8), BANK)[2]) == banks


@pytest.mark.parametrize("targets", [1, 2, 8])
def test_fault_15_22_the_banks_share_does_not_change_its_weight(targets):
    _, roles, _ = OBJECTIVE.add_bank_rows(torch.zeros(targets, 4, 8, 8), BANK)
    losses = torch.where(roles, 2.0, 3.0)
    torch.testing.assert_close(OBJECTIVE.reduce(losses, torch.zeros(len(roles)), roles), torch.tensor(3.0 + 0.1 * 2.0))


@pytest.mark.parametrize(("rows", "share", "kept"), [(100, 0.29, 29), (50, 0.58, 29), (26, 0.2, 5), (4, 0.2, 0)])
def test_a_share_of_a_batch_is_not_a_row_too_few_for_its_rounding(rows, share, kept):
    assert rows_of_share(rows, share) == kept
