"""Modules that would be unloaded: whether they can go, and can come back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from gpuswitch.config.settings import Config
from gpuswitch.model.facts import HostFacts, Module
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.policy import ModulePolicy
from gpuswitch.switch.planning.requirements import BoundDriver, bound_drivers, not_found_again, unloaded, used_besides
from tests.harness.facts import VGA, at, facts, function

DISPLAY = at("0000:01:00.0")
SIBLING = function("0000:02:00.0", VGA, "nvidia", group=2)
CHAIN = {"nvidia": Module(2, ("nvidia_modeset", "nvidia_uvm")), "nvidia_modeset": Module(0), "nvidia_uvm": Module(0)}


def host(modules: Mapping[str, Module] = CHAIN, *, last: bool = True) -> HostFacts:
    card = function(str(DISPLAY), VGA, "nvidia")
    return replace(facts([card] if last else [card, SIBLING]), modules=modules)


def found(seen: HostFacts, policy: ModulePolicy = ModulePolicy.AUTO) -> tuple[BoundDriver, ...]:
    return bound_drivers(Gpu(DISPLAY, (DISPLAY,)), seen, policy)


GPU = Gpu(at("0000:01:00.0"), (at("0000:01:00.0"),))


def using(module: str, *users: str) -> dict[str, Module]:
    return CHAIN | {module: replace(CHAIN[module], users=(*CHAIN[module].users, *users))}


@pytest.mark.parametrize(
    ("module", "users", "sentence"),
    [
        (
            "nvidia",
            ("nv_peer_mem",),
            "nv_peer_mem uses nvidia, which would have to be unloaded: unload it first: modprobe -r nv_peer_mem",
        ),
        (
            "nvidia_modeset",
            ("a", "b"),
            "a, b use nvidia_modeset, which would have to be unloaded: unload them first: modprobe -r a b",
        ),
    ],
)
def test_what_others_use_is_not_unloaded(module: str, users: tuple[str, ...], sentence: str) -> None:
    seen = host(using(module, *users))
    [blocker] = used_besides(GPU, seen, Config(), found(seen))
    assert blocker.kind == "module_users"
    assert blocker.sentence.startswith(f"{sentence}; or keep ")
    assert '`module_policy = "never"`' in blocker.sentence


def test_what_goes_with_it_is_no_user() -> None:
    assert list(used_besides(GPU, host(), Config(), found(host()))) == []


def test_nobody_minds_what_uses_a_module_that_stays() -> None:
    used = using("nvidia", "nv_peer_mem")
    two = host(used, last=False)
    assert list(used_besides(GPU, two, Config(), found(two))) == []
    assert list(used_besides(GPU, host(used), Config(), found(host(used), ModulePolicy.NEVER))) == []


def test_what_modprobe_does_not_know_is_not_unloaded() -> None:
    [module] = unloaded(found(host()))
    assert module == "nvidia"
    assert list(not_found_again(GPU, Config(), [module], ("nvidia",))) == []
    [blocker] = not_found_again(GPU, Config(), [module], ())
    assert (blocker.kind, "module_policy" in blocker.sentence) == ("no_modules", True)
    assert blocker.sentence.startswith("nvidia would have to be unloaded and could not be loaded again, since modprobe")


def test_what_stays_need_not_be_found() -> None:
    assert unloaded(found(host(last=False))) == ()
    assert unloaded(found(host(), ModulePolicy.NEVER)) == ()
