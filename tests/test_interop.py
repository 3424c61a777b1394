"""Patches and PEFT's adapters, both ways, with the real PEFT: the same logits."""

import copy
import json

import pytest
import torch
import transformers
from conftest import run_cli, tiny_llama
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from test_hf import overwritten, some_patch

from ksl_patch import Patch, attach
from ksl_patch.errors import BaseMismatchError, PatchError
from ksl_patch.interop import peft

IDS = [3, 17, 40, 250, 399]
PROMPT = torch.tensor([[5, 3, 17, 250, 40, 9, 399]])


def adapter(model, config, folder, seed=0):
    torch.manual_seed(seed)
    tuned = get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_(0, 0.3)
    tuned.save_pretrained(folder)
    return tuned


def both_sides(model):
    g = torch.Generator().manual_seed(0)
    return Patch.from_model(model, IDS, torch.randn(len(IDS), 32, generator=g), name="both", side="input+output")


@torch.no_grad()
def logits(model):
    return model(input_ids=PROMPT).logits


@pytest.mark.parametrize("tied", [True, False])
def test_an_imported_adapter_gives_peft_s_own_logits(tmp_path, tied):
    model = tiny_llama(tied)
    tuned = adapter(model, TrainableTokensConfig(token_indices=[40, 3, 17], target_modules=["embed_tokens"]), tmp_path)
    patch, more = peft.import_adapter(tmp_path, model, name="es", language="es")
    assert not more
    assert patch.token_ids.tolist() == [3, 17, 40]
    assert patch.meta.side == ("input+output" if tied else "input")
    with attach(model) as handle, handle.using(handle.load(patch)):
        found = logits(model)
    torch.testing.assert_close(found, logits(tuned), rtol=0, atol=0 if not tied else 1e-5)
    assert not torch.equal(found, logits(model))


def test_an_import_keeps_its_template_and_names_another_base(tmp_path, base_folder, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    config = TrainableTokensConfig(token_indices=[40, 3, 17], target_modules=["embed_tokens"])
    adapter(model, config, tmp_path / "tt")
    common = ["import", tmp_path / "tt", "--base", base_folder, "-o", tmp_path / "p.safetensors", "--force"]
    code, _, err = run_cli(*common)
    assert code == 0
    assert "it names no prompt template" in err
    code, _, err = run_cli(*common, "--language", "sw", "--template", "plain", "--base-model", "org/tiny")
    assert code == 0
    meta = Patch.load(tmp_path / "p.safetensors").meta
    assert meta.template.text.startswith("Translate this sentence from English to Swahili.\nEnglish: {source}")
    assert (meta.language, meta.base.model_id) == ("sw", "org/tiny")
    assert run_cli(*common, "--template", "{source} =>")[0] == 0
    assert Patch.load(tmp_path / "p.safetensors").meta.template.text == "{source} =>"
    for more, sentence in (
        (["--template", "plain"], "give --language"),
        (["--system", "x"], "--system is of --template chat"),
        (["--template", "x"], "'{source}' exactly once"),
        (["--base-model", "x"], "not a model's id"),
    ):
        code, _, err = run_cli(*common, *more)
        assert code
        assert sentence in err
    for other in (tiny_llama(hidden_size=48), tiny_llama(vocab_size=20)):
        with pytest.raises(BaseMismatchError, match="it was trained on another base"):
            peft.import_adapter(tmp_path / "tt", other, name="x")


def test_trained_positions_are_not_taken_for_tokens(tmp_path):
    """GPT-2 has a table of positions beside that of tokens."""
    sizes = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for target in ("wpe", "wte"):
        adapter(model, TrainableTokensConfig(token_indices=[3, 17], target_modules=[target]), tmp_path / target)
    with pytest.raises(PatchError, match="those of the input embedding wte are needed"):
        peft.import_adapter(tmp_path / "wpe", model, name="x")
    assert peft.import_adapter(tmp_path / "wte", model, name="x")[0].token_ids.tolist() == [3, 17]


def test_what_a_lora_adapter_has_besides_is_said(tmp_path):
    model = tiny_llama(False)
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[40, 3])
    adapter(model, config, tmp_path)
    patch, more = peft.import_adapter(tmp_path, model, name="es")
    assert more
    assert patch.token_ids.tolist() == [3, 40]


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_patch_gives_its_own_logits_in_peft_and_comes_back(tmp_path, tied):
    model = tiny_llama(tied)
    patch = both_sides(model) if tied else some_patch(model, 1, IDS)
    peft.export_trainable_tokens(patch, tmp_path, peft.module_names(model))
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(overwritten(model, patch)), rtol=0, atol=0)
    back, more = peft.import_adapter(tmp_path, model, name=patch.meta.name)
    assert not more
    assert back.digest == patch.digest


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patch_as_a_lora_of_the_embedding(tmp_path, tied, dtype):
    model = tiny_llama(tied, dtype=dtype)
    patch = some_patch(model, 1, IDS)
    peft.export_lora(patch, tmp_path, peft.module_names(model))
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 8, ["embed_tokens"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits(loaded), logits(overwritten(model, patch)), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(logits(loaded), logits(model), rtol=tolerance, atol=tolerance)


def test_what_an_adapter_cannot_hold_is_refused(tmp_path):
    tied, names = tiny_llama(), peft.ModuleNames("model.embed_tokens", "lm_head")
    zeros = torch.zeros(1, 32)
    refused = [
        (peft.export_trainable_tokens, some_patch(tied, 1, IDS), "would change the tied head too"),
        (peft.export_lora, both_sides(tied), "changes the head too"),
        (peft.export_lora, some_patch(tiny_llama(vocab_size=600), 1, list(range(520))), "has 520 rows"),
        (peft.export_lora, Patch.from_model(tied, [5], zeros, name="x", scope="prompt"), "prompt only"),
        (
            peft.export_trainable_tokens,
            Patch.from_model(tied, [5], zeros, name="x", side="input+output", output_rows=zeros + 1),
            "rows of their own for the head",
        ),
    ]
    for export, patch, why in refused:
        with pytest.raises(PatchError, match=why):
            export(patch, tmp_path / "x", names)
    assert not (tmp_path / "x").exists()
    untied = tiny_llama(False)
    indices = {"embed_tokens": [9, 5], "lm_head": [9, 5]}
    adapter(untied, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices), tmp_path)
    with pytest.raises(PatchError, match="changes the head of a base whose head is not tied"):
        peft.import_adapter(tmp_path, untied, name="x")


def test_the_commands(base_folder, tmp_path):
    model = tiny_llama()
    adapter(model, TrainableTokensConfig(token_indices=IDS, target_modules=["embed_tokens"]), tmp_path / "tt")
    patch = tmp_path / "es.safetensors"
    code, out, err = run_cli(
        "import", tmp_path / "tt", "--base", base_folder, "-o", patch, "--language", "es", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["rows"] == len(IDS)
    assert run_cli("import", tmp_path / "tt", "--base", base_folder, "-o", patch)[0] == 2
    out_folder = tmp_path / "out"
    command = ("export", patch, "--base", base_folder, "-o", out_folder)
    code, out, err = run_cli(*command, "--format", "trainable-tokens", "--json")
    assert (code, json.loads(out)["format"]) == (0, "trainable-tokens")
    assert peft.read_trainable_tokens(out_folder, tied=True).token_ids.tolist() == IDS
    code, out, err = run_cli(*command, "--format", "lora")
    assert (code, "not an empty folder" in err) == (1, True)
    small = tmp_path / "small.safetensors"
    some_patch(transformers.AutoModelForCausalLM.from_pretrained(base_folder), 1, IDS[:3]).save(small)
    code, out, err = run_cli("export", small, "--base", base_folder, "-o", tmp_path / "lora", "--format", "lora")
    assert code == 0
    assert "Writing 0.0 MB: a LoRA of the embedding has a column for each of the base's 400 tokens" in err
    code, out, err = run_cli("import", tmp_path, "--base", base_folder, "-o", tmp_path / "x.safetensors")
    assert code == 1
    assert "cannot read" in err
