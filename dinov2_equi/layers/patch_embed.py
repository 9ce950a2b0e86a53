"""Images to patch tokens."""

from __future__ import annotations

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cut an image into square patches and project each to a token."""

    def __init__(
        self, img_size: int | tuple[int, int] = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768
    ) -> None:
        """Build the projection.

        Args:
            img_size: size the model is built for, pixels, a number or (H, W); other sizes are accepted later.
            patch_size: side of a patch, pixels.
            in_chans: channels of the image.
            embed_dim: width D of a token.

        Raises:
            ValueError: if a side of `img_size` is not a multiple of the patch.
        """
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        self.patch_size = patch_size
        self.patches_resolution = self.grid_size(height, width)
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the patch grid (h, w) of an image.

        Raises:
            ValueError: if the image cannot be cut into whole patches.
        """
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"expected an image whose height and width are multiples of the patch size {self.patch_size}, "
                f"got (H, W) = ({height}, {width}); resize or crop it first"
            )
        return height // self.patch_size, width // self.patch_size

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to tokens [B, N, D], row by row of the grid.

        Raises:
            ValueError: if the tensor is not a batch of images with `in_chans` channels made of whole patches.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images of shape [B, {self.in_chans}, H, W], got {list(x.shape)}")
        self.grid_size(x.shape[2], x.shape[3])
        tokens: Tensor = self.proj(x)  # [B, D, h, w]
        return tokens.flatten(2).transpose(1, 2)  # [B, N, D]
