"""The recipe of a reduction: one frozen, validated dataclass, JSON both ways."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import RMTKDError


__all__ = ["RMTKDConfig"]

SITE_KINDS = ("hidden", "intermediate", "attention_qk", "attention_vo", "embedding", "channels", "linear")


def _option(default: Any, help: str, choices: tuple | None = None) -> Any:
    metadata = {"help": help} | ({"choices": choices} if choices else {})
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _parsed(name: str, value: Any) -> Any:
    """A mapping or list from JSON text; a single word stays what it is, a name."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RMTKDError(
                f"{name}={value!r} is not JSON ({error}); expected a name or an object in quotes."
            ) from error
    several = isinstance(value, (list, tuple)) and name != "reparameterization"
    if value is not None and not all(isinstance(item, (str, dict)) for item in (value if several else [value])):
        raise RMTKDError(f"{name}={value!r}: expected a name, or a mapping of names to arguments.")
    return list(value) if several else value


@dataclass(frozen=True)
class RMTKDConfig:
    """What to narrow, how the widths are found, and how the student is distilled afterwards.

    Every field has a default that needs no width from the user; `metadata["help"]` of each field is its documentation
    and the text of the command line. With neither `target_reduction` nor `target_flops`, the spectral edge of each
    site decides its width.

    Raises:
        RMTKDError: a value outside its range, or contradictory values; the message says what was got and expected.
    """

    # How small
    target_reduction: float | None = _option(
        None,
        "Share of all parameters to remove, embeddings included, in (0, 1); of a model that was narrowed before, of "
        "its parameters before the first cut. None: the spectral edge decides.",
    )
    target_flops: float | None = _option(
        None,
        "Share of the FLOPs (linear layers, convolutions, attention products) to remove, in (0, 1), of the model at "
        "hand. Not together with target_reduction.",
    )

    # Where
    sites: tuple[str, ...] | None = _option(
        None,
        "Kinds of sites to narrow (hidden, intermediate, attention_qk, attention_vo, embedding, channels, linear), or "
        "names of single sites. None: all that the family declares in the chosen form.",
    )
    form: str = _option(
        "absorbed",
        "absorbed: dense, narrower layers with nothing inserted. factored: two thin factors in place of every linear "
        "layer (the paper's inserted projection); works for every architecture.",
        ("absorbed", "factored"),
    )

    # Spectra
    edge_estimator: str = _option(
        "screenot",
        "How signal is told from noise: mp_quantile (the paper), mp_median, gavish_donoho, dpa, signflip, screenot, "
        "energy, fixed, or a registered one.",
    )
    tau: float = _option(0.5, "Quantile of the eigenvalues taken as noise level by mp_quantile, in (0, 1).")
    energy: float = _option(0.95, "Share of the variance that the estimator 'energy' keeps, in (0, 1].")
    fixed_rank: int | None = _option(None, "Rank that the estimator 'fixed' returns.")
    sample_unit: str = _option(
        "spaced",
        "What counts as one sample: token (every unmasked token), spaced (a few evenly spaced tokens a sequence: "
        "decorrelated and quick), sequence_mean.",
        ("token", "spaced", "sequence_mean"),
    )
    tokens_per_sequence: int = _option(
        4, "How many tokens (or image positions) of a sequence 'spaced' takes: more cost time and are correlated."
    )
    n_effective: str | int = _option(
        "none",
        "Sample size used by the edges: none (the count), auto (from the tokens' autocorrelation), or a number.",
    )
    tracy_widom_alpha: float | None = _option(
        None,
        "Level of the Tracy-Widom correction of the Marchenko-Pastur edge, for example 0.05. None: no correction.",
    )
    min_rank: int = _option(1, "No spectral rank is smaller than this.")

    # Widths
    min_width: int = _option(
        8, "No site is narrower than this (heads: no head narrower than an eighth of it, rounded up)."
    )
    round_to: int = _option(
        16,
        "Widths are multiples of this: odd widths cost the speed they should bring. Where a target would be missed by "
        "more than 1 % of the model, of half of this, and so on; the report says so.",
    )
    allocation: str = _option(
        "loss",
        "How a budget is spread over the sites. loss: directions are ranked by the predicted loss of removing them, "
        "per parameter saved. edge: by eigenvalue over the noise edge of their own site. uniform: the same share of "
        "every site.",
        ("loss", "edge", "uniform"),
    )

    speed_weight: float | None = _option(
        None,
        "What a share of the FLOPs is worth beside the same share of the parameters when allocation='loss' picks what "
        "to cut. 0: size alone; a table of words then costs as much as layers that are slow. None: 4, and 1 where "
        "more than 85 % are to go, because thin layers cannot pay for speed as well.",
    )

    # Surgery
    importance: str = _option(
        "auto",
        "What a direction is worth. fisher: variance times squared loss gradient. variance. auto: fisher where the "
        "model gives logits.",
        ("auto", "fisher", "variance"),
    )
    basis: str = _option(
        "signal",
        "signal: the kept subspace follows the spectrum. random: a control of the same widths.",
        ("signal", "random"),
    )
    refit: bool = _option(
        True, "Refit every narrowed layer by least squares to the teacher's output, shallow to deep."
    )
    ridge: float = _option(1e-4, "Ridge of that refit, relative to the mean variance of the layer's input; > 0.")
    calibration_samples: int = _option(1024, "Samples of the data used for spectra and refit.")

    # Stages
    schedule: str = _option(
        "rounds",
        "rounds: all sites at once, the reduction spread geometrically over a few rounds. layerwise: the paper, one "
        "layer after the other, shallow to deep. none: no cut, the model is only distilled.",
        ("rounds", "layerwise", "none"),
    )
    rounds: int | None = _option(None, "Number of rounds. None: one up to 65 % of reduction, two above.")
    stage_share: float = _option(
        0.3, "Share of the training steps within which the cuts are spread; the rest distils the final architecture."
    )
    stage_threshold: float | None = _option(
        None,
        "A stage waits until the validation metric has reached this share of its value before the first cut (paper: "
        "0.9).",
    )
    min_rank_ratio: float = _option(
        0.0, "Stop when a site would keep less than this share of its width (the paper's rho_min)."
    )
    max_metric_drop: float | None = _option(
        None,
        "Reject and roll back a stage whose validation metric, at its end, lies more than this below the uncut "
        "model's (the paper's epsilon). None: never.",
    )

    # Distillation
    teacher: str = _option(
        "initial",
        "Teacher of the self-distillation: initial (the model before the first cut), previous (before this cut: the "
        "paper), ema (exponential moving average of the student). Ignored when a teacher_model is given.",
        ("initial", "previous", "ema"),
    )
    ema_decay: float = _option(0.999, "Decay per step of the 'ema' teacher, in [0, 1).")
    task_weight: float = _option(0.3, "Weight of the task loss.")
    kl_weight: float = _option(0.7, "Weight of the KL divergence between the teacher's and the student's logits.")
    hidden_weight: float = _option(1.0, "Weight of the hidden states against the projected teacher.")
    temperature: float = _option(1.0, "Temperature of the KL divergence, > 0.")
    objectives: dict | list | str | None = _option(
        None,
        "Terms of the loss in place of the three weights above: JSON {name: arguments}, for example "
        '\'{"task": {"weight": 0.5}, "skew_kl": {"alpha": 0.1}}\', the name of one, or a list of names. An unknown '
        "name is answered with the known ones.",
    )
    reparameterization: dict | str | None = _option(
        None,
        "Train more parameters than are saved: mpo (OPDF) or powerpropagation, or JSON with arguments, for example "
        '\'{"name": "mpo", "num_tensors": 3}\'. Weights are folded back before saving.',
    )
    transforms: dict | list | str | None = _option(
        None,
        "Batch transform: embedding_mixup, on_policy or adaptive_off_policy, or JSON with arguments, for example "
        '\'{"name": "embedding_mixup", "alpha": 0.4}\'; a list for several.',
    )
    disable_dropout: bool = _option(
        True, "Train the narrowed student without dropout: it is small and fits a dense target."
    )

    seed: int = _option(0, "Seed of calibration and surgery.")

    def __post_init__(self):
        if isinstance(self.sites, (list, str)):
            object.__setattr__(self, "sites", (self.sites,) if isinstance(self.sites, str) else tuple(self.sites))
        for name in ("objectives", "reparameterization", "transforms"):
            object.__setattr__(self, name, _parsed(name, getattr(self, name)))
        for item in dataclasses.fields(self):
            if item.type in ("float", "float | None"):
                self._check_number(item.name)
            choices = item.metadata.get("choices")
            if choices and getattr(self, item.name) not in choices:
                raise RMTKDError(f"{item.name}={getattr(self, item.name)!r}: expected one of {', '.join(choices)}.")
        if self.target_reduction is not None and self.target_flops is not None:
            raise RMTKDError(
                f"Both target_reduction={self.target_reduction} and target_flops={self.target_flops} were given: a "
                "budget has one target, drop one of them."
            )
        if self.target_flops is not None and self.schedule == "layerwise":
            raise RMTKDError(
                f"target_flops={self.target_flops} with schedule='layerwise': the edges decide there and only a "
                "target_reduction stops them; use schedule='rounds'."
            )
        if self.schedule == "none" and (self.target_reduction is not None or self.target_flops is not None):
            raise RMTKDError(
                "schedule='none' cuts nothing, but a target was given: drop the target, or use schedule='rounds'."
            )
        if self.sites is not None and not self.sites:
            raise RMTKDError(
                "sites is empty: nothing would be cut. Name kinds or single sites, or leave it None for all."
            )
        self._check_between("target_reduction", 0.0, 1.0, "share of the parameters to remove, for example 0.8")
        self._check_between("target_flops", 0.0, 1.0, "share of the FLOPs to remove, for example 0.5")
        self._check_between("tau", 0.0, 1.0, "quantile of the eigenvalues")
        self._check_between("energy", 0.0, 1.0, "share of the variance", high_included=True)
        self._check_between("tracy_widom_alpha", 0.0, 1.0, "level of significance")
        self._check_between("ema_decay", 0.0, 1.0, "decay per step", low_included=True)
        self._check_between("stage_share", 0.0, 1.0, "share of the training steps", high_included=True)
        self._check_between("min_rank_ratio", 0.0, 1.0, "share of a site's width", low_included=True)
        for name in ("temperature", "ridge"):
            if not getattr(self, name) > 0:
                raise RMTKDError(f"{name}={getattr(self, name)}: expected a number above 0.")
        for name in ("task_weight", "kl_weight", "hidden_weight", "speed_weight"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise RMTKDError(f"{name}={getattr(self, name)}: expected a number of at least 0.")
        if self.objectives is not None:
            self.check_no_terms()
        for name in (
            "min_rank",
            "min_width",
            "round_to",
            "calibration_samples",
            "rounds",
            "fixed_rank",
            "tokens_per_sequence",
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise RMTKDError(f"{name}={value!r}: expected a whole number of at least 1.")
        if not (self.n_effective in ("none", "auto") or (isinstance(self.n_effective, int) and self.n_effective > 1)):
            raise RMTKDError(f"n_effective={self.n_effective!r}: expected 'none', 'auto' or a whole number above 1.")
        if self.edge_estimator == "fixed" and self.fixed_rank is None:
            raise RMTKDError("edge_estimator='fixed' needs fixed_rank, the rank to keep at every site.")

    def check_no_terms(self) -> None:
        """Nothing is said of the three terms that objectives replace.

        Raises:
            RMTKDError: a weight or the temperature differs from its default.
        """
        names = ("task_weight", "kl_weight", "hidden_weight", "temperature")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if terms := [name for name in names if getattr(self, name) != defaults[name]]:
            raise RMTKDError(
                f"{', '.join(terms)} and objectives: the former belong to the three terms that objectives replaces. "
                "Say it there, for example {'kl': {'weight': 0.5, 'temperature': 2}}, or drop objectives."
            )

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise RMTKDError(f"{name}={value!r}: expected a number, got a {type(value).__name__}.")

    def _check_between(self, name, low, high, what, low_included=False, high_included=False):
        value = getattr(self, name)
        if value is None:
            return
        above = value >= low if low_included else value > low
        below = value <= high if high_included else value < high
        if not (above and below):
            left, right = "[" if low_included else "(", "]" if high_included else ")"
            raise RMTKDError(f"{name}={value}: expected a {what}, in {left}{low:g}, {high:g}{right}.")

    @property
    def edge_options(self) -> dict[str, Any]:
        """Options of this recipe that belong to its edge estimator."""
        options = {
            "mp_quantile": {"tau": self.tau},
            "energy": {"share": self.energy},
            "fixed": {"rank": self.fixed_rank},
        }
        return options.get(self.edge_estimator, {})

    def replace(self, **changes: Any) -> RMTKDConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dictionary of every field."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RMTKDConfig:
        """Inverse of `to_dict`.

        Raises:
            RMTKDError: a key that is no field of the recipe; the message lists the known ones.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise RMTKDError(f"Unknown RMTKDConfig key(s) {', '.join(unknown)}. Known keys: {', '.join(known)}.")
        return cls(**values)

    def to_json_file(self, path: str | Path) -> None:
        """Write the recipe as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf8")

    @classmethod
    def from_json_file(cls, path: str | Path) -> RMTKDConfig:
        """Read a recipe written by `to_json_file`.

        Raises:
            RMTKDError: not a JSON object, or unknown keys.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf8"))
        except json.JSONDecodeError as error:
            raise RMTKDError(
                f"{path} is not JSON ({error}); expected the file that RMTKDConfig.to_json_file writes."
            ) from error
        if not isinstance(values, dict):
            raise RMTKDError(f"{path} holds a JSON {type(values).__name__}; expected an object of RMTKDConfig fields.")
        return cls.from_dict(values)
