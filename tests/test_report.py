"""The report: what is on the page, that hostile text stays text, and how Chromium shows it."""

import dataclasses
import html.parser
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import run_cli

from ksl_patch import Patch
from ksl_patch.errors import PatchError
from ksl_patch.evidence.certificate import at_least, ks_margin, lower_bound
from ksl_patch.patch import Origin, TemplateMeta, TicketMeta
from ksl_patch.patch.evaluation import Certificate, Evaluation, Figure, Sample, SystemScores, write
from ksl_patch.report.page import AllRows, make_report

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)> $\\frac$ & \"quoted\" 'single' \u202e"
IDS = [3, 5, 7, 40, 41, 42, 43, 44]


def figures(shift):
    def figure(value, difference, spread):
        return Figure(value=value, difference=difference, low=difference - spread, high=difference + spread)

    return {
        "loss": figure(4.7 + shift, shift, 0.1),
        "chrf": figure(12.0 - shift, -shift, 2.0),
        "chrf_first_line": figure(9.0 - 4 * shift, -4 * shift, 1.5),
        "bleu": figure(0.5, 0.1, 0.3),
        "bleu_first_line": figure(0.6, 0.0, 0.3),
        "stop_rate": figure(0.6 - 0.3 * shift, -0.3 * shift, 0.1),
        "characters": figure(130.0 + 80 * shift, 80 * shift, 12.0),
    }


def evaluation(**changes):
    base = {name: Figure(value=figure.value) for name, figure in figures(0.0).items()}
    shifts = {"embedding": -0.8, "patch": -0.7, "frequency": -0.72, "l2": -0.69, "random": -0.05, "noise": 0.9}
    return Evaluation(
        pairs=64, data_digest="ab" * 32, loss_base=4.7, loss_patch=4.0, max_new_tokens=60, confidence=0.95,
        resamples=1000, signatures={"chrf": "nrefs:1|case:mixed"}, notes=["BLEU is over 13a's words."],
        systems=[SystemScores(name="base", rows=[0], seeds=[], figures=base)]
        + [SystemScores(name=name, rows=[8], seeds=[0], figures=figures(shift)) for name, shift in shifts.items()],
        samples=[Sample(source="Peace be upon you.", reference="مرحبا بالعالم", base="Paz\n" * 9, patch="La paz sea.")],
    )  # fmt: skip


def certificate():
    margins = torch.linspace(0, 1, 64)
    return Certificate(
        pairs=64, data_digest="ab" * 32, delta=0.05, max_new_tokens=60, exact=3,
        next_token=lower_bound(50, 64, 0.05), continuation=lower_bound(9, 64, 0.05),
        margin=ks_margin(margins, margins < 0.4, torch.zeros(400), torch.tensor(IDS), 32, 0.05),
    )  # fmt: skip


def make(model, name="es", seed=0, **meta):
    base = model.get_input_embeddings().weight.detach()[IDS]
    rows = base + torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    patch = Patch.from_model(
        model, IDS, rows, name=name, language="es", template=TemplateMeta(text="Say {source}:", chat=False)
    )
    ticket = TicketMeta(
        selection="ks", test="two-sample Kolmogorov-Smirnov", alpha=0.05, top_k=None,
        statistic=[0.2 + i / 50 for i in range(8)], pvalue=[0.01] * 8,
    )  # fmt: skip
    tokens = [" de", "$", "\n", "日本", "العربية", HOSTILE, "ó", "<b>"]
    return patch.with_meta(**{
        "ticket": ticket, "tokens": tokens, "evaluation": write(evaluation()), "certificate": write(certificate()),
    } | meta)  # fmt: skip


def all_rows():
    rng = np.random.default_rng(0)
    counts = rng.geometric(0.05, 400) * (rng.random(400) < 0.7)
    statistic = np.where(counts > 0, rng.random(400) * 0.2, 0.0)
    statistic[IDS] = [0.2 + i / 50 for i in range(8)]
    counts[IDS] = [500, 1, 3, 20, 900, 4000, 7, 60]
    return AllRows(statistic, counts)


class Text(html.parser.HTMLParser):
    """What a browser would show, and the elements and attributes that it would build."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self._inside = [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._inside.append(tag)

    def handle_endtag(self, tag):
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass

    def handle_data(self, data):
        if "style" not in self._inside:
            self.text += data


@pytest.mark.slow
def test_the_page_says_what_the_patch_is_and_what_was_measured(model):
    patch = make(model, licence="CC-BY-4.0")
    found = Text(make_report([patch], [all_rows()]))
    text = re.sub(r"\s+", " ", found.text)
    for part in (
        patch.digest, patch.meta.base.fingerprint, "8 of 400, 32 values each", "CC-BY-4.0", "ks (p < 0.05)",
        "4.700 → 4.000", "most frequent rows", "random change, same norms", "-0.800 to -0.600",
        "Peace be upon you.", "La paz sea.", "مرحبا بالعالم", "3 of 64 inputs", "A heuristic after KS-Lottery",
        f"at least {at_least(lower_bound(50, 64, 0.05).lower)} with confidence 95%",
        "nrefs:1|case:mixed", "BLEU is over 13a's words.", "Say {source}:",
    ):  # fmt: skip
        assert part in text, part
    # Each picture has a title and a description inside: the text alternative.
    titles = found.tags.count("title") - 1
    assert found.tags.count("svg") == titles == found.tags.count("desc") == 6 + 1 + 6
    assert "patch: -0.700 (-0.800 to -0.600)" in text
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert make_report([patch], [all_rows()]) == make_report([patch], [all_rows()])


@pytest.mark.slow
def test_hostile_text_stays_text_and_nothing_is_fetched(model):
    patch = make(
        model,
        evaluation=write(
            dataclasses.replace(
                evaluation(),
                notes=[HOSTILE],
                samples=[Sample(source=HOSTILE, reference=HOSTILE, base=HOSTILE, patch=HOSTILE)],
                systems=[dataclasses.replace(system, name=HOSTILE) for system in evaluation().systems],
            )
        ),
        template=TemplateMeta(text=HOSTILE + "{source}", chat=False),
        licence=HOSTILE,
        created=HOSTILE,
        origin=[Origin(name=HOSTILE, digest=HOSTILE, token_ids=IDS)],
    )
    page = make_report([patch, patch], [all_rows(), None])
    found = Text(page)
    assert not {"script", "img", "link", "iframe", "object", "base"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    links = [value for name, value in found.attributes if name in ("href", "src", "xlink:href", "action")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in links)
    assert re.findall(r"url\((?!#)", page) == []
    assert "default-src 'none'" in page
    assert found.text.count("alert(1)") > 10


def test_what_is_not_at_hand_is_said_to_be_missing(model):
    bare = make(model, evaluation=None, certificate=None, ticket=None, tokens=None)
    text = re.sub(r"\s+", " ", Text(make_report([bare], [None])).text)
    for part in ("Nothing was measured", "None. ksl-patch certify", "Not at hand: the test of every row"):
        assert part in text
    loss_only = Evaluation(pairs=16, data_digest="0" * 64, loss_base=4.5, loss_patch=4.25)
    text = Text(make_report([make(model, evaluation=write(loss_only))], [None])).text
    assert "4.500 for the base, 4.250 with the patch" in text
    with pytest.raises(PatchError, match="evaluation is not in the form"):
        make_report([make(model, evaluation={"pairs": "many"})], [None])
    huge = write(evaluation())
    huge["systems"][2]["figures"]["loss"]["value"] = 1e308
    with pytest.raises(PatchError, match="evaluation is not in the form"):
        make_report([make(model, evaluation=huge)], [None])


def test_any_token_and_any_finite_row_can_be_drawn(model):
    patch = make(model, tokens=["\0", "\x1b[31m", "\u2028", "$$", "_{", "\\", "%", "a" * 5000])
    rows = patch.rows.clone()
    rows[:, 0], rows[:, 1] = 3e38, -3e38
    page = make_report([dataclasses.replace(patch, rows=rows)], [AllRows(np.zeros(400), np.zeros(400, dtype=np.int64))])
    assert "Values of the row of" in page


@pytest.mark.slow
def test_several_patches_are_compared_first(model):
    patches = [make(model, name, seed) for seed, name in enumerate(("es", "fr", "id"))]
    page = make_report(patches, [None, all_rows(), None])
    text = re.sub(r"\s+", " ", Text(page).text)
    assert "es · fr · id" in text
    assert "Tokens that two patches share" in text
    assert "different held-out pairs" not in text
    other = make(model, "sv", 5, evaluation=write(dataclasses.replace(evaluation(), data_digest="cd" * 32)))
    assert "measured on different pairs" in make_report([patches[0], other], [None, None])


@pytest.mark.slow
def test_the_command_line_writes_the_page_from_the_patch_and_its_run(base_folder, pairs_file, tmp_path):
    path, page = tmp_path / "es.safetensors", tmp_path / "report.html"
    code, _, err = run_cli(
        "build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "-o", path, "--top-k", "6",
        "--embed-steps", "8", "--embed-lr", "2", "--steps", "4", "--held-out", "8",
    )  # fmt: skip
    assert code == 0, err
    code, out, err = run_cli("report", path, "-o", page, "--json")
    assert code == 0, err
    assert json.loads(out)["bytes"] == page.stat().st_size
    assert "rows as points, the 6 of the patch as diamonds" in Text(page.read_text()).text
    assert run_cli("report", path, "-o", page)[0] == 2
    other = tmp_path / "elsewhere" / "alone.safetensors"  # beside the folder it would be found
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    code, _, err = run_cli("report", path, other, "-o", page, "--force")
    assert code == 0, err
    assert "Not at hand: the test of every row" in page.read_text()
    (tmp_path / "none").mkdir()
    code, _, err = run_cli("report", other, "--run", tmp_path / "none", "-o", page, "--force")
    assert (code, "there is no record of this patch" in err) == (1, True)
    assert (
        run_cli("report", other, "--run", tmp_path / "none", "--run", tmp_path / "none", "-o", page, "--force")[0] == 2
    )
    [tests] = (tmp_path / "es.safetensors.run").glob("embed-*/ks.npz")
    tests.write_bytes(tests.read_bytes()[:100])
    code, _, err = run_cli("report", path, "-o", page, "--force")
    assert (code, "cannot read" in err) == (1, True)
    code, _, err = run_cli("report", path, "-o", tmp_path / "no" / "page.html")
    assert code == 1


@pytest.mark.browser
@pytest.mark.parametrize(
    ("width", "scheme", "media"), [(1200, "light", "screen"), (360, "dark", "screen"), (794, "light", "print")]
)
def test_chromium_shows_it_without_errors_and_without_a_request(model, tmp_path, width, scheme, media):
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "no Chromium: apt-get install chromium, or leave out `-m browser`"
    path = tmp_path / "report.html"
    patches = [make(model, name, seed) for seed, name in enumerate(("es", "fr-with-a-rather-long-name-that-goes-on"))]
    path.write_text(make_report(patches, [all_rows(), all_rows()]))
    said, asked = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.emulate_media(media=media)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        # Nothing is wider than the screen, and every picture has a size and a name.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if width > 400:  # on a phone, a table of eight columns is scrolled
            cut = page.eval_on_selector_all(".scroll", "all => all.filter(e => e.scrollWidth > e.clientWidth).length")
            assert cut == 0
        sizes = page.eval_on_selector_all(
            "svg", "all => all.map(e => [e.getBoundingClientRect().width, e.clientHeight])"
        )
        assert len(sizes) == 6 + 2 * 13
        assert all(60 < w <= width and h > 40 for w, h in sizes)
        assert page.get_by_role("img", name="All trained rows").count() == 2
        # Text stands out from the paper by 4.5 to 1 at least (WCAG AA), in the pictures too.
        assert contrast(page) >= 4.5
        page.screenshot(path=tmp_path / f"{width}-{scheme}-{media}.png", full_page=True)  # to look at
        browser.close()


def contrast(page):
    """The smallest contrast of any colour of text or marks with the page's paper."""
    colours = page.evaluate(
        """() => { const style = getComputedStyle(document.documentElement), probe = document.createElement("i");
        document.body.append(probe);
        const rgb = name => { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; };
        return ["--paper", "--ink", "--soft", "--accent", "--other"].map(rgb); }"""
    )

    def luminance(colour):
        channels = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    paper, *others = map(luminance, colours)
    return min((max(paper, one) + 0.05) / (min(paper, one) + 0.05) for one in others)


def test_another_tool_s_evaluation_is_left_out_of_what_inspect_shows(model, tmp_path):
    for number, found in enumerate(({"loss_base": 1.0, "loss_patch": "low"}, {"loss_base": 1.0, "loss_patch": 0.9})):
        file = tmp_path / f"{number}.safetensors"
        make(model, evaluation=found).save(file)
        code, out, err = run_cli("inspect", file)
        assert code == 0, err
        assert "loss" not in out


def test_a_run_folder_of_another_patch_is_not_this_one_s(model, tmp_path):
    make(model).save(tmp_path / "es.safetensors")
    (tmp_path / "es.safetensors.run").mkdir()
    code, _, err = run_cli("report", tmp_path / "es.safetensors", "-o", tmp_path / "es.html")
    assert code == 0, err
    named = ["--run", tmp_path / "es.safetensors.run", "-o", tmp_path / "other.html"]
    code, _, err = run_cli("report", tmp_path / "es.safetensors", *named)
    assert code == 1
    assert "there is no record of this patch" in err


def test_more_patches_than_fit_side_by_side_stand_in_lines_and_what_all_share_once(model):
    patches = [
        make(model, name, 0).with_meta(language=name, evaluation=None) for name in ("es", "fr", "de", "it", "sw")
    ]
    page = make_report(patches, [None] * 5)
    comparison = page[page.index('<section id="comparison">') : page.index("Tokens that two patches share")]
    assert comparison.count('<th scope="row">sw</th>') == comparison.count("<td>sw</td>") == 1
    assert "The same for all:" in comparison
    assert comparison.count("no figures beside the loss") == 1
    few = make_report(patches[:2], [None] * 2)
    assert '<th scope="col">fr</th>' in few
    assert few.count("The same for all:") == 1
