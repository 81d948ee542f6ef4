"""Other libraries' output in our own form: no progress bars and log lines of theirs, and errors in one line."""

import logging as standard_logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers, and what it imports, inside the block; errors still raise."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    disabled = standard_logging.root.manager.disable
    standard_logging.disable(standard_logging.WARNING)  # torchao's, about kernels of other devices
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        standard_logging.disable(disabled)
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
