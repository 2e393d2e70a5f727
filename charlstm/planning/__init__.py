"""What a run costs, which settings fit a time, and what a TPU's compiler makes of it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charlstm.planning.planner import Compiled as Compiled
    from charlstm.planning.planner import Plan as Plan
    from charlstm.planning.planner import compile_for as compile_for
    from charlstm.planning.planner import estimate as estimate
    from charlstm.planning.planner import plan as plan


def __getattr__(name: str) -> Any:
    # Loaded on first use, because runs.machine imports planning.cost and planner imports it.
    if name not in ("Compiled", "Plan", "compile_for", "estimate", "plan"):
        raise AttributeError(f"module 'charlstm.planning' has no attribute {name!r}")
    from charlstm.planning import planner

    return getattr(planner, name)
