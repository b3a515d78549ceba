"""`tsumugu plan`: what is asked, plans for every cluster, and how they are shown."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from tsumugu import interoperability
from tsumugu.config import TrainingRun
from tsumugu.errors import UserError
from tsumugu.plan import cost, instances, planning, time
from tsumugu.plan.planning import GIB, Plan


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says beside the recipe (see `tsumugu plan --help`)."""

    instance_types: list[str] = field(default_factory=list)
    instance_counts: list[int] = field(default_factory=lambda: [1])
    tokens: int | None = None
    vocab_size: int | None = None
    calibration: Path | None = None
    prices_per_hour: list[str] = field(default_factory=list)
    prices: Path | None = None
    spot: bool = False
    aws_region: str | None = None
    yen_per_dollar: float | None = None


def plans(run: TrainingRun, asked: Asked) -> list[Plan]:
    """A plan for every instance type with every count; of this machine where no type is named.

    Raises:
        UserError: Something in the recipe or on the command line cannot be used.
    """
    model_config = planning.find_model_config(run, asked.vocab_size)
    steps = planning.count_steps(run, asked.tokens)
    kind = interoperability.tokenizer_kind(Path(run.data.entries[0].path) / "tokenizer")
    clusters = [instances.cluster(name, count) for name in asked.instance_types for count in asked.instance_counts] or [
        instances.this_machine()
    ]
    stated = cost.stated(asked.prices_per_hour, asked.instance_types or ["this machine"])
    prices = cost.read_prices(asked.prices)
    result = []
    for cluster in clusters:
        found = _plan(run, model_config, steps, cluster, asked, kind)
        price = _price(cluster, asked, stated, prices)
        if price is not None and found.days is not None:
            found = dataclasses.replace(found, cost=cost.cost(price, cluster.hosts, found.days))
        result.append(found)
    if len({found.cost.price.currency for found in result if found.cost}) > 1:
        raise UserError("some prices are in USD, others in JPY", "give --yen-per-dollar RATE")
    return result


def _plan(
    run: TrainingRun,
    model_config: PretrainedConfig,
    steps: int,
    cluster: instances.Cluster,
    asked: Asked,
    kind: str | None,
) -> Plan:
    calibration = time.shipped(cluster.gpu, asked.calibration)
    if calibration is not None and cluster.gpu.name == "CPU":
        from tsumugu.plan.probe import with_nominal_rates

        cluster = dataclasses.replace(cluster, gpu=with_nominal_rates(cluster.gpu))
    return planning.plan(run, model_config, steps, cluster, calibration, kind)


def _price(
    cluster: instances.Cluster, asked: Asked, stated: dict[str, float], prices: dict[str, dict]
) -> cost.Price | None:
    name = cluster.name.removeprefix("ml.")
    if name in stated:
        price = cost.Price(stated[name], "USD", f"{datetime.now(UTC):%Y-%m-%d}", "--price-per-hour")
    elif asked.aws_region and not asked.spot:
        price = cost.of_aws(cluster.name, asked.aws_region)
    else:
        price = cost.price_of(cluster.name, prices, asked.spot)
    if price is not None and price.currency == "USD" and asked.yen_per_dollar:
        price = price.in_yen(asked.yen_per_dollar)
    return price


def show(found: Sequence[Plan], console: Console, yen_per_dollar: float | None) -> None:
    """Memory, time and cost for people; several plans side by side."""
    first = found[0]
    run = first.setup.run
    console.print(
        f"{run.train.global_batch_size} rows of {run.data.sequence_length} tokens a step, micro batches of "
        f"{run.train.micro_batch_size}, {first.steps:,} steps, {first.steps * first.tokens_per_step / 1e9:.3g} "
        "billion tokens"
    )
    if len(found) == 1:
        _show_table(first, console, yen_per_dollar)
    else:
        _show_side_by_side(found, console)
    for plan in found:
        _show_notes(plan, console, named=len(found) > 1)
    console.print("what serves an export of this model (docs/interoperability.md):")
    for line in first.servers:
        console.print(f"  {line}")


def marks(found: Sequence[Plan]) -> list[str]:
    """For every plan `fastest`, `cheapest`, both or nothing, among those that fit, where there are several."""
    result = [""] * len(found)
    fitting = [index for index, plan in enumerate(found) if plan.fits and plan.days is not None]
    if len(found) < 2:
        return result
    with_cost = [index for index in fitting if found[index].cost]
    best = {
        "fastest": min(fitting, key=lambda index: found[index].days or 0.0, default=None),
        "cheapest": min(with_cost, key=lambda index: _amount(found[index]), default=None),
    }
    for mark, index in best.items():
        if index is not None:
            result[index] = f"{result[index]}, {mark}".removeprefix(", ")
    return result


def _amount(plan: Plan) -> float:
    assert plan.cost
    return plan.cost.amount


def _show_side_by_side(found: Sequence[Plan], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("instances", no_wrap=True)
    for title in ("devices", "needs GiB", "has GiB", "fits", "micro batch", "tokens/s", "MFU", "days", "cost", ""):
        table.add_column(title, justify="left" if not title else "right")
    for plan, mark in zip(found, marks(found), strict=True):
        table.add_row(
            f"{plan.cluster.name.removeprefix('ml.')} × {plan.cluster.hosts}",
            str(plan.cluster.devices),
            f"{plan.total / GIB:.1f}",
            "?" if plan.device_memory is None else f"{plan.device_memory / GIB:.1f}",
            "yes" if plan.fits else "no",
            f"≤ {plan.largest_micro_batch}" if plan.largest_micro_batch else "none",
            _number(plan.tokens_per_second, ",.0f"),
            _number(plan.mfu, ".1%"),
            _number(plan.days, ".3g"),
            _money(plan.cost and plan.cost.amount, plan),
            mark,
        )
    console.print(table)


def _show_table(plan: Plan, console: Console, yen_per_dollar: float | None) -> None:
    table = Table(box=None, pad_edge=False, show_header=True)
    table.add_column("")
    hosts = f" × {plan.cluster.hosts}" if plan.cluster.name != "this machine" else ""
    table.add_column(plan.cluster.name + hosts, justify="right")
    table.add_row("devices", f"{plan.cluster.devices} × {plan.cluster.gpu.name}")
    table.add_row("mesh", " × ".join(f"{axis} {degree}" for axis, degree in plan.setup.degrees.items()))
    for part, size in plan.parts.items():
        if size:
            table.add_row(f"{part}, GiB", f"{size / GIB:.2f}")
    table.add_row("a device needs, GiB", f"{plan.total / GIB:.2f}")
    table.add_row("a device has, GiB", "?" if plan.device_memory is None else f"{plan.device_memory / GIB:.2f}")
    table.add_row("fits", "yes" if plan.fits else "no")
    kept = " / ".join("–" if size is None else f"{size / GIB:.2f}" for size in plan.kept.values())
    table.add_row(f"layers keep, recomputing {' / '.join(plan.kept)}, GiB", kept)
    table.add_row("largest micro batch", str(plan.largest_micro_batch or "none"))
    table.add_row("smallest shard degree", str(plan.smallest_shard_degree or "–"))
    table.add_row("step, s", _number(plan.step and plan.step.total, ".3g"))
    if plan.step:
        spent = (plan.step.forward, plan.step.backward, plan.step.rest)
        table.add_row("  of it forward / backward / optimizer", " / ".join(f"{seconds:.3g}" for seconds in spent))
    table.add_row("  of it waiting for the network", _number(plan.step and plan.step.communication, ".3g"))
    table.add_row("tokens/s", _number(plan.tokens_per_second, ",.0f"))
    table.add_row("MFU", _number(plan.mfu, ".1%"))
    table.add_row("days", _number(plan.days, ".3g"))
    table.add_row("a checkpoint, GiB", f"{plan.checkpoint_bytes / GIB:.3g}")
    table.add_row("checkpoint.every, steps", _number(plan.checkpoint_every, ",d"))
    table.add_row("price of an hour", _money(plan.cost and plan.cost.price.per_hour, plan))
    table.add_row("cost", _money(plan.cost and plan.cost.amount, plan))
    if yen_per_dollar:
        table.add_row("cost, USD", _number(plan.cost and plan.cost.amount / yen_per_dollar, ",.0f"))
    console.print(table)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _money(value: float | None, plan: Plan) -> str:
    if value is None or plan.cost is None:
        return "not known"
    return f"{value:,.2f} USD" if plan.cost.price.currency == "USD" else f"{value:,.0f} JPY"


def _show_notes(plan: Plan, console: Console, named: bool) -> None:
    prefix = f"{plan.cluster.name} × {plan.cluster.hosts}: " if named else ""
    rows, batch = plan.setup.run.train.micro_batch_size, plan.setup.run.train.global_batch_size
    computed = plan.setup.micro_batches(rows) * rows * plan.setup.processes
    if computed > batch:
        console.print(
            f"{prefix}of every {computed} rows that its devices compute {computed - batch} are empty: "
            f"train.global_batch_size {batch} is no multiple of {plan.setup.processes} micro batches of {rows}"
        )
    if plan.calibration is None or plan.step is None:
        console.print(f"{prefix}how fast it is is not known: {_why_no_time(plan)}")
    else:
        console.print(f"{prefix}speed by {plan.calibration.source}")
    if plan.cost is not None:
        console.print(f"{prefix}price of {plan.cost.price.date} ({plan.cost.price.source})")
    elif plan.cluster.name != "this machine":
        console.print(f"{prefix}its price is not known: give --price-per-hour, --prices or --aws-prices")
    if plan.unmeasured:
        console.print(f"{prefix}not measured: {', '.join(plan.unmeasured)}")
    if plan.changes:
        console.print(f"{prefix}what would help, and what a device would need then:")
        for change in plan.changes:
            fits = "fits" if change.fits else "does not fit"
            console.print(f"  {change.setting:<48} {change.total / GIB:8.2f} GiB, {fits}; {change.cost}")


def _why_no_time(plan: Plan) -> str:
    if plan.calibration is None:
        return "measure it with --probe FILE, then give --calibration FILE"
    if time.waits_for_host(plan.setup):
        return "what goes to the host and back is not counted (parallel.offload_…)"
    return f"the peaks of {plan.cluster.gpu.name} in {str(plan.setup.dtype).removeprefix('torch.')} are not known"


def draw(found: Sequence[Plan], file: Path) -> None:
    """Cost against time, a point for every plan that has both.

    Raises:
        UserError: matplotlib is missing, or nothing has a cost.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("--chart needs matplotlib", "pip install 'tsumugu[plots]'") from None
    points = [(plan, plan.days, plan.cost) for plan in found if plan.days is not None and plan.cost]
    if not points:
        raise UserError("--chart: no plan has both a time and a cost", "give --price-per-hour for the instance types")
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for plan, days, of_plan in points:
        assert of_plan
        assert days is not None
        axes.plot(
            days, of_plan.amount, "o", color="C0" if plan.fits else "C3", fillstyle="full" if plan.fits else "none"
        )
        label = f"{plan.cluster.name.removeprefix('ml.')} × {plan.cluster.hosts}" + (
            "" if plan.fits else " (does not fit)"
        )
        axes.annotate(label, (days, of_plan.amount), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("days")
    axes.set_ylabel(points[0][2].price.currency)  # type: ignore[union-attr]
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    try:
        figure.savefig(file)
    except (ValueError, FileNotFoundError) as error:  # a suffix that names no format, or a folder that is not there
        raise UserError(
            f"--chart {file}: {error}", "name a .png, .svg or .pdf file in a folder that is there"
        ) from None
    finally:
        pyplot.close(figure)
