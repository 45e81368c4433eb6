"""What host and launches give each other, read and written by the launch itself, straight in the host's pinned memory.

To ask for a copy costs the host more time than to write the numbers, and a captured launch takes in what is there when
it runs. So the host may write only while no launch is under way that has yet to read.
"""

from __future__ import annotations

from torch import Tensor

PART = 128
"""Words that one program applies."""


def take(source: Tensor, target: Tensor) -> None:
    """Copy `source` int32, contiguous and pinned, into `target` of as many numbers on the device."""
    if target.device.type == "cpu":
        target.copy_(source)
    else:
        from expertd_engine.kernels.cuda import given  # its kernels need what a box without a card lacks

        given.take(source, target)


def take_step(source: Tensor, target: Tensor, ids: slice, brought: Tensor) -> None:
    """As `take`; but of the numbers `ids`, -1 - r becomes what `brought` int64 `[R]` has of row r: the token that the
    launch before brought, which the host has not seen yet."""
    if target.device.type == "cpu":
        target.copy_(source)
        tokens = target[ids]
        unseen = tokens < 0
        tokens[unseen] = brought[-1 - tokens[unseen].long()].int()
    else:
        from expertd_engine.kernels.cuda import given

        given.take_step(source, target, ids, brought)


def hand_over(source: Tensor, target: Tensor, turn: Tensor) -> None:
    """The last work of a launch: `source` int64 `[R]` into row `turn` (int32 `[1]`, on the device) of pinned `target`
    `[2, N]`, N ≥ R. The host may read one row while a launch writes into the other."""
    if source.device.type == "cpu":
        target[int(turn), : len(source)] = source
    else:
        from expertd_engine.kernels.cuda import given

        given.hand_over(source, target, turn)


def apply_words(staged: Tensor, turn: Tensor, words: Tensor, cleared: Tensor, taken: Tensor) -> None:
    """`words[staged[0, i]] = staged[1, i]` for int32 `staged` `[2, N]`, pinned, N a multiple of `PART`; and `cleared`
    int32, of N numbers at most, becomes zeros. Indices may occur again where it does not matter who comes last.

    `turn` int32 `[1]` comes to all of `taken` int32 `[N / PART]`, both pinned, once nothing more is read of `staged`.
    """
    if words.device.type == "cpu":
        words.scatter_(0, staged[0].long(), staged[1])
        cleared.zero_()
        taken.fill_(int(turn))
    else:
        from expertd_engine.kernels.cuda import given

        given.apply_words(staged, turn, words, cleared, taken)
