"""Which modules of a model are moved at once, so that it can be streamed within a budget."""

from __future__ import annotations

import itertools
from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING, Final

from torch import Tensor, nn

from lowbits.streaming.layout import ModelLayout, Unit, is_plain, lay_out_units, padded
from lowbits.streaming.plan import least_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: What a module may own itself and still be split: its own tensors stay on the device for good.
_OWN_SHARE: Final = 0.1

#: Lists of blocks that hold less of the model than this are not worth a copy of their own.
_SMALL_SHARE: Final = 0.02

#: Units that should fit beside each other.
_USUAL_DEPTH: Final = 3
#: As many of those that are larger than most should. FLUX's double blocks, of 2.4 times the bytes
#: of its single ones, come in a row, and each takes longer to copy than to compute: only what is on
#: the device before the row begins, in slots or for good, need not be waited for.
_LARGE_BESIDE: Final = 6
_LARGE: Final = 1.25
#: Share of the room for units that their own tensors, which stay for good then, may take.
_LITTLE: Final = 0.01

_CONTAINERS: Final = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
#: Containers that are never called: only what they hold is.
_UNCALLED: Final = (nn.ModuleList, nn.ModuleDict)


def lay_out(root: nn.Module, *, budget_bytes: int, depth: int | None) -> ModelLayout:
    """Cut a model into units that can be streamed within a budget.

    Blocks of `ModuleList`, `ModuleDict` and `Sequential` are units. Where the base and some of the
    largest units do not fit beside each other, large units are split into their children, and large
    modules of the base become units, until they fit or nothing can be split any more. Units that
    are larger than most are split earlier, once.

    Args:
        root: the model; not changed.
        budget_bytes: for all weights on the device.
        depth: units that have to fit beside each other; None: three, or else one.
    """
    for evens_out in (True, False) if depth is None else (False,):
        cut = _Cut(root)
        if evens_out:
            cut.even_out(budget_bytes)
        cut.refine_all(budget_bytes, depth)
        if cut.fits(budget_bytes, depth):
            return cut.layout
    # What does not fit is told by a cut that does not depend on the budget.
    cut = _Cut(root)
    cut.refine_all(0, depth)
    return cut.layout


class _Cut:
    """A choice of modules that are units, refined step by step."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        least = _tree_bytes(root) * _SMALL_SHARE
        self.layout = self._lay_out(_blocks(root, least))

    def fits(self, budget_bytes: int, depth: int | None) -> bool:
        """Say whether the units can be streamed: so many beside each other; None: one at a time."""
        nbytes = [unit.nbytes for unit in self.layout.units]
        room = budget_bytes - self.layout.fixed_bytes
        if depth is None or sum(sorted(nbytes)[-depth:]) <= room:
            return max(nbytes, default=0) <= room
        return least_bytes(nbytes, range(len(nbytes)), depth) <= room

    def refine_all(self, budget_bytes: int, depth: int | None) -> None:
        """Refine as long as that helps."""
        # Where the usual number does not fit, one at a time may.
        for beside in (_USUAL_DEPTH, 1) if depth is None else (depth,):
            while self.refine(budget_bytes, beside, must_fit=depth is not None):
                pass

    def even_out(self, budget_bytes: int) -> None:
        """Split units that are larger than most, if only a few of them fit beside each other."""
        sizes = sorted((unit.nbytes for unit in self.layout.units), reverse=True)
        room = budget_bytes - self.layout.fixed_bytes
        if not 0 < room < sum(sizes[:_LARGE_BESIDE]) or budget_bytes >= self.layout.nbytes:
            return
        least = max(room // _LARGE_BESIDE, int(_LARGE * median(sizes))) + 1
        if sizes[0] < least:
            return
        layout = self._lay_out(self._split(least))
        # What a block owns itself would stay on the device for good.
        if layout.fixed_bytes - self.layout.fixed_bytes <= _LITTLE * room:
            self.layout = layout

    def refine(self, budget_bytes: int, depth: int, *, must_fit: bool) -> bool:
        """Make the largest units smaller, or else the base; return False where nothing helps."""
        sizes = sorted((unit.nbytes for unit in self.layout.units), reverse=True)[:depth]
        room = budget_bytes - self.layout.fixed_bytes
        if sum(sizes) <= room or budget_bytes >= self.layout.nbytes:
            return False
        if self._change(self._split(room // max(1, len(sizes)) + 1)):
            return True
        # What is too large is whole; its neighbours are not.
        if must_fit and sizes and self._change(self._split(sizes[-1])):
            return True
        modules = [unit.module for unit in self.layout.units]
        return self._change(modules + self._promoted(sum(sizes) - room, depth))

    def _change(self, chosen: Sequence[nn.Module]) -> bool:
        """Let other modules be units; return False where they come out as before."""
        before, self.layout = self.layout, self._lay_out(chosen)
        return [u.module for u in self.layout.units] != [u.module for u in before.units]

    def _split(self, least: int) -> list[nn.Module]:
        """Return the modules of all units, of those of some size on their parts instead."""
        chosen: list[nn.Module] = []
        for unit in self.layout.units:
            chosen += _parts(unit.module) if unit.nbytes >= least else [unit.module]
        return chosen

    def _promoted(self, missing_bytes: int, depth: int) -> list[nn.Module]:
        """Return modules of the base that make room by becoming units: enough, or what can be had.

        One that is larger than all units makes slots larger, too: it comes after all that are not.
        """
        leaves = self._leaves()
        largest = max((unit.nbytes for unit in self.layout.units), default=0)
        sums = list(itertools.accumulate(nbytes for nbytes, _ in leaves))

        def cost(count: int) -> int:
            slots = min(depth, len(self.layout.units) + count)
            return slots * max(0, leaves[count - 1][0] - largest)

        ends = range(1, len(leaves) + 1)
        counts = [n for n in ends if n == len(leaves) or leaves[n][0] > largest]
        gains = {n: sums[n - 1] - cost(n) for n in counts}
        enough = (n for n in counts if gains[n] >= missing_bytes)
        count = next(enough, max(counts, key=gains.__getitem__, default=0))
        if not count or gains[count] <= 0:
            return []
        chosen, wanted = [], min(missing_bytes, gains[count]) + cost(count)
        for nbytes, module in reversed(leaves[:count]):
            if wanted > 0:
                chosen.append(module)
                wanted -= nbytes
        return chosen

    def _leaves(self) -> list[tuple[int, nn.Module]]:
        """Return the modules of the base that can be units, with their bytes, the smallest first.

        What is in units is there because several have it: it would come back.
        """
        inside = {id(module) for unit in self.layout.units for module in unit.module.modules()}
        wholes = _wholes(self.root)
        sizes: dict[nn.Module, int] = defaultdict(int)
        for place in self.layout.base.places:
            module = place.holders[0].module
            is_leaf = id(module) in wholes or not _has_children(module)
            if len(place.holders) == 1 and id(module) not in inside and is_leaf:
                sizes[wholes.get(id(module), module)] += padded(place.nbytes)
        return sorted(((nbytes, m) for m, nbytes in sizes.items()), key=lambda leaf: leaf[0])

    def _lay_out(self, chosen: Sequence[nn.Module]) -> ModelLayout:
        ids = set(map(id, chosen))
        named = self.root.named_modules()
        return lay_out_units(self.root, [Unit(name, m) for name, m in named if id(m) in ids])


def _blocks(module: nn.Module, least: float) -> list[nn.Module]:
    """Return the elements of the outermost containers of a model, but of small ones.

    What is compiled, but for the model itself, is one, too.
    """
    if isinstance(module, _CONTAINERS):
        return _callable(module) if _tree_bytes(module) > least else []
    found: list[nn.Module] = []
    for child in module.children():
        is_whole = _is_compiled(child) and _tree_bytes(child)
        found += [child] if is_whole else _blocks(child, least)
    return found


def _wholes(root: nn.Module) -> dict[int, nn.Module]:
    """Return what each module of a model is not to be moved without, by their identities."""
    wholes: dict[int, nn.Module] = {}
    for module in root.modules():
        # torch's attention computes with its child's weights, and does not call it.
        is_graph = module is not root and _is_compiled(module)
        if is_graph or isinstance(module, nn.MultiheadAttention):
            for part in module.modules():
                wholes.setdefault(id(part), module)
    return wholes


def _callable(module: nn.Module) -> list[nn.Module]:
    """Return what is called of a module's children: of a list of lists, what the lists hold."""
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if is_called(child) else _callable(child)
    return [child for child in found if _tree_bytes(child)]


def is_called(module: nn.Module) -> bool:
    """Say whether a module computes by its forward, and not what it holds alone.

    Attention processors with weights have a ``__call__`` in its place: they are given the module to
    compute with, and diffusers reads their signature.
    """
    cls = type(module)
    has_other = cls.__call__ is not nn.Module.__call__ and cls.forward is nn.Module.forward
    return _is_compiled(module) or not (has_other or isinstance(module, _UNCALLED))


def _is_compiled(module: nn.Module) -> bool:
    """Say whether it has to stay one graph: by its method, or by `torch.compile`."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _parts(module: nn.Module) -> list[nn.Module]:
    """Return the modules that a unit is split into: itself, where it cannot be."""
    own = sum(tensor.nbytes for tensor in _own_tensors(module))
    parts = _callable(module)
    # torch.nn.MultiheadAttention computes with its children's weights, and does not call them.
    if not parts or _is_compiled(module) or own > _OWN_SHARE * _tree_bytes(module):
        return [module]
    if len(parts) == 1:  # a wrapper: its child alone would be no less
        inner = _parts(parts[0])
        return inner if len(inner) > 1 else [module]
    return parts


def _has_children(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _own_tensors(module: nn.Module) -> Iterable[Tensor]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None and is_plain(tensor)]


def _tree_bytes(module: nn.Module) -> int:
    return sum({id(t): t.nbytes for m in module.modules() for t in _own_tensors(m)}.values())
