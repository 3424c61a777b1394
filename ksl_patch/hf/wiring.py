"""What a handle puts on a model: hooks and methods, taken off again as a whole; copies and files are without them."""

from __future__ import annotations

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
    """Hooks on a model's modules and attributes of the model itself, to be undone in the reverse order."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._undo = ExitStack()
        self._hooked: dict[int, nn.Module] = {id(model): model}
        self._ids: set[int] = set()
        self._names: set[str] = set()
        self._before: dict[str, Any] = {}

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

    def set(self, name: str, value: Any) -> None:
        """Set an attribute of the model."""
        self._before[name] = vars(self._model).get(name, _ABSENT)
        self._names.add(name)
        vars(self._model)[name] = value
        self._undo.callback(_restore, self._model, name, self._before[name])

    def wrap(self, name: str, method: Callable[..., Any]) -> None:
        """Put `method(original, ...)` in the place of a method, if the model has it."""
        original = getattr(self._model, name, None)
        if original is not None:
            self.set(name, functools.wraps(original)(functools.partial(method, original)))

    def copy_without(self) -> None:
        """Let `copy.deepcopy`, `pickle` and `torch.save` take the hooked modules as they are without the wiring."""
        for module in self._hooked.values():
            vars(module)["__reduce_ex__"] = functools.partial(self._reduce, module)
            self._undo.callback(_restore, module, "__reduce_ex__", _ABSENT)

    def _reduce(self, module: nn.Module, protocol: Any) -> Any:
        reduced: Any = type(module).__reduce_ex__(module, protocol)
        make, arguments, state, *more = reduced
        state = {name: value for name, value in state.items() if name != "__reduce_ex__"}
        if module is self._model:
            for name in self._names:
                del state[name]
                if self._before[name] is not _ABSENT:
                    state[name] = self._before[name]
        for name in _HOOKS:
            state[name] = OrderedDict((key, hook) for key, hook in state[name].items() if key not in self._ids)
        return make, arguments, state, *more


def _restore(module: nn.Module, name: str, value: Any) -> None:
    if value is _ABSENT:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value
