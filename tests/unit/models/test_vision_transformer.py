from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2_equi.models.registry import build_backbone
from dinov2_equi.models.vision_transformer import DinoVisionTransformer, drop_path_rates

PATCH = 4
WIDTH = 48  # of vit_test_tiny


def tiny(**kwargs: Any) -> DinoVisionTransformer:
    torch.manual_seed(0)
    arguments = {"img_size": 16, "patch_size": PATCH, "init_values": 1.0} | kwargs
    return build_backbone("vit_test_tiny", **arguments)


def images(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randn(batch, 3, height, width, generator=generator)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("size", [(16, 16), (8, 20), (20, 8)])
def test_shapes_are_wrong(registers: int, size: tuple[int, int]) -> None:
    model = tiny(num_register_tokens=registers)
    num_patches = size[0] * size[1] // PATCH**2
    features = model(images(2, *size), is_training=True)
    assert features["x_norm_clstoken"].shape == (2, WIDTH)
    assert features["x_norm_regtokens"].shape == (2, registers, WIDTH)
    assert features["x_norm_patchtokens"].shape == (2, num_patches, WIDTH)
    assert features["x_prenorm"].shape == (2, 1 + registers + num_patches, WIDTH)
    assert features["masks"] is None


def test_a_list_of_crops_differs_from_one_crop_at_a_time() -> None:
    model = tiny(num_register_tokens=2).eval()
    crops = [images(2, 16, 16), images(3, 8, 8), images(1, 8, 12)]
    masks = [torch.rand(2, 16) < 0.5, None, None]
    for together, crop, mask in zip(model(crops, masks, is_training=True), crops, masks, strict=True):
        alone = model(crop, mask, is_training=True)
        for name in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"):
            # float32; a matrix product over more rows may sum in another order
            torch.testing.assert_close(together[name], alone[name], atol=1e-5, rtol=0)
        assert together["masks"] is mask


def test_gradients_of_a_list_differ_from_those_of_single_crops() -> None:
    crops = [images(2, 16, 16), images(3, 8, 8)]
    together, alone = tiny(), tiny()
    sum(out.square().sum() for out in together(crops)).backward()
    sum(alone(crop).square().sum() for crop in crops).backward()
    for (name, parameter), other in zip(together.named_parameters(), alone.parameters(), strict=True):
        if parameter.grad is None:
            assert name == "mask_token"
            continue
        scale = other.grad.abs().max().clamp_min(1e-3)
        # float32 sums in another order, relative to the largest gradient of the tensor
        torch.testing.assert_close(parameter.grad / scale, other.grad / scale, atol=1e-4, rtol=0)


def test_no_local_crops_are_an_error() -> None:
    model = tiny().train()
    features = model([images(2, 16, 16), torch.zeros(0, 3, 8, 8)], is_training=True)
    assert features[1]["x_norm_clstoken"].shape == (0, WIDTH)
    torch.testing.assert_close(features[0]["x_prenorm"], model(images(2, 16, 16), is_training=True)["x_prenorm"])


def test_stochastic_depth_of_a_list_leaves_no_gradient() -> None:
    model = tiny(drop_path_rate=0.5, drop_path_uniform=True).train()
    crops = [images(4, 16, 16), images(6, 8, 8)]
    masks = [torch.arange(16).expand(4, 16) < 5, None]
    sum(out.square().sum() for out in model(crops, masks)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_the_forward_pass_does_not_apply_the_head_to_the_class_token() -> None:
    model = tiny().eval()
    x = images(2, 16, 16)
    class_token = model.forward_features(x)["x_norm_clstoken"]
    torch.testing.assert_close(model(x), class_token, rtol=0, atol=0)
    model.head = nn.Linear(WIDTH, 5)
    torch.testing.assert_close(model(x), model.head(class_token), rtol=0, atol=0)
    assert [tuple(out.shape) for out in model([x, images(1, 8, 8)])] == [(2, 5), (1, 5)]


def test_a_masked_patch_is_still_seen() -> None:
    model = tiny().eval()
    nn.init.normal_(model.mask_token)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True  # row 1, column 1 of the 4 x 4 grid
    x = images(1, 16, 16)
    changed = x.clone()
    changed[:, :, 4:8, 4:8] += 1.0
    torch.testing.assert_close(model(x, mask), model(changed, mask), rtol=0, atol=0)
    assert not torch.equal(model(x), model(changed))


def test_masking_everything_or_nothing_is_not_what_it_says() -> None:
    model = tiny().eval()
    nn.init.normal_(model.mask_token)
    x = images(2, 16, 16)
    nothing = torch.zeros(2, 16, dtype=torch.bool)
    torch.testing.assert_close(model(x, nothing), model(x), rtol=0, atol=0)
    everything = model(x, ~nothing)
    torch.testing.assert_close(everything[0], everything[1], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 15), (1, 16), (2, 4, 4)])
def test_masks_of_another_size_are_accepted(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"masks of shape \[2, 16\], got"):
        tiny()(images(2, 16, 16), torch.zeros(shape, dtype=torch.bool))


def test_masks_that_do_not_pair_with_crops_are_accepted() -> None:
    model, crop, mask = tiny(), images(2, 16, 16), torch.zeros(2, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="got a list of masks"):
        model(crop, [mask])
    with pytest.raises(ValueError, match="got a tensor"):
        model([crop], mask)
    with pytest.raises(ValueError, match="as many masks as crop sizes"):
        model([crop, crop], [mask])
    with pytest.raises(ValueError, match="at least one"):
        model([])


def test_the_position_embedding_is_touched_at_its_own_size() -> None:
    model = tiny(img_size=(8, 20))
    assert model.interpolate_pos_encoding(8, 20) is model.pos_embed


def test_height_and_width_of_the_position_embedding_are_swapped() -> None:
    model = tiny(img_size=(16, 24), interpolate_offset=0.0)
    with torch.no_grad():
        model.pos_embed[0, 1:] = torch.arange(6).repeat(4).unsqueeze(1)  # grows from left to right only
    grid = model.interpolate_pos_encoding(32, 24)[0, 1:, 0].view(8, 6)
    torch.testing.assert_close(grid, torch.arange(6.0).expand(8, 6), atol=1e-5, rtol=0)  # bicubic weights sum to 1


@pytest.mark.parametrize(("offset", "antialias"), [(0.1, False), (0.0, True), (0.0, False)])
@pytest.mark.parametrize("size", [(8, 8), (24, 12), (12, 28)])
def test_position_interpolation_differs_from_dinov2(offset: float, antialias: bool, size: tuple[int, int]) -> None:
    model = tiny(interpolate_offset=offset, interpolate_antialias=antialias)
    grid = (size[0] // PATCH, size[1] // PATCH)
    stored = model.pos_embed[:, 1:].reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
    how: dict[str, Any] = {"scale_factor": ((grid[0] + 0.1) / 4, (grid[1] + 0.1) / 4)} if offset else {"size": grid}
    expected = functional.interpolate(stored, mode="bicubic", antialias=antialias, **how)
    actual = model.interpolate_pos_encoding(*size)
    torch.testing.assert_close(actual[:, :1], model.pos_embed[:, :1], rtol=0, atol=0)
    torch.testing.assert_close(actual[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2), rtol=0, atol=0)


def test_positions_are_interpolated_in_half_precision() -> None:
    model = tiny()
    expected = model.interpolate_pos_encoding(8, 8)
    half = model.to(torch.bfloat16).interpolate_pos_encoding(8, 8)
    assert half.dtype == torch.bfloat16
    # The stored values are rounded to 8 bits once; a second rounding of every step would be several times larger.
    torch.testing.assert_close(half.float(), expected, atol=0.02 * 2**-6, rtol=2**-7)


def test_an_offset_that_changes_the_grid_is_accepted() -> None:
    with pytest.raises(ValueError, match=r"interpolate_offset 1.5 turns the patch grid \(2, 2\) into \(3, 3\)"):
        tiny(interpolate_offset=1.5)(images(1, 8, 8))


def test_registers_get_a_position() -> None:
    model = tiny(num_register_tokens=2)
    tokens = model.prepare_tokens_with_masks(images(2, 16, 16))
    torch.testing.assert_close(tokens[:, 1:3], model.register_tokens.expand(2, -1, -1), rtol=0, atol=0)
    torch.testing.assert_close(tokens[0, 0], (model.cls_token + model.pos_embed[:, :1])[0, 0], rtol=0, atol=0)


@pytest.mark.parametrize("norm", [True, False])
def test_intermediate_layers_differ_from_the_blocks(norm: bool) -> None:
    model = tiny(num_register_tokens=2).eval()
    x = images(2, 8, 12)
    tokens = model.prepare_tokens_with_masks(x)
    expected = []
    for block in model.block_list():
        tokens = block(tokens)
        expected.append(model.norm(tokens) if norm else tokens)
    last_two = model.get_intermediate_layers(x, n=2, norm=norm)
    chosen = model.get_intermediate_layers(x, n=[0, 2], norm=norm, reshape=True, return_class_token=True)
    # float32, packed and plain products
    torch.testing.assert_close(last_two[0], expected[1][:, 3:], atol=1e-6, rtol=0)
    torch.testing.assert_close(chosen[1][1], expected[2][:, 0], atol=1e-6, rtol=0)
    assert chosen[0][0].shape == (2, WIDTH, 2, 3)
    torch.testing.assert_close(chosen[0][0][:, :, 1, 2], expected[0][:, 3 + 5], atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [0, 4, [3], [-1], []])
def test_a_block_that_does_not_exist_is_accepted(n: int | list[int]) -> None:
    with pytest.raises(ValueError, match="n between 1 and 3"):
        tiny().get_intermediate_layers(images(1, 16, 16), n=n)


@pytest.mark.parametrize("chunks", [0, 2])
def test_more_blocks_differ_from_the_intermediate_layers(chunks: int) -> None:
    model = tiny(num_register_tokens=2, block_chunks=chunks).eval()
    x = images(2, 8, 12)
    features = model(x, is_training=True, more_blocks=(2, 0))
    expected = model.get_intermediate_layers(x, n=[0, 2], return_class_token=True)
    assert len(features["x_norm_blocks"]) == 2
    for tokens, (patches, cls) in zip(features["x_norm_blocks"], reversed(expected), strict=True):  # in the order asked
        assert tokens.shape == (2, 1 + 2 + 6, WIDTH)
        assert torch.equal(tokens[:, 3:], patches)
        assert torch.equal(tokens[:, 0], cls)
    assert torch.equal(features["x_norm_blocks"][0][:, 3:], features["x_norm_patchtokens"])  # the last one is the end


def test_more_blocks_of_a_list_differ_from_those_of_single_crops() -> None:
    model = tiny().eval()
    crops, masks = [images(2, 16, 16), images(3, 8, 8)], [torch.rand(2, 16) < 0.5, None]
    for together, crop, mask in zip(model(crops, masks, True, (1,)), crops, masks, strict=True):
        (alone,) = model(crop, mask, is_training=True, more_blocks=(1,))["x_norm_blocks"]
        # float32; a matrix product over more rows may sum in another order
        torch.testing.assert_close(together["x_norm_blocks"][0], alone, atol=1e-5, rtol=0)


def test_more_blocks_change_the_other_features() -> None:
    model, x = tiny(drop_path_rate=0.5, drop_path_uniform=True).train(), images(4, 16, 16)
    outputs = []
    for more_blocks in ((), (0, 1)):
        torch.manual_seed(1)
        outputs.append(model(x, is_training=True, more_blocks=more_blocks))
    plain, more = outputs
    assert "x_norm_blocks" not in plain
    for name in set(plain) - {"masks"}:
        assert torch.equal(plain[name], more[name]), name


def test_more_blocks_get_no_gradient() -> None:
    model = tiny()
    (tokens,) = model(images(1, 8, 8), is_training=True, more_blocks=(1,))["x_norm_blocks"]
    tokens.square().sum().backward()
    first, second, last = ([p.grad is not None for p in block.parameters()] for block in model.block_list())
    assert all(first) and all(second) and not any(last)
    assert model.norm.weight.grad is not None


@pytest.mark.parametrize(
    ("chunks", "depth", "names"),
    [
        (0, 4, ["0", "1", "2", "3"]),
        (1, 4, ["0.0", "0.1", "0.2", "0.3"]),
        (2, 4, ["0.0", "0.1", "1.2", "1.3"]),
        (4, 4, ["0.0", "1.1", "2.2", "3.3"]),
        (2, 5, ["0.0", "0.1", "1.2", "1.3", "2.4"]),
    ],
)
def test_block_names_differ_from_dinov2(chunks: int, depth: int, names: list[str]) -> None:
    model = DinoVisionTransformer(16, 4, embed_dim=8, depth=depth, num_heads=2, block_chunks=chunks)
    keys = [key for key in model.state_dict() if key.endswith("norm1.weight")]
    assert keys == [f"blocks.{name}.norm1.weight" for name in names]
    assert len(model.block_list()) == depth


def test_block_chunks_change_the_output() -> None:
    x = images(2, 16, 16)
    torch.testing.assert_close(tiny(block_chunks=3)(x), tiny(block_chunks=0)(x), rtol=0, atol=0)


@pytest.mark.parametrize("chunks", [-1, 4])
def test_more_chunks_than_blocks_are_accepted(chunks: int) -> None:
    with pytest.raises(ValueError, match=f"between 0 and the depth 3, got {chunks}"):
        tiny(block_chunks=chunks)


def test_drop_rates_do_not_rise_to_the_given_one() -> None:
    assert drop_path_rates(0.3, 4, uniform=False) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 3, uniform=True) == [0.3] * 3
    assert [block.drop_path for block in tiny(drop_path_rate=0.2).block_list()] == pytest.approx([0.0, 0.1, 0.2])


def test_initial_weights_differ_from_dinov2() -> None:
    model = DinoVisionTransformer(64, 4, embed_dim=192, depth=1, num_heads=3, num_register_tokens=4, init_values=1e-5)
    block = model.block_list()[0]
    # 36864 to 147456 draws: the standard deviation is known to better than 2 %; cut at 2, not at 2 standard deviations.
    for weight in (block.attn.qkv.weight, block.attn.proj.weight, block.mlp.fc1.weight, model.pos_embed):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert abs(weight.mean().item()) < 5e-4
    for bias in (block.attn.qkv.bias, block.attn.proj.bias, block.mlp.fc2.bias, block.norm1.bias, model.mask_token):
        assert (bias == 0).all()
    for token in (model.cls_token, model.register_tokens):
        assert 0 < token.abs().max() < 1e-5
    assert (block.ls1.gamma == 1e-5).all()
    bound = (3 * 4 * 4) ** -0.5  # torch's default for a convolution
    assert 0.9 * bound < model.patch_embed.proj.weight.abs().max() <= bound


@pytest.mark.parametrize("name", ["swiglu", "swiglufused"])
def test_the_two_names_of_swiglu_differ(name: str) -> None:
    keys = [key for key in tiny(ffn_layer=name).state_dict() if ".0.mlp." in key]
    assert keys == [f"blocks.0.mlp.{key}" for key in ("w12.weight", "w12.bias", "w3.weight", "w3.bias")]


def test_the_identity_feed_forward_has_weights() -> None:
    model = tiny(ffn_layer="identity")
    assert not any(".mlp." in key for key in model.state_dict())
    assert torch.isfinite(model(images(1, 16, 16))).all()


def test_an_unknown_feed_forward_layer_is_accepted() -> None:
    with pytest.raises(ValueError, match="unknown ffn_layer 'relu'; known: mlp, swiglu, swiglufused, identity"):
        tiny(ffn_layer="relu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_fails_or_strays(dtype: torch.dtype) -> None:
    x = images(2, 8, 8)
    expected = tiny().eval()(x)
    half = tiny().eval().to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    # Three blocks of 8-bit roundings; the normalised outputs are of order 1.
    torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0)


def test_a_greyscale_model_cannot_be_built() -> None:
    assert tiny(in_chans=1)(torch.zeros(1, 1, 16, 16)).shape == (1, WIDTH)
