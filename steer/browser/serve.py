"""`saekit browse`: open what is asked for, and answer on a port until stopped.

Flow: 1. open indexes and libraries; 2. listen; 3. say where, and open the page; 4. answer. The application is imported
while the web browser starts, which waits for an answer meanwhile. The address carries a token behind the `#`, which a
browser sends to nobody; the page trades it for a cookie.
"""

import signal
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING

from activations.errors import ConfigError
from steer.browser.config import BrowseConfig
from steer.browser.library_model import model_of_libraries
from steer.browser.model import SharedModel
from steer.browser.people import opening_page, own_name, own_token, single, state_folder
from steer.browser.roles import Account, AccountOf
from steer.browser.sources import Opened, open_paths
from steer.browser.team import Team, sqlite_url
from steer.listening import LOOPBACK, address_of, is_loopback, listen, say
from steer.uncollected import uncollected

if TYPE_CHECKING:
    import uvicorn


def browse(config: BrowseConfig, *, as_json: bool = False) -> None:
    """Serve until interrupted.

    Args:
      as_json: say where on standard output, as one JSON object, for programs.
    Raises: as `open_paths` does; ConfigError for an address that is not to be had, or open to others without accounts.
    """
    if not config.team and not is_loopback(config.host):
        fix = "Leave host as it is and use a tunnel (ssh -L), or set team=true, which gives everybody a token."
        raise ConfigError("host", expected="a loopback address without team", got=config.host, fix=fix)
    opened = open_paths(config.paths)
    token = own_token()
    own = Account(config.author or own_name(), "admin")
    with ExitStack() as stack:
        stack.enter_context(closing(opened))
        listener = stack.enter_context(closing(listen(config.host, config.port)))
        team = None
        if config.team:
            url = config.database or sqlite_url(state_folder() / "accounts.sqlite")
            team = stack.enter_context(closing(Team(url, own, token)))
        names = {*LOOPBACK, config.host, *config.hosts}
        account_of = team.account_of if team else single(own, token)
        address = f"{address_of(config.host, listener)}/#token={token}"
        say("saekit browser", address, "Tokens and text", host=config.host, as_json=as_json)
        if config.open:
            webbrowser.open(opening_page(address))
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has shut down
            with _uninterrupted():
                server = _server(config, opened, account_of, names, team)
            server.run(sockets=[listener])


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the context ends: in an import it would come out as whatever the module makes of it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _server(
    config: BrowseConfig, opened: Opened, account_of: AccountOf, names: set[str], team: Team | None
) -> "uvicorn.Server":
    with uncollected():
        import uvicorn

        from steer.browser.app import create_app
        from steer.browser.meaning import Meaning

        model = SharedModel(config.model or _model_of(opened), config.device)
        meaning = Meaning(opened, config.embedding, config.device) if config.embedding else None
        app = create_app(opened, account_of, names, model, team, config.database, meaning)
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))


def _model_of(opened: Opened) -> str | None:
    """The model that an index was made with, or else a library."""
    own = next((source.model for source in opened.sources.values() if source.model), None)
    return own or model_of_libraries(opened.libraries)
