"""What is kept comes back as it was, from memory or from the file, and little of it is held."""

from __future__ import annotations

import errno
import tempfile

import pytest
import torch

from optimum_rmtkd import RMTKDError
from optimum_rmtkd.batches import Store, collect_batches
from optimum_rmtkd.batches.storing import _Slot

from .surgery import zoo


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)


def values():
    whole = torch.randn(6, 5)
    return [
        {"x": torch.randn(3, 4), "flag": True, "none": None, "text": "a", "inside": (torch.tensor(2.5), [whole[2:4]])},
        {"mask": torch.rand(2, 7) > 0.5, "column": whole[:, 1], "turned": whole.T, "empty": torch.zeros(0, 3)},
        *[{"x": torch.arange(6).reshape(2, 3).to(dtype)} for dtype in DTYPES],
        {"spread": torch.ones(2, 1, 4).expand(2, 3, 4), "numbers": torch.randn(3, dtype=torch.complex64)},
    ]


def alike(found, expected) -> bool:
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(alike(found[k], v) for k, v in expected.items())
    if isinstance(expected, (list, tuple)):
        return type(found) is type(expected) and all(alike(a, b) for a, b in zip(found, expected, strict=True))
    return found == expected


@pytest.mark.parametrize("held", [0, 100, None])
def test_values_come_back_as_they_were(held):
    given = values()
    store = Store(values=given, held=held)
    for order in (range(len(given)), reversed(range(len(given))), [-1, 0]):
        for i in order:
            assert alike(store[i], given[i]), i
    assert len(store) == len(given) and all(alike(a, b) for a, b in zip(store, given, strict=True))
    assert all(alike(a, b) for a, b in zip(store[1::3][1:], given[1::3][1:], strict=True))
    with pytest.raises(IndexError):
        store[len(given)]


def leaves(store) -> list:
    found, todo = [], list(store._values)
    while todo:
        value = todo.pop()
        if isinstance(value, (dict, list, tuple)):
            todo += value.values() if isinstance(value, dict) else value
        else:
            found.append(value)
    return found


def test_no_more_than_was_agreed_is_held():
    store = Store(values=[{"x": torch.randn(10, 10)[:5]} for _ in range(50)], held=1000)
    tensors = [leaf for leaf in leaves(store) if isinstance(leaf, torch.Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 5 * 200  # not the rows beside them
    assert sum(isinstance(leaf, _Slot) for leaf in leaves(store)) == 45


def test_what_is_read_can_be_changed():
    store = Store(values=[torch.zeros(4)], held=0)
    store[0].add_(1.0)
    assert torch.equal(store[0], torch.zeros(4))


def test_batches_of_a_loader_are_not_held(monkeypatch):
    monkeypatch.setattr("optimum_rmtkd.batches.storing.HELD", 0)
    given = zoo.batches("vit")
    found = collect_batches(zoo.make("vit", "Model"), given, 20)
    assert [len(batch["pixel_values"]) for batch in found] == [8, 8, 4]
    assert all(torch.equal(a["pixel_values"], b["pixel_values"][:n]) for a, b, n in zip(found, given, (8, 8, 4)))
    assert not any(isinstance(leaf, torch.Tensor) for leaf in leaves(found))


@pytest.mark.parametrize("fails", ["open", "write"])
def test_a_full_disk_is_named(monkeypatch, fails):
    class Full:
        def seek(self, at):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(**_):
        if fails == "open":
            raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")
        return Full()

    monkeypatch.setattr(tempfile, "TemporaryFile", opened)
    store = Store(held=0)
    with pytest.raises(RMTKDError, match="48 bytes behind 0 could not be written in .*TMPDIR.*calibration_samples"):
        store.append({"x": torch.zeros(3, 4)})
