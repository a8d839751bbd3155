"""Texts as candidates to score, and many of them as trees of tokens, where what they begin with alike is read
once."""
import sys
from typing import NamedTuple

import numpy as np
import torch

from lib.checkpoints import trained_with_bos

ROW = 192  # nodes of a row: more share more, and attend to more


class Candidate(NamedTuple):
    ids: tuple      # token ids
    n_context: int  # at least 1: the tokens ids[n_context:] are scored, each given all before it


def candidate(tokenizer, text, start, bos):
    """`text` by the rules of 2025: the tokens that end after character `start` are scored, but for the first
    token of all. bos: the token that is put before a text, or None."""
    ids, ends = tokenizer.encode_with_ends(text)  # ends in bytes
    start = len(tokenizer.normalized(text[:start]).encode())
    n_context = sum(end <= start for end in ends)
    if bos is not None:
        return Candidate((bos, *ids), 1 + n_context)
    return Candidate(tuple(ids), max(1, n_context))


def added_bos(described, tokenizer, choice):
    """The token that an exported tokenizer puts before a text, or None. choice: 'yes', 'no', or 'auto', as
    the text was that a checkpoint (`described`: its config.json) was trained on."""
    if choice == "auto" and described["bos"] == "mixed":
        sys.exit("error: of these models some were trained with <s>, some without; say --bos=yes or no")
    if choice == "yes" and tokenizer.bos is None:
        sys.exit("error: bos='yes', but the tokenizer has no <s>")
    added = trained_with_bos(described) if choice == "auto" else choice == "yes"
    return tokenizer.bos if added else None


class Rows(NamedTuple):
    """Trees of tokens as B rows of R nodes, padded; E edges, each a node and a token that follows."""
    x: torch.Tensor          # (B, R) the nodes' tokens
    positions: torch.Tensor  # (B, R) in their texts
    mask: torch.Tensor       # (B, 1, R, R) True where a node sees another: itself and those above it
    nodes: torch.Tensor      # (E,) of B R
    targets: torch.Tensor    # (E,) tokens


class Row:
    """A tree that is being built: texts come in the order of a dictionary, so that a text shares with the
    one before it all that it can share."""

    def __init__(self):
        self.tokens, self.positions, self.parents, self.edges = [], [], [], []
        self.path, self.ids = [], ()  # of the last text: the node of each token but the last; its tokens
        self.edge_of = []             # and the place in `edges` of each of its tokens, None = not scored

    def shared(self, ids):
        """How many tokens `ids` begins with that the last text has too."""
        n = 0
        for a, b in zip(ids, self.ids):
            if a != b:
                break
            n += 1
        return n

    def room_for(self, ids):
        return len(self.tokens) + len(ids) - 1 - min(self.shared(ids), len(self.path))

    def add(self, ids, n_context):
        """The places in `edges` of the tokens ids[n_context:]."""
        shared = self.shared(ids)
        self.path, self.edge_of, self.ids = self.path[:shared], self.edge_of[:shared], ids
        for position in range(len(self.path), len(ids) - 1):
            self.parents.append(self.path[-1] if self.path else -1)
            self.path.append(len(self.tokens))
            self.tokens.append(ids[position])
            self.positions.append(position)
        self.edge_of += [None] * (len(ids) - len(self.edge_of))
        for k in range(n_context, len(ids)):
            if self.edge_of[k] is None:
                self.edge_of[k] = len(self.edges)
                self.edges.append((self.path[k - 1], ids[k]))
        return self.edge_of[n_context:]


def plant(candidates, row_length):
    """([Row], {candidate: (which row, places in its edges)}) of candidates none of which is longer than
    row_length + 1."""
    rows, places = [Row()], {}
    for c in sorted(set(candidates)):
        if rows[-1].room_for(c.ids) > row_length:
            rows.append(Row())
        places[c] = len(rows) - 1, rows[-1].add(c.ids, c.n_context)
    return rows, places


def flattened(rows, row_length, n_rows, device):
    """Some rows as tensors, filled up to n_rows x row_length: all batches have one shape."""
    x, positions = (np.zeros((n_rows, row_length), np.int64) for _ in range(2))
    mask = np.zeros((n_rows, 1, row_length, row_length), bool)
    mask[:, 0, range(row_length), range(row_length)] = True  # padding sees itself, lest it be nan
    for b, row in enumerate(rows):
        n = len(row.tokens)
        x[b, :n], positions[b, :n] = row.tokens, row.positions
        for node, parent in enumerate(row.parents):
            if parent >= 0:
                mask[b, 0, node] |= mask[b, 0, parent]
    edges = [(b * row_length + node, token) for b, row in enumerate(rows) for node, token in row.edges]
    nodes, targets = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T
    tensors = [torch.from_numpy(array) for array in (x, positions, mask)]
    return Rows(*[t.to(device) for t in (*tensors, nodes, targets)])
