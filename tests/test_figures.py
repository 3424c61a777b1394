"""A figure is what its label says: which base, which body, which pairs were read, by how many processes."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import PAIRS, run_cli, tiny_llama
from rich.console import Console
from test_build import FAST, Recorder, command, start

from ksl_patch import Patch, attach
from ksl_patch.base import identify
from ksl_patch.base.identity import has_other_weights
from ksl_patch.base.model_digests import body_digest, model_digest
from ksl_patch.cli.build import named_rows
from ksl_patch.cli.eval import table
from ksl_patch.data.columns import Columns
from ksl_patch.data.encoding import Example, encode, token_counts
from ksl_patch.data.pairs import Pair
from ksl_patch.data.reading import read_pairs
from ksl_patch.data.sketch import seen, sketch
from ksl_patch.data.split import reading_order, split_pairs
from ksl_patch.data.templates import make_template
from ksl_patch.errors import DataError, KslPatchError, OtherBodyWarning, RunError, TicketError
from ksl_patch.evidence.evaluate import encode_test
from ksl_patch.evidence.outputs import token_limit
from ksl_patch.evidence.scorer import Scorer
from ksl_patch.evidence.systems import make_systems
from ksl_patch.overlay import slot_rows
from ksl_patch.patch.evaluation import Evaluation, read
from ksl_patch.patch.wording import against, from_base, of_seeds
from ksl_patch.store.card import make_card
from ksl_patch.ticket import given_ticket
from ksl_patch.train import loaded as loaded_module
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.loss import answer_losses, token_loss
from ksl_patch.train.progress import SilentReporter
from ksl_patch.train.reopen import reopen


@pytest.fixture
def config(base_folder, pairs_file):
    return BuildConfig(
        base=str(base_folder), pairs=str(pairs_file), language="es", name="es", **FAST | {"top_k": 6, "alpha": None}
    )


def finetuned(base_folder, target, change=0.05):
    """The base with its own embedding and another body, as a fine-tune or a merged LoRA leaves it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight += change * torch.randn(layer.mlp.up_proj.weight.shape)
    shutil.copytree(base_folder, target)
    model.save_pretrained(target)
    return target


# Which base


def test_a_body_is_known_by_its_weights_whatever_the_dtype_they_are_loaded_in():
    model = tiny_llama(dtype=torch.bfloat16)
    identity = identify(model)
    assert not has_other_weights(identity, tiny_llama(dtype=torch.bfloat16).float())
    other = tiny_llama(dtype=torch.bfloat16)
    other.model.layers[1].mlp.down_proj.weight.data *= 1.05
    assert has_other_weights(identity, other)
    assert has_other_weights(identity, other.float())
    # A coarser dtype than the patch's base cannot tell, so nothing is said.
    assert not has_other_weights(identify(tiny_llama()), tiny_llama(dtype=torch.bfloat16))
    assert not has_other_weights(dataclasses.replace(identity, body=None), other)
    assert body_digest(model.to("meta"), torch.bfloat16) is None


@pytest.mark.parametrize("change", ["head", "order", "other rows", "buffer"])
def test_other_weights_are_seen_wherever_they_are(change):
    def made():
        model = tiny_llama(tied=False)
        model.model.register_buffer("bias", torch.ones(3))
        return model

    model = made()
    identity = identify(made())
    if change == "head":
        model.lm_head.weight.data *= 2
    elif change == "order":
        layers = model.model.layers
        layers[0], layers[1] = layers[1], layers[0]
    elif change == "buffer":
        model.model.bias += 1
    else:
        model.model.embed_tokens.weight.data[::2] += 1
    assert has_other_weights(identity, model)
    assert not has_other_weights(identity, made())


def test_wrappers_and_copies_are_no_other_weights():
    model = tiny_llama()
    identity = identify(model)
    assert not has_other_weights(identity, torch.compile(model))
    assert not has_other_weights(identity, model.model)
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert not has_other_weights(identity, model)
    untied = tiny_llama()
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    assert not has_other_weights(identity, untied)
    assert not has_other_weights(identify(tiny_llama(tied=False)), tiny_llama(tied=False).model)
    packed = tiny_llama()
    packed.model.layers[0].mlp.register_buffer("qweight", torch.ones(4, 4, dtype=torch.int32))
    assert not has_other_weights(identity, packed)


def test_a_tokenizer_that_cuts_joins_or_ends_otherwise_names_another_model(tokenizer):
    import copy

    from tokenizers import decoders, normalizers

    digest = model_digest(tiny_llama(), tokenizer)
    tokenizer("a b", truncation=True, max_length=1)  # leaves its settings behind
    assert model_digest(tiny_llama(), tokenizer) == digest
    for change in (
        lambda t: setattr(t, "eos_token", "<s>"),
        lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase()),
        lambda t: setattr(t.backend_tokenizer, "decoder", decoders.Fuse()),
    ):
        other = copy.deepcopy(tokenizer)
        change(other)
        assert model_digest(tiny_llama(), other) != digest
    model = tiny_llama()
    model.generation_config.suppress_tokens = [5]
    assert model_digest(model, tokenizer) != digest


@pytest.mark.slow
def test_a_base_with_an_adapter_has_one_name_in_every_process(base_folder, tmp_path):
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    settings = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"], lora_alpha=4)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path)
    shutil.copy(base_folder / "tokenizer.json", tmp_path)
    shutil.copy(base_folder / "tokenizer_config.json", tmp_path)
    script = (
        "import sys; from ksl_patch.hf import load_base; from ksl_patch.base.model_digests import model_digest; "
        "print(model_digest(*load_base(sys.argv[1])))"
    )

    def name(seed):
        environment = os.environ | {"PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", script, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    first = name(1)
    assert name(2) == first
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 64}))
    assert name(1) != first


def test_every_row_of_the_table_and_the_configuration_name_a_model(tokenizer):
    digest = model_digest(tiny_llama(vocab_size=6000), tokenizer)
    assert model_digest(tiny_llama(vocab_size=6000), tokenizer) == digest
    model = tiny_llama(vocab_size=6000)
    model.get_input_embeddings().weight.data[1234, 5] += 1e-3  # between the rows of the fingerprint
    assert identify(model).fingerprint == identify(tiny_llama(vocab_size=6000)).fingerprint
    assert model_digest(model, tokenizer) != digest
    model = tiny_llama(vocab_size=6000)
    model.config.rope_parameters["rope_theta"] *= 2
    assert model_digest(model, tokenizer) != digest
    model = tiny_llama(vocab_size=6000)
    model.generation_config.eos_token_id = [1, 7]
    assert model_digest(model, tokenizer) != digest


@pytest.mark.slow
def test_a_fine_tune_with_the_same_embedding_gets_its_own_training_and_outputs(config, base_folder, tmp_path):
    run, tuned = tmp_path / "run", finetuned(base_folder, tmp_path / "tuned")
    patch = Build(config, run, SilentReporter()).patch()
    reporter = Recorder()
    other = Build(dataclasses.replace(config, base=str(tuned)), run, reporter)
    found = other.patch()
    assert reporter.begun == ["embedding tuning", "partial tuning"]
    assert found.meta.base.fingerprint == patch.meta.base.fingerprint
    assert found.meta.base.body != patch.meta.base.body
    alone = Build(dataclasses.replace(config, base=str(tuned)), tmp_path / "own", SilentReporter()).patch()
    assert torch.equal(found.rows, alone.rows)
    # The base's own figures in one run folder are each base's own.
    for each, base in ((patch, base_folder), (found, tuned)):
        path = tmp_path / "p.safetensors"
        each.save(path)
        code, out, err = run_cli(
            "eval", path, "--run", run, "--controls", "none", "--max-new-tokens", "4", "--no-save", "--json"
        )
        assert code == 0, err
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        assert json.loads(out)["loss_base"] == pytest.approx(token_loss(model, other.held_out.examples), rel=1e-5)

    # On the other body the patch works, and says that it was not measured there.
    model = transformers.AutoModelForCausalLM.from_pretrained(tuned)
    with pytest.warns(OtherBodyWarning, match="what was measured of it need not hold here"):
        patch.check(model)
    with attach(model) as handle, pytest.warns(OtherBodyWarning):
        handle.load(patch, "es")
    with pytest.raises(RunError, match=r"other weights beside them.*--alone"):
        reopen(patch, run, base=str(tuned))
    patch.save(path)
    code, _, err = run_cli("generate", "--base", tuned, "--patch", path, "--apply-template", "--prompt", "a")
    assert code == 0
    said = [line[:33] for line in err.splitlines() if not line.startswith("Loading ")]
    assert said == ["Warning: es was made for another "]


@pytest.mark.slow
def test_the_patch_alone_is_measured_on_another_base_where_that_is_asked_for(config, base_folder, tmp_path):
    path, tuned = tmp_path / "es.safetensors", finetuned(base_folder, tmp_path / "tuned")
    Build(config, tmp_path / "es.safetensors.run", SilentReporter()).patch().save(path)
    test = tmp_path / "new.tsv"
    test.write_text("The bird sees the moon.\tEl ave ve la luna.\nThe bird has bread.\tEl ave tiene pan.\n")
    arguments = ("eval", path, "--base", tuned, "--test", test, "--max-new-tokens", "4", "--no-save", "--json")
    assert run_cli(*arguments)[0] == 1
    code, out, err = run_cli(*arguments, "--alone")
    assert (code, "Warning: es was made for another model" in err) == (0, True)
    assert [system["name"] for system in json.loads(out)["systems"]] == ["base", "patch", "noise"]
    assert run_cli("eval", path, "--alone")[0] == 2
    assert run_cli("certify", path, "--alone", "--base", tuned, "--test", test)[0] == 2


# Who trained it, on what


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_are_two_and_are_recorded(base_folder, pairs_file, tmp_path):
    output = tmp_path / "ddp.safetensors"
    arguments = command(base_folder, pairs_file, output)[1:]
    process = start([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *arguments])
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    events = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [e["event"] for e in events].count("patch") == 1
    [begin] = [e for e in events if e["event"] == "start"]
    assert begin["processes"] == 2
    patch = Patch.load(output)
    training = patch.meta.training
    assert (training.processes, training.batch_size, training.pairs_read) == (2, 16, 8 * 16)
    assert patch.meta.evaluation["loss_patch"] < patch.meta.evaluation["loss_base"]

    # One process with the same batch in its step reads the same pairs; one with half of it is another training.
    run = tmp_path / "ddp.safetensors.work"
    reopened = reopen(patch, run)
    assert reopened.config.accumulate == 2
    assert reopened.is_embedding_tuned
    assert reopened.ticket().token_ids.tolist() == patch.token_ids.tolist()
    single = Build(dataclasses.replace(reopened.config, accumulate=1), run, SilentReporter())
    assert not single.is_embedding_tuned
    alone = Build(reopened.config, tmp_path / "one", SilentReporter())
    assert not Build(reopened.config, run, SilentReporter()).is_embedding_tuned  # a build trains on its own machine
    assert torch.allclose(alone.embedding()[1], reopened.embedding()[1], atol=1e-3)


@pytest.mark.slow
def test_what_was_read_is_counted_and_only_that_is_trained(config, tmp_path):
    short = dataclasses.replace(config, embed_steps=3, steps=2, batch_size=1, accumulate=2)
    made = Build(short, tmp_path, SilentReporter())
    patch = made.patch()
    training = patch.meta.training
    assert (training.embed_pairs_read, training.pairs_read, training.pairs) == (6, 4, 178)
    assert training.read == "4 of 178 pairs (2 steps x 2)"
    assert "| training read | 4 of 178 pairs (2 steps x 2) |" in make_card(patch, "me/it", "es", None, base_model="a/b")
    read = set().union(*({*e.prompt, *e.answer[:-1]} for e in made.read_in(3)))
    ids, rows = made.embedding()
    assert set(ids.tolist()) == read < set().union(*({*e.prompt, *e.answer[:-1]} for e in made.train.examples))
    # Every row that counts as tuned did change, and a gradient touched every control.
    before = made.model.get_input_embeddings().weight.detach()[ids]
    assert (rows != before).any(dim=1).all()
    for seed in range(5):
        drawn = made.seeded(seed).ticket("random", 20).token_ids
        assert (made.seeded(seed).counts[drawn] > 0).all()
    random = made.patch_of(made.ticket("random", 20))
    assert (random.rows != random.base_rows).any(dim=1).all()
    assert made.counts.sum() < made.embed_counts.sum()
    assert len(made.embedding_patch().token_ids) == len(read)
    assert made.embedding_patch().meta.training.steps == 0
    # The two stages read one order, and nothing is read that the record does not name.
    assert made.read_in(3)[:4] == made.read_in(2)
    assert seen(training.sources, made.pairs.train) == seen(training.sources, made.pairs_read_in(3)) == (6, True)
    assert seen(training.sources, made.pairs.held_out) == seen(training.sources, made.pairs.dev) == (0, True)


def test_an_order_is_a_shorter_one_s_continuation_and_passes_take_every_pair_once():
    order = reading_order(10, 34, seed=3)
    assert [sorted(order[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert order[:10] != order[10:20]
    assert reading_order(10, 7, seed=3) == order[:7]
    assert reading_order(10, 34, seed=4) != order
    assert reading_order(10, 0, seed=3) == []


@pytest.mark.slow
def test_the_optimiser_s_settings_are_recorded_and_damping_is_an_option(config, tmp_path):
    patches = {}
    for damp in (True, False):
        made = Build(dataclasses.replace(config, damp_rare=damp), tmp_path, SilentReporter())
        patches[damp] = made.patch()
        found = patches[damp].meta.training.hyperparameters
        numbers = len(made.embedding()[0]) * 32
        assert found["embed_adam_epsilon"] == (numbers**-0.5 if damp else 1e-8)
        assert found["adam_epsilon"] == 1e-8
        assert found["damp_rare"] is damp
        assert (found["adam_beta1"], found["adam_beta2"], found["max_grad_norm"]) == (0.9, 0.95, 1.0)
        assert (found["warmup_steps"], found["lr_scheduler_type"], found["device"]) == (0, "linear", "cpu")
    assert not torch.equal(patches[True].rows, patches[False].rows)
    path = tmp_path / "p.safetensors"
    patches[False].save(path)
    out = "".join(run_cli("inspect", path)[1].split())
    assert "embed_adam_epsilon1e-08" in out
    assert "nocalibratedprobability" in out
    assert "--damp-rare" in run_cli("build", "--help")[1]


@pytest.mark.slow
def test_stages_of_another_kind_of_machine_are_found_by_a_build_that_is_opened_again(
    config, base_folder, tmp_path, monkeypatch
):
    base = tmp_path / "half"
    shutil.copytree(base_folder, base)
    transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16).save_pretrained(base)
    config = dataclasses.replace(config, base=str(base))
    monkeypatch.setattr(loaded_module, "_cpu_computes_bfloat16", lambda: True)
    made = Build(config, tmp_path / "run", SilentReporter())
    assert made.model.dtype == torch.bfloat16
    patch = made.patch()
    tuned = made.embedding_patch()
    monkeypatch.setattr(loaded_module, "_cpu_computes_bfloat16", lambda: False)
    reporter = Recorder()
    again = reopen(patch, tmp_path / "run", reporter)
    assert again.model.dtype == torch.float32
    systems = make_systems(patch, again, controls=("l2",), seeds=2)
    assert torch.equal(systems["embedding"][0].rows, tuned.rows)
    assert {name: list(by_seed) for name, by_seed in systems.items()} == {
        "patch": [0, 1], "embedding": [0, 1], "l2": [0, 1]
    }  # fmt: skip
    assert {p.rows.dtype for by_seed in systems.values() for p in by_seed.values()} == {torch.bfloat16}
    assert not any(event == "left_out" for event, _, _ in reporter.notes)


@pytest.mark.slow
def test_a_tuned_embedding_that_is_missing_is_left_out_for_every_seed_with_the_true_reason(config, tmp_path):
    frequent = dataclasses.replace(config, selection="frequency")
    patch = Build(frequent, tmp_path, SilentReporter()).patch()
    Build(dataclasses.replace(config, seed=1), tmp_path, SilentReporter()).patch()  # seed 1 alone has one
    reporter = Recorder()
    systems = make_systems(patch, reopen(patch, tmp_path, reporter), seeds=2)
    assert set(systems) == {"patch", "random", "noise"}
    message, other = [text for event, text, _ in reporter.notes if event == "left_out"]
    assert "no reserved token" in other
    assert "none for the seed 0" in message
    assert "'frequency' needs none" in message
    # A patch whose own selection needed it, and whose stage is gone, says so.
    patch = Build(config, tmp_path, SilentReporter()).patch()
    reporter = Recorder()
    for stage in tmp_path.glob("embed-*"):
        shutil.rmtree(stage)
    assert "embedding" not in make_systems(patch, reopen(patch, tmp_path, reporter))
    assert "It was deleted" in next(text for event, text, _ in reporter.notes if event == "left_out")


def test_a_float16_base_trains_in_float32(config, base_folder, tmp_path):
    base = tmp_path / "half"
    shutil.copytree(base_folder, base)
    transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float16).save_pretrained(base)
    made = Build(
        dataclasses.replace(config, base=str(base), steps=2, embed_steps=2), tmp_path / "run", SilentReporter()
    )
    assert made.model.dtype == torch.float32
    patch = made.patch()
    assert patch.rows.dtype == torch.float16
    assert patch.meta.base.dtype == "float16"
    assert made.seeded(1).patch_of(made.ticket()).rows.dtype == torch.float16


# Which pairs


def test_a_split_moves_no_more_than_the_pair_that_came():
    pairs = [Pair(*pair) for pair in PAIRS]
    before = split_pairs(pairs[:100], held_out=10, dev=10)
    after = split_pairs(pairs[:101], held_out=10, dev=10)
    assert len(set(before.held_out) - set(after.held_out)) <= 1
    assert len(set(before.dev) - set(after.dev)) <= 1
    everything = [*before.train, *before.dev, *before.held_out]
    assert sorted(everything) == sorted(pairs[:100])
    assert split_pairs(list(reversed(pairs[:100])), held_out=10, dev=10) == before
    # Case and white space make no new sentence.
    twice = split_pairs(
        [*pairs[:30], Pair(pairs[0].source.upper(), "x"), Pair("  The  Cat sees the dog. ", "y")], held_out=3
    )
    assert twice.duplicates == 2


@pytest.mark.slow
def test_a_patch_is_opened_again_with_the_stage_that_it_came_from(config, base_folder, tmp_path, monkeypatch):
    """One run folder, the same build on two kinds of machine: each patch has its own tuned embedding."""
    base = tmp_path / "half"
    shutil.copytree(base_folder, base)
    transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16).save_pretrained(base)
    config = dataclasses.replace(config, base=str(base), mode="transfer")
    made = {}
    for fast in (True, False):
        monkeypatch.setattr(loaded_module, "_cpu_computes_bfloat16", lambda fast=fast: fast)
        build = Build(config, tmp_path / "run", SilentReporter())
        made[fast] = build.patch(), build.embedding_patch()
    assert not torch.equal(made[True][1].rows, made[False][1].rows)
    for patch, tuned in made.values():
        assert torch.equal(reopen(patch, tmp_path / "run").embedding_patch().rows, tuned.rows)


@pytest.mark.slow
def test_a_run_folder_keeps_one_split_for_a_patch_and_one_template_for_a_chat(config, base_folder, tmp_path, chatting):
    run = tmp_path / "run"
    patch = Build(config, run, SilentReporter()).patch()
    with pytest.raises(RunError, match=r"this very patch with another dev \(16\)"):
        Build(dataclasses.replace(config, dev=8, held_out=24), run, SilentReporter()).patch()
    assert len(reopen(patch, run).held_out) == 16
    # A chat template with the day's date in it.
    base = tmp_path / "dated"
    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    model.resize_token_embeddings(401)
    model.save_pretrained(base)
    chatting.chat_template = "It is {{ strftime_now('%H:%M:%S.%f') }}. " + CHAT
    chatting.save_pretrained(base)
    dated = dataclasses.replace(config, base=str(base), template="chat", steps=2, embed_steps=2)
    patch = Build(dated, run, SilentReporter()).patch()
    reporter = Recorder()
    assert Build(dated, run, reporter).patch().digest == patch.digest
    assert reporter.begun == []
    again = reopen(patch, run)
    assert again.template == patch.meta.template
    assert again.is_embedding_tuned
    # The same words around a sentence, and another end of a turn: another base, with its own.
    sibling = tmp_path / "sibling"
    shutil.copytree(base, sibling)
    chatting.eos_token = "<turn>"
    chatting.save_pretrained(sibling)
    other = Build(dataclasses.replace(dated, base=str(sibling)), run, SilentReporter())
    assert (other.template.end_token_id, again.template.end_token_id) == (None, 373)
    assert other.train.examples[0].answer[-1] == 373
    # Another tokenizer of the same vocabulary.
    text = json.loads((base_folder / "tokenizer.json").read_text())
    text["normalizer"] = {"type": "Lowercase"}
    other = tmp_path / "lower"
    shutil.copytree(base_folder, other)
    (other / "tokenizer.json").write_text(json.dumps(text))
    plain = Build(config, run, SilentReporter()).patch()
    with pytest.raises(RunError, match="cuts the training pairs into other tokens"):
        reopen(plain, run, base=str(other))


@pytest.mark.slow
def test_a_damaged_run_folder_is_said_in_a_sentence(config, tmp_path):
    patch = Build(config, tmp_path, SilentReporter()).patch()
    [record] = tmp_path.glob("patch-*.json")
    good = json.loads(record.read_text())
    for bad in (
        "[]",
        '{"config": []}',
        json.dumps(good | {"machine": {"device": 1}}),
        "{",
        json.dumps(good | {"tests": "../x"}),
    ):
        record.write_text(bad)
        with pytest.raises(RunError, match="cannot read the record"):
            reopen(patch, tmp_path)
    record.write_text(json.dumps({key: value for key, value in good.items() if key != "machine"}))
    with pytest.raises(RunError, match="of an earlier ksl-patch"):
        reopen(patch, tmp_path)
    record.write_text(json.dumps(good))
    foreign = tmp_path / "embed-000000000000"
    foreign.mkdir()
    (foreign / "rows.safetensors").write_bytes(b"")
    for text in ("[]", "{", '"x"'):
        (foreign / "settings.json").write_text(text)
        assert reopen(patch, tmp_path).is_embedding_tuned


def test_documents_are_held_out_whole(tmp_path):
    pairs = [Pair(s, t, f"page {i // 7}") for i, (s, t) in enumerate(PAIRS)]
    split = split_pairs(pairs, held_out=20, dev=10, seed=1)
    sides = [{pair.group for pair in part} for part in (split.train, split.dev, split.held_out)]
    assert len(set().union(*sides)) == sum(map(len, sides))
    assert (len(split.held_out), len(split.dev)) == (20, 10)
    assert len(split.train) + 30 + split.unused == len(PAIRS)
    assert split.unused == 1 + 4  # of pages of 7
    with pytest.raises(DataError, match="in 1 document, which stay whole"):
        split_pairs([Pair(s, t, "one") for s, t in PAIRS], held_out=20)


def test_intervals_are_over_documents_where_there_are_some():
    texts = ["a b c d"] * 40
    groups = [f"page {i // 10}" for i in range(40)]
    from ksl_patch.evidence.outputs import Outputs

    base = Outputs(texts, [True] * 40, [1.0] * 40, [1] * 40, [])
    # All sentences of a page gain alike: there are four independent examples, not forty.
    gain = Outputs(texts, [True] * 40, [1.0 - (i // 10) for i in range(40)], [1] * 40, [])
    wide = Scorer(texts, groups=groups, resamples=500)
    by_page, by_sentence = (s.figures([gain], base)["loss"] for s in (wide, Scorer(texts, resamples=500)))
    assert wide.documents == 4
    # One document is one example, and no interval.
    one = Scorer(texts, groups=["book"] * 40).figures([gain], base, base)["loss"]
    assert (one.value, one.difference, one.low, one.high, one.patch_minus) == (-0.5, -1.5, None, None, None)
    assert by_page.high - by_page.low > 2 * (by_sentence.high - by_sentence.low)


def test_sources_that_were_read_are_known_without_the_run_folder(config, tmp_path):
    made = Build(config, tmp_path / "run", SilentReporter())
    patch, reporter = made.patch(), Recorder()
    new = [Pair("The bird has bread.", "El ave tiene pan."), Pair("The bird sees.", "El ave ve.")]
    found = encode_test(
        patch, made.model, made.tokenizer, [*new, new[0]._replace(source="THE bird has bread.")] * 9, None, reporter
    )
    assert found.pairs == new
    assert any("25 of the 27 test pairs were left out" in text for _, text, _ in reporter.notes)
    known = made.pairs_read_in(20)[5]
    for build in (None, made):
        with pytest.raises(DataError, match="1 of the 3 test pairs are in the patch's own training data"):
            encode_test(patch, made.model, made.tokenizer, [*new, known], build, reporter)
    # With the run folder at hand every training pair is known, whatever the sketch holds.
    sampled = patch.with_meta(training=dataclasses.replace(patch.meta.training, sources=sketch(new)))
    with pytest.raises(DataError, match="1 of the 1 test pairs"):
        encode_test(sampled, made.model, made.tokenizer, [known], made, reporter)
    encode_test(patch, made.model, made.tokenizer, [*new, made.pairs.dev[0]], made, reporter)
    assert "1 of the test pairs are dev or validation pairs" in reporter.notes[-1][1]
    bare = patch.with_meta(training=dataclasses.replace(patch.meta.training, sources=None))
    encode_test(bare, made.model, made.tokenizer, [*new, known], None, reporter)
    assert "it may have seen the test pairs" in reporter.notes[-1][1]
    with pytest.raises(DataError, match="cannot be read"):
        encode_test(
            patch.with_meta(training=dataclasses.replace(patch.meta.training, sources="?")),
            made.model, made.tokenizer, new, None, reporter,
        )  # fmt: skip


def test_a_sketch_of_many_sources_is_small_and_finds_an_overlap():
    pairs = [Pair(f"Sentence number {i}.", "x") for i in range(20_000)]
    kept = sketch(pairs)
    assert len(kept) < 7000
    assert seen(kept, pairs) == (1024, False)
    assert 20 < seen(kept, pairs[:1000])[0] < 100  # 1 in 20 of them
    assert seen(kept, [Pair(f"Another {i}.", "x") for i in range(20_000)]) == (0, False)
    assert seen(sketch(pairs[:1000]), pairs) == (1000, True)


@pytest.mark.slow
def test_choices_are_made_on_dev_pairs_and_figures_count_their_uses(config, tmp_path):
    path = tmp_path / "es.safetensors"
    made = Build(config, tmp_path / "es.safetensors.run", SilentReporter())
    patch = made.patch()
    assert patch.meta.evaluation["part"] == "dev"
    assert patch.meta.evaluation["data_digest"] == made.dev.digest != made.held_out.digest
    assert patch.meta.evaluation["loss_patch"] == pytest.approx(made.patched_loss(patch, made.dev))
    patch.save(path)
    arguments = ("--controls", "none", "--max-new-tokens", "4")
    code, out, err = run_cli("eval", path, *arguments, "--part", "dev")
    assert code == 0, err
    assert "16 dev pairs" in out
    assert "These are the dev pairs, which choices are made on" in " ".join(out.split())
    code, out, err = run_cli("eval", path, *arguments)
    assert code == 0, err
    text = " ".join(out.split())
    assert "No other patch of this run folder was measured on any of these pairs" in text
    assert "These are 26 intervals of 95 %" in text
    assert "It replaces the evaluation on 16 dev pairs." in text
    # Held-out figures are not replaced by those of pairs that chose.
    code, _, err = run_cli("eval", path, *arguments, "--part", "dev")
    assert (code, "pairs that no choice was made on" in err) == (2, True)
    other = tmp_path / "other.safetensors"
    code, out, err = run_cli("certify", path, "--no-save", "--max-new-tokens", "4")
    assert (code, "Note" in out) == (0, False), err
    Build(dataclasses.replace(config, top_k=3), made.run, SilentReporter()).patch().save(other)
    code, out, err = run_cli("eval", other, "--run", made.run, *arguments, "--limit", "8")
    assert code == 0, err
    assert "2 patches of this run folder were measured on these pairs" in " ".join(out.split())
    code, out, err = run_cli("certify", path, "--no-save", "--max-new-tokens", "4")
    assert "the bounds do not hold" in " ".join(out.split())


@pytest.mark.slow
def test_a_smaller_evaluation_does_not_replace_a_larger_one(config, tmp_path):
    path = tmp_path / "es.safetensors"
    Build(config, tmp_path / "es.safetensors.run", SilentReporter()).patch().save(path)
    short = ("--max-new-tokens", "4")
    assert run_cli("eval", path, *short, "--controls", "random", "--seeds", "2")[0] == 0
    before = path.read_bytes()
    for less, what in (
        (("--limit", "2", "--controls", "random", "--seeds", "2"), "16 pairs where this one has 2"),
        (("--controls", "none", "--seeds", "2"), "random rows"),
        (("--controls", "random"), "2 training seeds"),
    ):
        code, _, err = run_cli("eval", path, *short, *less)
        assert (code, what in err, "add --force" in err) == (2, True, True)
        assert path.read_bytes() == before
    target = tmp_path / "small.safetensors"
    assert run_cli("eval", path, *short, "--limit", "2", "--controls", "none", "-o", target)[0] == 0
    code, _, err = run_cli("eval", path, *short, "--limit", "2", "--controls", "none", "-o", target)
    assert (code, "exists; add --force" in err) == (2, True)
    assert path.read_bytes() == before
    code, out, _ = run_cli("eval", path, *short, "--limit", "2", "--controls", "none", "--force")
    assert (code, "It replaces the evaluation on 16 held-out pairs." in " ".join(out.split())) == (0, True)
    assert read(Evaluation, Patch.load(path).meta.evaluation).pairs == 2
    assert run_cli("certify", path, *short)[0] == 0
    assert run_cli("certify", path, *short, "--limit", "3")[0] == 2


@pytest.mark.slow
def test_the_patch_s_lead_is_read_from_a_file_as_it_was_printed(config, tmp_path):
    path = tmp_path / "es.safetensors"
    Build(config, tmp_path / "es.safetensors.run", SilentReporter()).patch().save(path)
    code, out, err = run_cli("eval", path, "--controls", "random", "--max-new-tokens", "4", "--json")
    assert code == 0, err
    [random] = [system for system in json.loads(out)["systems"] if system["name"] == "random"]
    lead = random["figures"]["loss"]["patch_minus"]
    assert lead["low"] < lead["value"] < lead["high"] < 0
    shown = f"{lead['value']:+.3f} ({lead['low']:+.3f} to {lead['high']:+.3f})"
    patch = Patch.load(path)
    assert shown in make_card(patch, "me/it", "es", None, base_model="a/b")
    page = tmp_path / "page.html"
    assert run_cli("report", path, "-o", page)[0] == 0
    assert shown in page.read_text()
    assert "on 16 held-out pairs" in make_card(patch, "me/it", "es", None, base_model="a/b").replace("On 16", "on 16")


@pytest.mark.slow
def test_a_build_s_loss_is_of_dev_pairs_wherever_it_is_shown(config, tmp_path):
    from ksl_patch.report.page import make_report

    patch = Build(config, tmp_path / "run", SilentReporter()).patch()
    path = tmp_path / "es.safetensors"
    patch.save(path)
    assert "| on 16 dev pairs |" in make_card(patch, "me/it", "es", None, base_model="a/b")
    page = make_report([patch], [None])
    assert "on 16 dev pairs" in page
    assert f"<dt>16 dev pairs</dt><dd>{patch.meta.evaluation['data_digest']}" in page
    assert "on 16 dev pairs" in run_cli("inspect", path)[1]
    # Rivals that were measured on other pairs, or under another prompt, are not compared in silence.
    other = Build(dataclasses.replace(config, template="{source} =>"), tmp_path / "run", SilentReporter()).patch()
    assert "under different prompts" in make_report([patch, other], [None, None])
    assert "under different prompts" not in make_report([patch, patch], [None, None])


@pytest.mark.slow
def test_figures_fit_into_80_columns_and_lose_no_digit(config, tmp_path):
    path = tmp_path / "es.safetensors"
    Build(config, tmp_path / "es.safetensors.run", SilentReporter()).patch().save(path)
    code, _, err = run_cli("eval", path, "--controls", "random,noise", "--max-new-tokens", "4", "--seeds", "2")
    assert code == 0, err
    evaluation = read(Evaluation, Patch.load(path).meta.evaluation)
    [random] = [system for system in evaluation.systems if system.name == "random"]
    numbers = re.findall(r"[\d.]+", from_base("loss", random.figures["loss"]) + against("loss", random.figures["loss"]))
    for width in (80, 140):
        console = Console(width=width, file=io.StringIO())
        console.print(table(evaluation, width))
        shown = console.file.getvalue()
        assert max(map(len, shown.splitlines())) <= width
        assert "…" not in shown
        assert all(number in shown for number in numbers)
        assert of_seeds("loss", random.figures["loss"]) in shown


# Which text


@pytest.mark.slow
def test_bleu_has_the_words_of_its_language():
    chinese = ["我们今天去学校学习新的语言。", "他昨天在图书馆读了一本书。"]
    near = ["我们今天去学校学习新语言。", "他昨天在图书馆读了一本书。"]
    for language, tokenizer in (
        ("zh-Hans", "zh"),
        ("zh", "zh"),
        ("zho", "zh"),
        ("cmn", "zh"),
        ("yue", "zh"),
        ("lzh", "zh"),
        ("th", "char"),
        ("tha", "char"),
        ("khm", "char"),
        ("es", "13a"),
        ("hi", "13a"),
        (None, "13a"),
    ):
        scorer = Scorer(chinese, language=language)
        assert f"tok:{tokenizer}" in scorer.signatures["bleu"]
        assert f"tokenizer {tokenizer};" in scorer.notes[0]
    from ksl_patch.evidence.outputs import Outputs

    out = Outputs(near, [True] * 2, [1.0] * 2, [1] * 2, [])
    assert Scorer(chinese, language="zh").figures([out], out)["bleu"].value > 80
    assert Scorer(chinese, language="es").figures([out], out)["bleu"].value < 60
    for language in ("ja", "ko"):  # their tokenizers are packages of their own
        scorer = Scorer(["a b"], language=language)
        assert any(f"sacrebleu[{language}]" in note for note in scorer.notes) == (
            "tok:char" in scorer.signatures["bleu"]
        )


def test_a_right_answer_of_several_lines_is_right_on_its_first_line():
    from ksl_patch.evidence.outputs import Outputs

    texts = ["Uno dos tres.\nCuatro cinco seis.\nSiete ocho nueve.", "El gato ve el mar.\nLa casa tiene pan.\nFin."]
    out = Outputs(texts, [True] * 2, [1.0] * 2, [1] * 2, [])
    figures = Scorer(texts).figures([out], out)
    assert figures["chrf"].value == figures["chrf_first_line"].value == pytest.approx(100)
    assert figures["bleu_first_line"].value == pytest.approx(100)


@pytest.mark.slow
def test_the_limit_on_new_tokens_comes_from_the_references(config, tmp_path):
    path = tmp_path / "es.safetensors"
    made = Build(config, tmp_path / "es.safetensors.run", SilentReporter())
    made.patch().save(path)
    longest = max(len(e.answer) for e in made.held_out.examples)
    assert made.held_out.longest_answer == longest
    assert token_limit(made.held_out) == 32 >= 1.5 * longest
    code, out, err = run_cli("eval", path, "--controls", "none", "--json", "--no-save")
    assert code == 0, err
    assert json.loads(out)["max_new_tokens"] == 32
    code, out, err = run_cli("eval", path, "--controls", "none", "--json", "--no-save", "--max-new-tokens", "3")
    assert any("16 of 16 references are longer than the 3 tokens" in note for note in json.loads(out)["notes"])


CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}<turn>{% endif %}\n"
)
CHAT += "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"


@pytest.fixture
def chatting(tokenizer):
    """The tokenizer with a chat template that ends a turn with a token of its own."""
    import copy

    found = copy.deepcopy(tokenizer)
    found.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    found.chat_template = CHAT
    return found


def test_an_answer_in_a_chat_ends_as_the_chat_template_ends_a_turn(chatting, tmp_path):
    end = chatting.convert_tokens_to_ids("<turn>")
    template = make_template("chat", source_language="en", language="es", tokenizer=chatting)
    assert template.end_token_id == end != chatting.eos_token_id
    [example] = encode(template, [Pair("The cat", "El gato")], chatting, 1, 256).examples
    assert example.answer[-1] == end
    # So the base is not charged for ending as it was taught to, and its output is known to have stopped.
    from ksl_patch.evidence.outputs import translate

    class Ends(torch.nn.Module):
        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:-1], 401)
            logits[..., end] = 9.0
            return logits

    model = tiny_llama(tied=False, vocab_size=401)
    model.lm_head.forward = Ends().forward
    [completion] = translate(model, chatting, [example], None, max_new_tokens=5)
    assert (completion.stopped, completion.token_ids, completion.text) == (True, (end,), "")
    losses, counts = answer_losses(model, [Example(example.prompt, [end])])
    assert losses[0] / counts[0] < 0.1
    # What ends one row of a batch does not end another.
    from ksl_patch.hf import generate

    first, second = generate(model, chatting, [example.prompt] * 2, [None, None], max_new_tokens=5, ends=[end, None])
    assert (first.token_ids, first.stopped) == ((end,), True)
    assert (second.token_ids, second.stopped) == ((end,) * 5, False)


@pytest.mark.parametrize(
    ("template", "before", "end"),
    [
        ("{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
         "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}", " ", None),  # the tokenizer's own end
        ("{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<turn>\n{% endfor %}"
         "{% if add_generation_prompt %}assistant\n{% endif %}", None, "<turn>"),
        ("{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}<t>\n\n</t>\n\n{% endif %}"
         "{{ m.content }}<turn>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}", None, "<turn>"),
        ("<s>### Instruction: {{ messages[0].content }}\n### Response:\n", None, None),  # says nothing of an answer
    ],
    ids=["llama 2", "turns", "thoughts", "single turn"],
)  # fmt: skip
def test_what_stands_around_an_answer_comes_from_the_chat_template(chatting, template, before, end):
    chatting.chat_template = template
    made = make_template("chat", source_language="en", language="es", tokenizer=chatting)
    assert made.before_answer == before
    assert made.end_token_id == (None if end is None else chatting.convert_tokens_to_ids(end))
    [example] = encode(made, [Pair("The cat", "El gato")], chatting, 1, 256).examples
    assert chatting.decode(example.answer[:-1]) == (before or "") + "El gato"
    assert example.answer[-1] == (1 if end is None else made.end_token_id)
    assert made.text.endswith("</t>\n\n") == ("<t>" in template)


def test_an_escaping_chat_template_is_refused(chatting):
    chatting.chat_template = CHAT.replace("{{ m['content'] }}", "{{ m['content'] | e }}")
    with pytest.raises(RunError, match="does not keep the messages as they are"):
        make_template("chat", source_language="en", language="es", tokenizer=chatting)


def test_a_template_never_holds_the_answer(config, tmp_path):
    for changes in ({"template": "{source} = {target} ="}, {"template": "{source} {t}", "columns": ("s", "t")}):
        with pytest.raises(KslPatchError, match=r"the answer"):
            Build(dataclasses.replace(config, **changes), tmp_path, SilentReporter())
    many = " ".join(f"{{f{i}}}" for i in range(17))
    for template, message in ((many, "at most 16 fields"), ("{" + "a" * 65 + "}", "up to 64 letters")):
        with pytest.raises(KslPatchError, match=message):
            Build(dataclasses.replace(config, template="{source} " + template), tmp_path, SilentReporter())


def test_one_source_in_two_contexts_is_two_pairs_on_one_side():
    pairs = [Pair(s, t, "", (("title", side),)) for s, t in PAIRS[:60] for side in ("File", "State")]
    split = split_pairs(pairs, held_out=11, dev=7)
    assert split.duplicates == 0
    sides = [{pair.key for pair in part} for part in (split.train, split.dev, split.held_out)]
    assert len(set().union(*sides)) == sum(map(len, sides))
    # Nor does it come back in another document.
    everywhere = [Pair("Yes.", "Sí.", f"page {i}", (("title", str(i)),)) for i in range(40)]
    split = split_pairs([*everywhere, *pairs], held_out=11, dev=7)
    sides = [{pair.key for pair in part} for part in (split.train, split.dev, split.held_out)]
    assert len(set().union(*sides)) == sum(map(len, sides))
    assert len(split.train) + len(split.dev) + len(split.held_out) + split.unused == 160
    # A document that is named as a sentence is another thing.
    mixed = [Pair("x", "y"), *(Pair(s, t, "x") for s, t in PAIRS[:20]), *(Pair(s, t) for s, t in PAIRS[20:60])]
    for seed in range(40):
        split = split_pairs(mixed, held_out=5, dev=5, seed=seed)
        assert sum(any(pair.group == "x" for pair in part) for part in (split.train, split.dev, split.held_out)) <= 1


@pytest.mark.slow
def test_a_system_prompt_and_other_columns_reach_the_prompt(chatting, tokenizer, config, tmp_path):
    template = make_template(
        "chat", source_language="en", language="es", tokenizer=chatting, system="You know about {topic}."
    )
    assert template.fields == ["topic"]
    assert "system: You know about cats." in template.render("{topic}", topic="cats")
    assert "\n{topic}" in template.render("{topic}", topic="cats")  # a sentence is only text
    assert template.matches(template.render("a", topic="b"))
    assert not template.matches(template.render("a", topic="b").replace("know", "no"))
    with pytest.raises(KslPatchError, match="needs 'topic' beside the sentence"):
        template.render("a")
    deaf = CHAT.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    chatting.chat_template = deaf
    with pytest.raises(RunError, match="may know no system prompt"):
        make_template("chat", source_language="en", language="es", tokenizer=chatting, system="Be kind.")
    chatting.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(RunError, match="refuses the messages"):
        make_template("chat", source_language="en", language="es", tokenizer=chatting, system="Be kind.")
    with pytest.raises(RunError, match="add --template chat"):
        make_template("plain", source_language="en", language="es", tokenizer=tokenizer, system="Be kind.")

    file = tmp_path / "pairs.tsv"
    lines = [f"{t}\t{s}\tpage {i // 5}\ttopic {i}\n" for i, (s, t) in enumerate(PAIRS)]
    file.write_text("\ufefftarget\tsource\tpage\tcontext\n" + "".join(lines))
    own = dataclasses.replace(
        config, pairs=str(file), group="page", template=r"{context}: {source}\n", steps=2, embed_steps=2
    )
    made = Build(own, tmp_path / "run", SilentReporter())
    pair = made.train.pairs[0]
    number = PAIRS.index(pair[:2])
    assert (pair.group, pair.fields) == (f"page {number // 5}", (("context", f"topic {number}"),))
    assert tokenizer.decode(made.train.examples[0].prompt).endswith(f"topic {number}: {pair.source}\n")
    patch = made.patch()
    patch.save(tmp_path / "p.safetensors")
    assert Patch.load(tmp_path / "p.safetensors").meta.template.fields == ["context"]
    assert dataclasses.replace(patch, meta=dataclasses.replace(patch.meta, template=None)).digest != patch.digest
    code, out, err = run_cli(
        "eval", tmp_path / "p.safetensors", "--run", made.run, "--controls", "none", "--max-new-tokens", "4", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["documents"] == len({pair.group for pair in made.held_out.pairs})
    code, _, err = run_cli("generate", "--base", config.base, "--patch", tmp_path / "p.safetensors", "--apply-template",
                           "--prompt", "The cat")  # fmt: skip
    assert (code, "needs 'context' beside the sentence" in err) == (1, True)
    with pytest.raises(DataError, match="expected a line with the columns' names 'source', 'target', 'topic'"):
        read_pairs(str(file), Columns(fields=("topic",)))
    with pytest.raises(DataError, match="expected the columns 'source', 'target', 'context'"):
        Build(dataclasses.replace(own, pairs=config.pairs, group=None), tmp_path / "run", SilentReporter())


# Where rows act, and which they are


@pytest.mark.slow
def test_scope_prompt_trains_what_it_serves(config, tmp_path):
    made = Build(dataclasses.replace(config, scope="prompt"), tmp_path, SilentReporter())
    prompts = set().union(*(set(e.prompt) for e in made.read_in(20)))
    answers = set().union(*(set(e.answer[:-1]) for e in made.read_in(20)))
    assert answers - prompts
    assert set(made.embedding()[0].tolist()) == prompts
    assert made.counts.sum() == sum(len(e.prompt) for e in made.read_in(20))
    patch = made.patch()
    assert patch.meta.scope == "prompt"
    assert patch.meta.evaluation["loss_patch"] < patch.meta.evaluation["loss_base"] - 0.05
    everywhere = Build(config, tmp_path, SilentReporter()).patch()
    assert not torch.equal(patch.rows, everywhere.rows)
    # The loss that training sees is the one that is measured, and not that of rows which act everywhere.
    from ksl_patch.data.encoding import IGNORED, collate
    from ksl_patch.overlay import training

    batch = collate(made.dev.examples[:4], pad=0)
    with training(made.model, slot_rows(patch)) as rows, torch.no_grad():
        rows.prompt = batch["labels"] == IGNORED
        trained = float(made.model(**batch).loss)
    with attach(made.model) as handle, handle.serving(handle.bank.add(slot_rows(patch))):
        measured = token_loss(made.model, made.dev.examples[:4], marking=handle.marking)
    assert trained == pytest.approx(measured, rel=1e-5)
    unscoped = dataclasses.replace(slot_rows(patch), prompt_only=False)
    with attach(made.model) as handle, handle.serving(handle.bank.add(unscoped)):
        assert trained != pytest.approx(token_loss(made.model, made.dev.examples[:4], marking=handle.marking), rel=1e-5)
    with pytest.raises(RunError, match="scope 'prompt' needs side 'input'"):
        Build(dataclasses.replace(config, scope="prompt", side="input+output"), tmp_path, SilentReporter())


@pytest.mark.slow
def test_rows_are_named_by_hand(base_folder, pairs_file, tokenizer, tmp_path):
    assert given_ticket(["<s>", "\n", 42], tokenizer, 400).token_ids.tolist() == sorted(
        [0, tokenizer("\n").input_ids[0], 42]
    )
    # A byte-level vocabulary calls a byte "é"; the text is what is meant.
    assert tokenizer.get_vocab()["é"] != tokenizer("é", add_special_tokens=False).input_ids
    name = next(token for token in tokenizer.get_vocab() if len(token) > 1 and token.startswith("Ġ"))
    assert given_ticket([name], tokenizer, 400).token_ids.tolist() == [tokenizer.get_vocab()[name]]
    for wrong, message in [
        (["The cat sees the dog"], "tokens of this base"),
        (["é"], "2 tokens of this base"),
        ([400], "has no row"),
        (["\u4e2d"], "3 tokens of this base"),
    ]:
        with pytest.raises(TicketError, match=message):
            given_ticket(wrong, tokenizer, 400)
    output = tmp_path / "rows.safetensors"
    arguments = (
        "build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "-o", output, "--steps", "5",
        "--dev", "8", "--held-out", "8", "--force",
    )  # fmt: skip
    code, _, err = run_cli(*arguments, "--rows", r"\n", "--rows", "<s>", "--rows", '["The", ":"]', "--rows", "3")
    assert code == 0, err
    assert "stay the base's" in err  # this tokenizer begins with no <s>, and token 3 occurs nowhere
    patch = Patch.load(output)
    texts = dict(zip(patch.token_ids.tolist(), patch.meta.tokens, strict=True))
    assert {"\n", "<s>", "The", ":"} < set(texts.values())
    assert 3 in texts
    assert patch.meta.ticket.selection == "given"
    assert patch.meta.training.embed_steps == 0
    changed = (patch.rows != patch.base_rows).any(dim=1)
    assert changed.tolist() == [i not in (0, 3) for i in patch.token_ids.tolist()]
    code, out, err = run_cli("eval", output, "--max-new-tokens", "4", "--json", "--no-save")
    assert code == 0, err
    assert {system["name"] for system in json.loads(out)["systems"]} == {
        "base",
        "patch",
        "frequency",
        "random",
        "noise",
    }
    code, _, err = run_cli(*arguments, "--rows", "3")
    assert (code, "nothing to train" in err) == (1, True)
    for empty in ("", "[]", '""'):
        assert run_cli(*arguments, "--rows", empty)[0] == (2 if empty != "[]" else 1)
    assert named_rows(None, None, ("٣", "7", '"7"', r"\t", '["a", 5]')) == ("٣", 7, "7", "\t", "a", 5)
    code, _, err = run_cli(*arguments, "--rows", "3", "--top-k", "4")
    assert (code, "give one of the two" in err) == (2, True)


def test_counting_tokens_takes_one_pass_and_refuses_ids_without_a_row():
    counts = token_counts([Example([2, 2], [3, 1]), Example([2], [4, 1])], 6, prompt_only=True)
    assert counts.tolist() == [0, 0, 3, 0, 0, 0]
    with pytest.raises(DataError, match="token 9, and the base's table has 6 rows"):
        token_counts([Example([9], [1])], 6)
    # A table of a quarter of a million rows costs once, not for every example.
    script = (
        "import time; from ksl_patch.data.encoding import Example, token_counts\n"
        "many = [Example([1, 2], [3, 4])] * 20_000\n"
        "begun = time.perf_counter(); token_counts(many, 262_144); took = time.perf_counter() - begun\n"
        "print(took)"
    )
    took = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert took < 1.5  # 4 s where [V] is made for every example
    assert np.array_equal(token_counts([Example([1], [2, 3])] * 3, 5), [0, 3, 3, 0, 0])
