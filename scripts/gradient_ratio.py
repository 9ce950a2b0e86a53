"""Compare the pull of the reconstruction loss with that of the SSL losses on the last block of a trained run.

    python scripts/gradient_ratio.py --run runs/quickstart

Prints the gradient norms of the last block for one batch of training images, for the losses as they are weighted in the
run and for `equi.loss_weight` = 1, and their ratio.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402 (after the path guard)

from dinov2_equi.config.derive import derive  # noqa: E402
from dinov2_equi.data.loaders import on_device  # noqa: E402
from dinov2_equi.train import build  # noqa: E402
from dinov2_equi.train.loop import load_finished  # noqa: E402
from dinov2_equi.train.settings import load_run_config  # noqa: E402
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch  # noqa: E402


def last_block_gradient(model: SSLMetaArch) -> torch.Tensor:
    """Return the gradient of the student's last block as one vector, and clear all gradients."""
    block = model.student["backbone"].block_list()[-1]  # type: ignore[operator]
    gradient = torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return gradient


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="run folder with reconstruction (equi.loss_weight > 0)")
    run = parser.parse_args().run
    cfg = load_run_config(run / "config.yaml")
    derived = derive(cfg, world_size=1)
    state = load_finished(cfg, derived, device=torch.device("cpu"), output_dir=run)
    dataset, _ = build.build_datasets(cfg)
    loader = build.build_loader(cfg, derived, dataset, start_step=0, pin_memory=False)
    batch = on_device(next(iter(loader)), torch.device("cpu"))
    weight = cfg.equi.loss_weight
    if weight == 0:
        raise SystemExit(
            f"error: {run} is a run without reconstruction (equi.loss_weight=0): there is nothing to compare"
        )
    state.model.forward_backward(batch, teacher_temp=cfg.teacher.teacher_temp)
    both = last_block_gradient(state.model)
    state.model.cfg.equi.loss_weight = 0.0  # the decoder stays: only the factor of its loss changes
    state.model.forward_backward(batch, teacher_temp=cfg.teacher.teacher_temp)
    ssl = last_block_gradient(state.model)
    equi = both - ssl
    sys.stdout.write(
        f"gradient norm at the last block, after step {state.step}\n"
        f"  SSL losses                     {ssl.norm():.4f}\n"
        f"  reconstruction, weight {weight:<7g} {equi.norm():.4f}   ratio {equi.norm() / ssl.norm():.4f}\n"
        f"  reconstruction, weight 1       {equi.norm() / weight:.6f}   ratio {equi.norm() / weight / ssl.norm():.6f}\n"
    )


if __name__ == "__main__":
    main()
