"""Configuration: one YACS tree, read with `load_cfg`; the command lines of programs."""

from quadmamba.configs.arguments import Parser, path_argument
from quadmamba.configs.load import ConfigError, check_cfg, key_table, load_cfg, packaged

__all__ = [
    "ConfigError",
    "Parser",
    "check_cfg",
    "key_table",
    "load_cfg",
    "packaged",
    "path_argument",
]
