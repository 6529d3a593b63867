"""What a `Handle` has others do: place a target, pack it again, look after its adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from torch import nn

    from lowbits.core.handle import Handle


class Placed(Protocol):
    """How a target's weights are placed: on the device for good, or streamed."""

    @property
    def is_streamed(self) -> bool:
        """Whether they are streamed."""

    def stats(self) -> Any:
        """Return `lowbits.StreamStats`."""

    def attach(self, *, must_fit: bool = True) -> None:
        """Place them, or, after `detach`, place them as before, though they fit no more."""

    def detach(self) -> None:
        """Leave them where they were, all of them or none."""

    def resized(self, placement: Any, modules: Mapping[str, nn.Module], *, must_fit: bool) -> bool:
        """Place them in another budget where no weight has to move for that; say whether it did."""

    def turn(self) -> AbstractContextManager[Any]:
        """Keep others from running them: who waits for a turn goes on when this is over."""


class Adapters(Protocol):
    """What acts beside packed layers, or was merged into them."""

    def attach(self, owned: Handle) -> None:
        """Look after the adapters of a handle's target, those that come later too."""

    def detach(self) -> None:
        """Leave them as they are."""

    def forget(self) -> None:
        """Let those that were merged act again: the packed weights are gone."""

    def fused(self) -> Mapping[nn.Module, Any]:
        """Return what was merged on request into each layer, and is there still."""

    def settle(self, *, takes_out: bool = False) -> None:
        """Let the packed weights hold what adapters say now, but for what is merged unasked."""

    def fuse_again(self, fused: Mapping[nn.Module, Any]) -> None:
        """Merge that into layers that were packed anew."""

    def merge(self) -> None:
        """Merge what acts."""

    def unmerge(self) -> None:
        """Let it act beside the packed weights, which are what they were."""


class Target(Protocol):
    """What a handle needs to do to its target, and cannot do itself."""

    def modules(self) -> list[nn.Module]:
        """Return all of its models that still exist."""

    def switch(self, owned: Handle, scheme: Any) -> Handle:
        """Pack the target in another scheme."""

    def place_again(
        self, owned: Handle, placed: Placed, changes: Mapping[str, Any], *, must_fit: bool
    ) -> Placed:
        """Place the target in another way, or as it was if that fails."""
