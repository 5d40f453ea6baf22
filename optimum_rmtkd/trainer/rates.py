from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    value: float
    why: str


def distil_rate(given, removed, steps):
    return Rate(given, "as given")


def warmup_steps(steps):
    return 0
