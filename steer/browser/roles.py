"""Who somebody is and may do, for what keeps accounts; what looks at requests is `steer.browser.guard`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Role = Literal["viewer", "annotator", "admin"]
ROLES: tuple[Role, ...] = ("viewer", "annotator", "admin")


@dataclass(frozen=True)
class Account:
    """Somebody who may ask."""

    name: str
    role: Role

    def may(self, role: Role) -> bool:
        """Whether this role is enough for what needs `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)


AccountOf = Callable[[str], Account | None]
"""whose a token is"""
