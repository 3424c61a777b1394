"""`ksl-patch serve`: vLLM's real server, called with the OpenAI client and over HTTP."""

import dataclasses
import itertools
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import pytest
import torch
from conftest import tiny_llama
from hub_server import Hub, Repo
from test_hf import overwritten, some_patch

from ksl_patch import Patch
from ksl_patch.patch import TemplateMeta

pytestmark = pytest.mark.vllm
IDS = list(range(2, 372, 12))
KEY = "secret"
TEXT = "The cat sees the dog. The house wants the bread."
PLAIN = TemplateMeta(text="English: {source}\nSpanish:", chat=False)


class Server:
    """A server in a process of its own."""

    def __init__(self, base, log, *flags, home, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log, self.base = f"http://127.0.0.1:{self.port}", log, base
        command = [sys.executable, "-m", "ksl_patch", "serve", base, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "float32", "--max-model-len", "160", "--enforce-eager", "--block-size", "32", *flags]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "KSL_PATCH_HOME": str(home), "VLLM_NO_USAGE_STATS": "1"}
        self.process = subprocess.Popen(
            command,
            env=os.environ | settings | environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self):
        import httpx

        for _ in range(240):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.5)
        raise AssertionError(f"no answer after two minutes:\n{self.log.read_text()[-3000:]}")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)

    def http(self, method, path, json=None, key=KEY):
        import httpx

        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.request(method, self.url + path, json=json, headers=headers, timeout=120)

    def client(self):
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)

    def tokens(self, model, prompt, count=20, **more):
        answer = self.client().completions.create(
            model=model, prompt=prompt, max_tokens=count, temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True}, **more,
        )  # fmt: skip
        assert answer.model == model
        return answer.choices[0].token_ids

    def long(self, model, prompt, count):
        """A request long enough to be in flight for a while, begun: its chunks of (place, tokens)."""
        stream = self.client().completions.create(
            model=model, prompt=[prompt] * 64, max_tokens=count, temperature=0, stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        chunks = ((choice.index, choice.token_ids or []) for chunk in stream for choice in chunk.choices)
        return [next(chunks)], chunks


@pytest.fixture(scope="module")
def model():
    return tiny_llama(hidden_size=128)


@pytest.fixture(scope="module")
def base(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def patches(model, tokenizer):
    return [some_patch(model, seed, IDS, tokenizer=tokenizer, template=PLAIN) for seed in range(60)]


@pytest.fixture(scope="module")
def folder(patches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches")
    for number, patch in enumerate(patches):
        patch.save(folder / f"p{number}.safetensors")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def hub(folder):
    """A Hub on loopback where two organisations have the same patches."""
    hub = Hub()
    for repo in ("org/langs", "evil/langs"):
        hub.repos[repo] = Repo()
        hub.repos[repo].commit({f"p{n}.safetensors": (folder / f"p{n}.safetensors").read_bytes() for n in (6, 7)})
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def server(base, folder, home, hub, tmp_path_factory):
    flags = ["--patch", f"es={folder / 'p0.safetensors'}", "--patch", str(folder / "p1.safetensors")]
    flags += ["--folder", str(folder), "--allow-runtime-patches", "--api-key", KEY, "--hub-org", "org"]
    flags += ["--chat-template", "{% for message in messages %}{{ message['content'] }}{% endfor %}"]
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path_factory.mktemp("hf"))}
    server = Server(base, tmp_path_factory.mktemp("log") / "server.log", *flags, home=home, **settings)
    try:
        yield server.wait()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def expected(model, patches, tokenizer):
    """Tokens of a model whose table was overwritten by hand, for a patch's number or None."""
    known = {}

    # Two threads of a small model would wait for each other while the server's own take the processors.
    torch.set_num_threads(1)

    @torch.no_grad()
    def of(number, prompt, count=20):
        if (number, prompt, count) not in known:
            own = overwritten(model, None if number is None else patches[number])
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            settings = {"do_sample": False, "max_new_tokens": count, "eos_token_id": -1, "pad_token_id": 1}
            known[number, prompt, count] = own.generate(ids, **settings)[0, ids.shape[1] :].tolist()
        return known[number, prompt, count]

    yield of
    torch.set_num_threads(2)


def test_models_and_patches_are_listed(server, base, patches):
    models = {model.id: model for model in server.client().models.list()}
    assert {base, "es", "p1"} <= models.keys()
    assert models["es"].parent == models["p1"].parent == base
    listed = {entry["name"]: entry for entry in server.http("GET", "/v1/patches").json()["data"]}
    assert listed["es"]["digest"] == patches[0].digest
    assert listed["es"]["rows"] == len(IDS)
    assert listed["es"]["bytes"] == patches[0].nbytes
    shown = server.http("GET", "/v1/patches/es").json()
    assert shown["template"] == dataclasses.asdict(PLAIN)
    assert server.http("GET", "/v1/patches/es", key="wrong").status_code == 401
    assert server.http("GET", "/v1/patches/nobody").status_code == 404


def test_a_request_picks_its_patch_by_the_model_s_name(server, base, expected):
    for name, number in (("es", 0), (base, None), ("p1", 1)):
        assert server.tokens(name, TEXT) == expected(number, TEXT)
    assert len({tuple(expected(number, TEXT)) for number in (None, 0, 1)}) == 3


def test_streaming(server, expected):
    stream = server.client().completions.create(
        model="es", prompt=TEXT, max_tokens=20, temperature=0, stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    chunks = [chunk.choices[0].token_ids for chunk in stream]
    assert len(chunks) > 10
    assert [token for chunk in chunks for token in chunk or []] == expected(0, TEXT)


def test_names_of_the_folder_and_digests_of_the_store_are_found(server, patches, expected):
    import openai

    assert server.tokens("p7", TEXT) == expected(7, TEXT)
    assert server.tokens(patches[0].digest, TEXT) == expected(0, TEXT)
    for unknown in ("p99", "../base/model", "0" * 64):
        with pytest.raises(openai.NotFoundError):
            server.tokens(unknown, TEXT)


def joined(*chunks):
    texts = {}
    for place, tokens in itertools.chain(*chunks):
        texts[place] = texts.get(place, []) + tokens
    return [texts[place] for place in sorted(texts)]


def test_patches_of_an_allowed_organisation_of_the_hub_are_found(server, hub, expected):
    import openai

    name = "org/langs@main/p6.safetensors"
    assert server.tokens(name, TEXT) == expected(6, TEXT)
    assert server.http("GET", f"/v1/patches/{name}").json()["name"] == name
    answer = server.http("POST", "/v1/patches", {"name": "hubs", "hub": "hf://org/langs/p7.safetensors"})
    assert answer.status_code == 201, answer.text
    assert server.tokens("hubs", TEXT) == expected(7, TEXT)
    hub.seen.clear()
    with pytest.raises(openai.NotFoundError):
        server.tokens("evil/langs/p6.safetensors", TEXT)
    answer = server.http("POST", "/v1/patches", {"name": "evil", "hub": "evil/langs/p6.safetensors"})
    assert (answer.status_code, "takes no patches of evil" in answer.text) == (400, True)
    assert hub.seen == []
    assert server.http("DELETE", f"/v1/patches/{name}").status_code == 200
    assert server.http("DELETE", "/v1/patches/hubs").status_code == 200


def test_a_replaced_name_changes_for_the_next_request_alone(server, expected):
    prompt = f"{TEXT} {TEXT}"
    assert server.http("POST", "/v1/patches", {"name": "live", "path": "p2.safetensors"}).status_code == 201
    assert server.http("POST", "/v1/patches", {"name": "live", "path": "p2.safetensors"}).status_code == 409
    first, rest = server.long("live", prompt, 100)
    answer = server.http("PUT", "/v1/patches/live", {"path": "p3.safetensors"})
    assert answer.status_code == 200, answer.text
    assert server.tokens("live", prompt) == expected(3, prompt)
    assert joined(first, rest) == [expected(2, prompt, 100)] * 64


def test_unload_waits_for_requests_or_says_that_there_are_some(server, expected):
    # On two cores the engine may be through before the server gets to answer; then it is tried again.
    for _ in range(12):
        server.http("POST", "/v1/patches", {"name": "leaving", "path": "p4.safetensors"})
        first, rest = server.long("leaving", TEXT, 100)
        answer = server.http("DELETE", "/v1/patches/leaving")
        if answer.status_code == 409:
            break
        assert joined(first, rest) == [expected(4, TEXT, 100)] * 64
    assert answer.status_code == 409
    assert "requests use leaving: wait for them" in answer.json()["error"]["message"]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(server.http, "DELETE", "/v1/patches/leaving?wait=60")
        assert joined(first, rest) == [expected(4, TEXT, 100)] * 64
        assert waiting.result().status_code == 200
    assert server.http("GET", "/v1/patches/leaving").status_code == 404


def hostile(folder, base, model, tmp_path):
    outside = tmp_path / "outside.safetensors"
    some_patch(model, 1, IDS).save(outside)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "text.safetensors").write_text("not a patch")
    some_patch(tiny_llama(hidden_size=128, seed=9), 1, IDS).save(folder / "other.safetensors")
    some_patch(model, 1, list(range(2, 90))).save(folder / "large.safetensors")
    Patch.from_model(model, [5], torch.zeros(1, 128), name="x", scope="prompt").save(folder / "prompt.safetensors")
    return {
        str(outside): "not a .safetensors file in the folders",
        "../../../etc/passwd": "not a .safetensors file in the folders",
        "link.safetensors": "not a .safetensors file in the folders",
        "hf://org/repo@main/x.safetensors": "not a .safetensors file in the folders",
        "http://127.0.0.1/x.safetensors": "not a .safetensors file in the folders",
        f"{base}/model.safetensors": "not a .safetensors file in the folders",
        "text.safetensors": "not a valid safetensors file",
        "other.safetensors": "31 of the patch's 31 base rows differ",
        "large.safetensors": "has 88 rows, and a slot has room for 64",
        "prompt.safetensors": "acts on the prompt only",
        "x\0.safetensors": "NUL",
    }


def test_what_may_not_be_loaded_is_refused_in_a_sentence(server, folder, base, model, tmp_path, expected):
    for path, why in hostile(folder, base, model, tmp_path).items():
        answer = server.http("POST", "/v1/patches", {"name": "bad", "path": path})
        assert (answer.status_code, why in answer.json()["error"]["message"]) == (400, True), (path, answer.text)
        assert "Traceback" not in answer.text
        assert server.http("PUT", "/v1/patches/es", {"path": path}).status_code == 400
    for body in ({"name": "../x", "path": "p1.safetensors"}, {"name": "x"}, {"path": "p1.safetensors", "sha": 1}):
        assert server.http("POST", "/v1/patches", body).status_code in (400, 422)
    assert server.http("POST", "/v1/patches", {"name": "x", "digest": "0" * 64}).status_code == 400
    assert (
        server.http(
            "POST", "/v1/patches", {"name": base.split("/")[-1], "path": "p1.safetensors"}, key=None
        ).status_code
        == 401
    )
    for route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"):
        assert server.http("POST", route, {"lora_name": "x", "lora_path": str(folder)}).status_code == 403
    assert server.tokens("es", TEXT) == expected(0, TEXT)


def test_two_hundred_requests_over_fifty_patches_while_they_come_and_go(server, expected, tokenizer):
    fixed = {f"n{number}": number for number in range(10, 50)}
    for name, number in fixed.items():
        answer = server.http("POST", "/v1/patches", {"name": name, "path": f"p{number}.safetensors"})
        assert answer.status_code == 201, answer.text
    for turn in range(10):
        server.http("POST", "/v1/patches", {"name": f"moving{turn}", "path": f"p{50 + turn % 5}.safetensors"})
    texts = [f"The {noun} sees the sea." for noun in ("cat", "dog", "book")]
    for number in [*fixed.values(), *range(50, 55)]:
        for text in texts:
            expected(number, text)
    done, changes = threading.Event(), []

    def change():
        r = random.Random(0)
        while not done.is_set():
            name = f"moving{r.randrange(10)}"
            action = r.choice(["PUT", "PUT", "DELETE", "POST"])
            body = None if action == "DELETE" else {"path": f"p{50 + r.randrange(5)}.safetensors"}
            if action == "POST":
                answer = server.http("POST", "/v1/patches", {"name": name, **body})
            else:
                answer = server.http(action, f"/v1/patches/{name}", body)
            changes.append((action, answer.status_code))

    def ask(index):
        r = random.Random(index)
        text = r.choice(texts)
        if index % 5 == 0:  # of a name that changes: one of the contents it may have, never a mix
            import openai

            try:
                found = server.tokens(f"moving{r.randrange(10)}", text)
            except openai.NotFoundError:
                return True
            return any(found == expected(number, text) for number in range(50, 55))
        name = r.choice(list(fixed))
        return server.tokens(name, text) == expected(fixed[name], text)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with ThreadPoolExecutor(40) as pool:
            right = list(pool.map(ask, range(200), timeout=300))
            while sum(code in (200, 201) for _, code in changes) < 5:  # a slow machine
                assert changer.is_alive(), changes
                assert len(right) < 1000, changes
                right += pool.map(ask, range(40), timeout=120)
    finally:
        done.set()
        changer.join()
    assert all(right)
    assert {code for _, code in changes} <= {200, 201, 404, 409}
    for name in [entry["name"] for entry in server.http("GET", "/v1/patches").json()["data"]]:
        if name.startswith(("n", "moving")):
            assert server.http("DELETE", f"/v1/patches/{name}?wait=30").status_code == 200
    left = server.http("GET", "/v1/patches").json()["data"]
    assert not [entry for entry in left if entry["in_flight"] or entry["name"].startswith(("n", "moving"))]


@pytest.mark.skipif(
    any(vllm.version.startswith("0.33.0+cpu") for vllm in metadata.distributions(name="vllm")),
    reason="0.33's Python over 0.32's compiled parts starts no two engines on a CPU, without this package neither",
)
def test_two_data_parallel_engines(base, folder, home, tmp_path, expected):
    flags = ["--patch", f"es={folder / 'p0.safetensors'}", "--data-parallel-size", "2", "--folder", str(folder)]
    flags += ["--allow-runtime-patches", "--api-key", KEY]
    server = Server(base, tmp_path / "server.log", *flags, home=home, VLLM_CPU_OMP_THREADS_BIND="0|1")
    try:
        server.wait()
        assert server.http("POST", "/v1/patches", {"name": "new", "path": "p2.safetensors"}).status_code == 201
        numbers = {"es": 0, "new": 2, "p3": 3, base: None}
        names = list(numbers) * 8
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda name: server.tokens(name, TEXT), names))
        assert found == [expected(numbers[name], TEXT) for name in names]
        engines = set(re.findall(r'vllm:request_success_total\{engine="(\d)"', server.http("GET", "/metrics").text))
        assert engines == {"0", "1"}
    finally:
        server.stop()


def metric(text, name, label=""):
    found = re.search(rf"^{re.escape(name + label)} (\S+)$", text, re.MULTILINE)
    return None if found is None else float(found[1])


def test_metrics(server):
    before = server.http("GET", "/metrics").text
    server.tokens("p1", TEXT, 7)
    after = server.http("GET", "/metrics").text
    label = '{patch="p1"}'
    for name, change in (("requests", 1), ("generation_tokens", 7)):
        full = f"ksl_patch:{name}_total"
        assert metric(after, full, label) - (metric(before, full, label) or 0) == change
    assert metric(after, "ksl_patch:prompt_tokens_total", label) > 0
    assert metric(after, "ksl_patch:patches_loaded") >= 2
    assert metric(after, "ksl_patch:bank_bytes") == metric(before, "ksl_patch:bank_bytes") > 64 * 16 * 128 * 4
    assert metric(after, "ksl_patch:load_seconds_count") >= 1
    assert metric(after, "ksl_patch:replace_seconds_count") >= 1
    served = next(e for e in server.http("GET", "/v1/patches").json()["data"] if e["name"] == "p1")
    assert served["requests"] == metric(after, "ksl_patch:requests_total", label)


def test_what_a_patch_changes_in_prompts_is_counted(server):
    def counted():
        text = server.http("GET", "/metrics").text
        names = ("patched_positions", "requests_without_effect")
        return [metric(text, f"ksl_patch:{name}_total", '{patch="p1"}') or 0 for name in names]

    before = counted()
    for prompt in ([IDS[0], IDS[0] + 1, IDS[3], IDS[0]], [IDS[0] + 1, IDS[1] + 1], [IDS[0] + 2]):
        server.tokens("p1", prompt, 2)
    server.client().completions.create(model="p1", prompt=[IDS[0], IDS[0] + 1], max_tokens=2, n=3)  # counted once
    assert [b - a for a, b in zip(before, counted(), strict=True)] == [4, 2]
    lines = [line for line in server.log.read_text().splitlines() if "has none of the patch's 31 tokens" in line]
    assert sum("'p1'" in line for line in lines) == 1


def test_a_prompt_outside_the_template_is_said_once(server):
    for _ in range(2):
        server.tokens("es", TEXT)
    server.tokens("es", PLAIN.render(TEXT))
    lines = [line for line in server.log.read_text().splitlines() if "a prompt for 'es' does not match" in line]
    assert len(lines) == 1


def test_a_prompt_outside_the_template_is_said_whatever_the_route(server):
    """A chat's messages, token ids: what reaches the engine is looked at."""

    def chat(model, text):
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 3}
        assert server.http("POST", "/v1/chat/completions", body).status_code == 200

    def warned(model):
        return sum(f"a prompt for '{model}' does not match" in line for line in server.log.read_text().splitlines())

    chat("p8", PLAIN.render(TEXT))
    assert warned("p8") == 0
    chat("p8", TEXT)
    chat("p8", TEXT)
    assert warned("p8") == 1
    server.tokens("p9", [5, 6, 7], 3)
    assert warned("p9") == 1


def test_the_template_is_applied_where_that_was_asked_for(base, folder, home, tmp_path, expected):
    rendered = PLAIN.render(TEXT)
    loaded = Patch.load(folder / "p1.safetensors")
    end = expected(1, rendered)[4]  # another token than the model's own ends
    turns = dataclasses.replace(PLAIN, end_token_id=end)
    loaded.with_meta(template=turns).save(tmp_path / "turns.safetensors")
    about = dataclasses.replace(PLAIN, text="About {topic}. " + PLAIN.text, fields=["topic"])
    loaded.with_meta(template=about).save(tmp_path / "about.safetensors")
    flags = ["--patch", f"es={folder / 'p0.safetensors'}", "--apply-template"]
    flags += [
        "--patch",
        f"turns={tmp_path / 'turns.safetensors'}",
        "--patch",
        f"about={tmp_path / 'about.safetensors'}",
    ]
    server = Server(base, tmp_path / "server.log", *flags, home=home)
    try:
        server.wait()
        assert server.tokens("es", TEXT) == expected(0, rendered)
        # What ends an answer in the patch's template ends one here; a template that needs more is not filled by half.
        whole = expected(1, rendered)
        assert server.tokens("turns", TEXT) == whole[: whole.index(end) + 1]
        import httpx
        from openai import BadRequestError

        with pytest.raises(BadRequestError, match="'topic' beside the sentence"):
            server.tokens("about", TEXT)
        prompt = about.render(TEXT, topic="cats")
        assert server.tokens("about", prompt) == expected(1, prompt)
        assert server.tokens("es", rendered) == expected(0, rendered)
        assert server.tokens(base, TEXT) == expected(None, TEXT)
        both = server.client().completions.create(
            model="es", prompt=[TEXT, rendered], max_tokens=20, temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        assert [choice.token_ids for choice in both.choices] == [expected(0, rendered)] * 2
        # SageMaker's route takes the patch from a header and forgets the body's; here both are answered by the patch.
        body = {"prompt": TEXT, "max_tokens": 20, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
        header = {"X-Amzn-SageMaker-Adapter-Identifier": "es"}
        for more, headers in (({"model": "es"}, {}), ({"model": base}, header)):
            answer = httpx.post(f"{server.url}/invocations", json=body | more, headers=headers, timeout=120)
            assert answer.json()["choices"][0]["token_ids"] == expected(0, rendered)
        answer = httpx.post(f"{server.url}/invocations", json=body | {"model": base}, timeout=120)
        assert answer.json()["choices"][0]["token_ids"] == expected(None, TEXT)
        for method, path in (("POST", ""), ("PUT", "/es"), ("DELETE", "/es")):
            body = None if method == "DELETE" else {"path": str(folder / "p1.safetensors")}
            answer = server.http(method, f"/v1/patches{path}", body)
            assert answer.status_code == 403
            assert "--allow-runtime-patches" in answer.json()["error"]["message"]
        assert server.http("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/"}).status_code == 404
    finally:
        server.stop()
