"""Steering vectors in files of other projects: one module and one row of VECTOR_FORMATS each.

To add one, write a module with the names of `VectorFormat` and add its row; the conformance suite then runs over it.
"""

from pathlib import Path

from activations.errors import MismatchError, MissingArtefactError, UnknownNameError
from steer.formats import ds4, glp, hotwire, llama_cpp, lm_eval, neuronpedia, plain, spipe, steering_vectors, svec
from steer.formats.base import Candidate, VectorFormat

VECTOR_FORMATS: dict[str, VectorFormat] = {
    "llama_cpp": llama_cpp,
    "glp": glp,
    "ds4": ds4,
    "steering_vectors": steering_vectors,
    "lm_eval": lm_eval,
    "hotwire": hotwire,
    "neuronpedia": neuronpedia,
    "plain": plain,
    "spipe": spipe,
    "svec_cast": svec.CAST,
    "svec_caa": svec.CAA,
}


def find(name: str) -> VectorFormat:
    """The format called `name`; raises UnknownNameError."""
    if name not in VECTOR_FORMATS:
        known = ", ".join(VECTOR_FORMATS)
        raise UnknownNameError("format of vectors", expected=f"one of {known}", got=f"'{name}'", fix="Choose one.")
    return VECTOR_FORMATS[name]


def detect(path: Path) -> str:
    """Name of the format that a file is in. Raises: MissingArtefactError, MismatchError if it is none of them."""
    if not path.is_file():
        raise MissingArtefactError(path, expected="a file of vectors", got="none", fix="Check the path.")
    file = Candidate(path)
    for name, known in VECTOR_FORMATS.items():
        if known.matches(file):
            return name
    titles = ", ".join(known.TITLE for known in VECTOR_FORMATS.values())
    raise MismatchError(path, expected=f"one of: {titles}", got="none of them", fix="Say which with format=NAME.")
