"""Logits of llama.cpp with control vectors, by its own loader of such files. Runs in the environment of xllamacpp.

    check_llama_cpp.py MODEL.gguf TOKENS.json OUT.npz [FILE STRENGTH]...

writes `none`, the logits behind the last token without a vector, and those with each file alone, by its stem. A file
that llama.cpp rejects has no logits. The C functions of llama.cpp are called in the extension module that xllamacpp is,
since none of its Python names sets a control vector; larger structures than llama.cpp's are passed where it gives and
takes its own, which neither side minds on x86-64.
"""

import ctypes as c
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

LOAD = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
"""common_control_vector_load(const std::vector<common_control_vector_load_info> &)"""


class Opaque(c.Structure):
    _fields_ = [("content", c.c_byte * 1024)]


class Batch(c.Structure):
    _fields_ = [("n_tokens", c.c_int32), ("rest", c.c_void_p * 6)]


class LoadInfo(c.Structure):
    """A float and a std::string, which in manylinux2014 is the place of its characters."""

    _fields_ = [("strength", c.c_float), ("name", c.c_char_p)]


class Span(c.Structure):
    """A std::vector: its begin, its end, and the end of its room."""

    _fields_ = [("begin", c.c_void_p), ("end", c.c_void_p), ("room", c.c_void_p)]


class Loaded(c.Structure):
    _fields_ = [("n_embd", c.c_int32), ("data", Span)]


class Llama:
    """A model, and what it says next."""

    def __init__(self, model: str):
        package = find_spec("xllamacpp")
        assert package is not None
        assert package.submodule_search_locations
        (file,) = Path(package.submodule_search_locations[0]).glob("*.so")
        self._library = c.CDLL(str(file))
        self._quiet = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda *_: None)
        self._call("llama_log_set", None, self._quiet, c.c_void_p())
        self._call("llama_backend_init", None)
        how = self._call("llama_model_default_params", Opaque)
        self._model = self._pointer("llama_model_load_from_file", model.encode(), how)
        self.start()
        self._n_vocab = self._call(
            "llama_vocab_n_tokens", c.c_int32, self._pointer("llama_model_get_vocab", self._model)
        )
        self._n_layer = self._call("llama_model_n_layer", c.c_int32, self._model)

    def start(self) -> None:
        """Begin without a vector. Of one that was set before, rows beyond those of the next would stay."""
        how = self._call("llama_context_default_params", Opaque)
        self._context = self._pointer("llama_init_from_model", self._model, how)

    def logits(self, tokens: list[int]) -> np.ndarray:
        self._call("llama_memory_clear", None, self._pointer("llama_get_memory", self._context), c.c_bool(True))
        ids = (c.c_int32 * len(tokens))(*tokens)
        batch = self._call("llama_batch_get_one", Batch, ids, c.c_int32(len(tokens)))
        assert self._call("llama_decode", c.c_int32, self._context, batch) == 0
        found = self._call("llama_get_logits_ith", c.POINTER(c.c_float), self._context, c.c_int32(-1))
        return np.ctypeslib.as_array(found, (self._n_vocab,)).copy()

    def steer(self, file: str, strength: float) -> bool:
        """Whether it takes the file."""
        info = LoadInfo(strength, file.encode())
        start = c.addressof(info)
        given = Span(start, start + c.sizeof(info), start + c.sizeof(info))
        loaded = self._call(LOAD, Loaded, c.byref(given))
        length = ((loaded.data.end or 0) - (loaded.data.begin or 0)) // 4
        if loaded.n_embd == -1 or length == 0:
            return False
        set_ = self._call(
            "llama_set_adapter_cvec", c.c_int32, self._context, c.c_void_p(loaded.data.begin), c.c_size_t(length),
            c.c_int32(loaded.n_embd), c.c_int32(1), self._n_layer_c,
        )  # fmt: skip
        assert set_ == 0
        return True

    @property
    def _n_layer_c(self) -> c.c_int32:
        return c.c_int32(self._n_layer)

    def _pointer(self, name: str, *arguments: Any) -> c.c_void_p:
        found = self._call(name, c.c_void_p, *arguments)
        assert found, name
        return c.c_void_p(found)

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self._library, name)
        function.restype, function.argtypes = result, None
        return function(*arguments)


def main(model: str, tokens: str, out: str, *files: str) -> None:
    llama, ids = Llama(model), json.loads(Path(tokens).read_text())
    found = {"none": llama.logits(ids)}
    for file, strength in zip(files[::2], files[1::2], strict=True):
        if llama.steer(file, float(strength)):
            found[Path(file).stem] = llama.logits(ids)
            llama.start()
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
