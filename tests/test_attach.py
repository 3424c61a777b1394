"""Patches attached to a transformers model: every way of running it, beside models whose table was overwritten."""

import copy
import gc
import json
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_llama
from test_hf import overwritten, some_patch

from ksl_patch import Patch, attach, find_embedding, identify
from ksl_patch.errors import BankError, BaseMismatchError, KslPatchError, PatchError, RunError
from ksl_patch.hf import load_base
from ksl_patch.hf.patched_model import table_state

IDS = list(range(2, 372, 3))
PROMPTS = torch.tensor([[5, 9, 300, 17, 40], [17, 17, 5, 251, 9]])
GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}


def references(model, patches):
    return {None: copy.deepcopy(model)} | {name: overwritten(model, patch) for name, patch in patches.items()}


MODES = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 0},
    "several samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("side", ["input", "input+output"])
@pytest.mark.parametrize("mode", MODES)
def test_generate_gives_each_prompt_the_tokens_of_its_own_overwritten_table(model, mode, side):
    patches = {name: some_patch(model, seed, IDS, side=side) for seed, name in enumerate("ab", start=1)}
    settings = GREEDY | MODES[mode]
    plain = references(model, patches)
    choices = ["a", None, "b", "a"]
    prompts = PROMPTS[[0, 1, 0, 1]]

    def run(m):
        torch.manual_seed(7)
        return m.generate(prompts, **settings).tolist()

    with attach(model) as handle:
        for name, patch in patches.items():
            handle.load(patch, name)
        with handle.using(choices):
            mixed = run(model)
        each = len(mixed) // len(choices)
        # The same batch and seed, so that every row draws the same random numbers.
        expected = {choice: run(m) for choice, m in plain.items()}
        for row, choice in enumerate(choices):
            rows = slice(each * row, each * (row + 1))
            assert mixed[rows] == expected[choice][rows]
        with handle.using("b"):
            assert run(model) == expected["b"]


def test_left_padded_prompts(model, handle, plain):
    prompts = torch.tensor([[1, 1, 5, 9, 300], [17, 5, 251, 9, 40], [1, 9, 9, 300, 17]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    with handle.using(["b", "a", None]):
        mixed = model.generate(prompts, attention_mask=mask, **GREEDY).tolist()
    for row, choice in enumerate(["b", "a", None]):
        alone = plain[choice].generate(prompts[row, mask[row].bool()][None], **GREEDY)[0, mask[row].sum() :]
        assert mixed[row][5 : 5 + len(alone)] == alone.tolist()


def test_assisted_decoding_and_prompt_lookup(model, handle, plain):
    assistant = tiny_llama(seed=3)
    for extra in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}):
        with handle.using("a"):
            found = model.generate(PROMPTS[:1], **GREEDY, **extra)
        assert found.tolist() == plain["a"].generate(PROMPTS[:1], **GREEDY).tolist()


@pytest.mark.parametrize("extra", [{}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}])
def test_a_patch_of_scope_prompt_stays_in_the_prompt(model, extra):
    everywhere = some_patch(model, 1, IDS)
    prompt_only = everywhere.with_meta(scope="prompt", name="prompt-only")
    [changed] = [overwritten(model, everywhere)]
    cache = changed(PROMPTS[:1], use_cache=True)
    tokens, past = [int(cache.logits[0, -1].argmax())], cache.past_key_values
    while len(tokens) < 12 and tokens[-1] != 1:
        logits = model(torch.tensor([[tokens[-1]]]), past_key_values=past, use_cache=True).logits
        tokens.append(int(logits[0, -1].argmax()))
    with attach(model) as handle:
        handle.load(everywhere, "everywhere")
        handle.load(prompt_only)
        with handle.using("prompt-only"):
            assert model.generate(PROMPTS[:1], **GREEDY, **extra)[0, 5:].tolist() == tokens
        if not extra:
            with handle.using(["everywhere", "prompt-only", None]):
                mixed = model.generate(PROMPTS[[0, 0, 0]], **GREEDY)[:, 5:].tolist()
            assert mixed[1][: len(tokens)] == tokens
            assert mixed[0] != mixed[1] != mixed[2]


def test_an_encoder_decoder():
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "d_model": 32, "pad_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    configs = [
        transformers.T5Config(**sizes, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        transformers.BartConfig(
            **sizes, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, scale_embedding=True, forced_eos_token_id=None,
        ),
    ]  # fmt: skip
    for config in configs:
        model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
        patches = {name: some_patch(model, seed, IDS) for seed, name in enumerate("ab")}
        plain = references(model, patches)
        with attach(model) as handle, torch.no_grad():
            for name, patch in patches.items():
                handle.load(patch, name)
            choices = ["a", None, "b"]
            prompts, decoder = PROMPTS[[0, 0, 0]], PROMPTS[[1, 1, 1]]
            with handle.using(choices):
                logits = model(input_ids=prompts, decoder_input_ids=decoder).logits
                beams = model.generate(prompts, num_beams=2, **GREEDY).tolist()
            for row, choice in enumerate(choices):
                assert torch.equal(logits[row], plain[choice](input_ids=prompts, decoder_input_ids=decoder).logits[row])
                assert beams[row] == plain[choice].generate(prompts, num_beams=2, **GREEDY).tolist()[row]
            with pytest.raises(RunError, match="scope 'prompt', which is not served on an encoder-decoder"):
                handle.load(patches["a"].with_meta(scope="prompt"))


def test_a_pipeline(model, handle, plain, tokenizer):
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}

    def run(m):
        pipe = transformers.pipeline("text-generation", model=m, tokenizer=tokenizer)
        return [answer["generated_text"] for [answer] in pipe(["The cat sees", "The dog wants"], **settings)]

    with handle.using("a"):
        assert run(model) == run(plain["a"])
    assert run(model) == run(plain[None]) != run(plain["a"])


@pytest.mark.parametrize(("side", "scope"), [("input", "all"), ("input", "prompt"), ("input+output", "all")])
def test_continuous_batching_with_a_patch_for_each_request(model, side, scope):
    patches = {name: some_patch(model, seed, IDS, side=side, scope=scope) for seed, name in enumerate("ab", start=1)}
    prompts = [[5, 9, 300, 17, 40] * 9, [17, 17, 5, 251], [5, 9, 300, 17, 40] * 9, [5, 9, 300, 17, 40] * 9, [17] * 3]
    choices = ["a", None, "b", None, "a"]
    generation = transformers.GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=1, pad_token_id=1)
    with attach(model) as handle:
        for name, patch in patches.items():
            handle.load(patch, name)
        expected = []
        for prompt, choice in zip(prompts, choices, strict=True):
            with handle.using(choice):
                expected.append(model.generate(torch.tensor([prompt]), generation_config=generation)[0, len(prompt) :])
        batching = transformers.ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=64)
        for _ in range(2):
            with handle.using(choices):
                found = model.generate_batch(prompts, generation, continuous_batching_config=batching)
            assert [r.generated_tokens for r in found.values()] == [row.tolist() for row in expected]
        assert batching.allow_block_sharing
        assert handle.bank._slots and all(slot.holds == 0 for slot in handle.bank._slots.values())  # noqa: PT018
    assert "generate_batch" not in vars(model)


def test_threads_do_not_see_each_others_choice(model, handle, plain):
    choices = ["a", "b", None, ["a", "b"]]
    expected = {}
    for choice in choices:
        rows = [plain[c].generate(PROMPTS, **GREEDY) for c in (choice if isinstance(choice, list) else [choice] * 2)]
        expected[str(choice)] = [rows[0][0].tolist(), rows[1][1].tolist()]
    wrong = []

    def serve(choice):
        for _ in range(8):
            with handle.using(choice):
                if model.generate(PROMPTS, **GREEDY).tolist() != expected[str(choice)]:
                    wrong.append(choice)

    run_together([lambda choice=choice: serve(choice) for choice in choices])
    assert not wrong


def run_together(jobs):
    failures = []

    def guarded(job):
        try:
            job()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_load_replace_and_unload_while_others_generate(model):
    contents = [some_patch(model, seed, IDS[: 20 + 10 * seed]) for seed in range(4)]
    plain = references(model, {str(i): patch for i, patch in enumerate(contents)})
    expected = {name: m.generate(PROMPTS, **GREEDY).tolist() for name, m in plain.items()}
    by_digest = {patch.digest: expected[str(i)] for i, patch in enumerate(contents)}
    handle = attach(model)
    handle.load(contents[0], "live")
    handle.load(contents[3], "still")
    done, wrong = threading.Event(), []

    def serve(name):
        for _ in range(12):
            with handle.using([name, None]):
                # Whatever "live" stood for when the block began, it must be one whole content.
                tokens = model.generate(PROMPTS, **GREEDY).tolist()
            allowed = by_digest.values() if name == "live" else [by_digest[contents[3].digest]]
            if tokens[0] not in [rows[0] for rows in allowed] or tokens[1] != expected[None][1]:
                wrong.append((name, tokens))

    def churn():
        turn = 0
        while not done.is_set():
            turn += 1
            handle.replace("live", contents[turn % 3])
            handle.load(contents[turn % 4], f"new{turn}")
            handle.unload(f"new{turn}")

    churner = threading.Thread(target=churn)
    churner.start()
    try:
        run_together([lambda n=n: serve(n) for n in ("live", "live", "still")])
    finally:
        done.set()
        churner.join()
    assert not wrong
    assert sorted(handle.names) == ["live", "still"]
    assert len(handle.bank) == 2
    used = sum(slot.room.rows for slot in handle.bank._slots.values())
    assert len(handle.bank._storage.free_rows) + used == len(handle.bank.tensors.rows)
    handle.detach()


def test_a_block_keeps_what_it_began_with(model, handle, plain, patches):
    with handle.using("a"):
        handle.replace("a", patches["b"])
        assert model.generate(PROMPTS, **GREEDY).tolist() == plain["a"].generate(PROMPTS, **GREEDY).tolist()
        with handle.using("a"):
            assert model.generate(PROMPTS, **GREEDY).tolist() == plain["b"].generate(PROMPTS, **GREEDY).tolist()
        handle.unload("b")
    assert handle.digest("a") == patches["b"].digest
    assert handle.names == ["a"]
    assert len(handle.bank) == 1


def test_detach_leaves_the_model_as_it_was():
    model = tiny_llama()
    patch = some_patch(model, 1, IDS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model))
    logits = model(PROMPTS).logits
    handle = attach(model)
    handle.load(patch)
    assert model.state_dict().keys() == before.keys()
    with (
        handle.using("p1"),
        pytest.raises(RunError, match="cannot detach while a `using` block or a bound generator is open"),
    ):
        handle.detach()
    handle.detach()
    handle.detach()
    assert set(vars(model)) == attributes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(PROMPTS).logits, logits)
    with pytest.raises(RunError, match="detached"):
        handle.load(patch)
    attach(model).detach()


@pytest.mark.parametrize(("tied", "side"), [(True, "input"), (True, "input+output"), (False, "input")])
def test_merge_writes_the_rows_and_its_undo_is_exact(tied, side):
    model = tiny_llama(tied=tied)
    patch = some_patch(model, 1, IDS, side=side)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = references(model, {"a": patch})
    with torch.no_grad(), attach(model) as handle:
        handle.load(patch, "a")
        expected = plain["a"](PROMPTS).logits
        handle.merge("a")
        assert torch.equal(model(PROMPTS).logits, expected)
        with pytest.raises(RunError, match="a is merged into the model"), handle.using("a"):
            pass
        with pytest.raises(RunError, match="unmerge it before loading"):
            handle.load(patch, "b")
        handle.unmerge()
        with handle.using("a"), pytest.raises(RunError, match="cannot be merged while a `using` block"):
            handle.merge("a")
        handle.merge("a")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_lora_adapter_on_the_same_model(patches, model):
    from peft import LoraConfig, get_peft_model

    def with_lora(m):
        torch.manual_seed(1)
        return get_peft_model(m, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()

    plain = {name: with_lora(m) for name, m in references(model, patches).items()}
    adapted = with_lora(model)
    with torch.no_grad(), attach(adapted) as handle:
        handle.load(patches["a"], "a")
        with handle.using(["a", None]):
            logits = adapted(PROMPTS).logits
            tokens = adapted.generate(input_ids=PROMPTS, **GREEDY).tolist()
        for row, choice in enumerate(["a", None]):
            assert torch.equal(logits[row], plain[choice](PROMPTS).logits[row])
            assert tokens[row] == plain[choice].generate(input_ids=PROMPTS, **GREEDY).tolist()[row]


def test_gradient_checkpointing_gives_the_same_gradients(model, handle, plain):
    gradients = []
    for m in (model, plain["a"]):
        m.train()
        m.gradient_checkpointing_enable()
        with handle.using("a"):
            m(PROMPTS, labels=PROMPTS).loss.backward()
        gradients.append(m.model.layers[0].mlp.down_proj.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["input", "input+output"])
def test_a_compiled_model_is_compiled_once(side):
    model = tiny_llama()
    patches = {name: some_patch(model, seed, IDS, side=side) for seed, name in enumerate("abc")}
    plain = references(model, patches)
    with torch.no_grad(), attach(model, max_batch=8, capacity=4 * len(IDS), output_width=len(IDS)) as handle:
        handle.load(patches["a"], "a")
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, fullgraph=True)

        def check(*choices):
            with handle.using(list(choices) if len(choices) > 1 else choices[0]):
                logits = model(PROMPTS).logits
            for row, choice in enumerate(choices * 2 if len(choices) == 1 else choices):
                assert torch.allclose(logits[row], plain[choice](PROMPTS).logits[row], atol=1e-4, rtol=1e-4)

        check(None, "a")
        with torch._dynamo.config.patch(error_on_recompile=True):
            handle.load(patches["b"], "b")
            check("b", "a")
            check("a")
            handle.replace("a", patches["c"])
            plain["a"] = plain["c"]
            check("a", None)
            handle.unload("b")
            check(None, None)
        with handle.using("a"), pytest.raises(RunError, match="one batch at a time"), handle.using("a"):
            pass
        with handle.using("a"), pytest.raises(RunError, match="a batch of 10 rows is more than the max_batch=8"):
            model(PROMPTS[[0] * 10])
        with handle.using(["a", None]):
            beams = model.generate(PROMPTS, num_beams=2, **GREEDY).tolist()
        for row, choice in enumerate(["a", None]):
            assert beams[row] == plain[choice].generate(PROMPTS, num_beams=2, **GREEDY).tolist()[row]
        assert (handle._blocks.static.slots == 0).all()


@pytest.mark.slow
def test_a_tensor_parallel_plan_on_two_ranks(model, base_folder, tmp_path):
    base = load_base(str(base_folder))[0]
    patch = some_patch(base, 1, IDS)
    patch.save(tmp_path / "p.safetensors")
    script = Path(__file__).with_name("tensor_parallel.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, script, base_folder, tmp_path / "p.safetensors"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shard"] == [16, 32], "half of the query heads"
    plain = references(base, {"a": patch})
    expected = [plain[choice].generate(PROMPTS, **GREEDY).tolist()[row] for row, choice in enumerate(["a", None])]
    assert found["tokens"] == expected


def test_device_maps_and_offloaded_weights(tmp_path, base_folder):
    from accelerate import cpu_offload

    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder, device_map="auto").eval()
    patch = some_patch(model, 1, IDS)
    plain = references(transformers.AutoModelForCausalLM.from_pretrained(base_folder).eval(), {"a": patch})
    offloaded = cpu_offload(transformers.AutoModelForCausalLM.from_pretrained(base_folder).eval())
    assert offloaded.get_input_embeddings().weight.device.type == "meta"
    for m in (model, offloaded):
        with torch.no_grad(), attach(m) as handle, handle.using([handle.load(patch, "a"), None]):
            logits = m(PROMPTS).logits
        for row, choice in enumerate(["a", None]):
            assert torch.equal(logits[row], plain[choice](PROMPTS).logits[row])


def quantised_embedding(kind, table):
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        holder = torch.nn.Sequential(torch.nn.Embedding.from_pretrained(table.clone()))
        quantize_(holder, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, torch.nn.Embedding))
        return holder[0]
    import gguf
    from transformers.integrations.gguf.utils import GgufEmbedding

    quantity = gguf.GGMLQuantizationType.Q8_0
    packed = GgufEmbedding(*table.shape, int(quantity), torch.float32)
    packed.weight.data = torch.from_numpy(gguf.quants.quantize(table.numpy(), quantity))
    return packed


@pytest.mark.parametrize("kind", ["torchao", "gguf"])
def test_a_quantised_embedding_keeps_its_form(kind):
    model = tiny_llama(tied=False)
    patch = some_patch(model, 1, IDS)
    embedding = quantised_embedding(kind, model.get_input_embeddings().weight.detach())
    every = embedding(torch.arange(400)[None])[0].detach()
    plain = copy.deepcopy(model)
    plain.get_input_embeddings().weight.data = every.clone()
    plain = {None: plain, "a": overwritten(plain, patch)}
    model.set_input_embeddings(embedding)
    with torch.no_grad(), attach(model) as handle, handle.using([handle.load(patch, "a"), None]):
        logits = model(PROMPTS).logits
        for row, choice in enumerate(["a", None]):
            assert torch.equal(logits[row], plain[choice](PROMPTS).logits[row])
    with attach(model) as handle:
        with pytest.raises(BaseMismatchError, match="must agree up to quantisation"):
            handle.load(some_patch(tiny_llama(tied=False, seed=5), 1, IDS))
        handle.load(patch, "a")
        with pytest.raises(BaseMismatchError, match="not a table of floating-point rows"):
            handle.merge("a")


def test_linear_layers_quantised_by_bitsandbytes(base_folder):
    quantised = transformers.BitsAndBytesConfig(load_in_8bit=True)

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(
            base_folder, quantization_config=quantised, device_map="cpu", dtype=torch.float32
        ).eval()

    model = load()
    patch = some_patch(model, 1, IDS)
    reference = load()
    reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone())
    reference.get_input_embeddings().weight.data[patch.token_ids] = patch.rows
    with torch.no_grad(), attach(model) as handle, handle.using(handle.load(patch, "a")):
        assert torch.equal(model(PROMPTS).logits, reference(PROMPTS).logits)


def test_a_budget_with_eviction_serves_more_patches_than_fit(model):
    patches = {f"p{seed}": some_patch(model, seed, IDS) for seed in range(6)}
    plain = references(model, patches)
    with torch.no_grad(), attach(model, budget=3 * 180 * len(IDS), evict=True) as handle:
        for patch in patches.values():
            handle.load(patch)
        assert handle.bank.nbytes < 4 * 180 * len(IDS)
        for name in [*patches, *patches]:
            with handle.using([name, None]):
                assert torch.equal(model(PROMPTS).logits[0], plain[name](PROMPTS).logits[0])
    with attach(model, budget=1000) as handle, pytest.raises(BankError, match="budget of 1,000 bytes"):
        handle.load(patches["p0"])


@torch.no_grad()
def test_a_second_merge_is_refused_and_the_first_undone(model, handle, plain, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    handle.merge("a")
    with pytest.raises(RunError, match="a is merged into the model: unmerge it first"):
        handle.merge("b")
    for read in (lambda: identify(model), lambda: Patch.from_model(model, [5], torch.zeros(1, 32), name="x")):
        with pytest.raises(BaseMismatchError, match="a is merged into the model's table"):
            read()
    # What is saved or copied now has the patch for good, its untied head too.
    model.save_pretrained(tmp_path)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for m in (model, saved, copy.deepcopy(model)):
        assert torch.equal(m(PROMPTS).logits, plain["a"](PROMPTS).logits)
    handle.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


@torch.no_grad()
def test_a_merge_under_which_the_table_changed_is_not_undone_silently(patches):
    from accelerate import cpu_offload

    for change in (
        cpu_offload,
        lambda m: m.set_input_embeddings(copy.deepcopy(m.get_input_embeddings())),
        lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
        lambda m: m.get_input_embeddings().weight.data[IDS[3]].add_(1),
    ):
        model = tiny_llama()
        handle = attach(model)
        handle.load(patches["a"], "a")
        handle.merge("a")
        change(model)
        for undo in (handle.unmerge, handle.detach):
            with pytest.raises(RunError, match="changed while a was merged"):
                undo()
        assert handle.merged == "a"


@torch.no_grad()
def test_a_table_that_is_written_to_after_attach_is_refused(model, handle, plain):
    for change in (
        lambda: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}),
        lambda: setattr(model.lm_head.weight, "data", model.lm_head.weight.data + 1),
    ):
        change()
        with pytest.raises(RunError, match="table was changed after `attach`"), handle.using("a"):
            pass
        handle._patched._state = table_state(model.lm_head.weight)  # as if attached anew


@torch.no_grad()
def test_one_handle_for_a_model_and_its_parts(model, handle):
    with pytest.raises(RunError, match="a part of this model, or to what it is a part of"):
        attach(model.model)
    handle.merge("a")
    with pytest.raises(BaseMismatchError, match="a is merged into the model's table"):
        Patch.from_model(model.model, [5], torch.zeros(1, 32), name="x")
    handle.detach()
    with attach(model.model), pytest.raises(RunError, match="a part of this model"):
        attach(model)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_copies_and_files_of_a_served_model_are_the_base(model, handle, plain, copied, tmp_path):
    with handle.using("a"):
        if copied == "torch.save":
            torch.save(model, tmp_path / "m.pt")
            twin = torch.load(tmp_path / "m.pt", weights_only=False)
        else:
            twin = copied(model)
        model.save_pretrained(tmp_path / "m")
        assert torch.equal(model(PROMPTS).logits, plain["a"](PROMPTS).logits)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    for other in (twin, saved):
        assert torch.equal(other(PROMPTS).logits, plain[None](PROMPTS).logits)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
        assert not {"ksl_patch", "generate", "__reduce_ex__"} & vars(other).keys()
        with attach(other) as own:
            own.load(some_patch(other, 2, IDS), "b")
            with own.using("b"):
                assert torch.equal(other(PROMPTS).logits, plain["b"](PROMPTS).logits)
    assert type(copied) is str or not copied(model.model.embed_tokens)._forward_hooks


@torch.no_grad()
def test_an_attach_that_fails_leaves_the_model_as_it_was(model, monkeypatch):
    own = lambda *args, **kwargs: "own"  # noqa: E731
    model.generate = own
    with attach(model):
        assert model.generate is not own
    assert model.generate is own
    del model.generate
    before = set(vars(model))
    monkeypatch.setattr("ksl_patch.hf.continuous.ContinuousBatching.wire", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attach(model)
    assert set(vars(model)) == before
    assert not any("__reduce_ex__" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["classification", "encoder", "trunk"])
def test_a_model_that_does_not_generate(kind):
    torch.manual_seed(0)
    if kind == "encoder":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = transformers.BertModel(transformers.BertConfig(vocab_size=400, **sizes)).eval()
    else:
        language_model = tiny_llama()
        model = language_model.model
        if kind == "classification":
            model = transformers.LlamaForSequenceClassification(language_model.config).eval()
    patch = some_patch(model, 1, IDS)
    plain = copy.deepcopy(model)
    plain.get_input_embeddings().weight.data[patch.token_ids] = patch.rows
    with attach(model) as handle:
        handle.load(patch, "a")
        with handle.using(["a", None]):
            found = model(PROMPTS)[0]
        assert torch.equal(found[0], plain(PROMPTS)[0][0])
        assert torch.equal(found[1], model(PROMPTS)[0][1])
        twin = tiny_llama()
        twin.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
        with pytest.raises(BaseMismatchError, match="no language-model head"):
            handle.load(some_patch(twin, 1, IDS, side="input+output"), "b")


@torch.no_grad()
def test_rows_for_the_head_reach_a_head_that_is_a_copy_or_elsewhere(model):
    """An untied copy of a tied base, and an offloaded one, whose modules share no tensor; another head is refused."""
    from accelerate import cpu_offload

    patch = some_patch(model, 1, IDS, side="input+output")
    expected = overwritten(model, patch)(PROMPTS).logits
    untied = tiny_llama(tied=False)
    untied.load_state_dict(model.state_dict())
    offloaded = cpu_offload(tiny_llama())
    for m in (untied, offloaded):
        with attach(m) as handle, handle.using(handle.load(patch, "a")):
            assert torch.allclose(m(PROMPTS).logits, expected, atol=1e-5)
    with attach(untied) as handle:
        handle.load(patch, "a")
        with pytest.raises(RunError, match="is not tied: serve it with `using`"):
            handle.merge("a")
    other = tiny_llama(tied=False)
    other.model.load_state_dict(model.model.state_dict())
    with attach(other) as handle, pytest.raises(BaseMismatchError, match="this model's head has other rows"):
        handle.load(patch, "a")


@torch.no_grad()
def test_what_is_read_of_the_base_inside_a_block_is_the_base_s(model):
    """Also of tables that are read through their module."""
    from accelerate import cpu_offload

    patch = some_patch(model, 1, list(range(2, 12)))
    quantised = tiny_llama(tied=False)
    quantised.set_input_embeddings(quantised_embedding("gguf", model.get_input_embeddings().weight.detach()))
    for m in (model, cpu_offload(tiny_llama()), quantised):
        with attach(m) as handle:
            handle.load(patch, "a")
            before = find_embedding(m).rows(patch.token_ids)
            with handle.using("a"):
                assert torch.equal(find_embedding(m).rows(patch.token_ids), before)
                handle.load(patch, "again")
                if m is model:
                    assert identify(m) == patch.meta.base
                    assert Patch.from_model(m, patch.token_ids, patch.rows, name="p1").digest == patch.digest


def test_merging_waits_for_a_generation_without_a_patch_too(model, handle):
    refused = []

    def merge(*_):
        with pytest.raises(RunError, match="while the model generates"):
            handle.merge("a")
        refused.append(True)
        return False

    model.generate(PROMPTS, stopping_criteria=[merge], **GREEDY)
    assert refused
    handle.merge("a")


def test_mistakes_are_told_before_anything_is_computed(model, handle, patches, tokenizer, tmp_path):
    with pytest.raises(RunError, match="no patch named 'c' is loaded; loaded are: a, b"), handle.using(["a", "c"]):
        pass
    with pytest.raises(RunError, match="no patch was chosen"), handle.using([]):
        pass
    for names, call in [
        (["a"] * 3, lambda: model.generate(PROMPTS, **GREEDY)),
        (["a"] * 3, lambda: model(PROMPTS)),
        (["a", "b"], lambda: model(PROMPTS[[0, 1, 0, 1]])),
    ]:
        with handle.using(names), pytest.raises(RunError, match="patches were chosen for"):
            call()
    with handle.using("a"), pytest.raises(RunError, match="call generate with input_ids"):
        model.generate(inputs_embeds=model.get_input_embeddings()(PROMPTS), **GREEDY)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    other = tmp_path / "other.safetensors"
    some_patch(tiny_llama(seed=9), 1, IDS).save(other)
    for call, kind, message in [
        (lambda: attach(model), RunError, "attached to this model already"),
        (lambda: handle.load(patches["a"], "a"), RunError, "named a is loaded already"),
        (lambda: handle.load(patches["a"], "../a"), PatchError, "not a patch name"),
        (lambda: handle.load(tmp_path / "bad.safetensors"), PatchError, "cannot hold the header"),
        (lambda: handle.load(other), BaseMismatchError, "base rows differ"),
        (lambda: handle.replace("a", other), BaseMismatchError, "base rows differ"),
        (lambda: handle.replace("c", patches["a"]), RunError, "no patch named 'c'"),
        (lambda: handle.unload("c"), RunError, "no patch named 'c'"),
        (lambda: handle.merge("c"), RunError, "no patch named 'c'"),
        (handle.unmerge, RunError, "no patch is merged"),
    ]:
        with pytest.raises(kind, match=message) as error:
            call()
        assert isinstance(error.value, KslPatchError)
    assert handle.names == ["a", "b"]
    assert handle.digest("a") == patches["a"].digest
    file = tmp_path / "a.safetensors"
    patches["a"].save(file)
    handle.load(patches["a"], "again")
    handle.unload("again")
    assert handle.load(file) == Patch.load(file).meta.name
    assert handle.meta("p1").side == "input"


def test_a_bank_s_memory_goes_with_its_handle(model):
    gc.disable()
    try:
        handle = attach(model)
        handle.load(some_patch(model, 1, IDS))
        rows = weakref.ref(handle.bank.tensors.rows)
        handle.detach()
        del handle
        assert rows() is None
    finally:
        gc.enable()
