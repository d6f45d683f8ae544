"""Which keys of an adapter file belong to which layer, and which algorithm made it. Needs no torch."""

from collections.abc import Iterable
from dataclasses import dataclass

# The ends of keys, and what stands under them. Several programs have names of their own for LoRA.
ENDS = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B": "up",
    ".lora_A": "down",
    ".lora.up.weight": "up",
    ".lora.down.weight": "down",
    "_lora.up.weight": "up",
    "_lora.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_magnitude_vector": "dora_scale",
    ".lora_magnitude_vector.weight": "dora_scale",
    ".lora_magnitude_vector.default.weight": "dora_scale",
    ".a1.weight": "a1",
    ".a2.weight": "a2",
    ".b1.weight": "b1",
    ".b2.weight": "b2",
} | {
    f".{name}": name
    for name in (
        *("alpha", "dora_scale", "rescale", "weight", "on_input", "diff", "diff_b", "w_norm", "b_norm"),
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        *("oft_blocks", "oft_diag"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The tensors that layers of one algorithm have in files."""

    needed: frozenset[str]
    optional: frozenset[str] = frozenset()

    def fits(self, parts: frozenset[str]) -> bool:
        return self.needed <= parts <= self.needed | self.optional


def _shape(needed: str, optional: str = "") -> Shape:
    return Shape(frozenset(needed.split()), frozenset(optional.split()))


# The variants of each algorithm; the first that fits all tensors of a layer counts.
ALGORITHMS: dict[str, tuple[Shape, ...]] = {
    "lora": (_shape("up down", "mid alpha dora_scale diff_b"),),
    "loha": (
        _shape("hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "alpha dora_scale diff_b"),
        _shape("hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2", "alpha dora_scale diff_b"),
    ),
    "lokr": tuple(
        _shape(f"{first} {second}", "alpha dora_scale diff_b")
        for first in ("lokr_w1", "lokr_w1_a lokr_w1_b")
        for second in ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_w2_a lokr_w2_b lokr_t2")
    ),
    "oft": (_shape("oft_blocks", "alpha rescale diff_b"), _shape("oft_diag", "alpha rescale diff_b")),
    "glora": (_shape("a1 a2 b1 b2", "alpha diff_b"),),
    "ia3": (_shape("weight on_input", "diff_b"),),
    "full": (_shape("diff", "alpha diff_b"),),
    "bias": (_shape("diff_b"),),
    "norm": (_shape("w_norm", "b_norm"),),
}


@dataclass(frozen=True)
class LayerKeys:
    """One layer of a file: its name there, what made it, and the key of each of its tensors."""

    name: str
    algorithm: str  # a key of ALGORITHMS
    keys: dict[str, str]  # by what stands under them: "up", "down", "alpha", ...


@dataclass(frozen=True)
class FileKeys:
    """All layers of a file by name, in its order, and the keys that no algorithm has."""

    layers: dict[str, LayerKeys]
    leftovers: list[str]


def split_key(key: str) -> tuple[str, str] | None:
    """The layer of a key and what stands under it; None where it ends like no adapter's."""
    found = [end for end in ENDS if key.endswith(end) and len(key) > len(end)]
    end = max(found, key=len, default=None)
    return (key.removesuffix(end), ENDS[end]) if end else None


def algorithm_of(parts: Iterable[str]) -> str | None:
    """The algorithm whose layers have these tensors."""
    parts = frozenset(parts)
    return next((name for name, shapes in ALGORITHMS.items() if any(shape.fits(parts) for shape in shapes)), None)


def sort_keys(keys: Iterable[str]) -> FileKeys:
    """The layers that the keys of a file make up."""
    found: dict[str, dict[str, str]] = {}
    leftovers = []
    for key in keys:
        split = split_key(key)
        if split is None or split[1] in found.get(split[0], {}):
            leftovers.append(key)
        else:
            found.setdefault(split[0], {})[split[1]] = key
    layers = {}
    for name, parts in found.items():
        algorithm = algorithm_of(parts)
        if algorithm is None:
            leftovers += parts.values()
        else:
            layers[name] = LayerKeys(name, algorithm, parts)
    return FileKeys(layers, leftovers)
