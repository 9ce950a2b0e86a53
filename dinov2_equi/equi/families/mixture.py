"""A family drawn for each image: what a batch meets in its second view differs from image to image."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dinov2_equi.equi.families.base import DrawnFromUnit, TransformFamily


class Mixture(DrawnFromUnit):
    """One of several families for each image, all with the same probability.

    The parameters of all members stand side by side; those of the members that were not drawn are zero, which is the
    identity. The first parameter is the number of the drawn member.
    """

    def __init__(self, members: Mapping[str, TransformFamily]) -> None:
        """Join families by name.

        Raises:
            ValueError: if there are fewer than two.
        """
        if len(members) < 2:
            raise ValueError(f"a mixture needs at least two families, got {', '.join(members) or 'none'}")
        self.members = dict(members)
        widths = [len(member.param_names) for member in self.members.values()]
        self._columns = [slice(*ends) for ends in pairwise(accumulate(widths, initial=1))]
        self.num_uniforms = 1 + sum(member.num_uniforms for member in self.members.values())
        self.param_names: tuple[str, ...] = (
            "member",
            *(f"{name}.{param}" for name, member in self.members.items() for param in member.param_names),
        )

    def from_unit(self, unit: Tensor) -> Tensor:
        """See `TransformFamily.from_unit`; the first number chooses the member, the others are the members' own."""
        drawn = (unit[:, 0] * len(self.members)).floor()  # [B]
        theta = torch.zeros(len(unit), len(self.param_names))
        theta[:, 0] = drawn
        for index, (columns, member) in enumerate(zip(self._columns, self.members.values(), strict=True)):
            is_drawn = (drawn == index)[:, None]
            theta[:, columns] = torch.where(is_drawn, member.from_unit(unit[:, columns]), 0.0)
        return theta

    def scale(self, theta: Tensor, fraction: float) -> Tensor:
        """See `TransformFamily.scale`; the number of the member stays."""
        return torch.cat([theta[..., :1], theta[..., 1:] * fraction], dim=-1)

    def normalized(self, theta: Tensor) -> Tensor:
        """See `TransformFamily.normalized`; the number of the member runs from -1 to 1 as well.

        Zeros of a member that was not drawn may lie below its range, as those of the blur do: they count as its end.
        """
        member = 2 * theta[..., :1].cpu() / (len(self.members) - 1) - 1
        parts = zip(self._columns, self.members.values(), strict=True)
        shares = [family.normalized(theta[..., columns]).clamp(-1, 1) for columns, family in parts]
        return torch.cat([member, *shares], dim=-1)

    def apply(self, images: Tensor, theta: Tensor) -> Tensor:
        """See `TransformFamily.apply`. Each member sees the images that drew it, all in one call."""
        steps = theta if theta.dim() == 3 else theta.unsqueeze(0)  # [S, B, P]
        results = images.new_empty((len(steps), *images.shape), dtype=torch.float32)
        drawn = steps[0, :, 0]  # [B], the same for all steps
        for index, (columns, member) in enumerate(zip(self._columns, self.members.values(), strict=True)):
            rows = (drawn == index).nonzero().flatten()  # on the CPU as long as theta is: no wait for the device
            if len(rows):
                here = rows.to(images.device)
                results[:, here] = member.apply(images[here], steps[:, rows, columns])
        return results if theta.dim() == 3 else results.squeeze(0)
