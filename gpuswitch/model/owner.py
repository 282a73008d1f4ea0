"""The owner of a GPU: the virtual machine that it was handed to."""

from __future__ import annotations

from dataclasses import dataclass, field

from gpuswitch.sentence import Sentence


@dataclass(frozen=True, slots=True)
class Owner:
    """A virtual machine, as libvirt knows it. Its `uuid` tells it from others; `name` is for people."""

    name: str = field(compare=False)
    uuid: str

    @property
    def label(self) -> str:
        """What it is known by: its name, else its UUID."""
        return self.name or self.uuid

    @property
    def words(self) -> Sentence:
        """It, in a sentence."""
        return Sentence("the virtual machine {name}", name=self.name)

    def __str__(self) -> str:
        return self.words
