"""The page of `ksl-patch serve --page` in Chromium, against vLLM's real server."""

import shutil

import pytest
from test_serve import (  # noqa: F401 - fixtures
    KEY,
    PLAIN,
    TEXT,
    Server,
    base,
    home,
    model,
    patches,
)

from ksl_patch.patch import TemplateMeta

pytestmark = pytest.mark.vllm
SOFT = TemplateMeta(text="{source} =", chat=False, unpatched=PLAIN.text)
HOSTILE = "<img src=x onerror=alert(1)> & \"quoted\" 'single' {source} \u202e"


@pytest.fixture(scope="module")
def server(base, home, patches, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("page")
    patches[0].with_meta(language="es").save(folder / "es.safetensors")
    patches[1].with_meta(language="pt-BR", template=SOFT).save(folder / "brazil.safetensors")
    flags = ["--patch", f"es={folder / 'es.safetensors'}", "--patch", f"brazil={folder / 'brazil.safetensors'}"]
    server = Server(
        base, folder / "server.log", *flags, "--page", "--by-language", "--detect-language", "--api-key", KEY, home=home
    )
    try:
        yield server.wait()
    finally:
        server.stop()


def answer(server, name, prompt, count=16):
    with server.client() as client:
        return client.completions.create(model=name, prompt=prompt, max_tokens=count, temperature=0).choices[0].text


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_base_and_patch_answer_side_by_side(server, tmp_path, width, scheme):
    from playwright.sync_api import expect, sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "no Chromium: apt-get install chromium"
    said, asked = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme, locale="es-ES")
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{server.url}/patches")
        expect(page.get_by_role("status")).to_have_text("The server wants its API key.")
        assert all("401" in text for text in said), said
        said.clear()
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("API key").press("Tab")
        options = page.get_by_label("Language").locator("option")
        expect(options).to_have_text(["Spanish (es, 31 rows)", "Brazilian Portuguese (brazil, 31 rows)"])
        page.get_by_label("New tokens").fill("16")
        for choice, name, template in (("es", "es", PLAIN), ("brazil", "brazil", SOFT)):
            page.get_by_label("Language").select_option(choice)
            for text in (TEXT, HOSTILE):
                page.get_by_label("Text").fill(text)
                page.get_by_role("button").click()
                expect(page.get_by_role("status")).to_have_text("", timeout=60_000)
                expect(page.locator("#patched-end")).not_to_be_empty(timeout=60_000)
                shown = [page.locator(place).text_content() for place in ("#base", "#patched")]
                prompts = [each.text.replace("{source}", text, 1) for each in (template.of_base(), template)]
                wanted = [
                    answer(server, name, prompt) for name, prompt in zip((server.base, name), prompts, strict=True)
                ]
                assert shown == wanted
                assert page.get_by_role("heading", name=name).count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=tmp_path / f"page-{width}.png", full_page=True)  # to look at
        # What fails is said, and nothing of it is an answer.
        page.get_by_label("New tokens").fill("1000")
        page.get_by_role("button").click()
        expect(page.get_by_role("status")).to_contain_text("cannot be greater than max_model_len", timeout=60_000)
        assert page.locator("#patched").text_content() == ""
        browser.close()
    assert all(url.startswith(server.url) for url in asked)
    assert [text for text in said if "400" not in text] == []


def test_it_is_there_where_it_was_asked_for_alone(server):
    found = server.http("GET", "/patches", key=None)
    assert found.status_code == 200
    assert "script-src 'sha256-" in found.headers["content-security-policy"]
    assert KEY not in found.text
