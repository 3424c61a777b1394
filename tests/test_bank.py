"""The bank: what was put into a slot is found there, and nothing else, whatever came and went before."""

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ksl_patch.bank import BankTensors, PatchBank, SlotRows
from ksl_patch.base import EmbeddingTable
from ksl_patch.errors import BankError
from ksl_patch.overlay import Overlay, correct_logits, replace_rows

V, D = 500, 8


def bank(**options):
    return PatchBank(V, D, dtype=torch.float32, device="cpu", **options)


def some_rows(seed, k=5, d=D, vocab_size=V, **changes):
    g = torch.Generator().manual_seed(seed)
    return SlotRows(torch.randperm(vocab_size, generator=g)[:k], torch.randn(k, d, generator=g), **changes)


def seen(bank, slot):
    """All that a slot replaces: {token id: row}."""
    position = bank.tensors.lookup(torch.tensor([slot]), torch.arange(bank.vocab_size))
    return {i: tuple(bank.tensors.rows[p].tolist()) for i, p in enumerate(position.tolist()) if p >= 0}


def expected(rows):
    return {int(i): tuple(row) for i, row in zip(rows.token_ids, rows.rows.tolist(), strict=True)}


def check_books(b):
    """Every row is a slot's or free, and the room that is taken is that of the slots."""
    on_device = [slot for slot in b._slots.values() if slot.bank_rows is not None]
    assert list(map(id, on_device)) == [id(b._storage._placed[n]) for n, slot in b._slots.items() if slot in on_device]
    rows = [int(row) for slot in on_device for row in slot.bank_rows] + b._storage.free_rows
    assert sorted(rows) == list(range(len(b.tensors.rows)))
    for which, tensor in (("buckets", b.tensors.entries), ("outputs", b.tensors.outputs)):
        runs = getattr(b._storage, f"_{which}")
        taken = [(getattr(slot, which), getattr(slot.room, which)) for slot in on_device if getattr(slot.room, which)]
        free = [(start, length) for length, starts in runs._free.items() for start in starts]
        lines = [line for start, length in taken + free for line in range(start, start + length)]
        assert sorted(lines) == list(range(1, runs.used))
        assert runs.used <= len(tensor)
        assert getattr(b._storage.taken, which) == 1 + sum(length for _, length in taken)
    idle = {number for number, slot in b._slots.items() if slot.bank_rows is not None and not slot.holds}
    assert idle == set(b._eviction._idle)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["add", "remove", "replace"]), st.integers(1, 60)), max_size=40),
    options=st.sampled_from([{}, {"capacity": 1}, {"capacity": 300}, {"budget": 20_000}]),
    output=st.booleans(),
)
@example(steps=[("add", 49)] * 3, options={"budget": 20_000}, output=True)
def test_a_slot_holds_what_was_put_there_whatever_came_and_went(steps, options, output):
    b, contents = bank(**options), {}
    for seed, (step, k) in enumerate(steps):
        check_books(b)
        # A row takes 131 bytes at most: its values, buckets that are half of them spare, a run of the head's entries.
        if sum(len(rows.token_ids) for rows in contents.values()) + k > 150 and "budget" in options:
            step = "remove"
        slot = list(contents)[seed % len(contents)] if contents else None
        if step == "add" or slot is None:
            rows = some_rows(seed, k, output=output)
            contents[b.add(rows)] = rows
        elif step == "remove":
            b.remove(slot)
            del contents[slot]
            assert seen(b, slot) == {}
        else:
            rows = some_rows(seed, k)
            del contents[slot]
            contents[b.replace(slot, rows)] = rows
        assert len(b) == len(contents)
    assert seen(b, 0) == {}
    for slot, rows in contents.items():
        assert seen(b, slot) == expected(rows)


def test_slots_and_token_ids_broadcast_like_a_batch():
    b = bank()
    one, two = (b.add(some_rows(seed, 200)) for seed in (1, 2))
    slots, token_ids = torch.tensor([[one], [0], [two]]), torch.randint(0, V, (3, 70))
    found = b.tensors.lookup(slots, token_ids)
    assert found.shape == (3, 70)
    for row, slot in enumerate((one, 0, two)):
        assert found[row].tolist() == b.tensors.lookup(torch.tensor([slot]), token_ids[row]).tolist()
    assert torch.equal(found, b.tensors.lookup(slots, token_ids.int()))


def test_a_table_of_every_token_works():
    b = bank()
    every = SlotRows(torch.arange(V), torch.randn(V, D))
    assert seen(b, b.add(every)) == expected(every)


def test_whoever_holds_a_slot_keeps_its_rows_until_they_let_go():
    b = bank(capacity=20)
    old, new = some_rows(1), some_rows(2)
    slot = b.add(old)
    with b.hold([slot, 0]):
        other = b.replace(slot, new)
        assert other != slot
        assert seen(b, slot) == expected(old)
        assert seen(b, other) == expected(new)
        with pytest.raises(BankError, match="slot 51 of the bank is empty"), b.hold([51]):
            pass
    assert seen(b, slot) == {}
    with pytest.raises(BankError, match="is empty"):
        b.remove(slot)
    third = some_rows(3)
    assert b.add(third) == slot, "a free slot is used again"
    assert seen(b, slot) == expected(third)


def test_room_is_used_again_and_nothing_leaks():
    b = bank()
    for seed in range(40):
        b.add(some_rows(seed, 1 + seed % 9))
    for slot in list(b._slots):
        b.remove(slot)
    size, generation = b.nbytes, b.generation
    for _ in range(5):
        slots = [b.add(some_rows(seed, 1 + seed % 9)) for seed in range(40)]
        for slot in slots:
            b.remove(slot)
    assert (b.nbytes, b.generation, len(b)) == (size, generation, 0)
    assert (b.tensors.entries < 0).all()
    assert (b.tensors.table == 0).all()


def test_a_bank_without_room_in_its_budget_says_so_and_stays_as_it_was():
    b = bank(budget=8_000)
    slots = {}

    def fill():
        for seed in range(100):
            rows = some_rows(seed, 16)
            slots[b.add(rows)] = rows

    with pytest.raises(BankError, match=r"budget of 8,000 bytes has no room for 16 more rows beside \d+ patches"):
        fill()
    assert len(b) == len(slots) > 5
    assert b.nbytes <= 8_000
    for slot, rows in slots.items():
        assert seen(b, slot) == expected(rows)
    b.remove(next(iter(slots)))
    b.add(some_rows(1000, 16))


def test_eviction_moves_the_least_recently_used_out_and_use_brings_it_back():
    b = bank(budget=8_000, evict=True)
    contents = {}
    for seed in range(40):
        rows = some_rows(seed, 16)
        contents[b.add(rows)] = rows
        if seed:
            with b.hold([1]):
                pass
    assert len(b) == 40
    assert b.nbytes - b.tensors.table.nbytes <= 8_000
    assert seen(b, 1) == expected(contents[1]), "it was always the last used"
    assert seen(b, 2) == {}
    for slot, rows in contents.items():
        with b.hold([slot]):
            assert seen(b, slot) == expected(rows)
    with pytest.raises(BankError, match="has no room"), b.hold(contents):
        pass
    assert all(entry.holds == 0 for entry in b._slots.values())


@pytest.mark.parametrize("evict", [False, True])
def test_a_full_bank_that_was_emptied_takes_what_fits(evict):
    """Many small patches in and out, then a large one: the room that they took is not lost."""
    b = bank(budget=60_000, evict=evict)
    small = [b.add(some_rows(seed, 1 + seed % 7)) for seed in range(195)]
    kept = some_rows(1000, 9, output=True)
    stays = b.add(kept)
    for slot in small:
        b.remove(slot)
    with b.hold([stays]):
        large = some_rows(2000, 400)
        slot = b.add(large)
        assert seen(b, slot) == expected(large)
        assert seen(b, stays) == expected(kept)
    line, _ = b.tensors.head_entries(torch.tensor(stays), 9)
    assert torch.equal(b.tensors.rows[line & 0xFFFFFFFF], kept.rows)
    b.remove(slot)
    assert b.nbytes - b.tensors.table.nbytes <= 60_000
    other = some_rows(3000, 300)
    assert seen(b, b.add(other)) == expected(other)
    assert len(b) == 2
    check_books(b)


def test_nothing_is_evicted_for_what_cannot_fit():
    b = bank(budget=8_000, evict=True)
    slots = {b.add(some_rows(seed, 16)): some_rows(seed, 16) for seed in range(5)}
    generation = b.generation
    with pytest.raises(BankError, match="no room for 400 more rows"):
        b.add(some_rows(99, 400))
    for slot, rows in slots.items():
        assert seen(b, slot) == expected(rows), "it is still on the device"
    assert b.generation == generation


def test_a_patch_is_replaced_in_a_budget_that_has_room_for_one():
    rows = some_rows(1, 64)
    b = bank(budget=64 * D * 4 + 3_000)
    slot = b.add(rows)
    with pytest.raises(BankError, match="no room"):
        b.add(some_rows(2, 64))
    new = b.replace(slot, some_rows(3, 64))
    assert seen(b, new) == expected(some_rows(3, 64))
    with b.hold([new]), pytest.raises(BankError, match="no room"):
        b.replace(new, some_rows(4, 64))
    with pytest.raises(BankError, match="no room for 200"):
        b.replace(new, some_rows(5, 200))
    assert seen(b, new) == expected(some_rows(3, 64)), "the old content stays where the new one does not fit"
    assert len(b) == 1


def test_nothing_is_evicted_for_a_batch_that_cannot_fit():
    b = bank(budget=5_000, evict=True)
    one, two, three = (b.add(some_rows(seed, 60)) for seed in range(3))
    assert seen(b, three) == expected(some_rows(2, 60))
    with pytest.raises(BankError, match="the 2 patches that are wanted at once"), b.hold([one, two]):
        pass
    assert seen(b, three) == expected(some_rows(2, 60)), "it is still on the device"
    with b.hold([one]):
        assert seen(b, one) == expected(some_rows(0, 60))


def test_patches_of_all_sizes_in_a_full_budget_are_rarely_moved():
    b = bank(budget=250_000, evict=True)
    slots = [b.add(some_rows(seed, 1 + 7 * seed % 61)) for seed in range(300)]
    generation, back = b.generation, 0
    for turn in range(600):
        slot = slots[turn * 97 % 300]
        back += b._slots[slot].host is not None
        with b.hold([slot]):
            pass
    assert back > 300
    assert b.generation - generation < back / 8
    check_books(b)


def test_what_never_fits_is_refused_at_once():
    b = bank(budget=20_000, evict=True)
    for seed in range(2000):
        b.add(some_rows(seed, 2))
    looked = []
    b._affords = lambda sizes: looked.append(sizes) or PatchBank._affords(b, sizes)
    with pytest.raises(BankError, match="no room"):
        b.add(SlotRows(torch.arange(V), torch.zeros(V, D), True, torch.zeros(V, D)))
    assert len(looked) < 3 * 2000, "once for each patch that could go, and not for all of them each time"


def test_a_capacity_above_the_budget_is_refused():
    with pytest.raises(BankError, match="a capacity of 1,000 rows takes .* more than the budget of 1,000"):
        bank(capacity=1000, budget=1000)


def test_a_budget_is_not_changed_behind_what_is_loaded():
    with pytest.raises(AttributeError):
        bank(budget=10_000).budget = 10


def test_eviction_without_a_budget_is_refused():
    with pytest.raises(BankError, match="give one, budget=BYTES"):
        bank(evict=True)


def test_what_a_failing_device_call_took_comes_back(monkeypatch):
    b = bank(capacity=100)
    old = some_rows(1, 20)
    slot = b.add(old)
    free, state = list(b._storage.free_rows), (b._storage._buckets.end(8), b._storage.taken)
    monkeypatch.setattr(b._storage, "_to_device", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    for change in (lambda: b.add(some_rows(2, 20)), lambda: b.replace(slot, some_rows(3, 20))):
        with pytest.raises(RuntimeError, match="out of memory"):
            change()
    monkeypatch.undo()
    assert sorted(b._storage.free_rows) == sorted(free)
    assert (b._storage._buckets.end(8), b._storage.taken) == state
    assert seen(b, slot) == expected(old)
    assert seen(b, b.add(some_rows(2, 20))) == expected(some_rows(2, 20))


def test_a_captured_bank_does_not_move():
    b = bank(capacity=64, output_width=4)
    first = b.add(some_rows(1, 20))
    tensors = b.tensors
    b.fix()
    second = b.add(some_rows(2, 20, output=False))
    with pytest.raises(BankError, match="its tensors cannot move since a CUDA graph has captured them"):
        b.add(some_rows(3, 30))
    with pytest.raises(
        BankError, match="changes 5 rows of the head, and the CUDA graph that was captured has room for 4"
    ):
        b.add(some_rows(4, 5, output=True))
    b.remove(first)
    assert seen(b, b.add(some_rows(5, 20))) == expected(some_rows(5, 20))
    assert seen(b, second) == expected(some_rows(2, 20))
    assert b.tensors is tensors


def test_a_reader_of_one_state_sees_it_whole_while_the_bank_is_compacted():
    b, wrong, done = bank(budget=60_000, evict=True), [], threading.Event()
    rows = some_rows(7, 40)
    slot = b.add(rows)

    def read():
        with b.hold([slot]):
            while not done.is_set():
                if seen(b, slot) != expected(rows):
                    wrong.append(slot)

    reader = threading.Thread(target=read)
    reader.start()
    generation = b.generation
    for turn in range(60):
        b.remove(b.add(some_rows(turn, [3, 300, 30, 150][turn % 4])))
    done.set()
    reader.join()
    assert not wrong
    assert b.generation > generation


def test_a_wide_head_is_not_paid_for_by_others():
    b = bank()
    narrow = b.add(some_rows(1, 2, output=True))
    before = b.tensors.outputs.nbytes
    wide = b.add(some_rows(2, 300, output=True))
    for seed in range(40):
        b.add(some_rows(seed, 2, output=True))
    assert b.tensors.outputs.nbytes - before < 2 * 8 * (512 + 40 * 2)
    assert (b.width_of([narrow, 0]), b.width_of([wide, narrow]), b.width_of([0])) == (2, 300, 0)


def test_a_head_on_another_device_gets_its_rows_from_the_bank_s():
    """The meta device stands for a second GPU, and nothing but a copy may touch both."""

    class OneDevice(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            devices = {t.device for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)}
            assert len(devices) < 2, func
            return func(*args, **(kwargs or {}))

    tensors = BankTensors.empty(10, D, 4, 9, 3, torch.float32, "cpu")
    slots, there = torch.zeros(2, 1, dtype=torch.int64), torch.device("meta")
    hidden, logits = torch.zeros(2, 3, D, device=there), torch.zeros(2, 3, V, device=there)
    bias, embeddings = torch.zeros(V, device=there), torch.zeros(2, 3, D, device=there)
    with OneDevice():
        assert correct_logits(tensors, slots, 4, hidden, logits, bias).device == there
        position = tensors.lookup(slots, torch.zeros(2, 3, dtype=torch.int64))
        assert replace_rows(embeddings, position, tensors.rows, None).device == there
        with pytest.raises(AssertionError):
            hidden @ tensors.rows[:D].mT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "d", "dtype"),
    [
        (18, 576, torch.bfloat16),
        (32, 576, torch.bfloat16),
        (1, 576, torch.float32),
        (100, 4096, torch.bfloat16),
        (1000, 128, torch.float32),
    ],
)
def test_a_resident_patch_takes_little_more_than_its_rows(k, d, dtype):
    b = PatchBank(49152, d, dtype=dtype, device="cpu")
    patches = max(2, 4000 // k)
    rows = torch.randn(k, d).to(dtype)
    for seed in range(patches):
        b.add(SlotRows(some_rows(seed, k, vocab_size=49152).token_ids, rows))
    assert b.nbytes / patches <= 1.2 * k * d * dtype.itemsize + 1024


def test_a_lookup_touches_as_much_with_a_thousand_patches_as_with_one():
    class Work(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numbers += sum(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]))
            return out

    def work(patches):
        b = bank()
        for seed in range(patches):
            b.add(some_rows(seed))
        slots, token_ids = torch.tensor([[1], [0], [patches]]), torch.randint(0, V, (3, 7))
        with Work() as counted:
            b.tensors.lookup(slots, token_ids)
        return counted.numbers

    assert work(1) == work(1000)


def test_compiled_code_is_compiled_once_whatever_the_bank_and_the_batch_hold():
    b = bank(capacity=400)
    table = EmbeddingTable((), None, False, True, V, D, torch.float32, torch.device("cpu"))
    overlay = Overlay(table, b)
    weight, token_ids = torch.randn(V, D), torch.randint(0, V, (4, 9))
    slots = torch.zeros(4, 1, dtype=torch.int64)
    compiled = torch.compile(overlay.embed, fullgraph=True)
    contents = {0: {}}

    def check(*choice):
        slots.copy_(torch.tensor(choice)[:, None])
        out = compiled(slots, token_ids, weight[token_ids])
        for row, slot in enumerate(choice):
            for column, token in enumerate(token_ids[row].tolist()):
                assert tuple(out[row, column].tolist()) == contents[slot].get(token, tuple(weight[token].tolist()))

    torch._dynamo.reset()
    addresses = [getattr(b.tensors, name).data_ptr() for name in ("rows", "entries", "outputs", "table")]
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(0, 0, 0, 0)
        first, second = some_rows(1, 100), some_rows(2, 100)
        one, two = b.add(first), b.add(second)
        contents |= {one: expected(first), two: expected(second)}
        check(one, 0, two, one)
        third = some_rows(3, 100)
        new = b.replace(one, third)
        contents |= {new: expected(third), one: {}}
        check(new, two, 0, one)
        b.remove(two)
        contents[two] = {}
        check(two, new, two, 0)
    # Within its capacity a bank stays where it is, which is what a captured CUDA graph needs.
    assert [getattr(b.tensors, name).data_ptr() for name in ("rows", "entries", "outputs", "table")] == addresses
    assert b.generation == 0


def test_threads_that_add_hold_and_remove_never_see_anothers_rows():
    b, wrong = bank(), []

    def work(seed):
        for turn in range(60):
            rows = some_rows(1000 * seed + turn, 1 + turn % 30)
            slot = b.add(rows)
            with b.hold([slot]):
                b.remove(slot)  # takes effect at the end
                if seen(b, slot) != expected(rows):
                    wrong.append((seed, turn))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(b) == 0
    assert len(b._storage.free_rows) == len(b.tensors.rows)


def test_a_bank_lets_go_of_its_memory():
    gc.disable()
    try:
        b = bank(capacity=1000)
        rows = weakref.ref(b.tensors.rows)
        b.add(some_rows(1))
        del b
        assert rows() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("ids", "shape", "message"),
    [
        ([], (0, D), "at least one"),
        ([1, V], (2, D), f"from 0 to {V - 1}"),
        ([-1], (1, D), "from 0"),
        ([1, 2, 1], (3, D), "must be different"),
        ([1, 2], (2, D + 1), "do not fit 2 token ids of a table with 8 values a row"),
    ],
)
def test_rows_that_do_not_fit_are_refused(ids, shape, message):
    with pytest.raises(BankError, match=message):
        bank().add(SlotRows(torch.tensor(ids, dtype=torch.int64), torch.zeros(shape)))


def test_outputs_of_slots_of_different_width():
    b = bank()
    narrow = b.add(some_rows(1, 2, output=True))
    assert b.output_width == 2
    wide = b.add(some_rows(2, 5, output=True, output_rows=torch.ones(5, D)))
    assert b.output_width == 5
    assert (b.width_of([0, narrow]), b.width_of([narrow, wide])) == (2, 5)
    for slot, k in ((narrow, 2), (wide, 5)):
        line, known = b.tensors.head_entries(torch.tensor(slot), 5)
        assert known.all()
        ids, rows, output_rows = b.contents(slot)
        assert (line >> 32).tolist() == [*ids.tolist(), *[ids[0].item()] * (5 - k)]
        assert torch.equal(b.tensors.rows[line & 0xFFFFFFFF][:k], output_rows)
        assert (output_rows is rows) == (slot == narrow)
    b.remove(wide)
    assert (b.output_width, b.width_of([narrow, 0])) == (2, 2), "what is gone is not paid for"
    assert not b.tensors.head_entries(torch.tensor([0, wide]), 5)[1].any()
