"""One choice for each layer within a budget, exactly, where the losses of the layers add up.

Suppose that changing several layers costs about the sum of what each costs when it alone is changed. Then the best
choice within a budget is a knapsack with one item of each class, which dynamic programming solves. Whether the losses
do add up is for the caller to check, by scoring the choice and comparing it with the prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lcsc.core.errors import ConfigError


def additive_choice(
    loss: Callable[[tuple[int, ...]], float], num_layers: int, choices: Sequence[int], budget: int
) -> tuple[tuple[int, ...], float]:
    """The best choice within a budget after 1 + num_layers * (len(choices) - 1) scores.

    Args:
        loss: of a model with one cost for each layer; called with at most one layer off the largest cost.
        num_layers: layers.
        choices: costs of a layer, whole numbers above 0; the largest means that it is not changed.
        budget: what the costs may sum to.

    Returns:
        The cost of each layer, and the loss that the sum predicts for them.

    Raises:
        ConfigError: as `cheapest_loss`.
    """
    full = max(choices)
    base = loss((full,) * num_layers)
    losses = []
    for layer in range(num_layers):
        alone = {n: (full,) * layer + (n,) + (full,) * (num_layers - layer - 1) for n in choices if n != full}
        losses.append({full: 0.0} | {n: loss(counts) - base for n, counts in alone.items()})
    found = cheapest_loss(losses, budget)
    return found, base + sum(table[n] for table, n in zip(losses, found, strict=True))


def cheapest_loss(losses: Sequence[Mapping[int, float]], budget: int) -> tuple[int, ...]:
    """The choice of one cost a layer with the smallest sum of losses and a sum of costs of at most `budget`.

    Among choices of equal loss it is one of least cost.

    Args:
        losses: for each layer loss by cost; costs are whole numbers above 0 (key/value heads, or bytes).
        budget: what the costs may sum to.

    Returns:
        The cost of each layer.

    Raises:
        ConfigError: no layers, a cost below 1 or a loss that is no finite number, or a budget below the cheapest sum.
    """
    return additive_front(losses, budget)[-1][2]


def additive_front(losses: Sequence[Mapping[int, float]], budget: int) -> list[tuple[int, float, tuple[int, ...]]]:
    """All choices within a budget that none beats in both sums: cost, loss and choice, from the cheapest on.

    Args:
        losses, budget: as in `cheapest_loss`.

    Raises:
        ConfigError: as `cheapest_loss`.
    """
    if not losses or not all(losses):
        raise ConfigError("`losses` is empty or has an empty layer; give each layer at least one cost and its loss.")
    for layer, table in enumerate(losses):
        for cost, loss in table.items():
            if cost < 1 or not abs(loss) < float("inf"):
                raise ConfigError(
                    f"layer {layer} has the loss {loss} at cost {cost}; give finite losses at costs >= 1."
                )
    least = sum(min(table) for table in losses)
    if budget < least:
        raise ConfigError(f"`budget` is {budget}, and the cheapest choice costs {least}. Raise it to that at least.")
    # (spent, loss, choice) of every sum that no cheaper one beats, after each layer
    front: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for done, table in enumerate(losses, 1):
        rest = sum(min(later) for later in losses[done:])
        rows = [
            (spent + cost, sum_ + loss, (*kept, cost)) for spent, sum_, kept in front for cost, loss in table.items()
        ]
        front = []
        for row in sorted(row for row in rows if row[0] + rest <= budget):
            if not front or row[1] < front[-1][1]:
                front.append(row)
    return front
