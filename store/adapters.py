"""The adapter registry: immutable versions on disk, content-addressed, published atomically, verified on read.

`adapters/v000001/` holds a PEFT adapter (`adapter_config.json`, `adapter_model.safetensors`), a model card and, written
last, `manifest.json` with the sha256 of every other file. Knows no database and no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from store.database import fsync_dir, plain_errors
from store.errors import CorruptAdapter
from store.files import fsync_file, read_json, write_bytes, write_json

VERSION = re.compile(r"v\d{6,}")
CONTENT = ("adapter_config.json", "adapter_model.safetensors")  # what `sha256` addresses
MANIFEST = "manifest.json"
STAGING = ".publishing-"
NEWEST = ".newest"  # the last version's name, whether or not it is still there


@dataclass(frozen=True)
class Manifest:
    """What a published version says of itself."""

    version: str
    sha256: str  # over the digests of CONTENT
    files: dict[str, str]  # name -> sha256
    parent: str = "base"
    created: float = 0.0  # Unix seconds
    round: int | None = None
    kind: str = "ppo"  # ppo | sft | upload
    base_digest: str = ""
    base_model: str = ""
    data_digest: str | None = None
    seed: int | None = None
    gate: dict[str, Any] | None = None  # {"verdict", "checks"}
    probe: dict[str, Any] = field(default_factory=dict)  # {"prompt_ids", "top_ids", "top_logprobs"}
    extra: dict[str, Any] = field(default_factory=dict)  # anything else the publisher said

    def to_dict(self) -> dict[str, Any]:
        """Plain and ready for JSON; `from_dict` undoes it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Manifest:
        """Unknown fields go to `extra`. Raises TypeError when the needed ones are missing or not what they should be."""
        files = fields.get("files")
        if not isinstance(files, Mapping) or not all(isinstance(name, str) for name in (*files, *files.values())):
            raise TypeError("files is not an object of names and digests")
        if not isinstance(fields.get("version"), str) or not isinstance(fields.get("extra", {}), Mapping):
            raise TypeError("version is not a string, or extra not an object")
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {**(fields.get("extra") or {}), **{k: v for k, v in fields.items() if k not in known and k != "extra"}}
        return cls(**{k: v for k, v in fields.items() if k in known}, extra=extra)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_address(files: Mapping[str, str]) -> str:
    """One digest for the adapter itself, from the digests of its config and weights."""
    return hashlib.sha256("\n".join(f"{name} {files[name]}" for name in CONTENT).encode()).hexdigest()


class AdapterRegistry:
    """The versions under one directory. Several processes may publish and read."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def publish(self, write: Callable[[Path], None], fields: Mapping[str, Any]) -> Manifest:
        """Call `write(directory)` to put the adapter's files there, then make them the next version, all or nothing.

        `fields`: manifest fields (version, files and sha256 are filled in here). A publisher killed half-way leaves
        no version; what it left is cleaned up by the next. Raises DiskFull, and CorruptAdapter when the files are not
        an adapter's.
        """
        with plain_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".lock"):
                return self._publish(write, fields)

    def _publish(self, write: Callable[[Path], None], fields: Mapping[str, Any]) -> Manifest:
        """`publish`, while no other publisher is at it."""
        for left in self.root.glob(f"{STAGING}*"):
            shutil.rmtree(left, ignore_errors=True)
        version = f"v{self._newest() + 1:06d}"
        staging = Path(tempfile.mkdtemp(dir=self.root, prefix=STAGING))
        try:
            write(staging)
            missing = [name for name in CONTENT if not (staging / name).is_file()]
            if missing:
                raise CorruptAdapter(f"not an adapter: {missing[0]} was not written")
            for link in filter(Path.is_symlink, staging.rglob("*")):
                raise CorruptAdapter(f"not an adapter: {link.name} is a link")
            (staging / "README.md").write_text(model_card(version, fields), encoding="utf-8")
            names = sorted(str(p.relative_to(staging)) for p in staging.rglob("*") if p.is_file())
            digests = {name: sha256_file(staging / name) for name in names}
            for name in names:
                fsync_file(staging / name)
            manifest = Manifest.from_dict({
                "created": time.time(), **fields, "version": version, "files": digests, "sha256": content_address(digests),
            })
            write_json(staging / MANIFEST, manifest.to_dict())
            staging.chmod(0o755)
            write_bytes(self.root / NEWEST, version.encode())  # first: a number is skipped rather than used twice
            os.rename(staging, self.root / version)
            fsync_dir(self.root)
            return manifest
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def _newest(self) -> int:
        """The highest number that was ever used, also by a version that was moved away since; 0 before the first."""
        names = self.versions()[-1:]
        with contextlib.suppress(FileNotFoundError):
            names.append((self.root / NEWEST).read_text("ascii", errors="replace"))
        return max((int(name[1:]) for name in names if VERSION.fullmatch(name)), default=0)

    def versions(self) -> list[str]:
        """Published versions, oldest first."""
        try:
            names = [entry.name for entry in os.scandir(self.root) if VERSION.fullmatch(entry.name)]
        except FileNotFoundError:
            return []
        return sorted(names, key=lambda name: int(name[1:]))

    def path(self, version: str) -> Path:
        """The version's directory. Raises ValueError for what is not a version's name."""
        if not VERSION.fullmatch(version):
            raise ValueError(f"{version[:40]!r} is not a version such as v000001")
        return self.root / version

    def manifest(self, version: str) -> Manifest:
        """What the version says of itself, unverified. Raises CorruptAdapter."""
        path = self.path(version) / MANIFEST
        try:
            manifest = Manifest.from_dict(read_json(path))
        except FileNotFoundError:
            raise CorruptAdapter(f"{version}: {MANIFEST} is missing. {REMEDY}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptAdapter(f"{version}: {MANIFEST} cannot be read ({type(error).__name__}). {REMEDY}") from error
        except OSError as error:
            raise CorruptAdapter(f"{version}: {MANIFEST} cannot be read ({error.strerror}). {REMEDY}") from error
        if manifest.version != version:
            raise CorruptAdapter(f"{version}: its {MANIFEST} is of {manifest.version[:40]}. {REMEDY}")
        return manifest

    def verify(self, version: str) -> Manifest:
        """Check every file against the manifest. Raises CorruptAdapter naming the file."""
        manifest, directory = self.manifest(version), self.path(version)
        if directory.is_symlink():
            raise CorruptAdapter(f"{version}: its directory is a link. {REMEDY}")
        there = set()
        for path in directory.rglob("*"):
            name = str(path.relative_to(directory))
            if path.is_symlink():
                raise CorruptAdapter(f"{version}: {name} is a link. {REMEDY}")
            if path.is_file() and name != MANIFEST:
                there.add(name)
        listed = set(manifest.files)
        for name in sorted(listed - there):
            raise CorruptAdapter(f"{version}: {name} is missing. {REMEDY}")
        for name in sorted(there - listed):
            raise CorruptAdapter(f"{version}: {name} is not in its manifest. {REMEDY}")
        for name in sorted(listed):
            try:
                digest = sha256_file(directory / name)
            except OSError as error:
                raise CorruptAdapter(f"{version}: {name} cannot be read ({error.strerror}). {REMEDY}") from error
            if digest != manifest.files[name]:
                raise CorruptAdapter(f"{version}: {name} is not what was published. {REMEDY}")
        if not set(CONTENT) <= listed or content_address(manifest.files) != manifest.sha256:
            raise CorruptAdapter(f"{version}: its manifest does not address its files. {REMEDY}")
        return manifest


REMEDY = "It is not served; restore its directory from a backup, or move it away"


def model_card(version: str, fields: Mapping[str, Any]) -> str:
    """README.md of a version, in the hub's layout."""
    gate = fields.get("gate") or {}
    lines = [
        "---", "library_name: peft", f"base_model: {fields.get('base_model') or 'unknown'}", "---", "",
        f"# Plaudit adapter {version}", "",
        f"- made by: {fields.get('kind', 'ppo')}" + (f", round {fields['round']}" if fields.get("round") else ""),
        f"- parent: {fields.get('parent', 'base')}",
        f"- base digest: {fields.get('base_digest') or 'unknown'}",
        f"- data digest: {fields.get('data_digest') or 'none'}",
        f"- gate: {gate.get('verdict', 'none')}",
    ]
    for check in gate.get("checks") or []:
        lines.append(f"  - {'passed' if check.get('passed') else 'FAILED'} {check.get('name')}: {check.get('value')} (limit {check.get('limit')})")
    return "\n".join(lines) + "\n"
