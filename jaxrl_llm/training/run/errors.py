"""Why a run that has begun cannot go on, where that is no bug."""

from __future__ import annotations


class RunError(Exception):
    """The run ends here; its message says why and what helps. The steps before are saved."""

    status = 2
    """With which the program ends: 2 where settings, data or the user's functions are to blame, 1 for the rest."""
