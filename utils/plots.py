"""Claims as pictures: a dot a seed, a line through the means."""

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


def ticks(axis, places):
    """Plain numbers on a logarithmic axis."""
    axis.set_ticks(places, [f"{place:g}" for place in places])
    axis.set_ticks([], minor=True)
