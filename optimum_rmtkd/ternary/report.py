"""What was built, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


__all__ = ["LayerReport", "TernaryReport"]


@dataclass(frozen=True)
class LayerReport:
    """One hidden layer.

    Attributes:
        width: of the layer.
        dense_t: standard deviation of the dense network's pre-activations, in theory.
        t: the same of this network, measured.
        mean: of the activation before centring, measured; `expected_mean` in theory at t.
        residual: of the match; 0 where the activation is kept.
    """

    width: int
    dense_t: float
    t: float
    mean: float
    expected_mean: float
    residual: float


@dataclass(frozen=True)
class TernaryReport:
    """Of one network.

    Attributes:
        mode, storage: of the recipe.
        layers: one entry a hidden layer; none for trained weights.
        dense, compressed: kernel coefficients (`KernelCoefficients`) of both networks; those of the compressed one at
            the measured t.
        delta_ck: what the CK gets more on its diagonal, tau~_L^2 - tau_L^2: an implicit ridge.
        diagnostics: of the standardised inputs (`FeatureDiagnostics`).
        ridge, error: of the readout; the error is leave-one-out, over the variance of the targets.
        bytes: of the serialised network; `replaced_bytes` of the part of a model that it stands for, 0 where there is
            none.
        bits_per_weight: on disk, for each hidden weight.
        warnings: assumptions that do not hold, each with its number.
    """

    mode: str
    storage: str
    layers: tuple[LayerReport, ...]
    dense: dict[str, float]
    compressed: dict[str, float]
    delta_ck: float
    diagnostics: dict[str, Any]
    ridge: float | None
    error: float | None
    bytes: int
    bits_per_weight: float
    replaced_bytes: int = 0
    warnings: tuple[str, ...] = field(default=())

    @property
    def residual(self) -> float:
        """Largest residual of all layers."""
        return max((layer.residual for layer in self.layers), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dictionary; infinite coefficients become None."""
        values = asdict(self)
        for name in ("dense", "compressed"):
            values[name] = {k: v if abs(v) < float("inf") else None for k, v in values[name].items()}
        values["layers"], values["warnings"] = list(values["layers"]), list(self.warnings)
        return values

    def table(self) -> str:
        """Plain text, one line a layer and one for the whole."""
        lines = []
        if self.layers:
            lines.append(
                f"{'layer':>5} {'width':>6} {'t':>8} {'dense t':>8} {'mean':>9} {'in theory':>9} {'residual':>9}"
            )
        for number, layer in enumerate(self.layers, start=1):
            lines.append(
                f"{number:>5} {layer.width:>6} {layer.t:>8.4f} {layer.dense_t:>8.4f} {layer.mean:>9.4f} "
                f"{layer.expected_mean:>9.4f} {layer.residual:>9.1e}"
            )
        lines.append(
            f"{self.mode}, {self.storage}: {self.bytes:,} bytes, {self.bits_per_weight:.2f} bits a hidden weight on "
            "disk" + (f" (replaced: {self.replaced_bytes:,} bytes)" if self.replaced_bytes else "")
        )
        if self.dense:
            lines.append(f"kernel: shift {self.delta_ck:+.4f} beside tau^2 {self.dense['tau2']:.4f}")
        if self.error is not None:
            lines.append(
                f"readout: ridge {self.ridge:.1e}, leave-one-out error {self.error:.4f} of the targets' variance"
            )
        return "\n".join([*lines, *(f"warning: {sentence}" for sentence in self.warnings)])
