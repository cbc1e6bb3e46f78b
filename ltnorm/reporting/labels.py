"""What the rows of a comparison differ in, what its blocks share, and how both are called.

`by` are the keys of the recipe in which the rows of a block may differ: a section (`norm`), or a
dotted key (`dataset.ratio`). Everything else is shared by a block.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ltnorm.errors import UsageError, did_you_mean
from ltnorm.recipe import BUDGETS, TRAINING_METHODS, Recipe, Retrain
from ltnorm.reporting.schema import Result

By = tuple[str, ...]
# Fingerprint, hash of the images, scheme of the groups, and the device of a budget of time.
RowKey = tuple[str, str, str, str]
_MISSING = object()
# What `--by` and `--pivot` take besides the keys of the recipe.
SHORT = {"ratio": "dataset.ratio"}
# The sections that are called by the name of their entry.
NAMED = ("norm", "loss", "model", "sampler")


def key_of(name: str) -> str:
    """The key of the recipe that `--by` or `--pivot` means.

    Raises:
        UsageError: the recipe has no such section or key, or runs that differ in it are one row.
    """
    key = SHORT.get(name, name)
    key = key.removesuffix(".name") if key in [f"{part}.name" for part in NAMED] else key
    sections = {k.partition(".")[0] for k in defaults()}
    known = list(dict.fromkeys([*SHORT, *sorted(sections), *defaults()]))
    # Runs that differ in these are of one row, or were not measured on the same images.
    apart = ("seed", "device", "workers", "eval", "eval.every", "eval.split")
    # Options of a named entry are known to the entry alone.
    if (key not in known and key.partition(".")[0] not in NAMED) or key in apart:
        raise UsageError(
            f"rows cannot be told apart by '{name}'",
            did_you_mean(name, [k for k in known if "." not in k and k not in apart])
            + ", or a dotted key: train.lr",
        )
    return key


def check_known(key: str, results: Sequence[Result]) -> None:
    """Raises UsageError where neither the recipe nor any run has a key."""
    found = {k for result in results for k in settings(result)}
    sections = {k.partition(".")[0] for k in defaults()}
    if key not in sections and key not in defaults() and key not in found:
        raise UsageError(f"no run sets {key}", did_you_mean(key, sorted(found)))


def natural(text: str) -> list[Any]:
    """A key that sorts numbers in a text by their value."""
    return [
        (0, float(p), "") if i % 2 else (1, 0.0, p)
        for i, p in enumerate(re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text))
    ]


@functools.cache
def defaults() -> dict[str, Any]:
    """The defaults of the recipe by dotted keys; those of an entry's own options are not here."""
    whole = Recipe(retrain=Retrain(method="crt")).model_dump(mode="json")
    return flatten(whole) | {"retrain.method": None}


def flatten(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """Nested settings by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat


def settings(result: Result) -> Mapping[str, Any]:
    """What of a run's recipe is not the default, by dotted keys."""
    return _settings(result.settings)


@functools.lru_cache(maxsize=4096)  # the runs of a setting share it
def _settings(text: str) -> Mapping[str, Any]:
    return MappingProxyType(flatten(json.loads(text)))


def value(result: Result, key: str) -> Any:
    """What a run's recipe has at a key; None where only the entry itself knows the default."""
    return settings(result).get(key, defaults().get(key))


def within(key: str, by: By) -> bool:
    """Whether a dotted key belongs to one of `by`."""
    return any(key == part or key.startswith(f"{part}.") for part in by)


def shared(result: Result, by: By) -> str:
    """What a run shares with its block: all settings outside `by`, and the images themselves."""
    kept: dict[str, Any] = {k: v for k, v in settings(result).items() if not within(k, by)}
    if device := _budget_device(result):
        kept["device"] = device
    if not _other_images(by):
        kept["index_sha256"] = result.index_sha256
        kept["group_scheme"] = result.group_scheme
    return json.dumps(kept, sort_keys=True)


def _other_images(by: By) -> bool:
    return any(part.startswith("dataset") for part in by)


def _budget_device(result: Result) -> str:
    """The device where the budget is one of time: a second is as much as it does in it."""
    return result.device if "train.seconds" in settings(result) else ""


def row_key(result: Result) -> RowKey:
    """What the runs of one row share: only their seeds are averaged."""
    device = _budget_device(result)
    return result.fingerprint, result.index_sha256, result.group_scheme, device


def labels(results: Sequence[Result], by: By) -> dict[RowKey, str]:
    """A label for each row of a block: what it has of `by`, without what is the default.

    Where defaults have changed between versions two settings can look alike; then the start of
    the fingerprint, or of the hash of the images, tells them apart.
    """
    rows = {row_key(result): result for result in results}
    called = {key: " · ".join(_parts(result, by)) for key, result in rows.items()}
    for part in range(len(RowKey.__args__)):
        twice = {label for label, count in Counter(called.values()).items() if count > 1}
        for key, label in called.items():
            if label in twice:
                called[key] = f"{label} [{key[part][:6]}]"
    return called


def _parts(result: Result, by: By) -> list[str]:
    own = settings(result)
    parts = []
    for part in by:
        if part in ("norm", "loss"):
            name, options = getattr(result, part), getattr(result, f"{part}_options")
            parts.append(f"{name} ({options})" if options else name)
        elif part in NAMED:
            parts.append(" ".join([own[f"{part}.name"], *_below(own, part)]))
        elif part == "dataset":
            parts.append(result.set_id)
        elif part == "retrain":
            parts.append(" ".join([result.retrain or "no retrain", *_below(own, part)]))
        elif part in defaults() or "." in part:
            parts.append(_told(part, own.get(part, defaults().get(part, "default"))))
        else:
            parts.append(" ".join(_below(own, part)) or f"default {part}")
    return parts


def _below(own: Mapping[str, Any], part: str) -> list[str]:
    """What of a section is not the default, but its name, each as `key value`."""
    named = (f"{part}.name", f"{part}.method")
    found = {
        key: value
        for key, value in own.items()
        if within(key, (part,)) and key not in named and value != defaults().get(key, _MISSING)
    }
    return [_told(key.removeprefix(f"{part}."), value) for key, value in found.items()]


def called(result: Result, key: str) -> str:
    """What a run has at a key of `--by` or `--pivot`, in a few words."""
    return _parts(result, (key,))[0]


def of_keys(keys: Mapping[str, Any], by: By) -> list[str]:
    """What settings by dotted keys have of `by`, one part each, without what is the default."""
    parts = []
    for part in by:
        own = {k: v for k, v in keys.items() if within(k, (part,)) and v is not None}
        name = own.pop(f"{part}.name", None)
        changed = {k: v for k, v in own.items() if v != defaults().get(k)}
        if name:
            told = ", ".join(f"{k.partition('.')[2]}={plain(v)}" for k, v in changed.items())
            parts.append(f"{name} ({told})" if told else name)
        else:
            parts += [" ".join(map(_told, changed, changed.values()))] if changed else []
    return parts


def _told(key: str, value: Any) -> str:
    *_, last = key.removesuffix(".name").split(".")
    return f"no {last}" if value is None else f"{last} {plain(value)[:40]}"


def plain(value: Any) -> str:
    """A value of the recipe as one would type it."""
    if isinstance(value, float):
        return f"{value:.12g}"
    return value if isinstance(value, str) else json.dumps(value)


def bare_name(result: Result, by: By) -> str:
    """What a row is called without its options: the norm, say, of several rows of that norm."""
    first = by[0]
    key = f"{first}.name" if first in NAMED else first
    return plain(value(result, key))


def titles(first: Sequence[Result], by: By) -> list[str]:
    """What the rows of each block share, from a run of each block.

    Where that reads alike, the settings that tell the blocks apart.
    """
    groups: dict[str, list[Result]] = {}
    for result in first:
        groups.setdefault(_name(result, settings(result), by), []).append(result)
    found = {}
    for name, alike in groups.items():
        keys = _differing([settings(result) for result in alike])
        keys = [key for key in keys if not within(key, by) and key != "norm.name"]
        for result in alike:
            found[id(result)] = " · ".join([name, *_apart(result, keys)])
    twice = {title for title, count in Counter(found.values()).items() if count > 1}
    for result in first:
        if (title := found[id(result)]) in twice:
            found[id(result)] = f"{title} · images {result.index_sha256[:6]} {result.group_scheme}"
    return [found[id(result)] for result in first]


def _apart(result: Result, keys: Iterable[str]) -> Iterator[str]:
    """What a run has of keys that tell blocks apart."""
    for key in keys:
        told = plain(settings(result).get(key, defaults().get(key, "default")))
        yield f"{key} {told[:8] if key == 'model.pretrained' else told}"


def _differing(several: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """The keys whose values are not the same in all."""
    return [
        key
        for key in dict.fromkeys(key for one in several for key in one)
        if len({json.dumps(one.get(key)) for one in several}) > 1
    ]


def _name(run: Result, own: Mapping[str, Any], by: By) -> str:
    parts = [] if "dataset" in by else [_images(run, by)]
    parts += [run.model] if "model" not in by else []
    for section in ("norm", "loss"):
        options = getattr(run, f"{section}_options")
        name = getattr(run, section)
        parts += [f"{name} ({options})" if options else name] if section not in by else []
    parts += [f"sampler {run.sampler}"] if run.sampler != "instance" and "sampler" not in by else []
    if "train" not in by and not any(within(f"train.{unit}", by) for unit in BUDGETS):
        parts.append(budget(own) + (f" on {run.device}" if "train.seconds" in own else ""))
    if run.retrain and not within("retrain.method", by):
        trains = run.retrain in TRAINING_METHODS
        mode = own.get("retrain.norm", defaults()["retrain.norm"])
        parts += [f"then {run.retrain}" + (f", norms {mode}" if trains else "")]
    return " · ".join(parts + ([f"tag {run.tag}"] if run.tag and "tag" not in by else []))


def _images(run: Result, by: By) -> str:
    """The prepared set, or of several sets what they share."""
    if not _other_images(by):
        return run.set_id
    ratio = "" if within("dataset.ratio", by) or run.ratio is None else f"{run.ratio:.12g}"
    return f"{run.dataset}-{run.profile}{ratio}"


def budget(own: Mapping[str, Any]) -> str:
    """The budget of the first stage in words: `200 epochs`, `500 steps`, `60 seconds`."""
    [unit, *_] = [unit for unit in BUDGETS if own.get(f"train.{unit}") is not None]
    amount = own[f"train.{unit}"]
    return f"{amount:g} {unit if amount != 1 else unit.removesuffix('s')}"
