"""A fleet's members as tasks of Ray: one GPU or some cores each, anywhere in a cluster that shares the run folders.

A node that is lost takes nothing with it: its members are begun again elsewhere, from their last checkpoints.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ksl_patch.errors import KslPatchError, RunError
from ksl_patch.hf import load_base
from ksl_patch.train.fleet import Member, Outcome, build_member
from ksl_patch.train.loaded import Loaded
from ksl_patch.train.progress import Reporter

_ANSWERS = 10  # seconds
_LOST = 5  # times that a member is begun again after its node was lost


@dataclass(frozen=True)
class Place:
    """Where tasks run. address: of a cluster, such as "ray://HOST:10001"; "local" for this machine. cpus: of a task."""

    address: str = "local"
    cpus: int = 2


@ray.remote(num_cpus=0)
class _Events:
    """What members tell, in order, until it is fetched."""

    def __init__(self) -> None:
        self._told: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = []

    def tell(self, name: str, method: str, arguments: tuple[Any, ...], values: dict[str, Any]) -> None:
        self._told.append((name, method, arguments, values))

    def fetch(self) -> list[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
        told, self._told = self._told, []
        return told


class _Told:
    """A reporter of a build elsewhere, which tells the events."""

    def __init__(self, name: str, events: Any) -> None:
        self._name, self._events = name, events

    def note(self, event: str, message: str, **values: Any) -> None:
        self._tell("note", event, message, **values)

    def doubt(self, event: str, message: str, **values: Any) -> None:
        self._tell("doubt", event, message, **values)

    def begin(self, stage: str, total: int | None, later: int | None = None) -> None:
        self._tell("begin", stage, total, None)  # how long steps take cannot be told from when events arrive

    def step(self, done: int, loss: float | None = None) -> None:
        self._tell("step", done, loss)

    def end(self) -> None:
        self._tell("end")

    def _tell(self, method: str, *arguments: Any, **values: Any) -> None:
        self._events.tell.remote(self._name, method, arguments, values)


@cache
def _loaded(base: str, revision: str | None, device: str | None) -> Loaded:
    """A base, once in each of Ray's processes."""
    return Loaded.of(*load_base(base, revision=revision, device=device))


@ray.remote(max_retries=_LOST)  # type: ignore[untyped-decorator]
def _build(member: Member, events: Any) -> Outcome:
    config = member.config
    try:
        loaded = _loaded(config.base, config.revision, config.device)
    except KslPatchError as error:
        return Outcome(member.name, "failed", 0.0, error=str(error))
    return build_member(member, _Told(member.name, events), loaded)


def build_on_ray(
    members: Sequence[Member],
    place: Place,
    reporter_of: Callable[[Member], Reporter],
    done: Callable[[Outcome], None],
) -> list[Outcome]:
    """Build the members side by side, one whose `beside` names others after these; the outcomes in their order.

    reporter_of, done: as in `build_fleet`. Raises RunError where there is no such cluster, or none with room for a
    task.
    """
    resources = _joined(place)
    on_gpu = resources.get("GPU", 0) >= 1 and not (members[0].config.device or "").startswith("cpu")
    task = _build.options(num_gpus=1, num_cpus=1) if on_gpu else _build.options(num_cpus=place.cpus)
    if not on_gpu and not any(node["Alive"] and node["Resources"].get("CPU", 0) >= place.cpus for node in ray.nodes()):
        raise RunError(f"no node of the cluster has {place.cpus} cores for a task: give --ray-cpus N.")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # is not lost alone
    events = _Events.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    of = {member.name: member for member in members}
    waiting = dict(of)
    running: dict[Any, Member] = {}
    reporters: dict[str, Reporter] = {}
    outcomes: dict[str, Outcome] = {}
    try:
        while waiting or running:
            open_files = {str(member.output) for member in [*waiting.values(), *running.values()]}
            for name, member in list(waiting.items()):
                if open_files.isdisjoint(member.config.beside):
                    running[task.remote(member, events)] = waiting.pop(name)
            if not running:
                raise RunError(f"{', '.join(waiting)} are each beside another of them: none can be built first.")
            finished, _ = ray.wait(list(running), timeout=0.5)
            for name, method, arguments, values in ray.get(events.fetch.remote()):
                if name not in reporters:
                    reporters[name] = reporter_of(of[name])
                getattr(reporters[name], method)(*arguments, **values)
            for reference in finished:
                member = running.pop(reference)
                try:
                    outcomes[member.name] = ray.get(reference)
                except RayError as error:
                    message = f"Ray lost it {_LOST + 1} times ({type(error).__name__}): {str(error).splitlines()[0]}"
                    outcomes[member.name] = Outcome(member.name, "failed", 0.0, error=message)
                done(outcomes[member.name])
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        ray.shutdown()
    return [outcomes[member.name] for member in members]


def _joined(place: Place) -> dict[str, float]:
    """What the cluster has. Raises RunError for none."""
    here: dict[str, Any] = {"include_dashboard": False} if place.address == "local" else {"address": place.address}
    try:
        if found := re.fullmatch(r"(?:ray://)?\[?(.*?)\]?:([0-9]{1,5})", place.address):
            # Ray itself would wait for minutes where nobody answers.
            socket.create_connection((found[1], int(found[2])), timeout=_ANSWERS).close()
        ray.init(**here, log_to_driver=False, logging_level="ERROR")
        return dict(ray.cluster_resources())
    except (ConnectionError, ValueError, OverflowError, RuntimeError, OSError, RayError) as error:
        raise RunError(f"there is no Ray cluster at {place.address} ({str(error).splitlines()[0]}).") from error
