"""What is needed to meet a step again whose loss or gradient was not finite, and the search for where it began."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_equi.config.load import to_yaml
from dinov2_equi.config.schema import Config
from dinov2_equi.data.batch import Batch
from dinov2_equi.distributed.env import is_main_process
from dinov2_equi.distributed.rank_group import rank_group
from dinov2_equi.fsdp.checkpoint import CheckpointStore, read_checkpoint
from dinov2_equi.fsdp.manifest import CheckpointError
from dinov2_equi.models.weights import load_exact
from dinov2_equi.train.settings import load_run_config
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch
from dinov2_equi.train.state import TrainState, set_random_state

FOLDER = "replay"
CONFIG = "config.yaml"


def write_bundle(
    output_dir: Path, state: TrainState, cfg: Config, *, batch: Batch, rng: dict[str, Tensor], teacher_temp: float
) -> Path:
    """Write model, batch and random state of a step that was not finite and return the folder; every rank must call it.

    Same format as a checkpoint: safetensors and JSON with a manifest, no pickle.

    Args:
        output_dir: the run's folder.
        state: the run; a step that is not finite leaves the weights as they were before it.
        cfg: its configuration.
        batch: what the step was given; that of the main process is written.
        rng: the random state before the step, of `random_state`.
        teacher_temp: temperature of the teacher's softmax in the step.
    """
    store = CheckpointStore(output_dir / FOLDER, keep=1, ranks=rank_group())
    if is_main_process():
        (output_dir / FOLDER / CONFIG).write_text(to_yaml(cfg), encoding="utf-8")
    tensors = {
        "model": state.model.state_dict(),
        "batch": batch.tensors(),
        "rng": rng,
    }
    return store.save(state.step, tensors, {"teacher_temp": teacher_temp})


@dataclass(frozen=True)
class Replay:
    """What a step does when it is run again.

    Attributes:
        losses: by name.
        first_module: name of the first module whose output is not finite, or None.
        gradients: names of the parameters whose gradient is not finite.
    """

    losses: dict[str, float]
    first_module: str | None
    gradients: list[str]

    @property
    def is_finite(self) -> bool:
        """Whether nothing of it is NaN or infinite."""
        losses = torch.tensor(list(self.losses.values()))
        return bool(losses.isfinite().all()) and self.first_module is None and not self.gradients


def replay_step(bundle: Path, device: torch.device) -> Replay:
    """Run the step of a bundle again, up to its gradients.

    Raises:
        CheckpointError: if the bundle is damaged or is none.
        OSError: if there is nothing at this path.
    """
    content = read_checkpoint(bundle)
    if not {"model", "batch", "rng"} <= content.tensors.keys():
        raise CheckpointError(f"{bundle} is a checkpoint, and no bundle of a step: give RUN/{FOLDER}/step_N")
    cfg = load_run_config([bundle.parent / CONFIG], [])
    model = SSLMetaArch(cfg)
    load_exact(model, content.tensors["model"])
    model.to(device).train()
    set_random_state(dict(content.tensors["rng"]))
    tensors: dict[str, Any] = dict(content.tensors["batch"])
    batch = Batch(**tensors).to(device)
    broken: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(_note_if_broken(name, broken))
    output = model.forward_backward(batch, teacher_temp=float(content.state["teacher_temp"]))
    gradients = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    losses = {name: float(value) for name, value in output.losses.items()}
    return Replay(losses, broken[0] if broken else None, gradients)


def _note_if_broken(name: str, broken: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    """Return a hook that adds the module's name where its output is a tensor that is not finite."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            broken.append(name)

    return hook
