"""The patch file: what goes in comes out, and nothing damaged or hostile gets in."""

import dataclasses
import json
import os
import random

import pytest
import safetensors.torch
import torch
from conftest import tiny_llama

from ksl_patch import Patch
from ksl_patch.errors import PatchError
from ksl_patch.patch import TemplateMeta, TicketMeta, TrainingMeta


def make_patch(model=None, tokenizer=None, **changes):
    model = model or tiny_llama()
    g = torch.Generator().manual_seed(3)
    patch = Patch.from_model(
        model,
        [7, 3, 350],
        torch.randn(3, 32, generator=g),
        name="spanish",
        language="es",
        tokenizer=tokenizer,
        template=TemplateMeta(text="Say it in Spanish: {source}\n", chat=False),
        licence="CC-BY-4.0",
        created="2026-01-02T03:04:05Z",
    )
    ticket = TicketMeta(
        selection="ks", test="exact", alpha=0.05, top_k=None, statistic=[0.5, 1 / 3, 0.7], pvalue=[1e-300, 0.04, 1e-9]
    )
    training = TrainingMeta(
        mode="partial", steps=10, lr=1e-2, optimiser="AdamW", batch_size=8, seed=0, data_digest="0" * 64,
        pairs=100, embed_steps=10, embed_lr=1, embedding_scale=0.1,
    )  # fmt: skip
    return patch.with_meta(ticket=ticket, training=training, evaluation={"loss_base": 2.5, "pairs": 3}, **changes)


@pytest.fixture
def patch():
    return make_patch()


@pytest.fixture
def saved(patch, tmp_path):
    path = tmp_path / "es.safetensors"
    patch.save(path)
    return path


def rewrite(path, change):
    """Write the file again with its tensors and metadata changed, as another program might."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors, meta = safetensors.torch.load(content), json.loads(header["__metadata__"]["ksl_patch"])
    change(tensors, meta)
    path.write_bytes(safetensors.torch.save(tensors, metadata={"ksl_patch": json.dumps(meta)}))


def test_round_trip_is_exact(patch, saved, tokenizer):
    loaded = Patch.load(saved)
    assert loaded.token_ids.tolist() == [3, 7, 350]
    for name in ("token_ids", "rows", "base_rows"):
        assert torch.equal(getattr(loaded, name), getattr(patch, name))
    assert loaded.meta == patch.meta
    assert loaded.digest == patch.digest
    with_tokens = make_patch(tokenizer=tokenizer)
    assert with_tokens.meta.tokens == [tokenizer.decode([i]) for i in (3, 7, 350)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_take_the_dtype_of_the_base(dtype, tmp_path):
    model = tiny_llama(dtype=dtype)
    patch = make_patch(model)
    assert patch.rows.dtype == patch.base_rows.dtype == dtype
    assert torch.equal(patch.base_rows, model.get_input_embeddings().weight[[3, 7, 350]])
    patch.save(tmp_path / "p.safetensors")
    assert torch.equal(Patch.load(tmp_path / "p.safetensors").rows, patch.rows)


def test_the_same_patch_gives_the_same_bytes(patch, saved, tmp_path):
    for _ in range(3):
        make_patch().save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_digest_is_of_the_content_and_not_of_the_description(patch):
    assert patch.with_meta(name="other", language=None, licence=None, evaluation=None).digest == patch.digest
    assert patch.with_meta(scope="prompt").digest != patch.digest
    assert patch.with_meta(template=None).digest != patch.digest
    assert dataclasses.replace(patch, rows=patch.rows + 1).digest != patch.digest
    assert dataclasses.replace(patch, token_ids=torch.tensor([3, 7, 351])).digest != patch.digest


def test_output_rows_need_the_output_side(patch, tmp_path):
    with pytest.raises(PatchError, match="output_rows need side"):
        dataclasses.replace(patch, output_rows=patch.rows)
    both = dataclasses.replace(patch.with_meta(side="input+output"), output_rows=patch.rows * 2)
    both.save(tmp_path / "both.safetensors")
    assert torch.equal(Patch.load(tmp_path / "both.safetensors").output_rows, patch.rows * 2)
    dataclasses.replace(both, output_rows=both.rows).save(tmp_path / "same.safetensors")
    assert torch.equal(Patch.load(tmp_path / "same.safetensors").output_rows, patch.rows)
    with pytest.raises(PatchError, match="tied"):
        make_patch(tiny_llama(tied=False), side="input+output")
    with pytest.raises(PatchError, match="scope 'prompt' needs side 'input'"):
        patch.with_meta(side="input+output", scope="prompt")


def test_saving_leaves_the_old_file_or_the_new_one(patch, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(PatchError, match="cannot write"):
        patch.with_meta(name="other").save(saved)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


def test_every_flipped_byte_of_the_header_is_found(saved, patch):
    content = bytearray(saved.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for position in range(end):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        saved.write_bytes(damaged)
        try:
            loaded = Patch.load(saved)
        except PatchError:
            continue
        # 1e-9 and 1E-9 are one number.
        assert content[position : position + 1].lower() == damaged[position : position + 1].lower() == b"e"
        assert (loaded.meta, loaded.digest) == (patch.meta, patch.digest)


def test_flipped_bits_of_the_data_are_found(saved):
    content = saved.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    choose = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[choose.randrange(end, len(content))] ^= 1 << choose.randrange(8)
        saved.write_bytes(damaged)
        with pytest.raises(PatchError):
            Patch.load(saved)


def test_every_cut_is_found(saved):
    content = saved.read_bytes()
    for length in [*range(0, 64), *range(64, len(content), 37), len(content) - 1]:
        saved.write_bytes(content[:length])
        with pytest.raises(PatchError):
            Patch.load(saved)
    saved.write_bytes(content + b"\0")
    with pytest.raises(PatchError):
        Patch.load(saved)


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path


@pytest.mark.parametrize("swap", ["removed", None, 12345678901234567890, -1.5, "x", [], {}, True], ids=repr)
def test_every_metadata_field_swapped_or_removed_is_found(saved, patch, swap):
    content = saved.read_bytes()
    written = json.loads(
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["ksl_patch"]
    )
    for path in leaves(written["meta"]):

        def change(tensors, meta, path=path):
            inner = meta["meta"]
            for key in path[:-1]:
                inner = inner[key]
            if swap == "removed":
                del inner[path[-1]]
            elif inner[path[-1]] == swap:
                inner[path[-1]] = "another"
            else:
                inner[path[-1]] = swap

        saved.write_bytes(content)
        rewrite(saved, change)
        with pytest.raises(PatchError) as error:
            Patch.load(saved)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(format_version=2), "has patch format 2, and this ksl-patch reads format 1"),
        (lambda t, m: m.update(extra=1), "metadata is not valid"),
        (lambda t, m: t.update(extra=t["rows"].clone()), "has the tensors"),
        (lambda t, m: t.pop("rows"), "has the tensors"),
        (lambda t, m: t.update(token_ids=torch.tensor([3, 3, 350])), "token id 3 occurs twice"),
        (lambda t, m: t.update(token_ids=torch.tensor([7, 3, 350])), "ascending"),
        (lambda t, m: t.update(token_ids=torch.tensor([3, 7, 400])), "token id 400 is outside the table"),
        (lambda t, m: t.update(token_ids=torch.tensor([-1, 7, 300])), "token id -1 is outside the table"),
        (lambda t, m: t.update(token_ids=torch.tensor([3, 7, 350], dtype=torch.int32)), "token_ids must be int64"),
        (lambda t, m: t.update(token_ids=torch.zeros(0, dtype=torch.int64)), "token_ids is empty"),
        (lambda t, m: t.update(rows=t["rows"][:2].contiguous()), r"rows must have the shape \[3, 32\]"),
        (lambda t, m: t.update(rows=t["rows"].double()), "rows must be float32, bfloat16 or float16, not float64"),
        (lambda t, m: t.update(rows=t["rows"].half()), "rows must have the base's dtype float32, not float16"),
        (lambda t, m: t.update(rows=t["rows"] / 0), "rows has a NaN or an infinity at token 3"),
        (
            lambda t, m: t["base_rows"].__setitem__((1, 2), float("nan")),
            "base_rows has a NaN .* at token 7",
        ),
        (lambda t, m: t.update(rows=t["rows"] + 1), "does not match its checksum"),
        (lambda t, m: m["meta"].update(name="../../etc/passwd"), "is not a patch name"),
        (lambda t, m: m["meta"].update(language="Spanish!"), "is not a BCP 47 language tag"),
        (lambda t, m: m["meta"].update(side="output"), "metadata is not valid"),
        (lambda t, m: m["meta"]["template"].update(text="no slot"), r"must contain '\{source\}' exactly once"),
        (lambda t, m: m["meta"]["ticket"].update(pvalue=[0.1]), "has 1 values of pvalue for 3 token ids"),
    ],
)
def test_a_wrong_file_is_refused_with_one_clear_sentence(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(PatchError, match=message) as error:
        Patch.load(saved)
    assert str(error.value).startswith(f"{saved}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot hold the header"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "cannot hold the header"),
        ((2).to_bytes(8, "little") + b"{}", "not a patch"),
        ((2).to_bytes(8, "little") + b"[]", "not a patch"),
        ((5).to_bytes(8, "little") + b"nope!", "not JSON"),
        ((200000).to_bytes(8, "little") + b"[" * 200000, "not JSON"),
        ((17 << 20).to_bytes(8, "little") + b" " * (17 << 20), "larger than any patch's"),
    ],
)
def test_what_is_no_patch_is_refused(tmp_path, content, message):
    path = tmp_path / "p.safetensors"
    path.write_bytes(content)
    with pytest.raises(PatchError, match=message):
        Patch.load(path)


def test_a_header_that_lies_about_a_size_is_refused(saved):
    content = saved.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["rows"]["shape"] = [3_000_000_000, 32]
    header["rows"]["data_offsets"][1] = header["rows"]["data_offsets"][0] + 3_000_000_000 * 128
    text = json.dumps(header).encode()
    saved.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(PatchError, match="not a valid safetensors file"):
        Patch.load(saved)


def test_missing_files_folders_and_devices_are_refused(tmp_path):
    for path, message in [("none", "No such file"), (".", "not a regular file"), ("/dev/zero", "not a regular file")]:
        with pytest.raises(PatchError, match=message):
            Patch.load(tmp_path / path)
    with pytest.raises(PatchError, match="cannot read"):
        Patch.load("a\0b")


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([], torch.zeros(0, 32), "token_ids"),
        ([1, 1], torch.zeros(2, 32), "token id 1 occurs twice"),
        ([1, 400], torch.zeros(2, 32), "token id 400 is outside the table, which has the ids 0 to 399"),
        ([1, -1], torch.zeros(2, 32), "token id -1 is outside"),
        ([1.0, 2.0], torch.zeros(2, 32), "list of integers"),
        ([1, 2], torch.zeros(3, 32), "one row per token id"),
        ([1, 2], torch.zeros(2, 31), "shape"),
        ([1, 2], torch.full((2, 32), float("inf")), "infinity at token 1"),
    ],
)
def test_from_model_refuses_what_does_not_fit(model, ids, rows, message):
    with pytest.raises(PatchError, match=message):
        Patch.from_model(model, ids, rows, name="p")
