"""Ask for a language, and not for a patch: the OpenAI client, LangChain and LiteLLM against one server.

    ksl-patch serve .demo/gemma3 --patch de=de.safetensors --patch ru=ru.safetensors --apply-template --by-language
    python examples/by_language.py http://localhost:8000/v1 .demo/gemma3 "Open the system menu." de-AT ru fr

Of LangChain (langchain-openai) and LiteLLM those are shown that are installed; a key is taken from OPENAI_API_KEY.
"""

import os
import sys
from importlib.util import find_spec


def with_openai(url: str, base: str, text: str, language: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "EMPTY"))
    # By header, or with extra_body={"language": language}.
    raw = client.completions.with_raw_response.create(
        model=base, prompt=text, max_tokens=32, temperature=0, extra_headers={"Accept-Language": language}
    )
    patch, why = (raw.headers.get(name, "the base") for name in ("x-ksl-patch", "x-ksl-language"))
    print(f"openai, {language}: {raw.parse().choices[0].text.strip()!r} by {patch} ({why})")


def with_langchain(url: str, base: str, text: str, language: str) -> None:
    from langchain_openai import OpenAI

    model = OpenAI(
        base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "EMPTY"), model=base, max_tokens=32, temperature=0,
        default_headers={"Accept-Language": language},
    )  # fmt: skip
    print(f"langchain, {language}: {model.invoke(text).strip()!r}")


def with_litellm(url: str, base: str, text: str, language: str) -> None:
    import litellm

    answer = litellm.text_completion(
        model=f"text-completion-openai/{base}", prompt=text, api_base=url, max_tokens=32, temperature=0,
        api_key=os.environ.get("OPENAI_API_KEY", "EMPTY"), extra_headers={"Accept-Language": language},
    )  # fmt: skip
    print(f"litellm, {language}: {answer.choices[0].text.strip()!r}")


def main(url: str, base: str, text: str, *languages: str) -> None:
    for language in languages:
        with_openai(url, base, text, language)
        if find_spec("langchain_openai"):
            with_langchain(url, base, text, language)
        if find_spec("litellm"):
            with_litellm(url, base, text, language)


if __name__ == "__main__":
    main(*sys.argv[1:])
