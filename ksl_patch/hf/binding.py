"""Binding: functions, generators and coroutines that run with a choice in whatever thread, task or context.

The choice itself, and the blocks that hold it, are choosing.py's.
"""

from __future__ import annotations

import functools
import inspect
import io
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

from ksl_patch.hf.choosing import Choosing, Names

F = TypeVar("F", bound=Callable[..., Any])


def bind(choosing: Choosing, names: Names) -> Callable[[F], F]:
    """A decorator that has a function run with a choice, and each step of what it returns to be run later."""
    with choosing.lock:
        choosing.slots(names)

    def decorate(function: Any) -> Any:
        def bound(*args: Any, **kwargs: Any) -> Any:
            with choosing.using(names):
                result = function(*args, **kwargs)
            if isinstance(result, AsyncGenerator):
                return _async_steps(choosing, names, result)
            if inspect.iscoroutine(result):
                return _awaited(choosing, names, result)
            is_lazy = isinstance(result, Iterator) and not isinstance(result, io.IOBase)
            return _steps(choosing, names, result) if is_lazy else result

        async def bound_task(*args: Any, **kwargs: Any) -> Any:
            return await bound(*args, **kwargs)

        wrapper = bound_task if inspect.iscoroutinefunction(function) else bound
        return functools.update_wrapper(wrapper, function) if hasattr(function, "__name__") else wrapper

    return decorate


async def _awaited(choosing: Choosing, names: Names, coroutine: Any) -> Any:
    with choosing.using(names):
        return await coroutine


def _steps(choosing: Choosing, names: Names, generator: Any) -> Any:
    """A generator whose every step runs with a choice, whatever context runs it; between them nothing is chosen."""
    with choosing.opened(lambda: choosing.slots(names)) as choice, ExitStack() as stack:
        if hasattr(generator, "close"):
            stack.callback(generator.close)
        steps, sent = iter(generator), None
        while True:
            with choosing.chosen(choice):
                try:
                    item = next(steps) if sent is None else steps.send(sent)
                except StopIteration as end:
                    return end.value
            sent = yield item


async def _async_steps(
    choosing: Choosing, names: Names, generator: AsyncGenerator[Any, Any]
) -> AsyncGenerator[Any, Any]:
    with choosing.opened(lambda: choosing.slots(names)) as choice:
        try:
            while True:
                with choosing.chosen(choice):
                    try:
                        item = await anext(generator)
                    except StopAsyncIteration:
                        return
                yield item
        finally:
            await generator.aclose()
