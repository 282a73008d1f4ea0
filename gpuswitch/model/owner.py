"""The owner of a GPU: the virtual machine, or the process, that it was handed to."""

from __future__ import annotations

from dataclasses import dataclass, field

from gpuswitch.model.holders import Process
from gpuswitch.sentence import Sentence


@dataclass(frozen=True, slots=True)
class Owner:
    """Its `uuid` tells it from others; `name` is for people. With a `process`, that is who it was handed to.

    Without one it is a virtual machine, by the name and UUID that libvirt, or who else runs it, knows it by.
    """

    name: str = field(compare=False)
    uuid: str
    process: Process | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """What it is known by: its name, else its UUID."""
        return self.name or self.uuid

    @property
    def words(self) -> Sentence:
        """It, in a sentence."""
        if self.process is not None:
            return Sentence("process {name}", name=self.name)
        return Sentence("the virtual machine {name}", name=self.name)

    def __str__(self) -> str:
        return self.words
