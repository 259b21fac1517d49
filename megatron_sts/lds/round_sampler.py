"""Skipping by rounds: neighbouring layers together, so that a pipeline's schedule can leave out what does not run.

Round v of an interleaved pipeline is chunk v of every rank. If a step skips it on all of them, the step is a pipeline
with a round less, as balanced as the dense one. How much of the saving that keeps: ``plan.comparison``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.placement import Placement
from megatron_sts.lds.quota import scaled_to_sum
from megatron_sts.lds.samplers import fixed_point, holds_a_point, upper_bits

NUM_ORDERS = 128
"""Orders of the rounds from which a step takes one: so few that what follows from all of them can be summed exactly."""
MOST_ITERATIONS = 30
"""One is enough where yields are in proportion to what rounds skip, eight were the most that 600 random layouts took."""
TOLERANCE = 1e-6
"""Relative error of the expected number of skipped layers."""


@dataclass(frozen=True)
class RoundSampler:
    """The rounds of a stage in one step: their probabilities, and what they draw.

    A round is skipped with the mean of its layers' probabilities, but never if one of them has probability 0 (it is
    protected): the other rounds then take over, in proportion. With ``lds.head_yields: auto`` a step whose last round
    is skipped skips min(n, round(head / layer)) of the n layers that the last pipeline rank has in the last round that
    runs as well, deepest first: the head, which moves there, takes their place, so that all ranks stay equal. These
    yields are skipped in addition, so all rounds get a little less likely: the expected number of skipped layers stays
    the sum of the probabilities (less where every round that may be skipped is certain to be).
    """

    probabilities: NDArray[np.float64]
    """p_l of the schedule, [layers]."""
    of_layer: NDArray[np.int_]
    """Each layer's round, [layers]."""
    yielding: NDArray[np.bool_]
    """Which layers a round gives up for the head when it is the last that runs but not the last of all, [rounds, layers]."""

    @cached_property
    def num_layers(self) -> NDArray[np.int_]:
        """[rounds]; rounds without a layer neither run nor skip."""
        return np.bincount(self.of_layer)

    @cached_property
    def of_rounds(self) -> NDArray[np.float64]:
        """With which probability each round is skipped, [rounds]."""
        total = float(self.probabilities.sum())
        means = np.bincount(self.of_layer, self.probabilities) / np.maximum(self.num_layers, 1)
        means[np.unique(self.of_layer[self.probabilities == 0])] = 0
        skipped = scaled_to_sum(means, total, self.num_layers)
        excess = self._num_skipped(skipped) - total
        (low, of_low), (high, of_high) = (0.0, -total), (total, excess)
        # Regula falsi with the Illinois rule: a bound that stays twice counts half. The excess need not rise everywhere.
        # None at the start: no yields, or not even all rounds would be too many.
        for _ in range(MOST_ITERATIONS if excess > 0 else 0):
            if abs(excess) <= TOLERANCE * total:
                break
            rounds_alone = (low * of_high - high * of_low) / (of_high - of_low)
            skipped = scaled_to_sum(means, rounds_alone, self.num_layers)
            before, excess = excess, self._num_skipped(skipped) - total
            same_side = before * excess > 0
            if excess > 0:
                high, of_high, of_low = rounds_alone, excess, of_low / (2 if same_side else 1)
            else:
                low, of_low, of_high = rounds_alone, excess, of_high / (2 if same_side else 1)
        return skipped

    def _num_skipped(self, of_rounds: NDArray[np.float64]) -> float:
        """Layers that are expected to be skipped, yields included."""
        yields = self.yielding.sum(axis=1) * self.last_running(of_rounds) if self.yielding.any() else 0.0
        return float((self.num_layers * of_rounds + yields).sum())

    @cached_property
    def of_layers(self) -> NDArray[np.float64]:
        """p'_l, with which each layer is skipped: by its round or, when that runs, for the head. [layers]"""
        yields = self.last_running(self.of_rounds) @ self.yielding if self.yielding.any() else 0.0
        return np.asarray(self.of_rounds[self.of_layer] + yields)

    def draw(self, words: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Skipped layers from two words of 64 random bits, [layers]: systematic sampling in one of ``orders``.

        How many rounds a step skips is floor or ceil of the sum of their probabilities.
        """
        order = orders(len(self.num_layers))
        order = order[int(upper_bits(words[0]) * 2.0**-53 * len(order))]
        length = fixed_point(self.of_rounds[order])
        end = np.cumsum(length, dtype=np.uint64)
        skipped = np.empty(len(order), dtype=np.bool_)
        skipped[order] = holds_a_point(np.asarray(end - length), end, upper_bits(words[1]))
        return np.asarray(self._layers(skipped[None])[0])

    def outcomes(self, most_orders: int = NUM_ORDERS) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """All that may be drawn, [outcomes, layers], and how likely each is; one may be there several times.

        ``most_orders``: take no more of the orders, evenly spaced. Each for itself has the rounds' probabilities.
        """
        order = orders(len(self.num_layers))
        order = order[np.linspace(0, len(order) - 1, min(most_orders, len(order))).astype(int)]
        skipped, weight = _outcomes(self.of_rounds, order)
        likely = weight > 0
        return self._layers(skipped[likely]), weight[likely]

    def last_running(self, of_rounds: NDArray[np.float64]) -> NDArray[np.float64]:
        """With which probability each round is the last one that runs, the last of all left out, [rounds].

        Round by round from the last one, over the outcomes that skip all rounds behind it.
        """
        order = orders(len(of_rounds))
        end, offset, weight = _stretches(of_rounds, order)
        of_order = np.repeat(np.arange(len(order)), offset.shape[1])
        offset, weight = offset.ravel(), weight.ravel()
        probability = np.zeros_like(of_rounds)
        for number in np.flatnonzero(self.num_layers)[::-1]:
            begin = end[of_order, number] - of_rounds[number]
            skipped = np.floor(end[of_order, number] + offset) > np.floor(begin + offset)
            probability[number] = weight[~skipped].sum()
            if not skipped.any():
                break
            of_order, offset, weight = of_order[skipped], offset[skipped], weight[skipped]
        probability[np.flatnonzero(self.num_layers)[-1]] = 0
        return probability

    def _layers(self, skipped: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The layers skipped with these rounds, yields included: [masks, rounds] to [masks, layers]."""
        layers, runs = skipped[:, self.of_layer], ~skipped & (self.num_layers > 0)
        last = runs.shape[1] - 1 - np.argmax(runs[:, ::-1], axis=1)  # without any the last round, which yields nothing
        return np.asarray(layers | self.yielding[last])


def _stretches(
    of_rounds: NDArray[np.float64], order: NDArray[np.int_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Where each round's stretch ends, [orders, rounds]; one offset for each outcome, and how likely that is, [orders, offsets].

    Exact: in each order, what is skipped changes with the offset only where a point passes the end of a round.
    """
    end = np.cumsum(of_rounds[order], axis=1)
    passes = np.sort(np.pad(-end % 1, [(0, 0), (1, 1)], constant_values=(0, 1)), axis=1)
    of_number = np.take_along_axis(end, np.argsort(order, axis=1), axis=1)
    return of_number, (passes[:, :-1] + passes[:, 1:]) / 2, np.diff(passes, axis=1) / len(order)


def _outcomes(of_rounds: NDArray[np.float64], order: NDArray[np.int_]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """What systematic sampling in these orders skips, [orders, offsets, rounds], and how likely each is, [orders, offsets]."""
    end, offset, weight = _stretches(of_rounds, order)
    end, offset = end[:, None], offset[..., None]
    return np.floor(end + offset) > np.floor((end - of_rounds) + offset), weight


def round_sampler(lds: LdsConfig, probabilities: NDArray[np.float64], placement: Placement) -> RoundSampler:
    """``probabilities``: p_l of the step, [layers].

    ``lds.rounds: layout`` takes the layout's rounds. A number of equal blocks instead, and what the last running block
    yields of all its layers, is the same on every layout, one rank included.
    """
    num_layers = placement.num_layers
    owner = np.asarray(placement.owner)
    if lds.rounds == "layout":
        of_layer, may_yield = np.asarray(placement.round), owner == placement.num_ranks - 1
    else:
        of_layer, may_yield = np.arange(num_layers) * lds.rounds // num_layers, np.ones(num_layers, dtype=np.bool_)
    may_yield = may_yield & (probabilities > 0)
    yielding = np.zeros((of_layer.max() + 1, num_layers), dtype=np.bool_)
    if lds.head_yields == "auto" and (most := math.floor(placement.head_work + 0.5)):
        for number in range(of_layer.max()):  # the last round's layers run beside the head as the layout says
            yielding[number, np.flatnonzero(may_yield & (of_layer == number))[-most:]] = True
    return RoundSampler(probabilities, of_layer, yielding)


@lru_cache(maxsize=8)
def orders(num_rounds: int) -> NDArray[np.int_]:
    """All orders of the rounds, or of many rounds ``NUM_ORDERS`` random ones, the same in every run, [orders, rounds]."""
    if math.factorial(num_rounds) <= NUM_ORDERS:
        return np.array(list(permutations(range(num_rounds))))
    words = np.random.Philox(key=num_rounds).random_raw(NUM_ORDERS * num_rounds)
    return np.argsort(words.reshape(NUM_ORDERS, num_rounds), axis=1, kind="stable")
