"""Claims as pictures: a dot a seed, a line through the means."""

import math
import statistics


def dots(ax, rows, key, by="arm", names=None, **where):
    """A column of dots for every arm, a dot a seed, and a bar at the mean. names: {arm: what stands below it}."""
    table = rows.by(by, key, **where)
    for i, values in enumerate(table.values()):
        ax.plot([i] * len(values), values, "o", color=f"C{i}", ms=5)
        ax.plot([i - 0.2, i + 0.2], [statistics.mean(values)] * 2, color=f"C{i}", lw=1.5)
    ax.set_xticks(range(len(table)), [str((names or {}).get(arm, arm)) for arm in table])
    ax.set(xlim=(-0.5, len(table) - 0.5))
    ax.grid(alpha=0.3)


def lines(ax, rows, x, key, by="arm", names=None, **where):
    """For every arm a line through the means over an axis `x` of the rows, and a dot a seed."""
    for i, arm in enumerate(dict.fromkeys(row[by] for row in rows.where(**where) if key in row and x in row)):
        table = rows.by(x, key, **where, **{by: arm})
        ax.plot(list(table), [statistics.mean(values) for values in table.values()], color=f"C{i}",
                label=(names or {}).get(arm, arm))
        for place, values in table.items():
            ax.plot([place] * len(values), values, "o", color=f"C{i}", ms=3)
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)


def ticks(axis, places=None):
    """Plain numbers on a logarithmic axis; by default those that `plain_places` chooses for what is seen."""
    places = plain_places(*sorted(axis.get_view_interval())) if places is None else places
    axis.set_ticks(places, [f"{place:g}" for place in places])
    axis.set_ticks([], minor=True)


def plain_places(low, high):
    """Round numbers for a logarithmic axis: 1, 2, 5, 10, ... or, where less than a factor of ten is seen, even ones."""
    if high < 10 * low:
        step = 10.0 ** math.floor(math.log10((high - low) / 5))
        step *= next(times for times in (1, 2, 5, 10) if (high - low) / (times * step) <= 8)
        return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [place for k in decades for place in (10.0 ** k, 2 * 10.0 ** k, 5 * 10.0 ** k) if low <= place <= high]
