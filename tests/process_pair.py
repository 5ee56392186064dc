"""Two processes that can talk to each other (gloo), kept for the jobs of a test file."""

import os
import socket
import traceback

import torch
from torch import multiprocessing


PATIENCE = 60  # seconds; processes that wait for each other for ever have failed


class ProcessPair:
    """Runs a function `job(rank, **arguments)` in both at once."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, job, **arguments):
        """Each process's answer, by rank; an exception is returned as its text."""
        for pipe in self.pipes:
            pipe.send((job, arguments))
        answers = []
        for pipe in self.pipes:
            if not pipe.poll(PATIENCE):
                self.close()
                raise TimeoutError(f"{job.__name__} did not end: {arguments}")
            answers.append(pipe.recv())
        return answers

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


def _work(rank, port, pipe):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    while True:
        try:
            job, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(job(rank, **arguments))
        except BaseException:  # pytest.fail is none
            pipe.send(traceback.format_exc())
