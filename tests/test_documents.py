"""Where documents begin, and what a block of keys has for a query."""

from __future__ import annotations

import numpy as np

from hpcmp.documents import First, beginnings

END = 7


def test_a_document_begins_after_the_token_that_closes_the_one_before() -> None:
    tokens = np.array([[1, 2, END, 3, END, END, 4], [END, 1, 1, 1, 1, 1, END], [1, 2, 3, 4, 5, 6, 1]]).T
    found = beginnings(tokens, END)
    assert found.dtype == np.int32 and found.flags.c_contiguous
    assert found.tolist() == [[0, 0, 0, 3, 3, 5, 6], [0, 1, 1, 1, 1, 1, 1], [0] * 7]


def test_beginnings_of_none() -> None:
    assert beginnings(np.zeros((0, 2), int), END).shape == (2, 0)
    assert beginnings(np.zeros((3, 0), int), END).shape == (0, 3)


def test_a_block_of_which_no_query_sees_a_key() -> None:
    first = First.of(np.array([[3, 3, 4], [2, 5, 5]], np.int64), np)
    assert first.rows is first.host and first.host.dtype == np.int32
    assert [first.any(keys) for keys in (0, 2, 3, 4)] == [False, False, True, True]
    assert not First.of(np.zeros((2, 0)), np).any(4)
