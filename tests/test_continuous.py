"""Continuous batching: a request that was given a patch keeps it through everything transformers does with it."""

import asyncio
import gc
import queue
import threading

import pytest
import torch
import transformers
from conftest import tiny_llama
from test_attach import IDS, references
from test_hf import some_patch
from transformers.generation.continuous_batching.model_runner import ModelRunner

from ksl_patch import attach
from ksl_patch.errors import RunError

GENERATION = transformers.GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=1, pad_token_id=1)
LONG = [5, 9, 300, 17, 40] * 9


def batching(**changes):
    return transformers.ContinuousBatchingConfig(
        **{"page_size": 16, "num_blocks": 64, "max_batch_tokens": 64, "cpu_offload_space": 0} | changes
    )


def alone(model, prompt, generation=GENERATION):
    """What a model writes after one prompt, by itself."""
    return model.generate(torch.tensor([prompt]), generation_config=generation)[0, len(prompt) :].tolist()


def tokens(results):
    return [result.generated_tokens for result in results.values()]


@pytest.fixture(params=["input", "input+output"])
def served(request, model):
    """A handle with two patches, and models of the same names whose table was overwritten; None is the base."""
    patches = {name: some_patch(model, seed, IDS, side=request.param) for seed, name in enumerate("ab", start=1)}
    plain = references(model, patches)
    with attach(model) as handle:
        for name, patch in patches.items():
            handle.load(patch, name)
        yield handle, plain
        assert all(slot.holds == 0 for slot in handle.bank._slots.values())
    assert not {"generate_batch", "ksl_patch"} & vars(model).keys()


@pytest.mark.slow
def test_a_request_that_is_offloaded_goes_on_with_its_patch(model, served):
    handle, plain = served
    prompts = [[i, 9, 300, 17, 40, i] * 5 for i in range(5, 11)]
    choices = ["a", "b", None, "a", "b", "a"]
    generation = transformers.GenerationConfig(max_new_tokens=40, do_sample=False, eos_token_id=-1, pad_token_id=1)
    expected = [alone(plain[c], p, generation) for p, c in zip(prompts, choices, strict=True)]
    began_again = []
    # Without room on the host, where transformers would pin memory: tests/gpu.py has it.
    config = batching(num_blocks=16)
    with handle.using(choices), pytest.MonkeyPatch.context() as patch:
        from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

        original = OffloadingManager.offload_requests
        patch.setattr(
            OffloadingManager, "offload_requests", lambda self: began_again.append(original(self)) or began_again[-1]
        )
        found = model.generate_batch(prompts, generation, continuous_batching_config=config)
    assert any(began_again), "the cache must have been too small"
    assert tokens(found) == expected


def test_several_answers_to_a_prompt_all_have_its_patch(model, served):
    handle, plain = served
    generation = transformers.GenerationConfig(
        max_new_tokens=8, do_sample=True, top_k=1, eos_token_id=1, pad_token_id=1, num_return_sequences=3
    )
    prompts, choices = [LONG, [17, 17, 5, 251], LONG], ["a", "b", None]
    with handle.using(choices):
        found = model.generate_batch(prompts, generation, continuous_batching_config=batching())
    one = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=1)
    expected = [alone(plain[c], p, one) for p, c in zip(prompts, choices, strict=True) for _ in range(3)]
    assert tokens(found) == expected


def test_a_request_may_have_any_name(model, served):
    handle, plain = served
    manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
    manager.start()
    names = {"x__child#0": "a", "__child#": "b", "x": None}
    for request_id, choice in names.items():
        with handle.using(choice):
            manager.add_request(LONG, request_id=request_id, max_new_tokens=10)
    found = {}
    while len(found) < len(names):
        result = manager.get_result(timeout=10)
        found[result.request_id] = result.generated_tokens
    manager.stop()
    assert found == {request_id: alone(plain[choice], LONG) for request_id, choice in names.items()}


@pytest.mark.slow
def test_a_persistent_manager_serves_again_and_goes_with_the_handle(model, served):
    handle, plain = served
    for choices in (["a", None], ["b", "a"]):
        with handle.using(choices):
            found = model.generate_batch(
                [LONG, LONG], GENERATION, continuous_batching_config=batching(), persistent_manager=True
            )
        assert tokens(found) == [alone(plain[choice], LONG) for choice in choices]
    unstarted = model._cached_continuous_batching_manager
    assert model.init_continuous_batching() is unstarted
    model.destroy_cached_continuous_batching_manager()
    unstarted = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
    with handle.using("a"):
        model.generate_batch([LONG], GENERATION, continuous_batching_config=batching(), persistent_manager=True)
    handle.detach()
    assert not hasattr(model, "_cached_continuous_batching_manager")
    with pytest.raises(RunError, match="detached"):
        unstarted.add_request(LONG)


@pytest.mark.slow
def test_a_patch_in_one_call(model, served):
    _, plain = served
    found = model.generate_batch([LONG, LONG], GENERATION, continuous_batching_config=batching(), patch=["b", None])
    assert tokens(found) == [alone(plain["b"], LONG), alone(plain[None], LONG)]
    manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
    manager.start()
    asked = {manager.add_request(LONG, max_new_tokens=10, patch="a"): "a"}
    asked |= zip(manager.add_requests([LONG, LONG], max_new_tokens=10, patch=["b", None]), ["b", None], strict=True)
    with pytest.raises(RunError, match="2 patches were chosen for 1 prompts"):
        manager.add_requests([LONG], patch=["b", None])
    for _ in range(3):
        result = manager.get_result(timeout=20)
        assert result.generated_tokens == alone(plain[asked[result.request_id]], LONG)
    manager.stop()


def test_padded_batches(model, served):
    """Under graphs and compilation batches are padded, also to the very number of positions that the head sees."""
    handle, plain = served
    prompts, choices = [[5, 40, 9, 300], [9] * 4, [17, 5, 9, 2], [40] * 4], ["a", "b", None, "a"]
    generation = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=1)
    config = batching(max_batch_tokens=16, max_requests_per_batch=16, q_padding_interval_size=16)
    with padded(), handle.using(choices):
        found = model.generate_batch(prompts, generation, continuous_batching_config=config)
    assert tokens(found) == [alone(plain[c], p, generation) for p, c in zip(prompts, choices, strict=True)]


def padded():
    """A `with` block in which batches are padded on a CPU too."""
    patch, original = pytest.MonkeyPatch(), ModelRunner.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.pad_inputs = True

    patch.setattr(ModelRunner, "__init__", init)
    context = patch.context()

    class Block:
        def __enter__(self):
            return context

        def __exit__(self, *_):
            patch.undo()

    return Block()


class EmulatedGraph:
    """What a CUDA graph does, on a CPU: it reads the tensors that were there when it was captured."""

    replays = 0

    def __init__(self, handle, forward, *args):
        self.handle, self.tensors, self.run = handle, handle.bank.tensors, lambda: forward(*args)
        self.choice = handle._blocks.current.get()

    def replay(self):
        EmulatedGraph.replays += 1
        storage = self.handle.bank._storage
        now, storage.tensors = storage.tensors, self.tensors
        try:
            with self.handle._blocks.choosing(self.choice):
                self.run()
        finally:
            storage.tensors = now

    def reset(self):
        pass


@pytest.fixture
def graphs(monkeypatch):
    """Continuous batching with CUDA graphs, emulated."""
    init = ModelRunner.__init__

    def with_graphs(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.pad_inputs = self.use_cuda_graph_varlen = True

    def capture(self, forward, stream, model, *args):
        forward(model, *args)
        self.inputs_and_outputs.set_graph(EmulatedGraph(model.ksl_patch, forward, model, *args))

    monkeypatch.setattr(ModelRunner, "__init__", with_graphs)
    monkeypatch.setattr(ModelRunner, "_capture_graph", capture)
    EmulatedGraph.replays = 0


@pytest.mark.parametrize("capacity", [0, 200])
@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("side", ["input", "input+output"])
def test_graphs_captured_before_a_load_never_read_the_old_bank(model, graphs, side, warmup, capacity):
    """Neither where the bank grows, nor where a wider patch takes the place of another and nothing moves."""
    patches = {name: some_patch(model, seed, IDS[: 10 * seed], side=side) for seed, name in enumerate("abcd", start=2)}
    plain = references(model, patches)
    config = batching(q_padding_interval_size=64, kv_padding_interval_size=1024)
    with (
        attach(model, capacity=capacity) as handle,
        model.continuous_batching_context_manager(
            generation_config=GENERATION, continuous_batching_config=config, warmup=warmup
        ) as manager,
    ):
        for name in [None, *patches]:
            if name is not None:
                for old in handle.names if capacity else ():
                    handle.unload(old)
                handle.load(patches[name], name)
            ids = {}
            for choice in (name, None, *handle.names):
                with handle.using(choice):
                    ids[manager.add_request(LONG, max_new_tokens=10)] = choice
            found = {}
            while len(found) < len(ids):
                result = manager.get_result(timeout=10)
                assert result is not None, manager.background_thread_status.fatal_error
                found[result.request_id] = result.generated_tokens
            assert found == {request: alone(plain[choice], LONG) for request, choice in ids.items()}
        # By the thread that generates, and before it by the warm-up: one buffer all the same.
        assert len(manager._create_batch_processor.func.__self__._processors) == 1
        assert EmulatedGraph.replays > 5


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [True, False])
def test_a_processor_is_followed_once(model, served, warmup):
    handle, plain = served
    manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
    if warmup:
        manager.warmup()
        first = manager.batch_processor.model_runner.compute_batch
    manager.start()
    with handle.using("a"):
        manager.add_request(LONG, max_new_tokens=10)
    assert manager.get_result(timeout=10).generated_tokens == alone(plain["a"], LONG)
    runner = manager.batch_processor.model_runner
    assert not warmup or runner.compute_batch is first
    manager.stop()
    assert runner.compute_batch.args[0].__func__ is ModelRunner.compute_batch


@pytest.mark.slow
def test_no_request_keeps_a_model_from_being_detached_once_nobody_can_get_its_answer(model, patch_of):
    for failing in ("never started", "full queue", "no room for a cache", "twice the same name", "cancelled"):
        with attach(model) as handle:
            handle.load(patch_of(model), "a")
            config = batching(max_queue_size=2)
            manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=config)
            with handle.using("a"):
                if failing == "full queue":
                    manager.input_queue.put = _at_once(manager.input_queue.put)
                    for _ in range(2):
                        manager.add_request(LONG)
                    with pytest.raises(queue.Full):
                        manager.add_request(LONG)
                    assert handle.bank._slots[1].holds == 3, "two requests and the block"
                elif failing == "no room for a cache":
                    manager.continuous_batching_config.num_blocks = 0
                    manager.add_request(LONG)
                    with pytest.MonkeyPatch.context() as broken:
                        broken.setattr(manager, "_create_batch_processor", lambda: 1 / 0)
                        manager.start()
                        assert "zero" in manager.get_result(timeout=10).error
                elif failing == "twice the same name":
                    manager.add_request(LONG, request_id="one", max_new_tokens=3)
                    with pytest.raises(RunError, match="a request named one waits or runs already"):
                        manager.add_request(LONG, request_id="one", max_new_tokens=3)
                    manager.start()
                elif failing == "cancelled":
                    manager.add_request(LONG, request_id="one", max_new_tokens=10_000)
                    manager.start()
                    manager.cancel_request("one")
                else:
                    manager.add_request(LONG)
            if manager.is_running():
                manager.stop(block=True, timeout=20, hard_stop=True)
            if failing in ("never started", "full queue"):
                with pytest.raises(RunError, match="requests of continuous batching wait or run"):
                    handle.detach()
            del manager
            gc.collect()
        assert "ksl_patch" not in vars(model)
        assert len(handle.bank) == 0


def _at_once(put):
    return lambda state, block=True, timeout=None: put(state, block=False)


@pytest.fixture
def patch_of():
    return lambda model: some_patch(model, 1, IDS)


def test_a_request_from_a_thread_without_a_choice_is_refused_while_a_block_is_open(model, served):
    handle, plain = served
    manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
    manager.start()
    failures = []

    def ask():
        try:
            manager.add_request(LONG)
        except RunError as error:
            failures.append(str(error))

    with handle.using("a"):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        bound = threading.Thread(target=handle.bind("b")(manager.add_request), args=(LONG,))
        bound.start()
        bound.join()
    manager.add_request(LONG)  # no block is open: the base
    found = sorted(tokens({i: manager.get_result(timeout=10) for i in range(2)}))
    manager.stop()
    assert ["handle.bind" in failure for failure in failures] == [True]
    assert found == sorted([alone(plain["b"], LONG), alone(plain[None], LONG)])


def test_what_goes_wrong_with_a_request_is_not_only_logged(model, served, monkeypatch):
    handle, _ = served
    with handle.using(["a", "b"]), pytest.raises(RunError, match="2 patches were chosen for 5 prompts"):
        model.generate_batch([LONG] * 5, GENERATION, continuous_batching_config=batching())
    monkeypatch.setattr(handle.bank, "hold", lambda *_: (_ for _ in ()).throw(RunError("no room")))
    with handle._blocks.choosing(handle._blocks.make_choice([1], True)), pytest.raises(RunError, match="no room"):
        model.generate_batch([LONG], GENERATION, continuous_batching_config=batching())


@pytest.mark.slow
@torch.no_grad()
def test_other_forward_passes_are_refused_beside_a_manager_which_would_make_them_wrong(model, served):
    handle, plain = served
    prompt = torch.tensor([LONG])
    manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
    manager.start()
    with handle.using("a"):
        manager.add_request(LONG, max_new_tokens=10)
        for call in (lambda: model(prompt), lambda: model.generate(prompt, generation_config=GENERATION)):
            with pytest.raises(RunError, match=r"inside `manager.pause\(\)`"):
                call()
        with manager.pause():
            assert torch.equal(model(prompt).logits, plain["a"](prompt).logits)
            assert alone(model, LONG) == alone(plain["a"], LONG)
    with pytest.raises(RunError, match="runs on this model"):
        model(prompt)
    for change in (lambda: handle.merge("a"), handle.detach):
        with pytest.raises(RunError, match="while 1 requests of continuous batching wait or run"):
            change()
    assert manager.get_result(timeout=10).generated_tokens == alone(plain["a"], LONG)
    with pytest.raises(RunError, match="while the model generates"):
        handle.merge("a")
    manager.stop()
    assert torch.equal(model(prompt).logits, plain[None](prompt).logits)


def test_a_manager_does_not_start_beside_a_generation(model, served):
    manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
    refused = []

    def start(*_):
        if not refused:
            with pytest.raises(RunError, match="the model generates already") as error:
                manager.start()
            refused.append(error)
        return False

    model.generate(torch.tensor([LONG]), generation_config=GENERATION, stopping_criteria=[start])
    assert refused
    assert not manager.is_running()


def test_results_reach_an_event_loop(model, served):
    handle, plain = served
    manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
    manager.start()

    async def ask(name):
        loop, answer = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        manager.register_result_handler(str(name), lambda result: result.is_finished() and answer.set_result(result))
        with handle.using(name):
            await loop.run_in_executor(None, handle.bind(name)(manager.add_request), LONG, str(name), 10)
        return (await answer).generated_tokens

    async def main():
        return [await ask(name) for name in ("a", None, "b")]

    found = asyncio.run(main())
    manager.stop()
    assert found == [alone(plain[name], LONG) for name in ("a", None, "b")]


def test_ten_thousand_requests_wait_at_no_cost_to_those_that_run(patch_of):
    model = tiny_llama()
    with attach(model) as handle:
        handle.load(patch_of(model), "a")
        manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
        with handle.using("a"):
            for _ in range(10_000):
                manager.add_request([5, 9], max_new_tokens=1)
        assert len(handle._blocks.requests) == 10_000
        manager.start()
        for _ in range(50):
            assert manager.get_result(timeout=10).error is None
        manager.stop(hard_stop=True)
        assert not handle._blocks.requests


# Found by readers who looked for wrong answers


@pytest.mark.parametrize("kind", ["request", "generator", "both"])
def test_what_the_garbage_collector_ends_while_the_bank_is_at_work(model, kind, monkeypatch):
    """It may run in the middle of any change; two names never share a slot."""
    patches = {name: some_patch(model, seed, IDS) for seed, name in enumerate("abcd", start=1)}
    plain = references(model, patches)
    with attach(model) as handle:
        handle.load(patches["a"], "a")
        handle.load(patches["b"], "b")
        bank = handle.bank
        eviction = bank._eviction
        place = eviction.place
        monkeypatch.setattr(eviction, "place", lambda *args: (gc.collect(), place(*args))[1])

        def abandon():
            if kind != "generator":
                config = batching()
                manager = model.init_continuous_batching(
                    generation_config=GENERATION, continuous_batching_config=config
                )
                with handle.using("a"):
                    manager.add_request(LONG)
            if kind != "request":
                left = [handle.bind("a")(lambda: iter([1, 2]))()]
                next(left[0])
                left.append(left)  # only the collector finds it

        abandon()
        handle.unload("a")
        handle.load(patches["c"], "c")
        handle.load(patches["d"], "d")
        assert len({loaded.slot for loaded in handle._blocks.loaded.values()}) == 3
        for name in "bcd":
            with handle.using(name):
                assert alone(model, LONG) == alone(plain[name], LONG)
        gc.collect()
    assert len(bank) == 0


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [True, False])
def test_a_head_that_is_unloaded_or_replaced_while_it_is_held(graphs, warmup):
    model = tiny_llama()
    patch, narrow = (some_patch(model, 1, IDS[:k], side="input+output") for k in (40, 1))
    plain = references(model, {"a": patch})
    for change in ("unload", "replace"):
        with attach(model) as handle:
            handle.load(patch, "a")
            manager = model.init_continuous_batching(
                generation_config=GENERATION, continuous_batching_config=batching(q_padding_interval_size=64)
            )
            with handle.using("a"):
                manager.add_request(LONG, max_new_tokens=10)
            if change == "unload":
                handle.unload("a")
            else:
                handle.replace("a", narrow)
            if warmup:
                manager.warmup()
            manager.start()
            assert manager.get_result(timeout=20).generated_tokens == alone(plain["a"], LONG)
            manager.stop()
        with torch.no_grad(), attach(model, max_batch=2) as handle:
            handle.load(patch, "a")
            with handle.using("a"):
                handle.unload("a") if change == "unload" else handle.replace("a", narrow)
                prompt = torch.tensor([LONG])
                torch.testing.assert_close(model(prompt).logits, plain["a"](prompt).logits, atol=1e-5, rtol=1e-4)


def test_a_manager_from_before_attach_answers_nobody(model):
    manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
    with attach(model) as handle:
        handle.load(some_patch(model, 1, IDS), "a")
        with handle.using("a"):
            manager.add_request(LONG)
        manager.start()
        assert "was made before `attach`" in manager.get_result(timeout=20).error
        manager.stop()


def test_a_merge_is_refused_while_requests_wait_that_chose(model, served):
    handle, _ = served
    for choice in ("a", None):
        manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
        with handle.using(choice):
            manager.add_request(LONG)
        for change in (lambda: handle.merge("b"), handle.detach):
            with pytest.raises(RunError, match="while 1 requests of continuous batching wait or run"):
                change()
        manager.destroy()
        handle.merge("b")
        handle.unmerge()


def test_a_merged_patch_is_everybody_s_in_continuous_batching_too(model, served):
    handle, plain = served
    handle.merge("a")
    found = model.generate_batch([LONG, [5, 9]], GENERATION, continuous_batching_config=batching())
    assert tokens(found) == [alone(plain["a"], LONG), alone(plain["a"], [5, 9])]


@pytest.mark.slow
def test_a_second_manager_does_not_run_beside_a_first(model, served):
    handle, plain = served
    first, second = (
        model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
        for _ in range(2)
    )
    first.start()
    for begin in (second.start, second.warmup):
        with pytest.raises(RunError, match="another manager of continuous batching runs"):
            begin()
    first.stop()
    second.start()
    with handle.using("a"):
        second.add_request(LONG, max_new_tokens=10)
    assert second.get_result(timeout=20).generated_tokens == alone(plain["a"], LONG)
    second.stop()
    assert not hasattr(model.config, "is_causal")


def test_names_of_requests_that_would_be_taken_for_another_s(model, served):
    handle, _ = served
    generation = transformers.GenerationConfig(
        max_new_tokens=4, do_sample=True, top_k=1, eos_token_id=1, pad_token_id=1, num_return_sequences=2
    )
    manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=batching())
    with handle.using("a"):
        manager.add_request(LONG, request_id="x")
        for name in ("x", "x__child#0"):
            with pytest.raises(RunError, match=f"a request named {name} waits or runs already"):
                manager.add_request(LONG, request_id=name)
    manager.start()
    found = {manager.get_result(timeout=20).request_id for _ in range(2)}
    assert found == {"x", "x__child#0"}
    with handle.using("b"):
        manager.add_request(LONG, request_id="x")  # free again
    assert {manager.get_result(timeout=20).request_id for _ in range(2)} == found
    manager.stop()


def test_a_slot_that_became_another_s_before_the_request_held_it(model, served, monkeypatch):
    handle, _ = served
    manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
    block = handle.using("a")
    block.__enter__()
    hold = handle.bank.hold

    def late(*args):
        monkeypatch.undo()
        block.__exit__(None, None, None)
        handle.replace("a", some_patch(model, 7, IDS))
        handle.load(some_patch(model, 8, IDS), "c")  # in the slot that "a" had
        return hold(*args)

    monkeypatch.setattr(handle.bank, "hold", late)
    with pytest.raises(RunError, match="the block that chose the patch has ended"):
        manager.add_request(LONG)
    assert not handle._blocks.requests


@pytest.mark.slow
def test_entries_of_a_list_go_to_no_other_request(model, served):
    handle, plain = served
    manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
    with pytest.raises(RunError, match="2 patches were chosen and 1 requests made of them"):
        handle.bind(["a", "b"])(manager.add_request)(LONG)
    manager.destroy()
    manager = model.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=batching())
    manager.start()
    manager.stop()
    with handle.using(["a", "b"]):
        assert manager.add_request(LONG) is None, "transformers drops requests of a manager that has stopped"
        manager.start()
        manager.add_request(LONG, max_new_tokens=10)
    assert manager.get_result(timeout=20).generated_tokens == alone(plain["b"], LONG)
    manager.stop()


def test_the_configuration_inside_a_generation_configuration(model, served):
    generation = transformers.GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=1, pad_token_id=1)
    generation.continuous_batching_config = batching(max_batch_tokens=17)
    manager = model.init_continuous_batching(generation_config=generation)
    assert manager.continuous_batching_config.max_batch_tokens == 17
    assert not manager.continuous_batching_config.allow_block_sharing
