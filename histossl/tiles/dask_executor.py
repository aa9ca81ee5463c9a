"""Slides sent to an existing Dask cluster instead of this machine's processes (extra `histossl[dask]`).

The workers must see the slides and the workspace under the same paths, and run the same histossl. A job whose worker
dies is given to another one; since a zip is whole or absent, the second try neither loses nor doubles a tile.
"""

from __future__ import annotations

import importlib
import secrets
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from histossl.core import console
from histossl.core.errors import HistosslError, UsageError
from histossl.runtime.process_pool import Event, Job, unexpected

CONNECT_S = 20


def run_on_dask(address: str, function: Job, jobs: Sequence[Any]) -> Iterator[Event]:
    """Like `workers.run_jobs`. HistosslError if no scheduler answers at `address`."""
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError as error:
        raise UsageError('--dask: Dask is not installed; pip install "histossl[dask]"') from error
    _refuse_deaf(address)
    try:
        client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise HistosslError(f"--dask {address}: no Dask scheduler answers there ({error})") from error
    if not client.scheduler_info()["workers"]:
        console.say(f"--dask {address}: 0 workers, waiting for the first")
    run = secrets.token_hex(4)
    futures: list[Any] = []
    try:
        for number, job in enumerate(jobs):
            futures.append(client.submit(_on_worker, function, job, key=f"histossl-tile-{run}-{number}", pure=False))
        numbers = {future.key: number for number, future in enumerate(futures)}
        for future in distributed.as_completed(futures, loop=client.loop):
            number = numbers[future.key]
            try:
                result, reported = future.result()
            except HistosslError as error:
                yield Event(number, "failed", str(error), error)
            except distributed.KilledWorker as error:
                yield Event(number, "failed", f"killed every worker that read it ({error.allowed_failures + 1} times)")
            except Exception as error:
                yield Event(number, "failed", unexpected(error))
            else:
                yield Event(number, "progress", reported)
                yield Event(number, "done", result)
            future.release()
    finally:
        client.cancel(futures)
        client.close()


def _refuse_deaf(address: str) -> None:
    """HistosslError if nobody listens at `address`. Dask's client finds out too, but hangs on for a minute after it."""
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if scheme not in ("", "tcp", "tls"):
        return
    try:
        if not host or not port.isdecimal():
            raise ValueError("an address is tcp://HOST:PORT; 8786 is the usual port")
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise HistosslError(f"--dask {address}: no Dask scheduler answers there ({error})") from error


def _on_worker(function: Job, job: Any) -> tuple[Any, int]:
    reports: list[int] = []
    return function(job, reports.append), sum(reports)
