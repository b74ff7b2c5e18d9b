"""What the small encoders are trained with: images shifted by a pixel, tokens hidden in the right shares, and a seed that decides."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))


def test_images_are_shifted_by_up_to_a_pixel():
    from vit import shifted

    pixels = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    wide = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=-1.0)
    all_nine = torch.stack([wide[:, :, down : down + 8, right : right + 8] for down in range(3) for right in range(3)], dim=1)
    moved = shifted(pixels, torch.Generator().manual_seed(1))
    which = (all_nine == moved[:, None]).flatten(2).all(2)
    assert (which.sum(1) == 1).all()
    counts = which.sum(0)
    assert all(abs(int(count) - 300 / 9) < 4 * math.sqrt(300 / 9 * 8 / 9) for count in counts)


def test_every_image_is_seen_once_per_round():
    from vit import ViTTraining, batches

    steps = list(batches(20, ViTTraining(steps=10, batch=4), torch.Generator().manual_seed(0)))
    seen = torch.cat(steps)
    assert len(steps) == 10
    assert sorted(seen[:20].tolist()) == sorted(seen[20:].tolist()) == list(range(20))
    assert seen[:20].tolist() != seen[20:].tolist()


@pytest.mark.thorough
def test_the_seed_decides_about_the_weights(tmp_path):
    from safetensors.torch import load_file
    from vit import ViTTraining, train_vit

    weights = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # what else is drawn in the process is of no consequence, and stays as it was
        before = torch.random.get_rng_state()
        folder = train_vit(ViTTraining(tmp_path / str(i), layers=1, d_model=8, heads=2, steps=3, warmup=1, seed=seed))
        assert torch.equal(torch.random.get_rng_state(), before)
        weights.append(load_file(folder / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_tokens_are_hidden_in_their_shares():
    from roberta import hide

    special, mask = torch.tensor([0, 1, 2]), 50
    rows = torch.randint(3, mask, (500, 40), generator=torch.Generator().manual_seed(0))
    rows[:, 0], rows[:, -1] = 0, 2
    seen, asked = hide(rows, 0.3, special, mask, torch.Generator().manual_seed(1))
    n, chance = int(asked.sum()), 1 / (mask - 3)
    assert n == pytest.approx(0.3 * 500 * 38, abs=4 * math.sqrt(500 * 38 * 0.3 * 0.7))
    for part, share in (((seen == mask) & asked, 0.8), ((seen == rows) & asked, 0.1 + 0.1 * chance)):
        assert int(part.sum()) == pytest.approx(n * share, abs=4 * math.sqrt(n * share * (1 - share)))
    assert torch.equal(seen[~asked], rows[~asked])
    assert not asked[:, [0, -1]].any()
    assert set(seen[asked].tolist()) == set(range(3, mask + 1))  # no special token but the mask


def test_positions_begin_as_rotations_of_each_other():
    from roberta import waves

    table = waves(20, 16, 0.05)
    assert table.std().item() == pytest.approx(0.05, rel=0.3)
    products = table @ table.T
    for distance in range(1, 6):  # the product of two positions depends on their distance alone
        torch.testing.assert_close(products.diagonal(distance), products[0, distance].expand(20 - distance))
