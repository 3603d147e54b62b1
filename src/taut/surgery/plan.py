"""Plans what a recipe does to a model, site by site, before any weights are needed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut.architectures.locate import Anatomy, locate
from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.numbers import scaled
from taut.core.recipe import Entry, Recipe
from taut.core.registry import METHODS
from taut.core.site import Site
from taut.core.slot import SLOTS
from taut.core.table import Table, clip, data_frame
from taut.methods.base import Method
from taut.surgery.positions import check_whole_stacks


class FitsNowhere(TautError):
    """An entry of a recipe fits no site of the model. ``reasons`` says why, in words."""

    def __init__(self, entry: str, reasons: str) -> None:
        super().__init__(f"{entry} fits no site: {reasons}")
        self.reasons = reasons


SPARED = "the first layer stays dense, as in the paper; write layers: ':' to include it"
COSTS = {"bytes": "bytes", "flops_per_token": "FLOPs/token", "cache_bytes_per_token": "cache B/token"}
"""The costs that a plan shows, with the headings of their columns."""


@dataclass(frozen=True)
class Step:
    """One method at one site, with its dial already set."""

    site: Site
    method: Method

    @property
    def cost(self) -> Cost:
        return self.method.predict(self.site)

    @property
    def label(self) -> str:
        """The method and its knobs that differ from the defaults, as text for people."""
        knobs = self.method.knobs
        changed = knobs.model_dump(mode="json", exclude_defaults=True)
        # A knob with knobs of its own (a store) describes itself in words.
        shown = {key: str(getattr(knobs, key)) if isinstance(value, dict) else value for key, value in changed.items()}
        return " ".join([self.method.id, *(f"{key}={value}" for key, value in shown.items())])

    @property
    def note(self) -> str | None:
        return self.method.note(self.site)

    def __repr__(self) -> str:
        return clip(f"Step({self.site.name}: {self.label}, {_change(self.site.dense(), self.cost, 'bytes')} bytes)")

    def to_dict(self) -> dict[str, Any]:
        knobs = self.method.knobs.model_dump(mode="json", exclude_none=True)
        return {"site": self.site.name, "method": self.method.id, "knobs": knobs}


@dataclass(frozen=True)
class Plan:
    """The steps in the model's order, and everything that stays unchanged, with the reason."""

    recipe: Recipe
    family: str
    steps: tuple[Step, ...]
    untouched: tuple[tuple[str, str], ...]
    sites: tuple[Site, ...]
    """All sites of the model, with or without a step."""

    @property
    def before(self) -> Cost:
        return sum((step.site.dense() for step in self.steps), Cost())

    @property
    def after(self) -> Cost:
        return sum((step.cost for step in self.steps), Cost())

    def table(self) -> Table:
        """A row for each slot and method, and all steps together. The notes say what is not touched, and why."""
        groups: dict[tuple[str, str], list[Step]] = {}
        for step in self.steps:
            groups.setdefault((step.site.slot, step.label), []).append(step)
        keys = [key for key in COSTS if getattr(self.before, key) or getattr(self.after, key)]
        rows = []
        for (slot, label), steps in groups.items():
            before = sum((step.site.dense() for step in steps), Cost())
            after = sum((step.cost for step in steps), Cost())
            rows.append((slot, label, str(len(steps)), *(_change(before, after, key) for key in keys)))
        total = ("together", "", str(len(self.steps)), *(_change(self.before, self.after, key) for key in keys))
        notes = [f"{step.site.name}: {step.note}" for step in self.steps if step.note]
        if self.untouched:
            notes += ["not touched:", *(f"  {path}: {reason}" for path, reason in self.untouched)]
        return Table(("slot", "method", "sites", *(COSTS[key] for key in keys)), rows, total, notes=notes)

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()

    def to_pandas(self) -> Any:
        """A pandas DataFrame, one row for each step, with every cost before and after.

        Raises TautError if pandas is not installed.
        """
        rows = []
        for step in self.steps:
            costs = {"before": step.site.dense(), "after": step.cost}
            numbers = {f"{key}_{side}": value for side, cost in costs.items() for key, value in vars(cost).items()}
            row = {"slot": step.site.slot, "site": step.site.name, "path": step.site.path, "method": step.method.id}
            rows.append(row | {"label": step.label, "note": step.note} | numbers)
        names = [f"{key}_{side}" for side in ("before", "after") for key in vars(Cost())]
        return data_frame(rows, ("slot", "site", "path", "method", "label", "note", *names))

    def to_dict(self) -> dict[str, Any]:
        """Return one dict for scripts: every step with its cost before and after."""
        rows = []
        for step in self.steps:
            row = {**step.to_dict(), "label": step.label, "path": step.site.path, "note": step.note}
            rows.append({**row, "before": vars(step.site.dense()), "after": vars(step.cost)})
        return {
            "family": self.family,
            "recipe": self.recipe.to_dict(),
            "steps": rows,
            "untouched": [{"path": path, "reason": reason} for path, reason in self.untouched],
            "before": vars(self.before),
            "after": vars(self.after),
        }


def make_plan(
    model: PreTrainedModel,
    recipe: Recipe,
    length: int | None = None,
    tokenizer: Callable[[], PreTrainedTokenizerBase | None] = lambda: None,
) -> Plan:
    """Plan ``recipe`` for ``model``, which may be a skeleton on the meta device.

    ``length`` is the declared n of attention and memory costs. ``tokenizer`` is called only if a method reads the
    model's vocabulary. Raises TautError for a quantised model, an unknown method or knob, overlapping layers, and an
    entry that fits no site (with each different reason).
    """
    refuse_other_quantization(model.config)
    anatomy = locate(model, length)
    untouched = list(anatomy.untouched)
    chosen: dict[str, Step] = {}
    for slot in SLOTS:
        sites = [site for site in anatomy.sites if site.slot == slot]
        for stack in {site.stack for site in sites}:
            recipe.check_overlap(slot, anatomy.layers.get(stack, 0))
        for entry in recipe.for_slot(slot):
            steps, refused = _place(entry, sites, anatomy, recipe.source, tokenizer)
            chosen |= {step.site.name: step for step in steps}
            untouched += refused
        if recipe.for_slot(slot):
            claimed = {entry.slot for entry in recipe.for_slot(slot)}
            covered = set(chosen) | {name for name, _ in untouched}
            untouched += [
                (site.path, "no entry of the recipe selects this layer")
                for site in sites
                if site.slot in claimed and site.name not in covered and site.path not in covered
            ]
        elif sites:
            untouched.append((slot, "the recipe does not name this slot"))
    check_whole_stacks(((step.site, step.method) for step in chosen.values()), anatomy.sites, recipe.source)
    steps = tuple(chosen[site.name] for site in anatomy.sites if site.name in chosen)
    return Plan(recipe, anatomy.family, steps, tuple(untouched), anatomy.sites)


def restore_steps(model: PreTrainedModel, steps: Iterable[dict[str, Any]]) -> tuple[Step, ...]:
    """Restore the steps of a stored plan on a new skeleton of the same model, with any head.

    Raises TautError when the skeleton lacks a site of the plan.
    """
    anatomy = locate(model)
    by_name = {site.name: site for site in anatomy.sites}
    restored = []
    for step in steps:
        site = by_name.get(step["site"])
        if site is None:
            raise TautError(f"the checkpoint compresses {step['site']!r}, which {type(model).__name__} does not have")
        restored.append(Step(site, METHODS.get(step["method"]).parse(step["knobs"], where=f"plan of {step['site']}")))
    return tuple(restored)


def refuse_other_quantization(config: Any) -> None:
    """Check that the model is not quantised already. Raises TautError if it is."""
    quantization = config.to_dict().get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        advice = (
            "undo it or start from the original"
            if method == "taut"
            else "taut cannot be combined with it: start from the unquantized model"
        )
        raise TautError(f"the model already carries a quantization ({method}); {advice}")


def _place(
    entry: Entry,
    sites: list[Site],
    anatomy: Anatomy,
    source: str,
    tokenizer: Callable[[], PreTrainedTokenizerBase | None],
) -> tuple[list[Step], list[tuple[str, str]]]:
    where = f"{source}: {entry.slot}"
    method_class = METHODS.get(entry.method_id)
    if entry.store is not None and "store" not in method_class.Knobs.model_fields:
        raise TautError(f"{where}: {entry.method_id} does not nest a store")
    nested = {"store": entry.store.to_dict()} if entry.store is not None else {}
    general = method_class.parse(entry.knobs | nested, entry.keep, where).with_tokenizer(tokenizer)
    steps: list[Step] = []
    refused: list[tuple[str, str]] = []
    spared: list[tuple[str, str]] = []
    for site in sites:
        count = anatomy.layers.get(site.stack, 0)
        if not entry.covers(site.layer, count):
            continue
        if _spared(general, entry, site, count):
            spared.append((site.path, f"{entry.method_id}: {SPARED}"))
            continue
        method, reason = _solved(general, site, entry.keep)
        if reason is None:
            steps.append(Step(site, method))
        else:
            refused.append((site.path or site.name, f"{entry.method_id}: {reason}"))
    if not steps:
        reasons = "; ".join(sorted({reason for _, reason in refused})) or (
            f"no such slot in this model ({anatomy.family})" if not sites else f"layers {entry.layers!r} selects none"
        )
        raise FitsNowhere(f"{where}: {entry.method_id}", reasons)
    return steps, spared + refused


def _spared(method: Method, entry: Entry, site: Site, count: int) -> bool:
    """Whether the method leaves out this site: the first of several feed-forward layers, and no ``layers`` given."""
    first = site.slot == "feedforward" and site.layer == 0 and count > 1
    return first and method.spares_first_layer and entry.layers is None


def _solved(general: Method, site: Site, keep: float | None) -> tuple[Method, str | None]:
    """Return the method with its dial set for this site, and the reason why it does not fit or None."""
    if keep is None:
        return general, general.fits(site)
    try:
        method = general.solve(site, keep)
    except TautError as error:
        return general, str(error)
    return method, method.fits(site)


def _change(before: Cost, after: Cost, key: str) -> str:
    """A cost before and after: ``46.9 M → 6.6 M (14%)``."""
    old, new = getattr(before, key), getattr(after, key)
    if not old and not new:
        return "-"
    share = f" ({new / old:.0%})" if old else ""
    return f"{scaled(old)} → {scaled(new)}{share}"
