"""What each process of the tests of DDP and FSDP does; a module of its own to be spawned."""

import copy
import gc
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.host_builders import IMAGE
from tests.helpers.host_cases import BY_NAME
from tokenmixup import HorizontalConfig, TokenMixupModel, VerticalConfig, attach

PROCESSES, CLASSES = 2, 7
ENABLED = (True, False, True)
"""Whether TokenMixup is switched on, by step."""
HTM = HorizontalConfig(layers=(1,), tau=0.1, rho=0.005)
VTM = VerticalConfig(layers=(2,), kappa=3)
FULL = StateDictOptions(full_state_dict=True)


def build(name: str, seed: int = 5, layers: tuple[int, ...] = (1,)) -> TokenMixupModel:
    """ScoreNet is sure of class 0: its samples are easy, all others are hard."""
    torch.manual_seed(seed)
    htm = HorizontalConfig(layers=layers, tau=HTM.tau, rho=HTM.rho)
    model = BY_NAME[name].attach(BY_NAME[name].build(), horizontal=htm, vertical=VTM).train()
    for scorenet in model.scorenets.values():
        nn.init.constant_(scorenet.head.bias, 0)
        nn.init.constant_(scorenet.head.bias[:1], 6)
    return model


def images_of(name: str, rank: int, number: int) -> Tensor:
    side = 8 if name == "cct" else IMAGE
    generator = torch.Generator().manual_seed(10 * rank + number)
    return torch.randn(4, 3, side, side, generator=generator)


def step(
    model: nn.Module, name: str, rank: int, number: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A step on the images of a process, which all show a class of its own."""
    model.zero_grad()
    out = model(images_of(name, rank, number).to(dtype), torch.full((4,), rank))
    (out.logits.square().mean() + out.scorenet_loss).backward()
    return {key: value.detach().clone() for key, value in out.stats.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole ones, by the names that the parameters have in the attached model."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
        found[name.replace("_fsdp_wrapped_module.", "")] = gradient
    return found


def fsdp2(model: TokenMixupModel, **settings: Any) -> nn.Module:
    for layer in model.adapter.layers(model.backbone):
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def fsdp2_low(model: TokenMixupModel) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fsdp2(model, mp_policy=policy)


def fsdp2_checkpointed(model: TokenMixupModel) -> nn.Module:
    """Layers run again in the backward pass."""
    model.set_grad_checkpointing()
    return fsdp2(model)


def fsdp2_compiled_in_part(model: TokenMixupModel) -> nn.Module:
    """With bfloat16 and checkpointing; what is compiled has no hooks of TokenMixup."""
    for block in model.backbone.blocks:
        block.mlp.compile(backend="aot_eager")
    model.set_grad_checkpointing()
    return fsdp2_low(model)


def fsdp2_compiled(model: TokenMixupModel) -> nn.Module:
    fsdp2(model).compile(backend="aot_eager")
    return model


def fsdp1(
    model: TokenMixupModel, part: type[nn.Module] | None = None, original: bool = True
) -> nn.Module:
    """Parts wrapped one by one, by default the layers, and the whole."""
    policy = ModuleWrapPolicy({part or type(model.adapter.layers(model.backbone)[0])})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
    )


WAYS: dict[str, tuple[Callable[[TokenMixupModel], nn.Module], tuple[str, ...]]] = {
    # find_unused_parameters stays False
    "ddp": (DistributedDataParallel, ("vit", "rope_mixed", "beit", "swin", "torchvision", "cct")),
    "fsdp2": (fsdp2, ("vit", "encoder", "cct")),
    "fsdp2_low": (fsdp2_low, ("vit",)),
    "fsdp2_checkpointed": (fsdp2_checkpointed, ("vit",)),
    "fsdp1": (fsdp1, ("vit", "encoder")),
}
SLOW_WAYS: dict[str, tuple[Callable[[TokenMixupModel], nn.Module], tuple[str, ...]]] = {
    "fsdp2": (fsdp2, ("rope_mixed", "beit", "torchvision", "hf_vit")),
    "fsdp2_low": (fsdp2_low, ("encoder", "cct")),
    "fsdp2_checkpointed": (fsdp2_checkpointed, ("rope_mixed", "beit", "cct")),
    "fsdp2_compiled": (fsdp2_compiled, ("vit", "cct")),
    "fsdp2_low_compiled_in_part": (fsdp2_compiled_in_part, ("vit", "cct")),
    "fsdp1": (fsdp1, ("rope_mixed", "beit", "torchvision", "hf_vit", "cct")),
}


def steps(way: Callable[[TokenMixupModel], nn.Module], name: str, rank: int) -> list[Any]:
    """Statistics and gradients of each step, with a pass in evaluation between steps."""
    model = build(name)
    parallel = way(model)
    found = []
    for number, enabled in enumerate(ENABLED):
        model.enabled = enabled
        stats = step(parallel, name, rank, number)
        with FullyShardedDataParallel.summon_full_params(parallel, with_grads=True):
            found.append((stats, gradients(model)))
        parallel.zero_grad()  # after a pass in evaluation fully_shard shows its other parameters
        parallel.eval()
        with torch.no_grad():
            parallel(images_of(name, rank, number))
        parallel.train()
    return found


SAVED: dict[str, tuple[Callable[[TokenMixupModel], nn.Module], float]] = {
    "ddp": (DistributedDataParallel, 0.9),
    "fsdp2": (fsdp2, 0.9),
    "fsdp1": (partial(fsdp1, original=False), 0.0),
}
"""With momentum. Without it there is no state: torch does not load that of a new FSDP1 model."""


def optimiser_of(model: nn.Module, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


def saved_and_loaded(way: str, rank: int, folder: str) -> dict[str, list[Any]]:
    """Whole weights after one step and after two: by one model, and resumed by two others."""
    found: dict[str, list[Any]] = {"one": [], "sharded": [], "full": []}
    wrap, momentum = SAVED[way]

    def new(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = wrap(build("vit", seed))
        return model, optimiser_of(model, momentum)

    def train(key: str, model: nn.Module, optimiser: torch.optim.Optimizer, number: int) -> None:
        step(model, "vit", rank, number)
        optimiser.step()
        found[key].append(state_of(model, optimiser, FULL)["model"])

    def state_of(model: nn.Module, optimiser: Any, options: Any = None) -> dict[str, Any]:
        state = {"model": get_model_state_dict(model, options=options)}
        if momentum:
            state["optimiser"] = get_optimizer_state_dict(model, optimiser, options=options)
        return copy.deepcopy(state)

    def load(state: dict[str, Any], model: nn.Module, optimiser: Any, options: Any = None) -> None:
        set_model_state_dict(model, state.get("model", {}), options=options)
        if momentum:
            set_optimizer_state_dict(model, optimiser, state.get("optimiser", {}), options=options)

    one = new(5)
    train("one", *one, 0)
    whole = state_of(*one, FULL)
    checkpoint.save(state_of(*one), checkpoint_id=folder)
    train("one", *one, 1)

    again = new(6)
    sharded = state_of(*again)
    checkpoint.load(sharded, checkpoint_id=folder)
    load(sharded, *again)
    train("sharded", *again, 1)

    again = new(6)
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    if way == "fsdp1":  # torch broadcasts nothing to it
        load(whole, *again, FULL)
    else:
        load(whole if rank == 0 else {}, *again, from_first)
    train("full", *again, 1)
    return found


def errors() -> dict[str, str]:
    """What is said of each mistake."""

    def attached_to(model: nn.Module) -> Any:
        return lambda: attach(model, horizontal=HTM, vertical=VTM)

    def host() -> Any:
        return BY_NAME["vit"].build()

    def blocks() -> nn.Module:
        model = host()
        fully_shard(model.blocks[0])
        return model

    def attention_alone() -> None:
        model = build("vit")
        for block in model.backbone.blocks:
            fully_shard(block.attn)
        step(fully_shard(model), "vit", 0, 0)

    def wrapped_attention() -> None:
        model = build("vit")
        step(fsdp1(model, type(model.backbone.blocks[0].attn)), "vit", 0, 0)

    def without_scorenets() -> None:
        model = build("vit")
        fully_shard(model.backbone)
        step(model, "vit", 0, 0)

    def other_scorenets() -> None:
        weights = build("vit").state_dict()
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(fsdp2(build("vit", layers=(0,))), weights, options=options)

    mistakes = {
        "ddp first": attached_to(DistributedDataParallel(host())),
        "fsdp1 first": attached_to(FullyShardedDataParallel(host(), device_id="cpu")),
        "fsdp2 first": attached_to(fully_shard(host())),
        "a block first": attached_to(blocks()),
        "attention alone": attention_alone,
        "wrapped attention": wrapped_attention,
        "without ScoreNets": without_scorenets,
        "other ScoreNets": other_scorenets,
    }
    found = {}
    for name, mistake in mistakes.items():
        try:
            mistake()
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
    return found


def run(rank: int, folder: str, slow: bool) -> None:
    warnings.simplefilter("error")
    # as `breaks_the_graph` of others_warnings
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    found: dict[Any, Any] = {
        (way, name): steps(wrap, name, rank)
        for way, (wrap, names) in (SLOW_WAYS if slow else WAYS).items()
        for name in names
    }
    if not slow:
        # torch deprecates what FullyShardedDataParallel saves and loads with
        warnings.filterwarnings("ignore", module=r"torch\.")
        for way in SAVED:
            found["saved", way] = saved_and_loaded(way, rank, f"{folder}/{way}")
        found["errors"] = errors()
    torch.save(found, Path(folder) / f"{rank}.pt")
    gc.collect()  # a DistributedDataParallel that lives on may hang the exit: docs/log.md
    torch.distributed.destroy_process_group()
