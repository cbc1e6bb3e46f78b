"""What identifies a run: nothing that ran before may be taken for something else.

`Recipe.settings` leaves out what is the default, so that options can be added. `identity.json` has
every default there is. Where this test fails:

- an option was added: write it down, by running this file as a script;
- a default was changed, or an option has another meaning: raise `ltnorm.recipe.IDENTITY` besides.
"""

import json
from pathlib import Path

from ltnorm import recipe, registry
from ltnorm.validation import validate

FILE = Path(__file__).with_name("identity.json")


def defaults() -> dict[str, object]:
    """Every option by its path, with its default."""
    found = {"identity": recipe.IDENTITY}
    whole = recipe.Recipe(retrain=recipe.Retrain(method="crt")).model_dump(mode="json")
    for path, value in _flat(whole, ""):
        found[path] = value
    for kind, table in registry.TABLES.items():
        for name in table:
            options = registry.options_model(kind, name)().model_dump(mode="json")
            for path, value in _flat(options, f"{kind}:{name}."):
                found[path] = value
    return found


def _flat(part: dict, prefix: str):
    for key, value in part.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_no_default_has_changed_without_another_identity():
    written, now = json.loads(FILE.read_text()), defaults()
    if written["identity"] == now["identity"]:
        changed = {k: (v, now[k]) for k, v in written.items() if k in now and now[k] != v}
        assert not changed, "raise ltnorm.recipe.IDENTITY, then run this file"
    missing = set(now) - set(written)
    assert not missing, "new options: run this file as a script to write them down"


def test_identities_of_what_ran_before():
    def fingerprint(**sections):
        return validate(sections).fingerprint()

    assert recipe.IDENTITY == 1
    assert fingerprint().startswith("b18e600c6ac7")
    drw = {"name": "ldam", "schedule": "drw"}
    assert fingerprint(norm={"name": "compound"}, loss=drw).startswith("e427eaaa71ec")
    assert fingerprint(retrain={"method": "crt"}).startswith("13f17a03f105")


def test_another_identity_is_another_experiment(monkeypatch):
    before = validate({}).fingerprint()
    monkeypatch.setattr(recipe, "IDENTITY", 2)
    assert validate({}).fingerprint() != before


if __name__ == "__main__":
    FILE.write_text(json.dumps(defaults(), indent=1) + "\n")
