"""What the pages under Learn show before a reader changes anything, computed by the library.

Each function returns the HTML of a widget; assets/widgets.js makes it live. Without JavaScript, and
in print, it stays as it is here.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

import numpy as np

import batchnorm
from batchnorm import digits

X = [[2.0, 8.0, -1.0], [4.0, 2.0, 0.0], [6.0, 5.0, 2.0], [8.0, 9.0, 7.0]]
GAMMA, BETA, EPS = [1.0, 2.0, 1.0], [0.0, 0.0, 3.0], 1e-5

GRAPH_X, GRAPH_GRAD = [1.0, 3.0, 4.0, 8.0], [1.0, 0.0, 0.5, -1.0]
GRAPH_GAMMA, GRAPH_BETA = 2.0, 1.0


def number(value: float) -> str:
    """Three decimals, and a sign that is a sign."""
    if abs(value) >= 1e6:
        return f"{value:.2e}".replace("e+0", "e").replace("e+", "e").replace("-", "−")
    text = f"{value:.3f}"
    return ("0.000" if float(text) == 0 else text).replace("-", "−")


def _input(name: str, value: float, label: str, **attributes: Any) -> str:
    more = "".join(f' {key}="{escape(str(text))}"' for key, text in attributes.items())
    return (
        f'<input type="number" step="any" autocomplete="off" data-in="{name}" value="{value:g}" '
        f'aria-label="{escape(label)}"{more}>'
    )


def _output(name: str, text: str) -> str:
    return f'<output data-out="{name}">{escape(text)}</output>'


# --- the layer ------------------------------------------------------------------------------------


def layer() -> str:
    """A matrix to edit: examples in rows, units in columns."""
    x = np.array(X)
    y, saved = batchnorm.batch_norm(x, GAMMA, BETA, eps=EPS)
    mean, var = saved.moments.mean, saved.moments.var()
    units = range(x.shape[1])
    head = "".join(f"<th scope=col>unit {j + 1}</th>" for j in units)
    rows = []
    for i, row in enumerate(X):
        cells = "".join(
            f"<td>{_input(f'x{i}{j}', v, f'x of example {i + 1}, unit {j + 1}')}</td>"
            for j, v in enumerate(row)
        )
        results = "".join(f"<td>{_output(f'y{i}{j}', number(y[i, j]))}</td>" for j in units)
        rows.append(f"<tr><th scope=row>example {i + 1}</th>{cells}<td></td>{results}</tr>")
    below = {
        "mean": "".join(f"<td>{_output(f'mean{j}', number(mean[j]))}</td>" for j in units),
        "variance": "".join(f"<td>{_output(f'var{j}', number(var[j]))}</td>" for j in units),
        "γ": "".join(
            f"<td>{_input(f'gamma{j}', GAMMA[j], f'γ of unit {j + 1}')}</td>" for j in units
        ),
        "β": "".join(
            f"<td>{_input(f'beta{j}', BETA[j], f'β of unit {j + 1}')}</td>" for j in units
        ),
    }
    of_y = {
        "mean": "".join(f"<td>{_output(f'ymean{j}', number(y[:, j].mean()))}</td>" for j in units),
        "variance": "".join(
            f"<td>{_output(f'yvar{j}', number(y[:, j].var()))}</td>" for j in units
        ),
    }
    empty = f"<td colspan={x.shape[1]}></td>"
    foot = "".join(
        f"<tr><th scope=row>{name}</th>{cells}<td></td>{of_y.get(name, empty)}</tr>"
        for name, cells in below.items()
    )
    return (
        '<div class="widget" data-widget="layer" role="group" aria-label="Batch norm of a matrix">'
        '<div class="scroll"><table><thead>'
        f"<tr><th></th><th colspan={x.shape[1]}>x</th><td></td><th colspan={x.shape[1]}>y</th></tr>"
        f"<tr><th></th>{head}<td></td>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody><tfoot>{foot}</tfoot></table></div>"
        f"<p>ε {_input('eps', EPS, 'ε', min=0)} "
        '<button type="button" data-reset>as it was</button></p></div>'
    )


# --- the backward pass ----------------------------------------------------------------------------

#: Node to its place (column, row), what it is called, and its line forward and backward.
NODES: dict[str, tuple[int, int, str, str, str]] = {
    "x": (0, 0, "x", "", "grad_x = grad_centered + grad_mean / n"),
    "mean": (1, 1, "mean", "mean = x.sum() / n", "grad_mean = -grad_centered.sum()"),
    "centered": (
        0, 2, "x − mean", "centered = x - mean",
        "grad_centered = grad_x_hat * inv_std + 2 * centered * grad_squared",
    ),
    "squared": (1, 3, "square", "squared = centered ** 2", "grad_squared = grad_var / n"),
    "variance": (1, 4, "variance", "var = squared.sum() / n", "grad_var = 0.5 * grad_std / std"),
    "std": (1, 5, "√(· + ε)", "std = sqrt(var + eps)", "grad_std = -grad_inv_std / std ** 2"),
    "invStd": (
        1, 6, "1 / ·", "inv_std = 1 / std", "grad_inv_std = (grad_x_hat * centered).sum()",
    ),
    "xHat": (0, 7, "×", "x_hat = centered * inv_std", "grad_x_hat = gamma * grad_scaled"),
    "scaled": (
        0, 8, "× γ", "scaled = gamma * x_hat",
        "grad_scaled = grad_y;  grad_gamma = (grad_y * x_hat).sum()",
    ),
    "y": (0, 9, "+ β", "y = scaled + beta", "grad_beta = grad_y.sum()"),
}  # fmt: skip
EDGES = [
    ("x", "mean"), ("x", "centered"), ("mean", "centered"), ("centered", "squared"),
    ("squared", "variance"), ("variance", "std"), ("std", "invStd"), ("centered", "xHat"),
    ("invStd", "xHat"), ("xHat", "scaled"), ("scaled", "y"),
]  # fmt: skip
LEFT, STEP_X, TOP, STEP_Y, CODE, WIDTH = 140, 230, 64, 92, 428, 930


def graph_values() -> dict[str, Any]:
    """What flows along each edge, forward and backward.

    The ends (y, and the gradients of x, γ and β) are the library's; a test compares the steps
    between them, as the page computes them, with these.
    """
    x, g = np.array(GRAPH_X), np.array(GRAPH_GRAD)
    n, gamma, beta = len(x), GRAPH_GAMMA, GRAPH_BETA
    mean = x.mean()
    centered = x - mean
    var = (centered**2).mean()
    std = np.sqrt(var + EPS)
    x_hat = centered / std
    grad_x_hat = gamma * g
    grad_inv = (grad_x_hat * centered).sum()
    grad_std = -grad_inv / std**2
    grad_var = 0.5 * grad_std / std
    grad_squared = np.full(n, grad_var / n)
    grad_centered = grad_x_hat / std + 2 * centered * grad_squared
    y, saved = batchnorm.batch_norm(x[:, None], [gamma], [beta], eps=EPS)
    grad_x, grad_gamma, grad_beta = batchnorm.batch_norm_backward(g[:, None], saved)
    assert grad_gamma is not None
    assert grad_beta is not None
    return {
        "x-mean": (x, np.full(n, -grad_centered.sum() / n)),
        "x-centered": (x, grad_centered),
        "mean-centered": (mean, -grad_centered.sum()),
        "centered-squared": (centered, 2 * centered * grad_squared),
        "squared-variance": (centered**2, grad_squared),
        "variance-std": (var, grad_var),
        "std-invStd": (std, grad_std),
        "centered-xHat": (centered, grad_x_hat / std),
        "invStd-xHat": (1 / std, grad_inv),
        "xHat-scaled": (x_hat, grad_x_hat),
        "scaled-y": (gamma * x_hat, g),
        "gamma-scaled": (gamma, grad_gamma[0]),
        "beta-y": (beta, grad_beta[0]),
        "y": (y[:, 0], g),
        "x": (x, grad_x[:, 0]),
    }


def several(values: Any) -> str:
    """One number or several, as an edge shows them."""
    return "  ".join(f"{v:.2f}".replace("-", "−") for v in np.atleast_1d(values))


def _at(node: str) -> tuple[int, int]:
    column, row, *_ = NODES[node]
    return LEFT + column * STEP_X, TOP + row * STEP_Y


def _edge(name: str, x0: float, y0: float, x1: float, y1: float, values: Any) -> str:
    value, grad = values[name]
    mx, my = (x0 + x1) / 2, (y0 + y1) / 2
    if x0 == x1:
        where = f'x="{mx + 9:g}" text-anchor="start"'
    else:
        where = f'x="{mx:g}" text-anchor="middle"'
    above = -6 if x0 != x1 else -3
    return (
        f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" marker-end="url(#arrow)"/>'
        f'<text class="value" {where} y="{my + above:g}" data-value="{name}">{several(value)}</text>'
        f'<text class="grad" {where} y="{my + above + 15:g}" data-grad="{name}">{several(grad)}</text>'
    )


def graph() -> str:
    """The computational graph of one unit, with numbers on every edge."""
    values = graph_values()
    parts = []
    for a, b in EDGES:
        (x0, y0), (x1, y1) = _at(a), _at(b)
        if x0 != x1:  # between the columns
            sign = 1 if x1 > x0 else -1
            parts.append(
                _edge(f"{a}-{b}", x0 + sign * 46, y0 + 12, x1 - sign * 48, y1 - 12, values)
            )
        else:
            parts.append(_edge(f"{a}-{b}", x0, y0 + 19, x1, y1 - 21, values))
    for name, node in (("gamma", "scaled"), ("beta", "y")):
        x, y = _at(node)
        parts.append(
            f'<text class="name" x="16" y="{y + 5}">{"γ" if name == "gamma" else "β"}</text>'
            + _edge(f"{name}-{node}", 30, y, x - 50, y, values)
        )
    x, y = _at("x")
    parts.append(
        f'<text class="value" x="{x}" y="{y - 42}" text-anchor="middle" data-value="x">{several(values["x"][0])}</text>'
        f'<text class="grad" x="{x}" y="{y - 27}" text-anchor="middle" data-grad="x">{several(values["x"][1])}</text>'
    )
    x, y = _at("y")
    parts.append(
        f'<text class="value" x="{x}" y="{y + 36}" text-anchor="middle" data-value="y">{several(values["y"][0])}</text>'
        f'<text class="grad" x="{x}" y="{y + 51}" text-anchor="middle" data-grad="y">{several(values["y"][1])}</text>'
    )
    for node, (_, _, name, forward, backward) in NODES.items():
        x, y = _at(node)
        parts.append(
            f'<rect class="node" x="{x - 46}" y="{y - 18}" width="92" height="36" rx="9"/>'
            f'<text class="name" x="{x}" y="{y + 5}" text-anchor="middle">{escape(name)}</text>'
            f'<text class="code value" x="{CODE}" y="{y - 3}">{escape(forward)}</text>'
            f'<text class="code grad" x="{CODE}" y="{y + 13}">{escape(backward)}</text>'
        )
    height = TOP * 2 + 9 * STEP_Y + 10
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Computational graph of batch norm '
        'with the value and the gradient on every edge"><defs><marker id="arrow" viewBox="0 0 8 8" '
        'refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker></defs>' + "".join(parts) + "</svg>"
    )
    n = len(GRAPH_X)
    head = "".join(f"<th scope=col>example {i + 1}</th>" for i in range(n))
    rows = {
        "x": [_input(f"x{i}", v, f"x of example {i + 1}") for i, v in enumerate(GRAPH_X)],
        "∂L/∂y": [
            _input(f"g{i}", v, f"gradient of y of example {i + 1}")
            for i, v in enumerate(GRAPH_GRAD)
        ],
        "∂L/∂x, ten steps": [
            _output(f"steps{i}", f"{v:.6f}") for i, v in enumerate(values["x"][1])
        ],
        "∂L/∂x, in one line": [
            _output(f"line{i}", f"{v:.6f}") for i, v in enumerate(values["x"][1])
        ],
        "∂L/∂x, by differences": [
            _output(f"differences{i}", f"{v:.6f}") for i, v in enumerate(values["x"][1])
        ],
    }
    body = "".join(
        f"<tr><th scope=row>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows.items()
    )
    return (
        '<div class="widget" data-widget="graph" role="group" aria-label="Gradient of batch norm">'
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>'
        f"</table></div><p>γ {_input('gamma', GRAPH_GAMMA, 'γ')} β {_input('beta', GRAPH_BETA, 'β')} "
        f"ε {_input('eps', EPS, 'ε', min=0)} "
        '<button type="button" data-reset>as it was</button></p>'
        '<p class="legend"><span class="value">forward</span> '
        '<span class="grad">gradient, backward</span></p>'
        f'<div class="scroll">{picture}</div></div>'
    )


# --- test time ------------------------------------------------------------------------------------

MOMENTUM, SIZE, STEPS, MOST_STEPS = 0.1, 16, 60, 200


def ink() -> list[float]:
    """The mean brightness of 1,000 MNIST digits, from 0 to 255, in random order."""
    images, _ = digits.read()
    brightness = images.astype(np.float64).mean(1)
    chosen = np.random.default_rng(0).permutation(len(brightness))[:1000]
    return [round(float(v), 2) for v in brightness[chosen]]


def running() -> str:
    """Running statistics after some steps, beside those of the population."""
    stream = ink()
    layer = batchnorm.BatchNorm(1, momentum=MOMENTUM, dtype=np.float64)
    means = [0.0]
    for step in range(STEPS):
        rows = [stream[(step * SIZE + k) % len(stream)] for k in range(SIZE)]
        layer(np.array(rows)[:, None])
        means.append(float(layer.running_mean[0]))
    moments = batchnorm.Moments.of(np.array(stream)[:, None])
    mean, std = float(moments.mean[0]), float(moments.std()[0])
    found = float(layer.running_mean[0]), float(layer.running_var[0]) ** 0.5
    sliders = "".join(
        f'<label>{label} <input type="range" autocomplete="off" data-in="{name}" min="{low}" max="{high}" '
        f'step="{step}" value="{value}">{_output(f"{name}-shown", f"{value:g}")}</label>'
        for label, name, low, high, step, value in (
            ("momentum", "momentum", 0.01, 1, 0.01, MOMENTUM),
            ("batch size", "size", 1, 64, 1, SIZE),
            ("steps", "steps", 0, MOST_STEPS, 1, STEPS),
        )
    )
    # A static chart of the same shape as the live one.
    width, height = 640, 220
    top = 1.25 * mean
    points = " ".join(
        f"{40 + (width - 60) * k / MOST_STEPS:.1f},{height - 24 - (height - 40) * m / top:.1f}"
        for k, m in enumerate(means)
    )
    level = height - 24 - (height - 40) * mean / top
    chart = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Running mean over the steps">'
        f'<line class="axis" x1="40" y1="{height - 24}" x2="{width - 20}" y2="{height - 24}"/>'
        f'<line class="axis" x1="40" y1="16" x2="40" y2="{height - 24}"/>'
        f'<text class="name" x="34" y="{height - 24}" text-anchor="end">0</text>'
        f'<text class="name" x="34" y="{level + 4:.1f}" text-anchor="end">{mean:.0f}</text>'
        f'<line class="population" x1="40" y1="{level:.1f}" x2="{width - 20}" y2="{level:.1f}"/>'
        f'<text class="name" x="{width - 24}" y="{level - 6:.1f}" text-anchor="end">population</text>'
        f'<polyline class="running" points="{points}" data-chart/>'
        f'<text class="name" x="{width / 2:g}" y="{height - 6}" text-anchor="middle">step, 0 to '
        f"{MOST_STEPS}</text>"
        '<text class="name" x="44" y="14">running mean of the ink</text></svg>'
    )
    return (
        f'<div class="widget" data-widget="running" data-stream="{escape(str(stream))}" '
        f'data-most="{MOST_STEPS}" data-top="{top}" role="group" aria-label="Running statistics">'
        f'<div class="sliders">{sliders}</div>{chart}'
        "<table><thead><tr><th></th><th scope=col>mean</th><th scope=col>standard deviation</th>"
        "<th scope=col>an image with ink 50 becomes</th></tr></thead><tbody>"
        f"<tr><th scope=row>running, in evaluation</th><td>{_output('mean', number(found[0]))}</td>"
        f"<td>{_output('std', number(found[1]))}</td>"
        f"<td>{_output('z', number((50 - found[0]) / (found[1] ** 2 + EPS) ** 0.5))}</td></tr>"
        f"<tr><th scope=row>population</th><td>{number(mean)}</td><td>{number(std)}</td>"
        f"<td>{number((50 - mean) / (std**2 + EPS) ** 0.5)}</td></tr></tbody></table></div>"
    )


#: Whose weight momentum is (the new or the old value's), default of ε and of momentum, and which
#: variance is stored.
FRAMEWORKS = {
    "PyTorch": ("new", 1e-5, 0.1, "unbiased"),
    "Keras": ("old", 1e-3, 0.99, "biased"),
    "Flax": ("old", 1e-5, 0.99, "biased"),
    "ONNX": ("old", 1e-5, 0.9, "biased"),
    "batchnorm": ("new", 1e-5, 0.1, "unbiased"),
}


def converter() -> str:
    """Momentum, ε and running variance of one framework in the others' terms."""
    options = "".join(f"<option>{name}</option>" for name in FRAMEWORKS)
    known = escape(json.dumps({name: [of, kind] for name, (of, _, _, kind) in FRAMEWORKS.items()}))
    momentum, n, variance = 0.1, 32, 4.0
    rows = []
    for name, (of, eps, default, kind) in FRAMEWORKS.items():
        converted = momentum if of == "new" else 1 - momentum
        var = variance if kind == "unbiased" else variance * (n - 1) / n
        rows.append(
            f"<tr><th scope=row>{name}</th><td>weight of the {of} value</td>"
            f"<td>{_output(f'momentum-{name}', f'{converted:.6g}')}</td>"
            f"<td>{_output(f'eps-{name}', '1e-5')}</td>"
            f"<td>{kind}: {_output(f'var-{name}', f'{var:.6g}')}</td>"
            f"<td>{default:g}, {eps:g}</td></tr>"
        )
    return (
        f'<div class="widget" data-widget="converter" data-frameworks="{known}" role="group" '
        'aria-label="Converter">'
        f'<p><label>from <select autocomplete="off" data-in="from">{options}</select></label> '
        f"<label>momentum {_input('momentum', momentum, 'momentum', min=0, max=1)}</label> "
        f"<label>ε {_input('eps', 1e-5, 'ε', min=0)}</label> "
        f"<label>running variance {_input('variance', variance, 'running variance', min=0)}</label> "
        f"<label>values per channel {_input('n', n, 'values per channel in a batch', min=2)}</label>"
        '</p><div class="scroll"><table><thead><tr><th></th><th scope=col>momentum is the</th>'
        "<th scope=col>momentum</th><th scope=col>ε</th><th scope=col>running variance</th>"
        "<th scope=col>defaults</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></div>"
    )


WIDGETS = {"layer": layer, "graph": graph, "running": running, "converter": converter}
