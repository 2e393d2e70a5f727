"""What a run costs, and which settings fit a time."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charlstm.planning.planner import Plan as Plan
    from charlstm.planning.planner import estimate as estimate
    from charlstm.planning.planner import plan as plan


def __getattr__(name: str) -> Any:
    # Loaded on first use, because runs.machine imports planning.cost and planner imports it.
    if name not in ("Plan", "estimate", "plan"):
        raise AttributeError(f"module 'charlstm.planning' has no attribute {name!r}")
    from charlstm.planning import planner

    return getattr(planner, name)
