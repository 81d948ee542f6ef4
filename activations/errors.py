"""Every error that saekit raises on purpose.

    SaekitError
    ├── ConfigError (ValueError)            a config file, key or value
    ├── UnknownNameError (LookupError)      a name that is in no table
    ├── HookPointError (LookupError)        a hook point the model or store does not have
    ├── ShapeError (ValueError)             arrays or artefacts of the wrong width
    ├── ModelError (ValueError)             a model or tokenizer that cannot be loaded
    ├── TextError (ValueError)              a text source that is missing, unreadable or empty
    ├── NumericsError (FloatingPointError)  NaN or infinity where numbers should be
    ├── DiskSpaceError (OSError)            not enough room, found out before or while writing
    ├── DeviceMemoryError (MemoryError)     a GPU that is too small for what was asked
    ├── StorageError (OSError)              a disk or object storage that fails or refuses
    ├── WorkerError (OSError)               a cluster that does not answer, or workers that are lost again and again
    ├── EndpointError (OSError)             a language model's endpoint that does not answer, or refuses
    ├── EngineError (RuntimeError)          a server's engine that failed, or stopped
    ├── HostLostError                       one of several processes of a run that is gone, or never came
    ├── InterruptedRunError                 stopped by the user; what was committed is kept
    └── ArtefactError (ValueError)          something on disk
        ├── MissingArtefactError (FileNotFoundError)
        ├── CorruptArtefactError            checksums or structure do not hold
        └── MismatchError                   made from another model, tokenizer, text or config

One message shape everywhere: where, what was expected, what was found, what to do. The command line prints it as one
line and exits with 1; anything that is not a SaekitError is a bug and keeps its traceback.
"""

from functools import partial
from typing import Any

LONGEST = 2000
"""letters of a part of a message; it may quote a file, which may be long"""


class SaekitError(Exception):
    """Base of all deliberate errors.

    Args:
      where: the file, option or value at fault.
      expected: what would have been right.
      got: what was found instead.
      fix: what the user can do about it.
    """

    def __init__(self, where: object, *, expected: str, got: object, fix: str):
        self.where, self.expected, self.got, self.fix = _cut(where), _cut(expected), _cut(got), fix
        super().__init__(f"{self.where}: expected {self.expected}, got {self.got}. {fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        """How it gets from one process to another."""
        again = partial(type(self), self.where, expected=self.expected, got=self.got, fix=self.fix)
        return again, ()


def _cut(part: object) -> str:
    text = str(part)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


class ConfigError(SaekitError, ValueError):
    """A config file, key or value is not valid."""


class UnknownNameError(SaekitError, LookupError):
    """A name is in none of the tables."""


class HookPointError(SaekitError, LookupError):
    """The model or the store does not have this hook point."""


class ShapeError(SaekitError, ValueError):
    """Arrays or artefacts whose widths do not fit together."""


class ModelError(SaekitError, ValueError):
    """A model or tokenizer cannot be loaded or is of no known family."""


class TextError(SaekitError, ValueError):
    """A text source is missing, unreadable or empty."""


class NumericsError(SaekitError, FloatingPointError):
    """NaN or infinity where numbers should be."""


class DiskSpaceError(SaekitError, OSError):
    """The disk cannot hold what is to be written."""


class DeviceMemoryError(SaekitError, MemoryError):
    """The memory of an accelerator cannot hold what is to be computed."""


class StorageError(SaekitError, OSError):
    """A disk or object storage fails, or refuses."""


class WorkerError(SaekitError, OSError):
    """A cluster does not answer, or its workers are lost again and again."""


class EndpointError(SaekitError, OSError):
    """The endpoint of a language model does not answer, or refuses."""


class EngineError(SaekitError, RuntimeError):
    """A server's engine failed while it wrote; nothing is wrong with the request."""


class HostLostError(SaekitError):
    """One of the processes of a run is gone, or never came."""


class InterruptedRunError(SaekitError):
    """The user stopped a run; everything committed so far is kept."""


class ArtefactError(SaekitError, ValueError):
    """Something on disk is not what it should be."""


class MissingArtefactError(ArtefactError, FileNotFoundError):
    """Nothing is there."""


class CorruptArtefactError(ArtefactError):
    """A checksum or the structure of an artefact does not hold."""


class MismatchError(ArtefactError):
    """An artefact was made from another model, tokenizer, text or config."""
