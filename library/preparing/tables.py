"""Rows of a dataset as Hugging Face keeps them: parquet files, or an imagefolder with metadata.jsonl or .csv."""

import csv
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError, first_line, quoted_list
from library.files import read_user_text
from library.preparing.picture_io import Unreadable
from library.texts import read_json

logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "tags", "tag_string", "description")
ROWS_AT_ONCE = 16  # a row has a whole picture


@dataclass(frozen=True)
class Row:
    """One picture with its caption."""

    place: str  # "train.parquet, row 3", for messages
    name: str | None  # of its file, where it was one
    caption: str | None
    read: Callable[[], bytes]  # the file's content; Unreadable where there is none


def rows_of(source: Path, image_column: str | None, caption_column: str | None) -> tuple[Iterator[Row], int]:
    """The rows of a parquet file, of a folder of these, or of an imagefolder, and how many there are."""
    if not source.exists():
        raise UserError(f"source: there is no file or folder {source}")
    if source.is_file():
        if source.suffix.lower() != ".parquet":
            raise UserError(f"source must be a .parquet file, or a folder of a dataset, got {source}")
        return _parquet_rows([source], source.parent, image_column, caption_column)
    if files := sorted(path for path in source.rglob("*.parquet") if path.is_file()):
        return _parquet_rows(files, source, image_column, caption_column)
    if files := sorted(path for name in METADATA_FILES for path in source.rglob(name)):
        rows = [row for file in files for row in _imagefolder_rows(file, source, caption_column)]
        return iter(rows), len(rows)
    raise UserError(f"source: {source} has neither .parquet files nor {' or '.join(METADATA_FILES)}")


def chosen(flag: str, given: str | None, columns: Sequence[str], found: Sequence[str], known: Sequence[str]) -> str:
    """The column that is given, or the only one of its kind, or of a known name; a UserError where it is not clear."""
    if given is not None:
        if given not in columns:
            raise UserError(f"--{flag}: there is no column {given}; there are {quoted_list(list(columns))}")
        return given
    if len(found) == 1:
        return found[0]
    named = [name for name in found if name.lower() in known]
    if len(named) == 1:
        return named[0]
    raise UserError(f"--{flag} is needed, as several columns may be meant: {quoted_list(list(found))}")


def _parquet_rows(
    files: list[Path], folder: Path, image_column: str | None, caption_column: str | None
) -> tuple[Iterator[Row], int]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UserError("reading .parquet files needs the package pyarrow: pip install pyarrow") from error
    opened, total = [], 0
    for file in files:
        try:
            table = parquet.ParquetFile(file)
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise UserError(f"source: {file} cannot be read as parquet ({first_line(error)})") from error
        opened.append((file, table, *_parquet_columns(file, table.schema_arrow, image_column, caption_column)))
        total += table.metadata.num_rows

    def rows() -> Iterator[Row]:
        for file, table, image, caption in opened:
            wanted = [image] + ([caption] if caption else [])
            number = 0
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=wanted):
                for values in batch.to_pylist():
                    number += 1
                    place = f"{file.name}, row {number}"
                    yield _parquet_row(place, values[image], values.get(caption), folder)

    return rows(), total


def _parquet_columns(
    file: Path, schema: Any, image_column: str | None, caption_column: str | None
) -> tuple[str, str | None]:
    """The columns of pictures and of captions."""
    from pyarrow import types

    def is_text(kind: Any) -> bool:
        if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind)

    def is_binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def holds_pictures(kind: Any) -> bool:
        return is_binary(kind) or (types.is_struct(kind) and {"bytes", "path"} & {part.name for part in kind})

    pictures = [part.name for part in schema if holds_pictures(part.type)]
    texts = [part.name for part in schema if is_text(part.type)]
    if not pictures:
        raise UserError(
            f"source: {file} has no column of pictures, that is of bytes, among {quoted_list(schema.names)}; "
            "a dataset of links has to be downloaded first"
        )
    image = chosen("image_column", image_column, pictures, pictures, ("image",))
    if not texts and caption_column is None:
        logger.warning("%s has no column of text: its pictures get no captions", file)
        return image, None
    return image, chosen("caption_column", caption_column, texts, texts, CAPTION_NAMES)


def _parquet_row(place: str, value: Any, caption: Any, folder: Path) -> Row:
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)

    def read() -> bytes:
        if content is not None:
            return content
        if path is None:
            raise Unreadable(f"{place} (there is no picture in it)")
        return _file_inside(folder, folder / path, place).read_bytes()

    return Row(place, path, _as_caption(caption), read)


def _imagefolder_rows(file: Path, folder: Path, caption_column: str | None) -> list[Row]:
    records = _records_of(file)
    columns = list(dict.fromkeys(name for record in records for name in record))
    names = [name for name in columns if name == "file_name" or name.endswith("_file_name")]
    if len(names) != 1:
        found = f"{quoted_list(names)} are" if names else "none is"
        raise UserError(f"source: {file} needs one column file_name, of the pictures' names; {found} there")
    texts = [name for name in columns if name not in names and _is_text(record.get(name) for record in records)]
    caption = None
    if texts or caption_column:
        caption = chosen("caption_column", caption_column, columns, texts, CAPTION_NAMES)
    else:
        logger.warning("%s has no column of text: its pictures get no captions", file)
    rows, outside = [], []
    for number, record in enumerate(records, start=1):
        place, name = f"{file.name}, row {number}", record.get(names[0])
        try:
            path = _file_inside(folder, file.parent / str(name), place)
        except Unreadable:
            outside.append(f"{place}: {name}")
            continue
        rows.append(Row(place, str(name), _as_caption(record.get(caption)), _reader(path, place)))
    if outside:
        raise UserError(f"source: {file} names pictures outside of {folder}: {quoted_list(outside)}")
    return rows


def _reader(path: Path, place: str) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise Unreadable(f"{place} ({path}: {error.strerror})") from error

    return read


def _records_of(file: Path) -> list[dict[str, Any]]:
    text = read_user_text(file, f"source: {file}")
    if file.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            record = read_json(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise UserError(f"source: {file}:{number} is not JSON ({error.msg})") from error
        if record is not None and not isinstance(record, dict):
            raise UserError(f'source: {file}:{number} must be an object such as {{"file_name": ...}}')
        records += [record] if record is not None else []
    return records


def _is_text(values: Iterable[Any]) -> bool:
    kinds = {type(value) for value in values} - {type(None)}
    return kinds == {str}


def _as_caption(value: Any) -> str | None:
    """A text, or several as lines."""
    if isinstance(value, list):
        return "\n".join(str(part).strip() for part in value if part is not None)
    return None if value is None else str(value).strip()


def _file_inside(folder: Path, path: Path, place: str) -> Path:
    """The file, if it is in the folder; no dataset may have others read."""
    resolved = path.resolve()
    if not resolved.is_relative_to(folder.resolve()):
        raise Unreadable(f"{place} (its file {path} is outside of the dataset)")
    return resolved
