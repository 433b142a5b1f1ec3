"""Mean and variance of each latent channel, exact whatever the shards: deviations are merged, never squares subtracted."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Of `count` values a channel; the arrays are float64 (c,)."""

    count: int
    mean: np.ndarray
    m2: np.ndarray
    """Sum of squared deviations from `mean`."""
    variance_sum: np.ndarray | None
    """Sum of exp(logvar), the posteriors' own variances; None where only means are stored."""

    @classmethod
    def of(cls, mean: np.ndarray, logvar: np.ndarray | None) -> "Moments":
        """Two passes in float64 over stored rows (N, c, h, w) of any float dtype."""
        channels = mean.shape[1]
        values = [mean[:, channel].astype(np.float64) for channel in range(channels)]
        means = np.array([v.mean() if v.size else 0.0 for v in values])
        m2 = np.array([np.square(v - m).sum() for v, m in zip(values, means, strict=True)])
        variances = (
            None if logvar is None else np.array([np.exp(logvar[:, channel].astype(np.float64)).sum() for channel in range(channels)])
        )
        return cls(values[0].size, means, m2, variances)

    @classmethod
    def of_manifest(cls, statistics: dict[str, Any]) -> "Moments":
        """Of the rows of a whole folder of latents, from its manifest's `statistics`: so that several folders' can be merged."""
        count, variance = statistics["values"], np.square(statistics["std"])
        posterior = None if statistics["posterior_variance"] is None else np.array(statistics["posterior_variance"])
        means = np.maximum(variance - (0.0 if posterior is None else posterior), 0.0)
        return cls(count, np.array(statistics["mean"]), means * count, None if posterior is None else posterior * count)

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets of values (Chan, Golub & LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        paired = self.variance_sum is not None and other.variance_sum is not None
        return Moments(count, mean, m2, self.variance_sum + other.variance_sum if paired else None)  # type: ignore[operator]

    def statistics(self) -> dict[str, Any]:
        """Of draws from the posteriors: the total variance is E[exp(logvar)] + Var(mean), std its root."""
        posterior = None if self.variance_sum is None else self.variance_sum / self.count
        total = self.m2 / self.count + (0.0 if posterior is None else posterior)
        return {
            "mean": self.mean.tolist(),
            "std": np.sqrt(total).tolist(),
            "values": self.count,
            "posterior_variance": None if posterior is None else posterior.tolist(),
        }

    def to_json(self) -> dict[str, Any]:
        arrays = {"mean": self.mean, "m2": self.m2, "variance_sum": self.variance_sum}
        return {"count": self.count, **{name: None if value is None else value.tolist() for name, value in arrays.items()}}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> "Moments":
        variance_sum = None if given["variance_sum"] is None else np.array(given["variance_sum"])
        return cls(given["count"], np.array(given["mean"]), np.array(given["m2"]), variance_sum)
