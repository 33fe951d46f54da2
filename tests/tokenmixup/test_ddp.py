"""DistributedDataParallel: two processes on the CPU, over the loopback device."""

import pytest
import torch
import torch.multiprocessing

from tests.helpers.ddp_worker import HOSTS, PROCESSES, STEPS, build, gradients, run, step


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(run, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", HOSTS)
def test_gradients_are_the_average_of_the_processes(name, results):
    model = build(name)
    for number in range(STEPS):
        alone = []
        for rank in range(PROCESSES):
            stats = step(model, name, rank, number)
            alone.append(gradients(model))
            assert stats["htm/layer1/easy_share"] == (1 if rank == 0 else 0)
            found, _ = results[rank][name, number]
            for key, value in stats.items():
                torch.testing.assert_close(found[key], value)
        for rank in range(PROCESSES):
            _, found = results[rank][name, number]
            assert found.keys() == alone[0].keys()
            for key, gradient in found.items():
                torch.testing.assert_close(gradient, (alone[0][key] + alone[1][key]) / 2)
