"""Who sees a choice and for how long: a request that was given a patch is answered with it or raises."""

import asyncio
import contextlib
import contextvars
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import tiny_llama
from test_attach import GREEDY, IDS, PROMPTS, references, run_together
from test_hf import overwritten, some_patch
from torch.nn import functional

from ksl_patch import attach
from ksl_patch.errors import RunError

ENDED = "the block that chose the patch has ended"
NO_CHOICE = "no patch was chosen in this thread or task"


@pytest.fixture
def answers(plain):
    """What each patch, and the base, answers."""
    return {name: m.generate(PROMPTS, **GREEDY).tolist() for name, m in plain.items()}


def generate(model):
    return model.generate(PROMPTS, **GREEDY).tolist()


def in_a_thread(function, *args, **kwargs):
    """The result of a call in a thread of its own, or its exception."""
    results = []

    def call():
        try:
            results.append(function(*args, **kwargs))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return results[0]


# A thread or a step that did not choose, while somebody else has a block open


def test_a_thread_started_in_a_block_is_refused_and_a_bound_one_is_served(model, handle, answers):
    with handle.using("a"):
        for call in (lambda: model.generate(PROMPTS, **GREEDY), lambda: model(PROMPTS)):
            error = in_a_thread(call)
            assert isinstance(error, RunError)
            assert NO_CHOICE in str(error)
            assert "handle.bind" in str(error)
        assert in_a_thread(handle.bind("b")(generate), model) == answers["b"]
        assert in_a_thread(handle.bind(None)(generate), model) == answers[None]
        assert generate(model) == answers["a"]
    assert in_a_thread(generate, model) == answers[None], "no block is open: the base"
    assert in_a_thread(handle.bind(["a", None])(generate), model) == [answers["a"][0], answers[None][1]]
    with pytest.raises(RunError, match="no patch named 'c'"):
        handle.bind("c")


def test_a_streamer_s_thread(model, handle, answers, tokenizer):
    for name in ("a", "b"):
        streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
        settings = {"inputs": PROMPTS[:1], "streamer": streamer, **GREEDY}
        thread = threading.Thread(target=handle.bind(name)(model.generate), kwargs=settings)
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert text == tokenizer.decode(answers[name][0][5:])


def test_a_patch_in_one_call(model, handle, answers, tokenizer):
    assert model.generate(PROMPTS, patch="a", **GREEDY).tolist() == answers["a"]
    assert in_a_thread(model.generate, PROMPTS, patch=["b", None], **GREEDY).tolist() == [
        answers["b"][0],
        answers[None][1],
    ]
    with handle.using("a"):
        assert model.generate(PROMPTS, patch=None, **GREEDY).tolist() == answers[None]
        assert generate(model) == answers["a"]
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    with handle.using("b"):
        expected = pipe("The cat sees", **settings)
    assert pipe("The cat sees", patch="b", **settings) == expected != pipe("The cat sees", **settings)


def steps(model, prompts, count):
    """A generator that decodes by hand, one token a step."""
    tokens = prompts
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        yield tokens[:, -1].tolist()


def in_copied_contexts(generator):
    """Every step in another thread and a copied context, as Starlette runs a generator's."""
    results = []
    while True:
        item = in_a_thread(contextvars.copy_context().run, next, generator, None)
        if item is None or isinstance(item, Exception):
            return results, item
        results.append(item)


@torch.no_grad()
def test_a_generator_whose_steps_run_in_copied_contexts(model, handle, plain):
    expected = {name: list(steps(m, PROMPTS, 4)) for name, m in plain.items()}

    def unbound():
        with handle.using("a"):
            yield from steps(model, PROMPTS, 4)

    found, error = in_copied_contexts(unbound())
    assert found == expected["a"][:1]
    assert NO_CHOICE in str(error)
    for name in ("a", "b", None):
        found, error = in_copied_contexts(handle.bind(name)(steps)(model, PROMPTS, 4))
        assert (found, error) == (expected[name], None)
    first = handle.bind("a")(steps)(model, PROMPTS, 4)
    assert next(first) == expected["a"][0]
    with handle.using(None):
        assert next(steps(model, PROMPTS, 1)) == expected[None][0], "between its steps nothing is chosen"
    assert next(first) == expected["a"][1]
    first.close()
    assert not handle._blocks.open


@torch.no_grad()
def test_a_bound_task(model, handle, answers):
    @handle.bind("a")
    async def answer():
        await asyncio.sleep(0)
        return await asyncio.to_thread(generate, model)

    async def asynchronous_steps():
        for _ in range(2):
            yield await asyncio.to_thread(generate, model)

    async def collected(name):
        found = []
        async for step in handle.bind(name)(asynchronous_steps)():
            found.append(step)
            with handle.using(None):
                assert generate(model) == answers[None], "between its steps nothing of it is chosen"
        return found

    async def main():
        return await asyncio.gather(answer(), handle.bind("b")(asyncio.to_thread)(generate, model), answer())

    assert asyncio.run(main()) == [answers["a"], answers["b"], answers["a"]]
    assert asyncio.run(collected("a")) == [answers["a"]] * 2
    assert not handle._blocks.open


def test_strict_answers_nobody_who_did_not_choose(model, patches, answers):
    with attach(model, strict=True) as handle:
        handle.load(patches["a"], "a")
        for call in (lambda: model(PROMPTS), lambda: model.generate(PROMPTS, **GREEDY)):
            with pytest.raises(RunError, match="the handle is strict"):
                call()
        with handle.using(None):
            assert generate(model) == answers[None]
        with handle.using("a"):
            assert generate(model) == answers["a"]
        handle.merge("a")
        assert generate(model) == answers["a"], "it is everybody's"
    assert generate(model) == answers[None]


# What outlives its block


def test_a_context_that_outlives_its_block_is_refused(model, handle, patches):
    with handle.using("a"):
        context = contextvars.copy_context()
    handle.unload("a")
    handle.load(patches["b"], "c")  # takes the slot
    for call in (lambda: model(PROMPTS), lambda: model.generate(PROMPTS, **GREEDY)):
        with pytest.raises(RunError, match=ENDED):
            context.run(call)


def test_a_task_that_outlives_its_block_is_refused(model, handle, answers):
    async def late(started):
        started.set()
        await asyncio.sleep(0.01)
        return generate(model)

    async def main():
        started = asyncio.Event()
        with handle.using("a"):
            task = asyncio.create_task(late(started))
            await started.wait()
        return await task

    with pytest.raises(RunError, match=ENDED):
        asyncio.run(main())
    assert generate(model) == answers[None]


def test_a_forward_pass_that_ends_after_its_block_is_refused(model, handle):
    block = handle.using("a")
    block.__enter__()
    hook = model.model.layers[0].register_forward_hook(lambda *_: handle._blocks.current.get().block.close())
    try:
        with pytest.raises(RunError, match=ENDED):
            model(PROMPTS)
    finally:
        hook.remove()
        block.__exit__(None, None, None)


# Static mode


@pytest.fixture
def static(model, patches, plain):
    with attach(model, max_batch=8, capacity=400) as handle:
        for name, patch in patches.items():
            handle.load(patch, name)
        yield handle


def test_a_static_choice_is_as_wide_as_the_call_and_as_before_after_it(model, static, plain):
    beams = transformers.GenerationConfig(**GREEDY, num_beams=2)
    two = {name: m.generate(PROMPTS, beams).tolist() for name, m in plain.items()}
    logits = {name: m(PROMPTS).logits for name, m in plain.items()}
    with static.using(["a", "b"]):
        for _ in range(2):
            found = model.generate(PROMPTS, beams).tolist()  # a positional configuration
            assert found == [two["a"][0], two["b"][1]]
            after = model(PROMPTS).logits
            assert torch.equal(after[0], logits["a"][0])
            assert torch.equal(after[1], logits["b"][1])
        with pytest.raises(ZeroDivisionError):
            model.generate(PROMPTS, beams, stopping_criteria=[lambda *_: 1 / 0])
        assert torch.equal(model(PROMPTS).logits[1], logits["b"][1])
        for call in (lambda: model(PROMPTS[[0, 1, 0, 1]]), lambda: model(PROMPTS[:1])):
            with pytest.raises(RunError, match="2 patches were chosen for a batch of"):
                call()
        with pytest.raises(RunError, match="2 patches were chosen for 4 prompts"):
            model.generate(PROMPTS[[0, 1, 0, 1]], **GREEDY)
        with pytest.raises(RunError, match="10 rows are more than the max_batch=8"):
            model.generate(PROMPTS, **GREEDY | {"do_sample": True, "num_return_sequences": 5})
        assert torch.equal(model(PROMPTS).logits[1], logits["b"][1])
        error = in_a_thread(lambda: model(PROMPTS))
        assert NO_CHOICE in str(error)
    assert torch.equal(model(PROMPTS).logits, logits[None])
    with pytest.raises(RunError, match="9 rows are more than the max_batch=8"), static.using(["a"] * 9):
        pass
    assert torch.equal(model(PROMPTS).logits, logits[None])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_a_wrong_batch_is_refused_in_compiled_code_too(patches, strict):
    model = tiny_llama()
    plain = references(model, patches)
    with attach(model, max_batch=8, capacity=400, strict=strict) as handle:
        for name, patch in patches.items():
            handle.load(patch, name)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")

        def check(choice, expected, prompts=PROMPTS):
            with handle.using(choice):
                logits = compiled(prompts).logits
            for row, name in enumerate(expected):
                assert torch.allclose(logits[row], plain[name](prompts).logits[row], atol=1e-4)

        check(["a", "b"], ["a", "b"])
        with torch._dynamo.config.patch(error_on_recompile=True):
            check("b", ["b", "b"])
            check([None, "a"], [None, "a"])
        with handle.using(["a", "b", "a"]), pytest.raises(RunError, match="3 patches were chosen for a batch of 2"):
            compiled(PROMPTS)
        if strict:
            with pytest.raises(RunError, match="the handle is strict"):
                compiled(PROMPTS)
        check("a", ["a", "a"])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("how", ["model", "forward", "in place", "static cache"])
def test_compiled_without_max_batch_a_thread_still_has_its_own_choice(patches, how):
    model = tiny_llama()
    plain = references(model, patches)
    with attach(model) as handle:
        for name, patch in patches.items():
            handle.load(patch, name)
        torch._dynamo.reset()
        call = model
        if how == "model":  # what is asserted is dynamo's work, and no backend's
            call = torch.compile(model, backend="eager")
        elif how == "forward":
            model.forward = torch.compile(model.forward, backend="eager")
        elif how == "in place":
            model.compile(backend="eager")
        for choice in ("a", None, ["a", "b"], ["b", None], "b"):
            names = choice if isinstance(choice, list) else [choice] * 2
            with handle.using(choice):
                if how == "static cache":
                    compiled = transformers.CompileConfig(backend="eager", mode=None)
                    settings = {"cache_implementation": "static", "compile_config": compiled, **GREEDY}
                    found = model.generate(PROMPTS, **settings).tolist()
                    expected = [plain[n].generate(PROMPTS, **GREEDY).tolist()[row] for row, n in enumerate(names)]
                    assert found == expected
                    continue
                logits = call(PROMPTS).logits
            for row, name in enumerate(names):
                assert torch.allclose(logits[row], plain[name](PROMPTS).logits[row], atol=1e-4)
        with handle.using("a"):
            assert NO_CHOICE in str(in_a_thread(lambda: call(PROMPTS)))
    torch._dynamo.reset()


# Scope "prompt"


@torch.no_grad()
def test_scope_prompt_is_refused_where_nobody_knows_the_prompt(model, patches, plain):
    patch = patches["a"].with_meta(scope="prompt", name="p")
    with attach(model) as handle:
        handle.load(patch)
        with handle.using("p"):
            with pytest.raises(RunError, match="handle.marking"):
                model(PROMPTS)
            tokens = model.generate(PROMPTS, **GREEDY)
            with pytest.raises(RunError, match="handle.marking"):
                model(tokens[:, -1:])
            with handle.marking(torch.tensor([[True] * 5, [True] * 2 + [False] * 3])):
                logits = model(PROMPTS).logits
                with pytest.raises(RunError, match=r"marked in \[2, 5\] positions, and this forward pass has \[2, 3\]"):
                    model(PROMPTS[:, :3])
            with pytest.raises(RunError, match="does not say how much it has read"):
                model.generate(PROMPTS, guidance_scale=2.0, **GREEDY)
        assert torch.equal(logits[0], plain["a"](PROMPTS).logits[0])
        mixed = plain["a"].get_input_embeddings()(PROMPTS[1:])
        mixed[:, 2:] = plain[None].get_input_embeddings()(PROMPTS[1:, 2:])
        assert torch.allclose(logits[1], model(inputs_embeds=mixed).logits[0], atol=1e-5)
        with pytest.raises(RunError, match="inside a `using` block"), handle.marking(torch.ones(2, 5)):
            pass


STATEFUL = {
    "mamba": {"num_hidden_layers": 2, "state_size": 8},
    "mamba2": {"num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "rwkv": {"num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
    "falcon_h1": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
                  "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "jamba": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
              "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "num_experts": 2, "use_mamba_kernels": False},
    "lfm2": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
             "layer_types": ["conv", "full_attention"]},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("prompt", [[5], [5, 9, 300, 17, 40]])
@pytest.mark.parametrize("kind", STATEFUL)
def test_models_that_keep_another_state(kind, prompt):
    """Scope "all" is exact; scope "prompt" is exact or refused."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 32, "pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **sizes, **STATEFUL[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    everywhere = some_patch(model, 1, IDS)
    changed, ids = overwritten(model, everywhere), torch.tensor([prompt])
    # Columns are seen one after the other, so that the embeddings of a longer input say what was read when.
    by_hand = ids
    while by_hand.shape[1] < ids.shape[1] + 6:
        embeddings = torch.cat(
            [changed.get_input_embeddings()(ids), model.get_input_embeddings()(by_hand[:, ids.shape[1] :])], dim=1
        )
        by_hand = torch.cat([by_hand, model(inputs_embeds=embeddings).logits[:, -1:].argmax(-1)], dim=1)
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 1, "eos_token_id": None}
    expected = changed.generate(ids, **settings).tolist()
    with attach(model) as handle:
        handle.load(everywhere, "all")
        handle.load(everywhere.with_meta(scope="prompt"), "prompt")
        with handle.using("all"):
            assert model.generate(ids, **settings).tolist() == expected
        with handle.using("prompt"):
            try:
                found = model.generate(ids, **settings).tolist()
            except RunError as error:
                found = str(error)
        assert found == by_hand.tolist() or "needs to know where the prompt ends" in found


# Past the patched modules


@torch.no_grad()
def test_a_forward_pass_past_the_embedding_or_the_head_is_refused(model, handle, plain):
    embeddings = model.get_input_embeddings()(PROMPTS)
    with handle.using("a"), pytest.raises(RunError, match="not with inputs_embeds"):
        model(inputs_embeds=embeddings)
    assert torch.equal(model(inputs_embeds=embeddings).logits, plain[None](PROMPTS).logits)
    both = some_patch(model, 3, IDS, side="input+output")
    handle.load(both, "both")

    def fused(input_ids, **kwargs):
        hidden = model.model(input_ids).last_hidden_state
        return SimpleNamespace(logits=functional.linear(hidden, model.lm_head.weight))

    model.forward = fused
    with handle.using(["a", "both"]), pytest.raises(RunError, match="did not go through the patched head"):
        model(PROMPTS)
    with handle.using("a"):
        assert torch.equal(model(PROMPTS).logits, plain["a"](PROMPTS).logits)
    model.forward = lambda input_ids, **_: SimpleNamespace(logits=model.lm_head.weight[input_ids])
    with handle.using("a"), pytest.raises(RunError, match="did not look its tokens up in the patched embedding"):
        model(PROMPTS)
    del model.forward


@torch.no_grad()
def test_a_model_changed_after_attach_is_refused(patches):
    for change, message in [
        (lambda m: m.set_input_embeddings(copy.deepcopy(m.get_input_embeddings())), "embedding was replaced"),
        (lambda m: m.set_output_embeddings(copy.deepcopy(m.get_output_embeddings())), "head was replaced"),
        (lambda m: m.resize_token_embeddings(410), "was replaced"),
        (lambda m: m.to(torch.bfloat16), "moved to bfloat16 on cpu"),
    ]:
        model = tiny_llama()
        handle = attach(model)
        handle.load(patches["a"], "a")
        with handle.using("a"):
            model(PROMPTS)
            change(model)
            with pytest.raises(RunError, match=message):
                model(PROMPTS)
        with pytest.raises(RunError, match=message), handle.using("a"):
            pass
        handle.detach()


@torch.no_grad()
def test_gemma_in_another_precision_needs_to_be_attached_again():
    from test_base import small

    model = small("gemma3_text")
    patch = some_patch(model, 1)
    with attach(model) as handle:
        handle.load(patch, "a")
        model.to(torch.bfloat16)
        with pytest.raises(RunError, match="detach, and attach again"), handle.using("a"):
            pass
    plain = references(model, {"a": patch})
    with attach(model) as handle, handle.using(handle.load(patch, "a")):
        assert torch.equal(model(PROMPTS).logits, plain["a"](PROMPTS).logits)


@pytest.mark.slow
def test_eight_threads_and_a_loop_of_tasks_for_a_moment():
    """The short form of `make stress`."""
    from stress import stress

    report = stress(seconds=4)
    assert report["answers"] > 20
    assert (report["wrong"], report["left"]) == (0, 0)


def test_nested_blocks_and_threads_beside_them(model, handle, answers):
    with handle.using("a"):
        with handle.using("b"):
            assert generate(model) == answers["b"]
        assert generate(model) == answers["a"]
        run_together([lambda n=n: _assert(handle.bind(n)(generate)(model) == answers[n]) for n in ("a", "b", None)])


def _assert(condition):
    assert condition


# Found by readers who looked for wrong answers


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("first", ["itself", "another model"])
@pytest.mark.parametrize(
    ("how", "options"),
    [
        *((how, options) for how in ("model", "forward") for options in ({}, {"max_batch": 4, "capacity": 400})),
        ("fullgraph", {"max_batch": 4, "capacity": 400}),
    ],
)
def test_what_was_compiled_before_attach_sees_the_patches(patches, how, options, first):
    """Its own code, or that of another model of its class, which torch.compile takes for the same."""
    model, other = tiny_llama(), tiny_llama(seed=7)
    plain = references(model, patches)
    torch._dynamo.reset()

    def compiled(m):
        if how == "model":
            return torch.compile(m, backend="eager")
        m.forward = torch.compile(m.forward, backend="eager", fullgraph=how == "fullgraph")
        return m

    call, other = compiled(model), compiled(other)
    (call if first == "itself" else other)(PROMPTS)
    for _ in range(2):  # and a second handle after a first
        with attach(model, **options) as handle:
            handle.load(patches["a"], "a")
            with handle.using("a"):
                assert torch.allclose(call(PROMPTS).logits, plain["a"](PROMPTS).logits, atol=1e-4)
            assert torch.allclose(call(PROMPTS).logits, plain[None](PROMPTS).logits, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("how", ["model", "forward"])
def test_compiled_code_with_max_batch_is_checked_as_any_other(patches, how):
    model = tiny_llama()
    with attach(model, max_batch=4, capacity=400) as handle:
        handle.load(patches["a"], "a")
        torch._dynamo.reset()
        call = torch.compile(model, backend="eager") if how == "model" else model
        if how == "forward":
            model.forward = torch.compile(model.forward, backend="eager")
        with handle.using("a"):
            call(PROMPTS)
            context = contextvars.copy_context()
            assert NO_CHOICE in str(in_a_thread(lambda: call(PROMPTS)))
            with pytest.raises(RunError, match="not with inputs_embeds"):
                call(inputs_embeds=model.get_input_embeddings()(PROMPTS))
        with pytest.raises(RunError, match=ENDED):
            context.run(lambda: call(PROMPTS))
        with handle.using("a"):
            model.set_input_embeddings(copy.deepcopy(model.get_input_embeddings()))
            with pytest.raises(RunError, match="was replaced"):
                call(PROMPTS)


class AsyncCall:
    def __init__(self, model):
        self.model = model

    async def __call__(self):
        await asyncio.sleep(0)
        return generate(self.model)


@torch.no_grad()
def test_what_a_bound_function_returns_to_be_run_later_has_its_choice(model, handle, answers, tokenizer):
    def logged(function):
        return lambda *args, **kwargs: function(*args, **kwargs)

    def one_step(name=None):
        yield generate(model)

    assert list(handle.bind("a")(logged(one_step))()) == [answers["a"]]
    assert asyncio.run(handle.bind("a")(AsyncCall(model))()) == answers["a"]
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    texts = ["The cat sees", "The dog wants"]
    with handle.using("b"):
        expected = [pipe(text, **settings) for text in texts]
    assert list(handle.bind("b")(pipe)((text for text in texts), **settings)) == expected


@torch.no_grad()
def test_generators_that_open_blocks_beside_each_other(model, handle, answers):
    def steps(name):
        with handle.using(name):
            for _ in range(3):
                yield generate(model)

    one, two = steps("a"), steps("b")
    assert (next(one), next(two)) == (answers["a"], answers["b"])
    for call in (lambda: next(one), lambda: model(PROMPTS)):
        with pytest.raises(RunError, match="opened by a generator, which is suspended"):
            call()
    two.close()
    assert generate(model) == answers[None], "nobody's block is open, and the one that raised has ended"

    @contextlib.contextmanager
    def spanish():
        with contextlib.ExitStack() as stack:
            stack.enter_context(handle.using("a"))
            yield

    with spanish():
        assert generate(model) == answers["a"], "a context manager's block is its caller's"
    assert list(steps("b")) == [answers["b"]] * 3


@torch.no_grad()
def test_scope_prompt_where_others_count_the_columns(model, patches):
    from peft import PrefixTuningConfig, get_peft_model

    patch = patches["a"].with_meta(scope="prompt", name="p")

    def by_hand(model, input_ids, **_):
        for _ in range(3):
            logits = model.lm_head(model.model(input_ids=input_ids).last_hidden_state[:, -1:])
            input_ids = torch.cat([input_ids, logits.argmax(-1)], dim=1)
        return input_ids

    with attach(model) as handle:
        handle.load(patch)
        with handle.using("p"), pytest.raises(RunError, match="needs to know where the prompt ends"):
            model.generate(PROMPTS, custom_generate=by_hand, **GREEDY)
    for virtual in (3, 8):
        prefixed = get_peft_model(tiny_llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual))
        with attach(prefixed.eval()) as handle:
            handle.load(patch)
            with handle.using("p"), pytest.raises(RunError, match="needs to know where the prompt ends"):
                prefixed.generate(input_ids=PROMPTS, **GREEDY)


@torch.no_grad()
def test_hooks_of_others_see_the_patch_s_rows(model):
    patch = some_patch(model, 1, IDS, side="input+output")
    reference = overwritten(model, patch)
    for m in (model, reference):
        m.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 2)
        m.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    with attach(model) as handle, handle.using(handle.load(patch)):
        assert torch.allclose(model(PROMPTS).logits, reference(PROMPTS).logits, atol=1e-4)


@torch.no_grad()
def test_a_block_that_ends_in_another_thread_leaves_nothing_there(model, handle, plain):
    def block():
        with handle.using("b"):
            yield

    with ThreadPoolExecutor(1) as pool:
        with handle.using("a"):
            left = block()
            next(left)
            pool.submit(left.close).result()
            assert NO_CHOICE in str(pool.submit(model, PROMPTS).exception())
        assert torch.equal(pool.submit(in_inference, model).result(), plain[None](PROMPTS).logits)


def in_inference(model):
    with torch.no_grad():
        return model(PROMPTS).logits


def test_a_block_is_no_decorator(handle):
    with pytest.raises(RunError, match="decorate it with `handle.bind"):
        handle.using("a")(generate)
    block = handle.using("a")
    with block, pytest.raises(RunError, match="is open already"), block:
        pass


@torch.no_grad()
def test_generators_that_are_left_in_a_block_on_purpose(model, handle, answers):
    @contextlib.contextmanager
    @torch.no_grad()
    def under_no_grad():
        with handle.using("a"):
            yield

    def inner():
        with handle.using("a"):
            yield

    @contextlib.contextmanager
    def delegating():
        yield from inner()

    for context in (under_no_grad, delegating, handle.bind("a")(lambda: handle.using("a"))):
        with context():
            assert generate(model) == answers["a"]

    def echo():
        sent = None
        while True:
            sent = yield sent, generate(model)

    bound = handle.bind("a")(echo)()
    assert next(bound) == (None, answers["a"])
    assert bound.send(7) == (7, answers["a"])
    bound.close()


def test_calls_that_would_be_taken_for_others(model, handle, plain):
    with handle.using(["a"]), pytest.raises(RunError, match="1 patches were chosen for a batch of 2"):
        model(PROMPTS)
    with pytest.raises(RunError, match="`patch=` is for `generate`"):
        model(PROMPTS, patch="a")
    with pytest.raises(RunError, match="give a name, None for the base"), handle.using(5):
        pass
    with handle.using("a"):
        row = model.get_input_embeddings()(torch.tensor([IDS[0]]))
        assert torch.equal(row, plain["a"].get_input_embeddings()(torch.tensor([IDS[0]])))
        with pytest.raises(RunError, match="a trace of the model would keep the choice"):
            torch.jit.trace(model, PROMPTS, strict=False, check_trace=False)
    for wrong in ("model", torch.nn.Linear(2, 2), torch.nn.DataParallel(model)):
        with pytest.raises(RunError, match=f"this is a {type(wrong).__name__}"):
            attach(wrong)


def test_what_others_put_around_generate_stays(model, patches, answers):
    handle = attach(model)
    handle.load(patches["a"], "a")
    own, calls = model.generate, []
    model.generate = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    with handle.using("a"):
        assert generate(model) == answers["a"]
    handle.detach()
    assert generate(model) == answers[None]
    assert calls == [1, 1]


@torch.no_grad()
def test_a_compiled_module_is_the_model_in_it(model, patches, answers):
    compiled = torch.compile(model, backend="eager")
    with attach(compiled) as handle:
        handle.load(patches["a"], "a")
        with handle.using("a"):
            assert compiled.generate(PROMPTS, **GREEDY).tolist() == answers["a"]
        with pytest.raises(RunError, match="attached to this model already"):
            attach(model)


@torch.no_grad()
def test_a_mark_is_of_the_block_that_it_is_entered_in(model, handle, plain):
    ids = torch.tensor([IDS[:4]])
    mark = torch.ones_like(ids, dtype=torch.bool)
    with handle.using("a"):
        marking = handle.marking(mark)
        with handle.using("b"), marking:
            found = model(ids).logits
    with handle.using("b"):
        assert torch.equal(found, model(ids).logits)
    with handle.using("a"):
        assert not torch.equal(found, model(ids).logits)
