"""Patches written into a model of their own: its bits, what else its folder has, and what cannot be written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import run_cli, some, tiny_llama
from hub_server import Repo

from ksl_patch.base import find_embedding
from ksl_patch.data.templates import make_template
from ksl_patch.hf import attach, load_base
from ksl_patch.interop.checkpoint import ids_inside
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import Patch, TemplateMeta


@pytest.fixture(scope="module")
def folder(reserved_folder):
    return reserved_folder


def exported(tmp_path, folder, *patches, **options):
    files = []
    tmp_path.mkdir(exist_ok=True)
    for patch in patches:
        patch.save(tmp_path / f"{patch.meta.name}.safetensors")
        files.append(tmp_path / f"{patch.meta.name}.safetensors")
    more = [text for key, value in options.items() for text in (f"--{key}", value)]
    return run_cli("export", *files, "--format", "model", "--base", folder, "-o", tmp_path / "model", *more)


@pytest.mark.parametrize("side", ["input", "input+output"])
def test_a_model_with_patches_in_it_gives_their_bits_and_the_base_s(tmp_path, folder, side):
    a, b = some(folder, "es", [400, 402, 30], side=side, language="es"), some(folder, "fra", [404, 31], side=side)
    code, out, err = exported(tmp_path, folder, a, b, shard="20KB")
    assert code == 0, err
    plain, _ = load_base(str(tmp_path / "model"), device="cpu")
    base, _ = load_base(str(folder), device="cpu")
    assert plain.config.tie_word_embeddings is (side == "input+output")
    assert ("has a table of its own" in out) == (side == "input")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    both = torch.tensor([[0, 30, 31, 400, 404, 402, 7, 415]])
    with torch.no_grad(), attach(base) as handle:
        from ksl_patch.merge import merge

        with handle.serving(handle.bank.add(slot_rows(merge(a, b, name="both")))):
            wanted = base(both).logits
        if side == "input":
            assert torch.equal(plain(both).logits, wanted)
        else:  # one product over all rows of the head, and one over the patch's: they round otherwise
            torch.testing.assert_close(plain(both).logits, wanted)
        for patch, ids in ((a, [0, 30, 400, 402, 9, 12]), (b, [0, 31, 404, 9])):
            with handle.serving(handle.bank.add(slot_rows(patch))):
                same = torch.allclose(plain(torch.tensor([ids])).logits, base(torch.tensor([ids])).logits)
            assert same == (side == "input")  # rows of the head are everybody's
    card = (tmp_path / "model" / "README.md").read_text()
    assert a.digest in card
    assert b.digest in card
    listed = json.loads((tmp_path / "model" / "ksl_patch.json").read_text())["patches"]
    assert [each["digest"] for each in listed] == [a.digest, b.digest]


def test_a_model_of_an_untied_base_and_rows_of_a_head_apart(tmp_path, folder):
    untied = tmp_path / "untied"
    tiny_llama(tied=False, vocab_size=416).save_pretrained(untied)
    load_base(str(folder), device="cpu")[1].save_pretrained(untied)
    code, out, err = exported(tmp_path, untied, some(untied, "es", [400]))
    assert (code, "table of its own" in out) == (0, False), err
    plain, base = (load_base(str(each), device="cpu")[0] for each in (tmp_path / "model", untied))
    assert torch.equal(plain.lm_head.weight, base.lm_head.weight)
    (tmp_path / "apart").mkdir()
    head = torch.randn(1, 32)
    apart = some(folder, "es", [400], side="input+output", output_rows=head)
    code, _, err = exported(tmp_path / "apart", folder, apart)
    plain = load_base(str(tmp_path / "apart" / "model"), device="cpu")[0]
    assert (code, plain.config.tie_word_embeddings) == (0, False), err
    assert torch.equal(plain.lm_head.weight[400], head[0])
    assert torch.equal(plain.get_input_embeddings().weight[400], apart.rows[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen3", "gemma", "gemma3_text", "mistral"])
def test_any_architecture_s_checkpoint_has_the_patch_s_bits(tmp_path, reserved_tokenizer, kind, tied):
    from test_hf import small, some_patch

    from ksl_patch.interop.checkpoint import write_checkpoint

    model = small(kind)
    if find_embedding(model).tied != tied:
        model.config.tie_word_embeddings = tied
        model = type(model)(model.config).eval()
    patch, ids = some_patch(model, 1), torch.tensor([[5, 9, 300, 17]])
    with torch.no_grad():
        with attach(model) as handle, handle.serving(handle.bank.add(slot_rows(patch))):
            wanted = model(ids).logits
        written = write_checkpoint(model, reserved_tokenizer, patch, [patch], tmp_path / "m", base="x")
        assert (written.untied, written.lost) == (tied, 0)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
        assert torch.equal(again(ids).logits, wanted)


def test_what_a_head_shares_beside_its_table_is_written_too(tmp_path, reserved_tokenizer):
    """BERT's classes tie the head's bias, too, and loading says of a missing one that it is new."""
    from ksl_patch.interop.checkpoint import write_checkpoint

    config = transformers.BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        is_decoder=True,
    )  # fmt: skip
    model = transformers.BertLMHeadModel(config).eval()
    model.get_output_embeddings().bias.data.normal_()
    rows = torch.randn(1, 32)
    patch, ids = Patch.from_model(model, [5], rows, name="a"), torch.tensor([[5, 9, 300]])
    with torch.no_grad():
        with attach(model) as handle, handle.serving(handle.bank.add(slot_rows(patch))):
            wanted = model(ids).logits
        assert write_checkpoint(model, reserved_tokenizer, patch, [patch], tmp_path / "m", base="x")[0]
        again, found = transformers.BertLMHeadModel.from_pretrained(tmp_path / "m", output_loading_info=True)
        assert not found["missing_keys"]
        torch.testing.assert_close(again.eval()(ids).logits, wanted)


def test_a_head_with_other_rows_is_not_overwritten(tmp_path, folder):
    both = some(folder, "a", [400], side="input+output")
    other = tmp_path / "other"
    model, tokenizer = load_base(str(folder), device="cpu")
    untied = tiny_llama(tied=False, vocab_size=416)
    untied.get_input_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    untied.save_pretrained(other)
    tokenizer.save_pretrained(other)
    code, _, err = exported(tmp_path, other, both)
    assert (code, "this model's head has other rows" in err) == (1, True)


def test_rows_of_another_dtype_are_rounded_as_when_they_are_served(tmp_path, folder):
    patch, half = some(folder, "a", [400]), tmp_path / "half"
    model, tokenizer = load_base(str(folder), device="cpu")
    model.to(torch.bfloat16).save_pretrained(half)
    tokenizer.save_pretrained(half)
    code, _, err = exported(tmp_path, half, patch)
    assert code == 0, err
    written = load_base(str(tmp_path / "model"), device="cpu")[0].get_input_embeddings().weight[400]
    assert torch.equal(written, patch.rows[0].to(torch.bfloat16))


def test_licences_and_what_prepares_pictures_go_along(tmp_path, folder):
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    for name in ("LICENSE", "Gemma_terms.txt", "terms.safetensors", "processor_config.json", "other.txt"):
        (base / name).write_text("{}")
    assert exported(tmp_path, base, some(folder, "a", [400]))[0] == 0
    found = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"LICENSE", "Gemma_terms.txt", "processor_config.json"} <= found
    assert not {"terms.safetensors", "other.txt"} & found


def test_a_part_of_a_model_is_not_written_as_the_whole(tmp_path, folder):
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaWithEyes"]}))
    code, _, err = exported(tmp_path, base, some(folder, "a", [400]))
    assert (code, "the base is a LlamaWithEyes" in err) == (1, True)


def test_a_card_shows_hostile_words_as_words(tmp_path, folder):
    patch = some(folder, "a", [400], licence="x\n---\n<script>alert(1)</script>\n# h")
    template = make_template("{source}\r# a\n```\n", source_language="en", language="es", tokenizer=None)
    assert exported(tmp_path, folder, patch.with_meta(template=template))[0] == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "<script>" not in card
    assert "\n---\n<" not in card
    assert "\r" not in card
    assert json.dumps(template.text) in card
    listed = json.loads((tmp_path / "model" / "ksl_patch.json").read_text())["patches"][0]
    assert listed["template"]["text"] == template.text
    assert listed["template"]["chat"] is False


@pytest.mark.parametrize(
    ("patches", "sentence"),
    [([{"name": "a", "ids": [400]}, {"name": "bb", "ids": [400]}], "change 1 of the same tokens"),
     ([{"name": "a", "ids": [400], "scope": "prompt"}], "a plain model has its rows in answers too")],
)  # fmt: skip
def test_what_no_model_can_hold_leaves_no_folder(tmp_path, folder, patches, sentence):
    code, _, err = exported(tmp_path, folder, *(some(folder, **each) for each in patches))
    assert (code, sentence in err) == (1, True)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_disk_that_is_full_leaves_no_folder(tmp_path, folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = exported(tmp_path, folder, some(folder, "a", [400]))
    assert (code, "No space left" in err) == (1, True)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(("--shard", "much"), "--shard is a size"), (("--shard", "0MB"), "--shard is a size")],
)
def test_a_shard_is_a_size(tmp_path, folder, arguments, sentence):
    some(folder, "a", [400]).save(tmp_path / "a.safetensors")
    code, _, err = run_cli(
        "export", tmp_path / "a.safetensors", "--format", "model", "--base", folder, "-o", tmp_path / "m", *arguments
    )
    assert (code, sentence in err) == (2, True)


def test_the_card_says_how_a_chat_s_prompt_is_read_and_what_names_none(tmp_path, folder):
    from ksl_patch.interop.model_card import card
    from ksl_patch.merge import merge

    chat = make_template("chat", source_language="en", language="es", tokenizer=load_base(str(folder))[1])
    a, b = some(folder, "es", [400], template=chat), some(folder, "fra", [404])
    text = card([a, merge(a, b, name="both")], "base", rows=2, untied=True)
    assert "tokenise it with `add_special_tokens=False`" in text
    assert text.count("```json") == 1
    assert "It names no prompt: it was merged from es, fra, whose prompts it answers." in text


def test_an_adapter_holds_one_patch(tmp_path, folder):
    some(folder, "a", [400]).save(tmp_path / "a.safetensors")
    file = tmp_path / "a.safetensors"
    code, _, err = run_cli("export", file, file, "--format", "lora", "--base", folder, "-o", tmp_path / "m")
    assert (code, "an adapter holds one patch" in err) == (2, True)


def test_reserved_tokens_of_patches_inside_are_left_alone(tmp_path, folder, pairs_file):
    from ksl_patch.train.build import Build
    from ksl_patch.train.config import BuildConfig
    from ksl_patch.train.progress import SilentReporter

    assert exported(tmp_path, folder, some(folder, "es", [400, 404]))[0] == 0
    settings = {
        "base": str(tmp_path / "model"), "pairs": str(pairs_file), "language": "fr", "name": "fr", "alpha": None,
        "top_k": 3, "selection": "reserved",
    }  # fmt: skip
    build = Build(BuildConfig(**settings), tmp_path / "run", SilentReporter())
    assert build.reserved_ids == [402, 405, 406]
    # Its configuration says which they are: a list that was not downloaded, or is broken, changes nothing.
    (tmp_path / "model" / "ksl_patch.json").unlink()
    build = Build(BuildConfig(**settings), tmp_path / "run", SilentReporter())
    assert build.reserved_ids == [402, 405, 406]


def test_a_model_made_of_one_with_patches_has_all_of_them(tmp_path, folder):
    template = TemplateMeta(text="<|reserved_special_token_0|>{source} =", chat=False)
    first = some(folder, "es", [400, 404], language="es", template=template)
    assert exported(tmp_path / "1", folder, first)[0] == 0
    one = tmp_path / "1/model"
    second = some(one, "fra", [402], language="fr")
    assert exported(tmp_path / "2", one, second)[0] == 0
    two = tmp_path / "2/model"
    listed = json.loads((two / "ksl_patch.json").read_bytes())["patches"]
    assert [(each["name"], each["digest"]) for each in listed] == [("es", first.digest), ("fra", second.digest)]
    card = (two / "README.md").read_text()
    assert "had 1 of the patches below already" in card
    assert json.dumps(template.text) in card
    model = load_base(str(two), device="cpu")[0]
    assert ids_inside(model) == {400, 402, 404}
    assert torch.equal(find_embedding(model).weight[[400, 404]], first.rows)
    # None of theirs may be overwritten, and a list that does not hold is no list.
    code, _, err = exported(tmp_path / "3", two, some(two, "italian", [404, 405]))
    assert (code, "token 404 is one of theirs, so its row would be lost" in err) == (1, True)
    patch = some(two, "italian", [405])
    for broken in (b"[" * 10**6, b"{}", b'{"patches": [{"token_ids": ["x"]}]}', b'{"patches": []}', None):
        if broken is None:
            (two / "ksl_patch.json").unlink()
        else:
            (two / "ksl_patch.json").write_bytes(broken)
        code, _, err = exported(tmp_path / "4", two, patch)
        assert (code, "its ksl_patch.json does not say which" in err) == (1, True)


def test_the_card_names_the_weights_that_are_in_the_model(tmp_path, folder):
    tuned, patch = tmp_path / "tuned", some(folder, "es", [400])
    shutil.copytree(folder, tuned)
    model = load_base(str(folder), device="cpu")[0]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(tuned)
    assert exported(tmp_path / "1", tuned, patch)[0] == 0
    card = (tmp_path / "1/model/README.md").read_text()
    assert "base_model: tuned" in card
    assert "# tuned with 1 embedding patch" in card
    assert "were made for another model with the same rows" in card
    assert exported(tmp_path / "2", folder, patch)[0] == 0
    assert f"base_model: {folder.name}" in (tmp_path / "2/model/README.md").read_text()


def test_rows_of_texts_beside_others_are_said(tmp_path, folder):
    code, out, _ = exported(tmp_path / "1", folder, some(folder, "es", [400]), some(folder, "fra", [404, 31]))
    said = "Rows of fra are of tokens that texts have: they act in the prompts of the other patches here too."
    assert (code, said in out) == (0, True), out
    assert said in (tmp_path / "1/model/README.md").read_text()
    code, out, _ = exported(tmp_path / "2", folder, some(folder, "es", [400]), some(folder, "fra", [404]))
    assert (code, "tokens that texts have" in out) == (0, False)


@pytest.mark.parametrize("output", ["a/" + "b" * 300, "file/model"])
def test_a_folder_that_cannot_be_is_said_before_the_work(tmp_path, folder, monkeypatch, output):
    (tmp_path / "file").touch()
    some(folder, "es", [400]).save(tmp_path / "es.safetensors")
    monkeypatch.setattr("ksl_patch.hf.load_base", lambda *_, **__: pytest.fail("loaded"))
    code, _, err = run_cli(
        "export", tmp_path / "es.safetensors", "--format", "model", "--base", folder, "-o", f"{tmp_path}/{output}"
    )
    assert (code, err.count("\n") <= 3) == (1, True), err
    assert {path.name for path in tmp_path.iterdir()} == {"file", "es.safetensors"}


def test_the_folder_may_be_where_one_stands_or_a_link(tmp_path, folder, monkeypatch):
    some(folder, "es", [400]).save(tmp_path / "es.safetensors")
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    for output in (".", tmp_path / "link"):
        code, _, err = run_cli(
            "export", tmp_path / "es.safetensors", "--format", "model", "--base", folder, "-o", output
        )
        assert code == 0, err
    found = {name: sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("here", "there")}
    assert found["here"] == found["there"]
    assert "model.safetensors" in found["here"]
    assert (tmp_path / "link").is_symlink()


def test_an_interrupt_leaves_nothing(tmp_path, folder, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ksl_patch.interop.checkpoint._check", interrupt)
    (tmp_path / "a").mkdir()
    some(folder, "es", [400]).save(tmp_path / "es.safetensors")
    code, _, _ = run_cli(
        "export", tmp_path / "es.safetensors", "--format", "model", "--base", folder, "-o", tmp_path / "a/b/c/model"
    )
    assert code == 130
    assert list((tmp_path / "a").iterdir()) == []


def test_what_a_class_has_no_place_for_is_said(tmp_path, folder):
    from safetensors.torch import load_file, save_file

    more = tmp_path / "more"
    shutil.copytree(folder, more)
    weights = load_file(more / "model.safetensors")
    save_file(weights | {"mtp.layers.0.weight": torch.zeros(1000, 7)}, more / "model.safetensors", {"format": "pt"})
    code, out, err = exported(tmp_path, more, some(folder, "es", [400]))
    assert (code, "7,000 values of the base's files are not here" in out) == (0, True), err
    assert "7,000 values" in (tmp_path / "model" / "README.md").read_text()
    (tmp_path / "whole").mkdir()
    assert "values of the base" not in exported(tmp_path / "whole", folder, some(folder, "es", [400]))[1]


def test_a_base_on_the_hub_has_its_licence_copied_too(tmp_path, folder, hub):
    repo = hub.repos["org/base"] = Repo()
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    repo.commit(files | {"LICENSE": b"as it is", "NOTICE.txt": b"noticed", "notes.txt": b"no"})
    code, _, err = exported(tmp_path, "org/base", some(folder, "es", [400]))
    assert code == 0, err
    assert (tmp_path / "model" / "LICENSE").read_bytes() == b"as it is"
    assert (tmp_path / "model" / "NOTICE.txt").is_file()
    assert not (tmp_path / "model" / "notes.txt").exists()


def test_a_conflict_among_several_names_the_two(tmp_path, folder):
    patches = [some(folder, name, ids) for name, ids in (("es", [400]), ("french", [402]), ("de1", [404, 402]))]
    code, _, err = exported(tmp_path, folder, *patches)
    assert code == 1
    assert "french and de1 change 1 of the same tokens in another way (402)" in " ".join(err.split())
