import random

import numpy as np
import pytest

from llmopt.runtime.scheduling.prefix_tree import PrefixTree


def plainly(sequences, ids):
    """The longest beginning, by comparing with every sequence token by token."""

    def common(other):
        length = 0
        while length < min(len(ids), len(other)) and ids[length] == other[length]:
            length += 1
        return length

    longest = max((common(other) for other in sequences.values()), default=0)
    return longest, {owner for owner, other in sequences.items() if longest and common(other) == longest}


@pytest.mark.parametrize("seed", range(30))
def test_it_finds_what_a_plain_comparison_finds(seed):
    rng = random.Random(seed)
    tree, sequences = PrefixTree(), {}
    for owner in range(300):
        if sequences and rng.random() < 0.45:
            gone = rng.choice(list(sequences))
            del sequences[gone]
            tree.remove(gone)
        else:
            sequences[owner] = [rng.randrange(2) for _ in range(rng.randint(0, 12))]
            tree.insert(owner, np.array(sequences[owner], np.int64))
        asked = [rng.randrange(2) for _ in range(rng.randint(0, 14))]
        length, owners = tree.longest(np.array(asked, np.int64))
        assert (length, set(owners)) == plainly(sequences, asked)
        assert len(tree) == len(sequences)
        assert count(tree._root) <= 2 * len(sequences) + 1
    for owner in sequences:
        tree.remove(owner)
    assert count(tree._root) == 1


def count(node):
    return 1 + sum(count(child) for child in node.children.values())


def test_an_owner_has_one_sequence():
    tree = PrefixTree()
    tree.insert("a", np.arange(3))
    with pytest.raises(ValueError, match="already"):
        tree.insert("a", np.arange(2))


def test_removing_who_has_nothing_does_nothing():
    tree = PrefixTree()
    tree.insert("a", np.arange(3))
    tree.remove("b")
    assert tree.longest(np.arange(3)) == (3, ("a",))
