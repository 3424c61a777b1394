"""What the words of this project mean, each in a sentence or two: for `ksl-patch words`, and beside what uses them."""

from __future__ import annotations

# What a p-value of a ticket is.
P_RANKS = (
    "ranks the rows and is no calibrated probability: values before and after are paired, and the test takes them to "
    "be independent"
)
WORDS = {
    "patch": "A file of embedding rows, each for one token of one base model, with which that base answers in another "
    "language. The base's own weights are not touched.",
    "ticket": "The rows that a patch replaces, as they were chosen: by the Kolmogorov-Smirnov test, by how frequent "
    "their tokens are, or by hand.",
    "D": "The Kolmogorov-Smirnov statistic of a row, from 0 to 1: how far the distribution of its values moved in the "
    "tuned embedding. The rows of the largest D are the ticket.",
    "p": f"The test's p-value of a row's D. It {P_RANKS}.",
    "template": "The prompt that a patch was trained in, with {source} where the sentence stands. A patch does little "
    "outside it, so --apply-template puts a sentence into it.",
    "side": "What the rows replace: those of the embedding (input), or of the embedding and of the head that shares "
    "its table (input+output).",
    "scope": "Where the rows act: in the prompt and the answer (all), or in the prompt alone (prompt).",
    "reserved row": "A row of a token that a vocabulary keeps for later, such as <unused5>, so that no text has it. It "
    "acts where the template writes its name, and changes nothing else.",
    "digest": "The sha256 of what a patch does, 64 digits of which the first 12 are shown. Two patches of one digest "
    "answer alike, whatever they are called.",
    "slot": "Room for one patch in a server's memory. Requests of one batch may use as many different patches as there "
    "are slots.",
    "held-out pairs": "Sentence pairs that a build set aside for figures: they train nothing and choose nothing. The "
    "dev pairs are others, for choices between builds.",
    "control": "Other rows in the patch's place, as many: what they gain is not owed to the choice of the rows.",
    "noise": "The control named 'random change, same norms': the patch's own rows, moved as far in a random direction. "
    "What it gains is not owed to what was learnt.",
    "stops by itself": "An output that ends with the model's end token, and not at the limit of new tokens.",
    "first line": "An output up to its first line break. A gain that the raw output has and its first line has not is "
    "a model that learnt to stop.",
    "interval": "The range in brackets: what a figure may be with other held-out text of the same kind, in 95 of 100 "
    "cases. One that holds zero shows no difference.",
}


def explain(*words: str) -> str:
    """What each of some words means, a line each."""
    return "\n".join(f"{word}: {WORDS[word][0].lower()}{WORDS[word][1:]}" for word in words)
