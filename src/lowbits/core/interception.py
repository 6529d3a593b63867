"""Standing between a module and whoever calls it, until told to go.

Forward hooks would run inside what ``module.compile()`` compiles, and break its graph. A subclass
with a ``__call__`` of its own stays outside, whichever comes first.
"""

from __future__ import annotations

import copyreg
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final, cast

from torch import nn

from lowbits.errors import PatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

_KEY: Final = "_lowbits_interceptor"
_MARK: Final = "_lowbits_streamed"
_MIXIN: Final = "_lowbits_mixin"


class Interceptor(ABC):
    """Runs a module's calls, and its conversions (``.to()``, ``.half()``)."""

    @abstractmethod
    def call(
        self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Return ``forward(*args, **kwargs)``."""

    @abstractmethod
    def convert(self, function: Callable[..., Any]) -> None:
        """Convert the module's tensors by a function of torch's, as ``.to()`` and others do."""

    @abstractmethod
    def refuse(self, attribute: str) -> None:
        """Raise: other code would take the module over by setting an attribute.

        Raises:
            PatchError: always.
        """

    @abstractmethod
    def settled(self) -> AbstractContextManager[None]:
        """Let the module hold what may be saved, for a moment."""

    @abstractmethod
    def settle(self) -> None:
        """Let the module hold what may be copied, until it is called."""


class _Guarded:
    """An attribute of a module that cannot be set, or deleted, while calls are intercepted.

    A property, and not a ``__setattr__``, which would run for every attribute, and in graphs.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, module: nn.Module, _: type[nn.Module]) -> Any:
        if self._name not in module.__dict__:
            raise AttributeError(self._name)
        return module.__dict__[self._name]

    def __set__(self, module: nn.Module, value: Any) -> None:
        interceptor = interceptor_of(module)
        if interceptor is not None:
            interceptor.refuse(self._name)
        module.__dict__[self._name] = value

    def __delete__(self, module: nn.Module) -> None:
        """Do nothing: who removes hooks, as a precaution, does not end the interception."""


class _OwnDeepcopy:
    """A module's own ``__deepcopy__``, which never asks how it is reduced; nothing without one."""

    def __get__(self, module: nn.Module, _: type[nn.Module]) -> Callable[[Any], Any]:
        own: Callable[[Any], Any] = super(Intercepted, module).__deepcopy__  # type: ignore[misc]
        interceptor = interceptor_of(module)
        return own if interceptor is None else partial(self._copied, module, interceptor, own)

    @staticmethod
    def _copied(
        module: nn.Module, interceptor: Interceptor, own: Callable[[Any], Any], memo: Any
    ) -> Any:
        interceptor.settle()
        with interceptor.settled():
            release(module)  # it makes one of its own class, with all of its attributes
            try:
                return own(memo)
            finally:
                intercept(module, interceptor)


class Intercepted(nn.Module):
    """A mix-in in front of a module's own class; copies and pickles do not have it."""

    # What accelerate sets, in this order; weights move in between.
    _old_forward = _Guarded("_old_forward")
    _hf_hook = _Guarded("_hf_hook")
    __deepcopy__ = _OwnDeepcopy()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Let the interceptor run the call."""
        interceptor = self.__dict__.get(_KEY)
        if interceptor is not None:
            return interceptor.call(super().__call__, args, kwargs)
        cls: Any = type(self)
        if Intercepted in cls.__mro__:  # it was released behind a class that others have made
            return super().__call__(*args, **kwargs)
        return cls.__call__(self, *args, **kwargs)  # others kept this method of a released module

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:  # noqa: FBT001, FBT002 - torch's signature
        interceptor = self.__dict__.get(_KEY)
        if interceptor is None:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        interceptor.convert(fn)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's own state dict."""
        interceptor = interceptor_of(self)
        with interceptor.settled() if interceptor else nullcontext():
            return super().state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        interceptor = interceptor_of(self)
        if interceptor:
            interceptor.settle()
        return reduced(super().__reduce_ex__(protocol), type(self), _KEY)


def reduced(made: Any, cls: type, key: str) -> Any:
    """Return what `pickle` and `copy` make an object of, as one of its own class.

    Args:
        made: what its own ``__reduce_ex__`` returns.
        cls: stands in front of the object's own class.
        key: of the object's ``__dict__``, which is left out.
    """
    function, arguments, state = made[:3]
    if function is copyreg.__newobj__:  # type: ignore[attr-defined]
        function = _new  # pickle refuses that one for a class that is not the object's
    own = cls
    while (behind := _own_class(own)) is not None:
        own = behind
    arguments = tuple(own if value is cls else value for value in arguments)
    return (function, arguments, {k: v for k, v in state.items() if k != key}, *made[3:])


def _new(cls: type[nn.Module], *arguments: Any) -> nn.Module:
    """Make an empty module for pickle and deepcopy, which fill it."""
    module: nn.Module = cls.__new__(cls, *arguments)
    return module


class _StandIn(type):
    """The class of classes with a mix-in in front, which equal what they stand in front of.

    diffusers looks for the exact class of a component among those that a pipeline expects.
    """

    def __eq__(cls, other: object) -> bool:
        own = _own_class(cls)
        return other is cls or (own is not None and own == other)

    def __hash__(cls) -> int:
        own = _own_class(cls)
        return type.__hash__(cls) if own is None else hash(own)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make one of its own class: a slice of a `Sequential` is a new one of the same type."""
        own = _own_class(cls)
        return super().__call__(*args, **kwargs) if own is None else own(*args, **kwargs)


def _own_class(cls: type) -> Any:
    """Return the class that a mix-in was put in front of; None for one that others have made."""
    return cls.__mro__[2] if _MIXIN in cls.__dict__ else None


def put_in_front(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Let a mix-in's methods come before a module's own; its class keeps its name.

    Raises:
        PatchError: its class has a metaclass that does not allow that.
    """
    own = type(module)
    try:
        _become(module, _in_front(mixin, own, isinstance(own, _Behind)))
    except TypeError:
        try:
            _become(module, _in_front(mixin, own, True))
        except TypeError as error:
            raise PatchError(f"cannot stand in front of a {own.__name__}: {error}") from error


def take_away(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Undo `put_in_front`; what was put in front since stays.

    Where others have given the module a class since, it keeps that.
    """
    cls, others = type(module), []
    while (own := _own_class(cls)) is not None and cls.__mro__[1] is not mixin:
        others.append(cls.__mro__[1])
        cls = own
    if own is None:
        return
    _become(module, own)
    for other in reversed(others):
        put_in_front(module, other)


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", cls)  # the module's own may guard its attributes


def intercept(module: nn.Module, interceptor: Interceptor) -> None:
    """Let an interceptor run a module's calls from now on; it keeps its class's name."""
    if not isinstance(module, Intercepted):  # as `release` left one that others had changed
        put_in_front(module, Intercepted)
    module.__dict__[_KEY] = interceptor


def release(module: nn.Module) -> None:
    """Undo `intercept`."""
    take_away(module, Intercepted)
    module.__dict__.pop(_KEY, None)


def interceptor_of(module: nn.Module) -> Interceptor | None:
    """Return what runs a module's calls, if anything does."""
    found: Interceptor | None = module.__dict__.get(_KEY)
    return found


def streamed_part(root: nn.Module) -> str | None:
    """Return the name of a module's first part that is streamed; None without one.

    Its calls are intercepted, or, inside a part of something larger that is streamed as a whole,
    its tensors are marked.
    """
    for name, module in root.named_modules():
        held = (*module._parameters.values(), *module._buffers.values())
        if interceptor_of(module) is not None or any(map(is_streamed, held)):
            return name or type(root).__name__
    return None


def mark_streamed(tensor: Tensor) -> None:
    """Mark a tensor as a streamer's, or as its stand-in, until `unmark_streamed`."""
    # By its identity: copies take attributes over, and are nobody's.
    tensor.__dict__[_MARK] = id(tensor)


def unmark_streamed(tensor: Tensor) -> None:
    """Say that a tensor is no streamer's any more."""
    tensor.__dict__.pop(_MARK, None)


def is_streamed(tensor: Tensor | None) -> bool:
    """Say whether a tensor is a streamer's, or its stand-in."""
    return tensor is not None and tensor.__dict__.get(_MARK) == id(tensor)


class _Behind(_StandIn):
    """The class of those that take their layout from the module's own class.

    Objects of ``class Model(ABC, nn.Module)`` cannot be given one whose first base is another.
    Python looks attributes up more slowly in classes that order their bases themselves.
    """

    def mro(cls) -> list[type]:
        """Put the mix-in in front all the same."""
        own, *others = super().mro()
        return [own, cls.__dict__[_MIXIN], *others]


def _in_front(
    mixin: type[nn.Module],
    base: type[nn.Module],
    is_behind: bool,  # noqa: FBT001 - for the cache
) -> type[nn.Module]:
    """Return the same class each time, for compilers."""
    return _made(cast("Any", mixin), cast("Any", base), id(base), is_behind)


@cache
def _made(
    mixin: type[nn.Module],
    base: type[nn.Module],
    _: int,
    is_behind: bool,  # noqa: FBT001
) -> type[nn.Module]:
    """Make a class, for a base and its identity: stand-ins equal what they are for."""
    kind: Any = type(base)
    meta: Any = _Behind if is_behind else _StandIn
    if not issubclass(meta, kind):
        meta = kind if issubclass(kind, meta) else type(meta.__name__, (meta, kind), {})
    content: dict[str, Any] = {"__module__": base.__module__, _MIXIN: mixin}
    bases = (base,) if is_behind else (mixin, base)
    made: type[nn.Module] = meta(base.__name__, bases, content)
    return made
