"""Patches in the real vLLM engine, beside transformers models whose table was overwritten by hand."""

import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_cli, tiny_llama
from test_hf import overwritten, some_patch

from ksl_patch import Patch

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
IDS = list(range(2, 372, 12))
PATCHES = ("a", "b", "c")
SETTINGS = {"ksl_patch": {"max_rows": 64}}


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        patch.setenv("KSL_PATCH_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_llama(hidden_size=128)  # vLLM's attention on CPUs needs heads of 32


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def patches(model):
    return {name: some_patch(model, seed, IDS) for seed, name in enumerate(PATCHES)}


@pytest.fixture(scope="module")
def plain(model, patches):
    return {None: model} | {name: overwritten(model, patch) for name, patch in patches.items()}


def start(folder, **options):
    from vllm import LLM

    defaults = {
        "dtype": "float32", "max_model_len": 160, "enable_lora": True, "max_loras": 4, "max_cpu_loras": 16,
        "max_lora_rank": 8, "additional_config": SETTINGS, "disable_log_stats": False,
    }  # fmt: skip
    return LLM(folder, **(defaults | options))


@pytest.fixture(scope="module")
def engine(folder):
    """Eager, attention open to LoRA too, prefix caching, prompts in chunks of 32 tokens.

    Not the head: vLLM 0.32 ends with an error when prompt log-probabilities meet a head that takes LoRA on a CPU.
    """
    targets = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"]
    sizes = {"block_size": 32, "max_num_batched_tokens": 32, "max_num_seqs": 8}
    llm = start(folder, enforce_eager=True, lora_target_modules=targets, **sizes)
    yield llm
    del llm
    gc.collect()


@pytest.fixture(scope="module")
def eager(folder):
    """Another without chunks, and without LoRA of attention."""
    llm = start(folder, lora_target_modules=["embed_tokens"], enforce_eager=True)
    yield llm
    del llm
    gc.collect()


@pytest.fixture
def another(folder):
    """Start another engine for one test."""
    started = []

    def start_another(**options):
        started.append(start(folder, lora_target_modules=["embed_tokens"], **options))
        return started[0]

    yield start_another
    started.clear()
    gc.collect()


def prompts(*lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 400, (length,), generator=g).tolist() for length in lengths]


def greedy(llm, prompts, requests, count=20, **more):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **more)
    return llm.generate(
        [{"prompt_token_ids": p} for p in prompts], params, lora_request=list(requests), use_tqdm=False
    )  # fmt: skip


def tokens(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


@torch.no_grad()
def expected(model, prompt, count=20):
    settings = {"do_sample": False, "max_new_tokens": count, "eos_token_id": -1, "pad_token_id": 1}
    return model.generate(input_ids=torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


@torch.no_grad()
def logprobs(model, ids):
    """Log-probability of each token but the first, given those before it."""
    scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return scores.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def check_mixed(llm, patches, plain, texts=None, count=20):
    from ksl_patch.vllm import lora_request

    texts = texts or prompts(5, 40, 17, 60)
    choices = [None, *patches]
    requests = [None, *(lora_request(patch, name) for name, patch in patches.items())]
    wanted = {choice: [expected(plain[choice], prompt, count) for prompt in texts] for choice in choices}
    assert len({str(of_one) for of_one in wanted.values()}) == 4  # the patches do something
    wrong = []
    for turn in range(4):
        turned = requests[turn:] + requests[:turn]
        found = tokens(greedy(llm, texts, turned, count))
        for place in range(4):
            choice = choices[(place + turn) % 4]
            if found[place] != wanted[choice][place]:
                wrong.append((turn, place, choice))
    assert not wrong


def test_every_row_of_a_mixed_batch_is_its_own_model_s(engine, patches, plain):
    check_mixed(engine, patches, plain)


def test_compiled(another, patches, plain):
    llm = another()  # vLLM itself turns compilation off on CPUs where there is LoRA
    assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
    check_mixed(llm, patches, plain)


def test_a_preempted_request_goes_on_with_its_patch(another, patches, plain):
    llm = another(enforce_eager=True, block_size=32, num_gpu_blocks_override=9, max_model_len=128)
    check_mixed(llm, patches, plain, prompts(60, 60, 60, 60, seed=3), 60)
    assert next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > 0


def test_transformers_own_implementation_of_a_model(another, patches, plain):
    """It gives token ids as [1, T]."""
    check_mixed(another(enforce_eager=True, model_impl="transformers"), patches, plain)


def test_warm_up_batches_between_requests(eager, patches, plain):
    """What an idle rank of data parallelism computes, with adapters of the ids 1, 2, ... that are somebody's here."""
    texts = prompts(5, 40, 17, 60)
    own = {n: adapter(n, i, request(patches[n]).lora_path) for i, n in enumerate(PATCHES, 1)}
    for _ in range(2):
        found = tokens(greedy(eager, texts, [None, *own.values()]))
        wanted = zip((None, *PATCHES), texts, strict=True)
        assert found == [expected(plain[choice], text) for choice, text in wanted]
        eager.collective_rpc("execute_dummy_batch")


def test_a_patch_that_was_read_needs_its_file_no_more(another, patches, plain, model, tmp_path):
    """vLLM puts adapters aside, and takes them up again inside a step, where an error ends the engine."""
    llm = another(enforce_eager=True, max_loras=1, max_cpu_loras=1)
    text = prompts(20)[0]
    for name in ("a", "b"):
        patches[name].save(tmp_path / f"{name}.safetensors")
    first, second = (adapter(n, i, tmp_path / f"{n}.safetensors") for i, n in enumerate(("a", "b"), 40))
    for turn in range(2):
        for choice, key in ((first, "a"), (second, "b")):
            assert tokens(greedy(llm, [text], [choice])) == [expected(plain[key], text)], turn
        (tmp_path / "a.safetensors").unlink(missing_ok=True)


def test_what_cannot_be_served_fails_its_own_request(eager, patches, plain, model, tmp_path):
    good, text = request(patches["a"], "a"), prompts(20)[0]
    for what, (bad, why) in refusals(model, tmp_path).items():
        found = greedy(eager, [text] * 3, [good, bad, None])
        assert [output.outputs[0].finish_reason for output in found] == ["length", "error", "length"], what
        assert tokens(found) == [expected(plain["a"], text), [], expected(model, text)]
        assert re.search(why, found[1].outputs[0].stop_reason), what


def test_a_base_that_was_reloaded_takes_its_own_patches_alone(tokenizer, tmp_path):
    first, other = (tiny_llama(hidden_size=128, seed=seed, tied=False) for seed in (8, 9))
    for name, model in (("first", first), ("other", other)):  # vLLM does not reload a tied head
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    llm = start(str(tmp_path / "first"), lora_target_modules=["embed_tokens"], enforce_eager=True)
    text, old, new = prompts(20)[0], some_patch(first, 3, IDS), some_patch(other, 3, IDS)
    assert tokens(greedy(llm, [text], [request(old, "old")])) == [expected(overwritten(first, old), text)]
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path / "other")})
    found = greedy(llm, [text] * 3, [request(old, "old"), None, request(new, "new")])
    assert "31 of the patch's 31 base rows differ" in found[0].outputs[0].stop_reason
    assert tokens(found)[1:] == [expected(other, text), expected(overwritten(other, new), text)]


def test_speculative_decoding(another, patches, model, plain):
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    llm = another(enforce_eager=True, speculative_config=speculative)
    texts = [(prompt * 8)[:40] for prompt in prompts(5, 6, 7, 8)]  # what repeats is guessed
    check_mixed(llm, patches, plain, texts)
    both = output_patch(model)
    check_one(llm, both, overwritten(model, both), texts)
    drafted = next(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_drafts")
    assert drafted > 0


def test_two_tensor_parallel_ranks(another, patches, plain, model, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    llm = another(enforce_eager=True, tensor_parallel_size=2)
    check_mixed(llm, patches, plain)
    both = output_patch(model)
    check_one(llm, both, overwritten(model, both))
    with pytest.raises(Exception, match="base rows differ"):
        llm.llm_engine.add_lora(request(some_patch(tiny_llama(hidden_size=128, seed=9), 1, IDS)))


def output_patch(model, seed=5, separate=False):
    g = torch.Generator().manual_seed(seed)
    rows, head = (0.3 * torch.randn(len(IDS), 128, generator=g) for _ in range(2))
    output_rows = head if separate else None
    return Patch.from_model(model, IDS, rows, name="both", side="input+output", output_rows=output_rows)


def request(patch, name=None):
    from ksl_patch.vllm import lora_request

    return lora_request(patch, name)


def with_head(model, patch):
    """The model with the patch's rows in its table, and its head's own."""
    model = overwritten(model, input_only(patch))
    model.lm_head.weight.data[patch.token_ids] = patch.output_rows
    return model


def check_one(llm, patch, reference, texts=None):
    texts = texts or prompts(7, 45)
    found = tokens(greedy(llm, texts, [request(patch)] * len(texts)))
    assert found == [expected(reference, prompt) for prompt in texts]


@pytest.mark.parametrize("separate", [False, True])
def test_the_head_of_a_tied_model_is_patched_too(engine, model, plain, separate):
    patch = output_patch(model, separate=separate)
    reference = with_head(model, patch) if separate else overwritten(model, patch)
    texts = prompts(7, 45, 50, 9)
    found = greedy(engine, texts, [request(patch), None, request(patch), None], prompt_logprobs=0, logprobs=0)
    for place, (prompt, output) in enumerate(zip(texts, found, strict=True)):
        own = reference if place % 2 == 0 else model
        ids = list(output.outputs[0].token_ids)
        assert ids == expected(own, prompt)
        wanted = logprobs(own, prompt + ids)
        given = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
        given += [next(iter(entry.values())).logprob for entry in output.outputs[0].logprobs]
        torch.testing.assert_close(torch.tensor(given), wanted, rtol=0, atol=2e-3)
    assert expected(reference, texts[0]) != expected(overwritten(model, input_only(patch)), texts[0])


def test_log_probabilities_of_a_prompt_that_fills_its_batches(engine, model):
    """Chunks of 32 tokens are the whole batch: the logits' rows are all positions and not those that are sampled."""
    patch = output_patch(model)
    own = overwritten(model, patch)
    greedy(engine, prompts(5, 6, 7), [None] * 3)  # what is left of it is not for what comes
    for choice, reference in ((request(patch), own), (None, model)):
        prompt = prompts(70, seed=4)[0]
        output = greedy(engine, [prompt], [choice], 2, prompt_logprobs=0)[0]
        given = torch.tensor([next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]])
        torch.testing.assert_close(given, logprobs(reference, prompt), rtol=0, atol=2e-3)
    assert (logprobs(own, prompt) - logprobs(model, prompt)).abs().max() > 0.1


def input_only(patch):
    return Patch(patch.token_ids, patch.rows, patch.base_rows, replace(patch.meta, side="input"))


def test_several_samples_and_beams(engine, patches, plain):
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    prompt, own = [*IDS[:4], *prompts(12)[0]], plain["b"]
    params = SamplingParams(n=3, temperature=1.0, max_tokens=10, logprobs=0, ignore_eos=True)
    samples = engine.generate(
        [{"prompt_token_ids": prompt}], params, lora_request=request(patches["b"], "b"), use_tqdm=False
    )
    assert len({tuple(sample.token_ids) for sample in samples[0].outputs}) > 1
    for sample in samples[0].outputs:
        wanted = logprobs(own, prompt + list(sample.token_ids))[len(prompt) - 1 :]
        given = [entry[token].logprob for entry, token in zip(sample.logprobs, sample.token_ids, strict=True)]
        torch.testing.assert_close(torch.tensor(given), wanted, rtol=0, atol=2e-3)
    beams = engine.beam_search(
        [{"prompt_token_ids": prompt}],
        BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True),
        lora_request=request(patches["b"], "b"),
    )
    for beam in beams[0].sequences:
        wanted = logprobs(own, list(beam.tokens))[len(prompt) - 1 :].sum()
        assert abs(beam.cum_logprob - float(wanted)) < 1e-2
        assert abs(beam.cum_logprob - float(logprobs(plain[None], list(beam.tokens))[len(prompt) - 1 :].sum())) > 0.1


def test_more_patches_than_slots(engine, model):
    many = [some_patch(model, 100 + seed, IDS[: 5 + seed]) for seed in range(12)]
    texts = prompts(*range(10, 22))
    found = tokens(greedy(engine, texts, [request(patch, f"n{i}") for i, patch in enumerate(many)]))
    assert found == [expected(overwritten(model, patch), text) for patch, text in zip(many, texts, strict=True)]


def test_two_contents_of_a_name_share_no_block_and_no_slot(engine, patches, plain):
    first, second = request(patches["a"], "sw"), request(patches["b"], "sw")
    prompt = prompts(100, seed=8)[0]
    for choice, key in ((first, "a"), (None, None), (second, "b"), (first, "a"), (second, "b")):
        output = greedy(engine, [prompt], [choice])[0]
        assert tokens([output])[0] == expected(plain[key], prompt)
    assert output.num_cached_tokens == 96  # with itself a request shares what it can
    other = prompts(100, seed=9)[0]
    assert [greedy(engine, [other], [r])[0].num_cached_tokens for r in (first, None, second, first)] == [0, 0, 0, 96]
    together = tokens(greedy(engine, [prompt[:30]] * 3, [first, second, None]))
    assert together == [expected(plain[key], prompt[:30]) for key in ("a", "b", None)]


def test_without_the_cache_s_key_the_same_check_fails(folder, tmp_path):
    script = Path(__file__).parent / "vllm_without_key.py"
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process, so that the key can be taken away in it
    run = subprocess.run(
        [sys.executable, script, folder], env=os.environ | settings, capture_output=True, text=True, timeout=300
    )
    result = json.loads(run.stdout.strip().splitlines()[-1])
    assert result == {"with": {"cached": 0, "right": True}, "without": {"cached": 96, "right": False}}, run.stderr


def test_reserved_rows_by_this_package_and_as_a_model_without_it(tmp_path, tokenizer):
    """Prompts are texts: the tokens' names must come through vLLM's tokenizer."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    own = PreTrainedTokenizerFast(tokenizer_object=type(backend).from_str(backend.to_str()), eos_token="</s>")
    own.add_tokens([AddedToken(f"<unused{i}>", special=True, normalized=False) for i in range(8)])
    base, model, first = tmp_path / "base", tiny_llama(hidden_size=128), len(own) - 8
    model.save_pretrained(base)
    own.save_pretrained(base)
    patches = {}
    for name, ids in {"a": [first, first + 1], "b": [first + 2, first + 5]}.items():
        rows = 2 * torch.randn(2, 128, generator=torch.Generator().manual_seed(len(patches)))
        patches[name] = Patch.from_model(model, ids, rows, name=name, tokenizer=own)
        patches[name].save(tmp_path / f"{name}.safetensors")
    asked = [
        ("<unused0><unused1>The dog sees the sea.", "a"), ("The <unused5> dog<unused2>", "b"), ("The dog sees", None),
        ("The dog sees", "a"),
    ]  # fmt: skip
    right = [expected(overwritten(model, patches.get(name)), own(text).input_ids, 16) for text, name in asked]
    assert right[0] != expected(model, own(asked[0][0]).input_ids, 16)
    assert right[2] == right[3]
    files = [str(tmp_path / f"{name}.safetensors") for name in patches]
    assert run_cli("export", *files, "--format", "model", "--base", base, "-o", tmp_path / "model")[0] == 0
    script = Path(__file__).parent / "vllm_reserved.py"
    for folder, plugins, named in ((base, "ksl_patch", True), (tmp_path / "model", "none", False)):
        requests = [(text, str(tmp_path / f"{name}.safetensors") if named and name else None) for text, name in asked]
        run = subprocess.run(
            [sys.executable, script, folder, json.dumps(requests)], env=os.environ | {"VLLM_PLUGINS": plugins},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        printed = [line for line in run.stdout.splitlines() if line.startswith('{"tokens"')]  # engines print too
        found = json.loads(printed[0]) if printed else None
        assert found == {"tokens": right, "imported": named}, run.stderr[-2000:]


def peft_adapter(model, folder, config, seed=0):
    import copy

    from peft import get_peft_model

    torch.manual_seed(seed)
    peft = get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "trainable_tokens_delta" in name or "lora_embedding" in name:
                parameter.normal_(0, 0.3)
    peft.save_pretrained(folder)
    return peft


def adapter(name, number, path):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(path))


def test_peft_s_adapters_give_peft_s_own_tokens_in_one_batch_with_patches(engine, model, patches, plain, tmp_path):
    from peft import LoraConfig, TrainableTokensConfig

    lora = {"r": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    configs = [
        TrainableTokensConfig(token_indices=[9, 5, 17, 300], target_modules=["embed_tokens"]),
        LoraConfig(**lora, trainable_token_indices=[7, 11, 250]),
        LoraConfig(**lora),
    ]
    own = [peft_adapter(model, tmp_path / str(i), config, i) for i, config in enumerate(configs)]
    texts = [[9, 5, 17, 300, 7, 11, 250, *prompt] for prompt in prompts(10, 20, 30, 40, 50)]
    requests = [adapter(f"peft{i}", 900 + i, tmp_path / str(i)) for i in range(3)]
    found = tokens(greedy(engine, texts, [*requests, request(patches["a"], "a"), None]))
    models = [*own, plain["a"], model]
    assert found == [expected(each, text) for each, text in zip(models, texts, strict=True)]
    assert all(expected(each, text) != expected(model, text) for each, text in zip(own, texts, strict=False))


def test_a_lora_of_the_embedding_is_rows_where_it_touches_few(engine, model, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    peft = peft_adapter(model, tmp_path, config)
    A = peft.get_submodule("base_model.model.model.embed_tokens").lora_embedding_A["default"]
    with pytest.raises(Exception, match="changes 400 rows of the embedding"):
        engine.llm_engine.add_lora(adapter("dense", 920, tmp_path))
    with torch.no_grad():
        A[:, 40:] = 0
    peft.save_pretrained(tmp_path / "few")
    text = [*range(2, 30), *prompts(10)[0]]
    found = tokens(greedy(engine, [text], [adapter("few", 921, tmp_path / "few")]))
    # On a tied model PEFT's embedding LoRA leaves the head alone.
    assert found == [expected(peft, text)]


def refusals(model, tmp_path):
    other = tiny_llama(hidden_size=128, seed=9)
    wide = some_patch(model, 1, list(range(2, 80)))
    prompt_only = Patch.from_model(model, IDS, torch.zeros(len(IDS), 128), name="p", scope="prompt")
    larger = tiny_llama(hidden_size=128, vocab_size=500)
    damaged = tmp_path / "damaged.safetensors"
    some_patch(model, 1, IDS).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"123456789")
    return {
        "another base": (request(some_patch(other, 1, IDS)), "31 of the patch's 31 base rows differ"),
        "another shape": (request(some_patch(larger, 1, IDS)), "for a table of shape"),
        "too many rows": (request(wide), "has 78 rows, and a slot has room for 64"),
        "prompt only": (request(prompt_only), "acts on the prompt only"),
        "damaged": (adapter("damaged", 930, damaged), "damaged"),
        "missing": (adapter("missing", 931, "/nowhere/x.safetensors"), "missing"),
    }


def test_what_cannot_be_served_is_refused_in_a_sentence_and_the_engine_goes_on(engine, model, patches, plain, tmp_path):
    for what, (bad, why) in refusals(model, tmp_path).items():
        with pytest.raises(Exception, match=why):
            engine.llm_engine.add_lora(bad)
        assert bad.lora_int_id not in engine.llm_engine.list_loras(), what
    good = request(patches["a"], "a")
    engine.llm_engine.add_lora(good)
    with pytest.raises(Exception, match="given one adapter id"):
        engine.llm_engine.add_lora(adapter("b", good.lora_int_id, request(patches["b"]).lora_path))
    check_mixed(engine, patches, plain)


@pytest.mark.real
def test_the_real_model_s_patches_in_a_mixed_batch(gemma):
    check_real(gemma, 20)


def check_real(gemma, count):
    """Gemma 3 270M in float32, prompts as text, one patch for its head too: tokens of tables overwritten by hand."""
    from ksl_patch.hf import load_base

    model, tokenizer = load_base(str(gemma), dtype=torch.float32)
    texts = [
        "Translate from English to German.\nEnglish: The book is on the table.\nGerman:",
        "The capital of France is",
        "Once upon a time there was a small cat that",
        "One, two, three, four,",
    ]
    ids = sorted({i for text in texts for i in tokenizer(text).input_ids})
    patches = {}
    for seed, name in enumerate(PATCHES):
        g = torch.Generator().manual_seed(seed)
        table = model.get_input_embeddings().weight.detach()
        rows = table[ids] + 0.3 * table.std() * torch.randn(len(ids), table.shape[1], generator=g)
        side = "input+output" if name == PATCHES[-1] else "input"
        patches[name] = Patch.from_model(model, ids, rows, name=name, tokenizer=tokenizer, side=side)
    plain = {None: model} | {name: overwritten(model, patch) for name, patch in patches.items()}
    llm = start(str(gemma), lora_target_modules=["embed_tokens"], enforce_eager=True)
    check_mixed(llm, patches, plain, [tokenizer(text).input_ids for text in texts], count)


def test_an_unknown_vllm_is_left_alone_with_one_clear_line(monkeypatch, caplog):
    import vllm
    from vllm.lora import utils

    from ksl_patch.vllm import plugin

    assert plugin.incompatibility() is None
    monkeypatch.setattr(plugin, "_done", False)
    before = utils._all_lora_classes
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    plugin.register()
    assert "vLLM 0.99.1 is not one it was tested with" in caplog.text or "0.99.1" in plugin.incompatibility()
    monkeypatch.undo()
    monkeypatch.setattr(plugin, "_done", False)
    monkeypatch.delattr(utils, "_all_lora_classes")
    assert "lacks what it builds on: vllm.lora.utils._all_lora_classes" in plugin.incompatibility()
    plugin.register()
    assert not plugin._done
    monkeypatch.undo()
    assert utils._all_lora_classes == before


def test_a_folder_of_a_server_that_wants_signatures_gives_signed_patches_alone(model, tmp_path):
    import asyncio

    from ksl_patch.errors import PatchError
    from ksl_patch.store import sign
    from ksl_patch.store.local import Store
    from ksl_patch.vllm.resolver import PatchResolver
    from ksl_patch.vllm.settings import Settings
    from ksl_patch.vllm.sources import from_folders, from_store

    sign.generate(tmp_path / "own")
    settings = Settings(folders=(str(tmp_path),), key=str(tmp_path / "own.pub"))
    patch = some_patch(model, 1, IDS)
    for name in ("signed", "unsigned", "changed"):
        patch.save(tmp_path / f"{name}.safetensors")
    for name in ("signed", "changed"):
        sign.sign(tmp_path / f"{name}.safetensors", tmp_path / "own")
    some_patch(model, 2, IDS).save(tmp_path / "changed.safetensors")
    assert from_folders(Path("signed.safetensors"), settings).digest == patch.digest
    for name, why in (("unsigned", "is not signed"), ("changed", "is not valid")):
        with pytest.raises(PatchError, match=why):
            from_folders(Path(f"{name}.safetensors"), settings)
    Store().add(patch)
    with pytest.raises(PatchError, match="is not signed"):
        from_store(patch.digest, settings)

    def resolve(name):
        return asyncio.run(PatchResolver(settings).resolve_lora("base", name))

    assert resolve("signed").lora_path == str(Store().path(patch.digest))
    assert [resolve(name) for name in ("unsigned", "changed", "nobody", "../signed", patch.digest)] == [None] * 5
