from __future__ import annotations

import torch

from modeling_t5gemma.masks import AttentionPattern, ends_of_source, join, positions_in_segments


def test_visible_by_hand():
    index = torch.arange(4)[None]
    seen = AttentionPattern(index, index, causal=True, window=2).visible()
    assert seen[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    seen = AttentionPattern(index, index, window=2).visible()
    assert seen[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    segments = torch.tensor([[1, 1, 2, 0]])
    seen = AttentionPattern(index, index, False, None, segments != 0, segments, segments).visible()
    assert seen[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_a_rule_that_hides_nothing_has_no_mask():
    index = torch.arange(3)[None]
    assert AttentionPattern(index, index).visible() is None


def test_the_mask_is_built_once():
    index = torch.arange(3)[None]
    pattern = AttentionPattern(index, index, causal=True)
    assert pattern.visible() is pattern.visible()


def test_positions_in_segments():
    segments = torch.tensor([[1, 1, 2, 2, 2, 0, 0], [3, 1, 1, 1, 0, 0, 0]])
    assert positions_in_segments(segments).tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 0, 1, 2, 0, 1, 2]]


def test_ends_of_source():
    positions = torch.tensor([[0, 1, 2, 2], [0, 0, 1, 2]])
    valid = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    assert ends_of_source(positions, valid, None, None).tolist() == [[3], [3]]
    assert ends_of_source(positions[:1], torch.zeros(1, 4).bool(), None, None).tolist() == [[0]]
    segments, targets = torch.tensor([[1, 1, 1, 2]]), torch.tensor([[1, 2, 2, 3]])
    # Document 3 has no source, so its target begins at 0.
    assert ends_of_source(positions_in_segments(segments), None, segments, targets).tolist() == [[3, 1, 1, 0]]


def test_join_counts_over_both():
    source = AttentionPattern(
        torch.tensor([[3, 4]]), torch.tensor([[0, 1, 2]]), key_valid=torch.tensor([[1, 1, 0]]).bool()
    )
    own = AttentionPattern(torch.tensor([[3, 4]]), torch.tensor([[3, 4]]), causal=True, window=3)
    assert join(source, own).visible()[0, 0].int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]
