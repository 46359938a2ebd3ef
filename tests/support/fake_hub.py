"""A Hub that is a folder on this disk, and answers what bigq asks of one."""

import shutil
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects


class FakeHub:
    """Answers for one repository whose files lie in `source`; remembers what it was asked."""

    def __init__(self, root: Path) -> None:
        self.source = root / "source"
        self.cache = root / "cache"
        self.error: Exception | None = OfflineModeIsEnabled("offline mode is enabled")
        self.revisions: list[str | None] = []
        self.downloads: list[tuple[str, str | None, list[str] | None]] = []

    def publish(self) -> Path:
        """Go online with an empty repository; the caller fills it."""
        self.error = None
        self.source.mkdir()
        return self.source

    @property
    def downloaded(self) -> list[str]:
        return sorted(path.name for path in self.cache.rglob("*") if path.is_file())

    def model_info(self, repo_id: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        self.revisions.append(revision)
        if self.error:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self._names()])

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None,
        allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        if local_files_only:
            if not self.cache.is_dir():
                raise LocalEntryNotFoundError("it is not in the cache")
            return str(self.cache)
        self.downloads.append((repo_id, revision, allow_patterns))
        if self.error:
            raise self.error
        for name in filter_repo_objects(self._names(), allow_patterns=allow_patterns):
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source / name, self.cache / name)
        return str(self.cache)

    def _names(self) -> list[str]:
        return [path.relative_to(self.source).as_posix() for path in self.source.rglob("*") if path.is_file()]
