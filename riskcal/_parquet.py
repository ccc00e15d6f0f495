"""Parquet files that tell when they were damaged: checksums of their pages, and one of the whole file in its own footer."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet

from riskcal._validate import RiskcalError

#: Stands in the file's own metadata, not in the schema's: what other programs make of the table does not inherit it.
KEY = b"riskcal.blake2b"
_SIZE = 16
_BLANK = b"0" * 2 * _SIZE

#: A Parquet file ends with the length of its footer, four bytes, and a mark, four more.
_TAIL = 8

#: Bytes that are hashed at a time.
_PIECE = 2**20


def write(table: pa.Table, path: Path) -> None:
    """Write a table; page checksums alone would leave names, types and counts of rows unprotected."""
    with pa.parquet.ParquetWriter(
        path, table.schema, compression="zstd", write_page_checksum=True
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({KEY: _BLANK})
    with path.open("r+b") as file:
        content = file.read()
        place = content.rindex(_BLANK, content.rindex(KEY))
        file.seek(place)
        file.write(hashlib.blake2b(content, digest_size=_SIZE).hexdigest().encode())


def read(path: Path) -> pa.Table:
    """The table in a file, unless its checksums, if it has any, say that a bit is not what was written.

    The file is opened once: a writer may put another in its place while this one is read.
    """
    with path.open("rb") as file:
        _refuse_damaged(path, file)
        file.seek(0)
        table = pa.parquet.read_table(file, partitioning=None, page_checksum_verification=True)
    table.validate(full=True)  # text that is not UTF-8 would fail later, without the file's name
    return table


def shape(path: Path) -> tuple[pa.Schema, int]:
    """The columns of a file and how many rows it has, which its footer says."""
    with pa.parquet.ParquetFile(path) as file:
        return file.schema_arrow, file.metadata.num_rows


def read_in_parts(path: Path, rows: int) -> Iterator[pa.Table]:
    """As `read`, at most so many rows at a time."""
    with path.open("rb") as file:
        _refuse_damaged(path, file)
        file.seek(0)
        with pa.parquet.ParquetFile(file, page_checksum_verification=True) as content:
            for batch in content.iter_batches(rows):
                table = pa.Table.from_batches([batch])
                table.validate(full=True)
                yield table


def _refuse_damaged(path: Path, file: BinaryIO) -> None:
    try:
        recorded = (pa.parquet.read_metadata(file).metadata or {}).get(KEY)
    except (OSError, pa.ArrowException):  # the reader proper says why
        return
    if recorded is None:
        return
    size = file.seek(-_TAIL, io.SEEK_END) + _TAIL
    footer = int.from_bytes(file.read(4), "little") + _TAIL
    file.seek(-footer, io.SEEK_END)
    place = size - footer + file.read().rfind(recorded)
    hasher = hashlib.blake2b(digest_size=_SIZE)
    file.seek(0)
    for begin in range(0, place, _PIECE):
        hasher.update(file.read(min(_PIECE, place - begin)))
    hasher.update(_BLANK)
    file.seek(len(_BLANK), io.SEEK_CUR)
    hasher.update(file.read())
    if hasher.hexdigest().encode() != recorded:
        raise RiskcalError(
            f"{path}: is damaged: its content is not what was written (checksum). Restore it from a copy, or delete it and "
            "make it again."
        )
