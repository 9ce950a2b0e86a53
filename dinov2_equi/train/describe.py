"""What a training step costs, part by part: parameters and floating-point operations, without allocating a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinov2_equi.config.schema import Config, EquiConfig
from dinov2_equi.equi.feature_split import FeatureSplit
from dinov2_equi.equi.tokens import EquiTargets, EquiTokens
from dinov2_equi.models.registry import ARCHS
from dinov2_equi.train.ssl_meta_arch import NUM_GLOBAL_CROPS, SSLMetaArch


@dataclass(frozen=True)
class Part:
    """One part of a step.

    Attributes:
        name: `backbone`, `DINO head`, `iBOT head`, `split`, `decoder`, `theta regression` or `VICReg expander`.
        network: `student` (forward and backward) or `teacher` (forward alone).
        parameters: how many it holds; 0 where they are counted in another part.
        flops: floating-point operations for one image, a product and a sum counted as two.
        in_branch: whether a run without the branch lacks it.
    """

    name: str
    network: str
    parameters: int
    flops: float
    in_branch: bool = False


@dataclass(frozen=True)
class StepCost:
    """Cost of one image in a training step.

    Attributes:
        parts: in the order in which a step meets them.
        flops_without_branch: of the same step with `equi.family` null.
    """

    parts: tuple[Part, ...]
    flops_without_branch: float

    @property
    def flops(self) -> float:
        """Operations of all parts."""
        return sum(part.flops for part in self.parts)

    @property
    def branch_flops(self) -> float:
        """Operations of the parts that a run without the branch lacks."""
        return sum(part.flops for part in self.parts if part.in_branch)

    @property
    def branch_share(self) -> float:
        """Operations of the branch over those of the same step without it."""
        return self.branch_flops / self.flops_without_branch

    @property
    def step_increase(self) -> float:
        """By which share the whole step grows: the branch, and the heads, whose input has another width."""
        return self.flops / self.flops_without_branch - 1


def describe_step(cfg: Config) -> StepCost:
    """Return what one image costs in a training step of a validated configuration.

    Counted are the matrix products, convolutions and attention, as `torch.utils.flop_counter` counts them, on the meta
    device: a batch of `train.batch_size_per_gpu` images as a step runs it, stochastic depth included, divided by its
    size. The masked patches are at their expected number. Left out: the losses, the transforms, the optimiser and the
    moving average.
    """
    parts = _count_parts(cfg)
    baseline = _count_parts(replace(cfg, equi=EquiConfig())) if any(part.in_branch for part in parts) else parts
    return StepCost(parts, sum(part.flops for part in baseline))


def expected_masked_patches(cfg: Config) -> int:
    """Return M, the number of masked patches in a batch: the mean of the configured ratios in each masked crop.

    The blocks of a mask may fall a little short of the number wanted; that is not counted.
    """
    num_masked_crops = int(NUM_GLOBAL_CROPS * cfg.train.batch_size_per_gpu * cfg.ibot.mask_sample_probability)
    return round(num_masked_crops * _num_patches(cfg) * sum(cfg.ibot.mask_ratio_min_max) / 2)


def _num_patches(cfg: Config) -> int:
    side = cfg.crops.global_crops_size // cfg.student.patch_size
    return side * side


def _count_parts(cfg: Config) -> tuple[Part, ...]:
    with torch.device("meta"):
        counter = _PartCounter(cfg, SSLMetaArch(cfg).train())
        kinds = (counter.backbones(), counter.splits(), counter.heads(), counter.expander(), counter.objective())
        return tuple(part for parts in kinds for part in parts)


class _PartCounter:
    """Runs the parts of a model on the meta device, each with inputs of the shapes that a step gives it."""

    def __init__(self, cfg: Config, model: SSLMetaArch) -> None:
        self.cfg = cfg
        self.model = model
        self.split = _find_split(model)
        self.has_objective = model.equi is not None and model.equi.objective is not None
        self.source_is_teacher = self.has_objective and cfg.equi.source_2 == "teacher"
        self.batch_size = cfg.train.batch_size_per_gpu  # B
        self.num_globals = NUM_GLOBAL_CROPS * self.batch_size
        self.num_locals = cfg.crops.local_crops_number * self.batch_size
        self.num_masked = expected_masked_patches(cfg) if model.has_prototypes and cfg.ibot.loss_weight > 0 else 0  # M
        self.width = ARCHS[cfg.student.arch].embed_dim  # D

    def backbones(self) -> Iterator[Part]:
        """Yield the student's backbone on all crops, and the teacher's on the global ones."""
        student, teacher = self.model.student["backbone"], self.model.teacher["backbone"]
        crops = [_images(self.cfg, self.num_globals, self.cfg.crops.global_crops_size)]
        masks: list[Tensor | None] = [torch.zeros(self.num_globals, _num_patches(self.cfg), dtype=torch.bool)]
        if self.num_locals:
            crops.append(_images(self.cfg, self.num_locals, self.cfg.crops.local_crops_size))
            masks.append(None)

        def run_student() -> list[Tensor]:
            features = student(crops, masks=masks, is_training=True)
            return [f[name] for f in features for name in ("x_norm_clstoken", "x_norm_patchtokens")]

        yield self._part("backbone", "student", student, _trained(run_student))
        if self.model.has_prototypes or self.source_is_teacher:
            flops = _frozen(lambda: teacher(crops[0], is_training=True))
            yield self._part("backbone", "teacher", teacher, flops, in_branch=not self.model.has_prototypes)

    def splits(self) -> Iterator[Part]:
        """Yield the projection before the split: of each token that is used, the half that is needed."""
        if self.split is None:
            return
        equivariant = [self.num_globals * _num_patches(self.cfg)] if self.has_objective else []
        if self.has_objective and self.cfg.equi.use_cls:
            equivariant.append(self.num_globals)
        invariant = [self.num_globals, self.num_locals, self.num_masked]  # class tokens, masked patches
        if self.model.expander is not None and self.cfg.vicreg.features == "patch_mean":
            invariant.append(self.num_globals)
        student, teacher = self.split, self.model.teacher["feature_split"]
        assert isinstance(teacher, FeatureSplit)
        flops = _trained(lambda: self._halves(student, invariant, equivariant))
        yield self._part("split", "student", student, flops, in_branch=True)
        invariant = [self.num_globals, self.num_masked] if self.model.has_prototypes else []
        equivariant = equivariant if self.source_is_teacher else []
        flops = _frozen(lambda: self._halves(teacher, invariant, equivariant))
        yield self._part("split", "teacher", teacher, flops, in_branch=True)

    def _halves(self, split: FeatureSplit, invariant: Iterable[int], equivariant: Iterable[int]) -> list[Tensor]:
        """Return both parts, each of several groups of so many tokens."""
        first = [split.invariant(_tokens(rows, self.width)) for rows in invariant]
        return first + [split.equivariant(_tokens(rows, self.width)) for rows in equivariant]

    def heads(self) -> Iterator[Part]:
        """Yield the heads: of the class tokens of all crops (teacher: the global ones), and of the masked patches."""
        if not self.model.has_prototypes:
            return
        yield from self._head("DINO head", "dino_head", self.num_globals + self.num_locals, self.num_globals)
        if "ibot_head" in self.model.student:
            yield from self._head("iBOT head", "ibot_head", self.num_masked, self.num_masked)
        else:
            yield from self._head("iBOT head", "dino_head", self.num_masked, self.num_masked, is_shared=True)

    def _head(
        self, name: str, key: str, student_rows: int, teacher_rows: int, *, is_shared: bool = False
    ) -> Iterator[Part]:
        in_dim = self.width if self.split is None else self.split.invariant_dim
        student, teacher = self.model.student[key], self.model.teacher[key]
        flops = _trained(lambda: [student(_tokens(student_rows, in_dim))])
        yield self._part(name, "student", student, flops, is_shared=is_shared)
        flops = _frozen(lambda: teacher(_tokens(teacher_rows, in_dim)))
        yield self._part(name, "teacher", teacher, flops, is_shared=is_shared)

    def expander(self) -> Iterator[Part]:
        """Yield VICReg's head, where there is one."""
        expander = self.model.expander
        if expander is not None:
            in_dim = self.width if self.split is None else self.split.invariant_dim
            views = [_tokens(self.batch_size, in_dim) for _ in range(NUM_GLOBAL_CROPS)]
            flops = _trained(lambda: [expander(view) for view in views])
            yield self._part("VICReg expander", "student", expander, flops)

    def objective(self) -> Iterator[Part]:
        """Yield what finds the target in the equivariant tokens, where there is a loss for it."""
        branch, equi = self.model.equi, self.cfg.equi
        if branch is None or branch.objective is None:
            return
        num_images = branch.target.num_images(equi.num_steps, include_final=equi.include_final)
        images = _images(self.cfg, num_images * self.batch_size, self.cfg.crops.global_crops_size)
        num_patches = _num_patches(self.cfg)
        num_drawn = branch.num_drawn_patches(num_patches)
        targets = EquiTargets(
            images=images.unflatten(0, (num_images, self.batch_size)),  # [S, B, 3, H, W]
            theta=torch.empty(self.batch_size, len(branch.family.param_names)),
            chosen=torch.zeros(self.batch_size, num_drawn, dtype=torch.int64) if num_drawn < num_patches else None,
        )
        view_1, view_2 = self._view(is_trained=True), self._view(is_trained=not self.source_is_teacher)
        flops = _trained(lambda: [branch(view_1, view_2, targets).loss])
        name = "theta regression" if branch.target.is_theta else "decoder"
        yield self._part(name, "student", branch.objective, flops, in_branch=True)

    def _view(self, *, is_trained: bool) -> EquiTokens:
        assert self.split is not None  # where there is an objective
        patches = _tokens(self.batch_size, _num_patches(self.cfg), self.split.equi_dim, is_trained=is_trained)
        if not self.cfg.equi.use_cls:
            return EquiTokens(patches)
        return EquiTokens(patches, _tokens(self.batch_size, self.split.equi_dim, is_trained=is_trained))

    def _part(
        self,
        name: str,
        network: str,
        module: nn.Module,
        flops: int,
        *,
        in_branch: bool = False,
        is_shared: bool = False,
    ) -> Part:
        parameters = 0 if is_shared else sum(parameter.numel() for parameter in module.parameters())
        return Part(name, network, parameters, flops / self.batch_size, in_branch)


def _find_split(model: SSLMetaArch) -> FeatureSplit | None:
    if "feature_split" not in model.student:
        return None
    split = model.student["feature_split"]
    assert isinstance(split, FeatureSplit)
    return split


def _tokens(*shape: int, is_trained: bool = True) -> Tensor:
    return torch.empty(shape, requires_grad=is_trained)


def _images(cfg: Config, count: int, side: int) -> Tensor:
    return torch.empty(count, cfg.data.in_channels, side, side)


def _trained(forward: Callable[[], list[Tensor]]) -> int:
    """Return the operations of a forward pass and of the backward pass from all its outputs."""
    # The plain attention: its operations are counted as they are, the same on every machine.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sums = [output.sum() for output in forward()]
        torch.stack(sums).sum().backward()
    return int(counter.get_total_flops())


def _frozen(forward: Callable[[], object]) -> int:
    """Return the operations of a forward pass alone."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward()
    return int(counter.get_total_flops())
