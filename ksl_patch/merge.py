"""Two patches of one base: how they differ, and one patch of both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Literal

import torch

from ksl_patch.base.tensors import row_bits
from ksl_patch.errors import PatchError
from ksl_patch.patch import Origin, Patch
from ksl_patch.patch.meta import timestamp
from ksl_patch.patch.names import check_name

Policy = Literal["first", "second"]


@dataclass(frozen=True)
class RowChange:
    """A row that both patches have, with other values.

    cosine: of the two changes from the base's row (NaN where one of them is none). norm: of the difference of the rows.
    """

    token_id: int
    token: str | None
    cosine: float
    norm: float


@dataclass(frozen=True)
class Difference:
    """How patch b differs from patch a: ids that only b has, only a has, both have alike, and both have otherwise.

    settings: what else decides the output and differs, by name, (a's, b's).
    """

    added: list[int]
    removed: list[int]
    same: list[int]
    changed: list[RowChange]
    settings: dict[str, tuple[object, object]]


def diff(a: Patch, b: Patch) -> Difference:
    """Compare two patches of one base. Raises PatchError for patches of different bases."""
    _same_base(a, b)
    shared = [int(i) for i in a.token_ids[torch.isin(a.token_ids, b.token_ids)]]
    at_a, at_b = _places(a, shared), _places(b, shared)
    equal = row_bits(a.rows[at_a]).eq(row_bits(b.rows[at_b])).all(dim=1)
    if a.output_rows is not None or b.output_rows is not None:
        equal &= row_bits(_output(a)[at_a]).eq(row_bits(_output(b)[at_b])).all(dim=1)
    base = a.base_rows[at_a].double()
    first, second = a.rows[at_a].double() - base, b.rows[at_b].double() - base
    cosine = (first * second).sum(dim=1) / (first.norm(dim=1) * second.norm(dim=1))
    norm = (second - first).norm(dim=1)
    tokens = a.meta.tokens
    settings = {
        name: (getattr(a.meta, name), getattr(b.meta, name))
        for name in ("side", "scope")
        if getattr(a.meta, name) != getattr(b.meta, name)
    }
    if a.meta.template != b.meta.template:
        settings["template"] = (_template(a), _template(b))
    return Difference(
        added=b.token_ids[~torch.isin(b.token_ids, a.token_ids)].tolist(),
        removed=a.token_ids[~torch.isin(a.token_ids, b.token_ids)].tolist(),
        same=[i for i, same in zip(shared, equal.tolist(), strict=True) if same],
        changed=[
            RowChange(i, None if tokens is None else tokens[place], *values)
            for i, place, same, *values in zip(
                shared, at_a.tolist(), equal.tolist(), cosine.tolist(), norm.tolist(), strict=True
            )
            if not same
        ],
        settings=settings,
    )


def merge(a: Patch, b: Patch, *, name: str, policy: Policy | None = None) -> Patch:
    """One patch with the rows of both. Its `origin` says where each row came from.

    policy: whose row is taken where both change one token otherwise; None makes that an error. A template is kept where
    both have the same. Raises PatchError for a conflict without a policy and for patches that do not fit together.
    """
    check_name(name)
    difference = diff(a, b)
    for setting in ("side", "scope"):
        if setting in difference.settings:
            one, other = difference.settings[setting]
            raise PatchError(f"{a.meta.name} has {setting} {one}, {b.meta.name} has {other}: they cannot be one patch.")
    if difference.changed and policy is None:
        which = ", ".join(str(change.token_id) for change in difference.changed[:5])
        more = ", ..." if len(difference.changed) > 5 else ""
        names = " and ".join(_of_tokens(patch, [change.token_id for change in difference.changed]) for patch in (a, b))
        raise PatchError(
            f"{names} change {len(difference.changed)} of the same tokens in another way ({which}{more}): "
            "say whose rows to take with --on-conflict first or second."
        )
    taken = b.token_ids[torch.isin(b.token_ids, torch.tensor(difference.added + _conflicts(difference, policy)))]
    kept = a.token_ids[~torch.isin(a.token_ids, taken)]
    order = torch.cat([kept, taken]).argsort()
    ids = torch.cat([kept, taken])[order]
    at_a, at_b = _places(a, kept.tolist()), _places(b, taken.tolist())

    def joined(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.cat([one[at_a], other[at_b]])[order].contiguous()

    def common(field: str) -> object:
        return getattr(a.meta, field) if getattr(a.meta, field) == getattr(b.meta, field) else None

    licences = {patch.meta.licence for patch in (a, b)}
    both = " AND ".join(dict.fromkeys(_terms(a) + _terms(b)))
    text = token_texts(a, b)
    has_output = a.output_rows is not None or b.output_rows is not None
    return Patch(
        token_ids=ids,
        rows=joined(a.rows, b.rows),
        base_rows=joined(a.base_rows, b.base_rows),
        output_rows=joined(_output(a), _output(b)) if has_output else None,
        meta=replace(
            a.meta,
            name=name,
            base=replace(
                a.meta.base,
                body=a.meta.base.body if a.meta.base.body == b.meta.base.body else None,
                tokenizer_digest=a.meta.base.tokenizer_digest or b.meta.base.tokenizer_digest,
            ),
            language=common("language"),  # type: ignore[arg-type]
            template=common("template"),  # type: ignore[arg-type]
            tokens=[text[i] for i in ids.tolist()] if a.meta.tokens and b.meta.tokens else None,
            ticket=None,
            training=None,
            evaluation=None,
            certificate=None,
            created=timestamp(),
            licence=a.meta.licence if len(licences) == 1 else None if None in licences else both,
            origin=_origin(a, kept) + _origin(b, taken),
        ),
    )


def merge_all(patches: Sequence[Patch], *, name: str, policy: Policy | None = None) -> Patch:
    """One patch with the rows of all: `merge` of the first two, of that and the third, and so on."""
    return reduce(lambda merged, patch: merge(merged, patch, name=name, policy=policy), patches)


def _terms(patch: Patch) -> list[str]:
    """A patch's licence, an SPDX expression, as the parts of a conjunction, where AND binds more than OR."""
    licence = str(patch.meta.licence)
    if patch.meta.origin is None and " OR " in licence.upper():
        return [f"({licence})"]
    return list(re.split(r" AND (?![^(]*\))", licence))


def _of_tokens(patch: Patch, token_ids: list[int]) -> str:
    """The name of a patch, or of those that it was merged from, which change some of these tokens."""
    if patch.meta.origin is None:
        return patch.meta.name
    return " and ".join(each.name for each in patch.meta.origin if not set(token_ids).isdisjoint(each.token_ids))


def token_texts(*patches: Patch) -> dict[int, str]:
    """The texts of tokens by id, as far as the patches say them."""
    return {
        i: text for patch in patches for i, text in zip(patch.token_ids.tolist(), patch.meta.tokens or (), strict=False)
    }


def _conflicts(difference: Difference, policy: Policy | None) -> list[int]:
    return [change.token_id for change in difference.changed] if policy == "second" else []


def _origin(patch: Patch, token_ids: torch.Tensor) -> list[Origin]:
    """Where some rows of a patch came from, through earlier merges too."""
    ids = set(token_ids.tolist())
    if patch.meta.origin is None:
        return [Origin(name=patch.meta.name, digest=patch.digest, token_ids=sorted(ids))] if ids else []
    kept = [replace(origin, token_ids=[i for i in origin.token_ids if i in ids]) for origin in patch.meta.origin]
    return [origin for origin in kept if origin.token_ids]


def _same_base(a: Patch, b: Patch) -> None:
    one, other = a.meta.base, b.meta.base
    for what in ("fingerprint", "vocab_size", "hidden_size", "dtype", "tokenizer_digest"):
        unknown = what == "tokenizer_digest" and None in (one.tokenizer_digest, other.tokenizer_digest)
        if getattr(one, what) != getattr(other, what) and not unknown:
            raise PatchError(
                f"{a.meta.name} and {b.meta.name} are patches of different bases: {one.model_id or 'unnamed'} and "
                f"{other.model_id or 'unnamed'} differ in {what}."
            )


def _template(patch: Patch) -> str | None:
    """The template's text, and what of it is not its text."""
    template = patch.meta.template
    if template is None:
        return None
    more = [f"{name} {value}" for name, value in asdict(template).items() if name != "text" and value]
    return f"{template.text} ({', '.join(more)})" if more else template.text


def _places(patch: Patch, token_ids: list[int]) -> torch.Tensor:
    return torch.searchsorted(patch.token_ids, torch.tensor(token_ids, dtype=torch.int64))


def _output(patch: Patch) -> torch.Tensor:
    return patch.rows if patch.output_rows is None else patch.output_rows
