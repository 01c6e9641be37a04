"""Several processes that train together: which there are, and starting those of this machine."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pnem.errors import PnemError, RunError

__all__ = ["TIMEOUT", "check_processes", "in_processes", "is_first", "started_by_torchrun"]

# For how long a process waits for the others.
TIMEOUT = timedelta(minutes=10)
# Seconds in which the process that failed first is heard, where another has only noticed that it is gone.
GRACE = 2.0


def started_by_torchrun() -> bool:
    """Whether torchrun started this process, and with it all others."""
    return dist.is_available() and dist.is_torchelastic_launched()


def is_first() -> bool:
    """Whether this process writes and speaks for all: the only one, or of torchrun's the one of rank 0."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def check_processes(devices: int, nodes: int) -> None:
    """Raises `RunError` unless training can begin in so many processes on so many machines."""
    if started_by_torchrun():
        there, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        if (here, there) != (devices, devices * nodes):
            raise RunError(
                f"torchrun started {there} processes, {here} of them on this machine, but devices={devices} and "
                f"nodes={nodes} were asked for: give it --nproc-per-node {devices} --nnodes {nodes}, or pnem others"
            )
    elif nodes > 1:
        raise RunError(
            f"{nodes} machines were asked for, but one cannot start processes on another: on each of them run "
            f"torchrun --nnodes {nodes} --nproc-per-node {devices} --rdzv-backend c10d --rdzv-endpoint HOST:PORT "
            f"--no-python pnem train ... --devices {devices} --nodes {nodes}"
        )
    elif devices > 1 and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RunError(
            "fit starts processes that import this script anew: call it under "
            f'if __name__ == "__main__":, as devices={devices} needs, or start the script by torchrun'
        )


def in_processes(devices: Sequence[torch.device], function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function` in one new process per device, a process group of torch.distributed; returns what rank 0's did.

    Where one process fails or this one is interrupted, all end. Rank 0's warnings become warnings here.

    Raises:
        RunError: the arguments cannot be sent to a process, or one was killed.
        BaseException: what the first of them to fail raised.
    """
    backend = "nccl" if devices[0].type == "cuda" else "gloo"
    try:
        content = pickle.dumps((backend, function, arguments))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise RunError(
            f"the model, the strategy, the objective or the data cannot be sent to other processes ({error}): define "
            "their classes and functions in a module, or start the script by torchrun"
        ) from error
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    with tempfile.TemporaryDirectory() as directory:
        # Not through the pipe that starts a process, which would wait for it to import torch.
        Path(directory, "arguments").write_bytes(content)
        try:
            connections = []
            with _ignoring_interrupts():
                for rank in range(len(devices)):
                    connection, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=_process, args=(rank, len(devices), directory, theirs))
                    process.start()
                    theirs.close()
                    processes.append(process)
                    connections.append(connection)
            return _result(processes, connections)
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started meanwhile ignore Ctrl-C, as they must: this one hears it, and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _result(processes: list[SpawnProcess], connections: list[Connection]) -> Any:
    """What rank 0's function returned, once all have; raises what the first to fail raised."""
    result, waiting, failed = None, list(connections), list[BaseException]()
    while waiting:
        # (Typed as connections or sockets.)
        ready: list[Any] = wait(waiting, GRACE if failed else None)
        if failed and not ready:
            break
        for connection in ready:
            rank = connections.index(connection)
            try:
                kind, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                kind, value = "failed", _died(rank, processes)
            if kind == "warning":
                warnings.warn(value, stacklevel=4)
                continue
            waiting.remove(connection)
            if kind == "failed":
                failed.append(value)
            elif rank == 0:
                result = value
        if any(_is_a_cause(error) for error in failed):
            break
    if failed:
        raise next(filter(_is_a_cause, failed), failed[0])
    for process in processes:
        process.join(TIMEOUT.total_seconds())
    return result


def _is_a_cause(error: BaseException) -> bool:
    """Whether it is not what torch raises where another process is gone."""
    return isinstance(error, PnemError) or not isinstance(error, RuntimeError)


def _died(rank: int, processes: list[SpawnProcess]) -> RunError:
    processes[rank].join(GRACE)
    code = processes[rank].exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
    advice = "memory may have run out" if code == -signal.SIGKILL else "what it wrote to stderr may say why"
    return RunError(f"training process {rank} of {len(processes)} {how}, and so all were ended: {advice}")


def _process(rank: int, count: int, directory: str, connection: Connection) -> None:
    """One of the processes: tells what its function returned or raised, and what rank 0 warns of."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # By this Lightning knows which one it is, and that there is nobody to start.
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        backend, function, arguments = pickle.loads(Path(directory, "arguments").read_bytes())
        store = dist.FileStore(str(Path(directory, "store")), count)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
        with warnings.catch_warnings():
            if rank == 0:
                warnings.showwarning = lambda message, *_, **__: _tell(connection, "warning", message)
            else:
                warnings.simplefilter("ignore")
            result = function(*arguments)
        _tell(connection, "returned", result if rank == 0 else None)
        dist.destroy_process_group()
    except BaseException as error:
        _tell(connection, "failed", _sendable(error))
        raise SystemExit(1) from error


def _tell(connection: Connection, kind: str, value: object) -> None:
    # Not by `send`, which would leave tensors in memory that ends with this process.
    connection.send_bytes(pickle.dumps((kind, value)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _sendable(error: BaseException) -> BaseException:
    if not isinstance(error, PnemError):
        error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except (pickle.PicklingError, TypeError, AttributeError):
        return RunError(f"{type(error).__name__}: {error}")
    return error
