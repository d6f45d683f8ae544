"""Verdicts on an adapter file as text. Needs no torch."""

import logging
from collections.abc import Iterator
from pathlib import Path

from library.adapters.file_kind import KIND_NAMES
from library.adapters.verdicts import FileVerdict, Group, verify
from library.errors import UserError, counted

logger = logging.getLogger(__name__)

WORDS = {
    "exact": "applied exactly",
    "not measured": "applied; how exactly was not measured",
    "wrong": "applied wrongly",
    "not applied": "not all applied",
    "none": "not applied at all",
    "refused": "the whole file is refused",
}


def report(found: FileVerdict) -> str:
    """A row for each program with what is in its way, what metadata does, and what to do."""
    lines = [f"{found.path.name}: for {KIND_NAMES[found.kind]}, {counted(found.num_keys, 'key')}"]
    for consumer in found.consumers:
        word = WORDS[consumer.verdict if consumer.num_taken or consumer.is_refused else "none"]
        taken = f"{consumer.num_taken} of {found.num_keys} keys"
        lines.append(f"  {consumer.name:<10} {taken:<20} {word}")
        lines += [f"{'':<15}{_reason(group)}" for group in consumer.groups if group.outcome.verdict != "exact"]
    lines += [f"  note: {note}" for note in found.notes]
    return "\n".join([*lines, *(f"  to do: {advice}" for advice in _advice(found))])


def _reason(group: Group) -> str:
    outcome = group.outcome
    error = f" (relative error {outcome.error})" if outcome.error else ""
    why = f": {outcome.why}" if outcome.why else ""
    return f"- {group.label} ({counted(group.num_layers, 'layer')}): {outcome.verdict}{error}{why}"


def _advice(found: FileVerdict) -> Iterator[str]:
    if found.is_exact:
        return
    if found.is_plain:
        yield f'python networks/convert_lora.py "{found.path}" OUT.safetensors --to kohya  (names that all know)'
    else:
        model = " --model BASE_MODEL" if found.needs_model else ""
        yield f'python networks/verify_lora.py "{found.path}" --bake OUT.safetensors{model}  (a LoRA for all of them)'


def tell(path: Path) -> None:
    """Log what programs make of a file that was just written: a line where all is well, and else the whole report."""
    try:
        found = verify(path, "")
    except UserError as error:
        logger.warning("what other programs make of the file is not known: %s", error)
        return
    if found.is_exact and not found.notes:
        names = ", ".join(consumer.name for consumer in found.consumers)
        logger.info("%s take all %d keys and apply them exactly", names, found.num_keys)
    else:
        logger.warning(
            "other programs do not all take the file as it is:\n%s", report(found), extra={"has_lines": True}
        )
