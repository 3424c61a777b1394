"""The systems that a patch is judged beside: the tuned embedding that it came from, and other rows in its place."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

import torch

from ksl_patch.errors import RunError
from ksl_patch.patch import Patch, TemplateMeta
from ksl_patch.patch.evaluation import CONTROLS
from ksl_patch.ticket import Selection
from ksl_patch.train.build import Build


def noise_patch(patch: Patch, seed: int) -> Patch:
    """Control: the patch's rows moved from the base's in a random direction, each as far as the patch moves it."""
    base = patch.base_rows.float()
    direction = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    length = (patch.rows.float() - base).norm(dim=1, keepdim=True) / direction.norm(dim=1, keepdim=True)
    return replace(patch, rows=(base + direction * length).to(patch.rows.dtype), output_rows=None)


def prompts_of(patch: Patch, systems: dict[str, dict[int, Patch]]) -> dict[str, TemplateMeta]:
    """The prompt of each system that answers another one than the patch: with reserved tokens, or without any.

    The base's is without, as somebody without the patch would ask it.
    """
    own = patch.meta.template
    if own is None:
        return {}
    found = {"base": own.of_base()}
    for name, patches in systems.items():
        template = next(iter(patches.values())).meta.template
        if template is not None:
            found[name] = template
    return {name: template for name, template in found.items() if template != own}


def make_systems(
    patch: Patch, build: Build | None, controls: Sequence[str] = CONTROLS, seeds: int = 1
) -> dict[str, dict[int, Patch]]:
    """The systems to evaluate, by name and training seed: the patch, the tuned embedding, the controls.

    The first seed is the patch's own; the build trains what is not in its run folder yet. Without a build there is
    the patch, and the random change. A control has as many rows as the patch of its seed (the best single row is one),
    and the same training. A system is there with every seed, or not at all.
    """
    own = patch.meta.training.seed if patch.meta.training else 0
    if build is None:
        if seeds > 1:
            raise RunError("several training seeds need the run folder of the patch's build.")
        return {"patch": {own: patch}} | ({"noise": {own: noise_patch(patch, own)}} if "noise" in controls else {})
    systems: dict[str, dict[int, Patch]] = {}
    selection = "given" if build.config.rows else build.config.selection
    builds = {seed: build if seed == own else build.seeded(seed) for seed in range(own, own + seeds)}
    if selection in ("ks", "l2") or build.config.mode == "transfer":
        for seed, seeded in builds.items():
            if seed != own:
                seeded.embedding()  # its ticket comes from there
    # Rows that texts have are trained in a prompt without reserved tokens, and reserved ones in one with them.
    plain = {seed: seeded.selecting("frequency", len(patch.token_ids)) for seed, seeded in builds.items()}
    without = [seed for seed, seeded in plain.items() if not seeded.is_embedding_tuned]
    if without:
        prompt, kind = "", build.config.template
        if build.reserved_ids and (kind == "soft" or "{reserved" in kind):
            plain_text = build.template.of_base().text.replace("\n", "\\n")
            prompt = f", --template {shlex.quote(plain_text)}"
        build.reporter.note(
            "left_out",
            "the tuned embedding is left out, and so are the controls ks and l2, which are chosen from it: "
            f"{build.run} has none "
            f"for the seed {', '.join(map(str, without))}. "
            + (
                f"The selection {selection!r} needs none; `ksl-patch build` with the same settings there, with "
                f"--selection ks{prompt} and without --rows, makes it."
                if selection not in ("ks", "l2") and build.config.mode != "transfer"
                else "It was deleted, or the base, the pairs or the template are other ones than it was tuned with."
            ),
            seeds=without,
        )
    reserved: dict[int, Build] = {}
    if "reserved" in controls and selection != "reserved":
        try:
            reserved = {seed: seeded.selecting("reserved", len(patch.token_ids)) for seed, seeded in builds.items()}
        except RunError as error:
            build.reporter.note("left_out", f"reserved rows are left out: {error}")
    for seed, seeded in builds.items():
        this = patch if seed == own else seeded.patch_of(seeded.ticket())
        made = {"patch": this}
        k = len(this.token_ids)
        names: list[Selection] = ["frequency", "random", "single", *(() if without else ("ks", "l2"))]
        others = dict.fromkeys(names, plain[seed]) | ({"reserved": reserved[seed]} if reserved else {})
        for rule, other in others.items():
            if rule in controls and rule != selection:
                made[rule] = other.patch_of(other.ticket(rule, k))
        if not without:
            made["embedding"] = plain[seed].embedding_patch()
        if "noise" in controls:
            made["noise"] = noise_patch(this, seed)
        for name, system in made.items():
            systems.setdefault(name, {})[seed] = system
    return systems
