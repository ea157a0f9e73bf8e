"""Configuration: one YACS tree, read with `load_cfg`."""

from quadmamba.configs.load import ConfigError, check_cfg, key_table, load_cfg, packaged
from quadmamba.configs.values import path_argument

__all__ = ["ConfigError", "check_cfg", "key_table", "load_cfg", "packaged", "path_argument"]
