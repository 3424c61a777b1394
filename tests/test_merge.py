"""Comparing and merging patches."""

import json

import pytest
import torch
from conftest import run_cli, tiny_llama

from ksl_patch import Patch
from ksl_patch.errors import PatchError
from ksl_patch.merge import diff, merge
from ksl_patch.patch import TemplateMeta


def make(model, ids, seed, name, **meta):
    base = model.get_input_embeddings().weight.detach()[ids]
    rows = base + torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    return Patch.from_model(model, ids, rows, name=name, **meta)


@pytest.fixture
def two(model):
    """a has 3, 5, 7; b has 5, 7, 9; row 5 is the same in both."""
    a, b = make(model, [3, 5, 7], 1, "a", licence="MIT"), make(model, [5, 7, 9], 2, "b", licence="CC-BY-4.0")
    rows = b.rows.clone()
    rows[0] = a.rows[1]
    return a, Patch.from_model(model, [5, 7, 9], rows, name="b", licence="CC-BY-4.0")


def test_a_difference_names_every_row_once(two):
    a, b = two
    found = diff(a, b)
    assert (found.added, found.removed, found.same) == ([9], [3], [5])
    [row] = found.changed
    first, second = a.rows[2] - a.base_rows[2], b.rows[1] - b.base_rows[1]
    assert row.token_id == 7
    assert row.cosine == pytest.approx(float(torch.cosine_similarity(first, second, dim=0)), abs=1e-6)
    assert row.norm == pytest.approx(float((b.rows[1] - a.rows[2]).norm()), rel=1e-6)
    nothing = diff(a, a)
    assert (nothing.same, nothing.added, nothing.removed, nothing.changed) == ([3, 5, 7], [], [], [])


def test_a_row_that_differs_in_the_sign_of_a_zero_is_another_row(model):
    a = make(model, [3], 1, "a")
    rows = a.rows.clone()
    rows[0, 0] = 0.0
    a = Patch.from_model(model, [3], rows, name="a")
    rows[0, 0] = -0.0
    assert [row.token_id for row in diff(a, Patch.from_model(model, [3], rows, name="b")).changed] == [3]


def test_a_merged_patch_does_what_both_do_and_says_where_its_rows_are_from(model, two, tmp_path):
    a, b = two
    with pytest.raises(PatchError, match=r"a and b change 1 of the same tokens in another way \(7\)"):
        merge(a, b, name="c")
    for policy, winner, place in (("first", a, 2), ("second", b, 1)):
        c = merge(a, b, name="c", policy=policy)
        assert c.token_ids.tolist() == [3, 5, 7, 9]
        assert torch.equal(c.rows[2], winner.rows[place])
        assert torch.equal(c.rows[[0, 1]], a.rows[[0, 1]])
        assert torch.equal(c.rows[3], b.rows[2])
        c.check(model)
    assert [(each.name, each.digest, each.token_ids) for each in c.meta.origin] == [
        ("a", a.digest, [3, 5]),
        ("b", b.digest, [7, 9]),
    ]
    assert c.meta.licence == "MIT AND CC-BY-4.0"
    c.save(tmp_path / "c.safetensors")
    assert Patch.load(tmp_path / "c.safetensors").meta.origin == c.meta.origin
    # A merge of a merge still names the first patches.
    d = make(model, [11], 3, "d")
    assert [(each.name, each.token_ids) for each in merge(c, d, name="e").meta.origin] == [
        ("a", [3, 5]),
        ("b", [7, 9]),
        ("d", [11]),
    ]


def test_the_head_s_rows_are_merged_too(model):
    a = make(model, [3, 5], 1, "a", side="input+output")
    ids = [5, 9]
    base = model.get_input_embeddings().weight.detach()[ids]
    rows = torch.stack([a.rows[1], base[1] + 1])
    b = Patch.from_model(model, ids, rows, name="b", side="input+output", output_rows=base - 1)
    # The embedding's row of token 5 is the same, the head's is not.
    assert [row.token_id for row in diff(a, b).changed] == [5]
    c = merge(a, b, name="c", policy="second")
    assert torch.equal(c.output_rows, torch.stack([a.rows[0], base[0] - 1, base[1] - 1]))
    assert torch.equal(c.rows, torch.stack([a.rows[0], a.rows[1], base[1] + 1]))


def test_what_cannot_be_one_patch_is_refused(model):
    a = make(model, [3], 1, "a")
    with pytest.raises(PatchError, match="different bases"):
        merge(a, make(tiny_llama(seed=1), [4], 1, "b"), name="c")
    with pytest.raises(PatchError, match=r"a has scope all, b has prompt"):
        merge(a, make(model, [4], 1, "b", scope="prompt"), name="c")
    with pytest.raises(PatchError, match="a has side input, b has input\\+output"):
        merge(a, make(model, [4], 1, "b", side="input+output"), name="c")
    with pytest.raises(PatchError, match="is not a patch name"):
        merge(a, make(model, [4], 1, "b"), name="../c")
    with pytest.raises(PatchError, match="origin does not name each token id once"):
        a.with_meta(origin=merge(make(model, [3], 1, "x"), make(model, [4], 1, "y"), name="z").meta.origin)


def test_the_command_line_compares_and_merges(model, tmp_path, tokenizer):
    spanish, french = (TemplateMeta(text=f"{{source}} in {name}:", chat=False) for name in ("Spanish", "French"))
    paths = [str(tmp_path / f"{name}.safetensors") for name in "abc"]
    make(model, [40, 50], 1, "a", tokenizer=tokenizer, template=spanish, language="es").save(paths[0])
    make(model, [50, 60], 2, "b", tokenizer=tokenizer, template=french, language="fr").save(paths[1])
    code, out, _ = run_cli("diff", *paths[:2], "--json")
    found = json.loads(out)
    assert (code, found["added"], found["removed"]) == (1, [60], [40])
    assert found["settings"]["template"][1] == "{source} in French:"
    code, out, _ = run_cli("diff", *paths[:2])
    assert "1 tokens only in" in out
    assert json.dumps(tokenizer.decode([50])) in out
    assert run_cli("diff", paths[0], paths[0])[0] == 0
    code, _, err = run_cli("merge", *paths[:2], "-o", paths[2])
    assert (code, "say whose rows to take" in err) == (1, True)
    code, out, err = run_cli("merge", *paths[:2], "-o", paths[2], "--on-conflict", "first")
    assert (code, err) == (0, "")
    assert "different prompt templates" in out
    merged = Patch.load(paths[2])
    assert (merged.meta.name, merged.meta.template, merged.meta.language) == ("c", None, None)
    assert merged.token_ids.tolist() == [40, 50, 60]
    assert run_cli("merge", *paths[:2], "-o", paths[2], "--on-conflict", "first")[0] == 2
    code, out, _ = run_cli("merge", *paths[:2], "-o", paths[2], "--on-conflict", "second", "--force", "--json")
    assert [each["rows"] for each in json.loads(out)["origin"]] == [1, 2]
    code, out, _ = run_cli("inspect", paths[2], "--json")
    assert [each["name"] for each in json.loads(out)["origin"]] == ["a", "b"]


def test_a_choice_of_licences_stays_one_beside_another(model):
    a, b = (
        Patch.from_model(model, [i], torch.randn(1, 32), name="x", licence=licence)
        for i, licence in ((3, "MIT OR Apache-2.0"), (5, "CC-BY-4.0"))
    )
    assert merge(a, b, name="both").meta.licence == "(MIT OR Apache-2.0) AND CC-BY-4.0"


def test_licences_of_many_are_one_conjunction(model):
    from ksl_patch.merge import merge_all

    several = ("MIT OR Apache-2.0", "CC-BY-4.0", "MIT OR Apache-2.0", "MIT", "CC-BY-4.0")
    patches = [
        Patch.from_model(model, [i], torch.randn(1, 32), name="x", licence=licence)
        for i, licence in enumerate(several, start=3)
    ]
    assert merge_all(patches, name="all").meta.licence == "(MIT OR Apache-2.0) AND CC-BY-4.0 AND MIT"
    assert merge(patches[0], patches[2], name="same").meta.licence == several[0]
