"""Everything at once on one model, every answer checked: threads, tasks, streams, requests, patches that change.

python tests/stress.py --seconds 60
"""

import argparse
import asyncio
import collections
import contextlib
import gc
import json
import random
import threading
import time

import torch
import transformers
from conftest import tiny_llama
from test_attach import GREEDY, IDS, references
from test_hf import some_patch

from ksl_patch import attach
from ksl_patch.errors import BankError, RunError

PROMPTS = [[5, 9, 300, 17, 40], [17, 17, 5, 251, 9], [40, 5, 300, 9, 9, 251, 17]]
SETTINGS = GREEDY | {"max_new_tokens": 8}
NAMES = ["live", "es", "fr", "sw", "gone"]


class Stress:
    def __init__(self, seconds, seed):
        self.seconds, self.seed = seconds, seed
        self.model = tiny_llama()
        sides = ["input", "input+output"]
        contents = [some_patch(self.model, n, IDS[: 6 + 9 * n], side=sides[n % 2]) for n in range(6)]
        self.contents = {patch.digest: patch for patch in contents}
        plain = references(self.model, self.contents)
        self.expected = {
            digest: [m.generate(torch.tensor([p]), **SETTINGS)[0, len(p) :].tolist() for p in PROMPTS]
            for digest, m in plain.items()
        }
        rows = sum(len(patch.token_ids) for patch in contents)
        # Room for about half of what is loaded: patches are moved out and come back, and the bank is compacted.
        self.handle = attach(self.model, budget=2 * rows * 32 * 4, evict=True)
        self.counts = collections.Counter()
        self.failures = []

    def check(self, name, digests, which, tokens):
        """A name's answer must be the whole answer of one content that it stood for meanwhile."""
        self.counts["answers"] += 1
        allowed = [self.expected[digest][which] for digest in digests]
        if not any(tokens == answer for answer in allowed):
            self.failures.append((name, which, tokens))

    def contents_of(self, name):
        return [None] if name is None else list(self.contents)

    @contextlib.contextmanager
    def refusals(self):
        """Names that are gone and a full bank are told, and nothing else is."""
        try:
            yield
        except (RunError, BankError) as error:
            kind = next(
                (k for k in ("no patch named", "is loaded already", "no room", "is empty") if k in str(error)), None
            )
            if kind is None:
                self.failures.append(repr(error))
            self.counts[f"refused: {kind}"] += 1

    def until_the_end(self, job, n):
        def loop():
            chance = random.Random(1000 * self.seed + n)
            while time.monotonic() < self.end:
                try:
                    with self.refusals():
                        job(chance)
                except Exception as error:
                    self.failures.append(repr(error))

        return threading.Thread(target=loop)

    def batch(self, chance):
        """One prompt under several names at once."""
        names = [chance.choice([*NAMES, None]) for _ in range(chance.randint(1, 4))]
        which = chance.randrange(len(PROMPTS))
        prompts = torch.tensor([PROMPTS[which]] * len(names))
        with self.handle.using(names):
            digests = [None if name is None else self.held(name) for name in names]
            output = self.model.generate(prompts, **SETTINGS)[:, prompts.shape[1] :].tolist()
        for name, possible, tokens in zip(names, digests, output, strict=True):
            self.check(name, [None] if name is None else possible or self.contents, which, tokens)

    def held(self, name):
        """What a block that is open may answer with: unknown where others replace the name."""
        return None if name in ("live", "gone") else [self.handle.digest(name)]

    def stream(self, chance):
        """A bound generator, step by step."""
        name, which = chance.choice(["es", "fr", None]), chance.randrange(len(PROMPTS))
        prompt = torch.tensor([PROMPTS[which]])

        def steps(tokens):
            for _ in range(8):
                tokens = torch.cat([tokens, self.model(tokens).logits[:, -1:].argmax(-1)], dim=1)
                yield int(tokens[0, -1])
                if tokens[0, -1] == 1:
                    return

        digest = None if name is None else self.handle.digest(name)
        with torch.no_grad():
            self.check(name, [digest], which, list(self.handle.bind(name)(steps)(prompt)))

    def thread(self, chance):
        name, which = chance.choice(["es", "fr", None]), chance.randrange(len(PROMPTS))
        digest, answers = None if name is None else self.handle.digest(name), []
        call = self.handle.bind(name)(self.model.generate)
        prompt = torch.tensor([PROMPTS[which]])
        thread = threading.Thread(
            target=lambda: answers.append(call(prompt, **SETTINGS)[0, prompt.shape[1] :].tolist())
        )
        thread.start()
        thread.join()
        self.check(name, [digest], which, answers[0])

    def change(self, chance):
        """Put other contents behind names that come and go."""
        patch = chance.choice(list(self.contents.values()))
        self.handle.replace("live", patch)
        if "gone" in self.handle.names:
            self.handle.unload("gone")
        else:
            self.handle.load(patch, "gone")
        self.counts["changes"] += 1

    def continuous(self):
        """One manager, requests of several names in flight all the time; between its steps the model is others'."""
        generation = transformers.GenerationConfig(**SETTINGS, eos_token_id=1)
        config = transformers.ContinuousBatchingConfig(
            page_size=16, num_blocks=16, max_batch_tokens=64, cpu_offload_space=0
        )
        chance, waiting = random.Random(self.seed), {}
        with self.model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config
        ) as manager:
            paused = self.until_the_end(lambda chance: self.paused(manager, chance), 99)
            paused.start()
            while time.monotonic() < self.end or waiting:
                while len(waiting) < 12 and time.monotonic() < self.end:
                    name, which = chance.choice(["es", "fr", "sw", "live", None]), chance.randrange(len(PROMPTS))
                    with self.refusals(), self.handle.using(name):
                        request = manager.add_request(PROMPTS[which], max_new_tokens=8)
                        waiting[request] = (name, which)
                result = manager.get_result(timeout=20)
                if result is None or result.error:
                    self.failures.append(result and result.error)
                    return
                name, which = waiting.pop(result.request_id)
                digests = {None: [None], "live": list(self.contents)}.get(name) or [self.handle.digest(name)]
                self.check(name, digests, which, result.generated_tokens)
            paused.join()

    def paused(self, manager, chance):
        time.sleep(0.02)
        with manager.pause():
            self.batch(chance)

    async def task(self, n):
        chance = random.Random(77 * self.seed + n)
        while time.monotonic() < self.end:
            name, which = chance.choice(["es", "fr", "sw", None]), chance.randrange(len(PROMPTS))
            prompt = torch.tensor([PROMPTS[which]])
            with self.refusals(), self.handle.using(name):
                digest = None if name is None else self.handle.digest(name)
                await asyncio.sleep(0.001 * chance.random())
                output = await asyncio.to_thread(self.model.generate, prompt, **SETTINGS)
                self.check(name, [digest], which, output[0, prompt.shape[1] :].tolist())

    async def tasks(self):
        await asyncio.gather(*(self.task(n) for n in range(3)))

    def guarded(self, function):
        def call():
            try:
                function()
            except Exception as error:
                self.failures.append(repr(error))

        return threading.Thread(target=call)

    def together(self, jobs, function):
        self.end = time.monotonic() + self.seconds / 2
        threads = [self.until_the_end(job, n) for n, job in enumerate(jobs)] + [self.guarded(function)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def run(self):
        for name, patch in zip(NAMES, self.contents.values(), strict=False):
            self.handle.load(patch, name)
        jobs = [self.batch, self.batch, self.batch, self.stream, self.thread, self.change]
        # One after the other: transformers does not let a manager and other threads share a model.
        self.together(jobs, lambda: asyncio.run(self.tasks()))
        self.together([self.change], self.continuous)
        gc.collect()
        left = sum(slot.holds for slot in self.handle.bank._slots.values()) + len(self.handle._blocks.requests)
        self.handle.detach()
        left += len(self.handle.bank) + len(self.handle.bank.tensors.rows) - len(self.handle.bank._storage.free_rows)
        return {**self.counts, "wrong": len(self.failures), "left": left, "first failures": self.failures[:5]}


def stress(seconds, seed=0):
    """Counts of answers, refusals and changes; `wrong` answers or errors, and what was `left` behind."""
    return Stress(seconds, seed).run()


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(2)
    report = stress(given.seconds, given.seed)
    print(json.dumps(report, indent=2, default=str))
    raise SystemExit(bool(report["wrong"] or report["left"]))
