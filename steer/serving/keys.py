"""Who may ask: API keys of a file, a line NAME KEY each, of which only hashes are kept in memory.

Keys are never logged, told or compared letter by letter. Left out: where a request carries one (`steer.serving.app`).
"""

import hashlib
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from activations.errors import ConfigError

LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+(\S{16,256})")
ANYBODY = "anybody"
"""whose requests are where no key is needed"""


class Keys:
    """Whose a key is."""

    def __init__(self, names: Mapping[str, str] | None):
        """Args: names: SHA-256 of a key -> its name; none: nobody needs one."""
        self._names = names

    @classmethod
    def read(cls, file: Path | None) -> "Keys":
        """Keys of a file; empty lines and those behind # are left out; no file: nobody needs one.

        Raises: ConfigError if it cannot be read, if others than its owner may read it, or for a line of another form.
        """
        if file is None:
            return cls(None)
        try:
            mode, text = file.stat().st_mode, file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            got = getattr(error, "strerror", None) or "not text"
            raise ConfigError(file, expected="a file of API keys", got=got, fix="Check the path.") from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            fix = f"Run: chmod 600 {file}"
            raise ConfigError(file, expected="a file that only its owner may read", got="one of others too", fix=fix)
        names: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            match = LINE.fullmatch(line.strip())
            if match is None or match[1] in names.values() or _hashed(match[2]) in names:
                expected = "NAME KEY, a key of 16 characters or more, both unlike those before"
                raise ConfigError(f"{file}:{number}", expected=expected, got="another line", fix="Correct the line.")
            names[_hashed(match[2])] = match[1]
        if not names:
            raise ConfigError(file, expected="a key or more", got="none", fix="Add a line: NAME KEY")
        return cls(names)

    @property
    def are_needed(self) -> bool:
        """Whether a request needs one."""
        return self._names is not None

    def name_of(self, key: str | None) -> str | None:
        """Whose it is; none: nobody's."""
        if self._names is None:
            return ANYBODY
        return None if key is None else self._names.get(_hashed(key))


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
