import pytest
import torch

from difftuning_control.objective.batch import LatentBatch


def make_batch(rows: int = 4, ids: bool = True) -> LatentBatch:
    """Every part of row k holds the number k."""
    number = torch.arange(rows)
    conditioning = {
        "prompt_embeds": number.view(-1, 1, 1).expand(rows, 3, 2).float(),
        "class_labels": number.clone(),
    }
    latents = number.view(-1, 1, 1, 1).expand(rows, 4, 2, 2).float()
    return LatentBatch(latents, conditioning, number % 2 == 1, [f"row-{k}" for k in range(rows)] if ids else [])


def row_numbers(batch: LatentBatch) -> list[list[int]]:
    parts = (batch.latents, *batch.conditioning.values())
    return [part.flatten(1)[:, 0].long().tolist() if part.ndim > 1 else part.tolist() for part in parts]


def test_length_is_the_number_of_rows():
    assert len(make_batch(3)) == 3


@pytest.mark.parametrize(
    ("chosen", "numbers"),
    [
        (torch.tensor([3, 0, 0]), [3, 0, 0]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (torch.tensor([False] * 4), []),
        (slice(1, 3), [1, 2]),
    ],
    ids=["index", "mask", "nothing", "slice"],
)
def test_chosen_rows_stay_together(chosen, numbers):
    batch = make_batch().rows(chosen)
    assert row_numbers(batch) == [numbers] * 3
    assert batch.is_retention.tolist() == [n % 2 == 1 for n in numbers]
    assert batch.ids == [f"row-{n}" for n in numbers]


def test_rows_can_be_chosen_by_their_role():
    batch = make_batch()
    assert batch.rows(batch.is_retention).ids == ["row-1", "row-3"]
    assert batch.rows(~batch.is_retention).ids == ["row-0", "row-2"]


def test_rows_of_a_batch_without_ids_have_none():
    assert make_batch(ids=False).rows(slice(2)).ids == []


def test_to_casts_what_is_floating_point_and_nothing_else():
    batch = make_batch().to("cpu", torch.bfloat16)
    assert batch.latents.dtype == batch.conditioning["prompt_embeds"].dtype == torch.bfloat16
    assert batch.conditioning["class_labels"].dtype == torch.int64
    assert batch.is_retention.dtype == torch.bool
    assert row_numbers(batch) == row_numbers(make_batch())


def test_to_moves_every_part():
    batch = make_batch().to("meta", torch.float32)
    parts = (batch.latents, batch.is_retention, *batch.conditioning.values())
    assert {part.device.type for part in parts} == {"meta"}


def test_to_keeps_the_ids():
    assert make_batch().to("cpu", torch.float16).ids == make_batch().ids


@pytest.mark.parametrize(
    ("embeds", "roles", "message"),
    [(2, 3, "latents have 3 rows, but {'prompt_embeds': 2}"), (3, 4, "3 rows, but {'is_retention': 4}")],
)
def test_parts_with_other_numbers_of_rows_are_refused_by_name(embeds, roles, message):
    with pytest.raises(ValueError, match=message):
        LatentBatch(torch.zeros(3, 4, 2, 2), {"prompt_embeds": torch.zeros(embeds, 3, 2)}, torch.zeros(roles) > 0)


def test_roles_must_be_boolean():
    with pytest.raises(ValueError, match=r"is_retention is \(3,\) torch.float32; expected \(B,\) torch.bool"):
        LatentBatch(torch.zeros(3, 4, 2, 2), {}, torch.zeros(3))


def test_a_name_for_every_row_or_for_none():
    with pytest.raises(ValueError, match="1 ids for 3 rows"):
        LatentBatch(torch.zeros(3, 4, 2, 2), {}, torch.zeros(3) > 0, ["only one"])
