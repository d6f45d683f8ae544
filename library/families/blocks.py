"""How the blocks of a U-Net are counted where ranks and learning rates differ from block to block. Needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockLayout:
    """How many blocks a U-Net has; they are numbered in the order of the fields, from 0."""

    num_down: int
    num_mid: int
    num_up: int
    num_before: int = 0  # blocks before and behind the others, whose learning rate has no weight of its own
    num_after: int = 0

    @property
    def num_blocks(self) -> int:
        return self.num_before + self.num_down + self.num_mid + self.num_up + self.num_after
