"""Arrays in the database of a feature index, each a row of its own: what is wanted of all latents at once.

A row has the dtype and the shape of an array beside its bytes (C order, little-endian), so that a list of a million
latents is there without a million rows being read. Left out: what the arrays mean (`sae.index_db`).
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import sqlalchemy as sql
from sqlalchemy import orm

from activations.errors import CorruptArtefactError


class ArrayBase(orm.DeclarativeBase):
    """Of the table of arrays."""


class ArrayRow(ArrayBase):
    """One array."""

    __tablename__ = "arrays"
    name: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    dtype: orm.Mapped[str]
    shape: orm.Mapped[Any] = orm.mapped_column(sql.JSON)
    data: orm.Mapped[bytes]


def replace_arrays(connection: sql.Connection, arrays: Mapping[str, np.ndarray]) -> None:
    """Make these all that the table holds, in the transaction of the connection."""
    ArrayBase.metadata.drop_all(connection)
    ArrayBase.metadata.create_all(connection)
    for name, array in arrays.items():
        whole = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        row = {"name": name, "dtype": whole.dtype.str, "shape": list(whole.shape), "data": whole.tobytes()}
        connection.execute(sql.insert(ArrayRow), row)


def read_array(session: orm.Session, name: str, dtype: str, length: int | None) -> np.ndarray:
    """A one-dimensional array, read only.

    Args:
      dtype: what it must be of, as numpy's `dtype.str` has it.
      length: its length, if that is known.
    Raises: CorruptArtefactError if there is none, or if it is another; its bytes are read once the rest is right.
    """
    head = session.execute(
        sql.select(
            ArrayRow.dtype, ArrayRow.shape, sql.func.typeof(ArrayRow.data), sql.func.length(ArrayRow.data)
        ).where(ArrayRow.name == name)
    ).one_or_none()
    if head is None:
        raise _corrupt(session, name, f"{dtype}", "none")
    declared, shape, kind, n_bytes = head
    size = n_bytes // np.dtype(dtype).itemsize if kind == "blob" else -1
    expected = f"{dtype} of length {size if length is None else length} and as many bytes"
    if declared != dtype or shape != [size] or n_bytes != size * np.dtype(dtype).itemsize or length not in (None, size):
        got = f"{declared} of shape {json.dumps(shape)} in {n_bytes} bytes"
        raise _corrupt(session, name, expected, got)
    data = session.execute(sql.select(ArrayRow.data).where(ArrayRow.name == name)).scalar_one()
    return np.frombuffer(data, dtype)


def _corrupt(session: orm.Session, name: str, expected: str, got: str) -> CorruptArtefactError:
    where = f"{session.get_bind().engine.url.database}: array '{name}'"
    return CorruptArtefactError(where, expected=expected, got=got, fix="Build it again with: saekit index")
