"""The rope table: cos and sin by position."""

import numpy as np

from ksort_gguf.binding.rows import FloatRows

_FIRST_POSITIONS = 512


def cos_sin(theta: np.ndarray, n_positions: int, magnitude: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the angles of positions 0 .. n_positions-1, float32 [n_positions, n_frequencies] each.

    theta: float64 [n_frequencies], radians a position. magnitude: what both are multiplied by. Angles are float64:
    float32 would lose a pair's phase at long context.
    """
    angles = np.outer(np.arange(n_positions, dtype=np.float64), theta)
    return (magnitude * np.cos(angles)).astype(np.float32), (magnitude * np.sin(angles)).astype(np.float32)


class RopeTable:
    """cos and sin of every position, float32 [n_positions, n_frequencies], extended as positions come."""

    def __init__(self, theta: np.ndarray, magnitude: float = 1.0):
        """As cos_sin takes them; no frequencies at all count as one that does not turn."""
        self._theta = theta if len(theta) else np.zeros(1)
        self._magnitude = magnitude
        self._cos, self._sin = cos_sin(self._theta, 0)

    def arrays(self, n_positions: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of positions 0 .. n_positions-1."""
        if n_positions > len(self._cos):
            self._extend(n_positions)
        return self._cos[:n_positions], self._sin[:n_positions]

    def rows(self, first: int, n: int) -> tuple[FloatRows, FloatRows]:
        """cos and sin of positions first .. first+n-1."""
        if first + n > len(self._cos):
            self._extend(max(first + n, 2 * len(self._cos), _FIRST_POSITIONS))
        return FloatRows(self._cos[first : first + n]), FloatRows(self._sin[first : first + n])

    def _extend(self, n_positions: int) -> None:
        self._cos, self._sin = cos_sin(self._theta, n_positions, self._magnitude)
