"""Prompts that begin alike share what the cache holds of that, as long as nothing steers them.

transformers keys blocks of its cache by token ids alone, in a function that is told of no request, so a block cannot be
keyed by what it was steered with. A steered request therefore neither takes blocks of others nor leaves its own to
them: what it left in the cache is of no use to another, and what others left lacks what it is steered with.
"""

from collections.abc import Callable
from typing import Any


def share_where_plain(manager: Any, is_plain: Callable[[str], bool]) -> None:
    """Let a manager that shares blocks do so for some requests alone; before it starts.

    Args:
      is_plain: whether nothing steers the request of this id.
    """
    create = manager._create_batch_processor

    def created() -> Any:
        processor = create()
        cache = processor.cache
        search, mark = cache.search_prefix_match, cache.mark_complete_blocks

        def found(id_: str, prompt: list[int]) -> int:
            return search(id_, prompt) if is_plain(id_) else 0

        def marked(state: Any, complete: dict[str, int]) -> None:
            if is_plain(state.request_id):
                mark(state, complete)

        cache.search_prefix_match, cache.mark_complete_blocks = found, marked
        return processor

    manager._create_batch_processor = created
