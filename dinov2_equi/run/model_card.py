"""The README.md beside exported weights: what they are, how they were made, what was measured, how to load them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dinov2_equi.hub.exporters import Source
from dinov2_equi.run.load import CONFIG_FILE, is_run

RESULTS_FILES = ("results.json", "knn.json", "eval/equivariance/results.json")
NOT_SHOWN = (
    "pooled_on_training_pairs",
    "per_output",
    "mean_absolute_error",
    "r2_by_pairs",
    "before training",
    "knn_transformed",
    "cosine",
    "num_",
)
"""Parts of the names of numbers that a card leaves to the results files."""

CODE_LICENCE = "apache-2.0"

_LOADING = {
    "safetensors": 'dinov2_equi.evaluation.model.load_backbone("{name}.safetensors")',
    "pth": 'dinov2_equi.evaluation.model.load_backbone("{name}_pretrain.pth")',
    "transformers": 'transformers.AutoModel.from_pretrained("transformers")',
    "timm": 'model.load_state_dict(safetensors.torch.load_file("{name}_timm.safetensors"))',
    "onnx": 'onnxruntime.InferenceSession("{name}.onnx").run(None, {{"image": images}})',
    "torchscript": 'torch.jit.load("{name}.torchscript.pt")(images)',
    "torch_export": 'torch.export.load("{name}.pt2").module()(images)',
}


def model_card(source: Source, weights: str, exported: Mapping[str, float | str]) -> str:
    """Return the card in Markdown, with the header that model hubs read."""
    backbone = source.backbone
    num_parameters = sum(parameter.numel() for parameter in backbone.parameters())
    lines = [
        "---",
        "library_name: dinov2_equi",
        "pipeline_tag: image-feature-extraction",
        "tags: [dinov2, self-supervised, vision-transformer, equivariance]",
        "---",
        "",
        f"# {source.name}",
        "",
        f"A vision transformer of DINOv2's architecture: width {backbone.embed_dim}, {backbone.n_blocks} blocks, "
        f"{backbone.num_heads} heads, patches of {backbone.patch_size} pixels, {backbone.num_register_tokens} "
        f"registers, {num_parameters / 1e6:.1f} million parameters. Position embedding made for {source.trained_size} "
        "pixels.",
        "",
        f"Images: RGB in [0, 1], less {_numbers(source.mean)}, over {_numbers(source.std)}; sides in multiples of "
        f"{backbone.patch_size} pixels.",
        "",
        "## Files",
        "",
        "| format | load it by | largest difference from the source |",
        "|---|---|---|",
    ]
    for name, result in exported.items():
        if not isinstance(result, str):
            lines.append(f"| {name} | `{_LOADING[name].format(name=source.name)}` | {result:.1e} |")
    lines += ["", *_training(weights), *_results(weights)]
    lines += [
        "## Licence",
        "",
        f"The code is under {CODE_LICENCE}. The licence of the weights is for whoever publishes them to choose; it "
        "must respect that of the training images.",
        "",
    ]
    return "\n".join(lines)


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _training(weights: str) -> list[str]:
    """Return the configuration of a run, as far as it is one."""
    if not is_run(weights):
        return ["## Training", "", f"Not known: the weights come from `{Path(weights).name}`.", ""]
    text = (Path(weights).expanduser() / CONFIG_FILE).read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    config["train"]["dataset_path"] = Path(str(config["train"]["dataset_path"])).name  # no path of somebody's machine
    config["train"].pop("output_dir", None)
    kept = {key: config[key] for key in ("train", "student", "optim", "crops", "dino", "ibot", "equi") if key in config}
    return [
        "## Training",
        "",
        f"Images: `{config['train']['dataset_path']}`. Configuration:",
        "",
        "```yaml",
        yaml.safe_dump(kept, sort_keys=False).rstrip(),
        "```",
        "",
    ]


def _results(weights: str) -> list[str]:
    """Return the numbers of the results files that a run holds."""
    if not is_run(weights):
        return []
    lines = []
    for name in RESULTS_FILES:
        path = Path(weights).expanduser() / name
        if path.is_file():
            document = json.loads(path.read_text(encoding="utf-8"))
            lines += [f"* {document['task']} (commit {str(document['commit'])[:8]}):"]
            shown = [pair for pair in _flat(document["numbers"]) if not any(part in pair[0] for part in NOT_SHOWN)]
            lines += [f"    * {key}: {value:.4g}" for key, value in shown]
    return ["## Measured", "", *lines, ""] if lines else []


def _flat(numbers: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return the single numbers of nested mappings, with means standing for repeated ones."""
    found: list[tuple[str, float]] = []
    for key, value in numbers.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += [(name, float(value["mean"]))] if "mean" in value else _flat(value, f"{name}, ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((name, float(value)))
    return found
