"""Parts that users register: what worked before their arguments were checked works still."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import pathlib
import typing
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from optimum_rmtkd.distillation import build_objectives
from optimum_rmtkd.distillation.objectives.base import OBJECTIVES, DistillationObjective
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.spectra.edges import EDGE_ESTIMATORS, check_options, register_edge_estimator


FADING = {"start": 1, "end": 0, "over": [0, 0.5]}


class Mode(enum.Enum):
    FAST = "fast"


@dataclasses.dataclass
class Options:
    depth: int = 1


def part(hint, default=None):
    """A part with one argument of its own, declared as `hint`; never registered."""

    def init(self, x=default, weight=1.0):
        DistillationObjective.__init__(self, weight)
        self.x = x

    init.__name__, init.__annotations__ = "__init__", {"x": hint, "weight": float}
    return type("Own", (DistillationObjective,), {"name": "own_part_of_a_test", "__init__": init})


def test_a_weight_that_is_handed_to_the_base_may_be_a_schedule():
    made = part(float)(weight=FADING)
    assert made.weight_at(0.25) == 0.5 and made.weight["over"] == [0.0, 0.5]
    with pytest.raises(RMTKDError, match=r"Own\(weight='1'\): expected a number"):
        part(float)(weight="1")
    with pytest.raises(RMTKDError, match="expected start, end"):
        part(float)(weight={"start": 1})


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (tuple[int, str], (1, "a")),
        (tuple[()], ()),
        (typing.List, [1]),  # noqa: UP006
        (typing.Dict, {1: 2}),  # noqa: UP006
        (typing.Mapping, {1: len}),
        (typing.Sequence, (1,)),
        (Sequence[int], (1, 2)),
        (dict, {768: (32, 24)}),
        (dict, {"a": nn.Linear}),
        (list, [len]),
        (Mode, "fast"),
        (pathlib.Path, "a.pt"),
        (torch.dtype, "bfloat16"),
        (torch.device, "cpu"),
        (list[torch.dtype], ["bfloat16"]),
        (torch.dtype | None, "bfloat16"),
        (Options, {"depth": 2}),
        (np.ndarray, [1, 2]),
        (float, math.inf),
        (float | int, 3),
        (list[str] | str, "a"),
        (tuple[int, ...] | int, 3),
        ([int], 3),
        ({"low": 1}, 3),
        ("any number; see below", 3),
        (3, 3),
        (set[int], {1}),
    ],
)
def test_values_are_kept_as_they_are(hint, value):
    kept = part(hint)(value).x
    assert type(kept) is type(value) and kept == value


@pytest.mark.parametrize(
    ("hint", "value", "kept"),
    [
        (tuple, [1, 2], (1, 2)),
        (typing.Tuple, [1, 2], (1, 2)),  # noqa: UP006
        (tuple[int, str], [1, "a"], (1, "a")),
        (Sequence[int], range(3), [0, 1, 2]),
        (typing.Literal[1, 2], np.int64(1), 1),
    ],
)
def test_values_from_json_become_what_is_declared(hint, value, kept):
    found = part(hint)(value).x
    assert type(found) is type(kept) and found == kept


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (tuple[int, str], (1, 2), "x[1]=2): expected a string"),
        (tuple[int, str], (1,), "expected a list of 2"),
        (float, "2", "expected a number; got a str. Write 2"),
        (float | int, "2", "expected a number or a whole number"),
        (dict, [1], "expected a mapping; got a list."),
        (list, "abc", "expected a list; got a str."),
        (Mapping[str, int], {"a": "b"}, "x['a']='b'): expected a whole number"),
    ],
)
def test_what_contradicts_a_plain_declaration_is_refused(hint, value, message):
    with pytest.raises(RMTKDError) as error:
        part(hint)(value)
    assert message in str(error.value)


def test_a_default_of_another_type_may_be_said_again():
    assert part(int, "auto")("".join(["au", "to"])).x == "auto"  # as JSON gives it: another object
    with pytest.raises(RMTKDError):
        part(int, "auto")("none")


def test_constructors_of_other_forms(monkeypatch):
    monkeypatch.setattr(OBJECTIVES, "_classes", dict(OBJECTIVES._classes))

    @OBJECTIVES.register
    class Open(DistillationObjective):
        name = "open_of_a_test"

        def __init__(self, weight: float = 1.0, **options: int):
            super().__init__(weight)
            self.options = options

    @OBJECTIVES.register
    @dataclasses.dataclass(eq=False)
    class Data(DistillationObjective):
        x: float = 1.0
        weight: float = 1.0
        name = "data_of_a_test"

        def __post_init__(self):
            x, weight = self.x, self.weight
            super().__init__(weight)
            self.x = x

    class Positional(DistillationObjective):
        name = "positional_of_a_test"

        def __init__(self, x: int = 1, /, weight: float = 1.0):
            super().__init__(weight)
            self.x = x

    assert build_objectives({"open_of_a_test": {"depth": 3}})[0].options == {"depth": 3}
    made = build_objectives({"data_of_a_test": {"x": 3, "weight": FADING}})[0]
    assert made.x == 3 and made.weight_at(0.25) == 0.5
    assert Positional(3, weight=FADING).x == 3


def test_estimators_that_are_no_functions(monkeypatch):
    def edge(spectrum, factor: float = 1.0, other: int = 2):
        return factor * other

    class Called:
        def __call__(self, spectrum, factor: float = 1.0):
            return factor

    for name in ("partial_of_a_test", "object_of_a_test"):
        monkeypatch.setitem(EDGE_ESTIMATORS, name, None)
        del EDGE_ESTIMATORS[name]
    register_edge_estimator("partial_of_a_test")(functools.partial(edge, other=3))
    register_edge_estimator("object_of_a_test")(Called())
    assert EDGE_ESTIMATORS["object_of_a_test"](None, factor=2) == 2
    assert EDGE_ESTIMATORS["partial_of_a_test"](None, factor=2) == 6
    assert check_options("object_of_a_test", {"factor": 2}) == {"factor": 2}
