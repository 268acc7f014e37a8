"""The float64 oracle, computed in blocks, and how far from it a result may be.

The reference never holds a full score matrix: memory is linear in sequence length. In every head that is compared, the
output is known for every row. Of dq, a row out of every `STRIDE` consecutive ones is known, drawn at random for each
head, and of dk and dv likewise a key, so that the sample costs 1/`STRIDE` of a full backward. All heads are compared
while that takes less than `MOST_SCORES` scores; beyond, the first and the last key head (with their query heads) and as
many others, drawn at random, as fit. Whether values are finite is checked on every element of every head.

What that can miss: in a head that is compared, nothing of the output. In dq, dk and dv a fault in L consecutive rows is
hit with certainty where it covers an aligned stretch of `STRIDE`, as it does where L ≥ 2·`STRIDE` − 1 or where a kernel's
tile of 64 is wrong; a shorter one inside a stretch with probability L/`STRIDE`, and if it hits all of B heads that are
compared alike, it is missed with probability (1 − L/`STRIDE`)^B. A fault in a single head out of G, of which S are
compared, is missed with probability 1 − S/G, unless it is the first or the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbench.case import Case
from attnbench.inputs import Inputs
from attnbench.tolerance import TOLERANCE

STRIDE = 64
"""Rows of dq, and keys of dk and dv, out of which one is compared."""

BLOCK_SCORES = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Scores held at a time: a block that stays in a CPU's cache, or that fills a GPU."""

MOST_SCORES = {"cpu": 1 << 30, "cuda": 1 << 34}
"""Scores that the reference computes at the most, before it compares a sample of heads: a few seconds' work."""


@dataclass(frozen=True)
class Reference:
    """float64 values of H query heads and G key heads, which `heads_H` and `groups_G` count over batch and heads.

    `rows_HR` and `keys_GS` index what dq, dk and dv hold.

    `terms_*` are the norms of dq's and dk's rows had their terms been added without cancelling: the size of what was
    summed, to which rounding errors are relative where the sum itself all but vanishes (with a single key, say).
    """

    heads_H: Tensor
    groups_G: Tensor
    out_HNd: Tensor
    rows_HR: Tensor
    keys_GS: Tensor
    dq_HRd: Tensor
    dk_GSd: Tensor
    dv_GSd: Tensor
    terms_dq_HR: Tensor
    terms_dk_GS: Tensor


def reference(case: Case, inputs: Inputs, *, backward: bool = True) -> Reference:
    """The float64 result of a case for its inputs, on their device; batch is folded into heads.

    Rows that see no key are zero, and so are their gradients.
    """
    with torch.no_grad():
        return _Oracle(case, inputs).solve(backward)


class _Oracle:
    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case = case
        self.device = inputs.q.device
        self.scale = 1 / math.sqrt(case.d_model)
        self.offset = case.kv_len - case.seq_len
        self.sampler = torch.Generator().manual_seed(case.seq_len * 31 + case.kv_len)
        group = case.heads // case.kv_heads
        self.groups_G = self._choose(case.batch * case.kv_heads, group * case.seq_len * case.kv_len)
        self.heads_H = (self.groups_G[:, None] * group + torch.arange(group, device=self.device)).flatten()
        self.q_HNd, self.do_HNd = (x.detach().flatten(0, 1)[self.heads_H] for x in (inputs.q, inputs.do))
        self.k_GMd, self.v_GMd = (x.detach().flatten(0, 1)[self.groups_G] for x in (inputs.k, inputs.v))

    def _choose(self, groups: int, scores_each: int) -> Tensor:
        """Indices of the key heads to compare, ascending: the first, the last, and others at random up to the limit."""
        most = max(2, MOST_SCORES[self.device.type] // scores_each)
        if groups <= most:
            return torch.arange(groups, device=self.device)
        inner = torch.randperm(groups - 2, generator=self.sampler)[: most - 2] + 1
        return torch.cat([torch.tensor([0, groups - 1]), inner]).sort().values.to(self.device)

    def solve(self, backward: bool) -> Reference:
        case = self.case
        H, G = self.q_HNd.shape[0], self.k_GMd.shape[0]
        rows, keys = self._sample(H, case.seq_len), self._sample(G, case.kv_len)
        wide = {"dtype": torch.float64, "device": self.device}
        out = torch.empty(H, case.seq_len, case.d_model, **wide)
        dq = torch.empty(*rows.shape, case.d_model, **wide)
        dk, dv = (torch.zeros(*keys.shape, case.d_model, **wide) for _ in range(2))
        terms_dq, terms_dk = torch.empty(*rows.shape, **wide), torch.zeros(*keys.shape, **wide)
        group = H // G
        for head in range(H):
            q, do = self.q_HNd[head].double(), self.do_HNd[head].double()
            k, v = self.k_GMd[head // group].double(), self.v_GMd[head // group].double()
            out[head], logsumexp = self._forward(q, k, v)
            if backward:
                delta = (do * out[head]).sum(-1)
                known = (q, do, k, v, logsumexp, delta)
                dq[head], terms_dq[head] = self._dq(*known, rows[head])
                shared = head // group
                self._add_dk_dv(*known, keys[shared], dk[shared], dv[shared], terms_dk[shared])
        return Reference(self.heads_H, self.groups_G, out, rows, keys, dq, dk, dv, terms_dq, terms_dk.sqrt_())

    def _sample(self, heads: int, length: int) -> Tensor:
        """One index out of every `STRIDE`, anew for each head, ascending; (heads, ⌈length/STRIDE⌉)."""
        starts = torch.arange(0, length, STRIDE)
        sizes = torch.clamp(length - starts, max=STRIDE)
        draws = torch.rand(heads, len(starts), generator=self.sampler)
        return (starts + (draws * sizes).long()).to(self.device)

    def _scores(self, q_Rd: Tensor, k_Sd: Tensor, rows_R: Tensor, keys_S: Tensor) -> Tensor:
        scores = q_Rd @ k_Sd.T
        scores *= self.scale
        if self.case.causal:
            scores.masked_fill_(rows_R[:, None] + self.offset < keys_S[None, :], -math.inf)
        return scores

    def _blocks(self, rows: int, width: int) -> Iterator[slice]:
        height = max(16, BLOCK_SCORES[self.device.type] // width)
        return (slice(start, min(start + height, rows)) for start in range(0, rows, height))

    def _forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out (N, d) and log-sum-exp (N,) of one head; +inf where a row sees no key, so that its weights come out 0."""
        N, M = len(q), len(k)
        index = torch.arange(max(N, M), device=self.device)
        out, logsumexp = torch.empty_like(q), q.new_empty(N)
        for block in self._blocks(N, M):
            seen = min(M, max(0, block.stop + self.offset)) if self.case.causal else M
            if not seen:
                out[block], logsumexp[block] = 0, math.inf
                continue
            scores = self._scores(q[block], k[:seen], index[block], index[:seen])
            top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float64).min)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            out[block] = (weights @ v[:seen]).div_(total).nan_to_num_(nan=0.0)
            logsumexp[block] = torch.where(total > 0, top + total.log(), math.inf).squeeze(-1)
        return out, logsumexp

    def _weights(self, scores: Tensor, logsumexp: Tensor) -> Tensor:
        return scores.sub_(logsumexp[:, None]).exp_()

    def _dq(
        self, q: Tensor, do: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor, delta: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        keys = torch.arange(len(k), device=self.device)
        dq, terms = q.new_empty(len(rows), q.shape[1]), q.new_empty(len(rows))
        for block in self._blocks(len(rows), len(k)):
            r = rows[block]
            p = self._weights(self._scores(q[r], k, r, keys), logsumexp[r])
            dp = do[r] @ v.T
            terms[block] = ((dp.abs() + delta[r, None].abs()) * p).norm(dim=-1) * (self.scale * _rms_norm(k))
            dq[block] = (p.mul_(dp.sub_(delta[r, None])) @ k) * self.scale
        return dq, terms

    def _add_dk_dv(
        self, q: Tensor, do: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor, delta: Tensor, keys: Tensor,
        dk: Tensor, dv: Tensor, squared_terms_dk: Tensor,
    ) -> None:  # fmt: skip
        rows = torch.arange(len(q), device=self.device)
        for block in self._blocks(len(q), len(keys)):
            p = self._weights(self._scores(q[block], k[keys], rows[block], keys), logsumexp[block])
            dv += p.T @ do[block]
            dp = do[block] @ v[keys].T
            terms = (dp.abs() + delta[block, None].abs()) * p
            squared_terms_dk += terms.square().sum(0) * (self.scale * _rms_norm(q)) ** 2
            dk += (p.mul_(dp.sub_(delta[block, None])).T @ q[block]) * self.scale


def _rms_norm(rows_Nd: Tensor) -> Tensor:
    """Root mean square of the rows' norms."""
    return rows_Nd.square().sum(-1).mean().sqrt()


@dataclass(frozen=True)
class Errors:
    """`row_error` of each result that was compared, by name (`out`, `dq`, `dk`, `dv`); None where it is not finite.

    `not_finite` counts values, and `beyond` names results that are finite but whose distance is not."""

    by_name: dict[str, float | None]
    tolerance: float
    not_finite: dict[str, int]
    beyond: tuple[str, ...] = ()

    @property
    def complaint(self) -> str | None:
        """What is wrong, for a reader; None if nothing is."""
        found = [f"{name} has {count} values that are not finite" for name, count in self.not_finite.items()]
        found += [f"{name} is off by more than float64 can tell" for name in self.beyond]
        found += [
            f"{name} is off by {error:.2g} (tolerance {self.tolerance:.2g})"
            for name, error in self.by_name.items()
            if error is not None and error > self.tolerance
        ]
        return "; ".join(found) or None


def compare(case: Case, expected: Reference, out: Tensor, grads: tuple[Tensor, ...] | None) -> Errors:
    """How far a result is from the reference; `grads` are dq, dk and dv, or None after a forward alone."""
    none = torch.zeros((), dtype=torch.float64, device=out.device)
    H, G = expected.heads_H, expected.groups_G
    to_compare = [("out", out.detach(), H, None, expected.out_HNd, none)]
    if grads is not None:
        dq, dk, dv = grads
        to_compare += [
            ("dq", dq, H, expected.rows_HR, expected.dq_HRd, expected.terms_dq_HR),
            ("dk", dk, G, expected.keys_GS, expected.dk_GSd, expected.terms_dk_GS),
            ("dv", dv, G, expected.keys_GS, expected.dv_GSd, none),
        ]
    errors: dict[str, float | None] = {}
    not_finite: dict[str, int] = {}
    beyond: list[str] = []
    for name, result, heads, index, wanted, terms in to_compare:
        if count := int((~torch.isfinite(result)).sum()):
            not_finite[name], errors[name] = count, None
            continue
        rows = result.flatten(0, 1)[heads]
        known = rows if index is None else rows.gather(1, index[..., None].expand(-1, -1, case.d_model))
        error = row_error(known, wanted, terms)
        errors[name] = error if math.isfinite(error) else None
        if errors[name] is None:
            beyond.append(name)
    return Errors(errors, TOLERANCE[case.dtype, case.precision], not_finite, tuple(beyond))


def row_error(result_HRd: Tensor, wanted_HRd: Tensor, terms_HR: Tensor) -> float:
    """The worst row's relative error: max over rows of ‖result − wanted‖ / max(‖wanted‖, rms of ‖wanted‖, terms).

    A norm over the whole tensor would drown one wrong tile among thousands of right ones. The root mean square over all
    rows in the denominator, and the size of the terms that were summed, keep rows that ought to be zero, as dq of a
    causal mask's first row, from dividing by nothing: they are the scale that rounding errors have.
    """
    wanted = wanted_HRd.norm(dim=-1)
    scale = torch.maximum(torch.maximum(wanted, wanted.square().mean().sqrt()), terms_HR.expand_as(wanted))
    worst = max(
        ((result.double() - reference).norm(dim=-1) / size.clamp_min(1e-300)).max()
        for result, reference, size in zip(result_HRd, wanted_HRd, scale, strict=True)
    )
    return float(worst)
