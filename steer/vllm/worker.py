"""What a worker of vLLM does: it puts steering behind blocks of its model, and fills the tables before each pass.

The operator `saekit::steer` stands behind every block at whose output a library may steer. To the compiler it is opaque
and changes its first argument in place; what it reads and writes has fixed addresses, so graphs stay as they are. It is
there whether or not anything steers.

Under tensor parallelism every worker holds the whole residual stream behind a block, so each does the same to it. Left
out: checks of requests (`steer.vllm.plugin`).
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from activations.errors import ConfigError
from activations.hook_points import HookPoint
from steer.packed.rows import Fired, Rows, describe
from steer.packed.tables import Site, Sizes
from steer.serving.items import Asked
from steer.vllm.plugin import NAME, catalogue_of
from steer.vllm.runners import follow

log = logging.getLogger("vllm.saekit")
SITES: dict[int, Site] = {}
"""layer -> what steers its output: the operator's last argument, a number, since tables are no part of a graph"""


def _steer(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    """Steer the residual stream behind a block, which is `hidden`, or the sum of both."""
    flat = hidden.view(-1, hidden.shape[-1])
    SITES[layer].act(flat, None if residual is None else residual.view(-1, residual.shape[-1]))


# Not `torch.library.custom_op`, a call of which takes several times as long.
_LIBRARY = torch.library.Library("saekit", "FRAGMENT")
_LIBRARY.define("steer(Tensor(a!) hidden, Tensor? residual, int layer) -> ()")
_LIBRARY.impl("steer", _steer, "CompositeExplicitAutograd")
torch.library.register_fake("saekit::steer", lambda hidden, residual, layer: None, lib=_LIBRARY)


class Extension:
    """What `collective_rpc` can ask a worker for."""

    def saekit_fired(self, request_id: str) -> Fired | None:
        """Where the gates of a request fired, while it runs and for a while after; none: not known, or no gates."""
        return self.model_runner.saekit.fired(request_id)  # type: ignore[attr-defined]

    def saekit_fired_of(self, request_ids: list[str]) -> list[Fired | None]:
        """The same of several requests."""
        return [self.saekit_fired(each) for each in request_ids]


def attach(runner: Any) -> None:
    """Make a model runner of vLLM steer; its model has been loaded, and not run yet.

    Raises: ConfigError if the model has no blocks where a Hugging Face model of its kind has them.
    """
    config = runner.vllm_config
    catalogue = catalogue_of(config)
    points = [HookPoint.parse(each) for each in config.additional_config[NAME]["points"]]
    sizes = _sizes(config, runner, catalogue.model.d_model)
    rows = runner.saekit = Rows(points, sizes, catalogue.lanes).to(runner.device)
    for point, site in rows.sites.items():
        SITES[point.layer] = site
        _steer_block(_block(catalogue.model.family, runner.model, point.layer), point.layer)
    _try(rows, config.model_config.dtype)
    log.info("saekit's tables: %s", describe(rows))

    follow(runner, rows, lambda request, n: catalogue.prepare(Asked.model_validate(request), n))


def _try(rows: Rows, dtype: torch.dtype) -> None:
    """Steer one token that is nobody's: a kernel may be compiled now, but not while a graph is captured."""
    for site in rows.sites.values():
        hidden = torch.zeros(1, rows.batch.sizes.d_model, dtype=dtype, device=rows.batch.index.device)
        for residual in (None, hidden.clone()):
            site.act(hidden, residual)


def _sizes(config: Any, runner: Any, d_model: int) -> Sizes:
    compilation = config.compilation_config
    has_graphs = bool(compilation.cudagraph_mode) and not config.model_config.enforce_eager
    captured = (compilation.max_cudagraph_capture_size or 0) if has_graphs else 0
    return Sizes(
        d_model=d_model,
        n_tokens=max(runner.max_num_tokens, captured),
        n_requests=config.scheduler_config.max_num_seqs,
        n_slots=config.additional_config[NAME]["slots"],
        n_captured=captured,
    )


def _block(family: Any, model: nn.Module, layer: int) -> nn.Module:
    try:
        return family.block(model, layer)
    except AttributeError as error:
        fix = "Serve it with the transformers backend."
        raise ConfigError(type(model).__name__, expected=f"block {layer}", got=str(error), fix=fix) from error


def _steer_block(block: nn.Module, layer: int) -> None:
    """A subclass in place of a hook, which the compiler would have to be told to look for."""
    plain = type(block)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain.forward(self, *args, **kwargs)
        if isinstance(output, tuple):
            torch.ops.saekit.steer(output[0], output[1], layer)
        else:
            torch.ops.saekit.steer(output, None, layer)
        return output

    block.__class__ = type(f"Steered{plain.__name__}", (plain,), {"forward": forward})
