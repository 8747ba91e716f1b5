"""The failures a user is told about in one line, without a traceback; exit codes; the signals that end a run."""

import signal


class UserError(ValueError):
    """Bad input or a machine that lacks something: the message says what is wrong and what to change.

    The command line prints it in one line and exits with code 2.
    """


class PeerLostError(RuntimeError):
    """Another rank died or can no longer be reached: the message names it.

    The command line prints it in one line and exits with code 13 (``PEER_LOST_EXIT_CODE``).
    """


class UnhealthyError(RuntimeError):
    """The run's own numbers say that there is no use in going on: replicas that differ, gradients that stay NaN.

    All ranks raise it together. The command line prints it in one line and exits with code 14
    (``UNHEALTHY_EXIT_CODE``): to start again by itself would come to the same.
    """


USER_ERROR_EXIT_CODE = 2
PEER_LOST_EXIT_CODE = 13
UNHEALTHY_EXIT_CODE = 14
INTERRUPTED_EXIT_CODE = 75
"""A signal ended the run, and its state is saved: start it again with resume=auto (EX_TEMPFAIL of sysexits.h)."""
INTERRUPTING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
