"""The change of a layer's weight W [out, in, ...] that each algorithm's tensors stand for, at multiplier 1.

`out` and `in` are the layer's sizes, r a rank; a convolution's weight has its kernel behind them. At another multiplier
m, all programs that apply adapters use W + m delta, and so does everything here. (LyCORIS alone moves DoRA and BOFT
along another path between m = 0 and 1; the ends are the same.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]  # of a layer, under their names in `library.adapters.keys`


def lora(tensors: Tensors, weight: Tensor | None) -> Tensor:
    """(alpha / r) B A (arXiv:2106.09685); with a core between them the Tucker form of LyCORIS (arXiv:2309.14859)."""
    up, down = tensors["up"].flatten(1), tensors["down"]  # [out, r], [r, in, ...]
    scale = _scale(tensors, len(down))
    if "mid" in tensors:
        return scale * _tucker(tensors["mid"], up, down.flatten(1))
    return (scale * up @ down.flatten(1)).unflatten(1, down.shape[1:])


def loha(tensors: Tensors, weight: Tensor | None) -> Tensor:
    """(alpha / r) (A1 B1) * (A2 B2), elementwise (FedPara, arXiv:2108.06098), each of them also in Tucker form."""
    halves = []
    for number in "12":
        a, b = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
        core = tensors.get(f"hada_t{number}")
        halves.append(a.flatten(1) @ b.flatten(1) if core is None else _tucker(core, a.T, b))
    return _scale(tensors, len(tensors["hada_w1_b"])) * halves[0] * halves[1]


def lokr(tensors: Tensors, weight: Tensor | None) -> Tensor:
    """(alpha / r) times the Kronecker product of two matrices (arXiv:2309.14859), each of which may be low rank.

    The second has the kernel of a convolution. Where neither is low rank there is no r, and alpha does not count.
    """
    first, _ = _factor(tensors, "lokr_w1")
    second, kernel = _factor(tensors, "lokr_w2")
    ranks = [len(tensors[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in tensors]
    product = torch.kron(first, second)
    change = _scale(tensors, ranks[-1]) * product if ranks else product
    return change.unflatten(1, (-1, *kernel)) if kernel else change


def oft(tensors: Tensors, weight: Tensor) -> Tensor:
    """R W - W with orthogonal blocks R: OFT (arXiv:2306.07280), and BOFT where stages follow (arXiv:2311.06243).

    Blocks are by Cayley's transform of skew-symmetric ones, whose norm is limited to `alpha` times the outputs where
    alpha is given; files of the first LyCORIS have R itself. `rescale` multiplies the outputs.
    """
    rotations = tensors.get("oft_diag")
    if rotations is None:
        rotations = _cayley(tensors["oft_blocks"], _alpha(tensors, 0.0) * len(weight))
    if rotations.ndim == 3:
        blocks = weight.reshape(*rotations.shape[:2], -1)  # [blocks, size, in * ...]
        turned = (rotations.transpose(1, 2) @ blocks).reshape(weight.shape)
    else:
        turned = _butterfly(rotations, weight)
    if "rescale" in tensors:
        turned = turned * tensors["rescale"].reshape(-1, *[1] * (weight.ndim - 1))
    return turned - weight


def glora(tensors: Tensors, weight: Tensor) -> Tensor:
    """(alpha / r) (W A + B), both low rank (arXiv:2306.07967)."""
    a = tensors["a1"].flatten(1) @ tensors["a2"].flatten(1)  # [in, in]
    b = tensors["b1"].flatten(1) @ tensors["b2"].flatten(1)
    changed = torch.einsum("oi...,ij->oj...", weight, a) + b.reshape(weight.shape)
    return _scale(tensors, len(tensors["a2"])) * changed


def ia3(tensors: Tensors, weight: Tensor) -> Tensor:
    """W times a learned vector (arXiv:2205.05638), over its inputs or its outputs."""
    shape = [1] * weight.ndim
    shape[1 if tensors["on_input"].flatten()[0] else 0] = -1
    return weight * tensors["weight"].reshape(shape)


def full(tensors: Tensors, weight: Tensor | None) -> Tensor:
    """The change itself."""
    return tensors["diff"]


def bias_only(tensors: Tensors, weight: Tensor) -> Tensor:
    """Nothing: the layer's bias alone changes."""
    return torch.zeros_like(weight)


def norm(tensors: Tensors, weight: Tensor | None) -> Tensor:
    """The change itself, of a normalisation's weight."""
    return tensors["w_norm"]


def decomposed(change: Tensor, magnitude: Tensor, weight: Tensor) -> Tensor:
    """DoRA (arXiv:2402.09353, eq. 5): W + change is scaled to a learned norm; the answer is the change of W.

    Norms are of each output (`magnitude` [out, 1, ...], or [out]) or of each input ([1, in, ...]).
    """
    merged = weight + change.reshape(weight.shape)
    axis = 1 if magnitude.ndim > 1 and len(magnitude) == 1 and magnitude.shape[1] != 1 else 0
    others = [index for index in range(weight.ndim) if index != axis]
    norms = merged.square().sum(dim=others, keepdim=True).sqrt() + torch.finfo(merged.dtype).eps
    return merged * (magnitude.reshape(norms.shape) / norms) - weight


def _alpha(tensors: Tensors, default: float) -> float:
    return float(tensors["alpha"].flatten()[0]) if "alpha" in tensors else default


def _scale(tensors: Tensors, rank: int) -> float:
    return _alpha(tensors, rank) / rank


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """[out, in, ...] of a core [r, r, ...], outputs [out, r] and inputs [r, in]."""
    return torch.einsum("mn...,om,ni->oi...", core, up, down)


def _factor(tensors: Tensors, name: str) -> tuple[Tensor, tuple[int, ...]]:
    """A factor of a Kronecker product [out, in * ...], and its kernel where its tensors tell it."""
    if name in tensors:
        whole = tensors[name]
        return whole.flatten(1), tuple(whole.shape[2:])
    a, b, core = tensors[f"{name}_a"], tensors[f"{name}_b"], tensors.get("lokr_t2" if name == "lokr_w2" else "")
    if core is None:
        return a @ b.flatten(1), tuple(b.shape[2:])
    whole = _tucker(core, a.T, b)
    return whole.flatten(1), tuple(whole.shape[2:])


def _cayley(blocks: Tensor, limit: float) -> Tensor:
    """(1 + Q)(1 - Q)^-1 with Q = blocks - blocks^T, whose norm over all blocks is at most `limit` unless that is 0."""
    skew = blocks - blocks.transpose(-1, -2)
    if limit > 0:
        norm = skew.norm()
        skew = skew * torch.where(norm > limit, limit / (norm + 1e-8), 1.0)
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    return torch.linalg.solve(one - skew, one + skew, left=False)


def _butterfly(rotations: Tensor, weight: Tensor) -> Tensor:
    """Stages [stages, blocks, b, b] one after the other; stage i turns outputs that are 2^i b / 2 apart."""
    rows = weight.flatten(1)  # [out, in * ...]
    size = rotations.shape[-1]
    order = torch.arange(len(rows))
    for stage, blocks in enumerate(rotations):
        near = order.reshape(-1, 2, 2**stage * (size // 2)).transpose(1, 2).flatten()
        turned = blocks @ rows[near].reshape(len(blocks), size, -1)
        rows = torch.empty_like(rows).index_copy_(0, near, turned.reshape(rows.shape))
    return rows.reshape(weight.shape)


@dataclass(frozen=True)
class Algorithm:
    """How a layer of a file is turned into a change of weight."""

    delta: Callable[[Tensors, Tensor | None], Tensor]
    needs_weight: bool = False


ALGORITHMS = {  # by their names in `library.adapters.keys`
    "lora": Algorithm(lora),
    "loha": Algorithm(loha),
    "lokr": Algorithm(lokr),
    "oft": Algorithm(oft, needs_weight=True),
    "glora": Algorithm(glora, needs_weight=True),
    "ia3": Algorithm(ia3, needs_weight=True),
    "full": Algorithm(full),
    "bias": Algorithm(bias_only, needs_weight=True),
    "norm": Algorithm(norm),
}
