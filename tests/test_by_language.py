"""Which of several patches speaks a language."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_attach import GREEDY, PROMPTS

from ksl_patch import attach
from ksl_patch.errors import DataError, RunError
from ksl_patch.patch.by_language import MOST_TAGS, Accepted, ByLanguage, accepted, check_tags

PATCHES = ByLanguage({
    "german": "de", "german-2": "de", "brazil": "pt-BR", "taiwan": "zh-Hant", "norway": "no", "philippines": "fil",
    "serbia": "sr", "england": "en-GB", "america": "en-US", "uzbek": "uz", "any": None,
})  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("de", "german"), ("DE-ch", "german"), ("pt", "brazil"), ("pt-PT", "brazil"), ("zh-TW", "taiwan"),
        ("zh-HK", "taiwan"), ("nb", "norway"), ("tl", "philippines"), ("en-AU", "england"), ("en-US", "america"),

        # Another language, however near, and another script are none.
        ("gsw", None), ("nn", None), ("da", None), ("hr", None), ("bs", None), ("yue", None), ("gl", None),
        ("zh", None), ("zh-CN", None), ("uz-Cyrl", None), ("sr-Latn", None), ("fr", None),
    ],
)  # fmt: skip
def test_a_language_gets_the_nearest_patch_and_no_other_languages(asked, name):
    choice = PATCHES.choose([asked])
    assert choice.name == name
    assert (choice.asked, choice.language is None) == ((asked, False) if name else (None, True))
    assert asked in choice.why


def test_the_first_language_that_has_a_patch_counts():
    assert PATCHES.choose(["fr", "de-AT", "pt"]).name == "german"
    assert PATCHES.choose(["fr"]).why == "no patch speaks fr."
    assert PATCHES.choose([]) == ByLanguage({}).choose([])


def test_another_script_where_it_is_allowed():
    allowed = ByLanguage({"uzbek": "uz", "taiwan": "zh-Hant"}, across_scripts=True)
    assert allowed.choose(["uz-Cyrl"]).name == "uzbek"
    assert allowed.choose(["zh-CN"]).name == "taiwan"
    assert allowed.choose(["yue-Hans"]).name is None


def test_a_header_is_read_by_weight_and_place():
    assert accepted("da, en-gb;q=0.8, en;q=0.7").tags == ("da", "en-gb", "en")
    assert accepted("en;q=0.5,fr ; q=1.0 ,,de;q=0.50").tags == ("fr", "en", "de")
    assert accepted("de;q=0, fr, de") == Accepted(("fr",), ("de",))
    assert accepted("*;q=0.1, sw") == Accepted(("sw",), any=True)
    assert accepted("sw, *;q=0") == Accepted(("sw",))
    assert accepted("") == Accepted()


@pytest.mark.parametrize(
    "member",
    ["de;q=2", "de;q=-1", "de;q=nan", "de;level=1", "de;q=0.1;q=0.2", "d3", "en_US.UTF-8", "xq", "\x00", "de-", "C",
     "english", "abcd"],
)  # fmt: skip
def test_what_is_no_language_is_left_out_of_a_header_and_refused_elsewhere(member):
    assert accepted(f"sw, {member}, de") == Accepted(("sw", "de"), ignored=(member,))
    with pytest.raises(DataError, match="is not"):
        check_tags(["de", member])
    # A patch of such a tag, which another tool may have made, is nobody's, and in nobody's way.
    patches = ByLanguage({"odd": member, "german": "de"})
    assert (patches.choose(["de"]).name, patches.choose(["sw"]).name) == ("german", None)


def test_a_list_has_an_end_which_is_looked_at_first():
    for header in (",".join(["de"] * (MOST_TAGS + 1)), "de," * 500):
        with pytest.raises(DataError, match="has at most"):
            accepted(header)
    with pytest.raises(DataError, match="has at most"):
        check_tags(["x x"] * (MOST_TAGS + 1))


@pytest.mark.parametrize(
    ("tags", "asked", "tag"),
    [
        (["ca", "ca-valencia"], "ca-valencia", "ca-valencia"), (["de-1996", "de-1901", "de"], "de-1901", "de-1901"),
        (["en-fonipa", "en"], "en", "en"), (["en-x-pirate", "en"], "en-US", "en"), (["fr-CA", "fr"], "fr-CH", "fr"),
        (["en-x-pirate", "en"], "en-x-pirate", "en-x-pirate"), (["pt-PT", "pt"], "pt-PT-x-old", "pt-PT"),
        (["de-CH", "de"], "de-CH-1996", "de-CH"), (["sr"], "sr-Latn", None), (["sr-Latn"], "sr", None),
        (["ja"], "ja-Latn", None), (["zh-Hant"], "zh-TW-x-a", "zh-Hant"),
    ],
)  # fmt: skip
def test_of_equally_near_ones_it_is_the_one_that_says_the_same(tags, asked, tag):
    assert ByLanguage({each: each for each in tags}).choose([asked]).name == tag


def test_the_base_speaks_languages_too():
    patches = ByLanguage({"swahili": "sw", "england": "en-GB"}, base=["en"])
    choice = patches.choose(["en-US", "sw"])
    assert (choice.name, choice.language, choice.asked) == (None, "en", "en-US")
    assert choice.why.startswith("the base speaks en")
    assert patches.choose(["fr", "sw", "en"]).name == "swahili"
    assert patches.choose(["en-GB"]).name == "england"


def test_what_is_refused_is_not_given():
    patches = ByLanguage({"mexico": "es-MX", "spain": "es-ES"})
    assert patches.choose(["es-AR"]).name == "mexico"
    assert patches.choose(["es-AR"], refused=["ES-mx"]).name == "spain"
    assert patches.choose(["es-MX"], refused=["es-MX", "es-ES"]).name is None


def test_tags_from_requests_do_not_fill_the_memory(monkeypatch):
    import langcodes

    monkeypatch.setattr("ksl_patch.patch.by_language._MOST_KEPT", 50)
    patches = ByLanguage({"german": "de"})
    for i in range(300):
        assert patches.choose([f"de-x-{i:08d}"]).name == "german"
        accepted(f"sw-{i:03d}, q{i % 26:c}")
    assert len(langcodes.Language._PARSE_CACHE) < 120
    assert len(langcodes.Language._INSTANCES) < 120


@given(st.text(max_size=40) | st.from_regex(r"[a-z]{1,3}(-[A-Za-z0-9]{1,8}){0,3}(;q=[0-9.]{1,5})?", fullmatch=True))
def test_any_text_is_a_list_or_refused(header):
    try:
        said = accepted(header)
    except DataError:
        return
    assert PATCHES.choose(said.tags, said.refused).name in (None, *PATCHES_NAMES)


PATCHES_NAMES = ("german", "brazil", "taiwan", "norway", "philippines", "serbia", "england", "america", "uzbek")


CHINESE = "\u4eba\u4eba\u751f\u800c\u81ea\u7531\uff0c\u5728\u5c0a\u4e25\u548c\u6743\u5229\u4e0a\u4e00\u5f8b\u5e73\u7b49"
SWAHILI = "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa."


@pytest.mark.parametrize(
    ("body", "tag"),
    [
        ({"prompt": SWAHILI}, "sw"),
        ({"messages": [{"role": "user", "content": "Good morning, how are you?"},
                       {"role": "user", "content": SWAHILI}, {"role": "assistant", "content": "Well."}]}, "sw"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": SWAHILI}, {"type": "image_url"}]}]}, "sw"),
        ({"input": SWAHILI}, "sw"), ({"input": [{"role": "user", "content": SWAHILI}]}, "sw"),
        # What is no text, is not one, or says nothing.
        ({"prompt": [SWAHILI, "Hello"]}, None), ({"prompt": [3, 4]}, None), ({"prompt": "1234 ???"}, None),
        ({"prompt": " " * 400 + SWAHILI}, "sw"), ({"prompt": CHINESE}, None),
        ({"messages": [{"role": "system", "content": SWAHILI}]}, None), ({"messages": "x"}, None), ({}, None),
        ({"messages": [{"role": "user", "content": [{"text": 3}, 4]}], "input": {"role": 3}}, None),
    ],
)  # fmt: skip
def test_the_language_of_a_request_s_text(body, tag):
    from ksl_patch.vllm.detection import SURE, detect

    found = detect(body)
    assert (found and found[0]) == tag
    assert found is None or SURE <= found[1] <= 1


def test_a_batch_is_answered_by_language(model, patches, plain):
    spoken = {"brazil": (patches["a"], "pt-BR"), "kenya": (patches["b"], "sw")}
    with attach(model) as handle:
        for name, (patch, language) in spoken.items():
            handle.load(patch.with_meta(language=language), name)
        assert [handle.for_language(tag) for tag in ("pt", "sw-KE", "fr")] == ["brazil", "kenya", None]
        prompts = PROMPTS[[0, 1, 0]]
        with handle.using(languages=["sw", None, "pt-PT"]):
            answers = model.generate(prompts, **GREEDY)
        for row, name in enumerate(("b", None, "a")):
            assert torch.equal(answers[row], plain[name].generate(prompts, **GREEDY)[row])
        with handle.using(languages="pt"):
            assert torch.equal(model(prompts).logits, plain["a"](prompts).logits)
        with pytest.raises(RunError, match="no loaded patch speaks 'fr'; they speak pt-BR, sw"):
            handle.using(languages=["sw", "fr"])
        with pytest.raises(DataError, match="'pt_BR.UTF-8' is not the tag of a language"):
            handle.using(languages="pt_BR.UTF-8")
        for given in ({}, {"names": None, "languages": None}):
            with pytest.raises(RunError, match="give one of the two"):
                handle.using(**given)
