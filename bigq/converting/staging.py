"""Staging: a folder in the making, inside of the folder that it will become, and what an interrupted run left in it.

Nothing that loads lies in the destination before everything is there. A small file says which run the staged files
belong to, by a digest of all that decides what is in them, and which of them are whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from bigq.checkpoint.model_config import read_config
from bigq.errors import ConfigError
from bigq.saving.files import remove_weights
from bigq.system.files import synchronize
from bigq.system.interrupts import Worker
from bigq.system.text import shortlist

__all__ = ["Staging", "refuse_taken"]

_NAME = ".bigq-quantize"
_STATE = "state.json"
_LAST = "config.json"  # whoever loads a folder by it finds all else


def refuse_taken(destination: Path, *, overwrite: bool) -> None:
    """Raise a ConfigError if a run that writes to `destination` would have to replace files that are none of its own.

    Args:
        destination: folder to write to.
        overwrite: whether files in it may be replaced.
    """
    if destination.exists() and not destination.is_dir():
        raise ConfigError(f"{destination} is a file; expected a folder to write to")
    if overwrite or not destination.is_dir() or read_config(destination / _NAME / _STATE):
        return
    names = sorted(path.name for path in destination.iterdir() if path.name != _NAME)
    if names:
        raise ConfigError(
            f"{destination} is not empty, it holds {shortlist(names)}: choose another folder, or overwrite it"
        )


class Staging:
    """The staged files of a run that writes to `destination`.

    Args:
        destination: is created if it does not exist.
        described: what decides the content of the files: {what: value, as JSON can hold it}.
        overwrite: drop what an earlier run left, and replace files in `destination` in the end.

    Raises:
        ConfigError: `destination` holds files, or the files of a run with another `described`, and not `overwrite`.
        OSError: it cannot be written to.
    """

    def __init__(self, destination: Path, described: Mapping[str, object], *, overwrite: bool) -> None:
        refuse_taken(destination, overwrite=overwrite)
        self.destination, self.folder = destination, destination / _NAME
        self._described = {what: _digest(value) for what, value in described.items()}
        found = {} if overwrite else read_config(self.folder / _STATE)
        if not found and self.folder.is_dir():  # nobody knows what its files are
            shutil.rmtree(self.folder)
        if found:
            self._refuse_another_run(found)
        done = found.get("done")
        self.done: list[str] = [name for name in done if isinstance(name, str)] if isinstance(done, list) else []
        self._syncing: tuple[str, Worker] | None = None
        self._error: OSError | None = None
        self.is_complete = found.get("is_complete") is True
        self.folder.mkdir(parents=True, exist_ok=True)
        self._save()

    def mark_done(self, name: str) -> None:
        """Note that the staged file `name` is whole, once the disk has it: a later run keeps it.

        The disk is waited for in a thread, while the next file is made; `wait` ends it.
        """
        self.wait()
        self._syncing = name, Worker(partial(self._synchronize, name))
        self._syncing[1].start()

    def wait(self) -> None:
        """Return when the disk has every file that was marked. Raises OSError if it could not take one."""
        if self._syncing is None:
            return
        (name, thread), self._syncing = self._syncing, None
        thread.join()
        if self._error is not None:
            raise self._error
        self.done.append(name)
        self._save()

    def publish(self) -> None:
        """Move all staged files to the destination, config.json last, in place of those that an earlier run wrote.

        A run that finds `is_complete` only has to call this again.
        """
        if not self.is_complete:
            (self.destination / _LAST).unlink(missing_ok=True)
            remove_weights(self.destination)
            self.is_complete = True
            self._save()
        files = [path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path == Path(_LAST), path)):
            if not path.name.startswith(_STATE):
                (self.destination / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.folder / path, self.destination / path)
        shutil.rmtree(self.folder)

    def _synchronize(self, name: str) -> None:
        try:
            synchronize(self.folder / name)
        except OSError as error:
            self._error = error

    def _refuse_another_run(self, found: Mapping[str, object]) -> None:
        before = found.get("described")
        held = before if isinstance(before, dict) else {}
        changed = [what for what in {**held, **self._described} if held.get(what) != self._described.get(what)]
        if changed:
            raise ConfigError(
                f"{self.destination} holds a part of another run, which differs in {shortlist(changed)}: repeat that "
                "run as it was to go on with it, overwrite to begin anew, or choose another folder"
            )

    def _save(self) -> None:
        new = self.folder / f"{_STATE}.new"
        with new.open("w") as file:
            json.dump({"described": self._described, "done": self.done, "is_complete": self.is_complete}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.folder / _STATE)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
