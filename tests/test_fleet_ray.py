"""A fleet on Ray: a local cluster of two workers, one of which is lost while it trains."""

import json
import threading
import time
from contextlib import suppress

import psutil
import pytest
from conftest import PAIRS, run_cli

ray = pytest.importorskip("ray", reason="Ray is an extra of this package: pip install 'ksl-patch[ray]'")

from ray.cluster_utils import Cluster  # noqa: E402

from ksl_patch.patch import Patch  # noqa: E402
from ksl_patch.train.build import build  # noqa: E402
from ksl_patch.train.config import BuildConfig  # noqa: E402

LANGUAGES = ("es", "fr", "it", "pt")


@pytest.fixture
def file(tmp_path, base_folder):
    patches = ""
    for language in LANGUAGES:
        lines = [json.dumps({"source": s, "target": f"{t} {language}"}) + "\n" for s, t in PAIRS[:60]]
        (tmp_path / f"{language}.jsonl").write_text("".join(lines))
        patches += f'[patches.{language}]\npairs = "{language}.jsonl"\n'
    file = tmp_path / "patches.toml"
    file.write_text(
        f'base = "{base_folder}"\n[build]\nsteps = 100\nembed-steps = 2\nbatch-size = 2\ndev = 2\nheld-out = 4\n'
        f"top-k = 4\ncheckpoint-every = 5\n{patches}"
    )
    return file


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "2")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
    workers = [made.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(2)]
    made.wait_for_nodes()
    yield made, workers
    ray.shutdown()
    made.shutdown()


def parents_of_a_training(folder):
    """The process ids above one that holds a stage under a folder, in which there is a checkpoint; none yet."""
    for lock in folder.glob("*.run/partial-*/.lock"):
        if not list(lock.parent.glob("checkpoint-*/complete")):
            continue
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if str(lock) in [file.path for file in process.open_files()]:
                    return {each.pid for each in process.parents()}
    return set()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_lost_node_s_languages_go_on_elsewhere(tmp_path, file, cluster, base_folder):
    made, workers = cluster
    seen = {}

    def lose():
        """A worker that trains and has a checkpoint."""
        while not (above := parents_of_a_training(tmp_path)):
            time.sleep(0.05)
        [worker] = [each for each in workers if each.all_processes["raylet"][0].process.pid in above]
        made.remove_node(worker, allow_graceful=False)
        seen["lost"] = True

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    code, out, err = run_cli("build", "--config", file, "--ray", made.address, "--ray-cpus", 1, "--json")
    assert code == 0, (out[-2000:], err)
    assert seen["lost"]
    events = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [each["patch"] for each in events if each["event"] == "patch"] == list(LANGUAGES)
    assert any(each["event"] == "resumed" for each in events)
    assert {each["patch"] for each in events if each["event"] == "step"} == set(LANGUAGES)
    config = BuildConfig(
        base=str(base_folder), pairs=str(tmp_path / "fr.jsonl"), language="fr", name="fr", alpha=None, top_k=4,
        steps=100, embed_steps=2, batch_size=2, dev=2, held_out=4,
    )  # fmt: skip
    assert Patch.load(tmp_path / "fr.safetensors").digest == build(config, tmp_path / "alone").digest


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_one_beside_others_waits_for_them_and_what_fails_is_said(tmp_path, reserved_folder, file):
    text = file.read_text().replace(file.read_text().splitlines()[0], f'base = "{reserved_folder}"')
    text = text.replace("top-k = 4", 'top-k = 2\nselection = "reserved"').replace("steps = 100", "steps = 2")
    text = text.replace("[patches.es]\n", '[patches.es]\nbeside = ["fr"]\n').replace('"it.jsonl"', '"none.jsonl"')
    file.write_text(text)
    code, out, err = run_cli("build", "--config", file, "--ray", "--ray-cpus", 1, "--json")
    events = {(each.get("event"), each.get("patch")) for each in map(json.loads, out.splitlines()) if "event" in each}
    assert code == 1, err
    assert {("patch", "es"), ("patch", "fr"), ("failed", "it"), ("patch", "pt")} <= events
    es, fr = (Patch.load(tmp_path / f"{name}.safetensors").token_ids.tolist() for name in ("es", "fr"))
    assert not set(es) & set(fr)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(("--ray", "127.0.0.1:1"), "there is no Ray cluster at 127.0.0.1:1"),
     (("--ray", "--ray-cpus", "4000"), "no node of the cluster has 4000 cores")],
)  # fmt: skip
def test_no_cluster_and_no_room(file, arguments, sentence):
    code, _, err = run_cli("build", "--config", file, *arguments)
    assert (code, sentence in " ".join(err.split())) == (1, True), err


def test_ray_is_for_a_file(tmp_path):
    code, _, err = run_cli(
        "build", "--base", "b", "--pairs", "p", "--language", "es", "-o", tmp_path / "x.safetensors", "--ray"
    )
    assert (code, "add --config" in err) == (2, True)
