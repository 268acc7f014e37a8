"""What a case costs at the least: floating-point operations, bytes moved and exponentials."""

from __future__ import annotations

from attnbench.case import Case


def pairs(case: Case) -> int:
    """Unmasked (query, key) pairs over all heads; exact under the causal mask.

    Query i sees min(kv_len, i + 1 + kv_len − seq_len) keys, none where that is negative: an arithmetic series.
    """
    if not case.causal:
        return case.scores
    rows = min(case.seq_len, case.kv_len)  # queries that see any key; the last sees all kv_len of them
    return case.batch * case.heads * (rows * case.kv_len - rows * (rows - 1) // 2)


def flops_forward(case: Case) -> int:
    """2 for each multiply-add of q·kᵀ and of p·v, useful work alone (the FlashAttention convention)."""
    return 4 * pairs(case) * case.d_model


def flops_backward(case: Case) -> int:
    """Five products against the forward's two: the scores again, dv, dp, dq and dk."""
    return flops_forward(case) * 5 // 2


def bytes_forward(case: Case) -> int:
    """q, k and v read once, the output written once."""
    return 2 * (case.query_elements + case.key_elements) * case.element_bytes


def bytes_backward(case: Case) -> int:
    """q, k, v, the output and its gradient read once; dq, dk and dv written once."""
    return 4 * (case.query_elements + case.key_elements) * case.element_bytes


def exps_forward(case: Case) -> int:
    """One for each score that is not masked."""
    return pairs(case)


def exps_backward(case: Case) -> int:
    """One for each score again, since only a row's log-sum-exp is kept of them."""
    return pairs(case)
