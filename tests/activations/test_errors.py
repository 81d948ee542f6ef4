"""Messages stay as long as a person reads, whatever a file said."""

from activations.errors import LONGEST, CorruptArtefactError


def test_what_is_quoted_is_cut() -> None:
    error = CorruptArtefactError("f" * 9999, expected="e" * 9999, got=[0] * 9999, fix="Get it again.")
    assert len(str(error)) < 4 * LONGEST
    assert str(error).endswith(" …. Get it again.")
    assert str(CorruptArtefactError("f", expected="a", got="b", fix="c")) == "f: expected a, got b. c"
