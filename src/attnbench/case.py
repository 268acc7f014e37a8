"""A case: one attention problem, and the name by which records know it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from attnbench.errors import RequestError, unknown

DTYPES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
"""Element types and their size in bytes."""

PRECISIONS = ("ieee", "tf32")
"""How products of float32 are taken: in full, or with inputs rounded to TensorFloat-32."""


@dataclass(frozen=True)
class Case:
    """softmax(q·kᵀ/√d_model)·v for q of shape (batch, heads, seq_len, d_model) and k, v of (batch, kv_heads, kv_len, d_model).

    `d_model` is the dimension of one head, as in the table this project began with. Fewer `kv_heads` than `heads` is
    grouped-query attention, one is multi-query. A causal mask is aligned to the bottom right: query i sees keys
    0 … i + kv_len − seq_len, so that the last query sees every key; with equal lengths that is the usual triangle.
    `precision` matters for float32 alone and is `ieee` for every other dtype.

    Raises:
        RequestError: a size below one, an unknown dtype or precision, or `kv_heads` that do not divide `heads`.
    """

    batch: int
    heads: int
    kv_heads: int
    seq_len: int
    kv_len: int
    d_model: int
    dtype: str = "float32"
    precision: str = "ieee"
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "kv_heads", "seq_len", "kv_len", "d_model"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} = {getattr(self, name)} is not a whole number above zero")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.heads % self.kv_heads:
            raise RequestError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}")

    @property
    def id(self) -> str:
        """Unique among cases, stable between versions, fit for a file name."""
        mask = "causal" if self.causal else "full"
        return (
            f"b{self.batch}.h{self.heads}.g{self.kv_heads}.n{self.seq_len}.m{self.kv_len}.d{self.d_model}"
            f".{self.dtype}.{self.precision}.{mask}"
        )

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype]

    @property
    def query_elements(self) -> int:
        """Elements of q, of the output and of dq."""
        return self.batch * self.heads * self.seq_len * self.d_model

    @property
    def key_elements(self) -> int:
        """Elements of k, of v and of their gradients."""
        return self.batch * self.kv_heads * self.kv_len * self.d_model

    @property
    def scores(self) -> int:
        """Elements of the full score matrix, masked ones included."""
        return self.batch * self.heads * self.seq_len * self.kv_len

    @property
    def masked_rows(self) -> int:
        """Queries of one head that see no key at all: causal with fewer keys than queries."""
        return max(0, self.seq_len - self.kv_len) if self.causal else 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
