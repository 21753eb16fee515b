"""Operations worth fusing on a CPU, each beside the plain reference that tests hold it to."""

from tozan.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
