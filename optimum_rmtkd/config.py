"""The recipe of a reduction: one frozen, validated dataclass, JSON both ways."""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .errors import RMTKDError
from .recipe import Recipe, parse_json
from .recipe import option as _option
from .validation import AtLeastZero, Count, Interval, JsonList, JsonObject, Positive, Seed
from .validation.wording import a_kind, shown


__all__ = ["RMTKDConfig"]

TARGETS = ("target_reduction", "target_flops", "target_latency", "tolerance")
COMPARING = ("stage_threshold", "max_metric_drop", "tolerance")  # fields that compare a validation metric
LONGEST = 1e9  # milliseconds
SEARCH_ROUNDS, SEARCH_SHARE, ROUND_SHARE = 8, 0.8, 0.25  # of a training with tolerance
STAGE_SHARE = 0.3  # of the steps, for the cuts of every other


def _share(what: str, closed: str = "neither") -> Interval:
    return Interval(0, 1, closed, f"a share of {what}")


@dataclass(frozen=True)
class RMTKDConfig(Recipe):
    """What to narrow, how the widths are found, and how the student is distilled afterwards.

    Every field has a default that needs no width from the user; `metadata["help"]` of each field is its documentation
    and the text of the command line. Without a target (`target_reduction`, `target_flops`, `target_latency` or
    `tolerance`), sites are cut at their spectral edge where that means something, and where it does nowhere,
    `NoTargetError` asks for a target. Where `edge_estimator` is named, its edge is taken as it is.

    Raises:
        RMTKDError: a value outside its range, or contradictory values; the message says what was got and expected.
    """

    # How small
    SIZE = "target_reduction"

    target_reduction: Annotated[float, _share("the parameters to remove, for example 0.8")] | None = _option(
        None,
        "Share of all parameters to remove, embeddings included, in (0, 1); of a model that was narrowed before, of "
        "its parameters before the first cut. None: the spectral edge decides, at sites where a bulk of noise stands "
        "apart.",
    )
    target_flops: Annotated[float, _share("the FLOPs to remove, for example 0.5")] | None = _option(
        None,
        "Share of the FLOPs (linear layers, convolutions, attention products) to remove, in (0, 1), of the model at "
        "hand. Not together with target_reduction.",
    )

    target_latency: Annotated[float, _share("the dense model's time")] | str | None = _option(
        None,
        "Time of one forward pass, as a share of that of the model at hand (0.5), or in milliseconds with the unit "
        "(5ms): at the batch size, length, device, threads and number format that the five options below state. Its "
        "layers are timed, and the result is measured: a line says where it is more than 10 % off.",
    )
    latency_batch_size: Count = _option(1, "Samples in the pass that target_latency means.")
    latency_length: Count | None = _option(
        None, "Tokens of a text in it. None: 128, or what the model takes at most. Images have one size."
    )
    latency_device: str = _option("auto", "Where it runs. auto: the GPU where there is one.", ("auto", "cpu", "cuda"))
    latency_threads: Count | None = _option(None, "CPU threads of it. None: torch's choice.")
    latency_dtype: str = _option("float32", "Number format of its weights.", ("float32", "bfloat16", "float16"))
    tolerance: Annotated[float, Interval(0, 100, "neither", "points of the validation metric")] | None = _option(
        None,
        "The largest loss of the validation metric, in points (0.5 is 0.005 of an accuracy that is a share); of a "
        "metric that is to be small (a loss, a perplexity), in percent of its value. The smallest model that keeps it "
        "is looked for. Beside no other target.",
    )

    # Where
    sites: tuple[str, ...] | None = _option(
        None,
        "Kinds of sites to narrow (hidden, intermediate, attention_qk, attention_vo, attention_groups, embedding, "
        "channels, residual_channels, linear; a model has some of them, and decoders attention_groups alone of those "
        "of attention), or names of single sites; 'block' lets whole blocks go. None: all that the family declares in "
        "the chosen form but 'block'.",
    )
    form: str = _option(
        "absorbed",
        "absorbed: dense, narrower layers with nothing inserted. factored: two thin factors in place of every linear "
        "layer (the paper's inserted projection); works for every architecture.",
        ("absorbed", "factored"),
    )
    shape: str = _option(
        "free",
        "free: every layer gets a width of its own; the model is of a class of this library. native: only widths that "
        "the config of the base can state (one for the stream, one for all feed-forward parts, one for all heads), "
        "and no factorised table: the result is a plain checkpoint of the base, without any code of this library.",
        ("free", "native"),
    )

    # Spectra
    edge_estimator: str = _option(
        "screenot",
        "How signal is told from noise: mp_quantile (the paper), mp_median, gavish_donoho, dpa, signflip, screenot, "
        "energy, fixed, or a registered one. Without a target, one other than the default is taken at its word.",
    )
    tau: Annotated[float, Interval(0, 1, "neither", "a quantile of the eigenvalues")] = _option(
        0.5, "Quantile of the eigenvalues taken as noise level by mp_quantile, in (0, 1)."
    )
    energy: Annotated[float, _share("the variance", "right")] = _option(
        0.95, "Share of the variance that the estimator 'energy' keeps, in (0, 1]."
    )
    fixed_rank: Count | None = _option(None, "Rank that the estimator 'fixed' returns.")
    sample_unit: str = _option(
        "spaced",
        "What counts as one sample: token (every unmasked token), spaced (a few evenly spaced tokens a sequence: "
        "decorrelated and quick), sequence_mean.",
        ("token", "spaced", "sequence_mean"),
    )
    tokens_per_sequence: Count = _option(
        4, "How many tokens (or image positions) of a sequence 'spaced' takes: more cost time and are correlated."
    )
    n_effective: Literal["none", "auto"] | Annotated[int, Interval(1, closed="right")] = _option(
        "none",
        "Sample size used by the edges: none (the count), auto (from the tokens' autocorrelation), or a number.",
    )
    tracy_widom_alpha: Annotated[float, Interval(0, 1, "neither", "a level of significance")] | None = _option(
        None,
        "Level of the Tracy-Widom correction of the Marchenko-Pastur edge, for example 0.05. None: no correction.",
    )
    min_rank: Count = _option(1, "No spectral rank is smaller than this.")

    # Widths
    min_width: Count = _option(
        8, "No site is narrower than this (heads: no head narrower than an eighth of it, rounded up)."
    )
    round_to: Count = _option(
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

    speed_weight: AtLeastZero | None = _option(
        None,
        "What a share of the FLOPs is worth beside the same share of the parameters when allocation='loss' picks what "
        "to cut. 0: size alone; a table of words then costs as much as layers that are slow. None: 4, and 1 where "
        "more than 85 % are to go, because thin layers cannot pay for speed as well; 0 for causal language models, "
        "which read every weight for every word.",
    )

    # Surgery
    importance: str = _option(
        "auto",
        "What a direction is worth. fisher: variance times squared loss gradient. variance. auto: fisher where the "
        "model gives logits; channels of convolutional networks: the share of the answers' energy, of fisher their "
        "likelihood.",
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
    ridge: Positive | None = _option(
        1e-4,
        "Ridge of that refit, relative to the mean variance of the layer's input; > 0. None (null in a recipe file): "
        "for each layer the one under which two halves of each batch explain each other best; it then depends on how "
        "the data are put into batches.",
    )
    calibration_samples: Count = _option(1024, "Samples of the data used for spectra and refit.")

    # Stages
    schedule: str = _option(
        "rounds",
        "rounds: all sites at once, the reduction spread geometrically over a few rounds. layerwise: the paper, one "
        "layer after the other, shallow to deep. none: no cut, the model is only distilled.",
        ("rounds", "layerwise", "none"),
    )
    rounds: Count | None = _option(
        None,
        "Number of rounds of cut and distil; with tolerance, the most of them. None: one, which lost less than two "
        "with as many steps; with tolerance 8.",
    )
    round_share: Annotated[float, _share("the parameters left")] | None = _option(
        None, "Share of the parameters left that each round of a training with tolerance removes. None: 0.25."
    )
    stage_share: Annotated[float, _share("the training steps", "right")] | None = _option(
        None,
        "Share of the training steps within which the cuts are spread; the rest distils the final architecture. None: "
        "0.3; with tolerance 0.8, for each round is judged by what it was distilled to.",
    )
    fit_share: Annotated[float, _share("the training steps", "left")] | None = _option(
        None,
        "Share of the training steps in which the model is fine-tuned on the task alone, before the first cut. None: "
        "0 for a model that can teach, 0.4 to 0.6 for one that cannot (a new head, a loss no better than that of the "
        "label frequencies).",
    )
    distil_learning_rate: Positive | None = _option(
        None,
        "Peak learning rate of the distillation. None: the one of the training arguments, kept within the bounds that "
        "the size of the cut and the number of steps allow; the log says which was used, and why.",
    )
    stage_threshold: AtLeastZero | None = _option(
        None,
        "A stage waits until the validation metric has reached this share of its value before the first cut (paper: "
        "0.9).",
    )
    min_rank_ratio: Annotated[float, _share("a site's width", "left")] = _option(
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
    ema_decay: Annotated[float, Interval(0, 1, "left", "a decay per step")] = _option(
        0.999, "Decay per step of the 'ema' teacher, in [0, 1)."
    )
    task_weight: AtLeastZero = _option(0.3, "Weight of the task loss.")
    kl_weight: AtLeastZero = _option(
        0.7, "Weight of the KL divergence between the teacher's and the student's logits."
    )
    hidden_weight: AtLeastZero = _option(1.0, "Weight of the hidden states against the projected teacher.")
    temperature: Positive = _option(1.0, "Temperature of the KL divergence, > 0.")
    objectives: JsonObject | JsonList | str | None = _option(
        None,
        "Terms of the loss in place of the three weights above: JSON {name: arguments}, for example "
        '\'{"task": {"weight": 0.5}, "skew_kl": {"alpha": 0.1}}\', the name of one, or a list of names. An unknown '
        "name is answered with the known ones.",
    )
    reparameterization: JsonObject | str | None = _option(
        None,
        "Train more parameters than are saved: mpo (OPDF) or powerpropagation, or JSON with arguments, for example "
        '\'{"name": "mpo", "num_tensors": 3}\'. Weights are folded back before saving.',
    )
    transforms: JsonObject | JsonList | str | None = _option(
        None,
        "Batch transform: embedding_mixup, on_policy or adaptive_off_policy, or JSON with arguments, for example "
        '\'{"name": "embedding_mixup", "alpha": 0.4}\'; a list for several.',
    )
    logits_chunk: Count | None = _option(
        None,
        "Tokens of a language model whose logits exist at a time while it is distilled. None: as many as make 2^25 "
        "numbers, and all of a batch that has no more.",
    )
    disable_dropout: bool = _option(
        True, "Train the narrowed student without dropout: it is small and fits a dense target."
    )

    seed: Seed = _option(0, "Seed of calibration and surgery.")

    def __post_init__(self):
        _check_unit(self.target_latency)
        for name in ("objectives", "reparameterization", "transforms"):
            object.__setattr__(self, name, _parsed(name, getattr(self, name)))
        super().__post_init__()
        for name in ("objectives", "reparameterization", "transforms"):
            _check_parts(name, getattr(self, name))

    def check_together(self) -> None:
        self.check_targets()
        if self.shape == "native" and (self.form == "factored" or self.schedule == "layerwise"):
            what = "form='factored'" if self.form == "factored" else "schedule='layerwise'"
            raise RMTKDError(
                f"shape='native' and {what}: a plain config states one width for all layers, and no factors. Drop one "
                "of them."
            )
        if self.shape == "native" and "embedding" in (self.sites or ()):
            raise RMTKDError(
                "shape='native' and the site 'embedding': no plain config states a word table in two factors. Drop "
                "one of them; trim_vocabulary makes a table smaller that stays plain."
            )
        if self.sites is not None and not self.sites:
            raise RMTKDError(
                "sites is empty: nothing would be cut. Name kinds or single sites, or leave it None for all."
            )
        self._check_blocks()
        if self.objectives is not None:
            self.check_no_terms()
        if self.edge_estimator == "fixed" and self.fixed_rank is None:
            raise RMTKDError("edge_estimator='fixed' needs fixed_rank, the rank to keep at every site.")

    def _check_blocks(self) -> None:
        """A block is all or nothing: no spectrum says how much of it to keep."""
        blocks = [name for name in self.sites or () if name == "block" or name.endswith(".block")]
        if not blocks:
            return
        if self.schedule == "layerwise" or self.allocation != "loss":
            what = f"allocation={self.allocation!r}" if self.allocation != "loss" else "schedule='layerwise'"
            raise RMTKDError(
                f"The site {blocks[0]!r} with {what}: a whole block has no width to share out and no spectral edge, "
                "only a predicted loss. Use allocation='loss' and schedule='rounds', or leave it out of sites."
            )
        if self.form == "factored" and len(blocks) == len(self.sites):
            raise RMTKDError(
                f"sites={self.sites!r} with form='factored': factors leave whole blocks as they are, so nothing would "
                "be cut. Name 'linear' or leave sites out."
            )

    @property
    def targets(self) -> dict[str, float | str]:
        """{field: value} of what was asked for of the size, the work, the time or the quality: one, or none."""
        return {name: value for name in TARGETS if (value := getattr(self, name)) is not None}

    def without_targets(self) -> RMTKDConfig:
        """The same without a target, and without what is said of one."""
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        said = [*TARGETS, "round_share", *(name for name in usual if name.startswith("latency_"))]
        return self.replace(**{name: usual[name] for name in said})

    def check_targets(self) -> None:
        """There is at most one target, and the schedule can meet it.

        Raises:
            RMTKDError: with the fields that contradict each other, and a way out.
        """
        given = self.targets
        if len(given) > 1:
            told = " and ".join(f"{name}={value}" for name, value in given.items())
            raise RMTKDError(
                f"{'Both ' if len(given) == 2 else ''}{told} were given: a budget has one target, drop "
                f"{'one of them' if len(given) == 2 else 'all but one'}."
            )
        name = next(iter(given), None)
        if name not in (None, "target_reduction") and self.schedule == "layerwise":
            raise RMTKDError(
                f"{name}={given[name]} with schedule='layerwise': the edges decide there and only a target_reduction "
                "stops them; use schedule='rounds'."
            )
        if self.schedule == "none" and given:
            raise RMTKDError(
                "schedule='none' cuts nothing, but a target was given: drop the target, or use schedule='rounds'."
            )
        if isinstance(self.target_latency, str):
            milliseconds(self.target_latency)
        if self.target_latency is not None and (self.rounds or 1) > 1:
            raise RMTKDError(
                f"target_latency={self.target_latency} with rounds={self.rounds}: a time is met by one cut, after "
                "which it is measured. Leave rounds out."
            )
        rules = [n for n in ("max_metric_drop", "stage_threshold") if getattr(self, n) is not None]
        if name == "tolerance" and rules:
            raise RMTKDError(
                f"tolerance={self.tolerance} and {rules[0]}={getattr(self, rules[0])}: both say which stage stands. "
                "Drop one of them."
            )
        if name != "tolerance" and self.round_share is not None:
            raise RMTKDError(
                f"round_share={self.round_share} without tolerance: it says how far each round of a search for a size "
                "goes. Give a tolerance, or drop it; rounds divides a target."
            )
        if self.target_latency is None:
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            timed = [n for n, default in defaults.items() if n.startswith("latency_") and getattr(self, n) != default]
            if timed:
                raise RMTKDError(
                    f"{timed[0]}={getattr(self, timed[0])!r} without target_latency: it says which pass that means. "
                    "Give a target_latency, or drop it."
                )

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

    @property
    def span_of_cuts(self) -> float:
        """Share of the training steps within which the cuts are spread."""
        return self.stage_share or (STAGE_SHARE if self.tolerance is None else SEARCH_SHARE)

    @property
    def edge_options(self) -> dict[str, Any]:
        """Options of this recipe that belong to its edge estimator."""
        options = {
            "mp_quantile": {"tau": self.tau},
            "energy": {"share": self.energy},
            "fixed": {"rank": self.fixed_rank},
        }
        return options.get(self.edge_estimator, {})


def milliseconds(text: str) -> float:
    """The number in "5ms" or "5 ms".

    Raises:
        RMTKDError: another text.
    """
    number = text.strip().lower().removesuffix("ms").strip()
    plain = number.replace(".", "", 1).isdecimal() and number.isascii()
    if plain and text.strip().lower().endswith("ms") and 0 < float(number) < LONGEST:
        return float(number)
    raise RMTKDError(
        f"target_latency={shown(text)}: expected a share of the dense model's time in (0, 1), or milliseconds above 0 "
        f"with their unit, for example '5ms'.{f' Did you mean {number + chr(109) + chr(115)!r}?' if plain else ''}"
    )


def _check_unit(value: Any) -> None:
    """A plain number of 1 or more is no share: its unit is missing."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and 1 <= value < LONGEST:
        raise RMTKDError(
            f"target_latency={shown(value)}: a plain number is a share of the dense model's time, in (0, 1), and "
            f"milliseconds have their unit. Did you mean '{float(value):g}ms'?"
        )


def _parsed(name: str, value: Any) -> Any:
    """A mapping or list from JSON text, as the command line has it; a single word stays what it is, a name."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        return parse_json(value, f"{name}={shown(value)}", "expected a name or an object in quotes")
    return value


def _check_parts(name: str, value: dict | list | str | None) -> None:
    """A list holds names, and mappings of names to arguments; what those are is known to the parts' own rooms."""
    for number, item in enumerate(value if isinstance(value, list) else ()):
        if not isinstance(item, (str, dict)):
            raise RMTKDError(
                f"{name}[{number}]={shown(item)}: expected a name, or a mapping of names to arguments; got "
                f"{a_kind(item)}."
            )
