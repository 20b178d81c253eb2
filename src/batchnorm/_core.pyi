"""Types of the native core (csrc/bindings.cpp)."""

from typing import Any

# An array with the buffer protocol, a tensor (use_exchange), or (address, dtype code, shape,
# strides in elements).
_Array = Any

def forward(
    x: _Array,
    y: _Array | None,
    channel_axis: int,
    eps: float,
    mean: _Array,
    mean_low: _Array,
    m2: _Array,
    gamma: _Array | None = ...,
    beta: _Array | None = ...,
    weights: _Array | None = ...,
    residual: _Array | None = ...,
    activation: int = ...,
    slope: float = ...,
) -> tuple[float, float]: ...
def normalize(
    x: _Array,
    y: _Array,
    channel_axis: int,
    mean: _Array,
    mean_low: _Array | None,
    var: _Array,
    eps: float,
    gamma: _Array | None = ...,
    beta: _Array | None = ...,
    weights: _Array | None = ...,
    residual: _Array | None = ...,
    activation: int = ...,
    slope: float = ...,
) -> None: ...
def backward_sums(
    grad_y: _Array,
    x: _Array,
    channel_axis: int,
    mean: _Array,
    mean_low: _Array | None,
    var: _Array,
    eps: float,
    sum_grad: _Array,
    sum_grad_x_hat: _Array,
    gamma: _Array | None = ...,
    beta: _Array | None = ...,
    weights: _Array | None = ...,
    y: _Array | None = ...,
    activation: int = ...,
    slope: float = ...,
) -> None: ...
def backward(
    grad_y: _Array,
    x: _Array,
    grad_x: _Array,
    channel_axis: int,
    count: float,
    mean: _Array,
    mean_low: _Array | None,
    var: _Array,
    eps: float,
    sum_grad: _Array,
    sum_grad_x_hat: _Array,
    gamma: _Array | None = ...,
    beta: _Array | None = ...,
    weights: _Array | None = ...,
    y: _Array | None = ...,
    grad_residual: _Array | None = ...,
    activation: int = ...,
    slope: float = ...,
) -> None: ...

backward_fused = backward

def layer_forward(
    x: _Array,
    y: _Array,
    channel_axis: int,
    eps: float,
    statistics: _Array,
    group_size: int = ...,
    gamma: _Array | None = ...,
    beta: _Array | None = ...,
    weights: _Array | None = ...,
    residual: _Array | None = ...,
    activation: int = ...,
    slope: float = ...,
) -> None: ...

layer_normalize = layer_forward

def layer_backward(
    grad_y: _Array,
    x: _Array,
    grad_x: _Array | None,
    channel_axis: int,
    eps: float,
    statistics: _Array,
    measured: bool,
    group_size: int = ...,
    gamma: _Array | None = ...,
    beta: _Array | None = ...,
    grad_gamma: _Array | None = ...,
    grad_beta: _Array | None = ...,
    weights: _Array | None = ...,
    y: _Array | None = ...,
    grad_residual: _Array | None = ...,
    activation: int = ...,
    slope: float = ...,
) -> None: ...
def merge(
    count_a: _Array,
    mean_a: _Array,
    m2_a: _Array,
    count_b: _Array,
    mean_b: _Array,
    m2_b: _Array,
    mean: _Array,
    m2: _Array,
) -> None: ...
def moments_of_entries(
    values: _Array,
    starts: _Array,
    places: _Array | None,
    rows: int,
    columns: int,
    by_row: bool,
    weights: _Array | None,
    count: _Array,
    mean: _Array,
    m2: _Array,
    missing: _Array,
    stored: _Array,
    stored_low: _Array,
) -> None: ...
def given_statistics(mean: _Array, var: _Array, statistics: _Array) -> int: ...
def update_running(
    statistics: _Array,
    mean: _Array,
    var: _Array,
    tracked: int,
    momentum: float,
    even_if_not_finite: bool,
    count_empty: bool,
) -> int: ...
def quick_forward(
    x: Any, gamma: Any, beta: Any, eps: Any, channel_axis: Any
) -> tuple[Any, Any, int] | None: ...
def quick_inference(
    x: Any, mean: Any, var: Any, gamma: Any, beta: Any, eps: Any, channel_axis: Any, keep: bool
) -> Any: ...
def quick_backward(
    grad_y: Any,
    x: Any,
    statistics: Any,
    axis: int,
    eps: float,
    gamma: Any,
    gamma_dtype: Any,
    beta_dtype: Any,
    measured: bool,
) -> tuple[Any, Any, Any] | None: ...
def use_numpy(
    type: type,
    dtypes: tuple[Any, ...],
    empty: Any,
    empty_like: Any,
    probe: Any,
    address: int,
    shape: list[int],
    strides: list[int],
) -> bool: ...
def quick_tensor_forward(
    x: Any,
    mean: Any,
    var: Any,
    weight: Any,
    bias: Any,
    training: bool,
    keep: bool,
    eps: Any,
    group_size: int,
    activation: int,
    slope: Any,
) -> Any: ...
def quick_tensor_backward(
    grad_y: Any,
    x: Any,
    statistics: Any,
    weight: Any,
    bias: Any,
    measured: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    eps: float,
    group_size: int,
    activation: int,
    slope: float,
) -> Any: ...
def use_exchange(
    type: type,
    parameter: type,
    exchange: Any,
    empty_like: Any,
    of_any: Any,
    is_neg: Any,
    small: int,
) -> None: ...
def prepare_output(address: int, bytes: int) -> None: ...
def copy(to: _Array, from_: _Array) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def has_openmp() -> bool: ...
def threads() -> int: ...
def last_level_cache() -> int: ...
def assume_last_level_cache(bytes: int) -> None: ...
