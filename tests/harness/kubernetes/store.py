"""Objects with their versions, and what has happened to them."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import UTC, datetime

from tests.harness.kubernetes.fields import Object, Owners

Key = tuple[str, str, str]
"""Resource (`pods`), namespace ("" where it has none), name."""


class StatusError(Exception):
    """What the server answers instead, as an object of kind Status."""

    def __init__(
        self, code: int, reason: str, message: str, causes: list[Object] | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.reason, self.causes, self.retry_after = code, reason, causes or [], retry_after

    def status(self) -> Object:
        details: Object = {"causes": self.causes} if self.causes else {}
        if self.retry_after:
            details["retryAfterSeconds"] = self.retry_after
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "details": details,
            "code": self.code,
        }


def stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Store:
    """All of it under one lock. `log` has each change with the version that it made; older ones than `oldest` are
    forgotten.
    """

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.objects: dict[Key, Object] = {}
        self.version = 1000
        self.log: list[tuple[int, str, str, Object]] = []
        self.oldest = self.version
        self.written: Callable[[Key, Object | None], None] = lambda _key, _new: None
        """Told of each write, under the lock."""

    def get(self, key: Key) -> Object:
        """A copy. Raises StatusError."""
        with self.lock:
            if key not in self.objects:
                raise StatusError(404, "NotFound", f'{key[0]} "{key[2]}" not found')
            return deepcopy(self.objects[key])

    def list(self, resource: str, namespace: str = "") -> list[Object]:
        with self.lock:
            found = [
                (key, deepcopy(each))
                for key, each in self.objects.items()
                if key[0] == resource and namespace in ("", key[1])
            ]
            return [each for _key, each in sorted(found, key=lambda pair: pair[0])]

    def create(self, key: Key, new: Object, manager: str = "test") -> Object:
        with self.lock:
            if key in self.objects:
                raise StatusError(409, "AlreadyExists", f'{key[0]} "{key[2]}" already exists')
            new = deepcopy(new)
            metadata = new.setdefault("metadata", {})
            metadata |= {"name": key[2], "uid": str(uuid.uuid4()), "creationTimestamp": stamp()}
            if key[1]:
                metadata["namespace"] = key[1]
            if "managedFields" not in metadata:
                owners = Owners()
                owners.update({}, new, manager, "", stamp())
                metadata["managedFields"] = owners.written(new["apiVersion"])
            return self._write("ADDED", key, new)

    def replace(self, key: Key, new: Object, version: str | None) -> Object:
        """`version` is what the object has to have still; None: whatever it has. Nothing is written where nothing
        differs.
        """
        with self.lock:
            old = self.get(key)
            if version not in (None, "", old["metadata"]["resourceVersion"]):
                raise StatusError(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {key[0]} "{key[2]}": the object has been modified; please apply '
                    "your changes to the latest version and try again",
                )
            new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
            if _without_times(new) == _without_times(old):
                return old
            return self._write("MODIFIED", key, new)

    def delete(self, key: Key) -> None:
        with self.lock:
            gone = self.get(key)
            del self.objects[key]
            self.version += 1
            gone["metadata"]["resourceVersion"] = str(self.version)
            self._note("DELETED", key, gone)

    def forget(self) -> None:
        """As a watch cache does, or etcd when it is compacted: who asks for what was before now is answered 410."""
        with self.lock:
            self.oldest = self.version + 1
            self.log.clear()
            self.lock.notify_all()

    def since(self, version: int, resource: str) -> Iterator[tuple[int, str, Object]]:
        """Raises StatusError: that is too long ago."""
        with self.lock:
            if version + 1 < self.oldest:
                raise StatusError(410, "Expired", f"too old resource version: {version} ({self.oldest})")
            found = [(at, kind, deepcopy(each)) for at, of, kind, each in self.log if at > version and of == resource]
        yield from found

    def _write(self, kind: str, key: Key, new: Object) -> Object:
        self.version += 1
        new["metadata"]["resourceVersion"] = str(self.version)
        self.objects[key] = new
        self._note(kind, key, new)
        return deepcopy(new)

    def _note(self, kind: str, key: Key, thing: Object) -> None:
        self.log.append((self.version, key[0], kind, deepcopy(thing)))
        self.written(key, None if kind == "DELETED" else thing)
        self.lock.notify_all()


def _without_times(thing: Object) -> Object:
    """An apply that changes nothing but the time of its entry writes nothing:
    managedfields/internal/skipnonapplied.go, updatetime.
    """
    copy = deepcopy(thing)
    for entry in copy["metadata"].get("managedFields", ()):
        entry.pop("time", None)
    return copy
