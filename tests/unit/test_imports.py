"""Imports go one way: errors, model, config, the host's port, switch, gpu, fleet, api, daemon; clients know none."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "gpuswitch"

_HEART = (
    "gpuswitch.sentence",
    "gpuswitch.errors",
    "gpuswitch.model",
    "gpuswitch.config",
    "gpuswitch.runtime.apart",
    "gpuswitch.runtime.pause",
    "gpuswitch.runtime.stacks",
    "gpuswitch.log.events",
    "gpuswitch.log.fields",
    "gpuswitch.host.operation",
    "gpuswitch.host.port",
    "gpuswitch.host.looking",
)
"""What all of the heart may import: plain values, and what it asks of a host."""
_HOST = (
    "gpuswitch.sentence",
    "gpuswitch.errors",
    "gpuswitch.model",
    "gpuswitch.host.operation",
    "gpuswitch.host.port",
)
"""What a host may: it implements the port, and sees nothing of the heart."""
_ROOMS = (
    "gpuswitch.switch.restore_state",
    "gpuswitch.switch.holder_policy",
    "gpuswitch.switch.shared",
    "gpuswitch.switch.steps",
    "gpuswitch.switch.planning",
    "gpuswitch.switch.engine",
    "gpuswitch.switch.record",
    "gpuswitch.switch.journal",
    "gpuswitch.gpu",
    "gpuswitch.fleet",
)
"""The rooms of the heart: each knows those before it, and itself."""

LAYERS: dict[str, tuple[str, ...]] = {
    "gpuswitch": (),
    "gpuswitch.sentence": (),
    "gpuswitch.errors": ("gpuswitch.sentence",),
    "gpuswitch.model": ("gpuswitch.sentence", "gpuswitch.errors", "gpuswitch.model"),
    "gpuswitch.config": (
        "gpuswitch.__version__",
        "gpuswitch.sentence",
        "gpuswitch.errors",
        "gpuswitch.model",
        "gpuswitch.config",
    ),
    "gpuswitch.runtime": ("gpuswitch.errors",),
    # What a line of the log is about, anybody may say.
    "gpuswitch.log": (),
    "gpuswitch.log.events": ("gpuswitch.sentence",),
    "gpuswitch.log.fields": ("gpuswitch.log.events",),
    "gpuswitch.log.journald": ("gpuswitch.log",),
    # An observer of the switches.
    "gpuswitch.log.observer": (
        "gpuswitch.log",
        "gpuswitch.model",
        "gpuswitch.switch.engine",
        "gpuswitch.switch.record",
        "gpuswitch.gpu.actor",
        "gpuswitch.gpu.gpu_record",
    ),
    "gpuswitch.switch": (),
    **{room: (*_HEART, *_ROOMS[: _ROOMS.index(room) + 1]) for room in _ROOMS},
    "gpuswitch.host": (),
    "gpuswitch.host.operation": ("gpuswitch.errors", "gpuswitch.model", "gpuswitch.config.schema"),
    "gpuswitch.host.port": _HOST,
    "gpuswitch.host.looking": (*_HOST, "gpuswitch.runtime.pause"),
    "gpuswitch.host.linux": (*_HOST, "gpuswitch.host.linux"),
    "gpuswitch.host.simulated": (*_HOST, "gpuswitch.runtime.apart", "gpuswitch.host.simulated"),
    # An observer of the switches, and what it writes: files of its own.
    "gpuswitch.history": (
        "gpuswitch.sentence",
        "gpuswitch.errors",
        "gpuswitch.config.schema",
        "gpuswitch.runtime.threads",
        "gpuswitch.history",
        "gpuswitch.switch.engine",
        "gpuswitch.switch.record",
        "gpuswitch.gpu.actor",
        "gpuswitch.gpu.gpu_record",
    ),
    "gpuswitch.api": (
        "gpuswitch.__version__",
        "gpuswitch.sentence",
        "gpuswitch.errors",
        "gpuswitch.model",
        "gpuswitch.config.schema",
        "gpuswitch.runtime.seldom",
        "gpuswitch.runtime.threads",
        "gpuswitch.history",
        "gpuswitch.switch",
        "gpuswitch.gpu",
        "gpuswitch.fleet",
        "gpuswitch.host.port",
        "gpuswitch.api",
    ),
    # The composition root: the only place that sees both the hosts and the faces.
    "gpuswitch.daemon": (
        "gpuswitch.__version__",
        "gpuswitch.errors",
        "gpuswitch.model",
        "gpuswitch.config",
        "gpuswitch.runtime",
        "gpuswitch.log",
        "gpuswitch.history",
        "gpuswitch.switch",
        "gpuswitch.gpu",
        "gpuswitch.fleet",
        "gpuswitch.host",
        "gpuswitch.api",
    ),
    # It looks at this machine with the service's eyes, and judges with its guards, whether or not the service runs. It
    # has no part in switching: no host that writes, no engine, no bus.
    "gpuswitch.doctor": (
        "gpuswitch.__version__",
        "gpuswitch.sentence",
        "gpuswitch.errors",
        "gpuswitch.model",
        "gpuswitch.config",
        "gpuswitch.host.linux.processes",
        "gpuswitch.host.linux.reading",
        "gpuswitch.host.linux.scan_main",
        "gpuswitch.host.linux.sysfs",
        "gpuswitch.switch.holder_policy",
        "gpuswitch.switch.planning.guards",
        "gpuswitch.switch.planning.remedies",
        "gpuswitch.switch.planning.requirements",
        "gpuswitch.switch.restore_state",
        "gpuswitch.switch.steps.pci",
        "gpuswitch.gpu.observe",
        "gpuswitch.fleet.fitting",
        "gpuswitch.fleet.host_drivers",
        "gpuswitch.fleet.matching",
        "gpuswitch.fleet.misfit",
        # What a machine of Proxmox VE has is read by one reader.
        "gpuswitch.hook",
        "gpuswitch.proxmox_hook",
        "gpuswitch.doctor",
    ),
    # It says what it understands before any of that is there.
    "gpuswitch.service": (
        "gpuswitch.__version__",
        "gpuswitch.errors",
        "gpuswitch.runtime.buses",
        "gpuswitch.runtime.hangups",
        "gpuswitch.config.reading",
        "gpuswitch.daemon",
    ),
    # Clients of the bus: they work, and say what is wrong, when nothing else of the program does.
    "gpuswitch.cli": ("gpuswitch.__version__", "gpuswitch.sentence", "gpuswitch.errors", "gpuswitch.cli"),
    # The one verb that is more than that: it has to work where there is no service to ask (adr/0039).
    "gpuswitch.cli.doctor": (
        "gpuswitch.sentence",
        "gpuswitch.errors",
        "gpuswitch.model.holders",
        "gpuswitch.cli",
        "gpuswitch.doctor",
    ),
    # Its other half: it writes what mends, and asks the service for the GPUs.
    "gpuswitch.cli.setup": (
        "gpuswitch.sentence",
        "gpuswitch.errors",
        "gpuswitch.config.schema.name_of",  # a name is refused when it is typed, and not once all is answered
        "gpuswitch.cli",
        "gpuswitch.doctor",
    ),
    # As that: it names GPUs of the service in machines that the doctor's look has seen.
    "gpuswitch.cli.proxmox": ("gpuswitch.errors", "gpuswitch.cli", "gpuswitch.doctor"),
    "gpuswitch.cli.prometheus": ("gpuswitch.errors", "gpuswitch.cli", "gpuswitch.doctor"),
    "gpuswitch.cli.other_programs": ("gpuswitch.cli", "gpuswitch.doctor"),
    # What it has the initrd do is for the doctor to look at, too, and depends on the machine alone.
    "gpuswitch.cli.setup_boot": ("gpuswitch.errors", "gpuswitch.cli", "gpuswitch.doctor"),
    "gpuswitch.cli.early_binding": ("gpuswitch.doctor.looks.early",),
    "gpuswitch.hook": (),
    "gpuswitch.proxmox_hook": ("gpuswitch.hook",),
    "gpuswitch.slurm_hook": (),
}
"""What a part of the package may import of the package."""


def module_name(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> Iterator[str]:
    """Every name that the source imports, wherever it does so; `from a import b` gives `a.b`.

    Imports are absolute here (a lint rule), so the text says it all.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, parents: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the parents, or lies in one."""
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def layer_of(module: str) -> str:
    """The part of the package that a module belongs to: the smallest that has a line of its own."""
    return max(
        (layer for layer in LAYERS if layer != "gpuswitch" and within(module, (layer,))), key=len, default=module
    )


def is_program(source: str) -> bool:
    """Whether the file is meant to be run by itself."""
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in ast.parse(source).body
    )


FILES = sorted(PACKAGE.rglob("*.py"))


def all_imports() -> Iterator[tuple[str, str]]:
    for path in FILES:
        for name in imports(path.read_text()):
            yield module_name(path), name


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_only_what_lies_below(path: Path) -> None:
    module = module_name(path)
    assert layer_of(module) in LAYERS, f"{module} has no place in the order of imports: give it one in LAYERS"
    allowed = LAYERS[layer_of(module)]
    own = [name for name in imports(path.read_text()) if within(name, ("gpuswitch",))]
    assert [name for name in own if not within(name, allowed)] == []


def test_the_parts_of_a_gpu_know_none_above_them() -> None:
    """From what is known of a GPU to who decides what is done with it; those of one line do not know each other."""
    order = ["gpu_record"], ["turns", "stall", "planner", "admission"], ["runner"], ["recovery"], ["actor"]
    level = {f"gpuswitch.gpu.{part}": rank for rank, parts in enumerate(order) for part in parts}
    found = {(module, name.rpartition(".")[0]) for module, name in all_imports() if module in level}
    assert level.keys() == {module for module, _ in found}
    assert [pair for pair in found if pair[1] in level and level[pair[1]] >= level[pair[0]]] == []
    above = ("gpuswitch.gpu.observer", "gpuswitch.fleet.fleet", "gpuswitch.fleet.owners", "gpuswitch.gpu.retry")
    assert [pair for pair in found if pair[1] in above] == []


def test_one_module_knows_the_bus_library() -> None:
    """It is the one to change for another library; what one alone does wrong is put right in a module of that."""
    for name in "dbus_next", "dbus_fast":
        importers = {importer for importer, imported in all_imports() if within(imported, (name,))}
        assert importers == {f"gpuswitch.api.library.{name}"}
    importers = {importer for importer, imported in all_imports() if within(imported, ("gpuswitch.api.library",))}
    assert importers == {"gpuswitch.api.library", "gpuswitch.api.connection"}


def test_clients_start_fast() -> None:
    """The command line may use two light libraries, the hooks none."""
    allowed = {
        "gpuswitch.cli": {"gpuswitch", "jeepney", "rich"},
        "gpuswitch.hook": set[str](),
        "gpuswitch.proxmox_hook": {"gpuswitch"},
        "gpuswitch.slurm_hook": set[str](),
    }
    heavy = [
        (module, name)
        for module, name in all_imports()
        if layer_of(module) in allowed
        and (root := name.partition(".")[0]) not in sys.stdlib_module_names
        and root not in allowed[layer_of(module)]
    ]
    assert heavy == []


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        # `--help` is there as soon as argparse is.
        ("gpuswitch.cli.main", {"jeepney", "typing"}),
        ("gpuswitch.cli.main, gpuswitch.cli.query, gpuswitch.cli.client", set[str]()),
        ("gpuswitch.cli.switch, gpuswitch.cli.watch, gpuswitch.cli.history", set[str]()),
    ],
)
def test_the_command_brings_what_takes_long_when_it_is_needed(modules: str, without: set[str]) -> None:
    program = f"import sys, {modules}\nprint(*sys.modules)"
    brought = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    slow = {"asyncio", "dataclasses", "datetime", "inspect", "json", "rich", "shutil", "subprocess", "unicodedata"}
    assert (slow | without).intersection(brought) == set()
    assert "argparse" in brought or "jeepney" in brought


def test_programs_of_the_linux_host_use_the_standard_library_only() -> None:
    """They are started once for each GPU, and must be small. So must be what they take from beside them."""
    sources = {module_name(path): path.read_text() for path in FILES}
    waiting = [name for name, text in sources.items() if within(name, ("gpuswitch.host.linux",)) and is_program(text)]
    seen, foreign = set(waiting), []
    while waiting:
        module = waiting.pop()
        for name in imports(sources[module]):
            beside = next((part for part in (name, name.rpartition(".")[0]) if part in sources), "")
            if within(beside, ("gpuswitch.host.linux",)) and beside not in seen:
                seen.add(beside)
                waiting.append(beside)
            elif beside not in seen and name.partition(".")[0] not in sys.stdlib_module_names:
                foreign.append((module, name))
    assert foreign == []


def test_the_rules_can_fail() -> None:
    """The helpers see the imports that the rules forbid."""
    source = "def f():\n    from gpuswitch.host import linux\n    import gpuswitch.api.bus\n"
    assert list(imports(source)) == ["gpuswitch.host.linux", "gpuswitch.api.bus"]
    assert not within("gpuswitch.hosts", ("gpuswitch.host",))
    assert within("gpuswitch.host.port.Host", LAYERS["gpuswitch.host.linux"])
    assert not within("gpuswitch.switch.engine", LAYERS["gpuswitch.host.linux"])
    assert not within("gpuswitch.switch.planning.plan.Plan", LAYERS["gpuswitch.cli"])
    assert is_program('if __name__ == "__main__":\n    main()\n')
