"""Settings records out of environment variables: `<PREFIX><FIELD>`, and `<PREFIX><GROUP>__<FIELD>` for a record within the record.

Floor 0; is given the environment and reads none itself. Strict: 1.5 is no count, "yes" no boolean, and an unknown name is an error, because
a setting that is silently not taken is worse than one that is refused.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from inspect import formatannotation
from typing import Any

from pydantic import TypeAdapter, ValidationError

from loopserve.errors import ConfigError


def read_environment(
    record: type, environ: Mapping[str, str], *, prefix: str, excluded_prefix: str | None = None
) -> dict[str, Any]:
    """Keyword arguments for `record`, its groups already built. Values are JSON, or plain text where the setting is text.

    Variables under `excluded_prefix` belong to somebody else. Raises ConfigError for an unknown or malformed setting.
    """
    settings: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, text in environ.items():
        if name.startswith(prefix) and not (excluded_prefix and name.startswith(excluded_prefix)):
            group, _, setting = name.removeprefix(prefix).lower().rpartition("__")
            place = groups.setdefault(group, {}) if group else settings
            place[setting] = read_setting(_group_type(record, group, name), setting, text, name)
    # Built at once: a setting may be right only together with another one.
    return settings | {group: _group_type(record, group, group)(**values) for group, values in groups.items()}


def read_setting(record: type, setting: str, text: str, name: str) -> Any:
    """The value of one setting of `record`, as the variable `name` gives it. Raises ConfigError."""
    known: dict[str, Any] = {f.name: f.type for f in fields(record)}
    if setting not in known:
        raise ConfigError(f"{name}: there is no setting {setting!r}; known: {', '.join(sorted(known))}")
    if is_dataclass(known[setting]):
        raise ConfigError(f"{name}: {setting!r} is a group; name one of its settings after a double underscore")
    adapter = TypeAdapter[Any](known[setting])
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        try:
            return adapter.validate_python(text, strict=True)
        except ValidationError:
            reason = error.errors()[0]["msg"]
            raise ConfigError(
                f"{name}: {text!r} does not fit, {formatannotation(known[setting])} is needed: {reason}"
            ) from None


def record_from(record: Any, values: Mapping[str, Any], *, name: str) -> Any:
    """One group given as a mapping, as YAML brings it. Raises ConfigError for an unknown or malformed setting."""
    known = {f.name for f in fields(record)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ConfigError(f"{name}: there is no setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
    try:
        return TypeAdapter[Any](record).validate_python(dict(values), strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *map(str, first["loc"])])
        raise ConfigError(f"{where}: {first['input']!r} does not fit: {first['msg']}") from None


def _group_type(record: type, group: str, name: str) -> Any:
    """The record whose settings `name` addresses: the record itself, or one of its groups."""
    if not group:
        return record
    groups = {f.name: f.type for f in fields(record) if is_dataclass(f.type)}
    if group not in groups:
        raise ConfigError(f"{name}: there is no group {group!r}; known: {', '.join(sorted(groups))}")
    return groups[group]
