"""``python -m pisupervisor``: the same as the command ``pisupervisor``."""

from __future__ import annotations

from pisupervisor.cli import main

raise SystemExit(main())
