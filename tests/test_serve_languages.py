"""`ksl-patch serve --by-language`: vLLM's real server picks a patch by the language that a request says."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_cli, tiny_llama
from test_hf import some_patch
from test_serve import KEY, PLAIN, TEXT, Server, base, expected, home, model, patches  # noqa: F401 - fixtures

from ksl_patch import Patch
from ksl_patch.errors import DataError, PatchError
from ksl_patch.store.local import Store
from ksl_patch.vllm import lora_request

pytestmark = pytest.mark.vllm
LANGUAGES = ["es", "pt-BR", "es-MX", "zh-Hant"]


@pytest.fixture(scope="module")
def server(base, home, patches, tmp_path_factory):  # noqa: F811
    folder, flags = tmp_path_factory.mktemp("spoken"), []
    Store(home).add(patches[1].with_meta(language="ja"))  # of equal rows the store has one description
    for number, language in enumerate(LANGUAGES):
        patches[number].with_meta(language=language).save(folder / f"p{number}.safetensors")
        flags += ["--patch", str(folder / f"p{number}.safetensors")]
    flags += [
        "--by-language",
        "--detect-language",
        "--api-key",
        KEY,
        "--allow-runtime-patches",
        "--folder",
        str(folder),
    ]
    flags += ["--chat-template", "{% for message in messages %}{{ message['content'] }}{% endfor %}"]
    server = Server(base, folder / "server.log", *flags, home=home)
    try:
        yield server.wait()
    finally:
        server.stop()


def ask(server, path="/v1/completions", headers=(), **body):
    import httpx

    what = {"messages": [{"role": "user", "content": TEXT}]} if "chat" in path else {"prompt": TEXT}
    settings = {"max_tokens": 20, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    return httpx.post(
        server.url + path, json={"model": server.base} | what | settings | body,
        headers={"Authorization": f"Bearer {KEY}"} | dict(headers), timeout=120,
    )  # fmt: skip


def said(answer):
    names = ("x-ksl-patch", "content-language")
    return tuple(answer.headers.get(name) for name in names)


def tokens(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    ("header", "body", "number"),
    [
        ({"Accept-Language": "fr, pt-PT;q=0.8, es;q=0.9"}, {}, 0),
        ({"Accept-Language": "pt"}, {}, 1),
        ({"Content-Language": "zh-TW"}, {}, 3),
        ({}, {"language": "es-MX"}, 2),
        ({}, {"language": ["fr", "es-ES"]}, 0),
        ({}, {"language": "es-AR"}, 2),  # as Mexican, by CLDR
        # What goes before what: the body before Content-Language, and that before Accept-Language.
        ({"Accept-Language": "es", "Content-Language": "pt"}, {}, 1),
        ({"Content-Language": "pt"}, {"language": "es"}, 0),
        # Nobody speaks it: the base; and so without a word of it.
        ({"Accept-Language": "fr, zh-CN;q=0.5, *;q=0.1"}, {}, None),
        ({}, {"language": None}, None),
    ],
)  # fmt: skip
def test_the_answer_is_that_of_the_language_s_patch(server, patches, expected, header, body, number):  # noqa: F811
    answer = ask(server, headers=header, **body)
    assert tokens(answer) == expected(number, TEXT)
    if number is None:
        assert said(answer) == (None, None)
        assert ("no patch speaks fr, zh-CN." in answer.headers.get("x-ksl-language", "")) == bool(header)
    else:
        assert said(answer) == (f"p{number}@{patches[number].digest[:8]}", LANGUAGES[number])
        assert answer.json()["model"] == f"p{number}"
    assert ("goes before content-language" in answer.headers.get("x-ksl-language", "")) == (
        len(header) + len(body) > 1 and "language" in body
    )


def test_what_is_no_language_in_a_header_is_left_out_and_said(server, expected):  # noqa: F811
    answer = ask(server, headers={"Accept-Language": "C, en_US.UTF-8, pt"})
    assert tokens(answer) == expected(1, TEXT)
    assert answer.headers["x-ksl-language"].startswith("accept-language but for 2 of no language: p1 is pt-BR")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/invocations"])
def test_other_routes_choose_too(server, expected, path):  # noqa: F811
    answer = ask(server, path, {"Accept-Language": "pt"})
    assert tokens(answer) == expected(1, TEXT)
    assert said(answer)[1] == "pt-BR"


def test_a_streamed_answer_and_responses(server, expected):  # noqa: F811
    with server.client() as client:
        raw = client.completions.with_raw_response.create(
            model=server.base, prompt=TEXT, max_tokens=20, temperature=0, stream=True,
            extra_headers={"Accept-Language": "es"}, extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        assert raw.headers["x-ksl-patch"].startswith("p0@")
        assert [token for chunk in raw.parse() for token in chunk.choices[0].token_ids or []] == expected(0, TEXT)
        raw = client.responses.with_raw_response.create(
            model=server.base, input=TEXT, max_output_tokens=8, temperature=0, extra_body={"language": "pt"}
        )
        assert raw.headers["content-language"] == "pt-BR"
        assert raw.parse().model == "p1"


def test_where_nothing_is_said_the_text_says_it(server, expected):  # noqa: F811
    text = "Todos los seres humanos nacen libres e iguales en dignidad y derechos."
    answer = ask(server, prompt=text)
    assert (tokens(answer), said(answer)[1]) == (expected(0, text), "es")
    assert answer.headers["x-ksl-language"].startswith("detected, score ")
    assert said(ask(server, headers={"Accept-Language": "*"}, prompt=text))[1] == "es"  # as many clients send
    for headers, body in (
        ({}, {"language": "*"}),
        ({"Accept-Language": "es"}, {"language": "*"}),
        ({}, {"language": "xh"}),
    ):
        assert tokens(ask(server, headers=headers, prompt=text, **body)) == expected(None, text)


def test_a_request_that_names_a_patch_gets_it(server, expected):  # noqa: F811
    answer = ask(server, headers={"Accept-Language": "es"}, model="p1")
    assert tokens(answer) == expected(1, TEXT)
    assert "x-ksl-language" not in answer.headers


@pytest.mark.parametrize(
    ("header", "body", "sentence"),
    [
        ({"Accept-Language": ",".join(["es"] * 1000)}, {}, "at most"),
        ({}, {"language": "en_US.UTF-8"}, "is not the tag of a language"),
        ({}, {"language": 3}, "language is the tag of a language"),
        ({}, {"language": []}, "language is the tag of a language"),
    ],
)
def test_what_is_no_language_is_refused_in_a_sentence(server, header, body, sentence):
    answer = ask(server, headers=header, **body)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]["message"]


def test_the_routes_say_what_would_be_chosen_and_what_comes_later_counts(server, patches, expected):  # noqa: F811
    shown = server.http("GET", "/v1/patches?language=fr,pt-PT").json()["choice"]
    assert (shown["name"], shown["asked"], shown["is_used"]) == ("p1", "pt-PT", True)
    assert server.http("GET", "/v1/patches?language=1").status_code == 400
    assert tokens(ask(server, language="sw")) == expected(None, TEXT)
    late = patches[4].with_meta(language="sw", name="late")
    path = next(iter(server.log.parent.glob("p0.safetensors"))).with_name("late.safetensors")
    late.save(path)
    assert server.http("POST", "/v1/patches", {"path": str(path)}).status_code == 201
    assert tokens(ask(server, language="sw")) == expected(4, TEXT)
    patches[5].with_meta(language="sw", name="late").save(path)
    assert server.http("PUT", "/v1/patches/late", {"path": str(path)}).status_code == 200
    answer = ask(server, language="sw")
    assert (tokens(answer), said(answer)[0]) == (expected(5, TEXT), f"late@{patches[5].digest[:8]}")
    Patch.load(path).with_meta(language="yo").save(path)
    assert server.http("PUT", "/v1/patches/late", {"path": str(path)}).status_code == 200
    assert tokens(ask(server, language="sw")) == expected(None, TEXT)
    assert server.http("GET", "/v1/patches/late").json()["language"] == "yo"
    assert tokens(ask(server, language="yo")) == expected(5, TEXT)
    assert server.http("DELETE", "/v1/patches/late").status_code == 200
    assert tokens(ask(server, language="yo")) == expected(None, TEXT)


def test_what_does_not_go_together_is_said(base):  # noqa: F811
    code, _, err = run_cli("serve", base, "--strict-language", "--dry-run")
    assert (code, "need --by-language" in err) == (2, True)


def test_in_python_a_request_is_for_a_language(patches, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("KSL_PATCH_HOME", str(tmp_path / "home"))
    with pytest.raises(PatchError, match="no patch of the local store speaks 'es'"):
        lora_request(language="es")
    store = Store()
    for number, language in enumerate(("es", "pt-BR", None)):
        store.add(patches[number].with_meta(language=language), f"p{number}")
        patches[number].with_meta(language=language).save(tmp_path / f"p{number}.safetensors")
    made = lora_request(language="pt")
    assert (made.lora_name, made.lora_int_id) == ("p1", lora_request(patches[1]).lora_int_id)
    config = tmp_path / "patches.toml"
    config.write_text('base = "x"\n[patches]\nspanish = "p0.safetensors"\nother = "p0.safetensors"\n')
    assert lora_request(language="es-MX", config=config).lora_name == "spanish"
    for given, why in (({}, "one of the two"), ({"patch": patches[0], "config": config}, "one of the two"),
                       ({"language": "pt", "config": config}, "speaks 'pt'")):  # fmt: skip
        with pytest.raises(PatchError, match=why):
            lora_request(**given)
    with pytest.raises(DataError, match="is not the tag of a language"):
        lora_request(language="x y")
    store.add(some_patch(tiny_llama(seed=9), 3).with_meta(language="es"), "elsewhere")
    with pytest.raises(PatchError, match=r"several bases speak 'es' \(elsewhere, p0\)"):
        lora_request(language="es")


def test_the_example_asks_for_languages(server, expected):  # noqa: F811
    command = [sys.executable, ROOT / "examples/by_language.py", f"{server.url}/v1", server.base, TEXT, "pt", "fr"]
    environment = os.environ | {"OPENAI_API_KEY": KEY}
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("openai, ")]
    assert "by p1@" in lines[0]
    assert "by the base (accept-language: no patch speaks fr.)" in lines[1]


def test_curl_asks_for_a_language(server, expected):  # noqa: F811
    body = {"model": server.base, "prompt": TEXT, "max_tokens": 20, "temperature": 0, "return_token_ids": True,
            "ignore_eos": True}  # fmt: skip
    command = ["curl", "-si", f"{server.url}/v1/completions", "-H", "Content-Type: application/json"]
    command += ["-H", f"Authorization: Bearer {KEY}", "-H", "Accept-Language: pt-BR, es;q=0.8", "-d", json.dumps(body)]
    head, _, content = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n\n")
    assert "x-ksl-patch: p1@" in head
    assert json.loads(content)["choices"][0]["token_ids"] == expected(1, TEXT)
