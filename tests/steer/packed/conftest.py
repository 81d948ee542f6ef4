"""The library of the vLLM plugin's tests, which has every kind of what is packed."""

from tests.steer.vllm.conftest import apart, catalogue, library, made

__all__ = ["apart", "catalogue", "library", "made"]
