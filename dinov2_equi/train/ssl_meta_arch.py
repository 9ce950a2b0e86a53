"""Student, teacher, losses, and one training step of DINOv2 with the equivariance branch."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.transforms import normalize
from dinov2_equi.distributed.collectives import all_reduce_sum_
from dinov2_equi.distributed.env import is_distributed
from dinov2_equi.equi.branch import EquivarianceBranch
from dinov2_equi.equi.metrics import feature_metrics, gradient_ratio
from dinov2_equi.equi.reconstruction import Reconstruction
from dinov2_equi.equi.tokens import EquiTargets, EquiTokens
from dinov2_equi.equi.views import EquiViews
from dinov2_equi.fsdp.ema import update_ema_
from dinov2_equi.loss.dino_clstoken_loss import DINOLoss
from dinov2_equi.loss.ibot_patch_loss import iBOTPatchLoss
from dinov2_equi.loss.koleo_loss import KoLeoLoss
from dinov2_equi.loss.vicreg_loss import VICRegLoss
from dinov2_equi.models.vision_transformer import Features
from dinov2_equi.train import build_model
from dinov2_equi.train.collapse import collapse_metrics
from dinov2_equi.train.micro_batches import BackbonePass
from dinov2_equi.train.outputs import Preview, StepOutput, StudentOutputs, TeacherTargets, Views
from dinov2_equi.train.precision import autocast

NUM_GLOBAL_CROPS = 2
"""DINO's cross-view loss and the branch are both defined on a pair of global crops."""


class SSLMetaArch(nn.Module):
    """Student and teacher with DINO, iBOT, KoLeo and VICReg losses, and the equivariance branch where configured.

    `student` and `teacher` are module dictionaries with DINOv2's keys (`backbone`, `dino_head`, and `ibot_head` where
    it is separate), plus `feature_split` when a transform family is set. The decoder belongs to the branch alone, and
    VICReg's expander has no teacher either.
    """

    def __init__(self, cfg: Config) -> None:
        """Build all modules from a validated configuration; the teacher starts as a copy of the student."""
        super().__init__()
        self.cfg = cfg
        self.student = build_model.build_student(cfg)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.equi: EquivarianceBranch | None = build_model.build_branch(cfg)
        self.expander = build_model.build_expander(cfg)
        self.has_prototypes = max(cfg.dino.loss_weight, cfg.ibot.loss_weight) > 0
        has_objective = self.equi is not None and self.equi.objective is not None
        self._teacher_is_source = has_objective and cfg.equi.source_2 == "teacher"
        block = build_model.equi_block(cfg) if has_objective else None
        self._more_blocks = () if block is None else (block,)
        ibot_head = cfg.ibot if cfg.ibot.separate_head else cfg.dino
        self.dino_loss = DINOLoss(cfg.dino.head_n_prototypes)
        self.ibot_patch_loss = iBOTPatchLoss(ibot_head.head_n_prototypes)
        self.koleo_loss = KoLeoLoss()
        self.vicreg_loss = VICRegLoss()

    # ------------------------------------------------------------------------------------------------ one step

    def forward_backward(self, batch: Batch, *, teacher_temp: float, diagnose: bool = False) -> StepOutput:
        """Run one step up to the gradients.

        Args:
            batch: crops in [0, 1], on the training device except `positions`.
            teacher_temp: temperature of the teacher's softmax.
            diagnose: also measure how far the features tell images apart, how the losses pull and how the two parts
                of the features are used. Costs two more backward passes through heads and decoder; changes no gradient.

        Returns:
            Losses and metrics, detached. Gradients are in `.grad`; centres and teacher are not touched yet.
        """
        metrics: dict[str, Tensor] = {}
        with autocast(self.cfg, batch.global_crops.device):
            views = self._make_views(batch)
            features = self._teacher_features(views)
            teacher = self._teacher_targets(features, batch, teacher_temp)
            seen = self._pass_of_student(views, batch)
            student = self._student_outputs(seen.features, batch)
            losses = self._ssl_losses(student, teacher, batch)
            if diagnose:
                metrics = self._signs_of_collapse(student, features, teacher)
            if self.equi is not None and views.equi_targets is not None:
                output = self.equi(*self._branch_tokens(student, features), views.equi_targets)
                metrics |= output.metrics | (self._diagnose(student, losses, output.loss) if diagnose else {})
                losses["equi_loss"] = output.loss
            total = self._weighted_sum(losses)
        total.backward()
        seen.backward()
        detached = {name: loss.detach() for name, loss in losses.items()}
        return StepOutput(detached | {"total_loss": total.detach()}, metrics, teacher)

    @torch.no_grad()
    def update_teacher(self, output: StepOutput, momentum: float) -> None:
        """Move the teacher towards the student and the centres towards this step's means.

        Call it after the optimiser step, and only for a step whose losses and gradients were finite.
        """
        update_ema_(self.teacher, self.student, momentum)
        if output.teacher is not None and self.cfg.train.centering == "centering":
            self.dino_loss.update_center(output.teacher.dino_mean)
            if output.teacher.ibot_mean is not None:
                self.ibot_patch_loss.update_center(output.teacher.ibot_mean)

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Preview:
        """Return views, targets and reconstructions of a batch, unmasked.

        Raises:
            ValueError: if this run reconstructs nothing.
        """
        if self.equi is None or not isinstance(self.equi.objective, Reconstruction):
            raise ValueError(
                "nothing can be reconstructed: equi.family or equi.loss_weight is not set, or theta is the target"
            )
        crops_1, crops_2 = batch.global_crops.chunk(NUM_GLOBAL_CROPS)
        views = self.equi.make_views(crops_2, batch.positions, self.cfg.train.seed)
        images = self._normalize(torch.cat([crops_1, views.view_2]))
        tokens = self._tokens_of(self.student, images)
        if self._teacher_is_source:
            tokens = (tokens[0], self._tokens_of(self.teacher, images)[1])
        targets = self._equi_targets(self.equi, views, batch)
        return Preview(
            view_1=crops_1,
            view_2=views.view_2,
            targets=self.equi.objective.resized(targets.images),
            reconstructions=self.equi.objective.reconstruct(*tokens, (crops_2.shape[-2], crops_2.shape[-1])),
        )

    # ------------------------------------------------------------------------------------------------ parts of it

    def _make_views(self, batch: Batch) -> Views:
        crops_1, crops_2 = batch.global_crops.chunk(NUM_GLOBAL_CROPS)  # [B, 3, H, W] each
        view_2, targets = crops_2, None
        if self.equi is not None:
            equi_views = self.equi.make_views(crops_2, batch.positions, self.cfg.train.seed)
            view_2 = equi_views.view_2
            if self.equi.objective is not None:
                targets = self._equi_targets(self.equi, equi_views, batch)
        return Views(self._normalize(torch.cat([crops_1, view_2])), self._normalize(batch.local_crops), targets)

    def _equi_targets(self, branch: EquivarianceBranch, views: EquiViews, batch: Batch) -> EquiTargets:
        crops_1, crops_2 = batch.global_crops.chunk(NUM_GLOBAL_CROPS)
        return branch.make_targets(
            crops_1, crops_2, views, batch.masks, positions=batch.positions, seed=self.cfg.train.seed
        )

    def _normalize(self, images: Tensor) -> Tensor:
        return normalize(images, self.cfg.data.mean, self.cfg.data.std)

    @torch.no_grad()
    def _teacher_features(self, views: Views) -> Features | None:
        """Return what the teacher sees in the global crops, or None where no loss asks."""
        if not self.has_prototypes and not self._teacher_is_source:
            return None
        blocks = self._more_blocks if self._teacher_is_source else ()
        return self._pass_through(self.teacher, [views.global_crops], [None], blocks).features[0]

    def _pass_of_student(self, views: Views, batch: Batch) -> BackbonePass:
        crops: list[Tensor] = [views.global_crops]
        masks: list[Tensor | None] = [batch.masks]
        if len(views.local_crops):
            crops.append(views.local_crops)
            masks.append(None)
        return self._pass_through(self.student, crops, masks, self._more_blocks)

    def _pass_through(
        self, network: nn.ModuleDict, crops: list[Tensor], masks: list[Tensor | None], blocks: tuple[int, ...]
    ) -> BackbonePass:
        return BackbonePass(
            network["backbone"],  # type: ignore[arg-type]
            crops,
            masks,
            num_parts=self.cfg.train.gradient_accumulation_steps,
            batch_size=len(crops[0]) // NUM_GLOBAL_CROPS,
            more_blocks=blocks,
            precision=lambda: autocast(self.cfg, crops[0].device),
        )

    @torch.no_grad()
    def _teacher_targets(self, features: Features | None, batch: Batch, temperature: float) -> TeacherTargets | None:
        if features is None or not self.has_prototypes:
            return None
        # The crops swap places: crop 1 of the student predicts crop 2 of the teacher, and the reverse.
        cls_1, cls_2 = self._invariant(self.teacher, features["x_norm_clstoken"]).chunk(NUM_GLOBAL_CROPS)
        cls = torch.cat([cls_2, cls_1])  # [G*B, D_inv]
        masked = self._masked_patches(self.teacher, features["x_norm_patchtokens"], batch)  # [M, D_inv]
        cls_logits, patch_logits = self._apply_heads(self.teacher, cls, masked)
        dino = self._assign(self.dino_loss, cls_logits, temperature)  # [G*B, K]
        return TeacherTargets(
            dino=dino.unflatten(0, (NUM_GLOBAL_CROPS, -1)),
            ibot=None if patch_logits is None else self._assign(self.ibot_patch_loss, patch_logits, temperature),
            dino_mean=_mean_logits(cls_logits),
            ibot_mean=None if patch_logits is None else _mean_logits(patch_logits),
        )

    def _assign(self, loss: DINOLoss | iBOTPatchLoss, logits: Tensor, temperature: float) -> Tensor:
        """Return the teacher's prototype probabilities for logits [*, K], by the configured centring."""
        if self.cfg.train.centering == "centering":
            return loss.softmax_center_teacher(logits, temperature)
        return loss.sinkhorn_knopp_teacher(logits, temperature)

    def _student_outputs(self, features: list[Features], batch: Batch) -> StudentOutputs:
        patches = features[0]["x_norm_patchtokens"]  # [G*B, N, D]
        cls = [self._invariant(self.student, f["x_norm_clstoken"]) for f in features]  # [G*B, D_inv], [L*B, D_inv]
        dino_global = dino_local = patch_logits = None
        if self.has_prototypes:
            masked = self._masked_patches(self.student, patches, batch)  # [M, D_inv]
            cls_logits, patch_logits = self._apply_heads(self.student, torch.cat(cls), masked)
            dino_global, dino_local = cls_logits.tensor_split([len(batch.global_crops)])
        return StudentOutputs(
            cls_global=cls[0],
            dino_global=dino_global,
            dino_local=dino_local,
            ibot_masked=patch_logits,
            vicreg=self._embeddings(patches, cls[0]),
            features=features,
        )

    def _ssl_losses(self, student: StudentOutputs, teacher: TeacherTargets | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms as DINOv2 logs them; `_weighted_sum` knows their factors."""
        losses = {} if teacher is None else self._prototype_losses(student, teacher, batch)
        if self.cfg.dino.koleo_loss_weight > 0:
            koleo = sum(self.koleo_loss(cls) for cls in student.cls_global.chunk(NUM_GLOBAL_CROPS))
            losses["koleo_loss"] = self.cfg.dino.koleo_loss_weight * koleo / NUM_GLOBAL_CROPS
        if student.vicreg is not None:
            terms = self.vicreg_loss(*student.vicreg)
            losses |= {f"vicreg_{name}_loss": term for name, term in terms._asdict().items()}
        return losses

    def _prototype_losses(self, student: StudentOutputs, teacher: TeacherTargets, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropies between student and teacher: DINO's and iBOT's."""
        assert student.dino_global is not None  # there is a teacher
        assert student.dino_local is not None
        num_crops = batch.num_local_crops
        num_terms = NUM_GLOBAL_CROPS * num_crops + NUM_GLOBAL_CROPS  # pairs (local, teacher) and (global, other)
        losses = {}
        if num_crops:
            local = self.dino_loss(list(student.dino_local.chunk(num_crops)), list(teacher.dino))
            losses["dino_local_crops_loss"] = local / num_terms
        both = self.dino_loss([student.dino_global], [teacher.dino.flatten(0, 1)])  # mean over G*B
        losses["dino_global_crops_loss"] = both * NUM_GLOBAL_CROPS / num_terms
        if student.ibot_masked is not None and teacher.ibot is not None:
            ibot = self.ibot_patch_loss.forward_masked(
                student.ibot_masked, teacher.ibot, batch.mask_weights, len(batch.masks)
            )
            losses["ibot_loss"] = ibot / NUM_GLOBAL_CROPS
        return losses

    def _weighted_sum(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the optimised loss: the logged terms times the factors DINOv2 gives them.

        DINOv2 logs KoLeo and iBOT as means over the two global crops but optimises their sums, hence the factor 2.
        """
        vicreg = self.cfg.vicreg
        factors = {
            "dino_local_crops_loss": self.cfg.dino.loss_weight,
            "dino_global_crops_loss": self.cfg.dino.loss_weight,
            "koleo_loss": NUM_GLOBAL_CROPS,
            "ibot_loss": NUM_GLOBAL_CROPS * self.cfg.ibot.loss_weight,
            "vicreg_invariance_loss": vicreg.loss_weight * vicreg.invariance_weight,
            "vicreg_variance_loss": vicreg.loss_weight * vicreg.variance_weight,
            "vicreg_covariance_loss": vicreg.loss_weight * vicreg.covariance_weight,
            "equi_loss": self.cfg.equi.loss_weight,
        }
        return torch.stack([factors[name] * loss.float() for name, loss in losses.items()]).sum()

    # ------------------------------------------------------------------------------------------------ features

    @staticmethod
    def _invariant(network: nn.ModuleDict, tokens: Tensor) -> Tensor:
        """Return the channels that the SSL losses see: all of them without the branch."""
        if "feature_split" not in network:
            return tokens
        invariant: Tensor = network["feature_split"].invariant(tokens)  # type: ignore[operator]
        return invariant

    def _masked_patches(self, network: nn.ModuleDict, patches: Tensor, batch: Batch) -> Tensor | None:
        """Return the invariant part [M, D_inv] of the masked patches, or None without iBOT."""
        if self.cfg.ibot.loss_weight == 0:
            return None
        return self._invariant(network, patches.flatten(0, 1).index_select(0, batch.mask_indices))

    @staticmethod
    def _apply_heads(network: nn.ModuleDict, cls: Tensor, patches: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return logits of class tokens [*, K] and masked patches [M, K]; a shared head runs once over both."""
        if patches is None:
            return network["dino_head"](cls), None
        if "ibot_head" in network:
            return network["dino_head"](cls), network["ibot_head"](patches)
        cls_logits, patch_logits = network["dino_head"](torch.cat([cls, patches])).split([len(cls), len(patches)])
        return cls_logits, patch_logits

    def _embeddings(self, patches: Tensor, cls: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return VICReg's embeddings [B, E] of both global views, or None without it.

        `patches` [G*B, N, D] are whole tokens, `cls` [G*B, D_inv] is the invariant part already. Each view passes the
        expander on its own: its batch norm must not see both at once.
        """
        if self.expander is None:
            return None
        is_cls = self.cfg.vicreg.features == "cls"
        # The split is linear: the invariant part of the mean is the mean of the invariant parts.
        features = cls if is_cls else self._invariant(self.student, patches.mean(dim=1))
        view_1, view_2 = features.chunk(NUM_GLOBAL_CROPS)
        return self.expander(view_1), self.expander(view_2)

    def _branch_tokens(self, student: StudentOutputs, teacher: Features | None) -> tuple[EquiTokens, EquiTokens]:
        """Return the equivariant tokens of view 1, from the student, and of view 2, from the configured network."""
        view_1, view_2 = self._equivariant_tokens(self.student, student.features[0])
        if teacher is not None and self._teacher_is_source:
            view_2 = self._equivariant_tokens(self.teacher, teacher)[1]
        return view_1, view_2

    def _tokens_of(self, network: nn.ModuleDict, images: Tensor) -> tuple[EquiTokens, EquiTokens]:
        """Return the equivariant tokens of both views from one pass over their normalised images [G*B, 3, H, W]."""
        return self._equivariant_tokens(
            network, network["backbone"](images, is_training=True, more_blocks=self._more_blocks)
        )

    def _equivariant_tokens(self, network: nn.ModuleDict, features: Features) -> tuple[EquiTokens, EquiTokens]:
        """Return the equivariant part of both global views, from the configured block."""
        cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]
        if self._more_blocks:
            (tokens,) = features["x_norm_blocks"]
            cls, patches = tokens[:, 0], tokens[:, -patches.shape[1] :]
        split = network["feature_split"]
        views = split.equivariant(patches).chunk(NUM_GLOBAL_CROPS)  # type: ignore[operator]
        if not self.cfg.equi.use_cls:
            return EquiTokens(views[0]), EquiTokens(views[1])
        cls_views = split.equivariant(cls).chunk(NUM_GLOBAL_CROPS)  # type: ignore[operator]
        return EquiTokens(views[0], cls_views[0]), EquiTokens(views[1], cls_views[1])

    def _diagnose(self, student: StudentOutputs, losses: dict[str, Tensor], equi_loss: Tensor) -> dict[str, Tensor]:
        """Return how the features are used, and how hard the branch pulls at them against the SSL losses.

        The pull is measured where both see the same tokens: the normalised output of the last block.
        """
        split = self.student["feature_split"]
        patches = student.features[0]["x_norm_patchtokens"].flatten(0, 1)
        metrics = feature_metrics(split.invariant(patches), split.equivariant(patches))  # type: ignore[operator]
        if losses and not self._more_blocks:
            # No loss reads the patch tokens of local crops.
            tokens = [f["x_norm_clstoken"] for f in student.features] + [student.features[0]["x_norm_patchtokens"]]
            branch, ssl = self._weighted_sum({"equi_loss": equi_loss}), self._weighted_sum(losses)
            metrics["equi/gradient_ratio"] = gradient_ratio(branch, ssl, tokens)
        return metrics

    def _signs_of_collapse(
        self, student: StudentOutputs, features: Features | None, targets: TeacherTargets | None
    ) -> dict[str, Tensor]:
        """Return how far the teacher, or the student where there is none, tells images apart in the invariant part."""
        network, seen = (self.student, student.features[0]) if features is None else (self.teacher, features)
        cls, patches = (self._invariant(network, seen[name]) for name in ("x_norm_clstoken", "x_norm_patchtokens"))
        return collapse_metrics(cls, patches, None if targets is None else targets.dino.flatten(0, 1))

    # ------------------------------------------------------------------------------------------------ bookkeeping

    def trainable_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the sub-networks that the optimiser updates, by name; gradients are clipped for each on its own."""
        yield from self.student.items()
        if self.equi is not None and self.equi.objective is not None:
            yield "equi_decoder", self.equi.objective
        if self.expander is not None:
            yield "vicreg_expander", self.expander

    def train(self, mode: bool = True) -> SSLMetaArch:
        """Set the mode of the student and the branch; the teacher always stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self


def _mean_logits(logits: Tensor) -> Tensor:
    """Return the float32 mean [1, K] of the logits [R, K] of all ranks; [0, K] without any, which moves no centre."""
    if not is_distributed():
        return logits.float().mean(dim=0, keepdim=True) if len(logits) else logits.float()
    total = all_reduce_sum_(torch.cat([logits.float().sum(dim=0), logits.new_tensor([len(logits)]).float()]))  # [K + 1]
    return total[None, :-1] / total[-1] if total[-1] > 0 else total[None, :-1][:0]
