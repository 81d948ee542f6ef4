"""Ring mode: how a harvest and the training that follows it share a store that is smaller than what passes through.

The harvest commits groups and waits while `keep_tokens` positions are on disk that the trainer has not released. The
trainer writes how far it is into `reader.json`, never into the store itself; only the harvest deletes. Either side may
die and come back: what the trainer has released is behind its last checkpoint, and what the harvest has committed
stays.

    sequence 0 .. pinned           never released: held-out text, and the statistics that training starts from
    pinned .. released             used by the trainer up to its last checkpoint; only their mask is left
    released .. committed          on disk
"""

import json
from typing import NamedTuple

from activations.storage import Storage
from activations.store_schema import StoreMeta

READER_KEY = "reader.json"
POLL_S = 0.2


class Reader(NamedTuple):
    """How far the trainer is."""

    released: int = 0
    """sequences before this one are not needed any more, pinned ones aside"""
    done: bool = False
    """the training has ended and needs nothing more"""
    owner: str = ""
    """the run that trains on it"""


def read_reader(storage: Storage) -> Reader:
    """The trainer's last word; that of a trainer which has not started, if there is none."""
    found = storage.read(READER_KEY)
    return Reader(**json.loads(found[0])) if found else Reader()


def write_reader(storage: Storage, reader: Reader) -> None:
    """Tell the harvest how far the trainer is."""
    storage.write(READER_KEY, json.dumps(reader._asdict()).encode())


def is_full(meta: StoreMeta, committed: int, released: int) -> bool:
    """Whether another group would put more than `keep_tokens` positions on disk."""
    if meta.ring is None:
        return False
    gone = max(0, min(released, committed) - meta.pinned_sequences)
    return (committed - gone + meta.commit_sequences) * meta.ctx > meta.ring.keep_tokens
