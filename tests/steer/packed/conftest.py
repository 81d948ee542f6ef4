"""The library of the vLLM plugin's tests, which has every kind of what is packed."""

from tests.steer.vllm.conftest import catalogue, library, made

__all__ = ["catalogue", "library", "made"]
