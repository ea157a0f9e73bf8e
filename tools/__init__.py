"""Command-line programs: `python -m quadmamba.tools.NAME`, `python tools/NAME.py` in a checkout."""
