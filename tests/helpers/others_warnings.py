"""Warnings of other libraries that a test cannot avoid. All others are errors."""

import pytest

forks = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
"""Python from 3.12 on, of a fork beside torch's threads: a data loader's processes are forked."""

uses_inductor = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
"""Inductor imports a part of torch that uses torch.jit, which torch itself deprecates."""

breaks_the_graph = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
"""Dynamo looks at the gradients of tensors that it hands on from one graph to the next."""

advice_of_lightning = pytest.mark.filterwarnings(
    "ignore::lightning_fabric.utilities.warnings.PossibleUserWarning",
    "ignore:Precision bf16-mixed is not supported by the model summary:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
)
"""On the number of workers and of steps, on sizes, on a resumed run; and what torch deprecates."""
