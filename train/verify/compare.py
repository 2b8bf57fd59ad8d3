"""Two records of the same steps: how far apart, and the likeliest reason where they differ."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phalanx.train.verify.record import read_step

GRAD_FLOOR = 1e-2
"""A gradient is measured against its own norm, or this share of the global norm where that is
larger: some gradients are zero but for rounding (a key bias's, say), and noise is no error."""
KINDS = ("loss", "grad_norm", "grad", "update", "param")
ROUNDINGS = 4
"""Roundings of a parameter in one update (decay, step, on either side), each up to its unit
roundoff: differences of updates below their sum are none."""


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The largest relative error of one kind."""

    error: float = 0.0
    step: int = -1
    name: str = ""


@dataclass(kw_only=True)
class VerifyReport:
    """What `phalanx verify` found."""

    layout: dict[str, int]
    """Degrees of the layout."""
    resumed_layout: dict[str, int]
    """Degrees of the layout that the run was resumed in."""
    tolerance: float
    """Largest relative error allowed."""
    worst: dict[str, Worst] = field(default_factory=dict)
    """By kind, for the layout."""
    resumed: dict[str, Worst] = field(default_factory=dict)
    """By kind, for the run resumed from the layout's checkpoint."""
    findings: list[str] = field(default_factory=list)
    """What is wrong, in words."""

    @property
    def passed(self) -> bool:
        """Whether every error lies within the tolerance and nothing else was found."""
        errors = [w.error for part in (self.worst, self.resumed) for w in part.values()]
        return not self.findings and bool(errors) and all(e <= self.tolerance for e in errors)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return {
            "passed": self.passed,
            "worst": {
                kind: _worse(w, self.resumed[kind].error, 0, "").error
                for kind, w in self.worst.items()
            },
            "worst_layout": {kind: vars(w) for kind, w in self.worst.items()},
            "worst_resumed": {kind: vars(w) for kind, w in self.resumed.items()},
            "tolerance": self.tolerance,
            "layout": self.layout,
            "resumed_layout": self.resumed_layout,
            "findings": self.findings,
        }

    def table(self) -> str:
        """For the terminal."""
        lines = [f"{'':22} {'':10} {'worst relative error':>20}   where"]
        for title, part in ((self.layout, self.worst), (self.resumed_layout, self.resumed)):
            label = " ".join(f"{axis}={n}" for axis, n in title.items() if n > 1) or "1 process"
            prefix = "" if part is self.worst else "resumed in "
            lines.append(f"{prefix}{label}")
            for kind, worst in part.items():
                mark = "ok" if worst.error <= self.tolerance else "DIFFERS"
                where = f"step {worst.step} {worst.name}" if worst.step >= 0 else ""
                lines.append(f"  {kind:20} {mark:10} {worst.error:20.2e}   {where}")
        lines += [f"  found: {text}" for text in self.findings]
        verdict = "equal to one process" if self.passed else "NOT equal to one process"
        lines.append(f"{verdict} (tolerance {self.tolerance:.0e})")
        return "\n".join(lines)


def compare(reference: Path, other: Path, tolerance: float) -> tuple[dict[str, Worst], list[str]]:
    """Worst errors by kind over the steps that `other` recorded, and findings about them."""
    expected = {entry["step"]: entry for entry in _steps(reference)}
    worst = {kind: Worst() for kind in KINDS}
    findings: list[str] = []
    recorded = _steps(other)
    first = recorded[0]["step"] - 1
    before, expected_before = read_step(other, first)[0], read_step(reference, first)[0]
    for entry in recorded:
        step, wanted = entry["step"], expected[entry["step"]]
        found = _about_samples(step, entry["samples"], wanted["samples"])
        for kind in ("loss", "grad_norm"):
            error = abs(entry[kind] - wanted[kind]) / (abs(wanted[kind]) or 1.0)
            worst[kind] = _worse(worst[kind], error, step, "")
        ours, differing = read_step(other, step)
        theirs, _ = read_step(reference, step)
        found += [f"step {step}: copies of {name} differ between ranks" for name in differing]
        found += _about_coverage(step, ours, theirs)
        floor = GRAD_FLOOR * wanted["grad_norm"]
        errors = _errors(ours, theirs, before, expected_before, floor)
        for name, error in sorted(errors.items()):
            kind, _, parameter = name.partition(".")
            worst[kind] = _worse(worst[kind], error, step, parameter)
        wrong = sorted(name for name, error in errors.items() if not error <= tolerance)
        if wrong and not found and not findings:
            found += _about_gradients(step, ours, theirs, wrong)
            found += _about_updates(step, ours, theirs, before, wrong)
        findings += found
        before, expected_before = ours, theirs
    return worst, findings


def _errors(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    before: dict[str, Tensor],
    expected_before: dict[str, Tensor],
    floor: float,
) -> dict[str, float]:
    """Relative errors of one step: grad.<parameter>, param.<parameter>, update.<parameter>."""
    errors = {}
    for name in theirs.keys() & ours.keys():
        kind, _, parameter = name.partition(".")
        errors[name] = _error(ours[name], theirs[name], floor if kind == "grad" else 0.0)
        if kind == "param" and name in before and ours[name].shape == theirs[name].shape:
            update = ours[name].double() - before[name].double()
            wanted = theirs[name].double() - expected_before[name].double()
            roundoff = torch.finfo(ours[name].dtype).eps / 2
            allowed = ROUNDINGS * roundoff * float(theirs[name].double().norm())
            errors[f"update.{parameter}"] = _error(update, wanted, 0.0, allowed)
    return errors


def _steps(record: Path) -> list[dict[str, Any]]:
    """The steps of a record, in order."""
    steps: list[dict[str, Any]] = json.loads((record / "steps.json").read_text())
    return steps


def _worse(worst: Worst, error: float, step: int, name: str) -> Worst:
    """The larger error of the two; NaN is the largest."""
    if error <= worst.error or math.isnan(worst.error):
        return worst
    return Worst(error=error, step=step, name=name)


def _error(ours: Tensor, theirs: Tensor, floor: float, allowed: float = 0.0) -> float:
    """(|ours - theirs| - allowed) / max(|theirs|, floor), Euclidean norms in fp64."""
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.double(), theirs.double()
    scale = max(float(theirs.norm()), floor)
    distance = float((ours - theirs).norm())
    if distance <= allowed:
        return 0.0
    return (distance - allowed) / scale if scale else float("inf")


def _about_coverage(step: int, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Tensors that only one side has, and elements that no rank holds."""
    found = []
    for what, names in (
        ("missing", theirs.keys() - ours.keys()),
        ("not in the reference", ours.keys() - theirs.keys()),
    ):
        if names:
            few = ", ".join(sorted(names)[:3])
            found.append(f"step {step}: {len(names)} tensors {what}: {few}, ...")
    for name in sorted(ours.keys() & theirs.keys()):
        lost = int(ours[name].isnan().sum())
        if lost and not theirs[name].isnan().any():
            found.append(f"step {step}: missing shard: no rank holds {lost} elements of {name}")
    return found


def _about_samples(step: int, ours: list[Any], theirs: list[Any]) -> list[str]:
    """A batch that holds other samples, or the same in another order."""
    if ours == theirs:
        return []
    places = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
    first = places[0] if places else min(len(ours), len(theirs))
    computed = [sample for sample, _ in ours]
    wanted = [sample for sample, _ in theirs]
    what = "reordered batch" if sorted(computed) == sorted(wanted) else "wrong batch"
    return [
        f"step {step}: {what}: from row {first} on, samples {computed[first : first + 4]}... "
        f"instead of {wanted[first : first + 4]}..."
    ]


def _about_gradients(
    step: int, ours: dict[str, Tensor], theirs: dict[str, Tensor], wrong: list[str]
) -> list[str]:
    """Gradients that vanished, or that all carry one wrong factor."""
    names = [name for name in wrong if name.startswith("grad.")]
    dropped = [n for n in names if not ours[n].any() and theirs[n].any()]
    if dropped:
        which = ", ".join(name.removeprefix("grad.") for name in sorted(dropped)[:5])
        return [f"step {step}: dropped gradient: zero for {which}"]
    factors = {}
    for name in names:
        a, b = ours[name].double().flatten(), theirs[name].double().flatten()
        factor = float(a @ b / (b @ b))
        off = float((a - factor * b).norm()) / (float(b.norm()) or 1.0)
        # A scale explains the difference only where the factor is what is off.
        if off <= 1e-2 * abs(factor - 1):
            factors[name] = factor
    if names and len(factors) == len(names):
        low, high = min(factors.values()), max(factors.values())
        if high - low <= 1e-2 * abs(high):
            which = "every gradient" if len(names) > 1 else names[0].removeprefix("grad.")
            return [f"step {step}: gradient scale: {which} is {high:.4g} times the reference's"]
        return [f"step {step}: gradient scale: factors from {low:.4g} to {high:.4g}"]
    return [f"step {step}: wrong gradient of {name.removeprefix('grad.')}" for name in names[:5]]


def _about_updates(
    step: int,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    before: dict[str, Tensor],
    wrong: list[str],
) -> list[str]:
    """Parameters whose gradient is right and update wrong: stale shards, or another optimizer."""
    found = []
    for parameter in (n.removeprefix("update.") for n in wrong if n.startswith("update.")):
        name = f"param.{parameter}"
        if f"grad.{parameter}" in wrong or ours[name].shape != theirs[name].shape:
            continue
        apart = (ours[name] - theirs[name]).abs().reshape(ours[name].shape[0], -1).amax(dim=1)
        rows = torch.nonzero(apart > 0.1 * apart.max()).flatten()
        if not rows.numel():
            continue
        span = f"rows {int(rows.min())} to {int(rows.max())} of {ours[name].shape[0]}"
        kept = torch.equal(ours[name][rows], before[name][rows])
        found.append(
            f"step {step}: {'stale shard' if kept else 'wrong update'}: {parameter}, {span}"
        )
    return found[:5]
