"""DDP and FSDP: two processes on the CPU, over the loopback device, against one."""

import copy
import functools

import pytest
import torch
import torch.multiprocessing
from packaging.version import Version
from torch.testing import assert_close

from tests.helpers.ddp_worker import (
    ENABLED,
    PROCESSES,
    SAVED,
    SLOW_WAYS,
    WAYS,
    build,
    gradients,
    optimiser_of,
    run,
    step,
)


def spawned(folder, slow):
    torch.multiprocessing.spawn(run, (str(folder), slow), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("ddp"), slow=False)


@functools.cache
def alone(name, dtype=torch.float32):
    """Of one process, which takes the images of each as a micro-batch: by step and process."""
    model = build(name).to(dtype)
    found = []
    for number, enabled in enumerate(ENABLED):
        model.enabled = enabled
        found.append(
            [(step(model, name, rank, number, dtype), gradients(model)) for rank in range(2)]
        )
    return found


def pairs(ways):
    return [(way, name) for way, (_, names) in ways.items() for name in names]


def compare(results, way, name):
    dtype = torch.bfloat16 if way.startswith("fsdp2_low") else torch.float32
    for number, parts in enumerate(alone(name, dtype)):
        for rank, (stats, _) in enumerate(parts):
            found, whole = results[rank][way, name][number]
            assert stats.keys() == found.keys()
            for key, value in stats.items():
                assert_close(found[key], value)
            if ENABLED[number]:
                assert stats["htm/layer1/easy_share"] == (1 if rank == 0 else 0)
            assert whole.keys() == parts[0][1].keys()
            for key, gradient in whole.items():
                mean = (parts[0][1][key].float() + parts[1][1][key].float()) / 2
                assert_close(gradient, mean, rtol=1e-5, atol=1e-5)


def skip_where_torch_is_wrong(way):
    if way.startswith("fsdp2") and Version(torch.__version__) < Version("2.11"):
        pytest.skip("this torch's fully_shard does not average over gloo, any plain model included")


@pytest.mark.parametrize(("way", "name"), pairs(WAYS))
def test_gradients_are_the_average_of_the_processes(way, name, results):
    skip_where_torch_is_wrong(way)
    compare(results, way, name)


@pytest.mark.slow
def test_gradients_of_compiled_steps_and_of_more_hosts(tmp_path):
    results = spawned(tmp_path, slow=True)
    for way, name in pairs(SLOW_WAYS):
        compare(results, way, name)


@pytest.mark.parametrize("way", SAVED)
def test_whole_and_sharded_weights_are_saved_and_loaded(way, results):
    """With the optimiser's state: a resumed model goes on as the one that was saved."""
    skip_where_torch_is_wrong(way)
    model = build("vit")
    optimiser, total = optimiser_of(model, SAVED[way][1]), {}
    for number in range(2):
        for rank in range(PROCESSES):
            step(model, "vit", rank, number)
            total[rank] = gradients(model)
        for name, parameter in model.named_parameters():
            parameter.grad = (total[0][name] + total[1][name]) / 2
        optimiser.step()
        weights = copy.deepcopy(model.state_dict())
        found = results[1]["saved", way]
        for after in [found["one"][number]] + number * [found["sharded"][0], found["full"][0]]:
            assert after.keys() == weights.keys()
            for key, value in weights.items():
                assert_close(after[key], value, rtol=1e-5, atol=1e-5)
            build("vit", seed=6).load_state_dict(after)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("ddp first", "the model is a torch.nn.parallel.*: attach first, then"),
        ("fsdp1 first", "the model is a torch.*FullyShardedDataParallel already: attach first"),
        ("fsdp2 first", "the model is a torch.distributed.fsdp.FSDPModule already: attach first"),
        ("a block first", "`blocks.0` of the model is a .*FSDPModule already: attach first"),
        ("attention alone", "attention of layer 0 .*FSDPModule.*shard .* whole layers"),
        ("wrapped attention", "attention of layer 0 .*FullySharded.*shard .* whole layers"),
        ("without ScoreNets", "its ScoreNets are not.*fully_shard\\(model\\)"),
        ("other ScoreNets", "layers 0, 1, this one has .* layer 0"),
    ],
)
def test_mistakes_are_refused_in_words(mistake, message, results):
    for result in results:
        with pytest.raises(RuntimeError, match=message):
            raise RuntimeError(result["errors"][mistake])
