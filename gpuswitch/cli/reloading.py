"""What a change of the configuration comes to: the running service reads it, and says what is new."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from gpuswitch.cli.client import MANAGER, NAME, ROOT, Service, call
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.translate import _

Setting = Mapping[str, str]


def reload(address: str | None, file: Path) -> list[str]:
    """Have the service on the bus at `address` read `file`, where it runs: what that changed, a sentence each.

    It is not started for this.

    Raises:
        CtlError: it does not take it.
    """
    try:
        service = Service.connect(address)
    except CtlError as error:
        return [_("nobody was told: {error}", error=error)]
    with closing(service):
        try:
            if not service.runs():
                return [_("the service does not run, and reads it when it starts")]
            before = by_key(service)
            service.ask_allowed(call(NAME, ROOT, MANAGER, "Reload"))
            changed = list(changes(before, by_key(service)))
        except CtlError as error:
            text = _("cannot have the service read {file}, which is saved: {error}", file=file, error=error)
            raise CtlError(text, error.exit_code, name=error.name) from error
    if not changed:
        return [_("the service has read it: nothing in force is changed by that")]
    return [_("the service has read it: this is new"), *(f"  {each}" for each in changed)]


def changes(before: Mapping[str, Setting], after: Mapping[str, Setting]) -> Iterator[str]:
    """What differs between two configurations in force, by the names of their keys: each with its value as TOML."""
    for key, setting in after.items():
        value, was = setting["value"], before.get(key, setting)["value" if key in before else "default"]
        # A table is known by its address: it had no other before.
        told = was and not key.endswith("].address")
        if value != was:
            yield _("{key} = {value} (before: {was})", key=key, value=value, was=was) if told else f"{key} = {value}"
    for key in before:
        if key not in after and key.endswith("].address"):
            yield _("{key} has no table any more", key=key.removesuffix(".address"))


def by_key(service: Service) -> dict[str, Setting]:
    """Every setting in force, by its key."""
    return {str(each["key"]): each for each in service.config()}
