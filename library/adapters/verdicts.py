"""Whether the programs that load adapter files take one, and apply it exactly, by its header. Needs no torch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from library.adapters.consumers import (
    CONSUMERS,
    FORGE_ARCHITECTURES,
    JSON_OBJECTS,
    KINDS_IN_WEBUI,
    TRAITS,
    UNKNOWN_NAME,
    UNKNOWN_NAME_IS_AN_ERROR,
    VERDICTS,
    Consumer,
    Outcome,
    Verdict,
)
from library.adapters.file_kind import KIND_NAMES, kind_in_metadata, kind_of_file
from library.adapters.keys import LayerKeys, sort_keys, split_key
from library.adapters.spellings import layers_by_name
from library.adapters.traits import has_a_and_b, traits_of_layers
from library.errors import UserError, quoted_list
from library.safetensors_header import SafetensorsHeader, read_header

TRIED_DTYPES = {"F32", "F16", "BF16", "I64", "I32"}
NEEDS_MODEL = ("oft", "glora", "ia3", "dora")  # how traits begin that change a weight by what it is


@dataclass(frozen=True)
class Group:
    """Layers of a file of which the same is to be said."""

    label: str
    outcome: Outcome
    num_layers: int
    num_keys: int


@dataclass(frozen=True)
class ConsumerVerdict:
    """What one program makes of a file."""

    name: str
    groups: tuple[Group, ...]

    @property
    def is_refused(self) -> bool:
        """Whether it takes nothing of the file."""
        limit = CONSUMERS[self.name].max_unknown
        num_unknown = sum(group.num_keys for group in self.groups if group.outcome.verdict == "not applied")
        is_over = limit is not None and num_unknown > limit
        return is_over or any(group.outcome.verdict == "refused" for group in self.groups)

    @property
    def verdict(self) -> Verdict:
        """The worst of its layers'."""
        return "refused" if self.is_refused else worst(group.outcome for group in self.groups).verdict

    @property
    def num_taken(self) -> int:
        """The keys whose layers it changes."""
        if self.is_refused:
            return 0
        return sum(group.num_keys for group in self.groups if group.outcome.verdict != "not applied")


@dataclass(frozen=True)
class FileVerdict:
    """What all programs make of a file, and what its metadata does to it there."""

    path: Path
    kind: str
    num_keys: int
    consumers: tuple[ConsumerVerdict, ...]
    traits: frozenset[str]
    notes: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        return all(consumer.verdict == "exact" for consumer in self.consumers)

    @property
    def is_plain(self) -> bool:
        """Whether it is LoRA and nothing else, so that only names can be in the way."""
        return self.traits <= {"lora", "ab_alpha", "ab_alpha_of_rank"}

    @property
    def needs_model(self) -> bool:
        """Whether what it changes depends on the model's own weights."""
        return any(trait.startswith(NEEDS_MODEL) for trait in self.traits)


def verify(path: Path, flag: str) -> FileVerdict:
    """The verdicts on a file; UserError where it is none that the rules are for."""
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{flag}: {path} is not a .safetensors file, which is what all programs take")
    header = read_header(path, flag)
    found = sort_keys(header.shapes)
    kind = kind_of_file(found.layers, header.shapes, header.metadata, path)
    traits = traits_of_layers(path, header, found.layers.values())
    leftovers = {}
    for key in found.leftovers:
        split = split_key(key)
        leftovers.setdefault("alpha_alone" if split and split[1] == "alpha" else "unknown", []).append(key)
    consumers = []
    for name, consumer in CONSUMERS.items():
        groups = [*_groups(name, consumer, kind, found.layers.values(), traits)]
        for trait, keys in leftovers.items():
            groups.append(Group(TRAITS[trait].label, TRAITS[trait].outcomes[name], len(keys), len(keys)))
        consumers.append(ConsumerVerdict(name, tuple(groups)))
    all_traits = frozenset(leftovers).union(*traits.values())
    return FileVerdict(path, kind, len(header.shapes), tuple(consumers), all_traits, tuple(_notes(header, kind)))


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    return max(outcomes, key=lambda outcome: VERDICTS.index(outcome.verdict))


def _groups(
    name: str, consumer: Consumer, kind: str, layers: Iterable[LayerKeys], traits: dict[str, tuple[str, ...]]
) -> Iterator[Group]:
    """The layers by what this program makes of them; of a layer's traits the worst decides."""
    sorted_layers: dict[tuple[str, Outcome], list[LayerKeys]] = {}
    for layer in layers:
        if knows_name(consumer, kind, layer):
            outcomes = {trait: TRAITS[trait].outcomes[name] for trait in traits[layer.name]}
            outcome = worst(outcomes.values())
            label = next(TRAITS[trait].label for trait in outcomes if outcomes[trait] == outcome)
        else:
            label, outcome = "names", UNKNOWN_NAME_IS_AN_ERROR if consumer.refuses_unknown else UNKNOWN_NAME
        sorted_layers.setdefault((label, outcome), []).append(layer)
    for (label, outcome), members in sorted_layers.items():
        yield Group(label, outcome, len(members), sum(len(layer.keys) for layer in members))


def knows_name(consumer: Consumer, kind: str, layer: LayerKeys) -> bool:
    """Whether a program finds the layer of the model that this is for."""
    allowed = (*consumer.names, *consumer.names_of_kind.get(kind, ()))
    if consumer.names_of_ab and has_a_and_b(layer):
        allowed = consumer.names_of_ab
    spelled = {
        spelling: name for spelling, name in layers_by_name(kind).get(layer.name, {}).items() if spelling in allowed
    }
    if {*spelled} == {"kohya"} and spelled["kohya"].path in consumer.missing.get(kind, ()):
        return False
    return any(consumer.has_text_norms or name.part == "unet" or not name.is_norm for name in spelled.values())


def _notes(header: SafetensorsHeader, kind: str) -> Iterator[str]:
    """What to say of metadata and number formats."""
    metadata = header.metadata
    told = kind_in_metadata(metadata)
    if told is None:
        yield "no metadata: programs cannot tell what model it is for, and list it beside those of all models"
    elif told != kind:
        yield (
            f"the WebUI hides it while a model of {KIND_NAMES[kind]} is loaded, as ss_base_model_version and ss_v2 say "
            f"{KINDS_IN_WEBUI[told]}; tools/edit_metadata.py sets them"
        )
    architecture = metadata.get("modelspec.architecture")
    if architecture and not architecture.startswith(FORGE_ARCHITECTURES[kind]):
        yield f"Forge takes it for {architecture}, by modelspec.architecture; tools/edit_metadata.py sets it"
    for name in JSON_OBJECTS:
        if metadata.get(name, "{")[:1] != "{" and metadata[name] not in ("null", "None"):
            yield f"{name} is not shown: it does not begin with {{"
    odd = sorted({*header.dtypes.values()} - TRIED_DTYPES)
    if odd:
        yield f"tensors in {quoted_list(odd)}, which no program was tried with"
