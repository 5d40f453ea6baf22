from typing import NamedTuple


class Readiness(NamedTuple):
    can_teach: bool
    loss: float | None
    chance: float | None
    why: str


def readiness(model, batches, **kw):
    return Readiness(True, None, None, "not looked at")
