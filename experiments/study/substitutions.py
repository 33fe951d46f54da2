"""What a study may put in the place of the library's decisions, by name.

Nothing of this is in the library. A substitution exchanges functions that the library's hooks look
up by name, for as long as its block lasts and in this process alone; a model that is trained
inside is otherwise the library's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from experiments.study import alternatives, released_behaviour
from tokenmixup import TokenMixupModel, _hooks, functional, horizontal

Replacement = tuple[Any, str, Any]  # owner, name, what takes its place


def _gradient_saliency() -> list[Replacement]:
    forward, step = alternatives.gradient_saliency_of_model(TokenMixupModel.forward)
    return [(TokenMixupModel, "forward", forward), (_hooks, "horizontal_step", step)]


def _stale_choice() -> list[Replacement]:
    layer_hook, any_hook = _hooks._LayerHook, _hooks._SaliencyHook
    measured, chosen = released_behaviour.stale_choice(layer_hook._input_saliency, any_hook._choose)
    return [(layer_hook, "_input_saliency", measured), (any_hook, "_choose", chosen)]


SUBSTITUTIONS: dict[str, Callable[[], list[Replacement]]] = {
    "released mask": lambda: [
        (horizontal, "decide_mixing", released_behaviour.decide_by_first_easy)
    ],
    "released order": lambda: [
        (_hooks, "horizontal_step", released_behaviour.step_easy_first),
        (_hooks, "mix_tokens", released_behaviour.mix_easy_first),
    ],
    "released choice": _stale_choice,
    "released positions": lambda: [(_hooks, "remember", released_behaviour.remember_one_before)],
    "random partners": lambda: [(functional, "solve_assignment", alternatives.random_partners)],
    "greedy partners": lambda: [(functional, "solve_assignment", alternatives.greedy_partners)],
    "gradient saliency": _gradient_saliency,
}
"""Name -> what takes whose place, made anew for each block."""


@contextmanager
def substituted(names: Sequence[str]) -> Iterator[None]:
    """Inside, models are trained with these substitutions; afterwards all is as before."""
    replacements = [entry for name in names for entry in SUBSTITUTIONS[name]()]
    places = [(owner, name) for owner, name, _ in replacements]
    assert all(places.count(place) == 1 for place in places), "they would undo each other"
    with ExitStack() as stack:
        for owner, name, function in replacements:
            stack.enter_context(patch.object(owner, name, function))
        yield
