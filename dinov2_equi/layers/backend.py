"""Choice of the attention kernel: the only module that imports xFormers.

Three ways compute the same thing, attention inside each image of a packed batch:

* `sdpa`: one call of torch's `scaled_dot_product_attention` for each crop size. Works everywhere.
* `xformers`: one call for all crop sizes with a block-diagonal mask. CUDA only.
* `varlen`: one call for all crop sizes with torch's `varlen_attn`. CUDA, 16-bit floats only.

On CUDA the first of `xformers`, `varlen` that runs forward and backward on a tiny input and agrees with `sdpa` is used;
elsewhere `sdpa`. The environment variable `DINOV2_EQUI_ATTENTION` set to one of the three names forces that one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from dinov2_equi.layers.packing import TokenLayout, split_groups

BACKEND_VARIABLE = "DINOV2_EQUI_ATTENTION"
BACKEND_NAMES = ("sdpa", "xformers", "varlen")

AttendFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor, TokenLayout], Tensor]

_HALF_DTYPES = frozenset({torch.float16, torch.bfloat16})
_PROBE_LAYOUT: TokenLayout = ((2, 5), (3, 4))
_PROBE_TOLERANCE = 0.05  # bfloat16 keeps 8 bits, and the probe's values are of order 1


@dataclass(frozen=True)
class AttentionBackend:
    """An attention function, its name and why it was chosen."""

    name: str
    reason: str
    attend: AttendFunction
    """Maps query, key, value [R, heads, head_dim] and their layout to [R, heads, head_dim]."""


_chosen: dict[tuple[str, int | None, str], AttentionBackend] = {}
"""No `functools.cache`: torch.compile looks through one, and would choose anew inside of each graph."""


def attention_backend(device: torch.device) -> AttentionBackend:
    """Return the attention backend of a device, chosen on the first call and cached.

    Raises:
        ValueError: if `DINOV2_EQUI_ATTENTION` is not a known name.
        RuntimeError: if it names a backend that does not work on this device.
    """
    key = (device.type, device.index, os.environ.get(BACKEND_VARIABLE, ""))
    if key not in _chosen:
        _chosen[key] = _choose_backend(*key)
    return _chosen[key]


def describe_backend(device: torch.device) -> str:
    """Return one line that names the backend of a device and says why it was chosen."""
    backend = attention_backend(device)
    return f"attention on {device}: {backend.name} ({backend.reason})"


def _choose_backend(device_type: str, index: int | None, forced: str) -> AttentionBackend:
    device = torch.device(device_type, index) if index is not None else torch.device(device_type)
    if forced:
        return _forced_backend(forced, device)
    if device_type != "cuda":
        return AttentionBackend("sdpa", "packing kernels need CUDA", attend_sdpa)
    rejections: list[str] = []
    for name in ("xformers", "varlen"):
        attend, problem = _try_candidate(name, device)
        if attend is not None:
            reason = "; ".join(["agrees with sdpa on this device", *rejections])
            return AttentionBackend(name, reason, attend)
        rejections.append(f"{name}: {problem}")
    return AttentionBackend("sdpa", "; ".join(rejections), attend_sdpa)


def _forced_backend(name: str, device: torch.device) -> AttentionBackend:
    if name not in BACKEND_NAMES:
        raise ValueError(f"expected {BACKEND_VARIABLE} to be one of {', '.join(BACKEND_NAMES)}, got {name!r}")
    reason = f"forced by {BACKEND_VARIABLE}"
    if name == "sdpa":
        return AttentionBackend(name, reason, attend_sdpa)
    attend, problem = (None, "needs CUDA") if device.type != "cuda" else _try_candidate(name, device)
    if attend is None:
        raise RuntimeError(
            f"{BACKEND_VARIABLE}={name} cannot be used on {device}: {problem}; unset it, or set it to sdpa"
        )
    return AttentionBackend(name, reason, attend)


def _try_candidate(name: str, device: torch.device) -> tuple[AttendFunction | None, str]:
    """Return the function of a candidate that works on `device`, or None and what is wrong with it."""
    try:
        attend = _load_xformers() if name == "xformers" else _load_varlen()
        difference = _difference_from_sdpa(attend, device)
    except Exception as error:  # any failure of a foreign kernel means "do not use it"; the reason is reported
        first_line = (str(error).splitlines() or [""])[0]
        return None, f"{type(error).__name__} {first_line[:120]}".strip()
    if not difference <= _PROBE_TOLERANCE:  # written so that NaN is refused
        return None, f"differs from sdpa by {difference:.2g}"
    return attend, ""


def _difference_from_sdpa(attend: AttendFunction, device: torch.device) -> float:
    """Return the largest difference from sdpa of outputs and gradients, in bfloat16 on a tiny input."""
    rows = sum(images * tokens for images, tokens in _PROBE_LAYOUT)
    generator = torch.Generator().manual_seed(0)
    # A head of 32 is what every kernel supports.
    qkv = torch.randn(3, rows, 2, 32, generator=generator).to(device, torch.bfloat16)
    results = []
    with torch.inference_mode(False), torch.enable_grad():
        for function in (attend, attend_sdpa):
            inputs = qkv.clone().requires_grad_()
            out = function(inputs[0], inputs[1], inputs[2], _PROBE_LAYOUT)
            (gradient,) = torch.autograd.grad(out.square().sum(), inputs)
            results.append((out.detach().float(), gradient.float()))
    (out, grad), (expected_out, expected_grad) = results
    return float(torch.maximum((out - expected_out).abs().max(), (grad - expected_grad).abs().max() / 4))


def attend_sdpa(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
    """Attend with one `scaled_dot_product_attention` call for each crop size.

    Args:
        query: [R, heads, head_dim], packed; `key` and `value` alike.
        key: see `query`.
        value: see `query`.
        layout: where each image lies in the rows.

    Returns:
        [R, heads, head_dim] in the dtype of `value`.
    """
    outputs = []
    groups = (split_groups(tensor, layout) for tensor in (query, key, value))
    for q, k, v in zip(*groups, strict=True):
        if not torch.compiler.is_compiling() and len(q) == 0:  # some kernels refuse an empty batch
            outputs.append(v.flatten(0, 1))
            continue
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )  # [B, heads, T, head_dim]
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [B*T, heads, head_dim]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _prefers_sdpa(query: Tensor, layout: TokenLayout, dtypes: frozenset[torch.dtype]) -> bool:
    """Whether packing gains nothing (one crop size) or the kernels do not take this dtype or head."""
    return len(layout) == 1 or query.dtype not in dtypes or query.shape[-1] % 8 != 0 or query.shape[-1] > 256


def _sequence_lengths(layout: TokenLayout) -> list[int]:
    return [tokens for images, tokens in layout for _ in range(images)]


def _load_varlen() -> AttendFunction:
    """Return attention through torch's `varlen_attn`."""
    varlen_attn: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def attend_varlen(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
        if _prefers_sdpa(query, layout, _HALF_DTYPES):
            return attend_sdpa(query, key, value, layout)
        starts = _sequence_starts(layout, query.device)
        longest = max(tokens for _, tokens in layout)
        out: Tensor = varlen_attn(query, key, value, starts, starts, longest, longest)
        return out

    return attend_varlen


@functools.lru_cache(maxsize=256)
def _sequence_starts(layout: TokenLayout, device: torch.device) -> Tensor:
    """Return the first row of each image and the number of rows, [images + 1] int32; cached to spare a host copy."""
    lengths = torch.tensor([0, *_sequence_lengths(layout)])
    # A tensor made in inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False):
        return lengths.cumsum(0).to(device, torch.int32)


def _load_xformers() -> AttendFunction:
    """Return attention through xFormers with a block-diagonal mask."""
    ops, masks = _import_xformers()
    dtypes = _HALF_DTYPES | {torch.float32}

    @functools.lru_cache(maxsize=256)
    def mask_of(layout: TokenLayout, device: torch.device) -> Any:
        with torch.inference_mode(False):
            return masks.BlockDiagonalMask.from_seqlens(_sequence_lengths(layout), device=device)

    def attend_xformers(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
        if _prefers_sdpa(query, layout, dtypes):
            return attend_sdpa(query, key, value, layout)
        bias = mask_of(layout, query.device)
        packed = (tensor.unsqueeze(0) for tensor in (query, key, value))  # each [1, R, heads, head_dim]
        out: Tensor = ops.memory_efficient_attention(*packed, attn_bias=bias)
        return out.squeeze(0)  # [R, heads, head_dim]

    return attend_xformers


def _import_xformers() -> tuple[Any, Any]:
    """Import xFormers without its warnings; it reports missing kernels of no concern here.

    Raises:
        ImportError: if it is not installed or cannot be loaded.
    """
    if importlib.util.find_spec("xformers") is None:
        raise ImportError("not installed")
    xformers_logger = logging.getLogger("xformers")
    level = xformers_logger.level
    xformers_logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("xformers.ops"), importlib.import_module("xformers.ops.fmha.attn_bias")
    finally:
        xformers_logger.setLevel(level)
