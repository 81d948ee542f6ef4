"""Nearest rows, in blocks, beside the whole matrix of cosines."""

import pytest
import torch

from sae.cosines import near, nearest, paired


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


def test_near_pairs_in_blocks_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(17, 3, generator=generator), torch.randn(11, 3, generator=generator)
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    monkeypatch.setattr("sae.cosines._CELLS", 40)
    for least, most in ((0.5, 11), (0.2, 2)):
        found = near(a, b, least, most)
        kept = (cosines >= least) & (cosines >= cosines.topk(most, dim=1).values[:, -1:])
        assert torch.equal(torch.stack([found.row, found.other]), kept.nonzero().T)
        torch.testing.assert_close(found.largest, cosines.amax(1))
        torch.testing.assert_close(found.largest_back, cosines.amax(0))
        torch.testing.assert_close(paired(a, b, found.row, found.other), cosines[kept])
    assert ((cosines >= 0.2).sum(1) > 2).any(), "some rows have more than `most`"
    assert len(near(a, b, 1.5, 2).row) == 0
