"""Small parts found by name: one registry a kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from .errors import RMTKDError
from .validation import checked
from .validation.wording import a_kind, close, shown


__all__ = ["Part", "Registry", "with_name"]

T = TypeVar("T")


def with_name(kind: str, name: str, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """{"name": name, arguments} from the short form {name: arguments}; a name among the arguments goes before.

    Raises:
        RMTKDError: arguments that are no mapping.
    """
    if arguments is not None and not isinstance(arguments, Mapping):
        raise RMTKDError(
            f"{kind}: {name!r} has {shown(arguments)}; expected a mapping of its arguments, {{}} for none."
        )
    return {"name": name, **(arguments or {})}


class Part:
    """What a registry holds: known by its `name`, described by its constructor arguments, which it stores under their
    own names. They are checked by their annotations (see `validation`) before the constructor runs.

    Attributes:
        checked_by_base: types of arguments, by name, that a base class checks, whatever a constructor's own annotation
            says of them: a `weight: float` that is handed on may be a schedule.
    """

    name: str = ""
    checked_by_base: ClassVar[Mapping[str, type]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = checked(cls.__init__, cls.checked_by_base)

    def to_dict(self) -> dict[str, Any]:
        """{"name": ..., constructor arguments}, JSON-able.

        Raises:
            RMTKDError: an argument that was not stored.
        """
        _, *arguments = inspect.signature(type(self).__init__).parameters.values()
        names = [a.name for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
        if lost := [name for name in names if not hasattr(self, name)]:
            raise RMTKDError(
                f"{type(self).__name__} does not say what its {', '.join(lost)} was; expected every constructor "
                "argument under its own name: self.x = x. A resumed run is compared by them."
            )
        return {"name": self.name, **{name: getattr(self, name) for name in names}}


class Registry(Generic[T]):
    """Classes by their class attribute `name`.

    Args:
        kind: what they are, for messages.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def __iter__(self):
        return iter(sorted(self._classes))

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator: make a class known by its `name`.

        Raises:
            RMTKDError: no name, or a name that another class has already taken.
        """
        if not cls.name:
            raise RMTKDError(f"{cls.__name__} has no name; set the class attribute `name`, its log and registry key.")
        taken = self._classes.get(cls.name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise RMTKDError(
                f"The name {cls.name!r} belongs to {taken.__qualname__}; give {cls.__qualname__} another one."
            )
        self._classes[cls.name] = cls
        return cls

    def find(self, name: Any) -> type[T]:
        """The class registered under `name`.

        Raises:
            RMTKDError: unknown; the message lists the known names.
        """
        if not isinstance(name, str) or name not in self._classes:
            meant = close(name, self)
            raise RMTKDError(
                f"No {self.kind} {shown(name)}; expected one of {', '.join(self)}.{' ' * bool(meant)}{meant}"
            )
        return self._classes[name]

    def build(self, given: str | Mapping[str, Any]) -> T:
        """An instance from a name, from {"name": ..., arguments}, or from {name: arguments}.

        Raises:
            RMTKDError: no or an unknown name, arguments it does not take or of a wrong type, or something else than a
                name or a mapping.
        """
        if isinstance(given, str):
            given = {"name": given}
        if not isinstance(given, Mapping):
            raise RMTKDError(f"{self.kind}: got {a_kind(given)}; expected a name, a dict or an instance.")
        if "name" not in given and len(given) == 1:
            given = with_name(self.kind, *next(iter(given.items())))
        arguments = dict(given)
        cls = self.find(arguments.pop("name", None))
        taken = inspect.signature(cls.__init__).parameters.values()
        known = [p.name for p in taken if p.name != "self"]
        several = any(p.kind is p.VAR_KEYWORD for p in taken)
        if unknown := [name for name in arguments if name not in known and not (several and isinstance(name, str))]:
            meant = close(unknown[0], known)
            words = ", ".join(sorted(name if isinstance(name, str) else shown(name) for name in unknown))
            raise RMTKDError(
                f"{cls.name} takes no {words}; expected among {', '.join(known)}.{' ' * bool(meant)}{meant}"
            )
        try:
            return cls(**arguments)
        except RMTKDError:
            raise
        except (TypeError, ValueError) as error:  # an argument is missing; or what its annotation does not tell
            given = ", ".join(f"{key}={shown(value)}" for key, value in arguments.items())
            raise RMTKDError(
                f"{cls.name} cannot take {given}: {error}. Expected values as in {cls.__name__}."
            ) from error
