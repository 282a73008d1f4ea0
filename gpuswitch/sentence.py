"""Sentences that can be worded anew in another language: English text, with what it was made of beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping


class Sentence(str):
    """The finished English text; `template` has named fields, and `data` what stands in them: text, or a `Sentence`.

    It is text wherever text is wanted (log, journal, history). `str()` keeps it, so that an exception that was made of
    one still has it: `str(error)`. An f-string does not.
    """

    __slots__ = ("data", "template")
    template: str
    data: Mapping[str, str]

    def __new__(cls, template: str, /, **data: object) -> Sentence:
        """Put `data` into the fields of `template`.

        Raises:
            KeyError: there is a field for which there is nothing.
        """
        values = {name: str(value) for name, value in data.items()}
        made = super().__new__(cls, filled(template, values))
        made.template = template
        made.data = values
        return made

    @classmethod
    def of(cls, text: object) -> Sentence:
        """The sentence that this is, or says (an exception); of other text, one that is known in no other language."""
        said = str(text)
        return said if isinstance(said, Sentence) else cls("{text}", text=said)

    @classmethod
    def joined(cls, between: str, parts: Iterable[object]) -> Sentence:
        """The parts one after the other, each of which can be worded anew."""
        data = {f"part{number}": part for number, part in enumerate(parts, 1)}
        return cls(between.join(f"{{{name}}}" for name in data), **data)

    @classmethod
    def read(cls, text: str, templates: Iterable[str]) -> Sentence:
        """What another program of ours has said by one of these templates; as `of` does where none of them fits."""
        for template in templates:
            if (found := values(template, text)) is not None:
                return cls(template, **found)
        return cls.of(text)

    def __str__(self) -> str:
        return self

    def __reduce__(self) -> tuple[Callable[..., Sentence], tuple[str, dict[str, str]]]:
        """So that it goes to another process as what it is (pickle)."""
        return _remade, (self.template, dict(self.data))


def _remade(template: str, data: Mapping[str, str]) -> Sentence:
    return Sentence(template, **data)


def template(text: str) -> str:
    """Mark a template that is not where a `Sentence` is made of it: so that it is found, and translated."""
    return text


def filled(template: str, data: Mapping[str, str]) -> str:
    """The template with this in its fields. What stands in a field is not looked at again, whatever braces it has.

    Raises:
        KeyError: there is a field for which there is nothing.
    """
    first, *rest = _parts(template)
    return first[1] + "".join(data[name] + text for name, text in rest)


def fields(template: str) -> list[str]:
    """The names of its fields, in order."""
    return [name for name, _ in _parts(template)[1:]]


def _parts(template: str) -> list[tuple[str, str]]:
    """Each field with the text that follows it; first that which stands before them all."""
    first, *rest = template.split("{")
    return [("", first), *(part.partition("}")[::2] for part in rest)]


def values(template: str, text: str) -> dict[str, str] | None:
    """What stands in the fields, as far as can be told; None where the text is none of this template's."""
    (_, first), *rest = _parts(template)
    if not text.startswith(first):
        return None
    left, found = text.removeprefix(first), dict[str, str]()
    for number, (name, after) in enumerate(rest, 1):
        last = number == len(rest)
        if not (left.endswith(after) if last else after in left):
            return None
        value, left = (left.removesuffix(after), "") if last else left.split(after, 1)
        found[name] = value
    return None if left else found
