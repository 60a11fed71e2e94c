"""Published versions: atomic, verified, content-addressed; round files; import."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from store import AdapterRegistry, BadImport, CorruptAdapter, DiskFull, RoundFiles, Store, import_preferences
from store.adapters import Manifest

ROOT = Path(__file__).parents[1]


def adapter(text: str = "weights"):
    """A writer of the two files every adapter has."""
    def write(directory: Path) -> None:
        (directory / "adapter_config.json").write_text("{}")
        (directory / "adapter_model.safetensors").write_text(text)
    return write


def test_a_version_is_what_was_written_and_says_so(tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path)
    made = registry.publish(adapter(), {"parent": "base", "round": 3, "gate": {"verdict": "pass", "checks": []}, "note": "x"})
    assert made.version == "v000001" and registry.versions() == ["v000001"]
    weights = hashlib.sha256(b"weights").hexdigest()
    assert made.files["adapter_model.safetensors"] == weights
    config = hashlib.sha256(b"{}").hexdigest()
    assert made.sha256 == hashlib.sha256(f"adapter_config.json {config}\nadapter_model.safetensors {weights}".encode()).hexdigest()
    assert registry.verify("v000001") == made == Manifest.from_dict(made.to_dict())
    assert made.extra == {"note": "x"} and "v000001" in (tmp_path / "v000001" / "README.md").read_text()


def synced(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """What is made durable or renamed from here on, in order, by its name under `root` (a temporary name shortened)."""
    told: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def name(path: str | Path) -> str:
        text = str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else str(path)
        return re.sub(r"\.(publishing|manifest\.json|NEWEST|newest)-[^/]*", r".\1", text)

    monkeypatch.setattr(os, "fsync", lambda fd: (told.append(f"sync {name(os.readlink(f'/proc/self/fd/{fd}'))}"), fsync(fd))[1])
    for kind, real in (("rename", rename), ("replace", replace)):
        monkeypatch.setattr(os, kind, lambda a, b, real=real: (told.append(f"move {name(a)} {name(b)}"), real(a, b))[1])
    return told


seen_on_linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="which file a descriptor is of is told by Linux's /proc alone")


@seen_on_linux
def test_a_version_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, manifest last, rename, and the directory that holds the name (DESIGN, step 6)."""
    told = synced(monkeypatch, tmp_path)
    AdapterRegistry(tmp_path).publish(adapter(), {})
    where = [told.index(f"sync .publishing/{name}") for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")]
    manifest, moved = told.index("move .publishing/.manifest.json .publishing/manifest.json"), told.index("move .publishing v000001")
    assert max(where) < told.index("sync .publishing/.manifest.json") < manifest < moved
    assert "sync .publishing" in told[manifest:moved] and "sync ." in told[moved:]


@seen_on_linux
def test_a_new_databases_name_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = synced(monkeypatch, tmp_path)
    Store.open(tmp_path).close()
    assert "sync ." in told


def test_the_same_content_has_the_same_address_and_a_new_version(tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path)
    one, two, other = (registry.publish(adapter(text), {}) for text in ("a", "a", "b"))
    assert [m.version for m in (one, two, other)] == ["v000001", "v000002", "v000003"]
    assert one.sha256 == two.sha256 != other.sha256


@pytest.mark.parametrize("damage, named", [
    (lambda d: (d / "adapter_model.safetensors").write_text("other"), "adapter_model.safetensors is not what was published"),
    (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    (lambda d: (d / "extra.bin").write_text("x"), "extra.bin is not in its manifest"),
    (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda d: (d / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    (lambda d: (d / "manifest.json").write_text('{"version": 1, "sha256": "", "files": {}}'), "manifest.json cannot be read"),
    (lambda d: (d / "manifest.json").write_text('{"version": "v000001", "sha256": "", "files": [1]}'), "manifest.json cannot be read"),
    (lambda d: (d / "manifest.json").write_text(json.dumps({"version": "v000001", "sha256": "", "files": {"../.lock": ""}})), "../.lock is missing"),
    (lambda d: (d.rename(d.parent / "elsewhere"), d.symlink_to(d.parent / "elsewhere")), "its directory is a link"),
    (lambda d: (d / "link").symlink_to("/etc/passwd"), "link is a link"),
    (lambda d: d.rename(d.parent / "v000002"), "of v000001"),
    (lambda d: (d.rename(d.parent / "elsewhere"), d.write_text("x")), r"manifest.json cannot be read \(Not a directory\)"),
    (lambda d: ((d / "manifest.json").unlink(), (d / "manifest.json").mkdir()), r"manifest.json cannot be read \(Is a directory\)"),
])
def test_damage_is_named(tmp_path: Path, damage, named: str) -> None:
    registry = AdapterRegistry(tmp_path)
    registry.publish(adapter(), {})
    damage(tmp_path / "v000001")
    with pytest.raises(CorruptAdapter, match=named):
        registry.verify(registry.versions()[0])


def test_a_manifest_cannot_vouch_for_other_weights(tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path)
    registry.publish(adapter(), {})
    file = tmp_path / "v000001" / "adapter_model.safetensors"
    file.write_text("other")
    manifest = json.loads((tmp_path / "v000001" / "manifest.json").read_text())
    manifest["files"]["adapter_model.safetensors"] = hashlib.sha256(b"other").hexdigest()
    (tmp_path / "v000001" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptAdapter, match="does not address"):
        registry.verify("v000001")


def test_names_that_are_not_versions_are_refused(tmp_path: Path) -> None:
    for name in ("../v000001", "v1", "", "base"):
        with pytest.raises(ValueError, match="not a version"):
            AdapterRegistry(tmp_path).path(name)


def test_a_failed_publish_leaves_nothing(tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path)
    with pytest.raises(CorruptAdapter, match="was not written"):
        registry.publish(lambda directory: None, {})
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == []


def test_a_number_is_not_used_again_when_its_version_was_moved_away(tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    one, two = (registry.publish(adapter(), {}).version for _ in range(2))
    registry.path(two).rename(tmp_path / "damaged")
    assert registry.publish(adapter(), {}).version == "v000003"
    assert registry.versions() == [one, "v000003"]
    (tmp_path / "adapters" / ".newest").write_bytes(b"\xff nonsense")  # then the directories alone say
    assert registry.publish(adapter(), {}).version == "v000004"


def test_links_are_not_published(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        adapter()(directory)
        (directory / "notes").symlink_to("/etc/hostname")

    with pytest.raises(CorruptAdapter, match="notes is a link"):
        AdapterRegistry(tmp_path).publish(write, {})
    assert AdapterRegistry(tmp_path).versions() == []


def test_a_full_disk_leaves_no_version_and_says_so(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        with open("/dev/full", "w") as file:  # every write there: no space left on device
            file.write("x" * 100_000)

    with pytest.raises(DiskFull, match="nothing was written"):
        AdapterRegistry(tmp_path).publish(write, {})
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == []


PUBLISHER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from store import AdapterRegistry
def write(directory):
    (directory / "adapter_config.json").write_text("{}")
    print("half", flush=True)
    time.sleep(60)
AdapterRegistry(sys.argv[1]).publish(write, {})
"""


def test_a_publisher_killed_half_way_leaves_no_version_and_the_next_cleans_up(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", PUBLISHER, str(tmp_path), str(ROOT)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"half\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    registry = AdapterRegistry(tmp_path)
    assert registry.versions() == [] and list(tmp_path.glob(".publishing-*"))
    assert registry.publish(adapter(), {}).version == "v000001"
    assert not list(tmp_path.glob(".publishing-*"))


def test_rounds_are_numbered_finished_and_told_apart_from_abandoned_ones(tmp_path: Path) -> None:
    files = RoundFiles(tmp_path / "rounds")
    assert files.finished() == [] and files.read_heartbeat() is None
    assert [files.begin(), files.begin()] == [1, 2]
    files.progress(2, stage="ppo", fraction=0.5)
    files.finish(1, {"state": "published", "votes": 16})
    assert files.finished() == [1] and files.unfinished() == [2]
    assert files.read(1) == {"round": 1, "state": "published", "votes": 16}
    assert files.read_progress(2)["fraction"] == 0.5
    with pytest.raises(ValueError, match="JSON"):
        files.finish(2, {"kl": float("nan")})
    assert files.unfinished() == [2] and not [p for p in files.directory(2).iterdir() if "round.json" in p.name]
    files.heartbeat(state="idle")
    assert files.read_heartbeat()["state"] == "idle"
    (tmp_path / "rounds" / "learner.json").write_text("{")
    assert files.read_heartbeat() is None


ROW = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Hello!"}],
       "rejected": [{"role": "assistant", "content": "Go away."}], "voter": "human"}


@pytest.mark.parametrize("name", ["votes.jsonl", "votes.jsonl.gz"])
def test_imported_preferences_come_out_again_as_they_went_in(tmp_path: Path, name: str) -> None:
    rows = [{**ROW, "chosen": f"good {i}", "rejected": f"bad {i}", "prompt": f"question {i}"} for i in range(12)]
    text = "\n".join(json.dumps(row) for row in [ROW, *rows]) + "\n\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    seen = []
    with Store.open(tmp_path / "data") as store:
        assert import_preferences(store, tmp_path / name, hash_voter=str.upper, progress=lambda *at: seen.append(at)) == 13
        out = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in store.export("preference")]
        slots = [item.vote.groups[0][0] for item in store.voted_comparisons()]
    assert out[0] == {k: ROW[k] for k in ("prompt", "chosen", "rejected")}
    assert out[5]["chosen"] == [{"role": "assistant", "content": "good 4"}]
    assert set(slots) == {0, 1} and seen[-1] == (13, 13)


@pytest.mark.parametrize("bad, why", [
    ("not json", "is not JSON"),
    ("[1]", "not a JSON object"),
    (json.dumps({**ROW, "prompt": []}), "end with a message of the user"),
    (json.dumps({k: ROW[k] for k in ("prompt", "chosen")}), "no 'rejected'"),
    (json.dumps({**ROW, "chosen": ROW["rejected"]}), "same text"),
    (json.dumps({**ROW, "chosen": [{"role": "robot", "content": "x"}]}), "role"),
    (json.dumps({**ROW, "voter": 3}), "voter must be a string"),
])
def test_one_bad_line_is_named_and_nothing_is_taken_in(tmp_path: Path, bad: str, why: str) -> None:
    (tmp_path / "f.jsonl").write_text(json.dumps(ROW) + "\n" + bad + "\n")
    with Store.open(tmp_path / "data") as store:
        with pytest.raises(BadImport, match=f"f.jsonl:2.*{why}"):
            import_preferences(store, tmp_path / "f.jsonl", hash_voter=str)
        assert store.counts()["comparisons"] == 0


def test_a_file_that_is_not_there_or_not_text_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(b"\x1f\x8bnope")
    (tmp_path / "x.jsonl").write_bytes(os.urandom(100))
    with Store.open(tmp_path / "data") as store:
        for name in ("none.jsonl", "x.gz", "x.jsonl"):
            with pytest.raises(BadImport, match=name):
                import_preferences(store, tmp_path / name, hash_voter=str)


def test_the_real_human_preferences_are_taken_in_whole(tmp_path: Path, shared_data: Path) -> None:
    file = shared_data / "hh_harmless_preferences.jsonl.gz"
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    with Store.open(tmp_path) as store:
        assert import_preferences(store, file, hash_voter=str) == len(rows)
        assert sum(1 for _ in store.export("preference")) == len(rows)
