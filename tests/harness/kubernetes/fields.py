"""Who owns which field of an object: managed fields and server-side apply.

A field is a path, as FieldsV1 has it: `f:NAME` in an object, `k:{...}` for an entry of a list that is a map. All
other lists are atomic. https://kubernetes.io/docs/reference/using-api/server-side-apply/,
sigs.k8s.io/structured-merge-diff.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

Object = dict[str, Any]
Path = tuple[str, ...]

LIST_KEYS: Mapping[Path, str] = {
    ("f:status", "f:conditions"): "type",
    ("f:status", "f:addresses"): "type",
    ("f:metadata", "f:ownerReferences"): "uid",
    ("f:spec", "f:containers"): "name",
    ("f:spec", "f:template", "f:spec", "f:containers"): "name",
}
"""x-kubernetes-list-map-keys of swagger.json, as far as it is needed here. `spec.taints` of a node is none of them:
it is atomic.
"""

_STRIPPED: frozenset[Path] = frozenset(
    {("f:apiVersion",), ("f:kind",)}
    | {
        ("f:metadata", f"f:{name}")
        for name in ("name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp")
    }
    | {
        ("f:metadata", "f:managedFields"),
        ("f:metadata", "f:generateName"),
        ("f:metadata", "f:deletionTimestamp"),
        ("f:metadata", "f:deletionGracePeriodSeconds"),
    }
)
"""Nobody owns these: stripMeta in apimachinery's managedfields."""


class Conflict(Exception):  # noqa: N818 -- as the API calls it
    """Others own these fields with other values: who, by path."""

    def __init__(self, owners: Mapping[Path, str]) -> None:
        super().__init__(
            ", ".join(f"conflict with {owner!r}: {dotted(path)}" for path, owner in sorted(owners.items()))
        )
        self.owners = owners


def dotted(path: Path) -> str:
    """`.metadata.annotations.example.com/x`, as the server names it."""
    return "".join(f".{part[2:]}" if part.startswith("f:") else f"[{part[2:]}]" for part in path)


def leaves(value: Any, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every field that can be owned, with its value."""
    if at in _STRIPPED:
        return
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, (*at, f"f:{name}"))
    elif isinstance(value, list) and at in LIST_KEYS and value:
        key = LIST_KEYS[at]
        for entry in value:
            yield from leaves(entry, (*at, "k:" + json.dumps({key: entry[key]}, separators=(",", ":"))))
    elif at and not (value == {} and at[0] == "f:metadata"):
        yield at, value


def get(value: Any, path: Path) -> Any:
    """What stands there; None where nothing does."""
    for part in path:
        if part.startswith("k:"):
            value = _entry(value, part) if isinstance(value, list) else None
        else:
            value = value.get(part[2:]) if isinstance(value, dict) else None
        if value is None:
            return None
    return value


def put(root: Object, path: Path, new: Any) -> None:
    value: Any = root
    for part, following in zip(path, (*path[1:], ""), strict=True):
        if part.startswith("k:"):
            entry = _entry(value, part)
            if entry is None:
                entry = dict(json.loads(part[2:]))
                value.append(entry)
            value = entry
        elif not following:
            value[part[2:]] = deepcopy(new)
        else:
            empty: Any = [] if following.startswith("k:") else {}
            if value.get(part[2:]) is None:
                value[part[2:]] = empty
            value = value[part[2:]]


def drop(root: Object, path: Path) -> None:
    """Take a field away, and what is empty then around it."""
    above, last = path[:-1], path[-1]
    parent = get(root, above) if above else root
    if isinstance(parent, dict):
        if above and above[-1].startswith("k:") and last[2:] in json.loads(above[-1][2:]):
            # the key of an entry: what would be left without it is no entry
            if set(parent) == {last[2:]}:
                entries = get(root, above[:-1])
                entries[:] = [entry for entry in entries if entry is not parent]
                above, parent = above[:-1], entries
        else:
            parent.pop(last[2:], None)
    if above and parent in ({}, []) and above not in _KEPT:
        drop(root, above)


_KEPT = (("f:metadata",), ("f:spec",), ("f:status",))
"""These stay, even where nothing is left in them."""


def _keys_last(path: Path) -> tuple[bool, Path]:
    """The order in which the fields of an entry can be found until the last is gone."""
    entry = path[-2] if len(path) > 1 and path[-2].startswith("k:") else "k:{}"
    return path[-1][2:] in json.loads(entry[2:]), path


def _entry(entries: Sequence[Any], part: str) -> Any:
    [(key, wanted)] = json.loads(part[2:]).items()
    return next((entry for entry in entries if entry.get(key) == wanted), None)


class Owners:
    """The managed fields of one object, by manager, operation and subresource."""

    def __init__(self, managed: Sequence[Object] = ()) -> None:
        self._sets = {
            (each["manager"], each["operation"], each.get("subresource", "")): set(_paths(each["fieldsV1"]))
            for each in managed
        }
        self._times = {
            (each["manager"], each["operation"], each.get("subresource", "")): each["time"] for each in managed
        }

    def written(self, api_version: str) -> list[Object]:
        """As `metadata.managedFields` has them."""
        return [
            {
                "manager": manager,
                "operation": operation,
                "apiVersion": api_version,
                "time": self._times[manager, operation, sub],
                "fieldsType": "FieldsV1",
                "fieldsV1": _tree(paths),
                **({"subresource": sub} if sub else {}),
            }
            for (manager, operation, sub), paths in sorted(self._sets.items())
            if paths
        ]

    def apply(self, live: Object, config: Object, manager: str, sub: str, now: str, *, force: bool) -> None:
        """Make `live` as it is applied. Raises Conflict, and changes nothing then."""
        key = (manager, "Apply", sub)
        wanted = dict(leaves(config))
        others = {
            path: owner[0]
            for owner, paths in self._sets.items()
            if owner != key
            for path in paths & wanted.keys()
            if get(live, path) != wanted[path]
        }
        if others and not force:
            raise Conflict(others)
        for owner in self._sets:
            if owner != key:
                self._sets[owner] = self._sets[owner] - others.keys()
        before = self._sets.get(key, set())
        kept = set().union(*(paths for owner, paths in self._sets.items() if owner != key))
        for path in sorted(before - wanted.keys() - kept, key=_keys_last):
            drop(live, path)
        for path, value in wanted.items():
            if value != {} or not isinstance(get(live, path), dict):
                put(live, path, value)
        self._sets[key], self._times[key] = set(wanted), now

    def update(self, before: Object, after: Object, manager: str, sub: str, now: str) -> None:
        """Somebody has written `after` whole, or patched it: what differs is theirs."""
        old, new = dict(leaves(before)), dict(leaves(after))
        changed = {path for path, value in new.items() if path not in old or old[path] != value}
        for owner in self._sets:
            self._sets[owner] = (self._sets[owner] - changed) & new.keys()
        if changed:
            key = (manager, "Update", sub)
            self._sets.setdefault(key, set()).update(changed)
            self._times[key] = now


def _tree(paths: set[Path]) -> Object:
    root: Object = {}
    for path in sorted(paths):
        at = root
        for part in path:
            at = at.setdefault(part, {})
    return root


def _paths(tree: Object, at: Path = ()) -> Iterator[Path]:
    for part, inner in tree.items():
        if inner:
            yield from _paths(inner, (*at, part))
        else:
            yield (*at, part)
