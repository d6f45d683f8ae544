"""A page on a run of training: what was trained, how it went, and how to use the file. Needs no torch."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from library.dataset.sheet import NO_CAPTION, Tile
from library.errors import UserError, counted
from library.files import write_text_whole
from library.generating.cards import trigger_words
from library.generating.charts import Line, chart, smoothed
from library.generating.html import embedded, embedded_picture, page
from library.generating.runs import Run
from library.safetensors_header import read_header
from library.training.prompts import prompts_of

logger = logging.getLogger(__name__)

MAX_COLUMNS = 16  # of previews side by side
MAX_GRID_BYTES = 30_000_000
OUTCOMES = {
    "finished": "finished",
    "stopped": "stopped before its end",
    "failed": "ended in an error",
    "running": "is running, or was killed",
}


@dataclass(frozen=True)
class ReportParts:
    """What a report shows beside what is in the run's folder."""

    tiles: list[Tile] = field(default_factory=list)  # pictures as training sees them
    tiles_missing: str = ""  # why there are none


def report_path(run: Run) -> Path:
    return run.folder / f"{run.name}-report.html"


def write_report(run: Run, parts: ReportParts) -> Path:
    """Write NAME-report.html beside the network."""
    path = report_path(run)
    write_text_whole(path, page(f"{run.name}: report", report_body(run, parts)))
    return path


def report_body(run: Run, parts: ReportParts) -> str:
    metadata = metadata_of(run)
    sections = {
        "": summary(run, metadata),
        "Loss and learning rate": curves(run),
        "Previews": previews(run),
        "Grid": grid(run),
        "How to use it": usage(run, metadata),
        "Pictures": pictures(run, parts),
        "Time and memory": time_and_memory(run),
        "Settings": settings(run),
    }
    return "\n".join(f"<h2>{title}</h2>\n{text}" if title else text for title, text in sections.items() if text)


def metadata_of(run: Run) -> dict[str, str]:
    """What the run's last network says of itself."""
    paths = [saved.path for saved in run.networks if saved.path.suffix == ".safetensors"]
    try:
        return read_header(paths[-1], "report").metadata if paths else {}
    except UserError:
        return {}


def summary(run: Run, metadata: dict[str, str]) -> str:
    record = run.record
    progress = record.get("progress", {})
    epochs, steps = progress.get("epochs", [None, None]), progress.get("steps", [None, None])
    loss = progress.get("loss_average")
    counts = record.get("dataset", {}).get("num_pictures", {})
    facts = {
        "base model": Path(str(run.option("pretrained_model_name_or_path") or "?")).name,
        "network": " ".join(
            str(part)
            for part in (
                (run.option("network_module") or "networks.lora").rpartition(".")[2],
                f"rank {run.option('network_dim')}" if run.option("network_dim") else "",
            )
            if part
        ),
        "pictures": counts.get("training"),
        "held out": counts.get("validation"),
        "epochs": _of(epochs),
        "steps": _of(steps),
        "last mean loss": None if loss is None else f"{loss:.4f}",
        "mean step": _seconds(record.get("seconds_a_step", {}).get("mean")),
        "started": str(record.get("started", "")).replace("T", " "),
        "file": _size_of_last(run),
    }
    outcome = OUTCOMES.get(record.get("outcome"), "")
    notes = [f"The run {outcome}." if outcome else "", record.get("error") or ""]
    words = trigger_words(metadata, run.option("metadata_trigger_phrase"))
    notes.append(f"Trigger words: {words}" if words else "")
    text = "".join(
        f'<p class="note{" bad" if note == record.get("error") else ""}">{escape(note)}</p>' for note in notes if note
    )
    boxes = "".join(
        f"<div class=fact><b>{escape(str(value))}</b><span>{escape(name)}</span></div>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    return f"{text}<div class=facts>{boxes}</div>"


def _of(pair: Sequence[Any]) -> str | None:
    done, planned = pair
    return None if done is None else str(done) if done == planned else f"{done} of {planned}"


def _seconds(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _size_of_last(run: Run) -> str | None:
    return f"{run.networks[-1].path.stat().st_size / 1e6:.1f} MB" if run.networks else None


def curves(run: Run) -> str:
    """Loss, validation loss and learning rates over the steps."""
    kept = run.record.get("curves", {})
    points = {name: [(step, value) for step, value in curve["points"]] for name, curve in kept.items()}
    loss = points.get("loss", [])
    lines = [Line("each step", loss, is_faint=True), Line("smoothed", smoothed(loss))]
    lines.append(Line("validation", points.get("validation loss", [])))
    names_of: dict[tuple, list[str]] = {}  # groups with the same rates share a line
    for name, values in points.items():
        if name.startswith("lr/") and not name.startswith("lr/d*lr"):
            names_of.setdefault(tuple(values), []).append(name.removeprefix("lr/"))
    rates = [Line(", ".join(names), values) for values, names in names_of.items()]
    return chart("loss", lines) + chart("learning rate", rates)


def previews(run: Run) -> str:
    """A row for each prompt, a column for each time that previews were drawn."""
    found = run.previews()
    if not found:
        return ""
    times = list(dict.fromkeys(preview.when for preview in found))
    shown = times
    if len(times) > MAX_COLUMNS:
        shown = [times[round(i * (len(times) - 1) / (MAX_COLUMNS - 1))] for i in range(MAX_COLUMNS)]
    texts = prompt_texts(run)
    at = {(preview.number, preview.when): preview.path for preview in found}
    rows = []
    for number in sorted({preview.number for preview in found}):
        cells = [at.get((number, when)) for when in shown]
        label = escape(texts.get(number, f"prompt {number + 1}"))
        rows.append(f"<tr><th>{label}</th>" + "".join(f"<td>{embedded(p) if p else ''}</td>" for p in cells) + "</tr>")
    heads = "".join(f"<th>{escape(when)}</th>" for when in shown)
    note = f"<p class=note>{len(shown)} of {len(times)} times.</p>" if len(shown) < len(times) else ""
    table = f"<thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"{note}<div class=scroll><table class=grid>{table}</table></div>"


def prompt_texts(run: Run) -> dict[int, str]:
    """The sample prompts by number, as far as they can be read now."""
    try:
        text = run.option("sample_prompts")
        return {prompt.enum: prompt.prompt for prompt in prompts_of(text)} if text else {}
    except UserError:
        return {}


def grid(run: Run) -> str:
    """The tables of the run's grid, where there is one, or a link to it where it is large."""
    path = run.grid_folder / "grid.html"
    if not path.is_file():
        return ""
    if path.stat().st_size > MAX_GRID_BYTES:
        name = escape(f"{run.grid_folder.name}/{path.name}")
        return f'<p><a href="{name}">{name}</a></p>'
    return path.read_text(encoding="utf-8").partition("</h1>")[2].partition("</main>")[0]


def usage(run: Run, metadata: dict[str, str]) -> str:
    """What to do with the file, in the programs that people use."""
    if not run.networks:
        return ""
    file = run.networks[-1].path.name
    stem = run.networks[-1].path.stem
    words = trigger_words(metadata, run.option("metadata_trigger_phrase"))
    prompt = f"{words + ', ' if words else ''}<lora:{stem}:1>"
    base = Path(str(run.option("pretrained_model_name_or_path") or "the base model")).name
    rows = {
        "ComfyUI": f"Put <code>{escape(file)}</code> into <code>models/loras</code>; a “Load LoRA” node behind the "
        "checkpoint takes it, with strengths of 0.6 to 1.0 to begin with.",
        "WebUI, Forge": f"Put it into <code>models/Lora</code>; the prompt is <code>{escape(prompt)}</code>",
        "diffusers": f"<code>pipeline.load_lora_weights({escape(repr(str(run.folder.name)))}, "
        f"weight_name={escape(repr(file))})</code>",
        "here": f"<code>python gen_img.py --ckpt {escape(base)} --network_weights {escape(file)} --prompt "
        f"&quot;{escape(words or '...')}&quot;</code>",
    }
    if len(run.networks) > 1:
        rows["which epoch"] = f"<code>python tools/xyz_grid.py --run {escape(str(run.folder / run.name))}</code>"
    return table(rows)


def pictures(run: Run, parts: ReportParts) -> str:
    """Thumbnails as training saw them, with captions."""
    if not parts.tiles:
        return f"<p class=note>{escape(parts.tiles_missing)}</p>" if parts.tiles_missing else ""
    total = sum(run.record.get("dataset", {}).get("num_pictures", {}).values())
    figures = "".join(
        f"<figure>{embedded_picture(tile.picture, tile.name)}<figcaption>{escape(_under(tile))}</figcaption></figure>"
        for tile in parts.tiles
    )
    note = f"{len(parts.tiles)} of {counted(total, 'picture')}, cut as training sees them."
    return f"<p class=note>{note}</p><div class=pictures>{figures}</div>"


def _under(tile: Tile) -> str:
    marks = f"[{', '.join(tile.marks)}] " if tile.marks else ""
    return marks + (tile.caption or NO_CAPTION)


def time_and_memory(run: Run) -> str:
    record = run.record
    times, memory = record.get("seconds_a_step", {}), record.get("memory", {})
    rows = {
        "device": escape(str(record.get("device", ""))),
        "processes": escape(str(record.get("num_processes", ""))),
        "a step": ", ".join(
            f"{name} {_seconds(times[key])}"
            for key, name in (("mean", "mean"), ("p50", "median"), ("p95", "95 %"))
            if key in times
        ),
        **{escape(name): f"{size / 2**30:.2f} GiB" for name, size in memory.items()},
    }
    stretches = times.get("stretches", [])
    size = times.get("steps_a_stretch", 1)
    line = Line("seconds", [((number + 1) * size, value) for number, value in enumerate(stretches)])
    return table({name: value for name, value in rows.items() if value}) + chart("seconds a step", [line])


def settings(run: Run) -> str:
    """What the run was told, and what it ran on."""
    if not run.record:
        return ""
    told = {escape(name): f"<code>{escape(str(value))}</code>" for name, value in run.record.get("options", {}).items()}
    versions = {escape(name): escape(str(value)) for name, value in run.record.get("versions", {}).items()}
    command = f"python train_network.py --config_file {escape(run.name)}-run.json"
    again = f"<p class=note>The same again: <code>{command}</code></p>"
    return f"{table(told)}{again}<details><summary>versions</summary>{table(versions)}</details>"


def table(rows: dict[str, str]) -> str:
    """A table of names and values, both HTML."""
    body = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows.items())
    return f"<table class=plain>{body}</table>" if body else ""
