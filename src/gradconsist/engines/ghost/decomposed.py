"""Decomposes torch functions that hide matrix products from a function mode."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def body(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copies a torch function without its dispatch to modes, so that a mode sees the calls inside it.

    The function begins with ``if has_torch_function(...)``; in the copy that test is always False.
    """
    blind = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, blind, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _lstm_step(x: Tensor, state: tuple[Tensor, ...], hidden: Callable[[Tensor], Tensor], project: Any) -> Any:
    h, c = state
    i, f, g, o = (x + hidden(h)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return project(torch.sigmoid(o) * torch.tanh(c)), c


def _gru_step(x: Tensor, state: tuple[Tensor, ...], hidden: Callable[[Tensor], Tensor], project: Any) -> Any:
    (h,) = state
    del project
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = hidden(h).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (n + z * (h - n),)


def _rnn_step(activation: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def step(x: Tensor, state: tuple[Tensor, ...], hidden: Callable[[Tensor], Tensor], project: Any) -> Any:
        del project
        return (activation(x + hidden(state[0])),)

    return step


def _recurrent(original: Callable[..., Any], step: Callable[..., Any], states: int) -> Callable[..., Any]:
    """Writes `torch.lstm` and the like as linear layers and pointwise functions; `original` runs packed sequences."""

    def run(
        input: Tensor, hx: Any, parameters: Any, has_biases: Any, num_layers: Any, dropout: Any, train: Any,
        bidirectional: Any, batch_first: Any = None,
    ) -> Any:  # fmt: skip
        packed = not isinstance(parameters, Sequence) or isinstance(hx, Tensor) == (states == 2)  # another overload
        if batch_first is None or packed:
            return original(input, hx, parameters, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        initial = hx if states == 2 else (hx,)
        x = input.transpose(0, 1) if batch_first else input
        directions = 2 if bidirectional else 1
        each = len(parameters) // (num_layers * directions)
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                position = layer * directions + direction
                weights = list(parameters[position * each : (position + 1) * each])
                state = tuple(part[position] for part in initial)
                output, state = _direction(step, x, state, weights, has_biases, reverse=direction == 1)
                outputs.append(output)
                finals.append(state)
            x = torch.cat(outputs, -1)
            if dropout and train and layer < num_layers - 1:
                x = F.dropout(x, dropout)
        output = x.transpose(0, 1) if batch_first else x
        return (output, *(torch.stack(parts) for parts in zip(*finals, strict=True)))

    return run


def _direction(
    step: Callable[..., Any], x: Tensor, state: tuple[Tensor, ...], weights: list[Tensor], has_biases: bool,
    *, reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Runs one layer in one direction: x [T, B, features] -> outputs [T, B, hidden] and the last state."""
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = weights[2:4] if has_biases else (None, None)
    w_hr = weights[-1] if len(weights) in (3, 5) else None
    inputs = F.linear(x, w_ih, b_ih).unbind()  # all steps at once; indexed, each would have a gradient of full length
    outputs: list[Tensor] = []
    for x_t in reversed(inputs) if reverse else inputs:
        state = step(
            x_t,
            state,
            lambda h: F.linear(h, w_hh, b_hh),
            lambda h: h if w_hr is None else F.linear(h, w_hr),
        )
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.lstm: _recurrent(torch.lstm, _lstm_step, 2),
    torch.gru: _recurrent(torch.gru, _gru_step, 1),
    torch.rnn_tanh: _recurrent(torch.rnn_tanh, _rnn_step(torch.tanh), 1),
    torch.rnn_relu: _recurrent(torch.rnn_relu, _rnn_step(torch.relu), 1),
}
