"""What options of `deft report` may be, for its help too, which loads no model."""

from __future__ import annotations

# Without a parameter of their own to choose, which `alpha` has.
DEFAULT_OBJECTIVES = ("nll", "p", "dft", "eaft", "cayley", "cayley_trans", "deft")
DTYPES = ("float32", "bfloat16", "float16")
