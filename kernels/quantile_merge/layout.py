"""How a correlation is handed over."""

from typing import Literal

# cut: (B, R, K), source i with target j. rows: (B, R, N), source i with every token. map: (B, N, N).
Layout = Literal["cut", "rows", "map"]
