"""Configuration: one YACS tree, read with `load_cfg`."""

from quadmamba.configs.load import ConfigError, check_cfg, load_cfg, packaged

__all__ = ["ConfigError", "check_cfg", "load_cfg", "packaged"]
