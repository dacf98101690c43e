"""From a TOML plan to the list of jobs: which models are trained, with which seed, in which order."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from recipes.reproduce_small.clips import RENDERERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Kind = Literal["tokenizer", "transformer", "maskvit", "decoding_cost", "attention_cost"]
KINDS: tuple[Kind, ...] = (
    "tokenizer",
    "transformer",
    "maskvit",
    "decoding_cost",
    "attention_cost",
)
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Job:
    """One thing to do; its result is one JSON file.

    model: its name in the plan. recipe: the table of the library's recipe (kinds that train), without
    the paths that the runner fills in. start, tokenizer, needs: names of jobs that come first: the one
    whose tokenizer this one starts from, the one whose tokens it learns, all of them. evaluate: what
    is measured afterwards (or, for a cost, what is timed).
    """

    name: str
    model: str
    kind: Kind
    seed: int
    recipe: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    tokenizer: str | None = None
    needs: tuple[str, ...] = ()
    evaluate: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """What a paper says about two variants: `better` beats `worse` in `metric`.

    lower: smaller values are better. otherwise: the likely reason if it does not come out so here.
    """

    metric: str
    better: str
    worse: str
    lower: bool
    says: str
    otherwise: str


@dataclass(frozen=True)
class Comparison:
    """Variants (name -> model) side by side. metrics: name in the results -> heading."""

    name: str
    title: str
    variants: dict[str, str]
    metrics: dict[str, str]
    claims: tuple[Claim, ...]
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """A whole plan: models by name, comparisons, seeds, held-out clips.

    scenes: what is rendered where the user gives no videos, a [data] source of the recipes.
    """

    name: str
    seeds: int
    scenes: str
    held_out: int
    models: dict[str, dict[str, Any]]
    comparisons: dict[str, Comparison]

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan file; with `base` it says only what differs from that file.

        Raises ValueError that names the file and the key.
        """
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        if "base" in table:
            base = (path.parent / table.pop("base")).read_text(encoding="utf-8")
            table = merged(tomllib.loads(base), table)
        defaults = table.get("defaults", {})
        models = {}
        for name, own in table["models"].items():
            kind = own.get("kind")
            if kind not in KINDS:
                raise ValueError(
                    f"{path}: models.{name}.kind: expected one of {KINDS}, got {kind!r}"
                )
            models[name] = merged(defaults.get(kind, {}), own)
        comparisons = {}
        for name, own in table["comparisons"].items():
            claims = tuple(Claim(**claim) for claim in own.pop("claims", []))
            comparisons[name] = Comparison(name=name, claims=claims, **own)
        plan = cls(
            path.stem, table["seeds"], table["scenes"], table["held_out"], models, comparisons
        )
        plan._check(path)
        return plan

    def _check(self, path: Path) -> None:
        if self.scenes not in RENDERERS:
            raise ValueError(
                f"{path}: scenes: expected one of {sorted(RENDERERS)}, got {self.scenes!r}"
            )
        for name, model in self.models.items():
            for key in ("start", "tokenizer"):
                if key in model and model[key] not in self.models:
                    raise ValueError(f"{path}: models.{name}.{key}: no model {model[key]!r}")
        for name, comparison in self.comparisons.items():
            for variant, model in comparison.variants.items():
                if model not in self.models:
                    raise ValueError(f"{path}: comparisons.{name}.{variant}: no model {model!r}")
            for claim in comparison.claims:
                if not {claim.better, claim.worse} <= set(comparison.variants):
                    raise ValueError(f"{path}: comparisons.{name}: a claim about {claim}")

    def jobs(self, only: Iterable[str] = (), seeds: int | None = None) -> list[Job]:
        """All jobs in an order that respects their needs: the first seed of every comparison, then the
        second, and so on, so that a run cut short still has every comparison.

        Raises ValueError for a comparison that the plan does not have.
        """
        chosen = list(only) or list(self.comparisons)
        unknown = [name for name in chosen if name not in self.comparisons]
        if unknown:
            known = ", ".join(self.comparisons)
            raise ValueError(f"only: expected some of {known}, got {', '.join(unknown)}")
        found: dict[str, Job] = {}
        for seed in range(self.seeds if seeds is None else seeds):
            for name in chosen:
                for model in self.comparisons[name].variants.values():
                    self._add(model, seed, found)
        return list(found.values())

    def _add(self, model: str, seed: int, found: dict[str, Job]) -> str | None:
        """Add the job of a model and a seed, after what it needs; its name, None if it has no such
        seed."""
        table = self.models[model]
        if table.get("seeds") is not None and seed >= table["seeds"]:
            if table["seeds"] != 1:
                return None
            seed = 0  # one for all
        name = f"{model}-{seed}"
        if name in found:
            return name
        before = {key: self._add(table[key], seed, found) for key in ("start", "tokenizer")
                  if key in table}  # fmt: skip
        others = [self._add(other, seed, found) for other in table.get("needs", [])]
        recipe = copy.deepcopy(table.get("recipe", {}))
        recipe.setdefault("run", {})["seed"] = seed
        found[name] = Job(
            name=name,
            model=model,
            kind=table["kind"],
            seed=seed,
            recipe=recipe,
            start=before.get("start"),
            tokenizer=before.get("tokenizer"),
            needs=tuple(n for n in (*before.values(), *others) if n),
            evaluate=copy.deepcopy(table.get("evaluate", {})),
        )
        return name


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables joined key by key; where both have a value, that of `over`."""
    result: dict[str, Any] = copy.deepcopy(dict(base))
    for key, value in over.items():
        own = result.get(key)
        both = isinstance(value, Mapping) and isinstance(own, Mapping)
        result[key] = merged(own, value) if both else copy.deepcopy(value)
    return result


def plan_file(budget: str) -> Path:
    """small -> small.toml beside this file. Raises ValueError for a budget that there is none of."""
    path = HERE / f"{budget}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in HERE.glob("*.toml")))
        raise ValueError(f"budget: expected one of {known}, got {budget!r}")
    return path
