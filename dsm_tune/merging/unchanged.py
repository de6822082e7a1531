"""Whether modules still are what they were when somebody looked at all of them.

To look at a block of timm again takes as long as half of what it computes for a single image; to
see that nothing of it was replaced since takes a tenth of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from operator import attrgetter, contains, getitem, is_, itemgetter
from typing import Any

from torch import Tensor, nn

__all__ = ["Unchanged"]

# What those who look read of a module, beside its parameters and children; "training" of those that
# drop something.
READ = ("num_heads", "head_dim", "scale", "eps", "approximate", "out_features", "p")
DROPPING = ("p", "drop_prob", "attn_drop")


class Unchanged:
    """Modules as they are now; called later, it tells whether they still are.

    It sees what takes another object's place (a child, a parameter, a number that is read),
    parameters with other memory or another shape, another class, hooks, and a ``forward`` of a
    module's own; not a ``__dict__`` that is another one.

    Args:
        parent: has the modules among its children, of which none may change.
        modules: to watch, with all within them.
    """

    def __init__(self, parent: nn.Module, modules: Iterable[nn.Module]) -> None:
        self.modules = [inner for module in modules for inner in module.modules()]
        self.kinds = list(map(type, self.modules))
        self.own: list[dict[str, Any]] = list(map(vars, self.modules))
        self.children = [module._modules for module in (parent, *self.modules)]
        self.had = list(map(dict, self.children))
        held = [held for module in self.modules for held in _held(module)]
        self.places, self.names, self.values = (list(one) for one in zip(*held, strict=True))
        self.parameters = [value for value in self.values if isinstance(value, Tensor)]
        self.memory = self._memory()

    def __call__(self) -> bool:
        """Whether all is as it was, and nobody is told when a module runs."""
        try:
            return (
                self.children == self.had
                and all(map(is_, map(getitem, self.places, self.names), self.values))
                and list(map(type, self.modules)) == self.kinds
                and not any(map(itemgetter("_forward_hooks"), self.own))
                and not any(map(itemgetter("_forward_pre_hooks"), self.own))
                and not any(map(contains, self.own, repeat("forward")))
                and self._memory() == self.memory
            )
        except (KeyError, RuntimeError):  # it is gone; it has no memory
            return False

    def _memory(self) -> tuple[list[Any], ...]:
        """Where the numbers of parameters are, and how they lie there."""
        return (
            list(map(Tensor.data_ptr, self.parameters)),
            list(map(attrgetter("dtype"), self.parameters)),
            list(map(attrgetter("shape"), self.parameters)),
            list(map(Tensor.stride, self.parameters)),
        )


def _held(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Where something is kept, by what name, and what it is."""
    own, drops = vars(module), any(hasattr(module, name) for name in DROPPING)
    read = "_modules", "_parameters", *READ, *(("training",) if drops else ())
    for where, names in ((module._parameters, module._parameters), (own, read)):
        for name in names:
            if name in where:
                yield where, name, where[name]
