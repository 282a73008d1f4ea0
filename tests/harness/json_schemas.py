"""What docs/json/ says of the forms that `--json` prints, and whether something is of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from referencing import Registry, Resource

DOCS = Path(__file__).parents[2] / "docs"
SCHEMAS = {file.name.partition(".")[0]: json.loads(file.read_text()) for file in (DOCS / "json").iterdir()}
REGISTRY = Registry[Any]().with_resources(
    (f"{name}.schema.json", Resource.from_contents(schema)) for name, schema in SCHEMAS.items()
)


def check(schema: str, value: object) -> None:
    """It is of this form: of a verb, or one of those that are common (`common.schema.json#/$defs/gpu`)."""
    form = SCHEMAS.get(schema) or {"$ref": schema}
    if (fault := best_match(Draft202012Validator(form, registry=REGISTRY).iter_errors(value))) is not None:
        raise fault
