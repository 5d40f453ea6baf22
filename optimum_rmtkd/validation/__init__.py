"""One check for everything that users set: fields of recipes and options, arguments of parts, by their declared types.

A constraint stands in the annotation it belongs to: `tau: Annotated[float, Interval(0, 1, "neither")]`. The same
annotation serves a dataclass field (`check_fields`) and an argument of a constructor or a function (`checked`), and is
read as written, under `from __future__ import annotations` too.

Accepted and normalised, so that what is kept can be written as JSON: numpy scalars and other numbers of the tower
(`numbers`) become int or float, whole numbers become floats where floats are declared, lists become tuples where
tuples are declared (a single value is a tuple of one), subclasses of str become str. Never accepted: truth values for
numbers, text for truth values or numbers, NaN, infinities, whole numbers beyond 64 bits. `JsonObject` and `JsonList`
hold what JSON can; a bare `dict` or `list` holds anything.

What a part that users register declares by a class (`torch.device`, an Enum, a dataclass) is its own business: from
JSON it gets the text or the mapping that stands for it. So are numbers that are not finite where no `Interval` says
otherwise, and arguments that the base class checks (`Part.checked_by_base`).

Own code rather than pydantic: that takes "no" for False and "0.8" for 0.8 unless it is strict, and then refuses
numpy's numbers; it costs more to import than this package may, and its errors would all have to be worded anew.
"""

from __future__ import annotations

from typing import Annotated

from .checks import check_arguments, check_fields, check_value, checked
from .limits import Interval, Json, Length


__all__ = [
    "AtLeastZero",
    "Count",
    "Interval",
    "JsonList",
    "JsonObject",
    "Length",
    "Positive",
    "Seed",
    "Share",
    "check_arguments",
    "check_fields",
    "check_value",
    "checked",
]

Share = Annotated[float, Interval(0, 1, "neither")]
Positive = Annotated[float, Interval(0, closed="neither")]
AtLeastZero = Annotated[float, Interval(0)]
JsonObject = Annotated[dict, Json()]
JsonList = Annotated[list, Json()]
Count = Annotated[int, Interval(1)]
Seed = Annotated[int, Interval(0, 2**32 - 1)]  # what numpy's generator takes, which transformers seeds as well
