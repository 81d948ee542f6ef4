"""What kernels read apart, in Triton's interpreter, is what lanes read, and no more than tokens ask for."""

import math

import numpy as np
import pytest
import torch

from activations.hook_points import HookPoint
from sae.artefact import SaeArtefact
from steer.operations import ScaleLatents
from steer.packed import apart
from steer.packed.rows import Rows
from steer.packed.tables import OWNER, Batch, Sizes
from steer.tables import Lane, LaneKey, Row, Where

D, LATENTS, REQUESTS, EACH = 40, 100, 24, 4
READ, POINT = HookPoint("resid_post", 0), HookPoint("resid_post", 1)


def filled(*, is_encoded: bool, reads: HookPoint, rng: np.random.Generator) -> Lane:
    """A lane of which every request but each third has 4 slots; latents 5 to 7 of its SAE are equal."""
    W_enc, W_dec = (rng.standard_normal(shape).astype(np.float32) for shape in ((D, LATENTS), (LATENTS, D)))
    W_enc[:, 6:8] = W_enc[:, 5:6]
    rule = {"architecture": "topk", "k": 9} if is_encoded else {"architecture": "standard"}
    biases = {"b_enc": np.zeros(LATENTS, np.float32), "b_dec": rng.standard_normal(D).astype(np.float32)}
    sae = SaeArtefact(W_enc=W_enc, W_dec=W_dec, **biases, **rule, metadata={"hook_point": "resid_post.0"})
    lane = Lane(LaneKey(POINT, reads, sae if is_encoded else None, False), REQUESTS * EACH, 1, 4, 4, D)
    for i in range(REQUESTS):
        if i % 3:
            latents = [5, *(int(each) for each in rng.integers(LATENTS, size=EACH - 1))]
            where = Where((i + 1) * OWNER + 1, (i + 1) * OWNER + 99, (frozenset(),))
            rows = [Row(slot, where) for each in latents for slot in ScaleLatents(sae, {each: 0.0}).slots()]
            lane.put([*range(EACH * i, EACH * (i + 1))], rows)
    return lane


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("is_encoded", "reads"), [(True, POINT), (True, READ), (False, READ)])
@torch.no_grad()
def test_each_slot_is_read_on_the_tokens_of_its_request(
    monkeypatch: pytest.MonkeyPatch, is_encoded: bool, reads: HookPoint, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(0)
    lane = filled(is_encoded=is_encoded, reads=reads, rng=rng)
    counts = [int(n) for n in rng.integers(1, 9, size=REQUESTS)]
    batch, n = Batch(Sizes(D, 256, REQUESTS, EACH, 256)), sum(counts)
    batch.fill([*range(1, REQUESTS + 1)], [0] * REQUESTS, counts, torch.cat([torch.arange(each) for each in counts]))
    hidden, residual = (torch.from_numpy(rng.standard_normal((n, D))).to(dtype) for _ in range(2))
    monkeypatch.setattr(apart, "_room", lambda hidden, n: torch.full((len(hidden), n), math.nan))
    acts = lane.mask(batch.index[:, :n], batch.flags[:, :n])
    for other in (residual, None):
        x = hidden.float() if other is None else hidden.float() + other.float()
        expected, got = lane.read(x[None]), apart.read_apart(hidden, other, lane, batch)
        assert torch.equal(got.isnan(), ~acts), "what nobody asks for is not read"
        torch.testing.assert_close(got[acts], expected[acts], atol=1e-5, rtol=0)
        assert 0 < int((got[acts] > 0).sum()) < int(acts.sum())


@torch.no_grad()
def test_where_nothing_is_steered_nothing_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    lane = filled(is_encoded=True, reads=POINT, rng=np.random.default_rng(1))
    batch = Batch(Sizes(D, 256, REQUESTS, EACH, 256))
    made = dict[int, torch.Tensor]()
    monkeypatch.setattr(apart, "_room", lambda hidden, n: made.setdefault(n, torch.full((len(hidden), n), math.nan)))
    apart.read_apart(torch.ones(70, D), None, lane, batch)
    assert {n: bool(room.isnan().all()) for n, room in made.items()} == {REQUESTS * EACH: True, LATENTS: True}
    made.clear()
    batch.fill([2, 1, 3], [0] * 3, [30, 40, 1], torch.tensor([*range(30), *range(40), 5]))
    apart.read_apart(torch.ones(71, D), None, lane, batch)
    blocks = [bool(block.isnan().all()) for block in made[LATENTS].split(apart.TOKENS)]
    assert blocks == [False, True, False], "request 1 has no slots, and 32 to 63 are tokens of its alone"


def test_the_room_of_an_encoder_is_told() -> None:
    key = filled(is_encoded=True, reads=POINT, rng=np.random.default_rng(1)).key
    sizes = Sizes(D, 8, 2, EACH, 0)
    with_encoder, without = (Rows([POINT], sizes, [each]) for each in (key, key._replace(topk=None, keeps_norm=True)))
    assert with_encoder.n_bytes - without.n_bytes == 4 * (D + 1) * LATENTS
