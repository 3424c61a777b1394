"""Binding: functions, generators and coroutines that run with a choice in whatever thread, task or context.

The choice itself, and the blocks that hold it, are blocks.py's.
"""

from __future__ import annotations

import functools
import inspect
import io
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

from ksl_patch.hf.blocks import Blocks, Names

F = TypeVar("F", bound=Callable[..., Any])


def bind(blocks: Blocks, names: Names) -> Callable[[F], F]:
    """A decorator that has a function run with a choice, and each step of what it returns to be run later."""
    with blocks.lock:
        blocks.slots(names)

    def decorate(function: Any) -> Any:
        def bound(*args: Any, **kwargs: Any) -> Any:
            with blocks.using(names):
                result = function(*args, **kwargs)
            if isinstance(result, AsyncGenerator):
                return _async_steps(blocks, names, result)
            if inspect.iscoroutine(result):
                return _awaited(blocks, names, result)
            is_lazy = isinstance(result, Iterator) and not isinstance(result, io.IOBase)
            return _steps(blocks, names, result) if is_lazy else result

        async def bound_task(*args: Any, **kwargs: Any) -> Any:
            return await bound(*args, **kwargs)

        wrapper = bound_task if inspect.iscoroutinefunction(function) else bound
        return functools.update_wrapper(wrapper, function) if hasattr(function, "__name__") else wrapper

    return decorate


async def _awaited(blocks: Blocks, names: Names, coroutine: Any) -> Any:
    with blocks.using(names):
        return await coroutine


def _steps(blocks: Blocks, names: Names, generator: Any) -> Any:
    """A generator whose every step runs with a choice, whatever context runs it; between them nothing is chosen."""
    with blocks.holding(lambda: blocks.slots(names)) as choice, ExitStack() as stack:
        if hasattr(generator, "close"):
            stack.callback(generator.close)
        steps, sent = iter(generator), None
        while True:
            with blocks.choosing(choice):
                try:
                    item = next(steps) if sent is None else steps.send(sent)
                except StopIteration as end:
                    return end.value
            sent = yield item


async def _async_steps(blocks: Blocks, names: Names, generator: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
    with blocks.holding(lambda: blocks.slots(names)) as choice:
        try:
            while True:
                with blocks.choosing(choice):
                    try:
                        item = await anext(generator)
                    except StopAsyncIteration:
                        return
                yield item
        finally:
            await generator.aclose()
