"""What a handle puts on a model: hooks and methods, taken off again as a whole; copies and files are without them."""

from __future__ import annotations

import copyreg
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_ABSENT = object()


class Wiring:
    """Hooks on a model's modules and attributes of them, to be undone in the reverse order."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._undo = ExitStack()
        self._hooked: dict[int, nn.Module] = {}
        self._ids: set[int] = set()
        self._before: dict[tuple[int, str], Any] = {}  # by module and attribute
        self._classes: dict[type, type] = {}

    @contextmanager
    def undone_on_error(self) -> Iterator[Wiring]:
        """A `with` block that leaves the model as it was when anything in it fails."""
        try:
            yield self
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Take everything off again."""
        self._undo.close()

    def hook(self, register: Callable[..., Any], function: Callable[..., Any], **options: Any) -> None:
        """Register a hook with a module's own method."""
        handle = register(function, **options)
        self._undo.callback(handle.remove)
        self._ids.add(handle.id)
        module = register.__self__  # type: ignore[attr-defined]
        self._hooked[id(module)] = module

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of a module. What others have put in its place since stays there."""
        before = self._before[id(module), name] = vars(module).get(name, _ABSENT)
        vars(module)[name] = value
        self._undo.callback(_restore, module, name, value, before)

    def wrap(self, name: str, method: Callable[..., Any]) -> None:
        """Put `method(original, ...)` in the place of a method, if the model has it."""
        original = getattr(self._model, name, None)
        if original is not None:
            self.set(self._model, name, functools.wraps(original)(functools.partial(method, original)))

    def own_class(self, module: nn.Module) -> None:
        """Give a module a class of its own, which is its class in all else.

        torch.compile does not look at hooks again. It does at classes, so that neither what it compiled before nor
        what it compiled of another model is taken for this one.
        """
        kind = type(module)
        module.__class__ = type(
            kind.__name__, (kind,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        )
        self._classes[module.__class__] = kind
        self._undo.callback(setattr, module, "__class__", kind)

    def copy_without(self) -> None:
        """Let `copy.deepcopy`, `pickle` and `torch.save` take the hooked modules as they are without the wiring."""
        for module in self._hooked.values():
            self.set(module, "__reduce_ex__", functools.partial(self._reduce, module))

    def _reduce(self, module: nn.Module, protocol: Any) -> Any:
        reduced: Any = type(module).__reduce_ex__(module, protocol)
        make, arguments, state, *more = reduced
        kind = self._classes.get(type(module))
        if kind is not None:
            make, arguments = copyreg._reconstructor, (kind, object, None)  # type: ignore[attr-defined]
        state = dict(state)
        for (owner, name), before in self._before.items():
            if owner == id(module):
                del state[name]
                if before is not _ABSENT:
                    state[name] = before
        for name in _HOOKS:
            state[name] = OrderedDict((key, hook) for key, hook in state[name].items() if key not in self._ids)
        return make, arguments, state, *more


def _restore(module: nn.Module, name: str, value: Any, before: Any) -> None:
    if vars(module).get(name) is not value:
        return
    if before is _ABSENT:
        del vars(module)[name]
    else:
        vars(module)[name] = before
