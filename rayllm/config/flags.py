"""The words of a command line: which are flags, which belong to the flag before, and which stand for themselves."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rayllm.config.fields import ConfigField, list_fields, template_of

# What after a key that is true or false is meant as its value, right or wrong; any other word stands for itself.
_VERDICTS = ("true", "false", "yes", "no", "on", "off", "1", "0", "null")


def split_arguments(arguments: Sequence[str], switches: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Part positional arguments from flags, each flag joined to its value: ``--a.b c`` becomes ``--a.b=c``.

    `switches` are keys whose flag may stand alone; they take the next word only where it looks like true or false.
    """
    positionals, flags, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            positionals.append(argument)
            continue
        stands_alone = "=" in argument or not rest or rest[0].startswith("--")
        if not stands_alone and template_of(key_of(argument)) in switches:
            stands_alone = rest[0].lower() not in _VERDICTS
        flags.append(argument if stands_alone else f"{argument}={rest.pop(0)}")
    return positionals, flags


def list_switches(schema: type) -> set[str]:
    """The keys of a stage that are true or false and nothing else."""
    return {key for key, field in list_fields(schema).items() if is_switch(field)}


def is_switch(field: ConfigField) -> bool:
    """Whether a flag of this key, without a value, says that it is true."""
    return field.annotation is bool


def key_of(flag: str) -> str:
    """`--some.long-key=value` sets some.long_key."""
    return flag.removeprefix("--").partition("=")[0].replace("-", "_")
