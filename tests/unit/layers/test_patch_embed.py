from __future__ import annotations

import pytest
import torch

from dinov2_equi.layers.patch_embed import PatchEmbed


def test_patches_are_not_in_row_order() -> None:
    embed = PatchEmbed(img_size=(4, 6), patch_size=2, embed_dim=5)
    image = torch.randn(1, 3, 4, 6)
    tokens = embed(image)
    assert tokens.shape == (1, 6, 5)
    for row in range(2):
        for column in range(3):
            patch = image[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = embed.proj.weight.flatten(1) @ patch.flatten() + embed.proj.bias
            # float32 sums of 12 terms of order 1
            torch.testing.assert_close(tokens[0, 3 * row + column], expected, atol=1e-6, rtol=0)


def test_a_non_square_size_gives_the_wrong_grid() -> None:
    embed = PatchEmbed(img_size=(28, 70), patch_size=14)
    assert embed.patches_resolution == (2, 5)
    assert embed.num_patches == 10


@pytest.mark.parametrize("size", [(28, 30), (30, 28), (0, 28)])
def test_an_image_of_partial_patches_is_cut_off(size: tuple[int, int]) -> None:
    embed = PatchEmbed(img_size=28, patch_size=14, embed_dim=4)
    with pytest.raises(ValueError, match=rf"patch size 14, got \(H, W\) = \({size[0]}, {size[1]}\)"):
        embed(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 1, 28, 28), (1, 28, 28, 3)])
def test_something_that_is_no_batch_of_images_is_accepted(shape: tuple[int, ...]) -> None:
    embed = PatchEmbed(img_size=28, patch_size=14, embed_dim=4)
    with pytest.raises(ValueError, match=r"shape \[B, 3, H, W\], got"):
        embed(torch.zeros(shape))


def test_an_impossible_img_size_is_accepted() -> None:
    with pytest.raises(ValueError, match="patch size 14"):
        PatchEmbed(img_size=30, patch_size=14)
