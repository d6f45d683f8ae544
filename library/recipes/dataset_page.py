"""The sheet of a dataset as files: PNG, and one HTML page that needs nothing else. Needs no torch."""

import base64
import logging
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from library.dataset.audit import Audit
from library.dataset.scan import unreadable_pictures
from library.dataset.sheet import NO_CAPTION
from library.errors import UserError
from library.files import write_text_whole
from library.panels import Layout
from library.preparing.sheets import write_sheets
from library.recipes.dataset_sheet import Bucket, DatasetSheet, Shown, look_at_dataset, panels_of

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_suffix(".html")
MAX_TAGS = 200
MAX_NAMES = 30  # of pictures with one fault
SHEET_WIDTH, SHEET_HEIGHT = 2000, 3200  # of the PNG sheets, about, in pixels


def write_dataset_sheet(options: Any) -> list[Path]:
    """Look at the dataset and write what --html and --png ask for; damaged pictures are named at the end."""
    html_path, png_path = paths_of(options)
    sheet = look_at_dataset(options, options.thumbnail)
    for note in sheet.notes + sheet.audit.warnings:
        logger.warning(note)
    paths = []
    if png_path:
        layout = Layout(options.thumbnail, max(1, SHEET_WIDTH // (options.thumbnail + 16)), SHEET_HEIGHT)
        paths += write_sheets(panels_of(sheet), sheet.title, png_path, layout)
    if html_path:
        write_text_whole(html_path, page_of(sheet, options.thumbnail))
        logger.info("page: %s (%.1f MB)", html_path, html_path.stat().st_size / 1e6)
        paths.append(html_path)
    if sheet.damaged:
        raise UserError(unreadable_pictures(sheet.damaged))
    return paths


def paths_of(options: Any) -> tuple[Path | None, Path | None]:
    """Where the page and the PNG sheets go; both to the output folder where neither has a place."""
    if options.html or options.png:
        return options.html and Path(options.html), options.png and Path(options.png)
    if not options.output_dir:
        raise UserError("--html or --png is needed, or --output_dir for both: the files to write")
    stem = Path(options.output_dir) / f"{options.output_name or 'dataset'}-sheet"
    return stem.with_name(f"{stem.name}.html"), stem.with_name(f"{stem.name}.png")


def page_of(sheet: DatasetSheet, thumbnail: int) -> str:
    """The page, with all pictures in it."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(sheet.title),
        thumbnail=thumbnail,
        numbers="".join(_numbers(sheet)),
        cards="\n".join([_buckets_card(sheet), *_found_cards(sheet), _folders_card(sheet.audit), *_tags_cards(sheet)]),
        buckets="\n".join(_section(number, bucket, sheet) for number, bucket in enumerate(sheet.buckets)),
    )


def _numbers(sheet: DatasetSheet) -> Iterable[str]:
    pictures = [picture for bucket in sheet.buckets for picture in bucket.pictures]
    numbers = {
        "pictures": len(pictures),
        "with repeats, an epoch": sheet.plan.num_items,
        "sizes": len(sheet.buckets),
        "steps an epoch": sheet.plan.steps_per_epoch,
        "steps in all": sheet.plan.max_train_steps,
        "without a caption": sum(not picture.caption for picture in pictures),
        "held out for validation": sheet.num_held_out,
        "cannot be read": len(sheet.damaged),
    }
    needed = list(numbers)[:5]
    for name, number in numbers.items():
        if number or name in needed:
            is_bad = name in ("without a caption", "cannot be read")
            yield f'<div class="number{" doubt" if is_bad else ""}"><b>{number}</b><span>{name}</span></div>'


def _card(heading: str, content: str, kind: str = "card") -> str:
    return f'<div class="{kind}"><h2>{heading}</h2>{content}</div>'


def _buckets_card(sheet: DatasetSheet) -> str:
    most = max(bucket.num_repeats for bucket in sheet.buckets) or 1
    rows = []
    for number, bucket in enumerate(sheet.buckets):
        dataset = f"{bucket.dataset + 1}: " if sheet.num_datasets > 1 else ""
        count = f"{len(bucket.pictures)}"
        if bucket.num_repeats != len(bucket.pictures):
            count += f" &rarr; {bucket.num_repeats}"
        rows.append(
            f'<a class="bucket" href="#b{number}"><b>{dataset}{bucket.size_wh[0]} &times; {bucket.size_wh[1]}</b>'
            f'<i style="width:{100 * bucket.num_repeats / most:.1f}%"></i><span>{count}</span></a>'
        )
    return _card("Sizes, and pictures with their repeats", "".join(rows))


def _found_cards(sheet: DatasetSheet) -> Iterable[str]:
    items = [f'<li class="doubt">cannot be read: {escape(damage)}</li>' for damage in sheet.damaged]
    for finding in sheet.audit.findings:
        mark = ' class="doubt"' if finding.matters else ""
        more = f" and {len(finding.items) - MAX_NAMES} more" if len(finding.items) > MAX_NAMES else ""
        names = escape(", ".join(finding.items[:MAX_NAMES])) + more
        heading = escape(finding.sentence.partition(" (")[0])
        items.append(f"<li{mark}><details><summary>{heading}</summary>{names}</details></li>")
    items += [f"<li>{escape(note)}</li>" for note in sheet.notes]
    if items:
        yield _card("Found", f"<ul>{''.join(items)}</ul>")


def _folders_card(audit: Audit) -> str:
    rows = ['<tr><th>folder</th><th class="n">pictures</th><th class="n">repeats</th><th class="n">captions</th></tr>']
    for subset in audit.subsets:
        name = escape(str(subset.source)) + (' <span class="doubt">reg</span>' if subset.is_reg else "")
        counts = (subset.num_pictures, subset.num_repeats, subset.num_captioned)
        rows.append(f"<tr><td>{name}</td>{''.join(f'<td class=n>{count}</td>' for count in counts)}</tr>")
    return _card("Folders", f"<table>{''.join(rows)}</table>")


def _tags_cards(sheet: DatasetSheet) -> Iterable[str]:
    if sheet.tags:
        tags = "".join(
            f'<button data-tag="{escape(tag)}">{escape(tag)}<span>{count}</span></button>'
            for tag, count in sheet.tags.most_common(MAX_TAGS)
        )
        more = f", the first {MAX_TAGS} of {len(sheet.tags)}" if len(sheet.tags) > MAX_TAGS else ""
        yield _card(f"Tags{more}", f'<div class="tags">{tags}</div>', "card all")


def _section(number: int, bucket: Bucket, sheet: DatasetSheet) -> str:
    figures = "\n".join(map(_figure, bucket.pictures))
    heading = escape(sheet.heading(bucket))
    return f'<section id="b{number}"><h2>{heading}</h2><div class="grid">\n{figures}\n</div></section>'


def _figure(picture: Shown) -> str:
    images = _image(picture.seen, "seen") + (_image(picture.whole, "whole") if picture.whole else "")
    doubts = f'<small class="doubt">{escape(", ".join(picture.doubts))}</small>' if picture.doubts else ""
    caption = f"<p>{escape(picture.caption)}</p>" if picture.caption else f'<p class="none">{NO_CAPTION}</p>'
    return (
        f"<figure{' class=reg' if 'reg' in picture.marks else ''}>"
        f'<div class="frame{" cut" if picture.whole else ""}">{images}</div>'
        f"<figcaption><small>{escape(picture.name)}</small><small>{escape(', '.join(picture.facts))}</small>{doubts}"
        f"{caption}</figcaption></figure>"
    )


def _image(jpeg: bytes, kind: str) -> str:
    data = base64.b64encode(jpeg).decode("ascii")
    return f'<img class="{kind}" alt="" loading="lazy" decoding="async" src="data:image/jpeg;base64,{data}">'
