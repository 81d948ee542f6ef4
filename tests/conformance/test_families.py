"""Every family, on tiny random models of every model type it covers, at every site it says they have.

What makes the sites trustworthy: the residual stream is the model's own hidden states, and what the sub-layers add
explains every step of it. With an edit, the same sums hold but for the edit, so that it is neither lost nor doubled.

A new row in FAMILIES is covered without a change here, as long as transformers builds its config from the usual keys.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from activations.errors import HookPointError, ModelError
from activations.families import FAMILIES, ModelFamily, find_family
from activations.families.base import Place
from activations.hook_points import SITES, HookPoint
from activations.hooks import EditFn, capture, edit, run_until
from activations.quiet import quiet_transformers

N_LAYERS, D_MODEL, VOCAB, N_TOKENS = 3, 32, 64, 9
DELTA = torch.linspace(-1, 1, D_MODEL)

USUAL_KEYS: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_HEADS: dict[str, Any] = {"head_dim": 8}
SMALL_WINDOW: dict[str, Any] = {"sliding_window": 4}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED: dict[str, Any] = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
STREAMS: dict[str, Any] = {
    **EXPERTS,
    **SMALL_HEADS,
    **SMALL_WINDOW,
    "hc_mult": 4,
    "n_routed_experts": 4,
    "num_key_value_heads": 1,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    # No fewer than there are compressed keys: among scores of 0, which are many, topk picks as it pleases.
    "index_topk": 8,
    "partial_rotary_factor": 0.5,
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
}
SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention"]
SLIDING_AND_COMPRESSED = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]

EXTRA_KEYS: dict[str, dict[str, Any]] = {
    "deepseek_v2": ROUTED | LATENT,
    "deepseek_v3": ROUTED | LATENT | {"n_group": 2, "topk_group": 1},
    "deepseek_v4": STREAMS | {"layer_types": SLIDING_AND_COMPRESSED},
    "deepseek_v4-sliding": STREAMS | {"layer_types": ["sliding_attention"] * N_LAYERS},
    "dots1": ROUTED,
    "ernie4_5": SMALL_HEADS,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    "exaone4": SMALL_WINDOW,
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": SMALL_HEADS,
    "gemma2": SMALL_HEADS | SMALL_WINDOW,
    "gemma3_text": SMALL_HEADS | SMALL_WINDOW | {"layer_types": SLIDING_AND_FULL},
    "glm": SMALL_HEADS,
    "glm4_moe": ROUTED | SMALL_HEADS,
    "gpt_neox": {"use_parallel_residual": True},
    "gpt_neox-sequential": {"use_parallel_residual": False},
    "gpt_oss": EXPERTS | SMALL_HEADS | SMALL_WINDOW | {"num_local_experts": 4, "layer_types": SLIDING_AND_FULL},
    "helium": SMALL_HEADS,
    "hunyuan_v1_dense": SMALL_HEADS,
    "ministral": SMALL_HEADS | SMALL_WINDOW,
    "mistral": SMALL_WINDOW,
    "mixtral": SMALL_WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo3": SMALL_WINDOW,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS | SMALL_HEADS | {"num_experts": 4},
}
"""Model type, or MODEL_TYPE-VARIANT -> keys of its config beyond the usual ones.

They are those that have other names, are large by default, or change what a block does.
"""

COMPRESSES_PADDING = {"deepseek_v4": HookPoint("attn_in", 1)}
"""Models that left padding changes by itself -> the last hook point that it leaves alone.

The compressors of DeepSeek-V4 merge every so many columns into one key, whatever the attention mask says. Here the
first of them is in block 1.
"""

NORMS = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
"""Sites in front of a sub-layer -> the norm that reads them."""


class Case(NamedTuple):
    """A model of one family and one config."""

    name: str
    row: str

    @property
    def family(self) -> ModelFamily:
        return FAMILIES[self.row]

    @property
    def keys(self) -> dict[str, Any]:
        return USUAL_KEYS | EXTRA_KEYS.get(self.name, {})

    @property
    def places(self) -> Mapping[str, Place]:
        return self.family.sites(SimpleNamespace(**self.keys))

    @property
    def sites(self) -> list[str]:
        return [site for site in SITES if site in self.places]

    @property
    def points(self) -> list[HookPoint]:
        return [HookPoint(site, layer) for layer in range(N_LAYERS) for site in self.sites]

    @property
    def has_streams(self) -> bool:
        return any(place.streams for place in self.places.values())


def all_cases() -> Iterator[Case]:
    for row, family in FAMILIES.items():
        for kind in sorted(family.model_types):
            yield Case(kind, row)
            yield from (Case(name, row) for name in EXTRA_KEYS if name.startswith(f"{kind}-"))


CASES = [pytest.param(case, id=case.name) for case in all_cases()]
SITES_OF_CASES = [pytest.param(case, site, id=f"{case.name}-{site}") for case in all_cases() for site in case.sites]
each_case = pytest.mark.parametrize("case", CASES)
each_site = pytest.mark.parametrize(("case", "site"), SITES_OF_CASES)


def tiny_model(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    """The same model on each call."""
    return built(case, dtype)


@cache
def built(case: Case, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        config = AutoConfig.for_model(case.name.partition("-")[0], **case.keys)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def token_ids(n_rows: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (n_rows, N_TOKENS), generator=torch.Generator().manual_seed(1))


def read(case: Case, points: Sequence[HookPoint] = (), **inputs: Any) -> dict[HookPoint, Tensor]:
    """What is at these hook points, or at all of them."""
    model = tiny_model(case, inputs.pop("dtype", torch.float32))
    with capture(model, case.family, points or case.points) as captured:
        run_until(model, {"input_ids": token_ids()} | inputs)
    return captured


@cache
def clean(case: Case) -> dict[HookPoint, Tensor]:
    return read(case)


def add_delta(value: Tensor) -> Tensor:
    return value + DELTA.to(value.dtype)


def adding(case: Case, point: HookPoint, delta: Tensor = DELTA) -> Any:
    """An edit that adds to what is at the hook point."""
    return edit(tiny_model(case), case.family, point, lambda value: value + delta)


@contextmanager
def everywhere(case: Case, fn: EditFn, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """The same edit at each hook point."""
    with ExitStack() as stack:
        for point in case.points:
            stack.enter_context(edit(tiny_model(case, dtype), case.family, point, fn))
        yield


def one(state: Tensor) -> Tensor:
    """A residual stream as it is read: the mean, if it is several."""
    return state.mean(dim=2, dtype=torch.float32) if state.ndim == 4 else state


def logits_of(case: Case, resid: Tensor) -> Tensor:
    """What lies between the last block and the logits."""
    model: Any = tiny_model(case)
    x = model.model.hc_head(resid) if case.has_streams else resid
    logits = case.family.lm_head(model)(case.family.final_norm(model)(x))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


@contextmanager
def seen(module: nn.Module) -> Iterator[dict[str, Any]]:
    """A module's first argument and what it returned, on the latest pass."""
    values: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        values.update(input=args[0] if args else kwargs["hidden_states"], output=output)

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        yield values
    finally:
        handle.remove()


def leaving(block: dict[str, Any]) -> Tensor:
    """The residual stream, or streams, that a block returned."""
    output = block["output"]
    return output[0] if isinstance(output, tuple) else output


def leaps(case: Case) -> dict[HookPoint, Tensor]:
    """What the sub-layers do not explain of each step of the residual stream: [batch, pos, (streams,) d_model]."""
    found: dict[HookPoint, Tensor] = {}
    mixer_names = ["attn_hc", "ffn_hc"] if case.has_streams else []
    with ExitStack() as stack:
        modules = [case.family.block(tiny_model(case), layer) for layer in range(N_LAYERS)]
        blocks = [stack.enter_context(seen(module)) for module in modules]
        mixers = [[stack.enter_context(seen(m.get_submodule(name))) for name in mixer_names] for m in modules]
        values = read(case)
    for layer, block in enumerate(blocks):
        at = {site: values[HookPoint(site, layer)] for site in case.sites}
        steps = leaps_in_block(at, block["input"], leaving(block), mixers[layer])
        if layer:
            steps["resid_pre"] = block["input"] - leaving(blocks[layer - 1])
        found |= {HookPoint(site, layer): step for site, step in steps.items()}
    return found


def leaps_in_block(at: dict[str, Tensor], pre: Tensor, post: Tensor, mixers: list[dict[str, Any]]) -> dict[str, Tensor]:
    if mixers:
        attn, ffn = mixers
        mid = ffn["input"]
        return {
            "resid_mid": mid - mixed(attn["output"], at["attn_out"], pre),
            "resid_post": post - mixed(ffn["output"], at["mlp_out"], mid),
        }
    if "resid_mid" not in at:
        return {"resid_post": post - (pre + at["attn_out"] + at["mlp_out"])}
    return {
        "resid_mid": at["resid_mid"] - (pre + at["attn_out"]),
        "resid_post": post - (at["resid_mid"] + at["mlp_out"]),
    }


def mixed(weights: tuple[Tensor, Tensor, Tensor], added: Tensor, streams: Tensor) -> Tensor:
    """The residual streams after a sub-layer of DeepSeek-V4."""
    post, comb, _ = weights
    return torch.einsum("bpk,bpd->bpkd", post, added) + torch.einsum("bpjk,bpjd->bpkd", comb, streams)


@contextmanager
def calls() -> Iterator[list[nn.Module]]:
    """The modules that are called, in order."""
    called: list[nn.Module] = []
    handle = register_module_forward_pre_hook(lambda module, args: called.append(module))
    try:
        yield called
    finally:
        handle.remove()


@each_case
def test_is_found_with_its_sizes_and_sites(case: Case) -> None:
    model = tiny_model(case)
    family = find_family(model)
    assert family is case.family
    assert family.name == case.row
    assert (family.d_model(model.config), family.n_layers(model.config)) == (D_MODEL, N_LAYERS)
    assert set(family.sites(model.config)) == set(case.sites)
    assert {"resid_pre", "attn_out", "mlp_out", "resid_post"} <= set(case.sites) <= set(SITES)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_capture_equals_hidden_states(case: Case, dtype: torch.dtype) -> None:
    model = tiny_model(case, dtype)
    with seen(case.family.block(model, N_LAYERS - 1)) as last:
        states = model(token_ids(), output_hidden_states=True, use_cache=False).hidden_states
    captured = read(case, dtype=dtype)
    # What transformers calls the last hidden state has been through the final norm.
    for layer, state in enumerate([*states[:N_LAYERS], leaving(last)]):
        assert state.dtype == dtype
        for point in (HookPoint("resid_pre", layer), HookPoint("resid_post", layer - 1)):
            assert point not in captured or torch.equal(captured[point], one(state))
    assert all(value.shape == (2, N_TOKENS, D_MODEL) for value in captured.values())


@each_case
def test_norm_and_head_lead_to_the_logits(case: Case) -> None:
    model, point = tiny_model(case), HookPoint("resid_post", N_LAYERS - 1)
    with seen(case.family.block(model, point.layer)) as last:
        logits = model(token_ids()).logits
        torch.testing.assert_close(logits_of(case, leaving(last)), logits)
        expected = logits_of(case, leaving(last) + DELTA)
        with adding(case, point):
            torch.testing.assert_close(model(token_ids()).logits, expected)
    assert case.family.lm_head(model).weight.shape == (VOCAB, D_MODEL)


@each_case
def test_what_sublayers_add_explains_every_step(case: Case) -> None:
    for leap in leaps(case).values():
        torch.testing.assert_close(leap, torch.zeros_like(leap), rtol=0, atol=1e-5)


@each_site
def test_an_edit_is_the_only_other_step(case: Case, site: str) -> None:
    point = HookPoint(site, 1)
    with adding(case, point):
        found = leaps(case)
    for here, leap in found.items():
        expected = DELTA if here == point else torch.zeros(D_MODEL)
        torch.testing.assert_close(leap, expected.expand_as(leap), rtol=0, atol=1e-5)


@each_site
def test_edit_arrives_there_and_nowhere_before(case: Case, site: str) -> None:
    model, point = tiny_model(case), HookPoint(site, 1)
    with capture(model, case.family, case.points) as around, adding(case, point):
        inside = read(case)
    here = case.points.index(point)
    for before in case.points[:here]:
        assert torch.equal(inside[before], clean(case)[before])
    assert torch.equal(around[point], clean(case)[point])
    torch.testing.assert_close(inside[point], clean(case)[point] + DELTA)
    for after in case.points[here + 1 :]:
        is_beside = after == HookPoint("mlp_out", 1) and site == "attn_out" and "resid_mid" not in case.sites
        assert torch.equal(around[after], inside[after])
        assert torch.allclose(inside[after], clean(case)[after]) == is_beside


@pytest.mark.parametrize(("case", "site"), [param for param in SITES_OF_CASES if param.values[1] in NORMS])
def test_sublayer_reads_what_is_collapsed(case: Case, site: str) -> None:
    point = HookPoint(site, 1)
    norm = case.family.block(tiny_model(case), 1).get_submodule(NORMS[site])
    with adding(case, point), seen(norm) as read_by_norm:
        assert torch.equal(read(case)[point], read_by_norm["input"])


@each_case
def test_identity_edit_is_bitwise_identity(case: Case) -> None:
    logits = tiny_model(case)(token_ids()).logits
    with everywhere(case, lambda value: value):
        assert torch.equal(tiny_model(case)(token_ids()).logits, logits)


@each_case
def test_kv_cache_gives_the_same(case: Case) -> None:
    model, ids = tiny_model(case), token_ids()
    parts: list[dict[HookPoint, Tensor]] = []
    with torch.no_grad(), everywhere(case, add_delta), capture(model, case.family, case.points) as captured:
        model(ids, use_cache=False)
        whole, past = dict(captured), None
        for new in (ids[:, :4], *ids[:, 4:].split(1, dim=1)):
            past = model(new, past_key_values=past, use_cache=True).past_key_values
            parts.append(dict(captured))
    for point in case.points:
        steps = torch.cat([part[point] for part in parts], dim=1)
        torch.testing.assert_close(steps, whole[point], rtol=1e-4, atol=1e-4)


@each_case
def test_left_padding_gives_the_same(case: Case) -> None:
    ids, n_pad = token_ids(1), 3
    padded = torch.cat([torch.zeros(1, n_pad, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= n_pad).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs: dict[str, Any] = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    points = case.points
    if case.name in COMPRESSES_PADDING:
        bare, left = tiny_model(case)(ids).logits, tiny_model(case)(**inputs).logits[:, n_pad:]
        assert not torch.allclose(left, bare, rtol=0.1, atol=0.1)
        points = points[: points.index(COMPRESSES_PADDING[case.name]) + 1]
    with everywhere(case, add_delta):
        plain, left = read(case, input_ids=ids), read(case, **inputs)
    for point in points:
        torch.testing.assert_close(left[point][:, n_pad:], plain[point], rtol=1e-4, atol=1e-4)


@each_case
def test_a_batch_equals_its_rows(case: Case) -> None:
    ids, lengths = token_ids(), (N_TOKENS, 5)
    mask = (torch.arange(N_TOKENS) < torch.tensor(lengths)[:, None]).long()
    with everywhere(case, add_delta):
        batch = read(case, input_ids=ids * mask, attention_mask=mask)
        for row, length in enumerate(lengths):
            alone = read(case, input_ids=ids[row : row + 1, :length])
            for point in case.points:
                torch.testing.assert_close(batch[point][row : row + 1, :length], alone[point], rtol=1e-4, atol=1e-4)


@each_case
def test_edits_in_bfloat16(case: Case) -> None:
    model = tiny_model(case, torch.bfloat16)
    with capture(model, case.family, case.points) as around, everywhere(case, add_delta, torch.bfloat16):
        inside, logits = read(case, dtype=torch.bfloat16), model(token_ids()).logits
    assert logits.dtype == torch.bfloat16
    for point in case.points:
        # A mean is read in float32, and what moves it is rounded in each stream.
        is_mean = case.has_streams and point.site.startswith("resid")
        assert inside[point].dtype == around[point].dtype == (torch.float32 if is_mean else torch.bfloat16)
        tolerance = 1e-2 if is_mean else 0
        torch.testing.assert_close(inside[point], add_delta(around[point]), rtol=tolerance, atol=tolerance)


@each_site
def test_stops_right_after_the_last_hook_point(case: Case, site: str) -> None:
    model, last = tiny_model(case), HookPoint(site, 1)
    points = case.points[: case.points.index(last) + 1]
    with calls() as whole:
        read(case)
    with calls() as stopped, capture(model, case.family, points, stop_after_last=True) as captured:
        assert run_until(model, {"input_ids": token_ids()}) is None
    place = case.family.sites(model.config)[site]
    module = case.family.block(model, 1).get_submodule(place.path)
    assert stopped == whole[: len(stopped)]
    if place.side == "input":
        assert stopped[-1] is module
    else:
        assert module in stopped
        assert whole[len(stopped)] not in set(module.modules())
    assert list(captured) == points
    assert all(torch.equal(captured[point], clean(case)[point]) for point in points)


@each_site
def test_a_direction_gets_its_gradient(case: Case, site: str) -> None:
    weights = torch.randn(N_TOKENS, VOCAB, generator=torch.Generator().manual_seed(2))

    def loss(direction: Tensor) -> Tensor:
        with adding(case, HookPoint(site, 1), direction):
            return (tiny_model(case)(token_ids(), use_cache=False).logits * weights).mean()

    direction = torch.zeros(D_MODEL, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(direction), direction)
    assert gradient.isfinite().all()
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        measured = loss(step) - loss(-step)
    torch.testing.assert_close(measured, 2 * gradient @ step, rtol=0.02, atol=0)


@each_case
def test_what_the_model_does_not_have_is_refused(case: Case) -> None:
    absent = [HookPoint(site, 0) for site in SITES if site not in case.sites]
    for point in absent:
        with (
            pytest.raises(HookPointError, match=f"has: {', '.join(case.sites)}, got {point.site}"),
            adding(case, point),
        ):
            pass
    with pytest.raises(HookPointError, match="a layer from 0 to 2"):
        read(case, [HookPoint(case.sites[0], N_LAYERS)])


@each_case
def test_unknown_model_type_says_where_to_add_it(case: Case) -> None:
    model: Any = nn.Module()
    model.config = SimpleNamespace(model_type=case.name + "_unknown")
    with pytest.raises(ModelError, match=r"activations/families/.*docs/extending\.md") as caught:
        find_family(model)
    assert case.name.partition("-")[0] in caught.value.expected
