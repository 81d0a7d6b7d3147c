"""Pictures of files, made with matplotlib: types and sizes by layer, and how large the errors are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

from azquant.errors import ArgumentError, MissingDependencyError
from azquant.evaluate.verify import TensorCheck, VerifyReport
from azquant.gguf import GGUFFile, check_output
from azquant.gguf.atomic import AtomicFile

__all__ = ["plot_file", "plot_verification"]

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_MOST_LAYERS = 512


def plot_file(file: GGUFFile, path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Draw the types and sizes of ``file``'s tensors, layer by layer, into ``path`` (.png, .svg or .pdf).

    Above, a bar per layer, split by type; below, each tensor's bits per weight. Raises
    MissingDependencyError without matplotlib, OutputError when the picture cannot be written, ArgumentError
    for another ending.
    """
    groups = _groups(list(file.tensors))
    types = sorted({tensor.type for tensor in file.tensors.values()}, key=lambda kind: kind.bits_per_weight)

    def draw(figure: Any) -> None:
        sizes, bits = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        colours = _colours([kind.name for kind in types])
        positions = range(len(groups))
        bottoms = [0.0] * len(groups)
        for kind in types:
            heights = [
                sum(file.tensors[name].nbytes for name in names if file.tensors[name].type == kind) / 1e6
                for names in groups.values()
            ]
            total = sum(heights)
            label = f"{kind.name}: {total:,.3g} MB"
            sizes.bar(positions, heights, 0.8, bottoms, color=colours[kind.name], label=label)
            bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
            points = [
                (at, kind.bits_per_weight)
                for at, names in enumerate(groups.values())
                for name in names
                if file.tensors[name].type == kind
            ]
            bits.scatter(*zip(*points, strict=True), s=14, color=colours[kind.name])
        sizes.set_ylabel("size (MB)")
        if types:
            sizes.legend(loc="upper right", fontsize="small")
        sizes.set_title(_plain(f"{file.path.name}: {file.size / 1e6:,.3g} MB, {len(file.tensors)} tensors"))
        bits.set_ylabel("bits per weight")
        bits.set_ylim(bottom=0)
        bits.set_xlabel("layer")
        _name_layers(bits, list(groups))

    _save(draw, path, overwrite, (9, 6))


def plot_verification(report: VerifyReport, path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Draw each tensor's signal-to-noise ratio and errors, layer by layer, into ``path``.

    Raises ArgumentError for a report without a comparison, and what :func:`plot_file` raises.
    """
    compared = {check.name: check for check in report.tensors if check.errors is not None}
    if not compared:
        raise ArgumentError("nothing was compared: verify against a source to have something to draw")
    groups = _groups(list(compared))
    kinds: dict[str, list[tuple[int, TensorCheck]]] = {}
    for at, names in enumerate(groups.values()):
        for name in names:
            found = _LAYER.fullmatch(name)
            kinds.setdefault(found[2] if found else name, []).append((at, compared[name]))

    def draw(figure: Any) -> None:
        ratios, errors = figure.subplots(2, 1, sharex=True)
        colours = _colours(list(kinds))
        for kind, points in kinds.items():
            noisy = [(at, c.errors) for at, c in points if c.errors and math.isfinite(c.errors.snr_db)]
            if not noisy:
                continue  # without any error there is nothing to see on a logarithmic axis
            places = [at for at, _ in noisy]
            style = {"color": colours[kind], "marker": "o", "markersize": 4, "linewidth": 0.8}
            ratios.plot(places, [e.snr_db for _, e in noisy], label=_plain(kind), **style)
            errors.plot(places, [e.rmse for _, e in noisy], **style)
            errors.plot(places, [e.max_error for _, e in noisy], **{**style, "marker": "x", "linestyle": ":"})
        exact = sum(check.errors is not None and not check.errors.rmse for check in report.tensors)
        ratios.set_ylabel("signal to noise (dB)")
        against = report.against.name if report.against else ""
        ratios.set_title(
            _plain(f"{report.path.name} against {against}: {len(compared)} tensors, {exact} without error")
        )
        if ratios.lines:
            ratios.legend(loc="center left", bbox_to_anchor=(1, 0), fontsize="small")
            errors.set_yscale("log")
        errors.set_ylabel("error: RMSE (o), largest (x)")
        errors.set_xlabel("layer")
        _name_layers(errors, list(groups))

    _save(draw, path, overwrite, (11, 6))


def _groups(names: Sequence[str]) -> dict[str, list[str]]:
    """The tensors of each layer, under its number; those of none by what they are, where they stand."""
    first: dict[str, list[str]] = {}
    layers: dict[int, list[str]] = {}
    for name in names:
        found = _LAYER.fullmatch(name)
        if found and len(found[1]) < 9:
            layers.setdefault(int(found[1]), []).append(name)
        else:
            first.setdefault("embedding" if "embd" in name else "head and others", []).append(name)
    groups: dict[str, list[str]] = {}
    if "embedding" in first:
        groups["embedding"] = first.pop("embedding")
    kept = sorted(layers)
    for number in kept[:_MOST_LAYERS]:
        groups[str(number)] = layers[number]
    rest = [name for number in kept[_MOST_LAYERS:] for name in layers[number]]
    if rest:
        groups[f"{kept[_MOST_LAYERS]}+"] = rest
    return {**groups, **first}


def _name_layers(axes: Any, names: list[str]) -> None:
    step = max(1, len(names) // 24)
    shown = [i for i, name in enumerate(names) if not name.isdigit() or int(name) % step == 0]
    axes.set_xticks(shown, [names[i] for i in shown], rotation=45, ha="right", fontsize="small")


def _colours(names: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    palette = colormaps["tab20" if len(names) > 10 else "tab10"]
    return {name: palette(i % palette.N) for i, name in enumerate(names)}


def _plain(text: str) -> str:
    """Text that matplotlib draws as it is: no mathematics between dollar signs, nothing unprintable."""
    shown = "".join(c if c.isprintable() else "�" for c in text)
    return shown.replace("$", r"\$")[:120]


def _save(
    draw: Callable[[Any], None], path: str | PathLike[str], overwrite: bool, size: tuple[int, int]
) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "pictures need matplotlib: pip install 'azquant[plot]'", name="matplotlib"
        ) from error
    target = Path(path)
    kind = target.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise ArgumentError(f"{target}: a picture's name ends in .png, .svg or .pdf")
    check_output(target, overwrite=overwrite)
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    picture = BytesIO()
    figure.savefig(picture, format=kind, dpi=150)
    with AtomicFile(target, picture.tell(), overwrite=overwrite) as output:
        output.write(picture.getbuffer())
        output.publish()
