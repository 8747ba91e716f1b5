"""Errors that the command line prints in one line without a traceback, exit codes, and signals that end a run."""

import signal


class UserError(ValueError):
    """Invalid input, or a missing requirement. The message says what is wrong and what to change.

    The command line prints it in one line and exits with code 2 (``USER_ERROR_EXIT_CODE``).
    """


class PeerLostError(RuntimeError):
    """Another rank died, stalled, left early or can no longer be reached. The message names it.

    The command line prints it in one line and exits with code 13 (``PEER_LOST_EXIT_CODE``).
    """


class UnhealthyError(RuntimeError):
    """Training cannot usefully continue: replicas differ, or gradients stay non-finite.

    All ranks raise it together. The command line prints it in one line and exits with code 14
    (``UNHEALTHY_EXIT_CODE``). Restarting the run unchanged would fail again.
    """


USER_ERROR_EXIT_CODE = 2
PEER_LOST_EXIT_CODE = 13
UNHEALTHY_EXIT_CODE = 14
INTERRUPTED_EXIT_CODE = 75
"""A signal ended the run, and its state is saved: restart it with resume=auto (EX_TEMPFAIL in sysexits.h)."""
INTERRUPTING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
