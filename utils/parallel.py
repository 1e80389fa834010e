"""Several small trainings at once: on a CPU, processes of one thread each get more done than one of many threads."""

import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from .device import choose
from .errors import UserError


def cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Processes of one thread each, started when there is work for them and kept for the next: starting costs seconds.

    number: 0: one for every core, or a single one if there is a GPU; 1: no further process.
    """

    def __init__(self, number=0):
        self.number = number or (cores() if choose() == "cpu" else 1)
        self._pool, self._size = None, 0

    def run(self, function, jobs):
        """Yield function(*job) for every job, in the order of the jobs.

        `function` must be defined at the top level of a file. What it prints is shown with a single worker only.
        """
        jobs = list(jobs)
        size = min(self.number, len(jobs))
        if size <= 1:
            yield from (function(*job) for job in jobs)
            return
        if size > self._size:
            self.close()
            context = multiprocessing.get_context("spawn")                 # a forked torch may hang
            self._pool, self._size = ProcessPoolExecutor(size, context, _quiet), size
        try:
            for result in [self._pool.submit(function, *job) for job in jobs]:
                yield result.result()
        except BrokenProcessPool:
            self.close()
            raise UserError("a worker process was ended from outside, perhaps for want of memory: what is finished is "
                            "kept; start the same command again with workers=1. (A script of your own that calls this "
                            'needs `if __name__ == "__main__":` around the call.)') from None
        except BaseException:                          # also a reader who wants no more: the rest is not waited for
            self.close()
            raise

    def close(self):
        """End the processes, whatever they are doing."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):   # Python 3.14 has terminate_workers for it
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._size = None, 0


def parallel(function, jobs, workers=0):
    """Yield function(*job) for every job, in their order, by `Workers` that are ended afterwards."""
    workers = Workers(workers)
    try:
        yield from workers.run(function, jobs)
    finally:
        workers.close()


def _quiet():
    """In a worker: one thread, no output, and Ctrl-C is left to the process that started it."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
