"""Nearest rows, in blocks, beside the whole matrix of cosines."""

import pytest
import torch

from sae.cosines import nearest


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("same", [True, False])
def test_nearest_rows_in_blocks_are_those_of_the_whole_matrix(
    same: bool, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(13, 5, generator=generator), torch.randn(9, 5, generator=generator)
    b = a if same else b
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    if same:
        cosines.fill_diagonal_(-1)
    expected = cosines.topk(k, dim=1)
    monkeypatch.setattr("sae.cosines._CELLS", 30)
    values, indices = nearest(a, b, k, same=same)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices)
    assert torch.equal(indices[:, 0], cosines.max(1).indices)


def test_a_row_of_zeros_is_near_nothing_and_a_row_has_itself_last() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    values, indices = nearest(rows, rows, 3, same=True)
    assert indices[:, -1].tolist() == [0, 1, 2]
    assert values[:, -1].tolist() == [-torch.inf] * 3
    assert values[1, :2].tolist() == [0, 0]
