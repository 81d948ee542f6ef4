"""Text for people and databases: in one line, and without what a terminal would obey."""

import unicodedata


def one_line(text: str, limit: int) -> str:
    """Text in one line of at most `limit` characters, without control and format characters.

    >>> one_line("a\\n  b\\x1b[31mc", 20)
    'a b[31mc'
    """
    spaced = " ".join(text[: 8 * limit].split())
    clean = "".join(letter for letter in spaced if unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    return clean if len(clean) <= limit else clean[: limit - 1].rstrip() + "…"


def shown(token: str) -> str:
    """A token's text as people can read it, white space that is all of it included.

    >>> shown(" river"), shown("\\n\\n"), shown("  ")
    ('river', '↵↵', '␣␣')
    """
    if not token.strip():
        return "".join({"\n": "↵", "\t": "⇥", " ": "␣"}.get(letter, "") for letter in token) or "�"
    return one_line(token, 60) or "�"
