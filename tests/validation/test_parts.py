"""Arguments of parts, edge estimators and commands: a valid object or a named error, from Python and from JSON."""

from __future__ import annotations

import inspect
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimum_rmtkd.commands.bench import BenchOptions
from optimum_rmtkd.commands.compress import TrainingOptions
from optimum_rmtkd.commands.data import DataArguments
from optimum_rmtkd.commands.demo import DemoOptions
from optimum_rmtkd.distillation import (
    CorrelationDistance,
    EMATeacher,
    KLDivergence,
    OnlineTeacher,
    ProjectedFeatureLoss,
    TaskLoss,
    WeightedTeachers,
    build_objectives,
    build_transforms,
    cache_answers,
)
from optimum_rmtkd.distillation.objectives.base import OBJECTIVES, DistillationObjective
from optimum_rmtkd.distillation.objectives.schedules import check_weight
from optimum_rmtkd.distillation.subspaces import PROJECTIONS, MarchenkoPasturProjection
from optimum_rmtkd.distillation.transforms import TRANSFORMS
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.reparameterization import MatrixProductOperator, build_reparameterization
from optimum_rmtkd.reparameterization.base import REPARAMETERIZATIONS
from optimum_rmtkd.spectra.edges import EDGE_ESTIMATORS, check_options
from optimum_rmtkd.trainer import RMTKDTrainingArguments

from ..fuzz import WILD, accepted, arguments, many, through_json


REGISTRIES = (OBJECTIVES, PROJECTIONS, TRANSFORMS, REPARAMETERIZATIONS)
# Those of the package: tests register others.
KINDS = [
    (registry, name)
    for registry in REGISTRIES
    for name in registry
    if registry.find(name).__module__.startswith("optimum_rmtkd")
]
ESTIMATORS = ("mp_quantile", "mp_median", "dpa", "screenot", "energy", "fixed")  # those that take options
OPTIONS = (BenchOptions, TrainingOptions, DataArguments, DemoOptions)


def check_part(registry, name: str, values: dict) -> None:
    part = accepted(registry.find(name), values)
    try:
        built = registry.build({"name": name, **values})
    except RMTKDError:
        assert part is None
        return
    described = part.to_dict()
    assert built.to_dict() == described
    through = through_json(described)
    assert through_json(registry.build(through).to_dict()) == through


@pytest.mark.parametrize(("registry", "name"), KINDS, ids=[name for _, name in KINDS])
def test_any_arguments_give_a_part_or_a_named_error(registry, name):
    @many(75)
    @given(arguments(registry.find(name)))
    def check(values):
        check_part(registry, name, values)

    check()


@pytest.mark.slow
@pytest.mark.parametrize(("registry", "name"), KINDS, ids=[name for _, name in KINDS])
def test_any_arguments_many_times(registry, name):
    @many(3000)
    @given(arguments(registry.find(name)))
    def check(values):
        check_part(registry, name, values)

    check()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_any_options_of_an_edge_estimator(name):
    @many(100)
    @given(arguments(EDGE_ESTIMATORS[name], skip=["spectrum"]))
    def check(values):
        kept = accepted(lambda **options: check_options(name, options), values or {"rank": 1, "needs": 1})
        if kept is not None:
            assert check_options(name, through_json(kept)) == kept

    check()


@pytest.mark.parametrize("kind", OPTIONS)
def test_any_options_of_a_command(kind):
    @many(150)
    @given(arguments(kind))
    def check(values):
        try:
            kind(**values)
        except RMTKDError as error:
            assert "--" in str(error)

    check()


@many(300)
@given(WILD)
def test_anything_in_place_of_parts(value):
    for build in (build_objectives, build_reparameterization, build_transforms, lambda v: check_weight(v, "Owner")):
        try:
            build(value)
        except RMTKDError:
            continue


@many(300)
@given(st.dictionaries(st.sampled_from(["schedule", "start", "end", "over", "x"]), WILD, max_size=4))
def test_any_schedule_of_a_weight(rule):
    try:
        kept = check_weight({"start": 1, "end": 0, **rule}, "Owner")
    except RMTKDError as error:
        assert "Owner(weight" in str(error)
        return
    assert check_weight(through_json(kept), "Owner") == kept


MODEL = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: KLDivergence(temperature="2"),
            "KLDivergence(temperature='2'): expected a number above 0; got a str.",
        ),
        (lambda: KLDivergence(temperature=math.inf), "It has to be finite."),
        (lambda: KLDivergence(reverse="no"), "KLDivergence(reverse='no'): expected True or False; got a str."),
        (lambda: KLDivergence(weight=True), "KLDivergence(weight=True): expected a weight of at least 0"),
        (lambda: TaskLoss(weight={"start": "1", "end": 0}), "TaskLoss(weight['start']='1'): expected a number"),
        (lambda: TaskLoss(weight={"start": 1, "end": 0, "over": ["0", "1"]}), "TaskLoss(weight['over'][0]='0')"),
        (lambda: TaskLoss(weight={"start": 1, "end": 0, "over": [0, 50]}), "Did you mean 0.5?"),
        (lambda: CorrelationDistance(kind="pearsn"), "expected 'pearson' or 'spearman'. Did you mean pearson?"),
        (lambda: CorrelationDistance(top_k=2), "CorrelationDistance(top_k=2): expected a whole number of at least 3."),
        (lambda: ProjectedFeatureLoss(layers={"a": 1.5}), "ProjectedFeatureLoss(layers['a']=1.5)"),
        (lambda: ProjectedFeatureLoss(layers={}), "expected 'last', 'uniform' or a mapping of 1 or more"),
        (lambda: ProjectedFeatureLoss(seed=-1), "ProjectedFeatureLoss(seed=-1)"),
        (lambda: MatrixProductOperator(num_tensors=10**12), "expected a whole number in [2, 64]"),
        (lambda: MatrixProductOperator(modes={"side": [2, 2, 2]}), "expected the size of a side"),
        (lambda: MatrixProductOperator(modes={8: [2, 2, 2.0]}), "MatrixProductOperator(modes[8][2]=2.0)"),
        (lambda: MatrixProductOperator(target_modules=[]), "target_modules=[]"),
        (lambda: MarchenkoPasturProjection(options={"alpha": 1}), "Unknown option(s) alpha"),
        (
            lambda: MarchenkoPasturProjection("mp_quantile", options={"tau": 50}),
            "mp_quantile(tau=50): expected a number in (0, 1). Did you mean 0.5?",
        ),
        (lambda: MarchenkoPasturProjection("fixed"), "needs the option(s) rank"),
        (lambda: MarchenkoPasturProjection(n_effective=0), "expected 'none', 'auto' or a whole number above 1."),
        (lambda: OnlineTeacher(MODEL, rank=0), "OnlineTeacher(rank=0): expected a whole number of at least 1."),
        (lambda: OnlineTeacher(MODEL, pull=math.nan), "OnlineTeacher(pull=nan)"),
        (lambda: OnlineTeacher("bert"), "OnlineTeacher(model='bert'): expected a Module; got a str."),
        (lambda: EMATeacher(MODEL, decay=1), "EMATeacher(decay=1): expected a decay per step, in [0, 1)."),
        (lambda: WeightedTeachers([MODEL, MODEL], weights=[1, -1]), "WeightedTeachers(weights[1]=-1)"),
        (lambda: cache_answers(MODEL, None, dict, batch_size=0), "cache_answers(batch_size=0)"),
        (lambda: KLDivergence().labelled(3), "KLDivergence(label=3): expected a string; got an int."),
        (lambda: build_objectives({"kl": {3: 4}}), "kl takes no 3"),
        (lambda: build_objectives({"kl": {"temprature": 4}}), "Did you mean temperature?"),
        (lambda: build_objectives({"skew_lk": {}}), "Did you mean skew_kl?"),
        (lambda: build_objectives({("kl",): {}}), "No objective ('kl',)"),
        (lambda: RMTKDTrainingArguments("x", ddp_find_unused_parameters="no"), "Write False, without quotes."),
        (lambda: BenchOptions(batch_sizes=[1, 0]), "--batch-sizes 0: expected a whole number of at least 1."),
        (lambda: DataArguments(train_file="a.csv", text_column=["a", "b", "c"]), "--text-column ['a', 'b', 'c']"),
        (lambda: TrainingOptions(learning_rate=math.nan), "--learning-rate nan: expected a number above 0."),
        (lambda: TrainingOptions(warmup_steps=-1), "--warmup-steps -1"),
        (lambda: DemoOptions(target_reduction=80), "Did you mean 0.8?"),
    ],
)
def test_what_is_refused_says_what_was_expected(make, message):
    with pytest.raises(RMTKDError) as error:
        make()
    assert message in str(error.value)


def test_numbers_of_numpy_are_kept_as_plain_ones():
    objective = KLDivergence(weight=np.float32(0.5), temperature=np.int64(2), reverse=np.bool_(True))
    assert objective.to_dict() == {"name": "kl", "weight": 0.5, "temperature": 2.0, "reverse": True}
    json.dumps(objective.to_dict(), allow_nan=False)
    operator = MatrixProductOperator(num_tensors=np.int32(3), modes={np.int64(8): (2, np.int64(2), 2)})
    json.dumps(operator.to_dict(), allow_nan=False)
    json.dumps(ProjectedFeatureLoss(layers={np.int64(0): 1}).to_dict(), allow_nan=False)


def test_a_part_of_ones_own_is_checked_by_its_own_annotations():
    class Scaled(DistillationObjective):
        name = "scaled_of_a_test"

        def __init__(self, factor: float, near: Unknown = 1, weight: float = 1.0):  # noqa: F821
            super().__init__(weight)
            self.factor, self.near = factor, near

    made = Scaled(np.float64(2), near="anything")
    assert made.factor == 2 and type(made.factor) is float and made.near == "anything"
    with pytest.raises(RMTKDError, match=r"Scaled\(factor='2'\): expected a number"):
        Scaled("2")
    with pytest.raises(TypeError, match="factor"):
        Scaled()


def test_a_checked_constructor_keeps_its_signature_and_its_default():
    assert list(inspect.signature(KLDivergence).parameters) == ["weight", "temperature", "reverse"]
    assert MatrixProductOperator(lr_scale=None).lr_scale == 0.5
