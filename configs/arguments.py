"""Command lines: flags that are given once, and paths in them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from quadmamba.configs.values import ConfigError, user_path


class Parser(argparse.ArgumentParser):
    """A parser to which a flag with two different values is an error, and so is half of a name."""

    def __init__(self, about: str | None, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=about, formatter_class=layout, allow_abbrev=False, **options)
        self.register("action", None, _Once)
        self.given: dict[str, object] = {}


class _Once(argparse.Action):
    """Keep a value, as argparse does where no action is named."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, Parser)
        before = parser.given.setdefault(self.dest, values)
        if before != values:
            parser.error(f"{option_string}: expected one value, got {before} and {values}")
        setattr(namespace, self.dest, values)


def path_argument(text: str) -> Path:
    """The `type` of an argument that is a path, as `user_path` fills it in."""
    try:
        return Path(user_path(text, "path"))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
