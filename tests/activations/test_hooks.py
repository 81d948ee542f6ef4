"""Reading and editing the residual stream; the same on real blocks is in tests/conformance/test_families.py."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from activations.errors import HookPointError, ShapeError
from activations.families.base import WHOLE_BLOCK, DecoderFamily, Place
from activations.hook_points import HookPoint
from activations.hooks import capture, edit, run_until

PRE0, POST0, POST1 = (HookPoint.parse(name) for name in ("resid_pre.0", "resid_post.0", "resid_post.1"))
MID1, MLP_OUT1 = HookPoint("resid_mid", 1), HookPoint("mlp_out", 1)
FAMILY = DecoderFamily(
    name="stub",
    model_types=frozenset({"stub"}),
    blocks_path="layers",
    final_norm_path="norm",
    places=WHOLE_BLOCK | {"resid_mid": Place("mlp", "input", shared=True), "mlp_out": Place("mlp", "output", item=1)},
)
STREAMS = replace(FAMILY, places={"resid_post": Place("", "output", streams=True)})


class Mlp(nn.Module):
    """Returns ones, as the second entry of a tuple, and remembers what it read."""

    def forward(self, x: Tensor) -> tuple[str, Tensor]:
        self.read = x.clone()
        return "weights", torch.ones_like(x)


class Block(nn.Module):
    """Adds 1 and returns a tuple, as blocks of older versions of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, hidden_states: Tensor, use_cache: bool = False) -> tuple[Tensor, str]:
        return hidden_states + self.mlp(hidden_states)[1], "kept"


class Model(nn.Module):
    """Two blocks, called with the residual stream by position or by keyword."""

    def __init__(self, by_keyword: bool):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.config = SimpleNamespace(model_type="stub", num_hidden_layers=2, hidden_size=4)
        self.by_keyword = by_keyword

    def forward(self, x: Tensor, use_cache: bool = True) -> Any:
        output: Any = (x,)
        for layer in self.layers:
            output = layer(hidden_states=output[0]) if self.by_keyword else layer(output[0], use_cache=use_cache)
        return output


@pytest.fixture(params=[False, True], ids=["positional", "keyword"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.param)


def zeros() -> Tensor:
    return torch.zeros(1, 3, 4)


def test_capture_fills_anew_on_each_pass(model: Model) -> None:
    with capture(model, FAMILY, [POST1, PRE0]) as captured:
        assert captured == {}
        model(zeros())
        assert [float(captured[point].mean()) for point in (PRE0, POST1)] == [0, 2]
        model(zeros() + 5)
        assert [float(captured[point].mean()) for point in (PRE0, POST1)] == [5, 7]
    model(zeros())
    assert float(captured[PRE0].mean()) == 5


def test_edit_keeps_the_rest_of_a_tuple(model: Model) -> None:
    with edit(model, FAMILY, POST0, lambda resid: resid * 10):
        output = model(zeros())
    assert (float(output[0].mean()), output[1]) == (11, "kept")
    assert float(model(zeros())[0].mean()) == 2


def test_edit_before_a_block(model: Model) -> None:
    with edit(model, FAMILY, PRE0, lambda resid: resid - 1):
        assert float(model(zeros())[0].mean()) == 1


def test_edits_at_one_place_compose_in_order(model: Model) -> None:
    with edit(model, FAMILY, POST0, lambda r: r + 1), edit(model, FAMILY, POST0, lambda r: r * 10):
        assert float(model(zeros())[0].mean()) == 21


def test_capture_inside_an_edit_sees_it_and_around_it_does_not(model: Model) -> None:
    with (
        capture(model, FAMILY, [POST0]) as around,
        edit(model, FAMILY, POST0, lambda resid: resid + 100),
        capture(model, FAMILY, [POST0]) as inside,
    ):
        model(zeros())
    assert (float(around[POST0].mean()), float(inside[POST0].mean())) == (1, 101)


def test_edit_of_what_a_block_keeps_reaches_the_module_and_the_skip_connection(model: Model) -> None:
    with capture(model, FAMILY, [MID1]) as around, edit(model, FAMILY, MID1, lambda resid: resid + 10):
        output = model(zeros())
    block: Any = model.layers[1]
    assert float(block.mlp.read.mean()) == 11
    assert float(output[0].mean()) == 12
    assert float(around[MID1].mean()) == 1


def test_an_edit_may_use_its_argument_for_gradients_although_it_is_replaced_in_place(model: Model) -> None:
    scale = torch.tensor(3.0, requires_grad=True)
    with edit(model, FAMILY, MID1, lambda resid: resid * scale):
        model(zeros())[0].sum().backward()
    assert scale.grad == zeros().numel()


def test_one_entry_of_a_tuple_is_edited(model: Model) -> None:
    with edit(model, FAMILY, MLP_OUT1, lambda added: added * 5), capture(model, FAMILY, [MLP_OUT1]) as captured:
        assert float(model(zeros())[0].mean()) == 6
    assert float(captured[MLP_OUT1].mean()) == 5


def test_streams_are_read_as_their_mean_and_all_moved_by_what_it_moves(model: Model) -> None:
    streams = torch.stack([zeros(), zeros() + 4], dim=2).bfloat16()
    with edit(model, STREAMS, POST0, lambda mean: mean * 1.5), capture(model, STREAMS, [POST0]) as captured:
        output = model(streams)[0]
    assert captured[POST0].dtype == torch.float32
    assert torch.equal(captured[POST0], zeros() + 4.5)
    assert torch.equal(output, streams + 1 + 1.5 + 1)
    assert output.dtype == torch.bfloat16


def test_a_capture_stops_at_the_deepest_of_its_sites(model: Model) -> None:
    with capture(model, FAMILY, [MLP_OUT1, PRE0, MID1], stop_after_last=True) as captured:
        assert run_until(model, {"x": zeros()}) is None
    assert list(captured) == [PRE0, MID1, MLP_OUT1]


def test_stop_inside_the_pass_of_a_pre_hook(model: Model) -> None:
    with capture(model, FAMILY, [PRE0], stop_after_last=True) as captured:
        assert run_until(model, {"x": zeros()}) is None
    assert set(captured) == {PRE0}
    assert run_until(model, {"x": zeros()}) is not None


def test_run_until_takes_no_gradients_and_capture_alone_keeps_them(model: Model) -> None:
    x = zeros().requires_grad_()
    with capture(model, FAMILY, [POST0]) as captured:
        run_until(model, {"x": x})
        assert not captured[POST0].requires_grad
        model(x)
        assert captured[POST0].requires_grad


def test_hooks_are_gone_after_an_error(model: Model) -> None:
    with pytest.raises(ZeroDivisionError), edit(model, FAMILY, POST0, lambda resid: resid * 10):
        _ = 1 / 0
    assert float(model(zeros())[0].mean()) == 2


@pytest.mark.parametrize("point", [PRE0, POST0], ids=str)
def test_edit_of_another_shape_or_dtype_is_refused(model: Model, point: HookPoint) -> None:
    with (
        pytest.raises(ShapeError, match=rf"edit at {point}: expected \(1, 3, 4\) torch.float32"),
        edit(model, FAMILY, point, lambda resid: resid.double()),
    ):
        model(zeros())
    with pytest.raises(ShapeError), edit(model, FAMILY, point, lambda resid: resid[:, :1]):
        model(zeros())


def test_no_such_layer_or_site(model: Model) -> None:
    with pytest.raises(HookPointError, match="from 0 to 1"), edit(model, FAMILY, HookPoint("resid_post", 2), abs):
        pass
    with (
        pytest.raises(HookPointError, match="has: resid_pre, resid_mid, mlp_out, resid_post, got attn_in"),
        capture(model, FAMILY, [HookPoint("attn_in", 0)]),
    ):
        pass
