"""Several processes on this machine, by torchrun's own machinery."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from opensora.core.errors import MachineError

__all__ = ["is_launched", "launch"]


def is_launched() -> bool:
    """Whether torchrun or the like has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], *, nproc: int, port: int | None) -> int:
    """Run ``opensora-run`` with these arguments in ``nproc`` processes.

    Args:
        port: On which they meet; None takes a free one.

    Returns:
        The exit code of the first process that failed, or 0.

    Raises:
        MachineError: The port is in use.
    """
    if port is not None:
        check_port(port)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    meeting = ["--standalone"] if port is None else ["--master-addr=127.0.0.1", f"--master-port={port}"]
    options = [f"--nproc-per-node={nproc}", "--local-addr=127.0.0.1", *meeting]
    try:
        run.main([*options, "-m", "--", "opensora.core.run", *arguments])  # from -- on it looks for no flags of its own
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def check_port(port: int) -> None:
    """Raise if another program listens on the port.

    Raises:
        MachineError: One does, or it isn't ours to take.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise MachineError(
                f"Port {port} can't be used: {error.strerror}. Choose another, or leave --port out to get a free one."
            ) from error
