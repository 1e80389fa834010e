"""Several small trainings at once: on a CPU, processes of one thread each get more done than one of many threads."""

import multiprocessing
import os
import signal
import sys

import torch


def cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel(function, jobs, workers=0):
    """Yield function(*job) for every job, in the order of the jobs.

    workers: processes of one thread each; 0: one for every core, or a single one if there is a GPU; 1: no further
    process. `function` must be defined at the top level of a file. What it prints is shown with workers=1 only.
    """
    jobs = list(jobs)
    workers = workers or (1 if torch.cuda.is_available() else cores())
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from (function(*job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")     # a forked torch may hang
    with context.Pool(workers, _quiet) as pool:
        for result in [pool.apply_async(function, job) for job in jobs]:
            yield result.get()
        pool.close()
        pool.join()


def _quiet():
    """In a worker: one thread, no output, and Ctrl-C is left to the process that started it."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
