"""Certificates: their mathematics by simulation and by hand, and the whole on a tiny model."""

import json

import numpy as np
import pytest
import torch
from conftest import PAIRS, run_cli
from scipy.stats import binom

from ksl_patch import Patch
from ksl_patch.errors import RunError
from ksl_patch.evidence.certificate import (
    ASSUMPTIONS,
    at_least,
    critical_distance,
    differing_tokens,
    exact,
    ks_margin,
    lower_bound,
    statements,
)
from ksl_patch.patch.evaluation import Certificate, Margin, read


@pytest.mark.parametrize("n", [20, 64, 300])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("share", [0.3, 0.8, 0.97])
def test_the_bound_covers_the_truth_at_least_as_often_as_it_says(n, delta, share):
    lower = np.array([lower_bound(k, n, delta).lower for k in range(n + 1)])
    drawn = np.random.default_rng(0).binomial(n, share, size=10_000)
    covered = np.mean(lower[drawn] <= share)
    # The true coverage by summation, and the simulation within what 10,000 draws can say of it.
    truth = binom.pmf(np.arange(n + 1), n, share)[lower <= share].sum().clip(max=1)
    assert truth >= 1 - delta
    assert covered == pytest.approx(truth, abs=4 * np.sqrt(truth * (1 - truth) / 10_000) + 1e-9)
    assert covered >= 1 - delta - 2 * np.sqrt(delta * (1 - delta) / 10_000)


def test_a_bound_without_the_exact_interval_would_fail_the_simulation():
    """What the test above can see: the normal approximation covers too little."""
    n, delta, share = 64, 0.05, 0.97
    shares = np.arange(n + 1) / n
    wald = shares - 1.645 * np.sqrt(shares * (1 - shares) / n)
    drawn = np.random.default_rng(0).binomial(n, share, size=10_000)
    assert np.mean(wald[drawn] <= share) < 1 - delta - 0.05


def test_bounds_at_the_ends_and_bad_counts():
    assert lower_bound(0, 10, 0.05).lower == 0
    assert lower_bound(59, 59, 0.05).lower == pytest.approx(0.05 ** (1 / 59))  # all agree: delta^(1/n)
    for bad in ((-1, 10, 0.05), (11, 10, 0.05), (0, 0, 0.05), (5, 10, 0), (5, 10, 1)):
        with pytest.raises(RunError):
            lower_bound(*bad)
    with pytest.raises(RunError, match="alpha must be"):
        critical_distance(576, 0)


def patches(model, ids, seed, scale=1.0):
    base = model.get_input_embeddings().weight.detach()[ids]
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    return Patch.from_model(model, ids, base + scale * noise, name="p")


def test_an_input_is_certified_when_each_of_its_rows_is_the_same_in_both_tables(model):
    tuned = patches(model, [3, 5, 7, 9], 1)
    # From the tuned table: 3 and 5. Not taken: 7 and 9. Changed though the tuning did not: 11.
    ids = [3, 5, 11]
    rows = torch.cat([tuned.rows[:2], model.get_input_embeddings().weight.detach()[[11]] + 1])
    patch = Patch.from_model(model, ids, rows, name="p")
    assert differing_tokens(patch, tuned) == {7, 9, 11}
    inputs = [[3, 5, 100], [3, 7], [100, 101], [11], [9, 9]]
    assert exact(patch, tuned, inputs) == 2

    # What is certified is bit-equal, and what is not is not.
    from ksl_patch import attach

    with attach(model) as handle:
        handle.load(patch, "patch")
        handle.load(tuned, "tuned")
        for tokens in inputs:
            logits = []
            for name in ("patch", "tuned"):
                with torch.no_grad(), handle.using(name):
                    logits.append(model(torch.tensor([tokens])).logits)
            assert torch.equal(*logits) == (exact(patch, tuned, [tokens]) == 1)


def test_a_patched_head_certifies_nothing_unless_all_rows_agree(model):
    tuned, other = (
        Patch.from_model(model, [3, 5], torch.full((2, 32), value), name="p", side="input+output")
        for value in (1.0, 2.0)
    )
    assert exact(other, tuned, [[100]]) == 0
    assert exact(tuned, tuned, [[100], [3]]) == 2


def test_the_margin_counts_what_it_certifies_and_what_changed_all_the_same():
    tau = critical_distance(576, 0.05)
    assert tau == pytest.approx(0.0800, abs=1e-4)
    margins = torch.tensor([0.9, 0.9, 0.2, 2 * tau, 0.01])
    changed = torch.tensor([False, True, False, True, True])
    statistic = torch.tensor([0.0, 0.2, 0.07, 0.09, 0.3])
    found = ks_margin(margins, changed, statistic, torch.tensor([1, 4]), 576, 0.05)
    assert (found.certified, found.violations, found.outside, found.examples) == (3, 1, 1, 5)


@pytest.fixture(scope="module")
def built(base_folder, pairs_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("certify") / "es.safetensors"
    code, _, err = run_cli(
        "build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "-o", path, "--mode", "transfer",
        "--embed-steps", "20", "--embed-lr", "2", "--held-out", "24", "--max-pairs", "100", "--top-k", "20",
    )  # fmt: skip
    assert code == 0, err
    return path


def test_a_certificate_goes_into_the_patch_with_its_assumptions_beside_it(built):
    digest = Patch.load(built).digest
    code, out, err = run_cli("certify", built, "--max-new-tokens", "12", "--delta", "0.1", "--json")
    assert code == 0, err
    found = json.loads(out)
    patch = Patch.load(built)
    certificate = read(Certificate, patch.meta.certificate)
    assert patch.digest == digest == found["digest"]
    assert certificate.pairs == certificate.next_token.examples == 24
    assert certificate.next_token.agreements == found["next_token"]["agreements"]
    assert certificate.next_token.lower == lower_bound(certificate.next_token.agreements, 24, 0.1).lower
    assert certificate.continuation.agreements <= certificate.next_token.agreements
    assert certificate.data_digest != patch.meta.evaluation["data_digest"]  # which is of the dev pairs
    assert (certificate.part, certificate.notes) == ("held-out", [])
    code, out, _ = run_cli("certify", built, "--max-new-tokens", "12", "--no-save")
    text = "".join(out.split())
    for name, assumption in ASSUMPTIONS.items():  # these rows are no reserved ones
        assert (assumption[:20].replace(" ", "") in text) == (name != "elsewhere")


def test_a_patch_with_every_tuned_row_agrees_everywhere(built, base_folder, pairs_file, tmp_path):
    """All that the tuning changed is in the patch: the three statements must say so."""
    whole = tmp_path / "whole.safetensors"
    code, _, err = run_cli(
        "build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "-o", whole, "--mode", "transfer",
        "--embed-steps", "20", "--embed-lr", "2", "--held-out", "24", "--max-pairs", "100", "--top-k", "400",
        "--resume", f"{built}.run",
    )  # fmt: skip
    assert code == 0, err
    code, out, err = run_cli("certify", whole, "--run", f"{built}.run", "--max-new-tokens", "12", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["exact"] == found["next_token"]["agreements"] == found["continuation"]["agreements"] == 24
    assert found["margin"]["violations"] == 0
    assert json.loads(run_cli("certify", built, "--max-new-tokens", "12", "--json", "--no-save")[1])["exact"] < 24


def test_the_training_data_of_the_ticket_gives_no_certificate(built, pairs_file, tmp_path):
    code, _, err = run_cli("certify", built, "--test", pairs_file, "--no-save")
    assert code == 1
    assert "are in the patch's own training data" in err
    # One trained pair among new ones is enough.
    record = json.loads(next(built.with_name("es.safetensors.run").glob("patch-*.json")).read_text())
    assert record["config"]["max_pairs"] == 100
    fresh = tmp_path / "fresh.tsv"
    fresh.write_text("The bird sees the moon.\tEl ave ve la luna.\nThe bird has bread.\tEl ave tiene pan.\n")
    code, out, err = run_cli("certify", built, "--test", fresh, "--no-save", "--json", "--max-new-tokens", "4")
    assert (code, json.loads(out)["pairs"]) == (0, 2), err
    from ksl_patch.train.reopen import reopen

    trained = reopen(Patch.load(built), built.with_name("es.safetensors.run")).pairs.train[0]
    assert tuple(trained[:2]) in PAIRS
    with fresh.open("a") as file:
        file.write("\t".join(trained[:2]) + "\n")
    code, _, err = run_cli("certify", built, "--test", fresh, "--no-save")
    assert (code, "1 of the 3 test pairs" in err) == (1, True)


def test_what_cannot_be_certified_says_why(built, base_folder, pairs_file, tmp_path):
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes(built.read_bytes())
    assert "name it with --run" in run_cli("certify", lone)[2]
    (tmp_path / "empty").mkdir()
    code, _, err = run_cli("certify", lone, "--run", tmp_path / "empty")
    assert (code, "there is no record of this patch" in err) == (1, True)
    other = tmp_path / "other.tsv"
    other.write_text("".join(f"{s}\t{t}\n" for s, t in PAIRS[:150]))
    code, _, err = run_cli("certify", built, "--pairs", other)
    assert (code, "do not give the training data of this patch" in err) == (1, True)
    frequent = tmp_path / "frequent.safetensors"
    run_cli(
        "build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "-o", frequent, "--selection",
        "frequency", "--top-k", "4", "--steps", "2", "--held-out", "8",
    )  # fmt: skip
    code, _, err = run_cli("certify", frequent)
    assert (code, "has no tuned embedding" in err) == (1, True)
    run_cli("keygen", "-o", tmp_path / "key")
    run_cli("sign", frequent, "--key", tmp_path / "key")
    code, _, err = run_cli("certify", frequent)
    assert (code, "is signed" in err) == (2, True)


def test_a_bound_is_never_said_to_be_more_than_it_is():
    assert [at_least(bound) for bound in (0.24549, 0.00080, 0.9999, 0.5, 0.0)] == [
        "24.5%",
        "0.0%",
        "99.9%",
        "50.0%",
        "0.0%",
    ]
    certificate = Certificate(
        pairs=64, data_digest="ab" * 32, delta=0.001, max_new_tokens=8, exact=0,
        next_token=lower_bound(25, 64, 0.001), continuation=lower_bound(1, 64, 0.001),
        margin=Margin(alpha=0.05, tau=0.1, certified=0, violations=0, outside=0, examples=64),
    )  # fmt: skip
    said = [found for _, found, _ in statements(certificate)]
    assert all("with confidence 99.9%" in each for each in said[1:3])
    assert f"at least {at_least(certificate.next_token.lower)} " in said[1]
